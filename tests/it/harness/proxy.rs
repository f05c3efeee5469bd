//! The real binary, on ports that the system chooses.

use std::{
    env,
    fmt::Write as _,
    fs,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::{self, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, mpsc},
    thread,
    time::Duration,
};

use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;
use tokio::sync::watch;

use super::{Message, PATIENCE, Wire, within};

/// A running sidegate. Dropped, it is asked to end and must do so in order; what it logged is shown
/// where the test failed.
pub struct Proxy {
    child: Child,
    log: Log,
    /// Ends when the process's output does, which is when the process has ended.
    over: mpsc::Receiver<()>,
    directory: TempDir,
    address: Option<SocketAddr>,
    gone: bool,
}

/// What is run: the binary that the tests are built with, or the one of the environment variable `TESTED_BINARY`, for
/// figures of a release build.
fn binary() -> PathBuf {
    given_binary().unwrap_or_else(|| env!("CARGO_BIN_EXE_sidegate").into())
}

/// The binary of `TESTED_BINARY`, if it is set. It is taken for an optimized one.
pub fn given_binary() -> Option<PathBuf> {
    env::var_os("TESTED_BINARY").map(|path| path::absolute(path).expect("a path"))
}

/// All lines that the process wrote so far.
#[derive(Clone)]
struct Log {
    lines: Arc<Mutex<Vec<String>>>,
    count: watch::Receiver<usize>,
}

impl Proxy {
    /// Runs the file `yaml` with what it leaves out: ports chosen by the system, JSON log lines, a short drain.
    pub async fn start(yaml: &str) -> Self {
        let mut proxy = Self::spawn_file(yaml);
        proxy.find_address().await;
        proxy
    }

    /// As [`start`](Self::start), with `UPSTREAM` in the file standing for `url`, and an upstream `api` of that
    /// URL where the file has none.
    pub async fn before(url: &str, yaml: &str) -> Self {
        let mut proxy = Self::spawn_before(url, yaml);
        proxy.find_address().await;
        proxy
    }

    /// As [`before`](Self::before), without waiting for its listeners.
    pub fn spawn_before(url: &str, yaml: &str) -> Self {
        let mut file = yaml.replace("UPSTREAM", url);
        if !has_key(&file, "upstreams") {
            file = format!("upstreams: {{ api: {{ endpoints: [\"{url}\"] }} }}\n{file}");
        }
        Self::spawn_file(&file)
    }

    /// Runs `sidegate --upstream URL`, without a file.
    pub async fn upstream(url: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let mut proxy =
            Self::spawn(directory, &["--upstream", url, "--listen", "127.0.0.1:0", "--admin", "127.0.0.1:0"], &[]);
        proxy.find_address().await;
        proxy
    }

    /// Runs the file without waiting for its listeners.
    pub fn spawn_file(yaml: &str) -> Self {
        Self::spawn_file_with(yaml, &[])
    }

    /// As [`start`](Self::start), with these environment variables.
    pub async fn start_with(yaml: &str, variables: &[(&str, &str)]) -> Self {
        let mut proxy = Self::spawn_file_with(yaml, variables);
        proxy.find_address().await;
        proxy
    }

    fn spawn_file_with(yaml: &str, variables: &[(&str, &str)]) -> Self {
        let directory = TempDir::new().unwrap();
        let path = directory.path().join("sidegate.yaml");
        fs::write(&path, with_defaults(yaml)).unwrap();
        Self::spawn(directory, &["run", path.to_str().unwrap()], variables)
    }

