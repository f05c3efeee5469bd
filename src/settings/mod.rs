//! The struct of the whole file: what every section is called, what a route inherits, and the rules between
//! sections.
//!
//! Each section is the `Config` of the module that acts on it; this one only gives them their place. The doc
//! comments of all of them are the reference and the JSON Schema. What the server acts on stands here, because the
//! server stands a floor above.

pub mod drain;
pub mod listener;
mod route;
pub mod tls;
mod upstream;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::{NonZeroU32, NonZeroUsize},
    path::{Path, PathBuf},
};

use http::{HeaderValue, header::HOST};
use schemars::{JsonSchema, Schema, generate::SchemaSettings, transform::RecursiveTransform};
use serde::{Deserialize, Serialize, Serializer};
use serde_json::Value;

use self::route::is_route_name;
pub use self::{
    route::{Defaults, Route},
    upstream::Upstream,
};
use crate::{
    admin::publish,
    config::{ByteSize, Check, OneOrMany, Problems, Secret, Sources, Toggle, Tree, fields::MethodName, load::nearest},
    layers::{auth, cache, fallback, hygiene, rate_limit, request_id},
    message::path::Pattern,
    route::Table,
    store,
    telemetry::log,
};

/// The configuration of sidegate.
///
/// Sources, the later one wins: defaults, the file (YAML, or TOML by its extension), variables of the environment
/// (`SIDEGATE_LOG__LEVEL` for `log.level`), options of the command line.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(title = "sidegate")]
pub struct Settings {
    /// Where clients connect: an address, a section, or a list of these. Default `0.0.0.0:8080`.
    pub listen: OneOrMany<listener::Config>,
    /// The operator's port: health, metrics, the configuration. Default on `127.0.0.1:9090`; `off` opens none.
    pub admin: Toggle<Admin>,
    /// Threads that serve, 1 to 1024. Default: as many as the process may use CPUs. With 1 no request ever
    /// changes its thread, which saves time where there is one CPU to use.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub threads: Option<NonZeroUsize>,
    /// How much clients may take.
    pub limits: Limits,
    /// How the process ends when it is asked to.
    pub drain: drain::Config,
    /// What is logged, where, and in which form.
    pub log: log::Config,
    /// Correlation ids.
    pub request_id: request_id::Config,
    /// Whom to believe, and what to say of oneself.
    pub hygiene: hygiene::Config,
    /// What all replicas share. Default: each keeps what it knows in memory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub redis: Option<store::Config>,
    /// Where requests go, by name: 1 to 64 letters, digits, `_` or `-`.
    pub upstreams: BTreeMap<String, Upstream>,
    /// What every route starts from. A section on a route replaces the section here as a whole.
    pub defaults: Defaults,
    /// Which requests go where: the most specific match wins. Default, where there is exactly one upstream: everything
    /// to it.
    pub routes: Vec<Route>,
}

impl Default for Settings {
    fn default() -> Self {
        let listen = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 8080));
        Self {
            listen: OneOrMany::from(listener::Config::from(listener::Address::Tcp(listen))),
            admin: Toggle::On(Admin::default()),
            threads: None,
            limits: Limits::default(),
            drain: drain::Config::default(),
            log: log::Config::default(),
            request_id: request_id::Config::default(),
            hygiene: hygiene::Config::default(),
            redis: None,
            upstreams: BTreeMap::new(),
            defaults: Defaults::default(),
            routes: Vec::new(),
        }
    }
}

/// The operator's port. Section `admin`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Admin {
    /// Where it listens. Default `127.0.0.1:9090`: reachable from this machine, or this pod, only.
    pub listen: listener::Address,
    /// What a call that changes something must show, as `Authorization: Bearer`. Without one such calls are
    /// answered on loopback and Unix sockets only. Default none.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "shown")]
    pub token: Option<Secret>,
}

impl Default for Admin {
    fn default() -> Self {
        Self { listen: listener::Address::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, 9090))), token: None }
    }
}

#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn shown<S: Serializer>(secret: &Option<Secret>, to: S) -> Result<S::Ok, S::Error> {
    secret.as_ref().map(Secret::shown).serialize(to)
}

/// How much clients may take. Section `limits`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Limits {
    /// Connections open at once; more wait to be accepted. Default 10000.
    pub connections: NonZeroU32,
    /// Fields of a request's head, 1 to 10000; more are a 431. Default 100.
    pub headers: u32,
    /// Bytes of a request's header section, 8KiB to 1MiB; more are a 431. Default `64KiB`.
    pub header_bytes: ByteSize,
    /// Bytes of a request's target, 1KiB to 63KiB; more are a 414. Default `16KiB`.
    pub uri_bytes: ByteSize,
    /// Streams that one HTTP/2 connection may have open at once, 1 to 10000. Each may have sent 256 KiB of its body before
    /// it is read (down to 64 KiB where all of them together would be more than 64 MiB). Default 200.
    pub http2_streams: NonZeroU32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: NonZeroU32::new(10_000).unwrap_or(NonZeroU32::MIN),
            headers: 100,
            header_bytes: ByteSize::from_kib(64),
            uri_bytes: ByteSize::from_kib(16),
            http2_streams: NonZeroU32::new(200).unwrap_or(NonZeroU32::MIN),
        }
    }
}

