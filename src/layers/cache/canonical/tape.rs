//! A JSON text as a list of its values, read by RFC 8259, and written in the one form that each has.

use super::{number::write_number, sink::Sink};
use crate::message::bytes::run;

/// How deep arrays and objects may lie in each other: deeper than any API has them, and no danger to the stack.
pub(super) const MAX_DEPTH: usize = 64;

/// Why a body has no hash, or fails a condition.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Why {
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
    pub(in super::super) const fn as_str(self) -> &'static str {
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

/// A JSON text as a list of its values, each before those within it. Places are numbers of 32 bits, so that a value takes
/// 16 bytes: at the most 8 for each byte of the text.
pub(super) struct Tape<'a> {
    text: &'a [u8],
    /// The strings that had escapes, without them.
    decoded: Vec<u8>,
    /// The values, and before each that is a member its name.
    nodes: Vec<Node>,
    /// The names of the members of all objects, each object's in order.
    names: Vec<u32>,
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Node {
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
    pub(super) fn read(text: &'a [u8]) -> Result<Self, Why> {
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
    pub(super) const fn value_of(name: u32) -> u32 {
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
    pub(super) fn top(&self, name: &str) -> Option<&Node> {
        self.find(0, name).and_then(|key| self.nodes.get(index(Self::value_of(key))))
    }

    pub(super) fn member(&self, names: &[String]) -> Option<u32> {
        let (first, rest) = names.split_first()?;
        rest.iter().try_fold(self.find(0, first)?, |member, name| self.find(Self::value_of(member), name))
    }

    /// Writes a value in the one form that it has, without the members in `ignored`, which are in order. No form is the
    /// beginning of another: strings have their length before them, arrays and objects what is no value after them.
    pub(super) fn write(&self, node: u32, ignored: &[u32], to: &mut impl Sink) {
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
