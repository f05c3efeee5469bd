//! Answers that are kept and given again: what RFC 9111 says of `GET`, and what the operator adds to it.

use serde_json::json;

use crate::harness::{Backend, Message, Proxy, backend::Recorder, eventually};

/// A file whose only route has this section `cache`.
pub fn cached(section: &str) -> String {
    format!("routes: [{{ upstream: api, name: all, cache: {section} }}]")
}

/// A 200 with these fields, each ended by a CRLF.
pub fn ok(fields: &str, body: &str) -> String {
    answer("200 OK", fields, body)
}

pub fn answer(status: &str, fields: &str, body: &str) -> String {
    format!("HTTP/1.1 {status}\r\n{fields}content-length: {}\r\n\r\n{body}", body.len())
}

/// That of `404 Not Found`.
pub fn code(status: &str) -> u16 {
    status.split(' ').next().unwrap().parse().unwrap()
}

pub fn get(path: &str, fields: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nhost: sidegate.test\r\n{fields}\r\n")
}

/// What sidegate says of where an answer came from.
pub fn source(answer: &Message) -> &str {
    let said = answer.head.all("cache-status");
    said.last().unwrap_or_else(|| panic!("no Cache-Status: {answer:?}"))
}

pub fn is_hit(answer: &Message) -> bool {
    source(answer).starts_with("sidegate; hit")
}

/// A proxy before a backend whose answers have these fields and count: `1`, `2`, ….
pub async fn counting(section: &str, fields: &'static str) -> (Recorder, Proxy) {
    let backend = Recorder::scripted(move |before, _| ok(fields, &(before + 1).to_string())).await;
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    (backend, proxy)
}

pub const YEAR_2020: &str = "Wed, 01 Jan 2020 00:00:00 GMT";

