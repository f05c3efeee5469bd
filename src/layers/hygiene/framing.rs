//! What a request must be like to be read in one way only.
//!
//! hyper refuses much of this before a layer sees it, and answers without a body; it is looked at again
//! because it costs next to nothing and other servers are not hyper. What hyper 1.12 lets through:
//! `Transfer-Encoding: gzip, chunked`, repeated codings, more than one `Host` or none, any byte in a `Host`,
//! an authority beside a different `Host`, `CONNECT`.

use std::net::Ipv6Addr;

use http::{
    HeaderMap, HeaderValue, Method, Request, Version,
    header::{CONTENT_LENGTH, HOST, TRANSFER_ENCODING},
};
use hyper::ext::Protocol;

use super::{Limits, survey::Survey};
use crate::message::{Kind, path::is_unreserved};

/// Refuses what is too large, or can be read in more than one way.
pub(super) fn check<B>(request: &Request<B>, survey: Survey, limits: &Limits) -> Result<(), Kind> {
    let target = request.uri();
    let target_bytes = target.path_and_query().map_or(0, |path| path.as_str().len())
        + target.authority().map_or(0, |authority| authority.as_str().len());
    if target_bytes as u64 > limits.uri_bytes {
        return Err(Kind::UriTooLong);
    }
    if request.headers().len() > limits.headers || survey.bytes as u64 > limits.header_bytes {
        return Err(Kind::HeadersTooLarge);
    }
    if *request.method() == Method::CONNECT {
        // Extended CONNECT (RFC 8441) asks for an upgrade of one stream; a plain one for a forward proxy.
        if request.extensions().get::<Protocol>().is_none() {
            return Err(Kind::BadRequest("CONNECT is not supported"));
        }
    } else if request.extensions().get::<Protocol>().is_some() {
        return Err(Kind::BadRequest("only CONNECT can carry :protocol"));
    }
    let path = target.path();
    if !(path.starts_with('/') || path == "*" && *request.method() == Method::OPTIONS) {
        return Err(Kind::BadRequest("the request target is not a path"));
    }
    lengths(request.headers(), survey)
}

/// RFC 9112 §6.3: one length, and not beside a transfer coding.
fn lengths(headers: &HeaderMap, survey: Survey) -> Result<(), Kind> {
    if survey.codings > 0 {
        if survey.lengths > 0 {
            return Err(Kind::BadRequest("Transfer-Encoding and Content-Length exclude each other"));
        }
        let coding = headers.get(TRANSFER_ENCODING).map_or(&b""[..], HeaderValue::as_bytes);
        // One that sidegate does not undo would reach the upstream as part of the body.
        if survey.codings > 1 || !coding.trim_ascii().eq_ignore_ascii_case(b"chunked") {
            return Err(Kind::BadRequest("the only Transfer-Encoding of a request is chunked"));
        }
    }
    if survey.lengths > 1 {
        return Err(Kind::BadRequest("more than one Content-Length"));
    }
    if survey.lengths == 1 && !headers.get(CONTENT_LENGTH).is_some_and(is_length) {
        return Err(Kind::BadRequest("Content-Length is not a number"));
    }
    Ok(())
}

/// Digits alone: `u64`'s parser would take a sign.
fn is_length(value: &HeaderValue) -> bool {
    value.as_bytes().iter().all(u8::is_ascii_digit) && value.to_str().is_ok_and(|text| text.parse::<u64>().is_ok())
}

/// Makes the host that the request asks for its `Host` field, whatever the version: that is all that layers
/// further in look at.
///
/// In HTTP/1 the authority of an absolute target replaces `Host` (RFC 9112 §3.2.2); in HTTP/2 the two must
/// not differ (RFC 9113 §8.3.1). Only a request in HTTP/1.0 may go without.
pub(super) fn set_host<B>(request: &mut Request<B>, survey: Survey) -> Result<(), Kind> {
    if survey.hosts > 1 {
        return Err(Kind::BadRequest("more than one Host"));
    }
    let sent = request.headers().get(HOST);
    let Some(authority) = request.uri().authority() else {
        return match sent {
            Some(host) if is_host(host.as_bytes()) => Ok(()),
            Some(_) => Err(Kind::BadRequest("Host is not a host name or address")),
            None if request.version() < Version::HTTP_11 => Ok(()),
            None => Err(Kind::BadRequest("Host is missing")),
        };
    };
    if !is_host(authority.as_str().as_bytes()) {
        return Err(Kind::BadRequest("the authority of the target is not a host name or address"));
    }
    match sent {
        Some(host) if authority.as_str().as_bytes().eq_ignore_ascii_case(host.as_bytes()) => return Ok(()),
        Some(_) if request.version() >= Version::HTTP_2 => {
            return Err(Kind::BadRequest("Host and :authority differ"));
        }
        None if request.version() == Version::HTTP_11 => return Err(Kind::BadRequest("Host is missing")),
        Some(_) | None => {}
    }
    let host = HeaderValue::from_str(authority.as_str()).expect("an authority is visible ASCII");
    request.headers_mut().insert(HOST, host);
    Ok(())
}

