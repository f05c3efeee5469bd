//! How Redis is reached. Section `redis` of the file.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use ::redis::{
    ConnectionAddr, ConnectionInfo, IntoConnectionInfo, ProtocolVersion, RedisConnectionInfo, TlsCertificates,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize, Serializer};

use super::{MAX_PREFIX, breaker};
use crate::config::{Check, HumanDuration, OneOrMany, Problems, Secret, file, problem::check_readable, text};

/// Redis or Valkey, which all replicas of sidegate share. Section `redis`. Without it, and while it is out of order,
/// each replica keeps what it knows in memory. By itself the section only connects, pings and reports: policies use it.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Redis")]
pub struct Config {
    /// Where it is: `redis://[USER[:PASSWORD]@]HOST[:PORT][/DB]`, `rediss://` for TLS, `unix:/PATH`; or a list of up to 64,
    /// of a cluster's nodes or of Sentinels.
    pub url: OneOrMany<Address>,
    /// The user of Redis' ACL. Default: that of `url`, or the default user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The password. Default: that of `url`, or none.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "shown")]
    pub password: Option<Secret>,
    /// The number of the database, 0 to 65535. Default: that of `url`, or 0. A cluster has only 0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub database: Option<u16>,
    /// A PEM file with the certificates that `rediss://` trusts. Default: the system's roots.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// Whether it is a Redis Cluster, of which `url` names some nodes. Default `false`.
    #[serde(default)]
    pub cluster: bool,
    /// Where `url` names Sentinels: what they call the master.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sentinel: Option<Sentinel>,
    /// `false` does without Redis and leaves the section where it is. Default `true`.
    #[serde(default = "yes")]
    pub enabled: bool,
    /// How long a call may take that a request waits for, 1ms to 10s. Default `50ms`.
    #[serde(default = "timeout")]
    pub timeout: HumanDuration,
    /// How long a connection may take to be made, 10ms to 1m. Requests do not wait for it. Default `1s`.
    #[serde(default = "connect_timeout")]
    pub connect_timeout: HumanDuration,
    /// What every key begins with, 1 to 64 letters, digits, `_`, `-`, `.`, `:` or `/`. Installations that share a Redis
    /// have their own each; replicas of one have the same. Default `sidegate`.
    #[serde(default = "prefix")]
    pub prefix: String,
    /// When it is left alone, and how often it is probed then.
    #[serde(default)]
    pub breaker: breaker::Config,
}

/// The master that Sentinels watch. Section `redis.sentinel`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "RedisSentinel")]
pub struct Sentinel {
    /// What the Sentinels call it, as in `mymaster`.
    pub master: String,
    /// The user of the Sentinels' own ACL. Default: the default user.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// The password of the Sentinels themselves. Default none.
    #[serde(default, skip_serializing_if = "Option::is_none", serialize_with = "shown")]
    pub password: Option<Secret>,
}

fn yes() -> bool {
    true
}

fn timeout() -> HumanDuration {
    HumanDuration::from_millis(50)
}

fn connect_timeout() -> HumanDuration {
    HumanDuration::from_secs(1)
}

fn prefix() -> String {
    "sidegate".to_owned()
}

#[expect(clippy::ref_option, reason = "serde hands over a reference to the field")]
fn shown<S: Serializer>(secret: &Option<Secret>, to: S) -> Result<S::Ok, S::Error> {
    secret.as_ref().map(Secret::shown).serialize(to)
}

/// Where a Redis, a node or a Sentinel is. What it shows has no password.
#[derive(Clone, PartialEq, Eq)]
pub struct Address {
    tls: bool,
    at: At,
    user: Option<String>,
    password: Option<String>,
    database: Option<u16>,
}

#[derive(Clone, PartialEq, Eq)]
enum At {
    Tcp(String, u16),
    Unix(PathBuf),
}

impl Address {
    fn addr(&self) -> ConnectionAddr {
        match &self.at {
            At::Tcp(host, port) if self.tls => {
                ConnectionAddr::TcpTls { host: host.clone(), port: *port, insecure: false, tls_params: None }
            }
            At::Tcp(host, port) => ConnectionAddr::Tcp(host.clone(), *port),
            At::Unix(path) => ConnectionAddr::Unix(path.clone()),
        }
    }

