//! The second level: answers in Redis, for all replicas, behind those in memory.
//!
//! It is asked once for all who want an answer that this replica does not have, before the upstream is, within the
//! deadline of the store and not at all while that is out of order. Answers are written behind the requests that brought
//! them: nobody waits for that. Each is compressed where it is large, and left out where it is larger than that.
//!
//! What is found may have been purged since it was asked for: see [`marks`](super::marks). The same marks say of an answer in
//! memory whether it still holds, where this replica may have missed a purge: after a time without the others it is held
//! against them once, and while that lasts once a second; so is one that is on its way, before others join it. Where Redis
//! is out of order altogether, memory goes on alone. Where it is up and does not answer in time, nobody knows, and the
//! upstream is asked.
//!
//! Replicas need not agree on the time: that of an answer in Redis is by the clock of Redis, which tells it at each look.
//!
//! Answers of different settings are none of each other's business: a hash of what they depend on is part of the key.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};

use http::{HeaderMap, HeaderName};
use ring::digest::{SHA256, digest};
use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout},
};

use super::{
    config::{self, Config},
    copies,
    date::since_epoch,
    encoding::{self, Record},
    headroom::Headroom,
    hub::{Hub, clock},
    key::Key,
    marks::{self, Changed, Marks},
    purge::{Names, Standing},
    stored::{Basis, Stored},
};
use crate::{
    store::{self, Failure, Redis},
    telemetry::{
        Exchange,
        metrics::{CacheInRedis as InRedis, CacheMetrics},
    },
};

/// How long an answer in memory is used without another look, while this replica does not hear of purges.
const SHORT: u64 = 1000;
/// For how long before that one looks for all.
const LOOKING: u64 = 250;
/// The least that is remembered what an answer varies by: as long as one variant lives, others want to be found.
const VARIES: Duration = Duration::from_secs(3600);
/// What takes longer than a few hundred microseconds to compress or decompress, in bytes.
const LONG: usize = 64 << 10;

/// The answers of a route in Redis.
#[derive(Clone)]
pub(super) struct Shared {
    hub: Arc<Hub>,
    of: Arc<Of>,
}

/// What is the same for all of them.
struct Of {
    route: String,
    /// What the answers depend on beside what is asked.
    settings: [u8; 32],
    max_body: usize,
    compress_above: usize,
    metrics: CacheMetrics,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("route", &self.of.route).finish_non_exhaustive()
    }
}

/// What Redis says.
#[derive(Default)]
pub(super) struct Looked {
    /// What an answer rests on that is asked for now.
    pub(super) basis: Basis,
    /// What there is, and under which key.
    pub(super) found: Option<(Key, Box<Stored>)>,
    /// What it varies by, where that was not known.
    pub(super) varies: Option<Vec<HeaderName>>,
    /// What the answer that there is rests on, if a 304 may renew it. None where it was purged, or where nobody knows.
    pub(super) renews: Option<Basis>,
}

/// What is looked for.
#[derive(Clone, Copy)]
pub(super) struct Sought<'a> {
    pub(super) primary: Key,
    /// That of the variant, as far as it is known.
    pub(super) key: Key,
    pub(super) headers: &'a HeaderMap,
    pub(super) names: &'a Arc<Names>,
    /// The last purge that this replica knew of before.
    pub(super) number: u64,
    /// What there is, and the upstream is asked about.
    pub(super) stale: Option<&'a Stored>,
    pub(super) exchange: Option<&'a Exchange>,
}

/// Whether an answer in memory still holds.
#[derive(Debug)]
pub(super) enum Holds {
    Yes,
    /// It was purged.
    To(Standing, Arc<Marks>),
    /// Nobody knows: Redis was not asked before its upstream was.
    Unknown,
}

impl Shared {
    pub(super) fn new(
        hub: Arc<Hub>,
        (route, upstream): (&str, &str),
        config: &Config,
        own: &config::InRedis,
        metrics: CacheMetrics,
    ) -> Self {
        let of = Of {
            route: route.to_owned(),
            settings: settings(upstream, config),
            max_body: own.max_body.to_usize(),
            compress_above: own.compress_above.to_usize(),
            metrics,
        };
        Self { hub, of: Arc::new(of) }
    }

