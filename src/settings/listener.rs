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
    de::{self, MapAccess, Visitor, value::MapAccessDeserializer},
};

use super::tls;
use crate::{
    config::{Check, Networks, Problems, text},
    message::Peer,
};

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

text!(Address, "ListenAddress", {
    "description": "`ADDRESS:PORT`, or `unix:/path` for a Unix socket.",
    "examples": ["0.0.0.0:8080", "[::]:8080", "unix:/run/sidegate.sock"],
});

/// One listener: its address, or a section. An entry of `listen`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Config {
    /// Where to listen: `ADDRESS:PORT`, or `unix:/path` for a Unix socket.
    pub address: Address,
    /// Ends TLS here. Default: cleartext.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls: Option<tls::Config>,
    /// Whether every connection begins with a PROXY protocol header, version 1 or 2, which names the client;
    /// one without is closed. `{from: [10.0.0.0/8]}` says who may connect: others are closed, for whoever can
    /// connect can claim any address. `true` lets anyone: only where nothing but the load balancer can connect.
    /// Default `false`.
    pub proxy_protocol: ProxyProtocol,
    /// The permissions of a Unix socket's file, in octal and in quotes: `"0660"`. Connecting takes the right to
    /// write. Default: what the process' umask leaves.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
}

impl From<Address> for Config {
    fn from(address: Address) -> Self {
        Self { address, tls: None, proxy_protocol: ProxyProtocol::Off, mode: None }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if let Some(tls) = &self.tls {
            problems.at("tls", |problems| tls.check(problems));
        }
        if let ProxyProtocol::From(peers) = &self.proxy_protocol
            && peers.is_empty()
        {
            let how = "is empty, so nobody could connect: name the load balancer's addresses, as in `[10.0.0.0/8]`";
            problems.add("proxy_protocol.from", how);
        }
        match (self.mode, &self.address) {
            (Some(_), Address::Tcp(_)) => problems.add("mode", "has no effect: only a Unix socket has permissions"),
            (Some(mode), Address::Unix(_)) if mode.get() & 0o222 == 0 => {
                problems.add("mode", format!("`{mode}` lets nobody connect: that takes the right to write"));
            }
            _ => {}
        }
    }
}

/// Whether connections begin with a PROXY protocol header, and whose. Key `proxy_protocol` of an entry of `listen`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum ProxyProtocol {
    /// They do not.
    #[default]
    Off,
    /// All do, whoever connects.
    Anyone,
    /// All do, and only these may connect.
    From(Networks),
}

impl ProxyProtocol {
    /// Whether `peer` may connect.
    #[must_use]
    pub fn admits(&self, peer: Peer) -> bool {
        match self {
            Self::Off | Self::Anyone => true,
            Self::From(peers) => peers.holds(peer),
        }
    }
}

/// Who may say, in a PROXY protocol header, who the client is.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ProxyProtocol")]
struct Peers {
    /// Who may connect: addresses, networks, or `private` for loopback, private and link-local ones and Unix
    /// sockets.
    from: Networks,
}

impl<'de> Deserialize<'de> for ProxyProtocol {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct BoolOrPeers;

        impl<'de> Visitor<'de> for BoolOrPeers {
            type Value = ProxyProtocol;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`true`, `false`, or a section with `from`")
            }

            fn visit_bool<E: de::Error>(self, on: bool) -> Result<ProxyProtocol, E> {
                Ok(if on { ProxyProtocol::Anyone } else { ProxyProtocol::Off })
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ProxyProtocol, A::Error> {
                Peers::deserialize(MapAccessDeserializer::new(map)).map(|peers| ProxyProtocol::From(peers.from))
            }
        }

        from.deserialize_any(BoolOrPeers)
    }
}

impl Serialize for ProxyProtocol {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => to.serialize_bool(false),
            Self::Anyone => to.serialize_bool(true),
            Self::From(peers) => Peers { from: peers.clone() }.serialize(to),
        }
    }
}

impl JsonSchema for ProxyProtocol {
    fn schema_name() -> Cow<'static, str> {
        "ProxyProtocol".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [{ "type": "boolean" }, Peers::json_schema(generator)] })
    }
}

/// Permissions of a file, as `chmod` takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mode(u32);

impl Mode {
    /// The bits.
    #[must_use]
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

impl FromStr for Mode {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no mode: three octal digits, with a `0` before them or not, as in `0660`");
        let digits = if text.len() == 4 { text.strip_prefix('0').ok_or_else(wrong)? } else { text };
        let is_octal = digits.len() == 3 && digits.bytes().all(|digit| matches!(digit, b'0'..=b'7'));
        is_octal.then(|| u32::from_str_radix(digits, 8).ok()).flatten().map(Self).ok_or_else(wrong)
    }
}

impl<'de> Deserialize<'de> for Mode {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Octal;

        impl Visitor<'_> for Octal {
            type Value = Mode;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a mode in quotes, as in `\"0660\"`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Mode, E> {
                text.parse().map_err(E::custom)
            }
        }

        // A number was read as a decimal one, or as an octal one, as the format has it: nobody knows.
        from.deserialize_any(Octal)
    }
}

impl Serialize for Mode {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl JsonSchema for Mode {
    fn schema_name() -> Cow<'static, str> {
        "Mode".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "Permissions in octal, as in `0660`.",
            "pattern": "^0?[0-7]{3}$",
        })
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
    /// one without is closed. `{from: [10.0.0.0/8]}` says who may connect: others are closed, for whoever can
    /// connect can claim any address. `true` lets anyone: only where nothing but the load balancer can connect.
    /// Default `false`.
    #[serde(default)]
    proxy_protocol: ProxyProtocol,
    /// The permissions of a Unix socket's file, in octal and in quotes: `"0660"`. Connecting takes the right to
    /// write. Default: what the process' umask leaves.
    mode: Option<Mode>,
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
                let section = Section::deserialize(MapAccessDeserializer::new(map))?;
                let Section { address, tls, proxy_protocol, mode } = section;
                Ok(Config { address, tls, proxy_protocol, mode })
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
    fn modes_are_octal() {
        for (text, mode) in [("0660", 0o660), ("600", 0o600), ("0777", 0o777), ("000", 0)] {
            assert_eq!(text.parse::<Mode>().unwrap().get(), mode);
        }
        assert_eq!(Mode(0o60).to_string(), "0060");
        for wrong in ["", "0", "66", "0680", "1660", "00660", "0o660", "-660", "+660", "rw-rw----"] {
            assert!(wrong.parse::<Mode>().is_err(), "{wrong}");
        }
    }

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
