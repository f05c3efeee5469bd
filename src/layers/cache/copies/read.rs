//! The replica that a client has come to with an id of another one's stream.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures_util::stream;
use http_body::Frame;
use http_body_util::StreamBody;
use tokio::{
    task::JoinSet,
    time::{Instant, sleep, timeout},
};

use super::{
    super::{
        purge::Standing,
        resume::{self, Last, Lost, Whose},
        status::CacheStatus,
    },
    Copies, Ear, LIVES, LOOK, Of, PART, READ, news, question,
    sealed::{End, Head, OVERHEAD, Part, Seal, What},
};
use crate::{
    message::{Body, BoxError, Error, Kind, Response},
    sse::Numbering,
    store::{Failure, Key},
};

/// How long an owner has to be without a sign of life until it is gone: Redis may have been away, and taken all of them
/// with it.
const GONE: Duration = Duration::from_secs(1);
/// How long a reader waits for a Redis that does not answer.
const PATIENCE: Duration = Duration::from_secs(3);
/// Between two looks for what the client has had already, and that is on its way here.
const SOON: Duration = Duration::from_millis(5);

impl Of {
    /// The rest of a stream that another replica has, or had, if it `is` the client's. It takes no longer than a call to
    /// Redis may.
    pub(in super::super) async fn take_up(
        &self,
        last: Last,
        is: impl Fn(&Whose) -> bool,
        status: CacheStatus,
    ) -> Result<Response, Lost> {
        let Some((name, seal)) = Seal::of(last.id) else { return Err(Lost::Failed) };
        let (head, from, reader) = self.find(name, seal, last, is).await?;
        let body = stream::unfold(Some(reader), async |reader| {
            let mut reader = reader?;
            match reader.next().await {
                Ok(Some(frame)) => Some((Ok(frame), Some(reader))),
                Ok(None) => None,
                Err(error) => Some((Err(BoxError::from(error)), None)),
            }
        });
        let body = resume::rest(last, from, Body::new(StreamBody::new(body)));
        let mut response = Response::new(body);
        *response.status_mut() = head.status;
        *response.headers_mut() = head.headers;
        status.append(response.headers_mut());
        Ok(response)
    }

    async fn find(
        &self,
        name: String,
        seal: Seal,
        last: Last,
        is: impl Fn(&Whose) -> bool,
    ) -> Result<(Head, Numbering, Reader), Lost> {
        let copies = &self.copies;
        let keys = copies.keys(&name);
        let fields = self.fields(&name, &keys[0]).await?;
        let head = fields.get("head").ok_or(Lost::Unknown)?;
        let head = seal.open(What::Head, 0, head.clone()).and_then(|said| Head::decode(&said)).ok_or(Lost::Unknown)?;
        if !is(&head.whose) {
            return Err(Lost::Other);
        }
        // What this replica has let go of it does not go on with.
        let owner = (head.owner != copies.id).then(|| copies.sign(head.owner));
        let sign = async {
            match &owner {
                Some(owner) => copies.redis.get(owner).await,
                None => Ok(None),
            }
        };
        let (standing, sign) = tokio::try_join!(self.shared.standing_of(&head.marks, &head.names), sign)?;
        if standing == Standing::Gone {
            return Err(Lost::Unknown);
        }
        let Parts { from, mut at, all: parts, reaches } = Parts::of(&seal, fields, last.event).ok_or(Lost::Gone)?;
        // What follows is read as any other part of the stream is.
        let mut seen = from.clone();
        for part in &parts {
            seen.pass(part);
            at += part.len() as u64;
        }
        if reaches != at {
            return Err(Lost::Gone);
        }
        let ear = copies.listen(news(&name));
        let (copies, question, now) = (copies.clone(), question(&name), Instant::now());
        let presence = Presence::new(copies.clone(), keys[1].clone());
        let is_alive = sign.is_some();
        let mut reader = Reader {
            copies,
            seal,
            keys,
            owner,
            question,
            ear,
            at,
            ready: parts.into(),
            end: None,
            failing: None,
            looked: now,
            missing: (!is_alive).then_some(now),
            presence,
        };
        // Its owner may not have written yet what the client has had.
        let soon = Instant::now() + reader.copies.redis.deadline() / 3;
        loop {
            let counted = reader.ready.len();
            reader.look().await.map_err(|failed| failed.map_or(Lost::Unknown, Lost::from))?;
            reader.ready.iter().skip(counted).for_each(|part| seen.pass(part));
            if seen.count() >= last.event || reader.end.is_some() || !is_alive || Instant::now() >= soon {
                break;
            }
            timeout(SOON, reader.ear.heard.notified()).await.ok();
        }
        let is_there = seen.count() >= last.event;
        let is_more = match reader.end {
            Some(End::Whole(_)) => true,
            // Who has all of it has to be answered by somebody else.
            Some(End::Broken(_)) => seen.count() > last.event,
            None => is_alive || seen.count() > last.event,
        };
        if is_there && is_more { Ok((head, from, reader)) } else { Err(Lost::Gone) }
    }

