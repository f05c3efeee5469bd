//! Log lines: where they go and how they look.
//!
//! Every line, of the access log and of `tracing` events alike, is appended to one bounded buffer in
//! memory, and a thread of its own writes the buffer out: a request never waits for a disk or a pipe, and
//! a burst of lines costs one system call. Lines that find the buffer full are dropped and counted
//! (`sidegate_log_lines_dropped_total`), because a reader that hangs must not hang the traffic.

use std::{
    cell::Cell,
    cell::RefCell,
    fmt::{self},
    fs::{File, OpenOptions},
    io::{self, IsTerminal, Write},
    path::PathBuf,
    sync::Arc,
    thread::{Builder, JoinHandle},
    time::{Duration, SystemTime},
};

use parking_lot::{Condvar, Mutex};
use prometheus_client::metrics::counter::Counter;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tracing::{Event, Subscriber, field::Field};
use tracing_subscriber::{
    filter::{LevelFilter, Targets},
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format},
    layer::SubscriberExt,
    registry::LookupSpan,
    util::SubscriberInitExt,
};

/// The most that waits to be written, in bytes: some 20,000 access lines.
const BUFFER: usize = 8 << 20;
/// How long lines gather before they are written. Long enough that a busy proxy writes 50 times a second
/// and not once per request, short enough that nobody who watches notices.
const GATHER: Duration = Duration::from_millis(20);

/// What is logged, where, and in which form. Section `log`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
#[schemars(rename = "Log")]
pub struct Config {
    /// `json`, one object per line, `pretty`, for people, or `auto`: pretty on a terminal, else JSON.
    /// Default `auto`.
    pub format: Format,
    /// The least severe event that is logged: `error`, `warn`, `info`, `debug` or `trace`; also per module,
    /// `info,sidegate::server=debug`. Access lines are not events: `access` has them. Default `info`.
    pub level: String,
    /// Whether each request gets its line. Default `true`.
    pub access: bool,
    /// A file to append to, opened anew at each reload. Default: the standard output.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
}

impl Default for Config {
    fn default() -> Self {
        Self { format: Format::Auto, level: "info".to_owned(), access: true, file: None }
    }
}

impl Config {
    /// Which events `level` lets through.
    ///
    /// # Errors
    /// What is wrong with `level`.
    pub fn filter(&self) -> Result<Targets, String> {
        // To `Targets` a word that is no level is a module of which everything is logged.
        let is_level = |part: &str| part.contains('=') || part.trim().parse::<LevelFilter>().is_ok();
        let targets = self.level.split(',').all(is_level).then(|| self.level.parse().ok()).flatten();
        targets.ok_or_else(|| {
            format!("`{}` is no level: error, warn, info, debug, trace, off, or `info,module=debug`", self.level)
        })
    }
}

/// How a line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// `pretty` on a terminal, else `json`.
    Auto,
    /// One JSON object per line.
    Json,
    /// For people.
    Pretty,
}

/// Where lines go. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Writer(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    dropped: Counter,
    pretty: bool,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: Vec<u8>,
    reopen: bool,
    end: bool,
}

/// Ends the log when it is dropped: writes what is left and joins the writing thread.
#[derive(Debug)]
#[must_use = "dropping the guard ends the log"]
pub struct Guard {
    writer: Writer,
    thread: Option<JoinHandle<()>>,
}

/// Opens the log as `config` says, counting lost lines in `dropped`.
///
/// # Errors
/// The file cannot be opened, or the thread cannot be started.
pub fn open(config: &Config, dropped: Counter) -> io::Result<(Writer, Guard)> {
    let sink = Sink::open(config.file.clone())?;
    let pretty = match config.format {
        Format::Json => false,
        Format::Pretty => true,
        Format::Auto => config.file.is_none() && io::stdout().is_terminal(),
    };
    let shared = Shared { waiting: Mutex::default(), wake: Condvar::new(), dropped, pretty };
    let writer = Writer(Arc::new(shared));
    let own = writer.clone();
    let thread = Builder::new().name("log".to_owned()).spawn(move || own.write_out(sink))?;
    Ok((writer.clone(), Guard { writer, thread: Some(thread) }))
}

