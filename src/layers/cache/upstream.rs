//! What the upstream says to a question, asked once for all who ask it, and who may have it.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime},
};

use futures_util::FutureExt;
use http::header::SET_COOKIE;
use http_body::Body as _;
use tokio::time::{Instant, timeout};

use super::{
    directives::Request as Directives,
    fill::{self, Failure, Job, Outcome},
    freshness::Verdict,
    gate::Gate,
    kept::Asking,
    key::Key,
    left::Owner,
    purge::Standing,
    question::Question,
    shared::Holds,
    status::CacheStatus,
    stored::{Basis, Stored},
    tags, validate,
};
use crate::{
    message::{BoxError, CloneService, Error, Kind, Latecomers, Request, Response},
    telemetry::{Exchange, exchange::CacheOutcome},
};

/// How long an answer is read that its client has already.
const UNREAD: Duration = Duration::from_secs(1);

/// How a question goes on.
pub(super) enum Step {
    /// It is answered.
    Done(Result<Response, BoxError>),
    /// The answer was another's. More is known now: under which key its own would be.
    Again(Option<Key>),
    /// Whose question it was had no more time. This one came later.
    Late(BoxError),
    /// By itself.
    Alone,
}

impl Gate {
    /// What the upstream says, to this request or to another that asks the same.
    pub(super) async fn upstream<S>(
        &self,
        inner: &S,
        question: &Question,
        key: Key,
        stale: Option<Arc<Stored>>,
        status: &mut CacheStatus,
    ) -> Step
    where
        S: CloneService + Sync,
    {
        let came = Instant::now();
        self.part(question, key).await;
        let (asking, first) = match self.join(inner, question, key, stale) {
            Ok(Some(joined)) => joined,
            Ok(None) => return Step::Again(None),
            Err(tags::TooLong) => {
                status.detail = Some("tag-too-long");
                return Step::Alone;
            }
        };
        // As long as this one is there, others find the answer.
        let held = asking.clone();
        let patience = if first { Duration::MAX } else { self.config.coalesce_timeout.get() };
        let Ok(outcome) = timeout(patience, asking).await else {
            status.detail = Some("coalesce-timeout");
            return Step::Alone;
        };
        status.collapsed = !first;
        let outcome = match outcome {
            Outcome::StaleIfError(failure, other) => match self.stale_if_error(question, key, &failure, *status) {
                Some(response) => return Step::Done(Ok(response)),
                None => *other,
            },
            outcome => outcome,
        };
        let whose = if first { CacheOutcome::Miss } else { CacheOutcome::Coalesced };
        match outcome {
            Outcome::Coming(coming) => {
                // It may be for requests with other fields (§4.1).
                let own = question.variant(&coming.vary);
                if coming.key != own {
                    return Step::Again(Some(own));
                }
                let response = if coming.is_known(&question.head) {
                    // Nobody may be left to read it, and all who come have it already.
                    if coming.is_short && first {
                        self.finish_soon(held);
                    }
                    Some(coming.not_modified(*status))
                } else {
                    let exchange = question.head.extensions.get();
                    coming.response(held, &question.owner, *status, self.resume.as_ref(), came, exchange)
                };
                response.map_or(Step::Alone, |response| {
                    self.note(&question.head, whose);
                    Step::Done(Ok(response))
                })
            }
            Outcome::Shared(stored, of) if !question.is_of(&stored, of) => Step::Again(None),
            Outcome::Shared(stored, of) => self.shared(inner, question, of, &stored),
            Outcome::Renewed(renewed)
                if !question.is_of(&renewed.stored, renewed.key) && renewed.key != key
                    || !(first || renewed.is_shared) =>
            {
                Step::Again(None)
            }
            Outcome::Renewed(renewed) => {
                let fwd_status = Some(http::StatusCode::NOT_MODIFIED);
                let status = CacheStatus { fwd_status, stored: renewed.is_kept, ..*status };
                let stored = &renewed.stored;
                let response = stored.response(&question.head, status, SystemTime::now(), self.pace);
                response.map_or(Step::Alone, |mut response| {
                    for cookie in renewed.cookies.iter().filter(|_| first) {
                        response.headers_mut().append(SET_COOKIE, cookie.clone());
                    }
                    self.spared(question, CacheOutcome::Revalidated, stored);
                    Step::Done(Ok(response))
                })
            }
            // It was looked into above.
            Outcome::StaleIfError(..) => Step::Alone,
            Outcome::Alone(response, why) => {
                status.detail = Some(why);
                let response = first.then(|| response.lock().take()).flatten();
                response.map_or(Step::Alone, |mut response| {
                    let fwd_status = Some(response.status());
                    CacheStatus { fwd_status, ..*status }.append(response.headers_mut());
                    self.note(&question.head, whose);
                    Step::Done(Ok(self.resumable(response, self.footing(question))))
                })
            }
            Outcome::Failed { first: error, kind, retry_after } => {
                let own = first.then(|| error.lock().take()).flatten();
                let error = own.unwrap_or_else(|| {
                    let error = Error::new(kind, "the request that this one waited for failed");
                    match retry_after {
                        Some(after) => error.with_retry_after(after).into(),
                        None => error.into(),
                    }
                });
                if !first && kind == Kind::DeadlineExceeded {
                    return Step::Late(error);
                }
                self.note(&question.head, whose);
                Step::Done(Err(error))
            }
        }
    }

