//! Timeouts: row 20 of the request path, and the patience with a client's body.
//!
//! A total deadline kills streams, so silence is what is measured: until the first byte of a response, and
//! between the bytes of a body in either direction. A stream that keeps talking may last for days. The
//! connection's own timeouts (`client_header`, `keepalive`) are kept by the server, `connect` by the client,
//! `total` by [`deadline`](super::deadline), `heartbeat` and `sse_error_event` by the layers of these names; their keys
//! stand here, with the others.
//!
//! ```
//! use std::time::Duration;
//! use http::{Request, Response};
//! use sidegate::{layers::timeouts::FirstByteLayer, message::{Body, Error, Kind}};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(FirstByteLayer::new(Duration::from_secs(30)))
//!     .service(service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, std::io::Error>>()));
//! let error = service.oneshot(Request::new(Body::empty())).await.unwrap_err();
//! assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::UpstreamTimeout));
//! # });
//! ```

use std::{
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{
    task::unconstrained,
    time::{Instant, Sleep, sleep, sleep_until},
};
use tower::{Layer, Service};

use crate::{
    config::{
        problem::{Check, Problems},
        units::{HumanDuration, Toggle},
    },
    message::{Body, BoxError, Error, Kind, TunnelIdle, asks_for_tunnel},
    telemetry::Exchange,
};

/// How long sidegate waits, for what. Section `timeouts`.
///
/// `client_header` and `keepalive` are about connections, which have no route yet: they stand in `defaults`
/// only.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Timeouts")]
pub struct Config {
    /// From a connection's start, or a request's first byte, to the end of the request's head; also for the
    /// PROXY header and the TLS handshake. Then the connection is closed. Default `30s`.
    pub client_header: HumanDuration,
    /// Silence within a request's body; 408. Default `60s`; `off` waits for ever.
    pub client_body_idle: Toggle<HumanDuration>,
    /// To resolve, connect and, for `https`, greet an endpoint; 502. Default `5s`.
    pub connect: HumanDuration,
    /// From the request's last byte to the response's head; 504. Default `5m`, because a long completion
    /// that is not streamed sends nothing before its end; `off` waits for ever. Where a retry or a fallback could still
    /// step in, to the first event of an event stream.
    pub first_byte: Toggle<HumanDuration>,
    /// Silence within a response's body, or in both directions of a tunnel; the response is broken off. That
    /// of `defaults` also bounds how long a client may take nothing of what is sent to it, over HTTP/2 on each
    /// stream. Default `5m`; `off` waits for ever.
    pub idle: Toggle<HumanDuration>,
    /// From the request's head to the response's end; 504, or the response is broken off. Default `off`.
    pub total: Toggle<HumanDuration>,
    /// Whether `total` cuts streams (event streams, and responses of unknown length) too. Default `false`.
    pub total_streams: bool,
    /// Silence in an event stream, between two events, after which a comment is sent to the client, so that nothing on
    /// the way takes the stream for dead: `15s`. The upstream's `idle` runs on. Default `off`.
    pub heartbeat: Toggle<HumanDuration>,
    /// Whether an event stream that breaks off between two events is ended with an `event: error` that says why, in the
    /// form of `errors`, instead of being broken off. Default `false`.
    pub sse_error_event: bool,
    /// How long a client's connection may rest between requests. Default `75s`: longer than the 60 s for
    /// which common load balancers keep theirs, so that they never meet a connection that is being closed.
    pub keepalive: HumanDuration,
}

impl Default for Config {
    fn default() -> Self {
        let seconds = HumanDuration::from_secs;
        Self {
            client_header: seconds(30),
            client_body_idle: Toggle::On(seconds(60)),
            connect: seconds(5),
            first_byte: Toggle::On(seconds(300)),
            idle: Toggle::On(seconds(300)),
            total: Toggle::Off,
            total_streams: false,
            heartbeat: Toggle::Off,
            sse_error_event: false,
            keepalive: seconds(75),
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        let always = [("client_header", self.client_header), ("connect", self.connect), ("keepalive", self.keepalive)];
        for (key, value) in always {
            if value.is_zero() {
                problems.add(key, "must be longer than 0s");
            }
        }
        let switched = [
            ("client_body_idle", &self.client_body_idle),
            ("first_byte", &self.first_byte),
            ("idle", &self.idle),
            ("total", &self.total),
        ];
        for (key, value) in switched {
            if let Toggle::On(value) = value
                && value.is_zero()
            {
                problems.add(key, "must be longer than 0s; `off` waits for ever");
            }
        }
        if let Toggle::On(every) = self.heartbeat {
            if every.is_zero() {
                problems.add("heartbeat", "must be longer than 0s; `off` sends none");
            } else if let Toggle::On(idle) = self.idle
                && idle <= every
            {
                problems.add("heartbeat", format!("has no effect: must be shorter than `idle` ({idle})"));
            }
        }
        if self.total_streams && self.total == Toggle::Off {
            problems.add("total_streams", "has no effect while `total` is off: set `total`, or leave it out");
        }
    }
}

/// Gives the inner service `after` to answer with a response head.
///
/// The clock is started anew as long as the request's body is arriving, and while more of it is awaited or held back (by
/// the record in [`Exchange`]; without one it is not), so that a slow upload is not mistaken for a slow upstream. It
/// stops at the head: gaps within a body are the business of [`IdleLayer`], or of [`ClientBodyIdleLayer`].
///
/// # Errors
/// [`Kind::UpstreamTimeout`], 504. The upstream request is cancelled.
#[derive(Debug, Clone, Copy)]
pub struct FirstByteLayer {
    after: Duration,
}

impl FirstByteLayer {
    /// A layer that waits for `after`.
    #[must_use]
    pub const fn new(after: Duration) -> Self {
        Self { after }
    }
}

impl<S> Layer<S> for FirstByteLayer {
    type Service = FirstByte<S>;

    fn layer(&self, inner: S) -> FirstByte<S> {
        FirstByte { inner, after: self.after }
    }
}

/// The service of [`FirstByteLayer`].
#[derive(Debug, Clone)]
pub struct FirstByte<S> {
    inner: S,
    after: Duration,
}

impl<S, B> Service<Request<B>> for FirstByte<S>
where
    S: Service<Request<B>, Error: Into<BoxError>>,
    B: HttpBody,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = FirstByteFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let upload = Exchange::of_upload(&request);
        FirstByteFuture { inner: self.inner.call(request), sleep: sleep(self.after), after: self.after, upload }
    }
}

