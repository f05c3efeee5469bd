//! What sidegate answers for itself: each slug is produced, looks as it should, and tells nothing that is not the
//! client's business.

use http::Request;
use http_body_util::BodyExt;
use serde_json::{Value, json};

use crate::harness::{
    Backend, Message, Proxy, Wire,
    backend::{Http2Backend, Recorder},
    client::Http2Client,
    within,
};

/// Stands in a header and in the query of every request here, and must not come back.
const SECRET: &str = "hunter2";

/// The head of a request with an id, a secret in a header and one in the query.
fn head(start: &str, fields: &str) -> String {
    let (method, path) = start.split_once(' ').unwrap();
    format!(
        "{method} {path}?token={SECRET} HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: err-1\r\n\
         authorization: Bearer {SECRET}\r\n{fields}\r\n"
    )
}

fn get() -> String {
    head("GET /some/path", "")
}

fn many_fields(count: usize) -> String {
    let fields: Vec<_> = (0..count).map(|i| format!("x-{i}: {i}\r\n")).collect();
    fields.concat()
}

/// Checks all that the problems of sidegate have in common.
fn is_problem(answer: &Message, status: u16, slug: &str, proxy_status: &str) {
    let head = &answer.head;
    assert_eq!(answer.status(), status, "{answer:?}");
    assert_eq!(head.get("content-type"), Some("application/problem+json"), "{head:?}");
    let problem = answer.json();
    assert_eq!(problem["type"], format!("urn:sidegate:problem:{slug}"), "{problem}");
    assert_eq!((&problem["status"], &problem["request_id"]), (&json!(status), &json!("err-1")), "{problem}");
    assert!(problem["title"].as_str().is_some_and(|title| !title.is_empty()), "{problem}");
    assert!(problem["detail"].as_str().is_some_and(|detail| detail.len() > 10), "{problem}");
    assert!(problem["instance"].as_str().is_some_and(|path| path.starts_with('/')), "{problem}");
    assert_eq!(head.get("x-request-id"), Some("err-1"));
    assert_eq!(head.get("proxy-status"), Some(&*format!("sidegate; error={proxy_status}")));
    assert_eq!(head.get("cache-control"), Some("no-store"));
    assert_eq!(head.get("x-content-type-options"), Some("nosniff"), "errors have the security headers too");
    assert_eq!(head.get("server"), None);
    leaks_nothing(answer);
}

/// No value of a header or of the query, no address, and nothing of what a library said of the cause.
fn leaks_nothing(answer: &Message) {
    let said = format!("{:?}{}", answer.head, answer.text());
    for leak in [SECRET, "127.0.0.1", "localhost", "os error", "hyper", "refused", "rustls", "backend.invalid"] {
        assert!(!said.contains(leak), "{leak} in {said}");
    }
}

/// The answer to `request` of a proxy before nothing, and what its log knows of it.
async fn refused(yaml: &str, request: impl AsRef<[u8]>) -> (Message, Value) {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), yaml).await;
    let answer = proxy.ask(request).await;
    assert!(backend.requests().is_empty(), "nothing goes upstream");
    let line = proxy.access_line("err-1").await;
    assert!(!line.to_string().contains(SECRET), "{line}");
    (answer, line)
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_request() {
    let (answer, line) = refused("", head("POST /some/path", "host: another.test\r\n")).await;
    is_problem(&answer, 400, "bad-request", "http_request_error");
    assert_eq!(line["error"], "bad-request");
}

#[tokio::test(flavor = "multi_thread")]
async fn uri_too_long() {
    let path = format!("GET /{}", "a".repeat(17 << 10));
    let (answer, line) = refused("", head(&path, "")).await;
    is_problem(&answer, 414, "uri-too-long", "http_request_error");
    assert_eq!(line["error"], "uri-too-long");
}

