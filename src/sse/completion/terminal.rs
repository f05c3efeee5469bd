//! What the file says ends a stream.

use std::fmt;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::super::pieces::MAX_TYPE;

/// What the last event of a stream has that the others have not.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(rename = "TerminalEvent")]
pub enum Terminal {
    /// Its type, `complete` of `event: complete`.
    Event(Mark),
    /// Its data, `[DONE]` of `data: [DONE]`; or the last line's text.
    Data(Mark),
}

/// A text of 1 to 64 bytes in one line.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Mark(pub(super) String);

impl TryFrom<String> for Mark {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let is_line = !text.contains(['\n', '\r']) && text.trim_ascii() == text;
        if is_line && (1..=MAX_TYPE).contains(&text.len()) {
            Ok(Self(text))
        } else {
            Err(format!("must be of 1 to {MAX_TYPE} bytes in one line, without spaces around"))
        }
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for Mark {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.try_into().map_err(D::Error::custom)
    }
}

impl JsonSchema for Mark {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Mark".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "A text in one line.", "minLength": 1, "maxLength": MAX_TYPE })
    }
}
