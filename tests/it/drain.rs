//! How the process ends: in order, and with its streams.

use http::Request;
use rustix::process::Signal;

use crate::harness::{
    Backend, Proxy, Wire,
    backend::Recorder,
    client::{self, Http2Client},
    eventually, within,
};

const STREAM: &str = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n";

async fn streaming(proxy: &Proxy, backend: &Backend) -> (Wire, Wire) {
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(STREAM).await;
    client.head().await;
    assert_eq!(client.chunk().await.unwrap(), b"one");
    (client, upstream)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_a_stream_finish() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "drain: { timeout: 30s }").await;
    let (mut client, mut upstream) = streaming(&proxy, &backend).await;
    proxy.signal(Signal::TERM);
    proxy.line("draining").await;
    for byte in b"last words" {
        upstream.send([b'1', b'\r', b'\n', *byte, b'\r', b'\n']).await;
        assert_eq!(client.chunk().await.unwrap(), [*byte]);
    }
    upstream.send("0\r\n\r\n").await;
    assert_eq!(client.chunk().await, None, "the stream ends in order");
    client.exactly(2).await;
    client.ended().await;
    let (status, log) = proxy.exit().await;
    assert!(status.success(), "{status}: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_lets_an_http2_stream_finish_and_says_goaway() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "drain: { timeout: 30s }").await;
    let client = Http2Client::to(proxy.address()).await;
    let (request, answer) = client.begin(Request::get("http://a/").body(()).unwrap());
    request.finish();
    let answering = async {
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(STREAM).await;
        upstream
    };
    let (answer, mut upstream) = tokio::join!(within("the head", answer), answering);
    let mut body = answer.unwrap().into_body();
    assert_eq!(client::data(&mut body).await.unwrap(), "one");
    proxy.signal(Signal::TERM);
    proxy.line("draining").await;
    upstream.send("3\r\ntwo\r\n0\r\n\r\n").await;
    assert_eq!(client::data(&mut body).await.unwrap(), "two");
    assert_eq!(client::data(&mut body).await, None);
    let (status, log) = proxy.exit().await;
    assert!(status.success(), "{status}: {log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_outlasts_the_drain_is_cut_and_seen_as_cut() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "drain: { timeout: 100ms }").await;
    let (mut client, mut upstream) = streaming(&proxy, &backend).await;
    proxy.signal(Signal::TERM);
    let (rest, _) = client.rest().await;
    assert!(rest.is_empty(), "nothing that looks like an end: {}", rest.escape_ascii());
    upstream.ended().await;
    let (status, log) = proxy.exit().await;
    assert!(status.success(), "{status}: {log}");
    assert!(log.contains(r#""aborted_by":"sidegate""#), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_signal_ends_at_once() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "drain: { timeout: 10m }").await;
    let (mut client, _upstream) = streaming(&proxy, &backend).await;
    proxy.signal(Signal::TERM);
    proxy.line("draining").await;
    proxy.signal(Signal::TERM);
    let (rest, _) = client.rest().await;
    assert!(rest.is_empty(), "{}", rest.escape_ascii());
    // `exit` waits for far less than ten minutes.
    proxy.exit().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_closes_idle_connections_and_opens_no_new_ones() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut idle = proxy.connect().await;
    idle.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(idle.answer().await.status(), 200);
    let mut silent = proxy.connect().await;
    let address = proxy.address();
    proxy.signal(Signal::INT);
    idle.ended().await;
    silent.ended().await;
    let (status, log) = proxy.exit().await;
    assert!(status.success(), "{status}: {log}");
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn readiness_fails_before_the_listener_closes() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "drain: { delay: 3s, timeout: 2s }").await;
    assert_eq!(proxy.admin_get("/readyz").await.status(), 200);
    proxy.signal(Signal::TERM);
    eventually("readiness to fail", async || proxy.admin_get("/readyz").await.status() == 503).await;
    assert_eq!(proxy.admin_get("/livez").await.status(), 200, "alive to its end");
    assert_eq!(proxy.get("/").await.status(), 200, "and still serving");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_during_the_drain_says_that_the_connection_closes() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "drain: { timeout: 30s }").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    proxy.signal(Signal::TERM);
    proxy.line("draining").await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.head.get("connection")), (200, Some("close")));
    client.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_may_go_on_to_the_end_of_the_drain_and_no_longer() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "drain: { timeout: 500ms }").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 101);
    proxy.signal(Signal::TERM);
    proxy.line("draining").await;
    client.send("still").await;
    assert_eq!(upstream.exactly(5).await, b"still");
    client.ended().await;
    upstream.ended().await;
    let (status, log) = proxy.exit().await;
    assert!(status.success(), "{status}: {log}");
}
