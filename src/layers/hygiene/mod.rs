//! Clean messages: row 5 of the request path, outside of routing.
//!
//! A request that could be read in two ways is refused and its connection closed: `Transfer-Encoding` beside
//! `Content-Length`, two lengths, two hosts. A request goes upstream with one framing, its own; with the
//! `Host` it asked for; without the fields that concern one connection only (RFC 9110 §7.6.1), which do not
//! come back with responses either; with `X-Forwarded-For`, `-Proto` and `-Host` that are true, and `Via`.
//! Upgrades pass. Everything else stays byte for byte as it came.
//!
//! Embedders: put [`Connection`] into each request's extensions, or the peer counts as a stranger without an
//! address.
//!
//! ```
//! use http::{HeaderValue, Request, Response};
//! use sidegate::{
//!     layers::hygiene::{Config, HygieneLayer, Limits},
//!     message::{Connection, Peer},
//! };
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let layer = HygieneLayer::new(&Config::default(), Limits::default(), &HeaderValue::from_static("gate"));
//! let service = ServiceBuilder::new().layer(layer).service(service_fn(|request: Request<()>| async move {
//!     assert_eq!(request.headers()["x-forwarded-for"], "192.0.2.7");
//!     assert_eq!(request.headers()["via"], "1.1 gate");
//!     assert!(!request.headers().contains_key("x-hop"));
//!     Ok::<_, std::convert::Infallible>(Response::new(()))
//! }));
//! let request = Request::builder()
//!     .header("host", "a.example")
//!     .header("connection", "keep-alive, x-hop")
//!     .header("x-hop", "1")
//!     .header("x-forwarded-for", "127.0.0.1")
//!     .extension(Connection::new(Peer::tcp(([192, 0, 2, 7], 4711).into()), false))
//!     .body(())
//!     .unwrap();
//! service.oneshot(request).await.unwrap();
//! # });
//! ```

mod forwarded;
mod framing;
mod guard;
mod hop_by_hop;
mod survey;

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Method, Request, Response, StatusCode, Version,
    header::{MAX_FORWARDS, VIA as VIA_FIELD},
};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::{Layer, Service};
use uuid::Uuid;

use self::{
    guard::Guard,
    survey::{MAX_FORWARDS as HAS_MAX_FORWARDS, Survey, VIA},
};
use crate::{
    config::Networks,
    message::{BoxError, Connection, Error, Kind},
    telemetry::Exchange,
};

/// Whom to believe, and what to say of oneself. Section `hygiene`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Hygiene")]
pub struct Config {
    /// Proxies before sidegate whose `X-Forwarded-*` are believed and added to: addresses, networks, or
    /// `private` for loopback, private and link-local ones and Unix sockets. Default none: what anyone says is
    /// replaced. A listed proxy must set these fields itself, or its clients can.
    pub trusted_proxies: Networks,
    /// Whether `Via` is added to requests, by which a loop is found out. Default `true`. nginx as a backend
    /// does not compress for requests with `Via` unless `gzip_proxied` says so.
    pub via: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { trusted_proxies: Networks::default(), via: true }
    }
}

/// How large the head of a request may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Header fields. Default 100.
    pub headers: usize,
    /// Bytes of the header section. Default 64 KiB.
    pub header_bytes: u64,
    /// Bytes of the target. Default 16 KiB.
    pub uri_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { headers: 100, header_bytes: 64 << 10, uri_bytes: 16 << 10 }
    }
}

/// A name for `Via` that no other process has: `sidegate-` and eight hexadecimal digits.
///
/// Made once per process: over a reload it must stay, for requests on their way know it.
#[must_use]
pub fn pseudonym() -> HeaderValue {
    let [.., a, b, c, d] = Uuid::now_v7().into_bytes();
    let name = format!("sidegate-{a:02x}{b:02x}{c:02x}{d:02x}");
    value(name.into())
}

/// Only for what is made of values and visible ASCII.
fn value(text: Vec<u8>) -> HeaderValue {
    HeaderValue::from_maybe_shared(Bytes::from(text)).expect("no control character comes in")
}

/// Cleans requests and responses: see the [module](self).
///
/// # Errors
/// [`Kind::BadRequest`], 400, for what is ambiguous, names no host or asks for `CONNECT`;
/// [`Kind::UriTooLong`], [`Kind::HeadersTooLarge`]; [`Kind::LoopDetected`] for a request that came through
/// here before: all the client's. [`Kind::UpstreamReset`] for a switch of protocols that nobody asked for.
#[derive(Debug, Clone)]
pub struct HygieneLayer {
    shared: Arc<Shared>,
}

#[derive(Debug, Clone)]
struct Shared {
    trusted: Networks,
    limits: Limits,
    via: Option<Via>,
    guard: Guard,
}

