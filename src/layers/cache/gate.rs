//! What all requests of a route share in its cache, and what is done for each of them whatever becomes of it.

use std::{fmt, sync::Arc};

use http::request::Parts;
use parking_lot::Mutex;
use tokio::{sync::Semaphore, task::JoinSet};
use tower::Service;

use super::{
    change::Changes,
    config::{Config, Replay},
    fill::Terms,
    freshness::Rules,
    kept::Kept,
    key::Key,
    left::Owner,
    purge::{self, ANY_HOST, Names},
    question::{Question, origin},
    recording::Recording,
    resume::{self, Footing, Id, Resume, Stream, Whose},
    shared::Shared,
    state::State,
    status::{CacheStatus, Forward, Source},
    stored::{self, Pace, Stored},
    tags,
};
use crate::{
    config::{HumanDuration, Toggle},
    message::{BoxError, Request, Response, path::Parameters},
    store::Redis,
    telemetry::{Exchange, Metrics, exchange::CacheOutcome, metrics::CacheMetrics},
};

/// How many answers are read that their clients have already, at once.
pub(super) const MOST_UNREAD: usize = 16;

/// The cache of a route.
pub(super) struct Gate {
    pub(super) route: String,
    pub(super) config: Config,
    pub(super) kept: Arc<Kept>,
    pub(super) terms: Arc<Terms>,
    pub(super) pace: Pace,
    pub(super) changes: Changes,
    pub(super) resume: Option<Resume>,
    pub(super) metrics: CacheMetrics,
    pub(super) tasks: Arc<Mutex<JoinSet<()>>>,
    /// Places for the reading of answers that their clients have already.
    pub(super) unread: Arc<Semaphore>,
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("route", &self.route).finish_non_exhaustive()
    }
}

impl Gate {
    /// As [`CacheLayer::new`](super::CacheLayer::new) has it.
    pub(super) fn new(
        config: &Config,
        route: &str,
        upstream: &str,
        state: &State,
        redis: Option<&Redis>,
        metrics: &Metrics,
    ) -> Self {
        let metrics = metrics.cache(route);
        let duration = |toggle: Toggle<HumanDuration>| toggle.on().map(HumanDuration::get);
        let rules = Rules {
            ttl: duration(config.ttl),
            negative_ttl: duration(config.negative_ttl),
            stale_while_revalidate: duration(config.stale_while_revalidate),
            stale_if_error: duration(config.stale_if_error),
            ignore_cache_control: config.ignore_cache_control,
            keyed_by_credential: !config.shared,
        };
        let shared = redis
            .zip(config.redis.as_ref())
            .map(|(redis, own)| Shared::new(state.purger.hub(redis), (route, upstream), config, own, metrics.clone()));
        let resume = duration(config.resume).map(|after| {
            let copies = shared.as_ref().map(Shared::copies);
            Resume { streams: state.streams(config, route), after, copies }
        });
        let terms = Terms {
            rules,
            max_body: usize::try_from(config.max_body.get()).unwrap_or(usize::MAX),
            record_streams: config.record_streams,
            terminal: config.terminal.clone().map(Arc::new),
            tools: config.body.tools,
            when: config.when.clone(),
            refresh: duration(config.refresh),
            shared,
            room: resume.as_ref().map(|resume| resume.streams.room().clone()),
            metrics: metrics.clone(),
        };
        Self {
            route: route.to_owned(),
            kept: state.kept(config, route, upstream, &metrics),
            terms: Arc::new(terms),
            pace: match config.replay {
                Replay::Instant => Pace::Instant,
                Replay::Paced => Pace::Times(config.speed),
            },
            config: config.clone(),
            changes: Changes::new(state, [config]),
            resume,
            metrics,
            tasks: state.tasks.clone(),
            unread: Arc::new(Semaphore::new(MOST_UNREAD)),
        }
    }

