use std::io;

use http_body_util::{BodyExt, StreamBody};
use proptest::{collection::vec, prelude::*};
use tokio::time::advance;
use tower::ServiceExt;
use tower_test::mock;

use super::{state::Why, *};

const FAST: Duration = Duration::from_millis(1);

fn secs(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn count(count: u32) -> NonZeroU32 {
    NonZeroU32::new(count).unwrap()
}

/// Opens after three failures in a row and by nothing else.
fn config() -> Config {
    Config {
        consecutive_failures: Toggle::On(count(3)),
        failure_rate: Toggle::Off,
        recovery: HumanDuration::from_secs(10),
        ..Config::default()
    }
}

/// A machine with its clock.
struct Played {
    machine: Machine,
    now: Instant,
}

impl Played {
    fn new(config: Config) -> Self {
        let now = Instant::now();
        Self { machine: Machine::new(config, 7, now), now }
    }

    fn admit(&mut self) -> Ticket {
        self.machine.admit(self.now).0.expect("it lets a request through")
    }

    fn judge(&mut self, ticket: Ticket, failed: bool) -> (Option<Mark>, Option<Change>) {
        self.machine.judge(ticket, failed, FAST, self.now)
    }

    fn ask(&mut self, failed: bool) -> Option<Change> {
        let ticket = self.admit();
        self.judge(ticket, failed).1
    }

    /// Opens it by failures in a row, and says for how long.
    fn open(&mut self) -> Duration {
        let change = (0..3).find_map(|_| self.ask(true));
        let Some(Change::Opened { recovery: Some(recovery), .. }) = change else { panic!("it opened: {change:?}") };
        recovery
    }

    /// Opens it and waits until the first probe may pass.
    fn recover(&mut self) {
        let recovery = self.open();
        self.now += recovery;
    }

    fn state(&self) -> State {
        self.machine.snapshot(self.now).state
    }
}

#[test]
fn failures_in_a_row_open_it_and_a_success_ends_the_row() {
    let mut played = Played::new(config());
    for failed in [true, true, false, true, true] {
        assert_eq!(played.ask(failed), None);
    }
    let opened = played.ask(true);
    assert!(matches!(opened, Some(Change::Opened { why: Why::ConsecutiveFailures, .. })), "{opened:?}");
    assert!(!played.machine.admits(played.now));
}

#[test]
fn it_says_truthfully_when_the_next_request_passes() {
    let mut played = Played::new(config());
    let recovery = played.open();
    assert!(recovery >= secs(8) && recovery <= secs(10), "{recovery:?}");
    played.now += secs(3);
    let refused = played.machine.admit(played.now).0.unwrap_err();
    let remaining = refused.expect("a time");
    assert_eq!(remaining + secs(3), recovery);
    played.now += remaining.saturating_sub(Duration::from_nanos(1));
    assert!(!played.machine.admits(played.now));
    played.now += Duration::from_nanos(1);
    assert!(played.machine.admits(played.now));
}

#[test]
fn a_rate_says_nothing_of_fewer_than_the_least_requests() {
    let rate = Config {
        consecutive_failures: Toggle::Off,
        failure_rate: Toggle::On(0.5),
        min_requests: count(10),
        ..config()
    };
    let mut played = Played::new(rate);
    for turn in 0..9 {
        assert_eq!(played.ask(turn % 2 == 0), None, "{turn}");
    }
    assert!(matches!(played.ask(true), Some(Change::Opened { why: Why::FailureRate, .. })));
}

#[test]
fn what_slid_out_of_the_window_counts_no_more() {
    let rate = Config {
        consecutive_failures: Toggle::Off,
        failure_rate: Toggle::On(0.5),
        min_requests: count(10),
        ..config()
    };
    let mut played = Played::new(rate);
    for _ in 0..9 {
        assert_eq!(played.ask(true), None);
    }
    played.now += secs(11);
    assert_eq!(played.ask(true), None, "alone in the window");
    let shown = played.machine.snapshot(played.now);
    assert_eq!((shown.requests, shown.failures), (1, 1));
    // Part by part, not all at once.
    played.now += secs(5);
    assert_eq!(played.ask(false), None);
    played.now += secs(5);
    let shown = played.machine.snapshot(played.now);
    assert_eq!((shown.requests, shown.failures), (1, 0));
}

#[test]
fn slow_answers_open_it_where_the_file_says_what_is_slow() {
    let slow = Config {
        slow_rate: Toggle::On(0.5),
        slow_first_byte: Some(HumanDuration::from_secs(2)),
        min_requests: count(4),
        ..config()
    };
    let mut played = Played::new(slow);
    let mut opened = None;
    for seconds in [1, 2, 1, 3] {
        let ticket = played.admit();
        opened = played.machine.judge(ticket, false, secs(seconds), played.now).1;
    }
    assert!(matches!(opened, Some(Change::Opened { why: Why::SlowRate, .. })), "{opened:?}");
}

#[test]
fn all_probes_must_succeed() {
    let mut played = Played::new(Config { half_open_permits: count(2), ..config() });
    played.recover();
    let (first, second) = (played.admit(), played.admit());
    assert_eq!(played.machine.admit(played.now).0.unwrap_err(), Some(secs(1)), "the permits are out");
    assert_eq!(played.judge(first, false).1, None);
    assert!(!played.machine.admits(played.now), "who succeeded does not make room for a third");
    assert_eq!(played.judge(second, false).1, Some(Change::Closed { by_operator: false }));
    assert_eq!(played.state(), State::Closed);
}

#[test]
fn a_probe_that_takes_too_long_makes_room_for_another_and_each_time_for_longer() {
    let mut played = Played::new(Config { max_recovery: Some(HumanDuration::from_secs(35)), ..config() });
    let mut patience = played.open();
    played.now += patience;
    let mut overdue = Vec::new();
    for _ in 0..4 {
        overdue.push(played.admit());
        played.now += patience.saturating_sub(Duration::from_nanos(1));
        assert!(!played.machine.admits(played.now), "the only permit is out");
        played.now += Duration::from_nanos(1);
        assert!(played.machine.admits(played.now));
        patience = (2 * patience).min(secs(35));
    }
    assert_eq!(played.machine.snapshot(played.now).probes, 1, "one has it until another comes");
}

#[test]
fn an_overdue_probe_has_its_say_and_no_permit() {
    let late = |then: &dyn Fn(&mut Played, Ticket)| {
        let mut played = Played::new(Config { half_open_permits: count(2), ..config() });
        played.recover();
        let overdue = played.admit();
        played.now += secs(10);
        let (first, second) = (played.admit(), played.admit());
        assert!(!played.machine.admits(played.now), "the permits are out");
        then(&mut played, overdue);
        (played, first, second)
    };
    let (played, ..) = late(&|played, overdue| played.machine.leave(&overdue));
    assert!(!played.machine.admits(played.now), "it had none to give back");
    assert_eq!(played.machine.snapshot(played.now).probes, 2);

    let (mut played, first, second) = late(&|played, overdue| assert_eq!(played.judge(overdue, false).1, None));
    assert!(!played.machine.admits(played.now));
    assert_eq!(played.judge(first, false).1, Some(Change::Closed { by_operator: false }), "two have succeeded");
    assert_eq!(played.judge(second, true).1, None);
    assert_eq!((played.state(), played.machine.snapshot(played.now).failures), (State::Closed, 1), "one as any other");

    let (mut played, first, second) = late(&|played, overdue| {
        let opened = played.judge(overdue, true).1;
        assert!(matches!(opened, Some(Change::Opened { why: Why::FailedProbe, .. })), "{opened:?}");
    });
    assert_eq!((played.judge(first, false).1, played.judge(second, false).1), (None, None), "of a time that is past");
    assert_eq!(played.state(), State::Open);
}

#[test]
fn failed_probes_double_the_recovery_up_to_its_most() {
    let mut played = Played::new(Config { max_recovery: Some(HumanDuration::from_secs(35)), ..config() });
    let mut last = played.open();
    for most in [20, 35, 35] {
        played.now += last;
        let Some(Change::Opened { why: Why::FailedProbe, recovery: Some(next) }) = played.ask(true) else {
            panic!("the probe failed")
        };
        assert!(next <= secs(most) && next >= secs(most).mul_f64(0.8), "{next:?} of {most} s");
        last = next;
    }
    played.now += last;
    played.ask(false);
    played.now += last;
    let again = played.open();
    assert!(again <= secs(10), "it held for as long as it was open: from the start, not {again:?}");
}

#[test]
fn what_falls_again_at_once_is_left_alone_for_longer() {
    let mut played = Played::new(config());
    played.recover();
    assert_eq!(played.ask(false), Some(Change::Closed { by_operator: false }));
    played.now += secs(1);
    assert!(played.open() > secs(10));
}

#[test]
fn a_client_that_leaves_gives_its_permit_back_and_counts_as_nothing() {
    let mut played = Played::new(config());
    played.recover();
    let probe = played.admit();
    assert!(!played.machine.admits(played.now));
    played.machine.leave(&probe);
    assert!(played.machine.admits(played.now));
    assert_eq!((played.state(), played.machine.snapshot(played.now).probes), (State::HalfOpen, 0));
}

#[test]
fn an_older_generation_has_no_say() {
    let mut played = Played::new(config());
    let (late_success, late_failure, left) = (played.admit(), played.admit(), played.admit());
    let (mark, _) = {
        let ticket = played.admit();
        played.judge(ticket, false)
    };
    played.recover();
    let probe = played.admit();
    assert_eq!(played.judge(late_success, false).1, None);
    assert_eq!(played.state(), State::HalfOpen, "a success from before closes nothing");
    assert_eq!(played.judge(late_failure, true).1, None);
    played.machine.leave(&left);
    assert_eq!(played.machine.broke_off(&mark.unwrap(), played.now), None);
    assert_eq!((played.state(), played.machine.snapshot(played.now).probes), (State::HalfOpen, 1));
    played.judge(probe, false);
    assert_eq!(played.state(), State::Closed);
}

#[test]
fn a_body_that_breaks_off_makes_a_failure_of_a_success() {
    let mut played = Played::new(config());
    for turn in 0..3 {
        let ticket = played.admit();
        let mark = played.judge(ticket, false).0.unwrap();
        let opened = played.machine.broke_off(&mark, played.now);
        assert_eq!(opened.is_some(), turn == 2, "heads do not end the row of streams that all break off");
    }
    let shown = played.machine.snapshot(played.now);
    assert_eq!((shown.requests, shown.failures), (3, 3), "each counts once");
}

#[test]
fn a_probe_that_breaks_off_opens_again_what_it_closed() {
    let mut played = Played::new(config());
    played.recover();
    let probe = played.admit();
    let (mark, change) = played.judge(probe, false);
    assert_eq!(change, Some(Change::Closed { by_operator: false }));
    let opened = played.machine.broke_off(&mark.unwrap(), played.now + secs(1));
    assert!(matches!(opened, Some(Change::Opened { why: Why::FailedProbe, .. })), "{opened:?}");
}

#[test]
fn an_operator_opens_it_for_as_long_as_he_likes() {
    let mut played = Played::new(config());
    assert!(matches!(
        played.machine.force_open(played.now),
        Some(Change::Opened { why: Why::Operator, recovery: None })
    ));
    played.now += secs(100_000);
    assert_eq!(played.machine.admit(played.now).0.unwrap_err(), None, "nobody knows when");
    assert_eq!(played.machine.adopt(config(), played.now), None);
    assert!(!played.machine.admits(played.now));
    assert_eq!(played.machine.reset(played.now), Some(Change::Closed { by_operator: true }));
    assert!(played.machine.admits(played.now));
    assert_eq!(played.machine.reset(played.now), None, "nothing to tell");
}

#[test]
fn other_settings_hold_at_once_and_lock_nobody_out() {
    let mut played =
        Played::new(Config { half_open_permits: count(3), recovery: HumanDuration::from_secs(50), ..config() });
    played.open();
    let soon = Config { max_recovery: Some(HumanDuration::from_secs(10)), half_open_permits: count(3), ..config() };
    assert_eq!(played.machine.adopt(soon, played.now), None);
    played.now += secs(10);
    for _ in 0..2 {
        assert_ne!(played.ask(false), Some(Change::Closed { by_operator: false }));
    }
    let fewer = Config { half_open_permits: count(2), ..config() };
    assert_eq!(played.machine.adopt(fewer, played.now), Some(Change::Closed { by_operator: false }));
    assert!(played.machine.admits(played.now));
}

/// One step of a history.
#[derive(Debug, Clone, Copy)]
enum Step {
    Ask,
    Answer { which: usize, failed: bool },
    Leave { which: usize },
    BreakOff { which: usize },
    Wait { millis: u64 },
    ForceOpen,
    Reset,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Ask),
        5 => (any::<usize>(), any::<bool>()).prop_map(|(which, failed)| Step::Answer { which, failed }),
        2 => any::<usize>().prop_map(|which| Step::Leave { which }),
        1 => any::<usize>().prop_map(|which| Step::BreakOff { which }),
        3 => (0..20_000_u64).prop_map(|millis| Step::Wait { millis }),
        1 => Just(Step::ForceOpen),
        1 => Just(Step::Reset),
    ]
}

