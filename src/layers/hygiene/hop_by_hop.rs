//! Fields that concern one connection only, and upgrades, which are one of them and must pass.
//!
//! RFC 9110 §7.6.1: what `Connection` names goes, then `Connection` itself and the fields that are known to
//! be connection-specific. On a request `Proxy-Authorization` goes with them, on a response
//! `Proxy-Authenticate`: a gateway asks nobody for proxy credentials, and those meant for a proxy on the way
//! are no business of the backend's (§11.7.2). `Proxy` goes because CGI would make `HTTP_PROXY` of it.
//! `Trailer` stays, for trailers pass through; so does `TE: trailers`, which the client layer sends on to
//! HTTP/2 upstreams only.

use http::{
    HeaderMap, HeaderName, HeaderValue, Response, StatusCode, Version,
    header::{CONNECTION, CONTENT_LENGTH, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE},
};

use super::{
    guard::Guard,
    survey::{HOP, Survey},
};
use crate::message::{
    Error, Kind,
    headers::{KEEP_ALIVE, PROXY_CONNECTION},
};

const PROXY: HeaderName = HeaderName::from_static("proxy");

/// Cleans the fields of a request. Returns the protocol that it asks to switch to, which stays with it as
/// `Connection: upgrade` and `Upgrade`.
pub(super) fn request(headers: &mut HeaderMap, version: Version, survey: Survey, guard: &Guard) -> Option<HeaderValue> {
    if !survey.has(HOP) {
        return None;
    }
    let trailers = has_token(headers, &TE, "trailers");
    let offered = offered(headers, version).cloned();
    strip(headers, guard);
    headers.remove(PROXY_AUTHORIZATION);
    headers.remove(PROXY);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(protocol) = &offered {
        switch(headers, protocol.clone());
    }
    offered
}

/// Cleans the fields of the response to a request in `version` that asked to switch to `offered`.
///
/// # Errors
/// [`Kind::UpstreamReset`] for a 101 that was not asked for, or switches to something else; nothing may
/// follow it that a client could take for a response. Also for a transfer coding that sidegate does not
/// undo: what is left of the body would not be what its fields say.
pub(super) fn response<B>(
    response: &mut Response<B>,
    version: Version,
    offered: Option<&HeaderValue>,
    guard: &Guard,
) -> Result<(), Error> {
    let survey = Survey::of(response.headers());
    let status = response.status();
    let switches = status == StatusCode::SWITCHING_PROTOCOLS;
    if !survey.has(HOP) && !switches {
        return Ok(());
    }
    let headers = response.headers_mut();
    let protocol = only_protocol(headers).cloned();
    if switches {
        let same = |a: &HeaderValue, b: &HeaderValue| a.as_bytes().eq_ignore_ascii_case(b.as_bytes());
        if !offered.zip(protocol.as_ref()).is_some_and(|(offered, chosen)| same(offered, chosen)) {
            return Err(Error::new(Kind::UpstreamReset, "a switch of protocols that was not asked for"));
        }
    }
    if survey.codings > 0 {
        let coding = headers.get(TRANSFER_ENCODING).map_or(&b""[..], HeaderValue::as_bytes).trim_ascii();
        if survey.codings > 1 || !(coding.eq_ignore_ascii_case(b"chunked") || coding.eq_ignore_ascii_case(b"identity"))
        {
            return Err(Error::new(Kind::UpstreamReset, "a transfer coding other than chunked"));
        }
        // The coding was the framing that counted (RFC 9112 §6.3): the length would become ours.
        headers.remove(CONTENT_LENGTH);
    }
    strip(headers, guard);
    headers.remove(PROXY_AUTHENTICATE);
    // A 426 must say what to switch to (RFC 9110 §15.5.22); HTTP/2 has no such field.
    if let Some(protocol) = protocol
        && (switches || status == StatusCode::UPGRADE_REQUIRED && version == Version::HTTP_11)
    {
        switch(headers, protocol);
    }
    Ok(())
}

fn switch(headers: &mut HeaderMap, protocol: HeaderValue) {
    headers.insert(CONNECTION, HeaderValue::from_static("upgrade"));
    headers.insert(UPGRADE, protocol);
}

fn strip(headers: &mut HeaderMap, guard: &Guard) {
    if tokens(headers, &CONNECTION).any(names_a_field) {
        let named: Vec<HeaderName> = tokens(headers, &CONNECTION)
            .filter(|token| names_a_field(token))
            .filter_map(|token| HeaderName::from_bytes(token).ok())
            .filter(|name| !guard.holds(name.as_str()))
            .collect();
        for name in named {
            headers.remove(name);
        }
    }
    for name in [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE] {
        headers.remove(name);
    }
}

