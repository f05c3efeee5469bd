//! The system of `config/examples/content-generator.yaml`, with a real Flask application.

use std::{cell::Cell, time::Instant};

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::harness::{Fastapi, Message, Proxy, eventually, example, figure, ms, redis::Redis};

struct System {
    app: Fastapi,
    proxy: Proxy,
}

async fn system() -> System {
    changed(&[], &[]).await
}

/// The system as its file has it, on other ports and with less patience, and with these changes.
async fn changed(changes: &[(&str, &str)], environment: &[(&str, &str)]) -> System {
    let app = Fastapi::flask("content_generator", environment).await;
    let proxy = replica(&app, changes).await;
    System { app, proxy }
}

/// A proxy before this application.
async fn replica(app: &Fastapi, changes: &[(&str, &str)]) -> Proxy {
    let url = app.url();
    let usual = [
        ("listen: 127.0.0.1:8080", "listen: 127.0.0.1:0"),
        ("listen: 127.0.0.1:9090", "listen: 127.0.0.1:0"),
        ("http://127.0.0.1:5000", &*url),
        ("first_byte: 10s", "first_byte: 1s"),
    ];
    Proxy::start(&example("content-generator.yaml", &[&usual, changes].concat())).await
}

fn order(topic: &str) -> String {
    request("id", &json!({ "topic": topic, "tone": "plain" }).to_string())
}

fn request(id: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST /api/generate HTTP/1.1\r\nhost: localhost\r\nx-request-id: {id}\r\ncontent-type: application/json\r\n\
         content-length: {length}\r\n\r\n{body}"
    )
}

impl System {
    async fn order(&self, topic: &str) -> Message {
        self.proxy.ask(order(topic)).await
    }

    async fn send(&self, id: &str, body: &str) -> Message {
        self.proxy.ask(request(id, body)).await
    }

    async fn set_mode(&self, mode: &str) {
        let request = format!("PUT /mode/{mode} HTTP/1.1\r\nhost: app\r\ncontent-length: 0\r\n\r\n");
        assert_eq!(self.app.ask(request).await.status(), 204);
    }

    /// How often the costly API was called.
    async fn calls(&self) -> u64 {
        self.app.ask("GET /calls HTTP/1.1\r\nhost: app\r\n\r\n").await.json().as_u64().unwrap()
    }

    async fn breaker(&self) -> Value {
        self.proxy.get("/api/circuit-breaker").await.json()["circuit_breakers"][0].clone()
    }

    async fn cache(&self) -> Value {
        self.proxy.get("/api/cache").await.json()["caches"][0].clone()
    }

    async fn change(&self, line: &str) -> Message {
        self.proxy.ask(format!("{line} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")).await
    }
}

fn content(answer: &Message) -> String {
    assert_eq!(answer.status(), 200, "{}", answer.text());
    answer.json()["content"].as_str().unwrap().to_owned()
}

