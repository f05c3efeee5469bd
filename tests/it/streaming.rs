//! A frame of a response leaves when it arrives, a stream that broke off is seen as broken off, and who leaves is
//! let go upstream.

use std::{fmt::Write as _, time::Duration};

use bytes::Bytes;
use futures_util::future::join_all;
use http::{Request, Response};
use http_body_util::BodyExt;
use serde_json::json;
use tokio::time::{Instant, sleep, timeout};

use crate::harness::{
    Backend, Ending, Proxy, Wire,
    backend::Http2Backend,
    client::{self, DATA, HEADERS, Http2Client, RST_STREAM, RawHttp2},
    figure, ms, within,
};

const GET: &str = "GET /stream HTTP/1.1\r\nhost: sidegate.test\r\n\r\n";
const HTTP2_UPSTREAM: &str = "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }";

/// A client in the middle of a response whose head has arrived, and the backend's end of it.
async fn begun(proxy: &Proxy, backend: &Backend, head: &str) -> (Wire, Wire) {
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(head).await;
    let head = client.head().await;
    assert_eq!(head.status(), 200);
    (client, upstream)
}

// In the tests of single bytes the backend writes each byte only after the client has got the one before. Whoever
// held a frame back, for a buffer or for a timer without end, would hold the test up for ever.