impl Check for Limits {
    fn check(&self, problems: &mut Problems) {
        for (key, count) in [("headers", self.headers), ("http2_streams", self.http2_streams.get())] {
            if !(1..=10_000).contains(&count) {
                problems.add(key, format!("is {count}: must be from 1 to 10000"));
            }
        }
        // hyper reads no head into less than 8 KiB, and `http` holds no target of 64 KiB.
        let sizes = [("header_bytes", self.header_bytes, (8, 1024)), ("uri_bytes", self.uri_bytes, (1, 63))];
        for (key, size, (least, most)) in sizes {
            let (least, most) = (ByteSize::from_kib(least), ByteSize::from_kib(most));
            if size < least || size > most {
                problems.add(key, format!("is {size}: must be from {least} to {most}"));
            }
        }
    }
}

impl Settings {
    /// Reads, completes and checks the configuration.
    ///
    /// # Errors
    /// All mistakes of all sources.
    pub fn load(sources: &Sources) -> Result<(Self, Tree), Problems> {
        // A fixed JSON answer may have nulls; and a condition may be that there is nothing.
        let sources = Sources { free: &["json", "when"], ..sources.clone() };
        sources.load(|settings: &mut Self, tree, problems| {
            settings.complete();
            settings.check(tree, problems);
        })
    }

    /// The files beside the configuration's own that it is made of, which are to be watched.
    #[must_use]
    pub fn files(&self) -> BTreeSet<PathBuf> {
        let auths = self.routes.iter().filter_map(|route| route.auth.as_ref()).chain([&self.defaults.auth]);
        let auths = auths.filter_map(Toggle::as_ref).flat_map(auth::Config::files);
        let fallbacks = self.routes.iter().filter_map(|route| route.fallback.as_ref()).chain([&self.defaults.fallback]);
        let fallbacks = fallbacks.filter_map(Toggle::as_ref).flat_map(fallback::Config::files);
        let redis = self.redis.iter().filter(|redis| redis.enabled).flat_map(store::Config::files);
        let upstreams = self.upstreams.values().flat_map(Upstream::files);
        auths.chain(fallbacks).chain(redis).chain(upstreams).map(Path::to_owned).collect()
    }

    /// How many threads serve.
    #[must_use]
    pub fn threads(&self) -> NonZeroUsize {
        let cpus = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        self.threads.unwrap_or_else(cpus)
    }

    /// What holds: the file, as it would be with every default written out, and every route with all that it
    /// inherits. It can be read again, and then means the same; only a secret that is text is not in it.
    ///
    /// # Errors
    /// A path of the environment or the command line is not UTF-8.
    pub fn effective(&self) -> Result<Value, serde_json::Error> {
        let mut all = self.clone();
        all.threads = Some(self.threads());
        all.upstreams.values_mut().for_each(Upstream::complete);
        for route in &mut all.routes {
            // A fixed answer does not fail, whatever it inherits.
            let fixed = self.fixed(&route.upstream).is_some();
            route.complete(self.policies(route), fixed);
        }
        let mut all = serde_json::to_value(all)?;
        for route in all["routes"].as_array_mut().into_iter().flatten() {
            if let Some(timeouts) = route["timeouts"].as_object_mut() {
                for key in OF_CONNECTIONS {
                    timeouts.remove(key);
                }
            }
        }
        Ok(all)
    }

    /// What holds for `route`: see [`Route::policies`]. What a page of the operator's port says holds when it is asked
    /// for, so that no cache that it inherits is for it.
    #[must_use]
    pub fn policies(&self, route: &Route) -> Defaults {
        let cache = if self.published(route).is_some() { Some(Toggle::Off) } else { None };
        let policies = route.policies(&self.defaults);
        Defaults { cache: cache.unwrap_or(policies.cache), ..policies }
    }

    /// The caches in which there may be something of what requests to `route` change.
    pub fn caches_met(&self, route: &Route) -> impl Iterator<Item = &cache::Config> {
        let all =
            self.routes.iter().filter(|other| route.matches.takes_unsafe() && other.matches.meets(&route.matches));
        all.filter(|other| self.published(other).is_none()).filter_map(|other| {
            let cache = other.cache.as_ref().unwrap_or(&self.defaults.cache);
            cache.as_ref().filter(|cache| !cache.methods.is_empty())
        })
    }

    /// The page of the operator's port that `route` leads to, if it does.
    fn published(&self, route: &Route) -> Option<&publish::Config> {
        self.upstreams.get(&route.upstream)?.admin.as_ref()
    }

    /// The JSON Schema of the file.
    #[must_use]
    pub fn schema() -> Schema {
        let generator =
            SchemaSettings::draft2020_12().with_transform(RecursiveTransform(without_null)).into_generator();
        generator.into_root_schema_for::<Self>()
    }

