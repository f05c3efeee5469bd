//! JSON (RFC 8259), read while it passes.

use super::bytes::Short;
use crate::message::bytes::run;

/// How deep arrays and objects may lie in each other, as for `serde_json`. What lies deeper is not read.
const MAX_DEPTH: u8 = 127;

/// How much of a key or string is kept to be compared. Longer ones are none that anybody asks for.
const MAX_TEXT: usize = 64;

/// What has just been read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Token {
    /// The key of a member: [`Json::text`].
    Key,
    /// A string: [`Json::text`].
    Text,
    /// A number without sign, fraction and exponent; the greatest that there is in place of a greater one.
    Count(u64),
    /// Any other number.
    Number,
    Null,
    False,
    True,
    /// An array has begun.
    Array,
    /// An object has begun.
    Object,
}

/// Reads one JSON text in whatever frames it comes.
///
/// It accepts what RFC 8259 accepts, except that it does not look whether strings are UTF-8 or surrogates paired.
/// It has a fixed size: of the text it keeps where it is, and the beginning of the last key or string.
#[derive(Debug, Clone)]
pub(super) struct Json {
    state: State,
    /// How many arrays and objects are open.
    depth: u8,
    /// Which of them are objects: a bit for each, the innermost lowest.
    objects: u128,
    /// The last key or string.
    text: Short<MAX_TEXT>,
    is_key: bool,
    /// The last number, while it can be a count.
    count: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// A value has to come.
    Value,
    /// A value or `]` has to come.
    FirstValue,
    /// A key has to come.
    Key,
    /// A key or `}` has to come.
    FirstKey,
    Colon,
    /// A value has ended.
    After,
    /// Within a key or string.
    Text,
    /// After `\`.
    Escape,
    /// So many hexadecimal digits have to come.
    Hex(u8),
    Number(Number),
    /// The rest of a literal has to come.
    Literal(&'static [u8], Token),
    Invalid,
}

/// What of a number came last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Number {
    Minus,
    Zero,
    Integer,
    Point,
    Fraction,
    Exponent,
    Sign,
    Power,
}

impl Json {
    pub(super) const fn new() -> Self {
        Self { state: State::Value, depth: 0, objects: 0, text: Short::new(), is_key: false, count: None }
    }

    /// Begins anew.
    pub(super) const fn clear(&mut self) {
        (self.state, self.depth) = (State::Value, 0);
    }

    /// How many arrays and objects are open. One that has just begun counts.
    pub(super) const fn depth(&self) -> u8 {
        self.depth
    }

    /// The last key or string; `None` if it is long or has an escape, which none that is asked for has.
    pub(super) fn text(&self) -> Option<&[u8]> {
        self.text.get()
    }

    /// Whether what was read is no JSON, whatever may still come.
    pub(super) const fn is_invalid(&self) -> bool {
        matches!(self.state, State::Invalid)
    }

    /// Whether what was read is a JSON text. (A number that stands alone needs a space after it.)
    pub(super) const fn is_complete(&self) -> bool {
        matches!(self.state, State::After) && self.depth == 0
    }

    /// Reads on until there is something to tell, and takes what it has read off `bytes`; `None` when all is read.
    pub(super) fn next(&mut self, bytes: &mut &[u8]) -> Option<Token> {
        while let Some((&byte, rest)) = bytes.split_first() {
            let token = match self.state {
                State::Text => {
                    let (run, rest) = bytes.split_at(run(bytes, |byte| matches!(byte, b'"' | b'\\' | 0..0x20)));
                    self.text.extend(run);
                    *bytes = rest;
                    if let Some((&byte, rest)) = rest.split_first() {
                        *bytes = rest;
                        self.after_run(byte)
                    } else {
                        None
                    }
                }
                // Most bytes of an embedding.
                State::Number(Number::Fraction) if byte.is_ascii_digit() => {
                    let end = rest.iter().position(|byte| !byte.is_ascii_digit()).unwrap_or(rest.len());
                    *bytes = &rest[end..];
                    None
                }
                State::Number(number) => match step(number, byte) {
                    Some(State::After) => {
                        // The byte belongs to what follows.
                        self.state = State::After;
                        Some(self.count.map_or(Token::Number, Token::Count))
                    }
                    next => {
                        *bytes = rest;
                        self.digit(next, byte);
                        None
                    }
                },
                State::Invalid => {
                    *bytes = &[];
                    None
                }
                _ => {
                    *bytes = rest;
                    self.structure(byte)
                }
            };
            if token.is_some() {
                return token;
            }
        }
        None
    }

