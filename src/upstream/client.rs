//! The client: row 21 of the request path. Sends a request to one endpoint and streams its response back.
//!
//! HTTP/1.1 connections are pooled, HTTP/2 multiplexes over one. An HTTP/1.1 connection has no task of its
//! own: whoever waits for its response or reads its body drives it, so that a frame costs no switch of tasks
//! and a burst of frames is read, gathered and handed on in one turn. Dropping the response's future or its
//! body cancels the request upstream at once: the HTTP/1.1 connection is closed, the HTTP/2 stream is reset. A body that
//! breaks off fails with [`Kind::UpstreamReset`], so that nobody downstream takes it for complete; over HTTP/2 that is
//! every body without an `END_STREAM`, whatever the stream was reset with.
//!
//! A request that a pooled connection did not take is sent again on another: it was never on the wire. One
//! that was written to a pooled connection that the upstream had meanwhile closed is sent once more if it is
//! idempotent and has no body (RFC 9112 §9.3.1). That is believed where the end comes at once and without a byte, and once
//! in all attempts for a client's request: an upstream that dies of the request looks the same. Such a repetition shows
//! as `outcome="repeated"` in `upstream_attempts` and in the access log's `retries`; a retry's budget does not
//! count it. Sent once more is also, over HTTP/2, a request that the upstream refused to begin with.

use std::{
    future::poll_fn,
    mem,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::FutureExt;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, Version,
    header::{
        CONNECTION, COOKIE, EXPECT, HOST, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, TE, TRANSFER_ENCODING, UPGRADE,
    },
    uri::{Authority, PathAndQuery, Scheme},
};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::{
    body::Incoming,
    client::conn::{TrySendError, http1, http2},
    ext::Protocol as Extended,
    upgrade::OnUpgrade,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, de};
use tokio::{
    sync::Mutex,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tower::Service;

use super::{
    Address,
    connect::{self, Connector, Heard, LastWord},
    gather::Gather,
    pool::Pool,
    tunnel,
    upload::{Progress, Upload},
};
use crate::{
    config::{
        HumanDuration, Toggle,
        file::Content,
        problem::{Check, Problems, check_readable},
    },
    message::{Body, BoxError, Error, Kind, Request, TunnelIdle, headers::X_ACCEL_BUFFERING},
    sse,
    telemetry::{Exchange, Metrics, log::chain, metrics::EndpointMetrics},
};

/// How requests are sent to the endpoints of an upstream.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Config {
    /// What is spoken.
    pub protocol: Protocol,
    /// What stands in `Host`.
    pub host: Option<Host>,
    /// Whom to trust.
    pub tls: Tls,
    /// What is kept open.
    pub pool: PoolConfig,
}

/// The version of HTTP that is spoken to the endpoints. Key `protocol` of an upstream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1. The default.
    #[default]
    Http1,
    /// HTTP/2: with prior knowledge over `http://`, by ALPN over `https://`. gRPC needs it.
    Http2,
}

/// What stands in the `Host` field of a request that goes upstream. Key `host` of an upstream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Host {
    /// What the client sent. The default for `http://` and `unix:`.
    Preserve,
    /// The endpoint's own name. The default for `https://`, whose servers go by it.
    Endpoint,
    /// This.
    Literal(HeaderValue),
}

impl<'de> Deserialize<'de> for Host {
    fn deserialize<D: de::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        Ok(match text.as_str() {
            "preserve" => Self::Preserve,
            "endpoint" => Self::Endpoint,
            host => {
                let wrong = || de::Error::custom(format!("`{host}` is no host: `preserve`, `endpoint` or HOST[:PORT]"));
                let authority: Authority = host.parse().map_err(|_| wrong())?;
                if authority.as_str().contains('@') {
                    return Err(wrong());
                }
                Self::Literal(HeaderValue::from_str(host).map_err(|_| wrong())?)
            }
        })
    }
}

impl Serialize for Host {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Preserve => to.serialize_str("preserve"),
            Self::Endpoint => to.serialize_str("endpoint"),
            // An authority, which is ASCII.
            Self::Literal(host) => to.collect_str(&String::from_utf8_lossy(host.as_bytes())),
        }
    }
}

impl JsonSchema for Host {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Host".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "description": "`preserve`, `endpoint`, or a host to send.",
        })
    }
}

/// Whom `https://` endpoints are believed. Section `tls` of an upstream.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "UpstreamTls")]
pub struct Tls {
    /// A PEM file with the certificates to trust. Default: the system's roots.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<std::path::PathBuf>,
    /// What it says.
    #[serde(skip)]
    pub content: Content,
}

impl Check for Tls {
    fn check(&self, problems: &mut Problems) {
        if let Some(ca) = &self.ca
            && check_readable("ca", ca, problems)
            && let Err(error) = connect::tls(Some(ca), b"")
        {
            problems.add("ca", format!("no usable certificate in {error}"));
        }
    }
}

