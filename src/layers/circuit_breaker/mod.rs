//! Circuit breaker: row 19 of the request path, one for each endpoint of an upstream.
//!
//! An endpoint that fails again and again is left alone for a while: its requests are refused at once instead of
//! waiting for what will not come. When the while is over, as many requests as there are `half_open_permits` are let
//! through. If all of them succeed the breaker closes; if one fails it opens again, for twice as long.
//!
//! | counts as | what |
//! |---|---|
//! | failure | no connection, a reset, an upstream timeout, a status in `failure_status`, a body that breaks off |
//! | slow | a response head later than `slow_first_byte` after the request's last byte |
//! | nothing | a client that leaves, or whose body fails; a request that `timeouts.total` ended |
//! | success | every other response, an application's 500 among them: that is its answer, not its death |
//!
//! A response is judged by its head, for a stream may last for hours. When its body breaks off later, that success
//! becomes a failure. What hangs is bounded by `timeouts.first_byte`. A probe may take its time, as a slow upload does, but
//! it does not keep its permit for longer than the breaker was open: then another request is let through beside it.
//!
//! The state machine is in `state`, after linkerd's and resilience4j's. While the breaker is closed, a request costs one
//! atomic load on its way in and one short lock when its response is there.
//!
//! ```
//! use std::sync::Arc;
//! use http::{Request, Response};
//! use sidegate::{
//!     layers::circuit_breaker::{Breaker, CircuitBreakerLayer, Config},
//!     message::{Body, Error, Kind},
//!     telemetry::Metrics,
//! };
//! use tower::{Service, ServiceBuilder, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let breaker = Breaker::new("api", "127.0.0.1:8000", Config::default(), &Metrics::new());
//! let mut service = ServiceBuilder::new().layer(CircuitBreakerLayer::new(Arc::new(breaker))).service(service_fn(
//!     |_: Request<Body>| async { Err::<Response<Body>, _>(std::io::Error::other("it is down")) },
//! ));
//! for _ in 0..5 {
//!     assert!(service.call(Request::new(Body::empty())).await.is_err());
//! }
//! let refused = service.call(Request::new(Body::empty())).await.unwrap_err();
//! assert_eq!(Error::find(&*refused).map(Error::kind), Some(Kind::CircuitOpen));
//! # });
//! ```

mod state;

use std::{
    collections::BTreeSet,
    hash::{BuildHasher, RandomState},
    num::NonZeroU32,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Extensions, Request, Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::{Mutex, MutexGuard};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tower::{Layer, Service};
use tracing::{info, warn};

use self::state::{Change, Machine, Mark, Ticket};
pub use self::state::{Snapshot, State};
use crate::{
    config::{
        problem::{Check, Problems},
        units::{HumanDuration, Toggle},
    },
    message::{Body, BoxError, Error, Kind},
    telemetry::{Exchange, Metrics, metrics::BreakerMetrics},
    upstream::balance::Admit,
};

/// When an endpoint is left alone, and for how long. Section `circuit_breaker` of an upstream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "CircuitBreaker")]
pub struct Config {
    /// Failures in a row that open the breaker, at least 1. Default 5; `off` does not count them.
    pub consecutive_failures: Toggle<NonZeroU32>,
    /// The share of failures in `window` that opens it, more than 0 and at most 1. Default 0.5: under many requests at
    /// once a few still succeed, and failures never come in a row. `off` does not count them.
    pub failure_rate: Toggle<f64>,
    /// The share of slow responses in `window` that opens it, more than 0 and at most 1. Needs `slow_first_byte`.
    /// Default `off`, because what is slow only its operator knows.
    pub slow_rate: Toggle<f64>,
    /// From the request's last byte to the response's head: as long as this is slow. For `slow_rate`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub slow_first_byte: Option<HumanDuration>,
    /// How far back the rates look, 1s to 1h. Default `10s`.
    pub window: HumanDuration,
    /// Responses and failures in `window` below which the rates say nothing, at least 1. Default 20.
    pub min_requests: NonZeroU32,
    /// The statuses that are failures, 400 to 599. Default 502, 503 and 504, by which those between say that nobody
    /// answers. A 500 is the application's answer.
    pub failure_status: BTreeSet<u16>,
    /// How long the breaker stays open the first time; each failed probe doubles it, up to `max_recovery`. Shortened at
    /// random by up to a fifth, so that replicas do not probe in step. Default `5s`. It starts over when the breaker
    /// has stayed closed for as long as it was open last.
    pub recovery: HumanDuration,
    /// The longest that the breaker stays open. Default `1m`, or `recovery` where that is longer: an endpoint that came
    /// back is found out within this time. Not below `recovery`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_recovery: Option<HumanDuration>,
    /// Requests that are let through to see whether the endpoint is back, at least 1. All must succeed. Default 1. One that
    /// takes longer than the breaker was open makes room for another.
    pub half_open_permits: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        let count = |n| NonZeroU32::new(n).unwrap_or(NonZeroU32::MIN);
        Self {
            consecutive_failures: Toggle::On(count(5)),
            failure_rate: Toggle::On(0.5),
            slow_rate: Toggle::Off,
            slow_first_byte: None,
            window: HumanDuration::from_secs(10),
            min_requests: count(20),
            failure_status: [502, 503, 504].into(),
            recovery: HumanDuration::from_secs(5),
            max_recovery: None,
            half_open_permits: count(1),
        }
    }
}

