//! Names of header fields that the `http` crate does not have.

use http::HeaderName;

/// The correlation id: the same value upstream, in the response, in every log line and every error.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The session that a request belongs to, named by the client; logged.
pub const X_SESSION_ID: HeaderName = HeaderName::from_static("x-session-id");
/// W3C trace context.
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// The chain of addresses that a request came through, nearest last.
pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
/// The scheme that the client used.
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
/// The host that the client asked for.
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
/// RFC 9209.
pub const PROXY_STATUS: HeaderName = HeaderName::from_static("proxy-status");
/// Asks an nginx outside of us not to buffer.
pub const X_ACCEL_BUFFERING: HeaderName = HeaderName::from_static("x-accel-buffering");
/// Connection-specific, from before RFC 7230.
pub const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
/// Connection-specific, never standardised.
pub const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
