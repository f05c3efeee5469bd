//! What a request to a language model may use, what it did, and how one learns of it.
//!
//! Before: the body is read, up to 1 MiB of it; input is guessed from its length, a token for four bytes, and output is
//! what the request allows at most (the greatest of `max_completion_tokens`, `max_tokens`, `max_output_tokens` and
//! Ollama's `options.num_predict`, times `n`), else, and where the body cannot be read, the rule's `reserve`. So much is
//! taken from the limit.
//!
//! After: what the response reports ([`Meter`]). A streamed answer of OpenAI's completions reports only if it is asked
//! to: where the client has not (`stream_options.include_usage`), sidegate asks, and takes out the one event that it was
//! not meant to see. A stream that breaks off, or is left, used its input and an output token for each of its events; an
//! answer that reports nothing, or cannot be read, used its input and a token for four bytes; an error used nothing.
//! Answers come without a content coding, in which nothing could be read: `Accept-Encoding` is taken away.

use std::{fmt, io};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt, stream};
use http::{
    HeaderMap, HeaderValue, StatusCode,
    header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_TYPE},
    request::Parts,
};
use http_body::{Body as HttpBody, Frame};
use http_body_util::{BodyExt, BodyStream, StreamBody};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};
use serde_json::{Map, Value, json};

