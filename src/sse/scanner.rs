//! Which events go by.

use std::mem;

use serde::{
    Deserialize,
    de::{Deserializer, IgnoredAny},
};

use super::BYTE_ORDER_MARK;

/// How much of an event is kept, to tell an error from content. What is longer is content: errors are short.
const MAX_KEPT: usize = 16 * 1024;

/// What an event was, by what its receiver makes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It has data.
    Content,
    /// It has data and says that something went wrong: its type is `error`, or its data is a JSON object with a
    /// member `error` that is not `null`, as OpenAI's and Anthropic's streams and those of their imitators have it.
    Error,
    /// It has no data, and so is none to its receiver (§9.2.6): comments, blank lines, an `id` or a `retry` alone.
    Empty,
}

/// Tells the events of a stream from each other while they pass, in whatever frames they come.
///
/// It follows §9.2.5 and §9.2.6: a leading byte order mark, three line ends, fields in any order, unknown fields, and
/// an unfinished event at the end that is none. Whatever the bytes, it neither fails nor panics. An event that stands
/// whole in one frame is not copied, except for its data, which is kept up to 16 KiB until its end.
#[derive(Debug, Clone)]
pub struct Scanner {
    /// What is still to come of a byte order mark; nothing once that question is over.
    mark: &'static [u8],
    /// The `\n` that may come next belongs to the line before.
    after_return: bool,
    /// What there is of an unfinished line.
    line: Kept,
    /// The event's lines of data so far.
    data: Kept,
    has_data: bool,
    is_error: bool,
}

impl Scanner {
    /// A stream that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self {
            mark: &BYTE_ORDER_MARK,
            after_return: false,
            line: Kept::default(),
            data: Kept::default(),
            has_data: false,
            is_error: false,
        }
    }

    /// Reads on until an event ends, and takes what it has read off `bytes`; `None` when all is read and no further
    /// event has ended.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<Event> {
        self.skip_mark(bytes);
        while let Some(&first) = bytes.first() {
            if mem::take(&mut self.after_return) && first == b'\n' {
                *bytes = &bytes[1..];
                continue;
            }
            let Some(end) = bytes.iter().position(|byte| matches!(byte, b'\n' | b'\r')) else {
                self.line.extend(bytes);
                *bytes = &[];
                return None;
            };
            let (line, rest) = bytes.split_at(end);
            self.after_return = rest[0] == b'\r';
            *bytes = &rest[1..];
            if self.line.is_empty() {
                if line.is_empty() {
                    return Some(self.dispatch());
                }
                self.field(line, false);
            } else {
                let mut whole = mem::take(&mut self.line);
                whole.extend(line);
                self.field(&whole.bytes, whole.cut);
                whole.clear();
                self.line = whole;
            }
        }
        None
    }

    /// Passes over a byte order mark, which may come in pieces.
    fn skip_mark(&mut self, bytes: &mut &[u8]) {
        while let ([expected, left @ ..], Some((first, rest))) = (self.mark, bytes.split_first()) {
            if first == expected {
                (self.mark, *bytes) = (left, rest);
            } else {
                // What looked like one begins the first line.
                self.line.extend(&BYTE_ORDER_MARK[..BYTE_ORDER_MARK.len() - self.mark.len()]);
                self.mark = &[];
            }
        }
    }

    /// Takes a line that is not blank. Of one that is `cut`, the end is missing.
    fn field(&mut self, line: &[u8], cut: bool) {
        let (name, value) = match line.iter().position(|&byte| byte == b':') {
            Some(colon) => (&line[..colon], line[colon + 1..].strip_prefix(b" ").unwrap_or(&line[colon + 1..])),
            None => (line, &[][..]),
        };
        match name {
            b"data" => {
                if mem::replace(&mut self.has_data, true) {
                    self.data.extend(b"\n");
                }
                self.data.extend(value);
                self.data.cut |= cut;
            }
            b"event" => self.is_error = value == b"error",
            _ => {}
        }
    }

    /// Ends the event.
    fn dispatch(&mut self) -> Event {
        let event = match (self.has_data, self.is_error) {
            (false, _) => Event::Empty,
            (true, true) => Event::Error,
            (true, false) if !self.data.cut && says_error(&self.data.bytes) => Event::Error,
            (true, false) => Event::Content,
        };
        self.data.clear();
        (self.has_data, self.is_error) = (false, false);
        event
    }
}

impl Default for Scanner {
    fn default() -> Self {
        Self::new()
    }
}

/// Bytes up to a bound.
#[derive(Debug, Clone, Default)]
struct Kept {
    bytes: Vec<u8>,
    /// There were more.
    cut: bool,
}

impl Kept {
    fn extend(&mut self, bytes: &[u8]) {
        let room = MAX_KEPT - self.bytes.len();
        self.cut |= bytes.len() > room;
        self.bytes.extend_from_slice(&bytes[..bytes.len().min(room)]);
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn clear(&mut self) {
        self.bytes.clear();
        self.cut = false;
    }
}

/// Whether data is a JSON object with a member `error` that says something.
fn says_error(data: &[u8]) -> bool {
    #[derive(Deserialize)]
    struct Data {
        #[serde(default, deserialize_with = "present")]
        error: bool,
    }

    // `null` is what some write where there is no error.
    fn present<'de, D: Deserializer<'de>>(value: D) -> Result<bool, D::Error> {
        Option::<IgnoredAny>::deserialize(value).map(|value| value.is_some())
    }

    // An array would do for a struct, too.
    data.trim_ascii_start().first() == Some(&b'{') && serde_json::from_slice::<Data>(data).is_ok_and(|data| data.error)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::Boundary,
        Event::{Content, Empty, Error},
        *,
    };

