//! The command line.

use std::{
    error::Error,
    io::{self, Write},
    path::PathBuf,
    process::ExitCode,
    sync::Arc,
    time::{Duration, SystemTime},
};

use clap::{Args, Parser, Subcommand};

use crate::{
    config::{Problems, load::Sources},
    demo::Demo,
    layers::auth::api_key::NewKey,
    message::BoxError,
    server,
    settings::Settings,
    telemetry::log::{Guard, chain},
};

/// Ended well.
const OK: u8 = 0;
/// Failed at run time.
const FAILED: u8 = 1;
/// The command line is wrong (`EX_USAGE` of sysexits.h).
const BAD_USAGE: u8 = 64;
/// The configuration is wrong (`EX_CONFIG`).
const BAD_CONFIG: u8 = 78;

const BACKEND: &str = "The backend: http://HOST[:PORT], https://HOST[:PORT] or unix:/PATH";
const LISTEN: &str = "Where to listen: ADDRESS:PORT or unix:/PATH [default: the file's, else 0.0.0.0:8080]";
const AFTER_HELP: &str = "\
Examples:
  sidegate demo                                         a streaming backend, sidegate before it, and what to try
  sidegate --upstream http://127.0.0.1:8000             a complete proxy on :8080, admin on 127.0.0.1:9090
  sidegate --upstream unix:/run/app.sock --admin off    the same over a Unix socket, without the admin port
  sidegate check sidegate.yaml && sidegate run sidegate.yaml

Environment:
  SIDEGATE_<KEY>[__<KEY>]...   sets a key of the file: SIDEGATE_LISTEN=0.0.0.0:80, SIDEGATE_LOG__LEVEL=debug
  The command line wins over the environment, the environment over the file.

Signals:
  SIGTERM, SIGINT   stop accepting, let requests and streams finish (`drain`); a second one ends at once
  SIGHUP            reload the configuration file

Exit codes: 0 ok, 1 failed at run time, 64 bad usage, 78 bad configuration";

/// A reverse proxy that gives an LLM server or API what it lacks: request ids, security headers, clean headers,
/// clear errors, timeouts, logs and metrics. Streams pass as they come.
#[derive(Debug, Parser)]
#[command(name = "sidegate", version, after_help = AFTER_HELP, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    quick: Quick,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run with a configuration file
    Run {
        /// YAML, or TOML if its name ends in .toml
        file: PathBuf,
        #[command(flatten)]
        ports: Ports,
    },
    /// Check a configuration file, report all mistakes, start nothing
    Check {
        /// YAML, or TOML if its name ends in .toml
        file: PathBuf,
    },
    /// Print the JSON Schema of the configuration file
    Schema,
    /// API keys
    #[command(subcommand)]
    Key(Key),
    /// Run a small backend that streams as OpenAI's API does, and sidegate before it
    Demo(DemoPorts),
}

#[derive(Debug, Subcommand)]
enum Key {
    /// Make an API key: prints it, this once, and the line for the file of `auth.api_keys`
    New(NewKeyArgs),
}

#[derive(Debug, Args)]
struct NewKeyArgs {
    /// Whose it is: what logs, limits and the backend call its user. Several keys may have the same
    #[arg(long)]
    id: String,
    /// What kind of user that is, for limits and the backend
    #[arg(long)]
    tier: Option<String>,
    /// The only routes that it is for, by their names, with `,` between them [default: all]
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    routes: Vec<String>,
    /// When it ends: a day, a time or a duration, as in 2031-01-31, 2031-01-31T12:00:00Z or 90d [default: never]
    #[arg(long, value_name = "WHEN")]
    expires: Option<String>,
}

#[derive(Debug, Args)]
struct Quick {
    #[arg(long, value_name = "URL", required = true, help = BACKEND)]
    upstream: Option<String>,
    #[command(flatten)]
    ports: Ports,
}

/// What wins over a file.
#[derive(Debug, Args)]
struct Ports {
    #[arg(long, value_name = "ADDRESS", help = LISTEN)]
    listen: Option<String>,
    /// Where health, metrics and configuration are, or `off` [default: the file's, else 127.0.0.1:9090]
    #[arg(long, value_name = "ADDRESS|off")]
    admin: Option<String>,
}

/// What wins over the policy of the demo.
#[derive(Debug, Args)]
struct DemoPorts {
    /// Where sidegate listens: ADDRESS:PORT [default: 127.0.0.1:8080, or a free port]
    #[arg(long, value_name = "ADDRESS")]
    listen: Option<String>,
    /// Where health, metrics and configuration are, or `off` [default: 127.0.0.1:9090, or a free port]
    #[arg(long, value_name = "ADDRESS|off")]
    admin: Option<String>,
}

impl Quick {
    fn over(self, sources: Sources) -> Sources {
        let sources = match self.upstream {
            Some(url) => sources.with_option("--upstream", "upstreams.default.endpoints", url),
            None => sources,
        };
        self.ports.over(sources)
    }
}

