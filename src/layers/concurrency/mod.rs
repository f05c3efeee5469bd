//! Concurrency: row 14 of the request path, for a route, and once more before an upstream that all its routes share.
//!
//! A backend that can do eight things at a time is never asked for a ninth. Who comes while all places are taken waits
//! in a queue, first come, first served, up to `queue_timeout`; who finds the queue full is told at once to come later.
//!
//! A request is in flight until its response's body has ended or was dropped, a tunnel until it ends: a stream is work
//! to its last byte. Who leaves gives the place back at once, in flight or in the queue.
//!
//! `Retry-After` is an estimate of when those who wait now will have been let in: how many they are, times how long a
//! place was held lately, divided by the places.
//!
//! With `adaptive`, `max_in_flight` is the highest limit, and the limit follows the time to the first byte: see
//! `adaptive`. It is measured from the request's last byte; the whole length of an answer would say how much a model wrote, not how busy it is. Where the number of
//! places is known, as with a GPU's batch, a fixed limit is better.
//!
//! ```
//! use std::{num::NonZeroU32, sync::Arc};
//! use http::{Request, Response};
//! use sidegate::{
//!     layers::concurrency::{ConcurrencyLayer, Config, Limiter, Scope},
//!     message::{Body, BoxError, Error, Kind},
//!     telemetry::Metrics,
//! };
//! use tower::{Service, ServiceBuilder, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let config = Config { queue: 0, ..Config::new(NonZeroU32::MIN) };
//! let limiter = Arc::new(Limiter::new(Scope::Upstream, "gpu", config, &Metrics::new()));
//! let mut service = ServiceBuilder::new().layer(ConcurrencyLayer::new(limiter)).service(service_fn(
//!     |_: Request<Body>| async { Ok::<_, BoxError>(Response::new(Body::from("tokens"))) },
//! ));
//! let first = service.call(Request::new(Body::empty())).await.unwrap();
//! let refused = service.call(Request::new(Body::empty())).await.err().unwrap();
//! assert_eq!(Error::find(&*refused).map(Error::kind), Some(Kind::Overloaded));
//! drop(first);
//! assert!(service.call(Request::new(Body::empty())).await.is_ok());
//! # });
//! ```

pub mod adaptive;
mod limiter;

use std::{
    any::Any,
    num::NonZeroU32,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::{Instant, Sleep, sleep};
use tower::{Layer, Service};

pub use self::limiter::{Limiter, Scope, Snapshot};
use self::{
    adaptive::Gradient,
    limiter::{Entered, Permit, Place},
};
use crate::{
    config::{
        problem::{Check, Problems},
        units::HumanDuration,
    },
    message::{Body, BoxError, Error, Kind, take_ready},
    telemetry::Exchange,
};

/// The longest queue that may be asked for: each place in it is a client's request that is held.
const LONGEST_QUEUE: u32 = 100_000;

/// How many requests may be in flight, and how many may wait. Section `concurrency`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Concurrency")]
pub struct Config {
    /// Requests in flight at most, from their head to the last byte of their response, at least 1. With `adaptive` the
    /// highest that the limit grows to.
    pub max_in_flight: NonZeroU32,
    /// Requests that may wait for a place, in their order; 0 refuses at once. At most 100000; default 100.
    #[serde(default = "queue")]
    pub queue: u32,
    /// How long a request may wait before it is refused. Default `10s`.
    #[serde(default = "queue_timeout")]
    pub queue_timeout: HumanDuration,
    /// Lets the limit follow the time to the first byte. Default: it is `max_in_flight`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adaptive: Option<adaptive::Config>,
}

const fn queue() -> u32 {
    100
}

const fn queue_timeout() -> HumanDuration {
    HumanDuration::from_secs(10)
}

impl Config {
    /// So many in flight, and the defaults.
    #[must_use]
    pub const fn new(max_in_flight: NonZeroU32) -> Self {
        Self { max_in_flight, queue: queue(), queue_timeout: queue_timeout(), adaptive: None }
    }

    fn gradient(&self, now: Instant) -> Option<Gradient> {
        self.adaptive.map(|adaptive| Gradient::new(adaptive.min, self.max_in_flight, now))
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if self.queue > LONGEST_QUEUE {
            problems.add("queue", format!("is {}: must be at most {LONGEST_QUEUE}", self.queue));
        }
        if self.queue > 0 && self.queue_timeout.is_zero() {
            problems.add("queue_timeout", "must be longer than 0s; `queue: 0` refuses at once");
        }
        if let Some(adaptive) = &self.adaptive
            && adaptive.min > self.max_in_flight
        {
            let why = format!("is {}: must be at most `max_in_flight` ({})", adaptive.min, self.max_in_flight);
            problems.add("adaptive.min", why);
        }
    }
}

/// Limits how many requests are in flight: see the [module](self).
///
/// # Errors
/// [`Kind::Overloaded`], 503, with an estimate of when to come again. Such a request was not sent.
#[derive(Debug, Clone)]
pub struct ConcurrencyLayer {
    limiter: Arc<Limiter>,
}

impl ConcurrencyLayer {
    /// A layer that lets in whom `limiter` lets in.
    #[must_use]
    pub fn new(limiter: Arc<Limiter>) -> Self {
        Self { limiter }
    }
}

impl<S> Layer<S> for ConcurrencyLayer {
    type Service = Concurrency<S>;

    fn layer(&self, inner: S) -> Concurrency<S> {
        Concurrency { inner, limiter: self.limiter.clone() }
    }
}

/// The service of [`ConcurrencyLayer`].
#[derive(Debug, Clone)]
pub struct Concurrency<S> {
    inner: S,
    limiter: Arc<Limiter>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Concurrency<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Error: Into<BoxError>> + Clone,
    ResBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = ResponseFuture<S, ReqBody>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let exchange = Exchange::of(&request).cloned();
        let mut future =
            ResponseFuture { inner: None, permit: None, begun: Instant::now(), waiting: None, refused: None, exchange };
        match self.limiter.enter() {
            Ok(Entered::Let(permit)) => {
                future.permit = Some(permit);
                future.inner = Some(self.inner.call(request));
            }
            Ok(Entered::Queued(place)) => {
                let inner = take_ready(&mut self.inner);
                let timeout = Box::pin(sleep(place.timeout));
                future.waiting = Some(Box::new(Waiting { place, timeout, inner, request }));
            }
            Err(error) => future.refused = Some(error),
        }
        future
    }
}

