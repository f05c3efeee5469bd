//! The whole configuration: every section of the file, what a route takes from `defaults`, and all rules
//! that concern more than one section.
//!
//! The sections of policies are defined where the policies are; here they are put together. A section on a
//! route replaces the same section of `defaults` as a whole.

use std::{
    collections::{BTreeMap, HashMap},
    num::{NonZeroU32, NonZeroUsize},
};

use schemars::JsonSchema;
use serde::Deserialize;

use crate::{
    config::{
        ByteSize, OneOrMany, Secret, Toggle,
        load::{Sources, Tree, nearest},
        problem::{Check, Problems},
    },
    layers::{body_limit, errors, hygiene, request_id, security_headers, timeouts},
    route::Match,
    server::{drain, listener},
    telemetry::log,
    upstream::{
        Address,
        client::{self, Host, PoolConfig, Protocol, Tls},
        respond,
    },
};

/// The whole file.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where to listen: one listener, or a list. Default `0.0.0.0:8080`.
    pub listen: OneOrMany<listener::Config>,
    /// The operator's port: health, metrics, configuration. Default on, on `127.0.0.1:9090`.
    pub admin: Toggle<Admin>,
    /// Threads that serve. Default: as many as the process may use CPUs. With 1, a runtime without
    /// synchronisation between threads is used, which costs less per request.
    pub threads: Option<NonZeroUsize>,
    /// What a client may ask for at most.
    pub limits: Limits,
    /// How the process ends.
    pub drain: drain::Config,
    /// What is logged, where, and in which form.
    pub log: log::Config,
    /// Correlation ids.
    pub request_id: request_id::Config,
    /// Whom to believe, and what to say of oneself.
    pub hygiene: hygiene::Config,
    /// Where requests can go, by name.
    pub upstreams: BTreeMap<String, Upstream>,
    /// What every route starts from. A section on a route replaces the same section here as a whole.
    pub defaults: Defaults,
    /// Which requests go where. Without a route, and with one upstream, everything goes there.
    pub routes: Vec<Route>,
}

impl Default for Settings {
    fn default() -> Self {
        let everywhere = listener::Address::Tcp(([0, 0, 0, 0], 8080).into());
        Self {
            listen: OneOrMany(vec![everywhere.into()]),
            admin: Toggle::On(Admin::default()),
            threads: None,
            limits: Limits::default(),
            drain: drain::Config::default(),
            log: log::Config::default(),
            request_id: request_id::Config::default(),
            hygiene: hygiene::Config::default(),
            upstreams: BTreeMap::new(),
            defaults: Defaults::default(),
            routes: Vec::new(),
        }
    }
}

/// The operator's port. Section `admin`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Where to listen. Default `127.0.0.1:9090`.
    pub listen: listener::Address,
    /// What a call that changes something must show as `Authorization: Bearer`. Without one, such calls are
    /// answered on loopback and Unix sockets only. Default none.
    pub token: Option<Secret>,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: listener::Address::Tcp(([127, 0, 0, 1], 9090).into()), token: None }
    }
}

/// What a client may ask for at most. Section `limits`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections open at once, over all listeners; more wait in the system's queue. Default 10000.
    pub connections: NonZeroU32,
    /// Fields of a request's head; 431 beyond. 1 to 1000, default 100.
    pub headers: u32,
    /// Bytes of a request's header section; 431 beyond. 1KiB to 1MiB, default `64KiB`.
    pub header_bytes: ByteSize,
    /// Bytes of a request's target; 414 beyond. 64 to 60KiB, default `16KiB`.
    pub uri_bytes: ByteSize,
    /// Streams that a client may have open on one HTTP/2 connection. Default 200.
    pub http2_streams: NonZeroU32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: NonZeroU32::new(10_000).unwrap_or(NonZeroU32::MIN),
            headers: 100,
            header_bytes: ByteSize::from_bytes(64 << 10),
            uri_bytes: ByteSize::from_bytes(16 << 10),
            http2_streams: NonZeroU32::new(200).unwrap_or(NonZeroU32::MIN),
        }
    }
}

impl Check for Limits {
    fn check(&self, problems: &mut Problems) {
        if !(1..=1000).contains(&self.headers) {
            problems.add("headers", format!("is {}: must be 1 to 1000", self.headers));
        }
        if !(1 << 10..=1 << 20).contains(&self.header_bytes.get()) {
            problems.add("header_bytes", format!("is {}: must be 1KiB to 1MiB", self.header_bytes));
        }
        if !(64..=60 << 10).contains(&self.uri_bytes.get()) {
            problems.add("uri_bytes", format!("is {}: must be 64 to 60KiB", self.uri_bytes));
        }
    }
}

