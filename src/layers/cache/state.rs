//! All caches of the process: what outlives a configuration.

use std::{
    fmt,
    sync::{Arc, Weak, atomic::Ordering},
    time::Duration,
};

use parking_lot::Mutex;
use tokio::task::JoinSet;

use super::{
    config::Config,
    hub::{Known, Purger},
    kept::Kept,
    purge::Target,
    resume::Streams,
};
use crate::telemetry::metrics::CacheMetrics;

/// All caches of the process. They outlive a configuration.
#[derive(Default)]
pub struct State {
    pub(super) purger: Arc<Purger>,
    /// What goes on behind the requests: answers asked for anew, or read to their ends. Ends with the process.
    pub(super) tasks: Arc<Mutex<JoinSet<()>>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").finish_non_exhaustive()
    }
}

impl State {
    /// Drops what `target` names, on all routes; `soft`: makes it stale. What is on its way is not kept.
    ///
    /// It does not wait. On this replica it holds at once; on the others, and for what is in Redis, as soon as Redis has
    /// heard of it: within milliseconds, or when it is back.
    pub fn purge(&self, target: &Target, soft: bool) {
        self.purger.purge(target, soft);
    }

    /// Waits until Redis has heard of all that was purged and stored, for as long as `patience`. For the end of the
    /// process.
    pub async fn finish(&self, patience: Duration) {
        self.purger.finish(patience).await;
    }

    /// What the caches of the routes hold, by route.
    #[must_use]
    pub fn figures(&self) -> Vec<Figures> {
        let live = |(route, all): (&String, &Vec<Known>)| {
            Some((route.clone(), all.iter().rev().find_map(|(_, kept)| kept.upgrade())?))
        };
        let kept: Vec<_> = self.purger.kept.lock().iter().filter_map(live).collect();
        let streams = self.purger.streams.lock();
        let mut figures: Vec<_> = kept
            .into_iter()
            .map(|(route, kept)| {
                let (entries, bytes) = kept.size();
                let (in_flight, in_flight_bytes) = kept.in_flight();
                let held = streams.get(&route).and_then(Weak::upgrade).map(|streams| streams.size());
                let (resumable, resumable_bytes) = held.unwrap_or_default();
                Figures { route, entries, bytes, in_flight, in_flight_bytes, resumable, resumable_bytes }
            })
            .collect();
        drop(streams);
        figures.sort_by(|a, b| a.route.cmp(&b.route));
        figures
    }

    /// The streams of a route that can be taken up again, whatever its section says.
    pub(super) fn streams(&self, config: &Config, route: &str) -> Arc<Streams> {
        let mut all = self.purger.streams.lock();
        all.retain(|_, streams| streams.strong_count() > 0);
        let streams = all.get(route).and_then(Weak::upgrade).unwrap_or_else(|| Streams::new(self.tasks.clone()));
        streams.limit(config.max_bytes.get());
        all.insert(route.to_owned(), Arc::downgrade(&streams));
        streams
    }

    /// The answers of a route: those that there are, unless its section or its upstream changed. They live as long as a
    /// layer has them.
    pub(super) fn kept(&self, config: &Config, route: &str, upstream: &str, metrics: &CacheMetrics) -> Arc<Kept> {
        if config.ignore_host {
            self.purger.any_host.store(true, Ordering::Relaxed);
        }
        let mut all = self.purger.kept.lock();
        all.retain(|_, kept| {
            kept.retain(|(_, kept)| kept.strong_count() > 0);
            !kept.is_empty()
        });
        let known = all.entry(route.to_owned()).or_default();
        let of = (config.clone(), upstream.to_owned());
        let same = known.iter().find(|(known, _)| *known == of);
        if let Some(kept) = same.and_then(|(_, kept)| kept.upgrade()) {
            return kept;
        }
        let evicted = metrics.evicted.clone();
        let entries = config.max_entries.as_ref().map(|entries| entries.get());
        let kept = Arc::new(Kept::new(config.max_bytes.get(), entries, self.purger.purges.clone(), move || {
            evicted.inc();
        }));
        known.push((of, Arc::downgrade(&kept)));
        kept
    }
}

/// What the cache of a route holds.
#[derive(Debug, Clone)]
pub struct Figures {
    /// The route.
    pub route: String,
    /// Answers, and notes about what has none.
    pub entries: u64,
    /// About so much memory, in bytes.
    pub bytes: u64,
    /// Answers that are on their way.
    pub in_flight: usize,
    /// What is there of them, in bytes: at most as much as may be kept.
    pub in_flight_bytes: u64,
    /// Streams that can be taken up again.
    pub resumable: usize,
    /// About so much memory, in bytes.
    pub resumable_bytes: u64,
}
