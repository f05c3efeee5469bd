//! Routing: row 6 of the request path. Finds the route of a request and hands it over.
//!
//! Of the routes that match, the most specific is taken: an exact host before a `*.` suffix (the longer one
//! first) before none; then the path, as [`Pattern::specificity`] orders it; then a given method before
//! none; then more header conditions; then the order of the file.
//!
//! A path can be written in many ways, and which of them a backend takes for the same is its own affair:
//! `/%61dmin` is `/admin` to most. Sidegate forwards the bytes that came. So that no spelling dodges the
//! policy of a route, a path that is not plain is matched in all its readings, and where they select
//! different routes the request is refused; where all lead to the same route, as with a single one for
//! everything, every byte passes.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fmt,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::Either;
use http::{HeaderMap, HeaderValue, Method, header::HOST};
use schemars::JsonSchema;
use serde::Deserialize;
use tower::Service;

use crate::{
    config::{
        OneOrMany,
        fields::{FieldName, FieldValue, MethodName},
        problem::{Check, Problems},
    },
    message::{
        BoxError, Error, HttpService, Kind, Request, Response,
        path::{Form, Pattern, is_plain, readings},
    },
    telemetry::{Exchange, metrics::RouteMetrics},
};

/// Which requests a route takes. Section `match` of a route; what is left out matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// The host without its port, in any case: `api.example.com`, or `*.example.com` for all below it.
    pub host: Option<String>,
    /// The path: `/v1/models` itself, `/files/*` and all below it, or with `{parameters}` for segments.
    pub path: Option<Pattern>,
    /// The method, or a list of methods. A route for `GET` is not one for `HEAD`.
    pub method: Option<OneOrMany<MethodName>>,
    /// Header fields that must be there with this very value.
    pub headers: BTreeMap<FieldName, FieldValue>,
}

impl Check for Match {
    fn check(&self, problems: &mut Problems) {
        if let Some(host) = &self.host {
            let name = host.strip_prefix("*.").unwrap_or(host);
            let legal = |c: char| c.is_ascii_alphanumeric() || "-._[]:".contains(c);
            let port = !name.starts_with('[') && name.contains(':');
            if name.is_empty() || !name.chars().all(legal) || port {
                let message = format!("`{host}` is no host: `api.example.com`, or `*.example.com`, without a port");
                problems.add("host", message);
            }
        }
        if self.method.as_ref().is_some_and(|methods| methods.iter().next().is_none()) {
            problems.add("method", "is an empty list, which nothing matches: leave it out to match every method");
        }
    }
}

/// The match in words, `POST api.example.com/v1/*`: what a route without a name is called.
impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(methods) = &self.method {
            let methods: Vec<_> = methods.iter().map(MethodName::as_str).collect();
            write!(f, "{} ", methods.join("|"))?;
        }
        f.write_str(self.host.as_deref().unwrap_or_default())?;
        match &self.path {
            Some(path) => write!(f, "{path}")?,
            None => f.write_str("/*")?,
        }
        for (name, value) in &self.headers {
            write!(f, " {}={}", name.get(), String::from_utf8_lossy(value.get().as_bytes()))?;
        }
        Ok(())
    }
}

impl Match {
    /// Where the match stands among others: the lower, the more specific.
    fn rank(&self) -> impl Ord + use<> {
        let host = self.host.as_deref().map(|host| (!host.starts_with("*."), host.len()));
        let path = self.path.as_ref().map(Pattern::specificity);
        Reverse((host, path, self.method.is_some(), self.headers.len()))
    }

    /// Whether the two match the same requests.
    #[must_use]
    pub fn same(&self, other: &Self) -> bool {
        let host = |of: &Self| of.host.as_ref().map(|host| host.to_ascii_lowercase());
        let method = |of: &Self| {
            let mut all: Vec<_> = of.method.iter().flat_map(OneOrMany::iter).map(|t| t.as_str().to_owned()).collect();
            all.sort();
            all
        };
        host(self) == host(other)
            && self.path == other.path
            && method(self) == method(other)
            && self.headers == other.headers
    }

    fn accepts_all_but_path(&self, method: &Method, host: &[u8], headers: &HeaderMap) -> bool {
        let method_fits =
            self.method.as_ref().is_none_or(|all| all.iter().any(|token| token.as_str() == method.as_str()));
        method_fits
            && self.host.as_ref().is_none_or(|pattern| host_matches(pattern.as_bytes(), host))
            && self.headers.iter().all(|(name, value)| headers.get_all(name.get()).iter().any(|own| own == value.get()))
    }
}