/// Where requests can go. An entry of `upstreams`: either `endpoints`, or `respond`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Upstream {
    /// The backend: `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`.
    pub endpoints: Option<OneOrMany<Address>>,
    /// A fixed answer instead of a backend.
    pub respond: Option<respond::Config>,
    /// The version of HTTP that is spoken to the endpoints: `http1` or `http2`. Default `http1`.
    pub protocol: Option<Protocol>,
    /// What stands in `Host`: `preserve` the client's, the `endpoint`'s own, or a literal. Default `preserve`
    /// for `http://` and `unix:`, `endpoint` for `https://`.
    pub host: Option<Host>,
    /// Whom `https://` endpoints are believed.
    pub tls: Option<Tls>,
    /// Which connections are kept open.
    pub pool: Option<PoolConfig>,
}

impl Upstream {
    /// How its endpoints are spoken to.
    #[must_use]
    pub fn client(&self) -> client::Config {
        client::Config {
            protocol: self.protocol.unwrap_or_default(),
            host: self.host.clone(),
            tls: self.tls.clone().unwrap_or_default(),
            pool: self.pool.clone().unwrap_or_default(),
        }
    }
}

impl Check for Upstream {
    fn check(&self, problems: &mut Problems) {
        match (&self.endpoints, &self.respond) {
            (None, None) => problems.add("", "has neither `endpoints` nor `respond`: give one of them"),
            (Some(_), Some(_)) => problems.add("respond", "stands beside `endpoints`: an upstream is one or the other"),
            (Some(endpoints), None) => {
                if endpoints.iter().count() != 1 {
                    let given = endpoints.iter().count();
                    problems.add("endpoints", format!("has {given} entries: exactly one is supported so far"));
                }
                if self.tls.is_some() && !endpoints.iter().any(Address::tls) {
                    problems.add("tls", "has no effect: no endpoint is `https://`");
                }
            }
            (None, Some(respond)) => {
                problems.at("respond", |problems| respond.check(problems));
                let given = [
                    ("protocol", self.protocol.is_some()),
                    ("host", self.host.is_some()),
                    ("tls", self.tls.is_some()),
                    ("pool", self.pool.is_some()),
                ];
                for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                    problems.add(key, "has no effect beside `respond`: it is about `endpoints`");
                }
            }
        }
        if let Some(path) = self.tls.as_ref().and_then(|tls| tls.ca.as_ref())
            && let Err(error) = std::fs::File::open(path)
        {
            problems.add("tls.ca", format!("`{}` cannot be read: {error}", path.display()));
        }
    }
}

/// What every route starts from. Section `defaults`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// Security headers of responses. Default on, with the preset `api`.
    pub security_headers: Toggle<security_headers::Config>,
    /// How long sidegate waits, for what.
    pub timeouts: timeouts::Config,
    /// How large a request's body may be. Default `off`.
    pub body_limit: Toggle<body_limit::Config>,
    /// How sidegate's own answers look: `problem` or `openai`. Default `problem`.
    pub errors: errors::Config,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            security_headers: Toggle::On(security_headers::Config::default()),
            timeouts: timeouts::Config::default(),
            body_limit: Toggle::Off,
            errors: errors::Config::default(),
        }
    }
}

/// Which requests go where. An entry of `routes`.
#[derive(Debug, Clone, PartialEq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// What logs and metrics call the route. Default: its match in words, `POST /v1/*`.
    pub name: Option<String>,
    /// Which requests it takes. Default: every request that no other route takes.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// The name of the upstream.
    pub upstream: String,
    /// As in `defaults`, which it replaces.
    pub security_headers: Option<Toggle<security_headers::Config>>,
    /// As in `defaults`, which it replaces, but without `client_header` and `keepalive`: those are about
    /// connections, which have no route.
    pub timeouts: Option<timeouts::Config>,
    /// As in `defaults`, which it replaces.
    pub body_limit: Option<Toggle<body_limit::Config>>,
    /// As in `defaults`, which it replaces.
    pub errors: Option<errors::Config>,
}

impl Route {
    /// The name in logs and metrics.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.matches.to_string())
    }

    /// What the route itself says, or else `defaults`.
    #[must_use]
    pub fn policies(&self, defaults: &Defaults) -> Defaults {
        Defaults {
            security_headers: self.security_headers.clone().unwrap_or_else(|| defaults.security_headers.clone()),
            timeouts: self.timeouts.clone().unwrap_or_else(|| defaults.timeouts.clone()),
            body_limit: self.body_limit.unwrap_or(defaults.body_limit),
            errors: self.errors.unwrap_or(defaults.errors),
        }
    }
}

impl Settings {
    /// Reads and checks everything.
    ///
    /// # Errors
    /// All that is wrong, each with its source and key.
    pub fn load(sources: &Sources) -> Result<(Self, Tree), Problems> {
        sources.load(|settings: &mut Self, tree, problems| {
            settings.check_all(tree, problems);
            settings.complete();
        })
    }

    /// The JSON Schema of the file.
    #[must_use]
    pub fn schema() -> schemars::Schema {
        schemars::schema_for!(Settings)
    }

    /// A file without routes has one, to its only upstream.
    fn complete(&mut self) {
        if let (true, Some(name)) = (self.routes.is_empty(), self.upstreams.keys().next()) {
            self.routes.push(Route {
                name: None,
                matches: Match::default(),
                upstream: name.clone(),
                security_headers: None,
                timeouts: None,
                body_limit: None,
                errors: None,
            });
        }
    }