/// Which connections are kept open. Section `pool` of an upstream.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Pool")]
pub struct PoolConfig {
    /// How long an unused HTTP/1.1 connection is kept; `off` keeps none. Default `55s`. Where the upstream
    /// closes its own sooner that is seen and borne, but a value below the upstream's is better.
    pub idle: Toggle<HumanDuration>,
    /// The most unused connections that are kept for an endpoint. Default 1024.
    pub max_idle: u32,
}

impl Default for PoolConfig {
    fn default() -> Self {
        Self { idle: Toggle::On(HumanDuration::from_secs(55)), max_idle: 1024 }
    }
}

/// Sends requests to one endpoint. Cheap to clone; clones share the pool.
#[derive(Clone)]
pub struct Client {
    endpoint: Arc<Endpoint>,
    connect: Duration,
}

/// What the clones share.
struct Endpoint {
    upstream: Arc<str>,
    name: Arc<str>,
    protocol: Protocol,
    scheme: Scheme,
    /// What `Host` is set to.
    host: Option<HeaderValue>,
    /// The endpoint's name, for a request without a host.
    own_host: HeaderValue,
    connector: Connector,
    pool: Arc<Pool<Connection>>,
    shared: Mutex<Option<(Multiplexed, Task)>>,
    metrics: EndpointMetrics,
    _sweep: Task,
}

/// An HTTP/1.1 connection: the side that takes requests, and the side that moves bytes while it is polled.
struct Connection {
    send: http1::SendRequest<Body>,
    /// How often something was heard over it.
    reads: Arc<AtomicU64>,
    /// `None` once it has ended. Dropping it is what fails a request that it had not yet taken: kept, that
    /// request would wait for ever.
    drive: Option<Drive>,
}

type Drive = Pin<Box<dyn Future<Output = hyper::Result<()>> + Send>>;

impl Connection {
    /// Moves what can be moved. How a connection ends, its response says better.
    fn drive(&mut self, cx: &mut Context<'_>) {
        if self.drive.as_mut().is_some_and(|drive| drive.as_mut().poll(cx).is_ready()) {
            self.drive = None;
        }
    }

    /// Whether the connection takes a request now. Sees what has come over it since it was used: most often
    /// nothing, sometimes its end.
    fn poll_usable(&mut self, cx: &mut Context<'_>) -> bool {
        self.drive(cx);
        self.drive.is_some() && self.send.is_ready()
    }
}

/// The side of an HTTP/2 connection that takes requests.
#[derive(Clone)]
struct Multiplexed {
    send: http2::SendRequest<Body>,
    /// How often something was heard over it.
    reads: Arc<AtomicU64>,
    silence: Arc<Silence>,
}

/// How long requests over an HTTP/2 connection have waited in vain since something was last heard over it.
struct Silence {
    /// So long that the connection takes no more.
    deaf: AtomicBool,
    waits: parking_lot::Mutex<Waits>,
}

/// Waits that came to nothing: after so many reads, so long in all, up to this moment.
struct Waits {
    reads: u64,
    together: Duration,
    until: Instant,
}

impl Silence {
    fn new() -> Self {
        let waits = Waits { reads: 0, together: Duration::ZERO, until: Instant::now() };
        Self { deaf: AtomicBool::new(false), waits: parking_lot::Mutex::new(waits) }
    }

    /// Adds a wait `since` then, after so many reads.
    fn add(&self, since: Instant, reads: u64) {
        let now = Instant::now();
        let mut waits = self.waits.lock();
        if waits.reads != reads {
            *waits = Waits { reads, together: Duration::ZERO, until: since };
        }
        // Of those that waited together, each moment once.
        let alone = now.saturating_duration_since(waits.until.max(since));
        waits.together += alone;
        waits.until = now;
        if waits.together >= DEAF {
            self.deaf.store(true, Ordering::Relaxed);
        }
    }
}

/// Within this time, the way to the most distant of upstreams and back, a pooled connection shows that it had been closed
/// before a request was written to it. What ends later ends with the request.
const AT_ONCE: Duration = Duration::from_millis(500);

/// After this long without an answer, and without any sign of the upstream, requests that are given up take their HTTP/2
/// connection with them, for those to come.
const DEAF: Duration = Duration::from_secs(1);

/// A request over HTTP/2 that waits for its answer.
///
/// A peer that vanished without a word is not seen for as long as TCP tries again, a quarter of an hour, and all
/// requests would go the same way. A connection where requests waited in vain, one for [`DEAF`] or several that are
/// given up sooner for as long in all, is therefore left to the streams that it has. PINGs would tell more, but
/// servers of gRPC take them amiss.
struct Waiting {
    on: Multiplexed,
    since: Instant,
    reads: u64,
}

impl Waiting {
    fn new(on: Multiplexed) -> Self {
        Self { since: Instant::now(), reads: on.reads.load(Ordering::Relaxed), on }
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if self.on.reads.load(Ordering::Relaxed) == self.reads {
            self.on.silence.add(self.since, self.reads);
        }
    }
}

