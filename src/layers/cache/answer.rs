//! How a request is answered: from what is kept, by the upstream, or as if there were no cache.

use std::{mem, sync::Arc, time::SystemTime};

use bytes::Bytes;
use http::{header::RANGE, request::Parts};
use http_body::Body as HttpBody;
use tokio::time::timeout;
use tower::Service;

use super::{
    change::Changed,
    copies,
    fill::{Failure, failed},
    freshness::Verdict,
    gate::{Gate, render},
    kept::Entry,
    key::Key,
    purge::{Standing, Target},
    question::{Part, Question, gather},
    resume::{LAST_EVENT_ID, Last, Lost},
    shared::{Holds, Sought},
    status::{CacheStatus, Forward},
    stored::{Basis, Stored},
    upstream::Step,
    validate,
};
use crate::{
    message::{Body, BoxError, CloneService, Error, Kind, Request, Response, asks_for_tunnel},
    telemetry::{Exchange, exchange::CacheOutcome, metrics::CacheResume},
};

/// How often a request may find out that the answer it waited for is another's, before it goes on by itself.
const ROUNDS: usize = 3;

/// There is no stored answer, and only such a one was asked for.
const NOT_CACHED: Kind = Kind::Custom {
    slug: "not-cached",
    status: http::StatusCode::GATEWAY_TIMEOUT,
    detail: "The request asks for a stored answer only, and there is none.",
};

/// What a request is to the cache by its head.
pub(super) enum Begun {
    /// All of it is there.
    Asked(Asked),
    /// What it asks is in its body, which has to come first.
    Uploads(Parts, Body, Option<Last>),
    /// It drops what it changes.
    Changes(Request),
}

/// What becomes of a request that asks something.
pub(super) enum Asked {
    /// The answer is at hand.
    Answered(Response),
    /// The answer has to be found: this is what there is, and under which key.
    Open(Question, Key, Option<Entry>),
    /// Another replica may have the rest of a stream of which the client has had a part.
    TakesUp(Question, Last),
    /// It goes on as if there were no cache.
    Passes(Request, CacheStatus),
    /// So does what it asks. What it gets can be taken up again.
    PassesQuestion(Question, CacheStatus),
}

/// What becomes of a client that comes again with the id of an event.
enum Taken {
    Here(Response),
    /// Another replica may have it.
    PerhapsThere(Last),
    Lost,
}

/// What is said of an answer that is the rest of one.
const RESUMED: CacheStatus = CacheStatus { detail: Some("resumed"), ..CacheStatus::HIT };

fn bypass(why: &'static str) -> CacheStatus {
    CacheStatus { detail: Some(why), ..CacheStatus::forwarded(Forward::Bypass) }
}

impl Gate {
    /// What a request of the route is to the cache. A hit in memory is answered here, without a future of its own: the one
    /// that can wait for whatever there is to wait for is large, and making it takes as long as all the rest of a hit.
    pub(super) fn begin<S>(&self, inner: &S, request: Request) -> Begun
    where
        S: CloneService + Sync,
    {
        if asks_for_tunnel(&request) {
            return Begun::Asked(Asked::Passes(request, bypass("upgrade")));
        }
        let (mut head, body) = request.into_parts();
        let last = self.resume.as_ref().and_then(|_| Last::of(&head.headers));
        if last.is_some() {
            // Nobody but us knows what it means.
            head.headers.remove(LAST_EVENT_ID);
        }
        match Part::of(&head, &self.config) {
            Part::Look if body.is_end_stream() => Begun::Asked(self.ask(inner, head, Bytes::new(), last)),
            Part::Look => Begun::Uploads(head, body, last),
            Part::None(why, detail) => {
                let status = CacheStatus { detail, ..CacheStatus::forwarded(why) };
                Begun::Asked(Asked::Passes(Request::from_parts(head, body), status))
            }
            Part::Drop => Begun::Changes(Request::from_parts(head, body)),
        }
    }

    /// What becomes of a request that is all there.
    fn ask<S>(&self, inner: &S, head: Parts, body: Bytes, last: Option<Last>) -> Asked
    where
        S: CloneService + Sync,
    {
        match Question::new(head, body, &self.route, &self.config, &self.kept.purges) {
            Ok(question) => match last.map_or(Taken::Lost, |last| self.take_up(&question, last)) {
                Taken::Here(response) => Asked::Answered(response),
                Taken::PerhapsThere(last) => Asked::TakesUp(question, last),
                Taken::Lost => self.look(inner, question),
            },
            Err((request, why)) => Asked::Passes(request, bypass(why)),
        }
    }