    /// A file without routes has one, to its only upstream. And what the files say that it names is noted.
    fn complete(&mut self) {
        if let (true, [only]) = (self.routes.is_empty(), &*self.upstreams.keys().collect::<Vec<_>>()) {
            self.routes.push(Route::to(only));
        }
        self.upstreams.values_mut().for_each(Upstream::note_files);
        let auths = self.routes.iter_mut().filter_map(|route| route.auth.as_mut()).chain([&mut self.defaults.auth]);
        for auth in auths {
            if let Toggle::On(auth) = auth {
                auth.note_files();
            }
        }
    }

    fn check(&self, tree: &Tree, problems: &mut Problems) {
        self.check_listeners(tree, problems);
        if self.threads.is_some_and(|threads| threads.get() > 1024) {
            problems.add("threads", "must be at most 1024");
        }
        problems.at("limits", |problems| self.limits.check(problems));
        problems.at("drain", |problems| self.drain.check(problems));
        problems.at("log", |problems| check_log(&self.log, problems));
        if let Some(redis) = &self.redis {
            problems.at("redis", |problems| redis.check(problems));
        }
        for (name, upstream) in &self.upstreams {
            problems.at(format!("upstreams.{name}"), |problems| {
                if !is_name(name) {
                    problems.add("", "is no name for an upstream: 1 to 64 letters, digits, `_` or `-`");
                }
                upstream.check(problems);
            });
        }
        problems.at("defaults.auth", |problems| self.defaults.auth.check(problems));
        problems.at("defaults.cors", |problems| self.defaults.cors.check(problems));
        problems.at("defaults.session", |problems| self.defaults.session.check(problems));
        problems.at("defaults.timeouts", |problems| self.defaults.timeouts.check(problems));
        self.check_fallback(tree, "defaults", &self.defaults.fallback, None, problems);
        check_rate_limit(tree, "defaults", Some(&self.defaults.rate_limit), None, problems);
        check_cache("defaults", Some(&self.defaults.cache), None, problems);
        self.check_cache_in_redis(tree, "defaults", problems);
        problems.at("defaults.concurrency", |problems| self.defaults.concurrency.check(problems));
        problems.at("defaults.retry", |problems| self.defaults.retry.check(problems));
        self.check_routes(tree, problems);
        self.check_limits(tree, problems);
        self.check_published(tree, problems);
        self.check_warm(tree, problems);
        self.check_principals(tree, problems);
    }

    fn check_listeners(&self, tree: &Tree, problems: &mut Problems) {
        let single = !tree.has("listen.0");
        let key = |n: usize| if single { "listen".to_owned() } else { format!("listen.{n}") };
        if self.listen.0.is_empty() {
            problems.add("listen", "is empty: name an address, as in `0.0.0.0:8080`");
        }
        for (n, listener) in self.listen.iter().enumerate() {
            problems.at(key(n), |problems| listener.check(problems));
            let mut earlier = self.listen.iter().take(n);
            if let Some(other) = earlier.find(|other| clash(&other.address, &listener.address)) {
                problems.add(key(n), format!("`{}` clashes with the listener `{}`", listener.address, other.address));
            }
            if let Toggle::On(admin) = &self.admin
                && clash(&admin.listen, &listener.address)
            {
                let why = format!(
                    "`{}` clashes with `{}` of `listen`: the operator's port is its own",
                    admin.listen, listener.address
                );
                problems.add("admin.listen", why);
            }
        }
        if let Some(token) = self.admin.as_ref().and_then(|admin| admin.token.as_ref()) {
            problems.at("admin.token", |problems| token.check(problems));
        }
    }

