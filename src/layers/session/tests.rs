//! The layer as a whole, with memory for a store.

use serde_json::{Value, json};
use tokio::time::advance;
use tower::{ServiceExt, service_fn};

use super::*;
use crate::message::{Body, Peer};

struct Setup {
    state: State,
    metrics: Metrics,
}

/// What the upstream saw, and what the client got.
type Answer = (http::request::Parts, HeaderMap);

impl Setup {
    fn new() -> Self {
        Self { state: State::default(), metrics: Metrics::new() }
    }

    fn layer(&self, config: Value) -> SessionLayer {
        let config: Config = serde_json::from_value(config).unwrap();
        let mut problems = Problems::default();
        config.check(&mut problems);
        assert!(problems.is_empty(), "{problems}");
        SessionLayer::new(&config, "chat", &self.state, None, &self.metrics)
    }

    fn count(&self, outcome: &str) -> u64 {
        let text = self.metrics.encode();
        let series = format!("sidegate_sessions_total{{route=\"chat\",outcome=\"{outcome}\"}} ");
        text.lines().find_map(|line| line.strip_prefix(&series)).unwrap().parse().unwrap()
    }
}

async fn ask(layer: &SessionLayer, request: http::request::Builder) -> Answer {
    answered(layer, request, &[]).await
}

/// Asks a backend whose answer has these fields.
async fn answered(
    layer: &SessionLayer,
    request: http::request::Builder,
    fields: &'static [(&'static str, &'static str)],
) -> Answer {
    let echo = service_fn(move |request: http::Request<Body>| async move {
        let mut response = http::Response::new(Body::empty());
        for (name, value) in fields {
            response.headers_mut().append(*name, HeaderValue::from_static(value));
        }
        response.extensions_mut().insert(request.into_parts().0);
        Ok::<_, BoxError>(response)
    });
    let mut response = layer.layer(echo).oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    (response.extensions_mut().remove().unwrap(), response.headers().clone())
}

fn get() -> http::request::Builder {
    http::Request::get("/")
}

fn of(id: &str) -> http::request::Builder {
    get().header("cookie", format!("sidegate_session={id}"))
}

fn by(request: http::request::Builder, principal: &str) -> http::request::Builder {
    request.extension(Principal::new(principal, None))
}

/// The id that the upstream was told.
fn id((head, _): &Answer) -> String {
    head.headers["x-session-id"].to_str().unwrap().to_owned()
}

/// The id that the client was told, and when.
fn given((_, headers): &Answer) -> Option<(String, u64)> {
    let cookie = headers.get(SET_COOKIE)?.to_str().unwrap().strip_prefix("sidegate_session=").unwrap();
    let (id, at) = cookie.split(';').next().unwrap().split_once('.').unwrap();
    Some((id.to_owned(), u64::from_str_radix(at, 16).unwrap()))
}

#[tokio::test(start_paused = true)]
async fn a_session_begins_with_a_request_and_lives_as_long_as_it_is_used() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "ttl": "1h" }));
    let first = ask(&layer, get()).await;
    let own = id(&first);
    assert_eq!(given(&first).unwrap().0, own);
    assert_eq!(first.1[CACHE_CONTROL], "private");
    for _ in 0..10 {
        advance(Duration::from_secs(3599)).await;
        let now = format!("{own}.{:x}", unix_now());
        let next = ask(&layer, of(&now)).await;
        assert_eq!((id(&next), given(&next)), (own.clone(), None));
        assert!(!next.1.contains_key(CACHE_CONTROL));
    }
    advance(Duration::from_secs(3600)).await;
    assert_ne!(id(&ask(&layer, of(&own)).await), own);
    assert_eq!((setup.count("new"), setup.count("known"), setup.count("unknown")), (1, 10, 1));
}

#[tokio::test]
async fn an_id_that_is_not_known_is_not_taken_over() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "header": "x-session-id" }));
    let planted = "00112233445566778899aabbccddeeff";
    for request in [of(planted), get().header("x-session-id", planted), get().header("X_Session_Id", planted)] {
        let answer = ask(&layer, request).await;
        assert_ne!(id(&answer), planted);
        assert_eq!(given(&answer).unwrap().0, id(&answer));
        assert_eq!(answer.1["x-session-id"], id(&answer));
        assert!(!format!("{:?}", answer.0.headers).contains(planted));
    }
    assert_eq!((setup.count("unknown"), setup.count("new")), (2, 1));
}