    /// Looks for an answer, within the deadline of the store.
    pub(super) async fn look(&self, sought: Sought<'_>) -> Looked {
        let at = clock();
        let none = || {
            let renews = sought.stale.filter(|stale| self.hears_all(&stale.basis) || !self.hub.redis.is_up());
            let renews = renews.map(|stale| stale.basis.clone());
            Looked { basis: Basis::new(sought.number, None, at), renews, ..Looked::default() }
        };
        let calls = async {
            // What is purged here, and not yet there, must not come back from there.
            self.hub.told(sought.names).await?;
            self.find(sought, at).await
        };
        let found = self.within(sought.exchange, calls).await;
        self.of.metrics.in_redis(match &found {
            Ok(Looked { found: Some(_), .. }) => InRedis::Hit,
            Ok(_) => InRedis::Miss,
            Err(_) => InRedis::Failed,
        });
        found.unwrap_or_else(|_| none())
    }

    /// All calls for a request together within the deadline of one, those that it has made before included, and noted
    /// where they are not.
    async fn within<T>(
        &self,
        exchange: Option<&Exchange>,
        calls: impl Future<Output = Result<T, Failure>>,
    ) -> Result<T, Failure> {
        let waited = exchange.map_or(Duration::ZERO, |exchange| exchange.facts().cache_waited);
        let left = self.hub.redis.deadline().saturating_sub(waited);
        if left.is_zero() || exchange.is_some_and(|exchange| exchange.facts().store_unanswered) {
            return Err(Failure::Timeout);
        }
        let begun = Instant::now();
        let answer = timeout(left, calls).await.unwrap_or(Err(Failure::Timeout));
        if let Some(exchange) = exchange {
            let mut facts = exchange.facts();
            facts.cache_waited = waited + begun.elapsed();
            facts.store_unanswered |= answer.as_ref().is_err_and(|failure| *failure == Failure::Timeout);
        }
        answer
    }

    async fn find(&self, sought: Sought<'_>, at: u64) -> Result<Looked, Failure> {
        let Sought { primary, headers, names, number, .. } = sought;
        let mut key = sought.key;
        let begun = SystemTime::now();
        let (there, value, now) = self.value_and_marks(&key, names).await?;
        let now = Arc::new(now);
        let mut record = self.decode(&key, value).await;
        let mut varies = None;
        if let Some(Record::Varies(names)) = &record
            && key == primary
        {
            key = primary.with_vary(names, headers);
            varies = Some(names.clone());
            record = self.decode(&key, self.hub.redis.get(&self.of.name(&key, &self.hub.redis)).await?).await;
        }
        let basis = Basis::new(number, Some(now.clone()), at);
        let renews = match sought.stale {
            Some(stale) => self.renews(stale, names, &now, at).await?,
            None => None,
        };
        let Some(Record::Answer(mut stored)) = record else {
            return Ok(Looked { basis, found: None, varies, renews });
        };
        let Some(life) = stored.life.by(there, since_epoch(begun)) else {
            return Ok(Looked { basis, found: None, varies, renews });
        };
        stored.life = life;
        // Another query may have brought it, of which not all counts.
        let now = if stored.names == *names { now } else { Arc::new(self.marks(&stored.names).await?.1) };
        let own = stored.basis.marks.take().unwrap_or_default();
        let standing = self.standing(&own, &now, &stored.names).await?;
        if standing == Standing::Soft {
            stored.life.expire(begun);
        }
        stored.basis = Basis::new(number, Some(now), at);
        let is_left = standing != Standing::Gone && stored.life.keep_until() > begun;
        Ok(Looked { basis, found: is_left.then_some((key, stored)), varies, renews })
    }

