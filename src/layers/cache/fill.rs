//! Asking the upstream, for one or for many, and what becomes of its answer.

use std::{
    sync::{Arc, atomic::Ordering},
    time::{Duration, SystemTime},
};

use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{AUTHORIZATION, CONTENT_TYPE, SET_COOKIE},
    request, response,
};
use http_body::Body as _;
use parking_lot::Mutex;
use tokio::time::Instant;
use tower::Service;

use super::{
    canonical::When,
    coming::Coming,
    directives,
    freshness::{self, Life, Rules, Verdict, Why},
    hub,
    kept::Place,
    key::Key,
    purge::Standing,
    recording::{Lost, Recording, Whole},
    resume::{self, Footing, Id, Room},
    shared::{Shared, Sought},
    stored::{Basis, Stored},
    validate,
    vary::{self, Names},
};
use crate::{
    message::{Body, BoxError, Error, Fault, Kind, Request, Response},
    sse::{self, Completion, Terminal},
    telemetry::{Exchange, metrics::CacheMetrics},
};

/// What became of the question, for each who asked.
#[derive(Clone)]
pub(super) enum Outcome {
    /// All read along.
    Coming(Arc<Coming>),
    /// The upstream says that the stored answer still holds.
    Renewed(Arc<Renewed>),
    /// Another replica has it. Whether it is fresh enough is for each to say.
    Shared(Arc<Stored>, Key),
    /// It is for the one who asked first.
    Alone(Arc<Mutex<Option<Response>>>, &'static str),
    /// There is none. The one who asked first gets the error, the others one like it.
    Failed { first: Arc<Mutex<Option<BoxError>>>, kind: Kind, retry_after: Option<Duration> },
    /// The upstream has failed. A stored answer may stand in, for those who take it; the others get this.
    StaleIfError(Arc<Failure>, Box<Outcome>),
}

/// A stored answer that still holds.
pub(super) struct Renewed {
    pub(super) stored: Arc<Stored>,
    pub(super) key: Key,
    /// Whether it is for others than the one who asked first.
    pub(super) is_shared: bool,
    /// Whether it is kept.
    pub(super) is_kept: bool,
    /// What the 304 sets, for the one who asked first.
    pub(super) cookies: Vec<HeaderValue>,
}

/// A failure that a stored answer may stand in for.
pub(super) struct Failure {
    pub(super) stale: Arc<Stored>,
    pub(super) key: Key,
    /// What the upstream answered, if it did.
    pub(super) status: Option<StatusCode>,
}

/// What is to be known for that.
pub(super) struct Job {
    /// The request, as far as the answer's life depends on it.
    pub(super) head: request::Parts,
    /// The key before `Vary`.
    pub(super) primary: Key,
    /// What there is, and is too old; under this key.
    pub(super) stale: Option<Arc<Stored>>,
    pub(super) key: Key,
    /// What the one who asked first asks for.
    pub(super) asked: directives::Request,
    /// What the answer rests on.
    pub(super) basis: Basis,
    /// What the stale one rests on: a 304 says nothing of what was purged between its body and now.
    pub(super) rests: Basis,
    pub(super) terms: Arc<Terms>,
}

/// What holds for all answers of a route.
#[derive(Debug)]
pub(super) struct Terms {
    pub(super) rules: Rules,
    pub(super) max_body: usize,
    pub(super) record_streams: bool,
    pub(super) terminal: Option<Arc<Terminal>>,
    /// Whether answers that call tools are kept.
    pub(super) tools: bool,
    pub(super) when: When,
    /// How soon something has to become stale for it to be asked for anew before.
    pub(super) refresh: Option<Duration>,
    pub(super) shared: Option<Shared>,
    /// The memory for streams that can be taken up again.
    pub(super) room: Option<Arc<Room>>,
    pub(super) metrics: CacheMetrics,
}

impl Job {
    /// Whether another replica's answer does instead of asking.
    fn is_enough(&self, found: &Stored, now: SystemTime) -> bool {
        let verdict = found.life.verdict(&self.asked, now);
        if self.stale.is_none() {
            return verdict != Verdict::Validate;
        }
        // There is one already that is stale, or will be soon.
        let lasts = |soon: Duration| found.life.remaining(now) >= i64::try_from(soon.as_secs()).unwrap_or(i64::MAX);
        verdict == Verdict::Fresh && self.terms.refresh.is_none_or(lasts)
    }
}

/// Looks in Redis for the answer to `request`, where the route uses it, and asks `inner` where it is not there.
pub(super) async fn ask<S>(inner: S, mut request: Request, mut job: Job, place: Place) -> Outcome
where
    S: Service<Request, Response = Response, Error: Into<BoxError>>,
{
    job.basis = Basis::new(place.number, None, hub::clock());
    job.rests = job.stale.as_ref().map(|stale| stale.basis.clone()).unwrap_or_default();
    if let Some(shared) = &job.terms.shared {
        let sought = Sought {
            primary: job.primary,
            key: job.key,
            headers: &job.head.headers,
            names: &place.names,
            number: place.number,
            stale: job.stale.as_deref(),
            exchange: job.head.extensions.get(),
        };
        let looked = shared.look(sought).await;
        job.basis = looked.basis;
        place.basis.get_or_init(|| job.basis.clone());
        match looked.renews {
            Some(rests) => job.rests = rests,
            // Whatever the upstream would say of it, it was dropped, or may have been.
            None if job.stale.take().is_some() => {
                validate::conditions(&job.head.method, &mut job.head.headers, None);
                request.headers_mut().clone_from(&job.head.headers);
            }
            None => {}
        }
        if let Some(names) = looked.varies {
            place.kept.put_names(job.primary, &names, true);
        }
        let is_newer =
            |found: &Stored| job.stale.as_ref().is_none_or(|stale| found.life.received() > stale.life.received());
        if let Some((key, found)) = looked.found.filter(|(_, found)| is_newer(found)) {
            let found: Arc<Stored> = found.into();
            place.also(key);
            place.kept.put(key, found.clone());
            if job.is_enough(&found, SystemTime::now()) {
                return Outcome::Shared(found, key);
            }
            validate::conditions(&job.head.method, &mut job.head.headers, Some(&found.headers));
            request.headers_mut().clone_from(&job.head.headers);
            job.rests = found.basis.clone();
            (job.stale, job.key) = (Some(found), key);
        }
    }
    upstream(inner, request, job, place).await
}

/// Asks `inner` for the answer to `request`.
async fn upstream<S>(mut inner: S, request: Request, job: Job, place: Place) -> Outcome
where
    S: Service<Request, Response = Response, Error: Into<BoxError>>,
{
    let (requested, begun) = (SystemTime::now(), Instant::now());
    let answer = inner.call(request).await;
    let received = SystemTime::now();
    let answer = answer.map_err(Into::into);
    let failure = failed(&answer).zip(job.stale.clone());
    let failure = failure.map(|(status, stale)| Arc::new(Failure { stale, key: job.key, status }));
    let response = match answer {
        Ok(response) => response,
        Err(error) => {
            let found = Error::find(&*error);
            let (kind, retry_after) = (found.map_or(Kind::Internal, Error::kind), found.and_then(Error::retry_after));
            let failed = Outcome::Failed { first: Arc::new(Mutex::new(Some(error))), kind, retry_after };
            return match failure {
                Some(failure) => Outcome::StaleIfError(failure, Box::new(failed)),
                None => failed,
            };
        }
    };
    // By another method than `GET` nobody asked on a condition, and what the upstream means by it is for the client to see.
    let is_told = response.status() == StatusCode::NOT_MODIFIED && job.head.method == Method::GET;
    if let Some(stale) = job.stale.as_ref().filter(|_| is_told) {
        if place.kept.standing(stale) == Standing::Gone || !validate::selects(&stale.headers, response.headers()) {
            // About one that was purged meanwhile, or another one (§4.3.4): ours is asked for without a condition.
            let mut head = job.head.clone();
            validate::conditions(&head.method, &mut head.headers, None);
            let again = Request::from_parts(head, Body::empty());
            return Box::pin(upstream(inner, again, Job { stale: None, ..job }, place)).await;
        }
        return renewed(stale, response.headers(), &job, &place, (requested, received));
    }
    let fits = resume::fits(&response, &job.terms.rules);
    let (parts, body) = response.into_parts();
    let outcome = match storable(&parts, &body, &job, (requested, received)) {
        Ok(life) => {
            let id = if fits && job.terms.room.is_some() { Id::new() } else { None };
            coming(parts, body, id, Ok(life), job, place, begun)
        }
        // Those who wait have asked an upstream that fails: let it rest. Unless this is for one of them alone.
        Err(why) if is_failure(parts.status) && is_for_all(&parts, &job) => {
            coming(parts, body, None, Err(why), job, place, begun)
        }
        Err(why) => {
            if says_it_of_all(&parts, why, &job, received) {
                place.kept.put_pass(place.key(), &place);
            }
            Outcome::Alone(Arc::new(Mutex::new(Some(Response::from_parts(parts, body)))), why)
        }
    };
    match failure {
        Some(failure) => Outcome::StaleIfError(failure, Box::new(outcome)),
        None => outcome,
    }
}

/// Whether nothing in an answer that is not kept says that it is for one alone.
fn is_for_all(parts: &response::Parts, job: &Job) -> bool {
    let said = directives::Response::of(&parts.headers);
    let shows_none = job.terms.rules.keyed_by_credential || !job.head.headers.contains_key(AUTHORIZATION);
    let is_own = said.no_store || said.private.is_some() || parts.headers.contains_key(SET_COOKIE);
    shows_none && !is_own && !vary::is_star(&parts.headers)
}

/// Whether a stored answer may stand in: the upstream has failed, with a status or without.
#[expect(clippy::option_option, reason = "a failure, and its status")]
pub(super) fn failed(answer: &Result<Response, BoxError>) -> Option<Option<StatusCode>> {
    match answer {
        Ok(response) => is_failure(response.status()).then(|| Some(response.status())),
        Err(error) => {
            let kind = Error::find(&**error).map_or(Kind::Internal, Error::kind);
            (kind.fault() != Fault::Client).then_some(None)
        }
    }
}

/// Whether an answer says that the upstream failed (RFC 5861 §4).
fn is_failure(status: StatusCode) -> bool {
    matches!(status.as_u16(), 500 | 502..=504)
}

/// Whether no answer to this question can be kept: what is wrong with this one lies neither in the request, which others
/// need not be like, nor in the moment. It takes the place of nothing that is still fresh.
fn says_it_of_all(parts: &response::Parts, why: &str, job: &Job, now: SystemTime) -> bool {
    let of_others = [Why::RequestNoStore, Why::Authorization, Why::Method, Why::Stale];
    let is_of_request = of_others.iter().any(|of| of.word() == why);
    let is_of_target = parts.status.is_success()
        || parts.status.is_redirection()
        || matches!(parts.status.as_u16(), 404 | 405 | 410 | 414);
    let is_fresh = job.stale.as_ref().is_some_and(|stored| stored.life.remaining(now) > 0);
    is_of_target && !is_of_request && !is_fresh && !stepped_in(&job.head)
}

/// How long an answer may be used; or why it is not kept.
fn storable(
    parts: &response::Parts,
    body: &Body,
    job: &Job,
    (requested, received): (SystemTime, SystemTime),
) -> Result<Life, &'static str> {
    let life = freshness::life(&job.head, parts, &job.terms.rules, requested, received).map_err(Why::word)?;
    if body.size_hint().lower() > job.terms.max_body as u64 {
        return Err("too-large");
    }
    Ok(life)
}

