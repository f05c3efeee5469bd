//! A response's body on its way to the client.
//!
//! # A break is told after what came before it
//! A backend that dies has often written something the moment before: the last event of a stream, or a head and the
//! first half of a body. hyper throws away what it has not written yet when a body fails: over HTTP/1.1 what lies in its
//! buffer, over HTTP/2 all that the stream has queued, the head included. And a client that sees its connection closed
//! before a byte of an answer may take its request for unprocessed, and repeat it (RFC 9110 §9.2.2). A failure is
//! therefore held back: over HTTP/1.1 until the connection has written what it has; over HTTP/2, where another task
//! writes and nobody is told, for [`WRITING`]. What stands behind the body (the upstream's connection, places in limits)
//! is let go of at once.
//!
//! # A slow client is not a silent one
//! Whether a client of HTTP/2 takes anything shows only in that its body is asked for more (see `streams`). A frame as
//! large as it came from the upstream, some hundred KiB, would be one sign of life; so large ones are handed over in
//! pieces of [`PIECE`], which are not copied. A client that takes one of them within `idle` is not given up.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Sleep, sleep};

use super::{
    connection::{InFlight, LARGE, RESET},
    streams::asked,
};
use crate::message::BoxError;

/// How long the task of an HTTP/2 connection may take to write what its streams have queued. A client that leaves its
/// window closed for longer loses what it has no room for.
const WRITING: Duration = Duration::from_millis(100);

/// The most that is handed to HTTP/2 at a time: under `idle: 30s` a client may read as slowly as 2.2 kB/s. Pieces as large
/// as HTTP/2's frames, 16 KiB, would make a response of 64 KiB 6 % more expensive.
const PIECE: usize = 64 << 10;

/// HTTP/2's own frames, as large as any client takes (RFC 9113 §4.2).
const FRAME: usize = 16 << 10;

pin_project_lite::pin_project! {
    /// A response's body, in flight until it is dropped.
    pub(super) struct Outbound<B: HttpBody> {
        // `None` once it has failed.
        #[pin]
        body: Option<B>,
        // HTTP/2: what is left of the frame that is handed over in pieces.
        rest: Bytes,
        failed: Option<Box<Failed>>,
        http2: bool,
        // The client takes the connection's end for the body's: HTTP/1.0 without a length.
        by_close: bool,
        ended: bool,
        in_flight: InFlight,
    }

    impl<B: HttpBody> PinnedDrop for Outbound<B> {
        fn drop(this: Pin<&mut Self>) {
            let over = this.ended || this.body.as_ref().is_some_and(HttpBody::is_end_stream);
            if this.by_close && !over {
                this.in_flight.watch().set(RESET);
            }
        }
    }
}

/// A failure that the client has yet to be told of.
struct Failed {
    error: BoxError,
    /// HTTP/2 alone.
    written: Option<Pin<Box<Sleep>>>,
}

impl<B: HttpBody> Outbound<B> {
    pub(super) fn new(body: B, http2: bool, by_close: bool, in_flight: InFlight) -> Self {
        Self { body: Some(body), rest: Bytes::new(), failed: None, http2, by_close, ended: false, in_flight }
    }
}

impl<B: HttpBody<Data = Bytes, Error: Into<BoxError>>> HttpBody for Outbound<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        if !this.rest.is_empty() {
            let piece = this.rest.split_to(this.rest.len().min(PIECE));
            return asked(Poll::Ready(Some(Ok(Frame::data(piece)))));
        }
        if let Some(body) = this.body.as_mut().as_pin_mut() {
            let error = match asked(body.poll_frame(cx)) {
                Poll::Ready(Some(Err(error))) => error.into(),
                Poll::Ready(Some(Ok(frame))) => {
                    let frame = if *this.http2 { first_piece(frame, this.rest) } else { frame };
                    if *this.http2 && frame.data_ref().is_some_and(|data| data.len() > FRAME) {
                        this.in_flight.watch().set(LARGE);
                    }
                    return Poll::Ready(Some(Ok(frame)));
                }
                Poll::Ready(None) => {
                    *this.ended = true;
                    return Poll::Ready(None);
                }
                Poll::Pending => return Poll::Pending,
            };
            this.body.set(None);
            let written = this.http2.then(|| Box::pin(sleep(WRITING)));
            *this.failed = Some(Box::new(Failed { error, written }));
            if !*this.http2 {
                // hyper writes as soon as there is nothing more to be had, and then asks again.
                cx.waker().wake_by_ref();
                return Poll::Pending;
            }
        }
        match this.failed.as_mut().map(|failed| &mut failed.written) {
            Some(Some(written)) => ready!(asked(written.as_mut().poll(cx))),
            // Not all of it could be written. The connection's task, which runs this, is woken when there is room.
            Some(None) if this.in_flight.watch().stalled().is_some() => return Poll::Pending,
            Some(None) | None => {}
        }
        Poll::Ready(this.failed.take().map(|failed| Err(failed.error)))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.as_ref().is_some_and(HttpBody::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        let mut hint = self.body.as_ref().map_or_else(SizeHint::default, HttpBody::size_hint);
        let rest = self.rest.len() as u64;
        // The upper bound first: the lower one may not go beyond it.
        if let Some(upper) = hint.upper() {
            hint.set_upper(upper.saturating_add(rest));
        }
        hint.set_lower(hint.lower().saturating_add(rest));
        hint
    }
}

/// The first piece of a frame; what follows is left in `rest`.
fn first_piece(frame: Frame<Bytes>, rest: &mut Bytes) -> Frame<Bytes> {
    match frame.into_data() {
        Ok(mut data) => {
            if data.len() > PIECE {
                *rest = data.split_off(PIECE);
            }
            Frame::data(data)
        }
        Err(trailers) => trailers,
    }
}
