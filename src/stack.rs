//! The table of contents of sidegate: the request path, outermost layer first.
//!
//! Three chains: `front` around all routes, `route` around the upstream of one, `attempt` around one
//! endpoint. A layer that a route does not use is not in its chain.

use std::{
    convert::Infallible,
    fmt, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use pin_project_lite::pin_project;
use tokio::task::JoinSet;
use tower::{Service, ServiceBuilder};

use crate::{
    admin::Admin,
    config::{HumanDuration, Toggle},
    layers::{
        access_log::{AccessLog, AccessLogLayer, ResponseBody},
        auth::AuthLayer,
        body_limit::BodyLimitLayer,
        cache::{CacheLayer, ChangesLayer},
        circuit_breaker::{Breaker, CircuitBreakerLayer},
        concurrency::{ConcurrencyLayer, Limiter, Scope},
        cors::CorsLayer,
        deadline::DeadlineLayer,
        errors::{Errors, ErrorsLayer},
        fallback::{self, FallbackLayer},
        heartbeat::HeartbeatLayer,
        hygiene::{self, Hygiene, HygieneLayer},
        rate_limit::{RateLimitLayer, headers},
        request_id::{RequestIdLayer, RequestIds},
        retry::RetryLayer,
        security_headers::{SecurityHeaders, SecurityHeadersLayer},
        session::SessionLayer,
        sse_error_event::SseErrorEventLayer,
        stream_start::StreamStartLayer,
        timeouts::{ClientBodyIdleLayer, FirstByteLayer, IdleLayer},
    },
    message::{Body, BoxError, Chain, HttpService},
    registry::Registry,
    route::{Routes, Table, Target},
    settings::{Defaults, Route, Settings},
    upstream::{
        Address, Client,
        balance::{Admit, Balance, Balancer, Lane},
        respond::Respond,
    },
};

/// Everything between a client's connection and the upstreams, built from one version of the configuration.
#[derive(Clone)]
pub struct Stack {
    front: Front,
    chores: Arc<Mutex<Chores>>,
}

/// What is done for a configuration beside its requests, for as long as it holds.
#[derive(Default)]
struct Chores {
    /// Until it takes effect.
    waiting: Vec<BoxFuture<'static, ()>>,
    running: JoinSet<()>,
}

type Front = RequestIds<AccessLog<SecurityHeaders<Errors<Hygiene<Routes>>>>>;

impl Stack {
    /// Builds all chains. What lives longer than a configuration (samples, pools) comes from `registry`; the pages that
    /// routes publish are those of `admin`. Needs a tokio runtime.
    ///
    /// # Errors
    /// The first thing that cannot be set up, with its place. Nothing is left out because it could not be
    /// set up. What `registry` was made to hold for it goes with [`Registry::retain`] of the settings that hold.
    pub fn build(settings: &Settings, registry: &Registry, admin: &Admin) -> Result<Self, BuildError> {
        let redis = registry.redis(settings.redis.as_ref());
        let redis = redis.map_err(|error| BuildError { key: "redis".to_owned(), error })?;
        let mut routes = Vec::with_capacity(settings.routes.len());
        let (mut limits, mut chores) = (Vec::new(), Chores::default());
        for (index, own) in settings.routes.iter().enumerate() {
            let place = |key: &str, name: &str, error: BoxError| BuildError {
                key: format!("routes.{index}.{key} ({name})"),
                error,
            };
            let policies = settings.policies(own);
            let upstreams = Upstreams { settings, registry, admin, policies };
            let upstream = upstreams.find(&own.upstream).map_err(|error| place("upstream", &own.upstream, error))?;
            let limit = upstreams.policies.concurrency.as_ref();
            let limit = limit.map(|config| registry.limiter(Scope::Route, &own.name(), config));
            let auth = upstreams.policies.auth.as_ref();
            let auth = auth.map(|config| AuthLayer::build(config, &own.name(), registry.auth(), registry.metrics()));
            let auth = auth.transpose().map_err(|error| place("auth", &own.name(), error))?;
            let session = upstreams.policies.session.as_ref().map(|config| {
                SessionLayer::new(config, &own.name(), registry.sessions(), redis.clone(), registry.metrics())
            });
            let rate_limit = upstreams.policies.rate_limit.as_ref().map(|config| {
                RateLimitLayer::new(config, &own.name(), registry.rate_limits(), redis.as_ref(), registry.metrics())
            });
            let cache = upstreams.policies.cache.as_ref().map(|config| {
                let metrics = registry.metrics();
                let upstream = settings.upstreams.get(&own.upstream);
                let limits = [
                    upstreams.policies.concurrency.as_ref(),
                    upstream.and_then(|upstream| upstream.concurrency.as_ref()),
                ];
                let places = limits.into_iter().flatten().map(|limit| limit.max_in_flight).min();
                CacheLayer::new(config, &own.name(), &own.upstream, registry.caches(), redis.as_ref(), metrics)
                    .beside(places)
            });
            let mut met = settings.caches_met(own).peekable();
            let changes = if cache.is_none() && met.peek().is_some() {
                Some(ChangesLayer::new(registry.caches(), met))
            } else {
                None
            };
            limits.extend(rate_limit.as_ref().map(|layer| layer.gate().clone()));
            let (fallback, upstream) = match upstream {
                Kind::Fixed(respond) => (None, respond),
                Kind::Backend(backend) => {
                    let fallback = upstreams.fallback(own).map_err(|(name, error)| place("fallback", name, error))?;
                    (fallback, backend)
                }
            };
            let asked = asked(&upstreams.policies, limit, fallback, upstream);
            if let Some(cache) = &cache {
                let parameters = |path: &str| own.matches.path.as_ref()?.parameters(path.as_bytes());
                chores.waiting.extend(cache.keep_warm(&asked, parameters));
            }
            let gates = Gates { auth, session, rate_limit, cache, changes };
            let service = route(own, &upstreams.policies, settings, gates, asked);
            let target = Target {
                metrics: registry.metrics().route(&own.name()),
                service,
                preflights: !upstreams.policies.cors.is_off(),
            };
            routes.push((own.matches.clone(), target));
        }
        registry.retain(settings);
        registry.hold_gates(limits);
        let chores = Arc::new(Mutex::new(chores));
        Ok(Self { front: front(settings, registry, Routes::new(Table::new(routes))), chores })
    }

    /// Begins what is done beside requests: the configuration has taken effect. It ends with the last clone of the stack.
    pub fn begin(&self) {
        let mut chores = self.chores.lock();
        for chore in mem::take(&mut chores.waiting) {
            chores.running.spawn(chore);
        }
    }

    /// Answers a request. There is always an answer.
    pub fn call(&self, request: http::Request<Body>) -> Answer {
        // Always ready: see `Routes`.
        Answer { inner: self.front.clone().call(request) }
    }
}

pin_project! {
    /// The answer to come of [`Stack::call`].
    pub struct Answer {
        #[pin]
        inner: <Front as Service<http::Request<Body>>>::Future,
    }
}

impl Future for Answer {
    type Output = http::Response<ResponseBody<Body>>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match ready!(self.project().inner.poll(cx)) {
            Ok(response) => Poll::Ready(response),
            // The errors layer does not fail, and those outside of it add no failure of their own.
            Err(error) => unreachable!("the front failed: {error}"),
        }
    }
}

