//! What the tests stand on: the real proxy, backends that do as they are told, and clients that see every byte.
//!
//! Nothing here sleeps. Whoever waits, waits for a condition, and [`within`] bounds the wait.

pub mod backend;
pub mod client;
pub mod proxy;
pub mod python;
pub mod redis;
pub mod wire;

use std::{future::Future, io::Write, time::Duration};

pub use backend::Backend;
pub use proxy::Proxy;
pub use python::Fastapi;
pub use wire::{Ending, Head, Message, Wire};

/// How long anything may take before its test gives it up. Long, because it only passes when a test fails.
pub const PATIENCE: Duration = Duration::from_secs(15);

/// What `future` comes to; panics with `what` when that takes longer than [`PATIENCE`].
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    let output = tokio::time::timeout(PATIENCE, future).await;
    output.unwrap_or_else(|_| panic!("waited {PATIENCE:?} in vain for {what}"))
}

/// Asks `condition` until it holds. For what nobody announces, such as a figure under `/proc` or on the admin port.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    within(what, async {
        while !condition().await {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// Says a measured figure. Past libtest, which shows what passing tests print to nobody.
pub fn figure(text: &str) {
    std::io::stderr().write_all(format!("figure: {text}\n").as_bytes()).ok();
}

/// The file of `config/examples` of this name, with all of the first replaced by the second of each pair.
pub fn example(name: &str, changes: &[(&str, &str)]) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("config/examples").join(name);
    let mut text = std::fs::read_to_string(path).unwrap();
    for (from, to) in changes {
        assert!(text.contains(from), "{name} says `{from}`");
        text = text.replace(from, to);
    }
    text
}

/// A duration for people.
pub fn ms(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1000.0)
}
