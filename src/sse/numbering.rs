//! Ids for the events of a stream that has none.

use std::mem;

use bytes::{Bytes, BytesMut};

use super::{
    Boundary,
    pieces::{Piece, Pieces},
};

/// Counts the events of a stream while they pass, in whatever frames they come: those that have data, for others are
/// none to their receiver (§9.2.6).
///
/// It ends with the first `id` of the stream's own: who sends some knows what to do with them, and two who count are one
/// too many.
#[derive(Debug, Clone)]
pub struct Numbering {
    pieces: Pieces,
    boundary: Boundary,
    has_data: bool,
    count: u64,
}

impl Numbering {
    /// A stream that has not begun.
    #[must_use]
    pub const fn new() -> Self {
        Self { pieces: Pieces::new(), boundary: Boundary::new(), has_data: false, count: 0 }
    }

    /// The same stream from a place [between two events](Self::is_between), after so many of them.
    #[must_use]
    pub const fn after(count: u64) -> Self {
        Self { pieces: Pieces::within(), boundary: Boundary::new(), has_data: false, count }
    }

    /// How many events have ended, before the first id of the stream's own.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Whether the stream has ids of its own.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.pieces.has_id()
    }

    /// Whether the stream stands between two events now.
    #[must_use]
    pub const fn is_between(&self) -> bool {
        self.boundary.here()
    }

    /// Reads on until one more event is counted, and takes what it has read off `bytes`; `None` when all is read.
    ///
    /// What it has read last is the byte that makes the event's last line a blank one: before it is room for one more
    /// line, which should end as those around it do, with what is returned.
    pub fn next(&mut self, bytes: &mut &[u8]) -> Option<&'static [u8]> {
        loop {
            let before = *bytes;
            let has_ended = loop {
                match self.pieces.next(bytes) {
                    Some(Piece::Data(_)) => self.has_data = true,
                    Some(Piece::End { .. }) => break true,
                    None => break false,
                }
            };
            let (read, _) = before.split_at(before.len() - bytes.len());
            let Some((blank, lines)) = read.split_last().filter(|_| has_ended) else {
                self.boundary.pass(read);
                return None;
            };
            self.boundary.pass(lines);
            let line_end = self.boundary.line_end();
            self.boundary.pass(&[*blank]);
            if mem::take(&mut self.has_data) && !self.is_over() {
                self.count += 1;
                return Some(line_end);
            }
        }
    }

    /// Counts what has ended in `bytes`.
    pub fn pass(&mut self, mut bytes: &[u8]) {
        while !self.is_over() && self.next(&mut bytes).is_some() {}
    }

    /// Passes over a `\n` that belongs to the line before.
    fn skip_line_end(&mut self, bytes: &mut &[u8]) {
        let before = *bytes;
        self.pieces.skip_line_end(bytes);
        let (read, _) = before.split_at(before.len() - bytes.len());
        self.boundary.pass(read);
    }
}

impl Default for Numbering {
    fn default() -> Self {
        Self::new()
    }
}

/// Gives each event of a stream an `id`, `NAME.1` and so on, until one comes that has its own: from there on everything
/// passes as it is.
///
/// The line stands last in its event, where it is known that the event has data and no id. So nothing is held back, a
/// stream with ids of its own passes untouched from its first byte, and so do comments and whatever else is no event.
/// The ids depend on the bytes of the stream and not on its frames: who reads it again gives it the same.
///
/// ```
/// use bytes::Bytes;
/// use sidegate::sse::Labels;
///
/// let mut labels = Labels::new("a");
/// assert_eq!(labels.pass(Bytes::from(": hello\n\ndata: o")), ": hello\n\ndata: o");
/// assert_eq!(labels.pass(Bytes::from("ne\n\ndata: two\n")), "ne\nid: a.1\n\ndata: two\n");
/// assert_eq!(labels.pass(Bytes::from("\n")), "id: a.2\n\n");
/// assert_eq!(labels.pass(Bytes::from("id: 7\ndata: three\n\n")), "id: 7\ndata: three\n\n");
/// ```
#[derive(Debug, Clone)]
pub struct Labels {
    name: Box<str>,
    numbering: Numbering,
    /// Events up to this one are left out.
    after: u64,
    /// What is left out has passed.
    begun: bool,
}

impl Labels {
    /// For a stream that has not begun.
    #[must_use]
    pub fn new(name: impl Into<Box<str>>) -> Self {
        Self { name: name.into(), numbering: Numbering::new(), after: 0, begun: true }
    }

    /// For a stream that stands where `numbering` does: what is left of the events up to the one with the number `after`
    /// is left out.
    #[must_use]
    pub fn after(name: impl Into<Box<str>>, numbering: Numbering, after: u64) -> Self {
        Self { name: name.into(), numbering, after, begun: false }
    }

