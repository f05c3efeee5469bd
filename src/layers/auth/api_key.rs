//! API keys: a file of digests.
//!
//! A key of sidegate's is 256 random bits, so that its SHA-256 says nothing about it, and guessing is hopeless: no slow
//! hash is needed. The file has one line per key:
//!
//! ```text
//! # id      SHA-256 of the key                                                and what holds for it
//! alice     9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
//! ci        60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752  tier=gold routes=chat,"GET /models" expires=2031-01-31
//! ```
//!
//! Several keys may have the same id, so that one can be replaced by another.

use std::{
    borrow::Cow,
    collections::HashMap,
    fmt::{self, Write},
    sync::Arc,
    time::{Duration, SystemTime},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    digest::{SHA256, digest},
    hmac,
    rand::{SecureRandom, SystemRandom},
};
use subtle::ConstantTimeEq;

use super::Digest;
use crate::message::Principal;

/// What keys of sidegate's begin with, so that scanners of repositories find them.
pub const PREFIX: &str = "sgk_";
/// No file of keys is larger.
pub(super) const MAX_FILE: u64 = 16 << 20;

/// The keys of one file. Looked up in a time that does not depend on how much of a digest is right.
pub struct Keys {
    /// By their digest under `blind`: nobody can choose a key whose place in the map, or whose neighbours, are known.
    entries: HashMap<Digest, Entry>,
    blind: hmac::Key,
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keys").field("entries", &self.entries.len()).finish_non_exhaustive()
    }
}

/// A key, and what holds for it.
pub struct Entry {
    digest: Digest,
    principal: Principal,
    /// Names of routes; `None` for all.
    routes: Option<Box<[Box<str>]>>,
    expires: Option<SystemTime>,
}

impl fmt::Debug for Entry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Entry").field("id", &self.principal.id).finish_non_exhaustive()
    }
}

impl Entry {
    /// Whose it is.
    #[must_use]
    pub fn principal(&self) -> &Principal {
        &self.principal
    }

    /// Whether it is for the route of this name.
    #[must_use]
    pub fn allows(&self, route: &str) -> bool {
        self.routes.as_ref().is_none_or(|routes| routes.iter().any(|allowed| **allowed == *route))
    }

    /// Whether it is no longer valid.
    #[must_use]
    pub fn has_expired(&self, now: SystemTime) -> bool {
        self.expires.is_some_and(|expires| now >= expires)
    }
}

/// A line that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LineError {
    line: usize,
    message: Cow<'static, str>,
}

impl fmt::Display for LineError {
    /// Never with a part of the line: it may be a key.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "line {}: {}", self.line, self.message)
    }
}

impl std::error::Error for LineError {}

impl Keys {
    /// Reads a file's text.
    ///
    /// # Errors
    /// All lines that are wrong.
    ///
    /// # Panics
    /// The system has no random numbers.
    pub fn parse(text: &str) -> Result<Self, Vec<LineError>> {
        let blind = hmac::Key::generate(hmac::HMAC_SHA256, &SystemRandom::new());
        let blind = blind.expect("the system has random numbers");
        let mut keys = Self { entries: HashMap::new(), blind };
        let mut lines: HashMap<Digest, usize> = HashMap::new();
        let mut errors = Vec::new();
        for (n, line) in text.lines().enumerate() {
            let line_number = n + 1;
            match entry(line) {
                Ok(Some(entry)) => match lines.insert(entry.digest, line_number) {
                    Some(first) => {
                        let message = format!("has the same key as line {first}").into();
                        errors.push(LineError { line: line_number, message });
                    }
                    None => drop(keys.entries.insert(keys.blinded(&entry.digest), entry)),
                },
                Ok(None) => {}
                Err(message) => errors.push(LineError { line: line_number, message }),
            }
        }
        if errors.is_empty() { Ok(keys) } else { Err(errors) }
    }

    fn blinded(&self, digest: &Digest) -> Digest {
        let tag = hmac::sign(&self.blind, digest);
        tag.as_ref().try_into().expect("a tag of SHA-256 has 32 bytes")
    }

    /// The key with this digest.
    pub(super) fn find(&self, digest: &Digest) -> Option<&Entry> {
        let found = self.entries.get(&self.blinded(digest));
        // Compared in any case, and as a whole.
        let same = found.map_or(&[0; 32], |entry| &entry.digest).ct_eq(digest);
        found.filter(|_| bool::from(same))
    }
}