    /// Lets the request go on as if there were no cache.
    pub(super) async fn pass<S>(
        &self,
        mut inner: S,
        request: Request,
        status: CacheStatus,
    ) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let outcome = match status.source {
            Source::Forward(Forward::Bypass | Forward::Method) => CacheOutcome::Bypass,
            _ => CacheOutcome::Miss,
        };
        let exchange = request.extensions().get::<Exchange>().cloned();
        self.count(exchange.as_ref(), outcome);
        let mut response = inner.call(request).await.map_err(Into::into)?;
        CacheStatus { fwd_status: Some(response.status()), ..status }.append(response.headers_mut());
        Ok(response)
    }

    /// Lets the request go on by itself. What it gets can be taken up again.
    pub(super) async fn pass_question<S>(
        &self,
        inner: S,
        question: Question,
        status: CacheStatus,
    ) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let footing = self.footing(&question);
        let request = Request::from_parts(question.head, question.body.into());
        let response = self.pass(inner, request, status).await?;
        Ok(self.resumable(response, footing))
    }

    /// By what the answer for the one who asks can be taken up again, and is purged.
    pub(super) fn footing(&self, question: &Question) -> Option<(Key, Owner, Footing)> {
        self.resume.as_ref()?;
        // No purge names a tag that is too long.
        let names = self.names_of(question).unwrap_or_else(|tags::TooLong| self.names_with(question, Box::default()));
        let (number, asked) = question.since;
        let footing = Footing { names, number, asked, marks: None };
        Some((question.own?, question.owner.clone(), footing))
    }

    /// An answer for the one who asked, which can be taken up again if it is a stream.
    pub(super) fn resumable(&self, response: Response, footing: Option<(Key, Owner, Footing)>) -> Response {
        let (Some(resume), Some((own, owner, footing)), true) =
            (&self.resume, footing, resume::fits(&response, &self.terms.rules))
        else {
            return response;
        };
        let Some(id) = Id::new() else { return response };
        let (mut parts, body) = response.into_parts();
        resume::weaken(&mut parts.headers);
        let mut headers = stored::own(parts.headers.clone());
        CacheStatus::remove(&mut headers);
        let recording = Recording::new(body, self.terms.max_body, self.kept.budget.clone(), None, |_| {});
        recording.hold(resume.streams.room().share(), true);
        let Some(reader) = recording.reader() else { unreachable!("nothing of it is gone") };
        let body = resume.begin(id, reader, || Stream {
            whose: Whose::One(own),
            owner,
            status: parts.status,
            version: parts.version,
            headers,
            extensions: parts.extensions.clone(),
            recording,
            footing,
            asking: None,
            is_known: Arc::default(),
        });
        Response::from_parts(parts, body)
    }

    /// What an answer to this question is purged by.
    pub(super) fn names_of(&self, question: &Question) -> Result<Arc<Names>, tags::TooLong> {
        Ok(self.names_with(question, render(&self.config.tags, &question.head)?))
    }

    fn names_with(&self, question: &Question, tags: Box<[Box<str>]>) -> Arc<Names> {
        let host = if self.config.ignore_host { ANY_HOST.into() } else { origin(&question.head).into() };
        let path = purge::path(&question.head.uri, &self.config.ignore_query).into();
        Arc::new(Names { host, path, tags })
    }

    /// Notes that the upstream was spared what it had taken for the stored answer.
    pub(super) fn spared(&self, question: &Question, outcome: CacheOutcome, stored: &Stored) {
        self.note(&question.head, outcome);
        self.metrics.saved(stored.took);
    }

    /// Counts a request, and notes on it what the cache was for it.
    pub(super) fn note(&self, head: &Parts, outcome: CacheOutcome) {
        self.count(head.extensions.get::<Exchange>(), outcome);
    }

    fn count(&self, exchange: Option<&Exchange>, outcome: CacheOutcome) {
        self.metrics.count(outcome);
        if let Some(exchange) = exchange {
            exchange.facts().cache = Some(outcome);
        }
    }
}

/// The tags that templates make of a request.
///
/// # Errors
/// One is too long.
pub(super) fn render(templates: &[tags::Template], head: &Parts) -> Result<Box<[Box<str>]>, tags::TooLong> {
    let source = tags::Source {
        parameters: head.extensions.get::<Parameters>(),
        query: head.uri.query(),
        headers: &head.headers,
    };
    let rendered = templates.iter().map(|template| template.render(&source));
    rendered.filter_map(|tag| tag.map(|tag| tag.map(Into::into)).transpose()).collect()
}
