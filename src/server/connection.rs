//! One client connection: HTTP/1.1 or HTTP/2, its silences, its end.
//!
//! Cleartext connections begin with their first bytes: the HTTP/2 preface (prior knowledge, RFC 9113 §3.3) or
//! a request. Under TLS the protocol is the one that ALPN chose.
//!
//! # Silence
//! Three waits are bounded: for a request's head (`client_header`, from the accept or from the head's first byte), for the
//! next request (`keepalive`, from the end of the last response), and for a client that takes nothing of what is
//! written to it (`idle` of the defaults; while it does not, nobody asks a response's body for more, so no timeout
//! of the body's own can see it; for a single stream of HTTP/2 see `streams`). For the same reason a response that has a
//! deadline, and whose client does not take it, is ended from here. hyper's own timer for the first is re-armed at
//! every request; here one timer per connection is armed and looked at again when it fires, and requests only
//! leave their marks in a record of their connection: two atomic additions and one look at the clock.
//!
//! # Why not hyper-util's `auto` server
//! Its connection holds both protocols in place, an HTTP/2 one being the larger by far, and cannot be told by
//! ALPN. Here HTTP/2 is boxed and the preface is matched in the reader that counts the bytes anyway.

use std::{
    convert::Infallible,
    fmt,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc, Weak,
        atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http::{Method, StatusCode, Version, header::CONTENT_LENGTH};
use http_body::{Body as HttpBody, Frame, SizeHint};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
};
use hyper_util::rt::TokioIo;
use prometheus_client::metrics::gauge::Gauge;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpStream, UnixStream},
    sync::{OwnedSemaphorePermit, futures::OwnedNotified},
    time::{Instant, Sleep, sleep_until},
};
use tokio_rustls::server::TlsStream;
use tracing::debug;

use super::{
    Handler,
    drain::Drain,
    failures::{Failures, Slow, Ungreeted, reason},
    proxy_protocol,
    response::Outbound,
    streams::{self, Streams, asked},
    tls::Tls,
};
use crate::{
    layers::timeouts,
    message::{Body, BoxError, Connection as Facts, Deadline, Error, Kind, Peer, Request},
    settings::listener::ProxyProtocol,
    telemetry::metrics::ConnectionError,
};

/// What begins an HTTP/2 connection, RFC 9113 §3.4.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// After a polite end, how long the client may take to close. Also what an HTTP/2 client has to answer the
/// PING that comes between the two GOAWAYs.
const CLOSE_GRACE: Duration = Duration::from_secs(5);
/// When a drain begins, or its place is wanted, how long a connection that has not sent its first byte may still do so:
/// the client may have connected the moment before.
const FRESH_GRACE: Duration = Duration::from_secs(1);
/// A response that should be over, and whose body has been asked and so knows, is on its way to its end: after this
/// long it is seen whether its client takes what is left.
const OVERDUE: Duration = Duration::from_millis(100);
/// How much of an unread request body is thrown away after the answer, at most.
const LINGER_BYTES: u32 = 1 << 20;
/// `SETTINGS_INITIAL_WINDOW_SIZE`: what one HTTP/2 stream may send before its handler reads, and so what it may send in
/// the time that it takes to the client and back: 2.5 MB/s over 100 ms.
const STREAM_WINDOW: u32 = 256 << 10;
/// The same where a connection may have so many streams that they would hold more than [`HELD`].
const LEAST_STREAM_WINDOW: u32 = 64 << 10;
/// What all streams of one connection together may send before they are read, as long as that leaves each of them
/// [`LEAST_STREAM_WINDOW`].
const HELD: u32 = 64 << 20;

/// The hard limits of a connection. hyper answers a request beyond them with a bare 431 or 414, so they stand a
/// little above those of `layers::hygiene`, which answers with a reason.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Fields of a request's head.
    pub headers: usize,
    /// Bytes of the header section.
    pub header_bytes: usize,
    /// Bytes of the request target.
    pub uri_bytes: usize,
    /// Streams that one HTTP/2 connection may have open.
    pub http2_streams: u32,
}

impl Limits {
    /// The flow-control windows of a stream of HTTP/2 and of its connection.
    ///
    /// The connection's is as large as those of all its streams together. Were it smaller, as in most servers, requests
    /// that wait in a queue would use it up with bodies that nobody reads yet, and starve those that they wait for. (Nor
    /// is hyper's adaptive window of use: it makes both of one size.) The bound on what a connection can make us hold is
    /// therefore `http2_streams` times [`STREAM_WINDOW`], at most [`HELD`]; with more than a thousand streams it is
    /// [`LEAST_STREAM_WINDOW`] for each. (What small frames cost beside their bytes, h2 bounds by half of that.) nginx
    /// gives each stream 64 KiB, and the connection no bound of its own.
    fn windows(self) -> (u32, u32) {
        let streams = self.http2_streams.max(1);
        let stream = (HELD / streams).clamp(LEAST_STREAM_WINDOW, STREAM_WINDOW);
        // RFC 9113 §6.9.1: no window is larger than that.
        (stream, stream.saturating_mul(streams).min(i32::MAX.cast_unsigned()))
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self { headers: 100, header_bytes: 64 << 10, uri_bytes: 16 << 10, http2_streams: 200 }
    }
}

/// How long a connection may be silent. Shared by all connections; a change is seen by each when its timer fires.
#[derive(Debug)]
pub struct Timing {
    client_header: AtomicU64,
    keepalive: AtomicU64,
    idle: AtomicU64,
}

impl Timing {
    /// As `timeouts` say.
    #[must_use]
    pub fn new(timeouts: &timeouts::Config) -> Self {
        let timing = Self { client_header: AtomicU64::new(0), keepalive: AtomicU64::new(0), idle: AtomicU64::new(0) };
        timing.set(timeouts);
        timing
    }

    /// Changes them.
    pub fn set(&self, timeouts: &timeouts::Config) {
        self.client_header.store(micros(timeouts.client_header.get()), Ordering::Relaxed);
        self.keepalive.store(micros(timeouts.keepalive.get()), Ordering::Relaxed);
        let idle = timeouts.idle.as_ref().map_or(Duration::MAX, |idle| idle.get());
        self.idle.store(micros(idle), Ordering::Relaxed);
    }

    fn client_header(&self) -> Duration {
        Duration::from_micros(self.client_header.load(Ordering::Relaxed))
    }

    pub(super) fn keepalive(&self) -> Duration {
        Duration::from_micros(self.keepalive.load(Ordering::Relaxed))
    }

    /// How long a client may leave unread what was sent to it.
    pub(super) fn idle(&self) -> Duration {
        Duration::from_micros(self.idle.load(Ordering::Relaxed))
    }
}

impl Default for Timing {
    fn default() -> Self {
        Self::new(&timeouts::Config::default())
    }
}

/// Within the longest duration of the configuration, a year.
fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX).min(365 * 86_400 * 1_000_000)
}

