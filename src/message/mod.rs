//! The nouns that everything above speaks in: a body, an error, the facts of a connection and the
//! names of headers. Floor 0: it imports nothing of this crate.

mod body;
pub(crate) mod bytes;
mod error;
mod ext;
pub mod forwarded;
pub mod headers;
pub mod json;
mod net;
pub mod path;
mod problem;
mod replay;
mod service;

pub use self::{
    body::Body,
    error::{BoxError, Error, Fault, Kind},
    ext::{Connection, Deadline, Latecomers, Peer, Principal, RequestId, Session, Tried, TunnelIdle, Undecided},
    net::Net,
    problem::Form,
    replay::Replay,
    service::{Chain, CloneService, HttpService, ResponseFuture, take_ready},
};

/// A request on its way through the layers.
pub type Request = http::Request<Body>;
/// A response on its way back.
pub type Response = http::Response<Body>;

/// Whether `request` asks for a tunnel (RFC 9110 7.8 and 9.3.6): its bytes are no longer a message, so nothing of it can be
/// sent twice or be timed as one.
pub fn asks_for_tunnel<B>(request: &http::Request<B>) -> bool {
    request.headers().contains_key(http::header::UPGRADE) || request.method() == http::Method::CONNECT
}
