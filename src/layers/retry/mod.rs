//! Retry: row 17 of the request path. Sends a request again that its upstream failed to serve.
//!
//! Only where that cannot do twice what was asked for once: the method is idempotent (RFC 9110 §9.2.2: a proxy must not
//! repeat any other by itself), or it is certain that the upstream never saw the request. And only while nothing of a
//! response has reached the client. The body of an idempotent request is read again from what was kept of it while it was
//! sent, up to `replay`; a larger one is sent, and not sent again once a byte of it has left.
//!
//! Retries are what turns an upstream that is slow into one that is down. Three things keep them from it: a budget
//! ([`Budget`]) that all routes to an upstream share, a wait before each of them that doubles and is wholly random (full
//! jitter: those that failed together do not come back together), and that a `Retry-After` is believed. None is begun
//! that the deadline would not leave any time. A client that leaves takes its retries with it.
//!
//! An upgrade is never retried, nor is `CONNECT`.
//!
//! ```
//! use std::sync::atomic::{AtomicU32, Ordering};
//! use http::{Request, Response, StatusCode};
//! use sidegate::{layers::retry::{self, Budget, RetryLayer}, message::{Body, BoxError}, telemetry::Metrics};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(async {
//! static ASKED: AtomicU32 = AtomicU32::new(0);
//! let service = ServiceBuilder::new()
//!     .layer(RetryLayer::new(&retry::Config::default(), Budget::default(), Metrics::new().retries("api")))
//!     .service(service_fn(|_: Request<Body>| async {
//!         let failed = ASKED.fetch_add(1, Ordering::Relaxed) == 0;
//!         let mut response = Response::new(Body::empty());
//!         *response.status_mut() = if failed { StatusCode::BAD_GATEWAY } else { StatusCode::OK };
//!         Ok::<_, BoxError>(response)
//!     }));
//! let response = service.oneshot(Request::new(Body::empty())).await.unwrap();
//! assert_eq!(response.status(), StatusCode::OK);
//! # });
//! ```

mod budget;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use futures_util::TryFutureExt;
use http::{StatusCode, header::RETRY_AFTER};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, sleep};
use tower::{
    Layer, Service,
    util::rng::{HasherRng, Rng},
};

pub use self::budget::{Budget, Share, WINDOW};
use crate::{
    config::{ByteSize, Check, Failure, HumanDuration, Problems},
    message::{
        self, Body, BoxError, CloneService, Error, Kind, Replay, Request, Response, Tried, Undecided, asks_for_tunnel,
        take_ready,
    },
    telemetry::{Exchange, metrics::RetryMetrics},
};

/// When a request is sent again, and how often. Section `retry`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Retry")]
pub struct Config {
    /// How often a request is sent at most, the first time included. 2 to 10; default 2.
    pub attempts: u8,
    /// Which failures are tried again: `connect`, `reset`, `timeout`, and statuses (408, 425, 429, 500 to 599). All but
    /// `connect` for idempotent methods only. Default `[connect, reset, 502, 503, 504]`.
    pub on: Vec<Failure>,
    /// How much of what clients ask may be asked again.
    pub budget: BudgetConfig,
    /// How long to wait before.
    pub backoff: Backoff,
    /// How much of a request's body is kept to be sent again, up to 16MiB. A larger one is sent once. Default `64KiB`.
    pub replay: ByteSize,
}

/// How much of what clients ask may be asked again. Section `budget` of `retry`.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "RetryBudget")]
pub struct BudgetConfig {
    /// Retries per request, of the last ten seconds and over all routes to the upstream. 0 to 1; default 0.2.
    pub ratio: f64,
    /// So many retries within ten seconds are always allowed. Default 3.
    pub floor: u32,
}

/// How long to wait before a retry. Section `backoff` of `retry`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "RetryBackoff")]
pub struct Backoff {
    /// The longest wait before the first retry; it doubles with each one. The wait is random, from nothing to this.
    /// Default `25ms`.
    pub base: HumanDuration,
    /// The longest that the wait may grow to. Not below `base`; default `250ms`.
    pub max: HumanDuration,
    /// The longest `Retry-After` of an answer that is waited for instead. With a longer one, or one that is beyond
    /// `timeouts.total`, the answer is passed on. Default `1s`.
    pub max_retry_after: HumanDuration,
}

