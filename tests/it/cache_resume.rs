//! A client that lost a stream comes again with the id of the last event that it got, and gets the rest.

use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::json;

use crate::{
    cache::{cached, get, source},
    harness::{Backend, Message, Proxy, Wire, backend::Recorder, eventually, figure, ms},
};

/// What a route for generations would have, of which nothing is kept: the backend says so, and so does the temperature.
pub const RESUME: &str = "{ methods: [POST], key: [body], body: { when: { temperature: 0 } }, resume: 20s }";
pub const STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nx-own: a\r\ntransfer-encoding: chunked\r\n";
pub const END: &str = "0\r\n\r\n";

pub fn post(path: &str, fields: &str, body: &str) -> String {
    let fields = format!("content-type: application/json\r\n{fields}content-length: {}\r\n", body.len());
    format!("POST {path} HTTP/1.1\r\nhost: sidegate.test\r\n{fields}\r\n{body}")
}

pub fn stream() -> String {
    format!("{STREAM}connection: close\r\n\r\n")
}

pub fn prompt(fields: &str) -> String {
    post("/v1/chat/completions", fields, r#"{"stream": true, "temperature": 1, "messages": []}"#)
}

pub fn event(n: usize) -> String {
    format!("data: {n}\n\n")
}

pub fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

/// An event as clients get it.
pub fn numbered(n: usize, recording: &str) -> String {
    format!("data: {n}\nid: {recording}.{n}\n\n")
}

pub async fn asking(proxy: &Proxy, request: impl AsRef<[u8]>) -> Wire {
    let mut client = proxy.connect().await;
    client.send(request).await;
    client
}

/// The name of the recording, from the first event that a client gets.
pub async fn first(client: &mut Wire) -> String {
    let event = String::from_utf8(client.chunk().await.expect("the first event")).unwrap();
    let id = event.strip_prefix("data: 1\nid: ").and_then(|id| id.strip_suffix(".1\n\n"));
    let id = id.unwrap_or_else(|| panic!("{event:?}"));
    assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "{id}");
    id.to_owned()
}

/// A stream that a client has got the first event of.
pub struct Begun {
    pub client: Wire,
    pub upstream: Wire,
    pub id: String,
}

pub async fn begin(backend: &Backend, proxy: &Proxy, request: impl AsRef<[u8]>) -> Begun {
    let mut client = asking(proxy, request).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.send(stream() + &chunk(&event(1))).await;
    client.head().await;
    let id = first(&mut client).await;
    Begun { client, upstream, id }
}

/// Reads these events, in as many chunks as they come.
pub async fn comes(client: &mut Wire, events: std::ops::RangeInclusive<usize>, recording: &str) {
    reads(client, &events.map(|n| numbered(n, recording)).collect::<String>()).await;
}

/// Reads this, in as many chunks as it comes.
pub async fn reads(client: &mut Wire, expected: &str) {
    let mut come = String::new();
    while come.len() < expected.len() {
        let part = client.chunk().await.unwrap_or_else(|| panic!("the stream ended after {come:?}"));
        come += std::str::from_utf8(&part).unwrap();
    }
    assert_eq!(come, expected);
}

pub fn last(recording: &str, n: usize) -> String {
    format!("last-event-id: {recording}.{n}\r\n")
}

