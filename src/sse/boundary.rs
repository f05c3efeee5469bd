//! Whether a stream stands between two events.

/// Follows a stream at the cost of a glance at each frame's last bytes, and knows whether what came last is a blank
/// line: the only place where a comment or an event of one's own breaks into nothing.
///
/// A stream's beginning is such a place too, with one snare: a [byte order mark](super::BYTE_ORDER_MARK) that comes
/// later is no longer the stream's first, and no longer ignored.
///
/// Line ends are `\n`, `\r\n` and `\r` (§9.2.5). After `\r` it is not known yet whether a `\n` belongs to it. That
/// does not matter here: what comes between the two turns the `\n` into another blank line, which ends nothing.
#[derive(Debug, Clone, Default)]
pub struct Boundary {
    /// The last three bytes, or fewer where there were not as many.
    last: [u8; 3],
    len: usize,
}

impl Boundary {
    /// A stream that has not begun.
    #[must_use]
    pub const fn new() -> Self {
        Self { last: [0; 3], len: 0 }
    }

    /// Notes that these bytes of the stream have passed.
    pub fn pass(&mut self, bytes: &[u8]) {
        if let Some(last) = bytes.last_chunk() {
            (self.last, self.len) = (*last, 3);
            return;
        }
        for &byte in bytes {
            if self.len == self.last.len() {
                self.last.rotate_left(1);
                self.len -= 1;
            }
            self.last[self.len] = byte;
            self.len += 1;
        }
    }

    /// Notes that the stream's data is over: where trailers have passed, nothing may be said.
    pub const fn close(&mut self) {
        (self.last, self.len) = ([0; 3], 1);
    }

    /// Whether nothing has passed.
    #[must_use]
    pub const fn at_start(&self) -> bool {
        self.len == 0
    }

    /// The line end that came last, in full, where a line has just ended: what one more line has to end with, to look like
    /// those around it.
    #[must_use]
    pub const fn line_end(&self) -> &'static [u8] {
        match self.last.split_at(self.len).0 {
            [.., b'\r', b'\n'] => b"\r\n",
            [.., b'\r'] => b"\r",
            _ => b"\n",
        }
    }

    /// Whether the stream stands between two events now.
    #[must_use]
    pub const fn here(&self) -> bool {
        const fn ends_line(byte: u8) -> bool {
            matches!(byte, b'\n' | b'\r')
        }
        match self.last.split_at(self.len).0 {
            // Nothing, or a blank line after nothing.
            [] | [b'\n' | b'\r'] | [b'\r', b'\n'] => true,
            // A line's end after a line's end, of which `\r\n` is one.
            [before, b'\r', b'\n'] => ends_line(*before),
            [.., before, last] => ends_line(*before) && ends_line(*last),
            [_] => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn after(bytes: &[u8]) -> bool {
        let mut boundary = Boundary::new();
        boundary.pass(bytes);
        boundary.here()
    }

    #[test]
    fn a_blank_line_is_a_boundary_whatever_ends_it() {
        for end in ["\n\n", "\r\r", "\r\n\r\n", "\n\r", "\n\r\n", "\r\n\n", "\r\n\r", "\r\r\n"] {
            assert!(after(format!("data: a{end}").as_bytes()), "{end:?}");
        }
        for within in ["data: a", "data: a\n", "data: a\r", "data: a\r\n", ":", ":\n", "a\n\nb", "a\n\nb\r\n"] {
            assert!(!after(within.as_bytes()), "{within:?}");
        }
    }

    #[test]
    fn a_stream_that_has_not_begun_is_between_events() {
        for nothing in ["", "\n", "\r", "\r\n", "\n\n"] {
            assert!(after(nothing.as_bytes()), "{nothing:?}");
        }
    }

    proptest! {
        /// Against the definition: split into lines, the last of them complete and empty.
        #[test]
        fn frames_do_not_matter(frames in prop::collection::vec("[a\r\n]{0,4}", 0..6)) {
            let mut boundary = Boundary::new();
            for frame in &frames {
                boundary.pass(frame.as_bytes());
            }
            let text = frames.concat();
            let lines = text.replace("\r\n", "\n").replace('\r', "\n");
            let expected = lines.is_empty() || lines == "\n" || lines.ends_with("\n\n");
            prop_assert_eq!(boundary.here(), expected, "{:?}", text);
        }
    }
}
