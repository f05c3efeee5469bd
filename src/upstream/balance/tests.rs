use std::{convert::Infallible, num::NonZeroU32};

use http_body_util::BodyExt;
use parking_lot::Mutex;
use proptest::{collection::vec, prelude::*};
use tokio::time::advance;
use tower::service_fn;

use super::*;
use crate::config::units::{HumanDuration, Toggle};

/// What an endpoint does with a request.
#[derive(Debug, Clone, Copy)]
enum Does {
    Answer(u16),
    /// As the path says.
    AsAsked,
    /// The first endpoint answers so, all others 200.
    First(u16),
    Stream,
    BreakOff,
    Fail,
    Hang,
}

/// Whether it admits when it is looked at, and when it comes to it.
struct Gate(bool, bool);

impl Admit for Gate {
    fn admits(&self) -> bool {
        self.0
    }

    fn admit(self: Arc<Self>, _: &mut Extensions) -> bool {
        self.1
    }

    fn retry_after(&self) -> Option<Duration> {
        Some(Duration::from_secs(7))
    }
}

fn members(metrics: &Metrics, weights: &[u32]) -> Vec<Member> {
    let member = |(n, weight): (usize, &u32)| {
        let address: Address = format!("http://10.0.0.{}:80", n + 1).parse().unwrap();
        let client = Client::new("api", &address, &super::super::client::Config::default(), metrics).unwrap();
        let endpoint = Arc::new(Endpoint::new("api", &address.to_string(), false, metrics));
        Member { endpoint, weight: *weight, origin: address.clone(), address, dial: None, client }
    };
    weights.iter().enumerate().map(member).collect()
}

struct Scene {
    balance: Balance,
    members: Vec<Member>,
    asked: Arc<Mutex<Vec<String>>>,
}

impl Scene {
    fn new(config: Config, passive: Option<health::Passive>, weights: &[u32], does: Does) -> Self {
        Self::gated(config, passive, weights, does, |_| (true, true))
    }

    fn gated(
        config: Config,
        passive: Option<health::Passive>,
        weights: &[u32],
        does: Does,
        open: impl Fn(&str) -> (bool, bool) + Send + Sync + 'static,
    ) -> Self {
        let metrics = Metrics::new();
        let members = members(&metrics, weights);
        let balancer = Arc::new(Balancer::new("api", config, passive, members.clone(), &metrics));
        let asked = Arc::new(Mutex::new(Vec::new()));
        let noted = asked.clone();
        let balance = Balance::new(balancer, move |member| {
            let (name, noted) = (member.endpoint.name().to_string(), noted.clone());
            let (looks, is) = open(&name);
            let admit: Option<Arc<dyn Admit>> = Some(Arc::new(Gate(looks, is)));
            let service = service_fn(move |request: Request| {
                noted.lock().push(name.clone());
                respond(match does {
                    Does::AsAsked => Does::Answer(request.uri().path().trim_start_matches('/').parse().unwrap()),
                    Does::First(code) => Does::Answer(if name.contains("10.0.0.1:") { code } else { 200 }),
                    does => does,
                })
            });
            Lane { service: HttpService::new(service), admit }
        });
        Self { balance, members, asked }
    }

    async fn ask(&self, request: Request) -> Result<Response, BoxError> {
        self.balance.clone().call(request).await
    }

    /// Asks `n` times, one after the other, and counts what each endpoint got.
    async fn counts(&self, n: usize) -> Vec<usize> {
        for _ in 0..n {
            drop(self.ask(get("/")).await);
        }
        let asked = self.asked.lock();
        let count = |member: &Member| asked.iter().filter(|name| ***name == **member.endpoint.name()).count();
        self.members.iter().map(count).collect()
    }
}

async fn respond(does: Does) -> Result<Response, BoxError> {
    let status = |status| http::Response::builder().status(status);
    match does {
        Does::Answer(code) | Does::First(code) => Ok(status(code).body(Body::empty())?),
        Does::Stream => {
            Ok(status(200).body(Body::new(http_body_util::StreamBody::new(futures_util::stream::iter([
                Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"a"))),
                Ok(Frame::data(Bytes::from_static(b"b"))),
            ]))))?)
        }
        Does::BreakOff => {
            let frames = futures_util::stream::iter([Err::<Frame<Bytes>, _>(Error::from(Kind::UpstreamReset))]);
            Ok(status(200).body(Body::new(http_body_util::StreamBody::new(frames)))?)
        }
        Does::Fail => Err(Error::from(Kind::ConnectFailed).into()),
        Does::Hang | Does::AsAsked => std::future::pending().await,
    }
}

