//! Streams that are taken up again by a client that lost its connection (WHATWG HTML §9.2.4, `Last-Event-ID`).
//!
//! Each event gets an `id` that names the recording and the event's number in it. The recording is kept when its last
//! client has left, and read on for nobody; who comes again with an id, and asks the same as the same, gets what comes
//! after that event and then what comes live. An id that is not known, because its recording is gone, is as good as none.
//!
//! What may be shared is one recording for all who read it, and found by whoever may read along, or in the store. What
//! may not, such as an answer to a question whose answers are not kept, is a recording of its own, for the one who asked.
//!
//! The recording is in this process. Where there is a Redis, another replica finds a [copy](super::copies) there, and gives
//! the rest of it; elsewhere it answers as if it were not there. What was purged is not taken up again.

use std::{
    collections::{HashMap, hash_map::Entry},
    fmt,
    num::NonZeroU32,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{self, Poll, ready},
    time::Duration,
};

use bytes::Bytes;
use http::{
    Extensions, HeaderMap, HeaderName, HeaderValue, StatusCode, Version,
    header::{ACCEPT_RANGES, ETAG},
};
use http_body::{Body as HttpBody, Frame};
use parking_lot::Mutex;
use ring::{
    digest::{Context, SHA256},
    rand::{SecureRandom, SystemRandom},
};
use tokio::{task::JoinSet, time::timeout_at};

use super::{
    copies::{self, Copier},
    directives,
    freshness::Rules,
    kept::Asking,
    key::Key,
    left::{Left, Owner},
    marks::Marks,
    purge::{Names, Purges, Standing},
    recording::Recording,
};
use crate::{
    message::{Body, BoxError, Response},
    sse::{self, Labels, Numbering},
    telemetry::metrics::CacheResume,
};

/// WHATWG HTML §9.2.4.
pub(super) const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// What a stream takes beside its bytes: its head, its task, the tables that it stands in.
const OVERHEAD: u64 = 2048;
/// What a frame takes beside its bytes.
const FRAME: u64 = 64;

/// The name of a recording, which nobody can guess: 96 random bits, and a check of 32 by which it is known as one of ours,
/// on all replicas: an upstream may have ids that look like it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Id([u8; 16]);

impl Id {
    /// A new one; `None` where the system has no random numbers.
    pub(super) fn new() -> Option<Self> {
        let mut random = [0; RANDOM];
        SystemRandom::new().fill(&mut random).ok()?;
        let mut id = [0; 16];
        id[..RANDOM].copy_from_slice(&random);
        id[RANDOM..].copy_from_slice(&check(&random));
        Some(Self(id))
    }

    /// Whether it is one of ours.
    fn is_ours(self) -> bool {
        let (random, checked) = self.0.split_at(RANDOM);
        check(random) == checked
    }

    pub(super) fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    fn hex(self) -> String {
        format!("{:032x}", u128::from_be_bytes(self.0))
    }
}

/// How many bytes of an id are random.
const RANDOM: usize = 12;

fn check(random: &[u8]) -> [u8; 4] {
    let mut hash = Context::new(&SHA256);
    hash.update(b"sidegate stream");
    hash.update(random);
    let hash = hash.finish();
    std::array::from_fn(|n| hash.as_ref()[n])
}

impl From<[u8; 16]> for Id {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

/// Not what it is: who knows it may have the stream.
impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Id")
    }
}

/// The last event that a client has had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Last {
    pub(super) id: Id,
    pub(super) event: u64,
}

impl Last {
    /// What the request says, if it is one of ours: 32 hexadecimal digits, a dot, and a number.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let mut values = headers.get_all(LAST_EVENT_ID).iter();
        let (value, None) = (values.next()?, values.next()) else { return None };
        let (id, event) = value.to_str().ok()?.split_once('.')?;
        let is = |text: &str, digits: &[u8]| text.bytes().all(|byte| digits.contains(&byte));
        let is_one =
            id.len() == 32 && is(id, b"0123456789abcdef") && is(event, b"0123456789") && !event.starts_with('0');
        let id = u128::from_str_radix(id, 16).ok().filter(|_| is_one)?;
        let id = Some(Id(id.to_be_bytes())).filter(|id| id.is_ours())?;
        Some(Self { id, event: event.parse().ok()? })
    }
}

