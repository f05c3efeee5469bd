//! What is there of a recording: its frames, where its readers are, and what it still comes from. All of it is under one
//! lock.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::{Bytes, BytesMut};
use http::HeaderMap;
use http_body::Body as _;
use tokio::time::Instant;

use super::{super::resume::Share, budget::Budget};
use crate::{
    message::{Body, Error, Kind},
    sse::{Completion, Ended, Numbering},
};

/// Frames below this size are copied: they are slices of a buffer that may be much larger, and that would live as long.
const COPIED: usize = 16 << 10;

pub(super) struct State {
    pub(super) source: Source,
    pub(super) frames: VecDeque<Kept>,
    /// How many frames are gone that were before these.
    pub(super) gone: usize,
    /// In bytes, those of `frames`.
    pub(super) kept: usize,
    pub(super) limit: usize,
    /// Whether more has come than is kept.
    pub(super) over: bool,
    pub(super) trailers: Option<HeaderMap>,
    /// Where it must have an end of its own.
    pub(super) completion: Option<Box<Completion>>,
    /// Where the readers are, by their slots.
    pub(super) seats: Vec<Seat>,
    /// Since when one of them waits for slower ones.
    pub(super) stalled: Option<Instant>,
    pub(super) budget: Arc<Budget>,
    pub(super) end: Option<End>,
    /// Where it is kept for those who come again.
    pub(super) held: Option<Box<Held>>,
}

/// What it takes to keep a recording when nobody reads it.
pub(super) struct Held {
    /// Where the frames that are kept begin.
    pub(super) from: Numbering,
    /// What was counted before some of the others, by their numbers.
    pub(super) marks: VecDeque<(usize, Numbering)>,
    /// The bytes before that.
    pub(super) passed: u64,
    /// Its part of the memory that there is for this.
    pub(super) share: Share,
    pub(super) alone: bool,
    /// Since when nobody reads it.
    pub(super) left: Option<Instant>,
    /// The same for the first time after its end: what has ended is not kept any longer for being asked for again.
    pub(super) over: Option<Instant>,
    /// Whether it is copied: then somebody waits for what is new who is no reader.
    pub(super) copied: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Seat {
    Free,
    /// The next frame of its reader.
    At(usize),
    /// Its reader has kept the others waiting.
    Cut,
}

pub(super) struct Kept {
    pub(super) data: Bytes,
    pub(super) at: Duration,
}

pub(super) enum Source {
    Coming(Body),
    Whole,
    Failed { kind: Kind, retry_after: Option<Duration> },
}

/// What was recorded, from its first byte to its last.
#[derive(Debug)]
pub(in super::super) struct Whole {
    pub(in super::super) body: Bytes,
    /// Where each frame ended, and when it came.
    pub(in super::super) cuts: Box<[Cut]>,
    pub(in super::super) trailers: Option<HeaderMap>,
    /// From the head to the end.
    pub(in super::super) took: Duration,
}

/// The end of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Cut {
    /// The bytes before it.
    pub(in super::super) end: u32,
    /// When it came, in milliseconds after the head.
    pub(in super::super) at: u32,
}

/// Why there is nothing to be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) enum Lost {
    /// More came than is kept.
    TooLarge,
    /// It broke off.
    Broken,
    /// It has come to an end that is not its own: without the terminal event, with an error, or cut short.
    Incomplete,
}

/// Takes what was recorded, once: all of it, or the news that there will be nothing.
pub(super) type End = Box<dyn FnOnce(Result<Whole, Lost>) + Send>;

/// What the upstream says.
pub(super) enum Asked {
    Frame(Bytes),
    /// The end, just now.
    Ended(Found),
    /// Nothing that is new.
    Before(Found),
}

/// What a reader finds.
pub(super) enum Found {
    Frame(Bytes),
    End,
    Failed(Error),
    /// The upstream has to do something first.
    Nothing,
    /// Slower readers have to.
    Full,
}

impl State {
    pub(super) fn push(&mut self, data: &Bytes, at: Duration) {
        let data = if data.len() < COPIED { Bytes::copy_from_slice(data) } else { data.clone() };
        self.kept += data.len();
        if let Some(completion) = &mut self.completion {
            completion.pass(&data);
        }
        match &mut self.held {
            Some(held) => held.share.grow(data.len()),
            None => self.over |= !self.budget.take(data.len()),
        }
        self.frames.push_back(Kept { data, at });
        self.over |= self.kept > self.limit;
    }

