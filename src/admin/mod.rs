//! The operator's port: probes, metrics, the configuration, and its reload. JSON unless said otherwise.
//!
//! | | |
//! |---|---|
//! | `GET /livez` | 200 as long as the process answers |
//! | `GET /readyz` | 200 when traffic should come; 503 before, and from the beginning of a drain |
//! | `GET /health` | the components: process, configuration, upstreams |
//! | `GET /metrics` | OpenMetrics text |
//! | `GET /config` | `given`: what file, environment and command line say; `effective`: what holds, every default and inheritance written out, itself a valid file. Secrets redacted |
//! | `GET /circuit-breakers` | state and figures of each: `closed`, `half_open` or `open`, counts, when the next request passes |
//! | `POST /circuit-breakers/{upstream}/reset` | closes those of all its endpoints, or of the one in `?endpoint=` |
//! | `POST /circuit-breakers/{upstream}/open` | opens them until they are reset |
//! | `GET /upstreams` | the endpoints that there is a choice of, or whose health is looked at: weight, health, requests in flight, average time to the first byte, circuit breaker |
//! | `GET /rate-limits`, `GET /rate-limits/{rule}?key=…`, `DELETE /rate-limits/{rule}?key=…` | the rules; one counter, read or reset, by `key=VALUE` for each part of the rule's key but `global` and `route`, and `route=ROUTE` |
//! | `GET /health/redis` | whether Redis is `up`, how long it took to answer, reconnects, calls in flight; `off` where it is switched off |
//! | `GET /health/upstreams` | their health alone, with the last check |
//! | `POST /upstreams/{upstream}/drain` | sends nothing more to the endpoint in `?endpoint=`; what is in flight goes on. Kept over reloads, also where one leaves it alone in its upstream |
//! | `POST /upstreams/{upstream}/undrain` | sends to it again |
//! | `GET /sessions` | up to `?limit=` (100, at most 1000) sessions, of `?principal=` (an id; or `ID ISSUER`, where there may be several issuers) or all: the beginning of the digest of each, when it began and was last seen, whose it is. In a cluster, of all primaries. `complete` is false where there are more, or Redis took longer than 10 s |
//! | `DELETE /sessions/{id}` | revokes one, by its `id` in the list; other replicas may take two seconds |
//! | `DELETE /sessions` | revokes all of the principal in `?principal=`; again, where `complete` is false |
//! | `GET /cache` | the caches of the routes: what they hold, and what they did |
//! | `GET /health/cache` | the same of all together |
//! | `POST /cache/purge` | drops stored answers by one of `?url=`, `?tag=`, `?glob=` and `?all`; with `&soft` they become stale |
//! | `POST /reload` | reads the configuration again; 409 with all problems where it is refused |
//!
//! What changes state needs the token of `admin.token` (`Authorization: Bearer`), unless only this machine can
//! connect. Browsers are kept out: a request with `Origin` changes nothing, and on a loopback address the
//! `Host` must be an address or `localhost`, so that a name of somebody's that is pointed here (DNS rebinding)
//! reads nothing either.
//!
//! Single pages can be published by a route: see [`publish`].

mod breakers;
mod cache;
pub mod health;
pub mod publish;
mod rate_limits;
mod redis;
mod sessions;
mod upstreams;

use std::{borrow::Cow, hint::black_box, net::IpAddr, sync::Arc};

use http::{HeaderValue, Method, StatusCode, Uri, header, uri::Authority};
use parking_lot::{Mutex, MutexGuard};
use serde_json::{Map, Value, json};
use tokio::{
    sync::{mpsc, oneshot},
    time::Instant,
};

use self::{
    breakers::Action,
    health::{Phase, Readiness},
};
use crate::{
    config::{Problems, Secret},
    message::{Body, Request, Response, path},
    registry::Registry,
    telemetry::metrics::CONTENT_TYPE,
};

/// Reloads that may wait for their turn; more are refused.
const WAITING: usize = 8;

