//! Answers as bytes, for Redis. Pure.
//!
//! A value says what it is, in which version, and under which key it stands, and ends with a checksum over all of it. What
//! is not exactly so is nothing: a value that was cut off, changed, moved to another key, or written by another version.
//!
//! Numbers have their large end first; what has a length has it before it, in four bytes.

use std::{io::Read, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::{
    freshness::Life,
    key::{Key, checksum},
    marks::Marks,
    purge::Names,
    recording::Cut,
    resume::Id,
    stored::{Basis, Stored},
};

/// What every value begins with: whose it is, and the version of all that follows.
const MAGIC: [u8; 4] = *b"sgc\x02";
const ANSWER: u8 = 1;
const NAMES: u8 = 2;
/// How hard it is tried: 1 takes a quarter of the time of the usual 3, for a few percent.
const LEVEL: i32 = 1;
const CHECKSUM: usize = 8;

/// What a value says.
#[derive(Debug)]
pub(super) enum Record {
    /// An answer, of which nothing is known of purges but its marks, and whose life is by the clock of Redis.
    Answer(Box<Stored>),
    /// There are several, for what these fields of a request say.
    Varies(Vec<HeaderName>),
}

/// An answer with its marks, under `key`; its `life` is by the clock of Redis. Its body is compressed where it is longer than `compress_above`, and is smaller
/// then.
pub(super) fn answer(key: &Key, stored: &Stored, life: &Life, marks: &Marks, compress_above: usize) -> Vec<u8> {
    let mut to = Writer::new(ANSWER, key, stored.body.len() + 1024);
    to.0.extend_from_slice(&life.encode());
    to.0.extend_from_slice(&stored.status.as_u16().to_be_bytes());
    to.0.extend_from_slice(&millis(stored.took).to_be_bytes());
    to.fields(&stored.headers);
    to.number(usize::from(stored.trailers.is_some()));
    if let Some(trailers) = &stored.trailers {
        to.fields(trailers);
    }
    to.bytes(stored.id.as_ref().map_or(&[], |id| id.as_bytes()));
    to.names(&stored.names);
    to.marks(marks);
    to.number(stored.cuts.len());
    for cut in &stored.cuts {
        to.0.extend_from_slice(&cut.end.to_be_bytes());
        to.0.extend_from_slice(&cut.at.to_be_bytes());
    }
    to.number(stored.body.len());
    let compressed = (stored.body.len() > compress_above).then(|| zstd::bulk::compress(&stored.body, LEVEL).ok());
    match compressed.flatten().filter(|compressed| compressed.len() < stored.body.len()) {
        Some(compressed) => to.bytes(&compressed),
        None => to.bytes(&stored.body),
    }
    to.finish()
}

/// What is asked for under `key` varies by these fields.
pub(super) fn varies(key: &Key, names: &[HeaderName]) -> Vec<u8> {
    let mut to = Writer::new(NAMES, key, 256);
    to.all(names.iter().map(|name| name.as_str().as_bytes()));
    to.finish()
}

/// What the value under `key` says; `None` where it is not exactly what was written there, or has a body of more than
/// `most` bytes.
pub(super) fn decode(key: &Key, value: Vec<u8>, most: usize) -> Option<Record> {
    let value = Bytes::from(value);
    let (all, checksum) = value.split_at_checked(value.len().checked_sub(CHECKSUM)?)?;
    if self::checksum(all).to_be_bytes() != checksum {
        return None;
    }
    let mut from = Reader(all);
    let head: [u8; 5] = from.array()?;
    let (magic, kind) = head.split_at(4);
    if magic != MAGIC || from.take(32)? != key.as_bytes() {
        return None;
    }
    let record = match kind {
        [ANSWER] => Record::Answer(Box::new(read_answer(&mut from, &value, most)?)),
        [NAMES] => Record::Varies(from.all(|name| HeaderName::from_bytes(name).ok())?),
        _ => return None,
    };
    from.0.is_empty().then_some(record)
}

fn read_answer(from: &mut Reader<'_>, value: &Bytes, most: usize) -> Option<Stored> {
    let life = Life::decode(from.take(Life::ENCODED)?)?;
    let status = StatusCode::from_u16(u16::from_be_bytes(from.array()?)).ok()?;
    let took = Duration::from_millis(u64::from_be_bytes(from.array()?));
    let headers = from.fields()?;
    let trailers = match from.number()? {
        0 => None,
        1 => Some(from.fields()?),
        _ => return None,
    };
    let id = match from.bytes()? {
        [] => None,
        id => Some(Id::from(<[u8; 16]>::try_from(id).ok()?)),
    };
    let (names, marks) = (from.names()?, from.marks()?);
    let count = from.number()?;
    let cuts = from.take(count.checked_mul(8)?)?.chunks_exact(8).map(|cut| {
        let (end, at) = cut.split_at(4);
        Some(Cut { end: u32::from_be_bytes(end.try_into().ok()?), at: u32::from_be_bytes(at.try_into().ok()?) })
    });
    let cuts: Box<[Cut]> = cuts.collect::<Option<_>>()?;
    let length = from.number()?;
    let body = from.bytes()?;
    if length > most || body.len() > length {
        return None;
    }
    let body = if body.len() == length { value.slice_ref(body) } else { decompress(body, length)? };
    // A stream is given again by its cuts: they must be cuts of this body.
    let in_order = cuts.windows(2).all(|two| matches!(two, [one, next] if one.end <= next.end));
    if !in_order || cuts.last().is_some_and(|last| last.end as usize != length) {
        return None;
    }
    Some(Stored {
        id,
        status,
        headers,
        body,
        trailers,
        cuts,
        life,
        names: Arc::new(names),
        basis: Basis { marks: Some(Arc::new(marks)), ..Basis::default() },
        took,
    })
}

/// A body of `length` bytes, and not one byte more, whatever the compressed one would become.
fn decompress(body: &[u8], length: usize) -> Option<Bytes> {
    let mut whole = Vec::with_capacity(length);
    let decoder = zstd::stream::read::Decoder::with_buffer(body).ok()?;
    decoder.take(length as u64 + 1).read_to_end(&mut whole).ok()?;
    (whole.len() == length).then(|| whole.into())
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

pub(super) struct Writer(pub(super) Vec<u8>);

impl Writer {
    fn new(kind: u8, key: &Key, room: usize) -> Self {
        let mut to = Vec::with_capacity(room);
        to.extend_from_slice(&MAGIC);
        to.push(kind);
        to.extend_from_slice(key.as_bytes());
        Self(to)
    }

    /// What does not fit (4 GiB) makes a value that is none.
    fn number(&mut self, number: usize) {
        self.0.extend_from_slice(&u32::try_from(number).unwrap_or(u32::MAX).to_be_bytes());
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.number(bytes.len());
        self.0.extend_from_slice(bytes);
    }

    pub(super) fn all<'a>(&mut self, all: impl ExactSizeIterator<Item = &'a [u8]>) {
        self.number(all.len());
        all.for_each(|bytes| self.bytes(bytes));
    }

    /// Repeated ones as often as they are there, in their order.
    pub(super) fn fields(&mut self, fields: &HeaderMap) {
        self.number(fields.len());
        for (name, value) in fields {
            self.bytes(name.as_str().as_bytes());
            self.bytes(value.as_bytes());
        }
    }

    pub(super) fn names(&mut self, names: &Names) {
        self.bytes(names.host.as_bytes());
        self.bytes(names.path.as_bytes());
        self.all(names.tags.iter().map(|tag| tag.as_bytes()));
    }

    pub(super) fn marks(&mut self, marks: &Marks) {
        self.all(marks.0.iter().map(|mark| &**mark));
    }

    fn finish(mut self) -> Vec<u8> {
        let checksum = checksum(&self.0);
        self.0.extend_from_slice(&checksum.to_be_bytes());
        self.0
    }
}

pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    fn take(&mut self, length: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(length)?;
        self.0 = rest;
        Some(taken)
    }

    pub(super) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        self.take(N)?.try_into().ok()
    }

    fn number(&mut self) -> Option<usize> {
        usize::try_from(u32::from_be_bytes(self.array()?)).ok()
    }

    fn bytes(&mut self) -> Option<&'a [u8]> {
        let length = self.number()?;
        self.take(length)
    }

    pub(super) fn all<T>(&mut self, read: impl Fn(&'a [u8]) -> Option<T>) -> Option<Vec<T>> {
        let count = self.number()?;
        // Nothing is reserved for what may not be there.
        (0..count).map(|_| read(self.bytes()?)).collect()
    }

    pub(super) fn names(&mut self) -> Option<Names> {
        let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(Box::from);
        let (host, path) = (text(self.bytes()?)?, text(self.bytes()?)?);
        Some(Names { host, path, tags: self.all(text)?.into() })
    }

    pub(super) fn marks(&mut self) -> Option<Marks> {
        Some(Marks(self.all(|mark| Some(Box::from(mark)))?.into()))
    }

    pub(super) fn fields(&mut self) -> Option<HeaderMap> {
        let mut fields = HeaderMap::new();
        for _ in 0..self.number()? {
            let name = HeaderName::from_bytes(self.bytes()?).ok()?;
            fields.try_append(name, HeaderValue::from_bytes(self.bytes()?).ok()?).ok()?;
        }
        Some(fields)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key(byte: u8) -> Key {
        Key::from_hex(&format!("{byte:02x}").repeat(32)).unwrap()
    }

    fn life() -> Life {
        let mut bytes = [0; Life::ENCODED];
        bytes[0] = Life::VERSION;
        bytes[1] = 1;
        bytes[9] = 7;
        bytes[25] = 9;
        Life::decode(&bytes).unwrap()
    }

    fn answer(key: &Key, stored: &Stored, marks: &Marks, compress_above: usize) -> Vec<u8> {
        super::answer(key, stored, &stored.life, marks, compress_above)
    }

    fn stored(body: Vec<u8>, cuts: Vec<Cut>) -> Stored {
        let mut headers = HeaderMap::new();
        for (name, value) in [("set-x", "1"), ("content-type", "text/plain"), ("set-x", "2")] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        headers.append("raw", HeaderValue::from_bytes(b"\xff\x80").unwrap());
        let mut trailers = HeaderMap::new();
        trailers.insert("checksum", HeaderValue::from_static("9"));
        Stored {
            id: Id::new(),
            status: StatusCode::NON_AUTHORITATIVE_INFORMATION,
            headers,
            body: body.into(),
            trailers: Some(trailers),
            cuts: cuts.into(),
            life: life(),
            names: Arc::new(Names { host: "h".into(), path: "/ä?b".into(), tags: ["t", ""].map(Box::from).into() }),
            basis: Basis::default(),
            took: Duration::from_millis(1234),
        }
    }

    fn marks() -> Marks {
        Marks::of([None, Some(b"1:2".to_vec()), None])
    }

    /// All that is written of it.
    fn shown(stored: &Stored) -> String {
        let Stored { status, headers, body, trailers, cuts, life, names, basis: _, took, id } = stored;
        let id = id.as_ref().map(Id::as_bytes);
        format!("{status} {headers:?} {body:?} {trailers:?} {cuts:?} {life:?} {names:?} {took:?} {id:?}")
    }

    fn read(key: &Key, value: &[u8]) -> Option<Stored> {
        match decode(key, value.to_vec(), 1 << 20)? {
            Record::Answer(stored) => Some(*stored),
            Record::Varies(_) => None,
        }
    }

    fn bodies() -> impl Strategy<Value = Vec<u8>> {
        let random = prop::collection::vec(any::<u8>(), 0..200);
        let compressible = (any::<u8>(), 0..5000_usize).prop_map(|(byte, length)| vec![byte; length]);
        prop_oneof![random, compressible]
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(body in bodies(), compress_above in 0..1000_usize, cut in any::<prop::sample::Index>()) {
            let length = body.len();
            let at = cut.index(length + 1);
            let ends = [at, length].map(|end| u32::try_from(end).unwrap());
            let cuts = ends.iter().zip([3, 70_000]).map(|(&end, at)| Cut { end, at }).collect();
            let stored = stored(body, cuts);
            let value = answer(&key(7), &stored, &marks(), compress_above);
            let found = read(&key(7), &value).unwrap();
            prop_assert_eq!(shown(&found), shown(&stored));
            prop_assert_eq!(&**found.basis.marks.as_ref().unwrap(), &marks());
            prop_assert!(read(&key(8), &value).is_none(), "it is another's");
        }

        #[test]
        fn what_was_changed_in_several_places_is_nothing(
            body in bodies(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), 1..=255_u8), 1..20),
        ) {
            let written = answer(&key(7), &stored(body, Vec::new()), &marks(), 100);
            let mut value = written.clone();
            for (at, change) in changes {
                let at = at.index(value.len());
                value[at] ^= change;
            }
            prop_assert!(value == written || read(&key(7), &value).is_none());
        }

        #[test]
        fn what_nobody_has_written_is_nothing(value in prop::collection::vec(any::<u8>(), 0..300)) {
            prop_assert!(decode(&key(7), value.clone(), 1 << 20).is_none());
            // With the right checksum, too, it is read to no harm.
            let mut sealed = MAGIC.to_vec();
            sealed.push(ANSWER);
            sealed.extend_from_slice(key(7).as_bytes());
            sealed.extend(value);
            decode(&key(7), Writer(sealed).finish(), 1 << 20);
        }
    }

    #[test]
    fn what_was_cut_off_or_changed_in_one_place_is_nothing() {
        for compress_above in [0, 1 << 20] {
            let value = answer(&key(7), &stored(b"body ".repeat(60), Vec::new()), &marks(), compress_above);
            assert!(read(&key(7), &value).is_some());
            for end in 0..value.len() {
                assert!(read(&key(7), &value[..end]).is_none(), "cut off at {end}");
            }
            for at in 0..value.len() {
                for change in [1, 0x80, 0xff] {
                    let mut value = value.clone();
                    value[at] ^= change;
                    assert!(read(&key(7), &value).is_none(), "changed at {at}");
                }
            }
            assert!(read(&key(7), &[&value[..], b"x"].concat()).is_none());
        }
    }

    #[test]
    fn another_version_is_nothing() {
        let value = answer(&key(7), &stored(Vec::new(), Vec::new()), &marks(), 100);
        for (at, byte) in [(3, 1), (4, 3), (37, Life::VERSION + 1)] {
            let mut value = value[..value.len() - CHECKSUM].to_vec();
            value[at] = byte;
            assert!(read(&key(7), &Writer(value).finish()).is_none(), "with the right checksum, at {at}");
        }
    }

    #[test]
    fn a_body_becomes_no_larger_than_it_may() {
        let large = stored(vec![0; 1 << 20], Vec::new());
        let value = answer(&key(7), &large, &marks(), 1000);
        assert!(value.len() < 4096, "{}", value.len());
        assert!(decode(&key(7), value.clone(), (1 << 20) - 1).is_none());
        assert!(decode(&key(7), value, 1 << 20).is_some());
        // One that says that it is smaller than it becomes.
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], LEVEL).unwrap();
        assert_eq!(decompress(&bomb, 10_000), None);
    }

    #[test]
    fn the_fields_that_it_varies_by_are_read() {
        let names = [HeaderName::from_static("accept"), HeaderName::from_static("x-a")];
        let value = varies(&key(7), &names);
        assert!(matches!(decode(&key(7), value.clone(), 0), Some(Record::Varies(found)) if found == names));
        assert!(decode(&key(8), value, 0).is_none());
    }

    #[test]
    fn cuts_that_are_none_of_the_body_are_nothing() {
        for cuts in [vec![(2, 0), (1, 0), (3, 0)], vec![(1, 0), (2, 0)], vec![(1, 0), (4, 0)]] {
            let cuts = cuts.into_iter().map(|(end, at)| Cut { end, at }).collect();
            assert!(read(&key(7), &answer(&key(7), &stored(b"abc".to_vec(), cuts), &marks(), 100)).is_none());
        }
    }
}
