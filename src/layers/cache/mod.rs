//! Cache: row 12 of the request path. Answers that are kept and given again, and questions that are asked once.
//!
//! For `GET` and `HEAD` it is a shared cache as RFC 9111 has it. Answers to `POST` are kept where a route says so, under a
//! hash of what their JSON says: see [`Config`]. Whoever asks what is being asked already waits for that answer and reads
//! along: see `recording`. So a hundred clients with one question cost the upstream one request, streams included.
//!
//! - **Whose answer it is.** The key of an answer is a hash of the route, the method, the host, the path, the query, what
//!   `key` lists, what the answer names in `Vary`, and of who asks: the principal, or the credentials that a request
//!   has. Who shows some gets answers of their own, unless `shared` says that they are the same for all.
//! - **What is kept.** What RFC 9111 §3 allows, or `ttl` says, and never anything broken off, partial, with `Set-Cookie`,
//!   or from an upstream that stepped in for the route's own. A stream is kept if it came to its end.
//! - **What is stale** is validated, by `ETag` or `Last-Modified` where it has them; given while it is asked for anew
//!   (`stale_while_revalidate`), and where the upstream fails (`stale_if_error`).
//! - **What is dropped.** A request of an unsafe method that succeeds drops what its path has (§4.4), and the tags of
//!   `invalidate`. The operator drops by path, tag, pattern, or everything. What is on its way then is not kept.
//! - **What cannot be kept** is remembered for two minutes: nobody waits for it.
//! - **All replicas** find each other's answers in Redis, where there is one. It is asked once for all who want an answer
//!   that this replica does not have, before the upstream is, and for no longer than its deadline. What one replica drops is
//!   dropped by all. A replica that does not hear the others (it looks every second) uses what it has for one more second,
//!   and then only after a look at what they dropped; without any Redis it goes on alone. What is dropped meanwhile is
//!   dropped by the others when Redis is back, as long as this process lives; and what Redis itself forgets of it, in a
//!   failover, or because it makes room (`maxmemory-policy` other than `noeviction`), comes back until it is stale.
//!   A user of an ACL needs the channels `&PREFIX:*`.
//! - **What is taken up again.** With `resume`, a client that lost a stream gets the rest of it, if it is the one who asked:
//!   see `resume`.
//!
//! `Cache-Status` (RFC 9211) on each answer says where it came from, `Age` how old it is.
//!
//! ```
//! use http::{Request, Response};
//! use http_body_util::BodyExt;
//! use sidegate::{
//!     layers::cache::{CacheLayer, Config, State},
//!     message::{Body, BoxError},
//!     telemetry::Metrics,
//! };
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(CacheLayer::new(&Config::default(), "pages", "api", &State::default(), None, &Metrics::new()))
//!     .service(service_fn(|_: Request<Body>| async {
//!         let answer = Response::builder().header("cache-control", "max-age=60").body(Body::from("news"));
//!         Ok::<_, BoxError>(answer.unwrap())
//!     }));
//! for status in ["sidegate; fwd=uri-miss; fwd-status=200; ttl=", "sidegate; hit; ttl="] {
//!     let answer = service.clone().oneshot(Request::get("/").body(Body::empty()).unwrap()).await.unwrap();
//!     assert!(answer.headers()["cache-status"].to_str().unwrap().starts_with(status));
//!     assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "news");
//! }
//! # });
//! ```

pub mod canonical;
mod config;
mod directives;
mod encoding;
mod fill;
mod freshness;
mod hub;
mod kept;
pub mod key;
mod marks;
mod purge;
mod range;
mod recording;
mod resume;
mod shared;
mod status;
mod stored;
pub mod tags;
mod validate;
mod vary;
mod warm;

use std::{
    collections::HashMap,
    fmt, mem,
    pin::Pin,
    sync::{Arc, LazyLock, Weak},
    task::{Context, Poll},
    time::{Duration, SystemTime},
};

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, future::BoxFuture};
use http::{
    HeaderName, Uri,
    header::{
        CONTENT_ENCODING, CONTENT_LOCATION, CONTENT_TYPE, EXPECT, HOST, IF_MATCH, IF_NONE_MATCH, IF_UNMODIFIED_SINCE,
        LOCATION, RANGE, SET_COOKIE,
    },
    request::Parts,
    uri::{Authority, Scheme},
};
use http_body::{Body as HttpBody, Frame};
use parking_lot::Mutex;
use ring::digest::SHA256;
use tokio::{task::JoinSet, time::timeout};
use tower::{Layer, Service};

pub use self::{
    config::{Config, InRedis, Method, Replay},
    purge::Target,
    warm::Warmed,
};
use self::{
    directives::Request as Directives,
    fill::{Failure, Job, Outcome, Terms},
    freshness::{Rules, Verdict},
    hub::{Known, Purger},
    kept::{Asking, Entry, Kept},
    key::{Asks, Key, Keys},
    purge::{Names, Standing},
    recording::Recording,
    resume::{Id, LAST_EVENT_ID, Last, Resume, Stream, Streams, Whose},
    shared::{Holds, Shared, Sought},
    status::{CacheStatus, Forward, Source},
    stored::{Basis, Pace, Stored},
};
use crate::{
    config::{HumanDuration, Toggle},
    message::{
        Body, BoxError, Error, Kind, Principal, Request, Response, Session, asks_for_tunnel, headers::CREDENTIALS,
        json, path::Parameters,
    },
    store::Redis,
    telemetry::{Exchange, Metrics, exchange::CacheOutcome, metrics::CacheMetrics},
};

