//! One who reads along: a body that begins with what is at hand, and goes on with what comes.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep};

use super::{
    News, Recording,
    state::{Found, Seat, Source},
};
use crate::message::{BoxError, Error, Kind};

/// How long one reader may keep the others from reading on, at once or in sum.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// In so many seconds one of the sum is forgiven: a reader has 5 seconds of others in 30.
const FORGIVEN: u32 = 6;

/// One who reads the body from its start.
pub(in super::super) struct Reader {
    pub(super) recording: Arc<Recording>,
    pub(super) slot: usize,
    pub(super) next: usize,
    pub(super) trailed: bool,
    /// Runs while slower readers are waited for.
    pub(super) patience: Option<Pin<Box<Sleep>>>,
    pub(super) debt: Debt,
}

/// How long others have waited for a reader, less what is forgiven.
#[derive(Debug)]
pub(super) struct Debt {
    owed: Duration,
    at: Instant,
}

impl Debt {
    pub(super) fn none() -> Self {
        Self { owed: Duration::ZERO, at: Instant::now() }
    }

    /// They have waited for so long again. Whether it is too long now.
    fn grow(&mut self, waited: Duration) -> bool {
        let now = Instant::now();
        let forgiven = now.duration_since(self.at) / FORGIVEN;
        (self.owed, self.at) = (self.owed.saturating_sub(forgiven) + waited, now);
        self.owed > PATIENCE
    }
}

impl Reader {
    /// What is next, and what is new about it.
    fn find(&mut self, cx: &mut Context<'_>) -> (Found, Option<News>) {
        let Recording { state, waiting, .. } = &*self.recording;
        let mut state = state.lock();
        if state.seats[self.slot] == Seat::Cut {
            return (Found::Failed(Error::new(Kind::ClientTimeout, "the others waited for it")), None);
        }
        if let Some(kept) = state.frames.get(self.next - state.gone) {
            let data = kept.data.clone();
            self.next += 1;
            state.seats[self.slot] = Seat::At(self.next);
            let was_full = state.is_full();
            if was_full && state.trim() {
                if state.stalled.take().is_some_and(|since| self.debt.grow(since.elapsed())) {
                    state.seats[self.slot] = Seat::Cut;
                }
                drop(state);
                waiting.wake_others(self.slot);
            }
            return (Found::Frame(data), None);
        }
        // Before the source is asked: what comes meanwhile wakes all who wait.
        waiting.add(self.slot, cx.waker());
        if !state.trim() {
            state.stalled.get_or_insert_with(Instant::now);
            return (Found::Full, None);
        }
        let (found, news) = self.recording.more(&mut state);
        if matches!(found, Found::Frame(_)) {
            self.next += 1;
            state.seats[self.slot] = Seat::At(self.next);
        }
        drop(state);
        if news.is_some() {
            waiting.wake_others(self.slot);
        }
        (found, news)
    }
}

impl HttpBody for Reader {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let found = loop {
            let (found, news) = self.find(cx);
            if let Some(news) = news {
                news.tell(&self.recording);
            }
            if !matches!(found, Found::Full) {
                self.patience = None;
                break found;
            }
            ready!(self.patience.get_or_insert_with(|| Box::pin(sleep(PATIENCE))).as_mut().poll(cx));
            self.patience = None;
            self.recording.state.lock().cut();
            self.recording.waiting.wake_others(self.slot);
        };
        match found {
            Found::Frame(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
            Found::Nothing | Found::Full => Poll::Pending,
            Found::Failed(error) => Poll::Ready(Some(Err(error.into()))),
            Found::End if self.trailed => Poll::Ready(None),
            Found::End => {
                self.trailed = true;
                let trailers = self.recording.state.lock().trailers.clone();
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        let state = self.recording.state.lock();
        let none_left = self.next >= state.gone + state.frames.len() && (self.trailed || state.trailers.is_none());
        none_left
            && match &state.source {
                Source::Whole => true,
                Source::Coming(body) => body.is_end_stream(),
                Source::Failed { .. } => false,
            }
    }

    fn size_hint(&self) -> SizeHint {
        let state = self.recording.state.lock();
        let at_hand =
            state.frames.range(self.next.saturating_sub(state.gone)..).map(|kept| kept.data.len() as u64).sum();
        let mut hint = SizeHint::new();
        let rest = match &state.source {
            Source::Coming(body) => body.size_hint(),
            Source::Whole if state.trailers.is_none() => SizeHint::with_exact(0),
            // With a length there would be no place for trailers in HTTP/1.1; and what is at hand of a broken answer would
            // look as if it were all of it.
            Source::Whole | Source::Failed { .. } => {
                hint.set_lower(at_hand);
                return hint;
            }
        };
        if let Some(upper) = rest.upper() {
            hint.set_upper(upper.saturating_add(at_hand));
        }
        hint.set_lower(rest.lower().saturating_add(at_hand));
        hint
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        // Before the slot is another's.
        self.recording.waiting.leave(self.slot);
        let mut state = self.recording.state.lock();
        state.seats[self.slot] = Seat::Free;
        // It may have been the slowest.
        let has_room = state.is_full() && state.trim();
        if has_room || self.patience.is_some() {
            // Nobody is charged for what nobody waits for. Others that still wait count from their next look.
            state.stalled = None;
        }
        let is_deserted = state.is_deserted();
        let has_ended = !matches!(state.source, Source::Coming(_));
        if is_deserted && let Some(held) = state.held.as_mut().filter(|held| held.left.is_none()) {
            let now = Instant::now();
            held.left = Some(if has_ended { *held.over.get_or_insert(now) } else { now });
        }
        drop(state);
        if is_deserted {
            self.recording.deserted.notify_one();
        }
        if has_room {
            self.recording.waiting.wake_others(self.slot);
        }
    }
}
