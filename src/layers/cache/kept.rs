//! The answers of a route that are kept in memory, and those that are on their way.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, OnceLock},
    time::{Duration, SystemTime},
};

use futures_util::future::{BoxFuture, FutureExt, Shared, WeakShared};
use http::{HeaderMap, HeaderName};
use moka::{Expiry, notification::RemovalCause, sync::Cache};
use parking_lot::Mutex;

use super::{
    directives::Request as Directives,
    fill::Outcome,
    freshness::{Life, Verdict},
    key::Key,
    purge::{Names, Purges, Standing},
    recording::Budget,
    stored::{Basis, Stored},
};

/// How long it is remembered that an answer cannot be kept: until then nobody waits for it.
const PASS: Duration = Duration::from_secs(120);
/// The least that anything is counted with.
const LEAST: u32 = 256;

/// The question what the answer is, asked once for all who want to know.
pub(super) type Asking = Shared<BoxFuture<'static, Outcome>>;

/// What is known under a key.
#[derive(Clone)]
pub(super) enum Entry {
    /// The answer.
    Answer(Arc<Stored>),
    /// There are several, for what these fields of a request say.
    Varies(Arc<[HeaderName]>),
    /// The answer could not be kept, lately: one of these names, asked for after the purge of this number.
    Pass { names: Arc<Names>, number: u64 },
}

/// The answers of a route.
pub(super) struct Kept {
    entries: Cache<Key, Entry>,
    flights: Mutex<HashMap<Key, Flight>>,
    pub(super) purges: Arc<Purges>,
    /// For what is on its way, beside what is kept.
    pub(super) budget: Arc<Budget>,
}

/// An answer that is on its way.
struct Flight {
    asking: WeakShared<BoxFuture<'static, Outcome>>,
    /// Whose it is, among those of the same key.
    id: u64,
    number: u64,
    names: Arc<Names>,
    /// Known with the head.
    life: Arc<OnceLock<Life>>,
    /// Known when Redis has been asked.
    basis: Arc<OnceLock<Basis>>,
}

impl Flight {
    /// Whether a request that says so may have the answer: until its head is there, and while it is fresh.
    fn is_for(&self, asked: &Directives, purges: &Purges) -> bool {
        let life = self.life.get();
        life.is_none_or(|life| life.verdict(asked, SystemTime::now()) == Verdict::Fresh)
            && purges.standing(self.number, &self.names) == Standing::Valid
    }
}

/// How long an entry is kept.
struct Until;

impl Expiry<Key, Entry> for Until {
    fn expire_after_create(&self, _: &Key, entry: &Entry, _: std::time::Instant) -> Option<Duration> {
        match entry {
            Entry::Answer(stored) => Some(left(stored)),
            // As long as something is found behind it: it moves on with each hit.
            Entry::Varies(_) => None,
            Entry::Pass { .. } => Some(PASS),
        }
    }

    fn expire_after_update(
        &self,
        key: &Key,
        entry: &Entry,
        at: std::time::Instant,
        _: Option<Duration>,
    ) -> Option<Duration> {
        self.expire_after_create(key, entry, at)
    }
}

fn left(stored: &Stored) -> Duration {
    stored.life.keep_until().duration_since(SystemTime::now()).unwrap_or_default()
}

impl Kept {
    /// Room for `bytes`, and for no more than `entries` answers. `evicted` is told of what had to give way.
    pub(super) fn new(
        bytes: u64,
        entries: Option<u32>,
        purges: Arc<Purges>,
        evicted: impl Fn() + Send + Sync + 'static,
    ) -> Self {
        // One weight for two bounds: who takes less than its share of the entries takes its share.
        let share =
            entries.map_or(0, |entries| u32::try_from(bytes / u64::from(entries)).unwrap_or(u32::MAX)).max(LEAST);
        let entries = Cache::builder()
            .max_capacity(bytes)
            .weigher(move |_: &Key, entry: &Entry| match entry {
                Entry::Answer(stored) => u32::try_from(stored.weight()).unwrap_or(u32::MAX).max(share),
                Entry::Varies(_) | Entry::Pass { .. } => LEAST,
            })
            .expire_after(Until)
            .eviction_listener(move |_, _, cause| {
                if cause == RemovalCause::Size {
                    evicted();
                }
            })
            .build();
        Self { entries, flights: Mutex::default(), purges, budget: Budget::new(bytes) }
    }

