//! Rate limits: how much each may use of a route, exactly, over all replicas.
//!
//! A list of rules holds for a request. It passes only if all have room, and one that is refused has used nothing of
//! any: all counters are asked in one step, in Redis by one script with Redis's clock ([`counters`]), by the same
//! arithmetic in memory where there is none ([`window`]). Who is refused gets 429 with `Retry-After`, which holds true:
//! who waits that long and is alone with its counter passes. For what is in flight it is 1, as nobody knows when that
//! ends. [`headers`] has what all answers say; problem documents name the rules that had no room in `violated-policies`.
//!
//! What a request uses is 1, or something that is known only at its end: bytes, and the tokens of a language model. Then
//! an estimate is taken before, and what it was in truth is settled behind the response, which waits for nothing. Many
//! at once overshoot a limit of tokens only by what they were underestimated by. Of bytes, what a request announces is
//! taken before, and its response is charged when it is over: those at once may overshoot by all of their responses, and
//! a rule with `cost: in_flight` beside it bounds how many they are.
//!
//! `in_flight` is given back however the request ends; where a replica dies with it, its leases end 20 s later.
//!
//! While Redis is out of order, each replica limits by itself, to its share (`on_store_failure: local`), or everybody
//! (`allow`) or nobody (`deny`) passes. Going back is as sudden: what was counted locally is not carried over.
//!
//! Of what clients send, only addresses and ids of principals stand in the names of counters; anything else stands there
//! as a digest.
//!
//! ```
//! use sidegate::{
//!     layers::rate_limit::{Config, RateLimitLayer, State},
//!     message::{Body, BoxError, Error, Kind, Request, Response},
//!     telemetry::Metrics,
//! };
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let rules = r#"[{"name": "once", "key": "header:x-tenant", "limit": "1/h"}]"#;
//! let config: Config = serde_json::from_str(rules).unwrap();
//! let service = ServiceBuilder::new()
//!     .layer(RateLimitLayer::new(&config, "chat", &State::default(), None, &Metrics::new()))
//!     .service(service_fn(|_: Request| async { Ok::<_, BoxError>(Response::default()) }));
//! let of = |tenant: &str| http::Request::get("/").header("x-tenant", tenant).body(Body::empty()).unwrap();
//! let first = service.clone().oneshot(of("a")).await.unwrap();
//! assert!(first.headers()["ratelimit"].to_str().unwrap().starts_with("\"once\";r=0;"));
//! let error = service.clone().oneshot(of("a")).await.unwrap_err();
//! assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::RateLimited));
//! assert!(service.oneshot(of("b")).await.is_ok());
//! # });
//! ```

pub mod counters;
pub mod headers;
mod key;
mod rule;
mod tokens;
pub mod window;

use std::{
    any::Any,
    fmt,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderName, HeaderValue, request::Parts};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

pub use self::counters::State;
pub use self::rule::{Algorithm, Amount, Config, Cost, Exempt, KeyPart, Limit, OnStoreFailure, Rule};
use self::{
    counters::{Asked, Counters, Taken},
    headers::Styles,
    tokens::{Estimate, Reading},
    window::{Demand, Quota, Verdict, amount},
};
use crate::{
    message::{Body, BoxError, CloneService, Error, Kind, Principal, Request, Response, path::is_plain, take_ready},
    sse::{Frames, Usage},
    store::{Failure, Key, Redis},
    telemetry::{
        Exchange, Metrics,
        exchange::{CacheOutcome, client_ip},
        metrics::{RateLimitMetrics, RuleMetrics},
    },
};

/// When to ask again where nobody knows when there is room: something in flight may end at any time.
const SOON: Duration = Duration::from_secs(1);

/// A rule, ready to be asked.
#[derive(Debug)]
pub struct Compiled {
    name: Arc<str>,
    key: Vec<KeyPart>,
    quota: Quota,
    limit: u64,
    /// Tokens of output, where a request does not say.
    reserve: u64,
    cost: Cost,
    exempt: Exempt,
    shadow: bool,
    /// The names of its counters begin so.
    base: Key,
    policy: String,
    metrics: RuleMetrics,
}