proptest! {
    /// Whatever happens in whatever order, no more probes are out than there are permits, but for those that are overdue,
    /// and when everybody has been answered or has left, no permit is.
    #[test]
    fn no_history_lets_more_through_than_there_are_permits(permits in 1..5_u32, steps in vec(step(), 0..200)) {
        let mut played = Played::new(Config { half_open_permits: count(permits), ..config() });
        let mut out: Vec<(u64, Instant, Ticket)> = Vec::new();
        let mut marks = Vec::new();
        for step in steps {
            match step {
                Step::Ask => {
                    if let Ok(ticket) = played.machine.admit(played.now).0 {
                        out.push((played.machine.generation(), played.now, ticket));
                    }
                }
                Step::Answer { which, failed } if !out.is_empty() => {
                    let (.., ticket) = out.swap_remove(which % out.len());
                    marks.extend(played.judge(ticket, failed).0);
                }
                Step::Leave { which } if !out.is_empty() => {
                    let (.., ticket) = out.swap_remove(which % out.len());
                    played.machine.leave(&ticket);
                }
                Step::BreakOff { which } if !marks.is_empty() => {
                    let mark = marks.swap_remove(which % marks.len());
                    played.machine.broke_off(&mark, played.now);
                }
                Step::Wait { millis } => played.now += Duration::from_millis(millis),
                Step::ForceOpen => drop(played.machine.force_open(played.now)),
                Step::Reset => drop(played.machine.reset(played.now)),
                _ => {}
            }
            let generation = played.machine.generation();
            let probes = || out.iter().filter(|(of, _, ticket)| *of == generation && ticket.is_probe());
            // The shortest recovery, as it may be shortened.
            let in_time = probes().filter(|(_, since, _)| played.now < *since + secs(8)).count();
            let shown = played.machine.snapshot(played.now);
            prop_assert!(in_time <= permits as usize, "{in_time} probes of {permits}");
            prop_assert!(shown.probes <= permits && shown.probes as usize <= probes().count(), "each permit is somebody's");
        }
        for (.., ticket) in out {
            played.machine.leave(&ticket);
        }
        prop_assert_eq!(played.machine.snapshot(played.now).probes, 0);
        played.now += secs(100);
        let forced = played.machine.snapshot(played.now).forced;
        prop_assert_eq!(played.machine.admits(played.now), !forced, "nobody is locked out for ever");
    }
}

