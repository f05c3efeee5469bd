//! The command line: what it prints, and how it ends.

use std::{
    net::TcpListener,
    process::{Command, Output},
};

fn sidegate(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sidegate")).args(arguments).env_clear().output().unwrap()
}

fn code(arguments: &[&str]) -> Option<i32> {
    sidegate(arguments).status.code()
}

#[test]
fn bad_usage_is_64_and_says_what_is_right() {
    for arguments in [
        &[][..],
        &["--upstrem", "http://a"],
        &["--listen", "127.0.0.1:0"],
        &["rnu"],
        &["run"],
        &["check"],
        &["check", "a", "b"],
        &["schema", "--admin", "off"],
        &["--upstream", "http://a", "check", "a"],
    ] {
        let output = sidegate(arguments);
        assert_eq!(output.status.code(), Some(64), "{arguments:?}: {output:?}");
        assert!(output.stdout.is_empty());
        assert!(String::from_utf8_lossy(&output.stderr).contains("Usage: sidegate"), "{output:?}");
    }
}

#[test]
fn help_and_version_are_0_and_on_the_standard_output() {
    for arguments in [&["--help"][..], &["help", "run"], &["--version"], &["run", "--help"]] {
        let output = sidegate(arguments);
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stdout.starts_with(b"sidegate 0.") || output.stdout.ends_with(b"\n"));
        assert!(output.stderr.is_empty());
    }
    let help = String::from_utf8(sidegate(&["--help"]).stdout).unwrap();
    for part in ["Examples:", "Environment:", "Signals:", "Exit codes:", "--upstream <URL>", "demo", "check"] {
        assert!(help.contains(part), "{part} in\n{help}");
    }
}

#[test]
fn a_bad_configuration_is_78() {
    assert_eq!(code(&["--upstream", "nonsense"]), Some(78));
    assert_eq!(code(&["run", "/not/there.yaml"]), Some(78));
    assert_eq!(code(&["check", "/not/there.yaml"]), Some(78));
}

#[test]
fn a_port_that_is_taken_is_1_and_named() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = sidegate(&["--upstream", "http://127.0.0.1:1", "--listen", &address, "--admin", "off"]);
    assert_eq!(output.status.code(), Some(1));
    let expected = format!("sidegate: cannot listen on {address}: Address already in use (os error 98)\n");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), expected);
}

#[test]
fn a_new_key_is_printed_once_beside_its_line() {
    let made = |arguments: &[&str]| {
        let output = sidegate(&[&["key", "new"][..], arguments].concat());
        assert_eq!((output.status.code(), output.stderr.len()), (Some(0), 0), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        let mut lines = text.lines().filter(|line| !line.starts_with('#')).map(str::to_owned);
        let (key, line) = (lines.next().unwrap(), lines.next().unwrap());
        assert!(lines.next().is_none() && text.ends_with(&format!("{line}\n")), "{text}");
        (key, line)
    };
    let (key, line) = made(&["--id", "alice"]);
    assert!(key.starts_with("sgk_") && key.len() == 47 && !line.contains(&key), "{key} {line}");
    assert!(line.starts_with("alice ") && line.len() == "alice ".len() + 64, "{line}");
    assert_ne!(made(&["--id", "alice"]).0, key);
    let all = ["--id", "ci", "--tier", "gold", "--routes", "chat,GET /models", "--expires", "2099-01-31"];
    let (_, line) = made(&all);
    assert!(line.ends_with(" tier=gold routes=\"chat,GET /models\" expires=2099-01-31T00:00:00Z"), "{line}");
    for wrong in
        [&["--id", "a b"][..], &["--id", "a", "--expires", "soon"], &["--id", "a", "--expires", "2001-01-01"], &[]]
    {
        let output = sidegate(&[&["key", "new"][..], wrong].concat());
        assert_eq!((output.status.code(), output.stdout.len()), (Some(64), 0), "{output:?}");
    }
}

#[test]
fn an_option_wins_over_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.yaml");
    std::fs::write(&file, "listen: 127.0.0.1:0\nupstreams: {a: {respond: {}}}\nadmin: off").unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let output = sidegate(&["run", file.to_str().unwrap(), "--listen", &address]);
    assert_eq!(output.status.code(), Some(1), "it tried to listen where the option says: {output:?}");
}

#[test]
fn check_says_what_it_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f.yaml");
    std::fs::write(&file, "upstreams: {a: {respond: {}}}\nlisten: [127.0.0.1:0, unix:/tmp/s]").unwrap();
    let output = sidegate(&["check", file.to_str().unwrap()]);
    let expected = format!("{}: ok (2 listeners, 1 route, 1 upstream)\n", file.display());
    assert_eq!(String::from_utf8(output.stdout).unwrap(), expected);
    assert_eq!(output.status.code(), Some(0));
}