    /// Without user and password, as logs name it.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.at {
            At::Tcp(host, port) if host.contains(':') => format!("[{host}]:{port}"),
            At::Tcp(host, port) => format!("{host}:{port}"),
            At::Unix(path) => format!("unix:{}", path.display()),
        }
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        // The text is not repeated: it may hold a password.
        const FORMS: &str = "redis://[USER[:PASSWORD]@]HOST[:PORT][/DB], rediss://... for TLS, or unix:/PATH";
        let wrong = |what: &str| format!("{what}: {FORMS}");
        if let Some(path) = text.strip_prefix("unix:") {
            if !path.starts_with('/') || path.starts_with("//") || path.contains(['?', '#']) {
                return Err(wrong("needs an absolute path and nothing behind it"));
            }
            let at = At::Unix(path.into());
            return Ok(Self { tls: false, at, user: None, password: None, database: None });
        }
        let tls = match text.split_once("://") {
            Some(("redis" | "valkey", _)) => false,
            Some(("rediss" | "valkeys", _)) => true,
            _ => return Err(wrong("is no address of a Redis")),
        };
        if text.contains(['?', '#']) {
            return Err(wrong("has more than an address"));
        }
        let rest = text.split_once("://").map_or("", |(_, rest)| rest);
        if let Some((_, database)) = rest.rsplit('@').next().and_then(|rest| rest.split_once('/'))
            && !database.is_empty()
            && database.parse::<u16>().is_err()
        {
            return Err(wrong("has a database that is no number"));
        }
        // The crate knows the two names of Redis only.
        let scheme = if tls { "rediss" } else { "redis" };
        let info: ConnectionInfo =
            format!("{scheme}://{rest}").into_connection_info().map_err(|_| wrong("is no address of a Redis"))?;
        let settings = info.redis_settings();
        let at = match info.addr() {
            ConnectionAddr::Tcp(host, port) | ConnectionAddr::TcpTls { host, port, .. } => {
                let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
                At::Tcp(host.to_owned(), *port)
            }
            _ => return Err(wrong("is no address of a Redis")),
        };
        let database = rest.rsplit('@').next().and_then(|rest| rest.split_once('/')).map(|(_, database)| database);
        Ok(Self {
            tls,
            at,
            user: settings.username().filter(|user| !user.is_empty()).map(str::to_owned),
            password: settings.password().map(str::to_owned),
            database: database.and_then(|database| database.parse().ok()),
        })
    }
}

/// The form of the configuration. A password is not in it.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let At::Unix(path) = &self.at {
            return write!(f, "unix:{}", path.display());
        }
        f.write_str(if self.tls { "rediss://" } else { "redis://" })?;
        if self.password.is_some() {
            write!(f, "{}@", Secret::REDACTED)?;
        } else if let Some(user) = &self.user {
            write!(f, "{user}@")?;
        }
        f.write_str(&self.name())?;
        self.database.map_or(Ok(()), |database| write!(f, "/{database}"))
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

text!(Address, "RedisAddress", {
    "description": "Where a Redis is, as in `redis://127.0.0.1:6379/0`, `rediss://HOST` or `unix:/PATH`.",
    "pattern": "^(redis|rediss|valkey|valkeys|unix):.+",
});

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        self.check_addresses(problems);
        let mut within = |key: &str, value: HumanDuration, least: u64, most: u64, range: &str| {
            let (least, most) = (Duration::from_millis(least), Duration::from_millis(most));
            if !(least..=most).contains(&value.get()) {
                problems.add(key, format!("is {value}: must be from {range}"));
            }
        };
        within("timeout", self.timeout, 1, 10_000, "1ms to 10s");
        within("connect_timeout", self.connect_timeout, 10, 60_000, "10ms to 1m");
        let is_right = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | ':' | '/');
        if self.prefix.is_empty() || self.prefix.len() > MAX_PREFIX || !self.prefix.chars().all(is_right) {
            problems.add("prefix", "must be 1 to 64 letters, digits, `_`, `-`, `.`, `:` or `/`");
        }
        problems.at("breaker", |problems| self.breaker.check(problems));
        if let Some(password) = &self.password {
            problems.at("password", |problems| password.check(problems));
        }
        if let Some(sentinel) = &self.sentinel {
            problems.at("sentinel", |problems| {
                if sentinel.master.is_empty() {
                    problems.add("master", "is empty: say what the Sentinels call it, as in `mymaster`");
                }
                if let Some(password) = &sentinel.password {
                    problems.at("password", |problems| password.check(problems));
                }
            });
        }
        if let Some(ca) = &self.ca
            && check_readable("ca", ca, problems)
        {
            if !self.url.iter().any(|address| address.tls) {
                problems.add("ca", "has no effect: no `url` begins with `rediss://`");
            } else if let Err(error) = self.certificates() {
                problems.add("ca", error);
            }
        }
    }
}