/// How often a request may find out that the answer it waited for is another's, before it goes on by itself.
const ROUNDS: usize = 3;

/// The fields by which a backend may know who asks: credentials, and what proxies before us say of who that is.
static IDENTITIES: LazyLock<Vec<HeaderName>> = LazyLock::new(|| {
    let more = [
        "x-auth-token",
        "x-access-token",
        "x-session-token",
        "x-session-id",
        "mcp-session-id",
        "x-amz-security-token",
        "x-amzn-oidc-accesstoken",
        "x-amzn-oidc-data",
        "x-amzn-oidc-identity",
        "cf-access-jwt-assertion",
        "x-goog-iap-jwt-assertion",
        "x-ms-client-principal",
        "x-forwarded-user",
        "x-forwarded-email",
        "x-remote-user",
        "remote-user",
        "x-user-id",
    ];
    CREDENTIALS.into_iter().chain(more.map(HeaderName::from_static)).collect()
});

/// Fields by which some backends take a request for another one than it says it is.
const OVERRIDES: [&str; 5] =
    ["x-http-method-override", "x-http-method", "x-method-override", "x-original-url", "x-rewrite-url"];

/// There is no stored answer, and only such a one was asked for.
const NOT_CACHED: Kind = Kind::Custom {
    slug: "not-cached",
    status: http::StatusCode::GATEWAY_TIMEOUT,
    detail: "The request asks for a stored answer only, and there is none.",
};

/// All caches of the process. They outlive a configuration.
#[derive(Default)]
pub struct State {
    purger: Arc<Purger>,
    /// The streams that can be taken up again, by route. They live as long as a layer has them.
    streams: Mutex<HashMap<String, Weak<Streams>>>,
    /// What goes on behind the requests: answers asked for anew, or read to their ends. Ends with the process.
    tasks: Arc<Mutex<JoinSet<()>>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").finish_non_exhaustive()
    }
}

impl State {
    /// Drops what `target` names, on all routes; `soft`: makes it stale. What is on its way is not kept.
    ///
    /// It does not wait. On this replica it holds at once; on the others, and for what is in Redis, as soon as Redis has
    /// heard of it: within milliseconds, or when it is back.
    pub fn purge(&self, target: &Target, soft: bool) {
        self.purger.purge(target, soft);
        if let (Target::All, false) = (target, soft) {
            let streams: Vec<_> = self.streams.lock().values().filter_map(Weak::upgrade).collect();
            for streams in streams {
                streams.shrink(0);
            }
        }
    }

    /// Waits until Redis has heard of all that was purged and stored, for as long as `patience`. For the end of the
    /// process.
    pub async fn finish(&self, patience: Duration) {
        self.purger.finish(patience).await;
    }

    /// What the caches of the routes hold, by route.
    #[must_use]
    pub fn figures(&self) -> Vec<Figures> {
        let live = |(route, all): (&String, &Vec<Known>)| {
            Some((route.clone(), all.iter().rev().find_map(|(_, kept)| kept.upgrade())?))
        };
        let kept: Vec<_> = self.purger.kept.lock().iter().filter_map(live).collect();
        let mut figures: Vec<_> = kept
            .into_iter()
            .map(|(route, kept)| {
                let (entries, bytes) = kept.size();
                let (in_flight, in_flight_bytes) = kept.in_flight();
                Figures { route, entries, bytes, in_flight, in_flight_bytes }
            })
            .collect();
        figures.sort_by(|a, b| a.route.cmp(&b.route));
        figures
    }

    /// The streams of a route that can be taken up again, whatever its section says.
    fn streams(&self, config: &Config, route: &str) -> Arc<Streams> {
        let mut all = self.streams.lock();
        all.retain(|_, streams| streams.strong_count() > 0);
        let streams = all.get(route).and_then(Weak::upgrade).unwrap_or_else(|| Streams::new(self.tasks.clone()));
        streams.limit(config.max_bytes.get());
        all.insert(route.to_owned(), Arc::downgrade(&streams));
        streams
    }

    /// The answers of a route: those that there are, unless its section or its upstream changed. They live as long as a
    /// layer has them.
    fn kept(&self, config: &Config, route: &str, upstream: &str, metrics: &CacheMetrics) -> Arc<Kept> {
        let mut all = self.purger.kept.lock();
        all.retain(|_, kept| {
            kept.retain(|(_, kept)| kept.strong_count() > 0);
            !kept.is_empty()
        });
        let known = all.entry(route.to_owned()).or_default();
        let of = (config.clone(), upstream.to_owned());
        let same = known.iter().find(|(known, _)| *known == of);
        if let Some(kept) = same.and_then(|(_, kept)| kept.upgrade()) {
            return kept;
        }
        let evicted = metrics.evicted.clone();
        let entries = config.max_entries.as_ref().map(|entries| entries.get());
        let kept = Arc::new(Kept::new(config.max_bytes.get(), entries, self.purger.purges.clone(), move || {
            evicted.inc();
        }));
        known.push((of, Arc::downgrade(&kept)));
        kept
    }
}

/// What the cache of a route holds.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The route.
    pub route: String,
    /// Answers, and notes about what has none.
    pub entries: u64,
    /// About so much memory, in bytes.
    pub bytes: u64,
    /// Answers that are on their way.
    pub in_flight: usize,
    /// What is there of them, in bytes: at most as much as may be kept.
    pub in_flight_bytes: u64,
}