impl Compiled {
    fn new(rule: &Rule, route: &str, scope: &str, redis: Option<&Redis>, metrics: &Metrics) -> Self {
        let quota = rule.quota();
        // What is counted in another way is another counter.
        let way = match quota.algorithm {
            window::Algorithm::SlidingWindow => "window",
            window::Algorithm::TokenBucket => "bucket",
            window::Algorithm::InFlight => "now",
        };
        let rest = format!("{}:{}-{way}-{}:", rule.name, rule.cost.as_str(), window::whole(quota.per) / 1000);
        Self {
            name: rule.name.as_str().into(),
            key: rule.key.iter().cloned().collect(),
            quota,
            limit: rule.limit.amount.count,
            reserve: rule.reserve.unwrap_or(1000).into(),
            cost: rule.cost,
            exempt: rule.exempt.clone(),
            shadow: rule.shadow,
            base: match redis {
                Some(redis) => redis.key("limit", scope, &rest),
                None => Key::new("", "limit", scope, &rest),
            },
            policy: headers::policy(
                &rule.name,
                rule.cost,
                rule.limit.amount.count,
                rule.limit.per.map(crate::config::HumanDuration::get),
            ),
            metrics: metrics.rule(route, &rule.name),
        }
    }

    /// The name of the rule.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is counted apart.
    #[must_use]
    pub fn key(&self) -> &[KeyPart] {
        &self.key
    }

    /// The limit, as `RateLimit-Policy` has it.
    #[must_use]
    pub fn policy(&self) -> &str {
        &self.policy
    }

    fn spares(&self, head: &Parts) -> bool {
        let Exempt { tiers, ips, paths } = &self.exempt;
        let tier = || head.extensions.get::<Principal>()?.tier.clone();
        let path = head.uri.path().as_bytes();
        !tiers.is_empty() && tier().is_some_and(|tier| tiers.iter().any(|known| **known == *tier))
            || !ips.is_empty() && client_ip(&head.extensions).is_some_and(|ip| ips.contains(ip))
            || !paths.is_empty()
                && is_plain(path)
                && paths.iter().any(|pattern| pattern.matches(path, crate::message::path::Form::Raw))
    }

    fn counter(&self, route: &str, head: &Parts) -> Key {
        self.named(|part, out| {
            key::write(part, route, head, out);
            true
        })
        .unwrap_or_else(|| self.base.clone())
    }

    fn named(&self, mut write: impl FnMut(&KeyPart, &mut String) -> bool) -> Option<Key> {
        let mut text = String::with_capacity(48);
        for (n, part) in self.key.iter().enumerate() {
            if n > 0 {
                text.push('|');
            }
            if !write(part, &mut text) {
                return None;
            }
        }
        Some(self.base.with(text))
    }
}

/// The limits of one route.
#[derive(Debug)]
pub struct Gate {
    route: Box<str>,
    rules: Vec<Compiled>,
    counters: Counters,
    on_store_failure: OnStoreFailure,
    styles: Styles,
    metrics: RateLimitMetrics,
}

/// What a counter says to an operator.
#[derive(Debug, Clone, Copy)]
pub struct Figures {
    /// In Redis; none where there is none, or it did not answer.
    pub shared: Option<Verdict>,
    /// In memory.
    pub local: Verdict,
}

impl Gate {
    /// The route.
    #[must_use]
    pub fn route(&self) -> &str {
        &self.route
    }

    /// How many replicas count with this one in Redis.
    #[must_use]
    pub fn replicas(&self) -> u32 {
        self.counters.replicas()
    }

    /// The rules.
    #[must_use]
    pub fn rules(&self) -> &[Compiled] {
        &self.rules
    }

    /// What the counter of a rule says for `values`, one for each part of its key that has one (all but `global` and
    /// `route`). None where there is no such rule, or the values are not as many or not what they should be.
    pub async fn look(&self, rule: &str, values: &[String]) -> Option<Figures> {
        let (rule, key) = self.find(rule, values)?;
        let (shared, local) = self.counters.look(&key, rule.quota).await;
        Some(Figures { shared, local })
    }

    /// Forgets what was counted for `values`. None where [`look`](Self::look) has none.
    ///
    /// # Errors
    /// What kept Redis from it. In this replica's memory it is forgotten all the same.
    pub async fn reset(&self, rule: &str, values: &[String]) -> Option<Result<(), Failure>> {
        let (_, key) = self.find(rule, values)?;
        Some(self.counters.reset(&key).await)
    }

