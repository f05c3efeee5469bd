//! Listeners and connections: sockets of every kind, TLS, the PROXY protocol, limits and patience; and the
//! connections that sidegate opens itself.

use std::{fs, os::unix::fs::PermissionsExt, path::Path, sync::Arc};

use rustix::process::{Pid, Resource, Rlimit, Signal, prlimit};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio_rustls::{
    TlsAcceptor, TlsConnector,
    client::TlsStream,
    rustls::{
        ClientConfig, RootCertStore, ServerConfig,
        crypto::ring,
        pki_types::{CertificateDer, PrivateKeyDer, ServerName},
    },
    server,
};

use crate::harness::{
    Backend, Ending, Proxy, Wire,
    backend::{Http2Backend, Recorder},
    client::{self, Http2Client, RawHttp2},
    eventually, within,
};

const GET: &str = "GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

// Patience.

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_does_not_end_is_given_up() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { client_header: 200ms } }").await;
    for begun in ["", "GET / HT", "GET / HTTP/1.1\r\nhost: a\r\nx-slow: "] {
        let mut client = proxy.connect().await;
        client.send(begun).await;
        client.ended().await;
    }
    assert!(backend.requests().is_empty());
    assert_eq!(proxy.get("/").await.status(), 200, "others are served");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_requests_is_closed_after_keepalive() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { keepalive: 200ms } }").await;
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client.send(GET).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    assert_eq!(client.ended().await, Ending::Fin);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_connection_without_requests_is_closed_after_keepalive() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { keepalive: 200ms } }").await;
    let client = Http2Client::to(proxy.address()).await;
    assert_eq!(client.get("/").await.status(), 200);
    eventually("the connection to close", async || proxy.sample("sidegate_connections").await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_of_http2_that_the_client_never_lets_flow_is_given_up() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { idle: 300ms } }").await;
    let mut client = RawHttp2::to(proxy.address()).await;
    client.send(4, 0, 0, &[0, 4, 0, 0, 0, 0]).await; // SETTINGS_INITIAL_WINDOW_SIZE: 0
    let fields: [(&[u8], &[u8]); 5] = [
        (b":method", b"GET"),
        (b":scheme", b"http"),
        (b":path", b"/"),
        (b":authority", b"a"),
        (b"x-request-id", b"shut-1"),
    ];
    client.request(&fields, true).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\nhello").await;
    assert_eq!(client.frame().await.status(), Some(200));
    let reset = client.frame().await;
    assert_eq!((reset.kind, &*reset.payload), (client::RST_STREAM, &[0, 0, 0, 8][..]), "CANCEL");
    upstream.ended().await;
    let line = proxy.access_line("shut-1").await;
    assert_eq!((&line["status"], &line["aborted_by"]), (&200.into(), &"client".into()), "{line}");
    assert_eq!(proxy.sample("sidegate_connections").await, 1, "the connection goes on");
}

// What no access line tells.

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_request_is_counted_and_told_of_once_in_a_while() {
    let backend = Recorder::ok().await;
    let file = "defaults: { timeouts: { client_header: 300ms } }";
    let proxy = Proxy::before(&backend.url(), file).await;
    let long = format!("GET / HTTP/1.1\r\nhost: a\r\nx: {}\r\n\r\n", "x".repeat(256 << 10));
    let frames = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x05\x04\0\0\0\0\0hello";
    for (sent, reason) in
        [("hello\r\n\r\n", "malformed"), (&*long, "too_large"), (frames, "http2"), ("GET / HTTP/1.1\r\nho", "timeout")]
    {
        let series = format!("sidegate_connection_errors_total{{reason=\"{reason}\"}}");
        assert_eq!(proxy.sample(&series).await, 0, "{reason}");
        let mut client = proxy.connect().await;
        client.try_send(sent).await.ok();
        client.rest().await;
        eventually(reason, async || proxy.sample(&series).await == 1).await;
    }
    let line = proxy.line("connection failed").await;
    assert_eq!((&line["level"], &line["reason"]), (&"info".into(), &"malformed".into()), "{line}");
    assert!(line["peer"].as_str().is_some_and(|peer| peer.starts_with("127.0.0.1:")), "{line}");
    assert_eq!(proxy.logged().matches("connection failed").count(), 1, "the others are within ten seconds");
}