/// A task that ends when its owner is dropped.
struct Task(JoinHandle<()>);

impl Task {
    #[expect(clippy::disallowed_methods, reason = "the handle that is made of it is the owner")]
    fn spawn(future: impl Future<Output = ()> + Send + 'static) -> Self {
        Self(tokio::spawn(future))
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl Client {
    /// A client of the endpoint at `address`, logged and counted as one of `upstream`'s. Nothing is opened
    /// yet. Needs a tokio runtime.
    ///
    /// # Errors
    /// The certificates to trust cannot be had.
    pub fn new(upstream: &str, address: &Address, config: &Config, metrics: &Metrics) -> Result<Self, BoxError> {
        Self::dialling(upstream, address, None, config, metrics)
    }

    /// The same, which connects to `dial`, one of the addresses that the name in `address` stands for, and is called by
    /// it. TLS and `Host` still go by the name.
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn dialling(
        upstream: &str,
        address: &Address,
        dial: Option<SocketAddr>,
        config: &Config,
        metrics: &Metrics,
    ) -> Result<Self, BoxError> {
        let alpn: &[u8] = match config.protocol {
            Protocol::Http1 => b"http/1.1",
            Protocol::Http2 => b"h2",
        };
        let tls = address.tls().then(|| connect::tls(config.tls.ca.as_deref(), alpn)).transpose()?;
        let name = dial.map_or_else(|| address.to_string(), |dial| dial.to_string());
        let own_host = match address {
            Address::Unix(_) => HeaderValue::from_static("localhost"),
            Address::Tcp { authority, tls } => {
                let usual = authority.port_u16() == Some(if *tls { 443 } else { 80 });
                HeaderValue::from_str(if usual { authority.host() } else { authority.as_str() })?
            }
        };
        let host = match &config.host {
            Some(Host::Literal(host)) => Some(host.clone()),
            Some(Host::Endpoint) => Some(own_host.clone()),
            Some(Host::Preserve) => None,
            None => address.tls().then(|| own_host.clone()),
        };
        let keep = config.pool.idle.on().map_or(Duration::ZERO, HumanDuration::get);
        let most = if keep.is_zero() { 0 } else { config.pool.max_idle as usize };
        let pool = Arc::new(Pool::new(most, keep));
        let sweep = Task::spawn(sweep(pool.clone(), keep));
        let endpoint = Endpoint {
            upstream: upstream.into(),
            protocol: config.protocol,
            scheme: if address.tls() { Scheme::HTTPS } else { Scheme::HTTP },
            host,
            own_host,
            connector: Connector::new(address, dial, tls)?,
            pool,
            shared: Mutex::new(None),
            metrics: metrics.endpoint(upstream, &name),
            name: name.into(),
            _sweep: sweep,
        };
        Ok(Self { endpoint: Arc::new(endpoint), connect: HumanDuration::from_secs(5).get() })
    }

    /// Opens a connection and closes it.
    ///
    /// # Errors
    /// There is none to be had.
    pub(super) async fn probe(&self) -> Result<(), BoxError> {
        timeout(self.connect, self.endpoint.connector.connect()).await?.map(drop)
    }

    /// Lets go of the HTTP/2 connection, so that the next request opens one of its own. (HTTP/1.1 has `pool` for that.)
    pub(super) async fn disconnect(&self) {
        self.endpoint.shared.lock().await.take();
    }

    /// The same client, which gives up connecting after `connect`. Default 5 s.
    #[must_use]
    pub fn with_connect_timeout(mut self, connect: Duration) -> Self {
        self.connect = connect;
        self
    }
}

/// Closes connections that nobody has used for `keep`, or that the upstream has closed.
async fn sweep(pool: Arc<Pool<Connection>>, keep: Duration) {
    if keep.is_zero() {
        return;
    }
    loop {
        sleep(keep.clamp(Duration::from_millis(100), Duration::from_secs(5))).await;
        pool.sweep(|connection| connection.poll_usable(&mut Context::from_waker(Waker::noop())));
    }
}

impl Service<Request> for Client {
    type Response = http::Response<ResponseBody>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let client = self.clone();
        Box::pin(async move {
            let mut attempt = Attempt { metrics: &client.endpoint.metrics, over: false };
            let result = client.send(&mut request).await;
            attempt.over = true;
            match &result {
                Ok(_) => attempt.metrics.answered.inc(),
                Err(_) => attempt.metrics.failed.inc(),
            };
            result.map_err(Into::into)
        })
    }
}

/// Counts an attempt whose client left before it was over.
struct Attempt<'a> {
    metrics: &'a EndpointMetrics,
    over: bool,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.over {
            self.metrics.cancelled.inc();
        }
    }
}

