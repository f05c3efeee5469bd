//! The configuration as its author meets it: what is wrong is told, all of it, and nothing starts; the reference,
//! the schema and the examples are true.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use sidegate::{config::Sources, settings::Settings};

/// The command, with nothing of this process' environment.
fn sidegate(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidegate"));
    command.args(arguments).env_clear().envs(environment.iter().copied()).output().unwrap()
}

fn text(bytes: Vec<u8>) -> String {
    String::from_utf8(bytes).unwrap()
}

/// What is wrong with a file of this name and content, line by line, as `check` tells it. `run` must tell the same and
/// start nothing.
fn mistakes_in(name: &str, content: &str, environment: &[(&str, &str)]) -> Vec<String> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, content).unwrap();
    let path = path.to_str().unwrap();
    let checked = sidegate(&["check", path], environment);
    let run = sidegate(&["run", path], environment);
    for output in [&checked, &run] {
        assert_eq!(output.status.code(), Some(78), "{content}: {output:?}");
        assert!(output.stdout.is_empty(), "{content}: {output:?}");
    }
    assert_eq!(checked.stderr, run.stderr);
    let prefix = format!("{}/", dir.path().display());
    text(checked.stderr).replace(&prefix, "").lines().map(str::to_owned).collect()
}

#[test]
fn a_wrong_file_is_told_what_would_be_right() {
    let mut wrong = Vec::new();
    for case in WRONG.split("\n---\n") {
        let (content, expected) = case.split_once("\n=>").unwrap();
        let expected: Vec<_> = expected.split("\n=>").map(|line| format!("f.yaml: {}", line.trim())).collect();
        let content = content.replace("UPSTREAM", "upstreams: {api: {endpoints: [http://127.0.0.1:8000]}}");
        let found = mistakes_in("f.yaml", &content, &[]);
        if found != expected {
            wrong.push(format!("{content}\n=> {}", found.join("\n=> ")));
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n---\n"));
}

/// Files and what is wrong with them: a file, then a line `=> …` for each of its mistakes, then `---`.
const WRONG: &str = include_str!("config_mistakes.txt");

#[test]
fn there_are_many_ways_to_be_wrong() {
    assert!(WRONG.split("\n---\n").count() >= 60);
}

#[test]
fn toml_is_told_the_same() {
    let found = mistakes_in("f.toml", "thread = 2\n[upstreams.api]\nendpoints = ['http://a', 8000]\n", &[]);
    let expected = [
        "f.toml: thread: is no key here: did you mean `threads`?",
        "f.toml: upstreams.api.endpoints.1: must be a URL or a section with `url` and `weight`, not a number",
    ];
    assert_eq!(found, expected);
    let found = mistakes_in("f.toml", "threads = 'hush' hush", &[]);
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].starts_with("f.toml: is not TOML: ") && !found[0].contains("hush"), "{found:?}");
}

#[test]
fn the_environment_answers_for_what_it_says() {
    let file = "upstreams: {api: {endpoints: [http://127.0.0.1:8000]}}\nthreads: 1";
    let set = [("SIDEGATE_THREADS", "none"), ("SIDEGATE_LOG__LEVLE", "debug"), ("SIDEGATE_ADMIN__LISTEN", "9090")];
    let expected = [
        "SIDEGATE_ADMIN__LISTEN: admin.listen: must be text, not a number",
        "SIDEGATE_LOG__LEVLE: log.levle: is no key here: did you mean `level`?",
        "SIDEGATE_THREADS: threads: must be a whole number, 1 or more, not text",
    ];
    assert_eq!(mistakes_in("f.yaml", file, &set), expected);
}

