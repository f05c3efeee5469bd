//! `Cache-Control`, of answers and of requests (RFC 9111 §5.2).
//!
//! Read in one pass over the lines as they are, without allocating. Where a value can be read in two ways, or not at
//! all, the one counts that makes the cache do less: wrong here means one more request to the upstream, wrong there
//! somebody else's answer.

use http::{
    HeaderMap, HeaderName, HeaderValue,
    header::{CACHE_CONTROL, CONTENT_ENCODING, CONTENT_TYPE, PRAGMA, VARY},
};

/// A number of seconds, at most [`MAX_SECONDS`].
pub(super) type Seconds = u32;

/// What a larger number counts as (§1.2.2).
pub(super) const MAX_SECONDS: Seconds = 1 << 31;

/// How much of an answer `no-cache` and `private` are about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// All of it.
    All,
    /// The fields that [`named_fields`] gives, and nothing else.
    Fields,
}

/// What an answer says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(clippy::struct_excessive_bools)] // what the RFC has as flags
pub(super) struct Response {
    pub(super) no_store: bool,
    pub(super) no_cache: Option<Scope>,
    pub(super) private: Option<Scope>,
    pub(super) public: bool,
    pub(super) must_revalidate: bool,
    pub(super) proxy_revalidate: bool,
    pub(super) must_understand: bool,
    pub(super) no_transform: bool,
    /// RFC 8246. Of no use to a cache that asks again only when a client does or the answer is stale.
    pub(super) immutable: bool,
    /// 0 where it is no number, or where there are several that differ (§4.2.1).
    pub(super) max_age: Option<Seconds>,
    /// As `max_age`.
    pub(super) s_maxage: Option<Seconds>,
    /// RFC 5861 §3. Not there where it is no number.
    pub(super) stale_while_revalidate: Option<Seconds>,
    /// RFC 5861 §4. Not there where it is no number.
    pub(super) stale_if_error: Option<Seconds>,
    /// A quote was left open: what follows may have been meant as part of it, so nothing that it says in favour of
    /// the answer can be relied on.
    pub(super) open_quote: bool,
}

/// How stale an answer may be for who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MaxStale {
    /// As stale as it likes.
    Any,
    /// So long past its freshness.
    Seconds(Seconds),
}

/// What a request says (§5.2.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Request {
    pub(super) no_store: bool,
    pub(super) no_cache: bool,
    pub(super) only_if_cached: bool,
    pub(super) max_age: Option<Seconds>,
    pub(super) min_fresh: Option<Seconds>,
    pub(super) max_stale: Option<MaxStale>,
    /// RFC 5861 §4.
    pub(super) stale_if_error: Option<Seconds>,
}

impl Response {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let mut said = Self::default();
        for Directive { name, argument } in directives(headers) {
            let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
            said.open_quote |= argument == Argument::Open;
            if is("max-age") {
                freshness(&mut said.max_age, argument);
            } else if is("s-maxage") {
                freshness(&mut said.s_maxage, argument);
            } else if is("no-cache") {
                widen(&mut said.no_cache, argument);
            } else if is("private") {
                widen(&mut said.private, argument);
            } else if is("stale-while-revalidate") {
                least(&mut said.stale_while_revalidate, argument.seconds());
            } else if is("stale-if-error") {
                least(&mut said.stale_if_error, argument.seconds());
            } else if is("public") {
                // Alone among the flags it only ever permits: with an argument it is something else.
                said.public |= argument == Argument::None;
            } else {
                said.no_store |= is("no-store");
                said.must_revalidate |= is("must-revalidate");
                said.proxy_revalidate |= is("proxy-revalidate");
                said.must_understand |= is("must-understand");
                said.no_transform |= is("no-transform");
                said.immutable |= is("immutable");
            }
        }
        said
    }
}

