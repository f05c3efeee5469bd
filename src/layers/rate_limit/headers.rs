//! What a response says of the limits that held for its request.
//!
//! `RateLimit-Policy` and `RateLimit` (draft-ietf-httpapi-ratelimit-headers) name each rule, also where the backend has
//! its own: both are lists. `X-RateLimit-*` and OpenAI's fields have room for one limit (of requests, and of tokens);
//! that is the one with the least left. They are sidegate's where they are asked for, whatever the backend said.

use std::time::{Duration, SystemTime};

use http::{HeaderMap, HeaderName, HeaderValue};

use super::{
    Compiled,
    key::put,
    rule::Cost,
    window::{Verdict, whole},
};

/// What is left of each limit.
pub const RATELIMIT: HeaderName = HeaderName::from_static("ratelimit");
/// What each limit is.
pub const RATELIMIT_POLICY: HeaderName = HeaderName::from_static("ratelimit-policy");
const LIMIT: HeaderName = HeaderName::from_static("x-ratelimit-limit");
const REMAINING: HeaderName = HeaderName::from_static("x-ratelimit-remaining");
const RESET: HeaderName = HeaderName::from_static("x-ratelimit-reset");
/// Those of OpenAI: limit, remaining, reset.
const REQUESTS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-requests"),
    HeaderName::from_static("x-ratelimit-remaining-requests"),
    HeaderName::from_static("x-ratelimit-reset-requests"),
];
const TOKENS: [HeaderName; 3] = [
    HeaderName::from_static("x-ratelimit-limit-tokens"),
    HeaderName::from_static("x-ratelimit-remaining-tokens"),
    HeaderName::from_static("x-ratelimit-reset-tokens"),
];

/// All of them, for who must let scripts of other origins see them.
pub fn all() -> impl Iterator<Item = HeaderName> {
    [RATELIMIT, RATELIMIT_POLICY, LIMIT, REMAINING, RESET].into_iter().chain(REQUESTS).chain(TOKENS)
}

/// Which of them are written beside those of the IETF.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Styles {
    pub(super) legacy: bool,
    pub(super) openai: bool,
}

/// A rule as `RateLimit-Policy` has it.
pub(super) fn policy(name: &str, cost: Cost, limit: u64, per: Option<Duration>) -> String {
    let window = per.map_or_else(String::new, |per| format!(";w={}", seconds(per)));
    let unit = match cost {
        Cost::One => "",
        Cost::Bytes => ";qu=\"content-bytes\"",
        Cost::Tokens => ";qu=\"tokens\"",
        Cost::InFlight => ";qu=\"concurrent-requests\"",
    };
    format!("\"{name}\";q={limit}{window}{unit}")
}

/// The fields about `rules`, which held for a request and said so.
pub(super) fn fields(rules: &[(&Compiled, Verdict)], styles: Styles) -> Vec<(HeaderName, HeaderValue)> {
    let mut fields = Vec::with_capacity(2);
    if rules.is_empty() {
        return fields;
    }
    let (mut policies, mut limits) = (String::with_capacity(32 * rules.len()), String::with_capacity(32 * rules.len()));
    for (rule, verdict) in rules {
        if !policies.is_empty() {
            policies.push_str(", ");
            limits.push_str(", ");
        }
        policies.push_str(&rule.policy);
        put(&mut limits, format_args!("\"{}\";r={}", rule.name, verdict.remaining));
        if rule.cost != Cost::InFlight {
            put(&mut limits, format_args!(";t={}", seconds(verdict.wait.unwrap_or(verdict.reset))));
        }
    }
    let mut add = |name: &HeaderName, value: String| {
        // Names of rules are letters and digits, and the rest are numbers.
        fields.extend(HeaderValue::try_from(value).map(|value| (name.clone(), value)));
    };
    add(&RATELIMIT_POLICY, policies);
    add(&RATELIMIT, limits);
    // In parts of a million, for integers to compare.
    let left = |(rule, verdict): &&(&Compiled, Verdict)| {
        u128::from(verdict.remaining) * 1_000_000 / u128::from(whole(rule.quota.most()).max(1))
    };
    let least = |of: &dyn Fn(Cost) -> bool| rules.iter().filter(|(rule, _)| of(rule.cost)).min_by_key(left);
    if styles.legacy
        && let Some((rule, verdict)) = least(&|cost| cost != Cost::InFlight)
    {
        let reset = SystemTime::now() + verdict.wait.unwrap_or(verdict.reset);
        let since = reset.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        add(&LIMIT, rule.limit.to_string());
        add(&REMAINING, verdict.remaining.to_string());
        add(&RESET, seconds(since).to_string());
    }
    if styles.openai {
        for (names, cost) in [(&REQUESTS, Cost::One), (&TOKENS, Cost::Tokens)] {
            let Some((rule, verdict)) = least(&|of| of == cost) else { continue };
            let [limit, remaining, reset] = names;
            add(limit, rule.limit.to_string());
            add(remaining, verdict.remaining.to_string());
            add(reset, go(verdict.wait.unwrap_or(verdict.reset)));
        }
    }
    fields
}

/// Adds `fields` to a response. Lists go on, the others are replaced.
pub(super) fn write(fields: Vec<(HeaderName, HeaderValue)>, headers: &mut HeaderMap) {
    for (name, value) in fields {
        if name == RATELIMIT || name == RATELIMIT_POLICY {
            headers.append(name, value);
        } else {
            headers.insert(name, value);
        }
    }
}

/// Rounded up: who comes at that second must not be told to wait once more.
fn seconds(time: Duration) -> u64 {
    time.as_secs() + u64::from(time.subsec_nanos() > 0)
}

/// A duration as OpenAI writes it: `6m0s`, `1.5s`, `20ms`.
fn go(time: Duration) -> String {
    let millis = time.as_nanos().div_ceil(1_000_000);
    if millis < 1000 {
        return format!("{millis}ms");
    }
    let (hours, minutes, rest) = (millis / 3_600_000, millis / 60_000 % 60, millis % 60_000);
    let mut text = String::with_capacity(16);
    if hours > 0 {
        put(&mut text, format_args!("{hours}h"));
    }
    if hours > 0 || minutes > 0 {
        put(&mut text, format_args!("{minutes}m"));
    }
    put(&mut text, format_args!("{}", rest / 1000));
    if rest % 1000 > 0 {
        let part = format!("{:03}", rest % 1000);
        put(&mut text, format_args!(".{}", part.trim_end_matches('0')));
    }
    text.push('s');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_written_as_openai_does() {
        let shown = |millis| go(Duration::from_millis(millis));
        for (millis, expected) in [
            (0, "0ms"),
            (20, "20ms"),
            (1000, "1s"),
            (1500, "1.5s"),
            (1005, "1.005s"),
            (360_000, "6m0s"),
            (7_201_000, "2h0m1s"),
        ] {
            assert_eq!(shown(millis), expected);
        }
        assert_eq!(go(Duration::from_micros(1)), "1ms");
    }
}
