//! The copy of a stream as bytes. Pure, but for the random numbers.
//!
//! Everything is sealed (AES-256-GCM) with a key that follows from the [`Id`] that only the clients of the stream and the
//! replica that has it know; what the copy is called in Redis follows from it, too, and not the other way round. So Redis
//! learns nothing of an answer that nobody may store but its length, and whoever writes there cannot make anybody believe
//! what the stream did not say. Each value is bound to what it is and to its place: what was cut off, changed or put
//! elsewhere does not open, and is nothing.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderMap, HeaderName, StatusCode};
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey},
    hkdf::{HKDF_SHA256, Salt},
    rand::{SecureRandom, SystemRandom},
};

use super::super::{
    encoding::{Reader, Writer},
    key::Key,
    marks::Marks,
    purge::Names,
    resume::{Id, Whose},
};
use crate::message::Kind;

/// Of all that is sealed. What another version wrote does not open.
const VERSION: u8 = 1;
/// What a sealed value is longer than what it says.
const SEALED: usize = NONCE_LEN + 16;
/// What a sealed [`Part`] is longer than its bytes.
pub(super) const OVERHEAD: usize = SEALED + 9;

/// What a value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    Head = 1,
    Part = 2,
    End = 3,
}

/// What is known of a copy with the id of its stream.
pub(super) struct Seal {
    key: LessSafeKey,
    random: SystemRandom,
}

impl Seal {
    /// The name of the copy in Redis, and its seal.
    pub(super) fn of(id: Id) -> Option<(String, Self)> {
        let secret = Salt::new(HKDF_SHA256, b"sidegate cache resume").extract(id.as_bytes());
        let mut name = [0; 32];
        secret.expand(&[b"name"], HKDF_SHA256).ok()?.fill(&mut name).ok()?;
        let key = LessSafeKey::new(UnboundKey::from(secret.expand(&[b"seal"], &AES_256_GCM).ok()?));
        Some((Key::from(name).hex(), Self { key, random: SystemRandom::new() }))
    }

    /// Seals `said`, which stands at the byte `at`. `None` where the system has no random numbers.
    pub(super) fn seal(&self, what: What, at: u64, said: &[u8]) -> Option<Vec<u8>> {
        // By chance: a part may be written again with other bounds.
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let mut sealed = Vec::with_capacity(said.len() + SEALED);
        sealed.extend_from_slice(&nonce);
        sealed.extend_from_slice(said);
        let (_, said) = sealed.split_at_mut(NONCE_LEN);
        let nonce = Nonce::assume_unique_for_key(nonce);
        let tag = self.key.seal_in_place_separate_tag(nonce, Aad::from(place(what, at)), said).ok()?;
        sealed.extend_from_slice(tag.as_ref());
        Some(sealed)
    }

    /// What was sealed as this, for this place.
    pub(super) fn open(&self, what: What, at: u64, mut sealed: Vec<u8>) -> Option<Bytes> {
        let (nonce, said) = sealed.split_at_mut_checked(NONCE_LEN)?;
        let nonce = Nonce::try_assume_unique_for_key(nonce).ok()?;
        let length = self.key.open_in_place(nonce, Aad::from(place(what, at)), said).ok()?.len();
        let said = NONCE_LEN..NONCE_LEN + length;
        Some(Bytes::from(sealed).slice(said))
    }
}

fn place(what: What, at: u64) -> [u8; 10] {
    let mut place = [VERSION; 10];
    let (kind, number) = place.split_at_mut(2);
    kind[1] = what as u8;
    number.copy_from_slice(&at.to_be_bytes());
    place
}

/// What is said of a stream before its bytes.
#[derive(Debug)]
pub(super) struct Head {
    /// The replica that copies.
    pub(super) owner: u64,
    pub(super) whose: Whose,
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) names: Arc<Names>,
    pub(super) marks: Arc<Marks>,
}