/// What the connections of one server have in common.
pub(super) struct Shared<H> {
    handler: H,
    http1: http1::Builder,
    http2: http2::Builder<Streams>,
    timing: Arc<Timing>,
    drain: Drain,
    failures: Failures,
}

impl<H> Shared<H> {
    pub(super) fn new(handler: H, limits: Limits, timing: Arc<Timing>, drain: Drain, failures: Failures) -> Self {
        // Room for the fields' names and separators that the limits do not count, and for what hyper reads ahead.
        let head = limits.header_bytes + limits.uri_bytes + (16 << 10);
        let mut http1 = http1::Builder::new();
        // No timer is set, so hyper's own header timeout is off. Half-closed clients count as gone (the default):
        // that is how a client's leaving is seen.
        http1.max_buf_size(head);
        if limits.headers >= 100 {
            // Up to 100 fields hyper parses on its stack, which is cheaper.
            http1.max_headers(limits.headers + 28);
        }
        let (stream_window, connection_window) = limits.windows();
        let mut http2 = http2::Builder::new(Streams(timing.clone()));
        http2
            .max_concurrent_streams(limits.http2_streams)
            .max_header_list_size(u32::try_from(head).unwrap_or(u32::MAX))
            .initial_stream_window_size(stream_window)
            .initial_connection_window_size(connection_window)
            .max_send_buf_size(STREAM_WINDOW as usize)
            // Rapid reset (CVE-2023-44487, CVE-2025-8671): streams that were reset before we took them, and
            // streams that we had to reset for errors of the client's. Beyond either, GOAWAY.
            .max_pending_accept_reset_streams(20)
            .max_local_error_reset_streams(256)
            .enable_connect_protocol();
        Self { handler, http1, http2, timing, drain, failures }
    }

    pub(super) fn drain(&self) -> &Drain {
        &self.drain
    }
}

impl<H> fmt::Debug for Shared<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared").field("timing", &self.timing).finish_non_exhaustive()
    }
}

/// The place that a connection takes among those open at once, and in the gauge.
#[derive(Debug)]
pub(super) struct Open {
    _permit: OwnedSemaphorePermit,
    gauge: Gauge,
}

impl Open {
    pub(super) fn new(permit: OwnedSemaphorePermit, gauge: Gauge) -> Self {
        gauge.inc();
        Self { _permit: permit, gauge }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.gauge.dec();
    }
}

/// What a connection's reader, its requests and its timer leave for each other: one allocation per connection,
/// which lives as long as the last of them.
#[derive(Debug)]
pub(super) struct Watch {
    accepted: Instant,
    /// Requests whose response has not ended.
    in_flight: AtomicU32,
    /// Requests begun, wrapping.
    requests: AtomicU32,
    /// When a request ended last, in microseconds from `accepted`.
    ended: AtomicU64,
    /// Since when the client takes nothing of what is written, in microseconds from `accepted`; 0 while it does.
    stalled: AtomicU64,
    /// HTTP/1.1: when the response has to be over, in microseconds from `accepted`; 0 where it may take its time.
    due: AtomicU64,
    flags: AtomicU16,
    /// The connection's task while it owns a tunnel.
    owner: AtomicWaker,
    /// The tunnel's task.
    tunnel: AtomicWaker,
    _open: Open,
}

/// Bytes came while no request was in flight: a head has begun.
const READ: u16 = 1;
/// The response is ended by the connection's end, and broke off: the end must not look like one (HTTP/1.0).
pub(super) const RESET: u16 = 2;
/// The reader throws away what is left of a request body.
const LINGER: u16 = 4;
/// HTTP/1.1: the connection becomes, or is, a tunnel.
const UPGRADED: u16 = 8;
/// HTTP/2: a stream of this connection became a tunnel.
const CONNECTED: u16 = 16;
/// The tunnel has let go of the socket.
const CLOSED: u16 = 32;
/// The tunnel must end.
const CUT: u16 = 64;
/// The last request's body was let go of before its end.
const UNREAD: u16 = 128;
/// HTTP/2: more than one of its frames was handed over at once. The end of a response may lie in h2, until the client
/// opens its window, when the response is long over for us.
pub(super) const LARGE: u16 = 256;

impl Watch {
    fn is(&self, flag: u16) -> bool {
        self.flags.load(Ordering::Acquire) & flag != 0
    }

    pub(super) fn set(&self, flag: u16) {
        self.flags.fetch_or(flag, Ordering::AcqRel);
    }

    fn is_busy(&self) -> bool {
        self.in_flight.load(Ordering::Acquire) != 0
    }

    /// Notes whether the client took something of what was written.
    fn wrote<T>(&self, polled: &Poll<T>) {
        let stalled = self.stalled.load(Ordering::Relaxed) != 0;
        if polled.is_pending() != stalled {
            let since = if stalled { 0 } else { micros(self.accepted.elapsed()).max(1) };
            self.stalled.store(since, Ordering::Relaxed);
        }
    }

    /// Since when what there is to be written cannot be.
    pub(super) fn stalled(&self) -> Option<Instant> {
        let since = self.stalled.load(Ordering::Relaxed);
        (since != 0).then(|| self.accepted + Duration::from_micros(since))
    }

    /// When the response has to be over.
    fn due(&self) -> Option<Instant> {
        let due = self.due.load(Ordering::Relaxed);
        (due != 0).then(|| self.accepted + Duration::from_micros(due))
    }

    fn ended(&self) -> Instant {
        self.accepted + Duration::from_micros(self.ended.load(Ordering::Acquire))
    }
}

/// A look at a connection from outside, which does not keep it its place.
#[derive(Debug)]
pub(super) struct Rest(Weak<Watch>);

impl Rest {
    /// Since when nothing has been asked of it. Nothing where it is at work, or a request may be on its way.
    pub(super) fn since(&self) -> Option<Instant> {
        let watch = self.0.upgrade()?;
        if watch.is_busy() || watch.is(UPGRADED | CONNECTED) || watch.stalled().is_some() {
            return None;
        }
        let fresh = watch.requests.load(Ordering::Acquire) == 0;
        let since = if fresh { watch.accepted } else { watch.ended() };
        let is_due = !fresh && !watch.is(READ) || since.elapsed() >= FRESH_GRACE;
        is_due.then_some(since)
    }

    pub(super) fn is_over(&self) -> bool {
        self.0.strong_count() == 0
    }
}

/// A request whose response has not ended.
#[derive(Debug)]
pub(super) struct InFlight(Arc<Watch>);

impl InFlight {
    fn begin(watch: &Arc<Watch>) -> Self {
        watch.requests.fetch_add(1, Ordering::Relaxed);
        watch.in_flight.fetch_add(1, Ordering::AcqRel);
        watch.flags.fetch_and(!(READ | UNREAD), Ordering::AcqRel);
        Self(watch.clone())
    }