    /// What becomes of a question.
    fn look<S>(&self, inner: &S, question: Question) -> Asked
    where
        S: CloneService + Sync,
    {
        if let Some(why) = question.bypass {
            return Asked::PassesQuestion(question, bypass(why));
        }
        let (key, entry) = self.kept.look(question.primary, None, &question.head.headers);
        if let Some(Entry::Answer(stored)) = &entry
            && self.terms.shared.as_ref().is_none_or(|shared| shared.is_known(&stored.basis))
            && let Some(response) = self.stored(inner, &question, key, stored)
        {
            return Asked::Answered(response);
        }
        Asked::Open(question, key, entry)
    }

    /// The answer to a request that has begun.
    pub(super) async fn go_on<S>(self: Arc<Self>, inner: S, begun: Begun) -> Result<Response, BoxError>
    where
        S: CloneService + Sync,
    {
        let mut asked = match begun {
            Begun::Asked(asked) => asked,
            Begun::Changes(request) => return self.change(inner, request).await,
            Begun::Uploads(head, body, last) => match gather(body, Question::most(&head, &self.config)).await? {
                Ok(body) => self.ask(&inner, head, body, last),
                Err(body) => Asked::Passes(Request::from_parts(head, body), bypass("body-too-large")),
            },
        };
        loop {
            // Boxed: what need not wait shall not make room for it.
            return match asked {
                Asked::Answered(response) => Ok(response),
                Asked::Open(question, key, entry) => Box::pin(self.answer(inner, question, (key, entry))).await,
                Asked::TakesUp(question, last) => {
                    if let Some(response) = Box::pin(self.take_up_there(&question, last)).await {
                        return Ok(response);
                    }
                    asked = self.look(&inner, question);
                    continue;
                }
                Asked::Passes(request, status) => self.pass(inner, request, status).await,
                Asked::PassesQuestion(question, status) => self.pass_question(inner, question, status).await,
            };
        }
    }

