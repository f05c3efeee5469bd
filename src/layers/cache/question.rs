//! What a request asks: whether the cache has a part in it, and under which key its answer is.

use std::{pin::Pin, sync::LazyLock};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderName,
    header::{CONTENT_ENCODING, CONTENT_TYPE, EXPECT, HOST, IF_MATCH, IF_NONE_MATCH, IF_UNMODIFIED_SINCE, RANGE},
    request::Parts,
    uri::Authority,
};
use http_body::{Body as HttpBody, Frame};
use ring::digest::SHA256;

use super::{
    canonical,
    config::{Config, Method},
    directives::Request as Directives,
    hub::clock,
    key::{self, Asks, Key, Keys},
    left::Owner,
    purge::Purges,
    resume::{LAST_EVENT_ID, Whose},
    status::Forward,
    stored::Stored,
    vary,
};
use crate::{
    message::{Body, BoxError, Principal, Request, Session, headers::CREDENTIALS, json},
    telemetry::Exchange,
};

/// The fields by which a backend may know who asks: credentials, and what proxies before us say of who that is.
static IDENTITIES: LazyLock<Vec<HeaderName>> = LazyLock::new(|| {
    let more = [
        "x-auth-token",
        "x-access-token",
        "x-session-token",
        "x-session-id",
        "mcp-session-id",
        "x-amz-security-token",
        "x-amzn-oidc-accesstoken",
        "x-amzn-oidc-data",
        "x-amzn-oidc-identity",
        "cf-access-jwt-assertion",
        "x-goog-iap-jwt-assertion",
        "x-ms-client-principal",
        "x-forwarded-user",
        "x-forwarded-email",
        "x-remote-user",
        "remote-user",
        "x-user-id",
    ];
    CREDENTIALS.into_iter().chain(more.map(HeaderName::from_static)).collect()
});

/// Fields by which some backends take a request for another one than it says it is.
const OVERRIDES: [HeaderName; 5] = [
    HeaderName::from_static("x-http-method-override"),
    HeaderName::from_static("x-http-method"),
    HeaderName::from_static("x-method-override"),
    HeaderName::from_static("x-original-url"),
    HeaderName::from_static("x-rewrite-url"),
];

/// What the cache is for a request.
pub(super) enum Part {
    /// It looks for an answer.
    Look,
    /// It has no part in it.
    None(Forward, Option<&'static str>),
    /// It drops what the request changes.
    Drop,
}

impl Part {
    /// What it is by the head.
    pub(super) fn of(head: &Parts, config: &Config) -> Self {
        let is_kept = match head.method {
            http::Method::GET | http::Method::HEAD => config.methods.contains(&Method::Get),
            http::Method::POST => config.methods.contains(&Method::Post),
            _ => false,
        };
        if !is_kept {
            return if head.method.is_safe() { Self::None(Forward::Method, None) } else { Self::Drop };
        }
        let has = |name: HeaderName| head.headers.contains_key(name);
        if head.headers.keys().any(|name| OVERRIDES.contains(name)) {
            return Self::None(Forward::Bypass, Some("override"));
        }
        let posts = head.method == http::Method::POST;
        if has(IF_MATCH) || has(IF_UNMODIFIED_SINCE) || posts && has(IF_NONE_MATCH) {
            return Self::None(Forward::Bypass, Some("precondition"));
        }
        // Where it says nothing, backends take it for JSON, or for nothing at all: the key makes a difference.
        let silent = || !has(CONTENT_TYPE) && !has(CONTENT_ENCODING);
        if posts && !silent() && !json::is_json(&head.headers) {
            return Self::None(Forward::Bypass, Some("body-not-json"));
        }
        // The rest of a stream is not what another one gets, who begins it.
        if has(LAST_EVENT_ID) {
            return Self::None(Forward::Bypass, Some("last-event-id"));
        }
        Self::Look
    }
}

/// A question.
pub(super) struct Question {
    pub(super) head: Parts,
    pub(super) body: Bytes,
    pub(super) primary: Key,
    pub(super) asked: Directives,
    /// Why the answer is not kept, nor given from what is.
    pub(super) bypass: Option<&'static str>,
    /// The key of what is for the one who asks alone, where that can be taken up again.
    pub(super) own: Option<Key>,
    /// Who that is.
    pub(super) owner: Owner,
    /// The last purge before it was asked, and when that was.
    pub(super) since: (u64, u64),
}

impl Question {
    /// The key of the answer for it, if answers vary by these fields of requests.
    pub(super) fn variant(&self, vary: &[HeaderName]) -> Key {
        if vary.is_empty() { self.primary } else { self.primary.with_vary(vary, &self.head.headers) }
    }

