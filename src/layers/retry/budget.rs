//! How much may be sent again, so that retries do not become the load that keeps an upstream down.
//!
//! The retries that begin within [`WINDOW`] are at most a share of the requests that began within it (as tower's budget
//! and Finagle's). Below lies a floor, without which an upstream that is rarely asked would have no retries at all.
//!
//! Envoy bounds the retries under way by those requests under way instead. That refuses just the retries that cost
//! least: where one of three endpoints dies, all that were sent to it at that moment fail at once, and are more than a
//! fifth of the few that are under way. And it adds nothing: what hangs and is asked again when its time is over is a
//! request of its window too.

use std::{sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;

/// What lies longer ago counts no more: 10 seconds, as with tower and Finagle.
pub const WINDOW: Duration = Duration::from_secs(10);

const SLOTS: usize = 10;

/// The counts of one upstream, shared by all routes to it. Cheap to clone; clones are the same budget.
#[derive(Debug, Clone, Default)]
pub struct Budget(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    /// Where time is counted from: the first request.
    epoch: Option<Instant>,
    /// Requests and retries that began in each slot of the window.
    slots: [(u64, u64); SLOTS],
    /// The slot that is being counted in, from `epoch`.
    slot: u64,
}

/// How much.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Retries per request, 0 to 1.
    pub ratio: f64,
    /// So many retries are always allowed within [`WINDOW`].
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
    /// Counts a request of a client's.
    pub fn request(&self, now: Instant) {
        self.state().slot_of(now).0 += 1;
    }

    /// Counts a retry and returns true, unless it would be more than the share.
    #[must_use]
    pub fn retry(&self, now: Instant, share: Share) -> bool {
        let mut state = self.state();
        state.slot_of(now);
        let (requests, retries) = state.slots.iter().fold((0, 0), |sum, slot| (sum.0 + slot.0, sum.1 + slot.1));
        let allowed = retries < share.of(requests);
        state.slot_of(now).1 += u64::from(allowed);
        allowed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock()
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

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;

    const SHARE: Share = Share { ratio: 0.2, floor: 3 };

    fn now() -> Instant {
        Instant::now()
    }

    fn made(budget: &Budget, now: Instant) -> usize {
        (0..1000).take_while(|_| budget.retry(now, SHARE)).count()
    }

    #[test]
    fn a_fifth_of_what_is_asked_may_be_asked_again() {
        let (budget, now) = (Budget::default(), now());
        let again = |_: &u32| {
            budget.request(now);
            budget.retry(now, SHARE)
        };
        assert_eq!((0..1000).filter(again).count(), 200);
    }

    #[test]
    fn who_is_rarely_asked_has_its_floor() {
        let (budget, start) = (Budget::default(), now());
        budget.request(start);
        assert_eq!(made(&budget, start), 3);
        assert_eq!(made(&budget, start + WINDOW / 2), 0, "they still count");
        assert_eq!(made(&budget, start + WINDOW), 3);
    }

    #[test]
    fn what_failed_together_may_be_asked_again_together() {
        let (budget, start) = (Budget::default(), now());
        (0..200).for_each(|_| budget.request(start));
        assert_eq!(made(&budget, start + WINDOW / 2), 40, "however few are under way");
    }

    #[test]
    fn without_a_share_or_a_floor_there_is_none() {
        let (budget, now) = (Budget::default(), now());
        budget.request(now);
        assert!(!budget.retry(now, Share { ratio: 0.0, floor: 0 }));
        assert!(budget.retry(now, Share { ratio: 1.0, floor: 0 }));
    }

    proptest! {
        /// In any order and at any pace: retries begun within any window are no more than the share of the requests of
        /// that window and of the slot before it.
        #[test]
        fn retries_stay_within_their_share(steps in vec((0..3_u8, 0..150_u64), 1..400)) {
            let (budget, mut clock) = (Budget::default(), now());
            let (mut asked, mut again) = (Vec::new(), Vec::new());
            for (what, millis) in steps {
                clock += Duration::from_millis(millis);
                if what < 2 {
                    budget.request(clock);
                    asked.push(clock);
                } else if budget.retry(clock, SHARE) {
                    again.push(clock);
                    let since = |times: &[Instant], from: Duration| {
                        times.iter().filter(|time| clock.duration_since(**time) < from).count() as u64
                    };
                    let counted = since(&again, WINDOW * 9 / 10);
                    prop_assert!(counted <= SHARE.of(since(&asked, WINDOW)));
                }
            }
        }
    }
}
