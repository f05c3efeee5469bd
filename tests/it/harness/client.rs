//! Clients over HTTP/2: one that behaves, and one that sends any frame.

use std::net::SocketAddr;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt;
use hyper::{body::Incoming, client::conn::http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
    task::JoinSet,
};

use super::{
    Wire,
    backend::{BodySender, TestBody, body},
    within,
};

/// A client over HTTP/2. Dropped, it closes its connection.
pub struct Http2Client {
    requests: http2::SendRequest<TestBody>,
    _connection: JoinSet<()>,
}

impl Http2Client {
    /// Connects without TLS, knowing that the other end speaks HTTP/2.
    pub async fn to(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Self::over(stream).await
    }

    pub async fn over(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Self {
        let (requests, connection) = within(
            "the HTTP/2 handshake",
            http2::Builder::new(TokioExecutor::new()).timer(TokioTimer::new()).handshake(TokioIo::new(stream)),
        )
        .await
        .unwrap();
        let mut task = JoinSet::new();
        task.spawn(async move {
            connection.await.ok();
        });
        Self { requests, _connection: task }
    }

    /// Sends a request without a body.
    pub async fn ask(&self, head: Request<()>) -> Response<Incoming> {
        let (sender, answer) = self.begin(head);
        sender.finish();
        within("an answer", answer).await.expect("an answer")
    }

    pub async fn get(&self, path: &str) -> Response<Incoming> {
        self.ask(Request::get(format!("http://sidegate.test{path}")).body(()).unwrap()).await
    }

    /// Begins a request; its body follows through the sender, its answer comes from the future. Both dropped,
    /// the request is cancelled.
    pub fn begin(
        &self,
        head: Request<()>,
    ) -> (BodySender, impl Future<Output = hyper::Result<Response<Incoming>>> + use<>) {
        let (sender, body) = body();
        let mut requests = self.requests.clone();
        let head = head.map(|()| body);
        (sender, async move {
            requests.ready().await?;
            requests.send_request(head).await
        })
    }
}

/// The next data of a body; `None` at its end.
pub async fn data(body: &mut Incoming) -> Option<Bytes> {
    loop {
        match within("a frame", body.frame()).await? {
            Ok(frame) => {
                if let Ok(data) = frame.into_data()
                    && !data.is_empty()
                {
                    return Some(data);
                }
            }
            Err(error) => panic!("the body broke off: {error:?}"),
        }
    }
}

/// A connection on which the test writes HTTP/2 frames itself: for requests that no library would send.
pub struct RawHttp2(Wire);

/// A frame as it came (RFC 9113 §4.1).
#[derive(Debug)]
pub struct RawFrame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
    pub payload: Vec<u8>,
}

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const PING: u8 = 6;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;

impl RawHttp2 {
    pub async fn to(address: SocketAddr) -> Self {
        let mut wire = Wire::to(address).await;
        wire.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00").await;
        Self(wire)
    }

    /// Sends the head of a request on stream 1, without Huffman coding or indexing, so that every byte is the test's.
    pub async fn request(&mut self, fields: &[(&[u8], &[u8])], end_stream: bool) {
        let mut block = Vec::new();
        for (name, value) in fields {
            block.push(0); // literal, without indexing, new name (RFC 7541 §6.2.2)
            for string in [name, value] {
                block.push(u8::try_from(string.len()).ok().filter(|length| *length < 127).expect("a short string"));
                block.extend(*string);
            }
        }
        self.send(HEADERS, 4 | u8::from(end_stream), 1, &block).await;
    }

    pub async fn send(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
        let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend(stream.to_be_bytes());
        frame.extend(payload);
        self.0.try_send(frame).await.ok();
    }

    /// The server's end of a connection that the test has accepted.
    pub async fn serving(mut wire: Wire) -> Self {
        wire.exactly(24).await;
        wire.send(b"\x00\x00\x00\x04\x00\x00\x00\x00\x00").await;
        Self(wire)
    }

    /// The next frame of stream 1, or a GOAWAY. SETTINGS are acknowledged, others passed over.
    pub async fn frame(&mut self) -> RawFrame {
        self.frame_of(1).await
    }

    /// As [`frame`](Self::frame), of another stream.
    pub async fn frame_of(&mut self, wanted: u32) -> RawFrame {
        loop {
            let head = self.0.exactly(9).await;
            let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
            let stream = u32::from_be_bytes([head[5], head[6], head[7], head[8]]);
            let frame = RawFrame { kind: head[3], flags: head[4], stream, payload: self.0.exactly(length).await };
            if frame.kind == 4 && frame.flags == 0 {
                self.send(4, 1, 0, &[]).await;
            }
            if frame.stream == wanted && frame.kind != 8 || frame.kind == GOAWAY {
                return frame;
            }
        }
    }
}

impl RawHttp2 {
    /// Begins `count` requests and resets each at once (CVE-2023-44487).
    pub async fn storm(&mut self, count: u32) {
        let block = [&[0x82, 0x86, 0x84, 0x41, 1][..], b"a"].concat(); // GET, http, /, :authority a
        let mut frames = Vec::new();
        for stream in (0..count).map(|turn| 2 * turn + 1) {
            frames.extend([0, 0, u8::try_from(block.len()).unwrap(), HEADERS, 5]);
            frames.extend(stream.to_be_bytes());
            frames.extend(&block);
            frames.extend([0, 0, 4, RST_STREAM, 0]);
            frames.extend(stream.to_be_bytes());
            frames.extend(8u32.to_be_bytes()); // CANCEL
        }
        // The other end may have enough before the last.
        self.0.try_send(frames).await.ok();
    }

    /// Waits until the other end has closed the connection.
    pub async fn gone(mut self) {
        self.0.rest().await;
    }
}

impl RawFrame {
    /// The status of a response's head, where it stands in HPACK's static table (RFC 7541 appendix A).
    pub fn status(&self) -> Option<u16> {
        assert_eq!(self.kind, HEADERS);
        [200, 204, 206, 304, 400, 404, 500].get(usize::from(self.payload[0].checked_sub(0x88)?)).copied()
    }
}
