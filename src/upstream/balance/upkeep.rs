//! What goes on beside requests: checks of endpoints, and the lookup of their names.

use std::{
    collections::HashMap,
    io,
    net::{IpAddr, SocketAddr},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use tokio::{
    net::lookup_host,
    task::{AbortHandle, JoinSet},
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tower::util::rng::{HasherRng, Rng};
use tracing::{info, warn};

use super::{Balancer, Entry, Member, config::MAX_ENDPOINTS};
use crate::{
    config::units::HumanDuration,
    message::BoxError,
    telemetry::log::chain,
    upstream::{Address, health::Checker},
};

/// The longest that a name server is waited for.
const LOOKUP: Duration = Duration::from_secs(10);
/// The longest wait before the first check of an endpoint: they are spread, but what is down at the start is found out
/// soon.
const FIRST: Duration = Duration::from_secs(1);
/// How often the end of an ejection is looked for, to show it.
const LOOK: Duration = Duration::from_secs(1);

/// What keeps the live state of an upstream's endpoints, a floor above.
pub trait Roster: Send + Sync {
    /// The endpoint of `entry`, or the one at `dial` that its name stands for.
    ///
    /// # Errors
    /// There can be no client for it.
    fn member(&self, entry: &Entry, dial: Option<SocketAddr>) -> Result<Member, BoxError>;

    /// What checks `member`, if anything does.
    ///
    /// # Errors
    /// There can be no client for it.
    fn checker(&self, member: &Member) -> Result<Option<Checker>, BoxError>;

    /// Drops what belongs to none of `members`.
    fn settle(&self, members: &[Member]);
}

/// A lookup to come.
pub type Lookup = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Finds the addresses of a host and port.
pub type Resolve = fn(host: &str, port: u16) -> Lookup;

/// Asks the system, on a thread that may wait.
#[must_use]
pub fn system(host: &str, port: u16) -> Lookup {
    let host = host.to_owned();
    Box::pin(async move { Ok(lookup_host((host, port)).await?.collect()) })
}

/// The tasks of an upstream. Dropped, they end.
#[derive(Debug)]
pub struct Upkeep {
    _tasks: JoinSet<()>,
}

impl Upkeep {
    /// Looks after the endpoints of `balancer`, which are those of `entries`. Needs a tokio runtime.
    #[must_use]
    pub fn start(balancer: Arc<Balancer>, entries: Vec<Entry>, roster: Arc<dyn Roster>, resolve: Resolve) -> Self {
        let mut tasks = JoinSet::new();
        tasks.spawn(look_after(balancer, entries, roster, resolve));
        Self { _tasks: tasks }
    }
}

async fn look_after(balancer: Arc<Balancer>, entries: Vec<Entry>, roster: Arc<dyn Roster>, resolve: Resolve) {
    let mut checks = Checks::default();
    checks.follow(&balancer, &*roster);
    let every = balancer.config.resolve.on().map(HumanDuration::get);
    let names = every.is_some() && entries.iter().any(|entry| name(&entry.url).is_some());
    let mut lookups = interval(every.filter(|_| names).unwrap_or(Duration::from_secs(86_400)));
    lookups.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut look = interval(LOOK);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = lookups.tick(), if names => {
                if let Some(members) = look_up(&balancer, &entries, &*roster, resolve).await {
                    roster.settle(&members);
                    balancer.replace(members);
                    checks.follow(&balancer, &*roster);
                }
            }
            _ = look.tick(), if balancer.passive.is_some() => {
                let now = Instant::now();
                balancer.members.load().list.iter().for_each(|member| member.endpoint.refresh(now));
            }
            // A check never ends by itself: one that does has panicked, and the others go on.
            Some(_) = checks.tasks.join_next() => {}
            else => return,
        }
    }
}

/// The host of an address that is a name, with its port.
fn name(address: &Address) -> Option<(&str, u16)> {
    let Address::Tcp { authority, .. } = address else { return None };
    let host = authority.host();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    bare.parse::<IpAddr>().is_err().then_some(host).zip(authority.port_u16())
}

