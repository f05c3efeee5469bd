//! Section `listen`: where clients connect, and what stands before HTTP there.

use std::{
    borrow::Cow,
    fmt,
    net::SocketAddr,
    path::{Path, PathBuf},
    str::FromStr,
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, Error as _, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::tls;

/// Where a listener listens.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `ADDRESS:PORT`, with the address in brackets if it is IPv6. Port 0 lets the system choose.
    Tcp(SocketAddr),
    /// `unix:/path/of/the/socket`.
    Unix(PathBuf),
}

impl Address {
    /// Whether only this machine can connect.
    #[must_use]
    pub fn is_local(&self) -> bool {
        match self {
            Self::Tcp(address) => address.ip().to_canonical().is_loopback(),
            Self::Unix(_) => true,
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        match text.strip_prefix("unix:") {
            Some(path) if Path::new(path).is_absolute() => Ok(Self::Unix(path.into())),
            Some(_) => Err(AddressError(text.to_owned())),
            None => text.parse().map(Self::Tcp).map_err(|_| AddressError(text.to_owned())),
        }
    }
}

/// A text that is no address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressError(String);

impl fmt::Display for AddressError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(text) = self;
        write!(f, "`{text}` is no address to listen on: `0.0.0.0:8080`, `[::]:8080` or `unix:/run/sidegate.sock`")
    }
}

impl std::error::Error for AddressError {}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl JsonSchema for Address {
    fn schema_name() -> Cow<'static, str> {
        "ListenAddress".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "`ADDRESS:PORT`, or `unix:/path` for a Unix socket.",
            "examples": ["0.0.0.0:8080", "[::]:8080", "unix:/run/sidegate.sock"],
        })
    }
}

/// One listener: its address, or a section. An entry of `listen`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Where to listen: `ADDRESS:PORT`, or `unix:/path` for a Unix socket.
    pub address: Address,
    /// Ends TLS here. Default: cleartext.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<tls::Config>,
    /// Whether every connection begins with a PROXY protocol header, version 1 or 2, which names the client;
    /// one without is closed. Default `false`. Whoever can connect can claim any address: switch it on only
    /// where nothing but the load balancer can.
    pub proxy_protocol: bool,
}

impl From<Address> for Config {
    fn from(address: Address) -> Self {
        Self { address, tls: None, proxy_protocol: false }
    }
}

/// A listener in full.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Section {
    /// Where to listen: `ADDRESS:PORT`, or `unix:/path` for a Unix socket.
    address: Address,
    /// Ends TLS here. Default: cleartext.
    tls: Option<tls::Config>,
    /// Whether every connection begins with a PROXY protocol header, version 1 or 2, which names the client;
    /// one without is closed. Default `false`. Whoever can connect can claim any address: switch it on only
    /// where nothing but the load balancer can.
    #[serde(default)]
    proxy_protocol: bool,
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct AddressOrSection;

        impl<'de> Visitor<'de> for AddressOrSection {
            type Value = Config;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address, or a section with `address`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Config, E> {
                text.parse::<Address>().map(Config::from).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Config, A::Error> {
                let Section { address, tls, proxy_protocol } = Section::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Config { address, tls, proxy_protocol })
            }
        }

        from.deserialize_any(AddressOrSection)
    }
}

impl JsonSchema for Config {
    fn schema_name() -> Cow<'static, str> {
        "Listener".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [generator.subschema_for::<Address>(), Section::json_schema(generator)] })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_as_they_are_written() {
        for text in ["0.0.0.0:8080", "[::1]:80", "unix:/run/a b.sock"] {
            assert_eq!(text.parse::<Address>().unwrap().to_string(), text);
        }
        for wrong in ["8080", ":8080", "localhost:8080", "unix:relative", "unix:", "/run/a.sock"] {
            assert!(wrong.parse::<Address>().is_err(), "{wrong}");
        }
        assert!("[::ffff:127.0.0.1]:80".parse::<Address>().unwrap().is_local());
        assert!(!"0.0.0.0:80".parse::<Address>().unwrap().is_local());
    }
}
