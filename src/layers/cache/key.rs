//! Under which key an answer is stored: a hash of all that it depends on, in which nothing can be read.
//!
//! Each part goes into it with a tag and its length, so that no two requests that differ in a part have the same key.
//! What the key leaves apart needlessly costs a hit; what it throws together gives somebody another's answer.

use std::{borrow::Cow, fmt, str::FromStr};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method,
    header::{ACCEPT, CONTENT_TYPE, COOKIE},
};
use ring::digest::{Context, SHA256};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::vary;
use crate::message::{headers::X_FORWARDED_HOST, path::decode};

/// The key of a stored answer: 256 bits that nobody finds a second request for.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key([u8; 32]);

impl Key {
    /// Its bytes.
    pub(super) fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The same key among those of these settings, which are part of it.
    pub(super) fn within(&self, settings: &[u8]) -> Self {
        let mut hash = Hash::new("redis");
        hash.put(Tag::Scope, settings);
        hash.put(Tag::Of, &self.0);
        hash.finish()
    }

    /// In 64 hexadecimal digits.
    #[must_use]
    pub fn hex(&self) -> String {
        const DIGITS: &[u8; 16] = b"0123456789abcdef";
        let digit = |half: u8| char::from(DIGITS[usize::from(half & 0xF)]);
        self.0.iter().flat_map(|byte| [digit(byte >> 4), digit(*byte)]).collect()
    }

    /// What [`hex`](Self::hex) has written.
    #[must_use]
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut key = [0; 32];
        let digits: &[u8; 64] = text.as_bytes().try_into().ok()?;
        for (byte, digits) in key.iter_mut().zip(digits.chunks_exact(2)) {
            let digit = |digit: &u8| char::from(*digit).to_digit(16).and_then(|digit| u8::try_from(digit).ok());
            *byte = digits.iter().try_fold(0, |byte, half| Some(byte << 4 | digit(half)?))?;
        }
        Some(Self(key))
    }

    /// The key of the variant for a request with these fields, where this is the key of what varies: of an answer with
    /// `Vary` (RFC 9111 §4.1). The names are those of [`vary::names`].
    #[must_use]
    pub(super) fn with_vary(&self, names: &[HeaderName], request: &HeaderMap) -> Self {
        let mut hash = Hash::new("vary");
        hash.put(Tag::Of, &self.0);
        vary::canonical(names, request, |piece| hash.0.update(piece));
        hash.finish()
    }
}

/// The first of its digits, which are enough to tell two from each other in a log.
impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(")?;
        for byte in &self.0[..8] {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}

/// What proxies before us say about where the client thinks it is.
const FORWARDED: [HeaderName; 2] =
    [HeaderName::from_static("x-forwarded-port"), HeaderName::from_static("x-forwarded-prefix")];

/// What makes keys of requests: the same for all of a route.
#[derive(Debug, Clone, Copy)]
pub(super) struct Keys<'a> {
    /// What shares its answers: the route, by its name, or what several have agreed on.
    pub(super) scope: &'a str,
    /// What counts besides method, host, path, query and credentials.
    pub(super) parts: &'a [KeyPart],
    /// The parameters of the query that do not count.
    pub(super) ignored: &'a [QueryName],
    /// The fields that credentials stand in.
    pub(super) credentials: &'a [HeaderName],
    /// Whether the answer is the same whoever asks, by what the operator says.
    pub(super) shared: bool,
}

/// What of a request its key is made of. Some of it is secret: it shows in no debug output.
#[derive(Clone, Copy)]
pub(super) struct Asks<'a> {
    pub(super) method: &'a Method,
    /// Whether the client came by `https`. An answer to one of the two may be that one should use the other.
    pub(super) https: bool,
    /// The authority, with its port where it has one.
    pub(super) host: &'a str,
    /// As it was sent.
    pub(super) path: &'a str,
    /// As it was sent.
    pub(super) query: Option<&'a str>,
    pub(super) headers: &'a HeaderMap,
    /// The id of the authenticated principal.
    pub(super) principal: Option<&'a str>,
    /// Its tier.
    pub(super) tier: Option<&'a str>,
    /// The id of the session, as layers may see it.
    pub(super) session: Option<&'a str>,
    /// The [digest](super::canonical::digest) of the body.
    pub(super) body: Option<&'a [u8]>,
}

