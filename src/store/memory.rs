//! A map in memory that forgets: what policies use without Redis, or while it is out of order.
//!
//! It is bounded in entries and in bytes, and every entry lives for a limited time. The time is handed in. Several
//! entries can be changed in one step, which no other call sees the middle of.
//!
//! Expired entries make room a few at a time, whenever something else is written: there is no sweep and no task. Where
//! that is not enough, what would expire first goes first; as entries are given their time anew when they are used,
//! that is what was used least lately.
//!
//! Why not a cache such as `moka`: its values are shared and replaced, not changed in place; entries are changed one
//! at a time only; it takes the time from the clock; and what it counts is eventually right, which a limit is not.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    hash::{BuildHasher, Hash, RandomState},
};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

/// Parts with a lock each.
const SHARDS: usize = 16;

/// Expired entries that one write makes room for.
const SWEPT: usize = 4;

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Entries, at least one for each of 16 parts.
    pub entries: usize,
    /// Bytes of keys and values, as they weigh themselves.
    pub bytes: usize,
}

/// Bytes that a key or a value takes.
pub trait Weigh {
    /// As good an estimate as is cheap to make.
    fn weight(&self) -> usize;
}

impl Weigh for str {
    fn weight(&self) -> usize {
        self.len()
    }
}

impl<T: Weigh + ?Sized> Weigh for std::sync::Arc<T> {
    fn weight(&self) -> usize {
        T::weight(self)
    }
}

impl Weigh for String {
    fn weight(&self) -> usize {
        self.len()
    }
}

impl Weigh for bytes::Bytes {
    fn weight(&self) -> usize {
        self.len()
    }
}

impl Weigh for u64 {
    fn weight(&self) -> usize {
        size_of::<Self>()
    }
}

/// An entry while it is being changed. What has expired is not there.
#[derive(Debug)]
pub struct Held<V> {
    /// The value; none where there is no entry, or is to be none.
    pub value: Option<V>,
    /// When it ends. What has no later end than now is not kept.
    pub expires: Instant,
}

/// The map. `K` is cheap to clone: an `Arc<str>` or a number.
pub struct Memory<K, V> {
    shards: Box<[Mutex<Shard<K, V>>]>,
    hasher: RandomState,
    bounds: Bounds,
}

struct Shard<K, V> {
    entries: HashMap<K, Slot<V>>,
    /// By end and then by number, the first to expire first.
    order: BTreeMap<(Instant, u64), K>,
    numbers: u64,
    bytes: usize,
}

struct Slot<V> {
    value: V,
    expires: Instant,
    number: u64,
    bytes: usize,
}

impl<K, V> fmt::Debug for Memory<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Memory").field("bounds", &self.bounds).finish_non_exhaustive()
    }
}

