//! The arrows of the crate point down: a module imports from floors below its own and from its own tree, nothing else.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// Every module of the crate's root with its floor. Where `true` stands, the modules of the floor make one piece
/// and may import each other.
const FLOORS: [(&[&str], bool); 7] = [
    (&["message"], false),
    (&["sse", "telemetry", "config"], false),
    (&["upstream", "store"], false),
    (&["layers"], false),
    (&["stack", "route", "settings", "registry", "admin"], true),
    (&["server"], false),
    (&["main", "cli", "demo"], true),
];

#[test]
fn imports_point_down() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut files = Vec::new();
    collect(&source, &mut files);
    assert!(files.len() > 10, "the sources are found");
    let mut wrong = Vec::new();
    for file in files {
        let module = module_of(file.strip_prefix(&source).unwrap());
        if module.is_empty() {
            continue; // lib.rs re-exports what it likes
        }
        let text = fs::read_to_string(&file).unwrap();
        for import in imports(&text, &module) {
            if let Some(why) = forbidden(&module, &import, &source) {
                wrong.push(format!("{}: {} {why}", file.display(), import.join("::")));
            }
        }
    }
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}

#[test]
fn an_import_is_found_in_every_spelling() {
    let module = ["layers".to_owned(), "errors".to_owned()];
    let text = "use super::cors;\nuse crate::{message::{Body, Error}, upstream, // crate::no\n  config::units::Rate};\n\
                /// [crate::neither]\nfn f() -> crate::store::Store { crate::stack::x() }\n";
    let found: Vec<String> = imports(text, &module).iter().map(|path| path.join("::")).collect();
    let expected =
        ["layers::cors", "message::Body", "message::Error", "upstream", "config::units", "store::Store", "stack::x"];
    assert_eq!(found, expected);
}

/// Why a module may not import a path; `None` when it may.
fn forbidden(module: &[String], import: &[String], source: &Path) -> Option<String> {
    if import[0].starts_with(char::is_uppercase) {
        return None; // an item of the crate's root
    }
    let Some((own, _)) = floor(&module[0]) else {
        return Some(format!("stands in `{}`, which has no floor", module[0]));
    };
    let Some((other, together)) = floor(&import[0]) else { return Some("has no floor".to_owned()) };
    if import[0] != module[0] {
        return (other > own || other == own && !together).then(|| format!("is on floor {other}, the file on {own}"));
    }
    // Within `layers` every policy stands for itself.
    let (Some(policy), Some(other)) = (module.get(1), import.get(1)) else { return None };
    let is_policy =
        || source.join(format!("layers/{other}.rs")).exists() || source.join(format!("layers/{other}/mod.rs")).exists();
    (module[0] == "layers" && policy != other && is_policy()).then(|| "is another policy".to_owned())
}

fn floor(root: &str) -> Option<(usize, bool)> {
    FLOORS.iter().position(|(modules, _)| modules.contains(&root)).map(|floor| (floor, FLOORS[floor].1))
}

/// The first two segments of all that a file names by `crate::` anywhere, or by `super::` in a `use` of its own.
fn imports(text: &str, module: &[String]) -> Vec<Vec<String>> {
    let mut found = Vec::new();
    let code: Vec<&str> = text.lines().map(|line| line.split("//").next().unwrap()).collect();
    let code = format!("\n{}", code.join("\n"));
    let parent = &module[..module.len() - 1];
    let mut rest = &*code;
    while let Some(at) = ["crate::", "\nuse super::", "\npub use super::"]
        .iter()
        .filter_map(|start| rest.find(start).map(|at| at + start.len()))
        .min()
    {
        let (before, after) = rest.split_at(at);
        let prefix = if before.ends_with("crate::") { &[] } else { parent };
        rest = after;
        let start = found.len();
        tree(rest, prefix, &mut found);
        found[start..].iter_mut().for_each(|path| path.truncate(2));
    }
    found.retain(|path| !path.is_empty());
    found
}

/// Reads a `use` tree (`a::b`, `{a, b::{c, d}}`) and adds its paths; returns what follows.
fn tree<'a>(text: &'a str, prefix: &[String], found: &mut Vec<Vec<String>>) -> &'a str {
    if let Some(mut rest) = text.strip_prefix('{') {
        loop {
            rest = tree(rest.trim_start(), prefix, found).trim_start();
            match rest.strip_prefix(',') {
                Some(next) => rest = next,
                None => return rest.strip_prefix('}').unwrap_or(rest),
            }
        }
    }
    let end = text.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(text.len());
    let (name, rest) = text.split_at(end);
    let mut path = prefix.to_vec();
    match name {
        "" | "self" => {}
        "super" => drop(path.pop()),
        name => path.push(name.to_owned()),
    }
    match rest.strip_prefix("::") {
        Some(rest) if !name.is_empty() => tree(rest, &path, found),
        _ => {
            // The nothing behind a last comma is no path.
            if !name.is_empty() || text.starts_with('*') {
                found.push(path);
            }
            rest.strip_prefix('*').unwrap_or(rest)
        }
    }
}

/// `layers/cors.rs` and `layers/cors/mod.rs` are both `[layers, cors]`; `lib.rs` is `[]`.
fn module_of(file: &Path) -> Vec<String> {
    let mut module: Vec<String> =
        file.with_extension("").iter().map(|part| part.to_str().unwrap().to_owned()).collect();
    if module.last().is_some_and(|last| last == "mod" || last == "lib") {
        module.pop();
    }
    module
}

fn collect(directory: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}
