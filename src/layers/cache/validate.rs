//! Conditional requests, of the client to the cache and of the cache to the upstream, and what is kept of an answer
//! (RFC 9111 §3.1, §3.2, §4.3; RFC 9110 §13).

use std::time::SystemTime;

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, AGE,
        CACHE_CONTROL, CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_LOCATION, CONTENT_RANGE, DATE, ETAG,
        EXPIRES, IF_MATCH, IF_MODIFIED_SINCE, IF_NONE_MATCH, IF_RANGE, IF_UNMODIFIED_SINCE, LAST_MODIFIED,
        PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, RANGE, SET_COOKIE, TE, TRANSFER_ENCODING, UPGRADE, VARY,
    },
};

use super::{date, directives, status::CACHE_STATUS};

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const PROXY_AUTHENTICATION_INFO: HeaderName = HeaderName::from_static("proxy-authentication-info");
const CONTENT_MD5: HeaderName = HeaderName::from_static("content-md5");

/// Makes the request for an answer the question whether the `stored` one still holds (§4.3.1).
///
/// What the client asked on its own condition, or for a part, would be answered for its copy and not for ours. Without a
/// stored one, and by another method than `GET`, which would do something else on a condition (RFC 9110 §13.1.2), none is
/// left.
pub(super) fn conditions(method: &Method, head: &mut HeaderMap, stored: Option<&HeaderMap>) {
    for name in [IF_MATCH, IF_NONE_MATCH, IF_MODIFIED_SINCE, IF_UNMODIFIED_SINCE, IF_RANGE, RANGE] {
        head.remove(name);
    }
    let Some(stored) = stored.filter(|_| method == Method::GET) else { return };
    // As they came, both: an upstream that knows entity tags passes over the date (RFC 9110 §13.1.3).
    for (asked, known) in [(IF_NONE_MATCH, ETAG), (IF_MODIFIED_SINCE, LAST_MODIFIED)] {
        if let Some(validator) = stored.get(known).filter(|value| !value.is_empty()) {
            head.insert(asked, validator.clone());
        }
    }
}

/// Whether [`conditions`] has anything to ask by.
pub(super) fn has_validator(stored: &HeaderMap) -> bool {
    [ETAG, LAST_MODIFIED].iter().any(|name| stored.get(name).is_some_and(|value| !value.is_empty()))
}

/// What a request with preconditions gets of a stored answer that may be used for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Evaluation {
    /// The answer. A `Range` may then take a part of it.
    Full,
    /// 304, with [`headers_of_304`].
    NotModified,
    /// What only the origin can say: the request goes on, with its preconditions (§4.3.2).
    Forward,
}

/// RFC 9110 §13.2.2, as far as it is for a cache (§4.3.2).
pub(super) fn evaluate(method: &Method, headers: &HeaderMap, status: StatusCode, stored: &HeaderMap) -> Evaluation {
    if headers.contains_key(IF_MATCH) || headers.contains_key(IF_UNMODIFIED_SINCE) {
        return Evaluation::Forward;
    }
    let reads = method == Method::GET || method == Method::HEAD;
    if headers.contains_key(IF_NONE_MATCH) {
        if !reads {
            // 412, or whatever the method does where nothing is there yet.
            return Evaluation::Forward;
        }
        // §13.2.1: conditions are about what would be a success, and §13.1.3: the date does not count beside a tag.
        let tag = stored.get(ETAG).map(HeaderValue::as_bytes);
        let known = tags(headers).any(|asked| asked == b"*" || tag.is_some_and(|tag| is_weak_match(tag, asked)));
        return if known && status == StatusCode::OK { Evaluation::NotModified } else { Evaluation::Full };
    }
    let mut since = headers.get_all(IF_MODIFIED_SINCE).iter();
    let (Some(first), None) = (since.next(), since.next()) else { return Evaluation::Full };
    if !reads || status != StatusCode::OK {
        return Evaluation::Full;
    }
    // Without a last change it is the date of the answer, which has one: `storable_headers`.
    let date = |value: &HeaderValue| date::parse(value.as_bytes());
    let changed = stored.get(LAST_MODIFIED).or_else(|| stored.get(DATE)).and_then(date);
    match (changed, date(first)) {
        (Some(changed), Some(since)) if changed <= since => Evaluation::NotModified,
        _ => Evaluation::Full,
    }
}

