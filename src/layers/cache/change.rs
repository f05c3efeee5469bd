//! Requests that change something, and what is dropped when they succeed (RFC 9111 §4.4).

use http::{
    Uri,
    header::{CONTENT_LOCATION, LOCATION},
    uri::Scheme,
};
use tower::Service;

use super::{
    gate::{Gate, render},
    key,
    purge::Target,
    question::origin,
    status::{CacheStatus, Forward},
};
use crate::message::{BoxError, Request, Response};

impl Gate {
    /// Lets a request go on that changes something, and drops what it changed (§4.4).
    pub(super) async fn change<S>(&self, inner: S, request: Request) -> Result<Response, BoxError>
    where
        S: Service<Request, Response = Response, Error: Into<BoxError>>,
    {
        let (head, body) = request.into_parts();
        // A tag that is too long is that of no answer.
        let tags = self.config.invalidate.iter().filter_map(|tag| render(std::slice::from_ref(tag), &head).ok());
        let tags: Vec<_> = tags.flatten().collect();
        let host = origin(&head);
        let paths = [target(&head.uri), self.reduced(&head.uri)];
        let request = Request::from_parts(head, body);
        let response = self.pass(inner, request, CacheStatus::forwarded(Forward::Method)).await?;
        if response.status().is_success() || response.status().is_redirection() {
            let purge = |what: Target| self.purger.purge(&what, false);
            let named = [LOCATION, CONTENT_LOCATION].into_iter().filter_map(|name| {
                let uri: Uri = response.headers().get(name)?.to_str().ok()?.parse().ok()?;
                // Only of the same origin, or anybody could drop anything.
                let https = uri.scheme() == Some(&Scheme::HTTPS);
                let same = uri.authority().is_none_or(|found| key::authority(found.as_str(), https) == host);
                (same && uri.path().starts_with('/')).then(|| [target(&uri), self.reduced(&uri)])
            });
            let own = self.names(&host);
            for path in [paths].into_iter().chain(named).flatten() {
                purge(Target::Url(format!("{own}{path}").into()));
            }
            for tag in tags {
                purge(Target::Tag(tag));
            }
        }
        Ok(response)
    }
}

/// Path and query.
fn target(uri: &Uri) -> String {
    uri.path_and_query().map_or_else(|| "/".to_owned(), ToString::to_string)
}
