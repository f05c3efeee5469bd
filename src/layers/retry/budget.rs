//! How much may be sent again, so that retries do not become the load that keeps an upstream down.
//!
//! Two bounds, both of them relative to what clients ask: the retries under way at a time are at most a share of the
//! requests under way, and those begun within [`WINDOW`] at most the same share of the requests of that time. The first
//! keeps an upstream that hangs from being asked twice by everyone who waits; the second one that fails at once, where
//! hardly anything is ever under way. (Envoy's retry budget has the first, tower's and Finagle's the second.) Below
//! both lies a floor, without which an upstream that is rarely asked would have no retries at all.

use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// What lies longer ago counts no more: 10 seconds, as with tower and Finagle.
pub const WINDOW: Duration = Duration::from_secs(10);

const SLOTS: usize = 10;

/// The counts of one upstream, shared by all routes to it. Cheap to clone; clones are the same budget.
#[derive(Clone, Default)]
pub struct Budget(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Where time is counted from: the first request.
    epoch: Option<Instant>,
    /// Requests and retries that began in each slot of the window.
    slots: [(u64, u64); SLOTS],
    /// The slot that is being counted in, from `epoch`.
    slot: u64,
    requests: u64,
    retries: u64,
}

/// How much.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Retries per request, 0 to 1.
    pub ratio: f64,
    /// So many retries are always allowed: at a time, and within [`WINDOW`].
    pub floor: u32,
}

impl Share {
    fn of(self, requests: u64) -> u64 {
        #[expect(clippy::cast_precision_loss, reason = "counts of ten seconds are far below 2^52")]
        let share = self.ratio * requests as f64;
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is neither large nor negative")]
        let share = share as u64;
        share.max(self.floor.into())
    }
}

impl Budget {
    /// Counts a request of a client's, under way until the guard is dropped.
    #[must_use]
    pub fn request(&self, now: Instant) -> Request {
        let mut state = self.state();
        state.slot_of(now).0 += 1;
        state.requests += 1;
        Request(self.clone())
    }

    /// Leave for one retry, under way until the guard is dropped; `None` if it would be more than the share.
    #[must_use]
    pub fn retry(&self, now: Instant, share: Share) -> Option<Retry> {
        let mut state = self.state();
        state.slot_of(now);
        let (requests, retries) = state.slots.iter().fold((0, 0), |sum, slot| (sum.0 + slot.0, sum.1 + slot.1));
        if state.retries >= share.of(state.requests) || retries >= share.of(requests) {
            return None;
        }
        state.slot_of(now).1 += 1;
        state.retries += 1;
        Some(Retry(self.clone()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The slot of `now`, with those emptied that have left the window. A clock that goes back is taken to stand.
    fn slot_of(&mut self, now: Instant) -> &mut (u64, u64) {
        let epoch = *self.epoch.get_or_insert(now);
        let each = WINDOW / u32::try_from(SLOTS).unwrap_or(1);
        let passed = now.saturating_duration_since(epoch).as_nanos() / each.as_nanos();
        let slot = u64::try_from(passed).unwrap_or(u64::MAX).max(self.slot);
        for gone in (self.slot..slot).take(self.slots.len()) {
            self.slots[index(gone + 1)] = (0, 0);
        }
        self.slot = slot;
        &mut self.slots[index(slot)]
    }
}

fn index(slot: u64) -> usize {
    usize::try_from(slot % SLOTS as u64).unwrap_or(0)
}

impl fmt::Debug for Budget {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.state().fmt(f)
    }
}

/// A request under way.
#[derive(Debug)]
pub struct Request(Budget);

impl Drop for Request {
    fn drop(&mut self) {
        self.0.state().requests -= 1;
    }
}

/// A retry under way.
#[derive(Debug)]
pub struct Retry(Budget);

impl Drop for Retry {
    fn drop(&mut self) {
        self.0.state().retries -= 1;
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const SHARE: Share = Share { ratio: 0.2, floor: 3 };

    fn now() -> Instant {
        Instant::now()
    }

    #[test]
    fn a_fifth_of_what_is_asked_may_be_asked_again() {
        let (budget, now) = (Budget::default(), now());
        let made = (0..1000)
            .filter(|_| {
                let _request = budget.request(now);
                budget.retry(now, SHARE).is_some()
            })
            .count();
        assert_eq!(made, 200);
    }

    #[test]
    fn who_is_rarely_asked_has_its_floor() {
        let (budget, start) = (Budget::default(), now());
        let made = |now| (0..10).filter(|_| budget.retry(now, SHARE).is_some()).count();
        let _request = budget.request(start);
        assert_eq!(made(start), 3);
        assert_eq!(made(start + WINDOW / 2), 0, "they still count");
        assert_eq!(made(start + WINDOW), 3);
    }

    #[test]
    fn what_hangs_is_not_asked_twice_by_everyone() {
        let (budget, now) = (Budget::default(), now());
        let _under_way: Vec<_> = (0..100).map(|_| budget.request(now)).collect();
        let held: Vec<_> = (0..100).map_while(|_| budget.retry(now, SHARE)).collect();
        assert_eq!(held.len(), 20);
        // Ten seconds later they still hang, although nothing of it is in the window.
        let later = now + WINDOW * 2;
        assert!(budget.retry(later, SHARE).is_none());
        drop(held);
        assert!(budget.retry(later, SHARE).is_some());
    }

    #[test]
    fn without_a_share_or_a_floor_there_is_none() {
        let (budget, now) = (Budget::default(), now());
        let _request = budget.request(now);
        assert!(budget.retry(now, Share { ratio: 0.0, floor: 0 }).is_none());
        assert!(budget.retry(now, Share { ratio: 1.0, floor: 0 }).is_some());
    }

    proptest! {
        /// In any order and at any pace: retries begun within any window are no more than the share of the requests of
        /// that window and of the slot before it, and what is under way returns to nothing.
        #[test]
        fn retries_stay_within_their_share(steps in vec((0..4_u8, 0..1500_u64), 1..400)) {
            let (budget, mut clock) = (Budget::default(), now());
            let (mut requests, mut retries) = (Vec::new(), Vec::new());
            let (mut asked, mut again) = (Vec::new(), Vec::new());
            for (what, millis) in steps {
                clock += Duration::from_millis(millis / 10);
                match what {
                    0 | 1 => {
                        requests.push(budget.request(clock));
                        asked.push(clock);
                    }
                    2 => {
                        if let Some(retry) = budget.retry(clock, SHARE) {
                            retries.push(retry);
                            again.push(clock);
                            let recent = |times: &[Instant]| {
                                times.iter().filter(|time| clock.duration_since(**time) < WINDOW).count() as u64
                            };
                            let slack = again.iter().filter(|time| clock.duration_since(**time) >= WINDOW * 9 / 10);
                            let slack = slack.filter(|time| clock.duration_since(**time) < WINDOW).count() as u64;
                            prop_assert!(recent(&again) - slack <= SHARE.of(recent(&asked)));
                            prop_assert!(retries.len() as u64 <= SHARE.of(requests.len() as u64));
                        }
                    }
                    _ if millis % 2 == 0 => drop(requests.pop()),
                    _ => drop(retries.pop()),
                }
            }
            drop((requests, retries));
            let state = budget.state();
            prop_assert_eq!((state.requests, state.retries), (0, 0));
        }
    }
}
