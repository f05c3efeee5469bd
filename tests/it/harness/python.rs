//! Real FastAPI applications under uvicorn, and Flask ones under its own server, in the environment that `scripts/setup test` makes.

use std::{
    net::SocketAddr,
    path::Path,
    process::{Child, Command, Stdio},
    thread,
};

use rustix::process::{Pid, Signal, kill_process};
use std::io::{BufRead, BufReader};
use tokio::sync::mpsc;

use super::{Message, Wire, within};

/// A server of one of the applications of `tests/backends`. Dropped, it is killed.
pub struct Fastapi {
    child: Child,
    address: SocketAddr,
}

impl Fastapi {
    /// The application that streams as the test tells it to.
    pub async fn start() -> Self {
        Self::app("fastapi", 0, &[]).await
    }

    /// `tests/backends/{app}/app.py` on `port`, or on one that the system chooses if that is 0.
    pub async fn app(app: &str, port: u16, environment: &[(&str, &str)]) -> Self {
        let port = port.to_string();
        let uvicorn = ["uvicorn", "app:app", "--host", "127.0.0.1", "--no-use-colors", "--port", &port];
        Self::run(app, &uvicorn, environment).await
    }

    /// The same of an application that is Flask's.
    pub async fn flask(app: &str, environment: &[(&str, &str)]) -> Self {
        Self::run(app, &["flask", "--app", "app", "run", "--host", "127.0.0.1", "--port", "0"], environment).await
    }

    /// Runs this module in the folder of `app`.
    async fn run(app: &str, module: &[&str], environment: &[(&str, &str)]) -> Self {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let python = root.join(".venv/bin/python");
        assert!(python.exists(), "no Python environment: run scripts/setup test");
        let mut child = Command::new(python)
            .arg("-m")
            .args(module)
            .current_dir(root.join("tests/backends").join(app))
            .env("PYTHONDONTWRITEBYTECODE", "1")
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("Python runs");
        let log = BufReader::new(child.stderr.take().unwrap());
        let (found, mut address) = mpsc::unbounded_channel();
        let mut backend = Self { child, address: ([127, 0, 0, 1], 0).into() };
        // Reads to the end, so that the server never waits for a full pipe; libtest shows it where the test failed.
        thread::spawn(move || {
            for line in log.lines().map_while(Result::ok) {
                if let Some((_, rest)) = line.split_once("unning on http://") {
                    found.send(rest.split(' ').next().unwrap().parse().unwrap()).ok();
                } else {
                    eprintln!("python: {line}");
                }
            }
        });
        backend.address = within("the application", address.recv()).await.expect("it starts (its output is above)");
        backend
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Where another one may take its place.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// Sends the process a signal: STOP hangs it, KILL ends it with all its connections.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process is there");
    }

    /// Asks the application itself, past the proxy.
    pub async fn ask(&self, request: impl AsRef<[u8]>) -> Message {
        Wire::ask(self.address, request).await
    }

    /// Lets `stream` send its next event, or end when `event` is empty.
    pub async fn next(&self, stream: &str, event: &str) {
        let length = event.len();
        let request =
            format!("POST /next/{stream} HTTP/1.1\r\nhost: backend\r\ncontent-length: {length}\r\n\r\n{event}");
        assert_eq!(self.ask(request).await.status(), 204);
    }

    /// Waits until `stream` is `begun`, `done` or `cancelled`.
    pub async fn until(&self, stream: &str, state: &str) {
        let answer = self.ask(format!("GET /state/{stream}/{state} HTTP/1.1\r\nhost: backend\r\n\r\n")).await;
        assert_eq!(answer.status(), 204);
    }
}

impl Drop for Fastapi {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}
