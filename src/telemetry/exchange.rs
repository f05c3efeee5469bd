//! The record of one exchange: a request and what came of it.

use std::{
    any::Any,
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::{Extensions, HeaderValue, Method, Uri};
use http_body::Body as HttpBody;
use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

use super::{
    log::chain,
    metrics::{AbortedBy, RouteMetrics},
};
use crate::message::{
    Connection, Error, Fault, Kind, RequestId, Session,
    headers::{TRACEPARENT, X_SESSION_ID},
};

/// What the layers learn about one request while it passes, for the log line and the samples at its end.
///
/// Request extension. Written by `layers::hygiene` (client address), `layers::auth` (principal), `layers::session`
/// (session), `route` (route), `upstream::client` (upstream, endpoint), `layers::errors` and the bodies that cut a stream (what ended it); read by
/// `layers::access_log` when the exchange is over, however it ended, and by `layers::errors`.
#[derive(Debug, Clone)]
pub struct Exchange(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    started: Instant,
    asked: Asked,
    received: AtomicU64,
    /// Nanoseconds from the start to the last of `received`; 0 for never.
    last_received: AtomicU64,
    /// Nanoseconds from the start until which nobody waits for the upstream: more of the request's body is to come first.
    client_until: AtomicU64,
    sent: AtomicU64,
    facts: Mutex<Facts>,
}

/// What was asked, as it arrived.
#[derive(Debug)]
pub struct Asked {
    /// The method.
    pub method: Method,
    /// The target.
    pub uri: Uri,
    /// The correlation id, where `layers::request_id` stands outside.
    pub request_id: Option<HeaderValue>,
    /// `x-session-id`.
    pub session_id: Option<HeaderValue>,
    /// `traceparent`.
    pub traceparent: Option<HeaderValue>,
}

/// What a cache did with a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CacheOutcome {
    /// It gave a stored answer that was fresh.
    Hit,
    /// It gave a stored answer that was not.
    Stale,
    /// It gave a stored answer after the upstream had said that it still holds.
    Revalidated,
    /// It gave the answer that another request was getting.
    Coalesced,
    /// It gave the rest of an answer that the client had had a part of.
    Resumed,
    /// It asked the upstream.
    Miss,
    /// It had no part in it.
    Bypass,
}

impl CacheOutcome {
    /// All of them.
    pub const ALL: [Self; 7] =
        [Self::Hit, Self::Stale, Self::Revalidated, Self::Coalesced, Self::Resumed, Self::Miss, Self::Bypass];

    /// The word for logs and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Stale => "stale",
            Self::Revalidated => "revalidated",
            Self::Coalesced => "coalesced",
            Self::Resumed => "resumed",
            Self::Miss => "miss",
            Self::Bypass => "bypass",
        }
    }

    /// Whether the upstream made nothing for this request. The rest of an answer is made for whoever takes it up: the
    /// request before it was charged for no more than it got.
    #[must_use]
    pub const fn spares_upstream(self) -> bool {
        !matches!(self, Self::Resumed | Self::Miss | Self::Bypass)
    }
}

/// The facts themselves. All are absent until a layer writes them.
#[derive(Debug, Default)]
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
pub struct Facts {
    /// The client's address, found through trusted proxies.
    pub client_ip: Option<IpAddr>,
    /// Whether the client speaks to us, or to a trusted proxy before us, over TLS.
    pub https: bool,
    /// Who asks: the id of its principal.
    pub principal: Option<Arc<str>>,
    /// The session that the request belongs to, where sidegate makes them.
    pub session: Option<Session>,
    /// The route that matched, with its samples.
    pub route: Option<Arc<RouteMetrics>>,
    /// The upstream that the route names.
    pub upstream: Option<Arc<str>>,
    /// The endpoint that was asked last.
    pub endpoint: Option<Arc<str>>,
    /// Whether Redis has let the request wait until the deadline: it does not wait once more.
    pub store_unanswered: bool,
    /// How long the cache has let the request wait for Redis.
    pub cache_waited: Duration,
    /// The tokens of a language model that were used, where they are counted: input and output.
    pub tokens: Option<(u64, u64)>,
    /// The rule that refused the request, if one did.
    pub rate_limited: Option<Arc<str>>,
    /// The first rule that would have refused the request, were it not a shadow.
    pub rate_limit_shadow: Option<Arc<str>>,
    /// What the cache did, where the route has one.
    pub cache: Option<CacheOutcome>,
    /// How many times the request was sent again.
    pub retries: u32,
    /// Whether one of these was for a pooled connection that the upstream had closed.
    pub repeated: bool,
    /// Whether another upstream than the route's own was asked.
    pub fallback: bool,
    /// The slug of the error that sidegate answered with, or that cut the response off.
    pub error: Option<&'static str>,
    /// The cause behind `error`, for the log alone. Never a header value or a body.
    pub cause: Option<String>,
    /// What cut the response off before its end, if `error` did.
    pub aborted_by: Option<AbortedBy>,
    /// From the start to the response's head.
    pub first_byte: Option<Duration>,
    /// Present when the exchange goes on as a tunnel after its head. Made by `upstream::client`, which
    /// empties it when the tunnel ends; `layers::concurrency` adds its permit, so that the tunnel is in flight until
    /// then, and `layers::access_log` its entry, so that the line is written then.
    pub tunnel: Option<Box<dyn Any + Send>>,
}

