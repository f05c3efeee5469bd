//! Bytes, looked at as they pass.

/// Bytes up to a bound, without a place on the heap.
#[derive(Debug, Clone, Copy)]
pub(super) struct Short<const N: usize> {
    bytes: [u8; N],
    /// More than `N`: there were more, or there was something that cannot be kept.
    len: usize,
}

impl<const N: usize> Short<N> {
    pub(super) const fn new() -> Self {
        Self { bytes: [0; N], len: 0 }
    }

    pub(super) fn extend(&mut self, bytes: &[u8]) {
        if let Some(room) = self.bytes.get_mut(self.len..) {
            let len = room.len().min(bytes.len());
            room[..len].copy_from_slice(&bytes[..len]);
        }
        self.len = self.len.saturating_add(bytes.len());
    }

    /// All of it, unless there was more than fits.
    pub(super) fn get(&self) -> Option<&[u8]> {
        self.bytes.get(..self.len)
    }

    pub(super) const fn first(&self) -> Option<u8> {
        if self.len == 0 { None } else { Some(self.bytes[0]) }
    }

    pub(super) const fn clear(&mut self) {
        self.len = 0;
    }

    /// Makes it something that nobody asks for.
    pub(super) const fn spoil(&mut self) {
        self.len = N + 1;
    }
}
