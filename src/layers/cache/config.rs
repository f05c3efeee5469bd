//! What of a route is cached, and for how long. Section `cache`.

use std::num::NonZeroU32;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{
    canonical,
    key::{KeyPart, QueryName},
    tags::Template,
    warmed::Warmed,
};
use crate::{
    config::{ByteSize, Check, HumanDuration, Problems, Toggle},
    message::headers::CREDENTIALS,
    sse::Terminal,
};

/// How many answers of a route may be kept warm.
const MOST_WARM: usize = 1000;
/// The most of an answer that may be set to go to Redis, which does nothing else while it reads or writes one.
const MOST_IN_REDIS: u64 = 16 << 20;

/// What an answer takes beside its bytes: itself, the tables that it stands in.
pub(super) const OVERHEAD: u32 = 512;
/// The longest that an upstream may be asked to talk to nobody.
const MOST_RESUME: HumanDuration = HumanDuration::from_secs(3600);

/// Answers that are kept, and given again: see the module `cache`. Section `cache`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Cache")]
#[expect(clippy::struct_excessive_bools, reason = "each is a key of its own")]
pub struct Config {
    /// Of which requests answers are kept: `GET`, and `HEAD` with it, and `POST`, which needs `body` in `key`. Default
    /// `[GET]`. With none, answers are only dropped: see `invalidate`.
    pub methods: Vec<Method>,
    /// What makes a difference besides method, host, path, query, the fields that the answer names in `Vary`, and
    /// credentials: `body`, what a JSON body says, however it is written; `header:NAME`; `cookie:NAME`; `principal`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub key: Vec<KeyPart>,
    /// Parameters of the query that make no difference: `utm_source`, or `utm_*` for all that begin so. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignore_query: Vec<QueryName>,
    /// What of a JSON body makes a difference, and which bodies are cached.
    pub body: canonical::Body,
    /// The largest request body that is looked at. What is larger goes to the upstream as if there were no cache.
    /// Default `256KiB`, at most `16MiB`.
    pub max_request_body: ByteSize,
    /// Whether the answer is the same for all who ask, also for those who show who they are: by auth, or in one of the
    /// fields `authorization`, `cookie`, `proxy-authorization`, `x-api-key`, `api-key`, `x-goog-api-key`. Otherwise
    /// each of them has answers of its own. Default `false`.
    pub shared: bool,
    /// Whether the answer is the same by whatever host it is asked for, and with TLS or without. Then it is dropped by its
    /// path, whatever host is named before it. Default `false`.
    pub ignore_host: bool,
    /// How long an answer is fresh, whatever it says itself; `no-store`, `private`, `Set-Cookie` and `Vary: *` still
    /// count. Default `off`: as RFC 9111 has it. `POST` needs it, or an answer that says it.
    pub ttl: Toggle<HumanDuration>,
    /// The same for 404, 405, 410, 414 and 501 that do not say it themselves, and, for at most 10s, for 429, 500, 502,
    /// 503 and 504. No error but 404, 405, 410 and 414 takes the place of an answer that is fresh, or that
    /// `stale_if_error` would have given. Default `off`.
    pub negative_ttl: Toggle<HumanDuration>,
    /// For how long a stale answer is given while it is asked for anew. Default `off`: as the answer says.
    pub stale_while_revalidate: Toggle<HumanDuration>,
    /// For how long a stale answer is given where the upstream fails: 500, 502, 503, 504, no answer, or an open circuit
    /// breaker. Default `off`: as the answer says.
    pub stale_if_error: Toggle<HumanDuration>,
    /// Asks anew, while it is still given, for what will be stale within this time. Default `off`.
    pub refresh: Toggle<HumanDuration>,
    /// Whether `Cache-Control`, `Pragma` and `Expires` of answers count for nothing, `no-store` and `private` included.
    /// For backends that say `no-store` on every stream. Default `false`; needs `ttl`.
    pub ignore_cache_control: bool,
    /// Whether clients may ask for a fresh answer (`Cache-Control: no-cache`, `max-age`), as RFC 9111 has it. Default
    /// `true`.
    pub client_cache_control: bool,
    /// What the JSON of an answer has to say for it to be kept, `{status: [completed, failed]}`: of each path the values
    /// that pass, of which `null` is also that there is none. Default: no conditions.
    #[serde(skip_serializing_if = "canonical::When::is_empty")]
    pub when: canonical::When,
    /// Whether event streams are kept: those that came to their end, without an error and not cut short. Default
    /// `false`: each is asked for anew.
    pub record_streams: bool,
    /// The event that ends a stream, `{event: complete}` by its type or `{data: "[DONE]"}` by its data. Default: those of
    /// the APIs of OpenAI, Anthropic and Ollama; other streams have none, and are not kept.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub terminal: Option<Terminal>,
    /// How a stream that was kept is given again: all at once (`instant`), or with its pauses (`paced`). Default
    /// `instant`.
    pub replay: Replay,
    /// How many times faster than it came a stream is given again that is `paced`, 0.1 to 1000. Default 1.
    pub speed: f64,
    /// The largest answer that is kept. Default `1MiB`, at most `1GiB`.
    pub max_body: ByteSize,
    /// How much memory the answers of the route may take. Default `64MiB`.
    pub max_bytes: ByteSize,
    /// How many there may be. Default `off`: as many as have room.
    pub max_entries: Toggle<NonZeroU32>,
    /// How long a request waits for the head of an answer that another one asked for, before it goes on by itself. Default
    /// `30s`.
    pub coalesce_timeout: HumanDuration,
    /// Whether an answer is read to its end, to be kept, when all who asked for it have left. Default `false`: the
    /// upstream's request is cancelled.
    pub finish_fill: bool,
    /// For how long an event stream can be taken up again after its client has left. Its events get an `id`, unless the
    /// upstream gives them some, and who comes with the last one in `Last-Event-ID`, and asks the same as the same, gets what
    /// came after it and then what comes, whether or not the stream may be shared or kept; `methods` and `key` hold. For so
    /// long the upstream's request goes on, once the client has got an event, and what came of it is kept. With `redis` it
    /// is copied there while it comes, encrypted, and every replica gives the rest; of one whose replica is gone what is
    /// there, and then it breaks off. When it is gone, was purged, or Redis is out of order, a new stream begins, with new
    /// ids. Of one that is larger than `max_body`, and in Redis than `redis.max_body`, the last part is kept; all of them
    /// take no more than `max_bytes` beside what is kept: then those that ended first go first, and what has no room cannot
    /// be taken up. Of those that nobody reads and whose upstream goes on, a principal has at most 8, or an address (IPv6: a
    /// /64) where there is no principal, and the route 1024, or a quarter of the `max_in_flight` of `concurrency`, its own
    /// or the upstream's; then those that were left first are let go. Default `off`; at most `1h`.
    ///
    /// A stream that says `no-transform` is left as it is, unless `ignore_cache_control` is set.
    pub resume: Toggle<HumanDuration>,
    /// Names under which answers are dropped together: `bot:{id}`, with parameters of the route's path, `{query:NAME}` and
    /// `{header:NAME}`. They are those of the request that was answered: what makes a difference for them should be part
    /// of `key`, or named in `Vary`. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<Template>,
    /// The tags that a request of another method drops, on all routes, when it is answered by a 2xx or 3xx. Default none:
    /// what has the same URL is dropped in any case (RFC 9111 §4.4), also by a route without a cache.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub invalidate: Vec<Template>,
    /// What is asked for, by `GET` and without credentials, when the configuration takes effect, and again before it is
    /// stale: `refresh` before, or in the last tenth of its time. URLs as clients ask for them,
    /// `https://api.example.com/tools`, or, with `ignore_host`, paths: `/tools?all`. At most 1000. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warm: Vec<Warmed>,
    /// What is kept in Redis, too, where all replicas find it: `off`, or which answers. Default: on where there is a section
    /// `redis`. A purge is then one on all replicas; one that is asked for while Redis is out of order holds on the replica
    /// that was asked, and on the others when Redis is back.
    pub redis: Toggle<InRedis>,
}

