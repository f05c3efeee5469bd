//! The breaker's state, without clock, lock, log or randomness of its own: `now` and the seed are handed in.
//!
//! Each opening begins a new **generation**. A ticket knows the generation that it was given out in, and what it has
//! to say counts in no other: an answer that was on its way since before the breaker opened says nothing of an
//! endpoint that has been left alone in the meantime.
//!
//! Consecutive failures and the window of ten buckets are those of linkerd's breaker, half-open permits those of
//! resilience4j: exactly as many probes as there are permits get through, and all of them must succeed.
//!
//! A permit is not held for ever: a slow upload, or an endpoint that hangs, would keep everybody else out. A probe that
//! has not been answered after as long as the breaker was open is **overdue**, and makes room for another; each time that
//! happens the next ones have twice as long, up to `max_recovery`, so that few hang where all do. What an overdue one
//! comes to is as true as ever, and counts, but it has no permit to give back any more.

use std::time::Duration;

use tokio::time::Instant;

use super::Config;

/// Into how many parts the window is divided: it slides by a tenth of its length.
const BUCKETS: usize = 10;
const BUCKETS_U64: u64 = BUCKETS as u64;
/// When to come again while all permits are out: the outcome is a matter of one answer.
const PROBING: Duration = Duration::from_secs(1);

/// What the breaker does with requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum State {
    /// They pass.
    Closed,
    /// As many as there are permits pass.
    HalfOpen,
    /// They are refused.
    Open,
}

impl State {
    /// The label and the log field.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::HalfOpen => "half_open",
            Self::Open => "open",
        }
    }
}

/// Why a breaker opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    ConsecutiveFailures,
    FailureRate,
    SlowRate,
    FailedProbe,
    Operator,
}

impl Why {
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::ConsecutiveFailures => "consecutive_failures",
            Self::FailureRate => "failure_rate",
            Self::SlowRate => "slow_rate",
            Self::FailedProbe => "failed_probe",
            Self::Operator => "operator",
        }
    }
}

/// A change of state, to be counted and told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Change {
    Opened { why: Why, recovery: Option<Duration> },
    HalfOpened,
    Closed { by_operator: bool },
}

/// The right to ask the endpoint once. Given back by [`Machine::judge`] or [`Machine::leave`].
#[derive(Debug)]
#[must_use]
pub(super) struct Ticket {
    generation: u64,
    /// Its number among the probes.
    probe: Option<u64>,
}

impl Ticket {
    /// Whether it holds a permit.
    pub(super) const fn is_probe(&self) -> bool {
        self.probe.is_some()
    }

    /// The ticket of a breaker that is closed, in this generation.
    pub(super) const fn ordinary(generation: u64) -> Self {
        Self { generation, probe: None }
    }
}

/// An answer that counted as a success, and whose body may still break off.
#[derive(Debug)]
pub(super) struct Mark {
    generation: u64,
    probe: bool,
    /// The bucket that counted it.
    bucket: Option<u64>,
    /// Failures in a row before it.
    streak: u32,
    /// Which success it was.
    number: u64,
}

/// A breaker's figures at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// What it does with requests.
    pub state: State,
    /// Whether an operator opened it, for as long as he likes.
    pub forced: bool,
    /// Counts how often it opened or was set.
    pub generation: u64,
    /// Failures since the last success.
    pub consecutive_failures: u32,
    /// Answers in the window.
    pub requests: u64,
    /// Failures in the window.
    pub failures: u64,
    /// Slow ones in the window.
    pub slow: u64,
    /// Probes that have not been answered and hold a permit.
    pub probes: u32,
    /// When it opened, if it is not closed.
    pub opened_at: Option<Instant>,
    /// When the next request is let through; absent while that is now, or up to an operator.
    pub retry_after: Option<Duration>,
}

#[derive(Debug)]
enum Phase {
    Closed {
        since: Instant,
    },
    /// Without an end where an operator opened it.
    Open {
        until: Option<Instant>,
    },
    HalfOpen(Probing),
}

/// The probes of a breaker that is half open.
#[derive(Debug)]
struct Probing {
    /// Those that hold a permit, by their numbers, and when they are overdue: at most as many as there are permits.
    out: Vec<(u64, Instant)>,
    /// Those that succeeded.
    passed: u32,
    /// How long the next has until it is overdue.
    patience: Duration,
}

