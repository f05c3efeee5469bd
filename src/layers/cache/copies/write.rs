//! The owner of a stream, who copies it.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use http_body::Body as _;
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};
use tracing::debug;

use super::{
    super::{
        marks::Marks,
        purge::Standing,
        recording::{Copied, Cursor, Recording},
        resume::{Id, Stream},
    },
    APPEND, Copies, Ear, LOOK, Of, PART, news, question,
    sealed::{End, Head, OVERHEAD, Part, Seal, What},
};
use crate::{
    message::Kind,
    store::{Failure, Key},
    telemetry::metrics::CacheCopy,
};

/// Until the next try, where Redis does not take it, and the longest that this grows.
const AGAIN: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));
/// How much longer than its stream can be taken up a copy lives while it comes: the next write may be late.
const MARGIN: Duration = Duration::from_secs(10);
/// What a part takes in Redis beside its bytes.
const BESIDE: usize = 64 + OVERHEAD;
/// How long a reader elsewhere may keep a copy from going on: as long as a reader here may keep the others.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often a copy that Redis has lost is begun anew.
const ANEW: u32 = 8;

/// Copies a stream while it comes.
pub(in super::super) struct Copier {
    of: Of,
    name: String,
    seal: Seal,
    keys: [Key; 2],
    /// How long the stream can be taken up after its end.
    after: Duration,
    ear: Ear,
    /// Counted among those that are being written.
    running: Option<Running>,
    /// What is in Redis: where each part begins, and what it takes.
    written: VecDeque<(u64, usize)>,
    size: usize,
    /// A write of so many bytes may have taken effect, or not. It has to be the same again: a reader goes from part to part.
    unsure: Option<usize>,
    /// Since when a reader is too far behind.
    held_up: Option<Instant>,
    /// Whether somebody has to be told that it lives on, or looked for.
    is_due: bool,
    /// How often it is to be begun anew yet.
    left: u32,
    /// Whether anything may be there.
    is_there: bool,
    /// When all of it was.
    ended: Option<Instant>,
    seat: Option<Seat>,
}

/// Why there is nothing more to copy.
enum Stop {
    /// It has come to its end.
    Ended,
    /// It cannot be copied: Redis has lost it too often, or this stream is not one to be taken up again.
    Lost,
    /// Nobody may have it any more.
    Gone,
}

impl Copier {
    pub(in super::super) fn new(of: Of, id: Id, after: Duration) -> Option<Self> {
        let (name, seal) = Seal::of(id)?;
        let (keys, ear) = (of.copies.keys(&name), of.copies.listen(question(&name)));
        Some(Self {
            of,
            name,
            seal,
            keys,
            after,
            ear,
            running: None,
            written: VecDeque::new(),
            size: 0,
            unsure: None,
            held_up: None,
            is_due: false,
            left: ANEW,
            is_there: false,
            ended: None,
            seat: None,
        })
    }

    /// Copies until all is copied, or nothing more can be.
    pub(in super::super) async fn run(&mut self, stream: &Stream) {
        let stop = self.copy(stream).await;
        self.seat = None;
        let outcome = match stop {
            Stop::Ended => CacheCopy::Complete,
            Stop::Lost => CacheCopy::Lost,
            Stop::Gone => CacheCopy::Dropped,
        };
        self.of.metrics.copied(outcome);
        self.ended = matches!(stop, Stop::Ended).then(Instant::now);
        if self.ended.is_none() {
            self.take_out().await;
        }
        self.running = None;
    }

    /// Its stream is no longer kept here. What is copied goes with it, unless its time is over anyway: somebody may still
    /// read it.
    pub(in super::super) async fn end(mut self) {
        self.seat = None;
        if self.running.is_some() {
            self.of.metrics.copied(CacheCopy::Dropped);
        }
        let is_over = self.ended.is_some_and(|ended| ended.elapsed() + LOOK >= self.after);
        if !is_over {
            self.take_out().await;
        }
    }

    async fn take_out(&mut self) {
        if std::mem::take(&mut self.is_there) {
            // Without Redis nobody finds it either, and it has an end of its own.
            self.of.copies.redis.delete(&self.keys[0]).await.ok();
        }
    }

