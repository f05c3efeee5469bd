//! How limits count: pure arithmetic over counters that are handed in, with the time.
//!
//! Three ways. The **sliding window** counts in windows that are aligned to the clock, and takes the one before this one
//! into account by the part of it that is still within reach: `before · (1 - elapsed/per) + used`. It lets at most
//! `limit` pass in any window if requests come evenly, and forgets nothing at a boundary. The **token bucket** is GCRA
//! in its form as a continuous-state leaky bucket (ITU-T I.371, the two are equivalent): a level that sinks evenly, and
//! that no request may lift above `burst`. **In flight** counts what has not ended.
//!
//! Several limits are asked in one step: either all that are enforced have room, and all are used, or none is.
//!
//! Times are whole microseconds, amounts whole numbers, both as `f64`, as Redis has them in Lua: exact below 2^53.
//! `script.lua` does the same, line for line; a test holds the two against each other.

use std::time::Duration;

/// How an amount is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Algorithm {
    /// In this window and the one before.
    SlidingWindow,
    /// As a level that sinks.
    TokenBucket,
    /// As what has not ended.
    InFlight,
}

/// What may be used.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Quota {
    /// How it is counted.
    pub algorithm: Algorithm,
    /// How much, in `per`; or at once, of what is in flight.
    pub limit: f64,
    /// In how many microseconds. For what is in flight: how long a lease lives that nobody renews.
    pub per: f64,
    /// How much at once, of a bucket.
    pub burst: f64,
}

/// What was used. None is there while nothing was.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Counter {
    /// Of a sliding window.
    Window {
        /// Which window since the epoch.
        index: u64,
        /// Used in the one before.
        before: f64,
        /// Used in it.
        used: f64,
    },
    /// Of a token bucket.
    Bucket {
        /// When it was at this level.
        at: f64,
        /// What is in it.
        level: f64,
    },
    /// What is in flight.
    InFlight(f64),
}

/// What a request asks of one limit.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Demand {
    /// The limit.
    pub quota: Quota,
    /// How much, at most what the limit can ever give.
    pub cost: f64,
    /// Whether the request passes although there is no room.
    pub shadow: bool,
}

/// What one limit says to a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Whether there is room.
    pub fits: bool,
    /// How much is left, after this request if it passed.
    pub remaining: u64,
    /// In how long the limit is what it was at first, or this window ends. Zero for what is in flight.
    pub reset: Duration,
    /// Where there is no room: when there is, if nobody else takes it. Unknown for what is in flight.
    pub wait: Option<Duration>,
}

/// What all limits say together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// Whether all that are enforced have room. Then all that have room were used, else none.
    pub passes: bool,
    /// Of each, in the order of the demands.
    pub verdicts: Vec<Verdict>,
}

impl Quota {
    /// The most that can be asked for at once.
    #[must_use]
    pub fn most(&self) -> f64 {
        match self.algorithm {
            Algorithm::TokenBucket => self.burst,
            Algorithm::SlidingWindow | Algorithm::InFlight => self.limit,
        }
    }

    /// The part of it that one of `replicas` has, at least 1.
    #[must_use]
    pub fn share(&self, replicas: u32) -> Self {
        let part = |whole: f64| (whole / f64::from(replicas.max(1))).floor().max(1.0);
        Self { limit: part(self.limit), burst: part(self.burst), ..*self }
    }

    fn index(&self, at: f64) -> u64 {
        whole(at / self.per)
    }

    /// Of the window of this index, what has passed; below nothing where a clock that went back is still before it.
    fn elapsed(&self, index: u64, now: f64) -> f64 {
        now - amount(index) * self.per
    }