    /// Lets nobody join any more what is on its way, if other replicas have dropped it and this one did not hear them.
    async fn part(&self, question: &Question, key: Key) {
        let Some(shared) = &self.terms.shared else { return };
        let Some((id, names, basis)) = self.kept.on_its_way(&key) else { return };
        // Who is still looking in Redis finds what is there now.
        let Some(basis) = basis.get().filter(|basis| !shared.is_known(basis)) else { return };
        if !matches!(shared.check(basis, &names, question.head.extensions.get()).await, Holds::Yes) {
            self.kept.part(&key, id);
        }
    }

    /// What was found in Redis.
    fn shared<S>(&self, inner: &S, question: &Question, of: Key, stored: &Arc<Stored>) -> Step
    where
        S: CloneService + Sync,
    {
        let now = SystemTime::now();
        let outcome = match stored.life.verdict(&question.asked, now) {
            // It is too old for this one, if not for the one who asked first.
            Verdict::Validate => return Step::Again(None),
            Verdict::Fresh => CacheOutcome::Hit,
            Verdict::Refresh => {
                self.refresh(inner, question, of, stored.clone());
                CacheOutcome::Stale
            }
            Verdict::Stale => CacheOutcome::Stale,
        };
        let status = CacheStatus { detail: Some("shared"), ..CacheStatus::HIT };
        let response = stored.response(&question.head, status, now, self.pace);
        response.map_or(Step::Alone, |response| {
            self.spared(question, outcome, stored);
            Step::Done(Ok(response))
        })
    }

    /// The stored answer, where the upstream has failed and this request takes it then.
    pub(super) fn stale_if_error(
        &self,
        question: &Question,
        key: Key,
        Failure { stale, key: of, status: fwd_status }: &Failure,
        status: CacheStatus,
    ) -> Option<Response> {
        let now = SystemTime::now();
        if *of != key && !question.is_of(stale, *of) || !stale.life.is_stale_if_error(&question.asked, now) {
            return None;
        }
        // It may have been purged while the upstream was asked.
        if self.kept.standing(stale) == Standing::Gone {
            return None;
        }
        let status = CacheStatus { fwd_status: *fwd_status, detail: Some("stale-if-error"), ..status };
        let response = stale.response(&question.head, status, now, self.pace)?;
        self.spared(question, CacheOutcome::Stale, stale);
        Some(response)
    }

    /// Goes along with a question that is being asked, or asks it: then `true`. `None` where it has just been answered.
    ///
    /// # Errors
    /// That its answer could not be tagged.
    pub(super) fn join<S>(
        &self,
        inner: &S,
        question: &Question,
        key: Key,
        stale: Option<Arc<Stored>>,
    ) -> Result<Option<(Asking, bool)>, tags::TooLong>
    where
        S: CloneService + Sync,
    {
        let names = self.names_of(question)?;
        let joined = self.kept.join(key, &names, &question.asked, stale.clone().as_ref(), |place| {
            let mut head = question.head.clone();
            head.extensions.insert(Latecomers::default());
            // What the client would do with an answer that it has is decided when the answer is there.
            validate::conditions(&head.method, &mut head.headers, stale.as_ref().map(|stale| &stale.headers));
            let job = Job {
                head: head.clone(),
                primary: question.primary,
                stale,
                key,
                asked: question.asked,
                basis: Basis::default(),
                rests: Basis::default(),
                terms: self.terms.clone(),
            };
            fill::ask(inner.clone(), Request::from_parts(head, question.body.clone().into()), job, place).boxed()
        });
        if let Some((asking, true)) = &joined
            && self.config.finish_fill
        {
            self.finish(asking.clone());
        }
        Ok(joined)
    }

