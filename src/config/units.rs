//! Values that a file writes with a unit or a word: durations, sizes, `off`, secrets.
//!
//! Each parser says what would have been right, and none panics, whatever the text.

use std::{
    borrow::Cow,
    env, fmt,
    io::Read,
    marker::PhantomData,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{
    Deserialize, Deserializer, Serialize, Serializer,
    de::{
        Error, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
        value::{MapAccessDeserializer, SeqAccessDeserializer},
    },
};

use super::{Check, Problems, file, sections::Sections};

/// A length of time: a number and its unit (`ms`, `s`, `m`, `h`, `d`), or several of these (`1m30s`).
///
/// At most a year, so that it can be added to any point in time. Zero is a duration: who has no use for it says so
/// in a check.
///
/// ```
/// use sidegate::config::HumanDuration;
///
/// let pause: HumanDuration = "1m30s".parse()?;
/// assert_eq!(pause.get().as_secs(), 90);
/// assert_eq!(pause.to_string(), "90s");
/// # Ok::<(), sidegate::config::units::ParseError>(())
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HumanDuration(Duration);

impl HumanDuration {
    /// The longest: 365 days.
    pub const MAX: Self = Self::from_secs(365 * 86_400);

    /// So many seconds. For defaults.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(Duration::from_secs(seconds))
    }

    /// So many milliseconds. For defaults.
    #[must_use]
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(Duration::from_millis(milliseconds))
    }

    /// The duration.
    #[must_use]
    pub const fn get(self) -> Duration {
        self.0
    }

    /// Whether it is no time at all.
    #[must_use]
    pub const fn is_zero(self) -> bool {
        self.0.is_zero()
    }
}

/// What stands before the expectation of what may also be off.
pub(super) const OR_OFF: &str = "`off` or ";

const DURATIONS: &str = "a number with its unit, as in `250ms`, `30s`, `5m`, `1h` or `1d`";

impl FromStr for HumanDuration {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let wrong = || ParseError(format!("`{text}` is no duration: write {DURATIONS}"));
        if !text.is_empty() && text.bytes().all(|c| c.is_ascii_digit()) {
            return Err(unitless(text));
        }
        // humantime adds without a look where a sum of seconds and nanoseconds is near the end of `u64`, and has
        // months (`M`) where somebody may have meant minutes. Neither passes here.
        let numbers = text.split(|c: char| !c.is_ascii_digit());
        let mut units = text.split(|c: char| !c.is_alphabetic()).filter(|unit| !unit.is_empty());
        if text.len() > 32
            || numbers.max_by_key(|digits| digits.len()).is_some_and(|digits| digits.len() > 10)
            || !units.all(|unit| matches!(unit, "ns" | "us" | "ms" | "s" | "m" | "h" | "d"))
        {
            return Err(wrong());
        }
        let duration = Self(humantime::parse_duration(text).map_err(|_| wrong())?);
        if duration > Self::MAX {
            return Err(ParseError(format!("`{text}` is too long: the longest is `{}`", Self::MAX)));
        }
        Ok(duration)
    }
}

fn unitless(number: impl fmt::Display) -> ParseError {
    ParseError(format!("`{number}` has no unit: write `{number}s` for seconds or `{number}ms` for milliseconds"))
}

impl fmt::Display for HumanDuration {
    /// One number with the largest unit that is exact.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let nanos = self.0.as_nanos();
        let units = [
            ("d", 86_400_000_000_000),
            ("h", 3_600_000_000_000),
            ("m", 60_000_000_000),
            ("s", 1_000_000_000),
            ("ms", 1_000_000),
            ("us", 1000),
        ];
        // `0s`, not `0d`.
        let (unit, size) = units
            .into_iter()
            .find(|&(unit, size)| nanos.is_multiple_of(size) && (nanos > 0 || unit == "s"))
            .unwrap_or(("ns", 1));
        write!(f, "{}{unit}", nanos / size)
    }
}

impl<'de> Deserialize<'de> for HumanDuration {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Text;

