//! Limits while Redis is slow, full, failing over or gone: under load nobody is failed for it, nobody waits for longer
//! than the deadline, and what is let pass stays within this replica's share.

use std::time::Duration;

use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, sleep},
};

use super::harness::{
    Proxy, Wire,
    backend::Recorder,
    eventually, figure, ms,
    redis::{Redis, Slow, Watched},
};

/// What a request may wait for Redis.
const DEADLINE: Duration = Duration::from_millis(50);
/// Requests a second.
const LOAD: u64 = 300;

fn settings(url: &str, more: &str, rule: &str) -> String {
    format!(
        "redis: {{ url: \"{url}\", timeout: 50ms{more} }}
routes: [{{ match: {{ path: /free }}, upstream: api }}, {{ upstream: api, name: all, rate_limit: {rule} }}]
"
    )
}

async fn up(proxy: &Proxy) {
    eventually("redis to be up", async || proxy.admin_get("/health/redis").await.json()["status"] == "up").await;
}

/// One request, over a connection of its own.
#[derive(Debug, Clone, Copy)]
struct Done {
    limited: bool,
    status: u16,
    took: Duration,
}

/// Sends a steady load for so long, and beside each five requests one that no limit holds for. Returns what became of
/// each.
async fn load(proxy: &Proxy, seconds: f64) -> JoinSet<Vec<Done>> {
    let address = proxy.address();
    let mut running = JoinSet::new();
    running.spawn(async move {
        let started = Instant::now();
        let mut ticks = interval(Duration::from_micros(1_000_000 / LOAD));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let (mut requests, mut count) = (JoinSet::new(), 0);
        while started.elapsed().as_secs_f64() < seconds {
            ticks.tick().await;
            count += 1;
            for limited in if count % 5 == 0 { &[true, false][..] } else { &[true] } {
                requests.spawn(async move {
                    let mut wire = Wire::to(address).await;
                    let at = Instant::now();
                    let path = if *limited { "/" } else { "/free" };
                    wire.send(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).await;
                    let status = wire.answer().await.status();
                    Done { limited: *limited, status, took: at.elapsed() }
                });
            }
        }
        requests.join_all().await
    });
    // It has begun.
    sleep(Duration::from_millis(300)).await;
    running
}

/// How the outage went: no failures, and nearly none that took longer than Redis may take and a request takes that does
/// not ask it. Returns those that a limit held for.
async fn told(what: &str, running: JoinSet<Vec<Done>>, proxy: &Proxy) -> Vec<Done> {
    let (done, free): (Vec<Done>, Vec<Done>) =
        running.join_all().await.into_iter().flatten().partition(|done| done.limited);
    let machine = free.iter().map(|done| done.took).max().unwrap();
    let mut took: Vec<_> = done.iter().map(|done| done.took).collect();
    took.sort();
    let (median, worst) = (took[took.len() / 2], took[took.len() - 1]);
    let passed = done.iter().filter(|done| done.status == 200).count();
    let failed = done.iter().filter(|done| done.status >= 500).count();
    let missed = proxy.sample("sidegate_rate_limit_store_failures_total{route=\"all\"}").await;
    figure(&format!(
        "{what}: {} requests, {failed} failed, {passed} passed; p50 {}, slowest {} (and {} without limits); {missed} without Redis",
        done.len(),
        ms(median),
        ms(worst),
        ms(machine)
    ));
    assert_eq!(failed, 0, "{what}");
    let most = DEADLINE + Duration::from_millis(20) + machine;
    let late = took.iter().filter(|took| **took > most).count();
    assert!(late * 100 <= took.len(), "{late} of {} took longer than {}", took.len(), ms(most));
    done
}

/// Until Redis counts again.
async fn back(what: &str, proxy: &Proxy) {
    let started = Instant::now();
    up(proxy).await;
    figure(&format!("{what}: Redis counts again after {}", ms(started.elapsed())));
    assert!(started.elapsed() < Duration::from_secs(2), "{what}");
}

