//! Paths of requests: the patterns that routes match them with, and the other ways to read one.
//!
//! Sidegate forwards a path byte for byte and matches those bytes. But `/%61dmin`, `/x/../admin` and
//! `//admin` are `/admin` to many a backend, so a policy that hangs on the path `/admin` must not be
//! escaped by another spelling of it. [`canonical`] reads a path the way the most obliging backend would,
//! [`readings`] in every way between that and byte for byte; `route` refuses what they disagree on.

use std::{borrow::Cow, error::Error as StdError, fmt, str::FromStr, sync::Arc};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A pattern for the path of a request, without its query.
///
/// - `/v1/models` matches exactly that path; `/v1/models/` is another one.
/// - `/bots/{id}/messages`: a segment in braces matches one segment of at least one byte, and names it.
/// - `/files/*`: a last segment `*` matches all below `/files/`, `/files/` and `/files` themselves.
///
/// Upper and lower case differ. Characters that a URI does not hold are written percent-encoded, with
/// upper-case digits.
///
/// ```
/// use sidegate::message::path::{Form, Pattern};
///
/// let pattern: Pattern = "/bots/{id}/*".parse()?;
/// assert!(pattern.matches(b"/bots/7/messages", Form::Raw));
/// assert!(pattern.matches(b"/bots/7", Form::Raw));
/// assert!(!pattern.matches(b"/bots//messages", Form::Raw));
/// # Ok::<(), sidegate::message::path::PatternError>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    text: Box<str>,
    parts: Box<[Part]>,
    /// Whether the last segment was `*`.
    open: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    /// Bytes from a slash up to the next parameter or the end, as written and percent-decoded.
    Literal { raw: Box<[u8]>, decoded: Box<[u8]> },
    /// One segment without its slashes.
    Parameter(Arc<str>),
}

/// Whether the percent-encodings of a path were decoded before it is matched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// As the request has it.
    Raw,
    /// Decoded.
    Decoded,
}

impl Pattern {
    /// Whether `path`, in the given form, is one of the pattern's.
    #[must_use]
    pub fn matches(&self, path: &[u8], form: Form) -> bool {
        self.walk(path, form, |_, _| ())
    }

    /// Whether there is a path that both match.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        let is_any = |segment: &str| segment.starts_with('{');
        let (mut own, mut others) = (self.segments(), other.segments());
        loop {
            match (own.next(), others.next()) {
                (Some(one), Some(two)) => {
                    let same = one == two || is_any(one) && !two.is_empty() || is_any(two) && !one.is_empty();
                    if !same {
                        return false;
                    }
                }
                (Some(_), None) => return other.open,
                (None, Some(_)) => return self.open,
                (None, None) => return true,
            }
        }
    }

    /// Whether the pattern names segments.
    #[must_use]
    pub fn has_parameters(&self) -> bool {
        self.parts.iter().any(|part| matches!(part, Part::Parameter(_)))
    }

    /// What it calls segments, in the order of the path.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Parameter(name) => Some(&**name),
            Part::Literal { .. } => None,
        })
    }

    /// The segments of `path` that the pattern names, from the path's [`canonical`] form. `None` where the
    /// pattern names none, or does not match.
    #[must_use]
    pub fn parameters(&self, path: &[u8]) -> Option<Parameters> {
        if !self.has_parameters() {
            return None;
        }
        let mut found = Vec::new();
        let matched = self.walk(&canonical(path), Form::Decoded, |name, value| {
            found.push((name.clone(), String::from_utf8_lossy(value).into()));
        });
        matched.then(|| Parameters(found.into()))
    }

    /// How narrow the pattern is: of two that match a path, the greater one is the more specific.
    ///
    /// An exact path comes before one with parameters, and that before one that ends in `*`. Among those
    /// with parameters, more literal segments come first; among those that end in `*`, more segments, then
    /// more literal ones. Where that is equal, the one whose first differing segment is literal.
    #[must_use]
    pub fn specificity(&self) -> Specificity {
        let segments: Vec<bool> = self.segments().map(|segment| !segment.starts_with('{')).collect();
        let literal = segments.iter().filter(|literal| **literal).count();
        let (class, first, second) = match (self.open, self.has_parameters()) {
            (false, false) => (2, 0, 0),
            (false, true) => (1, literal, segments.len()),
            (true, _) => (0, segments.len(), literal),
        };
        Specificity { class, first, second, literal: if class == 2 { Vec::new() } else { segments } }
    }

    fn segments(&self) -> impl Iterator<Item = &str> {
        let text = if self.open { self.text.strip_suffix("/*").unwrap_or_default() } else { &self.text };
        text.split('/').skip(1)
    }

    fn walk<'p>(&self, path: &'p [u8], form: Form, mut found: impl FnMut(&Arc<str>, &'p [u8])) -> bool {
        let mut rest = path;
        for part in &self.parts {
            match part {
                Part::Literal { raw, decoded } => {
                    let literal = if form == Form::Raw { raw } else { decoded };
                    match rest.strip_prefix(&**literal) {
                        Some(after) => rest = after,
                        None => return false,
                    }
                }
                Part::Parameter(name) => {
                    let end = rest.iter().position(|&byte| byte == b'/').unwrap_or(rest.len());
                    let (value, after) = rest.split_at(end);
                    if value.is_empty() {
                        return false;
                    }
                    found(name, value);
                    rest = after;
                }
            }
        }
        rest.is_empty() || (self.open && rest.starts_with(b"/"))
    }
}

