//! The recording: the body of one answer while it comes, with one writer and many readers.
//!
//! Whoever asks for what is being asked already reads along: what has come so far at once, and then each frame when it
//! comes. There is no task behind it. Whichever reader is polled asks the upstream's body, and what comes wakes the
//! others: nobody waits for the slowest of them, the first client may leave while others listen, and the upstream is
//! cancelled when the last one leaves, in that moment. A reader that is alone pays two locks that nobody else wants for
//! each frame, and gets it in the poll in which it came.
//!
//! What has come is kept until the end, up to a limit: then it is handed on whole, to be stored. An answer that grows
//! beyond the limit, or beyond what all that are on their way may take together, is nobody's to join any more. Those who
//! read it already go on together, none further ahead of the slowest than the limit, and nothing is stored. Who keeps the
//! others waiting for [`PATIENCE`](reader::PATIENCE), at once or in sum, is cut off: a client that does not read, or hardly,
//! must not stop those who do.
//!
//! An answer that breaks off breaks off for all who read it, and is never handed on.
//!
//! A stream that can be [taken up again](super::resume) is kept when its readers have left, for some time and up to its
//! end: then it is read for nobody, up to the limit. Of one that grows beyond the limit the last part is kept. Where it is
//! [copied](super::copies), the copier takes what is kept, and nobody waits for it.

mod budget;
mod copy;
mod reader;
mod state;
mod waiting;

use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context, Poll, Waker},
    time::Duration,
};

use bytes::Bytes;
use http_body::Body as _;
use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

pub(super) use self::{
    budget::Budget,
    copy::{Copied, Cursor},
    reader::Reader,
    state::{Cut, Lost, Whole},
};
use self::{
    state::{Asked, End, Found, Held, Seat, Source, State},
    waiting::Waiting,
};
use super::resume::{Room, Share};
use crate::{
    message::Body,
    sse::{Completion, Numbering},
};

/// So many frames are read for nobody before others have their turn.
const IN_ONE_GO: usize = 64;

/// Who looks for an event in what is kept leaves a mark behind about so many bytes.
const BETWEEN_MARKS: usize = 64 << 10;

/// The body of an answer that is being recorded. When the last of those who share it is dropped, so is the upstream's
/// body, which cancels the request.
pub(super) struct Recording {
    state: Mutex<State>,
    waiting: Arc<Waiting>,
    /// Wakes all of `waiting`.
    waker: Waker,
    started: Instant,
    /// Told when the last reader has left, and when it is no longer kept for those to come.
    deserted: Notify,
}

/// An end, and what it is told.
type Told = (End, Result<Whole, Lost>);

impl Recording {
    /// Records `body`, and keeps up to `limit` bytes, at most 4 GiB. `end` is told what came of it, as soon as that is
    /// known: never, if it is dropped before.
    ///
    /// With `completion`, it is whole only if that says so.
    pub(super) fn new(
        body: Body,
        limit: usize,
        budget: Arc<Budget>,
        completion: Option<Completion>,
        end: impl FnOnce(Result<Whole, Lost>) + Send + 'static,
    ) -> Arc<Self> {
        let waiting = Arc::new(Waiting::default());
        let mut end: Option<End> = Some(Box::new(end));
        let mut source = Source::Coming(body);
        // Nobody asks an empty body for anything.
        if let Source::Coming(body) = &source
            && body.is_end_stream()
            && completion.is_none()
            && let Some(end) = end.take()
        {
            source = Source::Whole;
            let (body, cuts) = (Bytes::new(), Box::default());
            end(Ok(Whole { body, cuts, trailers: None, took: Duration::ZERO }));
        }
        Arc::new(Self {
            state: Mutex::new(State {
                source,
                frames: VecDeque::new(),
                gone: 0,
                kept: 0,
                limit: limit.min(u32::MAX as usize),
                over: false,
                trailers: None,
                completion: completion.map(Box::new),
                seats: Vec::new(),
                stalled: None,
                budget,
                end,
                held: None,
            }),
            waker: waiting.clone().into(),
            waiting,
            started: Instant::now(),
            deserted: Notify::new(),
        })
    }

