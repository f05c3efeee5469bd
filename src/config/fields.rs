//! Names and values of header fields in the configuration.

use std::{borrow::Cow, cmp::Ordering, collections::BTreeMap};

use http::{HeaderName, HeaderValue, Method};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};

use super::units::Secret;

const NO_VALUE: &str = "is no header value: no line breaks or control characters";

/// The name of a header field (RFC 9110 §5.1), in any case.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FieldName(HeaderName);

/// The value of a header field (RFC 9110 §5.5): visible characters, spaces and tabs.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct FieldValue(HeaderValue);

/// A method (RFC 9110 §9.1): upper-case as methods are, or any other token.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct MethodName(Method);

impl MethodName {
    /// The method's text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        self.0.as_str()
    }

    /// The method.
    #[must_use]
    pub fn get(&self) -> &Method {
        &self.0
    }
}

impl From<Method> for MethodName {
    fn from(method: Method) -> Self {
        Self(method)
    }
}

impl<'de> Deserialize<'de> for MethodName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let known =
            [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE, Method::OPTIONS];
        // Methods are case-sensitive: `get` would never match anything.
        if let Some(meant) =
            known.iter().find(|known| known.as_str() != text && known.as_str().eq_ignore_ascii_case(&text))
        {
            return Err(D::Error::custom(format!("`{text}` is no method: write `{meant}`")));
        }
        Method::from_bytes(text.as_bytes()).map(Self).map_err(|_| D::Error::custom(format!("`{text}` is no method")))
    }
}

impl JsonSchema for MethodName {
    fn schema_name() -> Cow<'static, str> {
        "Method".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "A method, in capitals.", "pattern": "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$" })
    }
}

impl FieldName {
    /// The name.
    #[must_use]
    pub fn get(&self) -> &HeaderName {
        &self.0
    }

    /// Whether the field may be used for what nobody but sidegate and its callers mean by it.
    #[must_use]
    pub fn is_free(&self) -> bool {
        use http::header::{
            AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
        };
        ![AUTHORIZATION, CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, TE, TRAILER, TRANSFER_ENCODING, UPGRADE]
            .contains(&self.0)
    }
}

impl FieldValue {
    /// The value.
    #[must_use]
    pub fn get(&self) -> &HeaderValue {
        &self.0
    }
}

impl Ord for FieldName {
    fn cmp(&self, other: &Self) -> Ordering {
        self.0.as_str().cmp(other.0.as_str())
    }
}

impl PartialOrd for FieldName {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl From<HeaderName> for FieldName {
    fn from(name: HeaderName) -> Self {
        Self(name)
    }
}

impl From<HeaderValue> for FieldValue {
    fn from(value: HeaderValue) -> Self {
        Self(value)
    }
}

impl<'de> Deserialize<'de> for FieldName {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        let wrong = |_| D::Error::custom(format!("`{text}` is no header name: letters, digits and -_.~ only"));
        HeaderName::from_bytes(text.as_bytes()).map(Self).map_err(wrong)
    }
}

impl<'de> Deserialize<'de> for FieldValue {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = match Text::deserialize(from)? {
            Text::Text(text) => text,
            Text::Number(number) => number.to_string(),
        };
        // The text stays out of the message: values may be secret.
        let wrong = |_| D::Error::custom(NO_VALUE);
        HeaderValue::from_str(&text).map(Self).map_err(wrong)
    }
}

/// The header value that is `before` and then what is secret. It shows in no debug output.
///
/// # Errors
/// As [`Secret::reveal`], or that what it is cannot stand in a header.
pub fn secret_value(before: &str, secret: &Secret) -> Result<HeaderValue, String> {
    let mut value = HeaderValue::from_str(&format!("{before}{}", secret.reveal()?)).map_err(|_| NO_VALUE)?;
    value.set_sensitive(true);
    Ok(value)
}

/// Writes fields whose values are secrets: where these come from, not what they are.
///
/// # Errors
/// Those of `to`.
pub fn shown<S: Serializer>(fields: &BTreeMap<FieldName, Secret>, to: S) -> Result<S::Ok, S::Error> {
    to.collect_map(fields.iter().map(|(name, secret)| (name, secret.shown())))
}

/// YAML makes numbers of values like `0`, which are as good as text here.
#[derive(Deserialize)]
#[serde(untagged, expecting = "must be text or a whole number")]
enum Text {
    Text(String),
    Number(i64),
}

impl Serialize for FieldName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.0.as_str())
    }
}

impl Serialize for FieldValue {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        // Read from text, so nothing is lost.
        to.collect_str(&String::from_utf8_lossy(self.0.as_bytes()))
    }
}

impl Serialize for MethodName {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(self.as_str())
    }
}

impl JsonSchema for FieldName {
    fn schema_name() -> Cow<'static, str> {
        "FieldName".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "string", "description": "The name of a header field.", "pattern": "^[A-Za-z0-9!#$%&'*+.^_`|~-]+$" })
    }
}

impl JsonSchema for FieldValue {
    fn schema_name() -> Cow<'static, str> {
        "FieldValue".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": ["string", "integer"], "description": "The value of a header field." })
    }
}