impl Client {
    /// The request is lent, all the way down: a future that is handed it keeps a place for it.
    async fn send(&self, request: &mut Request) -> Result<http::Response<ResponseBody>, Error> {
        let endpoint = &*self.endpoint;
        let exchange = Exchange::of(request).cloned();
        if let Some(exchange) = &exchange {
            let mut facts = exchange.facts();
            facts.upstream = Some(endpoint.upstream.clone());
            facts.endpoint = Some(endpoint.name.clone());
        }
        let upgrade = Upgrade::of(request, endpoint.protocol, exchange);
        let progress = track(request);
        endpoint.address(request)?;
        let answer = match endpoint.protocol {
            Protocol::Http1 => self.http1(request).await,
            // Boxed, as is `open`: what is rare must not make the future of every request larger.
            Protocol::Http2 => Box::pin(self.http2(request)).await,
        };
        let (mut response, mut lease) =
            answer.map_err(|error| match (error.kind(), ended_by(progress.as_deref())) {
                (Kind::UpstreamReset, kind) if kind != Kind::UpstreamReset => Error::new(kind, error),
                _ => error,
            })?;
        let unfinished = progress.filter(|progress| !progress.done());
        if let Some(progress) = &unfinished {
            // An answer before the end of the upload. The rest may go on while nobody reads the answer.
            progress.want();
            lease.detach();
        }
        if sse::is_event_stream(response.headers()) {
            // Only an absent field: what the backend says to an nginx outside of us is its own business.
            response.headers_mut().entry(X_ACCEL_BUFFERING).or_insert(HeaderValue::from_static("no"));
        }
        if let Some(upgrade) = upgrade
            && upgrade.accepted(&response)
        {
            return Ok(upgrade.tunnel(response, lease));
        }
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            // Not asked for, or to something else. What follows is no HTTP: the connection must neither be read
            // on nor go back to its pool.
            return Err(Error::new(Kind::UpstreamReset, "a switch of protocols that was not asked for"));
        }
        // The version is that of one hop (RFC 9110 §6.2), and what hyper's server answers with.
        *response.version_mut() = Version::HTTP_11;
        Ok(response.map(|incoming| ResponseBody::new(incoming, lease, unfinished)))
    }

    async fn http1(&self, request: &mut Request) -> Result<(http::Response<Incoming>, Lease), Error> {
        let endpoint = &self.endpoint;
        let mut spent = false;
        loop {
            let pooled = if spent { None } else { poll_fn(|cx| Poll::Ready(endpoint.pooled(cx))).await };
            let reused = pooled.is_some();
            let mut connection = match pooled {
                Some(connection) => connection,
                None => Box::pin(self.open()).await?,
            };
            let kept = reused && may_repeat(request);
            let before = kept.then(|| (Instant::now(), connection.reads.load(Ordering::Relaxed)));
            let outgoing = if kept { copy(request) } else { mem::take(request) };
            let mut error = match connection.exchange(outgoing).await {
                Ok(response) => return Ok((response, Lease::Http1 { connection, pool: endpoint.pool.clone() })),
                Err(error) if !reused => return Err(broken(error.into_error())),
                Err(error) => error,
            };
            match error.take_message() {
                // It was never on the wire: any request may be sent again.
                Some(unsent) if !kept => *request = unsent,
                Some(_) => {}
                None => {
                    let stale = before.is_some_and(|(begun, reads)| {
                        begun.elapsed() < AT_ONCE
                            && connection.reads.load(Ordering::Relaxed) == reads
                            && closed_before(error.error())
                    });
                    // Once: other pooled connections are as likely to be stale.
                    if !stale || Exchange::of(request).is_some_and(|exchange| !exchange.repeat()) {
                        return Err(broken(error.into_error()));
                    }
                    endpoint.metrics.repeated.inc();
                    spent = true;
                }
            }
        }
    }

    /// A new HTTP/1.1 connection.
    async fn open(&self) -> Result<Connection, Error> {
        let reads = Arc::default();
        let io = LastWord::new(Heard::new(self.dial().await?, Arc::clone(&reads)));
        let failed = |error| Error::new(Kind::ConnectFailed, error);
        let (send, connection) = http1::Builder::new().handshake(TokioIo::new(io)).await.map_err(failed)?;
        let mut connection = Connection { send, reads, drive: Some(Box::pin(connection.with_upgrades())) };
        // The first turn makes it ready.
        poll_fn(|cx| Poll::Ready(connection.poll_usable(cx))).await;
        Ok(connection)
    }

    async fn http2(&self, request: &mut Request) -> Result<(http::Response<Incoming>, Lease), Error> {
        let (mut fresh, mut spent) = (false, false);
        loop {
            // All of it: the wait for somebody else's attempt, too, so that attempts which fail do not add up.
            let connection = timeout(self.connect, self.multiplexed(&mut fresh)).await;
            let mut connection = connection.map_err(|late| Error::new(Kind::ConnectFailed, late))??;
            let kept = !spent && request.body().is_end_stream() && request.method() != Method::CONNECT;
            let outgoing = if kept { copy(request) } else { mem::take(request) };
            let waiting = Waiting::new(connection.clone());
            let answer = connection.send.try_send_request(outgoing).await;
            drop(waiting);
            let mut error = match answer {
                Ok(response) => return Ok((response, Lease::Http2 { _endpoint: self.endpoint.clone() })),
                Err(error) => error,
            };
            match error.take_message() {
                // The connection was going away. A new one is not excused.
                Some(_) if fresh => return Err(broken(error.into_error())),
                Some(unsent) if !kept => *request = unsent,
                Some(_) => {}
                None if kept && refused(error.error(), request.method().is_idempotent()) => {
                    (fresh, spent) = (false, true);
                }
                None => return Err(broken(error.into_error())),
            }
        }
    }

    /// The HTTP/2 connection, opened by whoever needs it first while the others wait; `fresh` if it is new.
    async fn multiplexed(&self, fresh: &mut bool) -> Result<Multiplexed, Error> {
        let mut shared = self.endpoint.shared.lock().await;
        if let Some((connection, _)) = &*shared
            && !connection.send.is_closed()
            && !connection.silence.deaf.load(Ordering::Relaxed)
        {
            return Ok(connection.clone());
        }
        *fresh = true;
        let reads = Arc::default();
        let io = Heard::new(self.dial().await?, Arc::clone(&reads));
        let (send, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(1 << 20)
            .initial_connection_window_size(16 << 20)
            .handshake(TokioIo::new(io))
            .await
            .map_err(|error| Error::new(Kind::ConnectFailed, error))?;
        let name = self.endpoint.name.clone();
        let task = Task::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(endpoint = %name, error = chain(&error), "upstream connection broke");
            }
        });
        let connection = Multiplexed { send, reads, silence: Arc::new(Silence::new()) };
        // The streams of the one before go on without its task.
        *shared = Some((connection.clone(), task));
        Ok(connection)
    }

    async fn dial(&self) -> Result<connect::Io, Error> {
        let io = match timeout(self.connect, self.endpoint.connector.connect()).await {
            Ok(Ok(io)) => io,
            Ok(Err(error)) => return Err(Error::new(Kind::ConnectFailed, error)),
            Err(late) => return Err(Error::new(Kind::ConnectFailed, late)),
        };
        self.endpoint.metrics.connected.inc();
        Ok(io)
    }
}