/// Keeps answers, and gives them again: see the [module](self).
#[derive(Debug, Clone)]
pub struct CacheLayer {
    gate: Arc<Gate>,
}

struct Gate {
    route: String,
    config: Config,
    kept: Arc<Kept>,
    terms: Arc<Terms>,
    pace: Pace,
    purger: Arc<Purger>,
    resume: Option<Resume>,
    metrics: CacheMetrics,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("route", &self.route).finish_non_exhaustive()
    }
}

impl CacheLayer {
    /// The cache of the route of this name, before an upstream, in `state`, and in `redis` behind it, unless `config` says
    /// otherwise. With a Redis it needs a tokio runtime.
    #[must_use]
    pub fn new(
        config: &Config,
        route: &str,
        upstream: &str,
        state: &State,
        redis: Option<&Redis>,
        metrics: &Metrics,
    ) -> Self {
        let metrics = metrics.cache(route);
        let duration = |toggle: Toggle<HumanDuration>| toggle.on().map(HumanDuration::get);
        let rules = Rules {
            ttl: duration(config.ttl),
            negative_ttl: duration(config.negative_ttl),
            stale_while_revalidate: duration(config.stale_while_revalidate),
            stale_if_error: duration(config.stale_if_error),
            ignore_cache_control: config.ignore_cache_control,
            keyed_by_credential: !config.shared,
        };
        let resume = duration(config.resume).map(|after| Resume { streams: state.streams(config, route), after });
        let terms = Terms {
            rules,
            max_body: usize::try_from(config.max_body.get()).unwrap_or(usize::MAX),
            record_streams: config.record_streams,
            terminal: config.terminal.clone().map(Arc::new),
            tools: config.body.tools,
            when: config.when.clone(),
            refresh: duration(config.refresh),
            shared: redis.zip(config.redis.as_ref()).map(|(redis, own)| {
                Shared::new(state.purger.hub(redis), (route, upstream), config, own, metrics.clone())
            }),
            room: resume.as_ref().map(|resume| resume.streams.room().clone()),
            metrics: metrics.clone(),
        };
        let gate = Gate {
            route: route.to_owned(),
            kept: state.kept(config, route, upstream, &metrics),
            terms: Arc::new(terms),
            pace: match config.replay {
                Replay::Instant => Pace::Instant,
                Replay::Paced => Pace::Times(config.speed),
            },
            config: config.clone(),
            purger: state.purger.clone(),
            resume,
            metrics,
            tasks: state.tasks.clone(),
        };
        Self { gate: Arc::new(gate) }
    }
}

impl CacheLayer {
    /// Keeps answers warm that `inner` gives, as long as these futures are polled. `parameters` gives those of a path.
    pub fn keep_warm<S>(
        &self,
        inner: &S,
        parameters: impl Fn(&str) -> Option<Parameters>,
    ) -> Vec<BoxFuture<'static, ()>>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        warm::keep(&self.gate, inner, parameters)
    }
}

impl<S> Layer<S> for CacheLayer {
    type Service = Cache<S>;

    fn layer(&self, inner: S) -> Cache<S> {
        Cache { inner, gate: self.gate.clone() }
    }
}

/// The service of [`CacheLayer`].
#[derive(Debug, Clone)]
pub struct Cache<S> {
    inner: S,
    gate: Arc<Gate>,
}

/// The answer to come.
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response, BoxError>> + Send>>;

impl<S> Service<Request> for Cache<S>
where
    S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
{
    type Response = Response;
    type Error = BoxError;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> ResponseFuture {
        let fresh = self.inner.clone();
        let inner = mem::replace(&mut self.inner, fresh);
        let gate = self.gate.clone();
        Box::pin(async move { gate.serve(inner, request).await })
    }
}

/// What the cache is for a request.
enum Part {
    /// It looks for an answer.
    Look,
    /// It has no part in it.
    None(Forward, Option<&'static str>),
    /// It drops what the request changes.
    Drop,
}

/// A question.
struct Question {
    head: Parts,
    body: Bytes,
    primary: Key,
    asked: Directives,
    /// Why the answer is not kept, nor given from what is.
    bypass: Option<&'static str>,
    /// The key of what is for the one who asks alone, where that can be taken up again.
    own: Option<Key>,
}

impl Question {
    /// The key of the answer for it, if answers vary by these fields of requests.
    fn variant(&self, vary: &[HeaderName]) -> Key {
        if vary.is_empty() { self.primary } else { self.primary.with_vary(vary, &self.head.headers) }
    }

