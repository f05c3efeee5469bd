//! CORS: row 7 of the request path, outside of the errors layer of its route, so that refusals carry it too.
//!
//! Which pages of other origins may read the answers (Fetch standard, §3.2). A preflight is answered here, before it
//! costs anything, with 204; it goes to the route of the request that it asks for. `OPTIONS` without
//! `Access-Control-Request-Method` is no preflight and goes to the backend. What the backend says about CORS gives way:
//! two `Access-Control-Allow-Origin` would be none to a browser. It is `tower-http`'s layer, behind a configuration.
//!
//! This keeps pages of other origins from *reading*; it does not keep anybody from *asking*: that is the business of
//! auth.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::layers::cors::{Config, CorsLayer};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let config: Config = serde_json::from_value(serde_json::json!({ "origins": ["https://*.example.com"] })).unwrap();
//! let service = ServiceBuilder::new()
//!     .layer(CorsLayer::new(&config, []))
//!     .service(service_fn(|_: Request<()>| async { Ok::<_, std::convert::Infallible>(Response::new(())) }));
//! let request = Request::get("/").header("origin", "https://app.example.com").body(()).unwrap();
//! let response = service.oneshot(request).await.unwrap();
//! assert_eq!(response.headers()["access-control-allow-origin"], "https://app.example.com");
//! # });
//! ```

use std::{
    borrow::Cow,
    fmt,
    pin::Pin,
    task::{Context, Poll, ready},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode,
    header::{
        ACCESS_CONTROL_ALLOW_CREDENTIALS, ACCESS_CONTROL_ALLOW_HEADERS, ACCESS_CONTROL_ALLOW_METHODS,
        ACCESS_CONTROL_ALLOW_ORIGIN, ACCESS_CONTROL_EXPOSE_HEADERS, ACCESS_CONTROL_MAX_AGE,
        ACCESS_CONTROL_REQUEST_METHOD, AUTHORIZATION, CONTENT_TYPE, ORIGIN, RETRY_AFTER,
    },
};
use pin_project_lite::pin_project;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error};
use tower::{Layer, Service};
use tower_http::cors::{self, AllowHeaders, AllowMethods, AllowOrigin, ExposeHeaders};

use crate::config::{
    Check, HumanDuration, Problems,
    fields::{FieldName, MethodName},
};

/// What a response says about CORS; the origin first.
const OF_CORS: [HeaderName; 7] = [
    ACCESS_CONTROL_ALLOW_ORIGIN,
    ACCESS_CONTROL_ALLOW_CREDENTIALS,
    ACCESS_CONTROL_ALLOW_HEADERS,
    ACCESS_CONTROL_ALLOW_METHODS,
    ACCESS_CONTROL_EXPOSE_HEADERS,
    ACCESS_CONTROL_MAX_AGE,
    HeaderName::from_static("access-control-allow-private-network"),
];

/// Which pages of other origins may use the route. Section `cors`; `off` by default.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Cors")]
pub struct Config {
    /// The origins: `https://app.example.com`, `https://*.example.com` for all names below it, or `"*"` for any, which
    /// needs `credentials: false`.
    pub origins: Vec<Origin>,
    /// The methods that pages may use. `"*"` is whichever is asked for. Default `[GET, HEAD, POST, PUT, PATCH, DELETE]`.
    #[serde(default = "methods")]
    pub methods: Vec<MethodName>,
    /// The request headers that pages may set. `"*"` is whichever are asked for. Default `[authorization, content-type,
    /// last-event-id, x-api-key, x-request-id, x-session-id]`.
    #[serde(default = "headers")]
    pub headers: Vec<FieldName>,
    /// Response headers that pages may read, beside the request id, `retry-after`, those about rate limits, and `header` of
    /// `session`. `"*"` is all of them, which needs `credentials: false`. Default: no more than these.
    #[serde(default)]
    pub expose: Vec<FieldName>,
    /// Whether pages may send cookies and the like. Default `false`.
    #[serde(default)]
    pub credentials: bool,
    /// How long a browser may remember the answer to a preflight; browsers have limits of their own, of two hours or a
    /// day. Default `10m`.
    #[serde(default = "max_age")]
    pub max_age: HumanDuration,
    /// Whether public pages may ask a private address (Private Network Access). Default `false`.
    #[serde(default)]
    pub private_network: bool,
}

