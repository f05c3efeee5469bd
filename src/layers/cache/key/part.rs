//! What the file says of keys: what counts, and what does not.

use std::{fmt, str::FromStr};

use http::HeaderName;

use crate::config::text;

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

pub(super) const KEYS: &str = "`body`, `principal`, `header:NAME` or `cookie:NAME`";

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

text!(KeyPart, "CacheKey", {
    "description": "What counts besides method, host, path and query: body, principal, header:NAME or cookie:NAME.",
    "pattern": "^(body|principal|(header|cookie):[A-Za-z0-9!#$%&'*+.^_`|~-]+)$",
});

/// The name of a parameter of the query, `fbclid`, or with `*` behind it all that begin so: `utm_*`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QueryName {
    name: String,
    open: bool,
}

impl QueryName {
    /// Whether all that `other` means is meant.
    pub(in super::super) fn covers(&self, other: &Self) -> bool {
        if self.open { other.name.starts_with(&self.name) } else { self == other }
    }

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
        if text == "*" {
            return Err("`*` is every parameter: an answer would be given whatever its query asks for".to_owned());
        }
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

text!(QueryName, "CacheQueryName", {
    "description": "A parameter of the query, `fbclid`, or all that begin so, `utm_*`.",
    "pattern": r"^[^*&=;%\s]+\*?$",
});