/// A request in the queue.
struct Waiting<S, ReqBody> {
    place: Place,
    timeout: Pin<Box<Sleep>>,
    inner: S,
    request: Request<ReqBody>,
}

impl<S, ReqBody> Waiting<S, ReqBody> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Permit, Error>> {
        if let Poll::Ready(granted) = Pin::new(&mut self.place.granted).poll(cx) {
            self.place.limiter().waited(&self.place);
            // Its sender is dropped with a permit in it or with the place, and the place is here.
            return Poll::Ready(granted.map_err(|_| Kind::Overloaded.into()));
        }
        ready!(self.timeout.as_mut().poll(cx));
        self.place.limiter().waited(&self.place);
        Poll::Ready(Err(self.place.limiter().give_up()))
    }
}

pin_project! {
    /// The response of [`Concurrency`].
    pub struct ResponseFuture<S, ReqBody>
    where
        S: Service<Request<ReqBody>>,
    {
        // Absent in the queue.
        #[pin]
        inner: Option<S::Future>,
        permit: Option<Permit>,
        begun: Instant,
        waiting: Option<Box<Waiting<S, ReqBody>>>,
        refused: Option<Error>,
        exchange: Option<Exchange>,
    }
}

impl<S, ReqBody, ResBody> Future for ResponseFuture<S, ReqBody>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ResBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Output = Result<Response<Body>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        if let Some(refused) = this.refused.take() {
            return Poll::Ready(Err(refused.into()));
        }
        if let Some(waiting) = this.waiting.as_mut() {
            let granted = ready!(waiting.poll(cx));
            let Some(waiting) = this.waiting.take() else { return Poll::Pending };
            *this.permit = Some(granted?);
            *this.begun = Instant::now();
            let Waiting { mut inner, request, .. } = *waiting;
            this.inner.set(Some(inner.call(request)));
        }
        let Some(inner) = this.inner.as_pin_mut() else { return Poll::Pending };
        let result = ready!(inner.poll(cx)).map_err(Into::into);
        let permit = this.permit.take();
        if let Some(limiter) = permit.as_ref().and_then(Permit::limiter)
            && is_telling(&result)
        {
            // Not the client's upload is measured.
            limiter.sample(Exchange::waiting_since(this.exchange.as_ref(), *this.begun).elapsed());
        }
        let response = result?;
        let Some(permit) = permit else { return Poll::Ready(Ok(response.map(Body::new))) };
        Poll::Ready(Ok(hold(response, permit, this.exchange.take().as_ref())))
    }
}

/// Whether the time that a first byte took says how busy the upstream is. A failure may come fast because nothing was
/// done, but not a timeout.
fn is_telling<B>(result: &Result<Response<B>, BoxError>) -> bool {
    match result {
        Ok(response) => !response.status().is_server_error(),
        Err(error) => Error::find(&**error).is_some_and(|error| error.kind() == Kind::UpstreamTimeout),
    }
}

/// Keeps `permit` until what `response` begins has ended.
fn hold<B>(response: Response<B>, permit: Permit, exchange: Option<&Exchange>) -> Response<Body>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    if let Some(exchange) = exchange {
        let mut facts = exchange.facts();
        if let Some(tunnel) = facts.tunnel.take() {
            let both: (Permit, Box<dyn Any + Send>) = (permit, tunnel);
            facts.tunnel = Some(Box::new(both));
            return response.map(Body::new);
        }
    }
    if response.body().is_end_stream() {
        return response.map(Body::new);
    }
    response.map(|body| Body::new(ResponseBody { body, permit: Some(permit) }))
}

pin_project! {
    /// The body of a response whose request is in flight.
    #[derive(Debug)]
    struct ResponseBody<B> {
        #[pin]
        body: B,
        permit: Option<Permit>,
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
        if !matches!(frame, Some(Ok(_))) {
            this.permit.take();
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
