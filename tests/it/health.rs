//! Endpoints that are not up are found out, left alone, and come back.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::harness::{
    Backend, Proxy, Wire,
    backend::Recorder,
    client::{HEADERS, RawHttp2},
    eventually,
};

const GET: &str = "GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n";

/// A backend that is well, or answers everything with 503.
struct Patient {
    url: String,
    well: Arc<AtomicBool>,
    /// Requests that were none of a check.
    asked: Arc<AtomicUsize>,
    /// Heads of checks.
    checks: Arc<parking_lot::Mutex<Vec<String>>>,
    _tasks: JoinSet<()>,
}

impl Patient {
    async fn start(well: bool) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let well = Arc::new(AtomicBool::new(well));
        let (asked, checks) = (Arc::new(AtomicUsize::new(0)), Arc::new(parking_lot::Mutex::new(Vec::new())));
        let mut tasks = JoinSet::new();
        let (is_well, counted, noted) = (well.clone(), asked.clone(), checks.clone());
        tasks.spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (is_well, counted, noted) = (is_well.clone(), counted.clone(), noted.clone());
                connections.spawn(async move {
                    let mut wire = Wire::new(stream);
                    while wire.another().await {
                        let head = wire.head().await;
                        if head.start.contains("/healthz") {
                            noted.lock().push(format!("{} {:?}", head.start, head.get("host")));
                        } else {
                            counted.fetch_add(1, Ordering::Relaxed);
                        }
                        let status = if is_well.load(Ordering::Relaxed) { "200 OK" } else { "503 Service Unavailable" };
                        let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 2\r\n\r\nok");
                        if wire.try_send(answer.as_bytes()).await.is_err() {
                            return;
                        }
                    }
                });
            }
        });
        Self { url, well, asked, checks, _tasks: tasks }
    }

    fn asked(&self) -> usize {
        self.asked.load(Ordering::Relaxed)
    }

    fn name(&self) -> &str {
        self.url.trim_start_matches("http://")
    }
}

const ACTIVE: &str = "active: { path: /healthz, interval: 100ms, jitter: 0s, timeout: 1s, healthy: 2, unhealthy: 2 }";

fn file(endpoints: &[&str], health: &str, balance: &str) -> String {
    let endpoints = endpoints.join(", ");
    format!("upstreams: {{ api: {{ endpoints: [{endpoints}], health: {{ {health} }}, balance: {{ {balance} }} }} }}")
}

/// What `GET /health/upstreams` shows of an endpoint.
async fn health(proxy: &Proxy, name: &str) -> Value {
    let all = proxy.admin_get("/health/upstreams").await.json();
    let endpoints = all["upstreams"][0]["endpoints"].as_array().expect("endpoints").clone();
    endpoints.into_iter().find(|endpoint| endpoint["endpoint"] == name).expect("the endpoint")
}

async fn is(proxy: &Proxy, name: &str, status: &str) {
    eventually(status, async || health(proxy, name).await["health"] == status).await;
}

