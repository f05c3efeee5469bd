//! Backends and clients at their worst, alone and all at once: nothing hangs, nothing is mixed up, nothing is left over.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};

use http::Request;
use http_body_util::BodyExt;
use rustix::process::Signal;
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

use crate::harness::{
    Backend, Proxy, Wire,
    backend::Recorder,
    client::{CONTINUATION, DATA, GOAWAY, HEADERS, Http2Client, PING, RST_STREAM, RawHttp2, SETTINGS},
    eventually, within,
};

/// A pool that is soon empty again.
const BRIEF: &str = "upstreams: { api: { endpoints: [\"UPSTREAM\"], pool: { idle: 200ms } } }";

/// One exchange of the mill: all about it follows from its number, at the client as at the backend.
#[derive(Debug, Clone, Copy)]
struct Turn(u64);

/// What the backend does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Length,
    Chunked,
    /// The body ends with the connection.
    Close,
    /// No body.
    Empty,
    /// Two interim responses before the response.
    Interim,
    /// The body breaks off.
    Cut,
    /// Answers a head without waiting for the body, and closes.
    Early,
    /// Closes instead of an answer, unless the connection is new.
    Stale,
}

impl Turn {
    /// A number below `below`, the same at each asking (the finalizer of `SplitMix64`).
    fn dice(self, salt: u64, below: u64) -> usize {
        let mut mixed = (self.0 << 8 | salt).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        usize::try_from((mixed ^ mixed >> 31) % below).unwrap()
    }

    fn mode(self) -> Mode {
        use Mode::{Chunked, Close, Cut, Early, Empty, Interim, Length, Stale};
        [Length, Chunked, Close, Empty, Interim, Cut, Early, Stale][self.dice(0, 8)]
    }

    fn method(self) -> &'static str {
        ["GET", "GET", "HEAD", "POST"][self.dice(1, 4)]
    }

    fn upload(self) -> Vec<u8> {
        let length = if self.method() == "POST" { [1, 10, 5_000, 200_000][self.dice(2, 4)] } else { 0 };
        vec![b'x'; length]
    }

    fn body(self) -> String {
        match self.mode() {
            Mode::Empty => String::new(),
            _ => format!("<{}>", self.0).repeat(1 + self.dice(3, 400)),
        }
    }

    /// Whether the client leaves, and after how many of 8 parts of its request.
    fn leaves(self) -> Option<usize> {
        (self.dice(4, 12) == 0).then(|| self.dice(5, 9))
    }
}

/// Plays the backend on one connection, until the mode of a request, or the proxy, ends it.
async fn play(stream: TcpStream) -> io::Result<()> {
    // What waits for an acknowledgement is lost when the connection closes over unread bytes.
    stream.set_nodelay(true)?;
    let mut stream = BufReader::new(stream);
    for served in 0.. {
        let (mut line, mut fields) = (String::new(), String::new());
        stream.read_line(&mut line).await?;
        while !fields.ends_with("\r\n\r\n") && stream.read_line(&mut fields).await? > 2 {}
        let Some(turn) = line.split('/').nth(1).and_then(|turn| turn.split(' ').next()?.parse().ok()).map(Turn) else {
            return Ok(());
        };
        let mode = turn.mode();
        if mode != Mode::Early {
            let length = fields.lines().find_map(|field| field.strip_prefix("content-length: ")?.parse().ok());
            stream.read_exact(&mut vec![0; length.unwrap_or(0)]).await?;
        }
        let (id, body, head_only) = (turn.0, turn.body(), turn.method() == "HEAD");
        let sized = format!("HTTP/1.1 200 OK\r\nx-turn: {id}\r\ncontent-length: {}\r\n\r\n", body.len());
        let (mut head, framed) = match mode {
            Mode::Stale if served > 0 => return Ok(()),
            Mode::Length | Mode::Early | Mode::Stale => (sized, body),
            Mode::Interim => {
                ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n".to_owned() + &sized, body)
            }
            Mode::Empty => (format!("HTTP/1.1 204 No Content\r\nx-turn: {id}\r\n\r\n"), body),
            Mode::Close => (format!("HTTP/1.1 200 OK\r\nx-turn: {id}\r\nconnection: close\r\n\r\n"), body),
            Mode::Chunked | Mode::Cut => {
                let chunk = |part: &[u8]| format!("{:x}\r\n{}\r\n", part.len(), part.escape_ascii());
                let last = if mode == Mode::Cut { "" } else { "0\r\n\r\n" };
                let chunks: String = body.as_bytes().chunks(97).map(chunk).collect();
                (format!("HTTP/1.1 200 OK\r\nx-turn: {id}\r\ntransfer-encoding: chunked\r\n\r\n"), chunks + last)
            }
        };
        if !head_only {
            head += &framed;
        }
        // In two writes, so that parts arrive at any border.
        let (first, second) = head.as_bytes().split_at(turn.dice(6, 1 + head.len() as u64));
        stream.write_all(first).await?;
        tokio::task::yield_now().await;
        stream.write_all(second).await?;
        if matches!(mode, Mode::Close | Mode::Cut | Mode::Early) {
            return Ok(());
        }
    }
    Ok(())
}

