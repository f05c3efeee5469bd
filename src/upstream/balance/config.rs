//! Section `balance` of an upstream, and the entries of `endpoints`.

use std::{borrow::Cow, fmt, str::FromStr};

use http::HeaderName;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{self, IntoDeserializer, MapAccess, Visitor, value::MapAccessDeserializer},
};

use crate::{
    config::{
        problem::{Check, Problems},
        text,
        units::{HumanDuration, OneOrMany, Toggle},
    },
    upstream::Address,
};

/// The most endpoints of an upstream: a pick looks at all of them.
pub const MAX_ENDPOINTS: usize = 256;
/// The greatest weight of an endpoint: a ring has 160 places for each unit of it.
pub const MAX_WEIGHT: u32 = 1000;

/// Which endpoint is asked. Section `balance` of an upstream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Balance")]
pub struct Config {
    /// `round_robin`, `random`, `hash` (the same key goes to the same endpoint), `least_requests` or `peak_ewma`.
    /// Default `least_requests`.
    pub algorithm: Algorithm,
    /// What `hash` goes by: `ip`, `path`, `header:NAME`, `query:NAME` or `cookie:NAME`. A request without it goes to any
    /// endpoint.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hash: Option<HashKey>,
    /// How long an endpoint that came back, or that a reload or DNS added, takes to get to its full share, from a tenth
    /// of it. Default `off`.
    pub slow_start: Toggle<HumanDuration>,
    /// Where less than this percentage of the endpoints is healthy, health is not looked at: the few would fall next. 0
    /// to 100. Default 50; 0 never asks one that is not healthy, and answers 503 where none is.
    pub panic_threshold: u8,
    /// How often names are looked up, at least 1s. Each address is an endpoint of its own then. Default `off`: a name is
    /// one endpoint, looked up for each new connection.
    pub resolve: Toggle<HumanDuration>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            algorithm: Algorithm::default(),
            hash: None,
            slow_start: Toggle::Off,
            panic_threshold: 50,
            resolve: Toggle::Off,
        }
    }
}

/// How an endpoint is picked. Key `algorithm` of `balance`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Algorithm {
    /// One after the other, each as often as it weighs.
    RoundRobin,
    /// By chance.
    Random,
    /// By a key of the request, on a ring (ketama): where an endpoint comes or goes, most keys stay where they are.
    Hash,
    /// Of two at random, the one with less in flight for its weight. Streams count until they end. The default.
    #[default]
    LeastRequests,
    /// Of two at random, the one with less to wait for: its time to the first byte, times what is in flight. A failure
    /// counts as slow however fast it is: no connection, a reset, a timeout, 429, and what `health.passive` counts.
    PeakEwma,
}

/// What a hash goes by. Key `hash` of `balance`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// The client's address.
    Ip,
    /// The path, without the query.
    Path,
    /// The first field of that name.
    Header(HeaderName),
    /// The first parameter of that name, as it is encoded.
    Query(String),
    /// The first cookie of that name.
    Cookie(String),
}

const KEYS: &str = "`ip`, `path`, `header:NAME`, `query:NAME` or `cookie:NAME`";

impl FromStr for HashKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no key to hash: {KEYS}");
        Ok(match text.split_once(':') {
            None if text == "ip" => Self::Ip,
            None if text == "path" => Self::Path,
            Some(("header", name)) => Self::Header(name.parse().map_err(|_| wrong())?),
            Some(("query", name)) if !name.is_empty() => Self::Query(name.to_owned()),
            // RFC 6265 §4.1.1: a token, as the name of a field is.
            Some(("cookie", name)) if name.parse::<HeaderName>().is_ok() => Self::Cookie(name.to_owned()),
            _ => return Err(wrong()),
        })
    }
}

impl fmt::Display for HashKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip => f.write_str("ip"),
            Self::Path => f.write_str("path"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Query(name) => write!(f, "query:{name}"),
            Self::Cookie(name) => write!(f, "cookie:{name}"),
        }
    }
}

