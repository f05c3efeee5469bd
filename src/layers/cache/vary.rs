//! Which requests an answer is for (RFC 9111 §4.1): those whose fields that `Vary` names say the same.
//!
//! The same is what can be made the same by joining lines and by moving white space around commas. Of unknown fields no
//! more is known; of `Accept` and its like also that tokens have no case. Their order stays: among equal weights many
//! servers take the first (RFC 9110 §12.5.4).

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{ACCEPT, ACCEPT_CHARSET, ACCEPT_ENCODING, ACCEPT_LANGUAGE, VARY},
};

/// More names than anybody means; such an answer is for one request only.
const MOST_NAMES: usize = 32;

/// What an answer depends on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Names {
    /// `*`, or nothing that can be understood: no request is like the one that was answered.
    Star,
    /// In lower case and alphabetical order, each once. Often empty.
    Fields(Vec<HeaderName>),
}

/// Of the answer as it came: `private="vary"` would take it away.
pub(super) fn names(headers: &HeaderMap) -> Names {
    let mut names = Vec::new();
    for name in members(headers) {
        // `*` is a legal name of a field, and means all of them here.
        match HeaderName::from_bytes(name) {
            Ok(_) if name == b"*" || names.len() == MOST_NAMES => return Names::Star,
            Ok(name) => names.push(name),
            Err(_) => return Names::Star,
        }
    }
    names.sort_unstable_by(|a, b| a.as_str().cmp(b.as_str()));
    names.dedup();
    Names::Fields(names)
}

/// Whether [`names`] gives [`Names::Star`], without the names.
pub(super) fn is_star(headers: &HeaderMap) -> bool {
    members(headers).any(|name| name == b"*" || HeaderName::from_bytes(name).is_err())
        || members(headers).count() > MOST_NAMES
}

fn members(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(VARY).iter().map(HeaderValue::as_bytes);
    lines.flat_map(|line| line.split(|&byte| byte == b',')).map(<[u8]>::trim_ascii).filter(|name| !name.is_empty())
}

/// Gives `sink` what a request says in the fields of `names`, piece by piece: a hasher, or a buffer. Equal for two
/// requests if, and only if, they match. Holds what the fields hold, so that nobody should see it but a hasher.
///
/// Each field is its name, 1 and its value if it is there, and 0: bytes that neither a name nor a value has.
pub(super) fn canonical(names: &[HeaderName], headers: &HeaderMap, mut sink: impl FnMut(&[u8])) {
    for name in names {
        sink(name.as_str().as_bytes());
        if headers.contains_key(name) {
            sink(&[1]);
            value(name, headers, &mut sink);
        }
        sink(&[0]);
    }
}

/// The value with its lines joined, without white space at its ends and around separators, and in lower case where that
/// is known to be the same. Quoted strings stay as they are.
fn value(name: &HeaderName, headers: &HeaderMap, sink: &mut impl FnMut(&[u8])) {
    let tokens = [ACCEPT, ACCEPT_CHARSET, ACCEPT_ENCODING, ACCEPT_LANGUAGE].contains(name);
    let separates = |byte: u8| byte == b',' || tokens && byte == b';';
    let mut after_separator = true;
    for (n, line) in headers.get_all(name).iter().enumerate() {
        if n > 0 {
            sink(b",");
            after_separator = true;
        }
        let mut rest = line.as_bytes().trim_ascii();
        // Of a parameter (`profile=X`) the value may have a case.
        let mut parameter = false;
        while let [byte, behind @ ..] = rest {
            let quoted = if *byte == b'"' { quoted_length(rest) } else { None };
            if let Some(length) = quoted {
                let (piece, behind) = rest.split_at(length);
                sink(piece);
                (rest, after_separator) = (behind, false);
                continue;
            }
            let space = rest.iter().take_while(|byte| matches!(byte, b' ' | b'\t')).count();
            if space > 0 {
                let (piece, behind) = rest.split_at(space);
                if !after_separator && behind.first().is_none_or(|&next| !separates(next)) {
                    sink(piece);
                }
                rest = behind;
                continue;
            }
            parameter = match byte {
                b';' => true,
                b',' => false,
                _ => parameter,
            };
            after_separator = separates(*byte);
            sink(&[if tokens && !parameter { byte.to_ascii_lowercase() } else { *byte }]);
            rest = behind;
        }
    }
}

