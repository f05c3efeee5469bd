//! A reverse proxy of composable tower layers.

pub mod message;
pub mod telemetry;