/// The fields of a 304 for a stored answer (RFC 9110 §15.4.5): those that it must have, the date where there is no tag,
/// and what a browser looks for on the 304 itself. Nothing else of the content that is not sent. `Age` is the caller's.
pub(super) fn headers_of_304(stored: &HeaderMap) -> HeaderMap {
    let always = [CACHE_CONTROL, CONTENT_LOCATION, DATE, ETAG, EXPIRES, VARY, CACHE_STATUS];
    let cors = [ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_EXPOSE_HEADERS];
    let modified = (!stored.contains_key(ETAG)).then_some(LAST_MODIFIED);
    let mut headers = HeaderMap::with_capacity(always.len() + 1);
    for name in always.into_iter().chain(cors).chain(modified) {
        for value in stored.get_all(&name) {
            headers.append(&name, value.clone());
        }
    }
    headers
}

/// Whether a 304 is about the stored answer whose validators it was asked by (§4.3.4).
///
/// If not, it must not renew it: the upstream has another one in mind, and is asked again without conditions. Tags are
/// compared weakly: nginx makes the tag of what it compresses a weak one, and answers with the strong one of the
/// original. A 304 without any validator is about what it was asked for.
pub(super) fn selects(stored: &HeaderMap, of_304: &HeaderMap) -> bool {
    match (of_304.get(ETAG), stored.get(ETAG)) {
        (Some(new), Some(old)) => is_weak_match(old.as_bytes(), new.as_bytes()),
        _ => match (of_304.get(LAST_MODIFIED), stored.get(LAST_MODIFIED)) {
            (Some(new), Some(old)) => {
                new == old || date::parse(new.as_bytes()).is_some_and(|new| Some(new) == date::parse(old.as_bytes()))
            }
            (Some(_), None) => false,
            // A tag where there was none is a strong validator that is not ours, unless it is said to be weak.
            (None, _) => of_304.get(ETAG).is_none_or(|new| !is_strong(new.as_bytes())),
        },
    }
}

/// Renews the fields of a stored answer by those of a 304 (§3.2): each that is given replaces all its values.
///
/// Not those of the connection, and not those that the stored content depends on: its length, its codings, its range.
/// `Set-Cookie` is for who asked, and the caller's to pass on. If `Vary` changes, the answer is stored under a key that
/// is no longer its own.
pub(super) fn merge(stored: &mut HeaderMap, of_304: &HeaderMap) {
    // They belong to the message, not to what it is about: the old ones would make the new one too old.
    for name in [AGE, DATE] {
        stored.remove(name);
    }
    let tagged = stored.contains_key(ETAG);
    for name in of_304.keys() {
        let content = [CONTENT_LENGTH, CONTENT_ENCODING, CONTENT_RANGE, CONTENT_MD5].contains(name);
        if content || is_unstorable(name) || is_listed(of_304, name) || *name == ETAG && tagged {
            continue;
        }
        stored.remove(name);
        for value in of_304.get_all(name) {
            stored.append(name, value.clone());
        }
    }
}

/// Whether the answer to a `HEAD` is about the stored one (§4.3.5). Then it renews it like a 304; if not, the stored
/// one is stale. Neither, if the answer is no 200.
pub(super) fn head_agrees(stored: &HeaderMap, of_head: &HeaderMap) -> bool {
    let equal = |name: HeaderName| of_head.get(&name).is_none_or(|value| stored.get(&name) == Some(value));
    // Of an answer that came in chunks the length was not known.
    equal(ETAG) && equal(LAST_MODIFIED) && (!stored.contains_key(CONTENT_LENGTH) || equal(CONTENT_LENGTH))
}

/// The fields that are stored (§3.1), of an answer that came at `received`.
///
/// Without those of the connection and of a proxy, those that `no-cache=` and `private=` name, and `Set-Cookie`; nor
/// `Age`, which is in [`Life`](super::freshness::Life). With a `Date` if it had none (RFC 9110 §6.6.1).
pub(super) fn storable_headers(headers: &HeaderMap, received: SystemTime) -> HeaderMap {
    let named: Vec<HeaderName> = directives::named_fields(headers).collect();
    let mut kept = HeaderMap::with_capacity(headers.keys_len() + 1);
    for name in headers.keys() {
        if *name == AGE || is_unstorable(name) || named.contains(name) || is_listed(headers, name) {
            continue;
        }
        for value in headers.get_all(name) {
            kept.append(name, value.clone());
        }
    }
    if !kept.contains_key(DATE)
        && let Some(now) = date::format(received)
    {
        kept.insert(DATE, now);
    }
    kept
}

