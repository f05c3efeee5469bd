//! Backends and clients at their worst, alone and all at once: nothing hangs, nothing is mixed up, nothing is left over.

use rustix::process::Signal;

use crate::harness::{Backend, Proxy};

#[tokio::test(flavor = "multi_thread")]
async fn the_refusal_of_an_upload_arrives_although_the_backend_closes_on_it() {
    let backend = Backend::start().await;
    let proxy = Proxy::before(&backend.url(), "").await;
    let upload = vec![b'x'; 1 << 20];
    // It is a race between the answer and the reset behind it.
    for turn in 0..20 {
        let mut client = proxy.connect().await;
        let ask = async {
            client.send(format!("POST / HTTP/1.1\r\nhost: a\r\ncontent-length: {}\r\n\r\n", upload.len())).await;
            client.try_send(&upload).await.ok();
            client.answer().await
        };
        let refuse = async {
            let (mut upstream, _) = backend.accept_head().await;
            upstream.send("HTTP/1.1 413 Payload Too Large\r\ncontent-length: 2\r\n\r\nno").await;
            upstream.leave(true);
        };
        let (answer, ()) = tokio::join!(ask, refuse);
        assert_eq!((answer.status(), &*answer.text()), (413, "no"), "turn {turn}: {answer:?}");
    }
}

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
