//! Heartbeat: `timeouts.heartbeat`, outermost of what stands around a response within a route.
//!
//! A stream whose upstream is silent, while a model thinks or a queue is long, looks dead to every load balancer and
//! browser on its way. A comment (`:` and a blank line, which receivers ignore, WHATWG HTML §9.2.7) shows that it is
//! not. Off until asked for.
//!
//! A comment is sent between two events only: never inside of one, however its frames are cut, and never after the
//! trailers. Before the first event it is sent too, because that is when models are silent the longest; should the
//! stream then begin with a byte order mark, which only counts at the very beginning, the mark is taken off. Nothing
//! else of a stream is ever changed. What is not sent as it is (with a content coding, inside of which the events cannot
//! be seen) or has an announced length, is left alone.
//!
//! It says nothing about the upstream: `timeouts.idle` runs on, and a stream that is held back until it begins (see
//! [`stream_start`](super::stream_start)) has no head yet that a comment could follow. For a client that does not read,
//! no more comments are made than its connection takes: bodies are only asked for what can be sent.
//!
//! ```
//! use std::time::Duration;
//! use futures_util::stream;
//! use http::{Request, Response};
//! use http_body_util::{BodyExt, StreamBody};
//! use sidegate::{layers::heartbeat::HeartbeatLayer, message::{Body, BoxError}};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(HeartbeatLayer::new(Duration::from_secs(15)))
//!     .service(service_fn(|_: Request<()>| async {
//!         let silent = StreamBody::new(stream::pending::<Result<http_body::Frame<_>, BoxError>>());
//!         Response::builder().header("content-type", "text/event-stream").body(Body::new(silent))
//!     }));
//! let mut body = service.oneshot(Request::new(())).await.unwrap().into_body();
//! assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), ":\n\n");
//! # });
//! ```

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};
use tower::{Layer, Service};

use crate::{
    message::{Body, BoxError},
    sse::{BYTE_ORDER_MARK, Boundary, has_room},
};

/// A comment, and the end of what might be taken for an event by who does not know comments.
const COMMENT: &[u8] = b":\n\n";

/// Sends a comment whenever an event stream has been silent for a time: see the [module](self).
#[derive(Debug, Clone, Copy)]
pub struct HeartbeatLayer {
    every: Duration,
}

impl HeartbeatLayer {
    /// A layer that sends a comment after each `every` of silence, which is not zero.
    #[must_use]
    pub const fn new(every: Duration) -> Self {
        Self { every }
    }
}

impl<S> Layer<S> for HeartbeatLayer {
    type Service = Heartbeat<S>;

    fn layer(&self, inner: S) -> Heartbeat<S> {
        Heartbeat { inner, every: self.every }
    }
}

/// The service of [`HeartbeatLayer`].
#[derive(Debug, Clone)]
pub struct Heartbeat<S> {
    inner: S,
    every: Duration,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Heartbeat<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    ResBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        ResponseFuture { inner: self.inner.call(request), every: self.every }
    }
}

pin_project! {
    /// The response of [`Heartbeat`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        every: Duration,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Output = Result<Response<Body>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(this.inner.poll(cx))?;
        let has_room = has_room(&response);
        Poll::Ready(Ok(response
            .map(|body| if has_room { Body::new(ResponseBody::new(body, *this.every)) } else { Body::new(body) })))
    }
}

pin_project! {
    /// An event stream that is not silent for long.
    struct ResponseBody<B> {
        #[pin]
        body: B,
        every: Duration,
        boundary: Boundary,
        // What is to be taken off of a byte order mark that is no longer the stream's beginning.
        mark: &'static [u8],
        silent_since: Option<Instant>,
        // Armed at the first silence, and moved only when it fires too early.
        timer: Option<Pin<Box<Sleep>>>,
    }
}