/// The endpoints that `entries` stand for now, if they are others than before.
async fn look_up(balancer: &Balancer, entries: &[Entry], roster: &dyn Roster, resolve: Resolve) -> Option<Vec<Member>> {
    let before = balancer.members();
    let mut after: Vec<Member> = Vec::with_capacity(before.len());
    for entry in entries {
        let found = match name(&entry.url) {
            None => Ok(vec![None]),
            Some((host, port)) => addresses(host, port, resolve).await,
        };
        let made = found.and_then(|found| {
            found.into_iter().map(|dial| roster.member(entry, dial).map_err(|error| chain(&*error))).collect()
        });
        let is_name = name(&entry.url).is_some();
        let made: Vec<_> = match made {
            Ok(made) => {
                if is_name {
                    balancer.metrics.resolved.inc();
                }
                made
            }
            Err(error) => {
                balancer.metrics.unresolved.inc();
                let (upstream, endpoint) = (&*balancer.upstream, entry.url.to_string());
                warn!(upstream, endpoint, error, "name not resolved, its last addresses are kept");
                before.iter().filter(|member| member.origin == entry.url).cloned().collect()
            }
        };
        for member in made {
            // Two names may stand for one address.
            if after.len() < MAX_ENDPOINTS && !after.iter().any(|known| known.address == member.address) {
                after.push(member);
            }
        }
    }
    let names = |members: &[Member]| {
        let names: Vec<_> = members.iter().map(|member| (member.address.clone(), member.weight)).collect();
        names
    };
    if names(&before) == names(&after) {
        return None;
    }
    let endpoints: Vec<_> = after.iter().map(|member| &**member.endpoint.name()).collect();
    info!(upstream = &*balancer.upstream, endpoints = endpoints.join(" "), "endpoints changed");
    Some(after)
}

/// What a name stands for, always in the same order.
async fn addresses(host: &str, port: u16, resolve: Resolve) -> Result<Vec<Option<SocketAddr>>, String> {
    let mut found = match timeout(LOOKUP, resolve(host, port)).await {
        Ok(Ok(found)) => found,
        Ok(Err(error)) => return Err(error.to_string()),
        Err(_) => return Err(format!("no answer within {} s", LOOKUP.as_secs())),
    };
    if found.is_empty() {
        return Err("the name has no address".to_owned());
    }
    found.sort_unstable();
    found.dedup();
    Ok(found.into_iter().map(Some).collect())
}

/// The checks that go on, one for each endpoint.
#[derive(Default)]
struct Checks {
    tasks: JoinSet<()>,
    of: HashMap<Address, AbortHandle>,
}

impl Checks {
    /// Begins those of endpoints that are new, and ends those of others.
    fn follow(&mut self, balancer: &Balancer, roster: &dyn Roster) {
        let members = balancer.members();
        self.of.retain(|address, task| {
            let goes_on = members.iter().any(|member| member.address == *address);
            if !goes_on {
                task.abort();
            }
            goes_on
        });
        for member in members {
            if self.of.contains_key(&member.address) {
                continue;
            }
            match roster.checker(&member) {
                Ok(None) => {}
                Ok(Some(checker)) => {
                    let task = self.tasks.spawn(check(member.clone(), checker));
                    self.of.insert(member.address, task);
                }
                Err(error) => {
                    let (upstream, endpoint) = (&**member.endpoint.upstream(), &**member.endpoint.name());
                    warn!(upstream, endpoint, error = chain(&*error), "endpoint cannot be checked");
                }
            }
        }
    }
}

/// Checks an endpoint for ever.
async fn check(member: Member, checker: Checker) {
    let random = |most: Duration| most.mul_f64(HasherRng::new().next_f64());
    let active = checker.active();
    sleep(random(FIRST.min(active.interval.get()))).await;
    loop {
        let error = checker.check().await.err();
        member.endpoint.count_check(error.is_none());
        member.endpoint.change(|health, now| health.checked(error, active, now));
        sleep(active.interval.get() + random(active.jitter.get())).await;
    }
}

#[cfg(test)]
mod tests {
    use parking_lot::Mutex;

    use super::{
        super::{Config, Endpoint},
        *,
    };
    use crate::{
        config::units::Toggle,
        telemetry::Metrics,
        upstream::{Client, client},
    };

