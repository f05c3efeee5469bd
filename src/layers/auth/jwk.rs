//! Keys that tokens are verified with: PEM, and JWK sets (RFC 7517).
//!
//! Signatures are ring's business, the library that TLS stands on here. Of the JWT crates, `jsonwebtoken` no longer
//! works over ring, and would bring a second cryptographic library with its own C code or its own RSA; what it does
//! beside the cryptography is what this module and its neighbour do in fewer lines than its key handling would need.

use std::fmt;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use ring::{hmac, signature};
use rustls::pki_types::{SubjectPublicKeyInfoDer, pem::PemObject};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Digest, api_key::digest_of};

/// How a token is signed (RFC 7518 §3.1, RFC 8037).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Serialize, JsonSchema)]
#[schemars(rename = "JwtAlgorithm")]
#[expect(missing_docs, reason = "the names say it")]
pub enum Algorithm {
    HS256,
    HS384,
    HS512,
    RS256,
    RS384,
    RS512,
    PS256,
    PS384,
    PS512,
    ES256,
    ES384,
    #[serde(rename = "EdDSA")]
    EdDsa,
}

/// What kind of key an algorithm works with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Family {
    Secret,
    Rsa,
    P256,
    P384,
    Ed25519,
}

impl Algorithm {
    const ALL: [(Self, &'static str, Family); 12] = [
        (Self::HS256, "HS256", Family::Secret),
        (Self::HS384, "HS384", Family::Secret),
        (Self::HS512, "HS512", Family::Secret),
        (Self::RS256, "RS256", Family::Rsa),
        (Self::RS384, "RS384", Family::Rsa),
        (Self::RS512, "RS512", Family::Rsa),
        (Self::PS256, "PS256", Family::Rsa),
        (Self::PS384, "PS384", Family::Rsa),
        (Self::PS512, "PS512", Family::Rsa),
        (Self::ES256, "ES256", Family::P256),
        (Self::ES384, "ES384", Family::P384),
        (Self::EdDsa, "EdDSA", Family::Ed25519),
    ];

    /// The algorithm that `alg` names. There is none called `none`.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().find(|(_, known, _)| *known == name).map(|(algorithm, ..)| *algorithm)
    }

    /// Its name in `alg`.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        Self::ALL.iter().find(|(known, ..)| *known == self).map_or("", |(_, name, _)| name)
    }

    fn family(self) -> Option<Family> {
        Self::ALL.iter().find(|(known, ..)| *known == self).map(|(.., family)| *family)
    }

    /// Whether one secret signs and verifies.
    #[must_use]
    pub fn is_symmetric(self) -> bool {
        self.family() == Some(Family::Secret)
    }

    /// The bytes that a secret has at least: as many as the hash (RFC 7518 §3.2).
    fn least_secret(self) -> usize {
        match self {
            Self::HS384 => 48,
            Self::HS512 => 64,
            _ => 32,
        }
    }
}

/// A key.
pub(super) struct Key {
    id: Option<Box<str>>,
    /// The only algorithm that it is for, where it says so.
    only: Option<Algorithm>,
    material: Material,
}

enum Material {
    Secret(Box<[u8]>),
    Rsa { n: Box<[u8]>, e: Box<[u8]> },
    Point(Family, Box<[u8]>),
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key").field("family", &self.family()).finish_non_exhaustive()
    }
}

impl Key {
    fn family(&self) -> Family {
        match &self.material {
            Material::Secret(_) => Family::Secret,
            Material::Rsa { .. } => Family::Rsa,
            Material::Point(family, _) => *family,
        }
    }