/// Sends the events of the whole process that pass `filter` to `writer`.
///
/// # Errors
/// The process has a subscriber already.
pub fn install(writer: &Writer, filter: Targets) -> Result<(), impl std::error::Error + use<>> {
    let registry = tracing_subscriber::registry().with(filter);
    let events = tracing_subscriber::fmt::layer().with_writer(writer.clone());
    if writer.0.pretty {
        registry.with(events.compact().with_target(false)).try_init()
    } else {
        registry.with(events.event_format(Json)).try_init()
    }
}

thread_local! {
    /// Where a thread makes its line, so that the lock is held for one copy only.
    static LINE: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

impl Writer {
    /// Whether lines are for people.
    #[must_use]
    pub fn pretty(&self) -> bool {
        self.0.pretty
    }

    /// Appends the line that `make` writes; the end of the line is added.
    pub fn line(&self, make: impl FnOnce(&mut Vec<u8>)) {
        LINE.with_borrow_mut(|line| {
            line.clear();
            make(line);
            line.push(b'\n');
            self.append(line);
        });
    }

    /// Closes the log's file and opens it again under its name: for whoever has moved it away.
    pub fn reopen(&self) {
        self.waiting(|waiting| waiting.reopen = true);
        self.0.wake.notify_one();
    }

    fn append(&self, line: &[u8]) {
        let first = self.waiting(|waiting| {
            if waiting.lines.len() + line.len() > BUFFER {
                self.0.dropped.inc();
                return false;
            }
            let first = waiting.lines.is_empty();
            waiting.lines.extend_from_slice(line);
            first
        });
        // A writer that has lines to write is awake or about to be: only the first line wakes it.
        if first {
            self.0.wake.notify_one();
        }
    }

    fn waiting<T>(&self, act: impl FnOnce(&mut Waiting) -> T) -> T {
        act(&mut self.0.waiting.lock())
    }

    fn write_out(&self, mut sink: Sink) {
        let mut lines = Vec::new();
        let mut waiting = self.0.waiting.lock();
        loop {
            let idle = |w: &mut Waiting| w.lines.is_empty() && !w.end && !w.reopen;
            self.0.wake.wait_while(&mut waiting, idle);
            let more = |w: &mut Waiting| !w.end && !w.reopen;
            self.0.wake.wait_while_for(&mut waiting, more, GATHER);
            let (end, reopen) = (waiting.end, std::mem::take(&mut waiting.reopen));
            std::mem::swap(&mut lines, &mut waiting.lines);
            drop(waiting);
            sink.write(&lines);
            lines.clear();
            // What a burst once took is not kept for ever.
            lines.shrink_to(BUFFER / 16);
            if reopen {
                sink.reopen();
            }
            if end {
                return;
            }
            waiting = self.0.waiting.lock();
        }
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.writer.waiting(|waiting| waiting.end = true);
        self.writer.0.wake.notify_one();
        if let Some(thread) = self.thread.take() {
            // A writer that panicked has told so on stderr; there is nothing left to save.
            drop(thread.join());
        }
    }
}

/// The standard output, or a file with its name.
enum Sink {
    Out(io::Stdout),
    File(PathBuf, File),
}

impl Sink {
    fn open(path: Option<PathBuf>) -> io::Result<Self> {
        let Some(path) = path else { return Ok(Self::Out(io::stdout())) };
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        Ok(Self::File(path, file))
    }

    /// A log that cannot be written has nowhere to say so; the next lines may fare better.
    fn write(&mut self, bytes: &[u8]) {
        let written = match self {
            Self::Out(out) => out.write_all(bytes).and_then(|()| out.flush()),
            Self::File(_, file) => file.write_all(bytes),
        };
        drop(written);
    }

    fn reopen(&mut self) {
        if let Self::File(path, file) = self
            && let Ok(new) = OpenOptions::new().create(true).append(true).open(path)
        {
            *file = new;
        }
    }
}

/// One event on its way into the buffer.
#[derive(Debug)]
pub struct Line<'a> {
    writer: &'a Writer,
    bytes: Vec<u8>,
}

impl Write for Line<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Drop for Line<'_> {
    fn drop(&mut self) {
        self.writer.append(&self.bytes);
    }
}

impl<'a> MakeWriter<'a> for Writer {
    type Writer = Line<'a>;

