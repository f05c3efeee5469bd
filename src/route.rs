//! Routing: row 6 of the request path. Finds the route of a request and hands it over.
//!
//! Of the routes that match, the most specific is taken: an exact host before a `*.` suffix (the longer one
//! first) before none; then the path, as [`Pattern::specificity`] orders it; then a given method before
//! none; then more header conditions; then the order of the file.
//!
//! A route for `GET` takes `HEAD` too, which is a `GET` without the content (RFC 9110 §9.3.2): what holds for the one
//! must hold for the other. Where two routes are as specific, the one that names `HEAD` takes it.
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
    net::Ipv6Addr,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::future::Either;
use http::{HeaderMap, Method, header::HOST};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::Service;

use crate::{
    config::{
        OneOrMany,
        fields::{FieldName, FieldValue, MethodName},
        problem::{Check, Problems},
    },
    layers::cors,
    message::{
        BoxError, Error, HttpService, Kind, Request, Response,
        path::{Form, Pattern, is_plain, readings},
    },
    telemetry::{Exchange, metrics::RouteMetrics},
};

/// Which requests a route takes. Section `match` of a route; what is left out matches everything.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Match {
    /// The host without its port, in any case: `api.example.com`, or `*.example.com` for all below it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub host: Option<String>,
    /// The path: `/v1/models` itself, `/files/*` and all below it, or with `{parameters}` for segments.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<Pattern>,
    /// The method, or a list of methods. `GET` takes `HEAD` too, unless a route that is as specific names it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub method: Option<OneOrMany<MethodName>>,
    /// Header fields that must be there with this very value.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub headers: BTreeMap<FieldName, FieldValue>,
}

impl Check for Match {
    fn check(&self, problems: &mut Problems) {
        if let Some(host) = &self.host {
            let name = host.strip_prefix("*.").unwrap_or(host);
            let is_label = |label: &str| {
                !label.is_empty() && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_~".contains(&byte))
            };
            let address = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
            if !(name.split('.').all(is_label) || address.is_some_and(|ip| ip.parse::<Ipv6Addr>().is_ok())) {
                let message = format!(
                    "`{host}` is no host: `api.example.com`, `*.example.com` or `[::1]`, without a port; other \
                     scripts in punycode"
                );
                problems.add("host", message);
            }
        }
        if self.method.as_ref().is_some_and(|methods| methods.iter().next().is_none()) {
            problems.add("method", "is an empty list, which nothing matches: leave it out to match every method");
        }
        if self.headers.keys().any(|name| *name.get() == HOST) {
            problems.add("headers", "holds `host`, which has a key of its own: `host`");
        }
    }
}

