//! Which route takes a request, and which requests none may take.

use crate::harness::{Proxy, backend::Recorder};

/// Every route answers with its own name.
const ROUTES: &str = r#"
upstreams:
  any: { respond: { text: any } }
  exact: { respond: { text: exact } }
  below: { respond: { text: below } }
  one: { respond: { text: one } }
  post: { respond: { text: post } }
  beta: { respond: { text: beta } }
  host: { respond: { text: host } }
  hosts: { respond: { text: hosts } }
  admin: { respond: { status: 403, text: admin } }
  read: { respond: { status: 204 } }
routes:
  - upstream: any
  - { match: { path: /files/* }, upstream: below }
  - { match: { path: /files/list }, upstream: exact }
  - { match: { path: "/bots/{id}/chat" }, upstream: one }
  - { match: { path: /files/list, method: POST }, upstream: post }
  - { match: { path: /files/list, headers: { x-beta: "1" } }, upstream: beta }
  - { match: { host: "*.example.com" }, upstream: hosts }
  - { match: { host: api.example.com }, upstream: host }
  - { match: { path: /admin/* }, upstream: admin }
  - { match: { path: /read, method: GET }, upstream: read }
"#;

async fn routed(proxy: &Proxy, start: &str, fields: &str) -> String {
    let host = if fields.contains("host:") { "" } else { "host: a\r\n" };
    let answer = proxy.ask(format!("{start} HTTP/1.1\r\n{host}{fields}content-length: 0\r\n\r\n")).await;
    if answer.status() == 400 { "refused".to_owned() } else { answer.text() }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_most_specific_route_takes_a_request() {
    let proxy = Proxy::start(ROUTES).await;
    for method in ["GET", "HEAD"] {
        let answer = proxy.ask(format!("{method} /read HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        assert_eq!(answer.status(), 204, "{method}");
    }
    for (start, fields, expected) in [
        ("GET /", "", "any"),
        ("GET /files/list", "", "exact"),
        ("GET /files/list?x=/admin/y", "", "exact"),
        ("GET /files/other", "", "below"),
        ("GET /files/deep/down", "", "below"),
        ("GET /filesystem", "", "any"),
        ("GET /bots/42/chat", "", "one"),
        ("GET /bots/42/43/chat", "", "any"),
        ("GET /bots//chat", "", "any"),
        ("POST /files/list", "", "post"),
        ("GET /files/list", "x-beta: 1\r\n", "beta"),
        ("GET /files/list", "x-beta: 2\r\n", "exact"),
        ("GET /files/list", "host: api.example.com\r\n", "host"),
        ("GET /", "host: API.example.com:8080\r\n", "host"),
        ("GET /", "host: www.example.com\r\n", "hosts"),
        ("GET /", "host: example.com\r\n", "any"),
        ("GET /", "host: evil-example.com\r\n", "any"),
        ("GET http://api.example.com/", "host: a\r\n", "host"),
        ("GET /admin/users", "", "admin"),
    ] {
        assert_eq!(routed(&proxy, start, fields).await, expected, "{start} {fields}");
    }
}

/// What a backend may take for `/admin/users` is either routed like it, or refused.
#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_of_a_path_dodges_its_route() {
    let proxy = Proxy::start(ROUTES).await;
    for path in [
        "/%61dmin/users",
        "//admin/users",
        "/admin//users",
        "/x/../admin/users",
        "/x/%2e%2e/admin/users",
        "/./admin/users",
        "/%2e/admin/users",
        "/admin%2fusers",
        "/admin%2Fusers",
        "/x/..;/admin/users",
        "/admin;x=y/users",
        "/files/..%2fadmin/users",
        "/files/%2e%2e%2fadmin/users",
        "/files\\..\\admin/users",
    ] {
        let answer = routed(&proxy, &format!("GET {path}"), "").await;
        assert!(["admin", "refused"].contains(&&*answer), "{path}: {answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_section_on_a_route_replaces_that_of_the_defaults() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(
        &backend.url(),
        r"
defaults: { body_limit: { max: 4B }, security_headers: { set: { x-default: 1 } } }
routes:
  - upstream: api
  - { match: { path: /large }, upstream: api, body_limit: { max: 1KiB } }
  - { match: { path: /any }, upstream: api, body_limit: off, security_headers: { set: { x-own: 1 } } }
  - { match: { path: /bare }, upstream: api, security_headers: off }
",
    )
    .await;
    let post = async |path: &str, length: usize| {
        let body = "x".repeat(length);
        proxy.ask(format!("POST {path} HTTP/1.1\r\nhost: a\r\ncontent-length: {length}\r\n\r\n{body}")).await
    };
    assert_eq!(post("/", 4).await.status(), 200);
    assert_eq!(post("/", 5).await.status(), 413);
    assert_eq!(post("/large", 1024).await.status(), 200);
    assert_eq!(post("/large", 1025).await.status(), 413);
    assert_eq!(post("/any", 100_000).await.status(), 200);
    let head = post("/", 1).await.head;
    assert_eq!((head.get("x-default"), head.get("x-content-type-options")), (Some("1"), Some("nosniff")));
    let head = post("/any", 1).await.head;
    assert_eq!((head.get("x-default"), head.get("x-own")), (None, Some("1")), "as a whole");
    let head = post("/bare", 1).await.head;
    assert_eq!((head.get("x-default"), head.get("x-content-type-options")), (None, None));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fixed_answer_is_an_answer_like_any_other() {
    let proxy = Proxy::start(
        "upstreams: { offline: { respond: { status: 503, headers: { retry-after: 60 }, json: { response: offline } } } }",
    )
    .await;
    let answer = proxy.get("/").await;
    assert_eq!((answer.status(), answer.head.get("retry-after")), (503, Some("60")));
    assert_eq!(answer.head.get("content-type"), Some("application/json"));
    assert_eq!(answer.json()["response"], "offline");
    assert_eq!(answer.head.get("x-content-type-options"), Some("nosniff"));
    assert!(answer.head.get("x-request-id").is_some());
    let mut client = proxy.connect().await;
    client.send("HEAD / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 503);
    client.send("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello").await;
    assert_eq!(client.answer().await.status(), 503, "a body that nobody reads is no stumbling block");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stands_in_host_upstream_is_the_operators_choice() {
    let backend = Recorder::ok().await;
    let address = backend.url().trim_start_matches("http://").to_owned();
    for (host, expected) in [
        ("", "client.test:81"),
        (", host: preserve", "client.test:81"),
        (", host: endpoint", &*address),
        (", host: api.internal", "api.internal"),
    ] {
        let before = backend.requests().len();
        let yaml = format!("upstreams: {{ api: {{ endpoints: [\"UPSTREAM\"]{host} }} }}");
        let proxy = Proxy::before(&backend.url(), &yaml).await;
        proxy.ask("GET / HTTP/1.1\r\nhost: client.test:81\r\n\r\n").await;
        let head = backend.requests()[before].head.clone();
        assert_eq!((head.get("host"), head.get("x-forwarded-host")), (Some(expected), Some("client.test:81")));
    }
}
