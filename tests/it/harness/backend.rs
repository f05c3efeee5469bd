//! Backends that do as the test tells them, when it tells them.

use std::{
    convert::Infallible,
    future::poll_fn,
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use hyper::{body::Incoming, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo};
use parking_lot::Mutex;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpListener,
    sync::{mpsc, oneshot},
    task::JoinSet,
};

use super::{Message, Wire, within};

/// A backend of raw sockets: the test accepts each connection and plays the server itself.
pub struct Backend {
    listener: TcpListener,
}

impl Backend {
    pub async fn start() -> Self {
        Self { listener: TcpListener::bind("127.0.0.1:0").await.unwrap() }
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address())
    }

    /// The next connection.
    pub async fn accept(&self) -> Wire {
        let (stream, _) = within("a connection from the proxy", self.listener.accept()).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Wire::new(stream)
    }

    /// The next connection and the head of the request on it.
    pub async fn accept_head(&self) -> (Wire, super::Head) {
        let mut wire = self.accept().await;
        let head = wire.head().await;
        (wire, head)
    }

    /// A connection that is already there.
    pub async fn accepted(&self) -> Option<Wire> {
        poll_fn(|cx| match self.listener.poll_accept(cx) {
            Poll::Ready(accepted) => Poll::Ready(Some(Wire::new(accepted.unwrap().0))),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    /// An address where nobody listens.
    pub async fn nowhere() -> String {
        Self::start().await.url()
    }
}

/// A backend that answers every request at once, with the same bytes or by a script, and keeps what it was asked.
///
/// It reads strictly: a request whose bytes two servers could read in two ways counts as [`Recorded::Ambiguous`].
pub struct Recorder {
    address: SocketAddr,
    requests: Arc<Mutex<Vec<Recorded>>>,
    count: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

type Script = Arc<dyn Fn(usize, &Message) -> Bytes + Send + Sync>;

#[derive(Clone)]
struct Serving {
    script: Script,
    kept: Option<Arc<Mutex<Vec<Recorded>>>>,
    count: Arc<AtomicUsize>,
}

/// What a [`Recorder`] was asked.
#[derive(Debug, Clone)]
pub enum Recorded {
    Request(Message),
    /// A request that ended before its end, which no reader takes for one.
    Cut,
    /// Not one unambiguous request; says why.
    Ambiguous(String),
}

impl Recorder {
    /// Answers `200 OK` with the body `ok`.
    pub async fn ok() -> Self {
        Self::answering("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 2\r\n\r\nok").await
    }

    pub async fn answering(answer: impl Into<Bytes>) -> Self {
        let answer = answer.into();
        Self::scripted(move |_, _| answer.clone()).await
    }

    /// Answers by what `script` makes of how many requests there were before, and of the request.
    pub async fn scripted<A: Into<Bytes>>(script: impl Fn(usize, &Message) -> A + Send + Sync + 'static) -> Self {
        Self::begin(Arc::new(move |before, request| script(before, request).into()), true).await
    }

    /// As [`answering`](Self::answering), for so many requests that none of them can be kept: they are counted.
    pub async fn counting(answer: impl Into<Bytes>) -> Self {
        let answer = answer.into();
        Self::begin(Arc::new(move |_, _| answer.clone()), false).await
    }

    async fn begin(script: Script, keeps: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let mut tasks = JoinSet::new();
        let count = Arc::new(AtomicUsize::new(0));
        let serving = Serving { script, kept: keeps.then(|| Arc::clone(&requests)), count: Arc::clone(&count) };
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                connections.spawn(Self::serve(Wire::new(stream), serving.clone()));
            }
        });
        Self { address, requests, count, _tasks: tasks }
    }

    async fn serve(mut wire: Wire, Serving { script, kept, count }: Serving) {
        let keep = |recorded| {
            if let Some(kept) = &kept {
                kept.lock().push(recorded);
            }
        };
        while wire.another().await {
            // The strict reader panics, which a task of its own keeps from ending this one.
            let mut reading = JoinSet::new();
            reading.spawn(async move {
                let request = wire.request().await;
                (wire, request)
            });
            let answer = match reading.join_next().await.unwrap() {
                Ok((read, request)) => {
                    wire = read;
                    let answer = script(count.fetch_add(1, Ordering::Relaxed), &request);
                    keep(Recorded::Request(request));
                    answer
                }
                Err(panic) => {
                    let why = match panic.into_panic().downcast::<String>() {
                        Ok(why) => *why,
                        Err(_) => "unreadable".to_owned(),
                    };
                    let cut = ["the connection ended", "no reset"].iter().any(|ended| why.contains(ended));
                    keep(if cut { Recorded::Cut } else { Recorded::Ambiguous(why) });
                    return;
                }
            };
            if wire.try_send(&answer).await.is_err() {
                return;
            }
        }
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// All that it was asked so far and in full; panics where something was ambiguous.
    pub fn requests(&self) -> Vec<Message> {
        let requests = self.requests.lock().clone();
        requests
            .into_iter()
            .filter_map(|recorded| match recorded {
                Recorded::Request(request) => Some(request),
                Recorded::Cut => None,
                Recorded::Ambiguous(why) => panic!("an ambiguous request went upstream: {why}"),
            })
            .collect()
    }

    /// How much it was asked so far.
    pub fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// The only request that it was asked.
    pub fn only(&self) -> Message {
        let mut requests = self.requests();
        assert_eq!(requests.len(), 1, "exactly one request goes upstream: {requests:?}");
        requests.remove(0)
    }
}

/// A backend over HTTP/2 without TLS, extended CONNECT included. The test answers each request.
pub struct Http2Backend {
    address: Option<SocketAddr>,
    exchanges: tokio::sync::Mutex<mpsc::UnboundedReceiver<Exchange>>,
    _tasks: JoinSet<()>,
}

/// A request that waits for the test's answer.
pub struct Exchange {
    pub request: Request<Incoming>,
    answer: oneshot::Sender<Response<TestBody>>,
}

impl Http2Backend {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (found, exchanges) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                stream.set_nodelay(true).unwrap();
                connections.spawn(Self::serve(stream, found.clone()));
            }
        });
        Self { address: Some(address), exchanges: tokio::sync::Mutex::new(exchanges), _tasks: tasks }
    }

    /// Serves one connection that the test has accepted itself.
    pub fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (found, exchanges) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(Self::serve(stream, found));
        Self { address: None, exchanges: tokio::sync::Mutex::new(exchanges), _tasks: tasks }
    }

    async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin, found: mpsc::UnboundedSender<Exchange>) {
        let service = service_fn(move |request| {
            let (answer, answered) = oneshot::channel();
            found.send(Exchange { request, answer }).ok();
            async move {
                match answered.await {
                    Ok(response) => Ok::<_, Infallible>(response),
                    Err(_) => std::future::pending().await,
                }
            }
        });
        hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .enable_connect_protocol()
            .serve_connection(TokioIo::new(stream), service)
            .await
            .ok();
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address.expect("it listens"))
    }

    /// The next request, whichever connection it comes over.
    pub async fn next(&self) -> Exchange {
        within("a request from the proxy", async { self.exchanges.lock().await.recv().await }).await.unwrap()
    }
}

