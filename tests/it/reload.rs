//! A new configuration takes effect at once, for everybody, without cutting anybody; a wrong one changes nothing.

use rustix::process::Signal;
use serde_json::json;

use crate::harness::{Backend, Proxy, backend::Recorder, client::Http2Client, eventually};

/// A file whose only route answers with `text`.
fn saying(text: &str) -> String {
    format!("upstreams: {{ fixed: {{ respond: {{ text: {text} }} }} }}")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signal_reloads_for_connections_that_are_open_too() {
    let proxy = Proxy::start(&saying("before")).await;
    let mut client = proxy.connect().await;
    let http2 = Http2Client::to(proxy.address()).await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(client.answer().await.text(), "before");
    assert_eq!(http2.get("/").await.status(), 200);

    proxy.rewrite("upstreams: { fixed: { respond: { status: 418, text: after } } }");
    proxy.signal(Signal::HUP);
    proxy.line("reloaded").await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(client.answer().await.text(), "after");
    assert_eq!(http2.get("/").await.status(), 418);
    let line = proxy.line("reloaded").await;
    assert_eq!((&line["why"], &line["generation"]), (&json!("SIGHUP"), &json!(2)), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_changed_file_reloads_by_itself() {
    let proxy = Proxy::start(&saying("before")).await;
    proxy.rewrite(&saying("after"));
    let line = proxy.line("reloaded").await;
    assert_eq!(line["why"], "the file changed", "{line}");
    assert_eq!(proxy.get("/").await.text(), "after");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_reloads_and_is_told_the_outcome() {
    let proxy = Proxy::start(&saying("before")).await;
    proxy.rewrite(&saying("after"));
    let answer = proxy.admin_post("/reload").await;
    assert_eq!((answer.status(), &answer.json()["status"]), (200, &json!("reloaded")), "{}", answer.text());
    assert_eq!(proxy.get("/").await.text(), "after");
    assert_eq!(proxy.admin_get("/config").await.json()["given"]["upstreams"]["fixed"]["respond"]["text"], "after");

    let from_a_page = proxy.admin_post_with("/reload", "origin: http://evil.example\r\n").await;
    assert_eq!(from_a_page.status(), 403, "a page in the operator's browser may not");
    assert_eq!(proxy.admin_get("/reload").await.status(), 405);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_file_changes_nothing_and_is_told_of() {
    let proxy = Proxy::start(&saying("before")).await;
    proxy.rewrite("upstreams: { fixed: { respond: { status: 99, txet: after } } }");
    let answer = proxy.admin_post("/reload").await;
    assert_eq!(answer.status(), 409, "{}", answer.text());
    let problems = answer.json()["problems"].clone();
    assert_eq!(problems[0]["key"], "upstreams.fixed.respond.txet", "{problems}");
    assert!(problems[0]["message"].as_str().unwrap().contains("did you mean `text`"), "{problems}");
    assert_eq!(problems.as_array().unwrap().len(), 2, "all mistakes at once: {problems}");

    assert_eq!(proxy.get("/").await.text(), "before");
    let line = proxy.line("reload refused, nothing has changed").await;
    assert_eq!(line["level"], "warn", "{line}");
    assert!(line["problems"].as_str().unwrap().contains("upstreams.fixed.respond.txet"), "{line}");
    assert!(proxy.sample("sidegate_reloads_refused_total").await >= 1);
    assert_eq!(proxy.sample("sidegate_reloads_total").await, 0);
    let health = proxy.admin_get("/health").await.json();
    assert_eq!((&health["status"], &health["components"]["config"]["status"]), (&json!("degraded"), &json!("refused")));
    assert_eq!(proxy.admin_get("/readyz").await.status(), 200, "it serves as before");

    proxy.rewrite(&saying("mended"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert_eq!(proxy.get("/").await.text(), "mended");
    let health = proxy.admin_get("/health").await.json();
    assert_eq!(health["components"]["config"]["status"], "ok", "{health}");
}

/// The names of all series, without what counts reloads and connections.
async fn series(proxy: &Proxy) -> Vec<String> {
    let metrics = proxy.admin_get("/metrics").await.text();
    let names = metrics.lines().filter_map(|line| Some(line.rsplit_once(' ')?.0.to_owned()));
    let mut names: Vec<_> = names.collect();
    names.sort_unstable();
    names
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_fails_late_leaves_no_trace() {
    let backend = Backend::start().await;
    let url = backend.url();
    let good = format!("upstreams: {{ api: {{ endpoints: [\"{url}\"] }} }}\n");
    // A system without roots to trust, which is found out when all other upstreams have been set up.
    let proxy = Proxy::start_with(&good, &[("SSL_CERT_FILE", "/dev/null"), ("SSL_CERT_DIR", "")]).await;
    let mut client = proxy.connect().await;
    client.send("GET /one HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    client.answer().await;
    let before = series(&proxy).await;
    proxy.rewrite(&format!(
        "upstreams:
  api: {{ endpoints: [\"{url}\"], circuit_breaker: {{}}, pool: {{ idle: 7s }} }}
  ghost: {{ endpoints: [\"http://127.0.0.1:3\", \"{url}\"], circuit_breaker: {{}}, concurrency: {{ max_in_flight: 3 }} }}
  late: {{ endpoints: [\"https://127.0.0.1:5\"] }}
routes:
  - {{ upstream: api }}
  - {{ match: {{ path: /ghost }}, upstream: ghost, concurrency: {{ max_in_flight: 2 }} }}
  - {{ match: {{ path: /late }}, upstream: late }}
"
    ));
    let answer = proxy.admin_post("/reload").await;
    assert_eq!(answer.status(), 409, "{}", answer.text());
    assert!(answer.text().contains("cannot be set up"), "{}", answer.text());
    assert_eq!(series(&proxy).await, before);
    assert_eq!(proxy.admin_get("/circuit-breakers").await.json(), json!({ "circuit_breakers": [] }));
    assert_eq!(proxy.admin_post("/circuit-breakers/ghost/open").await.status(), 404);
    assert_eq!(proxy.admin_get("/upstreams").await.json(), json!({ "upstreams": [] }));

    proxy.rewrite(&format!("{good}defaults: {{ security_headers: off }}"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    client.send("GET /two HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(upstream.head().await.target(), "/two", "over the connection that was open");
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.status(), 204);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_no_certificate_can_name_is_a_mistake_like_others() {
    let proxy = Proxy::start(&saying("before")).await;
    proxy.rewrite("upstreams: { api: { endpoints: [\"https://a..b\"] }, other: { respond: { status: 99 } } }");
    let answer = proxy.admin_post("/reload").await;
    let problems = answer.json()["problems"].clone();
    let keys: Vec<_> = problems.as_array().unwrap().iter().map(|problem| problem["key"].clone()).collect();
    assert!(keys.contains(&json!("upstreams.api.endpoints.0")) && keys.len() > 1, "{problems}");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_come_and_go_leave_nothing_in_the_metrics() {
    let backend = Backend::start().await;
    let named = |n: &str| {
        let url = backend.url();
        format!(
            "upstreams: {{ up-{n}: {{ endpoints: [\"{url}\"], balance: {{}}, circuit_breaker: {{}}, concurrency: {{ max_in_flight: 9 }} }}, \
             rest: {{ respond: {{ text: fixed }} }} }}
defaults: {{ retry: {{}} }}
routes: [{{ name: way-{n}, upstream: up-{n}, fallback: {{ to: [rest] }}, concurrency: {{ max_in_flight: 9 }} }}]"
        )
    };
    let proxy = Proxy::start(&named("first")).await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    client.head().await;
    for n in ["second", "third"] {
        proxy.rewrite(&named(n));
        assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    }
    let shown = async |what: &str| proxy.admin_get("/metrics").await.text().contains(what);
    assert!(shown("way-third").await && shown("up-third").await);
    eventually("the second to go", async || !shown("way-second").await && !shown("up-second").await).await;
    // A request that goes on is counted where it can be seen.
    assert_eq!(proxy.sample("sidegate_in_flight{route=\"way-first\"}").await, 1);
    assert!(shown("sidegate_endpoint_in_flight{upstream=\"up-first\"").await);
    upstream.send("0\r\n\r\n").await;
    assert_eq!(client.chunk().await.unwrap(), b"one");
    assert_eq!(client.chunk().await, None);
    eventually("the first to go", async || !shown("way-first").await && !shown("up-first").await).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_needs_a_restart_is_refused_by_name() {
    let proxy = Proxy::start(&saying("before")).await;
    proxy.rewrite(&format!("threads: 7\nlimits: {{ headers: 7 }}\n{}", saying("after")));
    let answer = proxy.admin_post("/reload").await;
    assert_eq!(answer.status(), 409);
    let problems = answer.json()["problems"].clone();
    assert_eq!((&problems[0]["key"], &problems[1]["key"]), (&json!("threads"), &json!("limits")), "{problems}");
    assert_eq!(proxy.get("/").await.text(), "before", "not even the rest of the file");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_nobody_writes_to_is_refused_and_stops_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let keys = directory.path().join("keys");
    std::fs::write(&keys, "").unwrap();
    let file = format!("{}\ndefaults: {{ auth: {{ api_keys: {{ file: {} }} }} }}", saying("before"), keys.display());
    let proxy = Proxy::start(&file).await;
    assert_eq!(proxy.get("/").await.status(), 401);

    let pipe = directory.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    std::fs::rename(&pipe, &keys).unwrap();
    let answer = proxy.admin_post("/reload").await;
    assert_eq!(answer.status(), 409, "{}", answer.text());
    assert!(answer.text().contains("it is no regular file"), "{}", answer.text());
    proxy.line_where("reload refused, nothing has changed", |line| line["why"] == "the file changed").await;

    proxy.rewrite(&saying("after"));
    let line = proxy.line("reloaded").await;
    assert_eq!(line["why"], "the file changed", "{line}");
    assert_eq!(proxy.get("/").await.text(), "after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_is_gone_changes_nothing() {
    let proxy = Proxy::start(&saying("before")).await;
    std::fs::remove_file(proxy.path("sidegate.yaml")).unwrap();
    assert_eq!(proxy.admin_post("/reload").await.status(), 409);
    assert_eq!(proxy.get("/").await.text(), "before");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_finishes_on_the_configuration_that_it_began_with() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    client.head().await;
    assert_eq!(client.chunk().await.unwrap(), b"one");

    // Its upstream is no longer in the file.
    proxy.rewrite(&saying("after"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert_eq!(proxy.get("/").await.text(), "after");
    upstream.send("3\r\ntwo\r\n").await;
    assert_eq!(client.chunk().await.unwrap(), b"two");
    upstream.send("0\r\n\r\n").await;
    assert_eq!(client.chunk().await, None, "it ends in order");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_an_unchanged_upstream_are_kept() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let mut client = proxy.connect().await;
    client.send("GET /one HTTP/1.1\r\nhost: a\r\n\r\n").await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.status(), 204);

    let url = backend.url();
    proxy
        .rewrite(&format!("upstreams: {{ api: {{ endpoints: [\"{url}\"] }} }}\ndefaults: {{ security_headers: off }}"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    client.send("GET /two HTTP/1.1\r\nhost: a\r\n\r\n").await;
    assert_eq!(upstream.head().await.target(), "/two", "over the connection that was open");
    upstream.send("HTTP/1.1 204 No Content\r\n\r\n").await;
    assert_eq!(client.answer().await.head.get("x-content-type-options"), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn no_request_is_lost_while_configurations_come_and_go() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let url = backend.url();
    let mut client = proxy.connect().await;
    for turn in 0..20 {
        let idle = if turn % 2 == 0 { "20s" } else { "30s" };
        proxy.rewrite(&format!("upstreams: {{ api: {{ endpoints: [\"{url}\"], pool: {{ idle: {idle} }} }} }}"));
        let reloading = proxy.admin_post("/reload");
        let asking = async {
            for _ in 0..20 {
                client.send("GET / HTTP/1.1\r\nhost: a\r\n\r\n").await;
                assert_eq!(client.answer().await.text(), "ok");
            }
        };
        let (reloaded, ()) = tokio::join!(reloading, asking);
        assert_eq!(reloaded.status(), 200, "{}", reloaded.text());
    }
    assert_eq!(backend.requests().len(), 400);
}
