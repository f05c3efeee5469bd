//! What sidegate says of itself: log lines, samples, and the record of each exchange that both are made of.

mod due;
pub mod exchange;
pub mod log;
pub mod metrics;

pub use self::{due::Due, exchange::Exchange, metrics::Metrics};