fn cache_status(answer: &Message) -> &str {
    answer.head.get("cache-status").unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_order_is_written_once_however_it_is_written_down() {
    let system = system().await;
    let first = system.send("order-1", r#"{"topic": "Spring", "tone": "warm", "words": [1, 2.50]}"#).await;
    assert_eq!(content(&first), "Draft 1, warm: Spring.");
    assert!(cache_status(&first).ends_with("; stored"), "{}", cache_status(&first));
    let same = [
        r#"{"words":[1,2.5],"tone":"warm","topic":"Spring"}"#,
        "{\n  \"tone\": \"warm\",\n  \"topic\": \"\\u0053pring\",\n  \"words\": [1, 2.50]\n}\n",
    ];
    for (n, body) in same.into_iter().enumerate() {
        let answer = system.send(&format!("same-{n}"), body).await;
        assert_eq!((content(&answer), answer.text()), (content(&first), first.text()), "{body}");
        assert!(cache_status(&answer).starts_with("sidegate; hit; ttl=35"), "an hour: {}", cache_status(&answer));
        let line = system.proxy.access_line(&format!("same-{n}")).await;
        let shown = (&line["cache"], &line["status"], &line["route"], &line["path"]);
        assert_eq!(shown, (&json!("hit"), &json!(200), &json!("generate"), &json!("/api/generate")), "{line}");
    }
    for (n, other) in [
        r#"{"topic": "Spring", "tone": "warm", "words": [2.50, 1]}"#,
        r#"{"topic": "Spring", "tone": "cold", "words": [1, 2.50]}"#,
        r#"{"topic": "Spring", "tone": "warm", "words": [1, "2.50"]}"#,
    ]
    .into_iter()
    .enumerate()
    {
        assert!(content(&system.send("other", other).await).starts_with(&format!("Draft {}", n + 2)), "{other}");
    }
    assert_eq!(system.calls().await, 4);
    // What the application refuses is no text that could be given to anybody.
    let refused = [system.send("no", "{}").await, system.send("no", "{}").await];
    assert!(refused.iter().all(|answer| answer.status() == 400 && answer.head.get("age").is_none()));
}

#[tokio::test(flavor = "multi_thread")]
async fn who_orders_what_is_being_written_waits_for_it() {
    let system = changed(&[("first_byte: 1s", "first_byte: 10s")], &[]).await;
    system.set_mode("hanging").await;
    let orders = join_all((0..20).map(|_| system.order("Autumn")));
    let begin = async {
        eventually("the API to be called", async || system.calls().await == 1).await;
        let waiting = async || system.proxy.sample("sidegate_in_flight{route=\"generate\"}").await;
        eventually("all to wait", async || waiting().await == 20).await;
        system.set_mode("ok").await;
    };
    let (answers, ()) = tokio::join!(orders, begin);
    assert!(answers.iter().all(|answer| content(answer) == "Draft 1, plain: Autumn."));
    assert_eq!(system.calls().await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn there_are_never_more_texts_than_the_file_says() {
    let system = changed(&[("max_entries: 1000", "max_entries: 3")], &[]).await;
    for n in 0..8 {
        content(&system.order(&format!("Topic {n}")).await);
    }
    eventually("those beyond the third to go", async || {
        let cache = system.cache().await;
        (1..=3).contains(&cache["entries"].as_u64().unwrap()) && cache["evicted"].as_u64().unwrap() >= 5
    })
    .await;
    let calls = system.calls().await;
    for n in 0..8 {
        content(&system.order(&format!("Topic {n}")).await);
    }
    assert!(system.calls().await >= calls + 5, "at most three were kept");
}

#[tokio::test(flavor = "multi_thread")]
async fn five_failures_open_the_breaker_and_a_reset_closes_it() {
    let system = system().await;
    let kept = content(&system.order("Winter").await);
    assert_eq!(system.breaker().await["state"], "closed");
    // However it fails: what the application says of it, what it does not, and what takes too long.
    for (mode, status) in [("down", 502), ("crash", 500), ("hanging", 504), ("down", 502), ("down", 502)] {
        system.set_mode(mode).await;
        assert_eq!(system.order(&format!("Failing {mode}")).await.status(), status, "{mode}");
    }
    let (calls, refused) = (system.calls().await, system.order("Refused").await);
    assert_eq!((refused.status(), system.calls().await), (503, calls), "the API is not called");
    assert_eq!(refused.json()["type"], "urn:sidegate:problem:circuit-open");
    let seconds: u64 = refused.head.get("retry-after").unwrap().parse().unwrap();
    assert!((40..=60).contains(&seconds), "about a minute: {seconds}");
    let breaker = system.breaker().await;
    let shown = (&breaker["upstream"], &breaker["state"], &breaker["refused"]);
    assert_eq!(shown, (&json!("generator"), &json!("open"), &json!(1)), "{breaker}");
    let health = system.proxy.get("/api/health").await.json();
    let breakers = health["components"]["upstreams"]["generator"]["circuit_breakers"].as_object().unwrap().clone();
    assert_eq!(breakers.into_iter().map(|(_, state)| state).collect::<Vec<_>>(), ["open"], "{health}");
    let metrics = system.proxy.get("/api/metrics").await.text();
    let opened = "sidegate_circuit_breaker_transitions_total{upstream=\"generator\"";
    assert!(
        metrics.lines().any(|line| line.starts_with(opened) && line.contains("to=\"open\"") && line.ends_with(" 1"))
    );
    // Who orders what was written gets it all the same.
    assert_eq!(content(&system.order("Winter").await), kept);

    system.set_mode("ok").await;
    assert_eq!(system.change("GET /api/circuit-breaker/reset").await.status(), 405);
    let reset = system.change("POST /api/circuit-breaker/reset").await;
    assert_eq!((reset.status(), &reset.json()["circuit_breakers"][0]["state"]), (200, &json!("closed")));
    content(&system.order("Refused").await);
    assert_eq!(system.breaker().await["state"], "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_old_text_is_better_than_none() {
    let system = changed(&[("ttl: 1h", "ttl: 1s")], &[]).await;
    let old = content(&system.order("Summer").await);
    system.set_mode("down").await;
    eventually("it to be old", async || {
        let answer = system.order("Summer").await;
        assert_eq!(content(&answer), old);
        cache_status(&answer).ends_with("; detail=stale-if-error")
    })
    .await;
    // Also when the API is not called any more.
    for _ in 0..5 {
        assert_eq!(content(&system.order("Summer").await), old);
    }
    assert_eq!(system.breaker().await["state"], "open");
    system.set_mode("ok").await;
    system.change("POST /api/circuit-breaker/reset").await;
    assert_ne!(content(&system.order("Summer").await), old);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cache_can_be_looked_at_and_cleared() {
    let system = system().await;
    for topic in ["One", "Two", "One"] {
        content(&system.order(topic).await);
    }
    let cache = system.cache().await;
    let requests = &cache["requests"];
    let shown = (&cache["route"], &cache["stored"], &requests["hit"], &requests["miss"]);
    assert_eq!(shown, (&json!("generate"), &json!(2), &json!(1), &json!(2)), "{cache}");
    let health = system.proxy.get("/api/health").await;
    assert_eq!(health.head.get("content-type"), Some("application/json"));
    let health = health.json();
    assert_eq!((&health["status"], &health["components"]["cache"]["requests"]["hit"]), (&json!("ready"), &json!(1)));
    let mut components: Vec<_> = health["components"].as_object().unwrap().keys().map(String::as_str).collect();
    components.sort_unstable();
    assert_eq!(components, ["cache", "config", "process", "redis", "upstreams"]);

    for method in ["POST", "DELETE"] {
        let cleared = system.change(&format!("{method} /api/cache/clear")).await;
        assert_eq!((cleared.status(), &cleared.json()["purged"]), (200, &json!("all")));
        let calls = system.calls().await;
        content(&system.order("One").await);
        assert_eq!(system.calls().await, calls + 1, "written again after {method}");
    }
    // The application's own paths are its own.
    assert!(system.proxy.get("/").await.text().starts_with("<!doctype html>"));
    assert_eq!(system.proxy.get("/api/config").await.status(), 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_usual_mix_of_orders_calls_the_api_for_a_third_of_them_at_most() {
    let system = changed(&[], &[("DELAY", "0.05")]).await;
    // Few are ordered often: the topic of rank n as often as 1/n, in an order that looks like none.
    let mut mix: Vec<u32> = (1..=40).flat_map(|rank| vec![rank; (40 / rank) as usize]).collect();
    mix.sort_by_key(|rank| rank.wrapping_mul(0x9E37_79B9).rotate_left(rank % 31));
    let orders = mix.len();
    let (mut hits, mut written) = (Vec::new(), Vec::new());
    for rank in mix {
        let begun = Instant::now();
        let answer = system.order(&format!("Rank {rank}")).await;
        content(&answer);
        let took = begun.elapsed();
        if cache_status(&answer).starts_with("sidegate; hit") { &mut hits } else { &mut written }.push(took);
    }
    let calls = usize::try_from(system.calls().await).unwrap();
    hits.sort();
    written.sort();
    let median = |of: &[std::time::Duration]| of[of.len() / 2];
    figure(&format!(
        "{calls} calls for {orders} orders; a hit takes {} with its connection, a text {}",
        ms(median(&hits)),
        ms(median(&written))
    ));
    assert!(calls * 3 <= orders, "{calls} of {orders}");
    assert!(median(&hits) * 2 < median(&written));
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_share_their_texts_and_each_goes_on_when_redis_dies() {
    let mut redis = Redis::start().await;
    let with_redis = [("#redis: {url: redis://127.0.0.1:6379/0}", &*format!("redis: {{url: {}}}", redis.url()))];
    let a = changed(&with_redis, &[]).await;
    let b = replica(&a.app, &with_redis).await;
    let is_shared = |answer: &Message| cache_status(answer).ends_with("; detail=shared");
    let health = async |proxy: &Proxy| proxy.get("/api/health").await.json()["components"]["redis"]["status"].clone();
    for proxy in [&a.proxy, &b] {
        eventually("redis to be up", async || health(proxy).await == "up").await;
    }
    // What one has had written the other has.
    let text = content(&a.order("Spring").await);
    let stored = "sidegate_cache_redis_total{route=\"generate\",outcome=\"stored\"}";
    eventually("it to be in Redis", async || a.proxy.sample(stored).await == 1).await;
    let other = b.ask(order("Spring")).await;
    assert!(is_shared(&other), "{other:?}");
    assert_eq!((content(&other), a.calls().await), (text.clone(), 1));
    redis.assert_all_expire("sidegate").await;

    // Cleared on one, on both.
    let cleared = b.ask("POST /api/cache/clear HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(cleared.status(), 200);
    eventually("the other to have cleared it", async || content(&a.order("Spring").await) != text).await;

    // It dies while both are at work.
    let kept = content(&a.order("Spring").await);
    let half = Notify::new();
    let orders = async |proxy: &Proxy, name: &str| {
        for n in 0..60 {
            if n == 20 {
                half.notify_one();
            }
            let (known, new) = (order("Spring"), order(&format!("{name} {n}")));
            content(&proxy.ask(known).await);
            content(&proxy.ask(new).await);
        }
    };
    let kill = async {
        half.notified().await;
        redis.kill();
    };
    tokio::join!(orders(&a.proxy, "a"), orders(&b, "b"), kill);
    assert_eq!(content(&a.order("Spring").await), kept, "memory goes on");
    for proxy in [&a.proxy, &b] {
        eventually("redis to be missed", async || health(proxy).await != "up").await;
        assert_eq!(proxy.get("/api/circuit-breaker").await.json()["circuit_breakers"][0]["state"], "closed");
    }
    let calls = a.calls().await;
    let own = content(&a.order("Autumn").await);
    assert_ne!(content(&b.ask(order("Autumn")).await), own, "each for itself");
    assert_eq!(a.calls().await, calls + 2);

    redis.restart().await;
    for proxy in [&a.proxy, &b] {
        eventually("redis to be back", async || health(proxy).await == "up").await;
    }
    let turn = Cell::new(0);
    eventually("texts to be shared again", async || {
        turn.set(turn.get() + 1);
        let topic = format!("Again {}", turn.get());
        content(&a.order(&topic).await);
        let calls = a.calls().await;
        let other = b.ask(order(&topic)).await;
        content(&other);
        is_shared(&other) && a.calls().await == calls
    })
    .await;
}
