//! The cookie: found in a request and taken out of it (RFC 6265 §5.4), written for a response (§4.1).
//!
//! The crate `cookie` reads and writes whole cookies; what is needed here is to cut one out of a field and leave the rest
//! of it byte for byte, and it would bring the crate `time` with it.

use std::{borrow::Cow, fmt};

use http::{
    HeaderMap, HeaderValue,
    header::{COOKIE, Entry},
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error, Unexpected, Visitor},
};

use super::id::Id;
use crate::config::{Check, Problems};

/// The cookie that holds a session's id. Section `cookie` of `session`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "SessionCookie")]
pub struct Config {
    /// What it is called. Routes with the same name and store share their sessions; routes with different `auth` should
    /// not. Default `sidegate_session`. With `__Host-` before it, which needs `secure: true`, no other host of
    /// the domain can set it.
    pub name: String,
    /// The path below which clients send it. Default `/`.
    pub path: String,
    /// The domain whose hosts all get it. Default: the host that was asked, alone.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Whether it is sent with requests that other sites make: `strict`, `lax` or `none`. Default `lax`.
    pub same_site: SameSite,
    /// Whether it is sent over TLS only: `auto` where it was asked for over TLS, here or at a trusted proxy, or `true`
    /// or `false`. Default `auto`.
    pub secure: Secure,
    /// Whether scripts of a page cannot read it. Default `true`.
    pub http_only: bool,
}

/// Which requests of other sites a cookie goes with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum SameSite {
    /// None.
    Strict,
    /// Those that lead to a page of ours. The default.
    #[default]
    Lax,
    /// All. Browsers want it `Secure`.
    None,
}

/// When a cookie is `Secure`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Secure {
    /// `auto`: where the client asked over TLS. The default.
    #[default]
    Auto,
    /// `true`.
    Always,
    /// `false`.
    Never,
}

impl<'de> Deserialize<'de> for Secure {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct AutoOrNot;

        impl Visitor<'_> for AutoOrNot {
            type Value = Secure;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`auto`, true or false")
            }

            fn visit_bool<E: Error>(self, always: bool) -> Result<Secure, E> {
                Ok(if always { Secure::Always } else { Secure::Never })
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Secure, E> {
                match text {
                    "auto" => Ok(Secure::Auto),
                    // As variables of the environment have them.
                    "true" => Ok(Secure::Always),
                    "false" => Ok(Secure::Never),
                    other => Err(E::invalid_value(Unexpected::Str(other), &self)),
                }
            }
        }

        from.deserialize_any(AutoOrNot)
    }
}

impl Serialize for Secure {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Auto => to.serialize_str("auto"),
            Self::Always => to.serialize_bool(true),
            Self::Never => to.serialize_bool(false),
        }
    }
}

impl JsonSchema for Secure {
    fn schema_name() -> Cow<'static, str> {
        "SecureCookie".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "enum": ["auto", true, false], "description": "When a cookie is `Secure`." })
    }
}

impl Default for Config {
    fn default() -> Self {
        Self {
            name: "sidegate_session".to_owned(),
            path: "/".to_owned(),
            domain: None,
            same_site: SameSite::Lax,
            secure: Secure::Auto,
            http_only: true,
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        let in_token = |byte: u8| byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte);
        if !(1..=100).contains(&self.name.len()) || !self.name.bytes().all(in_token) {
            problems.add("name", "is no name for a cookie: 1 to 100 letters, digits, `_`, `-` or `.`");
        }
        let in_path = |byte: u8| (b' '..=b'~').contains(&byte) && byte != b';';
        if !self.path.starts_with('/') || !self.path.bytes().all(in_path) {
            problems.add("path", "must begin with `/`, and be ASCII without `;`");
        }
        let in_domain = |byte: u8| byte.is_ascii_alphanumeric() || b"-.".contains(&byte);
        if self.domain.as_ref().is_some_and(|domain| domain.is_empty() || !domain.bytes().all(in_domain)) {
            problems.add("domain", "is no domain: write one as `example.com`");
        }
        if self.same_site == SameSite::None && self.secure != Secure::Always {
            problems.add("same_site", "is `none`, which browsers take with `secure: true` only");
        }
        // Compared as browsers do since the prefixes were bypassed by their case (RFC 6265bis §4.1.3).
        let has = |prefix: &str| self.name.get(..prefix.len()).is_some_and(|start| start.eq_ignore_ascii_case(prefix));
        let (host, secure) = (has("__Host-"), has("__Secure-"));
        if (host || secure) && self.secure != Secure::Always {
            problems.add("secure", format!("must be true: browsers drop `{}` otherwise", self.name));
        }
        if host && (self.domain.is_some() || self.path != "/") {
            problems.add("name", "begins with `__Host-`, which is for `path: /` without a `domain`");
        }
    }
}

