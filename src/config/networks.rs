//! Addresses and networks in the configuration.

use std::{borrow::Cow, fmt, net::IpAddr};

use ipnet::IpNet;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{Error as _, SeqAccess, Visitor},
};

use crate::message::Peer;

/// Addresses and networks.
///
/// In the configuration `private`, or a list of addresses, networks (`10.0.0.0/8`) and `private`.
///
/// ```
/// use sidegate::{config::Networks, message::Peer};
///
/// let networks: Networks = serde_json::from_str(r#"["192.0.2.0/24"]"#)?;
/// assert!(networks.contains([192, 0, 2, 7].into()));
/// assert!(!networks.holds(Peer::Unix), "a local process counts as `private`");
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Networks {
    networks: Vec<IpNet>,
    private: bool,
}

impl Networks {
    /// Those in `networks`, and, with `private`, all on loopback, private (RFC 1918, RFC 4193) and
    /// link-local addresses and behind Unix sockets.
    #[must_use]
    pub fn new(networks: impl IntoIterator<Item = IpNet>, private: bool) -> Self {
        Self { networks: networks.into_iter().collect(), private }
    }

    /// Whether `ip` is in one of them.
    #[must_use]
    pub fn contains(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        (self.private && is_private(ip)) || self.networks.iter().any(|network| network.contains(&ip))
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.private && self.networks.is_empty()
    }

    /// Whether the other end of a connection is in one of them. A Unix socket is in `private` only.
    #[must_use]
    pub fn holds(&self, peer: Peer) -> bool {
        match peer {
            Peer::Tcp(address) => self.contains(address.ip()),
            Peer::Unix => self.private,
        }
    }

    fn add(&mut self, text: &str) -> Result<(), String> {
        if text == "private" {
            self.private = true;
        } else if let Ok(network) = text.parse::<IpNet>() {
            self.networks.push(network);
        } else if let Ok(ip) = text.parse::<IpAddr>() {
            self.networks.push(ip.to_canonical().into());
        } else {
            return Err(format!("`{text}` is no address, no network like `10.0.0.0/8` and not `private`"));
        }
        Ok(())
    }
}

fn is_private(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_loopback() || ip.is_private() || ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_loopback() || ip.is_unique_local() || ip.is_unicast_link_local(),
    }
}

impl<'de> Deserialize<'de> for Networks {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Listed;

        impl<'de> Visitor<'de> for Listed {
            type Value = Networks;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`private`, or a list of addresses and networks like `10.0.0.0/8`")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<Networks, E> {
                let mut networks = Networks::default();
                networks.add(text).map(|()| networks).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Networks, A::Error> {
                let mut networks = Networks::default();
                while let Some(text) = list.next_element::<String>()? {
                    networks.add(&text).map_err(A::Error::custom)?;
                }
                Ok(networks)
            }
        }

        from.deserialize_any(Listed)
    }
}

impl Serialize for Networks {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let private = self.private.then(|| "private".to_owned());
        to.collect_seq(private.into_iter().chain(self.networks.iter().map(ToString::to_string)))
    }
}

impl JsonSchema for Networks {
    fn schema_name() -> Cow<'static, str> {
        "Networks".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "Addresses and networks; `private` stands for loopback, private and link-local ones and for Unix sockets.",
            "anyOf": [{ "type": "string" }, { "type": "array", "items": { "type": "string" } }],
        })
    }
}
