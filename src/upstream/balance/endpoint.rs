//! What is known of one endpoint: shared by all routes to its upstream, and kept over reloads under its address.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use parking_lot::{Mutex, MutexGuard};
use tokio::time::Instant;
use tracing::{info, warn};

use super::choice::{Ewma, slow_start};
use crate::{
    telemetry::{Metrics, metrics::BalancedMetrics},
    upstream::health::{Change, Health},
};

/// One endpoint of an upstream, as balancing and health checks see it.
#[derive(Debug)]
pub struct Endpoint {
    upstream: Arc<str>,
    name: Arc<str>,
    /// What the times below are counted from.
    base: Instant,
    in_flight: AtomicUsize,
    drained: AtomicBool,
    /// Nanoseconds from `base` until which it is not healthy, whatever its checks say; 0 for never.
    ejected: AtomicU64,
    /// Its checks say that it is down.
    down: AtomicBool,
    /// Nanoseconds from `base` to when it came back or was added; 0 where it was there from the start.
    returned: AtomicU64,
    latency: Mutex<Ewma>,
    health: Mutex<Health>,
    metrics: BalancedMetrics,
}

impl Endpoint {
    /// A healthy endpoint. One that is `added` to a running process starts slowly.
    #[must_use]
    pub fn new(upstream: &str, name: &str, added: bool, metrics: &Metrics) -> Self {
        let metrics = metrics.balanced(upstream, name);
        metrics.healthy.set(1);
        Self {
            upstream: upstream.into(),
            name: name.into(),
            base: Instant::now(),
            in_flight: AtomicUsize::new(0),
            drained: AtomicBool::new(false),
            ejected: AtomicU64::new(0),
            down: AtomicBool::new(false),
            returned: AtomicU64::new(u64::from(added)),
            latency: Mutex::default(),
            health: Mutex::default(),
            metrics,
        }
    }

    /// The upstream.
    #[must_use]
    pub fn upstream(&self) -> &Arc<str> {
        &self.upstream
    }

    /// The endpoint, as logs and metrics name it.
    #[must_use]
    pub fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Requests and streams that have not ended.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// Counts a request until the guard is dropped.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        self.metrics.in_flight.inc();
        InFlight(self.clone())
    }

    /// Whether an operator has taken it out.
    #[must_use]
    pub fn is_drained(&self) -> bool {
        self.drained.load(Ordering::Relaxed)
    }

    /// Takes it out, or puts it back. Requests in flight go on.
    pub fn drain(&self, drained: bool) {
        if self.drained.swap(drained, Ordering::Relaxed) == drained {
            return;
        }
        if drained {
            info!(upstream = %self.upstream, endpoint = %self.name, "endpoint drained");
        } else {
            self.come_back(Instant::now());
            info!(upstream = %self.upstream, endpoint = %self.name, "endpoint no longer drained");
        }
    }

    /// Whether checks and requests say that it is up.
    #[must_use]
    pub fn is_healthy(&self, now: Instant) -> bool {
        let ejected = self.ejected.load(Ordering::Relaxed);
        !self.down.load(Ordering::Relaxed) && (ejected == 0 || self.nanos(now) >= ejected)
    }

    /// The share of its weight that it has now, where endpoints come back within `window`.
    #[must_use]
    pub fn share(&self, window: Duration, now: Instant) -> f64 {
        match self.returned.load(Ordering::Relaxed) {
            0 => 1.0,
            returned => slow_start(Duration::from_nanos(self.nanos(now).saturating_sub(returned)), window),
        }
    }

    /// Its time to the first byte.
    pub fn latency(&self) -> MutexGuard<'_, Ewma> {
        self.latency.lock()
    }

    /// Whether nothing is known of how it does now: nothing is in flight, and nothing was heard for a while.
    #[must_use]
    pub fn is_unheard(&self, now: Instant) -> bool {
        self.in_flight() == 0 && self.latency().is_silent(now)
    }

    /// Its health.
    pub fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock()
    }

    /// Lets `act` change the health, and tells of what has changed.
    pub fn change(&self, act: impl FnOnce(&mut Health, Instant) -> Option<Change>) {
        let now = Instant::now();
        let mut health = self.health();
        let was = self.is_healthy(now);
        let change = act(&mut health, now);
        self.down.store(health.is_down(), Ordering::Relaxed);
        let ejected = health.ejected_until().map_or(0, |until| self.nanos(until).max(1));
        self.ejected.store(ejected, Ordering::Relaxed);
        let is = self.is_healthy(now);
        if was != is {
            self.metrics.healthy.set(i64::from(is));
        }
        let (upstream, endpoint) = (&*self.upstream, &*self.name);
        match change {
            None => {}
            Some(Change::Down(error)) => warn!(upstream, endpoint, error, "endpoint down"),
            Some(Change::Ejected(until)) => {
                // It comes back by itself.
                self.returned.store(ejected, Ordering::Relaxed);
                let ms = u64::try_from(until.saturating_duration_since(now).as_millis()).unwrap_or(u64::MAX);
                warn!(upstream, endpoint, for_ms = ms, "endpoint ejected");
            }
            Some(Change::Up) => {
                if is {
                    self.come_back(now);
                }
                info!(upstream, endpoint, "endpoint up");
            }
        }
    }

    /// Counts a check.
    pub(crate) fn count_check(&self, passed: bool) {
        if passed {
            self.metrics.passed.inc()
        } else {
            self.metrics.failed.inc()
        };
    }

    /// Sets the gauge of what changes by itself: the end of an ejection.
    pub(crate) fn refresh(&self, now: Instant) {
        self.metrics.healthy.set(i64::from(self.is_healthy(now)));
    }

    fn come_back(&self, now: Instant) {
        self.returned.store(self.nanos(now).max(1), Ordering::Relaxed);
    }

    fn nanos(&self, at: Instant) -> u64 {
        u64::try_from(at.saturating_duration_since(self.base).as_nanos()).unwrap_or(u64::MAX)
    }
}

/// A request or stream that has not ended.
#[derive(Debug)]
pub struct InFlight(Arc<Endpoint>);

impl InFlight {
    /// Where it is.
    #[must_use]
    pub fn endpoint(&self) -> &Arc<Endpoint> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.in_flight.dec();
    }
}