#[tokio::test(flavor = "multi_thread")]
async fn single_bytes_of_a_chunked_response_arrive_one_by_one() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (mut client, mut upstream) =
        begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    for byte in b"one by one" {
        upstream.send([b'1', b'\r', b'\n', *byte, b'\r', b'\n']).await;
        assert_eq!(client.chunk().await.expect("a chunk"), [*byte]);
    }
    upstream.send("0\r\n\r\n").await;
    assert_eq!(client.chunk().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn single_bytes_of_a_length_delimited_response_arrive_one_by_one() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (mut client, mut upstream) = begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n").await;
    for byte in b"one by one" {
        upstream.send([*byte]).await;
        assert_eq!(client.arrival().await, [*byte]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn single_bytes_of_a_close_delimited_response_arrive_one_by_one_and_its_end_is_an_end() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (mut client, mut upstream) = begun(&proxy, &backend, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await;
    for byte in b"one by one" {
        upstream.send([*byte]).await;
        assert_eq!(client.chunk().await.expect("a chunk"), [*byte]);
    }
    drop(upstream);
    assert_eq!(client.chunk().await, None, "a close is how such a body ends");
}

#[tokio::test(flavor = "multi_thread")]
async fn single_bytes_from_an_http2_upstream_arrive_one_by_one() {
    let backend = Http2Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let body = backend.next().await.answer(Response::new(()));
    assert_eq!(client.head().await.status(), 200, "the head arrives before the first byte of the body exists");
    for byte in b"one by one" {
        body.data(vec![*byte]).await;
        assert_eq!(client.chunk().await.expect("a chunk"), [*byte]);
    }
    body.finish();
    assert_eq!(client.chunk().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn single_bytes_arrive_one_by_one_at_an_http2_client() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let client = Http2Client::to(proxy.address()).await;
    let (request, answer) = client.begin(Request::get("http://sidegate.test/stream").body(()).unwrap());
    request.finish();
    let answering = async {
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        upstream
    };
    let (answer, mut upstream) = tokio::join!(within("the head", answer), answering);
    let mut body = answer.unwrap().into_body();
    for byte in b"one by one" {
        upstream.send([b'1', b'\r', b'\n', *byte, b'\r', b'\n']).await;
        assert_eq!(client::data(&mut body).await.expect("data"), [*byte][..]);
    }
    upstream.send("0\r\n\r\n").await;
    assert_eq!(client::data(&mut body).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn single_bytes_of_a_request_arrive_upstream_one_by_one() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nhost: sidegate.test\r\ntransfer-encoding: chunked\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    for byte in b"one by one" {
        client.send([b'1', b'\r', b'\n', *byte, b'\r', b'\n']).await;
        assert_eq!(upstream.chunk().await.expect("a chunk"), [*byte]);
    }
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nearly").await;
    assert_eq!(client.answer().await.text(), "early", "an answer needs not wait for the end of the request");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_head_of_a_response_arrives_before_its_first_byte() {
    for framing in ["transfer-encoding: chunked", "content-length: 3", "connection: close"] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let head = format!("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{framing}\r\n\r\n");
        // The head is read in here, while the backend has not written a byte of the body.
        let (mut client, mut upstream) = begun(&proxy, &backend, &head).await;
        upstream.send(if framing.starts_with("transfer") { "3\r\nend\r\n0\r\n\r\n" } else { "end" }).await;
        drop(upstream);
        let arrived = String::from_utf8(client.arrival().await).unwrap();
        assert!(arrived.contains("end"), "{framing}: {arrived}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_silent_for_longer_than_total_but_not_idle_lives() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { total: 300ms, idle: 10s } }").await;
    let (mut client, mut upstream) = begun(
        &proxy,
        &backend,
        "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
    )
    .await;
    // The only wait for a time here: that nothing happens within it is the promise.
    sleep(Duration::from_millis(700)).await;
    upstream.send("6\r\ndata:\n\r\n0\r\n\r\n").await;
    assert_eq!(client.chunk().await.expect("an event"), b"data:\n");
    assert_eq!(client.chunk().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_is_silent_for_longer_than_idle_is_broken_off() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { idle: 200ms } }").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\nx-request-id: idle-1\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    client.head().await;
    assert_eq!(client.chunk().await.unwrap(), b"one");
    client.ended().await;
    upstream.ended().await;
    let line = proxy.access_line("idle-1").await;
    assert_eq!(line["aborted_by"], "timeout", "{line}");
    assert_eq!(line["error"], "upstream-timeout", "{line}");
}

// A response that breaks off upstream never ends in order for the client.

#[tokio::test(flavor = "multi_thread")]
async fn a_chunked_response_that_breaks_off_has_no_last_chunk() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let (mut client, mut upstream) =
            begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        upstream.send("3\r\none\r\n").await;
        assert_eq!(client.chunk().await.unwrap(), b"one");
        upstream.leave(reset);
        client.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chunk_that_breaks_off_in_its_middle_has_no_last_chunk() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (mut client, mut upstream) =
        begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
    upstream.send("5\r\none").await;
    drop(upstream);
    let (rest, _) = client.rest().await;
    assert!(!rest.ends_with(b"0\r\n\r\n"), "{}", rest.escape_ascii());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_length_delimited_response_that_breaks_off_stays_short_and_the_connection_ends() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let (mut client, mut upstream) = begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n").await;
        upstream.send("one").await;
        assert_eq!(client.exactly(3).await, b"one");
        upstream.leave(reset);
        client.ended().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_delimited_response_that_is_reset_has_no_last_chunk() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (mut client, mut upstream) = begun(&proxy, &backend, "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n").await;
    upstream.send("one").await;
    assert_eq!(client.chunk().await.unwrap(), b"one");
    upstream.leave(true);
    client.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_upstream_that_resets_its_stream_leaves_no_last_chunk() {
    let backend = Http2Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;
    let mut client = proxy.connect().await;
    client.send(GET).await;
    let body = backend.next().await.answer(Response::new(()));
    client.head().await;
    body.data("one").await;
    assert_eq!(client.chunk().await.unwrap(), b"one");
    drop(body);
    client.ended().await;
}

/// What the end of a stream says that was reset without an error.
const NO_ERROR: &[u8] = &[0; 4];

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_response_without_an_end_has_none_whatever_its_stream_was_reset_with() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\nx-request-id: unended-1\r\n\r\n").await;
    let mut upstream = RawHttp2::serving(backend.accept().await).await;
    upstream.frame().await;
    upstream.send(HEADERS, 4, 1, &[0x88]).await;
    upstream.send(DATA, 0, 1, b"one").await;
    client.head().await;
    assert_eq!(client.chunk().await.unwrap(), b"one");
    upstream.send(RST_STREAM, 0, 1, NO_ERROR).await;
    client.ended().await;
    let line = proxy.access_line("unended-1").await;
    assert_eq!((&line["aborted_by"], &line["error"]), (&"upstream".into(), &"upstream-reset".into()), "{line}");

    let client = Http2Client::to(proxy.address()).await;
    let (request, answer) = client.begin(Request::get("http://sidegate.test/").body(()).unwrap());
    request.finish();
    let answering = async {
        upstream.frame_of(3).await;
        upstream.send(HEADERS, 4, 3, &[0x88]).await;
        upstream.send(DATA, 0, 3, b"one").await;
    };
    let (answer, ()) = tokio::join!(within("the head", answer), answering);
    let mut body = answer.unwrap().into_body();
    assert_eq!(client::data(&mut body).await.unwrap(), "one");
    upstream.send(RST_STREAM, 0, 3, NO_ERROR).await;
    let end = within("the end of the body", body.frame()).await;
    end.expect("not an end of stream").expect_err("a reset");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_answer_is_whole_although_the_rest_of_its_upload_is_refused() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    let mut upstream = RawHttp2::serving(backend.accept().await).await;
    assert_eq!(upstream.frame().await.kind, HEADERS);
    assert_eq!(upstream.frame().await.payload, b"one");
    upstream.send(HEADERS, 4, 1, &[0x88]).await;
    upstream.send(DATA, 1, 1, b"enough").await;
    upstream.send(RST_STREAM, 0, 1, NO_ERROR).await;
    assert_eq!(client.answer().await.text(), "enough");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upload_of_http2_without_an_end_is_never_a_whole_request() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    // NO_ERROR and CANCEL.
    for code in [0, 8] {
        let mut client = RawHttp2::to(proxy.address()).await;
        let id = format!("cut-{code}");
        let fields: [(&[u8], &[u8]); 5] = [
            (b":method", b"POST"),
            (b":scheme", b"http"),
            (b":path", b"/"),
            (b":authority", b"a"),
            (b"x-request-id", id.as_bytes()),
        ];
        client.request(&fields, false).await;
        client.send(DATA, 0, 1, b"half").await;
        let (mut upstream, _) = backend.accept_head().await;
        assert_eq!(upstream.chunk().await.unwrap(), b"half");
        client.send(RST_STREAM, 0, 1, &[0, 0, 0, code]).await;
        let (rest, _) = upstream.rest().await;
        assert!(rest.is_empty(), "no last chunk: {}", rest.escape_ascii());
        assert_eq!(proxy.access_line(&id).await["aborted_by"], "client");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_client_sees_a_response_that_breaks_off_as_a_reset_stream() {
    for head in ["transfer-encoding: chunked", "content-length: 10"] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let client = Http2Client::to(proxy.address()).await;
        let (request, answer) = client.begin(Request::get("http://sidegate.test/stream").body(()).unwrap());
        request.finish();
        let answering = async {
            let (mut upstream, _) = backend.accept_head().await;
            upstream.send(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n")).await;
            upstream.send(if head.starts_with('t') { "3\r\none\r\n" } else { "one" }).await;
            upstream
        };
        let (answer, upstream) = tokio::join!(within("the head", answer), answering);
        let mut body = answer.unwrap().into_body();
        assert_eq!(client::data(&mut body).await.unwrap(), "one");
        drop(upstream);
        let end = within("the end of the body", body.frame()).await;
        let error = end.expect("not an end of stream").expect_err("a reset");
        assert!(format!("{error:?}").contains("Reset"), "{head}: {error:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrived_before_a_break_reaches_the_client() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let event = "data: 1\n\n";
    let bodies = [
        ("transfer-encoding: chunked", "9\r\ndata: 1\n\n\r\n".repeat(2)),
        ("transfer-encoding: chunked", "9\r\ndata: 1\n\n\r\n".repeat(2) + "no chunk\r\n"),
        ("content-length: 100", event.repeat(2)),
    ];
    // It is a race between what is written and the break that follows it, whether they come together or not.
    for turn in 0..60 {
        let (framing, body) = &bodies[turn % bodies.len()];
        let answering = async {
            let (mut upstream, _) = backend.accept_head().await;
            let head = format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n");
            if turn % 2 == 0 {
                upstream.send(head + body).await;
            } else {
                upstream.send(head).await;
                upstream.send(body).await;
            }
        };
        let mut client = proxy.connect().await;
        client.send(GET).await;
        let ((arrived, _), ()) = tokio::join!(client.rest(), answering);
        let arrived = String::from_utf8(arrived).unwrap();
        assert!(arrived.starts_with("HTTP/1.1 200 OK\r\n"), "turn {turn}, {framing}: {arrived}");
        assert_eq!(arrived.matches(event).count(), 2, "turn {turn}, {framing}: {arrived}");
        assert!(!arrived.ends_with("0\r\n\r\n"), "turn {turn}, {framing}: {arrived}");
    }
    let client = Http2Client::to(proxy.address()).await;
    for (framing, body) in &bodies {
        let head = format!("HTTP/1.1 200 OK\r\n{framing}\r\n\r\n");
        let asking = async || {
            let (request, answer) = client.begin(Request::get("http://sidegate.test/").body(()).unwrap());
            request.finish();
            let answer = within("the head", answer).await;
            let mut answer = answer.unwrap_or_else(|error| panic!("{framing}: no head: {error:?}")).into_body();
            let mut arrived = Vec::new();
            let end = loop {
                match within("a frame", answer.frame()).await {
                    Some(Ok(frame)) => arrived.extend(frame.into_data().unwrap()),
                    end => break end,
                }
            };
            assert!(end.is_some(), "{framing}: it is seen as broken off");
            assert_eq!(arrived, event.repeat(2).as_bytes(), "{framing}");
        };
        let answering = async {
            for _ in 0..20 {
                backend.accept_head().await.0.send(head.clone() + body).await;
            }
        };
        tokio::join!(join_all((0..20).map(|_| asking())), answering);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_arrived_before_a_break_reaches_a_client_that_is_slow_to_read_it() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let body = vec![b'x'; 8 << 20];
    for turn in 0..5 {
        let (mut client, mut upstream) =
            begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ncontent-length: 99999999\r\n\r\n").await;
        let mut sending = std::pin::pin!(async {
            upstream.send(&body).await;
            drop(upstream);
        });
        // All of it may find room on the way, the break included, before any of it is read.
        let sent = timeout(Duration::from_millis(300), &mut sending).await.is_ok();
        let rest = async {
            if !sent {
                sending.await;
            }
        };
        let ((arrived, _), ()) = tokio::join!(client.rest(), rest);
        assert_eq!(arrived.len(), body.len(), "turn {turn}");
    }
}

// Who leaves takes the upstream's work along.

#[tokio::test(flavor = "multi_thread")]
async fn leaving_before_the_head_cancels_the_upstream_at_once() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let mut client = proxy.connect().await;
        client.send("GET / HTTP/1.1\r\nhost: a\r\nx-request-id: left-1\r\n\r\n").await;
        let (mut upstream, _) = backend.accept_head().await;
        let left = Instant::now();
        client.leave(reset);
        upstream.ended().await;
        let took = left.elapsed();
        figure(&format!("cancelled before the head, reset {reset}: {}", ms(took)));
        assert!(took.as_millis() < 50, "{took:?}");
        let line = proxy.access_line("left-1").await;
        assert_eq!(line["aborted_by"], "client", "{line}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_in_the_middle_of_a_stream_cancels_the_upstream_at_once() {
    for reset in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let (mut client, mut upstream) =
            begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
        upstream.send("3\r\none\r\n").await;
        client.chunk().await;
        let left = Instant::now();
        client.leave(reset);
        upstream.ended().await;
        let took = left.elapsed();
        figure(&format!("cancelled after the head, reset {reset}: {}", ms(took)));
        assert!(took.as_millis() < 50, "{took:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_over_http2_cancels_the_upstream_at_once_and_leaves_the_connection_alone() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let client = Http2Client::to(proxy.address()).await;

    let (request, answer) = client.begin(Request::get("http://sidegate.test/before").body(()).unwrap());
    request.finish();
    let answer = tokio::spawn(answer);
    let (mut upstream, _) = backend.accept_head().await;
    let left = Instant::now();
    answer.abort();
    // Its request has ended in a frame of its own, and so upstream in a last chunk.
    upstream.rest().await;
    let before = left.elapsed();

    let (request, answer) = client.begin(Request::get("http://sidegate.test/after").body(()).unwrap());
    request.finish();
    let answering = async {
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
        upstream
    };
    let (answer, mut upstream) = tokio::join!(within("the head", answer), answering);
    let mut answer = answer.unwrap();
    assert_eq!(client::data(answer.body_mut()).await.unwrap(), "one");
    let left = Instant::now();
    drop(answer);
    upstream.rest().await;
    let after = left.elapsed();

    figure(&format!("cancelled over HTTP/2 before the head: {}, after: {}", ms(before), ms(after)));
    assert!(before.as_millis() < 50 && after.as_millis() < 50, "{before:?} {after:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_resets_the_stream_of_an_http2_upstream() {
    let backend = Http2Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;

    let mut client = proxy.connect().await;
    client.send(GET).await;
    let mut exchange = backend.next().await;
    drop(client);
    exchange.cancelled().await;

    let mut client = proxy.connect().await;
    client.send(GET).await;
    let body = backend.next().await.answer(Response::new(()));
    body.data("one").await;
    client.head().await;
    drop(client);
    body.cancelled().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_do_not_read_stop_their_upstreams_and_not_the_memory() {
    const CLIENTS: usize = 8;
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let length = 256 << 20;
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n");
    let before = proxy.resident();
    let block = vec![0; 1 << 20];
    let mut clients = Vec::new();
    let mut taken = 0;
    for _ in 0..CLIENTS {
        let (client, mut upstream) = begun(&proxy, &backend, &head).await;
        let mut sent = 0;
        // The backend stands still once every buffer on the way is full.
        while let Ok(result) = timeout(Duration::from_millis(200), upstream.try_send(&block)).await {
            result.expect("nobody left");
            sent += block.len();
            assert!(sent < length, "everything was taken without a reader");
        }
        taken += sent;
        clients.push((client, upstream));
    }
    let each = proxy.resident().saturating_sub(before) / CLIENTS as u64;
    let taken = (taken / CLIENTS) >> 10;
    figure(&format!(
        "clients that do not read: {taken} KiB taken for each by kernel and proxy, {each} KiB of it the proxy's"
    ));
    assert!(each < 4 << 10, "{each} KiB");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_slow_streams_are_held_in_bounded_memory() {
    const STREAMS: usize = 1000;
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let (warm, _) = begun(&proxy, &backend, "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    drop(warm);
    let before = proxy.resident();
    let mut streams = Vec::new();
    for _ in 0..STREAMS {
        let (mut client, mut upstream) = begun(
            &proxy,
            &backend,
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n",
        )
        .await;
        upstream.send("8\r\ndata: 0\n\r\n").await;
        client.chunk().await.expect("an event");
        streams.push((client, upstream));
    }
    for turn in 1..4 {
        let mut event = String::new();
        write!(event, "8\r\ndata: {turn}\n\r\n").unwrap();
        for (_, upstream) in &mut streams {
            upstream.send(&event).await;
        }
        for (client, _) in &mut streams {
            assert_eq!(client.chunk().await.expect("an event"), format!("data: {turn}\n").as_bytes());
        }
    }
    let each = proxy.resident().saturating_sub(before) / STREAMS as u64;
    figure(&format!("{STREAMS} open streams: {each} KiB each, {before} KiB before"));
    assert!(each < 48, "{each} KiB per stream");
    for (client, mut upstream) in streams {
        drop(client);
        assert_ne!(upstream.ended().await, Ending::Reset, "a client that leaves in order is no reset");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_stream_that_nobody_reads_does_not_hold_up_its_neighbour() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let client = Http2Client::to(proxy.address()).await;
    let begin = async |path: &str, length: usize| {
        let (request, answer) = client.begin(Request::get(format!("http://sidegate.test{path}")).body(()).unwrap());
        request.finish();
        let answering = async {
            let (mut upstream, _) = backend.accept_head().await;
            upstream.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n")).await;
            upstream
        };
        let (answer, upstream) = tokio::join!(within("the head", answer), answering);
        (answer.unwrap().into_body(), upstream)
    };
    let (_unread, mut stuck) = begin("/unread", 64 << 20).await;
    let filling = tokio::spawn(async move { stuck.try_send(vec![0; 64 << 20]).await });
    let (mut body, mut upstream) = begin("/read", 5).await;
    upstream.send("alive").await;
    assert_eq!(client::data(&mut body).await.unwrap(), Bytes::from("alive"));
    filling.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_holds_nothing_beyond_the_total() {
    let settings = "routes: [{ upstream: api, concurrency: { max_in_flight: 1, queue: 0 } }]
defaults: { timeouts: { total: 400ms } }";
    for http2 in [false, true] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), settings).await;
        let (mut wire, mut stream) = (None, None);
        if http2 {
            let client = Http2Client::to(proxy.address()).await;
            let request =
                http::Request::get("http://sidegate.test/").header("x-request-id", "unread").body(()).unwrap();
            let (sender, answer) = client.begin(request);
            sender.finish();
            stream = Some((tokio::spawn(answer), client));
        } else {
            let mut client = proxy.connect().await;
            client.send("GET / HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: unread\r\n\r\n").await;
            wire = Some(client);
        }
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\n").await;
        let piece = vec![b'x'; 1 << 16];
        within("the upstream to be let go", async { while upstream.try_send(&piece).await.is_ok() {} }).await;

        let line = proxy.access_line("unread").await;
        assert_eq!((&line["error"], &line["aborted_by"]), (&json!("deadline-exceeded"), &json!("timeout")), "{line}");
        let mut next = proxy.connect().await;
        next.send("GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n").await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
        assert_eq!(next.answer().await.text(), "ok", "its place is free");

        if let Some(mut client) = wire {
            let (read, _) = client.rest().await;
            assert!(read.len() < 1_000_000_000, "it is broken off");
        }
        if let Some((answer, _client)) = stream {
            let mut body = answer.await.unwrap().unwrap().into_body();
            let end = within("the end", async {
                loop {
                    match body.frame().await {
                        Some(Ok(_)) => {}
                        end => return end,
                    }
                }
            });
            assert!(end.await.is_some_and(|end| end.is_err()), "it is broken off");
        }
    }
}