/// What the configuration is, and how the last reload went.
#[derive(Debug, Clone, Default)]
pub struct Configuration {
    /// Counts the configurations that took effect, from 1.
    pub generation: u64,
    /// What the sources give together, secrets redacted.
    pub given: Value,
    /// The same with every default, as [`Settings::effective`](crate::settings::Settings::effective) has it.
    pub effective: Value,
    /// Upstreams by name, with their endpoints as metrics and logs call them; none for a fixed answer.
    pub upstreams: Vec<(String, Vec<String>)>,
    /// The problems of the last reload, if it was refused.
    pub refused: Option<Vec<String>>,
}

/// A reload that somebody waits for: where its outcome goes.
pub type Asked = oneshot::Sender<Result<u64, Problems>>;

/// The operator's port. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Admin(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    started: Instant,
    registry: Arc<Registry>,
    readiness: Readiness,
    configuration: Mutex<Configuration>,
    reload: mpsc::Sender<Asked>,
    access: Access,
}

/// Who may change state.
#[derive(Clone, Default)]
pub struct Access {
    /// Whether only this machine can connect.
    pub local: bool,
    /// Whether it is an IP address of the loopback, which a browser on this machine can be sent to.
    pub loopback: bool,
    /// What others have to show.
    pub token: Option<String>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access").field("local", &self.local).finish_non_exhaustive()
    }
}

impl Admin {
    /// The port of a process, and where its reloads are asked for.
    #[must_use]
    pub fn new(registry: Arc<Registry>, readiness: Readiness, access: Access) -> (Self, mpsc::Receiver<Asked>) {
        let (reload, asked) = mpsc::channel(WAITING);
        let (started, configuration) = (Instant::now(), Mutex::default());
        (Self(Arc::new(Shared { started, registry, readiness, configuration, reload, access })), asked)
    }

