//! What the file says of rate limits.

use std::{borrow::Cow, fmt, str::FromStr};

use http::HeaderName;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{
        self, Error as _, MapAccess, SeqAccess, Visitor,
        value::{MapAccessDeserializer, SeqAccessDeserializer},
    },
};

use super::window;
use crate::{
    config::{
        ByteSize, HumanDuration, Networks, OneOrMany, Problems,
        rate::{read_per, shown_per},
        text,
        units::ParseError,
    },
    message::path::Pattern,
};

/// The most rules of a route: each is a counter in the one step of a request.
const MAX_RULES: usize = 16;
/// The largest limit: beyond it, numbers are no longer exact in Lua.
const MAX_LIMIT: u64 = 1 << 50;
/// The longest window.
const MAX_PER: HumanDuration = HumanDuration::from_secs(31 * 86_400);

/// How much each may use. Section `rate_limit`: a list of rules, or a section with the list in `rules`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// The rules. A request passes only if all do, and one that is refused has used nothing.
    pub rules: Vec<Rule>,
    /// Whom counters are shared with; none: nobody but the route.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scope: Option<String>,
    /// What holds while Redis is out of order.
    pub on_store_failure: OnStoreFailure,
    /// Whether `X-RateLimit-*` is written.
    pub legacy_headers: bool,
    /// Whether `x-ratelimit-*-requests` and `-tokens` are written.
    pub openai_headers: bool,
}

impl From<Vec<Rule>> for Config {
    fn from(rules: Vec<Rule>) -> Self {
        Self {
            rules,
            scope: None,
            on_store_failure: OnStoreFailure::default(),
            legacy_headers: false,
            openai_headers: false,
        }
    }
}

/// How much each may use, in full.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "RateLimitSection")]
struct Section {
    /// The rules, 1 to 16. A request passes only if all do, and one that is refused has used nothing.
    rules: Vec<Rule>,
    /// Routes with the same scope share the counters of rules with the same name, which must count in the same way. Default:
    /// each route counts for itself.
    scope: Option<String>,
    /// What holds while Redis is out of order: `local` (each replica by itself, for its share of the limits), `allow`
    /// (no limit), or `deny` (503). Default `local`.
    #[serde(default)]
    on_store_failure: OnStoreFailure,
    /// Whether the fields `X-RateLimit-Limit`, `-Remaining` and `-Reset` (seconds of the epoch) are written, of the rule
    /// that is nearest to its end. Default `false`.
    #[serde(default)]
    legacy_headers: bool,
    /// Whether the fields are written that OpenAI's clients know: `x-ratelimit-limit-requests`, `-remaining-requests`,
    /// `-reset-requests`, and those with `-tokens`. Default `false`.
    #[serde(default)]
    openai_headers: bool,
}

/// What holds while Redis is out of order. Key `on_store_failure` of `rate_limit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnStoreFailure {
    /// Each replica counts by itself, for its share of the limits: the default.
    #[default]
    Local,
    /// No limit.
    Allow,
    /// Nobody passes.
    Deny,
}

/// A limit. An entry of `rate_limit`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "RateLimitRule")]
pub struct Rule {
    /// What answers, logs and metrics call it: 1 to 64 letters, digits, `_`, `-` or `.`.
    pub name: String,
    /// What is counted apart: `global` (nothing), `route`, `ip` (an IPv6 address by its /64), `principal`,
    /// `session`, `header:NAME`, `query:NAME`, `path:NAME` (a parameter of the path), or a list of these. Where a request has none,
    /// or several that differ, its address stands in; so it does for the request that begins a session. What `auth` or
    /// `session` take away cannot be counted by.
    pub key: OneOrMany<KeyPart>,
    /// How much: `100/min`, `20/5s`, of bytes also `10MiB/h`; with `cost: in_flight` a number.
    pub limit: Limit,
    /// How it is counted: `sliding_window`, or `token_bucket` (GCRA: evenly, with `burst` at once). Default
    /// `sliding_window`.
    #[serde(default)]
    pub algorithm: Algorithm,
    /// How much may be used at once, of a `token_bucket`. Default: the whole of `limit`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub burst: Option<Amount>,
    /// What a request uses: `1`, `bytes` (of both bodies; the response's are charged when it is over, so that many at once
    /// may use more), `tokens` (of a language model), or `in_flight` (itself, until it ends). Default `1`.
    #[serde(default)]
    pub cost: Cost,
    /// With `cost: tokens`, the tokens of output that are taken for a request until it is known what it used, if it does
    /// not say itself how many it wants at most. Default 1000.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reserve: Option<u32>,
    /// Whom it does not hold for.
    #[serde(default, skip_serializing_if = "Exempt::is_empty")]
    pub exempt: Exempt,
    /// Whether it only counts and logs (`rate_limit_shadow` in the access log), and refuses nobody. Default `false`.
    #[serde(default)]
    pub shadow: bool,
}

