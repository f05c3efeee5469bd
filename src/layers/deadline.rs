//! Deadline: row 15 of the request path, `timeouts.total`.
//!
//! From the request's head to the response's end, and never over a stream unless asked: a response that is
//! an event stream, or whose length is not known, is done with the deadline once its head is there.
//!
//! A body can tell of its deadline only where it is asked, and nobody asks where the client does not read. Whoever drives
//! the connection finds [`message::Deadline`] among the extensions of such a response, and drops it then; the body notes
//! in the record of the exchange that this is what ended it.
//!
//! Others may share a response, who asked for the same later. What they share goes on for the last of them, as long as
//! [`message::Latecomers`] says, and `layers::cache` ends it for each at its own deadline.
//!
//! ```
//! use std::time::Duration;
//! use http::{Request, Response};
//! use sidegate::{layers::deadline::DeadlineLayer, message::{Body, Error, Kind}};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(DeadlineLayer::new(Duration::from_secs(10)))
//!     .service(service_fn(|_: Request<()>| std::future::pending::<Result<Response<Body>, std::io::Error>>()));
//! let error = service.oneshot(Request::new(())).await.unwrap_err();
//! assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::DeadlineExceeded));
//! # });
//! ```

use std::{
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Body as HttpBody;
use pin_project_lite::pin_project;
use tokio::{
    task::unconstrained,
    time::{Instant, Sleep, sleep_until},
};
use tower::{Layer, Service};

use crate::{
    message::{self, Body, BoxError, Error, Kind},
    sse,
    telemetry::{Due, Exchange},
};

/// Gives an exchange `total`, streams excepted.
///
/// # Errors
/// [`Kind::DeadlineExceeded`], 504; within a response its body fails with it.
#[derive(Debug, Clone, Copy)]
pub struct DeadlineLayer {
    total: Duration,
    streams: bool,
}

impl DeadlineLayer {
    /// A layer that gives each exchange `total`.
    #[must_use]
    pub const fn new(total: Duration) -> Self {
        Self { total, streams: false }
    }

    /// Whether streams are cut too.
    #[must_use]
    pub const fn with_streams(mut self, streams: bool) -> Self {
        self.streams = streams;
        self
    }
}

impl<S> Layer<S> for DeadlineLayer {
    type Service = Deadline<S>;

    fn layer(&self, inner: S) -> Deadline<S> {
        Deadline { inner, settings: *self }
    }
}

/// The service of [`DeadlineLayer`].
#[derive(Debug, Clone)]
pub struct Deadline<S> {
    inner: S,
    settings: DeadlineLayer,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Deadline<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ResBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let deadline = Instant::now() + self.settings.total;
        request.extensions_mut().insert(message::Deadline(deadline));
        let exchange = Exchange::of(&request).cloned();
        let latecomers = request.extensions().get().cloned();
        ResponseFuture {
            exchange,
            latecomers,
            inner: self.inner.call(request),
            sleep: sleep_until(deadline),
            deadline,
            streams: self.settings.streams,
        }
    }
}

pin_project! {
    /// The response of [`Deadline`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        #[pin]
        sleep: Sleep,
        deadline: Instant,
        streams: bool,
        exchange: Option<Exchange>,
        latecomers: Option<message::Latecomers>,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    E: Into<BoxError>,
{
    type Output = Result<Response<Body>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        if let Poll::Ready(result) = this.inner.poll(cx) {
            let mut response = result.map_err(Into::into)?;
            if response.body().is_end_stream() || !*this.streams && is_stream(&response) {
                return Poll::Ready(Ok(response.map(Body::new)));
            }
            response.extensions_mut().insert(message::Deadline(*this.deadline));
            let (deadline, exchange, latecomers) = (*this.deadline, this.exchange.take(), this.latecomers.take());
            let due = |body| Body::new(Due::new(body, deadline, exchange).shared_with(latecomers));
            return Poll::Ready(Ok(response.map(due)));
        }
        // Not by the task's budget, which an upstream that talks without pause uses up in each turn.
        ready!(pin!(unconstrained(this.sleep)).poll(cx));
        Poll::Ready(Err(Error::from(Kind::DeadlineExceeded).into()))
    }
}