impl<B> ResponseBody<B> {
    fn new(body: B, every: Duration) -> Self {
        Self { body, every, boundary: Boundary::new(), mark: &[], silent_since: None, timer: None }
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
        while let Poll::Ready(frame) = this.body.as_mut().poll_frame(cx) {
            *this.silent_since = None;
            let Some(frame) = frame.transpose().map_err(Into::into)? else { return Poll::Ready(None) };
            let frame = match frame.into_data() {
                Ok(data) => {
                    let data = unmarked(this.mark, data);
                    if !this.mark.is_empty() && data.is_empty() {
                        continue;
                    }
                    this.boundary.pass(&data);
                    Frame::data(data)
                }
                Err(trailers) => {
                    this.boundary.close();
                    trailers
                }
            };
            return Poll::Ready(Some(Ok(frame)));
        }
        if !this.boundary.here() {
            return Poll::Pending;
        }
        let deadline = *this.silent_since.get_or_insert_with(Instant::now) + *this.every;
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(deadline)));
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= deadline {
                break;
            }
            timer.as_mut().reset(deadline);
        }
        *this.silent_since = Some(Instant::now());
        if this.boundary.at_start() {
            *this.mark = &BYTE_ORDER_MARK;
            this.boundary.pass(COMMENT);
        }
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(COMMENT)))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::new();
        hint.set_lower(self.body.size_hint().lower());
        hint
    }
}

