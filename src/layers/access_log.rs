//! Access log and metrics: row 2 of the request path.
//!
//! One line and one set of samples per request, made when the exchange is over: when the response's body
//! has been sent whole, when it was cut, or when the client has left, and the line says which. A stream is
//! therefore logged at its end, with its true length. The line is written by hand and not as a `tracing`
//! event, because it is the one thing that is logged per request.
//!
//! The layer makes the [`Exchange`] that the layers inside write their findings into.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::{layers::access_log::AccessLogLayer, message::Body, telemetry::Metrics};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let metrics = Metrics::new();
//! let service = ServiceBuilder::new()
//!     .layer(AccessLogLayer::new(None, metrics.clone()))
//!     .service(service_fn(|_: Request<Body>| async { Ok::<_, std::convert::Infallible>(Response::new(Body::empty())) }));
//! let response = service.clone().oneshot(Request::new(Body::empty())).await.unwrap();
//! drop(response);
//! // They are there for as long as the service is.
//! assert!(metrics.encode().contains(r#"sidegate_requests_total{route="none",status_class="2xx"} 1"#));
//! # });
//! ```

use std::{
    fmt,
    io::Write,
    net::IpAddr,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderValue, Method, Request, Response, StatusCode};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::{
    message::{Body, BoxError, Session},
    telemetry::{
        Exchange, Metrics,
        exchange::CacheOutcome,
        log::{Writer, timestamp, write_timestamp},
        metrics::{AbortedBy, RouteMetrics},
    },
};

/// Logs and counts each request at its end: see the [module](self).
#[derive(Debug, Clone)]
pub struct AccessLogLayer {
    sinks: Arc<Sinks>,
}

#[derive(Debug)]
struct Sinks {
    log: Option<Writer>,
    metrics: Metrics,
    unrouted: Arc<RouteMetrics>,
    hides_sessions: bool,
}

impl AccessLogLayer {
    /// Counts in `metrics` and, where there is a `log`, writes a line. Requests that no route took are
    /// counted under the route `none`.
    #[must_use]
    pub fn new(log: Option<Writer>, metrics: Metrics) -> Self {
        let unrouted = metrics.route("none");
        Self { sinks: Arc::new(Sinks { log, metrics, unrouted, hides_sessions: false }) }
    }

    /// The same, where sidegate makes sessions: `session_id` is what it calls the one that it found, and never
    /// what a client sent in `x-session-id`, which may be the credential of a session.
    #[must_use]
    pub fn hiding_sessions(self) -> Self {
        let Sinks { log, metrics, unrouted, .. } = &*self.sinks;
        let (log, metrics, unrouted) = (log.clone(), metrics.clone(), unrouted.clone());
        Self { sinks: Arc::new(Sinks { log, metrics, unrouted, hides_sessions: true }) }
    }
}

impl<S> Layer<S> for AccessLogLayer {
    type Service = AccessLog<S>;

    fn layer(&self, inner: S) -> AccessLog<S> {
        AccessLog { inner, sinks: self.sinks.clone() }
    }
}

/// The service of [`AccessLogLayer`].
#[derive(Debug, Clone)]
pub struct AccessLog<S> {
    inner: S,
    sinks: Arc<Sinks>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for AccessLog<S>
where
    S: Service<Request<Body>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ReqBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    ResBody: HttpBody<Data = Bytes, Error: Into<BoxError>>,
{
    type Response = Response<ResponseBody<ResBody>>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let exchange = Exchange::new(&request);
        let entry = Entry { exchange: exchange.clone(), sinks: self.sinks.clone(), status: None, ended: Ended::Early };
        let (mut parts, body) = request.into_parts();
        let body =
            if body.is_end_stream() { Body::empty() } else { Body::new(Received { body, exchange: exchange.clone() }) };
        parts.extensions.insert(exchange);
        ResponseFuture { inner: self.inner.call(Request::from_parts(parts, body)), entry: Some(entry) }
    }
}

