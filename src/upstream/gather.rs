//! Gathers what has already arrived of a stream before it hands it on.
//!
//! Hyper reads a burst of small chunks with one system call, but hands them over one at a time, and its server
//! side writes each to the client with a system call of its own. Here all that is ready is taken before any of
//! it is passed on: no timer, no turn of the runtime, no delay. A frame that comes alone passes as it is; a
//! burst passes as one write.

use std::{
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Bytes, BytesMut};
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;

/// The most that is gathered, in bytes: a write of this size is far from being dominated by its call.
const MOST: usize = 32 * 1024;
pin_project! {
    /// A body whose frames are gathered. See the [module](self).
    pub(super) struct Gather<B: HttpBody> {
        #[pin]
        body: B,
        first: Bytes,
        more: BytesMut,
        next: Option<Next<B::Error>>,
    }
}

/// What follows the gathered bytes.
enum Next<E> {
    Trailers(Frame<Bytes>),
    Error(E),
    End,
}

impl<B: HttpBody<Data = Bytes>> Gather<B> {
    pub(super) fn new(body: B) -> Self {
        Self { body, first: Bytes::new(), more: BytesMut::new(), next: None }
    }
}

impl<B: HttpBody<Data = Bytes>> HttpBody for Gather<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        let mut this = self.project();
        loop {
            if this.next.is_some() {
                if !this.first.is_empty() {
                    break;
                }
                return Poll::Ready(match this.next.take() {
                    Some(Next::Trailers(frame)) => Some(Ok(frame)),
                    Some(Next::Error(error)) => Some(Err(error)),
                    Some(Next::End) | None => {
                        *this.next = Some(Next::End);
                        None
                    }
                });
            }
            match this.body.as_mut().poll_frame(cx) {
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) => {
                        // The first frame is held as it is: most streams bring one at a time.
                        if this.first.is_empty() {
                            *this.first = data;
                        } else {
                            if this.more.is_empty() {
                                this.more.extend_from_slice(this.first);
                            }
                            this.more.extend_from_slice(&data);
                        }
                        if this.first.len().max(this.more.len()) >= MOST {
                            break;
                        }
                    }
                    Err(trailers) => *this.next = Some(Next::Trailers(trailers)),
                },
                Poll::Ready(Some(Err(error))) => *this.next = Some(Next::Error(error)),
                Poll::Ready(None) => *this.next = Some(Next::End),
                Poll::Pending if this.first.is_empty() => return Poll::Pending,
                Poll::Pending => break,
            }
        }
        let first = std::mem::take(this.first);
        let data = if this.more.is_empty() { first } else { std::mem::take(this.more).freeze() };
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        match &self.next {
            Some(Next::End) => self.first.is_empty(),
            Some(_) => false,
            None => self.first.is_empty() && self.body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        // Only bodies of unknown length are gathered.
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt, stream};
    use http_body_util::{BodyExt, StreamBody};

    use super::*;

    #[expect(clippy::unnecessary_wraps, reason = "an item of the streams below")]
    fn data(text: &'static str) -> Result<Frame<Bytes>, &'static str> {
        Ok(Frame::data(Bytes::from_static(text.as_bytes())))
    }

    /// The frames that come out, as text.
    async fn frames<S>(stream: S) -> Vec<Result<String, &'static str>>
    where
        S: futures_util::Stream<Item = Result<Frame<Bytes>, &'static str>>,
    {
        let mut body = Box::pin(Gather::new(StreamBody::new(stream)));
        let mut out = Vec::new();
        while let Some(frame) = body.frame().await {
            out.push(frame.map(|frame| match frame.into_data() {
                Ok(data) => String::from_utf8(data.to_vec()).unwrap(),
                Err(_) => "trailers".to_owned(),
            }));
        }
        assert!(body.frame().await.is_none(), "the end stays the end");
        out
    }

    #[tokio::test]
    async fn what_is_there_passes_as_one_frame() {
        assert_eq!(frames(stream::iter([data("a"), data("b"), data("c")])).await, [Ok("abc".into())]);
    }

    #[tokio::test]
    async fn a_frame_is_never_held_for_one_that_may_not_come() {
        let silent = stream::iter([data("a")]).chain(stream::pending());
        let mut body = Box::pin(Gather::new(StreamBody::new(silent)));
        let frame = body.frame().now_or_never().expect("at once").unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), "a");
        assert!(body.frame().now_or_never().is_none());
    }

    #[tokio::test]
    async fn an_error_and_trailers_come_after_what_was_gathered() {
        let broken = stream::iter([data("a"), data("b"), Err("reset")]);
        assert_eq!(frames(broken).await, [Ok("ab".into()), Err("reset")]);
        let trailers = Ok(Frame::trailers(http::HeaderMap::new()));
        assert_eq!(frames(stream::iter([data("a"), trailers])).await, [Ok("a".into()), Ok("trailers".into())]);
    }

    #[tokio::test]
    async fn no_more_is_gathered_than_the_bound() {
        let big = || Ok(Frame::data(Bytes::from(vec![0; MOST])));
        let lengths: Vec<_> =
            frames(stream::iter([big(), big()])).await.into_iter().map(|f| f.unwrap().len()).collect();
        assert_eq!(lengths, [MOST, MOST]);
    }
}
