//! The streaming client in front of the proxies. Prints one line of JSON; times are microseconds.
//!
//! - `client frames ADDRESS STREAMS INTERVAL_US SECONDS`: event streams side by side, their events spread
//!   evenly over the interval; how long each event takes from the upstream's write to the read here
//! - `client burst ADDRESS STREAMS EVENTS SECONDS`: streams of that many events back to back, one stream
//!   after the other on each kept connection
//! - `client cancel ADDRESS UPSTREAM head|stream COUNT`: leaves before the response head, or after the first
//!   event of a stream that then falls silent; how long until the upstream sees it
//! - `client hold ADDRESS idle|stream COUNT`: opens idle connections (after one request each) or event
//!   streams with an event each second, prints `ready`, and holds them until its input is closed

use std::cell::RefCell;
use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::rc::Rc;
use std::time::Duration;

use bench_harness::{monotonic_ns, parse_event};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, sleep, timeout};

/// Longer than this without a byte is a failure.
const PATIENCE: Duration = Duration::from_secs(20);
/// After this a peer that left counts as never seen.
const UNSEEN: Duration = Duration::from_secs(3);
/// Given to all that one client caused to come to rest, before it leaves and before the next one.
const SETTLE: Duration = Duration::from_millis(4);

/// Decodes a response as it comes. Only what the proxies answer here: chunked, or with a length.
enum Part {
    Head,
    Size,
    /// So many bytes of a chunk and of the line end after it.
    Chunk(usize),
    /// The empty line after the last chunk.
    Last,
    Length(usize),
    Done,
}

struct Response {
    part: Part,
    raw: Vec<u8>,
    body: Vec<u8>,
}

impl Response {
    fn new() -> Self {
        Self { part: Part::Head, raw: Vec::with_capacity(16 * 1024), body: Vec::new() }
    }

    /// Takes what it can of the bytes read so far.
    fn decode(&mut self) -> io::Result<()> {
        let mut at = 0;
        loop {
            let rest = &self.raw[at..];
            match self.part {
                Part::Head => {
                    let Some(end) = rest.windows(4).position(|w| w == b"\r\n\r\n") else { break };
                    self.part = part_after(&rest[..end])?;
                    at += end + 4;
                }
                Part::Size => {
                    let Some(end) = rest.windows(2).position(|w| w == b"\r\n") else { break };
                    let size = std::str::from_utf8(&rest[..end])
                        .ok()
                        .and_then(|hex| usize::from_str_radix(hex.trim(), 16).ok());
                    self.part = match size.ok_or_else(|| io::Error::other("a chunk without a size"))? {
                        0 => Part::Last,
                        size => Part::Chunk(size + 2),
                    };
                    at += end + 2;
                }
                Part::Chunk(left) => {
                    let taken = left.min(rest.len());
                    // The last two are the line end, which may arrive on their own.
                    self.body.extend_from_slice(&rest[..taken.min(left.saturating_sub(2))]);
                    at += taken;
                    if taken < left {
                        self.part = Part::Chunk(left - taken);
                        break;
                    }
                    self.part = Part::Size;
                }
                Part::Last => {
                    if rest.len() < 2 {
                        break;
                    }
                    self.part = Part::Done;
                    at += 2;
                }
                Part::Length(left) => {
                    let taken = left.min(rest.len());
                    self.body.extend_from_slice(&rest[..taken]);
                    at += taken;
                    self.part = if taken == left { Part::Done } else { Part::Length(left - taken) };
                    break;
                }
                Part::Done => break,
            }
        }
        self.raw.drain(..at);
        Ok(())
    }

    fn done(&self) -> bool {
        matches!(self.part, Part::Done)
    }

    /// Reads once, and decodes what came.
    async fn read(&mut self, io: &mut TcpStream) -> io::Result<()> {
        match timeout(PATIENCE, io.read_buf(&mut self.raw)).await {
            Err(_) => Err(io::Error::other("nothing came")),
            Ok(Ok(0)) => Err(io::Error::other("ended too early")),
            Ok(Ok(_)) => self.decode(),
            Ok(Err(error)) => Err(error),
        }
    }

    /// Takes the whole events out of the body, each as its stamp and number.
    fn events(&mut self, mut each: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut at = 0;
        while let Some(end) = self.body[at..].windows(2).position(|w| w == b"\n\n") {
            let (stamp, number) =
                parse_event(&self.body[at..at + end]).ok_or_else(|| io::Error::other("a broken event"))?;
            each(stamp, number);
            at += end + 2;
        }
        self.body.drain(..at);
        Ok(())
    }
}

