//! A page of another origin in a real browser: what it may read, and what it may not.

use std::{
    io::{BufRead, BufReader},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::Arc,
    thread,
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::Request,
    response::{Html, Response},
    routing::{get, post},
};
use http::{HeaderValue, Method, request::Parts};
use parking_lot::Mutex;
use rustix::process::{Pid, Signal, kill_process_group};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::mpsc, task::JoinSet, time::timeout};

use crate::harness::{
    Proxy,
    backend::{BodySender, body},
};

/// How long a browser may take for a step, its own start included. It only passes when the test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A headless Chromium with a profile of its own. Dropped, it is killed with all its processes.
struct Browser {
    child: Child,
    log: Arc<Mutex<String>>,
    /// Ends when the last of its processes has closed the output.
    over: std::sync::mpsc::Receiver<()>,
    /// Goes last, when nobody writes into it any more.
    _directory: TempDir,
}

impl Browser {
    fn open(url: &str) -> Self {
        let directory = TempDir::new().unwrap();
        let child = Command::new("chromium")
            // Its sandbox needs what containers do not give, and the page is our own.
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-component-update"])
            .args(["--disable-sync", "--disable-breakpad", "--disable-crash-reporter"])
            .arg(format!("--user-data-dir={}", directory.path().join("profile").display()))
            .arg(url)
            .env("HOME", directory.path())
            .env("TMPDIR", directory.path())
            .env_remove("DISPLAY")
            .current_dir(directory.path())
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn();
        let mut child = child.unwrap_or_else(|error| panic!("chromium: {error}; `scripts/setup test` installs it"));
        let output = BufReader::new(child.stderr.take().unwrap());
        let log = Arc::new(Mutex::new(String::new()));
        let (ended, over) = std::sync::mpsc::channel();
        let written = log.clone();
        thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                let mut written = written.lock();
                written.push_str(&String::from_utf8_lossy(&line));
                written.push('\n');
            }
            drop(ended);
        });
        Self { child, log, over, _directory: directory }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        kill_process_group(Pid::from_child(&self.child), Signal::KILL).ok();
        self.child.wait().ok();
        self.over.recv_timeout(PATIENCE).ok();
        if thread::panicking() {
            eprintln!("--- chromium logged:\n{}\n---", self.log.lock());
        }
    }
}

/// The page's own server, and in the same process the backend of sidegate.
struct Site {
    port: u16,
    reports: mpsc::UnboundedReceiver<Value>,
    streams: mpsc::UnboundedReceiver<BodySender>,
    asked: Arc<Mutex<Vec<Parts>>>,
    _task: JoinSet<()>,
}

impl Site {
    async fn start() -> Self {
        let (reported, reports) = mpsc::unbounded_channel();
        let (streamed, streams) = mpsc::unbounded_channel();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let all = asked.clone();
        let kept = move |request: Request| all.lock().push(request.into_parts().0);
        let of_streams = kept.clone();
        let report = async move |body: Bytes| drop(reported.send(serde_json::from_slice(&body).unwrap()));
        let stream = async move |request| {
            of_streams(request);
            let (sender, body) = body();
            streamed.send(sender).ok();
            Response::builder()
                .header("content-type", "text/event-stream")
                .header("x-of-the-backend", "for others")
                .body(Body::new(body))
                .unwrap()
        };
        let page = async || Html(include_str!("browser.html"));
        let router = Router::new()
            .route("/page", get(page))
            .route("/stranger", get(page))
            .route("/report", post(report))
            .route("/stream", get(stream))
            .fallback(async move |request| {
                kept(request);
                "ok"
            });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let mut task = JoinSet::new();
        task.spawn(async move { axum::serve(listener, router).await.unwrap() });
        Self { port, reports, streams, asked, _task: task }
    }

    /// What the page found out in this step, which is the next.
    async fn report(&mut self, step: &str) -> Value {
        let report = timeout(PATIENCE, self.reports.recv()).await;
        let report = report.unwrap_or_else(|_| panic!("waited {PATIENCE:?} in vain for the page: {step}")).unwrap();
        assert_eq!(report["step"], step, "{report}");
        report
    }

