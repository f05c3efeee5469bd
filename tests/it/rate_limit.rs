//! How much each may use: exactly, over replicas, and told truthfully.

use std::{
    mem,
    time::{Duration, SystemTime},
};

use futures_util::future::join_all;
use serde_json::{Value, json};
use sidegate::{
    layers::rate_limit::{
        State,
        counters::Asked,
        window::{self, Algorithm, Counter, Demand, Quota},
    },
    store,
    telemetry::Metrics,
};
use tokio::{task::JoinSet, time::sleep};

use super::harness::{
    Backend, Message, Proxy, Wire,
    backend::Recorder,
    eventually, figure,
    redis::{Cluster, Redis, Slow},
};

/// Time enough for a Redis on a busy machine: what it does not answer in time would be counted here.
fn with(redis: &Redis) -> String {
    format!("redis: {{ url: \"{}\", timeout: 5s }}", redis.url())
}

/// A file with these rules, and this at its top.
fn file(rules: &str, rest: &str) -> String {
    format!("{rest}\nroutes: [{{ upstream: api, name: all, rate_limit: {rules} }}]\n")
}

fn get(fields: &str) -> String {
    format!("GET / HTTP/1.1\r\nhost: a\r\n{fields}\r\n")
}

/// Waits until a proxy counts in Redis.
async fn connected(proxy: &Proxy) {
    eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
}

/// Asks `count` times at once, over as many connections, of all proxies in turn; how often each status came.
async fn at_once(proxies: &[&Proxy], count: usize, fields: &str) -> (usize, usize) {
    let mut clients = JoinSet::new();
    for n in 0..count {
        let (address, request) = (proxies[n % proxies.len()].address(), get(fields));
        clients.spawn(async move { Wire::ask(address, request).await.status() });
    }
    let statuses = clients.join_all().await;
    let of = |status| statuses.iter().filter(|found| **found == status).count();
    assert_eq!(of(200) + of(429), count, "{statuses:?}");
    (of(200), of(429))
}

async fn remaining(proxy: &Proxy, path: &str) -> Value {
    let answer = proxy.admin_get(path).await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let counter = answer.json()["counters"][0].clone();
    if counter["redis"].is_null() {
        counter["memory"]["remaining"].clone()
    } else {
        counter["redis"]["remaining"].clone()
    }
}

fn retry_after(answer: &Message) -> u64 {
    answer.head.get("retry-after").expect("Retry-After").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_as_many_pass_as_may_over_two_replicas() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    for algorithm in ["sliding_window", "token_bucket"] {
        let rules = format!(
            "[{{ name: {algorithm}, key: ip, limit: 100/h, algorithm: {algorithm} }}, \
              {{ name: wide-{algorithm}, key: global, limit: 1000/h }}]"
        );
        let settings = file(&rules, &with(&redis));
        let before = backend.requests().len();
        let one = Proxy::before(&backend.url(), &settings).await;
        let other = Proxy::before(&backend.url(), &settings).await;
        connected(&one).await;
        connected(&other).await;
        let (passed, refused) = at_once(&[&one, &other], 400, "").await;
        figure(&format!("{algorithm}: {passed} of 400 passed, {refused} did not"));
        assert_eq!(passed, 100);
        assert_eq!(backend.requests().len() - before, 100);
        assert_eq!(remaining(&one, &format!("/rate-limits/wide-{algorithm}")).await, 900, "nothing was used of it");
        assert_eq!(remaining(&other, &format!("/rate-limits/{algorithm}?key=127.0.0.1")).await, 0);
    }
    redis.assert_all_expire("sidegate").await;
}