fn is_stream<B: HttpBody>(response: &Response<B>) -> bool {
    sse::is_event_stream(response.headers()) || response.body().size_hint().exact().is_none()
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::{FutureExt, stream};
    use http::header::CONTENT_TYPE;
    use http_body::{Frame, SizeHint};
    use http_body_util::{BodyExt, StreamBody};
    use tower::{ServiceExt, service_fn};

    use super::*;

    /// How the body of an answer of this kind ends under a deadline of 10 s, and after how long.
    async fn end(streams: bool, event_stream: bool) -> (Option<Kind>, u64) {
        let backend = service_fn(move |_: Request<()>| async move {
            let late = stream::once(async {
                tokio::time::sleep(Duration::from_secs(60)).await;
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"0123456789")))
            });
            let mut response = Response::new(Sized(Box::pin(StreamBody::new(late)), event_stream));
            if event_stream {
                response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("text/event-stream"));
            }
            Ok::<_, Infallible>(response)
        });
        let layer = DeadlineLayer::new(Duration::from_secs(10)).with_streams(streams);
        let begun = Instant::now();
        let response = layer.layer(backend).oneshot(Request::new(())).await.unwrap();
        let result = response.into_body().collect().await;
        let kind = result.err().and_then(|error| Error::find(&*error).map(Error::kind));
        (kind, begun.elapsed().as_secs())
    }

    /// A body that says how long it is, unless it is a stream.
    struct Sized<B>(Pin<Box<B>>, bool);

    impl<B: HttpBody> HttpBody for Sized<B> {
        type Data = B::Data;
        type Error = B::Error;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
            self.0.as_mut().poll_frame(cx)
        }

        fn size_hint(&self) -> SizeHint {
            if self.1 { SizeHint::default() } else { SizeHint::with_exact(10) }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_body_is_cut_and_a_stream_is_not() {
        assert_eq!(end(false, false).await, (Some(Kind::DeadlineExceeded), 10));
        assert_eq!(end(false, true).await, (None, 60));
        assert_eq!(end(true, true).await, (Some(Kind::DeadlineExceeded), 10), "where it was asked for");
    }

    #[tokio::test(start_paused = true)]
    async fn a_body_that_is_dropped_after_its_deadline_was_ended_by_it() {
        for (after, error) in [(9, None), (10, Some("deadline-exceeded"))] {
            let backend = service_fn(|_: Request<Body>| async {
                let never = Box::pin(StreamBody::new(stream::pending::<Result<Frame<Bytes>, Infallible>>()));
                Ok::<_, Infallible>(Response::new(Sized(never, false)))
            });
            let mut request = Request::new(Body::empty());
            let exchange = Exchange::new(&request);
            request.extensions_mut().insert(exchange.clone());
            let begun = Instant::now();
            let total = Duration::from_secs(10);
            let response = DeadlineLayer::new(total).layer(backend).oneshot(request).await.unwrap();
            let deadline = response.extensions().get::<message::Deadline>().expect("whoever drives it is told");
            assert_eq!(deadline.0, begun + total);
            tokio::time::advance(Duration::from_secs(after)).await;
            drop(response);
            assert_eq!(exchange.facts().error, error, "after {after} s");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_upstream_that_talks_without_pause_is_cut_all_the_same() {
        let busy = service_fn(|_: Request<()>| async {
            loop {
                tokio::task::consume_budget().await;
            }
            #[expect(unreachable_code, reason = "says the type")]
            Ok::<Response<Body>, Infallible>(Response::default())
        });
        let total = Duration::from_secs(10);
        let mut answer = Box::pin(DeadlineLayer::new(total).layer(busy).oneshot(Request::new(())));
        assert!(answer.as_mut().now_or_never().is_none());
        tokio::time::advance(total).await;
        let error = answer.now_or_never().expect("it is over").unwrap_err();
        assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::DeadlineExceeded));
    }
}
