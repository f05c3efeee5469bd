//! Carries the bytes of an upgraded connection.

use std::{
    io,
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Poll, ready},
    time::Duration,
};

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf, copy_bidirectional},
    time::sleep,
};

use crate::{
    message::{Error, Kind},
    telemetry::{Exchange, log::chain},
};

/// Of how many parts of the idle time a silence is put together: a tunnel is cut at most that part late.
const PARTS: u32 = 4;

/// Carries bytes between two upgraded connections until one side ends, or both are silent for `idle`; then
/// lets the exchange end.
pub(super) async fn run(client: OnUpgrade, upstream: OnUpgrade, exchange: Option<Exchange>, idle: Option<Duration>) {
    let counters = exchange.clone().unwrap_or_else(|| Exchange::new(&http::Request::new(())));
    let end = End(exchange);
    let ended = async {
        let (client, upstream) = tokio::try_join!(client, upstream)?;
        let mut client = Counted { io: TokioIo::new(client), read: counters.received() };
        let mut upstream = Counted { io: TokioIo::new(upstream), read: counters.sent() };
        tokio::select! {
            copied = copy_bidirectional(&mut client, &mut upstream) => copied.map(drop).map_err(Into::into),
            () = silence(&counters, idle) => Err(Error::from(Kind::UpstreamTimeout).into()),
        }
    };
    let ended: Result<(), crate::message::BoxError> = ended.await;
    if let (Err(error), Some(exchange)) = (ended, &end.0) {
        let mut facts = exchange.facts();
        // A tunnel that is torn down by a peer is no error: most WebSocket clients end like that.
        facts.error = Error::find(&*error).map(|error| error.kind().slug());
        facts.cause = Some(chain(&*error));
    }
}

/// Ends the exchange, also when the task of the tunnel is dropped.
struct End(Option<Exchange>);

impl Drop for End {
    fn drop(&mut self) {
        if let Some(exchange) = &self.0 {
            let entry = exchange.facts().tunnel.take();
            // Not under the lock, which it takes.
            drop(entry);
        }
    }
}

/// Returns when nothing has moved for `idle`.
async fn silence(counters: &Exchange, idle: Option<Duration>) {
    let Some(idle) = idle else { return std::future::pending().await };
    let moved = || (counters.received().load(Ordering::Relaxed), counters.sent().load(Ordering::Relaxed));
    let (mut last, mut silent) = (moved(), 0);
    while silent < PARTS {
        sleep(idle / PARTS).await;
        let now = moved();
        silent = if now == last { silent + 1 } else { 0 };
        last = now;
    }
}

/// One side of a tunnel, which counts what is read of it.
struct Counted<'a> {
    io: TokioIo<Upgraded>,
    read: &'a AtomicU64,
}

impl AsyncRead for Counted<'_> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        self.read.fetch_add((buf.filled().len() - before) as u64, Ordering::Relaxed);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Counted<'_> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}
