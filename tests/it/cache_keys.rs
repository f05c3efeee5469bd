//! Whose answer it is, and how much is kept: keys, principals, reloads and bounds.

use std::{
    collections::HashSet,
    net::SocketAddr,
    time::{Duration, Instant},
};

use serde_json::json;
use tokio::task::JoinSet;

use crate::{
    auth::{keys, new_key},
    cache::{cached, get, is_hit, ok, source},
    cache_streams::post,
    harness::{Backend, Message, Proxy, Wire, backend::Recorder, eventually, figure, ms, proxy::given_binary},
};

/// A backend whose answers count.
async fn counting() -> Recorder {
    Recorder::scripted(|before, _| ok("cache-control: max-age=600\r\n", &before.to_string())).await
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_sees_what_another_principal_was_answered() {
    let (alice, alices) = new_key(&["--id", "alice"]);
    let (bob, bobs) = new_key(&["--id", "bob"]);
    let (other, others) = new_key(&["--id", "alice"]);
    let (_folder, file) = keys(&[&alices, &bobs, &others]);
    let backend = counting().await;
    let settings = format!(
        "defaults: {{ auth: {{ api_keys: {{ file: {file} }} }} }}
routes:
  - {{ upstream: api, cache: {{}} }}
  - {{ match: {{ path: /chat }}, upstream: api, cache: {{ methods: [POST], key: [body], ttl: 1h }} }}
  - {{ match: {{ path: /shared }}, upstream: api, cache: {{ shared: true }} }}"
    );
    let proxy = Proxy::before(&backend.url(), &settings).await;
    let by = |key: &str| format!("x-api-key: {key}\r\n");
    let bearer = |key: &str| format!("authorization: Bearer {key}\r\n");
    for ask in [get, |path: &str, fields: &str| post("/chat", fields, &json!({ "path": path }).to_string())] {
        let mut seen = HashSet::new();
        for key in [&alice, &bob] {
            let first = proxy.ask(ask("/", &by(key))).await;
            assert_eq!(first.status(), 200, "{}", first.text());
            assert!(!is_hit(&first) && seen.insert(first.text()), "{first:?}");
            for fields in [by(key), bearer(key)] {
                let again = proxy.ask(ask("/", &fields)).await;
                assert!(is_hit(&again) && again.text() == first.text(), "{again:?}");
            }
        }
        let same = proxy.ask(ask("/", &by(&other))).await;
        assert!(is_hit(&same), "who it is counts, and not by which key");
    }
    assert!(!is_hit(&proxy.ask(get("/shared", &by(&alice))).await));
    assert!(is_hit(&proxy.ask(get("/shared", &by(&bob))).await), "where the operator says that it is the same for all");
    assert_eq!(proxy.get("/shared").await.status(), 401, "who may not ask gets nothing of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_shows_credentials_has_answers_of_its_own() {
    let backend =
        Recorder::scripted(|before, _| ok("cache-control: public, max-age=600\r\n", &before.to_string())).await;
    let settings =
        "routes: [{ upstream: api, cache: {} }, { match: { path: /shared }, upstream: api, cache: { shared: true } }]";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let shown = [
        "",
        "authorization: Bearer a\r\n",
        "authorization: Bearer b\r\n",
        "cookie: session=a\r\n",
        "cookie: session=b\r\n",
        "x-api-key: a\r\n",
        "api-key: a\r\n",
        "x-goog-api-key: a\r\n",
        "x-session-id: a\r\n",
        "x-auth-token: a\r\n",
        "x-auth-token: b\r\n",
        "x-access-token: a\r\n",
        "mcp-session-id: a\r\n",
        "cf-access-jwt-assertion: a\r\n",
        "x-amzn-oidc-data: a\r\n",
        "x-goog-iap-jwt-assertion: a\r\n",
        "remote-user: a\r\n",
    ];
    let mut seen = HashSet::new();
    for fields in shown {
        let first = proxy.ask(get("/", fields)).await;
        assert!(!is_hit(&first) && seen.insert(first.text()), "{fields}: {first:?}");
        assert_eq!(proxy.ask(get("/", fields)).await.text(), first.text());
    }
    let before = backend.count();
    for fields in shown {
        proxy.ask(get("/shared", fields)).await;
    }
    assert_eq!(backend.count() - before, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_principal_of_another_tier_has_answers_of_its_own() {
    let (free, frees) = new_key(&["--id", "alice", "--tier", "free"]);
    let (gold, golds) = new_key(&["--id", "alice", "--tier", "gold"]);
    let (_folder, file) = keys(&[&frees, &golds]);
    let backend = Recorder::scripted(|_, request| {
        ok("cache-control: max-age=600\r\n", request.head.get("x-principal-tier").expect("the upstream is told"))
    })
    .await;
    let settings = format!(
        "defaults: {{ auth: {{ api_keys: {{ file: {file} }} }} }}
routes: [{{ upstream: api, cache: {{}} }}, {{ match: {{ path: /chat }}, upstream: api, cache: {{ methods: [POST], key: [body], ttl: 1h }} }}]"
    );
    let proxy = Proxy::before(&backend.url(), &settings).await;
    for turn in 0..2 {
        for (key, tier) in [(&free, "free"), (&gold, "gold")] {
            let shown = format!("x-api-key: {key}\r\n");
            for request in [get("/", &shown), post("/chat", &shown, "{}")] {
                let answer = proxy.ask(request).await;
                assert_eq!((answer.text().as_str(), is_hit(&answer)), (tier, turn > 0));
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_has_answers_of_its_own() {
    for session in ["{}", "{ header: mcp-session-id }", "{ upstream_header: x-sid }"] {
        let backend = Recorder::scripted(|_, request| {
            let told = request.head.get("x-session-id").or(request.head.get("x-sid"));
            ok("cache-control: max-age=600\r\n", told.expect("the upstream is told"))
        })
        .await;
        let settings = format!(
            "routes:
  - {{ upstream: api, session: {session}, cache: {{}} }}
  - {{ match: {{ path: /chat }}, upstream: api, session: {session}, cache: {{ methods: [POST], key: [body], ttl: 1h }} }}
  - {{ match: {{ path: /shared }}, upstream: api, session: {session}, cache: {{ shared: true }} }}"
        );
        let proxy = Proxy::before(&backend.url(), &settings).await;
        for ask in [get, |_: &str, fields: &str| post("/chat", fields, "{}")] {
            let mut seen = HashSet::new();
            for _ in 0..3 {
                let begun = proxy.ask(ask("/", "")).await;
                assert!(!is_hit(&begun) && seen.insert(begun.text()), "{begun:?}");
                let shown = if let Some(id) = begun.head.get("mcp-session-id") {
                    format!("mcp-session-id: {id}\r\n")
                } else {
                    let cookie = begun.head.get("set-cookie").expect("a session begins");
                    format!("cookie: {}\r\n", cookie.split(';').next().unwrap())
                };
                let again = proxy.ask(ask("/", &shown)).await;
                assert_eq!(again.text(), begun.text(), "{session}: its own");
                assert!(is_hit(&again), "{again:?}");
            }
        }
        assert!(!is_hit(&proxy.get("/shared").await));
        assert!(is_hit(&proxy.get("/shared").await), "where the operator says that it is the same for all");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_backends_may_take_for_another_request_is_neither_kept_nor_given() {
    let backend = counting().await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    let kept = proxy.get("/kept").await.text();
    for (n, field) in [
        "x-http-method-override: DELETE",
        "x-http-method: DELETE",
        "x-method-override: DELETE",
        "x-original-url: /other",
        "x-rewrite-url: /other",
    ]
    .into_iter()
    .enumerate()
    {
        let fresh = format!("/{n}");
        let mut answers = HashSet::from([kept.clone()]);
        for path in ["/kept", &fresh] {
            let other = proxy.ask(get(path, &format!("{field}\r\n"))).await;
            assert_eq!(source(&other), "sidegate; fwd=bypass; fwd-status=200; detail=override", "{field}");
            assert!(answers.insert(other.text()), "{field}: nobody else's");
        }
        assert!(answers.insert(proxy.get(&fresh).await.text()), "{field}: and for nobody else");
    }
    assert_eq!(proxy.get("/kept").await.text(), kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_trusted_proxy_says_of_the_name_that_the_client_knows_counts() {
    let fields = [
        "",
        "x-forwarded-host: one.example\r\n",
        "x-forwarded-host: two.example\r\n",
        "x-forwarded-host: one.example\r\nx-forwarded-host: two.example\r\n",
        "x-forwarded-host: \u{fc}.example\r\n",
        "x-forwarded-host: two.example\r\nx-forwarded-port: 666\r\n",
        "x-forwarded-host: two.example\r\nx-forwarded-proto: https\r\n",
        "x-forwarded-proto: HTTPS\r\n",
        "x-forwarded-proto: wss\r\n",
        "x-forwarded-proto: https, \"evil\"\r\n",
        "x-forwarded-proto: https\r\nx-forwarded-proto: http\r\n",
        "x-forwarded-port: 666\r\n",
        "x-forwarded-prefix: /evil\r\n",
        "x-forwarded-prefix: /evil/er\r\n",
        "forwarded: host=one.example\r\n",
        "forwarded: host=two.example\r\n",
        "forwarded: host=two.example;proto=https\r\n",
        "x-forwarded-user: alice\r\n",
    ];
    let backend = counting().await;
    let proxy =
        Proxy::before(&backend.url(), &format!("hygiene: {{ trusted_proxies: private }}\n{}", cached("{}"))).await;
    let mut seen = HashSet::new();
    for fields in fields {
        let first = proxy.ask(get("/", fields)).await.text();
        assert!(seen.insert(first.clone()), "{fields}: another's");
        // Who the client is makes no difference.
        let from = fields.replace("host=", "for=203.0.113.9;host=") + "x-forwarded-for: 203.0.113.9\r\n";
        for fields in [fields, &from] {
            assert_eq!(proxy.ask(get("/", fields)).await.text(), first, "{fields}");
        }
    }
    // Of a stranger it is not believed, and told to nobody.
    let backend = counting().await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for fields in fields {
        assert_eq!(proxy.ask(get("/", fields)).await.text(), "0", "{fields}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_that_make_no_difference_are_left_out_of_the_key() {
    let backend = counting().await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ignore_query: [fbclid, utm_*] }")).await;
    proxy.get("/a?q=1&utm_source=x").await;
    for same in ["/a?q=1", "/a?utm_medium=y&q=1&fbclid=7", "/a?q=1&%75tm_x"] {
        assert!(is_hit(&proxy.get(same).await), "{same}");
    }
    for other in ["/a?q=2", "/a", "/A?q=1", "/a?q=1&utm", "/a?q=1&fbclid2=7", "/a?Q=1", "/a/?q=1", "/a?q=1;utm_x=1"] {
        assert!(!is_hit(&proxy.get(other).await), "{other}");
    }
    assert_eq!(backend.requests()[0].head.target(), "/a?q=1&utm_source=x", "the upstream is asked as the client did");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asked_first_does_not_give_an_answer_its_name() {
    let backend = Recorder::scripted(|before, _| ok("cache-control: max-age=600\r\n", &before.to_string())).await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ignore_query: [utm_*] }")).await;
    for (n, how) in ["PUT /doc", "PUT /doc?utm_source=2", "url=/doc", "url=sidegate.test/doc"].into_iter().enumerate() {
        let kept = proxy.get(&format!("/doc?utm_source={n}x")).await.text();
        assert_eq!(proxy.get("/doc").await.text(), kept);
        let status = match how.strip_prefix("PUT ") {
            Some(path) => {
                let put = format!("PUT {path} HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 0\r\n\r\n");
                proxy.ask(put).await.status()
            }
            None => proxy.admin_post(&format!("/cache/purge?{how}")).await.status(),
        };
        assert_eq!(status, 200);
        assert_ne!(proxy.get("/doc").await.text(), kept, "{how}");
        proxy.admin_post("/cache/purge?all").await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_body_says_it_is_and_what_is_wanted_count() {
    let backend = Recorder::scripted(|before, request| {
        ok(
            "content-type: application/json\r\n",
            &format!("\"{before} {}\"", request.head.get("accept").unwrap_or("any")),
        )
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{ methods: [POST], key: [body], ttl: 1h }")).await;
    let typed =
        |fields: &str| format!("POST / HTTP/1.1\r\nhost: sidegate.test\r\n{fields}content-length: 2\r\n\r\n{{}}");
    let kept = proxy.ask(typed("content-type: application/json\r\n")).await.text();
    for never in [
        "content-type: text/plain\r\n",
        "content-type: application/x-www-form-urlencoded\r\n",
        "content-type: application/json\r\ncontent-encoding: zstd\r\n",
    ] {
        for _ in 0..2 {
            let answer = proxy.ask(typed(never)).await;
            assert_eq!(source(&answer), "sidegate; fwd=bypass; fwd-status=200; detail=body-not-json", "{never}");
        }
    }
    let mut seen = HashSet::from([kept.clone()]);
    for other in [
        "content-type: application/json\r\naccept: text/event-stream\r\n",
        "content-type: application/json\r\naccept: application/json\r\n",
        "content-type: application/merge-patch+json\r\n",
        "",
    ] {
        let first = proxy.ask(typed(other)).await.text();
        assert!(seen.insert(first.clone()), "{other}");
        assert_eq!(proxy.ask(typed(other)).await.text(), first, "{other}");
    }
    assert_eq!(proxy.ask(typed("content-type: application/json\r\n")).await.text(), kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_and_cookies_count_where_the_operator_says_so() {
    let backend = counting().await;
    let proxy =
        Proxy::before(&backend.url(), &cached("{ shared: true, key: ['header:x-tenant', 'cookie:lang'] }")).await;
    let ask = async |fields: &str| proxy.ask(get("/", fields)).await;
    assert!(!is_hit(&ask("x-tenant: a\r\ncookie: lang=de; other=1\r\n").await));
    assert!(is_hit(&ask("x-tenant: a\r\ncookie: x=y; lang=de\r\nx-more: 1\r\n").await));
    assert!(!is_hit(&ask("x-tenant: b\r\ncookie: lang=de\r\n").await));
    assert!(!is_hit(&ask("x-tenant: a\r\ncookie: lang=en\r\n").await));
    assert!(!is_hit(&ask("cookie: lang=de\r\n").await));
    assert!(!is_hit(&ask("x-tenant: \r\ncookie: lang=de\r\n").await), "what is empty is not absent");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_body_says_counts_and_not_how_it_is_written() {
    let backend = counting().await;
    let section = "{ methods: [POST], key: [body], ttl: 1h, body: { ignore: [user, metadata.trace], when: { temperature: [0, null] } } }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    let ask = async |body: &str| proxy.ask(post("/", "", body)).await;
    assert!(!is_hit(&ask(r#"{"model": "m", "messages": [{"role": "user", "content": "é"}], "n": 1}"#).await));
    for same in [
        r#"{"n":1,"messages":[{"content":"é","role":"user"}],"model":"m"}"#,
        r#" { "n" : 1.0e0 , "model":"m" ,"messages":[{"role":"user","content":"\u00e9"}]}"#,
        r#"{"user": "me", "metadata": {"trace": 7}, "model": "m", "messages": [{"role": "user", "content": "é"}], "n": 1}"#,
    ] {
        let answer = ask(same).await;
        // An object that only holds what is ignored is still there.
        assert_eq!(is_hit(&answer), !same.contains("metadata"), "{same}: {answer:?}");
    }
    for other in [
        r#"{"model": "m", "messages": [{"role": "user", "content": "e"}], "n": 1}"#,
        r#"{"model": "m", "messages": [{"role": "user", "content": "é"}], "n": 2}"#,
        r#"{"model": "m", "messages": [{"role": "user", "content": "é"}], "n": "1"}"#,
        r#"{"model": "m", "messages": [{"role": "user", "content": "é"}], "n": 1, "stream": true}"#,
    ] {
        assert!(!is_hit(&ask(other).await), "{other}");
        assert!(is_hit(&ask(other).await), "{other}");
    }
    for (never, why) in [
        (r#"{"temperature": 0.7}"#, "body-condition"),
        (r#"{"tools": [{"type": "function"}]}"#, "tools"),
        (r#"{"a": 1, "a": 2}"#, "body-duplicate-member"),
        ("", "body-not-json"),
        ("a=b", "body-not-json"),
    ] {
        for _ in 0..2 {
            let answer = ask(never).await;
            assert_eq!(source(&answer), format!("sidegate; fwd=bypass; fwd-status=200; detail={why}"), "{never}");
        }
    }
    let with_none = r#"{"tools": [], "temperature": 0}"#;
    assert!(!is_hit(&ask(with_none).await));
    assert!(is_hit(&ask(with_none).await));
    let bodies: Vec<String> = backend.requests().iter().map(Message::text).collect();
    assert!(bodies.contains(&r#"{"a": 1, "a": 2}"#.to_owned()), "the upstream gets what was sent: {bodies:?}");

    let with_tools = cached("{ methods: [POST], key: [body], ttl: 1h, body: { tools: true }, max_request_body: 1KiB }");
    let proxy = Proxy::before(&backend.url(), &with_tools).await;
    let tools = post("/", "", r#"{"tools": [{"type": "function"}]}"#);
    proxy.ask(&tools).await;
    assert!(is_hit(&proxy.ask(&tools).await), "where the operator says so");
    let long = json!({ "a": "x".repeat(2000) }).to_string();
    let chunked = format!(
        "POST / HTTP/1.1\r\nhost: sidegate.test\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n{:x}\r\n{long}\r\n0\r\n\r\n",
        long.len()
    );
    for request in [post("/", "", &long), chunked] {
        let answer = proxy.ask(request).await;
        assert_eq!(source(&answer), "sidegate; fwd=bypass; fwd-status=200; detail=body-too-large");
        assert_eq!(backend.requests().last().unwrap().text(), long, "it goes on whole");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_in_a_body_is_asked_anew_without_a_condition() {
    let backend = Recorder::scripted(|before, request| {
        // To any other method than GET and HEAD a server may say 412 (RFC 9110 §13.1.2).
        assert_eq!((request.head.get("if-none-match"), request.text()), (None, "{}".to_owned()));
        ok(
            &format!("cache-control: max-age={}, stale-if-error=60\r\netag: \"v1\"\r\n", before * 600),
            &format!(r#"{{"turn": {before}}}"#),
        )
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{ methods: [POST], key: [body] }")).await;
    for turn in ["0", "1", "1"] {
        assert_eq!(proxy.ask(post("/", "", "{}")).await.json()["turn"].to_string(), turn);
    }
    assert_eq!(backend.requests().len(), 2);
}

fn file(url: &str, section: &str, more: &str) -> String {
    format!(
        "upstreams: {{ api: {{ endpoints: [\"{url}\"] }} }}\n{more}\nroutes: [{{ upstream: api, name: all, cache: {section} }}]"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_keeps_the_answers_of_a_section_that_stays() {
    let backend = counting().await;
    let url = backend.url();
    let proxy = Proxy::start(&file(&url, "{}", "")).await;
    assert_eq!(proxy.get("/").await.text(), "0");
    let reload = async |yaml: &str, status: u16| {
        proxy.rewrite(yaml);
        assert_eq!(proxy.admin_post("/reload").await.status(), status);
    };
    reload(&file(&url, "{}", "defaults: { timeouts: { total: 7s } }"), 200).await;
    assert!(is_hit(&proxy.get("/").await), "something else has changed");
    reload(&file(&url, "{ ttl: 0s }", ""), 409).await;
    assert!(is_hit(&proxy.get("/").await), "a refused one changes nothing");
    reload(&file(&url, "{ max_body: 2MiB }", ""), 200).await;
    assert_eq!(proxy.get("/").await.text(), "1", "a changed section begins anew");
    assert!(is_hit(&proxy.get("/").await));
    reload(&file(&url, "off", ""), 200).await;
    let none = proxy.get("/").await;
    assert_eq!((none.text().as_str(), none.head.get("cache-status")), ("2", None));
    reload(&file(&url, "{ max_body: 2MiB }", ""), 200).await;
    assert_eq!(proxy.get("/").await.text(), "3", "what has no owner is gone");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_sends_a_route_elsewhere_gives_nothing_of_where_it_went_before() {
    let old = Backend::start().await;
    let new = Recorder::answering(ok("cache-control: max-age=600\r\n", "new")).await;
    let file = |upstream: &str| {
        format!(
            "upstreams: {{ old: {{ endpoints: ['{}'] }}, new: {{ endpoints: ['{}'] }} }}
routes: [{{ upstream: {upstream}, name: all, cache: {{ ttl: 1h, stale_if_error: 1h }} }}]",
            old.url(),
            new.url()
        )
    };
    let proxy = Proxy::start(&file("old")).await;
    let mut client = proxy.connect().await;
    client.send(get("/kept", "")).await;
    let (mut upstream, _) = old.accept_head().await;
    upstream.send(ok("connection: close\r\n", "old")).await;
    assert_eq!(client.answer().await.text(), "old");
    assert!(is_hit(&proxy.get("/kept").await));
    client.send(get("/coming", "")).await;
    let (mut upstream, _) = old.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\no").await;
    client.head().await;

    proxy.rewrite(&file("new"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    for path in ["/kept", "/coming"] {
        assert_eq!(proxy.get(path).await.text(), "new", "{path}");
        assert!(is_hit(&proxy.get(path).await), "{path}");
    }
    upstream.send("ld").await;
    assert_eq!(client.exactly(3).await, b"old", "who asked before gets what it asked for");
    assert_eq!(proxy.get("/coming").await.text(), "new");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_lets_readers_of_an_answer_on_its_way_go_on() {
    let backend = Backend::start().await;
    let proxy = Proxy::start(&file(&backend.url(), "{ ttl: 1h }", "")).await;
    let mut client = proxy.connect().await;
    client.send(get("/", "")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send("HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\none").await;
    client.head().await;
    assert_eq!(client.exactly(3).await, b"one");
    proxy.rewrite(&file(&backend.url(), "{ ttl: 1h }", "defaults: { timeouts: { total: 7s } }"));
    assert_eq!(proxy.admin_post("/reload").await.status(), 200);
    let mut other = proxy.connect().await;
    other.send(get("/", "")).await;
    other.head().await;
    assert_eq!(other.exactly(3).await, b"one", "and who comes after it reads along");
    upstream.send("two").await;
    assert_eq!(client.exactly(3).await, b"two");
    assert_eq!(other.exactly(3).await, b"two");
    assert!(is_hit(&proxy.get("/").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hit_costs_no_tokens() {
    let body = r#"{"choices": [], "usage": {"prompt_tokens": 30, "completion_tokens": 10}}"#;
    let backend = Recorder::answering(ok("content-type: application/json\r\n", body)).await;
    let settings = "
routes:
  - upstream: api
    name: chat
    rate_limit: [{ name: tokens, key: global, limit: 1000/h, cost: tokens, reserve: 40 }]
    cache: { methods: [POST], key: [body], ttl: 1h }";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let left = async || {
        let counter = proxy.admin_get("/rate-limits/tokens").await.json()["counters"][0].clone();
        counter["memory"]["remaining"].as_u64().unwrap()
    };
    let ask = post("/v1/chat/completions", "", r#"{"messages": [], "max_tokens": 10}"#);
    proxy.ask(&ask).await;
    eventually("the miss to be charged", async || left().await == 960).await;
    for _ in 0..10 {
        assert!(is_hit(&proxy.ask(&ask).await));
    }
    eventually("the hits to cost nothing", async || left().await == 960).await;
}

/// Sends `requests` over `connections` at once, one after the other on each; what each was answered, and the time
/// until then.
async fn ask_all(address: SocketAddr, connections: usize, requests: Vec<String>) -> Vec<(bool, Duration)> {
    let mut clients = JoinSet::new();
    let share = requests.len().div_ceil(connections);
    for part in requests.chunks(share) {
        let part = part.to_vec();
        clients.spawn(async move {
            let mut wire = Wire::to(address).await;
            let mut seen = Vec::with_capacity(part.len());
            for request in part {
                let begun = Instant::now();
                wire.send(request).await;
                let answer = wire.answer().await;
                assert_eq!(answer.status(), 200);
                let took = begun.elapsed();
                // The upstream says nothing of it.
                seen.push((answer.head.get("cache-status").is_some() && is_hit(&answer), took));
            }
            seen
        });
    }
    clients.join_all().await.concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn memory_is_bounded_whatever_is_asked() {
    // As many as it takes to see that it does not grow. A million, with a binary that is fast enough for that:
    // TESTED_BINARY=target/release/sidegate CACHE_KEYS=1000000 CACHE_MIB=64 cargo test --test it cache_keys::memory
    let count: usize = std::env::var("CACHE_KEYS").ok().and_then(|count| count.parse().ok()).unwrap_or(20_000);
    let most: u64 = std::env::var("CACHE_MIB").ok().and_then(|mib| mib.parse().ok()).unwrap_or(16);
    let body = "x".repeat(4 << 10);
    let backend = Recorder::counting(ok("", &body)).await;
    let proxy = Proxy::before(&backend.url(), &cached(&format!("{{ ttl: 1h, max_bytes: {most}MiB }}"))).await;
    ask_all(proxy.address(), 8, (0..100).map(|n| get(&format!("/warm/{n}"), "")).collect()).await;
    let before = proxy.resident();
    let mut peak = before;
    for part in 0..20 {
        let requests = (0..count / 20).map(|n| get(&format!("/{part}/{n}"), "")).collect();
        ask_all(proxy.address(), 8, requests).await;
        peak = peak.max(proxy.resident());
    }
    let grown = (peak - before) / 1024;
    figure(&format!("{count} keys of 4 KiB with max_bytes {most} MiB: {grown} MiB more at most"));
    assert!(grown < 2 * most, "{grown} MiB");
    let last = format!("/19/{}", count / 20 - 1);
    assert!(is_hit(&proxy.get(&last).await) || proxy.sample("sidegate_cache_evicted_total{route=\"all\"}").await > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_asked_often_is_mostly_answered_without_the_upstream() {
    let said = json!({ "choices": [{ "message": { "content": "x".repeat(2000) }, "finish_reason": "stop" }] });
    let backend = Recorder::counting(ok("content-type: application/json\r\n", &said.to_string())).await;
    // A fifth of the prompts have room.
    let section = "{ methods: [POST], key: [body], ttl: 1h, max_bytes: 512KiB, max_body: 64KiB }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    // Zipf: the nth of a thousand prompts is asked for in proportion to 1/n.
    let mut sums = Vec::new();
    let mut sum = 0.0;
    for n in 1..=1000 {
        sum += 1.0 / f64::from(n);
        sums.push(sum);
    }
    let mut random = 7_u32;
    let requests = (0..10_000).map(|_| {
        random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let at = f64::from(random) / f64::from(u32::MAX) * sum;
        let prompt = sums.partition_point(|known| *known < at);
        post("/v1/chat/completions", "", &json!({ "model": "m", "prompt": prompt }).to_string())
    });
    let requests: Vec<_> = requests.collect();
    // Few at once: more would wait for this test, and not for the proxy.
    let seen = ask_all(proxy.address(), 4, requests.clone()).await;
    let (asked, share) = (backend.count(), 100 - 100 * backend.count() / seen.len());
    let hits = seen.iter().filter(|(hit, _)| *hit).map(|(_, took)| *took).collect();
    let bare = ask_all(backend.address(), 4, requests[..2000].to_vec()).await;
    let (hits, bare) = (percentiles(hits), percentiles(bare.into_iter().map(|(_, took)| took).collect()));
    figure(&format!(
        "10000 requests over 1000 prompts: the upstream saw {asked}, {share} % fewer; hits p50 {}, p99 {} (the upstream \
         alone, asked in the same way: {}, {})",
        ms(hits[0]),
        ms(hits[1]),
        ms(bare[0]),
        ms(bare[1])
    ));
    assert!(share >= 60, "{share}");
    // A debug build says nothing about time, nor does a machine that is busy with something else:
    // TESTED_BINARY=target/release/sidegate cargo test --test it cache_keys::what_is_asked_often
    if given_binary().is_some() {
        assert!(hits[1] < Duration::from_millis(5), "{}", ms(hits[1]));
    }
}

/// The middle and the 99th percentile.
fn percentiles(mut of: Vec<Duration>) -> [Duration; 2] {
    of.sort_unstable();
    [of[of.len() / 2], of[of.len() * 99 / 100]]
}