    fn find(&self, rule: &str, values: &[String]) -> Option<(&Compiled, Key)> {
        let rule = self.rules.iter().find(|known| known.name() == rule)?;
        let mut values = values.iter();
        let key = rule.named(|part, out| {
            let text = match part {
                KeyPart::Global | KeyPart::Route => Some(""),
                _ => values.next().map(String::as_str),
            };
            text.is_some_and(|text| key::write_named(part, &self.route, text, out))
        })?;
        values.next().is_none().then_some((rule, key))
    }

    async fn pass(&self, head: &mut Parts, body: Body) -> Result<(Passed, Body), BoxError> {
        let rules: Vec<&Compiled> = self.rules.iter().filter(|rule| !rule.spares(head)).collect();
        if rules.is_empty() {
            return Ok((Passed::default(), body));
        }
        let announced = body.size_hint().lower();
        let cost = |rule: &Compiled, estimate: Option<Estimate>| {
            let cost = match (rule.cost, estimate) {
                (Cost::One | Cost::InFlight, _) => 1,
                (Cost::Bytes, _) => announced,
                (Cost::Tokens, Some(Estimate { input, output, .. })) => {
                    input.saturating_add(output.unwrap_or(rule.reserve)).max(1)
                }
                // Not known before the body was read.
                (Cost::Tokens, None) => 0,
            };
            amount(cost).min(rule.quota.most())
        };
        let demand = |rule: &&Compiled| Asked {
            key: rule.counter(&self.route, head),
            demand: Demand { quota: rule.quota, cost: cost(rule, None), shadow: rule.shadow },
            settles: rule.cost != Cost::One,
        };
        let mut asked: Vec<Asked> = rules.iter().map(demand).collect();
        let mut remembered = self.counters.refused(&asked);
        let (mut estimate, mut body) = (None, body);
        if remembered.is_none() && rules.iter().any(|rule| rule.cost == Cost::Tokens) {
            let (read, again) = tokens::read(head, body).await?;
            (estimate, body) = (Some(read), again);
            for (asked, rule) in asked.iter_mut().zip(&rules) {
                asked.demand.cost = cost(rule, estimate);
            }
            remembered = self.counters.refused(&asked);
        }
        if let Some(known) = remembered {
            self.metrics.remembered.inc();
            // What is left of the others would have to be asked.
            let known = rules.iter().zip(known).filter_map(|(rule, verdict)| Some((*rule, verdict?)));
            let (rules, verdicts): (Vec<_>, Vec<_>) = known.unzip();
            return Err(self.refuse(head, &rules, &verdicts).into());
        }
        let exchange = head.extensions.get::<Exchange>();
        let answer = if exchange.is_some_and(|exchange| exchange.facts().store_unanswered) {
            Err(Failure::Unavailable)
        } else {
            self.counters.take(&asked).await
        };
        let answer = match answer {
            Ok(answer) => answer,
            Err(failure) => {
                self.metrics.store_failure.inc();
                if let Some(exchange) = exchange {
                    exchange.facts().store_unanswered |= failure == Failure::Timeout;
                }
                match self.on_store_failure {
                    OnStoreFailure::Local => self.counters.take_locally(&asked, self.counters.replicas()),
                    OnStoreFailure::Allow => {
                        let reading = estimate.map(Reading::new);
                        return Ok((Passed { reading, ..Passed::default() }, body));
                    }
                    OnStoreFailure::Deny => {
                        let error = Error::new(Kind::RateLimitUnavailable, failure);
                        return Err(error.with_retry_after(SOON).into());
                    }
                }
            }
        };
        if !answer.decision.passes {
            return Err(self.refuse(head, &rules, &answer.decision.verdicts).into());
        }
        for (rule, verdict) in rules.iter().zip(&answer.decision.verdicts) {
            if verdict.fits {
                rule.metrics.passed.inc();
                continue;
            }
            rule.metrics.shadow_limited.inc();
            if let Some(exchange) = head.extensions.get::<Exchange>() {
                exchange.facts().rate_limit_shadow.get_or_insert_with(|| rule.name.clone());
            }
        }
        let mut taken = Vec::new();
        for (n, rule) in rules.iter().enumerate().filter(|(_, rule)| rule.cost != Cost::One) {
            taken.extend(answer.taken(&asked, n).map(|taken| (taken, rule.cost)));
        }
        let fields = self.fields(&rules, &answer.decision.verdicts);
        Ok((Passed { fields, taken, reading: estimate.map(Reading::new) }, body))
    }

