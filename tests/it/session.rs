//! Which requests belong together: sessions against the real binary and a real Redis.

use std::{fs, process::Command};

use serde_json::Value;
use tempfile::TempDir;

use crate::harness::{
    Backend, Message, Proxy,
    backend::Recorder,
    client::Http2Client,
    eventually,
    redis::{Cluster, Redis},
};

const NAME: &str = "sidegate_session";
/// What looks like ours and was never made.
const PLANTED: &str = "00112233445566778899aabbccddeeff";

fn get(fields: &str) -> String {
    format!("GET / HTTP/1.1\r\nhost: sidegate.test\r\n{fields}\r\n")
}

fn with(cookie: &str) -> String {
    get(&format!("cookie: {NAME}={cookie}\r\n"))
}

/// The id that an answer gives.
fn given(answer: &Message) -> Option<String> {
    let cookie = answer.head.get("set-cookie")?.strip_prefix(&format!("{NAME}=")).unwrap();
    Some(cookie.split(';').next().unwrap().split('.').next().unwrap().to_owned())
}

/// What the upstream was told in its last request.
fn told(backend: &Recorder) -> String {
    backend.requests().last().unwrap().head.get("x-session-id").unwrap().to_owned()
}

async fn begin(proxy: &Proxy) -> String {
    given(&proxy.ask(get("")).await).expect("a session begins")
}

/// Whether the session goes on.
async fn goes_on(proxy: &Proxy, backend: &Recorder, id: &str) -> bool {
    let answer = proxy.ask(with(&format!("{id}.{:x}", now()))).await;
    assert_eq!(answer.status(), 200);
    let same = told(backend) == id;
    assert_eq!(given(&answer).is_none(), same);
    same
}

fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs()
}

async fn sharing(backend: &Recorder, redis: &Redis) -> Proxy {
    let proxy =
        Proxy::before(&backend.url(), &format!("redis: {{ url: \"{}\" }}\ndefaults: {{ session: {{}} }}", redis.url()))
            .await;
    proxy.line("redis connected").await;
    proxy
}

async fn listed(proxy: &Proxy, query: &str) -> Vec<Value> {
    let answer = proxy.admin_get(&format!("/sessions{query}")).await;
    assert_eq!(answer.status(), 200, "{}", answer.text());
    let answer = answer.json();
    assert_eq!(answer["complete"], true);
    answer["sessions"].as_array().unwrap().clone()
}

