//! The server: listeners, connections, drain and reload. Floor 5.
//!
//! [`Server::bind`] opens every listener or none; [`Bound::run`] serves until it is told to stop. What answers
//! a request is a [`Handler`], in sidegate the stack that is current when the request arrives: a
//! connection keeps no snapshot of it, so a reload reaches clients that stay connected.
//!
//! Ownership: `run` owns one accept loop per listener, each loop owns its connections, and each connection owns
//! the tunnel that an upgrade made of it. Whatever ends one ends all below it.

pub mod connection;
pub mod drain;
mod failures;
mod listener;
mod proxy_protocol;
pub mod reload;
mod response;
mod streams;
pub mod tls;

use std::{
    fmt,
    future::Future,
    io,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use arc_swap::ArcSwap;
use bytes::Bytes;
use futures_util::FutureExt;
use http_body::Body as HttpBody;
use tokio::{
    sync::Semaphore,
    task::{JoinSet, spawn_blocking},
    time::{MissedTickBehavior, interval, sleep, timeout},
};
use tracing::{info, warn};

use self::{
    connection::{Limits, Shared, Timing},
    drain::{Drain, Shutdown},
    failures::Failures,
    listener::Listener,
    reload::Reloads,
    tls::Tls,
};
use crate::{
    admin::{Admin, health::Phase},
    config::{
        HumanDuration, Toggle,
        load::{Sources, Tree},
    },
    layers::timeouts,
    message::{BoxError, Request},
    registry::Registry,
    settings::{self, Settings},
    stack::Stack,
    telemetry::{Metrics, log, metrics::Process},
};

/// What answers requests. Any clonable closure of the right shape is one.
pub trait Handler: Clone + Send + Sync + 'static {
    /// The body of the response.
    type Body: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static;
    /// The response to come. It never fails: what goes wrong is a response as well.
    type Answer: Future<Output = http::Response<Self::Body>> + Send + 'static;

    /// Begins to answer. Called once per request, on the task of its connection.
    fn call(&self, request: Request) -> Self::Answer;
}

impl<F, A, B> Handler for F
where
    F: Fn(Request) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = http::Response<B>> + Send + 'static,
    B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Body = B;
    type Answer = A;

    fn call(&self, request: Request) -> A {
        self(request)
    }
}

/// A listener that could not be opened.
#[derive(Debug)]
pub struct BindError {
    address: String,
    source: io::Error,
}

impl fmt::Display for BindError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "cannot listen on {}", self.address)
    }
}

impl std::error::Error for BindError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&self.source)
    }
}

/// What to listen on, and what each connection is held to.
#[derive(Debug)]
pub struct Server {
    /// The listeners. One that cannot be opened fails them all.
    pub listen: Vec<settings::listener::Config>,
    /// Connections open at once over all these listeners. At the limit no more are accepted; they wait in the
    /// kernel's queue.
    pub connections: usize,
    /// What each connection is held to.
    pub limits: Limits,
    /// How long a connection may be silent.
    pub timing: Timing,
    /// Whether, at the limit, the connection that rests longest is closed for the next one. One that has not asked for
    /// anything yet rests after a second.
    pub give_way: bool,
}

impl Server {
    /// Opens the listeners.
    ///
    /// # Errors
    /// The first address that cannot be listened on. What was opened before it is closed again.
    pub async fn bind(self) -> Result<Bound, BindError> {
        let mut listeners = Vec::with_capacity(self.listen.len());
        for config in self.listen {
            let address = config.address.to_string();
            listeners.push(Listener::open(config).await.map_err(|source| BindError { address, source })?);
        }
        let Self { connections, limits, give_way, .. } = self;
        Ok(Bound { listeners, connections, limits, timing: Arc::new(self.timing), give_way })
    }
}

/// Open listeners that do not accept yet.
#[derive(Debug)]
pub struct Bound {
    listeners: Vec<Listener>,
    connections: usize,
    limits: Limits,
    timing: Arc<Timing>,
    give_way: bool,
}

/// How serving ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// Every connection came to its end.
    Drained,
    /// This many connections were cut: the time was up, or a second signal came.
    Cut(usize),
}

/// How long connections may take to be gone once they were cut.
const CUT_GRACE: Duration = Duration::from_secs(1);

impl Bound {
    /// The addresses, in the order of the configuration, with the ports that the system chose.
    pub fn addresses(&self) -> impl Iterator<Item = &settings::listener::Address> {
        self.listeners.iter().map(Listener::address)
    }

    /// The certificates of listeners with TLS, to be looked at when somebody knows that they changed.
    fn certificates(&self) -> Vec<Arc<Tls>> {
        self.listeners.iter().filter_map(Listener::tls).collect()
    }

    /// The silence that connections are allowed; may be changed while they are open.
    #[must_use]
    pub fn timing(&self) -> Arc<Timing> {
        self.timing.clone()
    }

