//! What Redis knows of purges, so that an answer in it need not be found to be dropped. Pure.
//!
//! Each name that was purged has a mark there: a number that nobody else has, anew at each purge. An answer has the marks
//! of its names that were there before its upstream was asked; where they are others now, it was purged since, wherever
//! it was on its way then. There is no clock in it, and no order: only the same, and not the same.
//!
//! A mark must outlive what was there before it was made: see [`LIVES`]. There are at most [`PLACES`] for urls and tags
//! each: two names may share a mark, and are then purged together.

use std::time::Duration;

use super::{
    key::checksum,
    purge::{Names, Standing, Target},
    tags::Glob,
};

/// The longest that an answer lives in Redis, from when its marks were read.
pub(super) const MOST: Duration = Duration::from_secs(24 * 3600);
/// How long a mark lives: longer than all that it is about.
pub(super) const LIVES: Duration = Duration::from_secs(25 * 3600);
/// Marks of urls, and of tags: about 100 bytes each. Who purges one drops what a millionth of the others have.
const PLACES: u64 = 1 << 20;
/// Patterns that are remembered. What is older than the last of them counts as purged by any.
pub(super) const GLOBS: usize = 64;
/// The end of the list of patterns, before the first of them.
pub(super) const NO_GLOB: &str = "-";
/// What the marks of everything and of patterns are called in Redis.
const ALL: &str = "all";
pub(super) const OF_GLOBS: &str = "globs";

/// What the mark of a target is called in Redis; patterns have one for all of them, and a list.
pub(super) fn place(target: &Target) -> Option<String> {
    match target {
        Target::Url(url) => Some(of_url(url.as_bytes())),
        Target::Tag(tag) => Some(of("t", tag.as_bytes())),
        Target::All => Some(ALL.to_owned()),
        Target::Glob(_) => None,
    }
}

fn of_url(url: &[u8]) -> String {
    of("u", url)
}

fn of(kind: &str, name: &[u8]) -> String {
    format!("{kind}{:05x}", checksum(name) % PLACES)
}

/// What the marks of these names are called, in the order in which [`Marks`] has them.
pub(super) fn places(names: &Names) -> Vec<String> {
    let urls = [of_url(names.path.as_bytes()), of_url(format!("{}{}", names.host, names.path).as_bytes())];
    let tags = names.tags.iter().map(|tag| of("t", tag.as_bytes()));
    [OF_GLOBS, ALL].map(str::to_owned).into_iter().chain(urls).chain(tags).collect()
}

/// The marks of an answer's names: the first is that of patterns, an empty one where there is none. Each of the others is
/// `HARD:SOFT`.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Marks(pub(super) Box<[Box<[u8]>]>);

/// What marks say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Changed {
    /// So much is left.
    To(Standing),
    /// So much at most: the patterns have to be looked at.
    Globs(Standing),
}

impl Marks {
    /// As Redis gave them.
    pub(super) fn of(found: impl IntoIterator<Item = Option<Vec<u8>>>) -> Self {
        Self(found.into_iter().map(|mark| mark.unwrap_or_default().into()).collect())
    }

    /// What is left of an answer with these marks, where they are `now` those.
    pub(super) fn changed(&self, now: &Self) -> Changed {
        let ([globs, own @ ..], [globs_now, now @ ..]) = (&*self.0, &*now.0) else {
            return Changed::To(Standing::Gone);
        };
        if own.len() != now.len() {
            return Changed::To(Standing::Gone);
        }
        let hard = |mark: &[u8]| mark.split(|&byte| byte == b':').next().map(<[u8]>::to_vec).unwrap_or_default();
        let each = own.iter().zip(now).map(|(own, now)| match own == now {
            true => Standing::Valid,
            false if hard(own) == hard(now) => Standing::Soft,
            false => Standing::Gone,
        });
        let standing = each.max().unwrap_or(Standing::Gone);
        if globs == globs_now || standing == Standing::Gone { Changed::To(standing) } else { Changed::Globs(standing) }
    }

    /// The last pattern that it has survived.
    pub(super) fn glob(&self) -> &[u8] {
        self.0.first().map(|glob| &**glob).unwrap_or_default()
    }
}

/// A line of the list of patterns.
pub(super) fn line(number: u64, glob: &Glob, soft: bool) -> String {
    format!("{number:x}:{}:{glob}", u8::from(soft))
}