#[tokio::test(flavor = "multi_thread")]
async fn headers_too_large_by_number_and_by_size() {
    let many = many_fields(110);
    let large = format!("x-large: {}\r\n", "a".repeat(66 << 10));
    for fields in [many, large] {
        let (answer, line) = refused("", head("GET /some/path", &fields)).await;
        is_problem(&answer, 431, "headers-too-large", "http_request_error");
        assert_eq!(line["error"], "headers-too-large");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_beyond_any_measure_are_not_even_read() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let many = many_fields(5000);
    let large = format!("x-large: {}\r\n", "a".repeat(4 << 20));
    for (start, fields) in [("GET /".to_owned(), &many), ("GET /".to_owned(), &large), (format!("GET /{large}"), &many)]
    {
        let mut client = proxy.connect().await;
        let request = head(start.trim_end(), fields);
        // It stops reading, so it may take less than all.
        client.try_send(request).await.ok();
        let (answer, _) = client.rest().await;
        let answer = String::from_utf8_lossy(&answer).into_owned();
        assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
    }
    assert!(backend.requests().is_empty());
    assert_eq!(proxy.get("/").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn loop_detected() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    assert_eq!(proxy.get("/").await.status(), 200);
    let request = backend.only();
    let via = request.head.get("via").expect("Via names the proxy");
    let answer = proxy.ask(head("GET /some/path", &format!("via: 1.0 other, {via}\r\n"))).await;
    is_problem(&answer, 508, "loop-detected", "proxy_loop_detected");
    assert_eq!(backend.requests().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_proxy_before_itself_does_not_spin() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("self.sock");
    let url = format!("unix:{}", socket.display());
    let proxy = Proxy::before(&url, "listen: [\"127.0.0.1:0\", \"UPSTREAM\"]").await;
    let answer = proxy.ask(get()).await;
    is_problem(&answer, 508, "loop-detected", "proxy_loop_detected");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_route() {
    let (answer, line) = refused("routes: [{ match: { path: /only }, upstream: api }]", get()).await;
    is_problem(&answer, 404, "no-route", "destination_not_found");
    assert_eq!(answer.json()["instance"], "/some/path");
    assert_eq!(line["error"], "no-route");
}

const LIMITED: &str = "defaults: { body_limit: { max: 10B } }";

#[tokio::test(flavor = "multi_thread")]
async fn body_too_large_by_what_is_announced() {
    let (answer, line) = refused(LIMITED, head("POST /some/path", "content-length: 11\r\n")).await;
    is_problem(&answer, 413, "body-too-large", "http_request_error");
    assert_eq!(line["error"], "body-too-large");
}

#[tokio::test(flavor = "multi_thread")]
async fn body_too_large_by_what_arrives() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), LIMITED).await;
    let mut client = proxy.connect().await;
    client.send(head("POST /some/path", "transfer-encoding: chunked\r\n")).await;
    let (mut upstream, _) = backend.accept_head().await;
    client.send("a\r\n0123456789\r\n").await;
    assert_eq!(upstream.chunk().await.unwrap(), b"0123456789", "what is within the limit passes as it comes");
    client.send("1\r\nx\r\n").await;
    is_problem(&client.answer().await, 413, "body-too-large", "http_request_error");
    let (rest, _) = upstream.rest().await;
    assert!(rest.is_empty(), "the upstream never sees it as complete: {}", rest.escape_ascii());
}

#[tokio::test(flavor = "multi_thread")]
async fn client_timeout() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { client_body_idle: 200ms } }").await;
    let mut client = proxy.connect().await;
    client.send(format!("{}half", head("POST /some/path", "content-length: 8\r\n"))).await;
    let (mut upstream, _) = backend.accept_head().await;
    is_problem(&client.answer().await, 408, "client-timeout", "http_request_error");
    upstream.rest().await;
    client.ended().await;
    assert_eq!(proxy.access_line("err-1").await["error"], "client-timeout");
}