type Asked = Request<Body>;
type Answered = Response<Body>;
type Handle = mock::Handle<Asked, Answered>;
type Answer = Pin<Box<dyn Future<Output = Result<Answered, BoxError>>>>;

/// The layer before an endpoint in the test's hands.
struct Layered {
    breaker: Arc<Breaker>,
    service: CircuitBreaker<mock::Mock<Asked, Answered>>,
    backend: Handle,
}

impl Layered {
    fn new(config: Config) -> Self {
        let breaker = Arc::new(Breaker::new("api", "127.0.0.1:8000", config, &Metrics::new()));
        let (inner, backend) = mock::pair();
        Self { service: CircuitBreakerLayer::new(breaker.clone()).layer(inner), breaker, backend }
    }

    async fn call(&mut self) -> Answer {
        Box::pin(self.service.ready().await.expect("it is always ready").call(Request::new(Body::empty())))
    }

    /// A request that the endpoint has got.
    async fn sent(&mut self) -> (Answer, mock::SendResponse<Answered>) {
        let answer = self.call().await;
        (answer, self.backend.next_request().await.expect("the request is passed on").1)
    }

    async fn fail(&mut self) {
        let (answer, send) = self.sent().await;
        send.send_error(io::Error::other("gone"));
        answer.await.unwrap_err();
    }

