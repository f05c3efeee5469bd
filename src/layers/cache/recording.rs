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
//! others waiting for [`PATIENCE`] is cut off: a client that does not read must not stop those who do.
//!
//! An answer that breaks off breaks off for all who read it, and is never handed on.
//!
//! A stream that can be [taken up again](super::resume) is kept when its readers have left, for some time and up to its
//! end: then it is read for nobody, up to the limit. Of one that grows beyond the limit the last part is kept.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, Wake, Waker, ready},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use futures_util::task::AtomicWaker;
use http::HeaderMap;
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    time::{Instant, Sleep, sleep},
};

use super::resume::{Room, Share};
use crate::{
    message::{Body, BoxError, Error, Kind},
    sse::{Completion, Ended, Numbering},
};

/// Frames below this size are copied: they are slices of a buffer that may be much larger, and that would live as long.
const COPIED: usize = 16 << 10;

/// How long one reader may keep the others from reading on.
const PATIENCE: Duration = Duration::from_secs(5);

/// What all answers of a route that are on their way may take together.
#[derive(Debug)]
pub(super) struct Budget {
    used: AtomicU64,
    most: u64,
}

impl Budget {
    /// So many bytes.
    pub(super) fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { used: AtomicU64::new(0), most })
    }

    /// What they take now.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes so many more. Whether they were there.
    fn take(&self, bytes: usize) -> bool {
        self.used.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64 <= self.most
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}
/// So many frames are read for nobody before others have their turn.
const IN_ONE_GO: usize = 64;

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

struct State {
    source: Source,
    frames: VecDeque<Kept>,
    /// How many frames are gone that were before these.
    gone: usize,
    /// In bytes, those of `frames`.
    kept: usize,
    limit: usize,
    /// Whether more has come than is kept.
    over: bool,
    trailers: Option<HeaderMap>,
    /// Where it must have an end of its own.
    completion: Option<Box<Completion>>,
    /// Where the readers are, by their slots.
    seats: Vec<Seat>,
    budget: Arc<Budget>,
    end: Option<End>,
    /// Where it is kept for those who come again.
    held: Option<Box<Held>>,
}

/// What it takes to keep a recording when nobody reads it.
struct Held {
    /// Where the frames that are kept begin.
    from: Numbering,
    /// Its part of the memory that there is for this.
    share: Share,
    alone: bool,
    /// Since when nobody reads it.
    left: Option<Instant>,
    /// The same for the first time after its end: what has ended is not kept any longer for being asked for again.
    over: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Seat {
    Free,
    /// The next frame of its reader.
    At(usize),
    /// Its reader has kept the others waiting.
    Cut,
}

struct Kept {
    data: Bytes,
    at: Duration,
}

enum Source {
    Coming(Body),
    Whole,
    Failed { kind: Kind, retry_after: Option<Duration> },
}

/// What was recorded, from its first byte to its last.
#[derive(Debug)]
pub(super) struct Whole {
    pub(super) body: Bytes,
    /// Where each frame ended, and when it came.
    pub(super) cuts: Box<[Cut]>,
    pub(super) trailers: Option<HeaderMap>,
    /// From the head to the end.
    pub(super) took: Duration,
}

/// The end of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Cut {
    /// The bytes before it.
    pub(super) end: u32,
    /// When it came, in milliseconds after the head.
    pub(super) at: u32,
}

/// Why there is nothing to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    /// More came than is kept.
    TooLarge,
    /// It broke off.
    Broken,
    /// It has come to an end that is not its own: without the terminal event, with an error, or cut short.
    Incomplete,
}