impl Connection {
    /// Sends a request and drives the connection until the head of the response is there.
    fn exchange(
        &mut self,
        request: Request,
    ) -> impl Future<Output = Result<http::Response<Incoming>, TrySendError<Request>>> {
        let response = self.send.try_send_request(request);
        async move {
            // What else has come in meanwhile goes through the layers first, and then all of it is written: code
            // that many requests run through one after the other stays in the processor's cache, and the
            // upstream is woken once for many.
            tokio::task::yield_now().await;
            let mut response = pin!(response);
            poll_fn(|cx| {
                self.drive(cx);
                response.as_mut().poll(cx)
            })
            .await
        }
    }
}

impl Endpoint {
    /// A pooled connection that is ready for a request.
    fn pooled(&self, cx: &mut Context<'_>) -> Option<Connection> {
        std::iter::from_fn(|| self.pool.take())
            .find_map(|mut connection| connection.poll_usable(cx).then_some(connection))
    }

    /// Turns the request from the client's side to the endpoint's: target, version, `Host`.
    fn address(&self, request: &mut Request) -> Result<(), Error> {
        let unusable = |_| Error::from(Kind::BadRequest("the request has no usable target"));
        if let Some(host) = &self.host {
            request.headers_mut().insert(HOST, host.clone());
        }
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        match self.protocol {
            Protocol::Http1 => {
                if request.version() == Version::HTTP_2 {
                    join_cookies(request.headers_mut());
                }
                *request.version_mut() = Version::HTTP_11;
                let framed = request.body().is_end_stream() || request.body().size_hint().exact().is_some();
                let headers = request.headers_mut();
                // Only a hop that `Connection: te` names it to would understand it.
                headers.remove(TE);
                // Hyper sends no body of unknown length with GET and its like unless it is told to.
                if !framed {
                    headers.insert(TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
                }
                // HTTP/1.0 may come without, HTTP/1.1 must not go without.
                if !headers.contains_key(HOST) {
                    headers.insert(HOST, self.own_host.clone());
                }
                *request.uri_mut() = path.into();
            }
            Protocol::Http2 => {
                *request.version_mut() = Version::HTTP_2;
                let host = request.headers_mut().remove(HOST);
                let authority = host.as_ref().unwrap_or(&self.own_host).as_bytes();
                *request.uri_mut() = Uri::builder()
                    .scheme(self.scheme.clone())
                    .authority(authority)
                    .path_and_query(path)
                    .build()
                    .map_err(unusable)?;
            }
        }
        Ok(())
    }
}

/// Wraps a body that is to be sent, so that it is known when it is through, and honours `Expect`: once. What has begun to
/// arrive for an attempt before was asked for, and is sent to the next upstream without a word.
fn track(request: &mut Request) -> Option<Arc<Progress>> {
    if request.body().is_end_stream() {
        return None;
    }
    let offered =
        request.headers().get(EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"));
    let begun = offered && Exchange::of(request).is_some_and(|exchange| exchange.last_received().is_some());
    if begun {
        request.headers_mut().remove(EXPECT);
    }
    let offered = offered && !begun;
    let (upload, progress) = Upload::new(std::mem::take(request.body_mut()), offered);
    if let (Some(until), Some(exchange)) = (upload.held_until(), Exchange::of(request)) {
        exchange.hold_upload(until);
    }
    *request.body_mut() = Body::new(upload);
    if offered {
        let progress = progress.clone();
        hyper::ext::on_informational(request, move |response| {
            if response.status() == StatusCode::CONTINUE {
                progress.want();
            }
        });
    }
    Some(progress)
}

/// Puts the crumbs into which HTTP/2 clients break their cookies together: HTTP/1.1 has one `Cookie` field
/// (RFC 9113 §8.2.3), and many a backend reads the first only.
fn join_cookies(headers: &mut HeaderMap) {
    let mut crumbs = headers.get_all(COOKIE).iter().map(HeaderValue::as_bytes);
    let (Some(first), Some(second)) = (crumbs.next(), crumbs.next()) else { return };
    let joined = [first, second].into_iter().chain(crumbs).collect::<Vec<_>>().join(&b"; "[..]);
    let joined = HeaderValue::from_maybe_shared(Bytes::from(joined)).expect("what is joined of values is a value");
    headers.insert(COOKIE, joined);
}

/// Whether a request may be sent again although its first copy was written (RFC 9110 §9.2.2).
fn may_repeat(request: &Request) -> bool {
    request.method().is_idempotent() && request.body().is_end_stream() && !request.headers().contains_key(UPGRADE)
}

fn copy(request: &Request) -> Request {
    let mut copy = Request::new(Body::empty());
    *copy.method_mut() = request.method().clone();
    *copy.uri_mut() = request.uri().clone();
    *copy.version_mut() = request.version();
    copy.headers_mut().clone_from(request.headers());
    copy
}

/// Whether the connection ended: what a stale one does.
fn closed_before(error: &hyper::Error) -> bool {
    use std::{error::Error as _, io};
    let reset = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .is_some_and(|error| matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe));
    error.is_incomplete_message() || error.is_canceled() || reset
}

/// Whether an HTTP/2 upstream has refused a request that may therefore be sent again: any that it says it has not
/// begun with (RFC 9113 §8.7), and one that is `idempotent` where it goes away. (That may mean that it has not
/// begun, too, but which streams it has begun with is not told.)
fn refused(error: &hyper::Error, idempotent: bool) -> bool {
    use std::error::Error as _;
    let error = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    error.is_some_and(|error| {
        error.is_remote()
            && (error.is_reset() && error.reason() == Some(h2::Reason::REFUSED_STREAM)
                || error.is_go_away() && idempotent)
    })
}

/// What a failed exchange with the upstream is to the layers outside.
fn broken(error: hyper::Error) -> Error {
    match Error::find(&error) {
        // The request's own body failed, with the kind of one of our layers.
        Some(own) => Error::new(own.kind(), error),
        None if error.is_user() => Error::new(Kind::ClientReset, error),
        None => Error::new(Kind::UpstreamReset, error),
    }
}

/// What an exchange ended by that the upstream seems to have broken off: the request's own body, where that did before.
/// Over HTTP/2, and once an answer has begun, hyper tells of the end of the stream or the connection that follows, and
/// not of the reason.
fn ended_by(upload: Option<&Progress>) -> Kind {
    upload.and_then(Progress::failed).unwrap_or(Kind::UpstreamReset)
}

/// What a response holds of its connection.
enum Lease {
    /// The whole connection, which goes back to its pool at the response's end.
    Http1 { connection: Connection, pool: Arc<Pool<Connection>> },
    /// A connection that still carries the request's body, in a task of its own. It is not used again.
    Detached { _send: http1::SendRequest<Body>, _task: Task },
    /// A stream of a connection that lives as long as its endpoint.
    Http2 { _endpoint: Arc<Endpoint> },
    /// Nothing any more.
    Ended,
}

impl Lease {
    /// Lets the connection drive itself.
    fn detach(&mut self) {
        *self = match mem::replace(self, Self::Ended) {
            Self::Http1 { connection: Connection { send, drive: Some(drive), .. }, .. } => {
                Self::Detached { _send: send, _task: Task::spawn(drive.map(drop)) }
            }
            Self::Http1 { .. } => Self::Ended,
            // A stream needs nobody to drive it.
            other => other,
        };
    }