#[tokio::test]
async fn of_several_cookies_the_one_that_is_known_counts() {
    let layer = Setup::new().layer(json!({}));
    let own = id(&ask(&layer, get()).await);
    let other = "00112233445566778899aabbccddeeff";
    let both =
        |cookies: [&str; 3]| get().header("cookie", cookies.map(|id| format!("sidegate_session={id}")).join("; "));
    assert_eq!(id(&ask(&layer, both(["x", other, &own])).await), own);
    assert_ne!(id(&ask(&layer, both([other, other, &own])).await), own, "two are looked up and no more");
}

#[tokio::test]
async fn a_session_is_its_principals_alone() {
    let setup = Setup::new();
    let layer = setup.layer(json!({}));
    let nobodys = id(&ask(&layer, get()).await);
    let alices = id(&ask(&layer, by(of(&nobodys), "alice")).await);
    assert_ne!(alices, nobodys, "a login begins another");
    assert_eq!(id(&ask(&layer, by(of(&alices), "alice")).await), alices);
    for request in [by(of(&alices), "bob"), of(&alices)] {
        let other = ask(&layer, request).await;
        assert_ne!(id(&other), alices);
        assert_eq!(given(&other).unwrap().0, id(&other));
    }
    assert_eq!(id(&ask(&layer, by(of(&alices), "alice")).await), alices, "nobody took it away");
    assert_eq!(setup.count("foreign"), 3);
}

#[tokio::test]
async fn the_upstream_gets_the_id_and_neither_cookie_nor_field() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "header": "mcp-session-id", "upstream_header": "x-sid" }));
    let own = ask(&layer, get()).await.1["mcp-session-id"].to_str().unwrap().to_owned();
    let request = || {
        let request =
            get().header("cookie", format!("a=1; sidegate_session={own}; b=\"2\"")).header("x_sid", "spoofed");
        request.header("mcp-session-id", &own).header("x-sid", "spoofed")
    };
    let (head, _) = ask(&layer, request()).await;
    let mut fields: Vec<_> =
        head.headers.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
    fields.sort_unstable();
    assert_eq!(fields, [("cookie", "a=1; b=\"2\""), ("x-sid", &*own)]);
    assert_eq!(head.extensions.get::<Session>().unwrap().id.len(), 64);
    assert!(!format!("{head:?}").contains(&own), "it is marked as sensitive");

    let layer = setup.layer(json!({ "header": "mcp-session-id", "upstream_header": "off", "forward": true }));
    let (head, _) = ask(&layer, request()).await;
    assert_eq!(head.headers["cookie"], format!("a=1; sidegate_session={own}; b=\"2\""));
    assert!(head.headers["mcp-session-id"] == own && head.headers["x-sid"] == "spoofed");
}

#[tokio::test]
async fn the_cookie_is_given_again_when_half_of_its_time_is_over() {
    let layer = Setup::new().layer(json!({ "ttl": "1h" }));
    let (own, at) = given(&ask(&layer, get()).await).unwrap();
    assert!(unix_now() - at < 10);
    let again = async |given_at: u64| given(&ask(&layer, of(&format!("{own}.{given_at:x}"))).await);
    assert_eq!(again(at - 1700).await, None);
    assert_eq!(again(at + 60).await, None, "another replica's clock");
    for stale in [at - 1800, at + 4000, 0] {
        let (id, new) = again(stale).await.unwrap();
        assert!(id == own && new >= at, "{stale}");
    }
    assert_eq!(given(&ask(&layer, of(&own)).await).unwrap().0, own, "without a time");
    let by_field = Setup::new().layer(json!({ "header": "x-session-id", "cookie": "off" }));
    let first = ask(&by_field, get()).await;
    let next = ask(&by_field, get().header("x-session-id", id(&first))).await;
    assert!(given(&first).is_none() && !next.1.contains_key("x-session-id"), "a field is told once");
}

#[tokio::test]
async fn what_the_backend_says_about_caches_and_cookies_stands() {
    let layer = Setup::new().layer(json!({}));
    let answer = answered(&layer, get(), &[("cache-control", "no-cache"), ("set-cookie", "a=b")]).await;
    assert_eq!(answer.1[CACHE_CONTROL], "no-cache");
    let cookies: Vec<_> = answer.1.get_all(SET_COOKIE).iter().map(|value| value.to_str().unwrap()).collect();
    assert!(cookies[0] == "a=b" && cookies[1].starts_with("sidegate_session=") && cookies.len() == 2, "{cookies:?}");
}