pin_project! {
    /// The response of [`FirstByte`].
    pub struct FirstByteFuture<F> {
        #[pin]
        inner: F,
        #[pin]
        sleep: Sleep,
        after: Duration,
        upload: Option<Exchange>,
    }
}

impl<F, T, E> Future for FirstByteFuture<F>
where
    F: Future<Output = Result<T, E>>,
    E: Into<BoxError>,
{
    type Output = Result<T, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Poll::Ready(result) = this.inner.poll(cx) {
            return Poll::Ready(result.map_err(Into::into));
        }
        loop {
            // Not by the task's budget: an upstream that talks without pause and never gets to its head
            // (`100 Continue` without end) uses that up in each turn, and would never be late.
            ready!(pin!(unconstrained(this.sleep.as_mut())).poll(cx));
            let excuse = this.upload.as_ref().and_then(|upload| upload.excuse(*this.after, Instant::now()));
            match excuse.filter(|late| *late > this.sleep.deadline()) {
                // The client has sent something since, or is expected to.
                Some(late) => this.sleep.as_mut().reset(late),
                None => return Poll::Ready(Err(Error::from(Kind::UpstreamTimeout).into())),
            }
        }
    }
}

/// Breaks a response off when its body is silent for `after`.
///
/// On a request that asks for an upgrade it leaves [`TunnelIdle`], so that the tunnel is held to the same.
///
/// # Errors
/// The body fails with [`Kind::UpstreamTimeout`]: the client sees a broken response, never a clean end.
#[derive(Debug, Clone, Copy)]
pub struct IdleLayer {
    after: Option<Duration>,
}

impl IdleLayer {
    /// A layer that bears `after` of silence; any, if there is none.
    #[must_use]
    pub const fn new(after: Option<Duration>) -> Self {
        Self { after }
    }
}

impl<S> Layer<S> for IdleLayer {
    type Service = Idle<S>;

