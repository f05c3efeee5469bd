//! Auth: row 8 of the request path. Who asks, by an API key or a token.
//!
//! A request with a valid credential goes on with its [`Principal`]; one without is answered with 401 and
//! `WWW-Authenticate` (RFC 6750 §3), one whose key is for other routes with 403. Where keys and tokens are both
//! configured, one of them is enough; two different credentials in one request are none, because the backend might
//! believe the other one. The credential goes no further, unless `forward` says so; who it stood for does, in fields
//! that no client can set: inbound ones of their names, and those that a CGI-like backend would read the same way, are
//! removed from every request, anonymous ones too, and from its trailers, as is what would be a credential there.
//! Upgrades are judged by their handshake; preflights never come here.
//!
//! Keys are compared as SHA-256 digests, in constant time, and looked up under a secret of the process: see
//! [`api_key`]. Tokens: [`jwt`].
//!
//! An address whose attempts are refused more often than `max_failures` gets 429 before what it shows is looked at. An
//! address is an IPv4 one or an IPv6 /64, as `layers::hygiene` found it. Behind one address there may be many people:
//! a credential that was good from there lately is still looked at, so that one broken script does not lock its office
//! out; and a request without any credential is no attempt. Counts are those of this process, over all routes, and
//! bounded: the addresses longest without a failure are forgotten first. Clients without an address (Unix sockets) are
//! not counted.
//!
//! Neither credentials nor digests nor claims other than the principal's id are logged or counted by.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::{layers::auth::{self, AuthLayer}, message::{Body, BoxError, Error, Kind}, telemetry::Metrics};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let file = tempfile::NamedTempFile::new().unwrap();
//! let new = auth::api_key::NewKey::make("alice", None, &[], None, std::time::SystemTime::now()).unwrap();
//! std::fs::write(file.path(), &new.line).unwrap();
//! let config = auth::Config { api_keys: Some(auth::ApiKeys::at(file.path())), ..auth::Config::default() };
//! let service = ServiceBuilder::new()
//!     .layer(AuthLayer::build(&config, "chat", &auth::State::default(), &Metrics::new()).unwrap())
//!     .service(service_fn(|request: Request<Body>| async move {
//!         assert_eq!(request.headers()["x-principal-id"], "alice");
//!         Ok::<_, BoxError>(Response::new(Body::empty()))
//!     }));
//! let request = Request::builder().header("x-api-key", &new.key).body(Body::empty()).unwrap();
//! assert!(service.clone().oneshot(request).await.is_ok());
//! let error = service.oneshot(Request::new(Body::empty())).await.unwrap_err();
//! assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::Unauthorized));
//! # });
//! ```

pub mod api_key;
mod credential;
mod failures;
mod jwk;
pub mod jwks;
pub mod jwt;
mod recent;

use std::{
    collections::HashMap,
    fmt,
    io::Read,
    mem,
    num::NonZeroU32,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Weak},
    task::{Context, Poll},
    time::SystemTime,
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Uri,
    header::{AUTHORIZATION, WWW_AUTHENTICATE},
};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use tower::{Layer, Service};

pub use self::jwk::Algorithm;
use self::{
    api_key::{Keys, digest_of},
    credential::{Places, Shown},
    failures::Failures,
    jwks::Remote,
    jwt::Verifier,
};
use crate::{
    config::{
        Check, Problems, Rate, Toggle,
        fields::FieldName,
        file::{self, Content},
    },
    message::{BoxError, Error, Kind, Net, Principal, Request, headers::remove_alike, take_ready},
    telemetry::{Exchange, Metrics, exchange, metrics::AuthMetrics},
};

/// A SHA-256 digest.
type Digest = [u8; 32];

/// Who may call. Section `auth`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Auth")]
pub struct Config {
    /// Keys that sidegate knows by their digests. This, or `jwt`, or both: then either is enough.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub api_keys: Option<ApiKeys>,
    /// Tokens that others issue, in `Authorization: Bearer`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jwt: Option<jwt::Config>,
    /// A parameter of the query that may hold a key or a token, for clients that can set no fields, as browsers'
    /// `WebSocket`. It is taken out of the target that the upstream sees. Default none: targets are logged by others.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub query: Option<String>,
    /// Whether requests without a credential pass, without a principal. One with a bad credential never does. Default
    /// `false`.
    pub anonymous: bool,
    /// Whether the upstream gets the credential too. Default `false`.
    pub forward: bool,
    /// The fields that tell the upstream who asks. What clients send under these names is removed.
    pub principal_headers: PrincipalHeaders,
    /// How many refused attempts an address, or an IPv6 /64, may make before it has to wait. `off` for any number.
    /// Default `20/min`.
    pub max_failures: Toggle<Rate>,
    /// What `WWW-Authenticate` calls the service. Default `sidegate`.
    pub realm: String,
}