    pub(super) fn watch(&self) -> &Watch {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        // The time first: whoever sees no request in flight must not take the connection for long idle.
        self.0.ended.store(micros(self.0.accepted.elapsed()), Ordering::Release);
        if self.0.due.load(Ordering::Relaxed) != 0 {
            self.0.due.store(0, Ordering::Relaxed);
        }
        self.0.in_flight.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A socket as it was accepted.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// Calls a method of whatever stands inside.
macro_rules! each {
    ($self:ident, [$first:ident, $second:ident], $method:ident ( $($argument:expr),* )) => {
        match $self.get_mut() {
            Self::$first(stream) => Pin::new(stream).$method($($argument),*),
            Self::$second(stream) => Pin::new(stream).$method($($argument),*),
        }
    };
}

impl AsyncRead for Socket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, [Tcp, Unix], poll_read(cx, buf))
    }
}

impl AsyncWrite for Socket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, [Tcp, Unix], poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, [Tcp, Unix], poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, [Tcp, Unix], poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, [Tcp, Unix], poll_shutdown(cx))
    }
}

impl Socket {
    /// Makes closing send a reset instead of an end.
    fn reset(&self) {
        if let Self::Tcp(stream) = self {
            // Fails only where the connection is gone already.
            let _gone = stream.set_zero_linger();
        }
    }
}

/// What a listener asks of its connections before HTTP.
#[derive(Debug, Clone, Default)]
pub(super) struct Transport {
    pub(super) tls: Option<Arc<Tls>>,
    pub(super) proxy_protocol: ProxyProtocol,
}

impl Transport {
    /// What stands before HTTP, or nothing. `client_header` bounds it, as it bounds the first request.
    fn greet(&self, mut socket: Socket, peer: Peer) -> Result<Greeting, Socket> {
        let proxy_protocol = self.proxy_protocol != ProxyProtocol::Off;
        if self.tls.is_none() && !proxy_protocol {
            return Err(socket);
        }
        let (tls, admitted) = (self.tls.clone(), self.proxy_protocol.admits(peer));
        Ok(Box::pin(async move {
            if !admitted {
                return Err((Some(ConnectionError::Untrusted), proxy_protocol::Refused::Untrusted.into()));
            }
            let mut peer = peer;
            if proxy_protocol
                && let Some(named) = proxy_protocol::read(&mut socket).await.map_err(|refused| {
                    // Load balancers look whether a port is open by connecting and leaving.
                    let lost = matches!(refused, proxy_protocol::Refused::Lost(_));
                    ((!lost).then_some(ConnectionError::ProxyProtocol), BoxError::from(refused))
                })?
            {
                peer = named;
            }
            let Some(tls) = tls else { return Ok((Stream::Plain(socket), Facts::new(peer, false), None)) };
            let stream = tls.accept(socket).await.map_err(|error| {
                let of_tls = error.kind() == io::ErrorKind::InvalidData;
                (of_tls.then_some(ConnectionError::Tls), BoxError::from(error))
            })?;
            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
            Ok((Stream::Tls(Box::new(stream)), Facts::new(peer, true), Some(http2)))
        }))
    }
}

/// The stream that HTTP is spoken on, and whether ALPN chose HTTP/2 for it.
type Greeting = Pin<Box<dyn Future<Output = Result<(Stream, Facts, Option<bool>), Ungreeted>> + Send>>;

/// A stream that HTTP is spoken on.
enum Stream {
    Plain(Socket),
    /// Boxed: more than a kilobyte, and not the usual one.
    Tls(Box<TlsStream<Socket>>),
}

impl Stream {
    fn socket(&self) -> &Socket {
        match self {
            Self::Plain(socket) => socket,
            Self::Tls(stream) => stream.get_ref().0,
        }
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        each!(self, [Plain, Tls], poll_read(cx, buf))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        each!(self, [Plain, Tls], poll_write(cx, buf))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        each!(self, [Plain, Tls], poll_write_vectored(cx, bufs))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Plain(_) => true,
            Self::Tls(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, [Plain, Tls], poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        each!(self, [Plain, Tls], poll_shutdown(cx))
    }
}

/// The transport as hyper sees it: marks what it reads, gives back the bytes that were read to tell HTTP/2 from
/// HTTP/1.1, and closes with care.
struct Io {
    stream: Stream,
    first: First,
    lingered: u32,
    shut: bool,
    watch: Arc<Watch>,
}

/// The first bytes of a connection, as many as the preface has.
#[derive(Default)]
struct First {
    bytes: [u8; PREFACE.len()],
    taken: u8,
    filled: u8,
}

impl First {
    fn filled(&self) -> &[u8] {
        &self.bytes[usize::from(self.taken)..usize::from(self.filled)]
    }
}

impl Io {
    fn new(stream: Stream, watch: Arc<Watch>) -> Self {
        Self { stream, first: First::default(), lingered: 0, shut: false, watch }
    }

    /// Whether the connection is HTTP/2: by ALPN, or else by its first bytes. `None` where it ended without one.
    fn poll_is_http2(&mut self, cx: &mut Context<'_>, alpn: Option<bool>) -> Poll<io::Result<Option<bool>>> {
        loop {
            let read = usize::from(self.first.filled);
            match alpn {
                Some(chosen) if read > 0 => return Poll::Ready(Ok(Some(chosen))),
                None if self.first.bytes[..read] != PREFACE[..read] => return Poll::Ready(Ok(Some(false))),
                _ => {}
            }
            if read == PREFACE.len() {
                return Poll::Ready(Ok(Some(true)));
            }
            let mut buf = ReadBuf::new(&mut self.first.bytes[read..]);
            ready!(Pin::new(&mut self.stream).poll_read(cx, &mut buf))?;
            match u8::try_from(buf.filled().len()) {
                Ok(0) | Err(_) => return Poll::Ready(Ok((read > 0).then_some(false))),
                Ok(more) => self.first.filled += more,
            }
        }
    }

    /// In a tunnel, nobody polls the connection's future any more: its end comes through here.
    fn watch_for_cut(&self, cx: &mut Context<'_>) -> io::Result<()> {
        if self.watch.is(UPGRADED) {
            self.watch.tunnel.register(cx.waker());
            if self.watch.is(CUT) {
                return Err(io::ErrorKind::ConnectionAborted.into());
            }
        }
        Ok(())
    }
}

impl AsyncRead for Io {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let first = this.first.filled();
        if !first.is_empty() {
            let taken = first.len().min(buf.remaining());
            buf.put_slice(&first[..taken]);
            this.first.taken += u8::try_from(taken).expect("at most as many as the preface has");
            this.watch.set(READ);
            return Poll::Ready(Ok(()));
        }
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        match &polled {
            Poll::Pending => this.watch_for_cut(cx)?,
            Poll::Ready(Ok(())) if buf.filled().len() > before && !this.watch.is_busy() && !this.watch.is(READ) => {
                this.watch.set(READ);
            }
            Poll::Ready(_) => {}
        }
        polled
    }
}

