//! Limits of language models' tokens: reserved before, settled truly, and never in a client's way.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::{task::JoinSet, time::sleep};

use super::harness::{Backend, Proxy, Wire, eventually, figure, redis::Redis};

const STREAM: &str = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n";

fn file(limit: &str, store: &str) -> String {
    format!(
        "{store}
routes:
  - upstream: api
    name: chat
    rate_limit: [{{ name: tokens, key: global, limit: {limit}, cost: tokens, reserve: 40 }}]
"
    )
}

async fn proxy(backend: &Backend, limit: &str, redis: Option<&Redis>) -> Proxy {
    let store = redis.map(|redis| format!("redis: {{ url: \"{}\", timeout: 5s }}", redis.url())).unwrap_or_default();
    let proxy = Proxy::before(&backend.url(), &file(limit, &store)).await;
    if redis.is_some() {
        eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
    }
    proxy
}

async fn left(proxy: &Proxy) -> u64 {
    let counter = proxy.admin_get("/rate-limits/tokens").await.json()["counters"][0].clone();
    let of = if counter["redis"].is_null() { &counter["memory"] } else { &counter["redis"] };
    of["remaining"].as_u64().unwrap()
}

/// A request whose body has `length` bytes, filled up in its prompt.
fn post(path: &str, mut body: Value, length: usize) -> String {
    body["messages"] = json!([{ "role": "user", "content": "" }]);
    let filler = "x".repeat(length - body.to_string().len());
    body["messages"][0]["content"] = filler.into();
    let body = body.to_string();
    assert_eq!(body.len(), length);
    format!(
        "POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn chunk(text: &str) -> String {
    format!("{:x}\r\n{text}\r\n", text.len())
}

fn event(data: &Value) -> String {
    format!("data: {data}\n\n")
}

fn delta(text: &str) -> String {
    event(&json!({ "choices": [{ "delta": { "content": text } }], "usage": null }))
}

fn usage(input: u64, output: u64) -> String {
    event(&json!({ "choices": [], "usage": { "prompt_tokens": input, "completion_tokens": output } }))
}

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_cannot_overshoot_and_the_balance_is_true() {
    let redis = Redis::start().await;
    for store in [None, Some(&redis)] {
        let backend = Backend::start().await;
        let proxy = proxy(&backend, "1000/h", store).await;
        let mut clients = JoinSet::new();
        for _ in 0..100 {
            let address = proxy.address();
            // 25 tokens of input, as a guess, and 75 of output.
            let request = post("/v1/chat/completions", json!({ "stream": true, "max_tokens": 75 }), 100);
            clients.spawn(async move { Wire::ask(address, request).await });
        }
        let mut upstreams = Vec::new();
        for _ in 0..10 {
            let mut upstream = backend.accept().await;
            upstream.request().await;
            upstreams.push(upstream);
        }
        let mut refused = 0;
        while refused < 90 {
            assert_eq!(clients.join_next().await.unwrap().unwrap().status(), 429);
            refused += 1;
        }
        assert_eq!(left(&proxy).await, 0);
        let mut used = 0;
        for (n, mut upstream) in upstreams.into_iter().enumerate() {
            let (input, output) = (20 + n as u64, 3 * n as u64);
            used += input + output;
            let body = [delta("a"), usage(input, output), "data: [DONE]\n\n".to_owned()].map(|event| chunk(&event));
            upstream.send(format!("{STREAM}{}0\r\n\r\n", body.concat())).await;
        }
        for answer in clients.join_all().await {
            assert_eq!(answer.status(), 200);
            assert_eq!(answer.text(), delta("a") + "data: [DONE]\n\n", "the report that nobody asked for is taken out");
        }
        eventually("the balance", async || left(&proxy).await == 1000 - used).await;
        figure(&format!("10 of 100 passed at once; after them {used} of 1000 tokens are used, as reported"));
        let tokens = async |direction: &str| {
            proxy.sample(&format!("sidegate_tokens_total{{route=\"chat\",direction=\"{direction}\"}}")).await
        };
        assert_eq!((tokens("input").await, tokens("output").await), (245, 135));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_asked_for_and_taken_out_only_where_that_is_sidegates_wish() {
    let backend = Backend::start().await;
    let proxy = proxy(&backend, "100000/h", None).await;
    let whole = format!("{}{}data: [DONE]\n\n", delta("a"), usage(9, 1));
    let spared = format!("{}data: [DONE]\n\n", delta("a"));
    let cases = [
        ("/v1/chat/completions", json!({ "stream": true }), true),
        ("/v1/chat/completions", json!({ "stream": true, "stream_options": { "other": 1 } }), true),
        ("/v1/chat/completions", json!({ "stream": true, "stream_options": { "include_usage": true } }), false),
        ("/v1/chat/completions", json!({ "stream": false }), false),
        ("/v1/messages", json!({ "stream": true }), false),
    ];
    let mut before = 100_000;
    for (path, body, asks) in cases {
        let request = post(path, body.clone(), 200);
        let mut client = proxy.connect().await;
        client.send(request.replace("\r\n\r\n", "\r\naccept-encoding: gzip\r\nx-other: 1\r\n\r\n")).await;
        let mut upstream = backend.accept().await;
        let got = upstream.request().await;
        assert_eq!(got.head.get("accept-encoding"), None, "what is compressed could not be read");
        assert_eq!(got.head.get("content-length"), Some(&*got.body.len().to_string()));
        assert_eq!(got.json()["stream_options"]["include_usage"] == true, asks || body.to_string().contains("include"));
        if asks {
            let sent: Value = serde_json::from_str(request.split_once("\r\n\r\n").unwrap().1).unwrap();
            assert_eq!(got.json()["messages"], sent["messages"]);
        } else {
            assert!(request.ends_with(&got.text()), "it goes on byte for byte");
        }
        upstream.send(STREAM).await;
        // In pieces, wherever they fall.
        for piece in whole.as_bytes().chunks(17) {
            upstream.send(chunk(std::str::from_utf8(piece).unwrap())).await;
        }
        upstream.send("0\r\n\r\n").await;
        assert_eq!(client.answer().await.text(), if asks { &*spared } else { &*whole }, "{path} {body}");
        before -= 10;
        eventually("ten tokens to be charged", async || left(&proxy).await == before).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn all_shapes_are_charged_and_logged() {
    let backend = Backend::start().await;
    let proxy = proxy(&backend, "100000/h", None).await;
    let messages = format!(
        "event: message_start\n{}event: content_block_delta\n{}event: message_delta\n{}",
        event(&json!({ "type": "message_start", "message": { "usage": { "input_tokens": 30, "output_tokens": 1 } } })),
        event(&json!({ "type": "content_block_delta", "delta": { "text": "a" } })),
        event(&json!({ "type": "message_delta", "usage": { "output_tokens": 12 } })),
    );
    let responses = event(&json!({
        "type": "response.completed",
        "response": { "usage": { "input_tokens": 5, "output_tokens": 6 } },
    }));
    let ollama = "{\"response\":\"a\",\"done\":false}\n{\"done\":true,\"prompt_eval_count\":8,\"eval_count\":2}\n";
    let chat = json!({ "usage": { "prompt_tokens": 100, "completion_tokens": 11 } }).to_string();
    let cases = [
        ("text/event-stream", messages, 200, (30, 12)),
        ("text/event-stream", responses, 200, (5, 6)),
        ("application/x-ndjson", ollama.to_owned(), 200, (8, 2)),
        ("application/json", chat.clone(), 200, (100, 11)),
        ("application/json", json!({ "text": "x".repeat(79) }).to_string(), 200, (50, 22)),
        ("application/json", "{}".to_owned(), 500, (0, 0)),
        ("text/event-stream", delta("a") + &delta("b"), 200, (50, 2)),
        // A backend that was not asked to, and does.
        ("text/event-stream\r\ncontent-encoding: gzip", "x".repeat(80), 200, (50, 20)),
    ];
    let mut expected = 100_000;
    for (kind, body, status, (input, output)) in cases {
        let mut client = proxy.connect().await;
        client.send(post("/api", json!({}), 200)).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        let length = body.len();
        upstream
            .send(format!("HTTP/1.1 {status} X\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n{body}"))
            .await;
        let answer = client.answer().await;
        assert_eq!(answer.text(), body, "every byte passes");
        let line = proxy.access_line(answer.head.get("x-request-id").unwrap()).await;
        assert_eq!((&line["tokens_in"], &line["tokens_out"]), (&json!(input), &json!(output)), "{body}");
        expected -= input + output;
        eventually("the charge", async || left(&proxy).await == expected).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_is_charged_for_what_was_sent() {
    let backend = Backend::start().await;
    let proxy = proxy(&backend, "1000/h", None).await;
    let mut client = proxy.connect().await;
    client.send(post("/v1/chat/completions", json!({ "stream": true }), 100)).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    assert_eq!(left(&proxy).await, 1000 - 25 - 40, "what the rule reserves");
    upstream.send(STREAM).await;
    client.head().await;
    for n in 0..7 {
        upstream.send(chunk(&delta("a"))).await;
        assert_eq!(client.chunk().await.unwrap(), delta("a").as_bytes(), "each event comes at once, {n}");
    }
    client.leave(false);
    eventually("25 of input and 7 of output to be charged", async || left(&proxy).await == 1000 - 32).await;

    // Who leaves before the answer has used its input.
    let mut client = proxy.connect().await;
    client.send(post("/v1/chat/completions", json!({ "stream": true }), 100)).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    client.leave(true);
    eventually("25 more", async || left(&proxy).await == 1000 - 57).await;

    // What fails has used nothing.
    let mut client = proxy.connect().await;
    client.send(post("/v1/chat/completions", json!({}), 100)).await;
    let mut upstream = backend.accept().await;
    upstream.request().await;
    upstream.leave(true);
    assert_eq!(client.answer().await.status(), 502);
    eventually("no more", async || left(&proxy).await == 1000 - 57).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_that_are_large_chunked_or_no_json_go_on_as_they_are() {
    let backend = Backend::start().await;
    let proxy = proxy(&backend, "100000000/h", None).await;
    let large = "y".repeat(3 << 20);
    let mut chunked = String::new();
    for piece in large.as_bytes().chunks(100_000) {
        chunked += &chunk(std::str::from_utf8(piece).unwrap());
    }
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n";
    let requests = [
        format!("{head}content-length: {}\r\n\r\n{large}", large.len()),
        format!("{head}transfer-encoding: chunked\r\n\r\n{chunked}0\r\n\r\n"),
        format!(
            "{head}transfer-encoding: chunked\r\ntrailer: x-a\r\n\r\n{}0\r\nx-a: 1\r\n\r\n",
            chunk("{\"stream\":true}")
        ),
        format!("{head}content-length: 5\r\n\r\n{{\"a\":"),
        "GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_owned(),
    ];
    let bodies = [&*large, &*large, "{\"stream\":true}", "{\"a\":", ""];
    for (request, body) in requests.into_iter().zip(bodies) {
        let mut client = proxy.connect().await;
        let ask = async { client.send(request).await };
        let serve = async {
            let mut upstream = backend.accept().await;
            let got = upstream.request().await;
            upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await;
            got
        };
        let ((), got) = tokio::join!(ask, serve);
        assert_eq!(got.body.len(), body.len());
        assert!(got.text() == body);
        assert_eq!(got.trailers.len(), usize::from(body.contains("stream")));
        assert_eq!(client.answer().await.status(), 200);
    }
    sleep(Duration::from_millis(1)).await;
}
