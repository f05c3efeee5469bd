//! Listeners: where connections come from, how many at once, and what happens when they cannot be accepted.

use std::{
    fs::{self, Permissions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::pin,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    net::{TcpListener, TcpSocket, UnixListener, UnixSocket},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{AbortHandle, JoinError, JoinSet},
    time::{Instant, sleep, timeout},
};
use tracing::{debug, error, info, warn};

use super::{
    Handler,
    connection::{Open, Rest, Serve, Shared, Socket, Transport},
    tls::Tls,
};
use crate::{
    message::Peer,
    settings::listener::{Address, Config, Mode},
    telemetry::metrics::Process,
};

/// Connections that the kernel keeps for us until we accept them; `net.core.somaxconn` caps it.
const BACKLOG: u32 = 4096;
/// The pause after the first failure to accept, doubled up to the last.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// At most one line about failures to accept in this time.
const QUIET: Duration = Duration::from_secs(10);
/// How soon a place is looked for again where nobody could give way.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// An open listener.
#[derive(Debug)]
pub(super) struct Listener {
    socket: ListenSocket,
    address: Address,
    transport: Transport,
}

#[derive(Debug)]
enum ListenSocket {
    Tcp(TcpListener),
    Unix(UnixListener, #[expect(dead_code, reason = "held for its end")] SocketFile),
}

impl Listener {
    #[expect(clippy::unused_async, reason = "tokio's listeners must be made within a runtime")]
    pub(super) async fn open(config: Config) -> io::Result<Self> {
        let tls = config.tls.map(Tls::open).transpose()?.map(Arc::new);
        let transport = Transport { tls, proxy_protocol: config.proxy_protocol };
        let (socket, address) = match config.address {
            Address::Tcp(address) => {
                let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
                // A restart must not wait for the old process' connections to leave TIME_WAIT.
                socket.set_reuseaddr(true)?;
                socket.bind(address)?;
                let socket = socket.listen(BACKLOG)?;
                let address = Address::Tcp(socket.local_addr()?);
                (ListenSocket::Tcp(socket), address)
            }
            Address::Unix(path) => {
                let (listener, file) = SocketFile::bind(&path, config.mode)?;
                (ListenSocket::Unix(listener, file), Address::Unix(path))
            }
        };
        Ok(Self { socket, address, transport })
    }

    pub(super) fn address(&self) -> &Address {
        &self.address
    }

    pub(super) fn tls(&self) -> Option<Arc<Tls>> {
        self.transport.tls.clone()
    }

    /// Accepts until the drain begins, then waits for its connections. Dropped, it cuts them. With `give_way`, those that
    /// rest do where there is no other place.
    pub(super) async fn accept_loop<H: Handler>(
        self,
        shared: Arc<Shared<H>>,
        open: Arc<Semaphore>,
        process: Process,
        give_way: bool,
    ) {
        let mut connections = JoinSet::new();
        let mut begun = pin!(shared.drain().begun());
        let mut trouble = Trouble::default();
        let mut resting = give_way.then(Resting::default);
        let serve = |connections: &mut JoinSet<()>, permit: OwnedSemaphorePermit, (socket, peer): (Socket, Peer)| {
            process.accepted.inc();
            let open = Open::new(permit, process.connections.clone());
            let connection = Serve::new(socket, peer, &self.transport, open, shared.clone());
            (connection.rest(), connections.spawn(connection))
        };
        loop {
            // The permit comes first: at the limit, further connections stay in the kernel's queue.
            let next = async {
                let permit = match &resting {
                    Some(resting) => resting.place(&open).await,
                    None => place(&open).await,
                };
                (permit, self.socket.accept().await)
            };
            tokio::select! {
                biased;
                () = &mut begun => break,
                Some(ended) = connections.join_next() => report(&ended),
                (permit, accepted) = next => match accepted {
                    Ok(accepted) => {
                        trouble = Trouble { warned: trouble.warned, ..Trouble::default() };
                        let served = serve(&mut connections, permit, accepted);
                        if let Some(resting) = &mut resting {
                            resting.note(served);
                        }
                    }
                    // The client left while it waited in the queue.
                    Err(error) if is_of_the_client(&error) => debug!(error = %error, "connection lost before it was accepted"),
                    Err(error) => {
                        process.accept_errors.inc();
                        drop(permit);
                        let pause = trouble.pause(&self.address, &error);
                        tokio::select! {
                            () = &mut begun => break,
                            () = sleep(pause) => {}
                        }
                    }
                }
            }
        }
        // What the kernel has accepted for us already would be reset when the listener closes.
        while let Some(Ok(accepted)) = self.socket.accept().now_or_never() {
            let Ok(permit) = open.clone().try_acquire_owned() else { break };
            let _served = serve(&mut connections, permit, accepted);
        }
        drop(self.socket);
        info!(address = %self.address, connections = connections.len(), "no longer listening");
        while let Some(ended) = connections.join_next().await {
            report(&ended);
        }
    }
}

/// A place among the connections that are open at once.
async fn place(open: &Arc<Semaphore>) -> OwnedSemaphorePermit {
    open.clone().acquire_owned().await.expect("the semaphore is never closed")
}

/// The connections of a listener, as many as have places, of which the one that rests longest gives way.
#[derive(Debug, Default)]
struct Resting(Vec<(Rest, AbortHandle)>);

impl Resting {
    fn note(&mut self, connection: (Rest, AbortHandle)) {
        self.0.retain(|(rest, _)| !rest.is_over());
        self.0.push(connection);
    }

    async fn place(&self, open: &Arc<Semaphore>) -> OwnedSemaphorePermit {
        loop {
            if let Ok(permit) = open.clone().try_acquire_owned() {
                return permit;
            }
            let rest = self.0.iter().filter_map(|(rest, task)| Some((rest.since()?, task)));
            if let Some((_, longest)) = rest.min_by_key(|(since, _)| *since) {
                longest.abort();
            }
            if let Ok(permit) = timeout(LOOK_AGAIN, place(open)).await {
                return permit;
            }
        }
    }
}

/// A connection's task ends by itself or because it was aborted; anything else is a bug.
fn report(ended: &Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        error!(%error, "a connection's task panicked");
    }
}

fn is_of_the_client(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted, TimedOut};
    matches!(
        error.kind(),
        ConnectionAborted | ConnectionReset | ConnectionRefused | Interrupted | BrokenPipe | TimedOut
    )
}