impl Config {
    /// The share of slow responses that opens the breaker, and what is slow.
    fn slow(&self) -> Option<(f64, Duration)> {
        Some((self.slow_rate.on()?, self.slow_first_byte?.get()))
    }

    /// The longest that the breaker stays open.
    #[must_use]
    pub fn max_recovery(&self) -> HumanDuration {
        self.max_recovery.unwrap_or(HumanDuration::from_secs(60).max(self.recovery))
    }

    /// The same with its defaults written out.
    pub fn complete(&mut self) {
        self.max_recovery = Some(self.max_recovery());
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        for (key, rate) in [("failure_rate", self.failure_rate), ("slow_rate", self.slow_rate)] {
            if let Toggle::On(rate) = rate
                && !(rate > 0.0 && rate <= 1.0)
            {
                problems.add(key, format!("is {rate}: must be a share, more than 0 and at most 1, as in `0.5`"));
            }
        }
        match (self.slow_rate.is_off(), self.slow_first_byte) {
            (false, None) => problems.add("slow_first_byte", "is missing: `slow_rate` needs to know what is slow"),
            (true, Some(_)) => problems.add("slow_first_byte", "has no effect while `slow_rate` is off: set it too"),
            (_, Some(after)) if after.is_zero() => problems.add("slow_first_byte", "must be longer than 0s"),
            _ => {}
        }
        if self.consecutive_failures.is_off() && self.failure_rate.is_off() && self.slow_rate.is_off() {
            let why =
                "could never open: set `consecutive_failures`, `failure_rate` or `slow_rate`, or leave the section out";
            problems.add("", why);
        }
        if self.window < HumanDuration::from_secs(1) || self.window > HumanDuration::from_secs(3600) {
            problems.add("window", format!("is {}: must be from 1s to 1h", self.window));
        }
        for status in self.failure_status.iter().filter(|status| !(400..=599).contains(*status)) {
            problems.add("failure_status", format!("has {status}: must be statuses from 400 to 599"));
        }
        if self.recovery.is_zero() {
            problems.add("recovery", "must be longer than 0s");
        }
        if let Some(most) = self.max_recovery
            && most < self.recovery
        {
            problems.add("max_recovery", format!("is {most}: must be at least `recovery` ({})", self.recovery));
        }
    }
}

/// The breaker of one endpoint, shared by all routes to it and kept over reloads.
#[derive(Debug)]
pub struct Breaker {
    upstream: Arc<str>,
    endpoint: Arc<str>,
    metrics: BreakerMetrics,
    /// Where changes, which are rare, are counted.
    all: Metrics,
    /// Twice the generation, plus 1 while closed: what a request on its way in needs to know.
    gate: AtomicU64,
    machine: Mutex<Machine>,
}

impl Breaker {
    /// A closed breaker, which logs and counts as the one of `endpoint`.
    #[must_use]
    pub fn new(upstream: &str, endpoint: &str, config: Config, metrics: &Metrics) -> Self {
        // What differs between processes is all that is asked of it.
        let seed = RandomState::new().hash_one(endpoint);
        let (all, metrics) = (metrics.clone(), metrics.breaker(upstream, endpoint));
        metrics.state.set(gauge(State::Closed));
        let machine = Machine::new(config, seed, Instant::now());
        Self {
            upstream: upstream.into(),
            endpoint: endpoint.into(),
            metrics,
            all,
            gate: AtomicU64::new(gate(&machine)),
            machine: Mutex::new(machine),
        }
    }

    /// The upstream.
    #[must_use]
    pub fn upstream(&self) -> &Arc<str> {
        &self.upstream
    }

    /// The endpoint, as logs and metrics name it.
    #[must_use]
    pub fn endpoint(&self) -> &Arc<str> {
        &self.endpoint
    }

    /// Whether a request would be let through now. Takes no permit, so another may be first.
    #[must_use]
    pub fn admits(&self) -> bool {
        self.closed().is_some() || self.machine().admits(Instant::now())
    }