/// Takes what was recorded, once: all of it, or the news that there will be nothing.
type End = Box<dyn FnOnce(Result<Whole, Lost>) + Send>;

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
        let held = Held { from: Numbering::new(), share, alone, left: None, over: None };
        self.state.lock().held = Some(Box::new(held));
    }

    /// No longer keeps it for those who come again.
    pub(super) fn let_go(&self) {
        self.state.lock().let_go();
        self.deserted.notify_one();
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
        let mut state = self.state.lock();
        let mut from = state.held.as_ref()?.from.clone();
        if from.count() > after || from.count() == after && !from.is_between() {
            return None;
        }
        let mut index = 0;
        while from.count() < after {
            let mut numbering = from.clone();
            numbering.pass(&state.frames.get(index)?.data);
            if numbering.count() >= after {
                break;
            }
            (from, index) = (numbering, index + 1);
        }
        if matches!(state.source, Source::Failed { .. }) {
            let mut all = from.clone();
            state.frames.range(index..).for_each(|frame| all.pass(&frame.data));
            if all.count() <= after {
                return None;
            }
        }
        let next = state.gone + index;
        Some((self.read_from(&mut state, next), from))
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
        Reader { recording: self.clone(), slot, next, trailed: false, patience: None }
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
        (found, Some(News { told, crowded }))
    }
}

/// What is new, for those who have to know.
struct News {
    told: Option<Told>,
    /// There is no more memory for what is kept for those who come again.
    crowded: Option<Arc<Room>>,
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
    }
}

impl State {
    fn push(&mut self, data: &Bytes, at: Duration) {
        let data = if data.len() < COPIED { Bytes::copy_from_slice(data) } else { data.clone() };
        self.kept += data.len();
        if let Some(completion) = &mut self.completion {
            completion.pass(&data);
        }
        match &mut self.held {
            Some(held) => held.share.grow(data.len()),
            None => self.over |= !self.budget.take(data.len()),
        }
        self.frames.push_back(Kept { data, at });
        self.over |= self.kept > self.limit;
    }

    fn let_go(&mut self) {
        let Some(held) = self.held.take() else { return };
        // What nobody else may have, and nobody stores, need not be kept at all.
        self.over |= held.alone;
        self.over |= !self.budget.take(self.kept);
    }

    /// Lets go of what all readers have; of what is kept for others, only where there is no room. Whether there is room for
    /// more then.
    fn trim(&mut self) -> bool {
        if !self.over {
            return true;
        }
        let places = self.seats.iter().filter_map(|seat| match seat {
            Seat::At(next) => Some(*next),
            Seat::Free | Seat::Cut => None,
        });
        let read = places.min().map_or(0, |slowest| slowest - self.gone);
        for _ in 0..read {
            if self.held.is_some() && self.kept <= self.limit {
                break;
            }
            let Some(Kept { data, .. }) = self.frames.pop_front() else { break };
            self.kept -= data.len();
            self.gone += 1;
            match &mut self.held {
                Some(held) => {
                    held.share.shrink(data.len());
                    held.from.pass(&data);
                }
                None => self.budget.give_back(data.len()),
            }
        }
        self.kept <= self.limit
    }

    /// Cuts those off for whom the others wait.
    fn cut(&mut self) {
        if self.is_full() {
            let slowest = Seat::At(self.gone);
            self.seats.iter_mut().filter(|seat| **seat == slowest).for_each(|seat| *seat = Seat::Cut);
        }
    }

    fn is_complete(&self) -> bool {
        self.completion.as_ref().is_none_or(|completion| completion.state() == Ended::Whole)
    }

    fn is_full(&self) -> bool {
        self.over && self.kept > self.limit
    }

    /// Asks the upstream for more.
    fn ask(&mut self, cx: &mut Context<'_>) -> Asked {
        let body = match &mut self.source {
            Source::Coming(body) => body,
            Source::Whole => return Asked::Before(Found::End),
            Source::Failed { kind, retry_after } => return Asked::Before(Found::Failed(failed(*kind, *retry_after))),
        };
        loop {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Pending => return Asked::Before(Found::Nothing),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => {
                        // Who reads a body that says so may never ask for its end.
                        if body.is_end_stream() {
                            self.source = Source::Whole;
                        }
                        return Asked::Frame(data);
                    }
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        if body.is_end_stream() {
                            self.source = Source::Whole;
                            return Asked::Ended(Found::End);
                        }
                    }
                },
                Poll::Ready(None) => {
                    self.source = Source::Whole;
                    return Asked::Ended(Found::End);
                }
                Poll::Ready(Some(Err(error))) => {
                    let error = Error::of(error);
                    self.source = Source::Failed { kind: error.kind(), retry_after: error.retry_after() };
                    return Asked::Ended(Found::Failed(error));
                }
            }
        }
    }

    /// All of it in one piece.
    fn whole(&mut self, took: Duration) -> Whole {
        let mut cuts = Vec::with_capacity(self.frames.len());
        // Also of one frame a copy: it may be a slice of something larger.
        let mut body = BytesMut::with_capacity(self.kept);
        for Kept { data, at } in &self.frames {
            body.extend_from_slice(data);
            let [end, at] = [body.len() as u128, at.as_millis()].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
            cuts.push(Cut { end, at });
        }
        Whole { body: body.freeze(), cuts: cuts.into(), trailers: self.trailers.clone(), took }
    }
}

