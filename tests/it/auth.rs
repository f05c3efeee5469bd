//! Who may call: keys and tokens against the real binary.

use std::{
    fs,
    process::Command,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{
    rand::SystemRandom,
    signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::{Backend, Message, Proxy, Wire, backend::Recorder, client::Http2Client, eventually};

/// A key and its line, as `sidegate key new` prints them.
pub fn new_key(arguments: &[&str]) -> (String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_sidegate")).args(["key", "new"]).args(arguments).output().unwrap();
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned);
    (lines.next().unwrap(), lines.next().unwrap())
}

/// A folder with a file of keys in it.
pub fn keys(lines: &[&str]) -> (TempDir, String) {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("keys");
    fs::write(&file, lines.join("\n")).unwrap();
    let path = file.to_str().unwrap().to_owned();
    (folder, path)
}

fn head(start: &str, fields: &str) -> String {
    format!("{start} HTTP/1.1\r\nhost: sidegate.test\r\n{fields}\r\n")
}

fn slug(answer: &Message) -> String {
    answer.json()["type"].as_str().unwrap().trim_start_matches("urn:sidegate:problem:").to_owned()
}

#[tokio::test]
async fn the_backend_learns_who_asks_and_sees_no_credential() {
    let (key, line) = new_key(&["--id", "alice", "--tier", "gold"]);
    let (_folder, file) = keys(&[&line]);
    let backend = Recorder::ok().await;
    let proxy =
        Proxy::before(&backend.url(), &format!("defaults: {{ auth: {{ api_keys: {{ file: {file} }}, query: key }} }}"))
            .await;
    let spoofed = "x-principal-id: root\r\nX-Principal-Tier: root\r\nx_principal_id: root\r\nx-request-id: auth-1\r\n";
    for (start, shown) in [
        ("GET /a?b=%63", format!("x-api-key: {key}\r\n")),
        ("GET /a?b=%63", format!("authorization: bEARER {key}\r\n")),
        ("POST /a?b=%63", format!("x-api-key: {key}\r\nAuthorization: Bearer {key}\r\ncontent-length: 0\r\n")),
        ("OPTIONS /a?b=%63", format!("x-api-key: {key}\r\n")),
        (&format!("GET /a?key={key}&b=%63"), String::new()),
    ] {
        let answer = proxy.ask(head(start, &(shown + spoofed))).await;
        assert_eq!((answer.status(), answer.text().as_str()), (200, "ok"), "{start}");
    }
    for request in backend.requests() {
        assert_eq!(
            (request.head.all("x-principal-id"), request.head.all("x-principal-tier")),
            (vec!["alice"], vec!["gold"])
        );
        assert!(request.head.start.ends_with(" /a?b=%63 HTTP/1.1"), "{request:?}");
        for absent in ["x-api-key", "authorization", "x_principal_id"] {
            assert_eq!(request.head.get(absent), None, "{request:?}");
        }
    }
    assert_eq!(backend.requests().len(), 5);
    assert_eq!(proxy.access_line("auth-1").await["principal"], "alice");
    assert_eq!(proxy.sample(r#"sidegate_auth_total{route="/*",outcome="passed"}"#).await, 5);
}

#[tokio::test]
async fn trailers_name_neither_principals_nor_sessions() {
    let (key, line) = new_key(&["--id", "alice"]);
    let (_folder, file) = keys(&[&line]);
    let backend = Recorder::ok().await;
    let policies = format!("defaults: {{ auth: {{ api_keys: {{ file: {file} }}, forward: true }}, session: {{}} }}");
    let proxy = Proxy::before(&backend.url(), &policies).await;
    let names = "x-principal-id, x.principal_tier, x-api-key, x_api_key, authorization, x-session-id, cookie, x-sum";
    let fields = format!("x-api-key: {key}\r\ntransfer-encoding: chunked\r\ntrailer: {names}\r\n");
    let trailers = format!("{names}: Bearer a\r\n").replace(", ", ": Bearer a\r\n");
    let answer = proxy.ask(format!("{}3\r\nabc\r\n0\r\n{trailers}\r\n", head("POST /", &fields))).await;
    assert_eq!(answer.status(), 200);
    let request = backend.only();
    assert_eq!((request.head.get("x-principal-id"), &*request.text()), (Some("alice"), "abc"));
    assert_eq!(request.trailers, [("x-sum".to_owned(), "Bearer a".to_owned())]);
}

#[tokio::test]
async fn refusals_say_what_would_do_in_every_form_of_error() {
    let (key, alice) = new_key(&["--id", "alice", "--routes", "chat"]);
    let (bob_key, bob) = new_key(&["--id", "bob"]);
    let (_folder, file) = keys(&[&alice, &(bob + " expires=2001-01-01")]);
    let backend = Recorder::ok().await;
    let yaml = format!(
        "
defaults: {{ auth: {{ api_keys: {{ file: {file} }}, max_failures: 3/min }}, cors: {{ origins: [https://a.example] }} }}
routes:
  - {{ name: chat, match: {{ path: /chat }}, upstream: api }}
  - {{ name: openai, match: {{ path: /v1/* }}, upstream: api, errors: openai }}
  - {{ name: open, match: {{ path: /open }}, upstream: api, auth: off }}
  - {{ upstream: api }}"
    );
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    let with =
        |path: &str, fields: &str| head(&format!("GET {path}"), &format!("{fields}origin: https://a.example\r\n"));
    let missing = proxy.ask(with("/chat", "")).await;
    assert_eq!((missing.status(), slug(&missing).as_str()), (401, "unauthorized"));
    assert_eq!(missing.head.get("www-authenticate"), Some("Bearer realm=\"sidegate\""));
    assert_eq!(missing.head.get("access-control-allow-origin"), Some("https://a.example"), "pages can read it");
    let valid = format!("x-api-key: {key}\r\n");
    let elsewhere = proxy.ask(with("/other", &format!("{valid}x-request-id: auth-2\r\n"))).await;
    assert_eq!((elsewhere.status(), slug(&elsewhere).as_str()), (403, "forbidden"));
    assert_eq!(elsewhere.head.get("www-authenticate"), Some("Bearer realm=\"sidegate\", error=\"insufficient_scope\""));
    assert_eq!(proxy.access_line("auth-2").await["principal"], "alice");
    let expired = proxy.ask(with("/v1/x", &format!("x-api-key: {bob_key}\r\nx-request-id: auth-3\r\n"))).await;
    assert_eq!((expired.status(), &expired.json()["error"]["code"]), (401, &json!("unauthorized")));
    assert_eq!(expired.head.get("www-authenticate"), Some("Bearer realm=\"sidegate\", error=\"invalid_token\""));
    let line = proxy.access_line("auth-3").await;
    assert!(line["principal"].is_null() && line["cause"].as_str().unwrap().ends_with("the key has expired"), "{line}");
    let grpc = proxy.ask(with("/v1/x", "content-type: application/grpc\r\n")).await;
    assert_eq!((grpc.status(), grpc.head.get("grpc-status")), (200, Some("16")));
    assert_eq!(proxy.ask(with("/open", "")).await.status(), 200);
    let preflight = head("OPTIONS /chat", "origin: https://a.example\r\naccess-control-request-method: GET\r\n");
    assert_eq!(proxy.ask(preflight).await.status(), 204, "never asked who it is");
    assert_eq!(proxy.ask(with("/chat", &valid)).await.status(), 200);

    for guess in ["a", "b"] {
        assert_eq!(proxy.ask(with("/chat", &format!("x-api-key: {guess}\r\n"))).await.status(), 401);
    }
    let throttled = proxy.ask(with("/chat", "x-api-key: c\r\n")).await;
    assert_eq!((throttled.status(), slug(&throttled).as_str()), (429, "rate-limited"));
    let wait: u64 = throttled.head.get("retry-after").unwrap().parse().unwrap();
    assert!((1..=20).contains(&wait), "{wait}");
    assert_eq!(proxy.ask(with("/chat", &valid)).await.status(), 200, "a key that was good from here");
    assert_eq!(proxy.sample(r#"sidegate_auth_total{route="chat",outcome="throttled"}"#).await, 1);
    assert_eq!(proxy.sample(r#"sidegate_auth_total{route="openai",outcome="invalid"}"#).await, 1);
}

#[tokio::test]
async fn an_untrusted_peer_cannot_make_its_guesses_those_of_others() {
    let (_key, line) = new_key(&["--id", "alice"]);
    let (_folder, file) = keys(&[&line]);
    let backend = Recorder::ok().await;
    let policy = format!("defaults: {{ auth: {{ api_keys: {{ file: {file} }}, max_failures: 2/h }} }}\n");
    let from = |ip: &str| head("GET /", &format!("x-forwarded-for: {ip}\r\nx-api-key: guess\r\n"));
    let proxy = Proxy::before(&backend.url(), &policy).await;
    for (n, expected) in [401, 401, 429].into_iter().enumerate() {
        assert_eq!(proxy.ask(from(&format!("192.0.2.{n}"))).await.status(), expected, "the address is the peer's");
    }
    let behind = Proxy::before(&backend.url(), &format!("{policy}hygiene: {{ trusted_proxies: [127.0.0.1] }}")).await;
    for (ip, expected) in [("2001:db8::1", 401), ("2001:db8::2", 401), ("2001:db8::3", 429), ("2001:db8:0:1::1", 401)] {
        assert_eq!(behind.ask(from(ip)).await.status(), expected, "{ip}");
    }
}

#[tokio::test]
async fn keys_change_with_their_file_and_a_bad_file_changes_nothing() {
    let (first, first_line) = new_key(&["--id", "first"]);
    let (second, second_line) = new_key(&["--id", "second"]);
    let (folder, file) = keys(&[&first_line]);
    let backend = Recorder::ok().await;
    let proxy = Proxy::before(
        &backend.url(),
        &format!("defaults: {{ auth: {{ api_keys: {{ file: {file} }}, max_failures: off }} }}"),
    )
    .await;
    let status = async |key: &str| proxy.ask(head("GET /", &format!("x-api-key: {key}\r\n"))).await.status();
    assert_eq!((status(&first).await, status(&second).await), (200, 401));

    fs::write(&file, format!("{first_line}\nsecond {second}\n")).unwrap();
    let refused = proxy.line("reload refused, nothing has changed").await;
    assert!(refused["problems"].as_str().unwrap().contains("line 2: has a key where its digest belongs"), "{refused}");
    assert_eq!((status(&first).await, status(&second).await), (200, 401));

    let next = folder.path().join("next");
    fs::write(&next, &second_line).unwrap();
    fs::rename(&next, &file).unwrap();
    eventually("the other key to hold", async || status(&second).await == 200).await;
    assert_eq!(status(&first).await, 401, "revoked");
    assert!(!proxy.logged().contains(&second), "not even that of the bad file");
}

#[tokio::test]
async fn upgrades_and_http2_are_judged_too() {
    let (key, line) = new_key(&["--id", "alice"]);
    let (_folder, file) = keys(&[&line]);
    let backend = Backend::start().await;
    let proxy =
        Proxy::before(&backend.url(), &format!("defaults: {{ auth: {{ api_keys: {{ file: {file} }}, query: key }} }}"))
            .await;
    let upgrade = |target: &str| {
        head(
            &format!("GET {target}"),
            "connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
        )
    };
    assert_eq!(proxy.ask(upgrade("/ws")).await.status(), 401);
    let mut client = proxy.connect().await;
    client.send(upgrade(&format!("/ws?key={key}"))).await;
    let (mut upstream, asked) = backend.accept_head().await;
    assert_eq!((asked.target(), asked.get("x-principal-id")), ("/ws", Some("alice")));
    upstream.send("HTTP/1.1 101 Switching Protocols\r\nconnection: Upgrade\r\nupgrade: websocket\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n").await;
    assert_eq!(client.head().await.status(), 101);
    client.send("frames").await;
    assert_eq!(upstream.exactly(6).await, b"frames");
    drop((client, upstream));

    let http2 = Http2Client::to(proxy.address()).await;
    let refused = http2.get("/").await;
    assert_eq!(
        (refused.status().as_u16(), refused.headers()["www-authenticate"].to_str().unwrap()),
        (401, "Bearer realm=\"sidegate\"")
    );
}

/// A signer of tokens, and its key in a JWK set.
struct Issuer(EcdsaKeyPair, &'static str);

impl Issuer {
    fn new(kid: &'static str) -> Self {
        let (algorithm, random) = (&ECDSA_P256_SHA256_FIXED_SIGNING, SystemRandom::new());
        let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
        Self(EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap(), kid)
    }

    fn bearer(&self, claims: &Value) -> String {
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "alg": "ES256", "kid": self.1 })), part(claims));
        let signature = self.0.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
        format!("authorization: Bearer {signed}.{}\r\n", BASE64_URL_SAFE_NO_PAD.encode(signature))
    }

    fn set(&self) -> String {
        let point = self.0.public_key().as_ref();
        let part = |range: std::ops::Range<usize>| BASE64_URL_SAFE_NO_PAD.encode(&point[range]);
        json!({ "keys": [{ "kty": "EC", "crv": "P-256", "kid": self.1, "x": part(1..33), "y": part(33..65) }] })
            .to_string()
    }
}

fn claims(sub: &str) -> Value {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap();
    json!({ "sub": sub, "aud": "api", "plan": "gold", "exp": (now + Duration::from_secs(600)).as_secs() })
}

async fn serve_set(wire: &mut Wire, set: &str) {
    let request = wire.request().await;
    assert_eq!(request.head.target(), "/jwks?x=1");
    let length = set.len();
    wire.send(format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{set}")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_verified_with_keys_from_a_url() {
    let (issuer, other) = (Issuer::new("one"), Issuer::new("two"));
    let (backend, ids) = (Recorder::ok().await, Backend::start().await);
    let yaml = format!(
        "
defaults:
  auth:
    jwt: {{ algorithms: ES256, audience: api, tier: plan, jwks: {{ url: \"{}/jwks?x=1\" }} }}",
        ids.url()
    );
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    // The first request waits for the keys, which are being fetched.
    let mut client = proxy.connect().await;
    client.send(head("GET /", &issuer.bearer(&claims("dave")))).await;
    serve_set(&mut ids.accept().await, &issuer.set()).await;
    assert_eq!(client.answer().await.status(), 200);
    let asked = backend.only();
    assert_eq!((asked.head.get("x-principal-id"), asked.head.get("x-principal-tier")), (Some("dave"), Some("gold")));
    assert_eq!(asked.head.get("authorization"), None);
    let expired = json!({ "sub": "dave", "aud": "api", "exp": 1_000_000_000 });
    let mut early = claims("dave");
    early["nbf"] = json!(4_000_000_000_u64);
    let mut wrong = claims("dave");
    wrong["aud"] = json!("another");
    for bad in [issuer.bearer(&expired), issuer.bearer(&early), issuer.bearer(&wrong), other.bearer(&claims("dave"))] {
        let answer = proxy.ask(head("GET /", &bad)).await;
        assert_eq!(
            (answer.status(), answer.head.get("www-authenticate")),
            (401, Some("Bearer realm=\"sidegate\", error=\"invalid_token\""))
        );
    }
    assert_eq!(backend.requests().len(), 1);
    assert!(ids.accepted().await.is_none(), "an unknown key does not make us ask again so soon");
}

#[tokio::test(flavor = "multi_thread")]
async fn without_keys_nobody_is_let_in() {
    let (backend, ids) = (Recorder::ok().await, Backend::nowhere().await);
    let yaml = format!(
        "defaults: {{ auth: {{ jwt: {{ algorithms: ES256, audience: any, jwks: {{ url: \"{ids}/\", timeout: 1s }} }} }} }}"
    );
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    let answer = proxy.ask(head("GET /", &Issuer::new("one").bearer(&claims("dave")))).await;
    assert_eq!((answer.status(), slug(&answer).as_str()), (503, "auth-unavailable"));
    assert!(answer.head.get("retry-after").is_some());
    proxy.line("the keys for tokens cannot be fetched").await;
    assert_eq!(backend.requests().len(), 0);
}

#[tokio::test]
async fn a_rotated_set_in_a_file_takes_effect() {
    let (one, two) = (Issuer::new("one"), Issuer::new("two"));
    let (_folder, file) = keys(&[&one.set()]);
    let backend = Recorder::ok().await;
    let yaml =
        format!("defaults: {{ auth: {{ jwt: {{ algorithms: ES256, audience: api, jwks: {{ file: {file} }} }} }} }}");
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    let (first, second) = (one.bearer(&claims("dave")), two.bearer(&claims("dave")));
    let status = async |bearer: &str| proxy.ask(head("GET /", bearer)).await.status();
    assert_eq!(status(&first).await, 200);
    fs::write(&file, two.set()).unwrap();
    proxy.line("reloaded").await;
    assert_eq!((status(&second).await, status(&first).await), (200, 401), "a token that was verified before, too");
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_two_issuers_call_the_same_are_two() {
    let signer = Issuer::new("one");
    let (_folder, file) = keys(&[&signer.set()]);
    let backend = Recorder::scripted(|before, _| {
        let fields = "cache-control: max-age=600\r\ncontent-length: 1\r\n";
        format!("HTTP/1.1 200 OK\r\n{fields}\r\n{before}")
    })
    .await;
    let yaml = format!(
        "defaults: {{ auth: {{ jwt: {{ algorithms: ES256, audience: api, jwks: {{ file: {file} }} }} }} }}
routes:
  - {{ upstream: api, cache: {{}} }}
  - {{ match: {{ path: /session }}, upstream: api, session: {{ header: x-own }} }}
  - {{ match: {{ path: /limit }}, upstream: api, rate_limit: [{{ name: few, key: principal, limit: 1/h }}] }}"
    );
    let proxy = Proxy::before(&backend.url(), &yaml).await;
    let by = |issuer: &str| {
        let mut claims = claims("dave");
        claims["iss"] = issuer.into();
        signer.bearer(&claims)
    };
    let (ours, theirs) = (by("https://us.example"), by("https://them.example"));
    let get = async |path: &str, fields: &str| proxy.ask(head(&format!("GET {path}"), fields)).await;

    assert_eq!((get("/", &ours).await.text(), get("/", &theirs).await.text()), ("0".to_owned(), "1".to_owned()));
    assert_eq!((get("/", &ours).await.text(), get("/", &theirs).await.text()), ("0".to_owned(), "1".to_owned()));

    let statuses = (get("/limit", &ours).await.status(), get("/limit", &theirs).await.status());
    assert_eq!((statuses, get("/limit", &ours).await.status()), ((200, 200), 429));

    let own = get("/session", &ours).await.head.get("x-own").expect("one begins").to_owned();
    for (bearer, is_own) in [(&ours, true), (&theirs, false)] {
        let answer = get("/session", &format!("{bearer}x-own: {own}\r\n")).await;
        assert_eq!(answer.head.get("x-own").is_none(), is_own, "of another, a new one begins");
    }
    let listed = proxy.admin_get("/sessions?principal=dave").await.json();
    assert_eq!(listed["sessions"].as_array().expect("a list").len(), 2, "{listed}");
    for principal in backend.requests().iter().map(|request| request.head.get("x-principal-id").map(str::to_owned)) {
        assert_eq!(principal.as_deref(), Some("dave"));
    }
}