fn is_unstorable(name: &HeaderName) -> bool {
    [CONNECTION, KEEP_ALIVE, PROXY_CONNECTION, TE, TRANSFER_ENCODING, UPGRADE].contains(name)
        || [PROXY_AUTHENTICATE, PROXY_AUTHENTICATION_INFO, PROXY_AUTHORIZATION, SET_COOKIE].contains(name)
}

/// Whether `Connection` names it.
fn is_listed(headers: &HeaderMap, name: &HeaderName) -> bool {
    let lines = headers.get_all(CONNECTION).iter();
    let mut listed = lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b',')).map(<[u8]>::trim_ascii);
    listed.any(|listed| listed.eq_ignore_ascii_case(name.as_str().as_bytes()))
}

/// RFC 9110 §8.8.3.2: the same, and neither of them weak.
pub(super) fn is_strong_match(a: &[u8], b: &[u8]) -> bool {
    is_strong(a) && a == b
}

fn is_strong(tag: &[u8]) -> bool {
    matches!(tag, [b'"', .., b'"'])
}

/// The same, weak or not. What is no entity tag, but stands in both places, is the same as well.
fn is_weak_match(a: &[u8], b: &[u8]) -> bool {
    !a.is_empty() && opaque(a) == opaque(b)
}

fn opaque(tag: &[u8]) -> &[u8] {
    let tag = tag.trim_ascii();
    tag.strip_prefix(b"W/").unwrap_or(tag)
}

/// The members of `If-None-Match`. Between the quotes of a tag there may be commas, and nothing is escaped.
fn tags(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    headers.get_all(IF_NONE_MATCH).iter().flat_map(|line| Tags { rest: line.as_bytes() })
}