    /// The configuration that is told of. Held for a few instructions.
    pub fn configuration(&self) -> MutexGuard<'_, Configuration> {
        self.0.configuration.lock()
    }

    /// Answers a request of an operator.
    pub async fn answer(self, request: Request) -> Response {
        if self.0.access.loopback && !is_of_this_machine(&request) {
            return problem(
                StatusCode::MISDIRECTED_REQUEST,
                "on a loopback address, `Host` is an address or `localhost`",
            );
        }
        let found: Vec<_> = Page::of(request.uri().path()).collect();
        if found.is_empty() {
            let paths: Vec<_> = Page::ALL.iter().map(|page| format!("{} {}", page.method(), page.path())).collect();
            let mut response = json!({ "title": "Not Found", "status": 404, "paths": paths });
            response["type"] = "about:blank".into();
            return answer(StatusCode::NOT_FOUND, &response);
        }
        let method = if request.method() == Method::HEAD { &Method::GET } else { request.method() };
        let Some((page, name)) = found.iter().copied().find(|(page, _)| page.method() == method) else {
            let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, "see `Allow`");
            let methods: Vec<_> = found.iter().map(|(page, _)| page.allows()).collect();
            response.headers_mut().insert(header::ALLOW, allow(&methods));
            return response;
        };
        if page.method() != Method::GET
            && let Some(refusal) = self.refuse_change(&request)
        {
            return refusal;
        }
        self.page(page, name, request.uri()).await
    }

    /// What stands on a page, for the name in its path and the query of `uri`. Whoever asks may.
    async fn page(&self, page: Page, name: &str, uri: &Uri) -> Response {
        match page {
            Page::Live => answer(StatusCode::OK, &json!({ "status": "ok" })),
            Page::Ready => {
                let phase = self.0.readiness.phase();
                let status = if phase == Phase::Ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
                answer(status, &json!({ "status": phase.as_str() }))
            }
            Page::Health => answer(StatusCode::OK, &self.health()),
            Page::Metrics => {
                let mut response = Response::new(Body::from(self.0.registry.metrics().encode()));
                response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(CONTENT_TYPE));
                response
            }
            Page::Config => {
                let Configuration { generation, given, effective, .. } = self.configuration().clone();
                answer(StatusCode::OK, &json!({ "generation": generation, "given": given, "effective": effective }))
            }
            Page::Breakers => answer(StatusCode::OK, &breakers::list(&self.0.registry.breakers())),
            Page::ResetBreaker | Page::OpenBreaker => {
                let action = if page == Page::ResetBreaker { Action::Reset } else { Action::Open };
                match breakers::set(&self.0.registry.breakers(), action, name, uri) {
                    Ok(now) => answer(StatusCode::OK, &now),
                    Err((status, why)) => problem(status, why),
                }
            }
            Page::Upstreams => {
                answer(StatusCode::OK, &upstreams::list(&self.0.registry.balancers(), &self.0.registry.breakers()))
            }
            Page::HealthOfUpstreams => answer(StatusCode::OK, &upstreams::list_health(&self.0.registry.balancers())),
            Page::HealthOfRedis => answer(StatusCode::OK, &self.redis()),
            Page::Cache => answer(StatusCode::OK, &cache::list(self.0.registry.caches(), self.0.registry.metrics())),
            Page::HealthOfCache => {
                answer(StatusCode::OK, &cache::health(self.0.registry.caches(), self.0.registry.metrics()))
            }
            Page::Purge => match cache::purge(self.0.registry.caches(), uri) {
                Ok(now) => answer(StatusCode::OK, &now),
                Err((status, why)) => problem(status, why),
            },
            Page::RateLimits => answer(StatusCode::OK, &rate_limits::list(&self.0.registry.gates())),
            Page::RateLimit | Page::ResetRateLimit => {
                let gates = self.0.registry.gates();
                let now = match page {
                    Page::RateLimit => rate_limits::look(&gates, name, uri).await,
                    _ => rate_limits::reset(&gates, name, uri).await,
                };
                match now {
                    Ok(now) => answer(StatusCode::OK, &now),
                    Err((status, why)) => problem(status, why),
                }
            }
            Page::Drain | Page::Undrain => {
                let (balancers, breakers) = (self.0.registry.balancers(), self.0.registry.breakers());
                match upstreams::drain(&balancers, &breakers, page == Page::Drain, name, uri) {
                    Ok(now) => answer(StatusCode::OK, &now),
                    Err((status, why)) => problem(status, why),
                }
            }
            Page::Sessions | Page::RevokeSession | Page::RevokeSessions => {
                let (state, redis) = (self.0.registry.sessions(), self.0.registry.redis_in_use());
                let outcome = match page {
                    Page::Sessions => sessions::list(state, redis.as_ref(), uri).await,
                    _ => sessions::revoke(state, redis.as_ref(), name, uri).await,
                };
                match outcome {
                    Ok(now) => answer(StatusCode::OK, &now),
                    Err((status, why)) => problem(status, why),
                }
            }
            Page::Reload => self.reload().await,
        }
    }

    fn redis(&self) -> Value {
        redis::health(self.0.registry.redis_in_use().as_ref(), &self.configuration().effective["redis"])
    }

    fn health(&self) -> Value {
        let configuration = self.configuration().clone();
        let metrics = self.0.registry.metrics();
        let (balancers, breakers) = (self.0.registry.balancers(), self.0.registry.breakers());
        let upstreams: serde_json::Map<_, _> = configuration
            .upstreams
            .iter()
            .map(|(name, named)| {
                // Those that names stand for.
                let found = balancers.get(name).map(|balancer| balancer.members());
                let found = found.iter().flatten().map(|member| member.endpoint.name().to_string());
                let found: Vec<_> = found.collect();
                let endpoints = if found.is_empty() { named } else { &found };
                let known = if endpoints.is_empty() {
                    json!({ "kind": "respond" })
                } else {
                    let of = |endpoint: &String| metrics.endpoint(name, endpoint);
                    let answered: u64 = endpoints.iter().map(|endpoint| of(endpoint).answered.get()).sum();
                    let failed: u64 = endpoints.iter().map(|endpoint| of(endpoint).failed.get()).sum();
                    let mut known =
                        json!({ "kind": "endpoints", "endpoints": endpoints, "answered": answered, "failed": failed });
                    let own = breakers.iter().filter(|breaker| **breaker.upstream() == **name);
                    let own =
                        own.map(|breaker| (breaker.endpoint().to_string(), breaker.snapshot().state.as_str().into()));
                    let own: Map<String, Value> = own.collect();
                    if !own.is_empty() {
                        known["circuit_breakers"] = own.into();
                    }
                    known
                };
                (name.clone(), known)
            })
            .collect();
        let phase = self.0.readiness.phase();
        let process = metrics.process();
        let redis = self.redis();
        let degraded = configuration.refused.is_some() || redis::is_degraded(&redis);
        json!({
            "status": if phase == Phase::Ready && degraded { "degraded" } else { phase.as_str() },
            "components": {
                "process": {
                    "status": phase.as_str(),
                    "version": env!("CARGO_PKG_VERSION"),
                    "uptime_seconds": self.0.started.elapsed().as_secs(),
                    "connections": process.connections.get(),
                    "accept_errors": process.accept_errors.get(),
                },
                "config": {
                    "status": if configuration.refused.is_some() { "refused" } else { "ok" },
                    "generation": configuration.generation,
                    "reloads": process.reloads.get(),
                    "reloads_refused": process.reloads_refused.get(),
                    "problems": configuration.refused.unwrap_or_default(),
                },
                "redis": redis,
                "cache": cache::health(self.0.registry.caches(), metrics),
                "upstreams": upstreams,
            },
        })
    }

    /// Why `request` may not change anything, if so.
    fn refuse_change(&self, request: &Request) -> Option<Response> {
        let access = &self.0.access;
        if request.headers().contains_key(header::ORIGIN) {
            return Some(problem(StatusCode::FORBIDDEN, "not from a browser: the request has an `Origin`"));
        }
        if access.local {
            return None;
        }
        let Some(token) = &access.token else {
            return Some(problem(
                StatusCode::FORBIDDEN,
                "set `admin.token`, or let `admin.listen` be a loopback address",
            ));
        };
        let shown = request.headers().get(header::AUTHORIZATION).map(HeaderValue::as_bytes).unwrap_or_default();
        let is_bearer = shown.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case(b"bearer "));
        if is_bearer && is_same(&shown[7..], token.as_bytes()) {
            return None;
        }
        let mut response =
            problem(StatusCode::UNAUTHORIZED, "show the token of `admin.token` as `Authorization: Bearer`");
        response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        Some(response)
    }

    async fn reload(&self) -> Response {
        let (done, outcome) = oneshot::channel();
        if self.0.reload.try_send(done).is_err() {
            return problem(StatusCode::SERVICE_UNAVAILABLE, "no reload is possible now");
        }
        match outcome.await {
            Ok(Ok(generation)) => answer(StatusCode::OK, &json!({ "status": "reloaded", "generation": generation })),
            Ok(Err(problems)) => {
                let list: Vec<_> = problems
                    .iter()
                    .map(|problem| json!({ "key": problem.key, "message": problem.message, "origin": problem.origin }))
                    .collect();
                let mut refusal = json!({ "title": "The configuration was refused", "status": 409, "problems": list });
                refusal["type"] = "about:blank".into();
                refusal["detail"] = "nothing has changed".into();
                answer(StatusCode::CONFLICT, &refusal)
            }
            Err(_) => problem(StatusCode::SERVICE_UNAVAILABLE, "the process is ending"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Page {
    Live,
    Ready,
    Health,
    Metrics,
    Config,
    Breakers,
    ResetBreaker,
    OpenBreaker,
    Upstreams,
    HealthOfUpstreams,
    HealthOfRedis,
    Cache,
    HealthOfCache,
    Purge,
    RateLimits,
    RateLimit,
    ResetRateLimit,
    Drain,
    Undrain,
    Sessions,
    RevokeSession,
    RevokeSessions,
    Reload,
}

impl Page {
    const ALL: [Self; 23] = [
        Self::Live,
        Self::Ready,
        Self::Health,
        Self::Metrics,
        Self::Config,
        Self::Breakers,
        Self::ResetBreaker,
        Self::OpenBreaker,
        Self::Upstreams,
        Self::HealthOfUpstreams,
        Self::HealthOfRedis,
        Self::Cache,
        Self::HealthOfCache,
        Self::Purge,
        Self::RateLimits,
        Self::RateLimit,
        Self::ResetRateLimit,
        Self::Drain,
        Self::Undrain,
        Self::Sessions,
        Self::RevokeSession,
        Self::RevokeSessions,
        Self::Reload,
    ];

    /// The pages at `path`, one for each method, and what stands there for the name in braces in their own.
    fn of(path: &str) -> impl Iterator<Item = (Self, &str)> {
        Self::ALL.into_iter().filter_map(move |page| match page.path().split_once('{') {
            None => (page.path() == path).then_some((page, "")),
            Some((before, rest)) => {
                let after = rest.split_once('}').map_or("", |(_, after)| after);
                let name = path.strip_prefix(before)?.strip_suffix(after)?;
                (!name.is_empty() && !name.contains('/')).then_some((page, name))
            }
        })
    }

    const fn path(self) -> &'static str {
        match self {
            Self::Live => "/livez",
            Self::Ready => "/readyz",
            Self::Health => "/health",
            Self::Metrics => "/metrics",
            Self::Config => "/config",
            Self::Breakers => "/circuit-breakers",
            Self::ResetBreaker => "/circuit-breakers/{upstream}/reset",
            Self::OpenBreaker => "/circuit-breakers/{upstream}/open",
            Self::Upstreams => "/upstreams",
            Self::HealthOfUpstreams => "/health/upstreams",
            Self::HealthOfRedis => "/health/redis",
            Self::Cache => "/cache",
            Self::HealthOfCache => "/health/cache",
            Self::Purge => "/cache/purge",
            Self::RateLimits => "/rate-limits",
            Self::RateLimit | Self::ResetRateLimit => "/rate-limits/{rule}",
            Self::Drain => "/upstreams/{upstream}/drain",
            Self::Undrain => "/upstreams/{upstream}/undrain",
            Self::Sessions | Self::RevokeSessions => "/sessions",
            Self::RevokeSession => "/sessions/{id}",
            Self::Reload => "/reload",
        }
    }

    /// What changes something is asked for by POST or DELETE, and needs the right to.
    const fn method(self) -> Method {
        match self {
            Self::ResetRateLimit | Self::RevokeSession | Self::RevokeSessions => Method::DELETE,
            Self::Purge | Self::Reload | Self::ResetBreaker | Self::OpenBreaker | Self::Drain | Self::Undrain => {
                Method::POST
            }
            _ => Method::GET,
        }
    }

    fn allows(self) -> &'static str {
        match self.method() {
            Method::GET => "GET, HEAD",
            Method::DELETE => "DELETE",
            _ => "POST",
        }
    }

    /// Whether others may see it, where the file says so. Not what tells or changes how sidegate works, nor whom
    /// sessions belong to.
    const fn is_public(self) -> bool {
        !matches!(self, Self::Config | Self::Reload | Self::Sessions | Self::RevokeSession | Self::RevokeSessions)
    }

    /// The name in braces in its path.
    fn parameter(self) -> Option<&'static str> {
        Some(self.path().split_once('{')?.1.split_once('}')?.0)
    }
}

