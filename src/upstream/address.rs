//! Addresses of endpoints, as the configuration writes them.

use std::{borrow::Cow, fmt, path::PathBuf, str::FromStr, sync::Arc};

use http::{Uri, uri::Authority};
use rustls::pki_types::{InvalidDnsNameError, ServerName};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// Where an endpoint listens: `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// TCP. The port is always there.
    Tcp {
        /// Whether TLS is spoken.
        tls: bool,
        /// Host and port.
        authority: Authority,
    },
    /// A Unix socket.
    Unix(Arc<PathBuf>),
}

impl Address {
    /// Whether TLS is spoken.
    #[must_use]
    pub fn tls(&self) -> bool {
        matches!(self, Self::Tcp { tls: true, .. })
    }
}

/// The endpoint as logs and metrics name it: `HOST:PORT` or `unix:/PATH`.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp { authority, .. } => f.write_str(authority.as_str()),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        const FORMS: &str = "http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH";
        if let Some(path) = text.strip_prefix("unix:") {
            // An absolute path: what a relative one means would depend on where sidegate was started.
            return if path.starts_with('/') && path.len() > 1 {
                Ok(Self::Unix(Arc::new(path.into())))
            } else {
                Err(format!("`{text}` needs an absolute path: unix:/PATH"))
            };
        }
        // What is wrong may be a password: the text is not repeated where it holds one.
        if text.contains('@') {
            return Err(format!("an endpoint has no user and password: {FORMS}"));
        }
        let uri: Uri = text.parse().map_err(|_| format!("`{text}` is no endpoint: {FORMS}"))?;
        let tls = match uri.scheme_str() {
            Some("http") => false,
            Some("https") => true,
            _ => return Err(format!("`{text}` is no endpoint: {FORMS}")),
        };
        if uri.path() != "/" || uri.query().is_some() {
            return Err(format!("`{text}` has a path: an endpoint is a host, requests keep their own path"));
        }
        let authority = uri.authority().filter(|authority| !authority.host().is_empty());
        let authority = authority.ok_or_else(|| format!("`{text}` has no host: {FORMS}"))?;
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None if authority.as_str().ends_with(':') => return Err(format!("`{text}` has no port after its `:`")),
            // `Authority` takes any digits for a port, and then has none.
            None if authority.as_str().len() > authority.host().len() => {
                return Err(format!("`{text}` has no port from 1 to 65535 after its `:`"));
            }
            None => 80 + 363 * u16::from(tls),
        };
        if port == 0 {
            return Err(format!("`{text}` has port 0, which nothing listens on"));
        }
        let authority = format!("{}:{port}", authority.host());
        let authority: Authority = authority.parse().map_err(|_| format!("`{text}` is no endpoint: {FORMS}"))?;
        if tls && server_name(&authority).is_err() {
            return Err(format!(
                "`{text}` has a host that no certificate can name: https:// needs a DNS name or an IP"
            ));
        }
        Ok(Self::Tcp { tls, authority })
    }
}

/// Whom TLS asks for at `authority`.
pub(super) fn server_name(authority: &Authority) -> Result<ServerName<'static>, InvalidDnsNameError> {
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    ServerName::try_from(host.to_owned())
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(de::Error::custom)
    }
}

/// As the configuration writes it, with its scheme and port.
impl Serialize for Address {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Tcp { tls, .. } => to.collect_str(&format_args!("http{}://{self}", if *tls { "s" } else { "" })),
            Self::Unix(_) => to.collect_str(self),
        }
    }
}

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "Address".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "Where an endpoint listens: http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH.",
            "pattern": "^(https?://[^/@]+/?|unix:/.+)$",
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_port_is_filled_in() {
        let name = |text: &str| text.parse::<Address>().unwrap().to_string();
        assert_eq!(name("http://backend"), "backend:80");
        assert_eq!(name("https://backend/"), "backend:443");
        assert_eq!(name("http://[::1]:8000"), "[::1]:8000");
        assert_eq!(name("https://[::1]"), "[::1]:443");
        assert_eq!(name("https://my_service.local"), "my_service.local:443");
        assert_eq!(name("unix:/run/app.sock"), "unix:/run/app.sock");
    }

    #[test]
    fn what_is_wrong_is_said_without_the_password() {
        for wrong in [
            "",
            "backend:80",
            "ftp://a",
            "http://",
            "http://a/b",
            "http://a?b",
            "http://a:0",
            "http://a:99999",
            "http://a:",
            "unix:a",
            "https://a..b",
            "https://-a-",
        ] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
        let error = "http://me:secret@a".parse::<Address>().unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }

    proptest! {
        #[test]
        fn any_text_is_an_address_or_an_error(text: String) {
            if let Ok(address) = text.parse::<Address>() {
                prop_assert!(!address.to_string().is_empty());
            }
        }
    }
}