    /// Keeps it for those who come again, from now, when nothing has come yet. It takes its memory from `share`. What is
    /// for one `alone` is kept for nothing else.
    pub(super) fn hold(&self, share: Share, alone: bool) {
        let (from, passed, marks) = (Numbering::new(), 0, VecDeque::new());
        let held = Held { from, passed, marks, share, alone, left: None, over: None, copied: false };
        self.state.lock().held = Some(Box::new(held));
    }

    /// No longer keeps it for those who come again.
    pub(super) fn let_go(&self) {
        self.state.lock().let_go();
        self.deserted.notify_one();
        self.waiting.keeper.wake();
    }

    /// Lets go of it if nobody has read it for so long. Whether it is let go.
    pub(super) fn expire(&self, after: Duration) -> bool {
        let mut state = self.state.lock();
        if state.held.as_ref().and_then(|held| held.left).is_some_and(|left| left.elapsed() >= after) {
            state.let_go();
        }
        state.held.is_none()
    }

    /// Since when nobody reads what is kept for those who come again.
    pub(super) fn left(&self) -> Option<Instant> {
        self.state.lock().held.as_ref().and_then(|held| held.left)
    }

    /// Whether nothing more will come.
    pub(super) fn has_ended(&self) -> bool {
        !matches!(self.state.lock().source, Source::Coming(_))
    }

    /// Whether more may come that nobody reads.
    pub(super) fn runs_for_nobody(&self) -> bool {
        let state = self.state.lock();
        matches!(state.source, Source::Coming(_)) && state.held.as_ref().is_some_and(|held| held.left.is_some())
    }

    /// Whether it is not kept for those who come again, or not any more.
    pub(super) fn is_let_go(&self) -> bool {
        self.state.lock().held.is_none()
    }

    /// Waits until nobody reads it, and says since when; `None` where it is not kept for those who come again.
    pub(super) async fn deserted(&self) -> Option<Instant> {
        loop {
            {
                let state = self.state.lock();
                let held = state.held.as_ref()?;
                if let Some(left) = held.left {
                    return Some(left);
                }
            }
            self.deserted.notified().await;
        }
    }

    /// Reads on for nobody, as far as there is room, until somebody is there. It need not notice that at once.
    pub(super) async fn read_on(&self) {
        std::future::poll_fn(|cx| {
            self.waiting.keeper.register(cx.waker());
            for _ in 0..IN_ONE_GO {
                let mut state = self.state.lock();
                if state.held.as_ref().is_none_or(|held| held.left.is_none()) {
                    return Poll::Ready(());
                }
                if state.kept >= state.limit || !matches!(state.source, Source::Coming(_)) {
                    return Poll::Pending;
                }
                let (found, news) = self.more(&mut state);
                if matches!(found, Found::End | Found::Failed(_))
                    && let Some(held) = &mut state.held
                {
                    let now = Instant::now();
                    (held.left, held.over) = (Some(now), Some(now));
                }
                drop(state);
                let is_pending = matches!(found, Found::Nothing);
                if let Some(news) = news {
                    news.tell(self);
                }
                if is_pending {
                    return Poll::Pending;
                }
            }
            cx.waker().wake_by_ref();
            Poll::Pending
        })
        .await;
    }

    /// Whether more has come than is kept.
    pub(super) fn is_over(&self) -> bool {
        self.state.lock().over
    }

    /// The body from its first byte; `None` where that is gone.
    pub(super) fn reader(self: &Arc<Self>) -> Option<Reader> {
        let mut state = self.state.lock();
        if state.gone > 0 {
            return None;
        }
        Some(self.read_from(&mut state, 0))
    }