        impl Visitor<'_> for Text {
            type Value = HumanDuration;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(DURATIONS)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<HumanDuration, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<HumanDuration, E> {
                Err(E::custom(unitless(number)))
            }

            /// TOML's integers are signed.
            fn visit_i64<E: Error>(self, number: i64) -> Result<HumanDuration, E> {
                if number < 0 {
                    return Err(E::invalid_value(Unexpected::Signed(number), &self));
                }
                Err(E::custom(unitless(number)))
            }
        }

        from.deserialize_any(Text)
    }
}

impl Serialize for HumanDuration {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl JsonSchema for HumanDuration {
    fn schema_name() -> Cow<'static, str> {
        "Duration".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A number with its unit: `250ms`, `30s`, `5m`, `1h`, `1d`.",
            "pattern": r"^([0-9]{1,10}(\.[0-9]{1,10})? ?(ns|us|ms|s|m|h|d) ?)+$",
        })
    }
}

/// A number of bytes: `64KiB`, `10MiB`, `1GB`, or a bare number.
///
/// `KiB`, `MiB`, `GiB` and `TiB` count by 1024, `KB`, `MB`, `GB` and `TB` by 1000.
///
/// ```
/// use sidegate::config::ByteSize;
///
/// assert_eq!("64KiB".parse(), Ok(ByteSize::from_bytes(65_536)));
/// assert!("64K".parse::<ByteSize>().is_err(), "by 1000 or by 1024?");
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ByteSize(u64);

impl ByteSize {
    /// So many bytes.
    #[must_use]
    pub const fn from_bytes(bytes: u64) -> Self {
        Self(bytes)
    }

    /// So many times 1024 bytes. For defaults.
    #[must_use]
    pub const fn from_kib(kib: u32) -> Self {
        Self((kib as u64) << 10)
    }

    /// The number of bytes.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number of bytes, as many as can be addressed.
    #[must_use]
    pub fn to_usize(self) -> usize {
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

const SIZES: &str = "a number of bytes with its unit, as in `64KiB`, `10MiB` or `1GB`";

/// Largest first, those by 1024 before those by 1000.
const SIZE_UNITS: [(&str, u64); 9] = [
    ("TiB", 1 << 40),
    ("GiB", 1 << 30),
    ("MiB", 1 << 20),
    ("KiB", 1 << 10),
    ("TB", 1_000_000_000_000),
    ("GB", 1_000_000_000),
    ("MB", 1_000_000),
    ("KB", 1000),
    ("B", 1),
];

impl FromStr for ByteSize {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        let digits = text.bytes().take_while(u8::is_ascii_digit).count();
        let (number, unit) = text.split_at(digits);
        let unit = unit.trim_start();
        let factor = if unit.is_empty() {
            Some(1)
        } else {
            // `kB` is how SI writes it.
            SIZE_UNITS.iter().find(|(name, _)| name.eq_ignore_ascii_case(unit)).map(|&(_, size)| size)
        };
        let too_much = || ParseError(format!("`{text}` is too much: the most is `{}`", Self(u64::MAX)));
        match factor {
            Some(factor) if digits > 0 => {
                let bytes = number.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
                bytes.map(Self).ok_or_else(too_much)
            }
            _ => Err(ParseError(format!("`{text}` is no size: write {SIZES}"))),
        }
    }
}

impl fmt::Display for ByteSize {
    /// One number with the unit that makes it shortest and exact.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = SIZE_UNITS.into_iter().filter(|(_, size)| self.0.is_multiple_of(*size) && self.0 > 0);
        let (unit, size) = exact.max_by_key(|&(_, size)| size).unwrap_or(("B", 1));
        write!(f, "{}{unit}", self.0 / size)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Size;

        impl Visitor<'_> for Size {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(SIZES)
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            /// TOML's integers are signed.
            fn visit_i64<E: Error>(self, bytes: i64) -> Result<ByteSize, E> {
                let wrong = |_| E::invalid_value(Unexpected::Signed(bytes), &self);
                bytes.try_into().map(ByteSize).map_err(wrong)
            }
        }

