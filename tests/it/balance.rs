//! Requests go to several endpoints: by weight, by what is in flight, by a key; and around those that fail.

use std::collections::HashMap;

use futures_util::future::join_all;
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet, time::Duration};

use crate::harness::{Backend, Proxy, Wire, backend::Recorder, eventually};

const GET: &str = "GET / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n";
const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// A file with the upstream `api` of these endpoints.
fn file(endpoints: &[String], more: &str, rest: &str) -> String {
    format!("upstreams: {{ api: {{ endpoints: [{}]{more} }} }}\n{rest}", endpoints.join(", "))
}

fn weighted(url: &str, weight: u32) -> String {
    format!("{{ url: \"{url}\", weight: {weight} }}")
}

fn name(url: &str) -> &str {
    url.trim_start_matches("http://")
}

/// What `GET /upstreams` shows of each endpoint, by its name.
async fn shown(proxy: &Proxy) -> HashMap<String, Value> {
    let all = proxy.admin_get("/upstreams").await.json();
    let endpoints = all["upstreams"][0]["endpoints"].as_array().expect("endpoints").clone();
    endpoints.into_iter().map(|endpoint| (endpoint["endpoint"].as_str().unwrap().to_owned(), endpoint)).collect()
}

/// A backend that takes this long for each answer.
async fn slow(after: Duration) -> (String, JoinSet<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let mut wire = Wire::new(stream);
                while wire.another().await {
                    wire.head().await;
                    tokio::time::sleep(after).await;
                    if wire.try_send(OK.as_bytes()).await.is_err() {
                        return;
                    }
                }
            });
        }
    });
    (url, tasks)
}

