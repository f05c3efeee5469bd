//! Which tokens a model server reports, in whatever shape, and how a client is spared a report for which it did not ask.

mod filter;
mod report;

use http::HeaderMap;

pub use self::filter::{Frames, UsageFilter};
use self::report::Report;
use super::shape::{Part, Shape};

/// Tokens, as a model server reports them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens that the model was given, those which it had in a cache included.
    pub input: u64,
    /// Tokens that the model made, those of its reasoning included.
    pub output: u64,
}

impl Usage {
    /// Both together; [`u64::MAX`] where they are more.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.input.saturating_add(self.output)
    }
}

/// Reads usage off a response body while it passes.
///
/// It reads what these report, streamed or not, and finds out by itself which of them it has before it:
///
/// - `OpenAI` chat completions, completions and embeddings (API reference, `usage`) and the many servers that imitate
///   them: `usage.prompt_tokens` and `usage.completion_tokens`; in streams in the last chunk, or in every chunk
///   (vLLM's `continuous_usage_stats`).
/// - `OpenAI` responses (API reference, "Streaming events"): `usage.input_tokens` and `usage.output_tokens`; in streams
///   below `response`.
/// - Anthropic messages ("Streaming messages"): `usage.input_tokens`, `usage.cache_creation_input_tokens` and
///   `usage.cache_read_input_tokens`, which add up to the input, and `usage.output_tokens`; in streams first below
///   `message`, then in `message_delta`.
/// - Ollama (`api.md`): `prompt_eval_count`, which may be missing, and `eval_count`.
///
/// All counts in a stream are cumulative, so of each the last one holds. One that is no whole number, or is negative,
/// is passed over; one that is too great for a `u64` is the greatest. `prompt_tokens` is all of the input wherever it
/// stands, since there are translators that put Anthropic's cache counts beside it.
///
/// It has a fixed size and allocates nothing, however long bodies, events and strings are, and whatever the bytes, it
/// neither fails nor panics. What is no JSON, or nested deeper than 127 times, ends the reading of that event, line or
/// body; what was reported before stands. Keys are not found where they are written with escapes, which no server does.
///
/// ```
/// use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
/// use sidegate::sse::{Meter, Usage};
///
/// let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"))]);
/// let mut meter = Meter::of(&headers).expect("event streams can be read");
/// meter.pass(b"data: {\"choices\": [{\"delta\": {\"content\": \"Hi\"}}], \"usage\": null}\n\ndata: {\"choices\": [], \"us");
/// assert_eq!((meter.usage(), meter.content_events()), (None, 1));
/// meter.pass(b"age\": {\"prompt_tokens\": 9, \"completion_tokens\": 1}}\n\ndata: [DONE]\n\n");
/// assert_eq!((meter.usage(), meter.content_events()), (Some(Usage { input: 9, output: 1 }), 1));
/// ```
#[derive(Debug, Clone)]
pub struct Meter {
    shape: Shape,
    report: Report,
    content_events: u64,
}

impl Meter {
    /// For a body with these headers: `text/event-stream`, `application/json` and every other type that ends in
    /// `+json`, or `application/x-ndjson` with one JSON text a line. `None` for other types, and for a body with a
    /// content coding, in which nothing can be read.
    #[must_use]
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        Shape::of(headers).map(|shape| Self { shape, report: Report::new(), content_events: 0 })
    }

    /// Notes that these bytes of the body have passed.
    pub fn pass(&mut self, frame: &[u8]) {
        let Self { shape, report, content_events } = self;
        shape.pass(frame, |part| match part {
            Part::Text(text) => report.pass(text),
            Part::End { kind } => {
                *content_events += u64::from(kind != Some(b"error") && report.is_content());
                report.clear();
            }
        });
    }

    /// What has been reported so far: `None` while that is nothing. Of a report that is split between events or frames
    /// it is what has come; a count that has not come is 0.
    #[must_use]
    pub fn usage(&self) -> Option<Usage> {
        self.report.usage()
    }

    /// How many events with content have ended: a good guess of the output where a stream breaks off before it reports,
    /// since servers send an event for each token. Always 0 for a body that is one JSON text.
    ///
    /// Every event with data, and every line that is not blank, has content, but for:
    ///
    /// - `[DONE]`;
    /// - errors: an event of the type `error`, an object with `"type": "error"` or an `error` that is not `null`;
    /// - an object whose `choices` are empty;
    /// - Anthropic's events other than `content_block_delta`, and `OpenAI`'s `response.*` other than `*.delta`;
    /// - Ollama's last line, with `"done": true`.
    ///
    /// So the first event of a chat, which has only a role, counts as one.
    #[must_use]
    pub const fn content_events(&self) -> u64 {
        self.content_events
    }
}

