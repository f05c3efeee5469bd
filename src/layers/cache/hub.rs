//! Purges of all replicas, and what is written to Redis behind the requests.
//!
//! A purge holds on this replica at once. Then it is marked in Redis, where [`marks`](super::marks) keep every replica
//! from what is stored there, and only then the others are told, who drop it from their memory: who asks Redis
//! after that finds the mark. As long as Redis does not take it, it stays here, and what it is about is not looked for in
//! Redis; where it has no room for marks, the others are told to do the same. Who may have missed that takes no word of
//! Redis for it that nothing was purged, until there has been room for something.
//!
//! A replica that does not hear the others knows that it does not ([`Hub::hears_since`]), and that of what it has from
//! before, something may have been purged.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, iter,
    sync::{
        Arc, OnceLock, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::{StreamExt, stream};
use parking_lot::Mutex;
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, mpsc},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};

use super::{
    Config,
    copies::Copies,
    headroom::Headroom,
    kept::Kept,
    marks,
    purge::{Names, Purges, Standing, Target},
    resume::Streams,
    shared::Write,
};
use crate::store::{Failure, Heard, Key, Redis, Script, Subscription};

static PURGE: Script = Script::new("cache_purge", include_str!("purge.lua"));
static LOOK: Script = Script::new("cache_look", include_str!("look.lua"));

/// The version of what replicas tell each other. Who hears another knows that something was purged, and not what.
const VERSION: u64 = 1;
/// The memory of purges that wait for Redis, in bytes. Where there are more, everything is purged there.
const UNSENT: usize = 2 << 20;
/// What one takes beside its name.
const OVERHEAD: usize = 128;
/// Purges in one step.
const BATCH: usize = 256;
/// Until the next try, where Redis does not take them.
const AGAIN: Duration = Duration::from_millis(100);
/// How long that lives which is written to see whether there is room.
const ROOM: Duration = Duration::from_secs(60);
/// Answers that wait to be written. What comes on top is not written.
const UNWRITTEN: usize = 256;
/// How many are written at once.
const AT_ONCE: usize = 16;

/// The caches of each route. There are several while a configuration gives way to another.
pub(super) type ByRoute = HashMap<String, Vec<Known>>;

/// The answers of a route under one configuration, of one upstream.
pub(super) type Known = ((Config, String), Weak<Kept>);

/// Where purges are asked for: here, and in each Redis that caches of this process use.
#[derive(Default)]
pub(super) struct Purger {
    pub(super) purges: Arc<Purges>,
    pub(super) kept: Mutex<ByRoute>,
    /// The streams that can be taken up again, by route. They live as long as a layer has them.
    pub(super) streams: Mutex<HashMap<String, Weak<Streams>>>,
    hubs: Mutex<Vec<Weak<Hub>>>,
    /// Whether there has been a cache whose answers are the same for any host.
    pub(super) any_host: AtomicBool,
}

impl Purger {
    /// Drops what `target` names, on all replicas. Does not wait.
    pub(super) fn purge(&self, target: &Target, soft: bool) {
        if self.any_host.load(Ordering::Relaxed)
            && let Some(target) = target.of_any_host()
        {
            self.purge_named(&target, soft);
        }
        self.purge_named(target, soft);
    }

    fn purge_named(&self, target: &Target, soft: bool) {
        let hubs: Vec<_> = self.hubs.lock().iter().filter_map(Weak::upgrade).collect();
        // Who looks in Redis asks under this lock what is still to be sent: nobody knows of the purge and not of that.
        let mut unsent: Vec<_> = hubs.iter().map(|hub| hub.unsent.lock()).collect();
        let number = self.here(target, soft);
        let what = Arc::new(What { target: target.clone(), soft });
        for unsent in &mut unsent {
            unsent.push(Unsent { number, what: what.clone(), told: false });
        }
        drop(unsent);
        for hub in &hubs {
            hub.wake.notify_one();
        }
    }