impl FromStr for Pattern {
    type Err = PatternError;

    fn from_str(text: &str) -> Result<Self, PatternError> {
        if !text.starts_with('/') {
            return Err(PatternError("must start with `/`"));
        }
        let (listed, open) = match text.strip_suffix("/*") {
            Some(before) => (before, true),
            None => (text, false),
        };
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut segments = listed.split('/').skip(1).peekable();
        while let Some(segment) = segments.next() {
            literal.push('/');
            if let Some(name) = segment.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')) {
                if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_') {
                    return Err(PatternError("a parameter's name is made of letters, digits and `_`: `{id}`"));
                }
                let repeated = |part: &Part| matches!(part, Part::Parameter(known) if **known == *name);
                if parts.iter().any(repeated) {
                    return Err(PatternError("two parameters have the same name"));
                }
                parts.push(literal_part(&std::mem::take(&mut literal))?);
                parts.push(Part::Parameter(name.into()));
            } else {
                let last = segments.peek().is_none() && !open;
                if segment.is_empty() && !last {
                    return Err(PatternError("must not contain `//`"));
                }
                check_literal(segment)?;
                literal.push_str(segment);
            }
        }
        if !literal.is_empty() {
            parts.push(literal_part(&literal)?);
        }
        Ok(Self { text: text.into(), parts: parts.into(), open })
    }
}

fn check_literal(segment: &str) -> Result<(), PatternError> {
    if matches!(segment, "." | "..") {
        return Err(PatternError("must not contain a `.` or `..` segment"));
    }
    for byte in segment.bytes() {
        let reason = match byte {
            b'*' => "`*` can only be the whole last segment: `/files/*`",
            b'{' | b'}' => "braces can only hold a whole segment: `/bots/{id}`",
            b'?' | b'#' => "is matched against the path alone: leave out the query",
            b';' | b'\\' => "must not contain `;` or `\\`, which backends read in different ways",
            b'!'..=b'~' => continue,
            _ => "spaces, control and non-ASCII characters must be percent-encoded",
        };
        return Err(PatternError(reason));
    }
    Ok(())
}

fn literal_part(text: &str) -> Result<Part, PatternError> {
    // What is decoded once must stay what it is when it is read again, and must not be written otherwise.
    let allowed = |byte: u8| !byte.is_ascii_alphanumeric() && !b"-._~/%;\\".contains(&byte);
    let mut encodings = text.split('%').skip(1).map(|after| match *after.as_bytes() {
        [high, low, ..] => byte(high, low),
        _ => None,
    });
    if !encodings.all(|byte| byte.is_some_and(allowed)) {
        return Err(PatternError("holds a percent-encoding that is wrong, needless or ambiguous"));
    }
    Ok(Part::Literal { raw: text.as_bytes().into(), decoded: decode(text.as_bytes()).into() })
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(|error| de::Error::custom(format_args!("`{text}`: {error}")))
    }
}

impl Serialize for Pattern {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl JsonSchema for Pattern {
    fn schema_name() -> Cow<'static, str> {
        "PathPattern".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "A path: exact (`/v1/models`), with parameters (`/bots/{id}`), or all below one (`/files/*`).",
            "type": "string",
            "pattern": "^/",
        })
    }
}