    /// Whether what is stored under this key is the answer for it.
    fn is_of(&self, stored: &Stored, key: Key) -> bool {
        matches!(vary::names(&stored.headers), vary::Names::Fields(vary) if self.variant(&vary) == key)
    }
}

/// How a question goes on.
enum Step {
    /// It is answered.
    Done(Result<Response, BoxError>),
    /// The answer was another's. More is known now: under which key its own would be.
    Again(Option<Key>),
    /// By itself.
    Alone,
}

impl Gate {
    fn part(&self, head: &Parts) -> Part {
        let is_kept = match head.method {
            http::Method::GET | http::Method::HEAD => self.config.methods.contains(&Method::Get),
            http::Method::POST => self.config.methods.contains(&Method::Post),
            _ => false,
        };
        if !is_kept {
            return if head.method.is_safe() { Part::None(Forward::Method, None) } else { Part::Drop };
        }
        let has = |name: HeaderName| head.headers.contains_key(name);
        if OVERRIDES.iter().any(|name| head.headers.contains_key(*name)) {
            return Part::None(Forward::Bypass, Some("override"));
        }
        let posts = head.method == http::Method::POST;
        if has(IF_MATCH) || has(IF_UNMODIFIED_SINCE) || posts && has(IF_NONE_MATCH) {
            return Part::None(Forward::Bypass, Some("precondition"));
        }
        // Where it says nothing, backends take it for JSON, or for nothing at all: the key makes a difference.
        let silent = !has(CONTENT_TYPE) && !has(CONTENT_ENCODING);
        if posts && !silent && !json::is_json(&head.headers) {
            return Part::None(Forward::Bypass, Some("body-not-json"));
        }
        // The rest of a stream is not what another one gets, who begins it.
        if has(LAST_EVENT_ID) {
            return Part::None(Forward::Bypass, Some("last-event-id"));
        }
        Part::Look
    }

    async fn serve<S>(self: Arc<Self>, inner: S, request: Request) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        if asks_for_tunnel(&request) {
            let status = CacheStatus { detail: Some("upgrade"), ..CacheStatus::forwarded(Forward::Bypass) };
            return self.pass(inner, request, status).await;
        }
        let (mut head, body) = request.into_parts();
        let last = self.resume.as_ref().and_then(|_| Last::of(&head.headers));
        if last.is_some() {
            // Nobody but us knows what it means.
            head.headers.remove(LAST_EVENT_ID);
        }
        match self.part(&head) {
            Part::Look => {}
            Part::None(why, detail) => {
                let status = CacheStatus { detail, ..CacheStatus::forwarded(why) };
                return self.pass(inner, Request::from_parts(head, body), status).await;
            }
            Part::Drop => return self.change(inner, Request::from_parts(head, body)).await,
        }
        let body = match gather(body, self.most(&head)).await? {
            Ok(body) => body,
            Err(body) => {
                let status = CacheStatus { detail: Some("body-too-large"), ..CacheStatus::forwarded(Forward::Bypass) };
                return self.pass(inner, Request::from_parts(head, body), status).await;
            }
        };
        match self.question(head, body) {
            Ok(question) => {
                if let Some(response) = last.and_then(|last| self.take_up(&question, last)) {
                    return Ok(response);
                }
                let Some(why) = question.bypass else { return self.answer(inner, question).await };
                let status = CacheStatus { detail: Some(why), ..CacheStatus::forwarded(Forward::Bypass) };
                self.pass_question(inner, question, status).await
            }
            Err((request, why)) => {
                let status = CacheStatus { detail: Some(why), ..CacheStatus::forwarded(Forward::Bypass) };
                self.pass(inner, request, status).await
            }
        }
    }

    /// How much of a body is looked at. Of a `GET` nothing: where it has one, nobody knows what it means (RFC 9110
    /// §9.3.1).
    fn most(&self, head: &Parts) -> usize {
        if head.method == http::Method::POST { self.config.max_request_body.to_usize() } else { 0 }
    }

    #[expect(clippy::result_large_err, reason = "a request, and in most cases there is none")]
    fn question(&self, mut head: Parts, body: Bytes) -> Result<Question, (Request, &'static str)> {
        let (host, https) = if self.config.ignore_host { ("", false) } else { host(&head) };
        let principal = head.extensions.get::<Principal>();
        let session = head.extensions.get::<Session>();
        let (mut digest, mut bypass) = (None, None);
        if head.method == http::Method::POST {
            let mut hash = ring::digest::Context::new(&SHA256);
            if let Err(why) = canonical::digest(&body, &self.config.body, &mut hash) {
                // What is not worth keeping is worth taking up again.
                if self.resume.is_none() || canonical::identity(&body, &self.config.body, &mut hash).is_err() {
                    return Err((Request::from_parts(head, body.into()), why.as_str()));
                }
                bypass = Some(why.as_str());
            }
            digest = Some(hash.finish());
        }
        let keys = Keys {
            scope: &self.route,
            parts: &self.config.key,
            ignored: &self.config.ignore_query,
            credentials: &IDENTITIES,
            shared: self.config.shared,
        };
        let asks = Asks {
            method: &head.method,
            https,
            host,
            path: head.uri.path(),
            query: head.uri.query(),
            headers: &head.headers,
            principal: principal.map(|principal| &*principal.id),
            tier: principal.and_then(|principal| principal.tier.as_deref()),
            session: session.map(|session| &*session.id),
            body: digest.as_ref().map(AsRef::as_ref),
        };
        let primary = keys.key(&asks);
        let can_resume =
            self.resume.is_some() && head.method != http::Method::HEAD && !head.headers.contains_key(RANGE);
        let own = can_resume.then(|| if keys.shared { Keys { shared: false, ..keys }.key(&asks) } else { primary });
        let asked =
            if self.config.client_cache_control { Directives::of(&head.headers) } else { Directives::default() };
        // The body has come, and is at hand.
        head.headers.remove(EXPECT);
        Ok(Question { head, body, primary, asked, bypass, own })
    }