    /// The same for this replica alone. Which purge it was.
    fn here(&self, target: &Target, soft: bool) -> u64 {
        let number = self.purges.add(target, soft);
        if let (Target::All, false) = (target, soft) {
            let all: Vec<_> = self.kept.lock().values().flatten().filter_map(|(_, kept)| kept.upgrade()).collect();
            for kept in &all {
                kept.clear();
            }
            let all: Vec<_> = self.streams.lock().values().filter_map(Weak::upgrade).collect();
            for streams in &all {
                streams.shrink(0);
            }
        }
        number
    }

    /// What there is of this Redis, for all who use it.
    pub(super) fn hub(self: &Arc<Self>, redis: &Redis) -> Arc<Hub> {
        let mut hubs = self.hubs.lock();
        hubs.retain(|hub| hub.strong_count() > 0);
        if let Some(hub) = hubs.iter().filter_map(Weak::upgrade).find(|hub| hub.redis.is_same(redis)) {
            return hub;
        }
        let hub = Hub::start(redis, self);
        hubs.push(Arc::downgrade(&hub));
        hub
    }

    /// Waits until others have been told of all purges, and all is written, for as long as `patience`. Streams that are being
    /// copied end.
    pub(super) async fn finish(&self, patience: Duration) {
        let hubs: Vec<_> = self.hubs.lock().iter().filter_map(Weak::upgrade).collect();
        for copies in hubs.iter().filter_map(|hub| hub.copies.get()) {
            copies.close();
        }
        let all = async {
            for hub in &hubs {
                while hub.redis.is_up() && hub.has_work() {
                    sleep(Duration::from_millis(5)).await;
                }
            }
        };
        if timeout(patience, all).await.is_err() {
            debug!("not all that was purged or stored was told redis in time");
        }
    }
}

/// One Redis, and what goes on between it and all caches of the process.
pub(super) struct Hub {
    pub(super) redis: Redis,
    pub(super) purges: Arc<Purges>,
    /// Who this is among the replicas.
    id: u64,
    unsent: Mutex<Queue>,
    wake: Arc<Notify>,
    /// Tells those who wait for it that something was sent, or could not be.
    sent: Notify,
    /// The last of it could not be.
    is_stuck: AtomicBool,
    /// Since when all others are heard; never, if they are not.
    hears: AtomicU64,
    /// How far the clock of Redis is ahead of [`clock`]; 0 as long as nobody has asked.
    ahead: AtomicU64,
    /// When Redis was last seen to have room, by [`clock`].
    room: AtomicU64,
    /// For answers and copies of streams.
    headroom: Arc<Headroom>,
    writes: mpsc::Sender<Write>,
    globs: Mutex<Globs>,
    /// Of streams, where there are any that can be taken up again.
    copies: OnceLock<Arc<Copies>>,
    held: Mutex<Option<(Subscription, JoinSet<()>)>>,
}

/// The last pattern, and the list of patterns that it is the first of.
type Globs = (Box<[u8]>, Arc<[Vec<u8>]>);

/// A purge that Redis does not know of yet.
#[derive(Clone)]
struct Unsent {
    number: u64,
    what: Arc<What>,
    /// The others know of it, and that it is still to be marked.
    told: bool,
}

/// What is purged, and how.
#[derive(PartialEq, Eq, Hash)]
struct What {
    target: Target,
    soft: bool,
}

impl What {
    fn weight(&self) -> usize {
        OVERHEAD
            + match &self.target {
                Target::Url(name) | Target::Tag(name) => name.len(),
                Target::Glob(glob) => glob.to_string().len(),
                Target::All => 0,
            }
    }
}

/// Purges that wait, by their numbers: each of its own kind, as one mark is as good as two.
#[derive(Default)]
struct Queue {
    purges: BTreeMap<u64, (Arc<What>, bool)>,
    numbers: HashMap<Arc<What>, u64>,
    /// All names together.
    weight: usize,
    /// The first of those that were too many.
    first: Option<u64>,
}

