//! Whether an answer is complete, and so fit to be given to somebody else.

use std::{fmt, sync::Arc};

use http::HeaderMap;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, de::Error};

use super::{
    bytes::Short,
    json::{Json, Token},
    pieces::MAX_TYPE,
    shape::{Part, Shape},
};

/// How an answer has ended, if it has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It has not: what has come is a beginning.
    Not,
    /// It is whole.
    Whole,
    /// It is not what was asked for, though nothing failed, for this reason, in a word: `length`, `content-filter`,
    /// `refusal`, `pause`, `tools`, `incomplete`, `unknown` (a reason that nobody knows), `unfinished` (no reason at
    /// all), `unreadable`, `choices` (more than 128), `trailing-data`.
    Cut(&'static str),
    /// It says that something went wrong.
    Failed,
}

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
pub struct Mark(String);

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

/// Finds out while an answer passes whether it is complete.
///
/// It reads these, and finds out by itself which of them it has before it:
///
/// - `OpenAI` chat completions and completions (API reference, `finish_reason`), and the many servers that imitate them:
///   every choice that has begun has a reason to end that is good, and in a stream `[DONE]` comes.
/// - `OpenAI` responses: `response.completed` in a stream, else the `status`.
/// - Anthropic messages: a `stop_reason` that is good, and in a stream `message_stop`.
/// - Ollama (`api.md`): `"done": true` in the last line, with a `done_reason` that is good or missing.
/// - Other event streams and lines: the [`Terminal`] that it is told of, which holds instead of all of these ends.
/// - Other JSON: the text is complete.
///
/// What says that something went wrong has failed, wherever it stands: an event of the type `error`, an object with
/// `"type": "error"` or an `error` that is not `null`. After the end nothing comes but comments, blank lines, and
/// `[DONE]`; an event that has not ended is none (§9.2.6), but what came of it shows that the stream was broken off.
/// Where it is in doubt, an answer is not whole.
///
/// It has a fixed size and allocates nothing, however long bodies, events and strings are, and whatever the bytes, it
/// neither fails nor panics. Keys are not found where they are written with escapes, which no server does.
///
/// ```
/// use http::{HeaderMap, HeaderValue, header::CONTENT_TYPE};
/// use sidegate::sse::{Completion, Ended};
///
/// let headers = HeaderMap::from_iter([(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"))]);
/// let mut completion = Completion::of(&headers, None, false).expect("event streams can be read");
/// completion.pass(b"data: {\"choices\": [{\"delta\": {\"content\": \"Hi\"}, \"finish_reason\": \"stop\"}]}\n\ndata: [DO");
/// assert_eq!(completion.state(), Ended::Not);
/// completion.pass(b"NE]\n\n");
/// assert_eq!(completion.state(), Ended::Whole);
/// ```
#[derive(Debug, Clone)]
pub struct Completion {
    shape: Shape,
    last: Last,
    /// Whether calls of tools are as good as any answer.
    tools: bool,
    text: Text,
    so_far: SoFar,
}

/// How one knows what comes last.
#[derive(Debug, Clone)]
enum Last {
    /// It is an event that says so.
    Event,
    /// It is a line that says so: `"done": true` may be said of anything in events.
    Line,
    /// It is this.
    Told(Arc<Terminal>),
}

/// What all texts together have said.
#[derive(Debug, Clone, Default)]
struct SoFar {
    /// What speaks against it.
    against: Option<Against>,
    /// The end has come.
    ended: bool,
    /// The choices that have begun, a bit for each, and those of them that have ended.
    begun: u128,
    finished: u128,
    /// Choices have had a place for a reason.
    has_reasons: bool,
    message: Anthropic,
}

