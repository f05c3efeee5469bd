//! Where limits count: in Redis for all replicas in one step, in memory for this one.
//!
//! A request costs one round trip, whatever the number of its rules. Where Redis refused a request, that is remembered
//! here for as long as nothing can have changed, at most a second, so that a flood of refused requests does not reach
//! it. What is known only at the end (bytes, tokens, that a request is over) goes there behind the requests, in the
//! order in which it happened, by a task that also renews the leases of what is in flight and says every few seconds
//! that this replica lives. How many do is known from that, and remembered while Redis is out of order.

use std::{
    collections::{HashMap, HashSet},
    fmt, iter, mem,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::join_all;
use parking_lot::Mutex;
use tokio::{
    sync::{mpsc, watch},
    task::JoinSet,
    time::{Instant, sleep_until, timeout},
};

use tracing::debug;

use super::window::{self, Algorithm, Counter, Decision, Demand, Quota, Verdict, amount, as_micros, whole};
use crate::store::{
    Failure, Key, Redis, Script,
    memory::{Bounds, Held, Memory, Weigh},
};

static TAKE: Script = Script::new("rate_limit", include_str!("script.lua"));
static SETTLE: Script = Script::new("rate_limit_settle", include_str!("settle.lua"));
static RENEW: Script = Script::new("rate_limit_renew", include_str!("renew.lua"));
static REPLICAS: Script = Script::new("rate_limit_replicas", include_str!("replicas.lua"));

/// How much is counted in memory: beyond it, what would end first is forgotten first. About 200 bytes each.
const BOUNDS: Bounds = Bounds { entries: 1 << 18, bytes: 64 << 20 };
/// Refusals that are remembered.
const REFUSED: Bounds = Bounds { entries: 1 << 16, bytes: 16 << 20 };
/// The longest that a refusal holds without another look: an operator may have reset the counter, or raised the limit.
const LOOK_AGAIN: Duration = Duration::from_secs(1);
/// How often a replica says that it lives.
const ALIVE: Duration = Duration::from_secs(5);
/// How long it counts without having said so.
const MISSED: Duration = Duration::from_secs(15);
/// Until the next try, where Redis is out of order.
const AGAIN: Duration = Duration::from_millis(500);
/// What may wait to be settled. What comes on top is lost, and with it the room that it would have given back.
const UNSETTLED: usize = 1 << 14;
/// How many are settled at once.
const AT_ONCE: usize = 64;
/// Leases renewed in one step.
const RENEWED: usize = 256;

impl Weigh for Counter {
    fn weight(&self) -> usize {
        size_of::<Self>()
    }
}

/// One limit that a request is held against.
#[derive(Debug, Clone)]
pub struct Asked {
    /// Its counter.
    pub key: Key,
    /// What is asked of it.
    pub demand: Demand,
    /// Whether what is taken will be settled: a request that ends before it is known what was taken must not keep it.
    pub settles: bool,
}

/// What all limits answered.
#[derive(Debug, Clone)]
pub struct Answer {
    /// What they say.
    pub decision: Decision,
    /// The limits as they were asked.
    demands: Vec<Demand>,
    /// Of each that is in flight in Redis; else 0.
    leases: Vec<u64>,
    /// When, by the clock of who answered.
    at: f64,
    origin: Origin,
}

/// Something that was used of a limit, and may turn out to be more or less.
#[derive(Debug, Clone)]
pub struct Taken {
    key: Key,
    quota: Quota,
    amount: f64,
    at: f64,
    lease: u64,
    origin: Origin,
}

/// Where a decision was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Shared,
    Local,
}

/// A refusal that was remembered.
#[derive(Debug, Clone, Copy)]
struct Refused {
    /// What was asked: who asks for less, or of another limit with the same counter, may pass.
    cost: f64,
    quota: Quota,
    until: Instant,
    reset: Duration,
    at: Instant,
}

impl Weigh for Refused {
    fn weight(&self) -> usize {
        size_of::<Self>()
    }
}

/// All counters of the process. They outlive a configuration.
pub struct State {
    local: Arc<Local>,
    shared: Mutex<Weak<Shared>>,
    /// What this process is called among the replicas.
    replica: u64,
    /// Each ends when nobody counts in its Redis any more, or at the end.
    tasks: Mutex<JoinSet<()>>,
    end: watch::Sender<bool>,
}