/// What a line says; nothing if it is empty or a comment.
fn entry(line: &str) -> Result<Option<Entry>, Cow<'static, str>> {
    let words = words(line)?;
    let mut words = words.iter();
    let Some(id) = words.next() else { return Ok(None) };
    if !is_word(id) {
        return Err("the id must be 1 to 128 letters, digits and punctuation of ASCII".into());
    }
    let written = words.next().ok_or("the digest is missing: an id, then the SHA-256 of its key")?;
    if written.starts_with(PREFIX) {
        return Err(
            "has a key where its digest belongs: make another with `sidegate key new`, this one was written down"
                .into(),
        );
    }
    let digest = from_hex(written).ok_or("the digest must be 64 hexadecimal digits, the SHA-256 of a key")?;
    let (mut tier, mut routes, mut expires) = (None, None, None);
    for word in words {
        let (name, value) = word.split_once('=').ok_or("after the digest stand `tier=`, `routes=` and `expires=`")?;
        let twice = match name {
            "tier" => {
                if !is_word(value) {
                    return Err("the tier must be 1 to 128 letters, digits and punctuation of ASCII".into());
                }
                tier.replace(Arc::from(value)).is_some()
            }
            "routes" => {
                let names: Box<[Box<str>]> = value.split(',').map(|name| name.trim().into()).collect();
                if names.iter().any(|name| name.is_empty()) {
                    return Err("`routes` must be names of routes with `,` between them".into());
                }
                routes.replace(names).is_some()
            }
            "expires" => {
                let time =
                    time(value).ok_or("`expires` must be a day or a time, as in 2031-01-31 or 2031-01-31T12:00:00Z")?;
                expires.replace(time).is_some()
            }
            _ => return Err("has what is none of `tier=`, `routes=` and `expires=`".into()),
        };
        if twice {
            return Err("has one of `tier=`, `routes=` and `expires=` twice".into());
        }
    }
    Ok(Some(Entry { digest, principal: Principal::new(id.as_str(), tier), routes, expires }))
}

/// The words of a line: white space ends a word but for within `"`; from a `#` at the beginning of a word on it is
/// comment.
fn words(line: &str) -> Result<Vec<String>, &'static str> {
    let mut words = Vec::new();
    let mut word: Option<String> = None;
    let mut quoted = false;
    for c in line.chars() {
        match c {
            '#' if word.is_none() && !quoted => break,
            '"' => {
                quoted = !quoted;
                word.get_or_insert_default();
            }
            c if c.is_whitespace() && !quoted => words.extend(word.take()),
            c if c.is_control() => return Err("has a control character"),
            c => word.get_or_insert_default().push(c),
        }
    }
    if quoted {
        return Err("has a `\"` without another");
    }
    words.extend(word);
    Ok(words)
}

/// Whether a text can be an id or a tier: it goes upstream in a header field.
pub(super) fn is_word(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_graphic())
}

fn from_hex(text: &str) -> Option<Digest> {
    let mut digest = Digest::default();
    let text = text.as_bytes();
    if text.len() != 2 * digest.len() {
        return None;
    }
    for (byte, digits) in digest.iter_mut().zip(text.chunks_exact(2)) {
        let [high, low] = [digits[0], digits[1]].map(|digit| char::from(digit).to_digit(16));
        *byte = u8::try_from(high? << 4 | low?).ok()?;
    }
    Some(digest)
}

fn time(text: &str) -> Option<SystemTime> {
    let text = if text.len() == "2031-01-31".len() { format!("{text}T00:00:00Z") } else { text.to_owned() };
    humantime::parse_rfc3339(&text).ok()
}

/// The SHA-256 of a credential.
pub(super) fn digest_of(text: &[u8]) -> Digest {
    digest(&SHA256, text).as_ref().try_into().expect("SHA-256 has 32 bytes")
}

/// A new key.
pub struct NewKey {
    /// The key, for its user.
    pub key: String,
    /// The line for the file.
    pub line: String,
}

impl NewKey {
    /// A key of 256 random bits, and its line. `expires` is a day, a time, or a time from `now` such as `90d`.
    ///
    /// # Errors
    /// What is wrong with the arguments.
    pub fn make(
        id: &str,
        tier: Option<&str>,
        routes: &[String],
        expires: Option<&str>,
        now: SystemTime,
    ) -> Result<Self, String> {
        let mut random = [0; 32];
        SystemRandom::new().fill(&mut random).map_err(|_| "the system has no random numbers")?;
        let key = format!("{PREFIX}{}", BASE64_URL_SAFE_NO_PAD.encode(random));
        let mut line = format!("{id} ");
        for byte in digest_of(key.as_bytes()) {
            put(&mut line, format_args!("{byte:02x}"));
        }
        if let Some(tier) = tier {
            put(&mut line, format_args!(" tier={tier}"));
        }
        if !routes.is_empty() {
            let routes = routes.join(",");
            let quote = if routes.contains(char::is_whitespace) { "\"" } else { "" };
            put(&mut line, format_args!(" routes={quote}{routes}{quote}"));
        }
        if let Some(expires) = expires {
            let from_now = |length: Duration| now.checked_add(length);
            let length = expires.parse().ok().map(crate::config::HumanDuration::get);
            let time = length.and_then(from_now).or_else(|| time(expires));
            let time =
                time.ok_or("`--expires` must be a day, a time or a duration: 2031-01-31, 2031-01-31T12:00:00Z or 90d")?;
            if time <= now {
                return Err("`--expires` is in the past".to_owned());
            }
            put(&mut line, format_args!(" expires={}", humantime::format_rfc3339_seconds(time)));
        }
        // What is printed is what can be read.
        match entry(&line) {
            Ok(Some(made))
                if *made.principal.id == *id && made.routes.as_ref().is_none_or(|of| of.len() == routes.len()) =>
            {
                Ok(Self { key, line })
            }
            Ok(_) => Err("an id has no `#`, `\"` or white space, and a route's name no `,` or `\"`".to_owned()),
            Err(message) => Err(message.into_owned()),
        }
    }
}