/// One who reads the body from its start.
pub(super) struct Reader {
    recording: Arc<Recording>,
    slot: usize,
    next: usize,
    trailed: bool,
    /// Runs while slower readers are waited for.
    patience: Option<Pin<Box<Sleep>>>,
}

/// What the upstream says.
enum Asked {
    Frame(Bytes),
    /// The end, just now.
    Ended(Found),
    /// Nothing that is new.
    Before(Found),
}

/// What a reader finds.
enum Found {
    Frame(Bytes),
    End,
    Failed(Error),
    /// The upstream has to do something first.
    Nothing,
    /// Slower readers have to.
    Full,
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
                drop(state);
                waiting.wake_others(self.slot);
            }
            return (Found::Frame(data), None);
        }
        // Before the source is asked: what comes meanwhile wakes all who wait.
        waiting.add(self.slot, cx.waker());
        if !state.trim() {
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

fn failed(kind: Kind, retry_after: Option<Duration>) -> Error {
    let error = Error::new(kind, "the answer that was read along broke off");
    match retry_after {
        Some(after) => error.with_retry_after(after),
        None => error,
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
        let is_deserted = !state.seats.iter().any(|seat| matches!(seat, Seat::At(_)));
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

impl Drop for Recording {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if state.held.is_none() {
            state.budget.give_back(state.kept);
        }
    }
}

/// The readers that wait, by their slots.
#[derive(Debug, Default)]
struct Waiting {
    readers: Mutex<Vec<Option<Waker>>>,
    /// Who reads on for nobody.
    keeper: AtomicWaker,
}

impl Waiting {
    fn add(&self, slot: usize, waker: &Waker) {
        let mut all = self.readers.lock();
        if all.len() <= slot {
            all.resize(slot + 1, None);
        }
        match &mut all[slot] {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    fn leave(&self, slot: usize) {
        if let Some(waker) = self.readers.lock().get_mut(slot) {
            *waker = None;
        }
    }

    /// They stay: a reader that is woken for each frame does not leave its waker for each frame.
    fn wake_others(&self, slot: usize) {
        for (n, waker) in self.readers.lock().iter().enumerate() {
            if let Some(waker) = waker.as_ref().filter(|_| n != slot) {
                waker.wake_by_ref();
            }
        }
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_others(usize::MAX);
        self.keeper.wake();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use http_body_util::BodyExt;
    use proptest::prelude::*;
    use tokio::sync::mpsc;

    use super::{super::resume::Streams, *};
    use crate::sse::Labels;

    /// A body of what is sent, and what came of its recording.
    struct Stage {
        send: mpsc::UnboundedSender<Result<Frame<Bytes>, BoxError>>,
        recording: Arc<Recording>,
        end: Arc<Mutex<Option<Result<Whole, Lost>>>>,
    }

    struct Sent(mpsc::UnboundedReceiver<Result<Frame<Bytes>, BoxError>>);

    impl HttpBody for Sent {
        type Data = Bytes;
        type Error = BoxError;

        fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
            self.0.poll_recv(cx)
        }
    }

    impl Stage {
        fn new(limit: usize) -> Self {
            let (send, frames) = mpsc::unbounded_channel();
            let end = Arc::new(Mutex::new(None));
            let told = end.clone();
            let recording = Recording::new(Body::new(Sent(frames)), limit, Budget::new(1000), None, move |whole| {
                *told.lock() = Some(whole);
            });
            Self { send, recording, end }
        }

        fn say(&self, text: &'static str) {
            self.send.send(Ok(Frame::data(Bytes::from_static(text.as_bytes())))).unwrap();
        }

        fn hang_up(&mut self) {
            self.send = mpsc::unbounded_channel().0;
        }

        fn end(&self) -> Option<Result<Bytes, Lost>> {
            self.end.lock().as_ref().map(|whole| whole.as_ref().map(|whole| whole.body.clone()).map_err(|lost| *lost))
        }
    }

    /// All that can be read now.
    fn read(reader: &mut Reader) -> String {
        let mut text = String::new();
        while let Some(Some(frame)) = reader.frame().now_or_never() {
            text.push_str(std::str::from_utf8(frame.unwrap().data_ref().unwrap()).unwrap());
        }
        text
    }

    #[tokio::test]
    async fn who_comes_late_gets_the_beginning_at_once_and_then_what_comes() {
        let mut stage = Stage::new(100);
        let mut first = stage.recording.reader().unwrap();
        stage.say("a");
        stage.say("b");
        assert_eq!(read(&mut first), "ab");
        let mut late = stage.recording.reader().unwrap();
        assert_eq!(read(&mut late), "ab");
        stage.say("c");
        assert_eq!(read(&mut late), "c", "whoever is polled asks the upstream");
        assert_eq!(read(&mut first), "c");
        stage.hang_up();
        let (first, late) = tokio::join!(first.frame(), late.frame());
        assert!(first.is_none() && late.is_none());
        assert_eq!(stage.end().unwrap().unwrap(), "abc");
    }

    #[tokio::test]
    async fn what_comes_wakes_all_who_wait() {
        let mut stage = Stage::new(100);
        let mut readers: Vec<_> = (0..10).map(|_| stage.recording.reader().unwrap()).collect();
        let reading: Vec<_> = readers
            .drain(..)
            .map(|reader| tokio::spawn(async { reader.collect().await.unwrap().to_bytes() }))
            .collect();
        for text in ["a", "b", "c"] {
            tokio::task::yield_now().await;
            stage.say(text);
        }
        tokio::task::yield_now().await;
        stage.hang_up();
        for one in reading {
            assert_eq!(one.await.unwrap(), "abc");
        }
    }

    #[tokio::test]
    async fn the_first_may_leave_and_when_the_last_does_the_upstream_is_cancelled() {
        let stage = Stage::new(100);
        let Stage { send, recording, end } = stage;
        let (mut first, mut second) = (recording.reader().unwrap(), recording.reader().unwrap());
        drop(recording);
        assert!(first.frame().now_or_never().is_none());
        assert!(second.frame().now_or_never().is_none());
        let waiting = tokio::spawn(async move {
            let frame = second.frame().await;
            (second, frame)
        });
        tokio::task::yield_now().await;
        drop(first);
        send.send(Ok(Frame::data(Bytes::from_static(b"a")))).unwrap();
        let (second, frame) = waiting.await.unwrap();
        assert_eq!(frame.unwrap().unwrap().into_data().unwrap(), "a");
        assert!(!send.is_closed());
        drop(second);
        assert!(send.is_closed());
        assert!(end.lock().is_none(), "nothing is stored");
    }

    #[tokio::test]
    async fn a_break_breaks_off_for_all_and_nothing_is_stored() {
        let stage = Stage::new(100);
        let (mut first, mut second) = (stage.recording.reader().unwrap(), stage.recording.reader().unwrap());
        stage.say("a");
        stage.send.send(Err(Error::from(Kind::UpstreamTimeout).into())).unwrap();
        assert_eq!(first.frame().await.unwrap().unwrap().into_data().unwrap(), "a");
        let kind = |frame: Option<Result<Frame<Bytes>, BoxError>>| {
            Error::find(&*frame.unwrap().unwrap_err()).map(Error::kind).unwrap()
        };
        assert_eq!(kind(first.frame().await), Kind::UpstreamTimeout);
        assert_eq!(second.frame().await.unwrap().unwrap().into_data().unwrap(), "a");
        assert_eq!(kind(second.frame().await), Kind::UpstreamTimeout);
        assert_eq!(stage.end(), Some(Err(Lost::Broken)));
        // A length would make what is at hand look like all of it.
        let late = stage.recording.reader().unwrap();
        assert_eq!((late.size_hint().lower(), late.size_hint().exact()), (1, None));
        assert!(!late.is_end_stream());
    }

    #[tokio::test]
    async fn what_grows_too_large_is_not_kept_and_nobody_runs_away() {
        let mut stage = Stage::new(4);
        let (mut fast, mut slow) = (stage.recording.reader().unwrap(), stage.recording.reader().unwrap());
        for text in ["ab", "cd", "ef", "gh", "ij"] {
            stage.say(text);
        }
        assert_eq!(read(&mut fast), "abcdef", "one more than the limit, and then it waits for the other");
        assert_eq!(stage.end(), Some(Err(Lost::TooLarge)), "as soon as it is known");
        let fast = tokio::spawn(async { fast.collect().await.unwrap().to_bytes() });
        tokio::task::yield_now().await;
        assert_eq!(slow.frame().await.unwrap().unwrap().into_data().unwrap(), "ab");
        assert!(stage.recording.reader().is_none(), "the beginning is gone");
        drop(slow);
        stage.hang_up();
        assert_eq!(fast.await.unwrap(), "ghij");
    }

    #[tokio::test(start_paused = true)]
    async fn who_keeps_the_others_waiting_is_cut_off() {
        let mut stage = Stage::new(4);
        let (fast, mut idle) = (stage.recording.reader().unwrap(), stage.recording.reader().unwrap());
        for text in ["ab", "cd", "ef", "gh"] {
            stage.say(text);
        }
        stage.hang_up();
        let begun = Instant::now();
        assert_eq!(fast.collect().await.unwrap().to_bytes(), "abcdefgh");
        assert_eq!(begun.elapsed(), PATIENCE);
        let error = idle.frame().await.unwrap().unwrap_err();
        assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::ClientTimeout));
        assert_eq!((idle.size_hint().exact(), idle.is_end_stream()), (Some(0), false));
    }

    #[tokio::test]
    async fn all_that_are_on_their_way_have_one_budget() {
        let budget = Budget::new(5);
        let stages = [(); 2].map(|()| {
            let mut stage = Stage::new(4);
            let (send, frames) = mpsc::unbounded_channel();
            let told = stage.end.clone();
            stage.recording = Recording::new(Body::new(Sent(frames)), 4, budget.clone(), None, move |whole| {
                *told.lock() = Some(whole);
            });
            stage.send = send;
            stage
        });
        let [mut first, mut second] = stages.each_ref().map(|stage| stage.recording.reader().unwrap());
        for stage in &stages {
            stage.say("abc");
        }
        assert_eq!((read(&mut first), read(&mut second)), ("abc".to_owned(), "abc".to_owned()));
        assert_eq!((stages[0].end(), stages[1].end()), (None, Some(Err(Lost::TooLarge))));
        assert_eq!(budget.used(), 3, "who is alone keeps nothing");
        drop((first, second, stages));
        assert_eq!(budget.used(), 0);
    }

    #[tokio::test]
    async fn trailers_are_everybodys() {
        let mut stage = Stage::new(4);
        let mut reader = stage.recording.reader().unwrap();
        let trailers: HeaderMap = [(http::header::ETAG, "1".parse().unwrap())].into_iter().collect();
        stage.say("a");
        stage.send.send(Ok(Frame::trailers(trailers.clone()))).unwrap();
        stage.hang_up();
        let (mut late, first) = (stage.recording.reader().unwrap(), reader.frame().await);
        assert_eq!(first.unwrap().unwrap().into_data().unwrap(), "a");
        assert_eq!(reader.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        assert!(reader.frame().await.is_none());
        assert!(!late.is_end_stream());
        assert_eq!((late.size_hint().lower(), late.size_hint().exact()), (1, None), "trailers need a place");
        late.frame().await;
        assert_eq!(late.frame().await.unwrap().unwrap().into_trailers().unwrap(), trailers);
        assert!(late.frame().await.is_none());
        assert_eq!(stage.end.lock().take().unwrap().unwrap().trailers, Some(trailers));
    }

    #[tokio::test(start_paused = true)]
    async fn frames_keep_their_times() {
        let mut stage = Stage::new(100);
        let mut reader = stage.recording.reader().unwrap();
        for text in ["a", "bc"] {
            stage.say(text);
            reader.frame().await.unwrap().unwrap();
            tokio::time::advance(Duration::from_millis(30)).await;
        }
        stage.hang_up();
        assert!(reader.frame().await.is_none());
        let whole = stage.end.lock().take().unwrap().unwrap();
        assert_eq!(*whole.cuts, [Cut { end: 1, at: 0 }, Cut { end: 3, at: 30 }]);
        assert_eq!(whole.took, Duration::from_millis(60));
    }

    /// A stage whose recording is kept for those who come again, and the room that it takes.
    fn held(limit: usize, most: u64) -> (Stage, Arc<Streams>) {
        let stage = Stage::new(limit);
        let streams = Streams::new(Arc::default());
        streams.limit(most);
        stage.recording.hold(streams.room().share(), true);
        (stage, streams)
    }

    fn after(stage: &Stage, event: u64) -> Option<String> {
        let (mut reader, numbering) = stage.recording.reader_after(event)?;
        let mut labels = Labels::after("r", numbering, event);
        let rest = labels.pass(Bytes::from(read(&mut reader)));
        Some(String::from_utf8(rest.to_vec()).unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn what_nobody_reads_is_read_on_up_to_the_limit_and_then_waits() {
        let (stage, _streams) = held(40, 1 << 20);
        let mut reader = stage.recording.reader().unwrap();
        stage.say("data: 1\n\n");
        assert_eq!(read(&mut reader), "data: 1\n\n");
        drop(reader);
        assert!(stage.recording.deserted().now_or_never().flatten().is_some());
        for _ in 0..9 {
            stage.say("data: 2\n\n");
        }
        assert!(stage.recording.read_on().now_or_never().is_none());
        assert_eq!(stage.recording.state.lock().frames.len(), 5, "as much as there is room for, and one more");
        let rest = after(&stage, 1).unwrap();
        assert_eq!(rest.matches("data: 2").count(), 9, "nothing is lost: {rest}");
        assert!(rest.ends_with("id: r.10\n\n"), "{rest}");
    }

    #[tokio::test(start_paused = true)]
    async fn it_is_let_go_when_nobody_has_read_it_for_so_long() {
        let (mut stage, _streams) = held(100, 1 << 20);
        let secs = Duration::from_secs;
        let mut reader = stage.recording.reader().unwrap();
        stage.say("data: 1\n\n");
        read(&mut reader);
        tokio::time::advance(secs(60)).await;
        assert!(!stage.recording.expire(secs(10)), "somebody reads it");
        drop(reader);
        tokio::time::advance(secs(9)).await;
        assert!(!stage.recording.expire(secs(10)));
        assert_eq!(after(&stage, 1).unwrap(), "", "and somebody did again");
        tokio::time::advance(secs(9)).await;
        assert!(!stage.recording.expire(secs(10)));
        stage.hang_up();
        assert!(stage.recording.read_on().now_or_never().is_none());
        for _ in 0..2 {
            tokio::time::advance(secs(4)).await;
            assert_eq!(after(&stage, 0).unwrap(), "data: 1\nid: r.1\n\n", "it has ended, and is kept");
            assert!(!stage.recording.expire(secs(10)));
        }
        tokio::time::advance(secs(4)).await;
        assert_eq!(after(&stage, 1).unwrap(), "");
        assert!(stage.recording.expire(secs(10)), "since its end, whoever asked for it meanwhile");
        assert!(after(&stage, 1).is_none() && stage.recording.deserted().await.is_none());
    }

    #[tokio::test]
    async fn of_what_grows_too_large_the_last_part_is_kept() {
        let (stage, _streams) = held(40, 1 << 20);
        let mut reader = stage.recording.reader().unwrap();
        for text in ["data: 1\n\n", "data: 2\n", "\n", "data: 3\n\ndata: 4\n", "\ndata: 5\n\n", "data: 6\n\n"] {
            stage.say(text);
        }
        read(&mut reader);
        assert!(stage.recording.state.lock().kept <= 40);
        assert!(after(&stage, 1).is_none(), "the first half of the second is gone");
        let rest = |from: usize| (from..=6).map(|n| format!("data: {n}\nid: r.{n}\n\n")).collect::<Vec<_>>().concat();
        for n in 2..=6 {
            assert_eq!(after(&stage, n).unwrap(), rest(usize::try_from(n).unwrap() + 1), "{n}");
        }
        assert!(after(&stage, 7).is_none(), "it has not come");
    }

    #[tokio::test]
    async fn where_there_is_no_room_it_is_not_kept() {
        let (stage, streams) = held(1000, 3000);
        let mut reader = stage.recording.reader().unwrap();
        stage.say("data: 1\n\n");
        read(&mut reader);
        assert!(after(&stage, 1).is_some());
        let others = [streams.room().share(), streams.room().share()];
        stage.say("data: 2\n\n");
        assert_eq!(read(&mut reader), "data: 2\n\n");
        assert!(after(&stage, 1).is_none());
        stage.say("data: 3\n\n");
        assert_eq!(read(&mut reader), "data: 3\n\n", "who reads it gets all");
        assert!(read(&mut reader).is_empty() && stage.recording.state.lock().frames.is_empty());
        drop(others);
    }

    #[tokio::test]
    async fn of_what_broke_off_only_what_was_missed_can_be_taken_up() {
        let (stage, _streams) = held(100, 1 << 20);
        let mut reader = stage.recording.reader().unwrap();
        stage.say("data: 1\n\ndata: 2\n\n");
        stage.send.send(Err(Error::from(Kind::UpstreamReset).into())).unwrap();
        reader.frame().await.unwrap().unwrap();
        reader.frame().await.unwrap().unwrap_err();
        let (mut again, _) = stage.recording.reader_after(1).unwrap();
        again.frame().await.unwrap().unwrap();
        again.frame().await.unwrap().unwrap_err();
        assert!(stage.recording.reader_after(2).is_none(), "the upstream is asked again");
    }

    proptest! {
        #[test]
        fn whoever_reads_when_all_get_the_same(
            frames in prop::collection::vec("[a-z]{1,6}", 1..12),
            steps in prop::collection::vec(0usize..5, 0..80),
            limit in 1usize..60,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
            let _entered = runtime.enter();
            let mut stage = Stage::new(limit);
            let mut readers: Vec<(Reader, String)> = Vec::new();
            let mut left = frames.iter();
            for step in steps {
                match step {
                    0 => readers.extend(stage.recording.reader().map(|reader| (reader, String::new()))),
                    1 => if let Some(text) = left.next() {
                        stage.send.send(Ok(Frame::data(Bytes::from(text.clone())))).unwrap();
                    },
                    2 if readers.len() > 1 => drop(readers.swap_remove(0)),
                    n => {
                        let count = readers.len().max(1);
                        if let Some((reader, text)) = readers.get_mut(n % count) {
                            text.push_str(&read(reader));
                        }
                    }
                }
            }
            for text in left {
                stage.send.send(Ok(Frame::data(Bytes::from(text.clone())))).unwrap();
            }
            stage.hang_up();
            // In turns, as those that wait for each other would be woken.
            for _ in 0..frames.len() * (readers.len() + 1) {
                for (reader, text) in &mut readers {
                    text.push_str(&read(reader));
                }
            }
            let all: String = frames.concat();
            for (mut reader, text) in readers {
                prop_assert_eq!(&text, &all);
                prop_assert!(reader.frame().now_or_never().unwrap().is_none());
            }
            if let Some(Ok(whole)) = stage.end() {
                prop_assert_eq!(whole, all.as_bytes());
                prop_assert!(all.len() <= limit);
            }
        }
    }
}