    /// The counter as it is now.
    fn bring(&self, counter: Option<Counter>, now: f64) -> Counter {
        match (self.algorithm, counter) {
            (Algorithm::SlidingWindow, counter) => {
                let this = self.index(now);
                match counter {
                    // The clock may have gone back, as where another Redis takes over at the end of a window: what was
                    // counted in the next one goes on there, and nothing of it is over. By more, it begins with that.
                    Some(Counter::Window { index, before, used }) if index >= this => {
                        Counter::Window { index: index.min(this + 1), before, used }
                    }
                    Some(Counter::Window { index, used, .. }) if index + 1 == this => {
                        Counter::Window { index: this, before: used, used: 0.0 }
                    }
                    _ => Counter::Window { index: this, before: 0.0, used: 0.0 },
                }
            }
            (Algorithm::TokenBucket, Some(Counter::Bucket { at, level })) => {
                let sunk = (now - at).max(0.0) * self.limit / self.per;
                Counter::Bucket { at: now, level: (level - sunk).max(0.0) }
            }
            (Algorithm::TokenBucket, _) => Counter::Bucket { at: now, level: 0.0 },
            (Algorithm::InFlight, Some(counter @ Counter::InFlight(_))) => counter,
            (Algorithm::InFlight, _) => Counter::InFlight(0.0),
        }
    }

    /// How much is used at `now`, of a counter brought there.
    fn used(&self, counter: Counter, now: f64) -> f64 {
        match counter {
            Counter::Window { index, before, used } => {
                before * (self.per - self.elapsed(index, now).max(0.0)) / self.per + used
            }
            Counter::Bucket { level, .. } => level,
            Counter::InFlight(count) => count,
        }
    }

    /// In how long there is room for `cost`, where there is none now.
    fn wait(&self, counter: Counter, cost: f64, now: f64) -> Option<f64> {
        match counter {
            Counter::Window { index, before, used } => {
                let (elapsed, room) = (self.elapsed(index, now), self.limit - used - cost);
                if room >= 0.0 {
                    Some(self.per * (1.0 - room / before) - elapsed)
                } else {
                    // Not in this window: in the next, of which this one is the one before.
                    let reach = if used > 0.0 { (1.0 - (self.limit - cost) / used).max(0.0) } else { 0.0 };
                    Some(self.per - elapsed + self.per * reach)
                }
            }
            Counter::Bucket { level, .. } => Some((level + cost - self.burst) * self.per / self.limit),
            Counter::InFlight(_) => None,
        }
    }

    fn reset(&self, counter: Counter, taken: f64, now: f64) -> f64 {
        match counter {
            Counter::Window { index, .. } => self.per - self.elapsed(index, now),
            Counter::Bucket { level, .. } => (level + taken) * self.per / self.limit,
            Counter::InFlight(_) => 0.0,
        }
    }

    /// For how many microseconds from `now` the counter says anything.
    #[must_use]
    pub fn lives(&self, counter: Counter, now: f64) -> f64 {
        match counter {
            Counter::Window { index, .. } => amount(index + 2) * self.per - now,
            Counter::Bucket { at, level } => level * self.per / self.limit - (now - at),
            Counter::InFlight(count) if count > 0.0 => IN_FLIGHT,
            Counter::InFlight(_) => 0.0,
        }
    }

    /// The counter after `change` was added: more is used, or less. What is given back goes to where it was taken at
    /// `taken`, if that still counts; what is charged counts from now on. Never below nothing.
    #[must_use]
    pub fn settle(&self, counter: Option<Counter>, change: f64, taken: f64, now: f64) -> Counter {
        match self.bring(counter, now) {
            Counter::Window { index, before, used } => {
                let of = self.index(taken);
                if change >= 0.0 || of >= index {
                    Counter::Window { index, before, used: (used + change).max(0.0) }
                } else if of + 1 == index {
                    Counter::Window { index, before: (before + change).max(0.0), used }
                } else {
                    Counter::Window { index, before, used }
                }
            }
            Counter::Bucket { at, level } => Counter::Bucket { at, level: (level + change).max(0.0) },
            Counter::InFlight(count) => Counter::InFlight((count + change).max(0.0)),
        }
    }

    /// What the limit says to who only looks.
    #[must_use]
    pub fn look(&self, counter: Option<Counter>, now: f64) -> Verdict {
        let counter = self.bring(counter, now);
        self.verdict(counter, 0.0, 1.0, now)
    }

    /// Of a counter brought to `now`, of which `taken` will be used, and where `cost` did or did not fit.
    fn verdict(&self, counter: Counter, taken: f64, cost: f64, now: f64) -> Verdict {
        let used = self.used(counter, now);
        let fits = used + cost <= self.most();
        let wait = if fits { None } else { self.wait(counter, cost, now) };
        Verdict {
            fits,
            remaining: whole((self.most() - used - taken).max(0.0)),
            reset: micros(self.reset(counter, taken, now)),
            // One more, for what is rounded.
            wait: wait.map(|wait| micros(wait.max(0.0).ceil() + 1.0)),
        }
    }
}