const WIDE: &str = "[{ name: wide, key: global, limit: 1000000/h }]";

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_killed_and_comes_back_empty() {
    let (mut redis, backend) = (Redis::start().await, Recorder::ok().await);
    let proxy = Proxy::before(&backend.url(), &settings(&redis.url(), "", WIDE)).await;
    up(&proxy).await;
    let running = load(&proxy, 2.0).await;
    redis.kill();
    sleep(Duration::from_millis(700)).await;
    redis.restart().await;
    back("killed and restarted", &proxy).await;
    assert!(told("killed", running, &proxy).await.iter().all(|done| done.status == 200));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_hangs() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let proxy = Proxy::before(&backend.url(), &settings(&redis.url(), "", WIDE)).await;
    up(&proxy).await;
    let running = load(&proxy, 2.0).await;
    redis.pause();
    sleep(Duration::from_millis(900)).await;
    redis.resume();
    back("frozen and thawed", &proxy).await;
    told("frozen", running, &proxy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_slow() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let road = Slow::before(redis.address()).await;
    let proxy = Proxy::before(&backend.url(), &settings(&road.url(), "", WIDE)).await;
    up(&proxy).await;
    let running = load(&proxy, 2.0).await;
    road.set_delay(Duration::from_millis(200));
    sleep(Duration::from_millis(900)).await;
    road.set_delay(Duration::ZERO);
    back("slowed to 200 ms", &proxy).await;
    told("slow", running, &proxy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_full_or_has_lost_its_scripts() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    // Longer than a busy machine may let a call wait.
    let file = settings(&redis.url(), "", WIDE).replace("50ms", "1s");
    let proxy = Proxy::before(&backend.url(), &file).await;
    up(&proxy).await;
    let running = load(&proxy, 2.0).await;
    redis.flush_scripts().await;
    sleep(Duration::from_millis(300)).await;
    let before = proxy.sample("sidegate_rate_limit_store_failures_total{route=\"all\"}").await;
    assert_eq!(before, 0, "a script that was forgotten is sent again");
    redis.config_set("maxmemory", "1").await;
    sleep(Duration::from_millis(500)).await;
    redis.config_set("maxmemory", "0").await;
    back("full and emptied", &proxy).await;
    told("without scripts, then full", running, &proxy).await;
    assert!(proxy.sample("sidegate_rate_limit_store_failures_total{route=\"all\"}").await > 0, "it was full");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_fails_over() {
    let (mut watched, backend) = (Watched::start().await, Recorder::ok().await);
    let file = settings(&watched.sentinel.url(), ", sentinel: { master: mymaster }", WIDE);
    let proxy = Proxy::before(&backend.url(), &file).await;
    up(&proxy).await;
    let running = load(&proxy, 5.0).await;
    let started = Instant::now();
    watched.master.kill();
    eventually("the new master", async || {
        proxy.admin_get("/health/redis").await.json()["reconnects"].as_u64() > Some(0)
    })
    .await;
    up(&proxy).await;
    figure(&format!("failed over: Redis counts again after {}", ms(started.elapsed())));
    assert!(started.elapsed() < Duration::from_secs(2), "with the time that Sentinel takes");
    told("failed over", running, &proxy).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_each_replica_has_its_share() {
    let (mut redis, backend) = (Redis::start().await, Recorder::ok().await);
    let file = settings(&redis.url(), "", "[{ name: few, key: global, limit: 100/h }]");
    let mut proxies = Vec::new();
    for _ in 0..2 {
        proxies.push(Proxy::before(&backend.url(), &file).await);
    }
    for proxy in &proxies {
        up(proxy).await;
    }
    // Both have said that they live, and have heard of the other.
    eventually("two replicas to be known", async || {
        let mut known = 0;
        for proxy in &proxies {
            known += u32::from(proxy.admin_get("/rate-limits").await.json()["replicas"] == 2);
        }
        known == 2
    })
    .await;
    redis.kill();
    eventually("redis to be missed", async || proxies[0].admin_get("/health/redis").await.json()["status"] != "up")
        .await;
    let mut all = 0;
    for proxy in &proxies {
        let done = told("without Redis", load(proxy, 1.0).await, proxy).await;
        let passed = done.iter().filter(|done| done.status == 200).count();
        assert_eq!(passed, 50, "half of 100, for one of two replicas");
        all += passed;
    }
    assert_eq!(all, 100);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_holds_without_redis_is_as_configured() {
    let backend = Recorder::ok().await;
    let nowhere = "redis://127.0.0.1:1";
    let rule =
        |failure: &str| format!("{{ on_store_failure: {failure}, rules: [{{ name: one, key: global, limit: 1/h }}] }}");
    for (failure, expected) in [("local", [200, 429]), ("allow", [200, 200]), ("deny", [503, 503])] {
        let proxy = Proxy::before(&backend.url(), &settings(nowhere, "", &rule(failure))).await;
        for status in expected {
            let answer = proxy.get("/").await;
            assert_eq!(answer.status(), status, "{failure}");
            if status == 503 {
                assert_eq!(answer.head.get("retry-after"), Some("1"));
                assert_eq!(answer.json()["type"], "urn:sidegate:problem:rate-limit-unavailable");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_waits_once_for_all_of_its_policies() {
    let (redis, backend) = (Redis::start().await, Recorder::ok().await);
    let file = format!("{}defaults: {{ session: {{}} }}\n", settings(&redis.url(), "", WIDE).replace("50ms", "1s"));
    let proxy = Proxy::before(&backend.url(), &file).await;
    up(&proxy).await;
    assert_eq!(proxy.get("/").await.status(), 200);
    redis.pause();
    let started = Instant::now();
    assert_eq!(proxy.get("/").await.status(), 200);
    figure(&format!(
        "session and limits wait {} for a Redis that hangs, with a deadline of 1 s",
        ms(started.elapsed())
    ));
    assert!(started.elapsed() < Duration::from_millis(1900));
    redis.resume();
}