    /// Asks anew for what is stored, behind the request that found it. Once at a time.
    pub(super) fn refresh<S>(&self, inner: &S, question: &Question, key: Key, stored: Arc<Stored>)
    where
        S: CloneService + Sync,
    {
        let mut head = question.head.clone();
        // Nothing of it is this client's any more; but what becomes of it has to be noted somewhere.
        if let Some(old) = head.extensions.remove::<Exchange>() {
            let request = http::Request::from_parts(head, ());
            let exchange = Exchange::new(&request);
            {
                let (old, mut new) = (old.facts(), exchange.facts());
                (new.client_ip, new.https) = (old.client_ip, old.https);
            }
            head = request.into_parts().0;
            head.extensions.insert(exchange);
        }
        head.method = if head.method == http::Method::HEAD { http::Method::GET } else { head.method };
        let (body, primary, asked) = (question.body.clone(), question.primary, Directives::default());
        let question =
            Question { head, body, primary, asked, bypass: None, own: None, owner: Owner::Unknown, since: (0, 0) };
        if let Ok(Some((asking, true))) = self.join(inner, &question, key, Some(stored)) {
            self.metrics.refreshed.inc();
            self.finish(asking);
        }
    }

    /// Reads an answer to its end, whoever else does, as long as that may be kept then.
    pub(super) fn finish(&self, asking: Asking) {
        self.spawn(read(asking));
    }

    /// The same for an answer whose client has gone, and holds no place of a limit for it any more: not for long, and not
    /// for many.
    fn finish_soon(&self, asking: Asking) {
        let Ok(place) = self.unread.clone().try_acquire_owned() else { return };
        self.spawn(async move {
            timeout(UNREAD, read(asking)).await.ok();
            drop(place);
        });
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }
}

/// Reads an answer to its end, if it may be kept then.
async fn read(asking: Asking) {
    let held = asking.clone();
    if let Outcome::Coming(coming) = asking.await
        && coming.is_kept
        && let Some(mut reader) = coming.recording.reader()
    {
        while !coming.recording.is_over()
            && let Some(Ok(_)) = std::future::poll_fn(|cx| Pin::new(&mut reader).poll_frame(cx)).await
        {}
    }
    drop(held);
}

#[cfg(test)]
mod tests {
    use std::{convert::Infallible, task};

    use bytes::Bytes;
    use http_body::{Frame, SizeHint};
    use tower::{ServiceBuilder, ServiceExt, service_fn};

    use super::{
        super::{CacheLayer, Config, State, gate::MOST_UNREAD},
        *,
    };
    use crate::{message::Body, telemetry::Metrics};

    /// A body of a known length that does not come.
    struct Silent {
        _running: Arc<()>,
    }

    impl http_body::Body for Silent {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            self: Pin<&mut Self>,
            _: &mut task::Context<'_>,
        ) -> task::Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            task::Poll::Pending
        }

        fn size_hint(&self) -> SizeHint {
            SizeHint::with_exact(1000)
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_clients_have_already_is_read_for_few_of_them_and_not_for_long() {
        let (state, running) = (State::default(), Arc::new(()));
        let silent = running.clone();
        let service = ServiceBuilder::new()
            .layer(CacheLayer::new(&Config::default(), "pages", "api", &state, None, &Metrics::new()))
            .service(service_fn(move |_: Request| {
                let body = Body::new(Silent { _running: silent.clone() });
                let response = http::Response::builder().header("cache-control", "max-age=60").body(body);
                std::future::ready(Ok::<_, BoxError>(response.unwrap()))
            }));
        for n in 0..3 * MOST_UNREAD {
            let request = http::Request::get(format!("/{n}")).header("if-none-match", "*").body(Body::empty());
            let response = service.clone().oneshot(request.unwrap()).await.unwrap();
            assert_eq!(response.status(), http::StatusCode::NOT_MODIFIED);
        }
        let running = || Arc::strong_count(&running) - 2;
        assert_eq!(running(), MOST_UNREAD);
        tokio::time::sleep(2 * UNREAD).await;
        assert_eq!(running(), 0);
    }
}