impl Queue {
    fn push(&mut self, Unsent { number, what, mut told }: Unsent) {
        if let Some((_, was_told)) = self.numbers.get(&what).copied().and_then(|same| self.take(same)) {
            told &= was_told;
        }
        self.put(number, what, told);
        if self.weight > UNSENT {
            self.first = self.first.or(self.purges.keys().next().copied());
            (self.purges, self.numbers, self.weight) = Default::default();
            self.put(number, Arc::new(What { target: Target::All, soft: false }), false);
        }
    }

    fn put(&mut self, number: u64, what: Arc<What>, told: bool) {
        self.weight += what.weight();
        self.numbers.insert(what.clone(), number);
        self.purges.insert(number, (what, told));
    }

    fn take(&mut self, number: u64) -> Option<(Arc<What>, bool)> {
        let (what, told) = self.purges.remove(&number)?;
        self.weight -= what.weight();
        self.numbers.remove(&what);
        Some((what, told))
    }

    /// The first of them.
    fn batch(&self) -> Vec<Unsent> {
        let all = self.purges.iter().take(BATCH);
        all.map(|(&number, (what, told))| Unsent { number, what: what.clone(), told: *told }).collect()
    }

    /// The others know of these, up to this one.
    fn told(&mut self, last: u64) {
        self.purges.range_mut(..=last).for_each(|(_, (_, told))| *told = true);
    }

    /// The last purge before those.
    fn before(&self) -> Option<u64> {
        self.first.or(self.purges.keys().next().copied()).map(|first| first - 1)
    }

    /// Those up to this one were sent.
    fn sent(&mut self, last: u64) {
        while let Some((&first, _)) = self.purges.first_key_value().filter(|(first, _)| **first <= last) {
            self.take(first);
        }
        if self.purges.is_empty() {
            self.first = None;
        }
    }
}

impl fmt::Debug for Hub {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hub").field("redis", &self.redis).finish_non_exhaustive()
    }
}

/// Milliseconds of this process.
pub(super) fn clock() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let start = START.get_or_init(Instant::now);
    // From 1: 0 is for what never was.
    u64::try_from(Instant::now().saturating_duration_since(*start).as_millis()).unwrap_or(u64::MAX).saturating_add(1)
}

impl Hub {
    fn start(redis: &Redis, of: &Arc<Purger>) -> Arc<Self> {
        let (writes, written) = mpsc::channel(UNWRITTEN);
        let hub = Arc::new(Self {
            redis: redis.clone(),
            purges: of.purges.clone(),
            id: unique(),
            unsent: Mutex::default(),
            wake: Arc::default(),
            sent: Notify::new(),
            is_stuck: AtomicBool::new(false),
            hears: AtomicU64::new(u64::MAX),
            ahead: AtomicU64::new(0),
            room: AtomicU64::new(0),
            headroom: Arc::new(Headroom::new()),
            writes,
            globs: Mutex::new((Box::default(), Arc::default())),
            copies: OnceLock::new(),
            held: Mutex::default(),
        });
        // They end with the hub, which is there before they begin.
        let mut tasks = JoinSet::new();
        tasks.spawn(send(Arc::downgrade(&hub), hub.wake.clone()));
        tasks.spawn(write(redis.clone(), hub.headroom.clone(), written));
        let (of, weak) = (Arc::downgrade(of), Arc::downgrade(&hub));
        let subscription = redis.subscribe(&channel(redis), move |heard| {
            if let (Some(hub), Some(of)) = (weak.upgrade(), of.upgrade()) {
                match heard {
                    Heard::Everything => hub.hears.store(clock(), Ordering::Release),
                    Heard::Nothing => hub.hears.store(u64::MAX, Ordering::Release),
                    Heard::Message(message) => hub.heard(message, &of),
                }
            }
        });
        *hub.held.lock() = Some((subscription, tasks));
        hub
    }