/// What follows a head.
fn part_after(head: &[u8]) -> io::Result<Part> {
    let head = String::from_utf8_lossy(head).to_ascii_lowercase();
    if head.get(9..12) != Some("200") {
        return Err(io::Error::other(format!("status {}", head.get(9..12).unwrap_or("missing"))));
    }
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim));
    if field("transfer-encoding").is_some_and(|value| value == "chunked") {
        return Ok(Part::Size);
    }
    field("content-length")
        .and_then(|n| n.parse().ok())
        .map(Part::Length)
        .ok_or_else(|| io::Error::other("neither chunked nor a length"))
}

async fn connect(address: &str) -> io::Result<TcpStream> {
    let io = TcpStream::connect(address).await?;
    io.set_nodelay(true)?;
    Ok(io)
}

async fn request(io: &mut TcpStream, address: &str, target: &str) -> io::Result<()> {
    io.write_all(format!("GET {target} HTTP/1.1\r\nhost: {address}\r\naccept: text/event-stream\r\n\r\n").as_bytes())
        .await
}

/// What was seen of all streams.
#[derive(Default)]
struct Seen {
    delays_us: Vec<u64>,
    events: u64,
    streams: u64,
    reads: u64,
    /// Streams that failed, were out of order, or ended without all their events.
    errors: u64,
    error: String,
}

type Shared = Rc<RefCell<Seen>>;

/// One event stream from request to end.
async fn stream(io: &mut TcpStream, address: &str, target: &str, expected: u64, seen: &Shared) -> io::Result<()> {
    request(io, address, target).await?;
    let mut response = Response::new();
    let mut next = 0;
    while !response.done() {
        response.read(io).await?;
        let now = monotonic_ns();
        let mut seen = seen.borrow_mut();
        let mut in_order = true;
        response.events(|stamp, number| {
            in_order &= number == next;
            next += 1;
            seen.delays_us.push(now.saturating_sub(stamp) / 1000);
        })?;
        seen.reads += 1;
        if !in_order {
            return Err(io::Error::other("events out of order"));
        }
    }
    seen.borrow_mut().events += next;
    if next == expected { Ok(()) } else { Err(io::Error::other("events are missing")) }
}

fn note(seen: &Shared, outcome: io::Result<()>) -> bool {
    let mut seen = seen.borrow_mut();
    seen.streams += 1;
    match outcome {
        Ok(()) => true,
        Err(error) => {
            seen.errors += 1;
            seen.error = error.to_string();
            false
        }
    }
}