impl Keys<'_> {
    /// The key of what the request asks for. `HEAD` has that of `GET` (RFC 9111 §4).
    ///
    /// Unless it is `shared`, the credentials that the request still has are part of it, and so are the principal and the
    /// session.
    pub(super) fn key(&self, asks: &Asks<'_>) -> Key {
        let mut hash = Hash::new("key");
        hash.put(Tag::Scope, self.scope.as_bytes());
        let method = if asks.method == Method::HEAD { &Method::GET } else { asks.method };
        hash.put(Tag::Method, method.as_str().as_bytes());
        hash.put(if asks.https { Tag::Https } else { Tag::Http }, authority(asks.host, asks.https).as_bytes());
        hash.put(Tag::Path, asks.path.as_bytes());
        // From a proxy that is trusted: pages may be written for the host that the client knows. Where the host makes no
        // difference, neither does what is said about it.
        let named = asks.headers.get(X_FORWARDED_HOST).and_then(|host| host.to_str().ok());
        let named = named.map(|named| authority(named, asks.https)).filter(|_| !asks.host.is_empty());
        if let Some(named) = named.filter(|named| *named != authority(asks.host, asks.https)) {
            hash.put(Tag::Forwarded, named.as_bytes());
        }
        for name in &FORWARDED {
            if let Some(value) = field(asks.headers, name) {
                hash.put(Tag::Header, name.as_str().as_bytes());
                hash.put(Tag::Value, &value);
            }
        }
        if let Some(query) = asks.query.and_then(|query| without(self.ignored, query)) {
            hash.put(Tag::Query, query.as_bytes());
        }
        if asks.method == Method::POST {
            // What is made of a body is often negotiated without a word in `Vary`: a stream, or JSON. And whether it is read
            // at all may depend on what it says it is.
            hash.put(Tag::Accept, &[]);
            vary::canonical(&[ACCEPT, CONTENT_TYPE], asks.headers, |piece| hash.0.update(piece));
        }
        for part in self.parts {
            match part {
                KeyPart::Body => hash.maybe(Tag::Body, asks.body),
                KeyPart::Principal => hash.maybe(Tag::Principal, asks.principal.map(str::as_bytes)),
                KeyPart::Header(name) => {
                    hash.put(Tag::Header, name.as_str().as_bytes());
                    hash.field(asks.headers, name);
                }
                KeyPart::Cookie(name) => {
                    hash.put(Tag::Cookie, name.as_bytes());
                    for value in cookies(asks.headers, name.as_bytes()) {
                        hash.put(Tag::Value, value);
                    }
                }
            }
        }
        if !self.shared {
            hash.maybe(Tag::Owner, asks.principal.map(str::as_bytes));
            hash.maybe(Tag::Tier, asks.tier.map(str::as_bytes));
            hash.maybe(Tag::Session, asks.session.map(str::as_bytes));
            for name in self.credentials {
                for value in asks.headers.get_all(name) {
                    hash.put(Tag::Credential, name.as_str().as_bytes());
                    hash.put(Tag::Value, value.as_bytes());
                }
            }
        }
        hash.finish()
    }
}

/// What the bytes after it are. A number is never used for something else: keys outlive the program, in Redis.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Tag {
    Domain = 1,
    Scope,
    Method,
    Http,
    Https,
    Path,
    Query,
    Header,
    Cookie,
    Body,
    Principal,
    Owner,
    Credential,
    Value,
    Absent,
    Of,
    Session,
    Accept,
    Forwarded,
    Tier,
}

/// A number for what these bytes are. Half a microsecond for each KiB, and less where the processor knows SHA-256.
pub(super) fn checksum(bytes: &[u8]) -> u64 {
    let hash = ring::digest::digest(&SHA256, bytes);
    let (first, _) = hash.as_ref().split_at(8);
    first.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A sequence of tagged bytes, hashed.
struct Hash(Context);

impl Hash {
    /// Begins what no other hash of sidegate begins with.
    fn new(domain: &str) -> Self {
        let mut hash = Self(Context::new(&SHA256));
        hash.put(Tag::Domain, b"sidegate cache 1");
        hash.put(Tag::Domain, domain.as_bytes());
        hash
    }

    fn put(&mut self, tag: Tag, bytes: &[u8]) {
        let mut head = [tag as u8; 9];
        head[1..].copy_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.0.update(&head);
        self.0.update(bytes);
    }

    /// What is not there is something else than what is empty.
    fn maybe(&mut self, tag: Tag, bytes: Option<&[u8]>) {
        match bytes {
            Some(bytes) => self.put(tag, bytes),
            None => self.put(Tag::Absent, &[tag as u8]),
        }
    }

    /// The value of a field; of several lines what they are together (RFC 9110 §5.3).
    fn field(&mut self, headers: &HeaderMap, name: &HeaderName) {
        self.maybe(Tag::Value, field(headers, name).as_deref());
    }

    fn finish(self) -> Key {
        let mut key = [0; 32];
        key.copy_from_slice(self.0.finish().as_ref());
        Key(key)
    }
}

/// The value of a field, its lines joined (RFC 9110 §5.3); `None` where there is none.
pub(super) fn field<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut lines = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = lines.next()?;
    Some(lines.fold(Cow::Borrowed(first), |before, line| [&*before, b", ", line].concat().into()))
}