/// The match in words, `POST api.example.com/v1/*`: what a route without a name is called. It stands in logs
/// and metrics, so values of headers, which may be secret, are not in it.
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
        for (n, name) in self.headers.keys().enumerate() {
            write!(f, "{}{}", if n > 0 { ", " } else { " with " }, name.get())?;
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

    /// Whether there is a URL that both have, whatever its method.
    #[must_use]
    pub fn meets(&self, other: &Self) -> bool {
        let hosts = match (&self.host, &other.host) {
            (Some(one), Some(two)) => {
                let [one, two] = [one, two].map(|host| host.to_ascii_lowercase());
                let covers = |wide: &str, host: &str| match wide.strip_prefix('*') {
                    Some(suffix) => host.ends_with(suffix),
                    None => wide == host,
                };
                covers(&one, &two) || covers(&two, &one)
            }
            _ => true,
        };
        let paths = self.path.as_ref().zip(other.path.as_ref());
        hosts && paths.is_none_or(|(one, two)| one.meets(two))
    }

    /// Whether it takes methods that change something (RFC 9110 §9.2.1).
    #[must_use]
    pub fn takes_unsafe(&self) -> bool {
        self.method.as_ref().is_none_or(|methods| methods.iter().any(|method| !method.get().is_safe()))
    }

    fn names(&self, method: &Method) -> bool {
        self.method.iter().flatten().any(|token| token.as_str() == method.as_str())
    }

    fn accepts_all_but_path(&self, method: &Method, host: &[u8], headers: &HeaderMap) -> bool {
        let names = |method: &Method| self.names(method);
        (self.method.is_none() || names(method) || *method == Method::HEAD && names(&Method::GET))
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

/// The host that a request asks for, without its port and trailing dot: `Host`, which `layers::hygiene` makes
/// true, or that of the target. Empty where there is neither.
fn host<B>(request: &http::Request<B>) -> &[u8] {
    let value = match request.headers().get(HOST) {
        Some(host) => host.as_bytes(),
        None => request.uri().authority().map_or(b"".as_slice(), |authority| authority.as_str().as_bytes()),
    };
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
    /// The order for `HEAD`, as indices: of two routes as specific, one that names it comes first.
    for_head: Vec<usize>,
    /// Whether any route asks for a host.
    hosts: bool,
    /// Whether any route asks for a path.
    paths: bool,
}

impl<T> Table<T> {
    /// Sorts the routes, given in the order of the file.
    #[must_use]
    pub fn new(mut routes: Vec<(Match, T)>) -> Self {
        routes.sort_by_cached_key(|(matches, _)| matches.rank());
        let mut for_head: Vec<_> = (0..routes.len()).collect();
        for_head.sort_by_cached_key(|at| {
            let (matches, _) = &routes[*at];
            (matches.rank(), !matches.names(&Method::HEAD))
        });
        let hosts = routes.iter().any(|(matches, _)| matches.host.is_some());
        let paths = routes.iter().any(|(matches, _)| matches.path.is_some());
        Self { routes, for_head, hosts, paths }
    }

    /// The route of a request, and its match.
    ///
    /// # Errors
    /// [`Kind::NoRoute`]; [`Kind::BadRequest`] where the path can be read as that of two routes.
    pub fn select<B>(&self, request: &http::Request<B>) -> Result<&(Match, T), Kind> {
        self.select_for(request.method(), request)
    }

    /// The route that `request` would have with another `method`, and its match.
    ///
    /// # Errors
    /// As [`select`](Self::select).
    pub fn select_for<B>(&self, method: &Method, request: &http::Request<B>) -> Result<&(Match, T), Kind> {
        let path = request.uri().path().as_bytes();
        let headers = request.headers();
        let host = if self.hosts { host(request) } else { b"" };
        let first = |path: &[u8], form| {
            let fits = |matches: &Match| {
                matches.path.as_ref().is_none_or(|pattern| pattern.matches(path, form))
                    && matches.accepts_all_but_path(method, host, headers)
            };
            if *method == Method::HEAD {
                let fits = |at: &usize| self.routes.get(*at).is_some_and(|(matches, _)| fits(matches));
                return self.for_head.iter().copied().find(fits);
            }
            self.routes.iter().position(|(matches, _)| fits(matches))
        };
        let found = first(path, Form::Raw);
        // The first reading is the path as it is.
        let differs = |(form, reading): (Form, Vec<u8>)| first(&reading, form) != found;
        if self.paths && !is_plain(path) && readings(path).skip(1).any(differs) {
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
    /// Whether that answers preflights.
    pub preflights: bool,
}

/// Hands each request to its route.
#[derive(Clone)]
pub struct Routes {
    table: Arc<Table<Target>>,
    /// Whether any route answers preflights.
    preflights: bool,
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
        let preflights = table.routes.iter().any(|(_, target)| target.preflights);
        Self { table: Arc::new(table), preflights }
    }

    /// The route of a request. A preflight goes where the request would go that it asks for, if that route answers it.
    fn select(&self, request: &Request) -> Result<&(Match, Target), Kind> {
        if self.preflights
            && let Some(method) = cors::preflight_for(request)
            && let Ok(found) = self.table.select_for(&method, request)
            && found.1.preflights
        {
            return Ok(found);
        }
        self.table.select(request)
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
        let (matches, target) = match self.select(&request) {
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
    use http::HeaderValue;
    use proptest::prelude::*;

    use super::*;
    use crate::{
        message::{
            Body,
            path::{Parameters, canonical},
        },
        telemetry::Metrics,
    };

    fn table(routes: &[&str]) -> Table<usize> {
        use figment::{
            Figment,
            providers::{Format, Yaml},
        };
        let read = |yaml: &str| Figment::from(Yaml::string(yaml)).extract::<Match>().unwrap();
        Table::new(routes.iter().enumerate().map(|(index, yaml)| (read(yaml), index)).collect())
    }

    #[test]
    fn two_matches_meet_where_there_is_a_url_for_both() {
        for (one, two, meet) in [
            ("{}", "{host: a.test, path: /a, method: PUT}", true),
            ("{path: /a, method: GET}", "{path: /a, method: PUT, headers: {x-a: b}}", true),
            ("{path: /a}", "{path: /b}", false),
            ("{host: a.test}", "{host: A.test}", true),
            ("{host: a.test}", "{host: b.test}", false),
            ("{host: '*.a.test'}", "{host: b.a.test}", true),
            ("{host: '*.a.test'}", "{host: a.test}", false),
            ("{host: '*.a.test'}", "{host: '*.b.a.test'}", true),
            ("{host: '*.a.test'}", "{host: '*.b.test'}", false),
        ] {
            let routes = table(&[one, two]).routes;
            assert_eq!(routes[0].0.meets(&routes[1].0), meet, "{one} {two}");
            assert_eq!(routes[1].0.meets(&routes[0].0), meet, "{two} {one}");
        }
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
    fn a_route_for_get_takes_head_unless_another_names_it() {
        let get = "{method: GET, path: /a}";
        let of = |routes: &[&str], line| selected(&table(routes), line, &[("x", "1"), ("y", "1")]);
        assert_eq!(of(&["{}", get], "HEAD /a"), Ok(1));
        assert_eq!(of(&[get], "HEAD /a"), Ok(0));
        assert_eq!(of(&["{}", "{path: /a}", "{method: [PUT, GET], path: /a}"], "HEAD /a"), Ok(2));
        assert_eq!(of(&["{}", "{method: POST}"], "HEAD /a"), Ok(0), "only GET has a HEAD");
        assert_eq!(of(&["{method: HEAD}"], "GET /a"), Err(Kind::NoRoute), "not the other way round");

        let named = "{method: [DELETE, HEAD], path: /a}";
        for (routes, expected) in [([get, named], 1), ([named, get], 0)] {
            assert_eq!(of(&routes, "HEAD /a"), Ok(expected));
            assert_eq!(of(&routes, "GET /a"), Ok(1 - expected));
        }
        assert_eq!(of(&[get, "{method: HEAD, path: '/*'}"], "HEAD /a"), Ok(0), "less specific");
        assert_eq!(of(&[get, "{method: HEAD, path: /a, headers: {x: '1'}}"], "HEAD /a"), Ok(1), "more specific");
        let fields = ["{method: GET, headers: {x: '1'}}", "{method: [GET, HEAD], headers: {y: '1'}}"];
        assert_eq!((of(&fields, "HEAD /a"), of(&fields, "GET /a")), (Ok(1), Ok(0)), "for GET the file's order");
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

    #[test]
    fn a_request_takes_the_first_of_all_ranks() {
        // The most specific first; the request matches all of them and takes the first of what is left.
        let all = [
            "{host: a.b.example, path: /x/y, method: GET, headers: {a: '1', b: '2'}}",
            "{host: a.b.example, path: /x/y, method: GET, headers: {a: '1'}}",
            "{host: a.b.example, path: /x/y, method: GET}",
            "{host: a.b.example, path: /x/y, headers: {a: '1'}}",
            "{host: a.b.example, path: /x/y}",
            "{host: a.b.example, path: '/x/{y}', method: GET}",
            "{host: a.b.example, path: '/{x}/y'}",
            "{host: a.b.example, path: '/{x}/{y}'}",
            "{host: a.b.example, path: '/x/y/*'}",
            "{host: a.b.example, path: '/x/*'}",
            "{host: a.b.example, path: '/*'}",
            "{host: a.b.example, method: GET}",
            "{host: a.b.example}",
            "{host: '*.b.example', path: /x/y}",
            "{host: '*.b.example'}",
            "{host: '*.example', path: /x/y}",
            "{path: /x/y, method: GET}",
            "{path: '/x/*'}",
            "{method: [POST, GET], headers: {b: '2'}}",
            "{method: GET}",
            "{headers: {b: '2'}}",
            "{}",
        ];
        let fields = [("host", "a.b.example"), ("a", "0"), ("a", "1"), ("b", "2")];
        for start in 0..all.len() {
            let rest = &all[start..];
            assert_eq!(selected(&table(rest), "GET /x/y", &fields), Ok(0), "{}", rest[0]);
            let backwards: Vec<_> = rest.iter().rev().copied().collect();
            assert_eq!(selected(&table(&backwards), "GET /x/y", &fields), Ok(rest.len() - 1), "{}", rest[0]);
        }
    }

    #[test]
    fn spellings_that_lead_to_the_same_route_pass() {
        let table = table(&["{}", "{path: '/admin/*'}", "{path: /v1/chat}"]);
        for path in ["/admin/%20", "/admin//x", "/admin/./x", "/admin/.hidden", "/admin/a;b/c"] {
            assert_eq!(selected(&table, &format!("GET {path}"), &[]), Ok(1), "{path}");
        }
        for path in ["/x%2Fy", "/a/../b", "//x", "/%2561dmin", "/x?/../admin", "/ADMIN", "/a%20b"] {
            assert_eq!(selected(&table, &format!("GET {path}"), &[]), Ok(0), "{path}");
        }
        for path in ["/admin/..", "/admin/%2e%2e/x", "/v1//chat", "/v1/chat;", "/x/../admin//../x/y"] {
            let outcome = selected(&table, &format!("GET {path}"), &[]);
            assert!(matches!(outcome, Err(Kind::BadRequest(_))), "{path}: {outcome:?}");
        }
    }

    #[test]
    fn hosts_are_compared_without_case_port_or_last_dot() {
        let fits = |pattern: &str, host: &'static str| {
            let table = table(&[&format!("{{host: '{pattern}'}}")]);
            selected(&table, "GET /", &[("host", host)]).is_ok()
        };
        for host in ["api.example", "API.example", "api.example:8080", "api.example.", "api.example.:80"] {
            assert!(fits("Api.Example", host), "{host}");
        }
        for host in ["", "api", "xapi.example", "api.example.com", "b.api.example", "api.example.."] {
            assert!(!fits("api.example", host), "{host}");
        }
        assert!(fits("*.example", "a.Example:80") && fits("*.example", "a.b.example."));
        assert!(!fits("*.example", "example") && !fits("*.example", ".example") && !fits("*.example", "aexample"));
        assert_eq!(
            selected(&table(&["{host: a}"]), "GET https://A:443/x", &[]),
            Ok(0),
            "the target's, without a field"
        );
    }

    #[test]
    fn a_match_is_said_in_words_without_values() {
        let words = |yaml: &str| table(&[yaml]).routes[0].0.to_string();
        assert_eq!(words("{}"), "/*");
        assert_eq!(words("{method: POST, path: /v1/chat}"), "POST /v1/chat");
        assert_eq!(words("{method: [GET, PURGE], host: '*.a.example'}"), "GET|PURGE *.a.example/*");
        assert_eq!(words("{path: '/x/*', headers: {X-B: secret, a: '1'}}"), "/x/* with a, x-b");
    }

    #[test]
    fn what_can_never_match_is_a_problem() {
        let keys = |yaml: &str| {
            let mut problems = Problems::default();
            table(&[yaml]).routes[0].0.check(&mut problems);
            problems.iter().map(|problem| problem.key.clone()).collect::<Vec<_>>()
        };
        for host in
            ["", "a:80", "[::1]:80", "[::x]", "[a]", "https://a", "a.*", "*a", "*", "*.", "a..b", "a.", "ü.example"]
        {
            assert_eq!(keys(&format!("{{host: '{host}'}}")), ["host"], "{host}");
        }
        for host in ["a", "A-1.b_c", "*.example.com", "[::1]", "127.0.0.1"] {
            assert!(keys(&format!("{{host: '{host}'}}")).is_empty(), "{host}");
        }
        assert_eq!(keys("{method: [], headers: {Host: a}}"), ["method", "headers"]);
    }

    #[tokio::test]
    async fn the_route_and_its_parameters_are_left_for_others() {
        let service = HttpService::new(tower::service_fn(|request: Request| async move {
            let found = request.extensions().get::<Parameters>().unwrap();
            assert_eq!(found.get("id"), Some("a b"));
            Ok::<_, BoxError>(Response::default())
        }));
        let metrics = Metrics::new().route("bots");
        let (matches, _) = table(&["{path: '/bots/{id}'}"]).routes.remove(0);
        let mut routes = Routes::new(Table::new(vec![(matches, Target { metrics, service, preflights: false })]));
        let exchange = Exchange::new(&http::Request::new(()));
        let to = |uri: &str| {
            let request = http::Request::builder().uri(uri).extension(exchange.clone());
            request.body(Body::empty()).unwrap()
        };
        let error = routes.call(to("/other")).await.unwrap_err();
        assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::NoRoute));
        assert!(exchange.facts().route.is_none());
        routes.call(to("/bots/a%20b")).await.unwrap();
        assert_eq!(exchange.facts().route.as_ref().map(|route| &**route.name()), Some("bots"));
    }

    proptest! {
        #[test]
        fn no_spelling_of_a_path_dodges_its_route(path in "/([axX.;/\\\\]|%2[eEfF]|%5c|%61|%3b){0,10}") {
            let read = canonical(path.as_bytes());
            let below = *read == *b"/a" || read.starts_with(b"/a/");
            match selected(&table(&["{}", "{path: '/a/*'}"]), &format!("GET {path}"), &[]) {
                Ok(index) => prop_assert_eq!(index == 1, below),
                Err(kind) => prop_assert!(matches!(kind, Kind::BadRequest(_))),
            }
        }

        #[test]
        fn any_bytes_are_routed_or_refused(path: Vec<u8>, host: Vec<u8>) {
            let table = table(&["{path: '/{x}/*', host: '*.a'}", "{path: /x, host: '[::1]'}"]);
            let mut request = http::Request::new(());
            if let Ok(uri) = http::Uri::from_maybe_shared([b"/", &*path].concat()) {
                *request.uri_mut() = uri;
            }
            if let Ok(host) = HeaderValue::from_bytes(&host) {
                request.headers_mut().insert(HOST, host);
            }
            let _outcome = table.select(&request);
        }

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