/// Why a text is no [`Pattern`], and what would be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PatternError(&'static str);

impl fmt::Display for PatternError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

impl StdError for PatternError {}

/// How narrow a [`Pattern`] is; see [`Pattern::specificity`].
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Specificity {
    class: u8,
    first: usize,
    second: usize,
    literal: Vec<bool>,
}

/// The segments of a path that its route's pattern names, percent-decoded.
///
/// Request extension. Written by `route` where the pattern has parameters; read by the policies whose keys
/// name one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parameters(Arc<[(Arc<str>, Box<str>)]>);

impl Parameters {
    /// The segment that the pattern calls `name`.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(known, _)| *known == name).map(|(_, value)| value)
    }

    /// All of them, in the order of the path.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(name, value)| (&**name, &**value))
    }
}

/// Whether `path` reads the same to everyone: nothing encoded, no empty or dot segment, no `;` or `\`.
/// A file whose name starts with a dot is not plain either, which costs a second look and no more.
#[must_use]
pub fn is_plain(path: &[u8]) -> bool {
    let mut previous = 0;
    for &byte in path {
        match byte {
            b'%' | b';' | b'\\' => return false,
            b'/' | b'.' if previous == b'/' => return false,
            _ => previous = byte,
        }
    }
    true
}

/// The path as the most obliging backend reads it: percent-encodings decoded once, `\` as `/`, without
/// `;parameters`, empty segments or dot segments. Never more than the path's length.
///
/// ```
/// use sidegate::message::path::canonical;
///
/// assert_eq!(*canonical(b"/x;v=1/..//%61dmin/."), *b"/admin/");
/// assert_eq!(*canonical(b"/%2e%2e%5cetc"), *b"/etc");
/// ```
#[must_use]
pub fn canonical(path: &[u8]) -> Cow<'_, [u8]> {
    if is_plain(path) { Cow::Borrowed(path) } else { Cow::Owned(read(&decode(path), ALL)) }
}

/// Every way to read `path`, from byte for byte, which comes first, to [`canonical`]: each of the five
/// rewritings that change anything is done or not done. At most 32; one for a plain path.
///
/// Two readings are not enough: where a backend resolves `..` but keeps empty segments,
/// `/public/../admin//../public` is below `/admin`, though both extremes are below `/public`.
pub fn readings(path: &[u8]) -> impl Iterator<Item = (Form, Vec<u8>)> {
    let decoded = path.contains(&b'%').then(|| (Form::Decoded, decode(path)));
    [Some((Form::Raw, Cow::Borrowed(path))), decoded].into_iter().flatten().flat_map(|(form, bytes)| {
        let applicable = applicable(&bytes);
        (0..=ALL).filter(move |reading| reading & !applicable == 0).map(move |reading| (form, read(&bytes, reading)))
    })
}

/// Rewritings, as bits of a set.
const BACKSLASH: u8 = 1;
const STRIP: u8 = 2;
const MERGE: u8 = 4;
const DOTS: u8 = 8;
const ALL: u8 = BACKSLASH | STRIP | MERGE | DOTS;

/// The rewritings that may change `path`.
fn applicable(path: &[u8]) -> u8 {
    let is_slash = |byte: u8| byte == b'/' || byte == b'\\';
    let mut set = 0;
    let mut previous = 0;
    for &byte in path {
        match byte {
            b'\\' => set |= BACKSLASH,
            // A segment of nothing but parameters is an empty one.
            b';' => set |= STRIP | MERGE,
            _ => {}
        }
        if is_slash(previous) {
            set |= if is_slash(byte) { MERGE } else { 0 };
            set |= if byte == b'.' { DOTS } else { 0 };
        }
        previous = byte;
    }
    set
}