/// Which answers are kept in Redis. Section `redis` of `cache`.
///
/// They live there for a day at most, and with an `ETag` or `Last-Modified`, once they are stale, for as long again as they
/// were fresh, at least a minute. Limits, sessions and purges are in the same Redis: give it a `maxmemory`. While more than
/// 85 % of it is used, and for 5s after it took no more, no answer is written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "CacheInRedis")]
pub struct InRedis {
    /// The largest body that goes there, and the most of a stream that can be taken up again. Default `256KiB`, at most
    /// `16MiB`.
    pub max_body: ByteSize,
    /// Larger bodies are compressed there, with zstd. Default `4KiB`.
    pub compress_above: ByteSize,
}

impl Default for InRedis {
    fn default() -> Self {
        Self { max_body: ByteSize::from_kib(256), compress_above: ByteSize::from_kib(4) }
    }
}

/// A method whose answers are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "UPPERCASE")]
#[schemars(rename = "CacheMethod")]
pub enum Method {
    /// `GET`, and `HEAD` with it.
    Get,
    /// `POST`: a question in a body.
    Post,
}

/// How a stream is given again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Replay {
    /// All at once.
    #[default]
    Instant,
    /// With the pauses that it had.
    Paced,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            methods: vec![Method::Get],
            key: Vec::new(),
            ignore_query: Vec::new(),
            body: canonical::Body::default(),
            max_request_body: ByteSize::from_kib(256),
            shared: false,
            ignore_host: false,
            ttl: Toggle::Off,
            negative_ttl: Toggle::Off,
            stale_while_revalidate: Toggle::Off,
            stale_if_error: Toggle::Off,
            refresh: Toggle::Off,
            ignore_cache_control: false,
            client_cache_control: true,
            when: canonical::When::default(),
            record_streams: false,
            terminal: None,
            replay: Replay::Instant,
            speed: 1.0,
            max_body: ByteSize::from_kib(1024),
            max_bytes: ByteSize::from_kib(64 << 10),
            max_entries: Toggle::Off,
            coalesce_timeout: HumanDuration::from_secs(30),
            finish_fill: false,
            resume: Toggle::Off,
            tags: Vec::new(),
            invalidate: Vec::new(),
            warm: Vec::new(),
            redis: Toggle::On(InRedis::default()),
        }
    }
}

