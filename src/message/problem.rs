//! An error in words: what the client is told of a [`Kind`], as a JSON document.

use serde_json::{Value, json};

use super::{Fault, Kind};

/// Whose form of an error document is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Form {
    /// A problem document, RFC 9457.
    #[default]
    Problem,
    /// OpenAI's `{"error": {"message", "type", "code"}}`.
    Openai,
}

impl Form {
    /// The media type of a body that is such a document.
    #[must_use]
    pub const fn content_type(self) -> &'static str {
        match self {
            Self::Problem => "application/problem+json",
            Self::Openai => "application/json",
        }
    }

    /// Adds members to a document about an error. OpenAI's form has no place for any.
    pub fn extend(self, document: &mut Value, members: &[(&'static str, Value)]) {
        if self == Self::Problem {
            for (name, value) in members {
                document[*name] = value.clone();
            }
        }
    }

    /// The document about an error of this kind, at this path, for the request of this id. It holds neither a cause nor
    /// a value of the request other than these.
    #[must_use]
    pub fn document(self, kind: Kind, path: &str, request_id: Option<&str>) -> Value {
        let status = kind.status();
        match self {
            Self::Problem => json!({
                "type": format!("urn:sidegate:problem:{}", kind.slug()),
                "title": status.canonical_reason().unwrap_or("Error"),
                "status": status.as_u16(),
                "detail": kind.detail(),
                "instance": path,
                "request_id": request_id,
            }),
            Self::Openai => json!({
                "error": {
                    "message": kind.detail(),
                    "type": if kind.fault() == Fault::Client { "invalid_request_error" } else { "server_error" },
                    "param": null,
                    "code": kind.slug(),
                },
                "request_id": request_id,
            }),
        }
    }
}