    fn check_routes(&self, tree: &Tree, problems: &mut Problems) {
        // Also those that could not be read: that was said already.
        let upstreams = tree.names("upstreams");
        if upstreams.is_empty() {
            let how = "needs at least one, as in `{api: {endpoints: [http://127.0.0.1:8000]}}`";
            problems.add("upstreams", how);
        } else if self.routes.is_empty() && upstreams.len() > 1 {
            problems.add("routes", "is missing: with more than one upstream, routes say which requests go where");
        }
        let mut names = HashMap::new();
        for (n, route) in self.routes.iter().enumerate() {
            problems.at(format!("routes.{n}"), |problems| {
                if route.name.as_ref().is_some_and(|name| !is_route_name(name)) {
                    problems.add("name", "must be 1 to 100 characters, none of them a control character");
                }
                // What could not be read may be what makes the difference.
                let differs =
                    |n: usize| ["match", "name"].iter().any(|key| !tree.is_whole(&format!("routes.{n}.{key}")));
                let mut earlier = self.routes.iter().take(n).enumerate().filter(|(n, _)| !differs(*n));
                if !differs(n) {
                    if let Some((same, _)) = earlier.find(|(_, other)| other.matches.same(&route.matches)) {
                        let same = tree.place(&format!("routes.{same}"));
                        problems.add("match", format!("is that of `{same}`: this route would never be used"));
                    } else if let Some(other) = names.insert(route.name(), n) {
                        let other = tree.place(&format!("routes.{other}"));
                        problems.add("name", format!("`{}` is the name of `{other}` already", route.name()));
                    }
                }
                check_name(&route.upstream, "upstream", &upstreams, problems);
                problems.at("match", |problems| route.matches.check(problems));
                problems.at("auth", |problems| route.auth.iter().for_each(|auth| auth.check(problems)));
                problems.at("cors", |problems| route.cors.iter().for_each(|cors| cors.check(problems)));
                problems.at("session", |problems| route.session.iter().for_each(|session| session.check(problems)));
                if let Some(concurrency) = &route.concurrency {
                    problems.at("concurrency", |problems| concurrency.check(problems));
                }
                if let Some(Toggle::On(retry)) = &route.retry {
                    problems.at("retry", |problems| {
                        if let Some(what) = self.fixed(&route.upstream) {
                            problems.add("", format!("has no effect: `{}` is {what}", route.upstream));
                        }
                        retry.check(problems);
                    });
                }
                problems.at("timeouts", |problems| {
                    for key in OF_CONNECTIONS {
                        if tree.has(&format!("routes.{n}.timeouts.{key}")) {
                            problems.add(
                                key,
                                "is about connections, which have no route yet: set it in `defaults.timeouts`",
                            );
                        }
                    }
                    if let Some(Toggle::On(timeouts)) = &route.timeouts {
                        timeouts.check(problems);
                    }
                });
            });
            let parameters: Vec<_> = route.matches.path.iter().flat_map(Pattern::names).collect();
            check_rate_limit(tree, &format!("routes.{n}"), route.rate_limit.as_ref(), Some(&parameters), problems);
            check_cache(&format!("routes.{n}"), route.cache.as_ref(), Some(&parameters), problems);
            self.check_cache_in_redis(tree, &format!("routes.{n}"), problems);
            self.check_fallback_of(n, route, tree, problems);
        }
    }

    /// That the cache at `place` is to use a Redis that there is not. Without being told to it does where there is one.
    fn check_cache_in_redis(&self, tree: &Tree, place: &str, problems: &mut Problems) {
        let key = format!("{place}.cache.redis");
        let section = match place.strip_prefix("routes.").and_then(|n| n.parse::<usize>().ok()) {
            Some(n) => self.routes.get(n).and_then(|route| route.cache.as_ref()),
            None => Some(&self.defaults.cache),
        };
        let is_on = matches!(section, Some(Toggle::On(config)) if !config.redis.is_off());
        if is_on && self.redis.is_none() && tree.has(&key) {
            problems.add(key, "needs a section `redis`, which says where that is");
        }
    }

    /// What is wrong with the rate limits of routes beside what else holds there, and beside those of other routes.
    fn check_limits(&self, tree: &Tree, problems: &mut Problems) {
        let mut shared = HashMap::new();
        for (n, route) in self.routes.iter().enumerate() {
            let place = format!("routes.{n}");
            let own = route.rate_limit.as_ref();
            let Some(limits) = own.unwrap_or(&self.defaults.rate_limit).as_ref() else { continue };
            // What could not be read may be what makes the difference.
            if ["rate_limit", "auth", "session"].iter().any(|key| !tree.is_whole(&format!("{place}.{key}"))) {
                continue;
            }
            let list = if tree.has(&format!("{place}.rate_limit.rules")) { "rules." } else { "" };
            for (m, rule) in limits.rules.iter().enumerate() {
                let mut add = |key: &str, message: String| match own {
                    Some(_) => problems.add(format!("{place}.rate_limit.{list}{m}{key}"), message),
                    None => problems.add(&place, format!("the rule `{}` of `defaults`: {message}", rule.name)),
                };
                for part in &rule.key {
                    if let Some(why) = self.hides(route, part) {
                        add(".key", format!("`{part}` {why}"));
                    }
                }
                let Some(scope) = &limits.scope else { continue };
                let &mut (first, known) = shared.entry((scope, &rule.name)).or_insert((n, rule));
                // Of two in one list it was said.
                if first != n && !rule.counts_as(known) {
                    let other = tree.place(&format!("routes.{first}"));
                    let how = "give them the same `key`, `limit`, `algorithm`, `burst` and `cost`, or two names";
                    let message =
                        format!("is not the `{}` of `{other}`, whose scope is `{scope}` too: {how}", rule.name);
                    add("", message);
                }
            }
        }
    }

