//! What outlives a configuration: samples, the log, and what is known of upstreams and their endpoints.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use http::HeaderValue;
use parking_lot::Mutex;

use crate::{
    layers::{
        auth, cache,
        circuit_breaker::{self, Breaker},
        concurrency::{self, Limiter, Scope},
        hygiene::pseudonym,
        rate_limit,
        retry::Budget,
        session,
    },
    message::BoxError,
    settings::{Settings, Upstream},
    store::{self, Redis},
    telemetry::{Metrics, log::Writer},
    upstream::{
        Address, Client,
        balance::{self, Balancer, Endpoint, Entry, Member, Roster, Upkeep},
        client,
        health::{self, Checker},
    },
};

/// The live state of the process. A reload builds its new stack from the same one.
pub struct Registry {
    log: Writer,
    via: HeaderValue,
    live: Arc<Live>,
    budgets: Mutex<HashMap<String, Budget>>,
    limiters: Mutex<HashMap<(Scope, String), Arc<Limiter>>>,
    balancers: Mutex<HashMap<String, Balancers>>,
    auth: auth::State,
    sessions: session::State,
    rate_limits: rate_limit::State,
    caches: cache::State,
    gates: Mutex<Vec<Arc<rate_limit::Gate>>>,
    redis: Mutex<Store>,
}

/// The Redis that holds, and that of a configuration that may come to.
#[derive(Default)]
struct Store {
    holds: Option<Redis>,
    built: Option<Redis>,
}

/// An endpoint of an upstream, by both their names as logs and metrics have them.
type Key = (String, String);

/// What is known of endpoints. Shared with the tasks of upstreams, which find new ones.
struct Live {
    metrics: Metrics,
    /// The one that holds, and that of a configuration that may come to.
    clients: Mutex<HashMap<Key, Vec<Known>>>,
    breakers: Mutex<HashMap<Key, Arc<Breaker>>>,
    endpoints: Mutex<HashMap<Key, Arc<Endpoint>>>,
    /// A configuration has taken effect: endpoints that come now are added to a running process.
    running: AtomicBool,
}

/// A client, and what it was made of.
struct Known {
    origin: Address,
    config: client::Config,
    client: Client,
}

/// The balancers of one upstream: the one that holds, and one of a configuration that may come to.
#[derive(Default)]
struct Balancers {
    holds: Option<(Shape, Arc<Balancer>, Upkeep)>,
    built: Option<(Shape, Arc<Balancer>)>,
}

impl Balancers {
    /// Whether an endpoint of `upstream` is drained. It stays so, and is passed over, also where there is no choice left.
    fn drains(&self, upstream: &Upstream) -> bool {
        let names: Vec<_> = upstream.endpoints.iter().flatten().map(|entry| entry.url.to_string()).collect();
        let members = self.holds.iter().flat_map(|(_, balancer, _)| balancer.members());
        members.filter(|member| member.endpoint.is_drained()).any(|member| names.contains(&member.origin.to_string()))
    }
}

/// What a balancer is made of: where it is the same, so is the balancer.
#[derive(Debug, Clone, PartialEq)]
struct Shape {
    entries: Vec<Entry>,
    balance: balance::Config,
    health: health::Config,
    client: client::Config,
}

impl Shape {
    fn of(upstream: &Upstream) -> Self {
        Self {
            entries: upstream.endpoints.iter().flatten().cloned().collect(),
            balance: upstream.balance.clone().unwrap_or_default(),
            health: upstream.health.clone().unwrap_or_default(),
            client: upstream.client(),
        }
    }
}

impl fmt::Debug for Registry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").finish_non_exhaustive()
    }
}