    /// Since when, by [`clock`], this replica hears of every purge of the others; never, where it does not.
    pub(super) fn hears_since(&self) -> Option<u64> {
        Some(self.hears.load(Ordering::Acquire)).filter(|since| *since != u64::MAX)
    }

    /// Waits until Redis knows of all purges of these names that this replica knows of: as long as a call takes.
    ///
    /// # Errors
    /// It does not take them.
    pub(super) async fn told(&self, names: &Names) -> Result<(), Failure> {
        loop {
            let sent = self.sent.notified();
            let before = self.unsent.lock().before();
            if before.is_none_or(|before| self.purges.standing(before, names) == Standing::Valid) {
                return Ok(());
            }
            if self.is_stuck.load(Ordering::Acquire) || !self.redis.is_up() {
                return Err(Failure::Unavailable);
            }
            sent.await;
        }
    }

    /// Leaves an answer to be written. Whether there is room for it.
    pub(super) fn write(&self, write: Write) -> bool {
        self.redis.is_up() && self.writes.try_send(write).is_ok()
    }

    /// The copies of streams in this Redis.
    pub(super) fn copies(&self) -> &Arc<Copies> {
        self.copies.get_or_init(|| Copies::start(&self.redis, &self.headroom, self.id))
    }

    fn has_work(&self) -> bool {
        self.writes.capacity() < UNWRITTEN
            || !self.unsent.lock().purges.is_empty()
            || self.copies.get().is_some_and(|copies| copies.has_work())
    }

    /// The name of a mark.
    pub(super) fn mark(&self, place: &str) -> Key {
        // One tag for all: one step purges several, and one read has all of an answer.
        self.redis.key("cache", "purges", place)
    }

    /// What is at these names, on one node, and what time it is there, in milliseconds since the epoch.
    ///
    /// # Errors
    /// Also where Redis is full, and this replica may have missed of what others purged that it could not be marked.
    pub(super) async fn look(&self, names: &[Key]) -> Result<(u64, Vec<Option<Vec<u8>>>), Failure> {
        let at = clock();
        // Where there was room since it hears the others, what was missed before is marked, or will be in a moment, and heard.
        let has_room = self.hears_since().is_some_and(|since| self.room.load(Ordering::Relaxed) > since);
        let lives = if has_room { Duration::ZERO } else { ROOM };
        let keys: Vec<_> = iter::once(self.mark("room")).chain(names.iter().cloned()).collect();
        let (time, found): (u64, _) = self.redis.run(&LOOK, &keys, lives.as_millis().to_string()).await?;
        if !has_room {
            self.room.fetch_max(at, Ordering::Relaxed);
        }
        // As if it had been read only now: what is dated by it is older than it is by what the call took, and not younger.
        self.ahead.store(time.saturating_sub(clock()), Ordering::Relaxed);
        Ok((time, found))
    }

    /// What time it is at Redis, as far as is known from the last look.
    pub(super) fn time(&self) -> Option<u64> {
        let ahead = Some(self.ahead.load(Ordering::Relaxed)).filter(|ahead| *ahead > 0);
        ahead.map(|ahead| ahead.saturating_add(clock()))
    }

    /// The list of patterns, of which the first is, or was a moment ago, `newest`.
    pub(super) async fn globs(&self, newest: &[u8]) -> Result<Arc<[Vec<u8>]>, Failure> {
        let known = self.globs.lock().clone();
        if *known.0 == *newest {
            return Ok(known.1);
        }
        let list: Arc<[Vec<u8>]> = self.redis.list(&self.mark("patterns")).await?.into();
        let first = list.first().and_then(|line| line.split(|&byte| byte == b':').next()).unwrap_or_default();
        *self.globs.lock() = (first.into(), list.clone());
        Ok(list)
    }

    /// Sends some of what is still to be sent. Whether there was any.
    async fn send(&self) -> Result<bool, Failure> {
        let outcome = self.try_send().await;
        self.is_stuck.store(outcome.is_err(), Ordering::Release);
        self.sent.notify_waiters();
        outcome
    }

