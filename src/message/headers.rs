//! Names of header fields that the `http` crate does not have.

use http::{
    HeaderMap, HeaderName,
    header::{AUTHORIZATION, COOKIE, PROXY_AUTHORIZATION},
};

/// The correlation id: the same value upstream, in the response, in every log line and every error.
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// The session that a request belongs to: named by the client, and logged, unless sidegate makes the sessions itself.
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

/// The fields that clients show who they are in, to a backend or to sidegate. (In a query they stand, too.)
pub const CREDENTIALS: [HeaderName; 6] = [
    AUTHORIZATION,
    COOKIE,
    PROXY_AUTHORIZATION,
    HeaderName::from_static("x-api-key"),
    HeaderName::from_static("api-key"),
    HeaderName::from_static("x-goog-api-key"),
];

/// Removes a field that only sidegate may say, in every spelling: CGI and WSGI write all that is no letter and no digit
/// the same way, so that a backend could not tell the client's `x_principal_id` or `x.principal.id` from ours.
pub fn remove_alike(headers: &mut HeaderMap, own: &HeaderName) {
    headers.remove(own);
    let is_like = |name: &&HeaderName| {
        let (name, own) = (name.as_str().as_bytes(), own.as_str().as_bytes());
        let fold = |byte: u8| if byte.is_ascii_alphanumeric() { byte } else { b'_' };
        name.len() == own.len() && name.iter().zip(own).all(|(&a, &b)| fold(a) == fold(b))
    };
    while let Some(name) = headers.keys().find(is_like).cloned() {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn what_a_backend_would_read_the_same_way_is_removed() {
        let names = ["x-session-id", "x_session-id", "x.session~id", "x-session-ids", "xsessionid", "y-session-id"];
        let mut headers: HeaderMap =
            names.map(|name| (HeaderName::from_static(name), HeaderValue::from_static("a"))).into_iter().collect();
        remove_alike(&mut headers, &X_SESSION_ID);
        let left: std::collections::BTreeSet<_> = headers.keys().map(HeaderName::as_str).collect();
        assert_eq!(left, ["x-session-ids", "xsessionid", "y-session-id"].into());
    }
}
