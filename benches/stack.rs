//! What each layer costs: one at a time around a service that answers at once, then all of them as `stack.rs`
//! puts them together, then the frames of a stream.
//!
//! `cargo bench --bench stack`, or with a name: `cargo bench --bench stack -- request/hygiene`.
//!
//! Every figure of the `request` group holds the same floor, which is measured as `nothing`: the clone of the
//! service, its call, and reading the response to its end. What a layer costs is its figure less that one.
//! A figure of the `frames` group is for a response of [`FRAMES`] frames, each as small as a token. Nothing
//! here waits, so no runtime turns: it is only there for the timers.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    hint::black_box,
    path::PathBuf,
    pin::pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main, measurement::WallTime,
};
use futures_util::{FutureExt, stream, task::noop_waker_ref};
use http::{Response, header::CONTENT_TYPE};
use http_body::{Body as HttpBody, Frame};
use http_body_util::StreamBody;
use prometheus_client::metrics::counter::Counter;
use sidegate::{
    admin::{Access, Admin, health::Readiness},
    config::load::Sources,
    layers::{
        access_log::AccessLogLayer,
        body_limit::BodyLimitLayer,
        deadline::DeadlineLayer,
        errors::ErrorsLayer,
        fallback::{Entry, FallbackLayer, Target},
        hygiene::{self, HygieneLayer},
        request_id::{self, RequestIdLayer},
        retry::{self, Budget, RetryLayer},
        security_headers::{self, SecurityHeadersLayer},
        timeouts::{ClientBodyIdleLayer, FirstByteLayer, IdleLayer},
    },
    message::{Body, BoxError, Connection, HttpService, Peer, Request},
    registry::Registry,
    settings::Settings,
    stack::Stack,
    telemetry::{log, metrics::Metrics},
};
use tower::{Layer, Service, ServiceBuilder, ServiceExt};

/// The binary's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Frames of a streamed response.
const FRAMES: u32 = 256;

const LONG: Duration = Duration::from_secs(300);

/// A request as an OpenAI client sends it.
fn request() -> Request {
    let fields = [
        ("host", "api.example.com"),
        ("accept", "application/json"),
        ("accept-encoding", "gzip, deflate"),
        ("authorization", "Bearer sk-0123456789abcdef0123456789abcdef"),
        ("content-type", "application/json"),
        ("user-agent", "OpenAI/Python 1.99.0"),
        ("x-stainless-lang", "python"),
        ("x-stainless-retry-count", "0"),
        ("content-length", "2"),
    ];
    let mut request = http::Request::post("/v1/chat/completions?stream=true");
    for (name, value) in fields {
        request = request.header(name, value);
    }
    let connection = Connection::new(Peer::tcp(([192, 0, 2, 1], 40_000).into()), false);
    request.extension(connection).body(Body::from("{}")).expect("the parts are legal")
}