    /// A key as the configuration gives it: a public key in PEM, or a secret.
    ///
    /// # Errors
    /// What is wrong with it, without a part of it.
    pub(super) fn read(text: &str, algorithms: &[Algorithm]) -> Result<Self, String> {
        let key = if text.contains("-----BEGIN ") {
            if !text.contains("-----BEGIN PUBLIC KEY-----") {
                return Err(
                    "must be a public key, `-----BEGIN PUBLIC KEY-----`: as `openssl pkey -in KEY -pubout` or \
                            `openssl x509 -in CERTIFICATE -noout -pubkey` print it"
                        .to_owned(),
                );
            }
            let der = SubjectPublicKeyInfoDer::from_pem_slice(text.as_bytes()).map_err(|_| "is no PEM")?;
            let material = public_key(&der).ok_or("is none of RSA (2048 to 8192 bits), P-256, P-384 and Ed25519")?;
            Self { id: None, only: None, material }
        } else {
            Self { id: None, only: None, material: Material::Secret(text.as_bytes().into()) }
        };
        for algorithm in algorithms {
            if !key.fits(*algorithm) {
                let of = match key.family() {
                    Family::Secret => "a secret (it is not PEM)",
                    Family::Rsa => "an RSA key",
                    Family::P256 => "a P-256 key",
                    Family::P384 => "a P-384 key",
                    Family::Ed25519 => "an Ed25519 key",
                };
                return Err(format!("is {of}, which `{}` does not work with", algorithm.as_str()));
            }
            if let Material::Secret(secret) = &key.material
                && secret.len() < algorithm.least_secret()
            {
                let least = algorithm.least_secret();
                return Err(format!("is shorter than the {least} bytes that {} needs", algorithm.as_str()));
            }
        }
        Ok(key)
    }

    /// Whether `algorithm` is one for this key. That it is keeps a token from being taken whose "secret" is an RSA key
    /// that everybody knows.
    fn fits(&self, algorithm: Algorithm) -> bool {
        algorithm.family() == Some(self.family()) && self.only.is_none_or(|only| only == algorithm)
    }

    /// Whether `signed` was signed so.
    fn verifies(&self, algorithm: Algorithm, signed: &[u8], by: &[u8]) -> bool {
        use signature::{
            ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PKCS1_2048_8192_SHA256,
            RSA_PKCS1_2048_8192_SHA384, RSA_PKCS1_2048_8192_SHA512, RSA_PSS_2048_8192_SHA256, RSA_PSS_2048_8192_SHA384,
            RSA_PSS_2048_8192_SHA512, RsaParameters, RsaPublicKeyComponents, UnparsedPublicKey, VerificationAlgorithm,
        };
        if !self.fits(algorithm) {
            return false;
        }
        let rsa: Option<&RsaParameters> = match algorithm {
            Algorithm::RS256 => Some(&RSA_PKCS1_2048_8192_SHA256),
            Algorithm::RS384 => Some(&RSA_PKCS1_2048_8192_SHA384),
            Algorithm::RS512 => Some(&RSA_PKCS1_2048_8192_SHA512),
            Algorithm::PS256 => Some(&RSA_PSS_2048_8192_SHA256),
            Algorithm::PS384 => Some(&RSA_PSS_2048_8192_SHA384),
            Algorithm::PS512 => Some(&RSA_PSS_2048_8192_SHA512),
            _ => None,
        };
        match (&self.material, rsa) {
            (Material::Secret(secret), _) => {
                let hash = match algorithm {
                    Algorithm::HS384 => hmac::HMAC_SHA384,
                    Algorithm::HS512 => hmac::HMAC_SHA512,
                    _ => hmac::HMAC_SHA256,
                };
                hmac::verify(&hmac::Key::new(hash, secret), signed, by).is_ok()
            }
            (Material::Rsa { n, e }, Some(parameters)) => {
                RsaPublicKeyComponents { n, e }.verify(parameters, signed, by).is_ok()
            }
            (Material::Rsa { .. }, None) => false,
            (Material::Point(family, point), _) => {
                let curve: &'static dyn VerificationAlgorithm = match family {
                    Family::P256 => &ECDSA_P256_SHA256_FIXED,
                    Family::P384 => &ECDSA_P384_SHA384_FIXED,
                    Family::Ed25519 => &ED25519,
                    Family::Secret | Family::Rsa => return false,
                };
                UnparsedPublicKey::new(curve, point).verify(signed, by).is_ok()
            }
        }
    }
}

/// What came of a signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Signature {
    Good,
    Bad,
    /// No key has the name that the token calls its key by.
    UnknownKey,
}

/// Keys that any token may be signed with.
#[derive(Debug)]
pub(super) struct KeySet {
    keys: Vec<Key>,
    /// Of the text that they were read from.
    source: Digest,
}

/// Keys that are tried for a token that names none.
const MAX_TRIED: usize = 8;
/// Keys that are taken from a set.
const MAX_KEYS: usize = 100;

impl From<Key> for KeySet {
    fn from(key: Key) -> Self {
        Self { keys: vec![key], source: Digest::default() }
    }
}

