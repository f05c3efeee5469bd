//! The tasks of HTTP/2 streams, and their end where a client takes nothing of a response.
//!
//! Over HTTP/1.1 a client that does not read stops the writes of its connection, which the connection's timer sees. Over
//! HTTP/2 each stream has a window of its own (RFC 9113 §5.2): a client may read all others, answer every PING, and
//! never open the window of one. hyper then keeps the next chunk in hand and asks the body for no more, so no timeout
//! of a body can fire: an upstream, and a place among the streams, would be held for ever.
//!
//! hyper runs each stream as a task of the executor that it is given. This one looks after each poll at what the stream
//! has done: asked for the answer or its body and found nothing (then the upstream is slow, and other timeouts
//! apply), or not even asked. Past `idle` of that the task ends, which resets the stream with CANCEL and cancels the
//! upstream request; the connection goes on. nginx does the same under `send_timeout`, Envoy under
//! `stream_idle_timeout`.
//!
//! A response that has a deadline (`timeouts.total`) is held to it in the same way: its body sees the deadline only when it
//! is asked.
//!
//! A client that reads slowly is asked no more than that it takes a piece of its response (see `response`) within `idle`.
//!
//! What a body has handed over to its end lies in h2, out of sight, until the window opens or the connection ends: at
//! most one chunk per stream, and such a stream still counts as one of `limits.http2_streams`.

use std::{
    cell::Cell,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use hyper::rt::Executor;
use hyper_util::rt::TokioExecutor;
use tokio::time::{Instant, Sleep, sleep_until};
use tracing::debug;

use super::connection::Timing;

/// What a stream did last in a poll of its task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Did {
    /// Neither the answer nor its body was asked: the client's window is closed. (Or the task is that of a tunnel, which
    /// never asks, and has a timeout of its own.)
    Nothing,
    /// It got something to send.
    Took,
    /// It asked, and has to wait.
    Asked,
}

thread_local! {
    /// Between hyper and the executor there is no other way: what hyper polls runs within the poll of its task.
    static LAST: Cell<Did> = const { Cell::new(Did::Nothing) };
    static DUE: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// Notes when the answer whose head is there has to be over.
pub(super) fn due(at: Instant) {
    DUE.set(Some(at));
}

/// Notes that the answer to a request, or its body, was polled.
pub(super) fn asked<T>(polled: Poll<T>) -> Poll<T> {
    LAST.set(if polled.is_ready() { Did::Took } else { Did::Asked });
    polled
}

/// Runs the streams of HTTP/2 connections, each for as long as its client takes something.
#[derive(Debug, Clone)]
pub(super) struct Streams(pub(super) Arc<Timing>);

impl<F> Executor<F> for Streams
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, stream: F) {
        // Its owner is the connection: without it the stream fails, and the task ends.
        TokioExecutor::new().execute(Stream {
            inner: stream,
            timing: self.0.clone(),
            since: None,
            due: None,
            timer: None,
        });
    }
}

pin_project_lite::pin_project! {
    struct Stream<F> {
        #[pin]
        inner: F,
        timing: Arc<Timing>,
        // Since when the client takes nothing.
        since: Option<Instant>,
        // When the response has to be over.
        due: Option<Instant>,
        // Made at the first silence, and moved only when it fires too early.
        timer: Option<Pin<Box<Sleep>>>,
    }
}

impl<F: Future<Output = ()>> Future for Stream<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = self.project();
        LAST.set(Did::Nothing);
        DUE.set(None);
        if this.inner.poll(cx).is_ready() {
            return Poll::Ready(());
        }
        match LAST.get() {
            Did::Asked => *this.since = None,
            Did::Took => *this.since = Some(Instant::now()),
            Did::Nothing => {}
        }
        if let Some(due) = DUE.get() {
            *this.due = Some(due);
        }
        let Some(since) = *this.since else { return Poll::Pending };
        let due = since + this.timing.idle();
        let due = this.due.map_or(due, |deadline| deadline.min(due));
        let timer = this.timer.get_or_insert_with(|| Box::pin(sleep_until(due)));
        loop {
            ready!(timer.as_mut().poll(cx));
            if timer.deadline() >= due {
                debug!("stream given up: the client does not take the response");
                return Poll::Ready(());
            }
            timer.as_mut().reset(due);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, time::Duration};

    use futures_util::FutureExt;
    use tokio::time::advance;

    use super::*;

    fn stream(did: impl FnMut() -> Did) -> Stream<impl Future<Output = ()>> {
        let mut did = did;
        let inner = poll_fn(move |_| {
            match did() {
                Did::Nothing => {}
                Did::Took => drop(asked(Poll::Ready(()))),
                Did::Asked => drop(asked(Poll::<()>::Pending)),
            }
            Poll::Pending
        });
        Stream { inner, timing: Arc::default(), since: None, due: None, timer: None }
    }

    /// Whether the stream has ended after each of these, a hundred seconds apart, with 300 s allowed.
    async fn ends(did: &[Did]) -> Vec<bool> {
        let mut left = did.iter().copied();
        let mut stream = Box::pin(stream(move || left.next().unwrap()));
        let mut ends = Vec::new();
        for _ in did {
            ends.push(stream.as_mut().now_or_never().is_some());
            advance(Duration::from_secs(100)).await;
        }
        ends
    }

    #[tokio::test(start_paused = true)]
    async fn only_a_client_that_takes_nothing_is_given_up() {
        use Did::{Asked, Nothing, Took};
        assert_eq!(ends(&[Took, Nothing, Nothing, Nothing]).await, [false, false, false, true]);
        assert_eq!(ends(&[Took, Nothing, Nothing, Took, Nothing, Nothing]).await, [false; 6], "a slow one");
        assert_eq!(ends(&[Took, Nothing, Asked, Asked, Asked, Asked]).await, [false; 6], "a slow upstream");
        assert_eq!(ends(&[Asked, Asked, Took, Nothing, Nothing]).await, [false; 5], "counted from the last frame");
        assert_eq!(ends(&[Nothing; 6]).await, [false; 6], "a tunnel");
    }
}