impl<K: Clone + Eq + Hash + Weigh, V: Weigh> Memory<K, V> {
    /// An empty map within `bounds`, of which each part has its share.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        let shard = || Shard { entries: HashMap::new(), order: BTreeMap::new(), numbers: 0, bytes: 0 };
        let shards = (0..SHARDS).map(|_| Mutex::new(shard())).collect();
        let bounds = Bounds { entries: (bounds.entries / SHARDS).max(1), bytes: bounds.bytes / SHARDS };
        Self { shards, hasher: RandomState::new(), bounds }
    }

    /// A copy of what is there.
    pub fn get(&self, key: &K, now: Instant) -> Option<V>
    where
        V: Clone,
    {
        let shard = self.lock(self.place(key));
        shard.entries.get(key).filter(|slot| slot.expires > now).map(|slot| slot.value.clone())
    }

    /// Puts `value` there until `expires`.
    pub fn put(&self, key: &K, value: V, expires: Instant, now: Instant) {
        self.entry(key, now, |held| *held = Held { value: Some(value), expires });
    }

    /// Takes out what is there.
    pub fn remove(&self, key: &K, now: Instant) -> Option<V> {
        self.entry(key, now, |held| held.value.take())
    }

    /// Changes one entry in one step.
    pub fn entry<R>(&self, key: &K, now: Instant, change: impl FnOnce(&mut Held<V>) -> R) -> R {
        let mut shard = self.lock(self.place(key));
        let mut held = shard.take(key, now);
        let result = change(&mut held);
        shard.keep(key, held, now, &self.bounds);
        result
    }

    /// Changes several entries in one step, each at the place of its key. A key that stands there twice is nothing the
    /// second time, and what is done with it then is not kept.
    pub fn entries<R>(&self, keys: &[K], now: Instant, change: impl FnOnce(&mut [Held<V>]) -> R) -> R {
        let places: Vec<usize> = keys.iter().map(|key| self.place(key)).collect();
        let mut order = places.clone();
        order.sort_unstable();
        order.dedup();
        // Always in the same order, so that two calls never wait for each other.
        let mut shards: Vec<(usize, MutexGuard<'_, Shard<K, V>>)> =
            order.into_iter().map(|place| (place, self.lock(place))).collect();
        let at = |shards: &[(usize, _)], place: usize| {
            shards.binary_search_by_key(&place, |(place, _)| *place).unwrap_or_default()
        };
        let mut held = Vec::with_capacity(keys.len());
        for (key, place) in keys.iter().zip(&places) {
            let at = at(&shards, *place);
            held.push(shards[at].1.take(key, now));
        }
        let result = change(&mut held);
        for (n, ((key, place), held)) in keys.iter().zip(&places).zip(held).enumerate() {
            if keys[..n].contains(key) {
                continue;
            }
            let at = at(&shards, *place);
            shards[at].1.keep(key, held, now, &self.bounds);
        }
        result
    }

    /// Up to `most` keys with their values as `pick` sees them, in no order. Looks at everything: for operators.
    pub fn list<T>(&self, most: usize, now: Instant, mut pick: impl FnMut(&K, &V) -> Option<T>) -> Vec<T> {
        let mut found = Vec::new();
        for place in 0..SHARDS {
            let shard = self.lock(place);
            for (key, slot) in shard.entries.iter().filter(|(_, slot)| slot.expires > now) {
                if found.len() >= most {
                    return found;
                }
                found.extend(pick(key, &slot.value));
            }
        }
        found
    }

    /// How many entries there are, those among them that have expired and still lie there.
    #[must_use]
    pub fn len(&self) -> usize {
        (0..SHARDS).map(|place| self.lock(place).entries.len()).sum()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the entries weigh.
    #[must_use]
    pub fn bytes(&self) -> usize {
        (0..SHARDS).map(|place| self.lock(place).bytes).sum()
    }

    fn place(&self, key: &K) -> usize {
        // The remainder is below the number of parts.
        usize::try_from(self.hasher.hash_one(key) % SHARDS as u64).unwrap_or_default()
    }

    fn lock(&self, place: usize) -> MutexGuard<'_, Shard<K, V>> {
        self.shards[place].lock()
    }
}

impl<K: Clone + Eq + Hash + Weigh, V: Weigh> Shard<K, V> {
    fn take(&mut self, key: &K, now: Instant) -> Held<V> {
        match self.remove(key) {
            Some(slot) if slot.expires > now => Held { value: Some(slot.value), expires: slot.expires },
            _ => Held { value: None, expires: now },
        }
    }

    fn remove(&mut self, key: &K) -> Option<Slot<V>> {
        let slot = self.entries.remove(key)?;
        self.order.remove(&(slot.expires, slot.number));
        self.bytes -= slot.bytes;
        Some(slot)
    }

    fn keep(&mut self, key: &K, held: Held<V>, now: Instant, bounds: &Bounds) {
        for _ in 0..SWEPT {
            if self.first().is_none_or(|(expires, _)| expires > now) {
                break;
            }
            self.drop_first();
        }
        let Held { value: Some(value), expires } = held else { return };
        let bytes = key.weight() + value.weight();
        if expires <= now || bytes > bounds.bytes {
            return;
        }
        while self.entries.len() >= bounds.entries || self.bytes + bytes > bounds.bytes {
            self.drop_first();
        }
        let number = self.numbers;
        self.numbers += 1;
        self.bytes += bytes;
        self.order.insert((expires, number), key.clone());
        self.entries.insert(key.clone(), Slot { value, expires, number, bytes });
    }