    /// All of a copy. Who comes very soon may be here before it is.
    async fn fields(&self, name: &str, key: &Key) -> Result<HashMap<String, Vec<u8>>, Failure> {
        let redis = &self.copies.redis;
        let soon = Instant::now() + redis.deadline() / 3;
        let mut has_asked = false;
        loop {
            let fields = redis.hash(key).await?;
            if !fields.is_empty() || Instant::now() >= soon {
                return Ok(fields);
            }
            if !mem::replace(&mut has_asked, true) {
                redis.publish(&self.copies.channel(), question(name).as_bytes()).await.ok();
            }
            sleep(SOON).await;
        }
    }
}

impl From<Failure> for Lost {
    fn from(_: Failure) -> Self {
        Self::Failed
    }
}

/// What there is of a copy, from a place before what the client has not had.
struct Parts {
    from: Numbering,
    /// Where that is.
    at: u64,
    all: Vec<Bytes>,
    /// How far it says that it reaches.
    reaches: u64,
}

impl Parts {
    /// Of all fields of a copy, for one who has had so many events. `None` where what comes after those is gone, or
    /// anything after it.
    fn of(seal: &Seal, fields: HashMap<String, Vec<u8>>, had: u64) -> Option<Self> {
        let reaches = std::str::from_utf8(fields.get("to")?).ok()?.parse().ok()?;
        let parts = fields.into_iter().filter_map(|(at, sealed)| Some((at.parse::<u64>().ok()?, sealed)));
        let mut all = Vec::new();
        for (at, sealed) in parts {
            all.push((at, Part::decode(&seal.open(What::Part, at, sealed)?)?));
        }
        all.sort_unstable_by_key(|(at, _)| *at);
        let is_start = |(at, part): &(u64, Part)| (*at == 0 || part.is_between) && part.count <= had;
        let start = all.iter().rposition(is_start)?;
        let (at, count) = (all[start].0, all[start].1.count);
        let mut next = at;
        let mut parts = Vec::new();
        for (at, part) in all.drain(start..) {
            if at != next {
                return None;
            }
            next += part.data.len() as u64;
            parts.push(part.data);
        }
        let from = if at == 0 { Numbering::new() } else { Numbering::after(count) };
        Some(Self { from, at, all: parts, reaches })
    }
}

/// Reads a copy on, while it grows.
struct Reader {
    copies: Arc<Copies>,
    seal: Seal,
    keys: [Key; 2],
    /// The sign of life of its owner, if that is another replica.
    owner: Option<Key>,
    question: String,
    ear: Ear,
    /// The next byte to be asked for.
    at: u64,
    /// What is read and not given yet.
    ready: VecDeque<Bytes>,
    end: Option<End>,
    /// Since when Redis does not answer.
    failing: Option<Instant>,
    /// When there was a look at the owner, and since when it is missing.
    looked: Instant,
    missing: Option<Instant>,
    presence: Presence,
}

/// Says that somebody reads, and how far, also while the client takes its time.
struct Presence {
    at: Arc<AtomicU64>,
    task: JoinSet<()>,
}

