//! Session: row 10 of the request path. Which requests belong together, by an id in a cookie or a field.
//!
//! A request that shows no session begins one: 128 random bits, told in `Set-Cookie`, or in `header`, on its response, on
//! errors too. `created`, `last_seen` (to the minute) and the principal are kept, for `ttl` after the last request, in
//! Redis or, without Redis, in memory: at most 131072 sessions and 32 MiB, of which those go first that were not seen for
//! the longest time. The upstream finds the id in `x-session-id`, which no client can set, and `hash:
//! header:x-session-id` of `balance` keeps a session to its endpoint; the layers inside find a [`Session`].
//!
//! A new session is kept when its request has been answered, just before the client is told. So a request that sidegate
//! refuses inside of here, by a limit or for its body, begins none and is told of none: a flood of them leaves nothing in
//! the store, and one without a cookie does not reach it. An answer of the backend's is no refusal, whatever it says.
//!
//! - An id that is not known is not taken over, so that nobody can be given one to use (session fixation): a new one is
//!   made. So it is where a session is shown by another principal than the one it began with, or by nobody, or by somebody
//!   where it began with nobody. Routes with different `auth` that share browsers want cookies with different names.
//! - A request costs at most one round trip to Redis, and two where what it shows is not taken; within two seconds after
//!   one, none. A session that was revoked at another replica goes on as long.
//! - While Redis is out of order, ids that look like ours are accepted as they are, new ones are made for those who have
//!   none, and nothing is kept; an id that was made then is not known later. No request fails or waits for it.
//! - Every request without a cookie that is let in makes a session, those of bots too: `rate_limit` bounds how many they
//!   are. Inside of `auth` they are as many as callers are.
//! - The cookie is told again when half of `ttl` is over: it has in it when it was given. A response that tells an id
//!   gets `Cache-Control: private` where the backend says nothing about caches, so that no shared one keeps it; the
//!   `no-store` of the preset `web` gives way to that. Where the backend does say something, it stands: what is `public`
//!   belongs on a route without sessions.
//! - The upstream gets neither cookie nor `header`, unless `forward` says so; the rest of `Cookie` stays byte for byte.
//!   In trailers it gets neither, nor `x-session-id`.
//!
//! Ids are credentials. Redis, the log (`session_id`), the operator's port and the layers inside get their digests; where
//! any route has sessions, `x-session-id` of clients is not logged.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::{layers::session::{self, SessionLayer}, message::{Body, BoxError, Session}, telemetry::Metrics};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(SessionLayer::new(&session::Config::default(), "chat", &session::State::default(), None, &Metrics::new()))
//!     .service(service_fn(|request: Request<Body>| async move {
//!         assert!(request.headers().contains_key("x-session-id") && !request.headers().contains_key("cookie"));
//!         Ok::<_, BoxError>(Response::new(request.extensions().get::<Session>().unwrap().id.clone()))
//!     }));
//! let first = service.clone().oneshot(Request::new(Body::empty())).await.unwrap();
//! let cookie = first.headers()["set-cookie"].to_str().unwrap().split(';').next().unwrap();
//! let request = Request::builder().header("cookie", cookie).body(Body::empty()).unwrap();
//! let second = service.oneshot(request).await.unwrap();
//! assert!(!second.headers().contains_key("set-cookie"));
//! assert_eq!(first.body(), second.body());
//! # });
//! ```

pub mod cookie;
mod id;
mod keep;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Response,
    header::{CACHE_CONTROL, COOKIE, SET_COOKIE},
};
use prometheus_client::metrics::counter::Counter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::{Layer, Service};

pub use self::keep::{Listed, Outcome, State, Which};
use self::{
    cookie::Shown,
    id::Id,
    keep::{Found, Keeper, unix_now},
};
use crate::{
    config::{Check, HumanDuration, Problems, Toggle, fields::FieldName},
    message::{
        BoxError, Connection, Error, Fault, Kind, Principal, Request, Session,
        headers::{X_SESSION_ID, remove_alike},
        take_ready,
    },
    store::{Failure, Redis},
    telemetry::{Exchange, Metrics, metrics::SessionMetrics},
};

