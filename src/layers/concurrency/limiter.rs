//! Who is in flight, and who waits: first come, first served.
//!
//! Its own queue instead of tokio's semaphore, which is fair and cancel-safe too: a limit that falls below what is in
//! flight needs permits that are forgotten when they come back, and the length of a queue must be known under the same
//! lock that lets somebody in.

use std::{collections::BTreeMap, fmt, sync::Arc, time::Duration};

use parking_lot::{Mutex, MutexGuard};
use tokio::{sync::oneshot, time::Instant};

use super::{Config, adaptive::Gradient};
use crate::{
    message::{Error, Kind},
    telemetry::{Metrics, metrics::ConcurrencyMetrics},
};

/// What is limited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scope {
    /// The requests of a route.
    Route,
    /// Those to an upstream, whatever their routes.
    Upstream,
}

impl Scope {
    /// The metric label.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Route => "route",
            Self::Upstream => "upstream",
        }
    }
}

/// A limit's figures at one moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Snapshot {
    /// The requests that may be in flight.
    pub limit: u32,
    /// Those that are. More than `limit` after it fell.
    pub in_flight: u32,
    /// Those that wait.
    pub queued: usize,
}

/// The limit of one route or upstream, kept over reloads.
pub struct Limiter {
    scope: Scope,
    name: Arc<str>,
    metrics: ConcurrencyMetrics,
    state: Mutex<State>,
}

struct State {
    config: Config,
    gradient: Option<Gradient>,
    in_flight: u32,
    /// By their order of arrival. At most `config.queue`.
    queue: BTreeMap<u64, oneshot::Sender<Permit>>,
    arrivals: u64,
    /// How long a permit is held, in seconds, lately; absent until the first came back.
    held: Option<f64>,
}

/// Why a request was not let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Shed {
    QueueFull,
    QueueTimeout,
}

/// What a request gets that comes.
pub(super) enum Entered {
    Let(Permit),
    Queued(Place),
}

impl fmt::Debug for Limiter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Limiter").field("scope", &self.scope).field("name", &self.name).finish_non_exhaustive()
    }
}

impl Limiter {
    /// A limit with nobody in flight, which counts as that of the route or upstream `name`.
    #[must_use]
    pub fn new(scope: Scope, name: &str, config: Config, metrics: &Metrics) -> Self {
        let metrics = metrics.concurrency(scope.as_str(), name);
        let state = State {
            gradient: config.gradient(Instant::now()),
            config,
            in_flight: 0,
            queue: BTreeMap::new(),
            arrivals: 0,
            held: None,
        };
        metrics.limit.set(state.limit().into());
        Self { scope, name: name.into(), metrics, state: Mutex::new(state) }
    }

    /// What it limits.
    #[must_use]
    pub fn scope(&self) -> Scope {
        self.scope
    }

