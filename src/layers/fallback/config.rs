//! What the file says of fallbacks.

use std::{borrow::Cow, collections::BTreeMap, fmt, path::Path};

use http::{
    HeaderName, HeaderValue,
    header::{AUTHORIZATION, CONNECTION, CONTENT_LENGTH, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE},
    uri::PathAndQuery,
};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{
        self, Error as _, MapAccess, SeqAccess, Visitor,
        value::{MapAccessDeserializer, SeqAccessDeserializer},
    },
};
use serde_json::{Map, Value};

use crate::{
    config::{
        ByteSize, Check, Failure, Problems, Secret,
        fields::{self, FieldName},
    },
    message::headers::{CREDENTIALS, KEEP_ALIVE, PROXY_CONNECTION},
};

/// What the client of the upstream writes by itself.
const OF_THE_CONNECTION: [HeaderName; 8] =
    [CONNECTION, CONTENT_LENGTH, KEEP_ALIVE, PROXY_CONNECTION, TE, TRAILER, TRANSFER_ENCODING, UPGRADE];

/// Where a request goes that its upstream failed to serve. Section `fallback`: a list, or a section with the list in
/// `to`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// The upstreams, in this order.
    pub to: Vec<Entry>,
    /// How much of a request's body is kept for them.
    pub replay: ByteSize,
}

impl From<Vec<Entry>> for Config {
    fn from(to: Vec<Entry>) -> Self {
        Self { to, replay: default_replay() }
    }
}

/// As much as a long conversation with a language model takes.
const fn default_replay() -> ByteSize {
    ByteSize::from_kib(1024)
}

/// Where a request goes that its upstream failed to serve, in full.
#[derive(Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "FallbackSection")]
struct Section {
    /// The upstreams, in this order: names, or sections.
    #[serde(deserialize_with = "entries")]
    #[schemars(with = "Vec<Listed>")]
    to: Vec<Entry>,
    /// How much of a request's body is kept for them, up to 16MiB. Of a larger one nothing can be sent again once a byte
    /// of it has left. It holds instead of `replay` of `retry`. Default `1MiB`.
    #[serde(default = "default_replay")]
    replay: ByteSize,
}

/// An upstream to fall back to. An entry of `fallback`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Fallback")]
pub struct Entry {
    /// The upstream, by its name. Neither the route's own, nor one that stands in the list already.
    pub upstream: String,
    /// Which failures of those before it bring a request here: `connect`, `reset`, `timeout`, `circuit-open`,
    /// `no-healthy-endpoint`, `overloaded`, and statuses (408, 425, 429, 500 to 599). Whatever the method: with POST a
    /// request may be acted on twice. Default all of those names, 502, 503 and 504.
    #[serde(default = "default_on")]
    pub on: Vec<Failure>,
    /// The path that is asked for here: a path instead of the client's, or `{prefix: /v1, with: /api}` for another
    /// beginning. The query stays. Default the client's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<Rewrite>,
    /// Header fields of the request. Default: as they came, without credentials.
    #[serde(default)]
    pub headers: Headers,
    /// Members of a JSON body that are other ones here, as in `{model: llama3}`: sections merge, and a member without a
    /// value (`null`) is removed (RFC 7396). A request with a body that is no JSON object (`application/json` or
    /// `+json`, not compressed, within `replay`) does not come here; one without a body does.
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    pub json: Map<String, Value>,
}

impl Config {
    /// The files that it is made of, which are to be watched.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let headers = self.to.iter().map(|entry| &entry.headers);
        headers.flat_map(|headers| headers.bearer.iter().chain(headers.set.values())).filter_map(Secret::path)
    }
}

impl Entry {
    /// `upstream`, with the rest at its defaults.
    #[must_use]
    pub fn to(upstream: impl Into<String>) -> Self {
        Self { upstream: upstream.into(), on: default_on(), path: None, headers: Headers::default(), json: Map::new() }
    }
}

fn default_on() -> Vec<Failure> {
    let statuses =
        [http::StatusCode::BAD_GATEWAY, http::StatusCode::SERVICE_UNAVAILABLE, http::StatusCode::GATEWAY_TIMEOUT];
    Failure::NAMED.into_iter().chain(statuses.map(Failure::Status)).collect()
}