/// Whether the events of a response can be given ids: where the upstream lets nobody change what it says (RFC 9111
/// §5.2.2.6), only if the operator knows better.
pub(super) fn fits<B: HttpBody>(response: &http::Response<B>, rules: &Rules) -> bool {
    let is_open = || rules.ignore_cache_control || !directives::Response::of(response.headers()).no_transform;
    response.status() == StatusCode::OK && sse::has_room(response) && is_open()
}

/// Leaves nothing in the fields of a stream with ids that holds only without them: of two with the same tag each has ids
/// of its own, so that the tag is a weak one (RFC 9110 §8.8.1), and no part of the one fits the other (§14.3).
pub(super) fn weaken(headers: &mut HeaderMap) {
    headers.remove(ACCEPT_RANGES);
    let strong = headers.get(ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"));
    if let Some(weak) = strong.and_then(|tag| HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat()).ok()) {
        headers.insert(ETAG, weak);
    }
}

/// For how long the streams of a route can be taken up again, and where they are.
#[derive(Debug, Clone)]
pub(super) struct Resume {
    pub(super) streams: Arc<Streams>,
    pub(super) after: Duration,
    /// Where other replicas find them, and this one finds theirs.
    pub(super) copies: Option<copies::Of>,
}

/// By what a stream is purged.
#[derive(Debug, Clone)]
pub(super) struct Footing {
    pub(super) names: Arc<Names>,
    /// The last purge of this process before its upstream was asked, and when that was.
    pub(super) number: u64,
    pub(super) asked: u64,
    /// What Redis knew then, if it was asked.
    pub(super) marks: Option<Arc<Marks>>,
}

/// Why a stream is not taken up again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Lost {
    /// There is none of this name: not any more, or it was purged.
    Unknown,
    /// What came after the event is gone, or has not come and will not.
    Gone,
    /// It is another one's, or the answer to another question.
    Other,
    /// Redis did not say.
    Failed,
}

/// Who may take up a stream again.
#[derive(Debug, Clone)]
pub(super) enum Whose {
    /// Whoever asks this question.
    All { key: Key, vary: Vec<HeaderName> },
    /// Who asked it.
    One(Key),
}

impl From<Lost> for CacheResume {
    fn from(lost: Lost) -> Self {
        match lost {
            Lost::Unknown => Self::Unknown,
            Lost::Gone => Self::Gone,
            Lost::Other => Self::Other,
            Lost::Failed => Self::Failed,
        }
    }
}

/// A stream that can be taken up again.
pub(super) struct Stream {
    pub(super) whose: Whose,
    pub(super) owner: Owner,
    pub(super) status: StatusCode,
    pub(super) version: Version,
    pub(super) headers: HeaderMap,
    pub(super) extensions: Extensions,
    pub(super) recording: Arc<Recording>,
    pub(super) footing: Footing,
    /// As long as it is there, others find the answer.
    pub(super) asking: Option<Asking>,
    /// Whether anybody got an id of it.
    pub(super) is_known: Arc<AtomicBool>,
}

/// Those of a route. They outlive a configuration.
pub(super) struct Streams {
    room: Arc<Room>,
    left: Left,
    all: Mutex<HashMap<Id, Arc<Stream>>>,
    tasks: Arc<Mutex<JoinSet<()>>>,
}

impl fmt::Debug for Streams {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Streams").field("count", &self.all.lock().len()).finish_non_exhaustive()
    }
}

impl Streams {
    /// With a task for each stream among `tasks`.
    pub(super) fn new(tasks: Arc<Mutex<JoinSet<()>>>) -> Arc<Self> {
        Arc::new_cyclic(|streams| {
            let room = Room { used: AtomicU64::new(0), most: AtomicU64::new(0), streams: streams.clone() };
            Self { room: Arc::new(room), left: Left::default(), all: Mutex::default(), tasks }
        })
    }

    /// How much memory they may take, in bytes. Those that there are do so.
    pub(super) fn limit(&self, most: u64) {
        self.room.most.store(most, Ordering::Relaxed);
    }

    /// How much may be asked of the upstream at once.
    pub(super) fn beside(&self, places: Option<NonZeroU32>) {
        self.left.beside(places);
    }