/// A stack that could not be built.
#[derive(Debug)]
pub struct BuildError {
    key: String,
    error: BoxError,
}

impl fmt::Display for BuildError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: cannot be set up", self.key)
    }
}

impl std::error::Error for BuildError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.error)
    }
}

impl fmt::Debug for Stack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stack").finish_non_exhaustive()
    }
}

/// Around all routes.
fn front(settings: &Settings, registry: &Registry, routes: Routes) -> Front {
    let log = settings.log.access.then(|| registry.log().clone());
    let log = AccessLogLayer::new(log, registry.metrics().clone());
    let sessions = settings.routes.iter().any(|route| !route.policies(&settings.defaults).session.is_off());
    let limits = hygiene::Limits {
        headers: settings.limits.headers as usize,
        header_bytes: settings.limits.header_bytes.get(),
        uri_bytes: settings.limits.uri_bytes.get(),
    };
    ServiceBuilder::new()
        // Outermost, so that whatever happens inside has an id to be named by.
        .layer(RequestIdLayer::new(&settings.request_id))
        // Sees every answer, and the end of every body.
        .layer(if sessions { log.hiding_sessions() } else { log })
        // Outside of errors: sidegate's own answers carry them too.
        .layer(match &settings.defaults.security_headers {
            Toggle::On(config) => SecurityHeadersLayer::new(config),
            Toggle::Off => SecurityHeadersLayer::settling(None),
        })
        // From here inwards a failure is an `Error` and not yet a response.
        .layer(ErrorsLayer::new(settings.defaults.errors))
        // Before anything looks at the request: what is ambiguous goes no further.
        .layer(
            HygieneLayer::new(&settings.hygiene, limits, registry.via())
                .guarding(settings.request_id.header.get().clone()),
        )
        .service(routes)
}