/// What there is to be known of a session that a request shows in a cookie.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) id: Id,
    /// When the client was given it, as the client says, in seconds since 1970: it decides about no more than when the
    /// client gets it again.
    pub(super) given: Option<u64>,
}

/// The cookies of this name whose values look like ours, in their order.
pub(super) fn find<'a>(headers: &'a HeaderMap, name: &'a str) -> impl Iterator<Item = Shown> + 'a {
    let fields = headers.get_all(COOKIE).into_iter();
    let pairs = fields.flat_map(|field| field.as_bytes().split(|byte| *byte == b';'));
    pairs.filter_map(move |pair| read(value_of(pair, name)?))
}

/// `ID` or `ID.SECONDS`, both in hexadecimal digits.
fn read(value: &[u8]) -> Option<Shown> {
    let (id, given) = match value.iter().position(|byte| *byte == b'.') {
        Some(dot) => (&value[..dot], Some(&value[dot + 1..])),
        None => (value, None),
    };
    let given = match given {
        Some(given) if (1..=10).contains(&given.len()) && given.iter().all(u8::is_ascii_hexdigit) => {
            Some(u64::from_str_radix(std::str::from_utf8(given).ok()?, 16).ok()?)
        }
        Some(_) => return None,
        None => None,
    };
    Some(Shown { id: Id::parse(id)?, given })
}

/// The value of a pair, if it has this name.
fn value_of<'a>(pair: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let at = pair.iter().position(|byte| *byte == b'=')?;
    (pair[..at].trim_ascii() == name.as_bytes()).then(|| pair[at + 1..].trim_ascii())
}

/// Takes all cookies of this name away. Fields without it stay as they are.
pub(super) fn remove(headers: &mut HeaderMap, name: &str) {
    let has =
        |field: &HeaderValue| field.as_bytes().split(|byte| *byte == b';').any(|pair| value_of(pair, name).is_some());
    if !headers.get_all(COOKIE).iter().any(has) {
        return;
    }
    let Entry::Occupied(entry) = headers.entry(COOKIE) else { return };
    let fields: Vec<HeaderValue> = entry.remove_entry_mult().1.collect();
    for field in fields {
        let Some(left) = (if has(&field) { without(&field, name) } else { Some(field) }) else { continue };
        headers.append(COOKIE, left);
    }
}

/// The field without the cookies of this name; nothing where nothing else is in it.
fn without(field: &HeaderValue, name: &str) -> Option<HeaderValue> {
    let mut left = Vec::with_capacity(field.len());
    let mut first = true;
    for pair in field.as_bytes().split(|byte| *byte == b';').filter(|pair| value_of(pair, name).is_none()) {
        if first {
            // What stood before it is gone, and the space after that belongs to it.
            left.extend_from_slice(pair.trim_ascii_start());
        } else {
            left.push(b';');
            left.extend_from_slice(pair);
        }
        first = false;
    }
    let is_empty = left.iter().all(|byte| *byte == b';' || byte.is_ascii_whitespace());
    let mut left = HeaderValue::from_bytes(&left).ok().filter(|_| !is_empty)?;
    left.set_sensitive(field.is_sensitive());
    Some(left)
}

