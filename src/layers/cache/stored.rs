//! An answer that is kept, and what clients get of it.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, SystemTime},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{AGE, CONTENT_LENGTH},
    request::Parts,
};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, Sleep, sleep_until};

use super::{
    config::OVERHEAD,
    directives,
    freshness::{self, Life},
    marks::Marks,
    purge::Names,
    range::{self, Selected},
    recording::{Cut, Whole},
    resume::{self, Id, Last},
    status::CacheStatus,
    validate::{self, Evaluation},
};
use crate::{
    message::{Body, BoxError, Response},
    sse::Numbering,
};

/// An answer that is kept.
#[derive(Debug)]
pub(super) struct Stored {
    pub(super) status: StatusCode,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    pub(super) trailers: Option<HeaderMap>,
    /// The frames of a stream; none of anything else.
    pub(super) cuts: Box<[Cut]>,
    pub(super) life: Life,
    pub(super) names: Arc<Names>,
    pub(super) basis: Basis,
    /// What it took the upstream.
    pub(super) took: Duration,
    /// The name by which a stream can be taken up again.
    pub(super) id: Option<Id>,
}

/// What is known of the purges that it has survived.
#[derive(Debug, Default)]
pub(super) struct Basis {
    /// The last of this process.
    pub(super) number: AtomicU64,
    /// What Redis knew of its names before its upstream was asked; none where it was not asked, or did not answer.
    pub(super) marks: Option<Arc<Marks>>,
    /// When these were last seen to hold, by the clock of the `hub`.
    pub(super) seen: AtomicU64,
    /// When somebody last looked.
    pub(super) looked: AtomicU64,
}

impl Basis {
    pub(super) fn new(number: u64, marks: Option<Arc<Marks>>, seen: u64) -> Self {
        Self { number: number.into(), marks, seen: seen.into(), looked: AtomicU64::default() }
    }
}

impl Clone for Basis {
    fn clone(&self) -> Self {
        Self::new(self.number.load(Ordering::Relaxed), self.marks.clone(), self.seen.load(Ordering::Relaxed))
    }
}

/// How a stream is given again.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Pace {
    Instant,
    /// So many times faster than it came.
    Times(f64),
}

impl Stored {
    /// What has come whole. `took` is from the request to the head.
    pub(super) fn new(
        (status, headers): (StatusCode, HeaderMap),
        whole: Whole,
        is_stream: bool,
        life: Life,
        names: Arc<Names>,
        basis: Basis,
        took: Duration,
    ) -> Self {
        Self {
            status,
            headers: own(headers),
            body: whole.body,
            trailers: whole.trailers.map(own),
            cuts: if is_stream { whole.cuts } else { Box::default() },
            life,
            names,
            basis,
            took: took + whole.took,
            id: None,
        }
    }

    /// The same content with other fields and another life: renewed by a 304, or made stale.
    pub(super) fn with(&self, headers: &HeaderMap, life: Life, basis: Basis) -> Self {
        Self {
            status: self.status,
            headers: own(headers.clone()),
            body: self.body.clone(),
            trailers: self.trailers.clone(),
            cuts: self.cuts.clone(),
            life,
            names: self.names.clone(),
            basis,
            took: self.took,
            id: self.id,
        }
    }

    /// The memory that it takes, about.
    pub(super) fn weight(&self) -> usize {
        let fields = |headers: &HeaderMap| -> usize {
            headers.iter().map(|(name, value)| name.as_str().len() + value.len() + 64).sum()
        };
        let names = self.names.path.len() + self.names.tags.iter().map(|tag| tag.len() + 16).sum::<usize>();
        OVERHEAD as usize
            + self.body.len()
            + size_of_val(&*self.cuts)
            + fields(&self.headers)
            + self.trailers.as_ref().map_or(0, fields)
            + names
    }

    /// Notes that no purge up to `number` was about it.
    pub(super) fn survived(&self, number: u64) {
        self.basis.number.fetch_max(number, Ordering::Relaxed);
    }

    /// Whether no error takes its place: it is none itself, and fresh, or would be given where the upstream fails.
    pub(super) fn holds_out(&self, now: SystemTime) -> bool {
        freshness::is_of_target(self.status) && self.life.is_stale_if_error(&directives::Request::default(), now)
    }

    /// The answer to a request, with what is said about where it comes from; `None` where only the upstream can answer.
    pub(super) fn response(
        self: &Arc<Self>,
        head: &Parts,
        status: CacheStatus,
        now: SystemTime,
        pace: Pace,
    ) -> Option<Response> {
        let length = self.body.len() as u64;
        let evaluation = validate::evaluate(&head.method, &head.headers, self.status, &self.headers);
        let mut response = Response::new(Body::empty());
        let mut headers = match evaluation {
            Evaluation::Forward => return None,
            Evaluation::NotModified => {
                *response.status_mut() = StatusCode::NOT_MODIFIED;
                validate::headers_of_304(&self.headers)
            }
            Evaluation::Full => {
                *response.status_mut() = self.status;
                let mut headers = self.headers.clone();
                if head.method == Method::HEAD {
                    if !headers.contains_key(CONTENT_LENGTH) && self.cuts.is_empty() {
                        headers.insert(CONTENT_LENGTH, HeaderValue::from(length));
                    }
                } else {
                    self.content(head, &mut headers, &mut response, pace);
                }
                headers
            }
        };
        if self.id.is_some() {
            resume::weaken(&mut headers);
        }
        headers.insert(AGE, HeaderValue::from(self.life.age(now).as_secs()));
        CacheStatus { ttl: Some(self.life.remaining(now)), ..status }.append(&mut headers);
        *response.headers_mut() = headers;
        Some(response)
    }

