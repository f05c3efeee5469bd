//! `sidegate demo` does what it promises to whoever has just cloned the repository.

use std::{
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// The running demo. Dropped, it is killed.
struct Demo(Child);

impl Drop for Demo {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What comes back for a request, and how long it went on coming.
fn ask(address: &str, request: &str) -> (String, Duration) {
    let mut socket = TcpStream::connect(address).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(15))).unwrap();
    socket.write_all(request.as_bytes()).unwrap();
    let mut first = [0];
    socket.read_exact(&mut first).unwrap();
    let begun = Instant::now();
    let mut rest = String::new();
    socket.read_to_string(&mut rest).unwrap();
    (format!("{}{rest}", char::from(first[0])), begun.elapsed())
}

#[test]
fn the_demo_streams_tokens_and_ends_on_ctrl_c() {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidegate"));
    let command = command.arg("demo").envs([("SIDEGATE_LISTEN", "127.0.0.1:0"), ("SIDEGATE_ADMIN", "off")]);
    let mut demo = Demo(command.stdout(Stdio::piped()).spawn().unwrap());
    let mut lines = BufReader::new(demo.0.stdout.take().unwrap()).lines().map(Result::unwrap);
    let mut said = Vec::new();
    said.extend(lines.by_ref().take_while(|line| !line.contains("listening")));
    let curls: Vec<_> = said.iter().filter(|line| line.trim_start().starts_with("curl ")).collect();
    assert_eq!(curls.len(), 3, "{said:?}");
    let address = curls[0].split("http://").nth(1).unwrap().split('/').next().unwrap();

    let body = r#"{"model": "demo", "stream": true, "messages": [{"role": "user", "content": "Hello"}]}"#;
    let head =
        "POST /v1/chat/completions HTTP/1.1\r\nhost: demo\r\nconnection: close\r\ncontent-type: application/json";
    let (stream, took) = ask(address, &format!("{head}\r\ncontent-length: {}\r\n\r\n{body}", body.len()));
    assert!(stream.starts_with("HTTP/1.1 200 OK\r\n"), "{stream}");
    assert!(stream.contains("x-request-id: ") && stream.contains("content-type: text/event-stream"), "{stream}");
    assert!(stream.matches("data: {").count() > 20 && stream.contains("data: [DONE]"), "{stream}");
    assert!(took > Duration::from_millis(500), "it came as a stream, within {took:?}");

    let (models, _) = ask(address, "GET /v1/models HTTP/1.1\r\nhost: demo\r\nconnection: close\r\n\r\n");
    assert!(models.contains(r#""object":"list""#), "{models}");
    let (nowhere, _) = ask(address, "GET /nowhere HTTP/1.1\r\nhost: demo\r\nconnection: close\r\n\r\n");
    assert!(nowhere.starts_with("HTTP/1.1 404") && nowhere.contains(r#"{"error":{"code":"no-route""#), "{nowhere}");

    kill_process(Pid::from_child(&demo.0), Signal::INT).unwrap();
    assert_eq!(demo.0.wait().unwrap().code(), Some(0), "{:?}", lines.collect::<Vec<_>>());
}

#[test]
fn a_port_that_was_asked_for_and_is_taken_is_told_with_its_option() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    for (option, other) in [("--listen", "--admin"), ("--admin", "--listen")] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_sidegate"));
        let output = command.args(["demo", option, &address, other, "127.0.0.1:0"]).env_clear().output().unwrap();
        assert_eq!((output.status.code(), output.stdout.len()), (Some(1), 0), "{output:?}");
        let expected = format!(
            "sidegate: cannot listen on {address}: Address already in use (os error 98): choose another address with \
             `{option}`, or leave it out\n"
        );
        assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
    }
}
