//! One question, asked once: who comes while an answer is on its way reads along, and a stream that came to its end is
//! given again as a stream.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use sidegate::{
    layers::{
        cache::{CacheLayer, Config, State},
        deadline::DeadlineLayer,
    },
    message::{Body, BoxError, Deadline, Error, HttpService, Kind},
    telemetry::Metrics,
};
use tokio::{task::JoinSet, time::sleep};
use tower::{Layer, ServiceExt, service_fn};

use crate::{
    cache::{answer, cached, get, is_hit, ok, source},
    harness::{
        Backend, Proxy, Wire,
        backend::Recorder,
        client::{self, Http2Client},
        eventually, figure, ms, within,
    },
};

/// What a route for completions would have.
const STREAMS: &str = "{ methods: [POST], key: [body], ttl: 1h, record_streams: true }";
const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
/// The last event, and the end of the body.
const END: &str = "e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n";
const DONE: &str = "data: [DONE]\n\n";

pub fn post(path: &str, fields: &str, body: &str) -> String {
    let length = body.len();
    let fields = format!("content-type: application/json\r\n{fields}content-length: {length}\r\n");
    format!("POST {path} HTTP/1.1\r\nhost: sidegate.test\r\n{fields}\r\n{body}")
}

fn prompt(fields: &str) -> String {
    post("/v1/chat/completions", fields, r#"{"stream": true, "model": "m", "messages": []}"#)
}

fn event(n: usize) -> String {
    format!("data: {n}\n\n")
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

pub async fn asking(proxy: &Proxy, request: impl AsRef<[u8]>) -> Wire {
    let mut client = proxy.connect().await;
    client.send(request).await;
    client
}

/// How many requests joined an answer that was on its way.
async fn coalesced(proxy: &Proxy) -> i64 {
    proxy.sample("sidegate_cache_requests_total{route=\"all\",outcome=\"coalesced\"}").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_who_ask_at_once_cost_one_request_and_each_gets_every_event() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached(STREAMS)).await;
    let mut clients = Vec::new();
    for _ in 0..100 {
        clients.push(asking(&proxy, prompt("")).await);
    }
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.send(STREAM).await;
    for client in &mut clients {
        assert_eq!(client.head().await.status(), 200);
    }
    for n in 0..10 {
        upstream.send(chunk(&event(n))).await;
        // The next is only sent when each has got this one.
        for client in &mut clients {
            assert_eq!(client.chunk().await.expect("an event"), event(n).as_bytes());
        }
    }
    // Late, and while the upstream says nothing.
    let mut late = asking(&proxy, prompt("")).await;
    let head = late.head().await;
    assert!(head.get("cache-status").unwrap().contains("; collapsed"), "{head:?}");
    for n in 0..10 {
        assert_eq!(late.chunk().await.expect("what was before"), event(n).as_bytes());
    }
    clients.push(late);
    upstream.send(END).await;
    for client in &mut clients {
        assert_eq!(client.chunk().await.expect("the last event"), DONE.as_bytes());
        assert_eq!(client.chunk().await, None);
    }
    assert!(backend.accepted().await.is_none(), "one request");
    assert_eq!(coalesced(&proxy).await, 100);
    let again = proxy.ask(prompt("")).await;
    assert!(is_hit(&again), "{again:?}");
    let whole: String = (0..10).map(event).collect();
    assert_eq!(again.text(), whole + DONE);
    assert_eq!(again.head.get("content-type"), Some("text/event-stream"));
    figure("101 clients with one question: 1 request went upstream, each got 11 of 11 events");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asked_first_may_leave_and_the_others_get_all() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached(STREAMS)).await;
        let mut first = asking(&proxy, prompt("x-request-id: first\r\n")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(STREAM.to_owned() + &chunk(&event(0))).await;
        first.head().await;
        first.chunk().await;
        let mut other = asking(&proxy, prompt("")).await;
        other.head().await;
        assert_eq!(other.chunk().await.unwrap(), event(0).as_bytes());
        first.leave(reset);
        assert_eq!(proxy.access_line("first").await["aborted_by"], "client");
        waiting(&proxy, 1).await;
        for n in 1..5 {
            upstream.send(chunk(&event(n))).await;
            assert_eq!(other.chunk().await.expect("an event"), event(n).as_bytes());
        }
        upstream.send(END).await;
        assert_eq!(other.chunk().await.unwrap(), DONE.as_bytes());
        assert_eq!(other.chunk().await, None);
        assert!(is_hit(&proxy.ask(prompt("")).await), "and it is kept");
        assert!(backend.accepted().await.is_none());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asked_first_may_leave_before_there_is_an_answer() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached(STREAMS)).await;
    let first = asking(&proxy, prompt("x-request-id: first\r\n")).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    let mut others = Vec::new();
    for _ in 0..5 {
        others.push(asking(&proxy, prompt("")).await);
    }
    waiting(&proxy, 6).await;
    first.leave(false);
    proxy.access_line("first").await;
    upstream.send(STREAM.to_owned() + &chunk(&event(0)) + END).await;
    for other in &mut others {
        assert_eq!(other.answer().await.text(), event(0) + DONE);
    }
    assert!(backend.accepted().await.is_none(), "nobody had to ask again");
}

