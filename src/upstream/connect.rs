//! Opens connections to an endpoint.

use std::{future::poll_fn, io, sync::Arc};

use http::{Uri, uri::Scheme};
use hyper_util::client::legacy::connect::HttpConnector;
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};
use tokio_rustls::TlsConnector;
use tower::Service;

use super::Address;
use crate::message::BoxError;

/// A connection, of whatever kind: one type, so that hyper's client is compiled once.
pub(super) type Io = Box<dyn Stream>;

/// What a connection can do.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

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
    /// To `address`, with TLS as `tls` says where the address asks for it.
    pub(super) fn new(address: &Address, tls: Option<ClientConfig>) -> Result<Self, BoxError> {
        let to = match address {
            Address::Unix(path) => To::Unix(path.clone()),
            Address::Tcp { authority, .. } => {
                let mut tcp = HttpConnector::new();
                tcp.set_nodelay(true);
                let uri = Uri::builder().scheme(Scheme::HTTP).authority(authority.clone()).path_and_query("/");
                let tls = match tls {
                    None => None,
                    Some(config) => {
                        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
                        let name = ServerName::try_from(host.to_owned())?;
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
