//! Body limit: row 9 of the request path.
//!
//! A request that announces too much is refused before a byte of it is read; one that does not announce its
//! length is counted while it passes, and refused when it has gone over. Off until asked for.
//!
//! ```
//! use http::{Request, Response};
//! use sidegate::{layers::body_limit::BodyLimitLayer, message::{Body, BoxError, Error, Kind}};
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(BodyLimitLayer::new(3))
//!     .service(service_fn(|_: Request<Body>| async { Ok::<_, BoxError>(Response::new(())) }));
//! let error = service.oneshot(Request::new(Body::from("four"))).await.unwrap_err();
//! assert_eq!(Error::find(&*error).map(Error::kind), Some(Kind::BodyTooLarge));
//! # });
//! ```

use std::{
    future::{Ready, ready},
    task::{Context, Poll},
};

use bytes::Bytes;
use futures_util::future::Either;
use http::Request;
use http_body::Body as HttpBody;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tower::{Layer, Service};

use crate::{
    config::units::ByteSize,
    message::{Body, BoxError, Error, Kind},
};

/// How large a request's body may be. Section `body_limit`; `off` by default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "BodyLimit")]
pub struct Config {
    /// The most bytes of a body, as it is transferred: `10MiB`. `0` allows none.
    pub max: ByteSize,
}

/// Refuses bodies over a size: see the [module](self).
///
/// # Errors
/// [`Kind::BodyTooLarge`], 413; the connection is closed.
#[derive(Debug, Clone, Copy)]
pub struct BodyLimitLayer {
    max: u64,
}

impl BodyLimitLayer {
    /// A layer that allows `max` bytes.
    #[must_use]
    pub const fn new(max: u64) -> Self {
        Self { max }
    }
}

impl<S> Layer<S> for BodyLimitLayer {
    type Service = BodyLimit<S>;

    fn layer(&self, inner: S) -> BodyLimit<S> {
        BodyLimit { inner, max: self.max }
    }
}

/// The service of [`BodyLimitLayer`].
#[derive(Debug, Clone)]
pub struct BodyLimit<S> {
    inner: S,
    max: u64,
}

impl<S, ReqBody> Service<Request<ReqBody>> for BodyLimit<S>
where
    S: Service<Request<Body>, Error = BoxError>,
    ReqBody: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
{
    type Response = S::Response;
    type Error = BoxError;
    type Future = Either<S::Future, Ready<Result<S::Response, BoxError>>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<ReqBody>) -> Self::Future {
        let size = request.body().size_hint();
        if size.lower() > self.max {
            return Either::Right(ready(Err(Error::from(Kind::BodyTooLarge).into())));
        }
        let max = usize::try_from(self.max).unwrap_or(usize::MAX);
        Either::Left(self.inner.call(request.map(|body| {
            if size.upper().is_some_and(|upper| upper <= self.max) {
                Body::new(body)
            } else {
                Body::new(Limited::new(body, max).map_err(too_large))
            }
        })))
    }
}

fn too_large(error: BoxError) -> BoxError {
    if error.is::<LengthLimitError>() { Error::from(Kind::BodyTooLarge).into() } else { error }
}

#[cfg(test)]
mod tests {
    use futures_util::stream;
    use http::Response;
    use http_body::Frame;
    use http_body_util::StreamBody;
    use tower::{ServiceExt, service_fn};

    use super::*;

    async fn sent(body: Body, max: u64) -> Result<Bytes, Option<Kind>> {
        let reads = service_fn(|request: Request<Body>| async {
            request.into_body().collect().await.map(|all| Response::new(all.to_bytes()))
        });
        let result = BodyLimitLayer::new(max).layer(reads).oneshot(Request::new(body)).await;
        result.map(Response::into_body).map_err(|error| Error::find(&*error).map(Error::kind))
    }

    #[tokio::test]
    async fn a_body_of_unknown_length_is_counted() {
        let frames = || {
            let frames = ["ab", "cd"].map(|s| Ok::<_, std::convert::Infallible>(Frame::data(Bytes::from(s))));
            Body::new(StreamBody::new(stream::iter(frames)))
        };
        assert_eq!(sent(frames(), 4).await, Ok("abcd".into()));
        assert_eq!(sent(frames(), 3).await, Err(Some(Kind::BodyTooLarge)));
    }

    #[tokio::test]
    async fn the_limit_itself_is_allowed() {
        assert_eq!(sent("abcd".into(), 4).await, Ok("abcd".into()));
        assert_eq!(sent("abcd".into(), 3).await, Err(Some(Kind::BodyTooLarge)));
        assert_eq!(sent(Body::empty(), 0).await, Ok(Bytes::new()));
    }
}
