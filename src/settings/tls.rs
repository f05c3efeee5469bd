//! Section `tls` of an entry of `listen`: the files of a certificate, and what they are good for.
//!
//! The server serves what `Pems` makes of the files, and a check tries the same, so that no configuration passes
//! whose certificate would fail.

use std::{
    fmt,
    hash::{DefaultHasher, Hash, Hasher},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::ProducesTickets,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::{
    config::{
        file,
        problem::{Check, Problems, check_readable},
    },
    message::BoxError,
};

/// The certificate of a listener. Section `tls` of an entry of `listen`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "ListenerTls")]
pub struct Config {
    /// The certificate chain, PEM, the server's own first. Read again when it changes.
    pub certificate: PathBuf,
    /// Its private key, PEM: PKCS#8, PKCS#1 or SEC1. Read again when it changes.
    pub key: PathBuf,
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        let files = [("certificate", &self.certificate), ("key", &self.key)];
        let readable = files.map(|(key, file)| check_readable(key, file, problems));
        if readable != [true, true] {
            return;
        }
        let provider = Arc::new(ring::default_provider());
        let Ok(ticketer) = ring::Ticketer::new() else { return };
        if let Err(unusable) = Pems::read(self).and_then(|pems| pems.into_config(self, &provider, &ticketer)) {
            let key = if unusable.file == self.certificate { "certificate" } else { "key" };
            problems.add(key, unusable.to_string());
        }
    }
}

/// Why a certificate cannot be used.
#[derive(Debug)]
pub(crate) struct Unusable {
    what: &'static str,
    file: PathBuf,
    source: BoxError,
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // With its cause: this is read in a log or on a terminal, never by a client.
        write!(f, "{} {}: {}", self.what, self.file.display(), self.source)
    }
}

impl std::error::Error for Unusable {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(&*self.source)
    }
}

/// The contents of both files.
pub(crate) struct Pems {
    certificate: Vec<u8>,
    key: Vec<u8>,
}

impl Pems {
    pub(crate) fn read(files: &Config) -> Result<Self, Unusable> {
        let read = |what, file: &Path| {
            file::read(file).map_err(|source| Unusable { what, file: file.to_owned(), source: source.into() })
        };
        Ok(Self {
            certificate: read("cannot read the certificate", &files.certificate)?,
            key: read("cannot read the key", &files.key)?,
        })
    }

    /// Changes with the contents. Not a secret's hash that anybody sees: it stays in this process.
    pub(crate) fn content(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        (&self.certificate, &self.key).hash(&mut hasher);
        hasher.finish()
    }

    pub(crate) fn into_config(
        self,
        files: &Config,
        provider: &Arc<CryptoProvider>,
        ticketer: &Arc<dyn ProducesTickets>,
    ) -> Result<ServerConfig, Unusable> {
        let of_chain =
            |source: BoxError| Unusable { what: "no usable certificate in", file: files.certificate.clone(), source };
        let of_key = |source: BoxError| Unusable { what: "no usable key in", file: files.key.clone(), source };
        let chain: Vec<_> = CertificateDer::pem_slice_iter(&self.certificate)
            .collect::<Result<_, _>>()
            .map_err(|error| of_chain(error.into()))?;
        if chain.is_empty() {
            return Err(of_chain("no PEM section `CERTIFICATE`".into()));
        }
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| of_key(error.into()))?;
        let mut config = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| of_chain(error.into()))?
            .with_no_client_auth()
            // Also finds out whether key and certificate belong together.
            .with_single_cert(chain, key)
            .map_err(|error| of_key(error.into()))?;
        config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
        config.ticketer = ticketer.clone();
        Ok(config)
    }
}