/// The field that lists methods.
fn allow(methods: &[&str]) -> HeaderValue {
    HeaderValue::try_from(methods.join(", ")).expect("methods are visible ASCII")
}

/// The endpoint in the query `endpoint=ENDPOINT`, decoded; nothing where there is no query.
///
/// # Errors
/// The query is another one.
fn asked_endpoint(uri: &Uri) -> Result<Option<Cow<'_, [u8]>>, ()> {
    match uri.query().unwrap_or_default() {
        "" => Ok(None),
        query => query.strip_prefix("endpoint=").map(|endpoint| Some(path::decode(endpoint.as_bytes()))).ok_or(()),
    }
}

/// Whether the client named this machine and not a name that it was given.
fn is_of_this_machine(request: &Request) -> bool {
    let authority = match request.uri().authority() {
        Some(authority) => Some(authority.clone()),
        None => match request.headers().get(header::HOST) {
            // HTTP/1.0, which no browser speaks.
            None => return true,
            Some(host) => Authority::try_from(host.as_bytes()).ok(),
        },
    };
    authority.is_some_and(|authority| {
        let host = authority.host();
        let address = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        host.eq_ignore_ascii_case("localhost") || address.parse::<IpAddr>().is_ok()
    })
}

/// Compares in a time that does not depend on where the two differ.
fn is_same(one: &[u8], other: &[u8]) -> bool {
    one.len() == other.len() && black_box(one.iter().zip(other).fold(0, |sum, (one, other)| sum | (one ^ other))) == 0
}