fn read(path: &[u8], rewritings: u8) -> Vec<u8> {
    let does = |one: u8| rewritings & one != 0;
    let is_slash = |byte: &u8| *byte == b'/' || (*byte == b'\\' && does(BACKSLASH));
    let mut out = Vec::with_capacity(path.len());
    // `*`, the target of a server-wide OPTIONS, is not hierarchical.
    if !path.first().is_some_and(is_slash) {
        out.extend_from_slice(path);
        return out;
    }
    let mut segments = path.split(is_slash).skip(1).peekable();
    while let Some(segment) = segments.next() {
        let last = segments.peek().is_none();
        let segment = match segment.iter().position(|&byte| byte == b';') {
            Some(end) if does(STRIP) => segment.get(..end).unwrap_or_default(),
            _ => segment,
        };
        match segment {
            b"." | b".." if does(DOTS) => {
                if segment == b".." {
                    out.truncate(out.iter().rposition(|&byte| byte == b'/').unwrap_or(0));
                }
                if last {
                    out.push(b'/');
                }
            }
            b"" if does(MERGE) && !last => {}
            _ => {
                out.push(b'/');
                out.extend_from_slice(segment);
            }
        }
    }
    if out.is_empty() {
        out.push(b'/');
    }
    out
}

/// Decodes percent-encodings once; a `%` without two hexadecimal digits stands for itself.
#[must_use]
pub fn decode(text: &[u8]) -> Cow<'_, [u8]> {
    if !text.contains(&b'%') {
        return Cow::Borrowed(text);
    }
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text;
    loop {
        rest = match *rest {
            [] => break,
            [first, ref after @ ..] => {
                let encoded = match *after {
                    [high, low, ref tail @ ..] if first == b'%' => byte(high, low).map(|byte| (byte, tail)),
                    _ => None,
                };
                let (byte, after) = encoded.unwrap_or((first, after));
                out.push(byte);
                after
            }
        }
    }
    Cow::Owned(out)
}

/// A path, with its query or without, in the one of its spellings that RFC 3986 §6.2.2 prefers: what need not be encoded is
/// not, encodings are in upper case, and what cannot stand in a URL is encoded. It is what the path is called by, and not
/// what is sent: backends may tell spellings apart.
///
/// ```
/// use sidegate::message::path::normal;
///
/// assert_eq!(normal("/%7ejo/caf%c3%a9?q=%2f"), "/~jo/caf%C3%A9?q=%2F");
/// assert_eq!(normal("/café au lait"), "/caf%C3%A9%20au%20lait");
/// ```
#[must_use]
pub fn normal(text: &str) -> Cow<'_, str> {
    if text.bytes().all(|byte| byte.is_ascii_graphic() && byte != b'%') {
        return Cow::Borrowed(text);
    }
    let mut out = String::with_capacity(text.len() + 16);
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        let encoded = match after {
            [high, low, tail @ ..] if *first == b'%' => byte(*high, *low).map(|byte| (byte, tail)),
            _ => None,
        };
        let is_encoded = encoded.is_some();
        let (byte, after) = encoded.unwrap_or((*first, after));
        let stays = if is_encoded { is_unreserved(byte) } else { byte.is_ascii_graphic() && byte != b'%' };
        if stays {
            out.push(char::from(byte));
        } else {
            encode(byte, &mut out);
        }
        rest = after;
    }
    Cow::Owned(out)
}

/// Appends the percent-encoding of a byte.
pub fn encode(byte: u8, to: &mut String) {
    const DIGITS: &[u8; 16] = b"0123456789ABCDEF";
    let digit = |half: u8| char::from(DIGITS[usize::from(half & 0xF)]);
    to.extend(['%', digit(byte >> 4), digit(byte)]);
}

/// What means the same encoded or not (RFC 3986 §2.3).
#[must_use]
pub fn is_unreserved(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"-._~".contains(&byte)
}

