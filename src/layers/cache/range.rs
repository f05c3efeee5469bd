//! Parts of a stored 200 (RFC 9110 §14): one range of bytes, or all of it.
//!
//! A server may always answer `Range` with the whole (§14.2), and that is what happens to everything but one simple
//! range: several of them are mostly an attack, and units other than bytes nobody has.

use std::ops::RangeInclusive;

use http::{
    HeaderMap, HeaderValue,
    header::{ACCEPT_RANGES, CONTENT_LENGTH, CONTENT_RANGE, DATE, ETAG, IF_RANGE, LAST_MODIFIED, RANGE},
};

use super::{date, validate};

/// What of the stored content is sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Selected {
    /// All of it, with 200.
    Full,
    /// The bytes from the first to the last, with 206 and [`partial`].
    Part(RangeInclusive<u64>),
    /// Nothing: 416 with [`unsatisfied`].
    Unsatisfiable,
}

/// Of the `length` bytes of a 200 with the fields `stored`, those that a `GET` with `headers` asks for. Preconditions
/// come first ([`validate::evaluate`]): a 304 has no parts.
pub(super) fn select(headers: &HeaderMap, stored: &HeaderMap, length: u64) -> Selected {
    let mut lines = headers.get_all(RANGE).iter();
    let Some(range) = lines.next().filter(|_| lines.next().is_none()) else { return Selected::Full };
    match one(range.as_bytes()) {
        Some(asked) if is_current(headers, stored) => asked.of(length),
        _ => Selected::Full,
    }
}

/// Makes the fields of the whole those of its part (§15.3.7).
pub(super) fn partial(headers: &mut HeaderMap, part: &RangeInclusive<u64>, length: u64) {
    let (first, last) = (*part.start(), *part.end());
    headers.insert(CONTENT_RANGE, text(&format!("bytes {first}-{last}/{length}")));
    headers.insert(CONTENT_LENGTH, HeaderValue::from(last.saturating_sub(first).saturating_add(1)));
}

/// The fields of a 416 (§15.5.17): how long it is, and nothing of what is not sent.
pub(super) fn unsatisfied(length: u64) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(2);
    headers.insert(CONTENT_RANGE, text(&format!("bytes */{length}")));
    headers.insert(ACCEPT_RANGES, HeaderValue::from_static("bytes"));
    headers
}

fn text(text: &str) -> HeaderValue {
    HeaderValue::from_str(text).expect("letters, digits and signs")
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    From(u64),
    Between(u64, u64),
    Last(u64),
}

impl Asked {
    fn of(self, length: u64) -> Selected {
        let Some(end) = length.checked_sub(1) else {
            // §14.1.2: the last bytes of nothing are nothing, for which a 206 has no words.
            return if matches!(self, Self::Last(1..)) { Selected::Full } else { Selected::Unsatisfiable };
        };
        match self {
            Self::From(first) if first <= end => Selected::Part(first..=end),
            Self::Between(first, last) if first <= end => Selected::Part(first..=last.min(end)),
            Self::Last(count @ 1..) => Selected::Part(length.saturating_sub(count)..=end),
            _ => Selected::Unsatisfiable,
        }
    }
}

/// `bytes=1-2`, `bytes=1-`, `bytes=-2` (§14.1.1). None for what is none of these.
fn one(range: &[u8]) -> Option<Asked> {
    let range = range.trim_ascii();
    let (unit, set) = range.split_at_checked(range.iter().position(|&byte| byte == b'=')?)?;
    if !unit.eq_ignore_ascii_case(b"bytes") {
        return None;
    }
    // A list of one may have empty members (RFC 9110 §5.6.1.2).
    let mut members =
        set.get(1..)?.split(|&byte| byte == b',').map(<[u8]>::trim_ascii).filter(|member| !member.is_empty());
    let member = members.next().filter(|_| members.next().is_none())?;
    let dash = member.iter().position(|&byte| byte == b'-')?;
    let (first, last) = (member.get(..dash)?, member.get(dash + 1..)?);
    match (first.is_empty(), last.is_empty()) {
        (true, true) => None,
        (true, false) => Some(Asked::Last(number(last)?)),
        (false, true) => Some(Asked::From(number(first)?)),
        (false, false) => {
            let (first, last) = (number(first)?, number(last)?);
            (first <= last).then_some(Asked::Between(first, last))
        }
    }
}

fn number(digits: &[u8]) -> Option<u64> {
    let add = |number: u64, digit: &u8| number.saturating_mul(10).saturating_add(u64::from(digit - b'0'));
    digits.iter().all(u8::is_ascii_digit).then(|| digits.iter().fold(0, add))
}

