//! JSON Web Tokens (RFC 7519), signed in compact form (RFC 7515), verified as RFC 8725 advises.
//!
//! What a token says of itself decides nothing: its `alg` must be one of the configured ones and fit the key, of any
//! other kind of token (encrypted, unsigned, with `crit`) none is taken, and addresses of keys in it are not looked at.
//! A token that was verified is remembered by its digest until it expires or the keys change, so that a signature
//! costs once.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};
use serde_json::{Map, Value};

use super::{
    Digest, State,
    api_key::is_word,
    jwk::{Algorithm, Key, KeySet, Signature},
    jwks::{self, Remote},
    recent::Recent,
};
use crate::{
    config::{Check, HumanDuration, OneOrMany, Problems, Secret},
    message::{BoxError, Principal},
    telemetry::Metrics,
};

/// How many verified tokens a route remembers at most. About 300 bytes each.
const MAX_VERIFIED: usize = 8192;
/// The longest name of an issuer, in bytes.
const MAX_ISSUER: usize = 512;

/// Which tokens are taken. Section `jwt` of `auth`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Jwt")]
pub struct Config {
    /// How tokens may be signed: a list of `HS256`, `HS384`, `HS512`, `RS256`, `RS384`, `RS512`, `PS256`, `PS384`,
    /// `PS512`, `ES256`, `ES384`, `EdDSA`. Those that work with a secret and those that do not exclude each other.
    pub algorithms: OneOrMany<Algorithm>,
    /// What tokens are verified with: a public key in PEM, or the secret of `HS…`, of at least 32 bytes. This or `jwks`.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "shown")]
    pub key: Option<Secret>,
    /// The same, as a JWK set: `{file: PATH}` or `{url: URL}`. This or `key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub jwks: Option<jwks::Config>,
    /// Whom tokens must be for, `aud`: one of these, or `any`.
    pub audience: OneOrMany<String>,
    /// Who must have issued them, `iss`: one of these. Default: whoever has the key. Without it, or with several, the
    /// same id by another issuer is another principal: to the cache, sessions and rate limits it is `ID ISSUER`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub issuer: Option<OneOrMany<String>>,
    /// How much clocks may differ, up to 5m. Default `30s`.
    #[serde(default = "default_leeway")]
    pub leeway: HumanDuration,
    /// Whether a token must expire, `exp`. Default `true`.
    #[serde(default = "yes")]
    pub require_exp: bool,
    /// The claim that is the principal's id: text of 1 to 128 visible ASCII characters, or a whole number. Default `sub`.
    #[serde(default = "default_id")]
    pub id: String,
    /// The claim that is the principal's tier, where a token has it. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tier: Option<String>,
}

fn default_leeway() -> HumanDuration {
    HumanDuration::from_secs(30)
}

fn default_id() -> String {
    "sub".to_owned()
}

fn yes() -> bool {
    true
}

#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn shown<S: Serializer>(secret: &Option<Secret>, to: S) -> Result<S::Ok, S::Error> {
    secret.as_ref().map(Secret::shown).serialize(to)
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        let symmetric = self.algorithms.iter().filter(|algorithm| algorithm.is_symmetric()).count();
        if self.algorithms.iter().next().is_none() {
            problems.add("algorithms", "is empty: name how tokens are signed, as in `[RS256]`");
        } else if symmetric > 0 && symmetric < self.algorithms.iter().count() {
            problems.add("algorithms", "has some that work with a secret and some that work with a public key");
        }
        if self.audience.iter().next().is_none() {
            problems.add("audience", "is empty: name whom tokens are for, or write `any`");
        } else if self.audience.iter().count() > 1 && self.any_audience() {
            problems.add("audience", "has `any` among others: write just `any`, or leave it out");
        }
        if self.issuer.as_ref().is_some_and(|issuer| issuer.iter().next().is_none()) {
            problems.add("issuer", "is empty: name who issues tokens, or leave it out");
        }
        if self.leeway > HumanDuration::from_secs(300) {
            problems.add("leeway", format!("is {}: must be at most 5m", self.leeway));
        }
        match (&self.key, &self.jwks) {
            (None, None) => problems.add("", "needs `key` (PEM or a secret) or `jwks` (a set of keys)"),
            (Some(_), Some(_)) => problems.add("jwks", "stands beside `key`: the keys are in one or the other"),
            (None, Some(jwks)) => {
                if symmetric > 0 {
                    problems.add("algorithms", "has one that works with a secret, and a JWK set has none");
                }
                problems.at("jwks", |problems| jwks.check(problems));
            }
            (Some(key), None) => match key.reveal() {
                Ok(text) => {
                    let algorithms: Vec<_> = self.algorithms.iter().copied().collect();
                    if let Err(message) = Key::read(&text, &algorithms) {
                        problems.add("key", message);
                    }
                }
                Err(message) => problems.add("key", message),
            },
        }
    }
}