struct Local {
    counters: Memory<Key, Counter>,
    epoch: Instant,
}

struct Shared {
    redis: Redis,
    refused: Memory<Key, Refused>,
    replicas: AtomicU32,
    leases: Mutex<HashMap<Key, Leases>>,
    unsettled: mpsc::Sender<Unsettled>,
}

/// Those that this replica has of one counter.
#[derive(Default)]
struct Leases {
    per: f64,
    held: HashSet<u64>,
    /// Those that have ended, and are still to be taken out: the next request with the same counter does that before it
    /// looks, so that nobody is refused for what itself has just ended.
    ended: Vec<u64>,
}

/// What is still to be done behind a request.
enum Unsettled {
    /// Something was taken, and this much more or less of it was used.
    Taken(Taken, f64),
    /// Whether it was is not known yet, and nobody waits for that any more.
    Taking(Vec<Asked>, Taking),
}

type Taking = Pin<Box<dyn Future<Output = Result<Answer, Failure>> + Send>>;

/// A call whose request may end before it is answered. Then what it took is given back.
struct Pending {
    asked: Vec<Asked>,
    taking: Option<Taking>,
    unsettled: mpsc::Sender<Unsettled>,
}

impl Future for Pending {
    type Output = Result<Answer, Failure>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(taking) = self.taking.as_mut() else { return Poll::Pending };
        let answer = ready!(taking.as_mut().poll(cx));
        self.taking = None;
        Poll::Ready(answer)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if let Some(taking) = self.taking.take() {
            later(&self.unsettled, Unsettled::Taking(mem::take(&mut self.asked), taking));
        }
    }
}

/// Leaves something to be done behind the requests.
fn later(unsettled: &mpsc::Sender<Unsettled>, what: Unsettled) {
    // Full only where Redis has not answered for long, and is not asked then.
    if unsettled.try_send(what).is_err() {
        debug!("a rate limit was not settled");
    }
}

impl Default for State {
    fn default() -> Self {
        let local = Local { counters: Memory::new(BOUNDS), epoch: Instant::now() };
        Self {
            local: Arc::new(local),
            shared: Mutex::default(),
            replica: unique(),
            tasks: Mutex::default(),
            end: watch::Sender::new(false),
        }
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").finish_non_exhaustive()
    }
}

impl State {
    /// The counters in `redis`, and in memory without one. With a Redis it needs a tokio runtime.
    pub fn counters(&self, redis: Option<&Redis>) -> Counters {
        let shared = redis.map(|redis| {
            let mut known = self.shared.lock();
            if let Some(known) = known.upgrade().filter(|known| known.redis.is_same(redis)) {
                return known;
            }
            let (unsettled, left) = mpsc::channel(UNSETTLED);
            let shared = Arc::new(Shared {
                redis: redis.clone(),
                refused: Memory::new(REFUSED),
                replicas: AtomicU32::new(1),
                leases: Mutex::default(),
                unsettled,
            });
            *known = Arc::downgrade(&shared);
            let mut tasks = self.tasks.lock();
            while tasks.try_join_next().is_some() {}
            let keeper = Keeper {
                redis: redis.clone(),
                id: self.replica,
                shared: Arc::downgrade(&shared),
                connects: AtomicU64::default(),
            };
            tasks.spawn(keeper.run(left, self.end.subscribe()));
            shared
        });
        Counters { local: self.local.clone(), shared }
    }

    /// Waits until everything is settled, for as long as `patience`. For the end of the process: what is taken after it
    /// is not settled.
    pub async fn finish(&self, patience: Duration) {
        self.end.send_replace(true);
        let mut tasks = std::mem::take(&mut *self.tasks.lock());
        let all = async { while tasks.join_next().await.is_some() {} };
        if timeout(patience, all).await.is_err() {
            debug!("rate limits were not all settled in time");
        }
    }
}

/// Where the limits of a route count.
#[derive(Clone)]
pub struct Counters {
    local: Arc<Local>,
    shared: Option<Arc<Shared>>,
}

