use http::header::AUTHORIZATION;
use proptest::prelude::*;

use super::{part::KEYS, *};

const CREDENTIALS: [HeaderName; 3] = [AUTHORIZATION, COOKIE, HeaderName::from_static("x-api-key")];

/// A request, and what there is to change about it.
#[derive(Debug, Clone, PartialEq)]
struct Case {
    scope: &'static str,
    method: &'static str,
    https: bool,
    host: &'static str,
    path: &'static str,
    query: Option<&'static str>,
    headers: Vec<(&'static str, &'static str)>,
    principal: Option<&'static str>,
    tier: Option<&'static str>,
    session: Option<&'static str>,
    body: Option<&'static [u8]>,
    parts: Vec<&'static str>,
    ignored: Vec<&'static str>,
    shared: bool,
}

fn case() -> Case {
    Case {
        scope: "route",
        method: "GET",
        https: false,
        host: "a.example",
        path: "/v1",
        query: None,
        headers: Vec::new(),
        principal: None,
        tier: None,
        session: None,
        body: None,
        parts: Vec::new(),
        ignored: Vec::new(),
        shared: false,
    }
}

fn headers(of: &[(&'static str, &'static str)]) -> HeaderMap {
    of.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
}

fn key(case: &Case) -> Key {
    let parts: Vec<KeyPart> = case.parts.iter().map(|part| part.parse().unwrap()).collect();
    let ignored: Vec<QueryName> = case.ignored.iter().map(|name| name.parse().unwrap()).collect();
    let keys =
        Keys { scope: case.scope, parts: &parts, ignored: &ignored, credentials: &CREDENTIALS, shared: case.shared };
    keys.key(&Asks {
        method: &case.method.parse().unwrap(),
        https: case.https,
        host: case.host,
        path: case.path,
        query: case.query,
        headers: &headers(&case.headers),
        principal: case.principal,
        tier: case.tier,
        session: case.session,
        body: case.body,
    })
}

fn all_differ(cases: impl IntoIterator<Item = Case>) {
    let cases: Vec<_> = cases.into_iter().collect();
    for (n, case) in cases.iter().enumerate() {
        for other in &cases[..n] {
            assert_ne!(key(case), key(other), "{case:?} {other:?}");
        }
    }
}

#[test]
fn each_part_of_the_request_counts() {
    all_differ([
        case(),
        Case { scope: "other", ..case() },
        Case { method: "POST", ..case() },
        Case { method: "POST", headers: vec![("accept", "text/event-stream")], ..case() },
        Case { session: Some("a"), ..case() },
        Case { tier: Some("a"), ..case() },
        Case { headers: vec![("x-forwarded-host", "b.example")], ..case() },
        Case { headers: vec![("x-forwarded-prefix", "/b")], ..case() },
        Case { session: Some("b"), ..case() },
        Case { method: "get", ..case() },
        Case { https: true, ..case() },
        Case { host: "b.example", ..case() },
        Case { path: "/v1/", ..case() },
        Case { path: "/%761", ..case() },
        Case { query: Some(""), ..case() },
        Case { query: Some("a=1&b=2"), ..case() },
        Case { query: Some("b=2&a=1"), ..case() },
        Case { principal: Some("me"), ..case() },
    ]);
}

#[test]
fn a_forwarded_scheme_counts_where_it_is_more_than_was_understood() {
    let of = |https, host, said| key(&Case { https, host, headers: vec![("x-forwarded-proto", said)], ..case() });
    assert_eq!(of(false, "a.example", "http"), key(&case()));
    assert_eq!(of(true, "a.example", "https"), key(&Case { https: true, ..case() }));
    let odd = ["", "http", "HTTPS", "wss", "https, \"evil\"", "https, https"];
    for (n, said) in odd.into_iter().enumerate() {
        for other in ["https", "x"].into_iter().chain(odd[..n].iter().copied()) {
            assert_ne!(of(true, "a.example", said), of(true, "a.example", other), "{said} {other}");
        }
    }
    // Where the host makes no difference, neither does the scheme; what is neither of the two may.
    assert_eq!(of(false, "", "https"), of(false, "", "http"));
    assert_ne!(of(false, "", "https, x"), of(false, "", "http"));
}

