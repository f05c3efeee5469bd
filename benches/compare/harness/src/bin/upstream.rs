//! The server behind the proxies: one thread, HTTP/1.1, no HTTP library, so that it takes as little as
//! possible of the core that it shares with the load generator.
//!
//! `upstream PORT` answers on the loopback address:
//!
//! - `GET /hello`: 13 bytes; `GET /json64k`: 64 KiB; `POST /echo`: the body that came (with a length)
//! - `GET /sse?n=10&interval_us=1000&per_write=1&id=7`: that many events, chunked, one chunk each
//! - `GET /wait?id=7`: nothing, until the peer leaves; `GET /waiting`: the id of the last such request
//! - `GET /left`: a line `id nanoseconds` for each `id` whose peer left, with the moment at which it was seen
//! - `GET /left/reset`, `GET /streams`: forgets those; how many event streams are open

use std::cell::RefCell;
use std::fmt::Write as _;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use bench_harness::{event, monotonic_ns};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, timeout_at};

const MAX_HEAD: usize = 16 * 1024;
const MAX_BODY: usize = 1024 * 1024;
/// More peers than this are not remembered.
const MAX_LEFT: usize = 100_000;
/// How long `/wait` waits for its peer to leave.
const MAX_WAIT: Duration = Duration::from_secs(30);

#[derive(Default)]
struct State {
    left: Vec<(u64, u64)>,
    waiting: Option<u64>,
    streams: usize,
}

type Shared = Rc<RefCell<State>>;

/// A whole answer with its body, ready to be written again and again.
fn answer(content_type: &str, body: &[u8]) -> Vec<u8> {
    let mut out = format!("HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\ncontent-length: {}\r\n\r\n", body.len())
        .into_bytes();
    out.extend_from_slice(body);
    out
}

struct Answers {
    hello: Vec<u8>,
    json: Vec<u8>,
}

impl Answers {
    fn new() -> Self {
        let mut json = br#"[""#.to_vec();
        json.extend((0..64 * 1024 - 4).map(|i| b'a' + u8::try_from(i % 26).unwrap_or(0)));
        json.extend_from_slice(br#""]"#);
        Self { hello: answer("text/plain", b"Hello, World!"), json: answer("application/json", &json) }
    }
}

/// Where the head ends, empty line included.
fn head_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(4).position(|w| w == b"\r\n\r\n").map(|at| at + 4)
}

fn content_length(head: &str) -> Option<usize> {
    head.lines().find_map(|line| {
        let (name, value) = line.split_once(':')?;
        name.eq_ignore_ascii_case("content-length").then(|| value.trim().parse().ok())?
    })
}

fn parameter(query: &str, name: &str) -> Option<u64> {
    query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
}

/// Waits for the peer to leave. Bytes that arrive meanwhile are dropped: nobody pipelines here.
async fn peer_left(io: &mut TcpStream) {
    let mut bytes = [0; 512];
    while let Ok(1..) = io.read(&mut bytes).await {}
}

fn remember(state: &Shared, id: Option<u64>) {
    let seen = monotonic_ns();
    let left = &mut state.borrow_mut().left;
    if let Some(id) = id
        && left.len() < MAX_LEFT
    {
        left.push((id, seen));
    }
}

