//! Names, labels and samples, in Prometheus' and OpenMetrics' text form.
//!
//! Every label takes its values from the configuration or from a fixed list, so the number of series is
//! known at load and no request can add one. A request finds its series by a pointer that its route holds,
//! not by hashing labels.
//!
//! The series of a route, an upstream or an endpoint are there for as long as anything counts into them: over reloads
//! under the same names, and after its removal until its last request is over. Then they go, so that names that come and
//! go do not add up.

use std::{
    collections::{HashMap, HashSet},
    fmt,
    hash::Hash,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    },
    time::Duration,
};

use http::StatusCode;
use parking_lot::Mutex;
use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};

use super::exchange::CacheOutcome;

/// `Content-Type` of [`Metrics::encode`].
pub const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Upper bounds of the duration buckets, in seconds: from a cached answer to a long completion.
const SECONDS: [f64; 14] = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0, 300.0];

/// Upper bounds of the buckets of a call to Redis, in seconds.
const REDIS_SECONDS: [f64; 11] = [0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 1.0];

/// All samples of the process. Cheap to clone; survives reloads.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    registry: Mutex<Registry>,
    /// By how many each is shown. Whoever makes one 0 removes its series under this lock.
    shown: Mutex<HashMap<Of, usize>>,
    /// The series that there are of these: a family cannot be asked which it has.
    transitions: Mutex<HashSet<Transition>>,
    fell_back: Mutex<HashSet<FellBack>>,
    families: Families,
    process: Process,
}

#[derive(Debug)]
struct Families {
    requests: Family<RouteClass, Counter>,
    aborted: Family<RouteBy, Counter>,
    errors: Family<Slug, Counter>,
    duration: Seconds,
    first_byte: Seconds,
    received: Family<Route, Counter>,
    sent: Family<Route, Counter>,
    in_flight: Family<Route, Gauge>,
    attempts: Family<Attempt, Counter>,
    retries: Family<Retried, Counter>,
    not_retried: Family<NotRetried, Counter>,
    auth: Family<RouteOutcome, Counter>,
    sessions: Family<RouteOutcome, Counter>,
    cache: Family<RouteOutcome, Counter>,
    cache_in_redis: Family<RouteOutcome, Counter>,
    cache_resumes: Family<RouteOutcome, Counter>,
    cache_copies: Family<RouteOutcome, Counter>,
    cache_stored: Family<Route, Counter>,
    cache_evicted: Family<Route, Counter>,
    cache_refreshed: Family<Route, Counter>,
    cache_saved_seconds: Family<Route, Counter<f64, AtomicU64>>,
    rate_limits: Family<RuleOutcome, Counter>,
    rate_limit_remembered: Family<Route, Counter>,
    tokens: Family<RouteTokens, Counter>,
    rate_limit_store_failures: Family<Route, Counter>,
    fallbacks: Family<FellBack, Counter>,
    no_fallbacks: Family<NoFallback, Counter>,
    breaker_state: Family<Endpoint, Gauge>,
    breaker_transitions: Family<Transition, Counter>,
    breaker_refused: Family<Endpoint, Counter>,
    concurrency_limit: Family<Limited, Gauge>,
    concurrency_in_flight: Family<Limited, Gauge>,
    concurrency_queued: Family<Limited, Gauge>,
    concurrency_wait: Family<Limited, Histogram, fn() -> Histogram>,
    concurrency_shed: Family<Shed, Counter>,
    endpoint_in_flight: Family<Endpoint, Gauge>,
    endpoint_healthy: Family<Endpoint, Gauge>,
    checks: Family<Attempt, Counter>,
    picks: Family<Retried, Counter>,
    lookups: Family<Retried, Counter>,
    redis: RedisFamilies,
}

#[derive(Debug)]
struct RedisFamilies {
    calls: Family<Outcome, Counter>,
    seconds: Family<Outcome, Histogram, fn() -> Histogram>,
    /// Without a label, and none where there is no Redis.
    state: Family<[(&'static str, &'static str); 0], Gauge>,
    connected: Counter,
    in_flight: Gauge,
}

type Seconds = Family<Route, Histogram, fn() -> Histogram>;

/// Samples of the server as a whole.
#[derive(Debug, Clone, Default)]
pub struct Process {
    /// Client connections that are open.
    pub connections: Gauge,
    /// Client connections accepted.
    pub accepted: Counter,
    /// Connections that could not be accepted, most often for want of file descriptors.
    pub accept_errors: Counter,
    /// Connections that failed before or between requests.
    pub connection_errors: ConnectionErrors,
    /// Reloads that took effect.
    pub reloads: Counter,
    /// Reloads that were refused and changed nothing.
    pub reloads_refused: Counter,
    /// Log lines lost because the log's reader was too slow.
    pub log_lines_dropped: Counter,
    /// No sample: whether the connections that are left are being cut, at the end of a drain. What ends from
    /// then on was ended by sidegate.
    pub cutting: Arc<AtomicBool>,
}

/// Why a client's connection failed before or between requests. No access line tells of it: there was no request
/// yet that could have one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ConnectionError {
    /// What came is no HTTP. Over HTTP/1.1 it is answered by a bare 400.
    Malformed,
    /// A head that is larger than any that is read: a bare 431 or 414.
    TooLarge,
    /// HTTP/2 was broken by the client, streams that it resets too often among it: GOAWAY.
    Http2,
    /// No TLS session came about.
    Tls,
    /// The PROXY protocol header is missing or malformed.
    ProxyProtocol,
    /// Somebody who may not speak for clients connected where the PROXY protocol is spoken.
    Untrusted,
    /// A head that was slow to arrive, or a client that took nothing of what was written.
    Timeout,
}

impl ConnectionError {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Malformed, Self::TooLarge, Self::Http2, Self::Tls, Self::ProxyProtocol, Self::Untrusted, Self::Timeout];

    /// The label and the log field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::TooLarge => "too_large",
            Self::Http2 => "http2",
            Self::Tls => "tls",
            Self::ProxyProtocol => "proxy_protocol",
            Self::Untrusted => "untrusted",
            Self::Timeout => "timeout",
        }
    }
}

/// Failed connections by reason.
#[derive(Debug, Clone, Default)]
pub struct ConnectionErrors(Family<Reason, Counter>);

impl ConnectionErrors {
    /// The count of one reason.
    #[must_use]
    pub fn of(&self, why: ConnectionError) -> Counter {
        self.0.get_or_create(&Reason { reason: why.as_str() }).clone()
    }
}

/// What ended an exchange before its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AbortedBy {
    /// The client left.
    Client,
    /// The upstream broke off.
    Upstream,
    /// A timeout cut it.
    Timeout,
    /// Sidegate: a bug, or a drain whose time was up.
    Sidegate,
}

