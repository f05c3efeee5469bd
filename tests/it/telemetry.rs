//! What the operator sees: one line per request, samples with bounded labels, and the admin port.

use std::{net::SocketAddr, process::Command};

use serde_json::{Value, json};

use crate::harness::{Backend, Proxy, Wire, backend::Recorder, client::Http2Client, eventually};

fn get(path: &str, id: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: {id}\r\n\r\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_is_one_line_that_says_what_came_of_it() {
    let backend = Recorder::ok().await;
    let file = "routes: [{ name: chat, match: { path: /chat }, upstream: api }]";
    let proxy = Proxy::before(&backend.url(), file).await;
    let answer = proxy
        .ask(
            "POST /chat?token=hush HTTP/1.1\r\nhost: sidegate.test\r\nx-request-id: line-1\r\nx-session-id: s-7\r\n\
             authorization: Bearer hush\r\ntraceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01\r\n\
             content-length: 4\r\n\r\nhush",
        )
        .await;
    assert_eq!(answer.status(), 200);
    let line = proxy.access_line("line-1").await;
    let expected = json!({
        "level": "info", "msg": "request", "request_id": "line-1", "session_id": "s-7",
        "trace_id": "0af7651916cd43dd8448eb211c80319c", "client_ip": "127.0.0.1", "method": "POST", "path": "/chat",
        "route": "chat", "upstream": "api", "endpoint": backend.url().trim_start_matches("http://"), "status": 200,
        "bytes_in": 4, "bytes_out": 2,
    });
    for (name, value) in expected.as_object().unwrap() {
        assert_eq!(&line[name], value, "{name}: {line}");
    }
    let duration = line["duration_ms"].as_f64().unwrap();
    let first_byte = line["first_byte_ms"].as_f64().unwrap();
    assert!(0.0 < first_byte && first_byte <= duration && duration < 10_000.0, "{line}");
    assert!(line["ts"].as_str().unwrap().ends_with('Z'), "{line}");
    assert!(line.get("aborted_by").is_none() && line.get("error").is_none(), "{line}");
    let lines = proxy.logged();
    assert!(!lines.contains("hush"), "neither query nor field nor body is logged: {lines}");
    assert_eq!(lines.matches("line-1").count(), 1, "{lines}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_line_is_written_when_the_body_ends_and_says_what_ended_it() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n";

    let mut client = proxy.connect().await;
    client.send(get("/", "whole")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(head).await;
    client.head().await;
    client.chunk().await;
    assert!(!proxy.logged().contains("whole"), "not before its end");
    upstream.send("3\r\ntwo\r\n0\r\n\r\n").await;
    let line = proxy.access_line("whole").await;
    assert_eq!((&line["bytes_out"], line.get("aborted_by")), (&json!(6), None), "{line}");

    let mut client = proxy.connect().await;
    client.send(get("/", "broken")).await;
    // The connection of the first request is used again.
    upstream.head().await;
    upstream.send(head).await;
    client.head().await;
    client.chunk().await;
    drop(upstream);
    client.ended().await;
    let line = proxy.access_line("broken").await;
    assert_eq!((&line["aborted_by"], &line["error"]), (&json!("upstream"), &json!("upstream-reset")), "{line}");
    assert_eq!((&line["status"], &line["bytes_out"]), (&json!(200), &json!(3)), "{line}");
    assert!(line["cause"].is_string(), "the cause is for the log: {line}");

    let mut client = proxy.connect().await;
    client.send(get("/", "left")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(head).await;
    client.head().await;
    client.chunk().await;
    drop(client);
    let line = proxy.access_line("left").await;
    assert_eq!((&line["aborted_by"], &line["status"]), (&json!("client"), &json!(200)), "{line}");

    let mut client = proxy.connect().await;
    client.send(get("/", "early")).await;
    let (_upstream, _) = backend.accept_head().await;
    drop(client);
    let line = proxy.access_line("early").await;
    assert_eq!((&line["aborted_by"], line.get("status")), (&json!("client"), None), "there was no status: {line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_that_could_forge_a_line_is_replaced() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for id in ["a\\\",\\\"x\\\":1", "a b", "ä", &"a".repeat(129), ""] {
        let answer = proxy.ask(get("/", id)).await;
        let made = answer.head.get("x-request-id").expect("an id");
        assert_ne!(made, id);
        assert_eq!(made.len(), 36, "a UUID: {made}");
        assert_eq!(proxy.access_line(made).await["status"], 200);
        let upstream = backend.requests().pop().unwrap();
        assert_eq!(upstream.head.get("x-request-id"), Some(made), "the same id upstream");
    }
}

/// The first address in a text.
fn loopback_address(text: &str) -> SocketAddr {
    let (_, rest) = text.split_once("127.0.0.1:").expect("an address");
    let port: String = rest.chars().take_while(char::is_ascii_digit).collect();
    ([127, 0, 0, 1], port.parse().unwrap()).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_goes_to_a_file_which_is_opened_anew_when_asked() {
    let backend = Recorder::ok().await;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("access.log");
    let read = |path: &std::path::Path| std::fs::read_to_string(path).unwrap_or_default();
    let file = format!("admin: off\nlog: {{ format: json, file: {} }}", path.display());
    let proxy = Proxy::spawn_before(&backend.url(), &file);
    eventually("the listener", async || read(&path).contains("\"listening\"")).await;
    let address = loopback_address(&read(&path));
    Wire::ask(address, get("/", "to-file-1")).await;
    eventually("the line", async || read(&path).contains("to-file-1")).await;
    let rotated = directory.path().join("access.log.1");
    std::fs::rename(&path, &rotated).unwrap();
    proxy.signal(rustix::process::Signal::HUP);
    eventually("a new file", async || path.exists()).await;
    Wire::ask(address, get("/", "to-file-2")).await;
    eventually("the line", async || read(&path).contains("to-file-2")).await;
    assert!(!read(&rotated).contains("to-file-2"));
    assert_eq!(proxy.logged(), "", "nothing goes to the standard output");
}

#[tokio::test(flavor = "multi_thread")]
async fn access_lines_can_be_switched_off() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "log: { format: json, access: false }").await;
    assert_eq!(proxy.ask(get("/", "unseen-1")).await.status(), 200);
    assert_eq!(proxy.sample("sidegate_requests_total{route=\"/*\",status_class=\"2xx\"}").await, 1);
    let (_, log) = proxy.stop().await;
    assert!(!log.contains("unseen-1"), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn pretty_lines_are_for_people() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::spawn_before(&backend.url(), "admin: off\nlog: { format: pretty }");
    eventually("the listener", async || proxy.logged().contains("listening")).await;
    let address = loopback_address(&proxy.logged());
    Wire::ask(address, get("/pretty", "pretty-1")).await;
    eventually("the line", async || proxy.logged().contains("pretty-1")).await;
    let logged = proxy.logged();
    let line = logged.lines().find(|line| line.contains("pretty-1")).unwrap();
    assert!(line.contains("GET") && line.contains("/pretty") && line.contains("200"), "{line}");
    assert!(serde_json::from_str::<Value>(line).is_err(), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn samples_are_counted_by_route_and_no_request_can_add_a_series() {
    let backend = Recorder::ok().await;
    let file = "routes:\n- { name: items, match: { path: \"/items/{id}\" }, upstream: api }";
    let proxy = Proxy::before(&backend.url(), file).await;
    for id in 0..3 {
        assert_eq!(proxy.get(&format!("/items/{id}")).await.status(), 200);
    }
    let series = |metrics: &str| metrics.lines().filter(|line| !line.starts_with('#')).count();
    let before = series(&proxy.admin_get("/metrics").await.text());
    for path in ["/a", "/b", "/c?d=e", "/items/4"] {
        proxy.get(path).await;
    }
    let client = Http2Client::to(proxy.address()).await;
    client.get("/items/5").await;
    proxy.ask("BREW /items/6 HTTP/1.1\r\nhost: other.test\r\nx-request-id: x\r\n\r\n").await;

    let answer = proxy.admin_get("/metrics").await;
    assert!(answer.head.get("content-type").unwrap().starts_with("application/openmetrics-text"));
    let metrics = answer.text();
    assert!(series(&metrics) <= before + 1, "one error slug is new at most:\n{metrics}");
    assert!(metrics.ends_with("# EOF\n"), "{metrics}");
    for (sample, value) in [
        ("sidegate_requests_total{route=\"items\",status_class=\"2xx\"}", 6),
        ("sidegate_requests_total{route=\"none\",status_class=\"4xx\"}", 3),
        ("sidegate_errors_total{slug=\"no-route\"}", 3),
        ("sidegate_sent_bytes_total{route=\"items\"}", 12),
        ("sidegate_in_flight{route=\"items\"}", 0),
        ("sidegate_duration_seconds_count{route=\"items\"}", 6),
    ] {
        assert_eq!(proxy.sample(sample).await, value, "{sample}:\n{metrics}");
    }
    let attempts = metrics.lines().filter(|line| line.starts_with("sidegate_upstream_attempts_total")).count();
    assert!(attempts >= 3, "{metrics}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_stream_is_in_flight_until_it_ends() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "routes: [{ name: all, upstream: api }]").await;
    let mut client = proxy.connect().await;
    client.send(get("/", "flight-1")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n").await;
    client.head().await;
    assert_eq!(proxy.sample("sidegate_in_flight{route=\"all\"}").await, 1);
    drop(client);
    eventually("the end of the flight", async || proxy.sample("sidegate_in_flight{route=\"all\"}").await == 0).await;
    assert_eq!(proxy.sample("sidegate_aborted_total{route=\"all\",by=\"client\"}").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_admin_port_answers_who_asks_how_it_is() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    for (path, status) in [("/livez", "ok"), ("/readyz", "ready"), ("/health", "ready")] {
        let answer = proxy.admin_get(path).await;
        assert_eq!((answer.status(), &answer.json()["status"]), (200, &json!(status)), "{path}");
    }
    let health = proxy.admin_get("/health").await.json();
    assert_eq!(health["components"]["config"]["status"], "ok", "{health}");
    assert_eq!(health["components"]["upstreams"]["api"]["kind"], "endpoints", "{health}");
    let missing = proxy.admin_get("/nothing").await;
    assert_eq!(missing.status(), 404);
    assert!(missing.text().contains("/health"), "it says what there is: {}", missing.text());
    let answer =
        Wire::ask(proxy.admin().await, "POST /metrics HTTP/1.1\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!((answer.status(), answer.head.get("allow")), (405, Some("GET, HEAD")));
    assert_eq!(proxy.get("/livez").await.text(), "ok", "the front port knows none of this: it is the backend's");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_in_a_browser_cannot_reach_the_admin_port_by_another_name() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let admin = proxy.admin().await;
    let answer = Wire::ask(admin, "GET /config HTTP/1.1\r\nhost: rebound.example\r\n\r\n").await;
    assert_eq!(answer.status(), 421);
    let reload = "POST /reload HTTP/1.1\r\nhost: localhost\r\norigin: http://evil.example\r\ncontent-length: 0\r\n\r\n";
    assert_eq!(Wire::ask(admin, reload).await.status(), 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_effective_configuration_is_shown_without_its_secrets() {
    let file = "admin: { listen: 127.0.0.1:0, token: hush-hush }\n\
                upstreams: { api: { endpoints: [\"UPSTREAM\"] } }\n\
                routes: [{ name: all, upstream: api }]";
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), file).await;
    let answer = proxy.admin_get("/config").await;
    assert_eq!(answer.status(), 200);
    let text = answer.text();
    assert!(!text.contains("hush-hush"), "{text}");
    assert!(text.contains(&backend.url()) && text.contains("\"all\""), "{text}");

    let effective = &answer.json()["effective"];
    assert_eq!(effective["limits"]["headers"], 100, "defaults are written out: {text}");
    assert_eq!(effective["routes"][0]["timeouts"]["idle"], "5m", "and what routes inherit: {text}");
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("effective.yaml");
    std::fs::write(&file, effective.to_string()).unwrap();
    let checked = Command::new(env!("CARGO_BIN_EXE_sidegate")).arg("check").arg(&file).env_clear().output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
}
