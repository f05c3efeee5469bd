//! A request body that can be read again.
//!
//! The body is kept while it streams to the first attempt, and nothing waits for it to be complete. Each further
//! attempt reads what was kept and then what is still to come, trailers included. A body that is larger than the
//! bound is sent all the same, and cannot be read again once a byte of what is not kept has left. (The form is that of
//! linkerd's `ReplayBody`.)
//!
//! Retries and fallbacks share one of these per request: whoever stands outside makes it and leaves it as a request
//! extension, whoever stands inside finds it there.

use std::{
    fmt,
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker, ready},
};

use bytes::Bytes;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;

use super::{Body, BoxError, Error, Kind};

/// The body of a request, for as many attempts as it takes. Clones are the same body.
///
/// Request extension. Written by `layers::fallback`, or by `layers::retry` where no fallback stands outside; read by
/// `layers::retry`.
///
/// ```
/// use http_body_util::BodyExt;
/// use sidegate::message::{Body, Replay};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let replay = Replay::new(Body::from("question"), 64 * 1024);
/// for _attempt in 1..=2 {
///     let body = replay.body().expect("nothing was lost");
///     assert_eq!(body.collect().await.unwrap().to_bytes(), "question");
/// }
/// # });
/// ```
#[derive(Clone)]
pub struct Replay(Option<Arc<Mutex<State>>>);

struct State {
    source: Body,
    /// What has left the source, unless it is lost.
    kept: Vec<u8>,
    trailers: Option<HeaderMap>,
    /// The most that is kept, in bytes.
    limit: usize,
    over: bool,
    lost: bool,
    /// The attempt that may read. Whoever read before reads no more: a body has one reader at a time.
    reader: u64,
    waiting: Option<Waker>,
}

impl Replay {
    /// Keeps up to `limit` bytes of `body`. Nothing is allocated for a body without a byte.
    #[must_use]
    pub fn new(body: Body, limit: usize) -> Self {
        Self((!body.is_end_stream()).then(|| {
            // Of what is known to be too large nothing needs to be kept. It is lost with its first byte.
            let limit = if body.size_hint().lower() > limit as u64 { 0 } else { limit };
            Arc::new(Mutex::new(State {
                source: body,
                kept: Vec::new(),
                trailers: None,
                limit,
                over: false,
                lost: false,
                reader: 0,
                waiting: None,
            }))
        }))
    }

    /// The body from its start, for one more attempt; `None` where a part of it is lost. From now on, the bodies of the
    /// attempts before it fail.
    #[must_use]
    pub fn body(&self) -> Option<Body> {
        let Some(shared) = &self.0 else { return Some(Body::empty()) };
        let mut state = shared.lock();
        if state.lost {
            return None;
        }
        state.reader += 1;
        let former = state.waiting.take();
        let reader = Reader { shared: shared.clone(), turn: state.reader, at: 0, trailed: false };
        drop(state);
        former.into_iter().for_each(Waker::wake);
        Some(Body::new(reader))
    }

    /// Whether the body can be read from its start.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| !shared.lock().lost)
    }

    /// Whether it was clear from the start that there is no body.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_none()
    }

    /// Whether the body will be kept, as far as is known before it was read: one whose length is beyond the limit is not.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| {
            let state = shared.lock();
            !state.lost && state.limit > 0
        })
    }

    /// All bytes of the body, once they are there; `None` where they are more than are kept, or some were lost. The
    /// bodies of the attempts before it fail, as with [`body`](Self::body).
    ///
    /// # Errors
    /// The body's own.
    pub async fn bytes(&self) -> Result<Option<Bytes>, BoxError> {
        let Some(shared) = &self.0 else { return Ok(Some(Bytes::new())) };
        let Some(mut body) = self.body() else { return Ok(None) };
        while shared.lock().is_coming() {
            if let Some(frame) = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
                frame?;
            }
        }
        let state = shared.lock();
        Ok((!state.lost).then(|| Bytes::copy_from_slice(&state.kept)))
    }

    /// How many have begun to read it.
    #[must_use]
    pub fn turns(&self) -> u64 {
        self.0.as_ref().map_or(0, |shared| shared.lock().reader)
    }

    /// Whether all of it has come, as far as anybody looked.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.as_ref().is_none_or(|shared| shared.lock().over)
    }

    /// The trailers that came behind the body, once it is over.
    #[must_use]
    pub fn trailers(&self) -> Option<HeaderMap> {
        self.0.as_ref().and_then(|shared| shared.lock().trailers.clone())
    }
}