    /// What an answer that there is rests on, where Redis has these marks `now` for `names`. It keeps what its body was
    /// asked for under: marks of now are as good only if no purge for good lies in between.
    async fn renews(&self, stale: &Stored, names: &Names, now: &Arc<Marks>, at: u64) -> Result<Option<Basis>, Failure> {
        let Some(own) = marks_of(&stale.basis) else {
            // Redis does not know. What others purge was heard, or nobody knows.
            return Ok(self.hears_all(&stale.basis).then(|| stale.basis.clone()));
        };
        let now = if stale.names.as_ref() == names { now.clone() } else { Arc::new(self.marks(&stale.names).await?.1) };
        let standing = self.standing(own, &now, &stale.names).await?;
        let number = stale.basis.number.load(Ordering::Relaxed);
        Ok((standing != Standing::Gone).then(|| Basis::new(number, Some(now), at)))
    }

    async fn decode(&self, key: &Key, value: Option<Vec<u8>>) -> Option<Record> {
        let (key, value, most) = (self.of.key(key), value?, self.of.max_body);
        if value.len() < LONG {
            return encoding::decode(&key, value, most);
        }
        spawn_blocking(move || encoding::decode(&key, value, most)).await.ok().flatten()
    }

    /// What is left of what has these marks, where there are others `now`.
    async fn standing(&self, own: &Marks, now: &Marks, names: &Names) -> Result<Standing, Failure> {
        Ok(match own.changed(now) {
            Changed::To(standing) => standing,
            Changed::Globs(standing) => {
                let globs = self.hub.globs(now.glob()).await?;
                standing.max(marks::after_globs(&globs, own.glob(), &names.path))
            }
        })
    }

    /// The marks of these names, and when that is by the clock of Redis.
    async fn marks(&self, names: &Names) -> Result<(u64, Marks), Failure> {
        let places: Vec<_> = marks::places(names).iter().map(|place| self.hub.mark(place)).collect();
        let (there, found) = self.hub.look(&places).await?;
        Ok((there, Marks::of(found)))
    }

    /// All at once. In one call, where it need not be one of two nodes: then the clock is that of the one with the marks.
    async fn value_and_marks(&self, key: &Key, names: &Names) -> Result<(u64, Option<Vec<u8>>, Marks), Failure> {
        let redis = &self.hub.redis;
        let name = self.of.name(key, redis);
        if redis.is_cluster() {
            let (value, (there, marks)) = tokio::try_join!(redis.get(&name), self.marks(names))?;
            return Ok((there, value, marks));
        }
        let mut all = vec![name];
        all.extend(marks::places(names).iter().map(|place| self.hub.mark(place)));
        let (there, found) = self.hub.look(&all).await?;
        let mut found = found.into_iter();
        Ok((there, found.next().flatten(), Marks::of(found)))
    }

    /// Whether this replica has heard of all purges since an answer was last seen to hold.
    fn hears_all(&self, basis: &Basis) -> bool {
        self.hub.hears_since().is_some_and(|since| basis.seen.load(Ordering::Relaxed) >= since)
    }

    /// Whether an answer of this replica may be used without another look.
    pub(super) fn is_known(&self, basis: &Basis) -> bool {
        let ago = |at: &AtomicU64| clock().saturating_sub(at.load(Ordering::Relaxed));
        let seen = ago(&basis.seen);
        // Before the second is over, one looks for all.
        let is_recent = seen <= SHORT - LOOKING || seen <= SHORT && ago(&basis.looked) <= LOOKING;
        // Where Redis is out of order nobody knows any better.
        self.hears_all(basis) || is_recent || !self.hub.redis.is_up()
    }

    /// Holds an answer of this replica against what Redis knows of purges.
    pub(super) async fn check(&self, basis: &Basis, names: &Names, exchange: Option<&Exchange>) -> Holds {
        let Some(own) = marks_of(basis) else { return Holds::Unknown };
        let at = clock();
        basis.looked.store(at, Ordering::Relaxed);
        let calls = async {
            let (_, now) = self.marks(names).await?;
            Ok((self.standing(own, &now, names).await?, now))
        };
        match self.within(exchange, calls).await {
            Ok((Standing::Valid, _)) => {
                basis.seen.fetch_max(at, Ordering::Relaxed);
                Holds::Yes
            }
            Ok((standing, now)) => {
                basis.seen.fetch_max(at, Ordering::Relaxed);
                Holds::To(standing, Arc::new(now))
            }
            // Without Redis memory goes on alone.
            Err(Failure::Unavailable) if !self.hub.redis.is_up() => Holds::Yes,
            Err(_) => Holds::Unknown,
        }
    }

