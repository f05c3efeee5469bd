//! Lua that runs inside Redis, in one step.
//!
//! A script is sent by its hash (`EVALSHA`). Where Redis does not know it yet, or no more (`SCRIPT FLUSH`, a restart, a
//! failover, another node of the cluster), it is sent whole (`EVAL`) within the same deadline, and is known from then
//! on. A script runs once in either case.
//!
//! All keys of a script are handed in as `KEYS` and have the same [tag](super::Key), so that a cluster can run it. Each
//! key that it writes gets a time to live in the same step: a key without one would stay for ever.

use std::sync::OnceLock;

/// A script, known by the hash of its text. A `static`.
#[derive(Debug)]
pub struct Script {
    name: &'static str,
    text: &'static str,
    hash: OnceLock<String>,
}

impl Script {
    /// The script `text`, which logs call `name`.
    #[must_use]
    pub const fn new(name: &'static str, text: &'static str) -> Self {
        Self { name, text, hash: OnceLock::new() }
    }

    /// What logs call it.
    #[must_use]
    pub const fn name(&self) -> &'static str {
        self.name
    }

    /// The Lua.
    #[must_use]
    pub const fn text(&self) -> &'static str {
        self.text
    }

    /// The SHA-1 of the text in hexadecimal digits, as Redis names it.
    #[must_use]
    pub fn hash(&self) -> &str {
        self.hash.get_or_init(|| ::redis::Script::new(self.text).get_hash().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hash_is_what_redis_calls_it() {
        static ONE: Script = Script::new("one", "return 1");
        assert_eq!(ONE.hash(), "e0e1f9fabfc9d4800c877a703b823ac0578ff8db");
    }
}