impl Request {
    pub(super) fn of(headers: &HeaderMap) -> Self {
        let mut asked = Self::default();
        if !headers.contains_key(CACHE_CONTROL) {
            // §5.4: only a client that knows nothing better is taken at this word.
            let pragma = headers.get_all(PRAGMA).iter().flat_map(|line| Directives { rest: line.as_bytes() });
            asked.no_cache = pragma.into_iter().any(|pragma| pragma.name.eq_ignore_ascii_case(b"no-cache"));
            return asked;
        }
        for Directive { name, argument } in directives(headers) {
            let is = |known: &str| name.eq_ignore_ascii_case(known.as_bytes());
            if is("max-age") {
                least(&mut asked.max_age, Some(argument.seconds().unwrap_or(0)));
            } else if is("min-fresh") {
                let least = argument.seconds().unwrap_or(MAX_SECONDS);
                asked.min_fresh = Some(asked.min_fresh.map_or(least, |before| before.max(least)));
            } else if is("max-stale") {
                asked.max_stale = match (asked.max_stale, argument, argument.seconds()) {
                    (None, Argument::None, _) => Some(MaxStale::Any),
                    (None | Some(MaxStale::Any), _, Some(most)) => Some(MaxStale::Seconds(most)),
                    (Some(MaxStale::Seconds(before)), _, Some(most)) => Some(MaxStale::Seconds(before.min(most))),
                    (before, _, None) => before,
                };
            } else if is("stale-if-error") {
                least(&mut asked.stale_if_error, argument.seconds());
            } else {
                asked.no_store |= is("no-store");
                asked.no_cache |= is("no-cache");
                asked.only_if_cached |= is("only-if-cached");
            }
        }
        asked
    }
}

/// The fields that `no-cache="…"` and `private="…"` name.
///
/// §5.2.2.4 forbids to send the ones without asking the upstream, §5.2.2.7 to store the others. Both are true if
/// neither is stored, so that is what becomes of them; the rest of the answer is stored and used like any other.
pub(super) fn named_fields(headers: &HeaderMap) -> impl Iterator<Item = HeaderName> {
    let qualified = directives(headers).filter(|directive| {
        [&b"no-cache"[..], b"private"].iter().any(|name| directive.name.eq_ignore_ascii_case(name))
    });
    qualified.filter_map(|directive| directive.argument.fields()).flatten().flatten()
}

/// One member of the list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Directive<'a> {
    name: &'a [u8],
    argument: Argument<'a>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Argument<'a> {
    None,
    /// A token, or what stands between the quotes, with its escapes: nothing that is understood here needs any.
    Is(&'a [u8]),
    /// White space around the `=`, or something behind the quotes.
    Broken,
    /// A quote without its end.
    Open,
}

impl<'a> Argument<'a> {
    /// §1.2.2: digits and nothing else, and too many of them are a large number.
    fn seconds(self) -> Option<Seconds> {
        let Self::Is(text) = self else { return None };
        seconds(text)
    }

    /// The names in it; none of it counts if any is not the name of a field.
    fn fields(self) -> Option<impl Iterator<Item = Option<HeaderName>> + 'a> {
        let Self::Is(text) = self else { return None };
        let names = text.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|name| !name.is_empty());
        Some(names.map(|name| HeaderName::from_bytes(name).ok()))
    }
}

/// Digits and nothing else; too many of them are [`MAX_SECONDS`].
pub(super) fn seconds(text: &[u8]) -> Option<Seconds> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number =
        text.iter().fold(0_u32, |number, digit| number.saturating_mul(10).saturating_add(u32::from(digit - b'0')));
    Some(number.min(MAX_SECONDS))
}

/// §4.2.1: an answer whose freshness is no number, or two different ones, is stale.
fn freshness(slot: &mut Option<Seconds>, argument: Argument<'_>) {
    let value = argument.seconds().unwrap_or(0);
    *slot = Some(if slot.is_none_or(|before| before == value) { value } else { 0 });
}

fn least(slot: &mut Option<Seconds>, value: Option<Seconds>) {
    *slot = match (*slot, value) {
        (Some(before), Some(value)) => Some(before.min(value)),
        (before, value) => before.or(value),
    };
}

