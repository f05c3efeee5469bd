//! Errors: row 4 of the request path. Everything that sidegate answers for itself looks the same.
//!
//! Layers inside return their [`Error`] unrendered, so that retries, fallbacks and breakers can tell it from
//! an answer of the backend's. Here alone it becomes a response: `application/problem+json` (RFC 9457), or
//! OpenAI's error object where its SDKs listen, or, for a gRPC request, a trailers-only answer; with
//! `Proxy-Status` (RFC 9209). The client is told the kind and its sentence; the cause goes to the log. A
//! panic in a layer is an `internal` error, not a dead connection.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::{layers::errors::ErrorsLayer, message::{Body, BoxError, Error, Kind}};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(ErrorsLayer::default())
//!     .service(service_fn(|_: Request<()>| async { Err::<Response<Body>, BoxError>(Error::from(Kind::NoRoute).into()) }));
//! let response = service.oneshot(Request::new(())).await.unwrap();
//! assert_eq!(response.status(), 404);
//! assert_eq!(response.headers()["content-type"], "application/problem+json");
//! # });
//! ```

use std::{
    any::Any,
    convert::Infallible,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{
    HeaderName, HeaderValue, Request, Response, StatusCode,
    header::{CACHE_CONTROL, CONNECTION, CONTENT_TYPE, RETRY_AFTER},
};
use pin_project_lite::pin_project;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tower::{Layer, Service};

use crate::{
    message::{BoxError, Error, Fault, Form, Kind, headers::PROXY_STATUS},
    telemetry::{exchange::Subject, log::chain},
};

/// How sidegate's own answers look on a route. Key `errors`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[schemars(rename = "Errors")]
pub enum Config {
    /// `application/problem+json`, RFC 9457. The default.
    #[default]
    Problem,
    /// OpenAI's `{"error": {"message", "type", "code"}}`, which its SDKs understand.
    Openai,
}

impl Config {
    /// How the documents look.
    #[must_use]
    pub const fn form(self) -> Form {
        match self {
            Self::Problem => Form::Problem,
            Self::Openai => Form::Openai,
        }
    }
}

/// Makes responses of errors and panics: see the [module](self).
#[derive(Debug, Clone, Copy, Default)]
pub struct ErrorsLayer {
    format: Config,
}

impl ErrorsLayer {
    /// A layer that answers in `format`.
    #[must_use]
    pub const fn new(format: Config) -> Self {
        Self { format }
    }
}

impl<S> Layer<S> for ErrorsLayer {
    type Service = Errors<S>;

    fn layer(&self, inner: S) -> Errors<S> {
        Errors { inner, format: self.format }
    }
}

/// The service of [`ErrorsLayer`]. It does not fail.
#[derive(Debug, Clone)]
pub struct Errors<S> {
    inner: S,
    format: Config,
}

impl<S, ReqBody, ResBody> Service<Request<ReqBody>> for Errors<S>
where
    S: Service<Request<ReqBody>, Response = Response<ResBody>, Error: Into<BoxError>>,
    ResBody: From<Bytes>,
{
    type Response = Response<ResBody>;
    type Error = Infallible;
    type Future = ResponseFuture<S::Future>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        // Readiness is decided in `call` everywhere below; what would fail here fails there.
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let about = About {
            format: self.format,
            grpc: request
                .headers()
                .get(CONTENT_TYPE)
                .is_some_and(|value| value.as_bytes().starts_with(b"application/grpc")),
            http1: request.version() <= http::Version::HTTP_11,
            asked: Subject::of(&request),
        };
        let inner = catch_unwind(AssertUnwindSafe(|| self.inner.call(request)));
        let (inner, panic) = match inner {
            Ok(inner) => (Some(inner), None),
            Err(panic) => (None, Some(panic)),
        };
        ResponseFuture { inner, panic, about }
    }
}

pin_project! {
    /// The response of [`Errors`].
    pub struct ResponseFuture<F> {
        #[pin]
        inner: Option<F>,
        panic: Option<Box<dyn Any + Send>>,
        about: About,
    }
}

impl<F, B, E> Future for ResponseFuture<F>
where
    F: Future<Output = Result<Response<B>, E>>,
    B: From<Bytes>,
    E: Into<BoxError>,
{
    type Output = Result<Response<B>, Infallible>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let mut this = self.project();
        let polled = match this.inner.as_mut().as_pin_mut() {
            // After a panic the future is not polled again: it is dropped with us.
            Some(inner) => catch_unwind(AssertUnwindSafe(|| inner.poll(cx))),
            None => Err(this.panic.take().unwrap_or_else(|| Box::new("polled after its end"))),
        };
        let error = match polled {
            Ok(Poll::Pending) => return Poll::Pending,
            Ok(Poll::Ready(Ok(response))) => return Poll::Ready(Ok(response)),
            Ok(Poll::Ready(Err(error))) => error.into(),
            Err(panic) => Error::new(Kind::Internal, message(&*panic)).into(),
        };
        Poll::Ready(Ok(this.about.answer(&*error).map(B::from)))
    }
}

/// What an answer needs to know of its request.
#[derive(Debug)]
struct About {
    format: Config,
    grpc: bool,
    http1: bool,
    asked: Subject,
}