// Limits.

#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_to_the_admin_port_keep_no_probe_out() {
    let proxy = Proxy::start("upstreams: { fixed: { respond: {} } }").await;
    let mut idle = Vec::new();
    for _ in 0..300 {
        let mut connection = Wire::to(proxy.admin().await).await;
        connection.send("GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
        assert_eq!(connection.answer().await.status(), 200);
        idle.push(connection);
    }
    assert_eq!(proxy.admin_get("/readyz").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_beyond_the_limit_wait_their_turn() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "limits: { connections: 2 }").await;
    let mut first = proxy.connect().await;
    let mut second = proxy.connect().await;
    for client in [&mut first, &mut second] {
        client.send(GET).await;
        assert_eq!(client.answer().await.status(), 200);
    }
    let mut third = proxy.connect().await;
    third.send(GET).await;
    second.send(GET).await;
    assert_eq!(second.answer().await.status(), 200, "those inside go on");
    assert_eq!(proxy.sample("sidegate_connections").await, 2);
    assert_eq!(backend.requests().len(), 3, "the third connection was not served yet");
    drop(first);
    assert_eq!(third.answer().await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn running_out_of_file_descriptors_is_survived() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    assert_eq!(proxy.get("/").await.status(), 200);
    // Accepted before the limit falls: `/metrics` must stay readable.
    let mut operator = Wire::to(proxy.admin().await).await;
    operator.send("GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
    assert_eq!(operator.answer().await.status(), 200);
    let pid = Pid::from_raw(i32::try_from(proxy.id()).unwrap());
    let limit = |current| prlimit(pid, Resource::Nofile, Rlimit { current: Some(current), maximum: Some(4096) });
    let open = fs::read_dir(format!("/proc/{}/fd", proxy.id())).unwrap().count() as u64;
    limit(open + 2).unwrap();
    let mut clients = Vec::new();
    for _ in 0..8 {
        clients.push(proxy.connect().await);
    }
    within("an accept to fail", async {
        loop {
            operator.send("GET /metrics HTTP/1.1\r\nhost: localhost\r\n\r\n").await;
            let metrics = operator.answer().await.text();
            if metrics.lines().any(|line| line.starts_with("sidegate_accept_errors_total") && !line.ends_with(" 0")) {
                return;
            }
        }
    })
    .await;
    limit(1024).unwrap();
    for client in &mut clients {
        client.send(GET).await;
        assert_eq!(client.answer().await.status(), 200, "whoever waited is served");
    }
}

// Protocols.

#[tokio::test(flavor = "multi_thread")]
async fn pipelined_requests_are_answered_in_their_order() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET /1 HTTP/1.1\r\nhost: a\r\n\r\nGET /2 HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, first) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n1").await;
    let second = upstream.head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n2").await;
    assert_eq!((first.target(), second.target()), ("/1", "/2"));
    assert_eq!((client.answer().await.text(), client.answer().await.text()), ("1".to_owned(), "2".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_wants_no_other_answer_gets_none() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), answer.head.get("connection")), (200, Some("close")));
    assert_eq!(client.ended().await, Ending::Fin);
    assert_eq!(backend.only().head.get("connection"), None, "the upstream's connection is another one");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http_1_0_client_gets_no_chunks_and_a_close() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.0\r\nhost: a\r\n\r\n").await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!(head.start, "GET / HTTP/1.1");
    upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n").await;
    let (answer, ending) = client.rest().await;
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.ends_with("\r\n\r\nonetwo"), "{answer}");
    assert!(!answer.to_ascii_lowercase().contains("transfer-encoding"), "{answer}");
    assert_eq!(ending, Ending::Fin);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_delimited_response_that_breaks_off_is_a_reset_for_an_http_1_0_client() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.0\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    client.head().await;
    assert_eq!(client.exactly(3).await, b"one");
    drop(upstream);
    assert_eq!(client.ended().await, Ending::Reset, "an end would look like the end of the response");
}