impl AsyncWrite for Io {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write(cx, buf);
        this.watch.wrote(&polled);
        if polled.is_pending() {
            this.watch_for_cut(cx)?;
        }
        polled
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_write_vectored(cx, bufs);
        this.watch.wrote(&polled);
        if polled.is_pending() {
            this.watch_for_cut(cx)?;
        }
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.stream).poll_flush(cx);
        // TLS takes more than the socket does.
        this.watch.wrote(&polled);
        polled
    }

    /// Sends the end, and then, where a request body was not read to its end, throws the rest away until the client
    /// closes: closing over unread bytes makes the kernel send a reset, which can overtake the answer (RFC 9112 §9.6).
    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.shut {
            ready!(Pin::new(&mut this.stream).poll_shutdown(cx))?;
            this.shut = true;
        }
        if !this.watch.is(UNREAD) {
            return Poll::Ready(Ok(()));
        }
        this.watch.set(LINGER);
        let mut thrown = [0; 4096];
        while this.lingered < LINGER_BYTES {
            let mut buf = ReadBuf::new(&mut thrown);
            match ready!(Pin::new(&mut this.stream).poll_read(cx, &mut buf)) {
                Ok(()) if !buf.filled().is_empty() => this.lingered += u32::try_from(buf.filled().len()).unwrap_or(0),
                Ok(()) | Err(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        if self.watch.is(RESET) {
            self.stream.socket().reset();
        }
        self.watch.set(CLOSED);
        self.watch.owner.wake();
    }
}

/// Hands hyper's requests to the handler, as sidegate's.
struct Leaf<H> {
    shared: Arc<Shared<H>>,
    facts: Facts,
    watch: Arc<Watch>,
}

impl<H: Handler> hyper::service::Service<http::Request<Incoming>> for Leaf<H> {
    type Response = http::Response<Outbound<H::Body>>;
    type Error = Infallible;
    type Future = Answer<H::Answer>;

    fn call(&self, request: http::Request<Incoming>) -> Self::Future {
        let in_flight = Some(InFlight::begin(&self.watch));
        let (before_11, connect) = (request.version() < Version::HTTP_11, request.method() == Method::CONNECT);
        let http2 = request.version() == Version::HTTP_2;
        let mut request: Request = request.map(|incoming| {
            if incoming.is_end_stream() {
                return Body::empty();
            }
            Body::new(Inbound { incoming, http2, ended: false, watch: self.watch.clone() })
        });
        request.extensions_mut().insert(self.facts.clone());
        // Room for what the layers add: an id, `Via` and where the request came from. Grown once, not twice.
        request.headers_mut().reserve(6);
        Answer { future: self.shared.handler.call(request), in_flight, before_11, http2, connect }
    }
}

pin_project_lite::pin_project! {
    /// The answer to one request, counted as in flight from here to the end of its body.
    struct Answer<F> {
        #[pin]
        future: F,
        in_flight: Option<InFlight>,
        before_11: bool,
        http2: bool,
        connect: bool,
    }
}

impl<F, B> Future for Answer<F>
where
    F: Future<Output = http::Response<B>>,
    B: HttpBody,
{
    type Output = Result<http::Response<Outbound<B>>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let response = ready!(asked(this.future.poll(cx)));
        let in_flight = this.in_flight.take().expect("polled once more after its end");
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            in_flight.0.set(UPGRADED);
        } else if *this.connect && response.status().is_success() {
            in_flight.0.set(CONNECTED);
        }
        if let Some(Deadline(at)) = response.extensions().get() {
            if *this.http2 {
                streams::due(*at);
            } else {
                // Not before it: the body notes what it was dropped for.
                let due = micros(at.saturating_duration_since(in_flight.0.accepted)) + 1;
                in_flight.0.due.store(due, Ordering::Relaxed);
            }
        }
        let by_close = *this.before_11 && !response.headers().contains_key(CONTENT_LENGTH);
        Poll::Ready(Ok(response.map(|body| Outbound::new(body, *this.http2, by_close, in_flight))))
    }
}

/// A request's body, whose failure is the client's.
struct Inbound {
    incoming: Incoming,
    http2: bool,
    ended: bool,
    watch: Arc<Watch>,
}

impl HttpBody for Inbound {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let polled = Pin::new(&mut self.incoming).poll_frame(cx);
        if let Poll::Ready(None) = polled {
            self.ended = true;
            // hyper takes a RST_STREAM with NO_ERROR for an end, which only END_STREAM is (RFC 9113 §8.1).
            if self.http2 && !self.incoming.is_end_stream() {
                let cut = Error::new(Kind::ClientReset, "the stream was reset before its end");
                return Poll::Ready(Some(Err(cut.into())));
            }
        }
        polled.map_err(|error| Error::new(Kind::ClientReset, error).into())
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.incoming.size_hint()
    }
}

impl Drop for Inbound {
    fn drop(&mut self) {
        if !self.ended && !self.incoming.is_end_stream() {
            self.watch.set(UNREAD);
        }
    }
}

/// Ends the tunnel with its owner.
struct Tunnel(Arc<Watch>);

impl Drop for Tunnel {
    fn drop(&mut self) {
        self.0.set(CUT);
        self.0.tunnel.wake();
    }
}

#[expect(clippy::large_enum_variant, reason = "the large one is the usual one; HTTP/2, larger still, is boxed")]
enum State<H: Handler> {
    /// Before HTTP: the PROXY protocol, TLS.
    Greeting(Greeting, Peer),
    /// Waiting for the first bytes.
    First(Io, Facts, Option<bool>),
    Http1(http1::UpgradeableConnection<TokioIo<Io>, Leaf<H>>, Facts),
    Http2(Box<http2::Connection<TokioIo<Io>, Leaf<H>, Streams>>, Facts),
    Tunnel(Tunnel),
    Ended,
}

pin_project_lite::pin_project! {
    /// Serves one connection until its end. The connection is cut when this is dropped.
    pub(super) struct Serve<H: Handler> {
        state: State<H>,
        shared: Arc<Shared<H>>,
        watch: Arc<Watch>,
        // Always armed: there is a moment at which the marks must be looked at again.
        #[pin]
        timer: Sleep,
        #[pin]
        told: OwnedNotified,
        // The task that `timer` and `told` will wake.
        waker: Option<Waker>,
        requests: u32,
        head: Option<Instant>,
        // When the response has to be over, as far as the timer knows.
        due: Option<Instant>,
        ending: Ending,
    }
}

/// How far the end has come.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Not begun.
    No,
    /// A drain has begun before the connection's first byte.
    Fresh,
    /// `Connection: close` or GOAWAY is said; requests in flight go on.
    Told,
    /// The same, because nothing was asked for too long. A client of HTTP/2 may have yet to take the end of a response.
    Rested,
    /// The answer is sent and the rest of its request is thrown away.
    Lingering,
}