fn methods() -> Vec<MethodName> {
    [Method::GET, Method::HEAD, Method::POST, Method::PUT, Method::PATCH, Method::DELETE].map(Into::into).into()
}

fn headers() -> Vec<FieldName> {
    let others = ["last-event-id", "x-api-key", "x-request-id", "x-session-id"].map(HeaderName::from_static);
    [AUTHORIZATION, CONTENT_TYPE].into_iter().chain(others).map(Into::into).collect()
}

const fn max_age() -> HumanDuration {
    HumanDuration::from_secs(600)
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        let any = self.origins.contains(&Origin::Any);
        if self.origins.is_empty() {
            problems
                .add("origins", "is empty: name an origin, as in `[https://app.example.com]`, or write `cors: off`");
        } else if any && self.origins.len() > 1 {
            problems.add("origins", "has `*`, which is any origin, and others besides: leave one of the two out");
        }
        if self.credentials && any {
            problems.add("credentials", "must be false where `origins` is `*`: any page could act as its visitor");
        }
        if self.credentials && self.expose.iter().any(is_any) {
            problems
                .add("expose", "must name the headers where `credentials` is true: to a browser, `*` is a name then");
        }
        if self.methods.is_empty() {
            problems.add("methods", "is empty: leave it out for the usual ones, or write `\"*\"` for any");
        }
    }
}

fn is_any(name: &FieldName) -> bool {
    name.get().as_str() == "*"
}

/// An origin, or a set of them, in the configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// `*`: any.
    Any,
    /// `scheme://host[:port]`, as browsers write it.
    Exact(String),
    /// `scheme://*.host[:port]`: any name below the host, however deep, but not the host itself.
    Below {
        /// The scheme, with `://`.
        scheme: String,
        /// The host with the dot before it, and the port if there is one.
        host: String,
    },
}

impl Origin {
    fn matches(&self, origin: &[u8]) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(exact) => exact.as_bytes() == origin,
            Self::Below { scheme, host } => {
                let names = origin.strip_prefix(scheme.as_bytes()).and_then(|rest| rest.strip_suffix(host.as_bytes()));
                // No character that could end the host before.
                let is_names = |names: &[u8]| {
                    names.iter().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.'))
                };
                names.is_some_and(|names| !names.is_empty() && is_names(names))
            }
        }
    }

    fn parse(text: &str) -> Result<Self, String> {
        if text == "*" {
            return Ok(Self::Any);
        }
        if text.eq_ignore_ascii_case("null") {
            return Err(
                "`null` is the origin of any sandboxed page or local file: name the origins that are meant".into()
            );
        }
        let example =
            "write it as a browser does: `https://app.example.com`, with a port where it is not the usual one";
        let text = text.to_ascii_lowercase();
        let Some((scheme, host)) = text.split_once("://") else {
            return Err(format!("`{text}` is no origin: {example}"));
        };
        let usual = match scheme {
            "https" => ":443",
            "http" => ":80",
            _ => "",
        };
        let (below, name) = match host.strip_prefix("*.") {
            Some(name) => (true, name),
            None => (false, host),
        };
        let legal = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b':' | b'[' | b']');
        if scheme.is_empty() || name.is_empty() || !name.bytes().all(legal) {
            return Err(format!("`{text}` is no origin: it has a scheme, a host and no more; {example}"));
        }
        if !usual.is_empty() && name.ends_with(usual) {
            return Err(format!("`{text}` has the usual port, which browsers leave out: so must this"));
        }
        Ok(if below {
            Self::Below { scheme: format!("{scheme}://"), host: format!(".{name}") }
        } else {
            Self::Exact(text)
        })
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(exact) => f.write_str(exact),
            Self::Below { scheme, host } => write!(f, "{scheme}*{host}"),
        }
    }
}