impl Config {
    fn check_addresses(&self, problems: &mut Problems) {
        let urls = &self.url.0;
        let [first, others @ ..] = &**urls else {
            return problems.add("url", "is empty: name a Redis, as in `redis://127.0.0.1:6379`");
        };
        if urls.len() > 64 {
            problems.add("url", "has more than 64");
        }
        if self.cluster && self.sentinel.is_some() {
            problems.add("sentinel", "stands beside `cluster: true`: a Redis has one of them");
        }
        if !others.is_empty() && !self.cluster && self.sentinel.is_none() {
            problems.add("url", "has several: say `cluster: true`, or what Sentinels call the master in `sentinel`");
        }
        let same = |other: &Address| {
            (other.tls, &other.user, &other.password, other.database)
                == (first.tls, &first.user, &first.password, first.database)
        };
        if !others.iter().all(same) {
            problems.add("url", "must have the same scheme, user, password and database in all");
        }
        if (self.cluster || self.sentinel.is_some()) && urls.iter().any(|url| matches!(url.at, At::Unix(_))) {
            problems.add("url", "a Unix socket leads to a single Redis");
        }
        let twice = [
            ("user", self.user.is_some() && first.user.is_some()),
            ("password", self.password.is_some() && first.password.is_some()),
            ("database", self.database.is_some() && first.database.is_some()),
        ];
        for (key, _) in twice.into_iter().filter(|(_, twice)| *twice) {
            problems.add(key, "is in `url`, too: say it once");
        }
        let user = self.user.is_some() || first.user.is_some();
        if user && self.password.is_none() && first.password.is_none() {
            problems.add("user", "needs a `password`");
        }
        if self.cluster && self.database.or(first.database).is_some_and(|database| database != 0) {
            problems.add("database", "is not 0: a cluster has no other");
        }
    }

    /// The files that it is made of, which are to be watched.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        let passwords = self.password.iter().chain(self.sentinel.iter().flat_map(|sentinel| &sentinel.password));
        self.ca.as_deref().into_iter().chain(passwords.filter_map(Secret::path))
    }

    fn certificates(&self) -> Result<Option<Vec<u8>>, String> {
        use rustls::pki_types::{CertificateDer, pem::PemObject};

        let Some(ca) = &self.ca else { return Ok(None) };
        let shown = ca.display();
        let pem = file::read(ca).map_err(|error| format!("`{shown}` cannot be read: {error}"))?;
        let found = CertificateDer::pem_slice_iter(&pem).collect::<Result<Vec<_>, _>>();
        match found {
            Ok(found) if !found.is_empty() => Ok(Some(pem)),
            Ok(_) => Err(format!("`{shown}` has no PEM section `CERTIFICATE`")),
            Err(error) => Err(format!("`{shown}`: {error}")),
        }
    }

    /// Reads secrets and files: what a connection is made of.
    ///
    /// # Errors
    /// What cannot be read, never its content.
    pub(super) fn resolve(&self) -> Result<Resolved, String> {
        let reveal = |key: &str, secret: &Option<Secret>| {
            secret.as_ref().map(Secret::reveal).transpose().map_err(|error| format!("{key}: {error}"))
        };
        let password = reveal("password", &self.password)?;
        let sentinel = self.sentinel.as_ref().map(|sentinel| &sentinel.password);
        let sentinel_password = sentinel.map_or(Ok(None), |password| reveal("sentinel.password", password))?;
        let ca = self.certificates().map_err(|error| format!("ca: {error}"))?;
        Ok(Resolved { config: self.clone(), password, sentinel_password, ca })
    }
}