/// What came of a turn.
#[derive(Debug)]
struct Outcome {
    status: u16,
    turn: Option<String>,
    /// `None` where the body broke off.
    body: Option<Vec<u8>>,
}

impl Outcome {
    /// Checks it; whether there was an answer.
    fn check(&self, turn: Turn) -> bool {
        let what = (turn, turn.mode(), turn.method(), self.status);
        if self.status == 502 {
            assert_eq!(turn.method(), "POST", "only what cannot be repeated may fail: {what:?}");
            return false;
        }
        assert_eq!(self.status, if turn.mode() == Mode::Empty { 204 } else { 200 }, "{what:?}");
        assert_eq!(self.turn.as_deref(), Some(&*turn.0.to_string()), "another's answer: {what:?}");
        match &self.body {
            None => assert_eq!(turn.mode(), Mode::Cut, "{what:?}"),
            Some(body) if turn.method() == "HEAD" => assert!(body.is_empty(), "{what:?}"),
            Some(_) if turn.mode() == Mode::Cut => panic!("a cut body was taken for complete: {what:?}"),
            Some(body) => assert_eq!(body.escape_ascii().to_string(), turn.body(), "{what:?}"),
        }
        true
    }
}

/// Takes a turn over HTTP/1.1; `None` when the client has left.
async fn take(stream: &mut BufReader<TcpStream>, turn: Turn) -> io::Result<Option<Outcome>> {
    let upload = turn.upload();
    let length = if upload.is_empty() { String::new() } else { format!("content-length: {}\r\n", upload.len()) };
    let mut request = format!("{} /{} HTTP/1.1\r\nhost: a\r\n{length}\r\n", turn.method(), turn.0).into_bytes();
    request.extend(upload);
    if let Some(parts) = turn.leaves() {
        stream.write_all(&request[..request.len() * parts / 8]).await?;
        return Ok(None);
    }
    // An early answer may end the connection before all is sent.
    stream.write_all(&request).await.ok();
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        if stream.read_line(&mut head).await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned);
    let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("a status");
    let mut body = Vec::new();
    let whole = if turn.method() == "HEAD" || status == 204 {
        true
    } else if let Some(length) = field("content-length: ") {
        body.resize(length.parse().unwrap(), 0);
        stream.read_exact(&mut body).await.is_ok()
    } else {
        loop {
            let mut line = String::new();
            stream.read_line(&mut line).await?;
            let Ok(size) = usize::from_str_radix(line.trim_end(), 16) else { break false };
            let mut chunk = vec![0; size + 2];
            if stream.read_exact(&mut chunk).await.is_err() {
                break false;
            }
            body.extend(&chunk[..size]);
            if size == 0 {
                break true;
            }
        }
    };
    Ok(Some(Outcome { status, turn: field("x-turn: "), body: whole.then_some(body) }))
}