#[test]
fn the_environment_mends_what_a_file_says() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.yaml");
    let wrong =
        "upstreams: {api: {endpoints: [http://127.0.0.1:8000]}}\nlog: {level: loud}\nadmin: {token: {env: NOT_SET}}";
    fs::write(&file, wrong).unwrap();
    let check = |set: &[(&str, &str)]| sidegate(&["check", file.to_str().unwrap()], set).status.code();
    assert_eq!(check(&[]), Some(78));
    let set = [("SIDEGATE_LOG__LEVEL", "debug"), ("SIDEGATE_ADMIN", "off")];
    assert_eq!(check(&set), Some(0));
    assert_eq!(check(&[set[0]]), Some(78), "one of two mistakes is left");
    // A section in the environment replaces `off` of a file, and the other way round.
    fs::write(&file, "upstreams: {api: {endpoints: [http://127.0.0.1:8000]}}\nadmin: off").unwrap();
    assert_eq!(
        check(&[("SIDEGATE_ADMIN__LISTEN", "127.0.0.1:9091"), ("SIDEGATE_LISTEN", r#"["[::]:80", 127.0.0.1:81]"#)]),
        Some(0)
    );
}

#[test]
fn what_may_be_off_takes_off() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.yaml");
    let text = "
        admin: off
        upstreams: {api: {endpoints: [http://127.0.0.1:8000], pool: {idle: off}}}
        defaults:
          security_headers: off
          body_limit: off
          timeouts: {client_body_idle: off, first_byte: off, idle: off, total: off}
        routes: [{upstream: api, security_headers: off, timeouts: off, body_limit: off}]";
    fs::write(&file, text).unwrap();
    assert_eq!(sidegate(&["check", file.to_str().unwrap()], &[]).status.code(), Some(0));
}

#[test]
fn the_command_line_answers_for_what_it_says() {
    let arguments = ["--upstream", "127.0.0.1:8000", "--listen", "8080", "--admin", "on"];
    let output = sidegate(&arguments, &[]);
    assert_eq!(output.status.code(), Some(78));
    let expected = "\
--admin: admin.listen: `on` is no address to listen on: `0.0.0.0:8080`, `[::]:8080` or `unix:/run/sidegate.sock`
--listen: listen: `8080` is no address to listen on: `0.0.0.0:8080`, `[::]:8080` or `unix:/run/sidegate.sock`
--upstream: upstreams.default.endpoints: `127.0.0.1:8000` is no endpoint: http://HOST[:PORT], https://HOST[:PORT] or \
unix:/PATH
";
    assert_eq!(text(output.stderr), expected);
}

#[test]
fn a_secret_is_in_no_message() {
    let files = [
        "admin: {token: [hush]}",
        "admin: {token: {hush: hush}}",
        "admin: {token: {file: /not/there, env: hush}}",
        "upstreams: {api: {endpoints: ['http://user:hush@a']}}",
        "upstreams: {api: {respond: {headers: {authorization: [hush]}}}}",
        "upstreams: {api: {respond: {headers: {authorization: \"hush\\n\"}}}}",
        "admin: {token: hush\nthreads: [",
    ];
    for file in files {
        let found = mistakes_in("f.yaml", file, &[]);
        assert!(!found.concat().contains("hush"), "{found:?}");
    }
}

#[test]
fn a_file_that_is_not_there_is_a_wrong_configuration() {
    for command in ["check", "run"] {
        let output = sidegate(&[command, "/not/there.yaml"], &[]);
        assert_eq!(output.status.code(), Some(78));
        let expected = "/not/there.yaml: cannot be read: No such file or directory (os error 2)\n";
        assert_eq!(text(output.stderr), expected);
    }
}

#[test]
fn a_file_is_not_looked_for_in_other_directories() {
    let dir = tempfile::tempdir().unwrap();
    let below = dir.path().join("below");
    fs::create_dir(&below).unwrap();
    fs::write(dir.path().join("f.yaml"), "upstreams: {a: {respond: {}}}").unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_sidegate"));
    let output = command.args(["check", "f.yaml"]).current_dir(&below).output().unwrap();
    assert_eq!(output.status.code(), Some(78), "{output:?}");
}

fn config(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("config").join(name)
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap()
}

/// The settings of a file, without the environment of this process.
fn load(path: &Path) -> Settings {
    let sources = Sources { file: Some(path.to_owned()), ..Sources::default() };
    Settings::load(&sources).unwrap_or_else(|problems| panic!("{problems}")).0
}

#[test]
fn the_schema_in_the_repository_is_the_one_that_the_command_prints() {
    let printed = text(sidegate(&["schema"], &[]).stdout);
    assert!(printed == read(&config("schema.json")), "stale: `cargo run -- schema > config/schema.json`");
}

#[test]
fn every_example_is_right() {
    let mut examples = 0;
    for example in fs::read_dir(config("examples")).unwrap() {
        let path = example.unwrap().path();
        let output = sidegate(&["check", path.to_str().unwrap()], &[]);
        assert_eq!(output.status.code(), Some(0), "{}", text(output.stderr));
        assert!(text(output.stdout).starts_with(&format!("{}: ok", path.display())));
        examples += 1;
    }
    assert!(examples >= 2);
}

#[test]
fn the_reference_says_the_defaults() {
    let mut settings = load(&config("sidegate.yaml"));
    let api = settings.upstreams.remove("api").unwrap();
    assert_eq!(api.client(), sidegate::upstream::client::Config::default());
    assert!(settings.upstreams.is_empty(), "one upstream, because there must be one");
    settings.routes.clear();
    assert_eq!(settings, Settings::default());
}

#[test]
fn the_reference_has_every_key() {
    let reference = read(&config("sidegate.yaml"));
    // A `#` right before a key switches it off; one before a blank begins a comment.
    let switched_on: Vec<_> = reference
        .lines()
        .map(|line| match line.trim_start().strip_prefix('#') {
            Some(key) if key.starts_with(|c: char| !c.is_whitespace()) => line.replacen('#', "", 1),
            _ => line.to_owned(),
        })
        .collect();
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.yaml");
    fs::write(&file, switched_on.join("\n")).unwrap();
    let sources = Sources { file: Some(file), ..Sources::default() };
    let (value, _) = sources.load::<Value>(|_, _, _| {}).unwrap();

    let schema = Settings::schema();
    let mut keys = Keys { root: schema.as_value(), wanted: Vec::new(), seen: Vec::new() };
    keys.want();
    keys.see("", schema.as_value(), &value);
    let missing: Vec<_> = keys.wanted.iter().filter(|key| !keys.seen.contains(key)).collect();
    assert!(missing.is_empty(), "config/sidegate.yaml lacks {missing:#?}");
    let unknown: Vec<_> = keys.seen.iter().filter(|key| !keys.wanted.contains(key)).collect();
    assert!(unknown.is_empty(), "config/sidegate.yaml has {unknown:#?}");
}

/// The keys of a schema and those of a document, each as the section's name in the schema and the key.
struct Keys<'a> {
    root: &'a Value,
    wanted: Vec<(String, String)>,
    seen: Vec<(String, String)>,
}

impl<'a> Keys<'a> {
    fn want(&mut self) {
        let sections = self.root["$defs"].as_object().unwrap().iter();
        for (name, section) in sections.filter(|(name, _)| *name != "Secret") {
            let choices = section["anyOf"].as_array().into_iter().flatten();
            for form in choices.chain([section]) {
                self.wanted.extend(properties(form).map(|key| (name.clone(), key.clone())));
            }
        }
        self.wanted.extend(properties(self.root).map(|key| (String::new(), key.clone())));
    }

    fn see(&mut self, name: &str, schema: &'a Value, value: &Value) {
        if schema["writeOnly"] == true {
            return; // how a secret is given is not the section's business
        }
        if let Some(target) = schema["$ref"].as_str() {
            let name = target.strip_prefix("#/$defs/").unwrap();
            self.see(name, &self.root["$defs"][name], value);
        }
        for choice in schema["anyOf"].as_array().into_iter().flatten() {
            self.see(name, choice, value);
        }
        if let (Some(items), Some(values)) = (schema.get("items"), value.as_array()) {
            for value in values {
                self.see(name, items, value);
            }
        }
        let Some(values) = value.as_object() else { return };
        for (key, value) in values {
            if schema["additionalProperties"].is_object() {
                self.see(name, &schema["additionalProperties"], value);
            } else if schema["properties"].is_object() {
                self.seen.push((name.to_owned(), key.clone()));
                self.see(name, &schema["properties"][key], value);
            }
        }
    }
}

fn properties(schema: &Value) -> impl Iterator<Item = &String> {
    schema["properties"].as_object().into_iter().flat_map(serde_json::Map::keys)
}
