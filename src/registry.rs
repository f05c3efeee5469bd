//! What outlives a configuration: samples, the log, and upstream clients whose settings did not change.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use http::HeaderValue;

use crate::{
    layers::{
        circuit_breaker::Breaker,
        concurrency::{self, Limiter, Scope},
        hygiene::pseudonym,
        retry::Budget,
    },
    message::BoxError,
    settings::{Settings, Upstream},
    telemetry::{Metrics, log::Writer},
    upstream::{Address, Client, client},
};

/// The live state of the process. A reload builds its new stack from the same one.
pub struct Registry {
    metrics: Metrics,
    log: Writer,
    via: HeaderValue,
    clients: Mutex<HashMap<(String, Address), (client::Config, Client)>>,
    budgets: Mutex<HashMap<String, Budget>>,
    breakers: Mutex<HashMap<(String, Address), Arc<Breaker>>>,
    limiters: Mutex<HashMap<(Scope, String), Arc<Limiter>>>,
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
        Self {
            metrics,
            log,
            via: pseudonym(),
            clients: Mutex::default(),
            budgets: Mutex::default(),
            breakers: Mutex::default(),
            limiters: Mutex::default(),
        }
    }

    /// The samples.
    #[must_use]
    pub fn metrics(&self) -> &Metrics {
        &self.metrics
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

    /// The client of an endpoint: the one that there is, with its connections, unless its settings changed.
    ///
    /// # Errors
    /// As [`Client::new`].
    pub fn client(&self, name: &str, upstream: &Upstream, address: &Address) -> Result<Client, BoxError> {
        let mut clients = self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (name.to_owned(), address.clone());
        let config = upstream.client();
        if let Some((_, client)) = clients.get(&key).filter(|(known, _)| *known == config) {
            return Ok(client.clone());
        }
        let client = Client::new(name, address, &config, &self.metrics)?;
        clients.insert(key, (config, client.clone()));
        Ok(client)
    }

    /// The retry budget of the upstream `name`: the same one over reloads.
    pub fn budget(&self, name: &str) -> Budget {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        budgets.entry(name.to_owned()).or_default().clone()
    }

    /// The circuit breaker of an endpoint, if its upstream has any: the one that there is, in the state that it is in.
    /// What has changed in its settings holds from [`retain`](Self::retain) on, when the configuration does.
    pub fn breaker(&self, name: &str, upstream: &Upstream, address: &Address) -> Option<Arc<Breaker>> {
        let config = upstream.circuit_breaker.as_ref()?;
        let mut breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        let breaker = breakers
            .entry((name.to_owned(), address.clone()))
            .or_insert_with(|| Arc::new(Breaker::new(name, &address.to_string(), config.clone(), &self.metrics)));
        Some(breaker.clone())
    }

    /// All circuit breakers, by upstream and endpoint.
    #[must_use]
    pub fn breakers(&self) -> Vec<Arc<Breaker>> {
        let breakers = self.breakers.lock().unwrap_or_else(PoisonError::into_inner);
        let mut breakers: Vec<_> = breakers.values().cloned().collect();
        breakers.sort_by(|one, other| (one.upstream(), one.endpoint()).cmp(&(other.upstream(), other.endpoint())));
        breakers
    }

    /// The limit of the route or upstream `name`: the one that there is, with those in flight and in its queue. What has
    /// changed in its settings holds from [`retain`](Self::retain) on.
    pub fn limiter(&self, scope: Scope, name: &str, config: &concurrency::Config) -> Arc<Limiter> {
        let mut limiters = self.limiters.lock().unwrap_or_else(PoisonError::into_inner);
        let limiter = limiters
            .entry((scope, name.to_owned()))
            .or_insert_with(|| Arc::new(Limiter::new(scope, name, config.clone(), &self.metrics)));
        limiter.clone()
    }

    /// The limit of the route or upstream `name`, if it has any.
    #[must_use]
    pub fn limiter_of(&self, scope: Scope, name: &str) -> Option<Arc<Limiter>> {
        self.limiters.lock().unwrap_or_else(PoisonError::into_inner).get(&(scope, name.to_owned())).cloned()
    }

    /// Makes the live state that of `settings`: what changed holds, and what belongs to endpoints that are no
    /// longer named is dropped. Requests in flight keep theirs to their end.
    pub fn retain(&self, settings: &Settings) {
        let upstreams = &settings.upstreams;
        let named = |(name, address): &(String, Address)| {
            let upstream = upstreams.get(name)?;
            upstream.endpoints.iter().flatten().any(|known| known == address).then_some(upstream)
        };
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, _| named(key).is_some());
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| upstreams.contains_key(name));
        self.breakers.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, breaker| {
            let config = named(key).and_then(|upstream| upstream.circuit_breaker.as_ref());
            match config {
                Some(config) => breaker.adopt(config),
                None => self.metrics.forget_breaker(breaker.upstream(), breaker.endpoint()),
            }
            config.is_some()
        });
        let route = |name: &str| {
            let route = settings.routes.iter().find(|route| route.name() == name)?;
            route.concurrency.as_ref().unwrap_or(&settings.defaults.concurrency).as_ref()
        };
        self.limiters.lock().unwrap_or_else(PoisonError::into_inner).retain(|(scope, name), limiter| {
            let config = match scope {
                Scope::Route => route(name),
                Scope::Upstream => upstreams.get(name).and_then(|upstream| upstream.concurrency.as_ref()),
            };
            match config {
                Some(config) => limiter.adopt(config),
                None => self.metrics.forget_concurrency(scope.as_str(), name),
            }
            config.is_some()
        });
    }
}
