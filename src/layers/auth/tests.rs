//! The layer as a whole.

use serde_json::{Value, json};
use tower::{ServiceExt, service_fn};

use super::{
    api_key::NewKey,
    jwt::tests::{SECRET, hs256},
    *,
};
use crate::message::{Body, Connection, Peer};

struct Setup {
    file: tempfile::NamedTempFile,
    keys: Vec<NewKey>,
    state: State,
    metrics: Metrics,
}

type Answer = Result<http::request::Parts, Error>;

impl Setup {
    /// Keys of `alice` (any route, tier `gold`), `bob` (route `other` only) and one of `carol` that has expired.
    fn new() -> Self {
        let now = SystemTime::now();
        let key = |id, tier, routes: &[String]| NewKey::make(id, tier, routes, None, now).unwrap();
        let mut keys =
            vec![key("alice", Some("gold"), &[]), key("bob", None, &["other".into()]), key("carol", None, &[])];
        keys[2].line.push_str(" expires=2001-01-01");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), keys.iter().map(|key| key.line.clone() + "\n").collect::<String>()).unwrap();
        Self { file, keys, state: State::default(), metrics: Metrics::new() }
    }

    fn key(&self, n: usize) -> &str {
        &self.keys[n].key
    }

    fn layer(&self, config: Value) -> AuthLayer {
        let mut all = json!({ "api_keys": { "file": self.file.path() } });
        all.as_object_mut().unwrap().extend(serde_json::from_value::<serde_json::Map<_, _>>(config).unwrap());
        let config: Config = serde_json::from_value(all).unwrap();
        let mut problems = Problems::default();
        config.check(&mut problems);
        assert!(problems.is_empty(), "{problems}");
        AuthLayer::build(&config, "chat", &self.state, &self.metrics).unwrap()
    }

    fn count(&self, outcome: &str) -> String {
        let text = self.metrics.encode();
        let series = format!("sidegate_auth_total{{route=\"chat\",outcome=\"{outcome}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().to_owned()
    }
}

/// What the upstream sees.
async fn ask(layer: &AuthLayer, request: http::request::Builder) -> Answer {
    let echo = service_fn(|request: http::Request<Body>| async move {
        let mut response = http::Response::new(Body::empty());
        response.extensions_mut().insert(request.into_parts().0);
        Ok::<_, BoxError>(response)
    });
    match layer.layer(echo).oneshot(request.body(Body::empty()).unwrap()).await {
        Ok(mut response) => Ok(response.extensions_mut().remove().unwrap()),
        Err(error) => Err(*error.downcast::<Error>().unwrap()),
    }
}

fn get() -> http::request::Builder {
    http::Request::get("/chat?a=%41")
}

fn from(ip: &str) -> Connection {
    Connection::new(Peer::tcp((ip.parse::<std::net::IpAddr>().unwrap(), 1).into()), false)
}

fn refused(answer: Answer) -> (Kind, Option<String>) {
    let error = answer.unwrap_err();
    (error.kind(), error.fields().first().map(|(_, value)| value.to_str().unwrap().to_owned()))
}

#[tokio::test]
async fn a_good_key_becomes_its_principal() {
    let setup = Setup::new();
    let layer = setup.layer(json!({}));
    let bearer = format!("bearer {}", setup.key(0));
    for request in [get().header("x-api-key", setup.key(0)), get().header("authorization", &bearer)] {
        let head =
            ask(&layer, request.header("x-principal-id", "root").header("X_Principal_Tier", "root")).await.unwrap();
        assert_eq!(head.extensions.get(), Some(&Principal::new("alice", Some("gold".into()))));
        let mut fields: Vec<_> =
            head.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        fields.sort_unstable();
        assert_eq!(fields, [("x-principal-id", "alice"), ("x-principal-tier", "gold")], "and no credential");
        assert_eq!(head.uri, "/chat?a=%41");
    }
    assert_eq!(setup.count("passed"), "2");
}

#[tokio::test]
async fn whoever_is_not_known_is_told_what_would_do_and_no_more() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "realm": "my api" }));
    let missing = (Kind::Unauthorized, Some("Bearer realm=\"my api\"".to_owned()));
    let invalid = (Kind::Unauthorized, Some("Bearer realm=\"my api\", error=\"invalid_token\"".to_owned()));
    assert_eq!(refused(ask(&layer, get()).await), missing);
    assert_eq!(refused(ask(&layer, get().header("authorization", "Basic YTpi")).await), missing);
    let almost = format!("{}x", setup.key(0));
    for (name, value) in
        [("x-api-key", almost.as_str()), ("x-api-key", ""), ("x-api-key", setup.key(2)), ("authorization", "Bearer")]
    {
        assert_eq!(refused(ask(&layer, get().header(name, value)).await), invalid, "{name}");
    }
    let twice = get().header("authorization", format!("Bearer {}", setup.key(0))).header("authorization", "Bearer x");
    assert_eq!(refused(ask(&layer, twice).await), invalid);
    let two = get().header("x-api-key", setup.key(0)).header("authorization", format!("Bearer {}", setup.key(1)));
    assert_eq!(refused(ask(&layer, two).await), invalid, "two good ones that contradict each other");
    let elsewhere = (Kind::Forbidden, Some("Bearer realm=\"my api\", error=\"insufficient_scope\"".to_owned()));
    assert_eq!(refused(ask(&layer, get().header("x-api-key", setup.key(1))).await), elsewhere);
    assert_eq!(
        (setup.count("missing"), setup.count("invalid"), setup.count("forbidden")),
        ("2".into(), "6".into(), "1".into())
    );
}