/// Takes what `data` has of a byte order mark off its beginning; `mark` is what is still to come of the mark.
fn unmarked(mark: &mut &'static [u8], mut data: Bytes) -> Bytes {
    while let ([expected, left @ ..], Some(first)) = (*mark, data.first()) {
        if first == expected {
            *mark = left;
            data.advance(1);
        } else {
            // It only began like one.
            let taken = &BYTE_ORDER_MARK[..BYTE_ORDER_MARK.len() - mark.len()];
            if !taken.is_empty() {
                data = [taken, &data].concat().into();
            }
            *mark = &[];
        }
    }
    data
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::{FutureExt, stream};
    use http::{
        HeaderMap, HeaderValue,
        header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE},
    };
    use http_body_util::{BodyExt, StreamBody};
    use proptest::prelude::*;
    use tokio::{sync::mpsc, time::advance};
    use tower::{ServiceExt, service_fn};

    use super::*;
    use crate::sse::{Event, Scanner};

    type Frames = mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>;

    const EVERY: Duration = Duration::from_secs(15);
    const NEARLY: Duration = Duration::from_millis(14_999);

    /// An event stream behind the layer, and the end that feeds it.
    async fn streaming(headers: &[(http::HeaderName, &'static str)]) -> (Body, Frames) {
        let (feed, frames) = mpsc::unbounded_channel();
        let frames = stream::unfold(frames, |mut frames| async { frames.recv().await.map(|frame| (frame, frames)) });
        let mut response = Response::new(Body::new(StreamBody::new(frames)));
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
        for (name, value) in headers {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
        }
        let mut response = Some(response);
        let backend = service_fn(move |_| std::future::ready(Ok::<_, Infallible>(response.take().unwrap())));
        let mut service = HeartbeatLayer::new(EVERY).layer(backend);
        (service.call(Request::new(())).await.unwrap().into_body(), feed)
    }

    fn say(feed: &Frames, data: impl AsRef<[u8]>) {
        feed.send(Ok(Frame::data(Bytes::copy_from_slice(data.as_ref())))).unwrap();
    }

    /// What is there to read now.
    fn now(body: &mut Body) -> Option<Bytes> {
        Some(body.frame().now_or_never()??.unwrap().into_data().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn a_comment_follows_each_silence_between_events() {
        let (mut body, feed) = streaming(&[]).await;
        for _ in 0..2 {
            say(&feed, "data: one\n\n");
            assert_eq!(now(&mut body).unwrap(), "data: one\n\n");
            for _ in 0..3 {
                assert_eq!(now(&mut body), None);
                advance(NEARLY).await;
                assert_eq!(now(&mut body), None);
                advance(Duration::from_millis(2)).await;
                assert_eq!(now(&mut body).unwrap(), COMMENT);
            }
        }
        drop(feed);
        assert!(body.frame().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_counted_from_the_last_frame() {
        let (mut body, feed) = streaming(&[]).await;
        for _ in 0..5 {
            say(&feed, "data: x\n\n");
            now(&mut body).unwrap();
            assert_eq!(now(&mut body), None);
            advance(NEARLY).await;
            assert_eq!(now(&mut body), None);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn an_event_is_not_broken_into() {
        let (mut body, feed) = streaming(&[]).await;
        for part in ["data: a", "bc\n", "data: d\r", "\n"] {
            say(&feed, part);
            assert_eq!(now(&mut body).unwrap(), part);
            assert_eq!(now(&mut body), None);
            advance(EVERY * 2).await;
            assert_eq!(now(&mut body), None, "after {part:?}");
        }
        say(&feed, "\r\n");
        assert_eq!(now(&mut body).unwrap(), "\r\n");
        assert_eq!(now(&mut body), None);
        advance(EVERY * 2).await;
        assert_eq!(now(&mut body).unwrap(), COMMENT);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_has_not_begun_is_kept_alive_and_may_begin_with_a_byte_order_mark() {
        for (frames, expected) in [
            (vec!["\u{FEFF}data: x\n\n".as_bytes()], "data: x\n\n"),
            (vec![b"\xEF", b"\xBB", b"\xBF", b"data: x\n\n"], "data: x\n\n"),
            (vec![b"\xEF\xBC", b"\x90: x\n\n"], "\u{FF10}: x\n\n"),
            (vec!["\u{FEFF}\u{FEFF}\n".as_bytes()], "\u{FEFF}\n"),
        ] {
            let (mut body, feed) = streaming(&[]).await;
            for _ in 0..2 {
                assert_eq!(now(&mut body), None);
                advance(EVERY + Duration::from_millis(1)).await;
                assert_eq!(now(&mut body).unwrap(), COMMENT);
            }
            for frame in frames {
                say(&feed, frame);
            }
            drop(feed);
            assert_eq!(body.collect().await.unwrap().to_bytes(), expected);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_that_begins_in_time_keeps_its_byte_order_mark() {
        let (body, feed) = streaming(&[]).await;
        say(&feed, "\u{FEFF}data: x\n\n");
        drop(feed);
        assert_eq!(body.collect().await.unwrap().to_bytes(), "\u{FEFF}data: x\n\n");
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_seen_into_or_has_a_length_is_left_alone() {
        let cases = [(CONTENT_ENCODING, "gzip"), (CONTENT_LENGTH, "100"), (CONTENT_TYPE, "text/plain")];
        for case in cases {
            let (mut body, _feed) = streaming(&[case]).await;
            assert_eq!(now(&mut body), None);
            advance(EVERY * 2).await;
            assert_eq!(now(&mut body), None);
        }
        let backend = service_fn(|_| {
            std::future::ready(
                Response::builder().header(CONTENT_TYPE, "text/event-stream").body(Body::from("data: x")),
            )
        });
        let response = HeartbeatLayer::new(EVERY).layer(backend).oneshot(Request::new(())).await.unwrap();
        assert_eq!(response.body().size_hint().exact(), Some(7));
    }

    fn events(stream: &[u8]) -> Vec<Event> {
        let (mut scanner, mut rest, mut found) = (Scanner::new(), stream, Vec::new());
        while let Some(event) = scanner.next(&mut rest) {
            found.extend((event != Event::Empty).then_some(event));
        }
        found
    }

    proptest! {
        /// Whatever the stream and wherever it is silent, its receiver finds the same events in it.
        #[test]
        fn no_event_is_changed(
            frames in prop::collection::vec(
                (prop::sample::select(vec!["\u{FEFF}", "data: a", "data: a\n\n", "event: error", "\n", "\r", "\n\n", "\r\n\r\n", ":"]), 0..3u32),
                0..12,
            ),
            early in 0..3u32,
            marked in any::<bool>(),
        ) {
            let begins = marked.then_some(("\u{FEFF}", 0));
            let frames: Vec<(&str, u32)> = begins.into_iter().chain(frames).collect();
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            runtime.block_on(async {
                let (mut body, feed) = streaming(&[]).await;
                let mut out = Vec::new();
                let mut silences = early;
                for (frame, after) in &frames {
                    for _ in 0..silences {
                        out.extend(now(&mut body).unwrap_or_default());
                        advance(EVERY).await;
                        out.extend(now(&mut body).unwrap_or_default());
                    }
                    say(&feed, frame);
                    silences = *after;
                }
                drop(feed);
                while let Some(data) = now(&mut body) {
                    out.extend(data);
                }
                let stream: String = frames.iter().map(|(frame, _)| *frame).collect();
                assert_eq!(events(&out), events(stream.as_bytes()), "{stream:?} became {:?}", str::from_utf8(&out));
            });
        }
    }

    #[tokio::test(start_paused = true)]
    async fn trailers_errors_and_the_end_pass() {
        let (mut body, feed) = streaming(&[]).await;
        let trailers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("x"))]);
        feed.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
        assert_eq!(body.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        assert!(body.frame().now_or_never().is_none());
        advance(EVERY * 2).await;
        assert!(body.frame().now_or_never().is_none(), "nothing follows the trailers");
        feed.send(Err("broken".into())).unwrap();
        assert!(body.frame().await.unwrap().is_err());
    }
}