        from.deserialize_any(Size)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl JsonSchema for ByteSize {
    fn schema_name() -> Cow<'static, str> {
        "Size".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": ["string", "integer"],
            "description": "A number of bytes: `64KiB`, `10MiB`, `1GB`, or a bare number.",
            "pattern": "^[0-9]+ *([KkMmGgTt][Ii]?)?[Bb]?$",
            "minimum": 0,
        })
    }
}

/// Text that is no duration or size, with what would be right.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParseError(String);

impl ParseError {
    pub(super) fn new(message: String) -> Self {
        Self(message)
    }
}

impl fmt::Display for ParseError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for ParseError {}

/// A value that may be switched off: `off`, or what `T` reads.
///
/// Not an untagged enum, whose errors only say that nothing matched: whatever is not `off` is for `T` to judge.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Toggle<T> {
    /// `off`.
    Off,
    /// Anything else.
    On(T),
}

impl<T> Toggle<T> {
    /// What is on, if it is.
    pub const fn as_ref(&self) -> Option<&T> {
        match self {
            Self::Off => None,
            Self::On(value) => Some(value),
        }
    }

    /// The same, taken out.
    pub fn on(self) -> Option<T> {
        match self {
            Self::Off => None,
            Self::On(value) => Some(value),
        }
    }

    /// Whether it is off.
    pub const fn is_off(&self) -> bool {
        matches!(self, Self::Off)
    }
}

impl Toggle<HumanDuration> {
    /// What `make` makes of the duration, if it is on.
    pub fn map_duration<T>(self, make: impl FnOnce(Duration) -> T) -> Option<T> {
        self.on().map(HumanDuration::get).map(make)
    }
}

impl<T> From<T> for Toggle<T> {
    fn from(value: T) -> Self {
        Self::On(value)
    }
}

impl<T: Check> Check for Toggle<T> {
    fn check(&self, problems: &mut Problems) {
        if let Self::On(value) = self {
            value.check(problems);
        }
    }
}

impl<T: fmt::Display> fmt::Display for Toggle<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Off => f.write_str("off"),
            Self::On(value) => value.fmt(f),
        }
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Toggle<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct OffOr<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for OffOr<T> {
            type Value = Toggle<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`off`, or what is to be on")
            }

            /// YAML 1.1 reads a bare `off` as false; YAML 1.2, like the reader in use, as text.
            fn visit_bool<E: Error>(self, on: bool) -> Result<Self::Value, E> {
                if on { read_or_off(on, Unexpected::Bool(on)) } else { Ok(Toggle::Off) }
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                if text == "off" { Ok(Toggle::Off) } else { read_or_off(text, Unexpected::Str(text)) }
            }

            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                read_or_off(number, Unexpected::Unsigned(number))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
                read_or_off(number, Unexpected::Signed(number))
            }

            fn visit_f64<E: Error>(self, number: f64) -> Result<Self::Value, E> {
                read_or_off(number, Unexpected::Float(number))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                T::deserialize(Sections(SeqAccessDeserializer::new(list))).map(Toggle::On)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Toggle::On)
            }
        }

        from.deserialize_any(OffOr(PhantomData))
    }
}

/// What a `T` makes of a single value, or what it wants, with `off` as one more choice.
fn read_or_off<'de, T, V, E>(value: V, found: Unexpected<'_>) -> Result<Toggle<T>, E>
where
    T: Deserialize<'de>,
    V: IntoDeserializer<'de, Refused>,
    E: Error,
{
    T::deserialize(value.into_deserializer()).map(Toggle::On).map_err(|refused| match refused {
        Refused::Type(expected) => E::invalid_type(found, &&*format!("{OR_OFF}{expected}")),
        Refused::Value(expected) => E::invalid_value(found, &&*format!("{OR_OFF}{expected}")),
        Refused::Otherwise(message) => E::custom(message),
    })
}

/// Why a `T` did not take a value.
#[derive(Debug)]
enum Refused {
    Type(String),
    Value(String),
    Otherwise(String),
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (Self::Type(text) | Self::Value(text) | Self::Otherwise(text)) = self;
        f.write_str(text)
    }
}

impl std::error::Error for Refused {}

