//! What an upstream failed to serve is served by the next attempt, where that can do no harm, and failure is not
//! amplified.

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use tokio::{net::TcpListener, sync::Barrier, task::JoinSet};

use crate::harness::{Backend, Ending, Proxy, Wire, eventually, figure};

const RETRY: &str = "defaults: { retry: {} }";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\nconnection: close\r\n\r\nnever";

fn head(start: &str, fields: &str) -> String {
    format!("{start} HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: retry-1\r\n{fields}\r\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_is_asked_again_after_a_failure() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), RETRY).await;
    for failure in ["status", "reset"] {
        let mut client = proxy.connect().await;
        client.send(head("GET /a?b", "")).await;
        let (mut first, _) = backend.accept_head().await;
        match failure {
            "status" => first.send(UNAVAILABLE).await,
            _ => first.leave(true),
        }
        let (mut second, again) = backend.accept_head().await;
        assert_eq!((again.start.as_str(), again.get("x-request-id")), ("GET /a?b HTTP/1.1", Some("retry-1")));
        second.send(OK).await;
        assert_eq!(client.answer().await.text(), "ok", "after a {failure}");
        assert_eq!(backend.accepted().await.map(|_| ()), None);
    }
    let line = proxy.access_line("retry-1").await;
    assert_eq!((&line["retries"], &line["status"], &line["error"]), (&1.into(), &200.into(), &().into()), "{line}");
    assert_eq!(proxy.sample(r#"sidegate_retries_total{upstream="api",outcome="answered"}"#).await, 2);
}

/// A backend that answers once it has so many connections, and then no more: it reads a request and ends the connection
/// as `dying` does. With how many requests it did that.
async fn mortal<F>(
    connections: usize,
    tasks: &mut JoinSet<()>,
    dying: impl Fn(Wire) -> F + Clone + Send + 'static,
) -> (SocketAddr, Arc<AtomicU64>)
where
    F: Future<Output = ()> + Send,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (all, deaths) = (Arc::new(Barrier::new(connections)), Arc::new(AtomicU64::new(0)));
    let counted = deaths.clone();
    tasks.spawn(async move {
        let mut wires = JoinSet::new();
        for turn in 0.. {
            let Ok((stream, _)) = listener.accept().await else { return };
            let (all, counted, dying) = (all.clone(), counted.clone(), dying.clone());
            wires.spawn(async move {
                let mut wire = Wire::new(stream);
                if turn < connections {
                    wire.head().await;
                    all.wait().await;
                    wire.send(OK).await;
                }
                if wire.another().await {
                    wire.head().await;
                    counted.fetch_add(1, Ordering::Relaxed);
                    dying(wire).await;
                }
            });
        }
    });
    (address, deaths)
}

/// Three at a time, so that there are three pooled connections.
async fn three(proxy: &Proxy) {
    let get = async || assert_eq!(proxy.get("/").await.status(), 200);
    tokio::join!(get(), get(), get());
}

const REPEATED: &str = r#"sidegate_upstream_attempts_total{upstream="api",endpoint="ENDPOINT",outcome="repeated"}"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_meets_a_closed_connection_is_repeated_once_whatever_the_retries() {
    let mut tasks = JoinSet::new();
    let (address, deaths) = mortal(3, &mut tasks, async |_| {}).await;
    let file = "defaults: { retry: { attempts: 3, on: [reset], backoff: { base: 1ms } } }";
    let proxy = Proxy::before(&format!("http://{address}"), file).await;
    three(&proxy).await;
    assert_eq!(proxy.ask(head("GET /", "")).await.status(), 502);
    assert_eq!(deaths.load(Ordering::Relaxed), 4, "three attempts, and the repetition");
    assert_eq!(proxy.access_line("retry-1").await["retries"], 3);
    assert_eq!(proxy.sample(&REPEATED.replace("ENDPOINT", &address.to_string())).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_the_upstream_began_to_answer_or_to_work_on_is_not_repeated() {
    let mut tasks = JoinSet::new();
    let began = mortal(3, &mut tasks, async |mut wire: Wire| wire.send("HTTP/1.1 200 OK\r\ncont").await).await;
    let worked = mortal(3, &mut tasks, async |_| tokio::time::sleep(Duration::from_secs(1)).await).await;
    for (address, deaths) in [began, worked] {
        let proxy = Proxy::before(&format!("http://{address}"), "").await;
        three(&proxy).await;
        assert_eq!(proxy.ask(head("GET /", "")).await.status(), 502);
        assert_eq!(deaths.load(Ordering::Relaxed), 1);
        assert_eq!(proxy.sample(&REPEATED.replace("ENDPOINT", &address.to_string())).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_there_is_asked_again_whatever_the_method() {
    let nowhere = Backend::nowhere().await;
    let proxy = Proxy::before(&nowhere, "defaults: { retry: { attempts: 3 } }").await;
    for start in ["GET /", "POST /"] {
        let answer = proxy.ask(head(start, "content-length: 2\r\n") + "ab").await;
        assert_eq!(answer.status(), 502, "{start}");
    }
    assert_eq!(proxy.sample(r#"sidegate_retries_total{upstream="api",outcome="failed"}"#).await, 3, "the floor");
    assert_eq!(proxy.sample(r#"sidegate_retries_not_made_total{upstream="api",reason="budget"}"#).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_that_was_sent_is_not_sent_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), RETRY).await;
    for reset in [false, true] {
        let mut client = proxy.connect().await;
        client.send(head("POST /", "content-length: 4\r\n") + "once").await;
        let mut upstream = backend.accept().await;
        assert_eq!(upstream.request().await.text(), "once");
        if reset {
            upstream.leave(true);
        } else {
            upstream.send(UNAVAILABLE).await;
        }
        assert_eq!(client.answer().await.status(), if reset { 502 } else { 503 });
        assert!(backend.accepted().await.is_none(), "zero times again");
    }
    assert_eq!(proxy.access_line("retry-1").await["retries"], serde_json::Value::Null);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_length_and_its_trailers_are_sent_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), RETRY).await;
    let mut client = proxy.connect().await;
    client.send(head("PUT /", "transfer-encoding: chunked\r\ntrailer: x-sum\r\n") + "4\r\nhalf\r\n").await;
    let (mut first, _) = backend.accept_head().await;
    assert_eq!(first.chunk().await.expect("a chunk"), b"half");
    first.leave(true);
    let (mut second, _) = backend.accept_head().await;
    assert_eq!(second.chunk().await.expect("what was kept"), b"half");
    client.send("5\r\n and \r\n4\r\nhalf\r\n0\r\nx-sum: 13\r\n\r\n").await;
    let mut rest = Vec::new();
    while let Some(chunk) = second.chunk().await {
        rest.extend(chunk);
    }
    assert_eq!(rest, b" and half");
    second.send(OK).await;
    assert_eq!(client.answer().await.text(), "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_large_is_sent_and_not_sent_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { retry: { replay: 1KiB } }").await;
    let large = "x".repeat(1025);
    let mut client = proxy.connect().await;
    client.send(head("PUT /", "content-length: 1025\r\n") + &large).await;
    let mut upstream = backend.accept().await;
    assert_eq!(upstream.request().await.text(), large);
    upstream.send(UNAVAILABLE).await;
    assert_eq!(client.answer().await.text(), "never", "the failure itself is passed on");
    assert!(backend.accepted().await.is_none());
    assert_eq!(proxy.sample(r#"sidegate_retries_not_made_total{upstream="api",reason="body"}"#).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offered_body_is_not_offered_again_once_it_is_there() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), RETRY).await;
    let mut client = proxy.connect().await;
    client.send(head("PUT /", "content-length: 4\r\nexpect: 100-continue\r\n")).await;
    let (mut first, offered) = backend.accept_head().await;
    assert_eq!(offered.get("expect"), Some("100-continue"));
    first.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 100);
    client.send("body").await;
    assert_eq!(first.exactly(4).await, b"body");
    first.leave(true);
    let (mut second, offered) = backend.accept_head().await;
    assert_eq!(offered.get("expect"), None);
    assert_eq!(second.exactly(4).await, b"body");
    second.send(OK).await;
    assert_eq!(client.answer().await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_is_not_asked_for_again() {
    let backend = Backend::start().await;
    let file = "defaults: { retry: { backoff: { base: 5s, max: 5s, max_retry_after: 10s } } }";
    let proxy = Proxy::before(&backend.url(), file).await;
    let mut client = proxy.connect().await;
    client.send(head("GET /", "")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 503 x\r\nretry-after: 10\r\ncontent-length: 5\r\n\r\n").await;
    // It is closed because the rest of the answer, which never comes, is not waited for.
    assert_ne!(upstream.rest().await.1, Ending::Reset);
    client.leave(true);
    let line = proxy.access_line("retry-1").await;
    assert_eq!((&line["aborted_by"], &line["retries"]), (&"client".into(), &().into()), "{line}");
    assert!(backend.accepted().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_begun_is_never_begun_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), RETRY).await;
    let mut client = proxy.connect().await;
    client.send(head("GET /", "")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
    assert_eq!(client.head().await.status(), 200);
    assert_eq!(client.exactly(4).await, b"half");
    upstream.leave(true);
    client.ended().await;
    assert!(backend.accepted().await.is_none());
}

/// How a backend fails.
#[derive(Debug, Clone, Copy)]
enum Failure {
    Answers503,
    Closes,
    Hangs,
}

/// A backend that fails every request, and how often it was asked.
async fn failing(how: Failure, tasks: &mut JoinSet<()>) -> (SocketAddr, Arc<AtomicU64>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let asked = Arc::new(AtomicU64::new(0));
    let count = asked.clone();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let count = count.clone();
            connections.spawn(async move {
                let mut wire = Wire::new(stream);
                while wire.another().await {
                    wire.request().await;
                    count.fetch_add(1, Ordering::Relaxed);
                    let answer = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n";
                    match how {
                        Failure::Answers503 if wire.try_send(answer).await.is_ok() => {}
                        Failure::Answers503 | Failure::Closes => return,
                        Failure::Hangs => drop(wire.rest().await),
                    }
                }
            });
        }
    });
    (address, asked)
}

#[tokio::test(flavor = "multi_thread")]
async fn total_failure_is_not_amplified() {
    for (how, clients, each) in [(Failure::Answers503, 20, 100), (Failure::Closes, 20, 50), (Failure::Hangs, 100, 4)] {
        amplified(how, clients, each).await;
    }
}

async fn amplified(how: Failure, clients: u64, each: u64) {
    let mut tasks = JoinSet::new();
    let (address, asked) = failing(how, &mut tasks).await;
    let file = "defaults: { retry: { attempts: 4, on: [connect, reset, timeout, 503], backoff: { base: 1ms } }, \
                timeouts: { first_byte: 100ms } }";
    let proxy = Proxy::before(&format!("http://{address}"), file).await;
    join_all((0..clients).map(async |_| {
        let mut client = proxy.connect().await;
        for _ in 0..each {
            client.send("GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n").await;
            assert!(client.answer().await.status() >= 502);
        }
    }))
    .await;
    let (clients, upstream) = (clients * each, asked.load(Ordering::Relaxed));
    figure(&format!("total failure ({how:?}): {upstream} upstream requests for {clients} of clients"));
    assert!(upstream * 10 <= clients * 12, "{upstream} for {clients}");
    assert!(upstream > clients, "there are retries");
    eventually("the budget to be counted", async || {
        proxy.sample(r#"sidegate_retries_not_made_total{upstream="api",reason="budget"}"#).await > 0
    })
    .await;
}
