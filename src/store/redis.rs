//! The connection to Redis: one for all requests, calls with a deadline, and a task that looks after it.
//!
//! Calls are written one after the other to one multiplexed connection and wait for their own answers only; none waits
//! for a lock. A call finds the connection by one load of a pointer; where there is none it fails at once.
//!
//! The task connects, asks how Redis is (`PING` every 30 s while it is well) and, while the [breaker](super::breaker) is
//! open, probes it: over a new connection, so that a Sentinel is asked again who the master is, and with a write
//! (`SET` of one key for a minute), which a replica, a Redis that loads and a cluster without quorum refuse. Where the
//! connection breaks, the task is told at once (RESP3; a Redis before 6 is spoken to in RESP2, and its loss is found by
//! the next call or `PING`). The `connection-manager` of the crate does less of this, and makes calls wait for it.
//!
//! Who listens to a channel ([`Redis::subscribe`]) has a connection of its own for it, in RESP2, which every Redis speaks:
//! in a cluster to one of the nodes, as each of them hears what any is told. It is looked at every second, and made anew
//! as long as somebody listens. What was said in between is lost, and the listener told that there was a gap.
//!
//! In a cluster the crate follows `MOVED` and `ASK`, asks for the slots anew and connects to nodes again by itself. The
//! breaker is for the cluster as a whole there, and opens for calls that fail in a row.
//!
//! Addresses, reasons and codes are logged; values, keys and passwords are not.

use std::{
    collections::HashMap,
    fmt,
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering},
    },
};

use ::redis::{
    AsyncConnectionConfig, Client, Cmd, ErrorKind, FromRedisValue, ProtocolVersion, PushInfo, PushKind, RedisError,
    RedisResult, ServerErrorKind, TlsMode, ToRedisArgs, Value,
    aio::{ConnectionLike, MultiplexedConnection, PubSub},
    cluster::ClusterClient,
    cluster_async::ClusterConnection,
    cluster_routing::{MultipleNodeRoutingInfo, RoutingInfo, SingleNodeRoutingInfo},
    sentinel::{SentinelClient, SentinelClientBuilder, SentinelServerType},
};
use arc_swap::ArcSwapOption;
use futures_util::StreamExt;
use parking_lot::Mutex;
use tokio::{
    sync::Notify,
    task::JoinSet,
    time::{Duration, Instant, sleep, sleep_until, timeout},
};
use tracing::{debug, error, info, warn};

use super::{Charge, Config, Failure, Key, Script, breaker::Breaker, config::Resolved};
use crate::{
    message::BoxError,
    telemetry::{Metrics, metrics::RedisMetrics},
};

/// Between two looks at a Redis that is well.
const PING: Duration = Duration::from_secs(30);

/// Calls that may wait to be written; more wait for that, within their deadline.
const BUFFER: usize = 1024;

/// Between two errors logged about calls that Redis refuses.
const COMPLAINT: Duration = Duration::from_secs(10);

/// How long the key of a probe lives.
const PROBED: Duration = Duration::from_secs(60);

/// The longest reason kept and logged, in characters.
const MAX_REASON: usize = 200;

/// Between two looks at a connection that listens. What it would have heard is known to be missing so much later.
const LISTENS: Duration = Duration::from_secs(1);

/// Redis, with its connection. Cheap to clone; the connection and its task end with the last clone.
#[derive(Clone)]
pub struct Redis(Arc<Owner>);

struct Owner {
    shared: Arc<Shared>,
    /// The task that looks after the connection. Dropped, it ends.
    _upkeep: Mutex<JoinSet<()>>,
}

struct Shared {
    dialer: Dialer,
    resolved: Resolved,
    name: String,
    deadline: Duration,
    /// Where calls go; none while the breaker is open.
    link: ArcSwapOption<Link>,
    breaker: Mutex<Breaker>,
    /// Whether the next answer has something to mend.
    suspect: AtomicBool,
    wake: Notify,
    story: Mutex<Story>,
    /// Nanoseconds that the last look at it took; 0 before the first.
    latency: AtomicU64,
    connected: AtomicU64,
    in_flight: AtomicI64,
    metrics: RedisMetrics,
}

/// What is told of the state.
struct Story {
    since: Instant,
    reason: Option<Reason>,
    complained: Option<Instant>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Reason {
    failure: Failure,
    detail: String,
}

struct Link {
    generation: u64,
    connection: Connection,
}

#[derive(Clone)]
enum Connection {
    Single(MultiplexedConnection),
    Cluster(ClusterConnection),
}

impl Connection {
    async fn send(&mut self, command: &Cmd) -> RedisResult<Value> {
        let value = match self {
            Self::Single(connection) => connection.send_packed_command(command).await,
            Self::Cluster(connection) => connection.req_packed_command(command).await,
        };
        // An error that Redis answers is a value so far.
        value?.extract_error()
    }

