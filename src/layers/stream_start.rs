//! Stream start: within row 20 of the request path, around each attempt.
//!
//! A stream's `200 OK` says little: many backends send it before they have tried to make the first token, and
//! report what went wrong as an event, or not at all. As long as somebody could still step in, that is what
//! decides. So the answer is held back until its first event with content; what fails before it (an error event,
//! the end, a break, silence past `first_byte`) fails the attempt, as a refused connection would, and retries,
//! fallbacks and breakers see no difference. Then everything that was held is let go, frame by frame as it came,
//! and from there on the stream passes as any other.
//!
//! Only requests that carry [`Undecided`] are treated so, and only answers that are event streams with status
//! 200: where nobody is left who could step in, an error event is the backend's answer and goes to the client.
//! Streams with a content coding pass as well, because their events cannot be seen from outside.
//! Where somebody could have stepped in and does not after all (a spent retry budget), the failure is answered as
//! any other: with an error of sidegate's.
//!
//! Comments do not count: a backend that sends `: ping` while it loads a model has not begun. They hold off
//! `idle`, but not `first_byte`, which here runs from the request until the first content. A total deadline,
//! which spares streams, counts as long as the head is held back.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::{layers::stream_start::StreamStartLayer, message::{Body, Error, Kind, Undecided}};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let mut service = ServiceBuilder::new().layer(StreamStartLayer::new(None)).service(service_fn(|_: Request<Body>| async {
//!     let failed = Body::from("event: error\ndata: {\"message\": \"no memory\"}\n\n");
//!     Response::builder().header("content-type", "text/event-stream").body(failed)
//! }));
//! let mut request = Request::new(Body::empty());
//! assert!(service.clone().oneshot(request).await.is_ok(), "nobody else could answer");
//!
//! request = Request::new(Body::empty());
//! request.extensions_mut().insert(Undecided);
//! let error = service.oneshot(request).await.unwrap_err();
//! assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::UpstreamReset));
//! # });
//! ```

use std::{
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower::{Layer, Service};

use crate::{
    message::{Body, BoxError, Error, Kind, Undecided},
    sse::{Event, Scanner, is_readable},
    telemetry::Exchange,
};

/// The most that is held back, in bytes. A stream that has said so much without an event is let go as it is.
const MAX_BYTES: usize = 64 * 1024;
/// The most that is held back, in frames, each of which costs more than its bytes.
const MAX_FRAMES: usize = 1024;

/// Makes a failure of a stream that fails before its first content: see the [module](self).
///
/// # Errors
/// [`Kind::UpstreamTimeout`], 504, when there is no content within `first_byte`; else what the body failed with, or
/// [`Kind::UpstreamReset`], 502. The upstream request is cancelled.
#[derive(Debug, Clone, Copy)]
pub struct StreamStartLayer {
    first_byte: Option<Duration>,
}

impl StreamStartLayer {
    /// A layer that waits for `first_byte`; for ever, if there is none.
    #[must_use]
    pub const fn new(first_byte: Option<Duration>) -> Self {
        Self { first_byte }
    }
}

impl<S> Layer<S> for StreamStartLayer {
    type Service = StreamStart<S>;

    fn layer(&self, inner: S) -> StreamStart<S> {
        StreamStart { inner, first_byte: self.first_byte }
    }
}

/// The service of [`StreamStartLayer`].
#[derive(Debug, Clone)]
pub struct StreamStart<S> {
    inner: S,
    first_byte: Option<Duration>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for StreamStart<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ReqBody: HttpBody,
    ResBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let undecided = request.extensions().get::<Undecided>().is_some() && *request.method() != Method::HEAD;
        let patience = self.first_byte.filter(|_| undecided).map(|after| {
            let upload = Exchange::of_upload(&request);
            Patience { after, deadline: Instant::now() + after, upload, timer: None }
        });
        ResponseFuture { inner: self.inner.call(request), undecided, patience, held: None }
    }
}

