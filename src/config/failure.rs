//! How an upstream fails, in the words of the configuration: what retries and fallbacks are triggered by.

use std::{borrow::Cow, fmt};

use http::StatusCode;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

use crate::message::{Error, Kind};

/// A way in which an upstream fails to serve a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// `connect`: no connection came about.
    Connect,
    /// `reset`: the connection broke, or what came was no HTTP, before the head of a response.
    Reset,
    /// `timeout`: no head of a response within `first_byte`.
    Timeout,
    /// `circuit-open`: its breaker is open.
    CircuitOpen,
    /// `no-healthy-endpoint`: none of its endpoints is up.
    NoHealthyEndpoint,
    /// `overloaded`: it is asked as much as it may be.
    Overloaded,
    /// It answered with this status: 408, 425, 429, or 500 to 599.
    Status(StatusCode),
}

impl Failure {
    /// Those with a name.
    pub const NAMED: [Self; 6] =
        [Self::Connect, Self::Reset, Self::Timeout, Self::CircuitOpen, Self::NoHealthyEndpoint, Self::Overloaded];

    /// What an attempt came to, if it is a failure: of an error, those that are the upstream's; of an answer, its
    /// status whatever it is.
    #[must_use]
    pub fn of<B>(result: Result<&http::Response<B>, &(dyn std::error::Error + 'static)>) -> Option<Self> {
        let error = match result {
            Ok(response) => return Some(Self::Status(response.status())),
            Err(error) => error,
        };
        match Error::find(error)?.kind() {
            Kind::ConnectFailed => Some(Self::Connect),
            Kind::UpstreamReset => Some(Self::Reset),
            Kind::UpstreamTimeout => Some(Self::Timeout),
            Kind::CircuitOpen => Some(Self::CircuitOpen),
            Kind::NoHealthyEndpoint => Some(Self::NoHealthyEndpoint),
            Kind::Overloaded => Some(Self::Overloaded),
            _ => None,
        }
    }

    /// Its name; `status` for all statuses.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Connect => "connect",
            Self::Reset => "reset",
            Self::Timeout => "timeout",
            Self::CircuitOpen => "circuit-open",
            Self::NoHealthyEndpoint => "no-healthy-endpoint",
            Self::Overloaded => "overloaded",
            Self::Status(_) => "status",
        }
    }

    /// Whether it is certain that the upstream never saw the request.
    #[must_use]
    pub const fn unsent(self) -> bool {
        !matches!(self, Self::Reset | Self::Timeout | Self::Status(_))
    }

    fn status(code: u64) -> Option<Self> {
        // Any other 4xx is about the request, and would be the same again.
        let counts = matches!(code, 408 | 425 | 429 | 500..=599);
        counts.then(|| StatusCode::from_u16(u16::try_from(code).ok()?).ok())?.map(Self::Status)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status(status) => f.write_str(status.as_str()),
            named => f.write_str(named.name()),
        }
    }
}

impl<'de> Deserialize<'de> for Failure {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Named;

        impl de::Visitor<'_> for Named {
            type Value = Failure;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of a failure, as in `connect`, or a status, as in `503`")
            }

            fn visit_u64<E: de::Error>(self, code: u64) -> Result<Failure, E> {
                Failure::status(code).ok_or_else(|| {
                    E::custom(format!("{code} is no failure of an upstream: there are 408, 425, 429 and 500 to 599"))
                })
            }

            fn visit_i64<E: de::Error>(self, code: i64) -> Result<Failure, E> {
                self.visit_u64(u64::try_from(code).unwrap_or(0))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Failure, E> {
                if let Ok(code) = text.parse() {
                    return self.visit_u64(code);
                }
                let found = Failure::NAMED.into_iter().find(|known| known.name() == text);
                found.ok_or_else(|| {
                    let names = Failure::NAMED.map(Failure::name).join("`, `");
                    E::custom(format!("`{text}` is no failure: there are `{names}`, and statuses"))
                })
            }
        }

        from.deserialize_any(Named)
    }
}

impl Serialize for Failure {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Status(status) => to.serialize_u16(status.as_u16()),
            named => to.serialize_str(named.name()),
        }
    }
}

impl JsonSchema for Failure {
    fn schema_name() -> Cow<'static, str> {
        "Failure".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "How an upstream fails: a name, or a status that it answers with.",
            "anyOf": [
                { "enum": Self::NAMED.map(Self::name) },
                { "enum": [408, 425, 429] },
                { "type": "integer", "minimum": 500, "maximum": 599 },
            ],
        })
    }
}