    /// To this node of a cluster, or to all primaries, whose answers come by node.
    async fn send_to(&mut self, node: Option<(String, u16)>, command: &Cmd) -> RedisResult<Value> {
        match self {
            Self::Single(_) => self.send(command).await,
            Self::Cluster(cluster) => {
                let to = match node {
                    None => RoutingInfo::MultiNode((MultipleNodeRoutingInfo::AllMasters, None)),
                    Some((host, port)) => RoutingInfo::SingleNode(SingleNodeRoutingInfo::ByAddress { host, port }),
                };
                cluster.route_command(command.clone(), to).await?.extract_error()
            }
        }
    }
}

/// Whether calls pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// There has been no connection yet.
    Connecting,
    /// Calls pass.
    Up,
    /// It failed, and is being probed.
    Down,
}

impl State {
    /// As the operator reads it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Connecting => "connecting",
            Self::Up => "up",
            Self::Down => "down",
        }
    }
}

/// How Redis is.
#[derive(Debug, Clone)]
pub struct Figures {
    /// Whether calls pass.
    pub state: State,
    /// Since when.
    pub since: Duration,
    /// What is wrong, and what Redis or the system says of it. Also while it is up, where it refused the last call.
    pub reason: Option<(Failure, String)>,
    /// How long the last look at it took.
    pub latency: Option<Duration>,
    /// Connections made after the first one.
    pub reconnects: u64,
    /// Calls that wait for their answers.
    pub in_flight: i64,
    /// `single`, `sentinel` or `cluster`.
    pub mode: &'static str,
    /// Where it is, without user and password.
    pub addresses: Vec<String>,
}

impl fmt::Debug for Redis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Redis").field("name", &self.0.shared.name).finish_non_exhaustive()
    }
}

impl Redis {
    /// Starts to connect, and goes on until it is dropped. Does not wait: without a Redis there, calls fail. Needs a
    /// tokio runtime.
    ///
    /// # Errors
    /// A secret or a file that cannot be read, or settings that cannot be used.
    pub fn start(config: &Config, metrics: &Metrics) -> Result<Self, BoxError> {
        let resolved = config.resolve()?;
        let dialer = Dialer::new(&resolved)?;
        let now = Instant::now();
        let addresses: Vec<_> = config.url.iter().map(super::config::Address::name).collect();
        let shared = Arc::new(Shared {
            dialer,
            resolved,
            name: addresses.join(","),
            deadline: config.timeout.get(),
            link: ArcSwapOption::empty(),
            breaker: Mutex::new(Breaker::new(config.breaker.clone(), now)),
            suspect: AtomicBool::new(false),
            wake: Notify::new(),
            story: Mutex::new(Story { since: now, reason: None, complained: None }),
            latency: AtomicU64::new(0),
            connected: AtomicU64::new(0),
            in_flight: AtomicI64::new(0),
            metrics: metrics.redis(&Failure::ASKED.map(Failure::as_str)),
        });
        let mut upkeep = JoinSet::new();
        upkeep.spawn(shared.clone().look_after());
        Ok(Self(Arc::new(Owner { shared, _upkeep: Mutex::new(upkeep) })))
    }

    /// Whether it was started with these settings, and its secrets and files say what they said then.
    #[must_use]
    pub fn is_of(&self, config: &Config) -> bool {
        config.resolve().is_ok_and(|resolved| resolved == self.0.shared.resolved)
    }

    /// Whether `other` is a clone of it: the same connection.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }

    /// The name of something; see [`Key::new`].
    #[must_use]
    pub fn key(&self, kind: &'static str, tag: &str, rest: &str) -> Key {
        Key::new(&self.0.shared.resolved.config.prefix, kind, tag, rest)
    }

    /// Runs `script` in one step, with `keys` as `KEYS` and `args` as `ARGV` (an empty slice for none). All keys have the same tag.
    ///
    /// # Errors
    /// See [`Failure`]. After [`Failure::Timeout`] and [`Failure::Lost`] the script may have run or may yet run.
    pub async fn run<T: FromRedisValue>(
        &self,
        script: &'static Script,
        keys: &[Key],
        args: impl ToRedisArgs,
    ) -> Result<T, Failure> {
        let command = |name: &str, script: &str| {
            let mut command = ::redis::cmd(name);
            command.arg(script).arg(keys.len());
            for key in keys {
                command.arg(key.as_str());
            }
            command.arg(&args);
            command
        };
        let shared = &self.0.shared;
        shared
            .call(script.name(), async |connection| match connection.send(&command("EVALSHA", script.hash())).await {
                Err(error) if error.kind() == ErrorKind::Server(ServerErrorKind::NoScript) => {
                    connection.send(&command("EVAL", script.text())).await
                }
                answer => answer,
            })
            .await
    }

