//! A route: which requests go where, and which policies hold for them. An entry of `routes`, and the section `defaults`.

use std::mem;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    config::Toggle,
    layers::{
        auth, body_limit, cache, concurrency, cors, errors, fallback, rate_limit, retry, security_headers, session,
        timeouts,
    },
    route::Match,
};

/// What holds for requests. Section `defaults`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Defaults {
    /// Headers that tell browsers to be careful. Default: the preset `api`; `off` sets and removes none.
    pub security_headers: Toggle<security_headers::Config>,
    /// Who may call. Default `off`: anybody.
    pub auth: Toggle<auth::Config>,
    /// Which pages of other origins may use the API. Default `off`: what the backend says about it is passed on.
    pub cors: Toggle<cors::Config>,
    /// Which requests belong together. Default `off`: sidegate makes no sessions.
    pub session: Toggle<session::Config>,
    /// How long sidegate waits, for what.
    pub timeouts: timeouts::Config,
    /// How large a request's body may be. Default `off`.
    pub body_limit: Toggle<body_limit::Config>,
    /// How much each may use. Default `off`.
    pub rate_limit: Toggle<rate_limit::Config>,
    /// Which answers are kept and given again. Default `off`.
    pub cache: Toggle<cache::Config>,
    /// How many requests of a route may be in flight, and how many may wait. Each route counts its own. Default `off`.
    pub concurrency: Toggle<concurrency::Config>,
    /// The upstreams that step in where the route's own failed, in this order: a list, or a section with the list in
    /// `to`. Default `off`.
    pub fallback: Toggle<fallback::Config>,
    /// When a request is sent again that its upstream failed to serve. Default `off`.
    pub retry: Toggle<retry::Config>,
    /// The form of sidegate's own errors: `problem` or `openai`. Default `problem`.
    pub errors: errors::Config,
}

impl Default for Defaults {
    fn default() -> Self {
        Self {
            security_headers: Toggle::On(security_headers::Config::default()),
            auth: Toggle::Off,
            cors: Toggle::Off,
            session: Toggle::Off,
            timeouts: timeouts::Config::default(),
            body_limit: Toggle::Off,
            rate_limit: Toggle::Off,
            cache: Toggle::Off,
            concurrency: Toggle::Off,
            fallback: Toggle::Off,
            retry: Toggle::Off,
            errors: errors::Config::default(),
        }
    }
}

/// Which requests go where, and what holds for them. An entry of `routes`.
#[derive(Debug, Clone, PartialEq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Route {
    /// What logs and metrics call it, 1 to 100 characters. Default: its match in words, as in
    /// `POST /v1/chat/completions`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Which requests. Default: all that no other route matches.
    #[serde(default, rename = "match")]
    pub matches: Match,
    /// The upstream that they go to, by its name.
    pub upstream: String,
    /// Instead of `defaults.security_headers`; `off` sets and removes none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub security_headers: Option<Toggle<security_headers::Config>>,
    /// Instead of `defaults.auth`; `off` lets anybody in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auth: Option<Toggle<auth::Config>>,
    /// Instead of `defaults.cors`; `off` leaves it to the backend.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cors: Option<Toggle<cors::Config>>,
    /// Instead of `defaults.session`; `off` makes no sessions.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub session: Option<Toggle<session::Config>>,
    /// Instead of `defaults.timeouts`, without `client_header` and `keepalive`; `off` waits for ever.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeouts: Option<Toggle<timeouts::Config>>,
    /// Instead of `defaults.body_limit`; `off` sets none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub body_limit: Option<Toggle<body_limit::Config>>,
    /// Instead of `defaults.rate_limit`; `off` sets no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub rate_limit: Option<Toggle<rate_limit::Config>>,
    /// Instead of `defaults.cache`; `off` keeps no answers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cache: Option<Toggle<cache::Config>>,
    /// Instead of `defaults.concurrency`; `off` sets no limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<Toggle<concurrency::Config>>,
    /// Instead of `defaults.fallback`; `off` leaves failures to the route's own upstream.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fallback: Option<Toggle<fallback::Config>>,
    /// Instead of `defaults.retry`; `off` sends every request once.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry: Option<Toggle<retry::Config>>,
    /// Instead of `defaults.errors`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub errors: Option<errors::Config>,
}

impl Route {
    /// Everything, to `upstream`.
    pub(super) fn to(upstream: &str) -> Self {
        Self {
            name: None,
            matches: Match::default(),
            upstream: upstream.to_owned(),
            security_headers: None,
            auth: None,
            cors: None,
            session: None,
            timeouts: None,
            body_limit: None,
            rate_limit: None,
            cache: None,
            concurrency: None,
            fallback: None,
            retry: None,
            errors: None,
        }
    }

    /// The name in logs and metrics.
    #[must_use]
    pub fn name(&self) -> String {
        self.name.clone().unwrap_or_else(|| self.matches.to_string())
    }

    /// What holds for the route: its own sections, and those of `defaults` where it has none.
    #[must_use]
    pub fn policies(&self, defaults: &Defaults) -> Defaults {
        let timeouts = match &self.timeouts {
            None => defaults.timeouts.clone(),
            Some(Toggle::On(own)) => own.clone(),
            Some(Toggle::Off) => timeouts::Config {
                client_body_idle: Toggle::Off,
                first_byte: Toggle::Off,
                idle: Toggle::Off,
                total: Toggle::Off,
                ..timeouts::Config::default()
            },
        };
        Defaults {
            security_headers: self.security_headers.as_ref().unwrap_or(&defaults.security_headers).clone(),
            auth: self.auth.as_ref().unwrap_or(&defaults.auth).clone(),
            cors: self.cors.as_ref().unwrap_or(&defaults.cors).clone(),
            session: self.session.as_ref().unwrap_or(&defaults.session).clone(),
            timeouts,
            body_limit: self.body_limit.unwrap_or(defaults.body_limit),
            rate_limit: self.rate_limit.as_ref().unwrap_or(&defaults.rate_limit).clone(),
            cache: self.cache.as_ref().unwrap_or(&defaults.cache).clone(),
            concurrency: self.concurrency.as_ref().unwrap_or(&defaults.concurrency).clone(),
            fallback: self.fallback.as_ref().unwrap_or(&defaults.fallback).clone(),
            retry: self.retry.as_ref().unwrap_or(&defaults.retry).clone(),
            errors: self.errors.unwrap_or(defaults.errors),
        }
    }

    /// Writes out that these `policies` hold for it. A `fixed` answer has no use for what mends failures.
    pub(super) fn complete(&mut self, policies: Defaults, fixed: bool) {
        let Defaults {
            security_headers,
            auth,
            cors,
            session,
            timeouts,
            body_limit,
            rate_limit,
            cache,
            concurrency,
            fallback,
            retry,
            errors,
        } = policies;
        *self = Self {
            name: Some(self.name()).filter(|name| is_route_name(name)),
            matches: mem::take(&mut self.matches),
            upstream: mem::take(&mut self.upstream),
            security_headers: Some(security_headers),
            auth: Some(auth),
            cors: Some(cors),
            session: Some(session),
            timeouts: Some(Toggle::On(timeouts)),
            body_limit: Some(body_limit),
            rate_limit: Some(rate_limit),
            cache: Some(cache),
            concurrency: Some(concurrency),
            fallback: Some(if fixed { Toggle::Off } else { fallback }),
            retry: Some(if fixed { Toggle::Off } else { retry }),
            errors: Some(errors),
        };
    }
}

pub(super) fn is_route_name(name: &str) -> bool {
    (1..=100).contains(&name.chars().count()) && !name.chars().any(char::is_control)
}