/// §13.1.5: whether the part that the client has is of what is stored. By the same strong entity tag, or by the same
/// date if it is a strong one: a second before the answer was made, the content could not have changed twice within it
/// (§8.8.2.2).
fn is_current(headers: &HeaderMap, stored: &HeaderMap) -> bool {
    let mut lines = headers.get_all(IF_RANGE).iter();
    let Some(validator) = lines.next() else { return true };
    if lines.next().is_some() {
        return false;
    }
    let validator = validator.as_bytes().trim_ascii();
    if validator.contains(&b'"') {
        return stored.get(ETAG).is_some_and(|tag| validate::is_strong_match(tag.as_bytes(), validator));
    }
    let date = |name| stored.get(name).and_then(|value| date::parse(value.as_bytes()));
    let (Some(asked), Some(modified), Some(made)) = (date::parse(validator), date(LAST_MODIFIED), date(DATE)) else {
        return false;
    };
    asked == modified && made.saturating_sub(modified) >= 1000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{super::directives::map, Selected::*, *};

    const CHANGED: &str = "Sun, 06 Nov 1994 08:49:37 GMT";

    fn selected(range: &str, length: u64) -> Selected {
        select(&map(&[("range", range)]), &HeaderMap::new(), length)
    }

    #[test]
    fn rfc_9110_section_14_1_2_one_range() {
        for (range, expected) in [
            ("bytes=0-1", Part(0..=1)),
            ("bytes=1-", Part(1..=10)),
            ("bytes=-1", Part(10..=10)),
            ("bytes=-99", Part(0..=10)),
            ("bytes=10-99999999999999999999999", Part(10..=10)),
            ("BYTES= ,3-3, ", Part(3..=3)),
            ("bytes=11-", Unsatisfiable),
            ("bytes=11-12", Unsatisfiable),
            ("bytes=99999999999999999999999-", Unsatisfiable),
            ("bytes=-0", Unsatisfiable),
        ] {
            assert_eq!(selected(range, 11), expected, "{range}");
        }
    }

    #[test]
    fn rfc_9110_section_14_2_what_is_not_one_range_of_bytes_is_ignored() {
        for range in [
            "bytes=0-1,3-4",
            "bytes=2-1",
            "bytes=-",
            "bytes=",
            "bytes",
            "bytes 0-1",
            "lines=0-1",
            "bytes=a-b",
            "bytes=0-1-2",
            "bytes=--1",
            "bytes=+1-2",
            "bytes =0-1",
            "bytes=0 - 1",
            "",
        ] {
            assert_eq!(selected(range, 11), Full, "{range}");
        }
        let twice = map(&[("range", "bytes=0-1"), ("range", "bytes=0-1")]);
        assert_eq!(select(&twice, &HeaderMap::new(), 11), Full);
        assert_eq!(select(&HeaderMap::new(), &HeaderMap::new(), 11), Full);
    }

    #[test]
    fn rfc_9110_section_14_1_2_nothing_has_no_parts() {
        assert_eq!(selected("bytes=0-", 0), Unsatisfiable);
        assert_eq!(selected("bytes=0-0", 0), Unsatisfiable);
        assert_eq!(selected("bytes=-0", 0), Unsatisfiable);
        assert_eq!(selected("bytes=-5", 0), Full);
    }

    #[test]
    fn rfc_9110_section_13_1_5_if_range() {
        let stored = |fields: &[(&str, &str)]| map(fields);
        let one = |asked: &str, stored: &HeaderMap| {
            select(&map(&[("range", "bytes=0-1"), ("if-range", asked)]), stored, 11) == Part(0..=1)
        };
        let tagged = stored(&[("etag", "\"a\"")]);
        assert!(one("\"a\"", &tagged));
        for other in ["\"b\"", "W/\"a\"", "a", "*", "\"a\", \"b\"", ""] {
            assert!(!one(other, &tagged), "{other}");
        }
        assert!(!one("W/\"a\"", &stored(&[("etag", "W/\"a\"")])), "compared strongly");
        let later = "Sun, 06 Nov 1994 08:49:38 GMT";
        let dated = stored(&[("last-modified", CHANGED), ("date", later)]);
        assert!(one(CHANGED, &dated));
        assert!(one("Sunday, 06-Nov-94 08:49:37 GMT", &dated));
        assert!(!one(later, &dated), "not merely later");
        assert!(!one(CHANGED, &stored(&[("last-modified", CHANGED), ("date", CHANGED)])), "a weak date");
        assert!(!one(CHANGED, &stored(&[("last-modified", CHANGED)])));
        assert!(!one("yesterday", &dated));
        let twice = map(&[("range", "bytes=0-1"), ("if-range", "\"a\""), ("if-range", "\"b\"")]);
        assert_eq!(select(&twice, &tagged, 11), Full);
    }

    #[test]
    fn rfc_9110_section_15_3_7_and_15_5_17_what_is_said_of_a_part() {
        let mut headers = map(&[("etag", "\"a\""), ("content-length", "11"), ("content-type", "text/plain")]);
        partial(&mut headers, &(2..=4), 11);
        let expected = [
            ("etag", "\"a\""),
            ("content-length", "3"),
            ("content-type", "text/plain"),
            ("content-range", "bytes 2-4/11"),
        ];
        assert_eq!(headers, map(&expected));
        assert_eq!(unsatisfied(11), map(&[("content-range", "bytes */11"), ("accept-ranges", "bytes")]));
    }

    proptest! {
        #[test]
        fn a_part_is_within_the_whole(range in "bytes=[0-9,-]{0,8}|.{0,12}", length in 0_u64..30) {
            if let Ok(value) = HeaderValue::from_str(&range) {
                let mut headers = HeaderMap::new();
                headers.insert(RANGE, value);
                if let Part(part) = select(&headers, &HeaderMap::new(), length) {
                    prop_assert!(part.start() <= part.end() && *part.end() < length);
                }
            }
        }
    }
}