impl fmt::Debug for Counters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Counters").field("shared", &self.shared.is_some()).finish_non_exhaustive()
    }
}

impl Counters {
    /// What was refused lately, and cannot have become possible since: then nobody needs to be asked. Of the others nothing
    /// is known.
    pub fn refused(&self, asked: &[Asked]) -> Option<Vec<Option<Verdict>>> {
        let shared = self.shared.as_ref().filter(|shared| !shared.refused.is_empty())?;
        let now = Instant::now();
        let known = |Asked { key, demand, .. }: &Asked| {
            let known = if demand.shadow { None } else { shared.refused.get(key, now) };
            known.filter(|known| known.cost.total_cmp(&demand.cost).is_eq() && known.quota == demand.quota)
        };
        let known: Vec<_> = asked.iter().map(known).collect();
        if known.iter().all(Option::is_none) {
            return None;
        }
        let verdict = |known: Refused| Verdict {
            fits: false,
            remaining: 0,
            reset: known.reset.saturating_sub(now.duration_since(known.at)),
            wait: Some(known.until.duration_since(now)),
        };
        Some(known.into_iter().map(|known| known.map(verdict)).collect())
    }

    /// Asks all limits in one step, in Redis where there is one.
    ///
    /// # Errors
    /// What kept Redis from answering. Nobody was asked then, or it is not known.
    pub async fn take(&self, asked: &[Asked]) -> Result<Answer, Failure> {
        let Some(shared) = &self.shared else { return Ok(self.take_locally(asked, 1)) };
        if asked.iter().all(|one| !one.settles) {
            return shared.take(asked).await;
        }
        let (asked, unsettled) = (asked.to_vec(), shared.unsettled.clone());
        let (shared, all) = (shared.clone(), asked.clone());
        let taking: Taking = Box::pin(async move { shared.take(&all).await });
        Pending { asked, taking: Some(taking), unsettled }.await
    }

    /// Asks all limits in one step, in memory, each for the part of it that one of `replicas` has.
    #[must_use]
    pub fn take_locally(&self, asked: &[Asked], replicas: u32) -> Answer {
        let now = Instant::now();
        let at = self.local.micros(now);
        let keys: Vec<Key> = asked.iter().map(|one| one.key.clone()).collect();
        let demands: Vec<Demand> = asked
            .iter()
            .map(|one| {
                let quota = one.demand.quota.share(replicas);
                Demand { quota, cost: one.demand.cost.min(quota.most()), ..one.demand }
            })
            .collect();
        let decision = self.local.counters.entries(&keys, now, |held| {
            let mut counters: Vec<_> = held.iter().map(|held| held.value).collect();
            let decision = window::take(&mut counters, &demands, at);
            for ((held, counter), demand) in held.iter_mut().zip(counters).zip(&demands) {
                *held = Local::held(&demand.quota, counter, at, now);
            }
            decision
        });
        Answer { decision, demands, leases: Vec::new(), at, origin: Origin::Local }
    }

    /// How many replicas there are, this one among them.
    #[must_use]
    pub fn replicas(&self) -> u32 {
        self.shared.as_ref().map_or(1, |shared| shared.replicas.load(Ordering::Relaxed).max(1))
    }

    /// Changes what was taken to what was used. Does not wait.
    pub fn settle(&self, taken: Taken, used: f64) {
        let change = used - taken.amount;
        match (&self.shared, taken.origin) {
            (Some(shared), Origin::Shared) => {
                if taken.lease != 0 {
                    shared.let_go(&taken);
                }
                if change < 0.0 {
                    shared.refused.remove(&taken.key, Instant::now());
                }
                if change != 0.0 {
                    later(&shared.unsettled, Unsettled::Taken(taken, change));
                }
            }
            _ if change == 0.0 => {}
            _ => self.local.settle(&taken, change),
        }
    }

    /// What the limit `quota` at `key` says: in Redis, if it answers, and in memory.
    pub async fn look(&self, key: &Key, quota: Quota) -> (Option<Verdict>, Verdict) {
        let now = Instant::now();
        let local = quota.look(self.local.counters.get(key, now), self.local.micros(now));
        if self.shared.is_none() {
            return (None, local);
        }
        // A shadow of nothing: it takes nothing, and says what there is.
        let cost = if quota.algorithm == Algorithm::InFlight { quota.limit + 1.0 } else { 0.0 };
        let asked = Asked { key: key.clone(), demand: Demand { quota, cost, shadow: true }, settles: false };
        let answer = self.take(&[asked]).await.ok();
        (answer.and_then(|answer| answer.decision.verdicts.first().copied()), local)
    }

