//! One raw end of a connection, client's or backend's: sends exactly what it is told, shows exactly what arrives.

use std::{fmt, io, net::SocketAddr};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};

use super::within;

/// One end of a connection.
pub struct Wire<S = TcpStream> {
    stream: S,
    unread: Vec<u8>,
}

/// How the other end was done with a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// It closed its side in order.
    Fin,
    /// It tore the connection down.
    Reset,
}

/// The start line and the fields of a message, in their order and with their bytes.
#[derive(Clone)]
pub struct Head {
    /// The request line or status line.
    pub start: String,
    /// Names in lower case, values as they came.
    pub fields: Vec<(String, String)>,
}

/// A whole message.
#[derive(Debug, Clone)]
pub struct Message {
    pub head: Head,
    pub body: Vec<u8>,
    pub trailers: Vec<(String, String)>,
}

/// Where the body of a message ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    None,
    Length(usize),
    Chunked,
    Close,
}

impl Wire {
    /// Connects to `address`.
    pub async fn to(address: SocketAddr) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await.expect("the listener takes connections");
        stream.set_nodelay(true).unwrap();
        Self::new(stream)
    }

    /// Sends `request` over a connection of its own and reads the answer to it.
    pub async fn ask(address: SocketAddr, request: impl AsRef<[u8]>) -> Message {
        let mut wire = Self::to(address).await;
        wire.send(request).await;
        wire.answer().await
    }

    /// Leaves: in order, or with a reset in which the other end sees no end.
    pub fn leave(self, reset: bool) {
        if reset {
            self.stream.set_zero_linger().unwrap();
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Wire<S> {
    pub fn new(stream: S) -> Self {
        Self { stream, unread: Vec::new() }
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        self.try_send(bytes).await.expect("the other end takes bytes");
    }

    /// As [`send`](Self::send), where the other end may have gone.
    pub async fn try_send(&mut self, bytes: impl AsRef<[u8]>) -> io::Result<()> {
        within("the other end to take bytes", async {
            self.stream.write_all(bytes.as_ref()).await?;
            self.stream.flush().await
        })
        .await
    }

    /// Closes this side; the other may still send.
    pub async fn finish(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// Reads once; whether anything came.
    async fn more(&mut self) -> io::Result<bool> {
        let before = self.unread.len();
        self.stream.read_buf(&mut self.unread).await?;
        Ok(self.unread.len() > before)
    }

    /// The bytes that are there, at least one.
    pub async fn arrival(&mut self) -> Vec<u8> {
        if self.unread.is_empty() {
            let more = within("bytes", self.more()).await.expect("no reset while bytes are awaited");
            assert!(more, "the connection ended while bytes were awaited");
        }
        std::mem::take(&mut self.unread)
    }

    /// The next `count` bytes.
    pub async fn exactly(&mut self, count: usize) -> Vec<u8> {
        within("bytes", async {
            while self.unread.len() < count {
                let more = self.more().await.expect("no reset while bytes are awaited");
                assert!(more, "{count} bytes were awaited, but the connection ended after: {}", text(&self.unread));
            }
        })
        .await;
        self.unread.drain(..count).collect()
    }

    /// The next line, without its end, which must be CR LF.
    async fn line(&mut self) -> String {
        within("a line", async {
            loop {
                if let Some(at) = self.unread.iter().position(|&byte| byte == b'\n') {
                    let mut line: Vec<u8> = self.unread.drain(..=at).collect();
                    assert!(line.ends_with(b"\r\n"), "a line ends with a bare LF: {}", text(&line));
                    line.truncate(line.len() - 2);
                    return text(&line);
                }
                let more = self.more().await.expect("no reset while a line is awaited");
                assert!(more, "the connection ended while a line was awaited, after: {}", text(&self.unread));
            }
        })
        .await
    }

    /// Reads fields up to the empty line behind them.
    async fn fields(&mut self) -> Vec<(String, String)> {
        let mut fields = Vec::new();
        loop {
            let line = self.line().await;
            if line.is_empty() {
                return fields;
            }
            let (name, value) = line.split_once(':').unwrap_or_else(|| panic!("a field without a colon: {line}"));
            fields.push((name.to_ascii_lowercase(), value.trim_matches([' ', '\t']).to_owned()));
        }
    }

    /// Reads up to the end of a head, and no further.
    pub async fn head(&mut self) -> Head {
        let start = self.line().await;
        let fields = self.fields().await;
        Head { start, fields }
    }

    /// The next chunk of a chunked body; `None` for the last one, whose trailers are left to be read.
    pub async fn chunk(&mut self) -> Option<Vec<u8>> {
        let line = self.line().await;
        assert!(line.bytes().all(|byte| byte.is_ascii_hexdigit()), "a chunk's size and nothing else: {line}");
        let size = usize::from_str_radix(&line, 16).expect("a chunk's size");
        if size == 0 {
            return None;
        }
        let data = self.exactly(size).await;
        assert_eq!(self.exactly(2).await, b"\r\n", "after a chunk's data");
        Some(data)
    }

    async fn body(&mut self, framing: Framing) -> (Vec<u8>, Vec<(String, String)>) {
        match framing {
            Framing::None => (Vec::new(), Vec::new()),
            Framing::Length(length) => (self.exactly(length).await, Vec::new()),
            Framing::Close => (self.rest().await.0, Vec::new()),
            Framing::Chunked => {
                let mut body = Vec::new();
                while let Some(chunk) = self.chunk().await {
                    body.extend(chunk);
                }
                (body, self.fields().await)
            }
        }
    }

    /// A whole response to a request that was not HEAD.
    pub async fn answer(&mut self) -> Message {
        let head = self.head().await;
        let (body, trailers) = self.body(head.response_framing()).await;
        Message { head, body, trailers }
    }

    /// A whole request. Panics where two readers could see different requests in the same bytes.
    pub async fn request(&mut self) -> Message {
        let head = self.head().await;
        let (body, trailers) = self.body(head.request_framing()).await;
        Message { head, body, trailers }
    }

    /// Whether another message begins; `false` when the connection ends instead.
    pub async fn another(&mut self) -> bool {
        !self.unread.is_empty() || matches!(self.more().await, Ok(true))
    }

    /// All bytes until the connection ends, and how it ended.
    pub async fn rest(&mut self) -> (Vec<u8>, Ending) {
        let ending = within("the end of the connection", async {
            loop {
                match self.more().await {
                    Ok(true) => {}
                    Ok(false) => return Ending::Fin,
                    // TLS without a close_notify is an end that anyone could have made.
                    Err(_) => return Ending::Reset,
                }
            }
        })
        .await;
        (std::mem::take(&mut self.unread), ending)
    }

    /// How the connection ends; nothing may arrive before.
    pub async fn ended(&mut self) -> Ending {
        let (rest, ending) = self.rest().await;
        assert!(rest.is_empty(), "bytes before the end: {}", text(&rest));
        ending
    }
}

impl Head {
    /// The status code of a response.
    pub fn status(&self) -> u16 {
        let mut parts = self.start.split(' ');
        assert_eq!(parts.next(), Some("HTTP/1.1"), "{}", self.start);
        parts.next().and_then(|code| code.parse().ok()).expect("a status code")
    }

    /// The target of a request.
    pub fn target(&self) -> &str {
        self.start.split(' ').nth(1).expect("a target")
    }

    /// All values of a field, in their order.
    pub fn all(&self, name: &str) -> Vec<&str> {
        self.fields.iter().filter(|(known, _)| known == name).map(|(_, value)| &**value).collect()
    }

    /// The value of a field that stands there at most once.
    pub fn get(&self, name: &str) -> Option<&str> {
        let all = self.all(name);
        assert!(all.len() <= 1, "{name} stands there {} times: {self:?}", all.len());
        all.first().copied()
    }

    fn request_framing(&self) -> Framing {
        let framing = self.framing();
        assert_ne!(self.all("host").len(), 0, "a request without Host: {self:?}");
        assert_eq!(self.all("host").len(), 1, "two Hosts: {self:?}");
        framing.unwrap_or(Framing::None)
    }

    fn response_framing(&self) -> Framing {
        match self.status() {
            100..=199 | 204 | 304 => Framing::None,
            _ => self.framing().unwrap_or(Framing::Close),
        }
    }

    fn framing(&self) -> Option<Framing> {
        match (&*self.all("content-length"), &*self.all("transfer-encoding")) {
            ([], []) => None,
            ([length], []) => {
                assert!(length.bytes().all(|byte| byte.is_ascii_digit()), "{self:?}");
                Some(Framing::Length(length.parse().unwrap()))
            }
            ([], ["chunked"]) => Some(Framing::Chunked),
            _ => panic!("more than one framing: {self:?}"),
        }
    }
}

impl fmt::Debug for Head {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.start)?;
        self.fields.iter().try_for_each(|(name, value)| writeln!(f, "{name}: {value}"))
    }
}

impl Message {
    pub fn status(&self) -> u16 {
        self.head.status()
    }

    pub fn text(&self) -> String {
        text(&self.body)
    }

    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("no JSON ({error}): {}", self.text()))
    }
}

/// Bytes one to one as characters, so that none is lost in a message.
fn text(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => bytes.iter().map(|&byte| char::from(byte)).collect(),
    }
}