/// A folder with a file of keys in it, and the key of each of these.
fn keys(ids: &[&str]) -> (TempDir, String, Vec<String>) {
    let folder = TempDir::new().unwrap();
    let (mut lines, mut keys) = (String::new(), Vec::new());
    for id in ids {
        let output = Command::new(env!("CARGO_BIN_EXE_sidegate")).args(["key", "new", "--id", id]).output().unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        let mut printed = text.lines().filter(|line| !line.starts_with('#'));
        keys.push(printed.next().unwrap().to_owned());
        lines.push_str(printed.next().unwrap());
        lines.push('\n');
    }
    let file = folder.path().join("keys");
    fs::write(&file, lines).unwrap();
    let path = file.to_str().unwrap().to_owned();
    (folder, path, keys)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_the_same_at_every_replica() {
    let (backend, redis) = (Recorder::ok().await, Redis::start().await);
    let (one, other) = (sharing(&backend, &redis).await, sharing(&backend, &redis).await);
    let id = begin(&one).await;
    assert_eq!(told(&backend), id, "the upstream knows it from the first request on");
    for proxy in [&other, &one, &other] {
        assert!(goes_on(proxy, &backend, &id).await);
    }
    assert!(!goes_on(&other, &backend, PLANTED).await, "session fixation");
    redis.assert_all_expire("sidegate").await;
    let keys = redis.keys().await;
    let own: Vec<_> = keys.iter().filter(|key| key.starts_with("sidegate:1:session:{")).collect();
    assert_eq!(own.len(), 2, "{keys:?}");
    for key in own {
        let ttl = redis.command(&["TTL", key]).await;
        let ttl: u64 = ttl.trim().trim_start_matches(':').parse().unwrap();
        assert!((86_400..=86_460).contains(&ttl), "{ttl}");
    }
    let calls = async || one.sample(r#"sidegate_redis_calls_total{outcome="ok"}"#).await;
    let before = calls().await;
    for _ in 0..20 {
        assert!(goes_on(&one, &backend, &id).await);
    }
    // More than two only where the machine takes seconds for it.
    assert!((1..10).contains(&before) && calls().await - before < 10, "a burst costs one call");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_used_lives_on() {
    let (backend, redis) = (Recorder::ok().await, Redis::start().await);
    let proxy = sharing(&backend, &redis).await;
    let id = begin(&proxy).await;
    let keys = redis.keys().await;
    let key = keys.iter().find(|key| key.contains(":session:")).unwrap();
    // An hour ago, as far as Redis knows.
    redis.command(&["HSET", key, "last_seen", &(now() - 3600).to_string()]).await;
    redis.command(&["EXPIRE", key, "1000"]).await;
    eventually("it to be seen again", async || {
        assert!(goes_on(&proxy, &backend, &id).await);
        let ttl = redis.command(&["TTL", key]).await;
        ttl.trim().trim_start_matches(':').parse::<u64>().unwrap() > 80_000
    })
    .await;
    let seen = redis.command(&["HGET", key, "last_seen"]).await;
    let seen: u64 = seen.lines().nth(1).unwrap().parse().unwrap();
    assert!(now() - seen < 60, "{seen}");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_redis_no_request_fails_and_ids_are_taken_as_they_are() {
    let (backend, mut redis) = (Recorder::ok().await, Redis::start().await);
    let proxy = sharing(&backend, &redis).await;
    let id = begin(&proxy).await;
    redis.kill();
    proxy.line("redis lost, going on without it").await;
    assert!(goes_on(&proxy, &backend, &id).await);
    assert!(goes_on(&proxy, &backend, PLANTED).await, "nobody can say");
    let made = begin(&proxy).await;
    assert!(goes_on(&proxy, &backend, &made).await);
    assert!(!goes_on(&proxy, &backend, "not-one-of-ours").await);
    let answer = proxy.admin_get("/sessions").await;
    assert_eq!(answer.status(), 503, "{}", answer.text());
    assert!(proxy.sample(r#"sidegate_sessions_total{route="/*",outcome="unkept"}"#).await >= 4);

    redis.restart().await;
    eventually("redis to be found again", async || proxy.admin_get("/health/redis").await.json()["status"] == "up")
        .await;
    // The last that was found out of Redis is remembered for two seconds.
    eventually("the old session to be unknown", async || !goes_on(&proxy, &backend, &id).await).await;
    assert!(!goes_on(&proxy, &backend, &made).await, "nothing was kept");
    let next = begin(&proxy).await;
    assert!(goes_on(&proxy, &backend, &next).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_is_bound_to_its_principal_and_revoked_everywhere() {
    let (_folder, file, keys) = keys(&["alice", "bob"]);
    let (backend, redis) = (Recorder::ok().await, Redis::start().await);
    let yaml = format!(
        "redis: {{ url: \"{}\" }}
defaults: {{ session: {{}}, auth: {{ api_keys: {{ file: {file} }}, anonymous: true }} }}",
        redis.url()
    );
    let (one, other) = (Proxy::before(&backend.url(), &yaml).await, Proxy::before(&backend.url(), &yaml).await);
    for proxy in [&one, &other] {
        proxy.line("redis connected").await;
    }
    let ask = async |proxy: &Proxy, key: Option<usize>, id: Option<&str>| {
        let cookie = id.map(|id| format!("cookie: {NAME}={id}.{:x}\r\n", now())).unwrap_or_default();
        let key = key.map(|key| format!("x-api-key: {}\r\n", keys[key])).unwrap_or_default();
        let answer = proxy.ask(get(&(cookie + &key))).await;
        given(&answer).unwrap_or_else(|| told(&backend))
    };
    let refused = one.ask(get("x-api-key: wrong\r\n")).await;
    assert_eq!((refused.status(), given(&refused)), (401, None), "who is refused begins none");
    let nobodys = ask(&one, None, None).await;
    let alices = ask(&one, Some(0), Some(&nobodys)).await;
    assert_ne!(alices, nobodys, "a login begins another");
    assert_eq!(ask(&other, Some(0), Some(&alices)).await, alices);
    for proxy in [&one, &other] {
        let bobs = ask(proxy, Some(1), Some(&alices)).await;
        assert!(bobs != alices && ask(proxy, Some(1), Some(&bobs)).await == bobs);
        assert_ne!(ask(proxy, None, Some(&alices)).await, alices);
    }

    let all = listed(&one, "").await;
    assert_eq!(all.len(), 6, "{all:?}");
    let of_alice = listed(&other, "?principal=alice").await;
    assert_eq!((of_alice.len(), &of_alice[0]["principal"]), (1, &"alice".into()));
    assert_eq!(listed(&other, "?principal=bob&limit=5").await.len(), 2);
    let some = one.admin_get("/sessions?limit=2").await.json();
    assert_eq!((some["sessions"].as_array().unwrap().len(), &some["complete"]), (2, &false.into()));

    let id = of_alice[0]["id"].as_str().unwrap();
    let gone = one.admin_delete(&format!("/sessions/{id}")).await;
    assert_eq!((gone.status(), &gone.json()["revoked"]), (200, &1.into()));
    assert_ne!(ask(&one, Some(0), Some(&alices)).await, alices, "here at once");
    eventually("the other replica to know", async || ask(&other, Some(0), Some(&alices)).await != alices).await;
    assert_eq!(one.admin_delete(&format!("/sessions/{id}")).await.status(), 404);

    let gone = one.admin_delete("/sessions?principal=bob").await;
    assert_eq!((gone.status(), &gone.json()["revoked"]), (200, &2.into()));
    assert!(listed(&one, "?principal=bob").await.is_empty());
    for wrong in ["/sessions", "/sessions?principle=bob", "/sessions/*", "/sessions/abc"] {
        assert_eq!(one.admin_delete(wrong).await.status(), 400, "{wrong}");
    }
    let other_method = one.admin_post("/sessions").await;
    assert_eq!((other_method.status(), other_method.head.get("allow")), (405, Some("GET, HEAD, DELETE")));
    assert!(!listed(&one, "").await.is_empty(), "nobody else's are gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cookie_is_told_on_every_kind_of_answer() {
    let nowhere = Backend::nowhere().await;
    let yaml = "
hygiene: { trusted_proxies: [127.0.0.1] }
defaults: { session: { ttl: 1h, cookie: { path: /, same_site: strict } } }
routes:
  - { match: { path: /api }, upstream: api, errors: openai, cors: { origins: [https://a.example] } }
  - { match: { path: /other }, upstream: api, session: { cookie: { name: __Host-s, secure: true }, header: x-sid } }
  - { match: { path: /off }, upstream: api, session: off }
  - { upstream: api }";
    let proxy = Proxy::before(&nowhere, yaml).await;
    let cookie = async |path: &str, fields: &str| {
        let answer = proxy.ask(format!("GET {path} HTTP/1.1\r\nhost: h\r\n{fields}\r\n")).await;
        assert_eq!((answer.status(), answer.head.get("cache-control")), (502, Some("no-store")));
        (answer.head.get("set-cookie").map(str::to_owned), answer)
    };
    let (plain, _) = cookie("/", "").await;
    let plain = plain.unwrap();
    let (value, attributes) = plain.split_once("; ").unwrap();
    assert_eq!(attributes, "Max-Age=3600; Path=/; HttpOnly; SameSite=Strict");
    let (id, _) = value.strip_prefix("sidegate_session=").unwrap().split_once('.').unwrap();
    assert!(id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit()), "128 bits: {id}");
    let (secure, answer) = cookie("/api", "x-forwarded-proto: https\r\norigin: https://a.example\r\n").await;
    assert!(secure.unwrap().ends_with("; Secure; HttpOnly; SameSite=Strict"));
    assert_eq!(answer.head.get("access-control-allow-origin"), Some("https://a.example"));
    assert_eq!(answer.json()["error"]["code"], "connect-failed");
    let (host, answer) = cookie("/other", "").await;
    let host = host.unwrap();
    assert!(host.starts_with("__Host-s=") && host.ends_with("; Max-Age=86400; Path=/; Secure; HttpOnly; SameSite=Lax"));
    assert!(host.contains(answer.head.get("x-sid").unwrap()));
    assert_eq!(cookie("/off", "").await.0, None);
    let (none, _) = cookie("/", &format!("cookie: a=b; {value}\r\n")).await;
    assert_eq!(none, None, "who has one is not told again");
    let preflight =
        "OPTIONS /api HTTP/1.1\r\nhost: h\r\norigin: https://a.example\r\naccess-control-request-method: GET\r\n\r\n";
    assert_eq!(given(&proxy.ask(preflight).await), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn other_cookies_pass_byte_for_byte_and_sessions_outlive_a_reload() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { session: {} }").await;
    let id = begin(&proxy).await;
    for (sent, passed) in [
        (vec![format!("a=\"x, y\";  {NAME}={id} ; b==; c")], vec!["a=\"x, y\"; b==; c"]),
        (vec![format!("{NAME}={id}"), "a=1".to_owned()], vec!["a=1"]),
        (vec![format!("{NAME}={id}")], vec![]),
        (vec!["a=1;b=2;".to_owned(), "c".to_owned()], vec!["a=1;b=2;", "c"]),
    ] {
        let cookies = sent.join("\r\ncookie: ");
        proxy.ask(get(&format!("cookie: {cookies}\r\nx_session_id: spoofed\r\nx-session-id: spoofed\r\n"))).await;
        let asked = backend.requests().pop().unwrap().head;
        assert_eq!(asked.all("cookie"), passed);
        assert_eq!((asked.all("x_session_id").len(), asked.all("x-session-id").len()), (0, 1));
    }
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert!(goes_on(&proxy, &backend, &id).await);
    assert_eq!(listed(&proxy, "").await.len(), 2);
    let effective = proxy.admin_get("/config").await.json()["effective"]["routes"][0]["session"].clone();
    assert_eq!((&effective["cookie"]["name"], &effective["ttl"]), (&NAME.into(), &"1d".into()), "{effective}");
}

#[tokio::test(flavor = "multi_thread")]
async fn upgrades_and_http2_have_sessions() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "defaults: { session: {} }").await;
    let upgrade = "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n\
                   sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
    let switched = "HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
                    sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
    let mut ids = Vec::new();
    for turn in 0..2 {
        let cookie = ids.first().map(|id| format!("cookie: {NAME}={id}.{:x}\r\n", now())).unwrap_or_default();
        let mut client = proxy.connect().await;
        client.send(get(&(upgrade.to_owned() + &cookie))).await;
        let (mut upstream, asked) = backend.accept_head().await;
        assert_eq!(asked.get("cookie"), None);
        ids.push(asked.get("x-session-id").unwrap().to_owned());
        upstream.send(switched).await;
        let head = client.head().await;
        assert_eq!((head.status(), head.get("set-cookie").is_some()), (101, turn == 0));
        client.send("frames").await;
        assert_eq!(upstream.exactly(6).await, b"frames");
    }
    assert_eq!(ids[0], ids[1]);
    let http2 = Http2Client::to(proxy.address()).await;
    let (asked, _answer) = tokio::join!(
        async {
            let (mut upstream, head) = backend.accept_head().await;
            upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
            head
        },
        // Two fields, as browsers send cookies over HTTP/2.
        http2.ask(
            http::Request::get("http://sidegate.test/")
                .header("cookie", "a=1")
                .header("cookie", format!("{NAME}={}", ids[0]))
                .body(())
                .unwrap()
        )
    );
    assert_eq!((asked.get("x-session-id"), asked.get("cookie")), (Some(&*ids[0]), Some("a=1")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cluster_is_listed_and_revoked_on_all_its_primaries() {
    let (backend, cluster) = (Recorder::ok().await, Cluster::start().await);
    let urls: Vec<_> = cluster.0.iter().map(|node| format!("\"{}\"", node.url())).collect();
    let yaml =
        format!("redis: {{ url: [{}], cluster: true, timeout: 1s }}\ndefaults: {{ session: {{}} }}", urls.join(", "));
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    proxy.line("redis connected").await;
    let mut ids = Vec::new();
    for _ in 0..20 {
        ids.push(begin(&proxy).await);
    }
    for node in &cluster.0 {
        node.assert_all_expire("sidegate").await;
        assert!(node.keys().await.iter().any(|key| key.contains(":session:")), "every node has its share");
    }
    let all = listed(&proxy, "").await;
    assert_eq!(all.len(), 20);
    for session in &all {
        let id = session["id"].as_str().unwrap();
        assert_eq!(proxy.admin_delete(&format!("/sessions/{id}")).await.json()["revoked"], 1);
    }
    assert!(listed(&proxy, "").await.is_empty());
    assert!(!goes_on(&proxy, &backend, &ids[0]).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_seen_by_nobody_but_client_and_upstream() {
    let (backend, redis) = (Recorder::ok().await, Redis::start().await);
    let (_folder, file, keys) = keys(&["alice"]);
    let yaml = format!(
        "
log: {{ format: json, level: trace }}
redis: {{ url: \"{}\" }}
defaults: {{ session: {{ header: x-session-id }}, auth: {{ api_keys: {{ file: {file} }} }} }}
routes: [{{ match: {{ path: /off }}, upstream: api, session: off }}, {{ upstream: api }}]",
        redis.url()
    );
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    proxy.line("redis connected").await;
    let key = format!("x-api-key: {}\r\n", keys[0]);
    let first = proxy.ask(get(&format!("{key}x-request-id: s-0\r\n"))).await;
    let id = given(&first).unwrap();
    for (n, (path, fields)) in [
        ("/", format!("{key}cookie: {NAME}={id}\r\n")),
        ("/", format!("{key}x-session-id: {id}\r\n")),
        ("/", format!("x-session-id: {id}\r\n")),
        ("/off", format!("{key}x-session-id: {id}\r\ncookie: {NAME}={id}\r\n")),
        ("/", format!("{key}x-session-id: {PLANTED}\r\n")),
    ]
    .into_iter()
    .enumerate()
    {
        proxy.ask(format!("GET {path} HTTP/1.1\r\nhost: h\r\nx-request-id: s-{}\r\n{fields}\r\n", n + 1)).await;
    }
    assert_eq!(told(&backend).len(), 32);
    let all = listed(&proxy, "").await;
    let own = proxy.access_line("s-0").await["session_id"].as_str().unwrap().to_owned();
    assert!(own.len() == 16 && all.iter().any(|session| session["id"] == *own), "{all:?}");
    assert_eq!(proxy.access_line("s-2").await["session_id"], *own, "what operators find it by");
    assert!(proxy.access_line("s-3").await["session_id"].is_null(), "refused before it was looked at");
    assert!(proxy.access_line("s-4").await["session_id"].is_null());
    let mut seen = String::new();
    for page in ["/metrics", "/config", "/health", "/sessions", "/sessions?principal=alice", "/"] {
        seen.push_str(&proxy.admin_get(page).await.text());
    }
    for key in redis.keys().await {
        seen.push_str(&key);
        if key.contains(":session:") {
            seen.push_str(&redis.command(&["HGETALL", &key]).await);
        }
    }
    let (_, logged) = proxy.stop().await;
    assert!(seen.contains(&own) && seen.contains("alice"), "{seen}");
    for id in [&*id, PLANTED] {
        assert!(!seen.contains(id), "an id in {seen}");
        assert!(!logged.contains(id), "an id in the log: {logged}");
    }
}