    fn refuse(&self, head: &Parts, rules: &[&Compiled], verdicts: &[Verdict]) -> Error {
        let full = || rules.iter().zip(verdicts).filter(|(rule, verdict)| !verdict.fits && !rule.shadow);
        let mut violated = Vec::new();
        for (rule, _) in full() {
            rule.metrics.limited.inc();
            violated.push(&*rule.name);
        }
        // The one that lasts longest.
        let last = full().max_by_key(|(_, verdict)| verdict.wait);
        if let (Some(exchange), Some((rule, _))) = (head.extensions.get::<Exchange>(), last) {
            exchange.facts().rate_limited = Some(rule.name.clone());
        }
        let wait = last.and_then(|(_, verdict)| verdict.wait).unwrap_or(SOON);
        let error = Error::from(Kind::RateLimited).with_retry_after(wait).with_member("violated-policies", violated);
        self.fields(rules, verdicts).into_iter().fold(error, |error, (name, value)| error.with_field(name, value))
    }

    fn fields(&self, rules: &[&Compiled], verdicts: &[Verdict]) -> Vec<(HeaderName, HeaderValue)> {
        let told = rules.iter().zip(verdicts).filter(|(rule, _)| !rule.shadow);
        headers::fields(&told.map(|(rule, verdict)| (*rule, *verdict)).collect::<Vec<_>>(), self.styles)
    }
}

/// What a request that passed goes on with.
#[derive(Default)]
struct Passed {
    fields: Vec<(HeaderName, HeaderValue)>,
    taken: Vec<(Taken, Cost)>,
    reading: Option<Reading>,
}

/// Limits how much each may use: see the [module](self).
#[derive(Debug, Clone)]
pub struct RateLimitLayer {
    gate: Arc<Gate>,
}

impl RateLimitLayer {
    /// The limits of the route of this name. With a Redis it needs a tokio runtime.
    #[must_use]
    pub fn new(config: &Config, route: &str, state: &State, redis: Option<&Redis>, metrics: &Metrics) -> Self {
        let scope = config.scope.as_ref().map_or_else(|| format!("route={route}"), |scope| format!("scope={scope}"));
        let gate = Gate {
            route: route.into(),
            rules: config.rules.iter().map(|rule| Compiled::new(rule, route, &scope, redis, metrics)).collect(),
            counters: state.counters(redis),
            on_store_failure: config.on_store_failure,
            styles: Styles { legacy: config.legacy_headers, openai: config.openai_headers },
            metrics: metrics.rate_limit(route),
        };
        Self { gate: Arc::new(gate) }
    }

    /// The limits themselves.
    #[must_use]
    pub fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }
}

impl<S> Layer<S> for RateLimitLayer {
    type Service = RateLimit<S>;

    fn layer(&self, inner: S) -> RateLimit<S> {
        RateLimit { inner, gate: self.gate.clone() }
    }
}

/// The service of [`RateLimitLayer`].
///
/// # Errors
/// [`Kind::RateLimited`], [`Kind::RateLimitUnavailable`].
#[derive(Debug, Clone)]
pub struct RateLimit<S> {
    inner: S,
    gate: Arc<Gate>,
}

impl<S> Service<Request> for RateLimit<S>
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
        let gate = self.gate.clone();
        Box::pin(async move {
            let (mut head, body) = request.into_parts();
            let (Passed { fields, taken, reading }, body) = gate.pass(&mut head, body).await?;
            let mut owed = (!taken.is_empty() || reading.is_some()).then(|| Owed {
                gate: gate.clone(),
                taken,
                reading,
                exchange: head.extensions.get().cloned(),
                sent: 0,
                announced: body.size_hint().lower(),
            });
            match inner.call(Request::from_parts(head, body)).await.map_err(Into::into) {
                Ok(mut response) => {
                    headers::write(fields, response.headers_mut());
                    Ok(match owed {
                        Some(owed) => owed.until_end_of(response),
                        None => response,
                    })
                }
                Err(error) => {
                    owed.iter_mut().filter_map(|owed| owed.reading.as_mut()).for_each(Reading::fail);
                    let told = |error: Error, (name, value)| error.with_field(name, value);
                    Err(fields.into_iter().fold(Error::of(error), told).into())
                }
            }
        })
    }
}

