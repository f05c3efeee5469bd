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
//! - **What is dropped.** A request of an unsafe method that succeeds drops what its URL has (§4.4), on whatever route, and
//!   the tags of `invalidate`. The operator drops by path, tag, pattern, or everything. What is on its way then is not kept.
//! - **What cannot be kept** is remembered for two minutes: nobody waits for it.
//! - **All replicas** find each other's answers in Redis, where there is one. It is asked once for all who want an answer
//!   that this replica does not have, before the upstream is, and for no longer than its deadline. What one replica drops is
//!   dropped by all. A replica that does not hear the others (it looks every second) uses what it has for one more second,
//!   and then only after a look at what they dropped, and no longer lets requests join what they dropped. Where that look
//!   fails it asks the upstream; without any Redis, once that is known, it goes on alone. What is dropped meanwhile is
//!   dropped by the others when Redis is back, as long as this process lives; and what Redis itself forgets of it, in a
//!   failover, or because it makes room (`maxmemory-policy` other than `noeviction`), comes back until it is stale.
//!   Where Redis is full and what is dropped cannot be noted there, who may have missed it asks the upstream until there is
//!   room. How old an answer in Redis is, Redis tells by its own clock: those of the replicas need not agree.
//!   Answers leave room for limits, sessions and purges: none is written to Redis while more than 85 % of its `maxmemory`
//!   are used, nor for five seconds after it took no more. Without a `maxmemory` nothing bounds them but their times.
//!   A user of an ACL needs the channels `&PREFIX:*`, and `INFO` to know how full it is.
//! - **What is taken up again.** With `resume`, a client that lost a stream gets the rest of it, if it is the one who asked:
//!   see `resume`; with Redis from any replica: see `copies`.
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

// The way of a request, and what it leaves behind.
mod answer;
mod change;
mod coming;
mod fill;
mod gate;
mod question;
mod upstream;
mod warm;

// What HTTP says of it: pure.
mod date;
mod directives;
mod freshness;
mod range;
mod status;
mod validate;
mod vary;

// Under which key it is, and by which names it is dropped.
pub mod canonical;
pub mod key;
mod purge;
pub mod tags;

// What is kept, and what is on its way.
mod kept;
mod recording;
mod stored;

// Streams that are taken up again.
mod copies;
mod left;
mod resume;

// All replicas, by Redis.
mod encoding;
mod headroom;
mod hub;
mod marks;
mod shared;

// What a file says, and what outlives it.
mod config;
mod state;
mod warmed;

use std::{
    future::ready,
    num::NonZeroU32,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::BoxFuture;
use tower::{Layer, Service};

use self::{
    answer::{Asked, Begun},
    gate::Gate,
};
pub use self::{
    change::{ChangesFuture, ChangesLayer, Watched},
    config::{Config, InRedis, Method, Replay},
    purge::Target,
    state::{Figures, State},
    warmed::Warmed,
};
use crate::{
    message::{BoxError, CloneService, Request, Response, path::Parameters, take_ready},
    store::Redis,
    telemetry::Metrics,
};

/// Keeps answers, and gives them again: see the [module](self).
#[derive(Debug, Clone)]
pub struct CacheLayer {
    gate: Arc<Gate>,
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
        Self { gate: Arc::new(Gate::new(config, route, upstream, state, redis, metrics)) }
    }

    /// Lets streams that nobody reads take no more than a quarter of these places, which are those of all that is asked of
    /// the upstream at once.
    #[must_use]
    pub fn beside(self, places: Option<NonZeroU32>) -> Self {
        if let Some(resume) = &self.gate.resume {
            resume.streams.beside(places);
        }
        self
    }

    /// Keeps answers warm that `inner` gives, as long as these futures are polled. `parameters` gives those of a path.
    pub fn keep_warm<S>(
        &self,
        inner: &S,
        parameters: impl Fn(&str) -> Option<Parameters>,
    ) -> Vec<BoxFuture<'static, ()>>
    where
        S: CloneService + Sync,
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
    S: CloneService + Sync,
{
    type Response = Response;
    type Error = BoxError;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> ResponseFuture {
        match self.gate.begin(&self.inner, request) {
            Begun::Asked(Asked::Answered(response)) => Box::pin(ready(Ok(response))),
            begun => Box::pin(self.gate.clone().go_on(take_ready(&mut self.inner), begun)),
        }
    }
}