    /// Gives the connection back.
    fn end(&mut self) {
        if let Self::Http1 { connection, pool } = mem::replace(self, Self::Ended)
            && connection.drive.is_some()
        {
            pool.put(connection);
        }
    }
}

pin_project! {
    /// The body of an upstream's response. Its end gives the connection back; dropping it sooner closes the
    /// connection, or resets the stream.
    pub struct ResponseBody {
        #[pin]
        body: Flow,
    }
}

pin_project! {
    #[project = FlowProjection]
    enum Flow {
        /// Its length is known: frames are as large as they come.
        Sized { #[pin] body: Driven },
        /// A stream, which may come in many small frames.
        Stream { #[pin] body: Gather<Driven> },
        /// A tunnel has taken its place.
        Nothing,
    }
}

impl ResponseBody {
    fn new(incoming: Incoming, mut lease: Lease, upload: Option<Arc<Progress>>) -> Self {
        if incoming.is_end_stream() {
            lease.end();
        }
        let sized = incoming.size_hint().exact().is_some();
        let body = Driven { incoming, lease, upload };
        Self { body: if sized { Flow::Sized { body } } else { Flow::Stream { body: Gather::new(body) } } }
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.project().body.project() {
            FlowProjection::Sized { body } => body.poll_frame(cx),
            FlowProjection::Stream { body } => body.poll_frame(cx),
            FlowProjection::Nothing => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.body {
            Flow::Sized { body } => body.is_end_stream(),
            Flow::Stream { body } => body.is_end_stream(),
            Flow::Nothing => true,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.body {
            Flow::Sized { body } => body.size_hint(),
            Flow::Stream { body } => body.size_hint(),
            Flow::Nothing => SizeHint::with_exact(0),
        }
    }
}

/// A body that drives the connection it comes over.
struct Driven {
    incoming: Incoming,
    lease: Lease,
    /// The request's body, where it was not through when the answer came.
    upload: Option<Arc<Progress>>,
}

impl Driven {
    /// The response broke off.
    fn broken(&mut self, why: impl Into<BoxError>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.lease = Lease::Ended;
        Poll::Ready(Some(Err(Error::new(ended_by(self.upload.as_deref()), why).into())))
    }
}

impl HttpBody for Driven {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let mut frame = Pin::new(&mut this.incoming).poll_frame(cx);
        if let (Poll::Pending, Lease::Http1 { connection, .. }) = (&frame, &mut this.lease) {
            connection.drive(cx);
            frame = Pin::new(&mut this.incoming).poll_frame(cx);
        }
        match ready!(frame) {
            Some(Ok(frame)) => {
                if this.incoming.is_end_stream() {
                    this.lease.end();
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => this.broken(error),
            // hyper takes a RST_STREAM with NO_ERROR for an end. It may follow a whole response, for a request that
            // need not be sent to its end (RFC 9113 §8.1); without an END_STREAM before it, it is none.
            None if matches!(this.lease, Lease::Http2 { .. }) && !this.incoming.is_end_stream() => {
                this.broken("the stream was reset before its end")
            }
            None => {
                this.lease.end();
                Poll::Ready(None)
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

/// A request to speak another protocol over the connection: HTTP/1.1's `Upgrade`, or HTTP/2's extended
/// `CONNECT` (RFC 8441).
struct Upgrade {
    client: OnUpgrade,
    /// The client asked by extended `CONNECT`, and the upstream by `Upgrade`.
    translated: bool,
    /// What the upstream is asked to switch to by `Upgrade`.
    asked: Option<HeaderValue>,
    exchange: Option<Exchange>,
    idle: Option<Duration>,
}

impl Upgrade {
    /// The upgrade that `request` asks for, if it does, with the request as the upstream has to be asked.
    fn of(request: &mut Request, protocol: Protocol, exchange: Option<Exchange>) -> Option<Self> {
        let extended = request.method() == Method::CONNECT && request.extensions().get::<Extended>().is_some();
        if !extended && !request.headers().contains_key(UPGRADE) {
            return None;
        }
        let idle = request.extensions().get().map(|TunnelIdle(after)| *after);
        let client = hyper::upgrade::on(&mut *request);
        match protocol {
            Protocol::Http1 if extended => translate(request),
            // The upstream is asked in its own way or not at all: ignoring an upgrade is allowed.
            Protocol::Http2 if !extended => {
                request.headers_mut().remove(UPGRADE);
                request.headers_mut().remove(CONNECTION);
                return None;
            }
            Protocol::Http1 | Protocol::Http2 => {}
        }
        let asked = request.headers().get(UPGRADE).cloned();
        Some(Self { client, translated: extended && protocol == Protocol::Http1, asked, exchange, idle })
    }

    /// Whether the upstream has changed to the protocol that it was asked for, and to no other.
    fn accepted(&self, response: &http::Response<Incoming>) -> bool {
        if response.version() == Version::HTTP_2 {
            return response.status().is_success();
        }
        let same =
            |(asked, chosen): (&HeaderValue, &HeaderValue)| asked.as_bytes().eq_ignore_ascii_case(chosen.as_bytes());
        response.status() == StatusCode::SWITCHING_PROTOCOLS
            && self.asked.as_ref().zip(response.headers().get(UPGRADE)).is_some_and(same)
    }

    fn tunnel(self, mut response: http::Response<Incoming>, mut lease: Lease) -> http::Response<ResponseBody> {
        let upstream = hyper::upgrade::on(&mut response);
        if let Some(exchange) = &self.exchange {
            exchange.facts().tunnel = Some(Box::new(()));
        }
        lease.detach();
        let carry = async move {
            // The connection must live at least until it is handed over; then it lives by itself.
            let _lease = lease;
            tunnel::run(self.client, upstream, self.exchange, self.idle).await;
        };
        #[expect(clippy::disallowed_methods, reason = "it ends with either connection, or with their silence")]
        drop(tokio::spawn(carry));
        if self.translated {
            *response.status_mut() = StatusCode::OK;
            for name in [CONNECTION, UPGRADE, SEC_WEBSOCKET_ACCEPT] {
                response.headers_mut().remove(name);
            }
        }
        response.map(|_| ResponseBody { body: Flow::Nothing })
    }
}

/// Extended `CONNECT` as HTTP/1.1 asks for the same (RFC 8441 §5).
fn translate(request: &mut Request) {
    const SEC_WEBSOCKET_VERSION: HeaderName = http::header::SEC_WEBSOCKET_VERSION;
    let protocol = request.extensions_mut().remove::<Extended>();
    let protocol = protocol.and_then(|protocol| HeaderValue::from_str(protocol.as_str()).ok());
    *request.method_mut() = Method::GET;
    *request.body_mut() = Body::empty();
    let headers = request.headers_mut();
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol.unwrap_or(HeaderValue::from_static("websocket")));
    // HTTP/2 has no handshake key; the HTTP/1.1 upstream insists on one.
    headers.insert(SEC_WEBSOCKET_KEY, handshake_key());
    headers.entry(SEC_WEBSOCKET_VERSION).or_insert(HeaderValue::from_static("13"));
}

/// 16 random bytes in base64 (RFC 6455 §4.1).
fn handshake_key() -> HeaderValue {
    use base64::{Engine, engine::general_purpose::STANDARD};
    HeaderValue::try_from(STANDARD.encode(uuid::Uuid::new_v4().as_bytes())).expect("base64 is visible ASCII")
}

#[cfg(test)]
mod tests {
    use futures_util::future::join_all;
    use tokio::net::TcpListener;
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_connection_that_closes_before_it_took_a_request_gives_it_back() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap()).parse().unwrap();
        let client = Client::new("api", &address, &Config::default(), &Metrics::default()).unwrap();
        let mut connection = client.open().await.unwrap();
        drop(listener.accept().await.unwrap());
        tokio::task::yield_now().await;
        let request = http::Request::get("/").header(HOST, "a").body(Body::empty()).unwrap();
        let failed = timeout(Duration::from_secs(5), connection.exchange(request)).await.expect("no hang");
        assert!(failed.unwrap_err().take_message().is_some(), "nothing of it was sent");
        assert!(!poll_fn(|cx| Poll::Ready(connection.poll_usable(cx))).await);
    }

    #[tokio::test(start_paused = true)]
    async fn waits_in_vain_add_up_until_something_is_heard() {
        let (silence, ms) = (Silence::new(), Duration::from_millis);
        let deaf = || silence.deaf.load(Ordering::Relaxed);
        let wait = async |reads| {
            let since = Instant::now();
            tokio::time::advance(ms(400)).await;
            silence.add(since, reads);
            // Another that waited beside it.
            silence.add(since + ms(100), reads);
        };
        for reads in [0, 0, 7, 7] {
            tokio::time::advance(ms(60_000)).await;
            wait(reads).await;
            assert!(!deaf());
        }
        wait(7).await;
        assert!(deaf());
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_attempt_of_another_waits_no_longer_than_for_its_own() {
        // It takes connections, and says nothing.
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = format!("https://{}", listener.local_addr().unwrap()).parse().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let ca = folder.path().join("ca.pem");
        let certificate = rcgen::generate_simple_self_signed(["a".to_owned()]).unwrap();
        std::fs::write(&ca, certificate.cert.pem()).unwrap();
        let config =
            Config { protocol: Protocol::Http2, tls: Tls { ca: Some(ca), ..Tls::default() }, ..Config::default() };
        let client = Client::new("api", &address, &config, &Metrics::default()).unwrap();
        let begun = Instant::now();
        let ask = || client.clone().oneshot(http::Request::get("/").body(Body::empty()).unwrap());
        for answer in join_all([ask(), ask(), ask()]).await {
            let error = answer.err().expect("nobody is there");
            assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::ConnectFailed));
        }
        assert_eq!(begun.elapsed().as_secs(), 5);
    }
}