    /// Forgets what was counted at `key`, in memory and in Redis.
    ///
    /// # Errors
    /// What kept Redis from it.
    pub async fn reset(&self, key: &Key) -> Result<(), Failure> {
        let now = Instant::now();
        self.local.counters.remove(key, now);
        let Some(shared) = &self.shared else { return Ok(()) };
        shared.refused.remove(key, now);
        shared.redis.delete(key).await.map(drop)
    }
}

impl Answer {
    /// When it was answered, in microseconds by the clock of who did.
    #[must_use]
    pub fn at(&self) -> f64 {
        self.at
    }

    /// What was taken of the limit at `place` of those `asked`, if anything.
    #[must_use]
    pub fn taken(&self, asked: &[Asked], place: usize) -> Option<Taken> {
        let (asked, demand) = (asked.get(place)?, self.demands.get(place)?);
        let fits = self.decision.passes && self.decision.verdicts.get(place)?.fits;
        let lease = self.leases.get(place).copied().unwrap_or_default();
        let Demand { quota, cost, .. } = *demand;
        fits.then(|| Taken { key: asked.key.clone(), quota, amount: cost, at: self.at, lease, origin: self.origin })
    }
}

const fn code(algorithm: Algorithm) -> u8 {
    match algorithm {
        Algorithm::SlidingWindow => 0,
        Algorithm::TokenBucket => 1,
        Algorithm::InFlight => 2,
    }
}

/// A number that nobody else has. Not 0.
fn unique() -> u64 {
    // 122 of its bits are by chance.
    let (high, low) = uuid::Uuid::new_v4().as_u64_pair();
    ((high ^ low) >> 12).max(1)
}

impl Local {
    /// As windows count: aligned to the start of the process.
    fn micros(&self, now: Instant) -> f64 {
        as_micros(now.duration_since(self.epoch))
    }

    fn held(quota: &Quota, counter: Option<Counter>, micros: f64, now: Instant) -> Held<Counter> {
        let lives = counter.map_or(0.0, |counter| quota.lives(counter, micros).max(0.0));
        Held { value: counter, expires: now + window::micros(lives.ceil()) }
    }

    fn settle(&self, taken: &Taken, change: f64) {
        let now = Instant::now();
        let micros = self.micros(now);
        self.counters.entry(&taken.key, now, |held| {
            let counter = taken.quota.settle(held.value, change, taken.at, micros);
            *held = Self::held(&taken.quota, Some(counter), micros, now);
        });
    }
}

impl Shared {
    /// Asks all limits in one step.
    async fn take(&self, asked: &[Asked]) -> Result<Answer, Failure> {
        let lease = |one: &Asked| if one.demand.quota.algorithm == Algorithm::InFlight { unique() } else { 0 };
        let leases: Vec<u64> = asked.iter().map(lease).collect();
        let mut args: Vec<u64> = Vec::with_capacity(asked.len() * 7);
        for Asked { demand: Demand { quota, cost, shadow }, .. } in asked {
            let Quota { algorithm, limit, per, burst } = *quota;
            args.extend([
                code(algorithm).into(),
                whole(*cost),
                whole(limit),
                whole(per),
                whole(burst),
                u64::from(*shadow),
            ]);
        }
        let mut ended = Vec::new();
        for (one, lease) in asked.iter().zip(&leases) {
            if *lease != 0 {
                self.ended(&one.key, &mut ended);
            }
            args.extend([*lease, ended.len() as u64]);
            args.append(&mut ended);
        }
        let keys: Vec<Key> = asked.iter().map(|one| one.key.clone()).collect();
        let answer = self.redis.run(&TAKE, &keys, &args[..]).await;
        let answer: Vec<i64> = answer.inspect_err(|_| self.give_back(asked, &leases))?;
        let [passes, now, rest @ ..] = &answer[..] else { return Err(Failure::Refused) };
        let duration = |micros: i64| Duration::from_micros(u64::try_from(micros).unwrap_or_default());
        let (verdicts, _) = rest.as_chunks::<4>();
        let verdicts: Vec<Verdict> = verdicts
            .iter()
            .map(|&[fits, remaining, reset, wait]| Verdict {
                fits: fits == 1,
                remaining: u64::try_from(remaining).unwrap_or_default(),
                reset: duration(reset),
                wait: (wait >= 0).then(|| duration(wait)),
            })
            .collect();
        if verdicts.len() != asked.len() {
            return Err(Failure::Refused);
        }
        let decision = Decision { passes: *passes == 1, verdicts };
        if decision.passes {
            self.hold(asked, &decision, &leases);
        } else {
            self.remember(asked, &decision);
        }
        let at = amount(u64::try_from(*now).unwrap_or_default());
        let demands = asked.iter().map(|one| one.demand).collect();
        Ok(Answer { decision, demands, leases, at, origin: Origin::Shared })
    }

