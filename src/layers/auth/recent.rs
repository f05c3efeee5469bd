//! A map that forgets what was not written for the longest time.

use std::{collections::HashMap, hash::Hash, mem};

/// A map of at most so many entries, in two generations: when the younger one is full it becomes the older one, whose
/// entries are then gone. Each operation costs as much as with a plain map.
#[derive(Debug)]
pub(super) struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    half: usize,
}

impl<K: Hash + Eq, V> Recent<K, V> {
    /// A map of at most `most` entries, which keeps at least the `most / 2` that were written last.
    pub(super) fn new(most: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), half: (most / 2).max(1) }
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.young.get(key).or_else(|| self.old.get(key))
    }

    pub(super) fn insert(&mut self, key: K, value: V) {
        self.old.remove(&key);
        self.young.insert(key, value);
        if self.young.len() >= self.half {
            self.old = mem::take(&mut self.young);
        }
    }

    pub(super) fn remove(&mut self, key: &K) {
        self.young.remove(key);
        self.old.remove(key);
    }

    /// Whether `key` is among those written last; one that is there and is not is due to be written again.
    pub(super) fn is_young(&self, key: &K) -> bool {
        self.young.contains_key(key)
    }

    #[cfg(test)]
    fn len(&self) -> usize {
        self.young.len() + self.old.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_bounded_and_keeps_the_latest() {
        let mut map = Recent::new(100);
        for n in 0..1000 {
            map.insert(n, n);
            assert!(map.len() <= 100);
            assert!((n.max(49) - 49..=n).all(|n| map.get(&n) == Some(&n)), "{n}");
        }
        assert_eq!(map.get(&0), None);
        map.remove(&999);
        assert_eq!(map.get(&999), None);
    }
}
