//! A new configuration without a restart.
//!
//! Asked for by SIGHUP, by a file whose content changed (that of the configuration, or one that it names: of keys,
//! secrets, or certificates to trust), or by `POST /reload`. The whole configuration is read, checked and built first;
//! only then it takes effect, in one step, for every request that arrives from then on. One that is wrong anywhere
//! changes nothing, and what was made for it goes again: it is logged with all its problems, counted, and told of by
//! `/health`. Files that do not answer within half a minute are wrong, too.
//!
//! What a running process cannot change is refused by name, so that no file seems to be in force that is not:
//! see [`RESTART`].

use std::{
    collections::BTreeSet,
    future::pending,
    hash::{DefaultHasher, Hash, Hasher},
    io, mem,
    os::unix::fs::MetadataExt,
    path::PathBuf,
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use serde_json::Value;
use tokio::{
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::{JoinHandle, spawn_blocking},
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{error, info, warn};

use super::{Shutdown, Timing, Tls};
use crate::{
    admin::{self, Admin, Asked},
    config::{
        file,
        load::{Sources, Tree},
        problem::Problems,
    },
    registry::Registry,
    settings::Settings,
    stack::Stack,
    telemetry::log::chain,
};

/// How often the files are looked at. What has changed is read when it then stays the same for another look, so that a
/// file is not read while it is being written.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// After how many looks that were left out, because an earlier one goes on, the operator is told.
const MISSED: u32 = 30;
/// How long a reload may take to read its files.
const PATIENCE: Duration = Duration::from_secs(30);

/// The sections that a running process cannot change. (Of `log`, `access` can.)
pub const RESTART: [&str; 5] = ["listen", "admin", "threads", "limits", "log"];

/// Keeps the stack up to date with its sources.
#[derive(Debug)]
pub(super) struct Reloads {
    pub(super) sources: Arc<Sources>,
    pub(super) settings: Settings,
    pub(super) stack: Arc<ArcSwap<Stack>>,
    pub(super) registry: Arc<Registry>,
    pub(super) timing: Arc<Timing>,
    pub(super) shutdown: Shutdown,
    pub(super) certificates: Vec<Arc<Tls>>,
    pub(super) admin: Admin,
    /// A reading that took too long, and goes on. There is never a second one.
    pub(super) reading: Option<JoinHandle<Result<Loaded, Problems>>>,
}

/// A configuration that could take effect.
#[derive(Debug)]
pub(super) struct Loaded {
    settings: Settings,
    tree: Tree,
    stack: Stack,
}

impl Reloads {
    /// Reloads whenever it is asked for, until it is dropped.
    ///
    /// # Errors
    /// The process may not handle signals. Nothing has been waited for then.
    pub(super) fn run(self, asked: mpsc::Receiver<Asked>) -> io::Result<impl Future<Output = ()> + Send> {
        Ok(self.listen(signal(SignalKind::hangup())?, asked))
    }

    async fn listen(mut self, mut hangup: Signal, mut asked: mpsc::Receiver<Asked>) {
        let mut files = watch(self.files(), Vec::new());
        let mut look = interval(LOOK_EVERY);
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // A look that goes on, and for how many more it was too late: nothing else waits for it.
        let (mut looking, mut missed) = (None, 0);
        loop {
            let reloaded = tokio::select! {
                Some(()) = hangup.recv() => {
                    self.registry.log().reopen();
                    // The outcome is logged.
                    drop(self.reload("SIGHUP").await);
                    true
                }
                Some(done) = asked.recv() => {
                    // Who asked may have left.
                    drop(done.send(self.reload("POST /reload").await));
                    true
                }
                (watched, changed) = end_of(&mut looking) => {
                    (files, looking) = (watched, None);
                    if changed {
                        drop(self.reload("the file changed").await);
                    }
                    changed
                }
                _ = look.tick() => {
                    if looking.is_none() {
                        (looking, missed) = (Some(look_at(self.files(), mem::take(&mut files))), 0);
                    } else {
                        missed += 1;
                        if missed == MISSED {
                            warn!("the files of the configuration do not answer, changes are not seen");
                        }
                    }
                    false
                }
            };
            if reloaded {
                // Files that are new are looked at at once.
                look.reset_immediately();
            }
        }
    }

    /// What the configuration in force is made of: its file, and those that it names.
    fn files(&self) -> BTreeSet<PathBuf> {
        self.sources.file.iter().cloned().chain(self.settings.files()).collect()
    }

    /// Reads, checks and builds, on a thread that may wait, though not for ever: a file system may be one that does not
    /// answer any more.
    async fn read(&mut self) -> Result<Loaded, Problems> {
        let late = || {
            let mut problems = Problems::default();
            let seconds = PATIENCE.as_secs();
            problems.add("", format!("was not read within {seconds} s: does the file system of all its files answer?"));
            problems
        };
        if let Some(earlier) = &mut self.reading {
            // What it comes to is too old by now.
            drop(timeout(PATIENCE, earlier).await.map_err(|_| late())?);
            self.reading = None;
        }
        let (sources, registry) = (self.sources.clone(), self.registry.clone());
        let (current, certificates) = (self.settings.clone(), self.certificates.clone());
        let admin = self.admin.clone();
        let mut reading = spawn_blocking(move || {
            for tls in &certificates {
                tls.look();
            }
            load(&sources, &current, &registry, &admin)
        });
        let Ok(loaded) = timeout(PATIENCE, &mut reading).await else {
            self.reading = Some(reading);
            return Err(late());
        };
        loaded.unwrap_or_else(|error| {
            error!(%error, "the reload panicked");
            let mut problems = Problems::default();
            problems.add("", "could not be read: a bug of sidegate's, see the log");
            Err(problems)
        })
    }

    /// Reads, checks, builds, and swaps. Answers with the number of the new configuration.
    async fn reload(&mut self, why: &'static str) -> Result<u64, Problems> {
        let loaded = self.read().await;
        let process = self.registry.metrics().process();
        match loaded {
            Ok(loaded) => {
                process.reloads.inc();
                self.take(loaded);
                let generation = self.admin.configuration().generation;
                info!(why, generation, "reloaded");
                Ok(generation)
            }
            Err(problems) => {
                // What was made for it before it failed goes.
                self.registry.retain(&self.settings);
                process.reloads_refused.inc();
                let list: Vec<_> = problems.iter().map(ToString::to_string).collect();
                warn!(why, problems = list.join("; "), "reload refused, nothing has changed");
                self.admin.configuration().refused = Some(list);
                Err(problems)
            }
        }
    }

    fn take(&mut self, Loaded { settings, tree, stack }: Loaded) {
        let stack = Arc::new(stack);
        self.stack.store(stack.clone());
        // Only now: the new stack holds what it goes on using.
        self.registry.retain(&settings);
        stack.begin();
        self.timing.set(&settings.defaults.timeouts);
        self.shutdown.set_times(settings.drain);
        tell(&self.admin, &settings, &tree);
        self.settings = settings;
    }
}

/// Lets the operator see the configuration that has taken effect.
pub(super) fn tell(admin: &Admin, settings: &Settings, tree: &Tree) {
    let shown = |tree: serde_json::Result<Value>| tree.map_or(Value::Null, admin::redact);
    let (given, effective) = (shown(tree.to_json()), shown(settings.effective()));
    // A page of this port is no component.
    let upstreams = settings.upstreams.iter().filter(|(_, upstream)| upstream.admin.is_none());
    let upstreams = upstreams.map(|(name, upstream)| {
        let endpoints = upstream.endpoints.iter().flatten().map(|endpoint| endpoint.url.to_string());
        (name.clone(), endpoints.collect())
    });
    let upstreams = upstreams.collect();
    let mut configuration = admin.configuration();
    configuration.generation += 1;
    configuration.given = given;
    configuration.effective = effective;
    configuration.upstreams = upstreams;
    configuration.refused = None;
}

fn load(sources: &Sources, current: &Settings, registry: &Registry, admin: &Admin) -> Result<Loaded, Problems> {
    let mut problems = Problems::default();
    if let Some(path) = &sources.file
        && let Err(error) = file::open(path)
    {
        problems.add("", format!("{}: cannot be read: {error}", path.display()));
        return Err(problems);
    }
    let (settings, tree) = Settings::load(sources)?;
    for key in needs_restart(current, &settings) {
        problems.add(key, "cannot change without a restart: put it back, or restart sidegate");
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    match Stack::build(&settings, registry, admin) {
        Ok(stack) => Ok(Loaded { settings, tree, stack }),
        Err(error) => {
            problems.add("", chain(&error));
            Err(problems)
        }
    }
}

fn needs_restart(old: &Settings, new: &Settings) -> Vec<&'static str> {
    let log = |settings: &Settings| crate::telemetry::log::Config { access: true, ..settings.log.clone() };
    let changed = [
        old.listen != new.listen,
        old.admin != new.admin,
        old.threads != new.threads,
        old.limits != new.limits,
        log(old) != log(new),
    ];
    RESTART.into_iter().zip(changed).filter_map(|(key, changed)| changed.then_some(key)).collect()
}

/// A file, by its content: links may be swapped and times may lie.
#[derive(Debug)]
struct Watched {
    path: PathBuf,
    stamp: Option<Stamp>,
    /// What the running configuration was made of, or what was refused last.
    known: Content,
    /// What the last look found instead.
    found: Option<Content>,
}

/// A hash of a file's content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Of(u64),
    Unreadable,
}

/// Device, inode, size, and time of modification.
type Stamp = (u64, u64, u64, i64, i64);

/// Watches `paths`: those that were watched as before, the others from now on.
fn watch(paths: BTreeSet<PathBuf>, mut watched: Vec<Watched>) -> Vec<Watched> {
    watched.retain(|file| paths.contains(&file.path));
    let new = paths.into_iter().filter(|path| watched.iter().all(|file| file.path != *path)).collect::<Vec<_>>();
    watched.extend(new.into_iter().map(Watched::new));
    watched
}

/// What was watched, and whether any of it has changed.
type Looked = (Vec<Watched>, bool);

/// Looks at the files at `paths`, on a thread that may wait.
fn look_at(paths: BTreeSet<PathBuf>, files: Vec<Watched>) -> JoinHandle<Looked> {
    spawn_blocking(move || {
        let mut files = watch(paths, files);
        // Each of them is looked at.
        let changed = files.iter_mut().filter_map(|file| file.has_changed().then_some(())).count();
        (files, changed > 0)
    })
}

/// Waits for the end of a look, if there is one.
async fn end_of(looking: &mut Option<JoinHandle<Looked>>) -> Looked {
    match looking {
        Some(looking) => looking.await.unwrap_or_default(),
        None => pending().await,
    }
}

impl Watched {
    fn new(path: PathBuf) -> Self {
        let mut new = Self { path, stamp: None, known: Content::Unreadable, found: None };
        new.stamp = new.stamp();
        new.known = new.content();
        new
    }

    /// Whether the content is another one, and was so at the last look already. Says so once.
    fn has_changed(&mut self) -> bool {
        let stamp = self.stamp();
        if stamp == self.stamp && self.found.is_none() {
            return false;
        }
        self.stamp = stamp;
        let content = self.content();
        if content == self.known {
            self.found = None;
            return false;
        }
        if self.found != Some(content) {
            self.found = Some(content);
            return false;
        }
        self.known = content;
        self.found = None;
        true
    }

    fn stamp(&self) -> Option<Stamp> {
        let found = std::fs::metadata(&self.path).ok()?;
        Some((found.dev(), found.ino(), found.size(), found.mtime(), found.mtime_nsec()))
    }

    fn content(&self) -> Content {
        let Ok(text) = file::read(&self.path) else { return Content::Unreadable };
        let mut hasher = DefaultHasher::new();
        text.hash(&mut hasher);
        Content::Of(hasher.finish())
    }
}

/// How the operator's port may be used.
pub(super) fn access(admin: &crate::settings::Admin) -> Result<admin::Access, String> {
    use crate::settings::listener::Address;

    let token = admin.token.as_ref().map(crate::config::Secret::reveal).transpose();
    Ok(admin::Access {
        local: admin.listen.is_local(),
        loopback: admin.listen.is_local() && matches!(admin.listen, Address::Tcp(_)),
        token: token.map_err(|error| format!("admin.token: {error}"))?,
    })
}

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    use super::*;
    use crate::{
        message::{Body, Response},
        telemetry::{Metrics, log},
    };

    const FILE: &str = "admin: off\nupstreams: {a: {respond: {text: one}}}\n";

    fn reloads(file: &Path) -> (Reloads, mpsc::Receiver<Asked>, log::Guard) {
        let metrics = Metrics::new();
        let sources = Sources { file: Some(file.to_owned()), ..Sources::default() };
        let (settings, tree) = Settings::load(&sources).unwrap();
        let config = log::Config { file: Some(file.with_extension("log")), ..log::Config::default() };
        let (writer, guard) = log::open(&config, metrics.process().log_lines_dropped.clone()).unwrap();
        let registry = Arc::new(Registry::new(metrics, writer));
        let shutdown = Shutdown::default();
        let access = admin::Access { local: true, loopback: false, token: None };
        let (admin, asked) = Admin::new(registry.clone(), shutdown.readiness().clone(), access);
        let stack = Arc::new(ArcSwap::from_pointee(Stack::build(&settings, &registry, &admin).unwrap()));
        tell(&admin, &settings, &tree);
        let (timing, certificates) = (Arc::default(), Vec::new());
        let sources = Arc::new(sources);
        (
            Reloads { sources, settings, stack, registry, timing, shutdown, certificates, admin, reading: None },
            asked,
            guard,
        )
    }

    fn folder(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("sidegate.yaml");
        fs::write(&file, text).unwrap();
        (folder, file)
    }

    async fn text(stack: &ArcSwap<Stack>) -> String {
        let request = http::Request::get("http://a/").header("host", "a").body(Body::empty()).unwrap();
        let response: Response = stack.load().call(request).await.map(Body::new);
        let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap();
        String::from_utf8(body.to_bytes().into()).unwrap()
    }

    #[tokio::test]
    async fn a_good_file_takes_effect_and_a_bad_one_changes_nothing() {
        let (_folder, file) = folder(FILE);
        let (mut reloads, _asked, _guard) = reloads(&file);
        let stack = reloads.stack.clone();
        assert_eq!(text(&stack).await, "one");

        fs::write(&file, FILE.replace("one", "two")).unwrap();
        assert_eq!(reloads.reload("test").await.unwrap(), 2);
        assert_eq!(text(&stack).await, "two");

        fs::write(&file, "upstreams: {}\nthreads: none").unwrap();
        let problems = reloads.reload("test").await.unwrap_err();
        assert!(problems.len() >= 2, "{problems}");
        assert_eq!(text(&stack).await, "two");
        let metrics = reloads.registry.metrics().process().clone();
        assert_eq!((metrics.reloads.get(), metrics.reloads_refused.get()), (1, 1));
        assert!(reloads.admin.configuration().refused.is_some());

        fs::write(&file, FILE).unwrap();
        assert_eq!(reloads.reload("test").await.unwrap(), 3);
        assert!(reloads.admin.configuration().refused.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn files_that_do_not_answer_are_not_waited_for_for_ever() {
        let (_folder, file) = folder(FILE);
        let (mut reloads, _asked, _guard) = reloads(&file);
        let reading = tokio::spawn(pending());
        let end = reading.abort_handle();
        reloads.reading = Some(reading);
        let begun = tokio::time::Instant::now();
        for times in 1..=2 {
            let problems = reloads.reload("test").await.unwrap_err().to_string();
            assert!(problems.starts_with("was not read within 30 s"), "{problems}");
            assert_eq!(begun.elapsed(), PATIENCE * times);
        }
        end.abort();
        assert_eq!(reloads.reload("test").await.unwrap(), 2, "it goes on when they do");
    }

    #[tokio::test]
    async fn what_needs_a_restart_is_refused_by_name() {
        let (_folder, file) = folder(FILE);
        let (mut reloads, _asked, _guard) = reloads(&file);
        fs::write(&file, format!("{FILE}listen: 127.0.0.1:9\nthreads: 3\nlog: {{access: false}}\n")).unwrap();
        let problems = reloads.reload("test").await.unwrap_err();
        let mut keys: Vec<_> = problems.iter().map(|problem| problem.key.as_str()).collect();
        keys.sort_unstable();
        assert_eq!(keys, ["listen", "threads"]);
    }

    #[tokio::test]
    async fn timeouts_of_connections_and_of_the_drain_change_with_the_file() {
        let (_folder, file) = folder(FILE);
        let (mut reloads, _asked, _guard) = reloads(&file);
        fs::write(&file, format!("{FILE}drain: {{timeout: 3s}}\ndefaults: {{timeouts: {{keepalive: 7s}}}}\n")).unwrap();
        reloads.reload("test").await.unwrap();
        assert_eq!(reloads.timing.keepalive(), Duration::from_secs(7));
        assert_eq!(reloads.shutdown.times().timeout.get(), Duration::from_secs(3));
    }

    #[tokio::test(start_paused = true)]
    async fn a_changed_file_is_noticed_and_the_port_is_answered() {
        let (folder, file) = folder(FILE);
        let (reloads, asked, _guard) = reloads(&file);
        let (stack, admin) = (reloads.stack.clone(), reloads.admin.clone());
        let running = tokio::spawn(reloads.run(asked).unwrap());
        tokio::time::sleep(Duration::from_secs(3)).await;
        // As Kubernetes does it: a link is swapped, and no time of modification need be newer.
        let next = folder.path().join("next");
        fs::write(&next, FILE.replace("one", "two")).unwrap();
        fs::rename(&next, &file).unwrap();
        for _ in 0..100 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            if admin.configuration().generation == 2 {
                break;
            }
        }
        assert_eq!(text(&stack).await, "two");

        let request = http::Request::post("/reload").header("host", "a").body(Body::empty()).unwrap();
        assert_eq!(admin.clone().answer(request).await.status(), 200);
        running.abort();
    }

    #[test]
    fn a_file_has_changed_when_its_new_content_was_seen_twice() {
        let (_folder, file) = folder("one");
        let mut watched = Watched::new(file.clone());
        assert!(!watched.has_changed());
        fs::write(&file, "half of t").unwrap();
        assert!(!watched.has_changed());
        fs::write(&file, "the whole").unwrap();
        assert!(!watched.has_changed());
        assert!(watched.has_changed());
        assert!(!watched.has_changed(), "once");
        fs::write(&file, "back and").unwrap();
        assert!(!watched.has_changed());
        fs::write(&file, "the whole").unwrap();
        assert!(!watched.has_changed());
        assert!(!watched.has_changed(), "it is as it was");
        fs::remove_file(&file).unwrap();
        assert!(!watched.has_changed());
        assert!(watched.has_changed(), "it is gone");
    }
}