    /// Whether a stream is the one of who asks it, whose own key is this.
    pub(super) fn has(&self, own: Key, whose: &Whose) -> bool {
        match whose {
            Whose::All { key, vary } => self.variant(vary) == *key,
            Whose::One(key) => own == *key,
        }
    }

    /// Whether what is stored under this key is the answer for it.
    pub(super) fn is_of(&self, stored: &Stored, key: Key) -> bool {
        matches!(vary::names(&stored.headers), vary::Names::Fields(vary) if self.variant(&vary) == key)
    }

    /// How much of a body is looked at. Of a `GET` nothing: where it has one, nobody knows what it means (RFC 9110
    /// §9.3.1).
    pub(super) fn most(head: &Parts, config: &Config) -> usize {
        if head.method == http::Method::POST { config.max_request_body.to_usize() } else { 0 }
    }

    /// The question of a request to this route; or, where its answer would be nobody's, the request, and why.
    #[expect(clippy::result_large_err, reason = "a request, and in most cases there is none")]
    pub(super) fn new(
        mut head: Parts,
        body: Bytes,
        route: &str,
        config: &Config,
        purges: &Purges,
    ) -> Result<Self, (Request, &'static str)> {
        let (host, https) = if config.ignore_host { ("", false) } else { host(&head) };
        let principal = head.extensions.get::<Principal>();
        let session = head.extensions.get::<Session>();
        let (mut digest, mut bypass) = (None, None);
        if head.method == http::Method::POST {
            let mut hash = ring::digest::Context::new(&SHA256);
            if let Err(why) = canonical::digest(&body, &config.body, &mut hash) {
                // What is not worth keeping is worth taking up again.
                if config.resume.is_off() || canonical::identity(&body, &config.body, &mut hash).is_err() {
                    return Err((Request::from_parts(head, body.into()), why.as_str()));
                }
                bypass = Some(why.as_str());
            }
            digest = Some(hash.finish());
        }
        let keys = Keys {
            scope: route,
            parts: &config.key,
            ignored: &config.ignore_query,
            credentials: &IDENTITIES,
            shared: config.shared,
        };
        let asks = Asks {
            method: &head.method,
            https,
            host,
            path: head.uri.path(),
            query: head.uri.query(),
            headers: &head.headers,
            principal: principal.map(|principal| &*principal.identity),
            tier: principal.and_then(|principal| principal.tier.as_deref()),
            session: session.map(|session| &*session.id),
            body: digest.as_ref().map(AsRef::as_ref),
        };
        let primary = keys.key(&asks);
        let can_resume =
            !config.resume.is_off() && head.method != http::Method::HEAD && !head.headers.contains_key(RANGE);
        let own = can_resume.then(|| if keys.shared { Keys { shared: false, ..keys }.key(&asks) } else { primary });
        let asked = if config.client_cache_control { Directives::of(&head.headers) } else { Directives::default() };
        let owner = if can_resume { Owner::of(&head) } else { Owner::Unknown };
        // The body has come, and is at hand.
        head.headers.remove(EXPECT);
        Ok(Self { head, body, primary, asked, bypass, own, owner, since: (purges.now(), clock()) })
    }
}

/// The authority that a request is for, or nothing, and whether it came by `https`.
fn host(head: &Parts) -> (&str, bool) {
    let https = head.extensions.get::<Exchange>().is_some_and(|exchange| exchange.facts().https);
    let sent = || head.headers.get(HOST).and_then(|host| host.to_str().ok());
    (head.uri.authority().map(Authority::as_str).or_else(sent).unwrap_or_default(), https)
}

/// The authority, in the form that [`key::authority`] gives it.
pub(super) fn origin(head: &Parts) -> String {
    let (host, https) = host(head);
    key::authority(host, https).into_owned()
}

/// All of a body; or, where it is longer than `most`, or has trailers, a body that is the same.
pub(super) async fn gather(mut body: Body, most: usize) -> Result<Result<Bytes, Body>, BoxError> {
    if body.is_end_stream() {
        return Ok(Ok(Bytes::new()));
    }
    if body.size_hint().lower() > most as u64 {
        return Ok(Err(body));
    }
    let mut whole = BytesMut::new();
    while let Some(frame) = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await {
        let frame = frame?;
        match frame.data_ref() {
            Some(data) if whole.len() + data.len() <= most => whole.extend_from_slice(data),
            _ => {
                let before = [Frame::data(whole.freeze()), frame];
                return Ok(Err(body.preceded(before)));
            }
        }
    }
    Ok(Ok(whole.freeze()))
}
