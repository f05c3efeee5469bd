//! A request's body on its way to the upstream.

use std::{
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use crate::message::{Body, BoxError, Error, Kind};

/// How long a body that the client offers (`Expect: 100-continue`) waits for the upstream's word, before it
/// is sent unasked (RFC 9110 §10.1.1: no waiting for an indefinite time).
const PATIENCE: Duration = Duration::from_secs(1);

/// What the two sides of an upload share.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// All of the body has been handed over.
    done: AtomicBool,
    /// The upstream wants the body, or does not say.
    wanted: AtomicBool,
    waiting: AtomicWaker,
    /// Why it broke off.
    failed: OnceLock<Kind>,
}

impl Progress {
    /// Whether all of the body has been handed over.
    pub(super) fn done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Why the body broke off, where it did: the exchange has then failed by this, whatever became of the connection.
    pub(super) fn failed(&self) -> Option<Kind> {
        self.failed.get().copied()
    }

    /// Lets the body pass.
    pub(super) fn want(&self) {
        self.wanted.store(true, Ordering::Release);
        self.waiting.wake();
    }
}

/// A request body that tells when it is through and, where the client has offered it first, is not read
/// before the upstream has asked for it: the client's `100 Continue` is then the upstream's own.
pub(super) struct Upload {
    body: Body,
    progress: Arc<Progress>,
    patience: Option<Pin<Box<Sleep>>>,
}

impl Upload {
    /// `body`, held back until it is wanted where it was `offered` first.
    pub(super) fn new(body: Body, offered: bool) -> (Self, Arc<Progress>) {
        let progress = Arc::new(Progress::default());
        let patience = offered.then(|| Box::pin(sleep(PATIENCE)));
        (Self { body, progress: progress.clone(), patience }, progress)
    }

    /// Until when it is held back at most.
    pub(super) fn held_until(&self) -> Option<Instant> {
        self.patience.as_ref().map(|patience| patience.deadline())
    }
}

impl HttpBody for Upload {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        if let Some(patience) = &mut this.patience {
            this.progress.waiting.register(cx.waker());
            if !this.progress.wanted.load(Ordering::Acquire) {
                ready!(patience.as_mut().poll(cx));
            }
            this.patience = None;
        }
        let frame = ready!(Pin::new(&mut this.body).poll_frame(cx));
        if let Some(Err(error)) = &frame {
            // Before hyper hears of it, who ends the connection or the stream upon it and does not say why.
            this.progress.failed.get_or_init(|| Error::find(&**error).map_or(Kind::ClientReset, Error::kind));
        }
        if frame.is_none() || this.body.is_end_stream() {
            this.progress.done.store(true, Ordering::Release);
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
mod tests {
    use futures_util::FutureExt;
    use http_body_util::BodyExt;
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_offered_body_waits_to_be_wanted_but_not_for_ever() {
        let (mut upload, progress) = Upload::new(Body::from("x"), true);
        assert!(upload.frame().now_or_never().is_none());
        progress.want();
        assert!(upload.frame().now_or_never().is_some());
        assert!(progress.done());

        let (mut upload, _) = Upload::new(Body::from("x"), true);
        assert!(upload.frame().now_or_never().is_none());
        advance(PATIENCE).await;
        assert!(upload.frame().now_or_never().is_some());
    }
}