/// Waits until so many requests are in the proxy's hands, and it has done with them what it can.
pub async fn waiting(proxy: &Proxy, count: i64) {
    eventually("the requests to be there", async || proxy.sample("sidegate_in_flight{route=\"all\"}").await == count)
        .await;
    // Who is counted may not have joined the others yet.
    within("the proxy to be idle", proxy.idle()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn when_all_have_left_the_upstream_is_let_go() {
    for section in [STREAMS, "{ methods: [POST], key: [body], ttl: 1h }"] {
        let mut worst = Duration::ZERO;
        for turn in 0..5 {
            let backend = Backend::start().await;
            let proxy = Proxy::before(&backend.url(), &cached(section)).await;
            let mut clients = Vec::new();
            for n in 0..10 {
                clients.push(asking(&proxy, prompt(&format!("x-request-id: left-{n}\r\n"))).await);
            }
            let mut upstream = backend.accept().await;
            upstream.request().await;
            // Also before there is an answer.
            if turn > 0 {
                upstream.send(STREAM.to_owned() + &chunk(&event(0))).await;
                for client in &mut clients {
                    client.head().await;
                    client.chunk().await;
                }
            } else {
                waiting(&proxy, 10).await;
            }
            let last = clients.pop();
            drop(clients);
            for n in 0..9 {
                proxy.access_line(&format!("left-{n}")).await;
            }
            let left = Instant::now();
            drop(last);
            upstream.ended().await;
            worst = worst.max(left.elapsed());
            assert!(!is_stored(&proxy).await);
        }
        figure(&format!("the last of 10 clients left: the upstream was let go after {} at most", ms(worst)));
    }
}

async fn is_stored(proxy: &Proxy) -> bool {
    proxy.sample("sidegate_cache_stored_total{route=\"all\"}").await > 0
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_dies_breaks_off_all_who_read_and_is_asked_again() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached(STREAMS)).await;
        let mut clients = Vec::new();
        for n in 0..10 {
            clients.push(asking(&proxy, prompt(&format!("x-request-id: cut-{n}\r\n"))).await);
        }
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(STREAM.to_owned() + &chunk(&event(0))).await;
        for client in &mut clients {
            client.head().await;
            assert_eq!(client.chunk().await.unwrap(), event(0).as_bytes());
        }
        upstream.leave(reset);
        for (n, client) in clients.iter_mut().enumerate() {
            client.ended().await;
            let line = proxy.access_line(&format!("cut-{n}")).await;
            assert_eq!((&line["aborted_by"], &line["error"]), (&"upstream".into(), &"upstream-reset".into()), "{line}");
        }
        assert!(!is_stored(&proxy).await);
        let mut again = asking(&proxy, prompt("")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(STREAM.to_owned() + &chunk(&event(7)) + END).await;
        assert_eq!(again.answer().await.text(), event(7) + DONE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_recorded_is_shared_and_not_kept() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{ methods: [POST], key: [body], ttl: 1h }")).await;
    for _ in 0..2 {
        let mut clients = [asking(&proxy, prompt("")).await, asking(&proxy, prompt("")).await];
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(STREAM).await;
        for client in &mut clients {
            let head = client.head().await;
            assert!(!head.get("cache-status").unwrap().contains("; stored"), "{head:?}");
        }
        // The connection is not used again, so that the next request is seen to come.
        upstream.send(chunk(&event(0)) + END).await;
        drop(upstream);
        for client in &mut clients {
            let mut text = Vec::new();
            while let Some(chunk) = client.chunk().await {
                text.extend(chunk);
            }
            assert_eq!(String::from_utf8(text).unwrap(), event(0) + DONE);
        }
    }
    assert!(!is_stored(&proxy).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_not_what_was_asked_for_is_not_kept() {
    let delta = |reason: &str| format!("data: {{\"choices\": [{{\"delta\": {{}}, \"finish_reason\": {reason}}}]}}\n\n");
    let begun = delta("null");
    let anthropic =
        "event: message_delta\ndata: {\"type\": \"message_delta\", \"delta\": {\"stop_reason\": \"end_turn\"}}\n\n";
    let stop = "event: message_stop\ndata: {\"type\": \"message_stop\"}\n\n";
    for (said, kept) in [
        (begun.clone() + &delta("\"stop\"") + DONE, true),
        (begun.clone() + &delta("\"length\"") + DONE, false),
        (begun.clone() + &delta("\"content_filter\"") + DONE, false),
        (begun.clone() + &delta("\"tool_calls\"") + DONE, false),
        (begun.clone() + &delta("\"stop\""), false),
        (begun.clone() + "data: {\"error\": {\"message\": \"overloaded\"}}\n\n" + DONE, false),
        (begun.clone() + "event: error\ndata: {}\n\n", false),
        (anthropic.to_owned() + stop, true),
        (anthropic.replace("end_turn", "max_tokens") + stop, false),
        (anthropic.to_owned(), false),
    ] {
        let backend = Recorder::answering(STREAM.to_owned() + &chunk(&said) + "0\r\n\r\n").await;
        let proxy = Proxy::before(&backend.url(), &cached(STREAMS)).await;
        for turn in 0..2 {
            let answer = proxy.ask(prompt("")).await;
            assert_eq!(answer.text(), said, "the client gets it in any case");
            assert_eq!(is_hit(&answer), turn > 0 && kept, "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_in_one_piece_is_kept_if_it_is_whole() {
    for (reason, kept) in [("stop", true), ("length", false)] {
        let said = format!(r#"{{"choices": [{{"message": {{"content": "a"}}, "finish_reason": "{reason}"}}]}}"#);
        let backend = Recorder::answering(ok("content-type: application/json\r\n", &said)).await;
        let proxy = Proxy::before(&backend.url(), &cached(STREAMS)).await;
        for turn in 0..2 {
            assert_eq!(is_hit(&proxy.ask(prompt("")).await), turn > 0 && kept, "{said}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paced_stream_keeps_its_order_and_its_pauses() {
    let backend = Backend::start().await;
    let section = |more: &str| format!("{{ methods: [POST], key: [body], ttl: 1h, record_streams: true, {more} }}");
    let settings = format!(
        "routes:
  - {{ match: {{ path: /paced }}, upstream: api, cache: {} }}
  - {{ match: {{ path: /faster }}, upstream: api, cache: {} }}
  - {{ match: {{ path: /instant }}, upstream: api, cache: {} }}",
        section("replay: paced"),
        section("replay: paced, speed: 4"),
        section("replay: instant")
    );
    let proxy = Proxy::before(&backend.url(), &settings).await;
    let whole = (0..5).map(event).collect::<String>() + DONE;
    // From the first event to the last.
    let mut took = Vec::new();
    for path in ["/paced", "/faster", "/instant"] {
        for turn in 0..2 {
            let mut client = asking(&proxy, post(path, "connection: close\r\n", "{}")).await;
            let sending = async {
                if turn > 0 {
                    return;
                }
                let mut upstream = backend.accept().await;
                upstream.request().await;
                upstream.send(STREAM).await;
                for n in 0..5 {
                    // The pauses are what is recorded.
                    sleep(Duration::from_millis(if n == 0 { 0 } else { 100 })).await;
                    upstream.send(chunk(&event(n))).await;
                }
                upstream.send(END).await;
            };
            let reading = async {
                client.head().await;
                let mut text = client.arrival().await;
                let begun = Instant::now();
                text.extend(client.rest().await.0);
                (String::from_utf8(text).unwrap(), begun.elapsed())
            };
            let ((), (text, elapsed)) = tokio::join!(sending, reading);
            let lines: Vec<_> = text.lines().filter(|line| line.starts_with("data")).collect();
            assert_eq!(lines.join("\n\n") + "\n\n", whole, "{path}");
            took.push(elapsed);
        }
    }
    let [_, paced, recorded, faster, .., instant] = took[..] else { panic!() };
    figure(&format!(
        "recorded over {}, given again over {} paced, {} four times as fast, {} at once",
        ms(took[0]),
        ms(paced),
        ms(faster),
        ms(instant)
    ));
    assert!(paced.as_secs_f64() > 0.8 * took[0].as_secs_f64().min(0.4), "{took:?}");
    assert!(faster.as_secs_f64() > 0.2 * recorded.as_secs_f64().min(0.4), "{took:?}");
    assert!(faster < paced && instant < faster, "{took:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_stream_reaches_http2_as_well() {
    let backend = Recorder::answering(STREAM.to_owned() + &chunk(&event(0)) + &chunk(&event(1)) + END).await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h, record_streams: true }")).await;
    let client = Http2Client::to(proxy.address()).await;
    for turn in 0..2 {
        let answer = client.get("/").await;
        assert_eq!(answer.headers()["cache-status"].to_str().unwrap().starts_with("sidegate; hit"), turn > 0);
        let mut body = answer.into_body();
        let mut text = Vec::new();
        while let Some(data) = client::data(&mut body).await {
            text.extend(data);
        }
        assert_eq!(String::from_utf8(text).unwrap(), event(0) + &event(1) + DONE);
    }
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_too_long_asks_by_itself() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h, coalesce_timeout: 100ms }")).await;
    let mut first = asking(&proxy, get("/", "")).await;
    let (mut slow, _) = backend.accept_head().await;
    let mut other = asking(&proxy, get("/", "")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(ok("", "quick")).await;
    let quick = other.answer().await;
    assert_eq!(quick.text(), "quick");
    assert!(source(&quick).ends_with("; detail=coalesce-timeout"), "{quick:?}");
    slow.send(ok("", "slow")).await;
    assert_eq!(first.answer().await.text(), "slow");
    assert_eq!(proxy.get("/").await.text(), "slow", "what was asked for first is what is kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_turns_out_to_be_for_one_is_asked_for_by_each_and_nobody_waits_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    // Each request comes over a connection of its own.
    let private = ok("cache-control: private\r\nconnection: close\r\n", "mine");
    for round in 0..2 {
        let mut clients = Vec::new();
        for _ in 0..5 {
            clients.push(asking(&proxy, get("/", "")).await);
        }
        let mut upstreams = vec![backend.accept_head().await.0];
        if round == 0 {
            waiting(&proxy, 5).await;
            assert!(backend.accepted().await.is_none(), "they wait for what the first is told");
            upstreams[0].send(&private).await;
        }
        while upstreams.len() < 5 {
            upstreams.push(backend.accept_head().await.0);
        }
        for upstream in &mut upstreams {
            upstream.try_send(&private).await.ok();
        }
        for client in &mut clients {
            assert_eq!(client.answer().await.text(), "mine");
        }
        assert!(!is_stored(&proxy).await);
        waiting(&proxy, 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_the_same_for_all_who_wait() {
    let backend = Backend::start().await;
    let settings = "
defaults: { timeouts: { first_byte: 2s } }
routes: [{ upstream: api, name: all, cache: { methods: [POST], key: [body], ttl: 1h } }]";
    let proxy = Proxy::before(&backend.url(), settings).await;
    for (path, status, slug) in [("/reset", 502, "upstream-reset"), ("/silent", 504, "upstream-timeout")] {
        let mut clients = JoinSet::new();
        for _ in 0..10 {
            clients.spawn(Wire::ask(proxy.address(), post(path, "", "{}")));
        }
        let mut upstream = backend.accept().await;
        upstream.request().await;
        if path == "/reset" {
            waiting(&proxy, 10).await;
            drop(upstream);
        }
        for failed in clients.join_all().await {
            assert_eq!(failed.status(), status, "{}", failed.text());
            assert_eq!(failed.json()["type"], format!("urn:sidegate:problem:{slug}"));
        }
        assert!(backend.accepted().await.is_none(), "one request failed for all");
        // And it is asked again.
        let mut again = asking(&proxy, post(path, "", "{}")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(ok("connection: close\r\n", "well")).await;
        assert_eq!(again.answer().await.text(), "well");
    }
}

#[tokio::test(start_paused = true)]
async fn who_asks_later_has_time_of_its_own() {
    let begun = tokio::time::Instant::now();
    let total = Duration::from_secs(10);
    let asked = Arc::new(AtomicUsize::new(0));
    let upstream = service_fn({
        let asked = asked.clone();
        move |_: http::Request<Body>| {
            let before = asked.fetch_add(1, Ordering::Relaxed);
            async move {
                sleep(if before == 0 { Duration::MAX } else { Duration::from_secs(1) }).await;
                let answer = http::Response::builder().header("cache-control", "max-age=60");
                Ok::<_, BoxError>(answer.body(Body::from("late")).unwrap())
            }
        }
    });
    let upstream = HttpService::new(DeadlineLayer::new(total).layer(upstream));
    let layer = CacheLayer::new(&Config::default(), "all", "api", &State::default(), None, &Metrics::new());
    let cache = layer.layer(upstream);
    let ask = async |after: u64| {
        sleep(Duration::from_secs(after)).await;
        let answer = cache.clone().oneshot(http::Request::get("/").body(Body::empty()).unwrap()).await;
        (answer.map_err(|error| Error::find(&*error).map(Error::kind)).map(|answer| answer.status()), begun.elapsed())
    };
    let (first, second, third) = tokio::join!(ask(0), ask(6), ask(7));
    assert_eq!(first, (Err(Some(Kind::DeadlineExceeded)), total));
    let both = (Ok(http::StatusCode::OK), Duration::from_secs(11));
    assert_eq!((second, third), (both, both), "asked for once more, by one of them");
    assert_eq!(asked.load(Ordering::Relaxed), 2);
}

/// Ten bytes, one every second and a half.
struct Drip(usize, Pin<Box<tokio::time::Sleep>>);

impl http_body::Body for Drip {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if self.0 == 0 {
            return Poll::Ready(None);
        }
        ready!(self.1.as_mut().poll(cx));
        self.1 = Box::pin(sleep(Duration::from_millis(1500)));
        self.0 -= 1;
        Poll::Ready(Some(Ok(Frame::data(Bytes::from_static(b".")))))
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.0 as u64)
    }
}

#[tokio::test(start_paused = true)]
async fn who_reads_along_later_reads_longer() {
    let begun = tokio::time::Instant::now();
    let asked = Arc::new(AtomicUsize::new(0));
    let upstream = service_fn({
        let asked = asked.clone();
        move |_: http::Request<Body>| {
            asked.fetch_add(1, Ordering::Relaxed);
            let answer = http::Response::builder().header("cache-control", "max-age=60");
            let answer = answer.body(Drip(10, Box::pin(sleep(Duration::from_millis(1500))))).unwrap();
            async { Ok::<_, BoxError>(answer) }
        }
    });
    let upstream = HttpService::new(DeadlineLayer::new(Duration::from_secs(10)).layer(upstream));
    let layer = CacheLayer::new(&Config::default(), "all", "api", &State::default(), None, &Metrics::new());
    let cache = layer.layer(upstream);
    let read = async |after: u64| {
        sleep(Duration::from_secs(after)).await;
        let answer = cache.clone().oneshot(http::Request::get("/").body(Body::empty()).unwrap()).await.unwrap();
        let due = answer.extensions().get::<Deadline>().map(|deadline| (deadline.0 - begun).as_secs());
        let read = answer.into_body().collect().await.map(|body| body.to_bytes().len());
        (due, read.map_err(|error| Error::find(&*error).map(Error::kind)), begun.elapsed().as_secs())
    };
    let late = Err(Some(Kind::DeadlineExceeded));
    assert_eq!(
        tokio::join!(read(0), read(2), read(6)),
        ((Some(10), late, 10), (Some(12), late, 12), (Some(16), Ok(10), 15)),
        "each has ten seconds"
    );
    assert_eq!(asked.load(Ordering::Relaxed), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_of_the_upstream_is_shared_by_who_wait_for_it_and_by_nobody_else() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{ methods: [GET, POST], key: [body], ttl: 1h }")).await;
    for (turn, ask) in [("one", get("/", "")), ("two", get("/", "")), ("three", post("/", "", "{}"))] {
        let mut clients = JoinSet::new();
        for _ in 0..20 {
            clients.spawn(Wire::ask(proxy.address(), ask.clone()));
        }
        let mut upstream = backend.accept().await;
        upstream.request().await;
        waiting(&proxy, 20).await;
        upstream.send(answer("503 Service Unavailable", "connection: close\r\nretry-after: 7\r\n", turn)).await;
        for failed in clients.join_all().await {
            assert_eq!((failed.status(), failed.text().as_str()), (503, turn));
            assert_eq!(failed.head.get("retry-after"), Some("7"));
            assert!(source(&failed).contains("; detail="), "{failed:?}");
        }
        assert!(backend.accepted().await.is_none(), "an upstream in need is not asked twenty times");
        waiting(&proxy, 0).await;
    }
    // What is not to be shared is not.
    let mut clients = [asking(&proxy, get("/", "")).await, asking(&proxy, get("/", "")).await];
    let mut upstreams = vec![backend.accept_head().await.0];
    waiting(&proxy, 2).await;
    let private = answer("500 Internal Server Error", "connection: close\r\ncache-control: private\r\n", "mine");
    upstreams[0].send(&private).await;
    upstreams.push(backend.accept_head().await.0);
    upstreams[1].send(&private).await;
    for client in &mut clients {
        assert_eq!(client.answer().await.text(), "mine");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_another_variant_gets_its_own() {
    let backend = Recorder::scripted(|_, request| {
        let language = request.head.get("accept-language").unwrap().to_owned();
        ok("cache-control: max-age=600\r\nvary: accept-language\r\n", &language)
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for turn in 0..5 {
        let before = backend.count();
        let mut clients = JoinSet::new();
        for n in 0..40 {
            let address = proxy.address();
            let language = ["de", "en"][n % 2];
            let request = get(&format!("/{turn}"), &format!("accept-language: {language}\r\n"));
            clients.spawn(async move { (language, Wire::ask(address, request).await) });
        }
        for (language, answer) in clients.join_all().await {
            assert_eq!(answer.text(), language);
        }
        assert_eq!(backend.count() - before, 2, "one for each");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_for_the_first_alone_does_not_reach_those_who_read_along() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    let mut first = asking(&proxy, get("/", "")).await;
    let (mut upstream, _) = backend.accept_head().await;
    let fields = "cache-control: max-age=600, no-cache=\"set-cookie\", private=\"x-user\"\r\nset-cookie: a=b\r\nx-user: me\r\nage: 7\r\n";
    upstream.send(format!("HTTP/1.1 200 OK\r\n{fields}content-length: 6\r\n\r\none")).await;
    assert_eq!(first.head().await.get("set-cookie"), Some("a=b"));
    let mut other = asking(&proxy, get("/", "")).await;
    let head = other.head().await;
    assert_eq!((head.get("set-cookie"), head.get("x-user")), (None, None), "{head:?}");
    let age: u64 = head.get("age").unwrap().parse().unwrap();
    assert!((7..60).contains(&age), "{age}");
    upstream.send("two").await;
    for client in [&mut first, &mut other] {
        assert_eq!(client.exactly(6).await, b"onetwo");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_is_read_to_its_end_where_the_operator_wants_it() {
    let backend = Backend::start().await;
    let section = "{ methods: [POST], key: [body], ttl: 1h, record_streams: true, finish_fill: true }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    for with_head in [false, true] {
        let ask = post("/", "x-request-id: left\r\n", &format!("{{\"a\": {with_head}}}"));
        let mut client = asking(&proxy, &ask).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        if with_head {
            upstream.send(STREAM.to_owned() + &chunk(&event(0))).await;
            client.head().await;
            client.leave(false);
        } else {
            client.leave(false);
            upstream.send(STREAM.to_owned() + &chunk(&event(0))).await;
        }
        proxy.access_line("left").await;
        upstream.send(chunk(&event(1)) + END).await;
        eventually("the stream to be stored", async || is_hit(&proxy.ask(&ask).await)).await;
        assert_eq!(proxy.ask(&ask).await.text(), event(0) + &event(1) + DONE);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_kept_is_not_read_to_its_end_for_nobody() {
    let big = "x".repeat(100 << 10);
    for (section, sent) in [
        // Streams are not kept; or not this one, which is too large.
        ("{ ttl: 1h, finish_fill: true }", event(0)),
        ("{ ttl: 1h, finish_fill: true, record_streams: true, max_body: 64KiB }", big),
    ] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        let mut client = asking(&proxy, get("/", "")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(STREAM.to_owned() + &chunk(&sent)).await;
        client.head().await;
        client.exactly(sent.len()).await;
        client.leave(false);
        upstream.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_when_an_answer_lands_does_not_ask_again() {
    let backend = Recorder::answering(ok("cache-control: max-age=600\r\n", "a")).await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    let mut clients = JoinSet::new();
    for _ in 0..20 {
        let address = proxy.address();
        clients.spawn(async move {
            let mut wire = Wire::to(address).await;
            for n in 0..300 {
                wire.send(get(&format!("/{n}"), "")).await;
                assert_eq!(wire.answer().await.text(), "a");
            }
        });
    }
    clients.join_all().await;
    assert_eq!(backend.count(), 300);
}