impl fmt::Debug for Replay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Only the shape: bytes of a body are nobody's business in a log.
        f.debug_struct("Replay").field("whole", &self.is_whole()).finish_non_exhaustive()
    }
}

impl State {
    /// The next frame of the source, kept if it fits.
    fn advance(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let frame = ready!(Pin::new(&mut self.source).poll_frame(cx));
        match &frame {
            None => self.over = true,
            // What failed once is not asked again.
            Some(Err(_)) => self.lose(),
            Some(Ok(frame)) => {
                if let Some(data) = frame.data_ref().filter(|_| !self.lost) {
                    if self.kept.len() + data.len() > self.limit {
                        self.lose();
                    } else {
                        // Copied: a slice as small as a byte would hold all of the buffer that it was read into.
                        self.kept.extend_from_slice(data);
                    }
                } else if let Some(trailers) = frame.trailers_ref() {
                    self.trailers = Some(trailers.clone());
                    self.over = true;
                }
                self.over |= self.source.is_end_stream();
            }
        }
        Poll::Ready(frame)
    }

    /// Whether more of it is awaited, and would be kept.
    fn is_coming(&self) -> bool {
        !self.lost && !self.over
    }

    fn lose(&mut self) {
        self.lost = true;
        self.kept = Vec::new();
    }
}

/// The body of one attempt.
struct Reader {
    shared: Arc<Mutex<State>>,
    turn: u64,
    /// How much of what is kept was read.
    at: usize,
    trailed: bool,
}

impl HttpBody for Reader {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let mut state = this.shared.lock();
        if state.reader != this.turn {
            return Poll::Ready(Some(Err(Error::new(Kind::ClientReset, "another attempt has taken over").into())));
        }
        if let Some(rest) = state.kept.get(this.at..).filter(|rest| !rest.is_empty()) {
            let rest = Bytes::copy_from_slice(rest);
            this.at += rest.len();
            return Poll::Ready(Some(Ok(Frame::data(rest))));
        }
        if state.over {
            let trailers = if this.trailed { None } else { state.trailers.clone() };
            this.trailed = true;
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        }
        let frame = state.advance(cx);
        match &frame {
            Poll::Pending => state.waiting = Some(cx.waker().clone()),
            Poll::Ready(Some(Ok(frame))) => {
                this.at += frame.data_ref().map_or(0, Bytes::len);
                this.trailed |= frame.is_trailers();
            }
            Poll::Ready(_) => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        let state = self.shared.lock();
        let read = state.lost || self.at >= state.kept.len();
        read && (state.source.is_end_stream() || state.over) && (self.trailed || state.trailers.is_none())
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.shared.lock();
        let mut hint = state.source.size_hint();
        if !state.lost {
            let kept = state.kept.len().saturating_sub(self.at) as u64;
            // The upper bound first: the lower one may not go beyond it.
            if let Some(upper) = hint.upper() {
                hint.set_upper(upper.saturating_add(kept));
            }
            hint.set_lower(hint.lower().saturating_add(kept));
        }
        hint
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt, stream};
    use http::HeaderValue;
    use http_body_util::{BodyExt, StreamBody};
    use proptest::{collection::vec, prelude::*};

    use super::*;

    fn frames(frames: Vec<Frame<Bytes>>) -> Body {
        Body::new(StreamBody::new(stream::iter(frames.into_iter().map(Ok::<_, std::io::Error>))))
    }

    fn data(text: &'static str) -> Frame<Bytes> {
        Frame::data(Bytes::from_static(text.as_bytes()))
    }

    async fn text(body: Body) -> Bytes {
        body.collect().await.unwrap().to_bytes()
    }

