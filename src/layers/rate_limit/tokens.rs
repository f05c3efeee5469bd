//! What a request to a language model may use, what it did, and how one learns of it.
//!
//! Before: the body is read, up to 1 MiB of it; input is guessed from its length, a token for four bytes, and output is
//! what the request allows at most (`max_completion_tokens`, `max_tokens`, `max_output_tokens`, or Ollama's
//! `options.num_predict`, times `n`), else the rule's `reserve`. So much is taken from the limit.
//!
//! After: what the response reports ([`Meter`]). A streamed answer of OpenAI's completions reports only if it is asked
//! to: where the client has not (`stream_options.include_usage`), sidegate asks, and takes out the one event that it was
//! not meant to see. A stream that breaks off, or is left, used its input and an output token for each of its events; an
//! answer that reports nothing used its input and a token for four bytes; an error used nothing. Answers come without a
//! content coding, in which nothing could be read: `Accept-Encoding` is taken away.

use std::{collections::VecDeque, io};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use http::{StatusCode, header::ACCEPT_ENCODING, request::Parts};
use http_body::Body as HttpBody;
use http_body_util::{BodyExt, BodyStream, StreamBody};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::{
    message::{Body, BoxError, json},
    sse::{Frames, Meter, Usage, UsageFilter, has_room, is_event_stream},
};

/// How much of a request's body is read. What is larger goes on unread, and is guessed by its length.
const MAX_READ: usize = 1 << 20;
/// Bytes for a token, as a guess.
const BYTES_PER_TOKEN: u64 = 4;

/// What a request may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Estimate {
    pub(super) input: u64,
    /// Unless it says so, the rule does.
    pub(super) output: Option<u64>,
    /// Whether sidegate has asked for a report that the client has not asked for.
    pub(super) asked: bool,
}

/// What matters of a request to a language model. A member of an unexpected type is none.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Asks {
    max_completion_tokens: Value,
    max_tokens: Value,
    max_output_tokens: Value,
    n: Value,
    stream: Value,
    stream_options: Value,
    options: Value,
}

impl Asks {
    fn output(&self) -> Option<u64> {
        let given =
            [&self.max_completion_tokens, &self.max_tokens, &self.max_output_tokens, &self.options["num_predict"]];
        let each = given.into_iter().find_map(Value::as_u64)?;
        Some(each.saturating_mul(self.n.as_u64().unwrap_or(1).max(1)))
    }

    /// Whether it is answered by a stream that reports nothing.
    fn is_silent(&self, path: &str) -> bool {
        path.ends_with("/completions")
            && self.stream == true
            && self.stream_options["include_usage"] != true
            && (self.stream_options.is_null() || self.stream_options.is_object())
    }
}

/// Reads `body`, and makes the request one whose answer will tell what it used.
///
/// # Errors
/// The body's own.
pub(super) async fn read(head: &mut Parts, body: Body) -> Result<(Estimate, Body), BoxError> {
    head.headers.remove(ACCEPT_ENCODING);
    let hint = body.size_hint();
    let guess = |bytes: u64| Estimate { input: bytes / BYTES_PER_TOKEN, ..Estimate::default() };
    if body.is_end_stream() || !json::is_json(&head.headers) || hint.lower() > MAX_READ as u64 {
        return Ok((guess(hint.lower()), body));
    }
    let (text, body) = match ahead(body).await? {
        Read::Whole(text) => (text, None),
        Read::Part(bytes, body) => return Ok((guess(bytes), body)),
        Read::Trailed(text, body) => (text, Some(body)),
    };
    let mut estimate = guess(text.len() as u64);
    let Ok(asks) = serde_json::from_slice::<Asks>(&text) else {
        return Ok((estimate, body.unwrap_or_else(|| text.into())));
    };
    estimate.output = asks.output();
    // Trailers may sign the body as it is.
    if let Some(body) = body {
        return Ok((estimate, body));
    }
    let asking = || {
        let patch = json!({ "stream_options": { "include_usage": true } });
        let none = Map::new();
        json::merge(&text, patch.as_object().unwrap_or(&none))
    };
    if let Some(text) = asks.is_silent(head.uri.path()).then(asking).flatten() {
        json::replaced(&mut head.headers, text.len());
        estimate.asked = true;
        return Ok((estimate, Body::from(text)));
    }
    Ok((estimate, Body::from(text)))
}