    async fn try_send(&self) -> Result<bool, Failure> {
        let purges = self.unsent.lock().batch();
        let Some(last) = purges.last().map(|last| last.number) else { return Ok(false) };

        let mut keys = vec![self.mark(marks::OF_GLOBS), self.mark("patterns")];
        let (mut globs, mut numbers) = (Vec::new(), Vec::new());
        for What { target, soft } in purges.iter().map(|purge| &*purge.what) {
            let number = unique();
            if let Target::Glob(glob) = target {
                globs.extend([format!("{number:x}"), marks::line(number, glob, *soft)]);
            } else if let Some(place) = marks::place(target) {
                keys.push(self.mark(&place));
                numbers.extend([format!("{number:x}"), u8::from(*soft).to_string()]);
            }
        }
        let mut args = vec![
            marks::LIVES.as_millis().to_string(),
            marks::GLOBS.to_string(),
            marks::NO_GLOB.to_owned(),
            channel(&self.redis).as_str().to_owned(),
            self.message(&purges, false),
            (globs.len() / 2).to_string(),
        ];
        args.extend(globs);
        args.extend(numbers);
        match self.redis.run::<i64>(&PURGE, &keys, &args[..]).await {
            Ok(told) => {
                if told < 0 {
                    warn!("the redis user may not publish: other replicas keep for a second what was purged here");
                }
                self.unsent.lock().sent(last);
                Ok(true)
            }
            Err(Failure::Full) => {
                // Without marks. The others drop what they have, and do not look for it in Redis until it has them.
                let untold: Vec<_> = purges.into_iter().filter(|purge| !purge.told).collect();
                if !untold.is_empty() {
                    let message = self.message(&untold, true);
                    self.redis.publish(&channel(&self.redis), message.as_bytes()).await?;
                    self.unsent.lock().told(last);
                }
                Err(Failure::Full)
            }
            Err(failure) => Err(failure),
        }
    }

    fn message(&self, purges: &[Unsent], unmarked: bool) -> String {
        let all = purges.iter().map(|purge| {
            let (kind, name) = match &purge.what.target {
                Target::Url(url) => ("url", url.to_string()),
                Target::Tag(tag) => ("tag", tag.to_string()),
                Target::Glob(glob) => ("glob", glob.to_string()),
                Target::All => ("all", String::new()),
            };
            json!([kind, name, purge.what.soft])
        });
        json!({ "version": VERSION, "from": self.id, "unmarked": unmarked, "purges": all.collect::<Vec<_>>() })
            .to_string()
    }

    /// Another replica has purged something.
    fn heard(&self, message: &[u8], of: &Purger) {
        let message: Value = serde_json::from_slice(message).unwrap_or_default();
        if message["from"].as_u64() == Some(self.id) {
            return;
        }
        let purge = |purge: &Value| {
            let name = purge[1].as_str()?;
            let target = match purge[0].as_str()? {
                "url" => Target::Url(name.into()),
                "tag" => Target::Tag(name.into()),
                "glob" => Target::Glob(name.parse().ok()?),
                "all" => Target::All,
                _ => return None,
            };
            Some((target, purge[2].as_bool()?))
        };
        let purges = message["purges"].as_array().filter(|_| message["version"] == VERSION);
        let purges = purges.and_then(|purges| purges.iter().map(purge).collect::<Option<Vec<_>>>());
        let Some(purges) = purges else {
            // As if it had not been heard: what there is now is held against the marks before it is used again.
            self.hears.fetch_max(clock(), Ordering::AcqRel);
            return;
        };
        for (target, soft) in &purges {
            if message["unmarked"] == true {
                let mut unsent = self.unsent.lock();
                let number = of.here(target, *soft);
                let what = Arc::new(What { target: target.clone(), soft: *soft });
                unsent.push(Unsent { number, what, told: true });
            } else {
                of.here(target, *soft);
            }
        }
        self.wake.notify_one();
    }
}

