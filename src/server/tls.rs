//! TLS of a listener.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::Deserialize;

/// The certificate of a listener. Section `tls` of an entry of `listen`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The certificate chain, PEM, the server's own first. Read again when it changes.
    pub certificate: PathBuf,
    /// Its private key, PEM: PKCS#8, PKCS#1 or SEC1. Read again when it changes.
    pub key: PathBuf,
}
