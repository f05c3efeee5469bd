//! What a JSON body says, however it is written: a hash for the key of a cached answer, and conditions on members.
//!
//! Two bodies have the same hash only where every reader takes them for the same: the order of members and white space
//! do not matter, nor how a string is escaped or a number spelled. Nothing is rounded, as RFC 8785 (§3.2.2.3) would:
//! whole numbers beyond 2^53 are different ones to most readers. What readers take differently has no hash: members
//! that stand twice (RFC 8259 §4) and halves of surrogate pairs (RFC 7493 §2.1).

mod number;
mod rules;
mod sink;
mod tape;

use ring::digest::Context;

pub use self::rules::{Body, Path, Values, When};
pub(super) use self::tape::Why;
use self::{
    sink::Hash,
    tape::{Node, Tape},
};

/// The members by which a model is given tools (`OpenAI`, Anthropic, Ollama), at the top of a body. What was found out by
/// a tool, or is to be done with one, is no answer to somebody else.
const TOOLS: [&str; 4] = ["functions", "mcp_servers", "tools", "web_search_options"];

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
    let mut ignored: Vec<_> = rules.ignore.iter().filter_map(|path| tape.member(&path.0)).collect();
    ignored.sort_unstable();
    let mut hash = Hash::new(into);
    tape.write(0, &ignored, &mut hash);
    hash.flush();
    let stream = match tape.top("stream") {
        Some(Node::True) => Some(true),
        Some(Node::False) => Some(false),
        _ => None,
    };
    Asked { stream }
}

#[cfg(test)]
mod tests;
