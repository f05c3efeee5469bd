//! Connections that fail before or between requests: counted by reason, and told of without flooding the log.
//!
//! What hyper refuses by itself (no HTTP at all, a head beyond every limit) it answers with a bare status, and no layer
//! sees it. What the client sees as 400, 414 or 431 without a body is found here, and only here.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::time::{Duration, Instant};
use tracing::{debug, info};

use crate::{
    message::{BoxError, Peer},
    telemetry::{
        log::chain,
        metrics::{ConnectionError, ConnectionErrors},
    },
};

/// At `info` there is one line in this time, which says how many there were since the last one. Whoever scans a public
/// port fails by the thousand.
const QUIET: Duration = Duration::from_secs(10);

/// The failed connections of one server.
#[derive(Debug)]
pub(super) struct Failures {
    counts: ConnectionErrors,
    started: Instant,
    /// When the last line was written, in milliseconds from `started`; 0 before the first.
    told: AtomicU64,
    untold: AtomicU64,
}

impl Failures {
    pub(super) fn new(counts: ConnectionErrors) -> Self {
        Self { counts, started: Instant::now(), told: AtomicU64::new(0), untold: AtomicU64::new(0) }
    }

    /// Counts one, and tells of it. Without a reason the client has merely left, which is its own affair.
    pub(super) fn note(&self, peer: Peer, why: Option<ConnectionError>, error: &(dyn std::error::Error + 'static)) {
        let Some(why) = why else { return debug!(%peer, error = chain(error), "connection lost") };
        self.counts.of(why).inc();
        let reason = why.as_str();
        if let Some(untold) = self.may_tell() {
            info!(%peer, reason, untold, error = chain(error), "connection failed");
        } else {
            debug!(%peer, reason, error = chain(error), "connection failed");
        }
    }

    /// Whether it is time for a line, and how many were not told of since the last.
    fn may_tell(&self) -> Option<u64> {
        let now = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX).saturating_add(1);
        let told = self.told.load(Ordering::Relaxed);
        let quiet = u64::try_from(QUIET.as_millis()).unwrap_or(u64::MAX);
        let due = told == 0 || now - told.min(now) >= quiet;
        // Of two at once, one tells.
        if due && self.told.compare_exchange(told, now, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
            return Some(self.untold.swap(0, Ordering::Relaxed));
        }
        self.untold.fetch_add(1, Ordering::Relaxed);
        None
    }
}

/// What was wrong with a connection that hyper has given up. `None` where the client left, or where the failure was
/// that of a response, which has its access line.
pub(super) fn reason(error: &hyper::Error) -> Option<ConnectionError> {
    if error.is_parse_too_large() {
        return Some(ConnectionError::TooLarge);
    }
    if error.is_parse() {
        return Some(ConnectionError::Malformed);
    }
    let source = std::error::Error::source(error)?;
    source.downcast_ref::<h2::Error>()?.is_library().then_some(ConnectionError::Http2)
}

/// Why a client was given up that was too slow.
#[derive(Debug)]
pub(super) struct Slow(pub(super) &'static str);

impl std::fmt::Display for Slow {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl std::error::Error for Slow {}

/// A failure to greet a client, with its reason if it was the client's fault.
pub(super) type Ungreeted = (Option<ConnectionError>, BoxError);

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_flood_is_one_line_in_ten_seconds_and_every_count() {
        let failures = Failures::new(ConnectionErrors::default());
        let told: Vec<_> = (0..4).map(|_| failures.may_tell()).collect();
        assert_eq!(told, [Some(0), None, None, None]);
        tokio::time::advance(QUIET).await;
        assert_eq!([failures.may_tell(), failures.may_tell()], [Some(3), None]);
        failures.note(Peer::Unix, Some(ConnectionError::Malformed), &Slow("test"));
        failures.note(Peer::Unix, None, &Slow("test"));
        let counts = ConnectionError::ALL.map(|why| failures.counts.of(why).get());
        assert_eq!(counts, [1, 0, 0, 0, 0, 0, 0]);
    }
}