impl Registry {
    /// A registry without clients.
    #[must_use]
    pub fn new(metrics: Metrics, log: Writer) -> Self {
        let live = Live {
            metrics,
            clients: Mutex::default(),
            breakers: Mutex::default(),
            endpoints: Mutex::default(),
            running: AtomicBool::new(false),
        };
        Self {
            log,
            via: pseudonym(),
            live: Arc::new(live),
            budgets: Mutex::default(),
            limiters: Mutex::default(),
            balancers: Mutex::default(),
            auth: auth::State::default(),
            sessions: session::State::default(),
            rate_limits: rate_limit::State::default(),
            caches: cache::State::default(),
            gates: Mutex::default(),
            redis: Mutex::default(),
        }
    }

    /// The samples.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.live.metrics
    }

    /// The log.
    #[must_use]
    pub fn log(&self) -> &Writer {
        &self.log
    }

    /// What this process is called in `Via`. The same over reloads, for requests on their way know it.
    #[must_use]
    pub fn via(&self) -> &HeaderValue {
        &self.via
    }

    /// Who failed to say who it is, and the keys of others.
    #[must_use]
    pub fn auth(&self) -> &auth::State {
        &self.auth
    }

    /// The sessions that are not in Redis.
    #[must_use]
    pub fn sessions(&self) -> &session::State {
        &self.sessions
    }

    /// What rate limits have counted.
    #[must_use]
    pub fn rate_limits(&self) -> &rate_limit::State {
        &self.rate_limits
    }

    /// What caches keep.
    #[must_use]
    pub fn caches(&self) -> &cache::State {
        &self.caches
    }

    /// Lets these rate limits be those that hold.
    pub fn hold_gates(&self, gates: Vec<Arc<rate_limit::Gate>>) {
        *self.gates.lock() = gates;
    }

    /// The rate limits that hold, of each route that has any.
    #[must_use]
    pub fn gates(&self) -> Vec<Arc<rate_limit::Gate>> {
        self.gates.lock().clone()
    }

    /// The client of an endpoint: the one that there is, with its connections, unless its settings changed.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn client(&self, name: &str, upstream: &Upstream, address: &Address) -> Result<Client, BoxError> {
        self.live.client(name, upstream.client(), address, address, None)
    }

    /// The retry budget of the upstream `name`: the same one over reloads.
    pub fn budget(&self, name: &str) -> Budget {
        self.budgets.lock().entry(name.to_owned()).or_default().clone()
    }

    /// Finds the circuit breaker of an endpoint, if its upstream has any: the one that there is, in the state that it is
    /// in. What has changed in its settings holds from [`retain`](Self::retain) on, when the configuration does.
    pub fn breakers_of(
        &self,
        name: &str,
        upstream: &Upstream,
    ) -> impl Fn(&Address) -> Option<Arc<Breaker>> + Send + Sync + 'static {
        let (live, name, config) = (self.live.clone(), name.to_owned(), upstream.circuit_breaker.clone());
        move |address| Some(live.breaker(&name, config.as_ref()?, address))
    }

    /// All circuit breakers, by upstream and endpoint.
    #[must_use]
    pub fn breakers(&self) -> Vec<Arc<Breaker>> {
        let mut breakers: Vec<_> = self.live.breakers.lock().values().cloned().collect();
        breakers.sort_by(|one, other| (one.upstream(), one.endpoint()).cmp(&(other.upstream(), other.endpoint())));
        breakers
    }

    /// Whether requests to the upstream `name` are to be balanced: where there is a choice, or something known.
    #[must_use]
    pub fn is_balanced(&self, name: &str, upstream: &Upstream) -> bool {
        upstream.is_balanced() || self.balancers.lock().get(name).is_some_and(|known| known.drains(upstream))
    }

    /// What balances over the endpoints of an upstream: the one that there is, unless its settings changed. Its tasks
    /// begin when the configuration holds, with [`retain`](Self::retain).
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn balancer(&self, name: &str, upstream: &Upstream) -> Result<Arc<Balancer>, BoxError> {
        let shape = Shape::of(upstream);
        let mut balancers = self.balancers.lock();
        let known = balancers.entry(name.to_owned()).or_default();
        if let Some((_, balancer, _)) = known.holds.as_ref().filter(|(of, ..)| *of == shape) {
            return Ok(balancer.clone());
        }
        if let Some((_, balancer)) = known.built.as_ref().filter(|(of, _)| *of == shape) {
            return Ok(balancer.clone());
        }
        let roster = self.roster(name, &shape);
        let before = known.holds.as_ref().map(|(_, balancer, _)| balancer.members()).unwrap_or_default();
        let mut members: Vec<Member> = Vec::new();
        for entry in &shape.entries {
            // What its name stands for is known, if it was looked up.
            let found = before.iter().filter(|known| known.origin == entry.url).map(|known| known.dial);
            let mut dials: Vec<_> = found.filter(|dial| dial.is_none() || !shape.balance.resolve.is_off()).collect();
            if dials.is_empty() {
                dials.push(None);
            }
            for dial in dials {
                let member = roster.member(entry, dial)?;
                if !members.iter().any(|known| known.address == member.address) {
                    members.push(member);
                }
            }
        }
        let passive = shape.health.passive.as_ref().cloned();
        let balancer = Balancer::new(name, shape.balance.clone(), passive, members, self.metrics());
        let balancer = Arc::new(balancer);
        known.built = Some((shape, balancer.clone()));
        Ok(balancer)
    }

    /// The balancers that hold, by upstream.
    #[must_use]
    pub fn balancers(&self) -> BTreeMap<String, Arc<Balancer>> {
        let balancers = self.balancers.lock();
        balancers.iter().filter_map(|(name, of)| Some((name.clone(), of.holds.as_ref()?.1.clone()))).collect()
    }

    fn roster(&self, name: &str, shape: &Shape) -> Arc<dyn Roster> {
        Arc::new(Of {
            live: self.live.clone(),
            upstream: name.to_owned(),
            client: shape.client.clone(),
            active: shape.health.active.as_ref().cloned(),
        })
    }

    /// The Redis of these settings, if there is one and it is enabled: the one that there is, with its connection, unless
    /// settings or secrets changed. A new one begins to connect. Needs a tokio runtime.
    ///
    /// # Errors
    /// As [`Redis::start`].
    pub fn redis(&self, config: Option<&store::Config>) -> Result<Option<Redis>, BoxError> {
        let Some(config) = config.filter(|config| config.enabled) else { return Ok(None) };
        let mut store = self.redis.lock();
        if let Some(redis) = [&store.holds, &store.built].into_iter().flatten().find(|redis| redis.is_of(config)) {
            return Ok(Some(redis.clone()));
        }
        let redis = Redis::start(config, self.metrics())?;
        store.built = Some(redis.clone());
        Ok(Some(redis))
    }

    /// The Redis that holds.
    #[must_use]
    pub fn redis_in_use(&self) -> Option<Redis> {
        self.redis.lock().holds.clone()
    }

    /// The limit of the route or upstream `name`: the one that there is, with those in flight and in its queue. What has
    /// changed in its settings holds from [`retain`](Self::retain) on.
    pub fn limiter(&self, scope: Scope, name: &str, config: &concurrency::Config) -> Arc<Limiter> {
        let new = || Arc::new(Limiter::new(scope, name, config.clone(), self.metrics()));
        self.limiters.lock().entry((scope, name.to_owned())).or_insert_with(new).clone()
    }

    /// The limit of the route or upstream `name`, if it has any.
    #[must_use]
    pub fn limiter_of(&self, scope: Scope, name: &str) -> Option<Arc<Limiter>> {
        self.limiters.lock().get(&(scope, name.to_owned())).cloned()
    }

    /// Makes the live state that of `settings`: what changed holds, and what belongs to endpoints that are no longer
    /// named, or to a configuration that never held, is dropped. Requests in flight keep theirs to their end. Needs a
    /// tokio runtime.
    pub fn retain(&self, settings: &Settings) {
        let upstreams = &settings.upstreams;
        self.hold_balancers(upstreams);
        let balancers = self.balancers();
        let mut named: HashMap<Key, &Upstream> = HashMap::new();
        for (name, upstream) in upstreams {
            let listed = upstream.endpoints.iter().flatten().map(|entry| entry.url.to_string());
            let found = balancers.get(name).map(|balancer| balancer.members()).unwrap_or_default();
            let found = found.into_iter().map(|member| member.endpoint.name().to_string());
            named.extend(listed.chain(found).map(|endpoint| ((name.clone(), endpoint), upstream)));
        }
        let live = &self.live;
        live.clients.lock().retain(|key, known| {
            let Some(upstream) = named.get(key) else { return false };
            let config = upstream.client();
            let listed = |origin: &Address| upstream.endpoints.iter().flatten().any(|entry| entry.url == *origin);
            known.retain(|known| known.config == config && listed(&known.origin));
            !known.is_empty()
        });
        self.budgets.lock().retain(|name, _| upstreams.contains_key(name));
        live.endpoints.lock().retain(|key, endpoint| {
            // Where nothing is balanced, nothing is drained, and there are no checks to be kept.
            let upstream = named.get(key).filter(|_| balancers.contains_key(&key.0));
            match upstream {
                Some(upstream) => {
                    endpoint.change(|health, _| health.adopt(&upstream.health.clone().unwrap_or_default()));
                }
                None => live.metrics.forget_health(endpoint.upstream(), endpoint.name()),
            }
            upstream.is_some()
        });
        live.breakers.lock().retain(|key, breaker| {
            let config = named.get(key).and_then(|upstream| upstream.circuit_breaker.as_ref());
            match config {
                Some(config) => breaker.adopt(config),
                None => live.metrics.forget_breaker(breaker.upstream(), breaker.endpoint()),
            }
            config.is_some()
        });
        self.retain_limiters(settings);
        self.retain_redis(settings);
        live.running.store(true, Ordering::Relaxed);
    }

    /// Lets the Redis of `settings` hold. Another one loses its connection with the last request that uses it.
    fn retain_redis(&self, settings: &Settings) {
        let mut store = self.redis.lock();
        let config = settings.redis.as_ref().filter(|config| config.enabled);
        let is_it = |redis: &Redis| config.is_some_and(|config| redis.is_of(config));
        let known = [store.holds.take(), store.built.take()];
        store.holds = known.into_iter().flatten().find(is_it);
        if store.holds.is_none() {
            self.metrics().forget_redis();
        }
    }

    fn retain_limiters(&self, settings: &Settings) {
        let route = |name: &str| {
            let route = settings.routes.iter().find(|route| route.name() == name)?;
            route.concurrency.as_ref().unwrap_or(&settings.defaults.concurrency).as_ref()
        };
        self.limiters.lock().retain(|(scope, name), limiter| {
            let config = match scope {
                Scope::Route => route(name),
                Scope::Upstream => settings.upstreams.get(name).and_then(|upstream| upstream.concurrency.as_ref()),
            };
            match config {
                Some(config) => limiter.adopt(config),
                None => self.metrics().forget_concurrency(scope.as_str(), name),
            }
            config.is_some()
        });
    }

    /// Lets the balancers of `upstreams` hold, and ends the tasks of others.
    fn hold_balancers(&self, upstreams: &BTreeMap<String, Upstream>) {
        self.balancers.lock().retain(|name, known| {
            let is_balanced = |upstream: &&Upstream| upstream.is_balanced() || known.drains(upstream);
            let Some(upstream) = upstreams.get(name).filter(is_balanced) else { return false };
            let shape = Shape::of(upstream);
            let built = known.built.take().filter(|(of, _)| *of == shape);
            if known.holds.as_ref().is_some_and(|(of, ..)| *of == shape) {
                return true;
            }
            known.holds = built.map(|(shape, balancer)| {
                let roster = self.roster(name, &shape);
                let upkeep = Upkeep::start(balancer.clone(), shape.entries.clone(), roster, balance::system);
                (shape, balancer, upkeep)
            });
            known.holds.is_some()
        });
    }
}