/// Waits until the proxy has noticed that the client has left.
pub async fn left(proxy: &Proxy, client: Wire, id: &str, reset: bool) {
    client.leave(reset);
    assert_eq!(proxy.access_line(id).await["aborted_by"], "client");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_again_gets_what_it_missed_and_the_upstream_is_asked_once() {
    for (section, fields) in [
        (RESUME, ""),
        ("{ methods: [POST], key: [body], resume: 20s }", "cache-control: no-store\r\n"),
        ("{ methods: [POST], key: [body], ttl: 1h, resume: 20s }", ""),
        ("{ methods: [POST], key: [body], ttl: 1h, record_streams: true, resume: 20s }", ""),
        ("{ methods: [POST], key: [body], ttl: 1h, record_streams: true, replay: paced, resume: 20s }", ""),
    ] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        let mut client = asking(&proxy, prompt("x-request-id: cut\r\n")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(format!("{STREAM}{fields}\r\n")).await;
        let head = client.head().await;
        assert_eq!(head.get("content-type"), Some("text/event-stream"));
        upstream.send(chunk(&event(1))).await;
        let id = first(&mut client).await;
        upstream.send(chunk(&(event(2) + &event(3)))).await;
        comes(&mut client, 2..=3, &id).await;
        left(&proxy, client, "cut", section == RESUME).await;
        // The upstream goes on, for nobody.
        let rest: String = (4..=10).map(event).collect();
        upstream.send(chunk(&rest) + &chunk("data: [DONE]\n\n") + END).await;
        let ask = prompt(&("x-request-id: again\r\n".to_owned() + &last(&id, 3)));
        let again = proxy.ask(ask).await;
        let mut expected: String = (4..=10).map(|n| numbered(n, &id)).collect();
        let done = format!("data: [DONE]\nid: {id}.11\n\n");
        expected += &done;
        assert_eq!(again.text(), expected, "{section}");
        assert_eq!((again.head.get("x-own"), source(&again)), (Some("a"), "sidegate; hit; detail=resumed"));
        assert_eq!(proxy.access_line("again").await["cache"], "resumed");
        // And again, from elsewhere, and from the end.
        let other = proxy.ask(prompt(&last(&id, 10))).await;
        assert_eq!(other.text(), done);
        assert_eq!(proxy.ask(prompt(&last(&id, 11))).await.text(), "");
        assert!(backend.accepted().await.is_none(), "one request: {section}");
        assert_eq!(proxy.sample("sidegate_cache_requests_total{route=\"all\",outcome=\"resumed\"}").await, 3);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_comes_again_while_the_upstream_goes_on_gets_the_live_tail() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached(RESUME)).await;
    let Begun { mut client, mut upstream, id } = begin(&backend, &proxy, prompt("x-request-id: cut-0\r\n")).await;
    let mut worst = Duration::ZERO;
    let mut n = 1;
    for turn in 0..5 {
        left(&proxy, client, &format!("cut-{turn}"), turn % 2 == 0).await;
        // One comes while nobody is there, one before and one after somebody is, in pieces.
        upstream.send(chunk(&event(n + 1)) + &chunk("data: ")).await;
        let fields = format!("x-request-id: cut-{}\r\n{}", turn + 1, last(&id, n));
        client = asking(&proxy, prompt(&fields)).await;
        client.head().await;
        reads(&mut client, &(numbered(n + 1, &id) + "data: ")).await;
        upstream.send(chunk(&format!("{}\n\n", n + 2))).await;
        assert_eq!(client.chunk().await.unwrap(), format!("{}\nid: {id}.{}\n\n", n + 2, n + 2).as_bytes());
        let sent = Instant::now();
        upstream.send(chunk(&event(n + 3))).await;
        comes(&mut client, n + 3..=n + 3, &id).await;
        worst = worst.max(sent.elapsed());
        n += 3;
    }
    upstream.send(END).await;
    assert_eq!(client.chunk().await, None);
    assert!(backend.accepted().await.is_none());
    figure(&format!("a client cut off 5 times got each event once; the live tail came after {} at most", ms(worst)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_nobody_elses() {
    let shared = "{ methods: [POST], key: [body], body: { when: { temperature: 0 } }, shared: true, resume: 20s }";
    for section in [RESUME, shared] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        let mine = "authorization: Bearer mine\r\n";
        let Begun { mut client, mut upstream, id } = begin(&backend, &proxy, prompt(mine)).await;
        let other_body = post("/v1/chat/completions", &(mine.to_owned() + &last(&id, 1)), r#"{"stream": true}"#);
        let other_path =
            post("/v1/other", &(mine.to_owned() + &last(&id, 1)), r#"{"stream":true,"temperature":1,"messages":[]}"#);
        for request in [
            prompt(&("authorization: Bearer yours\r\n".to_owned() + &last(&id, 1))),
            prompt(&last(&id, 1)),
            other_body,
            other_path,
            // Nor are these anybody's.
            prompt(&(mine.to_owned() + &last(&id, 2))),
        ] {
            let mut other = asking(&proxy, request).await;
            let mut second = backend.accept().await;
            let asked = second.request().await;
            assert_eq!(asked.head.get("last-event-id"), None, "nobody but us knows what it means");
            second.send(stream() + &chunk(&event(1)) + END).await;
            other.head().await;
            assert_ne!(first(&mut other).await, id, "a new stream");
        }
        upstream.send(chunk(&event(2)) + END).await;
        let mut again = asking(&proxy, prompt(&(mine.to_owned() + &last(&id, 1)))).await;
        again.head().await;
        comes(&mut again, 2..=2, &id).await;
        comes(&mut client, 2..=2, &id).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_the_time_is_over_the_upstream_is_let_go_and_a_new_stream_begins() {
    let backend = Backend::start().await;
    let section = "{ methods: [POST], key: [body], body: { when: { temperature: 0 } }, resume: 300ms }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    let Begun { client, mut upstream, id } = begin(&backend, &proxy, prompt("x-request-id: cut\r\n")).await;
    client.leave(false);
    let begun = Instant::now();
    upstream.ended().await;
    let took = begun.elapsed();
    assert!(took >= Duration::from_millis(300), "{took:?}");
    figure(&format!("resume: 300ms: the upstream was let go {} after the client had left", ms(took)));
    let mut again = asking(&proxy, prompt(&last(&id, 1))).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.send(stream() + &chunk(&event(1)) + END).await;
    again.head().await;
    let other = first(&mut again).await;
    assert_ne!(other, id);
    assert_eq!(again.chunk().await, None);
    // What has ended is not kept any longer for being asked for again and again.
    let begun = Instant::now();
    eventually("it to be forgotten", async || {
        let mut again = asking(&proxy, prompt(&last(&other, 1))).await;
        tokio::select! {
            answer = again.answer() => {
                assert_eq!(answer.text(), "");
                false
            }
            _ = backend.accept() => true,
        }
    })
    .await;
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_before_the_first_event_cannot_come_back_and_the_upstream_is_let_go_at_once() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached(&RESUME.replace("20s", "1h"))).await;
    for sent in ["", ": hello\n\ndata: 1\n"] {
        let mut client = asking(&proxy, prompt("")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(stream()).await;
        if !sent.is_empty() {
            upstream.send(chunk(sent)).await;
        }
        client.head().await;
        if !sent.is_empty() {
            reads(&mut client, sent).await;
        }
        client.leave(false);
        upstream.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_with_ids_of_its_own_is_untouched_and_its_upstreams_to_resume() {
    let backend = Backend::start().await;
    for section in [RESUME, "{ methods: [POST], key: [body], ttl: 1h, record_streams: true, resume: 20s }"] {
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        let mut client = asking(&proxy, prompt("")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(stream() + &chunk(": hello\n\ndata: a\nid: 7\n\n")).await;
        client.head().await;
        assert_eq!(client.chunk().await.unwrap(), b": hello\n\ndata: a\nid: 7\n\n");
        upstream.send(chunk("data: b\n\n")).await;
        assert_eq!(client.chunk().await.unwrap(), b"data: b\n\n");
        client.leave(false);
        upstream.ended().await;
        let mut again = asking(&proxy, prompt("last-event-id: 7\r\n")).await;
        let mut upstream = backend.accept().await;
        assert_eq!(upstream.request().await.head.get("last-event-id"), Some("7"));
        upstream.send(stream() + &chunk("data: c\nid: 8\n\n") + END).await;
        let again = again.answer().await;
        assert_eq!(again.text(), "data: c\nid: 8\n\n");
        assert!(source(&again).contains("detail=last-event-id"), "{again:?}");
        // Where they come late, those that had ids of ours before begin anew.
        let Begun { mut client, mut upstream, id } = begin(&backend, &proxy, post("/late", "", "{}")).await;
        upstream.send(chunk("id: 9\ndata: 2\n\n")).await;
        assert_eq!(client.chunk().await.unwrap(), b"id: 9\ndata: 2\n\n");
        let mut again = asking(&proxy, post("/late", &last(&id, 1), "{ }")).await;
        if section == RESUME {
            let mut other = backend.accept().await;
            other.request().await;
            other.send(stream() + END).await;
        } else {
            // The same question, and so the same answer: from its beginning.
            again.head().await;
            assert_eq!(first(&mut again).await, id);
        }
        client.leave(false);
        drop(again);
        upstream.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_only_look_like_ours_are_the_upstreams() {
    let backend = Recorder::answering(stream() + &chunk("data: a\nid: 7\n\n") + END).await;
    let proxy = Proxy::before(&backend.url(), &cached(RESUME)).await;
    let id = format!("{}.7", "ab".repeat(16));
    let answer = proxy.ask(prompt(&format!("last-event-id: {id}\r\n"))).await;
    assert!(source(&answer).contains("detail=last-event-id"), "{answer:?}");
    assert_eq!(backend.only().head.get("last-event-id"), Some(&*id));
}

/// RFC 9110 §8.8.1: what has the same strong tag is the same, byte by byte.
#[tokio::test(flavor = "multi_thread")]
async fn a_stream_with_ids_has_a_weak_tag_and_no_parts() {
    let fields = "etag: \"v1\"\r\naccept-ranges: bytes\r\ncache-control: max-age=600\r\nconnection: close\r\n";
    let body = chunk(&(event(1) + "data: [DONE]\n\n")) + END;
    for (section, is_stored) in [("{ record_streams: true, resume: 20s }", true), ("{ resume: 20s }", false)] {
        let backend = Recorder::answering(format!("{STREAM}{fields}\r\n{body}")).await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        let first = proxy.get("/").await;
        let id = first.text().strip_prefix("data: 1\nid: ").and_then(|text| text.split_once('.')).unwrap().0.to_owned();
        let weak = |answer: &Message| {
            assert_eq!((answer.head.get("etag"), answer.head.get("accept-ranges")), (Some("W/\"v1\""), None));
        };
        weak(&first);
        weak(&proxy.ask(get("/", &last(&id, 1))).await);
        if !is_stored {
            continue;
        }
        for fields in ["", "range: bytes=0-5\r\n", "range: bytes=0-5\r\nif-range: \"v1\"\r\n"] {
            let hit = proxy.ask(get("/", fields)).await;
            weak(&hit);
            assert_eq!((hit.status(), hit.text()), (200, first.text()), "{fields}");
        }
        for tag in ["\"v1\"", "W/\"v1\""] {
            let known = proxy.ask(get("/", &format!("if-none-match: {tag}\r\n"))).await;
            assert_eq!((known.status(), known.head.get("etag")), (304, Some("W/\"v1\"")));
        }
        assert_eq!(backend.count(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_no_room_for_ids_is_untouched() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached(RESUME)).await;
    let data = event(1);
    let length = format!("content-length: {}\r\n", data.len());
    for (fields, body) in [
        (
            "content-type: text/event-stream\r\ncontent-encoding: gzip\r\ntransfer-encoding: chunked\r\n",
            chunk(&data) + END,
        ),
        (&*format!("content-type: text/event-stream\r\n{length}"), data.clone()),
        ("content-type: application/x-ndjson\r\ntransfer-encoding: chunked\r\n", chunk(&data) + END),
    ] {
        let mut client = asking(&proxy, prompt("")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(format!("HTTP/1.1 200 OK\r\n{fields}connection: close\r\n\r\n{body}")).await;
        assert_eq!(client.answer().await.text(), data, "{fields}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_changes_nothing_and_another_process_begins_anew() {
    let backend = Backend::start().await;
    let file = |more: &str, section: &str| {
        format!("upstreams: {{ api: {{ endpoints: [\"{}\"] }} }}\n{more}{}", backend.url(), cached(section))
    };
    let proxy = Proxy::start(&file("", RESUME)).await;
    let Begun { client, mut upstream, id } = begin(&backend, &proxy, prompt("x-request-id: cut\r\n")).await;
    left(&proxy, client, "cut", false).await;
    // The section itself changes, too.
    proxy.rewrite(&file("defaults: { timeouts: { connect: 4s } }\n", &RESUME.replace("20s", "30s")));
    proxy.signal(Signal::HUP);
    proxy.line("reloaded").await;
    upstream.send(chunk(&event(2))).await;
    let mut again = asking(&proxy, prompt(&last(&id, 1))).await;
    again.head().await;
    comes(&mut again, 2..=2, &id).await;
    upstream.send(chunk(&event(3)) + END).await;
    comes(&mut again, 3..=3, &id).await;
    assert_eq!(again.chunk().await, None);

    let other = Proxy::start(&file("", RESUME)).await;
    let mut again = asking(&other, prompt(&last(&id, 1))).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.send(stream() + &chunk(&event(1)) + END).await;
    again.head().await;
    assert_ne!(first(&mut again).await, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn comments_and_error_events_of_ours_come_between_as_before() {
    let backend = Backend::start().await;
    let settings =
        format!("defaults: {{ timeouts: {{ heartbeat: 60ms, idle: 1s, sse_error_event: true }} }}\n{}", cached(RESUME));
    let proxy = Proxy::before(&backend.url(), &settings).await;
    let Begun { mut client, mut upstream, id } = begin(&backend, &proxy, prompt("x-request-id: cut\r\n")).await;
    assert_eq!(client.chunk().await.unwrap(), b":\n\n");
    left(&proxy, client, "cut", false).await;
    upstream.send(chunk(&event(2))).await;
    let mut again = asking(&proxy, prompt(&last(&id, 1))).await;
    again.head().await;
    comes(&mut again, 2..=2, &id).await;
    assert_eq!(again.chunk().await.unwrap(), b":\n\n");
    // The upstream falls silent.
    let mut chunk_after = again.chunk().await.unwrap();
    while chunk_after == b":\n\n" {
        chunk_after = again.chunk().await.unwrap();
    }
    let error = String::from_utf8(chunk_after).unwrap();
    assert!(error.starts_with("event: error\ndata: {"), "{error}");
    assert!(error.contains("urn:sidegate:problem:upstream-timeout"), "{error}");
    assert_eq!(again.chunk().await, None);
    // Who missed something gets that, and the news; who has all of it asks the upstream again.
    let missed = proxy.ask(prompt(&last(&id, 1))).await.text();
    assert!(missed.starts_with(&(numbered(2, &id) + "event: error\n")), "{missed}");
    let mut anew = asking(&proxy, prompt(&last(&id, 2))).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.send(stream() + &chunk(&event(1)) + END).await;
    anew.head().await;
    assert_ne!(first(&mut anew).await, id);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_large_stream_the_last_part_can_be_taken_up() {
    let backend = Backend::start().await;
    let section = "{ methods: [POST], key: [body], resume: 20s, max_body: 64KiB }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    let Begun { mut client, mut upstream, id } = begin(&backend, &proxy, prompt("x-request-id: cut\r\n")).await;
    let large = |n: usize| format!("data: {n} {}", "x".repeat(1000));
    for n in 2..=200 {
        upstream.send(chunk(&(large(n) + "\n\n"))).await;
        reads(&mut client, &(large(n) + &format!("\nid: {id}.{n}\n\n"))).await;
    }
    left(&proxy, client, "cut", false).await;
    upstream.send(END).await;
    let again = proxy.ask(prompt(&last(&id, 190))).await;
    let expected: String = (191..=200).map(|n| large(n) + &format!("\nid: {id}.{n}\n\n")).collect();
    assert_eq!(again.text(), expected);
    let mut anew = asking(&proxy, prompt(&last(&id, 3))).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.send(stream() + &chunk(&event(1)) + END).await;
    anew.head().await;
    assert_ne!(first(&mut anew).await, id, "what came after the third is gone");
}

/// Taken together.
#[tokio::test(flavor = "multi_thread")]
async fn what_can_be_taken_up_again_has_a_bound_and_the_oldest_go_first() {
    let large = |n: usize| format!("data: {n} {}\n\n", "x".repeat(1000));
    let body = event(1) + &(2..=100).map(large).collect::<String>();
    let backend = Recorder::answering(stream() + &chunk(&body) + END).await;
    let section = "{ methods: [POST], key: [body], resume: 20s, max_body: 256KiB, max_bytes: 1MiB }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    let mut ids = Vec::new();
    for n in 0..30 {
        let answer = proxy.ask(post("/", "", &format!("{{\"n\": {n}}}"))).await.text();
        ids.push(answer.strip_prefix("data: 1\nid: ").and_then(|text| text.split_once('.')).unwrap().0.to_owned());
    }
    let before = backend.count();
    let again = async |n: usize| {
        let answer: Message = proxy.ask(post("/", &last(&ids[n], 100), &format!("{{\"n\": {n}}}"))).await;
        answer.text().is_empty()
    };
    for n in 25..30 {
        assert!(again(n).await, "{n}");
    }
    assert_eq!(backend.count(), before);
    for n in 0..5 {
        assert!(!again(n).await, "{n}");
    }
    assert_eq!(backend.count(), before + 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_stream_has_the_ids_that_it_had_when_it_came() {
    let body = (1..=3).map(event).collect::<String>() + "data: [DONE]\n\n";
    let backend = Recorder::answering(stream() + &chunk(&body) + END).await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h, record_streams: true, resume: 100ms }")).await;
    let whole = proxy.get("/").await.text();
    let hit = proxy.get("/").await;
    assert_eq!(hit.text(), whole);
    assert!(source(&hit).starts_with("sidegate; hit; ttl="), "{hit:?}");
    let id = whole.strip_prefix("data: 1\nid: ").and_then(|text| text.split_once('.')).unwrap().0;
    // As browsers ask again; and long after what was held for them is gone.
    let fields = format!("cache-control: no-cache\r\n{}", last(id, 2));
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(300) {
        let again = proxy.ask(get("/", &fields)).await;
        assert_eq!(again.text(), format!("{}data: [DONE]\nid: {id}.4\n\n", numbered(3, id)));
        assert_eq!(source(&again), "sidegate; hit; detail=resumed");
    }
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_taken_up_counts_for_the_tokens_of_a_rate_limit() {
    let backend = Backend::start().await;
    let settings = format!(
        "routes: [{{ upstream: api, name: all, rate_limit: {{ rules: [{{ name: t, key: global, limit: 100000/h, cost: tokens }}] }}, cache: {RESUME} }}]"
    );
    let proxy = Proxy::before(&backend.url(), &settings).await;
    let token = |text: &str| format!("data: {{\"choices\": [{{\"delta\": {{\"content\": \"{text}\"}}}}]}}\n\n");
    let mut client = asking(&proxy, prompt("x-request-id: cut\r\n")).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.send(stream() + &chunk(&token("a"))).await;
    client.head().await;
    let event = String::from_utf8(client.chunk().await.unwrap()).unwrap();
    let id = event.split_once("id: ").unwrap().1.split_once('.').unwrap().0.to_owned();
    left(&proxy, client, "cut", false).await;
    upstream.send(chunk(&token("b").repeat(50)) + END).await;
    proxy.ask(prompt(&format!("x-request-id: again\r\n{}", last(&id, 1)))).await;
    let line = proxy.access_line("again").await;
    assert_eq!((&line["cache"], &line["tokens_out"]), (&json!("resumed"), &json!(50)), "{line}");
}
