//! Dates of fields (RFC 9110 §5.6.7), in milliseconds since the epoch.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use http::HeaderValue;

/// The end of the year 9999, the last that a date can name.
pub(super) const LATEST: u64 = 253_402_300_799_999;

/// The date that `text` is, in any of the three forms.
pub(super) fn parse(text: &[u8]) -> Option<u64> {
    httpdate::parse_http_date(std::str::from_utf8(text).ok()?).ok().map(since_epoch)
}

/// A time as such a date, at most the [`LATEST`].
pub(super) fn since_epoch(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)).min(LATEST)
}

/// The value of a field, where there is one: `httpdate` panics at years that have not four digits.
pub(super) fn format(time: SystemTime) -> Option<HeaderValue> {
    let since_epoch = time.duration_since(UNIX_EPOCH).ok()?;
    let sane = since_epoch <= Duration::from_millis(LATEST);
    sane.then(|| httpdate::fmt_http_date(time)).and_then(|date| HeaderValue::try_from(date).ok())
}
