//! Who the client is, and how the upstream is told.
//!
//! `X-Forwarded-For` is read right to left, from the nearest proxy outwards, for as long as the addresses
//! are of trusted proxies: the first one that is not is the client. What stands further left is whatever
//! that client wrote.

use std::net::IpAddr;

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{FORWARDED as FORWARDED_FIELD, HOST},
};

use super::survey::{FORWARDED, FORWARDED_FOR, Survey};
use crate::config::Networks;
use crate::message::{
    Connection,
    forwarded::{address, element, nearest_first, well_formed},
    headers::{X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO},
};

const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");

/// What is known of the client.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Client {
    /// `None` behind a Unix socket that says nothing, or without a [`Connection`].
    pub(super) ip: Option<IpAddr>,
    /// Whether the client itself speaks TLS.
    pub(super) https: bool,
}

/// Finds the client and sets the fields that tell the upstream of it. Without a [`Connection`] the peer is a
/// stranger without an address.
///
/// From a stranger nothing is believed: `X-Forwarded-For`, `-Proto` and `-Host` are set, `X-Real-IP` is
/// corrected where there is one, and `Forwarded` and other `X-Forwarded-*` are removed. To what a trusted
/// proxy sends its address is added.
pub(super) fn apply(
    headers: &mut HeaderMap,
    connection: Option<&Connection>,
    trusted: &Networks,
    survey: Survey,
) -> Client {
    let tls = connection.is_some_and(Connection::tls);
    let unknown = HeaderValue::from_static("unknown");
    let peer = connection.map_or(&unknown, Connection::forwarded_for);
    let ip = connection.and_then(|connection| connection.peer().ip());
    let proto = if tls { "https" } else { "http" };
    let host = headers.get(HOST).cloned();
    if !connection.is_some_and(|connection| trusted.holds(connection.peer())) {
        if survey.has(FORWARDED) {
            strip(headers, ip.map(|_| peer));
        }
        headers.insert(X_FORWARDED_FOR, peer.clone());
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(proto));
        match host {
            Some(host) => drop(headers.insert(X_FORWARDED_HOST, host)),
            None => drop(headers.remove(X_FORWARDED_HOST)),
        }
        return Client { ip, https: tls };
    }

    if survey.has(FORWARDED) && headers.contains_key(FORWARDED_FIELD) {
        let ours = element(ip, proto, host.as_ref().and_then(|host| host.to_str().ok()));
        let whole = headers.get_all(FORWARDED_FIELD).iter().all(|line| well_formed(line.as_bytes()));
        let before = headers.get_all(FORWARDED_FIELD).iter().filter(|_| whole);
        let joined = join(before, ours.as_bytes());
        headers.insert(FORWARDED_FIELD, joined);
    }
    if !survey.has(FORWARDED_FOR) {
        headers.insert(X_FORWARDED_FOR, peer.clone());
        headers.insert(X_FORWARDED_PROTO, HeaderValue::from_static(proto));
        if let Some(host) = host {
            headers.insert(X_FORWARDED_HOST, host);
        }
        return Client { ip, https: tls };
    }
    let mut client = ip;
    for element in nearest_first(headers.get_all(X_FORWARDED_FOR).iter().map(HeaderValue::as_bytes)) {
        // What cannot be read ends the way back: the last proxy that was believed counts as the client.
        let Some(found) = address(element) else { break };
        client = Some(found);
        if !trusted.contains(found) {
            break;
        }
    }
    // A Unix socket is no hop with an address, which would only hide the one before it.
    if ip.is_some() || !headers.contains_key(X_FORWARDED_FOR) {
        let joined = join(headers.get_all(X_FORWARDED_FOR).iter(), peer.as_bytes());
        headers.insert(X_FORWARDED_FOR, joined);
    }
    let said: Vec<_> = headers.get_all(X_FORWARDED_PROTO).iter().take(2).collect();
    let https = match *said {
        [] => tls,
        [said] => [&b"https"[..], b"wss"].iter().any(|tls| said.as_bytes().eq_ignore_ascii_case(tls)),
        _ => false,
    };
    headers.entry(X_FORWARDED_PROTO).or_insert(HeaderValue::from_static(proto));
    if let Some(host) = host {
        headers.entry(X_FORWARDED_HOST).or_insert(host);
    }
    Client { ip: client, https }
}