impl Error for Refused {
    fn custom<M: fmt::Display>(message: M) -> Self {
        Self::Otherwise(message.to_string())
    }

    fn invalid_type(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::Type(expected.to_string())
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::Value(expected.to_string())
    }
}

impl<T: Serialize> Serialize for Toggle<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Off => to.serialize_str("off"),
            Self::On(value) => value.serialize(to),
        }
    }
}

impl<T: JsonSchema> JsonSchema for Toggle<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("{}OrOff", T::schema_name()).into()
    }

    fn schema_id() -> Cow<'static, str> {
        format!("{}|off", T::schema_id()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        // YAML 1.1 readers, editors' among them, hand on `false`.
        json_schema!({ "anyOf": [{ "enum": ["off", false] }, generator.subschema_for::<T>()] })
    }
}

/// One value, or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct OneOrMany<T>(pub Vec<T>);

impl<T> OneOrMany<T> {
    /// The values.
    pub fn iter(&self) -> std::slice::Iter<'_, T> {
        self.0.iter()
    }
}

impl<T> From<T> for OneOrMany<T> {
    fn from(one: T) -> Self {
        Self(vec![one])
    }
}

impl<'a, T> IntoIterator for &'a OneOrMany<T> {
    type Item = &'a T;
    type IntoIter = std::slice::Iter<'a, T>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMany<T> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct ListOr<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for ListOr<T> {
            type Value = OneOrMany<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("one value or a list of them")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
                T::deserialize(text.into_deserializer()).map(OneOrMany::from)
            }

            /// For `T` to say what it wants instead.
            fn visit_u64<E: Error>(self, number: u64) -> Result<Self::Value, E> {
                T::deserialize(number.into_deserializer()).map(OneOrMany::from)
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Self::Value, E> {
                T::deserialize(number.into_deserializer()).map(OneOrMany::from)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(OneOrMany::from)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, list: A) -> Result<Self::Value, A::Error> {
                Vec::deserialize(SeqAccessDeserializer::new(list)).map(OneOrMany)
            }
        }

        from.deserialize_any(ListOr(PhantomData))
    }
}

impl<T: Serialize> Serialize for OneOrMany<T> {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        match &*self.0 {
            [one] => one.serialize(to),
            many => to.collect_seq(many),
        }
    }
}

impl<T: JsonSchema> JsonSchema for OneOrMany<T> {
    fn schema_name() -> Cow<'static, str> {
        format!("{}OrList", T::schema_name()).into()
    }

    fn schema_id() -> Cow<'static, str> {
        format!("{}|[]", T::schema_id()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = generator.subschema_for::<T>();
        json_schema!({ "anyOf": [one, { "type": "array", "items": one }] })
    }
}

/// The longest secret that is read from a file, in bytes: a key ring of thousands of lines.
const MAX_SECRET: u64 = 1 << 20;

/// A value that no log, error, metric or dump may show: `{env: NAME}`, `{file: PATH}`, or the text itself.
///
/// It has no `Serialize`; `Debug` and [`shown`](Self::shown) say where it comes from, not what it is.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Source);

#[derive(Clone, PartialEq, Eq)]
enum Source {
    Literal(String),
    Env(String),
    File(PathBuf),
}

impl Secret {
    /// What stands in the place of a secret where it is shown.
    pub const REDACTED: &str = "[redacted]";

    /// A secret that is given as it is.
    #[must_use]
    pub fn literal(text: impl Into<String>) -> Self {
        Self(Source::Literal(text.into()))
    }