impl Config {
    /// The parameters of the path that tags are made of, each with its key.
    pub fn parameters(&self) -> impl Iterator<Item = (String, &str)> {
        let named = [("tags", &self.tags), ("invalidate", &self.invalidate)];
        named.into_iter().flat_map(|(key, templates)| {
            templates.iter().enumerate().flat_map(move |(n, template)| {
                template.parameters().map(move |parameter| (format!("{key}.{n}"), parameter))
            })
        })
    }
}

impl Config {
    /// Of a section whose `methods` are empty, which only drops answers.
    fn check_only_drops(&self, problems: &mut Problems) {
        if self.invalidate.is_empty() {
            problems.add("methods", "is empty, and nothing is in `invalidate`: the section does nothing");
            return;
        }
        let drops = Self {
            methods: Vec::new(),
            invalidate: self.invalidate.clone(),
            ignore_host: self.ignore_host,
            ignore_query: self.ignore_query.clone(),
            redis: self.redis,
            ..Self::default()
        };
        if *self != drops {
            let told = "is empty: then all has no effect but `invalidate`, `ignore_host` and `ignore_query`";
            problems.add("methods", told);
        }
    }

    /// What makes a difference.
    fn check_key(&self, problems: &mut Problems) {
        let posts = self.methods.contains(&Method::Post);
        let keyed = self.key.contains(&KeyPart::Body);
        if posts && !keyed {
            problems.add("key", "lacks `body`, without which all that is sent by POST would get the same answer");
        }
        if keyed && !posts {
            problems.add("key", "holds `body`, but `methods` does not hold `POST`");
        }
        if !posts && self.body != canonical::Body::default() {
            problems.add("body", "has no effect: `methods` does not hold `POST`");
        }
        if !posts && self.max_request_body != Self::default().max_request_body {
            problems.add("max_request_body", "has no effect: `methods` does not hold `POST`");
        }
        for (n, name) in self.ignore_query.iter().enumerate() {
            let mut others = self.ignore_query.iter().enumerate();
            // Of two that are the same, the later one.
            let above = others.find(|(m, other)| other.covers(name) && (*m < n || *other != name));
            if let Some((_, above)) = above {
                problems.add(format!("ignore_query.{n}"), format!("`{name}`: `{above}` leaves it out already"));
            }
        }
    }

