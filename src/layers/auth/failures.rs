//! Who has failed how often: refused attempts by address, in memory.

use std::{fmt, time::Duration};

use parking_lot::Mutex;
use tokio::time::Instant;

use super::{Digest, recent::Recent};
use crate::{config::Rate, message::Net};

/// How many addresses are watched at most. About 100 bytes each.
const MAX_NETS: usize = 65_536;
/// How many pairs of an address and a good credential are remembered at most. About 150 bytes each.
const MAX_GOOD: usize = 16_384;

/// Counts refused attempts. One for the process: what was refused on one route counts on all with the same rate.
pub(super) struct Failures {
    /// When the last of those that count will count no more.
    until: Mutex<Recent<(Net, Rate), Instant>>,
    good: Mutex<Recent<(Net, Digest), ()>>,
}

impl Default for Failures {
    fn default() -> Self {
        Self { until: Mutex::new(Recent::new(MAX_NETS)), good: Mutex::new(Recent::new(MAX_GOOD)) }
    }
}

impl fmt::Debug for Failures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Failures").finish_non_exhaustive()
    }
}

/// How long one failure counts: `per / count`. They count one after the other, as in a bucket of `count` that is
/// refilled evenly.
fn each(rate: Rate) -> Duration {
    rate.per() / rate.count().get()
}

impl Failures {
    /// How long `net` has to wait before its next attempt, if it has to.
    pub(super) fn wait(&self, net: Net, rate: Rate, now: Instant) -> Option<Duration> {
        let until = *self.until.lock().get(&(net, rate))?;
        let wait = (until + each(rate)).saturating_duration_since(now + rate.per());
        (!wait.is_zero()).then_some(wait)
    }

    /// Counts a refused attempt.
    pub(super) fn add(&self, net: Net, rate: Rate, now: Instant) {
        let mut map = self.until.lock();
        let until = map.get(&(net, rate)).map_or(now, |&until| until.max(now));
        // Never beyond what makes `net` wait for one: those who were let in together must not lock it out for longer.
        map.insert((net, rate), (until + each(rate)).min(now + rate.per()));
    }

    /// Remembers a credential that was good from `net`.
    pub(super) fn good(&self, net: Net, digest: Digest) {
        let mut good = self.good.lock();
        if !good.is_young(&(net, digest)) {
            good.insert((net, digest), ());
        }
    }

    /// Forgets that it was.
    pub(super) fn no_longer_good(&self, net: Net, digest: Digest) {
        self.good.lock().remove(&(net, digest));
    }

    /// Whether a credential was good from `net` lately.
    pub(super) fn was_good(&self, net: Net, digest: Digest) -> bool {
        self.good.lock().get(&(net, digest)).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(ip: &str) -> Net {
        Net::of(ip.parse().unwrap())
    }

    #[tokio::test(start_paused = true)]
    async fn so_many_failures_are_let_pass_and_then_one_in_each_part_of_the_time() {
        let (failures, rate, start) = (Failures::default(), "20/min".parse().unwrap(), Instant::now());
        let net = net("192.0.2.1");
        for n in 0..20 {
            assert_eq!(failures.wait(net, rate, start), None, "{n}");
            failures.add(net, rate, start);
        }
        assert_eq!(failures.wait(net, rate, start), Some(Duration::from_secs(3)));
        assert_eq!(failures.wait(net, rate, start + Duration::from_millis(2999)), Some(Duration::from_millis(1)));
        let later = start + Duration::from_secs(3);
        assert_eq!(failures.wait(net, rate, later), None, "who waits as long as asked may try again");
        failures.add(net, rate, later);
        assert_eq!(failures.wait(net, rate, later), Some(Duration::from_secs(3)));
        failures.add(net, rate, later);
        assert_eq!(failures.wait(net, rate, later), Some(Duration::from_secs(3)), "those at once do not add up");
        assert_eq!(failures.wait(self::net("192.0.2.2"), rate, later), None);
        assert_eq!(failures.wait(net, "20/h".parse().unwrap(), later), None, "another limit, another count");
    }
}
