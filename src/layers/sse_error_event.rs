//! Error event: `timeouts.sse_error_event`, around the responses of a route.
//!
//! A stream that breaks off says nothing about why, and to a browser's `EventSource` it is a reason to come back at
//! once. Where this is asked for, a stream that breaks off after its head (silence past `idle`, a reset, the deadline) is
//! ended with one `event: error`, whose data is what the body of an error response would have been: problem JSON, or
//! OpenAI's object on routes with `errors: openai`. Then it ends in order. That is no pretence of success: the last
//! thing it says is that it failed. The log line and the samples say `error` and `aborted_by` as for any broken stream.
//!
//! An event that has begun cannot be taken back: a blank line would deliver its beginning as if it were whole. So a
//! stream that breaks off inside an event is broken off as without this policy, and receivers discard the fragment
//! (WHATWG HTML §9.2.6). The same holds for streams with a content coding or a length. Off until asked for.
//!
//! ```
//! use futures_util::stream;
//! use http::{Request, Response};
//! use http_body_util::{BodyExt, StreamBody};
//! use sidegate::{layers::sse_error_event::SseErrorEventLayer, message::{Body, BoxError, Error, Form, Kind}};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(SseErrorEventLayer::new(Form::Problem))
//!     .service(service_fn(|_: Request<()>| async {
//!         let broken = Err::<http_body::Frame<_>, BoxError>(Error::from(Kind::UpstreamTimeout).into());
//!         let body = Body::new(StreamBody::new(stream::iter([broken])));
//!         Response::builder().header("content-type", "text/event-stream").body(body)
//!     }));
//! let body = service.oneshot(Request::new(())).await.unwrap().into_body().collect().await.unwrap().to_bytes();
//! assert!(body.starts_with(b"event: error\ndata: {") && body.ends_with(b"}\n\n"));
//! # });
//! ```

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use crate::{
    message::{Body, BoxError, Error, Form, Kind},
    sse::{Boundary, has_room},
    telemetry::exchange::Subject,
};

/// Ends event streams that break off with an event that says so: see the [module](self).
#[derive(Debug, Clone, Copy)]
pub struct SseErrorEventLayer {
    form: Form,
}

impl SseErrorEventLayer {
    /// A layer whose events carry documents of this form.
    #[must_use]
    pub const fn new(form: Form) -> Self {
        Self { form }
    }
}

impl<S> Layer<S> for SseErrorEventLayer {
    type Service = SseErrorEvent<S>;

    fn layer(&self, inner: S) -> SseErrorEvent<S> {
        SseErrorEvent { inner, form: self.form }
    }
}

/// The service of [`SseErrorEventLayer`].
#[derive(Debug, Clone)]
pub struct SseErrorEvent<S> {
    inner: S,
    form: Form,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for SseErrorEvent<S>
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
        let about = Some(About { form: self.form, asked: Subject::of(&request) });
        ResponseFuture { inner: self.inner.call(request), about }
    }
}

pin_project! {
    /// The response of [`SseErrorEvent`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        about: Option<About>,
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
        let about = this.about.take().filter(|_| has_room);
        Poll::Ready(Ok(response.map(|body| match about {
            Some(about) => Body::new(ResponseBody { body, boundary: Boundary::new(), about, over: false }),
            None => Body::new(body),
        })))
    }
}

/// What the event needs to know of its request.
#[derive(Debug)]
struct About {
    form: Form,
    asked: Subject,
}

