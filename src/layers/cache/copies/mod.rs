//! Copies in Redis of the streams that can be taken up again, so that another replica can give the rest.
//!
//! A client comes back to another replica than the one that it left for two reasons: a balancer before them that does not
//! know better, and a replica that is going, or gone. The second is the usual one, and decides the design: what is needed
//! has to be in Redis before anybody asks for it. Replicas that only told each other which streams they have, and handed
//! them over on demand, would write nothing while all is well, and have nothing when it is needed.
//!
//! So the replica that has a stream, its **owner**, copies it while it comes. There is no queue for that: the copier is a
//! cursor in the [recording](super::recording), which keeps the frames for this replica anyway, and takes together what came
//! since its last write. A client's frames never wait for it; a Redis that is slow, full or gone leaves the copy behind, and
//! it catches up as far as the recording reaches. Writes are some 20 ms apart, and further where there are thousands of
//! streams, so that all of them together stay below 20,000 a second. Of a stream that is longer than the section's
//! `redis.max_body` the last part is there.
//!
//! What is live is different: nobody but who has taken up a stream elsewhere wants each frame at once. The reader leaves a
//! mark beside the copy for as long as it reads; the owner then says on a channel when there is more, and the reader asks
//! there when it has read all. What the channel loses, a look every second finds. While somebody reads elsewhere, the owner
//! has a seat in the recording on its behalf: the stream goes on as if the client were here, and no faster than it reads.
//! One that is too far behind keeps the copy from going on, but for five seconds at most. Without a reader elsewhere nothing is told and nobody looks.
//!
//! **Ends.** A copy ends as its stream does, whole or broken; where an owner goes in order, it writes what it has, and that
//! the stream broke. Each owner leaves a sign of life in Redis. Where it is gone, a reader gives what there is and breaks
//! off, which tells a client the truth; one that has all of it already is told nothing, and the upstream is asked anew.
//! Without Redis, or where nothing is found, it is as on a replica alone that does not know the id.
//!
//! **Who.** As on the owner: the head of the copy says whose it is, and names and marks by which it may have been purged.
//! Everything is [`sealed`] with a key that follows from the stream's id, which Redis does not know: an answer that
//! nobody may store is not in the clear there, and nobody who can write there can make one up.
//!
//! **Bounds.** A copy lives as long as its stream is kept here, within `max_bytes` then; in Redis it has a time to live from
//! its first moment: `resume`, and a little more while it comes.
//!
//! In Redis: `resume:{NAME}:copy`, a hash (`head`, `to`, `end`, and the parts by where they begin), `resume:{NAME}:readers`,
//! `resume:{OWNER}:alive` and the channel `resume:{streams}:channel`. One script writes, one reads; all keys of each have
//! one tag, so that a cluster spreads the streams.

mod read;
mod sealed;
mod write;

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::Notify, task::JoinSet, time::sleep};

pub(super) use self::write::Copier;
use super::{headroom::Headroom, hub::clock, shared::Shared};
use crate::{
    store::{Failure, Heard, Key, Redis, Script, Subscription},
    telemetry::metrics::CacheMetrics,
};

static APPEND: Script = Script::new("cache_resume_append", include_str!("append.lua"));
static READ: Script = Script::new("cache_resume_read", include_str!("read.lua"));

/// How long the sign of life of an owner holds, and how long a reader is believed to read.
const LIVES: Duration = Duration::from_secs(3);
/// Between two of them, and between two looks where the channel says nothing.
const LOOK: Duration = Duration::from_secs(1);
/// What is taken together before it is written, at least.
const LINGER: Duration = Duration::from_millis(20);
/// How many copies a replica writes in a second.
const WRITES: u32 = 20_000;
/// At most in one value: Redis does nothing else meanwhile.
const PART: usize = 64 << 10;

/// All copies in one Redis that this process writes or reads.
pub(super) struct Copies {
    redis: Redis,
    headroom: Arc<Headroom>,
    /// Who this is among the replicas.
    id: u64,
    /// Who is told what is said on the channel, by what is said.
    ears: Mutex<HashMap<String, Vec<Weak<Notify>>>>,
    /// How many are being written.
    running: AtomicUsize,
    /// Told when there are some after there were none.
    begun: Arc<Notify>,
    /// When the last sign of life was given.
    alive: AtomicU64,
    /// The process ends.
    closing: AtomicBool,
    held: Mutex<Option<(Subscription, JoinSet<()>)>>,
}

impl fmt::Debug for Copies {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copies").field("redis", &self.redis).finish_non_exhaustive()
    }
}

