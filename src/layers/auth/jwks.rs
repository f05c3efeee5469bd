//! Where sets of keys come from: a file, or a URL that is asked again and again.
//!
//! A URL is fetched by one task, whoever needs it: first at once, then every `refresh`, sooner after a failure, and when
//! a token names a key that is not in the set, at most every 30 seconds however many tokens do. Requests wait for it
//! only where there are no keys yet, or the key is unknown, and `timeout` at most. When the URL cannot be fetched the
//! last good set holds for `max_age`; without one, tokens are answered with 503. Nobody is let in unverified.

use std::{
    future::poll_fn,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use http::{StatusCode, Uri, header::ACCEPT};
use http_body::Body as _;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tower::Service;
use tracing::{info, warn};

use super::jwk::KeySet;
use crate::{
    config::{
        Check, HumanDuration, Problems,
        file::{self, Content},
    },
    message::{Body, BoxError, Request},
    telemetry::{Metrics, log::chain},
    upstream::{
        Address, Client,
        client::{self, Host},
    },
};

/// The least time between two fetches.
pub(super) const COOLDOWN: Duration = Duration::from_secs(30);
/// How soon a failed fetch is tried again: this, doubling up to [`COOLDOWN`].
const AGAIN: Duration = Duration::from_secs(1);
/// No set of keys is larger.
const MAX_SET: usize = 1 << 20;

/// Where a set of keys is. Section `jwks` of `jwt`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(rename = "Jwks")]
pub struct Config {
    /// A file, which is watched. This or `url`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// An `https://` URL (`http://` to this machine only). This or `file`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub url: Option<String>,
    /// How often the URL is asked, 1m to 1d. Default `10m`.
    #[serde(default = "default_refresh")]
    pub refresh: HumanDuration,
    /// How long an answer may take, and how long a request waits for keys. 100ms to 30s; default `5s`.
    #[serde(default = "default_timeout")]
    pub timeout: HumanDuration,
    /// How long the last good set holds while the URL cannot be fetched. At least `refresh`, `timeout` and 30s together, for
    /// it must hold while the next one is fetched; default `1d`.
    #[serde(default = "default_max_age")]
    pub max_age: HumanDuration,
    /// The certificates that the URL's server is believed by, in PEM. Default: the system's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
    /// What `ca` says.
    #[serde(skip)]
    pub content: Content,
}

fn default_refresh() -> HumanDuration {
    HumanDuration::from_secs(600)
}

fn default_timeout() -> HumanDuration {
    HumanDuration::from_secs(5)
}

fn default_max_age() -> HumanDuration {
    HumanDuration::from_secs(86_400)
}

/// The one of the two that is given.
pub(super) enum Source<'a> {
    File(&'a Path),
    Url(&'a str),
}

impl Config {
    pub(super) fn source(&self) -> Option<Source<'_>> {
        match (&self.file, &self.url) {
            (Some(file), None) => Some(Source::File(file)),
            (None, Some(url)) => Some(Source::Url(url)),
            _ => None,
        }
    }
}

impl Check for Config {
    fn check(&self, problems: &mut Problems) {
        match self.source() {
            None if self.file.is_some() => {
                problems.add("url", "stands beside `file`: the keys are in one or the other");
            }
            None => problems.add("", "needs `file` or `url`"),
            Some(Source::File(path)) => {
                if let Err(message) = read(path) {
                    problems.add("file", message);
                }
                let plain = Self { file: self.file.clone(), ..Self::at(None) };
                if *self != plain {
                    problems.add("", "has more than `file`: the rest is about a `url`");
                }
            }
            Some(Source::Url(url)) => {
                if let Err(message) = place(url) {
                    problems.add("url", message);
                }
                if !(HumanDuration::from_secs(60)..=HumanDuration::from_secs(86_400)).contains(&self.refresh) {
                    problems.add("refresh", format!("is {}: must be from 1m to 1d", self.refresh));
                }
                if !(HumanDuration::from_millis(100)..=HumanDuration::from_secs(30)).contains(&self.timeout) {
                    problems.add("timeout", format!("is {}: must be from 100ms to 30s", self.timeout));
                }
                let least = self.refresh.get() + self.timeout.get() + COOLDOWN;
                if self.max_age.get() < least {
                    let least = least.as_secs_f64();
                    problems
                        .add("max_age", format!("must be at least `refresh`, `timeout` and 30s together ({least}s)"));
                }
                if let Some(ca) = &self.ca {
                    crate::config::problem::check_readable("ca", ca, problems);
                }
            }
        }
    }
}

impl Config {
    fn at(url: Option<String>) -> Self {
        Self {
            file: None,
            url,
            refresh: default_refresh(),
            timeout: default_timeout(),
            max_age: default_max_age(),
            ca: None,
            content: Content::default(),
        }
    }
}

/// Reads a file.
pub(super) fn read(path: &Path) -> Result<KeySet, String> {
    let mut text = Vec::new();
    let read = file::open(path).and_then(|file| file.take(MAX_SET as u64 + 1).read_to_end(&mut text));
    read.map_err(|error| format!("`{}` cannot be read: {error}", path.display()))?;
    if text.len() > MAX_SET {
        return Err(format!("`{}` is larger than 1MiB", path.display()));
    }
    KeySet::parse(&text).map_err(|message| format!("`{}` {message}", path.display()))
}

/// Whom to ask, and for what.
fn place(url: &str) -> Result<(Address, Uri), String> {
    const FORM: &str = "is no URL of keys: https://HOST[:PORT]/PATH";
    if url.contains('@') {
        return Err("must have no user and password".to_owned());
    }
    let uri: Uri = url.parse().map_err(|_| FORM.to_owned())?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(FORM.to_owned()) };
    let address: Address = format!("{scheme}://{authority}").parse()?;
    let host = authority.host().trim_matches(['[', ']']);
    let is_here = host == "localhost" || host.parse().is_ok_and(|ip: std::net::IpAddr| ip.is_loopback());
    if !address.tls() && !is_here {
        return Err("must be https://: whoever could change the answer on its way could let anybody in".to_owned());
    }
    Ok((address, uri))
}