#[tokio::test(flavor = "multi_thread")]
async fn unix_sockets_serve_at_both_ends() {
    let directory = tempfile::tempdir().unwrap();
    let (front, back) = (directory.path().join("front.sock"), directory.path().join("back.sock"));
    let backend = UnixListener::bind(&back).unwrap();
    let file = format!(
        "listen: [127.0.0.1:0, \"unix:{}\"]\nupstreams: {{ api: {{ endpoints: [\"unix:{}\"] }} }}",
        front.display(),
        back.display()
    );
    let proxy = Proxy::start(&file).await;
    let line = proxy.line_where("listening", |line| line["address"].as_str().unwrap().starts_with("unix:")).await;
    assert_eq!(line["address"], format!("unix:{}", front.display()));
    let mut client = Wire::new(UnixStream::connect(&front).await.unwrap());
    client.send("GET /over HTTP/1.1\r\nhost: sidegate.test\r\n\r\n").await;
    let (stream, _) = within("a connection from the proxy", backend.accept()).await.unwrap();
    let mut upstream = Wire::new(stream);
    let head = upstream.head().await;
    assert_eq!((&*head.start, head.get("host")), ("GET /over HTTP/1.1", Some("sidegate.test")));
    assert_eq!(head.get("x-forwarded-for"), Some("unknown"), "a Unix socket has no address: {head:?}");
    upstream.send(OK).await;
    assert_eq!(client.answer().await.text(), "ok");
    let (status, log) = proxy.stop().await;
    assert!(status.success(), "{log}");
    assert!(!front.exists(), "the socket is removed at the end");
}

// The PROXY protocol.

const V2: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// A header of version 2 for TCP over IPv4 or IPv6, from `source` to somewhere.
fn version_2(command: u8, family: u8, addresses: &[u8]) -> Vec<u8> {
    let mut header = V2.to_vec();
    header.extend([0x20 | command, family]);
    header.extend(u16::try_from(addresses.len()).unwrap().to_be_bytes());
    header.extend(addresses);
    header
}