/// `name[:port]`, where the name is an address or made of unreserved characters (RFC 3986 §2.3). The
/// grammar of a registered name allows more, all of it good for nothing but to be read in two ways.
fn is_host(text: &[u8]) -> bool {
    let port = if let [b'[', rest @ ..] = text {
        let Some(end) = rest.iter().position(|&byte| byte == b']') else { return false };
        let (address, rest) = rest.split_at(end);
        if !std::str::from_utf8(address).is_ok_and(|address| address.parse::<Ipv6Addr>().is_ok()) {
            return false;
        }
        rest.get(1..).unwrap_or_default()
    } else {
        let end = text.iter().position(|&byte| !is_unreserved(byte)).unwrap_or(text.len());
        let (name, rest) = text.split_at(end);
        if name.is_empty() {
            return false;
        }
        rest
    };
    match port {
        [] | [b':'] => true,
        [b':', digits @ ..] => {
            let text = std::str::from_utf8(digits).unwrap_or_default();
            digits.iter().all(u8::is_ascii_digit) && text.parse::<u16>().is_ok()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// What becomes of a request: its `Host`, or why it is refused.
    fn outcome(version: Version, method: &str, uri: &str, fields: &[(&str, &str)]) -> Result<String, &'static str> {
        let mut request = Request::builder().version(version).method(method).uri(uri);
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let mut request = request.body(()).unwrap();
        let survey = Survey::of(request.headers());
        check(&request, survey, &Limits::default())
            .and_then(|()| set_host(&mut request, survey))
            .map(|()| request.headers().get(HOST).map_or_else(String::new, |host| host.to_str().unwrap().to_owned()))
            .map_err(Kind::detail)
    }

    #[test]
    fn a_request_has_one_framing() {
        let framed = |fields: &[(&str, &str)]| {
            let fields: Vec<_> = [("host", "a")].iter().chain(fields).copied().collect();
            outcome(Version::HTTP_11, "POST", "/", &fields).map(drop)
        };
        assert_eq!(framed(&[]), Ok(()));
        assert_eq!(framed(&[("content-length", "0")]), Ok(()));
        assert_eq!(framed(&[("content-length", "18446744073709551615")]), Ok(()));
        assert_eq!(framed(&[("transfer-encoding", "Chunked")]), Ok(()));
        let both = Err("Transfer-Encoding and Content-Length exclude each other");
        assert_eq!(framed(&[("transfer-encoding", "chunked"), ("content-length", "5")]), both);
        assert_eq!(framed(&[("content-length", "5"), ("transfer-encoding", "xchunked")]), both);
        for coding in
            ["gzip, chunked", "chunked, chunked", "chunked, identity", "xchunked", "identity", "", "\"chunked\""]
        {
            let only = Err("the only Transfer-Encoding of a request is chunked");
            assert_eq!(framed(&[("transfer-encoding", coding)]), only, "{coding}");
        }
        let twice = framed(&[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]);
        assert_eq!(twice, Err("the only Transfer-Encoding of a request is chunked"));
        for length in ["+5", "-5", "5, 5", "5,6", "0x5", "", "5 5", "18446744073709551616"] {
            assert_eq!(framed(&[("content-length", length)]), Err("Content-Length is not a number"), "{length}");
        }
        let lengths = framed(&[("content-length", "5"), ("content-length", "5")]);
        assert_eq!(lengths, Err("more than one Content-Length"));
    }

    #[test]
    fn a_request_asks_for_one_host() {
        let v11 = |fields: &[_]| outcome(Version::HTTP_11, "GET", "/", fields);
        assert_eq!(v11(&[("host", "a.example:80")]).as_deref(), Ok("a.example:80"));
        assert_eq!(v11(&[]), Err("Host is missing"));
        assert_eq!(v11(&[("host", "a"), ("host", "a")]), Err("more than one Host"));
        assert_eq!(outcome(Version::HTTP_10, "GET", "/", &[]).as_deref(), Ok(""));
        assert_eq!(outcome(Version::HTTP_2, "GET", "/", &[]), Err("Host is missing"));
        assert_eq!(outcome(Version::HTTP_2, "GET", "https://a.example/", &[]).as_deref(), Ok("a.example"));
        let differing = outcome(Version::HTTP_2, "GET", "https://a/", &[("host", "b")]);
        assert_eq!(differing, Err("Host and :authority differ"));
        assert_eq!(outcome(Version::HTTP_2, "GET", "https://a/", &[("host", "A")]).as_deref(), Ok("A"));
    }

    #[test]
    fn the_authority_of_an_absolute_target_counts() {
        let v11 = |uri, fields: &[_]| outcome(Version::HTTP_11, "GET", uri, fields);
        assert_eq!(v11("http://a.example/x", &[("host", "b.example")]).as_deref(), Ok("a.example"));
        assert_eq!(v11("http://a.example/x", &[]), Err("Host is missing"));
        let userinfo = v11("http://me:pw@a.example/x", &[("host", "a.example")]);
        assert_eq!(userinfo, Err("the authority of the target is not a host name or address"));
    }

    #[test]
    fn the_target_is_a_path() {
        let v11 = |method, uri| outcome(Version::HTTP_11, method, uri, &[("host", "a")]).map(drop);
        assert_eq!(v11("OPTIONS", "*"), Ok(()));
        assert_eq!(v11("GET", "*"), Err("the request target is not a path"));
        assert_eq!(v11("GET", "a.example:80"), Err("the request target is not a path"));
        assert_eq!(v11("CONNECT", "a.example:80"), Err("CONNECT is not supported"));
        assert_eq!(v11("BREW", "/pot?x"), Ok(()));
    }

    #[test]
    fn an_extended_connect_is_a_request_like_others() {
        let request = |method: &str| {
            let builder = Request::builder().version(Version::HTTP_2).method(method).uri("https://a.example/chat");
            builder.extension(Protocol::from_static("websocket")).body(()).unwrap()
        };
        let checked = |request| check(&request, Survey::default(), &Limits::default());
        assert_eq!(checked(request("CONNECT")), Ok(()));
        assert_eq!(checked(request("GET")), Err(Kind::BadRequest("only CONNECT can carry :protocol")));
    }

    #[test]
    fn what_is_too_large_is_refused_by_its_name() {
        let limits = Limits { headers: 2, header_bytes: 40, uri_bytes: 10 };
        let checked = |uri: &str, fields: &[(&str, &str)]| {
            let mut request = Request::builder().uri(uri);
            for (name, value) in fields {
                request = request.header(*name, *value);
            }
            let request = request.body(()).unwrap();
            check(&request, Survey::of(request.headers()), &limits)
        };
        assert_eq!(checked("/345678910", &[("host", "a"), ("x", "0123456789012345678901")]), Ok(()));
        assert_eq!(checked("/3456789?11", &[("host", "a")]), Err(Kind::UriTooLong));
        assert_eq!(checked("/", &[("a", ""), ("b", ""), ("a", "")]), Err(Kind::HeadersTooLarge));
        let long = checked("/", &[("host", "a"), ("x", "012345678901234567890123456")]);
        assert_eq!(long, Err(Kind::HeadersTooLarge), "name, value and four more for each");
    }

    #[test]
    fn a_host_is_a_name_or_an_address() {
        let good =
            ["a", "A-1.example_x~", "a:", "a:0", "a:65535", "127.0.0.1:80", "[::1]", "[2001:db8::1]:443", "[::1]:"];
        for host in good {
            assert!(is_host(host.as_bytes()), "{host}");
        }
        let bad = [
            "",
            ":80",
            "a b",
            " a",
            "a/b",
            "a@b",
            "me:pw@a",
            "a:80:80",
            "a:65536",
            "a:+80",
            "a:8x",
            "a,b",
            "a;b",
            "a%41",
            "a\\b",
            "a?b",
            "a#b",
            "::1",
            "[::1",
            "[::1]80",
            "[]",
            "[a]",
            "[::1%25eth0]",
            "[v1.a]",
            "é",
            "a\0",
        ];
        for host in bad {
            assert!(!is_host(host.as_bytes()), "{host}");
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_host_or_not(host: Vec<u8>) {
            if is_host(&host) {
                let text = std::str::from_utf8(&host).unwrap();
                prop_assert!(text.parse::<http::uri::Authority>().is_ok());
                prop_assert!(!text.contains(['@', '/', ' ', ',']));
            }
        }

        #[test]
        fn any_value_is_a_length_or_not(value in "[0-9+ ,-]{0,24}") {
            let value = HeaderValue::from_str(&value).unwrap();
            prop_assert_eq!(is_length(&value), value.to_str().unwrap().parse::<u64>().is_ok() && !value.as_bytes().starts_with(b"+"));
        }
    }
}