/// What `Via` says, by the version of the request.
#[derive(Debug, Clone)]
struct Via {
    pseudonym: HeaderValue,
    v10: HeaderValue,
    v11: HeaderValue,
    v2: HeaderValue,
}

impl HygieneLayer {
    /// A layer as `config` says. `pseudonym` is what it calls itself in `Via`: one word, see [`pseudonym`].
    #[must_use]
    pub fn new(config: &Config, limits: Limits, pseudonym: &HeaderValue) -> Self {
        let via = config.via.then(|| Via::new(pseudonym));
        let shared = Shared { trusted: config.trusted_proxies.clone(), limits, via, guard: Guard::new() };
        Self { shared: Arc::new(shared) }
    }

    /// Guards a field that a layer outside of this one has set: a client can then not take it away by naming
    /// it in `Connection`. `x-request-id` is guarded anyway.
    #[must_use]
    pub fn guarding(mut self, name: HeaderName) -> Self {
        Arc::make_mut(&mut self.shared).guard.add(name);
        self
    }
}

impl Via {
    fn new(pseudonym: &HeaderValue) -> Self {
        let of = |version: &str| value([version.as_bytes(), b" ", pseudonym.as_bytes()].concat());
        Self { v10: of("1.0"), v11: of("1.1"), v2: of("2"), pseudonym: pseudonym.clone() }
    }

    fn of(&self, version: Version) -> &HeaderValue {
        match version {
            Version::HTTP_09 | Version::HTTP_10 => &self.v10,
            Version::HTTP_2 => &self.v2,
            _ => &self.v11,
        }
    }

    /// Whether `line` has our name: an element is `protocol received-by [comment]` (RFC 9110 §7.6.3).
    fn is_in(&self, line: &HeaderValue) -> bool {
        let name = self.pseudonym.as_bytes();
        !name.is_empty() && line.as_bytes().split(|byte| b", \t".contains(byte)).any(|word| word == name)
    }
}

impl<S> Layer<S> for HygieneLayer {
    type Service = Hygiene<S>;

    fn layer(&self, inner: S) -> Hygiene<S> {
        Hygiene { inner, shared: self.shared.clone() }
    }
}

/// The service of [`HygieneLayer`].
#[derive(Debug, Clone)]
pub struct Hygiene<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Hygiene<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ResBody: Default,
{
    type Response = Response<ResBody>;
    type Error = BoxError;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let version = request.version();
        let state = match self.shared.clean(&mut request) {
            Ok(Verdict::Pass { offered }) => {
                State::Passed { inner: self.inner.call(request), version, offered, shared: self.shared.clone() }
            }
            Ok(Verdict::Last) => State::Last,
            Err(kind) => State::Refused { kind },
        };
        ResponseFuture { state }
    }
}

/// What is to be done with a request.
enum Verdict {
    /// Passed on; it asks to switch to `offered`.
    Pass { offered: Option<HeaderValue> },
    /// Answered here: `Max-Forwards` says that sidegate is the last to get it.
    Last,
}

impl Shared {
    fn clean<B>(&self, request: &mut Request<B>) -> Result<Verdict, Kind> {
        let survey = Survey::of(request.headers());
        framing::check(request, survey, &self.limits)?;
        if let Some(via) = &self.via
            && survey.has(VIA)
            && request.headers().get_all(VIA_FIELD).iter().any(|line| via.is_in(line))
        {
            return Err(Kind::LoopDetected);
        }
        framing::set_host(request, survey)?;
        if survey.has(HAS_MAX_FORWARDS) && is_last(request)? {
            return Ok(Verdict::Last);
        }

        let version = request.version();
        let connection = request.extensions().get::<Connection>().cloned();
        let headers = request.headers_mut();
        let offered = hop_by_hop::request(headers, version, survey, &self.guard);
        self.guard.strip_lookalikes(headers, survey);
        let client = forwarded::apply(headers, connection.as_ref(), &self.trusted, survey);
        if let Some(via) = &self.via {
            headers.append(VIA_FIELD, via.of(version).clone());
        }
        if let Some(exchange) = Exchange::of(request) {
            let mut facts = exchange.facts();
            facts.client_ip = client.ip;
            facts.https = client.https;
        }
        Ok(Verdict::Pass { offered })
    }
}

/// Counts `Max-Forwards` down; `true` where it has come to its end (RFC 9110 §7.6.2). Only TRACE and OPTIONS
/// have it. A number that is none is passed on for the backend to judge.
fn is_last<B>(request: &mut Request<B>) -> Result<bool, Kind> {
    let trace = *request.method() == Method::TRACE;
    if !trace && *request.method() != Method::OPTIONS {
        return Ok(false);
    }
    let left = request.headers().get(MAX_FORWARDS).and_then(|value| value.to_str().ok()?.parse::<u32>().ok());
    match left {
        // To send a request's fields back is to show them to scripts that must not see them.
        Some(0) if trace => Err(Kind::BadRequest("TRACE is not answered here")),
        Some(0) => Ok(true),
        Some(more) => {
            request.headers_mut().insert(MAX_FORWARDS, HeaderValue::from(more - 1));
            Ok(false)
        }
        None => Ok(false),
    }
}

