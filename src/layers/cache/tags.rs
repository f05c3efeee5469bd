//! What stored answers are found by when they are to be dropped: tags that they were given, and globs over their paths.

use std::{borrow::Cow, fmt, str::FromStr};

use http::{HeaderMap, HeaderName};
use serde::{Deserialize, Deserializer, de::Error};

use super::key::field;
use crate::{
    config::text,
    message::path::{Parameters, decode, encode, normal},
};

/// The longest tag, in bytes.
pub(super) const MAX_TAG: usize = 256;
/// The longest glob, in bytes.
const MAX_GLOB: usize = 512;

/// How a tag is made of a request: `bot:{id}` with a parameter of the path, `user:{header:x-user}` with a field,
/// `q:{query:q}` with a parameter of the query, or any of these together.
///
/// A tag is made of visible ASCII characters, without `{}`, `%`, `"`, `\` and the comma. What else stands in a value is
/// percent-encoded in it, so that two values never make the same of one placeholder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    text: String,
    pieces: Vec<Piece>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Piece {
    Literal(String),
    Path(String),
    Query(String),
    Header(HeaderName),
}

/// What of a request tags are made of.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    /// Those of the path, where its route names any.
    pub(super) parameters: Option<&'a Parameters>,
    pub(super) query: Option<&'a str>,
    pub(super) headers: &'a HeaderMap,
}

/// A tag would be longer than 256 bytes. What cannot be tagged cannot be found again: it must not be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct TooLong;

impl Template {
    /// The parameters of the path that have a place in it.
    pub fn parameters(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Path(name) => Some(&**name),
            _ => None,
        })
    }

    /// The parameters of the query that have a place in it.
    pub fn queries(&self) -> impl Iterator<Item = &str> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Query(name) => Some(&**name),
            _ => None,
        })
    }

    /// The fields that have a place in it. Tags can be read by many, so that none should be a credential.
    pub fn headers(&self) -> impl Iterator<Item = &HeaderName> {
        self.pieces.iter().filter_map(|piece| match piece {
            Piece::Header(name) => Some(name),
            _ => None,
        })
    }

    /// The tag for a request; `None` where it lacks a value that has a place in it. One that is empty is not lacking.
    ///
    /// # Errors
    /// That it is too long.
    pub(super) fn render(&self, from: &Source<'_>) -> Result<Option<String>, TooLong> {
        let mut tag = String::new();
        for piece in &self.pieces {
            let value = match piece {
                Piece::Literal(text) => Some(Cow::Borrowed(text.as_bytes())),
                Piece::Path(name) => {
                    from.parameters.and_then(|known| known.get(name)).map(|value| value.as_bytes().into())
                }
                Piece::Query(name) => from.query.and_then(|query| parameter(query, name)),
                Piece::Header(name) => field(from.headers, name),
            };
            let Some(value) = value else { return Ok(None) };
            write(&value, is_plain, &mut tag)?;
        }
        Ok(Some(tag))
    }
}

/// The tag that an operator names: as it is listed, or with characters that it has percent-encoded. `None` where no tag
/// is called so.
#[must_use]
pub fn named(text: &str) -> Option<String> {
    let mut tag = String::new();
    write(text.as_bytes(), |byte| is_plain(byte) || byte == b'%', &mut tag).ok()?;
    (!tag.is_empty()).then_some(tag)
}

const fn is_plain(byte: u8) -> bool {
    byte.is_ascii_graphic() && !matches!(byte, b'{' | b'}' | b'%' | b'"' | b'\\' | b',')
}

fn write(value: &[u8], is_plain: impl Fn(u8) -> bool, tag: &mut String) -> Result<(), TooLong> {
    for &byte in value {
        if is_plain(byte) {
            tag.push(char::from(byte));
        } else {
            encode(byte, tag);
        }
        if tag.len() > MAX_TAG {
            return Err(TooLong);
        }
    }
    Ok(())
}

/// The first parameter of the query with this name, decoded.
fn parameter<'a>(query: &'a str, name: &str) -> Option<Cow<'a, [u8]>> {
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let (_, value) = pairs.find(|(known, _)| *decode(known.as_bytes()) == *name.as_bytes())?;
    Some(decode(value.as_bytes()))
}

impl FromStr for Template {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const PLACES: &str = "`{id}` (a parameter of the path), `{query:NAME}` or `{header:NAME}`";
        let wrong = |why: String| format!("`{text}` is no tag: {why}");
        let mut pieces = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (literal, place) = rest.split_once('{').unwrap_or((rest, ""));
            if !literal.bytes().all(is_plain) {
                return Err(wrong(
                    "it is made of visible ASCII characters without `%`, `\"`, `\\` and the comma".into(),
                ));
            }
            if !literal.is_empty() {
                pieces.push(Piece::Literal(literal.to_owned()));
            }
            if literal.len() == rest.len() {
                break;
            }
            let (place, after) = place.split_once('}').ok_or_else(|| wrong("a `{` is not closed".into()))?;
            let unknown = || wrong(format!("`{{{place}}}` is no place: there are {PLACES}"));
            pieces.push(match place.split_once(':') {
                Some(("query", name)) if !name.is_empty() => Piece::Query(name.to_owned()),
                Some(("header", name)) => Piece::Header(name.parse().map_err(|_| unknown())?),
                None if is_parameter(place) => Piece::Path(place.to_owned()),
                _ => return Err(unknown()),
            });
            rest = after;
        }
        if !(1..=MAX_TAG).contains(&text.len()) {
            return Err(wrong(format!("write 1 to {MAX_TAG} characters")));
        }
        Ok(Self { text: text.to_owned(), pieces })
    }
}