impl Config {
    fn any_audience(&self) -> bool {
        self.audience.iter().any(|audience| audience == "any")
    }

    /// Whether there may be several issuers, each of which has names of its own for principals.
    fn has_issuers(&self) -> bool {
        self.issuer.as_ref().is_none_or(|issuers| issuers.iter().count() > 1)
    }
}

/// Why a token is not taken. Said in the log; the client is told that it is not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    Malformed,
    Algorithm,
    UnknownKey,
    Signature,
    Expired,
    NotYet,
    NoExpiry,
    Audience,
    Issuer,
    Principal,
    /// The keys cannot be had.
    NoKeys,
}

impl Refused {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Malformed => "the token is malformed",
            Self::Algorithm => "the token is signed in a way that is not configured",
            Self::UnknownKey => "the token is signed with a key that is not known",
            Self::Signature => "the token's signature is wrong",
            Self::Expired => "the token has expired",
            Self::NotYet => "the token is not valid yet",
            Self::NoExpiry => "the token does not expire",
            Self::Audience => "the token is for another audience",
            Self::Issuer => "the token is of another issuer",
            Self::Principal => "the token's claims name no principal",
            Self::NoKeys => "the keys to verify tokens with cannot be had",
        }
    }
}

/// What is asked whether a token is good.
pub(super) struct Verifier {
    config: Config,
    keys: Keys,
    verified: Mutex<Recent<Digest, Verified>>,
}

enum Keys {
    Fixed(Arc<KeySet>),
    Remote(Arc<Remote>),
}

struct Verified {
    principal: Principal,
    expires: Option<f64>,
    /// The keys that it was verified with: with others it is to be verified again.
    keys: Arc<KeySet>,
}

impl fmt::Debug for Verifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Verifier").finish_non_exhaustive()
    }
}

impl Verifier {
    pub(super) fn build(config: &Config, state: &State, metrics: &Metrics) -> Result<Self, BoxError> {
        let keys = match (&config.key, &config.jwks) {
            (Some(key), _) => {
                let algorithms: Vec<_> = config.algorithms.iter().copied().collect();
                let key = Key::read(&key.reveal()?, &algorithms).map_err(|message| format!("the key {message}"))?;
                Keys::Fixed(Arc::new(key.into()))
            }
            (None, Some(jwks)) => match jwks.source() {
                Some(jwks::Source::File(path)) => Keys::Fixed(Arc::new(jwks::read(path)?)),
                Some(jwks::Source::Url(url)) => Keys::Remote(state.remote(url, jwks, metrics)?),
                None => return Err("there are no keys to verify tokens with".into()),
            },
            (None, None) => return Err("there are no keys to verify tokens with".into()),
        };
        Ok(Self { config: config.clone(), keys, verified: Mutex::new(Recent::new(MAX_VERIFIED)) })
    }

    /// Whose a token is, if it is good. May wait for keys that are being fetched.
    pub(super) async fn verify(&self, token: &[u8], digest: Digest, now: SystemTime) -> Result<Principal, Refused> {
        let now = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs_f64();
        let keys = match &self.keys {
            Keys::Fixed(keys) => keys.clone(),
            Keys::Remote(remote) => remote.keys().await.ok_or(Refused::NoKeys)?,
        };
        if let Some(principal) = self.known(digest, &keys, now) {
            return Ok(principal);
        }
        match (self.verify_with(token, digest, keys, now), &self.keys) {
            (Err(Refused::UnknownKey), Keys::Remote(remote)) => {
                // Perhaps a new one: keys are rotated.
                let keys = remote.newer_keys().await.ok_or(Refused::NoKeys)?;
                self.verify_with(token, digest, keys, now)
            }
            (result, _) => result,
        }
    }