    fn make_writer(&'a self) -> Line<'a> {
        Line { writer: self, bytes: Vec::new() }
    }
}

/// An event as one JSON object: `ts`, `level`, `msg`, the event's fields, `target`.
struct Json;

impl<S, N> FormatEvent<S, N> for Json
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _: &FmtContext<'_, S, N>, mut out: format::Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let meta = event.metadata();
        let level = meta.level().as_str().to_ascii_lowercase();
        write!(out, r#"{{"ts":"{}","level":"{level}""#, timestamp())?;
        let mut fields = Fields { out: out.by_ref(), result: Ok(()) };
        event.record(&mut fields);
        fields.result?;
        writeln!(out, r#","target":"{}"}}"#, meta.target())
    }
}

/// The time now, as log lines carry it: RFC 3339, UTC, milliseconds.
#[must_use]
pub fn timestamp() -> impl fmt::Display {
    humantime::format_rfc3339_millis(SystemTime::now())
}

/// Appends [`timestamp`]. The date and the time of day are made once per second and thread.
pub fn write_timestamp(out: &mut Vec<u8>) {
    thread_local! {
        static SECOND: Cell<(u64, [u8; 19])> = const { Cell::new((0, [0; 19])) };
    }
    let now = SystemTime::now();
    let since = now.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (mut second, mut text) = SECOND.get();
    if second != since.as_secs() {
        second = since.as_secs();
        let made = humantime::format_rfc3339_seconds(now).to_string();
        // A year of five digits, which would be longer, is not one that this runs in.
        let Some(first) = made.as_bytes().first_chunk() else { return };
        text = *first;
        SECOND.set((second, text));
    }
    out.extend_from_slice(&text);
    // One thousand more, of which the first digit gives way to the point: so the zeros stay.
    let at = out.len();
    out.extend_from_slice(itoa::Buffer::new().format(1000 + since.subsec_millis()).as_bytes());
    if let Some(first) = out.get_mut(at) {
        *first = b'.';
    }
    out.push(b'Z');
}

struct Fields<'a> {
    out: format::Writer<'a>,
    result: fmt::Result,
}

impl Fields<'_> {
    fn put(&mut self, field: &Field, value: &impl serde::Serialize) {
        let name = if field.name() == "message" { "msg" } else { field.name() };
        let value = serde_json::to_string(value).unwrap_or_else(|_| "null".to_owned());
        self.result = self.result.and_then(|()| write!(self.out, r#","{name}":{value}"#));
    }
}

impl tracing::field::Visit for Fields<'_> {
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, &value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, &value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, &chain(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, &format!("{value:?}"));
    }
}

/// An error and its sources in one line, for the log.
#[must_use]
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        let said = source.to_string();
        // Many errors print their source themselves.
        if !text.ends_with(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = source.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file_log(path: &std::path::Path) -> (Writer, Guard, Counter) {
        let dropped = Counter::default();
        let config = Config { file: Some(path.to_owned()), ..Config::default() };
        let (writer, guard) = open(&config, dropped.clone()).unwrap();
        (writer, guard, dropped)
    }

    #[test]
    fn what_was_logged_is_written_before_the_guard_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (writer, guard, _) = file_log(&path);
        for n in 0..1000 {
            writer.line(|line| write!(line, "line {n}").unwrap());
        }
        drop(guard);
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(text.lines().count(), 1000);
        assert_eq!(text.lines().last(), Some("line 999"));
    }

    #[test]
    fn a_full_buffer_drops_the_line_and_counts_it() {
        let dir = tempfile::tempdir().unwrap();
        let (writer, guard, dropped) = file_log(&dir.path().join("log"));
        writer.line(|line| line.resize(BUFFER, b'x'));
        assert_eq!(dropped.get(), 1, "with its end it is a byte too long");
        writer.line(|line| line.extend_from_slice(b"short"));
        assert_eq!(dropped.get(), 1);
        drop(guard);
    }

    #[test]
    fn an_event_is_one_json_object() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let (writer, guard, _) = file_log(&path);
        let layer = tracing_subscriber::fmt::layer().with_writer(writer).event_format(Json);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            let error = io::Error::other("no\nway");
            tracing::warn!(endpoint = "a:1", count = 3, error = &error as &dyn std::error::Error, "breaker opened");
        });
        drop(guard);
        let line: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        assert_eq!(line["msg"], "breaker opened");
        assert_eq!(line["level"], "warn");
        assert_eq!((&line["endpoint"], &line["count"]), (&"a:1".into(), &3.into()));
        assert_eq!(line["error"], "no\nway");
    }
}