/// As good as for ever: what is in flight is there until it ends.
const IN_FLIGHT: f64 = 86_400e6 * 365.0;

/// Asks several limits in one step. `counters` are those of the `demands`, at the same places; those that were not used
/// stay as they are.
pub fn take(counters: &mut [Option<Counter>], demands: &[Demand], now: f64) -> Decision {
    let verdict = |(counter, demand): (&Option<Counter>, &Demand)| {
        demand.quota.verdict(demand.quota.bring(*counter, now), 0.0, demand.cost, now)
    };
    let mut verdicts: Vec<_> = counters.iter().zip(demands).map(verdict).collect();
    let passes = verdicts.iter().zip(demands).all(|(verdict, demand)| verdict.fits || demand.shadow);
    let used = counters.iter_mut().zip(&mut verdicts).zip(demands);
    // Who asks for nothing only looks.
    let is_used = |verdict: &Verdict, demand: &Demand| passes && verdict.fits && demand.cost > 0.0;
    for ((counter, verdict), Demand { quota, cost, .. }) in
        used.filter(|((_, verdict), demand)| is_used(verdict, demand))
    {
        *verdict = quota.verdict(quota.bring(*counter, now), *cost, *cost, now);
        *counter = Some(quota.settle(*counter, *cost, now, now));
    }
    Decision { passes, verdicts }
}

/// A time as it is counted here.
#[expect(clippy::cast_precision_loss, reason = "microseconds of 285 years")]
#[must_use]
pub fn as_micros(time: Duration) -> f64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX) as f64
}

/// An amount as it is counted here.
#[expect(clippy::cast_precision_loss, reason = "the configuration allows up to 2^52")]
#[must_use]
pub const fn amount(count: u64) -> f64 {
    count as f64
}

/// A time that was counted here.
#[must_use]
pub fn micros(time: f64) -> Duration {
    Duration::from_micros(whole(time))
}