pin_project! {
    /// The response of [`StreamStart`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        undecided: bool,
        patience: Option<Patience>,
        // Boxed: what is rare must not make the future of every request larger.
        held: Option<Box<Held>>,
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
        let mut held = if let Some(held) = this.held.take() {
            held
        } else {
            let response = ready!(this.inner.poll(cx)).map_err(Into::into)?.map(Body::new);
            let may_wait = *this.undecided && response.status() == StatusCode::OK && is_readable(response.headers());
            if !may_wait {
                return Poll::Ready(Ok(response));
            }
            Box::new(Held::new(response))
        };
        if held.poll_begun(cx)?.is_ready() {
            return Poll::Ready(Ok(held.release()));
        }
        if this.patience.as_mut().is_some_and(|patience| patience.poll_over(cx).is_ready()) {
            return Poll::Ready(Err(Error::new(Kind::UpstreamTimeout, NotBegun::Silent).into()));
        }
        *this.held = Some(held);
        Poll::Pending
    }
}

/// A stream of which nobody knows yet whether it will be the answer.
struct Held {
    head: response::Parts,
    body: Body,
    scanner: Scanner,
    frames: VecDeque<Frame<Bytes>>,
    bytes: usize,
}

impl Held {
    fn new(response: Response<Body>) -> Self {
        let (head, body) = response.into_parts();
        Self { head, body, scanner: Scanner::new(), frames: VecDeque::new(), bytes: 0 }
    }

    /// Waits until the stream may be let go, or has failed.
    fn poll_begun(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        while self.bytes < MAX_BYTES && self.frames.len() < MAX_FRAMES {
            let frame = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                Some(Err(error)) if Error::find(&*error).is_some() => return Poll::Ready(Err(error)),
                Some(Err(error)) => return Poll::Ready(Err(Error::new(Kind::UpstreamReset, error).into())),
                None => return Poll::Ready(Err(Error::new(Kind::UpstreamReset, NotBegun::Ended).into())),
            };
            let mut data = frame.data_ref().map_or(&[][..], |data| data);
            self.bytes += data.len();
            let first = loop {
                match self.scanner.next(&mut data) {
                    Some(Event::Empty) => {}
                    first => break first,
                }
            };
            self.frames.push_back(frame);
            match first {
                Some(Event::Error) => {
                    return Poll::Ready(Err(Error::new(Kind::UpstreamReset, NotBegun::Failed).into()));
                }
                Some(_) => return Poll::Ready(Ok(())),
                None => {}
            }
        }
        Poll::Ready(Ok(()))
    }

    fn release(self) -> Response<Body> {
        let Self { head, body, frames, bytes, .. } = self;
        Response::from_parts(head, Body::new(Released { frames, bytes: bytes as u64, body }))
    }
}

/// Why a stream has failed before it began. For the log; nothing of the stream itself is in it.
#[derive(Debug)]
enum NotBegun {
    Failed,
    Ended,
    Silent,
}

impl fmt::Display for NotBegun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Failed => "the stream began with an error event",
            Self::Ended => "the stream ended before its first event",
            Self::Silent => "the stream did not begin in time",
        })
    }
}

impl std::error::Error for NotBegun {}

/// `first_byte`, started anew as long as the request's body is arriving, as it is for the head.
struct Patience {
    after: Duration,
    deadline: Instant,
    upload: Option<Exchange>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Patience {
    fn poll_over(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let timer = self.timer.get_or_insert_with(|| Box::pin(sleep_until(self.deadline)));
        loop {
            ready!(timer.as_mut().poll(cx));
            let excuse = self.upload.as_ref().and_then(|upload| upload.excuse(self.after, Instant::now()));
            match excuse.filter(|late| *late > timer.deadline()) {
                // The client has sent something since, or is expected to.
                Some(late) => timer.as_mut().reset(late),
                None => return Poll::Ready(()),
            }
        }
    }
}

/// A body some of whose frames were held back.
struct Released {
    frames: VecDeque<Frame<Bytes>>,
    /// How many there are in `frames`.
    bytes: u64,
    body: Body,
}

impl HttpBody for Released {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(frame) = self.frames.pop_front() else { return Pin::new(&mut self.body).poll_frame(cx) };
        self.bytes -= frame.data_ref().map_or(0, |data| data.len() as u64);
        if self.frames.is_empty() {
            // A stream may last for days.
            self.frames = VecDeque::new();
        }
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.body.size_hint();
        let (lower, upper) = (hint.lower(), hint.upper());
        if let Some(upper) = upper {
            hint.set_upper(upper.saturating_add(self.bytes));
        }
        hint.set_lower(lower.saturating_add(self.bytes));
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, future::poll_fn};

