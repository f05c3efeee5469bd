//! Pages of other origins.

use serde_json::json;

use crate::harness::{Backend, Message, Proxy, backend::Recorder};

const POLICY: &str = "
routes:
  - { match: { path: /v1/chat, method: POST }, upstream: api, cors: { origins: [\"https://*.example.com\"] } }
  - { upstream: api }
";

fn fields(answer: &Message) -> Vec<&str> {
    let of_cors = |(name, _): &&(String, String)| name.starts_with("access-control-") || name == "vary";
    answer.head.fields.iter().filter(of_cors).map(|(name, _)| &**name).collect()
}

async fn ask(proxy: &Proxy, start: &str, more: &str) -> Message {
    proxy.ask(format!("{start} HTTP/1.1\r\nhost: api\r\norigin: https://app.example.com\r\n{more}\r\n")).await
}

#[tokio::test]
async fn a_preflight_goes_to_the_route_that_it_asks_for_and_no_further() {
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(&backend.url(), POLICY).await;
    let answer = ask(&proxy, "OPTIONS /v1/chat", "access-control-request-method: POST\r\n").await;
    assert_eq!(answer.status(), 204);
    assert_eq!(answer.head.get("access-control-allow-origin"), Some("https://app.example.com"));
    assert!(answer.head.get("x-request-id").is_some(), "it is a request as any other: {:?}", answer.head);
    assert_eq!(backend.requests().len(), 0, "the backend is not asked");
    let line = proxy.access_line(answer.head.get("x-request-id").unwrap()).await;
    assert_eq!((&line["route"], &line["status"]), (&json!("POST /v1/chat"), &json!(204)));

    // Where no route with the policy would take the request, the backend answers for itself.
    for (path, more) in [("/v1/chat", "access-control-request-method: PUT\r\n"), ("/v1/chat", "")] {
        let answer = ask(&proxy, &format!("OPTIONS {path}"), more).await;
        assert_eq!((answer.status(), fields(&answer).len()), (200, 0), "{more}");
    }
    assert_eq!(backend.requests().len(), 2);
}

#[tokio::test]
async fn the_backend_has_no_say_and_errors_can_be_read() {
    let own = "HTTP/1.1 200 OK\r\naccess-control-allow-origin: *\r\naccess-control-allow-credentials: true\r\n\
               vary: accept\r\ncontent-length: 0\r\n\r\n";
    let backend = Recorder::answering(own).await;
    let proxy = Proxy::before(&backend.url(), POLICY).await;
    let answer = ask(&proxy, "POST /v1/chat", "content-length: 0\r\n").await;
    assert_eq!(answer.head.get("access-control-allow-origin"), Some("https://app.example.com"));
    assert_eq!(answer.head.get("access-control-allow-credentials"), None);
    assert_eq!(answer.head.all("vary"), ["accept", "origin"]);
    assert_eq!(
        ask(&proxy, "POST /other", "content-length: 0\r\n").await.head.get("access-control-allow-origin"),
        Some("*")
    );

    let proxy = Proxy::before(&Backend::nowhere().await, POLICY).await;
    let error = ask(&proxy, "POST /v1/chat", "content-length: 0\r\n").await;
    assert_eq!((error.status(), error.json()["type"].as_str()), (502, Some("urn:sidegate:problem:connect-failed")));
    assert_eq!(error.head.get("access-control-allow-origin"), Some("https://app.example.com"));
    let exposed = error.head.get("access-control-expose-headers").unwrap();
    assert!(exposed.contains("x-request-id") && exposed.contains("retry-after"), "{exposed}");
}