/// A set behind a URL. Dropping it ends its task.
pub(super) struct Remote {
    known: watch::Receiver<Known>,
    wanted: Arc<Notify>,
    timeout: Duration,
    max_age: Duration,
    _task: JoinSet<()>,
}

/// What the task has come to.
#[derive(Default, Clone)]
struct Known {
    keys: Option<(Arc<KeySet>, Instant)>,
    /// When the last fetch ended, if one has.
    asked: Option<Instant>,
}

impl Remote {
    /// Begins to fetch. Needs a tokio runtime.
    pub(super) fn new(url: &str, config: &Config, metrics: &Metrics) -> Result<Self, BoxError> {
        let (address, uri) = place(url)?;
        let settings = client::Config {
            host: Some(Host::Endpoint),
            tls: client::Tls { ca: config.ca.clone(), content: config.content },
            ..client::Config::default()
        };
        let client = Client::new("jwks", &address, &settings, metrics)?.with_connect_timeout(config.timeout.get());
        let (tell, known) = watch::channel(Known::default());
        let wanted = Arc::new(Notify::new());
        let mut task = JoinSet::new();
        task.spawn(fetch_always(client, uri, config.clone(), tell, wanted.clone()));
        Ok(Self { known, wanted, timeout: config.timeout.get(), max_age: config.max_age.get(), _task: task })
    }

    /// The keys; none if there never were any, or for too long.
    pub(super) async fn keys(&self) -> Option<Arc<KeySet>> {
        if self.known.borrow().asked.is_none() {
            self.wait(None).await;
        }
        let known = self.known.borrow();
        let (keys, since) = known.keys.as_ref()?;
        (since.elapsed() <= self.max_age).then(|| keys.clone())
    }

    /// The keys after one more fetch, if it is time for one; else those that there are.
    pub(super) async fn newer_keys(&self) -> Option<Arc<KeySet>> {
        let asked = self.known.borrow().asked;
        if asked.is_none_or(|asked| asked.elapsed() >= COOLDOWN) {
            self.wanted.notify_one();
            self.wait(asked).await;
        }
        self.keys().await
    }

    /// Waits, not for ever, for a fetch after the one that ended at `asked`.
    async fn wait(&self, asked: Option<Instant>) {
        let mut known = self.known.clone();
        let changed = async move { known.wait_for(|known| known.asked != asked).await.is_ok() };
        // What there is then is looked at anyhow.
        let _in_time = timeout(self.timeout, changed).await.unwrap_or(false);
    }
}

async fn fetch_always(mut client: Client, uri: Uri, config: Config, tell: watch::Sender<Known>, wanted: Arc<Notify>) {
    let mut again = AGAIN;
    let mut failing = false;
    loop {
        let fetched = timeout(config.timeout.get(), fetch(&mut client, &uri)).await;
        let fetched = fetched.unwrap_or_else(|_| Err("it took too long".into()));
        let now = Instant::now();
        let pause = match fetched {
            Ok(keys) => {
                if failing {
                    info!(host = uri.host(), "the keys for tokens are there again");
                }
                (failing, again) = (false, AGAIN);
                tell.send_modify(|known| {
                    let keys = match known.keys.take() {
                        // The same answer is the same keys: what was verified with them stays so.
                        Some((same, _)) if same.has_source_of(&keys) => same,
                        _ => Arc::new(keys),
                    };
                    *known = Known { keys: Some((keys, now)), asked: Some(now) };
                });
                config.refresh.get()
            }
            Err(error) => {
                if !failing {
                    warn!(host = uri.host(), error = chain(&*error), "the keys for tokens cannot be fetched");
                }
                failing = true;
                tell.send_modify(|known| known.asked = Some(now));
                again = (again * 2).min(COOLDOWN);
                again / 2
            }
        };
        tokio::select! {
            () = sleep(pause) => {}
            () = wanted.notified() => sleep_until(now + pause.min(COOLDOWN)).await,
        }
    }
}