    /// What is at `key`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn get(&self, key: &Key) -> Result<Option<Vec<u8>>, Failure> {
        let mut command = ::redis::cmd("GET");
        command.arg(key.as_str());
        self.send("get", &command).await
    }

    /// The list at `key`, from its first element; empty where there is none.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn list(&self, key: &Key) -> Result<Vec<Vec<u8>>, Failure> {
        let mut command = ::redis::cmd("LRANGE");
        command.arg(key.as_str()).arg(0).arg(-1);
        self.send("list", &command).await
    }

    /// The fields of the hash at `key`; none where there is none.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn hash(&self, key: &Key) -> Result<HashMap<String, Vec<u8>>, Failure> {
        let mut command = ::redis::cmd("HGETALL");
        command.arg(key.as_str());
        self.send("hash", &command).await
    }

    /// Tells those who listen to `channel`, and nobody if there are none.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn publish(&self, channel: &Key, message: &[u8]) -> Result<(), Failure> {
        let mut command = ::redis::cmd("PUBLISH");
        command.arg(channel.as_str()).arg(message);
        self.send("publish", &command).await
    }

    /// Tells `heard` of all that is published on `channel`, and from when to when it is listened to. It must not wait.
    /// Needs a tokio runtime.
    #[must_use]
    pub fn subscribe(&self, channel: &Key, heard: impl FnMut(Heard<'_>) + Send + 'static) -> Subscription {
        let mut listens = JoinSet::new();
        listens.spawn(self.0.shared.clone().listen(channel.clone(), heard));
        Subscription { _listens: listens }
    }

    /// Puts `value` there for `ttl`, which is rounded up to milliseconds and is at least one.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn set(&self, key: &Key, value: &[u8], ttl: Duration) -> Result<(), Failure> {
        let mut command = ::redis::cmd("SET");
        command.arg(key.as_str()).arg(value).arg("PX").arg(millis(ttl));
        self.send("set", &command).await
    }

    /// Lets what is at `key` live for `ttl` from now. False where there is nothing.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn expire(&self, key: &Key, ttl: Duration) -> Result<bool, Failure> {
        let mut command = ::redis::cmd("PEXPIRE");
        command.arg(key.as_str()).arg(millis(ttl));
        self.send("expire", &command).await
    }

    /// Takes out what is at `key`. False where there is nothing.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn delete(&self, key: &Key) -> Result<bool, Failure> {
        let mut command = ::redis::cmd("DEL");
        command.arg(key.as_str());
        self.send("delete", &command).await
    }

    /// A walk over all keys of `kind` whose tags begin with `tag`: letters, digits, or nothing.
    #[must_use]
    pub fn walk(&self, kind: &'static str, tag: &str) -> Walk {
        let beginning = Key::beginning(&self.0.shared.resolved.config.prefix, kind, tag);
        Walk { beginning, left: vec![(None, 0)] }
    }

    /// How full it is; none where it has no `maxmemory`.
    ///
    /// # Errors
    /// See [`Failure`].
    pub async fn memory(&self) -> Result<Option<Memory>, Failure> {
        let mut command = ::redis::cmd("INFO");
        command.arg("memory");
        let answer = self.0.shared.call("memory", async |connection| connection.send_to(None, &command).await);
        let texts: Vec<Value> = match answer.await? {
            Value::Map(nodes) => nodes.into_iter().map(|(_, text)| text).collect(),
            text => vec![text],
        };
        let texts = texts.into_iter().filter_map(|text| String::from_redis_value(text).ok());
        Ok(texts.filter_map(|text| Memory::of(&text)).max_by_key(|Memory { used, max }| used.saturating_mul(100) / max))
    }

    async fn send<T: FromRedisValue>(&self, what: &'static str, command: &Cmd) -> Result<T, Failure> {
        self.0.shared.call(what, async |connection| connection.send(command).await).await
    }

    /// Whether it is a cluster, where what has not the same tag is asked for one by one.
    #[must_use]
    pub fn is_cluster(&self) -> bool {
        self.0.shared.dialer.is_cluster()
    }

    /// How long a call takes at most.
    #[must_use]
    pub fn deadline(&self) -> Duration {
        self.0.shared.deadline
    }

    /// Whether calls pass. They may fail all the same; that they fail costs no time while this is false.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.0.shared.link.load().is_some()
    }

    /// How it is, for operators.
    #[must_use]
    pub fn figures(&self) -> Figures {
        let shared = &self.0.shared;
        let connected = shared.connected.load(Ordering::Relaxed);
        let latency = Some(shared.latency.load(Ordering::Relaxed)).filter(|nanos| *nanos > 0);
        let up = self.is_up();
        let story = shared.story.lock();
        Figures {
            state: match (up, connected) {
                (true, _) => State::Up,
                (false, 0) => State::Connecting,
                (false, _) => State::Down,
            },
            since: story.since.elapsed(),
            reason: story.reason.as_ref().map(|reason| (reason.failure, reason.detail.clone())),
            latency: latency.map(Duration::from_nanos),
            reconnects: connected.saturating_sub(1),
            in_flight: shared.in_flight.load(Ordering::Relaxed),
            mode: shared.dialer.mode(),
            addresses: shared.resolved.config.url.iter().map(super::config::Address::name).collect(),
        }
    }
}

