//! How a body is made up of texts.

use http::{HeaderMap, header::CONTENT_TYPE};

use super::pieces::{Piece, Pieces};

/// How a body is made up of JSON texts.
#[derive(Debug, Clone)]
pub(super) enum Shape {
    /// It is one.
    Json,
    /// It has one in each line.
    Lines,
    /// It has one in each event.
    Events(Pieces),
}

/// What has just been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part<'a> {
    /// A part of the text.
    Text(&'a [u8]),
    /// The text has ended, with its line or its event.
    End {
        /// The type of the event: empty where there is none, `None` where it is a long one.
        kind: Option<&'a [u8]>,
    },
}

impl Shape {
    /// For a body with these headers: `text/event-stream`, `application/json` and every other type that ends in
    /// `+json`, or `application/x-ndjson`. `None` for other types, and for a body with a content coding, in which
    /// nothing can be read.
    pub(super) fn of(headers: &HeaderMap) -> Option<Self> {
        let value = headers.get(CONTENT_TYPE)?.as_bytes();
        let kind = value.split(|&byte| byte == b';').next().unwrap_or_default().trim_ascii();
        let is = |name: &[u8]| kind.eq_ignore_ascii_case(name);
        let has_suffix = |suffix: &[u8]| kind.last_chunk::<5>().is_some_and(|end| end.eq_ignore_ascii_case(suffix));
        let shape = if super::is_event_stream(headers) {
            Self::Events(Pieces::new())
        } else if is(b"application/x-ndjson") || is(b"application/ndjson") {
            Self::Lines
        } else if is(b"application/json") || has_suffix(b"+json") {
            Self::Json
        } else {
            return None;
        };
        super::is_plain(headers).then_some(shape)
    }

    /// Takes a frame apart. The end of a body, and so of its last line, does not show.
    pub(super) fn pass(&mut self, mut frame: &[u8], mut to: impl FnMut(Part<'_>)) {
        match self {
            Self::Json => to(Part::Text(frame)),
            Self::Lines => {
                let mut lines = frame.split(|&byte| byte == b'\n');
                to(Part::Text(lines.next().unwrap_or_default()));
                for line in lines {
                    to(Part::End { kind: Some(b"") });
                    to(Part::Text(line));
                }
            }
            Self::Events(pieces) => {
                while let Some(piece) = pieces.next(&mut frame) {
                    match piece {
                        Piece::Data(data) => to(Part::Text(data)),
                        Piece::End { .. } => to(Part::End { kind: pieces.kind() }),
                    }
                }
            }
        }
    }
}