    /// When to come again; nothing where a request would be let through, or until an operator says so.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        if self.closed().is_some() { None } else { self.machine().retry_after(Instant::now()) }
    }

    /// The figures.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        self.machine().snapshot(Instant::now())
    }

    /// How many requests were refused.
    #[must_use]
    pub fn refused(&self) -> u64 {
        self.metrics.refused.get()
    }

    /// Opens it until it is [`reset`](Self::reset).
    pub fn force_open(&self) {
        self.change(|machine| ((), machine.force_open(Instant::now())));
    }

    /// Closes it and forgets what was. Answers that are on their way count for nothing.
    pub fn reset(&self) {
        self.change(|machine| ((), machine.reset(Instant::now())));
    }

    /// Goes on with other settings. State and counts are kept; the window's are not where its length changes.
    pub fn adopt(&self, config: &Config) {
        self.change(|machine| {
            let changed = machine.config() != config;
            ((), changed.then(|| machine.adopt(config.clone(), Instant::now())).flatten())
        });
    }

    /// The generation, while closed.
    fn closed(&self) -> Option<u64> {
        let gate = self.gate.load(Ordering::Acquire);
        (gate & 1 == 1).then_some(gate >> 1)
    }

    /// Lets a request through, or says when to come again, where that is known.
    fn enter(self: Arc<Self>) -> Result<Held, Option<Duration>> {
        let ticket = match self.closed() {
            Some(generation) => Ticket::ordinary(generation),
            None => self.change(|machine| machine.admit(Instant::now()))?,
        };
        Ok(Held { breaker: self, ticket: Some(ticket) })
    }

    /// The refusal of a request, which may come again after so long, or when an operator says so.
    fn refuse(&self, after: Option<Duration>) -> Error {
        self.metrics.refused.inc();
        let refused = Error::from(Kind::CircuitOpen);
        match after {
            Some(after) => refused.with_retry_after(after),
            None => refused,
        }
    }

    fn broke_off(&self, mark: &Mark) {
        self.change(|machine| ((), machine.broke_off(mark, Instant::now())));
    }

    fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock()
    }

    /// Lets `act` do something to the machine, and tells of a change.
    fn change<T>(&self, act: impl FnOnce(&mut Machine) -> (T, Option<Change>)) -> T {
        let mut machine = self.machine();
        let (result, change) = act(&mut machine);
        // Also a reset of a closed one begins a generation.
        self.gate.store(gate(&machine), Ordering::Release);
        if let Some(change) = change {
            // Under the lock, so that the last state is the one that is shown.
            self.metrics.state.set(gauge(machine.snapshot(Instant::now()).state));
            drop(machine);
            self.tell(change);
        }
        result
    }

    fn tell(&self, change: Change) {
        let (upstream, endpoint) = (&*self.upstream, &*self.endpoint);
        let (to, reason) = match change {
            Change::Opened { why, .. } => (State::Open, why.as_str()),
            Change::HalfOpened => (State::HalfOpen, "recovery"),
            Change::Closed { by_operator: false } => (State::Closed, "probes_succeeded"),
            Change::Closed { by_operator: true } => (State::Closed, "operator"),
        };
        self.all.breaker_transition(upstream, endpoint, to.as_str(), reason);
        match change {
            Change::Opened { recovery: Some(recovery), .. } => {
                let recovery_ms = recovery.as_millis();
                warn!(upstream, endpoint, reason, recovery_ms, "circuit breaker opened");
            }
            Change::Opened { recovery: None, .. } => warn!(upstream, endpoint, reason, "circuit breaker opened"),
            Change::HalfOpened => info!(upstream, endpoint, "circuit breaker half open"),
            Change::Closed { .. } => info!(upstream, endpoint, reason, "circuit breaker closed"),
        }
    }
}

/// What a request has with it that balancing got past the breaker. Request extension, from there to the layer.
#[derive(Clone)]
struct Passed(Arc<Held>);

/// So that balancing, a floor below, asks another endpoint.
impl Admit for Breaker {
    fn admits(&self) -> bool {
        self.admits()
    }

    fn admit(self: Arc<Self>, extensions: &mut Extensions) -> bool {
        self.enter().is_ok_and(|held| {
            extensions.insert(Passed(Arc::new(held)));
            true
        })
    }

    fn retry_after(&self) -> Option<Duration> {
        self.retry_after()
    }
}

fn gate(machine: &Machine) -> u64 {
    machine.generation() << 1 | u64::from(machine.is_closed())
}

/// The state as a figure, worse ones greater.
const fn gauge(state: State) -> i64 {
    match state {
        State::Closed => 0,
        State::HalfOpen => 1,
        State::Open => 2,
    }
}

/// A request that was let through. Dropped unjudged, it gives its permit back: the client has left.
#[derive(Debug)]
struct Held {
    breaker: Arc<Breaker>,
    ticket: Option<Ticket>,
}

