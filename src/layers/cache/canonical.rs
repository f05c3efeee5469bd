//! What a JSON body says, however it is written: a hash for the key of a cached answer, and conditions on members.
//!
//! Two bodies have the same hash only where every reader takes them for the same: the order of members and white space
//! do not matter, nor how a string is escaped or a number spelled. Nothing is rounded, as RFC 8785 (§3.2.2.3) would:
//! whole numbers beyond 2^53 are different ones to most readers. What readers take differently has no hash: members
//! that stand twice (RFC 8259 §4) and halves of surrogate pairs (RFC 7493 §2.1).

use std::{borrow::Cow, collections::BTreeMap, fmt, str::FromStr};

use ring::digest::Context;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use serde_json::Value;

use crate::{
    config::{Check, Problems},
    message::bytes::run,
};

/// How deep arrays and objects may lie in each other: deeper than any API has them, and no danger to the stack.
const MAX_DEPTH: usize = 64;

/// The members by which a model is given tools (`OpenAI`, Anthropic, Ollama), at the top of a body. What was found out by
/// a tool, or is to be done with one, is no answer to somebody else.
const TOOLS: [&str; 4] = ["functions", "mcp_servers", "tools", "web_search_options"];

/// Why a body has no hash, or fails a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Why {
    /// It is no JSON text, or has a byte order mark.
    NotJson,
    /// A string has half of a surrogate pair.
    LoneSurrogate,
    /// It is nested deeper than 64 times.
    TooDeep,
    /// It has 4 GiB or more.
    TooLong,
    /// An object has two members of the same name.
    DuplicateMember,
    /// A member is not what a condition asks for.
    Condition,
    /// It asks for tools.
    Tools,
}

impl Why {
    /// The word for `detail` of `Cache-Status` (RFC 9211 §2.8).
    pub(super) const fn as_str(self) -> &'static str {
        match self {
            Self::NotJson => "body-not-json",
            Self::LoneSurrogate => "body-lone-surrogate",
            Self::TooDeep => "body-too-deep",
            Self::TooLong => "body-too-long",
            Self::DuplicateMember => "body-duplicate-member",
            Self::Condition => "body-condition",
            Self::Tools => "tools",
        }
    }
}

/// Which JSON bodies are cached, and what of them makes a difference. Section `body` of `cache`.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "CacheBody")]
pub struct Body {
    /// Members that make no difference, with all that is below them: `user`, `metadata.trace_id`, or as a JSON pointer
    /// (RFC 6901) `/metadata/trace.id`. Default none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ignore: Vec<Path>,
    /// What members have to be for the answer to be cached, `{temperature: [0, null]}`: one of these values, of which
    /// `null` is also that there is no such member. Default no conditions.
    #[serde(skip_serializing_if = "When::is_empty")]
    pub when: When,
    /// Whether requests that give a model tools are cached too: those with a member `tools`, `functions`, `mcp_servers`
    /// or `web_search_options` that is neither `null` nor an empty list. Default `false`.
    pub tools: bool,
}

impl Check for Body {
    fn check(&self, problems: &mut Problems) {
        for (n, path) in self.ignore.iter().enumerate() {
            if path.0 == ["stream"] {
                problems.add("ignore", "holds `stream`, on which depends whether the answer is a stream");
            } else if self.ignore.iter().take(n).any(|other| other == path) {
                problems.add("ignore", format!("holds `{path}` twice"));
            } else if let Some(above) = self.ignore.iter().find(|above| *above != path && path.0.starts_with(&above.0))
            {
                problems.add("ignore", format!("holds `{path}`, which `{above}` leaves out already"));
            }
        }
        problems.at("when", |problems| self.when.check(problems));
    }
}

/// Conditions on members of a JSON text: of each path, the values that pass.
#[derive(Debug, Clone, PartialEq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(transparent)]
#[schemars(transparent, rename = "JsonConditions")]
pub struct When(BTreeMap<Path, Values>);

impl When {
    /// Whether everything passes.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether the JSON text passes.
    ///
    /// # Errors
    /// That it does not, or cannot be read.
    pub(super) fn pass(&self, text: &[u8]) -> Result<(), Why> {
        self.pass_read(&Tape::read(text)?)
    }

    fn pass_read(&self, tape: &Tape<'_>) -> Result<(), Why> {
        let pass = |(path, values): (&Path, &Values)| match tape.member(path) {
            Some(key) => values.contain(tape, Tape::value_of(key)),
            None => values.with_null(),
        };
        if self.0.iter().all(pass) { Ok(()) } else { Err(Why::Condition) }
    }
}

impl Check for When {
    fn check(&self, problems: &mut Problems) {
        for (path, values) in &self.0 {
            if values.0.is_empty() {
                problems.add(path, "is an empty list, which nothing passes: `null` stands for no such member");
            }
        }
    }
}

/// Values of which a member has to be one: a list, or the only one.
#[derive(Debug, Clone, PartialEq)]
pub struct Values(Vec<Wanted>);

#[derive(Debug, Clone, PartialEq)]
struct Wanted {
    value: Value,
    /// As [`Tape::write`] has it.
    written: Vec<u8>,
}

impl Values {
    fn with_null(&self) -> bool {
        self.0.iter().any(|wanted| wanted.value.is_null())
    }

    fn contain(&self, tape: &Tape<'_>, node: u32) -> bool {
        let longest = self.0.iter().map(|wanted| wanted.written.len()).max().unwrap_or_default();
        let mut written = Short { bytes: Vec::with_capacity(longest), longest };
        tape.write(node, &[], &mut written);
        self.0.iter().any(|wanted| wanted.written == written.bytes)
    }
}

impl TryFrom<Vec<Value>> for Values {
    type Error = String;