#[tokio::test(flavor = "multi_thread")]
async fn client_reset() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(format!("{}5\r\nhelloX", head("POST /some/path", "transfer-encoding: chunked\r\n"))).await;
    // How much of it went upstream before the fault was found is a matter of luck.
    let mut upstream = backend.accept().await;
    is_problem(&client.answer().await, 400, "client-reset", "http_request_error");
    let (rest, _) = upstream.rest().await;
    assert!(!rest.ends_with(b"0\r\n\r\n"), "{}", rest.escape_ascii());
}

#[tokio::test(flavor = "multi_thread")]
async fn connect_failed() {
    for url in [Backend::nowhere().await, "http://backend.invalid:80".to_owned(), "unix:/nowhere/at/all".to_owned()] {
        let proxy = Proxy::before(&url, "").await;
        is_problem(&proxy.ask(get()).await, 502, "connect-failed", "destination_unavailable");
        let line = proxy.access_line("err-1").await;
        assert_eq!((&line["error"], &line["aborted_by"]), (&json!("connect-failed"), &Value::Null), "{line}");
        assert!(line["cause"].as_str().is_some_and(|cause| cause.len() > 20), "the log knows the cause: {line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_reset() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for said in ["", "HTTP/1.1 200 OK\r\ncontent-le", "SSH-2.0-OpenSSH_9.9\r\n", "HTTP/1.1 200 OK\r\nx: \x01\r\n\r\n"] {
        let mut client = proxy.connect().await;
        client.send(get()).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(said).await;
        drop(upstream);
        is_problem(&client.answer().await, 502, "upstream-reset", "http_response_incomplete");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn upstream_timeout() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { first_byte: 200ms } }").await;
    let mut client = proxy.connect().await;
    client.send(get()).await;
    let (mut upstream, _) = backend.accept_head().await;
    is_problem(&client.answer().await, 504, "upstream-timeout", "http_response_timeout");
    upstream.ended().await;
    assert_eq!(proxy.access_line("err-1").await["error"], "upstream-timeout");
}

#[tokio::test(flavor = "multi_thread")]
async fn deadline_exceeded() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { total: 200ms } }").await;
    let mut client = proxy.connect().await;
    client.send(get()).await;
    let (mut upstream, _) = backend.accept_head().await;
    is_problem(&client.answer().await, 504, "deadline-exceeded", "http_response_timeout");
    upstream.ended().await;

    // Within a response that is no stream, it is too late for an answer.
    let mut client = proxy.connect().await;
    client.send(get()).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nhalf").await;
    assert_eq!(client.head().await.status(), 200);
    assert_eq!(client.rest().await.0, b"half");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_may_speak_openai() {
    let url = Backend::nowhere().await;
    let proxy = Proxy::before(
        &url,
        "routes: [{ match: { path: \"/v1/*\" }, upstream: api, errors: openai }, { upstream: api }]",
    )
    .await;
    let answer = proxy.ask(head("POST /v1/chat/completions", "content-length: 0\r\n")).await;
    assert_eq!((answer.status(), answer.head.get("content-type")), (502, Some("application/json")));
    let error = &answer.json()["error"];
    assert_eq!((&error["code"], &error["type"]), (&json!("connect-failed"), &json!("server_error")));
    assert!(error["message"].as_str().is_some_and(|message| message.contains("reached")), "{error}");
    assert_eq!(answer.json()["request_id"], "err-1");
    assert_eq!(answer.head.get("x-request-id"), Some("err-1"));
    assert_eq!(answer.head.get("x-content-type-options"), Some("nosniff"));
    leaks_nothing(&answer);
    is_problem(&proxy.ask(get()).await, 502, "connect-failed", "destination_unavailable");
}