    fn known(&self, digest: Digest, keys: &Arc<KeySet>, now: f64) -> Option<Principal> {
        let verified = self.verified.lock();
        let known = verified.get(&digest)?;
        let is_good = Arc::ptr_eq(&known.keys, keys) && known.expires.is_none_or(|expires| now < expires);
        is_good.then(|| known.principal.clone())
    }

    fn verify_with(&self, token: &[u8], digest: Digest, keys: Arc<KeySet>, now: f64) -> Result<Principal, Refused> {
        let (principal, expires) = self.judge(token, &keys, now)?;
        let verified = Verified { principal: principal.clone(), expires, keys };
        self.verified.lock().insert(digest, verified);
        Ok(principal)
    }

    /// Whose a token is, and when it will no longer be good, in seconds since 1970.
    fn judge(&self, token: &[u8], keys: &KeySet, now: f64) -> Result<(Principal, Option<f64>), Refused> {
        let token = str::from_utf8(token).map_err(|_| Refused::Malformed)?;
        let (signed, signature) = token.rsplit_once('.').ok_or(Refused::Malformed)?;
        let (header, claims) = signed.split_once('.').ok_or(Refused::Malformed)?;
        let decode = |part: &str| BASE64_URL_SAFE_NO_PAD.decode(part).map_err(|_| Refused::Malformed);
        let header: Header = serde_json::from_slice(&decode(header)?).map_err(|_| Refused::Malformed)?;
        if header.crit.is_some() {
            return Err(Refused::Malformed);
        }
        let algorithm = Algorithm::named(&header.alg)
            .filter(|named| self.config.algorithms.iter().any(|allowed| allowed == named))
            .ok_or(Refused::Algorithm)?;
        match keys.verify(algorithm, header.kid.as_deref(), signed.as_bytes(), &decode(signature)?) {
            Signature::Good => {}
            Signature::Bad => return Err(Refused::Signature),
            Signature::UnknownKey => return Err(Refused::UnknownKey),
        }
        // Only now: nobody but the issuer has written what is read from here on.
        let claims: Map<String, Value> = serde_json::from_slice(&decode(claims)?).map_err(|_| Refused::Malformed)?;
        self.judge_claims(&claims, now)
    }

    fn judge_claims(&self, claims: &Map<String, Value>, now: f64) -> Result<(Principal, Option<f64>), Refused> {
        // A claim that is there and is not what it must be is no absent one.
        let time = |name: &str| match claims.get(name) {
            None => Ok(None),
            Some(value) => value.as_f64().filter(|time| time.is_finite()).map(Some).ok_or(Refused::Malformed),
        };
        let leeway = self.config.leeway.get().as_secs_f64();
        let expires = time("exp")?.map(|expires| expires + leeway);
        if expires.is_none() && self.config.require_exp {
            return Err(Refused::NoExpiry);
        }
        if expires.is_some_and(|expires| now >= expires) {
            return Err(Refused::Expired);
        }
        if time("nbf")?.is_some_and(|begins| now < begins - leeway) {
            return Err(Refused::NotYet);
        }
        let issuer = match claims.get("iss") {
            None => None,
            Some(Value::String(issuer)) if issuer.len() <= MAX_ISSUER => Some(issuer),
            Some(_) => return Err(Refused::Issuer),
        };
        if let Some(issuers) = &self.config.issuer
            && !issuer.is_some_and(|issuer| issuers.iter().any(|known| known == issuer))
        {
            return Err(Refused::Issuer);
        }
        if !self.config.any_audience() {
            let is_ours =
                |aud: &Value| aud.as_str().is_some_and(|aud| self.config.audience.iter().any(|own| own == aud));
            let is_for_us = match claims.get("aud") {
                Some(Value::Array(all)) => all.iter().any(is_ours),
                Some(one) => is_ours(one),
                None => false,
            };
            if !is_for_us {
                return Err(Refused::Audience);
            }
        }
        let id: Arc<str> = match claims.get(&self.config.id) {
            Some(Value::String(id)) if is_word(id) => id.as_str().into(),
            Some(Value::Number(id)) if id.is_i64() || id.is_u64() => id.to_string().into(),
            _ => return Err(Refused::Principal),
        };
        let tier = match self.config.tier.as_ref().and_then(|tier| claims.get(tier)) {
            None | Some(Value::Null) => None,
            Some(Value::String(tier)) if is_word(tier) => Some(tier.as_str().into()),
            Some(_) => return Err(Refused::Principal),
        };
        let principal = Principal::new(id, tier);
        Ok(match issuer.filter(|_| self.config.has_issuers()) {
            Some(issuer) => (principal.issued_by(issuer), expires),
            None => (principal, expires),
        })
    }
}