fn host_matches(pattern: &[u8], host: &[u8]) -> bool {
    match pattern.strip_prefix(b"*") {
        // The dot stays in the suffix: `*.example.com` is not `badexample.com`.
        Some(suffix) => {
            let below = host.len().checked_sub(suffix.len()).filter(|below| *below > 0);
            below.and_then(|below| host.get(below..)).is_some_and(|end| end.eq_ignore_ascii_case(suffix))
        }
        None => host.eq_ignore_ascii_case(pattern),
    }
}

/// The host of a `Host` field without its port and trailing dot.
fn host(headers: &HeaderMap) -> &[u8] {
    let value = headers.get(HOST).map_or(b"".as_slice(), HeaderValue::as_bytes);
    let end = match value.iter().rposition(|c| *c == b':') {
        // A colon within brackets belongs to an IPv6 address.
        Some(colon) if !value.get(colon..).is_some_and(|rest| rest.contains(&b']')) => colon,
        _ => value.len(),
    };
    let name = value.get(..end).unwrap_or(value);
    name.strip_suffix(b".").unwrap_or(name)
}

/// All routes of a configuration, most specific first.
#[derive(Debug)]
pub struct Table<T> {
    routes: Vec<(Match, T)>,
}

impl<T> Table<T> {
    /// Sorts the routes, given in the order of the file.
    #[must_use]
    pub fn new(mut routes: Vec<(Match, T)>) -> Self {
        routes.sort_by_cached_key(|(matches, _)| matches.rank());
        Self { routes }
    }

    /// The route of a request, and its match.
    ///
    /// # Errors
    /// [`Kind::NoRoute`]; [`Kind::BadRequest`] where the path can be read as that of two routes.
    pub fn select<B>(&self, request: &http::Request<B>) -> Result<&(Match, T), Kind> {
        let path = request.uri().path().as_bytes();
        let (method, headers) = (request.method(), request.headers());
        let host = host(headers);
        let first = |path: &[u8], form| {
            let fits = |matches: &Match| {
                matches.path.as_ref().is_none_or(|pattern| pattern.matches(path, form))
                    && matches.accepts_all_but_path(method, host, headers)
            };
            self.routes.iter().position(|(matches, _)| fits(matches))
        };
        let found = first(path, Form::Raw);
        if !is_plain(path) && readings(path).any(|(form, reading)| first(&reading, form) != found) {
            return Err(Kind::BadRequest("the path can be read as that of two routes"));
        }
        found.and_then(|at| self.routes.get(at)).ok_or(Kind::NoRoute)
    }
}

/// What stands behind a match.
#[derive(Clone)]
pub struct Target {
    /// The samples of the route, with its name.
    pub metrics: Arc<RouteMetrics>,
    /// Its chain of layers.
    pub service: HttpService,
}

/// Hands each request to its route.
#[derive(Clone)]
pub struct Routes {
    table: Arc<Table<Target>>,
}

impl fmt::Debug for Routes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.table.routes.iter().map(|(_, target)| target.metrics.name());
        f.debug_list().entries(names).finish()
    }
}

impl Routes {
    /// A service over `table`.
    #[must_use]
    pub fn new(table: Table<Target>) -> Self {
        Self { table: Arc::new(table) }
    }
}

