//! What becomes of an answer that is too old, and what stands in where the upstream fails.

use tokio::task::JoinSet;

use crate::{
    cache::{YEAR_2020, answer, cached, code, counting, get, is_hit, ok, source},
    cache_streams::{asking, waiting},
    harness::{Backend, Proxy, Wire, backend::Recorder, eventually, figure},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_answer_that_still_holds_is_renewed() {
    let backend = Recorder::scripted(|before, request| {
        let tag = request.head.get("if-none-match");
        match before {
            0 => ok("cache-control: max-age=0\r\netag: \"v1\"\r\nx-turn: one\r\nx-first: kept\r\n", "body"),
            1 => {
                assert_eq!((tag, request.head.get("range")), (Some("\"v1\""), None));
                let fields = "cache-control: max-age=600\r\netag: \"v1\"\r\nx-turn: two\r\n\r\n";
                format!("HTTP/1.1 304 Not Modified\r\n{fields}")
            }
            _ => panic!("it is fresh again"),
        }
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    let renewed = proxy.get("/").await;
    assert_eq!((renewed.status(), renewed.text().as_str()), (200, "body"));
    assert_eq!((renewed.head.get("x-turn"), renewed.head.get("x-first")), (Some("two"), Some("kept")));
    assert!(source(&renewed).starts_with("sidegate; fwd=stale; fwd-status=304; ttl="), "{renewed:?}");
    let again = proxy.get("/").await;
    assert!(is_hit(&again));
    assert_eq!((again.text().as_str(), again.head.get("x-turn")), ("body", Some("two")));
    assert_eq!(backend.count(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_answer_is_asked_about_by_its_date_and_replaced_by_another() {
    let backend = Recorder::scripted(|before, request| {
        let since = request.head.get("if-modified-since");
        assert_eq!(since, (before == 1).then_some(YEAR_2020));
        let seconds = if before == 0 { 0 } else { 600 };
        ok(&format!("cache-control: max-age={seconds}\r\nlast-modified: {YEAR_2020}\r\n"), &before.to_string())
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    assert_eq!(proxy.get("/").await.text(), "0");
    assert_eq!(proxy.get("/").await.text(), "1");
    let again = proxy.get("/").await;
    assert!(is_hit(&again));
    assert_eq!(again.text(), "1");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_purged_while_it_is_asked_about_is_not_given_again() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for (path, answer) in [("/304", "304 Not Modified"), ("/503", "503 Down")] {
        let mut client = proxy.connect().await;
        client.send(get(path, "")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(ok("cache-control: max-age=600, stale-if-error=600\r\netag: \"e\"\r\n", "old")).await;
        assert_eq!(client.answer().await.text(), "old");
        proxy.admin_post(&format!("/cache/purge?url={path}&soft")).await;
        client.send(get(path, "")).await;
        assert_eq!(upstream.head().await.get("if-none-match"), Some("\"e\""));
        proxy.admin_post(&format!("/cache/purge?url={path}")).await;
        upstream.send(format!("HTTP/1.1 {answer}\r\ncontent-length: 0\r\n\r\n")).await;
        if answer == "503 Down" {
            assert_eq!(client.answer().await.status(), 503, "and no stale answer");
            continue;
        }
        assert_eq!(upstream.head().await.get("if-none-match"), None, "it is asked for anew");
        upstream.send(ok("cache-control: max-age=600\r\n", "new")).await;
        assert_eq!(client.answer().await.text(), "new");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cookie_beside_a_304_is_for_who_asked() {
    let backend = Recorder::scripted(|before, _| match before {
        0 => ok("cache-control: max-age=0\r\netag: \"v1\"\r\n", "body"),
        _ => "HTTP/1.1 304 Not Modified\r\ncache-control: max-age=600\r\nset-cookie: a=b\r\nset-cookie: c=d\r\n\r\n"
            .to_owned(),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    assert_eq!(proxy.get("/").await.head.all("set-cookie"), ["a=b", "c=d"]);
    let hit = proxy.get("/").await;
    assert!(is_hit(&hit) && hit.head.get("set-cookie").is_none(), "{hit:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_may_be_over_the_next_moment_is_not_held_against_what_comes_after_it() {
    for status in ["429 Too Many Requests", "503 Service Unavailable"] {
        let backend = Recorder::scripted(move |before, _| match before {
            0 => answer(status, "", ""),
            _ => ok("cache-control: max-age=600\r\n", "well"),
        })
        .await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        assert_eq!(proxy.get("/").await.status(), code(status));
        assert_eq!(proxy.get("/").await.text(), "well");
        assert!(is_hit(&proxy.get("/").await), "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_304_about_another_answer_renews_nothing() {
    let backend = Recorder::scripted(|before, request| match before {
        0 => ok("cache-control: max-age=0\r\netag: \"v1\"\r\n", "old"),
        1 => "HTTP/1.1 304 Not Modified\r\ncache-control: max-age=600\r\netag: \"v2\"\r\n\r\n".to_owned(),
        _ => {
            assert_eq!(request.head.get("if-none-match"), None);
            ok("cache-control: max-age=600\r\netag: \"v2\"\r\n", "new")
        }
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    assert_eq!(proxy.get("/").await.text(), "new");
    assert!(is_hit(&proxy.get("/").await));
    assert_eq!(backend.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_304_that_says_what_the_answer_depends_on_is_not_for_everybody() {
    let backend = Recorder::scripted(|before, _| match before {
        0 => ok("cache-control: max-age=0\r\netag: \"v1\"\r\n", "old"),
        1 => {
            "HTTP/1.1 304 Not Modified\r\ncache-control: max-age=600\r\netag: \"v1\"\r\nvary: accept\r\n\r\n".to_owned()
        }
        _ => ok("cache-control: max-age=600\r\nvary: accept\r\n", "json"),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    assert_eq!(proxy.get("/").await.text(), "old");
    assert_eq!(proxy.ask(get("/", "accept: application/json\r\n")).await.text(), "json");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_304_that_makes_an_answer_private_is_for_who_asked_and_the_last_of_it() {
    for said in ["private", "no-store"] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        let mut client = asking(&proxy, get("/", "")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(ok("cache-control: max-age=0\r\netag: \"a\"\r\nconnection: close\r\n", "old")).await;
        client.answer().await;
        let mut first = asking(&proxy, get("/", "")).await;
        let (mut upstream, _) = backend.accept_head().await;
        let mut other = asking(&proxy, get("/", "")).await;
        waiting(&proxy, 2).await;
        let fields = format!("cache-control: {said}\r\netag: \"a\"\r\nconnection: close\r\n");
        upstream.send(format!("HTTP/1.1 304 Not Modified\r\n{fields}\r\n")).await;
        let renewed = first.answer().await;
        assert_eq!(renewed.text(), "old");
        assert!(!source(&renewed).contains("; stored"), "{renewed:?}");
        let (mut upstream, head) = backend.accept_head().await;
        assert_eq!(head.get("if-none-match"), None, "there is nothing left to ask about");
        upstream.send(ok(&fields, "its own")).await;
        assert_eq!(other.answer().await.text(), "its own", "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_steps_in_takes_no_stored_answer_away() {
    let fields = "cache-control: max-age=0, stale-if-error=600\r\n";
    let down = || answer("503 Service Unavailable", "connection: close\r\n", "down");
    let own = Recorder::scripted(move |before, _| if before == 0 { ok(fields, "own") } else { down() }).await;
    let other = Recorder::scripted(move |before, _| match before {
        1 => ok("cache-control: max-age=600\r\nvary: accept-encoding\r\n", "other"),
        _ => down(),
    })
    .await;
    let settings = format!(
        "upstreams: {{ api: {{ endpoints: [UPSTREAM] }}, other: {{ endpoints: ['{}'] }} }}
routes: [{{ upstream: api, name: all, cache: {{}}, retry: off, fallback: [{{ upstream: other, on: [503] }}] }}]",
        other.url()
    );
    let proxy = Proxy::before(&own.url(), &settings).await;
    for expected in ["own", "own", "other", "own"] {
        let answer = proxy.get("/").await;
        assert_eq!((answer.status(), answer.text().as_str()), (200, expected), "{answer:?}");
    }

    // Nor does a new one that does not come to its end.
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for sent in [
        ok(&format!("{fields}connection: close\r\n"), "own"),
        "HTTP/1.1 200 OK\r\ncache-control: max-age=600\r\nvary: accept\r\ncontent-length: 9\r\n\r\nnew".to_owned(),
        down(),
    ] {
        let mut client = asking(&proxy, get("/", "connection: close\r\n")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(&sent).await;
        client.head().await;
        drop(upstream);
        let (text, _) = client.rest().await;
        assert_eq!(text, if sent.contains("vary") { b"new" } else { b"own" }, "{sent}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_answer_is_given_while_one_request_asks_anew() {
    for (section, fields) in [
        ("{ stale_while_revalidate: 1h }", "cache-control: max-age=0\r\netag: \"v1\"\r\n"),
        ("{}", "cache-control: max-age=0, stale-while-revalidate=3600\r\n"),
    ] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        let mut client = proxy.connect().await;
        client.send(get("/", "")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(ok(fields, "old")).await;
        assert_eq!(client.answer().await.text(), "old");

        let mut clients = JoinSet::new();
        for _ in 0..50 {
            clients.spawn(Wire::ask(proxy.address(), get("/", "")));
        }
        for stale in clients.join_all().await {
            assert!(is_hit(&stale) && stale.text() == "old", "{stale:?}");
        }
        let head = upstream.head().await;
        assert_eq!(head.get("if-none-match").is_some(), fields.contains("etag"), "{head:?}");
        assert!(backend.accepted().await.is_none(), "one asks for all");
        assert_eq!(proxy.sample("sidegate_cache_refreshed_total{route=\"all\"}").await, 1);
        upstream.send(ok("cache-control: max-age=600\r\n", "new")).await;
        eventually("the new answer", async || proxy.get("/").await.text() == "new").await;
        assert!(is_hit(&proxy.get("/").await));
        figure("50 requests for a stale answer: 1 went upstream, none waited");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_will_be_stale_soon_is_asked_for_before() {
    let (backend, proxy) = counting("{ ttl: 1h, refresh: 59m }", "").await;
    proxy.get("/").await;
    assert!(is_hit(&proxy.get("/").await));
    assert_eq!(backend.count(), 1, "not yet");
    let (backend, proxy) = counting("{ refresh: 1h }", "cache-control: max-age=600\r\n").await;
    proxy.get("/").await;
    let hit = proxy.get("/").await;
    assert!(is_hit(&hit) && hit.text() == "1", "nobody waits for it");
    // Once a second at most, as it would never be anything but due.
    eventually("it to be asked for again", async || {
        proxy.get("/").await;
        backend.count() >= 2
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_answer_stands_in_where_the_upstream_fails() {
    let fields = "cache-control: max-age=0\r\n";
    let backend = Recorder::scripted(move |before, _| match before {
        0 => ok(fields, "old"),
        1 => answer("503 Service Unavailable", "", "down"),
        _ => answer("404 Not Found", "", "gone"),
    })
    .await;
    let settings = "
upstreams: { api: { endpoints: [UPSTREAM], circuit_breaker: { consecutive_failures: 3, recovery: 1h } } }
routes: [{ upstream: api, name: all, cache: { stale_if_error: 1h } }]
";
    let proxy = Proxy::before(&backend.url(), settings).await;
    proxy.get("/").await;
    let stale = proxy.get("/").await;
    assert_eq!((stale.status(), stale.text().as_str()), (200, "old"));
    assert_eq!(source(&stale).split("; ttl").next(), Some("sidegate; fwd=stale; fwd-status=503"), "{stale:?}");
    assert!(source(&stale).ends_with("; detail=stale-if-error"), "{stale:?}");
    assert!(stale.head.get("age").is_some());
    drop(backend);
    // Refused connections, and then nothing is tried any more.
    let open = async || proxy.admin_get("/circuit-breakers").await.json()["circuit_breakers"][0]["state"] == "open";
    let mut turns = 0;
    while !open().await {
        let stale = proxy.get("/").await;
        assert_eq!((stale.status(), stale.text().as_str()), (200, "old"));
        turns += 1;
        assert!(turns < 10, "the breaker opens");
    }
    let stale = proxy.get("/").await;
    assert_eq!((stale.status(), stale.text().as_str()), (200, "old"), "{stale:?}");
    let fresh = proxy.ask(get("/", "cache-control: no-cache\r\n")).await;
    assert_eq!(fresh.status(), 503, "not for who wants none of it");
    assert_eq!(proxy.get("/other").await.status(), 503);
    // Who may not ask for a fresh answer need not have an error either.
    let backend = Recorder::scripted(move |before, _| match before {
        0 => ok(fields, "old"),
        _ => answer("503 Service Unavailable", "", "down"),
    })
    .await;
    let section = "{ stale_if_error: 1h, client_cache_control: false }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    proxy.get("/").await;
    assert_eq!(proxy.ask(get("/", "cache-control: no-cache\r\n")).await.text(), "old");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_answer_stands_in_for_who_asks_alone() {
    let backend = Backend::start().await;
    let section = "{ stale_if_error: 1h, coalesce_timeout: 100ms }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    let asking = async |method: &str| {
        let mut wire = proxy.connect().await;
        wire.send(format!("{method} / HTTP/1.1\r\nhost: sidegate.test\r\nconnection: close\r\n\r\n")).await;
        (wire, backend.accept_head().await.0)
    };
    let told =
        |cache: &str| cache.starts_with("sidegate; fwd=stale; fwd-status=503") && cache.ends_with("stale-if-error");
    let down = answer("503 Service Unavailable", "connection: close\r\n", "down");
    let (mut client, mut upstream) = asking("GET").await;
    upstream.send(ok("cache-control: max-age=0\r\nconnection: close\r\n", "old")).await;
    assert_eq!(client.answer().await.text(), "old");

    let (mut client, mut upstream) = asking("HEAD").await;
    upstream.send(&down).await;
    let head = client.head().await;
    assert_eq!((head.status(), head.get("content-length")), (200, Some("3")));
    assert!(told(head.get("cache-status").unwrap()), "{head:?}");

    // The second goes on by itself when it has waited long enough.
    let (_first, _hangs) = asking("GET").await;
    let (mut second, mut upstream) = asking("GET").await;
    upstream.send(&down).await;
    let stale = second.answer().await;
    assert_eq!((stale.status(), stale.text().as_str()), (200, "old"));
    assert!(told(source(&stale)), "{stale:?}");
    let outcomes = async |outcome: &str| {
        proxy.sample(&format!("sidegate_cache_requests_total{{route=\"all\",outcome=\"{outcome}\"}}")).await
    };
    assert_eq!((outcomes("stale").await, outcomes("miss").await), (2, 1), "each is counted once");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_304_that_nobody_asked_for_is_passed_on() {
    let backend = Recorder::scripted(|before, _| match before {
        0 => ok("cache-control: max-age=0\r\n", "old"),
        _ => "HTTP/1.1 304 Not Modified\r\n\r\n".to_owned(),
    })
    .await;
    let section = "{ methods: [POST], key: [body], stale_if_error: 1h }";
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    let post = "POST / HTTP/1.1\r\nhost: sidegate.test\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\
                connection: close\r\n\r\n{}";
    assert_eq!(proxy.ask(post).await.text(), "old");
    assert_eq!(proxy.ask(post).await.status(), 304);
    assert_eq!(backend.count(), 2, "and not sent again without its body");
}

#[tokio::test(flavor = "multi_thread")]
async fn each_who_waits_for_an_upstream_that_fails_says_itself_whether_an_old_answer_will_do() {
    let fields = ["", "cache-control: no-cache\r\n"];
    for (first, section) in [(0, "{ stale_if_error: 1h }"), (1, "{ stale_if_error: 1h }"), (0, "{}"), (1, "{}")] {
        for is_dead in [false, true] {
            let backend = Backend::start().await;
            let proxy = Proxy::before(&backend.url(), &cached(section)).await;
            let mut client = asking(&proxy, get("/", "")).await;
            let (mut upstream, _) = backend.accept_head().await;
            upstream.send(ok("cache-control: max-age=0, stale-if-error=600\r\nconnection: close\r\n", "old")).await;
            assert_eq!(client.answer().await.text(), "old");

            // One after the other, so that it is known who asks for both.
            let mut clients = Vec::new();
            clients.push(asking(&proxy, get("/", fields[first])).await);
            let (mut upstream, _) = backend.accept_head().await;
            clients.push(asking(&proxy, get("/", fields[1 - first])).await);
            waiting(&proxy, 2).await;
            if is_dead {
                drop(upstream);
            } else {
                upstream.send(answer("503 Service Unavailable", "", "down")).await;
            }
            for (client, n) in clients.iter_mut().zip([first, 1 - first]) {
                let got = client.answer().await;
                if n == 0 {
                    assert_eq!((got.status(), got.text().as_str()), (200, "old"), "{first} {section}: {got:?}");
                    assert!(source(&got).ends_with("; detail=stale-if-error"), "{got:?}");
                } else {
                    assert_eq!(got.status(), if is_dead { 502 } else { 503 }, "{first} {section}: {got:?}");
                }
            }
            assert!(backend.accepted().await.is_none(), "one request failed for both");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stale_answer_does_not_stand_in_for_the_truth() {
    for (section, fields, status) in [
        ("{}", "cache-control: max-age=0\r\netag: \"a\"\r\n", "503 Service Unavailable"),
        ("{ stale_if_error: 1h }", "cache-control: max-age=0\r\n", "404 Not Found"),
        (
            "{ stale_if_error: 1h }",
            "cache-control: max-age=0, must-revalidate\r\netag: \"a\"\r\n",
            "503 Service Unavailable",
        ),
    ] {
        let backend = Recorder::scripted(move |before, _| match before {
            0 => ok(fields, "old"),
            _ => answer(status, "", "now"),
        })
        .await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        proxy.get("/").await;
        let now = proxy.get("/").await;
        assert_eq!((now.status(), now.text().as_str()), (code(status), "now"), "{section} {fields}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_error_that_one_client_gets_does_not_take_the_answer_from_the_others() {
    let odd = |fields: &str| get("/", &format!("cache-control: no-cache\r\nx-odd: 1\r\n{fields}"));
    for (section, fields, of_error) in [
        ("{ stale_if_error: 1h, negative_ttl: 10s }", "cache-control: max-age=0\r\n", ""),
        ("{ stale_if_error: 1h }", "cache-control: max-age=0\r\n", "cache-control: max-age=600\r\n"),
        ("{ negative_ttl: 1h }", "cache-control: max-age=600\r\n", ""),
        // What says less of what it depends on hides nothing either, nor does what says more.
        ("{ negative_ttl: 1h }", "cache-control: max-age=600\r\nvary: accept\r\n", ""),
        ("{ negative_ttl: 1h }", "cache-control: max-age=600\r\nvary: accept\r\n", "vary: accept, x-odd\r\n"),
    ] {
        for status in ["503 Service Unavailable", "500 Internal Server Error", "501 Not Implemented", "429 Slow Down"] {
            let backend = Recorder::scripted(move |_, request| match request.head.get("x-odd") {
                Some(_) => answer(status, of_error, "down"),
                None => ok(fields, "well"),
            })
            .await;
            let proxy = Proxy::before(&backend.url(), &cached(section)).await;
            assert_eq!(proxy.get("/").await.text(), "well");
            for accept in ["", "accept: other\r\n"] {
                let error = proxy.ask(odd(accept)).await;
                assert_eq!(error.status(), code(status));
                assert!(!source(&error).contains("stored") || !accept.is_empty(), "{section} {error:?}");
            }
            let before = backend.count();
            if fields.contains("max-age=0") {
                let stale = proxy.ask(get("/", "x-odd: 1\r\n")).await;
                assert_eq!(stale.text() == "well", status.starts_with("50") && !status.starts_with("501"), "{status}");
            } else {
                assert_eq!(proxy.get("/").await.text(), "well", "{status} {section} {of_error}");
                assert_eq!(backend.count(), before, "it is there: {status} {section} {of_error}");
            }
        }
        // What is gone is gone, for all.
        let backend = Recorder::scripted(move |_, request| match request.head.get("x-odd") {
            Some(_) => answer("404 Not Found", "cache-control: max-age=600\r\n", "gone"),
            None => ok("cache-control: max-age=600\r\n", "well"),
        })
        .await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        assert_eq!(proxy.get("/").await.text(), "well");
        proxy.ask(odd("")).await;
        assert_eq!(proxy.get("/").await.text(), "gone");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn errors_are_kept_as_long_as_the_operator_says() {
    for (status, section, kept) in [
        ("404 Not Found", "{ negative_ttl: 1h }", true),
        ("410 Gone", "{ negative_ttl: 1h }", true),
        ("503 Service Unavailable", "{ negative_ttl: 1h }", true),
        ("403 Forbidden", "{ negative_ttl: 1h }", false),
        ("401 Unauthorized", "{ negative_ttl: 1h, ttl: 1h }", false),
        ("404 Not Found", "{ ttl: 1h }", false),
        ("500 Internal Server Error", "{ ttl: 1h }", false),
    ] {
        let backend = Recorder::scripted(move |before, _| answer(status, "", &before.to_string())).await;
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        assert_eq!(proxy.get("/").await.text(), "0");
        let again = proxy.get("/").await;
        assert_eq!(again.status(), code(status));
        assert_eq!(is_hit(&again), kept, "{status} {section}: {again:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_upstream_says_is_not_kept_for_the_routes_own() {
    let own = Recorder::scripted(|before, _| {
        let fields = "cache-control: max-age=0, stale-while-revalidate=3600\r\n";
        if before == 1 { answer("503 Service Unavailable", "", "") } else { ok(fields, "own") }
    })
    .await;
    let other = Recorder::answering(ok("cache-control: max-age=600\r\n", "other")).await;
    let settings = format!(
        "upstreams: {{ api: {{ endpoints: [UPSTREAM] }}, other: {{ endpoints: ['{}'] }} }}
routes: [{{ upstream: api, name: all, cache: {{}}, retry: off, fallback: [{{ upstream: other, on: [503] }}] }}]",
        other.url()
    );
    let proxy = Proxy::before(&own.url(), &settings).await;
    assert_eq!(proxy.get("/").await.text(), "own");
    assert_eq!(proxy.get("/").await.text(), "own", "while it is asked for again behind it");
    eventually("the other to be asked", async || other.count() == 1).await;
    eventually("the answer's end", async || proxy.sample("sidegate_cache_refreshed_total{route=\"all\"}").await == 1)
        .await;
    for _ in 0..5 {
        assert_eq!(proxy.get("/").await.text(), "own");
    }
}
