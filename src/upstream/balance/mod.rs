//! Balancing: row 18 of the request path. Picks one of an upstream's endpoints for each attempt.
//!
//! | in this order | |
//! |---|---|
//! | drained, weight 0 | never picked |
//! | not healthy | not picked, unless less than `panic_threshold` percent are healthy: then health is not looked at |
//! | circuit breaker open | not picked; where all are, 503 `circuit-open` with the time of the first to be tried again |
//! | tried for this request | picked where nothing else is left |
//! | what remains | by `algorithm`, weights and slow start |
//!
//! The pick takes the breaker's permit: where the breaker opens, or its last permit goes to somebody else, in between,
//! another endpoint is picked.
//!
//! `hash` (a ketama ring) is that of `pingora-load-balancing`, asked by its `select_with`. Its `Backend` is an IP address,
//! which a Unix socket and a name are not: each endpoint stands there under an address made of the hash of its name, so
//! that every replica has the same ring, and it stays when the list is written in another order. Where an
//! endpoint that has most of the ring is out, keys go by rendezvous hashing instead, each to the same one of the others.
//!
//! `round_robin` and `random` are sidegate's own: pingora's forget the weights as soon as their first choice is out.
//! `least_requests` and `peak_ewma` choose between two at random by what they know of them; pingora has neither. Nor has
//! it slow start or panic, its health begins anew when a weight changes, and its discovery keeps no failures:
//! membership, health and the tasks that look after them are sidegate's own, kept under the name of an endpoint.
//!
//! A request is in flight until its response's body has ended or was dropped; a tunnel until its head.

pub mod choice;
pub mod config;
mod endpoint;
mod upkeep;

use std::{
    borrow::Cow,
    collections::{BTreeSet, HashMap},
    fmt,
    net::{Ipv6Addr, SocketAddr},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt;
use http::{Extensions, StatusCode, header::COOKIE};
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use pin_project_lite::pin_project;
use pingora_load_balancing::{Backend, Backends, LoadBalancer, discovery::Static, selection::Consistent};
use tokio::time::Instant;
use tower::{
    Service,
    util::rng::{HasherRng, Rng},
};

pub use self::{
    config::{Algorithm, Config, Entry, HashKey},
    endpoint::{Endpoint, InFlight},
    upkeep::{Lookup, Resolve, Roster, Upkeep, system},
};
use super::{Address, Client, health};
use crate::{
    message::{self, Body, BoxError, Error, HttpService, Kind, Request, Response, Tried},
    telemetry::{Exchange, Metrics, exchange, metrics::PickMetrics},
};

/// Whether an endpoint may be asked: what a circuit breaker, a floor above, says.
pub trait Admit: Send + Sync {
    /// Whether a request would be let through now. Another may be first.
    fn admits(&self) -> bool;
    /// Lets a request through now, if it can, and leaves in its `extensions` that it has: for the layer around the
    /// endpoint, which lets it pass by that.
    fn admit(self: Arc<Self>, extensions: &mut Extensions) -> bool;
    /// When to come again; nothing where that is not known.
    fn retry_after(&self) -> Option<Duration>;
}

/// An endpoint, with its share and its client.
#[derive(Clone)]
pub struct Member {
    /// What is known of it.
    pub endpoint: Arc<Endpoint>,
    /// Its share, next to those of the others.
    pub weight: u32,
    /// The address that it is known by.
    pub address: Address,
    /// The entry of the configuration that it comes from: a name, where the address is one of those that it stands for.
    pub origin: Address,
    /// That address.
    pub dial: Option<SocketAddr>,
    /// What asks it.
    pub client: Client,
}

impl fmt::Debug for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Member").field("endpoint", &self.endpoint).field("weight", &self.weight).finish_non_exhaustive()
    }
}

/// The endpoints of an upstream, shared by all routes to it.
pub struct Balancer {
    upstream: Arc<str>,
    config: Config,
    passive: Option<health::Passive>,
    /// The statuses that are failures: those of passive health, which has the breaker's defaults.
    failure_status: BTreeSet<u16>,
    members: ArcSwap<Members>,
    metrics: PickMetrics,
}

impl fmt::Debug for Balancer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Balancer").field("upstream", &self.upstream).finish_non_exhaustive()
    }
}

/// Who there is at one time.
struct Members {
    list: Vec<Member>,
    /// What each of `list` is owed: see [`choice::in_turn`].
    owed: Mutex<Vec<f64>>,
    /// Where keys are looked up, with `hash`.
    ring: Option<Ring>,
}