    /// Accepts connections and serves them, until `shutdown` asks for an end and the connections have come
    /// to theirs or were cut.
    ///
    /// Dropping the future cuts everything at once.
    pub async fn run<H: Handler>(self, handler: H, process: Process, shutdown: Shutdown) -> Outcome {
        let draining = Drain::new();
        let certificates = self.certificates();
        let open = Arc::new(Semaphore::new(self.connections.min(Semaphore::MAX_PERMITS)));
        let failures = Failures::new(process.connection_errors.clone());
        let shared = Arc::new(Shared::new(handler, self.limits, self.timing, draining.clone(), failures));
        let mut chores = JoinSet::new();
        if !certificates.is_empty() {
            chores.spawn(look_at(certificates));
        }
        let mut loops = JoinSet::new();
        for listener in self.listeners {
            loops.spawn(listener.accept_loop(shared.clone(), open.clone(), process.clone(), self.give_way));
        }

        shutdown.readiness().reach(Phase::Ready);
        shutdown.asked().await;
        let drain = shutdown.times();
        if !drain.delay.is_zero() {
            info!(delay = %drain.delay, "still accepting, not ready");
            tokio::select! {
                () = sleep(drain.delay.get()) => {}
                () = shutdown.insisted() => {}
            }
        }
        draining.begin();
        info!(connections = process.connections.get(), timeout = %drain.timeout, "draining");
        let ended = async { while loops.join_next().await.is_some() {} };
        tokio::select! {
            () = ended => return Outcome::Drained,
            () = sleep(drain.timeout.get()) => {}
            () = shutdown.insisted() => {}
        }
        let cut = usize::try_from(process.connections.get()).unwrap_or(0);
        process.cutting.store(true, Ordering::Relaxed);
        loops.abort_all();
        // Aborted tasks are dropped by the runtime a moment later; then the sockets are closed.
        if timeout(CUT_GRACE, async { while loops.join_next().await.is_some() {} }).await.is_err() {
            warn!("connections did not end when they were cut");
        }
        Outcome::Cut(cut)
    }
}

/// Looks for new certificates until it is dropped.
async fn look_at(certificates: Vec<Arc<Tls>>) {
    let mut every = interval(tls::LOOK_EVERY);
    every.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        every.tick().await;
        let certificates = certificates.clone();
        if spawn_blocking(move || certificates.iter().for_each(|tls| tls.look())).await.is_err() {
            warn!("looking for new certificates failed");
        }
    }
}

/// Connections of operators that are open at once. Those that rest give way: a client that keeps too many must not keep
/// probes out either.
const OPERATORS: usize = 256;
/// How long an operator's connection may take to ask: silent ones must not keep the probes of an orchestrator out.
const OPERATORS_HEADER: HumanDuration = HumanDuration::from_secs(5);

/// How long the end waits for what is settled behind the last requests.
const SETTLING: Duration = Duration::from_secs(1);

/// Serves as `settings` say, until the process is asked to stop and has drained, or its connections were cut.
/// Takes the process' signals and its log. Returns the guard of the log, to be dropped after the runtime: the lines
/// of what the runtime's end cuts are written then.
///
/// # Errors
/// The log cannot be opened, the stack cannot be built, or an address cannot be listened on.
pub async fn serve(settings: Settings, tree: &Tree, sources: Arc<Sources>) -> Result<log::Guard, BoxError> {
    let metrics = Metrics::new();
    let (log, guard) = log::open(&settings.log, metrics.process().log_lines_dropped.clone())?;
    log::install(&log, settings.log.filter()?)?;
    let registry = Arc::new(Registry::new(metrics.clone(), log));
    let shutdown = Shutdown::new(settings.drain);
    let access = settings.admin.as_ref().map(reload::access).transpose()?;
    let (admin, asked) = Admin::new(registry.clone(), shutdown.readiness().clone(), access.unwrap_or_default());
    let stack = Arc::new(ArcSwap::from_pointee(Stack::build(&settings, &registry, &admin)?));
    reload::tell(&admin, &settings, tree);

    let front = Server::from(&settings).bind().await?;
    for address in front.addresses() {
        info!(%address, "listening");
    }
    // Dropped when the front has ended, and with them whoever still is at the operator's port.
    let mut chores = JoinSet::new();
    if let Toggle::On(of) = &settings.admin {
        let listen = vec![of.listen.clone().into()];
        let asking = timeouts::Config { client_header: OPERATORS_HEADER, ..Default::default() };
        let (limits, timing) = (Limits::default(), Timing::new(&asking));
        let port = Server { listen, connections: OPERATORS, limits, timing, give_way: true }.bind().await?;
        for address in port.addresses() {
            info!(%address, "admin listening");
        }
        let answer = {
            let admin = admin.clone();
            move |request| admin.clone().answer(request)
        };
        // It answers to the end of the drain, so nobody asks it to stop.
        chores.spawn(port.run(answer, Process::default(), Shutdown::default()).map(|_| ()));
    }
    chores.spawn(shutdown.on_signals()?);
    let handler = {
        let stack = stack.clone();
        move |request| stack.load().call(request)
    };
    let (timing, certificates) = (front.timing(), front.certificates());
    let (begun, ended) = (stack.clone(), registry.clone());
    let reloads = Reloads {
        sources,
        settings,
        stack,
        registry,
        timing,
        shutdown: shutdown.clone(),
        certificates,
        admin,
        reading: None,
    };
    chores.spawn(reloads.run(asked)?);
    begun.load().begin();

    match front.run(handler, metrics.process().clone(), shutdown).await {
        Outcome::Drained => info!("stopped"),
        Outcome::Cut(connections) => warn!(connections, "stopped, and cut connections"),
    }
    tokio::join!(ended.rate_limits().finish(SETTLING), ended.caches().finish(SETTLING));
    Ok(guard)
}

impl From<&Settings> for Server {
    fn from(settings: &Settings) -> Self {
        let limits = &settings.limits;
        Self {
            listen: settings.listen.0.clone(),
            connections: usize::try_from(limits.connections.get()).unwrap_or(usize::MAX),
            limits: Limits {
                headers: limits.headers as usize,
                header_bytes: limits.header_bytes.to_usize(),
                uri_bytes: limits.uri_bytes.to_usize(),
                http2_streams: limits.http2_streams.get(),
            },
            timing: Timing::new(&settings.defaults.timeouts),
            give_way: false,
        }
    }
}

#[cfg(test)]
mod tests;
