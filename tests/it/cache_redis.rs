//! Answers in Redis, which all replicas share: what one has asked for the others have, what one drops they drop, and Redis
//! may be wrong, slow or gone without anybody getting a wrong answer, an error, or waiting for it.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime},
};

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use super::{
    cache::{get, is_hit, ok, source},
    harness::{
        Backend, Message, Proxy, Wire,
        backend::Recorder,
        eventually, figure, ms,
        redis::{Cluster, Redis, Slow, Watched},
    },
};

/// A proxy with this Redis and this section `cache` of its only route. No test here is about the deadline, which a busy
/// machine may miss.
async fn replica(backend: &str, redis: &str, section: &str) -> Proxy {
    let proxy = Proxy::before(backend, &file(redis, section)).await;
    eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
    proxy
}

fn file(redis: &str, section: &str) -> String {
    format!("redis: {{ {redis}, timeout: 1s }}\nroutes: [{{ upstream: api, name: all, cache: {section} }}]\n")
}

fn at(redis: &Redis) -> String {
    format!("url: \"{}\"", redis.url())
}

/// Until so many replicas hear of what the others purge.
async fn listen(redis: &Redis, replicas: usize) {
    eventually("replicas to listen", async || {
        let answer = redis.command(&["PUBSUB", "NUMSUB", "sidegate:1:cache:{purges}:channel"]).await;
        answer.ends_with(&format!(":{replicas}\r\n"))
    })
    .await;
}

async fn pair(backend: &Recorder, redis: &Redis, section: &str) -> [Proxy; 2] {
    let pair = [replica(&backend.url(), &at(redis), section).await, replica(&backend.url(), &at(redis), section).await];
    listen(redis, 2).await;
    pair
}

/// One of a user of Redis who can be kept from hearing what the others purge.
async fn pair_with_a_deaf_one(backend: &Recorder, redis: &Redis, section: &str) -> [Proxy; 2] {
    let all = ["ACL", "SETUSER", "deaf", "on", "nopass", "~*", "+@all", "allchannels"];
    assert_eq!(redis.command(&all).await, "+OK\r\n");
    let a = replica(&backend.url(), &at(redis), section).await;
    let b = replica(&backend.url(), &at(redis).replace("//", "//deaf:x@"), section).await;
    listen(redis, 2).await;
    [a, b]
}

/// From now on that one hears nothing.
async fn deafen(redis: &Redis) {
    redis.command(&["ACL", "SETUSER", "deaf", "resetchannels"]).await;
    listen(redis, 1).await;
}

/// Until it may not use what it has without a look any more.
async fn unsure() {
    sleep(Duration::from_millis(1100)).await;
}

async fn marked(redis: &Redis, kind: &str) {
    let mark = format!("{{purges}}:{kind}");
    eventually("the mark to be made", async || redis.keys().await.iter().any(|key| key.contains(&mark))).await;
}

async fn in_redis(proxy: &Proxy, outcome: &str) -> i64 {
    proxy.sample(&format!("sidegate_cache_redis_total{{route=\"all\",outcome=\"{outcome}\"}}")).await
}

/// Until so much is written.
async fn written(proxy: &Proxy, count: i64) {
    eventually("answers to be written", async || in_redis(proxy, "stored").await >= count).await;
}

/// What is given was looked for in Redis, and found.
fn is_shared(answer: &Message) -> bool {
    is_hit(answer) && source(answer).ends_with("; detail=shared")
}

/// A backend whose answers count: `1`, `2`, ….
async fn counting(fields: &'static str) -> Recorder {
    Recorder::scripted(move |before, _| ok(fields, &(before + 1).to_string())).await
}

/// The answers in Redis.
async fn answers(redis: &Redis) -> HashSet<String> {
    redis.keys().await.into_iter().filter(|key| key.ends_with("}:all")).collect()
}