impl Facts {
    /// Notes the route, which counts the request among those in flight until the record is gone.
    pub fn enter(&mut self, route: Arc<RouteMetrics>) {
        route.in_flight.inc();
        self.route = Some(route);
    }
}

impl Drop for Facts {
    fn drop(&mut self) {
        if let Some(route) = &self.route {
            route.in_flight.dec();
        }
    }
}

impl Exchange {
    /// A new record of `request`, begun now.
    #[must_use]
    pub fn new<B>(request: &http::Request<B>) -> Self {
        let asked = Asked {
            method: request.method().clone(),
            uri: request.uri().clone(),
            request_id: request.extensions().get().map(|RequestId(id)| id.clone()),
            session_id: request.headers().get(X_SESSION_ID).cloned(),
            traceparent: request.headers().get(TRACEPARENT).cloned(),
        };
        let (received, last_received, sent) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let (started, facts) = (Instant::now(), Mutex::default());
        let client_until = AtomicU64::new(0);
        Self(Arc::new(Shared { started, asked, received, last_received, client_until, sent, facts }))
    }

    /// The record of `request`; `None` where no access log layer stands outside.
    pub fn of<B>(request: &http::Request<B>) -> Option<&Self> {
        request.extensions().get()
    }

    /// The record of `request`, where more of its body is to come.
    pub fn of_upload<B: HttpBody>(request: &http::Request<B>) -> Option<Self> {
        Self::of(request).filter(|_| !request.body().is_end_stream()).cloned()
    }

    /// What was asked.
    #[must_use]
    pub fn asked(&self) -> &Asked {
        &self.0.asked
    }