/// What is read of a token's header. Names that stand twice make it malformed.
#[derive(Deserialize)]
struct Header {
    alg: String,
    kid: Option<String>,
    crit: Option<Value>,
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use ring::{
        hmac,
        rand::SystemRandom,
        signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair},
    };
    use serde_json::json;

    use super::{super::api_key::digest_of, *};

    pub(in super::super) const SECRET: &str = "a secret of at least thirty-two bytes";

    /// A signer of ES256 tokens.
    pub(in super::super) struct Issuer {
        pair: EcdsaKeyPair,
        kid: &'static str,
    }

    impl Issuer {
        pub(in super::super) fn new(kid: &'static str) -> Self {
            let random = SystemRandom::new();
            let algorithm = &ECDSA_P256_SHA256_FIXED_SIGNING;
            let document = EcdsaKeyPair::generate_pkcs8(algorithm, &random).unwrap();
            Self { pair: EcdsaKeyPair::from_pkcs8(algorithm, document.as_ref(), &random).unwrap(), kid }
        }

        pub(in super::super) fn token(&self, claims: &Value) -> String {
            let signed = unsigned(&json!({ "alg": "ES256", "kid": self.kid }), claims);
            let signature = self.pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap();
            format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(signature))
        }

        pub(in super::super) fn jwk(&self) -> Value {
            let point = self.pair.public_key().as_ref();
            let part = |range: std::ops::Range<usize>| BASE64_URL_SAFE_NO_PAD.encode(&point[range]);
            json!({ "kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256", "kid": self.kid, "x": part(1..33), "y": part(33..65) })
        }
    }

    fn unsigned(header: &Value, claims: &Value) -> String {
        let part = |value: &Value| BASE64_URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}", part(header), part(claims))
    }

    pub(in super::super) fn hs256(header: &Value, claims: &Value, secret: &[u8]) -> String {
        let signed = unsigned(header, claims);
        let tag = hmac::sign(&hmac::Key::new(hmac::HMAC_SHA256, secret), signed.as_bytes());
        format!("{signed}.{}", BASE64_URL_SAFE_NO_PAD.encode(tag))
    }

    fn config(json: Value) -> Config {
        let mut all = json!({ "algorithms": "HS256", "audience": "api", "key": SECRET });
        all.as_object_mut().unwrap().extend(serde_json::from_value::<serde_json::Map<_, _>>(json).unwrap());
        serde_json::from_value(all).unwrap()
    }

    fn verifier(json: Value) -> Verifier {
        Verifier::build(&config(json), &State::default(), &Metrics::new()).unwrap()
    }

    const NOW: u64 = 2_000_000_000;

    fn claims(more: Value) -> Value {
        let mut all = json!({ "sub": "alice", "aud": "api", "exp": NOW + 60 });
        all.as_object_mut().unwrap().extend(serde_json::from_value::<serde_json::Map<_, _>>(more).unwrap());
        all
    }

    async fn verify(verifier: &Verifier, token: &str) -> Result<String, Refused> {
        let now = UNIX_EPOCH + Duration::from_secs(NOW);
        let principal = verifier.verify(token.as_bytes(), digest_of(token.as_bytes()), now).await?;
        Ok(principal.id.to_string())
    }

    fn sign(claims: &Value) -> String {
        hs256(&json!({ "alg": "HS256", "typ": "JWT" }), claims, SECRET.as_bytes())
    }

    #[tokio::test]
    async fn a_good_token_names_its_principal() {
        let verifier = verifier(json!({ "tier": "plan" }));
        let token = sign(&claims(json!({ "plan": "gold", "aud": ["other", "api"] })));
        let now = UNIX_EPOCH + Duration::from_secs(NOW);
        for _ in 0..2 {
            let principal = verifier.verify(token.as_bytes(), digest_of(token.as_bytes()), now).await.unwrap();
            assert_eq!((&*principal.id, principal.tier.as_deref()), ("alice", Some("gold")));
        }
        let later = now + Duration::from_secs(60 + 30);
        let refused = verifier.verify(token.as_bytes(), digest_of(token.as_bytes()), later).await;
        assert_eq!(refused, Err(Refused::Expired), "what is remembered expires too");
    }

    #[tokio::test]
    async fn claims_that_are_not_right_are_refused() {
        let verifier = verifier(json!({ "issuer": ["us"], "tier": "plan" }));
        let ok = |more: Value| {
            let mut claims = claims(json!({ "iss": "us" }));
            claims.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            sign(&claims)
        };
        assert_eq!(verify(&verifier, &ok(json!({}))).await.as_deref(), Ok("alice"));
        assert_eq!(verify(&verifier, &ok(json!({ "sub": 7 }))).await.as_deref(), Ok("7"));
        assert_eq!(verify(&verifier, &ok(json!({ "exp": NOW - 29, "nbf": NOW + 30 }))).await.as_deref(), Ok("alice"));
        for (more, refused) in [
            (json!({ "exp": NOW - 30 }), Refused::Expired),
            (json!({ "exp": null }), Refused::Malformed),
            (json!({ "exp": "2000000060" }), Refused::Malformed),
            (json!({ "nbf": NOW + 31 }), Refused::NotYet),
            (json!({ "nbf": "soon" }), Refused::Malformed),
            (json!({ "aud": "apis" }), Refused::Audience),
            (json!({ "aud": [] }), Refused::Audience),
            (json!({ "aud": { "api": 1 } }), Refused::Audience),
            (json!({ "iss": "them" }), Refused::Issuer),
            (json!({ "iss": ["us"] }), Refused::Issuer),
            (json!({ "sub": "" }), Refused::Principal),
            (json!({ "sub": "a\r\nx: y" }), Refused::Principal),
            (json!({ "sub": 1.5 }), Refused::Principal),
            (json!({ "plan": 5 }), Refused::Principal),
        ] {
            assert_eq!(verify(&verifier, &ok(more.clone())).await, Err(refused), "{more}");
        }
        let never = json!({ "sub": "a", "aud": "api", "iss": "us" });
        assert_eq!(verify(&verifier, &sign(&never)).await, Err(Refused::NoExpiry));
        let lenient = self::verifier(json!({ "require_exp": false, "audience": "any" }));
        assert_eq!(verify(&lenient, &sign(&json!({ "sub": "a" }))).await.as_deref(), Ok("a"));
    }

    #[tokio::test]
    async fn whom_two_issuers_call_the_same_are_two() {
        let now = UNIX_EPOCH + Duration::from_secs(NOW);
        let told = async |settings: Value, issuer: Value| {
            let more = if issuer.is_null() { json!({}) } else { json!({ "iss": issuer }) };
            let token = sign(&claims(more));
            let principal = verifier(settings).verify(token.as_bytes(), digest_of(token.as_bytes()), now).await?;
            assert_eq!(&*principal.id, "alice");
            Ok(principal.identity.to_string())
        };
        for settings in [json!({}), json!({ "issuer": ["us", "them"] })] {
            assert_eq!(told(settings.clone(), json!("us")).await.as_deref(), Ok("alice us"));
            assert_eq!(told(settings.clone(), json!("them")).await.as_deref(), Ok("alice them"));
        }
        assert_eq!(told(json!({ "issuer": "us" }), json!("us")).await.as_deref(), Ok("alice"), "there is no other");
        assert_eq!(told(json!({}), Value::Null).await.as_deref(), Ok("alice"));
        for odd in [json!(["us"]), json!(7), json!("a".repeat(MAX_ISSUER + 1))] {
            assert_eq!(told(json!({}), odd).await, Err(Refused::Issuer));
        }
    }

    #[tokio::test]
    async fn what_a_token_says_of_its_signature_decides_nothing() {
        let verifier = verifier(json!({}));
        let claims = claims(json!({}));
        let with = |header: Value| hs256(&header, &claims, SECRET.as_bytes());
        for name in ["none", "None", "HS384", "RS256", "hs256", ""] {
            assert_eq!(verify(&verifier, &with(json!({ "alg": name }))).await, Err(Refused::Algorithm), "{name}");
        }
        let none = format!("{}.", unsigned(&json!({ "alg": "none" }), &claims));
        assert_eq!(verify(&verifier, &none).await, Err(Refused::Algorithm));
        let stripped = format!("{}.", unsigned(&json!({ "alg": "HS256" }), &claims));
        assert_eq!(verify(&verifier, &stripped).await, Err(Refused::Signature));
        assert_eq!(verify(&verifier, &with(json!({ "alg": "HS256", "crit": ["b64"] }))).await, Err(Refused::Malformed));
        assert_eq!(verify(&verifier, &with(json!({}))).await, Err(Refused::Malformed));
        let other = hs256(&json!({ "alg": "HS256" }), &claims, b"another secret of thirty-two bytes or more");
        assert_eq!(verify(&verifier, &other).await, Err(Refused::Signature));
        for text in ["", ".", "..", "a.b", "a.b.c", "a.b.c.d", &format!("{}.x", sign(&claims))] {
            assert_eq!(verify(&verifier, text).await, Err(Refused::Malformed), "{text}");
        }
    }

    #[tokio::test]
    async fn a_public_key_is_no_secret() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap().public_key_pem();
        let verifier = verifier(json!({ "algorithms": ["ES256"], "key": key }));
        let claims = claims(json!({}));
        for alg in ["HS256", "ES256"] {
            let forged = hs256(&json!({ "alg": alg }), &claims, key.as_bytes());
            assert!(matches!(verify(&verifier, &forged).await, Err(Refused::Algorithm | Refused::Signature)), "{alg}");
        }
    }

    #[tokio::test]
    async fn a_set_of_keys_is_looked_up_by_kid() {
        let (one, two) = (Issuer::new("one"), Issuer::new("two"));
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), json!({ "keys": [{ "kty": "x" }, one.jwk()] }).to_string()).unwrap();
        let jwks = json!({ "algorithms": ["ES256"], "key": null, "jwks": { "file": file.path() } });
        let claims = claims(json!({}));
        let before = verifier(jwks.clone());
        assert_eq!(verify(&before, &one.token(&claims)).await.as_deref(), Ok("alice"));
        assert_eq!(verify(&before, &two.token(&claims)).await, Err(Refused::UnknownKey));
        let impostor = Issuer::new("one");
        assert_eq!(verify(&before, &impostor.token(&claims)).await, Err(Refused::Signature));
        // Rotated.
        std::fs::write(file.path(), json!({ "keys": [two.jwk()] }).to_string()).unwrap();
        let after = verifier(jwks);
        assert_eq!(verify(&after, &two.token(&claims)).await.as_deref(), Ok("alice"));
        assert_eq!(verify(&after, &one.token(&claims)).await, Err(Refused::UnknownKey));
    }

    /// By `openssl dgst -sha256 -sign`, over the RS256 header and the claims below.
    const RS256: &str = "\
        VUPLJ4w3uodMLQLZMI_RaQh0bp6LvjHmAey508mYAGTQbEPNtcG5fksb6JMpGiQwkT6DSKsAc7MNV9vkL4cIa661Lkat2PmKvns4\
        izdQtYthru4T2wznhQVGYDfAALKgXbjPqxwJxjHxmF9ZSVRwqbDfoBso9kukPvtN8gRMKGautIr_8M7Lwncz06ZPTC_YACeRi_hm\
        z2NGRxLMLISqClr4xvswyPTVWKDgBpqhCdK1KS6ymAHAQVPAdSya_URuS4Sa-ecx_pviUXgFlu0E7f2a4XvoaBIkcBzOXyuNylOs\
        pzQc9bFYChglX5lwJLoClYI6RAVqUwu0qsb-IL_gpA";
    /// By the same with `-sigopt rsa_padding_mode:pss -sigopt rsa_pss_saltlen:32`.
    const PS256: &str = "\
        ZQej7kGHYOwc7YOK58tKF5Atesb7HuN66IqchuenL-VyG-xdZCFaCctia8a1DT2JvpAoM0zL1E-Fa8h9DBD544HXtPsGZh5acT-h\
        uk2I-JhNG5cpS1Jy8MmJXLPktx0tH-EAsZmBXH3Gbf3obCzbHsJL74InpWlD_c3lTITJT-TqxmOIPFJjlsQ95PcoaUE_avkRsgSf\
        sYQPJ__pTn7Sfw2J-tzLGBaF4R_DRTYZTfqvhrXXXfi-pmTGC-zEuyETg9B75TAv6gl6-sZRPPMvqJDzUY9YI2FusBUqNK08y96n\
        MmYOtm_Mz3WQaFArdDhJ1VNK3t7joREYKKDZv-6oww";
    /// The key to both.
    const RSA: &str = "-----BEGIN PUBLIC KEY-----\n\
        MIIBIjANBgkqhkiG9w0BAQEFAAOCAQ8AMIIBCgKCAQEAyCjkjmmYD4P1gW+myqYY\n\
        T9ZVv2C3MgLyC00ahr282LCQ4JWU4sUNk550daUhaWYxAi95SIMYnz96yLhVFrtp\n\
        ZAPU9XXnDBouyy1BLzuMEKyNIQ9DtHq3+KziwiOZ151L01d6iIUyf0EytQICS/jF\n\
        pkxFgRnMCW+84cUZibS3b/sADcOoO51vauYiP71qH0JXY8DpxKwfFL9VfQ+BCXPv\n\
        Nc1XiIYbbidfMmMyYntfoZVSF95JNhXdnYPgGdyNK/sEGSibtkz4Q4HzoHT92pzu\n\
        UJGwojszaP5MGMz3rJjI3HxpOe5D8wvc2XQyVdUu8BZ3G6bTGXDxRbOT6CaSbNJ+\n\
        YwIDAQAB\n\
        -----END PUBLIC KEY-----\n";
    /// Its modulus.
    const MODULUS: &str = "\
        yCjkjmmYD4P1gW-myqYYT9ZVv2C3MgLyC00ahr282LCQ4JWU4sUNk550daUhaWYxAi95SIMYnz96yLhVFrtpZAPU9XXnDBouyy1B\
        LzuMEKyNIQ9DtHq3-KziwiOZ151L01d6iIUyf0EytQICS_jFpkxFgRnMCW-84cUZibS3b_sADcOoO51vauYiP71qH0JXY8DpxKwf\
        FL9VfQ-BCXPvNc1XiIYbbidfMmMyYntfoZVSF95JNhXdnYPgGdyNK_sEGSibtkz4Q4HzoHT92pzuUJGwojszaP5MGMz3rJjI3Hxp\
        Oe5D8wvc2XQyVdUu8BZ3G6bTGXDxRbOT6CaSbNJ-Yw";

    #[tokio::test]
    async fn rsa_keys_from_pem_and_from_a_set_verify_what_openssl_signed() {
        let token = |alg: &str, by: &str| {
            let part = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(text);
            let header = format!("{{\"alg\":\"{alg}\"}}");
            format!("{}.{}.{by}", part(&header), part("{\"sub\":\"rsa\",\"aud\":\"api\",\"exp\":4000000000}"))
        };
        let file = tempfile::NamedTempFile::new().unwrap();
        let jwk = json!({ "kty": "RSA", "n": MODULUS, "e": "AQAB" });
        std::fs::write(file.path(), json!({ "keys": [jwk] }).to_string()).unwrap();
        let both = json!(["RS256", "PS256"]);
        for keys in [
            json!({ "algorithms": both, "key": RSA }),
            json!({ "algorithms": both, "key": null, "jwks": { "file": file.path() } }),
        ] {
            let verifier = verifier(keys);
            assert_eq!(verify(&verifier, &token("RS256", RS256)).await.as_deref(), Ok("rsa"));
            assert_eq!(verify(&verifier, &token("PS256", PS256)).await.as_deref(), Ok("rsa"));
            for (alg, by) in [("RS256", PS256), ("PS256", RS256)] {
                assert_eq!(verify(&verifier, &token(alg, by)).await, Err(Refused::Signature), "{alg}");
            }
            let forged = hs256(&json!({ "alg": "HS256" }), &claims(json!({})), RSA.as_bytes());
            assert_eq!(verify(&verifier, &forged).await, Err(Refused::Algorithm), "a public key is no secret");
        }
        let only = verifier(json!({ "algorithms": "RS256", "key": RSA }));
        assert_eq!(verify(&only, &token("PS256", PS256)).await, Err(Refused::Algorithm));
    }

    #[tokio::test]
    async fn ed25519_keys_verify() {
        use ring::signature::Ed25519KeyPair;
        let document = Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).unwrap();
        let pair = Ed25519KeyPair::from_pkcs8(document.as_ref()).unwrap();
        let key = rcgen::KeyPair::try_from(document.as_ref()).unwrap().public_key_pem();
        let verifier = verifier(json!({ "algorithms": "EdDSA", "key": key }));
        let signed = unsigned(&json!({ "alg": "EdDSA" }), &claims(json!({})));
        let by = |text: &str| BASE64_URL_SAFE_NO_PAD.encode(pair.sign(text.as_bytes()));
        assert_eq!(verify(&verifier, &format!("{signed}.{}", by(&signed))).await.as_deref(), Ok("alice"));
        assert_eq!(verify(&verifier, &format!("{signed}.{}", by("other"))).await, Err(Refused::Signature));
        let p384 = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
        assert!(Key::read(&p384.public_key_pem(), &[Algorithm::ES384]).is_ok());
    }

    #[test]
    fn configurations_that_would_verify_nothing_are_refused() {
        let problems = |json: Value| {
            let mut problems = Problems::default();
            config(json).check(&mut problems);
            problems.iter().map(|problem| format!("{}: {}", problem.key, problem.message)).collect::<Vec<_>>()
        };
        assert_eq!(problems(json!({})), [""; 0]);
        for (json, key) in [
            (json!({ "algorithms": [] }), "algorithms"),
            (json!({ "algorithms": ["HS256", "RS256"] }), "algorithms"),
            (json!({ "algorithms": ["RS256"] }), "key"),
            (json!({ "key": "short" }), "key"),
            (json!({ "key": null }), ""),
            (json!({ "audience": [] }), "audience"),
            (json!({ "audience": ["any", "a"] }), "audience"),
            (json!({ "issuer": [] }), "issuer"),
            (json!({ "leeway": "1h" }), "leeway"),
            (json!({ "jwks": { "file": "/x" } }), "jwks"),
        ] {
            let found = problems(json.clone());
            assert!(found[0].starts_with(&format!("{key}: ")), "{json}: {found:?}");
            assert!(found.iter().all(|text| !text.contains(SECRET) && !text.contains("short:")), "{found:?}");
        }
    }

    proptest! {
        #[test]
        fn no_token_makes_it_panic(token in prop::collection::vec(any::<u8>(), 0..100), parts in "[A-Za-z0-9_.-]{0,60}") {
            let verifier = verifier(json!({}));
            let keys = KeySet::from(Key::read(SECRET, &[]).unwrap());
            prop_assert!(verifier.judge(&token, &keys, 0.0).is_err());
            prop_assert!(verifier.judge(parts.as_bytes(), &keys, 0.0).is_err());
        }
    }
}
