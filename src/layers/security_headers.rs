//! Security headers: row 3 of the request path, outside of the errors layer, so that sidegate's own answers
//! carry them too.
//!
//! A header is set only where the backend has not set it: a backend that knows better keeps its own. The
//! presets follow OWASP's Secure Headers Project and its REST cheat sheet; what would break a working API
//! or its documentation page is not in `api`. `Strict-Transport-Security` is sent over TLS only (RFC 6797
//! §7.2): ended here, or by a trusted proxy that says so in `X-Forwarded-Proto`.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::layers::security_headers::{Config, SecurityHeadersLayer};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(SecurityHeadersLayer::new(&Config::default()))
//!     .service(service_fn(|_: Request<()>| async { Ok::<_, std::convert::Infallible>(Response::new(())) }));
//! let response = service.oneshot(Request::new(())).await.unwrap();
//! assert_eq!(response.headers()["x-content-type-options"], "nosniff");
//! # });
//! ```

use std::{
    collections::BTreeMap,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{
    HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode,
    header::{
        CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, SERVER, STRICT_TRANSPORT_SECURITY,
        X_CONTENT_TYPE_OPTIONS, X_DNS_PREFETCH_CONTROL, X_FRAME_OPTIONS, X_XSS_PROTECTION,
    },
};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::{Layer, Service};

use crate::{
    config::fields::{FieldName, FieldValue},
    telemetry::Exchange,
};

const PERMISSIONS_POLICY: HeaderName = HeaderName::from_static("permissions-policy");
const X_POWERED_BY: HeaderName = HeaderName::from_static("x-powered-by");

/// Every feature that the Permissions Policy registry marks as standardised, off.
const NO_PERMISSIONS: &str = "accelerometer=(), autoplay=(), camera=(), display-capture=(), encrypted-media=(), \
    fullscreen=(), geolocation=(), gyroscope=(), magnetometer=(), microphone=(), midi=(), payment=(), \
    picture-in-picture=(), publickey-credentials-get=(), screen-wake-lock=(), usb=(), web-share=(), \
    xr-spatial-tracking=()";

/// Security headers of responses. Section `security_headers`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "SecurityHeaders")]
pub struct Config {
    /// Where to start from. Default `api`.
    pub preset: Preset,
    /// Headers to set where the backend has not, beside or instead of the preset's.
    pub set: BTreeMap<FieldName, FieldValue>,
    /// Headers of the preset that are not to be set, and headers of the backend that are to be removed.
    /// `server` and `x-powered-by` are removed anyhow.
    pub remove: Vec<FieldName>,
}

/// A set of security headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Preset {
    /// For APIs: no sniffing, no framing, no referrer, no browser features, nothing to load. The default.
    #[default]
    Api,
    /// For pages: OWASP's full set, with a policy that allows what comes from the same origin, isolation
    /// from other origins, and no storing.
    Web,
    /// None of its own.
    Off,
}

/// Sets and removes headers of responses: see the [module](self).
#[derive(Debug, Clone)]
pub struct SecurityHeadersLayer {
    plan: Arc<Plan>,
    settles: bool,
}

#[derive(Debug)]
struct Plan {
    set: Vec<(HeaderName, HeaderValue)>,
    /// Set instead of `set`'s own policy where the answer is HTML, which `default-src 'none'` would break.
    html_policy: Option<HeaderValue>,
    transport: Option<HeaderValue>,
    remove: Vec<HeaderName>,
}

/// A response that has the headers of its own route: the layer in front of all routes leaves it alone.
#[derive(Debug, Clone, Copy)]
struct Settled;