impl Probing {
    /// Permits that are out, or used up.
    fn taken(&self, now: Instant) -> usize {
        self.out.iter().filter(|(_, due)| *due > now).count().saturating_add(self.passed as usize)
    }

    fn give_back(&mut self, probe: Option<u64>) {
        self.out.retain(|(number, _)| Some(*number) != probe);
    }
}

/// The state machine.
#[derive(Debug)]
pub(super) struct Machine {
    config: Config,
    phase: Phase,
    generation: u64,
    opened_at: Instant,
    consecutive: u32,
    successes: u64,
    probes: u64,
    window: Window,
    /// How often it opened in a row without holding in between.
    openings: u32,
    /// How long it was open last.
    recovery: Duration,
    random: u64,
}

impl Machine {
    pub(super) fn new(config: Config, seed: u64, now: Instant) -> Self {
        Self {
            window: Window::new(config.window.get(), now),
            config,
            phase: Phase::Closed { since: now },
            generation: 0,
            opened_at: now,
            consecutive: 0,
            successes: 0,
            probes: 0,
            openings: 0,
            recovery: Duration::ZERO,
            random: seed,
        }
    }

    pub(super) fn config(&self) -> &Config {
        &self.config
    }

    pub(super) fn generation(&self) -> u64 {
        self.generation
    }

    pub(super) fn is_closed(&self) -> bool {
        matches!(self.phase, Phase::Closed { .. })
    }

    /// Whether a request would be let through.
    pub(super) fn admits(&self, now: Instant) -> bool {
        match &self.phase {
            Phase::Closed { .. } => true,
            Phase::Open { until } => until.is_some_and(|until| until <= now),
            Phase::HalfOpen(probing) => probing.taken(now) < self.config.half_open_permits.get() as usize,
        }
    }

    /// Lets a request through, or says when to come again, where that is known.
    pub(super) fn admit(&mut self, now: Instant) -> (Result<Ticket, Option<Duration>>, Option<Change>) {
        let generation = self.generation;
        if !self.admits(now) {
            return (Err(self.retry_after(now)), None);
        }
        let change = match &self.phase {
            Phase::Closed { .. } => return (Ok(Ticket::ordinary(generation)), None),
            Phase::Open { .. } => {
                self.phase = Phase::HalfOpen(Probing { out: Vec::new(), passed: 0, patience: self.recovery });
                Some(Change::HalfOpened)
            }
            Phase::HalfOpen(_) => None,
        };
        self.probes += 1;
        if let Phase::HalfOpen(Probing { out, patience, .. }) = &mut self.phase {
            let before = out.len();
            out.retain(|(_, due)| *due > now);
            if out.len() < before {
                *patience = patience.saturating_mul(2).min(self.config.max_recovery().get());
            }
            out.push((self.probes, now + *patience));
        }
        (Ok(Ticket { generation, probe: Some(self.probes) }), change)
    }

    /// When to come again, where that is known. Nothing where a request would be let through.
    pub(super) fn retry_after(&self, now: Instant) -> Option<Duration> {
        match self.phase {
            Phase::Closed { .. } => None,
            Phase::Open { until } => until.filter(|until| *until > now).map(|until| until - now),
            Phase::HalfOpen(_) => (!self.admits(now)).then_some(PROBING),
        }
    }

    /// The request of `ticket` was answered, or failed, `first_byte` after it was sent.
    #[expect(clippy::needless_pass_by_value, reason = "a ticket is good for one judgement")]
    pub(super) fn judge(
        &mut self,
        ticket: Ticket,
        failed: bool,
        first_byte: Duration,
        now: Instant,
    ) -> (Option<Mark>, Option<Change>) {
        if ticket.generation != self.generation {
            return (None, None);
        }
        let slow_rate = self.config.slow();
        let slow = slow_rate.is_some_and(|(_, after)| first_byte >= after);
        let permits = self.config.half_open_permits.get();
        let mut mark = Mark {
            generation: self.generation,
            probe: ticket.is_probe(),
            bucket: None,
            streak: self.consecutive,
            number: self.successes + 1,
        };
        match &mut self.phase {
            // A ticket of this generation was given out before it ended or after it began.
            Phase::Open { .. } => (None, None),
            Phase::HalfOpen(_) if failed || slow => (None, Some(self.trip(Why::FailedProbe, now))),
            Phase::HalfOpen(probing) => {
                probing.give_back(ticket.probe);
                probing.passed += 1;
                self.successes += 1;
                let closes = probing.passed >= permits;
                let change = closes.then(|| {
                    self.close(now);
                    Change::Closed { by_operator: false }
                });
                mark.streak = 0;
                (Some(mark), change)
            }
            Phase::Closed { .. } => {
                let bucket = self.window.record(now, failed, slow);
                if failed {
                    self.consecutive = self.consecutive.saturating_add(1);
                    return (None, self.trip_if_due(now));
                }
                self.consecutive = 0;
                self.successes += 1;
                mark.bucket = Some(bucket);
                let change = if slow { self.trip_if_due(now) } else { None };
                (Some(mark), change)
            }
        }
    }