/// A file of API keys, and where requests show theirs. Section `api_keys` of `auth`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ApiKeys")]
pub struct ApiKeys {
    /// One line per key, as `sidegate key new` prints them: an id, the SHA-256 of the key, and then, as needed,
    /// `tier=…`, `routes=…,…`, `expires=…`. Watched: a change holds without a restart.
    pub file: PathBuf,
    /// The field that a key is shown in; `off` for none. Default `x-api-key`.
    #[serde(default = "default_header")]
    pub header: Toggle<FieldName>,
    /// Whether a key may stand in `Authorization: Bearer` instead. Default `true`.
    #[serde(default = "yes")]
    pub bearer: bool,
}

impl ApiKeys {
    /// Those of a file, with everything else by default.
    pub fn at(file: impl Into<PathBuf>) -> Self {
        Self { file: file.into(), header: default_header(), bearer: true }
    }
}

fn default_header() -> Toggle<FieldName> {
    Toggle::On(HeaderName::from_static("x-api-key").into())
}

fn yes() -> bool {
    true
}

/// The fields that tell the upstream who asks. Section `principal_headers` of `auth`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct PrincipalHeaders {
    /// The principal's id; `off` tells it in none. Default `x-principal-id`.
    pub id: Toggle<FieldName>,
    /// The principal's tier, where it has one; `off` tells it in none. Default `x-principal-tier`.
    pub tier: Toggle<FieldName>,
}

impl Default for PrincipalHeaders {
    fn default() -> Self {
        let name = |name| Toggle::On(HeaderName::from_static(name).into());
        Self { id: name("x-principal-id"), tier: name("x-principal-tier") }
    }
}

impl Default for Config {
    fn default() -> Self {
        let failures = NonZeroU32::new(20).unwrap_or(NonZeroU32::MIN);
        Self {
            api_keys: None,
            jwt: None,
            query: None,
            anonymous: false,
            forward: false,
            principal_headers: PrincipalHeaders::default(),
            max_failures: Toggle::On(Rate::new(failures, 60)),
            realm: "sidegate".to_owned(),
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if self.api_keys.is_none() && self.jwt.is_none() {
            problems.add("", "needs `api_keys` or `jwt`: without either nobody could call");
        }
        if let Some(keys) = &self.api_keys {
            problems.at("api_keys", |problems| {
                match read(&keys.file).map(|text| Keys::parse(&text)) {
                    Ok(Ok(_)) => {}
                    Ok(Err(errors)) => {
                        // A file that is something else altogether has as many mistakes as lines.
                        for error in errors.iter().take(5) {
                            problems.add("file", format!("`{}`: {error}", keys.file.display()));
                        }
                    }
                    Err(message) => problems.add("file", message),
                }
                if keys.header.is_off() && !keys.bearer && self.query.is_none() {
                    problems.add("", "has neither `header` nor `bearer`: no request could show a key");
                }
                if keys.header.as_ref().is_some_and(|header| !header.is_free() || *header.get() == "cookie") {
                    problems.add("header", "is a field that has another meaning: name one of its own, as `x-api-key`");
                }
            });
        }
        if let Some(jwt) = &self.jwt {
            problems.at("jwt", |problems| jwt.check(problems));
        }
        if self.query.as_ref().is_some_and(String::is_empty) {
            problems.add("query", "is empty: name a parameter, as in `api_key`");
        }
        problems.at("principal_headers", |problems| {
            let PrincipalHeaders { id, tier } = &self.principal_headers;
            for (key, name) in [("id", id), ("tier", tier)] {
                if name.as_ref().is_some_and(|name| !name.is_free()) {
                    problems.add(key, "is a field that has another meaning: name one of its own, as `x-principal-id`");
                }
            }
            if let (Toggle::On(id), Toggle::On(tier)) = (id, tier)
                && id == tier
            {
                problems.add("tier", "is the field of `id`: name another, or `off`");
            }
        });
        if self.realm.is_empty() || self.realm.chars().any(|c| !(' '..='~').contains(&c) || matches!(c, '"' | '\\')) {
            problems.add("realm", "must be text of ASCII without `\"` and `\\`");
        }
    }
}

impl Config {
    /// The files that it is made of, which are to be watched.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let keys = self.api_keys.iter().map(|keys| &*keys.file);
        let of_jwt = self.jwt.iter().flat_map(|jwt| {
            let key = jwt.key.as_ref().and_then(|key| key.path());
            let set = jwt.jwks.iter().flat_map(|jwks| jwks.file.iter().chain(&jwks.ca)).map(|path| &**path);
            key.into_iter().chain(set)
        });
        keys.chain(of_jwt)
    }