    /// Lets a request go on that changes something, and drops what it changed.
    async fn change<S>(&self, inner: S, request: Request) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let (head, body) = request.into_parts();
        // A tag that is too long is that of no answer.
        let tags = self.config.invalidate.iter().filter_map(|tag| render(std::slice::from_ref(tag), &head).ok());
        let tags: Vec<_> = tags.flatten().collect();
        let changed = Changed::of(&head);
        let request = Request::from_parts(head, body);
        let response = self.pass(inner, request, CacheStatus::forwarded(Forward::Method)).await?;
        if self.changes.apply(&changed, &response) {
            for tag in tags {
                self.changes.purge(&Target::Tag(tag));
            }
        }
        Ok(response)
    }

    /// The rest of a stream of which the client has had a part, if it is the client's and at hand.
    fn take_up(&self, question: &Question, last: Last) -> Taken {
        let (Some(resume), Some(own)) = (&self.resume, question.own) else { return Taken::Lost };
        let (response, outcome) = match resume.take_up(last, |whose| question.has(own, whose), &self.kept.purges) {
            Ok(mut response) => {
                RESUMED.append(response.headers_mut());
                (response, CacheResume::Here)
            }
            Err(why) => match self.rest(question, last) {
                Some(response) => (response, CacheResume::Stored),
                None if why == Lost::Unknown && resume.copies.is_some() => return Taken::PerhapsThere(last),
                None => {
                    self.metrics.resumed(why.into());
                    return Taken::Lost;
                }
            },
        };
        Taken::Here(self.resumed(question, response, outcome))
    }

    /// The same of a stream that is stored here.
    fn rest(&self, question: &Question, last: Last) -> Option<Response> {
        match self.kept.look(question.primary, None, &question.head.headers) {
            (_, Some(Entry::Answer(stored))) if stored.id == Some(last.id) => {
                stored.rest(last, RESUMED, SystemTime::now())
            }
            _ => None,
        }
    }

    /// The same of one that another replica has, or that is stored in Redis. All of it within the deadline of the store.
    async fn take_up_there(&self, question: &Question, last: Last) -> Option<Response> {
        let (copies, own) = (self.resume.as_ref()?.copies.as_ref()?, question.own?);
        let exchange = question.head.extensions.get::<Exchange>();
        let found = if exchange.is_some_and(|exchange| exchange.facts().store_unanswered) {
            Err(Lost::Failed)
        } else {
            let found = timeout(copies.deadline(), self.find_there(copies, question, own, last)).await;
            found.unwrap_or_else(|_| {
                if let Some(exchange) = exchange {
                    exchange.facts().store_unanswered = true;
                }
                Err(Lost::Failed)
            })
        };
        match found {
            Ok((response, outcome)) => Some(self.resumed(question, response, outcome)),
            Err(why) => {
                self.metrics.resumed(why.into());
                None
            }
        }
    }

    async fn find_there(
        &self,
        copies: &copies::Of,
        question: &Question,
        own: Key,
        last: Last,
    ) -> Result<(Response, CacheResume), Lost> {
        let why = match copies.take_up(last, |whose| question.has(own, whose), RESUMED).await {
            Ok(response) => return Ok((response, CacheResume::There)),
            Err(why) => why,
        };
        if why == Lost::Unknown && self.config.record_streams && question.bypass.is_none() {
            let (key, _) = self.kept.look(question.primary, None, &question.head.headers);
            if self.fetch(question, key).await
                && let Some(response) = self.rest(question, last)
            {
                return Ok((response, CacheResume::Stored));
            }
        }
        Err(why)
    }

    fn resumed(&self, question: &Question, response: Response, outcome: CacheResume) -> Response {
        self.metrics.resumed(outcome);
        self.note(&question.head, CacheOutcome::Resumed);
        response
    }

    /// The answer to a question that may be kept. `found` is what there is for it, and under which key.
    async fn answer<S>(
        self: Arc<Self>,
        inner: S,
        question: Question,
        found: (Key, Option<Entry>),
    ) -> Result<Response, BoxError>
    where
        S: CloneService + Sync,
    {
        let mut status = CacheStatus::forwarded(Forward::UriMiss);
        let (mut found, mut variant) = (Some(found), None);
        let (mut has_looked, mut was_late) = (false, false);
        let mut known = None;
        for _ in 0..ROUNDS {
            known = None;
            let look = || self.kept.look(question.primary, variant, &question.head.headers);
            let (key, entry) = found.take().unwrap_or_else(look);
            let (entry, is_known) = self.known(&question, key, entry).await;
            let stale = match entry {
                Some(Entry::Answer(stored)) => {
                    if is_known && let Some(response) = self.stored(&inner, &question, key, &stored) {
                        return Ok(response);
                    }
                    let is_fresh = stored.life.remaining(SystemTime::now()) > 0;
                    status = CacheStatus::forwarded(if is_fresh { Forward::Request } else { Forward::Stale });
                    known = Some((key, stored.clone()));
                    Some(stored)
                }
                Some(Entry::Pass { .. }) => {
                    status.detail = Some("not-kept");
                    break;
                }
                None if key != question.primary => {
                    status = CacheStatus::forwarded(Forward::VaryMiss);
                    None
                }
                Some(Entry::Varies(_)) | None => None,
            };
            // A part is asked for as a part, and only `GET` brings what could be kept. What shall not be stored is not
            // shared either.
            let is_part = stale.is_none() && question.head.headers.contains_key(RANGE);
            let is_alone = is_part || question.head.method == http::Method::HEAD || question.asked.no_store;
            if stale.is_none() && (is_alone || question.asked.only_if_cached) && !mem::replace(&mut has_looked, true) {
                // Another replica may have all of it.
                if self.fetch(&question, key).await {
                    continue;
                }
            }
            if question.asked.only_if_cached {
                // §5.2.1.7.
                self.note(&question.head, CacheOutcome::Bypass);
                return Err(Error::from(NOT_CACHED).into());
            }
            if is_alone {
                break;
            }
            match self.upstream(&inner, &question, key, stale, &mut status).await {
                Step::Done(response) => return response,
                Step::Again(of) => variant = of.or(variant),
                Step::Late(_) if !mem::replace(&mut was_late, true) => {}
                Step::Late(error) => {
                    self.note(&question.head, CacheOutcome::Coalesced);
                    return Err(error);
                }
                Step::Alone => break,
            }
        }
        let status = CacheStatus { collapsed: false, ..status };
        match known {
            Some((key, stored)) => self.pass_beside(inner, question, status, key, stored).await,
            None => self.pass_question(inner, question, status).await,
        }
    }

    /// Lets the request go on by itself, where there is a stored answer that it cannot have. Where the upstream fails, it
    /// may have it all the same; and an answer to `HEAD` may tell that it holds no more (§4.3.5).
    async fn pass_beside<S>(
        &self,
        mut inner: S,
        question: Question,
        status: CacheStatus,
        key: Key,
        stored: Arc<Stored>,
    ) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let request = Request::from_parts(question.head.clone(), question.body.clone().into());
        let answer = inner.call(request).await.map_err(Into::into);
        if let Some(fwd_status) = failed(&answer) {
            let failure = Failure { stale: stored.clone(), key, status: fwd_status };
            if let Some(response) = self.stale_if_error(&question, key, &failure, status) {
                return Ok(response);
            }
        }
        self.note(&question.head, CacheOutcome::Miss);
        let mut response = answer?;
        CacheStatus { fwd_status: Some(response.status()), ..status }.append(response.headers_mut());
        if question.head.method == http::Method::HEAD
            && response.status() == stored.status
            && !validate::head_agrees(&stored.headers, response.headers())
        {
            self.kept.remove(&key);
            if let Some(shared) = &self.terms.shared {
                shared.remove(key);
            }
        }
        Ok(self.resumable(response, self.footing(&question)))
    }

    /// What is stored, if it may be given.
    fn stored<S>(&self, inner: &S, question: &Question, key: Key, stored: &Arc<Stored>) -> Option<Response>
    where
        S: CloneService + Sync,
    {
        let now = SystemTime::now();
        let verdict = stored.life.verdict(&question.asked, now);
        let outcome = match verdict {
            Verdict::Validate => return None,
            Verdict::Fresh => CacheOutcome::Hit,
            Verdict::Refresh | Verdict::Stale => CacheOutcome::Stale,
        };
        let soon = self.config.refresh.as_ref().map_or(0, |soon| soon.get().as_secs());
        let (left, age) = (stored.life.remaining(now), stored.life.age(now).as_secs());
        // Once a second at most, where answers live for no longer.
        let is_due = i64::try_from(soon).is_ok_and(|soon| left < soon) && age > 0;
        let response = stored.response(&question.head, CacheStatus::HIT, now, self.pace)?;
        if verdict == Verdict::Refresh || verdict == Verdict::Fresh && is_due {
            self.refresh(inner, question, key, stored.clone());
        }
        self.spared(question, outcome, stored);
        Some(response)
    }

    /// What is kept here, after a look at what other replicas may have purged, where this one did not hear them; and whether
    /// it may be given without asking the upstream.
    async fn known(&self, question: &Question, key: Key, entry: Option<Entry>) -> (Option<Entry>, bool) {
        let (Some(Entry::Answer(stored)), Some(shared)) = (&entry, &self.terms.shared) else { return (entry, true) };
        if shared.is_known(&stored.basis) {
            return (entry, true);
        }
        match shared.check(&stored.basis, &stored.names, question.head.extensions.get()).await {
            Holds::Yes => (entry, true),
            Holds::Unknown => (entry, false),
            Holds::To(Standing::Gone, _) => {
                self.kept.remove(&key);
                (None, true)
            }
            Holds::To(_, marks) => {
                let mut life = stored.life;
                life.expire(SystemTime::now());
                let basis = Basis { marks: Some(marks), ..stored.basis.clone() };
                let stale = Arc::new(stored.with(&stored.headers, life, basis));
                self.kept.put(key, stale.clone());
                (Some(Entry::Answer(stale)), true)
            }
        }
    }

    /// Looks in Redis for an answer that this request alone would ask the upstream for. Whether it is here now.
    async fn fetch(&self, question: &Question, key: Key) -> bool {
        let (Some(shared), Ok(names)) = (&self.terms.shared, self.names_of(question)) else { return false };
        let sought = Sought {
            primary: question.primary,
            key,
            headers: &question.head.headers,
            names: &names,
            number: self.kept.purges.now(),
            stale: None,
            exchange: question.head.extensions.get(),
        };
        let looked = shared.look(sought).await;
        if let Some(names) = looked.varies {
            self.kept.put_names(question.primary, &names, true);
        }
        let Some((key, stored)) = looked.found else { return false };
        self.kept.put(key, stored.into());
        true
    }
}