    /// What is known of the question `primary`, for a request with these fields, and under which key: that of its
    /// `variant`, where that is known.
    pub(super) fn look(&self, primary: Key, variant: Option<Key>, headers: &HeaderMap) -> (Key, Option<Entry>) {
        if let Some(key) = variant {
            return (key, self.valid(key, self.entries.get(&key)));
        }
        let entry = self.entries.get(&primary);
        let Some(Entry::Varies(names)) = entry else { return (primary, self.valid(primary, entry)) };
        let key = primary.with_vary(&names, headers);
        (key, self.valid(key, self.entries.get(&key)))
    }

    /// An answer is valid if it was not purged since.
    fn valid(&self, key: Key, entry: Option<Entry>) -> Option<Entry> {
        let stored = match &entry {
            Some(Entry::Answer(stored)) => stored,
            // Who purges it has changed something: perhaps that.
            Some(Entry::Pass { names, number }) if self.purges.standing(*number, names) != Standing::Valid => {
                self.entries.invalidate(&key);
                return None;
            }
            _ => return entry,
        };
        let now = self.purges.now();
        match self.standing(stored) {
            Standing::Valid => {
                stored.survived(now);
                entry
            }
            Standing::Soft => {
                let mut life = stored.life;
                life.expire(SystemTime::now());
                stored.survived(now);
                let stale = Entry::Answer(Arc::new(stored.with(&stored.headers, life, stored.basis.clone())));
                self.entries.insert(key, stale.clone());
                Some(stale)
            }
            Standing::Gone => {
                self.entries.invalidate(&key);
                None
            }
        }
    }

    /// What is left of an answer after the purges that this replica knows of.
    pub(super) fn standing(&self, stored: &Stored) -> Standing {
        self.purges.standing(stored.basis.number.load(std::sync::atomic::Ordering::Relaxed), &stored.names)
    }

    /// Keeps an answer, unless it was purged while it was on its way. Whether it does.
    pub(super) fn put(&self, key: Key, stored: Arc<Stored>) -> bool {
        // One that was made stale is made so when it is looked at.
        let is_left = self.standing(&stored) != Standing::Gone;
        if is_left {
            self.entries.insert(key, Entry::Answer(stored));
        }
        is_left
    }

    /// What the answers to a question depend on, where that is known.
    pub(super) fn names(&self, primary: Key) -> Option<Arc<[HeaderName]>> {
        match self.entries.get(&primary)? {
            Entry::Varies(names) => Some(names),
            Entry::Answer(_) | Entry::Pass { .. } => None,
        }
    }

    /// Whether an error, which depends on these fields, would take the place of an answer that [holds
    /// out](Stored::holds_out), or hide those that depend on others.
    pub(super) fn holds_out(&self, primary: Key, key: Key, vary: &[HeaderName], now: SystemTime) -> bool {
        let answers = [primary, key].map(|key| self.valid(key, self.entries.get(&key)));
        answers.iter().any(|entry| match entry {
            Some(Entry::Answer(stored)) => stored.holds_out(now),
            Some(Entry::Varies(names)) => **names != *vary,
            Some(Entry::Pass { .. }) | None => false,
        })
    }

    /// Notes that what is asked for under `primary` varies. Where there is an answer already, that one stays until another
    /// `is_there`.
    pub(super) fn put_names(&self, primary: Key, names: &[HeaderName], is_there: bool) {
        let known = self.entries.get(&primary);
        if !is_there && matches!(known, Some(Entry::Answer(_))) {
            return;
        }
        if !matches!(&known, Some(Entry::Varies(known)) if **known == *names) {
            self.entries.insert(primary, Entry::Varies(names.into()));
        }
    }

    /// Notes that the answer cannot be kept.
    pub(super) fn put_pass(&self, key: Key, place: &Place) {
        self.entries.insert(key, Entry::Pass { names: place.names.clone(), number: place.number });
    }

    /// Forgets what is known under `key`.
    pub(super) fn remove(&self, key: &Key) {
        self.entries.invalidate(key);
    }