    /// The body from the frame in which the event with the number `after` ends, or the next begins, and how many have
    /// ended before that frame. `None` where that is gone or has not come, and where the stream broke off then: who asks
    /// again has to be answered by somebody else.
    pub(super) fn reader_after(self: &Arc<Self>, after: u64) -> Option<(Reader, Numbering)> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let held = state.held.as_mut()?;
        let mut from = held.from.clone();
        if from.count() > after || from.count() == after && !from.is_between() {
            return None;
        }
        let mut index = 0;
        // From where one got to who came before: what there is is looked through once, whoever comes how often.
        let known = held.marks.partition_point(|(_, mark)| mark.count() < after);
        if let Some((frame, mark)) = known.checked_sub(1).and_then(|known| held.marks.get(known)) {
            (index, from) = (frame - state.gone, mark.clone());
        }
        let mut passed = 0;
        while from.count() < after {
            let data = &state.frames.get(index)?.data;
            let mut numbering = from.clone();
            numbering.pass(data);
            if numbering.count() >= after {
                break;
            }
            (from, index, passed) = (numbering, index + 1, passed + data.len());
            let frame = state.gone + index;
            if passed >= BETWEEN_MARKS && held.marks.back().is_none_or(|(last, _)| *last < frame) {
                held.marks.push_back((frame, from.clone()));
                passed = 0;
            }
        }
        if matches!(state.source, Source::Failed { .. }) {
            let mut all = from.clone();
            state.frames.range(index..).for_each(|frame| all.pass(&frame.data));
            if all.count() <= after {
                return None;
            }
        }
        let next = state.gone + index;
        Some((self.read_from(state, next), from))
    }

    fn read_from(self: &Arc<Self>, state: &mut State, next: usize) -> Reader {
        let slot = state.seats.iter().position(|seat| *seat == Seat::Free).unwrap_or(state.seats.len());
        if slot == state.seats.len() {
            state.seats.push(Seat::Free);
        }
        state.seats[slot] = Seat::At(next);
        if let Some(held) = &mut state.held {
            held.left = None;
        }
        Reader { recording: self.clone(), slot, next, trailed: false, patience: None, debt: reader::Debt::none() }
    }

    /// Asks the upstream for what nobody has seen. Beside it what others have to be told, once the lock is let go.
    fn more(&self, state: &mut State) -> (Found, Option<News>) {
        let found = match state.ask(&mut Context::from_waker(&self.waker)) {
            Asked::Frame(data) => {
                state.push(&data, self.started.elapsed());
                Found::Frame(data)
            }
            Asked::Ended(found) => found,
            Asked::Before(found) => return (found, None),
        };
        // A frame is the end of the recording where it is the last one, or one too many.
        let is_end = state.over || !matches!(state.source, Source::Coming(_));
        let told = is_end.then(|| state.end.take()).flatten().map(|end| {
            let whole = match state.source {
                _ if state.over => Err(Lost::TooLarge),
                Source::Whole if !state.is_complete() => Err(Lost::Incomplete),
                Source::Whole => Ok(state.whole(self.started.elapsed())),
                Source::Coming(_) | Source::Failed { .. } => Err(Lost::Broken),
            };
            (end, whole)
        });
        let crowded = state.held.as_ref().and_then(|held| held.share.crowded());
        let copied = state.held.as_ref().is_some_and(|held| held.copied);
        (found, Some(News { told, crowded, copied }))
    }
}

/// What is new, for those who have to know.
struct News {
    told: Option<Told>,
    /// There is no more memory for what is kept for those who come again.
    crowded: Option<Arc<Room>>,
    copied: bool,
}

impl News {
    /// Without the lock: whoever is told may look here, or drop the last of something.
    fn tell(self, recording: &Recording) {
        if let Some((end, whole)) = self.told {
            end(whole);
        }
        if self.crowded.is_some_and(|room| !room.make()) {
            recording.let_go();
        }
        if self.copied {
            recording.waiting.copier.wake();
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if state.held.is_none() {
            state.budget.give_back(state.kept);
        }
    }
}

#[cfg(test)]
mod tests;
