//! Under which key an answer is stored: a hash of all that it depends on, in which nothing can be read.
//!
//! Each part goes into it with a tag and its length, so that no two requests that differ in a part have the same key.
//! What the key leaves apart needlessly costs a hit; what it throws together gives somebody another's answer.

mod part;

use std::{borrow::Cow, fmt};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method,
    header::{ACCEPT, CONTENT_TYPE, COOKIE, FORWARDED},
};
use ring::digest::{SHA256, digest};

pub use self::part::{KeyPart, QueryName};
use super::vary;
use crate::message::{
    headers::{X_FORWARDED_HOST, X_FORWARDED_PROTO},
    path::decode,
};

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
        vary::canonical(names, request, |piece| hash.0.extend_from_slice(piece));
        hash.finish()
    }
}

impl From<[u8; 32]> for Key {
    fn from(bytes: [u8; 32]) -> Self {
        Self(bytes)
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
const X_FORWARDED: [HeaderName; 2] =
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
    /// Who the authenticated principal is.
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
        let host = authority(asks.host, asks.https);
        hash.put(if asks.https { Tag::Https } else { Tag::Http }, host.as_bytes());
        hash.put(Tag::Path, asks.path.as_bytes());
        // From a proxy that is trusted: pages may be written for the host that the client knows. Where the host makes no
        // difference, neither does what is said about it.
        if !asks.host.is_empty() {
            if let Some(said) = field(asks.headers, &X_FORWARDED_HOST) {
                let named = str::from_utf8(&said).map(|said| authority(said, asks.https));
                let named = named.as_ref().map_or(&*said, |named| named.as_bytes());
                if named != host.as_bytes() {
                    hash.put(Tag::Forwarded, named);
                }
            }
            for pair in named_hops(asks.headers) {
                hash.put(Tag::Header, FORWARDED.as_str().as_bytes());
                hash.put(Tag::Value, pair);
            }
        }
        if let Some(said) = field(asks.headers, &X_FORWARDED_PROTO)
            && !is_understood(&said, asks)
        {
            hash.put(Tag::Header, X_FORWARDED_PROTO.as_str().as_bytes());
            hash.put(Tag::Value, &said);
        }
        for name in &X_FORWARDED {
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
            vary::canonical(&[ACCEPT, CONTENT_TYPE], asks.headers, |piece| hash.0.extend_from_slice(piece));
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
            // Most requests have few fields, and none of these: looked through once, and not once for each.
            if asks.headers.keys().any(|name| self.credentials.contains(name)) {
                for name in self.credentials {
                    for value in asks.headers.get_all(name) {
                        hash.put(Tag::Credential, name.as_str().as_bytes());
                        hash.put(Tag::Value, value.as_bytes());
                    }
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
    let hash = digest(&SHA256, bytes);
    let (first, _) = hash.as_ref().split_at(8);
    first.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// A sequence of tagged bytes, to be hashed at once: a digest that is fed them piece by piece takes four times as long.
struct Hash(Vec<u8>);

impl Hash {
    /// Begins what no other hash of sidegate begins with.
    fn new(domain: &str) -> Self {
        let mut hash = Self(Vec::with_capacity(512));
        hash.put(Tag::Domain, b"sidegate cache 1");
        hash.put(Tag::Domain, domain.as_bytes());
        hash
    }

    fn put(&mut self, tag: Tag, bytes: &[u8]) {
        self.0.push(tag as u8);
        self.0.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        self.0.extend_from_slice(bytes);
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
        key.copy_from_slice(digest(&SHA256, &self.0).as_ref());
        Key(key)
    }
}

/// The value of a field, its lines joined (RFC 9110 §5.3); `None` where there is none.
pub(super) fn field<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<Cow<'a, [u8]>> {
    let mut lines = headers.get_all(name).iter().map(HeaderValue::as_bytes);
    let first = lines.next()?;
    Some(lines.fold(Cow::Borrowed(first), |before, line| [&*before, b", ", line].concat().into()))
}

/// Whether `X-Forwarded-Proto` says no more than the scheme, which has its part in the key where there is a host. The
/// upstream gets the field as a trusted proxy sent it, and may make something else of it than we do.
fn is_understood(said: &[u8], asks: &Asks<'_>) -> bool {
    match said {
        b"http" => !asks.https,
        b"https" => asks.https || asks.host.is_empty(),
        _ => false,
    }
}

/// What `Forwarded` says of hosts and schemes (RFC 7239 §4), and not of who the client and the proxies are.
fn named_hops(headers: &HeaderMap) -> impl Iterator<Item = &[u8]> {
    let lines = headers.get_all(FORWARDED).iter();
    let pairs = lines.flat_map(|line| line.as_bytes().split(|byte| b",;".contains(byte))).map(<[u8]>::trim_ascii);
    pairs.filter(|pair| {
        let name = pair.split(|&byte| byte == b'=').next().unwrap_or_default();
        !name.eq_ignore_ascii_case(b"for") && !name.eq_ignore_ascii_case(b"by")
    })
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

#[cfg(test)]
mod tests;
