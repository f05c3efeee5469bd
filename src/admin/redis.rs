//! How Redis is, for the operator. It degrades sidegate and never stops it: readiness does not ask.

use serde_json::{Value, json};

use crate::store::{Figures, Redis};

/// The component, of which `section` is the configuration.
pub(super) fn health(redis: Option<&Redis>, section: &Value) -> Value {
    let Some(redis) = redis else {
        // Left out, or there and switched off.
        let configured = section.is_object();
        return json!({ "status": if configured { "off" } else { "none" }, "configured": configured });
    };
    let Figures { state, since, reason, latency, reconnects, in_flight, mode, addresses } = redis.figures();
    let mut shown = json!({
        "status": state.as_str(),
        "configured": true,
        "mode": mode,
        "addresses": addresses,
        "since_seconds": since.as_secs(),
        "latency_ms": latency.map(|latency| latency.as_secs_f64() * 1000.0),
        "reconnects": reconnects,
        "in_flight": in_flight,
    });
    if let Some((failure, detail)) = reason {
        shown["reason"] = failure.as_str().into();
        shown["detail"] = if detail.is_empty() { failure.to_string() } else { detail }.into();
    }
    shown
}

/// Whether something is wrong.
pub(super) fn is_degraded(shown: &Value) -> bool {
    matches!(shown["status"].as_str(), Some("down" | "connecting")) || shown.get("reason").is_some()
}