/// Asks `n` times over one connection.
async fn ask(proxy: &Proxy, n: usize, request: &str) {
    let mut client = proxy.connect().await;
    for _ in 0..n {
        client.send(request).await;
        assert_eq!(client.answer().await.status(), 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn several_endpoints_share_by_their_weight() {
    for algorithm in ["round_robin", "random", "least_requests"] {
        let (heavy, light, none) = (Recorder::ok().await, Recorder::ok().await, Recorder::ok().await);
        let endpoints = [weighted(&heavy.url(), 3), format!("\"{}\"", light.url()), weighted(&none.url(), 0)];
        let proxy = Proxy::start(&file(&endpoints, &format!(", balance: {{ algorithm: {algorithm} }}"), "")).await;
        ask(&proxy, 200, GET).await;
        let (heavy, light) = (heavy.requests().len(), light.requests().len());
        assert!((120..=175).contains(&heavy), "{algorithm}: {heavy} and {light} of 200");
        assert_eq!((heavy + light, none.requests().len()), (200, 0), "{algorithm}");
        assert_eq!(proxy.sample(r#"sidegate_balance_picks_total{upstream="api",outcome="picked"}"#).await, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_section_all_endpoints_are_asked() {
    let (one, other) = (Recorder::ok().await, Recorder::ok().await);
    let proxy = Proxy::start(&file(&[one.url(), other.url()], "", "")).await;
    ask(&proxy, 60, GET).await;
    assert!(one.requests().len() > 10 && other.requests().len() > 10);
    let effective = proxy.admin_get("/config").await.json()["effective"].clone();
    assert_eq!(effective["upstreams"]["api"]["balance"]["algorithm"], "least_requests", "{effective}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_goes_to_one_endpoint_and_who_has_none_to_any() {
    let backends = [Recorder::ok().await, Recorder::ok().await, Recorder::ok().await];
    let endpoints: Vec<_> = backends.iter().map(Recorder::url).collect();
    let hash = ", balance: { algorithm: hash, hash: \"header:x-session-id\" }";
    let proxy = Proxy::start(&file(&endpoints, hash, "")).await;
    for session in 0..30 {
        ask(&proxy, 3, &format!("GET / HTTP/1.1\r\nhost: sidegate.test\r\nx-session-id: s{session}\r\n\r\n")).await;
    }
    let mut homes: HashMap<String, usize> = HashMap::new();
    for (n, backend) in backends.iter().enumerate() {
        let requests = backend.requests();
        assert!(!requests.is_empty(), "each endpoint has some");
        for request in requests {
            let session = request.head.get("x-session-id").unwrap().to_owned();
            assert_eq!(*homes.entry(session.clone()).or_insert(n), n, "{session} has moved");
        }
    }
    assert_eq!(homes.len(), 30);
    ask(&proxy, 5, GET).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_endpoint_gets_less() {
    for algorithm in ["least_requests", "peak_ewma"] {
        let fast = Recorder::ok().await;
        let (url, _slow) = slow(Duration::from_millis(150)).await;
        let balance = format!(", balance: {{ algorithm: {algorithm} }}");
        let proxy = Proxy::start(&file(&[url.clone(), fast.url()], &balance, "")).await;
        join_all((0..4).map(|_| ask(&proxy, 25, GET))).await;
        let fast = fast.requests().len();
        assert!(fast > 75, "{algorithm}: {fast} of 100");
        let shown = shown(&proxy).await;
        let (slow, fast) = (&shown[name(&url)]["first_byte_ms"], shown.len());
        assert!(fast == 2 && (slow.is_null() || slow.as_f64().unwrap() >= 100.0), "{shown:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_hangs_where_clients_lose_patience_looks_slow() {
    let (hangs, other) = (Backend::start().await, Backend::nowhere().await);
    let endpoints = [hangs.url(), weighted(&other, 0)];
    let proxy = Proxy::start(&file(&endpoints, ", balance: { algorithm: peak_ewma }", "")).await;
    for (request, patience) in
        [(GET, 100_u32), ("POST / HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 1\r\n\r\na", 300)]
    {
        let mut client = proxy.connect().await;
        client.send(request).await;
        let (mut upstream, _) = hangs.accept_head().await;
        tokio::time::sleep(Duration::from_millis(patience.into())).await;
        client.leave(true);
        upstream.rest().await;
        let looks = async || shown(&proxy).await[name(&hangs.url())]["first_byte_ms"].as_f64();
        eventually("it to look slow", async || looks().await.is_some_and(|ms| ms >= 0.9 * f64::from(patience))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_in_flight_until_it_ends_or_its_client_leaves() {
    let (one, other) = (Backend::start().await, Backend::nowhere().await);
    let endpoints = [one.url(), weighted(&other, 0)];
    let proxy = Proxy::start(&file(&endpoints, "", "")).await;
    let series = format!("sidegate_endpoint_in_flight{{upstream=\"api\",endpoint=\"{}\"}}", name(&one.url()));
    for ends in [true, false] {
        let mut client = proxy.connect().await;
        client.send(GET).await;
        let (mut upstream, _) = one.accept_head().await;
        upstream.send("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n").await;
        client.head().await;
        assert_eq!(proxy.sample(&series).await, 1);
        assert_eq!(shown(&proxy).await[name(&one.url())]["in_flight"], 1);
        if ends {
            upstream.send("0\r\n\r\n").await;
        } else {
            drop(client);
        }
        eventually("the end", async || proxy.sample(&series).await == 0).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_that_fails_is_made_again_elsewhere() {
    let (there, gone) = (Recorder::ok().await, Backend::nowhere().await);
    let retry = "defaults: { retry: { budget: { floor: 100 } } }";
    let balance = ", balance: { algorithm: round_robin }";
    let proxy = Proxy::start(&file(&[gone, there.url()], balance, retry)).await;
    ask(&proxy, 20, GET).await;
    ask(&proxy, 10, "POST / HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(there.requests().len(), 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_open_breaker_is_passed_over_and_all_of_them_are_told_of() {
    let (one, other) = (Recorder::ok().await, Recorder::ok().await);
    let breaker = ", circuit_breaker: {}, balance: { algorithm: round_robin }";
    let proxy = Proxy::start(&file(&[one.url(), other.url()], breaker, "")).await;
    let opened = proxy.admin_post(&format!("/circuit-breakers/api/open?endpoint={}", name(&one.url()))).await;
    assert_eq!(opened.status(), 200, "{}", opened.text());
    ask(&proxy, 10, GET).await;
    assert_eq!((one.requests().len(), other.requests().len()), (0, 10));
    assert_eq!(shown(&proxy).await[name(&one.url())]["circuit_breaker"], "open");
    assert_eq!(proxy.admin_post("/circuit-breakers/api/open").await.status(), 200);
    let refused = proxy.get("/").await;
    assert_eq!((refused.status(), refused.json()["type"].clone()), (503, json!("urn:sidegate:problem:circuit-open")));
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_is_refused_while_one_endpoint_is_probed_again_and_again() {
    let (there, gone) = (Recorder::ok().await, Backend::nowhere().await);
    let breaker = ", balance: { algorithm: round_robin }, \
                   circuit_breaker: { consecutive_failures: 1, recovery: 5ms, max_recovery: 5ms }";
    let retry = "threads: 4\ndefaults: { retry: { budget: { ratio: 1, floor: 1000 } } }";
    let proxy = Proxy::start(&file(&[gone, there.url()], breaker, retry)).await;
    join_all((0..32).map(|_| ask(&proxy, 50, GET))).await;
    assert_eq!(there.requests().len(), 1600);
    let refused = r#"sidegate_balance_picks_total{upstream="api",outcome="circuit_open"}"#;
    assert_eq!(proxy.sample(refused).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_is_drained_over_reloads_until_it_is_put_back() {
    let (one, other) = (Recorder::ok().await, Recorder::ok().await);
    let endpoints = [one.url(), other.url()];
    let proxy = Proxy::start(&file(&endpoints, "", "")).await;
    for (path, status) in [
        ("/upstreams/api/drain".to_owned(), 400),
        ("/upstreams/api/drain?endpoint=nobody:1".to_owned(), 404),
        (format!("/upstreams/other/drain?endpoint={}", name(&one.url())), 404),
        (format!("/upstreams/api/drain?endpoint={}", name(&one.url())), 200),
    ] {
        let answer = proxy.admin_post(&path).await;
        assert_eq!(answer.status(), status, "{path}: {}", answer.text());
    }
    ask(&proxy, 10, GET).await;
    // Another weight makes another balancer, of the same endpoints.
    proxy.rewrite(&file(&[weighted(&one.url(), 5), other.url()], "", ""));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    ask(&proxy, 10, GET).await;
    assert_eq!((one.requests().len(), other.requests().len()), (0, 20));
    let shown = shown(&proxy).await;
    let shown = &shown[name(&one.url())];
    assert_eq!((&shown["drained"], &shown["weight"], &shown["health"]), (&json!(true), &json!(5), &json!("up")));

    assert_eq!(proxy.admin_post(&format!("/upstreams/api/undrain?endpoint={}", name(&one.url()))).await.status(), 200);
    ask(&proxy, 20, GET).await;
    assert!(!one.requests().is_empty());
    let both = [one.url(), other.url()].map(|url| weighted(&url, 0));
    proxy.rewrite(&file(&both, "", ""));
    assert_eq!(proxy.admin_post("/reload").await.status(), 409, "nobody would be asked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drained_endpoint_stays_out_when_it_is_left_alone_in_its_upstream() {
    let (one, other) = (Recorder::ok().await, Recorder::ok().await);
    let both = file(&[one.url(), other.url()], "", "");
    let alone = file(&[one.url()], "", "");
    let proxy = Proxy::start(&both).await;
    let set = |what: &str| format!("/upstreams/api/{what}?endpoint={}", name(&one.url()));
    assert_eq!(proxy.admin_post(&set("drain")).await.status(), 200);
    for file in [&alone, &both, &alone] {
        proxy.rewrite(file);
        assert_eq!(proxy.admin_post("/reload").await.status(), 200);
        assert_eq!(shown(&proxy).await[name(&one.url())]["drained"], true);
    }
    assert_eq!(proxy.get("/").await.status(), 503, "it is drained, and there is no other");
    assert_eq!(proxy.admin_post(&set("undrain")).await.status(), 200);
    ask(&proxy, 5, GET).await;
    assert_eq!((one.requests().len(), other.requests().len()), (5, 0));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    ask(&proxy, 5, GET).await;
    let all = proxy.admin_get("/upstreams").await.json();
    assert_eq!(all["upstreams"], json!([]), "one that is not drained needs no balancing");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_stays_of_several_endpoints_is_counted_on() {
    let (one, other) = (Recorder::ok().await, Recorder::ok().await);
    let breaker = ", circuit_breaker: {}";
    let both = file(&[one.url(), weighted(&other.url(), 0)], breaker, "");
    let proxy = Proxy::start(&both).await;
    let labels = format!("upstream=\"api\",endpoint=\"{}\"", name(&one.url()));
    let answered = format!("sidegate_upstream_attempts_total{{{labels},outcome=\"answered\"}}");
    let state = format!("sidegate_circuit_breaker_state{{{labels}}}");
    let secure = both.replacen("http://", "https://", 1);
    ask(&proxy, 5, GET).await;
    for (file, after) in [(file(&[one.url()], breaker, ""), 10), (both, 15)] {
        proxy.rewrite(&file);
        assert_eq!(proxy.admin_post("/reload").await.status(), 200);
        ask(&proxy, 5, GET).await;
        assert_eq!(proxy.sample(&answered).await, after);
        let health = proxy.admin_get("/health").await.json();
        assert_eq!(health["components"]["upstreams"]["api"]["answered"], after, "{health}");
        assert!(proxy.admin_get("/metrics").await.text().contains(&state));
    }
    assert_eq!(proxy.admin_post("/circuit-breakers/api/open").await.status(), 200);
    assert_eq!(proxy.sample(&state).await, 2);
    // Another scheme is no other endpoint to those who read metrics.
    proxy.rewrite(&secure);
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    eventually("what is gone to be gone", async || proxy.sample(&answered).await == 15).await;
    assert_eq!(proxy.sample(&state).await, 2);
    let health = shown(&proxy).await[name(&one.url())].clone();
    assert_eq!((&health["health"], &health["circuit_breaker"]), (&json!("up"), &json!("open")));
    let healthy = format!("sidegate_endpoint_healthy{{{labels}}}");
    assert_eq!(proxy.sample(&healthy).await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn with_all_endpoints_drained_there_is_none() {
    let one = Backend::start().await;
    let proxy = Proxy::start(&file(&[one.url()], ", balance: {}", "")).await;
    assert_eq!(proxy.admin_post(&format!("/upstreams/api/drain?endpoint={}", name(&one.url()))).await.status(), 200);
    let refused = proxy.get("/").await;
    let kind = refused.json()["type"].clone();
    assert_eq!((refused.status(), kind), (503, json!("urn:sidegate:problem:no-healthy-endpoint")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_belongs_to_an_endpoint_goes_with_it() {
    let (one, other) = (Recorder::ok().await, Recorder::ok().await);
    let proxy = Proxy::start(&file(&[one.url(), other.url()], ", circuit_breaker: {}", "")).await;
    ask(&proxy, 10, GET).await;
    let url = one.url();
    assert_eq!(proxy.admin_post(&format!("/circuit-breakers/api/open?endpoint={}", name(&url))).await.status(), 200);
    let metrics = async || proxy.admin_get("/metrics").await.text();
    assert!(metrics().await.contains(name(&url)));
    proxy.rewrite(&file(
        &[other.url(), weighted(&other.url().replace("127.0.0.1", "127.0.0.2"), 0)],
        ", circuit_breaker: {}",
        "",
    ));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    ask(&proxy, 10, GET).await;
    eventually("no series is left", async || !metrics().await.contains(name(&url))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_is_looked_up_and_each_address_is_an_endpoint() {
    let backend = Recorder::ok().await;
    let port = backend.url().rsplit_once(':').unwrap().1.to_owned();
    let endpoint = format!("\"http://localhost:{port}\"");
    let proxy = Proxy::start(&file(&[endpoint], ", balance: { resolve: 1s }", "")).await;
    proxy.line("endpoints changed").await;
    let shown = shown(&proxy).await;
    let found = &shown[&format!("127.0.0.1:{port}")];
    assert_eq!(found["origin"], format!("http://localhost:{port}"), "{shown:?}");
    assert!(proxy.sample(r#"sidegate_balance_lookups_total{upstream="api",outcome="resolved"}"#).await >= 1);
    // Where there is IPv6 the name has two addresses, and nobody listens on the other one.
    if shown.len() == 1 {
        ask(&proxy, 5, GET).await;
        assert_eq!(backend.requests().len(), 5);
    }
}