impl<'de> Deserialize<'de> for Origin {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        Self::parse(&String::deserialize(from)?).map_err(D::Error::custom)
    }
}

impl Serialize for Origin {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl JsonSchema for Origin {
    fn schema_name() -> Cow<'static, str> {
        "Origin".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        json_schema!({
            "type": "string",
            "description": "An origin as browsers write it, one with `*.` for all names below a host, or `*` for any.",
            "pattern": r"^(\*|[A-Za-z][A-Za-z0-9+.-]*://(\*\.)?[^/?#@*]+)$",
        })
    }
}

/// Whether a request is a preflight, and for which method (Fetch standard, §4.8).
#[must_use]
pub fn preflight_for<B>(request: &Request<B>) -> Option<Method> {
    if request.method() != Method::OPTIONS || !request.headers().contains_key(ORIGIN) {
        return None;
    }
    Method::from_bytes(request.headers().get(ACCESS_CONTROL_REQUEST_METHOD)?.as_bytes()).ok()
}

/// Answers preflights, and says of responses who may read them: see the [module](self).
#[derive(Debug, Clone)]
pub struct CorsLayer(cors::CorsLayer);

impl CorsLayer {
    /// A layer as `config` says, that lets pages read the headers `exposed` too.
    #[must_use]
    pub fn new(config: &Config, exposed: impl IntoIterator<Item = HeaderName>) -> Self {
        let names = |names: &[FieldName]| -> Vec<_> { names.iter().map(|name| name.get().clone()).collect() };
        let (origins, vary) = if config.origins.contains(&Origin::Any) {
            (AllowOrigin::any(), None)
        } else {
            let origins = config.origins.clone();
            let allowed = move |origin: &HeaderValue, _: &http::request::Parts| {
                origins.iter().any(|known| known.matches(origin.as_bytes()))
            };
            (AllowOrigin::predicate(allowed), Some(ORIGIN))
        };
        let methods = if config.methods.iter().any(|method| method.as_str() == "*") {
            AllowMethods::mirror_request()
        } else {
            AllowMethods::list(config.methods.iter().map(|method| method.get().clone()))
        };
        let headers = if config.headers.iter().any(is_any) {
            AllowHeaders::mirror_request()
        } else {
            AllowHeaders::list(names(&config.headers))
        };
        let expose = if config.expose.iter().any(is_any) {
            ExposeHeaders::any()
        } else {
            let mut exposed: Vec<_> = exposed.into_iter().chain([RETRY_AFTER]).collect();
            exposed.extend(names(&config.expose));
            ExposeHeaders::list(exposed)
        };
        let layer = cors::CorsLayer::new()
            .allow_origin(origins)
            .allow_methods(methods)
            .allow_headers(headers)
            .expose_headers(expose)
            .allow_credentials(config.credentials)
            .allow_private_network(config.private_network)
            .max_age(config.max_age.get());
        // After the origins, which would set it.
        Self(layer.vary(vary.into_iter().collect::<Vec<_>>()))
    }
}

impl<S> Layer<S> for CorsLayer {
    type Service = Cors<S>;

    fn layer(&self, inner: S) -> Cors<S> {
        Cors(self.0.layer(Backend(inner)))
    }
}

/// The service of [`CorsLayer`].
#[derive(Debug, Clone)]
pub struct Cors<S>(cors::Cors<Backend<S>>);

/// `OPTIONS`, which is no preflight, but would be one to `tower-http`.
#[derive(Debug, Clone, Copy)]
struct Options;

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Cors<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
    ResBody: Default,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let is_preflight = preflight_for(&request).is_some();
        if request.method() == Method::OPTIONS && !is_preflight {
            *request.method_mut() = Method::GET;
            request.extensions_mut().insert(Options);
        }
        ResponseFuture { inner: self.0.call(request), is_preflight }
    }
}

pin_project! {
    /// The response of [`Cors`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: cors::ResponseFuture<BackendFuture<F>>,
        is_preflight: bool,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: Default,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let mut response = ready!(this.inner.poll(cx))?;
        if !response.headers().contains_key(ACCESS_CONTROL_ALLOW_ORIGIN) {
            // To somebody who may not read it, there is nothing more to say.
            remove(response.headers_mut());
        }
        if *this.is_preflight {
            *response.status_mut() = StatusCode::NO_CONTENT;
        }
        Poll::Ready(Ok(response))
    }
}

