//! Event streams: they begin with their first event as far as retries are concerned, comments keep them alive, and one
//! that breaks off can say so.

use http::{Request, Response};
use serde_json::{Value, json};

use crate::harness::{Backend, Proxy, Wire, backend::Http2Backend, client, client::Http2Client};

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
    let yaml = "defaults: { retry: { on: [reset, timeout], budget: { floor: 9 } }, timeouts: { first_byte: 300ms } }";
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

// A silent stream is kept alive by comments between its events.

const HEARTBEAT: &str = "defaults: { timeouts: { heartbeat: 60ms } }";
const COMMENT: &str = ":\n\n";

/// Waits for as long as another stream, which has just begun, takes to be kept alive twice.
async fn heartbeats(proxy: &Proxy, backend: &Backend) {
    let mut other = proxy.connect().await;
    other.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(HEAD).await;
    assert_eq!(other.head().await.status(), 200);
    comes(&mut other, COMMENT).await;
    comes(&mut other, COMMENT).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn comments_come_between_events_and_never_within_one() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HEARTBEAT).await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(HEAD).await;
    assert_eq!(client.head().await.status(), 200);
    comes(&mut client, COMMENT).await;
    for (part, ends) in [("data: on", false), ("e\n", false), ("\n", true), ("data: a\r\n", false), ("\r\n", true)] {
        upstream.send(chunk(part)).await;
        let mut come = client.chunk().await.unwrap();
        while come == COMMENT.as_bytes() {
            come = client.chunk().await.unwrap();
        }
        assert_eq!(come, part.as_bytes());
        if ends {
            comes(&mut client, COMMENT).await;
        } else {
            heartbeats(&proxy, &backend).await;
            upstream.send(chunk("x")).await;
            assert_eq!(client.chunk().await.unwrap(), b"x", "nothing was said before");
            upstream.send(chunk("\n")).await;
            comes(&mut client, "\n").await;
        }
    }
    upstream.send("0\r\n\r\n").await;
    while let Some(chunk) = client.chunk().await {
        assert_eq!(chunk, COMMENT.as_bytes());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn comments_reach_an_http2_client_from_an_http2_upstream() {
    let backend = Http2Backend::start().await;
    let yaml = "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }\n".to_owned() + HEARTBEAT;
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    let client = Http2Client::to(proxy.address()).await;
    let (request, answer) = client.begin(Request::get("http://sidegate.test/").body(()).unwrap());
    request.finish();
    let (answer, body) = tokio::join!(answer, async {
        let head = Response::builder().header("content-type", "text/event-stream; charset=utf-8").body(()).unwrap();
        let body = backend.next().await.answer(head);
        body.data("data: one\n\n").await;
        body
    });
    let mut answer = answer.unwrap().into_body();
    assert_eq!(client::data(&mut answer).await.unwrap(), "data: one\n\n");
    assert_eq!(client::data(&mut answer).await.unwrap(), COMMENT);
    assert_eq!(client::data(&mut answer).await.unwrap(), COMMENT);
    drop(answer);
    body.cancelled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_compressed_or_has_a_length_is_untouched() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HEARTBEAT).await;
    for field in ["content-encoding: gzip\r\ntransfer-encoding: chunked", "content-length: 4"] {
        let mut client = proxy.connect().await;
        client.send(GET).await;
        let (mut upstream, _) = backend.accept_head().await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{field}\r\n\r\n");
        upstream.send(head).await;
        assert_eq!(client.head().await.status(), 200);
        heartbeats(&proxy, &backend).await;
        if field.starts_with("content-length") {
            upstream.send(":\n\n\n").await;
            assert_eq!(client.exactly(4).await, b":\n\n\n");
        } else {
            upstream.send(chunk("\x1f")).await;
            assert_eq!(client.chunk().await.unwrap(), b"\x1f");
        }
    }
}

// A stream that breaks off can say so.

