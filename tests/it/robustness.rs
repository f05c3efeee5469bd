//! Backends and clients at their worst, alone and all at once: nothing hangs, nothing is mixed up, nothing is left over.

use rustix::process::Signal;

use crate::harness::Proxy;

#[tokio::test(flavor = "multi_thread")]
async fn a_file_that_does_not_answer_holds_up_no_end() {
    let proxy = Proxy::start("upstreams: { fixed: { respond: { text: x } } }").await;
    let file = proxy.path("sidegate.yaml");
    std::fs::remove_file(&file).unwrap();
    let made = tokio::process::Command::new("mkfifo").arg(&file).status().await;
    assert!(made.expect("mkfifo is there").success());
    proxy.signal(Signal::HUP);
    assert_eq!(proxy.get("/").await.text(), "x");
    // Dropped, it is asked to end, and must.
}