/// Header fields of a request to another upstream. Section `headers` of an entry of `fallback`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "FallbackHeaders")]
pub struct Headers {
    /// The token of `Authorization: Bearer`: `{env: NAME}`, `{file: PATH}` or text.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "shown")]
    pub bearer: Option<Secret>,
    /// Fields that are set, each to `{env: NAME}`, `{file: PATH}` or text, instead of what the client sent.
    #[serde(skip_serializing_if = "BTreeMap::is_empty", serialize_with = "fields::shown")]
    pub set: BTreeMap<FieldName, Secret>,
    /// Fields that are removed.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub remove: Vec<FieldName>,
    /// The client's credentials that this upstream may see, too. `authorization`, `cookie`, `proxy-authorization`,
    /// `x-api-key`, `api-key` and `x-goog-api-key` are removed unless they stand here. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub keep: Vec<FieldName>,
}

#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn shown<S: Serializer>(secret: &Option<Secret>, to: S) -> Result<S::Ok, S::Error> {
    secret.as_ref().map(Secret::shown).serialize(to)
}

impl Headers {
    /// The fields to set, with what is secret in them. They show in no debug output.
    ///
    /// # Errors
    /// As [`Secret::reveal`], or that what it is cannot stand in a header; with the key.
    pub(super) fn fields(&self) -> Result<Vec<(HeaderName, HeaderValue)>, (String, String)> {
        let bearer = self.bearer.iter().map(|secret| ("bearer".to_owned(), AUTHORIZATION, "Bearer ", secret));
        let set = self.set.iter().map(|(name, secret)| (format!("set.{}", name.get()), name.get().clone(), "", secret));
        let read = |(key, name, before, secret): (String, HeaderName, &str, &Secret)| {
            let value = fields::secret_value(before, secret).map_err(|message| (key, message))?;
            Ok((name, value))
        };
        bearer.chain(set).map(read).collect()
    }
}

impl Check for Headers {
    fn check(&self, problems: &mut Problems) {
        if let Err((key, message)) = self.fields() {
            problems.add(key, message);
        }
        let sets = |name: &HeaderName| {
            self.set.keys().any(|set| set.get() == name) || self.bearer.is_some() && *name == AUTHORIZATION
        };
        if self.bearer.is_some() && self.set.contains_key(&AUTHORIZATION.into()) {
            problems.add("set.authorization", "stands beside `bearer`, which is the same field");
        }
        for name in self.set.keys().map(FieldName::get) {
            if *name == HOST {
                problems.add("set.host", "is the upstream's own: set `host` there");
            } else if OF_THE_CONNECTION.contains(name) {
                problems.add(format!("set.{name}"), "is about the connection, and sidegate's to write");
            }
        }
        for (n, name) in self.remove.iter().map(FieldName::get).enumerate() {
            if *name == HOST || OF_THE_CONNECTION.contains(name) {
                problems
                    .add(format!("remove.{n}"), format!("`{name}` is about the connection, and sidegate's to write"));
            } else if sets(name) {
                problems.add(format!("remove.{n}"), format!("`{name}` is set: that replaces what the client sent"));
            }
        }
        for (n, name) in self.keep.iter().map(FieldName::get).enumerate() {
            if sets(name) || self.remove.iter().any(|removed| removed.get() == name) {
                problems.add(format!("keep.{n}"), format!("`{name}` is set or removed, too"));
            } else if !CREDENTIALS.contains(name) {
                problems.add(format!("keep.{n}"), format!("`{name}` is kept anyway: only credentials are removed"));
            }
        }
    }
}

/// What becomes of a path. Key `path` of an entry of `fallback`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Rewrite {
    /// This one, whatever it was.
    Whole(PathText),
    /// Another beginning, where it begins so.
    Prefix(Prefix),
}

/// Another beginning of a path. Section `path` of an entry of `fallback`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "PathPrefix")]
pub struct Prefix {
    /// The beginning, whole segments of it. A path that begins otherwise stays as it is.
    pub prefix: PathText,
    /// What stands there instead.
    pub with: PathText,
}