/// The values of a cookie (RFC 6265 §4.2.1), in their order: which of several holds is a matter of the backend.
fn cookies<'a>(headers: &'a HeaderMap, name: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
    let lines = headers.get_all(COOKIE).iter();
    lines.flat_map(|line| line.as_bytes().split(|&byte| byte == b';')).filter_map(move |pair| {
        let at = pair.iter().position(|&byte| byte == b'=')?;
        let (known, value) = pair.split_at(at);
        (known.trim_ascii() == name).then(|| value.get(1..).unwrap_or_default().trim_ascii())
    })
}

/// The authority in lower case, without the port that is meant without one (RFC 3986 §6.2.2.1 and §6.2.3).
pub(super) fn authority(host: &str, https: bool) -> Cow<'_, str> {
    let default = if https { "443" } else { "80" };
    let host = match host.rsplit_once(':') {
        // The last group of an IPv6 address, if somebody leaves the brackets out, is no port.
        Some((name, port)) if (port.is_empty() || port == default) && (!name.contains(':') || name.ends_with(']')) => {
            name
        }
        _ => host,
    };
    let is_lower = !host.bytes().any(|byte| byte.is_ascii_uppercase());
    if is_lower { host.into() } else { host.to_ascii_lowercase().into() }
}

/// The query without the parameters that do not count, in its order; `None` where they were all that there was.
///
/// One with a `;` counts whatever its name: to some backends that is where another parameter begins, which then would
/// decide about the answer and not about the key.
pub(super) fn without<'a>(ignored: &[QueryName], query: &'a str) -> Option<Cow<'a, str>> {
    let counts = |pair: &&str| {
        let name = pair.split('=').next().unwrap_or_default();
        pair.contains(';') || !ignored.iter().any(|ignored| ignored.is(&decode(name.as_bytes())))
    };
    if query.split('&').all(|pair| counts(&pair)) {
        return Some(query.into());
    }
    let mut pairs = query.split('&').filter(counts);
    let first = pairs.next()?;
    Some(pairs.fold(first.to_owned(), |query, pair| query + "&" + pair).into())
}

/// What counts besides method, host, path and query. An entry of `key` of `cache`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPart {
    /// What a JSON body says.
    Body,
    /// Who asks.
    Principal,
    /// A field of the request.
    Header(HeaderName),
    /// A cookie.
    Cookie(String),
}

const KEYS: &str = "`body`, `principal`, `header:NAME` or `cookie:NAME`";

impl FromStr for KeyPart {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no part of a key: there are {KEYS}");
        Ok(match text.split_once(':') {
            None if text == "body" => Self::Body,
            None if text == "principal" => Self::Principal,
            Some(("header", name)) => Self::Header(name.parse().map_err(|_| wrong())?),
            Some(("cookie", name)) if is_token(name) => Self::Cookie(name.to_owned()),
            _ => return Err(wrong()),
        })
    }
}

/// The name of a cookie is a token (RFC 6265 §4.1.1), and upper and lower case differ.
fn is_token(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte))
}

impl fmt::Display for KeyPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Body => f.write_str("body"),
            Self::Principal => f.write_str("principal"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
        }
    }
}

impl JsonSchema for KeyPart {
    fn schema_name() -> Cow<'static, str> {
        "CacheKey".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "What counts besides method, host, path and query: body, principal, header:NAME or cookie:NAME.",
            "pattern": "^(body|principal|(header|cookie):[A-Za-z0-9!#$%&'*+.^_`|~-]+)$",
        })
    }
}