impl About {
    fn answer(&self, error: &(dyn std::error::Error + 'static)) -> Response<Bytes> {
        let found = Error::find(error);
        let kind = found.map_or(Kind::Internal, Error::kind);
        if let Some(exchange) = self.asked.exchange() {
            let mut facts = exchange.facts();
            facts.error = Some(kind.slug());
            facts.cause = Some(chain(error));
        }
        if kind.fault() == Fault::Sidegate {
            tracing::error!(request_id = self.asked.request_id(), error = chain(error), "request failed");
        }
        let mut response = if self.grpc { grpc(kind) } else { self.json(kind, found.map_or(&[], Error::members)) };
        let headers = response.headers_mut();
        let status = format!("sidegate; error={}", kind.proxy_status());
        headers.insert(PROXY_STATUS, HeaderValue::try_from(status).expect("tokens are visible ASCII"));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
        if let Some(after) = found.and_then(Error::retry_after) {
            // Rounded up: who comes at that second must not be told to wait once more.
            let seconds = after.as_secs() + u64::from(after.subsec_nanos() > 0);
            headers.insert(RETRY_AFTER, HeaderValue::from(seconds.max(1)));
        }
        for (name, value) in found.map(Error::fields).unwrap_or_default() {
            headers.append(name, value.clone());
        }
        if self.http1 && kind.closes_connection() {
            headers.insert(CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    fn json(&self, kind: Kind, members: &[(&'static str, Value)]) -> Response<Bytes> {
        let form = self.format.form();
        let mut body = form.document(kind, self.asked.path(), self.asked.request_id());
        form.extend(&mut body, members);
        let mut response = Response::new(Bytes::from(body.to_string()));
        *response.status_mut() = kind.status();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(form.content_type()));
        response
    }
}

/// A trailers-only answer: gRPC's clients look at `grpc-status`, not at the HTTP status.
fn grpc(kind: Kind) -> Response<Bytes> {
    const GRPC_STATUS: HeaderName = HeaderName::from_static("grpc-status");
    const GRPC_MESSAGE: HeaderName = HeaderName::from_static("grpc-message");
    let mut response = Response::new(Bytes::new());
    *response.status_mut() = StatusCode::OK;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    headers.insert(GRPC_STATUS, HeaderValue::from(u16::from(kind.grpc_status())));
    headers.insert(GRPC_MESSAGE, HeaderValue::from_static(kind.detail()));
    response
}

/// What a panic said, for the log.
fn message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    format!("panic: {}", text.unwrap_or("without a message"))
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;
    use serde_json::json;
    use tower::{ServiceExt, service_fn};

    use super::*;
    use crate::message::{Body, RequestId};

    async fn answer(
        format: Config,
        request: Request<()>,
        error: fn() -> BoxError,
    ) -> (Response<()>, serde_json::Value) {
        let service =
            ErrorsLayer::new(format).layer(service_fn(move |_| async move { Err::<Response<Body>, _>(error()) }));
        let (head, body) = service.oneshot(request).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (Response::from_parts(head, ()), serde_json::from_slice(&body).unwrap_or_default())
    }

    fn request(uri: &str) -> Request<()> {
        let id = RequestId(HeaderValue::from_static("id-1"));
        Request::builder().uri(uri).extension(id).body(()).unwrap()
    }

    fn reset() -> BoxError {
        Error::new(Kind::UpstreamReset, "10.1.2.3:80 said secret").into()
    }

    #[tokio::test]
    async fn an_error_is_a_problem_document_without_its_cause() {
        let (head, body) = answer(Config::Problem, request("/a?key=secret"), reset).await;
        assert_eq!(head.status(), StatusCode::BAD_GATEWAY);
        assert_eq!(head.headers()[PROXY_STATUS], "sidegate; error=http_response_incomplete");
        let expected = json!({
            "type": "urn:sidegate:problem:upstream-reset", "title": "Bad Gateway", "status": 502, "instance": "/a",
            "detail": "the upstream broke off or did not speak HTTP", "request_id": "id-1",
        });
        assert_eq!(body, expected);
    }

    #[tokio::test]
    async fn openai_sdks_get_their_error_object() {
        let (head, body) = answer(Config::Openai, request("/v1/chat/completions"), reset).await;
        assert_eq!(head.headers()[CONTENT_TYPE], "application/json");
        assert_eq!(
            (&body["error"]["code"], &body["error"]["type"]),
            (&"upstream-reset".into(), &"server_error".into())
        );
    }

    #[tokio::test]
    async fn grpc_clients_get_a_trailers_only_answer() {
        let mut request = request("/pkg.Service/Call");
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc+proto"));
        let (head, _) = answer(Config::Problem, request, reset).await;
        assert_eq!((head.status(), &head.headers()["grpc-status"]), (StatusCode::OK, &HeaderValue::from_static("14")));
    }

    #[tokio::test]
    async fn a_request_whose_framing_is_in_doubt_ends_its_connection() {
        let (head, _) = answer(Config::Problem, request("/"), || Error::from(Kind::BadRequest("x")).into()).await;
        assert_eq!(head.headers()[CONNECTION], "close");
        let (head, _) = answer(Config::Problem, request("/"), || Error::from(Kind::NoRoute).into()).await;
        assert!(!head.headers().contains_key(CONNECTION));
    }

    #[tokio::test]
    async fn a_panic_is_an_internal_error() {
        let (head, body) = answer(Config::Problem, request("/"), || panic!("secret")).await;
        assert_eq!(head.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(body["detail"], "the proxy failed");
    }
}
