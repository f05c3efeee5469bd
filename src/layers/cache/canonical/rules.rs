//! What the file says of JSON bodies: which are cached, and what of them makes a difference.

use std::{borrow::Cow, collections::BTreeMap, fmt, str::FromStr};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use serde_json::Value;

use super::{
    sink::Short,
    tape::{Tape, Why},
};
use crate::config::{Check, Problems, text};

/// Which JSON bodies are cached, and what of them makes a difference. Section `body` of `cache`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "CacheBody")]
pub struct Body {
    /// Members that make no difference, with all that is below them: `user`, `metadata.trace_id`, or as a JSON pointer
    /// (RFC 6901) `/metadata/trace.id`. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<Path>,
    /// What members have to be for the answer to be cached, `{temperature: [0, null]}`: one of these values, of which
    /// `null` is also that there is no such member. Default no conditions.
    #[serde(skip_serializing_if = "When::is_empty")]
    pub when: When,
    /// Whether requests that give a model tools are cached too: those with a member `tools`, `functions`, `mcp_servers`
    /// or `web_search_options` that is neither `null` nor an empty list. Default `false`.
    pub tools: bool,
}

impl Check for Body {
    fn check(&self, problems: &mut Problems) {
        for (n, path) in self.ignore.iter().enumerate() {
            if path.0 == ["stream"] {
                problems.add("ignore", "holds `stream`, on which depends whether the answer is a stream");
            } else if self.ignore.iter().take(n).any(|other| other == path) {
                problems.add("ignore", format!("holds `{path}` twice"));
            } else if let Some(above) = self.ignore.iter().find(|above| *above != path && path.0.starts_with(&above.0))
            {
                problems.add("ignore", format!("holds `{path}`, which `{above}` leaves out already"));
            }
        }
        problems.at("when", |problems| self.when.check(problems));
    }
}

/// Conditions on members of a JSON text: of each path, the values that pass.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(transparent, rename = "JsonConditions")]
pub struct When(BTreeMap<Path, Values>);

impl When {
    /// Whether everything passes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the JSON text passes.
    ///
    /// # Errors
    /// That it does not, or cannot be read.
    pub(in super::super) fn pass(&self, text: &[u8]) -> Result<(), Why> {
        self.pass_read(&Tape::read(text)?)
    }

    pub(super) fn pass_read(&self, tape: &Tape<'_>) -> Result<(), Why> {
        let pass = |(path, values): (&Path, &Values)| match tape.member(&path.0) {
            Some(key) => values.contain(tape, Tape::value_of(key)),
            None => values.with_null(),
        };
        if self.0.iter().all(pass) { Ok(()) } else { Err(Why::Condition) }
    }
}

impl Check for When {
    fn check(&self, problems: &mut Problems) {
        for (path, values) in &self.0 {
            if values.0.is_empty() {
                problems.add(path, "is an empty list, which nothing passes: `null` stands for no such member");
            }
        }
    }
}

/// Values of which a member has to be one: a list, or the only one.
#[derive(Debug, Clone, PartialEq)]
pub struct Values(Vec<Wanted>);

#[derive(Debug, Clone, PartialEq)]
struct Wanted {
    value: Value,
    /// As [`Tape::write`] has it.
    written: Vec<u8>,
}

impl Values {
    fn with_null(&self) -> bool {
        self.0.iter().any(|wanted| wanted.value.is_null())
    }

    fn contain(&self, tape: &Tape<'_>, node: u32) -> bool {
        let longest = self.0.iter().map(|wanted| wanted.written.len()).max().unwrap_or_default();
        let mut written = Short { bytes: Vec::with_capacity(longest), longest };
        tape.write(node, &[], &mut written);
        self.0.iter().any(|wanted| wanted.written == written.bytes)
    }
}

impl TryFrom<Vec<Value>> for Values {
    type Error = String;

    fn try_from(values: Vec<Value>) -> Result<Self, String> {
        let read = |value: Value| {
            let text = value.to_string();
            let wrong = |why: Why| format!("holds a value that no body can have: {}", why.as_str());
            let tape = Tape::read(text.as_bytes()).map_err(wrong)?;
            let mut written = Short { bytes: Vec::new(), longest: usize::MAX };
            tape.write(0, &[], &mut written);
            Ok(Wanted { value, written: written.bytes })
        };
        values.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }
}

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let values = match Value::deserialize(from)? {
            Value::Array(values) => values,
            value => vec![value],
        };
        values.try_into().map_err(D::Error::custom)
    }
}

impl Serialize for Values {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.0.iter().map(|wanted| &wanted.value))
    }
}

impl JsonSchema for Values {
    fn schema_name() -> Cow<'static, str> {
        "JsonValues".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "The values that pass: a list, or the only one. `null` is also that there is no such member.",
        })
    }
}

/// Where a member stands: the names that lead to it, from the outermost object. It does not lead into arrays.
///
/// `metadata.trace_id`; or as a JSON pointer (RFC 6901), `/metadata/trace_id`, where a name has a dot in it or nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path(pub(super) Vec<String>);

impl FromStr for Path {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no member: write `user`, `metadata.trace_id` or `/metadata/trace_id`");
        if let Some(pointer) = text.strip_prefix('/') {
            let mut encoded = text.split('~').skip(1);
            if !encoded.all(|after| after.starts_with(['0', '1'])) {
                return Err(format!("`{text}` is no JSON pointer: `~` is written `~0` there, and `/` in a name `~1`"));
            }
            return Ok(Self(pointer.split('/').map(|name| name.replace("~1", "/").replace("~0", "~")).collect()));
        }
        let names: Vec<_> = text.split('.').map(str::to_owned).collect();
        if names.iter().any(String::is_empty) { Err(wrong()) } else { Ok(Self(names)) }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(names) = self;
        let is_pointer = names.iter().any(|name| name.is_empty() || name.contains('.'))
            || names.iter().take(1).any(|name| name.starts_with('/'));
        for (n, name) in names.iter().enumerate() {
            match (is_pointer, n) {
                (true, _) => write!(f, "/{}", name.replace('~', "~0").replace('/', "~1"))?,
                (false, 0) => f.write_str(name)?,
                (false, _) => write!(f, ".{name}")?,
            }
        }
        Ok(())
    }
}

text!(Path, "JsonMember", {
    "description": "A member of a JSON object: `user`, `metadata.trace_id`, or as a JSON pointer `/metadata/trace_id`.",
    "minLength": 1,
});
