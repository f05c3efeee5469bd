//! WebSocket and other tunnels: over HTTP/1.1, over HTTP/2, and what must not become one.

use http::{Request, Response};
use hyper::ext::Protocol;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Backend, Proxy, Wire, backend::Http2Backend, client::Http2Client, within};

const UPGRADE: &str = "GET /chat HTTP/1.1\r\nhost: sidegate.test\r\nconnection: keep-alive, Upgrade\r\n\
                       upgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\
                       x-request-id: tunnel-1\r\n\r\n";
const SWITCHED: &str = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                        sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";

/// A tunnel through the proxy: the client's end and the backend's.
async fn tunnel(proxy: &Proxy, backend: &Backend) -> (Wire, Wire) {
    let mut client = proxy.connect().await;
    client.send(UPGRADE).await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!(head.get("upgrade"), Some("websocket"), "{head:?}");
    assert!(head.get("connection").unwrap().eq_ignore_ascii_case("upgrade"), "{head:?}");
    assert_eq!(head.get("sec-websocket-key"), Some("dGhlIHNhbXBsZSBub25jZQ=="));
    upstream.send(SWITCHED).await;
    let head = client.head().await;
    assert_eq!(head.status(), 101);
    assert_eq!(head.get("upgrade"), Some("websocket"));
    assert!(head.get("connection").unwrap().eq_ignore_ascii_case("upgrade"), "{head:?}");
    assert_eq!(head.get("sec-websocket-accept"), Some("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="));
    (client, upstream)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_carries_any_bytes_both_ways() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (mut client, mut upstream) = tunnel(&proxy, &backend).await;
    for byte in 0..=u8::MAX {
        client.send([byte]).await;
        assert_eq!(upstream.exactly(1).await, [byte]);
        upstream.send([byte]).await;
        assert_eq!(client.exactly(1).await, [byte]);
    }
    drop(upstream);
    client.ended().await;
    drop(client);
    let line = proxy.access_line("tunnel-1").await;
    assert_eq!(
        (&line["status"], &line["bytes_in"], &line["bytes_out"]),
        (&101.into(), &256.into(), &256.into()),
        "{line}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_follow_the_101_at_once_are_not_lost() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(UPGRADE).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(format!("{SWITCHED}first words")).await;
    assert_eq!(client.head().await.status(), 101);
    assert_eq!(client.exactly(11).await, b"first words");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_side_of_a_tunnel_may_end_before_the_other() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (mut client, mut upstream) = tunnel(&proxy, &backend).await;
    client.send("question").await;
    client.finish().await;
    assert_eq!(upstream.rest().await.0, b"question");
    upstream.send("answer").await;
    drop(upstream);
    assert_eq!(client.rest().await.0, b"answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_ends_upstream_when_its_client_leaves() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let (client, mut upstream) = tunnel(&proxy, &backend).await;
        client.leave(reset);
        upstream.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_silent_tunnel_is_cut_after_idle() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { idle: 200ms, total: 100ms } }").await;
    let (mut client, mut upstream) = tunnel(&proxy, &backend).await;
    client.ended().await;
    upstream.ended().await;
    assert_eq!(proxy.access_line("tunnel-1").await["error"], "upstream-timeout");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_upgrade_is_an_answer_like_any_other() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(UPGRADE).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 403 Forbidden\r\ncontent-length: 2\r\n\r\nno").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.text()), (403, "no".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_101_to_another_protocol_than_the_one_asked_for_is_a_502() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(UPGRADE).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n").await;
    assert_eq!(client.answer().await.status(), 502);
    upstream.ended().await;
}

/// An extended CONNECT (RFC 8441) to `/chat`.
fn connect() -> Request<()> {
    let mut request =
        Request::connect("http://sidegate.test/chat").header("sec-websocket-version", "13").body(()).unwrap();
    request.extensions_mut().insert(Protocol::from_static("websocket"));
    request
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extended_connect_becomes_an_upgrade_upstream() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let client = Http2Client::to(proxy.address()).await;
    // The client may send it only after the proxy's settings allow it.
    let (body, answer) = client.begin(connect());
    let answering = async {
        let (mut upstream, head) = backend.accept_head().await;
        assert_eq!(head.start, "GET /chat HTTP/1.1");
        assert_eq!(head.get("upgrade"), Some("websocket"), "{head:?}");
        assert_eq!(head.get("sec-websocket-version"), Some("13"), "{head:?}");
        let key = head.get("sec-websocket-key").expect("HTTP/1.1 needs a key").to_owned();
        assert_eq!(key.len(), 24, "sixteen bytes in Base64: {key}");
        upstream.send(SWITCHED).await;
        upstream
    };
    let (answer, mut upstream) = tokio::join!(within("the head", answer), answering);
    let answer = answer.unwrap();
    assert_eq!(answer.status(), 200, "over HTTP/2 a tunnel begins with 200");
    assert!(!answer.headers().contains_key("upgrade") && !answer.headers().contains_key("connection"));
    let mut tunnel = TokioIo::new(within("the tunnel", hyper::upgrade::on(answer)).await.unwrap());
    tunnel.write_all(b"question").await.unwrap();
    assert_eq!(upstream.exactly(8).await, b"question");
    upstream.send("answer").await;
    let mut read = [0; 6];
    within("the answer", tunnel.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"answer");
    drop(tunnel);
    body.finish();
    upstream.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_extended_connect_passes_to_an_http2_upstream() {
    let backend = Http2Backend::start().await;
    let file = "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }";
    let proxy = Proxy::before(&backend.url(), file).await;
    let client = Http2Client::to(proxy.address()).await;
    let (_body, answer) = client.begin(connect());
    let answering = async {
        let mut exchange = backend.next().await;
        assert_eq!(exchange.request.method(), http::Method::CONNECT);
        assert_eq!(exchange.request.uri().path(), "/chat");
        assert_eq!(exchange.request.extensions().get::<Protocol>().map(Protocol::as_str), Some("websocket"));
        let upgrade = hyper::upgrade::on(&mut exchange.request);
        let body = exchange.answer(Response::new(()));
        (TokioIo::new(within("the tunnel", upgrade).await.unwrap()), body)
    };
    let (answer, (mut upstream, _sender)) = tokio::join!(within("the head", answer), answering);
    let mut client = TokioIo::new(within("the tunnel", hyper::upgrade::on(answer.unwrap())).await.unwrap());
    let mut read = [0; 4];
    client.write_all(b"ping").await.unwrap();
    within("a ping", upstream.read_exact(&mut read)).await.unwrap();
    upstream.write_all(b"pong").await.unwrap();
    within("a pong", client.read_exact(&mut read)).await.unwrap();
    assert_eq!(&read, b"pong");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plain_connect_is_refused() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let answer = proxy.ask("CONNECT sidegate.test:443 HTTP/1.1\r\nhost: sidegate.test:443\r\n\r\n").await;
    assert!((400..500).contains(&answer.status()), "{answer:?}");
    assert!(backend.accepted().await.is_none(), "nothing went upstream");
}