impl Default for Config {
    fn default() -> Self {
        let statuses = [StatusCode::BAD_GATEWAY, StatusCode::SERVICE_UNAVAILABLE, StatusCode::GATEWAY_TIMEOUT];
        Self {
            attempts: 2,
            on: [Failure::Connect, Failure::Reset].into_iter().chain(statuses.map(Failure::Status)).collect(),
            budget: BudgetConfig::default(),
            backoff: Backoff::default(),
            replay: ByteSize::from_kib(64),
        }
    }
}

impl Default for BudgetConfig {
    fn default() -> Self {
        Self { ratio: 0.2, floor: 3 }
    }
}

impl Default for Backoff {
    fn default() -> Self {
        Self {
            base: HumanDuration::from_millis(25),
            max: HumanDuration::from_millis(250),
            max_retry_after: HumanDuration::from_secs(1),
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if !(2..=10).contains(&self.attempts) {
            problems.add("attempts", format!("is {}: must be from 2 to 10; `retry: off` sends once", self.attempts));
        }
        if self.on.is_empty() {
            problems.add("on", "is empty: name failures, as in `[connect, 503]`, or write `retry: off`");
        }
        for (n, failure) in self.on.iter().enumerate() {
            // Who is told to stay away does not come back within a quarter of a second.
            if matches!(failure, Failure::CircuitOpen | Failure::NoHealthyEndpoint | Failure::Overloaded) {
                let why = format!("`{failure}` is no failure to try again at once: it may trigger a fallback");
                problems.add(format!("on.{n}"), why);
            }
        }
        if !(0.0..=1.0).contains(&self.budget.ratio) {
            problems.add("budget.ratio", format!("is {}: must be from 0 to 1", self.budget.ratio));
        } else if self.budget.ratio == 0.0 && self.budget.floor == 0 {
            problems.add("budget", "allows no retry: set `ratio` or `floor`, or write `retry: off`");
        }
        if self.backoff.max < self.backoff.base {
            problems.add("backoff.max", format!("must be at least `base` ({})", self.backoff.base));
        }
        let most = ByteSize::from_kib(16 * 1024);
        if self.replay > most {
            problems.add("replay", format!("is {}: must be at most {most}, for each request under way", self.replay));
        }
    }
}

impl Backoff {
    /// How long to wait before the `n`th retry, counted from 1; `random` is from 0 to 1.
    fn wait(&self, n: u32, random: f64) -> Duration {
        let longest = self.base.get().saturating_mul(1 << (n - 1).min(20)).min(self.max.get());
        longest.mul_f64(random.clamp(0.0, 1.0))
    }
}

/// Sends what failed again: see the [module](self). Any body of a request becomes one that can be read again.
#[derive(Debug, Clone)]
pub struct RetryLayer {
    settings: Arc<Settings>,
}

#[derive(Debug)]
struct Settings {
    config: Config,
    budget: Budget,
    metrics: RetryMetrics,
    random: fn() -> f64,
    /// Whether a stream that fails before its first event is among the failures to try again.
    breaks_are_retried: bool,
}

impl RetryLayer {
    /// A layer that retries as `config` says, within `budget`, and counts in `metrics`.
    #[must_use]
    pub fn new(config: &Config, budget: Budget, metrics: RetryMetrics) -> Self {
        Self::with_random(config, budget, metrics, || HasherRng::new().next_f64())
    }

    /// The same, with `random` for the jitter, from 0 to 1.
    #[must_use]
    pub fn with_random(config: &Config, budget: Budget, metrics: RetryMetrics, random: fn() -> f64) -> Self {
        let breaks_are_retried = [Failure::Reset, Failure::Timeout].iter().any(|failure| config.on.contains(failure));
        Self { settings: Arc::new(Settings { config: config.clone(), budget, metrics, random, breaks_are_retried }) }
    }
}

impl<S> Layer<S> for RetryLayer {
    type Service = Retry<S>;

