//! What sidegate answers for itself.

use std::{error::Error as StdError, fmt, time::Duration};

use http::{HeaderName, HeaderValue, StatusCode};
use serde_json::Value;

/// What a layer returns when it does not answer: usually an [`Error`], possibly inside a wrapping of its own.
pub type BoxError = Box<dyn StdError + Send + Sync>;

/// A failure that sidegate will answer for. Layers return it boxed and unrendered; `layers::errors` alone
/// makes a response of it.
///
/// What the client is told comes from the [`Kind`]; the source is for the log.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    source: Option<BoxError>,
    retry_after: Option<Duration>,
    fields: Vec<(HeaderName, HeaderValue)>,
    members: Vec<(&'static str, Value)>,
}

impl Error {
    /// An error whose cause is `source`.
    pub fn new(kind: Kind, source: impl Into<BoxError>) -> Self {
        Self { source: Some(source.into()), ..Self::from(kind) }
    }

    /// The same, saying when it is worth to ask again.
    #[must_use]
    pub fn with_retry_after(mut self, after: Duration) -> Self {
        self.retry_after = Some(after);
        self
    }

    /// The same, with a field that the answer will have, as `WWW-Authenticate` (RFC 9110 §11.6.1). One that it has by
    /// itself is not replaced.
    #[must_use]
    pub fn with_field(mut self, name: HeaderName, value: HeaderValue) -> Self {
        self.fields.push((name, value));
        self
    }

    /// The same, with a member that a problem document about it will have beside the usual ones (RFC 9457 §3.2).
    #[must_use]
    pub fn with_member(mut self, name: &'static str, value: impl Into<Value>) -> Self {
        self.members.push((name, value.into()));
        self
    }

    /// What will be answered for `error`: itself, or the one that it wraps, or [`Kind::Internal`].
    #[must_use]
    pub fn of(error: BoxError) -> Self {
        match error.downcast() {
            Ok(error) => *error,
            Err(error) => {
                let found = Self::find(&*error);
                let of = Self {
                    kind: found.map_or(Kind::Internal, Self::kind),
                    source: None,
                    retry_after: found.and_then(Self::retry_after),
                    fields: found.map(|found| found.fields.clone()).unwrap_or_default(),
                    members: found.map(|found| found.members.clone()).unwrap_or_default(),
                };
                Self { source: Some(error), ..of }
            }
        }
    }

    /// What went wrong.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// When it is worth to ask again, from now: what `Retry-After` says, where it is known.
    #[must_use]
    pub fn retry_after(&self) -> Option<Duration> {
        self.retry_after
    }

    /// Whether an endpoint that was asked is to blame for `error`, so that it counts against its breaker and its health.
    /// What does not come from sidegate came from the endpoint.
    #[must_use]
    pub fn blames_endpoint(error: &(dyn StdError + 'static)) -> bool {
        let kind = Self::find(error).map(Self::kind);
        matches!(kind, None | Some(Kind::ConnectFailed | Kind::UpstreamReset | Kind::UpstreamTimeout))
    }

    /// Fields that the answer will have beside its own.
    #[must_use]
    pub fn fields(&self) -> &[(HeaderName, HeaderValue)] {
        &self.fields
    }

    /// Members that a problem document about it will have beside the usual ones.
    #[must_use]
    pub fn members(&self) -> &[(&'static str, Value)] {
        &self.members
    }

    /// The `Error` in a chain of sources, however it was wrapped.
    ///
    /// ```
    /// use sidegate::message::{Error, Kind};
    ///
    /// let wrapped = std::io::Error::other(Error::from(Kind::UpstreamTimeout));
    /// assert_eq!(Error::find(&wrapped).map(Error::kind), Some(Kind::UpstreamTimeout));
    /// ```
    #[must_use]
    pub fn find<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a Self> {
        let mut next = Some(error);
        while let Some(error) = next {
            if let Some(found) = error.downcast_ref() {
                return Some(found);
            }
            // An `io::Error` hides what it carries from `source`: its own source is the carried one's.
            next = match error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref) {
                Some(carried) => Some(carried),
                None => error.source(),
            };
        }
        None
    }
}

impl From<Kind> for Error {
    fn from(kind: Kind) -> Self {
        Self { kind, source: None, retry_after: None, fields: Vec::new(), members: Vec::new() }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.detail())
    }
}

