//! Redis, as it comes, goes, hangs and changes, between the store and a real `redis-server`.

use std::time::Duration;

use serde_json::{Value, json};
use sidegate::{
    store::{Config, Failure, Heard, Redis, Script, Subscription},
    telemetry::Metrics,
};
use tokio::{sync::mpsc, time::Instant};

use super::harness::{
    self, Proxy, eventually, figure, ms,
    redis::{Cluster, Slow, Watched},
};

static COUNT: Script =
    Script::new("count", "local n = redis.call('INCR', KEYS[1]) redis.call('PEXPIRE', KEYS[1], ARGV[1]) return n");

static PAIR: Script = Script::new("pair", "return {redis.call('GET', KEYS[1]), redis.call('GET', KEYS[2])}");

fn store(section: Value) -> Redis {
    let config: Config = serde_json::from_value(section).unwrap();
    Redis::start(&config, &Metrics::new()).unwrap()
}

async fn up(redis: &Redis) {
    eventually("redis to be up", async || redis.is_up()).await;
}

async fn count(redis: &Redis, name: &str) -> Result<u64, Failure> {
    redis.run(&COUNT, &[redis.key("test", "tag", name)], 60_000).await
}

/// Asserts that a Redis that is out of order costs no time.
async fn costs_nothing(redis: &Redis) {
    let started = Instant::now();
    for _ in 0..1000 {
        assert_eq!(count(redis, "a").await, Err(Failure::Unavailable));
    }
    assert!(started.elapsed() < Duration::from_millis(50), "1000 calls took {:?}", started.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn values_and_scripts_are_kept_under_names_that_expire() {
    let server = harness::redis::Redis::start().await;
    let redis = store(json!({ "url": server.url(), "prefix": "a/b" }));
    assert_eq!(count(&redis, "early").await, Err(Failure::Unavailable), "nothing waits for a connection");
    up(&redis).await;

    let key = redis.key("test", "{tag}", "x");
    assert_eq!(redis.get(&key).await, Ok(None));
    redis.set(&key, b"\x00\xff", Duration::from_secs(9)).await.unwrap();
    assert_eq!(redis.get(&key).await, Ok(Some(vec![0, 255])));
    assert_eq!(redis.expire(&key, Duration::from_secs(60)).await, Ok(true));
    assert_eq!((count(&redis, "a").await, count(&redis, "a").await), (Ok(1), Ok(2)));
    server.flush_scripts().await;
    assert_eq!(count(&redis, "a").await, Ok(3), "a script that was forgotten runs once");
    server.assert_all_expire("a/b").await;
    assert_eq!(redis.delete(&key).await, Ok(true));
    assert_eq!(redis.delete(&key).await, Ok(false));

    let calls: Vec<_> = (0..500)
        .map(|_| {
            let redis = redis.clone();
            tokio::spawn(async move { count(&redis, "many").await })
        })
        .collect();
    for call in calls {
        call.await.unwrap().unwrap();
    }
    assert_eq!(count(&redis, "many").await, Ok(501));
    assert_eq!(redis.figures().in_flight, 0);
    assert_eq!(redis.figures().reconnects, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_redis_refuses_leaves_it_up() {
    let server = harness::redis::Redis::start().await;
    let redis = store(json!({ "url": server.url() }));
    up(&redis).await;
    let key = redis.key("test", "tag", "text");
    redis.set(&key, b"no number", Duration::from_secs(60)).await.unwrap();
    for _ in 0..10 {
        assert_eq!(redis.run::<u64>(&COUNT, std::slice::from_ref(&key), 1000).await, Err(Failure::Refused));
    }
    assert!(redis.is_up());
    server.config_set("maxmemory", "1").await;
    for _ in 0..10 {
        assert_eq!(redis.set(&key, b"1", Duration::from_secs(60)).await, Err(Failure::Full));
        assert_eq!(count(&redis, "full").await, Err(Failure::Full));
    }
    assert!(redis.is_up(), "what is full still answers");
    assert_eq!(redis.figures().reason.unwrap().0, Failure::Full);
    server.config_set("maxmemory", "0").await;
    assert_eq!(count(&redis, "full").await, Ok(1));
    assert!(redis.figures().reason.is_none());

    server.command(&["ACL", "SETUSER", "narrow", "on", ">hush", "~sidegate:*", "+@all", "-get"]).await;
    let narrow = store(json!({ "url": server.url(), "user": "narrow", "password": "hush" }));
    up(&narrow).await;
    assert_eq!(narrow.get(&key).await, Err(Failure::Forbidden));
    assert_eq!(count(&narrow, "allowed").await, Ok(1));
    assert!(!format!("{narrow:?}{:?}", narrow.figures()).contains("hush"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_is_killed_is_noticed_and_found_again() {
    let mut server = harness::redis::Redis::start().await;
    let redis = store(json!({ "url": server.url() }));
    up(&redis).await;
    count(&redis, "a").await.unwrap();
    server.kill();
    // Nobody asks: the connection itself says so.
    eventually("the loss to be noticed", async || !redis.is_up()).await;
    costs_nothing(&redis).await;
    assert_eq!(redis.figures().reason.unwrap().0, Failure::Lost);
    server.restart().await;
    let started = Instant::now();
    up(&redis).await;
    let took = started.elapsed();
    figure(&format!("redis restarted: calls pass again after {}", ms(took)));
    assert!(took < Duration::from_secs(2), "{took:?}");
    assert_eq!(count(&redis, "a").await, Ok(1), "restarted empty, scripts forgotten");
    assert!(redis.figures().reconnects >= 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_redis_that_hangs_costs_those_in_flight_their_deadline_and_later_ones_nothing() {
    let server = harness::redis::Redis::start().await;
    let redis = store(json!({ "url": server.url() }));
    up(&redis).await;
    count(&redis, "a").await.unwrap();
    server.pause();
    let mut slowest = Duration::ZERO;
    let mut waited = 0;
    while redis.is_up() {
        let started = Instant::now();
        let outcome = count(&redis, "a").await;
        slowest = slowest.max(started.elapsed());
        if outcome == Err(Failure::Timeout) {
            waited += 1;
        }
    }
    figure(&format!("redis hangs: {waited} calls in a row waited, the slowest for {}", ms(slowest)));
    assert_eq!(waited, 3);
    assert!(slowest < Duration::from_millis(50 + 200), "{slowest:?}");
    costs_nothing(&redis).await;
    server.resume();
    let started = Instant::now();
    up(&redis).await;
    figure(&format!("redis goes on: calls pass again after {}", ms(started.elapsed())));
    assert!(started.elapsed() < Duration::from_secs(3), "{:?}", started.elapsed());
    count(&redis, "a").await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_redis_is_left_alone_until_it_is_quick() {
    let server = harness::redis::Redis::start().await;
    let road = Slow::before(server.address()).await;
    let redis = store(json!({ "url": road.url() }));
    up(&redis).await;
    count(&redis, "a").await.unwrap();
    road.set_delay(Duration::from_millis(200));
    while redis.is_up() {
        assert_eq!(count(&redis, "a").await, Err(Failure::Timeout));
    }
    // Its probes are too slow as well: it stays out.
    let until = Instant::now() + Duration::from_secs(1);
    while Instant::now() < until {
        assert_eq!(count(&redis, "a").await, Err(Failure::Unavailable));
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    road.set_delay(Duration::ZERO);
    up(&redis).await;
    count(&redis, "a").await.unwrap();
}

/// What somebody hears, as it comes.
fn heard(redis: &Redis, channel: &str) -> (Subscription, mpsc::UnboundedReceiver<String>) {
    let (tell, told) = mpsc::unbounded_channel();
    let subscription = redis.subscribe(&redis.key("test", "tag", channel), move |heard| {
        let heard = match heard {
            Heard::Everything => "everything".to_owned(),
            Heard::Nothing => "nothing".to_owned(),
            Heard::Message(message) => String::from_utf8_lossy(message).into_owned(),
        };
        tell.send(heard).ok();
    });
    (subscription, told)
}

#[tokio::test(flavor = "multi_thread")]
async fn who_listens_hears_everything_and_is_told_of_each_gap() {
    let mut server = harness::redis::Redis::start().await;
    let redis = store(json!({ "url": server.url(), "connect_timeout": "200ms" }));
    up(&redis).await;
    let (subscription, mut told) = heard(&redis, "a");
    let mut next = async || harness::within("something to be heard", told.recv()).await;
    assert_eq!(next().await.as_deref(), Some("everything"));
    let channel = redis.key("test", "tag", "a");
    for n in 0..100 {
        redis.publish(&channel, n.to_string().as_bytes()).await.unwrap();
    }
    for n in 0..100 {
        assert_eq!(next().await, Some(n.to_string()));
    }
    server.command(&["CLIENT", "KILL", "TYPE", "pubsub"]).await;
    let started = Instant::now();
    assert_eq!(next().await.as_deref(), Some("nothing"));
    assert_eq!(next().await.as_deref(), Some("everything"));
    figure(&format!("who listens does so again {} after the connection broke", ms(started.elapsed())));

    server.pause();
    let started = Instant::now();
    assert_eq!(next().await.as_deref(), Some("nothing"));
    figure(&format!("that a Redis hangs is known after {}", ms(started.elapsed())));
    assert!(started.elapsed() < Duration::from_secs(3));
    server.resume();
    assert_eq!(next().await.as_deref(), Some("everything"));

    server.kill();
    assert_eq!(next().await.as_deref(), Some("nothing"));
    server.restart().await;
    assert_eq!(next().await.as_deref(), Some("everything"));
    up(&redis).await;
    redis.publish(&channel, b"last").await.unwrap();
    assert_eq!(next().await.as_deref(), Some("last"));

    drop(subscription);
    assert_eq!(next().await, None, "nobody listens any more");
    eventually("the connection to be closed", async || {
        server.command(&["CLIENT", "LIST", "TYPE", "pubsub"]).await.starts_with("$0")
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_listens_at_one_node_of_a_cluster_hears_what_all_are_told() {
    let cluster = Cluster::start().await;
    let urls: Vec<_> = cluster.0.iter().map(harness::redis::Redis::url).collect();
    let redis = store(json!({ "url": urls, "cluster": true, "timeout": "1s" }));
    up(&redis).await;
    let (_subscription, mut told) = heard(&redis, "a");
    let mut next = async || harness::within("something to be heard", told.recv()).await;
    assert_eq!(next().await.as_deref(), Some("everything"));
    for (n, node) in cluster.0.iter().enumerate() {
        node.command(&["PUBLISH", redis.key("test", "tag", "a").as_str(), &n.to_string()]).await;
        assert_eq!(next().await, Some(n.to_string()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_runs_scripts_where_their_keys_are() {
    let cluster = Cluster::start().await;
    let urls: Vec<_> = cluster.0.iter().map(harness::redis::Redis::url).collect();
    let redis = store(json!({ "url": urls, "cluster": true, "timeout": "1s" }));
    up(&redis).await;
    let tags: Vec<String> = (0..30).map(|n| format!("tag{n}")).collect();
    for tag in &tags {
        let (one, other) = (redis.key("test", tag, "one"), redis.key("test", tag, "other"));
        redis.set(&one, tag.as_bytes(), Duration::from_secs(60)).await.unwrap();
        redis.set(&other, b"b", Duration::from_secs(60)).await.unwrap();
        let pair: (String, String) = redis.run(&PAIR, &[one, other], NONE).await.unwrap();
        assert_eq!(pair, (tag.clone(), "b".to_owned()));
    }
    for node in &cluster.0 {
        assert!(!node.keys().await.is_empty(), "every node has its share");
        node.assert_all_expire("sidegate").await;
        node.flush_scripts().await;
    }
    for tag in &tags {
        let counted = redis.run(&COUNT, &[redis.key("test", tag, "n")], 60_000).await;
        assert_eq!(counted, Ok(1), "each node learns the script anew, and runs it once");
    }
    let apart = [redis.key("test", "tag0", ""), redis.key("test", "tag1", ""), redis.key("test", "tag2", "")];
    assert_eq!(redis.run::<Value2>(&PAIR, &apart, NONE).await.unwrap_err(), Failure::Refused, "CROSSSLOT");
    assert!(redis.is_up());

    let single = store(json!({ "url": urls[0] }));
    eventually("one node of a cluster to be told from a single Redis, or to serve its share", async || {
        let figures = single.figures();
        single.is_up() || figures.reason.is_some_and(|(failure, _)| failure == Failure::Clustered)
    })
    .await;
}

type Value2 = Vec<Option<String>>;

const NONE: &[&str] = &[];

#[tokio::test(flavor = "multi_thread")]
async fn a_failover_leads_to_the_new_master() {
    let mut watched = Watched::start().await;
    let redis = store(json!({ "url": watched.sentinel.url(), "sentinel": { "master": "mymaster" } }));
    up(&redis).await;
    count(&redis, "a").await.unwrap();
    assert_eq!(redis.figures().mode, "sentinel");
    watched.master.kill();
    eventually("the loss to be noticed", async || !redis.is_up()).await;
    costs_nothing(&redis).await;
    eventually("the Sentinel to promote the replica", async || {
        watched.replica.command(&["ROLE"]).await.contains("master")
    })
    .await;
    let started = Instant::now();
    eventually("the new master to be found", async || count(&redis, "b").await.is_ok()).await;
    let took = started.elapsed();
    figure(&format!("failover: calls pass again {} after the promotion", ms(took)));
    assert!(watched.replica.keys().await.iter().any(|key| key.ends_with(":b")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_is_no_redis_to_write_to() {
    let watched = Watched::start().await;
    let redis = store(json!({ "url": watched.replica.url() }));
    eventually("the replica to be found out", async || {
        redis.figures().reason.is_some_and(|(failure, _)| failure == Failure::ReadOnly)
    })
    .await;
    costs_nothing(&redis).await;
    watched.replica.command(&["REPLICAOF", "NO", "ONE"]).await;
    up(&redis).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unix_socket_and_another_database_do_as_well() {
    let server = harness::redis::Redis::with(&["--unixsocket", "DIR/socket"]).await;
    let redis = store(json!({ "url": format!("unix:{}", server.path("socket").display()), "database": 3 }));
    up(&redis).await;
    count(&redis, "a").await.unwrap();
    assert!(server.command(&["INFO", "keyspace"]).await.contains("db3:keys"));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_believed_by_its_authority_only() {
    let dir = tempfile::tempdir().unwrap();
    let own = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let (cert, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    std::fs::write(&cert, own.cert.pem()).unwrap();
    std::fs::write(&key, own.signing_key.serialize_pem()).unwrap();
    let (cert, key) = (cert.to_str().unwrap(), key.to_str().unwrap());
    let options = ["--tls-port-here", "--tls-cert-file", cert, "--tls-key-file", key, "--tls-auth-clients", "no"];
    let server = harness::redis::Redis::with(&options).await;
    let url = format!("rediss://localhost:{}", server.port());
    let redis = store(json!({ "url": url, "ca": cert, "timeout": "1s" }));
    up(&redis).await;
    assert_eq!(count(&redis, "a").await, Ok(1));
    let stranger = store(json!({ "url": url }));
    eventually("the certificate to be refused", async || stranger.figures().reason.is_some()).await;
    assert!(!stranger.is_up());
}

// Through the binary.

fn file(section: &str) -> String {
    format!(
        "upstreams: {{ api: {{ respond: {{ text: here }} }} }}\nlog: {{ level: debug, format: json }}\nredis: {section}\n"
    )
}

async fn health(proxy: &Proxy) -> Value {
    proxy.admin_get("/health/redis").await.json()
}

async fn status(proxy: &Proxy, wanted: &str) {
    eventually(&format!("redis to be {wanted}"), async || health(proxy).await["status"] == wanted).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sidegate_starts_without_redis_and_finds_it_later() {
    let mut server = harness::redis::Redis::start().await;
    server.kill();
    let proxy = Proxy::start(&file(&format!("{{ url: \"{}\" }}", server.url()))).await;
    assert_eq!(proxy.get("/").await.text(), "here");
    eventually("the reason to be told", async || health(&proxy).await["reason"] == "lost").await;
    assert_eq!(health(&proxy).await["status"], "connecting");
    assert_eq!(proxy.admin_get("/readyz").await.status(), 200, "Redis is no reason not to serve");
    let all = proxy.admin_get("/health").await.json();
    assert_eq!((&all["status"], &all["components"]["redis"]["status"]), (&json!("degraded"), &json!("connecting")));
    assert_eq!(proxy.line("redis is out of order").await["level"], "warn");

    server.restart().await;
    status(&proxy, "up").await;
    let shown = health(&proxy).await;
    assert!(shown["latency_ms"].as_f64().unwrap() > 0.0, "{shown}");
    assert_eq!((&shown["mode"], &shown["reconnects"], &shown["in_flight"]), (&json!("single"), &json!(0), &json!(0)));
    assert_eq!(proxy.admin_get("/health").await.json()["status"], "ready");
    assert_eq!(proxy.sample("sidegate_redis_connects_total").await, 1);
    assert_eq!(proxy.sample("sidegate_redis_state").await, 0);

    server.kill();
    status(&proxy, "down").await;
    assert_eq!(proxy.get("/").await.text(), "here");
    server.restart().await;
    status(&proxy, "up").await;
    assert_eq!(health(&proxy).await["reconnects"], 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_is_changed_by_a_reload_and_shown_nowhere() {
    let server = harness::redis::Redis::with(&["--requirepass", "right-hush"]).await;
    let url = server.url().replace("redis://", "redis://:wrong-hush@");
    let proxy = Proxy::start(&file(&format!("{{ url: \"{url}\" }}"))).await;
    eventually("the password to be refused", async || health(&proxy).await["reason"] == "unauthorized").await;
    let config = proxy.admin_get("/config").await.text();

    std::fs::write(proxy.path("password"), "wrong-hush").unwrap();
    let with_file = file(&format!("{{ url: \"{}\", password: {{ file: password }} }}", server.url()));
    proxy.rewrite(&with_file);
    proxy.signal(rustix::process::Signal::HUP);
    eventually("the reload", async || proxy.sample("sidegate_reloads_total").await >= 1).await;
    std::fs::write(proxy.path("password"), "right-hush").unwrap();
    proxy.signal(rustix::process::Signal::HUP);
    status(&proxy, "up").await;
    // The same again keeps the connection.
    let before = proxy.sample("sidegate_reloads_total").await;
    proxy.signal(rustix::process::Signal::HUP);
    eventually("the reload", async || proxy.sample("sidegate_reloads_total").await > before).await;
    assert_eq!(proxy.sample("sidegate_redis_connects_total").await, 1);

    let seen =
        config + &proxy.admin_get("/config").await.text() + &proxy.admin_get("/health").await.text() + &proxy.logged();
    assert!(!seen.contains("hush"), "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn switched_off_is_not_the_same_as_left_out() {
    let server = harness::redis::Redis::start().await;
    let proxy = Proxy::start(&file(&format!("{{ url: \"{}\", enabled: false }}", server.url()))).await;
    assert_eq!(health(&proxy).await, json!({ "status": "off", "configured": true }));
    assert_eq!(proxy.admin_get("/health").await.json()["status"], "ready");
    assert!(!proxy.admin_get("/metrics").await.text().contains("sidegate_redis_state 0"));
    proxy.rewrite(&file("").replace("redis: ", ""));
    proxy.signal(rustix::process::Signal::HUP);
    status(&proxy, "none").await;
    assert_eq!(health(&proxy).await, json!({ "status": "none", "configured": false }));
    assert_eq!(server.command(&["DBSIZE"]).await.lines().next(), Some(":0"), "nobody was here");
}
