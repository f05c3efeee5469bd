//! Upstream kind `admin`: a page of the operator's port, where a route leads to it.
//!
//! An upstream is one page, and the path of its routes is what the public knows it by: nothing is published that the file
//! does not name, and each has the policies of its own route. What belongs to the operator alone (the configuration,
//! sessions, the reload) cannot be published. What changes something needs `auth` on its routes, or `open: true`.

use std::{
    fmt,
    future::Future,
    pin::Pin,
    str::FromStr,
    sync::Arc,
    task::{Context, Poll},
};

use http::{Method, StatusCode, Uri, header};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::Service;

use super::{Admin, Page, allow, problem};
use crate::{
    config::{
        load::nearest,
        problem::{Check, Problems},
        text,
    },
    message::{BoxError, Request, Response, path::Parameters},
    telemetry::Exchange,
};

/// A page of the operator's port. Section `admin` of an upstream.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Published")]
pub struct Config {
    /// Which one: `/health`, `/health/redis`, `/health/cache`, `/health/upstreams`, `/livez`, `/readyz`, `/metrics`,
    /// `/circuit-breakers`, `/upstreams`, `/cache`, `/rate-limits` and what is below, with or without its method. A query
    /// after it holds instead of the client's, as it stands: `POST /cache/purge?all`. A name in braces is the parameter of the route's
    /// path that is called so: `POST /circuit-breakers/{upstream}/reset`.
    pub page: PageName,
    /// Whether anybody may ask for a page that changes something: then its routes need no `auth`. Not from a browser's
    /// page. Default `false`.
    #[serde(default)]
    pub open: bool,
}

/// A page, as the file names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PageName {
    page: Page,
    name: Name,
    /// A target with the query that holds.
    query: Option<Uri>,
}

/// What stands in the page's path where it has a name in braces.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Name {
    /// This. Nothing, where it has none.
    Given(Box<str>),
    /// The route's parameter of this name.
    Parameter(&'static str),
}

/// The name is that of no page that could be published.
#[derive(Debug, PartialEq, Eq)]
pub struct NoPage(String);

impl PageName {
    /// Whether it changes something.
    #[must_use]
    pub fn changes(&self) -> bool {
        self.page.method() != Method::GET
    }

    /// The parameter of the route's path that it needs.
    #[must_use]
    pub fn parameter(&self) -> Option<&str> {
        match self.name {
            Name::Parameter(name) => Some(name),
            Name::Given(_) => None,
        }
    }

    /// The upstream whose circuit breakers it is about, if it names one.
    #[must_use]
    pub fn of_breakers(&self) -> Option<&str> {
        let is = matches!(self.page, Page::ResetBreaker | Page::OpenBreaker);
        self.given().filter(|_| is)
    }

    /// The upstream whose endpoints it is about, if it names one.
    #[must_use]
    pub fn of_endpoints(&self) -> Option<&str> {
        let is = matches!(self.page, Page::Drain | Page::Undrain);
        self.given().filter(|_| is)
    }

    fn given(&self) -> Option<&str> {
        match &self.name {
            Name::Given(name) => Some(name),
            Name::Parameter(_) => None,
        }
    }

    /// The methods that it is asked for by. What changes something is asked for by either of the two, whichever is the
    /// page's own: a path of the public has no other meaning.
    #[must_use]
    pub fn methods(&self) -> [&'static str; 2] {
        if self.changes() { ["POST", "DELETE"] } else { ["GET", "HEAD"] }
    }
}

impl FromStr for PageName {
    type Err = NoPage;

    fn from_str(text: &str) -> Result<Self, NoPage> {
        let (method, target) = match text.split_once(' ') {
            Some((method, target)) => (Some(method), target),
            None => (None, text),
        };
        let (path, query) = target.split_once('?').map_or((target, None), |(path, query)| (path, Some(query)));
        let all: Vec<_> = Page::of(path).collect();
        let Some(&(first, _)) = all.first() else {
            let known = Page::ALL.into_iter().filter(|page| page.is_public()).map(Page::path);
            let known: Vec<_> = known.collect();
            let near = nearest(path, known.iter().copied());
            let near = near.map_or_else(
                || format!("there are `{}`", known.join("`, `")),
                |near| format!("did you mean `{near}`?"),
            );
            return Err(NoPage(format!("`{path}` is no page of the operator's port: {near}")));
        };
        if !first.is_public() {
            return Err(NoPage(format!("`{path}` is the operator's alone, and cannot be published")));
        }
        let Some(&(page, name)) = all.iter().find(|(page, _)| method.is_none_or(|method| page.method() == method))
        else {
            let methods: Vec<_> = all.iter().map(|(page, _)| page.method().to_string()).collect();
            return Err(NoPage(format!("`{path}` is asked for by {}", methods.join(" or "))));
        };
        if query.is_some_and(|query| query.contains('{')) {
            return Err(NoPage(format!("`{text}` has a name in braces in its query, which is taken as it stands")));
        }
        let query = query.map(|query| format!("/?{query}").parse());
        let query = query.transpose().map_err(|_| NoPage(format!("`{text}` has a query that is none")))?;
        let name = match page.parameter() {
            Some(parameter) if name.starts_with('{') => {
                if name.strip_prefix('{').and_then(|name| name.strip_suffix('}')) != Some(parameter) {
                    return Err(NoPage(format!("`{path}` has a `{name}` where the page has `{{{parameter}}}`")));
                }
                Name::Parameter(parameter)
            }
            _ => Name::Given(name.into()),
        };
        Ok(Self { page, name, query })
    }
}

