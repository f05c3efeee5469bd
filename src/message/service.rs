//! A service whose type does not matter.

use std::{
    fmt, mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tower::{Layer, Service};

use super::{BoxError, Request, Response};

/// A service that a layer may call when it likes, and as often: what is inside of one that waits before it calls, or calls
/// again.
///
/// Everything that fits is one. `Sync` is not asked for: [`BoxCloneService`](tower::util::BoxCloneService) is not.
pub trait CloneService:
    Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + 'static
{
}

impl<S> CloneService for S where
    S: Service<Request, Response = Response, Error: Into<BoxError>, Future: Send> + Clone + Send + 'static
{
}

/// The service that was polled ready, to be called in a future; a clone of it takes its place, to be polled again.
pub fn take_ready<S: Clone>(inner: &mut S) -> S {
    let fresh = inner.clone();
    mem::replace(inner, fresh)
}

/// A service behind one of the joints at which types are erased, as between the route table and a route.
///
/// It is shared, and the service inside is cloned for each call where it stands: tower's own boxes are
/// allocated anew for every clone, which is to say for every request.
///
/// The service inside is not asked whether it is ready. Those of sidegate always are: what they have to say,
/// they say in `call`. One that is not goes in by
/// [`ServiceExt::oneshot`](tower::ServiceExt::oneshot) in a [`service_fn`](tower::service_fn).
#[derive(Clone)]
pub struct HttpService {
    inner: Arc<dyn Erased>,
}

/// The response of an [`HttpService`], to come.
pub type ResponseFuture = Pin<Box<dyn Future<Output = Result<Response, BoxError>> + Send>>;

trait Erased: Send + Sync {
    fn respond(&self, request: Request) -> ResponseFuture;
}

impl<S> Erased for S
where
    S: Service<Request, Response = Response, Error = BoxError, Future: Send + 'static> + Clone + Send + Sync,
{
    fn respond(&self, request: Request) -> ResponseFuture {
        Box::pin(self.clone().call(request))
    }
}

impl HttpService {
    /// Hides the type of `service`.
    pub fn new<S>(service: S) -> Self
    where
        S: Service<Request, Response = Response, Error = BoxError, Future: Send + 'static>
            + Clone
            + Send
            + Sync
            + 'static,
    {
        Self { inner: Arc::new(service) }
    }
}

impl Service<Request> for HttpService {
    type Response = Response;
    type Error = BoxError;
    type Future = ResponseFuture;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request) -> ResponseFuture {
        self.inner.respond(request)
    }
}

/// Puts layers around an [`HttpService`], outermost first, each of which may be absent.
///
/// Each layer that is there is a joint at which types are erased, and costs a request one allocation. With
/// [`option_layer`](tower::ServiceBuilder::option_layer), which costs less, a chain of n layers is a type in which the
/// innermost stands 2ⁿ times: a dozen made the release build three times as long and its debug information 200 MB.
///
/// ```
/// use http::Response;
/// use sidegate::message::{Body, BoxError, Chain, HttpService, Request};
/// use tower::{Service, service_fn, util::MapResponseLayer};
///
/// # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
/// let says = |text| {
///     MapResponseLayer::new(move |mut response: Response<Body>| {
///         response.headers_mut().append("by", http::HeaderValue::from_static(text));
///         response
///     })
/// };
/// let backend = service_fn(|_: Request| async { Ok::<_, BoxError>(Response::new(Body::empty())) });
/// let mut service = Chain::new()
///     .option_layer(Some(says("outer")))
///     .option_layer(false.then(|| says("absent")))
///     .option_layer(Some(says("inner")))
///     .service(HttpService::new(backend));
/// let response = service.call(Request::new(Body::empty())).await.unwrap();
/// assert_eq!(response.headers().get_all("by").iter().collect::<Vec<_>>(), ["inner", "outer"]);
/// # });
/// ```
#[derive(Default)]
pub struct Chain {
    layers: Vec<Wrap>,
}

type Wrap = Box<dyn FnOnce(HttpService) -> HttpService>;

impl Chain {
    /// A chain without layers.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The chain with `layer`, if there is one, inside of those that it has.
    #[must_use]
    pub fn option_layer<L>(mut self, layer: Option<L>) -> Self
    where
        L: Layer<HttpService> + 'static,
        L::Service: Service<Request, Response = Response, Error = BoxError, Future: Send + 'static>
            + Clone
            + Send
            + Sync
            + 'static,
    {
        if let Some(layer) = layer {
            self.layers.push(Box::new(move |inner| HttpService::new(layer.layer(inner))));
        }
        self
    }

    /// The layers around `inner`.
    #[must_use]
    pub fn service(self, inner: HttpService) -> HttpService {
        self.layers.into_iter().rev().fold(inner, |inner, wrap| wrap(inner))
    }
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Chain").field("layers", &self.layers.len()).finish()
    }
}

impl fmt::Debug for HttpService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpService").finish_non_exhaustive()
    }
}
