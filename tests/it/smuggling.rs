//! What could be read in two ways ends in 400, or in exactly one request upstream that cannot.

use http::Response;

use crate::harness::{
    Backend, Proxy,
    backend::{Http2Backend, Recorder},
    client::{GOAWAY, HEADERS, Http2Client, RST_STREAM, RawHttp2},
};

/// How a case has to end.
#[derive(Debug, Clone, Copy)]
enum End {
    /// 400, the connection closed, and nothing upstream.
    Refused,
    /// One request upstream, with this body.
    One(&'static str),
    /// Either; where the parser may forgive what cannot be mistaken.
    Either,
}
use End::{Either, One, Refused};

/// Sends `request` and looks at what becomes of it. The recorder behind the proxy reads strictly.
async fn ends(proxy: &Proxy, backend: &Recorder, name: &str, request: &[u8], end: End) {
    let before = backend.requests().len();
    let mut client = proxy.connect().await;
    client.send(request).await;
    let answer = client.answer().await;
    let upstream = backend.requests().split_off(before);
    let refused = answer.status() == 400 && upstream.is_empty();
    match end {
        Refused => assert!(refused, "{name}: {} {upstream:?}", answer.head.start),
        One(_) => assert!(answer.status() == 200 && upstream.len() == 1, "{name}: {} {upstream:?}", answer.head.start),
        Either => assert!(refused || upstream.len() == 1, "{name}: {} {upstream:?}", answer.head.start),
    }
    if let (One(body), [only]) = (end, &*upstream) {
        assert_eq!(only.text(), body, "{name}");
    }
    for request in &upstream {
        assert!(!request.head.start.contains("smuggled"), "{name}: {request:?}");
    }
    if answer.status() == 400 {
        let (rest, _) = client.rest().await;
        assert!(rest.is_empty(), "{name}: {}", rest.escape_ascii());
        assert_eq!(backend.requests().len(), before, "{name}: nothing follows a refusal");
    }
}

async fn all_end(cases: &[(&str, &[u8], End)]) {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for (name, request, end) in cases {
        ends(&proxy, &backend, name, request, *end).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_framings_are_one_too_many() {
    all_end(&[
        ("+5", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: +5\r\n\r\nhello", Refused),
        ("-5", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: -5\r\n\r\nhello", Refused),
        ("0x5", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 0x5\r\n\r\nhello", Refused),
        ("5 5", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5 5\r\n\r\nhello", Refused),
        ("5,5", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5, 5\r\n\r\nhello", Refused),
        ("an empty length", b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length:\r\n\r\nhello", Refused),
        (
            "a length beyond 64 bits",
            b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 18446744073709551621\r\n\r\nhello",
            Refused,
        ),
        (
            "two lengths that differ",
            b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello!",
            Refused,
        ),
        (
            "two lengths that agree",
            b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 5\r\n\r\nhello",
            Either,
        ),
        (
            "TE in HTTP/1.0",
            b"POST / HTTP/1.0\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
            Refused,
        ),
    ])
    .await;
}

/// RFC 9112 §6.3: the coding counts, the length is removed, and the connection ends with the answer. That is all that
/// keeps what follows from being read as a request by somebody who counted differently.
#[tokio::test(flavor = "multi_thread")]
async fn a_length_beside_a_transfer_coding_is_forgotten_and_the_connection_with_it() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for fields in [
        "content-length: 6\r\ntransfer-encoding: chunked",
        "transfer-encoding: chunked\r\ncontent-length: 6",
        "content-length: 6\r\ntransfer-encoding: chunked\r\ncontent-length: 6",
    ] {
        let before = backend.requests().len();
        let mut client = proxy.connect().await;
        client
            .send(format!(
                "POST / HTTP/1.1\r\nhost: a\r\n{fields}\r\n\r\n5\r\nhello\r\n0\r\n\r\n\
                 GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n"
            ))
            .await;
        let answer = client.answer().await;
        let (rest, _) = client.rest().await;
        assert!(rest.is_empty(), "{fields:?}: {}", rest.escape_ascii());
        let upstream = backend.requests().split_off(before);
        if answer.status() == 400 {
            assert!(upstream.is_empty(), "{fields:?}: {upstream:?}");
            continue;
        }
        assert_eq!((answer.status(), upstream.len()), (200, 1), "{fields:?}: {upstream:?}");
        assert_eq!((upstream[0].head.target(), upstream[0].text().as_str()), ("/", "hello"), "{fields:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transfer_coding_in_disguise_is_refused_or_seen_through() {
    // Each has a length as well, by which a reader that overlooks the coding would go.
    const REST: &str = "content-length: 4\r\n\r\n25\r\nGET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n\r\n0\r\n\r\n";
    // To these the parser is allowed to see through: the coding counts.
    const SEEN_THROUGH: [&str; 2] = ["transfer-encoding:\tchunked\r\n", "x: y\ntransfer-encoding: chunked\r\n"];
    let disguises = [
        "transfer-encoding: xchunked\r\n",
        "transfer-encoding : chunked\r\n",
        "transfer-encoding:\tchunked\r\n",
        "transfer-encoding: chunked\r\ntransfer-encoding: x\r\n",
        "transfer-encoding: x\r\ntransfer-encoding: chunked\r\n",
        " transfer-encoding: chunked\r\n",
        "x: y\r\n transfer-encoding: chunked\r\n",
        "x: y\ntransfer-encoding: chunked\r\n",
        "x: y\rtransfer-encoding: chunked\r\n",
        "transfer-encoding\r\n : chunked\r\n",
        "transfer-encoding: \"chunked\"\r\n",
        "transfer-encoding: chunked, identity\r\n",
        "transfer-encoding: identity, chunked\r\n",
        "transfer-encoding: identity\r\n",
        "transfer-encoding: \x0bchunked\r\n",
        "transfer-encoding: chunked;q=1\r\n",
        "transfer-encoding: gzip\r\n",
        "transfer-encoding:\r\n chunked\r\n",
        "Transfer_Encoding: chunked\r\n",
    ];
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for disguise in disguises {
        let before = backend.requests().len();
        let mut client = proxy.connect().await;
        client.send(format!("POST / HTTP/1.1\r\nhost: a\r\n{disguise}{REST}")).await;
        let answer = client.answer().await;
        let upstream = backend.requests().split_off(before);
        if disguise.starts_with("Transfer_Encoding") {
            // No coding for anyone: the length counts, and the underscore does not go on.
            assert_eq!((answer.status(), upstream[0].text().as_str()), (200, "25\r\n"), "{disguise:?}");
            assert_eq!(upstream[0].head.get("transfer_encoding"), None);
            continue;
        }
        client.rest().await;
        assert_eq!(backend.requests().len(), before + upstream.len(), "{disguise:?}: nothing follows");
        if answer.status() == 200 && SEEN_THROUGH.contains(&disguise) {
            assert_eq!(upstream.len(), 1, "{disguise:?}: {upstream:?}");
            assert_eq!((upstream[0].head.target(), upstream[0].body.len()), ("/", 0x25), "{disguise:?}");
            continue;
        }
        assert_eq!(answer.status(), 400, "{disguise:?}");
        assert!(upstream.is_empty(), "{disguise:?}: {upstream:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn chunks_are_read_strictly() {
    const HEAD: &str = "POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n";
    let cases: [(&str, &str, End); 15] = [
        ("in order", "5\r\nhello\r\n0\r\n\r\n", One("hello")),
        ("an extension", "5;a=b\r\nhello\r\n0\r\n\r\n", One("hello")),
        ("a quoted extension", "5;a=\"b;c\"\r\nhello\r\n0\r\n\r\n", One("hello")),
        ("a line end in quotes", "5;a=\"\r\nhello\r\n0\r\n\r\n\"\r\nhello\r\n0\r\n\r\n", Either),
        ("a bare LF in an extension", "5;a\nhello\r\n0\r\n\r\n", Either),
        ("a bare CR in an extension", "5;a\rb\r\nhello\r\n0\r\n\r\n", Either),
        ("a bare LF behind a size", "5\nhello\r\n0\r\n\r\n", Refused),
        ("a bare LF behind the data", "5\r\nhello\n0\r\n\r\n", Refused),
        ("no line end behind the data", "5\r\nhello0\r\n\r\n", Refused),
        ("a bare LF behind the last size", "5\r\nhello\r\n0\n\r\n", Refused),
        ("a size with a sign", "+5\r\nhello\r\n0\r\n\r\n", Refused),
        ("a size with a prefix", "0x5\r\nhello\r\n0\r\n\r\n", Refused),
        ("an empty size", "\r\nhello\r\n0\r\n\r\n", Refused),
        ("a size beyond 64 bits", "10000000000000005\r\nhello\r\n0\r\n\r\n", Refused),
        ("a size in words", "five\r\nhello\r\n0\r\n\r\n", Refused),
    ];
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for (name, body, end) in cases {
        ends(&proxy, &backend, name, format!("{HEAD}{body}").as_bytes(), end).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_names_one_host() {
    all_end(&[
        ("two that differ", b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", Refused),
        ("two that agree", b"GET / HTTP/1.1\r\nhost: a\r\nhost: a\r\n\r\n", Refused),
        ("none", b"GET / HTTP/1.1\r\n\r\n", Refused),
        ("an empty one", b"GET / HTTP/1.1\r\nhost:\r\n\r\n", Refused),
        ("a list", b"GET / HTTP/1.1\r\nhost: a, b\r\n\r\n", Refused),
        ("a path", b"GET / HTTP/1.1\r\nhost: a/b\r\n\r\n", Refused),
        ("a user", b"GET / HTTP/1.1\r\nhost: me@a\r\n\r\n", Refused),
        ("a space", b"GET / HTTP/1.1\r\nhost: a b\r\n\r\n", Refused),
        ("a port that is none", b"GET / HTTP/1.1\r\nhost: a:99999\r\n\r\n", Refused),
        ("one behind a space before the colon", b"GET / HTTP/1.1\r\nhost : b\r\nhost: a\r\n\r\n", Refused),
        ("a target with a user", b"GET http://me@a/ HTTP/1.1\r\nhost: a\r\n\r\n", Refused),
        ("an address", b"GET / HTTP/1.1\r\nhost: [::1]:8080\r\n\r\n", One("")),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_host_of_an_absolute_target_is_the_only_one_that_goes_on() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    assert_eq!(proxy.ask("GET http://b.example/x?y HTTP/1.1\r\nhost: a.example\r\n\r\n").await.status(), 200);
    let only = backend.only();
    assert_eq!((only.head.target(), only.head.get("host")), ("/x?y", Some("b.example")));
    assert_eq!(only.head.get("x-forwarded-host"), Some("b.example"));
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_are_read_strictly() {
    all_end(&[
        ("a bare CR in a value", b"GET / HTTP/1.1\r\nhost: a\r\nx: 1\r2\r\n\r\n", Refused),
        ("a NUL in a value", b"GET / HTTP/1.1\r\nhost: a\r\nx: 1\x002\r\n\r\n", Refused),
        ("a NUL in a name", b"GET / HTTP/1.1\r\nhost: a\r\nx\x00y: 1\r\n\r\n", Refused),
        ("a space in a name", b"GET / HTTP/1.1\r\nhost: a\r\nx y: 1\r\n\r\n", Refused),
        ("no name", b"GET / HTTP/1.1\r\nhost: a\r\n: 1\r\n\r\n", Refused),
        ("no colon", b"GET / HTTP/1.1\r\nhost: a\r\nx\r\n\r\n", Refused),
        ("obs-fold", b"GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n 2\r\n\r\n", Refused),
        ("obs-fold with a tab", b"GET / HTTP/1.1\r\nhost: a\r\nx: 1\r\n\t2\r\n\r\n", Refused),
        ("a space before the first field", b"GET / HTTP/1.1\r\n x: 1\r\nhost: a\r\n\r\n", Refused),
        ("a control character in the target", b"GET /\x01 HTTP/1.1\r\nhost: a\r\n\r\n", Refused),
        ("a space in the target", b"GET /a b HTTP/1.1\r\nhost: a\r\n\r\n", Refused),
        ("a tab for a space", b"GET\t/\tHTTP/1.1\r\nhost: a\r\n\r\n", Refused),
        ("no version", b"GET /\r\nhost: a\r\n\r\n", Refused),
        ("another version", b"GET / HTTP/2.0\r\nhost: a\r\n\r\n", Refused),
        ("a small version", b"GET / http/1.1\r\nhost: a\r\n\r\n", Refused),
        ("a target that is no path", b"GET smuggled HTTP/1.1\r\nhost: a\r\n\r\n", Refused),
        ("CONNECT", b"CONNECT a:80 HTTP/1.1\r\nhost: a:80\r\n\r\n", Refused),
        ("a method with a colon", b"GE:T / HTTP/1.1\r\nhost: a\r\n\r\n", Refused),
        ("bare line feeds", b"GET / HTTP/1.1\nhost: a\n\n", Either),
        ("a line before", b"\r\nGET / HTTP/1.1\r\nhost: a\r\n\r\n", One("")),
    ])
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_in_a_row_stay_apart() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client
        .send(
            "POST /one HTTP/1.1\r\nhost: a\r\ncontent-length: 3\r\n\r\noneGET /two HTTP/1.1\r\nhost: a\r\n\r\n\
             POST /three HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nthree\r\n0\r\n\r\n\
             GET /four HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n",
        )
        .await;
    for _ in 0..4 {
        assert_eq!(client.answer().await.text(), "ok");
    }
    let seen: Vec<_> = backend.requests().iter().map(|r| (r.head.target().to_owned(), r.text())).collect();
    let expected = [("/one", "one"), ("/two", ""), ("/three", "three"), ("/four", "")];
    assert_eq!(seen, expected.map(|(target, body)| (target.to_owned(), body.to_owned())));
}

const UPGRADE: &str = "GET /socket HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n";

/// CVE-2026-2833 of another proxy: it forwarded them at once, past every policy.
#[tokio::test(flavor = "multi_thread")]
async fn bytes_behind_an_upgrade_wait_for_the_101() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;

    let mut client = proxy.connect().await;
    client.send(format!("{UPGRADE}GET /next HTTP/1.1\r\nhost: a\r\nx-forwarded-for: 6.6.6.6\r\n\r\n")).await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!(head.target(), "/socket");
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nno").await;
    assert_eq!(client.answer().await.text(), "no");
    // Declined, so they were a request: it goes upstream like any other, on this connection or another.
    let head = tokio::select! {
        head = upstream.head() => head,
        (next, head) = backend.accept_head() => {
            upstream = next;
            head
        }
    };
    assert_eq!((head.target(), head.get("x-forwarded-for")), ("/next", Some("127.0.0.1")));
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.status(), 204);

    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(format!("{UPGRADE}early")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 101);
    assert_eq!(upstream.exactly(5).await, b"early", "accepted, so they belong to the tunnel");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_switch_that_nobody_asked_for_is_an_upstreams_failure() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for (request, answer) in [
        ("GET / HTTP/1.1\r\nhost: a\r\n\r\n", "HTTP/1.1 101 Switching Protocols\r\n\r\n"),
        (
            "GET / HTTP/1.1\r\nhost: a\r\n\r\n",
            "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: echo\r\n\r\n",
        ),
        (UPGRADE, "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: other\r\n\r\n"),
        (UPGRADE, "HTTP/1.1 101 Switching Protocols\r\n\r\n"),
    ] {
        let mut client = proxy.connect().await;
        client.send(request).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(format!("{answer}HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\nsmuggled")).await;
        let answer = client.answer().await;
        assert_eq!(answer.status(), 502, "{request}");
        assert_eq!(answer.json()["type"], "urn:sidegate:problem:upstream-reset");
        upstream.rest().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_nested_http_is_not_upgraded_to() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for protocol in ["h2c", "HTTP/2.0", "TLS/1.3", "h2c, websocket"] {
        let request = format!(
            "GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: {protocol}\r\n\
             http2-settings: AAMAAABkAAQAAP__\r\n\r\n"
        );
        assert_eq!(proxy.ask(request).await.text(), "ok");
    }
    for request in backend.requests() {
        for gone in ["connection", "upgrade", "http2-settings"] {
            assert_eq!(request.head.get(gone), None, "{request:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_before_the_end_of_a_request_spends_the_connection() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("POST /first HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\nbegin").await;
    let (mut first, _) = backend.accept_head().await;
    first.send("HTTP/1.1 413 Payload Too Large\r\ncontent-length: 2\r\n\r\nno").await;
    assert_eq!(client.answer().await.status(), 413);

    let mut next = proxy.connect().await;
    next.send("GET /next HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut second, head) = backend.accept_head().await;
    assert_eq!(head.target(), "/next", "on a connection of its own");
    second.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(next.answer().await.status(), 204);

    // What the first client still sends is thrown away; a request hidden in it is none.
    client.try_send("GET /smuggled HTTP/1.1\r\nhost: a\r\n\r\n").await.ok();
    let (rest, _) = client.rest().await;
    assert!(rest.is_empty(), "{}", rest.escape_ascii());
    let (leftover, _) = first.rest().await;
    assert!(!leftover.windows(4).any(|window| window == b"HTTP"), "{}", leftover.escape_ascii());
    assert!(backend.accepted().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_behind_a_response_are_nobodys() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET /one HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream
        .send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\npoisoned")
        .await;
    assert_eq!(client.answer().await.text(), "ok");
    upstream.rest().await;
    client.send("GET /two HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!(head.target(), "/two");
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\ntwo").await;
    assert_eq!(client.answer().await.text(), "two");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_where_none_can_be_is_nobodys() {
    for (method, answer) in [
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\npoisoned"),
        ("GET", "HTTP/1.1 204 No Content\r\ncontent-length: 8\r\n\r\npoisoned"),
        ("GET", "HTTP/1.1 304 Not Modified\r\ntransfer-encoding: chunked\r\n\r\n8\r\npoisoned\r\n0\r\n\r\n"),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 8\r\n\r\npoisoned"),
    ] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let mut client = proxy.connect().await;
        client.send(format!("{method} /one HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(answer).await;
        assert!([200, 204, 304].contains(&client.head().await.status()));
        upstream.rest().await;
        client.send("GET /two HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let (mut upstream, head) = backend.accept_head().await;
        assert_eq!(head.target(), "/two", "{answer:?}");
        upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\ntwo").await;
        assert_eq!(client.answer().await.text(), "two", "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_whose_answer_has_two_readings_has_failed() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for fields in [
        "content-length: 5\r\ncontent-length: 6",
        "content-length: +5",
        "content-length: 5, 6",
        "transfer-encoding: xchunked",
        "transfer-encoding: chunked, gzip",
        "x: 1\r\n folded",
        "x y: 1",
        "x: 1\x002",
    ] {
        let mut client = proxy.connect().await;
        client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(format!("HTTP/1.1 200 OK\r\n{fields}\r\n\r\nhello!")).await;
        assert_eq!(client.answer().await.status(), 502, "{fields:?}");
        upstream.rest().await;
    }
}

// What only HTTP/2 can say. The frames are written by hand: no library would send them.

type Field = (&'static [u8], &'static [u8]);

const GOOD: [Field; 4] = [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"a")];

/// Sends a head and expects that it comes to nothing: a reset stream, an end of the connection, or 400.
async fn comes_to_nothing(proxy: &Proxy, name: &str, fields: &[(&[u8], &[u8])]) {
    let mut client = RawHttp2::to(proxy.address()).await;
    client.request(fields, true).await;
    let frame = client.frame().await;
    match frame.kind {
        RST_STREAM | GOAWAY => {}
        HEADERS => assert_eq!(frame.status(), Some(400), "{name}: {frame:?}"),
        _ => panic!("{name}: {frame:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_head_that_http1_could_misread_comes_to_nothing() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let extra: [(&str, Field); 18] = [
        ("connection", (b"connection", b"close")),
        ("keep-alive", (b"keep-alive", b"5")),
        ("proxy-connection", (b"proxy-connection", b"close")),
        ("transfer-encoding", (b"transfer-encoding", b"chunked")),
        ("upgrade", (b"upgrade", b"websocket")),
        ("te", (b"te", b"gzip")),
        ("a line end in a value", (b"x", b"1\r\ntransfer-encoding: chunked")),
        ("a line feed in a value", (b"x", b"1\ny: 2")),
        ("a NUL in a value", (b"x", b"1\x002")),
        ("a line end in a name", (b"x: 1\r\ny", b"2")),
        ("a colon in a name", (b"x:y", b"1")),
        ("a capital in a name", (b"X-Y", b"1")),
        ("an empty name", (b"", b"1")),
        ("another host", (b"host", b"b")),
        ("another path", (b":path", b"/smuggled")),
        ("an unknown pseudo-field", (b":smuggled", b"1")),
        ("a length that is none", (b"content-length", b"+5")),
        ("a length without a body", (b"content-length", b"5")),
    ];
    for (name, field) in extra {
        comes_to_nothing(&proxy, name, &[&GOOD[..], &[field]].concat()).await;
    }
    let instead: [(&str, usize, &[u8]); 9] = [
        ("a line end in the path", 2, b"/ HTTP/1.1\r\nhost: a\r\n\r\nGET /smuggled"),
        ("a space in the path", 2, b"/a b"),
        ("an empty path", 2, b""),
        ("a path that is none", 2, b"smuggled"),
        ("a space in the method", 0, b"GET /smuggled"),
        ("a plain CONNECT", 0, b"CONNECT"),
        ("a user in the authority", 3, b"me@a"),
        ("a line end in the authority", 3, b"a\r\nx: 1"),
        ("an authority with a path", 3, b"a/b"),
    ];
    for (name, at, value) in instead {
        let mut fields = GOOD;
        fields[at].1 = value;
        comes_to_nothing(&proxy, name, &fields).await;
    }
    for (name, left_out) in [("no method", 0), ("no path", 2), ("no authority", 3)] {
        let fields: Vec<_> = GOOD.iter().enumerate().filter(|(at, _)| *at != left_out).map(|(_, f)| *f).collect();
        comes_to_nothing(&proxy, name, &fields).await;
    }
    assert!(backend.requests().is_empty(), "{:?}", backend.requests());

    // And the check on the check: the same head without its fault passes.
    let mut client = RawHttp2::to(proxy.address()).await;
    client.request(&GOOD, true).await;
    assert_eq!(client.frame().await.status(), Some(200));
    assert_eq!(backend.only().head.target(), "/");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_body_is_as_long_as_it_says_or_the_request_is_none() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for body in [&b"123"[..], b"1234567"] {
        let mut fields = [&GOOD[..], &[(b"content-length", b"5")]].concat();
        fields[0].1 = b"POST";
        let mut client = RawHttp2::to(proxy.address()).await;
        client.request(&fields, false).await;
        client.send(0, 1, 1, body).await;
        let frame = client.frame().await;
        assert!([RST_STREAM, GOAWAY].contains(&frame.kind) || frame.status() == Some(400), "{frame:?}");
    }
    assert!(backend.requests().is_empty(), "{:?}", backend.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_client_that_resets_again_and_again_is_sent_away_and_others_are_served() {
    let backend = Http2Backend::start().await;
    let proxy =
        Proxy::before(&backend.url(), "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }").await;
    let mut rude = RawHttp2::to(proxy.address()).await;
    rude.storm(2000).await;
    rude.gone().await;
    let polite = Http2Client::to(proxy.address()).await;
    let (sender, answer) = polite.begin(http::Request::get("http://sidegate.test/polite").body(()).unwrap());
    sender.finish();
    let answer = tokio::spawn(answer);
    loop {
        let exchange = backend.next().await;
        if exchange.request.uri().path() == "/polite" {
            exchange.answer(Response::new(())).finish();
            break;
        }
    }
    assert_eq!(answer.await.unwrap().unwrap().status(), 200);
}