impl StdError for Error {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        match &self.source {
            Some(source) => Some(&**source),
            None => None,
        }
    }
}

/// Who caused an error: all that breakers, retries and fallbacks look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The request, or the client's connection.
    Client,
    /// The upstream, or the way to it.
    Upstream,
    /// Sidegate itself.
    Sidegate,
}

/// What went wrong. A new variant does not compile until it has a slug, a status, a fault and a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// The request is malformed or ambiguous; the text says how.
    BadRequest(&'static str),
    /// The target is longer than the listener allows.
    UriTooLong,
    /// The header section has more fields or bytes than the listener allows.
    HeadersTooLarge,
    /// The request came through this sidegate before.
    LoopDetected,
    /// No route matches.
    NoRoute,
    /// The request has no credential that is valid.
    Unauthorized,
    /// The credential is valid, and not for this route.
    Forbidden,
    /// The client asks, or guesses, too often.
    RateLimited,
    /// What limits are counted in cannot be had.
    RateLimitUnavailable,
    /// What credentials are verified with cannot be had.
    AuthUnavailable,
    /// The request's body is larger than the route allows.
    BodyTooLarge,
    /// The client was silent for `client_body_idle` in the middle of its body.
    ClientTimeout,
    /// The client's body ended before its end.
    ClientReset,
    /// No connection to the endpoint within `connect`: refused, unreachable, unresolved, or TLS failed.
    ConnectFailed,
    /// The endpoint broke the connection, or HTTP, before or within its response.
    UpstreamReset,
    /// The endpoint was silent for `first_byte`, or for `idle` within its response.
    UpstreamTimeout,
    /// The exchange took longer than `total`.
    DeadlineExceeded,
    /// The circuit breaker of the endpoint, or of all of them, is open.
    CircuitOpen,
    /// No endpoint of the upstream is up.
    NoHealthyEndpoint,
    /// As many requests are in flight as may be, and the queue is full or took too long.
    Overloaded,
    /// A bug of sidegate's.
    Internal,
    /// An embedder's own.
    Custom {
        /// The last part of the problem type: lower-case words with dashes.
        slug: &'static str,
        /// What the client gets.
        status: StatusCode,
        /// What the client is told.
        detail: &'static str,
    },
}