/// As it is written, with its method.
impl fmt::Display for PageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.page.method())?;
        match (&self.name, self.page.path().split_once('{')) {
            (Name::Given(name), Some((before, rest))) => {
                write!(f, "{before}{name}{}", rest.split_once('}').map_or("", |(_, after)| after))?;
            }
            _ => f.write_str(self.page.path())?,
        }
        self.query.as_ref().and_then(Uri::query).map_or(Ok(()), |query| write!(f, "?{query}"))
    }
}

impl fmt::Display for NoPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NoPage {}

text!(PageName, "PageName", { "pattern": "^([A-Z]+ )?/.*$" });

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        if self.open && !self.page.changes() {
            problems.add("open", format!("has no effect: `{}` changes nothing", self.page));
        }
    }
}

/// Answers every request with one page.
#[derive(Debug, Clone)]
pub struct Published {
    admin: Admin,
    of: Arc<Of>,
}

#[derive(Debug)]
struct Of {
    upstream: Arc<str>,
    config: Config,
}

impl Admin {
    /// The page of `config`; logged as the upstream of this name.
    #[must_use]
    pub fn publish(&self, upstream: &str, config: &Config) -> Published {
        Published { admin: self.clone(), of: Arc::new(Of { upstream: upstream.into(), config: config.clone() }) }
    }
}

impl Published {
    async fn answer(self, request: Request) -> Response {
        let Config { page: PageName { page, name, query }, open } = &self.of.config;
        let methods = self.of.config.page.methods();
        if !methods.contains(&request.method().as_str()) {
            let mut response = problem(StatusCode::METHOD_NOT_ALLOWED, "see `Allow`");
            response.headers_mut().insert(header::ALLOW, allow(&methods));
            return response;
        }
        // Without a credential, which a page would have to know, any page that somebody looks at could ask for it.
        if *open && self.of.config.page.changes() && request.headers().contains_key(header::ORIGIN) {
            return problem(StatusCode::FORBIDDEN, "not from a browser: the request has an `Origin`");
        }
        let name = match name {
            Name::Given(name) => name,
            Name::Parameter(of) => {
                let known = request.extensions().get::<Parameters>().and_then(|known| known.get(of));
                known.unwrap_or_default()
            }
        };
        self.admin.page(*page, name, query.as_ref().unwrap_or(request.uri())).await
    }
}

impl Service<Request> for Published {
    type Response = Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> Self::Future {
        if let Some(exchange) = Exchange::of(&request) {
            exchange.facts().upstream = Some(self.of.upstream.clone());
        }
        let published = self.clone();
        Box::pin(async move { Ok(published.answer(request).await) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_called_by_its_path_with_its_method_or_without() {
        let parse = |text: &str| text.parse::<PageName>().map(|page| page.to_string());
        for (given, expected) in [
            ("/health", "GET /health"),
            ("GET /metrics", "GET /metrics"),
            ("/cache/purge?all", "POST /cache/purge?all"),
            ("/circuit-breakers/{upstream}/reset", "POST /circuit-breakers/{upstream}/reset"),
            ("POST /circuit-breakers/api/open", "POST /circuit-breakers/api/open"),
            ("/rate-limits/a", "GET /rate-limits/a"),
            ("DELETE /rate-limits/{rule}", "DELETE /rate-limits/{rule}"),
        ] {
            assert_eq!(parse(given).as_deref(), Ok(expected));
            assert_eq!(parse(expected).as_deref(), Ok(expected));
        }
        for wrong in ["", "health", "/", "/nothing", "POST /health", "get /health", "/circuit-breakers/{rule}/reset"] {
            assert!(parse(wrong).is_err(), "{wrong}");
        }
        assert!(parse("/cache/purge?tag=bot:{id}").is_err(), "nothing would be purged");
    }

    #[test]
    fn what_is_the_operators_alone_is_no_page_for_others() {
        for page in Page::ALL {
            let name = format!("{} {}", page.method(), page.path());
            let alone = ["/config", "/reload", "/sessions", "/sessions/{id}"].contains(&page.path());
            assert_eq!(name.parse::<PageName>().is_err(), alone, "{name}");
        }
    }
}