use super::window::{amount, whole};
use crate::{
    message::{Body, BoxError, Response, json},
    sse::{BYTE_ORDER_MARK, Frames, Meter, Usage, UsageFilter, is_event_stream},
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

/// What matters of a request to a language model. Of a member that stands twice the last one holds, as most readers have
/// it; one of an unexpected type is none.
#[derive(Debug, Default)]
struct Asks {
    /// The most that any of the names for it allows: which one the backend knows is its own affair.
    output: Option<u64>,
    n: u64,
    stream: bool,
    stream_options: Value,
}

impl<'de> Deserialize<'de> for Asks {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Asks;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Asks, A::Error> {
                let (mut asks, mut outputs) = (Asks { n: 1, ..Asks::default() }, [None; 4]);
                while let Some(name) = map.next_key::<String>()? {
                    let place = OUTPUTS.iter().position(|known| *known == name);
                    match (place, &*name) {
                        (Some(place), _) => outputs[place] = count(&map.next_value()?),
                        (_, "options") => outputs[3] = count(&map.next_value::<Value>()?["num_predict"]),
                        (_, "n") => asks.n = count(&map.next_value()?).unwrap_or(1).max(1),
                        (_, "stream") => asks.stream = map.next_value::<Value>()? == true,
                        (_, "stream_options") => asks.stream_options = map.next_value()?,
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                asks.output = outputs.into_iter().flatten().max();
                Ok(asks)
            }
        }

        from.deserialize_map(Object)
    }
}

/// What a request may call the most tokens of output.
const OUTPUTS: [&str; 3] = ["max_completion_tokens", "max_tokens", "max_output_tokens"];

/// A number of tokens, in whatever way a lenient reader takes it: `5e3` and `"5000"` too.
fn count(value: &Value) -> Option<u64> {
    let number = match value {
        Value::Number(number) => number.as_u64().map_or_else(|| number.as_f64(), |whole| Some(amount(whole)))?,
        Value::String(text) => text.trim().parse::<f64>().ok()?,
        _ => return None,
    };
    (number >= 0.0).then(|| whole(number.ceil()))
}

impl Asks {
    fn output(&self) -> Option<u64> {
        Some(self.output?.saturating_mul(self.n))
    }

    /// Whether it is answered by a stream that reports nothing.
    fn is_silent(&self, path: &str) -> bool {
        path.ends_with("/completions")
            && self.stream
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
    if body.is_end_stream() || !may_be_json(&head.headers) || hint.lower() > MAX_READ as u64 {
        return Ok((guess(hint.lower()), body));
    }
    let (text, body) = match ahead(body).await? {
        Read::Whole(text) => (text, None),
        Read::Part(bytes, body) => return Ok((guess(bytes), body)),
        Read::Trailed(text, body) => (text, Some(body)),
    };
    let mut estimate = guess(text.len() as u64);
    let readable = text.strip_prefix(&BYTE_ORDER_MARK).unwrap_or(&text);
    let Ok(asks) = serde_json::from_slice::<Asks>(readable) else {
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
        json::merge(readable, patch.as_object().unwrap_or(&none))
    };
    if let Some(text) = (asks.is_silent(head.uri.path()) && json::is_json(&head.headers)).then(asking).flatten() {
        json::replaced(&mut head.headers, text.len());
        estimate.asked = true;
        return Ok((estimate, Body::from(text)));
    }
    Ok((estimate, Body::from(text)))
}

/// Whether there may be JSON in a body with these headers: many backends do not ask what it is called.
fn may_be_json(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let is_parts = kind.get(..10).is_some_and(|start| start.eq_ignore_ascii_case(b"multipart/"));
    !is_parts && !headers.contains_key(CONTENT_ENCODING)
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
    let mut text = Ahead::default();
    while let Some(frame) = body.frame().await {
        let trailers = match frame?.into_data() {
            Ok(data) => {
                let Err(data) = text.add(data) else { continue };
                let length = text.length() + data.len();
                let first = [text.freeze(), data].map(|data| Ok(Frame::data(data)));
                let frames = stream::iter(first).chain(BodyStream::new(body));
                return Ok(Read::Part(length as u64, Body::new(StreamBody::new(frames))));
            }
            Err(trailers) => trailers,
        };
        let text = text.freeze();
        let frames = stream::iter([Ok::<_, io::Error>(Frame::data(text.clone())), Ok(trailers)]);
        return Ok(Read::Trailed(text, Body::new(StreamBody::new(frames))));
    }
    Ok(Read::Whole(text.freeze()))
}

/// What was read of a body. Most come in one piece, which is not copied; of many, no frame is kept, which may be as small
/// as a byte.
#[derive(Default)]
struct Ahead {
    first: Bytes,
    all: BytesMut,
}

impl Ahead {
    fn length(&self) -> usize {
        self.first.len().max(self.all.len())
    }

    /// Adds `data`, or hands it back where there is no room for it.
    fn add(&mut self, data: Bytes) -> Result<(), Bytes> {
        if self.length() + data.len() > MAX_READ {
            return Err(data);
        }
        if self.length() == 0 {
            self.first = data;
            return Ok(());
        }
        if self.all.is_empty() {
            self.all.extend_from_slice(&self.first);
        }
        self.all.extend_from_slice(&data);
        Ok(())
    }

    fn freeze(self) -> Bytes {
        if self.all.is_empty() { self.first } else { self.all.freeze() }
    }
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

    pub(super) fn begin(&mut self, response: &mut Response) {
        self.failed = response.status() >= StatusCode::BAD_REQUEST;
        self.meter = Meter::of(response.headers());
        self.is_stream = is_event_stream(response.headers());
        if self.estimate.asked && self.is_stream && self.meter.is_some() && !response.body().is_end_stream() {
            // It will be shorter.
            response.headers_mut().remove(CONTENT_LENGTH);
            self.filter = Some(UsageFilter::new());
        }
    }

    /// Notes a frame. What of it the client gets, where that is not the frame as it is.
    pub(super) fn pass(&mut self, frame: &Bytes) -> Option<Frames> {
        self.sent += frame.len() as u64;
        if let Some(meter) = &mut self.meter {
            meter.pass(frame);
        }
        self.filter.as_mut().map(|filter| filter.pass(frame.clone()))
    }

    /// Notes the end, or that it broke off. What the client still gets.
    pub(super) fn end(&mut self, whole: bool) -> Option<Bytes> {
        self.whole = whole;
        self.filter.as_mut().and_then(UsageFilter::finish)
    }

    /// What was used, as far as anybody knows.
    pub(super) fn usage(&self) -> Usage {
        let reads = self.meter.is_some();
        let (reported, events) = self.meter.as_ref().map_or((None, 0), |meter| (meter.usage(), meter.content_events()));
        match reported {
            Some(usage) if self.whole => usage,
            // What it reported at its start is not all.
            Some(usage) => Usage { input: usage.input, output: usage.output.max(events) },
            None if self.failed => Usage::default(),
            None if events > 0 || self.is_stream && reads => Usage { input: self.estimate.input, output: events },
            None => Usage { input: self.estimate.input, output: self.sent / BYTES_PER_TOKEN },
        }
    }

    /// Whether what the client gets may differ from what came.
    pub(super) fn filters(&self) -> bool {
        self.filter.is_some()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http::Request;

    use super::*;

    async fn estimate(body: impl Into<Body>, kind: &str) -> (Estimate, String) {
        let request = Request::post("/v1/chat/completions").header(CONTENT_TYPE, kind).body(()).unwrap();
        let (mut head, ()) = request.into_parts();
        let (estimate, body) = read(&mut head, body.into()).await.unwrap();
        let bytes = body.collect().await.unwrap().to_bytes();
        if let Some(length) = head.headers.get(CONTENT_LENGTH) {
            assert_eq!(length, &bytes.len().to_string());
        }
        (estimate, String::from_utf8(bytes.into()).unwrap())
    }

    #[tokio::test]
    async fn the_most_that_a_request_may_mean_is_what_it_asks_for() {
        for (text, output) in [
            ("{}", None),
            (r#"{"max_tokens": 5}"#, Some(5)),
            (r#"{"max_tokens": 5, "n": 3}"#, Some(15)),
            (r#"{"max_completion_tokens": 1, "max_tokens": 5000}"#, Some(5000)),
            (r#"{"max_tokens": 1, "max_tokens": 7, "n": 1, "n": 2}"#, Some(14)),
            (r#"{"max_tokens": 5e3}"#, Some(5000)),
            (r#"{"max_tokens": 4999.5}"#, Some(5000)),
            (r#"{"max_tokens": "5000"}"#, Some(5000)),
            (r#"{"max_tokens": 99999999999999999999999999}"#, Some(u64::MAX)),
            (r#"{"max_tokens": 99999999999, "n": 99999999999}"#, Some(u64::MAX)),
            (r#"{"max_tokens": -1, "n": -1}"#, None),
            (r#"{"max_tokens": null, "max_output_tokens": [1]}"#, None),
            (r#"{"options": {"num_predict": 9}}"#, Some(9)),
            (r#"{"options": 9}"#, None),
            ("\u{feff}{\"max_tokens\": 5}", Some(5)),
            ("[null, 5000]", None),
            (r#"{"max_tokens": 5"#, None),
        ] {
            for kind in ["application/json", "text/plain", "application/vnd.x+json"] {
                let (estimate, passed) = estimate(text, kind).await;
                assert_eq!((estimate.output, estimate.asked, &*passed), (output, false, text), "{kind}");
                assert_eq!(estimate.input, text.len() as u64 / 4);
            }
        }
        let parts = r#"{"max_tokens": 5}"#;
        assert_eq!(estimate(parts, "multipart/form-data; boundary=x").await.0.output, None);
    }

    #[tokio::test]
    async fn a_silent_stream_is_asked_to_report() {
        let ask = async |text: &'static str| estimate(text, "application/json").await;
        let (silent, rewritten) = ask(r#"{"stream": true, "x": 1.0}"#).await;
        assert!(silent.asked);
        assert_eq!(rewritten, r#"{"stream":true,"x":1.0,"stream_options":{"include_usage":true}}"#);
        for other in [
            r#"{"stream": false}"#,
            r#"{"stream": "true"}"#,
            r#"{"stream": true, "stream_options": {"include_usage": true}}"#,
            r#"{"stream": true, "stream_options": 1}"#,
        ] {
            let (estimate, passed) = ask(other).await;
            assert_eq!((estimate.asked, &*passed), (false, other));
        }
    }

    #[tokio::test]
    async fn a_body_in_small_pieces_is_kept_in_one() {
        let pieces = |count: usize| {
            let pieces =
                std::iter::repeat_n(Bytes::from_static(b"x"), count).map(|data| Ok::<_, io::Error>(Frame::data(data)));
            Body::new(StreamBody::new(stream::iter(pieces)))
        };
        let Read::Whole(text) = ahead(pieces(MAX_READ)).await.unwrap() else { panic!("it has room") };
        assert_eq!(text.len(), MAX_READ);
        let Read::Part(read, body) = ahead(pieces(MAX_READ + 5)).await.unwrap() else { panic!("it has no room") };
        assert_eq!(read, MAX_READ as u64 + 1);
        let mut frames = 0;
        let mut body = body;
        let mut length = 0;
        while let Some(frame) = body.frame().await {
            length += frame.unwrap().into_data().unwrap().len();
            frames += 1;
        }
        assert_eq!((length, frames), (MAX_READ + 5, 2 + 4), "what was read is one piece");
    }
}
