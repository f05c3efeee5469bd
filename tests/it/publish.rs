//! Pages of the operator's port under paths of the public one.

use serde_json::json;

use crate::{
    auth::{keys, new_key},
    harness::{Backend, Message, Proxy, backend::Recorder, eventually},
};

/// A backend that nobody reaches, its breaker, and pages about it.
fn file(keys: &str) -> String {
    format!(
        "
upstreams:
  api: {{endpoints: [UPSTREAM], circuit_breaker: {{consecutive_failures: 1, recovery: 1m}}}}
  health: {{admin: {{page: /health}}}}
  metrics: {{admin: {{page: GET /metrics}}}}
  breakers: {{admin: {{page: /circuit-breakers}}}}
  reset: {{admin: {{page: 'POST /circuit-breakers/{{upstream}}/reset'}}}}
  clear: {{admin: {{page: /cache/purge?all, open: true}}}}
defaults: {{cache: {{ttl: 1h}}, retry: {{}}}}
routes:
  - {{upstream: api}}
  - {{upstream: health, match: {{path: /api/health, method: GET}}}}
  - {{upstream: metrics, match: {{path: /api/metrics}}}}
  - {{upstream: breakers, match: {{path: /api/circuit-breaker}}}}
  - {{upstream: reset, match: {{path: '/api/circuit-breaker/{{upstream}}/reset'}}, auth: {{api_keys: {{file: {keys}}}}}}}
  - {{upstream: clear, match: {{path: /api/cache/clear, method: [POST, DELETE]}}}}
"
    )
}

async fn ask(proxy: &Proxy, line: &str, fields: &str) -> Message {
    proxy.ask(format!("{line} HTTP/1.1\r\nhost: sidegate.test\r\n{fields}content-length: 0\r\n\r\n")).await
}

fn no_keys() -> (tempfile::TempDir, String) {
    let (_, line) = new_key(&["--id", "nobody"]);
    keys(&[&line])
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_is_where_its_route_leads_and_no_other_is() {
    let (_folder, keys) = no_keys();
    let backend = Recorder::ok().await;
    // Also where the operator's port is closed.
    let proxy = Proxy::before(&backend.url(), &format!("admin: off\n{}", file(&keys))).await;
    let health = proxy.get("/api/health").await;
    assert_eq!((health.status(), health.head.get("content-type")), (200, Some("application/json")));
    let health = health.json();
    assert_eq!(health["status"], "ready", "{health}");
    assert_eq!(health["components"]["cache"]["status"], "ok", "{health}");
    let upstreams = &health["components"]["upstreams"];
    let breakers = upstreams["api"]["circuit_breakers"].as_object().unwrap();
    assert_eq!(breakers.values().collect::<Vec<_>>(), ["closed"], "{health}");
    assert!(upstreams.get("metrics").is_none(), "a page is no component: {health}");

    // Whatever the query, and as often as it is asked: a cache would say what was.
    let requests = async || {
        let metrics = proxy.get("/api/metrics?x").await;
        assert_eq!(metrics.head.get("cache-status"), None);
        let text = metrics.text();
        assert!(text.ends_with("# EOF\n"), "{text}");
        let series = "sidegate_requests_total{route=\"/api/metrics\",status_class=\"2xx\"}";
        text.lines().find_map(|line| line.strip_prefix(series)).map(str::to_owned)
    };
    assert_ne!(requests().await, requests().await);
    // What it is called on its own port is the backend's here, and so is all that is not named.
    for path in ["/health", "/config", "/sessions", "/api", "/api/health/redis", "/metrics"] {
        assert_eq!(proxy.get(path).await.text(), "ok", "{path}");
    }
    let mut client = proxy.connect().await;
    client.send("HEAD /api/health HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: head-1\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 200);
    let line = proxy.access_line("head-1").await;
    assert_eq!((&line["upstream"], &line["route"]), (&json!("health"), &json!("GET /api/health")), "{line}");
    let wrong = ask(&proxy, "POST /api/metrics", "").await;
    assert_eq!((wrong.status(), wrong.head.get("allow")), (405, Some("GET, HEAD")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_changes_something_is_for_those_who_may() {
    let (key, line) = new_key(&["--id", "alice"]);
    let (_folder, keys) = keys(&[&line]);
    let proxy = Proxy::before(&Backend::nowhere().await, &file(&keys)).await;
    assert!(proxy.get("/").await.status() >= 502);
    let state = async || proxy.get("/api/circuit-breaker").await.json()["circuit_breakers"][0]["state"].clone();
    assert_eq!(state().await, "open");
    let key = format!("x-api-key: {key}\r\n");
    let reset = "POST /api/circuit-breaker/api/reset";
    assert_eq!(ask(&proxy, reset, "").await.status(), 401);
    assert_eq!(ask(&proxy, "POST /api/circuit-breaker/other/reset", &key).await.status(), 404);
    assert_eq!(
        ask(&proxy, "GET /api/circuit-breaker/api/reset", &key).await.status(),
        405,
        "nobody changes by looking"
    );
    assert_eq!(ask(&proxy, &format!("{reset}?endpiont=a"), &key).await.status(), 400);
    assert_eq!(state().await, "open");
    // A page that knows the key is the operator's own.
    let answer = ask(&proxy, reset, &format!("{key}origin: https://app.example\r\n")).await;
    assert_eq!((answer.status(), &answer.json()["circuit_breakers"][0]["state"]), (200, &json!("closed")));
    assert_eq!(state().await, "closed");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_page_is_for_anybody_but_a_browser_that_was_sent_there() {
    let (_folder, keys) = no_keys();
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), &file(&keys)).await;
    let cached = async || proxy.get("/a").await.head.get("cache-status").unwrap().starts_with("sidegate; hit");
    eventually("the answer to be kept", cached).await;
    let clear = "POST /api/cache/clear";
    assert_eq!(ask(&proxy, clear, "origin: http://sidegate.test\r\n").await.status(), 403);
    assert!(cached().await);
    for method in ["POST", "DELETE"] {
        // Its own query holds, and not the client's.
        let answer = ask(&proxy, &format!("{method} /api/cache/clear?tag=a"), "").await;
        assert_eq!((answer.status(), &answer.json()["purged"]), (200, &json!("all")));
        assert!(!cached().await, "{method}");
        assert!(cached().await);
    }
}