impl Kind {
    /// The last part of the problem type, `urn:sidegate:problem:<slug>`; also the metric label and the
    /// log field `error`.
    #[must_use]
    pub const fn slug(self) -> &'static str {
        match self {
            Self::BadRequest(_) => "bad-request",
            Self::UriTooLong => "uri-too-long",
            Self::HeadersTooLarge => "headers-too-large",
            Self::LoopDetected => "loop-detected",
            Self::NoRoute => "no-route",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::RateLimited => "rate-limited",
            Self::RateLimitUnavailable => "rate-limit-unavailable",
            Self::AuthUnavailable => "auth-unavailable",
            Self::BodyTooLarge => "body-too-large",
            Self::ClientTimeout => "client-timeout",
            Self::ClientReset => "client-reset",
            Self::ConnectFailed => "connect-failed",
            Self::UpstreamReset => "upstream-reset",
            Self::UpstreamTimeout => "upstream-timeout",
            Self::DeadlineExceeded => "deadline-exceeded",
            Self::CircuitOpen => "circuit-open",
            Self::NoHealthyEndpoint => "no-healthy-endpoint",
            Self::Overloaded => "overloaded",
            Self::Internal => "internal",
            Self::Custom { slug, .. } => slug,
        }
    }

    /// The status of the response.
    #[must_use]
    pub const fn status(self) -> StatusCode {
        match self {
            Self::BadRequest(_) | Self::ClientReset => StatusCode::BAD_REQUEST,
            Self::UriTooLong => StatusCode::URI_TOO_LONG,
            Self::HeadersTooLarge => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::LoopDetected => StatusCode::LOOP_DETECTED,
            Self::NoRoute => StatusCode::NOT_FOUND,
            Self::Unauthorized => StatusCode::UNAUTHORIZED,
            Self::Forbidden => StatusCode::FORBIDDEN,
            Self::RateLimited => StatusCode::TOO_MANY_REQUESTS,
            Self::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            Self::ClientTimeout => StatusCode::REQUEST_TIMEOUT,
            Self::ConnectFailed | Self::UpstreamReset => StatusCode::BAD_GATEWAY,
            Self::UpstreamTimeout | Self::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            Self::RateLimitUnavailable
            | Self::AuthUnavailable
            | Self::CircuitOpen
            | Self::NoHealthyEndpoint
            | Self::Overloaded => StatusCode::SERVICE_UNAVAILABLE,
            Self::Internal => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Custom { status, .. } => status,
        }
    }

    /// What the client is told: one sentence without a cause, an address or a value.
    #[must_use]
    pub const fn detail(self) -> &'static str {
        match self {
            Self::BadRequest(detail) | Self::Custom { detail, .. } => detail,
            Self::UriTooLong => "the request target is too long",
            Self::HeadersTooLarge => "the request has too many or too large header fields",
            Self::LoopDetected => "the request came through this proxy before",
            Self::NoRoute => "no route matches the request",
            Self::Unauthorized => "the request has no valid credential",
            Self::Forbidden => "the credential is not valid for this route",
            Self::RateLimited => "too many requests",
            Self::RateLimitUnavailable => "limits cannot be counted at the moment",
            Self::AuthUnavailable => "credentials cannot be verified at the moment",
            Self::BodyTooLarge => "the request body is too large",
            Self::ClientTimeout => "the request body did not arrive in time",
            Self::ClientReset => "the request body broke off",
            Self::ConnectFailed => "the upstream could not be reached",
            Self::UpstreamReset => "the upstream broke off or did not speak HTTP",
            Self::UpstreamTimeout => "the upstream did not answer in time",
            Self::DeadlineExceeded => "the request took too long",
            Self::CircuitOpen => "the upstream has failed too often and is left alone for a while",
            Self::NoHealthyEndpoint => "no endpoint of the upstream is up",
            Self::Overloaded => "too many requests are in flight",
            Self::Internal => "the proxy failed",
        }
    }

    /// Who caused it.
    #[must_use]
    pub const fn fault(self) -> Fault {
        match self {
            Self::BadRequest(_)
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::LoopDetected
            | Self::NoRoute
            | Self::Unauthorized
            | Self::Forbidden
            | Self::RateLimited
            | Self::BodyTooLarge
            | Self::ClientTimeout
            | Self::ClientReset => Fault::Client,
            // A service that we ask, if not the backend.
            Self::RateLimitUnavailable
            | Self::AuthUnavailable
            | Self::ConnectFailed
            | Self::UpstreamReset
            | Self::UpstreamTimeout
            | Self::DeadlineExceeded
            | Self::CircuitOpen
            | Self::NoHealthyEndpoint
            | Self::Overloaded => Fault::Upstream,
            Self::Internal => Fault::Sidegate,
            Self::Custom { status, .. } => {
                if status.as_u16() < 500 {
                    Fault::Client
                } else {
                    Fault::Sidegate
                }
            }
        }
    }

    /// Whether the client's HTTP/1 connection must not carry another request: its framing is in doubt, or
    /// the rest of its body would have to be read first.
    #[must_use]
    pub const fn closes_connection(self) -> bool {
        matches!(
            self,
            Self::BadRequest(_)
                | Self::UriTooLong
                | Self::HeadersTooLarge
                | Self::BodyTooLarge
                | Self::ClientTimeout
                | Self::ClientReset
        )
    }

    /// Whether it is certain that the upstream never saw the request.
    #[must_use]
    pub const fn unsent(self) -> bool {
        !matches!(
            self,
            Self::UpstreamReset
                | Self::UpstreamTimeout
                | Self::DeadlineExceeded
                | Self::BodyTooLarge
                | Self::ClientTimeout
                | Self::ClientReset
                | Self::Internal
        )
    }

    /// The token of `Proxy-Status` (RFC 9209 §2.3).
    #[must_use]
    pub const fn proxy_status(self) -> &'static str {
        match self {
            Self::BadRequest(_)
            | Self::UriTooLong
            | Self::HeadersTooLarge
            | Self::BodyTooLarge
            | Self::ClientTimeout
            | Self::ClientReset
            | Self::Custom { .. } => "http_request_error",
            Self::LoopDetected => "proxy_loop_detected",
            Self::NoRoute => "destination_not_found",
            Self::Unauthorized | Self::Forbidden | Self::RateLimited => "http_request_denied",
            Self::AuthUnavailable => "proxy_configuration_error",
            Self::ConnectFailed | Self::CircuitOpen | Self::NoHealthyEndpoint => "destination_unavailable",
            Self::Overloaded => "connection_limit_reached",
            Self::UpstreamReset => "http_response_incomplete",
            Self::UpstreamTimeout | Self::DeadlineExceeded => "http_response_timeout",
            Self::Internal | Self::RateLimitUnavailable => "proxy_internal_error",
        }
    }

    /// The code of `grpc-status` (gRPC's `statuscodes.md`).
    #[must_use]
    pub const fn grpc_status(self) -> u8 {
        const CANCELLED: u8 = 1;
        const UNKNOWN: u8 = 2;
        const DEADLINE_EXCEEDED: u8 = 4;
        const PERMISSION_DENIED: u8 = 7;
        const RESOURCE_EXHAUSTED: u8 = 8;
        const UNIMPLEMENTED: u8 = 12;
        const INTERNAL: u8 = 13;
        const UNAVAILABLE: u8 = 14;
        const UNAUTHENTICATED: u8 = 16;
        match self {
            // INTERNAL is what gRPC makes of HTTP 400.
            Self::BadRequest(_) | Self::UriTooLong | Self::HeadersTooLarge | Self::LoopDetected | Self::Internal => {
                INTERNAL
            }
            Self::NoRoute => UNIMPLEMENTED,
            Self::Unauthorized => UNAUTHENTICATED,
            Self::Forbidden => PERMISSION_DENIED,
            Self::RateLimited | Self::BodyTooLarge => RESOURCE_EXHAUSTED,
            Self::ClientTimeout | Self::ClientReset => CANCELLED,
            Self::RateLimitUnavailable
            | Self::AuthUnavailable
            | Self::ConnectFailed
            | Self::UpstreamReset
            | Self::CircuitOpen
            | Self::NoHealthyEndpoint
            | Self::Overloaded => UNAVAILABLE,
            Self::UpstreamTimeout | Self::DeadlineExceeded => DEADLINE_EXCEEDED,
            Self::Custom { .. } => UNKNOWN,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_found_in_any_wrapping() {
        let inner: BoxError = Error::from(Kind::BodyTooLarge).into();
        let outer = Error::new(Kind::UpstreamReset, inner);
        assert_eq!(Error::find(&outer).map(Error::kind), Some(Kind::UpstreamReset), "the outermost counts");
        let io = std::io::Error::other(Error::from(Kind::BodyTooLarge));
        assert_eq!(Error::find(&io).map(Error::kind), Some(Kind::BodyTooLarge));
        assert!(Error::find(&std::io::Error::other("other")).is_none());
    }

    #[test]
    fn what_is_answered_for_an_error_says_what_the_error_inside_says() {
        let field = (http::header::SET_COOKIE, HeaderValue::from_static("a=b"));
        let inner = || Error::from(Kind::Overloaded).with_retry_after(Duration::from_secs(2));
        let inner = || inner().with_field(field.0.clone(), field.1.clone()).with_member("a", 1);
        for error in [BoxError::from(inner()), std::io::Error::other(inner()).into()] {
            let of = Error::of(error);
            assert_eq!((of.kind(), of.retry_after()), (Kind::Overloaded, Some(Duration::from_secs(2))));
            assert_eq!(of.fields(), std::slice::from_ref(&field));
            assert_eq!(of.members(), [("a", 1.into())]);
        }
        assert_eq!(Error::of("a bug".into()).kind(), Kind::Internal);
    }
}
