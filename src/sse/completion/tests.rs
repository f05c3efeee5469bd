use http::{HeaderValue, header::CONTENT_TYPE};
use proptest::prelude::*;

use super::{
    super::{
        json::tests::{cuts, frames, values},
        pieces::MAX_TYPE,
    },
    Ended::{Cut, Failed, Not, Whole},
    *,
};

const SSE: &str = "text/event-stream; charset=utf-8";
const LINES: &str = "application/x-ndjson";

fn completion(kind: &'static str, terminal: Option<Terminal>, tools: bool) -> Completion {
    let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static(kind))]);
    Completion::of(&headers, terminal.map(Arc::new), tools).unwrap()
}

fn after<'a>(mut completion: Completion, frames: impl IntoIterator<Item = &'a [u8]>) -> Ended {
    frames.into_iter().for_each(|frame| completion.pass(frame));
    completion.state()
}

fn of_any(body: &str, completion: &Completion) -> Ended {
    let whole = after(completion.clone(), [body.as_bytes()]);
    assert_eq!(after(completion.clone(), body.as_bytes().chunks(1)), whole, "byte by byte: {body}");
    whole
}

/// Of an event stream.
fn of(stream: &str) -> Ended {
    of_any(stream, &completion(SSE, None, false))
}

fn with_tools(stream: &str) -> Ended {
    of_any(stream, &completion(SSE, None, true))
}

fn lines(body: &str) -> Ended {
    of_any(body, &completion(LINES, None, false))
}

fn json(body: &str) -> Ended {
    let found = complete_json(body.as_bytes(), false);
    assert_eq!(of_any(body, &completion("application/json", None, false)), found);
    found
}

/// An event stream of these data.
fn sse(data: &[&str]) -> String {
    data.iter().flat_map(|data| ["data: ", data, "\n\n"]).collect()
}

fn event(name: &str) -> Terminal {
    Terminal::Event(name.to_owned().try_into().unwrap())
}

fn no_beginning_is_whole(stream: &str) {
    for beginning in stream.char_indices().filter_map(|(end, _)| stream.get(..end)) {
        assert_eq!(of(beginning), Not, "{beginning}");
    }
}

const ROLE: &str = r#"{"object":"chat.completion.chunk","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}],"usage":null}"#;
const TOKEN: &str = r#"{"choices":[{"index":0,"delta":{"content":"\"finish_reason\": \"length\", \"error\": 1"},"finish_reason":null}]}"#;
const USAGE: &str = r#"{"choices":[],"usage":{"prompt_tokens":19,"completion_tokens":10}}"#;

