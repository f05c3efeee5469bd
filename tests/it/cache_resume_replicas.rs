//! A client that lost a stream comes again to another replica than the one that has it, or had it.

use std::time::Duration;

use http::Request;
use rustix::process::Signal;
use tokio::time::Instant;

use crate::{
    cache::{cached, get, source},
    cache_resume::{
        Begun, END, RESUME, STREAM, asking, begin, chunk, comes, event, first, last, left, numbered, post, prompt,
        reads, stream,
    },
    harness::{
        Backend, Proxy,
        backend::Recorder,
        client::{self, Http2Client},
        eventually, figure, ms,
        redis::{Cluster, Redis},
    },
};

async fn replica(backend: &str, redis: &str, more: &str, section: &str) -> Proxy {
    let proxy = Proxy::before(backend, &format!("redis: {{ {redis} }}\n{more}{}", cached(section))).await;
    eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
    proxy
}

/// Until so many replicas hear each other.
async fn listening(redis: &[Redis], replicas: usize) {
    for channel in ["sidegate:1:cache:{purges}:channel", "sidegate:1:resume:{streams}:channel"] {
        eventually("replicas to listen", async || {
            let mut count = 0;
            for node in redis {
                let answer = node.command(&["PUBSUB", "NUMSUB", channel]).await;
                count += answer.trim().rsplit(':').next().unwrap().parse::<usize>().unwrap();
            }
            count == replicas
        })
        .await;
    }
}

/// Nothing of this is about the deadline, which a busy machine may miss.
async fn pair_with(backend: &str, redis: &Redis, more: &str, section: &str) -> [Proxy; 2] {
    let at = format!("url: \"{}\", timeout: 1s", redis.url());
    let pair = [replica(backend, &at, more, section).await, replica(backend, &at, more, section).await];
    listening(std::slice::from_ref(redis), 2).await;
    pair
}

async fn pair(backend: &Backend, redis: &Redis, section: &str) -> [Proxy; 2] {
    pair_with(&backend.url(), redis, "", section).await
}

/// Another stream is begun, whoever asked.
async fn begins_anew(backend: &Backend, proxy: &Proxy, request: impl AsRef<[u8]>, than: &str) {
    let mut client = asking(proxy, request).await;
    let mut upstream = backend.accept().await;
    assert_eq!(upstream.request().await.head.get("last-event-id"), None, "nobody but us knows what it means");
    upstream.send(stream() + &chunk(&event(1)) + END).await;
    client.head().await;
    assert_ne!(first(&mut client).await, than, "a new stream");
    assert_eq!(client.chunk().await, None);
}

/// Whether it is the rest of a stream, and not a new one.
async fn is_resumed(backend: &Backend, proxy: &Proxy, request: impl AsRef<[u8]>) -> bool {
    let mut client = asking(proxy, request).await;
    tokio::select! {
        head = client.head() => {
            assert_eq!(head.get("cache-status"), Some("sidegate; hit; detail=resumed"));
            true
        }
        mut upstream = backend.accept() => {
            upstream.request().await;
            upstream.send(stream() + END).await;
            assert_eq!(client.answer().await.text(), "");
            false
        }
    }
}

/// Those keys that are copies.
async fn copies(redis: &Redis) -> Vec<String> {
    redis.keys().await.into_iter().filter(|key| key.ends_with(":copy")).collect()
}

/// Until a copy reaches so far.
async fn copied(redis: &Redis, bytes: usize) {
    eventually("the stream to be copied", async || {
        for copy in copies(redis).await {
            if redis.command(&["HGET", &copy, "to"]).await.ends_with(&format!("\r\n{bytes}\r\n")) {
                return true;
            }
        }
        false
    })
    .await;
}

async fn resumed(proxy: &Proxy, outcome: &str) -> i64 {
    proxy.sample(&format!("sidegate_cache_resumes_total{{route=\"all\",outcome=\"{outcome}\"}}")).await
}