/// Whom a limit does not hold for. Section `exempt` of a rule; one that fits is enough.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "RateLimitExempt")]
pub struct Exempt {
    /// Tiers of principals.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tiers: Vec<String>,
    /// Addresses and networks of clients.
    #[serde(skip_serializing_if = "Networks::is_empty")]
    pub ips: Networks,
    /// Paths, as in `match.path`. One that is written in an unusual way is not exempt.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<Pattern>,
}

impl Exempt {
    fn is_empty(&self) -> bool {
        self.tiers.is_empty() && self.ips.is_empty() && self.paths.is_empty()
    }
}

/// How a limit counts. Key `algorithm` of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "RateLimitAlgorithm")]
pub enum Algorithm {
    /// In this window and the one before, weighted: the default.
    #[default]
    SlidingWindow,
    /// GCRA.
    TokenBucket,
}

/// What a request uses. Key `cost` of a rule.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Cost {
    /// One: the default.
    #[default]
    One,
    /// The bytes of its body and of the response's.
    Bytes,
    /// The tokens of a language model, input and output.
    Tokens,
    /// Itself, until it ends.
    InFlight,
}

const COSTS: &str = "`1`, `bytes`, `tokens` or `in_flight`";

impl Cost {
    /// As the file has it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::One => "1",
            Self::Bytes => "bytes",
            Self::Tokens => "tokens",
            Self::InFlight => "in_flight",
        }
    }
}

impl<'de> Deserialize<'de> for Cost {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = Cost;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(COSTS)
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Cost, E> {
                let all = [Cost::One, Cost::Bytes, Cost::Tokens, Cost::InFlight];
                let found = all.into_iter().find(|cost| cost.as_str() == text);
                found.ok_or_else(|| E::custom(format!("`{text}` is no cost: there are {COSTS}")))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Cost, E> {
                self.visit_str(&number.to_string())
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Cost, E> {
                self.visit_str(&number.to_string())
            }
        }

        from.deserialize_any(Text)
    }
}

impl Serialize for Cost {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::One => to.serialize_u8(1),
            other => to.serialize_str(other.as_str()),
        }
    }
}

impl JsonSchema for Cost {
    fn schema_name() -> Cow<'static, str> {
        "RateLimitCost".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "What a request uses: 1, bytes, tokens or in_flight.",
            "enum": [1, "1", "bytes", "tokens", "in_flight"],
        })
    }
}

/// An amount, as a file writes it: a number, or a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Amount {
    /// How many.
    pub count: u64,
    /// Whether it was written with a unit of bytes.
    pub is_size: bool,
}

impl FromStr for Amount {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let is_size = !text.bytes().all(|byte| byte.is_ascii_digit());
        Ok(Self { count: text.parse::<ByteSize>()?.get(), is_size })
    }
}

impl fmt::Display for Amount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_size { ByteSize::from_bytes(self.count).fmt(f) } else { self.count.fmt(f) }
    }
}

/// How much may be used: `100/min`, `10MiB/h`, or `20` of what is in flight.
///
/// ```
/// use sidegate::layers::rate_limit::Limit;
///
/// let limit: Limit = "10MiB/h".parse()?;
/// assert_eq!((limit.amount.count, limit.per.map(|per| per.get().as_secs())), (10 << 20, Some(3600)));
/// assert_eq!(limit.to_string(), "10MiB/h");
/// # Ok::<(), String>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// How much.
    pub amount: Amount,
    /// In how long a time; none for what is in flight.
    pub per: Option<HumanDuration>,
}

impl FromStr for Limit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong =
            || format!("`{text}` is no limit: write a number and a time, as in `100/min`, `20/5s` or `10MiB/h`");
        let (amount, per) = match text.split_once('/') {
            Some((amount, per)) => (amount, Some(read_per(per.trim()).ok_or_else(wrong)?)),
            None => (text, None),
        };
        Ok(Self { amount: amount.trim().parse().map_err(|_| wrong())?, per })
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.amount.fmt(f)?;
        self.per.map_or(Ok(()), |per| write!(f, "/{}", shown_per(per)))
    }
}