/// A ketama ring.
struct Ring {
    points: LoadBalancer<Consistent>,
    /// Places in the list of members, by the addresses that the ring knows.
    places: HashMap<SocketAddr, usize>,
}

impl Members {
    fn new(list: Vec<Member>, algorithm: Algorithm) -> Self {
        let ring = (algorithm == Algorithm::Hash).then(|| Ring::new(&list)).flatten();
        Self { owed: Mutex::new(vec![0.0; list.len()]), list, ring }
    }
}

impl Ring {
    /// None where all weigh nothing.
    fn new(list: &[Member]) -> Option<Self> {
        let mut places = HashMap::new();
        let mut backends = BTreeSet::new();
        for (place, member) in list.iter().enumerate().filter(|(_, member)| member.weight > 0) {
            let address = stand_in(member.endpoint.name());
            // An address that was written is one that is read.
            if let Ok(backend) = Backend::new_with_weight(&address.to_string(), member.weight as usize) {
                places.insert(address, place);
                backends.insert(backend);
            }
        }
        if backends.is_empty() {
            return None;
        }
        let points = LoadBalancer::from_backends(Backends::new(Static::new(backends)));
        // A list that is there already is taken over at once, and cannot fail.
        drop(points.update().now_or_never());
        Some(Self { points, places })
    }

    /// The first of `left` from where `key` is. Each is passed over as often as it lacks of its `share`.
    fn find(&self, key: &[u8], left: &[usize], share: impl Fn(usize) -> f64) -> Option<usize> {
        /// A ring has 160 points for each unit of weight, and where much of it is out it is not worth walking on.
        const STEPS: usize = 256;
        let place = |backend: &Backend| self.places.get(backend.as_inet()?).copied();
        let accept = |backend: &Backend, _| {
            let Some(place) = place(backend).filter(|place| left.contains(place)) else { return false };
            let share = share(place);
            share >= 1.0 || HasherRng::new().next_f64() < share
        };
        let found = self.points.select_with(key, STEPS, accept)?;
        place(&found)
    }
}

/// The address that the ring knows an endpoint by: the hash of its name, the same everywhere.
fn stand_in(name: &str) -> SocketAddr {
    SocketAddr::from((Ipv6Addr::from_bits(choice::fnv(name.as_bytes())), 1))
}

impl Balancer {
    /// Balances over `members` as `config` says.
    #[must_use]
    pub fn new(
        upstream: &str,
        config: Config,
        passive: Option<health::Passive>,
        members: Vec<Member>,
        metrics: &Metrics,
    ) -> Self {
        Self {
            upstream: upstream.into(),
            members: ArcSwap::from_pointee(Members::new(members, config.algorithm)),
            config,
            failure_status: passive.clone().unwrap_or_default().failure_status,
            passive,
            metrics: metrics.picks(upstream),
        }
    }