    /// Why a rule of `route` never sees what a client sends as `part`, if it does not.
    fn hides(&self, route: &Route, part: &rate_limit::KeyPart) -> Option<&'static str> {
        const CREDENTIAL: &str = "is taken away by `auth` before: count by `principal`, or set `forward` in `auth`";
        let auth = route.auth.as_ref().unwrap_or(&self.defaults.auth).as_ref();
        let auth = auth.filter(|auth| !auth.forward);
        let session = route.session.as_ref().unwrap_or(&self.defaults.session).as_ref();
        match part {
            rate_limit::KeyPart::Header(name) if auth.is_some_and(|auth| auth.is_shown_in(name)) => Some(CREDENTIAL),
            rate_limit::KeyPart::Query(name) if auth.is_some_and(|auth| auth.query.as_ref() == Some(name)) => {
                Some(CREDENTIAL)
            }
            rate_limit::KeyPart::Header(name) if session.is_some_and(|session| session.replaces(name)) => {
                Some("is not what the client sent, but what `session` makes of it: count by `session`")
            }
            _ => None,
        }
    }

    fn check_fallback_of(&self, n: usize, route: &Route, tree: &Tree, problems: &mut Problems) {
        let place = format!("routes.{n}");
        let what = self.fixed(&route.upstream);
        let fixed = what.is_some();
        match (&route.fallback, self.defaults.fallback.as_ref()) {
            (Some(Toggle::On(_)), _) if fixed => {
                let what = format!("has no effect: `{}` is {}", route.upstream, what.unwrap_or_default());
                problems.add(format!("{place}.fallback"), what);
            }
            (Some(own), _) => self.check_fallback(tree, &place, own, Some(&route.upstream), problems),
            // A fixed answer never fails, whatever it inherits.
            (None, Some(inherited)) if !fixed && inherited.to.iter().any(|entry| entry.upstream == route.upstream) => {
                let how = "give the route a `fallback` of its own, or `fallback: off`";
                problems
                    .add(place, format!("falls back to its own upstream `{}` by `defaults`: {how}", route.upstream));
            }
            (None, _) => {}
        }
    }

    /// What is wrong with the fallbacks at `place`, which are those of a route to `own`, or of any.
    fn check_fallback(
        &self,
        tree: &Tree,
        place: &str,
        fallback: &Toggle<fallback::Config>,
        own: Option<&str>,
        problems: &mut Problems,
    ) {
        let Toggle::On(config) = fallback else { return };
        let place = format!("{place}.fallback");
        let list = if tree.has(&format!("{place}.to")) { "to." } else { "" };
        let upstreams = tree.names("upstreams");
        problems.at(&place, |problems| {
            for (n, entry) in config.to.iter().enumerate() {
                let key = format!("{list}{n}");
                let section = tree.has(&format!("{place}.{key}.upstream"));
                let key = if section { format!("{key}.upstream") } else { key };
                check_name(&entry.upstream, &key, &upstreams, problems);
                if self.upstreams.get(&entry.upstream).is_some_and(|upstream| upstream.admin.is_some()) {
                    problems.add(key, format!("`{}` is {PAGE}, which stands in for nobody", entry.upstream));
                }
            }
            config.check(list, own, |name| self.fixed(name).is_some(), problems);
        });
    }

    /// What the upstream `name` is, if it answers by itself.
    fn fixed(&self, name: &str) -> Option<&'static str> {
        let upstream = self.upstreams.get(name)?;
        let what = [(upstream.respond.is_some(), "a fixed answer"), (upstream.admin.is_some(), PAGE)];
        what.into_iter().find_map(|(is, what)| is.then_some(what))
    }

    /// What is wrong with what caches of routes are to keep warm: it must come to the route, and be for those who ask.
    fn check_warm(&self, tree: &Tree, problems: &mut Problems) {
        if self.defaults.cache.as_ref().is_some_and(|cache| !cache.warm.is_empty()) {
            problems
                .add("defaults.cache.warm", "holds for no route: it stands in the `cache` of the route it is about");
        }
        let table = Table::new(self.routes.iter().enumerate().map(|(n, route)| (route.matches.clone(), n)).collect());
        for (n, route) in self.routes.iter().enumerate() {
            let own = |key: &str| tree.is_whole(&format!("routes.{n}.{key}"));
            let Some(Toggle::On(cache)) = &route.cache else { continue };
            let auth = route.auth.as_ref().unwrap_or(&self.defaults.auth).as_ref();
            if !cache.warm.is_empty() && !cache.shared && auth.is_some_and(|auth| !auth.anonymous) && own("auth") {
                let why = "is asked for without a credential, and `auth` lets nobody ask so: set `shared: true`, if the \
                           answer is the same for all";
                problems.add(format!("routes.{n}.cache.warm"), why);
            }
            for (m, warmed) in cache.warm.iter().enumerate() {
                let mut request = warmed.request();
                if let (false, Some(host)) = (warmed.has_host(), &route.matches.host) {
                    let host = host.replace('*', "any");
                    request.headers_mut().extend(HeaderValue::try_from(host).map(|host| (HOST, host)));
                }
                let fields = route.matches.headers.iter();
                request.headers_mut().extend(fields.map(|(name, value)| (name.get().clone(), value.get().clone())));
                let message = match table.select(&request) {
                    Ok((_, found)) if *found == n => continue,
                    Ok((_, other)) => format!("`GET {warmed}` comes to `{}`", tree.place(&format!("routes.{other}"))),
                    Err(_) => format!("`GET {warmed}` comes to no route"),
                };
                if own("match") {
                    problems.add(format!("routes.{n}.cache.warm.{m}"), format!("{message}: name what this route gets"));
                }
            }
        }
    }

    /// That answers are to be kept apart by who asks, where nobody is known.
    fn check_principals(&self, tree: &Tree, problems: &mut Problems) {
        let is_keyed = |cache: &Toggle<cache::Config>| {
            cache.as_ref().is_some_and(|cache| cache.key.contains(&cache::key::KeyPart::Principal))
        };
        let knows = |(n, route): (usize, &Route)| {
            let auth = route.auth.as_ref().unwrap_or(&self.defaults.auth);
            !auth.is_off() || !tree.is_whole("defaults.auth") || !tree.is_whole(&format!("routes.{n}.auth"))
        };
        let why = "holds `principal`, but there is no `auth`, which says who asks";
        for (n, route) in self.routes.iter().enumerate().filter(|route| !knows(*route)) {
            if route.cache.as_ref().is_some_and(is_keyed) {
                problems.add(format!("routes.{n}.cache.key"), why);
            }
        }
        let mut heirs = self.routes.iter().enumerate().filter(|(_, route)| route.cache.is_none());
        let is_off = self.defaults.auth.is_off() && tree.is_whole("defaults.auth");
        if is_keyed(&self.defaults.cache) && is_off && !heirs.any(knows) {
            problems.add("defaults.cache.key", why);
        }
    }

    /// What is wrong with routes to pages of the operator's port, and with what these name.
    fn check_published(&self, tree: &Tree, problems: &mut Problems) {
        for (name, upstream) in &self.upstreams {
            let Some(publish::Config { page, .. }) = &upstream.admin else { continue };
            problems.at(format!("upstreams.{name}.admin"), |problems| {
                let Some(about) = page.of_breakers().or(page.of_endpoints()) else { return };
                check_name(about, "page", &tree.names("upstreams"), problems);
                if let Some(of) = self.upstreams.get(about)
                    && page.of_breakers().is_some()
                    && of.circuit_breaker.is_none()
                {
                    problems.add("page", format!("`{about}` has no `circuit_breaker`"));
                }
            });
        }
        for (n, route) in self.routes.iter().enumerate() {
            let Some(publish::Config { page, open }) = self.published(route) else { continue };
            let name = &route.upstream;
            problems.at(format!("routes.{n}"), |problems| {
                if let Some(Toggle::On(_)) = route.cache {
                    problems.add("cache", format!("has no effect: `{name}` is {PAGE}"));
                }
                let mut parameters = route.matches.path.iter().flat_map(Pattern::names);
                if let Some(needed) = page.parameter()
                    && !parameters.any(|parameter| parameter == needed)
                {
                    problems.add("match.path", format!("has no parameter `{{{needed}}}`, which is part of `{page}`"));
                }
                let methods = page.methods();
                let asked = |own: &OneOrMany<MethodName>| own.iter().any(|own| methods.contains(&own.as_str()));
                if route.matches.method.as_ref().is_some_and(|own| !asked(own)) {
                    let message = format!("lacks {}: by these `{page}` is asked for", methods.join(" and "));
                    problems.add("match.method", message);
                }
                // What could not be read may be what guards it.
                let read =
                    [format!("routes.{n}.auth"), "defaults.auth".to_owned()].iter().all(|key| tree.is_whole(key));
                let auth = route.auth.as_ref().unwrap_or(&self.defaults.auth).as_ref();
                let guarded = auth.is_some_and(|auth| !auth.anonymous);
                if page.changes() && !open && !guarded && read {
                    let how = "give the route an `auth` without `anonymous`, or let the page be `open: true`";
                    problems.add("", format!("lets anybody ask for `{page}`, which changes something: {how}"));
                }
            });
        }
    }
}