    use futures_util::{FutureExt, stream};
    use http::{
        HeaderMap, HeaderValue,
        header::{CONTENT_ENCODING, CONTENT_TYPE},
    };
    use http_body_util::{BodyExt, StreamBody};
    use tokio::{sync::mpsc, task::unconstrained, time::advance};
    use tower::{ServiceExt, service_fn};

    use super::*;

    type Frames = mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>;
    type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>>>>;

    const FIRST_BYTE: Duration = Duration::from_secs(30);

    /// A request in a stack whose backend has answered with an event stream, and the end that feeds the stream.
    fn asked(request: Request<Body>, head: fn(&mut response::Parts)) -> (Answer, Frames) {
        let (feed, frames) = mpsc::unbounded_channel();
        let frames = stream::unfold(frames, |mut frames| async { frames.recv().await.map(|frame| (frame, frames)) });
        let mut response = Response::new(Body::new(StreamBody::new(frames)));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        let (mut parts, body) = response.into_parts();
        head(&mut parts);
        let mut response = Some(Response::from_parts(parts, body));
        let backend = service_fn(move |_| std::future::ready(Ok::<_, Infallible>(response.take().unwrap())));
        let mut service = StreamStartLayer::new(Some(FIRST_BYTE)).layer(backend);
        (Box::pin(service.call(request)), feed)
    }

    fn undecided() -> (Answer, Frames) {
        let mut request = Request::new(Body::empty());
        request.extensions_mut().insert(Undecided);
        asked(request, |_| {})
    }

    fn data(feed: &Frames, text: &'static str) {
        feed.send(Ok(Frame::data(Bytes::from_static(text.as_bytes())))).unwrap();
    }

    fn kind(answer: &mut Answer) -> Option<Kind> {
        let error = answer.now_or_never().expect("it is decided").expect_err("it has failed");
        Error::find(&*error).map(Error::kind)
    }

