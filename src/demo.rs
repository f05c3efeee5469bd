//! `sidegate demo`: something to try sidegate on, without a backend of one's own.
//!
//! A backend that speaks like OpenAI's API stands on a port of its own, and sidegate before it, with the policy of
//! `config/examples/demo.yaml`. Its tokens are 40 ms apart, so that one sees whether a stream is passed on as it comes.

use std::{
    convert::Infallible,
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures_util::stream;
use http::{HeaderValue, Method, Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body::Frame;
use http_body_util::{BodyExt, Limited, StreamBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{sync::Semaphore, task::JoinSet, time::sleep};

use crate::{
    config::{Sources, Toggle},
    message::Body,
    settings::{Settings, listener::Address},
};

/// The policy, as it stands in the repository.
const POLICY: (&str, &str) = ("config/examples/demo.yaml", include_str!("../config/examples/demo.yaml"));
/// From one token to the next: as fast as people read, and as most models write.
const PACE: Duration = Duration::from_millis(40);
/// Connections that the backend has open at once.
const CONNECTIONS: usize = 256;
/// The longest request body that the backend reads, in bytes.
const LONGEST: usize = 1 << 20;

/// The backend, bound but not serving yet, and the configuration of sidegate before it.
#[derive(Debug)]
pub struct Demo {
    backend: TcpListener,
    sources: Sources,
    moved: bool,
}

impl Demo {
    /// Binds the backend to a port that the system chooses. `sources` win over the policy. Where its ports are taken,
    /// others are chosen, but not for those that an option asks for.
    ///
    /// # Errors
    /// No port can be had; an option's is taken.
    pub fn new(sources: Sources) -> io::Result<Self> {
        let backend = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        backend.set_nonblocking(true)?;
        let url = format!("http://{}", backend.local_addr()?);
        let mut sources =
            Sources { built_in: Some(POLICY), ..sources }.with_option("demo", "upstreams.llm.endpoints", url);
        let mut moved = false;
        // What is wrong with the configuration is for its owner to be told.
        if let Ok((settings, _)) = Settings::load(&sources) {
            let listen = settings.listen.iter().next().map(|listener| ("listen", &listener.address));
            let admin = settings.admin.as_ref().map(|admin| ("admin.listen", &admin.listen));
            for (key, address) in [listen, admin].into_iter().flatten() {
                if let Address::Tcp(wanted) = *address {
                    let option = sources.options.iter().find(|(_, given, _)| *given == key);
                    let free = match option.filter(|_| wanted.port() != 0) {
                        Some((option, ..)) => asked_for(wanted, option)?,
                        None => free(wanted)?,
                    };
                    moved |= free != wanted && wanted.port() != 0;
                    sources = sources.with_option("demo", key, free.to_string());
                }
            }
        }
        Ok(Self { backend, sources, moved })
    }

    /// Where sidegate's configuration comes from.
    #[must_use]
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// What to try.
    #[must_use]
    pub fn welcome(&self, settings: &Settings) -> String {
        let mut text = String::from("A backend that speaks like OpenAI's API, and sidegate before it.");
        if self.moved {
            text.push_str(" The usual ports are taken, so these are others.");
        }
        let Some(base) = settings.listen.iter().next().map(|listener| &listener.address) else { return text };
        let chat = format!("{base}/v1/chat/completions");
        let ask = r#"{"model": "demo", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}"#;
        let lines = format!(
            "

  A stream, token by token:
    curl -N http://{chat} -H 'content-type: application/json' -d '{ask}'

  The headers that sidegate adds:
    curl -i http://{base}/v1/models

  An error of sidegate's own, in the form that OpenAI's SDKs understand:
    curl -i http://{base}/nowhere
"
        );
        text.push_str(&lines);
        if let Toggle::On(admin) = &settings.admin {
            let figures = format!("\n  Figures: http://{}/metrics", admin.listen);
            text.push_str(&figures);
        }
        text.push_str("\n  The policy: config/examples/demo.yaml. Ctrl-C ends this.\n\n");
        text
    }

    /// Serves the backend's clients for as long as it is polled.
    pub async fn serve(self) -> io::Error {
        let backend = match tokio::net::TcpListener::from_std(self.backend) {
            Ok(backend) => backend,
            Err(error) => return error,
        };
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        // Dropped with this future, and all connections with it.
        let mut connections = JoinSet::new();
        loop {
            let Ok(place) = places.clone().acquire_owned().await else {
                return io::Error::other("the backend is closed");
            };
            let socket = match backend.accept().await {
                Ok((socket, _)) => socket,
                Err(error) => return error,
            };
            while connections.try_join_next().is_some() {}
            connections.spawn(async move {
                let _place = place;
                // A client that has gone is no failure of a demo.
                drop(http1::Builder::new().serve_connection(TokioIo::new(socket), service_fn(answer)).await);
            });
        }
    }
}

/// The address, or one beside it where it is taken.
fn free(wanted: SocketAddr) -> io::Result<SocketAddr> {
    let taken = |error: &io::Error| error.kind() == io::ErrorKind::AddrInUse;
    match TcpListener::bind(wanted) {
        Err(error) if taken(&error) => TcpListener::bind((wanted.ip(), 0))?.local_addr(),
        bound => bound?.local_addr(),
    }
}

/// The address, if it is free.
fn asked_for(wanted: SocketAddr, option: &str) -> io::Result<SocketAddr> {
    let taken = |error: io::Error| {
        let message =
            format!("cannot listen on {wanted}: {error}: choose another address with `{option}`, or leave it out");
        io::Error::new(error.kind(), message)
    };
    TcpListener::bind(wanted).map(|_| wanted).map_err(taken)
}

async fn answer(request: Request<Incoming>) -> Result<Response<Body>, Infallible> {
    Ok(match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz") => reply(StatusCode::OK, &json!({ "status": "ok" })),
        (&Method::GET, "/v1/models") => {
            let model = json!({ "id": "demo", "object": "model", "created": now(), "owned_by": "sidegate" });
            reply(StatusCode::OK, &json!({ "object": "list", "data": [model] }))
        }
        (&Method::POST, "/v1/chat/completions") => chat(request).await,
        _ => refuse(StatusCode::NOT_FOUND, "there is nothing here"),
    })
}

#[expect(clippy::disallowed_methods, reason = "the body is limited")]
async fn chat(request: Request<Incoming>) -> Response<Body> {
    let Ok(body) = Limited::new(request.into_body(), LONGEST).collect().await else {
        return refuse(StatusCode::PAYLOAD_TOO_LARGE, "the body is too long, or broke off");
    };
    let Ok(asked) = serde_json::from_slice::<Value>(&body.to_bytes()) else {
        return refuse(StatusCode::BAD_REQUEST, "the body is not JSON");
    };
    let said = asked["messages"].as_array().and_then(|all| all.last()).and_then(|last| last["content"].as_str());
    let text = format!(
        "You said {said:?}. I am a small backend built into sidegate, and I know no more than that. Each word of this \
         left me 40 milliseconds after the one before, and sidegate handed it on the moment it came.",
        said = said.unwrap_or_default()
    );
    let words: Vec<_> = text.split_inclusive(' ').map(str::to_owned).collect();
    let usage = json!({
        "prompt_tokens": said.unwrap_or_default().split_whitespace().count(),
        "completion_tokens": words.len(),
        "total_tokens": said.unwrap_or_default().split_whitespace().count() + words.len(),
    });
    if asked["stream"] == true {
        return stream_of(&words, (asked["stream_options"]["include_usage"] == true).then_some(usage));
    }
    sleep(PACE * 10).await;
    let message = json!({ "role": "assistant", "content": text });
    let choice = json!({ "index": 0, "message": message, "finish_reason": "stop" });
    reply(StatusCode::OK, &completion("chat.completion", &json!([choice]), Some(&usage)))
}

/// The words as events, `PACE` apart, as OpenAI's API sends them.
fn stream_of(words: &[String], usage: Option<Value>) -> Response<Body> {
    let chunk = |delta: Value, finish: Option<&str>| {
        let choice = json!({ "index": 0, "delta": delta, "finish_reason": finish });
        completion("chat.completion.chunk", &json!([choice]), None)
    };
    let mut events = vec![chunk(json!({ "role": "assistant", "content": "" }), None)];
    events.extend(words.iter().map(|word| chunk(json!({ "content": word }), None)));
    events.push(chunk(json!({}), Some("stop")));
    events.extend(usage.map(|usage| completion("chat.completion.chunk", &json!([]), Some(&usage))));
    let mut texts: Vec<_> = events.iter().map(|event| format!("data: {event}\n\n")).collect();
    texts.push("data: [DONE]\n\n".to_owned());
    let frames = stream::unfold(texts.into_iter(), |mut rest| async {
        let text = rest.next()?;
        sleep(PACE).await;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from(text))), rest))
    });
    let mut response = Response::new(Body::new(StreamBody::new(frames)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    response
}

fn completion(object: &str, choices: &Value, usage: Option<&Value>) -> Value {
    let mut completion = json!({
        "id": "chatcmpl-demo", "object": object, "created": now(), "model": "demo", "choices": choices,
    });
    if let Some(usage) = usage {
        completion["usage"] = usage.clone();
    }
    completion
}

fn refuse(status: StatusCode, message: &str) -> Response<Body> {
    reply(status, &json!({ "error": { "message": message, "type": "invalid_request_error", "code": null } }))
}

fn reply(status: StatusCode, body: &Value) -> Response<Body> {
    let mut response = Response::new(Body::from(format!("{body}\n")));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// Seconds since 1970.
fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}