impl Rewrite {
    /// `path`, rewritten.
    pub(super) fn apply<'a>(&'a self, path: &'a str) -> Cow<'a, str> {
        match self {
            Self::Whole(PathText(own)) => own.into(),
            Self::Prefix(Prefix { prefix: PathText(prefix), with: PathText(with) }) => {
                let rest = path.strip_prefix(prefix.trim_end_matches('/'));
                match rest.filter(|rest| rest.is_empty() || rest.starts_with('/')) {
                    None => path.into(),
                    Some("") => with.into(),
                    Some(rest) => format!("{}{rest}", with.trim_end_matches('/')).into(),
                }
            }
        }
    }
}

impl<'de> Deserialize<'de> for Rewrite {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct PathOrPrefix;

        impl<'de> Visitor<'de> for PathOrPrefix {
            type Value = Rewrite;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a path, or a section with `prefix` and `with`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Rewrite, E> {
                PathText::new(text).map(Rewrite::Whole).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Rewrite, A::Error> {
                Prefix::deserialize(MapAccessDeserializer::new(map)).map(Rewrite::Prefix)
            }
        }

        from.deserialize_any(PathOrPrefix)
    }
}

impl Serialize for Rewrite {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Whole(path) => path.serialize(to),
            Self::Prefix(prefix) => prefix.serialize(to),
        }
    }
}

impl JsonSchema for Rewrite {
    fn schema_name() -> Cow<'static, str> {
        "PathRewrite".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "anyOf": [generator.subschema_for::<PathText>(), generator.subschema_for::<Prefix>()] })
    }
}

/// A path as it stands in a request line, without a query.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathText(String);

impl PathText {
    fn new(text: &str) -> Result<Self, String> {
        let parsed = text.starts_with('/').then(|| text.parse::<PathAndQuery>().ok()).flatten();
        match parsed.filter(|parsed| parsed.as_str() == text && parsed.query().is_none()) {
            Some(_) => Ok(Self(text.to_owned())),
            None => Err(format!("`{text}` is no path: it begins with `/`, and has no query and no spaces")),
        }
    }
}

impl<'de> Deserialize<'de> for PathText {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::new(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

impl Serialize for PathText {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&self.0)
    }
}

impl JsonSchema for PathText {
    fn schema_name() -> Cow<'static, str> {
        "Path".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "A path without a query.", "pattern": "^/[^?# ]*$" })
    }
}

impl Config {
    /// Adds what is wrong with it. The entries stand below `list`, `to.` or nothing; `own` is the upstream of the route,
    /// where there is one; `is_fixed` knows the upstreams that are fixed answers.
    pub fn check(&self, list: &str, own: Option<&str>, is_fixed: impl Fn(&str) -> bool, problems: &mut Problems) {
        if self.to.is_empty() {
            problems.add(list.trim_end_matches('.'), "is empty: name an upstream, or write `fallback: off`");
        }
        let most = ByteSize::from_kib(16 * 1024);
        if self.replay > most {
            problems.add("replay", format!("is {}: must be at most {most}, for each request under way", self.replay));
        }
        // What a fixed answer before an entry takes, and so does not come to it.
        let mut taken: Vec<Failure> = Vec::new();
        for (n, entry) in self.to.iter().enumerate() {
            let Entry { upstream, on, path, headers, json } = entry;
            let fixed = is_fixed(upstream);
            problems.at(format!("{list}{n}"), |problems| {
                if own == Some(upstream) {
                    let how = "is the route's own upstream: for another model there, name the same endpoints twice";
                    problems.add("", format!("`{upstream}` {how}"));
                } else if self.to.iter().take(n).any(|other| other.upstream == *upstream) {
                    problems.add("", format!("`{upstream}` stands in the list already"));
                } else if !on.is_empty() && on.iter().all(|failure| taken.contains(failure)) {
                    problems.add("", format!("`{upstream}` is never reached: a fixed answer before it takes all"));
                }
                if on.is_empty() {
                    problems.add("on", "is empty: name failures, as in `[connect, 503]`");
                }
                if fixed {
                    let given = [
                        ("path", path.is_some()),
                        ("headers", *headers != Headers::default()),
                        ("json", !json.is_empty()),
                    ];
                    for (key, _) in given.into_iter().filter(|(_, given)| *given) {
                        problems.add(key, format!("has no effect: `{upstream}` is a fixed answer"));
                    }
                } else {
                    problems.at("headers", |problems| headers.check(problems));
                }
            });
            if fixed {
                taken.extend(on);
            } else if !on.iter().all(|failure| taken.contains(failure)) {
                // Its own failures pass by those before it.
                taken.clear();
            }
        }
    }
}

