//! The adaptive limit, without clock, lock or log of its own: samples and `now` are handed in.
//!
//! Netflix's [Gradient2](https://github.com/Netflix/concurrency-limits): the limit follows the ratio of what the first
//! byte took over a long time to what it takes now. Its elder, the gradient of the lowest time ever seen (Envoy's
//! adaptive concurrency too), has to measure that lowest time again and again by letting hardly anything through, which
//! clients see as a burst of 503s, and whose one lucky sample (an answer out of a cache) holds the limit down ever after.
//! A long average needs neither.
//!
//! Its price: overload that lasts as long as the average looks back is taken for normal. The ceiling holds all the same.

use std::{num::NonZeroU32, time::Duration};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;

/// How often the limit moves at most: what is between is averaged, and says more than single answers do.
const STEP: Duration = Duration::from_secs(1);
/// The samples without which a step says nothing.
const MIN_SAMPLES: u32 = 10;
/// Steps that the long average looks back: ten minutes, under load.
const LONG: f64 = 600.0;
/// Steps of a plain average before the long one begins.
const WARM_UP: u32 = 10;
/// How much later than usual a first byte may be before the limit falls.
const TOLERANCE: f64 = 1.5;
/// How much of a step's finding is believed.
const SMOOTHING: f64 = 0.2;
/// By how much the limit would grow in a step, were it not smoothed.
const ROOM: f64 = 4.0;
/// Where the limit begins, within its bounds.
const START: f64 = 20.0;

/// Whether and how low the limit follows the upstream. Section `adaptive` of `concurrency`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "AdaptiveConcurrency")]
pub struct Config {
    /// The lowest that the limit falls to, at least 1 and at most `max_in_flight`, which is the highest. Default 1.
    pub min: NonZeroU32,
}

impl Default for Config {
    fn default() -> Self {
        Self { min: NonZeroU32::MIN }
    }
}

/// A limit that follows the time to the first byte.
#[derive(Debug)]
pub(super) struct Gradient {
    min: f64,
    max: f64,
    limit: f64,
    long: f64,
    steps: u32,
    /// The step that is being measured.
    began: Instant,
    sum: f64,
    samples: u32,
    most_in_flight: u32,
}

impl Gradient {
    pub(super) fn new(min: NonZeroU32, max: NonZeroU32, now: Instant) -> Self {
        let (min, max) = bounds(min, max);
        Self {
            min,
            max,
            limit: START.clamp(min, max),
            long: 0.0,
            steps: 0,
            began: now,
            sum: 0.0,
            samples: 0,
            most_in_flight: 0,
        }
    }

    /// Other bounds; what was learnt is kept.
    pub(super) fn adopt(&mut self, min: NonZeroU32, max: NonZeroU32) {
        (self.min, self.max) = bounds(min, max);
        self.limit = self.limit.clamp(self.min, self.max);
    }

    /// The whole requests that may be in flight.
    pub(super) fn limit(&self) -> u32 {
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is within the bounds, of u32")]
        let whole = self.limit as u32;
        whole
    }

    /// A first byte took `took` while so many were in flight.
    pub(super) fn sample(&mut self, took: Duration, in_flight: u32, now: Instant) {
        self.sum += took.as_secs_f64();
        self.samples += 1;
        self.most_in_flight = self.most_in_flight.max(in_flight);
        if self.samples >= MIN_SAMPLES && now.saturating_duration_since(self.began) >= STEP {
            let short = (self.sum / f64::from(self.samples)).max(1e-6);
            let most = f64::from(self.most_in_flight);
            (self.began, self.sum, self.samples, self.most_in_flight) = (now, 0.0, 0, 0);
            self.step(short, most);
        }
    }

