//! Where sessions are kept: in Redis, a hash per session, or in memory.
//!
//! Redis has `created`, `last_seen` (seconds since 1970 by its own clock) and `principal` under
//! `PREFIX:1:session:{DIGEST}:`, so that a cluster spreads them. One script finds a session, compares its principal and,
//! where the last time is a while ago, writes that it was seen and lets it live on: one round trip. What was found is
//! remembered for [`RECENT`], so that a burst costs one.

use std::{
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use futures_util::future::join_all;
use tokio::time::Instant;

use super::id::{Digest, Id};
use crate::store::{
    Failure, Key, Redis, Script,
    memory::{Bounds, Held, Memory, Weigh},
};

/// What keys are of.
const KIND: &str = "session";

/// How long it is believed that a session is as it was found. So long a session that was revoked elsewhere goes on.
pub(super) const RECENT: Duration = Duration::from_secs(2);

/// Sessions that were found lately: at most 16384 and 4 MiB.
const RECENT_BOUNDS: Bounds = Bounds { entries: 16_384, bytes: 4 << 20 };

/// Sessions without Redis: at most 131072, each of about 300 bytes, and 32 MiB of keys and principals. Those not seen for
/// the longest time go first.
const MEMORY_BOUNDS: Bounds = Bounds { entries: 131_072, bytes: 32 << 20 };

/// Between two writes of `last_seen`, at most; at most a tenth of `ttl`.
const LAZINESS: Duration = Duration::from_secs(60);

/// Sessions that an operator's question reads at once.
const AT_ONCE: usize = 64;

/// Sessions that are revoked at once, and a step of a walk more.
const REVOKED: usize = 100_000;

/// How long an operator's question may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// 0: there is none; 1: another's; 2: found. A principal is `=` and its id, and nobody is nothing.
static FIND: Script = Script::new(
    "session_find",
    "local kept = redis.call('HMGET', KEYS[1], 'last_seen', 'principal') \
     if not kept[1] then return 0 end \
     if (kept[2] and '=' .. kept[2] or '') ~= ARGV[1] then return 1 end \
     local now = redis.call('TIME')[1] \
     if now - kept[1] >= tonumber(ARGV[2]) then \
       redis.call('HSET', KEYS[1], 'last_seen', now) \
       redis.call('PEXPIRE', KEYS[1], ARGV[3]) \
     end \
     return 2",
);

static BEGIN: Script = Script::new(
    "session_begin",
    "local now = redis.call('TIME')[1] \
     redis.call('HSET', KEYS[1], 'created', now, 'last_seen', now) \
     if ARGV[1] ~= '' then redis.call('HSET', KEYS[1], 'principal', string.sub(ARGV[1], 2)) end \
     redis.call('PEXPIRE', KEYS[1], ARGV[2]) \
     return 1",
);

static READ: Script =
    Script::new("session_read", "return redis.call('HMGET', KEYS[1], 'created', 'last_seen', 'principal')");

/// What was kept of a session.
#[derive(Debug, Clone)]
struct Kept {
    created: u64,
    last_seen: u64,
    principal: Option<Arc<str>>,
}

impl Weigh for Kept {
    fn weight(&self) -> usize {
        size_of::<Self>() + self.principal.as_ref().map_or(0, |id| id.len())
    }
}

/// Whose a session is.
#[derive(Debug, Clone)]
struct Whose(Option<Arc<str>>);

impl Weigh for Whose {
    fn weight(&self) -> usize {
        size_of::<Self>() + self.0.as_ref().map_or(0, |id| id.len())
    }
}

/// What has come of an id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    Known,
    Unknown,
    /// It is another principal's.
    Foreign,
}

/// The sessions of this process: those without Redis, and what is remembered of those in it. Outlives a configuration.
/// Cheap to clone.
#[derive(Debug, Clone)]
pub struct State(Arc<Local>);

#[derive(Debug)]
struct Local {
    memory: Memory<Digest, Kept>,
    recent: Memory<Digest, Whose>,
}

impl Default for State {
    fn default() -> Self {
        Self(Arc::new(Local { memory: Memory::new(MEMORY_BOUNDS), recent: Memory::new(RECENT_BOUNDS) }))
    }
}

/// The store as one layer uses it.
#[derive(Debug)]
pub(super) struct Keeper {
    pub(super) state: State,
    pub(super) redis: Option<Redis>,
    pub(super) ttl: Duration,
}

