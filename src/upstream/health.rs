//! Health: which endpoints of an upstream are up, by asking them and by what their requests come to.
//!
//! An endpoint is up until something says otherwise. `active` asks it every `interval`: `unhealthy` failures in a row
//! take it out, `healthy` successes bring it back. `passive` leaves it alone for a while after `failures` failed requests
//! in a row, unless too few would be left. What is known is kept over reloads under the endpoint's address.
//!
//! A check is a request of sidegate's own, over a connection of its own: it passes no limit, no authentication, no
//! circuit breaker and no access log, and is in no count of requests.

use std::{
    borrow::Cow, collections::BTreeMap, fmt, num::NonZeroU32, ops::RangeInclusive, path::Path, str::FromStr,
    time::Duration,
};

use http::{
    HeaderName, HeaderValue, Method, StatusCode, Uri,
    header::{CONNECTION, CONTENT_LENGTH, EXPECT, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE, USER_AGENT},
    uri::PathAndQuery,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use tokio::time::{Instant, timeout};
use tower::Service;

use super::{Client, client};
use crate::{
    config::{
        fields::{self, FieldName, FieldValue},
        file::Content,
        problem::{Check, Problems},
        units::{HumanDuration, OneOrMany, Secret, Toggle},
    },
    message::{
        Body, BoxError, Request,
        headers::{KEEP_ALIVE, PROXY_CONNECTION},
    },
    telemetry::log::chain,
};

/// How endpoints that are not up are found. Section `health` of an upstream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Health")]
pub struct Config {
    /// Asks each endpoint. Default `off`.
    pub active: Toggle<Active>,
    /// Looks at what requests come to. Default `off`.
    pub passive: Toggle<Passive>,
}

impl Default for Config {
    fn default() -> Self {
        Self { active: Toggle::Off, passive: Toggle::Off }
    }
}

/// Checks of each endpoint. Section `health.active` of an upstream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "ActiveHealth")]
pub struct Active {
    /// `http`: a GET with one of the expected statuses; `tcp`: a connection, with TLS where the endpoint has it. Default
    /// `http`.
    pub kind: Probe,
    /// What `http` asks for. Default `/`.
    pub path: Target,
    /// The statuses that are a success: one, a range such as `200-399`, or a list of these. Default `200-299`.
    pub status: OneOrMany<Statuses>,
    /// From the end of a check to the next one, at least 100ms. Default `10s`.
    pub interval: HumanDuration,
    /// The longest random time that is added to `interval`, so that replicas do not check in step. Default `1s`.
    pub jitter: HumanDuration,
    /// The longest that a check takes; later is a failure. Default `2s`.
    pub timeout: HumanDuration,
    /// Successes in a row that bring an endpoint back, at least 1. Default 2.
    pub healthy: NonZeroU32,
    /// Failures in a row that take it out, at least 1. Default 3.
    pub unhealthy: NonZeroU32,
    /// What `http` says in `Host`. Default: the endpoint's own name.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<FieldValue>,
    /// More header fields of `http`, each `{env: NAME}`, `{file: PATH}` or text. None that is about the connection or a body.
    #[serde(serialize_with = "fields::shown")]
    pub headers: BTreeMap<FieldName, Secret>,
    /// What the files say that these are in.
    #[serde(skip)]
    pub content: Content,
}

impl Default for Active {
    fn default() -> Self {
        let count = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
        Self {
            kind: Probe::Http,
            path: Target(PathAndQuery::from_static("/")),
            status: OneOrMany::from(Statuses(200..=299)),
            interval: HumanDuration::from_secs(10),
            jitter: HumanDuration::from_secs(1),
            timeout: HumanDuration::from_secs(2),
            healthy: count(2),
            unhealthy: count(3),
            host: None,
            headers: BTreeMap::new(),
            content: Content::default(),
        }
    }
}

impl Active {
    /// The files that it is made of.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.headers.values().filter_map(Secret::path)
    }
}

/// What is asked of an endpoint. Key `kind` of `health.active`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Probe {
    /// An answer to a GET. The default.
    #[default]
    Http,
    /// A connection.
    Tcp,
}

/// What is asked for: a path, which may have a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target(PathAndQuery);

impl<'de> Deserialize<'de> for Target {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let wrong = || de::Error::custom(format!("`{text}` is no path: it begins with `/`, as in `/healthz`"));
        if !text.starts_with('/') {
            return Err(wrong());
        }
        text.parse().map(Self).map_err(|_| wrong())
    }
}

impl Serialize for Target {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0.as_str())
    }
}

impl JsonSchema for Target {
    fn schema_name() -> Cow<'static, str> {
        "HealthPath".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "A path, which may have a query.", "pattern": "^/" })
    }
}

