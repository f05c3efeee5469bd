//! What sidegate says of itself: log lines, samples, and the record of each exchange that both are made of.

pub mod exchange;
pub mod log;
pub mod metrics;

pub use self::{exchange::Exchange, metrics::Metrics};
