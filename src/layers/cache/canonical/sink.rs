//! Where the one form of a JSON value is written to.

use ring::digest::Context;

/// What is written to.
pub(super) trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

const STAGED: usize = 512;

/// A hash, to which little is added at a time: each time costs as much as some twenty bytes.
pub(super) struct Hash<'a> {
    into: &'a mut Context,
    staged: [u8; STAGED],
    len: usize,
}

impl<'a> Hash<'a> {
    pub(super) const fn new(into: &'a mut Context) -> Self {
        Self { into, staged: [0; STAGED], len: 0 }
    }

    pub(super) fn flush(&mut self) {
        self.into.update(self.staged.split_at(self.len).0);
        self.len = 0;
    }
}

impl Sink for Hash<'_> {
    fn put(&mut self, bytes: &[u8]) {
        if bytes.len() > STAGED - self.len {
            self.flush();
        }
        match self.staged.get_mut(self.len..self.len + bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.len += bytes.len();
            }
            None => self.into.update(bytes),
        }
    }
}

/// Bytes for a comparison with others that are not longer: since no value's form is the beginning of another's, what
/// comes after as many does not matter.
pub(super) struct Short {
    pub(super) bytes: Vec<u8>,
    pub(super) longest: usize,
}

impl Sink for Short {
    fn put(&mut self, bytes: &[u8]) {
        let room = self.longest - self.bytes.len();
        self.bytes.extend(bytes.iter().take(room));
    }
}
