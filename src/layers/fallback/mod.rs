//! Fallback: row 16 of the request path. Another upstream steps in where the route's own failed.
//!
//! The upstreams of the list are asked in its order, each only after a failure that stands in its `on`, until one
//! answers with anything else, or the list is at its end: then the last answer, or the last error, is the client's.
//! Nothing of a failed answer reaches the client, so no bytes of two upstreams are ever mixed. Once an answer has begun
//! it is the answer; where it breaks off, it is broken off. (An event stream has begun with its first event: see
//! [`Undecided`].)
//!
//! Whether a request may be sent a second time is the file's to say: it does, by naming a fallback, and for any method.
//! A POST to an upstream that timed out may have been acted on. For that, a body is kept while it is sent, up to
//! `replay`. Of a larger one nothing is at hand once a byte has left, and the failure is passed on; unless the next in
//! the list is a fixed answer, which needs no body. An upgrade and `CONNECT` go to the route's own upstream alone.
//!
//! The client's credentials were meant for the first upstream. To the others a request goes without those that
//! [`CREDENTIALS`] names, unless `headers.keep` says otherwise; what is in the query or in a body goes as it is. What the
//! other upstream wants to see is set by `headers`, the path by `path`, members of a JSON body by `json`. A body that
//! cannot be rewritten does not go there as it is: its `model` would mean nothing there. That upstream is passed over.
//!
//! A deadline runs on through all of it. Who answered stands in `Proxy-Status` as `next-hop` (RFC 9209 §2.1.2), in the
//! access line as `upstream` beside `fallback`, and in the metrics.
//!
//! ```
//! use http::{Request, Response, StatusCode};
//! use sidegate::{
//!     layers::fallback::{Entry, FallbackLayer, Target},
//!     message::{Body, BoxError, Error, HttpService, Kind},
//!     telemetry::Metrics,
//! };
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! let offline = HttpService::new(service_fn(|_: Request<Body>| async {
//!     Ok::<_, BoxError>(Response::new(Body::from("The assistant is offline.")))
//! }));
//! let target = Target::fixed(&Entry::to("offline"), offline);
//! let service = ServiceBuilder::new()
//!     .layer(FallbackLayer::new("ask", "api", vec![target], 64 * 1024, &Metrics::new()))
//!     .service(service_fn(|_: Request<Body>| async { Err::<Response<Body>, BoxError>(Error::from(Kind::ConnectFailed).into()) }));
//! let response = service.oneshot(Request::new(Body::empty())).await.unwrap();
//! assert_eq!(response.headers()["proxy-status"], r#"sidegate; next-hop="offline""#);
//! # });
//! ```

mod config;

use std::{
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use futures_util::TryFutureExt;
use http::{HeaderMap, HeaderName, HeaderValue, Uri, request::Parts, uri::PathAndQuery};
use serde_json::{Map, Value};
use tower::{Layer, Service};

pub use self::config::{Config, Entry, Headers, PathText, Prefix, Rewrite};
use crate::{
    config::Failure,
    message::{
        Body, BoxError, CloneService, Error, HttpService, Kind, Replay, Request, Response, Undecided, asks_for_tunnel,
        headers::{CREDENTIALS, PROXY_STATUS},
        json, take_ready,
    },
    telemetry::{Exchange, Metrics, metrics::FallbackMetrics},
};

/// Asks other upstreams after the first: see the [module](self).
#[derive(Debug, Clone)]
pub struct FallbackLayer {
    plan: Arc<Plan>,
}

#[derive(Debug)]
struct Plan {
    own: Arc<str>,
    targets: Vec<Target>,
    replay: usize,
    metrics: FallbackMetrics,
}

impl FallbackLayer {
    /// A layer around the upstream `own` of the route `route`, which then asks `targets` in their order, and keeps up to
    /// `replay` bytes of a request's body for them. Counts in `metrics`.
    #[must_use]
    pub fn new(route: &str, own: &str, targets: Vec<Target>, replay: usize, metrics: &Metrics) -> Self {
        let metrics = metrics.fallbacks(route, [own].into_iter().chain(targets.iter().map(|target| &*target.name)));
        Self { plan: Arc::new(Plan { own: own.into(), targets, replay, metrics }) }
    }
}

impl<S> Layer<S> for FallbackLayer {
    type Service = Fallback<S>;

    fn layer(&self, inner: S) -> Fallback<S> {
        Fallback { inner, plan: self.plan.clone() }
    }
}

/// An upstream to fall back to.
#[derive(Debug)]
pub struct Target {
    name: Arc<str>,
    on: Vec<Failure>,
    service: HttpService,
    /// Whether it answers without looking at the request.
    fixed: bool,
    path: Option<Rewrite>,
    remove: Vec<HeaderName>,
    set: Vec<(HeaderName, HeaderValue)>,
    json: Map<String, Value>,
    proxy_status: HeaderValue,
}

impl Target {
    /// The upstream of `entry`, which is asked as `entry` says.
    ///
    /// # Errors
    /// A secret cannot be read, or cannot stand in a header.
    pub fn new(entry: &Entry, service: HttpService) -> Result<Self, BoxError> {
        let Headers { remove, keep, .. } = &entry.headers;
        let kept = |name: &HeaderName| keep.iter().any(|kept| kept.get() == name);
        let credentials = CREDENTIALS.into_iter().filter(|name| !kept(name));
        let set = entry.headers.fields().map_err(|(key, message)| format!("headers.{key}: {message}"))?;
        Ok(Self {
            fixed: false,
            path: entry.path.clone(),
            remove: remove.iter().map(|name| name.get().clone()).chain(credentials).collect(),
            set,
            json: entry.json.clone(),
            ..Self::fixed(entry, service)
        })
    }

    /// One that gives the same answer whatever it is asked. It needs no body, and nothing is rewritten for it.
    #[must_use]
    pub fn fixed(entry: &Entry, service: HttpService) -> Self {
        let status = HeaderValue::try_from(format!("sidegate; next-hop=\"{}\"", entry.upstream));
        Self {
            name: entry.upstream.as_str().into(),
            on: entry.on.clone(),
            service,
            fixed: true,
            path: None,
            remove: Vec::new(),
            set: Vec::new(),
            json: Map::new(),
            // A name is letters, digits, `_` and `-`.
            proxy_status: status.unwrap_or(HeaderValue::from_static("sidegate")),
        }
    }

    /// The request as it goes here.
    async fn request(&self, head: &Parts, replay: &Replay) -> Result<Request, Refusal> {
        if self.fixed {
            return Ok(Request::from_parts(head.clone(), Body::empty()));
        }
        let rewritten = if self.json.is_empty() { None } else { self.rewritten(&head.headers, replay).await? };
        let mut head = head.clone();
        for name in &self.remove {
            head.headers.remove(name);
        }
        for (name, value) in &self.set {
            head.headers.insert(name, value.clone());
        }
        if let Some(path) = &self.path {
            rewrite(&mut head.uri, path);
        }
        let replay = match rewritten {
            None => replay.clone(),
            Some(text) => {
                json::replaced(&mut head.headers, text.len());
                let limit = text.len();
                let replay = Replay::new(Body::from(text), limit);
                head.extensions.insert(replay.clone());
                replay
            }
        };
        let body = replay.body().ok_or(Refusal::Body)?;
        Ok(Request::from_parts(head, body))
    }

    /// The body with its members changed; `None` where there is none.
    async fn rewritten(&self, headers: &HeaderMap, replay: &Replay) -> Result<Option<Vec<u8>>, Refusal> {
        if replay.is_empty() {
            return Ok(None);
        }
        if !json::is_json(headers) {
            return Err(Refusal::Json);
        }
        let text = replay.bytes().await.map_err(Refusal::Failed)?.ok_or(Refusal::Body)?;
        if text.is_empty() {
            return Ok(None);
        }
        json::merge(&text, &self.json).map(Some).ok_or(Refusal::Json)
    }
}

/// Why a request cannot go to an upstream.
enum Refusal {
    /// A part of its body is lost.
    Body,
    /// Its body is not what could be rewritten.
    Json,
    /// Its body failed.
    Failed(BoxError),
}

/// Gives `uri` another path. Its query stays.
fn rewrite(uri: &mut Uri, path: &Rewrite) {
    let path = path.apply(uri.path());
    let whole = match uri.query() {
        Some(query) => format!("{path}?{query}"),
        None => path.into_owned(),
    };
    let mut parts = mem::take(uri).into_parts();
    // Both halves were a path before, and are one together; `*` alone has no beginning to change.
    parts.path_and_query = PathAndQuery::try_from(whole).ok().or(parts.path_and_query);
    *uri = Uri::from_parts(parts).unwrap_or_default();
}

/// The service of [`FallbackLayer`].
#[derive(Debug, Clone)]
pub struct Fallback<S> {
    inner: S,
    plan: Arc<Plan>,
}

impl<S> Service<Request> for Fallback<S>
where
    S: CloneService,
{
    type Response = Response;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response, BoxError>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        self.inner.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, request: Request) -> Self::Future {
        let mut inner = take_ready(&mut self.inner);
        if asks_for_tunnel(&request) {
            return Box::pin(inner.call(request).map_err(Into::into));
        }
        let plan = self.plan.clone();
        Box::pin(async move { plan.run(request, inner).await })
    }
}

impl Plan {
    async fn run<S: CloneService>(&self, request: Request, mut first: S) -> Result<Response, BoxError> {
        let (mut head, body) = request.into_parts();
        let replay = Replay::new(body, self.replay);
        head.extensions.insert(replay.clone());
        let lost = || Error::new(Kind::Internal, "the body was lost before it was read");
        let body = replay.body().ok_or_else(lost)?;
        let mut request = Request::from_parts(head.clone(), body);
        self.mark(&mut request, 0, &replay);
        let mut result = first.call(request).await.map_err(Into::into);
        // Where the rest of the list begins.
        let mut rest = 0;
        let mut from = &self.own;
        let mut answering: Option<&Target> = None;
        while let Some(failure) = Failure::of(result.as_ref().map_err(|error| &**error as _)) {
            let Some((n, target)) = self.next(rest, failure) else { break };
            rest = n + 1;
            let reading = (!replay.is_over()).then(|| replay.turns());
            // Made while the failure can still be passed on.
            let mut request = match target.request(&head, &replay).await {
                Ok(request) => request,
                Err(Refusal::Failed(error)) => return Err(error),
                Err(refusal) => {
                    if matches!(refusal, Refusal::Body) {
                        self.metrics.no_body(&target.name);
                    } else {
                        self.metrics.no_json(&target.name);
                    }
                    // Who had answered before it was sent everything has lost its upload to the look at it, and with
                    // that its connection: what it answered will not come to its end.
                    if result.is_ok() && reading.is_some_and(|before| replay.turns() != before) {
                        result =
                            Err(Error::new(Kind::UpstreamReset, "its upload was taken away to be rewritten").into());
                    }
                    continue;
                }
            };
            // Cancels what is left of it, before anyone else is asked.
            drop(result);
            self.metrics.made(from, &target.name, &failure);
            if let Some(exchange) = head.extensions.get::<Exchange>() {
                let mut facts = exchange.facts();
                facts.fallback = true;
                facts.upstream = Some(target.name.clone());
                facts.endpoint = None;
            }
            self.mark(&mut request, rest, &replay);
            result = target.service.clone().call(request).await;
            from = &target.name;
            answering = Some(target);
        }
        if let (Some(target), Ok(response)) = (answering, &mut result) {
            // Behind what the upstream says: the members are in the order of the way.
            response.headers_mut().append(PROXY_STATUS, target.proxy_status.clone());
        }
        result
    }

    /// The first from `rest` on that `failure` leads to.
    fn next(&self, rest: usize, failure: Failure) -> Option<(usize, &Target)> {
        self.targets.iter().enumerate().skip(rest).find(|(_, target)| target.on.contains(&failure))
    }

    /// Notes whether an answer that breaks before it has begun would lead to one of the targets from `rest` on.
    fn mark(&self, request: &mut Request, rest: usize, replay: &Replay) {
        let breaks = [Failure::Reset, Failure::Timeout];
        let steps_in = |target: &Target| {
            (target.fixed || replay.is_kept()) && breaks.iter().any(|failure| target.on.contains(failure))
        };
        if self.targets.iter().skip(rest).any(steps_in) {
            request.extensions_mut().insert(Undecided);
        }
    }
}

#[cfg(test)]
mod tests {
    use futures_util::{FutureExt, StreamExt, stream};
    use http::header::{AUTHORIZATION, CONTENT_ENCODING, CONTENT_TYPE, COOKIE, UPGRADE};
    use http_body_util::{BodyExt, StreamBody};
    use parking_lot::Mutex;
    use tower::{ServiceExt, service_fn};

    use super::*;

    /// What an upstream was asked: its name, the target, some header fields, the body.
    type Asked = Arc<Mutex<Vec<(&'static str, Parts, String)>>>;

    #[derive(Debug, Clone, Copy)]
    enum Act {
        Answer(u16),
        Fail(Kind),
        /// Answers at once, without a look at the body.
        Early(u16),
    }

    fn upstream(name: &'static str, act: Act, asked: &Asked) -> HttpService {
        let asked = asked.clone();
        HttpService::new(service_fn(move |request: Request| {
            let asked = asked.clone();
            async move {
                let (head, body) = request.into_parts();
                let text = match act {
                    Act::Early(_) | Act::Fail(Kind::ConnectFailed) => String::new(),
                    _ => String::from_utf8(body.collect().await?.to_bytes().to_vec()).unwrap(),
                };
                asked.lock().push((name, head, text));
                match act {
                    Act::Answer(status) | Act::Early(status) => {
                        let answer = http::Response::builder().status(status).header(PROXY_STATUS, name);
                        Ok(answer.body(Body::from(name)).unwrap())
                    }
                    Act::Fail(kind) => Err(Error::from(kind).into()),
                }
            }
        }))
    }

    fn post(body: impl Into<Body>) -> Request {
        let request = http::Request::post("/v1/chat?a=b").header(CONTENT_TYPE, "application/json; charset=utf-8");
        request.header(AUTHORIZATION, "Bearer first").header(COOKIE, "id=1").body(body.into()).unwrap()
    }

    struct Ask {
        result: Result<(u16, String, Vec<String>), Option<Kind>>,
        asked: Vec<(&'static str, Parts, String)>,
    }

    impl Ask {
        fn status(&self) -> u16 {
            self.result.as_ref().unwrap().0
        }

        fn names(&self) -> Vec<&'static str> {
            self.asked.iter().map(|(name, ..)| *name).collect()
        }
    }

    /// Sends `request` to the upstream `own`, which does `first`, with the others after it.
    async fn ask(request: Request, first: Act, others: Vec<(serde_json::Value, Act)>) -> Ask {
        let asked = Asked::default();
        let targets = others.into_iter().map(|(entry, act)| {
            let entry: Entry = serde_json::from_value(entry).unwrap();
            let name: &'static str = Box::leak(entry.upstream.clone().into_boxed_str());
            let service = upstream(name, act, &asked);
            if name == "fixed" { Target::fixed(&entry, service) } else { Target::new(&entry, service).unwrap() }
        });
        let layer = FallbackLayer::new("route", "own", targets.collect(), 100, &Metrics::new());
        let result = layer.layer(upstream("own", first, &asked)).oneshot(request).await;
        let result = match result {
            Err(error) => Err(Error::find(&*error).map(Error::kind)),
            Ok(response) => {
                let (head, body) = response.into_parts();
                let hops = head.headers.get_all(PROXY_STATUS).iter().map(|hop| hop.to_str().unwrap().to_owned());
                let hops = hops.collect();
                let body = String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap();
                Ok((head.status.as_u16(), body, hops))
            }
        };
        let asked = asked.lock().drain(..).collect();
        Ask { result, asked }
    }

    fn to(name: &str) -> serde_json::Value {
        serde_json::json!({ "upstream": name })
    }

    #[tokio::test]
    async fn each_failure_leads_to_the_next() {
        use Act::{Answer, Fail};
        let failures = [
            Fail(Kind::ConnectFailed),
            Fail(Kind::UpstreamReset),
            Fail(Kind::UpstreamTimeout),
            Fail(Kind::CircuitOpen),
            Fail(Kind::NoHealthyEndpoint),
            Fail(Kind::Overloaded),
            Answer(502),
            Answer(503),
            Answer(504),
        ];
        for failure in failures {
            let ask = ask(post("{}"), failure, vec![(to("b"), failure), (to("c"), Answer(200))]).await;
            assert_eq!(ask.names(), ["own", "b", "c"], "{failure:?}");
            let (status, body, hops) = ask.result.unwrap();
            assert_eq!((status, &*body, &*ask.asked[2].2), (200, "c", "{}"), "{failure:?}");
            assert_eq!(hops, ["c", r#"sidegate; next-hop="c""#], "{failure:?}");
        }
        for own in
            [Answer(200), Answer(404), Answer(429), Answer(500), Fail(Kind::ClientReset), Fail(Kind::BodyTooLarge)]
        {
            let ask = ask(post("{}"), own, vec![(to("b"), Answer(200))]).await;
            assert_eq!(ask.names(), ["own"], "{own:?}");
            assert!(ask.result.is_err() || ask.result.unwrap().2 == ["own"], "{own:?}");
        }
    }

    #[tokio::test]
    async fn a_failure_passes_by_whom_it_does_not_lead_to() {
        let on = |name: &str, on: &[&str]| serde_json::json!({ "upstream": name, "on": on });
        let others = vec![
            (on("b", &["timeout"]), Act::Answer(200)),
            (on("c", &["connect"]), Act::Fail(Kind::UpstreamTimeout)),
            (on("d", &["429"]), Act::Answer(200)),
            (on("e", &["timeout", "429"]), Act::Answer(204)),
        ];
        let ask = ask(post(""), Act::Fail(Kind::ConnectFailed), others).await;
        assert_eq!((ask.status(), ask.names()), (204, vec!["own", "c", "e"]));
    }

    #[tokio::test]
    async fn when_all_fail_the_last_has_the_word() {
        let b = || to("b");
        let first = ask(post(""), Act::Answer(503), vec![(b(), Act::Fail(Kind::ConnectFailed))]).await;
        assert_eq!(first.result, Err(Some(Kind::ConnectFailed)));
        let second = ask(post(""), Act::Fail(Kind::ConnectFailed), vec![(b(), Act::Answer(503))]).await;
        assert_eq!(second.result.unwrap().1, "b");
    }

    #[tokio::test]
    async fn another_upstream_sees_what_is_meant_for_it() {
        let entry = serde_json::json!({
            "upstream": "b", "path": { "prefix": "/v1", "with": "/api" }, "json": { "model": "llama3", "user": null },
            "headers": { "bearer": "second", "set": { "x-tier": "low" }, "remove": ["x-trace"] },
        });
        let mut request = post(r#"{"model":"gpt-4o","user":"me","n":1}"#);
        for name in ["x-trace", "content-digest", "content-length", "x-kept"] {
            request.headers_mut().insert(name, HeaderValue::from_static("36"));
        }
        let ask = ask(request, Act::Answer(503), vec![(entry, Act::Answer(200))]).await;
        let [(_, first, sent), (_, second, rewritten)] = &*ask.asked else { panic!("{:?}", ask.asked) };
        assert_eq!((first.uri.path(), &**sent), ("/v1/chat", r#"{"model":"gpt-4o","user":"me","n":1}"#));
        assert_eq!(first.headers[AUTHORIZATION], "Bearer first");
        assert_eq!((&*second.uri.to_string(), &**rewritten), ("/api/chat?a=b", r#"{"model":"llama3","n":1}"#));
        let field = |name: &str| second.headers.get(name).map(|value| value.to_str().unwrap());
        assert_eq!((field("authorization"), field("cookie")), (Some("Bearer second"), None));
        assert_eq!((field("x-tier"), field("x-trace"), field("x-kept")), (Some("low"), None, Some("36")));
        assert_eq!((field("content-length"), field("content-digest")), (Some("24"), None));
    }

    #[tokio::test]
    async fn credentials_stay_with_the_first_unless_they_are_shared() {
        let shared = serde_json::json!({ "upstream": "c", "headers": { "keep": ["cookie"] } });
        let others = vec![(to("b"), Act::Answer(503)), (shared, Act::Answer(200))];
        let ask = ask(post("{}"), Act::Answer(503), others).await;
        let has = |n: usize, name: HeaderName| ask.asked[n].1.headers.contains_key(name);
        assert!(!has(1, AUTHORIZATION) && !has(1, COOKIE) && !has(2, AUTHORIZATION) && has(2, COOKIE));
    }

    #[tokio::test]
    async fn a_body_that_cannot_be_rewritten_does_not_go_there() {
        let model = || (serde_json::json!({ "upstream": "b", "json": { "model": "x" } }), Act::Answer(200));
        let plain = |text: &'static str, content_type: &'static str| {
            let mut request = post(text);
            request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
            request
        };
        let mut compressed = post("{}");
        compressed.headers_mut().insert(CONTENT_ENCODING, HeaderValue::from_static("gzip"));
        let cases = [plain("{}", "text/plain"), plain("[1]", "application/json"), compressed];
        for request in cases {
            let ask = ask(request, Act::Answer(503), vec![model(), (to("c"), Act::Answer(200))]).await;
            assert_eq!((ask.status(), ask.names()), (200, vec!["own", "c"]));
        }
        let alone = ask(plain("{", "application/json"), Act::Answer(503), vec![model()]).await;
        assert_eq!((alone.status(), alone.names()), (503, vec!["own"]), "the failure is passed on");
        assert_eq!(alone.result.unwrap().2, ["own"]);
        let vendor = ask(plain("{}", "application/problem+JSON"), Act::Answer(503), vec![model()]).await;
        assert_eq!(vendor.asked[1].2, r#"{"model":"x"}"#);
        let without = ask(plain("", "text/plain"), Act::Answer(503), vec![model()]).await;
        assert_eq!(without.names(), ["own", "b"], "what is not there needs no rewriting");
    }

    #[tokio::test]
    async fn a_large_body_goes_on_only_if_it_was_not_read() {
        let large = || "x".repeat(101);
        let others = || vec![(to("b"), Act::Answer(200)), (to("fixed"), Act::Answer(200))];
        let read = ask(post(large()), Act::Answer(503), others()).await;
        assert_eq!(read.names(), ["own", "fixed"], "a fixed answer needs no body");
        let unread = ask(post(large()), Act::Early(503), others()).await;
        assert_eq!(unread.names(), ["own", "b"]);
        assert_eq!(unread.asked[1].2, large());
        let rewritten = serde_json::json!({ "upstream": "b", "json": { "model": "x" } });
        let ask = ask(post(large()), Act::Early(503), vec![(rewritten, Act::Answer(200))]).await;
        assert_eq!(ask.names(), ["own"]);
    }

    #[tokio::test]
    async fn a_client_whose_body_fails_meanwhile_is_told_so() {
        let rewritten = serde_json::json!({ "upstream": "b", "json": { "model": "x" } });
        let broken = stream::iter([Err::<http_body::Frame<bytes::Bytes>, _>(Error::from(Kind::ClientTimeout))]);
        let request = post(Body::new(StreamBody::new(broken.chain(stream::empty()))));
        let ask = ask(request, Act::Early(503), vec![(rewritten, Act::Answer(200))]).await;
        assert_eq!(ask.result, Err(Some(Kind::ClientTimeout)));
    }

    #[tokio::test]
    async fn an_answer_whose_upload_was_taken_away_is_not_passed_on() {
        let rewritten = serde_json::json!({ "upstream": "b", "json": { "model": "x" } });
        let invalid = || {
            let frames = ["{\"a\":", "1"].map(|text| Ok::<_, BoxError>(http_body::Frame::data(text.into())));
            post(Body::new(StreamBody::new(stream::iter(frames))))
        };
        let asked = ask(invalid(), Act::Early(503), vec![(rewritten.clone(), Act::Answer(200))]).await;
        assert_eq!(
            asked.result,
            Err(Some(Kind::UpstreamReset)),
            "its connection is gone, and the answer's end with it"
        );
        let asked = ask(invalid(), Act::Answer(503), vec![(rewritten.clone(), Act::Answer(200))]).await;
        assert_eq!(asked.status(), 503, "it had read all");
        let fixed = (to("fixed"), Act::Answer(200));
        let asked = ask(invalid(), Act::Early(503), vec![(rewritten, Act::Answer(200)), fixed]).await;
        assert_eq!(asked.names(), ["own", "fixed"], "who steps in for what broke still does");
    }

    #[tokio::test]
    async fn all_but_the_last_are_undecided() {
        let marked = |ask: &Ask| -> Vec<bool> {
            ask.asked.iter().map(|(_, head, _)| head.extensions.get::<Undecided>().is_some()).collect()
        };
        let failing = Act::Fail(Kind::ConnectFailed);
        let all = ask(post(""), failing, vec![(to("b"), failing), (to("c"), failing)]).await;
        assert_eq!(marked(&all), [true, true, false]);
        let only = serde_json::json!({ "upstream": "b", "on": ["connect"] });
        assert_eq!(marked(&ask(post(""), failing, vec![(only, failing)]).await), [false, false]);
        let large = ask(post("x".repeat(101)), Act::Early(200), vec![(to("b"), failing)]).await;
        assert_eq!(marked(&large), [false]);
    }

    #[tokio::test]
    async fn an_upgrade_is_the_first_ones_alone() {
        let mut upgrade = post("");
        upgrade.headers_mut().insert(UPGRADE, HeaderValue::from_static("websocket"));
        let ask = ask(upgrade, Act::Fail(Kind::ConnectFailed), vec![(to("b"), Act::Answer(200))]).await;
        assert_eq!(ask.names(), ["own"]);
    }

    #[tokio::test]
    async fn who_leaves_is_not_asked_for_again() {
        let asked = Asked::default();
        let own = HttpService::new(service_fn(|_: Request| std::future::pending::<Result<Response, BoxError>>()));
        let target = Target::new(&Entry::to("b"), upstream("b", Act::Answer(200), &asked)).unwrap();
        let metrics = Metrics::new();
        let layer = FallbackLayer::new("route", "own", vec![target], 100, &metrics);
        assert!(layer.layer(own).oneshot(post("")).now_or_never().is_none());
        assert!(asked.lock().is_empty() && !metrics.encode().contains("fallbacks_total{"));
    }

    #[test]
    fn a_path_takes_the_place_of_another() {
        for (uri, expected) in [("/a?b=c", "/x?b=c"), ("http://h:1/a", "http://h:1/x"), ("/", "/x")] {
            let mut uri: Uri = uri.parse().unwrap();
            rewrite(&mut uri, &serde_json::from_str("\"/x\"").unwrap());
            assert_eq!(uri.to_string(), expected);
        }
    }
}