    /// Whether requests may show a credential in the field `name`.
    #[must_use]
    pub fn is_shown_in(&self, name: &HeaderName) -> bool {
        let own = self.api_keys.as_ref().and_then(|keys| keys.header.as_ref());
        own.is_some_and(|own| own.get() == name) || self.has_bearer() && *name == AUTHORIZATION
    }

    fn has_bearer(&self) -> bool {
        self.api_keys.as_ref().is_some_and(|keys| keys.bearer) || self.jwt.is_some()
    }

    /// Notes what those of its files say that are not read anew with each configuration.
    pub fn note_files(&mut self) {
        let sets = self.jwt.iter_mut().filter_map(|jwt| jwt.jwks.as_mut());
        sets.for_each(|jwks| jwks.content = Content::of(jwks.ca.as_deref()));
    }
}

fn read(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    let read = file::open(path).and_then(|file| file.take(api_key::MAX_FILE + 1).read_to_string(&mut text));
    read.map_err(|error| format!("`{}` cannot be read: {error}", path.display()))?;
    if text.len() as u64 > api_key::MAX_FILE {
        return Err(format!("`{}` is larger than 16MiB", path.display()));
    }
    Ok(text)
}

/// What outlives a configuration: who failed how often, and the keys that are fetched.
#[derive(Default)]
pub struct State {
    failures: Arc<Failures>,
    /// Those that a stack still uses.
    remotes: Mutex<Vec<(jwks::Config, Weak<Remote>)>>,
    /// By the digest of their file, so that routes share them.
    keys: Mutex<HashMap<Digest, Weak<Keys>>>,
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("State").finish_non_exhaustive()
    }
}

impl State {
    fn remote(&self, url: &str, config: &jwks::Config, metrics: &Metrics) -> Result<Arc<Remote>, BoxError> {
        let mut remotes = self.remotes.lock();
        remotes.retain(|(_, remote)| remote.strong_count() > 0);
        let known = remotes.iter().find(|(known, _)| known == config).and_then(|(_, remote)| remote.upgrade());
        if let Some(remote) = known {
            return Ok(remote);
        }
        let remote = Arc::new(Remote::new(url, config, metrics)?);
        remotes.push((config.clone(), Arc::downgrade(&remote)));
        Ok(remote)
    }

    fn keys(&self, file: &Path) -> Result<Arc<Keys>, BoxError> {
        let text = read(file)?;
        let digest = digest_of(text.as_bytes());
        let mut known = self.keys.lock();
        known.retain(|_, keys| keys.strong_count() > 0);
        if let Some(keys) = known.get(&digest).and_then(Weak::upgrade) {
            return Ok(keys);
        }
        let first =
            |errors: Vec<api_key::LineError>| errors.into_iter().next().map_or_else(String::new, |e| e.to_string());
        let keys = Keys::parse(&text).map_err(|errors| format!("`{}`: {}", file.display(), first(errors)))?;
        let keys = Arc::new(keys);
        known.insert(digest, Arc::downgrade(&keys));
        Ok(keys)
    }
}

/// Lets those in who show who they are: see the [module](self).
#[derive(Debug, Clone)]
pub struct AuthLayer {
    gate: Arc<Gate>,
}

/// What the clones share.
#[derive(Debug)]
struct Gate {
    route: Box<str>,
    places: Places,
    keys: Option<Arc<Keys>>,
    tokens: Option<Verifier>,
    anonymous: bool,
    forward: bool,
    id_header: Option<HeaderName>,
    tier_header: Option<HeaderName>,
    max_failures: Option<Rate>,
    failures: Arc<Failures>,
    challenges: Challenges,
    metrics: AuthMetrics,
}