/// How full a Redis is: in a cluster, the fullest of its primaries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Memory {
    /// `used_memory`, in bytes.
    pub used: u64,
    /// `maxmemory`, in bytes.
    pub max: u64,
}

impl Memory {
    /// What `INFO memory` says; none where there is no `maxmemory`.
    fn of(text: &str) -> Option<Self> {
        let number = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
        let (used, max) = (number("used_memory:")?, number("maxmemory:").filter(|max| *max > 0)?);
        Some(Self { used, max })
    }
}

/// What somebody hears who listens to a channel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heard<'a> {
    /// All that is published from now on.
    Everything,
    /// Nothing any more, and what was published lately is perhaps lost.
    Nothing,
    /// What was published.
    Message(&'a [u8]),
}

/// Listens to a channel until it is dropped.
#[derive(Debug)]
pub struct Subscription {
    _listens: JoinSet<()>,
}

/// A walk over keys, a step at a time, for operators: Redis looks at all keys that it has, and not only at those that are
/// meant. What is there from beginning to end is met at least once, what comes or goes meanwhile perhaps.
#[derive(Debug)]
pub struct Walk {
    beginning: String,
    /// Where to go on, by node and cursor. A node is none where there is but one, and where the nodes are not known yet.
    left: Vec<(Option<(String, u16)>, u64)>,
}

impl Walk {
    /// Keys that one step looks at: about a millisecond of Redis' time.
    const STEP: usize = 1000;

    /// Whether there is nothing left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.left.is_empty()
    }

    /// The keys of the next step, which may be none before the end. In a cluster, those of all primaries at first, and then
    /// of one after the other.
    ///
    /// # Errors
    /// See [`Failure`]. The step may be tried again.
    pub async fn step(&mut self, redis: &Redis) -> Result<Vec<Key>, Failure> {
        let Some((node, cursor)) = self.left.last().cloned() else { return Ok(Vec::new()) };
        let mut command = ::redis::cmd("SCAN");
        command.arg(cursor).arg("MATCH").arg(format!("{}*", self.beginning)).arg("COUNT").arg(Self::STEP);
        let answer: Value =
            redis.0.shared.call("scan", async |connection| connection.send_to(node.clone(), &command).await).await?;
        let scanned = match answer {
            Value::Map(nodes) => nodes.into_iter().map(|(name, answer)| (address(&name), answer)).collect(),
            answer => vec![(node, answer)],
        };
        self.left.pop();
        let mut keys = Vec::new();
        for (node, answer) in scanned {
            let (cursor, found): (u64, Vec<String>) =
                FromRedisValue::from_redis_value(answer).map_err(|_| Failure::Refused)?;
            if cursor != 0 {
                self.left.push((node, cursor));
            }
            keys.extend(found.into_iter().filter(|key| key.starts_with(&self.beginning)).map(|key| Key(key.into())));
        }
        Ok(keys)
    }
}

/// The address of a node, as the crate names it.
fn address(name: &Value) -> Option<(String, u16)> {
    let name: String = FromRedisValue::from_redis_value_ref(name).ok()?;
    let (host, port) = name.rsplit_once(':')?;
    Some((host.to_owned(), port.parse().ok()?))
}

fn millis(ttl: Duration) -> u64 {
    u64::try_from(ttl.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX).clamp(1, 1 << 53)
}

/// Counts a call for as long as it lasts, also where its client leaves.
struct InFlight<'a>(&'a Shared);

impl<'a> InFlight<'a> {
    fn of(shared: &'a Shared) -> Self {
        shared.in_flight.fetch_add(1, Ordering::Relaxed);
        shared.metrics.in_flight.inc();
        Self(shared)
    }
}

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
        self.0.metrics.in_flight.dec();
    }
}

