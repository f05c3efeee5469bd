//! The server over real sockets on the loopback, with a handler in place of the stack.

use std::{convert::Infallible, net::SocketAddr};

use bytes::Bytes;
use http_body::Frame;
use http_body_util::{BodyExt, StreamBody};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    sync::mpsc,
    task::JoinHandle,
};

use super::*;
use crate::{
    config::HumanDuration,
    message::{Body, Response},
    settings::{
        drain,
        listener::{self, Address, ProxyProtocol},
        tls,
    },
};

/// A running server.
struct Front {
    address: SocketAddr,
    shutdown: Shutdown,
    process: Process,
    running: JoinHandle<Outcome>,
}

fn loopback() -> listener::Config {
    "127.0.0.1:0".parse::<Address>().unwrap().into()
}

fn server() -> Server {
    let (limits, timing) = (Limits::default(), Timing::default());
    Server { listen: vec![loopback()], connections: 100, limits, timing, give_way: false }
}

async fn start_with(server: Server, drain: drain::Config, handler: impl Handler) -> Front {
    let bound = server.bind().await.unwrap();
    let Some(Address::Tcp(address)) = bound.addresses().next().cloned() else { panic!("a TCP listener") };
    let (shutdown, process) = (Shutdown::new(drain), Process::default());
    let running = tokio::spawn(bound.run(handler, process.clone(), shutdown.clone()));
    Front { address, shutdown, process, running }
}

async fn start(handler: impl Handler) -> Front {
    start_with(server(), drain::Config::default(), handler).await
}

impl Front {
    async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    async fn has_open(&self, connections: i64) {
        wait_until(|| self.process.connections.get() == connections).await;
    }
}