fn answer(status: StatusCode, body: &Value) -> Response {
    let mut response = Response::new(Body::from(format!("{body}\n")));
    *response.status_mut() = status;
    let kind = if status.is_client_error() { "application/problem+json" } else { "application/json" };
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

fn problem(status: StatusCode, detail: &str) -> Response {
    let title = status.canonical_reason().unwrap_or_default();
    answer(status, &json!({ "type": "about:blank", "title": title, "status": status.as_u16(), "detail": detail }))
}

/// Takes out of `given` what might be secret: what is called so, passwords in URLs, and values of header fields, unless
/// they are those of a fixed answer. Where a secret comes from (`{env: NAME}`, `{file: PATH}`) may be seen.
#[must_use]
pub fn redact(given: Value) -> Value {
    redact_within(given, false)
}

fn redact_within(given: Value, json: bool) -> Value {
    match given {
        Value::Object(entries) => entries.into_iter().map(|(key, value)| redact_entry(key, value, json)).collect(),
        Value::Array(items) => items.into_iter().map(|item| redact_within(item, json)).collect(),
        Value::String(text) => Value::String(without_password(text)),
        other => other,
    }
}

fn redact_entry(key: String, value: Value, within_json: bool) -> (String, Value) {
    const SECRETS: [&str; 6] = ["token", "secret", "password", "credential", "api_key", "bearer"];
    let is_secret = SECRETS.iter().any(|secret| key.contains(secret));
    let value = match (key.as_str(), value) {
        (_, Value::Object(place)) if is_secret && is_place(&place) => Value::Object(place),
        // `max_tokens` of a body.
        (_, Value::Number(number)) if within_json => Value::Number(number),
        // A section, not a key.
        ("api_keys", Value::Object(section)) => redact(Value::Object(section)),
        (_, _) if is_secret => Secret::REDACTED.into(),
        ("jwt", Value::Object(mut jwt)) => {
            if let Some(key) = jwt.get_mut("key").filter(|key| !key.is_object()) {
                *key = Secret::REDACTED.into();
            }
            redact(Value::Object(jwt))
        }
        // Whoever asks gets them.
        ("respond", Value::Object(answer)) => {
            let entries = answer.into_iter().map(|(key, value)| match key.as_str() {
                "headers" => (key, redact_within(value, within_json)),
                _ => redact_entry(key, value, within_json),
            });
            entries.collect()
        }
        ("headers", Value::Object(fields)) => redact_fields(fields),
        ("json", value) => redact_within(value, true),
        (_, value) => redact_within(value, within_json),
    };
    (key, value)
}

/// Whatever a header field says is taken for a secret; names may be seen.
fn redact_fields(fields: Map<String, Value>) -> Value {
    let redact = |(name, value): (String, Value)| {
        let value = match (name.as_str(), value) {
            // Of a fallback: a section of fields, one of which may be called `env`, and lists of names.
            ("set", Value::Object(fields)) => redact_fields(fields),
            ("remove" | "keep", Value::Array(names)) => Value::Array(names),
            (_, Value::Object(place)) if is_place(&place) => Value::Object(place),
            _ => Secret::REDACTED.into(),
        };
        (name, value)
    };
    fields.into_iter().map(redact).collect()
}

/// Whether it says where a secret is.
fn is_place(of: &Map<String, Value>) -> bool {
    of.keys().all(|key| key == "env" || key == "file")
}

/// A URL without the password in it.
fn without_password(text: String) -> String {
    let Some((scheme, rest)) = text.split_once("://") else { return text };
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    match authority.rsplit_once('@') {
        Some((user, _)) => format!("{scheme}://{}{}", Secret::REDACTED, rest.strip_prefix(user).unwrap_or_default()),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::telemetry::{Metrics, log};

    const LOOPBACK: Access = Access { local: true, loopback: true, token: None };

    fn admin(access: Access) -> (Admin, mpsc::Receiver<Asked>) {
        let nowhere = log::Config { file: Some("/dev/null".into()), ..log::Config::default() };
        let metrics = Metrics::new();
        let (log, _) = log::open(&nowhere, metrics.process().log_lines_dropped.clone()).unwrap();
        Admin::new(Arc::new(Registry::new(metrics, log)), Readiness::default(), access)
    }

    fn request(method: &str, path: &str) -> http::request::Builder {
        http::Request::builder().method(method).uri(path).header("host", "127.0.0.1:9090")
    }

    async fn ask(admin: &Admin, request: http::request::Builder) -> (StatusCode, String) {
        let response = admin.clone().answer(request.body(Body::empty()).unwrap()).await;
        let (status, body) = (response.status(), response.into_body().collect().await.unwrap().to_bytes());
        (status, String::from_utf8(body.into()).unwrap())
    }

    #[tokio::test]
    async fn readiness_is_told_and_does_not_come_back() {
        let (admin, _reloads) = admin(LOOPBACK);
        let ready = || ask(&admin, request("GET", "/readyz"));
        assert_eq!(ready().await, (StatusCode::SERVICE_UNAVAILABLE, "{\"status\":\"starting\"}\n".to_owned()));
        admin.0.readiness.reach(Phase::Ready);
        assert_eq!(ready().await.0, StatusCode::OK);
        admin.0.readiness.reach(Phase::Draining);
        admin.0.readiness.reach(Phase::Ready);
        assert_eq!(ready().await, (StatusCode::SERVICE_UNAVAILABLE, "{\"status\":\"draining\"}\n".to_owned()));
        assert_eq!(ask(&admin, request("GET", "/livez")).await.0, StatusCode::OK);
    }

    #[tokio::test]
    async fn unknown_paths_list_the_known_and_wrong_methods_the_right() {
        let (admin, _reloads) = admin(LOOPBACK);
        let (status, body) = ask(&admin, request("GET", "/")).await;
        assert_eq!(status, StatusCode::NOT_FOUND);
        assert!(body.contains("GET /metrics") && body.contains("POST /reload"), "{body}");
        let response = admin.clone().answer(request("GET", "/reload").body(Body::empty()).unwrap()).await;
        assert_eq!(
            (response.status(), &response.headers()["allow"]),
            (StatusCode::METHOD_NOT_ALLOWED, &HeaderValue::from_static("POST"))
        );
        assert_eq!(ask(&admin, request("HEAD", "/livez")).await.0, StatusCode::OK);
        assert_eq!(ask(&admin, request("DELETE", "/livez")).await.0, StatusCode::METHOD_NOT_ALLOWED);
    }

    #[tokio::test]
    async fn health_and_metrics_show_what_is_known() {
        let (admin, _reloads) = admin(LOOPBACK);
        admin.configuration().upstreams =
            vec![("api".to_owned(), vec!["127.0.0.1:8000".to_owned()]), ("off".to_owned(), Vec::new())];
        let samples = admin.0.registry.metrics().endpoint("api", "127.0.0.1:8000");
        samples.answered.inc();
        let (_, health) = ask(&admin, request("GET", "/health")).await;
        let health: Value = serde_json::from_str(&health).unwrap();
        assert_eq!(health["components"]["upstreams"]["api"]["answered"], 1);
        assert_eq!(health["components"]["upstreams"]["off"]["kind"], "respond");
        let (_, metrics) = ask(&admin, request("GET", "/metrics")).await;
        assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    }

    #[tokio::test]
    async fn a_reload_is_answered_with_its_outcome() {
        let (admin, mut reloads) = admin(LOOPBACK);
        let server = async {
            reloads.recv().await.unwrap().send(Ok(2)).unwrap();
            let mut problems = Problems::default();
            problems.add("listen", "is wrong");
            reloads.recv().await.unwrap().send(Err(problems)).unwrap();
        };
        let client = async {
            let reloaded = ask(&admin, request("POST", "/reload")).await;
            (reloaded, ask(&admin, request("POST", "/reload")).await)
        };
        let ((reloaded, refused), ()) = tokio::join!(client, server);
        assert_eq!(reloaded, (StatusCode::OK, "{\"generation\":2,\"status\":\"reloaded\"}\n".to_owned()));
        assert_eq!(refused.0, StatusCode::CONFLICT);
        let refused: Value = serde_json::from_str(&refused.1).unwrap();
        assert_eq!(refused["problems"][0]["key"], "listen");
    }

    #[tokio::test]
    async fn changes_need_a_token_unless_they_come_from_this_machine() {
        let far = |token: Option<&str>| Access { local: false, loopback: false, token: token.map(str::to_owned) };
        let reload = |header: Option<&'static str>| {
            let request = request("POST", "/reload");
            header.into_iter().fold(request, |request, value| request.header("authorization", value))
        };
        let (without, _reloads) = admin(far(None));
        assert_eq!(ask(&without, reload(Some("Bearer abc"))).await.0, StatusCode::FORBIDDEN);
        let (with, reloads) = admin(far(Some("abc")));
        drop(reloads);
        for wrong in [None, Some("Bearer abd"), Some("Bearer "), Some("Basic abc"), Some("Bearer abcd")] {
            assert_eq!(ask(&with, reload(wrong)).await.0, StatusCode::UNAUTHORIZED, "{wrong:?}");
        }
        // The token is right; nobody reloads in this test.
        assert_eq!(ask(&with, reload(Some("bearer abc"))).await.0, StatusCode::SERVICE_UNAVAILABLE);
    }

    #[tokio::test]
    async fn browsers_change_nothing_and_rebound_names_read_nothing() {
        let (admin, _reloads) = admin(LOOPBACK);
        let reload = request("POST", "/reload").header("origin", "http://127.0.0.1:9090");
        assert_eq!(ask(&admin, reload).await.0, StatusCode::FORBIDDEN);
        let host = |host: &str| http::Request::get("/config").header("host", host);
        for (name, status) in [
            ("evil.example:9090", StatusCode::MISDIRECTED_REQUEST),
            ("localhost.evil.example", StatusCode::MISDIRECTED_REQUEST),
            ("localhost:9090", StatusCode::OK),
            ("[::1]:9090", StatusCode::OK),
        ] {
            assert_eq!(ask(&admin, host(name)).await.0, status, "{name}");
        }
    }

    #[test]
    fn what_might_be_secret_is_redacted() {
        let given = json!({
            "admin": { "listen": "127.0.0.1:9090", "token": "abc" },
            "other": { "token": { "env": "TOKEN" } },
            "upstreams": {
                "api": {
                    "endpoints": ["http://user:pass@127.0.0.1:8000/", "http://127.0.0.1/@"],
                    "health": { "active": { "headers": { "x-a": "abc", "x-b": { "env": "B" }, "x-c": 12, "env": "abc" } } },
                },
                "fixed": { "respond": { "headers": { "retry-after": 60, "x-a": "seen" }, "json": { "token": "abc" } } },
            },
            "routes": [{
                "match": { "path": "/a", "headers": { "x-key": "abc" } },
                "fallback": [{
                    "headers": {
                        "bearer": "abc", "set": { "x-api-key": "abc", "x-b": { "env": "B" }, "env": "abc" },
                        "remove": ["x-c"], "keep": ["cookie"],
                    },
                    "json": { "max_tokens": 100, "token": "abc" },
                }],
            }],
        });
        let expected = json!({
            "admin": { "listen": "127.0.0.1:9090", "token": Secret::REDACTED },
            "other": { "token": { "env": "TOKEN" } },
            "upstreams": {
                "api": {
                    "endpoints": ["http://[redacted]@127.0.0.1:8000/", "http://127.0.0.1/@"],
                    "health": { "active": { "headers": {
                        "x-a": Secret::REDACTED, "x-b": { "env": "B" }, "x-c": Secret::REDACTED, "env": Secret::REDACTED,
                    } } },
                },
                "fixed": {
                    "respond": {
                        "headers": { "retry-after": 60, "x-a": "seen" }, "json": { "token": Secret::REDACTED },
                    },
                },
            },
            "routes": [{
                "match": { "path": "/a", "headers": { "x-key": Secret::REDACTED } },
                "fallback": [{
                    "headers": {
                        "bearer": Secret::REDACTED,
                        "set": { "x-api-key": Secret::REDACTED, "x-b": { "env": "B" }, "env": Secret::REDACTED },
                        "remove": ["x-c"], "keep": ["cookie"],
                    },
                    "json": { "max_tokens": 100, "token": Secret::REDACTED },
                }],
            }],
        });
        assert_eq!(redact(given), expected);
    }
}