/// How far an Anthropic message is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Anthropic {
    #[default]
    Unseen,
    Begun,
    Stopped,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Against {
    Cut(&'static str),
    Failed,
}

impl Completion {
    /// For an answer with these headers: `text/event-stream`, `application/x-ndjson`, `application/json` and every other
    /// type that ends in `+json`. `None` for other types, and for a body with a content coding, in which nothing can be
    /// read. A body that is one JSON text has no use for a `terminal`. Where `tools` are allowed, an answer that calls
    /// them is as good as others.
    #[must_use]
    pub fn of(headers: &HeaderMap, terminal: Option<Arc<Terminal>>, tools: bool) -> Option<Self> {
        Shape::of(headers).map(|shape| Self::new(shape, terminal, tools))
    }

    fn new(shape: Shape, terminal: Option<Arc<Terminal>>, tools: bool) -> Self {
        let last = match (terminal, &shape) {
            (Some(terminal), _) => Last::Told(terminal),
            (None, Shape::Lines) => Last::Line,
            (None, _) => Last::Event,
        };
        Self { shape, last, tools, text: Text::new(), so_far: SoFar::default() }
    }

    /// Notes that these bytes of the body have passed.
    pub fn pass(&mut self, frame: &[u8]) {
        let Self { shape, last, tools, text, so_far } = self;
        shape.pass(frame, |part| match part {
            Part::Text(bytes) => text.pass(bytes),
            Part::End { kind } => {
                so_far.end(text, kind, last, *tools);
                text.clear();
            }
        });
    }

    /// How the answer has ended, if nothing follows. What speaks against it shows as soon as it has come.
    #[must_use]
    pub fn state(&self) -> Ended {
        let mut so_far = self.so_far.clone();
        match self.shape {
            Shape::Events(_) => so_far.ended &= self.text.is_blank(),
            Shape::Lines | Shape::Json => {
                let mut text = self.text.clone();
                // A number ends where something else begins.
                text.pass(b" ");
                if matches!(self.shape, Shape::Lines) {
                    so_far.end(&mut text, Some(b""), &self.last, self.tools);
                } else {
                    so_far.end_body(&mut text, self.tools);
                }
            }
        }
        so_far.state()
    }
}

/// How a JSON answer that did not come as a stream has ended. Where `tools` are allowed, one that calls them is as good
/// as others. Of what is none of a language model's, it has to be JSON, without an `error`.
#[must_use]
pub fn complete_json(body: &[u8], tools: bool) -> Ended {
    let mut completion = Completion::new(Shape::Json, None, tools);
    completion.pass(body);
    completion.state()
}

impl SoFar {
    fn state(&self) -> Ended {
        match self.against {
            Some(Against::Failed) => Ended::Failed,
            Some(Against::Cut(why)) => Ended::Cut(why),
            None if !self.ended => Ended::Not,
            None if self.begun != self.finished || self.message == Anthropic::Begun => Ended::Cut("unfinished"),
            None => Ended::Whole,
        }
    }

    /// A failure is worse than anything else; of what else there is, what came first.
    fn blame(&mut self, against: Against) {
        if self.against.is_none() || against == Against::Failed {
            self.against = Some(against);
        }
    }

    fn reason(&mut self, reason: Option<Reason>, tools: bool) {
        match reason {
            Some(Reason::Tools) if !tools => self.blame(Against::Cut("tools")),
            Some(Reason::Failed) => self.blame(Against::Failed),
            Some(Reason::Cut(why)) => self.blame(Against::Cut(why)),
            Some(Reason::Good | Reason::Tools) | None => {}
        }
    }

    /// What a text says that can say so in any form.
    fn take(&mut self, text: &mut Text, tools: bool) {
        text.end_choice();
        let says = &text.says;
        self.reason(says.worst, tools);
        self.reason((says.calls && says.is_response()).then_some(Reason::Tools), tools);
        (self.begun, self.finished) = (self.begun | says.begun, self.finished | says.finished);
        self.has_reasons |= says.has_reasons;
        if self.message == Anthropic::Unseen && matches!(says.kind, Kind::MessageBegun | Kind::MessageStop) {
            self.message = Anthropic::Begun;
        }
        if says.stop.is_some() {
            self.message = Anthropic::Stopped;
        }
        self.reason(says.stop, tools);
    }

    /// An event or a line has ended.
    fn end(&mut self, text: &mut Text, kind: Option<&[u8]>, last: &Last, tools: bool) {
        // Without data it is none, but says what it says.
        if kind == Some(b"error") {
            self.blame(Against::Failed);
        }
        self.take(text, tools);
        match text.says.kind {
            Kind::ResponseIncomplete => self.blame(Against::Cut("incomplete")),
            Kind::ResponseFailed => self.blame(Against::Failed),
            _ => {}
        }
        let is_whole = text.json.is_complete();
        let is_done = text.is(b"[DONE]");
        let ends = match last {
            Last::Event => is_done || is_whole && matches!(text.says.kind, Kind::MessageStop | Kind::ResponseCompleted),
            Last::Line => is_whole && text.says.kind == Kind::Done,
            Last::Told(terminal) => match &**terminal {
                Terminal::Event(Mark(name)) => kind == Some(name.as_bytes()),
                Terminal::Data(Mark(data)) => text.is(data.as_bytes()),
            },
        };
        if !ends && !is_done && !text.is_blank() {
            let is_known = self.begun != 0 || self.message != Anthropic::Unseen;
            if self.ended {
                self.blame(Against::Cut("trailing-data"));
            } else if is_known && !is_whole {
                self.blame(Against::Cut("unreadable"));
            }
        }
        self.ended |= ends;
    }

    /// The only text has ended.
    fn end_body(&mut self, text: &mut Text, tools: bool) {
        self.take(text, tools);
        self.ended = text.json.is_complete();
        // Others have choices, too.
        if !self.has_reasons {
            self.begun = self.finished;
        }
        if text.says.is_response() {
            match text.says.status {
                Status::Incomplete => self.blame(Against::Cut("incomplete")),
                Status::Failed => self.blame(Against::Failed),
                Status::Other => self.ended = false,
                Status::Unseen | Status::Completed => {}
            }
        }
    }
}

/// Why a model has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reason {
    Good,
    Tools,
    Cut(&'static str),
    Failed,
}

impl Reason {
    fn of(text: Option<&[u8]>) -> Self {
        match text.unwrap_or_default() {
            b"stop" | b"end_turn" | b"stop_sequence" | b"eos" | b"eos_token" => Self::Good,
            b"length" | b"max_tokens" | b"max_output_tokens" | b"model_length" | b"model_context_window_exceeded" => {
                Self::Cut("length")
            }
            b"content_filter" => Self::Cut("content-filter"),
            b"refusal" => Self::Cut("refusal"),
            b"pause_turn" => Self::Cut("pause"),
            b"tool_calls" | b"function_call" | b"tool_use" => Self::Tools,
            b"error" => Self::Failed,
            _ => Self::Cut("unknown"),
        }
    }

    /// How much it speaks against an answer.
    const fn weight(self) -> u8 {
        match self {
            Self::Good => 0,
            Self::Tools => 1,
            Self::Cut(_) => 2,
            Self::Failed => 3,
        }
    }
}

/// Reads one text after another: the data of events, lines, or one whole body. All that it asks for stands in the first
/// five levels.
#[derive(Debug, Clone)]
struct Text {
    json: Json,
    /// How the text begins, without white space: as much as tells what marks the end from others.
    head: Short<{ MAX_TYPE + 8 }>,
    /// What leads to where it reads: of each object that is open the last key.
    path: [Name; 5],
    says: Says,
}

/// What one text says.
#[derive(Debug, Clone, Copy, Default)]
struct Says {
    kind: Kind,
    stop: Option<Reason>,
    /// The choice that is read: its index, and why it has ended.
    choice: Option<(u64, Option<Reason>)>,
    begun: u128,
    finished: u128,
    has_reasons: bool,
    /// The worst reason of all but Anthropic's.
    worst: Option<Reason>,
    /// A tool is called if this is a response.
    calls: bool,
    is_response: bool,
    status: Status,
}

impl Says {
    const fn is_response(&self) -> bool {
        use Kind::{Response, ResponseCompleted, ResponseFailed, ResponseIncomplete};
        self.is_response || matches!(self.kind, Response | ResponseCompleted | ResponseFailed | ResponseIncomplete)
    }
}

/// What it is, by the member `type`, or `done` where that is true.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Kind {
    #[default]
    Other,
    Done,
    MessageBegun,
    MessageStop,
    Response,
    ResponseCompleted,
    ResponseIncomplete,
    ResponseFailed,
}