fn get(path: &str) -> Request {
    http::Request::get(path).body(Body::empty()).unwrap()
}

fn config(algorithm: Algorithm) -> Config {
    Config { algorithm, ..Config::default() }
}

fn kind(result: Result<Response, BoxError>) -> Kind {
    Error::find(&*result.unwrap_err()).unwrap().kind()
}

#[tokio::test(start_paused = true)]
async fn each_algorithm_shares_by_weight() {
    for algorithm in [Algorithm::RoundRobin, Algorithm::Random, Algorithm::LeastRequests, Algorithm::PeakEwma] {
        let scene = Scene::new(config(algorithm), None, &[3, 1, 0], Does::Answer(200));
        let counts = scene.counts(1000).await;
        assert!((650..=850).contains(&counts[0]), "{algorithm:?}: {counts:?}");
        assert_eq!((counts[0] + counts[1], counts[2]), (1000, 0), "{algorithm:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn weights_hold_among_those_that_are_left() {
    for algorithm in [Algorithm::RoundRobin, Algorithm::Random, Algorithm::LeastRequests, Algorithm::PeakEwma] {
        let scene = Scene::new(config(algorithm), None, &[10, 80, 1], Does::Answer(200));
        drop(scene.counts(100).await);
        scene.members[1].endpoint.drain(true);
        let before = scene.counts(0).await;
        let after = scene.counts(1100).await;
        let light = after[2] - before[2];
        assert_eq!(after[1], before[1], "{algorithm:?}");
        assert!((50..=150).contains(&light), "{algorithm:?}: {light} of 1100 at a weight of 1 of 11");
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_in_flight_counts_whatever_the_unit_of_the_weights() {
    for algorithm in [Algorithm::LeastRequests, Algorithm::PeakEwma] {
        for weight in [1, 10, 100, 1000] {
            let scene = Scene::new(config(algorithm), None, &[weight, weight], Does::Answer(200));
            let _streams = [scene.members[0].endpoint.enter(), scene.members[0].endpoint.enter()];
            assert_eq!(scene.counts(100).await, [0, 100], "{algorithm:?} at weights of {weight}");
        }
    }
}

/// Asks for `path`, 50 times a second.
async fn ask_for(scene: &Scene, path: &str, seconds: u32) -> Vec<String> {
    let before = scene.asked.lock().len();
    for _ in 0..50 * seconds {
        drop(scene.ask(get(path)).await);
        advance(Duration::from_millis(20)).await;
    }
    scene.asked.lock()[before..].to_vec()
}

#[tokio::test(start_paused = true)]
async fn one_failure_does_not_take_an_endpoint_out_for_long() {
    for (status, pause) in [("/500", 0), ("/429", 20), ("/503", 20)] {
        let scene = Scene::new(config(Algorithm::PeakEwma), None, &[1, 1], Does::AsAsked);
        ask_for(&scene, "/200", 10).await;
        drop(scene.ask(get(status)).await);
        let failed = scene.asked.lock().last().unwrap().clone();
        ask_for(&scene, "/200", pause).await;
        let after = ask_for(&scene, "/200", 10).await;
        let share = after.iter().filter(|name| **name == failed).count();
        assert!((150..=350).contains(&share), "{status}: {share} of 500");
    }
}

#[tokio::test(start_paused = true)]
async fn who_fails_fast_is_not_taken_for_fast() {
    for (status, share) in [(429, 0..=60), (503, 0..=60), (500, 1..=600)] {
        let scene = Scene::new(config(Algorithm::PeakEwma), None, &[1, 1], Does::First(status));
        scene.members[1].endpoint.latency().observe(Duration::from_millis(800), Instant::now());
        let asked = ask_for(&scene, "/", 20).await;
        let first = asked.iter().filter(|name| name.contains("10.0.0.1:")).count();
        assert!(share.contains(&first), "{status}: {first} of 1000");
    }
}

#[tokio::test(start_paused = true)]
async fn whom_clients_leave_before_it_answers_is_taken_for_slow() {
    let scene = Scene::new(config(Algorithm::PeakEwma), None, &[1], Does::Hang);
    let endpoint = &scene.members[0].endpoint;
    let latency = || endpoint.latency().seconds(Instant::now());
    let usual = latency();
    let leave = async |request: Request, after| drop(tokio::time::timeout(after, scene.ask(request)).await);
    leave(get("/"), Duration::from_millis(1)).await;
    assert!(latency() <= usual, "who leaves at once has not waited");
    leave(get("/"), Duration::from_millis(200)).await;
    assert!(latency() > 0.19, "{}", latency());

    let upload = |all: bool| {
        let mut request = http::Request::post("/").body(Body::new(Never)).unwrap();
        let exchange = Exchange::new(&request);
        exchange.await_client(!all);
        request.extensions_mut().insert(exchange);
        request
    };
    leave(upload(false), Duration::from_secs(3)).await;
    assert!(latency() < 0.2, "whose request was not there has not waited for an answer");
    leave(upload(true), Duration::from_secs(3)).await;
    assert!(latency() > 2.9, "{}", latency());
    assert_eq!((endpoint.in_flight(), endpoint.is_healthy(Instant::now())), (0, true));
}

/// The body of an upload that takes its time.
struct Never;

impl HttpBody for Never {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Pending
    }
}

#[tokio::test]
async fn a_key_stays_where_it_is_when_another_endpoint_goes() {
    let hash = Config { algorithm: Algorithm::Hash, hash: Some(HashKey::Path), ..Config::default() };
    let scene = Scene::new(hash, None, &[1, 1, 1], Does::Answer(200));
    let paths: Vec<_> = (0..60).map(|n| format!("/{n}")).collect();
    let mut homes = Vec::new();
    for path in &paths {
        for _ in 0..3 {
            scene.ask(get(path)).await.unwrap();
        }
        let asked = std::mem::take(&mut *scene.asked.lock());
        assert!(asked.iter().all(|name| *name == asked[0]), "{path}: {asked:?}");
        homes.push(asked[0].clone());
    }
    let gone = &scene.members[1].endpoint;
    assert!(homes.iter().any(|home| **home == **gone.name()), "each has some");
    gone.drain(true);
    for (path, home) in paths.iter().zip(&homes).filter(|(_, home)| ***home != **gone.name()) {
        scene.ask(get(path)).await.unwrap();
        assert_eq!(scene.asked.lock().pop().as_ref(), Some(home));
    }
}

#[tokio::test]
async fn a_key_stays_where_it_is_while_a_heavy_endpoint_is_out() {
    let hash = Config { algorithm: Algorithm::Hash, hash: Some(HashKey::Path), ..Config::default() };
    let scene = Scene::new(hash, None, &[1000, 1, 1], Does::Answer(200));
    scene.members[0].endpoint.drain(true);
    for n in 0..300 {
        for _ in 0..2 {
            scene.ask(get(&format!("/{n}"))).await.unwrap();
        }
    }
    let asked = scene.asked.lock();
    assert!(asked.chunks(2).all(|pair| pair[0] == pair[1]), "the same key goes to the same endpoint");
    let light = asked.iter().filter(|name| ***name == **scene.members[1].endpoint.name()).count();
    assert!((200..=400).contains(&light), "{light} of 600");
}

#[test]
fn a_key_is_found_where_it_is_said_to_be() {
    let request = http::Request::get("/a/b?x=1&session=s%201&session=2")
        .header("x-session-id", "h")
        .header("cookie", "a=1; sid=c; sid=d")
        .body(Body::empty())
        .unwrap();
    let found =
        |key: &str| value(&key.parse().unwrap(), &request).map(|value| String::from_utf8(value.to_vec()).unwrap());
    let expected = [
        ("path", Some("/a/b")),
        ("header:X-Session-Id", Some("h")),
        ("query:session", Some("s%201")),
        ("cookie:sid", Some("c")),
        ("ip", None),
        ("header:other", None),
        ("query:other", None),
        ("cookie:other", None),
    ];
    for (key, expected) in expected {
        assert_eq!(found(key).as_deref(), expected, "{key}");
    }
    for wrong in ["", "cookies:a", "header:", "header:a b", "query:", "cookie:", "body"] {
        assert!(wrong.parse::<HashKey>().is_err(), "{wrong}");
    }
}

#[tokio::test]
async fn what_was_tried_is_tried_again_only_when_nothing_else_is_left() {
    let scene = Scene::new(config(Algorithm::LeastRequests), None, &[1, 1], Does::Answer(200));
    let tried = Tried::default();
    for _ in 0..4 {
        let mut request = get("/");
        request.extensions_mut().insert(tried.clone());
        scene.ask(request).await.unwrap();
    }
    let asked = scene.asked.lock();
    assert_ne!(asked[0], asked[1], "{asked:?}");
    assert_eq!(asked.len(), 4, "then any");
}

#[tokio::test]
async fn a_breaker_that_does_not_admit_is_passed_over() {
    let shut = |name: &str| (name != "10.0.0.1:80", true);
    let scene = Scene::gated(config(Algorithm::RoundRobin), None, &[1, 1], Does::Answer(200), shut);
    assert_eq!(scene.counts(10).await, [0, 10]);
    let scene = Scene::gated(config(Algorithm::RoundRobin), None, &[1, 1], Does::Answer(200), |_| (false, true));
    let refused = scene.ask(get("/")).await.unwrap_err();
    let refused = Error::find(&*refused).unwrap();
    assert_eq!((refused.kind(), refused.retry_after()), (Kind::CircuitOpen, Some(Duration::from_secs(7))));
}

#[tokio::test]
async fn a_breaker_whose_permits_others_took_is_passed_over_too() {
    for algorithm in [Algorithm::RoundRobin, Algorithm::Random, Algorithm::LeastRequests, Algorithm::PeakEwma] {
        let taken = |name: &str| (true, name == "10.0.0.3:80");
        let scene = Scene::gated(config(algorithm), None, &[5, 5, 1], Does::Answer(200), taken);
        assert_eq!(scene.counts(50).await, [0, 0, 50], "{algorithm:?}");
        // Rather one that was tried than none.
        let (tried, mut request) = (Tried::default(), get("/"));
        tried.add(scene.members[2].endpoint.name());
        request.extensions_mut().insert(tried);
        scene.ask(request).await.unwrap();
    }
    let scene = Scene::gated(Config::default(), None, &[1, 1], Does::Answer(200), |_| (true, false));
    let refused = scene.ask(get("/")).await.unwrap_err();
    let refused = Error::find(&*refused).unwrap();
    assert_eq!((refused.kind(), refused.retry_after()), (Kind::CircuitOpen, Some(Duration::from_secs(7))));
}

#[tokio::test]
async fn health_is_not_looked_at_where_too_few_are_healthy() {
    let active = health::Active { unhealthy: NonZeroU32::MIN, ..health::Active::default() };
    let down = |scene: &Scene, n: usize| {
        scene.members[n].endpoint.change(|health, now| health.checked(Some("x".into()), &active, now));
    };
    let scene = Scene::new(config(Algorithm::RoundRobin), None, &[1, 1, 1, 1], Does::Answer(200));
    down(&scene, 0);
    down(&scene, 1);
    assert_eq!(scene.counts(12).await[..2], [0, 0], "half of them are enough");
    down(&scene, 2);
    scene.members[0].endpoint.drain(true);
    let counts = scene.counts(90).await;
    assert_eq!(counts[0], 0, "drained, in a panic too");
    assert!(counts[1] > 0 && counts[2] > 6 && counts[3] > 6, "{counts:?}");

    let never = Config { panic_threshold: 0, ..Config::default() };
    let scene = Scene::new(never, None, &[1, 1], Does::Answer(200));
    down(&scene, 0);
    assert_eq!(scene.counts(5).await, [0, 5]);
    down(&scene, 1);
    assert_eq!(kind(scene.ask(get("/")).await), Kind::NoHealthyEndpoint);
}

#[tokio::test(start_paused = true)]
async fn who_comes_back_starts_slowly_and_who_was_there_does_not() {
    let slow = Config {
        algorithm: Algorithm::Random,
        slow_start: Toggle::On(HumanDuration::from_secs(100)),
        ..Config::default()
    };
    let active = health::Active { unhealthy: NonZeroU32::MIN, healthy: NonZeroU32::MIN, ..health::Active::default() };
    let scene = Scene::new(slow, None, &[1, 1], Does::Answer(200));
    let weight = |n: usize| scene.balance.0.balancer.effective_weight(&scene.members[n], Instant::now());
    assert!(weight(0) > 0.99 && weight(1) > 0.99);
    let endpoint = &scene.members[0].endpoint;
    endpoint.change(|health, now| health.checked(Some("x".into()), &active, now));
    endpoint.change(|health, now| health.checked(None, &active, now));
    assert!((weight(0) - 0.1).abs() < 0.01);
    let early = scene.counts(1000).await;
    assert!(early[0] < 150, "{early:?}");
    advance(Duration::from_secs(100)).await;
    let all = scene.counts(1000).await;
    assert!((400..=600).contains(&(all[0] - early[0])), "{all:?}");
}

#[tokio::test(start_paused = true)]
async fn failures_in_a_row_eject_but_never_the_last_one() {
    let passive = health::Passive { failures: NonZeroU32::new(2).unwrap(), ..health::Passive::default() };
    for does in [Does::Fail, Does::Answer(503), Does::BreakOff] {
        let never = Config { panic_threshold: 0, algorithm: Algorithm::RoundRobin, ..Config::default() };
        let scene = Scene::new(never, Some(passive.clone()), &[1, 1], does);
        let healthy = || scene.members.iter().filter(|member| member.endpoint.is_healthy(Instant::now())).count();
        for _ in 0..20 {
            if let Ok(response) = scene.ask(get("/")).await {
                drop(response.into_body().collect().await);
            }
        }
        assert_eq!(healthy(), 1, "{does:?}");
        advance(Duration::from_secs(30)).await;
        assert_eq!(healthy(), 2, "{does:?}");
    }
    let scene = Scene::new(Config::default(), Some(passive), &[1, 1], Does::Answer(500));
    drop(scene.counts(20).await);
    assert!(scene.members.iter().all(|member| member.endpoint.is_healthy(Instant::now())), "that is an answer");
}

#[tokio::test(start_paused = true)]
async fn endpoints_may_come_and_go() {
    let scene = Scene::new(config(Algorithm::RoundRobin), None, &[1, 1], Does::Answer(200));
    assert_eq!(scene.counts(4).await, [2, 2]);
    let one = scene.members[..1].to_vec();
    scene.balance.0.balancer.replace(one);
    assert_eq!(scene.counts(4).await, [6, 2]);
}

/// What a client does with its request.
#[derive(Debug, Clone, Copy)]
enum Caller {
    Reads,
    LeavesBeforeTheHead,
    LeavesAfterTheHead,
    LeavesInTheMiddle,
}

proptest! {
    #[test]
    fn whatever_ends_a_request_it_is_in_flight_no_longer(
        steps in vec((0..5_usize, 0..4_usize), 1..40),
        algorithm in 0..4_usize,
    ) {
        let does = [Does::Answer(200), Does::Stream, Does::BreakOff, Does::Fail, Does::Hang];
        let clients = [Caller::Reads, Caller::LeavesBeforeTheHead, Caller::LeavesAfterTheHead, Caller::LeavesInTheMiddle];
        let algorithms = [Algorithm::RoundRobin, Algorithm::Random, Algorithm::LeastRequests, Algorithm::PeakEwma];
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let passive = Some(health::Passive::default());
            for (does, client) in steps.into_iter().map(|(n, client)| (does[n], clients[client])) {
                let scene = Scene::new(config(algorithms[algorithm]), passive.clone(), &[2, 1], does);
                let in_flight = || scene.members.iter().map(|member| member.endpoint.in_flight()).sum::<usize>();
                let mut asked = Box::pin(scene.balance.clone().call(get("/")));
                prop_assert_eq!(in_flight(), 1);
                let response = match (client, futures_util::poll!(asked.as_mut())) {
                    (Caller::LeavesBeforeTheHead, _) | (_, Poll::Pending) => None,
                    (_, Poll::Ready(response)) => response.ok(),
                };
                drop(asked);
                if let Some(response) = response {
                    let mut body = response.into_body();
                    match client {
                        Caller::Reads => while let Some(Ok(_)) = body.frame().await {},
                        Caller::LeavesInTheMiddle => drop(body.frame().await),
                        _ => {}
                    }
                }
                prop_assert_eq!(in_flight(), 0);
            }
            Ok(())
        })?;
    }
}