/// The name of a parameter of the query, `fbclid`, or with `*` behind it all that begin so: `utm_*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryName {
    name: String,
    open: bool,
}

impl QueryName {
    /// Whether the parameter of this name, decoded, is meant.
    #[must_use]
    pub fn is(&self, name: &[u8]) -> bool {
        if self.open { name.starts_with(self.name.as_bytes()) } else { name == self.name.as_bytes() }
    }
}

impl FromStr for QueryName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, open) = text.strip_suffix('*').map_or((text, false), |name| (name, true));
        if text.is_empty() || name.contains(['*', '&', '=', ';', '%']) || name.contains(char::is_whitespace) {
            return Err(format!(
                "`{text}` is no parameter: write its name as in `fbclid`, or `utm_*` for all that begin so"
            ));
        }
        Ok(Self { name: name.to_owned(), open })
    }
}

impl fmt::Display for QueryName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.name, if self.open { "*" } else { "" })
    }
}

impl JsonSchema for QueryName {
    fn schema_name() -> Cow<'static, str> {
        "CacheQueryName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A parameter of the query, `fbclid`, or all that begin so, `utm_*`.",
            "pattern": r"^[^*&=;%\s]*\*?$",
            "minLength": 1,
        })
    }
}

impl<'de> Deserialize<'de> for KeyPart {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for KeyPart {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for QueryName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for QueryName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

#[cfg(test)]
mod tests {
    use http::header::AUTHORIZATION;
    use proptest::prelude::*;

    use super::*;

    const CREDENTIALS: [HeaderName; 3] = [AUTHORIZATION, COOKIE, HeaderName::from_static("x-api-key")];

    /// A request, and what there is to change about it.
    #[derive(Debug, Clone, PartialEq)]
    struct Case {
        scope: &'static str,
        method: &'static str,
        https: bool,
        host: &'static str,
        path: &'static str,
        query: Option<&'static str>,
        headers: Vec<(&'static str, &'static str)>,
        principal: Option<&'static str>,
        tier: Option<&'static str>,
        session: Option<&'static str>,
        body: Option<&'static [u8]>,
        parts: Vec<&'static str>,
        ignored: Vec<&'static str>,
        shared: bool,
    }

    fn case() -> Case {
        Case {
            scope: "route",
            method: "GET",
            https: false,
            host: "a.example",
            path: "/v1",
            query: None,
            headers: Vec::new(),
            principal: None,
            tier: None,
            session: None,
            body: None,
            parts: Vec::new(),
            ignored: Vec::new(),
            shared: false,
        }
    }