impl Shared {
    async fn call<T: FromRedisValue>(
        &self,
        what: &'static str,
        send: impl AsyncFnOnce(&mut Connection) -> RedisResult<Value>,
    ) -> Result<T, Failure> {
        let Some((generation, mut connection)) =
            self.link.load().as_ref().map(|link| (link.generation, link.connection.clone()))
        else {
            self.metrics.refused();
            return Err(Failure::Unavailable);
        };
        let started = Instant::now();
        let in_flight = InFlight::of(self);
        let answer = timeout(self.deadline, send(&mut connection)).await;
        drop(in_flight);
        let Ok(answer) = answer else {
            self.failed(what, generation, Failure::Timeout, None);
            self.metrics.called(Failure::Timeout.as_str(), started.elapsed());
            return Err(Failure::Timeout);
        };
        let answer = answer.map_err(|error| (classify(&error), error)).and_then(|value| {
            // An answer of another form is none of the connection's business.
            T::from_redis_value(value).map_err(|error| (Failure::Refused, RedisError::from(error)))
        });
        match answer {
            Ok(answer) => {
                self.metrics.called("ok", started.elapsed());
                if self.suspect.load(Ordering::Relaxed) {
                    self.mend(generation);
                }
                Ok(answer)
            }
            Err((failure, error)) => {
                self.failed(what, generation, failure, Some(&error));
                self.metrics.called(failure.as_str(), started.elapsed());
                Err(failure)
            }
        }
    }

    /// A call was answered after others were not.
    fn mend(&self, generation: u64) {
        let mut breaker = self.breaker.lock();
        breaker.success(generation);
        if breaker.probe_at().is_none() {
            self.story.lock().reason = None;
            self.suspect.store(false, Ordering::Relaxed);
        }
    }

    fn failed(&self, what: &'static str, generation: u64, failure: Failure, error: Option<&RedisError>) {
        debug!(redis = %self.name, call = what, outcome = failure.as_str(), "redis call failed");
        let detail = error.map(told).unwrap_or_default();
        let mut breaker = self.breaker.lock();
        self.suspect.store(true, Ordering::Relaxed);
        let now = Instant::now();
        if breaker.failure(failure.charge(self.dialer.is_cluster()), generation, now) {
            self.open(failure, detail);
            return;
        }
        if breaker.probe_at().is_none() && failure.charge(false) == Charge::Nothing {
            let mut story = self.story.lock();
            if story.complained.is_none_or(|last| now.duration_since(last) >= COMPLAINT) {
                story.complained = Some(now);
                let outcome = failure.as_str();
                if failure == Failure::Refused {
                    error!(redis = %self.name, call = what, outcome, error = %detail, "redis refused a call");
                } else {
                    warn!(redis = %self.name, call = what, outcome, error = %detail, "redis refused a call");
                }
            }
            story.reason = Some(Reason { failure, detail });
        }
    }

    /// No call passes any more. The breaker is held.
    fn open(&self, failure: Failure, detail: String) {
        self.link.store(None);
        self.metrics.state.set(2);
        warn!(redis = %self.name, outcome = failure.as_str(), error = %detail, "redis lost, going on without it");
        *self.story.lock() =
            Story { since: Instant::now(), reason: Some(Reason { failure, detail }), complained: None };
        self.wake.notify_one();
    }

    /// Connects, looks, probes, for ever.
    async fn look_after(self: Arc<Self>) {
        self.metrics.state.set(2);
        loop {
            let due = self.breaker.lock().probe_at();
            if let Some(at) = due {
                sleep_until(at).await;
                self.probe().await;
            } else {
                tokio::select! {
                    () = self.wake.notified() => {}
                    () = sleep(PING) => self.ping().await,
                }
            }
        }
    }