    /// The file that it is read from, if it is.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match &self.0 {
            Source::File(path) => Some(path),
            Source::Literal(_) | Source::Env(_) => None,
        }
    }

    /// What may be shown of it, in the form of the configuration. A text is [`REDACTED`](Self::REDACTED).
    #[must_use]
    pub fn shown(&self) -> serde_json::Value {
        match &self.0 {
            Source::Literal(_) => Self::REDACTED.into(),
            Source::Env(name) => serde_json::json!({ "env": name }),
            Source::File(path) => serde_json::json!({ "file": path.display().to_string() }),
        }
    }

    /// Reads the secret. One line end at its end is not part of it: editors and `kubectl` add it.
    ///
    /// # Errors
    /// The variable is not set or no UTF-8, the file cannot be read, is no UTF-8 or larger than 1 MiB, or there
    /// is nothing in it. The message has the name, never the content.
    pub fn reveal(&self) -> Result<String, String> {
        let (mut text, place) = match &self.0 {
            Source::Literal(text) => (text.clone(), "the secret".to_owned()),
            Source::Env(name) => {
                let text = env::var(name).map_err(|error| match error {
                    env::VarError::NotPresent => format!("the environment variable `{name}` is not set"),
                    env::VarError::NotUnicode(_) => format!("the environment variable `{name}` is not UTF-8"),
                })?;
                (text, format!("the environment variable `{name}`"))
            }
            Source::File(path) => {
                let shown = path.display();
                let mut text = String::new();
                let read = file::open(path).and_then(|file| file.take(MAX_SECRET + 1).read_to_string(&mut text));
                read.map_err(|error| format!("`{shown}` cannot be read: {error}"))?;
                if text.len() as u64 > MAX_SECRET {
                    return Err(format!("`{shown}` is larger than {}", ByteSize(MAX_SECRET)));
                }
                (text, format!("`{shown}`"))
            }
        };
        if text.ends_with('\n') {
            text.truncate(text.len() - if text.ends_with("\r\n") { 2 } else { 1 });
        }
        if text.is_empty() { Err(format!("{place} is empty")) } else { Ok(text) }
    }
}

impl Check for Secret {
    fn check(&self, problems: &mut Problems) {
        if let Err(message) = self.reveal() {
            problems.add("", message);
        }
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Source::Literal(_) => f.write_str("Secret(..)"),
            Source::Env(name) => write!(f, "Secret(env {name})"),
            Source::File(path) => write!(f, "Secret(file {})", path.display()),
        }
    }
}

impl<'de> Deserialize<'de> for Secret {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Hidden;

        impl<'de> Visitor<'de> for Hidden {
            type Value = Secret;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a secret: `{env: NAME}`, `{file: PATH}` or text")
            }

            fn visit_str<E: Error>(self, text: &str) -> Result<Secret, E> {
                Ok(Secret::literal(text))
            }

            /// A variable of the environment that looks like a number arrives as one.
            fn visit_u64<E: Error>(self, number: u64) -> Result<Secret, E> {
                Ok(Secret::literal(number.to_string()))
            }

            fn visit_i64<E: Error>(self, number: i64) -> Result<Secret, E> {
                Ok(Secret::literal(number.to_string()))
            }

            fn visit_bool<E: Error>(self, _: bool) -> Result<Secret, E> {
                // Not the default message, which would show the value.
                Err(E::custom("put a secret that reads as a boolean in quotes"))
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<Secret, E> {
                Err(E::custom("put a secret that reads as a fraction in quotes"))
            }

            /// By hand: what a derived reader says of a wrong key shows the key, and that may be the secret.
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Secret, A::Error> {
                let wrong = || A::Error::custom("must have exactly one key, `env: NAME` or `file: PATH`");
                let key: String = map.next_key()?.ok_or_else(wrong)?;
                let source = match &*key {
                    "env" => Source::Env(map.next_value()?),
                    "file" => Source::File(map.next_value()?),
                    _ => return Err(wrong()),
                };
                if map.next_key::<String>()?.is_some() { Err(wrong()) } else { Ok(Secret(source)) }
            }
        }

        from.deserialize_any(Hidden)
    }
}

impl JsonSchema for Secret {
    fn schema_name() -> Cow<'static, str> {
        "Secret".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        let source = |key: &str, what: &str| {
            json_schema!({
                "type": "object",
                "properties": { key: { "type": "string", "description": what } },
                "required": [key],
                "additionalProperties": false,
            })
        };
        json_schema!({
            "description": "A secret, from the environment, from a file, or as it is.",
            "writeOnly": true,
            "anyOf": [
                source("env", "The environment variable that holds it."),
                source("file", "The file that holds it."),
                { "type": ["string", "integer"] },
            ],
        })
    }
}

