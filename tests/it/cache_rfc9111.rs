//! What RFC 9111 demands in its sections 3 to 5, between real sockets; each test begins with the number of the section.
//! What is decided without them has unit tests named in the same way, in `layers::cache`.

use crate::{
    cache::{YEAR_2020, answer, cached, counting, get, is_hit, ok, source},
    cache_streams::{asking, waiting},
    harness::{Backend, Proxy, backend::Recorder, eventually},
};

fn request(method: &str, path: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: sidegate.test\r\ncontent-length: 0\r\n\r\n")
}

/// A proxy that has been answered with these fields, by a backend that is gone.
async fn stored_once(section: &str, fields: &str) -> Proxy {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached(section)).await;
    let mut client = asking(&proxy, get("/", "")).await;
    let (mut upstream, _) = backend.accept_head().await;
    upstream.send(ok(&format!("{fields}connection: close\r\n"), "old")).await;
    assert_eq!(client.answer().await.text(), "old");
    proxy
}

#[tokio::test(flavor = "multi_thread")]
async fn section_3_what_nothing_allows_is_not_stored() {
    for (status, fields, request) in [
        ("200 OK", "", get("/", "")),
        ("200 OK", "etag: \"a\"\r\n", get("/", "")),
        ("500 Internal Server Error", "last-modified: Wed, 01 Jan 2020 00:00:00 GMT\r\n", get("/", "")),
        ("302 Found", "location: /b\r\n", get("/", "")),
        ("200 OK", "cache-control: max-age=600\r\n", request("OPTIONS", "/")),
        ("200 OK", "cache-control: max-age=600\r\n", request("TRACK", "/")),
        ("200 OK", "cache-control: max-age=600, no-store\r\n", get("/", "")),
        ("200 OK", "cache-control: max-age=600, private\r\n", get("/", "")),
        ("200 OK", "cache-control: max-age=600\r\n", get("/", "authorization: Basic YTpi\r\n")),
    ] {
        let backend = Recorder::scripted(move |before, _| answer(status, fields, &before.to_string())).await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        for turn in ["0", "1"] {
            assert_eq!(proxy.ask(&request).await.text(), turn, "{status} {fields} {request}");
        }
        assert_eq!(proxy.sample("sidegate_cache_stored_total{route=\"all\"}").await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_3_1_every_field_is_stored_but_those_of_the_connection_and_of_proxies() {
    let fields = "cache-control: max-age=600\r\nx-unheard-of: a\r\nX-Unheard-Of: b\r\nconnection: x-hop\r\nx-hop: 1\r\n\
                  proxy-authenticate: Basic\r\nproxy-authentication-info: a=b\r\n";
    let (_backend, proxy) = counting("{}", fields).await;
    proxy.get("/").await;
    let hit = proxy.get("/").await;
    assert!(is_hit(&hit));
    assert_eq!(hit.head.all("x-unheard-of"), ["a", "b"]);
    for gone in ["x-hop", "proxy-authenticate", "proxy-authentication-info"] {
        assert_eq!(hit.head.get(gone), None, "{hit:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_3_1_trailers_do_not_become_header_fields() {
    let chunked = "HTTP/1.1 200 OK\r\ncache-control: max-age=600\r\nx-own: head\r\ntrailer: x-own, x-sum\r\n\
                   transfer-encoding: chunked\r\n\r\n3\r\none\r\n0\r\nx-own: trailer\r\nx-sum: 7\r\n\r\n";
    let backend = Recorder::answering(chunked).await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for turn in 0..2 {
        let answer = proxy.ask(get("/", "te: trailers\r\n")).await;
        assert_eq!(is_hit(&answer), turn > 0);
        assert_eq!((answer.head.all("x-own"), answer.head.get("x-sum")), (vec!["head"], None), "{answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_3_2_a_304_adds_and_replaces_fields_but_none_that_tells_of_the_content() {
    let backend = Recorder::scripted(|before, _| match before {
        0 => ok("cache-control: max-age=0\r\netag: \"a\"\r\nx-old: 1\r\nx-both: 1\r\nx-both: 2\r\n", "body"),
        _ => "HTTP/1.1 304 Not Modified\r\ncache-control: max-age=600\r\netag: \"a\"\r\nx-both: 3\r\nx-new: 4\r\n\
              content-encoding: gzip\r\ncontent-range: bytes 0-1/9\r\nx-hop: 5\r\nconnection: x-hop\r\n\r\n"
            .to_owned(),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    for turn in 0..2 {
        let answer = proxy.get("/").await;
        assert_eq!((is_hit(&answer), answer.text().as_str()), (turn > 0, "body"));
        let of = |name| answer.head.all(name);
        assert_eq!((of("x-old"), of("x-both"), of("x-new")), (vec!["1"], vec!["3"], vec!["4"]), "{answer:?}");
        assert_eq!(of("content-length"), ["4"]);
        assert!(of("content-encoding").is_empty() && of("content-range").is_empty() && of("x-hop").is_empty());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_3_3_what_is_incomplete_answers_nothing() {
    for (framing, reset) in [
        ("content-length: 10\r\n\r\n0123", false),
        ("content-length: 10\r\n\r\n0123", true),
        ("transfer-encoding: chunked\r\n\r\n4\r\n0123\r\n", false),
        ("transfer-encoding: chunked\r\n\r\n4\r\n0123\r\n6\r\n45", false),
        // The end of the connection ends it; a reset does not.
        ("\r\n0123", true),
    ] {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        let mut client = asking(&proxy, get("/", "connection: close\r\n")).await;
        let (mut upstream, _) = backend.accept_head().await;
        upstream.send(format!("HTTP/1.1 200 OK\r\ncache-control: max-age=600\r\netag: \"a\"\r\n{framing}")).await;
        let head = client.head().await;
        assert_eq!(head.status(), 200);
        client.arrival().await;
        upstream.leave(reset);
        client.rest().await;
        for request in [get("/", ""), get("/", "range: bytes=0-1\r\n")] {
            let mut client = asking(&proxy, request).await;
            let (mut upstream, head) = backend.accept_head().await;
            assert_eq!(head.get("if-none-match"), None, "there is nothing to validate");
            upstream.send(answer("404 Not Found", "connection: close\r\n", "gone")).await;
            assert_eq!(client.answer().await.text(), "gone", "{framing}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_3_3_a_part_says_that_it_is_one() {
    let (_backend, proxy) = counting("{}", "cache-control: max-age=600\r\n").await;
    let whole = proxy.get("/").await;
    let part = proxy.ask(get("/", "range: bytes=0-0\r\n")).await;
    assert_eq!((part.status(), part.head.get("content-range")), (206, Some("bytes 0-0/1")));
    assert_eq!(part.text(), whole.text());
    let unknown = proxy.ask(get("/", "range: lines=0-0\r\n")).await;
    assert_eq!((unknown.status(), unknown.head.get("content-range")), (200, None), "another unit than bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn section_3_4_parts_are_not_put_together() {
    let backend = Recorder::scripted(|_, request| match request.head.get("range") {
        Some("bytes=0-4") => answer(
            "206 Partial Content",
            "cache-control: max-age=600\r\netag: \"a\"\r\ncontent-range: bytes 0-4/10\r\n",
            "01234",
        ),
        Some("bytes=5-9") => answer(
            "206 Partial Content",
            "cache-control: max-age=600\r\netag: \"a\"\r\ncontent-range: bytes 5-9/10\r\n",
            "56789",
        ),
        _ => answer("404 Not Found", "", "gone"),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for _ in 0..2 {
        for (range, text) in [("bytes=0-4", "01234"), ("bytes=5-9", "56789")] {
            assert_eq!(proxy.ask(get("/", &format!("range: {range}\r\n"))).await.text(), text);
        }
    }
    assert_eq!(proxy.get("/").await.text(), "gone");
    assert_eq!(backend.count(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_an_answer_is_for_its_uri_and_its_method() {
    let (backend, proxy) = counting("{}", "cache-control: max-age=600\r\n").await;
    let kept = proxy.get("/a?b=c").await.text();
    for other in [
        get("/a?b=d", ""),
        get("/a?b=c&", ""),
        get("/a", ""),
        get("/A?b=c", ""),
        get("/a/?b=c", ""),
        get("/a?b=c", "").replace("sidegate.test", "other.test"),
        get("/a?b=c", "").replace("sidegate.test", "sidegate.test:81"),
        request("OPTIONS", "/a?b=c"),
    ] {
        let answer = proxy.ask(&other).await;
        assert!(!is_hit(&answer) && answer.text() != kept, "{other}");
    }
    assert_eq!(backend.count(), 9);
    for same in [get("/a?b=c", ""), get("/a?b=c", "").replace("sidegate.test", "SIDEGATE.test:80")] {
        assert_eq!(proxy.ask(&same).await.text(), kept, "{same}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_a_stored_answer_says_its_age_in_place_of_any_that_it_had() {
    let (_backend, proxy) = counting("{}", "cache-control: max-age=600\r\nage: 100\r\n").await;
    assert_eq!(proxy.get("/").await.head.all("age"), ["100"]);
    eventually("it to grow older", async || {
        let hit = proxy.get("/").await;
        assert!(is_hit(&hit));
        let [age] = hit.head.all("age")[..] else { panic!("{hit:?}") };
        age.parse::<u64>().unwrap() > 100
    })
    .await;
    for fields in ["range: bytes=0-0\r\n", "if-modified-since: Fri, 01 Jan 2100 00:00:00 GMT\r\n"] {
        let hit = proxy.ask(get("/", fields)).await;
        assert!(is_hit(&hit) && hit.head.all("age").len() == 1, "{hit:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_what_may_change_something_is_written_through() {
    let backend = Recorder::scripted(|before, request| {
        let method = request.head.start.split(' ').next().unwrap();
        // A failure, so that what is stored stays.
        if method == "GET" {
            ok("cache-control: max-age=600\r\n", "kept")
        } else {
            answer("409 Conflict", "", &format!("{before}"))
        }
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{ stale_if_error: 1h, negative_ttl: 1h }")).await;
    proxy.get("/").await;
    for (n, method) in ["PUT", "POST", "DELETE", "PATCH", "BREW", "PUT"].into_iter().enumerate() {
        let written = proxy.ask(request(method, "/")).await;
        assert_eq!((written.status(), written.text()), (409, (n + 1).to_string()), "{method}");
        assert!(backend.requests()[n + 1].head.start.starts_with(method));
        assert!(is_hit(&proxy.get("/").await));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_the_latest_answer_is_the_one_that_is_used() {
    let backend = Recorder::scripted(|before, request| {
        let vary = if before == 2 { "vary: accept\r\n" } else { "" };
        let accept = request.head.get("accept").unwrap_or("any");
        ok(&format!("cache-control: max-age=600\r\n{vary}"), &format!("{before} {accept}"))
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    assert_eq!(proxy.get("/").await.text(), "0 any");
    assert_eq!(proxy.ask(get("/", "cache-control: no-cache\r\n")).await.text(), "1 any");
    assert_eq!(proxy.get("/").await.text(), "1 any");
    // One with other terms takes its place, too.
    let json = proxy.ask(get("/", "cache-control: no-cache\r\naccept: json\r\n")).await;
    assert_eq!(json.text(), "2 json");
    assert_eq!(proxy.ask(get("/", "accept: json\r\n")).await.text(), "2 json");
    assert!(proxy.get("/").await.text() != "0 any");
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_1_what_is_named_in_vary_must_match_and_a_star_never_does() {
    let backend = Recorder::scripted(|before, request| {
        let vary = if request.head.target() == "/star" { "*" } else { "Accept, X-Own" };
        ok(&format!("cache-control: max-age=600\r\nvary: {vary}\r\n"), &before.to_string())
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for (n, fields) in
        ["", "accept: a\r\n", "x-own: a\r\n", "accept: a\r\nx-own: a\r\n", "accept: \r\n", "x-own: A\r\n"]
            .into_iter()
            .enumerate()
    {
        for turn in 0..2 {
            let answer = proxy.ask(get("/", fields)).await;
            assert_eq!((is_hit(&answer), answer.text()), (turn > 0, n.to_string()), "{fields}");
        }
    }
    for _ in 0..2 {
        assert!(!is_hit(&proxy.get("/star").await));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_2_no_time_zone_moves_a_date() {
    let backend = Recorder::scripted(|_, _| {
        let at =
            |seconds| httpdate::fmt_http_date(std::time::SystemTime::now() + std::time::Duration::from_secs(seconds));
        ok(&format!("date: {}\r\nexpires: {}\r\n", at(0), at(600)), "a")
    })
    .await;
    let settings = format!("upstreams: {{ api: {{ endpoints: ['{}'] }} }}\n{}", backend.url(), cached("{}"));
    for zone in ["UTC", "Asia/Kolkata", "America/Los_Angeles", "XXX-14"] {
        let proxy = Proxy::start_with(&settings, &[("TZ", zone)]).await;
        proxy.get("/").await;
        let hit = proxy.get("/").await;
        let left: i64 = source(&hit).strip_prefix("sidegate; hit; ttl=").unwrap().parse().unwrap();
        assert!((500..=600).contains(&left), "{zone}: {left}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_2_2_nothing_is_guessed_where_an_end_is_given() {
    for fields in ["expires: 0\r\n", "cache-control: max-age=0\r\n", "cache-control: s-maxage=0\r\n"] {
        let backend = Recorder::scripted(move |before, _| {
            ok(&format!("last-modified: {YEAR_2020}\r\n{fields}"), &before.to_string())
        })
        .await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        for turn in ["0", "1"] {
            assert_eq!(proxy.get("/").await.text(), turn, "{fields}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_2_4_nothing_is_stale_unless_it_is_allowed() {
    // Also where nobody is there to ask.
    for (section, fields, stale) in [
        ("{}", "cache-control: max-age=0\r\netag: \"a\"\r\n", false),
        ("{ stale_if_error: 1h }", "cache-control: max-age=0\r\netag: \"a\"\r\n", true),
        ("{ stale_if_error: 1h }", "cache-control: max-age=0, must-revalidate\r\netag: \"a\"\r\n", false),
        ("{ stale_if_error: 1h }", "cache-control: max-age=0, proxy-revalidate\r\netag: \"a\"\r\n", false),
        ("{ stale_if_error: 1h }", "cache-control: s-maxage=0\r\netag: \"a\"\r\n", false),
        ("{ stale_if_error: 1h }", "cache-control: no-cache\r\netag: \"a\"\r\n", false),
        ("{ stale_while_revalidate: 1h }", "cache-control: max-age=0, must-revalidate\r\netag: \"a\"\r\n", false),
        ("{ stale_while_revalidate: 1h }", "cache-control: no-cache\r\netag: \"a\"\r\n", false),
    ] {
        let proxy = stored_once(section, fields).await;
        let answer = proxy.get("/").await;
        assert_eq!(answer.status(), if stale { 200 } else { 502 }, "{section} {fields}: {answer:?}");
        let answer = proxy.ask(get("/", "cache-control: max-stale\r\n")).await;
        let asked = stale || section == "{}";
        assert_eq!(answer.status(), if asked { 200 } else { 502 }, "{section} {fields}: {answer:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_3_1_who_asks_anew_asks_the_same_by_the_tag_that_it_has() {
    let backend = Recorder::scripted(|before, request| {
        let seen = |name| request.head.get(name).map(str::to_owned);
        if before > 0 {
            assert_eq!(request.head.target(), "/a?b=c");
            assert_eq!((seen("accept"), seen("if-none-match")), (Some("json".to_owned()), Some("W/\"a\"".to_owned())));
            assert_eq!(seen("if-modified-since").as_deref(), Some(YEAR_2020));
        }
        let age = before * 600;
        ok(&format!("cache-control: max-age={age}, stale-while-revalidate=600\r\nvary: accept\r\netag: W/\"a\"\r\nlast-modified: {YEAR_2020}\r\n"), &before.to_string())
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.ask(get("/a?b=c", "accept: json\r\n")).await;
    // Behind an answer that is given meanwhile; and for a client with a condition of its own.
    assert!(is_hit(&proxy.ask(get("/a?b=c", "accept: json\r\n")).await));
    eventually("it to be asked for", async || backend.count() == 2).await;
    let own = get("/a?b=c", "accept: json\r\ncache-control: no-cache\r\nif-none-match: \"mine\"\r\n");
    assert_eq!(proxy.ask(own).await.status(), 200);
    assert_eq!(backend.requests().len(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_3_2_what_is_for_the_origin_is_not_judged_here() {
    let (backend, proxy) = counting("{}", "cache-control: max-age=600\r\netag: \"a\"\r\n").await;
    proxy.get("/").await;
    for fields in ["if-match: \"b\"\r\n", "if-unmodified-since: Wed, 01 Jan 2020 00:00:00 GMT\r\n"] {
        let answer = proxy.ask(get("/", fields)).await;
        assert_eq!((answer.status(), is_hit(&answer)), (200, false), "{fields}");
        let sent = backend.requests().pop().unwrap();
        let (name, value) = fields.trim().split_once(": ").unwrap();
        assert_eq!(sent.head.get(name), Some(value));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_3_2_a_304_to_us_is_a_whole_answer_for_who_has_another() {
    let backend = Recorder::scripted(|before, request| {
        if before == 0 {
            return ok("cache-control: max-age=0\r\netag: \"ours\"\r\n", "body");
        }
        assert_eq!(request.head.get("if-none-match"), Some("\"ours\""));
        "HTTP/1.1 304 Not Modified\r\ncache-control: max-age=0\r\netag: \"ours\"\r\nx-new: 1\r\n\r\n".to_owned()
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    let other = proxy.ask(get("/", "if-none-match: \"theirs\"\r\n")).await;
    assert_eq!((other.status(), other.text().as_str(), other.head.get("x-new")), (200, "body", Some("1")));
    let same = proxy.ask(get("/", "if-none-match: \"theirs\", \"ours\"\r\n")).await;
    assert_eq!(same.status(), 304);
    assert_eq!(backend.count(), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_3_3_a_full_answer_to_a_validation_is_the_answer() {
    let (backend, proxy) = counting("{}", "cache-control: max-age=0\r\netag: \"a\"\r\n").await;
    for turn in ["1", "2", "3"] {
        let answer = proxy.get("/").await;
        assert_eq!(
            (answer.text().as_str(), is_hit(&answer)),
            (turn, false),
            "the tag says that it is the same; it is not"
        );
    }
    assert_eq!(backend.requests()[1].head.get("if-none-match"), Some("\"a\""));
    // An error that comes instead is told, where no stale answer may stand in.
    let backend = Recorder::scripted(|before, _| match before {
        0 => ok("cache-control: max-age=0\r\netag: \"a\"\r\n", "old"),
        _ => answer("500 Internal Server Error", "", "broken"),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    assert_eq!(proxy.get("/").await.text(), "broken");
}

#[tokio::test(flavor = "multi_thread")]
async fn section_4_3_5_a_head_that_tells_of_another_answer_outdates_the_stored_one() {
    for (fields, dropped) in [
        ("etag: \"a\"\r\ncontent-length: 3\r\n", false),
        ("etag: \"b\"\r\ncontent-length: 3\r\n", true),
        ("etag: \"a\"\r\ncontent-length: 4\r\n", true),
    ] {
        let backend = Recorder::scripted(move |_, request| match request.head.start.starts_with("HEAD") {
            true => format!("HTTP/1.1 200 OK\r\n{fields}\r\n"),
            false if request.head.get("if-none-match") == Some("\"a\"") => {
                "HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\n\r\n".to_owned()
            }
            false => ok("cache-control: max-age=0\r\netag: \"a\"\r\n", "old"),
        })
        .await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        proxy.get("/").await;
        let mut wire = asking(&proxy, "HEAD / HTTP/1.1\r\nhost: sidegate.test\r\n\r\n").await;
        assert_eq!(wire.head().await.status(), 200);
        proxy.get("/").await;
        let asked = backend.requests().pop().unwrap();
        assert_eq!(asked.head.get("if-none-match").is_none(), dropped, "{fields}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_directives_reach_both_ends_whatever_they_mean_here() {
    let said = "max-age=600, x-unknown=\"a, b\", stale-while-revalidate=9, no-transform, must-understand";
    let asked = "max-age=1000, x-mine, no-transform";
    let backend = Recorder::answering(ok(&format!("cache-control: {said}\r\npragma: x\r\nexpires: 0\r\n"), "a")).await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    for turn in 0..2 {
        let answer = proxy.ask(get("/", &format!("cache-control: {asked}\r\n"))).await;
        assert_eq!(is_hit(&answer), turn > 0, "section 5.2.3: what is not known means nothing");
        assert_eq!(answer.head.all("cache-control"), [said]);
        assert_eq!((answer.head.get("pragma"), answer.head.get("expires")), (Some("x"), Some("0")));
    }
    assert_eq!(backend.only().head.all("cache-control"), [asked]);
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_1_5_what_a_request_forbids_to_store_is_stored_for_nobody() {
    let (backend, proxy) = counting("{ ttl: 1h }", "").await;
    let forbidding = get("/", "cache-control: no-store\r\n");
    assert_eq!(proxy.ask(&forbidding).await.text(), "1");
    assert_eq!(proxy.get("/").await.text(), "2");
    assert_eq!(proxy.sample("sidegate_cache_stored_total{route=\"all\"}").await, 1);
    assert_eq!(proxy.ask(&forbidding).await.text(), "2", "what is stored already may be given");
    assert_eq!(backend.count(), 2);
    // Nor is it anybody's to join.
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), &cached("{ ttl: 1h }")).await;
    let mut forbidding = asking(&proxy, &forbidding).await;
    let (mut first, _) = backend.accept_head().await;
    let mut other = asking(&proxy, get("/", "")).await;
    let (mut second, _) = backend.accept_head().await;
    first.send(ok("", "mine")).await;
    second.send(ok("", "own")).await;
    assert_eq!((forbidding.answer().await.text(), other.answer().await.text()), ("mine".to_owned(), "own".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_2_2_what_must_be_validated_is_an_error_where_it_cannot_be() {
    for revalidate in ["must-revalidate", "proxy-revalidate"] {
        let fields = format!("cache-control: max-age=1, {revalidate}, stale-if-error=600\r\netag: \"a\"\r\n");
        let proxy = stored_once("{ stale_if_error: 1h, stale_while_revalidate: 1h }", &fields).await;
        // As long as it is fresh it is a hit; then nothing may be given but an error.
        eventually("it to be stale", async || {
            let answer = proxy.ask(get("/", "cache-control: max-stale\r\n")).await;
            let said = answer.head.get("cache-status").unwrap_or_default();
            assert!(answer.status() == 502 || said.starts_with("sidegate; hit") && !said.contains("=-"), "{answer:?}");
            answer.status() == 502
        })
        .await;
        assert_eq!(proxy.get("/").await.status(), 502);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_2_4_no_cache_is_forwarded_each_time() {
    let backend = Recorder::scripted(|before, _| match before {
        0 => ok("cache-control: no-cache, max-age=600\r\netag: \"a\"\r\n", "body"),
        _ => format!("HTTP/1.1 304 Not Modified\r\netag: \"a\"\r\nx-turn: {before}\r\n\r\n"),
    })
    .await;
    let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
    proxy.get("/").await;
    for turn in 1..4 {
        let answer = proxy.get("/").await;
        assert_eq!((is_hit(&answer), answer.text().as_str()), (false, "body"));
        assert_eq!(answer.head.get("x-turn"), Some(&*turn.to_string()));
        assert_eq!(backend.count(), turn + 1);
    }
    let only = proxy.ask(get("/", "cache-control: only-if-cached\r\n")).await;
    assert_eq!(only.status(), 504, "nor is it given to who wants nothing forwarded");
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_2_5_what_must_not_be_stored_is_shared_with_nobody_who_waits() {
    for fields in
        ["cache-control: no-store\r\n", "cache-control: private\r\n", "cache-control: max-age=9, no-store\r\n"]
    {
        let backend = Backend::start().await;
        let proxy = Proxy::before(&backend.url(), &cached("{}")).await;
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(asking(&proxy, get("/", "")).await);
        }
        let mut upstreams = vec![backend.accept_head().await.0];
        waiting(&proxy, 4).await;
        let mut answers = std::collections::HashSet::new();
        for n in 0..4 {
            upstreams[n].send(ok(&format!("{fields}connection: close\r\n"), &n.to_string())).await;
            if n < 3 && upstreams.len() == n + 1 {
                upstreams.push(backend.accept_head().await.0);
            }
        }
        for client in &mut clients {
            assert!(answers.insert(client.answer().await.text()), "{fields}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_2_6_what_must_not_be_transformed_comes_as_it_is() {
    let events = ": hello\n\ndata: 1\r\n\r\ndata:2\n\nid:7\ndata\n\ndata: [DONE]\n\n";
    let stream = format!("transfer-encoding: chunked\r\n\r\n{:x}\r\n{events}\r\n0\r\n\r\n", events.len());
    let backend = Recorder::scripted(move |_, _| {
        format!(
            "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ncache-control: max-age=600, no-transform\r\n{stream}"
        )
    })
    .await;
    for section in ["{ record_streams: true }", "{ record_streams: true, resume: 1m }", "{ resume: 1m }"] {
        let proxy = Proxy::before(&backend.url(), &cached(section)).await;
        for _ in 0..2 {
            assert_eq!(proxy.get("/").await.text(), events, "{section}");
        }
    }
    // Unless the operator knows better.
    let proxy = Proxy::before(&backend.url(), &cached("{ resume: 1m, ttl: 1m, ignore_cache_control: true }")).await;
    assert!(proxy.get("/").await.text().contains("data:2\nid: "));
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_2_7_what_is_for_one_is_not_stored() {
    let fields = "cache-control: max-age=600, private=\"x-mine, x-too\"\r\nx-mine: a\r\nX-Too: b\r\nx-all: c\r\n";
    let (backend, proxy) = counting("{}", fields).await;
    assert_eq!(proxy.get("/").await.head.get("x-mine"), Some("a"));
    let hit = proxy.get("/").await;
    assert!(is_hit(&hit));
    let of = |name| hit.head.get(name);
    assert_eq!((of("x-mine"), of("x-too"), of("x-all")), (None, None, Some("c")));
    assert_eq!(backend.count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn section_5_2_2_10_s_maxage_is_what_counts_here() {
    for (fields, left) in [
        ("cache-control: max-age=1000, s-maxage=600\r\n", 600),
        ("cache-control: s-maxage=600, max-age=0\r\nexpires: 0\r\n", 600),
        // Section 5.3: nor does `Expires` count beside `max-age`.
        ("cache-control: max-age=600\r\nexpires: 0\r\n", 600),
        ("cache-control: max-age=600\r\nexpires: Fri, 01 Jan 2100 00:00:00 GMT\r\n", 600),
    ] {
        let (_backend, proxy) = counting("{}", fields).await;
        proxy.get("/").await;
        let hit = proxy.get("/").await;
        let ttl: i64 =
            source(&hit).strip_prefix("sidegate; hit; ttl=").unwrap_or_else(|| panic!("{fields}")).parse().unwrap();
        assert!((left - 60..=left).contains(&ttl), "{fields}: {ttl}");
    }
}