/// What an upstream with `admin` is.
const PAGE: &str = "a page of the operator's port";

/// What is wrong with the rate limits at `place`, which are those of a route with these `parameters`, or of any.
fn check_rate_limit(
    tree: &Tree,
    place: &str,
    limits: Option<&Toggle<rate_limit::Config>>,
    parameters: Option<&[&str]>,
    problems: &mut Problems,
) {
    let Some(Toggle::On(config)) = limits else { return };
    let place = format!("{place}.rate_limit");
    let list = if tree.has(&format!("{place}.rules")) { "rules." } else { "" };
    problems.at(place, |problems| config.check(list, parameters, problems));
}

/// What is wrong with the cache at `place`, which is that of a route with these `parameters`, or of any.
fn check_cache(
    place: &str,
    cache: Option<&Toggle<cache::Config>>,
    parameters: Option<&[&str]>,
    problems: &mut Problems,
) {
    let Some(Toggle::On(config)) = cache else { return };
    problems.at(format!("{place}.cache"), |problems| {
        config.check(problems);
        for (key, name) in config.parameters() {
            match parameters {
                None => {
                    problems
                        .add(key, format!("names `{{{name}}}`: `defaults` hold for routes without parameters, too"));
                }
                Some(known) if !known.contains(&name) => {
                    problems.add(key, format!("names `{{{name}}}`, which is no parameter of the route's path"));
                }
                Some(_) => {}
            }
        }
    });
}

/// Adds that there is no upstream `name`, which stands at `key`, if there is none. That there is none at all was said.
fn check_name(name: &str, key: &str, upstreams: &[&str], problems: &mut Problems) {
    if upstreams.is_empty() || upstreams.contains(&name) {
        return;
    }
    let near = match nearest(name, upstreams.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => format!("there are `{}`", upstreams.join("`, `")),
    };
    problems.add(key, format!("there is no upstream `{name}`: {near}"));
}

