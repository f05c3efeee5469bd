//! Event streams: they begin with their first event as far as retries are concerned, comments keep them alive, and one
//! that breaks off can say so.

use serde_json::{Value, json};

use crate::harness::{Backend, Proxy, Wire};

const GET: &str = "GET /stream HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: sse-1\r\n\r\n";
const HEAD: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// Reads chunks until `expected` has come; nothing else may.
async fn comes(client: &mut Wire, expected: &str) {
    let mut come = String::new();
    while come.len() < expected.len() {
        let part = client.chunk().await.unwrap_or_else(|| panic!("the stream ended after {come:?}"));
        come += str::from_utf8(&part).unwrap();
    }
    assert_eq!(come, expected);
}

// While somebody can still step in, a stream has begun with its first event and not with its head.

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_before_its_first_event_is_asked_again() {
    let backend = Backend::start().await;
    let yaml =
        "defaults: { retry: { on: [reset, timeout], budget: { min_in_flight: 9 } }, timeouts: { first_byte: 300ms } }";
    let proxy = Proxy::before(&backend.url(), yaml).await;
    for failure in ["end", "reset", "error event", "error object", "silence"] {
        let mut client = proxy.connect().await;
        client.send(GET).await;
        let (mut first, _) = backend.accept_head().await;
        first.send(HEAD.to_owned() + &chunk(": loading\n\n") + &chunk("data: {\"half\":")).await;
        match failure {
            "end" => first.send("0\r\n\r\n").await,
            "reset" => drop(first),
            "error event" => first.send(chunk("}\nevent: error\n\n")).await,
            "error object" => first.send(chunk("1, \"error\": {\"code\": 500}}\r\n\r\n")).await,
            _ => first.send(chunk("\n: still loading\n")).await,
        }
        let (mut second, _) = backend.accept_head().await;
        second.send(HEAD.to_owned() + &chunk("data: one\n\n")).await;
        let head = client.head().await;
        assert_eq!((head.status(), head.get("x-accel-buffering")), (200, Some("no")), "{failure}");
        comes(&mut client, "data: one\n\n").await;
        second.send(chunk("data: two\n\n") + "0\r\n\r\n").await;
        comes(&mut client, "data: two\n\n").await;
        assert_eq!(client.chunk().await, None, "{failure}: nothing of the first attempt is seen");
    }
    assert_eq!(proxy.sample(r#"sidegate_retries_total{upstream="api",outcome="answered"}"#).await, 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_fails_after_its_first_event_is_broken_off() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { retry: {} }").await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(HEAD.to_owned() + &chunk("data: one\n\n")).await;
    assert_eq!(client.head().await.status(), 200);
    comes(&mut client, "data: one\n\n").await;
    drop(upstream);
    let (rest, _) = client.rest().await;
    assert_eq!(rest, b"", "without a last chunk");
    let line = proxy.access_line("sse-1").await;
    assert_eq!((&line["error"], &line["aborted_by"]), (&json!("upstream-reset"), &json!("upstream")), "{line}");
    assert!(backend.accepted().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn where_nobody_is_left_the_backend_s_own_error_event_arrives() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { retry: {} }").await;
    let error = "event: error\ndata: {\"message\": \"no memory\"}\n\n";
    let mut client = proxy.connect().await;
    client.send(GET).await;
    for _ in 0..2 {
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(HEAD.to_owned() + &chunk(error) + "0\r\n\r\n").await;
    }
    assert_eq!(client.answer().await.text(), error);
    // What must not be repeated is never held back.
    client.send("POST /stream HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 0\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(HEAD).await;
    assert_eq!(client.head().await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_while_a_stream_is_held_back_takes_its_request_with_it() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { retry: {} }").await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(HEAD.to_owned() + &chunk(": loading\n\n")).await;
    drop(client);
    upstream.ended().await;
    let line = proxy.access_line("sse-1").await;
    assert_eq!((&line["aborted_by"], &line["error"]), (&json!("client"), &Value::Null), "{line}");
    assert!(backend.accepted().await.is_none(), "it is not asked again");
}