    /// The settings.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The endpoints.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.members.load().list.clone()
    }

    /// Goes on with other endpoints.
    pub fn replace(&self, members: Vec<Member>) {
        self.members.store(Arc::new(Members::new(members, self.config.algorithm)));
    }

    /// The weight of `member` now.
    #[must_use]
    pub fn effective_weight(&self, member: &Member, now: Instant) -> f64 {
        f64::from(member.weight) * self.share(member, now)
    }

    /// The share of its weight that `member` has now.
    fn share(&self, member: &Member, now: Instant) -> f64 {
        self.config.slow_start.on().map_or(1.0, |window| member.endpoint.share(window.get(), now))
    }

    /// Picks one of `lanes` for `request`, and gets it past the breaker there.
    fn pick(&self, lanes: &Lanes, request: &mut Request, now: Instant) -> Result<usize, Error> {
        let list = &lanes.members.list;
        let all = || (0..list.len()).filter(|n| list[*n].weight > 0 && !list[*n].endpoint.is_drained());
        let mut left: Vec<usize> = all().filter(|n| list[*n].endpoint.is_healthy(now)).collect();
        let total = all().count();
        let panics = left.len() * 100 < total * usize::from(self.config.panic_threshold);
        if panics {
            left = all().collect();
        }
        if left.is_empty() {
            self.metrics.none.inc();
            return Err(Kind::NoHealthyEndpoint.into());
        }
        let mut after: Option<Duration> = None;
        let mut refused = |admit: &dyn Admit| after = admit.retry_after().into_iter().chain(after).min();
        left.retain(|n| match &lanes.lanes[*n].admit {
            Some(admit) if !admit.admits() => {
                refused(&**admit);
                false
            }
            _ => true,
        });
        let tried = request.extensions().get::<Tried>().filter(|tried| !tried.is_empty()).cloned();
        // One endpoint less each time.
        while !left.is_empty() {
            let untried = tried.as_ref().map(|tried| {
                let untried = left.iter().filter(|n| !tried.contains(list[**n].endpoint.name()));
                untried.copied().collect::<Vec<_>>()
            });
            let place = match untried.as_ref().filter(|untried| !untried.is_empty()).unwrap_or(&left).as_slice() {
                [only] => *only,
                among => self.choose(&lanes.members, among, request, now),
            };
            match &lanes.lanes[place].admit {
                // It opened, or others took its permits, since it was looked at.
                Some(admit) if !admit.clone().admit(request.extensions_mut()) => {
                    refused(&**admit);
                    left.retain(|n| *n != place);
                }
                _ => {
                    if panics {
                        self.metrics.panic.inc()
                    } else {
                        self.metrics.picked.inc()
                    };
                    return Ok(place);
                }
            }
        }
        self.metrics.circuit_open.inc();
        let refused = Error::from(Kind::CircuitOpen);
        Err(match after {
            Some(after) => refused.with_retry_after(after),
            None => refused,
        })
    }

    /// One of `left`, by the algorithm.
    fn choose(&self, members: &Members, left: &[usize], request: &Request, now: Instant) -> usize {
        let mut dice = HasherRng::new();
        let mut random = || dice.next_f64();
        let mut weights: Vec<_> = left.iter().map(|n| self.effective_weight(&members.list[*n], now)).collect();
        match self.config.algorithm {
            Algorithm::RoundRobin => left[choice::in_turn(&mut members.owed.lock(), left, &weights)],
            Algorithm::Random => left[choice::draw(&weights, random())],
            Algorithm::LeastRequests | Algorithm::PeakEwma => {
                if self.config.algorithm == Algorithm::PeakEwma && random() < choice::SAMPLED {
                    let place = left[choice::draw(&weights, random())];
                    if members.list[place].endpoint.is_unheard(now) {
                        return place;
                    }
                }
                let mean = weights.iter().sum::<f64>() / weights.iter().map(|_| 1.0).sum::<f64>();
                let load = |place: usize| self.load(&members.list[left[place]], mean, now);
                left[choice::of_two(&mut weights, random, load)]
            }
            Algorithm::Hash => {
                let Some(key) = self.config.hash.as_ref().and_then(|key| value(key, request)) else {
                    return left[choice::draw(&weights, random())];
                };
                let share = |place: usize| self.share(&members.list[place], now);
                let found = members.ring.as_ref().and_then(|ring| ring.find(&key, left, share));
                // Where the ring has not come by one of those that are left, because one that is out has most of it.
                let named = left.iter().map(|n| (&**members.list[*n].endpoint.name(), members.list[*n].weight));
                found.unwrap_or_else(|| left[choice::by_key(&key, named)])
            }
        }
    }

    /// How busy `member` is, next to others that weigh `mean` on average.
    fn load(&self, member: &Member, mean: f64, now: Instant) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "nobody has 2^52 requests in flight")]
        let in_flight = member.endpoint.in_flight() as f64;
        let share = self.effective_weight(member, now).max(f64::MIN_POSITIVE) / mean;
        match self.config.algorithm {
            Algorithm::PeakEwma => choice::wait(in_flight, share, member.endpoint.latency().seconds(now)),
            _ => in_flight / share,
        }
    }

    /// Notes what a response's head, after so long, says of the times of `endpoint`.
    fn answered(&self, endpoint: &Endpoint, status: StatusCode, took: Duration, now: Instant) {
        if status.as_u16() < 400 {
            endpoint.latency().observe(took, now);
        } else if status == StatusCode::TOO_MANY_REQUESTS || self.failure_status.contains(&status.as_u16()) {
            let usual = self.usual();
            endpoint.latency().fail(took, usual, now);
        } else if status.is_server_error() {
            // The application's answer, as good as any other, and no faster: else it would attract the traffic.
            let usual = Duration::from_secs_f64(self.usual());
            endpoint.latency().observe(took.max(usual), now);
        } else {
            endpoint.latency().observe(took, now);
        }
    }

    /// What responses usually take, over all endpoints, in seconds.
    fn usual(&self) -> f64 {
        let members = self.members.load();
        let known = members.list.iter().filter_map(|member| member.endpoint.latency().usual());
        let (count, sum) = known.fold((0.0, 0.0), |(count, sum), one| (count + 1.0, sum + one));
        sum / f64::max(count, 1.0)
    }

    /// Notes that a request was served whole.
    fn served(&self, endpoint: &Endpoint) {
        // Most often there is nothing to forget, and no lock is worth it.
        if self.passive.is_some() && endpoint.health().has_failed() {
            endpoint.change(|health, _| {
                health.served();
                None
            });
        }
    }

    /// Notes that a request failed by the endpoint's fault.
    fn failed(&self, endpoint: &Endpoint) {
        let Some(passive) = &self.passive else { return };
        let now = Instant::now();
        let members = self.members.load();
        let others = || members.list.iter().filter(|member| member.weight > 0 && !member.endpoint.is_drained());
        let healthy = others().filter(|member| member.endpoint.is_healthy(now)).count();
        // Nobody is ejected into a panic, nor the last one out of it.
        let floor = (others().count() * usize::from(self.config.panic_threshold)).div_ceil(100).max(1);
        endpoint.change(|health, now| health.failed(passive, healthy > floor, now));
    }
}