#[tokio::test(flavor = "multi_thread")]
async fn the_proxy_protocol_names_the_client() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "listen: { address: 127.0.0.1:0, proxy_protocol: true }").await;
    let v4 = [203, 0, 113, 9, 192, 0, 2, 1, 0xC0, 0, 0, 80];
    let mut v6 = [0; 36];
    v6[..4].copy_from_slice(&[0x20, 0x01, 0x0d, 0xb8]);
    v6[15] = 9;
    let cases: [(Vec<u8>, &str); 6] = [
        (b"PROXY TCP4 203.0.113.7 192.0.2.1 50000 80\r\n".to_vec(), "203.0.113.7"),
        (b"PROXY TCP6 2001:db8::7 2001:db8::1 50000 80\r\n".to_vec(), "2001:db8::7"),
        (b"PROXY UNKNOWN\r\n".to_vec(), "127.0.0.1"),
        (version_2(1, 0x11, &v4), "203.0.113.9"),
        (version_2(1, 0x21, &v6), "2001:db8::9"),
        (version_2(0, 0x00, &[]), "127.0.0.1"),
    ];
    for (index, (header, client_ip)) in cases.iter().enumerate() {
        let mut client = proxy.connect().await;
        // Byte by byte where it is short: the header may come in pieces.
        for piece in header.chunks(if index == 0 { 1 } else { 64 }) {
            client.send(piece).await;
        }
        client.send(format!("GET /{index} HTTP/1.1\r\nhost: a\r\nx-request-id: proxied-{index}\r\n\r\n")).await;
        assert_eq!(client.answer().await.status(), 200, "{index}");
        assert_eq!(backend.requests()[index].head.get("x-forwarded-for"), Some(*client_ip));
        assert_eq!(proxy.access_line(&format!("proxied-{index}")).await["client_ip"], *client_ip);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_those_who_are_listed_may_name_the_client() {
    let header = "PROXY TCP4 203.0.113.7 192.0.2.1 50000 80\r\n";
    for (from, admitted) in [("private", true), ("[127.0.0.1]", true), ("[10.0.0.0/8, \"::1\"]", false)] {
        let backend = Recorder::ok().await;
        let file = format!("listen: {{ address: 127.0.0.1:0, proxy_protocol: {{ from: {from} }} }}");
        let proxy = Proxy::before(&backend.url(), &file).await;
        let mut client = proxy.connect().await;
        client.try_send(format!("{header}{GET}")).await.ok();
        if admitted {
            assert_eq!(client.answer().await.status(), 200);
            assert_eq!(backend.only().head.get("x-forwarded-for"), Some("203.0.113.7"));
        } else {
            client.ended().await;
            assert!(backend.requests().is_empty());
            let line = proxy.line("connection failed").await;
            assert_eq!(line["reason"], "untrusted", "{line}");
            assert_eq!(proxy.sample("sidegate_connection_errors_total{reason=\"untrusted\"}").await, 1);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_has_the_permissions_that_it_is_given() {
    let folder = tempfile::tempdir().unwrap();
    let backend = Recorder::ok().await;
    for (mode, expected) in [("0600", 0o600), ("0660", 0o660), ("666", 0o666)] {
        let path = folder.path().join(mode);
        let file = format!("listen: [127.0.0.1:0, {{ address: \"unix:{}\", mode: \"{mode}\" }}]", path.display());
        let proxy = Proxy::before(&backend.url(), &file).await;
        proxy.line_where("listening", |line| line["address"].as_str().unwrap().starts_with("unix:")).await;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, expected);
        let mut client = Wire::new(UnixStream::connect(&path).await.unwrap());
        client.send(GET).await;
        assert_eq!(client.answer().await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_without_a_whole_proxy_header_is_closed() {
    let backend = Recorder::ok().await;
    let file = "listen: { address: 127.0.0.1:0, proxy_protocol: true }\n\
                defaults: { timeouts: { client_header: 300ms } }";
    let proxy = Proxy::before(&backend.url(), file).await;
    let mut long = b"PROXY TCP4 ".to_vec();
    long.extend([b'1'; 200]);
    let broken: [&[u8]; 6] = [
        GET.as_bytes(),
        b"PROXY TCP4 203.0.113.7 192.0.2.1\r\n",
        b"PROXY TCP4 203.0.113.700 192.0.2.1 1 2\r\n",
        &long,
        b"\r\n\r\n\0\r\nQUIT\n\x51\x11\0\0", // version 5
        b"PROXY TCP4 203.0",                 // and then silence
    ];
    for header in broken {
        let mut client = proxy.connect().await;
        client.try_send(header).await.ok();
        client.try_send(GET).await.ok();
        let (rest, _) = client.rest().await;
        assert!(rest.is_empty(), "{}: {}", header.escape_ascii(), rest.escape_ascii());
    }
    assert!(backend.requests().is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_listener_that_does_not_ask_for_it_takes_no_proxy_header() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(format!("PROXY TCP4 203.0.113.7 192.0.2.1 50000 80\r\n{GET}")).await;
    let (rest, _) = client.rest().await;
    assert!(rest.starts_with(b"HTTP/1.1 400 "), "{}", rest.escape_ascii());
    assert!(backend.requests().is_empty());
}

// TLS.

struct Certificate {
    der: CertificateDer<'static>,
    pem: String,
    key: String,
    key_der: PrivateKeyDer<'static>,
}

fn certificate() -> Certificate {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    Certificate {
        der: made.cert.der().clone(),
        pem: made.cert.pem(),
        key: made.signing_key.serialize_pem(),
        key_der: PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap(),
    }
}

impl Certificate {
    fn write(&self, directory: &Path) {
        for (name, content) in [("key.pem", &self.key), ("certificate.pem", &self.pem)] {
            let next = directory.join("next.pem");
            fs::write(&next, content).unwrap();
            fs::rename(next, directory.join(name)).unwrap();
        }
    }
}

/// Connects with TLS, trusting nothing but `certificate`.
async fn tls(proxy: &Proxy, certificate: &Certificate, alpn: &[&str]) -> std::io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(certificate.der.clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    within("the TLS handshake", TlsConnector::from(Arc::new(config)).connect(name, stream)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_speaks_what_alpn_chooses() {
    let backend = Recorder::ok().await;
    let directory = tempfile::tempdir().unwrap();
    let certificate = certificate();
    certificate.write(directory.path());
    let path = directory.path().display();
    let file = format!(
        "listen: {{ address: 127.0.0.1:0, tls: {{ certificate: {path}/certificate.pem, key: {path}/key.pem }} }}"
    );
    let proxy = Proxy::before(&backend.url(), &file).await;

    let stream = tls(&proxy, &certificate, &["h2", "http/1.1"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let answer = Http2Client::over(stream).await.get("/h2").await;
    assert_eq!(answer.status(), 200);
    assert!(answer.headers().contains_key("strict-transport-security"), "{answer:?}");
    assert_eq!(client::data(&mut answer.into_body()).await.unwrap(), "ok");

    for alpn in [&["http/1.1"][..], &[]] {
        let mut client = Wire::new(tls(&proxy, &certificate, alpn).await.unwrap());
        client.send(GET).await;
        assert_eq!(client.answer().await.text(), "ok");
    }
    let requests = backend.requests();
    assert!(requests.iter().all(|request| request.head.get("x-forwarded-proto") == Some("https")), "{requests:?}");

    let mut clear = proxy.connect().await;
    clear.send(GET).await;
    let (rest, _) = clear.rest().await;
    assert!(!rest.starts_with(b"HTTP"), "cleartext gets no answer: {}", rest.escape_ascii());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_certificate_is_taken_and_a_broken_one_is_not() {
    let backend = Recorder::ok().await;
    let directory = tempfile::tempdir().unwrap();
    let (old, new) = (certificate(), certificate());
    old.write(directory.path());
    let path = directory.path().display();
    let file = format!(
        "listen: {{ address: 127.0.0.1:0, tls: {{ certificate: {path}/certificate.pem, key: {path}/key.pem }} }}"
    );
    let proxy = Proxy::before(&backend.url(), &file).await;
    let mut kept = Wire::new(tls(&proxy, &old, &[]).await.unwrap());
    kept.send(GET).await;
    kept.answer().await;

    fs::write(directory.path().join("certificate.pem"), "no certificate").unwrap();
    proxy.signal(Signal::HUP);
    proxy.line("the old certificate stays").await;
    tls(&proxy, &old, &[]).await.expect("the old certificate stays");

    new.write(directory.path());
    proxy.signal(Signal::HUP);
    proxy.line("new certificate").await;
    tls(&proxy, &new, &[]).await.expect("the new certificate");
    tls(&proxy, &old, &[]).await.expect_err("the old one is gone");
    kept.send(GET).await;
    assert_eq!(kept.answer().await.status(), 200, "open connections go on");
}

/// The backend's end of a connection from the proxy over TLS, which speaks `alpn` if anything.
async fn accept_tls(
    listener: &TcpListener,
    certificate: &Certificate,
    alpn: &[&str],
) -> std::io::Result<server::TlsStream<TcpStream>> {
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der.clone()], certificate.key_der.clone_key())
        .unwrap();
    config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
    let (stream, _) = within("a connection from the proxy", listener.accept()).await.unwrap();
    within("the TLS handshake", TlsAcceptor::from(Arc::new(config)).accept(stream)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_https_upstream_is_believed_by_its_ca_file_and_by_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    let (trusted, other) = (certificate(), certificate());
    trusted.write(directory.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ca = directory.path().join("certificate.pem");
    let file = format!(
        "upstreams: {{ api: {{ endpoints: [\"https://localhost:{port}\"], tls: {{ ca: {} }} }} }}",
        ca.display()
    );
    let proxy = Proxy::start(&file).await;

    let mut client = proxy.connect().await;
    client.send(GET).await;
    let mut upstream = Wire::new(accept_tls(&listener, &trusted, &[]).await.unwrap());
    let head = upstream.head().await;
    assert_eq!(head.get("host"), Some(&*format!("localhost:{port}")), "the endpoint's own name");
    // No keep-alive: the next request must shake hands anew.
    upstream.send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await;
    assert_eq!(client.answer().await.text(), "ok");

    client.send(GET).await;
    assert!(accept_tls(&listener, &other, &[]).await.is_err(), "the proxy refuses the certificate");
    let answer = client.answer().await;
    assert_eq!((answer.status(), &answer.json()["type"]), (502, &"urn:sidegate:problem:connect-failed".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewed_ca_file_of_an_upstream_is_believed_by_itself() {
    let directory = tempfile::tempdir().unwrap();
    let (before, after) = (certificate(), certificate());
    before.write(directory.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ca = directory.path().join("certificate.pem");
    let upstreams = format!(
        "upstreams: {{ api: {{ endpoints: [\"https://localhost:{port}\"], tls: {{ ca: {} }} }} }}",
        ca.display()
    );
    let proxy = Proxy::start(&upstreams).await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    assert!(accept_tls(&listener, &after, &[]).await.is_err(), "not yet");
    assert_eq!(client.answer().await.status(), 502);

    after.write(directory.path());
    proxy.line("reloaded").await;
    client.send(GET).await;
    let mut upstream = Wire::new(accept_tls(&listener, &after, &[]).await.unwrap());
    upstream.head().await;
    upstream.send(OK).await;
    assert_eq!(client.answer().await.text(), "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn http2_to_an_https_upstream_is_agreed_on_in_the_handshake() {
    let directory = tempfile::tempdir().unwrap();
    let certificate = certificate();
    certificate.write(directory.path());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let ca = directory.path().join("certificate.pem");
    let file = format!(
        "upstreams: {{ api: {{ endpoints: [\"https://localhost:{port}\"], protocol: http2, tls: {{ ca: {} }} }} }}",
        ca.display()
    );
    let proxy = Proxy::start(&file).await;

    let mut client = proxy.connect().await;
    client.send(GET).await;
    // One that does not agree to HTTP/2 is not talked to in it.
    let refused = accept_tls(&listener, &certificate, &["http/1.1"]).await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), &answer.json()["type"]), (502, &"urn:sidegate:problem:connect-failed".into()));
    drop(refused);

    client.send(GET).await;
    let stream = accept_tls(&listener, &certificate, &["h2"]).await.unwrap();
    assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let backend = Http2Backend::over(stream);
    let exchange = backend.next().await;
    assert_eq!(exchange.request.uri().scheme_str(), Some("https"));
    assert_eq!(exchange.request.uri().authority().unwrap().as_str(), format!("localhost:{port}"));
    let body = exchange.answer(http::Response::new(()));
    body.data("over HTTP/2").await;
    body.finish();
    assert_eq!(client.answer().await.text(), "over HTTP/2");
}

// The pool.

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_used_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut first = proxy.connect().await;
    first.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(OK).await;
    assert_eq!(first.answer().await.text(), "ok");
    let mut second = proxy.connect().await;
    second.send(GET).await;
    upstream.head().await;
    upstream.send(OK).await;
    assert_eq!(second.answer().await.text(), "ok");
    assert!(backend.accepted().await.is_none(), "no other connection");
}

/// A proxy with one pooled connection, whose backend's end is returned.
async fn pooled(proxy: &Proxy, backend: &Backend) -> Wire {
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(OK).await;
    client.answer().await;
    upstream
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooled_connection_that_the_upstream_closed_costs_no_request() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        // The upstream closes just as the request arrives: no proxy can have seen it before.
        let mut upstream = pooled(&proxy, &backend).await;
        let mut client = proxy.connect().await;
        client.send("GET /again HTTP/1.1\r\nhost: a\r\n\r\n").await;
        upstream.head().await;
        upstream.leave(reset);
        let (mut upstream, head) = backend.accept_head().await;
        assert_eq!(head.target(), "/again");
        upstream.send(OK).await;
        assert_eq!(client.answer().await.text(), "ok");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_may_have_had_an_effect_is_not_repeated() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut upstream = pooled(&proxy, &backend).await;
    let mut client = proxy.connect().await;
    client.send("POST /once HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi").await;
    assert_eq!(upstream.request().await.text(), "hi");
    drop(upstream);
    let answer = client.answer().await;
    assert_eq!((answer.status(), &answer.json()["type"]), (502, &"urn:sidegate:problem:upstream-reset".into()));
    assert!(backend.accepted().await.is_none(), "it was sent once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_was_seen_to_close_is_not_used_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for round in 0..20 {
        let mut client = proxy.connect().await;
        let post = "POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\n\r\nhi";
        client.send(post).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok").await;
        drop(upstream);
        assert_eq!(client.answer().await.status(), 200, "round {round}: even what must not be repeated arrives");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_that_says_more_than_its_length_poisons_no_other() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(format!("{OK}HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\npoison")).await;
    assert_eq!(client.answer().await.text(), "ok");
    client.send("GET /next HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut fresh, head) = backend.accept_head().await;
    assert_eq!(head.target(), "/next", "it goes over a connection of its own");
    fresh.send(OK).await;
    assert_eq!(client.answer().await.text(), "ok");
    drop(upstream);
}