    /// Takes back leases that a call may have taken which was not answered. The connection keeps the order.
    fn give_back(&self, asked: &[Asked], leases: &[u64]) {
        for (one, &lease) in asked.iter().zip(leases).filter(|(_, lease)| **lease != 0) {
            let (key, quota) = (one.key.clone(), one.demand.quota);
            let taken = Taken { key, quota, amount: 1.0, at: 0.0, lease, origin: Origin::Shared };
            later(&self.unsettled, Unsettled::Taken(taken, -1.0));
        }
    }

    /// Notes the leases that a request has got, so that they are renewed.
    fn hold(&self, asked: &[Asked], decision: &Decision, leases: &[u64]) {
        for ((one, verdict), lease) in asked.iter().zip(&decision.verdicts).zip(leases) {
            if *lease != 0 && verdict.fits {
                let mut all = self.leases.lock();
                let of = all.entry(one.key.clone()).or_default();
                of.per = one.demand.quota.per;
                of.held.insert(*lease);
            }
        }
    }

    /// Notes that a lease has ended.
    fn let_go(&self, taken: &Taken) {
        let mut all = self.leases.lock();
        let of = all.entry(taken.key.clone()).or_default();
        of.held.remove(&taken.lease);
        of.ended.push(taken.lease);
    }

    /// Takes the leases that have ended.
    fn ended(&self, key: &Key, into: &mut Vec<u64>) {
        let mut all = self.leases.lock();
        let Some(of) = all.get_mut(key) else { return };
        into.append(&mut of.ended);
        if of.held.is_empty() {
            all.remove(key);
        }
    }

    /// Notes which limits had no room. What is in flight may end at any time.
    fn remember(&self, asked: &[Asked], decision: &Decision) {
        let now = Instant::now();
        for (one, verdict) in asked.iter().zip(&decision.verdicts).filter(|(one, _)| !one.demand.shadow) {
            if let (false, Some(wait)) = (verdict.fits, verdict.wait) {
                let Demand { quota, cost, .. } = one.demand;
                let refused = Refused { cost, quota, until: now + wait, reset: verdict.reset, at: now };
                self.refused.put(&one.key, refused, now + wait.min(LOOK_AGAIN), now);
            }
        }
    }

    /// Notes that a lease was taken out that had ended, or that nobody can do that now.
    fn taken_out(&self, key: &Key, lease: u64) {
        let mut all = self.leases.lock();
        let Some(of) = all.get_mut(key) else { return };
        of.ended.retain(|ended| *ended != lease);
        if of.held.is_empty() && of.ended.is_empty() {
            all.remove(key);
        }
    }

    /// Those that are held of a counter, in parts, each with how long a lease lives.
    fn held(&self, key: &Key) -> Vec<Vec<u64>> {
        let all = self.leases.lock();
        let Some(Leases { per, held, .. }) = all.get(key) else { return Vec::new() };
        let held: Vec<u64> = held.iter().copied().collect();
        held.chunks(RENEWED).map(|part| iter::once(whole(*per)).chain(part.iter().copied()).collect()).collect()
    }
}