/// Without an argument that names fields it is about all of the answer. So it is where one of them is needed to make
/// sense of the body, or to know whom it is for.
fn widen(slot: &mut Option<Scope>, argument: Argument<'_>) {
    let separable =
        |name: Option<HeaderName>| name.is_some_and(|name| ![VARY, CONTENT_ENCODING, CONTENT_TYPE].contains(&name));
    let some = argument.fields().is_some_and(|mut names| names.next().is_some());
    let fields = some && argument.fields().is_some_and(|mut names| names.all(separable));
    if !fields {
        *slot = Some(Scope::All);
    } else if slot.is_none() {
        *slot = Some(Scope::Fields);
    }
}

fn directives(headers: &HeaderMap) -> impl Iterator<Item = Directive<'_>> {
    headers.get_all(CACHE_CONTROL).iter().map(HeaderValue::as_bytes).flat_map(|line| Directives { rest: line })
}

/// The members of one line: `token [ "=" ( token / quoted-string ) ]`, of which the quoted may hold commas.
struct Directives<'a> {
    rest: &'a [u8],
}

impl<'a> Iterator for Directives<'a> {
    type Item = Directive<'a>;

    fn next(&mut self) -> Option<Directive<'a>> {
        let start = self.rest.iter().position(|byte| !matches!(byte, b' ' | b'\t' | b','))?;
        let rest = self.rest.get(start..)?;
        let (name, rest) =
            rest.split_at(rest.iter().position(|byte| matches!(byte, b'=' | b',')).unwrap_or(rest.len()));
        let (argument, rest) = match rest {
            [b'=', b'"', quoted @ ..] => match close(quoted) {
                Some((inner, behind)) => {
                    let (garbage, rest) = until_comma(behind);
                    (if garbage.trim_ascii().is_empty() { Argument::Is(inner) } else { Argument::Broken }, rest)
                }
                None => (Argument::Open, until_comma(quoted).1),
            },
            [b'=', rest @ ..] => {
                let (token, rest) = until_comma(rest);
                let spaced = token.first().is_some_and(u8::is_ascii_whitespace);
                (if spaced { Argument::Broken } else { Argument::Is(token.trim_ascii_end()) }, rest)
            }
            rest => (Argument::None, rest),
        };
        self.rest = rest;
        let spaced = argument != Argument::None && name.last().is_some_and(u8::is_ascii_whitespace);
        let argument = if spaced && argument != Argument::Open { Argument::Broken } else { argument };
        Some(Directive { name: name.trim_ascii_end(), argument })
    }
}

fn until_comma(text: &[u8]) -> (&[u8], &[u8]) {
    text.split_at(text.iter().position(|&byte| byte == b',').unwrap_or(text.len()))
}

/// What stands before the quote that is not escaped, and what behind it.
fn close(quoted: &[u8]) -> Option<(&[u8], &[u8])> {
    let mut escaped = false;
    let end = quoted.iter().position(|&byte| {
        let ends = byte == b'"' && !escaped;
        escaped = byte == b'\\' && !escaped;
        ends
    })?;
    Some((quoted.get(..end)?, quoted.get(end + 1..)?))
}

