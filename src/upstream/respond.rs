//! Upstream kind `respond`: a fixed answer.

use std::{
    collections::BTreeMap,
    future::{Ready, ready},
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, StatusCode, header::CONTENT_TYPE};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::Service;

use crate::{
    config::{
        fields::{FieldName, FieldValue},
        problem::{Check, Problems},
    },
    message::{BoxError, Request, Response},
    telemetry::Exchange,
};

/// A fixed answer. Section `respond` of an upstream.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Respond")]
pub struct Config {
    /// The status, 200 to 599. Default 200.
    pub status: u16,
    /// Header fields. `content-type` is set by `json` and `text` unless it stands here.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<FieldName, FieldValue>,
    /// The body as JSON. Not beside `text`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json: Option<serde_json::Value>,
    /// The body as UTF-8 text. Not beside `json`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
}

impl Default for Config {
    fn default() -> Self {
        Self { status: 200, headers: BTreeMap::new(), json: None, text: None }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if !(200..=599).contains(&self.status) {
            problems.add("status", format!("is {}: must be a final status, 200 to 599", self.status));
        }
        let body = self.json.is_some() || self.text.is_some();
        if body && matches!(self.status, 204 | 304) {
            problems.add("status", format!("is {}, which has no body: leave out `json` and `text`", self.status));
        }
        if self.json.is_some() && self.text.is_some() {
            problems.add("text", "stands beside `json`: an answer has one body");
        }
    }
}

/// Answers every request the same.
#[derive(Debug, Clone)]
pub struct Respond {
    answer: Arc<Answer>,
}

#[derive(Debug)]
struct Answer {
    upstream: Arc<str>,
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Respond {
    /// The answer of `config`, which has been checked; logged as the upstream of this name.
    #[must_use]
    pub fn new(upstream: Arc<str>, config: &Config) -> Self {
        let mut headers: HeaderMap =
            config.headers.iter().map(|(name, value)| (name.get().clone(), value.get().clone())).collect();
        let (content_type, body) = match (&config.json, &config.text) {
            (Some(json), _) => (Some("application/json"), Bytes::from(json.to_string())),
            (None, Some(text)) => (Some("text/plain; charset=utf-8"), Bytes::from(text.clone())),
            (None, None) => (None, Bytes::new()),
        };
        if let Some(content_type) = content_type {
            headers.entry(CONTENT_TYPE).or_insert(HeaderValue::from_static(content_type));
        }
        let status = StatusCode::from_u16(config.status).unwrap_or(StatusCode::OK);
        Self { answer: Arc::new(Answer { upstream, status, headers, body }) }
    }
}

impl Service<Request> for Respond {
    type Response = Response;
    type Error = BoxError;
    type Future = Ready<Result<Response, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        if let Some(exchange) = Exchange::of(&request) {
            exchange.facts().upstream = Some(self.answer.upstream.clone());
        }
        let mut response = Response::new(self.answer.body.clone().into());
        *response.status_mut() = self.answer.status;
        response.headers_mut().clone_from(&self.answer.headers);
        ready(Ok(response))
    }
}
