//! `/circuit-breakers`: what they are, and setting them.

use std::sync::Arc;

use http::{StatusCode, Uri};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::asked_endpoint;
use crate::layers::circuit_breaker::{Breaker, Snapshot};

/// What an operator does to a breaker.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    Reset,
    Open,
}

/// All breakers, with their figures.
pub(super) fn list(breakers: &[Arc<Breaker>]) -> Value {
    let now = Instant::now();
    let shown = |breaker: &Arc<Breaker>| {
        let Snapshot {
            state,
            forced,
            generation,
            consecutive_failures,
            requests,
            failures,
            slow,
            probes,
            opened_at,
            retry_after,
        } = breaker.snapshot();
        json!({
            "upstream": **breaker.upstream(),
            "endpoint": **breaker.endpoint(),
            "state": state.as_str(),
            "forced": forced,
            "generation": generation,
            "consecutive_failures": consecutive_failures,
            "window": { "requests": requests, "failures": failures, "slow": slow },
            "probes": probes,
            "refused": breaker.refused(),
            "opened_seconds_ago": opened_at.map(|at| now.saturating_duration_since(at).as_secs_f64()),
            "retry_after_seconds": retry_after.map(|after| after.as_secs_f64()),
        })
    };
    json!({ "circuit_breakers": breakers.iter().map(shown).collect::<Vec<_>>() })
}

/// Sets the breakers of `upstream`, or of the one endpoint that `uri` asks for. Answers with what they are then.
///
/// # Errors
/// The status and the reason, where there is nothing to be set.
pub(super) fn set(
    breakers: &[Arc<Breaker>],
    action: Action,
    upstream: &str,
    uri: &Uri,
) -> Result<Value, (StatusCode, &'static str)> {
    // One that is misspelt must not mean all of them.
    let wrong = |()| (StatusCode::BAD_REQUEST, "the query is `endpoint=ENDPOINT`, or nothing for all");
    let endpoint = asked_endpoint(uri).map_err(wrong)?;
    let meant = |breaker: &&Arc<Breaker>| {
        **breaker.upstream() == *upstream
            && endpoint.as_deref().is_none_or(|endpoint| breaker.endpoint().as_bytes() == endpoint)
    };
    let breakers: Vec<_> = breakers.iter().filter(meant).cloned().collect();
    if breakers.is_empty() {
        return Err((StatusCode::NOT_FOUND, "there is no such circuit breaker: see `GET /circuit-breakers`"));
    }
    for breaker in &breakers {
        match action {
            Action::Reset => breaker.reset(),
            Action::Open => breaker.force_open(),
        }
    }
    Ok(list(&breakers))
}