    /// When the request arrived.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.0.started
    }

    /// Bytes of the request's body, or of the tunnel from the client, so far.
    #[must_use]
    pub fn received(&self) -> &AtomicU64 {
        &self.0.received
    }

    /// Counts bytes of the request's body that have just arrived.
    pub fn receive(&self, bytes: usize) {
        self.0.received.fetch_add(bytes as u64, Ordering::Relaxed);
        self.0.last_received.store(self.nanos(Instant::now()).max(1), Ordering::Relaxed);
    }

    /// Notes that the request's body was asked for more: whether that is awaited of the client now.
    pub fn await_client(&self, awaited: bool) {
        self.0.client_until.store(if awaited { u64::MAX } else { 0 }, Ordering::Relaxed);
    }

    /// Notes that the request's body is not asked for before `at`.
    pub fn hold_upload(&self, at: Instant) {
        self.0.client_until.store(self.nanos(at), Ordering::Relaxed);
    }

    /// Whether more of the request's body is awaited of the client, and not the upstream.
    #[must_use]
    pub fn awaits_client(&self, now: Instant) -> bool {
        self.0.client_until.load(Ordering::Relaxed) > self.nanos(now)
    }

    /// Whether an upstream that may take `after`, and seems to be late, is not: until when it has time, where the client had
    /// something to say meanwhile, or still has.
    #[must_use]
    pub fn excuse(&self, after: Duration, now: Instant) -> Option<Instant> {
        let waits = match self.0.client_until.load(Ordering::Relaxed) {
            // What comes will say since when.
            u64::MAX => Some(now),
            0 => None,
            until => Some(self.0.started + Duration::from_nanos(until)),
        };
        Some(self.last_received().into_iter().chain(waits).max()? + after)
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.0.started).as_nanos()).unwrap_or(u64::MAX)
    }

    /// When the last bytes of the request's body arrived, if any did: from then on the upstream is waited for.
    #[must_use]
    pub fn last_received(&self) -> Option<Instant> {
        let nanos = self.0.last_received.load(Ordering::Relaxed);
        (nanos > 0).then(|| self.0.started + Duration::from_nanos(nanos))
    }

    /// Bytes of the response's body, or of the tunnel towards the client, so far.
    #[must_use]
    pub fn sent(&self) -> &AtomicU64 {
        &self.0.sent
    }

    /// Since when an upstream is waited for that was asked at `begun`: since the last byte of the request's body, where
    /// that came later.
    #[must_use]
    pub fn waiting_since(upload: Option<&Self>, begun: Instant) -> Instant {
        upload.and_then(Self::last_received).map_or(begun, |last| last.max(begun))
    }

    /// Notes that `error` has cut the response off, or kept it from coming.
    pub fn cut(&self, error: &(dyn std::error::Error + 'static)) {
        let kind = Error::find(error).map_or(Kind::Internal, Error::kind);
        let by = match (kind, kind.fault()) {
            (Kind::UpstreamTimeout | Kind::DeadlineExceeded | Kind::ClientTimeout, _) => AbortedBy::Timeout,
            (_, Fault::Client) => AbortedBy::Client,
            (_, Fault::Upstream) => AbortedBy::Upstream,
            (_, Fault::Sidegate) => AbortedBy::Sidegate,
        };
        let mut facts = self.facts();
        facts.error = Some(kind.slug());
        facts.cause = Some(chain(error));
        facts.aborted_by = Some(by);
    }

    /// Notes that the request is sent again for a pooled connection that the upstream had closed. False where that was done
    /// before, and is not to be done again.
    #[must_use]
    pub fn repeat(&self) -> bool {
        let mut facts = self.facts();
        let first = !std::mem::replace(&mut facts.repeated, true);
        facts.retries += u32::from(first);
        first
    }

    /// The facts, to read or to write. Held for a few instructions, never over an `.await`.
    pub fn facts(&self) -> MutexGuard<'_, Facts> {
        self.0.facts.lock()
    }
}

/// The client's address: found through trusted proxies, or that of the peer where no [`Exchange`] was begun. None for a
/// Unix socket.
#[must_use]
pub fn client_ip(extensions: &Extensions) -> Option<IpAddr> {
    match extensions.get::<Exchange>() {
        Some(exchange) => exchange.facts().client_ip,
        None => extensions.get::<Connection>()?.peer().ip(),
    }
}

/// The request that an error document is about.
#[derive(Debug)]
pub enum Subject {
    /// In the record, which every answer ends in: nothing needs to be copied for the rare one that fails.
    Recorded(Exchange),
    /// Here, where no access log stands outside.
    Kept {
        /// The target.
        uri: Uri,
        /// The correlation id.
        request_id: Option<HeaderValue>,
    },
}

impl Subject {
    /// What is to be remembered of `request`.
    #[must_use]
    pub fn of<B>(request: &http::Request<B>) -> Self {
        match Exchange::of(request) {
            Some(exchange) => Self::Recorded(exchange.clone()),
            None => Self::Kept {
                uri: request.uri().clone(),
                request_id: request.extensions().get().map(|RequestId(id)| id.clone()),
            },
        }
    }

    /// Its record.
    #[must_use]
    pub fn exchange(&self) -> Option<&Exchange> {
        match self {
            Self::Recorded(exchange) => Some(exchange),
            Self::Kept { .. } => None,
        }
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &str {
        match self {
            Self::Recorded(exchange) => exchange.asked().uri.path(),
            Self::Kept { uri, .. } => uri.path(),
        }
    }

    /// Its correlation id.
    #[must_use]
    pub fn request_id(&self) -> Option<&str> {
        let id = match self {
            Self::Recorded(exchange) => &exchange.asked().request_id,
            Self::Kept { request_id, .. } => request_id,
        };
        id.as_ref().and_then(|id| id.to_str().ok())
    }
}