/// What a request has to pass before a route's upstreams are asked, as far as it outlives a configuration.
struct Gates {
    auth: Option<AuthLayer>,
    session: Option<SessionLayer>,
    rate_limit: Option<RateLimitLayer>,
    cache: Option<CacheLayer>,
    changes: Option<ChangesLayer>,
}

/// Around the upstreams of one route, for a request that has passed its gates.
fn asked(
    policies: &Defaults,
    limit: Option<Arc<Limiter>>,
    fallback: Option<FallbackLayer>,
    upstream: HttpService,
) -> HttpService {
    let timeouts = &policies.timeouts;
    let deadline =
        duration(timeouts.total).map(DeadlineLayer::new).map(|layer| layer.with_streams(timeouts.total_streams));
    Chain::new()
        // Whoever waits for a place has not begun yet.
        .option_layer(limit.map(ConcurrencyLayer::new))
        .option_layer(deadline)
        // Inside the deadline, which runs on from one upstream to the next.
        .option_layer(fallback)
        .service(upstream)
}

/// Around that.
fn route(own: &Route, policies: &Defaults, settings: &Settings, gates: Gates, asked: HttpService) -> HttpService {
    let headers = own.security_headers.as_ref().map(|own| SecurityHeadersLayer::settling(own.as_ref()));
    let cors = policies.cors.as_ref().map(|cors| {
        let session = policies.session.as_ref().and_then(|session| session.header.as_ref());
        let told = [settings.request_id.header.get().clone()].into_iter().chain(headers::all());
        let told = told.chain(session.map(|name| name.get().clone()));
        CorsLayer::new(cors, told)
    });
    // Its own form of errors; and what decorates responses must see its errors as responses.
    let decorates = headers.is_some() || cors.is_some();
    let errors = (decorates || policies.errors != settings.defaults.errors).then(|| {
        let never = |never: Infallible| -> BoxError { match never {} };
        ServiceBuilder::new().map_err(never).layer(ErrorsLayer::new(policies.errors))
    });
    let timeouts = &policies.timeouts;
    let heartbeat = duration(timeouts.heartbeat).map(HeartbeatLayer::new);
    let sse_error_event = timeouts.sse_error_event.then(|| SseErrorEventLayer::new(policies.errors.form()));
    let body_limit = policies.body_limit.as_ref().map(|limit| BodyLimitLayer::new(limit.max.get()));
    let client_body = duration(timeouts.client_body_idle).map(ClientBodyIdleLayer::new);
    Chain::new()
        .option_layer(headers)
        // Preflights are answered here, before anything costs.
        .option_layer(cors)
        .option_layer(errors)
        // Before anything is done or counted for whoever it is.
        .option_layer(gates.auth)
        // Whose session it is, is known.
        .option_layer(gates.session)
        .option_layer(heartbeat)
        .option_layer(sse_error_event)
        .option_layer(body_limit)
        .option_layer(client_body)
        // Knows who asks, and what for; what waits or is tried again has been counted once.
        .option_layer(gates.rate_limit)
        // What has been answered once needs no place, and no upstream.
        .option_layer(gates.cache)
        // What it changes, others may have kept.
        .option_layer(gates.changes)
        .service(asked)
}

/// The upstreams, as the policies of one route have them.
struct Upstreams<'a> {
    settings: &'a Settings,
    registry: &'a Registry,
    admin: &'a Admin,
    policies: Defaults,
}

