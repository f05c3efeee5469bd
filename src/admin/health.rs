//! Whether the process is there, ready, and content.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

/// Whether traffic should come. Shared by the server, which knows, and the operator's port, which tells.
#[derive(Debug, Clone, Default)]
pub struct Readiness(Arc<AtomicU8>);

/// What a readiness probe is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Not listening yet.
    Starting,
    /// Serving.
    Ready,
    /// Asked to stop: requests are still answered, but new ones should go elsewhere.
    Draining,
}

impl Phase {
    /// As the probe reads it.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Draining => "draining",
        }
    }
}

impl Readiness {
    /// The present phase.
    #[must_use]
    pub fn phase(&self) -> Phase {
        match self.0.load(Ordering::Acquire) {
            0 => Phase::Starting,
            1 => Phase::Ready,
            _ => Phase::Draining,
        }
    }

    /// Begins the next phase. A phase that is over does not come back.
    pub fn reach(&self, phase: Phase) {
        self.0.fetch_max(phase as u8, Ordering::AcqRel);
    }
}