    fn headers(of: &[(&'static str, &'static str)]) -> HeaderMap {
        of.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    fn key(case: &Case) -> Key {
        let parts: Vec<KeyPart> = case.parts.iter().map(|part| part.parse().unwrap()).collect();
        let ignored: Vec<QueryName> = case.ignored.iter().map(|name| name.parse().unwrap()).collect();
        let keys = Keys {
            scope: case.scope,
            parts: &parts,
            ignored: &ignored,
            credentials: &CREDENTIALS,
            shared: case.shared,
        };
        keys.key(&Asks {
            method: &case.method.parse().unwrap(),
            https: case.https,
            host: case.host,
            path: case.path,
            query: case.query,
            headers: &headers(&case.headers),
            principal: case.principal,
            tier: case.tier,
            session: case.session,
            body: case.body,
        })
    }

    fn all_differ(cases: impl IntoIterator<Item = Case>) {
        let cases: Vec<_> = cases.into_iter().collect();
        for (n, case) in cases.iter().enumerate() {
            for other in &cases[..n] {
                assert_ne!(key(case), key(other), "{case:?} {other:?}");
            }
        }
    }

    #[test]
    fn each_part_of_the_request_counts() {
        all_differ([
            case(),
            Case { scope: "other", ..case() },
            Case { method: "POST", ..case() },
            Case { method: "POST", headers: vec![("accept", "text/event-stream")], ..case() },
            Case { session: Some("a"), ..case() },
            Case { tier: Some("a"), ..case() },
            Case { headers: vec![("x-forwarded-host", "b.example")], ..case() },
            Case { headers: vec![("x-forwarded-prefix", "/b")], ..case() },
            Case { session: Some("b"), ..case() },
            Case { method: "get", ..case() },
            Case { https: true, ..case() },
            Case { host: "b.example", ..case() },
            Case { path: "/v1/", ..case() },
            Case { path: "/%761", ..case() },
            Case { query: Some(""), ..case() },
            Case { query: Some("a=1&b=2"), ..case() },
            Case { query: Some("b=2&a=1"), ..case() },
            Case { principal: Some("me"), ..case() },
        ]);
    }

    #[test]
    fn head_is_answered_with_what_get_got() {
        assert_eq!(key(&Case { method: "HEAD", ..case() }), key(&case()));
    }

    #[test]
    fn a_host_is_the_same_in_any_case_and_with_its_default_port() {
        let of = |host, https| key(&Case { https, host, ..case() });
        for host in ["a.example:80", "A.Example", "a.EXAMPLE:80", "a.example:"] {
            assert_eq!(of(host, false), of("a.example", false), "{host}");
        }
        assert_eq!(of("[::1]:443", true), of("[::1]", true));
        assert_ne!(of("a.example:443", false), of("a.example", false));
        assert_ne!(of("a.example:80", true), of("a.example", true));
        assert_ne!(of("a.example:8080", false), of("a.example", false));
        assert_ne!(of("::1:80", false), of("::1", false));
    }

    #[test]
    fn parameters_that_do_not_count_are_left_out() {
        let of = |query| key(&Case { query, ignored: vec!["utm_*", "fbclid"], ..case() });
        assert_eq!(of(Some("a=1&utm_source=x&b=2&fbclid=9")), of(Some("a=1&b=2")));
        assert_eq!(of(Some("utm_=1&utm%5Fid")), of(None), "nothing is left");
        assert_eq!(of(Some("fbclid&a=1")), of(Some("a=1")));
        assert_ne!(of(Some("fbclid2=1")), of(None));
        assert_ne!(of(Some("a=utm_x")), of(None));
        assert_ne!(of(Some("utm_source=x;a=1")), of(None), "`a` may be a parameter of its own");
        assert_ne!(of(Some("a=1&&b=2")), of(Some("a=1&b=2")), "as it was sent");
        let none = |query| key(&Case { query, ignored: vec!["*"], ..case() });
        assert_eq!(none(Some("a=1&b")), none(None));
    }

    #[test]
    fn a_header_counts_where_it_is_listed() {
        let of = |headers: &[(&'static str, &'static str)], parts: &[&'static str]| {
            key(&Case { headers: headers.to_vec(), parts: parts.to_vec(), ..case() })
        };
        let listed = |headers| of(headers, &["header:accept"]);
        assert_eq!(of(&[("accept", "a")], &[]), of(&[], &[]));
        assert_ne!(listed(&[("accept", "a")]), listed(&[("accept", "b")]));
        assert_ne!(listed(&[("accept", "")]), listed(&[]), "absent is not empty");
        assert_eq!(listed(&[("accept", "a"), ("accept", "b")]), listed(&[("accept", "a, b")]), "lines are joined");
        assert_ne!(
            of(&[("accept", "a")], &["header:accept", "header:te"]),
            of(&[("te", "a")], &["header:accept", "header:te"])
        );
    }

    #[test]
    fn a_cookie_counts_where_it_is_listed() {
        let of = |cookie: &[&'static str]| {
            let headers = cookie.iter().map(|value| ("cookie", *value)).collect();
            key(&Case { headers, parts: vec!["cookie:lang"], shared: true, ..case() })
        };
        assert_eq!(of(&["a=1; lang=de;b=2"]), of(&["lang=de"]));
        assert_eq!(of(&["a=1", "lang=de"]), of(&["lang=de"]), "HTTP/2 may send a line for each");
        assert_ne!(of(&["lang=de"]), of(&["lang=en"]));
        assert_ne!(of(&["lang="]), of(&[]));
        assert_eq!(of(&["Lang=de; xlang=1; lang"]), of(&[]));
        assert_ne!(of(&["lang=de; lang=en"]), of(&["lang=en; lang=de"]));
        assert_ne!(of(&["lang=a; lang=b"]), of(&["lang=ab"]));
    }

    #[test]
    fn credentials_count_unless_the_answer_is_shared() {
        let of = |headers: &[(&'static str, &'static str)], principal, shared| {
            key(&Case { headers: headers.to_vec(), principal, shared, ..case() })
        };
        for name in ["authorization", "cookie", "x-api-key"] {
            assert_ne!(of(&[(name, "a")], None, false), of(&[(name, "b")], None, false), "{name}");
            assert_ne!(of(&[(name, "a")], None, false), of(&[], None, false), "{name}");
            assert_eq!(of(&[(name, "a")], None, true), of(&[], None, true), "{name}");
        }
        assert_ne!(of(&[("authorization", "a")], None, false), of(&[("x-api-key", "a")], None, false));
        assert_ne!(of(&[], Some("me"), false), of(&[], Some("you"), false));
        assert_eq!(of(&[], Some("me"), true), of(&[], None, true));
        assert_ne!(of(&[("cookie", "a")], Some("me"), false), of(&[("cookie", "b")], Some("me"), false), "both");
        let shared_by_principal =
            |principal| key(&Case { principal, shared: true, parts: vec!["principal"], ..case() });
        assert_ne!(shared_by_principal(Some("me")), shared_by_principal(Some("you")));
        assert_ne!(shared_by_principal(Some("")), shared_by_principal(None));
    }

    #[test]
    fn a_body_counts_where_it_is_listed() {
        let of = |body, parts: &[&'static str]| key(&Case { body, parts: parts.to_vec(), ..case() });
        assert_ne!(of(Some(b"a"), &["body"]), of(Some(b"b"), &["body"]));
        assert_ne!(of(Some(b""), &["body"]), of(None, &["body"]));
        assert_eq!(of(Some(b"a"), &[]), of(None, &[]));
    }

    #[test]
    fn a_variant_has_a_key_of_its_own() {
        let key = key(&case());
        let names = |names: &[&'static str]| names.iter().map(|name| HeaderName::from_static(name)).collect::<Vec<_>>();
        let of = |vary: &[&'static str], request: &[(&'static str, &'static str)]| {
            key.with_vary(&names(vary), &headers(request))
        };
        let request = [("accept", "a"), ("te", "b")];
        assert_ne!(of(&["accept", "te"], &request), of(&["accept", "te"], &[("accept", "b"), ("te", "a")]));
        assert_ne!(of(&["accept"], &[]), of(&["accept"], &[("accept", "")]), "absent matches only absent");
        assert_eq!(of(&["accept"], &request), of(&["accept"], &request[..1]));
        assert_ne!(of(&[], &request), key);
        assert_ne!(of(&["accept"], &[]), of(&[], &[]));
        let other = self::key(&Case { path: "/other", ..case() });
        assert_ne!(other.with_vary(&[ACCEPT], &HeaderMap::new()), key.with_vary(&[ACCEPT], &HeaderMap::new()));
    }

    #[test]
    fn a_key_is_written_in_hexadecimal_digits() {
        let key = Key(std::array::from_fn(|n| u8::try_from(n * 8 + 1).unwrap()));
        assert_eq!(format!("{key:?}"), "Key(0109111921293139)");
        assert!(key.hex().starts_with("0109111921293139") && key.hex().len() == 64);
        assert_eq!(Key::from_hex(&key.hex()), Some(key));
        for wrong in ["", "01", &"g".repeat(64), &"0".repeat(65), &"ü".repeat(32)] {
            assert_eq!(Key::from_hex(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn keys_of_an_older_version_are_found_again() {
        // Whoever changes this empties every cache: then the version of the domain has to change, too.
        let full = Case {
            query: Some("a=1"),
            headers: vec![("authorization", "Bearer t"), ("accept", "x")],
            body: Some(b"b"),
            parts: vec!["body", "header:accept", "cookie:c", "principal"],
            ..case()
        };
        assert_eq!(key(&full).hex(), "ef0e030cd0b5f51d263a528d5131739691201e0155be1ddd2b5efe204562c021");
    }

    #[test]
    fn a_part_that_is_none_is_told_what_there_is() {
        for text in ["body", "principal", "header:x-user", "cookie:Lang"] {
            assert_eq!(text.parse::<KeyPart>().unwrap().to_string(), text);
            assert_eq!(serde_json::from_value::<KeyPart>(text.into()).unwrap(), text.parse().unwrap());
        }
        for text in
            ["", "Body", "header", "header:", "header:a b", "cookie:", "cookie:a=b", "cookie:a;b", "query:q", "body:x"]
        {
            let error = text.parse::<KeyPart>().unwrap_err();
            assert_eq!(error, format!("`{text}` is no part of a key: there are {KEYS}"));
        }
        for text in ["fbclid", "utm_*", "*", "a[]"] {
            assert_eq!(text.parse::<QueryName>().unwrap().to_string(), text);
        }
        for text in ["", "*a", "a*b", "**", "a b", "a=1", "a&b"] {
            assert!(text.parse::<QueryName>().is_err(), "{text}");
        }
    }

    fn any_case() -> impl Strategy<Value = Case> {
        let text = || prop::sample::select(vec!["", "a", "b", "ab", "aa"]);
        let header = prop::sample::select(vec!["accept", "te", "authorization", "x-api-key"]);
        let cookie = text().prop_map(|value| {
            let values = [("", "a="), ("a", "a=a"), ("b", "a=b"), ("ab", "a=ab"), ("aa", "a=a; a=a")];
            ("cookie", values.iter().find(|(known, _)| *known == value).unwrap().1)
        });
        let headers = prop::collection::vec(prop_oneof![3 => (header, text()), 1 => cookie], 0..3);
        let parts = prop::sample::select(vec!["body", "principal", "header:accept", "header:te", "cookie:a"]);
        (
            (text(), any::<bool>(), text(), text(), prop::option::of(text())),
            (
                headers,
                prop::option::of(text()),
                prop::option::of(text()),
                prop::collection::vec(parts, 0..3),
                any::<bool>(),
            ),
        )
            .prop_map(|((scope, https, host, path, query), (headers, principal, body, parts, shared))| Case {
                scope,
                https,
                host,
                path,
                query,
                headers,
                principal,
                body: body.map(str::as_bytes),
                parts,
                shared,
                ..case()
            })
    }

    /// What a key is made of, as a list of its own.
    fn meant(case: &Case) -> Vec<Option<String>> {
        let joined = |name: &str| {
            let lines: Vec<_> = case.headers.iter().filter(|line| line.0 == name).map(|line| line.1).collect();
            (!lines.is_empty()).then(|| lines.join(", "))
        };
        let mut all =
            vec![Some(case.scope.into()), Some(case.https.to_string()), Some(case.host.into()), Some(case.path.into())];
        all.push(case.query.map(str::to_owned));
        for part in &case.parts {
            all.push(Some((*part).to_owned()));
            match *part {
                "body" => all.push(case.body.map(|body| String::from_utf8(body.to_vec()).unwrap())),
                "principal" => all.push(case.principal.map(str::to_owned)),
                "cookie:a" => {
                    let lines = case.headers.iter().filter(|line| line.0 == "cookie").map(|line| line.1);
                    all.push(Some(lines.collect::<Vec<_>>().join("; ")));
                }
                header => all.push(joined(header.strip_prefix("header:").unwrap())),
            }
        }
        all.push(Some(case.shared.to_string()));
        if !case.shared {
            all.push(case.principal.map(str::to_owned));
            for name in CREDENTIALS {
                let lines = case.headers.iter().filter(|line| line.0 == name.as_str());
                all.push(Some(format!("{:?}", lines.collect::<Vec<_>>())));
            }
        }
        all
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(4096))]

        /// Neighbours, which differ in one thing or in nothing that counts.
        #[test]
        fn two_requests_have_one_key_only_if_nothing_that_counts_differs(
            one in any_case(), other in any_case(), take in 0..10_usize
        ) {
            let mut near = one.clone();
            match take {
                0 => near.scope = other.scope,
                1 => near.https = other.https,
                2 => near.host = other.host,
                3 => (near.path, near.query) = (other.path, other.query),
                4 => near.headers = other.headers,
                5 => near.principal = other.principal,
                6 => near.body = other.body,
                7 => near.parts = other.parts,
                8 => (near.principal, near.parts) = (other.principal, other.parts),
                _ => near = other,
            }
            // How a route shares is the same for all its requests, so that a key does not say it.
            near.shared = one.shared;
            prop_assert_eq!(key(&one) == key(&near), meant(&one) == meant(&near), "{:?} {:?}", one, near);
        }

        #[test]
        fn the_rest_of_a_query_is_as_it_was_sent(query in "[au_=&;%5F]{0,16}") {
            let ignored = ["u_*".parse().unwrap()];
            let rest = without(&ignored, &query);
            if let Some(rest) = &rest {
                prop_assert_eq!(without(&ignored, rest), Some(Cow::Borrowed(&**rest)));
            }
            prop_assert_eq!(without(&[], &query), Some(Cow::Borrowed(&*query)));
        }
    }
}
