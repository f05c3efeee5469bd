//! What outlives a configuration: samples, the log, and upstream clients whose settings did not change.

use std::{
    collections::HashMap,
    fmt,
    sync::{Mutex, PoisonError},
};

use http::HeaderValue;

use crate::{
    layers::{hygiene::pseudonym, retry::Budget},
    message::BoxError,
    settings::Upstream,
    telemetry::{Metrics, log::Writer},
    upstream::{Address, Client},
};

/// The live state of the process. A reload builds its new stack from the same one.
pub struct Registry {
    metrics: Metrics,
    log: Writer,
    via: HeaderValue,
    clients: Mutex<HashMap<(String, Address), (Upstream, Client)>>,
    budgets: Mutex<HashMap<String, Budget>>,
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
        Self { metrics, log, via: pseudonym(), clients: Mutex::default(), budgets: Mutex::default() }
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
        if let Some((_, client)) = clients.get(&key).filter(|(known, _)| known == upstream) {
            return Ok(client.clone());
        }
        let client = Client::new(name, address, &upstream.client(), &self.metrics)?;
        clients.insert(key, (upstream.clone(), client.clone()));
        Ok(client)
    }

    /// The retry budget of the upstream `name`: the same one over reloads.
    pub fn budget(&self, name: &str) -> Budget {
        let mut budgets = self.budgets.lock().unwrap_or_else(PoisonError::into_inner);
        budgets.entry(name.to_owned()).or_default().clone()
    }

    /// Drops the clients of endpoints that are no longer named. Requests in flight keep theirs to their end.
    pub fn retain(&self, upstreams: &std::collections::BTreeMap<String, Upstream>) {
        let named = |(name, address): &(String, Address)| {
            let endpoints = upstreams.get(name).and_then(|upstream| upstream.endpoints.as_ref());
            endpoints.is_some_and(|endpoints| endpoints.iter().any(|known| known == address))
        };
        self.clients.lock().unwrap_or_else(PoisonError::into_inner).retain(|key, _| named(key));
        self.budgets.lock().unwrap_or_else(PoisonError::into_inner).retain(|name, _| upstreams.contains_key(name));
    }
}
