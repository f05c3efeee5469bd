//! What has been purged. A purge is a number: each answer has the one that was the last when its request was sent, and a
//! purge with a higher one is about it. So a purge need not find what it is about: not the answers that are stored, nor
//! those that are on their way, which are not stored when they are there.

use std::{
    collections::{HashMap, hash_map::RandomState},
    fmt,
    hash::{BuildHasher, Hasher},
    sync::atomic::{AtomicU64, Ordering},
};

use http::Uri;
use parking_lot::RwLock;

use super::{
    key::{self, QueryName},
    tags::Glob,
};
use crate::message::path::normal;

/// How many names are known of that were purged. Beyond, those that were purged first are forgotten, and with them all
/// answers that are older.
const NAMES: usize = 1 << 16;
/// The same for patterns, each of which is tried for each answer that is older.
const GLOBS: usize = 64;

/// What a purge, and an answer, is called.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Target {
    /// All of a path with its query, `/a?b`, of any host, or of one with its name before it: `host/a?b`.
    Url(Box<str>),
    /// All that have this tag.
    Tag(Box<str>),
    /// All whose path with its query is like this pattern.
    Glob(Glob),
    /// Everything.
    All,
}

impl Target {
    /// What a URL, or the path of one, names. Scheme and fragment do not count.
    #[must_use]
    pub fn url(text: &str) -> Option<Self> {
        let (scheme, rest) = match text.split_once("://") {
            Some((scheme, rest)) if !scheme.contains(['/', '?']) => (scheme, rest),
            _ => ("", text),
        };
        let rest = rest.split('#').next().unwrap_or_default();
        let (host, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
        let path = if path.starts_with('/') { path.to_owned() } else { format!("/{path}") };
        let path = normal(&path);
        let is_valid = !rest.is_empty() && path.parse::<Uri>().is_ok();
        let host = key::authority(host, scheme.eq_ignore_ascii_case("https"));
        is_valid.then(|| Self::Url(format!("{host}{path}").into()))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(url) => write!(f, "url {url}"),
            Self::Tag(tag) => write!(f, "tag {tag}"),
            Self::Glob(glob) => write!(f, "glob {glob}"),
            Self::All => f.write_str("all"),
        }
    }
}

impl Target {
    /// What else the URL of a host names: answers that are the same for any.
    pub(super) fn of_any_host(&self) -> Option<Self> {
        let Self::Url(url) = self else { return None };
        let (host, path) = url.split_at(url.find('/')?);
        (!host.is_empty()).then(|| Self::Url(format!("{ANY_HOST}{path}").into()))
    }
}

/// Path and query in their [normal] form, without the parameters that make no difference: as all those have it that share
/// an answer.
pub(super) fn path(uri: &Uri, ignored: &[QueryName]) -> String {
    match uri.query().and_then(|query| key::without(ignored, query)) {
        Some(query) => normal(&format!("{}?{query}", uri.path())).into_owned(),
        None => normal(uri.path()).into_owned(),
    }
}

/// The host of answers that are the same for any: a URL of whatever host names them.
pub(super) const ANY_HOST: &str = "*";

/// What is left of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Standing {
    /// All of it.
    Valid,
    /// It may be used as a stale one.
    Soft,
    /// Nothing.
    Gone,
}

/// The names of an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Names {
    pub(super) host: Box<str>,
    /// With its query, in the [normal] form.
    pub(super) path: Box<str>,
    pub(super) tags: Box<[Box<str>]>,
}

/// All purges of the process.
#[derive(Debug, Default)]
pub(super) struct Purges {
    last: AtomicU64,
    known: RwLock<Known>,
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Known {
    /// By hashes: where two names have the same one, a purge of the one is one of the other.
    urls: HashMap<u64, Marks>,
    tags: HashMap<u64, Marks>,
    globs: Vec<(Glob, Marks)>,
    all: Marks,
}

/// The last purges of something: for good, and those after which it may be used as a stale one.
#[derive(Debug, Clone, Copy, Default)]
struct Marks {
    hard: u64,
    soft: u64,
}

impl Marks {
    fn note(&mut self, number: u64, soft: bool) {
        *(if soft { &mut self.soft } else { &mut self.hard }) = number;
    }

    fn of(self, number: u64) -> Standing {
        if self.hard > number {
            Standing::Gone
        } else if self.soft > number {
            Standing::Soft
        } else {
            Standing::Valid
        }
    }

    fn last(self) -> u64 {
        self.hard.max(self.soft)
    }
}

impl Purges {
    /// The number of the last purge: for who sends a request now.
    pub(super) fn now(&self) -> u64 {
        self.last.load(Ordering::Acquire)
    }

    /// Purges. Which purge it is.
    pub(super) fn add(&self, target: &Target, soft: bool) -> u64 {
        let mut known = self.known.write();
        // Under the lock: who has read the number before looks after it.
        let number = self.last.fetch_add(1, Ordering::AcqRel) + 1;
        match target {
            Target::Url(url) => known.urls.entry(self.hash([url])).or_default().note(number, soft),
            Target::Tag(tag) => known.tags.entry(self.hash([tag])).or_default().note(number, soft),
            Target::Glob(glob) => {
                let place = known.globs.iter().position(|(other, _)| other == glob);
                let mut marks = place.map_or_else(Marks::default, |place| known.globs.swap_remove(place).1);
                marks.note(number, soft);
                known.globs.push((glob.clone(), marks));
            }
            Target::All => known.all.note(number, soft),
        }
        known.forget();
        number
    }