/// As patterns of paths have them.
fn is_parameter(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

text!(Template, "CacheTag", {
    "description": "A tag: `bot:{id}` with a parameter of the path, `q:{query:q}`, `user:{header:x-user}`.",
    "minLength": 1,
    "maxLength": MAX_TAG,
    "pattern": r#"^([^{}%",\\\s]|\{([A-Za-z0-9_]+|(query|header):[^{}]+)\})+$"#,
});

/// Paths with their queries, `/bots/*?page=?`: `*` is any run of characters, slashes included, `?` is any one, a question
/// mark included, and everything else is itself.
///
/// Both are in their [normal] form.
///
/// To match takes as many steps as the text is long, times the longest part of the glob between two `*`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Glob(String);

impl Glob {
    /// Whether it matches a path with its query as they were sent, from the beginning to the end.
    #[must_use]
    pub fn matches(&self, text: &str) -> bool {
        let (mut glob, mut rest) = (self.0.chars(), text.chars());
        // After the last `*`, and where that has ended for now. What an earlier one takes need not be tried again: the
        // last one can take more instead.
        let mut last = None;
        loop {
            let before = rest.clone();
            match (glob.next(), rest.next()) {
                (Some('*'), _) => {
                    rest = before;
                    last = Some((glob.clone(), rest.clone()));
                }
                (None, None) => return true,
                (Some(one), Some(other)) if one == '?' || one == other => {}
                // Later on there is even less of the text.
                (_, None) => return false,
                _ => match &mut last {
                    Some((after, end)) => {
                        end.next();
                        (glob, rest) = (after.clone(), end.clone());
                    }
                    None => return false,
                },
            }
        }
    }
}

impl FromStr for Glob {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.len() > MAX_GLOB {
            return Err(format!("a glob has at most {MAX_GLOB} bytes"));
        }
        if !text.starts_with(['/', '*', '?']) {
            return Err(format!("`{text}` matches no path: begin it with `/` or `*`, as in `/bots/*`"));
        }
        Ok(Self(normal(text).into_owned()))
    }
}

impl fmt::Display for Glob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Glob {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;
    use crate::message::path::Pattern;

    fn rendered(
        template: &str,
        path: &str,
        query: Option<&str>,
        user: Option<&str>,
    ) -> Result<Option<String>, TooLong> {
        let template: Template = template.parse().unwrap();
        let parameters = "/bots/{id}/*".parse::<Pattern>().unwrap().parameters(path.as_bytes());
        let mut headers = HeaderMap::new();
        if let Some(user) = user {
            headers.insert("x-user", HeaderValue::from_bytes(user.as_bytes()).unwrap());
        }
        template.render(&Source { parameters: parameters.as_ref(), query, headers: &headers })
    }

    fn of(template: &str) -> Option<String> {
        rendered(template, "/bots/7/x", Some("a=1&q=two%20words&q=3&e="), Some("ann")).unwrap()
    }

    #[test]
    fn a_tag_is_made_of_the_request() {
        assert_eq!(of("bots").as_deref(), Some("bots"));
        assert_eq!(of("bot:{id}").as_deref(), Some("bot:7"));
        assert_eq!(of("{header:X-User}/{query:a}-{id}").as_deref(), Some("ann/1-7"));
        assert_eq!(of("q:{query:q}").as_deref(), Some("q:two%20words"), "the first, decoded");
        assert_eq!(of("e:{query:e}").as_deref(), Some("e:"), "empty is a value");
    }

    #[test]
    fn a_tag_that_lacks_a_value_is_left_out() {
        assert_eq!(of("q:{query:none}"), None);
        assert_eq!(of("{header:x-none}{id}"), None);
        assert_eq!(rendered("bot:{id}", "/other", None, None), Ok(None));
        assert_eq!(rendered("q:{query:q}", "/bots/7", None, None), Ok(None));
    }

    #[test]
    fn what_has_no_place_in_a_tag_is_encoded() {
        let user = |user| rendered("u:{header:x-user}", "/", None, Some(user)).unwrap().unwrap();
        assert_eq!(user("a b,c"), "u:a%20b%2Cc");
        assert_eq!(user("ä%20{}\\\""), "u:%C3%A4%2520%7B%7D%5C%22");
        assert_eq!(user("a:/?*@=~b"), "u:a:/?*@=~b");
    }