    /// Makes members as they come, and notes who was left after each change.
    #[derive(Default)]
    struct Plain {
        metrics: Metrics,
        settled: Mutex<Vec<Vec<String>>>,
    }

    impl Roster for Plain {
        fn member(&self, entry: &Entry, dial: Option<SocketAddr>) -> Result<Member, BoxError> {
            let address = match dial {
                Some(dial) => Address::Tcp { tls: false, authority: dial.to_string().parse()? },
                None => entry.url.clone(),
            };
            let client = Client::dialling("api", &entry.url, dial, &client::Config::default(), &self.metrics)?;
            let endpoint = Arc::new(Endpoint::new("api", &address.to_string(), false, &self.metrics));
            Ok(Member { endpoint, weight: entry.weight, address, origin: entry.url.clone(), dial, client })
        }

        fn checker(&self, _: &Member) -> Result<Option<Checker>, BoxError> {
            Ok(None)
        }

        fn settle(&self, members: &[Member]) {
            self.settled.lock().push(names(members));
        }
    }

    fn names(members: &[Member]) -> Vec<String> {
        members.iter().map(|member| member.endpoint.name().to_string()).collect()
    }

    /// A name server that says something else each time: one address, two, none, nothing, and then two others.
    fn fickle(host: &str, port: u16) -> Lookup {
        static ASKED: Mutex<usize> = Mutex::new(0);
        assert_eq!((host, port), ("backend", 8000));
        let mut asked = ASKED.lock();
        *asked += 1;
        let answer = match *asked {
            1 => Ok(vec![[10, 0, 0, 1]]),
            2 => Ok(vec![[10, 0, 0, 2], [10, 0, 0, 1], [10, 0, 0, 2]]),
            3 => Ok(Vec::new()),
            4 => Err(io::Error::other("no such name")),
            5 => return Box::pin(std::future::pending()),
            _ => Ok(vec![[10, 0, 0, 4], [10, 0, 0, 3]]),
        };
        let found = answer.map(|found| found.into_iter().map(|ip| SocketAddr::from((ip, 8000))).collect());
        Box::pin(async move { found })
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_is_followed_and_what_is_not_known_changes_nothing() {
        let roster = Arc::new(Plain::default());
        let entries: Vec<Entry> =
            ["http://backend:8000", "unix:/a.sock"].map(|url| Entry::from(url.parse::<Address>().unwrap())).into();
        let members = entries.iter().map(|entry| roster.member(entry, None).unwrap()).collect();
        let config = Config { resolve: Toggle::On(HumanDuration::from_secs(30)), ..Config::default() };
        let balancer = Arc::new(Balancer::new("api", config, None, members, &roster.metrics));
        let upkeep = Upkeep::start(balancer.clone(), entries, roster.clone(), fickle);
        let mut seen = Vec::new();
        for _ in 0..7 {
            sleep(Duration::from_secs(15)).await;
            seen.push(names(&balancer.members()));
            sleep(Duration::from_secs(15)).await;
        }
        let with_socket = |ips: &[&str]| -> Vec<String> {
            let ips = ips.iter().map(|ip| format!("{ip}:8000"));
            ips.chain(["unix:/a.sock".to_owned()]).collect()
        };
        let (one, two) = (with_socket(&["10.0.0.1"]), with_socket(&["10.0.0.1", "10.0.0.2"]));
        let others = with_socket(&["10.0.0.3", "10.0.0.4"]);
        assert_eq!(seen, [&one, &two, &two, &two, &two, &others, &others].map(Clone::clone));
        assert_eq!(*roster.settled.lock(), [one, two, others]);
        drop(upkeep);
        tokio::task::yield_now().await;
        assert_eq!(Arc::strong_count(&balancer), 1, "its tasks end with it");
    }

    #[test]
    fn only_names_are_looked_up() {
        let of = |text: &str| {
            let address: Address = text.parse().unwrap();
            name(&address).map(|(host, port)| format!("{host} {port}"))
        };
        assert_eq!(of("http://backend:8000").as_deref(), Some("backend 8000"));
        assert_eq!(of("https://backend").as_deref(), Some("backend 443"));
        for none in ["http://127.0.0.1:8000", "http://[::1]:8000", "unix:/run/app.sock"] {
            assert_eq!(of(none), None, "{none}");
        }
    }
}