/// Cookies of our name that are looked up: who has several got them for several paths or domains.
const TRIES: usize = 2;

/// Sessions: which requests belong together. Section `session`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Session")]
pub struct Config {
    /// The cookie that holds the session's id; `off` where `header` alone does. It is not passed on.
    pub cookie: Toggle<cookie::Config>,
    /// A field that holds the id, for clients without cookies; looked at before the cookie. The response that begins a
    /// session tells the id in it, where pages of the origins of `cors` may read it. It is not passed on. Default none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub header: Option<FieldName>,
    /// How long a session is kept after its last request, 10s to 365d. Default `24h`.
    pub ttl: HumanDuration,
    /// The field that tells the upstream the id; `off` tells it in none. What clients send under this name is removed.
    /// Default `x-session-id`.
    pub upstream_header: Toggle<FieldName>,
    /// Whether the upstream gets the client's cookie and `header` too. Default `false`.
    pub forward: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            cookie: Toggle::On(cookie::Config::default()),
            header: None,
            ttl: HumanDuration::from_secs(86_400),
            upstream_header: Toggle::On(X_SESSION_ID.into()),
            forward: false,
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        problems.at("cookie", |problems| self.cookie.check(problems));
        if self.cookie.is_off() && self.header.is_none() {
            problems.add("", "has neither `cookie` nor `header`: no request could show its session");
        }
        let is_free = |name: &FieldName| name.is_free() && ![COOKIE, SET_COOKIE].contains(name.get());
        for (key, name) in [("header", self.header.as_ref()), ("upstream_header", self.upstream_header.as_ref())] {
            if name.is_some_and(|name| !is_free(name)) {
                problems.add(key, "is a field that has another meaning: name one of its own, as `x-session-id`");
            }
        }
        if self.ttl < HumanDuration::from_secs(10) {
            problems.add("ttl", format!("is {}: must be at least 10s", self.ttl));
        }
    }
}

impl Config {
    /// Whether the layers inside do not see the field `name` as the client sent it.
    #[must_use]
    pub fn replaces(&self, name: &HeaderName) -> bool {
        let is = |own: Option<&FieldName>| own.is_some_and(|own| own.get() == name);
        is(self.upstream_header.as_ref()) || !self.forward && is(self.header.as_ref())
    }
}

/// Gives each request its session: see the [module](self).
#[derive(Debug, Clone)]
pub struct SessionLayer {
    desk: Arc<Desk>,
}

/// What the clones share.
#[derive(Debug)]
struct Desk {
    cookie: Option<cookie::Config>,
    header: Option<HeaderName>,
    upstream_header: Option<HeaderName>,
    forward: bool,
    ttl: Duration,
    keeper: Keeper,
    metrics: SessionMetrics,
}

impl SessionLayer {
    /// A layer for the route of this name, whose sessions are kept in `redis`, or in `state` where there is none.
    #[must_use]
    pub fn new(config: &Config, route: &str, state: &State, redis: Option<Redis>, metrics: &Metrics) -> Self {
        let ttl = config.ttl.get();
        let desk = Desk {
            cookie: config.cookie.as_ref().cloned(),
            header: config.header.as_ref().map(|name| name.get().clone()),
            upstream_header: config.upstream_header.as_ref().map(|name| name.get().clone()),
            forward: config.forward,
            ttl,
            keeper: Keeper { state: state.clone(), redis, ttl },
            metrics: metrics.sessions(route),
        };
        Self { desk: Arc::new(desk) }
    }
}

impl<S> Layer<S> for SessionLayer {
    type Service = Sessions<S>;

    fn layer(&self, inner: S) -> Sessions<S> {
        Sessions { inner, desk: self.desk.clone() }
    }
}

