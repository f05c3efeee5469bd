//! Whether Redis is asked: closed while it serves, open from its failure until a probe finds it well. Pure: the time is
//! handed in.
//!
//! No call is a probe. A task of the store's own probes, at once after what breaks for certain (a lost connection) and
//! after [`Config::recovery`] otherwise, then less and less often. So an outage costs the calls that were in flight
//! their deadline, and later ones nothing.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::{Duration, Instant};

use super::Charge;
use crate::config::{Check, HumanDuration, Problems};

/// When Redis is left alone, and how often it is probed then. Section `redis.breaker`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "RedisBreaker")]
pub struct Config {
    /// Calls without an answer in a row that open it, 1 to 1000. What is certain (a lost connection, `LOADING`,
    /// `READONLY`) opens it at once. Default 3.
    pub failures: NonZeroU32,
    /// How long after it opened, and after the first failed probe, Redis is probed, 10ms to 1m. Doubles up to
    /// `max_recovery`. Default `100ms`.
    pub recovery: HumanDuration,
    /// The longest time between two probes; not below `recovery`, at most 10m. Default `250ms`.
    pub max_recovery: HumanDuration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            failures: NonZeroU32::new(3).unwrap_or(NonZeroU32::MIN),
            recovery: HumanDuration::from_millis(100),
            max_recovery: HumanDuration::from_millis(250),
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if self.failures.get() > 1000 {
            problems.add("failures", "must be at most 1000");
        }
        if !(Duration::from_millis(10)..=Duration::from_secs(60)).contains(&self.recovery.get()) {
            problems.add("recovery", format!("is {}: must be from 10ms to 1m", self.recovery));
        }
        if self.max_recovery < self.recovery {
            problems.add("max_recovery", format!("must be at least `recovery` ({})", self.recovery));
        } else if self.max_recovery.get() > Duration::from_secs(600) {
            problems.add("max_recovery", "must be at most 10m");
        }
    }
}

/// The state. It begins open, with a probe due: nothing is known of Redis.
#[derive(Debug)]
pub struct Breaker {
    config: Config,
    /// When the next probe is due; none while it is closed.
    open: Option<Instant>,
    failures: u32,
    wait: Duration,
    /// Counts the times that it closed. What began before is no news afterwards.
    generation: u64,
}

impl Breaker {
    /// Open, with a probe due at once.
    #[must_use]
    pub fn new(config: Config, now: Instant) -> Self {
        let wait = config.recovery.get();
        Self { config, open: Some(now), failures: 0, wait, generation: 0 }
    }

    /// When the next probe is due; none while calls pass.
    #[must_use]
    pub fn probe_at(&self) -> Option<Instant> {
        self.open
    }

    /// Counts the times that it closed.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// A call of the present generation was answered.
    pub fn success(&mut self, generation: u64) {
        if generation == self.generation && self.open.is_none() {
            self.failures = 0;
            self.wait = self.config.recovery.get();
        }
    }

    /// A call that began in `generation` failed so. True where that opens the breaker.
    pub fn failure(&mut self, charge: Charge, generation: u64, now: Instant) -> bool {
        if generation != self.generation || self.open.is_some() {
            return false;
        }
        match charge {
            Charge::Nothing => false,
            Charge::Counts => {
                self.failures += 1;
                let opens = self.failures >= self.config.failures.get();
                if opens {
                    self.open = Some(now + self.step());
                }
                opens
            }
            Charge::Trips => {
                // The first probe at once, where it had been well for long enough to answer a call.
                let first = self.wait == self.config.recovery.get();
                self.open = Some(if first { now } else { now + self.step() });
                true
            }
        }
    }

    /// A probe ended. `Some` with the new generation where that closes the breaker.
    pub fn probed(&mut self, well: bool, now: Instant) -> Option<u64> {
        self.open?;
        if !well {
            self.open = Some(now + self.step());
            return None;
        }
        self.open = None;
        self.failures = 0;
        self.generation += 1;
        // `wait` stays until a call is answered: a Redis that answers probes and no calls is asked ever less often.
        Some(self.generation)
    }

    fn step(&mut self) -> Duration {
        let wait = self.wait;
        self.wait = (wait * 2).min(self.config.max_recovery.get());
        wait
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn closed(now: Instant) -> Breaker {
        let mut breaker = Breaker::new(Config::default(), now);
        assert_eq!(breaker.probe_at(), Some(now), "it is asked first");
        assert_eq!(breaker.probed(true, now), Some(1));
        breaker
    }

    #[test]
    fn so_many_in_a_row_open_it() {
        let now = Instant::now();
        let mut breaker = closed(now);
        assert!(!breaker.failure(Charge::Counts, 1, now));
        assert!(!breaker.failure(Charge::Counts, 1, now));
        breaker.success(1);
        assert!(!breaker.failure(Charge::Nothing, 1, now));
        assert!(!breaker.failure(Charge::Counts, 1, now));
        assert!(!breaker.failure(Charge::Counts, 1, now));
        assert!(breaker.failure(Charge::Counts, 1, now));
        assert!(!breaker.failure(Charge::Counts, 1, now), "once");
        assert_eq!(breaker.probe_at(), Some(now + ms(100)));
    }

    #[test]
    fn probes_come_less_and_less_often() {
        let mut now = Instant::now();
        let mut breaker = closed(now);
        assert!(breaker.failure(Charge::Trips, 1, now));
        assert_eq!(breaker.probe_at(), Some(now), "the first at once");
        for wait in [100, 200, 250, 250] {
            assert_eq!(breaker.probed(false, now), None);
            assert_eq!(breaker.probe_at(), Some(now + ms(wait)));
            now += ms(wait);
        }
        assert_eq!(breaker.probed(true, now), Some(2));
        assert_eq!(breaker.probe_at(), None);
        assert!(breaker.failure(Charge::Trips, 2, now));
        assert_eq!(breaker.probe_at(), Some(now + ms(250)), "it answered a probe and no call");
        breaker.probed(true, now);
        breaker.success(3);
        assert!(breaker.failure(Charge::Trips, 3, now));
        assert_eq!(breaker.probe_at(), Some(now));
    }

    #[test]
    fn what_began_before_is_no_news() {
        let now = Instant::now();
        let mut breaker = closed(now);
        breaker.failure(Charge::Trips, 1, now);
        breaker.probed(true, now);
        assert!(!breaker.failure(Charge::Trips, 1, now));
        assert_eq!(breaker.probe_at(), None);
    }

    proptest! {
        #[test]
        fn an_open_breaker_always_has_a_probe_to_come(steps in prop::collection::vec((0..4u8, 0..2000u64), 0..200)) {
            let mut now = Instant::now();
            let mut breaker = Breaker::new(Config::default(), now);
            let mut generation = 0;
            for (what, later) in steps {
                now += ms(later);
                match what {
                    0 => breaker.success(generation),
                    1 => drop(breaker.failure(Charge::Counts, generation, now)),
                    2 => drop(breaker.failure(Charge::Trips, generation, now)),
                    _ => if let Some(next) = breaker.probed(later % 2 == 0, now) { generation = next },
                }
                if let Some(at) = breaker.probe_at() {
                    prop_assert!(at <= now + ms(1000), "within `max_recovery`");
                }
            }
        }
    }
}