impl Live {
    fn client(
        &self,
        name: &str,
        config: client::Config,
        address: &Address,
        origin: &Address,
        dial: Option<SocketAddr>,
    ) -> Result<Client, BoxError> {
        let mut clients = self.clients.lock();
        let key = (name.to_owned(), address.to_string());
        let is_it = |known: &&Known| known.config == config && known.origin == *origin;
        if let Some(known) = clients.get(&key).and_then(|known| known.iter().find(is_it)) {
            return Ok(known.client.clone());
        }
        let client = Client::dialling(name, origin, dial, &config, &self.metrics)?;
        let known = Known { origin: origin.clone(), config, client: client.clone() };
        clients.entry(key).or_default().push(known);
        Ok(client)
    }

    fn breaker(&self, name: &str, config: &circuit_breaker::Config, address: &Address) -> Arc<Breaker> {
        let mut breakers = self.breakers.lock();
        let new = || Arc::new(Breaker::new(name, &address.to_string(), config.clone(), &self.metrics));
        breakers.entry((name.to_owned(), address.to_string())).or_insert_with(new).clone()
    }
}

/// The live state of the endpoints of one upstream.
struct Of {
    live: Arc<Live>,
    upstream: String,
    client: client::Config,
    active: Option<health::Active>,
}

impl Roster for Of {
    fn member(&self, entry: &Entry, dial: Option<SocketAddr>) -> Result<Member, BoxError> {
        let address = match (dial, &entry.url) {
            (Some(dial), Address::Tcp { tls, .. }) => Address::Tcp { tls: *tls, authority: dial.to_string().parse()? },
            (_, url) => url.clone(),
        };
        let key = (self.upstream.clone(), address.to_string());
        // One that was the only one so far is nothing new.
        let added = self.live.running.load(Ordering::Relaxed) && !self.live.clients.lock().contains_key(&key);
        let client = self.live.client(&self.upstream, self.client.clone(), &address, &entry.url, dial)?;
        let mut endpoints = self.live.endpoints.lock();
        let endpoint = endpoints.entry(key).or_insert_with(|| {
            Arc::new(Endpoint::new(&self.upstream, &address.to_string(), added, &self.live.metrics))
        });
        let endpoint = endpoint.clone();
        Ok(Member { endpoint, weight: entry.weight, address, origin: entry.url.clone(), dial, client })
    }

    fn checker(&self, member: &Member) -> Result<Option<Checker>, BoxError> {
        let Some(active) = &self.active else { return Ok(None) };
        let config = Checker::config(active, &self.client);
        // Samples that nobody sees: a check is no attempt.
        let client = Client::dialling(&self.upstream, &member.origin, member.dial, &config, &Metrics::new())?;
        Checker::new(active.clone(), client).map(Some)
    }

    fn settle(&self, members: &[Member]) {
        let stays = |(upstream, endpoint): &Key| {
            *upstream != self.upstream || members.iter().any(|member| **member.endpoint.name() == **endpoint)
        };
        let live = &self.live;
        live.clients.lock().retain(|key, _| stays(key));
        live.breakers.lock().retain(|key, breaker| {
            let stays = stays(key);
            if !stays {
                live.metrics.forget_breaker(breaker.upstream(), breaker.endpoint());
            }
            stays
        });
        live.endpoints.lock().retain(|key, endpoint| {
            let stays = stays(key);
            if !stays {
                live.metrics.forget_health(endpoint.upstream(), endpoint.name());
            }
            stays
        });
    }
}