/// One status, or all from one to another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Statuses(RangeInclusive<u16>);

impl FromStr for Statuses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no status or range of them: 100 to 599, as in `200` or `200-399`");
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let read = |text: &str| text.parse().ok().filter(|status| (100..=599).contains(status)).ok_or_else(wrong);
        let range = read(first)?..=read(last)?;
        if range.is_empty() { Err(wrong()) } else { Ok(Self(range)) }
    }
}

impl fmt::Display for Statuses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.start(), self.0.end()) {
            (first, last) if first == last => write!(f, "{first}"),
            (first, last) => write!(f, "{first}-{last}"),
        }
    }
}

impl<'de> Deserialize<'de> for Statuses {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "must be a status or a range of them, as in `200` or `200-399`")]
        enum Form {
            Number(u16),
            Text(String),
        }
        let text = match Form::deserialize(from)? {
            Form::Number(number) => number.to_string(),
            Form::Text(text) => text,
        };
        text.parse().map_err(de::Error::custom)
    }
}

impl Serialize for Statuses {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if self.0.start() == self.0.end() { self.0.start().serialize(to) } else { to.collect_str(self) }
    }
}

impl JsonSchema for Statuses {
    fn schema_name() -> Cow<'static, str> {
        "Statuses".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A status, or a range of them.",
            "anyOf": [
                { "type": "integer", "minimum": 100, "maximum": 599 },
                { "type": "string", "pattern": "^[1-5][0-9][0-9](-[1-5][0-9][0-9])?$" },
            ],
        })
    }
}

/// What requests tell of an endpoint. Section `health.passive` of an upstream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "PassiveHealth")]
pub struct Passive {
    /// Failures in a row after which an endpoint is left alone, at least 1. Default 5. A failure is: no connection, a
    /// reset, a timeout, a body that breaks off, and a status in `failure_status`; a response that has ended well starts
    /// the count anew.
    pub failures: NonZeroU32,
    /// For how long. Default `30s`. Never so many endpoints that less than `panic_threshold` of `balance` were left, and
    /// never the last one.
    #[serde(rename = "for")]
    pub period: HumanDuration,
    /// The statuses that are failures, 400 to 599. Default 502, 503 and 504.
    pub failure_status: std::collections::BTreeSet<u16>,
}

impl Default for Passive {
    fn default() -> Self {
        Self {
            failures: NonZeroU32::new(5).unwrap_or(NonZeroU32::MIN),
            period: HumanDuration::from_secs(30),
            failure_status: [502, 503, 504].into(),
        }
    }
}

impl Passive {
    /// Whether a response with this status is a failure.
    #[must_use]
    pub fn is_failure(&self, status: StatusCode) -> bool {
        self.failure_status.contains(&status.as_u16())
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if self.active.is_off() && self.passive.is_off() {
            problems.add("", "has no effect: set `active`, `passive` or both, or leave the section out");
        }
        if let Toggle::On(active) = &self.active {
            problems.at("active", |problems| active.check(problems));
        }
        if let Toggle::On(passive) = &self.passive {
            problems.at("passive", |problems| passive.check(problems));
        }
    }
}

impl Check for Active {
    fn check(&self, problems: &mut Problems) {
        if self.interval.get() < Duration::from_millis(100) {
            problems.add("interval", format!("is {}: must be at least 100ms", self.interval));
        }
        if self.timeout.is_zero() {
            problems.add("timeout", "must be longer than 0s");
        }
        if self.status.0.is_empty() {
            problems.add("status", "is empty: no answer would be a success");
        }
        for (name, secret) in &self.headers {
            if let Some(why) = wrong_field(name.get()) {
                problems.add(format!("headers.{}", name.get()), why);
            }
            if let Err(message) = fields::secret_value("", secret) {
                problems.add(format!("headers.{}", name.get()), message);
            }
        }
        if self.kind == Probe::Tcp {
            let default = Self::default();
            let given = [
                ("path", self.path != default.path),
                ("status", self.status != default.status),
                ("host", self.host.is_some()),
                ("headers", !self.headers.is_empty()),
            ];
            for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                problems.add(key, "has no effect with `kind: tcp`");
            }
        }
    }
}

/// Why a check cannot have this field.
fn wrong_field(name: &HeaderName) -> Option<&'static str> {
    if *name == HOST {
        return Some("is the key `host` beside `headers`: set that");
    }
    let of_connection =
        [CONNECTION, CONTENT_LENGTH, EXPECT, KEEP_ALIVE, PROXY_CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];
    of_connection.contains(name).then_some("is about the connection or a body: a check has neither to say of")
}