#[cfg(test)]
mod tests {
    use figment::value::Value;
    use proptest::prelude::*;

    use super::*;

    fn read<T: serde::de::DeserializeOwned>(value: impl Into<Value>) -> Result<T, String> {
        value.into().deserialize().map_err(|error: figment::Error| error.kind.to_string())
    }

    fn duration(text: &str) -> Result<String, String> {
        text.parse::<HumanDuration>().map(|d| d.to_string()).map_err(|error| error.to_string())
    }

    fn size(text: &str) -> Result<u64, String> {
        text.parse::<ByteSize>().map(ByteSize::get).map_err(|error| error.to_string())
    }

    #[test]
    fn durations_are_read_and_written_with_a_unit() {
        for exact in ["0s", "250ms", "30s", "5m", "1h", "1d", "90s", "1500ms", "7us", "3ns"] {
            assert_eq!(duration(exact).as_deref(), Ok(exact));
        }
        assert_eq!(duration("1m30s").as_deref(), Ok("90s"));
        assert_eq!(duration("1m 30s").as_deref(), Ok("90s"));
        assert_eq!(duration("1.5s").as_deref(), Ok("1500ms"));
        assert_eq!(duration("60m").as_deref(), Ok("1h"));
    }

    #[test]
    fn a_wrong_duration_is_told_what_would_be_right() {
        assert_eq!(duration("30").unwrap_err(), "`30` has no unit: write `30s` for seconds or `30ms` for milliseconds");
        let form = "write a number with its unit, as in `250ms`, `30s`, `5m`, `1h` or `1d`";
        for wrong in ["", " ", "fast", "5M", "-1s", "1,5s", "s", "5 parsecs", "99999999999s", "٣s"] {
            assert_eq!(duration(wrong), Err(format!("`{wrong}` is no duration: {form}")));
        }
        assert_eq!(duration("366d").unwrap_err(), "`366d` is too long: the longest is `365d`");
        assert!(duration("18446744073709551615s 1000000000ns").is_err());
        assert!(read::<HumanDuration>(30).unwrap_err().starts_with("`30` has no unit"));
        assert!(read::<HumanDuration>(1.5).unwrap_err().contains("expected a number with its unit"));
    }

    #[test]
    fn sizes_count_by_1024_or_by_1000_as_they_say() {
        assert_eq!(size("0"), Ok(0));
        assert_eq!(size("64KiB"), Ok(65_536));
        assert_eq!(size("10 MiB"), Ok(10 << 20));
        assert_eq!(size("1GB"), Ok(1_000_000_000));
        assert_eq!(size("1kB"), Ok(1000));
        assert_eq!(size("17B"), Ok(17));
        assert_eq!(read::<ByteSize>(4096).map(ByteSize::get), Ok(4096));
        assert_eq!(ByteSize::from_bytes(1 << 30).to_string(), "1GiB");
        assert_eq!(ByteSize::from_bytes(1500).to_string(), "1500B");
        assert_eq!(ByteSize::from_bytes(0).to_string(), "0B");
    }

    #[test]
    fn a_wrong_size_is_told_what_would_be_right() {
        let form = "write a number of bytes with its unit, as in `64KiB`, `10MiB` or `1GB`";
        for wrong in ["", "big", "64K", "1.5MiB", "-1", "KiB", "1PiB", "1 2KiB"] {
            assert_eq!(size(wrong), Err(format!("`{wrong}` is no size: {form}")));
        }
        assert_eq!(size("99999999TiB").unwrap_err(), "`99999999TiB` is too much: the most is `18446744073709551615B`");
        assert!(size("99999999999999999999").unwrap_err().contains("is too much"));
        assert!(read::<ByteSize>(-1).unwrap_err().contains("expected a number of bytes"));
    }