    /// The byte that ends a run of plain ones in a string.
    fn after_run(&mut self, byte: u8) -> Option<Token> {
        match byte {
            b'"' if self.is_key => {
                self.state = State::Colon;
                Some(Token::Key)
            }
            b'"' => {
                self.state = State::After;
                Some(Token::Text)
            }
            b'\\' => {
                self.text.spoil();
                self.state = State::Escape;
                None
            }
            _ => self.invalid(),
        }
    }

    /// A byte that belongs to a number.
    fn digit(&mut self, next: Option<State>, byte: u8) {
        self.state = next.unwrap_or(State::Invalid);
        self.count = match next {
            Some(State::Number(Number::Integer)) => {
                self.count.map(|count| count.saturating_mul(10).saturating_add(u64::from(byte - b'0')))
            }
            _ => None,
        };
    }

    /// A byte outside of strings and numbers, or of an escape.
    fn structure(&mut self, byte: u8) -> Option<Token> {
        let in_object = self.objects & 1 == 1;
        match (self.state, byte) {
            (State::Escape, b'"' | b'\\' | b'/' | b'b' | b'f' | b'n' | b'r' | b't') => self.go(State::Text),
            (State::Escape, b'u') => self.go(State::Hex(4)),
            (State::Hex(1), _) if byte.is_ascii_hexdigit() => self.go(State::Text),
            (State::Hex(left), _) if byte.is_ascii_hexdigit() => self.go(State::Hex(left - 1)),
            (State::Literal([last], token), _) if *last == byte => {
                self.state = State::After;
                Some(token)
            }
            (State::Literal([first, rest @ ..], token), _) if *first == byte => self.go(State::Literal(rest, token)),
            (State::Escape | State::Hex(_) | State::Literal(..), _) => self.invalid(),
            (_, b' ' | b'\t' | b'\n' | b'\r') => None,
            (State::After, b',') if self.depth > 0 => self.go(if in_object { State::Key } else { State::Value }),
            (State::After, b'}') if self.depth > 0 && in_object => self.close(),
            (State::After, b']') if self.depth > 0 && !in_object => self.close(),
            (State::FirstKey, b'}') | (State::FirstValue, b']') => self.close(),
            (State::FirstKey | State::Key, b'"') => {
                self.is_key = true;
                self.text.clear();
                self.go(State::Text)
            }
            (State::Colon, b':') => self.go(State::Value),
            (State::Value | State::FirstValue, _) => self.value(byte),
            _ => self.invalid(),
        }
    }

    /// The first byte of a value.
    fn value(&mut self, byte: u8) -> Option<Token> {
        self.count = None;
        match byte {
            b'"' => {
                self.is_key = false;
                self.text.clear();
                self.go(State::Text)
            }
            b'{' => self.open(Token::Object, State::FirstKey),
            b'[' => self.open(Token::Array, State::FirstValue),
            b'-' => self.go(State::Number(Number::Minus)),
            b'0' => {
                self.count = Some(0);
                self.go(State::Number(Number::Zero))
            }
            b'1'..=b'9' => {
                self.count = Some(u64::from(byte - b'0'));
                self.go(State::Number(Number::Integer))
            }
            b'n' => self.go(State::Literal(b"ull", Token::Null)),
            b't' => self.go(State::Literal(b"rue", Token::True)),
            b'f' => self.go(State::Literal(b"alse", Token::False)),
            _ => self.invalid(),
        }
    }

    fn open(&mut self, token: Token, state: State) -> Option<Token> {
        if self.depth == MAX_DEPTH {
            return self.invalid();
        }
        self.depth += 1;
        self.objects = self.objects << 1 | u128::from(token == Token::Object);
        self.state = state;
        Some(token)
    }

    const fn close(&mut self) -> Option<Token> {
        self.depth -= 1;
        self.objects >>= 1;
        self.go(State::After)
    }

    const fn go(&mut self, state: State) -> Option<Token> {
        self.state = state;
        None
    }