    fn layer(&self, inner: S) -> Retry<S> {
        Retry { inner, settings: self.settings.clone() }
    }
}

/// The service of [`RetryLayer`].
#[derive(Debug, Clone)]
pub struct Retry<S> {
    inner: S,
    settings: Arc<Settings>,
}

impl<S> Service<Request> for Retry<S>
where
    S: CloneService,
{
    type Response = Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut inner = take_ready(&mut self.inner);
        if asks_for_tunnel(&request) {
            return Box::pin(inner.call(request).map_err(Into::into));
        }
        let settings = self.settings.clone();
        Box::pin(async move { settings.run(request, inner).await })
    }
}

impl Settings {
    async fn run<S: CloneService>(&self, request: Request, mut inner: S) -> Result<Response, BoxError> {
        self.budget.request(Instant::now());
        let (mut head, body) = request.into_parts();
        let can_repeat = head.method.is_idempotent();
        // What must not be repeated is sent again only if nothing of it has left: then nothing needs to be kept.
        let limit = if can_repeat { self.config.replay.to_usize() } else { 0 };
        head.extensions.insert(Tried::default());
        let replay = if let Some(outer) = head.extensions.get::<Replay>() {
            // It is the body already.
            drop(body);
            outer.clone()
        } else {
            Replay::new(body, limit)
        };
        // Whoever left it there leaves it whole.
        let lost = || Error::new(Kind::Internal, "the body was lost before the first attempt");
        let mut body = replay.body().ok_or_else(lost)?;
        let mut made: Option<Made<'_>> = None;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let mut request = Request::from_parts(head.clone(), body);
            if attempts < self.config.attempts.into() && self.breaks_are_retried && can_repeat && replay.is_kept() {
                request.extensions_mut().insert(Undecided);
            }
            let result = inner.call(request).await.map_err(Into::into);
            let failure = self.failure(&result);
            if let Some(made) = made.take() {
                made.over(failure.is_none() && result.is_ok());
            }
            let next = failure.and_then(|failure| self.again(&head, &replay, failure, &result, attempts));
            let Some(next) = next else { return result };
            // Cancels what is left of it, before anything else is asked.
            drop(result);
            sleep(next.wait).await;
            if let Some(exchange) = head.extensions.get::<Exchange>() {
                exchange.facts().retries += 1;
            }
            body = next.body;
            made = Some(Made { metrics: &self.metrics, over: false });
        }
    }

    /// The failure that `result` is, if it is one of those to try again.
    fn failure(&self, result: &Result<Response, BoxError>) -> Option<Failure> {
        let failure = Failure::of(result.as_ref().map_err(|error| &**error as _))?;
        self.config.on.contains(&failure).then_some(failure)
    }

    /// The attempt that follows so many; `None` if this was the last.
    fn again(
        &self,
        head: &http::request::Parts,
        replay: &Replay,
        failure: Failure,
        result: &Result<Response, BoxError>,
        attempts: u32,
    ) -> Option<Next> {
        if attempts >= self.config.attempts.into() || !(failure.unsent() || head.method.is_idempotent()) {
            return None;
        }
        let now = Instant::now();
        let wait = self.config.backoff.wait(attempts, (self.random)());
        let asked = retry_after(result);
        let left = head.extensions.get::<message::Deadline>().map(|deadline| deadline.0.saturating_duration_since(now));
        // On top of what was asked for: all who were told the same would come back together.
        let wait = asked.map_or(wait, |asked| asked.saturating_add(wait));
        if asked.is_some_and(|asked| asked > self.config.backoff.max_retry_after.get())
            || left.is_some_and(|left| wait >= left)
        {
            self.metrics.deadline.inc();
            return None;
        }
        let share = Share { ratio: self.config.budget.ratio, floor: self.config.budget.floor };
        if !self.budget.retry(now, share) {
            self.metrics.budget.inc();
            return None;
        }
        // Taken while the failure can still be passed on: an upload that outlives its answer must not use it up.
        let body = replay.body();
        if body.is_none() {
            self.metrics.body.inc();
        }
        Some(Next { wait, body: body? })
    }
}