fn byte(high: u8, low: u8) -> Option<u8> {
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
    Some(digit(high)? << 4 | digit(low)?)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pattern(text: &str) -> Pattern {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn a_pattern_matches_what_its_words_say() {
        let cases: [(&str, &[&str], &[&str]); 8] = [
            ("/", &["/"], &["", "//", "/a", "*"]),
            ("/*", &["/", "/a", "/a/b", "//"], &["*"]),
            ("/a/b", &["/a/b"], &["/a", "/a/", "/a/b/", "/A/b", "/a/bc", "/%61/b"]),
            ("/a/", &["/a/"], &["/a", "/a/b"]),
            ("/files/*", &["/files", "/files/", "/files/x", "/files//"], &["/filesx", "/file", "/"]),
            ("/bots/{id}", &["/bots/7", "/bots/a%2Fb"], &["/bots", "/bots/", "/bots/7/", "/bots/7/x"]),
            ("/bots/{id}/x", &["/bots/7/x"], &["/bots//x", "/bots/7/y", "/bots/7/x/"]),
            ("/{a}/{b}/*", &["/1/2", "/1/2/3/4"], &["/1", "/1/", "//2"]),
        ];
        for (text, matching, others) in cases {
            for path in matching {
                assert!(pattern(text).matches(path.as_bytes(), Form::Raw), "{text} {path}");
            }
            for path in others {
                assert!(!pattern(text).matches(path.as_bytes(), Form::Raw), "{text} {path}");
            }
        }
    }

    #[test]
    fn two_patterns_meet_where_there_is_a_path_for_both() {
        for (one, two, meet) in [
            ("/a", "/a", true),
            ("/a", "/a/", false),
            ("/a/*", "/a", true),
            ("/a/*", "/a/", true),
            ("/a/*", "/b/*", false),
            ("/*", "/a/{id}", true),
            ("/a/{id}", "/a/b", true),
            ("/a/{id}", "/a/", false),
            ("/a/{id}", "/a/{x}/c", false),
            ("/a/{id}/*", "/{x}/b/c", true),
            ("/a/{id}/c", "/{x}/b/d", false),
        ] {
            assert_eq!(pattern(one).meets(&pattern(two)), meet, "{one} {two}");
            assert_eq!(pattern(two).meets(&pattern(one)), meet, "{two} {one}");
        }
    }

    #[test]
    fn an_encoded_pattern_matches_in_both_forms() {
        let pattern = pattern("/f%C3%BC%20r");
        assert!(pattern.matches(b"/f%C3%BC%20r", Form::Raw));
        assert!(pattern.matches("/fü r".as_bytes(), Form::Decoded));
        assert!(!pattern.matches(b"/f%C3%BC%20r", Form::Decoded));
    }

    #[test]
    fn what_cannot_be_matched_is_no_pattern() {
        let bad = [
            "", "a", "*", "/a*", "/*/a", "/a/*/", "/{}", "/{a b}", "/x{id}", "/{id}x", "/{id", "/{a}/{a}", "/a//b",
            "//", "/a/../b", "/.", "/a?b", "/a#b", "/a;b", "/a\\b", "/a b", "/ü", "/%", "/%4", "/%%%", "/%zz", "/%61",
            "/%2F", "/%25", "/%3b", "/%2e%2e", "//*",
        ];
        for text in bad {
            assert!(text.parse::<Pattern>().is_err(), "{text}");
        }
        let error = "/files/*.js".parse::<Pattern>().unwrap_err().to_string();
        assert_eq!(error, "`*` can only be the whole last segment: `/files/*`");
    }

    #[test]
    fn the_more_specific_pattern_is_greater() {
        let order = [
            "/a/b/c",
            "/a/{x}/c",
            "/{x}/b/c",
            "/a/{x}/{y}",
            "/{x}/{y}/c",
            "/{x}/{y}/{z}",
            "/a/b/c/*",
            "/a/{x}/c/*",
            "/a/b/*",
            "/a/{x}/*",
            "/{x}/b/*",
            "/a/*",
            "/{x}/*",
            "/*",
        ];
        for pair in order.windows(2) {
            let [first, second] = pair else { continue };
            assert!(pattern(first).specificity() > pattern(second).specificity(), "{first} before {second}");
        }
        assert_eq!(pattern("/a").specificity(), pattern("/b/c").specificity(), "no path matches two exact patterns");
    }

    #[test]
    fn parameters_are_read_decoded() {
        let found = pattern("/bots/{id}/{part}/*").parameters(b"/bots/%61%20b;v=1//x").unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), [("id", "a b"), ("part", "x")]);
        assert_eq!(found.get("part"), Some("x"));
        assert_eq!(found.get("other"), None);
        assert_eq!(pattern("/bots/*").parameters(b"/bots/1"), None);
        assert_eq!(pattern("/{id}").parameters(b"/a%2Fb"), None);
    }

    #[test]
    fn a_path_is_read_as_the_most_obliging_backend_does() {
        let cases = [
            ("/", "/"),
            ("/a/b", "/a/b"),
            ("/a/", "/a/"),
            ("//", "/"),
            ("//a///b//", "/a/b/"),
            ("/a/./b", "/a/b"),
            ("/a/../b", "/b"),
            ("/../../b", "/b"),
            ("/a/b/..", "/a/"),
            ("/a/.", "/a/"),
            ("/..", "/"),
            ("/.hidden/..x", "/.hidden/..x"),
            ("/%61dmin", "/admin"),
            ("/a%2Fb%2f..%2Fc", "/a/c"),
            ("/a%5C..%5cb", "/b"),
            ("/a\\b", "/a/b"),
            ("/\\a", "/a"),
            ("/a;x=1/b;y", "/a/b"),
            ("/a%3Bx/b", "/a/b"),
            ("/a/..;/b", "/b"),
            ("/;/a", "/a"),
            ("/%2561", "/%61"),
            ("/%zz%4", "/%zz%4"),
            ("/a/..//b", "/b"),
            ("*", "*"),
            ("", ""),
        ];
        for (path, expected) in cases {
            let found = canonical(path.as_bytes());
            assert_eq!(String::from_utf8_lossy(&found), expected, "{path}");
        }
    }

    #[test]
    fn a_reading_between_the_extremes_is_found() {
        let path = b"/public/../admin//../public/x";
        assert_eq!(*canonical(path), *b"/public/x");
        assert!(readings(path).any(|(_, read)| read == b"/admin/public/x"));
        assert_eq!(readings(b"/plain").count(), 1);
    }

    proptest! {
        #[test]
        fn any_path_is_read_without_a_panic(path: Vec<u8>) {
            prop_assert!(canonical(&path).len() <= path.len());
            prop_assert!(readings(&path).count() <= 32);
        }

        #[test]
        fn the_extremes_are_among_the_readings(path in "/[a./;%25\\\\]{0,16}") {
            let path = path.as_bytes();
            let all: Vec<_> = readings(path).collect();
            prop_assert_eq!(all.first(), Some(&(Form::Raw, path.to_vec())));
            prop_assert!(all.iter().any(|(_, read)| *read == *canonical(path)));
            if is_plain(path) {
                prop_assert_eq!(all.len(), 1);
            }
        }

        #[test]
        fn reading_what_was_read_changes_nothing(path in "/[ab./;\\\\]{0,24}") {
            let once = canonical(path.as_bytes()).into_owned();
            prop_assert_eq!(&*canonical(&once), &*once);
            prop_assert!(once.starts_with(b"/"));
        }

        #[test]
        fn encoding_a_path_does_not_change_its_reading(path in "/[ab./;]{0,16}") {
            let encoded = path.bytes().map(|byte| format!("%{byte:02x}")).collect::<Vec<_>>().concat();
            let (encoded, path) = (format!("/{encoded}"), format!("/{path}"));
            prop_assert_eq!(canonical(encoded.as_bytes()), canonical(path.as_bytes()));
        }

        #[test]
        fn all_spellings_have_one_normal_form(text in "/[a~/%?é ]{0,16}", more: String) {
            for text in [text, more] {
                let once = normal(&text).into_owned();
                prop_assert_eq!(&*normal(&once), &*once);
                let encoded = text.bytes().map(|byte| format!("%{byte:02x}")).collect::<Vec<_>>().concat();
                // What is reserved means something else when it is encoded.
                let reserved = |byte: u8| byte.is_ascii_graphic() && !is_unreserved(byte);
                if !text.bytes().any(reserved) {
                    prop_assert_eq!(normal(&encoded), once);
                }
            }
        }

        #[test]
        fn any_text_is_a_pattern_or_an_error(text in "/?[a{}*/.%2;\\\\ü]{0,12}", path: Vec<u8>) {
            if let Ok(pattern) = text.parse::<Pattern>() {
                prop_assert_eq!(pattern.to_string(), text);
                let _matched = (pattern.matches(&path, Form::Raw), pattern.matches(&path, Form::Decoded));
                let _read = (pattern.parameters(&path), pattern.specificity());
            }
        }

        #[test]
        fn a_pattern_without_parameters_matches_itself(text in "(/[ab.%20]{1,3}){1,4}/?(/\\*)?") {
            if let Ok(pattern) = text.parse::<Pattern>() {
                let path = text.strip_suffix("/*").unwrap_or(&text);
                prop_assert!(pattern.matches(path.as_bytes(), Form::Raw));
                prop_assert!(pattern.matches(&canonical(path.as_bytes()), Form::Decoded));
            }
        }
    }
}