    /// How many there are, and about how many bytes they take.
    pub(super) fn size(&self) -> (usize, u64) {
        (self.all.lock().len(), self.room.used.load(Ordering::Relaxed))
    }

    pub(super) fn room(&self) -> &Arc<Room> {
        &self.room
    }

    fn remove(&self, id: Id) {
        let stream = self.all.lock().remove(&id);
        // Without the lock: it may be the last of something.
        if let Some(stream) = stream {
            stream.recording.let_go();
        }
    }

    /// Lets go of what nobody reads, until no more than this is taken: first what has ended, then what still comes, of
    /// each what was left first.
    pub(super) fn shrink(&self, most: u64) {
        let mut gone = Vec::new();
        {
            let mut all = self.all.lock();
            let left = |(id, stream): (&Id, &Arc<Stream>)| {
                let recording = &stream.recording;
                Some((!recording.has_ended(), recording.left()?, *id))
            };
            let mut left: Vec<_> = all.iter().filter_map(left).collect();
            left.sort_unstable_by_key(|&(is_coming, left, _)| (is_coming, left));
            for (.., id) in left {
                if self.room.used.load(Ordering::Relaxed) <= most {
                    break;
                }
                if let Some(stream) = all.remove(&id) {
                    stream.recording.let_go();
                    gone.push(stream);
                }
            }
        }
        drop(gone);
    }
}

impl Resume {
    /// The body of one who reads the stream from its beginning, which from now on can be taken up again. The recording is
    /// [held](Recording::hold), and somebody reads it.
    pub(super) fn begin<B>(&self, id: Id, body: B, stream: impl FnOnce() -> Stream) -> Body
    where
        B: HttpBody<Data = Bytes, Error = BoxError> + Send + Unpin + 'static,
    {
        let streams = Arc::downgrade(&self.streams);
        let mut all = self.streams.all.lock();
        let is_known = match all.entry(id) {
            Entry::Occupied(stream) => stream.get().is_known.clone(),
            Entry::Vacant(place) => {
                let stream = place.insert(Arc::new(stream())).clone();
                let is_known = stream.is_known.clone();
                let mut tasks = self.streams.tasks.lock();
                while tasks.try_join_next().is_some() {}
                let copier = self.copies.clone().and_then(|copies| Copier::new(copies, id, self.after));
                tasks.spawn(keep(streams.clone(), id, stream, self.after, copier));
                is_known
            }
        };
        drop(all);
        let recorded = Recorded { streams, id, is_known };
        Body::new(Numbered { body, labels: Labels::new(id.hex()), recorded: Some(recorded), _asking: None })
    }

    /// The rest of a stream, after the last event that the client has had, if it `is` the client's.
    ///
    /// # Errors
    /// Why not.
    pub(super) fn take_up(
        &self,
        last: Last,
        is: impl FnOnce(&Whose) -> bool,
        purges: &Purges,
    ) -> Result<Response, Lost> {
        let stream = self.streams.all.lock().get(&last.id).cloned().ok_or(Lost::Unknown)?;
        if !is(&stream.whose) {
            return Err(Lost::Other);
        }
        if purges.standing(stream.footing.number, &stream.footing.names) == Standing::Gone {
            return Err(Lost::Unknown);
        }
        let (reader, numbering) = stream.recording.reader_after(last.event).ok_or(Lost::Gone)?;
        let body = Numbered {
            body: reader,
            labels: Labels::after(last.id.hex(), numbering, last.event),
            recorded: Some(Recorded {
                streams: Arc::downgrade(&self.streams),
                id: last.id,
                is_known: stream.is_known.clone(),
            }),
            _asking: stream.asking.clone(),
        };
        let mut response = Response::new(Body::new(body));
        *response.status_mut() = stream.status;
        *response.version_mut() = stream.version;
        *response.headers_mut() = stream.headers.clone();
        *response.extensions_mut() = stream.extensions.clone();
        Ok(response)
    }
}

/// Keeps a stream as long as it can be taken up, and copies it.
async fn keep(streams: Weak<Streams>, id: Id, stream: Arc<Stream>, after: Duration, mut copier: Option<Copier>) {
    let copying = async {
        if let Some(copier) = &mut copier {
            copier.run(&stream).await;
        }
        // What is copied is kept all the same.
        std::future::pending::<()>().await;
    };
    tokio::select! {
        () = hold(&streams, id, &stream, after) => {}
        () = copying => {}
    }
    if let Some(streams) = streams.upgrade() {
        streams.remove(id);
    }
    // It goes at once, whatever Redis does.
    drop(stream);
    if let Some(copier) = copier {
        copier.end().await;
    }
}