/// A body that was read ahead.
enum Read {
    Whole(Bytes),
    /// With trailers, which the body has too.
    Trailed(Bytes, Body),
    /// It is too large: so many bytes of it were read, and it is as it was.
    Part(u64, Body),
}

async fn ahead(mut body: Body) -> Result<Read, BoxError> {
    let (mut frames, mut length, mut trailed) = (VecDeque::new(), 0, false);
    while let Some(frame) = body.frame().await {
        let frame = frame?;
        length += frame.data_ref().map_or(0, Bytes::len);
        trailed |= frame.is_trailers();
        frames.push_back(frame);
        if length > MAX_READ {
            let frames = stream::iter(frames.into_iter().map(Ok)).chain(BodyStream::new(body));
            return Ok(Read::Part(length as u64, Body::new(StreamBody::new(frames))));
        }
    }
    let mut text = BytesMut::new();
    let data: Vec<_> = frames.iter().filter_map(|frame| frame.data_ref()).collect();
    let text = if let [only] = data[..] {
        only.clone()
    } else {
        for data in data {
            text.extend_from_slice(data);
        }
        text.freeze()
    };
    if !trailed {
        return Ok(Read::Whole(text));
    }
    let frames = stream::iter(frames.into_iter().map(Ok::<_, io::Error>));
    Ok(Read::Trailed(text, Body::new(StreamBody::new(frames))))
}

/// Watches a response, and says what its request has used.
#[derive(Debug)]
pub(super) struct Reading {
    estimate: Estimate,
    meter: Option<Meter>,
    filter: Option<UsageFilter>,
    is_stream: bool,
    /// It failed, and has used nothing.
    failed: bool,
    sent: u64,
    whole: bool,
}

impl Reading {
    /// Before there is a response. Who leaves then has used its input.
    pub(super) fn new(estimate: Estimate) -> Self {
        Self { estimate, meter: None, filter: None, is_stream: false, failed: false, sent: 0, whole: false }
    }

    /// There will be no response.
    pub(super) fn fail(&mut self) {
        self.failed = true;
    }

    pub(super) fn begin<B: HttpBody>(&mut self, response: &http::Response<B>) {
        self.failed = response.status() >= StatusCode::BAD_REQUEST;
        self.meter = Meter::of(response.headers());
        self.is_stream = is_event_stream(response.headers());
        let is_spared = self.estimate.asked && has_room(response);
        self.filter = is_spared.then(UsageFilter::new);
    }

    /// Notes a frame. What of it the client gets, where that is not the frame as it is.
    pub(super) fn pass(&mut self, frame: &Bytes) -> Option<Frames> {
        self.sent += frame.len() as u64;
        if let Some(meter) = &mut self.meter {
            meter.pass(frame);
        }
        self.filter.as_mut().map(|filter| filter.pass(frame.clone()))
    }

    /// Notes the end, and not a break. What the client still gets.
    pub(super) fn end(&mut self) -> Option<Bytes> {
        self.whole = true;
        self.filter.as_mut().and_then(UsageFilter::finish)
    }

    /// What was used, as far as anybody knows.
    pub(super) fn usage(&self) -> Usage {
        let (reported, events) = self.meter.as_ref().map_or((None, 0), |meter| (meter.usage(), meter.content_events()));
        match reported {
            Some(usage) if self.whole => usage,
            // What it reported at its start is not all.
            Some(usage) => Usage { input: usage.input, output: usage.output.max(events) },
            None if self.failed => Usage::default(),
            None if events > 0 || self.is_stream => Usage { input: self.estimate.input, output: events },
            None => Usage { input: self.estimate.input, output: self.sent / BYTES_PER_TOKEN },
        }
    }

    /// Whether what the client gets may differ from what came.
    pub(super) fn filters(&self) -> bool {
        self.filter.is_some()
    }
}