impl Keeper {
    /// Finds a session, which lives on if it is that of `principal`.
    ///
    /// # Errors
    /// Redis is out of order.
    pub(super) async fn find(&self, id: &Id, principal: Option<&Arc<str>>) -> Result<Found, Failure> {
        let (digest, now) = (id.digest(), Instant::now());
        let is_own = |whose: Option<&Arc<str>>| if whose == principal { Found::Known } else { Found::Foreign };
        let Local { memory, recent } = &*self.state.0;
        let Some(redis) = &self.redis else {
            return Ok(memory.entry(&digest, now, |held| {
                let Some(kept) = &mut held.value else { return Found::Unknown };
                let found = is_own(kept.principal.as_ref());
                if found == Found::Known {
                    kept.last_seen = unix_now();
                    held.expires = now + self.ttl;
                }
                found
            }));
        };
        if let Some(Whose(whose)) = recent.get(&digest, now) {
            return Ok(is_own(whose.as_ref()));
        }
        let lazy = self.laziness();
        // Whoever is seen just before a write is due again has the whole of it.
        let life = self.ttl + lazy;
        let args = (tagged(principal), lazy.as_secs(), millis(life));
        let found: u8 = redis.run(&FIND, &[key(redis, &digest)], args).await?;
        Ok(match found {
            0 => Found::Unknown,
            1 => Found::Foreign,
            _ => {
                self.remember(&digest, principal);
                Found::Known
            }
        })
    }

    /// Keeps a new session of `principal`.
    ///
    /// # Errors
    /// Redis is out of order.
    pub(super) async fn begin(&self, id: &Id, principal: Option<&Arc<str>>) -> Result<(), Failure> {
        let (digest, now) = (id.digest(), Instant::now());
        let Some(redis) = &self.redis else {
            let at = unix_now();
            let kept = Kept { created: at, last_seen: at, principal: principal.cloned() };
            self.state.0.memory.put(&digest, kept, now + self.ttl, now);
            return Ok(());
        };
        let args = (tagged(principal), millis(self.ttl + self.laziness()));
        redis.run::<u8>(&BEGIN, &[key(redis, &digest)], args).await?;
        self.remember(&digest, principal);
        Ok(())
    }

    fn remember(&self, digest: &Digest, principal: Option<&Arc<str>>) {
        let now = Instant::now();
        self.state.0.recent.entry(digest, now, |held| {
            *held = Held { value: Some(Whose(principal.cloned())), expires: now + RECENT };
        });
    }

    fn laziness(&self) -> Duration {
        LAZINESS.min(self.ttl / 10)
    }
}

fn key(redis: &Redis, digest: &Digest) -> Key {
    redis.key(KIND, &digest.hex(), "")
}

/// The digest in a key, in hexadecimal digits.
fn digest_in(key: &Key) -> &str {
    key.as_str().rsplit_once('{').and_then(|(_, rest)| rest.split_once('}')).map_or("", |(digest, _)| digest)
}

fn tagged(principal: Option<&Arc<str>>) -> String {
    principal.map(|id| format!("={id}")).unwrap_or_default()
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// Seconds since 1970.
pub(super) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// A session, as an operator sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The first 16 digits of its digest.
    pub id: String,
    /// When it began, in seconds since 1970.
    pub created: u64,
    /// When it was last seen, to the minute.
    pub last_seen: u64,
    /// Whose it is.
    pub principal: Option<String>,
}

/// What was found, or taken away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome<T> {
    /// That.
    pub found: T,
    /// Whether all sessions were looked at.
    pub complete: bool,
}

/// Which sessions an operator means.
#[derive(Debug, Clone, Copy)]
pub enum Which<'a> {
    /// All.
    All,
    /// That of which this is the beginning of the digest: at least 16 hexadecimal digits.
    Id(&'a str),
    /// Those of one principal: by its id, whoever gave it, or by all that it is.
    Principal(&'a str),
}

impl Which<'_> {
    fn digits(&self) -> &str {
        match self {
            Self::Id(digits) => digits,
            _ => "",
        }
    }

    fn means(&self, digest: &str, principal: Option<&str>) -> bool {
        match self {
            Self::All => true,
            Self::Id(digits) => digest.starts_with(digits),
            Self::Principal(whose) => {
                let rest = principal.and_then(|principal| principal.strip_prefix(whose));
                rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(' '))
            }
        }
    }
}