/// When the upstream wants to be asked again (RFC 9110 §10.2.3), in seconds from now. A date is none that could be near
/// enough to wait for: its seconds are not ours.
fn retry_after(result: &Result<Response, BoxError>) -> Option<Duration> {
    match result {
        Ok(response) => {
            let text = response.headers().get(RETRY_AFTER)?.to_str().ok()?.trim();
            // What is no number of seconds is a date, and a wait of unknown length.
            Some(text.parse().map_or(Duration::MAX, Duration::from_secs))
        }
        Err(error) => Error::find(&**error)?.retry_after(),
    }
}

/// An attempt to come.
struct Next {
    wait: Duration,
    body: Body,
}

/// A retry under way, counted when it is over.
struct Made<'a> {
    metrics: &'a RetryMetrics,
    over: bool,
}

impl Made<'_> {
    fn over(mut self, answered: bool) {
        self.over = true;
        if answered {
            self.metrics.answered.inc()
        } else {
            self.metrics.failed.inc()
        };
    }
}

impl Drop for Made<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.metrics.cancelled.inc();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use futures_util::FutureExt;
    use http::{Method, header::UPGRADE};
    use http_body_util::BodyExt;
    use parking_lot::Mutex;
    use proptest::prelude::*;
    use tokio::time::advance;
    use tower::{ServiceExt, service_fn};

    use super::*;
    use crate::telemetry::Metrics;

    /// What an upstream that is asked in a test does with each request.
    #[derive(Debug, Clone, Copy)]
    enum Act {
        Answer(u16),
        AnswerAndSay(u16, &'static str),
        Fail(Kind),
    }

    /// Sends `request` to an upstream that does this, one thing after the other. What came of it, and when and with
    /// what body the upstream was asked.
    async fn ask(
        config: &Config,
        budget: &Budget,
        request: Request,
        acts: &'static [Act],
    ) -> (Result<Response, Option<Kind>>, Vec<(Duration, Vec<u8>)>) {
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (begun, seen) = (Instant::now(), asked.clone());
        let upstream = service_fn(move |request: Request| {
            let asked = asked.clone();
            async move {
                let n = asked.lock().len();
                let body = match acts[n] {
                    Act::Fail(Kind::ConnectFailed) => b"unread".to_vec(),
                    _ => request.into_body().collect().await.unwrap().to_bytes().to_vec(),
                };
                asked.lock().push((begun.elapsed(), body));
                let answer = |status, after: Option<&str>| {
                    let mut response = http::Response::builder().status(status);
                    if let Some(after) = after {
                        response = response.header(RETRY_AFTER, after);
                    }
                    Ok(response.body(Body::empty()).unwrap())
                };
                match acts[n] {
                    Act::Answer(status) => answer(status, None),
                    Act::AnswerAndSay(status, after) => answer(status, Some(after)),
                    Act::Fail(kind) => Err(BoxError::from(Error::from(kind))),
                }
            }
        });
        let layer = RetryLayer::with_random(config, budget.clone(), Metrics::new().retries("api"), || 1.0);
        let result = layer.layer(upstream).oneshot(request).await;
        let result = result.map_err(|error| Error::find(&*error).map(Error::kind));
        let seen = seen.lock().clone();
        (result, seen)
    }

    fn request(method: Method, body: &'static str) -> Request {
        http::Request::builder().method(method).body(Body::from(body)).unwrap()
    }

    async fn times(method: Method, acts: &'static [Act]) -> (Option<u16>, usize) {
        let config = Config { attempts: 3, ..Config::default() };
        let (result, asked) = ask(&config, &Budget::default(), request(method, "body"), acts).await;
        assert!(asked.iter().all(|(_, body)| body == b"body" || body == b"unread"), "whole, each time");
        (result.ok().map(|response| response.status().as_u16()), asked.len())
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_idempotent_is_sent_again() {
        use Act::{Answer, Fail};
        for failure in [Answer(502), Answer(503), Answer(504), Fail(Kind::UpstreamReset), Fail(Kind::ConnectFailed)] {
            let acts: &'static [Act] = Box::leak(Box::new([failure, Answer(200)]));
            assert_eq!(times(Method::GET, acts).await, (Some(200), 2), "{failure:?}");
            assert_eq!(times(Method::PUT, acts).await, (Some(200), 2), "{failure:?}");
        }
        assert_eq!(times(Method::GET, &[Answer(503), Answer(503), Answer(503)]).await, (Some(503), 3));
        for success in [Answer(200), Answer(404), Answer(429), Answer(500)] {
            let acts: &'static [Act] = Box::leak(Box::new([success]));
            assert_eq!(times(Method::GET, acts).await.1, 1, "{success:?}");
        }
        let passed_on =
            [Kind::UpstreamTimeout, Kind::CircuitOpen, Kind::NoHealthyEndpoint, Kind::Overloaded, Kind::ClientReset];
        for kind in passed_on {
            let acts: &'static [Act] = Box::leak(Box::new([Fail(kind)]));
            assert_eq!(times(Method::GET, acts).await, (None, 1), "{kind:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_idempotent_is_sent_again_only_if_it_was_not_sent() {
        use Act::{Answer, Fail};
        assert_eq!(times(Method::POST, &[Fail(Kind::ConnectFailed), Answer(200)]).await, (Some(200), 2));
        assert_eq!(times(Method::POST, &[Answer(503)]).await, (Some(503), 1));
        assert_eq!(times(Method::POST, &[Fail(Kind::UpstreamReset)]).await, (None, 1));
        assert_eq!(times(Method::PATCH, &[Fail(Kind::UpstreamReset)]).await, (None, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn an_upgrade_is_not_sent_again() {
        let mut upgrade = request(Method::GET, "");
        upgrade.headers_mut().insert(UPGRADE, http::HeaderValue::from_static("websocket"));
        let (_, asked) = ask(&Config::default(), &Budget::default(), upgrade, &[Act::Fail(Kind::ConnectFailed)]).await;
        assert_eq!(asked.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn the_wait_doubles_up_to_its_most() {
        let config = Config { attempts: 7, ..Config::default() };
        let (_, asked) = ask(&config, &wide(), request(Method::GET, ""), &[Act::Answer(503); 7]).await;
        let waits: Vec<_> = asked.windows(2).map(|two| two[1].0.abs_diff(two[0].0).as_millis()).collect();
        assert_eq!(waits, [25, 50, 100, 200, 250, 250]);
    }

    /// A budget in which there is room.
    fn wide() -> Budget {
        let budget = Budget::default();
        (0..100).for_each(|_| budget.request(Instant::now()));
        budget
    }

    #[tokio::test(start_paused = true)]
    async fn a_retry_after_is_waited_for_if_it_is_short() {
        use Act::{Answer, AnswerAndSay};
        let config = Config::default();
        let get = || request(Method::GET, "");
        let (result, asked) = ask(&config, &wide(), get(), &[AnswerAndSay(503, "1"), Answer(200)]).await;
        assert_eq!((result.unwrap().status().as_u16(), asked[1].0.as_secs()), (200, 1));
        for long in [&[AnswerAndSay(503, "2")], &[AnswerAndSay(503, "Fri, 31 Dec 2100 23:59:59 GMT")]] {
            let (result, asked) = ask(&config, &wide(), get(), long).await;
            assert_eq!((result.unwrap().status().as_u16(), asked.len()), (503, 1), "it is passed on");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn nothing_is_begun_that_the_deadline_leaves_no_time() {
        use Act::{Answer, AnswerAndSay};
        let config = Config::default();
        let within = |millis| {
            let mut request = request(Method::GET, "");
            let deadline = Instant::now() + Duration::from_millis(millis);
            request.extensions_mut().insert(message::Deadline(deadline));
            request
        };
        assert_eq!(ask(&config, &wide(), within(25), &[Answer(503), Answer(200)]).await.1.len(), 1);
        assert_eq!(ask(&config, &wide(), within(26), &[Answer(503), Answer(200)]).await.1.len(), 2);
        let (result, asked) = ask(&config, &wide(), within(900), &[AnswerAndSay(503, "1")]).await;
        assert_eq!((result.unwrap().status().as_u16(), asked.len()), (503, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn without_a_budget_the_failure_is_passed_on() {
        let config = Config::default();
        let budget = Budget::default();
        let mut again = 0;
        for _ in 0..100 {
            let (result, asked) = ask(&config, &budget, request(Method::GET, ""), &[Act::Answer(503); 2]).await;
            assert_eq!(result.unwrap().status().as_u16(), 503);
            again += asked.len() - 1;
        }
        assert!((19..=20).contains(&again), "{again}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_was_not_kept_is_sent_once() {
        let config = Config { replay: ByteSize::from_bytes(3), ..Config::default() };
        let (result, asked) = ask(&config, &wide(), request(Method::PUT, "body"), &[Act::Answer(503)]).await;
        assert_eq!((result.unwrap().status().as_u16(), asked.len()), (503, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_leaves_takes_its_retries_with_it() {
        let metrics = Metrics::new().retries("api");
        let asked = Arc::new(Mutex::new(0));
        let seen = asked.clone();
        let upstream = service_fn(move |_: Request| {
            *asked.lock() += 1;
            let first = *asked.lock() == 1;
            async move { if first { Err(BoxError::from(Error::from(Kind::ConnectFailed))) } else { pending().await } }
        });
        let layer = RetryLayer::with_random(&Config::default(), wide(), metrics.clone(), || 1.0);
        let mut hanging = Box::pin(layer.layer(upstream).oneshot(request(Method::GET, "")));
        assert!(hanging.as_mut().now_or_never().is_none());
        advance(Duration::from_millis(30)).await;
        assert!(hanging.as_mut().now_or_never().is_none());
        assert_eq!((*seen.lock(), metrics.cancelled.get()), (2, 0));
        drop(hanging);
        assert_eq!(metrics.cancelled.get(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn all_attempts_share_what_was_tried() {
        let upstream = service_fn(|request: Request| async move {
            let tried = request.extensions().get::<Tried>().unwrap();
            let status = if tried.contains("one") { 200 } else { 503 };
            tried.add(&"one".into());
            Ok::<_, BoxError>(http::Response::builder().status(status).body(Body::empty()).unwrap())
        });
        let layer = RetryLayer::new(&Config::default(), Budget::default(), Metrics::new().retries("api"));
        assert_eq!(layer.layer(upstream).oneshot(request(Method::GET, "")).await.unwrap().status(), 200);
    }

    #[tokio::test(start_paused = true)]
    async fn every_attempt_but_the_last_is_undecided() {
        async fn marks(config: &Config, request: Request) -> Vec<bool> {
            let marks = Arc::new(Mutex::new(Vec::new()));
            let seen = marks.clone();
            let upstream = service_fn(move |request: Request| {
                seen.lock().push(request.extensions().get::<Undecided>().is_some());
                async { Err::<Response, _>(BoxError::from(Error::from(Kind::ConnectFailed))) }
            });
            let layer = RetryLayer::new(config, Budget::default(), Metrics::new().retries("api"));
            layer.layer(upstream).oneshot(request).await.unwrap_err();
            let marks = marks.lock();
            marks.clone()
        }
        let config = Config { attempts: 3, ..Config::default() };
        assert_eq!(marks(&config, request(Method::GET, "")).await, [true, true, false]);
        assert_eq!(marks(&config, request(Method::POST, "")).await, [false; 3], "it would not be sent again");
        let mut outer = request(Method::POST, "");
        outer.extensions_mut().insert(Undecided);
        assert_eq!(marks(&config, outer).await, [true; 3], "a fallback stands outside");
        let small = Config { replay: ByteSize::from_bytes(3), ..config.clone() };
        assert_eq!(marks(&small, request(Method::PUT, "body")).await, [false; 3], "it is not kept");
        let connect = Config { on: vec![Failure::Connect], ..config };
        assert_eq!(marks(&connect, request(Method::GET, "")).await, [false; 3], "what broke is not among them");
    }

    proptest! {
        #[test]
        fn a_wait_is_within_its_bounds(n in 1..100_u32, random in 0.0..1.0_f64, base in 0..2000_u64, more in 0..2000_u64) {
            let (base, max) = (HumanDuration::from_millis(base), HumanDuration::from_millis(base + more));
            let wait = Backoff { base, max, ..Backoff::default() }.wait(n, random);
            prop_assert!(wait <= max.get());
            prop_assert!(n > 1 || wait <= base.get());
        }
    }
}