    fn step(&mut self, short: f64, most_in_flight: f64) {
        self.steps = self.steps.saturating_add(1);
        let weight = if self.steps <= WARM_UP { 1.0 / f64::from(self.steps) } else { 2.0 / (LONG + 1.0) };
        self.long += (short - self.long) * weight;
        // After a long overload the average must not stay so high that the next one is not noticed.
        if self.long / short > 2.0 {
            self.long *= 0.95;
        }
        // Where the limit was not in anybody's way, nothing was learnt about it.
        if most_in_flight < self.limit / 2.0 {
            return;
        }
        let gradient = (TOLERANCE * self.long / short).clamp(0.5, 1.0);
        let found = self.limit * gradient + ROOM;
        self.limit = (self.limit * (1.0 - SMOOTHING) + found * SMOOTHING).clamp(self.min, self.max);
    }
}

fn bounds(min: NonZeroU32, max: NonZeroU32) -> (f64, f64) {
    (f64::from(min.min(max).get()), f64::from(max.get()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn count(count: u32) -> NonZeroU32 {
        NonZeroU32::new(count).unwrap()
    }

    /// So many steps in which every first byte takes as long as `millis` says for the limit, and the limit is used up.
    fn play(gradient: &mut Gradient, now: &mut Instant, steps: u32, millis: impl Fn(u32) -> u64) {
        for _ in 0..steps {
            *now += STEP;
            for _ in 0..MIN_SAMPLES {
                let limit = gradient.limit();
                gradient.sample(Duration::from_millis(millis(limit)), limit, *now);
            }
        }
    }

    #[test]
    fn it_grows_to_its_ceiling_while_nothing_is_slower_than_usual() {
        let mut now = Instant::now();
        let mut gradient = Gradient::new(count(1), count(100), now);
        assert_eq!(gradient.limit(), 20);
        play(&mut gradient, &mut now, 200, |_| 50);
        assert_eq!(gradient.limit(), 100);
    }

    #[test]
    fn it_falls_when_first_bytes_come_late_and_recovers_when_they_do_not() {
        let mut now = Instant::now();
        let mut gradient = Gradient::new(count(4), count(100), now);
        play(&mut gradient, &mut now, 200, |_| 50);
        play(&mut gradient, &mut now, 30, |_| 500);
        assert!(gradient.limit() < 15, "{}", gradient.limit());
        assert!(gradient.limit() >= 4);
        play(&mut gradient, &mut now, 200, |_| 50);
        assert_eq!(gradient.limit(), 100);
    }

    #[test]
    fn it_settles_where_the_upstream_begins_to_queue() {
        let mut now = Instant::now();
        let mut gradient = Gradient::new(count(1), count(1000), now);
        // Forty at a time take 100 ms; beyond, they wait for each other.
        play(&mut gradient, &mut now, 120, |limit| 100 * u64::from(limit.max(40)) / 40);
        assert!((40..=160).contains(&gradient.limit()), "{}", gradient.limit());
    }

    #[test]
    fn a_limit_that_is_in_nobodys_way_stays() {
        let mut now = Instant::now();
        let mut gradient = Gradient::new(count(1), count(100), now);
        for _ in 0..50 {
            now += STEP;
            for _ in 0..MIN_SAMPLES {
                gradient.sample(Duration::from_millis(5), 3, now);
            }
        }
        assert_eq!(gradient.limit(), 20);
    }

    #[test]
    fn a_few_answers_say_nothing() {
        let mut now = Instant::now();
        let mut gradient = Gradient::new(count(1), count(100), now);
        for _ in 1..MIN_SAMPLES {
            now += STEP;
            gradient.sample(Duration::from_secs(60), 20, now);
        }
        assert_eq!(gradient.limit(), 20);
    }

    proptest! {
        #[test]
        fn it_keeps_within_its_bounds(
            min in 1..50_u32,
            more in 0..500_u32,
            samples in proptest::collection::vec((0..100_000_u64, 0..1000_u32, 0..3000_u64), 0..300),
        ) {
            let mut now = Instant::now();
            let mut gradient = Gradient::new(count(min), count(min + more), now);
            for (millis, in_flight, later) in samples {
                now += Duration::from_millis(later);
                gradient.sample(Duration::from_millis(millis), in_flight, now);
                prop_assert!((min..=min + more).contains(&gradient.limit()));
            }
        }
    }
}