async fn copies_that(proxy: &Proxy, outcome: &str) -> i64 {
    proxy.sample(&format!("sidegate_cache_resume_copies_total{{route=\"all\",outcome=\"{outcome}\"}}")).await
}

const SHARED: &str = "{ methods: [POST], key: [body], ttl: 1h, record_streams: true, shared: true, resume: 20s }";

#[tokio::test(flavor = "multi_thread")]
async fn another_replica_gives_what_was_missed_and_the_live_tail_each_event_once() {
    for section in [RESUME, "{ methods: [POST], key: [body], ttl: 1h, resume: 20s }", SHARED] {
        let (redis, backend) = (Redis::start().await, Backend::start().await);
        let [a, b] = pair(&backend, &redis, section).await;
        let Begun { mut client, mut upstream, id } = begin(&backend, &a, prompt("x-request-id: cut-0\r\n")).await;
        let (mut n, mut worst, mut here) = (1, Duration::ZERO, &a);
        for turn in 0..6 {
            left(here, client, &format!("cut-{turn}"), turn % 2 == 0).await;
            here = if turn % 3 == 2 { &a } else { &b };
            // One comes while nobody is there, one after somebody is, in pieces.
            upstream.send(chunk(&event(n + 1)) + &chunk("data: ")).await;
            let fields = format!("x-request-id: cut-{}\r\n{}", turn + 1, last(&id, n));
            client = asking(here, prompt(&fields)).await;
            let head = client.head().await;
            assert_eq!((head.status(), head.get("x-own")), (200, Some("a")));
            assert_eq!(head.get("cache-status"), Some("sidegate; hit; detail=resumed"));
            reads(&mut client, &(numbered(n + 1, &id) + "data: ")).await;
            upstream.send(chunk(&format!("{}\n\n", n + 2))).await;
            reads(&mut client, &format!("{}\nid: {id}.{}\n\n", n + 2, n + 2)).await;
            let sent = Instant::now();
            upstream.send(chunk(&event(n + 3))).await;
            comes(&mut client, n + 3..=n + 3, &id).await;
            worst = worst.max(sent.elapsed());
            n += 3;
        }
        upstream.send(chunk("data: [DONE]\n\n") + END).await;
        reads(&mut client, &format!("data: [DONE]\nid: {id}.{}\n\n", n + 1)).await;
        assert_eq!(client.chunk().await, None);
        assert!(backend.accepted().await.is_none(), "one request: {section}");
        assert_eq!((resumed(&b, "there").await, resumed(&a, "here").await), (4, 2));
        assert_eq!(b.sample("sidegate_cache_requests_total{route=\"all\",outcome=\"resumed\"}").await, 4);
        assert_eq!(a.admin_get("/cache").await.json()["caches"][0]["resumable"], 1);
        redis.assert_all_expire("sidegate").await;
        figure(&format!("between two replicas the live tail came after {} at most", ms(worst)));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_ended_is_there_for_all_replicas_as_long_as_it_can_be_taken_up() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair(&backend, &redis, &RESUME.replace("20s", "2s")).await;
    let Begun { mut client, mut upstream, id } = begin(&backend, &a, prompt("")).await;
    upstream.send((2..=5).map(|n| chunk(&event(n))).collect::<String>() + END).await;
    comes(&mut client, 2..=5, &id).await;
    assert_eq!(client.chunk().await, None);
    eventually("it to be copied", async || copies_that(&a, "complete").await == 1).await;
    for had in 1..=5 {
        let rest: String = (had + 1..=5).map(|n| numbered(n, &id)).collect();
        let again = b.ask(prompt(&last(&id, had))).await;
        assert_eq!((again.text(), source(&again)), (rest, "sidegate; hit; detail=resumed"), "{had}");
    }
    begins_anew(&backend, &b, prompt(&last(&id, 6)), &id).await;
    assert_eq!((resumed(&b, "there").await, resumed(&b, "gone").await), (5, 1));
    redis.assert_all_expire("sidegate").await;
    eventually("the first copy to be gone", async || {
        let unknown = resumed(&b, "unknown").await;
        let mut again = asking(&b, prompt(&last(&id, 5))).await;
        tokio::select! {
            answer = again.answer() => {
                assert_eq!(answer.text(), "");
                false
            }
            mut upstream = backend.accept() => {
                upstream.send(stream() + END).await;
                assert_eq!(resumed(&b, "unknown").await, unknown + 1);
                true
            }
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_replica_had_that_was_killed_is_given_and_breaks_off_in_truth() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair(&backend, &redis, RESUME).await;
    let Begun { mut client, mut upstream, id } = begin(&backend, &a, prompt("")).await;
    upstream.send(chunk(&(event(2) + &event(3))) + &chunk("data: ")).await;
    reads(&mut client, &(numbered(2, &id) + &numbered(3, &id) + "data: ")).await;
    copied(&redis, (event(1) + &event(2) + &event(3)).len() + 6).await;
    a.signal(Signal::KILL);
    assert!(!a.exit().await.0.success());
    client.ended().await;
    upstream.ended().await;
    let killed = Instant::now();
    let mut again = asking(&b, prompt(&last(&id, 1))).await;
    again.head().await;
    reads(&mut again, &(numbered(2, &id) + &numbered(3, &id) + "data: ")).await;
    let (rest, _) = again.rest().await;
    assert!(rest.is_empty(), "nothing that looks like an end: {}", rest.escape_ascii());
    figure(&format!("a killed owner was known to be gone {} later", ms(killed.elapsed())));
    // As often as anybody likes; who has all of it asks the upstream again.
    let mut again = asking(&b, prompt(&last(&id, 2))).await;
    again.head().await;
    reads(&mut again, &(numbered(3, &id) + "data: ")).await;
    assert!(again.rest().await.0.is_empty());
    begins_anew(&backend, &b, prompt(&last(&id, 3)), &id).await;
    redis.assert_all_expire("sidegate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_replica_had_that_was_stopped_is_given_and_breaks_off_at_once() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair_with(&backend.url(), &redis, "drain: { timeout: 100ms }\n", RESUME).await;
    let Begun { mut client, mut upstream, id } = begin(&backend, &a, prompt("")).await;
    copied(&redis, event(1).len()).await;
    // One who has moved already notices, too.
    let mut moved = asking(&b, prompt(&last(&id, 1))).await;
    moved.head().await;
    let more: String = (2..=40).map(event).collect();
    upstream.send(chunk(&more)).await;
    comes(&mut moved, 2..=40, &id).await;
    a.signal(Signal::TERM);
    upstream.send(chunk(&event(41))).await;
    comes(&mut client, 2..=41, &id).await;
    client.rest().await;
    let (status, log) = a.exit().await;
    assert!(status.success(), "{status}: {log}");
    comes(&mut moved, 41..=41, &id).await;
    assert!(moved.rest().await.0.is_empty());
    let mut again = asking(&b, prompt(&last(&id, 39))).await;
    again.head().await;
    comes(&mut again, 40..=41, &id).await;
    assert!(again.rest().await.0.is_empty());
    begins_anew(&backend, &b, prompt(&last(&id, 41)), &id).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_is_nobody_elses_on_any_replica() {
    let shared = "{ methods: [POST], key: [body], body: { when: { temperature: 0 } }, shared: true, resume: 20s }";
    for section in [RESUME, shared] {
        let (redis, backend) = (Redis::start().await, Backend::start().await);
        let [a, b] = pair(&backend, &redis, section).await;
        let mine = "authorization: Bearer mine\r\n".to_owned();
        let Begun { client: _client, mut upstream, id } = begin(&backend, &a, prompt(&mine)).await;
        copied(&redis, event(1).len()).await;
        let other_path =
            post("/v1/other", &(mine.clone() + &last(&id, 1)), r#"{"stream":true,"temperature":1,"messages":[]}"#);
        for request in [
            prompt(&("authorization: Bearer yours\r\n".to_owned() + &last(&id, 1))),
            prompt(&last(&id, 1)),
            post("/v1/chat/completions", &(mine.clone() + &last(&id, 1)), r#"{"stream": true}"#),
            other_path,
        ] {
            begins_anew(&backend, &b, request, &id).await;
        }
        assert_eq!(resumed(&b, "other").await, 4);
        // Nor is this anybody's.
        begins_anew(&backend, &b, prompt(&(mine.clone() + &last(&id, 2))), &id).await;
        assert_eq!(resumed(&b, "gone").await, 1);
        upstream.send(chunk(&event(2)) + END).await;
        assert_eq!(b.ask(prompt(&(mine + &last(&id, 1)))).await.text(), numbered(2, &id));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redis_knows_nothing_of_what_is_said() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair(&backend, &redis, RESUME).await;
    let secret = "authorization: Bearer top-secret\r\n".to_owned();
    let Begun { client: _client, mut upstream, id } = begin(&backend, &a, prompt(&secret)).await;
    upstream.send(chunk("data: whispered\n\n")).await;
    copied(&redis, event(1).len() + 17).await;
    let mut again = asking(&b, prompt(&(secret + &last(&id, 1)))).await;
    again.head().await;
    reads(&mut again, &format!("data: whispered\nid: {id}.2\n\n")).await;
    let copy = &copies(&redis).await[0];
    let all = redis.keys().await.concat() + &redis.command(&["HGETALL", copy]).await;
    for word in ["whispered", "data:", "top-secret", "event-stream", "x-own", "chat", &id] {
        assert!(!all.contains(word), "{word} in {all}");
    }
    redis.assert_all_expire("sidegate").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_purged_is_not_taken_up_on_any_replica() {
    let tagged =
        "{ methods: [POST], key: [body], body: { when: { temperature: 0 } }, tags: [\"t:{query:t}\"], resume: 20s }";
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair(&backend, &redis, tagged).await;
    for (n, purge) in ["tag=t:0", "url=/s?t=1", "glob=/s?t=2", "all"].into_iter().enumerate() {
        let ask = |fields: &str| post(&format!("/s?t={n}"), fields, r#"{"temperature": 1}"#);
        let Begun { client, mut upstream, id } = begin(&backend, &a, ask("")).await;
        // Of another length each time.
        let second = format!("data: {}\n\n", "x".repeat(10 + n));
        upstream.send(chunk(&second)).await;
        copied(&redis, event(1).len() + second.len()).await;
        for proxy in [&a, &b] {
            assert!(is_resumed(&backend, proxy, ask(&last(&id, 1))).await, "{purge}");
        }
        // Whoever is told.
        let told = if n % 2 == 0 { &a } else { &b };
        let held = async || a.admin_get("/cache").await.json()["caches"][0]["resumable_bytes"].clone();
        assert_ne!(held().await, 0);
        // What somebody reads is there for as long as that lasts.
        let client = Some(client).filter(|_| purge != "all");
        assert_eq!(told.admin_post(&format!("/cache/purge?{purge}")).await.status(), 200);
        if purge == "all" {
            eventually("the memory to be given back where another was told", async || {
                told.admin_post("/cache/purge?all").await;
                held().await == 0
            })
            .await;
        }
        for proxy in [&a, &b] {
            eventually("all to know of it", async || !is_resumed(&backend, proxy, ask(&last(&id, 1))).await).await;
        }
        drop((client, upstream));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_hangs_keeps_nobody_waiting_and_the_copy_catches_up() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let at = format!("url: \"{}\"", redis.url());
    let [a, b] = [replica(&backend.url(), &at, "", RESUME).await, replica(&backend.url(), &at, "", RESUME).await];
    listening(std::slice::from_ref(&redis), 2).await;
    let Begun { mut client, mut upstream, id } = begin(&backend, &a, prompt("x-request-id: cut\r\n")).await;
    copied(&redis, event(1).len()).await;
    redis.pause();
    // Each comes before the next is sent: none waits for more than itself.
    for n in 2..=200 {
        upstream.send(chunk(&event(n))).await;
        comes(&mut client, n..=n, &id).await;
    }
    // Who comes again is asked for anew, as if the id were not known.
    begins_anew(&backend, &b, prompt(&last(&id, 1)), &id).await;
    begins_anew(&backend, &b, prompt(&last(&id, 1)), &id).await;
    assert_eq!(resumed(&b, "failed").await, 2);
    left(&a, client, "cut", true).await;
    redis.resume();
    for proxy in [&a, &b] {
        eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
    }
    let all: usize = (1..=200).map(|n| event(n).len()).sum();
    copied(&redis, all).await;
    assert!(copies_that(&a, "failed").await >= 1);
    let mut again = asking(&b, prompt(&last(&id, 1))).await;
    again.head().await;
    comes(&mut again, 2..=200, &id).await;
    upstream.send(chunk(&event(201)) + END).await;
    comes(&mut again, 201..=201, &id).await;
    assert_eq!(again.chunk().await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_leave_room_in_redis_for_what_else_is_there() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, _b] = pair(&backend, &redis, RESUME).await;
    redis.command(&["SETRANGE", "others", "20000000", "x"]).await;
    redis.config_set("maxmemory", "24000000").await;
    let Begun { client: _client, upstream: _upstream, id: _ } = begin(&backend, &a, prompt("")).await;
    eventually("the copy to wait", async || copies_that(&a, "failed").await > 1).await;
    assert_eq!(copies(&redis).await.len(), 0);
    assert!(redis.command(&["SET", "limit", "1"]).await.starts_with("+OK"), "there is room for others");
    redis.command(&["DEL", "others"]).await;
    eventually("the copy to catch up", async || copies(&redis).await.len() == 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_has_lost_the_copy_gets_it_again() {
    let (mut redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair(&backend, &redis, RESUME).await;
    let Begun { client: _client, mut upstream, id } = begin(&backend, &a, prompt("")).await;
    copied(&redis, event(1).len()).await;
    redis.restart().await;
    for proxy in [&a, &b] {
        eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
    }
    upstream.send(chunk(&event(2))).await;
    copied(&redis, 2 * event(1).len()).await;
    let mut again = asking(&b, prompt(&last(&id, 1))).await;
    again.head().await;
    comes(&mut again, 2..=2, &id).await;
    // Who reads then is told that it broke off, and not that it ended.
    redis.kill();
    upstream.send(chunk(&event(3))).await;
    let (rest, _) = again.rest().await;
    assert!(rest.is_empty(), "{}", rest.escape_ascii());
}

/// Ten times as much as there is room for.
#[tokio::test(flavor = "multi_thread")]
async fn a_large_stream_is_read_on_and_its_copy_stays_small() {
    const EVENTS: usize = 600;
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let section = "{ methods: [POST], key: [body], resume: 20s, max_body: 64KiB, redis: { max_body: 64KiB } }";
    let [a, b] = pair(&backend, &redis, section).await;
    let Begun { client, mut upstream, id } = begin(&backend, &a, prompt("x-request-id: cut\r\n")).await;
    left(&a, client, "cut", false).await;
    let mut again = asking(&b, prompt(&last(&id, 1))).await;
    again.head().await;
    let large = |n: usize| format!("data: {n} {}", "x".repeat(1000));
    let send = async {
        for n in 2..=EVENTS {
            upstream.send(chunk(&(large(n) + "\n\n"))).await;
        }
        upstream.send(END).await;
    };
    let read = async {
        let mut come = String::new();
        for n in 2..=EVENTS {
            let expected = large(n) + &format!("\nid: {id}.{n}\n\n");
            while come.len() < expected.len() {
                come += std::str::from_utf8(&again.chunk().await.unwrap()).unwrap();
            }
            assert!(come.starts_with(&expected), "{n}");
            come.drain(..expected.len());
            if n == EVENTS / 2 {
                let copy = &copies(&redis).await[0];
                let size = redis.command(&["MEMORY", "USAGE", copy, "SAMPLES", "0"]).await;
                let size: usize = size.trim().trim_start_matches(':').parse().unwrap();
                assert!(size < 128 << 10, "{size}");
                figure(&format!("the copy of a stream of 600 KiB with max_body: 64KiB took {size} bytes in Redis"));
            }
        }
        assert_eq!((come.as_str(), again.chunk().await), ("", None));
    };
    tokio::join!(send, read);
    // What was long ago is gone; of the last part all is there.
    begins_anew(&backend, &b, prompt(&last(&id, 3)), &id).await;
    let rest: String = (EVENTS - 9..=EVENTS).map(|n| large(n) + &format!("\nid: {id}.{n}\n\n")).collect();
    assert_eq!(b.ask(prompt(&last(&id, EVENTS - 10))).await.text(), rest);
    assert!(backend.accepted().await.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_upstream_goes_on_as_long_as_somebody_reads_anywhere() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair(&backend, &redis, &RESUME.replace("20s", "400ms")).await;
    let Begun { client, mut upstream, id } = begin(&backend, &a, prompt("x-request-id: cut\r\n")).await;
    copied(&redis, event(1).len()).await;
    left(&a, client, "cut", false).await;
    let mut again = asking(&b, prompt(&("x-request-id: moved\r\n".to_owned() + &last(&id, 1)))).await;
    again.head().await;
    let begun = Instant::now();
    let mut n = 1;
    // Far longer than it would be kept for nobody.
    while begun.elapsed() < Duration::from_secs(3) {
        n += 1;
        upstream.send(chunk(&event(n))).await;
        comes(&mut again, n..=n, &id).await;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    left(&b, again, "moved", false).await;
    let begun = Instant::now();
    upstream.ended().await;
    figure(&format!("resume: 400ms: let go {} after the last reader elsewhere had left", ms(begun.elapsed())));
    eventually("the copy to be taken out", async || copies(&redis).await.is_empty()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stored_stream_has_its_ids_on_every_replica() {
    let body = (1..=3).map(event).collect::<String>() + "data: [DONE]\n\n";
    let backend = Recorder::answering(format!("{STREAM}connection: close\r\n\r\n") + &chunk(&body) + END).await;
    let redis = Redis::start().await;
    let section = "{ ttl: 1h, record_streams: true, resume: 100ms }";
    let [a, b] = pair_with(&backend.url(), &redis, "", section).await;
    let whole = a.get("/").await.text();
    let id = whole.strip_prefix("data: 1\nid: ").and_then(|text| text.split_once('.')).unwrap().0;
    eventually("it to be copied", async || copies_that(&a, "complete").await == 1).await;
    eventually("the copy to be over", async || copies(&redis).await.is_empty()).await;
    // From what is stored in Redis, by its id, and then as any other hit.
    let again = b.ask(get("/", &last(id, 2))).await;
    assert_eq!(again.text(), format!("{}data: [DONE]\nid: {id}.4\n\n", numbered(3, id)));
    assert_eq!(source(&again), "sidegate; hit; detail=resumed");
    assert_eq!(b.get("/").await.text(), whole);
    assert_eq!((backend.count(), resumed(&b, "stored").await), (1, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_close_together_is_written_together() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, _b] = pair(&backend, &redis, RESUME).await;
    let begun = Instant::now();
    let Begun { mut client, mut upstream, id } = begin(&backend, &a, prompt("")).await;
    for n in 2..=500 {
        upstream.send(chunk(&event(n))).await;
        comes(&mut client, n..=n, &id).await;
    }
    upstream.send(END).await;
    assert_eq!(client.chunk().await, None);
    eventually("it to be copied", async || copies_that(&a, "complete").await == 1).await;
    let stats = redis.command(&["INFO", "commandstats"]).await;
    let calls = |name: &str| {
        let line = stats.lines().find_map(|line| line.strip_prefix(&format!("cmdstat_{name}:calls=")));
        line.map_or(0, |line| line.split(',').next().unwrap().parse::<u128>().unwrap())
    };
    let calls = calls("eval") + calls("evalsha");
    // One in 20 ms, but for the first and the last, and one that Redis did not know.
    assert!(calls <= begun.elapsed().as_millis() / 20 + 5, "{calls} in {:?}", begun.elapsed());
    figure(&format!("500 events in {} were {calls} writes to Redis", ms(begun.elapsed())));
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_in_the_section_each_replica_is_alone() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let at = format!("url: \"{}\"", redis.url());
    let section = RESUME.replace(" }", ", redis: off }");
    let section = section.replacen(", redis: off }", " }", section.matches(", redis: off }").count() - 1);
    let [a, b] = [replica(&backend.url(), &at, "", &section).await, replica(&backend.url(), &at, "", &section).await];
    let Begun { client: _client, upstream: _upstream, id } = begin(&backend, &a, prompt("")).await;
    begins_anew(&backend, &b, prompt(&last(&id, 1)), &id).await;
    assert_eq!(resumed(&b, "unknown").await, 1);
    assert!(!redis.keys().await.iter().any(|key| key.contains(":resume:")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_over_http2_goes_on_too() {
    let (redis, backend) = (Redis::start().await, Backend::start().await);
    let [a, b] = pair(&backend, &redis, "{ resume: 20s }").await;
    let Begun { client, mut upstream, id } = begin(&backend, &a, get("/s", "x-request-id: cut\r\n")).await;
    left(&a, client, "cut", false).await;
    upstream.send(chunk(&event(2))).await;
    let client = Http2Client::to(b.address()).await;
    let request = Request::get("http://sidegate.test/s").header("last-event-id", format!("{id}.1")).body(()).unwrap();
    let mut body = client.ask(request).await.into_body();
    let mut come = String::new();
    for n in 2..=20 {
        while come.len() < (2..=n).map(|n| numbered(n, &id)).collect::<String>().len() {
            come += std::str::from_utf8(&client::data(&mut body).await.unwrap()).unwrap();
        }
        upstream.send(chunk(&event(n + 1))).await;
    }
    upstream.send(END).await;
    while let Some(data) = client::data(&mut body).await {
        come += std::str::from_utf8(&data).unwrap();
    }
    assert_eq!(come, (2..=21).map(|n| numbered(n, &id)).collect::<String>());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_carries_streams_too() {
    let (cluster, backend) = (Cluster::start().await, Backend::start().await);
    let urls: Vec<_> = cluster.0.iter().map(|node| format!("\"{}\"", node.url())).collect();
    let at = format!("url: [{}], cluster: true, timeout: 1s", urls.join(", "));
    let [a, b] = [replica(&backend.url(), &at, "", RESUME).await, replica(&backend.url(), &at, "", RESUME).await];
    listening(&cluster.0, 2).await;
    for n in 0..6 {
        let name = format!("x-request-id: cut-{n}\r\n");
        let Begun { client, mut upstream, id } = begin(&backend, &a, prompt(&name)).await;
        left(&a, client, &format!("cut-{n}"), false).await;
        let mut again = asking(&b, prompt(&last(&id, 1))).await;
        again.head().await;
        upstream.send(chunk(&event(2))).await;
        comes(&mut again, 2..=2, &id).await;
        upstream.send(chunk(&event(3)) + END).await;
        comes(&mut again, 3..=3, &id).await;
        assert_eq!(again.chunk().await, None);
    }
    for node in &cluster.0 {
        node.assert_all_expire("sidegate").await;
    }
}