impl Check for Passive {
    fn check(&self, problems: &mut Problems) {
        if self.period.is_zero() {
            problems.add("for", "must be longer than 0s");
        }
        for status in self.failure_status.iter().filter(|status| !(400..=599).contains(*status)) {
            problems.add("failure_status", format!("has {status}: must be statuses from 400 to 599"));
        }
    }
}

/// What is known of the health of one endpoint: pure, with the time handed in.
#[derive(Debug, Clone, Default)]
pub struct Health {
    down: bool,
    /// Checks in a row that contradict `down`.
    contrary: u32,
    last: Option<(Instant, Option<String>)>,
    /// Requests in a row that failed.
    failures: u32,
    ejected_until: Option<Instant>,
}

/// What has changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// Its checks have taken it out, the last one for this.
    Down(String),
    /// Its checks have brought it back.
    Up,
    /// Its requests have taken it out, until then.
    Ejected(Instant),
}

impl Health {
    /// A check, and what was wrong with it.
    pub fn checked(&mut self, error: Option<String>, active: &Active, now: Instant) -> Option<Change> {
        self.last = Some((now, error.clone()));
        if error.is_some() == self.down {
            self.contrary = 0;
            return None;
        }
        self.contrary += 1;
        let enough = if self.down { active.healthy } else { active.unhealthy };
        if self.contrary < enough.get() {
            return None;
        }
        self.contrary = 0;
        self.down = !self.down;
        Some(error.map_or(Change::Up, Change::Down))
    }

    /// A request that failed. `may_eject` says whether enough others are left.
    pub fn failed(&mut self, passive: &Passive, may_eject: bool, now: Instant) -> Option<Change> {
        if self.ejected_until.is_some_and(|until| now < until) {
            // Of the requests that were on their way.
            return None;
        }
        self.failures = self.failures.saturating_add(1);
        if self.failures < passive.failures.get() || !may_eject {
            return None;
        }
        self.failures = 0;
        let until = now + passive.period.get();
        self.ejected_until = Some(until);
        Some(Change::Ejected(until))
    }

    /// A request that was served.
    pub fn served(&mut self) {
        self.failures = 0;
    }

    /// Whether there is a failure that a success would make forgotten.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// Goes on with other settings: what nobody looks at any more does not keep it out.
    pub fn adopt(&mut self, config: &Config) -> Option<Change> {
        if config.passive.is_off() {
            self.failures = 0;
            self.ejected_until = None;
        }
        if config.active.is_off() {
            self.contrary = 0;
            self.last = None;
            return std::mem::take(&mut self.down).then_some(Change::Up);
        }
        None
    }

    /// Whether its checks say that it is down.
    #[must_use]
    pub fn is_down(&self) -> bool {
        self.down
    }

    /// Until when its requests keep it out; may be over.
    #[must_use]
    pub fn ejected_until(&self) -> Option<Instant> {
        self.ejected_until
    }

    /// Failed requests in a row.
    #[must_use]
    pub fn failures(&self) -> u32 {
        self.failures
    }

    /// When the last check was, and what was wrong with it.
    #[must_use]
    pub fn last_check(&self) -> Option<(Instant, Option<&str>)> {
        self.last.as_ref().map(|(at, error)| (*at, error.as_deref()))
    }
}

/// Asks one endpoint, as `active` says.
pub struct Checker {
    active: Active,
    client: Client,
    request: http::request::Parts,
}

impl Checker {
    /// A checker of what `client` asks: one that is used for nothing else, so that no request is counted.
    ///
    /// # Errors
    /// What a header field is made of cannot be read any more.
    pub fn new(active: Active, client: Client) -> Result<Self, BoxError> {
        let uri = Uri::from(active.path.0.clone());
        let mut request = http::Request::builder().method(Method::GET).uri(uri).body(())?.into_parts().0;
        request.headers.insert(USER_AGENT, HeaderValue::from_static(concat!("sidegate/", env!("CARGO_PKG_VERSION"))));
        for (name, secret) in &active.headers {
            request.headers.insert(name.get().clone(), fields::secret_value("", secret)?);
        }
        if let Some(host) = &active.host {
            request.headers.insert(HOST, host.get().clone());
        }
        Ok(Self { client: client.with_connect_timeout(active.timeout.get()), active, request })
    }

    /// How the endpoints are spoken to by checks, where requests are spoken to as `config` says: each check opens a
    /// connection, for that is what a process that hangs may no longer take.
    pub fn config(active: &Active, config: &client::Config) -> client::Config {
        let host = match &active.host {
            Some(_) => client::Host::Preserve,
            None => match &config.host {
                Some(literal @ client::Host::Literal(_)) => literal.clone(),
                _ => client::Host::Endpoint,
            },
        };
        let pool = client::PoolConfig { idle: Toggle::Off, ..client::PoolConfig::default() };
        client::Config { host: Some(host), pool, ..config.clone() }
    }

