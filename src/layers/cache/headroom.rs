//! How much of Redis answers, and copies of streams, may take. Limits, sessions and marks of purges live there too, and
//! anybody can have answers kept by asking for them: where they filled it, the others would have no room.
//!
//! Redis is asked how full it is behind the requests, by who writes answers, and only while there are some to write.

use tokio::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::{info, warn};

use crate::store::{Failure, Memory, Redis};

/// So much of `maxmemory` may be in use for an answer to be written, in percent.
const FILLED: u64 = 85;
/// And so much for the first one after it was more.
const EMPTIED: u64 = 80;
/// Between two looks.
const LOOKS: Duration = Duration::from_secs(1);
/// The same where half of the room that there was has been used since.
const SOON: Duration = Duration::from_millis(100);
/// For how long nothing is written after Redis took no more.
const PAUSE: Duration = Duration::from_secs(5);
/// Until it is asked again where its user may not ask.
const NEVER: Duration = Duration::from_secs(3600);

/// The room that there is for answers in a Redis.
pub(super) struct Headroom(Mutex<State>);

struct State {
    looked: Instant,
    /// When to look again.
    due: Instant,
    /// How many bytes may be written until then.
    left: u64,
    is_full: bool,
    /// The operator knows that it is.
    told: bool,
}

impl Headroom {
    pub(super) fn new() -> Self {
        let now = Instant::now();
        Self(Mutex::new(State { looked: now, due: now, left: 0, is_full: false, told: false }))
    }

    /// Whether there is room for so many bytes, which then are taken. May wait for Redis.
    pub(super) async fn has(&self, redis: &Redis, bytes: usize) -> bool {
        if self.0.lock().is_due(bytes, Instant::now()) {
            let memory = redis.memory().await;
            self.0.lock().looked(memory, Instant::now());
        }
        self.0.lock().take(bytes)
    }

    /// Notes what became of a write.
    pub(super) fn wrote<T>(&self, outcome: &Result<T, Failure>) {
        self.0.lock().wrote(outcome.as_ref().err().copied(), Instant::now());
    }
}

impl State {
    fn is_due(&self, bytes: usize, now: Instant) -> bool {
        now >= self.due || !self.is_full && bytes as u64 > self.left && now >= self.looked + SOON
    }

    fn looked(&mut self, memory: Result<Option<Memory>, Failure>, now: Instant) {
        (self.looked, self.due, self.left) = (now, now + LOOKS, u64::MAX);
        match memory {
            Ok(Some(Memory { used, max })) => {
                let part = if self.is_full { EMPTIED } else { FILLED };
                let free = (max / 100 * part).saturating_sub(used);
                // The other half is for other replicas. Not less than a hundredth: the bound is to be met.
                self.left = (free / 2).max(max / 100);
                self.is_full = free == 0;
                if self.is_full {
                    self.tell("redis is nearly full");
                }
            }
            Ok(None) => self.is_full = false,
            Err(Failure::Forbidden) => {
                self.is_full = false;
                self.due = now + NEVER;
            }
            // It may be out of order for a moment: as before.
            Err(_) => {}
        }
    }

    fn take(&mut self, bytes: usize) -> bool {
        let left = self.left.checked_sub(bytes as u64).filter(|_| !self.is_full);
        self.left = left.unwrap_or(self.left);
        left.is_some()
    }

    fn wrote(&mut self, failure: Option<Failure>, now: Instant) {
        match failure {
            Some(Failure::Full) => {
                (self.is_full, self.due) = (true, now + PAUSE);
                self.tell("redis takes no more");
            }
            None if self.told && !self.is_full => {
                self.told = false;
                info!("answers are kept in redis again");
            }
            _ => {}
        }
    }

    /// Once, until there is room again.
    fn tell(&mut self, why: &'static str) {
        if !self.told {
            self.told = true;
            warn!(
                why,
                "no more answers are kept in redis: limits, sessions and purges need the rest of its `maxmemory`"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAX: u64 = 1_000_000;

    fn used(percent: u64) -> Memory {
        Memory { used: MAX / 100 * percent, max: MAX }
    }

    fn state() -> (State, Instant) {
        let now = Instant::now();
        (State { looked: now, due: now, left: 0, is_full: false, told: false }, now)
    }

    #[test]
    fn it_is_asked_once_a_second_and_where_half_the_room_was_used() {
        let (mut state, start) = state();
        assert!(state.is_due(1, start), "nobody knows yet");
        state.looked(Ok(Some(used(65))), start);
        assert!(state.take(60_000) && state.take(40_000), "half of 20 %");
        assert!(!state.is_due(1, start), "not for each");
        assert!(!state.take(1));
        assert!(state.is_due(1, start + SOON));
        state.looked(Ok(Some(used(75))), start + SOON);
        assert!(state.take(50_000) && !state.take(1));
        let (mut state, start) = self::state();
        state.looked(Ok(Some(used(10))), start);
        assert!(!state.is_due(1000, start + LOOKS - SOON) && state.is_due(1000, start + LOOKS));
    }

    #[test]
    fn what_was_nearly_full_has_room_when_it_is_less_so() {
        let (mut state, start) = state();
        state.looked(Ok(Some(used(85))), start);
        assert!(!state.take(1) && state.told);
        assert!(!state.is_due(1, start + SOON), "once a second");
        state.looked(Ok(Some(used(81))), start + LOOKS);
        assert!(!state.take(1));
        // Out of order for a moment.
        state.looked(Err(Failure::Timeout), start + LOOKS);
        assert!(!state.take(1));
        state.looked(Ok(Some(used(79))), start + LOOKS);
        assert!(state.take(1) && state.told);
        state.wrote(None, start + LOOKS);
        assert!(!state.told);
        state.looked(Ok(Some(used(84))), start + LOOKS);
        assert!(state.take(1), "as before it was full");
    }

    #[test]
    fn where_it_took_no_more_nothing_is_written_for_a_while() {
        for memory in [Ok(None), Err(Failure::Forbidden)] {
            let (mut state, start) = state();
            state.looked(memory, start);
            assert!(state.take(usize::MAX), "nobody knows a bound");
            state.wrote(Some(Failure::Full), start);
            // Others that were on their way.
            state.wrote(None, start);
            assert!(!state.take(1) && state.told);
            assert!(!state.is_due(1, start + PAUSE - SOON) && state.is_due(1, start + PAUSE));
            state.looked(memory, start + PAUSE);
            assert!(state.take(1));
        }
    }
}
