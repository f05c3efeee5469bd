//! The system of `config/examples/assistant.yaml`, with a real FastAPI application and another one that plays Ollama.

use std::cell::Cell;

use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::harness::{Fastapi, Message, Proxy, Wire, eventually, example, redis::Redis};

struct System {
    assistant: Fastapi,
    ollama: Fastapi,
    proxy: Proxy,
}

/// The system as its file has it, on other ports and with less patience.
async fn system() -> System {
    changed("5s", "1h").await
}

/// The same, with checks of health as often as this, and answers that are fresh for so long.
async fn changed(interval: &str, ttl: &str) -> System {
    let (assistant, ollama) = tokio::join!(Fastapi::app("assistant", 0, &[]), Fastapi::app("ollama", 0, &[]));
    let file = file(&assistant, &ollama, interval, ttl);
    System { assistant, ollama, proxy: Proxy::start(&file).await }
}

fn file(assistant: &Fastapi, ollama: &Fastapi, interval: &str, ttl: &str) -> String {
    example(
        "assistant.yaml",
        &[
            ("listen: 127.0.0.1:8080", "listen: 127.0.0.1:0"),
            ("listen: 127.0.0.1:9090", "listen: 127.0.0.1:0"),
            ("http://127.0.0.1:8000", &assistant.url()),
            ("http://127.0.0.1:11434", &ollama.url()),
            ("first_byte: 12s", "first_byte: 700ms"),
            ("idle: 30s", "idle: 700ms"),
            ("heartbeat: 10s", "heartbeat: 200ms"),
            ("recovery: 5s", "recovery: 1s"),
            ("interval: 5s", &format!("interval: {interval}, jitter: 0s")),
            ("ttl: 1h", &format!("ttl: {ttl}")),
        ],
    )
}

impl System {
    async fn ask(&self, id: &str) -> Message {
        self.proxy.ask(request(id)).await
    }

    /// The question that others may have asked before.
    async fn ask_again(&self, id: &str) -> Message {
        self.proxy.ask(asking(id, "Who are you?")).await
    }

    /// What was asked of Ollama last.
    async fn asked_of_ollama(&self) -> Value {
        let all = self.ollama.ask("GET /asked HTTP/1.1\r\nhost: ollama\r\n\r\n").await.json();
        all.as_array().unwrap().last().expect("it was asked").clone()
    }
}

/// A request of this id, with a question of its own.
fn request(id: &str) -> String {
    asking(id, id)
}

fn asking(id: &str, question: &str) -> String {
    let body = body(question).to_string();
    let length = body.len();
    format!(
        "POST /ask HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\nauthorization: Bearer key\r\n\
         content-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
    )
}

fn body(question: &str) -> Value {
    json!({ "messages": [{ "role": "user", "content": question }] })
}

async fn set_mode(assistant: &Fastapi, mode: &str) {
    let answer =
        assistant.ask(format!("PUT /mode/{mode} HTTP/1.1\r\nhost: assistant\r\ncontent-length: 0\r\n\r\n")).await;
    assert_eq!(answer.status(), 204);
}

