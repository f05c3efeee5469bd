//! An upstream: where its endpoints are, how they are spoken to, and what is done for them. An entry of `upstreams`.

use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    admin::publish,
    config::{Check, OneOrMany, Problems, Toggle, file::Content},
    layers::{circuit_breaker, concurrency},
    upstream::{
        balance,
        client::{self, Host, PoolConfig, Protocol, Tls},
        health, respond,
    },
};

/// Where requests may go. An entry of `upstreams`: either `endpoints` and how to speak to them, or `respond`, or `admin`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// Where the backend listens: `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`, or a section with that as
    /// `url` and a `weight`; or a list of up to 256 of these.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoints: Option<OneOrMany<balance::Entry>>,
    /// The version of HTTP that the endpoints are spoken to in: `http1` or `http2` (over `http://` with prior
    /// knowledge, over `https://` by ALPN). Default `http1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocol: Option<Protocol>,
    /// What stands in `Host`: `preserve` for what the client sent, `endpoint` for the endpoint's own name, or any other
    /// text for itself. Default `endpoint` for `https://`, else `preserve`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<Host>,
    /// Whom `https://` endpoints are believed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<Tls>,
    /// Which connections are kept open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolConfig>,
    /// When an endpoint that fails is left alone, and for how long. Default: never.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub circuit_breaker: Option<circuit_breaker::Config>,
    /// How many requests may be in flight to it, over all routes, and how many may wait. Default: any number.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<concurrency::Config>,
    /// Which of several endpoints is asked. Default: the one of two with less in flight.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub balance: Option<balance::Config>,
    /// How endpoints that are not up are found. Default: they are not, all are asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub health: Option<health::Config>,
    /// A fixed answer instead of a backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub respond: Option<respond::Config>,
    /// A page of the operator's port instead of a backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub admin: Option<publish::Config>,
}

impl Upstream {
    /// How the endpoints are spoken to.
    #[must_use]
    pub fn client(&self) -> client::Config {
        client::Config {
            protocol: self.protocol.unwrap_or_default(),
            host: self.host.clone(),
            tls: self.tls.clone().unwrap_or_default(),
            pool: self.pool.clone().unwrap_or_default(),
        }
    }

    /// Whether there is a choice between endpoints, or something known of them. Else a request goes straight to the only
    /// one.
    #[must_use]
    pub fn is_balanced(&self) -> bool {
        let endpoints = self.endpoints.as_ref().map_or(0, |endpoints| endpoints.0.len());
        endpoints > 1 || endpoints == 1 && (self.balance.is_some() || self.health.is_some())
    }

    /// The files that it is made of, which are to be watched.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let checks = self.health.iter().filter_map(|health| health.active.as_ref());
        self.tls.iter().filter_map(|tls| tls.ca.as_deref()).chain(checks.flat_map(health::Active::files))
    }

    /// Notes what its files say: its clients and checks are kept as long as they say the same.
    pub(super) fn note_files(&mut self) {
        if let Some(tls) = &mut self.tls {
            tls.content = Content::of(tls.ca.as_deref());
        }
        if let Some(health::Config { active: Toggle::On(active), .. }) = &mut self.health {
            active.content = Content::of(active.files());
        }
    }

    /// What is wrong with what answers by itself, and is of this `kind`.
    fn check_fixed(&self, kind: &str, problems: &mut Problems) {
        let given = [
            ("protocol", self.protocol.is_some()),
            ("host", self.host.is_some()),
            ("tls", self.tls.is_some()),
            ("pool", self.pool.is_some()),
            ("circuit_breaker", self.circuit_breaker.is_some()),
            ("concurrency", self.concurrency.is_some()),
            ("balance", self.balance.is_some()),
            ("health", self.health.is_some()),
        ];
        for (key, _) in given.into_iter().filter(|(_, given)| *given) {
            problems.add(key, format!("has no effect beside `{kind}`: leave it out"));
        }
        if let Some(respond) = &self.respond {
            problems.at("respond", |problems| respond.check(problems));
        }
        if let Some(page) = &self.admin {
            problems.at("admin", |problems| page.check(problems));
        }
    }

    /// Writes its defaults out.
    pub(super) fn complete(&mut self) {
        let mut endpoints = self.endpoints.iter().flatten();
        let Some(endpoint) = endpoints.next() else { return };
        // Where some speak TLS and others do not, no one value says what holds.
        if endpoints.all(|other| other.url.tls() == endpoint.url.tls()) {
            let host = if endpoint.url.tls() { Host::Endpoint } else { Host::Preserve };
            self.host.get_or_insert(host);
        }
        if self.is_balanced() {
            self.balance.get_or_insert_default();
        }
        self.protocol.get_or_insert_default();
        self.pool.get_or_insert_default();
        self.circuit_breaker.iter_mut().for_each(circuit_breaker::Config::complete);
    }
}

impl Check for Upstream {
    fn check(&self, problems: &mut Problems) {
        let kinds = [
            ("endpoints", self.endpoints.is_some()),
            ("respond", self.respond.is_some()),
            ("admin", self.admin.is_some()),
        ];
        let mut kinds = kinds.into_iter().filter_map(|(kind, given)| given.then_some(kind));
        let Some(kind) = kinds.next() else {
            let how = "needs `endpoints` (where the backend listens), `respond` (a fixed answer) or `admin` (a page of the \
                       operator's port)";
            return problems.add("", how);
        };
        for other in kinds {
            problems.add(other, format!("stands beside `{kind}`: an upstream is one or the other"));
        }
        match &self.endpoints {
            None => self.check_fixed(kind, problems),
            Some(endpoints) => match &*endpoints.0 {
                [] => problems.add("endpoints", "is empty: name the backend, as in `[http://127.0.0.1:8000]`"),
                [first, ..] => {
                    if self.tls.is_some() && !endpoints.iter().any(|endpoint| endpoint.url.tls()) {
                        problems.add("tls", format!("has no effect: `{}` is spoken to without TLS", first.url));
                    }
                    balance::config::check_endpoints(endpoints, problems);
                }
            },
        }
        if let Some(tls) = &self.tls {
            problems.at("tls", |problems| tls.check(problems));
        }
        if let Some(breaker) = &self.circuit_breaker {
            problems.at("circuit_breaker", |problems| breaker.check(problems));
        }
        if let Some(concurrency) = &self.concurrency {
            problems.at("concurrency", |problems| concurrency.check(problems));
        }
        if let Some(balance) = &self.balance {
            problems.at("balance", |problems| balance.check(problems));
        }
        if let Some(health) = &self.health {
            problems.at("health", |problems| health.check(problems));
        }
    }
}
