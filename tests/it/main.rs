//! End-to-end tests: the real binary between real sockets. See `harness` for what they stand on.
#![allow(missing_docs, unreachable_pub, clippy::unwrap_used, clippy::disallowed_methods, reason = "these are tests")]
#![allow(clippy::missing_panics_doc, clippy::must_use_candidate, reason = "nobody else calls these")]

mod harness;

mod assistant;
mod auth;
mod balance;
mod browser;
mod cache;
mod cache_flights;
mod cache_keys;
mod cache_redis;
mod cache_resume;
mod cache_resume_replicas;
mod cache_rfc9111;
mod cache_stale;
mod cache_streams;
mod circuit_breaker;
mod cli;
mod concurrency;
mod config;
mod content_generator;
mod cors;
mod demo;
mod drain;
mod errors;
mod fallback;
mod fastapi;
mod floors;
mod forwarded;
mod health;
mod publish;
mod rate_limit;
mod rate_limit_outage;
mod rate_limit_tokens;
mod redis;
mod reload;
mod resilience;
mod retry;
mod robustness;
mod routing;
mod secrets;
mod server;
mod session;
mod smuggling;
mod sse;
mod streaming;
mod telemetry;
mod transparency;
mod upgrade;
mod warm;
