//! A reverse proxy of composable tower layers.

pub mod config;
pub mod message;
pub mod telemetry;