impl KeySet {
    /// Reads a JWK set. Keys that are not for signatures, or of a kind that is not known, are passed over, and so are
    /// secrets: a set is published.
    ///
    /// # Errors
    /// What is wrong with it: it is no JSON, no set, or has no key that could be used.
    pub(super) fn parse(text: &[u8]) -> Result<Self, String> {
        #[derive(Deserialize)]
        struct Set {
            keys: Vec<serde_json::Value>,
        }
        // serde's messages may quote a value.
        let set: Set = serde_json::from_slice(text).map_err(|_| "is no JWK set: `{\"keys\": [...]}`")?;
        if set.keys.len() > MAX_KEYS {
            return Err(format!("has more than {MAX_KEYS} keys"));
        }
        let keys: Vec<_> = set.keys.into_iter().filter_map(jwk).collect();
        if keys.is_empty() {
            return Err("has no key for signatures that is RSA (2048 to 8192 bits), P-256, P-384 or Ed25519".to_owned());
        }
        Ok(Self { keys, source: digest_of(text) })
    }

    /// Whether both were read from the same text.
    pub(super) fn has_source_of(&self, other: &Self) -> bool {
        self.source == other.source
    }

    /// Whether one of the keys has signed this. `id` is what the token calls its key.
    pub(super) fn verify(&self, algorithm: Algorithm, id: Option<&str>, signed: &[u8], by: &[u8]) -> Signature {
        let may_be = |key: &&Key| id.is_none() || key.id.is_none() || key.id.as_deref() == id;
        if !self.keys.iter().any(|key| may_be(&key)) {
            return Signature::UnknownKey;
        }
        let fitting = self.keys.iter().filter(may_be).filter(|key| key.fits(algorithm)).take(MAX_TRIED);
        if fitting.into_iter().any(|key| key.verifies(algorithm, signed, by)) {
            Signature::Good
        } else {
            Signature::Bad
        }
    }
}

/// A key of a set, if it is one to verify with.
fn jwk(value: serde_json::Value) -> Option<Key> {
    #[derive(Deserialize)]
    struct Jwk {
        kty: String,
        #[serde(rename = "use")]
        used: Option<String>,
        key_ops: Option<Vec<String>>,
        alg: Option<String>,
        kid: Option<String>,
        crv: Option<String>,
        n: Option<String>,
        e: Option<String>,
        x: Option<String>,
        y: Option<String>,
    }
    let jwk: Jwk = serde_json::from_value(value).ok()?;
    if jwk.used.is_some_and(|used| used != "sig") || jwk.key_ops.is_some_and(|ops| !ops.iter().any(|op| op == "verify"))
    {
        return None;
    }
    let bytes = |text: Option<String>| BASE64_URL_SAFE_NO_PAD.decode(text?).ok();
    let material = match (jwk.kty.as_str(), jwk.crv.as_deref()) {
        ("RSA", _) => rsa(&bytes(jwk.n)?, &bytes(jwk.e)?)?,
        ("EC", Some(curve @ ("P-256" | "P-384"))) => {
            let point = [vec![4], bytes(jwk.x)?, bytes(jwk.y)?].concat();
            point_on(if curve == "P-256" { Family::P256 } else { Family::P384 }, &point)?
        }
        ("OKP", Some("Ed25519")) => point_on(Family::Ed25519, &bytes(jwk.x)?)?,
        _ => return None,
    };
    let only = match jwk.alg {
        // A key for an algorithm that is not known is for no other.
        Some(name) => Some(Algorithm::named(&name)?),
        None => None,
    };
    Some(Key { id: jwk.kid.map(Into::into), only, material })
}

fn rsa(n: &[u8], e: &[u8]) -> Option<Material> {
    let strip = |number: &[u8]| -> Box<[u8]> { number.iter().copied().skip_while(|&byte| byte == 0).collect() };
    let (n, e) = (strip(n), strip(e));
    // ring takes no others, and would say so of each signature only.
    ((256..=1024).contains(&n.len()) && (1..=5).contains(&e.len())).then_some(Material::Rsa { n, e })
}

fn point_on(family: Family, point: &[u8]) -> Option<Material> {
    let is_right = match family {
        Family::P256 => point.len() == 65 && point.starts_with(&[4]),
        Family::P384 => point.len() == 97 && point.starts_with(&[4]),
        Family::Ed25519 => point.len() == 32,
        Family::Secret | Family::Rsa => false,
    };
    is_right.then(|| Material::Point(family, point.into()))
}

