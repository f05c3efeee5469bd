//! The one body type: what an upstream streams, what sidegate writes itself, or nothing.

use std::{
    any::Any,
    collections::VecDeque,
    fmt,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};

use super::BoxError;

/// A request or response body, streamed frame by frame.
///
/// Bytes known in advance are held as they are; anything else is boxed once. A body that fails does so
/// with [`Error`](super::Error) in its chain where sidegate knows the reason, so that a stream that was
/// cut is classified the same way as a request that was refused.
pub struct Body(Inner);

enum Inner {
    Full(Bytes),
    Boxed(Pin<Box<dyn HttpBody<Data = Bytes, Error = BoxError> + Send>>),
}

impl Body {
    /// A body without a byte.
    #[must_use]
    pub const fn empty() -> Self {
        Self(Inner::Full(Bytes::new()))
    }

    /// Wraps any body; one that is a `Body` already is handed back as it is.
    pub fn new<B>(body: B) -> Self
    where
        B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let mut body = Some(body);
        // A downcast instead of a specialisation: an `Option` that is a `Option<Body>` gives its body up.
        if let Some(own) = (&mut body as &mut dyn Any).downcast_mut::<Option<Self>>() {
            return own.take().unwrap_or_else(Self::empty);
        }
        match body {
            Some(body) => Self(Inner::Boxed(Box::pin(Erased { body }))),
            None => Self::empty(),
        }
    }
}

impl Body {
    /// These frames, and then those of the body. They are known already: the body is not asked before they are gone.
    #[must_use]
    pub fn preceded(self, by: impl IntoIterator<Item = Frame<Bytes>>) -> Self {
        let by: VecDeque<_> =
            by.into_iter().filter(|frame| frame.data_ref().is_none_or(|data| !data.is_empty())).collect();
        if by.is_empty() { self } else { Self::new(Preceded { by, body: self }) }
    }

    /// Lets `strip` take from the trailers what may not go further.
    #[must_use]
    pub fn stripping_trailers(self, strip: impl Fn(&mut HeaderMap) + Send + Unpin + 'static) -> Self {
        // Nothing comes, and so no trailers do.
        if self.is_end_stream() { self } else { Self::new(Stripping { body: self, strip }) }
    }
}

/// A body with frames before it.
struct Preceded {
    by: VecDeque<Frame<Bytes>>,
    body: Body,
}

impl HttpBody for Preceded {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match self.by.pop_front() {
            Some(frame) => Poll::Ready(Some(Ok(frame))),
            None => Pin::new(&mut self.body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.by.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let before: u64 = self.by.iter().filter_map(|frame| Some(frame.data_ref()?.len() as u64)).sum();
        let rest = self.body.size_hint();
        let mut hint = SizeHint::new();
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(before));
        }
        hint.set_lower(rest.lower().saturating_add(before));
        hint
    }
}

/// A body that loses some of its trailers.
struct Stripping<F> {
    body: Body,
    strip: F,
}

impl<F: Fn(&mut HeaderMap)> Stripping<F> {
    fn strip(&self, mut frame: Frame<Bytes>) -> Frame<Bytes> {
        if let Some(trailers) = frame.trailers_mut() {
            (self.strip)(trailers);
        }
        frame
    }
}

impl<F: Fn(&mut HeaderMap) + Unpin> HttpBody for Stripping<F> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        polled.map_ok(|frame| self.strip(frame))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Default for Body {
    fn default() -> Self {
        Self::empty()
    }
}

impl From<Bytes> for Body {
    fn from(bytes: Bytes) -> Self {
        Self(Inner::Full(bytes))
    }
}

impl From<String> for Body {
    fn from(text: String) -> Self {
        Bytes::from(text).into()
    }
}

impl From<Vec<u8>> for Body {
    fn from(bytes: Vec<u8>) -> Self {
        Bytes::from(bytes).into()
    }
}

impl From<&'static str> for Body {
    fn from(text: &'static str) -> Self {
        Bytes::from_static(text.as_bytes()).into()
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        match &mut self.0 {
            Inner::Full(bytes) if bytes.is_empty() => Poll::Ready(None),
            Inner::Full(bytes) => Poll::Ready(Some(Ok(Frame::data(std::mem::take(bytes))))),
            Inner::Boxed(body) => body.as_mut().poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match &self.0 {
            Inner::Full(bytes) => bytes.is_empty(),
            Inner::Boxed(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.0 {
            Inner::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Inner::Boxed(body) => body.size_hint(),
        }
    }
}

impl fmt::Debug for Body {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Only the shape: bytes of a body are nobody's business in a log.
        f.debug_struct("Body").field("size", &self.size_hint()).finish_non_exhaustive()
    }
}

pin_project_lite::pin_project! {
    /// Any body with its error boxed.
    struct Erased<B> {
        #[pin]
        body: B,
    }
}

impl<B> HttpBody for Erased<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        self.project().body.poll_frame(cx).map_err(Into::into)
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
    use http_body_util::{BodyExt, Empty};

    use super::*;

    #[tokio::test]
    async fn a_body_is_not_boxed_twice() {
        let body = Body::new(Body::from("text"));
        assert!(matches!(body.0, Inner::Full(_)), "`new` hands a `Body` back as it is");
        assert_eq!(body.collect().await.unwrap().to_bytes(), "text");
    }

    #[test]
    fn what_is_known_of_the_size_passes_through() {
        assert!(Body::empty().is_end_stream());
        assert_eq!(Body::from("four").size_hint().exact(), Some(4));
        assert!(Body::new(Empty::<Bytes>::new()).is_end_stream());
    }
}