    #[tokio::test(start_paused = true)]
    async fn the_head_waits_for_the_first_content_and_every_frame_comes_as_it_came() {
        let (mut answer, feed) = undecided();
        assert!((&mut answer).now_or_never().is_none());
        for part in [": loading\n\n", "data", ": one\n"] {
            data(&feed, part);
            assert!((&mut answer).now_or_never().is_none(), "after {part:?}");
        }
        data(&feed, "\ndata: tw");
        let mut body = answer.now_or_never().expect("the first event is whole").unwrap().into_body();
        for part in [": loading\n\n", "data", ": one\n", "\ndata: tw"] {
            assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), part);
        }
        assert!(body.frame().now_or_never().is_none(), "nothing waits for more than there is");
        let trailers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("x"))]);
        data(&feed, "event: error\ndata: late\n\n");
        feed.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
        drop(feed);
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), "event: error\ndata: late\n\n");
        assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        assert!(body.frame().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn what_ends_or_breaks_before_its_first_event_has_failed() {
        let (mut answer, feed) = undecided();
        data(&feed, ": loading\n\ndata: unfinished");
        drop(feed);
        assert_eq!(kind(&mut answer), Some(Kind::UpstreamReset));
        let (mut answer, feed) = undecided();
        feed.send(Err("broken".into())).unwrap();
        assert_eq!(kind(&mut answer), Some(Kind::UpstreamReset));
        let (mut answer, feed) = undecided();
        feed.send(Err(Error::from(Kind::UpstreamTimeout).into())).unwrap();
        assert_eq!(kind(&mut answer), Some(Kind::UpstreamTimeout), "what is known of the reason is kept");
    }

    #[tokio::test(start_paused = true)]
    async fn an_error_event_that_comes_first_is_a_failure() {
        for error in ["event: error\ndata: x\n\n", ": hello\n\ndata: {\"error\": {}}\n\ndata: x\n\n"] {
            let (mut answer, feed) = undecided();
            data(&feed, error);
            assert_eq!(kind(&mut answer), Some(Kind::UpstreamReset), "{error:?}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn comments_do_not_hold_off_first_byte() {
        let (mut answer, feed) = undecided();
        for _ in 0..2 {
            advance(Duration::from_secs(14)).await;
            data(&feed, ": loading\n\n");
            assert!((&mut answer).now_or_never().is_none());
        }
        advance(Duration::from_secs(2) + Duration::from_millis(1)).await;
        assert_eq!(kind(&mut answer), Some(Kind::UpstreamTimeout));
    }

    #[tokio::test(start_paused = true)]
    async fn a_begun_stream_may_be_silent_for_long() {
        let (answer, feed) = undecided();
        data(&feed, "data: one\n\n");
        let mut body = answer.await.unwrap().into_body();
        assert!(body.frame().await.is_some());
        advance(FIRST_BYTE * 10).await;
        assert!(body.frame().now_or_never().is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn an_upload_holds_off_first_byte() {
        let mut request = Request::new(Body::from("some"));
        let exchange = Exchange::new(&request);
        request.extensions_mut().insert(exchange.clone());
        request.extensions_mut().insert(Undecided);
        let (mut answer, _feed) = asked(request, |_| {});
        assert!((&mut answer).now_or_never().is_none());
        advance(FIRST_BYTE / 2).await;
        exchange.receive(4);
        advance(FIRST_BYTE / 2 + Duration::from_millis(1)).await;
        assert!((&mut answer).now_or_never().is_none());
        advance(FIRST_BYTE / 2 + Duration::from_millis(1)).await;
        assert_eq!(kind(&mut answer), Some(Kind::UpstreamTimeout));
    }

    #[tokio::test]
    async fn only_a_readable_stream_of_an_undecided_request_is_held() {
        let untouched = |request: Request<Body>, head: fn(&mut response::Parts)| {
            let (answer, feed) = asked(request, head);
            data(&feed, "event: error\ndata: x\n\n");
            let answer = answer.now_or_never().expect("nothing is waited for").expect("it is an answer");
            answer.into_body().frame().now_or_never().unwrap().unwrap().unwrap().into_data().unwrap()
        };
        let undecided = || {
            let mut request = Request::new(Body::empty());
            request.extensions_mut().insert(Undecided);
            request
        };
        let mut head_only = undecided();
        *head_only.method_mut() = Method::HEAD;
        let cases: [(_, fn(&mut response::Parts)); 5] = [
            (Request::new(Body::empty()), |_| {}),
            (head_only, |_| {}),
            (undecided(), |head| head.status = StatusCode::BAD_GATEWAY),
            (undecided(), |head| drop(head.headers.insert(CONTENT_ENCODING, HeaderValue::from_static("gzip")))),
            (undecided(), |head| drop(head.headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain")))),
        ];
        for (request, head) in cases {
            assert_eq!(untouched(request, head), "event: error\ndata: x\n\n");
        }
    }

    #[tokio::test]
    async fn what_is_held_is_bounded() {
        const LONG: &str = match str::from_utf8(&[b':'; 1024]) {
            Ok(text) => text,
            Err(_) => unreachable!(),
        };
        for (frame, count) in [(LONG, MAX_BYTES / LONG.len()), ("", MAX_FRAMES)] {
            let (mut answer, feed) = undecided();
            for _ in 1..count {
                data(&feed, frame);
            }
            unconstrained(poll_fn(|cx| {
                assert!(answer.as_mut().poll(cx).is_pending());
                Poll::Ready(())
            }))
            .await;
            data(&feed, frame);
            let body = answer.await.unwrap().into_body();
            drop(feed);
            assert_eq!(body.collect().await.unwrap().to_bytes().len(), frame.len() * count);
        }
    }

    #[tokio::test]
    async fn what_is_known_of_the_size_and_the_end_stays_true() {
        let stream = "data: one\n\ndata: two\n\n";
        let backend = service_fn(|_| {
            let response = Response::builder().header(CONTENT_TYPE, "text/event-stream").body(Body::from(stream));
            std::future::ready(response)
        });
        let mut request = Request::new(Body::empty());
        request.extensions_mut().insert(Undecided);
        let response = StreamStartLayer::new(None).layer(backend).oneshot(request).await.unwrap();
        let mut body = response.into_body();
        assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(stream.len() as u64), false));
        body.frame().await.unwrap().unwrap();
        assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(0), true));
    }

    #[tokio::test]
    async fn a_client_that_leaves_lets_the_upstream_go() {
        let (answer, feed) = undecided();
        data(&feed, ": loading\n\n");
        drop(answer);
        assert!(feed.is_closed(), "while it is held");
        let (answer, feed) = undecided();
        data(&feed, "data: x\n\n");
        drop(answer.await.unwrap());
        assert!(feed.is_closed(), "while it is released");
    }
}