    /// Listens to `channel`, for ever.
    async fn listen(self: Arc<Self>, channel: Key, mut heard: impl FnMut(Heard<'_>)) {
        let (first, most) =
            (self.resolved.config.breaker.recovery.get(), self.resolved.config.breaker.max_recovery.get());
        let (mut wait, mut round) = (first, 0);
        loop {
            let dialled = timeout(self.dialer.patience, self.dialer.listen(&self.resolved, round, &channel)).await;
            match dialled.unwrap_or_else(|_| Err((ErrorKind::Io, "no connection in time").into())) {
                Ok(connection) => {
                    wait = first;
                    debug!(redis = %self.name, "listening");
                    heard(Heard::Everything);
                    self.hear(connection, &mut heard).await;
                    heard(Heard::Nothing);
                    debug!(redis = %self.name, "no longer listening");
                }
                Err(error) => debug!(redis = %self.name, error = %told(&error), "not listening"),
            }
            round += 1;
            sleep(wait).await;
            wait = (wait * 2).min(most);
        }
    }

    /// Hands on what is heard, until nothing more will be.
    async fn hear(&self, connection: PubSub, heard: &mut impl FnMut(Heard<'_>)) {
        let (mut sink, mut stream) = connection.split();
        let looks = async {
            loop {
                sleep(LISTENS).await;
                // By the patience that connecting has: a machine that is busy for a moment is no reason to connect anew.
                if !matches!(timeout(self.dialer.patience, sink.ping::<Value>()).await, Ok(Ok(_))) {
                    return;
                }
            }
        };
        let listening = async {
            while let Some(message) = stream.next().await {
                heard(Heard::Message(message.get_payload_bytes()));
            }
        };
        tokio::select! { () = looks => {}, () = listening => {} }
    }

    /// Asks a Redis that is well.
    async fn ping(&self) {
        let link = self.link.load_full();
        let Some(link) = link else { return };
        let mut connection = link.connection.clone();
        // In a cluster `PING` goes to all nodes, and one that is missing is not the cluster's end.
        let command = if self.dialer.is_cluster() { self.write() } else { ::redis::cmd("PING") };
        let started = Instant::now();
        let answer = timeout(self.deadline, connection.send(&command)).await;
        let (failure, detail) = match answer {
            Ok(Ok(_)) => {
                self.took(started);
                return;
            }
            Ok(Err(error)) => (classify(&error), told(&error)),
            Err(_) => (Failure::Timeout, String::new()),
        };
        if is_well(failure) {
            self.took(started);
            return;
        }
        let mut breaker = self.breaker.lock();
        if breaker.failure(Charge::Trips, link.generation, Instant::now()) {
            self.suspect.store(true, Ordering::Relaxed);
            self.open(failure, detail);
        }
    }

    fn took(&self, started: Instant) {
        let nanos = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX).max(1);
        self.latency.store(nanos, Ordering::Relaxed);
    }

    fn write(&self) -> Cmd {
        let key = Key::new(&self.resolved.config.prefix, "probe", "probe", "");
        let mut command = ::redis::cmd("SET");
        command.arg(key.as_str()).arg(1).arg("PX").arg(millis(PROBED));
        command
    }

    /// Connects anew and tries a write.
    async fn probe(self: &Arc<Self>) {
        self.metrics.state.set(1);
        let gone = Arc::new(AtomicBool::new(false));
        let generation = self.breaker.lock().generation() + 1;
        let outcome = self.try_out(generation, &gone).await;
        let now = Instant::now();
        let connection = match outcome {
            Ok(connection) => connection,
            Err(reason) => {
                self.breaker.lock().probed(false, now);
                self.metrics.state.set(2);
                let mut story = self.story.lock();
                // What it says may change at each try; what is wrong does not.
                if story.reason.as_ref().map(|reason| reason.failure) != Some(reason.failure) {
                    let outcome = reason.failure.as_str();
                    warn!(redis = %self.name, outcome, error = %reason.detail, "redis is out of order");
                }
                story.reason = Some(reason);
                return;
            }
        };
        let mut breaker = self.breaker.lock();
        let Some(generation) = breaker.probed(true, now) else { return };
        self.link.store(Some(Arc::new(Link { generation, connection })));
        self.suspect.store(true, Ordering::Relaxed);
        self.metrics.state.set(0);
        self.metrics.connected.inc();
        let before = self.connected.fetch_add(1, Ordering::Relaxed);
        let mut story = self.story.lock();
        let took = now.duration_since(story.since).as_secs_f64() * 1000.0;
        let mode = self.dialer.mode();
        info!(redis = %self.name, mode, connects = before + 1, after_ms = took, "redis connected");
        *story = Story { since: now, reason: None, complained: story.complained };
        drop((story, breaker));
        if gone.load(Ordering::Acquire) {
            self.lost(generation);
        }
    }

    async fn try_out(self: &Arc<Self>, generation: u64, gone: &Arc<AtomicBool>) -> Result<Connection, Reason> {
        let late = |detail: &str| Reason { failure: Failure::Timeout, detail: detail.to_owned() };
        let reason = |error: RedisError| Reason { failure: classify(&error), detail: told(&error) };
        let (weak, gone) = (Arc::downgrade(self), gone.clone());
        let watch = move |info: PushInfo| {
            if info.kind == PushKind::Disconnection {
                gone.store(true, Ordering::Release);
                if let Some(shared) = Weak::upgrade(&weak) {
                    shared.lost(generation);
                }
            }
            Ok::<_, ::redis::aio::SendError>(())
        };
        let dialled = timeout(self.dialer.patience, self.dialer.dial(watch)).await;
        let mut connection = dialled.map_err(|_| late("no connection in time"))?.map_err(reason)?;
        let started = Instant::now();
        let written = timeout(self.deadline, connection.send(&self.write())).await;
        match written.map_err(|_| late("no answer in time"))? {
            Err(error) if !is_well(classify(&error)) => Err(reason(error)),
            _ => {
                self.took(started);
                Ok(connection)
            }
        }
    }

    /// The connection of `generation` broke.
    fn lost(&self, generation: u64) {
        let mut breaker = self.breaker.lock();
        if breaker.failure(Charge::Trips, generation, Instant::now()) {
            self.suspect.store(true, Ordering::Relaxed);
            self.open(Failure::Lost, "the connection was closed".to_owned());
        }
    }
}

/// Whether Redis serves all the same: it is full, or its user may not write this key.
fn is_well(failure: Failure) -> bool {
    matches!(failure, Failure::Full | Failure::Forbidden)
}

/// What an error says of Redis.
fn classify(error: &RedisError) -> Failure {
    match error.kind() {
        ErrorKind::AuthenticationFailed => return Failure::Unauthorized,
        ErrorKind::MasterNameNotFoundBySentinel | ErrorKind::NoValidReplicasFoundBySentinel => {
            return Failure::NotReady;
        }
        ErrorKind::Parse | ErrorKind::ClusterConnectionNotFound => return Failure::Lost,
        _ => {}
    }
    if error.is_timeout() {
        return Failure::Timeout;
    }
    if error.is_io_error() || error.is_connection_dropped() {
        return Failure::Lost;
    }
    let code = error.code().unwrap_or_default();
    let known = of_code(code);
    // Redis 6 wraps what a script ran into: `-OOM command not allowed` behind `ERR Error running script`.
    known.or_else(|| error.detail()?.split([' ', ':']).find_map(|word| of_code(word.strip_prefix('-')?))).unwrap_or(
        // What a setup with a wrong password says, wrapped by the crate.
        if code == "ERR" && error.detail().is_some_and(|detail| detail.contains("AUTH")) {
            Failure::Unauthorized
        } else {
            Failure::Refused
        },
    )
}

fn of_code(code: &str) -> Option<Failure> {
    Some(match code {
        "LOADING" | "BUSY" | "MASTERDOWN" | "CLUSTERDOWN" | "TRYAGAIN" => Failure::NotReady,
        "READONLY" => Failure::ReadOnly,
        "OOM" | "MISCONF" | "NOREPLICAS" => Failure::Full,
        "NOAUTH" | "WRONGPASS" => Failure::Unauthorized,
        "NOPERM" => Failure::Forbidden,
        "MOVED" | "ASK" => Failure::Clustered,
        _ => return None,
    })
}

/// An error in a few words.
fn told(error: &RedisError) -> String {
    let text = error.to_string();
    let text = text.replace(char::is_control, " ");
    text.chars().take(MAX_REASON).collect()
}

/// How connections are made.
struct Dialer {
    how: How,
    config: AsyncConnectionConfig,
    /// How long making one may take in all.
    patience: Duration,
    /// Whether it speaks RESP3, as far as is known.
    resp3: AtomicBool,
}

enum How {
    /// With RESP3, and without.
    Single(Client, Client),
    Sentinel(Box<tokio::sync::Mutex<SentinelClient>>, Box<tokio::sync::Mutex<SentinelClient>>),
    Cluster(ClusterClient),
}

impl Dialer {
    fn new(resolved: &Resolved) -> Result<Self, BoxError> {
        if resolved.tls() && rustls::crypto::CryptoProvider::get_default().is_none() {
            // The crate takes that of the process. Somebody else may have set one in between: as good.
            drop(rustls::crypto::ring::default_provider().install_default());
        }
        let config = &resolved.config;
        let connect = config.connect_timeout.get();
        let (how, rounds) = if config.cluster {
            let mut builder = ClusterClient::builder(resolved.infos(ProtocolVersion::RESP2)?)
                .connection_timeout(connect)
                .response_timeout(connect)
                .overall_response_timeout(None)
                .retries(3)
                .min_retry_wait(5)
                .max_retry_wait(50)
                .use_protocol(ProtocolVersion::RESP2);
            if resolved.tls() {
                builder = builder.tls(TlsMode::Secure).certs(resolved.certificates());
            }
            (How::Cluster(builder.build()?), config.url.0.len())
        } else if let Some(sentinel) = &config.sentinel {
            let client =
                |protocol| sentinel_client(resolved, sentinel, protocol).map(tokio::sync::Mutex::new).map(Box::new);
            (How::Sentinel(client(ProtocolVersion::RESP3)?, client(ProtocolVersion::RESP2)?), config.url.0.len())
        } else {
            let client = |protocol| {
                let info = resolved.infos(protocol)?.into_iter().next().ok_or("no address")?;
                let client = if resolved.tls() {
                    Client::build_with_tls(info, resolved.certificates())
                } else {
                    Client::open(info)
                };
                client.map_err(BoxError::from)
            };
            (How::Single(client(ProtocolVersion::RESP3)?, client(ProtocolVersion::RESP2)?), 0)
        };
        let config = AsyncConnectionConfig::new()
            .set_connection_timeout(Some(connect))
            // Every call has its deadline already.
            .set_response_timeout(None)
            .set_pipeline_buffer_size(BUFFER);
        let rounds = u32::try_from(rounds).unwrap_or(u32::MAX).saturating_add(1);
        Ok(Self { how, config, patience: connect.saturating_mul(rounds), resp3: AtomicBool::new(true) })
    }