impl SecurityHeadersLayer {
    /// A layer as `config` says.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        let mut set = config.preset.headers();
        let mut html_policy = match config.preset {
            Preset::Api => Some(HeaderValue::from_static("frame-ancestors 'none'")),
            Preset::Web | Preset::Off => None,
        };
        let remove = config.remove.iter().map(|name| name.get().clone());
        let remove: Vec<_> = remove.chain([SERVER, X_POWERED_BY]).collect();
        for (name, value) in &config.set {
            set.retain(|(known, _)| known != name.get());
            set.push((name.get().clone(), value.get().clone()));
            if name.get() == CONTENT_SECURITY_POLICY {
                html_policy = None;
            }
        }
        set.retain(|(name, _)| !remove.contains(name) || config.set.contains_key(&name.clone().into()));
        let transport = set.iter().position(|(name, _)| name == STRICT_TRANSPORT_SECURITY);
        let transport = transport.map(|at| set.swap_remove(at).1);
        Self { plan: Arc::new(Plan { set, html_policy, transport, remove }), settles: false }
    }

    /// A layer whose responses a layer further out leaves as they are: for a route that differs from the
    /// rest. `None` leaves the backend's own headers untouched.
    #[must_use]
    pub fn settling(config: Option<&Config>) -> Self {
        let untouched = Plan { set: Vec::new(), html_policy: None, transport: None, remove: Vec::new() };
        let plan = config.map_or_else(|| Arc::new(untouched), |config| Self::new(config).plan);
        Self { plan, settles: true }
    }
}