    fn try_from(values: Vec<Value>) -> Result<Self, String> {
        let read = |value: Value| {
            let text = value.to_string();
            let wrong = |why: Why| format!("holds a value that no body can have: {}", why.as_str());
            let tape = Tape::read(text.as_bytes()).map_err(wrong)?;
            let mut written = Short { bytes: Vec::new(), longest: usize::MAX };
            tape.write(0, &[], &mut written);
            Ok(Wanted { value, written: written.bytes })
        };
        values.into_iter().map(read).collect::<Result<_, _>>().map(Self)
    }
}

impl<'de> Deserialize<'de> for Values {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let values = match Value::deserialize(from)? {
            Value::Array(values) => values,
            value => vec![value],
        };
        values.try_into().map_err(D::Error::custom)
    }
}

impl Serialize for Values {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_seq(self.0.iter().map(|wanted| &wanted.value))
    }
}

impl JsonSchema for Values {
    fn schema_name() -> Cow<'static, str> {
        "JsonValues".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "description": "The values that pass: a list, or the only one. `null` is also that there is no such member.",
        })
    }
}

/// Where a member stands: the names that lead to it, from the outermost object. It does not lead into arrays.
///
/// `metadata.trace_id`; or as a JSON pointer (RFC 6901), `/metadata/trace_id`, where a name has a dot in it or nothing.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Path(Vec<String>);

impl FromStr for Path {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("`{text}` is no member: write `user`, `metadata.trace_id` or `/metadata/trace_id`");
        if let Some(pointer) = text.strip_prefix('/') {
            let mut encoded = text.split('~').skip(1);
            if !encoded.all(|after| after.starts_with(['0', '1'])) {
                return Err(format!("`{text}` is no JSON pointer: `~` is written `~0` there, and `/` in a name `~1`"));
            }
            return Ok(Self(pointer.split('/').map(|name| name.replace("~1", "/").replace("~0", "~")).collect()));
        }
        let names: Vec<_> = text.split('.').map(str::to_owned).collect();
        if names.iter().any(String::is_empty) { Err(wrong()) } else { Ok(Self(names)) }
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(names) = self;
        let is_pointer = names.iter().any(|name| name.is_empty() || name.contains('.'))
            || names.iter().take(1).any(|name| name.starts_with('/'));
        for (n, name) in names.iter().enumerate() {
            match (is_pointer, n) {
                (true, _) => write!(f, "/{}", name.replace('~', "~0").replace('/', "~1"))?,
                (false, 0) => f.write_str(name)?,
                (false, _) => write!(f, ".{name}")?,
            }
        }
        Ok(())
    }
}

impl<'de> Deserialize<'de> for Path {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(D::Error::custom)
    }
}

impl Serialize for Path {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl JsonSchema for Path {
    fn schema_name() -> Cow<'static, str> {
        "JsonMember".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "A member of a JSON object: `user`, `metadata.trace_id`, or as a JSON pointer `/metadata/trace_id`.",
            "minLength": 1,
        })
    }
}

/// What a body that has a hash asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Asked {
    /// The member `stream`, where it is `true` or `false`. It is part of the hash, too. Without it, answers of Ollama are
    /// streams, and those of most others are not.
    pub(super) stream: Option<bool>,
}

/// Adds what the JSON text says to a hash, without what the rules ignore. It is added so that its end can be told from
/// what comes after it.
///
/// # Errors
/// Why the body must not be cached. Nothing has been added then.
pub(super) fn digest(text: &[u8], rules: &Body, into: &mut Context) -> Result<Asked, Why> {
    let tape = Tape::read(text)?;
    let is_empty = |node: &Node| matches!(node, Node::Null | Node::Array { len: 0, .. });
    if !rules.tools && TOOLS.iter().filter_map(|name| tape.top(name)).any(|node| !is_empty(node)) {
        return Err(Why::Tools);
    }
    rules.when.pass_read(&tape)?;
    Ok(write(&tape, rules, into))
}

/// As [`digest`], of a body whose answer must not be cached, too: what it asks for is the same as what another does.
///
/// # Errors
/// Why it has no hash. Nothing has been added then.
pub(super) fn identity(text: &[u8], rules: &Body, into: &mut Context) -> Result<Asked, Why> {
    Ok(write(&Tape::read(text)?, rules, into))
}

fn write(tape: &Tape<'_>, rules: &Body, into: &mut Context) -> Asked {
    let mut ignored: Vec<_> = rules.ignore.iter().filter_map(|path| tape.member(path)).collect();
    ignored.sort_unstable();
    let mut hash = Hash { into, staged: [0; STAGED], len: 0 };
    tape.write(0, &ignored, &mut hash);
    hash.flush();
    let stream = match tape.top("stream") {
        Some(Node::True) => Some(true),
        Some(Node::False) => Some(false),
        _ => None,
    };
    Asked { stream }
}

/// What is written to.
trait Sink {
    fn put(&mut self, bytes: &[u8]);
}

const STAGED: usize = 512;

/// A hash, to which little is added at a time: each time costs as much as some twenty bytes.
struct Hash<'a> {
    into: &'a mut Context,
    staged: [u8; STAGED],
    len: usize,
}

impl Hash<'_> {
    fn flush(&mut self) {
        self.into.update(self.staged.split_at(self.len).0);
        self.len = 0;
    }
}

impl Sink for Hash<'_> {
    fn put(&mut self, bytes: &[u8]) {
        if bytes.len() > STAGED - self.len {
            self.flush();
        }
        match self.staged.get_mut(self.len..self.len + bytes.len()) {
            Some(room) => {
                room.copy_from_slice(bytes);
                self.len += bytes.len();
            }
            None => self.into.update(bytes),
        }
    }
}

/// Bytes for a comparison with others that are not longer: since no value's form is the beginning of another's, what
/// comes after as many does not matter.
struct Short {
    bytes: Vec<u8>,
    longest: usize,
}