impl Head {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut to = Writer(Vec::with_capacity(1024));
        to.0.extend_from_slice(&self.owner.to_be_bytes());
        match &self.whose {
            Whose::One(key) => {
                to.0.push(0);
                to.0.extend_from_slice(key.as_bytes());
            }
            Whose::All { key, vary } => {
                to.0.push(1);
                to.0.extend_from_slice(key.as_bytes());
                to.all(vary.iter().map(|name| name.as_str().as_bytes()));
            }
        }
        to.0.extend_from_slice(&self.status.as_u16().to_be_bytes());
        to.fields(&self.headers);
        to.names(&self.names);
        to.marks(&self.marks);
        to.0
    }

    pub(super) fn decode(said: &[u8]) -> Option<Self> {
        let mut from = Reader(said);
        let owner = u64::from_be_bytes(from.array()?);
        let [kind] = from.array()?;
        let key = Key::from(from.array()?);
        let whose = match kind {
            0 => Whose::One(key),
            1 => Whose::All { key, vary: from.all(|name| HeaderName::from_bytes(name).ok())? },
            _ => return None,
        };
        let status = StatusCode::from_u16(u16::from_be_bytes(from.array()?)).ok()?;
        let headers = from.fields()?;
        let (names, marks) = (from.names()?.into(), from.marks()?.into());
        from.0.is_empty().then_some(Self { owner, whose, status, headers, names, marks })
    }
}

/// Some of the bytes of a stream, in one piece.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    /// How many events have ended before.
    pub(super) count: u64,
    /// Whether it begins between two events: then it can be read without what was before.
    pub(super) is_between: bool,
    pub(super) data: Bytes,
}

impl Part {
    pub(super) fn encode(count: u64, is_between: bool, pieces: &[Bytes]) -> Vec<u8> {
        let length = pieces.iter().map(Bytes::len).sum::<usize>();
        let mut said = Vec::with_capacity(9 + length);
        said.extend_from_slice(&count.to_be_bytes());
        said.push(u8::from(is_between));
        for piece in pieces {
            said.extend_from_slice(piece);
        }
        said
    }

    pub(super) fn decode(said: &Bytes) -> Option<Self> {
        let (count, rest) = said.split_first_chunk()?;
        let (&is_between, data) = rest.split_first()?;
        // One without bytes would be before itself.
        if is_between > 1 || data.is_empty() {
            return None;
        }
        Some(Self { count: u64::from_be_bytes(*count), is_between: is_between == 1, data: said.slice_ref(data) })
    }
}

/// How a stream has ended.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum End {
    Whole(Option<HeaderMap>),
    Broken(Kind),
}