    /// The rest of a stream of which the client has had a part, if it is the client's and at hand.
    fn take_up(&self, question: &Question, last: Last) -> Option<Response> {
        let (resume, own) = (self.resume.as_ref()?, question.own?);
        let is = |whose: &Whose| match whose {
            Whose::All { key, vary } => question.variant(vary) == *key,
            Whose::One(key) => own == *key,
        };
        let status = CacheStatus { detail: Some("resumed"), ..CacheStatus::HIT };
        let coming = resume.take_up(last, is).map(|mut response| {
            status.append(response.headers_mut());
            response
        });
        let response = coming.or_else(|| match self.kept.look(question.primary, None, &question.head.headers) {
            (_, Some(Entry::Answer(stored))) if stored.id == Some(last.id) => {
                stored.rest(last, status, SystemTime::now())
            }
            _ => None,
        })?;
        self.note(&question.head, CacheOutcome::Resumed);
        Some(response)
    }

    /// An answer for the one who asked, which can be taken up again if it is a stream.
    fn resumable(&self, response: Response, own: Option<Key>) -> Response {
        let (Some(resume), Some(own), true) = (&self.resume, own, resume::fits(&response)) else { return response };
        let Some(id) = Id::new() else { return response };
        let (parts, body) = response.into_parts();
        let mut headers = stored::own(parts.headers.clone());
        CacheStatus::remove(&mut headers);
        let recording = Recording::new(body, self.terms.max_body, self.kept.budget.clone(), None, |_| {});
        recording.hold(resume.streams.room().share(), true);
        let Some(reader) = recording.reader() else { unreachable!("nothing of it is gone") };
        let body = resume.begin(id, reader, || Stream {
            whose: Whose::One(own),
            status: parts.status,
            version: parts.version,
            headers,
            extensions: parts.extensions.clone(),
            recording,
            asking: None,
            is_known: Arc::default(),
        });
        Response::from_parts(parts, body)
    }