    fn mode(&self) -> &'static str {
        match self.how {
            How::Single(..) => "single",
            How::Sentinel(..) => "sentinel",
            How::Cluster(_) => "cluster",
        }
    }

    fn is_cluster(&self) -> bool {
        matches!(self.how, How::Cluster(_))
    }

    async fn dial(&self, watch: impl ::redis::aio::AsyncPushSender) -> RedisResult<Connection> {
        if let How::Cluster(client) = &self.how {
            return client.get_async_connection().await.map(Connection::Cluster);
        }
        if self.resp3.load(Ordering::Relaxed) {
            let config = self.config.clone().set_push_sender(watch);
            match self.connect(true, &config).await {
                Err(error) if error.kind() == ErrorKind::RESP3NotSupported => {
                    self.resp3.store(false, Ordering::Relaxed);
                }
                outcome => return outcome,
            }
        }
        self.connect(false, &self.config).await
    }

    /// A connection that listens to `channel`; in a cluster to another node in each `round`.
    async fn listen(&self, resolved: &Resolved, round: usize, channel: &Key) -> RedisResult<PubSub> {
        let client = match &self.how {
            How::Single(_, two) => two.clone(),
            How::Sentinel(_, two) => two.lock().await.async_get_client().await?,
            How::Cluster(_) => {
                let infos = resolved.infos(ProtocolVersion::RESP2)?;
                let nodes = infos.len().max(1);
                let info = infos.into_iter().nth(round % nodes);
                let info = info.ok_or((ErrorKind::InvalidClientConfig, "no address"))?;
                if resolved.tls() {
                    Client::build_with_tls(info, resolved.certificates())?
                } else {
                    Client::open(info)?
                }
            }
        };
        let mut connection = client.get_async_pubsub().await?;
        connection.subscribe(channel.as_str()).await?;
        Ok(connection)
    }

