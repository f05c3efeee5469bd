//! Nothing that is secret is told anywhere: one run with every kind of secret, and a search of all that it said.

use std::{
    collections::{HashMap, HashSet},
    fmt::Write,
    fs,
    process::Command,
};

use base64::{
    Engine,
    prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD},
};
use http::Request;
use ring::{
    digest::{SHA256, digest},
    hmac,
    rand::{SecureRandom, SystemRandom},
};
use serde_json::{Value, json};

use crate::harness::{
    Backend, Message, Proxy, Wire, backend::Recorder, client::Http2Client, eventually, figure, redis::Redis,
};

/// No secret: what an operator called things. It stands wherever a secret might, so the search must find it there.
const CANARY: &str = "canary-7c1e90b2d4f6";
/// As much of a secret in a row is none of anybody's business.
const PART: usize = 12;
/// How often a client asks where a limit is 2/h.
const UNTIL_REFUSED: usize = 3;

/// Secrets by their names.
#[derive(Default)]
struct Secrets(Vec<(String, String)>);

impl Secrets {
    fn add(&mut self, name: &str, text: impl Into<String>) -> String {
        let text = text.into();
        assert!(text.len() >= PART, "{name} is too short to be told from other text");
        if !self.0.iter().any(|(_, known)| *known == text) {
            self.0.push((name.to_owned(), text.clone()));
        }
        text
    }

    /// A new one: 32 digits.
    fn make(&mut self, name: &str) -> String {
        let mut bits = [0; 16];
        SystemRandom::new().fill(&mut bits).unwrap();
        self.add(name, hex(&bits))
    }

    /// A key and its line in a file of keys.
    fn make_key(&mut self, name: &str, arguments: &[&str]) -> (String, String) {
        let sidegate =
            Command::new(env!("CARGO_BIN_EXE_sidegate")).args(["key", "new"]).args(arguments).output().unwrap();
        let text = String::from_utf8(sidegate.stdout).unwrap();
        let mut lines = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned);
        (self.add(name, lines.next().unwrap()), lines.next().unwrap())
    }

    /// A token that `secret` has signed; its parts are secrets, too.
    fn token(&mut self, name: &str, secret: &str, claims: &Value) -> String {
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", part(&json!({ "alg": "HS256", "typ": "JWT" })), part(claims));
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret.as_bytes()), signed.as_bytes());
        let token = format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag));
        for (part, text) in ["header", "claims", "signature"].iter().zip(token.split('.')) {
            self.add(&format!("the {part} of {name}"), text);
        }
        self.add(name, token)
    }

    /// In which spellings each is looked for. Case is not.
    fn spellings(&self) -> Vec<(String, String)> {
        let spell = |(name, text): &(String, String)| {
            let digest = digest(&SHA256, text.as_bytes());
            [
                (name.clone(), text.clone()),
                (format!("{name} in hex"), hex(text.as_bytes())),
                (format!("{name} in base64"), BASE64_STANDARD.encode(text)),
                (format!("{name} in base64url"), BASE64_URL_SAFE_NO_PAD.encode(text)),
                (format!("the SHA-256 of {name} in hex"), hex(digest.as_ref())),
                (format!("the SHA-256 of {name} in base64"), BASE64_STANDARD.encode(digest)),
                (format!("the SHA-256 of {name} in base64url"), BASE64_URL_SAFE_NO_PAD.encode(digest)),
            ]
        };
        self.0.iter().flat_map(spell).collect()
    }

    fn search(&self) -> Search {
        let mut parts = HashMap::new();
        for (name, text) in self.spellings() {
            for part in text.to_ascii_lowercase().as_bytes().windows(PART) {
                parts.entry(<[u8; PART]>::try_from(part).unwrap()).or_insert_with(|| name.clone());
            }
        }
        Search(parts)
    }
}

/// All parts of all secrets.
struct Search(HashMap<[u8; PART], String>);