impl AbortedBy {
    const ALL: [Self; 4] = [Self::Client, Self::Upstream, Self::Timeout, Self::Sidegate];

    /// The label and the log field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Upstream => "upstream",
            Self::Timeout => "timeout",
            Self::Sidegate => "sidegate",
        }
    }
}

/// Samples of one route, found once at load.
#[derive(Debug)]
pub struct RouteMetrics {
    name: Arc<str>,
    requests: [Counter; 6],
    aborted: [Counter; 4],
    duration: Histogram,
    first_byte: Histogram,
    /// Bytes of request bodies.
    pub received: Counter,
    /// Bytes of response bodies.
    pub sent: Counter,
    /// Requests that have not ended.
    pub in_flight: Gauge,
    _shown: Shown,
}

impl RouteMetrics {
    /// The route's name, the label.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Counts an exchange that is over. `status` is `None` where the client left before there was one.
    pub fn finished(&self, status: Option<StatusCode>, took: Duration, first_byte: Option<Duration>) {
        self.requests[class(status)].inc();
        self.duration.observe(took.as_secs_f64());
        if let Some(first_byte) = first_byte {
            self.first_byte.observe(first_byte.as_secs_f64());
        }
    }

    /// Counts an exchange that did not reach its end.
    pub fn aborted(&self, by: AbortedBy) {
        self.aborted[by as usize].inc();
    }
}

/// Samples of the auth of one route, found once at load.
#[derive(Debug, Clone)]
pub struct AuthMetrics {
    /// Requests with a valid credential.
    pub passed: Counter,
    /// Requests without a credential that were let pass.
    pub anonymous: Counter,
    /// Requests without a credential that were refused.
    pub missing: Counter,
    /// Credentials that are not valid.
    pub invalid: Counter,
    /// Credentials that are valid, and not for the route.
    pub forbidden: Counter,
    /// Attempts that were not looked at, because too many from their address had failed.
    pub throttled: Counter,
    /// Tokens that could not be judged, for want of keys.
    pub unavailable: Counter,
    _shown: Shown,
}

/// Samples of the sessions of one route, found once at load.
#[derive(Debug, Clone)]
pub struct SessionMetrics {
    /// Requests of a session that is kept.
    pub known: Counter,
    /// Requests without a session, which began one.
    pub new: Counter,
    /// Requests with one that is not kept, which began another.
    pub unknown: Counter,
    /// Requests with one of another principal, which began another.
    pub foreign: Counter,
    /// Requests whose session is not kept, because the store is out of order.
    pub unkept: Counter,
    _shown: Shown,
}

/// Samples of the cache of one route, found once at load.
#[derive(Debug, Clone)]
pub struct CacheMetrics {
    outcomes: [Counter; CacheOutcome::ALL.len()],
    in_redis: [Counter; CacheInRedis::ALL.len()],
    resumes: [Counter; CacheResume::ALL.len()],
    copies: [Counter; CacheCopy::ALL.len()],
    /// Answers that were stored.
    pub stored: Counter,
    /// Answers that had to give way to others.
    pub evicted: Counter,
    /// Answers that were asked for anew behind a request.
    pub refreshed: Counter,
    saved: Counter<f64, AtomicU64>,
    _shown: Shown,
}

/// What becomes of looking for an answer in Redis, and of writing one there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheInRedis {
    /// It was there.
    Hit,
    /// It was not.
    Miss,
    /// Redis was out of order, or did not answer in time.
    Failed,
    /// It was written.
    Stored,
    /// It was not written: too many others were waiting, Redis was out of order, or nearly full.
    Dropped,
}

/// What becomes of a client that comes again with the id of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheResume {
    /// It got the rest of the stream, which this replica has.
    Here,
    /// It got it from the copy of another replica's stream.
    There,
    /// It got it from the stored answer.
    Stored,
    /// The stream is not known, not any more, or was purged.
    Unknown,
    /// The stream is known, and what comes next is not at hand.
    Gone,
    /// The stream is another one's.
    Other,
    /// Redis was out of order, or did not answer in time.
    Failed,
}

impl CacheResume {
    const ALL: [Self; 7] =
        [Self::Here, Self::There, Self::Stored, Self::Unknown, Self::Gone, Self::Other, Self::Failed];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::There => "there",
            Self::Stored => "stored",
            Self::Unknown => "unknown",
            Self::Gone => "gone",
            Self::Other => "other",
            Self::Failed => "failed",
        }
    }
}

/// What becomes of the copy of a stream in Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheCopy {
    /// It is there up to the stream's end.
    Complete,
    /// It was taken out: its stream can no longer be taken up.
    Dropped,
    /// It could not be made.
    Lost,
    /// A write failed, and is tried again.
    Failed,
}

impl CacheCopy {
    const ALL: [Self; 4] = [Self::Complete, Self::Dropped, Self::Lost, Self::Failed];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Dropped => "dropped",
            Self::Lost => "lost",
            Self::Failed => "failed",
        }
    }
}

impl CacheInRedis {
    const ALL: [Self; 5] = [Self::Hit, Self::Miss, Self::Failed, Self::Stored, Self::Dropped];

    const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
            Self::Failed => "failed",
            Self::Stored => "stored",
            Self::Dropped => "dropped",
        }
    }
}

impl CacheMetrics {
    /// Counts what became of an answer in Redis.
    pub fn in_redis(&self, outcome: CacheInRedis) {
        self.in_redis[outcome as usize].inc();
    }

    /// Counts a request by its outcome.
    pub fn count(&self, outcome: CacheOutcome) {
        self.outcomes[outcome as usize].inc();
    }

    /// Notes what became of a client that came again with the id of an event.
    pub fn resumed(&self, outcome: CacheResume) {
        self.resumes[outcome as usize].inc();
    }

    /// Notes what became of the copy of a stream.
    pub fn copied(&self, outcome: CacheCopy) {
        self.copies[outcome as usize].inc();
    }

    /// How many requests had this outcome.
    #[must_use]
    pub fn counted(&self, outcome: CacheOutcome) -> u64 {
        self.outcomes[outcome as usize].get()
    }

    /// What the upstream would have needed for what it was spared, in seconds.
    #[must_use]
    pub fn saved_seconds(&self) -> f64 {
        self.saved.get()
    }

    /// Notes that the upstream was spared something that had taken it so long.
    pub fn saved(&self, took: Duration) {
        self.saved.inc_by(took.as_secs_f64());
    }
}