impl About {
    fn event(&self, error: &(dyn std::error::Error + 'static)) -> Bytes {
        if let Some(exchange) = self.asked.exchange() {
            exchange.cut(error);
        }
        let kind = Error::find(error).map_or(Kind::Internal, Error::kind);
        // On one line: JSON has no line ends outside of strings, and escapes those inside.
        let document = self.form.document(kind, self.asked.path(), self.asked.request_id());
        format!("event: error\ndata: {document}\n\n").into()
    }
}

pin_project! {
    /// An event stream that says how it broke off.
    struct ResponseBody<B> {
        #[pin]
        body: B,
        boundary: Boundary,
        about: About,
        over: bool,
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
        if *this.over {
            return Poll::Ready(None);
        }
        Poll::Ready(match ready!(this.body.poll_frame(cx)) {
            Some(Ok(frame)) => {
                match frame.data_ref() {
                    Some(data) => this.boundary.pass(data),
                    None => this.boundary.close(),
                }
                Some(Ok(frame))
            }
            Some(Err(error)) => {
                let error = error.into();
                if !this.boundary.here() {
                    return Poll::Ready(Some(Err(error)));
                }
                *this.over = true;
                Some(Ok(Frame::data(this.about.event(&*error))))
            }
            None => None,
        })
    }

    fn is_end_stream(&self) -> bool {
        self.over || self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.over {
            return SizeHint::with_exact(0);
        }
        let mut hint = SizeHint::new();
        hint.set_lower(self.body.size_hint().lower());
        hint
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use futures_util::stream;
    use http::{
        HeaderMap, HeaderValue,
        header::{CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE},
    };
    use http_body_util::{BodyExt, StreamBody};
    use serde_json::{Value, json};
    use tower::{ServiceExt, service_fn};

    use super::*;
    use crate::{
        message::RequestId,
        telemetry::{Exchange, metrics::AbortedBy},
    };

    /// What comes of an event stream that says this and then breaks off.
    async fn broken_off(
        form: Form,
        request: Request<()>,
        said: &'static [&'static str],
        header: Option<(http::HeaderName, &'static str)>,
    ) -> (String, bool) {
        let backend = service_fn(|_| {
            let frames = said.iter().map(|part| Ok(Frame::data(Bytes::from_static(part.as_bytes()))));
            let broken = std::iter::once(Err(BoxError::from(Error::from(Kind::UpstreamTimeout))));
            let body = Body::new(StreamBody::new(stream::iter(frames.chain(broken).collect::<Vec<_>>())));
            let mut response = Response::new(body);
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
            if let Some((name, value)) = &header {
                response.headers_mut().insert(name, HeaderValue::from_static(value));
            }
            std::future::ready(Ok::<_, Infallible>(response))
        });
        let response = SseErrorEventLayer::new(form).layer(backend).oneshot(request).await.unwrap();
        let mut body = response.into_body();
        let mut text = String::new();
        while let Some(frame) = body.frame().await {
            match frame {
                Ok(frame) => text += str::from_utf8(frame.data_ref().unwrap()).unwrap(),
                Err(_) => return (text, true),
            }
        }
        assert!(body.is_end_stream());
        (text, false)
    }

    fn request() -> Request<()> {
        Request::builder().uri("/ask?q=1").extension(RequestId(HeaderValue::from_static("id-1"))).body(()).unwrap()
    }

    fn data(text: &str) -> Value {
        let data = text.strip_prefix("data: one\n\nevent: error\ndata: ").unwrap();
        serde_json::from_str(data.strip_suffix("\n\n").unwrap()).unwrap()
    }

    #[tokio::test]
    async fn the_last_event_is_what_the_error_response_would_have_been() {
        let (text, broken) = broken_off(Form::Problem, request(), &["data: one\n\n"], None).await;
        let problem = json!({
            "type": "urn:sidegate:problem:upstream-timeout", "title": "Gateway Timeout", "status": 504,
            "detail": "the upstream did not answer in time", "instance": "/ask", "request_id": "id-1",
        });
        assert_eq!((data(&text), broken), (problem, false));
        let (text, broken) = broken_off(Form::Openai, request(), &["data: one\n\n"], None).await;
        assert_eq!((&data(&text)["error"]["code"], broken), (&json!("upstream-timeout"), false));
    }

    #[tokio::test]
    async fn the_record_says_that_it_was_cut() {
        let mut request = request();
        let exchange = Exchange::new(&request);
        request.extensions_mut().insert(exchange.clone());
        broken_off(Form::Problem, request, &[], None).await;
        let facts = exchange.facts();
        assert_eq!((facts.error, facts.aborted_by), (Some("upstream-timeout"), Some(AbortedBy::Timeout)));
    }

    #[tokio::test]
    async fn half_an_event_is_broken_off() {
        for half in ["data: a", "data: a\n", ": a", "data: a\n\nevent: b\n"] {
            let said: &'static [&'static str] = Box::leak(Box::new([half]));
            let (text, broken) = broken_off(Form::Problem, request(), said, None).await;
            assert_eq!((text.as_str(), broken), (half, true));
        }
    }

    #[tokio::test]
    async fn what_cannot_be_seen_into_or_has_a_length_is_broken_off() {
        for header in [(CONTENT_ENCODING, "gzip"), (CONTENT_LENGTH, "100"), (CONTENT_TYPE, "text/plain")] {
            let (text, broken) = broken_off(Form::Problem, request(), &["data: one\n\n"], Some(header)).await;
            assert_eq!((text.as_str(), broken), ("data: one\n\n", true));
        }
    }

    #[tokio::test]
    async fn nothing_follows_the_trailers() {
        let backend = service_fn(|_| {
            let frames = [Ok(Frame::trailers(HeaderMap::new())), Err(BoxError::from("broken"))];
            let body = Body::new(StreamBody::new(stream::iter(frames)));
            std::future::ready(Response::builder().header(CONTENT_TYPE, "text/event-stream").body(body))
        });
        let response = SseErrorEventLayer::new(Form::Problem).layer(backend).oneshot(Request::new(())).await.unwrap();
        let mut body = response.into_body();
        assert!(body.frame().await.unwrap().unwrap().is_trailers());
        assert!(body.frame().await.unwrap().is_err());
    }
}
