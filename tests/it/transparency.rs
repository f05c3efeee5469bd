//! What no policy touches arrives as it was sent, in both directions.

use http::{HeaderMap, HeaderValue, Request, Response};
use http_body_util::BodyExt;

use crate::harness::{
    Backend, Proxy, Wire,
    backend::{Http2Backend, Recorder},
    client::Http2Client,
    within,
};

/// Targets that a proxy which decodes, tidies or encodes would change.
const TARGETS: [&str; 18] = [
    "/",
    "/a%2Fb%2fc",
    "/%41%7e%zz%",
    "/%00%0d%0A%20",
    "//double///slash//",
    "/a/../b/./c/..",
    "/a/%2e%2E/b",
    "/a;b=c;d/e;",
    "/plus+and%2Bplus",
    "/sp%20ace~!$&'()*+,;=:@",
    "/back\\slash^caret|pipe\"quote{brace}[bracket]",
    "/caf\u{e9}",
    "/?",
    "/?a=1&a=2&b=%20+%2B&&=&c",
    "/x??y=?/../&z=//",
    "/q?u=http://a.example/b?c=d%23e",
    "/trailing/",
    "/%e2%82%ac?%e2%82%ac=\u{20ac}",
];

#[tokio::test(flavor = "multi_thread")]
async fn targets_arrive_byte_for_byte() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    for target in TARGETS {
        client.send(format!("GET {target} HTTP/1.1\r\nhost: sidegate.test\r\n\r\n")).await;
        assert_eq!(client.answer().await.status(), 200, "{target}");
    }
    let arrived: Vec<String> = backend.requests().iter().map(|request| request.head.target().to_owned()).collect();
    assert_eq!(arrived, TARGETS);
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_of_an_http2_client_arrive_byte_for_byte_and_at_an_http2_upstream_too() {
    let recorder = Recorder::ok().await;
    let proxy = Proxy::before(&recorder.url(), "").await;
    let client = Http2Client::to(proxy.address()).await;
    for target in TARGETS {
        assert_eq!(client.get(target).await.status(), 200, "{target}");
    }
    let arrived: Vec<String> = recorder.requests().iter().map(|request| request.head.target().to_owned()).collect();
    assert_eq!(arrived, TARGETS);

    let backend = Http2Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;
    let mut client = proxy.connect().await;
    for target in TARGETS {
        client.send(format!("GET {target} HTTP/1.1\r\nhost: sidegate.test\r\n\r\n")).await;
        let exchange = backend.next().await;
        assert_eq!(exchange.request.uri().path_and_query().unwrap().as_str(), target);
        exchange.answer(Response::new(())).finish();
        assert_eq!(client.answer().await.status(), 200, "{target}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_methods_and_status_codes_pass() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    let mut upstream = None;
    for (method, status) in [("BREW", "299 Odd"), ("PROPFIND", "418 I'm a teapot"), ("get", "799 Unheard Of")] {
        client.send(format!("{method} / HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        let mut wire = match upstream.take() {
            Some(wire) => wire,
            None => backend.accept().await,
        };
        assert_eq!(wire.head().await.start, format!("{method} / HTTP/1.1"));
        wire.send(format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n")).await;
        assert_eq!(client.answer().await.head.start, format!("HTTP/1.1 {status}"));
        upstream = Some(wire);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn repeated_fields_keep_their_order_and_values_their_bytes() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    let request = b"GET / HTTP/1.1\r\nhost: a\r\nx-a: 1\r\ncookie: b=2\r\nx-a: 3, 4\r\nX-Empty:\r\nx-a: 2\r\n\
        x-bytes: \x80\xffcaf\xc3\xa9\r\nx-tab: a\tb\r\ncookie: a=1\r\nuser-agent: \r\n\r\n";
    client.send(request).await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!(head.all("x-a"), ["1", "3, 4", "2"]);
    assert_eq!(head.all("cookie"), ["b=2", "a=1"]);
    assert_eq!(head.all("x-empty"), [""]);
    assert_eq!(head.all("user-agent"), [""]);
    assert_eq!(head.all("x-tab"), ["a\tb"]);
    // The harness shows what is no UTF-8 byte for byte.
    assert_eq!(head.get("x-bytes").unwrap().chars().map(u32::from).collect::<Vec<_>>()[..2], [0x80, 0xff]);
    for absent in ["accept", "accept-encoding", "content-type", "content-length", "transfer-encoding", "connection"] {
        assert_eq!(head.get(absent), None, "{absent} was not sent");
    }

    upstream
        .send("HTTP/1.1 200 OK\r\nset-cookie: b=2\r\nx-a: 1\r\nset-cookie: a=1; Path=/\r\nx-a: 2\r\ncontent-length: 0\r\n\r\n")
        .await;
    let answer = client.head().await;
    assert_eq!(answer.all("set-cookie"), ["b=2", "a=1; Path=/"]);
    assert_eq!(answer.all("x-a"), ["1", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_crumbs_of_an_http2_clients_cookies_are_one_field_for_http1() {
    let recorder = Recorder::ok().await;
    let proxy = Proxy::before(&recorder.url(), "").await;
    let crumbs = || {
        let request = Request::get("http://sidegate.test/").header("cookie", "a=1").header("cookie", "b=2; c=3");
        request.header("cookie", "d=4").body(()).unwrap()
    };
    assert_eq!(Http2Client::to(proxy.address()).await.ask(crumbs()).await.status(), 200);
    assert_eq!(recorder.only().head.get("cookie"), Some("a=1; b=2; c=3; d=4"));

    // Between two HTTP/2 connections they may stay as they are.
    let backend = Http2Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;
    let client = Http2Client::to(proxy.address()).await;
    let asked = async {
        let exchange = backend.next().await;
        let cookies: Vec<_> = exchange.request.headers().get_all("cookie").iter().cloned().collect();
        exchange.answer(Response::new(())).finish();
        cookies
    };
    assert_eq!(tokio::join!(client.ask(crumbs()), asked).1, ["a=1", "b=2; c=3", "d=4"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_of_one_hop_are_gone_both_ways() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client
        .send(
            "GET / HTTP/1.1\r\nhost: a\r\nconnection: keep-alive, X-Hop\r\nConnection: x-second\r\nx-hop: 1\r\n\
             x-second: 2\r\nkeep-alive: timeout=5\r\nproxy-connection: keep-alive\r\nte: trailers, deflate\r\n\
             proxy-authorization: Basic c2VjcmV0\r\nproxy: evil\r\nx-stays: 3\r\nauthorization: Bearer t\r\n\r\n",
        )
        .await;
    let (mut upstream, head) = backend.accept_head().await;
    let gone =
        ["connection", "x-hop", "x-second", "keep-alive", "proxy-connection", "te", "proxy-authorization", "proxy"];
    for name in gone {
        assert_eq!(head.get(name), None, "{head:?}");
    }
    assert_eq!((head.get("x-stays"), head.get("authorization")), (Some("3"), Some("Bearer t")));

    upstream
        .send(
            "HTTP/1.1 200 OK\r\nconnection: x-hop, close\r\nx-hop: 1\r\nkeep-alive: timeout=5\r\n\
             proxy-connection: close\r\nproxy-authenticate: Basic\r\nx-stays: 3\r\nwww-authenticate: Basic\r\n\
             content-length: 2\r\n\r\nok",
        )
        .await;
    let answer = client.answer().await;
    for name in ["connection", "x-hop", "keep-alive", "proxy-connection", "proxy-authenticate"] {
        assert_eq!(answer.head.get(name), None, "{:?}", answer.head);
    }
    assert_eq!((answer.head.get("x-stays"), answer.head.get("www-authenticate")), (Some("3"), Some("Basic")));
    // The close was the upstream's own affair.
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    backend.accept_head().await.0.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.status(), 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_without_a_body_leave_the_connection_in_order() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    let mut upstream: Option<Wire> = None;
    for (method, answer) in [
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-length: 1234\r\n\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"),
        ("HEAD", "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"),
        ("GET", "HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", "HTTP/1.1 304 Not Modified\r\netag: \"1\"\r\n\r\n"),
        ("DELETE", "HTTP/1.1 204 No Content\r\n\r\n"),
        ("GET", "HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    ] {
        client.send(format!("{method} / HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        let mut wire = match upstream.take() {
            Some(wire) => wire,
            None => backend.accept().await,
        };
        wire.head().await;
        wire.send(answer).await;
        // Only the head is read: a byte more would stand before the next one and make it unreadable.
        let head = client.head().await;
        assert_eq!(head.status(), answer.split(' ').nth(1).unwrap().parse::<u16>().unwrap());
        if answer.contains("1234") {
            assert_eq!(head.get("content-length"), Some("1234"), "{method} {answer}");
        }
        if answer.contains("etag") {
            assert_eq!(head.get("etag"), Some("\"1\""));
        }
        upstream = Some(wire);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http10_client_gets_a_body_that_ends_with_its_connection() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.0\r\nhost: a\r\n\r\n").await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!(head.start, "GET / HTTP/1.1");
    upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\n\r\n").await;
    let (answer, _) = client.rest().await;
    let answer = String::from_utf8(answer).unwrap();
    assert!(answer.ends_with("\r\n\r\none") && !answer.contains("chunked"), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn trailers_pass_both_ways() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client
        .send(
            "POST / HTTP/1.1\r\nhost: a\r\nte: trailers\r\nconnection: te\r\ntrailer: x-sum\r\n\
             transfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\nx-sum: 1\r\n\r\n",
        )
        .await;
    let mut upstream = backend.accept().await;
    let request = upstream.request().await;
    assert_eq!(request.trailers, [("x-sum".to_owned(), "1".to_owned())]);
    upstream
        .send(
            "HTTP/1.1 200 OK\r\ntrailer: x-end\r\ntransfer-encoding: chunked\r\n\r\n3\r\ntwo\r\n0\r\nx-end: 2\r\n\r\n",
        )
        .await;
    let answer = client.answer().await;
    assert_eq!((answer.text(), &*answer.trailers), ("two".to_owned(), &[("x-end".to_owned(), "2".to_owned())][..]));
    assert_eq!(answer.head.get("x-end"), None, "a trailer is no field of the head");
}

const HTTP2_UPSTREAM: &str = "upstreams: { api: { endpoints: [\"UPSTREAM\"], protocol: http2 } }";

#[tokio::test(flavor = "multi_thread")]
async fn a_grpc_call_passes_with_its_trailers() {
    let backend = Http2Backend::start().await;
    let proxy = Proxy::before(&backend.url(), HTTP2_UPSTREAM).await;
    let client = Http2Client::to(proxy.address()).await;
    let call = Request::post("http://sidegate.test/pkg.Service/Method")
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .header("grpc-timeout", "1S")
        .body(())
        .unwrap();
    let (sender, answer) = client.begin(call);
    let answer = tokio::spawn(answer);
    let mut exchange = backend.next().await;
    assert_eq!(exchange.request.version(), http::Version::HTTP_2);
    assert_eq!(exchange.request.headers()["te"], "trailers");
    assert_eq!(exchange.request.headers()["grpc-timeout"], "1S");
    assert_eq!(exchange.request.uri().authority().unwrap(), "sidegate.test");

    // Both directions move message by message.
    for message in ["one", "two"] {
        sender.data(message).await;
        assert_eq!(crate::harness::client::data(exchange.request.body_mut()).await.unwrap(), message);
    }
    let reply = exchange.answer(Response::builder().header("content-type", "application/grpc").body(()).unwrap());
    let mut answer = within("the head", answer).await.unwrap().unwrap();
    reply.data("three").await;
    assert_eq!(crate::harness::client::data(answer.body_mut()).await.unwrap(), "three");
    sender.finish();
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static("5"));
    trailers.insert("grpc-message", HeaderValue::from_static("not%20found"));
    reply.trailers(trailers.clone()).await;
    let end = within("the end", answer.into_body().collect()).await.unwrap();
    assert_eq!(end.trailers(), Some(&trailers));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http1_upstreams_trailers_reach_an_http2_client() {
    let backend = Recorder::answering(
        "HTTP/1.1 200 OK\r\ntrailer: x-end\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\nx-end: 2\r\n\r\n",
    )
    .await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let client = Http2Client::to(proxy.address()).await;
    let body = within("the body", client.get("/").await.into_body().collect()).await.unwrap();
    assert_eq!(body.trailers().unwrap()["x-end"], "2");
    assert_eq!(body.to_bytes(), "one");
}

// `Expect: 100-continue`: the body is the upstream's to ask for.

const OFFER: &str = "POST /upload HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 5\r\n\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn an_offered_body_is_sent_when_the_upstream_asks_for_it() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send(OFFER).await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!(head.get("expect"), Some("100-continue"));
    assert_eq!(head.get("content-length"), Some("5"));
    upstream.send("HTTP/1.1 100 Continue\r\n\r\n").await;
    assert_eq!(client.head().await.start, "HTTP/1.1 100 Continue");
    client.send("hello").await;
    assert_eq!(upstream.exactly(5).await, b"hello");
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    assert_eq!(client.answer().await.text(), "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upstream_that_does_not_ask_for_an_offered_body_is_not_late_for_it() {
    let backend = Backend::start().await;
    // Much less than the offer lasts.
    let proxy = Proxy::before(&backend.url(), "defaults: { timeouts: { first_byte: 300ms } }").await;
    let mut client = proxy.connect().await;
    client.send(OFFER).await;
    let (mut upstream, _) = backend.accept_head().await;
    assert_eq!(client.head().await.start, "HTTP/1.1 100 Continue");
    client.send("hello").await;
    assert_eq!(upstream.exactly(5).await, b"hello");
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
    assert_eq!(client.answer().await.text(), "ok");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_offered_body_that_is_refused_is_never_asked_for() {
    for status in ["417 Expectation Failed", "413 Payload Too Large", "401 Unauthorized"] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), "").await;
        let mut client = proxy.connect().await;
        client.send(OFFER).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nno")).await;
        let answer = client.answer().await;
        assert_eq!(answer.head.start, format!("HTTP/1.1 {status}"), "the first word is the last");
        assert_eq!(answer.text(), "no");

        // What the next client sends must not be taken for the body that never came.
        let mut next = proxy.connect().await;
        next.send("GET /next HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let (mut upstream, head) = backend.accept_head().await;
        assert_eq!(head.target(), "/next");
        upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
        assert_eq!(next.answer().await.status(), 204);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_backends_own_headers_win_and_what_it_says_of_itself_is_removed() {
    let backend = Recorder::answering(
        "HTTP/1.1 200 OK\r\nserver: uvicorn\r\nx-powered-by: x\r\nx-frame-options: SAMEORIGIN\r\ndate: yesterday\r\n\
         content-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    )
    .await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let head = proxy.get("/").await.head;
    assert_eq!(head.get("x-frame-options"), Some("SAMEORIGIN"));
    assert_eq!(head.get("x-content-type-options"), Some("nosniff"));
    assert_eq!(head.get("content-security-policy"), Some("default-src 'none'; frame-ancestors 'none'"));
    assert_eq!((head.get("server"), head.get("x-powered-by")), (None, None));
    assert_eq!(head.get("strict-transport-security"), None, "over cleartext it has no meaning");
    assert_eq!(head.get("date"), Some("yesterday"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_keeps_its_own_framing() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    for (method, framing, body, length, coding) in [
        ("GET", "", "", None, None),
        ("GET", "content-length: 0\r\n", "", Some("0"), None),
        ("GET", "content-length: 5\r\n", "hello", Some("5"), None),
        ("POST", "", "", None, None),
        ("POST", "content-length: 0\r\n", "", Some("0"), None),
        ("POST", "content-length: 5\r\n", "hello", Some("5"), None),
        ("POST", "transfer-encoding: chunked\r\n", "0\r\n\r\n", None, Some("chunked")),
        ("DELETE", "transfer-encoding: chunked\r\n", "5\r\nhello\r\n0\r\n\r\n", None, Some("chunked")),
        ("BREW", "content-length: 5\r\n", "hello", Some("5"), None),
    ] {
        let before = backend.requests().len();
        client.send(format!("{method} / HTTP/1.1\r\nhost: a\r\n{framing}\r\n{body}")).await;
        assert_eq!(client.answer().await.text(), "ok");
        let request = backend.requests().swap_remove(before);
        let seen = (request.head.get("content-length"), request.head.get("transfer-encoding"));
        assert_eq!(seen, (length, coding), "{method} {framing}");
        assert_eq!(request.text(), if body.contains("hello") { "hello" } else { "" });
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_http2_clients_body_has_its_length_upstream_where_it_had_one() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let client = Http2Client::to(proxy.address()).await;
    for length in [Some("5"), None] {
        let request = Request::post("http://sidegate.test/");
        let request = length.into_iter().fold(request, |request, length| request.header("content-length", length));
        let (sender, answer) = client.begin(request.body(()).unwrap());
        sender.data("hello").await;
        sender.finish();
        assert_eq!(within("the answer", answer).await.unwrap().status(), 200);
        let request = backend.requests().pop().unwrap();
        assert_eq!((request.head.get("content-length"), request.text().as_str()), (length, "hello"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_response_with_two_framings_goes_on_with_the_one_that_counts() {
    let both = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    let backend = Recorder::answering(both).await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let answer = proxy.get("/").await;
    assert_eq!((answer.text().as_str(), answer.head.get("content-length")), ("hello", None));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_informational_response_does_not_stand_in_for_the_final_one() {
    let backend = Recorder::answering(
        "HTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\n\r\n\
         HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nfinal",
    )
    .await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    for _ in 0..2 {
        client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
        let answer = loop {
            let head = client.head().await;
            if head.status() >= 200 {
                break head;
            }
        };
        assert_eq!((answer.status(), answer.get("link")), (200, None));
        assert_eq!(client.exactly(5).await, b"final");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn options_of_everything_passes_and_max_forwards_counts_down() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let ask = async |start: &str, left: &str| {
        proxy.ask(format!("{start} HTTP/1.1\r\nhost: a\r\nmax-forwards: {left}\r\n\r\n")).await.status()
    };
    assert_eq!(ask("OPTIONS *", "5").await, 200);
    assert_eq!(ask("OPTIONS /x", "1").await, 200);
    assert_eq!(ask("GET /x", "0").await, 200, "a GET is none of those that count");
    let seen: Vec<_> = backend
        .requests()
        .iter()
        .map(|request| (request.head.target().to_owned(), request.head.get("max-forwards").unwrap().to_owned()))
        .collect();
    let expected = [("*", "4"), ("/x", "0"), ("/x", "0")].map(|(target, left)| (target.to_owned(), left.to_owned()));
    assert_eq!(seen, expected);
    assert!((200..300).contains(&ask("OPTIONS /x", "0").await), "answered here");
    assert_eq!(ask("TRACE /x", "0").await, 400);
    assert_eq!(backend.requests().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_stream_asks_outer_proxies_not_to_buffer_it() {
    for (own, expected) in [("", "no"), ("x-accel-buffering: yes\r\n", "yes")] {
        let backend = Recorder::answering(format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n{own}content-length: 2\r\n\r\n\n\n"
        ))
        .await;
        let proxy = Proxy::before(&backend.url(), "").await;
        assert_eq!(proxy.get("/").await.head.get("x-accel-buffering"), Some(expected));
    }
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    assert_eq!(proxy.get("/").await.head.get("x-accel-buffering"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_clients_say_of_traces_sessions_and_resumption_passes_untouched() {
    const FIELDS: [(&str, &str); 6] = [
        ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
        ("tracestate", "vendor=opaque,other=1"),
        ("x-session-id", "s-1"),
        ("last-event-id", "42"),
        ("accept-encoding", "gzip, br;q=0.5"),
        ("range", "bytes=0-4"),
    ];
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let fields = FIELDS.map(|(name, value)| format!("{name}: {value}\r\n")).concat();
    proxy.ask(format!("GET / HTTP/1.1\r\nhost: a\r\nx-request-id: trace-1\r\n{fields}\r\n")).await;
    let head = backend.only().head;
    for (name, value) in FIELDS {
        assert_eq!(head.get(name), Some(value));
    }
    let line = proxy.access_line("trace-1").await;
    assert_eq!((&line["session_id"], &line["trace_id"]), (&"s-1".into(), &"4bf92f3577b34da6a3ce929d0e0e4736".into()));
}