    fn check_warm(&self, problems: &mut Problems) {
        if self.warm.is_empty() {
            return;
        }
        if !self.methods.contains(&Method::Get) {
            problems.add("warm", "is asked for by `GET`, which `methods` does not hold");
        }
        if self.key.contains(&KeyPart::Principal) {
            problems.add("warm", "is asked for by no principal, and `principal` is in `key`: nobody would get it");
        }
        if self.warm.len() > MOST_WARM {
            problems.add("warm", format!("has {} entries: at most {MOST_WARM}", self.warm.len()));
        }
        for (n, warmed) in self.warm.iter().enumerate() {
            let key = format!("warm.{n}");
            if self.warm.iter().take(n).any(|other| other == warmed) {
                problems.add(&key, format!("`{warmed}` is there already"));
            }
            if !warmed.has_host() && !self.ignore_host {
                let how = "write it as clients ask for it, `http://HOST[:PORT]` before it, or set `ignore_host: true`";
                problems.add(key, format!("`{warmed}` has no host, which answers are kept by: {how}"));
            }
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        for (n, method) in self.methods.iter().enumerate() {
            if self.methods.iter().take(n).any(|other| other == method) {
                problems.add("methods", "holds a method twice");
            }
        }
        if self.methods.is_empty() {
            self.check_only_drops(problems);
        }
        self.check_key(problems);
        self.check_warm(problems);
        problems.at("body", |problems| self.body.check(problems));
        problems.at("when", |problems| self.when.check(problems));
        let named = [
            ("ttl", self.ttl),
            ("negative_ttl", self.negative_ttl),
            ("stale_while_revalidate", self.stale_while_revalidate),
            ("stale_if_error", self.stale_if_error),
            ("refresh", self.refresh),
            ("resume", self.resume),
        ];
        for (key, value) in named {
            if value.as_ref().is_some_and(|value| value.is_zero()) {
                problems.add(key, "is 0: switch it off instead");
            }
        }
        if let Toggle::On(resume) = self.resume
            && resume > MOST_RESUME
        {
            problems.add("resume", format!("is {resume}: must be at most {MOST_RESUME}"));
        }
        if self.coalesce_timeout.is_zero() {
            problems.add("coalesce_timeout", "is 0: must be longer");
        }
        for (key, templates) in [("tags", &self.tags), ("invalidate", &self.invalidate)] {
            for (n, template) in templates.iter().enumerate() {
                let ignored = |name: &&str| self.ignore_query.iter().any(|ignored| ignored.is(name.as_bytes()));
                if key == "tags"
                    && let Some(name) = template.queries().find(ignored)
                {
                    let told = format!(
                        "names `{{query:{name}}}`, which `ignore_query` leaves out: answers are shared by many of it"
                    );
                    problems.add(format!("{key}.{n}"), told);
                }
                for name in template.headers().filter(|name| CREDENTIALS.contains(name)) {
                    let told = format!("names `{{header:{name}}}`, which is a credential: many can read a tag");
                    problems.add(format!("{key}.{n}"), told);
                }
            }
        }
        if self.ignore_cache_control && self.ttl.is_off() {
            problems.add("ignore_cache_control", "needs `ttl`: nothing else would say how long an answer is fresh");
        }
        if let (Toggle::On(refresh), Toggle::On(ttl)) = (self.refresh, self.ttl)
            && refresh >= ttl
        {
            problems.add("refresh", format!("is {refresh}: must be shorter than `ttl` ({ttl})"));
        }
        if self.terminal.is_some() && !self.record_streams {
            problems.add("terminal", "says how a stream ends, but none is kept: `record_streams` is false");
        }
        if self.replay == Replay::Paced && !self.record_streams {
            problems.add("replay", "is `paced`, but no stream is kept: `record_streams` is false");
        }
        if !(0.1..=1000.0).contains(&self.speed) {
            problems.add("speed", format!("is {}: must be 0.1 to 1000", self.speed));
        } else if self.replay != Replay::Paced && self.speed.to_bits() != Self::default().speed.to_bits() {
            problems.add("speed", "has no effect without `replay: paced`");
        }
        let sizes = [
            ("max_request_body", self.max_request_body, 16 << 20),
            ("max_body", self.max_body, 1 << 30),
            ("max_bytes", self.max_bytes, u64::MAX),
        ];
        for (key, size, most) in sizes {
            if size.get() == 0 || size.get() > most {
                problems.add(key, format!("is {size}: must be more than 0 and at most {}", ByteSize::from_bytes(most)));
            }
        }
        if let Toggle::On(InRedis { max_body, .. }) = self.redis
            && (max_body.get() == 0 || max_body.get() > MOST_IN_REDIS)
        {
            let most = ByteSize::from_bytes(MOST_IN_REDIS);
            problems.add("redis.max_body", format!("is {max_body}: must be more than 0 and at most {most}"));
        }
        if self.max_body.get().saturating_add(OVERHEAD.into()) > self.max_bytes.get() {
            let (body, all) = (self.max_body, self.max_bytes);
            let told = format!("is {body}: with its head, {OVERHEAD}B and more, it must fit in `max_bytes` ({all})");
            problems.add("max_body", told);
        }
    }
}