/// What the timer found.
enum Look {
    Again(Instant),
    Close,
    Drop(&'static str),
    /// The same, for the client was too slow.
    GiveUp(&'static str),
}

impl<H: Handler> Serve<H> {
    pub(super) fn new(socket: Socket, peer: Peer, transport: &Transport, open: Open, shared: Arc<Shared<H>>) -> Self {
        let accepted = Instant::now();
        let watch = Arc::new(Watch {
            accepted,
            in_flight: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            ended: AtomicU64::new(0),
            stalled: AtomicU64::new(0),
            due: AtomicU64::new(0),
            flags: AtomicU16::new(0),
            owner: AtomicWaker::new(),
            tunnel: AtomicWaker::new(),
            _open: open,
        });
        let state = match transport.greet(socket, peer) {
            Ok(greeting) => State::Greeting(greeting, peer),
            Err(socket) => State::First(Io::new(Stream::Plain(socket), watch.clone()), Facts::new(peer, false), None),
        };
        Self {
            state,
            // Whichever may be due first: a request can be over in no time.
            timer: sleep_until(accepted + shared.timing.client_header().min(shared.timing.keepalive())),
            told: shared.drain.told(),
            shared,
            watch,
            waker: None,
            requests: 0,
            head: None,
            due: None,
            ending: Ending::No,
        }
    }

    pub(super) fn rest(&self) -> Rest {
        Rest(Arc::downgrade(&self.watch))
    }
}

impl<H: Handler> State<H> {
    fn http1(io: Io, facts: Facts, shared: &Arc<Shared<H>>, watch: &Arc<Watch>) -> Self {
        let leaf = Leaf { shared: shared.clone(), facts: facts.clone(), watch: watch.clone() };
        Self::Http1(shared.http1.serve_connection(TokioIo::new(io), leaf).with_upgrades(), facts)
    }

    fn http2(io: Io, facts: Facts, shared: &Arc<Shared<H>>, watch: &Arc<Watch>) -> Self {
        let leaf = Leaf { shared: shared.clone(), facts: facts.clone(), watch: watch.clone() };
        Self::Http2(Box::new(shared.http2.serve_connection(TokioIo::new(io), leaf)), facts)
    }

    /// Moves the connection on; ready at its end.
    fn poll(&mut self, cx: &mut Context<'_>, shared: &Arc<Shared<H>>, watch: &Arc<Watch>) -> Poll<()> {
        loop {
            match self {
                Self::Greeting(greeting, peer) => match ready!(greeting.as_mut().poll(cx)) {
                    Ok((stream, facts, alpn)) => *self = Self::First(Io::new(stream, watch.clone()), facts, alpn),
                    Err((why, error)) => {
                        shared.failures.note(*peer, why, &*error);
                        *self = Self::Ended;
                    }
                },
                Self::First(io, _, alpn) => {
                    let http2 = ready!(io.poll_is_http2(cx, *alpn));
                    let Self::First(io, facts, _) = std::mem::replace(self, Self::Ended) else {
                        return Poll::Ready(());
                    };
                    *self = match http2 {
                        Ok(Some(true)) => Self::http2(io, facts, shared, watch),
                        Ok(Some(false)) => Self::http1(io, facts, shared, watch),
                        // Left without a word.
                        Ok(None) | Err(_) => return Poll::Ready(()),
                    };
                }
                Self::Http1(connection, facts) => {
                    let ended = ready!(Pin::new(connection).poll(cx));
                    if ended.is_ok() && watch.is(UPGRADED) {
                        *self = Self::Tunnel(Tunnel(watch.clone()));
                        continue;
                    }
                    if let Err(error) = ended {
                        shared.failures.note(facts.peer(), reason(&error), &error);
                    }
                    *self = Self::Ended;
                }
                Self::Http2(connection, facts) => {
                    if let Err(error) = ready!(Pin::new(connection).poll(cx)) {
                        shared.failures.note(facts.peer(), reason(&error), &error);
                    }
                    *self = Self::Ended;
                }
                Self::Tunnel(tunnel) => {
                    tunnel.0.owner.register(cx.waker());
                    if !tunnel.0.is(CLOSED) {
                        return Poll::Pending;
                    }
                    *self = Self::Ended;
                }
                Self::Ended => return Poll::Ready(()),
            }
        }
    }

    /// Who is at the other end.
    fn peer(&self) -> Option<Peer> {
        match self {
            Self::Greeting(_, peer) => Some(*peer),
            Self::First(_, facts, _) | Self::Http1(_, facts) | Self::Http2(_, facts) => Some(facts.peer()),
            Self::Tunnel(_) | Self::Ended => None,
        }
    }

    /// Says that no further request will be answered. False where there is nobody to say it to yet.
    fn close(&mut self) -> bool {
        match self {
            Self::Greeting(..) | Self::First(..) => return false,
            Self::Http1(connection, _) => Pin::new(connection).graceful_shutdown(),
            Self::Http2(connection, _) => Pin::new(&mut **connection).graceful_shutdown(),
            Self::Tunnel(_) | Self::Ended => {}
        }
        true
    }
}

impl<H: Handler> Future for Serve<H> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let mut this = self.project();
        loop {
            if this.state.poll(cx, this.shared, this.watch).is_ready() {
                return Poll::Ready(());
            }
            // A tunnel has neither heads nor idle times, and a drain lets it run.
            if let State::Tunnel(_) = this.state {
                return Poll::Pending;
            }

            let requests = this.watch.requests.load(Ordering::Acquire);
            if requests != *this.requests {
                *this.requests = requests;
                *this.head = None;
            }
            // Only an HTTP/1.1 head can arrive bit by bit unseen. Most heads come in one read and were handed on
            // by the poll above, so the clock is not asked for them.
            if let (State::Http1(..), None, true, false) =
                (&this.state, *this.head, this.watch.is(READ), this.watch.is_busy())
            {
                let now = if requests == 0 { this.watch.accepted } else { Instant::now() };
                *this.head = Some(now);
                let due = now + this.shared.timing.client_header();
                if due < this.timer.deadline() {
                    this.timer.as_mut().reset(due);
                    *this.waker = None;
                }
            }
            let due = this.watch.due();
            if due != *this.due {
                *this.due = due;
                if let Some(due) = due.filter(|due| *due < this.timer.deadline()) {
                    this.timer.as_mut().reset(due);
                    *this.waker = None;
                }
            }
            if *this.ending != Ending::Lingering && this.watch.is(LINGER) {
                *this.ending = Ending::Lingering;
                this.timer.as_mut().reset(Instant::now() + CLOSE_GRACE);
                *this.waker = None;
            }
            if matches!(this.ending, Ending::No | Ending::Fresh | Ending::Rested) && this.shared.drain.has_begun() {
                // After the poll above, so that a request which lay in the socket is answered and not lost.
                if this.state.close() {
                    *this.ending = Ending::Told;
                    this.timer.as_mut().reset(Instant::now() + CLOSE_GRACE);
                    *this.waker = None;
                    continue;
                }
                if *this.ending == Ending::No {
                    *this.ending = Ending::Fresh;
                    this.timer.as_mut().reset(Instant::now() + FRESH_GRACE);
                    *this.waker = None;
                }
            }

            // Timer and drain are polled only to leave the waker with them, or when there is something to hear.
            let fresh = this.waker.as_ref().is_none_or(|waker| !waker.will_wake(cx.waker()));
            if !fresh && !this.timer.is_elapsed() {
                return Poll::Pending;
            }
            *this.waker = Some(cx.waker().clone());
            if this.told.as_mut().poll(cx).is_ready() && matches!(this.ending, Ending::No) {
                continue;
            }
            if this.timer.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
            match look(this.state, this.watch, &this.shared.timing, *this.head, *this.ending) {
                Look::Again(at) => this.timer.as_mut().reset(at),
                Look::Close => {
                    *this.ending = Ending::Rested;
                    this.timer.as_mut().reset(Instant::now() + CLOSE_GRACE);
                    this.state.close();
                }
                Look::Drop(why) => {
                    debug!(why, "connection closed");
                    return Poll::Ready(());
                }
                Look::GiveUp(why) => {
                    if let Some(peer) = this.state.peer() {
                        this.shared.failures.note(peer, Some(ConnectionError::Timeout), &Slow(why));
                    }
                    return Poll::Ready(());
                }
            }
            *this.waker = None;
        }
    }
}