impl State {
    /// Up to `most` of the sessions that are meant: those seen last come first, among those that were found.
    ///
    /// # Errors
    /// Redis is out of order.
    pub async fn list(
        &self,
        redis: Option<&Redis>,
        which: Which<'_>,
        most: usize,
    ) -> Result<Outcome<Vec<Listed>>, Failure> {
        let Outcome { found, mut complete } = match redis {
            Some(redis) => self.of_redis(redis, which, most).await?,
            None => Outcome { found: self.of_memory(which, most + 1), complete: true },
        };
        let mut listed: Vec<_> = found
            .into_iter()
            .map(|(digest, Kept { created, last_seen, principal })| {
                let id = digest.get(..16).unwrap_or(&digest).to_owned();
                Listed { id, created, last_seen, principal: principal.map(|id| id.to_string()) }
            })
            .collect();
        listed.sort_by(|one, other| other.last_seen.cmp(&one.last_seen).then_with(|| one.id.cmp(&other.id)));
        complete &= listed.len() <= most;
        listed.truncate(most);
        Ok(Outcome { found: listed, complete })
    }

    /// Takes the sessions away that are meant; how many there were. Who shows one of them begins another, here at once and
    /// at other replicas within two seconds.
    ///
    /// # Errors
    /// Redis is out of order. Some may be gone.
    pub async fn revoke(&self, redis: Option<&Redis>, which: Which<'_>) -> Result<Outcome<usize>, Failure> {
        let now = Instant::now();
        let Local { memory, recent } = &*self.0;
        let Some(redis) = redis else {
            let meant = memory.list(usize::MAX, now, |digest, kept| {
                which.means(&digest.hex(), kept.principal.as_deref()).then_some(*digest)
            });
            let gone = meant.iter().filter(|digest| memory.remove(digest, now).is_some()).count();
            return Ok(Outcome { found: gone, complete: true });
        };
        let Outcome { found, complete } = self.of_redis(redis, which, REVOKED).await?;
        let mut gone = 0;
        let digests: Vec<String> = found.into_keys().collect();
        for some in digests.chunks(AT_ONCE) {
            let keys: Vec<Key> = some.iter().map(|digest| redis.key(KIND, digest, "")).collect();
            for deleted in join_all(keys.iter().map(|key| redis.delete(key))).await {
                gone += usize::from(deleted?);
            }
        }
        let remembered = recent.list(usize::MAX, now, |digest, whose| {
            let hex = digest.hex();
            (digests.binary_search(&hex).is_ok() || which.means(&hex, whose.0.as_deref())).then_some(*digest)
        });
        for digest in remembered {
            recent.remove(&digest, now);
        }
        Ok(Outcome { found: gone, complete })
    }

    fn of_memory(&self, which: Which<'_>, most: usize) -> BTreeMap<String, Kept> {
        let pick = |digest: &Digest, kept: &Kept| {
            let digest = digest.hex();
            which.means(&digest, kept.principal.as_deref()).then(|| (digest, kept.clone()))
        };
        self.0.memory.list(most, Instant::now(), pick).into_iter().collect()
    }

    /// More than `most` are found where there are more.
    async fn of_redis(
        &self,
        redis: &Redis,
        which: Which<'_>,
        most: usize,
    ) -> Result<Outcome<BTreeMap<String, Kept>>, Failure> {
        let until = Instant::now() + PATIENCE;
        let mut walk = redis.walk(KIND, which.digits());
        let mut found = BTreeMap::new();
        while !walk.is_over() && found.len() <= most {
            if Instant::now() >= until {
                return Ok(Outcome { found, complete: false });
            }
            let keys = walk.step(redis).await?;
            for some in keys.chunks(AT_ONCE) {
                let read = join_all(some.iter().map(|key| redis.run(&READ, std::slice::from_ref(key), NONE))).await;
                for (key, read) in some.iter().zip(read) {
                    let (created, last_seen, principal): (Option<u64>, Option<u64>, Option<String>) = read?;
                    let digest = digest_in(key);
                    // It may have expired meanwhile.
                    let (Some(created), Some(last_seen)) = (created, last_seen) else { continue };
                    if which.means(digest, principal.as_deref()) {
                        let kept = Kept { created, last_seen, principal: principal.map(Into::into) };
                        found.insert(digest.to_owned(), kept);
                    }
                }
            }
        }
        Ok(Outcome { found, complete: walk.is_over() })
    }
}

const NONE: &[&str] = &[];