/// The timeouts that no route can have.
const OF_CONNECTIONS: [&str; 2] = ["client_header", "keepalive"];

/// What may be left out is an `Option`, but a key without a value is a mistake.
fn without_null(schema: &mut Schema) {
    let Some(object) = schema.as_object_mut() else { return };
    if object.get("default").is_some_and(Value::is_null) {
        object.remove("default");
    }
    if let Some(types) = object.get_mut("type")
        && let Some(several) = types.as_array_mut()
    {
        several.retain(|name| name != "null");
        if let [only] = &**several {
            *types = only.clone();
        }
    }
    let Some(several) = object.get_mut("anyOf").and_then(Value::as_array_mut) else { return };
    several.retain(|choice| choice != &serde_json::json!({ "type": "null" }));
    // `$ref` may stand beside a description of its own.
    if let [Value::Object(only)] = &mut **several {
        let mut only = std::mem::take(only);
        object.remove("anyOf");
        object.append(&mut only);
    }
}

fn check_log(log: &log::Config, problems: &mut Problems) {
    if let Err(message) = log.filter() {
        problems.add("level", message);
    }
    if let Some(file) = &log.file
        && let Some(directory) = file.parent()
        && !directory.as_os_str().is_empty()
        && !directory.is_dir()
    {
        problems.add("file", format!("the directory `{}` does not exist", directory.display()));
    }
}

fn is_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.bytes().all(|c| c.is_ascii_alphanumeric() || c == b'_' || c == b'-')
}

