use std::{collections::VecDeque, io, time::Duration};

use futures_util::FutureExt;
use http_body_util::{BodyExt, StreamBody};
use proptest::{collection::vec, prelude::*};
use tokio::{sync::oneshot::error::TryRecvError, time::advance};
use tower::ServiceExt;
use tower_test::mock;

use super::*;
use crate::telemetry::Metrics;

fn count(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

fn config(most: u32, queue: u32) -> Config {
    Config { queue, ..Config::new(count(most)) }
}

fn limiter(most: u32, queue: u32) -> Arc<Limiter> {
    Arc::new(Limiter::new(Scope::Route, "all", config(most, queue), &Metrics::new()))
}

fn permit(limiter: &Arc<Limiter>) -> Permit {
    match limiter.enter() {
        Ok(Entered::Let(permit)) => permit,
        _ => panic!("there is room"),
    }
}

fn place(limiter: &Arc<Limiter>) -> Place {
    match limiter.enter() {
        Ok(Entered::Queued(place)) => place,
        _ => panic!("there is a place in the queue"),
    }
}

fn figures(limiter: &Limiter) -> (u32, usize) {
    let Snapshot { in_flight, queued, .. } = limiter.snapshot();
    (in_flight, queued)
}

#[tokio::test]
async fn who_came_first_is_let_in_first_and_nobody_overtakes() {
    let limiter = limiter(1, 10);
    let first = permit(&limiter);
    let (mut second, mut third) = (place(&limiter), place(&limiter));
    assert_eq!(figures(&limiter), (1, 2));
    drop(first);
    let second = second.granted.try_recv().expect("it is the second's turn");
    assert_eq!(third.granted.try_recv().unwrap_err(), TryRecvError::Empty);
    assert!(matches!(limiter.enter(), Ok(Entered::Queued(_))));
    drop(second);
    drop(third.granted.try_recv().expect("it is the third's turn"));
    assert_eq!(figures(&limiter), (0, 0));
}

#[tokio::test]
async fn leaving_the_queue_frees_the_place() {
    let limiter = limiter(1, 1);
    let first = permit(&limiter);
    let second = place(&limiter);
    assert!(limiter.enter().is_err(), "the queue is full");
    drop(second);
    let third = place(&limiter);
    drop(first);
    // With the permit in hand, but not taken.
    assert_eq!(figures(&limiter), (1, 0));
    drop(third);
    assert_eq!(figures(&limiter), (0, 0));
}

#[tokio::test]
async fn another_limit_holds_at_once_and_loses_nobody() {
    let limiter = limiter(4, 10);
    let mut permits: Vec<_> = (0..4).map(|_| permit(&limiter)).collect();
    limiter.adopt(&config(2, 10));
    let mut waiting = place(&limiter);
    permits.truncate(2);
    assert_eq!(figures(&limiter), (2, 1), "two came back, and two may be out");
    limiter.adopt(&config(3, 0));
    let let_in = waiting.granted.try_recv().expect("there is room again");
    assert_eq!(figures(&limiter), (3, 0));
    drop((let_in, permits));
    assert_eq!(figures(&limiter), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn it_says_when_those_who_wait_will_have_been_let_in() {
    let limiter = limiter(2, 3);
    let retry_after = || limiter.enter().err().and_then(|error| error.retry_after()).expect("a time");
    let held = [permit(&limiter), permit(&limiter)];
    let waiting = [place(&limiter), place(&limiter), place(&limiter)];
    assert_eq!(retry_after(), Duration::from_secs(10), "nothing is known yet");
    advance(Duration::from_secs(6)).await;
    drop(held);
    // The first two are in flight for the third and whoever comes: two and then some, each 6 s, two at a time.
    let more = [place(&limiter), place(&limiter)];
    assert_eq!(retry_after(), Duration::from_secs(12));
    drop((waiting, more));
}

/// One step of a history.
#[derive(Debug, Clone, Copy)]
enum Step {
    Come,
    End { which: usize },
    Leave { which: usize },
    Resize { most: u32, queue: u32 },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Come),
        3 => any::<usize>().prop_map(|which| Step::End { which }),
        2 => any::<usize>().prop_map(|which| Step::Leave { which }),
        1 => (1..6_u32, 0..6_u32).prop_map(|(most, queue)| Step::Resize { most, queue }),
    ]
}

proptest! {
    #[test]
    fn whatever_ends_a_request_gives_its_place_back(steps in vec(step(), 0..200)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
        let _inside = runtime.enter();
        let limiter = limiter(3, 4);
        let mut in_flight: Vec<Permit> = Vec::new();
        let mut queue: VecDeque<Place> = VecDeque::new();
        // The most that was allowed since there were as few.
        let mut allowed = 3;
        for step in steps {
            match step {
                Step::Come => match limiter.enter() {
                    Ok(Entered::Let(permit)) => {
                        prop_assert!(queue.is_empty(), "somebody was overtaken");
                        in_flight.push(permit);
                    }
                    Ok(Entered::Queued(place)) => queue.push_back(place),
                    Err(_) => {}
                },
                Step::End { which } if !in_flight.is_empty() => drop(in_flight.swap_remove(which % in_flight.len())),
                Step::Leave { which } if !queue.is_empty() => drop(queue.remove(which % queue.len())),
                Step::Resize { most, queue } => limiter.adopt(&config(most, queue)),
                _ => {}
            }
            let mut blocked = false;
            for mut place in std::mem::take(&mut queue) {
                if let Ok(permit) = place.granted.try_recv() {
                    prop_assert!(!blocked, "somebody was overtaken");
                    in_flight.push(permit);
                } else {
                    blocked = true;
                    queue.push_back(place);
                }
            }
            let shown = limiter.snapshot();
            allowed = shown.limit.max(u32::try_from(in_flight.len()).unwrap().min(allowed));
            prop_assert!(shown.in_flight <= allowed);
            prop_assert_eq!((shown.in_flight as usize, shown.queued), (in_flight.len(), queue.len()));
            prop_assert!(queue.is_empty() || shown.in_flight >= shown.limit, "somebody waits for nothing");
        }
        drop(in_flight);
        for mut place in queue {
            drop(place.granted.try_recv());
        }
        let shown = limiter.snapshot();
        prop_assert_eq!((shown.in_flight, shown.queued), (0, 0));
    }
}

type Asked = Request<Body>;
type Answered = Response<Body>;
type Answer = Pin<Box<dyn Future<Output = Result<Answered, BoxError>>>>;

/// The layer before an upstream in the test's hands.
struct Layered {
    limiter: Arc<Limiter>,
    service: Concurrency<mock::Mock<Asked, Answered>>,
    backend: mock::Handle<Asked, Answered>,
}

impl Layered {
    fn new(most: u32, queue: u32) -> Self {
        let limiter = limiter(most, queue);
        let (inner, backend) = mock::pair();
        Self { service: ConcurrencyLayer::new(limiter.clone()).layer(inner), limiter, backend }
    }

    async fn call(&mut self) -> Answer {
        Box::pin(self.service.ready().await.expect("it is always ready").call(Request::new(Body::empty())))
    }

    async fn next(&mut self) -> mock::SendResponse<Answered> {
        self.backend.next_request().await.expect("the request is passed on").1
    }
}

fn stream() -> Answered {
    let frames = [Ok::<_, io::Error>(Frame::data(Bytes::from_static(b"data")))];
    Response::new(Body::new(StreamBody::new(futures_util::stream::iter(frames))))
}

#[tokio::test(start_paused = true)]
async fn a_request_is_in_flight_until_its_body_has_ended() {
    let mut layered = Layered::new(1, 1);
    let answer = layered.call().await;
    layered.next().await.send_response(stream());
    let mut body = answer.await.unwrap().into_body();
    let mut waiting = layered.call().await;
    assert!(waiting.as_mut().now_or_never().is_none(), "the head is not the end");
    assert!(body.frame().await.is_some());
    assert_eq!(figures(&layered.limiter), (1, 1));
    assert!(body.frame().await.is_none());
    assert!(waiting.as_mut().now_or_never().is_none(), "it is sent now");
    layered.next().await.send_response(stream());
    drop(waiting.await.unwrap());
    assert_eq!(figures(&layered.limiter), (0, 0), "a body that is dropped has ended");
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_too_long_is_refused() {
    let mut layered = Layered::new(1, 1);
    let _first = layered.call().await;
    let mut waiting = layered.call().await;
    let full = layered.call().await.await.unwrap_err();
    assert_eq!(Error::find(&*full).map(Error::kind), Some(Kind::Overloaded));
    assert!(waiting.as_mut().now_or_never().is_none());
    advance(Duration::from_secs(11)).await;
    let refused = waiting.await.unwrap_err();
    let refused = Error::find(&*refused).unwrap();
    assert_eq!((refused.kind(), refused.retry_after().is_some()), (Kind::Overloaded, true));
    assert_eq!(figures(&layered.limiter), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn failures_and_futures_that_are_dropped_give_their_places_back() {
    let mut layered = Layered::new(1, 0);
    let answer = layered.call().await;
    layered.next().await.send_error(io::Error::other("gone"));
    assert!(answer.await.is_err());
    assert_eq!(figures(&layered.limiter), (0, 0));
    let answer = layered.call().await;
    drop(answer);
    assert_eq!(figures(&layered.limiter), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn a_tunnel_is_in_flight_until_it_ends() {
    let mut layered = Layered::new(1, 0);
    let exchange = Exchange::new(&Request::new(()));
    let mut request = Request::new(Body::empty());
    request.extensions_mut().insert(exchange.clone());
    let answer = layered.service.ready().await.unwrap().call(request);
    exchange.facts().tunnel = Some(Box::new(()));
    layered.next().await.send_response(Response::new(Body::empty()));
    drop(answer.await.unwrap());
    assert_eq!(figures(&layered.limiter), (1, 0));
    drop(exchange.facts().tunnel.take());
    assert_eq!(figures(&layered.limiter), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_adaptive_limit_follows_the_first_bytes_and_lets_in_who_waits() {
    let adaptive = Config { adaptive: Some(adaptive::Config::default()), ..config(30, 100) };
    let limiter = Arc::new(Limiter::new(Scope::Upstream, "gpu", adaptive, &Metrics::new()));
    assert_eq!(limiter.snapshot().limit, 20);
    let held: Vec<_> = (0..20).map(|_| permit(&limiter)).collect();
    let waiting: Vec<_> = (0..20).map(|_| place(&limiter)).collect();
    for _ in 0..20 {
        advance(Duration::from_secs(1)).await;
        for _ in 0..10 {
            limiter.sample(Duration::from_millis(50));
        }
    }
    let shown = limiter.snapshot();
    assert_eq!((shown.limit, shown.in_flight, shown.queued), (30, 30, 10));
    for _ in 0..20 {
        advance(Duration::from_secs(1)).await;
        for _ in 0..10 {
            limiter.sample(Duration::from_secs(5));
        }
    }
    let shown = limiter.snapshot();
    assert!(shown.limit < 15, "{shown:?}");
    assert_eq!(shown.in_flight, 30, "nobody is thrown out");
    limiter.adopt(&config(30, 100));
    assert_eq!(limiter.snapshot().limit, 30);
    drop((held, waiting));
    assert_eq!(figures(&limiter), (0, 0));
}

#[test]
fn only_answers_and_timeouts_tell_how_busy_an_upstream_is() {
    let status = |status: u16| is_telling(&Ok(Response::builder().status(status).body(()).unwrap()));
    assert!(status(200) && status(404) && !status(503));
    let error = |kind: Kind| is_telling::<()>(&Err(Error::from(kind).into()));
    assert!(error(Kind::UpstreamTimeout) && !error(Kind::ConnectFailed));
}