impl Search {
    /// What is found in `text`: each once, with what stands around it.
    fn found(&self, text: &str) -> Vec<String> {
        let text = text.to_ascii_lowercase();
        let (mut found, mut seen) = (Vec::new(), HashSet::new());
        for (at, part) in text.as_bytes().windows(PART).enumerate() {
            if let Some(name) = self.0.get(part)
                && seen.insert(name)
            {
                let around = &text.as_bytes()[at.saturating_sub(120)..text.len().min(at + 60)];
                found.push(format!("{name}: …{}…", String::from_utf8_lossy(around)));
            }
        }
        found
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        write!(text, "{byte:02x}").unwrap();
        text
    })
}

/// What is secret in the file of the configuration.
struct Configured {
    redis: String,
    jwt: String,
    bearer: String,
    upstream_key: String,
    probe: String,
    matched: String,
}

impl Configured {
    fn new(secrets: &mut Secrets, which: &str) -> Self {
        let mut new = |name: &str| secrets.make(&format!("the {which} {name}"));
        Self {
            redis: new("password of redis"),
            jwt: new("secret of tokens"),
            bearer: new("bearer of the fallback"),
            upstream_key: new("key of the fallback"),
            probe: new("field of the health checks"),
            matched: new("field of a route"),
        }
    }
}

/// A run, and all that anybody could read of it.
struct Run {
    proxy: Proxy,
    backend: Recorder,
    redis: Redis,
    secrets: Secrets,
    told: Vec<(&'static str, String)>,
    statuses: HashSet<u16>,
}

impl Run {
    async fn ask(&mut self, start: &str, fields: &str) -> Message {
        self.raw(&format!("{start} HTTP/1.1\r\nhost: sidegate.test\r\n{fields}\r\n")).await
    }

    /// Asks over HTTP/1.1, and keeps the answer.
    async fn raw(&mut self, request: &str) -> Message {
        let answer = self.proxy.ask(request).await;
        self.statuses.insert(answer.status());
        let mut text = format!("{}\n{}\n", answer.head.start, answer.text());
        for (name, value) in &answer.head.fields {
            if name != "set-cookie" {
                writeln!(text, "{name}: {value}").unwrap();
            } else if let Some(cookie) = value.strip_prefix("sidegate_session=") {
                self.secrets.add("a session", cookie.split(['.', ';']).next().unwrap());
            }
        }
        self.told.push(("answers", text));
        answer
    }

    /// Reads every page of the operator's port, and all that Redis has.
    async fn look_around(&mut self, key: &str) {
        let rule = format!("/rate-limits/{CANARY}?key={CANARY}");
        let of_key = format!("/rate-limits/by-key?route=key&key={key}");
        let session = self.secrets.0.iter().rfind(|(name, _)| name == "a session").unwrap().1.clone();
        let of_session = format!("/sessions/{session}");
        for (page, path) in [
            ("/metrics", "/metrics"),
            ("/config", "/config"),
            ("/health", "/health"),
            ("/health/upstreams", "/health/upstreams"),
            ("/health/redis", "/health/redis"),
            ("/livez", "/livez"),
            ("/readyz", "/readyz"),
            ("/sessions", "/sessions"),
            ("/sessions of a principal", &format!("/sessions?principal={CANARY}")),
            ("/sessions of a session", &of_session),
            ("/rate-limits", "/rate-limits"),
            ("/rate-limits of a rule", &rule),
            ("/rate-limits of a key", &of_key),
            ("/rate-limits of nothing", &format!("/rate-limits/none?key={key}")),
            ("/upstreams", "/upstreams"),
            ("/circuit-breakers", "/circuit-breakers"),
            ("/nothing", &format!("/{key}")),
        ] {
            let answer = self.proxy.admin_get(path).await;
            self.told.push((page, format!("{:?}\n{}", answer.head, answer.text())));
        }
    }

