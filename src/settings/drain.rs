//! Section `drain`: how the process ends.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Check, HumanDuration, Problems};

/// How the process ends when it is asked to. Section `drain`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Drain")]
pub struct Config {
    /// How long connections are still accepted after readiness is off, for load balancers to notice.
    /// Default `0s`.
    pub delay: HumanDuration,
    /// How long requests and streams may run after that; then they are cut. Default `30s`. Kubernetes kills the
    /// process after `terminationGracePeriodSeconds`, in which both must fit. A WebSocket is cut without a close
    /// frame, which its client calls code 1006: what a tunnel carries is not looked into.
    pub timeout: HumanDuration,
}

impl Default for Config {
    fn default() -> Self {
        Self { delay: HumanDuration::from_secs(0), timeout: HumanDuration::from_secs(30) }
    }
}

impl Check for Config {
    fn check(&self, _: &mut Problems) {}
}
