//! `/rate-limits`: what the rules are; `/rate-limits/{rule}?key=…`: one counter of a rule, to be read and to be reset.

use std::sync::Arc;

use futures_util::future::join_all;
use http::{StatusCode, Uri};
use serde_json::{Value, json};

use crate::{
    layers::rate_limit::{Figures, Gate, window::Verdict},
    message::path::decode,
};

/// The rules of all routes, and how many replicas are known to count in the same Redis.
pub(super) fn list(gates: &[Arc<Gate>]) -> Value {
    let rules = gates.iter().flat_map(|gate| {
        gate.rules().iter().map(|rule| {
            let key: Vec<_> = rule.key().iter().map(ToString::to_string).collect();
            json!({ "route": gate.route(), "rule": rule.name(), "key": key, "policy": rule.policy() })
        })
    });
    let replicas = gates.iter().map(|gate| gate.replicas()).max().unwrap_or(1);
    json!({ "replicas": replicas, "rate_limits": rules.collect::<Vec<_>>() })
}

/// Which counters an operator asks for: `route=ROUTE` for those of one route, and a `key=VALUE` for each part of the
/// rule's key that has one.
struct Asked {
    route: Option<String>,
    values: Vec<String>,
}

impl Asked {
    fn of(uri: &Uri) -> Option<Self> {
        let mut asked = Self { route: None, values: Vec::new() };
        for pair in uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=')?;
            let value = String::from_utf8(decode(value.as_bytes()).into_owned()).ok()?;
            match name {
                "route" if asked.route.is_none() => asked.route = Some(value),
                "key" => asked.values.push(value),
                _ => return None,
            }
        }
        Some(asked)
    }
}

const WRONG: (StatusCode, &str) = (
    StatusCode::BAD_REQUEST,
    "the query is `key=VALUE` for each part of the rule's key but `global` and `route`, and `route=ROUTE` for one route",
);
const NOT_FOUND: (StatusCode, &str) =
    (StatusCode::NOT_FOUND, "there is no such rule, or its key has other parts: see `GET /rate-limits`");

/// What the counters of `rule` say.
///
/// # Errors
/// The status and the reason, where there are none.
pub(super) async fn look(gates: &[Arc<Gate>], rule: &str, uri: &Uri) -> Result<Value, (StatusCode, &'static str)> {
    let asked = Asked::of(uri).ok_or(WRONG)?;
    let meant = gates.iter().filter(|gate| asked.route.as_deref().is_none_or(|route| gate.route() == route));
    let looks = meant.map(async |gate| {
        let Figures { shared, local } = gate.look(rule, &asked.values).await?;
        Some(json!({
            "route": gate.route(),
            "rule": rule,
            "redis": shared.map(shown),
            "memory": shown(local),
        }))
    });
    let found: Vec<_> = join_all(looks).await.into_iter().flatten().collect();
    if found.is_empty() { Err(NOT_FOUND) } else { Ok(json!({ "counters": found })) }
}

fn shown(verdict: Verdict) -> Value {
    json!({ "remaining": verdict.remaining, "reset_seconds": verdict.reset.as_secs_f64() })
}

/// Resets the counters of `rule`, and says what they are then.
///
/// # Errors
/// The status and the reason, where there are none or Redis does not answer.
pub(super) async fn reset(gates: &[Arc<Gate>], rule: &str, uri: &Uri) -> Result<Value, (StatusCode, &'static str)> {
    let asked = Asked::of(uri).ok_or(WRONG)?;
    let meant = gates.iter().filter(|gate| asked.route.as_deref().is_none_or(|route| gate.route() == route));
    let resets = join_all(meant.map(|gate| gate.reset(rule, &asked.values))).await;
    if resets.iter().flatten().any(Result::is_err) {
        return Err((
            StatusCode::SERVICE_UNAVAILABLE,
            "redis does not answer: only the memory of this replica was reset",
        ));
    }
    look(gates, rule, uri).await
}