#[test]
fn head_is_answered_with_what_get_got() {
    assert_eq!(key(&Case { method: "HEAD", ..case() }), key(&case()));
}

#[test]
fn a_host_is_the_same_in_any_case_and_with_its_default_port() {
    let of = |host, https| key(&Case { https, host, ..case() });
    for host in ["a.example:80", "A.Example", "a.EXAMPLE:80", "a.example:"] {
        assert_eq!(of(host, false), of("a.example", false), "{host}");
    }
    assert_eq!(of("[::1]:443", true), of("[::1]", true));
    assert_ne!(of("a.example:443", false), of("a.example", false));
    assert_ne!(of("a.example:80", true), of("a.example", true));
    assert_ne!(of("a.example:8080", false), of("a.example", false));
    assert_ne!(of("::1:80", false), of("::1", false));
}

#[test]
fn parameters_that_do_not_count_are_left_out() {
    let of = |query| key(&Case { query, ignored: vec!["utm_*", "fbclid"], ..case() });
    assert_eq!(of(Some("a=1&utm_source=x&b=2&fbclid=9")), of(Some("a=1&b=2")));
    assert_eq!(of(Some("utm_=1&utm%5Fid")), of(None), "nothing is left");
    assert_eq!(of(Some("fbclid&a=1")), of(Some("a=1")));
    assert_ne!(of(Some("fbclid2=1")), of(None));
    assert_ne!(of(Some("a=utm_x")), of(None));
    assert_ne!(of(Some("utm_source=x;a=1")), of(None), "`a` may be a parameter of its own");
    assert_ne!(of(Some("a=1&&b=2")), of(Some("a=1&b=2")), "as it was sent");
}

#[test]
fn a_header_counts_where_it_is_listed() {
    let of = |headers: &[(&'static str, &'static str)], parts: &[&'static str]| {
        key(&Case { headers: headers.to_vec(), parts: parts.to_vec(), ..case() })
    };
    let listed = |headers| of(headers, &["header:accept"]);
    assert_eq!(of(&[("accept", "a")], &[]), of(&[], &[]));
    assert_ne!(listed(&[("accept", "a")]), listed(&[("accept", "b")]));
    assert_ne!(listed(&[("accept", "")]), listed(&[]), "absent is not empty");
    assert_eq!(listed(&[("accept", "a"), ("accept", "b")]), listed(&[("accept", "a, b")]), "lines are joined");
    assert_ne!(
        of(&[("accept", "a")], &["header:accept", "header:te"]),
        of(&[("te", "a")], &["header:accept", "header:te"])
    );
}

#[test]
fn a_cookie_counts_where_it_is_listed() {
    let of = |cookie: &[&'static str]| {
        let headers = cookie.iter().map(|value| ("cookie", *value)).collect();
        key(&Case { headers, parts: vec!["cookie:lang"], shared: true, ..case() })
    };
    assert_eq!(of(&["a=1; lang=de;b=2"]), of(&["lang=de"]));
    assert_eq!(of(&["a=1", "lang=de"]), of(&["lang=de"]), "HTTP/2 may send a line for each");
    assert_ne!(of(&["lang=de"]), of(&["lang=en"]));
    assert_ne!(of(&["lang="]), of(&[]));
    assert_eq!(of(&["Lang=de; xlang=1; lang"]), of(&[]));
    assert_ne!(of(&["lang=de; lang=en"]), of(&["lang=en; lang=de"]));
    assert_ne!(of(&["lang=a; lang=b"]), of(&["lang=ab"]));
}

#[test]
fn credentials_count_unless_the_answer_is_shared() {
    let of = |headers: &[(&'static str, &'static str)], principal, shared| {
        key(&Case { headers: headers.to_vec(), principal, shared, ..case() })
    };
    for name in ["authorization", "cookie", "x-api-key"] {
        assert_ne!(of(&[(name, "a")], None, false), of(&[(name, "b")], None, false), "{name}");
        assert_ne!(of(&[(name, "a")], None, false), of(&[], None, false), "{name}");
        assert_eq!(of(&[(name, "a")], None, true), of(&[], None, true), "{name}");
    }
    assert_ne!(of(&[("authorization", "a")], None, false), of(&[("x-api-key", "a")], None, false));
    assert_ne!(of(&[], Some("me"), false), of(&[], Some("you"), false));
    assert_eq!(of(&[], Some("me"), true), of(&[], None, true));
    assert_ne!(of(&[("cookie", "a")], Some("me"), false), of(&[("cookie", "b")], Some("me"), false), "both");
    let shared_by_principal = |principal| key(&Case { principal, shared: true, parts: vec!["principal"], ..case() });
    assert_ne!(shared_by_principal(Some("me")), shared_by_principal(Some("you")));
    assert_ne!(shared_by_principal(Some("")), shared_by_principal(None));
}