/// What a request has taken and is settled when it is over: when this is dropped.
struct Owed {
    gate: Arc<Gate>,
    taken: Vec<(Taken, Cost)>,
    /// Where tokens are counted.
    reading: Option<Reading>,
    exchange: Option<Exchange>,
    /// Bytes of the response's body that went by.
    sent: u64,
    /// What the request's body was said to be, where nobody counts it.
    announced: u64,
}

impl Owed {
    fn until_end_of(mut self, mut response: Response) -> Response {
        if let Some(reading) = &mut self.reading {
            reading.begin(&mut response);
        }
        if let Some(exchange) = self.exchange.clone() {
            let mut facts = exchange.facts();
            if let Some(tunnel) = facts.tunnel.take() {
                let both: (Self, Box<dyn Any + Send>) = (self, tunnel);
                facts.tunnel = Some(Box::new(both));
                return response;
            }
        }
        if response.body().is_end_stream() {
            self.end(true);
            return response;
        }
        response.map(|body| Body::new(ResponseBody { body, owed: Some(self), ready: None, after: None }))
    }

    /// The response is over, and whole or not. What of it is still held back.
    fn end(&mut self, whole: bool) -> Option<Bytes> {
        self.reading.as_mut().and_then(|reading| reading.end(whole))
    }

    fn bytes(&self) -> u64 {
        match &self.exchange {
            Some(exchange) => {
                exchange.received().load(Ordering::Relaxed) + exchange.sent().load(Ordering::Relaxed).max(self.sent)
            }
            None => self.announced + self.sent,
        }
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        let mut usage = self.reading.as_ref().map(Reading::usage);
        let cache = self.exchange.as_ref().and_then(|exchange| exchange.facts().cache);
        // Nobody made for this request what it got.
        if cache.is_some_and(CacheOutcome::spares_upstream) {
            self.gate.metrics.tokens_saved.inc_by(usage.take().map_or(0, Usage::total));
        }
        if let Some(usage) = usage {
            self.gate.metrics.tokens_in.inc_by(usage.input);
            self.gate.metrics.tokens_out.inc_by(usage.output);
            if let Some(exchange) = &self.exchange {
                exchange.facts().tokens = Some((usage.input, usage.output));
            }
        }
        let bytes = self.bytes();
        for (taken, cost) in self.taken.drain(..) {
            let used = match cost {
                Cost::Bytes => bytes,
                Cost::Tokens => usage.map_or(0, Usage::total),
                Cost::InFlight => 0,
                Cost::One => 1,
            };
            self.gate.counters.settle(taken, amount(used));
        }
    }
}

pin_project! {
    /// A response's body, at whose end is settled what its request has taken.
    struct ResponseBody {
        body: Body,
        // None where it is over.
        owed: Option<Owed>,
        // What may pass of the last frame.
        ready: Option<Frames>,
        // What comes after what was held back: trailers, or an error.
        after: Option<Result<Frame<Bytes>, BoxError>>,
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.project();
        loop {
            if let Some(data) = this.ready.as_mut().and_then(Iterator::next) {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
            *this.ready = None;
            let Some(owed) = this.owed.as_mut() else { return Poll::Ready(this.after.take()) };
            let frame = match ready!(Pin::new(&mut *this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                end @ (None | Some(Err(_))) => {
                    let held = owed.end(end.is_none());
                    (*this.owed, *this.after) = (None, end);
                    *this.ready = held.map(|held| [Some(held), None, None].into_iter().flatten());
                    continue;
                }
            };
            let Some(data) = frame.data_ref() else {
                // Behind trailers there is nothing.
                let held = owed.end(true);
                (*this.owed, *this.after) = (None, Some(Ok(frame)));
                *this.ready = held.map(|held| [Some(held), None, None].into_iter().flatten());
                continue;
            };
            owed.sent += data.len() as u64;
            match owed.reading.as_mut().and_then(|reading| reading.pass(data)) {
                None => return Poll::Ready(Some(Ok(frame))),
                frames => *this.ready = frames,
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ready.is_none() && self.after.is_none() && !self.filters() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.filters() { SizeHint::default() } else { self.body.size_hint() }
    }
}

impl ResponseBody {
    fn filters(&self) -> bool {
        self.owed.as_ref().and_then(|owed| owed.reading.as_ref()).is_some_and(Reading::filters)
    }
}

impl fmt::Debug for Owed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Owed").finish_non_exhaustive()
    }
}
