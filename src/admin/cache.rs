//! `/cache`: what the caches hold, and dropping it.

use http::{StatusCode, Uri};
use serde_json::{Map, Value, json};

use crate::{
    layers::cache::{Figures, State, Target, tags},
    message::path::decode,
    telemetry::{Metrics, exchange::CacheOutcome},
};

/// The caches, by route.
pub(super) fn list(state: &State, metrics: &Metrics) -> Value {
    let shown = |figures: Figures| {
        let Figures { route, entries, bytes, in_flight, in_flight_bytes, resumable, resumable_bytes } = figures;
        let counted = metrics.cache(&route);
        let outcome = |outcome: CacheOutcome| (outcome.as_str().to_owned(), counted.counted(outcome).into());
        json!({
            "route": route,
            "entries": entries,
            "bytes": bytes,
            "in_flight": in_flight,
            "in_flight_bytes": in_flight_bytes,
            "resumable": resumable,
            "resumable_bytes": resumable_bytes,
            "requests": CacheOutcome::ALL.map(outcome).into_iter().collect::<Map<_, _>>(),
            "stored": counted.stored.get(),
            "evicted": counted.evicted.get(),
            "refreshed": counted.refreshed.get(),
            "saved_seconds": counted.saved_seconds(),
        })
    };
    json!({ "caches": state.figures().into_iter().map(shown).collect::<Vec<_>>() })
}

/// The component: all caches together.
pub(super) fn health(state: &State, metrics: &Metrics) -> Value {
    let figures = state.figures();
    if figures.is_empty() {
        return json!({ "status": "none" });
    }
    let counted = |outcome| figures.iter().map(|figures| metrics.cache(&figures.route).counted(outcome)).sum::<u64>();
    let all = CacheOutcome::ALL.map(|outcome| (outcome.as_str().to_owned(), counted(outcome).into()));
    json!({
        "status": "ok",
        "routes": figures.len(),
        "entries": figures.iter().map(|figures| figures.entries).sum::<u64>(),
        "bytes": figures.iter().map(|figures| figures.bytes).sum::<u64>(),
        "requests": all.into_iter().collect::<Map<_, _>>(),
    })
}

const WRONG: &str = "the query is one of `url=PATH`, `tag=TAG`, `glob=PATTERN` and `all`, each with `soft` or without; \
                     `url` is a path with its query, percent-encoded, with a host before it or without";

/// Drops what the query names.
///
/// # Errors
/// The status and the reason, where it names nothing that could be dropped.
pub(super) fn purge(state: &State, uri: &Uri) -> Result<Value, (StatusCode, &'static str)> {
    let wrong = (StatusCode::BAD_REQUEST, WRONG);
    let (mut target, mut soft) = (None, false);
    for pair in uri.query().unwrap_or_default().split('&').filter(|pair| !pair.is_empty()) {
        let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
        let value = String::from_utf8(decode(value.as_bytes()).into_owned()).map_err(|_| wrong)?;
        let named = match (name, &*value) {
            ("soft", "" | "true") => {
                soft = true;
                continue;
            }
            ("all", "" | "true") => Target::All,
            ("url", url) => Target::url(url).ok_or(wrong)?,
            ("tag", tag) => Target::Tag(tags::named(tag).ok_or(wrong)?.into()),
            ("glob", glob) => Target::Glob(glob.parse().map_err(|_| wrong)?),
            _ => return Err(wrong),
        };
        if target.replace(named).is_some() {
            return Err(wrong);
        }
    }
    let target = target.ok_or(wrong)?;
    state.purge(&target, soft);
    Ok(json!({ "purged": target.to_string(), "soft": soft }))
}