#[tokio::test(flavor = "multi_thread")]
async fn what_is_fresh_is_given_again_and_says_how_old_it_is() {
    let (backend, proxy) = counting("{}", "cache-control: max-age=600\r\nage: 100\r\nx-own: a\r\nx-own: b\r\n").await;
    let first = proxy.get("/a?b").await;
    assert!(source(&first).starts_with("sidegate; fwd=uri-miss; fwd-status=200; ttl="), "{first:?}");
    assert!(source(&first).ends_with("; stored"), "{first:?}");
    let again = proxy.ask(get("/a?b", "x-request-id: hit-1\r\n")).await;
    assert!(is_hit(&again), "{again:?}");
    assert_eq!((again.text().as_str(), again.head.all("x-own")), ("1", vec!["a", "b"]));
    let age: u64 = again.head.get("age").unwrap().parse().unwrap();
    assert!((100..200).contains(&age), "{age}");
    let left = source(&again).strip_prefix("sidegate; hit; ttl=").unwrap();
    assert!((400..=500).contains(&left.parse::<u64>().unwrap()), "{left}");
    assert!(again.head.get("date").is_some(), "also of a backend that says none");
    assert_eq!(backend.count(), 1);
    assert_eq!(proxy.access_line("hit-1").await["cache"], "hit");
    assert_eq!(proxy.get("/a").await.text(), "2", "the query counts");
    assert_eq!(proxy.ask("GET /a HTTP/1.1\r\nhost: other.test\r\n\r\n").await.text(), "3", "and the host");
    let requests = |outcome: &str| format!("sidegate_cache_requests_total{{route=\"all\",outcome=\"{outcome}\"}}");
    assert_eq!((proxy.sample(&requests("hit")).await, proxy.sample(&requests("miss")).await), (1, 3));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_must_not_be_kept_is_asked_for_each_time() {
    let kept = "cache-control: max-age=600\r\n";
    for (fields, why) in [
        ("cache-control: no-store\r\n", "no-store"),
        ("cache-control: private, max-age=600\r\n", "private"),
        ("cache-control: no-cache\r\n", "no-cache"),
        ("cache-control: max-age=0\r\n", "stale"),
        ("cache-control: max-age=600, s-maxage=0\r\n", "stale"),
        ("cache-control: max-age=600\r\nage: 600\r\n", "stale"),
        ("cache-control: max-age=600\r\nset-cookie: a=b\r\n", "set-cookie"),
        ("cache-control: max-age=600\r\nvary: accept, *\r\n", "vary-star"),
        ("", "no-freshness"),
    ] {
        let (backend, proxy) = counting("{}", fields).await;
        let first = proxy.get("/").await;
        assert!(source(&first).ends_with(&format!("; detail={why}")), "{fields}: {first:?}");
        assert_eq!(proxy.get("/").await.text(), "2", "{fields}");
        assert_eq!(backend.count(), 2);
    }
    let (_backend, proxy) = counting("{}", kept).await;
    let asks = "authorization: Basic YTpi\r\n";
    proxy.ask(get("/", asks)).await;
    assert_eq!(proxy.ask(get("/", asks)).await.text(), "2", "whom the backend knows it decides about itself");
    let forbidding = "cache-control: no-store\r\n";
    assert_eq!(proxy.ask(get("/b", forbidding)).await.text(), "3");
    assert_eq!(proxy.get("/b").await.text(), "4", "who asks may forbid it too");
    assert_eq!(proxy.get("/b").await.text(), "4", "and is not held against the others");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_says_that_it_may_be_kept_is_kept() {
    for (fields, asks) in [
        ("cache-control: s-maxage=600, max-age=0\r\n", ""),
        ("cache-control: public, max-age=600\r\n", "authorization: Basic YTpi\r\n"),
        ("expires: Fri, 01 Jan 2100 00:00:00 GMT\r\n", ""),
        ("last-modified: Wed, 01 Jan 2020 00:00:00 GMT\r\n", ""),
        ("cache-control: max-age=600\r\n", "cookie: a=b\r\n"),
    ] {
        let (backend, proxy) = counting("{}", fields).await;
        proxy.ask(get("/", asks)).await;
        assert!(is_hit(&proxy.ask(get("/", asks)).await), "{fields}");
        assert_eq!(backend.count(), 1);
        let unlike = proxy.ask(get("/", "cookie: other=1\r\n")).await;
        assert_eq!(unlike.text(), "2", "who shows something else has answers of its own: {fields}");
    }
    let (_backend, proxy) = counting("{ ttl: 1h }", "").await;
    proxy.get("/").await;
    assert!(is_hit(&proxy.get("/").await), "where the operator says so");
    let (_backend, proxy) = counting("{ ttl: 1h }", "cache-control: no-store\r\n").await;
    proxy.get("/").await;
    assert_eq!(proxy.get("/").await.text(), "2", "but not against the backend's word");
    let (_backend, proxy) =
        counting("{ ttl: 1h, ignore_cache_control: true }", "cache-control: no-store, private\r\n").await;
    proxy.get("/").await;
    assert!(is_hit(&proxy.get("/").await), "unless the operator knows better");
}

#[tokio::test(flavor = "multi_thread")]
async fn fields_that_are_for_one_client_are_kept_from_the_others() {
    let fields = "cache-control: max-age=600, no-cache=\"set-cookie\", private=\"x-user\"\r\nset-cookie: a=b\r\nx-user: me\r\nx-all: all\r\n";
    let (backend, proxy) = counting("{}", fields).await;
    let first = proxy.get("/").await;
    assert_eq!((first.head.get("set-cookie"), first.head.get("x-user")), (Some("a=b"), Some("me")));
    let again = proxy.get("/").await;
    assert!(is_hit(&again));
    assert_eq!((again.head.get("set-cookie"), again.head.get("x-user")), (None, None));
    assert_eq!(again.head.get("x-all"), Some("all"));
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_has_it_already_is_told_so_also_where_the_cache_has_not() {
    let backend = Recorder::scripted(|_, request| {
        assert_eq!((request.head.get("if-none-match"), request.head.get("if-modified-since")), (None, None));
        ok(
            &format!("cache-control: max-age=600\r\netag: \"v1\"\r\nlast-modified: {YEAR_2020}\r\nx-other: a\r\n"),
            "body",
        )
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    let known = "if-none-match: \"v0\", W/\"v1\"\r\n";
    let miss = proxy.ask(get("/", known)).await;
    assert_eq!((miss.status(), miss.head.get("etag"), miss.head.get("x-other")), (304, Some("\"v1\""), None));
    assert!(source(&miss).starts_with("sidegate; fwd=uri-miss; fwd-status=200"), "{miss:?}");
    // The rest is read behind it.
    eventually("the answer to be stored", async || {
        proxy.sample("sidegate_cache_stored_total{route=\"all\"}").await == 1
    })
    .await;
    for (fields, status) in [
        (known.to_owned(), 304),
        ("if-none-match: \"v0\"\r\n".to_owned(), 200),
        (format!("if-modified-since: {YEAR_2020}\r\n"), 304),
        ("if-modified-since: Tue, 31 Dec 2019 00:00:00 GMT\r\n".to_owned(), 200),
    ] {
        let answer = proxy.ask(get("/", &fields)).await;
        assert_eq!(answer.status(), status, "{fields}");
        assert!(is_hit(&answer), "{fields}: {answer:?}");
        assert!(answer.head.get("age").is_some());
    }
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_is_cut_from_what_is_kept() {
    let backend = Recorder::scripted(|before, request| match (before, request.head.get("range")) {
        (0, Some("bytes=0-1")) => {
            answer("206 Partial Content", "cache-control: max-age=600\r\ncontent-range: bytes 0-1/10\r\n", "01")
        }
        (1, None) => ok("cache-control: max-age=600\r\netag: \"v1\"\r\n", "0123456789"),
        other => panic!("{other:?}"),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    let part = proxy.ask(get("/", "range: bytes=0-1\r\n")).await;
    assert_eq!((part.status(), part.text().as_str()), (206, "01"), "it goes on as it came, and is not kept");
    assert_eq!(proxy.get("/").await.text(), "0123456789");
    for (range, status, text, told) in [
        ("bytes=2-4", 206, "234", Some("bytes 2-4/10")),
        ("bytes=8-", 206, "89", Some("bytes 8-9/10")),
        ("bytes=-3", 206, "789", Some("bytes 7-9/10")),
        ("bytes=10-", 416, "", Some("bytes */10")),
        ("bytes=0-1,3-4", 200, "0123456789", None),
        ("bytes=2-4\r\nif-range: \"v1\"", 206, "234", Some("bytes 2-4/10")),
        ("bytes=2-4\r\nif-range: \"v0\"", 200, "0123456789", None),
    ] {
        let answer = proxy.ask(get("/", &format!("range: {range}\r\n"))).await;
        assert_eq!((answer.status(), answer.text().as_str(), answer.head.get("content-range")), (status, text, told));
        assert!(is_hit(&answer), "{range}");
    }
    assert_eq!(backend.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_is_answered_from_a_get_and_is_none_itself() {
    let backend = Recorder::scripted(|before, request| match before {
        0 => {
            assert!(request.head.start.starts_with("HEAD "));
            "HTTP/1.1 200 OK\r\ncache-control: max-age=600\r\ncontent-length: 4\r\n\r\n".to_owned()
        }
        _ => {
            "HTTP/1.1 200 OK\r\ncache-control: max-age=600\r\ntransfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"
                .to_owned()
        }
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    let head = async || {
        let mut wire = proxy.connect().await;
        wire.send("HEAD / HTTP/1.1\r\nhost: sidegate.test\r\nconnection: close\r\n\r\n").await;
        let head = wire.head().await;
        wire.ended().await;
        head
    };
    assert_eq!(head().await.status(), 200);
    assert_eq!(proxy.get("/").await.text(), "body");
    let hit = head().await;
    assert!(hit.get("cache-status").unwrap().starts_with("sidegate; hit"), "{hit:?}");
    assert_eq!(hit.get("content-length"), Some("4"));
    assert_eq!(backend.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn variants_are_kept_apart_by_the_fields_that_the_answer_names() {
    let backend = Recorder::scripted(|_, request| {
        let language = request.head.get("accept-language").unwrap_or("none");
        ok("cache-control: max-age=600\r\nvary: Accept-Language\r\n", language)
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for _ in 0..2 {
        for language in ["de, en", "en", "none"] {
            let fields = if language == "none" { "" } else { &format!("accept-language: {language}\r\n") };
            assert_eq!(proxy.ask(get("/", fields)).await.text(), language);
        }
    }
    assert_eq!(backend.count(), 3);
    let other = proxy.ask(get("/", "accept-language: DE ,en\r\n")).await;
    assert!(is_hit(&other), "written otherwise it is the same");
    let unknown = proxy.ask(get("/", "accept-language: fr\r\n")).await;
    assert!(source(&unknown).starts_with("sidegate; fwd=vary-miss"), "{unknown:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_say_what_they_want() {
    let (backend, proxy) = counting("{}", "cache-control: max-age=600\r\nage: 100\r\n").await;
    let only = proxy.ask(get("/", "cache-control: only-if-cached\r\n")).await;
    assert_eq!((only.status(), &only.json()["type"]), (504, &json!("urn:sidegate:problem:not-cached")));
    assert_eq!(backend.count(), 0);
    assert_eq!(proxy.get("/").await.text(), "1");
    assert_eq!(proxy.ask(get("/", "cache-control: only-if-cached\r\n")).await.text(), "1");
    for (n, wish) in ["no-cache", "max-age=50", "min-fresh=550", "max-age=0"].into_iter().enumerate() {
        let answer = proxy.ask(get("/", &format!("cache-control: {wish}\r\n"))).await;
        assert_eq!(answer.text(), (n + 2).to_string(), "{wish}");
        assert!(source(&answer).starts_with("sidegate; fwd=request"), "{answer:?}");
    }
    assert_eq!(proxy.ask(get("/", "pragma: no-cache\r\n")).await.text(), "6", "the wish of 1996");

    let (backend, proxy) = counting("{ client_cache_control: false }", "cache-control: max-age=600\r\n").await;
    for _ in 0..2 {
        assert_eq!(proxy.ask(get("/", "cache-control: no-cache\r\npragma: no-cache\r\n")).await.text(), "1");
    }
    assert_eq!(backend.count(), 1, "where the operator does not let them, it costs the backend nothing");

    let (_backend, proxy) = counting("{}", "cache-control: max-age=10\r\nage: 20\r\netag: \"a\"\r\n").await;
    proxy.get("/").await;
    let stale = proxy.ask(get("/", "cache-control: max-stale=60\r\n")).await;
    assert!(is_hit(&stale) && source(&stale).contains("; ttl=-"), "{stale:?}");
    assert_eq!(proxy.ask(get("/", "cache-control: max-stale=5\r\n")).await.text(), "2");
    let (_backend, proxy) =
        counting("{}", "cache-control: max-age=10, must-revalidate\r\nage: 20\r\netag: \"a\"\r\n").await;
    proxy.get("/").await;
    assert_eq!(proxy.ask(get("/", "cache-control: max-stale=60\r\n")).await.text(), "2", "the backend forbids it");
}

/// What is asked for at `/a` after a request that may have changed it.
async fn after(method: &str, path: &str, status: &str, fields: &'static str) -> String {
    let status = status.to_owned();
    let backend = Recorder::scripted(move |before, request| {
        if request.head.start.starts_with("GET ") {
            return ok("cache-control: max-age=600\r\n", &before.to_string());
        }
        answer(&status, fields, "")
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/a").await;
    assert!(is_hit(&proxy.get("/a").await));
    let changed =
        proxy.ask(format!("{method} {path} HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 1\r\n\r\nx")).await;
    assert!(source(&changed).starts_with("sidegate; fwd=method"), "{changed:?}");
    proxy.get("/a").await.text()
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_4_a_request_that_changes_something_drops_what_was_kept_of_it() {
    for method in ["PUT", "POST", "DELETE", "PATCH", "BREW"] {
        assert_eq!(after(method, "/a", "200 OK", "").await, "2", "{method}");
    }
    assert_eq!(after("POST", "/a", "303 See Other", "location: /b\r\n").await, "2");
    for status in ["404 Not Found", "503 Service Unavailable"] {
        assert_eq!(after("PUT", "/a", status, "").await, "0", "{status}: nothing was changed");
    }
    for (fields, dropped) in [
        ("location: /a\r\n", true),
        ("content-location: /a\r\n", true),
        ("location: http://sidegate.test/a\r\n", true),
        ("location: http://sidegate.test:80/a\r\n", true),
        ("location: http://SIDEGATE.test/a#part\r\n", true),
        ("location: http://other.test/a\r\n", false),
        ("location: http://sidegate.test:81/a\r\n", false),
        ("location: /c\r\n", false),
    ] {
        let expected = if dropped { "2" } else { "0" };
        assert_eq!(after("POST", "/b", "201 Created", fields).await, expected, "{fields}");
    }
    assert_eq!(after("POST", "/b", "404 Not Found", "location: /a\r\n").await, "0");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_without_a_cache_drops_what_another_keeps() {
    let backend = Recorder::scripted(|before, _| ok("cache-control: max-age=600\r\n", &before.to_string())).await;
    let settings = "
routes:
  - { upstream: api, name: reads, match: { path: '/a/*', method: GET }, cache: { ignore_query: [utm_*] } }
  - { upstream: api, name: others, match: { path: '/a/*' } }
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let write = async |target: &str| {
        let head = format!("POST {target} HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 1\r\n\r\nx");
        let written = proxy.ask(head).await;
        assert_eq!((written.status(), written.head.get("cache-status")), (200, None));
    };
    proxy.get("/a/b?c&utm_x=1").await;
    assert!(is_hit(&proxy.get("/a/b?c").await));
    write("/a/b?d").await;
    assert!(is_hit(&proxy.get("/a/b?c").await));
    write("/a/b?utm_y=2&c").await;
    assert!(!is_hit(&proxy.get("/a/b?c").await));
    assert!(is_hit(&proxy.get("/a/b?c").await));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_the_same_for_any_host_is_dropped_by_the_url_of_any() {
    let backend = Recorder::scripted(|before, _| ok("cache-control: max-age=600\r\n", &before.to_string())).await;
    let settings = "
routes:
  - { upstream: api, name: any, match: { path: '/any/*' }, cache: { ignore_host: true } }
  - { upstream: api, name: own, match: { path: '/own/*' }, cache: {} }
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let ask = async |method: &str, path: &str, host: &str| {
        proxy.ask(format!("{method} {path} HTTP/1.1\r\nhost: {host}\r\ncontent-length: 0\r\n\r\n")).await
    };
    for (path, shared) in [("/any/x", true), ("/own/x", false)] {
        for drop in ["/cache/purge?url=http://b.test{}", "/cache/purge?url={}", "PUT"] {
            ask("GET", path, "a.test").await;
            assert!(is_hit(&ask("GET", path, "a.test").await), "{path} {drop}");
            assert!(!shared || is_hit(&ask("GET", path, "b.test").await), "{path} {drop}");
            let is_of_all = match drop {
                "PUT" => ask("PUT", path, "b.test").await.status() != 200,
                purge => {
                    assert_eq!(proxy.admin_post(&purge.replace("{}", path)).await.status(), 200);
                    !purge.contains("b.test")
                }
            };
            let is_kept = is_hit(&ask("GET", path, "a.test").await);
            assert_eq!(is_kept, !shared && !is_of_all, "{path} {drop}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_path_is_dropped_however_it_is_spelled() {
    let backend = Recorder::scripted(|before, _| ok("cache-control: max-age=600\r\n", &before.to_string())).await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for (kept, purged) in [
        ("/caf%C3%A9", "url=/caf%C3%A9"),
        ("/caf%c3%a9?q=%2f", "url=/caf%25C3%25A9%3Fq=%252F"),
        ("/%7Euser", "url=/~user"),
        ("/a%20b", "glob=/a%20*"),
    ] {
        let before = proxy.get(kept).await.text();
        assert_eq!(proxy.get(kept).await.text(), before);
        assert_eq!(proxy.admin_post(&format!("/cache/purge?{purged}")).await.status(), 200);
        assert_ne!(proxy.get(kept).await.text(), before, "{purged}");
    }
    let before = proxy.get("/%7Euser").await.text();
    assert_eq!(
        proxy.ask("PUT /~user HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 0\r\n\r\n").await.status(),
        200
    );
    assert_ne!(proxy.get("/%7Euser").await.text(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn tags_drop_together_what_belongs_together() {
    let backend = Recorder::scripted(|before, _| ok("cache-control: max-age=600\r\n", &before.to_string())).await;
    let settings = "
routes:
  - { match: { path: '/bots/{id}' }, upstream: api, cache: { tags: ['bot:{id}'] } }
  - { match: { path: '/bots/{id}/messages' }, upstream: api, cache: { tags: ['bot:{id}', 'all'] } }
  - { match: { path: '/train/{id}' }, upstream: api, cache: { methods: [], invalidate: ['bot:{id}'] } }
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    let all = async || {
        let mut texts = Vec::new();
        for path in ["/bots/1", "/bots/1/messages", "/bots/2"] {
            texts.push(proxy.get(path).await.text());
        }
        texts
    };
    let before = all().await;
    assert_eq!(all().await, before);
    assert_eq!(proxy.ask("POST /train/1 HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n").await.status(), 200);
    let now = all().await;
    assert!(now[0] != before[0] && now[1] != before[1], "{before:?} {now:?}");
    assert_eq!(now[2], before[2], "another bot's stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tag_that_is_too_long_keeps_no_other_from_being_dropped() {
    let section = "{ tags: ['bot:7'], invalidate: ['user:{header:x-user}', 'bot:7', 'u:{header:x-user}'] }";
    let (_backend, proxy) = counting(section, "cache-control: max-age=600\r\n").await;
    let kept = proxy.get("/").await.text();
    let long = "x".repeat(300);
    let write = format!("POST /other HTTP/1.1\r\nhost: sidegate.test\r\nx-user: {long}\r\ncontent-length: 0\r\n\r\n");
    assert_eq!(proxy.ask(write).await.status(), 200);
    assert_ne!(proxy.get("/").await.text(), kept);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_odd_request_takes_no_answer_from_the_others() {
    let backend = Recorder::scripted(|before, request| match request.head.get("accept") {
        Some("odd") => answer("406 Not Acceptable", "", ""),
        Some("long") => answer("431 Request Header Fields Too Large", "", ""),
        Some("bad") => answer("400 Bad Request", "cache-control: no-store\r\n", ""),
        Some("own") => ok("cache-control: private\r\n", "own"),
        _ => ok("cache-control: public, max-age=600\r\n", &before.to_string()),
    })
    .await;
    for section in ["{}", "{ shared: true }"] {
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        let kept = proxy.get("/").await.text();
        for (n, odd) in ["odd", "long", "bad", "own"].into_iter().enumerate() {
            let fields = format!("accept: {odd}\r\ncache-control: no-cache\r\n");
            proxy.ask(get("/", &fields)).await;
            let hit = proxy.get("/").await;
            assert!(is_hit(&hit) && hit.text() == kept, "{section} {odd}: {hit:?}");
            // Nor does it keep one from being kept; where a success says that it is for one, it may say so of all.
            if odd != "own" {
                proxy.ask(get(&format!("/{n}"), &fields)).await;
                proxy.get(&format!("/{n}")).await;
                assert!(is_hit(&proxy.get(&format!("/{n}")).await), "{section} {odd}");
            }
        }
        // A credential is nothing odd, and what it brings is its own.
        proxy.ask(get("/", "authorization: x\r\ncache-control: no-cache\r\n")).await;
        assert!(is_hit(&proxy.get("/").await), "{section}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_url_is_purged_however_it_is_written() {
    let (_backend, proxy) = counting("{}", "cache-control: max-age=600\r\n").await;
    for (path, url) in [
        ("/go?to=http://x.example/y", "/go?to=http://x.example/y"),
        ("/go?to=http://x.example/y", "http://sidegate.test/go?to=http://x.example/y"),
        ("/port", "http://sidegate.test:80/port"),
        ("/port", "http://SIDEGATE.test/port#part"),
        ("/port", "sidegate.test/port"),
        ("/", "http://sidegate.test"),
    ] {
        let kept = proxy.get(path).await.text();
        for (url, dropped) in [("http://other.test/port", false), (url, true)] {
            let encoded = [(":", "%3a"), ("?", "%3f"), ("=", "%3d"), ("#", "%23")]
                .into_iter()
                .fold(url.to_owned(), |encoded, (from, to)| encoded.replace(from, to));
            assert_eq!(proxy.admin_post(&format!("/cache/purge?url={encoded}")).await.status(), 200, "{url}");
            assert_eq!(proxy.get(path).await.text() != kept, dropped, "{url}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_says_what_it_must_say_is_kept() {
    let backend = Recorder::scripted(|before, _| {
        let status = ["queued", "running", "completed"][before.min(2)];
        ok("content-type: application/json\r\n", &format!(r#"{{"id": 7, "status": "{status}"}}"#))
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h, when: { status: [completed, failed] } }")).await;
    for status in ["queued", "running", "completed", "completed"] {
        assert_eq!(proxy.get("/jobs/7").await.json()["status"], status);
    }
    assert_eq!(backend.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_purge_is_also_one_of_what_could_not_be_kept() {
    for (purge, is_one) in [
        ("url=/a", true),
        ("tag=t", true),
        ("glob=/a*", true),
        ("tag=t&soft=true", true),
        ("all", true),
        ("url=/b", false),
    ] {
        let backend = Recorder::scripted(|before, _| {
            ok(if before == 0 { "cache-control: no-store\r\n" } else { "cache-control: max-age=600\r\n" }, "")
        })
        .await;
        let proxy = Proxy::before(&backend.url(), &cached("{ tags: [t] }")).await;
        proxy.get("/a").await;
        assert!(source(&proxy.get("/a").await).contains("detail=not-kept"));
        assert_eq!(proxy.admin_post(&format!("/cache/purge?{purge}")).await.status(), 200);
        let after = proxy.get("/a").await;
        assert_eq!(!source(&after).contains("detail=not-kept"), is_one, "{purge} {after:?}");
        assert_eq!(is_hit(&proxy.get("/a").await), is_one, "{purge}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_passed_on_whole_and_nobody_waits_for_it_again() {
    let body = "x".repeat(300 << 10);
    for framing in ["length", "chunked", "close"] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h, max_body: 64KiB }")).await;
        let answer = match framing {
            "length" => ok("connection: close\r\n", &body),
            "chunked" => {
                let head = "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n";
                format!("{head}{:x}\r\n{body}\r\n0\r\n\r\n", body.len())
            }
            _ => format!("HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n{body}"),
        };
        let mut client = proxy.connect().await;
        client.send(get("/", "connection: close\r\n")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(&answer).await;
        drop(upstream);
        let whole = client.answer().await;
        assert!(whole.text() == body, "{framing}: {} bytes", whole.body.len());

        // None of two waits for the other.
        let mut clients = [proxy.connect().await, proxy.connect().await];
        let mut upstreams = Vec::new();
        for client in &mut clients {
            client.send(get("/", "")).await;
            upstreams.push(backend.accept_head().await.0);
        }
        for upstream in &mut upstreams {
            upstream.send(&answer).await;
        }
        drop(upstreams);
        for client in &mut clients {
            let whole = client.answer().await;
            assert!(whole.text() == body, "{framing}: {} bytes", whole.body.len());
            assert_eq!(source(&whole), "sidegate; fwd=uri-miss; fwd-status=200; detail=not-kept");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn empty_bodies_and_trailers_are_given_again_as_they_were() {
    let backend = Recorder::scripted(|_, request| match request.head.target() {
        "/204" => "HTTP/1.1 204 No Content\r\n\r\n".to_owned(),
        "/empty" => ok("", ""),
        "/chunked" => "HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n".to_owned(),
        _ => "HTTP/1.1 200 OK\r\ntrailer: x-sum\r\ntransfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\nx-sum: 7\r\n\r\n"
            .to_owned(),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h }")).await;
    for path in ["/204", "/empty", "/chunked", "/trailers"] {
        let mut seen = Vec::new();
        for turn in 0..2 {
            let answer = proxy.ask(get(path, "te: trailers\r\n")).await;
            assert_eq!(is_hit(&answer), turn > 0, "{path}: {answer:?}");
            seen.push((answer.status(), answer.text(), answer.trailers));
        }
        assert_eq!(seen[0], seen[1]);
        let trailers: &[(String, String)] = &[("x-sum".to_owned(), "7".to_owned())];
        assert_eq!(seen[1].2, if path == "/trailers" { trailers } else { &[] });
    }
    assert_eq!(backend.count(), 4);
}
