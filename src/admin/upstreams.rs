//! `/upstreams` and `/health/upstreams`: the endpoints that there is a choice of, and taking them out.

use std::{collections::BTreeMap, sync::Arc};

use http::{StatusCode, Uri};
use serde_json::{Value, json};
use tokio::time::Instant;

use super::asked_endpoint;
use crate::{
    layers::circuit_breaker::Breaker,
    upstream::balance::{Balancer, Member},
};

/// All upstreams that are balanced over, by name.
type Balancers = BTreeMap<String, Arc<Balancer>>;

/// The endpoints, with all that is known of them.
pub(super) fn list(balancers: &Balancers, breakers: &[Arc<Breaker>]) -> Value {
    let now = Instant::now();
    let shown = |(name, balancer): (&String, &Arc<Balancer>)| {
        let endpoints = balancer.members();
        let endpoints = endpoints.iter().map(|member| {
            let endpoint = &member.endpoint;
            let breaker = breakers
                .iter()
                .find(|breaker| (breaker.upstream(), breaker.endpoint()) == (endpoint.upstream(), endpoint.name()));
            let first_byte = endpoint.latency().last();
            let mut shown = health(member, now);
            shown["origin"] = json!(member.origin);
            shown["weight"] = member.weight.into();
            shown["effective_weight"] = balancer.effective_weight(member, now).into();
            shown["in_flight"] = endpoint.in_flight().into();
            shown["first_byte_ms"] = first_byte.map(|(average, _)| average.as_secs_f64() * 1000.0).into();
            shown["circuit_breaker"] = breaker.map(|breaker| breaker.snapshot().state.as_str()).into();
            shown
        });
        let endpoints: Vec<_> = endpoints.collect();
        json!({ "upstream": name, "algorithm": balancer.config().algorithm, "endpoints": endpoints })
    };
    json!({ "upstreams": balancers.iter().map(shown).collect::<Vec<_>>() })
}

/// The health alone.
pub(super) fn list_health(balancers: &Balancers) -> Value {
    let now = Instant::now();
    let shown = |(name, balancer): (&String, &Arc<Balancer>)| {
        let members = balancer.members();
        let healthy = members.iter().filter(|member| member.endpoint.is_healthy(now)).count();
        let endpoints: Vec<_> = members.iter().map(|member| health(member, now)).collect();
        json!({ "upstream": name, "healthy": healthy, "endpoints": endpoints })
    };
    json!({ "upstreams": balancers.iter().map(shown).collect::<Vec<_>>() })
}

fn health(member: &Member, now: Instant) -> Value {
    let endpoint = &member.endpoint;
    let health = endpoint.health();
    let ejected = health.ejected_until().filter(|until| now < *until);
    let status = match ejected {
        _ if health.is_down() => "down",
        Some(_) => "ejected",
        None => "up",
    };
    let check = health.last_check().map(|(at, error)| {
        let ago = now.saturating_duration_since(at).as_secs_f64();
        json!({ "passed": error.is_none(), "error": error, "seconds_ago": ago })
    });
    json!({
        "endpoint": **endpoint.name(),
        "health": status,
        "drained": endpoint.is_drained(),
        "last_check": check,
        "consecutive_failures": health.failures(),
        "ejected_for_seconds": ejected.map(|until| (until - now).as_secs_f64()),
    })
}

/// Takes the endpoint of `upstream` that `uri` asks for out, or puts it back. Answers with all endpoints then.
///
/// # Errors
/// The status and the reason, where there is nothing to be set.
pub(super) fn drain(
    balancers: &Balancers,
    breakers: &[Arc<Breaker>],
    drained: bool,
    upstream: &str,
    uri: &Uri,
) -> Result<Value, (StatusCode, &'static str)> {
    const WHICH: (StatusCode, &str) = (StatusCode::BAD_REQUEST, "the query is `endpoint=ENDPOINT`: say which one");
    const NONE: (StatusCode, &str) = (StatusCode::NOT_FOUND, "there is no such endpoint: see `GET /upstreams`");
    let endpoint = asked_endpoint(uri).map_err(|()| WHICH)?.ok_or(WHICH)?;
    let (name, balancer) = balancers.get_key_value(upstream).ok_or(NONE)?;
    let members = balancer.members();
    let member = members.iter().find(|member| endpoint == member.endpoint.name().as_bytes()).ok_or(NONE)?;
    member.endpoint.drain(drained);
    Ok(list(&BTreeMap::from([(name.clone(), balancer.clone())]), breakers))
}