struct Tags<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Tags<'a> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        let start = self.rest.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b','))?;
        let rest = self.rest.get(start..)?;
        let weak = if rest.starts_with(b"W/\"") { 2 } else { 0 };
        let quoted = rest.get(weak..).and_then(|tag| tag.strip_prefix(b"\""));
        let end = match quoted.and_then(|tag| tag.iter().position(|&byte| byte == b'"')) {
            Some(close) => weak + close + 2,
            None => rest.iter().position(|&byte| byte == b',').unwrap_or(rest.len()),
        };
        let (tag, rest) = rest.split_at(end);
        self.rest = rest;
        Some(tag.trim_ascii_end())
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use proptest::prelude::*;

    use super::{
        super::{date::LATEST, directives::map},
        Evaluation::*,
        *,
    };

    const OLD: &str = "Wed, 01 Jan 2020 00:00:00 GMT";
    const NEW: &str = "Thu, 02 Jan 2020 00:00:00 GMT";

    fn asked(fields: &[(&str, &str)], stored: &[(&str, &str)]) -> Evaluation {
        evaluate(&Method::GET, &map(fields), StatusCode::OK, &map(stored))
    }

    #[test]
    fn section_4_3_1_the_cache_asks_for_itself() {
        let client = [
            ("accept", "*/*"),
            ("if-none-match", "\"mine\""),
            ("if-match", "\"mine\""),
            ("if-modified-since", NEW),
            ("if-unmodified-since", NEW),
            ("if-range", NEW),
            ("range", "bytes=0-1"),
        ];
        let ours = |stored: &[(&str, &str)]| {
            let mut head = map(&client);
            conditions(&Method::GET, &mut head, Some(&map(stored)));
            head
        };
        let both = [("etag", "W/\"ours\""), ("last-modified", OLD)];
        let expected = [("accept", "*/*"), ("if-none-match", "W/\"ours\""), ("if-modified-since", OLD)];
        assert_eq!(ours(&both), map(&expected));
        assert_eq!(ours(&both[1..]), map(&[("accept", "*/*"), ("if-modified-since", OLD)]));
        assert_eq!(ours(&[("etag", "")]), map(&[("accept", "*/*")]));
        assert!(
            has_validator(&map(&both[..1])) && has_validator(&map(&both[1..])) && !has_validator(&HeaderMap::new())
        );
    }

    #[test]
    fn section_4_3_2_if_none_match_is_compared_weakly() {
        for (tag, matching) in [
            ("\"abcdef\"", "\"abcdef\""),
            ("\"abcdef\"", "W/\"abcdef\""),
            ("W/\"abcdef\"", "\"abcdef\""),
            ("\"abcdef\"", "\"abcdef\", \"1234\", \"5678\""),
            ("\"abcdef\"", "\"1234\" ,\t\"abcdef\",\"5678\""),
            ("\"abcdef\"", "\"1234\", \"5678\", W/\"abcdef\""),
            ("\"a,b\"", "\"x\", \"a,b\""),
            ("\"a\\\"", "\"a\\\", \"b\""),
            ("\"abcdef\u{fc}\"", "\"abcdef\u{fc}\""),
            ("abcdef", "abcdef"),
            ("w/\"abcdef\"", "w/\"abcdef\""),
            ("\"abcdef\"", "*"),
        ] {
            assert_eq!(asked(&[("if-none-match", matching)], &[("etag", tag)]), NotModified, "{tag} {matching}");
        }
        for (tag, other) in [
            ("\"abcdef\"", "\"abcde\""),
            ("\"a\"", "\"x,\"a\"\""),
            ("\"abcdef\"", "abcdef"),
            ("\"b\"", "\"a, \"b"),
            ("\"a\"", ""),
            ("\"a\"", "\"*\""),
            ("", ""),
        ] {
            assert_eq!(asked(&[("if-none-match", other)], &[("etag", tag)]), Full, "{tag} {other}");
        }
        let lines = [("if-none-match", "\"1\""), ("if-none-match", "\"2\"")];
        assert_eq!(asked(&lines, &[("etag", "\"2\"")]), NotModified);
        assert_eq!(asked(&[("if-none-match", "*")], &[]), NotModified, "something is there");
        assert_eq!(asked(&[("if-none-match", "\"a\"")], &[]), Full);
    }

    #[test]
    fn section_4_3_2_the_tag_counts_more_than_the_date() {
        let stored = [("etag", "\"a\""), ("last-modified", OLD)];
        assert_eq!(asked(&[("if-none-match", "\"a\""), ("if-modified-since", "x")], &stored), NotModified);
        assert_eq!(asked(&[("if-none-match", "\"b\""), ("if-modified-since", NEW)], &stored), Full);
    }

    #[test]
    fn section_4_3_2_if_modified_since() {
        let since = |date: &str, stored: &[(&str, &str)]| asked(&[("if-modified-since", date)], stored);
        let modified = [("last-modified", OLD), ("date", NEW)];
        assert_eq!(since(OLD, &modified), NotModified);
        assert_eq!(since(NEW, &modified), NotModified);
        assert_eq!(since("Wednesday, 01-Jan-20 00:00:00 GMT", &modified), NotModified);
        assert_eq!(since("Wed Jan  1 00:00:00 2020", &modified), NotModified);
        assert_eq!(since("Tue, 31 Dec 2019 23:59:59 GMT", &modified), Full);
        assert_eq!(since(OLD, &[("date", NEW)]), Full, "without a last change, made when it was sent");
        assert_eq!(since(NEW, &[("date", NEW)]), NotModified);
        for garbage in ["yesterday", "", "1577836800"] {
            assert_eq!(since(garbage, &modified), Full, "{garbage}");
            assert_eq!(since(garbage, &[("last-modified", garbage)]), Full, "{garbage}");
        }
        let twice = [("if-modified-since", OLD), ("if-modified-since", OLD)];
        assert_eq!(asked(&twice, &modified), Full);
    }

    #[test]
    fn rfc_9110_section_13_2_1_conditions_are_about_success() {
        let evaluated = |method, status, fields: &[(&str, &str)]| {
            let stored = map(&[("etag", "\"a\""), ("last-modified", OLD)]);
            evaluate(&method, &map(fields), StatusCode::from_u16(status).unwrap(), &stored)
        };
        for conditions in [("if-none-match", "\"a\""), ("if-none-match", "*"), ("if-modified-since", OLD)] {
            assert_eq!(evaluated(Method::HEAD, 200, &[conditions]), NotModified);
            assert_eq!(evaluated(Method::GET, 404, &[conditions]), Full);
        }
        assert_eq!(evaluated(Method::POST, 200, &[("if-modified-since", OLD)]), Full);
        assert_eq!(evaluated(Method::POST, 200, &[("if-none-match", "\"a\"")]), Forward);
        assert_eq!(evaluated(Method::GET, 200, &[]), Full);
    }

    #[test]
    fn section_4_3_2_what_only_the_origin_can_say() {
        for fields in [("if-match", "\"a\""), ("if-unmodified-since", OLD)] {
            assert_eq!(asked(&[fields, ("if-none-match", "\"a\"")], &[("etag", "\"a\"")]), Forward);
        }
        assert_eq!(asked(&[("if-range", "\"b\"")], &[("etag", "\"a\"")]), Full, "of a range only");
    }

    #[test]
    fn rfc_9110_section_15_4_5_what_a_304_says() {
        let stored = [
            ("cache-control", "max-age=5"),
            ("cache-control", "public"),
            ("content-location", "/a"),
            ("date", NEW),
            ("etag", "\"a\""),
            ("expires", NEW),
            ("vary", "accept"),
            ("access-control-allow-origin", "*"),
        ];
        let rest = [("last-modified", OLD), ("content-type", "text/plain"), ("content-length", "5"), ("x-a", "b")];
        assert_eq!(headers_of_304(&map(&[&stored[..], &rest].concat())), map(&stored));
        assert_eq!(headers_of_304(&map(&rest)), map(&rest[..1]));
    }

    #[test]
    fn section_4_3_4_which_answer_a_304_is_about() {
        let selects = |stored: &[(&str, &str)], of_304: &[(&str, &str)]| selects(&map(stored), &map(of_304));
        let (a, weak, b) = (("etag", "\"a\""), ("etag", "W/\"a\""), ("etag", "\"b\""));
        let (old, new) = (("last-modified", OLD), ("last-modified", NEW));
        assert!(selects(&[a], &[a]));
        assert!(selects(&[weak], &[weak]));
        assert!(selects(&[weak], &[a]), "nginx");
        assert!(!selects(&[a], &[b]));
        assert!(!selects(&[a, old], &[b, old]), "a strong one that differs");
        assert!(selects(&[a, old], &[a, new]), "a strong one that agrees");
        assert!(selects(&[old], &[old]));
        assert!(selects(&[old], &[("last-modified", "Wednesday, 01-Jan-20 00:00:00 GMT")]));
        assert!(!selects(&[old], &[new]));
        assert!(selects(&[old], &[a, old]));
        assert!(!selects(&[old], &[a]));
        assert!(selects(&[a, old], &[old]));
        assert!(!selects(&[a], &[old]));
        assert!(selects(&[a, old], &[]) && selects(&[], &[]), "none");
    }

    #[test]
    fn section_3_2_a_304_replaces_what_it_gives() {
        let mut stored = map(&[
            ("test-header", "A"),
            ("cache-control", "max-age=1"),
            ("link", "</a>"),
            ("link", "</b>"),
            ("content-type", "text/plain"),
            ("kept", "1"),
            ("kept", "2"),
            ("age", "500"),
            ("date", OLD),
        ]);
        let of_304 = map(&[
            ("cache-control", "max-age=3600"),
            ("cache-control", "public"),
            ("link", "</c>"),
            ("link", "</d>"),
            ("content-type", "text/plain;charset=utf-8"),
            ("new", "3"),
            ("date", NEW),
        ]);
        merge(&mut stored, &of_304);
        let expected = map(&[
            ("test-header", "A"),
            ("cache-control", "max-age=3600"),
            ("cache-control", "public"),
            ("link", "</c>"),
            ("link", "</d>"),
            ("content-type", "text/plain;charset=utf-8"),
            ("kept", "1"),
            ("kept", "2"),
            ("new", "3"),
            ("date", NEW),
        ]);
        assert_eq!(stored, expected);
    }

    #[test]
    fn section_3_2_a_304_does_not_touch_what_the_content_depends_on() {
        let fixed = [
            ("content-length", "5"),
            ("content-encoding", "gzip"),
            ("content-range", "x"),
            ("content-md5", "y"),
            ("etag", "\"a\""),
        ];
        let mut stored = map(&fixed);
        let of_304 = map(&[
            ("content-length", "10"),
            ("content-encoding", "br"),
            ("content-range", "z"),
            ("content-md5", "z"),
            ("etag", "W/\"a\""),
            ("transfer-encoding", "chunked"),
            ("connection", "x-mine, keep-alive"),
            ("keep-alive", "1"),
            ("x-mine", "1"),
            ("set-cookie", "a=b"),
            ("upgrade", "h2c"),
        ]);
        merge(&mut stored, &of_304);
        assert_eq!(stored, map(&fixed));
        let mut untagged = HeaderMap::new();
        merge(&mut untagged, &map(&[("etag", "\"a\"")]));
        assert_eq!(untagged, map(&[("etag", "\"a\"")]));
    }

    #[test]
    fn section_4_3_5_a_head_renews_or_outdates() {
        let stored = map(&[("etag", "\"a\""), ("last-modified", OLD), ("content-length", "5")]);
        let agrees = |of_head: &[(&str, &str)]| head_agrees(&stored, &map(of_head));
        assert!(agrees(&[]));
        assert!(agrees(&[("etag", "\"a\""), ("last-modified", OLD), ("content-length", "5"), ("x", "y")]));
        for other in [("etag", "\"b\""), ("last-modified", NEW), ("content-length", "6")] {
            assert!(!agrees(&[other]), "{other:?}");
        }
        assert!(head_agrees(&HeaderMap::new(), &map(&[("content-length", "5")])));
        assert!(!head_agrees(&HeaderMap::new(), &map(&[("etag", "\"a\"")])));
    }

    #[test]
    fn section_3_1_what_is_stored() {
        let kept = [
            ("cache-control", "max-age=60, no-cache=\"a, Set-Cookie\", private=b"),
            ("date", OLD),
            ("link", "</a>"),
            ("link", "</b>"),
            ("trailer", "x-sum"),
            ("x-kept", "1"),
        ];
        let gone = [
            ("connection", "close, X-Mine"),
            ("x-mine", "1"),
            ("keep-alive", "1"),
            ("proxy-connection", "1"),
            ("proxy-authenticate", "1"),
            ("proxy-authentication-info", "1"),
            ("proxy-authorization", "1"),
            ("te", "1"),
            ("transfer-encoding", "chunked"),
            ("upgrade", "1"),
            ("a", "1"),
            ("a", "2"),
            ("b", "1"),
            ("set-cookie", "1"),
            ("age", "1"),
        ];
        assert_eq!(storable_headers(&map(&[&kept[..], &gone].concat()), UNIX_EPOCH), map(&kept));
    }

    #[test]
    fn rfc_9110_section_6_6_1_what_has_no_date_gets_one() {
        let dated = |received| storable_headers(&HeaderMap::new(), received).remove(DATE);
        assert_eq!(dated(UNIX_EPOCH), Some(HeaderValue::from_static("Thu, 01 Jan 1970 00:00:00 GMT")));
        assert_eq!(dated(UNIX_EPOCH - Duration::from_secs(1)), None);
        assert_eq!(dated(UNIX_EPOCH + Duration::from_millis(LATEST + 1)), None);
        assert_eq!(dated(UNIX_EPOCH + Duration::from_millis(LATEST)).unwrap(), "Fri, 31 Dec 9999 23:59:59 GMT");
    }

    proptest! {
        #[test]
        fn any_list_of_tags_has_an_end(value in "[W/\",*a-c ]{0,16}", tag in "(W/)?\"[a-c,]{0,3}\"") {
            let headers = map(&[("if-none-match", &value)]);
            prop_assert!(tags(&headers).count() <= value.len());
            let with = map(&[("if-none-match", &format!("{tag}, {value}"))]);
            prop_assert_eq!(tags(&with).next(), Some(tag.as_bytes()));
            prop_assert_eq!(asked(&[("if-none-match", &format!("\"x\",{tag} "))], &[("etag", &tag)]), NotModified);
        }

        #[test]
        fn merging_twice_is_merging_once(
            stored in proptest::collection::vec(("[a-c]|etag|age|date|content-length", "[0-9]"), 0..8),
            of_304 in proptest::collection::vec(("[a-d]|etag|age|date|connection", "[0-9a-c]"), 0..8),
        ) {
            let fields = |fields: &[(String, String)]| {
                map(&fields.iter().map(|(name, value)| (&**name, &**value)).collect::<Vec<_>>())
            };
            let mut once = fields(&stored);
            merge(&mut once, &fields(&of_304));
            let mut twice = once.clone();
            merge(&mut twice, &fields(&of_304));
            prop_assert_eq!(once, twice);
        }
    }
}