text!(HashKey, "HashKey", {
    "description": "What a hash goes by: ip, path, header:NAME, query:NAME or cookie:NAME.",
    "pattern": "^(ip|path|(header|query|cookie):.+)$",
});

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        match (self.algorithm, &self.hash) {
            (Algorithm::Hash, None) => problems.add("hash", format!("is missing: say what to go by, {KEYS}")),
            (Algorithm::Hash, Some(_)) | (_, None) => {}
            (_, Some(_)) => problems.add("hash", "has no effect without `algorithm: hash`"),
        }
        if self.panic_threshold > 100 {
            problems.add("panic_threshold", format!("is {}: must be a percentage, 0 to 100", self.panic_threshold));
        }
        if let Toggle::On(window) = self.slow_start
            && window.is_zero()
        {
            problems.add("slow_start", "must be longer than 0s; `off` has none");
        }
        if let Toggle::On(every) = self.resolve
            && every < HumanDuration::from_secs(1)
        {
            problems.add("resolve", format!("is {every}: must be at least 1s"));
        }
    }
}

/// An endpoint of an upstream, with its share. An entry of `endpoints`: the URL alone, or a section.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where it listens.
    pub url: Address,
    /// Its share, next to the weights of the others.
    pub weight: u32,
}

/// The section. An entry is read by way of it, and its doc comments are the schema's text.
#[derive(Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "WeightedEndpoint")]
struct Section {
    /// Where it listens: `http://HOST[:PORT]`, `https://HOST[:PORT]` or `unix:/PATH`.
    url: Address,
    /// How much it gets, next to the others, 0 to 1000; 0 gets nothing. Default 1.
    #[serde(default = "one")]
    weight: u32,
}

fn one() -> u32 {
    1
}

impl From<Address> for Entry {
    fn from(url: Address) -> Self {
        Self { url, weight: 1 }
    }
}

impl<'de> Deserialize<'de> for Entry {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct TextOrSection;

        impl<'de> Visitor<'de> for TextOrSection {
            type Value = Entry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a URL or a section with `url` and `weight`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Entry, E> {
                Address::deserialize(text.into_deserializer()).map(Entry::from)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Entry, A::Error> {
                let Section { url, weight } = Section::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Entry { url, weight })
            }
        }

        from.deserialize_any(TextOrSection)
    }
}

impl Serialize for Entry {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.weight {
            1 => self.url.serialize(to),
            weight => Section { url: self.url.clone(), weight }.serialize(to),
        }
    }
}

impl JsonSchema for Entry {
    fn schema_name() -> Cow<'static, str> {
        "Endpoint".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (url, section) = (generator.subschema_for::<Address>(), generator.subschema_for::<Section>());
        json_schema!({ "anyOf": [url, section] })
    }
}

/// What is wrong with the list `endpoints`, which is not empty.
pub fn check_endpoints(endpoints: &OneOrMany<Entry>, problems: &mut Problems) {
    if endpoints.0.len() > MAX_ENDPOINTS {
        problems.add("endpoints", format!("has {} entries: at most {MAX_ENDPOINTS}", endpoints.0.len()));
    }
    for (n, entry) in endpoints.iter().enumerate() {
        if entry.weight > MAX_WEIGHT {
            problems.add(format!("endpoints.{n}.weight"), format!("is {}: must be 0 to {MAX_WEIGHT}", entry.weight));
        }
        let mut earlier = endpoints.iter().take(n);
        // Also with another scheme: logs and metrics could not tell them apart.
        if earlier.any(|other| other.url.to_string() == entry.url.to_string()) {
            problems.add(format!("endpoints.{n}"), format!("`{}` stands there twice: give it a `weight`", entry.url));
        }
    }
    if endpoints.iter().all(|entry| entry.weight == 0) {
        problems.add("endpoints", "all have a `weight` of 0: nobody would be asked");
    }
}