impl Presence {
    fn new(copies: Arc<Copies>, readers: Key) -> Self {
        let at = Arc::new(AtomicU64::new(0));
        let mut task = JoinSet::new();
        let known = at.clone();
        task.spawn(async move {
            loop {
                sleep(LOOK).await;
                let at = known.load(Ordering::Relaxed).to_string();
                copies.redis.set(&readers, at.as_bytes(), LIVES).await.ok();
            }
        });
        Self { at, task }
    }
}

impl Reader {
    /// What comes next.
    async fn next(&mut self) -> Result<Option<Frame<Bytes>>, Error> {
        loop {
            if let Some(data) = self.ready.pop_front() {
                return Ok(Some(Frame::data(data)));
            }
            match self.end.take() {
                Some(End::Whole(None)) => return Ok(None),
                Some(End::Whole(Some(trailers))) => {
                    self.end = Some(End::Whole(None));
                    return Ok(Some(Frame::trailers(trailers)));
                }
                Some(End::Broken(kind)) => return Err(broken(kind, "the stream broke off on the replica that had it")),
                None => {}
            }
            match self.look().await {
                Ok(()) => self.failing = None,
                Err(None) => return Err(broken(Kind::UpstreamReset, "the copy of the stream is gone")),
                Err(Some(_)) if self.failing.get_or_insert_with(Instant::now).elapsed() < PATIENCE => {}
                Err(Some(_)) => return Err(broken(Kind::UpstreamReset, "redis does not answer")),
            }
            if !self.ready.is_empty() || self.end.is_some() {
                continue;
            }
            self.look_after_owner().await?;
            let pause = if self.missing.is_some() || self.failing.is_some() { LOOK / 4 } else { LOOK };
            tokio::select! {
                () = self.ear.heard.notified() => {}
                () = sleep(pause) => {}
            }
        }
    }

    /// Looks for more, and for the end. Without a failure it fails where what comes next is not there any more.
    async fn look(&mut self) -> Result<(), Option<Failure>> {
        let args = [
            self.at.to_string(),
            OVERHEAD.to_string(),
            (4 * PART).to_string(),
            LIVES.as_millis().to_string(),
            self.copies.channel().as_str().to_owned(),
            self.question.clone(),
        ];
        let found: Vec<Vec<u8>> = self.copies.redis.run(&READ, &self.keys, &args[..]).await.map_err(Some)?;
        let mut found = found.into_iter();
        let reaches = found.next().and_then(|to| std::str::from_utf8(&to).ok()?.parse::<u64>().ok()).ok_or(None)?;
        let end = found.next().filter(|end| !end.is_empty());
        for sealed in found {
            let part = self.seal.open(What::Part, self.at, sealed).and_then(|said| Part::decode(&said)).ok_or(None)?;
            self.at += part.data.len() as u64;
            self.ready.push_back(part.data);
        }
        self.presence.at.store(self.at, Ordering::Relaxed);
        if self.ready.is_empty() && self.at < reaches {
            return Err(None);
        }
        if let Some(end) = end.filter(|_| self.at == reaches) {
            let end = self.seal.open(What::End, self.at, end).and_then(|said| End::decode(&said)).ok_or(None)?;
            self.end = Some(end);
            self.presence.task.abort_all();
        }
        Ok(())
    }

    /// Fails where the owner is gone.
    async fn look_after_owner(&mut self) -> Result<(), Error> {
        let pause = if self.missing.is_some() { LOOK / 4 } else { LOOK };
        if self.looked.elapsed() < pause {
            return Ok(());
        }
        self.looked = Instant::now();
        let sign = match &self.owner {
            Some(owner) => self.copies.redis.get(owner).await,
            None => Ok(None),
        };
        match sign {
            Ok(Some(_)) => self.missing = None,
            Ok(None) => {
                let since = *self.missing.get_or_insert_with(Instant::now);
                if since.elapsed() >= GONE {
                    return Err(broken(Kind::UpstreamReset, "the replica that had the stream is gone"));
                }
            }
            Err(_) => {}
        }
        Ok(())
    }
}