/// The key in a `SubjectPublicKeyInfo` (RFC 5280 §4.1): what it is for, then a string of bits.
fn public_key(der: &[u8]) -> Option<Material> {
    const SEQUENCE: u8 = 0x30;
    const INTEGER: u8 = 0x02;
    const BIT_STRING: u8 = 0x03;
    // The content of the `AlgorithmIdentifier` of RFC 3279 §2.3.1, RFC 5480 §2.1.1, RFC 8410 §3.
    const RSA: &[u8] = &[0x06, 9, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 1, 1, 1, 5, 0];
    const P256: &[u8] = &[0x06, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 0x06, 8, 0x2a, 0x86, 0x48, 0xce, 0x3d, 3, 1, 7];
    const P384: &[u8] = &[0x06, 7, 0x2a, 0x86, 0x48, 0xce, 0x3d, 2, 1, 0x06, 5, 0x2b, 0x81, 0x04, 0, 0x22];
    const ED25519: &[u8] = &[0x06, 3, 0x2b, 0x65, 0x70];

    let (whole, end) = element(der, SEQUENCE)?;
    let (algorithm, rest) = element(whole, SEQUENCE)?;
    let (bits, after) = element(rest, BIT_STRING)?;
    let (0, key) = bits.split_first().map(|(unused, key)| (*unused, key))? else { return None };
    if !end.is_empty() || !after.is_empty() {
        return None;
    }
    match algorithm {
        RSA => {
            let (numbers, end) = element(key, SEQUENCE)?;
            let (n, rest) = element(numbers, INTEGER)?;
            let (e, after) = element(rest, INTEGER)?;
            if end.is_empty() && after.is_empty() { rsa(n, e) } else { None }
        }
        P256 => point_on(Family::P256, key),
        P384 => point_on(Family::P384, key),
        ED25519 => point_on(Family::Ed25519, key),
        _ => None,
    }
}

/// The content of the DER element at the beginning, which must be of this kind, and what follows it.
fn element(der: &[u8], kind: u8) -> Option<(&[u8], &[u8])> {
    let (&[found, first], rest) = der.split_first_chunk::<2>()?;
    let (length, rest) = match first {
        0..=0x7f => (usize::from(first), rest),
        0x81 => rest.split_first().map(|(&length, rest)| (usize::from(length), rest))?,
        0x82 => rest.split_first_chunk::<2>().map(|(length, rest)| (usize::from(u16::from_be_bytes(*length)), rest))?,
        _ => return None,
    };
    if found == kind { rest.split_at_checked(length) } else { None }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_algorithms_are_those_of_the_rfc() {
        for (algorithm, name, _) in Algorithm::ALL {
            assert_eq!((Algorithm::named(name), algorithm.as_str()), (Some(algorithm), name));
            assert_eq!(serde_json::to_value(algorithm).unwrap(), name);
        }
        for name in ["none", "None", "NONE", "", "hs256", "ES512", "HS256 "] {
            assert_eq!(Algorithm::named(name), None, "{name}");
        }
    }

    #[test]
    fn a_key_that_does_not_fit_its_algorithms_is_refused_at_load() {
        let error = |text: &str, algorithms: &[Algorithm]| Key::read(text, algorithms).unwrap_err();
        let secret = "s".repeat(40);
        assert!(Key::read(&secret, &[Algorithm::HS256]).is_ok());
        assert_eq!(error(&secret, &[Algorithm::HS512]), "is shorter than the 64 bytes that HS512 needs");
        assert_eq!(
            error(&secret, &[Algorithm::RS256]),
            "is a secret (it is not PEM), which `RS256` does not work with"
        );
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        assert!(Key::read(&key.public_key_pem(), &[Algorithm::ES256]).is_ok());
        assert_eq!(
            error(&key.public_key_pem(), &[Algorithm::HS256]),
            "is a P-256 key, which `HS256` does not work with"
        );
        assert!(error(&key.serialize_pem(), &[Algorithm::ES256]).starts_with("must be a public key"));
        assert!(error("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n", &[]).starts_with("is none of"));
    }

    #[test]
    fn a_set_without_a_key_to_use_is_none() {
        for text in ["", "[]", "{}", r#"{"keys": []}"#, r#"{"keys": [{"kty": "oct", "k": "AAAA"}]}"#] {
            assert!(KeySet::parse(text.as_bytes()).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let _key = public_key(&bytes);
            let _set = KeySet::parse(&bytes);
        }
    }
}
