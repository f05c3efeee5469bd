//! A waker that does not wake whoever is awake.
//!
//! Who drives a connection by polling it is told by it, in the middle of that, of every step: the request is
//! there to be written, the head is there, a chunk is there. Each would have the whole task polled once more
//! after it has seen all that. Wakes from within a turn are kept back here, and lead to one more look at the
//! connection alone; wakes from outside pass.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    task::{Context, Wake, Waker},
};

use futures_util::task::AtomicWaker;

/// Nobody looks: a wake passes.
const OUTSIDE: u8 = 0;
/// Somebody looks.
const WITHIN: u8 = 1;
/// Somebody looks, and something has happened meanwhile.
const AGAIN: u8 = 2;

/// How often a look is repeated at once; then the other tasks of the thread have their turn.
const MOST: usize = 64;

/// The waker of one connection, handed from the task of one request to that of the next.
pub(super) struct Quiet {
    shared: Arc<Shared>,
    /// Made once: it stays the same to those who keep it.
    waker: Waker,
}

struct Shared {
    state: AtomicU8,
    task: AtomicWaker,
}

impl Wake for Shared {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        let within = self.state.compare_exchange(WITHIN, AGAIN, Ordering::AcqRel, Ordering::Acquire);
        // `AGAIN` is as good as a wake: the look is not over.
        if within == Err(OUTSIDE) {
            self.task.wake();
        }
    }
}

impl Quiet {
    pub(super) fn new() -> Self {
        let shared = Arc::new(Shared { state: AtomicU8::new(OUTSIDE), task: AtomicWaker::new() });
        Self { waker: shared.clone().into(), shared }
    }

    /// Keeps wakes back until the next [`look`](Self::look) is over.
    pub(super) fn enter(&self) {
        self.shared.state.store(WITHIN, Ordering::Release);
    }

    /// Looks until nothing new has happened meanwhile, or the look says that it has seen enough (`true`).
    pub(super) fn look(&self, cx: &Context<'_>, mut look: impl FnMut(&mut Context<'_>) -> bool) {
        self.shared.task.register(cx.waker());
        for _ in 0..MOST {
            self.enter();
            let enough = look(&mut Context::from_waker(&self.waker));
            let before = self.shared.state.swap(OUTSIDE, Ordering::AcqRel);
            if enough || before != AGAIN {
                return;
            }
        }
        cx.waker().wake_by_ref();
    }
}

#[cfg(test)]
mod tests {
    use futures_util::task::noop_waker;
    use std::sync::atomic::AtomicUsize;

    use super::*;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_wake_from_within_looks_again_and_one_from_outside_passes() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let task = Waker::from(count.clone());
        let (quiet, mut looks, mut kept) = (Quiet::new(), 0, noop_waker());
        quiet.look(&Context::from_waker(&task), |cx| {
            looks += 1;
            kept = cx.waker().clone();
            if looks < 3 {
                cx.waker().wake_by_ref();
            }
            false
        });
        assert_eq!((looks, count.0.load(Ordering::Relaxed)), (3, 0));
        kept.wake_by_ref();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn what_was_woken_before_the_look_is_seen_by_it() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let task = Waker::from(count.clone());
        let quiet = Quiet::new();
        quiet.enter();
        quiet.waker.wake_by_ref();
        let mut looks = 0;
        quiet.look(&Context::from_waker(&task), |_| {
            looks += 1;
            false
        });
        assert_eq!((looks, count.0.load(Ordering::Relaxed)), (1, 0));
    }
}