#[tokio::test]
async fn an_error_tells_a_new_session_too() {
    let setup = Setup::new();
    let layer = setup.layer(json!({}));
    let fails = || {
        service_fn(|_: http::Request<Body>| async {
            Err::<http::Response<Body>, BoxError>(
                Error::from(Kind::Overloaded).with_retry_after(Duration::from_secs(3)).into(),
            )
        })
    };
    let error = layer.layer(fails()).oneshot(get().body(Body::empty()).unwrap()).await.unwrap_err();
    let error = Error::find(&*error).unwrap();
    assert_eq!((error.kind(), error.retry_after()), (Kind::Overloaded, Some(Duration::from_secs(3))));
    let [(name, cookie)] = error.fields() else { panic!("{:?}", error.fields()) };
    assert_eq!(name, SET_COOKIE);
    let known = cookie.to_str().unwrap().split(';').next().unwrap();
    let error =
        layer.layer(fails()).oneshot(get().header("cookie", known).body(Body::empty()).unwrap()).await.unwrap_err();
    assert!(Error::find(&*error).unwrap().fields().is_empty());
}

#[tokio::test]
async fn who_is_refused_begins_no_session() {
    let setup = Setup::new();
    let layer = setup.layer(json!({ "header": "x-sid" }));
    let ask = async |kind: Kind, request: http::request::Builder| {
        let fails = service_fn(move |_: http::Request<Body>| async move {
            Err::<http::Response<Body>, BoxError>(Error::from(kind).into())
        });
        let error = layer.layer(fails).oneshot(request.body(Body::empty()).unwrap()).await.unwrap_err();
        Error::find(&*error).unwrap().fields().len()
    };
    for refused in [Kind::RateLimited, Kind::RateLimitUnavailable, Kind::BodyTooLarge] {
        assert_eq!(ask(refused, get()).await, 0, "{refused:?}");
        assert_eq!(ask(refused, of("00112233445566778899aabbccddeeff")).await, 0, "{refused:?}");
    }
    let kept = async || setup.state.list(None, Which::All, 10).await.unwrap().found.len();
    assert_eq!((kept().await, setup.count("new"), setup.count("unknown")), (0, 0, 0));
    let (own, at) = given(&super::tests::ask(&layer, get()).await).unwrap();
    let stale = of(&format!("{own}.{:x}", at - 80_000));
    assert_eq!(ask(Kind::RateLimited, stale).await, 1, "who has one keeps it");
    assert_eq!((kept().await, setup.count("known")), (1, 1));
}

#[tokio::test]
async fn a_cookie_that_came_over_tls_stays_there() {
    let layer = Setup::new().layer(json!({}));
    for tls in [false, true] {
        let connection = Connection::new(Peer::Unix, tls);
        let (_, headers) = ask(&layer, get().extension(connection)).await;
        assert_eq!(headers[SET_COOKIE].to_str().unwrap().contains("; Secure;"), tls);
    }
}

#[tokio::test(start_paused = true)]
async fn operators_see_digests_and_can_end_what_they_see() {
    let setup = Setup::new();
    let layer = setup.layer(json!({}));
    let alices = id(&ask(&layer, by(get(), "alice")).await);
    let bobs = id(&ask(&layer, by(get(), "bob")).await);
    let nobodys = ask(&layer, get()).await;
    let list = async |which| setup.state.list(None, which, 10).await.unwrap().found;
    assert_eq!(list(Which::All).await.len(), 3);
    let of_alice = list(Which::Principal("alice")).await;
    assert_eq!((of_alice.len(), of_alice[0].principal.as_deref()), (1, Some("alice")));
    assert!(of_alice[0].created.abs_diff(unix_now()) < 10);
    let some = setup.state.list(None, Which::All, 2).await.unwrap();
    assert_eq!((some.found.len(), some.complete), (2, false));

    let short = nobodys.0.extensions.get::<Session>().unwrap().short().to_owned();
    assert_eq!(setup.state.revoke(None, Which::Id(&short)).await.unwrap().found, 1);
    assert_ne!(id(&ask(&layer, of(&id(&nobodys))).await), id(&nobodys));
    ask(&layer, by(get(), "alice by")).await;
    for (whose, found) in [("alice", 2), ("alice by", 1), ("alice b", 0), ("ali", 0)] {
        assert_eq!(list(Which::Principal(whose)).await.len(), found, "{whose}");
    }
    assert_eq!(setup.state.revoke(None, Which::Principal("alice")).await.unwrap().found, 2);
    assert_ne!(id(&ask(&layer, by(of(&alices), "alice")).await), alices);
    assert_eq!(id(&ask(&layer, by(of(&bobs), "bob")).await), bobs);
    let shown = format!("{:?}{:?}", list(Which::All).await, setup.state);
    assert!(!shown.contains(&bobs));
}
