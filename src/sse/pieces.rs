//! An event stream in pieces: what of it is data, and where events end.

use std::mem;

use super::{BYTE_ORDER_MARK, bytes::Short};
use crate::message::bytes::run;

/// The longest type of an event that is told from others.
pub(super) const MAX_TYPE: usize = 64;

/// What has just been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Piece<'a> {
    /// A part of the event's data.
    Data(&'a [u8]),
    /// The event has ended; a `\n` after `\r` may still [follow](Pieces::skip_line_end).
    End {
        /// Its type is `error`.
        is_error: bool,
    },
}

/// Follows §9.2.5 and §9.2.6 as [`Scanner`](super::Scanner) does, but keeps nothing of what passes.
#[derive(Debug, Clone)]
pub(super) struct Pieces {
    /// What is still to come of a byte order mark; nothing once that question is over.
    mark: &'static [u8],
    /// The `\n` that may come next belongs to the line before.
    after_return: bool,
    place: Place,
    /// What there is of a name, or of an event's type.
    text: Short<MAX_TYPE>,
    /// The event's type so far, or that of the one that has just ended.
    kind: Short<MAX_TYPE>,
    has_ended: bool,
    has_id: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Within the name of a field, or before it.
    Name,
    /// After the colon, where a space does not count.
    Colon(Field),
    Value(Field),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Field {
    Data,
    Type,
    Other,
}

impl Pieces {
    pub(super) const fn new() -> Self {
        Self {
            mark: &BYTE_ORDER_MARK,
            after_return: false,
            place: Place::Name,
            text: Short::new(),
            kind: Short::new(),
            has_ended: false,
            has_id: false,
        }
    }

    /// A stream between two of its events. There is no byte order mark, and a `\n` may belong to the line before; a blank
    /// line that is taken for it ends nothing.
    pub(super) const fn within() -> Self {
        Self { mark: &[], after_return: true, ..Self::new() }
    }

    /// Whether any event so far has had an `id`, this one included.
    pub(super) const fn has_id(&self) -> bool {
        self.has_id
    }

    /// The type of the event that has just ended: empty where it has none, `None` where it is longer than any that is
    /// asked for.
    pub(super) fn kind(&self) -> Option<&[u8]> {
        self.kind.get()
    }

    /// Whether a `\n` that comes next belongs to the line before.
    pub(super) const fn is_after_return(&self) -> bool {
        self.after_return
    }

    /// Passes over a `\n` that belongs to the line before.
    pub(super) fn skip_line_end(&mut self, bytes: &mut &[u8]) {
        if let Some(first) = bytes.first()
            && mem::take(&mut self.after_return)
            && *first == b'\n'
        {
            *bytes = &bytes[1..];
        }
    }

    /// Reads on until there is a piece, and takes what it has read off `bytes`; `None` when all is read.
    pub(super) fn next<'a>(&mut self, bytes: &mut &'a [u8]) -> Option<Piece<'a>> {
        if mem::take(&mut self.has_ended) {
            self.kind.clear();
        }
        self.skip_mark(bytes);
        loop {
            self.skip_line_end(bytes);
            let (&first, rest) = bytes.split_first()?;
            match (self.place, first) {
                (Place::Name, b':') => {
                    *bytes = rest;
                    self.place = Place::Colon(self.field());
                }
                (Place::Colon(field), b' ') => {
                    *bytes = rest;
                    self.place = Place::Value(field);
                }
                (Place::Colon(field), _) => self.place = Place::Value(field),
                (_, b'\n' | b'\r') => {
                    *bytes = rest;
                    self.after_return = first == b'\r';
                    if let Some(piece) = self.end_line() {
                        return Some(piece);
                    }
                }
                (Place::Name, _) => {
                    let (name, rest) = bytes.split_at(run(bytes, |byte| matches!(byte, b':' | b'\n' | b'\r')));
                    *bytes = rest;
                    self.text.extend(name);
                }
                (Place::Value(field), _) => {
                    let (value, rest) = bytes.split_at(run(bytes, |byte| matches!(byte, b'\n' | b'\r')));
                    *bytes = rest;
                    match field {
                        Field::Data => return Some(Piece::Data(value)),
                        Field::Type => self.text.extend(value),
                        Field::Other => {}
                    }
                }
            }
        }
    }

    /// Passes over a byte order mark, which may come in pieces.
    fn skip_mark(&mut self, bytes: &mut &[u8]) {
        while let ([expected, left @ ..], Some((first, rest))) = (self.mark, bytes.split_first()) {
            if first == expected {
                (self.mark, *bytes) = (left, rest);
            } else {
                // What looked like one begins the first name.
                self.text.extend(&BYTE_ORDER_MARK[..BYTE_ORDER_MARK.len() - self.mark.len()]);
                self.mark = &[];
            }
        }
    }

    /// Which field it is whose name has ended.
    fn field(&mut self) -> Field {
        let field = match self.text.get() {
            Some(b"data") => Field::Data,
            Some(b"event") => Field::Type,
            Some(b"id") => {
                self.has_id = true;
                Field::Other
            }
            _ => Field::Other,
        };
        self.text.clear();
        field
    }

    /// Ends a line. The end of one of data is data itself if more data follows: it comes with the line that ends, for
    /// white space at the end of a JSON text does not matter.
    fn end_line(&mut self) -> Option<Piece<'static>> {
        let field = match mem::replace(&mut self.place, Place::Name) {
            Place::Name if self.text.first().is_none() => {
                self.has_ended = true;
                return Some(Piece::End { is_error: self.kind() == Some(b"error") });
            }
            // A name without a colon has an empty value.
            Place::Name => self.field(),
            Place::Colon(field) | Place::Value(field) => field,
        };
        match field {
            Field::Data => return Some(Piece::Data(b"\n")),
            Field::Type => self.kind = self.text,
            Field::Other => {}
        }
        self.text.clear();
        None
    }
}