fn broken(kind: Kind, why: &'static str) -> Error {
    Error::new(kind, why)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{layers::cache::resume::Id, sse::Labels};

    const STREAM: &str = "data: 1\n\n: c\n\ndata: 2\r\n\r\nevent: e\ndata: 3\ndata: 3\n\ndata: 4\n\ndata: 5";

    fn seal() -> Seal {
        Seal::of(Id::from([7; 16])).unwrap().1
    }

    /// A copy of the stream in parts of these lengths, without the first so many.
    fn copy(lengths: &[usize], without: usize) -> HashMap<String, Vec<u8>> {
        let mut fields = HashMap::from([("head".to_owned(), Vec::new())]);
        let (mut at, mut numbering) = (0, Numbering::new());
        for (n, length) in lengths.iter().chain([&STREAM.len()]).enumerate() {
            let data = Bytes::from_static(STREAM.as_bytes()).slice(at..(at + length).min(STREAM.len()));
            if data.is_empty() {
                break;
            }
            if n >= without {
                let said = Part::encode(numbering.count(), numbering.is_between(), std::slice::from_ref(&data));
                fields.insert(at.to_string(), seal().seal(What::Part, at as u64, &said).unwrap());
            }
            numbering.pass(&data);
            at += data.len();
        }
        fields.insert("to".to_owned(), at.to_string().into_bytes());
        fields
    }

    /// What a client gets that has had so many events; nothing where it is not there.
    fn rest(fields: HashMap<String, Vec<u8>>, had: u64) -> Option<String> {
        let Parts { from, at, all: parts, reaches } = Parts::of(&seal(), fields, had)?;
        let end = at + parts.iter().map(|part| part.len() as u64).sum::<u64>();
        assert_eq!(end, reaches);
        let mut labels = Labels::after("x", from, had);
        let passed = parts.into_iter().map(|part| labels.pass(part));
        Some(String::from_utf8(passed.collect::<Vec<_>>().concat()).unwrap())
    }

    fn whole(had: u64) -> String {
        let mut labels = Labels::after("x", Numbering::new(), had);
        String::from_utf8(labels.pass(Bytes::from_static(STREAM.as_bytes())).to_vec()).unwrap()
    }

    /// Comments are no events, and who has had what is before them need not get them.
    fn events(text: &str) -> String {
        text.replace(": c\n\n", "")
    }

    proptest! {
        #[test]
        fn what_a_client_has_not_had_is_read_from_whatever_parts_there_are(
            lengths in prop::collection::vec(1..20_usize, 0..20),
            without in 0..6_usize,
            had in 0..5_u64,
        ) {
            let whole = whole(had);
            match rest(copy(&lengths, without), had) {
                Some(rest) => prop_assert_eq!(events(&rest), events(&whole)),
                None => prop_assert!(without > 0, "all of it is there"),
            }
        }

        #[test]
        fn what_is_not_whole_is_nothing(
            lengths in prop::collection::vec(1..20_usize, 2..20),
            which in any::<prop::sample::Index>(),
            at in any::<prop::sample::Index>(),
            change in 1..=255_u8,
            had in 0..5_u64,
        ) {
            let fields = copy(&lengths, 0);
            let mut places: Vec<u64> = fields.keys().filter_map(|at| at.parse().ok()).collect();
            places.sort_unstable();
            let place = places[which.index(places.len())].to_string();
            let mut changed = fields.clone();
            let value = changed.get_mut(&place).unwrap();
            let at = at.index(value.len());
            value[at] ^= change;
            prop_assert!(rest(changed, had).is_none());
            // One in the middle is missing.
            let mut missing = fields;
            if place != "0" && place != places.last().unwrap().to_string() {
                missing.remove(&place);
                if let Some(rest) = rest(missing, had) {
                    prop_assert_eq!(events(&rest), events(&whole(had)));
                }
            }
        }
    }

    #[test]
    fn what_came_after_the_event_must_be_there() {
        // The first part ends within the third event.
        let lengths = [40, 20];
        assert_eq!(rest(copy(&lengths, 1), 2), None);
        assert_eq!(rest(copy(&lengths, 0), 2), Some(whole(2)));
        assert_eq!(rest(HashMap::new(), 0), None);
        assert_eq!(rest(HashMap::from([("to".to_owned(), b"0".to_vec())]), 0), None);
    }
}