impl Service<Request> for Routes {
    type Response = Response;
    type Error = BoxError;
    type Future = Either<<HttpService as Service<Request>>::Future, std::future::Ready<Result<Response, BoxError>>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: Request) -> Self::Future {
        let (matches, target) = match self.table.select(&request) {
            Ok(found) => found,
            Err(kind) => return Either::Right(std::future::ready(Err(Error::from(kind).into()))),
        };
        if let Some(exchange) = Exchange::of(&request) {
            exchange.facts().enter(target.metrics.clone());
        }
        if let Some(parameters) =
            matches.path.as_ref().and_then(|path| path.parameters(request.uri().path().as_bytes()))
        {
            request.extensions_mut().insert(parameters);
        }
        // Every service of ours is always ready: what it has to say, it says in `call`.
        Either::Left(target.service.clone().call(request))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn table(routes: &[&str]) -> Table<usize> {
        use figment::{
            Figment,
            providers::{Format, Yaml},
        };
        let read = |yaml: &str| Figment::from(Yaml::string(yaml)).extract::<Match>().unwrap();
        Table::new(routes.iter().enumerate().map(|(index, yaml)| (read(yaml), index)).collect())
    }

    fn request(line: &str, fields: &[(&'static str, &'static str)]) -> http::Request<()> {
        let (method, target) = line.split_once(' ').unwrap();
        let mut request = http::Request::builder().method(method).uri(target);
        for &(name, value) in fields {
            request = request.header(name, value);
        }
        request.body(()).unwrap()
    }

    fn selected(table: &Table<usize>, line: &str, fields: &[(&'static str, &'static str)]) -> Result<usize, Kind> {
        table.select(&request(line, fields)).map(|(_, index)| *index)
    }

    #[test]
    fn the_most_specific_route_is_taken_whatever_the_order() {
        let table = table(&[
            "{}",
            "{path: '/v1/*'}",
            "{path: '/v1/{what}'}",
            "{path: /v1/models}",
            "{path: /v1/models, method: [POST, PUT]}",
            "{path: /v1/models, headers: {x-tier: gold}}",
            "{host: '*.example.com'}",
            "{host: 'a.example.com'}",
        ]);
        let of = |line, fields| selected(&table, line, fields);
        assert_eq!(of("GET /", &[]), Ok(0));
        assert_eq!(of("GET /v1/a/b", &[]), Ok(1));
        assert_eq!(of("GET /v1", &[]), Ok(1));
        assert_eq!(of("GET /v1/x", &[]), Ok(2));
        assert_eq!(of("GET /v1/models", &[]), Ok(3));
        assert_eq!(of("PUT /v1/models", &[]), Ok(4));
        assert_eq!(of("POST /v1/models", &[("x-tier", "gold")]), Ok(4), "a method counts before headers");
        assert_eq!(of("GET /v1/models", &[("x-tier", "gold")]), Ok(5));
        assert_eq!(of("GET /v1/models", &[("host", "B.Example.com:8080")]), Ok(6), "a host counts before a path");
        assert_eq!(of("GET /v1/models", &[("host", "a.example.com.")]), Ok(7));
        assert_eq!(of("GET /", &[("host", "example.com")]), Ok(0), "a suffix is not its own parent");
        assert_eq!(of("GET /", &[("host", "badexample.com")]), Ok(0));
    }

    #[test]
    fn equals_are_taken_in_the_order_of_the_file() {
        assert_eq!(
            selected(&table(&["{headers: {a: x}}", "{headers: {b: x}}"]), "GET /", &[("a", "x"), ("b", "x")]),
            Ok(0)
        );
    }

    #[test]
    fn without_a_route_there_is_an_error() {
        assert_eq!(selected(&table(&["{path: /a}"]), "GET /b", &[]), Err(Kind::NoRoute));
    }

    #[test]
    fn a_spelling_cannot_dodge_a_route() {
        let two = table(&["{}", "{path: '/admin/*'}"]);
        let spellings =
            ["/%61dmin/x", "//admin/x", "/./admin/x", "/a/../admin/x", "/admin;v=1/x", "/admin%2fx", "/a\\..\\admin"];
        for path in spellings {
            let refused = selected(&two, &format!("GET {path}"), &[]);
            assert!(matches!(refused, Err(Kind::BadRequest(_))), "{path}: {refused:?}");
        }
        let one = table(&["{}"]);
        for path in spellings {
            assert_eq!(selected(&one, &format!("GET {path}"), &[]), Ok(0), "{path} reads as one route in any way");
        }
    }

    #[test]
    fn an_address_in_brackets_is_a_host() {
        let table = table(&["{}", "{host: '[::1]'}"]);
        assert_eq!(selected(&table, "GET /", &[("host", "[::1]:8080")]), Ok(1));
        assert_eq!(selected(&table, "GET /", &[("host", "[::1]")]), Ok(1));
    }

    proptest! {
        #[test]
        fn what_is_selected_is_the_first_that_matches(path in "/[a-c/]{0,8}", method in "GET|POST") {
            let table = table(&["{}", "{path: '/a/*'}", "{path: '/{x}/b'}", "{method: POST}", "{path: /a/b}"]);
            if let Ok(index) = selected(&table, &format!("{method} {path}"), &[]) {
                let request = request(&format!("{method} {path}"), &[]);
                let fits = |m: &Match| m.accepts_all_but_path(request.method(), b"", request.headers())
                    && m.path.as_ref().is_none_or(|p| p.matches(path.as_bytes(), Form::Raw));
                let first = table.routes.iter().find(|(m, _)| fits(m)).map(|(_, index)| *index);
                prop_assert_eq!(first, Some(index));
            }
        }

        #[test]
        fn any_path_is_routed_or_refused(path in "/[ -~&&[^#?]]{0,40}") {
            let table = table(&["{path: '/a/*'}", "{path: '/{x}/b'}"]);
            if let Ok(uri) = path.parse::<http::Uri>() {
                let _outcome = table.select(&http::Request::builder().uri(uri).body(()).unwrap());
            }
        }
    }
}