/// Holds a stream for as long as somebody reads it, and for this long after.
async fn hold(streams: &Weak<Streams>, id: Id, stream: &Stream, after: Duration) {
    while let Some(left) = stream.recording.deserted().await {
        // Without an id nobody can come again.
        if !stream.is_known.load(Ordering::Relaxed) {
            break;
        }
        if let Some(streams) = streams.upgrade().filter(|_| stream.recording.runs_for_nobody()) {
            for id in streams.left.add(id, &stream.owner, &stream.recording) {
                streams.remove(id);
            }
        }
        timeout_at(left + after, stream.recording.read_on()).await.ok();
        if stream.recording.expire(after) {
            break;
        }
    }
}

/// The memory that there is for the streams of a route.
#[derive(Debug)]
pub(super) struct Room {
    used: AtomicU64,
    most: AtomicU64,
    streams: Weak<Streams>,
}

impl Room {
    /// A part for one more stream.
    pub(super) fn share(self: &Arc<Self>) -> Share {
        self.used.fetch_add(OVERHEAD, Ordering::Relaxed);
        Share { room: self.clone(), bytes: OVERHEAD }
    }

    /// Makes room, some more than is lacking, so that the next to come does not have to. Whether there is some then.
    pub(super) fn make(&self) -> bool {
        let most = self.most.load(Ordering::Relaxed);
        if let Some(streams) = self.streams.upgrade() {
            streams.shrink(most - most / 16);
        }
        self.used.load(Ordering::Relaxed) <= most
    }
}

/// What a stream takes of a [`Room`].
pub(super) struct Share {
    room: Arc<Room>,
    bytes: u64,
}

impl Share {
    /// A frame has come.
    pub(super) fn grow(&mut self, len: usize) {
        let bytes = len as u64 + FRAME;
        self.bytes += bytes;
        self.room.used.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A frame is gone.
    pub(super) fn shrink(&mut self, len: usize) {
        let bytes = len as u64 + FRAME;
        self.bytes -= bytes;
        self.room.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// The room, where more is taken than there is.
    pub(super) fn crowded(&self) -> Option<Arc<Room>> {
        let is = self.room.used.load(Ordering::Relaxed) > self.room.most.load(Ordering::Relaxed);
        is.then(|| self.room.clone())
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

/// A stream whose events get ids.
struct Numbered<B> {
    body: B,
    labels: Labels,
    /// Where it can be taken up again: until it has ids of its own.
    recorded: Option<Recorded>,
    _asking: Option<Asking>,
}

/// Where a stream can be taken up again.
struct Recorded {
    streams: Weak<Streams>,
    id: Id,
    is_known: Arc<AtomicBool>,
}

/// A stream that was stored, with the ids that it had when it came.
pub(super) fn numbered(id: Id, body: Body) -> Body {
    Body::new(Numbered { body, labels: Labels::new(id.hex()), recorded: None, _asking: None })
}

/// The rest of a stream that was stored, where `numbering` has read up to the last event that the client has had.
pub(super) fn rest(last: Last, numbering: Numbering, body: Body) -> Body {
    let labels = Labels::after(last.id.hex(), numbering, last.event);
    Body::new(Numbered { body, labels, recorded: None, _asking: None })
}

impl<B: HttpBody<Data = Bytes, Error = BoxError> + Unpin> HttpBody for Numbered<B> {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut task::Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        loop {
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(end),
            };
            let data = match frame.into_data() {
                Ok(data) => this.labels.pass(data),
                Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
            };
            if let Some(recorded) = &this.recorded
                && this.labels.has_begun()
            {
                recorded.is_known.store(true, Ordering::Relaxed);
            }
            if this.labels.is_over()
                && let Some(Recorded { streams, id, .. }) = this.recorded.take()
                && let Some(streams) = streams.upgrade()
            {
                // Its own ids are the upstream's to make sense of.
                streams.remove(id);
            }
            // Of what the client has had, nothing.
            if !data.is_empty() {
                return Poll::Ready(Some(Ok(Frame::data(data))));
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}