const HOUR: &str = "cache-control: max-age=3600\r\netag: \"e\"\r\nx-own: a\r\nx-own: b\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn what_one_replica_has_asked_for_all_have() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, "{}").await;
    let first = a.get("/x?y").await;
    assert!(source(&first).starts_with("sidegate; fwd=uri-miss"), "{first:?}");
    written(&a, 1).await;
    let shared = b.get("/x?y").await;
    assert!(is_shared(&shared), "{shared:?}");
    assert_eq!((shared.text().as_str(), shared.head.all("x-own")), ("1", vec!["a", "b"]));
    assert!(shared.head.get("age").is_some());
    let again = b.get("/x?y").await;
    assert!(is_hit(&again) && !is_shared(&again), "from memory now: {again:?}");
    assert_eq!(backend.count(), 1);
    assert_eq!((in_redis(&a, "miss").await, in_redis(&b, "hit").await, in_redis(&b, "miss").await), (1, 1, 0));
    redis.assert_all_expire("sidegate").await;
    assert!(!redis.keys().await.iter().any(|key| key.contains("x?y")), "keys say nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_who_ask_at_once_ask_redis_once() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, "{}").await;
    a.get("/").await;
    written(&a, 1).await;
    redis.pause();
    let mut all = JoinSet::new();
    for _ in 0..100 {
        let mut wire = b.connect().await;
        wire.send(get("/", "")).await;
        all.spawn(async move { wire.answer().await });
    }
    // All of them have asked.
    sleep(Duration::from_millis(200)).await;
    redis.resume();
    for answer in all.join_all().await {
        assert_eq!(answer.text(), "1");
    }
    assert_eq!((backend.count(), in_redis(&b, "hit").await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn parts_heads_and_stored_answers_only_are_given_from_redis_too() {
    let redis = Redis::start().await;
    let backend = Recorder::answering(ok(HOUR, "0123456789")).await;
    for (name, request, status) in [
        ("part", get("/", "range: bytes=2-3\r\n"), 206),
        ("head", get("/", "").replace("GET", "HEAD"), 200),
        ("stored only", get("/", "cache-control: only-if-cached\r\n"), 200),
        ("known", get("/", "if-none-match: \"e\"\r\n"), 304),
    ] {
        let [a, b] = pair(&backend, &redis, "{}").await;
        a.get("/").await;
        eventually("the answer to be there", async || !answers(&redis).await.is_empty()).await;
        let before = backend.count();
        let mut wire = b.connect().await;
        wire.send(&request).await;
        let head = wire.head().await;
        assert_eq!(head.status(), status, "{name}");
        assert!(head.get("cache-status").unwrap().contains("hit"), "{name}: {head:?}");
        assert_eq!(backend.count(), before, "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_are_found_by_replicas_that_do_not_know_that_there_are_any() {
    let redis = Redis::start().await;
    let backend = Recorder::scripted(|_, request| {
        let language = request.head.get("accept-language").unwrap_or("none");
        ok("cache-control: max-age=600\r\nvary: accept-language\r\n", language)
    })
    .await;
    let [a, b] = pair(&backend, &redis, "{}").await;
    for language in ["de", "en"] {
        a.ask(get("/", &format!("accept-language: {language}\r\n"))).await;
    }
    written(&a, 2).await;
    for language in ["en", "de"] {
        let answer = b.ask(get("/", &format!("accept-language: {language}\r\n"))).await;
        assert!(is_shared(&answer), "{answer:?}");
        assert_eq!(answer.text(), language);
    }
    assert_eq!(backend.count(), 2);
    assert_eq!(b.ask(get("/", "accept-language: fr\r\n")).await.text(), "fr");
    redis.assert_all_expire("sidegate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_asked_by_post_is_found_by_what_it_says() {
    let redis = Redis::start().await;
    let backend =
        Recorder::scripted(|before, _| ok("content-type: application/json\r\n", &format!("{{\"n\":{before}}}"))).await;
    let [a, b] = pair(&backend, &redis, "{ methods: [POST], key: [body], ttl: 1h }").await;
    let post = |body: &str| {
        format!(
            "POST / HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        )
    };
    a.ask(post("{\"a\":1,\"b\":2}")).await;
    written(&a, 1).await;
    let answer = b.ask(post("{\"b\": 2, \"a\": 1}")).await;
    assert!(is_shared(&answer), "{answer:?}");
    assert_eq!(b.ask(post("{\"a\":1}")).await.json()["n"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_recorded_stream_is_given_again_by_another_replica() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let section = "{ methods: [POST], key: [body], ttl: 1h, record_streams: true, replay: paced, speed: 10 }";
    let a = replica(&backend.url(), &at(&redis), section).await;
    let b = replica(&backend.url(), &at(&redis), section).await;
    let body = "{\"stream\":true}";
    let post = format!(
        "POST / HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
        body.len()
    );
    let mut client = a.connect().await;
    client.send(&post).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n").await;
    let events = ["data: {\"choices\":[]}\n\n", "data: two\n\n", "data: [DONE]\n\n"];
    for event in events {
        upstream.send(format!("{:x}\r\n{event}\r\n", event.len())).await;
        sleep(Duration::from_millis(50)).await;
    }
    upstream.send("0\r\n\r\n").await;
    let first = client.answer().await;
    assert_eq!(first.text(), events.concat());
    written(&a, 1).await;
    let mut client = b.connect().await;
    client.send(&post).await;
    assert_eq!(client.head().await.status(), 200);
    for event in events {
        assert_eq!(client.chunk().await.unwrap(), event.as_bytes(), "event by event");
    }
    assert_eq!(client.chunk().await, None);
    redis.assert_all_expire("sidegate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stale_is_used_as_if_this_replica_had_kept_it() {
    let redis = Redis::start().await;
    let backend = Recorder::scripted(|before, request| match request.head.target() {
        "/validated" if request.head.get("if-none-match").is_some() => {
            "HTTP/1.1 304 Not Modified\r\netag: \"e\"\r\ncache-control: max-age=600\r\n\r\n".to_owned()
        }
        "/failing" if before > 2 => "HTTP/1.1 503 Down\r\ncontent-length: 0\r\n\r\n".to_owned(),
        "/behind" => ok("cache-control: max-age=1, stale-while-revalidate=600\r\n", &before.to_string()),
        _ => ok("cache-control: max-age=1, stale-if-error=600\r\netag: \"e\"\r\n", "kept"),
    })
    .await;
    let [a, b] = pair(&backend, &redis, "{}").await;
    for path in ["/validated", "/failing", "/behind"] {
        a.get(path).await;
    }
    written(&a, 3).await;
    // They have to become stale.
    sleep(Duration::from_millis(1100)).await;
    let answer = b.get("/validated").await;
    assert!(source(&answer).contains("fwd-status=304"), "{answer:?}");
    assert_eq!(answer.text(), "kept");
    let answer = b.get("/failing").await;
    assert!(source(&answer).ends_with("detail=stale-if-error"), "{answer:?}");
    assert_eq!(answer.text(), "kept");
    let answer = b.get("/behind").await;
    assert!(is_shared(&answer), "{answer:?}");
    assert_eq!(answer.text(), "2");
    eventually("it to be asked for anew", async || b.get("/behind").await.text() != "2").await;
}

/// How long it takes until what `proxy` gives is not the old answer any more.
async fn dropped(proxy: &Proxy, path: &str, old: &str) -> Duration {
    let started = Instant::now();
    eventually("the purge to be seen", async || proxy.get(path).await.text() != old).await;
    started.elapsed()
}

/// Both have the same answer in their memories; which one.
async fn kept_by_both(a: &Proxy, b: &Proxy, path: &str) -> String {
    let before = in_redis(a, "stored").await;
    let old = a.get(path).await;
    if !is_hit(&old) {
        written(a, before + 1).await;
    }
    assert_eq!(b.get(path).await.text(), old.text(), "{path}");
    assert_eq!(a.get(path).await.text(), old.text(), "{path}: in memory");
    assert!(!is_shared(&b.get(path).await), "{path}: in memory");
    old.text()
}

async fn purge(proxy: &Proxy, what: &str) {
    assert_eq!(proxy.admin_post(&format!("/cache/purge?{what}")).await.status(), 200, "{what}");
}

const TAGGED: &str = "{ tags: [\"page:{query:p}\"] }";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_purged_on_one_replica_is_purged_on_all() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, TAGGED).await;
    let mut ear = Wire::to(redis.address()).await;
    ear.send("SUBSCRIBE bare\r\n").await;
    ear.arrival().await;
    let (mut purges, mut bare) = (Vec::new(), Vec::new());
    for (path, what) in [
        ("/a?p=1", "url=/a?p=1"),
        ("/b?p=2", "url=sidegate.test/b?p=2"),
        ("/c?p=3", "tag=page:3"),
        ("/d?p=4", "glob=/d*"),
        ("/e?p=5", "url=/e?p=5&soft"),
        ("/f?p=6", "tag=page:6&soft"),
        ("/g?p=7", "glob=/g*&soft"),
        ("/h?p=8", "all"),
        ("/i?p=9", "all&soft"),
    ] {
        let other = format!("/beside/{what}").replace(['*', '&', '=', '?'], "-");
        let beside = kept_by_both(&a, &b, &other).await;
        let old = kept_by_both(&a, &b, path).await;
        let c = replica(&backend.url(), &at(&redis), TAGGED).await;
        let target = what.replace("/a?p", "/a%3Fp").replace("/b?p", "/b%3Fp").replace("/e?p", "/e%3Fp");
        let started = Instant::now();
        let purging = async {
            purge(&a, &target).await;
            dropped(&b, path, &old).await;
            started.elapsed()
        };
        // The least that it could take: the same way, with nothing in it of the cache.
        let nothing = async {
            a.admin_get("/health").await;
            redis.command(&["PUBLISH", "bare", "x"]).await;
            ear.arrival().await;
            b.get(&other).await;
            started.elapsed()
        };
        let took = tokio::join!(purging, nothing);
        purges.push(took.0);
        bare.push(took.1);
        assert_ne!(a.get(path).await.text(), old, "{what}: it holds here, too");
        assert_ne!(c.get(path).await.text(), old, "{what}: and in Redis");
        for proxy in [&a, &b, &c] {
            assert_eq!(proxy.get(&other).await.text() == beside, !what.starts_with("all"), "{what}: of others nothing");
        }
    }
    purges.sort();
    bare.sort();
    let (median, least, slowest) = (purges[purges.len() / 2], bare[bare.len() / 2], purges[purges.len() - 1]);
    figure(&format!(
        "a purge is seen on the other replica after {} (slowest of {}: {}); a bare message with its requests takes {}",
        ms(median),
        purges.len(),
        ms(slowest),
        ms(least)
    ));
    // The median, as any single one may meet a machine that does something else; and where a message alone takes that
    // long, nothing is said about the cache.
    assert!(median < Duration::from_millis(100).max(least * 4), "{purges:?}, {bare:?}");
    assert!(slowest < Duration::from_secs(1), "{purges:?}");
    redis.assert_all_expire("sidegate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_request_changes_is_dropped_by_all() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, "{ tags: [\"page:{query:p}\"], invalidate: [\"page:{query:p}\"] }").await;
    let (own, tagged) = (kept_by_both(&a, &b, "/a?p=1").await, kept_by_both(&a, &b, "/b?p=1").await);
    let answer = a.ask("PUT /a?p=1 HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(answer.status(), 200);
    assert_ne!(a.get("/a?p=1").await.text(), own, "at once, where it was changed");
    assert_ne!(a.get("/b?p=1").await.text(), tagged);
    dropped(&b, "/a?p=1", &own).await;
    dropped(&b, "/b?p=1", &tagged).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_purges_never_gets_the_old_answer_back_from_redis() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, "{}").await;
    for n in 0..50 {
        let path = format!("/{n}");
        let old = a.get(&path).await.text();
        written(&a, 2 * n + 1).await;
        purge(&a, &format!("url={path}")).await;
        assert_ne!(a.get(&path).await.text(), old);
        written(&a, 2 * n + 2).await;
    }
    assert_eq!(in_redis(&b, "stored").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_during_a_fill_wins_on_all_replicas() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let a = replica(&backend.url(), &at(&redis), "{}").await;
    let b = replica(&backend.url(), &at(&redis), "{}").await;
    listen(&redis, 2).await;
    for what in ["url=/", "glob=/*", "all"] {
        // The one that fills is not the one that is told.
        let mut client = b.connect().await;
        client.send(get("/", "")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream
            .send("HTTP/1.1 200 OK\r\ncache-control: max-age=600\r\nconnection: close\r\ncontent-length: 6\r\n\r\nold")
            .await;
        client.head().await;
        purge(&a, what).await;
        sleep(Duration::from_millis(50)).await;
        upstream.send("old").await;
        assert_eq!(client.exactly(6).await, b"oldold", "who asked before gets it");
        sleep(Duration::from_millis(50)).await;
        for proxy in [&b, &a] {
            let mut client = proxy.connect().await;
            client.send(get("/", "")).await;
            let (mut upstream, _) = backend.accept_head().await;
            upstream.send("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 3\r\n\r\nnew").await;
            assert_eq!(client.answer().await.text(), "new", "{what}");
            // What cannot be kept is remembered: not for the next round.
            purge(proxy, "all").await;
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_that_a_replica_did_not_hear_is_found_out_within_a_second() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, TAGGED).await;
    let mut slowest = Duration::ZERO;
    for n in 0..3 {
        let (path, other) = (format!("/{n}?p={n}"), format!("/other/{n}"));
        let (old, beside) = (kept_by_both(&a, &b, &path).await, kept_by_both(&a, &b, &other).await);
        let what = [format!("tag=page:{n}"), format!("glob=/{n}*"), format!("url=/{n}%3Fp={n}&soft")][n].clone();
        // Nobody hears the others for a tenth of a second.
        redis.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
        purge(&a, &what).await;
        slowest = slowest.max(dropped(&b, &path, &old).await);
        listen(&redis, 2).await;
        assert_eq!(b.get(&other).await.text(), beside, "what was not purged is held against Redis, and holds");
    }
    figure(&format!("a purge that was not heard is found out within {}", ms(slowest)));
    assert!(slowest < Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_without_redis_holds_here_and_everywhere_when_redis_is_back() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, "{}").await;
    let old = kept_by_both(&a, &b, "/").await;
    redis.pause();
    for proxy in [&a, &b] {
        eventually("redis to be missed", async || {
            proxy.get("/fresh").await;
            proxy.admin_get("/health/redis").await.json()["status"] != "up"
        })
        .await;
    }
    purge(&a, "url=/").await;
    assert_ne!(a.get("/").await.text(), old);
    assert_eq!(b.get("/").await.text(), old, "which nobody has told");
    redis.resume();
    dropped(&b, "/", &old).await;
    assert_ne!(a.get("/").await.text(), old);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_304_does_not_bring_back_what_was_purged_elsewhere() {
    let redis = Redis::start().await;
    let backend = Recorder::scripted(|before, request| match request.head.get("if-none-match") {
        Some(_) => "HTTP/1.1 304 Not Modified\r\netag: \"e\"\r\ncache-control: max-age=600\r\n\r\n".to_owned(),
        None => ok("cache-control: no-cache\r\netag: \"e\"\r\n", &before.to_string()),
    })
    .await;
    for (path, what) in [("/url", "url=/url"), ("/glob", "glob=/glob*"), ("/soft", "url=/soft&soft")] {
        let [a, b] = pair_with_a_deaf_one(&backend, &redis, "{}").await;
        let old = b.get(path).await.text();
        written(&b, 1).await;
        deafen(&redis).await;
        purge(&a, what).await;
        marked(&redis, if path == "/glob" { "globs" } else { "u" }).await;
        let is_kept = path == "/soft";
        assert_eq!(b.get(path).await.text() == old, is_kept, "{what}: nobody vouches for it any more");
        for proxy in [&a, &b] {
            assert_eq!(proxy.get(path).await.text() == old, is_kept, "{what}");
        }
        assert!(is_hit(&b.get(path).await), "{what}: what was renewed is fresh");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_purged_elsewhere_is_not_joined_by_who_comes_later() {
    let (redis, recorder, backend) = (Redis::start().await, counting(HOUR).await, Backend::start().await);
    let [a, _] = pair_with_a_deaf_one(&recorder, &redis, "{}").await;
    let b = replica(&backend.url(), &at(&redis).replace("//", "//deaf:x@"), "{}").await;
    listen(&redis, 2).await;
    let mut early = b.connect().await;
    early.send(get("/", "")).await;
    let (mut old, _) = backend.accept_head().await;
    old.send("HTTP/1.1 200 OK\r\ncache-control: max-age=600\r\ntransfer-encoding: chunked\r\n\r\n3\r\nold\r\n").await;
    assert_eq!(early.head().await.status(), 200);
    deafen(&redis).await;
    unsure().await;
    // Nothing was purged: they read along.
    let mut late = b.connect().await;
    late.send(get("/", "")).await;
    assert_eq!(late.head().await.status(), 200);
    assert_eq!(late.chunk().await.unwrap(), b"old");
    purge(&a, "url=/").await;
    marked(&redis, "u").await;
    unsure().await;
    let mut later = b.connect().await;
    later.send(get("/", "")).await;
    let (mut new, _) = backend.accept_head().await;
    new.send(ok(HOUR, "new")).await;
    assert_eq!(later.answer().await.text(), "new");
    old.send("0\r\n\r\n").await;
    assert_eq!(late.chunk().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_for_all_of_the_cache_once_and_gets_nothing_that_may_have_been_purged() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, _] = pair_with_a_deaf_one(&backend, &redis, "{}").await;
    let road = Slow::before(redis.address()).await;
    let b = replica(&backend.url(), &format!("url: \"{}\"", road.url().replace("//", "//deaf:x@")), "{}").await;
    listen(&redis, 2).await;
    let [one, other] = [kept_by_both(&a, &b, "/one").await, kept_by_both(&a, &b, "/other").await];
    deafen(&redis).await;
    purge(&a, "all").await;
    marked(&redis, "all").await;
    unsure().await;
    assert_eq!(in_redis(&b, "failed").await, 0);
    // Of the second that Redis has: what was dropped is told within it, what there is instead no more.
    road.set_delay(Duration::from_millis(700));
    assert_ne!(b.get("/one").await.text(), one);
    assert_eq!(in_redis(&b, "failed").await, 1);
    road.set_delay(Duration::from_millis(1500));
    assert_ne!(b.get("/other").await.text(), other, "whatever the look would have said");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_clocks_of_the_replicas_do_not_matter() {
    let (redis, backend) = (
        Redis::start().await,
        Recorder::scripted(|_, request| {
            let seconds = if request.head.target().starts_with("/short") { 1 } else { 600 };
            ok(&format!("cache-control: max-age={seconds}\r\n"), request.head.target())
        })
        .await,
    );
    let b = replica(&backend.url(), &at(&redis), "{}").await;
    let upstreams = format!("upstreams: {{ api: {{ endpoints: ['{}'] }} }}", backend.url());
    let file = format!("{upstreams}\n{}", file(&at(&redis), "{}"));
    for clock in ["+1h", "-1h"] {
        // The monotonic one stays as it is, or timers would run on another clock than the kernel's.
        let faked = [
            ("LD_PRELOAD", "/usr/$LIB/faketime/libfaketimeMT.so.1"),
            ("FAKETIME", clock),
            ("FAKETIME_DONT_FAKE_MONOTONIC", "1"),
        ];
        let a = Proxy::start_with(&file, &faked).await;
        eventually("redis to be up", async || a.admin_get("/health/redis").await.json()["status"] == "up").await;
        let [short, long] = [format!("/short{clock}"), format!("/long{clock}")];
        a.get(&long).await;
        let made = a.get(&long).await;
        let date = httpdate::parse_http_date(made.head.get("date").unwrap()).unwrap();
        let off = SystemTime::now().duration_since(date).unwrap_or_else(|ahead| ahead.duration());
        assert!(off > Duration::from_secs(3000), "{off:?}: is faketime there? `scripts/setup test` installs it");
        a.get(&short).await;
        written(&a, 2).await;
        sleep(Duration::from_millis(1100)).await;
        let shared = b.get(&long).await;
        assert!(is_shared(&shared), "{clock}: {shared:?}");
        let age: u64 = shared.head.get("age").unwrap().parse().unwrap();
        assert!((1..60).contains(&age), "{clock}: {age}");
        assert!(!is_hit(&b.get(&short).await), "{clock}: it is too old");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_purged_and_could_not_be_marked_is_not_given_by_who_missed_it() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair_with_a_deaf_one(&backend, &redis, "{}").await;
    let [one, other, third] =
        [kept_by_both(&a, &b, "/1").await, kept_by_both(&a, &b, "/2").await, kept_by_both(&a, &b, "/3").await];
    deafen(&redis).await;
    redis.config_set("maxmemory", "1").await;
    purge(&a, "all").await;
    unsure().await;
    assert_ne!(b.get("/1").await.text(), one, "where it hears nothing");
    redis.command(&["ACL", "SETUSER", "deaf", "allchannels"]).await;
    listen(&redis, 2).await;
    dropped(&b, "/2", &other).await;
    let c = replica(&backend.url(), &at(&redis), "{}").await;
    assert_ne!(c.get("/3").await.text(), third, "where it was not there yet");
    redis.config_set("maxmemory", "0").await;
    marked(&redis, "all").await;
    for proxy in [&a, &b, &c] {
        assert_ne!(proxy.get("/3").await.text(), third);
    }
}

/// What is done to the value of `KEYS[1]`; `KEYS[2]` has another answer.
const WRONGS: [&str; 13] = [
    "flip(3)",
    "flip(4)",
    "flip(9)",
    "flip(40)",
    "flip(100)",
    "flip(#value - 1)",
    "flip(#value - 8)",
    "put(value .. '~')",
    "put(value:sub(1, -2))",
    "put(value:sub(1, 30))",
    "put(redis.call('GET', KEYS[2]))",
    "put('')",
    "put('nothing of ours')",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_is_wrong_in_redis_is_a_miss_and_never_an_answer() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, "{}").await;
    a.get("/first").await;
    written(&a, 1).await;
    let mut known = answers(&redis).await;
    let first = known.iter().next().unwrap().clone();
    for (n, wrong) in (2..).zip(WRONGS) {
        let path = format!("/{n}");
        let old = a.get(&path).await.text();
        written(&a, n).await;
        let key = answers(&redis).await.difference(&known).next().unwrap().clone();
        known.insert(key.clone());
        let script = format!(
            "local value = redis.call('GET', KEYS[1])
            local function put(other) redis.call('SET', KEYS[1], other, 'PX', 99999) end
            local function flip(at)
              put(value:sub(1, at) .. string.char((value:byte(at + 1) + 1) % 256) .. value:sub(at + 2))
            end
            {wrong}
            return 1"
        );
        assert_eq!(redis.command(&["EVAL", &script, "2", &key, &first]).await, ":1\r\n", "{wrong}");
        let answer = b.get(&path).await;
        assert!(!is_hit(&answer), "{wrong}: {answer:?}");
        assert_ne!(answer.text(), old);
    }
    assert_eq!(in_redis(&b, "hit").await, 0);
    // What is no text at all is an error of Redis, and none to a client.
    redis.command(&["DEL", &first]).await;
    redis.command(&["LPUSH", &first, "x"]).await;
    assert_eq!(b.get("/first").await.status(), 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_of_other_settings_are_not_found() {
    let (redis, backend) = (Redis::start().await, counting("cache-control: max-age=600, public\r\n").await);
    let a = replica(&backend.url(), &at(&redis), "{ shared: true }").await;
    let b = replica(&backend.url(), &at(&redis), "{}").await;
    let c = replica(&backend.url(), &at(&redis), "{ shared: true, max_bytes: 2MiB, finish_fill: true }").await;
    let own = a.ask(get("/", "authorization: Basic YTpi\r\n")).await.text();
    written(&a, 1).await;
    assert_ne!(b.get("/").await.text(), own, "there it would be for everybody");
    assert_eq!(c.get("/").await.text(), own, "how it is kept makes no difference");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_bodies_are_compressed_in_redis_and_larger_ones_stay_out() {
    let redis = Redis::start().await;
    let backend = Recorder::scripted(|_, request| {
        let length: usize = request.head.target().trim_start_matches('/').parse().unwrap();
        ok("cache-control: max-age=600\r\n", &"abcdefgh".repeat(length / 8))
    })
    .await;
    let [a, b] = pair(&backend, &redis, "{}").await;
    for length in [4096, 256 << 10, (256 << 10) + 8] {
        assert_eq!(a.get(&format!("/{length}")).await.text().len(), length);
    }
    written(&a, 2).await;
    sleep(Duration::from_millis(50)).await;
    let mut lengths = Vec::new();
    for key in answers(&redis).await {
        let length = redis.command(&["STRLEN", &key]).await;
        lengths.push(length.trim_start_matches(':').trim().parse::<usize>().unwrap());
    }
    lengths.sort_unstable();
    assert_eq!(lengths.len(), 2, "{lengths:?}");
    assert!(lengths[0] < 4096 && lengths[1] > 4096 && lengths[1] < 8192, "{lengths:?}");
    for (length, shared) in [(4096, true), (256 << 10, true), ((256 << 10) + 8, false)] {
        let answer = b.get(&format!("/{length}")).await;
        assert_eq!(answer.text(), "abcdefgh".repeat(length / 8));
        assert_eq!(is_shared(&answer), shared, "{length}");
        assert!(is_hit(&a.get(&format!("/{length}")).await), "in memory it is all the same");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_leave_room_in_redis_for_what_else_is_there() {
    const MOST: u64 = 32 << 20;
    let redis = Redis::with(&["--maxmemory", &MOST.to_string(), "--maxmemory-policy", "noeviction"]).await;
    let backend = Recorder::scripted(|_, _| ok("cache-control: max-age=600\r\n", &"x".repeat(200 << 10))).await;
    let proxy = replica(&backend.url(), &at(&redis), "{ redis: { compress_above: 256KiB } }").await;
    let told = || proxy.logged().lines().filter(|line| line.contains("no more answers are kept in redis")).count();
    let ask = async || proxy.get(&format!("/{}", backend.count())).await;
    eventually("redis to be nearly full", async || {
        ask().await;
        told() > 0
    })
    .await;
    for _ in 0..50 {
        ask().await;
    }
    let written = async || in_redis(&proxy, "stored").await;
    let unwritten = async || in_redis(&proxy, "dropped").await;
    let all = i64::try_from(backend.count()).unwrap();
    eventually("all to be written or not", async || written().await + unwritten().await == all).await;
    let info = redis.command(&["INFO", "memory"]).await;
    let used: u64 = info.lines().find_map(|line| line.strip_prefix("used_memory:")).unwrap().parse().unwrap();
    figure(&format!("{} of {all} answers written, {} % of 32 MiB used", written().await, used * 100 / MOST));
    assert!(used > MOST / 2 && used < MOST / 100 * 90, "{used}");
    assert!(redis.command(&["SET", "limit", "1"]).await.starts_with("+OK"), "there is room for others");

    redis.command(&["FLUSHALL"]).await;
    let before = written().await;
    eventually("answers to be kept there again", async || {
        ask().await;
        sleep(Duration::from_millis(20)).await;
        written().await > before
    })
    .await;
    proxy.line("answers are kept in redis again").await;
    assert_eq!(told(), 1, "once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_took_no_more_is_left_alone_for_a_while() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    // Nobody may ask how full it is.
    redis.command(&["ACL", "SETUSER", "default", "-info"]).await;
    let proxy = replica(&backend.url(), &at(&redis), "{}").await;
    listen(&redis, 1).await;
    proxy.get("/").await;
    written(&proxy, 1).await;
    redis.config_set("maxmemory", "1").await;
    for n in 0..100 {
        proxy.get(&format!("/{n}")).await;
    }
    let of = async |outcome| in_redis(&proxy, outcome).await;
    eventually("none to be written", async || of("failed").await + of("dropped").await >= 100).await;
    let (failed, dropped) = (of("failed").await, of("dropped").await);
    assert!(failed < dropped, "{failed} were tried, {dropped} not");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_soon_stale_is_soon_gone_from_redis() {
    let redis = Redis::start().await;
    let backend = counting("cache-control: max-age=1\r\netag: \"e\"\r\n").await;
    let proxy = replica(&backend.url(), &at(&redis), "{}").await;
    proxy.get("/").await;
    written(&proxy, 1).await;
    for key in answers(&redis).await {
        let left = redis.command(&["PTTL", &key]).await;
        let left: u64 = left.trim_start_matches(':').trim().parse().unwrap();
        assert!((1..=61_000).contains(&left), "{left}: as long again as it was fresh, at least a minute");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_may_do_without_redis() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let a = replica(&backend.url(), &at(&redis), "{ redis: off }").await;
    a.get("/").await;
    assert!(is_hit(&a.get("/").await));
    sleep(Duration::from_millis(50)).await;
    assert!(answers(&redis).await.is_empty());
    assert_eq!(in_redis(&a, "miss").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_shares_answers_and_purges() {
    let (cluster, backend) = (Cluster::start().await, counting(HOUR).await);
    let urls: Vec<_> = cluster.0.iter().map(|node| format!("\"{}\"", node.url())).collect();
    let section = format!("url: [{}], cluster: true", urls.join(", "));
    let a = replica(&backend.url(), &section, TAGGED).await;
    let b = replica(&backend.url(), &section.replace(&urls[0], &urls[1]), TAGGED).await;
    // Each at a node, perhaps not the same one.
    eventually("replicas to listen", async || {
        let mut count = 0;
        for node in &cluster.0 {
            let answer = node.command(&["PUBSUB", "NUMSUB", "sidegate:1:cache:{purges}:channel"]).await;
            count += answer.trim().rsplit(':').next().unwrap().parse::<usize>().unwrap();
        }
        count == 2
    })
    .await;
    for n in 0..8 {
        a.get(&format!("/{n}?p={n}")).await;
    }
    written(&a, 8).await;
    for n in 0..8 {
        let answer = b.get(&format!("/{n}?p={n}")).await;
        assert!(is_shared(&answer), "{answer:?}");
    }
    let mut nodes = 0;
    for node in &cluster.0 {
        nodes += usize::from(!answers(node).await.is_empty());
        node.assert_all_expire("sidegate").await;
    }
    assert!(nodes > 1, "they are spread");
    for (path, what) in
        [("/1?p=1", "tag=page:1"), ("/2?p=2", "glob=/2*"), ("/3?p=3", "url=/3%3Fp=3"), ("/4?p=4", "all")]
    {
        let old = kept_by_both(&a, &b, path).await;
        purge(&a, what).await;
        dropped(&b, path, &old).await;
        assert_ne!(a.get(path).await.text(), old, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_failover_answers_and_purges_are_shared_again() {
    let (mut watched, backend) = (Watched::start().await, counting(HOUR).await);
    let section = format!("url: \"{}\", sentinel: {{ master: mymaster }}", watched.sentinel.url());
    let a = replica(&backend.url(), &section, "{}").await;
    let b = replica(&backend.url(), &section, "{}").await;
    listen(&watched.master, 2).await;
    let old = kept_by_both(&a, &b, "/").await;
    watched.master.kill();
    assert_eq!(b.get("/").await.text(), old, "memory goes on");
    for proxy in [&a, &b] {
        eventually("the new master", async || {
            let health = proxy.admin_get("/health/redis").await.json();
            health["status"] == "up" && health["reconnects"].as_u64() > Some(0)
        })
        .await;
    }
    listen(&watched.replica, 2).await;
    let old = kept_by_both(&a, &b, "/").await;
    purge(&b, "url=/").await;
    dropped(&a, "/", &old).await;
    let old = kept_by_both(&a, &b, "/new").await;
    purge(&a, "all").await;
    dropped(&b, "/new", &old).await;
}

/// One request, over a connection of its own.
struct Done {
    path: String,
    cached: bool,
    answer: Message,
    took: Duration,
}

/// Sends a steady load for so long: to an answer in memory, to ones that nobody has asked for before, and to a route
/// without a cache. Returns what became of each.
fn load(proxy: &Proxy, what: &'static str, seconds: f64) -> JoinSet<Vec<Done>> {
    let address = proxy.address();
    let mut running = JoinSet::new();
    running.spawn(async move {
        let started = Instant::now();
        let mut ticks = interval(Duration::from_millis(5));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let (mut requests, mut count) = (JoinSet::new(), 0);
        while started.elapsed().as_secs_f64() < seconds {
            ticks.tick().await;
            count += 1;
            let path = match count % 3 {
                0 => "/hot".to_owned(),
                1 => format!("/cold/{what}/{count}"),
                _ => "/free".to_owned(),
            };
            requests.spawn(async move {
                let mut wire = Wire::to(address).await;
                let at = Instant::now();
                wire.send(get(&path, "")).await;
                let answer = wire.answer().await;
                Done { cached: path != "/free", path, answer, took: at.elapsed() }
            });
        }
        requests.join_all().await
    });
    running
}

/// How the outage went: no errors, what is in memory is given, and nobody waits for longer than Redis may take and a
/// request takes that has nothing to do with it.
async fn told(what: &str, running: JoinSet<Vec<Done>>, hot: &str) {
    let all: Vec<Done> = running.join_all().await.into_iter().flatten().collect();
    for done in &all {
        assert_eq!(done.answer.status(), 200, "{what}: {}", done.path);
        if done.path == "/hot" {
            assert!(is_hit(&done.answer), "{what}: {:?}", done.answer);
            assert_eq!(done.answer.text(), hot, "{what}");
        }
    }
    let (cached, free): (Vec<_>, Vec<_>) = all.iter().partition(|done| done.cached);
    let machine = free.iter().map(|done| done.took).max().unwrap();
    let mut took: Vec<_> = cached.iter().map(|done| done.took).collect();
    took.sort();
    figure(&format!(
        "{what}: {} requests, none failed; p50 {}, slowest {} (and {} without a cache)",
        took.len(),
        ms(took[took.len() / 2]),
        ms(took[took.len() - 1]),
        ms(machine)
    ));
    let most = Duration::from_millis(50 + 20) + machine;
    let late = took.iter().filter(|took| **took > most).count();
    assert!(late * 100 <= took.len(), "{what}: {late} of {} took longer than {}", took.len(), ms(most));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_memory_goes_on_and_nobody_waits_or_fails() {
    let (mut redis, backend) = (Redis::start().await, counting(HOUR).await);
    let road = Slow::before(redis.address()).await;
    let file = format!(
        "redis: {{ url: \"{}\", timeout: 50ms }}
routes: [{{ match: {{ path: /free }}, upstream: api }}, {{ upstream: api, name: all, cache: {{}} }}]\n",
        road.url()
    );
    let proxy = Proxy::before(&backend.url(), &file).await;
    let up = async || {
        eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
        // Listening, too, so that each outage begins as the first.
        listen(&redis, 1).await;
    };
    up().await;
    let hot = proxy.get("/hot").await.text();

    let running = load(&proxy, "slow", 1.5);
    sleep(Duration::from_millis(300)).await;
    road.set_delay(Duration::from_millis(200));
    sleep(Duration::from_millis(700)).await;
    road.set_delay(Duration::ZERO);
    told("slowed to 200 ms", running, &hot).await;

    up().await;
    let running = load(&proxy, "frozen", 3.5);
    sleep(Duration::from_millis(300)).await;
    redis.pause();
    // Long enough for the subscription to be given up.
    sleep(Duration::from_millis(2500)).await;
    redis.resume();
    told("frozen", running, &hot).await;

    up().await;
    let running = load(&proxy, "full", 1.0);
    sleep(Duration::from_millis(300)).await;
    redis.config_set("maxmemory", "1").await;
    sleep(Duration::from_millis(400)).await;
    redis.config_set("maxmemory", "0").await;
    told("full", running, &hot).await;

    up().await;
    let running = load(&proxy, "killed", 2.0);
    sleep(Duration::from_millis(300)).await;
    redis.kill();
    sleep(Duration::from_millis(700)).await;
    redis.restart().await;
    told("killed and restarted", running, &hot).await;

    eventually("it to be used again", async || {
        let before = in_redis(&proxy, "stored").await;
        proxy.get(&format!("/again/{}", backend.count())).await;
        sleep(Duration::from_millis(20)).await;
        in_redis(&proxy, "stored").await > before
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_that_redis_has_no_room_for_holds_on_all_replicas() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let [a, b] = pair(&backend, &redis, "{}").await;
    let old = kept_by_both(&a, &b, "/").await;
    redis.config_set("maxmemory", "1").await;
    purge(&a, "url=/").await;
    dropped(&b, "/", &old).await;
    for proxy in [&a, &b] {
        assert_ne!(proxy.get("/").await.text(), old);
        purge(proxy, "url=/").await;
        assert_ne!(proxy.get("/").await.text(), old, "it does not come back from Redis");
    }
    redis.config_set("maxmemory", "0").await;
    let c = replica(&backend.url(), &at(&redis), "{}").await;
    marked(&redis, "u").await;
    assert_ne!(c.get("/").await.text(), old);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_once_for_a_redis_that_hangs() {
    let (redis, backend) = (Redis::start().await, counting(HOUR).await);
    let file = format!(
        "redis: {{ url: \"{}\", timeout: 1s }}
routes: [{{ upstream: api, cache: {{}}, rate_limit: [{{ name: wide, key: global, limit: 1000000/h }}] }}]\n",
        redis.url()
    );
    let proxy = Proxy::before(&backend.url(), &file).await;
    eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
    proxy.get("/").await;
    redis.pause();
    let started = Instant::now();
    assert_eq!(proxy.get("/other").await.status(), 200);
    figure(&format!("limits and cache wait {} for a Redis that hangs, with a deadline of 1 s", ms(started.elapsed())));
    assert!(started.elapsed() < Duration::from_millis(1900));
    redis.resume();
}