#[test]
fn a_body_counts_where_it_is_listed() {
    let of = |body, parts: &[&'static str]| key(&Case { body, parts: parts.to_vec(), ..case() });
    assert_ne!(of(Some(b"a"), &["body"]), of(Some(b"b"), &["body"]));
    assert_ne!(of(Some(b""), &["body"]), of(None, &["body"]));
    assert_eq!(of(Some(b"a"), &[]), of(None, &[]));
}

#[test]
fn a_variant_has_a_key_of_its_own() {
    let key = key(&case());
    let names = |names: &[&'static str]| names.iter().map(|name| HeaderName::from_static(name)).collect::<Vec<_>>();
    let of = |vary: &[&'static str], request: &[(&'static str, &'static str)]| {
        key.with_vary(&names(vary), &headers(request))
    };
    let request = [("accept", "a"), ("te", "b")];
    assert_ne!(of(&["accept", "te"], &request), of(&["accept", "te"], &[("accept", "b"), ("te", "a")]));
    assert_ne!(of(&["accept"], &[]), of(&["accept"], &[("accept", "")]), "absent matches only absent");
    assert_eq!(of(&["accept"], &request), of(&["accept"], &request[..1]));
    assert_ne!(of(&[], &request), key);
    assert_ne!(of(&["accept"], &[]), of(&[], &[]));
    let other = self::key(&Case { path: "/other", ..case() });
    assert_ne!(other.with_vary(&[ACCEPT], &HeaderMap::new()), key.with_vary(&[ACCEPT], &HeaderMap::new()));
}

#[test]
fn a_key_is_written_in_hexadecimal_digits() {
    let key = Key(std::array::from_fn(|n| u8::try_from(n * 8 + 1).unwrap()));
    assert_eq!(format!("{key:?}"), "Key(0109111921293139)");
    assert!(key.hex().starts_with("0109111921293139") && key.hex().len() == 64);
    assert_eq!(Key::from_hex(&key.hex()), Some(key));
    for wrong in ["", "01", &"g".repeat(64), &"0".repeat(65), &"ü".repeat(32)] {
        assert_eq!(Key::from_hex(wrong), None, "{wrong}");
    }
}

#[test]
fn keys_of_an_older_version_are_found_again() {
    // Whoever changes this empties every cache: then the version of the domain has to change, too.
    let full = Case {
        query: Some("a=1"),
        headers: vec![("authorization", "Bearer t"), ("accept", "x")],
        body: Some(b"b"),
        parts: vec!["body", "header:accept", "cookie:c", "principal"],
        ..case()
    };
    assert_eq!(key(&full).hex(), "ef0e030cd0b5f51d263a528d5131739691201e0155be1ddd2b5efe204562c021");
}

#[test]
fn a_part_that_is_none_is_told_what_there_is() {
    for text in ["body", "principal", "header:x-user", "cookie:Lang"] {
        assert_eq!(text.parse::<KeyPart>().unwrap().to_string(), text);
        assert_eq!(serde_json::from_value::<KeyPart>(text.into()).unwrap(), text.parse().unwrap());
    }
    for text in
        ["", "Body", "header", "header:", "header:a b", "cookie:", "cookie:a=b", "cookie:a;b", "query:q", "body:x"]
    {
        let error = text.parse::<KeyPart>().unwrap_err();
        assert_eq!(error, format!("`{text}` is no part of a key: there are {KEYS}"));
    }
    for text in ["fbclid", "utm_*", "a[]"] {
        assert_eq!(text.parse::<QueryName>().unwrap().to_string(), text);
    }
    for text in ["", "*", "*a", "a*b", "**", "a b", "a=1", "a&b"] {
        assert!(text.parse::<QueryName>().is_err(), "{text}");
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let text = || prop::sample::select(vec!["", "a", "b", "ab", "aa"]);
    let header = prop::sample::select(vec!["accept", "te", "authorization", "x-api-key"]);
    let cookie = text().prop_map(|value| {
        let values = [("", "a="), ("a", "a=a"), ("b", "a=b"), ("ab", "a=ab"), ("aa", "a=a; a=a")];
        ("cookie", values.iter().find(|(known, _)| *known == value).unwrap().1)
    });
    let headers = prop::collection::vec(prop_oneof![3 => (header, text()), 1 => cookie], 0..3);
    let parts = prop::sample::select(vec!["body", "principal", "header:accept", "header:te", "cookie:a"]);
    (
        (text(), any::<bool>(), text(), text(), prop::option::of(text())),
        (
            headers,
            prop::option::of(text()),
            prop::option::of(text()),
            prop::collection::vec(parts, 0..3),
            any::<bool>(),
        ),
    )
        .prop_map(|((scope, https, host, path, query), (headers, principal, body, parts, shared))| Case {
            scope,
            https,
            host,
            path,
            query,
            headers,
            principal,
            body: body.map(str::as_bytes),
            parts,
            shared,
            ..case()
        })
}

/// What a key is made of, as a list of its own.
fn meant(case: &Case) -> Vec<Option<String>> {
    let joined = |name: &str| {
        let lines: Vec<_> = case.headers.iter().filter(|line| line.0 == name).map(|line| line.1).collect();
        (!lines.is_empty()).then(|| lines.join(", "))
    };
    let mut all =
        vec![Some(case.scope.into()), Some(case.https.to_string()), Some(case.host.into()), Some(case.path.into())];
    all.push(case.query.map(str::to_owned));
    for part in &case.parts {
        all.push(Some((*part).to_owned()));
        match *part {
            "body" => all.push(case.body.map(|body| String::from_utf8(body.to_vec()).unwrap())),
            "principal" => all.push(case.principal.map(str::to_owned)),
            "cookie:a" => {
                let lines = case.headers.iter().filter(|line| line.0 == "cookie").map(|line| line.1);
                all.push(Some(lines.collect::<Vec<_>>().join("; ")));
            }
            header => all.push(joined(header.strip_prefix("header:").unwrap())),
        }
    }
    all.push(Some(case.shared.to_string()));
    if !case.shared {
        all.push(case.principal.map(str::to_owned));
        for name in CREDENTIALS {
            let lines = case.headers.iter().filter(|line| line.0 == name.as_str());
            all.push(Some(format!("{:?}", lines.collect::<Vec<_>>())));
        }
    }
    all
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4096))]

    /// Neighbours, which differ in one thing or in nothing that counts.
    #[test]
    fn two_requests_have_one_key_only_if_nothing_that_counts_differs(
        one in any_case(), other in any_case(), take in 0..10_usize
    ) {
        let mut near = one.clone();
        match take {
            0 => near.scope = other.scope,
            1 => near.https = other.https,
            2 => near.host = other.host,
            3 => (near.path, near.query) = (other.path, other.query),
            4 => near.headers = other.headers,
            5 => near.principal = other.principal,
            6 => near.body = other.body,
            7 => near.parts = other.parts,
            8 => (near.principal, near.parts) = (other.principal, other.parts),
            _ => near = other,
        }
        // How a route shares is the same for all its requests, so that a key does not say it.
        near.shared = one.shared;
        prop_assert_eq!(key(&one) == key(&near), meant(&one) == meant(&near), "{:?} {:?}", one, near);
    }

    #[test]
    fn the_rest_of_a_query_is_as_it_was_sent(query in "[au_=&;%5F]{0,16}") {
        let ignored = ["u_*".parse().unwrap()];
        let rest = without(&ignored, &query);
        if let Some(rest) = &rest {
            prop_assert_eq!(without(&ignored, rest), Some(Cow::Borrowed(&**rest)));
        }
        prop_assert_eq!(without(&[], &query), Some(Cow::Borrowed(&*query)));
    }
}