impl Config {
    /// The value of `Set-Cookie` that gives a client `id` at `now` for `max_age`, both in seconds.
    pub(super) fn set(&self, id: &Id, now: u64, max_age: u64, https: bool) -> HeaderValue {
        let mut text = format!("{}={}.{now:x}; Max-Age={max_age}; Path={}", self.name, id.as_str(), self.path);
        if let Some(domain) = &self.domain {
            text.push_str("; Domain=");
            text.push_str(domain);
        }
        if self.secure == Secure::Always || self.secure == Secure::Auto && https {
            text.push_str("; Secure");
        }
        if self.http_only {
            text.push_str("; HttpOnly");
        }
        text.push_str(match self.same_site {
            SameSite::Strict => "; SameSite=Strict",
            SameSite::Lax => "; SameSite=Lax",
            SameSite::None => "; SameSite=None",
        });
        let mut value = HeaderValue::try_from(text).expect("name, path and domain were checked to be ASCII");
        value.set_sensitive(true);
        value
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ID: &str = "00112233445566778899aabbccddeeff";

    fn headers(fields: &[&str]) -> HeaderMap {
        fields.iter().map(|field| (COOKIE, HeaderValue::from_str(field).unwrap())).collect()
    }

    fn left(fields: &[&str]) -> Vec<String> {
        let mut headers = headers(fields);
        remove(&mut headers, "sid");
        headers.get_all(COOKIE).iter().map(|field| field.to_str().unwrap().to_owned()).collect()
    }

    #[test]
    fn it_is_found_wherever_it_stands() {
        let given = |text: &str| -> Vec<Option<u64>> {
            find(&headers(&[text]), "sid")
                .map(|shown| {
                    assert_eq!(shown.id.as_str(), ID);
                    shown.given
                })
                .collect()
        };
        for text in ["sid=ID", "a=1; sid=ID", "a=1;sid=ID;b", "sid = ID ; b=2", "a=sid=ID; sid=ID", "sid=x; sid=ID"] {
            assert_eq!(given(&text.replace("ID", ID)), [None], "{text}");
        }
        assert_eq!(given(&format!("sid={ID}.ff; sid={ID}.1")), [Some(255), Some(1)]);
        for text in [
            "SID=ID",
            "sid",
            "sid=",
            "sid=IDa",
            "sid=\"ID\"",
            "sid=ID.",
            "sid=ID.g",
            "sid=ID.+1",
            "xsid=ID",
            "a=sid=ID",
        ] {
            assert_eq!(given(&text.replace("ID", ID)), [], "{text}");
        }
        assert_eq!(given(&format!("sid={}", ID.to_uppercase())), [], "there is one way to write it");
        assert_eq!(find(&headers(&["a=1", &format!("sid={ID}")]), "sid").count(), 1, "HTTP/2 may send several fields");
    }

    #[test]
    fn it_is_taken_out_and_the_rest_stays_byte_for_byte() {
        for (before, after) in [
            ("sid=1", ""),
            ("sid=1;", ""),
            ("sid=1; a=1", "a=1"),
            ("a=1; sid=1", "a=1"),
            ("a=1;  b=\"2\" ;sid=1; c==;d", "a=1;  b=\"2\" ; c==;d"),
            ("sid=1; a=1; sid=2; b=2; sid=", "a=1; b=2"),
            ("a=1;;b ; sid", "a=1;;b ; sid"),
        ] {
            let expected: Vec<_> = [after].into_iter().filter(|after| !after.is_empty()).collect();
            assert_eq!(left(&[before]), expected, "{before}");
        }
        assert_eq!(left(&["a=1;", "sid=1", "b; sid=x"]), ["a=1;", "b"]);
    }

    #[test]
    fn what_is_set_says_how_it_is_kept() {
        let id = Id::parse(ID.as_bytes()).unwrap();
        let set = |config: &Config, https| config.set(&id, 255, 86_400, https).to_str().unwrap().to_owned();
        let start = format!("sidegate_session={ID}.ff; Max-Age=86400; Path=/");
        assert_eq!(set(&Config::default(), false), format!("{start}; HttpOnly; SameSite=Lax"));
        assert_eq!(set(&Config::default(), true), format!("{start}; Secure; HttpOnly; SameSite=Lax"));
        let other = Config {
            name: "s".to_owned(),
            path: "/a b".to_owned(),
            domain: Some("example.com".to_owned()),
            same_site: SameSite::None,
            secure: Secure::Always,
            http_only: false,
        };
        let expected = format!("s={ID}.ff; Max-Age=86400; Path=/a b; Domain=example.com; Secure; SameSite=None");
        assert_eq!(set(&other, false), expected);
        let never = Config { secure: Secure::Never, same_site: SameSite::Strict, ..Config::default() };
        assert_eq!(set(&never, true), format!("{start}; HttpOnly; SameSite=Strict"));
    }

    proptest! {
        #[test]
        fn nothing_of_ours_is_left_and_all_of_theirs_is(pairs in prop::collection::vec("(sid|a|b)=[a-z \"=]{0,5}|[a-z ]{0,3}", 1..8)) {
            let field = pairs.join(";");
            if let Ok(value) = HeaderValue::from_str(&field) {
                let mut headers = HeaderMap::new();
                headers.insert(COOKIE, value);
                remove(&mut headers, "sid");
                let cookies = |text: &str| -> Vec<String> {
                    let pairs = text.split(';').map(|pair| pair.trim_ascii().to_owned());
                    pairs.filter(|pair| !pair.is_empty() && value_of(pair.as_bytes(), "sid").is_none()).collect()
                };
                let left = headers.get(COOKIE).map_or("", |field| field.to_str().unwrap());
                prop_assert_eq!(cookies(left), cookies(&field));
                prop_assert!(left.split(';').all(|pair| value_of(pair.as_bytes(), "sid").is_none()));
            }
        }
    }
}