impl<'de> Deserialize<'de> for Config {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ListOrSection;

        impl<'de> Visitor<'de> for ListOrSection {
            type Value = Config;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of upstreams, or a section with `to`")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Config, A::Error> {
                entries(SeqAccessDeserializer::new(list)).map(Config::from)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Config, A::Error> {
                let Section { to, replay } = Section::deserialize(MapAccessDeserializer::new(map))?;
                Ok(Config { to, replay })
            }
        }

        from.deserialize_any(ListOrSection)
    }
}

impl JsonSchema for Config {
    fn schema_name() -> Cow<'static, str> {
        "Fallbacks".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [generator.subschema_for::<Vec<Listed>>(), generator.subschema_for::<Section>()],
        })
    }
}

/// An entry of the list: the name of an upstream, or a section.
struct Listed(Entry);

fn entries<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Entry>, D::Error> {
    Ok(Vec::<Listed>::deserialize(from)?.into_iter().map(|Listed(entry)| entry).collect())
}

impl<'de> Deserialize<'de> for Listed {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct NameOrSection;

        impl<'de> Visitor<'de> for NameOrSection {
            type Value = Listed;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the name of an upstream, or a section with `upstream`")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<Listed, E> {
                Ok(Listed(Entry::to(name)))
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Listed, A::Error> {
                Entry::deserialize(MapAccessDeserializer::new(map)).map(Listed)
            }
        }

        from.deserialize_any(NameOrSection)
    }
}

impl JsonSchema for Listed {
    fn schema_name() -> Cow<'static, str> {
        "FallbackOrName".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "anyOf": [
                { "type": "string", "description": "The name of an upstream." },
                generator.subschema_for::<Entry>(),
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_gets_another_beginning_at_a_segment() {
        let rewrite = |prefix: &str, with: &str| {
            let path = |text| PathText::new(text).unwrap();
            Rewrite::Prefix(Prefix { prefix: path(prefix), with: path(with) })
        };
        let cases = [
            ("/v1", "/api", "/v1/models", "/api/models"),
            ("/v1/", "/api/", "/v1/models", "/api/models"),
            ("/v1", "/api", "/v1", "/api"),
            ("/v1", "/api", "/v1x", "/v1x"),
            ("/v1", "/api", "/v1/", "/api/"),
            ("/v1", "/", "/v1/models", "/models"),
            ("/v1", "/", "/v1", "/"),
            ("/", "/base", "/a", "/base/a"),
            ("/", "/base", "/", "/base/"),
        ];
        for (prefix, with, path, expected) in cases {
            assert_eq!(rewrite(prefix, with).apply(path), expected, "{prefix} {with} {path}");
        }
        assert_eq!(Rewrite::Whole(PathText::new("/a").unwrap()).apply("/b"), "/a");
    }

    #[test]
    fn a_path_has_no_query() {
        for wrong in ["", "a", "/a?b", "/a#b", "/a b", "//x?", "http://h/a"] {
            assert!(PathText::new(wrong).is_err(), "{wrong}");
        }
        assert!(PathText::new("/v1/%C3%A9").is_ok());
    }

    #[test]
    fn a_secret_is_in_no_output() {
        let text = "{upstream: a, headers: {bearer: token1, set: {x-key: token2}}}";
        let file = serde_json::json!({
            "upstream": "a", "headers": {"bearer": "token1", "set": {"x-key": "token2", "x-env": {"env": "KEY"}}},
        });
        let entry: Entry = serde_json::from_value(file).unwrap();
        let shown = format!("{entry:?} {}", serde_json::to_string(&entry).unwrap());
        assert!(!shown.contains("token"), "{text}: {shown}");
        let fields = Headers { set: BTreeMap::new(), ..entry.headers }.fields().unwrap();
        assert_eq!(fields[0].1, "Bearer token1");
        assert!(!format!("{fields:?}").contains("token"));
    }
}