#[cfg(test)]
mod tests {
    use http::{
        HeaderValue,
        header::{CONTENT_ENCODING, CONTENT_TYPE},
    };
    use proptest::prelude::*;
    use serde_json::Value;

    use super::{
        super::json::tests::{cuts, frames, values},
        *,
    };

    const SSE: &str = "text/event-stream; charset=utf-8";
    const JSON: &str = "application/json";
    const LINES: &str = "application/x-ndjson";

    fn meter(kind: &'static str) -> Meter {
        Meter::of(&HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))])).unwrap()
    }

    fn after<'a>(kind: &'static str, frames: impl IntoIterator<Item = &'a [u8]>) -> (Option<(u64, u64)>, u64) {
        let mut meter = meter(kind);
        frames.into_iter().for_each(|frame| meter.pass(frame));
        (meter.usage().map(|usage| (usage.input, usage.output)), meter.content_events())
    }

    /// Input and output, and events with content.
    fn of(kind: &'static str, body: &str) -> (Option<(u64, u64)>, u64) {
        let whole = after(kind, [body.as_bytes()]);
        assert_eq!(after(kind, body.as_bytes().chunks(1)), whole, "byte by byte: {body}");
        whole
    }

    /// An event stream of these data.
    fn sse(data: &[&str]) -> String {
        data.iter().flat_map(|data| ["data: ", data, "\n\n"]).collect()
    }

    #[test]
    fn a_body_is_read_where_its_headers_say_that_it_can_be() {
        let of = |kind: &'static str, coding: &'static str| {
            let headers = [(CONTENT_TYPE, kind), (CONTENT_ENCODING, coding)];
            let headers = headers.map(|(name, value)| (name, HeaderValue::from_static(value)));
            Meter::of(&HeaderMap::from_iter(headers)).is_some()
        };
        for kind in
            [SSE, JSON, LINES, "Application/JSON;charset=utf-8", "application/vnd.api+json", "application/ndjson"]
        {
            assert!(of(kind, "identity"), "{kind}");
            assert!(!of(kind, "gzip"), "{kind}");
        }
        for kind in ["text/plain", "application/jsonp", "json", "", "text/event-streams"] {
            assert!(!of(kind, "identity"), "{kind}");
        }
        assert!(Meter::of(&HeaderMap::new()).is_none());
    }

    #[test]
    fn an_openai_chat_reports_at_its_end() {
        let chunks = [
            r#"{"id":"c","object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""}}],"usage":null}"#,
            r#"{"id":"c","choices":[{"index":0,"delta":{"content":"\"usage\": {\"prompt_tokens\": 5}"}}],"usage":null}"#,
            r#"{"id":"c","choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":null}"#,
            r#"{"id":"c","choices":[],"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29,"prompt_tokens_details":{"cached_tokens":3,"prompt_tokens":1},"completion_tokens_details":{"reasoning_tokens":4}}}"#,
            "[DONE]",
        ];
        assert_eq!(of(SSE, &sse(&chunks)), (Some((19, 10)), 3));
        assert_eq!(of(SSE, &sse(&chunks[..3])), (None, 3), "broken off");
        assert_eq!(of(SSE, &sse(&chunks).replace('\n', "\r\n")), (Some((19, 10)), 3));
        assert_eq!(of(SSE, &sse(&chunks).replace('\n', "\r")), (Some((19, 10)), 3));
        assert_eq!(of(SSE, &format!("\u{FEFF}{}", sse(&chunks).replace("data: ", "data:"))), (Some((19, 10)), 3));
    }

    #[test]
    fn usage_in_every_chunk_is_cumulative() {
        let chunk = |output: u64| {
            format!(
                r#"{{"choices":[{{"text":"x"}}],"usage":{{"prompt_tokens":7,"total_tokens":9,"completion_tokens":{output}}}}}"#
            )
        };
        assert_eq!(of(SSE, &sse(&[&chunk(1), &chunk(2), &chunk(3)])), (Some((7, 3)), 3));
    }

    #[test]
    fn openai_bodies_report_in_usage() {
        let chat = r#"{"id":"c","choices":[{"message":{"content":"hi","usage":{"prompt_tokens":99}}}],"usage":{"prompt_tokens":19,"completion_tokens":10,"total_tokens":29}}"#;
        assert_eq!(of(JSON, chat), (Some((19, 10)), 0));
        let embeddings = r#"{"object":"list","data":[{"embedding":[0.0023,-9.3e-3],"index":0}],"usage":{"prompt_tokens":8,"total_tokens":8}}"#;
        assert_eq!(of(JSON, embeddings), (Some((8, 0)), 0));
        let response = r#"{"object":"response","usage":{"input_tokens":36,"input_tokens_details":{"cached_tokens":5},"output_tokens":87,"output_tokens_details":{"reasoning_tokens":6},"total_tokens":123}}"#;
        assert_eq!(of(JSON, response), (Some((36, 87)), 0));
    }

    #[test]
    fn openai_responses_report_as_they_end() {
        let stream = |end: &str| {
            format!(
                "event: response.created\ndata: {{\"type\":\"response.created\",\"response\":{{\"usage\":null}}}}\n\n\
                 event: response.output_text.delta\ndata: {{\"type\":\"response.output_text.delta\",\"delta\":\"Hi\"}}\n\n\
                 event: response.output_text.done\ndata: {{\"type\":\"response.output_text.done\",\"text\":\"Hi\"}}\n\n\
                 event: response.{end}\ndata: {{\"type\":\"response.{end}\",\"response\":{{\"output\":[{{\"usage\":\
                 {{\"input_tokens\":1}}}}],\"usage\":{{\"input_tokens\":37,\"output_tokens\":11,\"total_tokens\":48}}}}}}\n\n"
            )
        };
        assert_eq!(of(SSE, &stream("completed")), (Some((37, 11)), 1));
        assert_eq!(of(SSE, &stream("incomplete")), (Some((37, 11)), 1));
    }

    #[test]
    fn anthropic_counts_add_up() {
        let start = r#"{"type":"message_start","message":{"type":"message","content":[],"usage":{"input_tokens":25,"cache_creation_input_tokens":100,"cache_read_input_tokens":1000,"cache_creation":{"ephemeral_5m_input_tokens":100},"output_tokens":1}}}"#;
        let rest = [
            r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
            r#"{"type":"ping"}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}"#,
            r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"!"}}"#,
            r#"{"type":"content_block_stop","index":0}"#,
            r#"{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}"#,
            r#"{"type":"message_stop"}"#,
        ];
        assert_eq!(of(SSE, &sse(&[start])), (Some((1125, 1)), 0));
        assert_eq!(of(SSE, &sse(&[&[start], &rest[..]].concat())), (Some((1125, 15)), 2));
        let newer = r#"{"type":"message_delta","usage":{"input_tokens":26,"cache_creation_input_tokens":null,"output_tokens":15}}"#;
        assert_eq!(of(SSE, &sse(&[start, newer])), (Some((1126, 15)), 0));
        let body = r#"{"type":"message","content":[{"type":"text","text":"Hi"}],"usage":{"input_tokens":5,"cache_read_input_tokens":2,"output_tokens":503}}"#;
        assert_eq!(of(JSON, body), (Some((7, 503)), 0));
    }

    #[test]
    fn cache_counts_beside_the_whole_prompt_are_part_of_it() {
        let body =
            r#"{"usage":{"prompt_tokens":30,"input_tokens":30,"cache_read_input_tokens":20,"completion_tokens":1}}"#;
        assert_eq!(of(JSON, body), (Some((30, 1)), 0));
    }

    #[test]
    fn ollama_reports_in_its_last_line() {
        let token = r#"{"model":"llama3.2","message":{"role":"assistant","content":"The"},"done":false}"#;
        let end = r#"{"model":"llama3.2","message":{"role":"assistant","content":""},"done":true,"total_duration":4883583458,"prompt_eval_count":26,"eval_count":282}"#;
        assert_eq!(of(LINES, &format!("{token}\n{token}\r\n\n{end}\n")), (Some((26, 282)), 2));
        assert_eq!(of(LINES, &format!("{token}\n{end}")), (Some((26, 282)), 1), "without a line end");
        assert_eq!(of(JSON, end), (Some((26, 282)), 0));
        assert_eq!(of(JSON, r#"{"response":"x","done":true,"eval_count":290}"#), (Some((0, 290)), 0));
        assert_eq!(of(LINES, "{\"error\":\"out of memory\"}\n"), (None, 0));
    }

    #[test]
    fn what_is_no_content_is_not_charged() {
        let content = |stream: &str| of(SSE, stream).1;
        for none in
            ["[DONE]", "[DONE] ", "", r#"{"choices":[]}"#, r#"{"error":{"message":"m"}}"#, r#"{"type":"error"}"#]
        {
            assert_eq!(content(&format!("data: {none}\n\n")), 0, "{none}");
        }
        assert_eq!(
            content("event: error\ndata: x\n\ndata: x\nevent:error\n\n: ping\n\nid: 1\n\ndata: unfinished\n"),
            0
        );
        for some in
            ["token", "[DONE]!", "[1]", r#"{"token":"a"}"#, r#"{"type":"token"}"#, r#"{"error":null,"a":1}"#, "{"]
        {
            assert_eq!(content(&format!("data: {some}\n\n")), 1, "{some}");
        }
        assert_eq!(content("data: {\"choices\":\ndata: [\ndata: ]}\n\n"), 0, "lines are joined");
        assert_eq!(content("event: error\nevent\ndata: x\n\n"), 1);
    }

    #[test]
    fn only_whole_numbers_count() {
        let usage =
            |input: &str| of(JSON, &format!(r#"{{"usage":{{"prompt_tokens":{input},"completion_tokens":2}}}}"#)).0;
        for other in ["-1", "1.0", "1e3", "\"5\"", "null", "true", "[5]", "{\"prompt_tokens\":5}", "{\"x\":5}"] {
            assert_eq!(usage(other), Some((0, 2)), "{other}");
        }
        assert_eq!(usage("36893488147419103232"), Some((u64::MAX, 2)), "saturates");
        assert_eq!(Usage { input: u64::MAX, output: 2 }.total(), u64::MAX);
        assert_eq!(Usage { input: 1, output: 2 }.total(), 3);
    }

    #[test]
    fn what_is_broken_yields_what_stood_before() {
        assert_eq!(of(JSON, r#"{"usage":{"prompt_tokens":4,"completion_tokens":2]"#), (Some((4, 2)), 0));
        assert_eq!(of(JSON, r#"{"usage":{"prompt_tokens":4,"completion_tokens":2"#), (Some((4, 0)), 0), "2 may go on");
        assert_eq!(of(JSON, r#"{"usage"x:{"prompt_tokens":4}}"#), (None, 0));
        assert_eq!(of(SSE, "data: {\"usage\":{\"prompt_tokens\":4}\n\ndata: {\"usage\":oh\n\n"), (Some((4, 0)), 2));
    }

    #[test]
    fn it_has_a_fixed_size() {
        assert!(size_of::<Meter>() <= 512, "{}", size_of::<Meter>());
    }

    const KEYS: &[&str] = &[
        "usage",
        "message",
        "response",
        "choices",
        "type",
        "error",
        "done",
        "prompt_tokens",
        "input_tokens",
        "cache_read_input_tokens",
        "completion_tokens",
        "output_tokens",
        "prompt_eval_count",
        "eval_count",
    ];

    /// The same of a text that is there as a whole.
    fn expected(text: &Value) -> Option<(u64, u64)> {
        let places = [text.get("message"), text.get("response"), Some(text)];
        // Keys are sorted, and the last report of each count holds.
        let mut reports: Vec<(&str, &Value)> = Vec::new();
        for (name, place) in ["message", "response", "usage"].into_iter().zip(places) {
            let usage = place.and_then(|place| place.get("usage"));
            reports.extend(usage.map(|usage| (name, usage)));
        }
        let count = |keys: &[&str], ollama: &str| -> Option<u64> {
            let mut found: Vec<(&str, u64)> = Vec::new();
            found.extend(text.get(ollama).and_then(Value::as_u64).map(|count| (ollama, count)));
            for (name, report) in &reports {
                for key in keys {
                    found.extend(report.get(key).and_then(Value::as_u64).map(|count| (*name, count)));
                }
            }
            found.into_iter().max_by_key(|(name, _)| *name).map(|(_, count)| count)
        };
        let parts = [count(&["input_tokens"], "-"), count(&["cache_read_input_tokens"], "-")];
        let sum = parts.into_iter().flatten().reduce(u64::saturating_add);
        let input = count(&["prompt_tokens"], "prompt_eval_count").or(sum);
        let output = count(&["completion_tokens", "output_tokens"], "eval_count");
        (input.is_some() || output.is_some()).then(|| (input.unwrap_or(0), output.unwrap_or(0)))
    }

    proptest! {
        #[test]
        fn it_finds_what_serde_json_finds(
            text in prop::collection::btree_map(prop::sample::select(KEYS).prop_map(str::to_owned), values(KEYS), 0..8),
            pretty: bool,
            cuts in cuts(),
        ) {
            let text = Value::from_iter(text);
            let json = if pretty { serde_json::to_string_pretty(&text) } else { serde_json::to_string(&text) };
            let found = after(JSON, frames(json.unwrap().as_bytes(), &cuts)).0;
            prop_assert_eq!(found, expected(&text), "{}", text);
        }

        #[test]
        fn frames_do_not_matter(
            pieces in prop::collection::vec(prop::sample::select(PIECES), 0..30),
            kind in prop::sample::select(vec![SSE, JSON, LINES]),
            cuts in cuts(),
        ) {
            let body = pieces.concat();
            prop_assert_eq!(after(kind, frames(body.as_bytes(), &cuts)), after(kind, [body.as_bytes()]), "{}", body);
        }

        #[test]
        fn nothing_panics(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8),
            kind in prop::sample::select(vec![SSE, JSON, LINES]),
        ) {
            after(kind, frames.iter().map(Vec::as_slice));
        }
    }

    const PIECES: &[&str] = &[
        "data: ",
        "data:",
        "data",
        "event: error",
        ": ping",
        "\n",
        "\n\n",
        "\r\n\r\n",
        "\r",
        "[DONE]",
        "\u{FEFF}",
        "{",
        "}",
        "[",
        "]",
        ",",
        "\"usage\":",
        "\"choices\":",
        "\"prompt_tokens\":",
        "12",
        "\"",
        "\\",
        "{\"choices\":[],\"usage\":{\"prompt_tokens\":3,\"completion_tokens\":4}}",
        "{\"choices\":[{}],\"usage\":null}",
    ];
}
