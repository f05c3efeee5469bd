//! How one event is taken out of a stream.

use std::{array, iter::Flatten, mem};

use bytes::{Bytes, BytesMut};

use super::{
    super::pieces::{Piece, Pieces},
    report::Report,
};

/// The longest event that is taken out, in bytes, and the most that is held back. Reports have some hundred bytes.
const MAX_EVENT: usize = 16 * 1024;

/// What comes out of a [`UsageFilter`] for one frame: up to three, none of them empty.
pub type Frames = Flatten<array::IntoIter<Option<Bytes>, 3>>;

/// Takes the event out of an `OpenAI` chat stream that only reports usage, for a client that has not asked for it.
///
/// That is the first event whose data is an object with empty `choices` and a `usage` that is an object, without an
/// error and not over 16 KiB (API reference, `stream_options.include_usage`). All its lines go, and a byte order mark
/// before it. Every other byte passes as it is, a `"usage": null` in other events too, and after that one event
/// everything does.
///
/// A frame in which no event begins that goes on in the next passes as the same [`Bytes`]; nothing is copied and nothing
/// allocated. What has come of an unfinished event is held back while the event can still be that report, which for a
/// chunk with content is over where its `choices` begin, and is copied for it; so no more than 16 KiB are held.
#[derive(Debug, Clone)]
pub struct UsageFilter {
    pieces: Pieces,
    /// What the event says, as far as it was read.
    report: Report,
    state: State,
    /// What has come of the event, and has not passed.
    held: BytesMut,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// The event can be the report.
    Open,
    /// The event is another.
    Other,
    /// The report has been taken out. A `\n` that comes next belongs to it.
    TakenUpToReturn,
    /// All of the report has been taken out.
    Taken,
}

impl UsageFilter {
    /// A stream that has not begun.
    #[must_use]
    pub fn new() -> Self {
        Self { pieces: Pieces::new(), report: Report::new(), state: State::Open, held: BytesMut::new() }
    }

    /// Takes a frame of the stream, and returns what may pass now, in its order.
    pub fn pass(&mut self, frame: Bytes) -> Frames {
        let frame = match self.state {
            State::Taken => frame,
            State::TakenUpToReturn => self.after_return(frame),
            State::Open | State::Other => return self.look(frame),
        };
        frames(Bytes::new(), frame, Bytes::new())
    }

    /// What is still held at the end of the stream, of an event that has not ended. It has to pass before trailers do.
    #[must_use]
    pub fn finish(&mut self) -> Option<Bytes> {
        Some(self.release()).filter(|held| !held.is_empty())
    }

    fn look(&mut self, frame: Bytes) -> Frames {
        let mut rest = &*frame;
        // What of a frame is left begins there.
        let at = |rest: &[u8]| frame.len() - rest.len();
        let mut released = Bytes::new();
        if self.held.is_empty() {
            // The end of an event before.
            self.pieces.skip_line_end(&mut rest);
        }
        let mut start = at(rest);
        while let Some(piece) = self.pieces.next(&mut rest) {
            match piece {
                Piece::Data(data) if self.state == State::Open => {
                    if !self.report.pass_report(data) {
                        self.state = State::Other;
                    }
                }
                Piece::Data(_) => {}
                Piece::End { is_error } => {
                    let is_short = self.held.len() + at(rest) - start <= MAX_EVENT;
                    if self.state == State::Open && is_short && !is_error && self.report.only_reports() {
                        self.held = BytesMut::new();
                        self.pieces.skip_line_end(&mut rest);
                        self.state = if self.pieces.is_after_return() { State::TakenUpToReturn } else { State::Taken };
                        return frames(released, frame.slice(..start), frame.slice(at(rest)..));
                    }
                    if !self.held.is_empty() {
                        released = self.release();
                    }
                    self.pieces.skip_line_end(&mut rest);
                    start = at(rest);
                    self.report.clear();
                    self.state = State::Open;
                }
            }
        }
        let unfinished = frame.len() - start;
        if self.state == State::Open && self.held.len() + unfinished > MAX_EVENT {
            self.state = State::Other;
        }
        if self.state == State::Other && !self.held.is_empty() {
            released = self.release();
        }
        if self.state == State::Other || unfinished == 0 {
            return frames(released, frame, Bytes::new());
        }
        self.held.extend_from_slice(&frame[start..]);
        frames(released, frame.slice(..start), Bytes::new())
    }