/// Samples of the rate limits of one route, found once at load.
#[derive(Debug, Clone)]
pub struct RateLimitMetrics {
    /// Requests refused because they had been refused before.
    pub remembered: Counter,
    /// Requests whose limits could not be counted in Redis.
    pub store_failure: Counter,
    /// Tokens that language models were given.
    pub tokens_in: Counter,
    /// Tokens that they made.
    pub tokens_out: Counter,
    /// Tokens of answers that a cache gave.
    pub tokens_saved: Counter,
    _shown: Shown,
}

/// Samples of one rule of a route's rate limits, found once at load.
#[derive(Debug, Clone)]
pub struct RuleMetrics {
    /// Requests that it let pass, in requests that passed.
    pub passed: Counter,
    /// Requests that it refused.
    pub limited: Counter,
    /// Requests that it would have refused.
    pub shadow_limited: Counter,
    _shown: Shown,
}

/// Samples of one endpoint of an upstream, found once at load.
#[derive(Debug, Clone)]
pub struct EndpointMetrics {
    /// Attempts that brought a response head.
    pub answered: Counter,
    /// Attempts that failed.
    pub failed: Counter,
    /// Attempts whose client left first.
    pub cancelled: Counter,
    /// Attempts that were begun anew, for the upstream had closed the pooled connection. They are counted once more by how
    /// they end.
    pub repeated: Counter,
    /// Connections opened.
    pub connected: Counter,
    _shown: Shown,
}

/// Samples of the retries to one upstream, found once at load.
#[derive(Debug, Clone)]
pub struct RetryMetrics {
    /// Retries that brought an answer that is no failure.
    pub answered: Counter,
    /// Retries that failed, too.
    pub failed: Counter,
    /// Retries whose client left first.
    pub cancelled: Counter,
    /// Failures that were passed on because the budget was used up.
    pub budget: Counter,
    /// Failures that were passed on because there was no time left, or less than the upstream asked for.
    pub deadline: Counter,
    /// Failures that were passed on because the request's body was no longer at hand.
    pub body: Counter,
    _shown: Shown,
}

/// Samples of the fallbacks of one route.
#[derive(Debug, Clone)]
pub struct FallbackMetrics {
    all: Metrics,
    route: String,
    _shown: Vec<Shown>,
}

/// Why a request cannot be sent to another upstream.
const NO_FALLBACK: [&str; 2] = ["body", "json"];

impl FallbackMetrics {
    /// Counts a request that goes from the upstream `from`, which failed so, to another one. Upstreams and failures are
    /// those of the file.
    pub fn made(&self, from: &str, to: &str, reason: &impl ToString) {
        let (from, to) = (from.to_owned(), to.to_owned());
        let labels = FellBack { route: self.route.clone(), from, to, reason: reason.to_string() };
        self.all.0.families.fallbacks.get_or_create(&labels).inc();
        self.all.0.fell_back.lock().insert(labels);
    }

    /// Counts a request that could not go to the upstream `to`, because its body was no longer at hand.
    pub fn no_body(&self, to: &str) {
        self.not_made(to, NO_FALLBACK[0]);
    }

    /// Counts a request that could not go to the upstream `to`, because its body was not JSON to rewrite.
    pub fn no_json(&self, to: &str) {
        self.not_made(to, NO_FALLBACK[1]);
    }

    fn not_made(&self, to: &str, reason: &'static str) {
        let labels = NoFallback { route: self.route.clone(), to: to.to_owned(), reason };
        self.all.0.families.no_fallbacks.get_or_create(&labels).inc();
    }
}

/// Samples of an endpoint that is balanced over, found once at load.
#[derive(Debug, Clone)]
pub struct BalancedMetrics {
    /// Requests and streams that have not ended.
    pub in_flight: Gauge,
    /// 1 while it is up, 0 while it is down or ejected.
    pub healthy: Gauge,
    /// Checks that passed.
    pub passed: Counter,
    /// Checks that failed.
    pub failed: Counter,
    _shown: Shown,
}

/// Samples of the choice between the endpoints of one upstream, found once at load.
#[derive(Debug, Clone)]
pub struct PickMetrics {
    /// Requests that went to an endpoint.
    pub picked: Counter,
    /// Requests that went to one whatever its health, because too few were healthy.
    pub panic: Counter,
    /// Requests that were refused because the breakers of all endpoints were open.
    pub circuit_open: Counter,
    /// Requests that were refused because no endpoint was healthy.
    pub none: Counter,
    /// Lookups of a name that found addresses.
    pub resolved: Counter,
    /// Lookups of a name that did not.
    pub unresolved: Counter,
    _shown: Shown,
}

/// Samples of the circuit breaker of one endpoint, found once at load.
#[derive(Debug, Clone)]
pub struct BreakerMetrics {
    /// What it is: 0 closed, 1 half open, 2 open.
    pub state: Gauge,
    /// Requests that it refused.
    pub refused: Counter,
    _shown: Shown,
}

/// Samples of the limit of one route or upstream, found once at load.
#[derive(Debug, Clone)]
pub struct ConcurrencyMetrics {
    /// Requests that may be in flight.
    pub limit: Gauge,
    /// Those that are.
    pub in_flight: Gauge,
    /// Those that wait.
    pub queued: Gauge,
    /// How long they did, in seconds.
    pub queue_wait: Histogram,
    /// Refused because too many waited.
    pub queue_full: Counter,
    /// Refused after `queue_timeout`.
    pub queue_timeout: Counter,
    _shown: Shown,
}

/// Samples of the calls to Redis. Cheap to clone.
#[derive(Debug, Clone)]
pub struct RedisMetrics {
    calls: Arc<HashMap<&'static str, (Counter, Histogram)>>,
    unavailable: Counter,
    /// 0 while calls pass, 1 while it is probed, 2 while it is left alone.
    pub state: Gauge,
    /// Connections made.
    pub connected: Counter,
    /// Calls that wait for their answers.
    pub in_flight: Gauge,
}

impl RedisMetrics {
    /// Counts a call that took so long. `outcome` is `ok` or one of those that [`Metrics::redis`] was given.
    pub fn called(&self, outcome: &'static str, took: Duration) {
        if let Some((calls, seconds)) = self.calls.get(outcome) {
            calls.inc();
            seconds.observe(took.as_secs_f64());
        }
    }

    /// Counts a call that was not made, because there is no Redis to be asked.
    pub fn refused(&self) {
        self.unavailable.inc();
    }
}

