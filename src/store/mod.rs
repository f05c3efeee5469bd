//! Where policies keep what they count and remember: Redis, shared by all replicas, and a bounded map in memory.
//!
//! Redis is an accelerator and no dependency. sidegate starts without it, no call waits for longer than
//! [`Config::timeout`], and while it is out of order calls fail at once with [`Failure::Unavailable`]: a
//! [`breaker`] opens, and a task of the store's own asks until Redis answers again. What a policy does meanwhile
//! is its own decision; most do the same in [`memory`], for this replica alone.
//!
//! By itself the store only connects, pings and reports.
//!
//! Every key has the form `PREFIX:VERSION:KIND:{TAG}:REST` and lives for a limited time. Those with the same [`Key`] tag
//! live on one node of a cluster, and one script may use them together.

pub mod breaker;
pub mod config;
pub mod memory;
pub mod redis;
pub mod scripts;

use std::{fmt, sync::Arc};

pub use ::redis::{FromRedisValue, ToRedisArgs};

pub use self::{
    config::Config,
    redis::{Figures, Heard, Memory, Redis, State, Subscription, Walk},
    scripts::Script,
};

/// The version of what is kept: another one reads nothing of what this one wrote.
const VERSION: &str = "1";

/// The longest `PREFIX` in bytes.
const MAX_PREFIX: usize = 64;

/// The name of something in Redis: `PREFIX:VERSION:KIND:{TAG}:REST`. Cheap to clone.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Key(Arc<str>);

impl Key {
    /// `kind` says whose it is, as in `limit`. What has the same `tag` is on one node of a cluster. `rest` may hold
    /// anything but a credential; who makes it of what a client sent bounds its length.
    #[must_use]
    pub fn new(prefix: &str, kind: &'static str, tag: &str, rest: &str) -> Self {
        let mut key = String::with_capacity(prefix.len() + kind.len() + tag.len() + rest.len() + 8);
        for part in [prefix, ":", VERSION, ":", kind, ":{"] {
            key.push_str(part);
        }
        if tag.is_empty() {
            // Redis ignores an empty tag.
            key.push('_');
        }
        for c in tag.chars() {
            match c {
                // They end a tag.
                '{' => key.push_str("%7B"),
                '}' => key.push_str("%7D"),
                '%' => key.push_str("%25"),
                c => key.push(c),
            }
        }
        key.push_str("}:");
        key.push_str(rest);
        Self(key.into())
    }

    /// The name of `rest` below this one, which it stands right behind: for who makes many that begin alike.
    #[must_use]
    pub fn with(&self, rest: impl fmt::Display) -> Self {
        Self(format!("{}{rest}", self.0).into())
    }

    /// The beginning of the names of `kind`, and, as far as it is given, of their tags.
    fn beginning(prefix: &str, kind: &str, tag: &str) -> String {
        format!("{prefix}:{VERSION}:{kind}:{{{tag}")
    }

    /// As Redis knows it.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl memory::Weigh for Key {
    fn weight(&self) -> usize {
        self.0.len()
    }
}

/// Why a call brought nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Failure {
    /// Not asked: there is no connection, or Redis has failed and is being probed. Costs no time.
    Unavailable,
    /// No answer within the deadline. Whether the call took effect is not known.
    Timeout,
    /// The connection broke. Whether the call took effect is not known.
    Lost,
    /// It is up but does not serve yet, or not now: `LOADING`, `BUSY`, `MASTERDOWN`, `CLUSTERDOWN`, `TRYAGAIN`.
    NotReady,
    /// It is a replica (`READONLY`): there was a failover.
    ReadOnly,
    /// It takes no more data: `OOM`, `MISCONF`, `NOREPLICAS`.
    Full,
    /// It does not know who asks, or the password is wrong: `NOAUTH`, `WRONGPASS`.
    Unauthorized,
    /// The user's ACL does not allow it: `NOPERM`.
    Forbidden,
    /// It is one of a cluster, and the configuration does not say so: `MOVED`, `ASK`.
    Clustered,
    /// The call is wrong, or the answer is not what was expected: a mistake in sidegate. `CROSSSLOT` is one.
    Refused,
}

/// What a failure says about Redis.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Charge {
    /// Nothing: it answered, and quickly.
    Nothing,
    /// It counts: so many in a row open the breaker.
    Counts,
    /// The breaker opens.
    Trips,
}

impl Failure {
    /// All that a call can come to that was made: all but [`Unavailable`](Self::Unavailable).
    pub const ASKED: [Self; 9] = [
        Self::Timeout,
        Self::Lost,
        Self::NotReady,
        Self::ReadOnly,
        Self::Full,
        Self::Unauthorized,
        Self::Forbidden,
        Self::Clustered,
        Self::Refused,
    ];

    /// The metric label and the word in logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Unavailable => "unavailable",
            Self::Timeout => "timeout",
            Self::Lost => "lost",
            Self::NotReady => "not_ready",
            Self::ReadOnly => "read_only",
            Self::Full => "full",
            Self::Unauthorized => "unauthorized",
            Self::Forbidden => "forbidden",
            Self::Clustered => "clustered",
            Self::Refused => "refused",
        }
    }

    /// What it says about Redis. What trips also ends the connection: the next one may lead to another master. In a
    /// `cluster` it may be one node of several that failed, and what is certain only counts.
    #[must_use]
    pub const fn charge(self, cluster: bool) -> Charge {
        match self {
            // Answers in no time, and may well serve the next call.
            Self::Unavailable | Self::Full | Self::Forbidden | Self::Clustered | Self::Refused => Charge::Nothing,
            Self::Timeout => Charge::Counts,
            Self::Lost | Self::NotReady | Self::ReadOnly | Self::Unauthorized if cluster => Charge::Counts,
            Self::Lost | Self::NotReady | Self::ReadOnly | Self::Unauthorized => Charge::Trips,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unavailable => "redis is out of order and was not asked",
            Self::Timeout => "redis did not answer in time",
            Self::Lost => "the connection to redis broke",
            Self::NotReady => "redis does not serve yet",
            Self::ReadOnly => "redis is a replica",
            Self::Full => "redis takes no more data",
            Self::Unauthorized => "redis does not accept user or password",
            Self::Forbidden => "the redis user may not do that",
            Self::Clustered => "redis is a cluster: set `redis.cluster: true`",
            Self::Refused => "redis refused the call",
        })
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_prefix_version_and_one_tag() {
        assert_eq!(Key::new("sidegate", "limit", "chat", "ip:1.2.3.4").as_str(), "sidegate:1:limit:{chat}:ip:1.2.3.4");
        assert_eq!(Key::new("a", "limit", "/users/{id}%", "").as_str(), "a:1:limit:{/users/%7Bid%7D%25}:");
        assert_eq!(Key::new("a", "session", "", "x").as_str(), "a:1:session:{_}:x");
        assert_ne!(Key::new("a", "k", "{", ""), Key::new("a", "k", "%7B", ""), "two tags stay two");
    }

    #[test]
    fn failures_have_labels_of_their_own() {
        let labels: std::collections::HashSet<_> = Failure::ASKED.iter().map(|failure| failure.as_str()).collect();
        assert_eq!(labels.len(), Failure::ASKED.len());
    }
}