/// How far the clock of a process is ahead of that of this one.
async fn ahead(proxy: &Proxy) -> f64 {
    let before = SystemTime::now();
    let shown = proxy.ask(get("")).await.head.get("x-request-id").unwrap().to_owned();
    let line = proxy.access_line(&shown).await;
    let logged = humantime::parse_rfc3339(line["ts"].as_str().unwrap()).unwrap();
    logged.duration_since(before).map_or_else(|early| -early.duration().as_secs_f64(), |late| late.as_secs_f64())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clocks_of_the_replicas_do_not_matter() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    // Two windows, so that even sliding ones would have nothing in common by that clock. The monotonic one stays as it
    // is, or timers would run on another clock than the kernel's.
    let ahead_of_all = [
        ("LD_PRELOAD", "/usr/$LIB/faketime/libfaketimeMT.so.1"),
        ("FAKETIME", "+2h"),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
    ];
    for algorithm in ["sliding_window", "token_bucket"] {
        let rules = format!("[{{ name: {algorithm}, key: global, limit: 50/h, algorithm: {algorithm} }}]");
        let upstreams = format!("upstreams: {{ api: {{ endpoints: ['{}'] }} }}", backend.url());
        let settings = file(&rules, &format!("{}\n{upstreams}", with(&redis)));
        let right = Proxy::start(&settings).await;
        let wrong = Proxy::start_with(&settings, &ahead_of_all).await;
        connected(&right).await;
        connected(&wrong).await;
        let (passed, refused) = at_once(&[&right, &wrong], 200, "").await;
        figure(&format!("{algorithm}, one clock two hours ahead: {passed} of 200 passed, {refused} did not"));
        assert_eq!(passed, 50);
        let path = format!("/rate-limits/{algorithm}");
        assert_eq!((remaining(&right, &path).await, remaining(&wrong, &path).await), (json!(0), json!(0)));
        let (one, other) = (retry_after(&right.ask(get("")).await), retry_after(&wrong.ask(get("")).await));
        assert!(one.abs_diff(other) < 60, "both tell the same time to wait: {one} {other}");

        let (right, wrong) = (ahead(&right).await, ahead(&wrong).await);
        figure(&format!("their clocks are {right:.1} s and {wrong:.1} s ahead"));
        assert!(right.abs() < 600.0, "{right}");
        assert!((wrong - 7200.0).abs() < 600.0, "{wrong}: is faketime there? `scripts/setup test` installs it");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn exactly_as_many_pass_without_redis_and_over_a_cluster() {
    let backend = Recorder::ok().await;
    let rules = "[{ name: narrow, key: ip, limit: 50/h }, { name: bucket, key: [route, ip], limit: 90/h, algorithm: token_bucket }]";
    let alone = Proxy::before(&backend.url(), &file(rules, "")).await;
    assert_eq!(at_once(&[&alone], 200, "").await, (50, 150));
    assert_eq!(remaining(&alone, "/rate-limits/bucket?key=::ffff:127.0.0.1").await, 40);

    let cluster = Cluster::start().await;
    let urls: Vec<_> = cluster.0.iter().map(Redis::url).collect();
    let redis = format!("redis: {{ url: {}, cluster: true, timeout: 5s }}", json!(urls));
    let settings = file(rules, &redis);
    let (one, other) = (Proxy::before(&backend.url(), &settings).await, Proxy::before(&backend.url(), &settings).await);
    connected(&one).await;
    connected(&other).await;
    assert_eq!(at_once(&[&one, &other], 200, "").await, (50, 150));
    assert_eq!(remaining(&one, "/rate-limits/bucket?key=127.0.0.1").await, 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_its_retry_after_passes() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    for store in ["", &with(&redis)] {
        for rule in
            ["limit: 3/2s", "limit: 3/2s, algorithm: token_bucket", "limit: 10/s, algorithm: token_bucket, burst: 1"]
        {
            let rules = format!("[{{ name: few, key: global, {rule} }}]");
            let proxy = Proxy::before(&backend.url(), &file(&rules, store)).await;
            if !store.is_empty() {
                connected(&proxy).await;
            }
            for round in 0..2 {
                let refused = loop {
                    let answer = proxy.ask(get("")).await;
                    if answer.status() == 429 {
                        break answer;
                    }
                };
                let wait = retry_after(&refused);
                assert!((1..=4).contains(&wait), "{wait}");
                assert!(refused.head.get("ratelimit").unwrap().ends_with(&format!(";r=0;t={wait}")), "{refused:?}");
                sleep(Duration::from_secs(wait)).await;
                assert_eq!(proxy.ask(get("")).await.status(), 200, "{store} {rule} {round}");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_say_what_is_left() {
    let backend = Recorder::answering(
        "HTTP/1.1 200 OK\r\nratelimit: \"own\";r=1;t=1\r\nx-ratelimit-limit: 7\r\ncontent-length: 2\r\n\r\nok",
    )
    .await;
    let settings = "
routes:
  - match: { path: /section }
    upstream: api
    rate_limit:
      legacy_headers: true
      openai_headers: true
      rules:
        - { name: per-ip, key: ip, limit: 2/min }
        - { name: data, key: global, limit: 10MiB/h, cost: bytes, algorithm: token_bucket, burst: 1MiB }
        - { name: at-once, key: global, limit: 5, cost: in_flight }
        - { name: hidden, key: global, limit: 1/min, shadow: true }
  - match: { path: /list }
    upstream: api
    rate_limit: [{ name: few, key: global, limit: 1/min }]
    errors: openai
  - upstream: api
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let first = proxy.get("/section").await;
    let policy = "\"per-ip\";q=2;w=60, \"data\";q=10485760;w=3600;qu=\"content-bytes\", \"at-once\";q=5;qu=\"concurrent-requests\"";
    assert_eq!(first.head.all("ratelimit-policy"), [policy]);
    let limits = first.head.all("ratelimit");
    assert_eq!(limits[0], "\"own\";r=1;t=1", "what the backend says of its own stays");
    assert!(limits[1].starts_with("\"per-ip\";r=1;t="), "{limits:?}");
    assert!(limits[1].ends_with(", \"data\";r=1048576;t=0, \"at-once\";r=4"), "{limits:?}");
    assert_eq!(first.head.all("x-ratelimit-limit"), ["2"]);
    assert_eq!(first.head.all("x-ratelimit-remaining"), ["1"]);
    assert_eq!(first.head.all("x-ratelimit-limit-requests"), ["2"]);
    assert_eq!(first.head.all("x-ratelimit-limit-tokens"), [""; 0]);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let reset: u64 = first.head.get("x-ratelimit-reset").unwrap().parse().unwrap();
    assert!((now..=now + 61).contains(&reset), "{reset} {now}");

    let second = proxy.get("/section").await;
    assert_eq!(second.status(), 200);
    let refused = proxy.get("/section").await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.json()["type"], "urn:sidegate:problem:rate-limited");
    assert_eq!(refused.json()["violated-policies"], json!(["per-ip"]), "and not the shadow");
    assert!(refused.head.get("ratelimit").unwrap().starts_with("\"per-ip\";r=0;t="), "{refused:?}");
    assert!((1..=120).contains(&retry_after(&refused)));
    let line = proxy.access_line(refused.head.get("x-request-id").unwrap()).await;
    assert_eq!((&line["rate_limited"], &line["error"]), (&json!("per-ip"), &json!("rate-limited")));

    assert_eq!(proxy.get("/list").await.status(), 200);
    let refused = proxy.get("/list").await;
    assert_eq!(refused.json()["error"]["code"], "rate-limited");
    assert!(refused.json()["violated-policies"].is_null(), "there is no place for it");
    assert!(refused.head.get("x-ratelimit-limit").is_none());
    assert!(proxy.get("/free").await.head.get("ratelimit-policy").is_none());
    let count = |rule: &str, outcome: &str| {
        let route = if rule == "few" { "/list" } else { "/section" };
        format!("sidegate_rate_limits_total{{route=\"{route}\",rule=\"{rule}\",outcome=\"{outcome}\"}}")
    };
    assert_eq!(proxy.sample(&count("few", "limited")).await, 1);
    assert_eq!(proxy.sample(&count("per-ip", "passed")).await, 2);
    assert_eq!(proxy.sample(&count("hidden", "shadow_limited")).await, 1, "it refuses nobody");
    let lines = [&first, &second].map(async |answer| {
        proxy.access_line(answer.head.get("x-request-id").unwrap()).await["rate_limit_shadow"].clone()
    });
    assert_eq!(join_all(lines).await, [Value::Null, json!("hidden")]);
}

#[tokio::test(flavor = "multi_thread")]
async fn each_is_counted_by_what_the_rule_names() {
    let backend = Recorder::ok().await;
    let rule = |key: &str| format!("rate_limit: [{{ name: one, key: \"{key}\", limit: 1/h }}]");
    let settings = format!(
        "hygiene: {{ trusted_proxies: [127.0.0.1] }}
routes:
  - {{ match: {{ path: /ip }}, upstream: api, {} }}
  - {{ match: {{ path: /header }}, upstream: api, {} }}
  - {{ match: {{ path: /query }}, upstream: api, {} }}
  - {{ match: {{ path: '/bots/{{bot}}/x' }}, upstream: api, {} }}
  - {{ match: {{ path: /global }}, upstream: api, {} }}
",
        rule("ip"),
        rule("header:x-tenant"),
        rule("query:user"),
        rule("path:bot"),
        rule("global")
    );
    let proxy = Proxy::before(&backend.url(), &settings).await;
    let ask = async |target: &str, fields: &str| {
        let request = format!("GET {target} HTTP/1.1\r\nhost: a\r\n{fields}\r\n");
        proxy.ask(request).await.status()
    };
    let from = |ip: &str| format!("x-forwarded-for: {ip}\r\n");
    assert_eq!(ask("/ip", &from("2001:db8:0:1::1")).await, 200);
    assert_eq!(ask("/ip", &from("2001:db8:0:1:ffff::2")).await, 429, "the same /64");
    assert_eq!(ask("/ip", &from("2001:db8:0:2::1")).await, 200);
    assert_eq!(ask("/ip", &from("192.0.2.1")).await, 200);
    assert_eq!(ask("/ip", &from("::ffff:192.0.2.1")).await, 429, "the same address");
    assert_eq!(ask("/ip", &from("198.51.100.7, 192.0.2.1")).await, 429, "what a client wrote itself is not looked at");

    assert_eq!(ask("/header", "x-tenant: a\r\n").await, 200);
    assert_eq!(ask("/header", "x-tenant: b\r\n").await, 200);
    assert_eq!(ask("/header", "x-tenant: a\r\n").await, 429);
    assert_eq!(ask("/header", "").await, 200, "without it, by address");
    assert_eq!(ask("/header", "").await, 429);
    assert_eq!(ask("/header", "x-tenant: d\r\nx-tenant: e\r\n").await, 429, "nor with two");
    assert_eq!(ask("/query?user=a%62", "").await, 200);
    assert_eq!(ask("/query?x&us%65r=ab", "").await, 429);
    assert_eq!(ask("/query?user=b", "").await, 200);
    assert_eq!(ask("/query?user=c+d", "").await, 200);
    assert_eq!(ask("/query?user=c%20d", "").await, 429, "a form's space");
    assert_eq!(ask("/query?user=x1&user=ab", "").await, 200, "two that differ: by address");
    assert_eq!(ask("/query?user=x2&user=ab", "").await, 429, "who makes one up gains nothing");
    assert_eq!(ask("/header", "x-tenant: c\r\nx-tenant: c\r\n").await, 200);
    assert_eq!(ask("/bots/1/x", "").await, 200);
    assert_eq!(ask("/bots/2/x", "").await, 200);
    assert_eq!(ask("/bots/1/x", "").await, 429);
    assert_eq!(ask("/global", &from("192.0.2.1")).await, 200);
    assert_eq!(ask("/global", &from("192.0.2.2")).await, 429);

    assert_eq!(remaining(&proxy, "/rate-limits/one?route=/header&key=b").await, 0);
    assert_eq!(remaining(&proxy, "/rate-limits/one?route=/header&key=never").await, 1);
    let reset = proxy.admin_delete("/rate-limits/one?route=/header&key=b").await;
    assert_eq!(reset.json()["counters"][0]["memory"]["remaining"], 1, "{}", reset.text());
    assert_eq!(ask("/header", "x-tenant: b\r\n").await, 200);
    assert_eq!(ask("/header", "x-tenant: a\r\n").await, 429, "only that one");
    for (path, status) in [
        ("/rate-limits/none?key=a", 404),
        ("/rate-limits/one?route=/none&key=a", 404),
        ("/rate-limits/one?route=/header", 404),
        ("/rate-limits/one?route=/ip&key=nowhere", 404),
        ("/rate-limits/one?route=/ip&key=1.2.3.4&more=1", 400),
    ] {
        assert_eq!(proxy.admin_get(path).await.status(), status, "{path}");
    }
    let list = proxy.admin_get("/rate-limits").await.json();
    let first = json!({ "route": "/ip", "rule": "one", "key": ["ip"], "policy": "\"one\";q=1;w=3600" });
    assert_eq!(list["rate_limits"][0], first);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_does_not_choose_its_address() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), &file("[{ name: few, key: ip, limit: 2/h }]", "")).await;
    for (n, status) in [(1, 200), (2, 200), (3, 429), (4, 429)] {
        assert_eq!(proxy.ask(get(&format!("x-forwarded-for: 192.0.2.{n}\r\n"))).await.status(), status);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn some_are_exempt() {
    let backend = Recorder::ok().await;
    let settings = "
hygiene: { trusted_proxies: [127.0.0.1] }
defaults:
  rate_limit:
    - { name: few, key: global, limit: 1/h, exempt: { ips: [192.0.2.0/24], paths: ['/health/*'] } }
routes:
  - { match: { path: /off }, upstream: api, rate_limit: off }
  - { upstream: api }
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let ask =
        async |target: &str, fields: &str| proxy.ask(format!("GET {target} HTTP/1.1\r\nhost: a\r\n{fields}\r\n")).await;
    for _ in 0..3 {
        let answer = ask("/", "x-forwarded-for: 192.0.2.9\r\n").await;
        assert_eq!((answer.status(), answer.head.get("ratelimit")), (200, None));
        assert_eq!(ask("/health/x", "").await.status(), 200);
        assert_eq!(ask("/off", "").await.status(), 200);
    }
    assert_eq!(ask("/", "").await.status(), 200);
    assert_eq!(ask("/", "").await.status(), 429);
    assert_eq!(ask("/health/%2e", "").await.status(), 429, "an unusual spelling is not exempt");
}

#[tokio::test(flavor = "multi_thread")]
async fn routes_may_share_counters_and_a_reload_keeps_them() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    for store in ["", &with(&redis)] {
        let settings = |limit: &str| {
            format!(
                "{store}
defaults: {{ rate_limit: {{ scope: everywhere, rules: [{{ name: few, key: global, limit: {limit} }}] }} }}
routes:
  - {{ match: {{ path: /a }}, upstream: api }}
  - {{ match: {{ path: /own }}, upstream: api, rate_limit: [{{ name: few, key: global, limit: {limit} }}] }}
  - {{ upstream: api }}
"
            )
        };
        let proxy = Proxy::before(&backend.url(), &settings("2/h")).await;
        if !store.is_empty() {
            connected(&proxy).await;
        }
        assert_eq!(proxy.get("/a").await.status(), 200);
        assert_eq!(proxy.get("/b").await.status(), 200);
        assert_eq!(proxy.get("/a").await.status(), 429);
        assert_eq!(proxy.get("/own").await.status(), 200);
        let file = format!("upstreams: {{ api: {{ endpoints: [\"{}\"] }} }}\n{}", backend.url(), settings("4/h"));
        proxy.rewrite(&file);
        assert_eq!(proxy.admin_post("/reload").await.status(), 200);
        // Here the refusal is remembered for a second.
        eventually("the new limit", async || proxy.get("/a").await.status() == 200).await;
        assert_eq!(proxy.get("/b").await.status(), 200);
        assert_eq!(proxy.get("/b").await.status(), 429, "what was used before counts");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_flight_is_given_back_however_it_ends() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let rules = "[{ name: two, key: global, limit: 2, cost: in_flight }, { name: many, key: global, limit: 1000/h }]";
    for store in ["", &with(&redis)] {
        let proxy = Proxy::before(&backend.url(), &file(rules, store)).await;
        if !store.is_empty() {
            connected(&proxy).await;
        }
        let left = async || remaining(&proxy, "/rate-limits/two").await;
        // One streams, one waits for its answer.
        let (mut streaming, mut waiting) = (proxy.connect().await, proxy.connect().await);
        streaming.send(get("")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n").await;
        assert_eq!(streaming.head().await.status(), 200);
        waiting.send(get("")).await;
        let (held, _) = backend.accept_head().await;
        assert_eq!(left().await, 0);
        let refused = proxy.ask(get("")).await;
        assert_eq!((refused.status(), refused.head.get("retry-after")), (429, Some("1")), "nobody knows when one ends");
        assert_eq!(refused.head.get("ratelimit").unwrap().split(", ").next(), Some("\"two\";r=0"));

        upstream.send("0\r\n\r\n").await;
        eventually("the stream's place", async || left().await == 1).await;
        waiting.leave(false);
        eventually("the place of who left", async || left().await == 2).await;
        drop(held);
        drop(upstream);
        // One that fails.
        let mut failing = proxy.connect().await;
        failing.send(get("")).await;
        drop(backend.accept_head().await);
        assert_eq!(failing.head().await.status(), 502);
        eventually("the place of who failed", async || left().await == 2).await;
        assert_eq!(remaining(&proxy, "/rate-limits/many").await, 997, "a refused one has used nothing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_places_of_a_replica_that_dies_come_back() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let settings = file("[{ name: one, key: global, limit: 1, cost: in_flight }]", &with(&redis));
    let (one, other) = (Proxy::before(&backend.url(), &settings).await, Proxy::before(&backend.url(), &settings).await);
    connected(&one).await;
    connected(&other).await;
    let mut client = one.connect().await;
    client.send(get("")).await;
    let (_held, _) = backend.accept_head().await;
    assert_eq!(other.get("/").await.status(), 429);
    // Its lease outlives it for as long as it would have been renewed in.
    let key = redis.keys().await.into_iter().find(|key| key.contains("-now-")).unwrap();
    one.signal(rustix::process::Signal::KILL);
    one.exit().await;
    assert_eq!(other.get("/").await.status(), 429, "nobody knows yet");
    // As if its 20 seconds were over.
    let end =
        "for _, lease in ipairs(redis.call('ZRANGE', KEYS[1], 0, -1)) do redis.call('ZADD', KEYS[1], 1, lease) end";
    redis.command(&["EVAL", end, "1", &key]).await;
    assert_eq!(remaining(&other, "/rate-limits/one").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_are_charged_as_they_were_sent() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let rules = "[{ name: data, key: global, limit: 10KiB/h, cost: bytes }]";
    for store in ["", &with(&redis)] {
        let proxy = Proxy::before(&backend.url(), &file(rules, store)).await;
        if !store.is_empty() {
            connected(&proxy).await;
        }
        let left = async || remaining(&proxy, "/rate-limits/data").await;
        let mut client = proxy.connect().await;
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n").await;
        client.send(vec![b'x'; 1000]).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        assert_eq!(left().await, 9240, "what was announced is reserved");
        upstream.send(format!("HTTP/1.1 200 OK\r\ncontent-length: 2000\r\n\r\n{}", "y".repeat(2000))).await;
        assert_eq!(client.answer().await.body.len(), 2000);
        eventually("both bodies to be charged", async || left().await == 7240).await;
        // One that leaves half way pays for what it got.
        let mut client = proxy.connect().await;
        client.send(get("")).await;
        upstream.request().await;
        upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello\r\n").await;
        client.head().await;
        assert_eq!(client.chunk().await.unwrap(), b"hello");
        client.leave(false);
        eventually("five bytes to be charged", async || left().await == 7235).await;
        // One that is larger than what is left is let in, and the next one is not.
        let mut client = proxy.connect().await;
        client.send(get("")).await;
        let mut upstream = backend.accept().await;
        upstream.request().await;
        upstream.send(format!("HTTP/1.1 200 OK\r\ncontent-length: 9000\r\n\r\n{}", "z".repeat(9000))).await;
        assert_eq!(client.answer().await.body.len(), 9000);
        eventually("all of it to be used", async || left().await == 0).await;
        let refused = proxy.ask("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\nx").await;
        assert_eq!(refused.status(), 429);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_is_refused_does_not_reach_redis() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let proxy = Proxy::before(&backend.url(), &file("[{ name: few, key: ip, limit: 5/h }]", &with(&redis))).await;
    connected(&proxy).await;
    let mut client = proxy.connect().await;
    let mut refused = 0;
    for _ in 0..2000 {
        client.send(get("")).await;
        refused += usize::from(client.answer().await.status() == 429);
    }
    assert_eq!(refused, 1995);
    let stats = redis.command(&["INFO", "commandstats"]).await;
    let calls = |name: &str| -> u64 {
        let found = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{name}:calls=")));
        found.map_or(0, |rest| rest.split(',').next().unwrap().parse().unwrap())
    };
    let asked = calls("evalsha") + calls("eval");
    let remembered = proxy.sample("sidegate_rate_limits_remembered_total{route=\"all\"}").await;
    figure(&format!("2000 requests, 1995 refused: {asked} scripts run, {remembered} refused from memory"));
    assert!(asked < 60, "{asked}");
    assert!(remembered > 1940, "{remembered}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_that_is_refused_begins_no_sessions() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let settings =
        file("[{ name: few, key: ip, limit: 1/h }]", &format!("{}\ndefaults: {{ session: {{ }} }}", with(&redis)));
    let proxy = Proxy::before(&backend.url(), &settings).await;
    connected(&proxy).await;
    let first = proxy.ask(get("")).await;
    assert!(first.head.get("set-cookie").is_some());
    let mut client = proxy.connect().await;
    for n in 0..1000 {
        client.send(get(&format!("x-request-id: r-{n}\r\n"))).await;
        let refused = client.answer().await;
        assert_eq!((refused.status(), refused.head.get("set-cookie")), (429, None));
    }
    let keys = redis.keys().await;
    assert_eq!(keys.iter().filter(|key| key.contains(":session:")).count(), 1, "{keys:?}");
    let calls = proxy.sample("sidegate_redis_calls_total{outcome=\"ok\"}").await;
    figure(&format!("1001 requests without a session, 1000 refused: {calls} calls of Redis"));
    assert!(calls < 60, "{calls}");
    assert!(proxy.access_line("r-0").await["session_id"].is_null(), "there is none");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_from_memory_says_nothing_of_what_it_does_not_know() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let rules = "{ openai_headers: true, legacy_headers: true, rules: [
        { name: few, key: ip, limit: 1/h }, { name: data, key: global, limit: 1000/h, cost: tokens, reserve: 100 }] }";
    let proxy = Proxy::before(&backend.url(), &file(rules, &with(&redis))).await;
    connected(&proxy).await;
    assert_eq!(proxy.ask(get("")).await.status(), 200);
    let asked = proxy.ask(get("")).await;
    let remembered = proxy.ask(get("")).await;
    assert_eq!(proxy.sample("sidegate_rate_limits_remembered_total{route=\"all\"}").await, 1);
    for answer in [&asked, &remembered] {
        assert_eq!(answer.status(), 429);
        assert!(answer.head.get("ratelimit").unwrap().starts_with("\"few\";r=0;t="), "{answer:?}");
        assert_eq!(answer.head.get("x-ratelimit-remaining-requests"), Some("0"));
    }
    assert!(asked.head.get("ratelimit").unwrap().contains("\"data\";r="), "{asked:?}");
    assert!(!remembered.head.get("ratelimit").unwrap().contains("data"), "{remembered:?}");
    assert_eq!(remembered.head.get("x-ratelimit-remaining-tokens"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_is_one_replica_however_often_it_connects_anew() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let settings = |seconds: u32| {
        let store = format!("redis: {{ url: \"{}\", timeout: {seconds}s }}", redis.url());
        file("[{ name: many, key: global, limit: 100, cost: in_flight }]", &store)
    };
    let proxy = Proxy::before(&backend.url(), &settings(5)).await;
    connected(&proxy).await;
    // It keeps its counters for as long as it lasts.
    let mut client = proxy.connect().await;
    client.send(get("")).await;
    let (_held, _) = backend.accept_head().await;
    let upstreams = format!("upstreams: {{ api: {{ endpoints: [\"{}\"] }} }}\n", backend.url());
    for seconds in [6, 7] {
        proxy.rewrite(&format!("{upstreams}{}", settings(seconds)));
        assert_eq!(proxy.admin_post("/reload").await.status(), 200);
        connected(&proxy).await;
    }
    // Each connection says every five seconds that it lives.
    sleep(Duration::from_secs(6)).await;
    assert_eq!(proxy.admin_get("/rate-limits").await.json()["replicas"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn scripts_from_another_origin_may_read_what_is_left() {
    let backend = Recorder::ok().await;
    let settings = "
routes:
  - upstream: api
    cors: { origins: ['https://app.example.com'] }
    session: { cookie: off, header: x-sid }
    rate_limit: [{ name: few, key: global, limit: 1/h }]
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let origin = "origin: https://app.example.com\r\n";
    let preflight = format!("OPTIONS / HTTP/1.1\r\nhost: a\r\n{origin}access-control-request-method: POST\r\n\r\n");
    for _ in 0..3 {
        assert_eq!(proxy.ask(&preflight).await.status(), 204, "preflights are not counted");
    }
    assert_eq!(proxy.ask(get(origin)).await.status(), 200);
    let refused = proxy.ask(get(origin)).await;
    assert_eq!(refused.status(), 429);
    assert_eq!(refused.head.get("access-control-allow-origin"), Some("https://app.example.com"));
    let exposed = refused.head.get("access-control-expose-headers").unwrap();
    assert!(
        ["ratelimit", "ratelimit-policy", "retry-after", "x-sid"].iter().all(|name| exposed.contains(name)),
        "{exposed}"
    );
}

/// The script does what the arithmetic in memory does, whatever is asked of it.
#[tokio::test(flavor = "multi_thread")]
async fn redis_counts_as_memory_does() {
    let server = Redis::start().await;
    let config: store::Config = serde_json::from_value(json!({ "url": server.url() })).unwrap();
    let redis = store::Redis::start(&config, &Metrics::new()).unwrap();
    eventually("redis to be up", async || redis.is_up()).await;
    let state = State::default();
    let counters = state.counters(Some(&redis));
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut upto = |most: u32| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        u32::try_from(random >> 33).unwrap() % most
    };
    let (mut compared, mut went_back) = (0, 0);
    for case in 0..150 {
        let quotas: Vec<Quota> = (0..=upto(3))
            .map(|_| {
                let limit = f64::from(1 + upto(30));
                let algorithm = if upto(2) == 0 { Algorithm::SlidingWindow } else { Algorithm::TokenBucket };
                Quota { algorithm, limit, per: f64::from(1 + upto(40)) * 1000.0, burst: f64::from(1 + upto(30)) }
            })
            .collect();
        let mut mirror = vec![None; quotas.len()];
        let key = |n: usize| redis.key("limit", "same", &format!("{case}:{n}"));
        let mut back = false;
        for _ in 0..=upto(20) {
            // As if its clock had gone back since.
            if upto(20) == 0 {
                for (n, quota) in
                    quotas.iter().enumerate().filter(|(_, quota)| quota.algorithm == Algorithm::SlidingWindow)
                {
                    let (later, before, used) = (upto(4), upto(30), upto(30));
                    let per = quota.per;
                    let set = format!(
                        "local t = redis.call('TIME') local i = math.floor((t[1] * 1000000 + t[2]) / {per}) + {later} \
                         redis.call('SET', KEYS[1], string.format('%.0f {before} {used}', i), 'PX', 1000) return i"
                    );
                    let index = server.command(&["EVAL", &set, "1", key(n).as_str()]).await;
                    let index = index.trim().trim_start_matches(':').parse().unwrap();
                    mirror[n] = Some(Counter::Window { index, before: before.into(), used: used.into() });
                    back = true;
                }
            }
            let asked: Vec<Asked> = quotas
                .iter()
                .enumerate()
                .map(|(n, quota)| Asked {
                    settles: false,
                    key: key(n),
                    demand: Demand { quota: *quota, cost: f64::from(upto(6)).min(quota.most()), shadow: upto(5) == 0 },
                })
                .collect();
            let answer = counters.take(&asked).await.unwrap();
            let demands: Vec<_> = asked.iter().map(|one| one.demand).collect();
            let expected = window::take(&mut mirror, &demands, answer.at());
            assert_eq!(answer.decision, expected, "{case} {demands:?}");
            compared += 1;
            went_back += u32::from(mem::take(&mut back));
            if upto(4) == 0 {
                sleep(Duration::from_millis(u64::from(upto(12)))).await;
            }
        }
    }
    figure(&format!("{compared} decisions of Redis and of memory are the same, {went_back} after a clock went back"));
    assert!(went_back > 20, "{went_back}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_whose_clock_goes_back_forgets_nothing() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let settings = file(
        "[{ name: few, key: global, limit: 3/h }, { name: data, key: global, limit: 1KiB/h, cost: bytes }]",
        &with(&redis),
    );
    let proxy = Proxy::before(&backend.url(), &settings).await;
    connected(&proxy).await;
    assert_eq!(proxy.ask(get("")).await.status(), 200);
    eventually("two bytes to be charged", async || remaining(&proxy, "/rate-limits/data").await == 1022).await;
    // As if that had been in the hour to come.
    for key in redis.keys().await.iter().filter(|key| key.contains("-window-")) {
        let next = "local i, rest = string.match(redis.call('GET', KEYS[1]), '^(%d+)(.*)$') \
                    return redis.call('SET', KEYS[1], string.format('%.0f', i + 1) .. rest, 'EX', 7200)";
        redis.command(&["EVAL", next, "1", key]).await;
    }
    assert_eq!(remaining(&proxy, "/rate-limits/few").await, 2);
    assert_eq!(proxy.ask(get("")).await.status(), 200);
    eventually("four bytes to be charged", async || remaining(&proxy, "/rate-limits/data").await == 1020).await;
    assert_eq!(proxy.ask(get("")).await.status(), 200);
    assert_eq!(proxy.ask(get("")).await.status(), 429);
}

/// Redis answers after a while; who leaves meanwhile has taken nothing.
#[tokio::test(flavor = "multi_thread")]
async fn who_leaves_while_redis_is_asked_gives_back_what_it_took() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let road = Slow::before(redis.address()).await;
    let rules = "[{ name: places, key: global, limit: 5, cost: in_flight }, \
                  { name: data, key: global, limit: 10KiB/h, cost: bytes }]";
    let settings = file(rules, &format!("redis: {{ url: \"{}\", timeout: 5s }}", road.url()));
    let proxy = Proxy::before(&backend.url(), &settings).await;
    connected(&proxy).await;
    road.set_delay(Duration::from_millis(300));
    for _ in 0..5 {
        let mut client = proxy.connect().await;
        client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n").await;
        sleep(Duration::from_millis(50)).await;
        client.leave(true);
    }
    road.set_delay(Duration::ZERO);
    eventually("all places to be free", async || remaining(&proxy, "/rate-limits/places").await == 5).await;
    eventually("no byte to be charged", async || remaining(&proxy, "/rate-limits/data").await == 10240).await;
    assert_eq!(backend.requests().len(), 0);
    assert_eq!(proxy.ask(get("")).await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_the_same_question_is_answered_from_memory() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let settings = |limit: &str| {
        format!(
        "{}
routes:
  - {{ match: {{ path: /data }}, upstream: api, rate_limit: [{{ name: data, key: global, limit: 1000B/h, cost: bytes }}] }}
  - {{ match: {{ path: /small }}, upstream: api, name: small, rate_limit: [{{ name: one, key: ip, limit: {limit} }}] }}
",
        with(&redis)
    )
    };
    let proxy = Proxy::before(&backend.url(), &settings("1/h")).await;
    connected(&proxy).await;
    let post = async |bytes: usize| {
        let body = "x".repeat(bytes);
        proxy.ask(format!("POST /data HTTP/1.1\r\nhost: a\r\ncontent-length: {bytes}\r\n\r\n{body}")).await.status()
    };
    assert_eq!(post(500).await, 200);
    eventually("it to be charged", async || remaining(&proxy, "/rate-limits/data").await == 498).await;
    assert_eq!(post(900).await, 429);
    assert_eq!(post(900).await, 429);
    assert_eq!(post(100).await, 200, "there is room for less");
    assert_eq!(proxy.get("/small").await.status(), 200);
    assert_eq!(proxy.get("/small").await.status(), 429);
    let upstreams = format!("upstreams: {{ api: {{ endpoints: [\"{}\"] }} }}\n", backend.url());
    proxy.rewrite(&format!("{upstreams}{}", settings("100/h")));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert_eq!(proxy.get("/small").await.status(), 200, "another limit of the same counter");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_one_after_the_other_never_waits_for_its_own_place() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let proxy =
        Proxy::before(&backend.url(), &file("[{ name: one, key: ip, limit: 1, cost: in_flight }]", &with(&redis)))
            .await;
    connected(&proxy).await;
    let mut client = proxy.connect().await;
    for n in 0..2000 {
        client.send(get("")).await;
        assert_eq!(client.answer().await.status(), 200, "{n}");
    }
    eventually("nothing to be in flight", async || remaining(&proxy, "/rate-limits/one?key=127.0.0.1").await == 1)
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_places_of_many_live_streams_outlive_their_leases() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let road = Slow::before(redis.address()).await;
    let rules = "[{ name: one, key: 'header:x-user', limit: 1, cost: in_flight }]";
    let proxy =
        Proxy::before(&backend.url(), &file(rules, &format!("redis: {{ url: \"{}\", timeout: 5s }}", road.url())))
            .await;
    connected(&proxy).await;
    let mut held = Vec::new();
    for n in 0..100 {
        let mut client = proxy.connect().await;
        client.send(get(&format!("x-user: {n}\r\n"))).await;
        held.push((client, backend.accept_head().await));
    }
    let alive = async || {
        let count = "local n = 0 for _, k in ipairs(redis.call('KEYS', '*-now-*')) do \
                     n = n + redis.call('ZCOUNT', k, redis.call('TIME')[1] * 1000000, '+inf') end return n";
        redis.command(&["EVAL", count, "0"]).await.trim_start_matches(':').trim().parse::<u32>().unwrap()
    };
    assert_eq!(alive().await, 100);
    // One after the other, a round of renewals would take longer than a lease lives.
    road.set_delay(Duration::from_millis(250));
    sleep(Duration::from_secs(22)).await;
    assert_eq!(alive().await, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_no_session_is_counted_by_address() {
    let backend = Recorder::ok().await;
    let settings = "
defaults: { session: {} }
routes: [{ upstream: api, rate_limit: [{ name: few, key: session, limit: 2/h }] }]
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let first = proxy.ask(get("")).await;
    let cookie = first.head.get("set-cookie").unwrap().split(';').next().unwrap().to_owned();
    assert_eq!(proxy.ask(get("")).await.status(), 200);
    assert_eq!(proxy.ask(get("")).await.status(), 429, "whoever begins a session is the same one");
    let of_session = get(&format!("cookie: {cookie}\r\n"));
    assert_eq!(proxy.ask(&of_session).await.status(), 200);
    assert_eq!(proxy.ask(&of_session).await.status(), 200);
    assert_eq!(proxy.ask(&of_session).await.status(), 429);
}
