//! `X-Forwarded-For` elements and RFC 7239 `Forwarded` elements: read and written, nothing trusted.
//!
//! Every function is total: any bytes are an answer, never a panic. Who may be believed is the business of
//! `layers::hygiene`.

use std::{
    net::{IpAddr, SocketAddr},
    str,
};

/// The address in one element of `X-Forwarded-For`, or in a `for=` of `Forwarded`.
///
/// There is no standard for the former, so what proxies write is taken: an address alone, with a port, in
/// brackets, in quotes, or with a zone, which is dropped: it means nothing on another machine. An
/// IPv4-mapped address is folded to IPv4. `None` for `unknown`, an obfuscated name, or anything else.
///
/// ```
/// use sidegate::message::forwarded::address;
///
/// assert_eq!(address(b" 192.0.2.1:4711 "), Some([192, 0, 2, 1].into()));
/// assert_eq!(address(b"\"[2001:db8::1%eth0]:80\""), address(b"2001:db8::1"));
/// assert_eq!(address(b"_hidden"), None);
/// ```
#[must_use]
pub fn address(element: &[u8]) -> Option<IpAddr> {
    let text = str::from_utf8(element).ok()?.trim_matches([' ', '\t']);
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    let found = if let Some(rest) = text.strip_prefix('[') {
        let (inner, port) = rest.split_once(']')?;
        if !(port.is_empty() || port.strip_prefix(':').is_some_and(is_port)) {
            return None;
        }
        IpAddr::V6(without_zone(inner)?.parse().ok()?)
    } else if let Ok(ip) = text.parse() {
        ip
    } else if let Ok(SocketAddr::V4(with_port)) = text.parse() {
        IpAddr::V4(*with_port.ip())
    } else {
        IpAddr::V6(without_zone(text)?.parse().ok()?)
    };
    Some(found.to_canonical())
}

fn without_zone(text: &str) -> Option<&str> {
    match text.split_once('%') {
        None => Some(text),
        Some((_, "")) => None,
        Some((ip, _)) => Some(ip),
    }
}

fn is_port(text: &str) -> bool {
    (1..=5).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit())
}

/// The elements of the `X-Forwarded-For` lines of a request, nearest proxy first: the last element of the
/// last line leads. Empty elements are left out, as in any list (RFC 9110 §5.6.1.2).
pub fn nearest_first<'a, L>(lines: L) -> impl Iterator<Item = &'a [u8]>
where
    L: DoubleEndedIterator<Item = &'a [u8]>,
{
    lines.rev().flat_map(|line| line.rsplit(|&byte| byte == b',')).filter(|element| !element.trim_ascii().is_empty())
}

/// Writes one element of `Forwarded`: the hop that a request came from, the scheme and the host it asked for.
///
/// `None` for the address is written as `unknown` (RFC 7239 §6.2); a host that cannot stand in a
/// quoted string is left out.
///
/// ```
/// use sidegate::message::forwarded::element;
///
/// let ip = "2001:db8::1".parse().ok();
/// assert_eq!(element(ip, "https", Some("a.example:8443")), r#"for="[2001:db8::1]";proto=https;host="a.example:8443""#);
/// assert_eq!(element(None, "http", None), "for=unknown;proto=http");
/// ```
#[must_use]
pub fn element(client: Option<IpAddr>, proto: &str, host: Option<&str>) -> String {
    let mut text = match client {
        None => "for=unknown".to_owned(),
        Some(IpAddr::V4(ip)) => format!("for={ip}"),
        // Only IPv6 needs the quotes: neither brackets nor colons are token characters (RFC 7239 §4).
        Some(IpAddr::V6(ip)) => format!("for=\"[{ip}]\""),
    };
    text.push_str(";proto=");
    text.push_str(proto);
    match host {
        Some(host) if !host.is_empty() && host.bytes().all(is_token) => {
            text.push_str(";host=");
            text.push_str(host);
        }
        // What a quoted string holds without an escape (RFC 9110 §5.6.4).
        Some(host) if !host.is_empty() && host.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\') => {
            text.push_str(";host=\"");
            text.push_str(host);
            text.push('"');
        }
        Some(_) | None => {}
    }
    text
}

/// Whether a `Forwarded` line is a list of elements as RFC 7239 §4 has them.
///
/// Asked before an element is appended: an open quote at the end of an inbound line would swallow it.
///
/// ```
/// use sidegate::message::forwarded::well_formed;
///
/// assert!(well_formed(br#"for=192.0.2.43, for="[2001:db8::1]:80";proto=http"#));
/// assert!(!well_formed(br#"for="192.0.2.43"#));
/// ```
#[must_use]
pub fn well_formed(line: &[u8]) -> bool {
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        match pair(rest) {
            Some(after) => rest = after,
            // An element, or a pair in one, may be empty.
            None if matches!(rest.first(), None | Some(b',' | b';')) => {}
            None => return false,
        }
        rest = rest.trim_ascii_start();
        match rest.split_first() {
            None => return true,
            Some((b',' | b';', after)) => rest = after,
            Some(_) => return false,
        }
    }
}