    async fn answered(&mut self, status: u16) -> StatusCode {
        let (answer, send) = self.sent().await;
        send.send_response(Response::builder().status(status).body(Body::from("answer")).unwrap());
        answer.await.unwrap().status()
    }
}

#[tokio::test(start_paused = true)]
async fn errors_and_listed_statuses_open_it_and_the_refusal_is_the_breakers() {
    let mut layered = Layered::new(config());
    layered.fail().await;
    for _ in 0..2 {
        assert_eq!(layered.answered(503).await, 503, "what the endpoint said is passed on");
    }
    assert!(!layered.breaker.admits());
    let refused = layered.call().await.await.unwrap_err();
    let refused = Error::find(&*refused).unwrap();
    assert_eq!((refused.kind(), refused.retry_after()), (Kind::CircuitOpen, layered.breaker.retry_after()));
    assert_eq!(layered.breaker.refused(), 1);

    advance(layered.breaker.retry_after().unwrap()).await;
    assert_eq!(layered.answered(500).await, 500);
    assert_eq!(layered.breaker.snapshot().state, State::Closed, "500 is the application's answer");
}

#[tokio::test(start_paused = true)]
async fn who_leaves_or_fails_on_his_own_gives_the_permit_back() {
    let mut layered = Layered::new(config());
    for _ in 0..3 {
        layered.fail().await;
    }
    advance(secs(10)).await;
    let (answer, _unanswered) = layered.sent().await;
    assert!(!layered.breaker.admits(), "the only permit is out");
    drop(answer);
    assert!(layered.breaker.admits());
    let (answer, send) = layered.sent().await;
    send.send_error(Error::from(Kind::BodyTooLarge));
    answer.await.unwrap_err();
    assert!(layered.breaker.admits());
    assert_eq!(layered.breaker.snapshot().state, State::HalfOpen);
}