/// What a hash goes by in `request`; nothing where that is not there.
fn value<'a>(key: &HashKey, request: &'a Request) -> Option<Cow<'a, [u8]>> {
    match key {
        HashKey::Ip => {
            let ip = exchange::client_ip(request.extensions())?;
            Some(Cow::Owned(ip.to_string().into_bytes()))
        }
        HashKey::Path => Some(Cow::Borrowed(request.uri().path().as_bytes())),
        HashKey::Header(name) => request.headers().get(name).map(|value| Cow::Borrowed(value.as_bytes())),
        HashKey::Query(name) => {
            let mut parameters = request.uri().query()?.split('&');
            let found = parameters.find_map(|pair| pair.split_once('=').filter(|(key, _)| key == name));
            found.map(|(_, value)| Cow::Borrowed(value.as_bytes()))
        }
        HashKey::Cookie(name) => {
            let mut cookies = request
                .headers()
                .get_all(COOKIE)
                .iter()
                .flat_map(|field| field.as_bytes().split(|byte| *byte == b';'))
                .map(<[u8]>::trim_ascii);
            cookies.find_map(|cookie| cookie.strip_prefix(name.as_bytes())?.strip_prefix(b"=").map(Cow::Borrowed))
        }
    }
}

/// The way to one endpoint: the layers around it, and what may close it.
pub struct Lane {
    /// What is asked.
    pub service: HttpService,
    /// Its circuit breaker, if it has one.
    pub admit: Option<Arc<dyn Admit>>,
}

/// The ways to the endpoints that there are at one time.
struct Lanes {
    members: Arc<Members>,
    lanes: Vec<Lane>,
}

/// Sends each request to one of an upstream's endpoints: see the [module](self). Cheap to clone.
///
/// # Errors
/// [`Kind::NoHealthyEndpoint`], 503, where none may be asked; [`Kind::CircuitOpen`], 503, where breakers are the reason.
#[derive(Clone)]
pub struct Balance(Arc<Shared>);

struct Shared {
    balancer: Arc<Balancer>,
    make: Box<dyn Fn(&Member) -> Lane + Send + Sync>,
    lanes: ArcSwap<Lanes>,
}

impl fmt::Debug for Balance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Balance").field(&self.0.balancer).finish()
    }
}

impl Balance {
    /// Over the endpoints of `balancer`, each behind what `make` makes for it.
    pub fn new(balancer: Arc<Balancer>, make: impl Fn(&Member) -> Lane + Send + Sync + 'static) -> Self {
        let lanes = ArcSwap::from_pointee(Lanes::new(balancer.members.load_full(), &make));
        Self(Arc::new(Shared { balancer, make: Box::new(make), lanes }))
    }
}

impl Lanes {
    fn new(members: Arc<Members>, make: impl Fn(&Member) -> Lane) -> Self {
        Self { lanes: members.list.iter().map(make).collect(), members }
    }
}

