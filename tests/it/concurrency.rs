//! A backend is never asked for more than it can do at a time; who has to wait waits in order, and may leave.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use futures_util::future::join_all;
use http::Request;
use serde_json::json;
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{
    Backend, Message, Proxy, Wire,
    backend::{BodySender, Http2Backend},
    client::{Http2Client, data},
    eventually, within,
};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

fn get(path: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: sidegate.test\r\n\r\n")
}

fn of_upstream(settings: &str) -> String {
    format!("upstreams: {{ api: {{ endpoints: [UPSTREAM], concurrency: {{ {settings} }} }} }}")
}

fn overloaded(answer: &Message) -> bool {
    answer.status() == 503 && answer.json()["type"].as_str().is_some_and(|kind| kind.ends_with("overloaded"))
}

async fn figure(proxy: &Proxy, name: &str) -> i64 {
    proxy.sample(&format!("sidegate_concurrency_{name}{{scope=\"upstream\",name=\"api\"}}")).await
}

async fn queued(proxy: &Proxy, count: i64) {
    eventually("the queue", async || figure(proxy, "queued").await == count).await;
}

/// A backend that streams, and knows how many streams it has.
struct Streaming {
    url: String,
    now: Arc<AtomicUsize>,
    most: Arc<AtomicUsize>,
    _tasks: JoinSet<()>,
}