    /// The client of `ticket` left before there was anything to judge.
    pub(super) fn leave(&mut self, ticket: &Ticket) {
        if ticket.generation == self.generation
            && let Phase::HalfOpen(probing) = &mut self.phase
        {
            probing.give_back(ticket.probe);
        }
    }

    /// The body of an answer that had counted as a success broke off: it is a failure after all.
    pub(super) fn broke_off(&mut self, mark: &Mark, now: Instant) -> Option<Change> {
        if mark.generation != self.generation {
            return None;
        }
        match self.phase {
            Phase::Open { .. } => None,
            Phase::HalfOpen(_) => Some(self.trip(Why::FailedProbe, now)),
            // What had been closed on the strength of this answer.
            Phase::Closed { since } if mark.probe && !self.has_held(since, now) => {
                Some(self.trip(Why::FailedProbe, now))
            }
            Phase::Closed { .. } => {
                self.window.turn(mark.bucket, now);
                // Where nothing succeeded since, the row goes on that the head had ended.
                let before = if mark.number == self.successes { mark.streak } else { 0 };
                self.consecutive = self.consecutive.saturating_add(before).saturating_add(1);
                self.trip_if_due(now)
            }
        }
    }

    /// Opens it until it is reset.
    pub(super) fn force_open(&mut self, now: Instant) -> Option<Change> {
        if self.forced() {
            return None;
        }
        self.generation += 1;
        self.opened_at = now;
        self.phase = Phase::Open { until: None };
        Some(Change::Opened { why: Why::Operator, recovery: None })
    }

    /// Closes it and forgets what was.
    pub(super) fn reset(&mut self, now: Instant) -> Option<Change> {
        let was_closed = self.is_closed();
        self.generation += 1;
        (self.openings, self.recovery) = (0, Duration::ZERO);
        self.close(now);
        (!was_closed).then_some(Change::Closed { by_operator: true })
    }

    /// Goes on with other settings. What is open stays so, for no longer than the new `max_recovery`.
    pub(super) fn adopt(&mut self, config: Config, now: Instant) -> Option<Change> {
        if config.window != self.config.window {
            self.window = Window::new(config.window.get(), now);
        }
        if let Phase::Open { until: Some(until) } = &mut self.phase {
            *until = (*until).min(now + config.max_recovery().get());
        }
        self.config = config;
        // With fewer permits than probes that succeeded nobody would come to close it.
        let due =
            matches!(&self.phase, Phase::HalfOpen(probing) if probing.passed >= self.config.half_open_permits.get());
        due.then(|| {
            self.close(now);
            Change::Closed { by_operator: false }
        })
    }

    pub(super) fn snapshot(&self, now: Instant) -> Snapshot {
        let (state, probes) = match &self.phase {
            Phase::Closed { .. } => (State::Closed, 0),
            Phase::Open { .. } => (State::Open, 0),
            Phase::HalfOpen(Probing { out, .. }) => (State::HalfOpen, u32::try_from(out.len()).unwrap_or(u32::MAX)),
        };
        let Counts { requests, failures, slow } = self.window.counts(now);
        Snapshot {
            state,
            forced: self.forced(),
            generation: self.generation,
            consecutive_failures: self.consecutive,
            requests,
            failures,
            slow,
            probes,
            opened_at: (state != State::Closed).then_some(self.opened_at),
            retry_after: self.retry_after(now),
        }
    }

    fn forced(&self) -> bool {
        matches!(self.phase, Phase::Open { until: None })
    }

    /// Whether it has been closed for as long as it was open before.
    fn has_held(&self, since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(since) >= self.recovery
    }

    fn close(&mut self, now: Instant) {
        self.phase = Phase::Closed { since: now };
        self.consecutive = 0;
        self.window.clear();
    }