fn channel(redis: &Redis) -> Key {
    redis.key("cache", "purges", "channel")
}

/// A number that nobody else has.
fn unique() -> u64 {
    // 122 of its bits are by chance.
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    high ^ low
}

/// Tells Redis of purges, in their order.
async fn send(hub: Weak<Hub>, wake: Arc<Notify>) {
    loop {
        let Some(outcome) = (match hub.upgrade() {
            Some(hub) => Some(hub.send().await),
            None => None,
        }) else {
            return;
        };
        match outcome {
            Ok(true) => {}
            Ok(false) => wake.notified().await,
            Err(_) => sleep(AGAIN).await,
        }
    }
}

/// Writes what is left to be written, as far as there is room for it.
async fn write(redis: Redis, headroom: Arc<Headroom>, writes: mpsc::Receiver<Write>) {
    let (redis, headroom) = (&redis, &*headroom);
    let all = stream::unfold(writes, async |mut writes| {
        let write = writes.recv().await?;
        // What is taken out makes room.
        let size = write.size();
        let has_room = size == 0 || headroom.has(redis, size).await;
        Some(((write, has_room), writes))
    });
    let each = async |(write, has_room): (Write, bool)| {
        if has_room { write.run(redis, headroom).await } else { write.drop() }
    };
    all.for_each_concurrent(AT_ONCE, each).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn purge(number: u64) -> Unsent {
        named(number, &number.to_string())
    }

    fn named(number: u64, tag: &str) -> Unsent {
        Unsent { number, what: Arc::new(What { target: Target::Tag(tag.into()), soft: true }), told: true }
    }

    #[test]
    fn what_is_not_sent_yet_is_known_from_the_first_of_it_on() {
        let mut queue = Queue::default();
        assert_eq!(queue.before(), None);
        for number in [3, 4, 7] {
            queue.push(purge(number));
        }
        assert_eq!(queue.before(), Some(2));
        queue.sent(4);
        assert_eq!(queue.before(), Some(6));
        queue.sent(9);
        assert_eq!(queue.before(), None);
    }

    #[test]
    fn too_many_purges_purge_everything_and_hold_until_that_is_sent() {
        let mut queue = Queue::default();
        // As long as what a client may ask for.
        let long = "x".repeat(15_000);
        let mut sending = 0;
        while queue.purges.len() as u64 == sending {
            sending += 1;
            assert!(queue.weight <= UNSENT);
            queue.push(named(sending, &format!("{sending}{long}")));
        }
        assert!(sending < 200, "{sending}");
        let (number, (all, told)) = queue.purges.first_key_value().unwrap();
        assert!((*number, &all.target, all.soft, *told) == (sending, &Target::All, false, false));
        sending -= 1;
        queue.sent(sending);
        assert_eq!(queue.before(), Some(0), "those that were too many are not sent before it is");
        queue.push(purge(sending + 2));
        queue.sent(sending + 2);
        assert_eq!((queue.before(), queue.weight, queue.numbers.len()), (None, 0, 0));
    }

    #[test]
    fn what_waits_already_waits_once_and_is_sent_after_the_last_time_that_it_was_purged() {
        let mut queue = Queue::default();
        for number in 1..1000 {
            queue.push(named(number, if number % 2 == 0 { "even" } else { "odd" }));
        }
        assert_eq!((queue.purges.len(), queue.before()), (2, Some(997)));
        queue.push(Unsent { told: false, ..named(1000, "odd") });
        queue.push(named(1001, "odd"));
        let batch = queue.batch();
        assert_eq!(
            batch.iter().map(|purge| (purge.number, purge.told)).collect::<Vec<_>>(),
            [(998, true), (1001, false)]
        );
        // Purged once more while it is sent: what was stored in between is older than that.
        queue.push(named(1002, "odd"));
        queue.sent(1001);
        assert_eq!(queue.before(), Some(1001));
    }
}
