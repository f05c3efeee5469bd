//! Correlation ids: row 1 of the request path.
//!
//! Each request has one id, the same upstream, in the response, in every log line and in every error. A
//! trusted client's own is kept when it is 1 to 128 characters of `[A-Za-z0-9._~+/=-]`; anything else could
//! forge log lines, and is replaced by a UUIDv7 (RFC 9562), which sorts by time. `traceparent` (W3C) passes
//! untouched: sidegate does not take part in a trace that it does not report.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::layers::request_id::{Config, RequestIdLayer};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(RequestIdLayer::new(&Config::default()))
//!     .service(service_fn(|_: Request<()>| async { Ok::<_, std::convert::Infallible>(Response::new(())) }));
//! let request = Request::builder().header("x-request-id", "abc-1").body(()).unwrap();
//! let response = service.oneshot(request).await.unwrap();
//! assert_eq!(response.headers()["x-request-id"], "abc-1");
//! # });
//! ```

use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::{Layer, Service};
use uuid::Uuid;

use crate::{
    config::fields::FieldName,
    message::{RequestId, headers::X_REQUEST_ID},
};

/// Correlation ids. Section `request_id`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "RequestId")]
pub struct Config {
    /// The header that carries the id, both ways. Default `x-request-id`.
    pub header: FieldName,
    /// Whether a client's own id is kept. Default `true`; `false` where clients are strangers, so that
    /// nobody outside chooses what stands in the logs.
    pub trust: bool,
}

impl Default for Config {
    fn default() -> Self {
        Self { header: X_REQUEST_ID.into(), trust: true }
    }
}

/// Gives each request an id: see the [module](self).
#[derive(Debug, Clone)]
pub struct RequestIdLayer {
    settings: Arc<Settings>,
}

#[derive(Debug)]
struct Settings {
    header: HeaderName,
    trust: bool,
}

impl RequestIdLayer {
    /// A layer as `config` says.
    #[must_use]
    pub fn new(config: &Config) -> Self {
        Self { settings: Arc::new(Settings { header: config.header.get().clone(), trust: config.trust }) }
    }
}

impl<S> Layer<S> for RequestIdLayer {
    type Service = RequestIds<S>;

    fn layer(&self, inner: S) -> RequestIds<S> {
        RequestIds { inner, settings: self.settings.clone() }
    }
}

/// The service of [`RequestIdLayer`].
#[derive(Debug, Clone)]
pub struct RequestIds<S> {
    inner: S,
    settings: Arc<Settings>,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for RequestIds<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>>,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<ReqBody>) -> Self::Future {
        let Settings { header, trust } = &*self.settings;
        let id = if let Some(id) = trust.then(|| own(request.headers(), header)).flatten() {
            id.clone()
        } else {
            let id = fresh();
            request.headers_mut().insert(header.clone(), id.clone());
            id
        };
        request.extensions_mut().insert(RequestId(id.clone()));
        ResponseFuture { inner: self.inner.call(request), set: Some((header.clone(), id)) }
    }
}

pin_project! {
    /// The response of [`RequestIds`], with the id set.
    pub struct ResponseFuture<F> {
        #[pin]
        inner: F,
        set: Option<(HeaderName, HeaderValue)>,
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
        if let (Ok(response), Some((name, id))) = (&mut result, this.set.take()) {
            response.headers_mut().insert(name, id);
        }
        Poll::Ready(result)
    }
}

/// The id that came with a request, if there is exactly one and it is harmless.
fn own<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a HeaderValue> {
    let mut all = headers.get_all(name).iter();
    let only = all.next().filter(|id| valid(id.as_bytes()))?;
    all.next().is_none().then_some(only)
}

fn valid(id: &[u8]) -> bool {
    (1..=128).contains(&id.len()) && id.iter().all(|c| c.is_ascii_alphanumeric() || b"._~+/=-".contains(c))
}

fn fresh() -> HeaderValue {
    let mut text = Uuid::encode_buffer();
    let text: &str = Uuid::now_v7().hyphenated().encode_lower(&mut text);
    HeaderValue::from_str(text).expect("a UUID is visible ASCII")
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use proptest::prelude::*;
    use tower::{ServiceExt, service_fn};

    use super::*;

    /// What the upstream and the client see of a request with these ids.
    async fn ids(trust: bool, sent: &[&str]) -> (Vec<String>, String) {
        let texts = |headers: &HeaderMap| -> Vec<String> {
            headers.get_all(X_REQUEST_ID).iter().map(|id| id.to_str().unwrap().to_owned()).collect()
        };
        let upstream = service_fn(move |request: Request<()>| async move {
            let id = request.extensions().get::<RequestId>().unwrap().0.clone();
            assert_eq!(texts(request.headers()), [id.to_str().unwrap()]);
            Ok::<_, Infallible>(Response::new(texts(request.headers())))
        });
        let service = RequestIdLayer::new(&Config { trust, ..Config::default() }).layer(upstream);
        let mut request = Request::new(());
        for id in sent {
            request.headers_mut().append(X_REQUEST_ID, HeaderValue::from_str(id).unwrap());
        }
        let response = service.oneshot(request).await.unwrap();
        let back = texts(response.headers()).concat();
        (response.into_body(), back)
    }

    #[tokio::test]
    async fn a_harmless_id_is_kept() {
        let (upstream, back) = ids(true, &["Root=1-67891233/abc_~+."]).await;
        assert_eq!(upstream, ["Root=1-67891233/abc_~+."]);
        assert_eq!(back, upstream[0]);
    }

    #[tokio::test]
    async fn anything_else_is_replaced() {
        let long = "x".repeat(129);
        for sent in [&[][..], &[""], &["a b"], &["a\"b"], &["a,b"], &[&long], &["a", "b"]] {
            let (upstream, back) = ids(true, sent).await;
            assert!(Uuid::parse_str(&back).is_ok_and(|id| id.get_version_num() == 7), "{sent:?} became {back}");
            assert_eq!(upstream, [back]);
        }
        let (_, back) = ids(false, &["abc"]).await;
        assert_ne!(back, "abc", "the peer is not trusted");
    }

    proptest! {
        #[test]
        fn what_is_kept_cannot_forge_a_log_line(id: Vec<u8>) {
            if valid(&id) {
                prop_assert!(!id.iter().any(|c| c.is_ascii_control() || b" \"\\,;".contains(c)));
            }
        }
    }
}