    async fn connect(&self, resp3: bool, config: &AsyncConnectionConfig) -> RedisResult<Connection> {
        let connection = match &self.how {
            How::Single(three, two) => {
                let client = if resp3 { three } else { two };
                client.get_multiplexed_async_connection_with_config(config).await?
            }
            How::Sentinel(three, two) => {
                let client = if resp3 { three } else { two };
                // Only the task comes here, and who listens.
                client.lock().await.get_async_connection_with_config(config).await?
            }
            How::Cluster(client) => return client.get_async_connection().await.map(Connection::Cluster),
        };
        Ok(Connection::Single(connection))
    }
}

fn sentinel_client(
    resolved: &Resolved,
    sentinel: &super::config::Sentinel,
    protocol: ProtocolVersion,
) -> RedisResult<SentinelClient> {
    let mut builder = SentinelClientBuilder::new(resolved.addrs(), &sentinel.master, SentinelServerType::Master)?
        .set_client_to_redis_db(resolved.database().into())
        .set_client_to_redis_protocol(protocol);
    if let Some(user) = resolved.user() {
        builder = builder.set_client_to_redis_username(user);
    }
    if let Some(password) = resolved.password() {
        builder = builder.set_client_to_redis_password(password);
    }
    if let Some(user) = &sentinel.user {
        builder = builder.set_client_to_sentinel_username(user);
    }
    if let Some(password) = &resolved.sentinel_password {
        builder = builder.set_client_to_sentinel_password(password);
    }
    if resolved.tls() {
        builder = builder
            .set_client_to_redis_tls_mode(TlsMode::Secure)
            .set_client_to_redis_certificates(resolved.certificates())
            .set_client_to_sentinel_tls_mode(TlsMode::Secure)
            .set_client_to_sentinel_certificates(resolved.certificates());
    }
    builder.build()
}

#[cfg(test)]
mod tests {
    use ::redis::make_extension_error;

    use super::*;

    #[test]
    fn errors_are_classified() {
        let of = |code: &str, detail: &str| classify(&make_extension_error(code.to_owned(), Some(detail.to_owned())));
        assert_eq!(of("OOM", "command not allowed"), Failure::Full);
        assert_eq!(of("NOPERM", "this user"), Failure::Forbidden);
        assert_eq!(of("LOADING", "the dataset"), Failure::NotReady);
        assert_eq!(of("READONLY", "You can't"), Failure::ReadOnly);
        assert_eq!(of("WRONGPASS", "invalid"), Failure::Unauthorized);
        assert_eq!(of("MOVED", "1 127.0.0.1:1"), Failure::Clustered);
        assert_eq!(of("CROSSSLOT", "Keys"), Failure::Refused);
        let wrapped = "Error running script (call to f_1): @user_script:1: @user_script: 1: -OOM command not allowed";
        assert_eq!(of("ERR", wrapped), Failure::Full);
        assert_eq!(of("ERR", "Protocol error: expected 'OOM'"), Failure::Refused);
    }

    #[test]
    fn a_time_to_live_is_never_none() {
        assert_eq!(millis(Duration::ZERO), 1);
        assert_eq!(millis(Duration::from_micros(1500)), 2);
        assert!(millis(Duration::MAX) > 0);
    }
}