/// A configuration with what its secrets and files say. Where it is the same, so is the connection.
#[derive(Clone, PartialEq, Eq)]
pub(super) struct Resolved {
    pub(super) config: Config,
    password: Option<String>,
    pub(super) sentinel_password: Option<String>,
    ca: Option<Vec<u8>>,
}

impl Resolved {
    fn first(&self) -> Option<&Address> {
        self.config.url.iter().next()
    }

    pub(super) fn tls(&self) -> bool {
        self.first().is_some_and(|address| address.tls)
    }

    pub(super) fn user(&self) -> Option<&str> {
        self.config.user.as_deref().or_else(|| self.first()?.user.as_deref())
    }

    pub(super) fn password(&self) -> Option<&str> {
        self.password.as_deref().or_else(|| self.first()?.password.as_deref())
    }

    pub(super) fn database(&self) -> u16 {
        self.config.database.or_else(|| self.first()?.database).unwrap_or(0)
    }

    pub(super) fn certificates(&self) -> TlsCertificates {
        TlsCertificates { client_tls: None, root_cert: self.ca.clone() }
    }

    pub(super) fn addrs(&self) -> Vec<ConnectionAddr> {
        self.config.url.iter().map(Address::addr).collect()
    }

    /// How each address is connected to.
    pub(super) fn infos(&self, protocol: ProtocolVersion) -> ::redis::RedisResult<Vec<ConnectionInfo>> {
        let mut settings = RedisConnectionInfo::default().set_db(self.database().into()).set_protocol(protocol);
        if let Some(user) = self.user() {
            settings = settings.set_username(user);
        }
        if let Some(password) = self.password() {
            settings = settings.set_password(password);
        }
        let infos = self.addrs().into_iter().map(|addr| {
            let info = addr.into_connection_info()?;
            Ok(info.set_redis_settings(settings.clone()))
        });
        infos.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    #[test]
    fn addresses_are_read_in_every_form_and_shown_without_password() {
        for (given, shown, name) in [
            ("redis://127.0.0.1", "redis://127.0.0.1:6379", "127.0.0.1:6379"),
            ("redis://localhost:7000/3", "redis://localhost:7000/3", "localhost:7000"),
            ("valkey://h/0", "redis://h:6379/0", "h:6379"),
            ("rediss://h:6380", "rediss://h:6380", "h:6380"),
            ("redis://[::1]:7000", "redis://[::1]:7000", "[::1]:7000"),
            ("redis://ann@h", "redis://ann@h:6379", "h:6379"),
            ("redis://ann:hush@h/1", "redis://[redacted]@h:6379/1", "h:6379"),
            ("redis://:hush@h", "redis://[redacted]@h:6379", "h:6379"),
            ("unix:/run/redis.sock", "unix:/run/redis.sock", "unix:/run/redis.sock"),
        ] {
            let address = address(given);
            assert_eq!(address.to_string(), shown);
            assert_eq!(format!("{address:?}"), shown);
            assert_eq!(address.name(), name);
        }
        let address = address("redis://an%6e:h%75sh@h");
        assert_eq!((address.user.as_deref(), address.password.as_deref()), (Some("ann"), Some("hush")));
    }

    #[test]
    fn what_is_wrong_is_not_repeated() {
        for wrong in [
            "",
            "hush",
            "http://:hush@h",
            "redis://:hush@h/x",
            "redis://:hush@h:port",
            "redis://:hush@h?x=hush",
            "rediss://:hush@h#insecure",
            "unix:hush",
            "unix:/run/a?pass=hush",
        ] {
            let error = wrong.parse::<Address>().unwrap_err();
            assert!(error.contains("redis://[USER"), "{error}");
            assert!(!error.contains("hush"), "{error}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_makes_the_parser_panic(text in "(redis|rediss|unix)?:?/{0,2}[a-z:@\\[\\]/?#%0-9]{0,20}") {
            drop(text.parse::<Address>());
        }
    }
}