    /// What Redis knows now of purges of these names, beside those that it does not know of yet.
    ///
    /// # Errors
    /// It does not answer, or does not take what was purged here.
    pub(super) async fn marks_of(&self, names: &Names) -> Result<Marks, Failure> {
        self.hub.told(names).await?;
        Ok(self.marks(names).await?.1)
    }

    /// What is left of what had these marks.
    ///
    /// # Errors
    /// As [`marks_of`](Self::marks_of).
    pub(super) async fn standing_of(&self, own: &Marks, names: &Names) -> Result<Standing, Failure> {
        let now = self.marks_of(names).await?;
        self.standing(own, &now, names).await
    }

    /// What is left, as far as this replica knows, of what was asked for when `number` was the last purge.
    pub(super) fn standing_here(&self, number: u64, names: &Names) -> Standing {
        self.hub.purges.standing(number, names)
    }

    /// Whether this replica has heard of all that others have purged since.
    pub(super) fn hears_since(&self, at: u64) -> bool {
        self.hub.hears_since().is_some_and(|since| since <= at)
    }

    /// The copies of the streams of the route that can be taken up again.
    pub(super) fn copies(&self) -> copies::Of {
        copies::Of {
            copies: self.hub.copies().clone(),
            shared: self.clone(),
            limit: self.of.max_body,
            metrics: self.of.metrics.clone(),
        }
    }

    /// Leaves an answer to be taken out.
    pub(super) fn remove(&self, key: Key) {
        self.write(key, None);
    }

    fn write(&self, key: Key, what: Option<Varying>) {
        if !self.hub.write(Write { of: self.of.clone(), key, what, hub: Arc::downgrade(&self.hub) }) {
            self.of.metrics.in_redis(InRedis::Dropped);
        }
    }

    /// Leaves an answer to be written, and what it varies by.
    pub(super) fn put(&self, primary: Key, key: Key, vary: Vec<HeaderName>, stored: Arc<Stored>) {
        // Without marks nobody would know of a purge.
        if stored.basis.marks.is_none() || stored.body.len() > self.of.max_body {
            return;
        }
        self.write(key, Some((stored, (primary != key).then_some((primary, vary)))));
    }
}

/// The marks of an answer, as long as Redis has all that were made since they were seen to hold: of a purge that is longer
/// ago than marks live there is no trace any more.
fn marks_of(basis: &Basis) -> Option<&Arc<Marks>> {
    let ago = Duration::from_millis(clock().saturating_sub(basis.seen.load(Ordering::Relaxed)));
    basis.marks.as_ref().filter(|_| ago <= marks::MOST)
}

impl Of {
    /// As it stands in the value.
    fn key(&self, key: &Key) -> Key {
        key.within(&self.settings)
    }

    /// The name in Redis. In a cluster each is anywhere, so that a route is not all on one node.
    fn name(&self, key: &Key, redis: &Redis) -> store::Key {
        redis.key("cache", &self.key(key).hex(), &self.route)
    }
}

/// A hash of all settings that make a difference to what an answer is, or to whom it is given, and of whose it is.
fn settings(upstream: &str, config: &Config) -> [u8; 32] {
    let default = Config::default();
    let of_answers = Config {
        max_request_body: default.max_request_body,
        refresh: default.refresh,
        client_cache_control: default.client_cache_control,
        replay: default.replay,
        speed: default.speed,
        max_body: default.max_body,
        max_bytes: default.max_bytes,
        max_entries: default.max_entries,
        coalesce_timeout: default.coalesce_timeout,
        finish_fill: default.finish_fill,
        invalidate: default.invalidate,
        warm: default.warm,
        redis: default.redis,
        ..config.clone()
    };
    let text = serde_json::to_vec(&(upstream, of_answers)).unwrap_or_default();
    let mut hash = [0; 32];
    hash.copy_from_slice(digest(&SHA256, &text).as_ref());
    hash
}