    fn trip_if_due(&mut self, now: Instant) -> Option<Change> {
        if self.config.consecutive_failures.as_ref().is_some_and(|most| self.consecutive >= most.get()) {
            return Some(self.trip(Why::ConsecutiveFailures, now));
        }
        let Counts { requests, failures, slow } = self.window.counts(now);
        if requests < u64::from(self.config.min_requests.get()) {
            return None;
        }
        #[expect(clippy::cast_precision_loss, reason = "counts of seconds")]
        let reached = |count: u64, rate: f64| count as f64 >= rate * requests as f64;
        if self.config.failure_rate.as_ref().is_some_and(|rate| reached(failures, *rate)) {
            return Some(self.trip(Why::FailureRate, now));
        }
        if self.config.slow().is_some_and(|(rate, _)| reached(slow, rate)) {
            return Some(self.trip(Why::SlowRate, now));
        }
        None
    }

    fn trip(&mut self, why: Why, now: Instant) -> Change {
        self.openings = match self.phase {
            Phase::Closed { since } if self.has_held(since, now) => 0,
            _ => self.openings.saturating_add(1),
        };
        let (first, most) = (self.config.recovery.get(), self.config.max_recovery().get());
        let doubled = 1_u32.checked_shl(self.openings).and_then(|times| first.checked_mul(times));
        self.recovery = doubled.map_or(most, |doubled| doubled.min(most)).mul_f64(self.shortening());
        self.generation += 1;
        self.opened_at = now;
        self.phase = Phase::Open { until: Some(now + self.recovery) };
        Change::Opened { why, recovery: Some(self.recovery) }
    }

    /// From 0.8 to 1, so that replicas do not probe in step. (`SplitMix64`, of which 53 bits make a fraction.)
    fn shortening(&mut self) -> f64 {
        self.random = self.random.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut bits = self.random;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        bits ^= bits >> 31;
        #[expect(clippy::cast_precision_loss, reason = "53 bits fit")]
        let fraction = (bits >> 11) as f64 / (1_u64 << 53) as f64;
        1.0 - 0.2 * fraction
    }
}

/// What was counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Counts {
    requests: u64,
    failures: u64,
    slow: u64,
}

/// A sliding window: a ring of buckets, each of which knows what part of time it is about.
#[derive(Debug)]
struct Window {
    began: Instant,
    /// The length of a bucket, in nanoseconds.
    length: u128,
    buckets: [(u64, Counts); BUCKETS],
}

impl Window {
    fn new(window: Duration, now: Instant) -> Self {
        let length = (window.as_nanos() / u128::from(BUCKETS_U64)).max(1);
        Self { began: now, length, buckets: [(0, Counts::default()); BUCKETS] }
    }

    fn clear(&mut self) {
        self.buckets = Default::default();
    }

    fn number(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.began).as_nanos() / self.length).unwrap_or(u64::MAX)
    }

    /// Counts an answer. Returns the bucket that did.
    fn record(&mut self, now: Instant, failed: bool, slow: bool) -> u64 {
        let number = self.number(now);
        let counts = self.bucket(number);
        counts.requests += 1;
        counts.failures += u64::from(failed);
        counts.slow += u64::from(slow);
        number
    }

    /// Makes a failure of a success that `bucket` counted.
    fn turn(&mut self, bucket: Option<u64>, now: Instant) {
        let known = bucket.and_then(|bucket| {
            let (number, counts) = self.buckets.iter_mut().find(|(number, _)| *number == bucket)?;
            (*number == bucket && counts.failures < counts.requests).then_some(counts)
        });
        match known {
            Some(counts) => counts.failures += 1,
            // It slid out of the window meanwhile: the failure is of now.
            None => drop(self.record(now, true, false)),
        }
    }

    fn bucket(&mut self, number: u64) -> &mut Counts {
        // Less than `BUCKETS`.
        let (of, counts) = &mut self.buckets[(number % BUCKETS_U64) as usize];
        if *of != number {
            (*of, *counts) = (number, Counts::default());
        }
        counts
    }

    fn counts(&self, now: Instant) -> Counts {
        let last = self.number(now);
        let in_window = |(number, _): &&(u64, Counts)| *number <= last && last - number < BUCKETS_U64;
        self.buckets.iter().filter(in_window).fold(Counts::default(), |sum, (_, counts)| Counts {
            requests: sum.requests + counts.requests,
            failures: sum.failures + counts.failures,
            slow: sum.slow + counts.slow,
        })
    }
}