/// Answers at once with a short body.
fn short() -> impl Service<Request, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + Send + Sync {
    tower::service_fn(|request: Request| {
        black_box(request);
        answer(Body::from(r#"{"object":"list"}"#))
    })
}

/// Answers at once with many small frames, all of which are there.
fn streamed() -> impl Service<Request, Response = Response<Body>, Error = BoxError, Future: Send> + Clone + Send + Sync
{
    tower::service_fn(|_: Request| {
        let frames = (0..FRAMES).map(|_| Ok::<_, Infallible>(Frame::data(Bytes::from_static(b"data: {\"i\":1}\n\n"))));
        answer(Body::new(StreamBody::new(stream::iter(frames))))
    })
}

fn answer(body: Body) -> Ready<Result<Response<Body>, BoxError>> {
    let mut response = Response::new(body);
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static("application/json"));
    ready(Ok(response))
}

/// The whole stack with its defaults, around an upstream that answers by itself.
fn whole(log: log::Writer, metrics: Metrics) -> Stack {
    let environment = [("STATUS", "200"), ("TEXT", "hello")];
    let environment =
        environment.map(|(key, value)| (format!("SIDEGATE_UPSTREAMS__FIXED__RESPOND__{key}"), value.into()));
    let sources = Sources { environment: environment.into(), ..Sources::default() };
    let (settings, _) = Settings::load(&sources).expect("the settings are legal");
    let registry = Arc::new(Registry::new(metrics, log));
    let (admin, _) = Admin::new(registry.clone(), Readiness::default(), Access::default());
    Stack::build(&settings, &registry, &admin).expect("the stack can be built")
}

/// Calls a clone of the service, as each request does, and reads the response to its end.
fn drive<S, B>(service: &S, request: Request)
where
    S: Service<Request, Response = Response<B>, Error: Into<BoxError>> + Clone,
    B: HttpBody<Error: Into<BoxError>>,
{
    let Some(Ok(response)) = service.clone().oneshot(request).now_or_never() else {
        panic!("every layer answers at once");
    };
    let mut body = pin!(response.into_body());
    let mut context = Context::from_waker(noop_waker_ref());
    loop {
        match body.as_mut().poll_frame(&mut context) {
            Poll::Ready(Some(Ok(frame))) => drop(black_box(frame)),
            Poll::Ready(None) => break,
            Poll::Ready(Some(Err(_))) | Poll::Pending => panic!("every frame is there"),
        }
    }
}

fn measure<S, B>(group: &mut BenchmarkGroup<'_, WallTime>, name: &str, service: &S)
where
    S: Service<Request, Response = Response<B>, Error: Into<BoxError>> + Clone,
    B: HttpBody<Error: Into<BoxError>>,
{
    group.bench_function(name, |bencher| {
        bencher.iter_batched(request, |request| drive(service, request), BatchSize::SmallInput);
    });
}

fn layers(criterion: &mut Criterion) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime can be built");
    let _timers = runtime.enter();
    let config =
        log::Config { format: log::Format::Json, file: Some(PathBuf::from("/dev/null")), ..Default::default() };
    let (writer, _guard) = log::open(&config, Counter::default()).expect("/dev/null can be written to");
    let metrics = Metrics::new();
    let hygiene = HygieneLayer::new(&hygiene::Config::default(), hygiene::Limits::default(), &hygiene::pseudonym());
    let security_headers = SecurityHeadersLayer::new(&security_headers::Config::default());
    let access_log = AccessLogLayer::new(Some(writer.clone()), metrics.clone());
    let retry = RetryLayer::new(&retry::Config::default(), Budget::default(), metrics.retries("api"));
    let target = Target::fixed(&Entry::to("offline"), HttpService::new(short()));
    let fallback = FallbackLayer::new("route", "api", vec![target], 1 << 20, &metrics);

    let mut group = criterion.benchmark_group("request");
    measure(&mut group, "nothing", &short());
    measure(&mut group, "request_id", &RequestIdLayer::new(&request_id::Config::default()).layer(short()));
    measure(&mut group, "access_log/metrics_only", &AccessLogLayer::new(None, metrics.clone()).layer(short()));
    measure(&mut group, "access_log", &access_log.layer(short()));
    measure(&mut group, "security_headers", &security_headers.layer(short()));
    measure(&mut group, "errors", &ErrorsLayer::default().layer(short()));
    measure(&mut group, "hygiene", &hygiene.layer(short()));
    measure(&mut group, "body_limit", &BodyLimitLayer::new(1 << 20).layer(short()));
    measure(&mut group, "client_body_idle", &ClientBodyIdleLayer::new(LONG).layer(short()));
    measure(&mut group, "deadline", &DeadlineLayer::new(LONG).layer(short()));
    // Of requests that need neither.
    measure(&mut group, "fallback", &fallback.layer(short()));
    measure(&mut group, "retry", &retry.layer(short()));
    measure(&mut group, "first_byte", &FirstByteLayer::new(LONG).layer(short()));
    measure(&mut group, "idle", &IdleLayer::new(Some(LONG)).layer(short()));
    let stack = whole(writer, metrics);
    let stack = tower::service_fn(move |request| stack.call(request).map(Ok::<_, Infallible>));
    measure(&mut group, "all", &stack);
    group.finish();

    let mut group = criterion.benchmark_group("frames");
    group.throughput(Throughput::Elements(FRAMES.into()));
    measure(&mut group, "nothing", &streamed());
    measure(&mut group, "access_log", &access_log.layer(streamed()));
    measure(&mut group, "deadline", &DeadlineLayer::new(LONG).with_streams(true).layer(streamed()));
    measure(&mut group, "idle", &IdleLayer::new(Some(LONG)).layer(streamed()));
    let front = ServiceBuilder::new()
        .layer(RequestIdLayer::new(&request_id::Config::default()))
        .layer(access_log)
        .layer(security_headers)
        .layer(ErrorsLayer::default())
        .layer(hygiene)
        .map_response(|response: Response<_>| response.map(Body::new))
        .layer(IdleLayer::new(Some(LONG)))
        .service(streamed());
    measure(&mut group, "front_and_idle", &front);
    group.finish();
}

criterion_group! {
    name = stack;
    // Short: the differences that matter here are not subtle.
    config = Criterion::default()
        .sample_size(50)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
        .without_plots();
    targets = layers
}
criterion_main!(stack);