/// What `WWW-Authenticate` says.
#[derive(Debug)]
struct Challenges {
    /// Without a word about an error where there was no attempt (RFC 6750 §3).
    missing: HeaderValue,
    invalid: HeaderValue,
    forbidden: HeaderValue,
}

impl AuthLayer {
    /// A layer for the route of this name. Reads the files that `config` names. With `jwks.url` it needs a tokio runtime.
    ///
    /// # Errors
    /// A file cannot be read, or has not in it what it should.
    pub fn build(config: &Config, route: &str, state: &State, metrics: &Metrics) -> Result<Self, BoxError> {
        let keys = config.api_keys.as_ref();
        let bearer = config.has_bearer();
        let scheme = if bearer { "Bearer" } else { "ApiKey" };
        let realm = &config.realm;
        let challenge = |error: &str| HeaderValue::try_from(format!("{scheme} realm=\"{realm}\"{error}"));
        let on = |name: &Toggle<FieldName>| name.as_ref().map(|name| name.get().clone());
        let gate = Gate {
            route: route.into(),
            places: Places {
                header: keys.and_then(|keys| on(&keys.header)),
                bearer,
                query: config.query.as_deref().map(Into::into),
            },
            keys: keys.map(|keys| state.keys(&keys.file)).transpose()?,
            tokens: config.jwt.as_ref().map(|jwt| Verifier::build(jwt, state, metrics)).transpose()?,
            anonymous: config.anonymous,
            forward: config.forward,
            id_header: on(&config.principal_headers.id),
            tier_header: on(&config.principal_headers.tier),
            max_failures: config.max_failures.on(),
            failures: state.failures.clone(),
            challenges: Challenges {
                missing: challenge("")?,
                invalid: challenge(", error=\"invalid_token\"")?,
                forbidden: challenge(", error=\"insufficient_scope\"")?,
            },
            metrics: metrics.auth(route),
        };
        Ok(Self { gate: Arc::new(gate) })
    }
}

impl<S> Layer<S> for AuthLayer {
    type Service = Auth<S>;

    fn layer(&self, inner: S) -> Auth<S> {
        Auth { inner, gate: self.gate.clone() }
    }
}

/// The service of [`AuthLayer`].
///
/// # Errors
/// [`Kind::Unauthorized`], [`Kind::Forbidden`], [`Kind::RateLimited`], [`Kind::AuthUnavailable`].
#[derive(Debug, Clone)]
pub struct Auth<S> {
    inner: S,
    gate: Arc<Gate>,
}

impl<S> Service<Request> for Auth<S>
where
    S: Service<Request, Error: Into<BoxError>, Future: Send> + Clone + Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut inner = take_ready(&mut self.inner);
        let gate = self.gate.clone();
        Box::pin(async move {
            let (mut head, body) = request.into_parts();
            gate.pass(&mut head).await?;
            // Some backends take trailers for header fields.
            let body = body.stripping_trailers(move |trailers| gate.strip(trailers));
            inner.call(Request::from_parts(head, body)).await.map_err(Into::into)
        })
    }
}