fn put(line: &mut String, text: fmt::Arguments<'_>) {
    // A `String` takes every write.
    line.write_fmt(text).unwrap_or(());
}

impl fmt::Debug for NewKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewKey").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The SHA-256 of `test`.
    const DIGEST: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

    fn errors(text: &str) -> Vec<String> {
        Keys::parse(text).unwrap_err().iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_key_is_found_by_its_digest_with_what_holds_for_it() {
        let text = format!(
            "\n# a comment\n  alice {DIGEST} # another\r\nci {} tier=gold routes=chat,\"GET /models\" expires=2031-01-31\n",
            "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752".to_uppercase(),
        );
        let keys = Keys::parse(&text).unwrap();
        let alice = keys.find(&digest_of(b"test")).unwrap();
        assert_eq!((&*alice.principal.id, &alice.principal.tier), ("alice", &None));
        assert!(alice.allows("anything") && !alice.has_expired(SystemTime::now()));
        let ci = keys.find(&digest_of(b"test2")).unwrap();
        assert_eq!((&*ci.principal.id, ci.principal.tier.as_deref()), ("ci", Some("gold")));
        assert!(ci.allows("chat") && ci.allows("GET /models") && !ci.allows("GET") && !ci.allows(""));
        let end = time("2031-01-31T00:00:00Z").unwrap();
        assert!(ci.has_expired(end) && !ci.has_expired(end - Duration::from_nanos(1)));
        assert!(keys.find(&digest_of(b"test3")).is_none());
        assert!(keys.find(&[0; 32]).is_none(), "not even what nothing is compared with");
    }

    #[test]
    fn mistakes_are_told_by_line_and_without_their_content() {
        let text = format!(
            "a\nb sgk_secret\nc {DIGEST} tier=\nd {DIGEST} admin\ne {DIGEST}\nf {DIGEST}\n\"g h\" {DIGEST}\ni 12\nj \"\nk {DIGEST} expires=soon tier=x"
        );
        assert_eq!(
            errors(&text),
            [
                "line 1: the digest is missing: an id, then the SHA-256 of its key",
                "line 2: has a key where its digest belongs: make another with `sidegate key new`, this one was written down",
                "line 3: the tier must be 1 to 128 letters, digits and punctuation of ASCII",
                "line 4: after the digest stand `tier=`, `routes=` and `expires=`",
                "line 6: has the same key as line 5",
                "line 7: the id must be 1 to 128 letters, digits and punctuation of ASCII",
                "line 8: the digest must be 64 hexadecimal digits, the SHA-256 of a key",
                "line 9: has a `\"` without another",
                "line 10: `expires` must be a day or a time, as in 2031-01-31 or 2031-01-31T12:00:00Z",
            ]
        );
    }

    #[test]
    fn a_new_key_is_found_by_its_line() {
        let now = SystemTime::now();
        let routes = ["chat".to_owned(), "GET /models".to_owned()];
        let new = NewKey::make("ci", Some("gold"), &routes, Some("90d"), now).unwrap();
        assert!(new.key.starts_with(PREFIX) && new.key.len() == PREFIX.len() + 43);
        assert!(!new.line.contains(&new.key) && !new.line.contains('\n'));
        let keys = Keys::parse(&new.line).unwrap();
        let entry = keys.find(&digest_of(new.key.as_bytes())).unwrap();
        assert_eq!((&*entry.principal.id, entry.principal.tier.as_deref()), ("ci", Some("gold")));
        assert!(entry.allows("GET /models") && !entry.allows("x"));
        assert!(!entry.has_expired(now + Duration::from_secs(89 * 86_400)));
        assert!(entry.has_expired(now + Duration::from_secs(91 * 86_400)));
        let other = NewKey::make("ci", None, &[], None, now).unwrap();
        assert_ne!(new.key, other.key);
        for (id, expires) in
            [("", None), ("a b", None), ("#", None), ("a\"b", None), ("a", Some("soon")), ("a", Some("2001-01-01"))]
        {
            assert!(NewKey::make(id, None, &[], expires, now).is_err(), "{id} {expires:?}");
        }
        assert!(NewKey::make("a", None, &["a,b".to_owned()], None, now).is_err());
        assert!(NewKey::make("a", Some("x y"), &[], None, now).is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic(text in "(.|\n){0,200}") {
            let _keys = Keys::parse(&text);
        }
    }
}
