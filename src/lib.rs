//! A reverse proxy of composable tower layers: the production manners that an LLM server or a FastAPI-style
//! API lacks, in front of it and without a change to it.
//!
//! The binary is the usual way to use sidegate; this library is the other. Each policy in [`layers`] is an
//! ordinary [`tower::Layer`] over [`http`] types, and works in an axum or hyper service of your own:
//!
//! ```
//! use std::time::Duration;
//! use http::{Request, Response};
//! use sidegate::layers::{errors::ErrorsLayer, request_id::RequestIdLayer, timeouts::FirstByteLayer};
//! use sidegate::message::Body;
//! use tower::{ServiceBuilder, ServiceExt, service_fn};
//!
//! # tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap().block_on(async {
//! let service = ServiceBuilder::new()
//!     .layer(RequestIdLayer::new(&Default::default()))
//!     .layer(ErrorsLayer::default())
//!     .layer(FirstByteLayer::new(Duration::from_secs(30)))
//!     .service(service_fn(|_: Request<Body>| async { Ok::<_, std::io::Error>(Response::new(Body::from("hello"))) }));
//!
//! let response = service.oneshot(Request::new(Body::empty())).await.unwrap();
//! assert!(response.headers().contains_key("x-request-id"));
//! # });
//! ```
//!
//! # The house
//!
//! Modules stand on floors, and import from floors below their own only:
//!
//! | floor | modules | |
//! |---|---|---|
//! | 0 | [`message`] | body, error, header and address primitives |
//! | 1 | [`config`], [`telemetry`], [`sse`] | loading and units; log, metrics, the record of an exchange; event streams |
//! | 2 | [`upstream`], [`store`] | endpoints and other kinds of upstream; Redis, and what stands in for it |
//! | 3 | [`layers`] | one module per policy |
//! | 4 | [`settings`], [`route`], [`registry`], [`stack`], [`admin`] | the whole configuration; which route takes a request; what outlives a reload; the request path; the operator's port |
//! | 5 | [`server`] | listeners, connections, drain, reload |
//! | 6 | [`cli`], [`demo`] | the command line |
//!
//! A layer that fails returns a boxed [`message::Error`] and does not answer; [`layers::errors`] alone makes a
//! response of it. What a layer finds out and another needs travels as a typed request extension, listed in
//! [`layers`].

#![cfg_attr(test, allow(clippy::disallowed_methods, reason = "tests may collect bodies and spawn tasks"))]

pub mod admin;
pub mod cli;
pub mod config;
pub mod demo;
pub mod layers;
pub mod message;
pub mod registry;
pub mod route;
pub mod server;
pub mod settings;
pub mod sse;
pub mod stack;
pub mod store;
pub mod telemetry;
pub mod upstream;