/// Header fields, for the tests here and beside.
#[cfg(test)]
pub(super) fn map(fields: &[(&str, &str)]) -> HeaderMap {
    let field = |(name, value): &(&str, &str)| {
        (HeaderName::from_bytes(name.as_bytes()).unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap())
    };
    fields.iter().map(field).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn lines(lines: &[&str]) -> HeaderMap {
        let fields: Vec<_> = lines.iter().map(|line| ("cache-control", *line)).collect();
        map(&fields)
    }

    fn answer(line: &str) -> Response {
        Response::of(&lines(&[line]))
    }

    fn request(line: &str) -> Request {
        Request::of(&lines(&[line]))
    }

    #[test]
    fn section_5_2_names_have_no_case_and_unknown_ones_no_meaning() {
        let said = answer("foobar, MaX-aGe=3600, No-StOrE, x=\"y\", pubLIC,,no-TRANSFORM , immutable");
        let expected = Response {
            max_age: Some(3600),
            no_store: true,
            public: true,
            no_transform: true,
            immutable: true,
            ..Response::default()
        };
        assert_eq!(said, expected);
        assert_eq!(answer("max-age-x=3, xmax-age=4, nostore, no-store2"), Response::default());
    }

    #[test]
    fn section_5_2_tokens_and_quoted_strings_are_the_same() {
        let said = answer("max-age=\"3600\", s-maxage=7 ,stale-if-error=\"8\"");
        assert_eq!((said.max_age, said.s_maxage, said.stale_if_error), (Some(3600), Some(7), Some(8)));
        assert_eq!(answer("no-cache=\"a\""), answer("no-cache=a"));
    }

    #[test]
    fn section_5_2_a_comma_in_quotes_divides_nothing() {
        let one = Response { max_age: Some(1), ..Response::default() };
        for line in [
            "extension=\"max-age=3600\", max-age=1",
            "max-age=1, extension=\"max-age=3600\"",
            "max-age=\"1\", extension=\"x, no-store, max-age=3600\"",
            "extension=\"\\\", max-age=3600, \\\\\", max-age=1",
        ] {
            assert_eq!(answer(line), one, "{line}");
        }
    }

    #[test]
    fn section_1_2_2_a_delta_that_is_too_large_is_the_largest() {
        for (text, seconds) in [
            ("0", 0),
            ("003600", 3600),
            ("2147483647", (1 << 31) - 1),
            ("2147483648", 1 << 31),
            ("2147483649", 1 << 31),
            ("99999999999", 1 << 31),
            ("99999999999999999999999999999999999999", 1 << 31),
        ] {
            assert_eq!(answer(&format!("max-age={text}")).max_age, Some(seconds), "{text}");
        }
    }

    #[test]
    fn section_4_2_1_freshness_that_is_no_number_is_none_at_all() {
        for value in ["-3600", "'3600'", "3600.0", "a", "3600a", "", " 3600", "\"\"", "\" 1\"", "\"5\"5", "1 2", "+5"] {
            assert_eq!(answer(&format!("max-age={value}")).max_age, Some(0), "{value}");
            assert_eq!(answer(&format!("public, s-maxage={value}")).s_maxage, Some(0), "{value}");
        }
        assert_eq!(answer("max-age").max_age, Some(0));
        assert_eq!(answer("max-age =3600").max_age, Some(0));
    }

    #[test]
    fn section_4_2_1_freshness_that_contradicts_itself_is_none_at_all() {
        assert_eq!(answer("max-age=5, max-age=9").max_age, Some(0));
        assert_eq!(Response::of(&lines(&["max-age=9", "max-age=5"])).max_age, Some(0));
        assert_eq!(answer("max-age=5, max-age=9, max-age=5").max_age, Some(0));
        assert_eq!(answer("max-age=5, max-age=\"5\"").max_age, Some(5), "said twice");
    }

    #[test]
    fn section_5_2_2_4_and_7_qualified_or_not() {
        let scopes = |line: &str| (answer(line).no_cache, answer(line).private);
        assert_eq!(scopes("no-cache, private"), (Some(Scope::All), Some(Scope::All)));
        assert_eq!(scopes("no-cache=\"a, b\", private=c"), (Some(Scope::Fields), Some(Scope::Fields)));
        assert_eq!(scopes("no-cache=\"a\", no-cache"), (Some(Scope::All), None));
        assert_eq!(scopes("private, private=a"), (None, Some(Scope::All)));
        for all in ["", " , ", "a b", "a;b", "vary", "x, Content-Encoding"] {
            assert_eq!(scopes(&format!("private=\"{all}\"")), (None, Some(Scope::All)), "{all}");
        }
        let headers = lines(&["no-cache=\"Set-Cookie, b\", x=\"d\"", "private=C, max-age=5"]);
        let names: Vec<_> = named_fields(&headers).collect();
        assert_eq!(names, ["set-cookie", "b", "c"]);
    }

    #[test]
    fn an_open_quote_hides_no_prohibition() {
        let said = answer("private=\"a, no-store, max-age=60");
        assert!(said.open_quote && said.no_store);
        assert_eq!(said.private, Some(Scope::All));
        assert!(!answer("private=\"a\", x=\"b\"").open_quote);
    }

    #[test]
    fn section_5_2_2_9_public_takes_no_argument() {
        assert!(answer("public").public);
        assert!(!answer("public=maybe").public);
        assert!(answer("no-store=maybe, must-revalidate=1").no_store);
    }

    #[test]
    fn section_5_2_1_what_a_request_asks() {
        let asked = request("max-age=5, min-fresh=\"6\", max-stale=7, only-if-cached, no-cache, no-store");
        let expected = Request {
            no_store: true,
            no_cache: true,
            only_if_cached: true,
            max_age: Some(5),
            min_fresh: Some(6),
            max_stale: Some(MaxStale::Seconds(7)),
            stale_if_error: None,
        };
        assert_eq!(asked, expected);
        assert_eq!(request("max-stale").max_stale, Some(MaxStale::Any));
        assert_eq!(request("stale-if-error=9").stale_if_error, Some(9));
    }

    #[test]
    fn section_5_2_1_the_stricter_of_two_wishes_counts() {
        let asked = request("max-age=5, max-age=9, min-fresh=5, min-fresh=9, max-stale, max-stale=9, max-stale=5");
        assert_eq!((asked.max_age, asked.min_fresh), (Some(5), Some(9)));
        assert_eq!(asked.max_stale, Some(MaxStale::Seconds(5)));
        assert_eq!(request("max-stale=5, max-stale").max_stale, Some(MaxStale::Seconds(5)));
        let asked = request("max-age=x, min-fresh=x, max-stale=x, stale-if-error=x");
        assert_eq!((asked.max_age, asked.min_fresh), (Some(0), Some(MAX_SECONDS)), "as good as no answer");
        assert_eq!((asked.max_stale, asked.stale_if_error), (None, None));
    }

    #[test]
    fn section_5_4_pragma_counts_where_there_is_nothing_better() {
        let asked = |fields: &[(&str, &str)]| Request::of(&map(fields)).no_cache;
        assert!(asked(&[("pragma", "No-Cache")]));
        assert!(asked(&[("pragma", "x=\"y\", no-cache")]));
        assert!(!asked(&[("pragma", "unrecognised-extension")]));
        assert!(!asked(&[("pragma", "no-cache"), ("cache-control", "max-age=60")]));
        assert_eq!(Response::of(&map(&[("pragma", "no-cache")])), Response::default(), "means nothing in an answer");
    }

    fn directive() -> impl Strategy<Value = String> {
        let known = "max-age=[0-9]{1,12}|s-maxage=[0-9]{1,4}|no-(store|cache|transform)|private|public|immutable|\
            (no-cache|private)=\"[a-c, ]{0,5}\"|(must|proxy)-revalidate|must-understand|max-stale(=[0-9])?|min-fresh=[0-9]|\
            stale-(if-error|while-revalidate)=[0-9x]|x=\"[a-z, =]{0,9}\"|only-if-cached";
        proptest::string::string_regex(known).unwrap()
    }

    proptest! {
        #[test]
        fn any_bytes_are_read(bytes in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..4)) {
            let mut headers = HeaderMap::new();
            for value in bytes.iter().filter_map(|line| HeaderValue::from_bytes(line).ok()) {
                headers.append(CACHE_CONTROL, value);
            }
            let (said, _) = (Response::of(&headers), Request::of(&headers));
            prop_assert!(said.max_age.is_none_or(|seconds| seconds <= MAX_SECONDS));
            named_fields(&headers).for_each(drop);
        }

        #[test]
        fn order_case_lines_and_white_space_say_nothing(
            (members, shuffled) in proptest::collection::vec(directive(), 0..6)
                .prop_flat_map(|members| (Just(members.clone()), Just(members).prop_shuffle())),
            gap in "[ \t]{0,2},[ ,\t]{0,3}",
        ) {
            let one = lines(&[&members.join(", ")]);
            let upper: String = shuffled.join(&gap).to_uppercase();
            let many = lines(&shuffled.iter().map(String::as_str).collect::<Vec<_>>());
            for other in [lines(&[&upper]), many] {
                prop_assert_eq!(Response::of(&one), Response::of(&other));
                prop_assert_eq!(Request::of(&one), if members.is_empty() { Request::default() } else { Request::of(&other) });
            }
        }
    }
}
