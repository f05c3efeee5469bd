//! Answers that are on their way: who may join them, and that one that breaks off is broken for all, whenever they came.

use tokio::task::JoinSet;

use crate::{
    cache::{cached, get, ok, source},
    cache_streams::{asking, waiting},
    harness::{
        Backend, Ending, Proxy, Wire,
        client::{HEADERS, RST_STREAM, RawHttp2},
        figure,
    },
};

/// What a client sees of an answer that may be broken off.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Seen {
    /// An error of sidegate's.
    Error,
    Broken,
    /// What looks like a whole answer.
    Whole,
}

async fn seen(client: &mut Wire) -> Seen {
    let head = client.head().await;
    let (rest, ending) = client.rest().await;
    if head.status() != 200 {
        return Seen::Error;
    }
    let is_whole = match head.get("content-length").map(|length| length.parse::<usize>().unwrap()) {
        Some(length) => {
            assert!(rest.len() <= length, "bytes that belong to no answer: {head:?}");
            rest.len() == length
        }
        None if head.get("transfer-encoding").is_some() => rest.ends_with(b"0\r\n\r\n"),
        // A body that the end of the connection ends.
        None => ending == Ending::Fin,
    };
    if is_whole { Seen::Whole } else { Seen::Broken }
}

/// How an upstream breaks off: what it sends, all at once, and whether it tears its connection down then.
const BREAKS: [(&str, &str, bool); 5] = [
    ("chunked", "transfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n", false),
    ("chunked, reset", "transfer-encoding: chunked\r\n\r\na\r\n0123456789\r\n", true),
    ("a length", "content-length: 30\r\n\r\n0123456789", false),
    ("chunked, a head alone", "transfer-encoding: chunked\r\n\r\n", false),
    ("a length, a head alone", "content-length: 30\r\n\r\n", true),
];

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_at_once_is_whole_for_nobody() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h }")).await;
    let mut all = 0;
    for (what, sent, reset) in BREAKS {
        for turn in 0..4 {
            let request = get(&format!("/{}/{turn}", what.replace([' ', ','], "-")), "connection: close\r\n");
            let mut clients = Vec::new();
            for _ in 0..40 {
                clients.push(asking(&proxy, &request).await);
            }
            let (mut upstream, _) = backend.accept_head().await;
            waiting(&proxy, 40).await;
            upstream.send(format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n{sent}")).await;
            upstream.leave(reset);
            // Who could not join it asks by itself, which breaks off no less.
            let mut readers = JoinSet::new();
            for mut client in clients {
                readers.spawn(async move { seen(&mut client).await });
            }
            let answering = async {
                loop {
                    let (mut upstream, _) = backend.accept_head().await;
                    upstream.send(format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n{sent}")).await;
                    upstream.leave(reset);
                }
            };
            let seen = tokio::select! {
                seen = readers.join_all() => seen,
                () = answering => unreachable!(),
            };
            assert!(!seen.contains(&Seen::Whole), "{what}: {seen:?}");
            all += seen.len();
        }
    }
    assert_eq!(proxy.sample("sidegate_cache_stored_total{route=\"all\"}").await, 0);
    assert!(!proxy.logged().contains("panicked"));
    figure(&format!("{all} clients of answers that broke off at once: none saw a whole one"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_an_http2_upstream_resets_is_whole_for_nobody() {
    let settings =
        format!("upstreams: {{ api: {{ endpoints: [UPSTREAM], protocol: http2 }} }}\n{}", cached("{ ttl: 1h }"));
    // NO_ERROR, INTERNAL_ERROR, CANCEL.
    for code in [0, 2, 8] {
        for turn in 0..4 {
            let backend = Backend::start().await;
            let proxy = Proxy::before(&backend.url(), &settings).await;
            let mut clients = Vec::new();
            for _ in 0..40 {
                clients.push(asking(&proxy, get("/", "connection: close\r\n")).await);
            }
            let mut upstream = RawHttp2::serving(backend.accept().await).await;
            assert_eq!(upstream.frame().await.kind, HEADERS);
            waiting(&proxy, 40).await;
            upstream.send(HEADERS, 4, 1, &[0x88]).await;
            if turn > 0 {
                upstream.send(0, 0, 1, b"01234567").await;
            }
            upstream.send(RST_STREAM, 0, 1, &[0, 0, 0, code]).await;
            let mut readers = JoinSet::new();
            for mut client in clients {
                readers.spawn(async move { seen(&mut client).await });
            }
            let answering = async {
                for stream in (3..).step_by(2) {
                    assert_eq!(upstream.frame_of(stream).await.kind, HEADERS);
                    upstream.send(HEADERS, 4, stream, &[0x88]).await;
                    upstream.send(RST_STREAM, 0, stream, &[0, 0, 0, code]).await;
                }
            };
            let seen = tokio::select! {
                seen = readers.join_all() => seen,
                () = answering => unreachable!(),
            };
            assert!(!seen.contains(&Seen::Whole), "{code}: {seen:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_stale_or_not_what_is_asked_for_is_not_joined() {
    for (fields, asks, joins) in [
        ("cache-control: max-age=600\r\n", "", true),
        ("cache-control: no-cache\r\netag: \"a\"\r\n", "", false),
        ("cache-control: max-age=0\r\netag: \"a\"\r\n", "", false),
        ("cache-control: max-age=600\r\n", "cache-control: no-cache\r\n", false),
        ("cache-control: max-age=600\r\nage: 100\r\n", "cache-control: max-age=50\r\n", false),
        ("cache-control: max-age=600\r\nage: 100\r\n", "cache-control: max-age=300\r\n", true),
    ] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        let mut first = asking(&proxy, get("/", "")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(format!("HTTP/1.1 200 OK\r\n{fields}content-length: 6\r\n\r\none")).await;
        first.head().await;
        assert_eq!(first.exactly(3).await, b"one");
        let mut late = asking(&proxy, get("/", asks)).await;
        if joins {
            let head = late.head().await;
            assert!(head.get("cache-status").unwrap().ends_with("; collapsed"), "{fields}{asks}: {head:?}");
            upstream.send("two").await;
            assert_eq!(late.exactly(6).await, b"onetwo");
            assert!(backend.accepted().await.is_none());
        } else {
            let (mut other, _) = backend.accept_head().await;
            other.send(ok(fields, "own")).await;
            let own = late.answer().await;
            assert_eq!(own.text(), "own", "{fields}{asks}");
            assert!(!source(&own).contains("collapsed"), "{own:?}");
            upstream.send("two").await;
        }
        assert_eq!(first.exactly(3).await, b"two");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_feed_that_has_run_for_longer_than_its_answers_live_is_not_joined() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 200ms }")).await;
    let stream = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";
    let mut first = asking(&proxy, get("/", "")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(format!("{stream}9\r\ndata: 1\n\n\r\n")).await;
    first.head().await;
    first.chunk().await;
    // Who asks while it is fresh may join it, who asks then not.
    let mut others = 0;
    let mut clients = Vec::new();
    let other = loop {
        let mut client = asking(&proxy, get("/", "")).await;
        tokio::select! {
            head = client.head() => assert!(head.get("cache-status").unwrap().contains("; collapsed"), "{head:?}"),
            (upstream, _) = backend.accept_head() => break (client, upstream),
        }
        clients.push(client);
        others += 1;
        assert!(others < 1000, "it is joined for ever");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    };
    let (mut client, mut second) = other;
    second.send(format!("{stream}9\r\ndata: 7\n\n\r\n0\r\n\r\n")).await;
    assert_eq!(client.answer().await.text(), "data: 7\n\n", "nothing of what was before");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_it_already_leaves_no_upstream_at_work_behind() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for (path, asks) in [("/any", "if-none-match: *\r\n"), ("/own", "if-none-match: \"a\"\r\n")] {
        let mut client = asking(&proxy, get(path, asks)).await;
        let (mut upstream, _) = backend.accept_head().await;
        let fields = "cache-control: max-age=600\r\netag: \"a\"\r\ntransfer-encoding: chunked\r\n";
        // Nobody knows when it will come to its end.
        upstream.send(format!("HTTP/1.1 200 OK\r\n{fields}\r\n3\r\none\r\n")).await;
        assert_eq!(client.answer().await.status(), 304, "{path}");
        upstream.ended().await;
    }
    assert_eq!(proxy.sample("sidegate_cache_stored_total{route=\"all\"}").await, 0);
}