impl Exchange {
    /// Sends the head; the body follows through the returned end.
    pub fn answer(self, head: Response<()>) -> BodySender {
        let (sender, body) = body();
        assert!(self.answer.send(head.map(|()| body)).is_ok(), "the proxy still waits for its answer");
        sender
    }

    /// Waits until the proxy takes the request back before it is answered.
    pub async fn cancelled(&mut self) {
        within("the request to be cancelled", self.answer.closed()).await;
    }
}

/// A body whose frames the test sends one by one. Dropped without [`BodySender::finish`], it breaks off.
pub struct BodySender(Option<mpsc::Sender<Result<Frame<Bytes>, BrokenOff>>>);

/// A body in a test's hands.
pub struct TestBody(mpsc::Receiver<Result<Frame<Bytes>, BrokenOff>>);

/// Why a test's body breaks off: the test wants it so.
#[derive(Debug)]
pub struct BrokenOff;

/// A body and the end that feeds it.
pub fn body() -> (BodySender, TestBody) {
    let (sender, receiver) = mpsc::channel(1);
    (BodySender(Some(sender)), TestBody(receiver))
}

impl BodySender {
    pub async fn data(&self, data: impl Into<Bytes>) {
        assert!(self.frame(Frame::data(data.into())).await, "the reader of the body is there");
    }

    /// As [`data`](Self::data); whether the reader of the body is still there.
    pub async fn try_data(&self, data: impl Into<Bytes>) -> bool {
        self.frame(Frame::data(data.into())).await
    }

    pub async fn trailers(self, trailers: HeaderMap) {
        assert!(self.frame(Frame::trailers(trailers)).await);
        self.finish();
    }

    async fn frame(&self, frame: Frame<Bytes>) -> bool {
        self.0.as_ref().unwrap().send(Ok(frame)).await.is_ok()
    }

    /// Ends the body in order.
    pub fn finish(mut self) {
        self.0.take();
    }

    /// Waits until nobody reads the body any more.
    pub async fn cancelled(&self) {
        within("the body to be cancelled", self.0.as_ref().unwrap().closed()).await;
    }
}

impl Drop for BodySender {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            // Nobody reads or the frame before was not fetched yet: then a task sees to it.
            if let Err(mpsc::error::TrySendError::Full(broken)) = sender.try_send(Err(BrokenOff)) {
                tokio::spawn(async move { sender.send(broken).await });
            }
        }
    }
}

impl Body for TestBody {
    type Data = Bytes;
    type Error = BrokenOff;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BrokenOff>>> {
        self.0.poll_recv(cx)
    }

    /// So that a message without a body is sent as one.
    fn is_end_stream(&self) -> bool {
        self.0.is_closed() && self.0.is_empty()
    }
}

impl std::fmt::Display for BrokenOff {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("broken off by the test")
    }
}

impl std::error::Error for BrokenOff {}