/// Takes turns over HTTP/1.1, on one connection as long as it lasts. How many were answered.
async fn over_http1(proxy: std::net::SocketAddr, turns: impl Iterator<Item = Turn>) -> usize {
    let (mut answered, mut kept) = (0, None);
    for turn in turns {
        let mut stream = match kept.take() {
            Some(stream) => stream,
            None => BufReader::new(TcpStream::connect(proxy).await.unwrap()),
        };
        match within(&format!("the end of {turn:?}"), take(&mut stream, turn)).await {
            Ok(Some(outcome)) => {
                answered += usize::from(outcome.check(turn));
                let over = outcome.body.is_none() || matches!(turn.mode(), Mode::Early) || outcome.status == 502;
                kept = (!over).then_some(stream);
            }
            Ok(None) => {}
            // Broken off before a byte of the head went out.
            Err(error) => assert_eq!(turn.mode(), Mode::Cut, "{turn:?}: {error}"),
        }
    }
    answered
}

/// Takes turns over one connection of HTTP/2, a few at a time.
async fn over_http2(proxy: std::net::SocketAddr, turns: impl Iterator<Item = Turn>) -> usize {
    let client = Arc::new(Http2Client::to(proxy).await);
    let (mut answered, mut running) = (0, JoinSet::new());
    for turn in turns {
        let client = client.clone();
        running.spawn(within("the end of a stream", async move {
            let upload = turn.upload();
            let mut head = Request::builder().method(turn.method()).uri(format!("http://a/{}", turn.0));
            if !upload.is_empty() {
                head = head.header("content-length", upload.len());
            }
            let (sender, answer) = client.begin(head.body(()).unwrap());
            if turn.leaves().is_some() {
                tokio::select! { biased; _ = answer => {}, () = tokio::task::yield_now() => {} }
                return false;
            }
            let send = async {
                if upload.is_empty() || sender.try_data(upload).await {
                    sender.finish();
                }
            };
            // First what may say that there is no body.
            let ((), answer) = tokio::join!(biased; send, answer);
            let Ok(answer) = answer else {
                assert_eq!(turn.mode(), Mode::Cut, "{turn:?}");
                return false;
            };
            let (head, body) = answer.into_parts();
            let named = head.headers.get("x-turn").map(|value| value.to_str().unwrap().to_owned());
            let body = body.collect().await.ok().map(|body| body.to_bytes().into());
            Outcome { status: head.status.as_u16(), turn: named, body }.check(turn)
        }));
        if running.len() == 8 {
            answered += usize::from(running.join_next().await.unwrap().unwrap());
        }
    }
    answered + running.join_all().await.into_iter().filter(|answered| *answered).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_belongs_to_its_request_whatever_the_others_do() {
    const CLIENTS: u64 = 24;
    const TURNS: u64 = 50;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut backend = JoinSet::new();
    backend.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async { drop(play(stream).await) });
        }
    });
    let proxy = Proxy::before(&url, BRIEF).await;
    let before = proxy.descriptors();

    let mut clients = JoinSet::new();
    for client in 0..CLIENTS {
        let (address, turns) = (proxy.address(), (client * TURNS..(client + 1) * TURNS).map(Turn));
        if client % 3 == 0 {
            clients.spawn(over_http2(address, turns));
        } else {
            clients.spawn(over_http1(address, turns));
        }
    }
    let answered: usize = clients.join_all().await.into_iter().sum();
    assert!(answered > 800, "most are answered: {answered} of {}", CLIENTS * TURNS);
    left_over(&proxy, before).await;
}

/// Waits until nothing is in flight and nothing more is held than `before`.
async fn left_over(proxy: &Proxy, before: usize) {
    for gauge in ["sidegate_in_flight{route=\"/*\"}", "sidegate_in_flight{route=\"none\"}", "sidegate_connections"] {
        eventually(&format!("{gauge} to be 0"), async || proxy.sample(gauge).await == 0).await;
    }
    eventually(&format!("{before} descriptors again"), async || proxy.descriptors() <= before + 1).await;
}

