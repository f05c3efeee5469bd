//! A body that ends at a deadline.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use pin_project_lite::pin_project;
use tokio::time::{Instant, Sleep, sleep_until};

use super::Exchange;
use crate::message::{BoxError, Error, Kind, Latecomers};

pin_project! {
    /// A response body that fails at its deadline, and notes in the record of its exchange where it is dropped after it.
    pub struct Due<B: HttpBody> {
        #[pin]
        body: B,
        #[pin]
        sleep: Sleep,
        deadline: Instant,
        latecomers: Option<Latecomers>,
        over: bool,
        exchange: Option<Exchange>,
    }

    impl<B: HttpBody> PinnedDrop for Due<B> {
        fn drop(this: Pin<&mut Self>) {
            // Dropped too late to be told.
            if !this.over
                && !this.body.is_end_stream()
                && this.sleep.deadline() <= Instant::now()
                && let Some(exchange) = &this.exchange
            {
                exchange.cut(&Error::from(Kind::DeadlineExceeded));
            }
        }
    }
}

impl<B: HttpBody> Due<B> {
    /// `body` until `deadline`.
    pub fn new(body: B, deadline: Instant, exchange: Option<Exchange>) -> Self {
        Self { body, sleep: sleep_until(deadline), deadline, latecomers: None, over: false, exchange }
    }

    /// Goes on for those who share the body and came later, for as much longer.
    #[must_use]
    pub fn shared_with(mut self, latecomers: Option<Latecomers>) -> Self {
        self.latecomers = latecomers;
        self
    }
}

impl<B> HttpBody for Due<B>
where
    B: HttpBody<Data = Bytes, Error: Into<BoxError>>,
{
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        // The clock first: a body that always has a frame ready must not outrun it.
        while this.sleep.as_mut().poll(cx).is_ready() {
            let last = this.latecomers.as_ref().map_or(*this.deadline, |others| *this.deadline + others.latest());
            if last <= this.sleep.deadline() {
                *this.over = true;
                return Poll::Ready(Some(Err(Error::from(Kind::DeadlineExceeded).into())));
            }
            this.sleep.as_mut().reset(last);
        }
        let frame = ready!(this.body.poll_frame(cx));
        *this.over = !matches!(frame, Some(Ok(_)));
        Poll::Ready(frame.map(|frame| frame.map_err(Into::into)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