/// Whether another upstream than the route's own has answered: no answer for when that is well again.
fn stepped_in(head: &request::Parts) -> bool {
    head.extensions.get::<Exchange>().is_some_and(|exchange| exchange.facts().fallback)
}

/// A stored answer, with what a 304 says of it (§4.3.4).
fn renewed(
    stale: &Arc<Stored>,
    of_304: &HeaderMap,
    job: &Job,
    place: &Place,
    (requested, received): (SystemTime, SystemTime),
) -> Outcome {
    let mut headers = stale.headers.clone();
    validate::merge(&mut headers, of_304);
    let (mut parts, ()) = http::Response::new(()).into_parts();
    (parts.status, parts.headers) = (stale.status, headers);
    let life = freshness::life(&job.head, &parts, &job.terms.rules, requested, received);
    let of_both = *life.as_ref().unwrap_or(&stale.life);
    let stored = Arc::new(stale.with(&parts.headers, of_both, job.rests.clone()));
    // What depends on other fields than before stands under a key that is no longer its own.
    let vary = vary::names(&stored.headers);
    let is_shared = life.is_ok() && vary == vary::names(&stale.headers);
    let is_kept = is_shared && place.kept.put(job.key, stored.clone());
    if is_shared {
        if let (Some(shared), Names::Fields(vary)) = (&job.terms.shared, vary) {
            shared.put(job.primary, job.key, vary, stored.clone());
        }
    } else {
        // It holds for the one who asked, and must not be kept any longer.
        place.kept.remove(&job.key);
        if let Some(shared) = &job.terms.shared {
            shared.remove(job.key);
        }
    }
    let cookies = of_304.get_all(SET_COOKIE).iter().cloned().collect();
    Outcome::Renewed(Arc::new(Renewed { stored, key: job.key, is_shared, is_kept, cookies }))
}