    fn spawn(directory: TempDir, arguments: &[&str], variables: &[(&str, &str)]) -> Self {
        let mut child = Command::new(binary())
            .args(arguments)
            .envs(variables.iter().copied())
            .current_dir(directory.path())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary runs");
        let lines = Arc::new(Mutex::new(Vec::new()));
        let (counted, count) = watch::channel(0);
        let (ended, over) = mpsc::channel();
        let outputs: [Box<dyn Read + Send>; 2] =
            [Box::new(child.stdout.take().unwrap()), Box::new(child.stderr.take().unwrap())];
        for output in outputs {
            let (lines, counted, ended) = (Arc::clone(&lines), counted.clone(), ended.clone());
            thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    let mut lines = lines.lock();
                    lines.push(line);
                    counted.send_replace(lines.len());
                }
                drop(ended);
            });
        }
        Self { child, log: Log { lines, count }, over, directory, address: None, gone: false }
    }

    async fn find_address(&mut self) {
        let line = self.line("listening").await;
        self.address = line["address"].as_str().expect("an address").parse().ok();
    }

    /// Where the first listener is.
    pub fn address(&self) -> SocketAddr {
        self.address.expect("the first listener is a TCP one")
    }

    /// Where the admin port is.
    pub async fn admin(&self) -> SocketAddr {
        self.line("admin listening").await["address"].as_str().unwrap().parse().unwrap()
    }

    /// Asks the first listener, over a connection of its own.
    pub async fn ask(&self, request: impl AsRef<[u8]>) -> Message {
        Wire::ask(self.address(), request).await
    }

    /// `GET path` on the first listener.
    pub async fn get(&self, path: &str) -> Message {
        self.ask(format!("GET {path} HTTP/1.1\r\nhost: sidegate.test\r\n\r\n")).await
    }

    /// `POST path` on the admin port.
    pub async fn admin_post(&self, path: &str) -> Message {
        self.admin_post_with(path, "").await
    }

    /// `POST path` on the admin port, with more header fields, each ended by a CRLF.
    pub async fn admin_post_with(&self, path: &str, fields: &str) -> Message {
        let request = format!("POST {path} HTTP/1.1\r\nhost: localhost\r\n{fields}content-length: 0\r\n\r\n");
        Wire::ask(self.admin().await, request).await
    }

    /// `DELETE path` on the admin port.
    pub async fn admin_delete(&self, path: &str) -> Message {
        Wire::ask(self.admin().await, format!("DELETE {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await
    }

    /// `GET path` on the admin port.
    pub async fn admin_get(&self, path: &str) -> Message {
        Wire::ask(self.admin().await, format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n")).await
    }

    /// The value of one counter or gauge on `/metrics`, named with its labels; 0 where there is none.
    pub async fn sample(&self, series: &str) -> i64 {
        let metrics = self.admin_get("/metrics").await.text();
        let line = metrics.lines().find_map(|line| line.strip_prefix(series)?.strip_prefix(' '));
        line.map_or(0, |value| value.parse().unwrap())
    }

    /// A connection to the first listener.
    pub async fn connect(&self) -> Wire {
        Wire::to(self.address()).await
    }

    /// A file beside the configuration, which runs in the same directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Replaces the configuration file in one step; nobody is told.
    pub fn rewrite(&self, yaml: &str) {
        let next = self.path("next.yaml");
        fs::write(&next, with_defaults(yaml)).unwrap();
        fs::rename(next, self.path("sidegate.yaml")).unwrap();
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("the process is there");
    }

    /// The first log line with this `msg`.
    pub async fn line(&self, msg: &str) -> Value {
        self.log.find(msg, |line| line["msg"] == msg).await
    }

    /// The first log line with this `msg` that meets `condition`.
    pub async fn line_where(&self, msg: &str, condition: impl Fn(&Value) -> bool) -> Value {
        self.log.find(msg, |line| line["msg"] == msg && condition(line)).await
    }

    /// The access line of a request, which is written when its response has ended.
    pub async fn access_line(&self, request_id: &str) -> Value {
        let is = |line: &Value| line["request_id"] == request_id && !line["duration_ms"].is_null();
        self.log.find(&format!("the access line of {request_id}"), is).await
    }

    /// Everything that was logged so far.
    pub fn logged(&self) -> String {
        self.log.lines.lock().join("\n")
    }

    /// Memory that the process holds, in KiB.
    pub fn resident(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id())).expect("/proc");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).expect("VmRSS");
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    /// Waits until the process has nothing to do: what it was sent it has read, and has gone as far as it can go.
    pub async fn idle(&self) {
        let sleeps = |thread: &fs::DirEntry| {
            let stat = fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
            // The name before it, in parentheses, may have any character.
            stat.rsplit_once(')').is_none_or(|(_, rest)| rest.starts_with(" S"))
        };
        let mut looks = 0;
        while looks < 3 {
            let threads = fs::read_dir(format!("/proc/{}/task", self.id())).expect("/proc");
            looks = if threads.map_while(Result::ok).all(|thread| sleeps(&thread)) { looks + 1 } else { 0 };
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    /// How many file descriptors the process holds.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.id())).expect("/proc").count()
    }

    /// The process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Asks the process to end and waits until it has.
    pub async fn stop(self) -> (ExitStatus, String) {
        self.signal(Signal::TERM);
        self.exit().await
    }

    /// Waits until the process has ended.
    pub async fn exit(mut self) -> (ExitStatus, String) {
        let mut count = self.log.count.clone();
        within("the process to end", async { while count.changed().await.is_ok() {} }).await;
        self.gone = true;
        (self.child.wait().unwrap(), self.logged())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let failed = thread::panicking();
        if !self.gone {
            if !failed {
                self.signal(Signal::TERM);
            }
            let ended =
                !failed && matches!(self.over.recv_timeout(PATIENCE), Err(mpsc::RecvTimeoutError::Disconnected));
            if !ended {
                self.child.kill().ok();
            }
            let status = self.child.wait();
            if !failed {
                assert!(ended, "asked to end, it did not:\n{}", self.logged());
                let status = status.unwrap();
                assert!(status.success(), "it ended with {status}:\n{}", self.logged());
            }
        }
        if failed {
            eprintln!("--- sidegate logged:\n{}\n---", self.logged());
        }
    }
}

impl Log {
    async fn find(&self, what: &str, is: impl Fn(&Value) -> bool) -> Value {
        let mut count = self.count.clone();
        let mut looked_at = 0;
        within(what, async {
            loop {
                let now = *count.borrow_and_update();
                while looked_at < now {
                    let line = self.lines.lock()[looked_at].clone();
                    looked_at += 1;
                    if let Ok(line) = serde_json::from_str(&line)
                        && is(&line)
                    {
                        return line;
                    }
                }
                if count.changed().await.is_err() && *count.borrow() == looked_at {
                    let lines = self.lines.lock().join("\n");
                    panic!("the process ended without {what}; it wrote:\n{lines}");
                }
            }
        })
        .await
    }
}

fn has_key(yaml: &str, key: &str) -> bool {
    yaml.lines().any(|line| line.strip_prefix(key).is_some_and(|rest| rest.starts_with(':')))
}

fn with_defaults(yaml: &str) -> String {
    let mut file = String::new();
    for (key, value) in [
        ("listen", "127.0.0.1:0"),
        ("admin", "{ listen: 127.0.0.1:0 }"),
        ("log", "{ format: json }"),
        ("drain", "{ timeout: 2s }"),
    ] {
        if !has_key(yaml, key) {
            writeln!(file, "{key}: {value}").unwrap();
        }
    }
    file + yaml
}