/// Writes the events of `/sse`; an error means that the peer left before the last one.
async fn events(io: &mut TcpStream, query: &str) -> io::Result<()> {
    let number = parameter(query, "n").unwrap_or(10);
    let interval = Duration::from_micros(parameter(query, "interval_us").unwrap_or(0));
    let per_write = parameter(query, "per_write").unwrap_or(1).max(1);
    let mut out = String::from(
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: no-cache\r\ntransfer-encoding: chunked\r\n\r\n",
    );
    io.write_all(out.as_bytes()).await?;

    let mut due = Instant::now();
    let mut sent = 0;
    while sent < number {
        if !interval.is_zero() && timeout_at(due, peer_left(io)).await.is_ok() {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        due += interval;
        out.clear();
        for _ in 0..per_write.min(number - sent) {
            let event = event(sent);
            let _infallible = write!(out, "{:x}\r\n{event}\r\n", event.len());
            sent += 1;
        }
        io.write_all(out.as_bytes()).await?;
    }
    io.write_all(b"0\r\n\r\n").await
}

async fn connection(mut io: TcpStream, state: Shared, answers: Rc<Answers>) -> io::Result<()> {
    io.set_nodelay(true)?;
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let end = loop {
            if let Some(end) = head_end(&buffer) {
                break end;
            }
            if buffer.len() > MAX_HEAD || io.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
        };
        let head = String::from_utf8_lossy(&buffer[..end]);
        let target = head.split(' ').nth(1).unwrap_or("/");
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let mut used = end;
        match path {
            "/hello" => io.write_all(&answers.hello).await?,
            "/json64k" => io.write_all(&answers.json).await?,
            "/echo" => {
                let Some(length) = content_length(&head).filter(|length| *length <= MAX_BODY) else {
                    return io
                        .write_all(b"HTTP/1.1 411 Length Required\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
                        .await;
                };
                drop(head);
                used += length;
                while buffer.len() < used {
                    if io.read_buf(&mut buffer).await? == 0 {
                        return Ok(());
                    }
                }
                io.write_all(&answer("application/octet-stream", &buffer[end..used])).await?;
            }
            "/sse" => {
                state.borrow_mut().streams += 1;
                let outcome = events(&mut io, query).await;
                state.borrow_mut().streams -= 1;
                if outcome.is_err() {
                    remember(&state, parameter(query, "id"));
                    return Ok(());
                }
            }
            "/wait" => {
                state.borrow_mut().waiting = parameter(query, "id");
                if timeout_at(Instant::now() + MAX_WAIT, peer_left(&mut io)).await.is_ok() {
                    remember(&state, parameter(query, "id"));
                }
                return Ok(());
            }
            "/left" => {
                let mut text = String::new();
                for (id, seen) in &state.borrow().left {
                    let _infallible = writeln!(text, "{id} {seen}");
                }
                io.write_all(&answer("text/plain", text.as_bytes())).await?;
            }
            "/left/reset" => {
                state.borrow_mut().left.clear();
                state.borrow_mut().waiting = None;
                io.write_all(&answers.hello).await?;
            }
            "/waiting" => {
                let text = state.borrow().waiting.map_or_else(String::new, |id| id.to_string());
                io.write_all(&answer("text/plain", text.as_bytes())).await?;
            }
            "/streams" => {
                let text = state.borrow().streams.to_string();
                io.write_all(&answer("text/plain", text.as_bytes())).await?;
            }
            _ => {
                return io.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
            }
        }
        buffer.drain(..used);
    }
}

async fn serve(listener: TcpListener, state: Shared, answers: Rc<Answers>) {
    loop {
        match listener.accept().await {
            // How a connection ends is the peer's business, and the next one is no worse for it.
            Ok((io, _)) => drop(spawn_local(connection(io, state.clone(), answers.clone()))),
            Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

fn main() -> io::Result<()> {
    let port = std::env::args()
        .nth(1)
        .and_then(|port| port.parse().ok())
        .ok_or_else(|| io::Error::other("usage: upstream PORT"))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    LocalSet::new().block_on(&runtime, async {
        let (state, answers) = (Shared::default(), Rc::new(Answers::new()));
        let listen = |last| {
            let socket = TcpSocket::new_v4()?;
            socket.set_reuseaddr(true)?;
            socket.bind(([127, 0, 0, last], port).into())?;
            socket.listen(4096)
        };
        // The same on a second address, for those that want two endpoints.
        drop(spawn_local(serve(listen(2)?, state.clone(), answers.clone())));
        serve(listen(1)?, state, answers).await;
        Ok(())
    })
}