async fn ask(proxy: &Proxy, n: usize) {
    let mut client = proxy.connect().await;
    for _ in 0..n {
        client.send(GET).await;
        assert_eq!(client.answer().await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn checks_take_an_endpoint_out_and_bring_it_back_slowly() {
    let (ill, well) = (Patient::start(true).await, Patient::start(true).await);
    let balance = "algorithm: round_robin, slow_start: 1h";
    let proxy = Proxy::start(&file(&[&ill.url, &well.url], ACTIVE, balance)).await;
    ask(&proxy, 10).await;
    assert_eq!((ill.asked(), well.asked()), (5, 5), "up until something says otherwise, and at once");

    ill.well.store(false, Ordering::Relaxed);
    is(&proxy, ill.name(), "down").await;
    let line = proxy.line("endpoint down").await;
    assert_eq!((&line["endpoint"], &line["error"]), (&json!(ill.name()), &json!("status 503")), "{line}");
    let shown = health(&proxy, ill.name()).await;
    assert_eq!((&shown["last_check"]["passed"], &shown["last_check"]["error"]), (&json!(false), &json!("status 503")));
    ask(&proxy, 10).await;
    assert_eq!((ill.asked(), well.asked()), (5, 15));
    let healthy = format!("sidegate_endpoint_healthy{{upstream=\"api\",endpoint=\"{}\"}}", ill.name());
    assert_eq!(proxy.sample(&healthy).await, 0);

    ill.well.store(true, Ordering::Relaxed);
    is(&proxy, ill.name(), "up").await;
    assert_eq!(proxy.sample(&healthy).await, 1);
    ask(&proxy, 60).await;
    let back = ill.asked() - 5;
    assert!(back < 25, "a tenth of its share and not half of all: {back} of 60");
    let all = proxy.admin_get("/upstreams").await.json();
    let weights: Vec<_> = all["upstreams"][0]["endpoints"].as_array().unwrap().iter().collect();
    assert!(weights[0]["effective_weight"].as_f64().unwrap() < 0.2, "{all}");
    assert_eq!(weights[1]["effective_weight"], 1.0, "who was there from the start has all of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_is_no_request() {
    let well = Patient::start(true).await;
    let health = "active: { path: \"/healthz?a=b\", interval: 100ms, jitter: 0s, host: health.test }";
    let limits = "defaults: { body_limit: { max: 1KiB } }";
    let proxy = Proxy::start(&format!("{}\n{limits}", file(&[&well.url], health, ""))).await;
    eventually("three checks", async || well.checks.lock().len() >= 3).await;
    ask(&proxy, 1).await;
    assert_eq!(well.checks.lock()[0], "GET /healthz?a=b HTTP/1.1 Some(\"health.test\")");
    let passed =
        format!("sidegate_health_checks_total{{upstream=\"api\",endpoint=\"{}\",outcome=\"passed\"}}", well.name());
    assert!(proxy.sample(&passed).await >= 2);
    let attempts = format!(
        "sidegate_upstream_attempts_total{{upstream=\"api\",endpoint=\"{}\",outcome=\"answered\"}}",
        well.name()
    );
    assert_eq!(proxy.sample(&attempts).await, 1, "the request alone");
    let (_, logged) = proxy.stop().await;
    assert!(!logged.contains("healthz"), "{logged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn header_fields_of_a_check_are_secrets() {
    let backend = Recorder::ok().await;
    let health = "active: { interval: 100ms, headers: { authorization: Bearer hush, x-key: { file: hush.txt } } }";
    let upstreams = format!("upstreams: {{ api: {{ endpoints: [\"{}\"], health: {{ {health} }} }} }}", backend.url());
    let proxy = Proxy::spawn_file(&upstreams);
    let (status, told) = proxy.exit().await;
    assert_eq!(status.code(), Some(78));
    assert!(told.contains("upstreams.api.health.active.headers.x-key: `hush.txt` cannot be read"), "{told}");

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "hush too\n").unwrap();
    let proxy = Proxy::start(&upstreams.replace("hush.txt", file.path().to_str().unwrap())).await;
    eventually("a check", async || !backend.requests().is_empty()).await;
    let check = backend.requests().remove(0).head;
    assert_eq!((check.get("authorization"), check.get("x-key")), (Some("Bearer hush"), Some("hush too")));

    let config = proxy.admin_get("/config").await;
    assert!(!config.text().contains("hush"), "{}", config.text());
    let shown = config.json()["effective"]["upstreams"]["api"]["health"]["active"]["headers"].clone();
    assert_eq!(shown, json!({ "authorization": "[redacted]", "x-key": { "file": file.path() } }));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_is_a_check_too() {
    let (there, gone) = (Backend::start().await, Backend::nowhere().await);
    let health = "active: { kind: tcp, interval: 100ms, unhealthy: 1 }";
    let proxy = Proxy::start(&file(&[&there.url(), &gone], health, "")).await;
    is(&proxy, gone.trim_start_matches("http://"), "down").await;
    is(&proxy, there.url().trim_start_matches("http://"), "up").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_all_down_there_is_none_unless_that_is_a_panic() {
    let (one, other) = (Patient::start(false).await, Patient::start(false).await);
    let endpoints = [&*one.url, &other.url];
    let never = file(&endpoints, ACTIVE, "panic_threshold: 0");
    let proxy = Proxy::start(&never).await;
    is(&proxy, one.name(), "down").await;
    is(&proxy, other.name(), "down").await;
    let refused = proxy.get("/").await;
    let kind = refused.json()["type"].clone();
    assert_eq!((refused.status(), kind), (503, json!("urn:sidegate:problem:no-healthy-endpoint")));
    assert_eq!((one.asked(), other.asked()), (0, 0));

    proxy.rewrite(&file(&endpoints, ACTIVE, "panic_threshold: 50"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert_eq!(health(&proxy, one.name()).await["health"], "down", "what is known is kept");
    assert_eq!(proxy.get("/").await.text(), "ok", "asked all the same, and its 503 passed on");
    assert_eq!(proxy.sample(r#"sidegate_balance_picks_total{upstream="api",outcome="panic"}"#).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_fail_in_a_row_are_a_sign_too() {
    let (ill, well) = (Patient::start(false).await, Patient::start(true).await);
    let passive = "passive: { failures: 3, for: 500ms }";
    let proxy = Proxy::start(&file(&[&ill.url, &well.url], passive, "algorithm: round_robin")).await;
    let mut statuses = Vec::new();
    for _ in 0..20 {
        statuses.push(proxy.get("/").await.status());
    }
    assert_eq!(statuses.iter().filter(|status| **status == 503).count(), 3, "{statuses:?}");
    let line = proxy.line("endpoint ejected").await;
    assert_eq!(line["endpoint"], ill.name(), "{line}");
    ill.well.store(true, Ordering::Relaxed);
    is(&proxy, ill.name(), "up").await;
    let before = ill.asked();
    ask(&proxy, 10).await;
    assert!(ill.asked() > before, "it is asked again");

    // The last one is never left alone.
    ill.well.store(false, Ordering::Relaxed);
    well.well.store(false, Ordering::Relaxed);
    for _ in 0..20 {
        assert_eq!(proxy.get("/").await.text(), "ok", "answered by an endpoint");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_keeps_health_and_a_check_that_is_gone_keeps_nobody_out() {
    let (ill, well) = (Patient::start(false).await, Recorder::ok().await);
    let weighted = format!("{{ url: \"{}\", weight: 9 }}", ill.url);
    let proxy = Proxy::start(&file(&[&ill.url, &well.url()], ACTIVE, "")).await;
    is(&proxy, ill.name(), "down").await;
    let slower = "active: { path: /healthz, interval: 1h }";
    proxy.rewrite(&file(&[&weighted, &well.url()], slower, ""));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert_eq!(health(&proxy, ill.name()).await["health"], "down", "with another weight and other checks");
    ask(&proxy, 5).await;
    assert_eq!(ill.asked(), 0);
    proxy.rewrite(&file(&[&ill.url, &well.url()], "passive: {}", ""));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    assert_eq!(health(&proxy, ill.name()).await["health"], "up");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_check_is_over_a_connection_of_its_own_with_http2_too() {
    let backend = Backend::start().await;
    let yaml = "upstreams: { api: { endpoints: [UPSTREAM], protocol: http2, balance: { panic_threshold: 0 }, health: { \
                active: { interval: 100ms, jitter: 0s, timeout: 300ms, healthy: 1, unhealthy: 1 } } } }";
    let proxy = Proxy::before(&backend.url(), yaml).await;
    let endpoint = backend.address().to_string();
    // It hangs; those that follow do not.
    let _hangs = backend.accept().await;
    is(&proxy, &endpoint, "down").await;
    for _ in 0..3 {
        let mut check = RawHttp2::serving(backend.accept().await).await;
        assert_eq!(check.frame().await.kind, HEADERS);
        check.send(HEADERS, 5, 1, &[0x88]).await;
    }
    is(&proxy, &endpoint, "up").await;
}
