//! A service whose type does not matter.

use std::{
    fmt,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tower::Service;

use super::{BoxError, Request, Response};

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

impl fmt::Debug for HttpService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HttpService").finish_non_exhaustive()
    }
}