/// The stream of a request to `path` on an upstream that says this and then nothing more: what the client gets until it
/// ends, and whether it ends in order.
async fn left_silent(proxy: &Proxy, backend: &Backend, path: &str, said: &str) -> (String, bool) {
    let mut client = proxy.connect().await;
    let id = path.rsplit('/').next().unwrap();
    let fields = format!("host: sidegate.test\r\nx-request-id: {id}\r\nconnection: close\r\n\r\n");
    client.send(format!("GET {path} HTTP/1.1\r\n{fields}")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(HEAD.to_owned() + &chunk(said)).await;
    let head = client.head().await;
    assert_eq!((head.status(), head.get("transfer-encoding")), (200, Some("chunked")));
    let (rest, _) = client.rest().await;
    upstream.ended().await;
    let mut text = String::from_utf8(rest).unwrap();
    let whole = text.ends_with("0\r\n\r\n");
    if whole {
        text.truncate(text.len() - 5);
    }
    let mut data = String::new();
    let mut rest = &*text;
    while let Some((length, after)) = rest.split_once("\r\n") {
        let (chunk, after) = after.split_at(usize::from_str_radix(length, 16).unwrap());
        data += chunk;
        rest = after.strip_prefix("\r\n").unwrap();
    }
    (data, whole)
}

const ERROR_EVENT: &str = "\
defaults: { timeouts: { idle: 200ms, sse_error_event: true } }
routes:
  - { upstream: api }
  - { upstream: api, match: { path: /v1/* }, errors: openai }
  - { upstream: api, match: { path: /kept-alive }, timeouts: { idle: 300ms, heartbeat: 60ms, sse_error_event: true } }
  - { upstream: api, match: { path: /total }, timeouts: { total: 200ms, total_streams: true, sse_error_event: true } }
  - { upstream: api, match: { path: /plain }, timeouts: { idle: 200ms } }";

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_falls_silent_or_takes_too_long_ends_with_an_error_event() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), ERROR_EVENT).await;
    let event = |said: &str| -> Value {
        let event = said.strip_prefix("data: one\n\nevent: error\ndata: ").unwrap_or_else(|| panic!("{said:?}"));
        serde_json::from_str(event.strip_suffix("\n\n").unwrap()).unwrap()
    };

    let (said, whole) = left_silent(&proxy, &backend, "/a", "data: one\n\n").await;
    let expected = json!({
        "type": "urn:sidegate:problem:upstream-timeout", "title": "Gateway Timeout", "status": 504,
        "detail": "the upstream did not answer in time", "instance": "/a", "request_id": "a",
    });
    assert_eq!((event(&said), whole), (expected, true));
    let line = proxy.access_line("a").await;
    assert_eq!((&line["error"], &line["aborted_by"]), (&json!("upstream-timeout"), &json!("timeout")), "{line}");

    let (said, whole) = left_silent(&proxy, &backend, "/total", "data: one\n\n").await;
    assert_eq!((&event(&said)["type"], whole), (&json!("urn:sidegate:problem:deadline-exceeded"), true));

    let (said, whole) = left_silent(&proxy, &backend, "/v1/b", "data: one\n\n").await;
    let expected = json!({
        "message": "the upstream did not answer in time", "type": "server_error", "param": null,
        "code": "upstream-timeout",
    });
    assert_eq!((&event(&said)["error"], whole), (&expected, true));
}

#[tokio::test(flavor = "multi_thread")]
async fn comments_do_not_hold_off_the_end_of_a_silent_stream() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), ERROR_EVENT).await;
    let (said, whole) = left_silent(&proxy, &backend, "/kept-alive", "data: one\n\n").await;
    let (comments, _) = said.strip_prefix("data: one\n\n").unwrap().split_once("event: error\n").unwrap();
    assert!(comments.len() >= COMMENT.len() && comments.len() <= 5 * COMMENT.len(), "{comments:?}");
    assert_eq!((comments.replace(COMMENT, ""), whole), (String::new(), true));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_off_inside_an_event_is_broken_off() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), ERROR_EVENT).await;
    for half in ["data: half", "data: one\n\nevent: a\ndata: {}\n"] {
        assert_eq!(left_silent(&proxy, &backend, "/c", half).await, (half.to_owned(), false));
    }
    let whole = "data: one\n\n";
    assert_eq!(left_silent(&proxy, &backend, "/plain", whole).await, (whole.to_owned(), false), "it was not asked for");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_whose_upstream_dies_ends_with_an_error_event_for_an_http2_client_too() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), ERROR_EVENT).await;
    let client = Http2Client::to(proxy.address()).await;
    let (request, answer) = client.begin(Request::get("http://sidegate.test/").body(()).unwrap());
    request.finish();
    let (answer, upstream) = tokio::join!(answer, async {
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(HEAD.to_owned() + &chunk("data: one\n\n")).await;
        upstream
    });
    let mut answer = answer.unwrap().into_body();
    assert_eq!(client::data(&mut answer).await.unwrap(), "data: one\n\n");
    upstream.leave(true);
    let event = client::data(&mut answer).await.unwrap();
    assert!(event.starts_with(b"event: error\ndata: {") && event.ends_with(b"\n\n"), "{event:?}");
    assert!(str::from_utf8(&event).unwrap().contains("urn:sidegate:problem:upstream-reset"), "{event:?}");
    assert_eq!(client::data(&mut answer).await, None);
}
