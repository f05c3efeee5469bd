//! Idle connections of one endpoint.
//!
//! Ours and not a library's: hyper-util's pools want each connection driven by a task of its own, which costs
//! two switches of tasks per frame; its legacy client spawns another for each response that is streamed, in
//! order to give the connection back; and neither tells whether a connection was used before, which the
//! silent retry has to know.

use std::{mem, time::Duration};

use parking_lot::Mutex;
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
        let newest = self.idle.lock().pop();
        newest.filter(|(since, _)| since.elapsed() < self.after).map(|(_, connection)| connection)
    }

    /// Keeps a connection, or closes it where there are enough.
    pub(super) fn put(&self, connection: T) {
        let mut idle = self.idle.lock();
        if idle.len() < self.most {
            idle.push((Instant::now(), connection));
        }
    }

    /// Closes what has rested too long, and what `usable` does not want.
    pub(super) fn sweep(&self, mut usable: impl FnMut(&mut T) -> bool) {
        let idle = mem::take(&mut *self.idle.lock());
        // Not under the lock: looking and closing have work to do. Who comes meanwhile opens a connection.
        let fresh: Vec<_> = idle
            .into_iter()
            .filter_map(|(since, mut connection)| {
                (since.elapsed() < self.after && usable(&mut connection)).then_some((since, connection))
            })
            .collect();
        // What came back meanwhile is younger, and stays on top.
        let mut idle = self.idle.lock();
        let younger = mem::replace(&mut *idle, fresh);
        idle.extend(younger);
        idle.truncate(self.most);
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
        pool.sweep(|_| true);
        assert_eq!(pool.take(), Some("new"));
        assert_eq!(pool.take(), None, "the old one has expired");
        pool.put("stale");
        advance(Duration::from_secs(11)).await;
        assert_eq!(pool.take(), None, "also before the sweep");
        pool.put("closed");
        pool.sweep(|connection| *connection != "closed");
        assert_eq!(pool.take(), None, "what is of no use goes too");
    }
}
