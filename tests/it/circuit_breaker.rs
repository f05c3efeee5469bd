//! An endpoint that fails is left alone, tried again with care, and told of truthfully.

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::harness::{Backend, Message, Proxy, Wire, backend::Http2Backend, eventually, within};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
const UNAVAILABLE: &str = "HTTP/1.1 503 Service Unavailable\r\ncontent-length: 5\r\nconnection: close\r\n\r\nnever";
const GET: &str = "GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n";

fn file(settings: &str) -> String {
    format!("upstreams: {{ api: {{ endpoints: [UPSTREAM], circuit_breaker: {{ {settings} }} }} }}")
}

/// Asks once while the backend answers so.
async fn answered(proxy: &Proxy, backend: &Backend, answer: &str) -> Message {
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(answer).await;
    upstream.finish().await;
    client.answer().await
}

async fn breaker(proxy: &Proxy) -> Value {
    proxy.admin_get("/circuit-breakers").await.json()["circuit_breakers"][0].clone()
}

fn refused(answer: &Message) -> bool {
    answer.status() == 503 && answer.json()["type"].as_str().is_some_and(|kind| kind.ends_with("circuit-open"))
}

#[tokio::test(flavor = "multi_thread")]
async fn failures_in_a_row_open_it_and_retry_after_holds_true() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &file("consecutive_failures: 3, recovery: 1s")).await;
    for _ in 0..3 {
        assert_eq!(answered(&proxy, &backend, UNAVAILABLE).await.text(), "never", "what the backend says is passed on");
    }
    let answer = proxy.get("/").await;
    assert!(refused(&answer), "{}", answer.text());
    assert!(backend.accepted().await.is_none(), "the backend was not asked");
    let line = proxy.line("circuit breaker opened").await;
    assert_eq!((&line["upstream"], &line["reason"]), (&json!("api"), &json!("consecutive_failures")), "{line}");
    let shown = breaker(&proxy).await;
    assert_eq!((&shown["state"], &shown["refused"]), (&json!("open"), &json!(1)), "{shown}");
    let labels = format!("upstream=\"api\",endpoint=\"{}\"", shown["endpoint"].as_str().unwrap());
    assert_eq!(proxy.sample(&format!("sidegate_circuit_breaker_state{{{labels}}}")).await, 2);
    assert_eq!(proxy.sample(&format!("sidegate_circuit_breaker_refused_total{{{labels}}}")).await, 1);

    let seconds: u64 = answer.head.get("retry-after").expect("a time").parse().unwrap();
    assert_eq!(seconds, 1);
    tokio::time::sleep(Duration::from_secs(seconds)).await;
    assert_eq!(answered(&proxy, &backend, OK).await.text(), "ok", "after as long as it said");
    proxy.line("circuit breaker closed").await;
    let closed =
        format!("sidegate_circuit_breaker_transitions_total{{{labels},to=\"closed\",reason=\"probes_succeeded\"}}");
    assert_eq!(proxy.sample(&closed).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recovery_is_probed_by_exactly_as_many_as_there_are_permits() {
    let backend = Backend::start().await;
    let settings = file("consecutive_failures: 1, recovery: 200ms, half_open_permits: 3");
    let proxy = Proxy::before(&backend.url(), &settings).await;
    answered(&proxy, &backend, UNAVAILABLE).await;
    eventually("the recovery", async || breaker(&proxy).await["retry_after_seconds"].is_null()).await;

    let mut clients = JoinSet::new();
    for _ in 0..100 {
        let address = proxy.address();
        clients.spawn(async move { Wire::ask(address, GET).await });
    }
    let mut probes = Vec::new();
    for _ in 0..3 {
        probes.push(backend.accept_head().await.0);
    }
    for _ in 0..97 {
        let answer = within("the others", clients.join_next()).await.unwrap().unwrap();
        assert!(refused(&answer), "at once, while the probes are out: {}", answer.text());
    }
    assert!(backend.accepted().await.is_none(), "a fourth");
    assert_eq!(breaker(&proxy).await["probes"], 3);
    for mut probe in probes {
        probe.send(OK).await;
    }
    while let Some(answer) = clients.join_next().await {
        assert_eq!(answer.unwrap().status(), 200);
    }
    assert_eq!(breaker(&proxy).await["state"], "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_probe_whose_client_leaves_gives_its_place_back() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &file("consecutive_failures: 1, recovery: 100ms")).await;
    answered(&proxy, &backend, UNAVAILABLE).await;
    eventually("the recovery", async || breaker(&proxy).await["retry_after_seconds"].is_null()).await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut probe, _) = backend.accept_head().await;
    assert!(refused(&proxy.get("/").await));
    client.leave(true);
    probe.ended().await;
    eventually("the place", async || breaker(&proxy).await["probes"] == 0).await;
    assert_eq!(answered(&proxy, &backend, OK).await.text(), "ok");
    assert_eq!(breaker(&proxy).await["state"], "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_upload_as_the_probe_does_not_keep_the_others_out() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &file("consecutive_failures: 1, recovery: 200ms")).await;
    answered(&proxy, &backend, UNAVAILABLE).await;
    let recovery = async || breaker(&proxy).await["retry_after_seconds"].is_null();
    eventually("the recovery", recovery).await;
    let mut slow = proxy.connect().await;
    slow.send("POST / HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 2\r\n\r\na").await;
    let (mut probe, _) = backend.accept_head().await;
    assert_eq!(probe.exactly(1).await, b"a");
    assert_eq!(breaker(&proxy).await["state"], "half_open");
    eventually("room for another", recovery).await;
    assert_eq!(answered(&proxy, &backend, OK).await.text(), "ok");
    assert_eq!(breaker(&proxy).await["state"], "closed");
    slow.send("b").await;
    assert_eq!(probe.exactly(1).await, b"b");
    probe.send(OK).await;
    assert_eq!(slow.answer().await.text(), "ok");
    assert_eq!(breaker(&proxy).await["state"], "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_counts() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &file("consecutive_failures: 2")).await;
    for _ in 0..2 {
        let mut client = proxy.connect().await;
        client.send(GET).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
        assert_eq!(client.head().await.status(), 200);
        assert_eq!(client.chunk().await.expect("a chunk"), b"half");
        upstream.leave(true);
        client.ended().await;
    }
    assert!(refused(&proxy.get("/").await));
}

/// An upload that breaks off by its client's doing, before the answer to it or within, and what is said of it.
async fn broken_upload(protocol: &str, answered: bool, last: &str, error: &str) {
    let (plain, http2) = (Backend::start().await, Http2Backend::start().await);
    let url = if protocol == "http1" { plain.url() } else { http2.url() };
    let settings = format!(
        "upstreams: {{ api: {{ endpoints: [UPSTREAM], protocol: {protocol}, circuit_breaker: {{ consecutive_failures: 1 }} }} }}
defaults: {{ timeouts: {{ client_body_idle: 300ms }} }}"
    );
    let proxy = Proxy::before(&url, &settings).await;
    let mut client = proxy.connect().await;
    client
        .send("POST / HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: upload\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n")
        .await;
    let (mut wire, mut stream, mut waits) = (None, None, None);
    if protocol == "http1" {
        let (mut upstream, _) = plain.accept_head().await;
        if answered {
            upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
        }
        wire = Some(upstream);
    } else {
        let asked = http2.next().await;
        if answered {
            let body = asked.answer(http::Response::new(()));
            body.data("half").await;
            stream = Some(body);
        } else {
            waits = Some(asked);
        }
    }
    if answered {
        assert_eq!(client.head().await.status(), 200);
        assert_eq!(client.chunk().await.expect("a chunk"), b"half");
    }
    client.send(last).await;
    if answered {
        client.ended().await;
    } else {
        let answer = client.answer().await;
        assert!(answer.text().contains(error), "{protocol}: {}", answer.text());
    }
    let line = proxy.access_line("upload").await;
    assert_eq!(line["error"], error, "{protocol}, {answered}: {line}");
    let shown = breaker(&proxy).await;
    assert_eq!((&shown["state"], &shown["consecutive_failures"]), (&json!("closed"), &json!(0)), "{protocol}: {shown}");
    match (wire, stream, waits) {
        (Some(mut upstream), ..) => drop(upstream.rest().await),
        (_, Some(body), _) => body.cancelled().await,
        (.., Some(mut asked)) => asked.cancelled().await,
        _ => {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_that_its_client_breaks_off_counts_for_nothing_also_within_the_answer() {
    for protocol in ["http2", "http1"] {
        for answered in [false, true] {
            broken_upload(protocol, answered, "zz\r\n", "client-reset").await;
            broken_upload(protocol, answered, "", "client-timeout").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_withholds_its_body_is_not_the_backends_silence() {
    let backend = Backend::start().await;
    let settings =
        file("consecutive_failures: 1") + "\ndefaults: { timeouts: { client_body_idle: 500ms, first_byte: 100ms } }";
    let proxy = Proxy::before(&backend.url(), &settings).await;
    for begun in ["", "a"] {
        let mut client = proxy.connect().await;
        client.send(format!("POST / HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 2\r\n\r\n{begun}")).await;
        let (mut upstream, _) = backend.accept_head().await;
        assert_eq!(client.answer().await.status(), 408);
        upstream.rest().await;
        assert_eq!(breaker(&proxy).await["state"], "closed");
    }
    // One that does not read its request is silent, though there is more of it.
    let mut client = proxy.connect().await;
    client
        .send("POST / HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: unread\r\ncontent-length: 999999999\r\n\r\n")
        .await;
    let (_upstream, _) = backend.accept_head().await;
    let piece = vec![b'x'; 1 << 16];
    within("the connection's end", async { while client.try_send(&piece).await.is_ok() {} }).await;
    assert_eq!(proxy.access_line("unread").await["status"], 504);
    assert_eq!(breaker(&proxy).await["state"], "open");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_backend_opens_it_by_its_timeouts() {
    let backend = Backend::start().await;
    let settings = file("consecutive_failures: 2") + "\ndefaults: { timeouts: { first_byte: 50ms } }";
    let proxy = Proxy::before(&backend.url(), &settings).await;
    for _ in 0..2 {
        assert_eq!(proxy.get("/").await.status(), 504);
    }
    let begun = Instant::now();
    assert!(refused(&proxy.get("/").await));
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_keeps_an_open_breaker_open() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &file("consecutive_failures: 1, recovery: 60s")).await;
    answered(&proxy, &backend, UNAVAILABLE).await;
    let with = |settings: &str| file(settings).replace("UPSTREAM", &backend.url());
    proxy.rewrite(&with("consecutive_failures: 2, recovery: 60s"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert!(refused(&proxy.get("/").await));
    // A shorter limit holds for what is already open.
    proxy.rewrite(&with("consecutive_failures: 2, recovery: 50ms, max_recovery: 50ms"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    eventually("the recovery", async || breaker(&proxy).await["retry_after_seconds"].is_null()).await;
    assert_eq!(answered(&proxy, &backend, OK).await.text(), "ok");

    proxy.rewrite(&format!("upstreams: {{ api: {{ endpoints: [\"{}\"] }} }}", backend.url()));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert_eq!(proxy.admin_get("/circuit-breakers").await.json(), json!({ "circuit_breakers": [] }));
    assert!(!proxy.admin_get("/metrics").await.text().contains("sidegate_circuit_breaker_state{"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_opens_and_resets_it() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &file("recovery: 50ms")).await;
    let answer = proxy.admin_post("/circuit-breakers/api/open").await;
    assert_eq!((answer.status(), &answer.json()["circuit_breakers"][0]["forced"]), (200, &json!(true)));
    let refusal = proxy.get("/").await;
    assert!(refused(&refusal));
    assert_eq!(refusal.head.get("retry-after"), None, "nobody knows when");
    let endpoint = breaker(&proxy).await["endpoint"].as_str().unwrap().to_owned();
    for (path, fields, status) in [
        ("/circuit-breakers/api/reset", "origin: http://evil.example\r\n", 403),
        ("/circuit-breakers/none/reset", "", 404),
        ("/circuit-breakers/api/reset?endpoint=http://127.0.0.1:1", "", 404),
        ("/circuit-breakers/api/reset?all", "", 400),
    ] {
        assert_eq!(proxy.admin_post_with(path, fields).await.status(), status, "{path}");
    }
    assert_eq!(proxy.admin_get("/circuit-breakers/api/reset").await.status(), 405);
    assert_eq!(breaker(&proxy).await["state"], "open");
    let answer = proxy.admin_post(&format!("/circuit-breakers/api/reset?endpoint={endpoint}")).await;
    assert_eq!((answer.status(), &answer.json()["circuit_breakers"][0]["state"]), (200, &json!("closed")));
    assert_eq!(answered(&proxy, &backend, OK).await.text(), "ok");
}
