//! Where an upstream fails, another one serves: the whole answer, and nothing of the first one's.

use serde_json::{Value, json};

use crate::harness::{Backend, Message, Proxy, Wire, backend::Recorder};

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nsecond";
const STREAM: &str =
    "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";

/// A proxy with the upstreams `own`, `second` and `offline`, and a route to `own` of this kind.
async fn proxy(own: &str, second: &str, route: &str) -> Proxy {
    Proxy::start(&format!(
        "upstreams:
  own: {{ endpoints: ['{own}'] }}
  second: {{ endpoints: ['{second}'] }}
  offline: {{ respond: {{ status: 503, json: {{ response: offline }} }} }}
routes:
  - {{ name: ask, upstream: own, {route} }}
"
    ))
    .await
}

fn post(body: &str) -> String {
    let length = body.len();
    format!(
        "POST /v1/chat?a=b HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: fall-1\r\ncontent-type: application/json\r\n\
         authorization: Bearer first\r\ncookie: id=1\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

fn series(from: &str, to: &str, reason: &str) -> String {
    format!(r#"sidegate_fallbacks_total{{route="ask",from="{from}",to="{to}",reason="{reason}"}}"#)
}

#[tokio::test(flavor = "multi_thread")]
async fn each_failure_leads_to_the_second() {
    let (own, second) = (Backend::start().await, Recorder::answering(OK).await);
    let route = "fallback: [second], timeouts: { first_byte: 500ms }";
    let proxy = proxy(&own.url(), &second.url(), route).await;
    for (n, failure) in ["reset", "timeout", "502", "503", "504"].into_iter().enumerate() {
        let mut client = proxy.connect().await;
        client.send(post("{\"n\":1}")).await;
        let mut first = own.accept().await;
        assert_eq!(first.request().await.text(), "{\"n\":1}");
        match failure {
            "reset" => first.leave(true),
            "timeout" => drop(first.ended().await),
            status => first.send(format!("HTTP/1.1 {status} x\r\ncontent-length: 5\r\n\r\nfirst")).await,
        }
        let answer = client.answer().await;
        assert_eq!((answer.status(), &*answer.text()), (200, "second"), "{failure}");
        assert_eq!(answer.head.all("proxy-status"), [r#"sidegate; next-hop="second""#], "{failure}");
        assert_eq!(second.requests()[n].text(), "{\"n\":1}", "{failure}");
        assert_eq!(proxy.sample(&series("own", "second", failure)).await, 1);
    }
    let line = proxy.access_line("fall-1").await;
    assert_eq!((&line["fallback"], &line["upstream"], &line["status"]), (&json!(true), &json!("second"), &json!(200)));
    for status in [200, 404, 429, 500] {
        let mut client = proxy.connect().await;
        client.send(post("{}")).await;
        let (mut first, _) = own.accept_head().await;
        first.send(format!("HTTP/1.1 {status} x\r\ncontent-length: 5\r\n\r\nfirst")).await;
        let answer = client.answer().await;
        assert_eq!((answer.status(), &*answer.text(), answer.head.get("proxy-status")), (status, "first", None));
    }
    assert_eq!(second.requests().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_second_sees_its_own_path_credentials_and_model() {
    let second = Recorder::answering(OK).await;
    let key = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(&key, "secret-key\n").unwrap();
    let key = key.path().display();
    let entry = format!(
        "{{ upstream: second, path: {{ prefix: /v1, with: /api }}, json: {{ model: llama3, user: null }},
            headers: {{ bearer: {{ file: '{key}' }}, set: {{ x-tier: low }}, remove: [x-trace] }} }}"
    );
    let proxy = proxy(&Backend::nowhere().await, &second.url(), &format!("fallback: [{entry}]")).await;
    let request = post(r#"{"model":"gpt-4o","seed":12345678901234567890123,"user":"me"}"#);
    let answer = proxy.ask(request.replace("cookie", "x-trace: 1\r\ncookie")).await;
    assert_eq!(answer.text(), "second");
    let asked = second.only();
    assert_eq!(asked.head.target(), "/api/chat?a=b");
    assert_eq!(asked.text(), r#"{"model":"llama3","seed":12345678901234567890123}"#);
    let field = |name: &str| asked.head.get(name);
    assert_eq!((field("authorization"), field("cookie")), (Some("Bearer secret-key"), None));
    assert_eq!((field("x-tier"), field("x-trace"), field("x-request-id")), (Some("low"), None, Some("fall-1")));
    assert_eq!(field("content-length"), Some("49"));
    let shown = proxy.admin_get("/config").await.json();
    let effective = &shown["effective"]["routes"][0]["fallback"]["to"][0]["headers"];
    for headers in [effective, &shown["given"]["routes"][0]["fallback"][0]["headers"]] {
        assert_eq!((headers["bearer"]["file"].is_string(), &headers["set"]["x-tier"]), (true, &json!("[redacted]")));
    }
    assert!(!format!("{shown} {}", proxy.logged()).contains("secret-key"));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_rewritten_goes_on_to_the_next() {
    let second = Recorder::answering(OK).await;
    let route = "fallback: [{ upstream: second, json: { model: llama3 } }, offline]";
    let proxy = proxy(&Backend::nowhere().await, &second.url(), route).await;
    let answer = proxy.ask(post("model: gpt-4o")).await;
    assert_eq!((answer.status(), answer.json()), (503, json!({ "response": "offline" })));
    assert!(second.requests().is_empty());
    let skipped = r#"sidegate_fallbacks_not_made_total{route="ask",to="second",reason="json"}"#;
    assert_eq!(proxy.sample(skipped).await, 1);
    let get = "GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n";
    assert_eq!(proxy.ask(get).await.text(), "second", "there is nothing to rewrite");
}

#[tokio::test(flavor = "multi_thread")]
async fn at_the_end_there_is_a_fixed_answer() {
    let (own, second) = (Backend::nowhere().await, Backend::nowhere().await);
    let proxy = proxy(&own, &second, "fallback: [second, offline]").await;
    let answer = proxy.ask(post("{}")).await;
    assert_eq!((answer.status(), answer.json()), (503, json!({ "response": "offline" })));
    assert_eq!(answer.head.all("proxy-status"), [r#"sidegate; next-hop="offline""#]);
    assert_eq!(proxy.sample(&series("own", "second", "connect")).await, 1);
    assert_eq!(proxy.sample(&series("second", "offline", "connect")).await, 1);
    let line = proxy.access_line("fall-1").await;
    assert_eq!((&line["upstream"], &line["endpoint"], &line["error"]), (&json!("offline"), &Value::Null, &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_one_the_last_failure_is_the_answer() {
    let (own, second) =
        (Recorder::answering("HTTP/1.1 503 x\r\ncontent-length: 5\r\n\r\nfirst").await, Backend::start().await);
    let proxy = proxy(&own.url(), &second.url(), "fallback: [second]").await;
    let mut client = proxy.connect().await;
    client.send(post("{}")).await;
    second.accept_head().await.0.leave(true);
    let answer = client.answer().await;
    assert_eq!((answer.status(), &answer.json()["type"]), (502, &json!("urn:sidegate:problem:upstream-reset")));
    client.send(post("{}")).await;
    let (mut last, _) = second.accept_head().await;
    last.send("HTTP/1.1 504 x\r\nretry-after: 7\r\ncontent-length: 6\r\n\r\nsecond").await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), &*answer.text(), answer.head.get("retry-after")), (504, "second", Some("7")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_was_half_sent_is_sent_whole() {
    let (own, second) = (Backend::start().await, Backend::start().await);
    let proxy = proxy(&own.url(), &second.url(), "fallback: [second]").await;
    let mut client = proxy.connect().await;
    client.send("POST / HTTP/1.1\r\nhost: sidegate.test\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\n").await;
    let (mut first, _) = own.accept_head().await;
    assert_eq!(first.chunk().await.expect("a chunk"), b"half");
    first.leave(true);
    let (mut then, _) = second.accept_head().await;
    assert_eq!(then.chunk().await.expect("what was kept"), b"half");
    client.send("4\r\nhalf\r\n0\r\n\r\n").await;
    assert_eq!(then.chunk().await.expect("what came later"), b"half");
    assert_eq!(then.chunk().await, None);
    then.send(OK).await;
    assert_eq!(client.answer().await.text(), "second");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_body_falls_back_only_while_nothing_of_it_has_left() {
    let large = "x".repeat(100_000);
    let second = Recorder::answering(OK).await;
    let route = "fallback: { to: [second], replay: 1KiB }";
    let unsent = proxy(&Backend::nowhere().await, &second.url(), route).await;
    assert_eq!(unsent.ask(post(&large)).await.text(), "second");
    assert_eq!(second.only().text(), large);

    let own = Recorder::answering("HTTP/1.1 503 x\r\ncontent-length: 5\r\n\r\nfirst").await;
    let sent = proxy(&own.url(), &second.url(), route).await;
    assert_eq!(sent.ask(post(&large)).await.text(), "first", "the failure itself is passed on");
    assert_eq!(second.requests().len(), 1);
    let lost = r#"sidegate_fallbacks_not_made_total{route="ask",to="second",reason="body"}"#;
    assert_eq!(sent.sample(lost).await, 1);

    let fixed = proxy(&own.url(), &second.url(), "fallback: { to: [second, offline], replay: 1KiB }").await;
    assert_eq!(fixed.ask(post(&large)).await.json(), json!({ "response": "offline" }), "that needs no body");
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_come_before_fallbacks() {
    let own = Recorder::answering("HTTP/1.1 503 x\r\ncontent-length: 5\r\n\r\nfirst").await;
    let second = Recorder::answering("HTTP/1.1 502 x\r\ncontent-length: 6\r\n\r\nsecond").await;
    let route = "retry: {}, fallback: [{ upstream: second, json: { a: 2 } }]";
    let proxy = proxy(&own.url(), &second.url(), route).await;
    let answer = proxy.ask(post("{\"a\":1}").replace("POST", "PUT")).await;
    assert_eq!((answer.status(), &*answer.text()), (502, "second"));
    let texts = |of: &Recorder| of.requests().iter().map(Message::text).collect::<Vec<_>>();
    assert_eq!((texts(&own), texts(&second)), (vec!["{\"a\":1}".to_owned(); 2], vec!["{\"a\":2}".to_owned(); 2]));
    let line = proxy.access_line("fall-1").await;
    assert_eq!((&line["retries"], &line["fallback"]), (&json!(2), &json!(true)));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_is_one_for_all() {
    let (own, second) = (Backend::start().await, Backend::start().await);
    let route = "fallback: [second], timeouts: { first_byte: 700ms, total: 1s }";
    let proxy = proxy(&own.url(), &second.url(), route).await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n").await;
    let (_first, _) = own.accept_head().await;
    let mut then = second.accept().await;
    then.request().await;
    let answer = client.answer().await;
    assert_eq!((answer.status(), &answer.json()["type"]), (504, &json!("urn:sidegate:problem:deadline-exceeded")));
    then.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_is_not_served_by_the_next() {
    let (own, second) = (Backend::start().await, Backend::start().await);
    let proxy = proxy(&own.url(), &second.url(), "fallback: [second, offline]").await;
    let mut client = proxy.connect().await;
    client.send(post("{}")).await;
    own.accept_head().await.0.leave(true);
    let mut then = second.accept().await;
    then.request().await;
    client.leave(true);
    then.ended().await;
    let line = proxy.access_line("fall-1").await;
    assert_eq!((&line["aborted_by"], &line["upstream"]), (&json!("client"), &json!("second")), "{line}");
    assert_eq!(proxy.sample(&series("second", "offline", "reset")).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_dies_before_its_first_event_is_served_whole_by_the_second() {
    let (own, second) = (Backend::start().await, Backend::start().await);
    let route = "fallback: [second], timeouts: { first_byte: 300ms }";
    let proxy = proxy(&own.url(), &second.url(), route).await;
    for failure in ["end", "reset", "error event", "silence"] {
        let mut client = proxy.connect().await;
        client.send(post("{\"stream\":true}")).await;
        let (mut first, _) = own.accept_head().await;
        first.send(STREAM.to_owned() + &chunk(": loading\n\n") + &chunk("data: {\"half\":")).await;
        match failure {
            "end" => first.send("0\r\n\r\n").await,
            "reset" => drop(first),
            "error event" => first.send(chunk("1}\nevent: error\n\n")).await,
            _ => first.send(chunk("\n: still loading\n")).await,
        }
        let (mut then, _) = second.accept_head().await;
        assert_eq!(then.exactly(15).await, b"{\"stream\":true}", "{failure}");
        then.send(STREAM.to_owned() + &chunk("data: one\n\n")).await;
        let head = client.head().await;
        assert_eq!((head.status(), head.all("proxy-status")), (200, vec![r#"sidegate; next-hop="second""#]));
        assert_eq!(client.chunk().await.expect("the first event"), b"data: one\n\n", "{failure}");
        then.send(chunk("data: two\n\n") + "0\r\n\r\n").await;
        assert_eq!(client.chunk().await.expect("the second event"), b"data: two\n\n", "{failure}");
        assert_eq!(client.chunk().await, None, "{failure}: nothing else");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_last_stream_is_not_held_back() {
    let second = Backend::start().await;
    let proxy = proxy(&Backend::nowhere().await, &second.url(), "fallback: [second]").await;
    let mut client = proxy.connect().await;
    client.send(post("{}")).await;
    let (mut then, _) = second.accept_head().await;
    then.send(STREAM).await;
    assert_eq!(client.head().await.status(), 200);
    then.send(chunk("event: error\ndata: 1\n\n") + "0\r\n\r\n").await;
    assert_eq!(client.chunk().await.expect("its own error"), b"event: error\ndata: 1\n\n");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_dies_after_it_has_begun_is_broken_off() {
    let (own, second) = (Backend::start().await, Backend::start().await);
    let proxy = proxy(&own.url(), &second.url(), "fallback: [second, offline]").await;
    let half = "HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\ndata: one\n\n".replace("11", "22");
    for answer in [STREAM.to_owned() + &chunk("data: one\n\n"), half] {
        let mut client: Wire = proxy.connect().await;
        client.send(post("{}")).await;
        let (mut first, _) = own.accept_head().await;
        first.send(&answer).await;
        let head = client.head().await;
        assert_eq!((head.status(), head.get("proxy-status")), (200, None));
        assert!(!client.arrival().await.is_empty());
        first.leave(true);
        let (rest, _) = client.rest().await;
        assert_eq!(String::from_utf8_lossy(&rest), "", "nothing of another answer, and no end");
        assert!(second.accepted().await.is_none());
    }
    let line = proxy.access_line("fall-1").await;
    assert_eq!((&line["error"], &line["fallback"]), (&json!("upstream-reset"), &Value::Null), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_ends_its_body_early_reaches_nobody() {
    let second = Backend::start().await;
    let route = "fallback: [{ upstream: second, json: { a: 1 } }]";
    let proxy = proxy(&Backend::nowhere().await, &second.url(), route).await;
    let mut client = proxy.connect().await;
    client.send(post("{}").replace("content-length: 2", "content-length: 9")).await;
    client.finish().await;
    assert_eq!(client.answer().await.json()["type"], "urn:sidegate:problem:client-reset");
    assert_eq!(proxy.access_line("fall-1").await["fallback"], Value::Null);
    assert!(second.accepted().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_breaker_leads_on_without_a_connection() {
    let (own, second) = (Backend::start().await, Recorder::answering(OK).await);
    let proxy = Proxy::start(&format!(
        "upstreams:
  own: {{ endpoints: ['{}'], circuit_breaker: {{ consecutive_failures: 1, recovery: 1m }} }}
  second: {{ endpoints: ['{}'] }}
routes:
  - {{ name: ask, upstream: own, fallback: [second], retry: {{}} }}
",
        own.url(),
        second.url()
    ))
    .await;
    let mut client = proxy.connect().await;
    client.send(post("{}")).await;
    // A stream that has said nothing yet is a failure to the breaker, too.
    let mut first = own.accept().await;
    first.request().await;
    first.send(STREAM.to_owned() + "0\r\n\r\n").await;
    assert_eq!(client.answer().await.text(), "second");
    for _ in 0..3 {
        client.send(post("{}")).await;
        assert_eq!(client.answer().await.text(), "second");
    }
    assert!(own.accepted().await.is_none());
    assert_eq!(proxy.sample(&series("own", "second", "reset")).await, 1);
    assert_eq!(proxy.sample(&series("own", "second", "circuit-open")).await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_finds_no_place_is_served_by_the_second() {
    let (own, second) = (Backend::start().await, Recorder::answering(OK).await);
    let proxy = Proxy::start(&format!(
        "upstreams:
  own: {{ endpoints: ['{}'], concurrency: {{ max_in_flight: 1, queue: 0 }} }}
  second: {{ endpoints: ['{}'] }}
routes:
  - {{ name: ask, upstream: own, fallback: [second] }}
",
        own.url(),
        second.url()
    ))
    .await;
    let mut client = proxy.connect().await;
    client.send(post("{}")).await;
    let mut first = own.accept().await;
    first.request().await;
    first.send(STREAM.to_owned() + &chunk("data: one\n\n")).await;
    assert_eq!(client.head().await.status(), 200);
    assert_eq!(proxy.ask(post("{}")).await.text(), "second");
    assert_eq!(proxy.sample(&series("own", "second", "overloaded")).await, 1);
    assert!(own.accepted().await.is_none());
}
