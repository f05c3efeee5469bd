//! Bytes, looked at as they pass.

/// How many bytes at the beginning are not `special`.
pub(crate) fn run(bytes: &[u8], special: impl Fn(u8) -> bool) -> usize {
    /// As many as a vector register takes.
    const BLOCK: usize = 16;
    let is_plain = |block: &&[u8]| !block.iter().fold(false, |any, &byte| any | special(byte));
    let blocks = bytes.chunks_exact(BLOCK).take_while(is_plain).count() * BLOCK;
    let rest = &bytes[blocks..];
    blocks + rest.iter().position(|&byte| special(byte)).unwrap_or(rest.len())
}
