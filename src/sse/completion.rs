//! Whether an answer is complete, and so fit to be given to somebody else.

mod says;
mod terminal;

use std::sync::Arc;

use http::HeaderMap;

use self::says::{Kind, Reason, Status, Text};
pub use self::terminal::{Mark, Terminal};
use super::shape::{Part, Shape};

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

#[cfg(test)]
mod tests;
