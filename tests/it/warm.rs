//! Answers of a cache that are there before anybody asks.

use crate::harness::{Backend, Message, Proxy, backend::Recorder, eventually};

/// A route with this cache, before the backend.
fn file(cache: &str) -> String {
    format!("routes: [{{name: tools, upstream: api, match: {{path: '/api/*'}}, cache: {{{cache}}}}}]\n")
}

async fn ask(proxy: &Proxy, path: &str, fields: &str) -> Message {
    proxy.ask(format!("GET {path} HTTP/1.1\r\n{fields}\r\n")).await
}

fn is_hit(answer: &Message) -> bool {
    answer.head.get("cache-status").is_some_and(|status| status.starts_with("sidegate; hit"))
}

fn asked(backend: &Recorder, path: &str) -> usize {
    backend.requests().iter().filter(|request| request.head.target() == path).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_warm_is_there_when_the_first_one_asks_and_never_stale() {
    let backend = Recorder::ok().await;
    let cache = "ttl: 3s, refresh: 2s, ignore_host: true, warm: ['/api/tools?all', '/api/{x}']";
    let cache = cache.replace("{x}", "bots");
    let proxy = Proxy::before(&backend.url(), &file(&cache)).await;
    eventually("both to be asked for", async || asked(&backend, "/api/tools?all") * asked(&backend, "/api/bots") > 0)
        .await;
    let is_warm = async |host: &str| is_hit(&ask(&proxy, "/api/tools?all", &format!("host: {host}\r\n")).await);
    eventually("the answer to be kept", async || is_warm("a.test").await).await;

    let requests = backend.requests();
    let request = requests.iter().find(|request| request.head.target() == "/api/tools?all").unwrap();
    let field = |name| request.head.get(name);
    assert_eq!(field("user-agent"), Some(concat!("sidegate/", env!("CARGO_PKG_VERSION"))));
    assert_eq!(field("host"), Some(backend.url().trim_start_matches("http://")), "the backend's own");
    assert_eq!((field("x-forwarded-host"), field("authorization"), field("cookie")), (None, None, None));

    // Whoever asks, by whatever name, and as long as it takes: it is asked for again while it is still fresh.
    eventually("it to be asked for again", async || {
        assert!(is_warm("b.test:8080").await);
        asked(&backend, "/api/tools?all") >= 3
    })
    .await;
    let cache = proxy.admin_get("/cache").await.json()["caches"][0].clone();
    assert_eq!(cache["requests"]["miss"], 0, "nobody waited for the backend: {cache}");
    assert!(!proxy.logged().contains("sidegate/"), "it is no request of a client's, in no access log");
    assert!(!proxy.logged().contains("could not"), "{}", proxy.logged());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_fails_is_tried_again_and_told_of() {
    let backend = Backend::start().await;
    let cache = "ttl: 1h, warm: ['https://api.test/api/tools']";
    let yaml = format!("hygiene: {{trusted_proxies: private}}\n{}", file(cache));
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    let (mut upstream, head) = backend.accept_head().await;
    assert_eq!((head.target(), head.get("host")), ("/api/tools", Some("api.test")));
    assert_eq!((head.get("x-forwarded-proto"), head.get("x-forwarded-host")), (Some("https"), Some("api.test")));
    upstream.send("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    let line = proxy.line("an answer could not be kept warm").await;
    assert_eq!(
        (&line["route"], &line["warmed"], &line["error"]),
        (&"tools".into(), &"https://api.test/api/tools".into(), &"the upstream failed".into()),
        "{line}"
    );
    assert_eq!(line["level"], "warn");

    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\ntools").await;
    proxy.line("an answer is warm again").await;
    let answer = ask(&proxy, "/api/tools", "host: API.test:443\r\nx-forwarded-proto: https\r\n").await;
    assert!(is_hit(&answer) && answer.text() == "tools", "{}", answer.text());
    assert!(backend.accepted().await.is_none(), "an hour is not over");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_dropped_is_asked_for_again() {
    let backend = Recorder::ok().await;
    let proxy =
        Proxy::before(&backend.url(), &file("ttl: 1h, ignore_host: true, tags: [all], warm: [/api/tools]")).await;
    let is_warm = async || is_hit(&ask(&proxy, "/api/tools", "host: a.test\r\n").await);
    eventually("the answer to be kept", is_warm).await;
    assert_eq!(asked(&backend, "/api/tools"), 1);
    proxy.admin_post("/cache/purge?tag=all").await;
    eventually("it to be asked for again", async || asked(&backend, "/api/tools") == 2).await;
    eventually("the answer to be kept", is_warm).await;
    // A request that changes it drops it by whatever host.
    let change = "DELETE /api/tools HTTP/1.1\r\nhost: b.test\r\n\r\n";
    assert_eq!(proxy.ask(change).await.status(), 200);
    eventually("it to be asked for again", async || asked(&backend, "/api/tools") >= 4).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn it_ends_with_its_configuration() {
    let backend = Recorder::ok().await;
    let cache = "ttl: 1s, ignore_host: true, warm: [/api/tools]";
    let yaml = |cache: &str| format!("upstreams: {{ api: {{ endpoints: [\"{}\"] }} }}\n{}", backend.url(), file(cache));
    let proxy = Proxy::start(&yaml(cache)).await;
    eventually("it to be asked for", async || asked(&backend, "/api/tools") >= 2).await;
    // What says the same goes on with what is kept.
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    proxy.rewrite(&yaml(&cache.replace("tools", "others")));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    eventually("the others to be asked for", async || asked(&backend, "/api/others") >= 1).await;
    let before = asked(&backend, "/api/tools");
    eventually("the others to be asked for again", async || asked(&backend, "/api/others") >= 4).await;
    assert_eq!(asked(&backend, "/api/tools"), before);
}
