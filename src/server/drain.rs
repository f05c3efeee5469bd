//! The end of serving: who asks for it, and how connections learn of it.
//!
//! The first SIGTERM or SIGINT begins a drain: readiness is off at once, the listeners accept for
//! [`Config::delay`] more, so that a load balancer can notice; then no connection is accepted, idle ones are closed,
//! busy ones end with their request (`Connection: close`, or GOAWAY), and streams may run until
//! [`Config::timeout`]. What is left then is cut, which a client sees as broken off, never as a clean end.
//! A second signal cuts at once.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, futures::OwnedNotified, watch},
};
use tracing::info;

use crate::{
    admin::health::{Phase, Readiness},
    settings::drain::Config,
};

/// Asks a server to stop. Clones ask the same server.
#[derive(Debug, Clone)]
pub struct Shutdown(Arc<Asking>);

#[derive(Debug)]
struct Asking {
    asked: watch::Sender<u8>,
    times: Mutex<Config>,
    readiness: Readiness,
}

impl Shutdown {
    /// Not asked for yet.
    #[must_use]
    pub fn new(times: Config) -> Self {
        let (asked, readiness) = (watch::Sender::new(0), Readiness::default());
        Self(Arc::new(Asking { asked, times: Mutex::new(times), readiness }))
    }

    /// Asks once more: the first time for a drain, the second for an end at once.
    pub fn ask(&self) {
        // First of all: who is told to stop must not get new requests.
        self.0.readiness.reach(Phase::Draining);
        self.0.asked.send_modify(|asked| *asked = asked.saturating_add(1));
    }

    /// Whether a drain was asked for.
    #[must_use]
    pub fn is_asked(&self) -> bool {
        *self.0.asked.borrow() > 0
    }

    /// What readiness probes are told: ready while the server runs, until it is asked to stop.
    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.0.readiness
    }

    /// Changes how long a drain may take, if none has begun.
    pub fn set_times(&self, times: Config) {
        *self.0.times.lock() = times;
    }

    pub(super) fn times(&self) -> Config {
        *self.0.times.lock()
    }

    /// Waits for the first time.
    pub async fn asked(&self) {
        self.at_least(1).await;
    }

    /// Waits for the second time.
    pub async fn insisted(&self) {
        self.at_least(2).await;
    }

    async fn at_least(&self, times: u8) {
        let mut asked = self.0.asked.subscribe();
        // The sender is ours: the channel cannot close while we wait.
        drop(asked.wait_for(|asked| *asked >= times).await);
    }

    /// Asks at each SIGTERM and SIGINT, for ever.
    ///
    /// # Errors
    /// Where the process may not handle signals.
    pub fn on_signals(&self) -> io::Result<impl Future<Output = ()> + Send + use<>> {
        let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let shutdown = self.clone();
        Ok(async move {
            loop {
                let signal = tokio::select! {
                    _ = term.recv() => "SIGTERM",
                    _ = int.recv() => "SIGINT",
                };
                info!(signal, again = shutdown.is_asked(), "asked to stop");
                shutdown.ask();
            }
        })
    }
}

impl Default for Shutdown {
    fn default() -> Self {
        Self::new(Config::default())
    }
}

/// Tells the connections of one server that it drains.
#[derive(Debug, Clone)]
pub(super) struct Drain(Arc<Begun>);

#[derive(Debug)]
struct Begun {
    begun: AtomicBool,
    told: Arc<Notify>,
}

impl Drain {
    pub(super) fn new() -> Self {
        Self(Arc::new(Begun { begun: AtomicBool::new(false), told: Arc::default() }))
    }

    pub(super) fn begin(&self) {
        self.0.begun.store(true, Ordering::Release);
        self.0.told.notify_waiters();
    }

    /// Cheap: asked at every poll of a connection.
    pub(super) fn has_begun(&self) -> bool {
        self.0.begun.load(Ordering::Acquire)
    }

    /// Wakes its task when the drain begins. One that begins before the first poll is seen by
    /// [`Drain::has_begun`] alone, to be asked after that poll.
    pub(super) fn told(&self) -> OwnedNotified {
        self.0.told.clone().notified_owned()
    }

    pub(super) async fn begun(&self) {
        loop {
            // Created before the question: `notify_waiters` reaches whoever was created before it.
            let told = self.told();
            if self.has_begun() {
                return;
            }
            told.await;
        }
    }
}