    async fn answer<S>(self: Arc<Self>, inner: S, question: Question) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        let mut status = CacheStatus::forwarded(Forward::UriMiss);
        let (mut variant, mut has_looked) = (None, false);
        for _ in 0..ROUNDS {
            let (key, entry) = self.kept.look(question.primary, variant, &question.head.headers);
            let (entry, is_known) = self.known(&question, key, entry).await;
            let stale = match entry {
                Some(Entry::Answer(stored)) => {
                    if is_known && let Some(response) = self.stored(&inner, &question, key, &stored) {
                        return Ok(response);
                    }
                    let is_fresh = stored.life.remaining(SystemTime::now()) > 0;
                    status = CacheStatus::forwarded(if is_fresh { Forward::Request } else { Forward::Stale });
                    Some(stored)
                }
                Some(Entry::Pass) => {
                    status.detail = Some("not-kept");
                    break;
                }
                None if key != question.primary => {
                    status = CacheStatus::forwarded(Forward::VaryMiss);
                    None
                }
                Some(Entry::Varies(_)) | None => None,
            };
            // A part is asked for as a part, and only `GET` brings what could be kept. What shall not be stored is not
            // shared either.
            let is_part = stale.is_none() && question.head.headers.contains_key(RANGE);
            let is_alone = is_part || question.head.method == http::Method::HEAD || question.asked.no_store;
            if stale.is_none() && (is_alone || question.asked.only_if_cached) && !mem::replace(&mut has_looked, true) {
                // Another replica may have all of it.
                if self.fetch(&question, key).await {
                    continue;
                }
            }
            if question.asked.only_if_cached {
                // §5.2.1.7.
                self.note(&question.head, CacheOutcome::Bypass);
                return Err(Error::from(NOT_CACHED).into());
            }
            if is_alone {
                return self.pass_beside(inner, question, status, stale.map(|stale| (key, stale))).await;
            }
            match self.upstream(&inner, &question, key, stale, &mut status).await {
                Step::Done(response) => return response,
                Step::Again(of) => variant = of.or(variant),
                Step::Alone => break,
            }
        }
        self.pass_question(inner, question, CacheStatus { collapsed: false, ..status }).await
    }

    /// Lets the request go on by itself. What it gets can be taken up again.
    async fn pass_question<S>(&self, inner: S, question: Question, status: CacheStatus) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let request = Request::from_parts(question.head, question.body.into());
        let response = self.pass(inner, request, status).await?;
        Ok(self.resumable(response, question.own))
    }

    /// Lets the request go on by itself. An answer to `HEAD` may tell that the stored one holds no more (§4.3.5).
    async fn pass_beside<S>(
        &self,
        inner: S,
        question: Question,
        status: CacheStatus,
        stale: Option<(Key, Arc<Stored>)>,
    ) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let is_head = question.head.method == http::Method::HEAD;
        let response = self.pass_question(inner, question, status).await?;
        if let Some((key, stored)) = stale
            && is_head
            && response.status() == stored.status
            && !validate::head_agrees(&stored.headers, response.headers())
        {
            self.kept.remove(&key);
            if let Some(shared) = &self.terms.shared {
                shared.remove(key);
            }
        }
        Ok(response)
    }

    /// What is stored, if it may be given.
    fn stored<S>(&self, inner: &S, question: &Question, key: Key, stored: &Arc<Stored>) -> Option<Response>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        let now = SystemTime::now();
        let verdict = stored.life.verdict(&question.asked, now);
        let outcome = match verdict {
            Verdict::Validate => return None,
            Verdict::Fresh => CacheOutcome::Hit,
            Verdict::Refresh | Verdict::Stale => CacheOutcome::Stale,
        };
        let soon = self.config.refresh.as_ref().map_or(0, |soon| soon.get().as_secs());
        let (left, age) = (stored.life.remaining(now), stored.life.age(now).as_secs());
        // Once a second at most, where answers live for no longer.
        let is_due = i64::try_from(soon).is_ok_and(|soon| left < soon) && age > 0;
        let response = stored.response(&question.head, CacheStatus::HIT, now, self.pace)?;
        if verdict == Verdict::Refresh || verdict == Verdict::Fresh && is_due {
            self.refresh(inner, question, key, stored.clone());
        }
        self.spared(question, outcome, stored);
        Some(response)
    }

    /// What the upstream says, to this request or to another that asks the same.
    async fn upstream<S>(
        &self,
        inner: &S,
        question: &Question,
        key: Key,
        stale: Option<Arc<Stored>>,
        status: &mut CacheStatus,
    ) -> Step
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        let (asking, first) = match self.join(inner, question, key, stale) {
            Ok(Some(joined)) => joined,
            Ok(None) => return Step::Again(None),
            Err(tags::TooLong) => {
                status.detail = Some("tag-too-long");
                return Step::Alone;
            }
        };
        // As long as this one is there, others find the answer.
        let held = asking.clone();
        let patience = if first { Duration::MAX } else { self.config.coalesce_timeout.get() };
        let Ok(outcome) = timeout(patience, asking).await else {
            status.detail = Some("coalesce-timeout");
            return Step::Alone;
        };
        status.collapsed = !first;
        let outcome = match outcome {
            Outcome::StaleIfError(failure, other) => match self.stale_if_error(question, key, &failure, *status) {
                Some(response) => return Step::Done(Ok(response)),
                None => *other,
            },
            outcome => outcome,
        };
        let whose = if first { CacheOutcome::Miss } else { CacheOutcome::Coalesced };
        match outcome {
            Outcome::Coming(coming) => {
                // It may be for requests with other fields (§4.1).
                let own = question.variant(&coming.vary);
                if coming.key != own {
                    return Step::Again(Some(own));
                }
                let response = if coming.is_known(&question.head) {
                    // Nobody may be left to read it. A client that is not there is not waited for without a bound.
                    if coming.is_short {
                        self.finish(held);
                    }
                    Some(coming.not_modified(*status))
                } else {
                    coming.response(held, *status, self.resume.as_ref())
                };
                response.map_or(Step::Alone, |response| {
                    self.note(&question.head, whose);
                    Step::Done(Ok(response))
                })
            }
            Outcome::Shared(stored, of) if !question.is_of(&stored, of) => Step::Again(None),
            Outcome::Shared(stored, of) => self.shared(inner, question, of, &stored),
            Outcome::Renewed(renewed)
                if !question.is_of(&renewed.stored, renewed.key) && renewed.key != key
                    || !(first || renewed.is_shared) =>
            {
                Step::Again(None)
            }
            Outcome::Renewed(renewed) => {
                let fwd_status = Some(http::StatusCode::NOT_MODIFIED);
                let status = CacheStatus { fwd_status, stored: renewed.is_shared, ..*status };
                let stored = &renewed.stored;
                let response = stored.response(&question.head, status, SystemTime::now(), self.pace);
                response.map_or(Step::Alone, |mut response| {
                    for cookie in renewed.cookies.iter().filter(|_| first) {
                        response.headers_mut().append(SET_COOKIE, cookie.clone());
                    }
                    self.spared(question, CacheOutcome::Revalidated, stored);
                    Step::Done(Ok(response))
                })
            }
            // It was looked into above.
            Outcome::StaleIfError(..) => Step::Alone,
            Outcome::Alone(response, why) => {
                status.detail = Some(why);
                let response = first.then(|| response.lock().take()).flatten();
                response.map_or(Step::Alone, |mut response| {
                    let fwd_status = Some(response.status());
                    CacheStatus { fwd_status, ..*status }.append(response.headers_mut());
                    self.note(&question.head, whose);
                    Step::Done(Ok(self.resumable(response, question.own)))
                })
            }
            Outcome::Failed { first: error, kind, retry_after } => {
                self.note(&question.head, whose);
                let own = first.then(|| error.lock().take()).flatten();
                Step::Done(Err(own.unwrap_or_else(|| {
                    let error = Error::new(kind, "the request that this one waited for failed");
                    match retry_after {
                        Some(after) => error.with_retry_after(after).into(),
                        None => error.into(),
                    }
                })))
            }
        }
    }

    /// What was found in Redis.
    fn shared<S>(&self, inner: &S, question: &Question, of: Key, stored: &Arc<Stored>) -> Step
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        let now = SystemTime::now();
        let outcome = match stored.life.verdict(&question.asked, now) {
            // It is too old for this one, if not for the one who asked first.
            Verdict::Validate => return Step::Again(None),
            Verdict::Fresh => CacheOutcome::Hit,
            Verdict::Refresh => {
                self.refresh(inner, question, of, stored.clone());
                CacheOutcome::Stale
            }
            Verdict::Stale => CacheOutcome::Stale,
        };
        let status = CacheStatus { detail: Some("shared"), ..CacheStatus::HIT };
        let response = stored.response(&question.head, status, now, self.pace);
        response.map_or(Step::Alone, |response| {
            self.spared(question, outcome, stored);
            Step::Done(Ok(response))
        })
    }

    /// The stored answer, where the upstream has failed and this request takes it then.
    fn stale_if_error(
        &self,
        question: &Question,
        key: Key,
        Failure { stale, key: of, status: fwd_status }: &Failure,
        status: CacheStatus,
    ) -> Option<Response> {
        let now = SystemTime::now();
        if *of != key && !question.is_of(stale, *of) || !stale.life.is_stale_if_error(&question.asked, now) {
            return None;
        }
        let status = CacheStatus { fwd_status: *fwd_status, detail: Some("stale-if-error"), ..status };
        let response = stale.response(&question.head, status, now, self.pace)?;
        self.spared(question, CacheOutcome::Stale, stale);
        Some(response)
    }

    /// What is kept here, after a look at what other replicas may have purged, where this one did not hear them; and whether
    /// it may be given without asking the upstream.
    async fn known(&self, question: &Question, key: Key, entry: Option<Entry>) -> (Option<Entry>, bool) {
        let (Some(Entry::Answer(stored)), Some(shared)) = (&entry, &self.terms.shared) else { return (entry, true) };
        if shared.is_known(stored) {
            return (entry, true);
        }
        let number = self.kept.purges.now();
        match shared.check(stored, question.head.extensions.get()).await {
            Holds::Yes => (entry, true),
            Holds::Unknown => (entry, false),
            Holds::To(Standing::Gone, _) => {
                self.kept.remove(&key);
                (None, true)
            }
            Holds::To(_, marks) => {
                let mut life = stored.life;
                life.expire(SystemTime::now());
                let basis = Basis::new(number, Some(marks), hub::clock());
                let stale = Arc::new(stored.with(&stored.headers, life, basis));
                self.kept.put(key, stale.clone());
                (Some(Entry::Answer(stale)), true)
            }
        }
    }

    /// Looks in Redis for an answer that this request alone would ask the upstream for. Whether it is here now.
    async fn fetch(&self, question: &Question, key: Key) -> bool {
        let (Some(shared), Ok(names)) = (&self.terms.shared, self.names_of(question)) else { return false };
        let sought = Sought {
            primary: question.primary,
            key,
            headers: &question.head.headers,
            names: &names,
            number: self.kept.purges.now(),
            exchange: question.head.extensions.get(),
        };
        let looked = shared.look(sought).await;
        if let Some(names) = looked.varies {
            self.kept.put_names(question.primary, &names, true);
        }
        let Some((key, stored)) = looked.found else { return false };
        self.kept.put(key, stored.into());
        true
    }

    /// What an answer to this question is purged by.
    fn names_of(&self, question: &Question) -> Result<Arc<Names>, tags::TooLong> {
        let tags = render(&self.config.tags, &question.head)?;
        let host = self.names(&origin(&question.head)).into();
        let path = self.reduced(&question.head.uri).into();
        Ok(Arc::new(Names { host, path, tags }))
    }

    /// Goes along with a question that is being asked, or asks it: then `true`. `None` where it has just been answered.
    ///
    /// # Errors
    /// That its answer could not be tagged.
    fn join<S>(
        &self,
        inner: &S,
        question: &Question,
        key: Key,
        stale: Option<Arc<Stored>>,
    ) -> Result<Option<(Asking, bool)>, tags::TooLong>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        let names = self.names_of(question)?;
        let joined = self.kept.join(key, &names, &question.asked, stale.clone().as_ref(), |place| {
            let mut head = question.head.clone();
            // What the client would do with an answer that it has is decided when the answer is there.
            validate::conditions(&head.method, &mut head.headers, stale.as_ref().map(|stale| &stale.headers));
            let job = Job {
                head: head.clone(),
                primary: question.primary,
                stale,
                key,
                asked: question.asked,
                basis: Basis::default(),
                terms: self.terms.clone(),
            };
            fill::ask(inner.clone(), Request::from_parts(head, question.body.clone().into()), job, place).boxed()
        });
        if let Some((asking, true)) = &joined
            && self.config.finish_fill
        {
            self.finish(asking.clone());
        }
        Ok(joined)
    }

    /// Asks anew for what is stored, behind the request that found it. Once at a time.
    fn refresh<S>(&self, inner: &S, question: &Question, key: Key, stored: Arc<Stored>)
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + Sync + 'static,
    {
        let mut head = question.head.clone();
        // Nothing of it is this client's any more; but what becomes of it has to be noted somewhere.
        if let Some(old) = head.extensions.remove::<Exchange>() {
            let request = http::Request::from_parts(head, ());
            let exchange = Exchange::new(&request);
            {
                let (old, mut new) = (old.facts(), exchange.facts());
                (new.client_ip, new.https) = (old.client_ip, old.https);
            }
            head = request.into_parts().0;
            head.extensions.insert(exchange);
        }
        head.method = if head.method == http::Method::HEAD { http::Method::GET } else { head.method };
        let (body, primary, asked) = (question.body.clone(), question.primary, Directives::default());
        let question = Question { head, body, primary, asked, bypass: None, own: None };
        if let Ok(Some((asking, true))) = self.join(inner, &question, key, Some(stored)) {
            self.metrics.refreshed.inc();
            self.finish(asking);
        }
    }

    /// Reads an answer to its end, whoever else does, as long as that may be kept then.
    fn finish(&self, asking: Asking) {
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(async move {
            let held = asking.clone();
            if let Outcome::Coming(coming) = asking.await
                && coming.is_kept
                && let Some(mut reader) = coming.recording.reader()
            {
                while !coming.recording.is_over()
                    && let Some(Ok(_)) = std::future::poll_fn(|cx| Pin::new(&mut reader).poll_frame(cx)).await
                {
                }
            }
            drop(held);
        });
    }

    /// Lets the request go on as if there were no cache.
    async fn pass<S>(&self, mut inner: S, request: Request, status: CacheStatus) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let outcome = match status.source {
            Source::Forward(Forward::Bypass | Forward::Method) => CacheOutcome::Bypass,
            _ => CacheOutcome::Miss,
        };
        let exchange = request.extensions().get::<Exchange>().cloned();
        self.count(exchange.as_ref(), outcome);
        let mut response = inner.call(request).await.map_err(Into::into)?;
        CacheStatus { fwd_status: Some(response.status()), ..status }.append(response.headers_mut());
        Ok(response)
    }

    /// Lets a request go on that changes something, and drops what it changed (§4.4).
    async fn change<S>(&self, inner: S, request: Request) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let (head, body) = request.into_parts();
        // A tag that is too long is that of no answer.
        let tags = self.config.invalidate.iter().filter_map(|tag| render(std::slice::from_ref(tag), &head).ok());
        let tags: Vec<_> = tags.flatten().collect();
        let host = origin(&head);
        let paths = [target(&head.uri), self.reduced(&head.uri)];
        let request = Request::from_parts(head, body);
        let response = self.pass(inner, request, CacheStatus::forwarded(Forward::Method)).await?;
        if response.status().is_success() || response.status().is_redirection() {
            let purge = |target: Target| self.purger.purge(&target, false);
            let named = [LOCATION, CONTENT_LOCATION].into_iter().filter_map(|name| {
                let uri: Uri = response.headers().get(name)?.to_str().ok()?.parse().ok()?;
                // Only of the same origin, or anybody could drop anything.
                let https = uri.scheme() == Some(&Scheme::HTTPS);
                let same = uri.authority().is_none_or(|found| key::authority(found.as_str(), https) == host);
                (same && uri.path().starts_with('/')).then(|| [self::target(&uri), self.reduced(&uri)])
            });
            let own = self.names(&host);
            for path in [paths].into_iter().chain(named).flatten() {
                purge(Target::Url(format!("{own}{path}").into()));
            }
            for tag in tags {
                purge(Target::Tag(tag));
            }
        }
        Ok(response)
    }

    /// What answers to requests for `host` are dropped by, before the path.
    fn names<'a>(&self, host: &'a str) -> &'a str {
        if self.config.ignore_host { "" } else { host }
    }

    /// Notes that the upstream was spared what it had taken for the stored answer.
    fn spared(&self, question: &Question, outcome: CacheOutcome, stored: &Stored) {
        self.note(&question.head, outcome);
        self.metrics.saved(stored.took);
    }

    /// Path and query, without the parameters that make no difference: as all those have it that share an answer.
    fn reduced(&self, uri: &Uri) -> String {
        match uri.query().and_then(|query| key::without(&self.config.ignore_query, query)) {
            Some(query) => format!("{}?{query}", uri.path()),
            None => uri.path().to_owned(),
        }
    }

    fn note(&self, head: &Parts, outcome: CacheOutcome) {
        self.count(head.extensions.get::<Exchange>(), outcome);
    }

    fn count(&self, exchange: Option<&Exchange>, outcome: CacheOutcome) {
        self.metrics.count(outcome);
        if let Some(exchange) = exchange {
            exchange.facts().cache = Some(outcome);
        }
    }
}