/// Kind, flags, stream, payload.
type Frame = (u8, u8, u32, &'static [u8]);

#[tokio::test(flavor = "multi_thread")]
async fn floods_of_frames_reach_nobody_else_and_leave_nothing() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), BRIEF).await;
    let before = proxy.descriptors();
    // What is sent once, and what is sent over and over.
    let get: &'static [u8] = &[0x82, 0x86, 0x84, 0x41, 1, b'a'];
    let post: &'static [u8] = &[0x83, 0x86, 0x84, 0x41, 1, b'a'];
    let floods: [(&str, Option<Frame>, Frame); 6] = [
        ("CONTINUATION", Some((HEADERS, 1, 1, get)), (CONTINUATION, 0, 1, b"\0\x01x\x01y")),
        ("empty CONTINUATION", Some((HEADERS, 1, 1, get)), (CONTINUATION, 0, 1, b"")),
        ("empty DATA", Some((HEADERS, 4, 1, post)), (DATA, 0, 1, b"")),
        ("PING", None, (PING, 0, 0, b"12345678")),
        ("SETTINGS", None, (SETTINGS, 0, 0, b"\0\x04\0\0\xff\xff")),
        ("a head on a stream that is used", Some((HEADERS, 5, 1, get)), (HEADERS, 5, 1, get)),
    ];
    let mut neighbour = proxy.connect().await;
    let mut flooding = Vec::new();
    for (name, first, (kind, flags, stream, payload)) in floods {
        let mut client = RawHttp2::to(proxy.address()).await;
        if let Some((kind, flags, stream, payload)) = first {
            client.send(kind, flags, stream, payload).await;
        }
        for _ in 0..2000 {
            client.send(kind, flags, stream, payload).await;
        }
        neighbour.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        assert_eq!(neighbour.answer().await.text(), "ok", "beside {name}");
        flooding.push(client);
    }
    drop((flooding, neighbour));
    left_over(&proxy, before).await;
    assert!(proxy.resident() < 200 << 10, "{} KiB", proxy.resident());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_storm_of_reloads_costs_no_request() {
    let backend = Recorder::ok().await;
    let url = backend.url();
    let file = |idle: usize| format!("upstreams: {{ api: {{ endpoints: [\"{url}\"], pool: {{ idle: {idle}ms }} }} }}");
    let proxy = Proxy::start(&file(200)).await;
    let before = proxy.descriptors();
    let over = AtomicUsize::new(0);
    let client = async || {
        let mut client = proxy.connect().await;
        for turn in 0..100 {
            client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
            assert_eq!(client.answer().await.text(), "ok", "request {turn}");
        }
        over.fetch_add(1, Ordering::Relaxed);
    };
    let storm = async {
        for turn in 0.. {
            match turn % 4 {
                0 => proxy.rewrite("upstreams: { api: { endpoints: 1"),
                // The pool is another one: connections of the old one end with their requests.
                1 => proxy.rewrite(&file(200 + turn % 3)),
                _ => {}
            }
            proxy.signal(Signal::HUP);
            proxy.get("/").await;
            if over.load(Ordering::Relaxed) == 3 {
                break;
            }
        }
    };
    tokio::join!(client(), client(), client(), storm);
    proxy.rewrite(&file(200));
    proxy.signal(Signal::HUP);
    left_over(&proxy, before).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backend_that_restarts_under_load_costs_no_get() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let restarts = Arc::new(AtomicUsize::new(0));
    let mut backend = JoinSet::new();
    let current = restarts.clone();
    backend.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            let current = current.clone();
            connections.spawn(async move {
                let (mut wire, born) = (Wire::new(stream), current.load(Ordering::Relaxed));
                // One of an old process takes the next request and dies of it: no proxy can know before.
                for served in 0.. {
                    if !wire.another().await || served > 0 && current.load(Ordering::Relaxed) != born {
                        return;
                    }
                    wire.head().await;
                    if wire.try_send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    let proxy = Proxy::before(&url, "").await;
    let mut clients = JoinSet::new();
    for _ in 0..8 {
        let (address, restarts) = (proxy.address(), restarts.clone());
        clients.spawn(async move {
            let mut client = Wire::to(address).await;
            for turn in 0..100 {
                if turn % 10 == 0 {
                    restarts.fetch_add(1, Ordering::Relaxed);
                }
                client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
                assert_eq!(client.answer().await.text(), "ok", "request {turn}");
            }
        });
    }
    clients.join_all().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_http2_upstream_has_not_begun_with_is_sent_again() {
    let (reset, no_stream): (Frame, Frame) = ((RST_STREAM, 0, 1, &[0, 0, 0, 7]), (GOAWAY, 0, 0, &[0; 8]));
    for (method, (kind, flags, stream, payload), again) in
        [("GET", reset, true), ("POST", reset, true), ("GET", no_stream, true), ("POST", no_stream, false)]
    {
        let backend = Backend::start().await;
        let yaml = "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }";
        let proxy = Proxy::before(&backend.url(), yaml).await;
        let mut client = proxy.connect().await;
        client.send(format!("{method} / HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")).await;
        let mut upstream = RawHttp2::serving(backend.accept().await).await;
        upstream.frame().await;
        upstream.send(kind, flags, stream, payload).await;
        if again {
            let mut second = if kind == GOAWAY { RawHttp2::serving(backend.accept().await).await } else { upstream };
            let stream = if kind == GOAWAY { 1 } else { 3 };
            assert_eq!(second.frame_of(stream).await.kind, HEADERS, "{method}, {kind}");
            second.send(HEADERS, 5, stream, &[0x89]).await;
            assert_eq!(client.answer().await.status(), 204, "{method}, {kind}");
        } else {
            assert_eq!(client.answer().await.status(), 502, "it may have had an effect");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_connection_that_has_gone_silent_takes_one_request_with_it_and_no_more() {
    let backend = Backend::start().await;
    let yaml = "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }
defaults: { timeouts: { first_byte: 1100ms } }";
    let proxy = Proxy::before(&backend.url(), yaml).await;
    let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut client = proxy.connect().await;
    client.send(get).await;
    let mut silent = RawHttp2::serving(backend.accept().await).await;
    assert_eq!(silent.frame().await.kind, HEADERS);
    silent.send(HEADERS, 5, 1, &[0x89]).await;
    assert_eq!(client.answer().await.status(), 204);
    client.send(get).await;
    assert_eq!(silent.frame_of(3).await.kind, HEADERS);
    assert_eq!(client.answer().await.status(), 504);

    client.send(get).await;
    let mut upstream = RawHttp2::serving(backend.accept().await).await;
    assert_eq!(upstream.frame().await.kind, HEADERS);
    upstream.send(HEADERS, 5, 1, &[0x89]).await;
    assert_eq!(client.answer().await.status(), 204);
    silent.gone().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_connection_that_has_gone_silent_is_left_however_soon_requests_are_given_up() {
    let backend = Backend::start().await;
    let yaml = "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }
defaults: { timeouts: { first_byte: 400ms } }";
    let proxy = Proxy::before(&backend.url(), yaml).await;
    let get = "GET / HTTP/1.1\r\nhost: a\r\n\r\n";
    let mut client = proxy.connect().await;
    for _ in 0..3 {
        client.send(get).await;
        assert_eq!(client.answer().await.status(), 504);
    }
    let _silent = backend.accept().await;
    let answering = async {
        let mut upstream = RawHttp2::serving(backend.accept().await).await;
        assert_eq!(upstream.frame().await.kind, HEADERS);
        upstream.send(HEADERS, 5, 1, &[0x89]).await;
        upstream
    };
    client.send(get).await;
    let (answer, _upstream) = tokio::join!(client.answer(), answering);
    assert_eq!(answer.status(), 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_refusal_of_an_upload_arrives_although_the_backend_closes_on_it() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let upload = vec![b'x'; 1 << 20];
    // It is a race between the answer and the reset behind it.
    for turn in 0..20 {
        let mut client = proxy.connect().await;
        let ask = async {
            client.send(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", upload.len())).await;
            client.try_send(&upload).await.ok();
            client.answer().await
        };
        let refuse = async {
            let (mut upstream, _) = backend.accept_head().await;
            upstream.send("HTTP/1.1 413 Payload Too Large\r\ncontent-length: 2\r\n\r\nno").await;
            upstream.leave(true);
        };
        let (answer, ()) = tokio::join!(ask, refuse);
        assert_eq!((answer.status(), &*answer.text()), (413, "no"), "turn {turn}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_does_not_answer_holds_up_no_end() {
    let proxy = Proxy::start("upstreams: { fixed: { respond: { text: x } } }").await;
    let file = proxy.path("sidegate.yaml");
    std::fs::remove_file(&file).unwrap();
    let made = tokio::process::Command::new("mkfifo").arg(&file).status().await;
    assert!(made.expect("mkfifo is there").success());
    proxy.signal(Signal::HUP);
    assert_eq!(proxy.get("/").await.text(), "x");
    // Dropped, it is asked to end, and must.
}