/// The tokens of a stream in OpenAI's form, joined. It must be whole.
fn tokens(stream: &str) -> String {
    let data: Vec<&str> = stream.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
    let (last, chunks) = data.split_last().expect("events");
    assert_eq!(*last, "[DONE]", "{stream}");
    let token = |chunk: &&str| -> String {
        let chunk: Value = serde_json::from_str(chunk).unwrap();
        chunk["choices"][0]["delta"]["content"].as_str().unwrap_or_default().to_owned()
    };
    chunks.iter().map(token).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stream_is_untouched() {
    let system = system().await;
    let answer = system.ask("ask-1").await;
    let direct = system.assistant.ask(request("ask-1")).await;
    assert_eq!((answer.status(), answer.text()), (200, direct.text()));
    assert_eq!(tokens(&answer.text()), "Hello from the assistant.");
    assert_eq!(answer.head.get("proxy-status"), None);

    set_mode(&system.assistant, "paused").await;
    let mut client = system.proxy.connect().await;
    client.send(request("ask-2")).await;
    assert_eq!(client.head().await.status(), 200);
    let first = client.chunk().await.unwrap();
    assert!(str::from_utf8(&first).unwrap().contains("\"Hello\""), "the first token comes while there is no second");
    set_mode(&system.assistant, "ok").await;
    let mut stream = first;
    while let Some(chunk) = client.chunk().await {
        stream.extend(chunk);
    }
    assert_eq!(String::from_utf8(stream).unwrap().replace(":\n\n", ""), direct.text());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_before_its_first_token_is_answered_by_ollama() {
    let system = system().await;
    for mode in ["loading", "out-of-memory", "silent"] {
        set_mode(&system.assistant, mode).await;
        let answer = system.ask(mode).await;
        assert_eq!((answer.status(), &*tokens(&answer.text())), (200, "Hello from Ollama."), "{mode}");
        assert_eq!(answer.head.all("proxy-status"), [r#"sidegate; next-hop="ollama""#], "{mode}");
        let line = system.proxy.access_line(mode).await;
        assert_eq!((&line["upstream"], &line["fallback"]), (&json!("ollama"), &json!(true)), "{line}");
        let asked = system.asked_of_ollama().await;
        let mut body = body(mode);
        body["model"] = "llama3.2".into();
        body["stream"] = true.into();
        assert_eq!(asked["body"], body, "{mode}");
        assert_eq!(asked["headers"]["authorization"], Value::Null, "the credential was not meant for it");
        assert_eq!(asked["headers"]["x-request-id"], mode);
    }
    // What the application refuses is its answer, and nobody else's business.
    let wrong = "POST /ask HTTP/1.1\r\nhost: localhost\r\ncontent-length: 2\r\n\r\n{}";
    set_mode(&system.assistant, "ok").await;
    let answer = system.proxy.ask(wrong).await;
    assert_eq!((answer.status(), answer.json()["detail"].as_str()), (422, Some("`messages` is missing")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_assistant_is_left_alone_until_it_is_back() {
    let System { assistant, ollama, proxy } = system().await;
    let port = assistant.port();
    drop(assistant);
    for n in 0..6 {
        let answer = proxy.ask(request(&format!("down-{n}"))).await;
        assert_eq!((answer.status(), &*tokens(&answer.text())), (200, "Hello from Ollama."));
    }

    // The first five failed, and from then on it is not even asked.
    let opened = proxy.line("circuit breaker opened").await;
    assert_eq!(opened["upstream"], "assistant", "{opened}");
    let refused = r#"sidegate_fallbacks_total{route="ask",from="assistant",to="ollama",reason="circuit-open"}"#;
    assert!(proxy.sample(refused).await >= 1);
    let breakers = proxy.admin_get("/circuit-breakers").await.json();
    let state = |upstream: &str| {
        let all = breakers["circuit_breakers"].as_array().unwrap();
        all.iter().find(|breaker| breaker["upstream"] == upstream).map(|breaker| breaker["state"].clone())
    };
    assert_eq!((state("assistant"), state("ollama")), (Some("open".into()), Some("closed".into())), "{breakers}");

    let _assistant = Fastapi::app("assistant", port, &[]).await;
    eventually("the assistant to answer again", || async {
        tokens(&proxy.ask(request("back")).await.text()) == "Hello from the assistant."
    })
    .await;
    drop(ollama);
    let answer = proxy.ask(request("alone")).await;
    assert_eq!(tokens(&answer.text()), "Hello from the assistant.");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_everybody_gone_the_answer_says_so() {
    let System { assistant, ollama, proxy } = system().await;
    drop((assistant, ollama));
    // The breakers open on the way, which changes nothing for who asks.
    for n in 0..7 {
        let answer = proxy.ask(request(&format!("gone-{n}"))).await;
        assert_eq!((answer.status(), answer.head.get("retry-after")), (503, Some("30")));
        let message = "The assistant is offline. Try again in half a minute.";
        let error = json!({ "error": { "message": message, "type": "server_error", "code": "offline" } });
        assert_eq!(answer.json(), error);
        assert_eq!(answer.head.get("content-type"), Some("application/json"));
    }
    let line = proxy.access_line("gone-6").await;
    assert_eq!((&line["upstream"], &line["fallback"]), (&json!("offline"), &json!(true)), "{line}");
}

/// A client that has the first token of a stream that goes no further.
async fn in_the_middle(system: &System, id: &str) -> Wire {
    set_mode(&system.assistant, "paused").await;
    let mut client = system.proxy.connect().await;
    client.send(request(id).replacen("\r\n", "\r\nconnection: close\r\n", 1)).await;
    assert_eq!(client.head().await.status(), 200);
    assert!(String::from_utf8(client.chunk().await.unwrap()).unwrap().contains("\"Hello\""));
    client
}

/// The error in the last event of a stream, past comments.
async fn last_error(client: &mut Wire) -> Value {
    let mut rest = String::new();
    while let Some(chunk) = client.chunk().await {
        rest += str::from_utf8(&chunk).unwrap();
    }
    let event =
        rest.trim_start_matches(":\n\n").strip_prefix("event: error\ndata: ").unwrap_or_else(|| panic!("{rest}"));
    serde_json::from_str::<Value>(event.strip_suffix("\n\n").unwrap()).unwrap()["error"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_dies_in_the_middle_says_so_and_is_nobody_else_s() {
    let system = system().await;
    let mut client = in_the_middle(&system, "middle-1").await;
    let System { assistant, ollama, proxy } = system;
    drop(assistant);
    let error = last_error(&mut client).await;
    assert_eq!((&error["code"], &error["type"]), (&json!("upstream-reset"), &json!("server_error")));
    let line = proxy.access_line("middle-1").await;
    assert_eq!((&line["error"], &line["aborted_by"]), (&json!("upstream-reset"), &json!("upstream")), "{line}");
    let asked = ollama.ask("GET /asked HTTP/1.1\r\nhost: ollama\r\n\r\n").await.json();
    assert_eq!(asked, json!([]), "no bytes of two upstreams in one answer");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_falls_silent_is_kept_alive_and_then_ended() {
    let system = system().await;
    let mut client = in_the_middle(&system, "silent-1").await;
    let comment = client.chunk().await.unwrap();
    assert_eq!(comment, b":\n\n");
    let error = last_error(&mut client).await;
    assert_eq!(
        (&error["code"], &error["message"]),
        (&json!("upstream-timeout"), &json!("the upstream did not answer in time"))
    );
    let line = system.proxy.access_line("silent-1").await;
    assert_eq!((&line["error"], &line["aborted_by"]), (&json!("upstream-timeout"), &json!("timeout")), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_ask_at_once_and_all_are_answered_whole() {
    let system = system().await;
    let ids: Vec<String> = (0..100).map(|n| format!("many-{n}")).collect();
    let answers = join_all(ids.iter().map(|id| system.ask(id))).await;
    for answer in answers {
        let tokens = tokens(&answer.text());
        assert!(tokens == "Hello from the assistant." || tokens == "Hello from Ollama.", "{tokens}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ollama_is_never_asked_for_more_than_it_computes_at_once() {
    let system = system().await;
    set_mode(&system.assistant, "loading").await;
    // Four at once and sixteen who wait: all that the file allows.
    let ids: Vec<String> = (0..20).map(|n| format!("queued-{n}")).collect();
    for answer in join_all(ids.iter().map(|id| system.ask(id))).await {
        assert_eq!((answer.status(), &*tokens(&answer.text())), (200, "Hello from Ollama."));
    }
    let peak = system.ollama.ask("GET /peak HTTP/1.1\r\nhost: ollama\r\n\r\n").await.json();
    assert!((1..=4).contains(&peak.as_u64().unwrap()), "{peak} at once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_assistant_that_is_not_ready_is_not_asked() {
    let system = changed("100ms", "1h").await;
    let shows = async |health: &str| {
        let all = system.proxy.admin_get("/health/upstreams").await.json();
        let upstream = |name: &str| -> Value {
            let found = all["upstreams"].as_array().unwrap().iter().find(|upstream| upstream["upstream"] == name);
            found.expect("the upstream is shown")["endpoints"][0]["health"].clone()
        };
        (upstream("assistant"), upstream("ollama")) == (health.into(), "up".into())
    };
    set_mode(&system.assistant, "loading").await;
    eventually("the assistant to be found not ready", async || shows("down").await).await;
    let answer = system.ask("early").await;
    assert_eq!((answer.status(), &*tokens(&answer.text())), (200, "Hello from Ollama."));
    let spared = r#"sidegate_fallbacks_total{route="ask",from="assistant",to="ollama",reason="no-healthy-endpoint"}"#;
    assert_eq!(system.proxy.sample(spared).await, 1);

    set_mode(&system.assistant, "ok").await;
    eventually("the assistant to be found ready", async || shows("up").await).await;
    assert_eq!(tokens(&system.ask("ready").await.text()), "Hello from the assistant.");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_was_answered_to_the_end_is_not_asked_again() {
    let system = system().await;
    let first = system.ask_again("first").await;
    assert_eq!(tokens(&first.text()), "Hello from the assistant.");
    set_mode(&system.assistant, "loading").await;
    let again = system.ask_again("again").await;
    assert_eq!((again.status(), again.text()), (200, first.text()), "the same stream, event by event");
    assert_eq!(again.head.get("content-type"), first.head.get("content-type"));
    let status = again.head.get("cache-status").unwrap();
    assert!(status.starts_with("sidegate; hit; ttl=35"), "for an hour: {status}");
    assert_eq!(again.head.get("x-request-id"), Some("again"), "ids are not kept");
    let line = system.proxy.access_line("again").await;
    assert_eq!((&line["cache"], &line["upstream"]), (&json!("hit"), &Value::Null), "{line}");

    // Another's answers are another's, and another question is another question.
    let other = asking("other", "Who are you?").replace("Bearer key", "Bearer other");
    assert_eq!(tokens(&system.proxy.ask(other).await.text()), "Hello from Ollama.");
    assert_eq!(tokens(&system.ask("something else").await.text()), "Hello from Ollama.");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_did_not_come_to_its_end_and_what_ollama_said_are_not_kept() {
    let system = system().await;
    for mode in ["loading", "out-of-memory", "silent"] {
        set_mode(&system.assistant, mode).await;
        assert_eq!(tokens(&system.ask_again(mode).await.text()), "Hello from Ollama.", "{mode}");
    }
    // One who left in the middle of it.
    set_mode(&system.assistant, "paused").await;
    let mut client = system.proxy.connect().await;
    client.send(asking("left", "Who are you?")).await;
    assert_eq!(client.head().await.status(), 200);
    assert!(String::from_utf8(client.chunk().await.unwrap()).unwrap().contains("\"Hello\""));
    drop(client);
    system.proxy.access_line("left").await;
    set_mode(&system.assistant, "ok").await;
    let answer = system.ask_again("well again").await;
    assert_eq!(tokens(&answer.text()), "Hello from the assistant.");
    let status = answer.head.get("cache-status").unwrap();
    assert!(
        status.starts_with("sidegate; fwd=uri-miss; fwd-status=200; ttl=3") && status.ends_with("; stored"),
        "{status}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn ollama_stands_in_before_an_old_answer_and_that_before_the_fixed_one() {
    let System { assistant, ollama, proxy } = changed("5s", "1s").await;
    let ask = async |id: &str| proxy.ask(asking(id, "Who are you?")).await;
    assert_eq!(tokens(&ask("fresh").await.text()), "Hello from the assistant.");
    drop(assistant);
    eventually("Ollama to be asked instead", async || tokens(&ask("late").await.text()) == "Hello from Ollama.").await;
    drop(ollama);
    // Once it fails by itself, and then the breakers let nobody through.
    for n in 0..7 {
        let answer = ask(&format!("old-{n}")).await;
        assert_eq!((answer.status(), &*tokens(&answer.text())), (200, "Hello from the assistant."));
        let status = answer.head.get("cache-status").unwrap();
        assert!(status.starts_with("sidegate; fwd=stale; fwd-status=503; ttl=-"), "{status}");
        assert!(status.ends_with("; detail=stale-if-error"), "{status}");
    }
    let line = proxy.access_line("old-6").await;
    assert_eq!((&line["cache"], &line["status"]), (&json!("stale"), &json!(200)), "{line}");
    let answer = proxy.ask(request("never answered")).await;
    assert_eq!((answer.status(), &answer.json()["error"]["code"]), (503, &json!("offline")));
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_their_answers_and_each_goes_on_when_redis_dies() {
    let mut redis = Redis::start().await;
    let (assistant, ollama) = tokio::join!(Fastapi::app("assistant", 0, &[]), Fastapi::app("ollama", 0, &[]));
    let file = format!("redis: {{url: {}}}\n{}", redis.url(), file(&assistant, &ollama, "5s", "1h"));
    let (a, b) = tokio::join!(Proxy::start(&file), Proxy::start(&file));
    let health = async |proxy: &Proxy| proxy.admin_get("/health/redis").await.json()["status"].clone();
    let up = async || {
        for proxy in [&a, &b] {
            eventually("redis to be up", async || health(proxy).await == "up").await;
        }
    };
    up().await;
    let in_redis = "sidegate_cache_redis_total{route=\"ask\",outcome=\"stored\"}";
    let first = a.ask(asking("first", "Who are you?")).await;
    assert_eq!(tokens(&first.text()), "Hello from the assistant.");
    eventually("it to be in Redis", async || a.sample(in_redis).await == 1).await;

    // The other one has it, whoever could answer now; and has it for the one who asked only.
    set_mode(&assistant, "loading").await;
    let again = b.ask(asking("again", "Who are you?")).await;
    assert_eq!((again.status(), again.text()), (200, first.text()), "the same stream, event by event");
    assert!(again.head.get("cache-status").unwrap().ends_with("; detail=shared"), "{again:?}");
    let other = asking("other", "Who are you?").replace("Bearer key", "Bearer other");
    assert_eq!(tokens(&b.ask(other).await.text()), "Hello from Ollama.");
    redis.assert_all_expire("sidegate").await;
    set_mode(&assistant, "ok").await;

    // It dies in the middle of a stream, which goes on; and whoever asks is answered.
    set_mode(&assistant, "paused").await;
    let mut client = a.connect().await;
    client.send(asking("middle", "In the middle?").replacen("\r\n", "\r\nconnection: close\r\n", 1)).await;
    assert_eq!(client.head().await.status(), 200);
    let mut stream = client.chunk().await.unwrap();
    redis.kill();
    set_mode(&assistant, "ok").await;
    while let Some(chunk) = client.chunk().await {
        stream.extend(chunk);
    }
    assert_eq!(tokens(str::from_utf8(&stream).unwrap()), "Hello from the assistant.");
    for n in 0..20 {
        for proxy in [&a, &b] {
            let known = proxy.ask(asking("known", "Who are you?")).await;
            assert_eq!(known.text(), first.text(), "memory goes on");
            let new = proxy.ask(request(&format!("new-{n}"))).await;
            assert_eq!((new.status(), &*tokens(&new.text())), (200, "Hello from the assistant."));
        }
    }

    redis.restart().await;
    up().await;
    let turn = Cell::new(0);
    eventually("answers to be shared again", async || {
        turn.set(turn.get() + 1);
        let question = format!("Once more, {}?", turn.get());
        a.ask(asking("more", &question)).await;
        let other = b.ask(asking("more", &question)).await;
        assert_eq!(tokens(&other.text()), "Hello from the assistant.");
        other.head.get("cache-status").unwrap().ends_with("; detail=shared")
    })
    .await;
}