/// Text, or a number.
struct Text(String);

impl<'de> Deserialize<'de> for Text {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct TextOrNumber;

        impl Visitor<'_> for TextOrNumber {
            type Value = Text;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number, or text as in `100/min`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Text, E> {
                Ok(Text(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, number: u64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }

            fn visit_i64<E: de::Error>(self, number: i64) -> Result<Text, E> {
                Ok(Text(number.to_string()))
            }
        }

        from.deserialize_any(TextOrNumber)
    }
}

impl<'de> Deserialize<'de> for Limit {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Text::deserialize(from)?.0.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Limit {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self.per {
            Some(_) => to.collect_str(self),
            None => self.amount.serialize(to),
        }
    }
}

impl JsonSchema for Limit {
    fn schema_name() -> Cow<'static, str> {
        "Limit".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "minimum": 1,
            "description": "How much in a time, `100/min`, `20/5s`, `10MiB/h`; or a number of what is in flight.",
            "pattern": r"^ *[0-9]+ *[kKMGT]?i?B? *(/ *(min|[0-9.]* ?(ms|s|m|h|d))+ *)?$",
        })
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Text::deserialize(from)?.0.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Amount {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        if self.is_size { to.collect_str(self) } else { to.serialize_u64(self.count) }
    }
}

impl JsonSchema for Amount {
    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "minimum": 1,
            "description": "A number, or a size as `64KiB`.",
            "pattern": "^ *[0-9]+ *[kKMGT]?i?B? *$",
        })
    }
}

/// What is counted apart. Key `key` of a rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyPart {
    /// Nothing: all share one counter.
    Global,
    /// The route, by its name.
    Route,
    /// The client's address, or its /64.
    Ip,
    /// The session.
    Session,
    /// Who asks.
    Principal,
    /// A field of the request.
    Header(HeaderName),
    /// A parameter of the query.
    Query(String),
    /// A parameter of the path.
    Path(String),
}

const KEYS: &str = "`global`, `route`, `ip`, `principal`, `session`, `header:NAME`, `query:NAME` or `path:NAME`";

impl FromStr for KeyPart {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no key: there are {KEYS}");
        Ok(match text.split_once(':') {
            None if text == "global" => Self::Global,
            None if text == "route" => Self::Route,
            None if text == "ip" => Self::Ip,
            None if text == "principal" => Self::Principal,
            None if text == "session" => Self::Session,
            Some(("header", name)) => Self::Header(name.parse().map_err(|_| wrong())?),
            Some(("query", name)) if !name.is_empty() => Self::Query(name.to_owned()),
            Some(("path", name)) if !name.is_empty() => Self::Path(name.to_owned()),
            _ => return Err(wrong()),
        })
    }
}

impl fmt::Display for KeyPart {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Global => f.write_str("global"),
            Self::Route => f.write_str("route"),
            Self::Ip => f.write_str("ip"),
            Self::Principal => f.write_str("principal"),
            Self::Session => f.write_str("session"),
            Self::Header(name) => write!(f, "header:{name}"),
            Self::Query(name) => write!(f, "query:{name}"),
            Self::Path(name) => write!(f, "path:{name}"),
        }
    }
}

text!(KeyPart, "RateLimitKey", {
    "description": "What is counted apart: global, route, ip, principal, session, header:NAME, query:NAME or path:NAME.",
    "pattern": "^(global|route|ip|principal|session|(header|query|path):.+)$",
});

/// How long a lease lives that nobody renews: as long as a place is taken of a replica that died.
const LEASE: HumanDuration = HumanDuration::from_secs(20);

impl Rule {
    /// As it is counted.
    #[must_use]
    pub fn quota(&self) -> window::Quota {
        let limit = window::amount(self.limit.amount.count);
        window::Quota {
            algorithm: match (self.cost, self.algorithm) {
                (Cost::InFlight, _) => window::Algorithm::InFlight,
                (_, Algorithm::SlidingWindow) => window::Algorithm::SlidingWindow,
                (_, Algorithm::TokenBucket) => window::Algorithm::TokenBucket,
            },
            limit,
            per: window::as_micros(self.limit.per.unwrap_or(LEASE).get()),
            burst: self.burst.map_or(limit, |burst| window::amount(burst.count)),
        }
    }

    /// Whether it counts as `other` does, so that they may have a counter in common.
    #[must_use]
    pub fn counts_as(&self, other: &Self) -> bool {
        (self.quota(), self.cost, &self.key) == (other.quota(), other.cost, &other.key)
    }