#[tokio::test]
async fn a_key_in_the_query_counts_only_where_it_is_asked_for() {
    let setup = Setup::new();
    let uri = format!("/chat?a=%41&key={}&b", setup.key(0));
    let request = || http::Request::get(&uri);
    assert_eq!(refused(ask(&setup.layer(json!({})), request()).await).0, Kind::Unauthorized);
    let layer = setup.layer(json!({ "query": "key" }));
    assert_eq!(ask(&layer, request()).await.unwrap().uri, "/chat?a=%41&b");
    let both = request().header("x-api-key", setup.key(1));
    assert_eq!(refused(ask(&layer, both).await).0, Kind::Unauthorized);
    let kept = setup.layer(json!({ "query": "key", "forward": true }));
    let head = ask(&kept, request().header("x-api-key", setup.key(0))).await.unwrap();
    assert_eq!((head.uri.to_string(), head.headers["x-api-key"].to_str().unwrap()), (uri.clone(), setup.key(0)));
}

#[tokio::test]
async fn who_may_be_anonymous_may_not_be_wrong_nor_somebody() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "anonymous": true, "principal_headers": { "tier": "off" } }));
    let head = ask(&layer, get().header("x-principal-id", "root").header("x_principal-id", "root")).await.unwrap();
    assert!(head.headers.is_empty() && head.extensions.get::<Principal>().is_none(), "{head:?}");
    assert_eq!(refused(ask(&layer, get().header("x-api-key", "wrong")).await).0, Kind::Unauthorized);
    let known = ask(&layer, get().header("x-api-key", setup.key(0))).await.unwrap();
    assert!(known.headers["x-principal-id"] == "alice" && !known.headers.contains_key("x-principal-tier"));
}

#[tokio::test]
async fn a_key_or_a_token_is_enough() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "jwt": { "algorithms": "HS256", "audience": "any", "key": SECRET } }));
    let token =
        hs256(&json!({ "alg": "HS256" }), &json!({ "sub": "dave", "exp": 4_000_000_000_u64 }), SECRET.as_bytes());
    let bearer = |text: &str| get().header("authorization", format!("Bearer {text}"));
    assert_eq!(ask(&layer, bearer(&token)).await.unwrap().headers["x-principal-id"], "dave");
    assert_eq!(ask(&layer, bearer(setup.key(0))).await.unwrap().headers["x-principal-id"], "alice");
    assert_eq!(refused(ask(&layer, get().header("x-api-key", &token)).await).0, Kind::Unauthorized, "a field for keys");
    let two = bearer(&token).header("x-api-key", setup.key(0));
    assert_eq!(refused(ask(&layer, two).await).0, Kind::Unauthorized);
}

#[tokio::test(start_paused = true)]
async fn an_address_that_guesses_has_to_wait_and_a_key_that_was_good_from_there_need_not() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "max_failures": "5/min" }));
    let with = |ip: &str, key: &str| ask(&layer, get().header("x-api-key", key).extension(from(ip)));
    let (one, same, other) = ("2001:db8::1", "2001:db8::2:1", "2001:db8:0:1::1");
    assert!(with(one, setup.key(0)).await.is_ok());
    for _ in 0..5 {
        assert_eq!(refused(with(one, "guess").await).0, Kind::Unauthorized);
    }
    let fresh = NewKey::make("erin", None, &[], None, SystemTime::now()).unwrap();
    let text = std::fs::read_to_string(setup.file.path()).unwrap() + &fresh.line;
    std::fs::write(setup.file.path(), text).unwrap();
    // As after a reload.
    let layer = setup.layer(json!({ "max_failures": "5/min" }));
    let with = |ip: &str, key: &str| ask(&layer, get().header("x-api-key", key).extension(from(ip)));
    for key in ["guess", &fresh.key, ""] {
        let error = with(same, key).await.unwrap_err();
        assert_eq!((error.kind(), error.retry_after()), (Kind::RateLimited, Some(std::time::Duration::from_secs(12))));
    }
    assert_eq!(
        refused(ask(&layer, get().extension(from(one))).await).0,
        Kind::Unauthorized,
        "shows nothing, guesses nothing"
    );
    assert!(with(one, setup.key(0)).await.is_ok(), "was good from there");
    assert!(with(other, &fresh.key).await.is_ok(), "another network");
    tokio::time::advance(std::time::Duration::from_secs(12)).await;
    assert!(with(same, &fresh.key).await.is_ok(), "who waits as long as told is looked at");
    assert_eq!(setup.count("throttled"), "3");
}

#[test]
fn routes_share_what_one_file_says_and_a_changed_file_is_another() {
    let setup = Setup::new();
    let (one, two) = (setup.layer(json!({})), setup.layer(json!({ "forward": true })));
    let keys = |layer: &AuthLayer| layer.gate.keys.clone().unwrap();
    assert!(Arc::ptr_eq(&keys(&one), &keys(&two)));
    std::fs::write(setup.file.path(), "").unwrap();
    assert!(!Arc::ptr_eq(&keys(&one), &keys(&setup.layer(json!({})))));
}

#[test]
fn nothing_that_is_printed_shows_a_secret() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "jwt": { "algorithms": "HS256", "audience": "any", "key": SECRET } }));
    let text = format!("{layer:?} {:?} {:?}", setup.state, setup.keys);
    let digest = setup.keys[0].line.split(' ').nth(1).unwrap();
    for secret in [SECRET, setup.key(0), digest] {
        assert!(!text.contains(secret), "{text}");
    }
}
