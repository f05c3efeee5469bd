//! What a copier makes of a recording: it looks at the frames that are kept anyway, and nobody waits for it.

use std::{sync::Arc, task::Poll};

use bytes::Bytes;
use http::HeaderMap;

use super::{
    Recording,
    reader::Reader,
    state::{Kept, Source},
};
use crate::{message::Kind, sse::Numbering};

/// Where a [copy](super::super::copies) of a recording has got to. The copier is no reader: nobody waits for it.
#[derive(Debug, Clone)]
pub(in super::super) struct Cursor {
    frame: usize,
    /// The bytes of that frame that are copied.
    within: usize,
    /// All bytes before it.
    pub(in super::super) at: u64,
    /// What has been counted of them; whoever takes the bytes lets them pass here.
    pub(in super::super) numbering: Numbering,
}

/// What a copier finds.
pub(in super::super) enum Copied {
    /// What comes next, and where that ends.
    Data(Vec<Bytes>, Cursor),
    /// Nothing yet.
    Nothing,
    Whole(Option<HeaderMap>),
    Broken(Kind),
    /// What came next is gone.
    Missed,
    /// It is no longer kept for those who come again.
    LetGo,
}

impl Recording {
    /// Where what is kept for those who come again begins, for a copier; from now on it is woken.
    pub(in super::super) fn copied(&self) -> Option<Cursor> {
        let mut state = self.state.lock();
        let frame = state.gone;
        let held = state.held.as_mut()?;
        held.copied = true;
        Some(Cursor { frame, within: 0, at: held.passed, numbering: held.from.clone() })
    }

    /// What a copier finds after `from`: at most so many bytes.
    pub(in super::super) fn copy(&self, from: &Cursor, most: usize) -> Copied {
        let state = self.state.lock();
        if state.held.is_none() {
            return Copied::LetGo;
        }
        let Some(index) = from.frame.checked_sub(state.gone) else { return Copied::Missed };
        let (mut next, mut pieces, mut left) = (from.clone(), Vec::new(), most);
        for Kept { data, .. } in state.frames.range(index.min(state.frames.len())..) {
            if left == 0 {
                break;
            }
            let end = data.len().min(next.within + left);
            let piece = data.slice(next.within..end);
            left -= piece.len();
            next.at += piece.len() as u64;
            (next.frame, next.within) = if end == data.len() { (next.frame + 1, 0) } else { (next.frame, end) };
            pieces.push(piece);
        }
        if !pieces.is_empty() {
            return Copied::Data(pieces, next);
        }
        match state.source {
            Source::Coming(_) => Copied::Nothing,
            Source::Whole => Copied::Whole(state.trailers.clone()),
            Source::Failed { kind, .. } => Copied::Broken(kind),
        }
    }

    /// Waits until there is anything new for a copier: after its end nothing is.
    pub(in super::super) async fn news(&self, from: &Cursor) {
        std::future::poll_fn(|cx| {
            self.waiting.copier.register(cx.waker());
            let state = self.state.lock();
            let has_come = state.gone + state.frames.len() > from.frame;
            if has_come || state.held.is_none() || !matches!(state.source, Source::Coming(_)) {
                Poll::Ready(())
            } else {
                Poll::Pending
            }
        })
        .await;
    }

    /// One who reads what is still to come, on behalf of those who read the copy; with the bytes before.
    pub(in super::super) fn last_reader(self: &Arc<Self>) -> Option<(Reader, u64)> {
        let mut state = self.state.lock();
        let before = state.held.as_ref()?.passed + state.kept as u64;
        let next = state.gone + state.frames.len();
        Some((self.read_from(&mut state, next), before))
    }

    /// How many bytes are kept at most, however fast they are read.
    pub(in super::super) fn limit(&self) -> usize {
        self.state.lock().limit
    }
}