    #[tokio::test]
    async fn an_attempt_that_read_half_leaves_all_of_it_to_the_next() {
        let trailers = HeaderMap::from_iter([(http::HeaderName::from_static("x-sum"), HeaderValue::from_static("1"))]);
        let replay = Replay::new(frames(vec![data("one "), data("two"), Frame::trailers(trailers.clone())]), 100);
        let mut first = replay.body().unwrap();
        assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "one ");
        drop(replay.body().unwrap());
        assert!(first.frame().await.unwrap().is_err(), "the first reads no more");
        for _ in 0..2 {
            let again = replay.body().unwrap().collect().await.unwrap();
            assert_eq!(again.trailers(), Some(&trailers));
            assert_eq!(again.to_bytes(), "one two");
        }
        assert_eq!(replay.trailers(), Some(trailers));
    }

    #[tokio::test]
    async fn who_waits_for_a_frame_learns_that_another_attempt_reads() {
        let replay = Replay::new(Body::new(StreamBody::new(stream::pending::<Result<_, std::io::Error>>())), 100);
        let mut first = replay.body().unwrap();
        let waiting = tokio::spawn(async move { first.frame().await.unwrap().is_err() });
        tokio::task::yield_now().await;
        let _second = replay.body().unwrap();
        assert!(waiting.await.unwrap());
    }

    #[tokio::test]
    async fn what_is_too_large_is_sent_and_not_sent_again() {
        let replay = Replay::new(frames(vec![data("four"), data("four")]), 7);
        let mut first = replay.body().unwrap();
        first.frame().await.unwrap().unwrap();
        assert!(replay.is_whole());
        assert_eq!(text(first).await, "four");
        assert!(!replay.is_whole() && replay.body().is_none());
        assert_eq!(replay.bytes().await.unwrap(), None);
    }

    #[tokio::test]
    async fn of_what_is_too_large_by_its_length_nothing_is_lost_before_it_is_read() {
        let replay = Replay::new(Body::from("too large"), 8);
        drop(replay.body().unwrap());
        let mut second = replay.body().unwrap();
        assert_eq!(second.size_hint().exact(), Some(9));
        second.frame().await.unwrap().unwrap();
        assert!(replay.body().is_none());
    }

    #[tokio::test]
    async fn a_body_that_breaks_off_is_not_read_again() {
        let broken = stream::iter([Ok(data("half")), Err(std::io::Error::other("gone"))]);
        let replay = Replay::new(Body::new(StreamBody::new(broken)), 100);
        assert!(replay.bytes().await.is_err());
        assert!(replay.body().is_none());
    }

    #[tokio::test]
    async fn a_length_is_told_at_every_attempt() {
        let replay = Replay::new(Body::from("question"), 100);
        for _ in 0..2 {
            let mut body = replay.body().unwrap();
            assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(8), false));
            body.frame().await.unwrap().unwrap();
            assert_eq!((body.size_hint().exact(), body.is_end_stream()), (Some(0), true));
        }
        assert_eq!(replay.bytes().await.unwrap().unwrap(), "question");
        assert!(Replay::new(Body::empty(), 100).body().unwrap().is_end_stream());
    }

    proptest! {
        /// However far each attempt reads, the last one reads all of it, or none can.
        #[test]
        fn the_last_attempt_reads_what_the_client_sent(
            sent in vec(vec(any::<u8>(), 0..20), 1..8),
            reads in vec(0..10_usize, 0..4),
            limit in 0..100_usize,
        ) {
            let source = stream::iter(sent.clone()).map(|bytes| Ok::<_, std::io::Error>(Frame::data(Bytes::from(bytes))));
            let replay = Replay::new(Body::new(StreamBody::new(source)), limit);
            for read in reads {
                let Some(mut body) = replay.body() else { break };
                for _ in 0..read {
                    prop_assert!(body.frame().now_or_never().is_some(), "nothing to wait for");
                }
            }
            let all = sent.concat();
            match replay.body() {
                Some(body) => prop_assert_eq!(text(body).now_or_never().unwrap(), all),
                None => prop_assert!(all.len() > limit),
            }
        }
    }
}