    fn check(&self, problems: &mut Problems) {
        let Self { name, key, limit, algorithm, burst, cost, reserve, .. } = self;
        if !is_name(name) {
            problems.add("name", "is no name: 1 to 64 letters, digits, `_`, `-` or `.`");
        }
        let parts: Vec<_> = key.iter().collect();
        if parts.is_empty() {
            problems.add("key", format!("is an empty list: there are {KEYS}"));
        } else if parts.len() > 1 && parts.contains(&&KeyPart::Global) {
            problems.add("key", "holds `global` beside others, which it adds nothing to");
        }
        for (n, part) in parts.iter().enumerate() {
            if parts.iter().take(n).any(|other| other == part) {
                problems.add("key", format!("holds `{part}` twice"));
            }
        }
        match (cost, limit.per) {
            (Cost::InFlight, Some(_)) => {
                problems.add("limit", format!("is {limit}: what is in flight has a number and no time, as in `20`"));
            }
            (Cost::InFlight, None) => {}
            (_, None) => problems.add("limit", format!("is {limit}: say in how long a time, as in `{limit}/min`")),
            (_, Some(per)) if per > MAX_PER => problems.add("limit", format!("is {limit}: must be of at most 31d")),
            _ => {}
        }
        for (key, amount) in [("limit", Some(limit.amount)), ("burst", *burst)] {
            let Some(amount) = amount else { continue };
            if amount.count == 0 {
                problems.add(key, "must be at least 1");
            } else if amount.count > MAX_LIMIT {
                problems.add(key, format!("is {amount}: must be at most 1024TiB"));
            }
            if amount.is_size && *cost != Cost::Bytes {
                problems.add(key, format!("is {amount}, a size: only `cost: bytes` counts bytes"));
            }
        }
        if *cost == Cost::InFlight && *algorithm != Algorithm::SlidingWindow {
            problems.add("algorithm", "has no effect with `cost: in_flight`");
        }
        if reserve.is_some() && *cost != Cost::Tokens {
            problems.add("reserve", "has no effect without `cost: tokens`");
        }
        if burst.is_some() && (*algorithm != Algorithm::TokenBucket || *cost == Cost::InFlight) {
            problems.add("burst", "has no effect without `algorithm: token_bucket`");
        }
    }
}

fn is_name(text: &str) -> bool {
    (1..=64).contains(&text.len()) && text.bytes().all(|c| c.is_ascii_alphanumeric() || matches!(c, b'_' | b'-' | b'.'))
}

impl Config {
    /// Adds what is wrong with it. The rules stand below `list`, `rules.` or nothing; `parameters` are those of the
    /// route's path, where there is a route.
    pub fn check(&self, list: &str, parameters: Option<&[&str]>, problems: &mut Problems) {
        let rules = &self.rules;
        if !(1..=MAX_RULES).contains(&rules.len()) {
            let key = list.trim_end_matches('.');
            problems.add(key, format!("has {} rules: 1 to {MAX_RULES}, or `rate_limit: off`", rules.len()));
        }
        if self.scope.as_ref().is_some_and(|scope| !is_name(scope)) {
            problems.add("scope", "is no name: 1 to 64 letters, digits, `_`, `-` or `.`");
        }
        for (n, rule) in rules.iter().enumerate() {
            problems.at(format!("{list}{n}"), |problems| {
                rule.check(problems);
                if rules.iter().take(n).any(|other| other.name == rule.name) {
                    problems.add("name", format!("`{}` is the name of another rule already", rule.name));
                }
                for part in &rule.key {
                    if let (KeyPart::Path(name), Some(known)) = (part, parameters)
                        && !known.contains(&&**name)
                    {
                        problems.add("key", format!("`{part}`: the path of the route has no parameter `{{{name}}}`"));
                    }
                }
            });
        }
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ListOrSection;

        impl<'de> Visitor<'de> for ListOrSection {
            type Value = Config;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of rules, or a section with `rules`")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Config, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(Config::from)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Config, A::Error> {
                let Section { rules, scope, on_store_failure, legacy_headers, openai_headers } =
                    Section::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Config { rules, scope, on_store_failure, legacy_headers, openai_headers })
            }
        }

        from.deserialize_any(ListOrSection)
    }
}

impl JsonSchema for Config {
    fn schema_name() -> Cow<'static, str> {
        "RateLimit".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [generator.subschema_for::<Vec<Rule>>(), generator.subschema_for::<Section>()],
        })
    }
}