impl Streaming {
    async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, highest) = (now.clone(), most.clone());
        let mut tasks = JoinSet::new();
        tasks.spawn(async move {
            let mut streams = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (now, most) = (counted.clone(), highest.clone());
                streams.spawn(async move {
                    let mut wire = Wire::new(stream);
                    while wire.another().await {
                        wire.head().await;
                        most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                        let head =
                            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
                        wire.send(head).await;
                        for _ in 0..4 {
                            tokio::time::sleep(Duration::from_millis(5)).await;
                            wire.send("9\r\ndata: x\n\n\r\n").await;
                        }
                        // Before the last byte: who has read it may already have let in the next.
                        now.fetch_sub(1, Ordering::SeqCst);
                        wire.send("0\r\n\r\n").await;
                    }
                });
            }
        });
        Self { url, now, most, _tasks: tasks }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn never_more_than_the_limit_are_upstream_at_once() {
    let backend = Streaming::start().await;
    let proxy = Proxy::before(&backend.url, &of_upstream("max_in_flight: 8, queue_timeout: 60s")).await;
    let http2 = Arc::new(Http2Client::to(proxy.address()).await);
    let mut clients = JoinSet::new();
    for turn in 0..100 {
        let (address, http2) = (proxy.address(), http2.clone());
        clients.spawn(async move {
            if turn % 2 == 0 {
                let answer = Wire::ask(address, get("/")).await;
                assert_eq!((answer.status(), answer.body.len()), (200, 36));
            } else {
                let mut body = http2.get("/").await.into_body();
                let mut length = 0;
                while let Some(data) = data(&mut body).await {
                    length += data.len();
                }
                assert_eq!(length, 36);
            }
        });
    }
    while let Some(client) = within("all clients", clients.join_next()).await {
        client.unwrap();
    }
    assert_eq!(backend.most.load(Ordering::SeqCst), 8, "as many as may be, and no more");
    assert_eq!(backend.now.load(Ordering::SeqCst), 0);
    eventually("nobody in flight", async || figure(&proxy, "in_flight").await == 0).await;
    assert_eq!((figure(&proxy, "queued").await, figure(&proxy, "limit").await), (0, 8));
    assert!(proxy.sample("sidegate_concurrency_wait_seconds_count{scope=\"upstream\",name=\"api\"}").await >= 92);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_queue_is_first_come_first_served_and_leaving_it_frees_the_place() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &of_upstream("max_in_flight: 1, queue: 4")).await;
    let mut first = proxy.connect().await;
    first.send(get("/first")).await;
    let (mut upstream, _) = backend.accept_head().await;
    let mut waiting = Vec::new();
    for number in 0..4 {
        let mut client = proxy.connect().await;
        client.send(get(&format!("/{number}"))).await;
        queued(&proxy, number + 1).await;
        waiting.push(client);
    }
    let refused = proxy.get("/").await;
    assert!(overloaded(&refused), "{}", refused.text());
    assert!(refused.head.get("retry-after").is_some());
    assert_eq!(
        proxy.sample("sidegate_concurrency_shed_total{scope=\"upstream\",name=\"api\",reason=\"queue_full\"}").await,
        1
    );

    // The second one leaves; somebody else takes the place, at the end.
    waiting.remove(1).leave(true);
    queued(&proxy, 3).await;
    let mut last = proxy.connect().await;
    last.send(get("/last")).await;
    queued(&proxy, 4).await;
    waiting.push(last);

    upstream.send(OK).await;
    assert_eq!(first.answer().await.text(), "ok");
    for (path, mut client) in ["/0", "/2", "/3", "/last"].into_iter().zip(waiting) {
        let head = upstream.head().await;
        assert_eq!(head.target(), path);
        upstream.send(OK).await;
        assert_eq!(client.answer().await.text(), "ok");
    }
    assert!(backend.accepted().await.is_none(), "nobody was asked on another connection");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_too_long_is_told_to_come_later() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &of_upstream("max_in_flight: 1, queue: 2, queue_timeout: 100ms")).await;
    let mut first = proxy.connect().await;
    first.send(get("/")).await;
    let (mut upstream, _) = backend.accept_head().await;
    let refused = proxy.get("/").await;
    assert!(overloaded(&refused));
    let http2 = Http2Client::to(proxy.address()).await;
    let refused = http2.get("/").await;
    assert_eq!(refused.status(), 503);
    assert_eq!(refused.headers()["retry-after"], "1");
    queued(&proxy, 0).await;
    upstream.send(OK).await;
    assert_eq!(first.answer().await.text(), "ok");
    eventually("nobody in flight", async || figure(&proxy, "in_flight").await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_in_the_middle_of_a_stream_frees_the_place() {
    let backend = Http2Backend::start().await;
    let file = "upstreams: { api: { endpoints: [UPSTREAM], protocol: http2, concurrency: { max_in_flight: 1 } } }";
    let proxy = Proxy::before(&backend.url(), file).await;
    let http2 = Http2Client::to(proxy.address()).await;
    let answer = http2.get("/stream");
    let (stream, answer) = tokio::join!(async { backend.next().await.answer(http::Response::new(())) }, answer);
    stream.data("one").await;
    let mut body = answer.into_body();
    assert_eq!(data(&mut body).await.unwrap(), "one");
    assert_eq!(figure(&proxy, "in_flight").await, 1);
    let mut waiting = proxy.connect().await;
    waiting.send(get("/waiting")).await;
    queued(&proxy, 1).await;
    drop(body);
    stream.cancelled().await;
    let next = backend.next().await;
    assert_eq!(next.request.uri().path(), "/waiting");
    next.answer(http::Response::new(())).finish();
    assert_eq!(waiting.answer().await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tunnel_is_in_flight_until_it_ends() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &of_upstream("max_in_flight: 1, queue: 0")).await;
    let mut client = proxy.connect().await;
    client.send("GET /ws HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello").await;
    assert_eq!(client.head().await.status(), 101);
    assert_eq!(client.exactly(5).await, b"hello");
    assert!(overloaded(&proxy.get("/").await));
    client.leave(false);
    upstream.finish().await;
    eventually("nobody in flight", async || figure(&proxy, "in_flight").await == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_changes_the_limit_and_loses_nobody() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &of_upstream("max_in_flight: 1")).await;
    let mut clients = Vec::new();
    let mut upstreams = Vec::new();
    for _ in 0..3 {
        let mut client = proxy.connect().await;
        client.send(get("/")).await;
        clients.push(client);
    }
    upstreams.push(backend.accept_head().await.0);
    queued(&proxy, 2).await;
    let reload = async |settings: &str| {
        proxy.rewrite(&of_upstream(settings).replace("UPSTREAM", &backend.url()));
        assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    };
    reload("max_in_flight: 3").await;
    for _ in 0..2 {
        upstreams.push(backend.accept_head().await.0);
    }
    assert_eq!((figure(&proxy, "in_flight").await, figure(&proxy, "limit").await), (3, 3));
    reload("max_in_flight: 2, queue: 0").await;
    upstreams.pop().unwrap().send(OK).await;
    eventually("one has ended", async || figure(&proxy, "in_flight").await == 2).await;
    assert!(overloaded(&proxy.get("/").await), "two are still in flight");
    for mut upstream in upstreams {
        upstream.send(OK).await;
    }
    for mut client in clients {
        assert_eq!(client.answer().await.text(), "ok");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_route_counts_its_own() {
    let backend = Backend::start().await;
    let file = "defaults: { concurrency: { max_in_flight: 1, queue: 0 } }
upstreams: { api: { endpoints: [UPSTREAM] } }
routes:
  - { name: slow, upstream: api, match: { path: /slow } }
  - { name: free, upstream: api, match: { path: /free }, concurrency: off }
  - { name: rest, upstream: api }";
    let proxy = Proxy::before(&backend.url(), file).await;
    let mut held = Vec::new();
    for path in ["/slow", "/free", "/free", "/rest"] {
        let mut client = proxy.connect().await;
        client.send(get(path)).await;
        held.push((client, backend.accept_head().await.0));
    }
    assert!(overloaded(&proxy.get("/slow").await));
    assert!(overloaded(&proxy.get("/other").await));
    let effective = proxy.admin_get("/config").await.json()["effective"]["routes"].clone();
    assert_eq!(effective[0]["concurrency"], json!({ "max_in_flight": 1, "queue": 0, "queue_timeout": "10s" }));
    assert_eq!(effective[1]["concurrency"], "off");
    for (mut client, mut upstream) in held {
        upstream.send(OK).await;
        assert_eq!(client.answer().await.text(), "ok");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_wait_do_not_starve_the_one_that_they_wait_for() {
    let backend = Backend::start().await;
    let file = of_upstream("max_in_flight: 1, queue: 20, queue_timeout: 60s");
    let proxy = Proxy::before(&backend.url(), &file).await;
    let client = Http2Client::to(proxy.address()).await;
    let mut answers = JoinSet::new();
    let mut begin = || {
        let (body, answer) = client.begin(Request::post("http://sidegate.test/").body(()).unwrap());
        answers.spawn(async { answer.await.unwrap().status() });
        body
    };
    let first = begin();
    let mut upstream = backend.accept().await;
    // All over one connection, each as much as a stream may send unread.
    let waiting: Vec<_> = (0..8).map(|_| begin()).collect();
    queued(&proxy, 8).await;
    within("what waits to be sent", join_all(waiting.into_iter().map(upload))).await;

    let (request, ()) = tokio::join!(upstream.request(), upload(first));
    assert_eq!(request.body.len(), 256 << 10);
    upstream.send(OK).await;
    for _ in 0..8 {
        assert_eq!(upstream.request().await.body.len(), 256 << 10);
        upstream.send(OK).await;
    }
    assert!(within("the answers", answers.join_all()).await.iter().all(|status| *status == 200));
}

/// Sends a body of 256 KiB.
async fn upload(body: BodySender) {
    for _ in 0..4 {
        body.data(vec![0; 64 << 10]).await;
    }
    body.finish();
}