/// An upstream, by what it is.
enum Kind {
    /// Requests are sent to it.
    Backend(HttpService),
    /// It answers by itself.
    Fixed(HttpService),
}

impl Upstreams<'_> {
    fn find(&self, name: &str) -> Result<Kind, BoxError> {
        let upstream = self.settings.upstreams.get(name).ok_or("there is none")?;
        match (&upstream.endpoints, &upstream.respond, &upstream.admin) {
            (Some(endpoints), ..) => {
                let retry = self.policies.retry.as_ref().map(|config| {
                    RetryLayer::new(config, self.registry.budget(name), self.registry.metrics().retries(name))
                });
                let limit = upstream
                    .concurrency
                    .as_ref()
                    .map(|config| ConcurrencyLayer::new(self.registry.limiter(Scope::Upstream, name, config)));
                let breaker = self.registry.breakers_of(name, upstream);
                let endpoints = match &*endpoints.0 {
                    [only] if !self.registry.is_balanced(name, upstream) => {
                        let client = self.registry.client(name, upstream, &only.url)?;
                        attempt(&self.policies, client, breaker(&only.url))
                    }
                    _ => HttpService::new(balance(&self.policies, self.registry.balancer(name, upstream)?, breaker)),
                };
                // Outside of retries: who is tried again keeps the place.
                Ok(Kind::Backend(Chain::new().option_layer(limit).option_layer(retry).service(endpoints)))
            }
            (None, Some(respond), _) => Ok(Kind::Fixed(HttpService::new(Respond::new(name.into(), respond)))),
            (None, None, Some(page)) => Ok(Kind::Fixed(HttpService::new(self.admin.publish(name, page)))),
            (None, None, None) => Err("it is of no kind".into()),
        }
    }

    /// Those after the upstream of `route`.
    fn fallback(&self, route: &Route) -> Result<Option<FallbackLayer>, (&str, BoxError)> {
        let Some(config) = self.policies.fallback.as_ref() else { return Ok(None) };
        let target = |entry: &fallback::Entry| match self.find(&entry.upstream)? {
            Kind::Fixed(respond) => Ok(fallback::Target::fixed(entry, respond)),
            Kind::Backend(backend) => fallback::Target::new(entry, backend),
        };
        let targets = config.to.iter().map(|entry| target(entry).map_err(|error| (&*entry.upstream, error)));
        let targets = targets.collect::<Result<_, _>>()?;
        let replay = config.replay.to_usize();
        Ok(Some(FallbackLayer::new(&route.name(), &route.upstream, targets, replay, self.registry.metrics())))
    }
}

/// Over the endpoints of one upstream.
fn balance(
    policies: &Defaults,
    balancer: Arc<Balancer>,
    breaker: impl Fn(&Address) -> Option<Arc<Breaker>> + Send + Sync + 'static,
) -> Balance {
    let policies = policies.clone();
    Balance::new(balancer, move |member| {
        let breaker = breaker(&member.address);
        Lane {
            service: attempt(&policies, member.client.clone(), breaker.clone()),
            admit: breaker.map(|breaker| -> Arc<dyn Admit> { breaker }),
        }
    })
}

/// Around one endpoint.
fn attempt(policies: &Defaults, client: Client, breaker: Option<Arc<Breaker>>) -> HttpService {
    let timeouts = &policies.timeouts;
    let mends = !policies.retry.is_off() || !policies.fallback.is_off();
    // Each request has these: they are one service.
    let client = ServiceBuilder::new()
        .map_response(|response: http::Response<_>| response.map(Body::new))
        .option_layer(duration(timeouts.first_byte).map(FirstByteLayer::new))
        .layer(IdleLayer::new(duration(timeouts.idle)))
        .service(client.with_connect_timeout(timeouts.connect.get()));
    Chain::new()
        // Outside of what turns silence and broken streams into failures: it counts them.
        .option_layer(breaker.map(CircuitBreakerLayer::new))
        // Where a failure can still be mended, a stream has not answered before it says something.
        .option_layer(mends.then(|| StreamStartLayer::new(duration(timeouts.first_byte))))
        .service(HttpService::new(client))
}

fn duration(toggle: Toggle<HumanDuration>) -> Option<Duration> {
    toggle.on().map(HumanDuration::get)
}