    fn layer(&self, inner: S) -> Idle<S> {
        Idle { inner, after: self.after }
    }
}

/// The service of [`IdleLayer`].
#[derive(Debug, Clone)]
pub struct Idle<S> {
    inner: S,
    after: Option<Duration>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Idle<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
{
    type Response = Response<IdleBody<ResBody>>;
    type Error = S::Error;
    type Future = IdleFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        if let Some(after) = self.after
            && asks_for_tunnel(&request)
        {
            request.extensions_mut().insert(TunnelIdle(after));
        }
        IdleFuture { inner: self.inner.call(request), after: self.after }
    }
}

pin_project! {
    /// The response of [`Idle`].
    pub struct IdleFuture<F> {
        #[pin]
        inner: F,
        after: Option<Duration>,
    }
}

impl<F, B, E> Future for IdleFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = Result<Response<IdleBody<B>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let after = *this.after;
        let response = ready!(this.inner.poll(cx));
        Poll::Ready(response.map(|response| response.map(|body| IdleBody::new(body, after, Kind::UpstreamTimeout))))
    }
}

/// Fails a request's body when the client is silent in the middle of it for `after`.
///
/// # Errors
/// The body fails with [`Kind::ClientTimeout`], 408.
#[derive(Debug, Clone, Copy)]
pub struct ClientBodyIdleLayer {
    after: Duration,
}

impl ClientBodyIdleLayer {
    /// A layer that bears `after` of silence.
    #[must_use]
    pub const fn new(after: Duration) -> Self {
        Self { after }
    }
}

impl<S> Layer<S> for ClientBodyIdleLayer {
    type Service = ClientBodyIdle<S>;

    fn layer(&self, inner: S) -> ClientBodyIdle<S> {
        ClientBodyIdle { inner, after: self.after }
    }
}

/// The service of [`ClientBodyIdleLayer`].
#[derive(Debug, Clone)]
pub struct ClientBodyIdle<S> {
    inner: S,
    after: Duration,
}

impl<S, ReqBody> Service<Request<ReqBody>> for ClientBodyIdle<S>
where
    S: Service<Request<Body>>,
    ReqBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let after = Some(self.after);
        self.inner.call(request.map(|body| {
            if body.is_end_stream() {
                Body::empty()
            } else {
                Body::new(IdleBody::new(body, after, Kind::ClientTimeout))
            }
        }))
    }
}

pin_project! {
    /// A body that fails when it is silent for too long.
    ///
    /// It costs no timer while frames keep coming: the one timer of a body is armed at its first silence,
    /// and moved only when it fires too early.
    pub struct IdleBody<B> {
        #[pin]
        body: B,
        after: Option<Duration>,
        kind: Kind,
        silent_since: Option<Instant>,
        timer: Option<Pin<Box<Sleep>>>,
    }
}

impl<B> IdleBody<B> {
    fn new(body: B, after: Option<Duration>, kind: Kind) -> Self {
        Self { body, after, kind, silent_since: None, timer: None }
    }
}