/// The member `status` of a response.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
enum Status {
    #[default]
    Unseen,
    Completed,
    Incomplete,
    Failed,
    Other,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Name {
    Choices,
    Content,
    ContentBlock,
    Delta,
    Done,
    DoneReason,
    Error,
    FinishReason,
    FunctionCall,
    IncompleteDetails,
    Index,
    Item,
    Message,
    Object,
    Output,
    Reason,
    Response,
    Status,
    StopReason,
    ToolCalls,
    Type,
    /// No name: a place in an array.
    Element,
    Other,
}

impl Name {
    fn of(key: &[u8]) -> Self {
        match key {
            b"choices" => Self::Choices,
            b"content" => Self::Content,
            b"content_block" => Self::ContentBlock,
            b"delta" => Self::Delta,
            b"done" => Self::Done,
            b"done_reason" => Self::DoneReason,
            b"error" => Self::Error,
            b"finish_reason" => Self::FinishReason,
            b"function_call" => Self::FunctionCall,
            b"incomplete_details" => Self::IncompleteDetails,
            b"index" => Self::Index,
            b"item" => Self::Item,
            b"message" => Self::Message,
            b"object" => Self::Object,
            b"output" => Self::Output,
            b"reason" => Self::Reason,
            b"response" => Self::Response,
            b"status" => Self::Status,
            b"stop_reason" => Self::StopReason,
            b"tool_calls" => Self::ToolCalls,
            b"type" => Self::Type,
            _ => Self::Other,
        }
    }
}

impl Text {
    fn new() -> Self {
        Self { json: Json::new(), head: Short::new(), path: [Name::Other; 5], says: Says::default() }
    }