impl Copies {
    pub(super) fn start(redis: &Redis, headroom: &Arc<Headroom>, id: u64) -> Arc<Self> {
        let copies = Arc::new(Self {
            redis: redis.clone(),
            headroom: headroom.clone(),
            id,
            ears: Mutex::default(),
            running: AtomicUsize::new(0),
            begun: Arc::default(),
            alive: AtomicU64::new(0),
            closing: AtomicBool::new(false),
            held: Mutex::default(),
        });
        let weak = Arc::downgrade(&copies);
        let subscription = redis.subscribe(&copies.channel(), move |heard| {
            if let (Some(copies), Heard::Message(message)) = (weak.upgrade(), heard) {
                copies.heard(message);
            }
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(live(Arc::downgrade(&copies), copies.begun.clone()));
        *copies.held.lock() = Some((subscription, tasks));
        copies
    }

    fn channel(&self) -> Key {
        self.redis.key("resume", "streams", "channel")
    }

    /// The keys of a copy: itself, and where its readers are.
    fn keys(&self, name: &str) -> [Key; 2] {
        ["copy", "readers"].map(|rest| self.redis.key("resume", name, rest))
    }

    fn heard(&self, message: &[u8]) {
        let Ok(message) = std::str::from_utf8(message) else { return };
        if let Some(ears) = self.ears.lock().get(message) {
            ears.iter().filter_map(Weak::upgrade).for_each(|ear| ear.notify_one());
        }
    }

    /// Listens for `message` until it is dropped.
    fn listen(self: &Arc<Self>, message: String) -> Ear {
        let heard = Arc::new(Notify::new());
        self.ears.lock().entry(message.clone()).or_default().push(Arc::downgrade(&heard));
        Ear { heard, message, copies: self.clone() }
    }

    /// How long the next write of a copy may wait for more.
    fn linger(&self) -> Duration {
        let running = u32::try_from(self.running.load(Ordering::Relaxed)).unwrap_or(u32::MAX);
        LINGER.max(Duration::from_secs(1) / WRITES * running).min(LOOK)
    }

    /// Gives a sign of life, unless there was one just now.
    async fn alive(&self) -> Result<(), Failure> {
        let last = self.alive.load(Ordering::Acquire);
        if last > 0 && Duration::from_millis(clock().saturating_sub(last)) < LOOK {
            return Ok(());
        }
        let at = clock();
        self.redis.set(&self.sign(self.id), b"1", LIVES).await?;
        self.alive.store(at, Ordering::Release);
        Ok(())
    }

    fn sign(&self, owner: u64) -> Key {
        self.redis.key("resume", &format!("{owner:016x}"), "alive")
    }

    /// Lets what is being written come to an end: what is there of it, and that it broke off.
    pub(super) fn close(&self) {
        self.closing.store(true, Ordering::Release);
        self.ears.lock().values().flatten().filter_map(Weak::upgrade).for_each(|ear| ear.notify_one());
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Whether any is being written.
    pub(super) fn has_work(&self) -> bool {
        self.running.load(Ordering::Acquire) > 0
    }
}

/// Gives signs of life while anything is being written.
async fn live(copies: Weak<Copies>, begun: Arc<Notify>) {
    while let Some(copies) = copies.upgrade() {
        if copies.has_work() {
            copies.alive().await.ok();
            drop(copies);
            sleep(LOOK / 4).await;
        } else {
            drop(copies);
            // Whoever begins gives one, too.
            begun.notified().await;
        }
    }
}

/// One who listens for something on the channel.
struct Ear {
    heard: Arc<Notify>,
    message: String,
    copies: Arc<Copies>,
}

impl Drop for Ear {
    fn drop(&mut self) {
        let mut ears = self.copies.ears.lock();
        if let Some(same) = ears.get_mut(&self.message) {
            same.retain(|ear| !std::ptr::eq(ear.as_ptr(), Arc::as_ptr(&self.heard)));
            if same.is_empty() {
                ears.remove(&self.message);
            }
        }
    }
}

/// The copies of a route's streams.
#[derive(Debug, Clone)]
pub(super) struct Of {
    pub(super) copies: Arc<Copies>,
    /// Where marks are.
    pub(super) shared: Shared,
    /// The most of a stream that is copied.
    pub(super) limit: usize,
    pub(super) metrics: CacheMetrics,
}

impl Of {
    /// How long a call to Redis takes at most.
    pub(super) fn deadline(&self) -> Duration {
        self.copies.redis.deadline()
    }
}

/// What owners tell readers: there is more of this stream.
fn news(name: &str) -> String {
    format!("+{name}")
}

/// What readers ask owners: is there more of this stream?
fn question(name: &str) -> String {
    format!("?{name}")
}
