//! Opens connections to an endpoint.

use std::{
    future::poll_fn,
    io::{
        self,
        ErrorKind::{BrokenPipe, ConnectionReset},
    },
    net::SocketAddr,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
};

use http::{
    Uri,
    uri::{Authority, Scheme},
};
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use tokio_rustls::TlsConnector;
use tower::Service;

use super::address::{Address, server_name};
use crate::message::BoxError;

/// A connection, of whatever kind: one type, so that hyper's client is compiled once.
pub(super) type Io = Box<dyn Stream>;

/// What a connection can do.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection whose failed writes leave the last word to its reads.
///
/// A server that refuses an upload answers and closes, with the rest of the upload unread; its kernel then sends a
/// reset. The answer lies in our socket already, but whoever writes first meets the reset and gives the connection up:
/// every third refusal of a large upload was lost like that. So what cannot be sent is dropped, and the next read
/// has the answer, or the failure.
pub(super) struct LastWord<S> {
    io: S,
    /// Why nothing can be sent any more.
    lost: Option<io::ErrorKind>,
    /// A read has had the last word.
    ended: bool,
}

impl<S> LastWord<S> {
    pub(super) fn new(io: S) -> Self {
        Self { io, lost: None, ended: false }
    }

    /// What a write came to.
    fn wrote(&mut self, polled: Poll<io::Result<usize>>, all: usize) -> Poll<io::Result<usize>> {
        match polled {
            Poll::Ready(Err(error)) if !self.ended && matches!(error.kind(), BrokenPipe | ConnectionReset) => {
                self.lost = Some(error.kind());
                Poll::Ready(Ok(all))
            }
            polled => polled,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for LastWord<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let read = ready!(Pin::new(&mut this.io).poll_read(cx, buf));
        this.ended = read.is_err() || buf.filled().len() == before;
        match this.lost {
            // The kernel has told the write of the reset, and tells the read of an end in order.
            Some(kind) if this.ended => Poll::Ready(Err(kind.into())),
            _ => Poll::Ready(read),
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for LastWord<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write(cx, buf);
        this.wrote(polled, buf.len())
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let polled = Pin::new(&mut this.io).poll_write_vectored(cx, bufs);
        this.wrote(polled, bufs.iter().map(|buf| buf.len()).sum())
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

/// A connection that counts how often something is heard over it; its end is nothing.
pub(super) struct Heard<S> {
    io: S,
    reads: Arc<AtomicU64>,
}

impl<S> Heard<S> {
    pub(super) fn new(io: S, reads: Arc<AtomicU64>) -> Self {
        Self { io, reads }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Heard<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.io).poll_read(cx, buf);
        if buf.filled().len() > before {
            this.reads.fetch_add(1, Ordering::Relaxed);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Heard<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().io).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().io).poll_shutdown(cx)
    }
}

/// Opens connections to one endpoint. Names are resolved anew for each, and of several addresses the first
/// that answers is taken (RFC 8305).
#[derive(Clone)]
pub(super) struct Connector {
    to: To,
}

#[derive(Clone)]
enum To {
    Tcp(HttpConnector, Uri, Option<Arc<Tls>>),
    Unix(Arc<std::path::PathBuf>),
}

struct Tls {
    connector: TlsConnector,
    name: ServerName<'static>,
}

impl Connector {
    /// To `address`, or to the one at `dial` that its name stands for, with TLS as `tls` says where the address asks for
    /// it.
    pub(super) fn new(
        address: &Address,
        dial: Option<SocketAddr>,
        tls: Option<ClientConfig>,
    ) -> Result<Self, BoxError> {
        let to = match address {
            Address::Unix(path) => To::Unix(path.clone()),
            Address::Tcp { authority, .. } => {
                let mut tcp = HttpConnector::new();
                tcp.set_nodelay(true);
                let to = match dial {
                    Some(dial) => dial.to_string().parse()?,
                    None => authority.clone(),
                };
                let uri = Uri::builder().scheme(Scheme::HTTP).authority::<Authority>(to).path_and_query("/");
                let tls = match tls {
                    None => None,
                    Some(config) => {
                        let name = server_name(authority)?;
                        Some(Arc::new(Tls { connector: Arc::new(config).into(), name }))
                    }
                };
                To::Tcp(tcp, uri.build()?, tls)
            }
        };
        Ok(Self { to })
    }

    /// A new connection. The caller bounds the wait.
    pub(super) async fn connect(&self) -> Result<Io, BoxError> {
        match &self.to {
            To::Unix(path) => Ok(Box::new(UnixStream::connect(path.as_path()).await?)),
            To::Tcp(tcp, uri, tls) => {
                let mut tcp = tcp.clone();
                poll_fn(|cx| tcp.poll_ready(cx)).await?;
                let stream = tcp.call(uri.clone()).await?.into_inner();
                match tls {
                    None => Ok(Box::new(stream)),
                    Some(tls) => Ok(Box::new(tls.connector.connect(tls.name.clone(), stream).await?)),
                }
            }
        }
    }
}

/// A TLS client that trusts `ca`, or else the system's roots, and offers `protocol` by ALPN.
///
/// # Errors
/// The file cannot be read or holds no certificate; the system has no roots.
pub(super) fn tls(ca: Option<&std::path::Path>, protocol: &[u8]) -> Result<ClientConfig, BoxError> {
    use rustls::pki_types::{CertificateDer, pem::PemObject};

    let mut roots = rustls::RootCertStore::empty();
    if let Some(path) = ca {
        let named = |error: &dyn std::fmt::Display| io::Error::other(format!("{}: {error}", path.display()));
        for certificate in CertificateDer::pem_file_iter(path).map_err(|error| named(&error))? {
            roots.add(certificate.map_err(|error| named(&error))?).map_err(|error| named(&error))?;
        }
        if roots.is_empty() {
            return Err(named(&"no PEM section `CERTIFICATE`").into());
        }
    } else {
        // Some of a system's roots are often odd; what matters is that others are not.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
    }
    if roots.is_empty() {
        return Err("there is no certificate to trust: name a file in `tls: {ca: PATH}`".into());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![protocol.to_vec()];
    Ok(config)
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[tokio::test]
    async fn what_was_answered_before_a_reset_is_read_and_its_end_is_none_in_order() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let mut io = LastWord::new(TcpStream::connect(listener.local_addr().unwrap()).await.unwrap());
        let (mut server, _) = listener.accept().await.unwrap();
        server.write_all(b"no").await.unwrap();
        server.set_zero_linger().unwrap();
        drop(server);

        while io.lost.is_none() {
            io.write_all(b"upload").await.expect("dropped");
        }
        let mut answer = Vec::new();
        assert!(io.read_to_end(&mut answer).await.is_err(), "nobody takes it for complete");
        assert_eq!(answer, b"no");
        assert!(io.write_all(b"more").await.is_err(), "now it is known");
    }
}