    /// No longer keeps it for those who come again: nothing of it, where nobody reads it.
    pub(super) fn let_go(&mut self) {
        let Some(held) = self.held.take() else { return };
        // What nobody else may have, and nobody stores, need not be kept at all.
        self.over |= held.alone;
        if self.is_deserted() && !self.frames.is_empty() {
            self.over = true;
            self.gone += self.frames.len();
            self.kept = 0;
            self.frames = VecDeque::new();
        }
        self.over |= !self.budget.take(self.kept);
    }

    /// Whether nobody reads it.
    pub(super) fn is_deserted(&self) -> bool {
        !self.seats.iter().any(|seat| matches!(seat, Seat::At(_)))
    }

    /// Lets go of what all readers have; of what is kept for others, only where there is no room. Whether there is room for
    /// more then.
    pub(super) fn trim(&mut self) -> bool {
        if !self.over {
            return true;
        }
        let places = self.seats.iter().filter_map(|seat| match seat {
            Seat::At(next) => Some(*next),
            Seat::Free | Seat::Cut => None,
        });
        let read = places.min().map_or(0, |slowest| slowest - self.gone);
        for _ in 0..read {
            if self.held.is_some() && self.kept <= self.limit {
                break;
            }
            let Some(Kept { data, .. }) = self.frames.pop_front() else { break };
            self.kept -= data.len();
            self.gone += 1;
            match &mut self.held {
                Some(held) => {
                    held.share.shrink(data.len());
                    held.from.pass(&data);
                    while held.marks.front().is_some_and(|(frame, _)| *frame < self.gone) {
                        held.marks.pop_front();
                    }
                    held.passed += data.len() as u64;
                }
                None => self.budget.give_back(data.len()),
            }
        }
        self.kept <= self.limit
    }

    /// Cuts those off for whom the others wait.
    pub(super) fn cut(&mut self) {
        if self.is_full() {
            let slowest = Seat::At(self.gone);
            self.seats.iter_mut().filter(|seat| **seat == slowest).for_each(|seat| *seat = Seat::Cut);
            self.stalled = None;
        }
    }

    pub(super) fn is_complete(&self) -> bool {
        self.completion.as_ref().is_none_or(|completion| completion.state() == Ended::Whole)
    }

    pub(super) fn is_full(&self) -> bool {
        self.over && self.kept > self.limit
    }

    /// Asks the upstream for more.
    pub(super) fn ask(&mut self, cx: &mut Context<'_>) -> Asked {
        let body = match &mut self.source {
            Source::Coming(body) => body,
            Source::Whole => return Asked::Before(Found::End),
            Source::Failed { kind, retry_after } => return Asked::Before(Found::Failed(failed(*kind, *retry_after))),
        };
        loop {
            match Pin::new(&mut *body).poll_frame(cx) {
                Poll::Pending => return Asked::Before(Found::Nothing),
                Poll::Ready(Some(Ok(frame))) => match frame.into_data() {
                    Ok(data) if data.is_empty() => {}
                    Ok(data) => {
                        // Who reads a body that says so may never ask for its end.
                        if body.is_end_stream() {
                            self.source = Source::Whole;
                        }
                        return Asked::Frame(data);
                    }
                    Err(frame) => {
                        self.trailers = frame.into_trailers().ok();
                        if body.is_end_stream() {
                            self.source = Source::Whole;
                            return Asked::Ended(Found::End);
                        }
                    }
                },
                Poll::Ready(None) => {
                    self.source = Source::Whole;
                    return Asked::Ended(Found::End);
                }
                Poll::Ready(Some(Err(error))) => {
                    let error = Error::of(error);
                    self.source = Source::Failed { kind: error.kind(), retry_after: error.retry_after() };
                    return Asked::Ended(Found::Failed(error));
                }
            }
        }
    }

    /// All of it in one piece.
    pub(super) fn whole(&mut self, took: Duration) -> Whole {
        let mut cuts = Vec::with_capacity(self.frames.len());
        // Also of one frame a copy: it may be a slice of something larger.
        let mut body = BytesMut::with_capacity(self.kept);
        for Kept { data, at } in &self.frames {
            body.extend_from_slice(data);
            let [end, at] = [body.len() as u128, at.as_millis()].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
            cuts.push(Cut { end, at });
        }
        Whole { body: body.freeze(), cuts: cuts.into(), trailers: self.trailers.clone(), took }
    }
}

fn failed(kind: Kind, retry_after: Option<Duration>) -> Error {
    let error = Error::new(kind, "the answer that was read along broke off");
    match retry_after {
        Some(after) => error.with_retry_after(after),
        None => error,
    }
}