#[tokio::test(start_paused = true)]
async fn a_permit_that_a_pick_took_is_used_once_and_never_lost() {
    let mut layered = Layered::new(config());
    for _ in 0..3 {
        layered.fail().await;
    }
    advance(secs(10)).await;
    let pick = |layered: &Layered| {
        let mut request: Asked = Request::new(Body::empty());
        let picked = Admit::admit(layered.breaker.clone(), request.extensions_mut());
        picked.then_some(request)
    };
    let picked = pick(&layered).expect("a permit");
    assert!(pick(&layered).is_none(), "the only permit is out");
    drop(picked);
    assert_eq!((layered.breaker.snapshot().probes, layered.breaker.refused()), (0, 0));

    let picked = pick(&layered).expect("it came back");
    let answer = layered.service.ready().await.unwrap().call(picked);
    layered.backend.next_request().await.expect("it passes by its permit");
    assert_eq!(layered.breaker.snapshot().probes, 1);
    drop(answer);
    assert_eq!(layered.breaker.snapshot().probes, 0);

    // One of another breaker is of no use here, and goes back.
    let other = Arc::new(Breaker::new("api", "127.0.0.1:8001", config(), &Metrics::new()));
    let mut picked = pick(&layered).expect("a permit");
    assert!(Admit::admit(other, picked.extensions_mut()), "in its place");
    let answer = layered.service.ready().await.unwrap().call(picked);
    layered.backend.next_request().await.expect("it gets one itself").1.send_response(Response::new(Body::empty()));
    answer.await.unwrap();
    assert_eq!(layered.breaker.snapshot().state, State::Closed);
}

#[tokio::test(start_paused = true)]
async fn a_stream_that_breaks_off_is_a_failure_and_one_that_is_left_is_not() {
    let mut layered = Layered::new(Config { consecutive_failures: Toggle::On(count(9)), ..config() });
    for broken in [true, false, true, true] {
        let (answer, send) = layered.sent().await;
        let frames = [Ok(Frame::data(Bytes::from_static(b"data"))), Err(io::Error::other("reset"))];
        send.send_response(Response::new(Body::new(StreamBody::new(futures_util::stream::iter(frames)))));
        let mut body = answer.await.unwrap().into_body();
        assert!(body.frame().await.unwrap().is_ok());
        if broken {
            assert!(body.frame().await.unwrap().is_err());
        }
    }
    let shown = layered.breaker.snapshot();
    assert_eq!((shown.requests, shown.failures), (4, 3));
}

#[tokio::test(start_paused = true)]
async fn a_slow_head_counts_as_slow_and_a_slow_body_does_not() {
    let mut layered = Layered::new(Config {
        slow_rate: Toggle::On(1.0),
        slow_first_byte: Some(HumanDuration::from_secs(2)),
        min_requests: count(2),
        ..config()
    });
    for _ in 0..2 {
        let (answer, send) = layered.sent().await;
        send.send_response(Response::new(Body::from("answer")));
        let body = answer.await.unwrap().into_body();
        advance(secs(60)).await;
        drop(body);
    }
    assert!(layered.breaker.admits());
    for _ in 0..2 {
        let (answer, send) = layered.sent().await;
        advance(secs(2)).await;
        send.send_response(Response::new(Body::from("answer")));
        answer.await.unwrap();
    }
    assert!(!layered.breaker.admits(), "{:?}", layered.breaker.snapshot());
}