/// Whether a token of `Connection` is more than one of the usual ones, which mean no field or one that goes
/// anyway.
fn names_a_field(token: &[u8]) -> bool {
    !["keep-alive", "close", "upgrade", "te"].iter().any(|usual| token.eq_ignore_ascii_case(usual.as_bytes()))
}

/// The protocol that a request asks to switch to.
///
/// Only HTTP/1.1 has upgrades. A list of protocols, and those that are HTTP or TLS again, are ignored, as a
/// server may (RFC 9110 §7.8): a backend that took up `h2c` would be sent requests that sidegate never sees.
fn offered(headers: &HeaderMap, version: Version) -> Option<&HeaderValue> {
    if version != Version::HTTP_11 || !has_token(headers, &CONNECTION, "upgrade") {
        return None;
    }
    let protocol = only_protocol(headers)?;
    let name = protocol.as_bytes().split(|&byte| byte == b'/').next().unwrap_or_default();
    let nested = ["h2c", "h2", "http", "tls"].iter().any(|nested| name.eq_ignore_ascii_case(nested.as_bytes()));
    (!nested).then_some(protocol)
}

/// The value of `Upgrade` where it is exactly one `name` or `name/version`.
fn only_protocol(headers: &HeaderMap) -> Option<&HeaderValue> {
    let mut lines = headers.get_all(UPGRADE).iter();
    let only = lines.next().filter(|_| lines.next().is_none())?;
    let legal = |byte: &u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~/".contains(byte);
    (!only.is_empty() && only.as_bytes().iter().all(legal)).then_some(only)
}

fn has_token(headers: &HeaderMap, name: &HeaderName, token: &str) -> bool {
    tokens(headers, name).any(|found| found.eq_ignore_ascii_case(token.as_bytes()))
}