    fn after_return(&mut self, mut frame: Bytes) -> Bytes {
        if let Some(first) = frame.first() {
            self.state = State::Taken;
            if *first == b'\n' {
                return frame.split_off(1);
            }
        }
        frame
    }

    fn release(&mut self) -> Bytes {
        mem::take(&mut self.held).freeze()
    }
}

impl Default for UsageFilter {
    fn default() -> Self {
        Self::new()
    }
}

fn frames(held: Bytes, before: Bytes, after: Bytes) -> Frames {
    [held, before, after].map(|frame| Some(frame).filter(|frame| !frame.is_empty())).into_iter().flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::Value;

    use super::{
        super::super::json::tests::{cuts, frames},
        *,
    };

    const REPORT: &str =
        "data: {\"id\":\"c\",\"choices\":[],\"usage\":{\"prompt_tokens\":9,\"completion_tokens\":1}}\n\n";
    const CHUNK: &str = "data: {\"id\":\"c\",\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":null}\n\n";
    const DONE: &str = "data: [DONE]\n\n";

    fn filtered<'a>(frames: impl IntoIterator<Item = &'a [u8]>) -> Vec<u8> {
        let mut filter = UsageFilter::new();
        let mut passed = Vec::new();
        for frame in frames {
            let before = passed.len();
            for frame in filter.pass(Bytes::copy_from_slice(frame)) {
                assert!(!frame.is_empty());
                passed.extend_from_slice(&frame);
            }
            assert!(filter.held.len() <= MAX_EVENT && passed.len() - before <= frame.len() + MAX_EVENT);
        }
        passed.extend(filter.finish().unwrap_or_default());
        assert_eq!(filter.finish(), None);
        passed
    }

    fn of(stream: &str) -> String {
        let whole = filtered([stream.as_bytes()]);
        assert_eq!(filtered(stream.as_bytes().chunks(1)), whole, "byte by byte: {stream:?}");
        String::from_utf8(whole).unwrap()
    }

    /// How many bytes are held after these frames.
    fn held(frames: &[&str]) -> usize {
        let mut filter = UsageFilter::new();
        for frame in frames {
            filter.pass(Bytes::copy_from_slice(frame.as_bytes())).for_each(drop);
        }
        filter.held.len()
    }

    #[test]
    fn the_report_is_taken_out_and_nothing_else() {
        assert_eq!(of(&[CHUNK, CHUNK, REPORT, DONE].concat()), [CHUNK, CHUNK, DONE].concat());
        assert_eq!(of(REPORT), "");
        assert_eq!(of(&[CHUNK, DONE, ": ping\n\n\n", CHUNK].concat()), [CHUNK, DONE, ": ping\n\n\n", CHUNK].concat());
        assert_eq!(of(&[CHUNK, REPORT, REPORT, DONE].concat()), [CHUNK, REPORT, DONE].concat(), "one");
        assert_eq!(of(""), "");
    }

    #[test]
    fn all_line_ends_end_the_report() {
        for end in ["\r", "\r\n"] {
            let stream = |events: &[&str]| events.concat().replace('\n', end);
            assert_eq!(of(&stream(&[CHUNK, REPORT, DONE])), stream(&[CHUNK, DONE]), "{end:?}");
        }
        let lines = "id: 7\ndata:{\"choices\":\r\ndata: []\rdata: , \"usage\": {}}\nretry: 1\r\n\r\n";
        assert_eq!(of(&[CHUNK, lines, DONE].concat()), [CHUNK, DONE].concat());
        assert_eq!(of(&["\u{FEFF}", REPORT, DONE].concat()), DONE);
        assert_eq!(of(&["\u{FEFF}", CHUNK, REPORT].concat()), ["\u{FEFF}", CHUNK].concat());
    }

    #[test]
    fn other_events_are_left_alone() {
        let long = "x".repeat(MAX_EVENT);
        for data in [
            r#"{"choices":[],"usage":null}"#,
            r#"{"choices":[],"usage":5}"#,
            r#"{"choices":[],"prompt_filter_results":[]}"#,
            r#"{"choices":[{}],"usage":{}}"#,
            r#"{"choices":null,"usage":{}}"#,
            r#"{"choices":{},"usage":{}}"#,
            r#"{"usage":{}}"#,
            r#"{"choices":[],"usage":{},"error":{}}"#,
            r#"{"choices":[],"usage":{}}}"#,
            r#"{"choices":[],"usage":{}"#,
            r#"[{"choices":[],"usage":{}}]"#,
            r#"{"data":{"choices":[],"usage":{}}}"#,
            r#"{"choices":[],"choices":[1],"choices":[],"usage":{}}"#,
            r#"{"choices":[],"usage":null,"usage":{}}"#,
            &format!(r#"{{"x":"{long}","choices":[],"usage":{{}}}}"#),
        ] {
            let stream = format!("data: {data}\n\n{DONE}");
            assert_eq!(of(&stream), stream, "{data}");
        }
        let error = ["event: error\n", REPORT, DONE].concat();
        assert_eq!(of(&error), error);
        let unfinished = REPORT.trim_end();
        assert_eq!(of(unfinished), unfinished);
    }

    #[test]
    fn the_longest_report_does_not_depend_on_frames() {
        let longest = |more: usize| {
            let (head, tail) = ("data: {\"choices\":[],\"usage\":{},\"x\":\"", "\"}\r\n\r\n");
            // The last `\n` is not counted: whether it comes is not known when the event has ended.
            let text = "x".repeat(MAX_EVENT + 1 - head.len() - tail.len() + more);
            [head, &text, tail].concat()
        };
        assert_eq!(of(&[&longest(0), DONE].concat()), DONE);
        assert_eq!(of(&[&longest(1), DONE].concat()), [&longest(1), DONE].concat());
    }

    #[test]
    fn whole_events_pass_as_the_same_bytes() {
        let mut filter = UsageFilter::new();
        for frame in [CHUNK, ": ping\n\n", CHUNK, REPORT, DONE, CHUNK] {
            let frame = Bytes::from_static(frame.as_bytes());
            let passed: Vec<_> = filter.pass(frame.clone()).collect();
            if frame == REPORT {
                assert!(passed.is_empty());
            } else {
                assert_eq!((passed.len(), passed[0].as_ptr(), passed[0].len()), (1, frame.as_ptr(), frame.len()));
            }
            assert_eq!(filter.held.capacity(), 0);
        }
    }

    #[test]
    fn nothing_is_held_that_cannot_be_the_report() {
        for unfinished in [
            "data: {\"id\":\"c\",\"choices\":[{",
            "data: {\"id\":\"c\",\"choices\":[{\"delta\":{\"content\":\"a\"}}],\"usage\":null}\n",
            "data: {\"choices\":[],\"usage\":null",
            "data: {\"choices\":null",
            "data: [",
            "data: token",
        ] {
            assert_eq!(held(&[CHUNK, unfinished]), 0, "{unfinished}");
            let (start, rest) = unfinished.split_at(4);
            assert_eq!(held(&[start, rest]), 0, "{unfinished}");
        }
        assert_eq!(held(&["data: {\"id\":"]), 12);
        assert_eq!(held(&[CHUNK, "data: {\"id\":", "\"c\",\"choices\":["]), 27);
        assert_eq!(held(&[&format!("data: {{\"id\":\"{}", "x".repeat(MAX_EVENT))]), 0, "too long");
        assert_eq!(held(&["data: {\"id\":\"", &"x".repeat(MAX_EVENT)]), 0, "too long");
    }

    #[test]
    fn what_was_held_passes_before_what_comes() {
        let mut filter = UsageFilter::new();
        let mut pass =
            |frame: &'static str| -> Vec<Bytes> { filter.pass(Bytes::from_static(frame.as_bytes())).collect() };
        assert_eq!(pass("data: a\n\ndata: {\"id\""), ["data: a\n\n"]);
        assert_eq!(pass(":1,\"choices\":[{}]}\n\ndata: {"), ["data: {\"id\"", ":1,\"choices\":[{}]}\n\n"]);
        assert_eq!(
            pass("}\n\ndata: b\n\ndata: {\"choices\":[],\"usage\":{}}\n\ndata: c\n\n"),
            ["data: {", "}\n\ndata: b\n\n", "data: c\n\n"]
        );
    }

    /// Where the first report stands, found with all of the stream at hand.
    fn report(stream: &[u8]) -> Option<(usize, usize)> {
        let mut at = 0;
        let (mut start, mut data, mut is_error) = (0, Vec::new(), false);
        let mut is_first = true;
        while at < stream.len() {
            let len = stream[at..].iter().position(|byte| matches!(byte, b'\r' | b'\n'))?;
            let mut line = &stream[at..at + len];
            at += len;
            let counted = at + 1 - start;
            at += if stream[at..].starts_with(b"\r\n") { 2 } else { 1 };
            if mem::take(&mut is_first) {
                line = line.strip_prefix("\u{FEFF}".as_bytes()).unwrap_or(line);
            }
            if line.is_empty() {
                let value = serde_json::from_slice(&data).unwrap_or(Value::Null);
                let is_report = value["choices"] == Value::Array(Vec::new())
                    && value["usage"].is_object()
                    && value["error"].is_null();
                if is_report && !is_error && counted <= MAX_EVENT {
                    return Some((start, at));
                }
                (start, data, is_error) = (at, Vec::new(), false);
            } else if let Some(value) = line.strip_prefix(b"data:") {
                data.extend_from_slice(value);
                data.push(b'\n');
            } else if let Some(kind) = line.strip_prefix(b"event:") {
                is_error = kind.strip_prefix(b" ").unwrap_or(kind) == b"error";
            }
        }
        None
    }

    const PIECES: &[&str] = &[
        "\n",
        "\n",
        "\n\n",
        "\r\n",
        "\r\n\r\n",
        "\r",
        "\r\r",
        "data: ",
        "data:",
        "data",
        "event: error\n",
        "event: x\n",
        ": ping",
        "id: 1\n",
        "\u{FEFF}",
        REPORT,
        REPORT,
        CHUNK,
        DONE,
        "data: {\"choices\":[]\ndata: ,\"usage\":{}}",
        "data:{\"choices\" : [ ] , \"usage\" : { } , \"error\" : null }",
        "data: {\"choices\":[],\"usage\":null}",
        "{\"id\":1,",
        "\"choices\":[]",
        "\"usage\":{}",
        "{",
        "}",
        ",",
    ];

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]
        #[test]
        fn the_output_is_the_input_without_the_report(
            pieces in prop::collection::vec(prop::sample::select(PIECES), 0..16),
            cuts in cuts(),
        ) {
            let stream = pieces.concat();
            let stream = stream.as_bytes();
            let (start, end) = report(stream).unwrap_or_default();
            let expected = [&stream[..start], &stream[end..]].concat();
            prop_assert_eq!(filtered(frames(stream, &cuts)), expected, "{}", stream.escape_ascii());
        }

        #[test]
        fn nothing_panics(frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..40), 0..8)) {
            let passed = filtered(frames.iter().map(Vec::as_slice));
            prop_assert_eq!(passed, frames.concat());
        }
    }
}