impl Sink for Short {
    fn put(&mut self, bytes: &[u8]) {
        let room = self.longest - self.bytes.len();
        self.bytes.extend(bytes.iter().take(room));
    }
}

/// A JSON text as a list of its values, each before those within it. Places are numbers of 32 bits, so that a value takes
/// 16 bytes: at the most 8 for each byte of the text.
struct Tape<'a> {
    text: &'a [u8],
    /// The strings that had escapes, without them.
    decoded: Vec<u8>,
    /// The values, and before each that is a member its name.
    nodes: Vec<Node>,
    /// The names of the members of all objects, each object's in order.
    names: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
enum Node {
    Null,
    False,
    True,
    Number {
        at: u32,
        len: u32,
    },
    Text {
        at: u32,
        len: u32,
        /// Which text it stands in.
        decoded: bool,
    },
    Array {
        /// Where the values within it end.
        end: u32,
        /// How many of the nodes are within it.
        len: u32,
    },
    Object {
        end: u32,
        /// Its members in [`Tape::names`].
        first: u32,
        members: u32,
    },
}

const fn index(place: u32) -> usize {
    place as usize
}

impl<'a> Tape<'a> {
    fn read(text: &'a [u8]) -> Result<Self, Why> {
        if u32::try_from(text.len()).is_err() {
            return Err(Why::TooLong);
        }
        // All strings at once, which is faster than one by one.
        if std::str::from_utf8(text).is_err() {
            return Err(Why::NotJson);
        }
        let tape = Self { text, decoded: Vec::new(), nodes: Vec::with_capacity(64), names: Vec::with_capacity(32) };
        let mut reader = Reader { rest: text, open: Vec::with_capacity(16), tape };
        reader.value(MAX_DEPTH)?;
        reader.space();
        if reader.rest.is_empty() { Ok(reader.tape) } else { Err(Why::NotJson) }
    }

    fn node(&self, node: u32) -> Node {
        self.nodes.get(index(node)).copied().unwrap_or(Node::Null)
    }

    /// A number as it is spelled, or a string as it is meant.
    fn bytes(&self, node: u32) -> &[u8] {
        let (text, at, len) = match self.node(node) {
            Node::Number { at, len } | Node::Text { at, len, decoded: false } => (self.text, at, len),
            Node::Text { at, len, decoded: true } => (&*self.decoded, at, len),
            _ => return &[],
        };
        text.get(index(at)..index(at) + index(len)).unwrap_or_default()
    }

    /// The value of the member with this name.
    const fn value_of(name: u32) -> u32 {
        name + 1
    }

    fn members(&self, first: u32, members: u32) -> &[u32] {
        self.names.get(index(first)..index(first) + index(members)).unwrap_or_default()
    }

    /// The member of the object at `node` that has this name.
    fn find(&self, node: u32, name: &str) -> Option<u32> {
        let Node::Object { first, members, .. } = self.node(node) else { return None };
        let members = self.members(first, members);
        let found = members.binary_search_by(|&member| self.bytes(member).cmp(name.as_bytes())).ok()?;
        members.get(found).copied()
    }

    /// The value of the outermost object's member of this name.
    fn top(&self, name: &str) -> Option<&Node> {
        self.find(0, name).and_then(|key| self.nodes.get(index(Self::value_of(key))))
    }

    fn member(&self, Path(names): &Path) -> Option<u32> {
        let (first, rest) = names.split_first()?;
        rest.iter().try_fold(self.find(0, first)?, |member, name| self.find(Self::value_of(member), name))
    }

    /// Writes a value in the one form that it has, without the members in `ignored`, which are in order. No form is the
    /// beginning of another: strings have their length before them, arrays and objects what is no value after them.
    fn write(&self, node: u32, ignored: &[u32], to: &mut impl Sink) {
        match self.node(node) {
            Node::Null => to.put(b"n"),
            Node::False => to.put(b"f"),
            Node::True => to.put(b"t"),
            Node::Number { .. } => write_number(self.bytes(node), to),
            Node::Text { len, .. } => {
                let [one, two, three, four] = len.to_le_bytes();
                to.put(&[b'"', one, two, three, four]);
                to.put(self.bytes(node));
            }
            Node::Array { end, .. } => {
                to.put(b"[");
                let mut next = node + 1;
                while next < end {
                    self.write(next, ignored, to);
                    next = match self.node(next) {
                        Node::Array { end, .. } | Node::Object { end, .. } => end,
                        _ => next + 1,
                    };
                }
                to.put(b"]");
            }
            Node::Object { first, members, .. } => {
                to.put(b"{");
                for &name in self.members(first, members) {
                    if ignored.is_empty() || ignored.binary_search(&name).is_err() {
                        self.write(name, ignored, to);
                        self.write(Self::value_of(name), ignored, to);
                    }
                }
                to.put(b"}");
            }
        }
    }
}

/// Writes a number as what it is worth, exactly: its digits from the first to the last that is not 0, and the power of
/// ten with which they count. 1, 1.0 and 10e-1 are the same; 0 and -0, which divide differently, are not.
fn write_number(text: &[u8], to: &mut impl Sink) {
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

/// Reads a text that is UTF-8, by RFC 8259.
struct Reader<'a> {
    rest: &'a [u8],
    /// The members of the objects that are open.
    open: Vec<u32>,
    tape: Tape<'a>,
}

/// There are no more bytes, and so no more places, than 32 bits count.
fn place(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}

impl<'a> Reader<'a> {
    fn space(&mut self) {
        // Most often there is none, or one.
        while let [b' ' | b'\n' | b'\r' | b'\t', rest @ ..] = self.rest {
            self.rest = rest;
        }
    }