impl Held {
    /// Without a status there was no response.
    fn judge(mut self, status: Option<StatusCode>, first_byte: Duration, now: Instant) -> Option<Mark> {
        let ticket = self.ticket.take()?;
        self.breaker.change(|machine| {
            let failed = status.is_none_or(|status| machine.config().failure_status.contains(&status.as_u16()));
            machine.judge(ticket, failed, first_byte, now)
        })
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Some(ticket) = self.ticket.as_ref().filter(|ticket| ticket.is_probe()) {
            self.breaker.machine().leave(ticket);
        }
    }
}

/// Leaves an endpoint alone that fails: see the [module](self).
///
/// # Errors
/// [`Kind::CircuitOpen`], 503, with the time that remains; none where an operator opened it.
#[derive(Debug, Clone)]
pub struct CircuitBreakerLayer {
    breaker: Arc<Breaker>,
}

impl CircuitBreakerLayer {
    /// A layer before the endpoint of `breaker`.
    #[must_use]
    pub fn new(breaker: Arc<Breaker>) -> Self {
        Self { breaker }
    }
}

impl<S> Layer<S> for CircuitBreakerLayer {
    type Service = CircuitBreaker<S>;

    fn layer(&self, inner: S) -> CircuitBreaker<S> {
        CircuitBreaker { inner, breaker: self.breaker.clone() }
    }
}

/// The service of [`CircuitBreakerLayer`].
#[derive(Debug, Clone)]
pub struct CircuitBreaker<S> {
    inner: S,
    breaker: Arc<Breaker>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for CircuitBreaker<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ReqBody: HttpBody,
    ResBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let passed = request.extensions_mut().remove().and_then(|Passed(held)| Arc::into_inner(held));
        let passed = passed.filter(|held| Arc::ptr_eq(&held.breaker, &self.breaker));
        let held = match passed.map_or_else(|| self.breaker.clone().enter(), Ok) {
            Ok(held) => held,
            Err(after) => {
                let refused = self.breaker.refuse(after);
                if let Some(exchange) = Exchange::of(&request) {
                    let mut facts = exchange.facts();
                    facts.upstream = Some(self.breaker.upstream.clone());
                    facts.endpoint = Some(self.breaker.endpoint.clone());
                }
                let begun = Instant::now();
                return ResponseFuture { inner: None, refused: Some(refused), held: None, begun, upload: None };
            }
        };
        let upload = Exchange::of_upload(&request);
        let begun = Instant::now();
        let inner = Some(self.inner.call(request));
        ResponseFuture { inner, refused: None, held: Some(held), begun, upload }
    }
}

pin_project! {
    /// The response of [`CircuitBreaker`].
    #[derive(Debug)]
    pub struct ResponseFuture<F> {
        // Absent where the request was refused.
        #[pin]
        inner: Option<F>,
        refused: Option<Error>,
        held: Option<Held>,
        begun: Instant,
        // Knows when the request's body ended.
        upload: Option<Exchange>,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    E: Into<BoxError>,
{
    type Output = Result<Response<Body>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let Some(inner) = this.inner.as_pin_mut() else {
            let refused = this.refused.take().unwrap_or_else(|| Kind::CircuitOpen.into());
            return Poll::Ready(Err(refused.into()));
        };
        let result = ready!(inner.poll(cx)).map_err(Into::into);
        let held = this.held.take();
        let now = Instant::now();
        let first_byte = now.saturating_duration_since(Exchange::waiting_since(this.upload.as_ref(), *this.begun));
        let response = match result {
            Ok(response) => response,
            Err(error) => {
                // Else it is the client's doing, as if it had left.
                if let Some(held) = held.filter(|_| Error::blames_endpoint(&*error)) {
                    held.judge(None, first_byte, now);
                }
                return Poll::Ready(Err(error));
            }
        };
        let judged = held.and_then(|held| {
            let breaker = held.breaker.clone();
            let mark = held.judge(Some(response.status()), first_byte, now)?;
            // What is over does not break off.
            (!response.body().is_end_stream()).then_some((breaker, mark))
        });
        Poll::Ready(Ok(response.map(|body| match judged {
            Some((breaker, mark)) => Body::new(ResponseBody { body, breaker, mark: Some(mark) }),
            None => Body::new(body),
        })))
    }
}

pin_project! {
    /// The body of a response that was judged by its head.
    #[derive(Debug)]
    pub struct ResponseBody<B> {
        #[pin]
        body: B,
        breaker: Arc<Breaker>,
        mark: Option<Mark>,
    }
}

impl<B> HttpBody for ResponseBody<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(cx)).map(|frame| frame.map_err(Into::into));
        if let Some(Err(error)) = &frame
            && let Some(mark) = this.mark.take()
            && Error::blames_endpoint(&**error)
        {
            this.breaker.broke_off(&mark);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