    /// Goes along with the answer that is on its way, or asks for one by what `begin` gives. Whether it is the latter.
    /// `None` where something else than `known` has been put under the key since: it may be the answer.
    ///
    /// What was purged since it was asked for is nobody's to join any more, nor what is no longer fresh.
    pub(super) fn join(
        self: &Arc<Self>,
        key: Key,
        names: &Arc<Names>,
        asked: &Directives,
        known: Option<&Arc<Stored>>,
        begin: impl FnOnce(Place) -> BoxFuture<'static, Outcome>,
    ) -> Option<(Asking, bool)> {
        let mut flights = self.flights.lock();
        if let Some(flight) = flights.get(&key)
            && flight.is_for(asked, &self.purges)
            && let Some(asking) = flight.asking.upgrade()
        {
            return Some((asking, false));
        }
        // An answer is put before its flight ends: between the look at the one and at the other it may have landed.
        match (self.entries.get(&key), known) {
            (None, _) => {}
            (Some(Entry::Answer(stored)), Some(known)) if Arc::ptr_eq(&stored, known) => {}
            (Some(_), _) => return None,
        }
        let (id, number) = (unique(), self.purges.now());
        let (life, basis) = (Arc::default(), Arc::default());
        let place = Place {
            kept: self.clone(),
            keys: Mutex::new(vec![key]),
            id,
            number,
            names: names.clone(),
            life: Arc::clone(&life),
            basis: Arc::clone(&basis),
        };
        let asking = begin(place).shared();
        if let Some(weak) = asking.downgrade() {
            flights.insert(key, Flight { asking: weak, id, number, names: names.clone(), life, basis });
        }
        Some((asking, true))
    }

    /// What is on its way under `key`: its id, what it is dropped by, and what it rests on.
    pub(super) fn on_its_way(&self, key: &Key) -> Option<(u64, Arc<Names>, Arc<OnceLock<Basis>>)> {
        self.flights.lock().get(key).map(|flight| (flight.id, flight.names.clone(), flight.basis.clone()))
    }

    /// Lets nobody join it any more.
    pub(super) fn part(&self, key: &Key, id: u64) {
        let mut flights = self.flights.lock();
        if flights.get(key).is_some_and(|flight| flight.id == id) {
            flights.remove(key);
        }
    }

    /// How many answers there are, and about how many bytes they take.
    pub(super) fn size(&self) -> (u64, u64) {
        // It keeps house only where something is asked of it.
        self.entries.run_pending_tasks();
        (self.entries.entry_count(), self.entries.weighted_size())
    }

    /// How many are on their way, and how many bytes of them are there.
    pub(super) fn in_flight(&self) -> (usize, u64) {
        (self.flights.lock().len(), self.budget.used())
    }

    /// Lets go of everything.
    pub(super) fn clear(&self) {
        self.entries.invalidate_all();
        self.entries.run_pending_tasks();
    }
}

impl fmt::Debug for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kept").field("entries", &self.entries.entry_count()).finish_non_exhaustive()
    }
}

fn unique() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed)
}

/// The place of an answer among those that are on their way, for as long as it is.
pub(super) struct Place {
    pub(super) kept: Arc<Kept>,
    keys: Mutex<Vec<Key>>,
    id: u64,
    /// The last purge before it was asked for.
    pub(super) number: u64,
    pub(super) names: Arc<Names>,
    /// How long the answer may be used: set when its head is there.
    pub(super) life: Arc<OnceLock<Life>>,
    /// What it rests on: set when Redis has been asked.
    pub(super) basis: Arc<OnceLock<Basis>>,
}

impl Place {
    /// The key that it was asked for under.
    pub(super) fn key(&self) -> Key {
        self.keys.lock()[0]
    }

    /// Lets it be found under the key of its variant too.
    pub(super) fn also(&self, variant: Key) {
        let first = self.key();
        if first == variant {
            return;
        }
        let mut flights = self.kept.flights.lock();
        let Some(flight) = flights.get(&first).filter(|flight| flight.id == self.id) else { return };
        let same = Flight {
            asking: flight.asking.clone(),
            id: self.id,
            number: self.number,
            names: self.names.clone(),
            life: self.life.clone(),
            basis: self.basis.clone(),
        };
        // Another may have begun to ask for the variant: both go on, and who comes joins that one. It may end here.
        let other = flights.get(&variant).and_then(|other| other.asking.upgrade());
        if other.is_none() {
            flights.insert(variant, same);
            self.keys.lock().push(variant);
        }
        drop(flights);
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut flights = self.kept.flights.lock();
        for key in self.keys.lock().iter() {
            if flights.get(key).is_some_and(|flight| flight.id == self.id) {
                flights.remove(key);
            }
        }
    }
}