    /// What the backend was asked by this method.
    fn asked(&self, method: &Method, path: &str) -> Vec<Parts> {
        let asked = self.asked.lock();
        asked.iter().filter(|head| head.method == *method && head.uri.path() == path).cloned().collect()
    }
}

/// The fields that the page may read.
fn readable(report: &Value) -> Vec<&str> {
    report["fields"].as_object().unwrap().keys().map(String::as_str).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_page_reads_what_its_origin_may_while_it_streams() {
    let mut site = Site::start().await;
    let port = site.port;
    let settings = format!(
        "
defaults:
  session: {{}}
  rate_limit: [{{ name: many, key: session, limit: 1000/h }}]
  cors: {{ origins: ['http://127.0.0.1:{port}'], methods: [GET, PUT], headers: [x-custom], credentials: true }}
routes:
  - {{ match: {{ path: /limited }}, upstream: api, rate_limit: [{{ name: few, key: session, limit: 1/h }}] }}
  - {{ match: {{ path: /elsewhere }}, upstream: api, cors: {{ origins: [https://elsewhere.example], credentials: true }} }}
  - {{ upstream: api }}
"
    );
    let proxy = Proxy::before(&format!("http://127.0.0.1:{port}"), &settings).await;
    let _browser = Browser::open(&format!("http://127.0.0.1:{port}/page#{}", proxy.address()));
    site.report("begun").await;

    // The stream goes on once the page has read its beginning.
    let stream = timeout(PATIENCE, site.streams.recv()).await.expect("the page asks for the stream").unwrap();
    stream.data("data: one\n\n").await;
    let first = site.report("first chunk").await;
    assert_eq!((&first["text"], &first["type"]), (&json!("data: one\n\n"), &json!("cors")), "{first}");
    stream.data("data: two\n\n").await;
    stream.data("data: three\n\n").await;
    stream.finish();
    assert_eq!(site.report("end").await["text"], "data: two\n\ndata: three\n\n");
    let exposed = ["content-type", "ratelimit", "ratelimit-policy", "x-request-id"];
    assert!(exposed.iter().all(|name| readable(&first).contains(name)), "{first}");
    assert!(!readable(&first).contains(&"x-of-the-backend"), "{first}");
    assert!(first["fields"]["ratelimit"].as_str().unwrap().starts_with("\"many\";r=999;t="), "{first}");
    proxy.access_line(first["fields"]["x-request-id"].as_str().unwrap()).await;

    let plain = site.report("plain").await;
    assert_eq!((&plain["status"], &plain["text"]), (&json!(200), &json!("ok")), "{plain}");
    let session = |path: &str| site.asked(&Method::GET, path)[0].headers["x-session-id"].clone();
    assert_eq!(session("/plain"), session("/stream"), "the browser has kept the cookie and shows it");

    assert_eq!(site.report("within the limit").await["status"], 200);
    let over = site.report("over the limit").await;
    assert_eq!((&over["status"], &over["type"]), (&json!(429), &json!("cors")), "{over}");
    let wait: u64 = over["fields"]["retry-after"].as_str().expect("Retry-After").parse().unwrap();
    assert!((1..=7200).contains(&wait), "{over}");
    let problem: Value = serde_json::from_str(over["text"].as_str().unwrap()).unwrap();
    assert_eq!(problem["type"], "urn:sidegate:problem:rate-limited");

    assert_eq!(site.report("elsewhere").await["error"], "TypeError");
    assert_eq!(site.report("elsewhere, unread").await["type"], "opaque", "it is there, but not to be read");

    let allowed = site.report("allowed field").await;
    assert_eq!((&allowed["status"], &allowed["text"]), (&json!(200), &json!("ok")), "{allowed}");
    assert_eq!(site.report("other field").await["error"], "TypeError");
    let put = site.asked(&Method::PUT, "/put");
    assert_eq!(
        (put.len(), &put[0].headers["x-custom"]),
        (1, &HeaderValue::from_static("a")),
        "the preflight stops the other"
    );
    assert_eq!(site.asked(&Method::OPTIONS, "/put").len(), 0, "preflights are answered by sidegate");

    let before = site.asked(&Method::GET, "/plain").len();
    assert_eq!(site.report("stranger").await["error"], "TypeError");
    assert_eq!(site.asked(&Method::GET, "/plain").len(), before + 1, "it was asked, but not read");
}
