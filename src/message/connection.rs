//! What the server knows of the connection that a request came over.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use http::HeaderValue;

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
}

impl Connection {
    /// The facts of a connection from `peer`, encrypted or not.
    #[must_use]
    pub fn new(peer: Peer, tls: bool) -> Self {
        let forwarded_for = match peer.ip() {
            Some(ip) => HeaderValue::try_from(ip.to_string()).expect("an address is visible ASCII"),
            None => HeaderValue::from_static("unknown"),
        };
        Self(Arc::new(Facts { peer, tls, forwarded_for }))
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