    /// The next byte after white space.
    fn byte(&mut self) -> Result<u8, Why> {
        self.space();
        let (&byte, rest) = self.rest.split_first().ok_or(Why::NotJson)?;
        self.rest = rest;
        Ok(byte)
    }

    fn at(&self) -> u32 {
        place(self.tape.text.len() - self.rest.len())
    }

    fn push(&mut self, node: Node) -> u32 {
        self.tape.nodes.push(node);
        place(self.tape.nodes.len() - 1)
    }

    /// Reads a value in which arrays and objects go `deep`, and no deeper.
    fn value(&mut self, deep: usize) -> Result<(), Why> {
        match self.byte()? {
            b'"' => self.string().map(drop),
            b'{' => self.object(deep.checked_sub(1).ok_or(Why::TooDeep)?),
            b'[' => self.array(deep.checked_sub(1).ok_or(Why::TooDeep)?),
            b't' => self.literal(b"rue", Node::True),
            b'f' => self.literal(b"alse", Node::False),
            b'n' => self.literal(b"ull", Node::Null),
            first => self.number(first),
        }
    }

    fn literal(&mut self, rest: &[u8], node: Node) -> Result<(), Why> {
        self.rest = self.rest.strip_prefix(rest).ok_or(Why::NotJson)?;
        self.push(node);
        Ok(())
    }

    fn array(&mut self, deep: usize) -> Result<(), Why> {
        let node = self.push(Node::Null);
        self.space();
        if let [b']', rest @ ..] = self.rest {
            self.rest = rest;
        } else {
            loop {
                self.value(deep)?;
                match self.byte()? {
                    b',' => {}
                    b']' => break,
                    _ => return Err(Why::NotJson),
                }
            }
        }
        let end = place(self.tape.nodes.len());
        self.set(node, Node::Array { end, len: end - node - 1 });
        Ok(())
    }

    fn object(&mut self, deep: usize) -> Result<(), Why> {
        let (node, outer) = (self.push(Node::Null), self.open.len());
        self.space();
        if let [b'}', rest @ ..] = self.rest {
            self.rest = rest;
        } else {
            loop {
                if self.byte()? != b'"' {
                    return Err(Why::NotJson);
                }
                let name = self.string()?;
                self.open.push(name);
                if self.byte()? != b':' {
                    return Err(Why::NotJson);
                }
                self.value(deep)?;
                match self.byte()? {
                    b',' => {}
                    b'}' => break,
                    _ => return Err(Why::NotJson),
                }
            }
        }
        let tape = &mut self.tape;
        let members = self.open.get_mut(outer..).unwrap_or_default();
        members.sort_unstable_by(|&one, &other| tape.bytes(one).cmp(tape.bytes(other)));
        if members.windows(2).any(|pair| matches!(pair, &[one, other] if tape.bytes(one) == tape.bytes(other))) {
            return Err(Why::DuplicateMember);
        }
        let (end, first) = (place(tape.nodes.len()), place(tape.names.len()));
        tape.names.extend_from_slice(members);
        let members = place(members.len());
        self.open.truncate(outer);
        self.set(node, Node::Object { end, first, members });
        Ok(())
    }

    fn set(&mut self, node: u32, to: Node) {
        if let Some(node) = self.tape.nodes.get_mut(index(node)) {
            *node = to;
        }
    }

    fn number(&mut self, first: u8) -> Result<(), Why> {
        let at = self.at() - 1;
        let first = if first == b'-' { self.digit()? } else { first };
        match first {
            b'0' => {}
            b'1'..=b'9' => self.digits(),
            _ => return Err(Why::NotJson),
        }
        if let [b'.', rest @ ..] = self.rest {
            self.rest = rest;
            self.digit()?;
            self.digits();
        }
        if let [b'e' | b'E', rest @ ..] = self.rest {
            self.rest = match rest {
                [b'+' | b'-', rest @ ..] | rest => rest,
            };
            self.digit()?;
            self.digits();
        }
        let len = self.at() - at;
        self.push(Node::Number { at, len });
        Ok(())
    }

    fn digit(&mut self) -> Result<u8, Why> {
        let (&digit, rest) = self.rest.split_first().filter(|(byte, _)| byte.is_ascii_digit()).ok_or(Why::NotJson)?;
        self.rest = rest;
        Ok(digit)
    }

    fn digits(&mut self) {
        while let [b'0'..=b'9', rest @ ..] = self.rest {
            self.rest = rest;
        }
    }

    /// Takes the bytes up to a quotation mark, a backslash or what must not stand in a string, and that.
    fn plain(&mut self) -> Result<(&'a [u8], u8), Why> {
        let (plain, rest) = self.rest.split_at(run(self.rest, |byte| matches!(byte, b'"' | b'\\' | 0..0x20)));
        let (&end, rest) = rest.split_first().ok_or(Why::NotJson)?;
        self.rest = rest;
        Ok((plain, end))
    }

    /// Reads a string whose first quotation mark was read.
    fn string(&mut self) -> Result<u32, Why> {
        let at = self.at();
        let (mut plain, mut end) = self.plain()?;
        if end == b'"' {
            return Ok(self.push(Node::Text { at, len: place(plain.len()), decoded: false }));
        }
        let at = self.tape.decoded.len();
        loop {
            self.tape.decoded.extend_from_slice(plain);
            match end {
                b'"' => break,
                b'\\' => self.escape()?,
                _ => return Err(Why::NotJson),
            }
            (plain, end) = self.plain()?;
        }
        let len = place(self.tape.decoded.len() - at);
        Ok(self.push(Node::Text { at: place(at), len, decoded: true }))
    }

