//! TLS of a listener: rustls, with the certificate that the files hold now.
//!
//! The files are looked at every few seconds and at every reload. A pair that cannot be used (a half-written file, a
//! key of another certificate) changes nothing and is said once; connections that are open keep the certificate
//! that they began with. ALPN offers `h2`, then `http/1.1`.

use std::{fmt, fs, io, os::unix::fs::MetadataExt, sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use parking_lot::Mutex;
use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring},
    server::ProducesTickets,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tracing::{info, warn};

use super::connection::Socket;
use crate::settings::tls::{Config, Pems};

/// How often the files are looked at.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(5);

/// The TLS side of a listener.
pub(super) struct Tls {
    files: Config,
    provider: Arc<CryptoProvider>,
    /// Survives a new certificate, so that clients can resume their sessions.
    ticketer: Arc<dyn ProducesTickets>,
    current: ArcSwap<ServerConfig>,
    seen: Mutex<Seen>,
}

/// What was seen of the files at the last look.
#[derive(Debug, Default)]
struct Seen {
    stamps: [Option<Stamp>; 2],
    content: u64,
}

/// Device, inode, size, and time of modification: a look that reads nothing.
type Stamp = (u64, u64, u64, i64, i64);

impl Tls {
    /// Reads the files.
    pub(super) fn open(files: Config) -> io::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let ticketer = ring::Ticketer::new().map_err(io::Error::other)?;
        let stamps = stamps(&files);
        let (content, config) = Pems::read(&files)
            .and_then(|pems| Ok((pems.content(), pems.into_config(&files, &provider, &ticketer)?)))
            .map_err(|unusable| io::Error::new(io::ErrorKind::InvalidData, unusable))?;
        let (current, seen) = (ArcSwap::from_pointee(config), Mutex::new(Seen { stamps, content }));
        Ok(Self { files, provider, ticketer, current, seen })
    }

    /// Looks at the files, and takes their certificate if it is a new and usable one. Reads files: not to be called on
    /// a thread that serves.
    pub(super) fn look(&self) {
        let mut seen = self.seen.lock();
        let stamps = stamps(&self.files);
        if stamps == seen.stamps {
            return;
        }
        seen.stamps = stamps;
        let pems = match Pems::read(&self.files) {
            Ok(pems) => pems,
            Err(unusable) => return warn!(error = %unusable, "the old certificate stays"),
        };
        let content = pems.content();
        if content == seen.content {
            return;
        }
        seen.content = content;
        match pems.into_config(&self.files, &self.provider, &self.ticketer) {
            Ok(config) => {
                self.current.store(Arc::new(config));
                info!(certificate = %self.files.certificate.display(), "new certificate");
            }
            Err(unusable) => warn!(error = %unusable, "the old certificate stays"),
        }
    }

    /// Greets a client.
    pub(super) async fn accept(&self, socket: Socket) -> io::Result<TlsStream<Socket>> {
        TlsAcceptor::from(self.current.load_full()).accept(socket).await
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Tls").field("files", &self.files).finish_non_exhaustive()
    }
}

fn stamps(files: &Config) -> [Option<Stamp>; 2] {
    [&files.certificate, &files.key].map(|file| {
        // Follows links: Kubernetes swaps the link to a whole directory.
        let found = fs::metadata(file).ok()?;
        Some((found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
    })
}

#[cfg(test)]
mod tests {
    use rustls::{
        ClientConfig, RootCertStore,
        pki_types::{CertificateDer, ServerName},
    };
    use tokio::{
        io::AsyncWriteExt,
        net::{TcpListener, TcpStream},
    };
    use tokio_rustls::TlsConnector;

    use super::*;

    /// A directory with a certificate for `localhost` and its key.
    fn files() -> (tempfile::TempDir, Config) {
        let folder = tempfile::tempdir().unwrap();
        let files = Config { certificate: folder.path().join("tls.crt"), key: folder.path().join("tls.key") };
        write(&files);
        (folder, files)
    }

    /// Writes a new pair, and gives back its certificate.
    fn write(files: &Config) -> CertificateDer<'static> {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        fs::write(&files.certificate, made.cert.pem()).unwrap();
        fs::write(&files.key, made.signing_key.serialize_pem()).unwrap();
        made.cert.der().clone()
    }

    /// Whether a client that trusts only `certificate` is content with what `tls` shows, and the protocol chosen.
    async fn greets_with(tls: &Tls, certificate: CertificateDer<'static>, alpn: &[&str]) -> Option<Vec<u8>> {
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let mut config = ClientConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|name| name.as_bytes().to_vec()).collect();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let client = async {
            let stream = TcpStream::connect(address).await.unwrap();
            let name = ServerName::try_from("localhost").unwrap();
            let mut stream = TlsConnector::from(Arc::new(config)).connect(name, stream).await.ok()?;
            stream.shutdown().await.ok()?;
            Some(stream.get_ref().1.alpn_protocol().unwrap_or_default().to_vec())
        };
        let server = async { tls.accept(Socket::Tcp(listener.accept().await.unwrap().0)).await };
        tokio::join!(client, server).0
    }

    #[tokio::test]
    async fn the_client_chooses_http2_by_alpn() {
        let (_folder, files) = files();
        let certificate = write(&files);
        let tls = Tls::open(files).unwrap();
        assert_eq!(greets_with(&tls, certificate.clone(), &["http/1.1", "h2"]).await.as_deref(), Some(&b"h2"[..]));
        assert_eq!(greets_with(&tls, certificate, &[]).await.as_deref(), Some(&b""[..]));
    }

    #[tokio::test]
    async fn a_new_certificate_is_taken_and_a_bad_one_is_not() {
        let (_folder, files) = files();
        let tls = Tls::open(files.clone()).unwrap();
        let second = write(&files);
        assert!(greets_with(&tls, second.clone(), &[]).await.is_none(), "nobody has looked yet");
        tls.look();
        assert!(greets_with(&tls, second.clone(), &[]).await.is_some());

        fs::write(&files.key, "half a k").unwrap();
        tls.look();
        assert!(greets_with(&tls, second.clone(), &[]).await.is_some(), "the old pair stays");
        fs::remove_file(&files.certificate).unwrap();
        tls.look();
        assert!(greets_with(&tls, second, &[]).await.is_some(), "the old pair stays");
        let fourth = write(&files);
        tls.look();
        assert!(greets_with(&tls, fourth, &[]).await.is_some());
    }

    #[test]
    fn a_key_of_another_certificate_is_refused_with_the_reason() {
        let (_folder, files) = files();
        let (_other_folder, other) = super::tests::files();
        let error = Tls::open(Config { key: other.key, ..files }).unwrap_err().to_string();
        assert!(error.starts_with("no usable key in ") && error.contains("tls.key"), "{error}");
    }
}
