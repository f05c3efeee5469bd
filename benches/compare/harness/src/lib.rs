//! What the two programs of the comparison share: the clock and the shape of an event.

/// Nanoseconds of `CLOCK_MONOTONIC`, which is the same clock in every process of a machine.
#[must_use]
pub fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0)
}

/// One small event, stamped with the moment at which it is written and with its number in the stream.
#[must_use]
pub fn event(number: u64) -> String {
    format!("data: {{\"t\":{},\"i\":{number}}}\n\n", monotonic_ns())
}

/// The stamp and the number of an event as [`event`] wrote it, without the empty line at its end.
#[must_use]
pub fn parse_event(text: &[u8]) -> Option<(u64, u64)> {
    let fields = text.strip_prefix(b"data: {\"t\":")?.strip_suffix(b"}")?;
    let (stamp, number) = std::str::from_utf8(fields).ok()?.split_once(",\"i\":")?;
    Some((stamp.parse().ok()?, number.parse().ok()?))
}