/// The service of [`SessionLayer`].
///
/// # Errors
/// Those of the inner service, with the fields that tell a new session. [`Kind::Internal`] where the system has no random
/// bits.
#[derive(Debug, Clone)]
pub struct Sessions<S> {
    inner: S,
    desk: Arc<Desk>,
}

impl<S, ResBody> Service<Request> for Sessions<S>
where
    S: Service<Request, Response = Response<ResBody>, Error: Into<BoxError>, Future: Send> + Clone + Send + 'static,
    ResBody: Send,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut inner = take_ready(&mut self.inner);
        let (desk, strip) = (self.desk.clone(), self.desk.clone());
        Box::pin(async move {
            let (mut head, body) = request.into_parts();
            let (told, begins) = desk.enter(&mut head).await?;
            // Some backends take trailers for header fields.
            let body = body.stripping_trailers(move |trailers| strip.strip(trailers));
            let answer = inner.call(Request::from_parts(head, body)).await.map_err(Into::into);
            let told = match begins {
                None => told,
                Some(begins) if answer.as_ref().is_err_and(|error| is_refusal(&**error)) => begins.never(),
                Some(begins) => {
                    desk.begin(begins).await;
                    told
                }
            };
            match answer {
                Ok(mut response) => {
                    tell(response.headers_mut(), told);
                    Ok(response)
                }
                Err(error) if told.is_empty() => Err(error),
                Err(error) => {
                    // Errors are not stored by anyone.
                    let tell = |error: Error, (name, value)| error.with_field(name, value);
                    Err(told.into_iter().fold(Error::of(error), tell).into())
                }
            }
        })
    }
}

/// Whether an error says that the request was not let in, or was not whole. Then it has not begun a session: who is
/// refused, as often as it likes, leaves nothing in the store.
fn is_refusal(error: &(dyn std::error::Error + 'static)) -> bool {
    let kind = Error::find(error).map(Error::kind);
    kind.is_some_and(|kind| kind == Kind::RateLimitUnavailable || kind.fault() == Fault::Client)
}

/// Fields of a response that tell the client its id.
type Told = Vec<(HeaderName, HeaderValue)>;

fn tell(headers: &mut HeaderMap, told: Told) {
    if !told.is_empty() && !headers.contains_key(CACHE_CONTROL) {
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("private"));
    }
    for (name, value) in told {
        if name == SET_COOKIE {
            headers.append(name, value);
        } else {
            headers.insert(name, value);
        }
    }
}

/// The session of a request, and how it is to be told.
struct Entered {
    id: Id,
    /// Why the client does not have it, where it does not: it is to be begun.
    new: Option<Counter>,
    /// Whether the client should be given its cookie again.
    stale: bool,
    /// What kept the store from being asked for it.
    failed: Option<Failure>,
}

/// A session that begins with a request, if that is let in. It is kept before the client is told.
struct Begins {
    id: Id,
    principal: Option<Arc<str>>,
    exchange: Option<Exchange>,
    why: Counter,
}

impl Begins {
    /// It did not begin, and nobody is told.
    fn never(self) -> Told {
        if let Some(exchange) = self.exchange {
            exchange.facts().session = None;
        }
        Told::new()
    }
}

impl Desk {
    /// Finds or makes the session of a request, and lets the request say so. What the client has to be told of it, and
    /// what is to be kept then, if it is new.
    async fn enter(&self, head: &mut http::request::Parts) -> Result<(Told, Option<Begins>), Error> {
        let principal = head.extensions.get().map(|principal: &Principal| principal.identity.clone());
        let Entered { id, new, stale, failed } = self.session_of(&head.headers, principal.as_ref()).await?;
        self.pass_on(&mut head.headers, &id);
        let session = Session { id: id.digest().hex().into(), known: new.is_none() && failed.is_none() };
        let exchange = head.extensions.get::<Exchange>();
        let https = match exchange {
            Some(exchange) => {
                let mut facts = exchange.facts();
                facts.session = Some(session.clone());
                facts.store_unanswered |= failed == Some(Failure::Timeout);
                facts.https
            }
            None => head.extensions.get::<Connection>().is_some_and(Connection::tls),
        };
        let exchange = exchange.cloned();
        head.extensions.insert(session);
        let mut told = Vec::new();
        if let (Some(cookie), true) = (&self.cookie, new.is_some() || stale) {
            told.push((SET_COOKIE, cookie.set(&id, unix_now(), self.ttl.as_secs(), https)));
        }
        if let (Some(header), true) = (&self.header, new.is_some()) {
            told.push((header.clone(), value(&id)));
        }
        Ok((told, new.map(|why| Begins { id, principal, exchange, why })))
    }