    fn check_all(&self, tree: &Tree, problems: &mut Problems) {
        self.check_listeners(problems);
        problems.at("limits", |problems| self.limits.check(problems));
        if let Err(message) = self.log.filter() {
            problems.add("log.level", message);
        }
        if self.upstreams.is_empty() {
            let example = "`upstreams: {api: {endpoints: [http://127.0.0.1:8000]}}`";
            problems.add("upstreams", format!("there is no upstream: give at least one, as in {example}"));
        }
        for (name, upstream) in &self.upstreams {
            problems.at(format!("upstreams.{name}"), |problems| upstream.check(problems));
        }
        problems.at("defaults.timeouts", |problems| self.defaults.timeouts.check(problems));
        if self.routes.is_empty() && self.upstreams.len() > 1 {
            problems.add("routes", "there is no route, and more than one upstream to choose from: give routes");
        }
        self.check_routes(tree, problems);
    }

    fn check_listeners(&self, problems: &mut Problems) {
        if self.listen.iter().next().is_none() {
            problems.add("listen", "is an empty list: give at least one address, as in `0.0.0.0:8080`");
        }
        let fixed = |address: &listener::Address| !matches!(address, listener::Address::Tcp(tcp) if tcp.port() == 0);
        let mut taken: HashMap<&listener::Address, String> = HashMap::new();
        for (index, listener) in self.listen.iter().enumerate() {
            let key = if self.listen.iter().count() == 1 { "listen".to_owned() } else { format!("listen.{index}") };
            if let Some(other) = taken.insert(&listener.address, key.clone()).filter(|_| fixed(&listener.address)) {
                problems.add(&key, format!("`{}` stands at `{other}` already", listener.address));
            }
            let Some(tls) = &listener.tls else { continue };
            for (name, path) in [("certificate", &tls.certificate), ("key", &tls.key)] {
                if let Err(error) = std::fs::File::open(path) {
                    problems.add(format!("{key}.tls.{name}"), format!("`{}` cannot be read: {error}", path.display()));
                }
            }
        }
        if let Some(admin) = self.admin.as_ref() {
            if let Some(other) = taken.get(&admin.listen).filter(|_| fixed(&admin.listen)) {
                problems.add("admin.listen", format!("`{}` stands at `{other}` already", admin.listen));
            }
            if let Some(Err(message)) = admin.token.as_ref().map(Secret::reveal) {
                problems.add("admin.token", message);
            }
        }
    }

    fn check_routes(&self, tree: &Tree, problems: &mut Problems) {
        let mut names: HashMap<String, usize> = HashMap::new();
        for (index, route) in self.routes.iter().enumerate() {
            problems.at(format!("routes.{index}"), |problems| {
                problems.at("match", |problems| route.matches.check(problems));
                if let Some(timeouts) = &route.timeouts {
                    problems.at("timeouts", |problems| timeouts.check(problems));
                }
                if !tree.names("upstreams").contains(&route.upstream.as_str()) {
                    let near = nearest(&route.upstream, tree.names("upstreams"));
                    let near = near.map_or_else(String::new, |near| format!(", did you mean `{near}`?"));
                    problems.add("upstream", format!("there is no upstream `{}`{near}", route.upstream));
                }
                for key in ["client_header", "keepalive"] {
                    if tree.has(&format!("routes.{index}.timeouts.{key}")) {
                        let message = "is about connections, which have no route: set it in `defaults.timeouts`";
                        problems.add(format!("timeouts.{key}"), message);
                    }
                }
                let earlier = self.routes.iter().take(index).position(|other| other.matches.same(&route.matches));
                if let Some(earlier) = earlier {
                    problems
                        .add("match", format!("matches what `routes.{earlier}` takes already: it is never reached"));
                } else if let Some(other) = names.insert(route.name(), index) {
                    problems.add("name", format!("`{}` is the name of `routes.{other}` already", route.name()));
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is wrong with this file.
    fn wrong(yaml: &str) -> String {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f.yaml");
        std::fs::write(&file, yaml).unwrap();
        let sources = Sources { file: Some(file), ..Sources::default() };
        Settings::load(&sources).map(|_| ()).unwrap_err().to_string().replace(dir.path().to_str().unwrap(), "")
    }

    #[test]
    fn all_mistakes_are_told_at_once() {
        let text = wrong(
            "upstreams: {api: {endpoints: [http://a], protcol: http2}}\nroutes: [{upstream: apo, timeouts: {idle: 5}}]",
        );
        for part in ["protcol", "`protocol`", "did you mean `api`?", "routes.0.timeouts.idle"] {
            assert!(text.contains(part), "{part} in {text}");
        }
    }

    #[test]
    fn one_upstream_needs_no_route() {
        let options = vec![("--upstream", "upstreams.default.endpoints", "http://127.0.0.1:8000".to_owned())];
        let (settings, _) = Settings::load(&Sources { options, ..Sources::default() }).unwrap();
        assert_eq!(settings.routes.len(), 1);
        assert_eq!(settings.routes[0].upstream, "default");
    }
}