/// Failures to accept in a row: most often no file descriptors are left (`EMFILE`, `ENFILE`), or no memory.
/// The connection stays in the queue and the listener readable, so trying again at once would be a busy loop.
#[derive(Debug, Default)]
struct Trouble {
    failures: u32,
    warned: Option<Instant>,
}

impl Trouble {
    fn pause(&mut self, address: &Address, error: &io::Error) -> Duration {
        let now = Instant::now();
        if self.warned.is_none_or(|at| now - at >= QUIET) {
            self.warned = Some(now);
            warn!(%address, %error, "cannot accept connections; trying again");
        }
        let (first, last) = BACK_OFF;
        let pause = last.min(first * 2_u32.pow(self.failures.min(10)));
        self.failures = self.failures.saturating_add(1);
        pause
    }
}

impl ListenSocket {
    async fn accept(&self) -> io::Result<(Socket, Peer)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // Fails only where the connection is gone already, and then reading will say so.
                let _gone = stream.set_nodelay(true);
                Ok((Socket::Tcp(stream), Peer::tcp(peer)))
            }
            Self::Unix(listener, _) => {
                let (stream, _) = listener.accept().await?;
                Ok((Socket::Unix(stream), Peer::Unix))
            }
        }
    }
}

/// The file of a Unix socket, removed at the end if it is still the one that was made.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    identity: (u64, u64),
}

impl SocketFile {
    /// Binds `path`. A socket that a dead process left behind is replaced; one that answers, and anything that
    /// is no socket, stays and is an error.
    fn bind(path: &Path, mode: Option<Mode>) -> io::Result<(UnixListener, Self)> {
        let socket = UnixSocket::new_stream()?;
        match socket.bind(path) {
            Err(error) if error.kind() == io::ErrorKind::AddrInUse && is_stale(path)? => {
                fs::remove_file(path)?;
                socket.bind(path)
            }
            bound => bound,
        }?;
        let file = Self { path: path.to_owned(), identity: identity(path)? };
        // Before anybody can connect: until it listens, a connection is refused.
        if let Some(mode) = mode {
            fs::set_permissions(path, Permissions::from_mode(mode.get()))?;
        }
        Ok((socket.listen(BACKLOG)?, file))
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        // By now another process may listen there under a file of its own.
        if identity(&self.path).is_ok_and(|found| found == self.identity)
            && let Err(error) = fs::remove_file(&self.path)
        {
            warn!(path = %self.path.display(), %error, "cannot remove the socket");
        }
    }
}

fn is_stale(path: &Path) -> io::Result<bool> {
    Ok(fs::symlink_metadata(path)?.file_type().is_socket()
        && std::os::unix::net::UnixStream::connect(path)
            .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused))
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    let found = fs::symlink_metadata(path)?;
    Ok((found.dev(), found.ino()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn the_pause_after_failures_grows_to_a_second() {
        let address: Address = "127.0.0.1:80".parse().unwrap();
        let error = io::Error::from_raw_os_error(24);
        assert!(!is_of_the_client(&error), "EMFILE");
        let mut trouble = Trouble::default();
        let pauses: Vec<_> = (0..9).map(|_| trouble.pause(&address, &error).as_millis()).collect();
        assert_eq!(pauses, [20, 40, 80, 160, 320, 640, 1000, 1000, 1000]);
        let warned = trouble.warned;
        tokio::time::advance(QUIET).await;
        trouble.pause(&address, &error);
        assert_ne!(trouble.warned, warned, "one line in ten seconds");
    }
}