    /// Keeps a session. Where the store is out of order it is told all the same: ids are taken as they are then.
    async fn begin(&self, Begins { id, principal, exchange, why }: Begins) {
        let unanswered = exchange.is_some_and(|exchange| exchange.facts().store_unanswered);
        let kept = !unanswered && self.keeper.begin(&id, principal.as_ref()).await.is_ok();
        if kept { &why } else { &self.metrics.unkept }.inc();
    }

    async fn session_of(&self, headers: &HeaderMap, principal: Option<&Arc<str>>) -> Result<Entered, Error> {
        let mut shown = self.shown(headers);
        shown.truncate(TRIES);
        let mut why = &self.metrics.new;
        for (Shown { id, given }, in_cookie) in shown {
            let found = self.keeper.find(&id, principal).await;
            match found {
                Ok(Found::Known) => self.metrics.known.inc(),
                Err(_) => self.metrics.unkept.inc(),
                Ok(Found::Unknown) => {
                    why = &self.metrics.unknown;
                    continue;
                }
                Ok(Found::Foreign) => {
                    why = &self.metrics.foreign;
                    continue;
                }
            };
            let stale = in_cookie && self.is_stale(given, unix_now());
            return Ok(Entered { id, new: None, stale, failed: found.err() });
        }
        let id = Id::new().ok_or_else(|| Error::new(Kind::Internal, "the system has no random bits"))?;
        Ok(Entered { id, new: Some(why.clone()), stale: false, failed: None })
    }

    /// What the request shows, and whether it does in its cookie.
    fn shown(&self, headers: &HeaderMap) -> Vec<(Shown, bool)> {
        let mut in_field = self.header.iter().flat_map(|name| headers.get_all(name));
        let in_field = in_field.next().and_then(|value| Id::parse(value.as_bytes().trim_ascii()));
        let in_field = in_field.map(|id| (Shown { id, given: None }, false));
        let cookies = self.cookie.iter().flat_map(|cookie| cookie::find(headers, &cookie.name));
        in_field.into_iter().chain(cookies.map(|shown| (shown, true))).collect()
    }

    /// Whether half of the time is over for which the client was given its cookie.
    fn is_stale(&self, given: Option<u64>, now: u64) -> bool {
        // What was given in the future, by a replica whose clock is ahead, is fresh; by much more, nonsense.
        given.is_none_or(|given| now.abs_diff(given) >= self.ttl.as_secs() / 2)
    }

    /// Removes from trailers what only we may say, and what may name a session: nobody has looked for it.
    fn strip(&self, trailers: &mut HeaderMap) {
        for name in self.upstream_header.iter().chain(&self.header) {
            remove_alike(trailers, name);
        }
        if self.cookie.is_some() {
            trailers.remove(COOKIE);
        }
    }

    fn pass_on(&self, headers: &mut HeaderMap, id: &Id) {
        if !self.forward {
            if let Some(cookie) = &self.cookie {
                cookie::remove(headers, &cookie.name);
            }
            if let Some(header) = &self.header {
                headers.remove(header);
            }
        }
        if let Some(name) = &self.upstream_header {
            remove_alike(headers, name);
            headers.insert(name, value(id));
        }
    }
}

fn value(id: &Id) -> HeaderValue {
    let mut value = HeaderValue::from_str(id.as_str()).expect("digits are visible ASCII");
    value.set_sensitive(true);
    value
}

#[cfg(test)]
mod tests;