impl Metrics {
    /// An empty set.
    #[must_use]
    pub fn new() -> Self {
        let families = Families::new();
        let process = Process::default();
        let mut all = Registry::with_prefix("sidegate");
        let f = &families;
        all.register("requests", "Requests that are over, by class of status", f.requests.clone());
        all.register("aborted", "Requests that did not reach their end, by who ended them", f.aborted.clone());
        all.register("errors", "Responses that sidegate made itself, by slug", f.errors.clone());
        let seconds = Unit::Seconds;
        all.register_with_unit("duration", "From a request's head to its end", seconds, f.duration.clone());
        let seconds = Unit::Seconds;
        all.register_with_unit("first_byte", "From a request's head to its response's", seconds, f.first_byte.clone());
        all.register_with_unit("received", "Bytes of request bodies", Unit::Bytes, f.received.clone());
        all.register_with_unit("sent", "Bytes of response bodies", Unit::Bytes, f.sent.clone());
        all.register("in_flight", "Requests that have not ended", f.in_flight.clone());
        all.register("upstream_attempts", "Requests sent to an endpoint, by outcome", f.attempts.clone());
        all.register("retries", "Requests sent again to an upstream, by outcome", f.retries.clone());
        let help = "Failures that were not tried again although they might have been, by reason";
        all.register("retries_not_made", help, f.not_retried.clone());
        f.register_gates(&mut all);
        all.register("fallbacks", "Requests sent to another upstream, by what failed", f.fallbacks.clone());
        let help = "Fallbacks that a request could not be sent to, by reason";
        all.register("fallbacks_not_made", help, f.no_fallbacks.clone());
        let state = "Circuit breakers: 0 closed, 1 half open, 2 open";
        all.register("circuit_breaker_state", state, f.breaker_state.clone());
        let transitions = "Changes of a circuit breaker, by the state that it changed to and why";
        all.register("circuit_breaker_transitions", transitions, f.breaker_transitions.clone());
        let refused = "Requests that a circuit breaker refused";
        all.register("circuit_breaker_refused", refused, f.breaker_refused.clone());
        let help = "Requests that may be in flight in a route or upstream with a limit";
        all.register("concurrency_limit", help, f.concurrency_limit.clone());
        all.register("concurrency_in_flight", "Those that are", f.concurrency_in_flight.clone());
        all.register("concurrency_queued", "Those that wait for a place", f.concurrency_queued.clone());
        let wait = "Time that requests waited for a place, those that gave up included";
        all.register_with_unit("concurrency_wait", wait, Unit::Seconds, f.concurrency_wait.clone());
        let shed = "Requests that were refused a place, by reason";
        all.register("concurrency_shed", shed, f.concurrency_shed.clone());
        f.register_balance(&mut all);
        f.register_redis(&mut all);
        let p = &process;
        all.register("connections", "Client connections that are open", p.connections.clone());
        all.register("connections_accepted", "Client connections accepted", p.accepted.clone());
        all.register("accept_errors", "Client connections that could not be accepted", p.accept_errors.clone());
        // Also those that never happen are shown, so that an alert has something to look at.
        for why in ConnectionError::ALL {
            drop(p.connection_errors.of(why));
        }
        let errors = "Client connections that failed before or between requests, by reason";
        all.register("connection_errors", errors, p.connection_errors.0.clone());
        all.register("reloads", "Reloads that took effect", p.reloads.clone());
        all.register("reloads_refused", "Reloads that were refused", p.reloads_refused.clone());
        all.register("log_lines_dropped", "Log lines lost to a slow reader", p.log_lines_dropped.clone());
        Self(Arc::new(Shared {
            registry: Mutex::new(all),
            shown: Mutex::default(),
            transitions: Mutex::default(),
            fell_back: Mutex::default(),
            families,
            process,
        }))
    }