    /// Begins the next text.
    fn clear(&mut self) {
        self.json.clear();
        self.head.clear();
        self.says = Says::default();
    }

    /// Whether there is nothing but white space.
    const fn is_blank(&self) -> bool {
        self.head.first().is_none()
    }

    /// Whether it is this, which is no longer than a [`Mark`].
    fn is(&self, mark: &[u8]) -> bool {
        self.head.get().is_some_and(|head| head.trim_ascii_end() == mark)
    }

    fn pass(&mut self, mut bytes: &[u8]) {
        if self.is_blank() {
            bytes = bytes.trim_ascii_start();
        }
        self.head.extend(bytes);
        while let Some(token) = self.json.next(&mut bytes) {
            let depth = usize::from(self.json.depth());
            match token {
                Token::Key => {
                    let name = Name::of(self.json.text().unwrap_or_default());
                    self.lead_to(depth, name);
                }
                Token::Array | Token::Object => {
                    self.value(token, depth - 1);
                    self.lead_to(depth, if token == Token::Array { Name::Element } else { Name::Other });
                }
                _ => self.value(token, depth),
            }
        }
    }

    fn lead_to(&mut self, depth: usize, name: Name) {
        if let Some(place) = depth.checked_sub(1).and_then(|place| self.path.get_mut(place)) {
            *place = name;
        }
    }

