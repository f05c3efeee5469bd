//! A reverse proxy of composable tower layers.

pub mod config;
pub mod layers;
pub mod message;
pub mod telemetry;
pub mod upstream;