/// The timer has fired: is it time?
fn look<H: Handler>(state: &State<H>, watch: &Watch, timing: &Timing, head: Option<Instant>, ending: Ending) -> Look {
    let now = Instant::now();
    let (header, keepalive, idle) = (timing.client_header(), timing.keepalive(), timing.idle());
    let stalled = watch.stalled().map(|since| since + idle);
    if stalled.is_some_and(|due| now >= due) {
        return Look::GiveUp("takes nothing of what is written");
    }
    let due = watch.due();
    if stalled.is_some() && due.is_some_and(|due| now >= due) {
        return Look::Drop("does not take a response that should be over");
    }
    let due = due.map(|due| if now >= due { now + OVERDUE } else { due });
    // The end of an answer may lie unwritten when its body is long over.
    let is_busy = watch.is_busy() || stalled.is_some();
    match ending {
        Ending::Fresh => return Look::Drop("drain"),
        Ending::Lingering => return Look::Drop("the rest of a request was too long"),
        // The client has to say something between GOAWAY and the end; a tunnel in a stream ends by itself.
        Ending::Told | Ending::Rested if is_busy || watch.is(CONNECTED) => {
            return Look::Again(due.unwrap_or(now + CLOSE_GRACE).min(now + CLOSE_GRACE));
        }
        Ending::Told | Ending::Rested if head.is_none() => {
            let rests = ending == Ending::Rested && watch.is(LARGE);
            let late = watch.ended() + if rests { keepalive + idle } else { CLOSE_GRACE };
            return if now >= late { Look::Drop("slow to close") } else { Look::Again(late) };
        }
        Ending::Told | Ending::Rested | Ending::No => {}
    }
    if is_busy {
        // Not before this can a silence that begins now be over.
        return Look::Again(stalled.unwrap_or(now + idle).min(now + keepalive).min(due.unwrap_or(now + keepalive)));
    }
    let first = watch.requests.load(Ordering::Acquire) == 0;
    let (late, why) = match head {
        Some(head) => (head + header, "slow request head"),
        None if first => (watch.accepted + header, "no request"),
        None => (watch.ended() + keepalive, "idle"),
    };
    match state {
        // The head may come, and its request be over, long before the head would be late.
        _ if now < late => Look::Again(late.min(now + keepalive)),
        State::Http1(..) if head.is_some() => Look::GiveUp(why),
        State::Http1(..) | State::Http2(..) => Look::Close,
        State::Greeting(..) => Look::GiveUp("slow to greet"),
        State::First(..) | State::Tunnel(_) | State::Ended => Look::Drop(why),
    }
}

#[cfg(test)]
mod tests {
    use std::future::{pending, ready as now};