    fn value(&mut self, token: Token, depth: usize) {
        use Name::{
            Choices, Content, ContentBlock, Delta, Done, DoneReason, Element, Error, FinishReason, FunctionCall,
            IncompleteDetails, Index, Item, Message, Object, Output, Response, StopReason, ToolCalls, Type,
        };
        let Some(path) = self.path.get(..depth) else { return };
        let (says, text) = (&mut self.says, self.json.text());
        match (path, token) {
            ([Error], token) if token != Token::Null => says.reason(Reason::Failed),
            ([Type], Token::Text) => says.kind_is(text),
            ([Object], Token::Text) => says.is_response = text == Some(b"response"),
            ([Name::Status], Token::Text) => {
                says.status = match text {
                    Some(b"completed") => Status::Completed,
                    Some(b"incomplete") => Status::Incomplete,
                    Some(b"failed") => Status::Failed,
                    _ => Status::Other,
                }
            }
            ([Done], Token::True) => says.kind = Kind::Done,
            ([DoneReason], Token::Text) => says.reason(Reason::of(text)),
            ([StopReason] | [Delta, StopReason], Token::Text) => says.stop = Some(Reason::of(text)),
            // `"type": "message"` is what many call theirs.
            ([StopReason], Token::Null) => says.kind = Kind::MessageBegun,
            ([IncompleteDetails, Name::Reason] | [Response, IncompleteDetails, Name::Reason], Token::Text) => {
                says.reason(Reason::of(text));
            }
            ([Choices, Element], Token::Object) => {
                self.end_choice();
                self.says.choice = Some((0, None));
            }
            ([Choices, Element, FinishReason], token) => {
                says.has_reasons = true;
                if let (Token::Text, Some((_, reason))) = (token, &mut says.choice) {
                    *reason = Some(Reason::of(text));
                }
            }
            ([Choices, Element, Index], Token::Count(number)) => {
                if let Some((index, _)) = &mut says.choice {
                    *index = number;
                }
            }
            ([Choices, Element, Delta | Message, ToolCalls, Element] | [Message, ToolCalls, Element], _)
            | ([Choices, Element, Delta | Message, FunctionCall], Token::Object) => says.reason(Reason::Tools),
            ([ContentBlock, Type] | [Content, Element, Type], Token::Text) if ends_with(text, b"tool_use") => {
                says.reason(Reason::Tools);
            }
            ([Item, Type] | [Output, Element, Type] | [Response, Output, Element, Type], Token::Text) => {
                says.calls |= ends_with(text, b"_call") || text.is_some_and(|kind| kind.starts_with(b"mcp_"));
            }
            _ => {}
        }
    }

    /// The choice that was read has ended, if there was one.
    fn end_choice(&mut self) {
        let says = &mut self.says;
        let Some((index, reason)) = says.choice.take() else { return };
        let Some(bit) = u32::try_from(index).ok().and_then(|index| 1_u128.checked_shl(index)) else {
            return says.reason(Reason::Cut("choices"));
        };
        says.begun |= bit;
        if let Some(reason) = reason {
            says.finished |= bit;
            says.reason(reason);
        }
    }
}

fn ends_with(text: Option<&[u8]>, end: &[u8]) -> bool {
    text.is_some_and(|text| text.ends_with(end))
}

impl Says {
    fn reason(&mut self, reason: Reason) {
        if self.worst.is_none_or(|worst| worst.weight() < reason.weight()) {
            self.worst = Some(reason);
        }
    }

    fn kind_is(&mut self, kind: Option<&[u8]>) {
        self.kind = match kind.unwrap_or_default() {
            b"error" => return self.reason(Reason::Failed),
            b"message_start" => Kind::MessageBegun,
            b"message_stop" => Kind::MessageStop,
            b"response.completed" => Kind::ResponseCompleted,
            b"response.incomplete" => Kind::ResponseIncomplete,
            b"response.failed" => Kind::ResponseFailed,
            kind if kind.starts_with(b"response.") => Kind::Response,
            _ => return,
        };
    }
}

#[cfg(test)]
mod tests {
    use http::{HeaderValue, header::CONTENT_TYPE};
    use proptest::prelude::*;

    use super::{
        super::json::tests::{cuts, frames, values},
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
        let none = sse(&[
            r#"{"choices":[{"delta":{"tool_calls":[],"function_call":null},"finish_reason":"stop"}]}"#,
            "[DONE]",
        ]);
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
        for more in ["", "\n", ": bye\n\n", "id: 7\n\n", "event: x\n\n", ": not ended", "data: [DONE]\n\n", "data:\n\n"]
        {
            assert_eq!(and(more), Whole, "{more:?}");
        }
        assert_eq!(and("data: x\n\n"), Cut("trailing-data"));
        assert_eq!(and("data: {}\n\n"), Cut("trailing-data"));
        assert_eq!(and("data: x"), Not, "broken off");
        assert_eq!(and("data: x\n"), Not, "broken off");
    }

    #[test]
    fn an_event_of_a_chat_that_cannot_be_read_cuts() {
        assert_eq!(
            of(&sse(&[ROLE, r#"{"choices":[{"index":0,"delta""#, &finish("stop"), "[DONE]"])),
            Cut("unreadable")
        );
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
        assert_eq!(
            of(&response("incomplete", r#""incomplete_details":{"reason":"max_output_tokens"}"#)),
            Cut("length")
        );
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
}
