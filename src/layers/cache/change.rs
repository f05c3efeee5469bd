//! Requests that change something, and what is dropped when they succeed (RFC 9111 §4.4).

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{
    Uri,
    header::{CONTENT_LOCATION, LOCATION},
    request::Parts,
    uri::Scheme,
};
use pin_project_lite::pin_project;
use tower::{Layer, Service};

use super::{
    config::Config,
    hub::Purger,
    key::{self, QueryName},
    purge::{Target, path},
    question::origin,
    state::State,
};
use crate::message::asks_for_tunnel;

/// What is dropped from the caches that have answers for the same URLs.
pub(super) struct Changes {
    purger: Arc<Purger>,
    /// The parameters that make no difference there, where there are some.
    ignored: Vec<Vec<QueryName>>,
}

/// What a request may change.
pub(super) struct Changed {
    host: String,
    uri: Uri,
}

impl Changed {
    pub(super) fn of(head: &Parts) -> Self {
        Self { host: origin(head), uri: head.uri.clone() }
    }
}

impl Changes {
    /// For these caches.
    pub(super) fn new<'a>(state: &State, caches: impl IntoIterator<Item = &'a Config>) -> Self {
        let mut ignored: Vec<Vec<QueryName>> = Vec::new();
        for Config { ignore_query, .. } in caches {
            if !ignore_query.is_empty() && !ignored.contains(ignore_query) {
                ignored.push(ignore_query.clone());
            }
        }
        Self { purger: state.purger.clone(), ignored }
    }

    /// Drops what the request has changed, if the response says that it has. Whether it does.
    pub(super) fn apply<B>(&self, changed: &Changed, response: &http::Response<B>) -> bool {
        if !(response.status().is_success() || response.status().is_redirection()) {
            return false;
        }
        let Changed { host, uri } = changed;
        self.purge_url(host, uri);
        for name in [LOCATION, CONTENT_LOCATION] {
            let value = response.headers().get(name).and_then(|value| value.to_str().ok());
            let Some(uri) = value.and_then(|value| value.parse::<Uri>().ok()) else { continue };
            // Only of the same origin, or anybody could drop anything.
            let https = uri.scheme() == Some(&Scheme::HTTPS);
            let same = uri.authority().is_none_or(|found| key::authority(found.as_str(), https) == **host);
            if same && uri.path().starts_with('/') {
                self.purge_url(host, &uri);
            }
        }
        true
    }

    /// Drops what `target` names.
    pub(super) fn purge(&self, target: &Target) {
        self.purger.purge(target, false);
    }

    fn purge_url(&self, host: &str, uri: &Uri) {
        let mut paths = vec![path(uri, &[])];
        for ignored in &self.ignored {
            let reduced = path(uri, ignored);
            if !paths.contains(&reduced) {
                paths.push(reduced);
            }
        }
        for path in paths {
            self.purge(&Target::Url(format!("{host}{path}").into()));
        }
    }
}

/// Around a route that keeps no answers itself: what a request of an unsafe method changes there is dropped where other
/// routes keep it.
#[derive(Clone)]
pub struct ChangesLayer {
    changes: Arc<Changes>,
}

impl ChangesLayer {
    /// For the caches of these routes, in `state`.
    #[must_use]
    pub fn new<'a>(state: &State, caches: impl IntoIterator<Item = &'a Config>) -> Self {
        Self { changes: Arc::new(Changes::new(state, caches)) }
    }
}

impl fmt::Debug for ChangesLayer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ChangesLayer").finish_non_exhaustive()
    }
}

impl<S> Layer<S> for ChangesLayer {
    type Service = Watched<S>;

    fn layer(&self, inner: S) -> Watched<S> {
        Watched { inner, layer: self.clone() }
    }
}

/// The service of [`ChangesLayer`].
#[derive(Debug, Clone)]
pub struct Watched<S> {
    inner: S,
    layer: ChangesLayer,
}

impl<S, B, R> Service<http::Request<B>> for Watched<S>
where
    S: Service<http::Request<B>, Response = http::Response<R>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ChangesFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: http::Request<B>) -> Self::Future {
        let mut changed = None;
        if !request.method().is_safe() && !asks_for_tunnel(&request) {
            let (head, body) = request.into_parts();
            changed = Some((Changed::of(&head), self.layer.changes.clone()));
            request = http::Request::from_parts(head, body);
        }
        ChangesFuture { inner: self.inner.call(request), changed }
    }
}

pin_project! {
    /// The response to come of [`Watched`].
    pub struct ChangesFuture<F> {
        #[pin]
        inner: F,
        changed: Option<(Changed, Arc<Changes>)>,
    }
}

impl<F, R, E> Future for ChangesFuture<F>
where
    F: Future<Output = Result<http::Response<R>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let answer = ready!(this.inner.poll(cx));
        if let (Ok(response), Some((changed, changes))) = (&answer, this.changed) {
            changes.apply(changed, response);
        }
        Poll::Ready(answer)
    }
}