    /// The route or upstream.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// The figures.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let state = self.state();
        Snapshot { limit: state.limit(), in_flight: state.in_flight, queued: state.queue.len() }
    }

    /// Goes on with other settings. Who is in flight stays so and counts; who waits keeps the place, also in a queue that
    /// became shorter.
    pub fn adopt(self: &Arc<Self>, config: &Config) {
        let mut state = self.state();
        if state.config == *config {
            return;
        }
        state.gradient = match (state.gradient.take(), config.adaptive) {
            (Some(mut gradient), Some(adaptive)) => {
                gradient.adopt(adaptive.min, config.max_in_flight);
                Some(gradient)
            }
            _ => config.gradient(Instant::now()),
        };
        state.config = config.clone();
        self.show(&state);
        drop(state);
        self.let_in();
    }

    pub(super) fn enter(self: &Arc<Self>) -> Result<Entered, Error> {
        let mut state = self.state();
        // Nobody overtakes.
        if state.queue.is_empty() && state.in_flight < state.limit() {
            state.in_flight += 1;
            self.show(&state);
            return Ok(Entered::Let(Permit::new(self)));
        }
        if state.queue.len() >= state.config.queue as usize {
            return Err(self.shed(&state, Shed::QueueFull));
        }
        let (sender, granted) = oneshot::channel();
        let number = state.arrivals;
        state.arrivals += 1;
        state.queue.insert(number, sender);
        self.show(&state);
        let timeout = state.config.queue_timeout.get();
        Ok(Entered::Queued(Place { limiter: self.clone(), number, since: Instant::now(), timeout, granted }))
    }

    /// A request has waited for too long.
    pub(super) fn give_up(&self) -> Error {
        self.shed(&self.state(), Shed::QueueTimeout)
    }

    /// A first byte took `took`.
    pub(super) fn sample(self: &Arc<Self>, took: Duration) {
        let mut state = self.state();
        let in_flight = state.in_flight;
        let Some(gradient) = &mut state.gradient else { return };
        let before = gradient.limit();
        gradient.sample(took, in_flight, Instant::now());
        let after = gradient.limit();
        if before != after {
            self.show(&state);
            drop(state);
            if after > before {
                self.let_in();
            }
        }
    }

    pub(super) fn waited(&self, place: &Place) {
        self.metrics.queue_wait.observe(place.since.elapsed().as_secs_f64());
    }

    fn shed(&self, state: &State, why: Shed) -> Error {
        match why {
            Shed::QueueFull => &self.metrics.queue_full,
            Shed::QueueTimeout => &self.metrics.queue_timeout,
        }
        .inc();
        Error::from(Kind::Overloaded).with_retry_after(state.retry_after())
    }

    /// Lets in who waits, as far as there is room.
    fn let_in(self: &Arc<Self>) {
        loop {
            let mut state = self.state();
            if state.in_flight >= state.limit() {
                return;
            }
            let Some((_, waiting)) = state.queue.pop_first() else { return };
            state.in_flight += 1;
            self.show(&state);
            drop(state);
            // Who has left in this moment leaves the permit to the next.
            if let Err(mut permit) = waiting.send(Permit::new(self)) {
                permit.limiter = None;
                let mut state = self.state();
                state.in_flight -= 1;
                self.show(&state);
            }
        }
    }

    fn show(&self, state: &State) {
        self.metrics.limit.set(state.limit().into());
        self.metrics.in_flight.set(state.in_flight.into());
        self.metrics.queued.set(i64::try_from(state.queue.len()).unwrap_or(i64::MAX));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

impl State {
    fn limit(&self) -> u32 {
        self.gradient.as_ref().map_or(self.config.max_in_flight.get(), Gradient::limit)
    }

    /// When those who wait now will have been let in, by how long permits were held lately (Little's law): a second to
    /// five minutes. `queue_timeout` before anything is known.
    fn retry_after(&self) -> Duration {
        #[expect(clippy::cast_precision_loss, reason = "a queue's length")]
        let ahead = self.queue.len() as f64 + 1.0;
        let seconds = match self.held {
            Some(held) => ahead * held / f64::from(self.limit()),
            None => self.config.queue_timeout.get().as_secs_f64(),
        };
        Duration::from_secs_f64(seconds.clamp(1.0, 300.0))
    }
}

/// The right to be in flight, until it is dropped.
#[derive(Debug)]
pub(super) struct Permit {
    limiter: Option<Arc<Limiter>>,
    since: Instant,
}

impl Permit {
    fn new(limiter: &Arc<Limiter>) -> Self {
        Self { limiter: Some(limiter.clone()), since: Instant::now() }
    }

    pub(super) fn limiter(&self) -> Option<&Arc<Limiter>> {
        self.limiter.as_ref()
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let Some(limiter) = self.limiter.take() else { return };
        let held = self.since.elapsed().as_secs_f64();
        let mut state = limiter.state();
        state.in_flight -= 1;
        state.held = Some(state.held.map_or(held, |before| before + (held - before) * 0.1));
        limiter.show(&state);
        drop(state);
        limiter.let_in();
    }
}

/// A place in the queue, until it is dropped.
#[derive(Debug)]
pub(super) struct Place {
    limiter: Arc<Limiter>,
    number: u64,
    since: Instant,
    pub(super) timeout: Duration,
    /// Dropped with a permit inside, it gives it back.
    pub(super) granted: oneshot::Receiver<Permit>,
}

impl Place {
    pub(super) fn limiter(&self) -> &Arc<Limiter> {
        &self.limiter
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.limiter.state();
        if state.queue.remove(&self.number).is_some() {
            self.limiter.show(&state);
        }
    }
}
