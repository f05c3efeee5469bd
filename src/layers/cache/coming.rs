//! An answer of which the head is there, for all who asked for it.

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::SystemTime,
};

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header::AGE, request};
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::Instant;

use super::{
    freshness::Life,
    kept::Asking,
    key::Key,
    left::Owner,
    recording::{Reader, Recording},
    resume::{Footing, Id, Resume, Stream, Whose},
    status::CacheStatus,
    stored,
    validate::{self, Evaluation},
};
use crate::{
    message::{Body, BoxError, Deadline, Latecomers, Response},
    telemetry::{Due, Exchange},
};

/// An answer of which the head is there.
pub(super) struct Coming {
    pub(super) status: StatusCode,
    /// As it came.
    pub(super) headers: HeaderMap,
    pub(super) version: http::Version,
    /// What layers inside have to say to those outside: a deadline, which is that of the one who asked first.
    pub(super) extensions: http::Extensions,
    /// When it was asked for.
    pub(super) begun: Instant,
    pub(super) latecomers: Latecomers,
    pub(super) recording: Arc<Recording>,
    /// The fields of a request that it depends on.
    pub(super) vary: Vec<HeaderName>,
    /// Its own, with these.
    pub(super) key: Key,
    pub(super) life: Life,
    /// Why it is not stored, if so.
    pub(super) detail: Option<&'static str>,
    /// Whether its length is known.
    pub(super) is_short: bool,
    /// Whether it will be stored, if it comes to its end.
    pub(super) is_kept: bool,
    /// The name by which it can be taken up again.
    pub(super) id: Option<Id>,
    pub(super) footing: Footing,
}

impl Coming {
    /// Whether the client has it already: then it gets a 304 (RFC 9110 §13.2.2).
    pub(super) fn is_known(&self, head: &request::Parts) -> bool {
        let evaluation = validate::evaluate(&head.method, &head.headers, self.status, &self.headers);
        evaluation == Evaluation::NotModified
    }

    /// The answer for one who `came` then; `None` where its beginning is gone. Where it has to end by a time, each has as
    /// much of it.
    pub(super) fn response(
        &self,
        asking: Asking,
        owner: &Owner,
        status: CacheStatus,
        resume: Option<&Resume>,
        came: Instant,
        exchange: Option<&Exchange>,
    ) -> Option<Response> {
        let along = Along { reader: self.recording.reader()?, _asking: asking.clone() };
        let mut response = Response::new(match resume.zip(self.id) {
            Some((resume, id)) => resume.begin(id, along, || self.stream(asking, owner.clone())),
            None => Body::new(along),
        });
        *response.status_mut() = self.status;
        *response.version_mut() = self.version;
        *response.extensions_mut() = self.extensions.clone();
        if let Some(Deadline(deadline)) = response.extensions_mut().get_mut() {
            let later = came.saturating_duration_since(self.begun);
            self.latecomers.add(later);
            *deadline += later;
            let own = *deadline;
            response = response.map(|body| Body::new(Due::new(body, own, exchange.cloned())));
        }
        *response.headers_mut() = if status.collapsed { self.shared_headers() } else { self.headers.clone() };
        self.tell(status, &mut response);
        Some(response)
    }

    /// As it is given to those who take it up again.
    fn stream(&self, asking: Asking, owner: Owner) -> Stream {
        Stream {
            whose: Whose::All { key: self.key, vary: self.vary.clone() },
            owner,
            status: self.status,
            version: self.version,
            headers: stored::own(self.shared_headers()),
            extensions: self.extensions.clone(),
            recording: self.recording.clone(),
            footing: self.footing.clone(),
            asking: Some(asking),
            is_known: Arc::default(),
        }
    }

    /// That the client has it already.
    pub(super) fn not_modified(&self, status: CacheStatus) -> Response {
        let mut response = Response::new(Body::empty());
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.headers_mut() = validate::headers_of_304(&self.headers);
        self.tell(status, &mut response);
        response
    }

    /// What is for more than the one who asked first: what would be stored, for it is given as if it were.
    fn shared_headers(&self) -> HeaderMap {
        let mut headers = validate::storable_headers(&self.headers, self.life.received());
        headers.insert(AGE, HeaderValue::from(self.life.age(SystemTime::now()).as_secs()));
        headers
    }

    fn tell(&self, status: CacheStatus, response: &mut Response) {
        let ttl = Some(self.life.remaining(SystemTime::now()));
        let detail = self.detail.or(status.detail);
        let ttl = ttl.filter(|_| self.detail.is_none());
        CacheStatus { ttl, fwd_status: Some(self.status), stored: self.is_kept, detail, ..status }
            .append(response.headers_mut());
    }
}

/// The body of one who reads along. As long as there is one, others find the answer.
struct Along {
    reader: Reader,
    _asking: Asking,
}

impl HttpBody for Along {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        Pin::new(&mut self.reader).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.reader.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.reader.size_hint()
    }
}
