//! Idle connections of one endpoint.
//!
//! Ours and not a library's, for three reasons: hyper-util's legacy client spawns a task for each response
//! that is streamed, in order to give its connection back; its composable pools have no names for their
//! types, so each lease would be a box, and no hook for the idle time; and neither tells whether a
//! connection was used before, which the silent retry has to know.

use std::{
    sync::{Mutex, PoisonError},
    time::Duration,
};

use tokio::time::Instant;

/// A stack of idle connections: the one used last is used next, so that the others may expire.
#[derive(Debug)]
pub(super) struct Pool<T> {
    idle: Mutex<Vec<(Instant, T)>>,
    most: usize,
    after: Duration,
}

impl<T> Pool<T> {
    /// A pool that keeps `most` connections, each for `after` at the longest.
    pub(super) fn new(most: usize, after: Duration) -> Self {
        Self { idle: Mutex::default(), most, after }
    }

    /// The connection that has rested the least, unless that is too long.
    pub(super) fn take(&self) -> Option<T> {
        let newest = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        newest.filter(|(since, _)| since.elapsed() < self.after).map(|(_, connection)| connection)
    }

    /// Keeps a connection, or closes it where there are enough.
    pub(super) fn put(&self, connection: T) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < self.most {
            idle.push((Instant::now(), connection));
        }
    }

    /// Closes what has rested too long.
    pub(super) fn expire(&self) {
        let expired: Vec<_> = {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            // The oldest are in front.
            let fresh = idle.partition_point(|(since, _)| since.elapsed() >= self.after);
            idle.drain(..fresh).collect()
        };
        drop(expired); // not under the lock: closing has work to do
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_last_used_comes_first_and_the_rest_expire() {
        let pool = Pool::new(2, Duration::from_secs(10));
        pool.put("old");
        advance(Duration::from_secs(6)).await;
        pool.put("new");
        pool.put("one too many");
        advance(Duration::from_secs(6)).await;
        pool.expire();
        assert_eq!(pool.take(), Some("new"));
        assert_eq!(pool.take(), None, "the old one has expired");
        pool.put("stale");
        advance(Duration::from_secs(11)).await;
        assert_eq!(pool.take(), None, "also before the sweep");
    }
}