/// Removes what a stranger says of the way its request came; `X-Real-IP` becomes the truth, where there is one.
fn strip(headers: &mut HeaderMap, peer: Option<&HeaderValue>) {
    headers.remove(FORWARDED_FIELD);
    if let Some(peer) = peer
        && headers.contains_key(X_REAL_IP)
    {
        headers.insert(X_REAL_IP, peer.clone());
    } else {
        headers.remove(X_REAL_IP);
    }
    let others: Vec<HeaderName> =
        headers.keys().filter(|name| name.as_str().starts_with("x-forwarded-")).cloned().collect();
    for name in others {
        headers.remove(name);
    }
}

/// One line of all: many a backend looks at the last line only.
fn join<'a>(lines: impl Iterator<Item = &'a HeaderValue>, last: &[u8]) -> HeaderValue {
    let mut joined = Vec::new();
    for line in lines.filter(|line| !line.as_bytes().trim_ascii().is_empty()) {
        joined.extend_from_slice(line.as_bytes());
        joined.extend_from_slice(b", ");
    }
    joined.extend_from_slice(last);
    HeaderValue::from_maybe_shared(Bytes::from(joined)).expect("what is joined of values is a value")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::Peer;

    fn trusting(list: &str) -> Networks {
        serde_json::from_str(list).unwrap_or_else(|error| panic!("{list}: {error}"))
    }

    fn tcp(peer: &str) -> Connection {
        let address = format!("{peer}:4711");
        let bracketed = format!("[{peer}]:4711");
        Connection::new(Peer::tcp(address.parse().or_else(|_| bracketed.parse()).unwrap()), false)
    }

    /// The client, and the fields that the upstream sees, of a request for `a.example`.
    fn seen<'a>(
        trusted: &str,
        peer: impl Into<Option<&'a Connection>>,
        fields: &[(&str, &str)],
    ) -> (Client, Vec<String>) {
        let field = |(name, value): &(&str, &str)| {
            (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_str(value).unwrap())
        };
        let mut headers: HeaderMap = fields.iter().chain(&[("host", "a.example")]).map(field).collect();
        let survey = Survey::of(&headers);
        let client = apply(&mut headers, peer.into(), &trusting(trusted), survey);
        headers.remove(HOST);
        let text = |(name, value): (&HeaderName, &HeaderValue)| {
            format!("{}: {}", name.as_str().trim_start_matches("x-forwarded-"), value.to_str().unwrap())
        };
        let mut all: Vec<_> = headers.iter().map(text).collect();
        all.sort_unstable();
        (client, all)
    }

    /// The client and `X-Forwarded-For`.
    fn walked(trusted: &str, peer: &str, list: &str) -> (String, String) {
        let fields = [("x-forwarded-for", list)];
        let (client, fields) = seen(trusted, &tcp(peer), if list.is_empty() { &[] } else { &fields });
        let list = fields.iter().find_map(|field| field.strip_prefix("for: ")).unwrap().to_owned();
        (client.ip.unwrap().to_string(), list)
    }

    /// The worked examples of Envoy's documentation of `x-forwarded-for`, with networks for hop counts.
    #[test]
    fn envoys_examples_hold() {
        let outside = "203.0.113.128, 203.0.113.10, 203.0.113.1";
        let through_edge = "203.0.113.128, 203.0.113.10, 203.0.113.1, 192.0.2.5";
        let cases = [
            // An edge without a trusted proxy before it.
            ("[]", "192.0.2.5", outside, "192.0.2.5", "192.0.2.5"),
            // An inner proxy that trusts that edge.
            (r#"["10.0.0.0/8"]"#, "10.11.12.13", through_edge, "192.0.2.5", "+10.11.12.13"),
            // An edge behind two trusted proxies.
            (r#"["192.0.2.5", "203.0.113.1"]"#, "192.0.2.5", outside, "203.0.113.10", "+192.0.2.5"),
            // An inner proxy that trusts that edge and what it trusts.
            (r#"["private", "192.0.2.5", "203.0.113.1"]"#, "10.11.12.13", through_edge, "203.0.113.10", "+10.11.12.13"),
            // A request that begins inside.
            (r#"["10.0.0.0/8"]"#, "10.20.30.40", "", "10.20.30.40", "10.20.30.40"),
            // The same, through another inner proxy.
            (r#"["10.20.30.50"]"#, "10.20.30.50", "10.20.30.40", "10.20.30.40", "+10.20.30.50"),
        ];
        for (trusted, peer, list, client, forwarded) in cases {
            let expected = match forwarded.strip_prefix('+') {
                Some(added) => format!("{list}, {added}"),
                None => forwarded.to_owned(),
            };
            assert_eq!(walked(trusted, peer, list), (client.to_owned(), expected), "{trusted} {peer} {list}");
        }
    }

    #[test]
    fn the_walk_ends_at_what_cannot_be_read() {
        let client = |list: &str| walked("\"private\"", "10.0.0.1", list).0;
        assert_eq!(client("203.0.113.9, 10.0.0.3, 10.0.0.2"), "203.0.113.9");
        assert_eq!(client("203.0.113.9, nonsense, 10.0.0.2"), "10.0.0.2");
        assert_eq!(client("203.0.113.9, unknown"), "10.0.0.1");
        assert_eq!(client("10.0.0.3,, ,10.0.0.2,"), "10.0.0.3", "all are trusted: the farthest");
        assert_eq!(client("[2001:db8::1]:443, 192.168.0.1:80"), "2001:db8::1");
        assert_eq!(client("2001:db8::1, fe80::1%eth0, ::ffff:10.0.0.9"), "2001:db8::1");
        assert_eq!(client("::ffff:203.0.113.9"), "203.0.113.9");
        assert_eq!(walked("\"private\"", "::ffff:10.0.0.1", "203.0.113.9").0, "203.0.113.9");
    }

    #[test]
    fn a_strangers_word_is_replaced() {
        let lies = [
            ("x-forwarded-for", "1.1.1.1"),
            ("x-forwarded-for", "2.2.2.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "evil.example"),
            ("x-forwarded-port", "1"),
            ("x-forwarded-prefix", "/x"),
            ("x-real-ip", "1.1.1.1"),
            ("forwarded", "for=1.1.1.1"),
            ("x-other", "stays"),
        ];
        let (client, fields) = seen("[\"10.0.0.1\"]", &tcp("2001:db8::1"), &lies);
        assert_eq!(client, Client { ip: "2001:db8::1".parse().ok(), https: false });
        let expected =
            ["for: 2001:db8::1", "host: a.example", "proto: http", "x-other: stays", "x-real-ip: 2001:db8::1"];
        assert_eq!(fields, expected);
        let (client, fields) = seen("\"private\"", None, &lies[..8]);
        assert_eq!(client, Client { ip: None, https: false }, "without a connection nobody is trusted");
        assert_eq!(fields, ["for: unknown", "host: a.example", "proto: http"]);
    }

    #[test]
    fn a_trusted_proxys_word_is_added_to() {
        let said = [
            ("x-forwarded-for", "203.0.113.9"),
            ("x-forwarded-for", "10.0.0.2"),
            ("x-forwarded-proto", "https"),
            ("x-forwarded-host", "public.example"),
            ("x-forwarded-port", "443"),
            ("x-real-ip", "203.0.113.9"),
            ("forwarded", "for=203.0.113.9;proto=https"),
            ("forwarded", "for=10.0.0.2"),
        ];
        let (client, fields) = seen("\"private\"", &tcp("fd00::1"), &said);
        assert_eq!(client, Client { ip: "203.0.113.9".parse().ok(), https: true });
        let expected = [
            "for: 203.0.113.9, 10.0.0.2, fd00::1",
            "forwarded: for=203.0.113.9;proto=https, for=10.0.0.2, for=\"[fd00::1]\";proto=http;host=a.example",
            "host: public.example",
            "port: 443",
            "proto: https",
            "x-real-ip: 203.0.113.9",
        ];
        assert_eq!(fields, expected);
    }

    #[test]
    fn what_a_trusted_proxy_leaves_out_is_set() {
        let (client, fields) = seen("\"private\"", &tcp("10.0.0.1"), &[]);
        assert_eq!(client, Client { ip: "10.0.0.1".parse().ok(), https: false });
        assert_eq!(fields, ["for: 10.0.0.1", "host: a.example", "proto: http"]);
        let (_, fields) = seen("\"private\"", &tcp("10.0.0.1"), &[("x-forwarded-proto", "https")]);
        assert_eq!(fields, ["for: 10.0.0.1", "host: a.example", "proto: https"]);
        let (_, fields) = seen("\"private\"", &tcp("10.0.0.1"), &[("forwarded", "for=\"open")]);
        assert_eq!(fields[1], "forwarded: for=10.0.0.1;proto=http;host=a.example", "an open quote would swallow it");
    }

    #[test]
    fn a_local_process_is_trusted_with_private_only() {
        let unix = Connection::new(Peer::Unix, false);
        let said = [("x-forwarded-for", "203.0.113.9")];
        let (client, fields) = seen("\"private\"", &unix, &said);
        assert_eq!(client.ip, "203.0.113.9".parse().ok());
        assert_eq!(fields[0], "for: 203.0.113.9");
        let (client, fields) = seen("\"private\"", &unix, &[("x-forwarded-proto", "https")]);
        assert_eq!((client.ip, client.https, &*fields[0]), (None, true, "for: unknown"));
        let (client, fields) = seen("[\"0.0.0.0/0\", \"::/0\"]", &unix, &said);
        assert_eq!((client.ip, &*fields[0]), (None, "for: unknown"));
    }

    #[test]
    fn the_scheme_is_that_of_the_client() {
        let https = |tls: bool, protos: &[&str]| {
            let connection = Connection::new(Peer::tcp(([10, 0, 0, 1], 1).into()), tls);
            let fields: Vec<_> = protos.iter().map(|proto| ("x-forwarded-proto", *proto)).collect();
            seen("\"private\"", &connection, &fields).0.https
        };
        assert!(https(true, &[]) && https(false, &["https"]) && https(false, &["HTTPS"]) && https(false, &["wss"]));
        assert!(!https(false, &[]) && !https(true, &["http"]) && !https(false, &["https", "http"]));
        assert!(!https(false, &["https, http"]));
    }

    #[test]
    fn trusted_proxies_are_read_and_refused_with_a_remedy() {
        let trusted = trusting(r#"["2001:db8::/32", "192.0.2.1", "private"]"#);
        for (ip, expected) in [
            ("2001:db8::1", true),
            ("192.0.2.1", true),
            ("::ffff:192.0.2.1", true),
            ("192.0.2.2", false),
            ("127.0.0.1", true),
            ("172.31.0.1", true),
            ("172.32.0.1", false),
            ("169.254.1.1", true),
            ("fd12::1", true),
            ("fe80::1", true),
            ("::1", true),
            ("100.64.0.1", false),
        ] {
            assert_eq!(trusted.contains(ip.parse().unwrap()), expected, "{ip}");
        }
        assert_eq!(serde_json::to_string(&trusted).unwrap(), r#"["private","2001:db8::/32","192.0.2.1/32"]"#);
        let error = serde_json::from_str::<Networks>(r#"["10.0.0.0/33"]"#).unwrap_err().to_string();
        assert!(error.starts_with("`10.0.0.0/33` is no address, no network like `10.0.0.0/8`"), "{error}");
        let error = serde_json::from_str::<Networks>("true").unwrap_err().to_string();
        assert!(error.contains("expected `private`, or a list"), "{error}");
    }

    proptest! {
        #[test]
        fn the_client_is_a_stranger_or_the_farthest(
            list in proptest::collection::vec("10\\.0\\.0\\.[1-9]|192\\.0\\.2\\.[1-9]|x||\u{20}", 0..6),
        ) {
            let list = list.join(",");
            let (client, forwarded) = walked("[\"10.0.0.0/8\"]", "10.0.0.1", &list);
            prop_assert!(forwarded.ends_with("10.0.0.1"));
            let stranger = list.rsplit(',').map(str::trim).find(|one| !one.is_empty() && !one.starts_with("10."));
            match stranger {
                Some(stranger) if stranger != "x" => prop_assert_eq!(client, stranger),
                _ => prop_assert!(client.starts_with("10.0.0.")),
            }
        }

        #[test]
        fn nothing_from_a_stranger_survives(value in "[ -~]{0,30}", name in "for|proto|host|port|x") {
            let name = format!("x-forwarded-{name}");
            let (client, fields) = seen("\"private\"", &tcp("192.0.2.1"), &[(&name, value.trim())]);
            prop_assert_eq!(client.ip, "192.0.2.1".parse().ok());
            prop_assert_eq!(fields, ["for: 192.0.2.1", "host: a.example", "proto: http"]);
        }
    }
}