fn tokens<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(name).iter();
    lines
        .flat_map(|line| line.as_bytes().split(|&byte| byte == b','))
        .map(<[u8]>::trim_ascii)
        .filter(|token| !token.is_empty())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn map(fields: &[(&str, &str)]) -> HeaderMap {
        let field = |(name, value): &(&str, &str)| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap())
        };
        fields.iter().map(field).collect()
    }

    fn texts(headers: &HeaderMap) -> Vec<String> {
        let mut all: Vec<_> =
            headers.iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        all.sort_unstable();
        all
    }

    fn upstream_sees(version: Version, fields: &[(&str, &str)]) -> Vec<String> {
        let mut headers = map(fields);
        let survey = Survey::of(&headers);
        request(&mut headers, version, survey, &Guard::new());
        texts(&headers)
    }

    /// What the client sees of a response to a request that asked to switch to `offered`.
    fn client_sees(status: u16, fields: &[(&str, &str)], offered: Option<&'static str>) -> Option<Vec<String>> {
        let mut sent = Response::new(());
        *sent.status_mut() = StatusCode::from_u16(status).unwrap();
        *sent.headers_mut() = map(fields);
        let offered = offered.map(HeaderValue::from_static);
        match response(&mut sent, Version::HTTP_11, offered.as_ref(), &Guard::new()) {
            Ok(()) => Some(texts(sent.headers())),
            Err(error) => {
                assert_eq!(error.kind(), Kind::UpstreamReset);
                None
            }
        }
    }

    #[test]
    fn fields_of_the_connection_end_here() {
        let sent = [
            ("connection", "keep-alive, X-Mine ,, x-other"),
            ("connection", "x-third,close"),
            ("keep-alive", "timeout=5"),
            ("proxy-connection", "keep-alive"),
            ("proxy-authorization", "Basic x"),
            ("proxy", "http://evil.example"),
            ("te", "gzip"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "websocket"),
            ("trailer", "x-sum"),
            ("x-mine", "1"),
            ("x-mine", "2"),
            ("x-other", "3"),
            ("x-third", "4"),
            ("x-fourth", "5"),
        ];
        assert_eq!(upstream_sees(Version::HTTP_11, &sent), ["trailer: x-sum", "x-fourth: 5"]);
        let answered =
            [("connection", "close, x-mine"), ("keep-alive", "1"), ("x-mine", "1"), ("proxy-authenticate", "b")];
        assert_eq!(client_sees(200, &answered, None), Some(vec![]));
    }

    #[test]
    fn what_sidegate_answers_for_cannot_be_taken_away() {
        let named = "host, Content-Length, X-Forwarded-For, x-request-id, via, authorization";
        let sent = [
            ("connection", named),
            ("host", "a"),
            ("content-length", "1"),
            ("x-forwarded-for", "b"),
            ("x-request-id", "c"),
            ("via", "1.1 d"),
            ("authorization", "e"),
        ];
        // The credential is the client's own to withhold.
        let expected = ["content-length: 1", "host: a", "via: 1.1 d", "x-forwarded-for: b", "x-request-id: c"];
        assert_eq!(upstream_sees(Version::HTTP_11, &sent), expected);
    }

    #[test]
    fn an_upgrade_passes_in_one_form() {
        let upgrade = [("connection", "keep-alive, Upgrade"), ("upgrade", "WebSocket"), ("sec-websocket-key", "k")];
        let expected = ["connection: upgrade", "sec-websocket-key: k", "upgrade: WebSocket"];
        assert_eq!(upstream_sees(Version::HTTP_11, &upgrade), expected);
        assert_eq!(upstream_sees(Version::HTTP_10, &upgrade), ["sec-websocket-key: k"]);
    }

    #[test]
    fn an_upgrade_to_what_sidegate_must_see_is_ignored() {
        for protocol in ["h2c", "H2C", "HTTP/2.0", "TLS/1.0", "h2", "websocket, h2c", "", "a b"] {
            let sent = [("connection", "upgrade, http2-settings"), ("upgrade", protocol), ("http2-settings", "x")];
            assert_eq!(upstream_sees(Version::HTTP_11, &sent), [""; 0], "{protocol}");
        }
        let twice = [("connection", "upgrade"), ("upgrade", "websocket"), ("upgrade", "h2c")];
        assert_eq!(upstream_sees(Version::HTTP_11, &twice), [""; 0]);
        assert_eq!(upstream_sees(Version::HTTP_11, &[("upgrade", "websocket")]), [""; 0], "it must be named");
    }

    #[test]
    fn only_the_switch_that_was_asked_for_passes() {
        let switched = [("connection", "Upgrade"), ("upgrade", "websocket"), ("sec-websocket-accept", "x")];
        let passed = ["connection: upgrade", "sec-websocket-accept: x", "upgrade: websocket"].map(str::to_owned);
        assert_eq!(client_sees(101, &switched, Some("WebSocket")).as_deref(), Some(&passed[..]));
        assert_eq!(client_sees(101, &switched, None), None, "nobody asked");
        assert_eq!(client_sees(101, &switched, Some("spdy/3")), None, "another protocol");
        assert_eq!(client_sees(101, &[], Some("websocket")), None, "no protocol");
        assert_eq!(client_sees(101, &[], None), None);
        assert_eq!(client_sees(200, &switched, Some("websocket")), Some(vec!["sec-websocket-accept: x".to_owned()]));
        let advice = client_sees(426, &switched[..2], None);
        assert_eq!(advice, Some(vec!["connection: upgrade".to_owned(), "upgrade: websocket".to_owned()]));
    }

    #[test]
    fn trailers_stay_announced() {
        for te in ["trailers", "gzip;q=0.5, Trailers"] {
            assert_eq!(upstream_sees(Version::HTTP_11, &[("connection", "te"), ("te", te)]), ["te: trailers"]);
        }
        assert_eq!(upstream_sees(Version::HTTP_2, &[("te", "trailers")]), ["te: trailers"]);
        assert_eq!(upstream_sees(Version::HTTP_11, &[("te", "deflate")]), [""; 0]);
    }

    #[test]
    fn a_length_beside_a_coding_is_not_the_framing() {
        let both = [("content-length", "5"), ("transfer-encoding", "chunked")];
        assert_eq!(client_sees(200, &both, None), Some(vec![]));
        assert_eq!(client_sees(200, &both[..1], None), Some(vec!["content-length: 5".to_owned()]));
        assert_eq!(client_sees(200, &[("transfer-encoding", "gzip, chunked")], None), None);
        assert_eq!(client_sees(200, &[both[1], both[1]], None), None);
    }

    proptest! {
        #[test]
        fn nothing_of_the_connection_is_left(
            named in proptest::collection::vec("[a-zA-Z ,-]{0,20}|[!-~]{0,12}", 0..4),
            upgrade in "[a-z,/ ]{0,8}",
        ) {
            let mut headers = map(&[("host", "a"), ("te", "trailers"), ("upgrade", &upgrade), ("keep-alive", "1")]);
            for line in &named {
                headers.append(CONNECTION, HeaderValue::from_str(line).unwrap());
            }
            let survey = Survey::of(&headers);
            let offered = request(&mut headers, Version::HTTP_11, survey, &Guard::new());
            prop_assert!(headers.contains_key("host"));
            prop_assert!(!headers.contains_key("keep-alive"));
            prop_assert_eq!(headers.contains_key(CONNECTION), offered.is_some());
            prop_assert_eq!(headers.get(UPGRADE), offered.as_ref());
        }
    }
}