fn finish(reason: &str) -> String {
    format!(r#"{{"choices":[{{"finish_reason":"{reason}","delta":{{}},"index":0}}]}}"#)
}

fn chat(reason: &str) -> String {
    sse(&[ROLE, TOKEN, &finish(reason), USAGE, "[DONE]"])
}

#[test]
fn an_openai_chat_is_whole_with_its_reason_and_its_end() {
    assert_eq!(of(&chat("stop")), Whole);
    assert_eq!(of(&chat("stop").replace('\n', "\r\n")), Whole);
    assert_eq!(of(&chat("stop").replace('\n', "\r")), Whole);
    assert_eq!(of(&format!("\u{FEFF}: hi\n\n{}: bye\n\n\n", chat("stop").replace("data: ", "data:"))), Whole);
    assert_eq!(of(&sse(&[r#"{"choices":[{"text":"x","finish_reason":"stop"}]}"#, "[DONE]"])), Whole);
}

#[test]
fn an_openai_chat_that_breaks_off_is_not_whole() {
    let stream = chat("stop");
    no_beginning_is_whole(&stream);
    assert_eq!(of(""), Not);
    assert_eq!(of(&sse(&[ROLE, TOKEN, "[DONE]"])), Cut("unfinished"), "somebody else wrote the end");
}

#[test]
fn a_reason_that_is_not_good_cuts() {
    for (reason, why) in [
        ("length", "length"),
        ("content_filter", "content-filter"),
        ("tool_calls", "tools"),
        ("function_call", "tools"),
        ("abort", "unknown"),
        ("", "unknown"),
        ("st\\u006fp", "unknown"),
    ] {
        assert_eq!(of(&chat(reason)), Cut(why), "{reason}");
        assert_eq!(of(&sse(&[ROLE, &finish(reason)])), Cut(why), "before the end: {reason}");
    }
    assert_eq!(of(&chat("error")), Failed);
}

#[test]
fn each_choice_needs_its_reason() {
    let choice = |index: u32, reason: &str| format!(r#"{{"index":{index},"delta":{{}},"finish_reason":{reason}}}"#);
    let chunk = |choices: &[String]| format!(r#"{{"choices":[{}]}}"#, choices.join(","));
    let both = chunk(&[choice(0, "null"), choice(1, "null")]);
    let first = chunk(&[choice(0, "\"stop\"")]);
    let second = chunk(&[choice(1, "\"stop\"")]);
    assert_eq!(of(&sse(&[&both, &first, &second, "[DONE]"])), Whole);
    assert_eq!(of(&sse(&[&both, &first, "[DONE]"])), Cut("unfinished"));
    assert_eq!(of(&sse(&[&both, &second, &second, "[DONE]"])), Cut("unfinished"));
    let at_once = chunk(&[choice(0, "\"stop\""), choice(1, "\"length\"")]);
    assert_eq!(of(&sse(&[&at_once, "[DONE]"])), Cut("length"));
    assert_eq!(of(&sse(&[&chunk(&[choice(128, "\"stop\"")]), "[DONE]"])), Cut("choices"));
}

#[test]
fn calls_of_tools_cut_unless_they_are_allowed() {
    let call = r#"{"choices":[{"index":0,"delta":{"tool_calls":[{"index":0,"function":{"arguments":"{}"}}]},"finish_reason":null}]}"#;
    let stream = sse(&[ROLE, call, &finish("tool_calls"), "[DONE]"]);
    assert_eq!((of(&stream), with_tools(&stream)), (Cut("tools"), Whole));
    let forced = sse(&[ROLE, call, &finish("stop"), "[DONE]"]);
    assert_eq!(
        (of(&forced), with_tools(&forced)),
        (Cut("tools"), Whole),
        "a call that was asked for by its name stops"
    );
    assert_eq!(with_tools(&sse(&[ROLE, call, "[DONE]"])), Cut("unfinished"));
    let old = sse(&[r#"{"choices":[{"delta":{"function_call":{"name":"f"}},"finish_reason":"stop"}]}"#, "[DONE]"]);
    assert_eq!((of(&old), with_tools(&old)), (Cut("tools"), Whole));
    let none =
        sse(&[r#"{"choices":[{"delta":{"tool_calls":[],"function_call":null},"finish_reason":"stop"}]}"#, "[DONE]"]);
    assert_eq!(of(&none), Whole);
}

#[test]
fn an_error_fails_wherever_it_stands() {
    let error = r#"{"error":{"message":"out of memory"}}"#;
    assert_eq!(of(&sse(&[ROLE, error])), Failed);
    assert_eq!(of(&sse(&[ROLE, &finish("stop"), error, "[DONE]"])), Failed);
    assert_eq!(of(&format!("{}{}", chat("stop"), sse(&[error]))), Failed, "after the end");
    assert_eq!(of(&format!("{}{}", chat("length"), sse(&[error]))), Failed, "worse than the length");
    assert_eq!(of(&format!("{}event: error\ndata: x\n\n", sse(&[ROLE]))), Failed);
    assert_eq!(of(&format!("event: error\n\n{}", chat("stop"))), Failed);
    assert_eq!(of(&sse(&[r#"{"type":"error","code":"x"}"#])), Failed);
    assert_eq!(of(&format!("{}{}", sse(&[r#"{"error":null}"#]), chat("stop"))), Whole);
    assert_eq!(of(&format!("{}{}", sse(&[r#"{"a":{"error":1}}"#]), chat("stop"))), Whole);
}

#[test]
fn nothing_comes_after_the_end() {
    let and = |more: &str| of(&format!("{}{more}", chat("stop")));
    for more in ["", "\n", ": bye\n\n", "id: 7\n\n", "event: x\n\n", ": not ended", "data: [DONE]\n\n", "data:\n\n"] {
        assert_eq!(and(more), Whole, "{more:?}");
    }
    assert_eq!(and("data: x\n\n"), Cut("trailing-data"));
    assert_eq!(and("data: {}\n\n"), Cut("trailing-data"));
    assert_eq!(and("data: x"), Not, "broken off");
    assert_eq!(and("data: x\n"), Not, "broken off");
}

#[test]
fn an_event_of_a_chat_that_cannot_be_read_cuts() {
    assert_eq!(of(&sse(&[ROLE, r#"{"choices":[{"index":0,"delta""#, &finish("stop"), "[DONE]"])), Cut("unreadable"));
    assert_eq!(of(&sse(&["{", "}}", "[DONE]"])), Whole, "tokens may be anything where this is no chat");
    let told = of_any(
        &format!("{}event: complete\ndata: bye\n\n", chat("stop")),
        &completion(SSE, Some(event("complete")), false),
    );
    assert_eq!(told, Whole, "nor need the end be JSON");
}

fn response(end: &str, body: &str) -> String {
    format!(
        "event: response.created\ndata: {{\"type\":\"response.created\",\"response\":{{\"error\":null,\"status\":\"in_progress\"}}}}\n\n\
         event: response.output_text.delta\ndata: {{\"type\":\"response.output_text.delta\",\"delta\":\"Hi\"}}\n\n\
         event: response.{end}\ndata: {{\"type\":\"response.{end}\",\"response\":{{{body}}}}}\n\n"
    )
}

#[test]
fn an_openai_response_is_whole_when_it_is_completed() {
    assert_eq!(of(&response("completed", r#""status":"completed","output":[{"type":"message"}]"#)), Whole);
    assert_eq!(of(&format!("{}data: [DONE]\n\n", response("completed", ""))), Whole);
    assert_eq!(of(&response("in_progress", "")), Not);
    assert_eq!(of(&sse(&[r#"{"type":"response.completed","response":{"#])), Not, "what cannot be read is no end");
    assert_eq!(of(&response("incomplete", r#""incomplete_details":{"reason":"max_output_tokens"}"#)), Cut("length"));
    assert_eq!(
        of(&response("incomplete", r#""incomplete_details":{"reason":"content_filter"}"#)),
        Cut("content-filter")
    );
    assert_eq!(of(&response("incomplete", "")), Cut("incomplete"));
    assert_eq!(of(&response("failed", r#""error":{"code":"x"}"#)), Failed);
    let stream = response("completed", r#""output":[{"type":"reasoning"}]"#);
    no_beginning_is_whole(&stream);
}

#[test]
fn an_openai_response_that_calls_tools_is_cut() {
    for kind in ["function_call", "web_search_call", "mcp_list_tools"] {
        let stream = response("completed", &format!(r#""output":[{{"type":"message"}},{{"type":"{kind}"}}]"#));
        assert_eq!((of(&stream), with_tools(&stream)), (Cut("tools"), Whole), "{kind}");
        let item = format!(r#"{{"type":"response.output_item.added","item":{{"type":"{kind}"}}}}"#);
        assert_eq!(of(&sse(&[&item])), Cut("tools"), "{kind}");
    }
    assert_eq!(of(&sse(&[r#"{"item":{"type":"phone_call"}}"#, "[DONE]"])), Whole, "none of a response");
}

fn anthropic(reason: &str) -> String {
    sse(&[
        r#"{"type":"message_start","message":{"type":"message","content":[],"stop_reason":null,"usage":{"input_tokens":25}}}"#,
        r#"{"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}"#,
        r#"{"type":"ping"}"#,
        r#"{"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hello"}}"#,
        r#"{"type":"content_block_stop","index":0}"#,
        &format!(
            r#"{{"type":"message_delta","delta":{{"stop_reason":{reason},"stop_sequence":null}},"usage":{{"output_tokens":15}}}}"#
        ),
        r#"{"type":"message_stop"}"#,
    ])
}

#[test]
fn an_anthropic_message_is_whole_when_it_stops_for_a_good_reason() {
    for reason in ["end_turn", "stop_sequence"] {
        let stream = anthropic(&format!("\"{reason}\""));
        assert_eq!(of(&stream), Whole, "{reason}");
        no_beginning_is_whole(&stream);
    }
    let cut = |reason: &str| of(&anthropic(&format!("\"{reason}\"")));
    assert_eq!((cut("max_tokens"), cut("model_context_window_exceeded")), (Cut("length"), Cut("length")));
    assert_eq!((cut("refusal"), cut("pause_turn"), cut("other")), (Cut("refusal"), Cut("pause"), Cut("unknown")));
    assert_eq!(cut("tool_use"), Cut("tools"));
    assert_eq!(with_tools(&anthropic("\"tool_use\"")), Whole);
    assert_eq!(of(&anthropic("null")), Cut("unfinished"));
    assert_eq!(of(&sse(&[r#"{"type":"message_stop"}"#])), Cut("unfinished"), "the beginning is missing");
    let server = r#"{"type":"content_block_start","content_block":{"type":"server_tool_use"}}"#;
    assert_eq!(of(&format!("{}{}", sse(&[server]), anthropic("\"end_turn\""))), Cut("tools"));
    let overloaded = r#"{"type":"error","error":{"type":"overloaded_error","message":"Overloaded"}}"#;
    assert_eq!(of(&sse(&[overloaded])), Failed);
}

#[test]
fn ollama_is_whole_with_its_last_line() {
    let token = r#"{"model":"llama3.2","message":{"role":"assistant","content":"\"done\":true"},"done":false}"#;
    let end = |reason: &str| {
        format!(r#"{{"model":"llama3.2","message":{{"content":""}}{reason},"done":true,"eval_count":2}}"#)
    };
    let stop = end(r#","done_reason":"stop""#);
    assert_eq!(lines(&format!("{token}\n{token}\n{stop}\n")), Whole);
    assert_eq!(lines(&format!("{token}\r\n\r\n{stop}")), Whole, "without a line end");
    assert_eq!(lines(&format!("{token}\n{}\n\n", end(""))), Whole, "older ones have no reason");
    assert_eq!(lines(&format!("{token}\n{}", end(r#","done_reason":"length""#))), Cut("length"));
    assert_eq!(lines(&format!("{token}\n{}", end(r#","done_reason":"load""#))), Cut("unknown"));
    assert_eq!(lines(&format!("{token}\n{}", stop.strip_suffix('}').unwrap())), Not);
    assert_eq!(lines(&format!("{token}\n{token}\n")), Not);
    assert_eq!(lines(&format!("{token}\n{{\"error\":\"out of memory\"}}\n")), Failed);
    assert_eq!(lines(&format!("{stop}\n{token}")), Cut("trailing-data"));
    assert_eq!(of(&sse(&[token, &stop])), Not, "in events anything may be done");
    let call = r#"{"message":{"tool_calls":[{"function":{}}]},"done":false}"#;
    assert_eq!(lines(&format!("{call}\n{stop}")), Cut("tools"));
    assert_eq!(of_any(&format!("{call}\n{stop}"), &completion(LINES, None, true)), Whole);
}

#[test]
fn another_stream_ends_as_it_is_told() {
    let by_event = |stream: &str| of_any(stream, &completion(SSE, Some(event("complete")), false));
    assert_eq!(by_event("event: token\ndata: a\n\nevent: complete\ndata: {}\n\n"), Whole);
    assert_eq!(by_event("data: {\"type\":\"message\",\"content\":\"a\"}\n\nevent: complete\n\n"), Whole);
    assert_eq!(by_event("data: a\n\nevent: complete\n\n"), Whole, "with or without data");
    assert_eq!(by_event("data: a\n\nevent: complete\ndata: {}\n"), Not);
    assert_eq!(by_event("event: complete\nevent: token\ndata: a\n\n"), Not, "the last of them counts");
    assert_eq!(by_event("event: complete2\ndata: a\n\nevent: compl\ndata: ete\n\ndata: complete\n\n"), Not);
    assert_eq!(by_event(&chat("stop")), Not, "it holds instead of others");
    assert_eq!(by_event("event: complete\ndata: a\n\ndata: [DONE]\n\n"), Whole);
    assert_eq!(by_event("event: complete\ndata: a\n\ndata: b\n\n"), Cut("trailing-data"));
    assert_eq!(by_event(&format!("event: {}\ndata: a\n\n", "x".repeat(1000))), Not);
    let by_data = Some(Terminal::Data("<end>".to_owned().try_into().unwrap()));
    let by_data = |kind, stream: &str| of_any(stream, &completion(kind, by_data.clone(), false));
    assert_eq!(by_data(SSE, "data: <\n\ndata: <end> \n\n"), Whole);
    assert_eq!(by_data(SSE, "data: <end\ndata: >\n\ndata: x<end>\n\n"), Not);
    assert_eq!(by_data(LINES, "{}\n<end>"), Whole);
}

#[test]
fn a_terminal_is_written_in_one_line() {
    let read = |json: &str| serde_json::from_str::<Terminal>(json);
    assert_eq!(read(r#"{"event": "complete"}"#).unwrap(), event("complete"));
    assert_eq!(read(r#"{"data": "[DONE]"}"#).unwrap(), Terminal::Data("[DONE]".to_owned().try_into().unwrap()));
    for wrong in ["", " a", "a\\nb", &"x".repeat(MAX_TYPE + 1)] {
        let error = read(&format!(r#"{{"data": "{wrong}"}}"#)).unwrap_err().to_string();
        assert!(error.starts_with("must be of 1 to 64 bytes in one line"), "{error}");
    }
}

#[test]
fn a_body_that_is_one_text_is_judged_by_what_it_is() {
    let chat = |reason: &str, message: &str| {
        format!(r#"{{"choices":[{{"index":0,"message":{{{message}}},"finish_reason":{reason}}}],"usage":{{}}}}"#)
    };
    assert_eq!(json(&chat("\"stop\"", r#""content":"x","tool_calls":null"#)), Whole);
    assert_eq!(json(&chat("\"length\"", "")), Cut("length"));
    assert_eq!(json(&chat("\"content_filter\"", "")), Cut("content-filter"));
    assert_eq!(json(&chat("null", "")), Cut("unfinished"));
    assert_eq!(json(&chat("\"stop\"", r#""tool_calls":[{"id":"c"}]"#)), Cut("tools"));
    assert_eq!(complete_json(chat("\"tool_calls\"", r#""tool_calls":[{"id":"c"}]"#).as_bytes(), true), Whole);

    let response = |rest: &str| format!(r#"{{"object":"response","error":null,{rest}}}"#);
    assert_eq!(json(&response(r#""status":"completed","output":[{"type":"message"}]"#)), Whole);
    assert_eq!(json(&response(r#""status":"completed","output":[{"type":"function_call"}]"#)), Cut("tools"));
    assert_eq!(
        json(&response(r#""status":"incomplete","incomplete_details":{"reason":"max_output_tokens"}"#)),
        Cut("length")
    );
    assert_eq!(json(&response(r#""status":"incomplete""#)), Cut("incomplete"));
    assert_eq!(json(&response(r#""status":"failed""#)), Failed);
    assert_eq!(json(&response(r#""status":"in_progress""#)), Not);

    let message = |reason: &str| {
        format!(r#"{{"type":"message","content":[{{"type":"text","text":"Hi"}}],"stop_reason":{reason}}}"#)
    };
    assert_eq!(json(&message("\"end_turn\"")), Whole);
    assert_eq!(json(&message("\"max_tokens\"")), Cut("length"));
    assert_eq!(json(&message("\"tool_use\"")), Cut("tools"));
    assert_eq!(json(&message("null")), Cut("unfinished"));

    assert_eq!(json(r#"{"model":"m","response":"x","done":true,"done_reason":"stop"}"#), Whole);
    assert_eq!(json(r#"{"model":"m","response":"x","done":true,"done_reason":"length"}"#), Cut("length"));
}

#[test]
fn other_json_is_whole_where_it_is_json() {
    for body in [
        "{}",
        "[]",
        "1",
        " \"a\" ",
        r#"{"choices":[{"text":"A"},{"text":"B"}]}"#,
        r#"{"status":"running"}"#,
        r#"{"done":false}"#,
        r#"{"type":"message","text":"Hi"}"#,
    ] {
        assert_eq!(json(body), Whole, "{body}");
    }
    for body in ["", " ", "{", "{}x", "<html>", "[1,]", "nul"] {
        assert_eq!(json(body), Not, "{body}");
    }
    assert_eq!(json(r#"{"error":"x"}"#), Failed);
    assert_eq!(json(&("[".repeat(200) + &"]".repeat(200))), Not, "too deep to be read");
}

#[test]
fn it_has_a_fixed_size() {
    assert!(size_of::<Completion>() <= 768, "{}", size_of::<Completion>());
}

/// Streams in which everything that matters is frequent.
fn streams() -> impl Strategy<Value = Vec<u8>> {
    let pieces = vec![
        "data",
        "event",
        ": ",
        ":",
        "error",
        "complete",
        "[DONE]",
        "\n",
        "\n\n",
        "\r",
        "\r\n",
        "\u{FEFF}",
        "{",
        "}",
        "x",
        "data: [DONE]\n\n",
        "data: {\"choices\":[{\"finish_reason\":\"stop\"}]}\n\n",
        "{\"done\":true}",
        "\"error\":1",
        "data: {\"type\":\"message_stop\"}\n\n",
        "data: {\"delta\":{\"stop_reason\":\"end_turn\"}}\n\n",
        "\"type\":\"error\"",
        "event: complete\n",
        ": ping\n\n",
    ];
    prop::collection::vec(prop::sample::select(pieces), 0..20).prop_map(|pieces| pieces.concat().into_bytes())
}

const KEYS: &[&str] = &[
    "choices",
    "finish_reason",
    "index",
    "message",
    "delta",
    "tool_calls",
    "error",
    "type",
    "done",
    "stop_reason",
    "stop",
    "output",
];

proptest! {
    #[test]
    fn frames_do_not_matter(
        stream in streams(), cuts in cuts(), kind in prop::sample::select(vec![SSE, LINES, "application/json"]), told: bool
    ) {
        let completion = completion(kind, told.then(|| event("complete")), false);
        prop_assert_eq!(after(completion.clone(), frames(&stream, &cuts)), after(completion, [&*stream]));
    }

    #[test]
    fn frames_of_json_do_not_matter(value in values(KEYS), cuts in cuts()) {
        for (kind, body) in [("application/json", value.to_string()), (LINES, format!("{value}\n{value}")), (SSE, sse(&[&value.to_string(), "[DONE]"]))] {
            let completion = completion(kind, None, false);
            prop_assert_eq!(after(completion.clone(), frames(body.as_bytes(), &cuts)), after(completion, [body.as_bytes()]));
        }
    }

    #[test]
    fn nothing_panics(bytes in prop::collection::vec(any::<u8>(), 0..60), kind in prop::sample::select(vec![SSE, LINES, "application/json"])) {
        after(completion(kind, None, false), [&*bytes]);
    }

    /// What has been cut or has failed stays so, whatever comes.
    #[test]
    fn nothing_makes_good_what_speaks_against_it(stream in streams(), more in streams()) {
        let mut completion = completion(SSE, None, false);
        completion.pass(&stream);
        let before = completion.so_far.against;
        completion.pass(&more);
        prop_assert!(before.is_none_or(|before| completion.so_far.against == Some(before) || completion.state() == Failed));
    }

    /// An error that has ended is seen, as the scanner sees it.
    #[test]
    fn what_the_scanner_calls_an_error_has_failed(stream in streams()) {
        let (mut scanner, mut rest) = (super::super::Scanner::new(), &*stream);
        let events: Vec<_> = std::iter::from_fn(|| scanner.next(&mut rest)).collect();
        let failed = after(completion(SSE, None, false), [&*stream]) == Failed;
        prop_assert!(failed || !events.contains(&super::super::Event::Error));
    }
}