/// Of the quoted string at the start, with both quotes. None if it has no end.
fn quoted_length(text: &[u8]) -> Option<usize> {
    let mut escaped = false;
    let end = text.iter().skip(1).position(|&byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })?;
    Some(end + 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::directives::map, *};

    /// Whether a request is one of those that `canonical` stands for.
    fn matches(names: &[HeaderName], headers: &HeaderMap, mut canonical: &[u8]) -> bool {
        let mut same = true;
        super::canonical(names, headers, |piece| match canonical.strip_prefix(piece) {
            Some(rest) => canonical = rest,
            None => same = false,
        });
        same && canonical.is_empty()
    }

    fn named(values: &[&str]) -> Names {
        let fields: Vec<_> = values.iter().map(|value| ("vary", *value)).collect();
        let headers = map(&fields);
        let names = names(&headers);
        assert_eq!(is_star(&headers), names == Names::Star, "{values:?}");
        names
    }

    fn bytes(names: &[HeaderName], headers: &HeaderMap) -> Vec<u8> {
        let mut bytes = Vec::new();
        canonical(names, headers, |piece| bytes.extend_from_slice(piece));
        assert!(matches(names, headers, &bytes));
        bytes
    }

    fn same(name: &'static str, a: &[&str], b: &[&str]) -> bool {
        let of = |values: &[&str]| map(&values.iter().map(|value| (name, *value)).collect::<Vec<_>>());
        let names = [HeaderName::from_static(name)];
        let stored = bytes(&names, &of(a));
        let matching = matches(&names, &of(b), &stored);
        assert_eq!(matching, stored == bytes(&names, &of(b)));
        matching
    }

    #[test]
    fn section_4_1_a_star_matches_nothing() {
        for star in [&["*"][..], &["*, *"], &["*", "*"], &[", *"], &["", "*"], &["*, Foo"], &["Foo, *"]] {
            assert_eq!(named(star), Names::Star, "{star:?}");
        }
        for unclear in ["foo bar", "foo;q=1", "\"foo\""] {
            assert_eq!(named(&[unclear]), Names::Star, "{unclear}");
        }
        let many: Vec<_> = (0..=MOST_NAMES).map(|n| format!("x{n}")).collect();
        assert_eq!(named(&[&many.join(",")]), Names::Star);
        assert!(matches!(named(&[&many[1..].join(",")]), Names::Fields(names) if names.len() == MOST_NAMES));
    }

    #[test]
    fn section_4_1_names_have_no_order_and_no_case() {
        assert_eq!(named(&[]), Names::Fields(vec![]));
        assert_eq!(named(&["", " , "]), Names::Fields(vec![]));
        let expected = ["accept", "bar", "foo"].map(HeaderName::from_static).to_vec();
        assert_eq!(named(&["Foo, Bar", "ACCEPT,,foo"]), Names::Fields(expected));
    }

    #[test]
    fn section_4_1_an_absent_field_matches_an_absent_one_only() {
        assert!(same("foo", &[], &[]));
        assert!(!same("foo", &[], &["1"]));
        assert!(!same("foo", &["1"], &[]));
        assert!(!same("foo", &[""], &[]));
    }

    #[test]
    fn section_4_1_all_fields_must_match() {
        let names = ["bar", "baz", "foo"].map(HeaderName::from_static);
        let stored = bytes(&names, &map(&[("foo", "1"), ("bar", "abc"), ("other", "2")]));
        let matches = |fields: &[(&str, &str)]| matches(&names, &map(fields), &stored);
        assert!(matches(&[("bar", "abc"), ("foo", "1"), ("other", "3")]));
        assert!(!matches(&[("foo", "2"), ("bar", "abc")]));
        assert!(!matches(&[("foo", "1"), ("bar", "abc4")]));
        assert!(!matches(&[("foo", "1"), ("bar", "ab")]));
        assert!(!matches(&[("foo", "1")]));
        assert!(!matches(&[("foo", "1"), ("bar", "abc"), ("baz", "")]));
        assert!(!matches(&[("foo", "abc"), ("bar", "1")]));
        assert!(!self::matches(&names[..2], &map(&[("bar", "abc")]), &stored), "of other names");
    }

    #[test]
    fn section_4_1_lines_are_joined_and_white_space_does_not_count() {
        assert!(same("foo", &["1, 2"], &["1", "2"]));
        assert!(same("foo", &["1,2"], &[" 1 ,\t2 "]));
        assert!(!same("foo", &["1 2"], &["1  2"]), "unknown to mean the same");
        assert!(!same("foo", &["1 2"], &["12"]));
        assert!(!same("foo", &["\"a,b\""], &["\"a, b\""]), "quoted");
        assert!(!same("foo", &["a"], &["A"]));
        assert!(!same("foo", &["a;b"], &["a; b"]));
        assert!(same("foo", &["\"a , b"], &["\"a, b"]), "not quoted");
    }

    #[test]
    fn section_4_1_what_is_accepted_has_no_case() {
        assert!(same("accept-language", &["en, de"], &["eN , De"]));
        assert!(same("accept-encoding", &["gzip;q=0.5, br"], &["GZIP; q=0.5,br"]));
        assert!(!same("accept-language", &["en, de"], &["de, en"]), "many servers take the first");
        assert!(!same("accept", &["a/b;profile=X"], &["a/b;profile=x"]));
        assert!(!same("accept", &["a/b;profile=\"X, Y\""], &["a/b;profile=\"x,y\""]));
        assert!(same("accept", &["A/b ; v=1 , c/D"], &["a/B;v=1,C/d"]));
    }

    proptest! {
        #[test]
        fn any_value_matches_itself_and_its_lines_joined(values in proptest::collection::vec("[a-c ,;\"\\\\A]{0,8}", 0..4)) {
            let names = [ACCEPT, HeaderName::from_static("foo")];
            for name in ["foo", "accept"] {
                let lines: Vec<_> = values.iter().map(|value| (name, value.as_str())).collect();
                let lines = map(&lines);
                let stored = bytes(&names, &lines);
                prop_assert_eq!(stored.split(|&byte| byte == 0).count(), 3, "two fields and their ends");
                let joined = values.join(", ");
                if !values.is_empty() && values.iter().all(|value| !value.contains('"')) {
                    prop_assert!(matches(&names, &map(&[(name, &joined)]), &stored));
                }
            }
        }

        #[test]
        fn any_vary_has_names_or_not(value in "[a-c* ,;-]{0,12}") {
            named(&[&value]);
        }
    }
}
