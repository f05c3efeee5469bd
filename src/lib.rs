//! A reverse proxy of composable tower layers.

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests may collect bodies and spawn tasks"))]

pub mod config;
pub mod layers;
pub mod message;
pub mod telemetry;
pub mod upstream;
