//! What one text of an answer says: the data of an event, a line, or a whole body.

use super::super::{
    bytes::Short,
    json::{Json, Token},
    pieces::MAX_TYPE,
};

/// Why a model has stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
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
pub(super) struct Text {
    pub(super) json: Json,
    /// How the text begins, without white space: as much as tells what marks the end from others.
    head: Short<{ MAX_TYPE + 8 }>,
    /// What leads to where it reads: of each object that is open the last key.
    path: [Name; 5],
    pub(super) says: Says,
}

/// What one text says.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Says {
    pub(super) kind: Kind,
    pub(super) stop: Option<Reason>,
    /// The choice that is read: its index, and why it has ended.
    pub(super) choice: Option<(u64, Option<Reason>)>,
    pub(super) begun: u128,
    pub(super) finished: u128,
    pub(super) has_reasons: bool,
    /// The worst reason of all but Anthropic's.
    pub(super) worst: Option<Reason>,
    /// A tool is called if this is a response.
    pub(super) calls: bool,
    pub(super) is_response: bool,
    pub(super) status: Status,
}

impl Says {
    pub(super) const fn is_response(&self) -> bool {
        use Kind::{Response, ResponseCompleted, ResponseFailed, ResponseIncomplete};
        self.is_response || matches!(self.kind, Response | ResponseCompleted | ResponseFailed | ResponseIncomplete)
    }
}

/// What it is, by the member `type`, or `done` where that is true.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) enum Kind {
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
pub(super) enum Status {
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
    pub(super) fn new() -> Self {
        Self { json: Json::new(), head: Short::new(), path: [Name::Other; 5], says: Says::default() }
    }

    /// Begins the next text.
    pub(super) fn clear(&mut self) {
        self.json.clear();
        self.head.clear();
        self.says = Says::default();
    }

    /// Whether there is nothing but white space.
    pub(super) const fn is_blank(&self) -> bool {
        self.head.first().is_none()
    }

    /// Whether it is this, which is no longer than a [`Mark`].
    pub(super) fn is(&self, mark: &[u8]) -> bool {
        self.head.get().is_some_and(|head| head.trim_ascii_end() == mark)
    }

    pub(super) fn pass(&mut self, mut bytes: &[u8]) {
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
    pub(super) fn end_choice(&mut self) {
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