pin_project! {
    /// The response of [`Hygiene`], cleaned.
    pub struct ResponseFuture<F> {
        #[pin]
        state: State<F>,
    }
}

pin_project! {
    #[project = StateProj]
    enum State<F> {
        Passed {
            #[pin]
            inner: F,
            version: Version,
            offered: Option<HeaderValue>,
            shared: Arc<Shared>,
        },
        Last,
        Refused {
            kind: Kind,
        },
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Default,
    E: Into<BoxError>,
{
    type Output = Result<Response<B>, BoxError>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match self.project().state.project() {
            StateProj::Passed { inner, version, offered, shared } => {
                let mut response = ready!(inner.poll(cx)).map_err(Into::into)?;
                hop_by_hop::response(&mut response, *version, offered.as_ref(), &shared.guard)?;
                Poll::Ready(Ok(response))
            }
            StateProj::Last => {
                let mut response = Response::new(B::default());
                *response.status_mut() = StatusCode::NO_CONTENT;
                Poll::Ready(Ok(response))
            }
            StateProj::Refused { kind } => Poll::Ready(Err(Error::from(*kind).into())),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::HeaderMap;
    use tower::{ServiceExt, service_fn};

    use super::*;
    use crate::message::Peer;

    fn layer(config: &Config) -> HygieneLayer {
        HygieneLayer::new(config, Limits::default(), &HeaderValue::from_static("sidegate-0123abcd"))
    }

    /// The fields that the upstream sees, or why it sees nothing.
    async fn sent(layer: HygieneLayer, request: Request<()>) -> Result<HeaderMap, Kind> {
        let upstream = service_fn(|request: Request<()>| async move {
            Ok::<_, Infallible>(Response::new(Some(request.headers().clone())))
        });
        let response = layer.layer(upstream).oneshot(request).await;
        match response {
            Ok(response) => Ok(response.into_body().unwrap_or_default()),
            Err(error) => Err(Error::find(&*error).unwrap().kind()),
        }
    }

    fn get(fields: &[(&str, &str)]) -> Request<()> {
        let mut request = Request::builder().header("host", "a.example");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        request.body(()).unwrap()
    }

    #[tokio::test]
    async fn via_says_that_it_was_here() {
        let mut request = get(&[("via", "1.0 fred, 1.1 p.example (proxy)")]);
        *request.version_mut() = Version::HTTP_10;
        let headers = sent(layer(&Config::default()), request).await.unwrap();
        let via: Vec<_> = headers.get_all("via").iter().collect();
        assert_eq!(via, ["1.0 fred, 1.1 p.example (proxy)", "1.0 sidegate-0123abcd"]);
        let mut request = get(&[]);
        *request.version_mut() = Version::HTTP_2;
        assert_eq!(sent(layer(&Config::default()), request).await.unwrap()["via"], "2 sidegate-0123abcd");
        let silent = Config { via: false, ..Config::default() };
        let headers = sent(layer(&silent), get(&[("via", "1.1 sidegate-0123abcd")])).await.unwrap();
        assert_eq!(headers.get_all("via").iter().count(), 1);
    }

    #[tokio::test]
    async fn a_request_that_came_through_before_is_a_loop() {
        for via in ["1.1 sidegate-0123abcd", "1.0 fred,2 sidegate-0123abcd (x), 1.1 other"] {
            let result = sent(layer(&Config::default()), get(&[("via", "1.1 x"), ("via", via)])).await;
            assert_eq!(result, Err(Kind::LoopDetected), "{via}");
        }
        let other = sent(layer(&Config::default()), get(&[("via", "1.1 sidegate-0123abcde")])).await;
        assert!(other.is_ok(), "another one of us");
    }

    #[tokio::test]
    async fn max_forwards_is_counted_down() {
        let request = |method: Method, left: &str| {
            let mut request = get(&[("max-forwards", left)]);
            *request.method_mut() = method;
            sent(layer(&Config::default()), request)
        };
        assert_eq!(request(Method::OPTIONS, "1").await.unwrap()["max-forwards"], "0");
        assert_eq!(request(Method::TRACE, "10").await.unwrap()["max-forwards"], "9");
        assert!(request(Method::OPTIONS, "0").await.unwrap().is_empty(), "answered here");
        assert_eq!(request(Method::TRACE, "0").await, Err(Kind::BadRequest("TRACE is not answered here")));
        assert_eq!(request(Method::GET, "0").await.unwrap()["max-forwards"], "0");
        assert_eq!(request(Method::OPTIONS, "many").await.unwrap()["max-forwards"], "many");
    }

    #[tokio::test]
    async fn a_field_set_further_out_cannot_be_taken_away() {
        let fields = [("connection", "my-id, x-request-id, x-b"), ("my-id", "1"), ("x-request-id", "2"), ("x-b", "3")];
        let guarding = layer(&Config::default()).guarding(HeaderName::from_static("my-id"));
        let headers = sent(guarding, get(&fields)).await.unwrap();
        assert_eq!((&headers["my-id"], &headers["x-request-id"]), (&"1".parse().unwrap(), &"2".parse().unwrap()));
        assert!(!headers.contains_key("x-b"));
    }

    #[tokio::test]
    async fn naming_the_address_in_connection_does_not_hide_it() {
        let trusting = Config { trusted_proxies: Networks::new([], true), ..Config::default() };
        let mut request = get(&[("connection", "x-forwarded-for"), ("x-forwarded-for", "203.0.113.9")]);
        let exchange = Exchange::new(&http::Request::new(()));
        request.extensions_mut().insert(exchange.clone());
        request.extensions_mut().insert(Connection::new(Peer::tcp(([10, 0, 0, 1], 1).into()), false));
        let headers = sent(layer(&trusting), request).await.unwrap();
        assert_eq!(headers["x-forwarded-for"], "203.0.113.9, 10.0.0.1");
        assert_eq!(exchange.facts().client_ip, Some([203, 0, 113, 9].into()));
    }

    #[tokio::test]
    async fn a_lookalike_of_the_address_is_removed() {
        let headers = sent(layer(&Config::default()), get(&[("x_forwarded_for", "1.1.1.1"), ("x_a", "1")])).await;
        let headers = headers.unwrap();
        assert!(!headers.contains_key("x_forwarded_for"));
        assert!(headers.contains_key("x_a"));
    }

    #[tokio::test]
    async fn responses_come_back_clean() {
        let upstream = service_fn(|_: Request<()>| async {
            let response =
                Response::builder().header("connection", "close").header("set-cookie", "a").header("set-cookie", "b");
            Ok::<_, Infallible>(response.body(()).unwrap())
        });
        let response = layer(&Config::default()).layer(upstream).oneshot(get(&[])).await.unwrap();
        assert!(!response.headers().contains_key("connection"));
        let cookies: Vec<_> = response.headers().get_all("set-cookie").iter().collect();
        assert_eq!(cookies, ["a", "b"]);
    }

    #[tokio::test]
    async fn a_switch_that_nobody_asked_for_is_a_broken_upstream() {
        let upstream = service_fn(|_: Request<()>| async {
            let response = Response::builder().status(101).header("upgrade", "websocket");
            Ok::<_, Infallible>(response.body(()).unwrap())
        });
        let service = layer(&Config::default()).layer(upstream);
        let error = service.clone().oneshot(get(&[])).await.unwrap_err();
        assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::UpstreamReset));
        let asked = get(&[("connection", "upgrade"), ("upgrade", "websocket")]);
        assert_eq!(service.oneshot(asked).await.unwrap().headers()["connection"], "upgrade");
    }

    #[tokio::test]
    async fn a_plain_request_keeps_all_it_has() {
        let fields =
            [("accept", "a"), ("x-b", "1"), ("x-b", "2"), ("cookie", "c"), ("te", "trailers"), ("trailer", "d")];
        let headers = sent(layer(&Config { via: false, ..Config::default() }), get(&fields)).await.unwrap();
        for (name, _) in fields {
            let expected: Vec<_> = fields.iter().filter(|field| field.0 == name).map(|field| field.1).collect();
            assert_eq!(headers.get_all(name).iter().collect::<Vec<_>>(), expected);
        }
        assert_eq!(headers.len(), fields.len() + 4, "the host and three that tell of the client");
    }

    #[test]
    fn the_section_reads_as_documented() {
        let read = |text: &str| serde_json::from_str::<Config>(text);
        assert_eq!(read("{}").unwrap(), Config::default());
        let private = read(r#"{"trusted_proxies": "private", "via": false}"#).unwrap();
        assert_eq!(private, Config { trusted_proxies: Networks::new([], true), via: false });
        assert!(read(r#"{"trusted_proxy": []}"#).unwrap_err().to_string().contains("unknown field"));
    }

    #[test]
    fn each_process_has_a_name_of_its_own() {
        let (one, other) = (pseudonym(), pseudonym());
        assert_ne!(one, other);
        assert_eq!(one.len(), "sidegate-".len() + 8);
    }
}