    /// Whether the stream has ids of its own.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.numbering.is_over()
    }

    /// Whether an event has been given an id.
    #[must_use]
    pub const fn has_begun(&self) -> bool {
        self.numbering.count() > 0
    }

    /// Takes a frame of the stream, and returns what passes of it now, with ids: nothing of what is left out. A frame in
    /// which no event ends is the same [`Bytes`].
    pub fn pass(&mut self, frame: Bytes) -> Bytes {
        if self.is_over() && self.begun {
            return frame;
        }
        let mut rest = &*frame;
        let at = |rest: &[u8]| frame.len() - rest.len();
        if !self.begun {
            while self.numbering.count() < self.after && self.numbering.next(&mut rest).is_some() {}
            self.numbering.skip_line_end(&mut rest);
            if rest.is_empty() {
                return Bytes::new();
            }
            self.begun = true;
        }
        let mut from = at(rest);
        let mut labelled = BytesMut::new();
        while let Some(line_end) = self.numbering.next(&mut rest) {
            let end = at(rest) - 1;
            if labelled.is_empty() {
                labelled.reserve(frame.len() - from + self.name.len() + 32);
            }
            labelled.extend_from_slice(&frame[from..end]);
            labelled.extend_from_slice(b"id: ");
            labelled.extend_from_slice(self.name.as_bytes());
            labelled.extend_from_slice(b".");
            labelled.extend_from_slice(itoa::Buffer::new().format(self.numbering.count()).as_bytes());
            labelled.extend_from_slice(line_end);
            from = end;
        }
        if labelled.is_empty() {
            return frame.slice(from..);
        }
        labelled.extend_from_slice(&frame[from..]);
        labelled.freeze()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::BYTE_ORDER_MARK, *};

    fn labelled<'a>(labels: &mut Labels, frames: impl IntoIterator<Item = &'a [u8]>) -> String {
        let passed = frames.into_iter().map(|frame| labels.pass(Bytes::copy_from_slice(frame)));
        String::from_utf8(passed.collect::<Vec<_>>().concat()).unwrap()
    }

    fn of(stream: &str) -> String {
        let whole = labelled(&mut Labels::new("x"), [stream.as_bytes()]);
        assert_eq!(labelled(&mut Labels::new("x"), stream.as_bytes().chunks(1)), whole, "byte by byte: {stream:?}");
        whole
    }

    #[test]
    fn an_id_is_the_last_line_of_its_event_and_ends_as_the_others_do() {
        for (stream, expected) in [
            ("data: a\n\ndata: b\n\n", "data: a\nid: x.1\n\ndata: b\nid: x.2\n\n"),
            ("data: a\r\n\r\ndata\r\n\r\n", "data: a\r\nid: x.1\r\n\r\ndata\r\nid: x.2\r\n\r\n"),
            ("data: a\r\rdata: b\r\r", "data: a\rid: x.1\r\rdata: b\rid: x.2\r\r"),
            ("data: a\n\r\ndata: b\r\n\n", "data: a\nid: x.1\n\r\ndata: b\r\nid: x.2\r\n\n"),
            ("\u{FEFF}event: e\ndata: a\ndata: b\n\n", "\u{FEFF}event: e\ndata: a\ndata: b\nid: x.1\n\n"),
        ] {
            assert_eq!(of(stream), expected);
        }
    }

    #[test]
    fn what_is_no_event_has_no_id() {
        for stream in
            ["", "\n", ": ping\n\n", "retry: 10\n\n", "event: e\n\n", "data: unfinished", "data: unfinished\n"]
        {
            assert_eq!(of(stream), stream);
        }
        assert_eq!(of(": a\ndata: a\n: b\n\n"), ": a\ndata: a\n: b\nid: x.1\n\n");
        assert_eq!(of("\n\ndata: a\n\n\n:\n\ndata: b\n\n"), "\n\ndata: a\nid: x.1\n\n\n:\n\ndata: b\nid: x.2\n\n");
    }

    #[test]
    fn a_stream_with_ids_of_its_own_is_left_alone() {
        for stream in ["id: 1\ndata: a\n\ndata: b\n\n", "data: a\nid\n\ndata: b\n\n", "id:\n\ndata: a\n\n"] {
            assert_eq!(of(stream), stream);
        }
        assert_eq!(of("data: a\n\ndata: b\nid: 1\n\ndata: c\n\n"), "data: a\nid: x.1\n\ndata: b\nid: 1\n\ndata: c\n\n");
        assert_eq!(of("idx: 1\ndata: id: 1\n\n"), "idx: 1\ndata: id: 1\nid: x.1\n\n", "these are none");
    }

    #[test]
    fn what_a_client_has_is_left_out() {
        for end in ["\n", "\r", "\r\n"] {
            let stream = format!("data: 1{end}{end}: c{end}{end}data: 2{end}{end}data: 3{end}{end}");
            let rest = |after| labelled(&mut Labels::after("x", Numbering::new(), after), [stream.as_bytes()]);
            assert_eq!(rest(0), labelled(&mut Labels::new("x"), [stream.as_bytes()]));
            assert_eq!(rest(1), format!(": c{end}{end}data: 2{end}id: x.2{end}{end}data: 3{end}id: x.3{end}{end}"));
            assert_eq!(rest(2), format!("data: 3{end}id: x.3{end}{end}"));
            assert_eq!(rest(3), "");
        }
    }

    #[test]
    fn a_frame_without_an_end_is_not_copied() {
        let frame = Bytes::from("data: a".repeat(100));
        assert_eq!(Labels::new("x").pass(frame.clone()).as_ptr(), frame.as_ptr());
    }

    /// What a client makes of a stream (§9.2.6): of each event its data and the last id at that time.
    fn received(stream: &[u8]) -> Vec<(String, String)> {
        let text = String::from_utf8(stream.to_vec()).unwrap();
        let text = text.strip_prefix('\u{FEFF}').unwrap_or(&text).replace("\r\n", "\n").replace('\r', "\n");
        let (mut events, mut data, mut id) = (Vec::new(), None::<String>, String::new());
        for line in text.split_inclusive('\n').filter_map(|line| line.strip_suffix('\n')) {
            let (name, value) = line.split_once(':').unwrap_or((line, ""));
            let value = value.strip_prefix(' ').unwrap_or(value);
            match name {
                "" if line.is_empty() => events.extend(data.take().map(|data| (data, id.clone()))),
                "data" => data.get_or_insert_default().extend([value, "\n"]),
                "id" => value.clone_into(&mut id),
                _ => {}
            }
        }
        events
    }

    fn streams(ids: bool) -> impl Strategy<Value = Vec<u8>> {
        let mut pieces =
            vec!["data", "data: a", "event", ": ", ":", "x", "\n", "\r", "\r\n", "\n\n", "\r\n\r\n", "\u{FEFF}"];
        if ids {
            pieces.extend(["id", "id: 1"]);
        }
        prop::collection::vec(prop::sample::select(pieces), 0..40).prop_map(|pieces| pieces.concat().into_bytes())
    }

    fn cut<'a>(stream: &'a [u8], cuts: &[usize]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (stream.len() + 1)).collect();
        cuts.extend([0, stream.len()]);
        cuts.sort_unstable();
        cuts.windows(2).map(|cut| &stream[cut[0]..cut[1]]).collect()
    }

    fn without_ids(stream: &[u8]) -> Vec<u8> {
        let mut rest = stream;
        let mut without = Vec::new();
        while let Some(at) = rest.windows(6).position(|bytes| bytes == b"id: ~.") {
            without.extend_from_slice(&rest[..at]);
            let digits = rest[at + 6..].iter().take_while(|byte| byte.is_ascii_digit()).count();
            // An id of ours ends as the line before it does.
            let end = [&b"\r\n"[..], b"\n", b"\r"].into_iter().find(|end| without.ends_with(end)).unwrap();
            rest = rest[at + 6 + digits..].strip_prefix(end).unwrap();
        }
        without.extend_from_slice(rest);
        without
    }

    proptest! {
        #[test]
        fn without_the_ids_it_is_what_it_was(stream in streams(true), cuts in prop::collection::vec(any::<usize>(), 0..9)) {
            let labelled = labelled(&mut Labels::new("~"), cut(&stream, &cuts));
            prop_assert_eq!(without_ids(labelled.as_bytes()), stream);
        }

        #[test]
        fn a_client_gets_the_same_events_each_with_its_number(
            stream in streams(false),
            cuts in prop::collection::vec(any::<usize>(), 0..9),
        ) {
            let labelled = labelled(&mut Labels::new("~"), cut(&stream, &cuts));
            let expected: Vec<_> = received(&stream)
                .into_iter()
                .enumerate()
                .map(|(n, (data, _))| (data, format!("~.{}", n + 1)))
                .collect();
            prop_assert_eq!(received(labelled.as_bytes()), expected);
        }

        /// Taken up again at any event, from any place before it: what came before and the rest are all.
        #[test]
        fn what_is_left_out_and_what_is_not_are_all(
            stream in streams(false),
            cuts in prop::collection::vec(any::<usize>(), 0..9),
            after in any::<prop::sample::Index>(),
            passed in 0usize..9,
        ) {
            let frames = cut(&stream, &cuts);
            let all = received(labelled(&mut Labels::new("~"), frames.iter().copied()).as_bytes());
            let after = after.index(all.len() + 1);
            let mut numbering = Numbering::new();
            let (gone, kept) = frames.split_at(passed.min(frames.len()));
            for frame in gone {
                numbering.pass(frame);
            }
            let had = numbering.count();
            if had < after as u64 || had == after as u64 && numbering.is_between() {
                let rest = labelled(&mut Labels::after("~", numbering, after as u64), kept.iter().copied());
                // In the middle of a stream a byte order mark is part of a line; to who begins to read there it is none. No
                // server sends one.
                prop_assume!(!rest.as_bytes().starts_with(&BYTE_ORDER_MARK));
                prop_assert_eq!(&received(rest.as_bytes())[..], &all[after..]);
            }
        }
    }
}