    /// Reads what comes after a backslash.
    fn escape(&mut self) -> Result<(), Why> {
        let (&byte, rest) = self.rest.split_first().ok_or(Why::NotJson)?;
        self.rest = rest;
        let byte = match byte {
            b'"' | b'\\' | b'/' => byte,
            b'b' => 0x08,
            b'f' => 0x0C,
            b'n' => b'\n',
            b'r' => b'\r',
            b't' => b'\t',
            b'u' => {
                let char = self.unicode()?;
                self.tape.decoded.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes());
                return Ok(());
            }
            _ => return Err(Why::NotJson),
        };
        self.tape.decoded.push(byte);
        Ok(())
    }

    /// Reads what comes after `\u`: of a pair of surrogates both halves.
    fn unicode(&mut self) -> Result<char, Why> {
        let first = self.hex()?;
        let code = match (first, self.rest) {
            (0xD800..=0xDBFF, [b'\\', b'u', rest @ ..]) => {
                self.rest = rest;
                let second = self.hex()?.checked_sub(0xDC00).filter(|low| *low < 0x400).ok_or(Why::LoneSurrogate)?;
                0x1_0000 + ((first - 0xD800) << 10 | second)
            }
            _ => first,
        };
        char::from_u32(code).ok_or(Why::LoneSurrogate)
    }

    fn hex(&mut self) -> Result<u32, Why> {
        let (digits, rest) = self.rest.split_first_chunk::<4>().ok_or(Why::NotJson)?;
        self.rest = rest;
        let digit = |code: Option<u32>, &digit: &u8| Some(code? << 4 | char::from(digit).to_digit(16)?);
        digits.iter().fold(Some(0), digit).ok_or(Why::NotJson)
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use proptest::prelude::*;
    use ring::digest::SHA256;
    use serde::de::IgnoredAny;
    use serde_json::json;

    use super::*;

    fn hash_by(text: &[u8], rules: &Body) -> Result<Vec<u8>, Why> {
        let mut context = Context::new(&SHA256);
        digest(text, rules, &mut context).map(|_| context.finish().as_ref().to_vec())
    }

    fn hash(text: &str) -> Result<Vec<u8>, Why> {
        hash_by(text.as_bytes(), &Body { tools: true, ..Body::default() })
    }

    fn written(text: &str) -> Vec<u8> {
        let mut to = Short { bytes: Vec::new(), longest: usize::MAX };
        Tape::read(text.as_bytes()).unwrap().write(0, &[], &mut to);
        to.bytes
    }

    fn rules(rules: &Value) -> Body {
        serde_json::from_value(rules.clone()).unwrap()
    }

    fn same(texts: &[&str]) {
        for text in texts {
            assert_eq!(hash(text).unwrap(), hash(texts[0]).unwrap(), "{text} {}", texts[0]);
        }
    }

    fn all_differ(texts: &[&str]) {
        for (n, text) in texts.iter().enumerate() {
            for other in &texts[..n] {
                assert_ne!(hash(text).unwrap(), hash(other).unwrap(), "{text} {other}");
                assert!(!written(text).starts_with(&written(other)), "{text} {other}");
            }
        }
    }

    #[test]
    fn hashes_of_an_older_version_are_found_again() {
        // Whoever changes this empties every cache: then the version of the keys' domain has to change, too.
        let text = r#"{"b":[1.50,-2e3,true,null],"a":{"c":"\u00e9\n"}}"#;
        let hex: Vec<_> = hash(text).unwrap().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex.concat(), "31e0e9ff4de9a281d480e53ed4a93903bf113c8efdc11381a362f6aa865d9a49");
    }

    #[test]
    fn order_and_white_space_do_not_matter() {
        same(&[
            r#"{"a":1,"b":{"c":[1,2],"d":null}}"#,
            "\t{ \"b\" : {\r\n\"d\":null ,\"c\": [ 1 , 2 ] } , \"a\" :1 }\n",
        ]);
        same(&["[]", " [ ] "]);
        same(&["{}", "{ }\n"]);
    }

    #[test]
    fn strings_are_what_they_mean() {
        same(&[r#"{"A/é":"\n\"\\\b\f\r\t"}"#, r#"{"\u0041\/\u00e9":"\u000a\u0022\u005C\u0008\u000c\u000D\u0009"}"#]);
        same(&["\"\u{1F600}\"", r#""\ud83d\uDE00""#]);
        same(&[r#"{"ab":1,"b":2}"#, r#"{"b":2,"\u0061b":1}"#]);
        all_differ(&[r#""e\u0301""#, r#""\u00e9""#, r#""""#, r#""\u0000""#, r#""\u0000\u0000""#]);
        all_differ(&["\"\\u0041\"", "\"\\\\u0041\""]);
    }

    #[test]
    fn numbers_are_what_they_are_worth_and_nothing_is_rounded() {
        same(&["1", "1.0", "1e0", "1E+0", "10e-1", "0.1e1", "0.0010e3", "1.000", "100e-02"]);
        same(&["120", "1.2e2", "12e1", "1200E-1", "120.0"]);
        same(&["0", "0.0", "0e9", "0.00E-3"]);
        same(&["-0.25", "-25e-2", "-2.50e-1"]);
        all_differ(&["9007199254740992", "9007199254740993", "18446744073709551615", "18446744073709551616"]);
        all_differ(&[
            "0.1",
            "0.10000000000000001",
            "0.1000000000000000055511151231257827",
            "-0.1",
            "0",
            "-0",
            "1e-1000",
        ]);
        all_differ(&["1", "10", "0.01", "11", "101", "1.1", "1.01", "1e400", "1e401", "-1", "\"1\"", "[1]"]);
        let far = ["1e999999999999999999", "1e9999999999999999999", "1e-9999999999999999999", "1e99999999999999999990"];
        all_differ(&far);
    }

    #[test]
    fn the_structure_cannot_be_taken_for_another() {
        all_differ(&[
            r#"["ab"]"#,
            r#"["a","b"]"#,
            r#"["b","a"]"#,
            r#"[["a"],"b"]"#,
            r#"["a",["b"]]"#,
            r#"[["a","b"]]"#,
            r#"{"a":"b"}"#,
            r#"{"b":"a"}"#,
            r#"{"ab":""}"#,
            r#"{"a":{"b":{}}}"#,
            r#"{"a":{},"b":{}}"#,
            r#"[{"a":"b"}]"#,
            r#""[\"ab\"]""#,
        ]);
        all_differ(&[
            "[]",
            "{}",
            "[[]]",
            "[{}]",
            "[[],[]]",
            "null",
            "false",
            "true",
            "0",
            r#""""#,
            r#""null""#,
            "[null]",
        ]);
        all_differ(&["{}", r#"{"a":null}"#, r#"{"a":[]}"#, r#"{"a":{}}"#, r#"{"":null}"#, r#"{"a":null,"b":null}"#]);
        all_differ(&[r#"{"stream":true}"#, r#"{"stream":false}"#, "{}"]);
    }

    #[test]
    fn what_readers_take_differently_has_no_hash() {
        for text in [
            r#"{"a":1,"a":1}"#,
            r#"{"a":1,"b":0,"\u0061":2}"#,
            r#"[{"x":{"a":1,"c":2,"b":3,"a":{}}}]"#,
            r#"{"":1,"":2}"#,
        ] {
            assert_eq!(hash(text), Err(Why::DuplicateMember), "{text}");
        }
        assert!(hash(r#"{"a":{"a":1},"b":{"a":1}}"#).is_ok(), "in another object it is another one");
        for text in
            [r#""\ud800""#, r#""\udc00""#, r#""\ud800\ud800""#, r#""\ud800x""#, r#"{"\uDFFF":1}"#, r#""\ud83d\n""#]
        {
            assert_eq!(hash(text), Err(Why::LoneSurrogate), "{text}");
        }
    }

    #[test]
    fn what_is_no_json_has_no_hash() {
        let texts = [
            "",
            " ",
            "\u{feff}{}",
            "{",
            "[1,]",
            "[,1]",
            "{\"a\"}",
            "{\"a\":}",
            "{\"a\":1,}",
            "{a:1}",
            "{1:1}",
            "1 2",
            "01",
            "1.",
            ".5",
            "-",
            "+1",
            "1e",
            "1e+",
            "0x1",
            "NaN",
            "Infinity",
            "nul",
            "nullx",
            "truefalse",
            "'a'",
            "\"a",
            "\"\u{1}\"",
            "\"\\x\"",
            "\"\\u12\"",
            "\"\\u12g4\"",
            "\"\\ud800\\u12\"",
            "[1}",
            "{}]",
            "]",
            "/**/{}",
            "\u{a0}1",
        ];
        for text in texts {
            assert_eq!(hash(text), Err(Why::NotJson), "{text:?}");
        }
        assert_eq!(hash_by(b"\"\xff\"", &Body::default()), Err(Why::NotJson));
        assert_eq!(hash_by(b"\"\xed\xa0\x80\"", &Body::default()), Err(Why::NotJson), "a surrogate in UTF-8");
    }

    #[test]
    fn depth_has_a_bound() {
        let nested =
            |depth: usize, open: &str, close: &str| [open.repeat(depth), "1".into(), close.repeat(depth)].concat();
        for (open, close) in [("[", "]"), ("{\"a\":", "}")] {
            assert!(hash(&nested(MAX_DEPTH, open, close)).is_ok());
            assert_eq!(hash(&nested(MAX_DEPTH + 1, open, close)), Err(Why::TooDeep));
            assert_eq!(hash(&open.repeat(1_000_000)), Err(Why::TooDeep));
        }
    }

    #[test]
    fn what_is_ignored_makes_no_difference() {
        let rules = rules(&json!({"ignore": ["user", "metadata.trace_id", "/x/a.b", "/ab/~1~0/"]}));
        let hash = |text: &str| hash_by(text.as_bytes(), &rules).unwrap();
        let plain = hash(r#"{"m":1,"metadata":{"k":1},"x":{},"ab":{"/~":{}}}"#);
        let full = r#"{"user":{"id":[7]},"m":1,"metadata":{"trace_id":"t","k":1},"x":{"a.b":2},"ab":{"/~":{"":0}}}"#;
        assert_eq!(hash(full), plain);
        assert_eq!(hash(&full.replace("user", "us\\u0065r")), plain);
        assert_ne!(hash(&full.replace("user", "users")), plain);
        assert_ne!(hash(r#"{"m":1}"#), plain, "an empty object is not none");
        assert_ne!(hash(r#"{"m":{"user":1}}"#), hash(r#"{"m":{}}"#), "only where the path says");
        assert_ne!(hash(r#"[{"user":1}]"#), hash("[{}]"), "paths do not lead into arrays");
        assert_eq!(hash_by(br#"{"user":1,"user":1}"#, &rules), Err(Why::DuplicateMember));
    }

    #[test]
    fn a_condition_is_about_values_and_null_is_also_absence() {
        let is = |when: Value, text: &str| hash_by(text.as_bytes(), &rules(&json!({ "when": when }))).map(drop);
        let zero = || json!({"temperature": [0, null]});
        for text in [r#"{"temperature":0}"#, r#"{"temperature":0.0}"#, r#"{"temperature":null}"#, "{}", "[]", "3"] {
            assert_eq!(is(zero(), text), Ok(()), "{text}");
        }
        for text in
            [r#"{"temperature":0.1}"#, r#"{"temperature":"0"}"#, r#"{"temperature":false}"#, r#"{"temperature":[]}"#]
        {
            assert_eq!(is(zero(), text), Err(Why::Condition), "{text}");
        }
        assert_eq!(is(json!({"temperature": 0.7}), r#"{"temperature":7e-1}"#), Ok(()));
        assert_eq!(is(json!({"temperature": 0.7}), "{}"), Err(Why::Condition), "absent is not one of them");
        assert_eq!(is(json!({"a.b": "x"}), r#"{"a":{"b":"\u0078"}}"#), Ok(()));
        assert_eq!(is(json!({"a.b": "x"}), r#"{"a":{"b":"xx"}}"#), Err(Why::Condition));
        assert_eq!(is(json!({"a.b": "x"}), r#"{"a":"x"}"#), Err(Why::Condition));
        assert_eq!(is(json!({"a": [{"b": 1, "c": [2]}]}), r#"{"a":{"c":[2.0],"b":1}}"#), Ok(()));
        assert_eq!(is(json!({"a": 1, "b": 2}), r#"{"a":1}"#), Err(Why::Condition), "all of them");
        assert_eq!(is(json!({"a": []}), "{}"), Err(Why::Condition));
    }

    #[test]
    fn an_answer_passes_by_its_members() {
        let when: When = serde_json::from_value(json!({"job.status": ["completed", "failed"]})).unwrap();
        assert_eq!(when.pass(br#"{"job":{"status":"failed"}}"#), Ok(()));
        assert_eq!(when.pass(br#"{"job":{"status":"running"}}"#), Err(Why::Condition));
        assert_eq!(when.pass(b"<html>"), Err(Why::NotJson));
    }

    #[test]
    fn tools_are_not_cached_unless_the_rules_say_so() {
        let asks = |text: &str| hash_by(text.as_bytes(), &Body::default()) == Err(Why::Tools);
        for text in [
            r#"{"tools":[{"type":"function"}]}"#,
            r#"{"functions":[1]}"#,
            r#"{"t":1,"\u0074ools":["x"]}"#,
            r#"{"tools":{}}"#,
            r#"{"mcp_servers":[{}]}"#,
            r#"{"web_search_options":{}}"#,
        ] {
            assert!(asks(text), "{text}");
            assert!(hash(text).is_ok(), "{text}");
        }
        for text in [r#"{"tools":[]}"#, r#"{"tools":null}"#, r#"{"a":{"tools":[1]}}"#, r#"["tools"]"#, "{}"] {
            assert!(!asks(text), "{text}");
        }
    }

    #[test]
    fn whether_a_stream_is_asked_for_is_told() {
        let stream = |text: &str| digest(text.as_bytes(), &Body::default(), &mut Context::new(&SHA256)).unwrap().stream;
        assert_eq!(stream(r#"{"model":"m","stream":true}"#), Some(true));
        assert_eq!(stream(r#"{"stream":false}"#), Some(false));
        for text in [r#"{"stream":"true"}"#, "{}", "[true]", r#"{"x":{"stream":true}}"#, r#"{"stream":null}"#] {
            assert_eq!(stream(text), None, "{text}");
        }
    }

    #[test]
    fn nothing_is_added_of_a_body_that_has_no_hash() {
        let mut context = Context::new(&SHA256);
        for text in [r#"{"a":1,"a":2}"#, r#"{"tools":[1]}"#, "[1", ""] {
            assert!(digest(text.as_bytes(), &Body::default(), &mut context).is_err());
        }
        assert_eq!(context.finish().as_ref(), Context::new(&SHA256).finish().as_ref());
    }

    #[test]
    fn a_path_is_written_with_dots_or_as_a_pointer() {
        let names = |text: &str| text.parse::<Path>().map(|path| path.0);
        assert_eq!(names("metadata.trace_id").unwrap(), ["metadata", "trace_id"]);
        assert_eq!(names("/metadata/trace_id").unwrap(), ["metadata", "trace_id"]);
        assert_eq!(names("/a.b/~0~1/~01").unwrap(), ["a.b", "~/", "~1"]);
        assert_eq!(names("/").unwrap(), [""]);
        for text in ["", "a.", ".a", "a..b", "/a~", "/a~2b"] {
            assert!(names(text).is_err(), "{text}");
        }
        for text in ["a", "a.b", "/a.b/c", "/", "/a//b", "a/b.c", "/~1a", "~"] {
            let path: Path = text.parse().unwrap();
            assert_eq!(path.to_string(), text);
        }
    }

    #[test]
    fn rules_without_effect_are_mistakes() {
        let problems = |body: &Value| {
            let mut problems = Problems::default();
            rules(body).check(&mut problems);
            problems.to_string()
        };
        assert_eq!(
            problems(&json!({"ignore": ["user", "a.b"], "when": {"temperature": [0, null]}, "tools": true})),
            ""
        );
        assert_eq!(problems(&json!({"ignore": ["a", "/a"]})), "ignore: holds `a` twice");
        assert_eq!(problems(&json!({"ignore": ["a.b", "a"]})), "ignore: holds `a.b`, which `a` leaves out already");
        assert!(problems(&json!({"ignore": ["stream"]})).starts_with("ignore: holds `stream`"));
        assert!(problems(&json!({"when": {"a": []}})).starts_with("when.a: is an empty list"));
        let round = json!({"ignore": ["user"], "when": {"n": [1, null]}, "tools": false});
        assert_eq!(serde_json::to_value(rules(&round)).unwrap(), round);
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            (-3..12).prop_map(Value::from),
            any::<u64>().prop_map(Value::from),
            (-9..9).prop_map(|number| Value::from(f64::from(number) + 0.5)),
            "[ab\"\\\\/\n\u{e9}\u{1F600}]{0,4}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 32, 5, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(Value::from),
                prop::collection::btree_map("[a-c\n]{0,2}", inner, 0..5).prop_map(Value::from_iter),
            ]
        })
    }

    /// Writes a value in another way for each sequence of `choices`.
    fn spell(value: &Value, choices: &mut impl Iterator<Item = u8>, out: &mut String) {
        let space = |choices: &mut dyn Iterator<Item = u8>, out: &mut String| {
            out.push_str(["", "", " ", "\n\t"][usize::from(choices.next().unwrap() % 4)]);
        };
        let string = |text: &str, choices: &mut dyn Iterator<Item = u8>, out: &mut String| {
            out.push('"');
            for char in text.chars() {
                if choices.next().unwrap().is_multiple_of(2) || char < ' ' || char == '"' || char == '\\' {
                    for unit in char.encode_utf16(&mut [0; 2]) {
                        write!(out, "\\u{unit:04x}").unwrap();
                    }
                } else {
                    out.push(char);
                }
            }
            out.push('"');
        };
        space(choices, out);
        match value {
            Value::String(text) => string(text, choices, out),
            Value::Number(number) => {
                let text = number.to_string();
                let spelled = match (choices.next().unwrap() % 4, text.contains('.')) {
                    (0, false) => format!("{text}.00"),
                    (0, true) => format!("{text}0"),
                    (1, _) => format!("{text}e0"),
                    (2, false) if text != "0" => format!("{text}00E-2"),
                    _ => text,
                };
                out.push_str(&spelled);
            }
            Value::Array(values) => {
                out.push('[');
                for (n, value) in values.iter().enumerate() {
                    *out += if n > 0 { "," } else { "" };
                    spell(value, choices, out);
                }
                space(choices, out);
                out.push(']');
            }
            Value::Object(members) => {
                let mut members: Vec<_> = members.iter().collect();
                if !members.is_empty() {
                    let by = usize::from(choices.next().unwrap()) % members.len();
                    members.rotate_left(by);
                }
                out.push('{');
                for (n, (name, value)) in members.into_iter().enumerate() {
                    *out += if n > 0 { "," } else { "" };
                    space(choices, out);
                    string(name, choices, out);
                    space(choices, out);
                    out.push(':');
                    spell(value, choices, out);
                }
                space(choices, out);
                out.push('}');
            }
            literal => *out += &literal.to_string(),
        }
        space(choices, out);
    }

    /// The number times 10^9, and whether it has a minus.
    fn worth(text: &str) -> (i128, bool) {
        let (digits, power) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
        let (whole, fraction) = digits.split_once('.').unwrap_or((digits, ""));
        let power = power.parse::<i32>().unwrap() - i32::try_from(fraction.len()).unwrap() + 9;
        let digits: i128 = format!("{whole}{fraction}").parse().unwrap();
        (digits * 10_i128.pow(u32::try_from(power).unwrap()), text.starts_with('-'))
    }

    proptest! {
        #[test]
        fn every_spelling_has_the_same_hash(value in any_json(), choices in prop::collection::vec(any::<u8>(), 1..40)) {
            let mut text = String::new();
            spell(&value, &mut choices.iter().copied().cycle(), &mut text);
            prop_assert_eq!(hash(&text), hash(&value.to_string()), "{}", text);
        }

        #[test]
        fn what_differs_has_another_hash(one in any_json(), other in any_json()) {
            let (text, another) = (one.to_string(), other.to_string());
            prop_assert_eq!(hash(&text) == hash(&another), one == other);
            prop_assert_eq!(written(&text).starts_with(&written(&another)), one == other);
        }

        #[test]
        fn a_changed_member_makes_a_difference(value in any_json(), other in any_json(), at: prop::sample::Index) {
            let mut changed = value.clone();
            if let Some(members) = changed.as_object_mut().filter(|members| !members.is_empty()) {
                let at = at.index(members.len());
                *members.values_mut().nth(at).unwrap() = other;
            }
            prop_assert_eq!(hash(&value.to_string()) == hash(&changed.to_string()), value == changed);
        }

        #[test]
        fn numbers_are_the_same_only_if_they_are_worth_the_same(
            one in "-?(0|[1-9][0-9]{0,2})(\\.[0-9]{1,3})?([eE][+-]?0?[0-4])?",
            other in "-?(0|[1-9]0{0,2})(\\.[0-9]{1,3})?([eE][+-]?0?[0-4])?",
        ) {
            prop_assert_eq!(hash(&one) == hash(&other), worth(&one) == worth(&other), "{} {}", one, other);
            let zero = worth(&other).0 == 0;
            prop_assert_eq!(hash(&other) == hash("0"), zero && !other.starts_with('-'));
        }

        #[test]
        fn it_accepts_what_serde_json_accepts(
            value in any_json(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(&b"\"\\{}[]:,0-.eE+tn u\n\0x\xFF"[..])), 0..3),
        ) {
            let mut text = value.to_string().into_bytes();
            for (index, byte) in changes {
                let index = index.index(text.len());
                text[index] = byte;
            }
            accepts_the_same(&text)?;
        }

        #[test]
        fn it_accepts_what_serde_json_accepts_of_pieces(
            pieces in prop::collection::vec(
                prop::sample::select(vec!["{", "}", "[", "]", ",", ":", "\"\"", "\"a\"", "\"\\u12aF\"", "\\", "\"\\ud800\"", "1", "0", "-", ".", "e", "+", "null", "true", "false", "t", " "]),
                0..12,
            ),
        ) {
            accepts_the_same(pieces.concat().as_bytes())?;
        }

        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            drop(hash_by(&bytes, &rules(&json!({"ignore": ["a.b"], "when": {"a": 1}}))));
        }
    }

    fn accepts_the_same(text: &[u8]) -> Result<(), TestCaseError> {
        let is_json = serde_json::from_slice::<IgnoredAny>(text).is_ok() && std::str::from_utf8(text).is_ok();
        match Tape::read(text) {
            Ok(_) => prop_assert!(is_json, "{}", text.escape_ascii()),
            Err(Why::NotJson) => prop_assert!(!is_json, "{}", text.escape_ascii()),
            Err(_) => {}
        }
        Ok(())
    }
}