/// The store has logged and counted what it is; here is why it does not matter more.
fn log(done: Result<u32, Failure>) {
    if let Err(failure) = done {
        debug!(%failure, "a rate limit was not brought up to date: it is when its window or its lease ends");
    }
}

/// Settles, renews and says that this replica lives, until nobody counts in `redis` any more.
struct Keeper {
    redis: Redis,
    id: u64,
    shared: Weak<Shared>,
    /// How often there was another connection when it was looked last.
    connects: AtomicU64,
}

impl Keeper {
    async fn run(self, mut left: mpsc::Receiver<Unsettled>, mut end: watch::Receiver<bool>) {
        let mut batch = Vec::with_capacity(AT_ONCE);
        let mut due = Instant::now();
        loop {
            tokio::select! {
                biased;
                // What was sent before is still received.
                () = async { drop(end.wait_for(|end| *end).await) }, if !left.is_closed() => left.close(),
                () = sleep_until(due) => {
                    let begun = Instant::now();
                    due = begun + self.live().await;
                }
                count = left.recv_many(&mut batch, AT_ONCE) => {
                    if count == 0 {
                        break;
                    }
                    join_all(batch.drain(..).map(|what| self.catch_up(what))).await;
                }
            }
        }
        // Else another connection may go on saying that this replica lives, or it is soon forgotten.
        if *end.borrow() {
            log(self.alive(Duration::ZERO).await);
        }
    }

    /// Says that this replica lives, and renews what it holds. The time until it is to be done again.
    async fn live(&self) -> Duration {
        let alive = self.alive(MISSED).await;
        let (Ok(replicas), Some(shared)) = (alive, self.shared.upgrade()) else { return AGAIN };
        shared.replicas.store(replicas, Ordering::Relaxed);
        // What a Redis has lost that was connected to anew it gets once more. Else what is there is renewed, and what
        // ends meanwhile is not brought back.
        let connects = self.redis.figures().reconnects;
        let lost = u64::from(self.connects.swap(connects, Ordering::Relaxed) != connects);
        let keys: Vec<Key> = shared.leases.lock().keys().cloned().collect();
        for keys in keys.chunks(AT_ONCE) {
            let renew = keys.iter().flat_map(|key| shared.held(key).into_iter().map(move |args| (key, args)));
            join_all(renew.map(async |(key, mut args)| {
                args.insert(1, lost);
                log(self.redis.run(&RENEW, std::slice::from_ref(key), &args[..]).await);
            }))
            .await;
        }
        ALIVE
    }

    /// Says that this replica lives for so long. How many there are.
    async fn alive(&self, lasts: Duration) -> Result<u32, Failure> {
        let args = [self.id, whole(as_micros(lasts))];
        self.redis.run(&REPLICAS, &[self.redis.key("limit", "replicas", "")], &args[..]).await
    }

    async fn catch_up(&self, what: Unsettled) {
        let (asked, taking) = match what {
            Unsettled::Taken(taken, change) => return self.settle(taken, change).await,
            Unsettled::Taking(asked, taking) => (asked, taking),
        };
        // Where it fails, it has taken care of its leases.
        let Ok(answer) = taking.await else { return };
        for (place, _) in asked.iter().enumerate().filter(|(_, one)| one.settles) {
            let Some(taken) = answer.taken(&asked, place) else { continue };
            if let (true, Some(shared)) = (taken.lease != 0, self.shared.upgrade()) {
                shared.let_go(&taken);
            }
            let all = -taken.amount;
            self.settle(taken, all).await;
        }
    }

    async fn settle(&self, taken: Taken, change: f64) {
        let Taken { key, quota: Quota { algorithm, limit, per, .. }, at, lease, .. } = taken;
        let number = |amount: f64| i64::try_from(whole(amount)).unwrap_or(i64::MAX);
        let change = if change < 0.0 { -number(-change) } else { number(change) };
        let args = [
            code(algorithm).into(),
            change,
            number(at),
            number(limit),
            number(per),
            i64::try_from(lease).unwrap_or(i64::MAX),
        ];
        log(self.redis.run(&SETTLE, std::slice::from_ref(&key), &args[..]).await);
        if let (true, Some(shared)) = (lease != 0, self.shared.upgrade()) {
            shared.taken_out(&key, lease);
        }
    }
}