/// Whether two listeners cannot be open at once.
fn clash(one: &listener::Address, other: &listener::Address) -> bool {
    use listener::Address::{Tcp, Unix};
    match (one, other) {
        (Unix(one), Unix(other)) => one == other,
        // Port 0 is a different port each time. `[::]` takes IPv4 too.
        (Tcp(one), Tcp(other)) => {
            let takes =
                |one: IpAddr, other: IpAddr| one == other || one.is_unspecified() && (one.is_ipv6() || other.is_ipv4());
            one.port() == other.port()
                && one.port() != 0
                && (takes(one.ip(), other.ip()) || takes(other.ip(), one.ip()))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::{collection::vec, prelude::*};

    use super::*;
    use crate::config::HumanDuration;
    use crate::layers::errors;

    fn load(text: &str) -> Result<Settings, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("a.yaml");
        std::fs::write(&file, text).unwrap();
        let prefix = format!("{}: ", file.display());
        Settings::load(&Sources { file: Some(file), ..Sources::default() })
            .map(|(settings, _)| settings)
            .map_err(|problems| problems.to_string().replace(&prefix, ""))
    }

    #[test]
    fn one_upstream_gets_everything() {
        let settings = load("upstreams: {api: {endpoints: [http://127.0.0.1:8000]}}").unwrap();
        assert_eq!(settings.routes, [Route::to("api")]);
        assert_eq!(settings.routes[0].name(), "/*");
        assert_eq!(settings.routes[0].policies(&settings.defaults), settings.defaults);
        let Settings { upstreams, routes, .. } = settings.clone();
        assert_eq!(settings, Settings { upstreams, routes, ..Settings::default() });
    }

    #[test]
    fn a_section_of_a_route_replaces_that_of_the_defaults_as_a_whole() {
        let text = "
            upstreams: {api: {endpoints: [http://127.0.0.1:8000]}}
            defaults:
              timeouts: {first_byte: 1s, idle: 2s}
              body_limit: {max: 1KiB}
              errors: openai
            routes:
              - {upstream: api, match: {path: /a}, timeouts: {idle: 3s}, body_limit: off}
              - {upstream: api, match: {path: /b}, timeouts: off, errors: problem, security_headers: off}
              - {upstream: api}";
        let settings = load(text).unwrap();
        let [a, b, rest] = &*settings.routes else { panic!("three routes") };
        let [a, b, rest] = [a, b, rest].map(|route| route.policies(&settings.defaults));
        let seconds = |n| Toggle::On(HumanDuration::from_secs(n));
        assert_eq!(a.timeouts.idle, seconds(3));
        assert_eq!(a.timeouts.first_byte, seconds(300), "not inherited");
        assert_eq!((a.body_limit, a.errors), (Toggle::Off, errors::Config::Openai));
        assert_eq!(b.timeouts.first_byte, Toggle::Off);
        assert_eq!(b.errors, errors::Config::Problem);
        assert!(b.security_headers.is_off());
        assert!(b.body_limit.as_ref().is_some());
        assert_eq!(rest, settings.defaults);
    }

    #[test]
    fn what_holds_is_a_file_that_means_the_same() {
        let text = "
            listen:
              - 127.0.0.1:0
              - {address: 'unix:/tmp/a.sock', mode: '660', proxy_protocol: {from: [10.0.0.0/8, private]}}
            admin: {token: {env: PATH}}
            upstreams:
              api: {endpoints: [http://127.0.0.1:8000]}
              far: {endpoints: ['https://a.example'], protocol: http2, host: b.example, pool: {idle: off}}
              late: {endpoints: [http://127.0.0.1:8001]}
              fixed: {respond: {status: 503, headers: {retry-after: 60}, json: {x: null}}}
              page: {admin: {page: '/rate-limits/a?key=b', open: false}}
            defaults:
              timeouts: {first_byte: 1s, keepalive: 9s}
              body_limit: {max: 1KiB}
              retry: {on: [connect, 503]}
              fallback: [fixed]
            routes:
              - upstream: api
                match: {path: '/a/{id}', method: [GET, PUT], headers: {x-b: ü}}
                timeouts: off
                fallback:
                  to:
                    - {upstream: far, on: [timeout, 429], path: /x, json: {model: b, user: null, n: {m: 1.5}}}
                    - {upstream: late, headers: {bearer: {env: PATH}, remove: [x-a], keep: [cookie]}, path: {prefix: /a, with: /}}
              - {upstream: far, match: {host: '*.example', method: POST}, errors: openai, security_headers: off}
              - {upstream: fixed, security_headers: {preset: web, set: {x-y: 1}, remove: [x-z]}}";
        let settings = load(text).unwrap();
        let effective = settings.effective().unwrap();
        assert_eq!(effective["upstreams"]["api"]["host"], "preserve");
        assert_eq!(effective["routes"][1]["fallback"]["to"][0]["upstream"], "fixed");
        assert_eq!(
            (&effective["routes"][2]["fallback"], &effective["routes"][2]["retry"]),
            (&"off".into(), &"off".into())
        );
        assert_eq!(effective["upstreams"]["api"]["pool"]["max_idle"], 1024);
        let [off, inherited, _] = &**effective["routes"].as_array().unwrap() else { panic!("three routes") };
        assert_eq!((&off["timeouts"]["idle"], &off["name"]), (&"off".into(), &"GET|PUT /a/{id} with x-b".into()));
        assert_eq!(
            (&inherited["timeouts"]["first_byte"], &inherited["body_limit"]["max"]),
            (&"1s".into(), &"1KiB".into())
        );

        let again = load(&effective.to_string()).unwrap();
        assert_eq!(again.effective().unwrap(), effective);
        assert_eq!((&again.listen, &again.admin, &again.limits), (&settings.listen, &settings.admin, &settings.limits));
        for (again, settings) in again.routes.iter().zip(&settings.routes) {
            assert_eq!(again.matches, settings.matches);
            assert_eq!(again.name(), settings.name());
        }
    }

    #[test]
    fn listeners_that_cannot_be_open_at_once_are_found() {
        let parse = |text: &str| text.parse::<listener::Address>().unwrap();
        for (one, other, expected) in [
            ("0.0.0.0:80", "127.0.0.1:80", true),
            ("[::]:80", "127.0.0.1:80", true),
            ("[::]:80", "[::1]:80", true),
            ("0.0.0.0:80", "[::1]:80", false),
            ("127.0.0.1:80", "127.0.0.2:80", false),
            ("127.0.0.1:80", "127.0.0.1:81", false),
            ("127.0.0.1:0", "127.0.0.1:0", false),
            ("unix:/a", "unix:/a", true),
            ("unix:/a", "127.0.0.1:80", false),
        ] {
            assert_eq!(clash(&parse(one), &parse(other)), expected, "{one} {other}");
            assert_eq!(clash(&parse(other), &parse(one)), expected, "{other} {one}");
        }
    }

    #[test]
    fn an_upstream_that_could_not_be_read_is_not_unknown() {
        let problems = load("upstreams: {api: {endpoints: [8000]}}\nroutes: [{upstream: api}]").unwrap_err();
        assert_eq!(
            problems,
            "upstreams.api.endpoints.0: must be a URL or a section with `url` and `weight`, not a number"
        );
    }

    #[test]
    fn a_fixed_answer_may_hold_nulls() {
        let settings = load("upstreams: {a: {respond: {json: {x: null, y: [~]}}}}").unwrap();
        let json = settings.upstreams["a"].respond.as_ref().unwrap().json.as_ref().unwrap();
        assert_eq!(json, &serde_json::json!({"x": null, "y": [null]}));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The reference with some of its lines gone, doubled or scrambled: whatever comes of it, it is settings or
        /// mistakes, never a panic, and never no answer.
        #[test]
        fn any_file_is_settings_or_mistakes(cuts in vec((0..140_usize, 0..4_u8, "[ -~]{0,8}"), 1..6)) {
            let mut lines: Vec<_> = include_str!("../../config/sidegate.yaml").lines().map(str::to_owned).collect();
            for (at, how, noise) in cuts {
                let at = at % lines.len();
                match how {
                    0 => drop(lines.remove(at)),
                    1 => lines[at].push_str(&noise),
                    2 => lines.insert(at, lines[at].clone()),
                    _ => lines[at] = lines[at].replacen('#', "", 1).replace(": ", &format!(": {noise}")),
                }
            }
            if let Err(problems) = load(&lines.join("\n")) {
                prop_assert!(!problems.is_empty());
            }
        }
    }
}