    pub(super) fn active(&self) -> &Active {
        &self.active
    }

    /// One check.
    ///
    /// # Errors
    /// What was wrong, for the operator.
    pub(super) async fn check(&self) -> Result<(), String> {
        let checked = timeout(self.active.timeout.get(), async {
            match self.active.kind {
                Probe::Tcp => self.client.probe().await.map_err(|error| chain(&*error)),
                Probe::Http => {
                    let request = Request::from_parts(self.request.clone(), Body::empty());
                    let response = self.client.clone().call(request).await.map_err(|error| chain(&*error))?;
                    let status = response.status().as_u16();
                    let expected = self.active.status.iter().any(|range| range.0.contains(&status));
                    if expected { Ok(()) } else { Err(format!("status {status}")) }
                }
            }
        });
        let checked = checked.await;
        // Not kept for the next check: who takes no more connections is not well, and one that hangs tells nothing of
        // others.
        self.client.disconnect().await;
        checked.unwrap_or_else(|_| Err(format!("no answer within {}", self.active.timeout)))
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn error() -> String {
        "refused".to_owned()
    }

    #[tokio::test(start_paused = true)]
    async fn it_takes_some_in_a_row_to_go_and_some_to_come_back() {
        let (active, now) = (Active::default(), Instant::now());
        let mut health = Health::default();
        let changes: Vec<_> =
            "xx.xxx.x...".chars().map(|checked| health.checked((checked == 'x').then(error), &active, now)).collect();
        let mut expected = vec![None; 11];
        expected[5] = Some(Change::Down(error()));
        expected[9] = Some(Change::Up);
        assert_eq!(changes, expected);
    }

    #[tokio::test(start_paused = true)]
    async fn failures_in_a_row_eject_for_a_while_where_others_are_left() {
        let passive = Passive { failures: NonZeroU32::new(2).unwrap(), ..Passive::default() };
        let mut now = Instant::now();
        let mut health = Health::default();
        assert_eq!(health.failed(&passive, true, now), None);
        health.served();
        assert_eq!(health.failed(&passive, true, now), None, "not in a row");
        assert_eq!(health.failed(&passive, false, now), None, "nobody else is left");
        let until = now + Duration::from_secs(30);
        assert_eq!(health.failed(&passive, true, now), Some(Change::Ejected(until)));
        assert_eq!(health.failed(&passive, true, now), None, "it is out already");
        now = until;
        assert_eq!(health.failed(&passive, true, now), None, "counted anew");
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_looks_at_any_more_keeps_nobody_out() {
        let (active, now) = (Active { unhealthy: NonZeroU32::MIN, ..Active::default() }, Instant::now());
        let mut health = Health::default();
        health.checked(Some(error()), &active, now);
        let on = Config { active: Toggle::On(active), passive: Toggle::Off };
        assert_eq!(health.adopt(&on), None);
        assert!(health.is_down());
        assert_eq!(health.adopt(&Config::default()), Some(Change::Up));
        assert!(!health.is_down());
    }

    #[test]
    fn statuses_are_read_and_written() {
        for (text, written) in [("200", "200"), ("200-399", "200-399"), ("204-204", "204")] {
            assert_eq!(text.parse::<Statuses>().unwrap().to_string(), written);
        }
        for wrong in ["", "ok", "99", "600", "300-200", "200-", "2xx"] {
            assert!(wrong.parse::<Statuses>().is_err(), "{wrong}");
        }
    }

    proptest! {
        #[test]
        fn it_is_down_only_after_as_many_failures_in_a_row(checks in vec(any::<bool>(), 0..60), healthy in 1..4_u32, unhealthy in 1..4_u32) {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let _entered = runtime.enter();
            let count = |n| NonZeroU32::new(n).unwrap();
            let active = Active { healthy: count(healthy), unhealthy: count(unhealthy), ..Active::default() };
            let mut health = Health::default();
            let mut row = (true, 0);
            for passed in checks {
                row = if row.0 == passed { (passed, row.1 + 1) } else { (passed, 1) };
                let was = health.is_down();
                health.checked((!passed).then(String::new), &active, Instant::now());
                if health.is_down() != was {
                    prop_assert_eq!(row.1, if passed { healthy } else { unhealthy });
                }
                let needed = if passed { healthy } else { unhealthy };
                prop_assert!(row.1 < needed || health.is_down() != passed);
            }
        }
    }
}