async fn fetch(client: &mut Client, uri: &Uri) -> Result<KeySet, BoxError> {
    let mut request = Request::new(Body::empty());
    *request.uri_mut() = uri.clone();
    request.headers_mut().insert(ACCEPT, http::HeaderValue::from_static("application/jwk-set+json, application/json"));
    let response = client.call(request).await?;
    if response.status() != StatusCode::OK {
        return Err(format!("its answer has the status {}", response.status().as_u16()).into());
    }
    let mut body = std::pin::pin!(response.into_body());
    let mut text = Vec::new();
    while let Some(frame) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        if let Ok(data) = frame?.into_data() {
            if text.len() + data.len() > MAX_SET {
                return Err("its answer is larger than 1MiB".into());
            }
            text.extend_from_slice(&data);
        }
    }
    Ok(KeySet::parse(&text).map_err(|message| format!("its answer {message}"))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A set as the task would have it, and the task's ends.
    fn remote() -> (Remote, watch::Sender<Known>) {
        let (tell, known) = watch::channel(Known::default());
        let (timeout, max_age) = (Duration::from_secs(5), Duration::from_secs(3600));
        (Remote { known, wanted: Arc::default(), timeout, max_age, _task: JoinSet::new() }, tell)
    }

    fn fetched() -> Known {
        let set = r#"{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}]}"#;
        let now = Instant::now();
        Known { keys: Some((Arc::new(KeySet::parse(set.as_bytes()).unwrap()), now)), asked: Some(now) }
    }

    #[tokio::test(start_paused = true)]
    async fn the_first_keys_are_waited_for_and_not_for_ever() {
        let (remote, tell) = remote();
        let start = Instant::now();
        assert!(remote.keys().await.is_none());
        assert_eq!(start.elapsed(), Duration::from_secs(5));
        let answer = async { tell.send_replace(fetched()) };
        let (keys, _) = tokio::join!(remote.keys(), answer);
        assert!(keys.is_some());
        tell.send_replace(Known { keys: None, asked: Some(Instant::now()) });
        let start = Instant::now();
        assert!(remote.keys().await.is_none() && start.elapsed().is_zero(), "a failure is known at once");
    }

    #[tokio::test(start_paused = true)]
    async fn an_unknown_key_asks_once_in_a_while() {
        let (remote, tell) = remote();
        tell.send_replace(fetched());
        let old = remote.keys().await.unwrap();
        let start = Instant::now();
        assert!(Arc::ptr_eq(&remote.newer_keys().await.unwrap(), &old) && start.elapsed().is_zero(), "too soon");
        tokio::time::advance(COOLDOWN).await;
        let answer = async {
            remote.wanted.notified().await;
            tell.send_replace(fetched());
        };
        let (new, ()) = tokio::join!(remote.newer_keys(), answer);
        assert!(!Arc::ptr_eq(&new.unwrap(), &old));
    }

    #[tokio::test(start_paused = true)]
    async fn old_keys_hold_for_a_while_and_no_longer() {
        let (remote, tell) = remote();
        tell.send_replace(fetched());
        tokio::time::advance(Duration::from_secs(3600)).await;
        tell.send_modify(|known| known.asked = Some(Instant::now()));
        assert!(remote.keys().await.is_some());
        tokio::time::advance(Duration::from_millis(1)).await;
        assert!(remote.keys().await.is_none());
    }

    #[test]
    fn keys_come_over_tls_or_from_this_machine() {
        for good in
            ["https://id.example.com/keys?a=b", "http://127.0.0.1:8080/jwks", "http://[::1]:1/", "http://localhost/x"]
        {
            assert!(place(good).is_ok(), "{good}");
        }
        for bad in
            ["", "/keys", "id.example.com/keys", "http://id.example.com/keys", "ftp://localhost/", "https://u:p@h/"]
        {
            let message = place(bad).unwrap_err();
            assert!(!message.contains("u:p"), "{bad}: {message}");
        }
        let (address, uri) = place("https://id.example.com/keys?a=b").unwrap();
        assert_eq!(
            (address.to_string().as_str(), uri.path_and_query().unwrap().as_str()),
            ("id.example.com:443", "/keys?a=b")
        );
    }
}