/// The authority that a request is for, or nothing, and whether it came by `https`.
fn host(head: &Parts) -> (&str, bool) {
    let https = head.extensions.get::<Exchange>().is_some_and(|exchange| exchange.facts().https);
    let sent = || head.headers.get(HOST).and_then(|host| host.to_str().ok());
    (head.uri.authority().map(Authority::as_str).or_else(sent).unwrap_or_default(), https)
}

/// The authority, in the form that [`key::authority`] gives it.
fn origin(head: &Parts) -> String {
    let (host, https) = host(head);
    key::authority(host, https).into_owned()
}

/// Path and query.
fn target(uri: &Uri) -> String {
    uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string)
}

fn render(templates: &[tags::Template], head: &Parts) -> Result<Box<[Box<str>]>, tags::TooLong> {
    let source = tags::Source {
        parameters: head.extensions.get::<Parameters>(),
        query: head.uri.query(),
        headers: &head.headers,
    };
    let rendered = templates.iter().map(|template| template.render(&source));
    rendered.filter_map(|tag| tag.map(|tag| tag.map(Into::into)).transpose()).collect()
}

/// All of a body; or, where it is longer than `most`, or has trailers, a body that is the same.
async fn gather(mut body: Body, most: usize) -> Result<Result<Bytes, Body>, BoxError> {
    if body.is_end_stream() {
        return Ok(Ok(Bytes::new()));
    }
    if body.size_hint().lower() > most as u64 {
        return Ok(Err(body));
    }
    let mut whole = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame?;
        match frame.data_ref() {
            Some(data) if whole.len() + data.len() <= most => whole.extend_from_slice(data),
            _ => {
                let before = [Frame::data(whole.freeze()), frame];
                return Ok(Err(body.preceded(before)));
            }
        }
    }
    Ok(Ok(whole.freeze()))
}