/// An answer, and what it varies by, under the key before that.
type Varying = (Arc<Stored>, Option<(Key, Vec<HeaderName>)>);

/// An answer that is left to be written, with what it varies by, or to be taken out.
pub(super) struct Write {
    of: Arc<Of>,
    key: Key,
    what: Option<Varying>,
    hub: std::sync::Weak<Hub>,
}

impl Write {
    /// About how much room it takes.
    pub(super) fn size(&self) -> usize {
        self.what.as_ref().map_or(0, |(stored, _)| stored.weight())
    }

    /// Leaves it: there is no room.
    pub(super) fn drop(self) {
        self.of.metrics.in_redis(InRedis::Dropped);
    }

    pub(super) async fn run(self, redis: &Redis, headroom: &Headroom) {
        let Self { of, key, what, hub } = self;
        let name = of.name(&key, redis);
        let Some((stored, varies)) = what else {
            // Without Redis it is not found either, and has an end of its own.
            redis.delete(&name).await.ok();
            return;
        };
        let left = stored.life.share_until().duration_since(SystemTime::now()).unwrap_or_default();
        // A stream may have taken hours, for which marks had to live already.
        let old = clock().saturating_sub(stored.basis.seen.load(Ordering::Relaxed));
        let left = left.min(marks::MOST.saturating_sub(Duration::from_millis(old)));
        let number = stored.basis.number.load(Ordering::Relaxed);
        let Some(hub) = hub.upgrade() else { return };
        let gone = hub.purges.standing(number, &stored.names) == Standing::Gone;
        let Some(marks) = stored.basis.marks.clone().filter(|_| !left.is_zero() && !gone) else { return };
        let Some(life) = hub.time().and_then(|there| stored.life.by(since_epoch(SystemTime::now()), there)) else {
            return;
        };
        drop(hub);
        let (within, compress_above) = (of.key(&key), of.compress_above);
        let long = stored.body.len() > LONG;
        let encode = move || encoding::answer(&within, &stored, &life, &marks, compress_above);
        let value = if long { spawn_blocking(encode).await.ok() } else { Some(encode()) };
        let Some(value) = value else { return };
        let written = async {
            if let Some((primary, names)) = varies {
                let value = encoding::varies(&of.key(&primary), &names);
                redis.set(&of.name(&primary, redis), &value, left.max(VARIES)).await?;
            }
            redis.set(&name, &value, left).await
        };
        let written = written.await;
        headroom.wrote(&written);
        of.metrics.in_redis(if written.is_ok() { InRedis::Stored } else { InRedis::Failed });
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;
    use crate::{layers::cache::hub::Purger, telemetry::Metrics};

    #[tokio::test(start_paused = true)]
    async fn what_was_not_seen_to_hold_for_as_long_as_marks_live_is_not_known() {
        let config = serde_json::from_value(serde_json::json!({ "url": "redis://127.0.0.1:1" })).unwrap();
        let metrics = Metrics::new();
        // Without a Redis there, what may be held against it counts as valid.
        let redis = Redis::start(&config, &metrics).unwrap();
        let hub = Arc::new(Purger::default()).hub(&redis);
        let config = Config::default();
        let shared = Shared::new(hub, ("all", "api"), &config, &config::InRedis::default(), metrics.cache("all"));
        let names = Names { host: "a.test".into(), path: "/a".into(), tags: Box::default() };
        let basis = Basis::new(0, Some(Arc::default()), clock());
        advance(marks::MOST).await;
        assert!(matches!(shared.check(&basis, &names, None).await, Holds::Yes));
        advance(Duration::from_secs(1)).await;
        assert!(matches!(shared.check(&basis, &names, None).await, Holds::Unknown));
    }
}