    /// The samples of the server as a whole.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.0.process
    }

    /// The samples of the route `name`: the same ones for the same name, over reloads.
    #[must_use]
    pub fn route(&self, name: &str) -> Arc<RouteMetrics> {
        let shown = self.show(Of::Route(name.to_owned()));
        let f = &self.0.families;
        let route = Route { route: name.to_owned() };
        Arc::new(RouteMetrics {
            name: name.into(),
            requests: CLASSES.map(|status_class| {
                f.requests.get_or_create(&RouteClass { route: name.to_owned(), status_class }).clone()
            }),
            aborted: AbortedBy::ALL
                .map(|by| f.aborted.get_or_create(&RouteBy { route: name.to_owned(), by: by.as_str() }).clone()),
            duration: f.duration.get_or_create(&route).clone(),
            first_byte: f.first_byte.get_or_create(&route).clone(),
            received: f.received.get_or_create(&route).clone(),
            sent: f.sent.get_or_create(&route).clone(),
            in_flight: f.in_flight.get_or_create(&route).clone(),
            _shown: shown,
        })
    }

    /// The samples of the auth of a route.
    #[must_use]
    pub fn auth(&self, route: &str) -> AuthMetrics {
        let shown = self.show(Of::Auth(route.to_owned()));
        let counter = |outcome| {
            let labels = RouteOutcome { route: route.to_owned(), outcome };
            self.0.families.auth.get_or_create(&labels).clone()
        };
        AuthMetrics {
            passed: counter("passed"),
            anonymous: counter("anonymous"),
            missing: counter("missing"),
            invalid: counter("invalid"),
            forbidden: counter("forbidden"),
            throttled: counter("throttled"),
            unavailable: counter("unavailable"),
            _shown: shown,
        }
    }

    /// The samples of the sessions of a route.
    #[must_use]
    pub fn sessions(&self, route: &str) -> SessionMetrics {
        let shown = self.show(Of::Sessions(route.to_owned()));
        let counter = |outcome| {
            let labels = RouteOutcome { route: route.to_owned(), outcome };
            self.0.families.sessions.get_or_create(&labels).clone()
        };
        SessionMetrics {
            known: counter("known"),
            new: counter("new"),
            unknown: counter("unknown"),
            foreign: counter("foreign"),
            unkept: counter("unkept"),
            _shown: shown,
        }
    }

    /// The samples of the cache of a route.
    #[must_use]
    pub fn cache(&self, route: &str) -> CacheMetrics {
        let shown = self.show(Of::Cache(route.to_owned()));
        let (f, labels) = (&self.0.families, Route { route: route.to_owned() });
        let of = |family: &Family<RouteOutcome, Counter>, outcome: &'static str| {
            family.get_or_create(&RouteOutcome { route: route.to_owned(), outcome }).clone()
        };
        CacheMetrics {
            outcomes: CacheOutcome::ALL.map(|outcome| of(&f.cache, outcome.as_str())),
            in_redis: CacheInRedis::ALL.map(|outcome| of(&f.cache_in_redis, outcome.as_str())),
            resumes: CacheResume::ALL.map(|outcome| of(&f.cache_resumes, outcome.as_str())),
            copies: CacheCopy::ALL.map(|outcome| of(&f.cache_copies, outcome.as_str())),
            stored: f.cache_stored.get_or_create(&labels).clone(),
            evicted: f.cache_evicted.get_or_create(&labels).clone(),
            refreshed: f.cache_refreshed.get_or_create(&labels).clone(),
            saved: f.cache_saved_seconds.get_or_create(&labels).clone(),
            _shown: shown,
        }
    }

    /// The samples of the rate limits of a route.
    #[must_use]
    pub fn rate_limit(&self, route: &str) -> RateLimitMetrics {
        let shown = self.show(Of::RateLimit(route.to_owned()));
        let (f, labels) = (&self.0.families, Route { route: route.to_owned() });
        let tokens = |direction| {
            let labels = RouteTokens { route: route.to_owned(), direction };
            f.tokens.get_or_create(&labels).clone()
        };
        RateLimitMetrics {
            tokens_in: tokens("input"),
            tokens_out: tokens("output"),
            tokens_saved: tokens("saved"),
            remembered: f.rate_limit_remembered.get_or_create(&labels).clone(),
            store_failure: f.rate_limit_store_failures.get_or_create(&labels).clone(),
            _shown: shown,
        }
    }

    /// The samples of a rule of the rate limits of a route.
    #[must_use]
    pub fn rule(&self, route: &str, rule: &str) -> RuleMetrics {
        let shown = self.show(Of::Rule { route: route.to_owned(), rule: rule.to_owned() });
        let counter = |outcome| {
            let labels = RuleOutcome { route: route.to_owned(), rule: rule.to_owned(), outcome };
            self.0.families.rate_limits.get_or_create(&labels).clone()
        };
        RuleMetrics {
            passed: counter("passed"),
            limited: counter("limited"),
            shadow_limited: counter("shadow_limited"),
            _shown: shown,
        }
    }

    /// The samples of an endpoint.
    #[must_use]
    pub fn endpoint(&self, upstream: &str, endpoint: &str) -> EndpointMetrics {
        let shown = self.show(Of::Attempts(Endpoint::of(upstream, endpoint)));
        let counter = |outcome| {
            let labels = Attempt { upstream: upstream.to_owned(), endpoint: endpoint.to_owned(), outcome };
            self.0.families.attempts.get_or_create(&labels).clone()
        };
        EndpointMetrics {
            answered: counter("answered"),
            failed: counter("failed"),
            cancelled: counter("cancelled"),
            repeated: counter("repeated"),
            connected: counter("connected"),
            _shown: shown,
        }
    }

    /// The samples of the retries to an upstream.
    #[must_use]
    pub fn retries(&self, upstream: &str) -> RetryMetrics {
        let shown = self.show(Of::Retries(upstream.to_owned()));
        let (made, not_made) = (&self.0.families.retries, &self.0.families.not_retried);
        let made = |outcome| made.get_or_create(&Retried { upstream: upstream.to_owned(), outcome }).clone();
        let not_made = |reason| not_made.get_or_create(&NotRetried { upstream: upstream.to_owned(), reason }).clone();
        RetryMetrics {
            answered: made("answered"),
            failed: made("failed"),
            cancelled: made("cancelled"),
            budget: not_made("budget"),
            deadline: not_made("deadline"),
            body: not_made("body"),
            _shown: shown,
        }
    }

    /// The samples of the fallbacks of `route`, whose requests go to one of `upstreams` after another.
    #[must_use]
    pub fn fallbacks<'a>(&self, route: &str, upstreams: impl Iterator<Item = &'a str>) -> FallbackMetrics {
        let shown =
            upstreams.map(|name| self.show(Of::Fallback { route: route.to_owned(), upstream: name.to_owned() }));
        FallbackMetrics { _shown: shown.collect(), all: self.clone(), route: route.to_owned() }
    }

    /// The samples of an endpoint that is balanced over.
    #[must_use]
    pub fn balanced(&self, upstream: &str, endpoint: &str) -> BalancedMetrics {
        let shown = self.show(Of::Balanced(Endpoint::of(upstream, endpoint)));
        let f = &self.0.families;
        let labels = Endpoint::of(upstream, endpoint);
        let check = |outcome| f.checks.get_or_create(&Attempt::of(upstream, endpoint, outcome)).clone();
        BalancedMetrics {
            in_flight: f.endpoint_in_flight.get_or_create(&labels).clone(),
            healthy: f.endpoint_healthy.get_or_create(&labels).clone(),
            passed: check("passed"),
            failed: check("failed"),
            _shown: shown,
        }
    }

    /// The samples of the choice between the endpoints of an upstream.
    #[must_use]
    pub fn picks(&self, upstream: &str) -> PickMetrics {
        let shown = self.show(Of::Picks(upstream.to_owned()));
        let f = &self.0.families;
        let of = |family: &Family<Retried, Counter>, outcome| {
            family.get_or_create(&Retried { upstream: upstream.to_owned(), outcome }).clone()
        };
        PickMetrics {
            picked: of(&f.picks, "picked"),
            panic: of(&f.picks, "panic"),
            circuit_open: of(&f.picks, "circuit_open"),
            none: of(&f.picks, "no_healthy_endpoint"),
            resolved: of(&f.lookups, "resolved"),
            unresolved: of(&f.lookups, "failed"),
            _shown: shown,
        }
    }

    /// The samples of the calls to Redis, which may come to these outcomes or to `ok`.
    #[must_use]
    pub fn redis(&self, outcomes: &[&'static str]) -> RedisMetrics {
        let f = &self.0.families.redis;
        let of = |outcome| {
            let labels = Outcome { outcome };
            (f.calls.get_or_create(&labels).clone(), f.seconds.get_or_create(&labels).clone())
        };
        let calls = outcomes.iter().chain(&["ok"]).map(|outcome| (*outcome, of(*outcome))).collect();
        let unavailable = f.calls.get_or_create(&Outcome { outcome: "unavailable" }).clone();
        let state = f.state.get_or_create(&[]).clone();
        let (connected, in_flight) = (f.connected.clone(), f.in_flight.clone());
        RedisMetrics { calls: Arc::new(calls), unavailable, state, connected, in_flight }
    }

    /// Shows no state of a Redis that is gone.
    pub fn forget_redis(&self) {
        self.0.families.redis.state.remove(&[]);
    }

    /// Shows no health of an endpoint that is no longer looked after, while its last requests are counted.
    pub fn forget_health(&self, upstream: &str, endpoint: &str) {
        self.0.families.endpoint_healthy.remove(&Endpoint::of(upstream, endpoint));
    }

    /// The samples of the circuit breaker of an endpoint.
    #[must_use]
    pub fn breaker(&self, upstream: &str, endpoint: &str) -> BreakerMetrics {
        let shown = self.show(Of::Breaker(Endpoint::of(upstream, endpoint)));
        let f = &self.0.families;
        let labels = Endpoint::of(upstream, endpoint);
        BreakerMetrics {
            state: f.breaker_state.get_or_create(&labels).clone(),
            refused: f.breaker_refused.get_or_create(&labels).clone(),
            _shown: shown,
        }
    }

    /// Counts a change of a circuit breaker. `to` and `reason` are closed lists.
    pub fn breaker_transition(&self, upstream: &str, endpoint: &str, to: &'static str, reason: &'static str) {
        let labels = Transition { upstream: upstream.to_owned(), endpoint: endpoint.to_owned(), to, reason };
        self.0.families.breaker_transitions.get_or_create(&labels).inc();
        self.0.transitions.lock().insert(labels);
    }

    /// Shows no state of a circuit breaker that is no longer asked, while its last requests are counted.
    pub fn forget_breaker(&self, upstream: &str, endpoint: &str) {
        self.0.families.breaker_state.remove(&Endpoint::of(upstream, endpoint));
    }

    /// The samples of the limit of a route or upstream.
    #[must_use]
    pub fn concurrency(&self, scope: &'static str, name: &str) -> ConcurrencyMetrics {
        let shown = self.show(Of::Limit(Limited { scope, name: name.to_owned() }));
        let f = &self.0.families;
        let labels = Limited { scope, name: name.to_owned() };
        let shed = |reason| f.concurrency_shed.get_or_create(&Shed { scope, name: name.to_owned(), reason }).clone();
        ConcurrencyMetrics {
            limit: f.concurrency_limit.get_or_create(&labels).clone(),
            in_flight: f.concurrency_in_flight.get_or_create(&labels).clone(),
            queued: f.concurrency_queued.get_or_create(&labels).clone(),
            queue_wait: f.concurrency_wait.get_or_create(&labels).clone(),
            queue_full: shed("queue_full"),
            queue_timeout: shed("queue_timeout"),
            _shown: shown,
        }
    }

    /// Shows no limit that nobody is held to, while its last requests are counted.
    pub fn forget_concurrency(&self, scope: &'static str, name: &str) {
        let f = &self.0.families;
        let labels = Limited { scope, name: name.to_owned() };
        for gauge in [&f.concurrency_limit, &f.concurrency_in_flight, &f.concurrency_queued] {
            gauge.remove(&labels);
        }
    }

    /// Counts a response that sidegate made itself. `slug` comes from `message::Kind`, a closed list.
    pub fn error(&self, slug: &'static str) {
        self.0.families.errors.get_or_create(&Slug { slug }).inc();
    }

    fn show(&self, of: Of) -> Shown {
        *self.0.shown.lock().entry(of.clone()).or_default() += 1;
        Shown(Arc::new(Holder { of, all: self.0.clone() }))
    }

    /// The text that `GET /metrics` answers.
    #[must_use]
    pub fn encode(&self) -> String {
        let mut text = String::new();
        let registry = self.0.registry.lock();
        // A `String` takes every write.
        encode(&mut text, &registry).unwrap_or(());
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Keeps series there while it, or a clone of it, is. Part of all that counts into them: so nothing is counted that is
/// not shown.
#[derive(Debug, Clone)]
struct Shown(#[expect(dead_code, reason = "it is there to be dropped")] Arc<Holder>);

struct Holder {
    of: Of,
    all: Arc<Shared>,
}

impl fmt::Debug for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.of.fmt(f)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Held to the end, so that nobody finds a series that is then removed.
        let mut shown = self.all.shown.lock();
        if let Some(others @ 2..) = shown.get_mut(&self.of) {
            *others -= 1;
        } else {
            shown.remove(&self.of);
            self.all.forget(&self.of);
        }
    }
}

/// Series that come and go together.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
enum Of {
    Route(String),
    Auth(String),
    Sessions(String),
    Cache(String),
    RateLimit(String),
    Rule {
        route: String,
        rule: String,
    },
    Retries(String),
    Picks(String),
    Attempts(Endpoint),
    Balanced(Endpoint),
    Breaker(Endpoint),
    Limit(Limited),
    /// From the upstream or to it.
    Fallback {
        route: String,
        upstream: String,
    },
}

impl Families {
    fn forget_cache(&self, route: &str) {
        for outcome in CacheOutcome::ALL {
            self.cache.remove(&RouteOutcome { route: route.to_owned(), outcome: outcome.as_str() });
        }
        for outcome in CacheInRedis::ALL {
            self.cache_in_redis.remove(&RouteOutcome { route: route.to_owned(), outcome: outcome.as_str() });
        }
        for outcome in CacheResume::ALL {
            self.cache_resumes.remove(&RouteOutcome { route: route.to_owned(), outcome: outcome.as_str() });
        }
        for outcome in CacheCopy::ALL {
            self.cache_copies.remove(&RouteOutcome { route: route.to_owned(), outcome: outcome.as_str() });
        }
        let labels = Route { route: route.to_owned() };
        for family in [&self.cache_stored, &self.cache_evicted, &self.cache_refreshed] {
            family.remove(&labels);
        }
        self.cache_saved_seconds.remove(&labels);
    }
}

impl Shared {
    fn forget(&self, of: &Of) {
        let f = &self.families;
        match of {
            Of::Route(name) => {
                let route = Route { route: name.clone() };
                for status_class in CLASSES {
                    f.requests.remove(&RouteClass { route: name.clone(), status_class });
                }
                for by in AbortedBy::ALL {
                    f.aborted.remove(&RouteBy { route: name.clone(), by: by.as_str() });
                }
                f.duration.remove(&route);
                f.first_byte.remove(&route);
                f.received.remove(&route);
                f.sent.remove(&route);
                f.in_flight.remove(&route);
            }
            Of::Auth(route) => {
                for outcome in ["passed", "anonymous", "missing", "invalid", "forbidden", "throttled", "unavailable"] {
                    f.auth.remove(&RouteOutcome { route: route.clone(), outcome });
                }
            }
            Of::Sessions(route) => {
                for outcome in ["known", "new", "unknown", "foreign", "unkept"] {
                    f.sessions.remove(&RouteOutcome { route: route.clone(), outcome });
                }
            }
            Of::Cache(route) => f.forget_cache(route),
            Of::RateLimit(route) => {
                for direction in ["input", "output", "saved"] {
                    f.tokens.remove(&RouteTokens { route: route.clone(), direction });
                }
                let labels = Route { route: route.clone() };
                f.rate_limit_remembered.remove(&labels);
                f.rate_limit_store_failures.remove(&labels);
            }
            Of::Rule { route, rule } => {
                for outcome in ["passed", "limited", "shadow_limited"] {
                    f.rate_limits.remove(&RuleOutcome { route: route.clone(), rule: rule.clone(), outcome });
                }
            }
            Of::Retries(upstream) => {
                for outcome in ["answered", "failed", "cancelled"] {
                    f.retries.remove(&Retried { upstream: upstream.clone(), outcome });
                }
                for reason in ["budget", "deadline", "body"] {
                    f.not_retried.remove(&NotRetried { upstream: upstream.clone(), reason });
                }
            }
            Of::Picks(upstream) => {
                for outcome in ["picked", "panic", "circuit_open", "no_healthy_endpoint"] {
                    f.picks.remove(&Retried { upstream: upstream.clone(), outcome });
                }
                for outcome in ["resolved", "failed"] {
                    f.lookups.remove(&Retried { upstream: upstream.clone(), outcome });
                }
            }
            Of::Attempts(of) => {
                for outcome in ["answered", "failed", "cancelled", "repeated", "connected"] {
                    f.attempts.remove(&Attempt::of(&of.upstream, &of.endpoint, outcome));
                }
            }
            Of::Balanced(of) => {
                f.endpoint_in_flight.remove(of);
                f.endpoint_healthy.remove(of);
                for outcome in ["passed", "failed"] {
                    f.checks.remove(&Attempt::of(&of.upstream, &of.endpoint, outcome));
                }
            }
            Of::Breaker(of) => {
                f.breaker_state.remove(of);
                f.breaker_refused.remove(of);
                let gone = |labels: &Transition| (&labels.upstream, &labels.endpoint) == (&of.upstream, &of.endpoint);
                forget_some(&f.breaker_transitions, &self.transitions, gone);
            }
            Of::Limit(labels) => {
                for gauge in [&f.concurrency_limit, &f.concurrency_in_flight, &f.concurrency_queued] {
                    gauge.remove(labels);
                }
                f.concurrency_wait.remove(labels);
                for reason in ["queue_full", "queue_timeout"] {
                    f.concurrency_shed.remove(&Shed { scope: labels.scope, name: labels.name.clone(), reason });
                }
            }
            Of::Fallback { route, upstream } => {
                let gone = |labels: &FellBack| labels.route == *route && [&labels.from, &labels.to].contains(&upstream);
                forget_some(&f.fallbacks, &self.fell_back, gone);
                for reason in NO_FALLBACK {
                    f.no_fallbacks.remove(&NoFallback { route: route.clone(), to: upstream.clone(), reason });
                }
            }
        }
    }
}

/// Removes the series of `family` that are `gone` of those that there are.
fn forget_some<L: Clone + Eq + Hash>(
    family: &Family<L, Counter>,
    known: &Mutex<HashSet<L>>,
    gone: impl Fn(&L) -> bool,
) {
    for labels in known.lock().extract_if(|labels| gone(labels)) {
        family.remove(&labels);
    }
}

const CLASSES: [&str; 6] = ["1xx", "2xx", "3xx", "4xx", "5xx", "none"];

fn class(status: Option<StatusCode>) -> usize {
    match status.map(|status| status.as_u16() / 100) {
        Some(hundreds @ 1..=5) => usize::from(hundreds) - 1,
        Some(_) | None => CLASSES.len() - 1,
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Route {
    route: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteClass {
    route: String,
    status_class: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteOutcome {
    route: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteTokens {
    route: String,
    direction: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RuleOutcome {
    route: String,
    rule: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RouteBy {
    route: String,
    by: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Slug {
    slug: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Attempt {
    upstream: String,
    endpoint: String,
    outcome: &'static str,
}

impl Attempt {
    fn of(upstream: &str, endpoint: &str, outcome: &'static str) -> Self {
        Self { upstream: upstream.to_owned(), endpoint: endpoint.to_owned(), outcome }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

impl Families {
    fn new() -> Self {
        let histogram: fn() -> Histogram = || Histogram::new(SECONDS);
        Self {
            duration: Family::new_with_constructor(histogram),
            first_byte: Family::new_with_constructor(histogram),
            requests: Family::default(),
            aborted: Family::default(),
            errors: Family::default(),
            received: Family::default(),
            sent: Family::default(),
            in_flight: Family::default(),
            attempts: Family::default(),
            retries: Family::default(),
            not_retried: Family::default(),
            auth: Family::default(),
            sessions: Family::default(),
            cache: Family::default(),
            cache_in_redis: Family::default(),
            cache_resumes: Family::default(),
            cache_copies: Family::default(),
            cache_stored: Family::default(),
            cache_evicted: Family::default(),
            cache_refreshed: Family::default(),
            cache_saved_seconds: Family::default(),
            rate_limits: Family::default(),
            rate_limit_remembered: Family::default(),
            tokens: Family::default(),
            rate_limit_store_failures: Family::default(),
            fallbacks: Family::default(),
            no_fallbacks: Family::default(),
            breaker_state: Family::default(),
            breaker_transitions: Family::default(),
            breaker_refused: Family::default(),
            concurrency_limit: Family::default(),
            concurrency_in_flight: Family::default(),
            concurrency_queued: Family::default(),
            concurrency_wait: Family::new_with_constructor(histogram),
            concurrency_shed: Family::default(),
            endpoint_in_flight: Family::default(),
            endpoint_healthy: Family::default(),
            checks: Family::default(),
            picks: Family::default(),
            lookups: Family::default(),
            redis: RedisFamilies {
                calls: Family::default(),
                seconds: Family::new_with_constructor(|| Histogram::new(REDIS_SECONDS)),
                state: Family::default(),
                connected: Counter::default(),
                in_flight: Gauge::default(),
            },
        }
    }

    fn register_redis(&self, all: &mut Registry) {
        let f = &self.redis;
        all.register("redis_calls", "Calls to Redis, by outcome", f.calls.clone());
        all.register_with_unit("redis_call", "Time that calls to Redis took", Unit::Seconds, f.seconds.clone());
        all.register("redis_state", "Redis: 0 up, 1 being probed, 2 down", f.state.clone());
        all.register("redis_connects", "Connections to Redis that were made", f.connected.clone());
        all.register("redis_in_flight", "Calls to Redis that wait for their answers", f.in_flight.clone());
    }

    fn register_gates(&self, all: &mut Registry) {
        all.register("auth", "Requests of routes with auth, by outcome", self.auth.clone());
        all.register("sessions", "Requests of routes with sessions, by outcome", self.sessions.clone());
        all.register("cache_requests", "Requests of routes with a cache, by outcome", self.cache.clone());
        let help = "Answers that were looked for in Redis, or left to be written there, by outcome";
        all.register("cache_redis", help, self.cache_in_redis.clone());
        let help =
            "Clients that came with the id of an event of ours, by where the rest of the stream was, or why it was not";
        all.register("cache_resumes", help, self.cache_resumes.clone());
        let help =
            "Copies in Redis of streams that can be taken up again, by what became of them, and writes that failed";
        all.register("cache_resume_copies", help, self.cache_copies.clone());
        all.register("cache_stored", "Answers that were stored", self.cache_stored.clone());
        all.register("cache_evicted", "Stored answers that had to give way to others", self.cache_evicted.clone());
        let help = "Stored answers that were asked for anew behind a request";
        all.register("cache_refreshed", help, self.cache_refreshed.clone());
        let help = "Time that the upstream had needed for the answers that were given from the cache";
        all.register_with_unit("cache_saved", help, Unit::Seconds, self.cache_saved_seconds.clone());
        all.register("rate_limits", "Requests that a rule held for, by outcome", self.rate_limits.clone());
        let help = "Requests refused because they had been refused before, without a look at the counters";
        all.register("rate_limits_remembered", help, self.rate_limit_remembered.clone());
        all.register("tokens", "Tokens of language models, on routes where they are counted", self.tokens.clone());
        let help = "Requests whose limits could not be counted in Redis";
        all.register("rate_limit_store_failures", help, self.rate_limit_store_failures.clone());
    }

    fn register_balance(&self, all: &mut Registry) {
        let help = "Requests to an endpoint of several that have not ended";
        all.register("endpoint_in_flight", help, self.endpoint_in_flight.clone());
        let help = "Endpoints of several: 1 up, 0 down or left alone for a while";
        all.register("endpoint_healthy", help, self.endpoint_healthy.clone());
        all.register("health_checks", "Checks of an endpoint, by outcome", self.checks.clone());
        all.register("balance_picks", "Choices of an endpoint, by outcome", self.picks.clone());
        all.register("balance_lookups", "Lookups of the name of an endpoint, by outcome", self.lookups.clone());
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Retried {
    upstream: String,
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NotRetried {
    upstream: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct FellBack {
    route: String,
    from: String,
    to: String,
    reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NoFallback {
    route: String,
    to: String,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Endpoint {
    upstream: String,
    endpoint: String,
}

impl Endpoint {
    fn of(upstream: &str, endpoint: &str) -> Self {
        Self { upstream: upstream.to_owned(), endpoint: endpoint.to_owned() }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Transition {
    upstream: String,
    endpoint: String,
    to: &'static str,
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Limited {
    scope: &'static str,
    name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Shed {
    scope: &'static str,
    name: String,
    reason: &'static str,
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    #[test]
    fn a_route_keeps_its_samples_over_a_reload() {
        let metrics = Metrics::new();
        let before = metrics.route("chat");
        before.finished(Some(StatusCode::OK), Duration::from_millis(3), None);
        let after = metrics.route("chat");
        drop(before);
        after.finished(None, Duration::from_millis(3), None);
        let text = metrics.encode();
        assert!(text.contains(r#"sidegate_requests_total{route="chat",status_class="2xx"} 1"#), "{text}");
        assert!(text.contains(r#"sidegate_requests_total{route="chat",status_class="none"} 1"#), "{text}");
        assert!(text.contains(r#"sidegate_duration_seconds_bucket{le="0.005",route="chat"} 2"#), "{text}");
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn no_series_is_left_of_what_is_gone() {
        let metrics = Metrics::new();
        let empty = metrics.encode();
        let lines = |metrics: &Metrics| metrics.encode().lines().filter(|line| line.contains("here")).count();
        let route = (metrics.route("here"), metrics.auth("here"), metrics.sessions("here"));
        let limits = (metrics.rate_limit("here"), metrics.rule("here", "all"));
        let fallbacks = metrics.fallbacks("here", ["own", "other"].into_iter());
        fallbacks.made("own", "other", &"503");
        fallbacks.no_body("other");
        fallbacks.no_json("other");
        let upstream = (metrics.retries("here"), metrics.picks("here"), metrics.concurrency("upstream", "here"));
        let endpoint = (metrics.endpoint("here", "a"), metrics.balanced("here", "a"), metrics.breaker("here", "a"));
        metrics.breaker_transition("here", "a", "open", "operator");
        let before = lines(&metrics);
        let another = (endpoint.0.clone(), metrics.breaker("here", "a"), fallbacks.clone());
        drop((route, limits, fallbacks, upstream, endpoint));
        assert!(lines(&metrics) < before);
        another.0.failed.inc();
        another.1.refused.inc();
        another.2.made("own", "other", &"503");
        for shown in [
            r#"sidegate_upstream_attempts_total{upstream="here",endpoint="a",outcome="failed"} 1"#,
            r#"sidegate_circuit_breaker_refused_total{upstream="here",endpoint="a"} 1"#,
            r#"sidegate_circuit_breaker_transitions_total{upstream="here",endpoint="a",to="open",reason="operator"} 1"#,
            r#"sidegate_fallbacks_total{route="here",from="own",to="other",reason="503"} 2"#,
        ] {
            assert!(metrics.encode().contains(shown), "{shown} is counted into: {}", metrics.encode());
        }
        drop(another);
        assert_eq!(metrics.encode(), empty);
    }

    proptest! {
        #[test]
        fn whatever_comes_and_goes_what_is_counted_is_shown(steps in vec((0..3_usize, any::<bool>()), 1..60)) {
            let metrics = Metrics::new();
            let mut held: [Vec<EndpointMetrics>; 3] = Default::default();
            let mut counted = [0; 3];
            for (n, comes) in steps {
                if comes {
                    held[n].push(metrics.endpoint("api", &n.to_string()));
                } else if !held[n].is_empty() {
                    held[n].remove(0);
                }
                if let Some(one) = held[n].last() {
                    one.answered.inc();
                    counted[n] += 1;
                } else {
                    counted[n] = 0;
                }
                let text = metrics.encode();
                for (n, (held, counted)) in held.iter().zip(counted).enumerate() {
                    let series = "sidegate_upstream_attempts_total";
                    let labels = format!("upstream=\"api\",endpoint=\"{n}\"");
                    prop_assert_eq!(text.contains(&labels), !held.is_empty());
                    let line = format!("{series}{{{labels},outcome=\"answered\"}} {counted}\n");
                    prop_assert!(held.is_empty() || text.contains(&line), "{}", text);
                }
            }
        }
    }
}
