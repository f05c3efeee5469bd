//! Who waits for what comes of a recording.

use std::{
    sync::Arc,
    task::{Wake, Waker},
};

use futures_util::task::AtomicWaker;
use parking_lot::Mutex;

/// The readers that wait, by their slots.
#[derive(Debug, Default)]
pub(super) struct Waiting {
    readers: Mutex<Vec<Option<Waker>>>,
    /// Who reads on for nobody.
    pub(super) keeper: AtomicWaker,
    /// Who copies what has come.
    pub(super) copier: AtomicWaker,
}

impl Waiting {
    pub(super) fn add(&self, slot: usize, waker: &Waker) {
        let mut all = self.readers.lock();
        if all.len() <= slot {
            all.resize(slot + 1, None);
        }
        match &mut all[slot] {
            Some(known) => known.clone_from(waker),
            none => *none = Some(waker.clone()),
        }
    }

    pub(super) fn leave(&self, slot: usize) {
        if let Some(waker) = self.readers.lock().get_mut(slot) {
            *waker = None;
        }
    }

    /// They stay: a reader that is woken for each frame does not leave its waker for each frame.
    pub(super) fn wake_others(&self, slot: usize) {
        for (n, waker) in self.readers.lock().iter().enumerate() {
            if let Some(waker) = waker.as_ref().filter(|_| n != slot) {
                waker.wake_by_ref();
            }
        }
    }
}

impl Wake for Waiting {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.wake_others(usize::MAX);
        self.keeper.wake();
    }
}