    const fn invalid(&mut self) -> Option<Token> {
        self.go(State::Invalid)
    }
}

/// What comes after `byte` of a number: `After` if the number has ended before it, `None` if it must not stand there.
const fn step(number: Number, byte: u8) -> Option<State> {
    use Number::{Exponent, Fraction, Integer, Minus, Point, Power, Sign, Zero};
    let next = match (number, byte) {
        (Minus, b'0') => Zero,
        (Minus, b'1'..=b'9') | (Integer, b'0'..=b'9') => Integer,
        (Zero | Integer, b'.') => Point,
        (Point | Fraction, b'0'..=b'9') => Fraction,
        (Zero | Integer | Fraction, b'e' | b'E') => Exponent,
        (Exponent, b'+' | b'-') => Sign,
        (Exponent | Sign | Power, b'0'..=b'9') => Power,
        (Zero, b'0'..=b'9') | (Minus | Point | Exponent | Sign, _) => return None,
        (Zero | Integer | Fraction | Power, _) => return Some(State::After),
    };
    Some(State::Number(next))
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use serde::de::IgnoredAny;
    use serde_json::Value;

    use super::*;

    /// What there is to tell, with its depth and, of a key or string, its text.
    type Told = (Token, u8, Option<Vec<u8>>);

    fn read<'a>(frames: impl IntoIterator<Item = &'a [u8]>) -> (Vec<Told>, Json) {
        let mut json = Json::new();
        let mut told = Vec::new();
        for mut frame in frames {
            while let Some(token) = json.next(&mut frame) {
                let text = matches!(token, Token::Key | Token::Text).then(|| json.text().map(<[u8]>::to_vec));
                told.push((token, json.depth(), text.flatten()));
            }
            assert!(frame.is_empty());
        }
        (told, json)
    }

    fn is_json(text: &[u8]) -> bool {
        read([text, b" "]).1.is_complete()
    }

    /// The same of a text that is there as a whole.
    fn walk(value: &Value, depth: u8, told: &mut Vec<Told>) {
        let kept = |text: &str| {
            let escaped = serde_json::to_string(text).unwrap().len() != text.len() + 2;
            (text.len() <= MAX_TEXT && !escaped).then(|| text.as_bytes().to_vec())
        };
        match value {
            Value::Null => told.push((Token::Null, depth, None)),
            Value::Bool(false) => told.push((Token::False, depth, None)),
            Value::Bool(true) => told.push((Token::True, depth, None)),
            Value::Number(number) => {
                told.push((number.as_u64().map_or(Token::Number, Token::Count), depth, None));
            }
            Value::String(text) => told.push((Token::Text, depth, kept(text))),
            Value::Array(values) => {
                told.push((Token::Array, depth + 1, None));
                for value in values {
                    walk(value, depth + 1, told);
                }
            }
            Value::Object(members) => {
                told.push((Token::Object, depth + 1, None));
                for (key, value) in members {
                    told.push((Token::Key, depth + 1, kept(key)));
                    walk(value, depth + 1, told);
                }
            }
        }
    }

    /// Any JSON value, in which `keys` are frequent.
    pub(in super::super) fn values(keys: &'static [&'static str]) -> impl Strategy<Value = Value> {
        let key = prop_oneof![4 => prop::sample::select(keys).prop_map(str::to_owned), 1 => any::<String>()];
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (0u64..1000).prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            any::<f64>().prop_map(Value::from),
            any::<String>().prop_map(Value::from),
            key.clone().prop_map(Value::from),
            "[ -~]{60,70}".prop_map(Value::from),
        ];
        leaf.prop_recursive(5, 60, 6, move |inner| {
            prop_oneof![
                1 => prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                3 => prop::collection::btree_map(key.clone(), inner, 0..6)
                    .prop_map(Value::from_iter),
            ]
        })
    }

    /// Cuts `bytes` into frames at `cuts`, which may lie anywhere.
    pub(in super::super) fn frames<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
        cuts.extend([0, bytes.len()]);
        cuts.sort_unstable();
        cuts.windows(2).map(|cut| &bytes[cut[0]..cut[1]]).collect()
    }

    pub(in super::super) fn cuts() -> impl Strategy<Value = Vec<prop::sample::Index>> {
        prop::collection::vec(any::<prop::sample::Index>(), 0..10)
    }

    #[test]
    fn numbers_are_counts_only_as_whole_numbers_without_a_sign() {
        let number = |text: &str| {
            let (told, json) = read([text.as_bytes(), b" "]);
            assert_eq!(json.is_complete(), told.len() == 1, "{text}");
            told.first().map(|told| told.0)
        };
        assert_eq!(number("0"), Some(Token::Count(0)));
        assert_eq!(number("120"), Some(Token::Count(120)));
        assert_eq!(number("18446744073709551615"), Some(Token::Count(u64::MAX)));
        assert_eq!(number("99999999999999999999999999"), Some(Token::Count(u64::MAX)), "saturates");
        for other in ["-1", "-0", "1.0", "0.5", "1e3", "12E-1", "0e0", "-1.5e+10"] {
            assert_eq!(number(other), Some(Token::Number), "{other}");
        }
        for wrong in ["01", "-", "1.", ".5", "1e", "1e+", "+1", "1a", "0x10", "--1"] {
            assert!(!is_json(wrong.as_bytes()), "{wrong}");
        }
    }

    #[test]
    fn an_escape_ends_no_string() {
        let (told, json) = read([br#"{"a\"b": "\\", "usage\\": "\u00e9\"", "c": "d"}"#.as_slice()]);
        assert!(json.is_complete());
        let texts: Vec<_> = told.into_iter().skip(1).map(|told| told.2).collect();
        assert_eq!(texts, [None, None, None, None, Some(b"c".to_vec()), Some(b"d".to_vec())]);
    }

    #[test]
    fn what_lies_too_deep_is_not_read() {
        let nested = |depth: usize| ["[".repeat(depth), "]".repeat(depth)].concat();
        assert!(is_json(nested(MAX_DEPTH.into()).as_bytes()));
        assert!(read([nested(usize::from(MAX_DEPTH) + 1).as_bytes()]).1.is_invalid());
    }

    #[test]
    fn a_long_string_takes_no_memory() {
        let (told, json) = read(std::iter::once(b"\"".as_slice()).chain((0..1000).map(|_| [b'x'; 1000].as_slice())));
        assert!(told.is_empty() && json.text().is_none());
    }

    proptest! {
        #[test]
        fn it_tells_what_serde_json_reads(value in values(&["usage", "a"]), pretty: bool, cuts in cuts()) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) };
            let text = text.unwrap() + " ";
            let mut expected = Vec::new();
            walk(&value, 0, &mut expected);
            let (told, json) = read(frames(text.as_bytes(), &cuts));
            prop_assert!(json.is_complete());
            prop_assert_eq!(told, expected);
        }

        /// Valid texts with a few bytes changed, and texts of pieces that matter.
        #[test]
        fn it_accepts_what_serde_json_accepts(
            value in values(&["usage", "a"]),
            changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(&b"\"\\{}[]:,0-.eE+tn u\n\0x\xFF"[..])), 0..3),
        ) {
            let mut text = serde_json::to_vec(&value).unwrap();
            for (index, byte) in changes {
                let index = index.index(text.len());
                text[index] = byte;
            }
            prop_assert_eq!(
                is_json(&text),
                serde_json::from_slice::<IgnoredAny>(&text).is_ok(),
                "{}", text.escape_ascii()
            );
        }

        #[test]
        fn it_accepts_what_serde_json_accepts_of_pieces(
            pieces in prop::collection::vec(
                prop::sample::select(vec!["{", "}", "[", "]", ",", ":", "\"\"", "\"a\"", "\"\\u12aF\"", "\\", "1", "0", "-", ".", "e", "+", "null", "true", "false", "t", " "]),
                0..12,
            ),
        ) {
            let text = pieces.concat();
            let expected = serde_json::from_str::<IgnoredAny>(&text).is_ok();
            prop_assert_eq!(is_json(text.as_bytes()), expected, "{}", text);
        }

        #[test]
        fn frames_do_not_matter(bytes in prop::collection::vec(any::<u8>(), 0..60), cuts in cuts()) {
            prop_assert_eq!(read(frames(&bytes, &cuts)).0, read([&*bytes]).0);
        }
    }
}