    /// What is left of an answer whose request was sent when `number` was the last purge.
    pub(super) fn standing(&self, number: u64, names: &Names) -> Standing {
        if self.now() == number {
            return Standing::Valid;
        }
        let known = self.known.read();
        let mut standing = known.all.of(number);
        let mut found =
            |marks: Option<&Marks>| standing = standing.max(marks.map_or(Standing::Valid, |marks| marks.of(number)));
        if !known.urls.is_empty() {
            found(known.urls.get(&self.hash([&names.path])));
            found(known.urls.get(&self.hash([&names.host, &names.path])));
        }
        for tag in &names.tags {
            found(known.tags.get(&self.hash([tag])));
        }
        for (glob, marks) in &known.globs {
            found((marks.last() > number && glob.matches(&names.path)).then_some(marks));
        }
        standing
    }
}

impl Purges {
    /// Of these, one after the other.
    fn hash<'a>(&self, parts: impl IntoIterator<Item = &'a Box<str>>) -> u64 {
        let mut hasher = self.hasher.build_hasher();
        for part in parts {
            hasher.write(part.as_bytes());
        }
        hasher.finish()
    }
}

impl Known {
    /// Keeps the bounds.
    fn forget(&mut self) {
        if self.urls.len() + self.tags.len() > NAMES {
            let mut numbers: Vec<u64> =
                self.urls.values().chain(self.tags.values()).map(|marks| marks.last()).collect();
            let (_, &mut middle, _) = numbers.select_nth_unstable(NAMES / 2);
            self.urls.retain(|_, marks| marks.last() > middle);
            self.tags.retain(|_, marks| marks.last() > middle);
            self.all.hard = self.all.hard.max(middle);
        }
        if self.globs.len() > GLOBS {
            let oldest = self.globs.iter().map(|(_, marks)| marks.last()).min().unwrap_or_default();
            self.globs.retain(|(_, marks)| marks.last() > oldest);
            self.all.hard = self.all.hard.max(oldest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(path: &str, tags: &[&str]) -> Names {
        Names { host: "a.test".into(), path: path.into(), tags: tags.iter().map(|tag| Box::from(*tag)).collect() }
    }

    #[test]
    fn a_purge_is_about_what_was_asked_for_before_it() {
        let purges = Purges::default();
        let answer = names("/a?b", &["x", "y"]);
        for target in [
            Target::Url("/a?b".into()),
            Target::Url("a.test/a?b".into()),
            Target::Tag("y".into()),
            Target::Glob("/a*".parse().unwrap()),
            Target::All,
        ] {
            let before = purges.now();
            purges.add(&target, true);
            assert_eq!(purges.standing(before, &answer), Standing::Soft, "{target:?}");
            purges.add(&target, false);
            assert_eq!(purges.standing(before, &answer), Standing::Gone, "{target:?}");
            assert_eq!(purges.standing(purges.now(), &answer), Standing::Valid, "{target:?}");
        }
        let before = purges.now();
        for target in [
            Target::Url("/a".into()),
            Target::Url("b.test/a?b".into()),
            Target::Tag("z".into()),
            Target::Glob("/b*".parse().unwrap()),
        ] {
            purges.add(&target, false);
            assert_eq!(purges.standing(before, &answer), Standing::Valid, "{target:?}");
        }
    }

    #[test]
    fn a_url_is_known_by_its_host_path_and_query() {
        for (text, url) in [
            ("/a?b=c", "/a?b=c"),
            ("http://A.test:80/a", "a.test/a"),
            ("https://a.test:443/a#b", "a.test/a"),
            ("a.test:8080/a?b", "a.test:8080/a?b"),
            ("a.test", "a.test/"),
            ("/go?to=http://b.test/c", "/go?to=http://b.test/c"),
            ("/a b/%7e", "/a%20b/~"),
        ] {
            assert_eq!(Target::url(text), Some(Target::Url(url.into())));
        }
        assert_eq!(Target::url(""), None);
    }

    #[test]
    fn what_was_forgotten_counts_as_purged() {
        let purges = Purges::default();
        let old = purges.now();
        for n in 0..=NAMES {
            assert_eq!(purges.standing(old, &names("/other", &[])), Standing::Valid);
            purges.add(&Target::Tag(n.to_string().into()), false);
        }
        assert_eq!(purges.standing(old, &names("/other", &[])), Standing::Gone, "nobody knows any more");
        let new = purges.now() - 1;
        assert_eq!(purges.standing(new, &names("/other", &["1"])), Standing::Valid);
        assert_eq!(purges.standing(new, &names("/other", &[&NAMES.to_string()])), Standing::Gone);
        for n in 0..=GLOBS {
            purges.add(&Target::Glob(format!("/{n}").parse().unwrap()), false);
        }
        assert_eq!(purges.standing(new, &names("/other", &["1"])), Standing::Gone);
        assert!(purges.known.read().globs.len() <= GLOBS);
    }
}