impl Ports {
    fn over(self, mut sources: Sources) -> Sources {
        if let Some(address) = self.listen {
            sources = sources.with_option("--listen", "listen", address);
        }
        if let Some(admin) = self.admin {
            let key = if admin == "off" { "admin" } else { "admin.listen" };
            sources = sources.with_option("--admin", key, admin);
        }
        sources
    }
}

/// Runs the command line of this process.
#[must_use]
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let code = if error.use_stderr() { BAD_USAGE } else { OK };
            // Help that nobody reads is no failure.
            drop(error.print());
            return code.into();
        }
    };
    let environment = Sources::default().with_environment();
    let file = |path| Sources { file: Some(path), ..environment.clone() };
    match cli.command {
        None => run(&cli.quick.over(environment)),
        Some(Command::Run { file: path, ports }) => run(&ports.over(file(path))),
        Some(Command::Check { file: path }) => check(&file(path)),
        Some(Command::Schema) => say(&format!("{:#}\n", Settings::schema().as_value())),
        Some(Command::Key(Key::New(new))) => new_key(&new),
        Some(Command::Demo(DemoPorts { listen, admin })) => demo(Ports { listen, admin }.over(environment)),
    }
}

fn run(sources: &Sources) -> ExitCode {
    let (settings, tree) = match Settings::load(sources) {
        Ok(loaded) => loaded,
        Err(problems) => return refuse(&problems),
    };
    let served = server::serve(settings.clone(), &tree, Arc::new(sources.clone()));
    end(block_on(&settings, served))
}

fn check(sources: &Sources) -> ExitCode {
    match Settings::load(sources) {
        Ok((settings, _)) => {
            let file = sources.file.as_ref().map(|file| file.display().to_string()).unwrap_or_default();
            let count = |n: usize, what: &str| format!("{n} {what}{}", if n == 1 { "" } else { "s" });
            let listeners = count(settings.listen.iter().count(), "listener");
            let routes = count(settings.routes.len(), "route");
            let upstreams = count(settings.upstreams.len(), "upstream");
            say(&format!("{file}: ok ({listeners}, {routes}, {upstreams})\n"))
        }
        Err(problems) => refuse(&problems),
    }
}

fn new_key(new: &NewKeyArgs) -> ExitCode {
    let NewKeyArgs { id, tier, routes, expires } = new;
    match NewKey::make(id, tier.as_deref(), routes, expires.as_deref(), SystemTime::now()) {
        // The last line is the one for the file, so that `| tail -n 1 >> keys` puts it there.
        Ok(NewKey { key, line }) => say(&format!(
            "# The key, for its user. It is shown this once.\n{key}\n# The line for the file, which does not tell the key.\n{line}\n"
        )),
        Err(message) => {
            complain(&format!("sidegate: {message}"));
            BAD_USAGE.into()
        }
    }
}

fn demo(sources: Sources) -> ExitCode {
    let demo = match Demo::new(sources) {
        Ok(demo) => demo,
        Err(error) => return fail(&error),
    };
    let sources = demo.sources().clone();
    let (settings, tree) = match Settings::load(&sources) {
        Ok(loaded) => loaded,
        Err(problems) => return refuse(&problems),
    };
    say(&demo.welcome(&settings));
    end(block_on(&settings.clone(), async {
        tokio::select! {
            served = server::serve(settings, &tree, Arc::new(sources)) => served,
            failed = demo.serve() => Err(failed.into()),
        }
    }))
}

/// At the end, how long what waits in a system call, such as a look at the file or at a name server, may go on.
const BLOCKED: Duration = Duration::from_secs(1);

/// Runs `work` on as many threads as the configuration says.
fn block_on<T>(settings: &Settings, work: impl Future<Output = Result<T, BoxError>>) -> Result<T, BoxError> {
    let threads = settings.threads().get();
    let mut builder = if threads == 1 {
        tokio::runtime::Builder::new_current_thread()
    } else {
        tokio::runtime::Builder::new_multi_thread()
    };
    let runtime = builder.worker_threads(threads).enable_all().build()?;
    let done = runtime.block_on(work);
    // Whoever is asked to end must not wait for a file or a name server that does not answer.
    runtime.shutdown_timeout(BLOCKED);
    done
}

/// What `work` left behind, the log's guard, is dropped here, after the runtime: what the runtime's end cuts
/// writes its lines still.
fn end(result: Result<Guard, BoxError>) -> ExitCode {
    match result {
        Ok(_guard) => OK.into(),
        Err(error) => fail(&*error),
    }
}

fn fail(error: &(dyn Error + 'static)) -> ExitCode {
    complain(&format!("sidegate: {}", chain(error)));
    FAILED.into()
}

fn refuse(problems: &Problems) -> ExitCode {
    complain(&problems.to_string());
    BAD_CONFIG.into()
}

/// Prints what was asked for. A reader that has gone wants no more.
fn say(text: &str) -> ExitCode {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => FAILED.into(),
        _ => OK.into(),
    }
}

fn complain(text: &str) {
    // Where even the standard error cannot be written there is nobody to tell.
    drop(writeln!(io::stderr(), "{text}"));
}
