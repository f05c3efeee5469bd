//! Three of sidegate's layers around an axum `Router`, without the rest of sidegate.
//!
//! ```text
//! cargo run --example axum
//! curl -i http://127.0.0.1:3000/            # an x-request-id and the security headers
//! curl -i http://127.0.0.1:3000/slow        # 504 after a second, as problem JSON
//! ```

use std::time::Duration;

use axum::{Router, routing::get};
use sidegate::layers::{
    errors::ErrorsLayer,
    request_id::{Config as RequestId, RequestIdLayer},
    security_headers::{Config as SecurityHeaders, SecurityHeadersLayer},
    timeouts::FirstByteLayer,
};
use tower::ServiceBuilder;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::io::Result<()> {
    let layers = ServiceBuilder::new()
        .layer(RequestIdLayer::new(&RequestId::default()))
        .layer(SecurityHeadersLayer::new(&SecurityHeaders::default()))
        .layer(ErrorsLayer::default())
        .layer(FirstByteLayer::new(Duration::from_secs(1)));
    let app = Router::new()
        .route("/", get(|| async { "hello\n" }))
        .route("/slow", get(std::future::pending::<&'static str>))
        .layer(layers);
    let listener = tokio::net::TcpListener::bind("127.0.0.1:3000").await?;
    axum::serve(listener, app).await
}