pin_project! {
    /// The response of [`AccessLog`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        entry: Option<Entry>,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: HttpBody,
    E: Into<BoxError>,
{
    type Output = Result<Response<ResponseBody<B>>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let result = ready!(this.inner.poll(cx)).map_err(Into::into);
        let mut entry = this.entry.take().expect("a future is not polled after its end");
        Poll::Ready(match result {
            Ok(response) => {
                let entry = entry.head(&response);
                Ok(response.map(|body| ResponseBody { body, entry }))
            }
            Err(error) => {
                entry.fail(&*error);
                Err(error)
            }
        })
    }
}

pin_project! {
    /// A response body that ends its exchange when it ends.
    pub struct ResponseBody<B> {
        #[pin]
        body: B,
        entry: Option<Entry>,
    }
}

impl<B> HttpBody for ResponseBody<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        let Some(entry) = this.entry.as_mut() else {
            return Poll::Ready(frame.map(|result| result.map_err(Into::into)));
        };
        Poll::Ready(match frame {
            Some(Ok(frame)) => {
                let len = frame.data_ref().map_or(0, |data| data.len() as u64);
                entry.exchange.sent().fetch_add(len, Ordering::Relaxed);
                // Hyper does not ask again once it has all that was announced.
                if this.body.is_end_stream() {
                    entry.ended = Ended::Whole;
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                let error = error.into();
                entry.fail(&*error);
                *this.entry = None;
                Some(Err(error))
            }
            None => {
                entry.ended = Ended::Whole;
                *this.entry = None;
                None
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

pin_project! {
    /// A request body that counts itself.
    struct Received<B> {
        #[pin]
        body: B,
        exchange: Exchange,
    }
}

impl<B: HttpBody<Data = Bytes>> HttpBody for Received<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let this = self.project();
        let frame = this.body.poll_frame(cx);
        this.exchange.await_client(frame.is_pending());
        let frame = ready!(frame);
        if let Some(data) = frame.as_ref().and_then(|result| result.as_ref().ok()).and_then(Frame::data_ref) {
            this.exchange.receive(data.len());
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

/// The line to be. Dropping it writes it: nothing that can happen to an exchange goes unlogged.
#[derive(Debug)]
struct Entry {
    exchange: Exchange,
    sinks: Arc<Sinks>,
    status: Option<StatusCode>,
    ended: Ended,
}

#[derive(Debug, Clone, Copy)]
enum Ended {
    /// Not yet: if nothing more comes, the client has left.
    Early,
    /// All was sent.
    Whole,
    /// Something broke: what, is in the record.
    Cut,
}

impl Entry {
    /// Notes the head, and hands the entry to whatever ends the exchange: the body or the tunnel.
    fn head<B: HttpBody>(mut self, response: &Response<B>) -> Option<Self> {
        self.status = Some(response.status());
        let bodiless = self.exchange.asked().method == Method::HEAD
            || matches!(response.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
            || response.body().is_end_stream();
        if bodiless {
            self.ended = Ended::Whole;
        }
        let exchange = self.exchange.clone();
        let mut facts = exchange.facts();
        facts.first_byte = Some(exchange.started().elapsed());
        if facts.tunnel.is_some() {
            self.ended = Ended::Whole;
            // What others keep as long as the tunnel stays.
            let others = facts.tunnel.take();
            facts.tunnel = Some(Box::new((self, others)));
            return None;
        }
        drop(facts);
        Some(self)
    }

    fn fail(&mut self, error: &(dyn std::error::Error + 'static)) {
        self.ended = Ended::Cut;
        self.exchange.cut(error);
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        let took = self.exchange.started().elapsed();
        let received = self.exchange.received().load(Ordering::Relaxed);
        let sent = self.exchange.sent().load(Ordering::Relaxed);
        let facts = self.exchange.facts();
        let aborted_by = facts.aborted_by.or_else(|| match self.ended {
            Ended::Whole | Ended::Cut => None,
            Ended::Early if self.sinks.metrics.process().cutting.load(Ordering::Relaxed) => Some(AbortedBy::Sidegate),
            Ended::Early => Some(AbortedBy::Client),
        });
        let route = facts.route.as_ref().unwrap_or(&self.sinks.unrouted);
        route.finished(self.status, took, facts.first_byte);
        route.received.inc_by(received);
        route.sent.inc_by(sent);
        if let Some(by) = aborted_by {
            route.aborted(by);
        }
        // Made by sidegate and answered, that is: what cut a stream is in `aborted`.
        if let (Some(slug), Some(_)) = (facts.error, self.status) {
            self.sinks.metrics.error(slug);
        }
        let Some(log) = &self.sinks.log else { return };
        let asked = self.exchange.asked();
        let shown = asked.session_id.as_ref().filter(|_| !self.sinks.hides_sessions).and_then(text);
        let line = Line {
            level: if facts.aborted_by == Some(AbortedBy::Sidegate) { "error" } else { "info" },
            request_id: asked.request_id.as_ref().and_then(text),
            session_id: facts.session.as_ref().map(Session::short).or(shown),
            trace_id: asked.traceparent.as_ref().and_then(trace_id),
            principal: facts.principal.as_deref(),
            client_ip: facts.client_ip,
            method: asked.method.as_str(),
            path: asked.uri.path(),
            route: facts.route.as_ref().map(|route| &**route.name()),
            upstream: facts.upstream.as_deref(),
            endpoint: facts.endpoint.as_deref(),
            status: self.status.map(|status| status.as_u16()),
            duration: took,
            first_byte: facts.first_byte,
            bytes_in: received,
            bytes_out: sent,
            tokens: facts.tokens,
            rate_limited: facts.rate_limited.as_deref(),
            rate_limit_shadow: facts.rate_limit_shadow.as_deref(),
            cache: facts.cache.map(CacheOutcome::as_str),
            retries: facts.retries,
            fallback: facts.fallback,
            aborted_by: aborted_by.map(AbortedBy::as_str),
            error: facts.error,
            cause: facts.cause.as_deref(),
        };
        log.line(|out| if log.pretty() { line.pretty(out) } else { line.json(out) });
    }
}

/// An access line. What is absent is left out.
struct Line<'a> {
    level: &'static str,
    request_id: Option<&'a str>,
    session_id: Option<&'a str>,
    trace_id: Option<&'a str>,
    principal: Option<&'a str>,
    client_ip: Option<IpAddr>,
    method: &'a str,
    path: &'a str,
    route: Option<&'a str>,
    upstream: Option<&'a str>,
    endpoint: Option<&'a str>,
    status: Option<u16>,
    duration: Duration,
    first_byte: Option<Duration>,
    bytes_in: u64,
    bytes_out: u64,
    tokens: Option<(u64, u64)>,
    rate_limited: Option<&'a str>,
    rate_limit_shadow: Option<&'a str>,
    cache: Option<&'static str>,
    retries: u32,
    fallback: bool,
    aborted_by: Option<&'static str>,
    error: Option<&'static str>,
    cause: Option<&'a str>,
}

impl Line<'_> {
    /// Written by hand: a third of what a derived `Serialize` with as many optional fields takes.
    fn json(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(b"{\"ts\":\"");
        write_timestamp(out);
        out.extend_from_slice(b"\",\"level\":\"");
        out.extend_from_slice(self.level.as_bytes());
        out.extend_from_slice(b"\",\"msg\":\"request\"");
        field(out, "request_id", self.request_id);
        field(out, "session_id", self.session_id);
        field(out, "trace_id", self.trace_id);
        field(out, "principal", self.principal);
        if let Some(ip) = self.client_ip {
            key(out, "client_ip");
            address(out, ip);
        }
        field(out, "method", Some(self.method));
        field(out, "path", Some(self.path));
        field(out, "route", self.route);
        field(out, "upstream", self.upstream);
        field(out, "endpoint", self.endpoint);
        if let Some(status) = self.status {
            number(out, "status", status.into());
        }
        milliseconds(out, "duration_ms", self.duration);
        if let Some(first_byte) = self.first_byte {
            milliseconds(out, "first_byte_ms", first_byte);
        }
        number(out, "bytes_in", self.bytes_in);
        number(out, "bytes_out", self.bytes_out);
        if let Some((input, output)) = self.tokens {
            number(out, "tokens_in", input);
            number(out, "tokens_out", output);
        }
        field(out, "rate_limited", self.rate_limited);
        field(out, "rate_limit_shadow", self.rate_limit_shadow);
        field(out, "cache", self.cache);
        if self.retries > 0 {
            number(out, "retries", self.retries.into());
        }
        if self.fallback {
            key(out, "fallback");
            out.extend_from_slice(b"true");
        }
        field(out, "aborted_by", self.aborted_by);
        field(out, "error", self.error);
        field(out, "cause", self.cause);
        out.push(b'}');
    }

    fn pretty(&self, out: &mut Vec<u8>) {
        let status = self.status.map_or_else(|| "---".to_owned(), |status| status.to_string());
        let Self { method, path, duration, bytes_out, .. } = self;
        put(out, format_args!("{} {status} {method} {path:?} {duration:.1?} {bytes_out}B", timestamp()));
        let named = [
            ("route", self.route),
            ("endpoint", self.endpoint),
            ("id", self.request_id),
            ("principal", self.principal),
            ("rate_limited", self.rate_limited),
            ("rate_limit_shadow", self.rate_limit_shadow),
            ("cache", self.cache),
            ("aborted_by", self.aborted_by),
            ("error", self.error),
            ("cause", self.cause),
        ];
        for (name, value) in named {
            if let Some(value) = value {
                put(out, format_args!(" {name}={value}"));
            }
        }
    }
}

fn put(out: &mut Vec<u8>, text: fmt::Arguments<'_>) {
    // Writing to memory does not fail.
    out.write_fmt(text).unwrap_or(());
}

fn key(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(b",\"");
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(b"\":");
}

fn field(out: &mut Vec<u8>, name: &str, value: Option<&str>) {
    let Some(value) = value else { return };
    key(out, name);
    if value.bytes().all(|c| (b' '..0x7f).contains(&c) && c != b'"' && c != b'\\') {
        out.push(b'"');
        out.extend_from_slice(value.as_bytes());
        out.push(b'"');
    } else {
        // Text serializes, and memory takes it.
        serde_json::to_writer(out, value).unwrap_or(());
    }
}

/// An IPv4 address by hand: formatting one takes longer than the rest of the line.
fn address(out: &mut Vec<u8>, ip: IpAddr) {
    let mut before = b'"';
    match ip {
        IpAddr::V4(ip) => {
            for octet in ip.octets() {
                out.push(before);
                out.extend_from_slice(itoa::Buffer::new().format(octet).as_bytes());
                before = b'.';
            }
        }
        IpAddr::V6(ip) => put(out, format_args!("\"{ip}")),
    }
    out.push(b'"');
}

fn number(out: &mut Vec<u8>, name: &str, value: u64) {
    key(out, name);
    out.extend_from_slice(itoa::Buffer::new().format(value).as_bytes());
}

/// With three decimals.
fn milliseconds(out: &mut Vec<u8>, name: &str, duration: Duration) {
    let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
    number(out, name, micros / 1000);
    out.push(b'.');
    // One thousand more, of which the first digit is left out: so the zeros stay.
    let mut buffer = itoa::Buffer::new();
    out.extend_from_slice(buffer.format(1000 + micros % 1000).as_bytes().get(1..).unwrap_or_default());
}

/// A header's text, where it is text of a length that a log can bear.
fn text(value: &HeaderValue) -> Option<&str> {
    value.to_str().ok().filter(|text| text.len() <= 256)
}

/// The trace id of a `traceparent` (W3C trace context §3.2), if it is valid.
fn trace_id(value: &HeaderValue) -> Option<&str> {
    let mut parts = value.to_str().ok()?.split('-');
    let hex = |text: &str, len| text.len() == len && text.bytes().all(|c| matches!(c, b'0'..=b'9' | b'a'..=b'f'));
    parts.next().filter(|version| hex(version, 2) && *version != "ff")?;
    parts.next().filter(|id| hex(id, 32) && id.bytes().any(|c| c != b'0'))
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::FutureExt;
    use http_body_util::{BodyExt, StreamBody};
    use tower::{ServiceExt, service_fn};

    use super::*;
    use crate::{
        message::{Error, Kind},
        telemetry::log,
    };

    type Answer = Result<Response<Body>, BoxError>;

    /// The line that a request leaves behind when the upstream answers so and `client` reads so.
    async fn line<C: Future<Output = ()>>(
        answer: impl Fn() -> Answer + Clone,
        client: impl FnOnce(Result<Response<ResponseBody<Body>>, BoxError>) -> C,
    ) -> serde_json::Value {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let metrics = Metrics::new();
        let config = log::Config { file: Some(path.clone()), ..log::Config::default() };
        let (writer, guard) = log::open(&config, metrics.process().log_lines_dropped.clone()).unwrap();
        let service = AccessLogLayer::new(Some(writer), metrics).layer(service_fn(move |_| {
            let answer = answer.clone();
            async move { answer() }
        }));
        let request = Request::builder().uri("/a?secret=1").body(Body::from("four")).unwrap();
        client(service.oneshot(request).await).await;
        drop(guard);
        serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
    }

    fn stream(frames: Vec<Result<&'static str, Kind>>) -> Body {
        let frames = frames.into_iter().map(|frame| frame.map(|s| Frame::data(Bytes::from(s))).map_err(Error::from));
        Body::new(StreamBody::new(futures_util::stream::iter(frames)))
    }

    #[tokio::test]
    async fn a_whole_answer_is_logged_at_its_end() {
        let line = line(
            || Ok(Response::new(stream(vec![Ok("ab"), Ok("c")]))),
            |response| async { drop(response.unwrap().into_body().collect().await.unwrap()) },
        )
        .await;
        assert_eq!((&line["status"], &line["bytes_out"], &line["path"]), (&200.into(), &3.into(), &"/a".into()));
        assert!(line.get("aborted_by").is_none(), "{line}");
    }

    #[tokio::test]
    async fn a_client_that_leaves_is_named() {
        let line = line(
            || Ok(Response::new(stream(vec![Ok("ab"), Ok("c")]))),
            |response| async {
                let mut body = response.unwrap().into_body();
                drop(body.frame().await);
            },
        )
        .await;
        assert_eq!((&line["aborted_by"], &line["bytes_out"]), (&"client".into(), &2.into()));
    }

    #[tokio::test]
    async fn an_upstream_that_breaks_off_is_named_with_its_kind() {
        let line = line(
            || Ok(Response::new(stream(vec![Ok("ab"), Err(Kind::UpstreamReset)]))),
            |response| async { drop(response.unwrap().into_body().collect().await) },
        )
        .await;
        assert_eq!((&line["aborted_by"], &line["error"]), (&"upstream".into(), &"upstream-reset".into()));
    }

    #[tokio::test]
    async fn a_client_that_leaves_before_the_head_is_logged_without_a_status() {
        let metrics = Metrics::new();
        let layer = AccessLogLayer::new(None, metrics.clone());
        let service = layer.layer(service_fn(|_| std::future::pending::<Result<Response<Body>, Infallible>>()));
        let response = service.oneshot(Request::new(Body::empty()));
        assert!(response.now_or_never().is_none());
        let text = metrics.encode();
        assert!(text.contains(r#"sidegate_requests_total{route="none",status_class="none"} 1"#), "{text}");
        assert!(text.contains(r#"sidegate_aborted_total{route="none",by="client"} 1"#), "{text}");
    }

    #[test]
    fn a_value_cannot_forge_a_field() {
        let mut out = b"{".to_vec();
        field(&mut out, "a", Some("x\",\"b\":\"\\\n\u{2028}é"));
        number(&mut out, "n", 7);
        milliseconds(&mut out, "ms", Duration::from_micros(1_005_040));
        out.push(b'}');
        out.remove(1);
        let object: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let expected = serde_json::json!({ "a": "x\",\"b\":\"\\\n\u{2028}é", "n": 7, "ms": 1005.04 });
        assert_eq!(object, expected);
    }

    #[test]
    fn only_a_valid_traceparent_gives_a_trace_id() {
        let id = |text: &'static str| trace_id(&HeaderValue::from_static(text)).map(str::to_owned);
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        assert_eq!(id(good).as_deref(), Some("4bf92f3577b34da6a3ce929d0e0e4736"));
        for bad in [
            "",
            "00",
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-0-0",
        ] {
            assert_eq!(id(bad), None, "{bad}");
        }
        assert_eq!(id("00-00000000000000000000000000000000-00f067aa0ba902b7-01"), None);
    }
}