#[tokio::test(flavor = "multi_thread")]
async fn openai_may_be_the_default_and_blames_the_client_where_it_is_to_blame() {
    let (answer, _) =
        refused("defaults: { errors: openai }\nroutes: [{ match: { path: /only }, upstream: api }]", get()).await;
    let error = &answer.json()["error"];
    assert_eq!((answer.status(), &error["code"]), (404, &json!("no-route")));
    assert_eq!(error["type"], "invalid_request_error");
    leaks_nothing(&answer);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_call_is_told_in_trailers_only() {
    let url = Backend::nowhere().await;
    let proxy = Proxy::before(&url, "").await;
    let client = Http2Client::to(proxy.address()).await;
    let call = Request::post("http://sidegate.test/pkg.Service/Method").header("content-type", "application/grpc");
    let answer = client.ask(call.header("te", "trailers").body(()).unwrap()).await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.headers()["content-type"], "application/grpc");
    assert_eq!(answer.headers()["grpc-status"], "14", "UNAVAILABLE");
    assert!(answer.headers()["grpc-message"].to_str().unwrap().contains("reached"));
    assert!(answer.headers().contains_key("x-request-id"));
    let body = within("the end", answer.into_body().collect()).await.unwrap();
    assert!(body.trailers().is_none() && body.to_bytes().is_empty(), "the head is all there is");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_upstream_that_refuses_or_goes_is_an_upstreams_failure() {
    let backend = Http2Backend::start().await;
    let proxy =
        Proxy::before(&backend.url(), "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }").await;
    let mut client = proxy.connect().await;
    client.send(get()).await;
    let exchange = backend.next().await;
    drop(exchange);
    drop(backend);
    is_problem(&client.answer().await, 502, "upstream-reset", "http_response_incomplete");

    // A backend that speaks HTTP/1.1 only.
    let backend = Backend::start().await;
    let proxy =
        Proxy::before(&backend.url(), "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }").await;
    let mut client = proxy.connect().await;
    client.send(get()).await;
    let mut upstream = backend.accept().await;
    upstream.arrival().await;
    upstream.send("HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await;
    drop(upstream);
    let answer = client.answer().await;
    assert_eq!(answer.status(), 502, "{answer:?}");
    leaks_nothing(&answer);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_request_gets_the_head_of_its_error() {
    let url = Backend::nowhere().await;
    let proxy = Proxy::before(&url, "").await;
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        // Only the head is read: a body would stand before the next answer.
        client.send(head("HEAD /some/path", "")).await;
        let answer = client.head().await;
        assert_eq!((answer.status(), answer.get("content-type")), (502, Some("application/problem+json")));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_leaves_the_framing_in_no_doubt_keeps_the_connection() {
    let url = Backend::nowhere().await;
    let proxy = Proxy::before(&url, "").await;
    let mut client: Wire = proxy.connect().await;
    for _ in 0..3 {
        client.send(get()).await;
        is_problem(&client.answer().await, 502, "connect-failed", "destination_unavailable");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_could_forge_a_log_line_is_replaced_and_a_missing_one_made() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for (given, kept) in [
        (Some("abc-1_.~+/=".to_owned()), true),
        (Some("a b".to_owned()), false),
        (Some("a\"b".to_owned()), false),
        (Some("\u{e9}".to_owned()), false),
        (Some("a".repeat(128)), true),
        (Some("a".repeat(129)), false),
        (Some("a".repeat(10 << 10)), false),
        (Some("a, b".to_owned()), false),
        (Some(String::new()), false),
        (None, false),
    ] {
        let before = backend.requests().len();
        let field = given.as_ref().map(|id| format!("x-request-id: {id}\r\n")).unwrap_or_default();
        let answer = proxy.ask(format!("GET / HTTP/1.1\r\nhost: a\r\n{field}\r\n")).await;
        let id = answer.head.get("x-request-id").expect("every answer has an id").to_owned();
        assert_eq!(given.as_ref() == Some(&id), kept, "{given:?} became {id}");
        if !kept {
            assert_eq!(id.len(), 36, "a UUID: {id}");
        }
        assert_eq!(backend.requests()[before].head.get("x-request-id"), Some(&*id), "the same upstream");
    }
    let answer = proxy.ask("GET / HTTP/1.1\r\nhost: a\r\nx-request-id: one\r\nx-request-id: two\r\n\r\n").await;
    assert_eq!(answer.head.get("x-request-id").map(str::len), Some(36), "two ids are none");
}