fn remove(headers: &mut HeaderMap) {
    for name in OF_CORS {
        headers.remove(name);
    }
}

/// What is inside of CORS: gets its requests as they came, and has no say about it.
#[derive(Debug, Clone)]
struct Backend<S>(S);

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Backend<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = BackendFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.0.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        if request.extensions_mut().remove::<Options>().is_some() {
            *request.method_mut() = Method::OPTIONS;
        }
        BackendFuture { inner: self.0.call(request) }
    }
}

pin_project! {
    struct BackendFuture<F> {
        #[pin]
        inner: F,
    }
}

impl<F, B, E> Future for BackendFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let mut result = ready!(self.project().inner.poll(cx));
        if let Ok(response) = &mut result {
            remove(response.headers_mut());
        }
        Poll::Ready(result)
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http::header::VARY;
    use serde_json::{Value, json};
    use tower::{ServiceExt, service_fn};

    use super::*;

    fn config(config: Value) -> Config {
        serde_json::from_value(config).unwrap()
    }

    /// A backend with an opinion of its own about CORS, which says how it was asked.
    async fn asked(config: &Config, method: &str, fields: &[(&'static str, &'static str)]) -> Response<String> {
        let backend = service_fn(|request: Request<()>| async move {
            let response = Response::builder()
                .header("access-control-allow-origin", "*")
                .header("access-control-allow-credentials", "true")
                .header("vary", "accept");
            Ok::<_, Infallible>(response.body(request.method().to_string()).unwrap())
        });
        let mut request = Request::builder().method(method);
        for &(name, value) in fields {
            request = request.header(name, value);
        }
        let id = HeaderName::from_static("x-request-id");
        CorsLayer::new(config, [id]).layer(backend).oneshot(request.body(()).unwrap()).await.unwrap()
    }

    fn field<'a>(response: &'a Response<String>, name: &str) -> &'a str {
        response.headers().get(name).map_or("", |value| value.to_str().unwrap())
    }

    const APP: (&str, &str) = ("origin", "https://app.example.com");

    #[tokio::test]
    async fn a_listed_origin_may_read_and_the_backend_has_no_say() {
        let config = config(json!({ "origins": ["https://app.example.com"], "expose": ["x-cost"] }));
        let allowed = asked(&config, "GET", &[APP]).await;
        assert_eq!(field(&allowed, "access-control-allow-origin"), "https://app.example.com");
        assert_eq!(field(&allowed, "access-control-allow-credentials"), "");
        let exposed = "x-request-id,retry-after,x-cost";
        assert_eq!(field(&allowed, "access-control-expose-headers"), exposed);
        for origin in [&[("origin", "https://evil.example")][..], &[("origin", "null")], &[]] {
            let other = asked(&config, "GET", origin).await;
            assert_eq!(other.headers().keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["vary"], "{origin:?}");
            let vary: Vec<_> = other.headers().get_all(VARY).iter().collect();
            assert_eq!(vary, ["accept", "origin"], "a cache must tell them apart");
        }
    }

    #[tokio::test]
    async fn a_preflight_is_answered_and_any_other_options_passed_on() {
        let config = config(json!({ "origins": ["https://app.example.com"], "credentials": true }));
        let preflight = [APP, ("access-control-request-method", "PUT"), ("access-control-request-headers", "x-odd")];
        let answer = asked(&config, "OPTIONS", &preflight).await;
        assert_eq!((answer.status(), &**answer.body()), (StatusCode::NO_CONTENT, ""));
        assert_eq!(field(&answer, "access-control-allow-methods"), "GET,HEAD,POST,PUT,PATCH,DELETE");
        let headers = "authorization,content-type,last-event-id,x-api-key,x-request-id,x-session-id";
        assert_eq!(field(&answer, "access-control-allow-headers"), headers, "an unlisted one is not allowed");
        assert_eq!(field(&answer, "access-control-allow-credentials"), "true");
        assert_eq!(field(&answer, "access-control-max-age"), "600");

        let refused = [("origin", "https://evil.example"), ("access-control-request-method", "PUT")];
        let answer = asked(&config, "OPTIONS", &refused).await;
        assert_eq!(answer.status(), StatusCode::NO_CONTENT);
        assert_eq!(answer.headers().keys().map(HeaderName::as_str).collect::<Vec<_>>(), ["vary"]);

        for fields in [&[APP][..], &[("access-control-request-method", "PUT")], &[]] {
            assert_eq!(asked(&config, "OPTIONS", fields).await.body(), "OPTIONS", "{fields:?}");
        }
        let options = asked(&config, "OPTIONS", &[APP]).await;
        assert_eq!(field(&options, "access-control-allow-origin"), "https://app.example.com");
    }

    #[tokio::test]
    async fn any_origin_is_a_star_and_what_is_asked_for_is_allowed() {
        let config = config(json!({ "origins": ["*"], "methods": ["*"], "headers": ["*"], "private_network": true }));
        let preflight = [
            APP,
            ("access-control-request-method", "REPORT"),
            ("access-control-request-headers", "x-odd, x-even"),
            ("access-control-request-private-network", "true"),
        ];
        let answer = asked(&config, "OPTIONS", &preflight).await;
        assert_eq!(field(&answer, "access-control-allow-origin"), "*");
        assert_eq!(field(&answer, "access-control-allow-methods"), "REPORT");
        assert_eq!(field(&answer, "access-control-allow-headers"), "x-odd, x-even");
        assert_eq!(field(&answer, "access-control-allow-private-network"), "true");
        assert_eq!(field(&answer, "vary"), "", "it is the same for all");
    }

    #[test]
    fn a_suffix_ends_at_a_dot() {
        let below = Origin::parse("https://*.Example.com").unwrap();
        for origin in ["https://a.example.com", "https://a.b.example.com"] {
            assert!(below.matches(origin.as_bytes()), "{origin}");
        }
        for origin in [
            "https://example.com",
            "https://evil-example.com",
            "https://.example.com",
            "http://a.example.com",
            "https://a.example.com:8443",
            "https://a.example.com.evil.example",
            "https://evil.example/.example.com",
            "https://evil.example#.example.com",
            "https://A.EXAMPLE.COM",
            "null",
            "",
        ] {
            assert!(!below.matches(origin.as_bytes()), "{origin}");
        }
        assert!(Origin::parse("https://*.example.com:8443").unwrap().matches(b"https://a.example.com:8443"));
    }

    #[test]
    fn what_is_no_origin_is_told_why() {
        for (text, why) in [
            ("null", "sandboxed"),
            ("example.com", "is no origin"),
            ("https://example.com/", "no more"),
            ("https://*", "no more"),
            ("https://a.*.com", "no more"),
            ("https://example.com:443", "usual port"),
            ("http://localhost:80", "usual port"),
            ("https://user@example.com", "no more"),
            ("://x", "no more"),
        ] {
            let error = Origin::parse(text).unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
        for text in ["http://localhost:3000", "http://[::1]:3000", "tauri://localhost", "https://*.example.com", "*"] {
            assert_eq!(Origin::parse(text).unwrap().to_string(), text);
        }
    }

    #[test]
    fn what_any_page_could_abuse_is_refused() {
        let problems = |value| {
            let mut problems = Problems::default();
            config(value).check(&mut problems);
            problems.to_string()
        };
        assert_eq!(problems(json!({ "origins": ["*"] })), "");
        assert!(problems(json!({ "origins": ["*"], "credentials": true })).starts_with("credentials: must be false"));
        assert!(problems(json!({ "origins": [] })).starts_with("origins: is empty"));
        assert!(problems(json!({ "origins": ["*", "https://a.example"] })).starts_with("origins: has `*`"));
        let both = json!({ "origins": ["https://a.example"], "expose": ["*"], "credentials": true });
        assert!(problems(both).starts_with("expose: must name"));
    }
}