impl End {
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut to = Writer(Vec::new());
        match self {
            Self::Whole(None) => to.0.push(0),
            Self::Whole(Some(trailers)) => {
                to.0.push(1);
                to.fields(trailers);
            }
            Self::Broken(Kind::UpstreamTimeout) => to.0.push(3),
            Self::Broken(Kind::DeadlineExceeded) => to.0.push(4),
            Self::Broken(_) => to.0.push(2),
        }
        to.0
    }

    pub(super) fn decode(said: &[u8]) -> Option<Self> {
        let mut from = Reader(said);
        let [kind] = from.array()?;
        let end = match kind {
            0 => Self::Whole(None),
            1 => Self::Whole(Some(from.fields()?)),
            2 => Self::Broken(Kind::UpstreamReset),
            3 => Self::Broken(Kind::UpstreamTimeout),
            4 => Self::Broken(Kind::DeadlineExceeded),
            _ => return None,
        };
        from.0.is_empty().then_some(end)
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;

    fn seal(byte: u8) -> Seal {
        Seal::of(Id::from([byte; 16])).unwrap().1
    }

    fn head(whose: Whose) -> Head {
        let mut headers = HeaderMap::new();
        headers.append("content-type", HeaderValue::from_static("text/event-stream"));
        headers.append("raw", HeaderValue::from_bytes(b"\xff\x80").unwrap());
        headers.append("raw", HeaderValue::from_static("2"));
        Head {
            owner: 0x0123_4567_89ab_cdef,
            whose,
            status: StatusCode::OK,
            headers,
            names: Arc::new(Names { host: "h".into(), path: "/ä?b".into(), tags: ["t", ""].map(Box::from).into() }),
            marks: Arc::new(Marks::of([None, Some(b"1:2".to_vec()), None])),
        }
    }

    fn heads() -> [Head; 3] {
        let key = Key::from([9; 32]);
        let all = |vary: &[HeaderName]| Whose::All { key, vary: vary.to_vec() };
        let names = [HeaderName::from_static("accept"), HeaderName::from_static("x-a")];
        [head(Whose::One(key)), head(all(&[])), head(all(&names))]
    }

    #[test]
    fn a_head_is_read_as_it_was_written_and_no_part_of_it_is() {
        for head in heads() {
            let said = head.encode();
            assert_eq!(format!("{:?}", Head::decode(&said)), format!("{:?}", Some(head)));
            for end in 0..said.len() {
                assert!(Head::decode(&said[..end]).is_none(), "cut off at {end}");
            }
            assert!(Head::decode(&[&said[..], b"x"].concat()).is_none());
        }
    }

    #[test]
    fn an_end_is_read_as_it_was_written() {
        let mut trailers = HeaderMap::new();
        trailers.insert("checksum", HeaderValue::from_static("9"));
        for end in [
            End::Whole(None),
            End::Whole(Some(trailers)),
            End::Broken(Kind::UpstreamReset),
            End::Broken(Kind::UpstreamTimeout),
            End::Broken(Kind::DeadlineExceeded),
        ] {
            let said = end.encode();
            assert_eq!(End::decode(&said), Some(end));
            assert_eq!(End::decode(&[&said[..], b"x"].concat()), None);
        }
        assert_eq!(End::decode(&End::Broken(Kind::Internal).encode()), Some(End::Broken(Kind::UpstreamReset)));
        assert_eq!((End::decode(b""), End::decode(b"\x05")), (None, None));
    }

    #[test]
    fn what_was_cut_off_changed_moved_or_is_anothers_does_not_open() {
        let seal = seal(1);
        let said = Part::encode(3, true, &[Bytes::from_static(b"data: "), Bytes::from_static(b"a\n\n")]);
        let sealed = seal.seal(What::Part, 70, &said).unwrap();
        assert_eq!(sealed.len(), 9 + OVERHEAD);
        let open = |sealed: &[u8]| seal.open(What::Part, 70, sealed.to_vec());
        let part = Part::decode(&open(&sealed).unwrap()).unwrap();
        assert_eq!(part, Part { count: 3, is_between: true, data: Bytes::from_static(b"data: a\n\n") });
        for end in 0..sealed.len() {
            assert_eq!(open(&sealed[..end]), None, "cut off at {end}");
        }
        for at in 0..sealed.len() {
            for change in [1, 0x80, 0xff] {
                let mut changed = sealed.clone();
                changed[at] ^= change;
                assert_eq!(open(&changed), None, "changed at {at}");
            }
        }
        assert_eq!(open(&[&sealed[..], b"x"].concat()), None);
        assert_eq!(seal.open(What::Part, 71, sealed.clone()), None);
        assert_eq!(seal.open(What::End, 70, sealed.clone()), None);
        assert_eq!(self::seal(2).open(What::Part, 70, sealed), None);
    }

    #[test]
    fn the_name_follows_from_the_id_and_says_nothing_of_it() {
        let name = |byte: u8| Seal::of(Id::from([byte; 16])).unwrap().0;
        assert_eq!(name(1), name(1));
        assert_ne!(name(1), name(2));
        assert!(name(1).len() == 64 && !name(1).contains(&"01".repeat(4)));
    }

    #[test]
    fn the_same_is_not_sealed_the_same_twice() {
        let seal = seal(1);
        assert_ne!(seal.seal(What::Head, 0, b"a"), seal.seal(What::Head, 0, b"a"));
    }

    proptest! {
        #[test]
        fn parts_are_read_as_they_were_written(
            count: u64,
            is_between: bool,
            pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..100), 1..5),
            at: u64,
        ) {
            let pieces: Vec<_> = pieces.into_iter().map(Bytes::from).collect();
            let sealed = seal(1).seal(What::Part, at, &Part::encode(count, is_between, &pieces)).unwrap();
            let data = Bytes::from(pieces.concat());
            prop_assert_eq!(sealed.len(), data.len() + OVERHEAD);
            let part = Part::decode(&seal(1).open(What::Part, at, sealed).unwrap());
            prop_assert_eq!(part, Some(Part { count, is_between, data }));
        }

        #[test]
        fn whatever_is_there_is_read_to_no_harm(said in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert!(seal(1).open(What::Head, 0, said.clone()).is_none());
            Head::decode(&said);
            End::decode(&said);
            Part::decode(&said.into());
        }
    }
}