impl Preset {
    fn headers(self) -> Vec<(HeaderName, HeaderValue)> {
        let common = [
            (STRICT_TRANSPORT_SECURITY, "max-age=63072000; includeSubDomains"),
            (X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (X_FRAME_OPTIONS, "DENY"),
            (REFERRER_POLICY, "no-referrer"),
            (PERMISSIONS_POLICY, NO_PERMISSIONS),
            (X_XSS_PROTECTION, "0"),
        ];
        let own: &[_] = match self {
            Self::Off => return Vec::new(),
            Self::Api => &[(CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'")],
            Self::Web => &[
                (
                    CONTENT_SECURITY_POLICY,
                    "default-src 'self'; form-action 'self'; base-uri 'self'; object-src 'none'; \
                     frame-ancestors 'none'; upgrade-insecure-requests",
                ),
                (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
                (HeaderName::from_static("cross-origin-embedder-policy"), "require-corp"),
                (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
                (HeaderName::from_static("x-permitted-cross-domain-policies"), "none"),
                (X_DNS_PREFETCH_CONTROL, "off"),
                (CACHE_CONTROL, "no-store"),
            ],
        };
        let all = common.into_iter().chain(own.iter().cloned());
        all.map(|(name, value)| (name, HeaderValue::from_static(value))).collect()
    }
}

impl<S> Layer<S> for SecurityHeadersLayer {
    type Service = SecurityHeaders<S>;

    fn layer(&self, inner: S) -> SecurityHeaders<S> {
        SecurityHeaders { inner, plan: self.plan.clone(), settles: self.settles }
    }
}

/// The service of [`SecurityHeadersLayer`].
#[derive(Debug, Clone)]
pub struct SecurityHeaders<S> {
    inner: S,
    plan: Arc<Plan>,
    settles: bool,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for SecurityHeaders<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let exchange = Exchange::of(&request).cloned();
        ResponseFuture { inner: self.inner.call(request), plan: self.plan.clone(), settles: self.settles, exchange }
    }
}

pin_project! {
    /// The response of [`SecurityHeaders`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        plan: Arc<Plan>,
        settles: bool,
        exchange: Option<Exchange>,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
{
    type Output = F::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        let this = self.project();
        let mut result = ready!(this.inner.poll(cx));
        if let Ok(response) = &mut result
            && response.status() != StatusCode::SWITCHING_PROTOCOLS
            && response.extensions().get::<Settled>().is_none()
        {
            let https = this.exchange.as_ref().is_some_and(|exchange| exchange.facts().https);
            this.plan.apply(response.headers_mut(), https);
            if *this.settles {
                response.extensions_mut().insert(Settled);
            }
        }
        Poll::Ready(result)
    }
}

impl Plan {
    fn apply(&self, headers: &mut HeaderMap, https: bool) {
        for name in &self.remove {
            headers.remove(name);
        }
        // Grown once, not at every doubling.
        headers.reserve(self.set.len() + 1);
        let html = self.html_policy.as_ref().filter(|_| is_html(headers));
        for (name, value) in &self.set {
            let value = html.filter(|_| name == CONTENT_SECURITY_POLICY).unwrap_or(value);
            set_if_absent(headers, name, value);
        }
        if let Some(value) = self.transport.as_ref().filter(|_| https) {
            set_if_absent(headers, &STRICT_TRANSPORT_SECURITY, value);
        }
    }
}

fn set_if_absent(headers: &mut HeaderMap, name: &HeaderName, value: &HeaderValue) {
    if let http::header::Entry::Vacant(place) = headers.entry(name) {
        place.insert(value.clone());
    }
}

fn is_html(headers: &HeaderMap) -> bool {
    let media_type = headers.get(CONTENT_TYPE).map(HeaderValue::as_bytes);
    media_type.is_some_and(|value| value.get(..9).is_some_and(|start| start.eq_ignore_ascii_case(b"text/html")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn applied(config: &Config, https: bool, backend: &[(&'static str, &'static str)]) -> HeaderMap {
        let pairs = backend.iter().map(|&(n, v)| (HeaderName::from_static(n), HeaderValue::from_static(v)));
        let mut headers = pairs.collect();
        SecurityHeadersLayer::new(config).plan.apply(&mut headers, https);
        headers
    }

    #[tokio::test]
    async fn a_route_of_its_own_is_left_alone_outside() {
        use tower::{ServiceExt, service_fn};
        let backend = service_fn(|_: Request<()>| async { Ok::<_, std::convert::Infallible>(Response::new(())) });
        let route = SecurityHeadersLayer::settling(None).layer(backend);
        let front = SecurityHeadersLayer::new(&Config::default()).layer(route);
        assert!(front.oneshot(Request::new(())).await.unwrap().headers().is_empty());
    }

    fn config(yaml: &str) -> Config {
        use figment::providers::Format;
        figment::Figment::from(figment::providers::Yaml::string(yaml)).extract().unwrap()
    }

    #[test]
    fn the_backend_wins() {
        let backend = [("x-frame-options", "SAMEORIGIN"), ("content-security-policy", "img-src *")];
        let headers = applied(&Config::default(), false, &backend);
        for (name, value) in backend {
            assert_eq!(headers.get_all(name).iter().collect::<Vec<_>>(), [value]);
        }
        assert_eq!(headers["x-content-type-options"], "nosniff");
    }

    #[test]
    fn a_documentation_page_keeps_working() {
        let html = applied(&Config::default(), false, &[("content-type", "Text/HTML; charset=utf-8")]);
        assert_eq!(html["content-security-policy"], "frame-ancestors 'none'");
        let json = applied(&Config::default(), false, &[("content-type", "application/json")]);
        assert_eq!(json["content-security-policy"], "default-src 'none'; frame-ancestors 'none'");
    }

    #[test]
    fn strict_transport_security_is_for_tls_alone() {
        assert!(!applied(&Config::default(), false, &[]).contains_key(STRICT_TRANSPORT_SECURITY));
        assert!(applied(&Config::default(), true, &[]).contains_key(STRICT_TRANSPORT_SECURITY));
    }

    #[test]
    fn what_names_the_software_is_removed() {
        let headers = applied(&config("preset: off"), false, &[("server", "uvicorn"), ("x-powered-by", "PHP")]);
        assert!(headers.is_empty(), "{headers:?}");
    }

    #[test]
    fn headers_can_be_overridden_and_left_out() {
        let config = config("{set: {X-Frame-Options: SAMEORIGIN, x-own: 1}, remove: [referrer-policy, x-debug]}");
        let headers = applied(&config, false, &[("x-debug", "1")]);
        assert_eq!(headers[X_FRAME_OPTIONS], "SAMEORIGIN");
        assert_eq!(headers["x-own"], "1");
        assert!(!headers.contains_key(REFERRER_POLICY) && !headers.contains_key("x-debug"), "{headers:?}");
    }

    #[test]
    fn web_is_the_full_set() {
        let headers = applied(&config("preset: web"), true, &[]);
        assert_eq!(headers.len(), 13, "{headers:?}");
        assert_eq!(headers["cross-origin-embedder-policy"], "require-corp");
    }
}