/// Whether it is made while it comes: an event stream, or JSON in lines.
fn is_stream(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    sse::is_event_stream(headers) || kind.to_ascii_lowercase().starts_with(b"application/x-ndjson")
}

/// An answer that all may have who asked for it, and that is kept when it is whole, if it may be used for any time.
/// With an `id` it can be taken up again.
fn coming(
    parts: response::Parts,
    body: Body,
    id: Option<Id>,
    life: Result<Life, &'static str>,
    job: Job,
    place: Place,
    begun: Instant,
) -> Outcome {
    let (is_storable, detail) = (life.is_ok(), life.err());
    let life = life.unwrap_or_else(|_| Life::none(SystemTime::now()));
    // From now on not everybody may join.
    place.life.get_or_init(|| life);
    let mut vary = match vary::names(&parts.headers) {
        Names::Fields(names) => names,
        Names::Star => Vec::new(),
    };
    // An error says less of what answers depend on than they do: it is one of them, and not one for all.
    if !freshness::is_of_target(parts.status)
        && let Some(names) = place.kept.names(job.primary)
        && vary.iter().all(|name| names.contains(name))
    {
        vary = names.to_vec();
    }
    let mut key = job.primary;
    if !vary.is_empty() {
        key = job.primary.with_vary(&vary, &job.head.headers);
    }
    place.also(key);
    let response::Parts { status, mut headers, version, extensions, .. } = parts;
    let is_stream = is_stream(&headers);
    let stored = (status, validate::storable_headers(&headers, life.received()));
    if id.is_some() {
        resume::weaken(&mut headers);
    }
    let took = begun.elapsed();
    let is_post = job.head.method == Method::POST;
    // What another upstream than the route's own has said is no answer for when that is well again.
    let stepped_in = stepped_in(&job.head);
    let latecomers = job.head.extensions.get().cloned().unwrap_or_default();
    let Job { primary, terms, basis, stale, .. } = job;
    let footing = Footing {
        names: place.names.clone(),
        number: place.number,
        asked: basis.seen.load(Ordering::Relaxed),
        marks: basis.marks.clone(),
    };
    let (max_body, depends) = (terms.max_body, vary.clone());
    let share = terms.room.as_ref().filter(|_| id.is_some()).map(Room::share);
    // What was paid for by the token is not kept where it was cut short.
    let completes = is_stream || is_post;
    let terminal = terms.terminal.clone().filter(|_| is_stream);
    let completion = if completes { Completion::of(&headers, terminal, terms.tools) } else { None };
    // Inside of a content coding nobody can see whether a stream has come to its end.
    let is_kept = is_storable && !stepped_in && (!is_stream || terms.record_streams && completion.is_some());
    let kept = place.kept.clone();
    // One client that has an error made must not take the answer from all others, nor what stands in for it.
    let holds_out = || {
        let now = SystemTime::now();
        stale.is_some_and(|stale| stale.holds_out(now)) || kept.holds_out(primary, key, &vary, now)
    };
    let is_kept = is_kept && (freshness::is_of_target(status) || !holds_out());
    if is_kept && !vary.is_empty() {
        kept.put_names(primary, &vary, false);
    }
    let end = move |whole: Result<Whole, Lost>| {
        let whole = match whole {
            Ok(whole) => whole,
            Err(Lost::TooLarge) if is_kept => return place.kept.put_pass(key, &place),
            Err(Lost::TooLarge | Lost::Broken | Lost::Incomplete) => return,
        };
        if !is_kept || !terms.when.is_empty() && terms.when.pass(&whole.body).is_err() {
            return;
        }
        let stored = Stored::new(stored, whole, is_stream, life, place.names.clone(), basis, took);
        let stored = Arc::new(Stored { id, ..stored });
        terms.metrics.stored.inc();
        if !depends.is_empty() {
            place.kept.put_names(primary, &depends, true);
        }
        if let Some(shared) = &terms.shared {
            shared.put(primary, key, depends, stored.clone());
        }
        place.kept.put(key, stored);
    };
    let is_short = body.size_hint().exact().is_some();
    let recording = Recording::new(body, max_body, kept.budget.clone(), completion, end);
    if let Some(share) = share {
        recording.hold(share, false);
    }
    Outcome::Coming(Arc::new(Coming {
        status,
        headers,
        version,
        extensions,
        begun,
        latecomers,
        recording,
        vary,
        key,
        life,
        detail,
        is_short,
        is_kept,
        id,
        footing,
    }))
}