impl Service<Request> for Balance {
    type Response = Response;
    type Error = BoxError;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request) -> ResponseFuture {
        let Shared { balancer, make, lanes } = &*self.0;
        let mut ways = lanes.load();
        let members = balancer.members.load();
        if !Arc::ptr_eq(&ways.members, &members) {
            lanes.store(Arc::new(Lanes::new(Arc::clone(&members), make)));
            ways = lanes.load();
        }
        let begun = Instant::now();
        let place = match balancer.pick(&ways, &mut request, begun) {
            Ok(place) => place,
            Err(refused) => {
                if let Some(exchange) = Exchange::of(&request) {
                    exchange.facts().upstream = Some(balancer.upstream.clone());
                }
                return ResponseFuture(Err(Some(refused)));
            }
        };
        let endpoint = &ways.members.list[place].endpoint;
        let held = endpoint.enter();
        if let Some(tried) = request.extensions().get::<Tried>() {
            tried.add(endpoint.name());
        }
        let upload = Exchange::of_upload(&request);
        let inner = ways.lanes[place].service.clone().call(request);
        ResponseFuture(Ok(Asked { inner, held: Some(held), balancer: balancer.clone(), begun, upload }))
    }
}

/// The response of [`Balance`], or why there is none.
pub struct ResponseFuture(Result<Asked, Option<Error>>);

struct Asked {
    inner: message::ResponseFuture,
    held: Option<InFlight>,
    balancer: Arc<Balancer>,
    begun: Instant,
    /// Knows when the request's body ended.
    upload: Option<Exchange>,
}

impl Drop for Asked {
    /// Where it is given up before there is an answer, because a client lost patience or a deadline came, an answer would
    /// have taken longer still: an endpoint that hangs must not look as fast as it was. It is not blamed. Whoever had yet to
    /// send more of its request has not waited for the endpoint.
    fn drop(&mut self) {
        let Some(held) = &self.held else { return };
        let now = Instant::now();
        if self.upload.as_ref().is_none_or(|upload| !upload.awaits_client(now)) {
            let waited = now.saturating_duration_since(Exchange::waiting_since(self.upload.as_ref(), self.begun));
            held.endpoint().latency().outlast(waited, now);
        }
    }
}

impl fmt::Debug for ResponseFuture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ResponseFuture").finish_non_exhaustive()
    }
}

impl Future for ResponseFuture {
    type Output = Result<Response, BoxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let asked = match &mut self.0 {
            Ok(asked) => asked,
            Err(refused) => {
                let refused = refused.take().unwrap_or_else(|| Kind::NoHealthyEndpoint.into());
                return Poll::Ready(Err(refused.into()));
            }
        };
        let result = ready!(asked.inner.as_mut().poll(cx));
        let Some(held) = asked.held.take() else { return Poll::Ready(result) };
        let now = Instant::now();
        let took = now.saturating_duration_since(Exchange::waiting_since(asked.upload.as_ref(), asked.begun));
        let balancer = &asked.balancer;
        let response = match result {
            Ok(response) => response,
            Err(error) => {
                if Error::blames_endpoint(&*error) {
                    let usual = balancer.usual();
                    held.endpoint().latency().fail(took, usual, now);
                    balancer.failed(held.endpoint());
                }
                return Poll::Ready(Err(error));
            }
        };
        let status = response.status();
        balancer.answered(held.endpoint(), status, took, now);
        let failed = balancer.passive.as_ref().is_some_and(|passive| passive.is_failure(status));
        if failed {
            balancer.failed(held.endpoint());
        }
        if response.body().is_end_stream() {
            if !failed {
                balancer.served(held.endpoint());
            }
            return Poll::Ready(Ok(response));
        }
        let judge = (!failed).then(|| balancer.clone());
        Poll::Ready(Ok(response.map(|body| Body::new(ResponseBody { body, held: Some(held), judge }))))
    }
}

pin_project! {
    /// A response's body, which is in flight until its end.
    struct ResponseBody {
        #[pin]
        body: Body,
        held: Option<InFlight>,
        // Present until its request is known to have been served, or not.
        judge: Option<Arc<Balancer>>,
    }
}

impl HttpBody for ResponseBody {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let mut this = self.project();
        let frame = ready!(this.body.as_mut().poll_frame(cx));
        let (over, error) = match &frame {
            // Who has the last byte does not ask again.
            Some(Ok(_)) => (this.body.is_end_stream(), None),
            Some(Err(error)) => (true, Some(&**error)),
            None => (true, None),
        };
        if over && let (Some(held), judge) = (this.held.take(), this.judge.take()) {
            match (judge, error) {
                (Some(balancer), Some(error)) if Error::blames_endpoint(error) => balancer.failed(held.endpoint()),
                (Some(balancer), None) => balancer.served(held.endpoint()),
                _ => {}
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;
