//! `Cache-Status` (RFC 9211): what the cache did with a request.

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

/// RFC 9211.
pub(super) const CACHE_STATUS: HeaderName = HeaderName::from_static("cache-status");

/// Where the answer came from: one or the other, never both (§2.1, §2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// The store.
    Hit,
    /// The upstream, for this reason.
    Forward(Forward),
}

/// Why the request went on (§2.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Forward {
    /// The cache was told not to look.
    Bypass,
    /// Of this method nothing is stored.
    Method,
    /// Nothing is stored for this target.
    UriMiss,
    /// What is stored is for requests with other fields.
    VaryMiss,
    /// What is stored would have done, but the request wanted otherwise.
    Request,
    /// What is stored is too old.
    Stale,
}

/// One member of the list: sidegate's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CacheStatus {
    pub(super) source: Source,
    /// What the upstream answered; worth saying where the client gets something else, as after a 304.
    pub(super) fwd_status: Option<StatusCode>,
    /// The seconds that the answer is still fresh: `Life::remaining`.
    pub(super) ttl: Option<i64>,
    /// The answer was stored.
    pub(super) stored: bool,
    /// The request went on together with others.
    pub(super) collapsed: bool,
    /// A token: `Why::word`.
    pub(super) detail: Option<&'static str>,
}

impl Forward {
    fn word(self) -> &'static str {
        match self {
            Self::Bypass => "bypass",
            Self::Method => "method",
            Self::UriMiss => "uri-miss",
            Self::VaryMiss => "vary-miss",
            Self::Request => "request",
            Self::Stale => "stale",
        }
    }
}

impl CacheStatus {
    /// From the store, with nothing else said.
    pub(super) const HIT: Self =
        Self { source: Source::Hit, fwd_status: None, ttl: None, stored: false, collapsed: false, detail: None };

    /// From the upstream, with nothing else said.
    pub(super) const fn forwarded(why: Forward) -> Self {
        Self { source: Source::Forward(why), ..Self::HIT }
    }

    /// The member. One allocation: the value's own.
    pub(super) fn value(&self) -> HeaderValue {
        let mut text = Text { bytes: [0; Text::MOST], length: 0 };
        text.put("sidegate");
        match self.source {
            Source::Hit => text.put("; hit"),
            Source::Forward(why) => text.parameter("; fwd=", why.word()),
        }
        if let Some(status) = self.fwd_status {
            text.parameter("; fwd-status=", status.as_str());
        }
        if let Some(ttl) = self.ttl {
            text.parameter("; ttl=", itoa::Buffer::new().format(ttl.clamp(-LARGEST, LARGEST)));
        }
        // §2.4, §2.5: neither can be true of what was not forwarded.
        if self.source != Source::Hit && self.stored {
            text.put("; stored");
        }
        if self.source != Source::Hit && self.collapsed {
            text.put("; collapsed");
        }
        if let Some(detail) = self.detail {
            text.parameter("; detail=", detail);
        }
        HeaderValue::from_bytes(text.get()).unwrap_or(HeaderValue::from_static("sidegate"))
    }

    /// Says it behind what caches nearer to the origin said (§2): the last member is the one nearest to the client.
    pub(super) fn append(&self, headers: &mut HeaderMap) {
        headers.append(CACHE_STATUS, self.value());
    }

    /// Takes back what was [said](Self::append) last.
    pub(super) fn remove(headers: &mut HeaderMap) {
        let said: Vec<_> = headers.get_all(CACHE_STATUS).iter().cloned().collect();
        headers.remove(CACHE_STATUS);
        for value in said.iter().take(said.len().saturating_sub(1)) {
            headers.append(CACHE_STATUS, value.clone());
        }
    }
}

/// The largest integer of a structured field (RFC 9651 §3.3.1).
const LARGEST: i64 = 999_999_999_999_999;

/// Bytes on the stack. What does not fit is left out, parameter by parameter; all that is known fits.
struct Text {
    bytes: [u8; Self::MOST],
    length: usize,
}

impl Text {
    const MOST: usize = 160;

    fn put(&mut self, text: &str) {
        if let Some(slot) = self.bytes.get_mut(self.length..self.length + text.len()) {
            slot.copy_from_slice(text.as_bytes());
            self.length += text.len();
        }
    }

    fn parameter(&mut self, name: &str, value: &str) {
        if self.length + name.len() + value.len() <= Self::MOST {
            self.put(name);
            self.put(value);
        }
    }

    fn get(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::{super::freshness::Why, *};

    #[test]
    fn rfc_9211_section_2_1_a_hit() {
        assert_eq!(CacheStatus::HIT.value(), "sidegate; hit");
        assert_eq!(CacheStatus { ttl: Some(376), ..CacheStatus::HIT }.value(), "sidegate; hit; ttl=376");
        let both = CacheStatus { stored: true, collapsed: true, ..CacheStatus::HIT };
        assert_eq!(both.value(), "sidegate; hit", "these are about a request that went on");
    }

    #[test]
    fn rfc_9211_section_2_2_a_request_that_went_on() {
        let miss = CacheStatus::forwarded(Forward::UriMiss);
        assert_eq!(miss.value(), "sidegate; fwd=uri-miss");
        let all = CacheStatus {
            fwd_status: Some(StatusCode::OK),
            ttl: Some(60),
            stored: true,
            collapsed: true,
            detail: Some("no-store"),
            ..miss
        };
        let expected = "sidegate; fwd=uri-miss; fwd-status=200; ttl=60; stored; collapsed; detail=no-store";
        assert_eq!(all.value(), expected);
        let words: Vec<_> =
            [Forward::Bypass, Forward::Method, Forward::VaryMiss, Forward::Request].map(Forward::word).to_vec();
        assert_eq!(words, ["bypass", "method", "vary-miss", "request"]);
        assert_eq!(CacheStatus::forwarded(Forward::Stale).value(), "sidegate; fwd=stale");
    }

    #[test]
    fn rfc_9211_section_2_4_a_stale_answer_has_a_negative_ttl() {
        assert_eq!(CacheStatus { ttl: Some(-412), ..CacheStatus::HIT }.value(), "sidegate; hit; ttl=-412");
        let extreme = CacheStatus { ttl: Some(i64::MIN), ..CacheStatus::HIT };
        assert_eq!(extreme.value(), "sidegate; hit; ttl=-999999999999999");
    }

    #[test]
    fn rfc_9211_section_2_it_comes_behind_the_others() {
        let mut headers = HeaderMap::new();
        headers.insert(CACHE_STATUS, HeaderValue::from_static("Origin; hit; ttl=1100"));
        CacheStatus::HIT.append(&mut headers);
        let all: Vec<_> = headers.get_all(CACHE_STATUS).iter().collect();
        assert_eq!(all, ["Origin; hit; ttl=1100", "sidegate; hit"]);
    }

    #[test]
    fn the_longest_fits_and_reasons_are_tokens() {
        let longest = Why::RequestNoStore.word();
        let status = CacheStatus {
            source: Source::Forward(Forward::VaryMiss),
            fwd_status: Some(StatusCode::OK),
            ttl: Some(i64::MIN),
            stored: true,
            collapsed: true,
            detail: Some(longest),
        };
        assert!(status.value().to_str().unwrap().ends_with("; stored; collapsed; detail=request-no-store"));
        assert!(longest.bytes().all(|byte| byte.is_ascii_lowercase() || byte == b'-'));
        let long = CacheStatus { detail: Some("a".repeat(200).leak()), ..CacheStatus::HIT };
        assert_eq!(long.value(), "sidegate; hit", "left out whole");
    }
}