impl<B> HttpBody for IdleBody<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.project();
        if let Poll::Ready(frame) = this.body.poll_frame(cx) {
            *this.silent_since = None;
            return Poll::Ready(frame.map(|result| result.map_err(Into::into)));
        }
        let Some(after) = *this.after else { return Poll::Pending };
        let deadline = *this.silent_since.get_or_insert_with(Instant::now) + after;
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= deadline {
                return Poll::Ready(Some(Err(Error::from(*this.kind).into())));
            }
            timer.as_mut().reset(deadline);
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::{FutureExt, StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};
    use tokio::time::advance;
    use tower::{ServiceExt, service_fn};

    use super::*;

    fn kind(error: &BoxError) -> Option<Kind> {
        Error::find(&**error).map(Error::kind)
    }

    fn secs(n: u64) -> Duration {
        Duration::from_secs(n)
    }

    #[tokio::test(start_paused = true)]
    async fn silence_past_the_limit_is_an_upstream_timeout() {
        let silent = service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Infallible>>());
        let mut answer = Box::pin(FirstByteLayer::new(secs(30)).layer(silent).oneshot(Request::new(Body::empty())));
        assert!(answer.as_mut().now_or_never().is_none());
        advance(secs(29)).await;
        assert!(answer.as_mut().now_or_never().is_none(), "one second is left");
        advance(secs(2)).await;
        assert_eq!(answer.now_or_never().unwrap().as_ref().map_err(kind).unwrap_err(), Some(Kind::UpstreamTimeout));
    }

    #[tokio::test(start_paused = true)]
    async fn an_upstream_that_talks_without_pause_is_late_all_the_same() {
        let busy = service_fn(|_: Request<Body>| async {
            loop {
                tokio::task::consume_budget().await;
            }
            #[expect(unreachable_code, reason = "says the type")]
            Ok::<Response<Body>, Infallible>(Response::default())
        });
        let mut answer = Box::pin(FirstByteLayer::new(secs(30)).layer(busy).oneshot(Request::new(Body::empty())));
        assert!(answer.as_mut().now_or_never().is_none());
        advance(secs(31)).await;
        assert_eq!(answer.now_or_never().unwrap().as_ref().map_err(kind).unwrap_err(), Some(Kind::UpstreamTimeout));
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_that_goes_on_is_not_a_slow_upstream() {
        let exchange = Exchange::new(&Request::new(()));
        let silent = service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Infallible>>());
        let mut request = Request::new(Body::from("x"));
        request.extensions_mut().insert(exchange.clone());
        let mut answer = Box::pin(FirstByteLayer::new(secs(30)).layer(silent).oneshot(request));
        assert!(answer.as_mut().now_or_never().is_none());
        advance(secs(10)).await;
        exchange.receive(1);
        advance(secs(29)).await;
        assert!(answer.as_mut().now_or_never().is_none(), "a byte has come");
        advance(secs(2)).await;
        assert!(answer.now_or_never().is_some(), "no byte has come since, for 30 seconds and not for 60");
    }

    #[tokio::test(start_paused = true)]
    async fn who_waits_for_the_client_does_not_wait_for_the_upstream() {
        let exchange = Exchange::new(&Request::new(()));
        let silent = service_fn(|_: Request<Body>| std::future::pending::<Result<Response<Body>, Infallible>>());
        let mut request = Request::new(Body::from("x"));
        request.extensions_mut().insert(exchange.clone());
        let mut answer = Box::pin(FirstByteLayer::new(secs(30)).layer(silent).oneshot(request));
        exchange.hold_upload(Instant::now() + secs(10));
        assert!(answer.as_mut().now_or_never().is_none());
        advance(secs(39)).await;
        assert!(answer.as_mut().now_or_never().is_none(), "it was not asked for its first byte before");
        exchange.await_client(true);
        advance(secs(100)).await;
        assert!(answer.as_mut().now_or_never().is_none(), "the client is silent");
        exchange.await_client(false);
        exchange.receive(1);
        advance(secs(29)).await;
        assert!(answer.as_mut().now_or_never().is_none());
        advance(secs(2)).await;
        assert_eq!(answer.now_or_never().unwrap().as_ref().map_err(kind).unwrap_err(), Some(Kind::UpstreamTimeout));
    }

    #[tokio::test(start_paused = true)]
    async fn only_silence_breaks_a_stream_off() {
        let ticks = stream::iter(0..10).then(|_| async {
            tokio::time::sleep(secs(50)).await;
            Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"x")))
        });
        let ticks = ticks.chain(stream::pending());
        let mut body = Box::pin(IdleBody::new(StreamBody::new(ticks), Some(secs(60)), Kind::UpstreamTimeout));
        for n in 0..10 {
            assert!(body.frame().await.unwrap().is_ok(), "frame {n} came in time");
        }
        let begun = Instant::now();
        let error = body.frame().await.unwrap().unwrap_err();
        assert_eq!(kind(&error), Some(Kind::UpstreamTimeout));
        assert_eq!(begun.elapsed().as_secs(), 60);
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_upload_is_the_clients_fault() {
        let reads = service_fn(|request: Request<Body>| async { request.into_body().collect().await });
        let service = ClientBodyIdleLayer::new(secs(60)).layer(reads);
        let silent = StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let error = service.oneshot(Request::new(silent)).await.unwrap_err();
        assert_eq!(kind(&error), Some(Kind::ClientTimeout));
    }
}