/// The whole number below.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a cast saturates, and 0 is meant below 0")]
#[must_use]
pub const fn whole(amount: f64) -> u64 {
    amount as u64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: f64 = 1e6;

    fn quota(algorithm: Algorithm, limit: u32, seconds: u32) -> Quota {
        let (limit, per) = (f64::from(limit), f64::from(seconds) * SECOND);
        Quota { algorithm, limit, per, burst: limit }
    }

    fn one(quota: Quota) -> Demand {
        Demand { quota, cost: 1.0, shadow: false }
    }

    /// Asks a single limit once.
    fn ask(counter: &mut Option<Counter>, demand: Demand, now: f64) -> Verdict {
        let mut counters = [*counter];
        let decision = take(&mut counters, &[demand], now);
        [*counter] = counters;
        assert_eq!(decision.passes, decision.verdicts[0].fits || demand.shadow);
        decision.verdicts[0]
    }

    #[test]
    fn a_window_lets_its_limit_pass_and_remembers_the_one_before() {
        let (demand, mut counter) = (one(quota(Algorithm::SlidingWindow, 10, 60)), None);
        for left in (0..10).rev() {
            assert_eq!(ask(&mut counter, demand, 90.0 * SECOND).remaining, left);
        }
        let refused = ask(&mut counter, demand, 90.0 * SECOND);
        assert!(!refused.fits);
        assert_eq!((refused.remaining, refused.reset), (0, Duration::from_secs(30)));
        // At its end, ten weigh whole; one of them has gone after a tenth of the next.
        assert_eq!(refused.wait, Some(Duration::from_secs(36) + Duration::from_micros(1)));
        assert!(!ask(&mut counter, demand, 125.9 * SECOND).fits);
        assert!(ask(&mut counter, demand, 126.0 * SECOND).fits);
        assert!(!ask(&mut counter, demand, 126.1 * SECOND).fits, "one for each six seconds");
        assert!(ask(&mut counter, demand, 400.0 * SECOND).remaining == 9, "later windows know nothing of it");
    }

    #[test]
    fn a_bucket_lets_its_burst_pass_and_then_one_after_the_other() {
        let quota = Quota { burst: 3.0, ..quota(Algorithm::TokenBucket, 60, 60) };
        let (demand, mut counter) = (one(quota), None);
        for left in (0..3).rev() {
            assert_eq!(ask(&mut counter, demand, 5.0 * SECOND).remaining, left);
        }
        let refused = ask(&mut counter, demand, 5.0 * SECOND);
        assert_eq!(refused.wait, Some(Duration::from_secs(1) + Duration::from_micros(1)));
        assert!(!ask(&mut counter, demand, 5.999 * SECOND).fits);
        assert!(ask(&mut counter, demand, 6.0 * SECOND).fits);
        assert_eq!(ask(&mut counter, demand, 500.0 * SECOND).remaining, 2, "no more than the burst is saved up");
        assert!(ask(&mut counter, demand, 400.0 * SECOND).fits, "a clock that goes back does no harm");
    }

    #[test]
    fn what_is_refused_by_one_limit_has_used_nothing_of_the_others() {
        let [mut wide, mut narrow, mut shadow] = [None, None, None];
        let (w, n) = (one(quota(Algorithm::SlidingWindow, 100, 60)), one(quota(Algorithm::TokenBucket, 2, 60)));
        let s = Demand { shadow: true, ..one(quota(Algorithm::SlidingWindow, 1, 60)) };
        let mut passed = 0;
        for _ in 0..10 {
            let mut counters = [wide, narrow, shadow];
            let decision = take(&mut counters, &[w, n, s], SECOND);
            [wide, narrow, shadow] = counters;
            passed += u32::from(decision.passes);
        }
        assert_eq!(passed, 2);
        assert_eq!(w.quota.look(wide, SECOND).remaining, 98);
        assert_eq!(s.quota.look(shadow, SECOND).remaining, 0, "a shadow counts what it would let pass");
    }

    #[test]
    fn what_was_not_used_is_given_back_where_it_was_taken() {
        let quota = quota(Algorithm::SlidingWindow, 100, 60);
        let mut counter = None;
        ask(&mut counter, Demand { cost: 80.0, ..one(quota) }, 10.0 * SECOND);
        let same = quota.settle(counter, -50.0, 10.0 * SECOND, 20.0 * SECOND);
        assert_eq!(quota.look(Some(same), 20.0 * SECOND).remaining, 70);
        let next = quota.settle(counter, -50.0, 10.0 * SECOND, 90.0 * SECOND);
        assert_eq!(quota.look(Some(next), 90.0 * SECOND).remaining, 85, "half of 30 is still within reach");
        let late = quota.settle(counter, -50.0, 10.0 * SECOND, 190.0 * SECOND);
        assert_eq!(quota.look(Some(late), 190.0 * SECOND).remaining, 100);
        let more = quota.settle(counter, 50.0, 10.0 * SECOND, 90.0 * SECOND);
        assert_eq!(quota.look(Some(more), 90.0 * SECOND).remaining, 10, "40 of the 80, and 50 now");
    }

    #[test]
    fn a_clock_that_goes_back_over_a_boundary_forgets_nothing() {
        let (quota, mut counter) = (quota(Algorithm::SlidingWindow, 10, 60), None);
        ask(&mut counter, Demand { cost: 6.0, ..one(quota) }, 119.0 * SECOND);
        ask(&mut counter, Demand { cost: 4.0, ..one(quota) }, 120.0 * SECOND);
        let refused = ask(&mut counter, one(quota), 119.9 * SECOND);
        assert!(!refused.fits);
        assert_eq!(refused.reset, Duration::from_millis(60_100), "the end of the window that it counts in");
        // A tenth of a second, until that window begins, and a sixth of it, until one of the six has gone.
        assert_eq!(refused.wait, Some(Duration::from_millis(10_100) + Duration::from_micros(1)));
        assert!(ask(&mut counter, one(quota), 130.0 * SECOND).fits);
        let back = quota.settle(counter, -4.0, 120.0 * SECOND, 119.9 * SECOND);
        assert_eq!(quota.look(Some(back), 119.9 * SECOND).remaining, 3, "6, and 1 of 5");
        // By hours: what it counted holds for this window, and not for hours.
        let long_ago = 1000.0 * SECOND;
        let mut ahead = Some(Counter::Window { index: 999, before: 0.0, used: 9.0 });
        assert!(ask(&mut ahead, one(quota), long_ago).fits && !ask(&mut ahead, one(quota), long_ago).fits);
        assert!(quota.lives(ahead.unwrap(), long_ago) <= 180.0 * SECOND);
        assert!(ask(&mut ahead, one(quota), long_ago + 180.0 * SECOND).remaining == 9);
    }

    #[test]
    fn in_flight_comes_back_to_nothing() {
        let (quota, mut counter) = (quota(Algorithm::InFlight, 2, 20), None);
        assert!(ask(&mut counter, one(quota), 0.0).fits);
        assert!(ask(&mut counter, one(quota), 0.0).fits);
        assert_eq!(ask(&mut counter, one(quota), 0.0).wait, None);
        counter = Some(quota.settle(counter, -1.0, 0.0, 9e9));
        assert!(ask(&mut counter, one(quota), 9e9).fits, "time plays no part");
        counter = Some(quota.settle(counter, -1.0, 0.0, 9e9));
        counter = Some(quota.settle(counter, -1.0, 0.0, 9e9));
        assert_eq!(counter, Some(Counter::InFlight(0.0)));
        assert!(quota.lives(Counter::InFlight(0.0), 9e9) <= 0.0);
    }

    #[test]
    fn a_share_is_never_nothing() {
        let quota = quota(Algorithm::TokenBucket, 10, 60);
        assert_eq!(quota.share(3), Quota { limit: 3.0, burst: 3.0, ..quota });
        assert_eq!(quota.share(0), quota);
        assert_eq!((quota.share(50).limit, quota.share(50).burst), (1.0, 1.0));
    }

    fn any_demand() -> impl Strategy<Value = Demand> {
        (0..2, 1..50u32, 1..100u32, 1..20u32, 1..30u32).prop_map(|(way, limit, per, burst, cost)| {
            let algorithm = if way == 0 { Algorithm::SlidingWindow } else { Algorithm::TokenBucket };
            let quota = Quota { burst: f64::from(burst), ..quota(algorithm, limit, per) };
            Demand { quota, cost: f64::from(cost).min(quota.most()), shadow: false }
        })
    }

    proptest! {
        #[test]
        fn who_waits_as_long_as_told_passes_and_not_much_sooner(
            demand in any_demand(), steps in proptest::collection::vec(0.0..20e6, 1..60),
        ) {
            let (mut counter, mut now) = (None, 1e15);
            for step in steps {
                now += f64::floor(step);
                let verdict = ask(&mut counter, demand, now);
                if let Some(wait) = verdict.wait {
                    let (mut then, mut before) = (counter, counter);
                    prop_assert!(ask(&mut then, demand, now + as_micros(wait)).fits, "{wait:?} {counter:?}");
                    let sooner = as_micros(wait) - 10.0;
                    prop_assert!(sooner < 0.0 || !ask(&mut before, demand, now + sooner).fits, "{wait:?} {counter:?}");
                }
            }
        }

        /// What the algorithms promise of any stretch of time: a bucket its burst and what it is refilled with, a window
        /// its limit in itself.
        #[test]
        fn no_more_passes_than_may(demand in any_demand(), steps in proptest::collection::vec(0.0..3e6, 1..200)) {
            let (mut counter, mut now, mut passed) = (None, 1e15, Vec::new());
            for step in steps {
                now += f64::floor(step);
                if ask(&mut counter, demand, now).fits {
                    passed.push(now);
                }
            }
            let Quota { limit, per, burst, .. } = demand.quota;
            for (n, from) in passed.iter().enumerate() {
                for (m, to) in passed.iter().enumerate().skip(n) {
                    let used = amount((m - n + 1) as u64) * demand.cost;
                    let most = match demand.quota.algorithm {
                        Algorithm::TokenBucket => burst + (to - from) * limit / per,
                        _ if demand.quota.index(*from) == demand.quota.index(*to) => limit,
                        _ => f64::INFINITY,
                    };
                    prop_assert!(used <= most + 1e-6, "{used} in {} us, {most} may", to - from);
                }
            }
        }
    }
}