    /// The rest of a stream for a client that takes it up again; `None` where it has had more than there is.
    pub(super) fn rest(&self, last: Last, status: CacheStatus, now: SystemTime) -> Option<Response> {
        let mut numbering = Numbering::new();
        let mut rest = &*self.body;
        while numbering.count() < last.event {
            numbering.next(&mut rest)?;
        }
        let body = resume::rest(last, numbering, self.from(self.body.len() - rest.len()));
        let mut response = Response::new(body);
        *response.status_mut() = self.status;
        response.headers_mut().clone_from(&self.headers);
        resume::weaken(response.headers_mut());
        response.headers_mut().insert(AGE, HeaderValue::from(self.life.age(now).as_secs()));
        status.append(response.headers_mut());
        Some(response)
    }

    /// The body from this byte on, at once.
    fn from(&self, at: usize) -> Body {
        let body = self.body.slice(at..);
        match &self.trailers {
            None => body.into(),
            Some(_) => Body::new(Trailed { body, trailers: self.trailers.clone() }),
        }
    }

    fn content(self: &Arc<Self>, head: &Parts, headers: &mut HeaderMap, response: &mut Response, pace: Pace) {
        let selected = if self.status == StatusCode::OK && head.method == Method::GET && self.id.is_none() {
            range::select(&head.headers, &self.headers, self.body.len() as u64)
        } else {
            Selected::Full
        };
        let length = self.body.len() as u64;
        match selected {
            Selected::Full => {
                let body = match pace {
                    Pace::Times(speed) if !self.cuts.is_empty() => Body::new(Paced::new(self.clone(), speed)),
                    Pace::Instant | Pace::Times(_) => self.from(0),
                };
                *response.body_mut() = match self.id {
                    Some(id) => resume::numbered(id, body),
                    None => body,
                };
            }
            Selected::Part(part) => {
                *response.status_mut() = StatusCode::PARTIAL_CONTENT;
                range::partial(headers, &part, length);
                let [first, last] = [*part.start(), *part.end()].map(|n| usize::try_from(n).unwrap_or(usize::MAX));
                *response.body_mut() = self.body.slice(first..=last).into();
            }
            Selected::Unsatisfiable => {
                *response.status_mut() = StatusCode::RANGE_NOT_SATISFIABLE;
                *headers = range::unsatisfied(length);
            }
        }
    }
}

/// Copies of the values. As they came, each is a slice of what was read from the upstream's connection at once, which
/// may be a hundred times as large as the answer, and would live as long.
///
/// With room for what is said in each answer (age, id, security): a copy grows no table then, which is slower than copying.
pub(super) fn own(mut headers: HeaderMap) -> HeaderMap {
    headers.reserve(10);
    for value in headers.values_mut() {
        if let Ok(copy) = HeaderValue::from_bytes(value.as_bytes()) {
            *value = copy;
        }
    }
    headers
}

/// A body of one frame, with trailers.
struct Trailed {
    body: Bytes,
    trailers: Option<HeaderMap>,
}

impl HttpBody for Trailed {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let body = std::mem::take(&mut self.body);
        let frame = if body.is_empty() { self.trailers.take().map(Frame::trailers) } else { Some(Frame::data(body)) };
        Poll::Ready(frame.map(Ok))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_empty() && self.trailers.is_none()
    }

    /// Not exact: with a length there is no place for trailers in HTTP/1.1.
    fn size_hint(&self) -> SizeHint {
        let mut hint = SizeHint::new();
        hint.set_lower(self.body.len() as u64);
        hint
    }
}

/// A stream that is given again with its pauses.
struct Paced {
    stored: Arc<Stored>,
    speed: f64,
    begun: Instant,
    next: usize,
    trailed: bool,
    timer: Pin<Box<Sleep>>,
}

impl Paced {
    fn new(stored: Arc<Stored>, speed: f64) -> Self {
        let begun = Instant::now();
        Self { stored, speed, begun, next: 0, trailed: false, timer: Box::pin(sleep_until(begun)) }
    }
}

impl HttpBody for Paced {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = &mut *self;
        let Some(cut) = this.stored.cuts.get(this.next) else {
            let trailed = std::mem::replace(&mut this.trailed, true);
            let trailers = this.stored.trailers.clone().filter(|_| !trailed);
            return Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))));
        };
        let due = this.begun + Duration::from_millis(cut.at.into()).div_f64(this.speed);
        if this.timer.deadline() != due {
            this.timer.as_mut().reset(due);
        }
        ready!(this.timer.as_mut().poll(cx));
        let from = this.next.checked_sub(1).map_or(0, |before| this.stored.cuts[before].end);
        this.next += 1;
        Poll::Ready(Some(Ok(Frame::data(this.stored.body.slice(from as usize..cut.end as usize)))))
    }

    fn is_end_stream(&self) -> bool {
        self.next == self.stored.cuts.len() && (self.trailed || self.stored.trailers.is_none())
    }
}