async fn frames(address: Rc<str>, streams: u32, interval: Duration, seconds: u32, seen: Shared) {
    let events = u64::from(seconds) * 1_000_000 / u64::try_from(interval.as_micros()).unwrap_or(1).max(1);
    // Each another one, so that a cache has no use for one of them in place of the others.
    let (run, interval_us) = (monotonic_ns(), interval.as_micros());
    let tasks: Vec<_> = (0..streams)
        .map(|i| {
            let (address, seen) = (address.clone(), seen.clone());
            let target = format!("/sse?n={events}&interval_us={interval_us}&stream={run}-{i}");
            spawn_local(async move {
                // tokio's timer ticks each millisecond, so a few streams share a tick, as they do in any server.
                sleep(interval * i / streams).await;
                let outcome = async { stream(&mut connect(&address).await?, &address, &target, events, &seen).await };
                note(&seen, outcome.await);
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a stream's task neither panics nor is aborted");
    }
}

async fn burst(address: Rc<str>, streams: u32, events: u64, seconds: u32, seen: Shared) {
    let target: Rc<str> = format!("/sse?n={events}&per_write=32").into();
    let end = Instant::now() + Duration::from_secs(seconds.into());
    let tasks: Vec<_> = (0..streams)
        .map(|_| {
            let (address, target, seen) = (address.clone(), target.clone(), seen.clone());
            spawn_local(async move {
                let Ok(mut io) = connect(&address).await else {
                    note(&seen, Err(io::Error::other("no connection")));
                    return;
                };
                while Instant::now() < end && note(&seen, stream(&mut io, &address, &target, events, &seen).await) {}
            })
        })
        .collect();
    for task in tasks {
        task.await.expect("a stream's task neither panics nor is aborted");
    }
}

fn percentile(sorted: &[u64], percent: usize) -> u64 {
    sorted.get((sorted.len() * percent / 100).min(sorted.len().saturating_sub(1))).copied().unwrap_or(0)
}

fn report(seen: &Shared, began: Instant) -> String {
    let mut seen = seen.borrow_mut();
    seen.delays_us.sort_unstable();
    let delay = |percent| percentile(&seen.delays_us, percent);
    format!(
        r#"{{"secs":{:.6},"count":{},"streams":{},"reads":{},"errors":{},"error":{:?},"p50":{},"p99":{}}}"#,
        began.elapsed().as_secs_f64(),
        seen.events,
        seen.streams,
        seen.reads,
        seen.errors,
        seen.error,
        delay(50),
        delay(99)
    )
}

/// A whole response of the upstream itself.
async fn ask(address: &str, target: &str) -> io::Result<String> {
    let mut io = connect(address).await?;
    request(&mut io, address, target).await?;
    let mut response = Response::new();
    while !response.done() {
        response.read(&mut io).await?;
    }
    Ok(String::from_utf8_lossy(&response.body).into_owned())
}

async fn cancel(address: &str, upstream: &str, before_head: bool, count: u64) -> io::Result<String> {
    ask(upstream, "/left/reset").await?;
    let mut left = HashMap::new();
    for id in 0..count {
        let mut io = connect(address).await?;
        if before_head {
            request(&mut io, address, &format!("/wait?id={id}")).await?;
            // One that leaves before its request arrived may rightly never be seen.
            let (id, began) = (id.to_string(), Instant::now());
            while ask(upstream, "/waiting").await? != id && began.elapsed() < UNSEEN {
                sleep(Duration::from_millis(1)).await;
            }
        } else {
            request(&mut io, address, &format!("/sse?n=2&interval_us=30000000&id={id}")).await?;
            let mut response = Response::new();
            let mut first = false;
            while !first {
                response.read(&mut io).await?;
                response.events(|_, _| first = true)?;
            }
        }
        sleep(SETTLE).await;
        left.insert(id, monotonic_ns());
        drop(io);
        sleep(SETTLE).await;
    }
    let mut seen = Vec::new();
    let deadline = Instant::now() + UNSEEN;
    while seen.len() < left.len() && Instant::now() < deadline {
        sleep(Duration::from_millis(50)).await;
        seen = ask(upstream, "/left")
            .await?
            .lines()
            .filter_map(|line| {
                let (id, at) = line.split_once(' ')?;
                let left: u64 = *left.get(&id.parse().ok()?)?;
                Some(at.parse::<u64>().ok()?.saturating_sub(left) / 1000)
            })
            .collect();
    }
    seen.sort_unstable();
    let (p50, p99) = (percentile(&seen, 50), percentile(&seen, 99));
    Ok(format!(r#"{{"count":{},"unseen":{},"p50":{p50},"p99":{p99}}}"#, seen.len(), left.len() - seen.len()))
}

/// Holds what it opened until the standard input is closed, which ends the program.
async fn hold(address: &str, streams: bool, count: u64) -> io::Result<()> {
    let mut idle = Vec::new();
    for _ in 0..count {
        let mut io = connect(address).await?;
        let mut response = Response::new();
        request(&mut io, address, if streams { "/sse?n=600&interval_us=1000000" } else { "/hello" }).await?;
        while !response.done() && (!streams || response.body.is_empty()) {
            response.read(&mut io).await?;
        }
        if streams {
            spawn_local(async move {
                let mut bytes = [0; 1024];
                while let Ok(1..) = io.read(&mut bytes).await {}
            });
        } else {
            idle.push(io);
        }
    }
    println!("ready");
    io::stdout().flush()?;
    std::thread::spawn(|| {
        let _ended = io::stdin().read(&mut [0]);
        std::process::exit(0);
    });
    std::future::pending().await
}

fn main() -> io::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let number = |text: &str| text.parse::<u32>().map_err(|_| io::Error::other(format!("not a number: {text}")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (began, seen) = (Instant::now(), Shared::default());
    LocalSet::new().block_on(&runtime, async {
        let line = match arguments[..] {
            ["frames", address, streams, interval_us, seconds] => {
                let interval = Duration::from_micros(number(interval_us)?.into());
                frames(address.into(), number(streams)?, interval, number(seconds)?, seen.clone()).await;
                report(&seen, began)
            }
            ["burst", address, streams, events, seconds] => {
                burst(address.into(), number(streams)?, number(events)?.into(), number(seconds)?, seen.clone()).await;
                report(&seen, began)
            }
            ["cancel", address, upstream, when @ ("head" | "stream"), count] => {
                cancel(address, upstream, when == "head", number(count)?.into()).await?
            }
            ["hold", address, what @ ("idle" | "stream"), count] => {
                return hold(address, what == "stream", number(count)?.into()).await;
            }
            _ => return Err(io::Error::other("usage: see the head of client.rs")),
        };
        println!("{line}");
        Ok(())
    })
}