    #[test]
    fn off_switches_off_and_all_else_is_for_the_value_to_judge() {
        type Limit = Toggle<HumanDuration>;
        assert_eq!(read::<Limit>("off"), Ok(Toggle::Off));
        assert_eq!(read::<Limit>(false), Ok(Toggle::Off));
        assert_eq!(read::<Limit>("5s"), Ok(Toggle::On(HumanDuration::from_secs(5))));
        assert!(read::<Limit>(5).unwrap_err().starts_with("`5` has no unit"));
        assert!(read::<Limit>("on").unwrap_err().starts_with("`on` is no duration"));
        assert_eq!(read::<Toggle<OneOrMany<String>>>(["a", "b"].as_slice()).unwrap().on().unwrap().0, ["a", "b"]);
    }

    #[test]
    fn one_value_is_a_list_of_one() {
        assert_eq!(read::<OneOrMany<String>>("a").unwrap().0, ["a"]);
        assert_eq!(read::<OneOrMany<String>>(["a", "b"].as_slice()).unwrap().0, ["a", "b"]);
        assert!(read::<OneOrMany<String>>(true).unwrap_err().contains("one value or a list of them"));
    }

    #[test]
    fn secrets_come_from_the_environment_a_file_or_the_text() {
        let from = |key: &str, name: &str| read::<Secret>(figment::util::map![key => name]);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        std::fs::write(&path, "hush\n").unwrap();
        let path = path.to_str().unwrap();
        assert_eq!(from("file", path).unwrap().reveal().as_deref(), Ok("hush"));
        assert_eq!(read::<Secret>("hush").unwrap().reveal().as_deref(), Ok("hush"));
        assert_eq!(read::<Secret>(12345).unwrap().reveal().as_deref(), Ok("12345"));
        // Cargo sets it for every test.
        assert_eq!(from("env", "CARGO_PKG_NAME").unwrap().reveal().as_deref(), Ok("sidegate"));
        let missing = from("env", "SIDEGATE_TEST_NOT_SET").unwrap().reveal().unwrap_err();
        assert_eq!(missing, "the environment variable `SIDEGATE_TEST_NOT_SET` is not set");
        assert!(from("file", "/not/there").unwrap().reveal().unwrap_err().starts_with("`/not/there` cannot be read"));
        std::fs::write(path, "\n").unwrap();
        assert_eq!(from("file", path).unwrap().reveal(), Err(format!("`{path}` is empty")));
    }

    #[test]
    fn a_secret_is_in_no_message() {
        let secret = read::<Secret>("hush").unwrap();
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        let wrong = [
            read::<Secret>(figment::util::map!["hush" => "hush"]),
            read::<Secret>(["hush"].as_slice()),
            read::<Secret>(true),
            read::<Secret>(1.5),
        ];
        for wrong in wrong {
            let message = wrong.unwrap_err();
            assert!(!message.contains("hush") && !message.contains("true") && !message.contains("1.5"), "{message}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_parser_panic(text: String) {
            prop_assert!(text.parse::<HumanDuration>().is_ok() || !duration(&text).unwrap_err().is_empty());
            prop_assert!(text.parse::<ByteSize>().is_ok() || !size(&text).unwrap_err().is_empty());
        }

        #[test]
        fn nearly_right_text_makes_no_parser_panic(text in "([0-9]{0,22}\\.?[0-9]{0,12} ?(ns|us|ms|s|m|h|d|M|y|[KMGT]i?B|B)? ?){0,4}") {
            if let Ok(duration) = text.parse::<HumanDuration>() {
                prop_assert!(duration <= HumanDuration::MAX);
            }
            drop(text.parse::<ByteSize>());
        }

        #[test]
        fn what_is_written_is_read_back(nanos in 0..=HumanDuration::MAX.get().as_nanos(), bytes: u64, shift in 0..64u32) {
            let nanos = u64::try_from(nanos).unwrap() >> shift;
            let duration = HumanDuration(Duration::from_nanos(nanos));
            // The longest exact number of nanoseconds has more digits than a file may write.
            if duration.to_string().len() <= 12 {
                prop_assert_eq!(duration.to_string().parse(), Ok(duration));
            }
            let size = ByteSize(bytes >> shift);
            prop_assert_eq!(size.to_string().parse(), Ok(size));
        }
    }
}