/// What is left of an answer with this path after all patterns of the list that are newer than `survived`.
pub(super) fn after_globs(lines: &[Vec<u8>], survived: &[u8], path: &str) -> Standing {
    let survived = if survived.is_empty() { NO_GLOB.as_bytes() } else { survived };
    let mut standing = Standing::Valid;
    for line in lines {
        let mut parts = line.splitn(3, |&byte| byte == b':');
        if parts.next() == Some(survived) {
            return standing;
        }
        let soft = if parts.next() == Some(b"1") { Standing::Soft } else { Standing::Gone };
        let glob = parts.next().and_then(|glob| std::str::from_utf8(glob).ok()?.parse().ok());
        // What cannot be read may be about anything.
        standing = standing.max(match glob {
            Some(glob) if Glob::matches(&glob, path) => soft,
            Some(_) => Standing::Valid,
            None => Standing::Gone,
        });
    }
    // So many were there since that it is not known any more.
    Standing::Gone
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Names {
        Names { host: "a.test".into(), path: "/a?b".into(), tags: ["x", "y"].map(Box::from).into() }
    }

    fn marks(all: [&str; 6]) -> Marks {
        Marks::of(all.map(|mark| (!mark.is_empty()).then(|| mark.as_bytes().to_vec())))
    }

    #[test]
    fn an_answer_has_a_place_for_all_by_which_it_can_be_purged() {
        let places = places(&names());
        assert_eq!(places.len(), 6);
        for target in [
            Target::Url("/a?b".into()),
            Target::Url("a.test/a?b".into()),
            Target::Tag("x".into()),
            Target::Tag("y".into()),
            Target::All,
        ] {
            assert!(places.contains(&place(&target).unwrap()), "{target:?}");
        }
        for target in [Target::Url("/a".into()), Target::Url("x".into()), Target::Tag("/a?b".into())] {
            assert!(!places.contains(&place(&target).unwrap()), "{target:?}");
        }
    }

    #[test]
    fn a_mark_that_is_another_is_a_purge() {
        let own = marks(["", "", "1:", "", "2:3", ""]);
        assert_eq!(own.changed(&own), Changed::To(Standing::Valid));
        for (now, left) in [
            (["", "9:", "1:", "", "2:3", ""], Standing::Gone),
            (["", ":9", "1:", "", "2:3", ""], Standing::Soft),
            (["", "", "1:9", "", "2:3", ""], Standing::Soft),
            (["", "", "9:", "", "2:3", ""], Standing::Gone),
            (["", "", "", "", "2:3", ""], Standing::Gone),
            (["", "", "1:", "", "2:4", ""], Standing::Soft),
            (["", "", "1:", "", "9:", ":4"], Standing::Gone),
        ] {
            assert_eq!(own.changed(&marks(now)), Changed::To(left), "{now:?}");
        }
        assert_eq!(own.changed(&marks(["7", "", "1:", "", "2:3", ""])), Changed::Globs(Standing::Valid));
        assert_eq!(own.changed(&marks(["7", "9:", "1:", "", "2:3", ""])), Changed::To(Standing::Gone));
        assert_eq!(own.changed(&Marks::default()), Changed::To(Standing::Gone));
        assert_eq!(own.changed(&Marks::of([None, None])), Changed::To(Standing::Gone), "others than its own");
    }

    #[test]
    fn of_the_patterns_those_count_that_are_newer() {
        let list = |lines: &[&str]| lines.iter().map(|line| line.as_bytes().to_vec()).collect::<Vec<_>>();
        let all = list(&["c:0:/b*", "b:1:/a*", "a:0:/a*", NO_GLOB]);
        assert_eq!(after_globs(&all, b"c", "/a"), Standing::Valid);
        assert_eq!(after_globs(&all, b"b", "/a"), Standing::Valid);
        assert_eq!(after_globs(&all, b"a", "/a"), Standing::Soft);
        assert_eq!(after_globs(&all, b"", "/a"), Standing::Gone);
        assert_eq!(after_globs(&all, b"", "/c"), Standing::Valid);
        assert_eq!(after_globs(&all, b"x", "/c"), Standing::Gone, "nobody knows any more");
        assert_eq!(after_globs(&list(&["c:0:/b*", "?"]), b"a", "/c"), Standing::Gone);
        assert_eq!(after_globs(&[], b"", "/c"), Standing::Gone);
        let line = line(0xc, &"/b:*".parse().unwrap(), true);
        assert_eq!(line, "c:1:/b:*");
        assert_eq!(after_globs(&list(&[&line, NO_GLOB]), b"", "/b:7"), Standing::Soft);
    }
}