    async fn copy(&mut self, stream: &Stream) -> Stop {
        let recording = &stream.recording;
        let Some(mut at) = recording.copied() else { return Stop::Gone };
        // Who gets nothing has no id to come again with.
        recording.news(&at).await;
        self.running = Some(Running::new(&self.of.copies));
        let Some(marks) = self.marks(stream).await else { return Stop::Gone };
        let Some(head) = self.head(stream, marks) else { return Stop::Lost };
        let mut anew = Some(&head);
        let mut pause = AGAIN.0;
        loop {
            if self.is_purged(stream) {
                return Stop::Gone;
            }
            match self.write(recording, &mut at, &mut anew).await {
                Ok(Wrote::Part) => {}
                Ok(Wrote::Rest) => {
                    pause = AGAIN.0;
                    // What comes now goes together.
                    self.is_due |= timeout(self.of.copies.linger(), self.ear.heard.notified()).await.is_ok();
                }
                Ok(Wrote::Nothing) => {
                    pause = AGAIN.0;
                    self.wait(recording, &at).await;
                }
                Ok(Wrote::HeldUp) => {
                    // They ask when they have read all.
                    timeout(LOOK / 4, self.ear.heard.notified()).await.ok();
                }
                Ok(Wrote::End) => return Stop::Ended,
                Ok(Wrote::LetGo) => return Stop::Gone,
                Ok(Wrote::Begin) => {
                    // Redis has lost it, or it was left too far behind: from the first that is kept here.
                    let Some(front) = recording.copied() else { return Stop::Gone };
                    let Some(left) = self.left.checked_sub(1) else { return Stop::Lost };
                    (at, self.left, self.unsure) = (front, left, None);
                    self.written.clear();
                    (self.size, self.seat, anew) = (0, None, Some(&head));
                }
                Err(failure) => {
                    debug!(outcome = failure.as_str(), "stream not copied to redis, for now");
                    self.of.metrics.copied(CacheCopy::Failed);
                    if self.of.copies.is_closing() {
                        return Stop::Lost;
                    }
                    timeout(pause, self.ear.heard.notified()).await.ok();
                    pause = (pause * 2).min(AGAIN.1);
                }
            }
        }
    }

    /// Those by which the stream is purged, from before its upstream was asked; or from now, where nothing that was purged
    /// since can have escaped this replica.
    async fn marks(&self, stream: &Stream) -> Option<Arc<Marks>> {
        let footing = &stream.footing;
        if let Some(marks) = &footing.marks {
            return Some(marks.clone());
        }
        let mut pause = AGAIN.0;
        loop {
            if self.is_purged(stream) || stream.recording.is_let_go() {
                return None;
            }
            match self.of.shared.marks_of(&footing.names).await {
                Ok(marks) if self.of.shared.hears_since(footing.asked) => return Some(marks.into()),
                Ok(_) => return None,
                Err(_) if self.of.copies.is_closing() => return None,
                Err(_) => {
                    self.of.metrics.copied(CacheCopy::Failed);
                    timeout(pause, self.ear.heard.notified()).await.ok();
                    pause = (pause * 2).min(AGAIN.1);
                }
            }
        }
    }

    fn is_purged(&self, stream: &Stream) -> bool {
        self.of.shared.standing_here(stream.footing.number, &stream.footing.names) == Standing::Gone
    }

    fn head(&self, stream: &Stream, marks: Arc<Marks>) -> Option<Vec<u8>> {
        let head = Head {
            owner: self.of.copies.id,
            whose: stream.whose.clone(),
            status: stream.status,
            headers: stream.headers.clone(),
            names: stream.footing.names.clone(),
            marks,
        };
        self.seal.seal(What::Head, 0, &head.encode())
    }

