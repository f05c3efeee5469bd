//! A JSON number as what it is worth.

use super::sink::Sink;

/// Writes a number as what it is worth, exactly: its digits from the first to the last that is not 0, and the power of
/// ten with which they count. 1, 1.0 and 10e-1 are the same; 0 and -0, which divide differently, are not.
pub(super) fn write_number(text: &[u8], to: &mut impl Sink) {
    let (sign, text) = match text.strip_prefix(b"-") {
        Some(text) => (b'-', text),
        None => (b'+', text),
    };
    let (digits, power) = split(text, |byte| matches!(byte, b'e' | b'E'));
    let Some(power) = read_power(power) else {
        // No one counts that far: as it is spelled.
        to.put(b"e");
        to.put(&[sign]);
        to.put(&(text.len() as u64).to_le_bytes());
        return to.put(text);
    };
    let (whole, fraction) = split(digits, |byte| byte == b'.');
    let (whole, fraction) = (trim_start(whole), trim_end(fraction));
    let (whole, fraction, power) = match (whole, fraction) {
        ([], []) => (whole, fraction, 0),
        ([], _) => (whole, trim_start(fraction), power - len(fraction)),
        (_, []) => (trim_end(whole), fraction, power + len(whole) - len(trim_end(whole))),
        _ => (whole, fraction, power - len(fraction)),
    };
    let mut head = [0; 18];
    let (tag, counts) = head.split_at_mut(2);
    let (power_at, len_at) = counts.split_at_mut(8);
    tag.copy_from_slice(&[b'#', sign]);
    power_at.copy_from_slice(&power.to_le_bytes());
    len_at.copy_from_slice(&((whole.len() + fraction.len()) as u64).to_le_bytes());
    to.put(&head);
    to.put(whole);
    to.put(fraction);
}

/// What stands before and after the first byte that `is` it.
fn split(text: &[u8], is: impl Fn(u8) -> bool) -> (&[u8], &[u8]) {
    let at = text.iter().position(|&byte| is(byte)).unwrap_or(text.len());
    let (before, after) = text.split_at(at);
    (before, after.get(1..).unwrap_or_default())
}

/// The power of ten after an `e`; 0 without one, `None` where it is beyond all measure.
fn read_power(text: &[u8]) -> Option<i64> {
    /// With more, a sum with the number of digits could overflow.
    const MAX_DIGITS: usize = 18;
    let (sign, digits) = match text {
        [b'-', digits @ ..] => (-1, digits),
        [b'+', digits @ ..] | digits => (1, digits),
    };
    let digits = trim_start(digits);
    let power = digits.iter().fold(0_i64, |power, digit| power.wrapping_mul(10).wrapping_add(i64::from(digit - b'0')));
    (digits.len() <= MAX_DIGITS).then_some(sign * power)
}

fn len(digits: &[u8]) -> i64 {
    i64::try_from(digits.len()).unwrap_or(i64::MAX)
}

fn trim_start(digits: &[u8]) -> &[u8] {
    digits.get(digits.iter().take_while(|&&digit| digit == b'0').count()..).unwrap_or_default()
}

fn trim_end(digits: &[u8]) -> &[u8] {
    let zeros = digits.iter().rev().take_while(|&&digit| digit == b'0').count();
    digits.get(..digits.len() - zeros).unwrap_or_default()
}