    async fn look_into_redis(&mut self) {
        let mut kept = String::new();
        let mut cursor = "0".to_owned();
        loop {
            let answer = self.redis.command(&["SCAN", &cursor, "COUNT", "1000"]).await;
            let mut lines = answer.lines().skip(2);
            cursor = lines.next().unwrap().to_owned();
            for key in lines.skip(1).filter(|line| !line.starts_with('$')) {
                let kind = self.redis.command(&["TYPE", key]).await;
                let read: &[&str] = match kind.trim() {
                    "+string" => &["GET", key],
                    "+hash" => &["HGETALL", key],
                    "+zset" => &["ZRANGE", key, "0", "-1", "WITHSCORES"],
                    "+set" => &["SMEMBERS", key],
                    "+list" => &["LRANGE", key, "0", "-1"],
                    "+none" => continue,
                    other => panic!("{key} is {other}"),
                };
                writeln!(kept, "{key} {}", self.redis.command(read).await).unwrap();
            }
            if cursor == "0" {
                break;
            }
        }
        assert!(kept.contains(":session:") && kept.contains(":limit:"), "sessions and limits are kept there: {kept}");
        self.told.push(("keys and values of redis", kept));
    }

    async fn redis_is(&self, status: &str) {
        let is = async || self.proxy.admin_get("/health/redis").await.json()["status"] == status;
        eventually(&format!("redis to be {status}"), is).await;
    }

    async fn reload(&mut self, token: &str, status: u16) {
        let answer = self.proxy.admin_post_with("/reload", &format!("authorization: Bearer {token}\r\n")).await;
        assert_eq!(answer.status(), status, "{}", answer.text());
        self.told.push(("/reload", format!("{:?}\n{}", answer.head, answer.text())));
    }

    /// Ends the run and searches all that it told.
    async fn ends_clean(mut self, configured: &[&Configured]) {
        for status in [200, 400, 401, 403, 404, 414, 429, 431, 502, 503] {
            assert!(self.statuses.contains(&status), "no answer was a {status}: {:?}", self.statuses);
        }
        let asked = |path: &str, fields: [(&str, &str); 2]| {
            let has = |request: &Message| fields.iter().all(|(name, value)| request.head.get(name) == Some(value));
            self.backend.requests().iter().any(|request| request.head.target() == path && has(request))
        };
        for Configured { probe, bearer, upstream_key, .. } in configured {
            let (probing, falling) = (format!("Bearer {probe}"), format!("Bearer {bearer}"));
            let fields = [("authorization", &*probing), ("x-probe", probe)];
            eventually("a health check", async || asked("/healthz", fields)).await;
            assert!(asked("/fallback", [("authorization", &falling), ("x-upstream-key", upstream_key)]));
        }
        let mut upstream = String::new();
        for request in self.backend.requests().iter().filter(|request| request.head.target().starts_with("/keyed")) {
            let fields = request.head.fields.iter().filter(|(name, _)| !["cookie", "x-session-id"].contains(&&**name));
            writeln!(upstream, "{} {fields:?}", request.head.start, fields = fields.collect::<Vec<_>>()).unwrap();
        }
        self.told.push(("upstream", upstream));
        assert_eq!(self.proxy.sample("sidegate_log_lines_dropped_total").await, 0);
        let (_, logged) = self.proxy.stop().await;
        self.told.push(("log", logged));

        let search = self.secrets.search();
        for (name, text) in self.secrets.spellings() {
            for planted in [&*text, text.to_uppercase().get(1..=PART).unwrap()] {
                assert!(!search.found(&format!("{{\"msg\":\"{planted}\"}}")).is_empty(), "{name} would not be found");
            }
        }
        let canary = Secrets(vec![("the canary".to_owned(), CANARY.to_owned())]).search();
        for place in [
            "answers",
            "upstream",
            "log",
            "what redis was told",
            "keys and values of redis",
            "/metrics",
            "/config",
            "/health",
            "/health/upstreams",
            "/sessions",
            "/sessions of a principal",
            "/rate-limits",
            "/rate-limits of a rule",
            "/upstreams",
            "/circuit-breakers",
        ] {
            let mut told = self.told.iter().filter(|(told, _)| *told == place);
            assert!(told.any(|(_, text)| !canary.found(text).is_empty()), "{place} is not what it should be");
        }
        let bytes: usize = self.told.iter().map(|(_, text)| text.len()).sum();
        let secrets = self.secrets.0.len();
        figure(&format!("{secrets} secrets in 7 spellings are nowhere in {} KiB", bytes / 1024));
        let found: Vec<_> = self
            .told
            .iter()
            .flat_map(|(place, text)| search.found(text).into_iter().map(move |found| format!("{place}: {found}")))
            .collect();
        assert!(found.is_empty(), "{}", found.join("\n"));
    }