/// What came of a credential.
enum Judged {
    Good(Principal),
    /// Good, and not here.
    Elsewhere(Principal),
    Bad(&'static str),
    /// It cannot be said.
    Unknown(&'static str),
}

impl Gate {
    async fn pass(&self, head: &mut http::request::Parts) -> Result<(), Error> {
        self.remove_principal(&mut head.headers);
        let exchange = head.extensions.get::<Exchange>().cloned();
        let net = self.max_failures.and_then(|rate| Some((Net::of(exchange::client_ip(&head.extensions)?), rate)));
        let known = |principal: &Principal| {
            if let Some(exchange) = &exchange {
                exchange.facts().principal = Some(principal.id.clone());
            }
        };
        let judged = match self.places.find(&head.headers, &head.uri) {
            Ok(None) if self.anonymous => {
                self.metrics.anonymous.inc();
                return Ok(());
            }
            Ok(None) => {
                self.metrics.missing.inc();
                let error = Error::new(Kind::Unauthorized, "there is no credential");
                return Err(error.with_field(WWW_AUTHENTICATE, self.challenges.missing.clone()));
            }
            Err(why) => {
                self.may_try(net, None)?;
                Judged::Bad(why)
            }
            Ok(Some(shown)) => {
                let digest = digest_of(&shown.text);
                self.may_try(net, Some(digest))?;
                let judged = self.judge(&shown, digest).await;
                if let Some((net, _)) = net {
                    match judged {
                        Judged::Good(_) | Judged::Elsewhere(_) => self.failures.good(net, digest),
                        Judged::Bad(_) => self.failures.no_longer_good(net, digest),
                        Judged::Unknown(_) => {}
                    }
                }
                judged
            }
        };
        match judged {
            Judged::Good(principal) => {
                self.metrics.passed.inc();
                known(&principal);
                self.admit(head, principal);
                Ok(())
            }
            Judged::Elsewhere(principal) => {
                self.metrics.forbidden.inc();
                known(&principal);
                Err(Error::from(Kind::Forbidden).with_field(WWW_AUTHENTICATE, self.challenges.forbidden.clone()))
            }
            Judged::Bad(why) => {
                self.metrics.invalid.inc();
                if let Some((net, rate)) = net {
                    self.failures.add(net, rate, Instant::now());
                }
                Err(Error::new(Kind::Unauthorized, why).with_field(WWW_AUTHENTICATE, self.challenges.invalid.clone()))
            }
            Judged::Unknown(why) => {
                self.metrics.unavailable.inc();
                Err(Error::new(Kind::AuthUnavailable, why).with_retry_after(std::time::Duration::from_secs(1)))
            }
        }
    }

    /// Whether who asks has not failed too often for what it shows to be looked at.
    fn may_try(&self, net: Option<(Net, Rate)>, digest: Option<Digest>) -> Result<(), Error> {
        let Some((net, rate)) = net else { return Ok(()) };
        match self.failures.wait(net, rate, Instant::now()) {
            Some(wait) if !digest.is_some_and(|digest| self.failures.was_good(net, digest)) => {
                self.metrics.throttled.inc();
                let error = Error::new(Kind::RateLimited, "too many refused credentials from this address");
                Err(error.with_retry_after(wait))
            }
            _ => Ok(()),
        }
    }

    async fn judge(&self, shown: &Shown<'_>, digest: Digest) -> Judged {
        let now = SystemTime::now();
        if let Some(key) = self.keys.as_ref().and_then(|keys| keys.find(&digest)) {
            let principal = key.principal().clone();
            return match (key.has_expired(now), key.allows(&self.route)) {
                (true, _) => Judged::Bad("the key has expired"),
                (false, true) => Judged::Good(principal),
                (false, false) => Judged::Elsewhere(principal),
            };
        }
        match &self.tokens {
            Some(tokens) if shown.may_be_token => match tokens.verify(&shown.text, digest, now).await {
                Ok(principal) => Judged::Good(principal),
                Err(refused @ jwt::Refused::NoKeys) => Judged::Unknown(refused.as_str()),
                Err(refused) => Judged::Bad(refused.as_str()),
            },
            _ => Judged::Bad("the key is not known"),
        }
    }

    /// Removes what only we may say.
    fn remove_principal(&self, headers: &mut HeaderMap) {
        for own in self.id_header.iter().chain(&self.tier_header) {
            remove_alike(headers, own);
        }
    }

    /// Removes from trailers what only we may say, and all that may be a credential: nobody has judged it.
    fn strip(&self, trailers: &mut HeaderMap) {
        self.remove_principal(trailers);
        for name in self.places.header.iter().chain(self.places.bearer.then_some(&AUTHORIZATION)) {
            remove_alike(trailers, name);
        }
    }

    fn admit(&self, head: &mut http::request::Parts, principal: Principal) {
        if !self.forward {
            let mut uri: Uri = mem::take(&mut head.uri);
            self.places.remove(&mut head.headers, &mut uri);
            head.uri = uri;
        }
        let value = |text: &str| HeaderValue::from_str(text).expect("ids and tiers are visible ASCII");
        if let Some(name) = &self.id_header {
            head.headers.insert(name, value(&principal.id));
        }
        if let (Some(name), Some(tier)) = (&self.tier_header, &principal.tier) {
            head.headers.insert(name, value(tier));
        }
        head.extensions.insert(principal);
    }
}

#[cfg(test)]
mod tests;