    fn events<'a>(frames: impl IntoIterator<Item = &'a [u8]>) -> Vec<Event> {
        let mut scanner = Scanner::new();
        let mut found = Vec::new();
        for mut frame in frames {
            while let Some(event) = scanner.next(&mut frame) {
                found.push(event);
            }
            assert!(frame.is_empty());
        }
        found
    }

    fn of(stream: &str) -> Vec<Event> {
        let whole = events([stream.as_bytes()]);
        assert_eq!(events(stream.as_bytes().chunks(1)), whole, "byte by byte: {stream:?}");
        whole
    }

    #[test]
    fn all_three_line_ends_end_lines() {
        for stream in ["data: a\n\ndata: b\n\n", "data: a\r\rdata: b\r\r", "data: a\r\n\r\ndata: b\r\n\r\n"] {
            assert_eq!(of(stream), [Content, Content], "{stream:?}");
        }
        assert_eq!(of("data: a\r\n\ndata: b\n\r\n"), [Content, Content]);
    }

    #[test]
    fn an_event_without_data_is_none() {
        assert_eq!(of(": ping\n\n"), [Empty]);
        assert_eq!(of("event: error\n\nid: 1\nretry: 10\n\nunknown: x\n\ndatas: x\n\n"), [Empty; 4]);
        assert_eq!(of("data\n\ndata:\n\n"), [Content, Content], "empty data is data");
    }

    #[test]
    fn what_has_not_ended_is_none() {
        assert_eq!(of("data: a"), []);
        assert_eq!(of("data: a\n"), []);
        assert_eq!(of(""), []);
    }

    #[test]
    fn an_error_is_told_by_its_type() {
        assert_eq!(of("event: error\ndata: a\n\ndata: b\n\n"), [Error, Content], "for one event only");
        assert_eq!(of("data: a\nevent:error\n\n"), [Error]);
        assert_eq!(of("event: error\nevent: token\ndata: a\n\nevent:  error\ndata: a\n\n"), [Content, Content]);
    }

    #[test]
    fn an_error_is_told_by_its_data() {
        let data = |data: &str| of(&format!("data: {data}\n\n"));
        for error in [r#"{"error": {"message": "m"}}"#, r#" {"id": [1], "error": "m", "x": {}}"#, r#"{"error":false}"#]
        {
            assert_eq!(data(error), [Error], "{error}");
        }
        let content =
            [r#"{"error": null}"#, r#"{"a": {"error": 1}}"#, r#"["error"]"#, "[1]", "[DONE]", r#"{"error": "#, "error"];
        for content in content {
            assert_eq!(data(content), [Content], "{content}");
        }
        assert_eq!(of("data: {\ndata: \"error\": 1\ndata: }\n\n"), [Error], "lines are joined");
    }

    #[test]
    fn a_leading_byte_order_mark_is_passed_over() {
        assert_eq!(of("\u{FEFF}data: a\n\n"), [Content]);
        assert_eq!(of("\u{FEFF}\u{FEFF}data: a\n\n"), [Empty], "one of them");
        assert_eq!(of("\u{FEFF}\n"), [Empty]);
        assert_eq!(of("\u{FF10}: a\ndata: b\n\n"), [Content], "what begins like one is none");
    }

    #[test]
    fn a_long_event_is_content() {
        let long = "x".repeat(MAX_KEPT);
        assert_eq!(
            of(&format!("data: {{\"a\": \"{long}\", \"error\": 1}}\n\ndata: {{\"error\": 1}}\n\n")),
            [Content, Error]
        );
        let mut scanner = Scanner::new();
        for _ in 0..1000 {
            assert_eq!(scanner.next(&mut format!("data: {long}").as_bytes()), None);
        }
        assert!(scanner.line.bytes.len() + scanner.data.bytes.len() <= 2 * MAX_KEPT);
    }

    /// Streams in which everything that matters is frequent, as lines of bytes.
    fn streams() -> impl Strategy<Value = Vec<u8>> {
        let pieces: [&[u8]; 11] = [
            b"data",
            b"event",
            b": ",
            b":",
            b"error",
            b"{\"error\":1}",
            b"\n",
            b"\r",
            b"\r\n",
            &BYTE_ORDER_MARK,
            b"\xFF\0",
        ];
        let piece = prop::sample::select(pieces.to_vec());
        prop::collection::vec(piece, 0..24).prop_map(|pieces| pieces.concat())
    }

    proptest! {
        #[test]
        fn frames_do_not_matter(stream in streams(), cuts in prop::collection::vec(0usize..100, 0..8)) {
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(stream.len())).collect();
            cuts.extend([0, stream.len()]);
            cuts.sort_unstable();
            let frames = cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]);
            prop_assert_eq!(events(frames), events([&*stream]));
        }

        #[test]
        fn nothing_panics(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
            events(frames.iter().map(Vec::as_slice));
        }

        /// What is added at a boundary changes no event of the stream, and is an event of its own.
        #[test]
        fn an_event_at_a_boundary_breaks_into_nothing(
            mut before in streams(),
            blank in prop::sample::select(vec!["\n\n", "\r\r", "\r\n\r\n", "\r\n\r"]),
            after in streams(),
        ) {
            before.extend_from_slice(blank.as_bytes());
            let mut boundary = Boundary::new();
            boundary.pass(&before);
            prop_assert!(boundary.here());
            let has_data = |events: Vec<Event>| -> Vec<Event> {
                events.into_iter().filter(|&event| event != Empty).collect()
            };
            let (before, after) = (&*before, &*after);
            let plain = has_data(events([before, after]));
            prop_assert_eq!(&has_data(events([before, b":\n\n", after])), &plain);
            let with_error = has_data(events([before, b"event: error\ndata: x\n\n", after]));
            prop_assert_eq!(with_error.len(), plain.len() + 1);
        }
    }
}