    use futures_util::{FutureExt, StreamExt, stream};
    use http::header::{CONNECTION, UPGRADE};
    use http_body_util::{BodyExt, Empty, StreamBody};
    use hyper_util::rt::TokioExecutor;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        sync::Semaphore,
        task::JoinHandle,
        time::{sleep, timeout},
    };

    use super::*;
    use crate::{message::Response, telemetry::metrics::ConnectionErrors};

    /// A connection whose far end the test holds, allowed 30 s for a head and 75 s between requests.
    fn serve(handler: impl Handler) -> (UnixStream, JoinHandle<()>, Drain) {
        let (client, server) = UnixStream::pair().unwrap();
        let (drain, failures) = (Drain::new(), Failures::new(ConnectionErrors::default()));
        let shared = Arc::new(Shared::new(handler, Limits::default(), Arc::default(), drain.clone(), failures));
        let permit = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        let open = Open::new(permit, Gauge::default());
        let transport = Transport::default();
        (client, tokio::spawn(Serve::new(Socket::Unix(server), Peer::Unix, &transport, open, shared)), drain)
    }

    fn hello(_: Request) -> impl Future<Output = Response> + Send {
        now(Response::new(Body::from("hello")))
    }

    /// Whether the connection ends `after` so long, and not half a second earlier.
    async fn ends_after(client: &mut UnixStream, after: Duration) {
        let mut rest = Vec::new();
        let half = Duration::from_millis(500);
        assert!(timeout(after.saturating_sub(half), client.read_to_end(&mut rest)).await.is_err(), "it ends too early");
        timeout(2 * half, client.read_to_end(&mut rest)).await.expect("it ends in time").unwrap();
    }

    async fn answer(client: &mut UnixStream) {
        let mut answer = Vec::new();
        while !answer.ends_with(b"hello") {
            assert_ne!(client.read_buf(&mut answer).await.unwrap(), 0);
        }
    }

    const fn secs(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_without_a_byte_is_closed() {
        let (mut client, _serving, _) = serve(hello);
        ends_after(&mut client, secs(30)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_drips_is_not_waited_for() {
        let (mut client, _serving, _) = serve(hello);
        client.write_all(b"GET / HTTP/1.1\r\n").await.unwrap();
        sleep(secs(20)).await;
        client.write_all(b"host: a\r\n").await.unwrap();
        ends_after(&mut client, secs(10)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn each_head_has_its_own_time() {
        let (mut client, _serving, _) = serve(hello);
        for _ in 0..3 {
            sleep(secs(25)).await;
            client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            answer(&mut client).await;
        }
        sleep(secs(25)).await;
        client.write_all(b"GET / HTTP/1.1\r\nho").await.unwrap();
        ends_after(&mut client, secs(30)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_rests_between_requests_no_longer_than_it_may() {
        let (mut client, _serving, _) = serve(hello);
        for _ in 0..2 {
            client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            answer(&mut client).await;
            sleep(secs(70)).await;
        }
        ends_after(&mut client, secs(5)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_in_flight_is_not_silence() {
        let slow = |_: Request| sleep(secs(500)).map(|()| Response::new(Body::from("hello")));
        let (mut client, _serving, _) = serve(slow);
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        answer(&mut client).await;
        ends_after(&mut client, secs(75)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_takes_nothing_is_left() {
        let endless = |_: Request| {
            let frames =
                futures_util::stream::repeat_with(|| Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[0; 4096]))));
            now(http::Response::new(http_body_util::StreamBody::new(frames)))
        };
        let (mut client, serving, _) = serve(endless);
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        // It reads now and then, and then no more.
        for _ in 0..20 {
            sleep(secs(200)).await;
            client.read_exact(&mut vec![0; 1 << 20]).await.unwrap();
        }
        sleep(secs(299)).await;
        assert!(!serving.is_finished());
        timeout(secs(2), serving).await.expect("it is not waited for").unwrap();
    }

    /// An endless response that has to be over in ten seconds, and has hold of something.
    fn overdue(held: Arc<()>) -> http::Response<impl HttpBody<Data = Bytes, Error = Infallible>> {
        let frames = stream::repeat(held).map(|_| Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[0; 4096]))));
        let mut response = http::Response::new(StreamBody::new(frames));
        response.extensions_mut().insert(Deadline(Instant::now() + secs(10)));
        response
    }

    #[tokio::test(start_paused = true)]
    async fn a_response_that_should_be_over_does_not_wait_for_its_client() {
        let held = Arc::new(());
        let holder = held.clone();
        let (mut client, serving, _) = serve(move |_: Request| now(overdue(holder.clone())));
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        // It reads, but not all that there is.
        for _ in 0..19 {
            sleep(Duration::from_millis(500)).await;
            client.read_exact(&mut [0; 4096]).await.unwrap();
        }
        assert_eq!(Arc::strong_count(&held), 3);
        timeout(secs(1), serving).await.expect("it is cut").unwrap();
        assert_eq!(Arc::strong_count(&held), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_deadline_is_that_of_its_response_and_of_no_other_on_the_connection() {
        let (mut client, serving, _) = serve(|request: Request| {
            let mut response = Response::new(Body::from("hello"));
            if request.uri().path() == "/due" {
                response.extensions_mut().insert(Deadline(Instant::now() + secs(10)));
            }
            sleep(secs(if request.uri().path() == "/due" { 0 } else { 20 })).map(|()| response)
        });
        for path in ["/due", "/slow"] {
            client.write_all(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n").as_bytes()).await.unwrap();
            answer(&mut client).await;
        }
        assert!(!serving.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_http2_that_should_be_over_does_not_wait_for_its_client() {
        let held = Arc::new(());
        let holder = held.clone();
        let (client, serving, _) = serve(move |_: Request| now(overdue(holder.clone())));
        let (mut send, connection) =
            hyper::client::conn::http2::handshake::<_, _, Body>(TokioExecutor::new(), TokioIo::new(client))
                .await
                .unwrap();
        tokio::spawn(connection);
        let request = http::Request::get("http://a/").body(Body::empty()).unwrap();
        let mut slow = send.send_request(request).await.unwrap().into_body();
        for _ in 0..19 {
            sleep(Duration::from_millis(500)).await;
            slow.frame().await.unwrap().unwrap();
        }
        assert_eq!(Arc::strong_count(&held), 3);
        sleep(secs(1)).await;
        assert_eq!(Arc::strong_count(&held), 2, "the response is dropped");
        assert!(!serving.is_finished(), "the connection goes on");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_is_slow_to_take_the_end_of_an_answer_gets_it() {
        const LENGTH: usize = 2 << 20;
        let (mut client, _serving, _) = serve(|_: Request| now(Response::new(Body::from(vec![b'x'; LENGTH]))));
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        // Longer than a connection may rest, but not longer than a client may leave an answer unread.
        sleep(secs(200)).await;
        let mut answer = Vec::new();
        client.read_to_end(&mut answer).await.unwrap();
        assert!(answer.len() > LENGTH, "{} bytes", answer.len());
    }

    #[tokio::test(start_paused = true)]
    async fn an_http2_connection_without_streams_is_told_to_go() {
        let (mut client, _serving, _) = serve(hello);
        client.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
        let mut read = Vec::new();
        assert!(timeout(secs(29), client.read_to_end(&mut read)).await.is_err(), "it ends too early");
        assert!(!has_frame(&read, 7));
        // It does not answer the PING between the GOAWAYs.
        timeout(secs(7), client.read_to_end(&mut read)).await.expect("it ends in time").unwrap();
        assert!(has_frame(&read, 7), "GOAWAY: {read:?}");
    }

    /// Whether HTTP/2 frames have one of this type among them.
    fn has_frame(mut frames: &[u8], kind: u8) -> bool {
        while let [a, b, c, of, rest @ ..] = frames {
            if *of == kind {
                return true;
            }
            let length = usize::from(*a) << 16 | usize::from(*b) << 8 | usize::from(*c);
            frames = &rest[5 + length..];
        }
        false
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_answers_what_was_sent_before_it() {
        let (mut client, serving, drain) = serve(|request| sleep(secs(1)).then(|()| hello(request)));
        // The connection has not run yet: the request lies in the socket.
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        drain.begin();
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.contains("connection: close\r\n") && answer.ends_with("hello"), "{answer}");
        serving.await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_lets_streams_of_http2_end_and_takes_no_more() {
        let (client, serving, drain) = serve(|request| sleep(secs(20)).then(|()| hello(request)));
        let io = TokioIo::new(client);
        let (mut send, connection) =
            hyper::client::conn::http2::handshake::<_, _, Body>(TokioExecutor::new(), io).await.unwrap();
        tokio::spawn(connection);
        let request = || http::Request::get("http://a/").body(Body::empty()).unwrap();
        let first = tokio::spawn(send.send_request(request()));
        sleep(secs(1)).await;
        drain.begin();
        sleep(secs(1)).await;
        let second = timeout(secs(1), send.send_request(request())).await.expect("it is not kept waiting");
        assert!(second.is_err(), "GOAWAY");
        let answer = first.await.unwrap().unwrap().into_body();
        assert_eq!(http_body_util::BodyExt::collect(answer).await.unwrap().to_bytes(), "hello");
        timeout(secs(1), serving).await.expect("it ends with its last stream").unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_http2_that_is_left_is_given_up() {
        let (left, mut gone) = tokio::sync::mpsc::channel::<()>(1);
        let (client, _serving, _) = serve(move |_: Request| {
            let left = left.clone();
            async move {
                let _left = left;
                pending::<Response>().await
            }
        });
        let io = TokioIo::new(client);
        let (mut send, connection) =
            hyper::client::conn::http2::handshake::<_, _, Body>(TokioExecutor::new(), io).await.unwrap();
        let connection = tokio::spawn(connection);
        let request = http::Request::get("http://a/").body(Body::empty()).unwrap();
        let answer = timeout(secs(1), send.send_request(request)).await;
        assert!(answer.is_err(), "it is dropped, and its stream reset");
        connection.abort();
        timeout(secs(1), gone.recv()).await.expect("the handler's future is dropped");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_http2_whose_window_stays_closed_is_given_up_and_others_go_on() {
        let held = Arc::new(());
        let holder = held.clone();
        let handler = move |request: Request| {
            let endless = request.uri().path() == "/endless";
            let (held, pause) = (endless.then(|| holder.clone()), secs(if endless { 0 } else { 60 }));
            let frames = stream::repeat(()).then(move |()| {
                let held = held.clone();
                sleep(pause).map(move |()| {
                    drop(held);
                    Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[0; 4096])))
                })
            });
            now(http::Response::new(StreamBody::new(frames)))
        };
        let (client, serving, _) = serve(handler);
        let (mut send, connection) =
            hyper::client::conn::http2::handshake::<_, _, Body>(TokioExecutor::new(), TokioIo::new(client))
                .await
                .unwrap();
        tokio::spawn(connection);
        let request = |path| http::Request::get(format!("http://a{path}")).body(Body::empty()).unwrap();
        let mut ticks = send.send_request(request("/ticks")).await.unwrap().into_body();
        let mut unread = send.send_request(request("/endless")).await.unwrap().into_body();
        for _ in 0..4 {
            ticks.frame().await.unwrap().unwrap();
        }
        assert_eq!(Arc::strong_count(&held), 3, "240 s: it may yet be read");
        for _ in 0..2 {
            ticks.frame().await.unwrap().unwrap();
        }
        assert_eq!(Arc::strong_count(&held), 2, "the response is dropped");
        let end = loop {
            match unread.frame().await {
                Some(Ok(_)) => {}
                end => break end,
            }
        };
        assert!(end.is_some(), "it is seen as broken off");
        ticks.frame().await.unwrap().unwrap();
        assert!(!serving.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_http2_that_is_read_slowly_but_steadily_is_not_given_up() {
        const LENGTH: usize = 1 << 20;
        // Allowed 300 s of silence.
        let (client, _serving, _) = serve(|_: Request| now(Response::new(Body::from(vec![0; LENGTH]))));
        let (mut send, connection) = hyper::client::conn::http2::Builder::new(TokioExecutor::new())
            .initial_stream_window_size(64 << 10)
            .handshake::<_, Body>(TokioIo::new(client))
            .await
            .unwrap();
        tokio::spawn(connection);
        let request = http::Request::get("http://a/").body(Body::empty()).unwrap();
        let mut slow = send.send_request(request).await.unwrap().into_body();
        let mut read = 0;
        while let Some(frame) = slow.frame().await {
            read += frame.expect("it is not reset").into_data().unwrap().len();
            sleep(secs(40)).await;
        }
        assert_eq!(read, LENGTH);
    }

    #[tokio::test(start_paused = true)]
    async fn a_drain_closes_at_once_what_rests() {
        let (mut client, serving, drain) = serve(hello);
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
        answer(&mut client).await;
        drain.begin();
        timeout(Duration::from_millis(1), serving).await.expect("at once").unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_goes_on_sending_gets_its_answer() {
        const BODY: &[u8] = &[0; 600_000];
        // The body is not read: the answer is there before it.
        let (mut client, _serving, _) = serve(hello);
        client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 600000\r\n\r\n").await.unwrap();
        let (mut reader, mut writer) = client.split();
        let mut answer = String::new();
        let (sent, read) = tokio::join!(writer.write_all(BODY), async {
            let read = reader.read_to_string(&mut answer).await;
            (read, answer)
        });
        sent.unwrap();
        read.0.unwrap();
        assert!(read.1.ends_with("hello"), "{}", read.1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_never_stops_sending_is_left() {
        let (mut client, serving, _) = serve(hello);
        client.write_all(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 600000\r\n\r\nabc").await.unwrap();
        answer(&mut client).await;
        timeout(secs(6), serving).await.expect("it is not waited for").unwrap();
    }

    fn switching(_: Request) -> impl Future<Output = Response> + Send {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(CONNECTION, "upgrade".parse().unwrap());
        response.headers_mut().insert(UPGRADE, "echo".parse().unwrap());
        now(response)
    }

    #[tokio::test(start_paused = true)]
    async fn a_tunnel_lives_through_a_drain_and_ends_with_its_connection() {
        let (ended, mut tunnelled) = tokio::sync::mpsc::channel(1);
        let handler = move |mut request: Request| {
            let (upgrade, ended) = (hyper::upgrade::on(&mut request), ended.clone());
            tokio::spawn(async move {
                let mut io = TokioIo::new(upgrade.await.unwrap());
                let mut buf = [0; 16];
                while let Ok(n) = io.read(&mut buf).await {
                    io.write_all(&buf[..n]).await.unwrap();
                }
                ended.send(()).await.unwrap();
            });
            switching(request)
        };
        let (mut client, serving, drain) = serve(handler);
        client.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n").await.unwrap();
        let mut read = Vec::new();
        while !read.ends_with(b"\r\n\r\n") {
            client.read_buf(&mut read).await.unwrap();
        }
        drain.begin();
        sleep(secs(200)).await;
        client.write_all(b"ping").await.unwrap();
        let mut pong = [0; 4];
        client.read_exact(&mut pong).await.unwrap();
        assert_eq!(&pong, b"ping");
        assert!(!serving.is_finished(), "it is counted");

        serving.abort();
        timeout(secs(1), tunnelled.recv()).await.expect("it is cut");
        assert_eq!(client.read(&mut pong).await.unwrap(), 0);
    }

    #[test]
    fn all_streams_of_http2_together_do_not_fill_their_connection() {
        for (http2_streams, stream, held) in [
            (1, 256 << 10, 256 << 10),
            (200, 256 << 10, 50 << 20),
            (500, 134_217, 67_108_500),
            (10_000, 64 << 10, 655_360_000),
        ] {
            assert_eq!(Limits { http2_streams, ..Limits::default() }.windows(), (stream, held), "{http2_streams}");
        }
    }

    #[test]
    fn a_connection_is_small() {
        fn size<H: Handler>(_: H) -> (usize, usize) {
            (size_of::<Serve<H>>(), size_of::<http2::Connection<TokioIo<Io>, Leaf<H>, Streams>>())
        }
        let (connection, http2) = size(|_: Request| pending::<http::Response<Empty<Bytes>>>());
        assert!(connection <= 1200, "{connection} bytes, and {http2} of HTTP/2 in a box of its own");
        println!("{connection} bytes, and {http2} of HTTP/2 in a box of its own; {} to watch", size_of::<Watch>());
    }
}
