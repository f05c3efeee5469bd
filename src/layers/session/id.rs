//! The id of a session: 128 random bits, which are a credential, and the digest that stands for it everywhere else.

use std::fmt;

use ring::{
    digest::{Context, SHA256},
    rand::{SecureRandom, SystemRandom},
};

use crate::store::memory::Weigh;

/// Keeps digests of ids apart from digests of anything else.
const DOMAIN: &[u8] = b"sidegate session id\0";

/// An id: 32 lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Id([u8; 32]);

/// The digest of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Digest([u8; 32]);

impl Id {
    /// A new one; nothing where the system has no random bits.
    pub(super) fn new() -> Option<Self> {
        let mut bits = [0; 16];
        SystemRandom::new().fill(&mut bits).ok()?;
        let mut digits = [0; 32];
        digits.copy_from_slice(hex(&bits).as_bytes());
        Some(Self(digits))
    }

    /// The one that is written so.
    pub(super) fn parse(text: &[u8]) -> Option<Self> {
        let digits: [u8; 32] = text.try_into().ok()?;
        digits.iter().all(|digit| matches!(digit, b'0'..=b'9' | b'a'..=b'f')).then_some(Self(digits))
    }

    pub(super) fn as_str(&self) -> &str {
        std::str::from_utf8(&self.0).expect("digits are ASCII")
    }

    pub(super) fn digest(&self) -> Digest {
        let mut context = Context::new(&SHA256);
        context.update(DOMAIN);
        context.update(&self.0);
        let mut digest = [0; 32];
        digest.copy_from_slice(context.finish().as_ref());
        Digest(digest)
    }
}

/// Shows nothing.
impl fmt::Debug for Id {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Id")
    }
}

impl Digest {
    /// 64 digits.
    pub(super) fn hex(&self) -> String {
        hex(&self.0)
    }
}

impl Weigh for Digest {
    fn weight(&self) -> usize {
        size_of::<Self>()
    }
}

fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits.map(|digit| char::from(DIGITS[usize::from(digit)])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_random_and_read_back() {
        let (one, other) = (Id::new().unwrap(), Id::new().unwrap());
        assert_ne!(one, other);
        assert_eq!(Id::parse(one.as_str().as_bytes()), Some(one));
        for wrong in ["", "0011", "00112233445566778899AABBCCDDEEFF", "0011223344556677889 aabbccddeeff"] {
            assert_eq!(Id::parse(wrong.as_bytes()), None, "{wrong}");
        }
        assert_eq!(format!("{other:?}"), "Id");
    }

    #[test]
    fn a_digest_is_of_this_domain() {
        let id = Id::parse(b"00112233445566778899aabbccddeeff").unwrap();
        let plain = ring::digest::digest(&SHA256, id.as_str().as_bytes());
        assert_ne!(id.digest().hex(), hex(plain.as_ref()));
        assert_eq!(id.digest().hex().len(), 64);
    }
}