    #[test]
    fn a_long_tag_is_an_error() {
        let user = |len| rendered("u:{header:x-user}", "/", None, Some(&"x".repeat(len)));
        assert_eq!(user(MAX_TAG - 2).unwrap().unwrap().len(), MAX_TAG);
        assert_eq!(user(MAX_TAG - 1), Err(TooLong));
        assert_eq!(user(1 << 20), Err(TooLong));
    }

    #[test]
    fn an_operator_names_a_tag_as_it_is_listed_or_as_it_is_meant() {
        assert_eq!(named("u:a b,ä").as_deref(), Some("u:a%20b%2C%C3%A4"));
        assert_eq!(named("u:a%20b%2C%C3%A4").as_deref(), Some("u:a%20b%2C%C3%A4"));
        assert_eq!((named(""), named(&"x".repeat(MAX_TAG + 1))), (None, None));
    }

    #[test]
    fn its_places_are_told() {
        let template: Template = "{a}:{header:x-b}:{query:c}:{d_1}".parse().unwrap();
        assert_eq!(template.parameters().collect::<Vec<_>>(), ["a", "d_1"]);
        assert_eq!(template.headers().collect::<Vec<_>>(), ["x-b"]);
        assert_eq!(template.to_string(), "{a}:{header:x-b}:{query:c}:{d_1}");
    }

    #[test]
    fn what_is_no_template_is_a_mistake() {
        let wrong = |text: &str| text.parse::<Template>().unwrap_err();
        for text in [
            "",
            "a b",
            "a,b",
            "ä",
            "a}",
            "{",
            "{id",
            "a{}",
            "{a-b}",
            "{a{b}",
            "{query:}",
            "{header:}",
            "{header:a b}",
            "50%",
        ] {
            assert!(wrong(text).starts_with(&format!("`{text}` is no tag: ")), "{text}");
        }
        assert!(wrong("x:{cookie:y}").contains("`{cookie:y}` is no place: there are `{id}`"));
        assert!(wrong(&"x".repeat(MAX_TAG + 1)).ends_with("write 1 to 256 characters"));
    }

    fn glob(text: &str) -> Glob {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_glob_matches_what_its_words_say() {
        let cases: [(&str, &[&str], &[&str]); 7] = [
            ("/a", &["/a"], &["/a/", "/A", "/", "", "/a?b"]),
            ("/a*", &["/a", "/a/b?c=d", "/ab"], &["/b", "x/a"]),
            (
                "/bots/*/messages?page=*",
                &["/bots/7/messages?page=2", "/bots/7/8/messages?page="],
                &["/bots/7/messages"],
            ),
            ("/?", &["/a", "/é", "/?"], &["/", "/ab"]),
            ("*", &["", "/", "*"], &[]),
            ("*b*", &["b", "/abc"], &["/ac", ""]),
            ("/**x", &["/x", "/axx"], &["/xa"]),
        ];
        for (text, matching, others) in cases {
            assert!(matching.iter().all(|path| glob(text).matches(path)), "{text}");
            assert!(!others.iter().any(|path| glob(text).matches(path)), "{text}");
        }
    }

    #[test]
    fn a_glob_that_matches_nothing_is_a_mistake() {
        for text in ["", "bots/*", "https://a/", &"/".repeat(MAX_GLOB + 1)] {
            assert!(text.parse::<Glob>().is_err(), "{text}");
        }
    }

    #[test]
    fn many_stars_take_no_longer_than_few() {
        let glob = glob(&("*a".repeat(MAX_GLOB / 2 - 1) + "*b"));
        assert!(!glob.matches(&"a".repeat(64 * 1024)));
    }

    /// As it is defined.
    fn naive(glob: &[char], text: &[char]) -> bool {
        match (glob, text) {
            ([], _) => text.is_empty(),
            (['*', after @ ..], _) => (0..=text.len()).any(|taken| naive(after, &text[taken..])),
            (['?', after @ ..], [_, rest @ ..]) => naive(after, rest),
            ([one, after @ ..], [other, rest @ ..]) => one == other && naive(after, rest),
            (_, []) => false,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        #[test]
        fn a_glob_is_what_it_is_defined_to_be(pattern in "[/*?][ab?*é/]{0,7}", text in "/?[ab?é*/]{0,9}") {
            let chars = |text: &str| text.chars().collect::<Vec<_>>();
            prop_assert_eq!(glob(&pattern).matches(&text), naive(&chars(&normal(&pattern)), &chars(&text)));
        }

        #[test]
        fn two_values_never_make_the_same_of_one_place(one in "[ -~é]{0,6}", other in "[ -~é]{0,6}") {
            let tag = |user: &str| rendered("u:{header:x-user}", "/", None, Some(user)).unwrap().unwrap();
            prop_assert_eq!(tag(&one) == tag(&other), one == other);
            prop_assert!(tag(&one).bytes().all(|byte| byte == b'%' || is_plain(byte)));
            prop_assert_eq!(named(&tag(&one)), Some(tag(&one)));
        }

        #[test]
        fn any_text_is_a_template_or_a_mistake(text in "[a{}:%, query\u{e9}header_]{0,16}") {
            if let Ok(template) = text.parse::<Template>() {
                prop_assert_eq!(template.to_string(), text);
            }
        }
    }
}
