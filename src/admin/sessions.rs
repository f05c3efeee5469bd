//! `/sessions`: who has been here, and sending them away.

use std::time::{Duration, UNIX_EPOCH};

use http::{StatusCode, Uri};
use serde_json::{Value, json};

use crate::{
    layers::session::{Listed, Outcome, State, Which},
    message::path::decode,
    store::{Failure, Redis},
};

/// Sessions in one answer, where the question does not say.
const FEW: usize = 100;
/// And at most.
const MOST: usize = 1000;

type Refused = (StatusCode, &'static str);

const OUT_OF_ORDER: Refused = (StatusCode::SERVICE_UNAVAILABLE, "redis, where sessions are kept, is out of order");

/// What a query asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Asked {
    principal: Option<String>,
    limit: Option<usize>,
}

impl Asked {
    /// # Errors
    /// There is something else in it. What is misspelt must not mean all.
    fn of(uri: &Uri) -> Result<Self, Refused> {
        let wrong = (StatusCode::BAD_REQUEST, "the query is `principal=ID`, `limit=1` to `limit=1000`, or both");
        let mut asked = Self::default();
        for part in uri.query().unwrap_or_default().split('&').filter(|part| !part.is_empty()) {
            match part.split_once('=') {
                Some(("principal", id)) if asked.principal.is_none() => {
                    asked.principal = Some(String::from_utf8(decode(id.as_bytes()).into_owned()).map_err(|_| wrong)?);
                }
                Some(("limit", limit)) if asked.limit.is_none() => {
                    asked.limit = Some(limit.parse().ok().filter(|limit| (1..=MOST).contains(limit)).ok_or(wrong)?);
                }
                _ => return Err(wrong),
            }
        }
        Ok(asked)
    }
}

/// The sessions of a principal, or of all.
pub(super) async fn list(state: &State, redis: Option<&Redis>, uri: &Uri) -> Result<Value, Refused> {
    let Asked { principal, limit } = Asked::of(uri)?;
    let which = principal.as_deref().map_or(Which::All, Which::Principal);
    let listed = state.list(redis, which, limit.unwrap_or(FEW)).await;
    let Outcome { found, complete } = listed.map_err(|_: Failure| OUT_OF_ORDER)?;
    let shown = |Listed { id, created, last_seen, principal }: &Listed| json!({ "id": id, "created": time(*created), "last_seen": time(*last_seen), "principal": principal });
    let sessions: Vec<_> = found.iter().map(shown).collect();
    Ok(json!({ "store": store(redis), "sessions": sessions, "complete": complete }))
}

/// Takes away the session `id`, as the list calls it, or those of the principal that `uri` asks for.
pub(super) async fn revoke(state: &State, redis: Option<&Redis>, id: &str, uri: &Uri) -> Result<Value, Refused> {
    let asked = Asked::of(uri)?;
    let which = match (id, &asked) {
        ("", Asked { principal: Some(principal), limit: None }) => Which::Principal(principal),
        (id, Asked { principal: None, limit: None }) if is_id(id) => Which::Id(id),
        ("", _) => return Err((StatusCode::BAD_REQUEST, "say whose: `?principal=ID`, or `DELETE /sessions/{id}`")),
        _ => return Err((StatusCode::BAD_REQUEST, "an id is 16 hexadecimal digits, as `GET /sessions` shows it")),
    };
    let Outcome { found, complete } = state.revoke(redis, which).await.map_err(|_: Failure| OUT_OF_ORDER)?;
    if found == 0 && complete && matches!(which, Which::Id(_)) {
        return Err((StatusCode::NOT_FOUND, "there is no such session: see `GET /sessions`"));
    }
    Ok(json!({ "store": store(redis), "revoked": found, "complete": complete }))
}

fn is_id(id: &str) -> bool {
    id.len() == 16 && id.bytes().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f'))
}

fn store(redis: Option<&Redis>) -> &'static str {
    if redis.is_some() { "redis" } else { "memory" }
}

fn time(seconds: u64) -> String {
    // A time that nobody can write is one of a broken clock.
    let at = UNIX_EPOCH + Duration::from_secs(seconds.min(253_402_300_799));
    humantime::format_rfc3339_seconds(at).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_query_says_what_is_meant_or_nothing_is_done() {
        let asked = |query: &str| Asked::of(&format!("/sessions{query}").parse().unwrap()).ok();
        assert_eq!(asked(""), Some(Asked::default()));
        let both = Asked { principal: Some("a b".to_owned()), limit: Some(7) };
        assert_eq!(asked("?limit=7&principal=a%20b"), Some(both));
        for wrong in ["?principle=a", "?limit=0", "?limit=1001", "?limit=a", "?principal", "?principal=a&principal=b"] {
            assert_eq!(asked(wrong), None, "{wrong}");
        }
        assert_eq!(time(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(time(u64::MAX), "9999-12-31T23:59:59Z");
    }
}