    /// Everything that clients may show, right and wrong.
    async fn traffic(&mut self, clients: &Clients) {
        let Clients { key, expired, elsewhere, token, old, forged } = clients;
        let guess = self.secrets.make("a guessed key");
        let cookie = self.secrets.make("a cookie of the application");
        let unknown = self.secrets.make("a session that was never made");
        let basic = BASE64_STANDARD.encode(format!("user:{}", self.secrets.make("a password of a client")));
        let basic = self.secrets.add("credentials of a client", basic);
        let spelt = key.replacen('s', "%73", 1);

        // Where nothing is limited: who is refused begins none.
        let began = self.ask("GET /begin", &format!("x-api-key: {key}\r\n")).await;
        let told = began.head.all("set-cookie").into_iter().find(|cookie| cookie.starts_with("sidegate_session="));
        let session = told.expect("a session begins").split(';').next().unwrap().to_owned();
        for (start, fields) in [
            ("GET /keyed/a", format!("x-api-key: {key}\r\ncookie: {session}; app={cookie}\r\n")),
            ("GET /keyed/a", format!("authorization: Bearer {token}\r\ncookie: {session}\r\n")),
            ("GET /keyed/a", format!("authorization: Bearer {key}\r\ncookie: sidegate_session={unknown}\r\n")),
            (&format!("GET /keyed/a?a&api_key={spelt}"), String::new()),
            (&format!("GET /keyed/a?a&api_key={token}"), String::new()),
            ("GET /keyed/a", String::new()),
            ("GET /keyed/a", format!("x-api-key: {expired}\r\ncookie: {session}\r\n")),
            ("GET /keyed/a", format!("x-api-key: {elsewhere}\r\n")),
            ("GET /keyed/a", format!("x-api-key: {guess}\r\n")),
            ("GET /keyed/a", format!("x-api-key: {key}, {guess}\r\n")),
            ("GET /keyed/a", format!("x-api-key: {key}\r\nx-api-key: {guess}\r\n")),
            ("GET /keyed/a", format!("authorization: Basic {basic}\r\n")),
            ("GET /keyed/a", format!("authorization: Bearer {token} {key}\r\n")),
            ("GET /keyed/a", format!("authorization: Bearer {old}\r\n")),
            ("GET /keyed/a", format!("authorization: Bearer {forged}\r\n")),
            ("GET /keyed/a", format!("authorization: Bearer {token}\r\nx-api-key: {key}\r\n")),
            (&format!("GET /keyed/a?api_key={guess}"), String::new()),
            (&format!("GET http://user:{guess}@sidegate.test/keyed/a"), format!("x-api-key: {key}\r\n")),
            ("GET /keyed/a", format!("proxy-authorization: Basic {basic}\r\nx-api-key: {key}\r\n")),
            ("GET /matched", format!("x-route-key: {guess}\r\nauthorization: Bearer {key}\r\n")),
            ("GET /lost", format!("authorization: Bearer {token}\r\nx-api-key: {key}\r\ncookie: {session}\r\n")),
            ("GET /fallback", format!("authorization: Bearer {token}\r\nx-api-key: {key}\r\ncookie: a={cookie}\r\n")),
            ("GET /gone", format!("authorization: Bearer {token}\r\nx-api-key: {key}\r\n")),
        ] {
            self.ask(start, &fields).await;
        }
        for _ in 0..UNTIL_REFUSED {
            self.ask("GET /guess", &format!("x-api-key: {guess}\r\ncontent-type: application/grpc\r\n")).await;
            self.ask("GET /guess", &format!("authorization: Bearer {forged}\r\n")).await;
            self.ask("GET /limited/authorization", &format!("authorization: Bearer {token}\r\n")).await;
            self.ask("GET /limited/key", &format!("x-api-key: {key}\r\n")).await;
            self.ask(&format!("GET /limited/query?x=1&api_key={spelt}"), "").await;
            self.ask("GET /limited/session", &format!("x-api-key: {key}\r\ncookie: {session}; app={cookie}\r\n")).await;
            self.ask("GET /limited/all", &format!("x-api-key: {key}\r\nauthorization: {basic}\r\n")).await;
        }

        // What cannot be read has secrets in it, too.
        for broken in [
            format!("GET /keyed/a HTTP/1.1\r\nhost: a\r\nx-api-key: {key}\u{1}\r\n\r\n"),
            format!("GET /keyed/a HTTP/1.1\r\nhost: a\r\nx-api-key {key}\r\n\r\n"),
            format!("GET /keyed/a?api_key={key} {token} HTTP/1.1\r\nhost: a\r\n\r\n"),
            format!("GET /keyed/a HTTP/1.1\r\nhost: a b {key}\r\nx-api-key: {key}\r\n\r\n"),
            format!("GET /keyed/a HTTP/1.1\r\nhost: a\r\ncontent-length: {key}\r\n\r\n"),
            format!("GET /keyed/a HTTP/1.1\r\nhost: a\r\ntransfer-encoding: {key}\r\n\r\n"),
            format!("GET /{} HTTP/1.1\r\nhost: a\r\n\r\n", format!("?api_key={key}").repeat(1000)),
            format!("GET / HTTP/1.1\r\nhost: a\r\n{}\r\n", format!("x-api-key: {key}\r\n").repeat(200)),
        ] {
            self.raw(&broken).await;
        }

        let http2 = Http2Client::to(self.proxy.address()).await;
        for (path, name, value) in [
            ("/keyed/a".to_owned(), "x-api-key", key.clone()),
            ("/keyed/a".to_owned(), "authorization", format!("Bearer {token}")),
            ("/keyed/a".to_owned(), "cookie", format!("{session}; app={cookie}")),
            (format!("/keyed/a?api_key={guess}"), "authorization", format!("Bearer {forged}")),
        ] {
            let request = Request::get(format!("http://sidegate.test{path}")).header(name, value).body(()).unwrap();
            let answer = http2.ask(request).await;
            self.statuses.insert(answer.status().as_u16());
            for cookie in answer.headers().get_all("set-cookie") {
                if let Some(cookie) = cookie.to_str().unwrap().strip_prefix("sidegate_session=") {
                    self.secrets.add("a session", cookie.split('.').next().unwrap());
                }
            }
        }
    }
}

/// What clients show.
struct Clients {
    key: String,
    expired: String,
    elsewhere: String,
    token: String,
    /// Has expired.
    old: String,
    /// Signed with another secret.
    forged: String,
}

/// The file; `redis` is that section.
fn settings(
    level: &str,
    admin: &str,
    redis: &str,
    configured: &Configured,
    keys: &str,
    [backend, nowhere]: [&str; 2],
) -> String {
    let Configured { jwt, bearer, upstream_key, probe, matched, .. } = configured;
    format!(
        "
log: {{ format: json, level: {level} }}
admin: {{ listen: 127.0.0.1:0, token: {admin} }}
redis: {redis}
upstreams:
  {CANARY}:
    endpoints: ['{backend}']
    circuit_breaker: {{}}
    health: &health
      active:
        path: /healthz
        interval: 200ms
        jitter: 0s
        headers: {{ authorization: Bearer {probe}, x-probe: '{probe}' }}
  down: {{ endpoints: ['{nowhere}'], health: *health, circuit_breaker: {{}} }}
defaults:
  session: {{}}
  retry: {{}}
routes:
  - name: {CANARY}
    match: {{ path: /keyed/* }}
    upstream: {CANARY}
    auth:
      api_keys: {{ file: '{keys}' }}
      jwt: {{ algorithms: HS256, audience: api, key: '{jwt}', tier: plan }}
      query: api_key
      realm: {CANARY}
      max_failures: off
    rate_limit: [{{ name: {CANARY}, key: principal, limit: 4/h }}]
  - name: begin
    match: {{ path: /begin }}
    upstream: {CANARY}
    auth: {{ api_keys: {{ file: '{keys}' }} }}
  - name: guess
    match: {{ path: /guess }}
    upstream: {CANARY}
    auth: {{ api_keys: {{ file: '{keys}' }}, max_failures: 2/h }}
  - name: authorization
    match: {{ path: /limited/authorization }}
    upstream: {CANARY}
    errors: openai
    rate_limit: [{{ name: by-authorization, key: 'header:authorization', limit: 2/h }}]
  - name: key
    match: {{ path: /limited/key }}
    upstream: {CANARY}
    rate_limit: [{{ name: by-key, key: 'header:x-api-key', limit: 2/h, algorithm: token_bucket }}]
  - name: query
    match: {{ path: /limited/query }}
    upstream: {CANARY}
    rate_limit: [{{ name: by-query, key: 'query:api_key', limit: 2/h }}]
  - name: session
    match: {{ path: /limited/session }}
    upstream: {CANARY}
    rate_limit:
      - {{ name: by-session, key: session, limit: 2/h }}
      - {{ name: by-both, key: [session, 'header:x-api-key'], limit: 100/h, algorithm: token_bucket }}
  - name: all
    match: {{ path: /limited/all }}
    upstream: {CANARY}
    rate_limit:
      on_store_failure: deny
      rules: [{{ name: by-all, key: ['header:x-api-key', 'header:authorization'], limit: 2/h }}]
  - {{ name: matched, match: {{ path: /matched, headers: {{ x-route-key: '{matched}' }} }}, upstream: {CANARY} }}
  - {{ name: lost, match: {{ path: /lost }}, upstream: down }}
  - name: fallback
    match: {{ path: /fallback }}
    upstream: down
    fallback: [{{ upstream: {CANARY}, headers: {{ bearer: '{bearer}', set: {{ x-upstream-key: '{upstream_key}' }} }} }}]
"
    )
}

/// The file with something wrong, each time near a secret.
fn broken(file: &str, configured: &Configured) -> Vec<String> {
    let Configured { redis, jwt, bearer, probe, .. } = configured;
    let short: String = jwt.chars().take(20).collect();
    let changes = [
        (jwt, short),
        (jwt, format!("-----BEGIN PUBLIC KEY-----{jwt}")),
        (&format!("'{jwt}'"), format!("'{jwt}")),
        (&format!("'{jwt}'"), format!("[{jwt}]")),
        (&format!("'{bearer}'"), format!("\"{bearer}\\nx\"")),
        (&format!("'{probe}'"), format!("\"{probe}\\nx\"")),
        (&"bearer: ".to_owned(), "bearers: ".to_owned()),
        (&"token: ".to_owned(), "tokens: ".to_owned()),
        (&format!("redis://gate:{redis}@"), format!("gate:{redis}@")),
        (&format!("{redis}@127.0.0.1"), redis.clone()),
        (&format!("{redis}@127.0.0.1:"), format!("{redis}@127.0.0.1:port")),
        (&"timeout: 1s".to_owned(), format!("password: ['{redis}']")),
        (&"timeout: 1s".to_owned(), format!("passwort: '{redis}'")),
    ];
    let change = |(from, to): (&String, String)| {
        assert!(file.contains(from), "{file}");
        file.replace(from, &to)
    };
    changes.map(change).into()
}

/// Everything that Redis is told from now on, as it shows it itself.
async fn monitor(redis: &Redis) -> Wire {
    let mut wire = Wire::to(redis.address()).await;
    wire.send("MONITOR\r\n").await;
    assert_eq!(wire.exactly(5).await, b"+OK\r\n");
    wire
}

/// What one run at this level tells.
async fn nothing_secret_is_told(level: &str) {
    let mut secrets = Secrets::default();
    let (first, second) = (Configured::new(&mut secrets, "first"), Configured::new(&mut secrets, "second"));
    let wrong = Configured::new(&mut secrets, "wrong");
    let (key, line) = secrets.make_key("a key", &["--id", CANARY, "--tier", "gold"]);
    let (expired, expired_line) = secrets.make_key("an expired key", &["--id", "bob"]);
    let (elsewhere, elsewhere_line) =
        secrets.make_key("a key for elsewhere", &["--id", "eve", "--routes", "elsewhere"]);
    let folder = tempfile::tempdir().unwrap();
    let keys = folder.path().join("keys").to_str().unwrap().to_owned();
    let lines = format!("{line}\n{expired_line} expires=2001-01-01\n{elsewhere_line}\n");
    fs::write(&keys, &lines).unwrap();
    let clients = |secrets: &mut Secrets, secret: &str| {
        let email = secrets.make("a claim");
        let claims = |exp: u64| json!({ "sub": "dave", "aud": "api", "plan": "gold", "exp": exp, "email": email });
        Clients {
            key: key.clone(),
            expired: expired.clone(),
            elsewhere: elsewhere.clone(),
            token: secrets.token("a token", secret, &claims(4_000_000_000)),
            old: secrets.token("an expired token", secret, &claims(1_000_000_000)),
            forged: secrets.token("a forged token", "not the secret", &claims(4_000_000_000)),
        }
    };
    let (early, late) = (clients(&mut secrets, &first.jwt), clients(&mut secrets, &second.jwt));
    let (admin, wrong_admin) =
        (secrets.make("the token of the operator"), secrets.make("a wrong token of the operator"));
    let own = secrets.make("a cookie of the backend");
    let answer = format!("HTTP/1.1 200 OK\r\nset-cookie: own={own}\r\ncontent-length: 2\r\n\r\nok");
    let (backend, nowhere) = (Recorder::answering(answer).await, Backend::nowhere().await);
    let url = backend.url();
    let passwords = [&first, &second].map(|configured| format!(">{}", configured.redis));
    let redis =
        Redis::with(&["--user", "gate", "on", &passwords[0], &passwords[1], "~sidegate:*", "&*", "+@all"]).await;
    let address = redis.address();
    let with = |password: &str| format!("{{ url: 'redis://gate:{password}@{address}', timeout: 1s }}");
    let file = |redis: &str, configured| settings(level, &admin, redis, configured, &keys, [&url, &nowhere]);

    let first_file = file(&with(&first.redis), &first);
    let second_file =
        file(&format!("{{ url: 'redis://gate@{address}', password: {{ file: password }}, timeout: 1s }}"), &second);
    let with_wrong_password = file(&with(&wrong.redis), &first);
    let proxy = Proxy::start(&first_file).await;
    fs::write(proxy.path("password"), &second.redis).unwrap();
    let mut watched = monitor(&redis).await;
    let mut run = Run { proxy, backend, redis, secrets, told: Vec::new(), statuses: HashSet::new() };
    run.redis_is("up").await;
    run.proxy.line("endpoint down").await;
    run.traffic(&early).await;
    run.ask("GET /matched", &format!("x-route-key: {}\r\n", first.matched)).await;
    run.look_around(&early.key).await;
    run.look_into_redis().await;

    for broken in broken(&file(&with(&wrong.redis), &wrong), &wrong) {
        run.proxy.rewrite(&broken);
        run.reload(&wrong_admin, 409).await;
        run.look_around(&early.key).await;
    }
    run.proxy.rewrite(&with_wrong_password);
    run.reload(&admin, 200).await;
    run.redis_is("connecting").await;
    run.look_around(&early.key).await;
    fs::write(&keys, format!("{lines}mallory {}\n", run.secrets.make("a key where its digest belongs"))).unwrap();
    run.reload(&admin, 409).await;
    run.look_around(&early.key).await;
    fs::write(&keys, &lines).unwrap();
    run.proxy.rewrite(&second_file);
    run.reload(&admin, 200).await;
    run.redis_is("up").await;
    run.traffic(&late).await;

    run.redis.kill();
    run.told.push(("what redis was told", String::from_utf8_lossy(&watched.rest().await.0).into_owned()));
    run.redis_is("down").await;
    run.traffic(&late).await;
    run.look_around(&late.key).await;
    run.redis.restart().await;
    let mut watched = monitor(&run.redis).await;
    run.redis_is("up").await;
    run.traffic(&late).await;
    run.look_around(&late.key).await;
    run.look_into_redis().await;
    run.redis.kill();
    run.told.push(("what redis was told", String::from_utf8_lossy(&watched.rest().await.0).into_owned()));
    run.ends_clean(&[&first, &second]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_secret_is_told_at_debug() {
    nothing_secret_is_told("debug").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_secret_is_told_at_trace() {
    nothing_secret_is_told("trace").await;
}
