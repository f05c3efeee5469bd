//! How often something may be, as a file writes it: `100/min`, `20/5s`.

use std::{borrow::Cow, fmt, num::NonZeroU32, str::FromStr, time::Duration};

use super::{HumanDuration, text::text, units::ParseError};

/// So many in a length of time: `100/min`, `20/5s`, `1000/h`.
///
/// The time is `s`, `min` (or `m`), `h` or `d`, or a duration of at least a millisecond.
///
/// ```
/// use sidegate::config::Rate;
///
/// let rate: Rate = "20/min".parse()?;
/// assert_eq!((rate.count().get(), rate.per().as_secs()), (20, 60));
/// assert_eq!(rate.to_string(), "20/min");
/// # Ok::<(), sidegate::config::units::ParseError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Rate {
    count: NonZeroU32,
    per: HumanDuration,
}

/// A unit of time that needs no number before it.
const UNITS: [(&str, u64); 5] = [("s", 1), ("min", 60), ("m", 60), ("h", 3600), ("d", 86_400)];

impl Rate {
    /// So many in so many seconds. For defaults.
    #[must_use]
    pub const fn new(count: NonZeroU32, seconds: u64) -> Self {
        Self { count, per: HumanDuration::from_secs(seconds) }
    }

    /// How many.
    #[must_use]
    pub const fn count(self) -> NonZeroU32 {
        self.count
    }

    /// In how long a time. At least a millisecond.
    #[must_use]
    pub const fn per(self) -> Duration {
        self.per.get()
    }
}

impl FromStr for Rate {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong =
            || ParseError::new(format!("`{text}` is no rate: write a number and a time, as in `100/min` or `20/5s`"));
        let (count, per) = text.split_once('/').ok_or_else(wrong)?;
        let (count, per) = (count.trim(), per.trim());
        if !count.bytes().all(|c| c.is_ascii_digit()) {
            return Err(wrong());
        }
        let count = count.parse().map_err(|_| wrong())?;
        Ok(Self { count, per: read_per(per).ok_or_else(wrong)? })
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.count, shown_per(self.per))
    }
}

/// The time after the `/` of a rate, at least a millisecond.
#[must_use]
pub fn read_per(text: &str) -> Option<HumanDuration> {
    let per = match UNITS.iter().find(|(unit, _)| *unit == text) {
        Some(&(_, seconds)) => HumanDuration::from_secs(seconds),
        None => text.parse().ok()?,
    };
    (per >= HumanDuration::from_millis(1)).then_some(per)
}

/// As [`read_per`] reads it.
#[must_use]
pub fn shown_per(per: HumanDuration) -> Cow<'static, str> {
    match UNITS.iter().find(|&&(_, seconds)| per == HumanDuration::from_secs(seconds)) {
        Some((unit, _)) => (*unit).into(),
        None => per.to_string().into(),
    }
}

text!(Rate, "Rate", {
    "description": "So many in a time: `100/min`, `20/5s`, `1000/h`.",
    "pattern": r"^ *[0-9]+ */ *(min|[0-9.]* ?(ms|s|m|h|d))+ *$",
});

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn rates_are_read_and_written() {
        for (text, shown, per) in [
            ("20/min", "20/min", 60_000),
            ("1/m", "1/min", 60_000),
            ("20/5s", "20/5s", 5000),
            ("1000 / h", "1000/h", 3_600_000),
            ("5/1s", "5/s", 1000),
            ("7/250ms", "7/250ms", 250),
            ("9/1d", "9/d", 86_400_000),
        ] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!((rate.to_string().as_str(), rate.per().as_millis()), (shown, per), "{text}");
        }
        for bad in ["", "20", "20/", "/min", "0/min", "-1/min", "+1/min", "1/0s", "1/1us", "1/month", "99999999999/s"] {
            let error = bad.parse::<Rate>().unwrap_err().to_string();
            assert_eq!(error, format!("`{bad}` is no rate: write a number and a time, as in `100/min` or `20/5s`"));
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_it_panic_and_what_is_read_is_read_again(text in ".{0,20}") {
            if let Ok(rate) = text.parse::<Rate>() {
                prop_assert_eq!(rate.to_string().parse(), Ok(rate));
            }
        }
    }
}