    fn first(&self) -> Option<(Instant, u64)> {
        self.order.first_key_value().map(|(at, _)| *at)
    }

    fn drop_first(&mut self) {
        if let Some((_, key)) = self.order.pop_first()
            && let Some(slot) = self.entries.remove(&key)
        {
            self.bytes -= slot.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use proptest::prelude::*;

    use super::*;

    fn map(entries: usize, bytes: usize) -> Memory<u64, u64> {
        Memory::new(Bounds { entries, bytes })
    }

    fn secs(secs: u64) -> Duration {
        Duration::from_secs(secs)
    }

    #[test]
    fn an_entry_lives_until_its_end() {
        let (map, now) = (map(1000, 100_000), Instant::now());
        map.put(&1, 7, now + secs(10), now);
        assert_eq!(map.get(&1, now + secs(9)), Some(7));
        assert_eq!(map.get(&1, now + secs(10)), None);
        map.entry(&1, now + secs(10), |held| assert_eq!(held.value, None, "it is not there to be changed"));
        assert!(map.is_empty(), "and gone");
        map.put(&2, 7, now, now);
        assert!(map.is_empty(), "what ends now is not kept");
    }

    #[test]
    fn several_entries_change_in_one_step() {
        let (map, now) = (Arc::new(map(1000, 100_000)), Instant::now());
        let keys: Vec<u64> = (0..40).collect();
        std::thread::scope(|scope| {
            for reversed in [false, true, false, true] {
                let (map, mut keys) = (map.clone(), keys.clone());
                if reversed {
                    keys.reverse();
                }
                scope.spawn(move || {
                    for _ in 0..500 {
                        map.entries(&keys, now, |held| {
                            let first = held[0].value;
                            assert!(held.iter().all(|held| held.value == first), "no half of a step is seen");
                            for held in held {
                                *held = Held { value: Some(held.value.unwrap_or(0) + 1), expires: now + secs(1) };
                            }
                        });
                    }
                });
            }
        });
        assert!(keys.iter().all(|key| map.get(key, now) == Some(2000)));
    }

    #[test]
    fn a_key_that_stands_there_twice_counts_once() {
        let (map, now) = (map(1000, 100_000), Instant::now());
        map.put(&1, 5, now + secs(1), now);
        map.entries(&[1, 1], now, |held| {
            assert_eq!((held[0].value, held[1].value), (Some(5), None));
            held[0].value = Some(6);
            held[1] = Held { value: Some(9), expires: now + secs(9) };
        });
        assert_eq!(map.get(&1, now), Some(6));
    }

    #[test]
    fn what_expires_first_makes_room() {
        let (map, now) = (map(SHARDS, 1 << 20), Instant::now());
        for key in 0..1000 {
            map.put(&key, key, now + secs(2000 - key), now);
        }
        assert!(map.len() <= SHARDS);
        let late = map.list(100, now, |_, value| Some(*value));
        assert_eq!(late.len(), SHARDS);
        assert_eq!(map.list(3, now, |_, value| Some(*value)).len(), 3);
        // The last one written stays whatever its end: its part had only it.
        assert_eq!(map.get(&999, now), Some(999));
    }

    proptest! {
        #[test]
        fn bounds_hold_and_figures_are_true(steps in prop::collection::vec((0..200u64, 0..30u64, 0..3u8), 0..400)) {
            let (entries, bytes) = (64, SHARDS * 100);
            let (map, mut now) = (map(entries, bytes), Instant::now());
            for (key, ttl, what) in steps {
                now += Duration::from_millis(300);
                match what {
                    0 => { map.remove(&key, now); }
                    1 => map.put(&key, ttl, now + secs(ttl), now),
                    _ => map.entry(&key, now, |held| held.expires = now + secs(ttl)),
                }
                prop_assert!(map.len() <= entries && map.bytes() <= bytes);
                prop_assert_eq!(map.bytes(), map.len() * 16);
            }
            for place in 0..SHARDS {
                let shard = map.lock(place);
                prop_assert_eq!(shard.entries.len(), shard.order.len());
            }
        }
    }
}