async fn wait_until(mut condition: impl FnMut() -> bool) {
    timeout(Duration::from_secs(5), async {
        while !condition() {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await
    .expect("the condition comes true within five seconds");
}

/// Answers the request's body, or its path where it has none.
async fn echo(request: Request) -> Response {
    let path = request.uri().path().to_owned();
    let body = request.into_body();
    if http_body::Body::is_end_stream(&body) {
        return Response::new(Body::from(path));
    }
    Response::new(Body::from(body.collect().await.unwrap().to_bytes()))
}

/// Answers with a body that the test feeds.
fn streaming() -> (mpsc::Sender<&'static str>, impl Handler) {
    let (feed, eater) = mpsc::channel::<&'static str>(1);
    let eater = Arc::new(parking_lot::Mutex::new(Some(eater)));
    let handler = move |_: Request| {
        let mut eater = eater.lock().take().expect("one request");
        let frames = futures_util::stream::poll_fn(move |cx| eater.poll_recv(cx));
        let frames = futures_util::StreamExt::map(frames, |text| Ok::<_, Infallible>(Frame::data(Bytes::from(text))));
        std::future::ready(Response::new(Body::new(StreamBody::new(frames))))
    };
    (feed, handler)
}

async fn read_until(stream: &mut TcpStream, end: &str) -> String {
    let mut read = Vec::new();
    timeout(Duration::from_secs(5), async {
        while !String::from_utf8_lossy(&read).contains(end) {
            let mut buf = [0; 1024];
            let n = stream.read(&mut buf).await.unwrap();
            assert_ne!(n, 0, "the connection ended after {:?}", String::from_utf8_lossy(&read));
            read.extend_from_slice(&buf[..n]);
        }
    })
    .await
    .unwrap_or_else(|_| panic!("{end:?} does not come"));
    String::from_utf8(read).unwrap()
}

/// Everything until the end; the error of a reset.
async fn rest(stream: &mut TcpStream) -> io::Result<String> {
    let mut read = String::new();
    timeout(Duration::from_secs(10), stream.read_to_string(&mut read)).await.expect("the connection ends")?;
    Ok(read)
}

async fn ask(stream: &mut TcpStream) {
    stream.write_all(b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    read_until(stream, "/a").await;
}

#[tokio::test]
async fn the_connection_that_rests_longest_gives_way() {
    let crowded = Server { connections: 3, give_way: true, ..server() };
    let front = start_with(crowded, drain::Config::default(), echo).await;
    let (mut first, mut second) = (front.connect().await, front.connect().await);
    ask(&mut second).await;
    ask(&mut first).await;
    ask(&mut second).await;
    let mut third = front.connect().await;
    ask(&mut third).await;
    assert_eq!(rest(&mut first).await.unwrap(), "");
    ask(&mut second).await;
    ask(&mut third).await;
}

#[tokio::test]
async fn who_connects_and_says_nothing_gives_way_after_a_while() {
    let crowded = Server { connections: 3, give_way: true, ..server() };
    let front = start_with(crowded, drain::Config::default(), echo).await;
    let _silent = [front.connect().await, front.connect().await, front.connect().await];
    ask(&mut front.connect().await).await;
}

#[tokio::test]
async fn requests_of_one_connection_are_answered_in_turn() {
    let front = start(echo).await;
    let mut client = front.connect().await;
    client.write_all(b"GET /one HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    assert!(read_until(&mut client, "/one").await.starts_with("HTTP/1.1 200 OK\r\n"));
    client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\ntwo").await.unwrap();
    read_until(&mut client, "two").await;
    front.has_open(1).await;
}

#[tokio::test]
async fn a_drain_closes_idle_connections_and_lets_streams_end() {
    let (feed, handler) = streaming();
    let front = start(handler).await;
    let mut idle = front.connect().await;
    let mut client = front.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    feed.send("first").await.unwrap();
    read_until(&mut client, "first").await;
    front.has_open(2).await;

    front.shutdown.ask();
    assert_eq!(rest(&mut idle).await.unwrap(), "");
    wait_until(|| std::net::TcpStream::connect(front.address).is_err()).await;
    feed.send("last").await.unwrap();
    read_until(&mut client, "last").await;
    drop(feed);
    assert!(rest(&mut client).await.unwrap().ends_with("0\r\n\r\n"));
    assert_eq!(front.running.await.unwrap(), Outcome::Drained);
}

#[tokio::test]
async fn a_second_request_to_stop_cuts_streams_visibly() {
    let (feed, handler) = streaming();
    let front = start(handler).await;
    let mut client = front.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    feed.send("first").await.unwrap();
    read_until(&mut client, "first").await;

    front.shutdown.ask();
    front.shutdown.ask();
    let end = rest(&mut client).await.unwrap();
    assert!(!end.contains("0\r\n\r\n"), "no clean end: {end:?}");
    assert_eq!(front.running.await.unwrap(), Outcome::Cut(1));
}

#[tokio::test]
async fn beyond_the_limit_connections_wait_to_be_accepted() {
    let front = start_with(Server { connections: 2, ..server() }, drain::Config::default(), echo).await;
    let first = front.connect().await;
    let _second = front.connect().await;
    front.has_open(2).await;
    let mut third = front.connect().await;
    third.write_all(b"GET /third HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    let mut buf = [0];
    assert!(timeout(Duration::from_millis(100), third.read(&mut buf)).await.is_err(), "it is not served yet");
    assert_eq!(front.process.accepted.get(), 2);
    drop(first);
    read_until(&mut third, "/third").await;
    assert_eq!(front.process.connections.get(), 2);
}

#[tokio::test]
async fn a_broken_stream_looks_broken_to_http_1_0() {
    let broken = |_: Request| {
        let frames = ["some", ""].map(|text| match text {
            "" => Err(io::Error::other("broken off")),
            text => Ok(Frame::data(Bytes::from(text))),
        });
        std::future::ready(Response::new(Body::new(StreamBody::new(futures_util::stream::iter(frames)))))
    };
    let front = start(broken).await;
    let mut client = front.connect().await;
    client.write_all(b"GET / HTTP/1.0\r\nhost: a\r\n\r\n").await.unwrap();
    assert_eq!(rest(&mut client).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_whole_stream_looks_whole_to_http_1_0() {
    let (feed, handler) = streaming();
    let front = start(handler).await;
    let mut client = front.connect().await;
    client.write_all(b"GET / HTTP/1.0\r\nhost: a\r\n\r\n").await.unwrap();
    feed.send("whole").await.unwrap();
    drop(feed);
    assert!(rest(&mut client).await.unwrap().ends_with("whole"));
}

#[tokio::test]
async fn a_listener_that_asks_for_the_proxy_header_believes_it_and_refuses_others() {
    let peer = |request: Request| {
        let peer = request.extensions().get::<crate::message::Connection>().unwrap().peer().to_string();
        std::future::ready(Response::new(Body::from(peer)))
    };
    let listen = vec![listener::Config { proxy_protocol: ProxyProtocol::Anyone, ..loopback() }];
    let front = start_with(Server { listen, ..server() }, drain::Config::default(), peer).await;
    let mut client = front.connect().await;
    client.write_all(b"PROXY TCP4 203.0.113.7 10.0.0.1 4711 80\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    read_until(&mut client, "203.0.113.7:4711").await;

    let mut client = front.connect().await;
    client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    // Closing over what was not read is a reset.
    assert!(rest(&mut client).await.is_ok_and(|rest| rest.is_empty()) || client.read(&mut [0]).await.is_ok());
}

#[tokio::test]
async fn a_dead_unix_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("front.sock");
    let listen = || Server { listen: vec![Address::Unix(path.clone()).into()], ..server() };
    // A process that died leaves its file behind.
    drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
    let bound = listen().bind().await.unwrap();
    let error = listen().bind().await.unwrap_err();
    assert_eq!(error.to_string(), format!("cannot listen on unix:{}", path.display()));
    assert!(path.exists(), "the first one's file is left alone");
    drop(bound);
    assert!(!path.exists(), "it is removed at the end");

    std::fs::write(&path, "a file of somebody's").unwrap();
    assert!(listen().bind().await.is_err());
    assert!(path.exists(), "what is no socket is left alone");
}

#[tokio::test]
async fn tls_speaks_http2_where_alpn_chose_it() {
    use rustls::{ClientConfig, RootCertStore, crypto::ring, pki_types::ServerName};

    let folder = tempfile::tempdir().unwrap();
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let files = tls::Config { certificate: folder.path().join("crt"), key: folder.path().join("key") };
    std::fs::write(&files.certificate, made.cert.pem()).unwrap();
    std::fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
    let listen = vec![listener::Config { tls: Some(files), ..loopback() }];
    let encrypted = |request: Request| {
        let (tls, version) =
            (request.extensions().get::<crate::message::Connection>().unwrap().tls(), request.version());
        std::future::ready(Response::new(Body::from(format!("{tls} {version:?}"))))
    };
    let front = start_with(Server { listen, ..server() }, drain::Config::default(), encrypted).await;

    let mut roots = RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
    let name = ServerName::try_from("localhost").unwrap();
    let stream = connector.connect(name, front.connect().await).await.unwrap();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut send, connection) =
        hyper::client::conn::http2::handshake(hyper_util::rt::TokioExecutor::new(), io).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("https://localhost/").body(Body::empty()).unwrap();
    let answer = send.send_request(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert_eq!(answer, "true HTTP/2.0");
}

#[tokio::test]
async fn a_draining_server_accepts_until_its_delay_is_over() {
    let times = drain::Config { delay: HumanDuration::from_millis(300), ..drain::Config::default() };
    let front = start_with(server(), times, echo).await;
    wait_until(|| front.shutdown.readiness().phase() == Phase::Ready).await;
    front.shutdown.ask();
    assert_eq!(front.shutdown.readiness().phase(), Phase::Draining, "at once");
    let mut late = front.connect().await;
    late.write_all(b"GET /late HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
    read_until(&mut late, "/late").await;
    assert_eq!(front.running.await.unwrap(), Outcome::Drained);
}
