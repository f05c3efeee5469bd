//! A real FastAPI application under uvicorn with sse-starlette behind sidegate, as most will use it.

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::{net::TcpStream, time::Instant};
use tokio_tungstenite::{
    WebSocketStream, client_async,
    tungstenite::{
        Bytes, Message as Frame,
        protocol::{CloseFrame, frame::coding::CloseCode},
    },
};

use crate::harness::{Fastapi, Proxy, Wire, client, client::Http2Client, figure, ms, within};

async fn served() -> (Fastapi, Proxy) {
    let backend = Fastapi::start().await;
    let proxy = Proxy::upstream(&backend.url()).await;
    (backend, proxy)
}

/// Reads chunks until one event is complete.
async fn event(client: &mut Wire) -> String {
    let mut event = String::new();
    while !(event.ends_with("\n\n") || event.ends_with("\r\n\r\n")) {
        event += std::str::from_utf8(&client.chunk().await.expect("an event")).unwrap();
    }
    event
}

#[tokio::test(flavor = "multi_thread")]
async fn one_command_and_no_file_give_ids_security_headers_and_the_answer() {
    let (_backend, proxy) = served().await;
    let answer = proxy.get("/health").await;
    assert_eq!(answer.status(), 200);
    assert_eq!(answer.json(), json!({ "status": "ok" }));
    assert_eq!(answer.head.get("x-content-type-options"), Some("nosniff"));
    assert_eq!(answer.head.get("x-frame-options"), Some("DENY"));
    assert_eq!(answer.head.get("server"), None, "who serves is nobody's business");
    let id = answer.head.get("x-request-id").expect("an id");
    let line = proxy.access_line(id).await;
    assert_eq!((&line["status"], &line["path"]), (&json!(200), &json!("/health")), "{line}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_application_sees_the_bytes_of_the_request_and_who_asked() {
    let (_backend, proxy) = served().await;
    let answer = proxy
        .ask(
            "POST /echo/a%2Fb//c/../d;e=f/%e4?x=%20y&x=+&= HTTP/1.1\r\nhost: api.test\r\nx-request-id: mine-1\r\n\
             x-twice: one\r\nx-twice: two\r\ncontent-length: 4\r\n\r\nbody",
        )
        .await;
    let echo = answer.json();
    assert_eq!(echo["path"], "/echo/a%2Fb//c/../d;e=f/%e4");
    assert_eq!(echo["query"], "x=%20y&x=+&=");
    assert_eq!(echo["body"], "body");
    let all = |name: &str| -> Vec<&str> {
        let fields = echo["headers"].as_array().unwrap();
        fields.iter().filter(|field| field[0] == name).map(|field| field[1].as_str().unwrap()).collect()
    };
    assert_eq!(all("host"), ["api.test"]);
    assert_eq!(all("x-twice"), ["one", "two"]);
    assert_eq!(all("x-request-id"), ["mine-1"]);
    assert_eq!(all("x-forwarded-for"), ["127.0.0.1"]);
    assert_eq!(all("x-forwarded-proto"), ["http"]);
    assert_eq!(answer.head.get("x-request-id"), Some("mine-1"));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_application_s_own_errors_pass_as_they_are() {
    let (_backend, proxy) = served().await;
    let request =
        "POST /items/one HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}";
    let answer = proxy.ask(request).await;
    assert_eq!(answer.status(), 422);
    assert_eq!(answer.json()["detail"][0]["loc"], json!(["path", "item_id"]), "{}", answer.text());
    let answer = proxy.get("/nothing-here").await;
    assert_eq!((answer.status(), answer.json()), (404, json!({ "detail": "Not Found" })));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_interactive_documentation_keeps_working() {
    let (_backend, proxy) = served().await;
    let page = proxy.get("/docs").await;
    assert_eq!(page.status(), 200);
    let policy = page.head.get("content-security-policy").expect("a policy");
    assert!(!policy.contains("default-src"), "the page loads scripts: {policy}");
    let schema = proxy.get("/openapi.json").await;
    assert!(schema.head.get("content-security-policy").unwrap().contains("default-src 'none'"));
    assert_eq!(schema.json()["info"]["title"], "backend");
}

#[tokio::test(flavor = "multi_thread")]
async fn events_arrive_one_by_one() {
    let (backend, proxy) = served().await;
    for path in ["/sse/one", "/lines/two"] {
        let stream = path.rsplit('/').next().unwrap();
        let mut client = proxy.connect().await;
        client.send(format!("GET {path} HTTP/1.1\r\nhost: a\r\n\r\n")).await;
        if stream == "one" {
            let head = client.head().await;
            assert_eq!(head.get("x-accel-buffering"), Some("no"), "{head:?}");
            assert!(head.get("content-type").unwrap().starts_with("text/event-stream"));
        }
        for token in ["Hello", ", ", "world"] {
            // The next event does not exist before this one has arrived.
            backend.next(stream, token).await;
            if stream == "one" {
                assert!(event(&mut client).await.contains(&format!("data: {token}")));
            } else {
                if token == "Hello" {
                    client.head().await;
                }
                assert_eq!(client.chunk().await.unwrap(), token.as_bytes());
            }
        }
        backend.next(stream, "").await;
        while client.chunk().await.is_some() {}
        backend.until(stream, "done").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_chat_completion_streams_over_http2_too() {
    let (backend, proxy) = served().await;
    let client = Http2Client::to(proxy.address()).await;
    let request = http::Request::post("http://sidegate.test/v1/chat/completions")
        .header("content-type", "application/json")
        .body(())
        .unwrap();
    let (sender, answer) = client.begin(request);
    sender.data(json!({ "stream": true, "user": "chat", "messages": [] }).to_string()).await;
    sender.finish();
    let answer = within("the head", answer).await.unwrap();
    assert_eq!(answer.status(), 200);
    let mut body = answer.into_body();
    for token in ["Hel", "lo"] {
        backend.next("chat", token).await;
        let event = client::data(&mut body).await.expect("an event");
        let event = std::str::from_utf8(&event).unwrap().trim().strip_prefix("data: ").expect("data").to_owned();
        let chunk: Value = serde_json::from_str(&event).unwrap();
        assert_eq!(chunk["choices"][0]["delta"]["content"], token);
    }
    backend.next("chat", "").await;
    let last = client::data(&mut body).await.expect("the last event");
    assert!(last.starts_with(b"data: [DONE]"), "{last:?}");
    assert_eq!(client::data(&mut body).await, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn leaving_a_stream_cancels_the_generator() {
    let (backend, proxy) = served().await;
    let mut client = proxy.connect().await;
    client.send("GET /sse/left HTTP/1.1\r\nhost: a\r\nx-request-id: left-1\r\n\r\n").await;
    client.head().await;
    backend.next("left", "first").await;
    event(&mut client).await;
    let left = Instant::now();
    drop(client);
    backend.until("left", "cancelled").await;
    figure(&format!("the generator of a FastAPI stream ended {} after its client left", ms(left.elapsed())));
    assert_eq!(proxy.access_line("left-1").await["aborted_by"], "client");
}

async fn websocket(proxy: &Proxy) -> WebSocketStream<TcpStream> {
    let stream = TcpStream::connect(proxy.address()).await.unwrap();
    let (socket, answer) = within("the handshake", client_async("ws://sidegate.test/ws", stream)).await.unwrap();
    assert_eq!(answer.status(), 101);
    socket
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_echoes_a_mebibyte_in_text_and_in_bytes() {
    let (_backend, proxy) = served().await;
    let mut socket = websocket(&proxy).await;
    let bytes: Bytes = (0..1 << 20).map(|i: u32| i.to_le_bytes()[1]).collect::<Vec<u8>>().into();
    let text = "sidegate".repeat((1 << 20) / 8);
    for message in [Frame::binary(bytes), Frame::text(text), Frame::text("")] {
        socket.send(message.clone()).await.unwrap();
        let echo = within("the echo", socket.next()).await.expect("an echo").unwrap();
        assert!(echo == message, "{} bytes came back of {}", echo.len(), message.len());
    }
    socket.send(Frame::Ping("are you there".into())).await.unwrap();
    assert_eq!(within("the pong", socket.next()).await.unwrap().unwrap(), Frame::Pong("are you there".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_close_code_of_either_side_reaches_the_other() {
    let (backend, proxy) = served().await;
    let mut socket = websocket(&proxy).await;
    socket.send(Frame::text("close 4001 go away")).await.unwrap();
    match within("the close", socket.next()).await.unwrap().unwrap() {
        Frame::Close(Some(frame)) => {
            assert_eq!((frame.code, &*frame.reason), (CloseCode::Library(4001), "go away"));
        }
        other => panic!("not a close: {other:?}"),
    }
    let mut socket = websocket(&proxy).await;
    socket.close(Some(CloseFrame { code: CloseCode::Library(4242), reason: "bye".into() })).await.unwrap();
    backend.until("ws", "closed-4242").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_application_that_is_gone_is_a_clear_error() {
    let (backend, proxy) = served().await;
    assert_eq!(proxy.get("/health").await.status(), 200);
    let url = backend.url();
    drop(backend);
    let answer = proxy.get("/health").await;
    assert_eq!((answer.status(), &answer.json()["type"]), (502, &json!("urn:sidegate:problem:connect-failed")));
    assert!(!answer.text().contains(url.trim_start_matches("http://")), "{}", answer.text());
}