    /// Writes what comes next, with the head where it begins `anew`.
    async fn write(
        &mut self,
        recording: &Arc<Recording>,
        at: &mut Cursor,
        anew: &mut Option<&Vec<u8>>,
    ) -> Result<Wrote, Failure> {
        let limit = self.of.limit;
        let part = PART.min(limit / 4).max(1);
        let mut fields = Vec::new();
        let mut field = |name: &[u8], value: Vec<u8>| fields.extend([name.to_vec(), value]);
        if let Some(head) = anew {
            field(b"head", (*head).clone());
            field(b"to", at.at.to_string().into_bytes());
        }
        let mut found = recording.copy(at, self.unsure.unwrap_or(part));
        let mut next = None;
        if let Copied::Data(pieces, mut to) = found {
            let said = Part::encode(at.numbering.count(), at.numbering.is_between(), &pieces);
            for piece in &pieces {
                to.numbering.pass(piece);
            }
            let sealed = self.seal.seal(What::Part, at.at, &said);
            // It may have ids of its own.
            let Some(sealed) = sealed.filter(|_| !to.numbering.is_over()) else { return Ok(Wrote::LetGo) };
            field(at.at.to_string().as_bytes(), sealed);
            field(b"to", to.at.to_string().into_bytes());
            // The end goes with it, where it is all.
            found = recording.copy(&to, 1);
            next = Some(to);
        }
        let end = match found {
            Copied::Whole(trailers) => Some(End::Whole(trailers)),
            Copied::Broken(kind) => Some(End::Broken(kind)),
            Copied::Nothing if self.of.copies.is_closing() => Some(End::Broken(Kind::UpstreamReset)),
            _ if next.is_some() => None,
            // Only that it lives on, and whether anybody reads it.
            Copied::Nothing if self.is_due => None,
            Copied::Nothing | Copied::Data(..) => return Ok(Wrote::Nothing),
            Copied::Missed => return Ok(Wrote::Begin),
            Copied::LetGo => return Ok(Wrote::LetGo),
        };
        let ended = end.is_some();
        if let Some(end) = end {
            let place = next.as_ref().unwrap_or(at).at;
            let Some(end) = self.seal.seal(What::End, place, &end.encode()) else { return Ok(Wrote::LetGo) };
            field(b"end", end);
        }
        let length = next.as_ref().map_or(0, |next| usize::try_from(next.at - at.at).unwrap_or(usize::MAX));
        // The first ones give way, as the recording's do.
        let (mut size, mut gone) = (self.size + if length > 0 { length + BESIDE } else { 0 }, 0);
        while size > limit && gone < self.written.len() {
            size -= self.written[gone].1;
            gone += 1;
        }
        let lives = if ended { self.after } else { self.after + MARGIN };
        let mut args = vec![
            lives.as_millis().max(1).to_string().into_bytes(),
            self.of.copies.channel().as_str().into(),
            news(&self.name).into(),
            u8::from(anew.is_some()).to_string().into(),
            u8::from(self.held_up.is_some_and(|since| since.elapsed() >= PATIENCE)).to_string().into(),
            gone.to_string().into(),
        ];
        args.extend(self.written.iter().take(gone).map(|(at, _)| at.to_string().into_bytes()));
        let bytes = fields.iter().map(Vec::len).sum();
        args.extend(fields);
        let headroom = &self.of.copies.headroom;
        if (next.is_some() || anew.is_some()) && !headroom.has(&self.of.copies.redis, bytes).await {
            return Err(Failure::Full);
        }
        self.of.copies.alive().await?;
        // Until it is known that it was not.
        self.unsure = next.is_some().then_some(length);
        self.is_there = true;
        let appended = self.of.copies.redis.run(&APPEND, &self.keys, &args[..]).await;
        headroom.wrote(&appended);
        let (found, readers): (u8, String) = appended?;
        self.unsure = None;
        if found == 0 {
            return Ok(Wrote::Begin);
        }
        (*anew, self.is_due) = (None, false);
        if found == 2 {
            self.held_up.get_or_insert_with(Instant::now);
            self.attend(recording, at, readers.parse().ok());
            return Ok(Wrote::HeldUp);
        }
        self.held_up = None;
        self.written.drain(..gone);
        if ended {
            return Ok(Wrote::End);
        }
        let wrote = if let Some(next) = next {
            self.written.push_back((at.at, length + BESIDE));
            (self.size, *at) = (size, next);
            if length < part { Wrote::Rest } else { Wrote::Part }
        } else {
            Wrote::Nothing
        };
        self.attend(recording, at, readers.parse().ok());
        Ok(wrote)
    }

    /// Reads on for those who read elsewhere, up to what they can take: they are there, up to this byte.
    fn attend(&mut self, recording: &Arc<Recording>, at: &Cursor, readers: Option<u64>) {
        let Some(readers) = readers else {
            self.seat = None;
            return;
        };
        // Nor further than what is copied: the recording may let go of what the seat has read.
        let ahead = self.of.limit.min(recording.limit()) as u64 / 2;
        let up_to = readers.min(at.at).saturating_add(ahead);
        match &self.seat {
            Some(seat) => {
                seat.up_to.send_replace(up_to);
            }
            None => self.seat = Seat::take(recording, up_to),
        }
    }

    /// Waits until there is something to write, or to look whether anybody reads elsewhere.
    async fn wait(&mut self, recording: &Arc<Recording>, at: &Cursor) {
        // Where nobody is here, somebody may be elsewhere; where somebody was, they may have left.
        let is_alone = self.seat.is_some() || recording.left().is_some();
        let due = Instant::now() + if is_alone { LOOK } else { (self.after + MARGIN) / 2 };
        tokio::select! {
            () = recording.news(at) => {}
            () = self.ear.heard.notified() => self.is_due = true,
            () = sleep_until(due) => self.is_due = true,
        }
    }
}

/// What came of a write.
enum Wrote {
    /// As much as goes at once.
    Part,
    /// All that there was.
    Rest,
    /// There was nothing.
    Nothing,
    End,
    /// A reader is too far behind.
    HeldUp,
    /// It has to begin anew.
    Begin,
    LetGo,
}

/// The place in a recording of those who read elsewhere.
struct Seat {
    up_to: watch::Sender<u64>,
    _task: JoinSet<()>,
}

impl Seat {
    fn take(recording: &Arc<Recording>, up_to: u64) -> Option<Self> {
        let (mut reader, mut at) = recording.last_reader()?;
        let (up_to, mut limit) = watch::channel(up_to);
        let mut task = JoinSet::new();
        task.spawn(async move {
            while limit.wait_for(|limit| at < *limit).await.is_ok() {
                match std::future::poll_fn(|cx| Pin::new(&mut reader).poll_frame(cx)).await {
                    Some(Ok(frame)) => at += frame.data_ref().map_or(0, |data| data.len() as u64),
                    // Still somebody reads it, until they have read the end.
                    Some(Err(_)) | None => std::future::pending().await,
                }
            }
        });
        Some(Self { up_to, _task: task })
    }
}

/// One of those that are being written.
struct Running(Arc<Copies>);

impl Running {
    fn new(copies: &Arc<Copies>) -> Self {
        if copies.running.fetch_add(1, Ordering::AcqRel) == 0 {
            copies.begun.notify_one();
        }
        Self(copies.clone())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}