/// What follows a `token=value` at the start of `text`.
fn pair(text: &[u8]) -> Option<&[u8]> {
    let rest = token(text)?.strip_prefix(b"=")?;
    let Some(mut rest) = rest.strip_prefix(b"\"") else { return token(rest) };
    loop {
        match rest {
            [b'"', after @ ..] => return Some(after),
            [b'\\', b'\t' | b' '..=b'~' | 0x80.., after @ ..] => rest = after,
            [b'\\', ..] | [] => return None,
            [b'\t' | b' '..=b'~' | 0x80.., after @ ..] => rest = after,
            _ => return None,
        }
    }
}

/// What follows a token of at least one character.
fn token(text: &[u8]) -> Option<&[u8]> {
    match text.iter().position(|&byte| !is_token(byte)).unwrap_or(text.len()) {
        0 => None,
        end => text.get(end..),
    }
}

/// RFC 9110 §5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_read_as_proxies_write_them() {
        let v4 = Some(IpAddr::from([192, 0, 2, 1]));
        let v6 = Some("2001:db8::1".parse::<IpAddr>().unwrap());
        let cases: [(&str, Option<IpAddr>); 26] = [
            ("192.0.2.1", v4),
            (" \t192.0.2.1 ", v4),
            ("192.0.2.1:80", v4),
            ("\"192.0.2.1:80\"", v4),
            ("::ffff:192.0.2.1", v4),
            ("[::ffff:192.0.2.1]:443", v4),
            ("2001:db8::1", v6),
            ("2001:DB8:0::1", v6),
            ("[2001:db8::1]", v6),
            ("[2001:db8::1]:4711", v6),
            ("\"[2001:db8::1]:4711\"", v6),
            ("2001:db8::1%eth0", v6),
            ("[2001:db8::1%25eth0]:80", v6),
            ("", None),
            ("unknown", None),
            ("_gazonk", None),
            ("192.0.2", None),
            ("192.0.2.256", None),
            ("192.0.2.1:99999", None),
            ("192.0.2.1 evil", None),
            ("[2001:db8::1", None),
            ("[2001:db8::1]x", None),
            ("[2001:db8::1]:", None),
            ("[192.0.2.1]", None),
            ("2001:db8::1%", None),
            ("01.2.3.4", None),
        ];
        for (text, expected) in cases {
            assert_eq!(address(text.as_bytes()), expected, "{text:?}");
        }
        assert_eq!(address(b"\xff192.0.2.1"), None);
    }

    #[test]
    fn the_last_element_of_the_last_line_is_nearest() {
        let lines: [&[u8]; 3] = [b"a, b", b"", b"c ,, d,"];
        let found: Vec<_> = nearest_first(lines.into_iter()).map(<[u8]>::trim_ascii).collect();
        assert_eq!(found, [b"d", b"c", b"b", b"a"]);
    }

    #[test]
    fn what_could_swallow_the_next_element_is_not_well_formed() {
        for good in ["", "for=_x", "for=a;by=b;host=c", "for=\"a, b;\\\"\" , For=b", ";;,,", "for=\"\"", "a=b;"] {
            assert!(well_formed(good.as_bytes()), "{good:?}");
        }
        for bad in ["for", "for=", "=a", "for=a b", "for=\"a", "for=\"a\\", "for=\"a\"b", "for=[::1]", "for = a"] {
            assert!(!well_formed(bad.as_bytes()), "{bad:?}");
        }
    }

    #[test]
    fn a_host_that_would_break_the_quotes_is_left_out() {
        assert_eq!(element(None, "http", Some("a\"b")), "for=unknown;proto=http");
        assert_eq!(element(None, "http", Some("a b")), "for=unknown;proto=http");
        assert_eq!(element(None, "http", Some("[::1]")), "for=unknown;proto=http;host=\"[::1]\"");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes: Vec<u8>) {
            let _read = (address(&bytes), well_formed(&bytes));
            let elements: Vec<_> = nearest_first([&*bytes, &*bytes].into_iter()).collect();
            prop_assert!(elements.iter().all(|element| !element.contains(&b',')));
        }

        #[test]
        fn an_address_survives_being_written(ip: IpAddr, port: u16) {
            let expected = Some(ip.to_canonical());
            prop_assert_eq!(address(ip.to_string().as_bytes()), expected);
            prop_assert_eq!(address(SocketAddr::new(ip, port).to_string().as_bytes()), expected);
            let written = element(Some(ip), "https", None);
            let value = written.strip_prefix("for=").and_then(|rest| rest.strip_suffix(";proto=https")).unwrap();
            prop_assert_eq!(address(value.as_bytes()), expected);
        }

        #[test]
        fn what_is_written_is_well_formed(ip: Option<IpAddr>, host: Option<String>) {
            prop_assert!(well_formed(element(ip, "http", host.as_deref()).as_bytes()));
        }

        #[test]
        fn a_line_that_would_swallow_an_element_is_not_well_formed(line in "[a=;,\"\\\\]{0,10}") {
            // What is appended has no quote that could close one, so it mends nothing.
            let joined = format!("{line}, for=x");
            prop_assert_eq!(well_formed(line.as_bytes()), well_formed(joined.as_bytes()));
        }

        #[test]
        fn lists_are_well_formed(line in "(a=b|a=\"[ ,;=b]{0,3}\"|a=\"\\\\\"\"|)([;,] ?(a=b|c=\"d\")){0,3}") {
            prop_assert!(well_formed(line.as_bytes()));
        }
    }
}
