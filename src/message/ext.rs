//! Typed request extensions: what one layer finds out and others, which do not import it, need.

use std::{
    any::Any,
    fmt,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use http::HeaderValue;
use parking_lot::Mutex;
use tokio::time::Instant;

/// The other end of a client's connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peer {
    /// A TCP peer, as the kernel or a PROXY protocol header from a listener that asks for one names it.
    /// An IPv4-mapped IPv6 address is folded to IPv4.
    Tcp(SocketAddr),
    /// A process on this machine, through a Unix socket. It has no address.
    Unix,
}

impl Peer {
    /// A TCP peer, with an IPv4-mapped IPv6 address folded to IPv4.
    #[must_use]
    pub fn tcp(address: SocketAddr) -> Self {
        Self::Tcp(SocketAddr::new(address.ip().to_canonical(), address.port()))
    }

    /// The address; `None` for a Unix socket.
    #[must_use]
    pub fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
            Self::Unix => None,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix => f.write_str("unix"),
        }
    }
}

/// Facts of a client connection, one allocation per connection, shared by its requests.
///
/// Request extension. Written by `server::connection` (an embedder without the server inserts its own);
/// read by `layers::hygiene`, which finds the client address with it, and by `layers::request_id`.
#[derive(Debug, Clone)]
pub struct Connection(Arc<Facts>);

#[derive(Debug)]
struct Facts {
    peer: Peer,
    tls: bool,
    forwarded_for: HeaderValue,
    _held: Option<Box<dyn Any + Send + Sync>>,
}

impl Connection {
    /// The facts of a connection from `peer`, encrypted or not.
    #[must_use]
    pub fn new(peer: Peer, tls: bool) -> Self {
        Self::make(peer, tls, None)
    }

    /// The same, with something that is dropped with the last request or tunnel of the connection: the
    /// place that it takes under the connection limit, and in the count that a drain waits for.
    #[must_use]
    pub fn holding(peer: Peer, tls: bool, held: Box<dyn Any + Send + Sync>) -> Self {
        Self::make(peer, tls, Some(held))
    }

    fn make(peer: Peer, tls: bool, held: Option<Box<dyn Any + Send + Sync>>) -> Self {
        let forwarded_for = match peer.ip() {
            Some(ip) => HeaderValue::try_from(ip.to_string()).expect("an address is visible ASCII"),
            None => HeaderValue::from_static("unknown"),
        };
        Self(Arc::new(Facts { peer, tls, forwarded_for, _held: held }))
    }

    /// Who is at the other end.
    #[must_use]
    pub fn peer(&self) -> Peer {
        self.0.peer
    }

    /// Whether sidegate ended TLS on this connection.
    #[must_use]
    pub fn tls(&self) -> bool {
        self.0.tls
    }

    /// The peer as an element of `X-Forwarded-For`, written once per connection; `unknown` (RFC 7239 §6.2)
    /// for a Unix socket.
    #[must_use]
    pub fn forwarded_for(&self) -> &HeaderValue {
        &self.0.forwarded_for
    }
}

/// The correlation id of a request, as the client will get it back.
///
/// Request extension. Written by `layers::request_id`; read by `layers::access_log` and `layers::errors`.
#[derive(Debug, Clone)]
pub struct RequestId(pub HeaderValue);

/// Who asks, as its credential says.
///
/// Request extension. Written by `layers::auth`; read by the layers that count or keep by principal. The access log
/// has its id from the record of the exchange.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Principal {
    /// What its credential calls it: what the upstream and the log are told.
    pub id: Arc<str>,
    /// Who it is, for all that counts or keeps by principal: the same for all credentials of one, and of nobody else. Its
    /// id; where several give ids, with a space, which no id has in it, and who gave it.
    pub identity: Arc<str>,
    /// What kind of principal it is, for limits and exemptions.
    pub tier: Option<Arc<str>>,
}

impl Principal {
    /// The one whom everybody means by this id.
    pub fn new(id: impl Into<Arc<str>>, tier: Option<Arc<str>>) -> Self {
        let id = id.into();
        Self { identity: id.clone(), id, tier }
    }

    /// The one whom `issuer` means by this id (RFC 7519 §4.1.2): others may mean somebody else.
    #[must_use]
    pub fn issued_by(self, issuer: &str) -> Self {
        Self { identity: format!("{} {issuer}", self.id).into(), ..self }
    }
}

/// The session that a request belongs to.
///
/// Request extension. Written by `layers::session`; read by the layers that count or choose by session. What they make
/// of it may be seen: it is not the id itself, which is a credential.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Session {
    /// The SHA-256 digest of its id in 64 hexadecimal digits, with a domain of its own. Good for a key of a store.
    pub id: Arc<str>,
    /// Whether it is kept from an earlier request. One that begins with this request, or that nobody can look up, is
    /// anybody's: who counts by it would let everybody through who shows none.
    pub known: bool,
}

impl Session {
    /// The first 16 digits: what the log and the operator's port call it.
    #[must_use]
    pub fn short(&self) -> &str {
        self.id.get(..16).unwrap_or(&self.id)
    }
}

/// How long a tunnel (an upgraded connection) may be silent in both directions.
///
/// Request extension. Written by `layers::timeouts` on requests that ask for an upgrade; read by
/// `upstream::client`, which carries the tunnel.
#[derive(Debug, Clone, Copy)]
pub struct TunnelIdle(pub Duration);

/// When the exchange will be cut, if it is not over before.
///
/// Request extension, and of a response that it still binds. Written by `layers::deadline`; read by `layers::retry`, which
/// does not begin what cannot be finished, and by `server`, which ends a response whose client does not take it.
#[derive(Debug, Clone, Copy)]
pub struct Deadline(pub Instant);

/// How much later than the one who began an exchange others came who share it, each with time of its own: its answer may
/// take so much longer.
///
/// Request extension. Written by `layers::cache`, which ends what each gets at its own deadline; read by
/// `layers::deadline`.
#[derive(Debug, Clone, Default)]
pub struct Latecomers(Arc<AtomicU64>);

impl Latecomers {
    /// Notes one who came so much later.
    pub fn add(&self, later: Duration) {
        self.0.fetch_max(u64::try_from(later.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How much later the last one came.
    #[must_use]
    pub fn latest(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

/// That a failure of this attempt need not be the client's answer: another attempt, or another upstream, could still
/// step in. Who finds it holds a stream back until its first event, for with that the choice is made.
///
/// Request extension. Written by `layers::retry` on each attempt but the last, and by `layers::fallback` for each
/// upstream but the last; read by `layers::stream_start`.
#[derive(Debug, Clone, Copy)]
pub struct Undecided;

/// The endpoints that were asked for a request already, by their names, so that the next attempt asks another one
/// first. Clones, and so all attempts, share one list, which is as long as there are attempts.
///
/// Request extension. Written by `layers::retry`, empty; `upstream::balance` adds each endpoint that it picks, and
/// reads those that it picked before.
#[derive(Debug, Clone, Default)]
pub struct Tried(Arc<Mutex<Vec<Arc<str>>>>);

impl Tried {
    /// Notes that `endpoint` is being asked.
    pub fn add(&self, endpoint: &Arc<str>) {
        self.0.lock().push(endpoint.clone());
    }

    /// Whether `endpoint` was asked.
    #[must_use]
    pub fn contains(&self, endpoint: &str) -> bool {
        self.0.lock().iter().any(|tried| &**tried == endpoint)
    }

    /// Whether none was asked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.lock().is_empty()
    }
}
