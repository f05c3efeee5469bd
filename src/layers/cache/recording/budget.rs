//! The memory of what is on its way.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

/// What all answers of a route that are on their way may take together.
#[derive(Debug)]
pub(in super::super) struct Budget {
    used: AtomicU64,
    most: u64,
}

impl Budget {
    /// So many bytes.
    pub(in super::super) fn new(most: u64) -> Arc<Self> {
        Arc::new(Self { used: AtomicU64::new(0), most })
    }

    /// What they take now.
    pub(in super::super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Takes so many more. Whether they were there.
    pub(super) fn take(&self, bytes: usize) -> bool {
        self.used.fetch_add(bytes as u64, Ordering::Relaxed) + bytes as u64 <= self.most
    }

    pub(super) fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes as u64, Ordering::Relaxed);
    }
}
