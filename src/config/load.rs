//! From a file, the environment and the command line to a checked value of any type, or to all mistakes.
//!
//! The later source wins, key by key: file < environment < command line; what none of them gives is the type's
//! own default. figment merges the sources and knows of each value who gave it.
//!
//! Serde stops at the first mistake. To find them all, the place of each mistake is taken out of the tree and
//! the rest is read again, until it can be read; what was taken out is remembered, so that nothing is reported
//! only because something else was wrong. Then the rules between fields are checked, on what could be read.

use std::{
    collections::btree_map::Entry,
    fmt,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use figment::{
    Figment, Metadata, Profile, Provider,
    error::{Actual, Error as ReadError, Kind},
    providers::{Format, Toml, Yaml},
    value::{Dict, Map, Tag, Value},
};
use serde::{
    Deserialize, Deserializer,
    de::{DeserializeOwned, EnumAccess, Error, MapAccess, SeqAccess, Visitor},
};

use super::{
    Problem, Problems,
    sections::Strict,
    units::{ByteSize, OR_OFF},
};

/// The prefix of variables of the environment that are configuration.
const PREFIX: &str = "SIDEGATE_";
/// What stands between levels in a variable's name.
const LEVEL: &str = "__";
/// The largest file that is read: a thousand times what a file of many routes takes.
const MAX_FILE: u64 = 16 << 20;
/// How deep a variable may nest, by its name or by the brackets in its value: both are read level by level on the stack.
const MAX_DEPTH: usize = 32;
/// How many mistakes are looked for: each costs another reading.
const MAX_MISTAKES: usize = 100;

/// Where values come from.
#[derive(Debug, Clone, Default)]
pub struct Sources {
    /// The file: TOML if its name ends in `.toml`, else YAML.
    pub file: Option<PathBuf>,
    /// Variables of the environment. Only those with `SIDEGATE_` and in capitals count; `__` stands between levels.
    pub environment: Vec<(String, String)>,
    /// What options of the command line say, by the option's name and the key's path.
    pub options: Vec<(&'static str, &'static str, Value)>,
    /// A YAML file that is part of the program, by its name. Any other source wins over it.
    pub built_in: Option<(&'static str, &'static str)>,
    /// Keys below which anything may stand, values that are no value among it.
    pub free: &'static [&'static str],
}

impl Sources {
    /// The environment of this process.
    #[must_use]
    pub fn with_environment(mut self) -> Self {
        let lossy = |text: std::ffi::OsString| text.to_string_lossy().into_owned();
        self.environment.extend(std::env::vars_os().map(|(name, value)| (lossy(name), lossy(value))));
        self
    }

    /// An option of the command line, by its name, that gives the value of `key`.
    #[must_use]
    pub fn with_option(mut self, option: &'static str, key: &'static str, value: impl Into<Value>) -> Self {
        self.options.push((option, key, value.into()));
        self
    }

    /// Reads and merges all sources into a `T`, which `check` may complete and find more mistakes in.
    ///
    /// # Errors
    /// All mistakes of all sources.
    pub fn load<T: DeserializeOwned>(
        &self,
        check: impl FnOnce(&mut T, &Tree, &mut Problems),
    ) -> Result<(T, Tree), Problems> {
        let mut problems = Problems::default();
        let figment = self.merge(&mut problems);
        let whole = match figment.map(|figment| (figment.find_value(""), figment)) {
            Some((Ok(value), figment)) => (value, figment),
            // What stands in a file that is not even YAML cannot be judged.
            _ => return Err(problems),
        };
        let (whole, figment) = whole;
        let tree = Tree { pruned: whole.clone(), whole, taken: Vec::new(), holes: Vec::new() };
        let mut reading = Reading { tree };
        reading.take_empty(self.free, &mut problems);
        let read = reading.read(&mut problems);
        let read = read.map(|mut value: T| {
            let mut found = Problems::default();
            check(&mut value, &reading.tree, &mut found);
            for mut problem in found {
                let path = reading.tree.original(&path_of(&problem.key));
                if !reading.tree.is_about_a_hole(&path) {
                    problem.key = path.join(".");
                    problems.push(problem);
                }
            }
            value
        });
        let Reading { tree, .. } = reading;
        problems.set_origins(|key| tree.origin(&figment, key).or_else(|| self.file_name()));
        match read {
            Some(value) if problems.is_empty() => Ok((value, tree)),
            _ => Err(problems),
        }
    }

    fn file_name(&self) -> Option<String> {
        self.file.as_ref().map(|path| path.display().to_string())
    }

    /// All sources in one, if all can be read at all.
    fn merge(&self, problems: &mut Problems) -> Option<Figment> {
        let mut figment = Some(Figment::new());
        let built_in = self.built_in.map(|(name, text)| (name.to_owned(), read_text(text, false)));
        let file = self.file.as_ref().map(|path| (path.display().to_string(), read_file(path)));
        for (name, read) in built_in.into_iter().chain(file) {
            let mut problem = |key: String, message: &str| {
                problems.push(Problem { key, message: message.to_owned(), origin: Some(name.clone()) });
            };
            match read {
                Ok((values, twice)) => {
                    for path in twice {
                        problem(path.join("."), "stands twice: keep one of them");
                    }
                    figment = figment.map(|figment| figment.merge(Given { name, values }));
                }
                Err(message) => {
                    problem(String::new(), &message);
                    figment = None;
                }
            }
        }
        let mut figment = figment?;
        let mut variables = Vec::new();
        for (name, value) in &self.environment {
            match variable(name, value) {
                Some(Ok(given)) => variables.push(given),
                Some(Err(problem)) => problems.push(problem),
                None => {}
            }
        }
        // The order of an environment means nothing: shorter names first, so that the more exact one wins.
        variables.sort_by(|a, b| a.name.cmp(&b.name));
        let options = self.options.iter().map(|(option, path, value)| Given {
            name: (*option).to_owned(),
            values: nested(path.split('.'), value.clone()),
        });
        for given in variables.into_iter().chain(options) {
            figment = figment.merge(given);
        }
        Some(figment)
    }
}

/// What one source gives, under the name that a message calls it by.
struct Given {
    name: String,
    values: Dict,
}

impl Provider for Given {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.name.clone())
    }

    fn data(&self) -> Result<Map<Profile, Dict>, ReadError> {
        Ok(Map::from([(Profile::Default, self.values.clone())]))
    }
}

/// What a variable of the environment sets, if it is configuration.
fn variable(name: &str, value: &str) -> Option<Result<Given, Problem>> {
    let key = name.strip_prefix(PREFIX)?;
    // Kubernetes tells each pod of each service by variables named after it, and a service may be called `sidegate`.
    if is_service_link(key, value) {
        return None;
    }
    if key.split(LEVEL).count() > MAX_DEPTH {
        let message = format!("has more than {MAX_DEPTH} levels in its name");
        let begin: String = name.chars().take(60).collect();
        return Some(Err(Problem { key: String::new(), message, origin: Some(format!("{begin}…")) }));
    }
    if depth(value) > MAX_DEPTH {
        let key = key.to_ascii_lowercase().replace(LEVEL, ".");
        let message = format!("has more than {MAX_DEPTH} brackets within each other");
        return Some(Err(Problem { key, message, origin: Some(name.to_owned()) }));
    }
    Some(Ok(Given { name: name.to_owned(), values: nested(key.split(LEVEL), variable_value(value)) }))
}

/// How deep lists and sections stand within each other in the text of a variable. A text that begins with neither is one.
fn depth(text: &str) -> usize {
    if !text.trim_start().starts_with(['[', '{']) {
        return 0;
    }
    let (mut depth, mut deepest) = (0_usize, 0);
    for c in text.bytes() {
        match c {
            b'[' | b'{' => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        deepest = deepest.max(depth);
    }
    deepest
}

/// What the text of a variable stands for. A number only where nothing is lost by it: a secret may be `0123` or
/// `1e5`, and must stay what it is.
fn variable_value(text: &str) -> Value {
    let value = text.parse::<Value>().unwrap_or_else(|never| match never {});
    let same = match &value {
        Value::Num(_, number) => {
            match number.to_u128().map(|n| n.to_string()).or(number.to_i128().map(|n| n.to_string())) {
                Some(digits) => digits == text,
                None => text.bytes().all(|c| c.is_ascii_digit() || c == b'.'),
            }
        }
        _ => true,
    };
    if same { value } else { text.into() }
}

/// Whether a variable, without its prefix, is one of those that Kubernetes makes of a service's name:
/// `…SERVICE_HOST`, `…SERVICE_PORT`, `…SERVICE_PORT_<NAME>`, `…PORT=tcp://…`, `…PORT_<number>_<protocol>…`.
fn is_service_link(key: &str, value: &str) -> bool {
    let has = |part: &str| key.starts_with(part) || key.contains(&format!("_{part}"));
    let address = ["tcp://", "udp://", "sctp://"].iter().any(|scheme| value.starts_with(scheme));
    let number = |rest: &str| rest.starts_with(|c: char| c.is_ascii_digit());
    !key.contains(LEVEL)
        && (key.ends_with("SERVICE_HOST")
            || has("SERVICE_PORT")
            || (key.ends_with("PORT") && address)
            || (has("PORT_") && key.rsplit("PORT_").next().is_some_and(number)))
}

/// `value` below `keys`, the first outermost.
fn nested<'a>(keys: impl Iterator<Item = &'a str>, value: Value) -> Dict {
    let keys: Vec<_> = keys.map(str::to_ascii_lowercase).collect();
    let mut keys = keys.into_iter().rev();
    let innermost = Dict::from([(keys.next().unwrap_or_default(), value)]);
    keys.fold(innermost, |inner, key| Dict::from([(key, Value::from(inner))]))
}

/// What a file says, and the keys of which only the first value counts.
type Said = (Dict, Vec<Vec<String>>);

fn read_file(path: &Path) -> Result<Said, String> {
    let mut text = String::new();
    let read = File::open(path).and_then(|file| file.take(MAX_FILE + 1).read_to_string(&mut text));
    read.map_err(|error| format!("cannot be read: {error}"))?;
    if text.len() as u64 > MAX_FILE {
        return Err(format!("is larger than {}", ByteSize::from_bytes(MAX_FILE)));
    }
    read_text(&text, path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("toml")))
}

fn read_text(text: &str, toml: bool) -> Result<Said, String> {
    let document = if toml {
        Toml::from_str::<Document>(text)
            .map_err(|error| format!("is not TOML: {}", without_excerpt(&error.to_string())))
    } else {
        Yaml::from_str::<Document>(text).map_err(|error| format!("is not YAML: {error}"))
    };
    let Document { value, twice } = document?;
    match value {
        Value::Dict(_, values) => Ok((values, twice)),
        Value::Empty(..) => Ok((Dict::new(), twice)),
        _ => Err("must have keys and values at its top".to_owned()),
    }
}

/// A TOML error without the lines of the file that it quotes: they may hold a secret.
fn without_excerpt(message: &str) -> String {
    let lines = message.lines().map(str::trim).filter(|line| {
        let quoted = line.trim_start_matches(|c: char| c.is_ascii_digit()).trim_start();
        !quoted.starts_with('|')
    });
    lines.collect::<Vec<_>>().join(": ")
}

/// What a file says. Of a key that stands twice in a mapping the first value is taken, and the key remembered: serde's
/// maps and figment's take the last one without a word.
struct Document {
    value: Value,
    twice: Vec<Vec<String>>,
}

impl From<Value> for Document {
    fn from(value: Value) -> Self {
        Self { value, twice: Vec::new() }
    }
}

impl Document {
    /// Puts what stood twice within it, at `key`, to that of what is around it.
    fn into_value(self, key: &str, twice: &mut Vec<Vec<String>>) -> Value {
        twice.extend(self.twice.into_iter().map(|mut path| {
            path.insert(0, key.to_owned());
            path
        }));
        self.value
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Any;

        impl<'de> Visitor<'de> for Any {
            type Value = Document;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a value")
            }

            fn visit_bool<E>(self, value: bool) -> Result<Document, E> {
                Ok(Value::from(value).into())
            }

            fn visit_i64<E>(self, value: i64) -> Result<Document, E> {
                Ok(Value::from(value).into())
            }

            fn visit_u64<E>(self, value: u64) -> Result<Document, E> {
                Ok(Value::from(value).into())
            }

            /// Too large for whatever a number is good for here, and so the same as a fraction.
            fn visit_i128<E>(self, _: i128) -> Result<Document, E> {
                Ok(Value::from(f64::MIN).into())
            }

            fn visit_u128<E>(self, _: u128) -> Result<Document, E> {
                Ok(Value::from(f64::MAX).into())
            }

            fn visit_f64<E>(self, value: f64) -> Result<Document, E> {
                Ok(Value::from(value).into())
            }

            fn visit_str<E>(self, value: &str) -> Result<Document, E> {
                Ok(Value::from(value).into())
            }

            fn visit_unit<E>(self) -> Result<Document, E> {
                Ok(Value::Empty(Tag::Default, figment::value::Empty::Unit).into())
            }

            /// An empty YAML document.
            fn visit_none<E: Error>(self) -> Result<Document, E> {
                self.visit_unit()
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Document, A::Error> {
                let (mut values, mut twice) = (Vec::<Value>::new(), Vec::new());
                while let Some(item) = list.next_element::<Document>()? {
                    values.push(item.into_value(&values.len().to_string(), &mut twice));
                }
                Ok(Document { value: values.into(), twice })
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let (mut values, mut twice) = (Dict::new(), Vec::new());
                while let Some(Key(key)) = map.next_key()? {
                    let value = map.next_value::<Document>()?.into_value(&key, &mut twice);
                    match values.entry(key) {
                        Entry::Vacant(free) => {
                            free.insert(value);
                        }
                        Entry::Occupied(first) => twice.push(vec![first.key().clone()]),
                    }
                }
                merge_keys(&mut values).map_err(A::Error::custom)?;
                Ok(Document { value: values.into(), twice })
            }

            fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Document, A::Error> {
                Err(A::Error::custom("a tag (`!name`) means nothing here"))
            }
        }

        from.deserialize_any(Any)
    }
}

/// YAML's merge key: `<<` gives what the mapping itself does not (<https://yaml.org/type/merge.html>).
fn merge_keys(values: &mut Dict) -> Result<(), &'static str> {
    let given = match values.remove("<<") {
        None => return Ok(()),
        Some(Value::Array(_, list)) => list,
        Some(one) => vec![one],
    };
    for mapping in given {
        let Value::Dict(_, mapping) = mapping else { return Err("`<<` takes a section or a list of sections") };
        for (key, value) in mapping {
            values.entry(key).or_insert(value);
        }
    }
    Ok(())
}

/// A key of a mapping. YAML reads `200:` as a number.
struct Key(String);

impl<'de> Deserialize<'de> for Key {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        match Document::deserialize(from)?.value {
            Value::String(_, key) => Ok(Self(key)),
            Value::Bool(_, key) => Ok(Self(key.to_string())),
            key => {
                let number = key.to_u128().map(|n| n.to_string()).or_else(|| Some(key.to_i128()?.to_string()));
                number.map(Self).ok_or_else(|| D::Error::custom("a key must be text"))
            }
        }
    }
}

/// What all sources give together, before any default.
#[derive(Debug, Clone)]
pub struct Tree {
    whole: Value,
    /// Without what could not be read.
    pruned: Value,
    /// What was taken out, as paths of the whole tree.
    taken: Vec<Vec<String>>,
    /// Those of them without which a check may go wrong. An unknown key leaves no hole.
    holes: Vec<Vec<String>>,
}

impl Tree {
    /// Whether a source gives a value at `key`, a path as in [`Problem::key`]. Items of lists are counted as in the value
    /// that was read.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        at(&self.pruned, &path_of(key)).is_some()
    }

    /// The key as its source counts it: what could not be read is not among the items of the list that was read.
    #[must_use]
    pub fn place(&self, key: &str) -> String {
        self.original(&path_of(key)).join(".")
    }

    /// Whether all that stands at `key`, counted as in [`has`](Self::has), could be read.
    #[must_use]
    pub fn is_whole(&self, key: &str) -> bool {
        !self.is_about_a_hole(&self.original(&path_of(key)))
    }

    /// The keys that stand below `key`, readable or not.
    #[must_use]
    pub fn names(&self, key: &str) -> Vec<&str> {
        match self.whole.find_ref(key) {
            Some(Value::Dict(_, values)) => values.keys().map(String::as_str).collect(),
            _ => Vec::new(),
        }
    }

    /// The tree as JSON.
    ///
    /// # Errors
    /// None that a tree read from text could cause: a fraction that is not finite.
    pub fn to_json(&self) -> Result<serde_json::Value, serde_json::Error> {
        serde_json::to_value(&self.whole)
    }

    /// The path in the whole tree of what stands at `path` in the pruned one: items of lists have moved up.
    fn original(&self, path: &[String]) -> Vec<String> {
        let mut original: Vec<String> = Vec::with_capacity(path.len());
        for key in path {
            let list = matches!(at(&self.whole, &original), Some(Value::Array(..)));
            original.push(match key.parse::<usize>() {
                Ok(mut n) if list => {
                    let taken = self.taken.iter().filter_map(|taken| match taken.split_last() {
                        Some((n, above)) if above == original => n.parse::<usize>().ok(),
                        _ => None,
                    });
                    let mut taken: Vec<_> = taken.collect();
                    taken.sort_unstable();
                    for gone in taken {
                        if gone <= n {
                            n += 1;
                        }
                    }
                    n.to_string()
                }
                _ => key.clone(),
            });
        }
        original
    }

    /// Whether something at, above or below `path` could not be read.
    fn is_about_a_hole(&self, path: &[String]) -> bool {
        self.holes.iter().any(|hole| hole.starts_with(path) || path.starts_with(hole))
    }

    /// Who gave the value at `key`, or else at the nearest place above it.
    fn origin(&self, figment: &Figment, key: &str) -> Option<String> {
        let path = path_of(key);
        let mut nearest = (1..=path.len()).rev().filter_map(|n| at(&self.whole, path.get(..n)?));
        nearest.find_map(|value| Some(figment.get_metadata(value.tag())?.name.to_string()))
    }
}

/// The keys of a dotted path.
fn path_of(key: &str) -> Vec<String> {
    key.split('.').map(str::to_owned).collect()
}

fn at<'a>(root: &'a Value, path: &[String]) -> Option<&'a Value> {
    path.iter().try_fold(root, |value, key| match value {
        Value::Dict(_, values) => values.get(key),
        Value::Array(_, values) => values.get(key.parse::<usize>().ok()?),
        _ => None,
    })
}

/// Takes out what stands at `path`.
fn take(root: &mut Value, path: &[String]) -> bool {
    let Some((last, above)) = path.split_last() else { return false };
    let parent = above.iter().try_fold(root, |value, key| match value {
        Value::Dict(_, values) => values.get_mut(key),
        Value::Array(_, values) => values.get_mut(key.parse::<usize>().ok()?),
        _ => None,
    });
    match (parent, last.parse::<usize>()) {
        (Some(Value::Dict(_, values)), _) => values.remove(last).is_some(),
        (Some(Value::Array(_, values)), Ok(n)) if n < values.len() => {
            values.remove(n);
            true
        }
        _ => false,
    }
}

/// A tree on its way to become a value.
struct Reading {
    tree: Tree,
}

impl Reading {
    /// Takes out keys without a value: nobody can say whether they were meant to be off or left at their default.
    fn take_empty(&mut self, free: &[&str], problems: &mut Problems) {
        fn find(value: &Value, path: &mut Vec<String>, found: &mut Vec<Vec<String>>) {
            let mut below = |key: String, value| {
                path.push(key);
                find(value, path, found);
                path.pop();
            };
            match value {
                Value::Empty(..) => found.push(path.clone()),
                Value::Dict(_, values) => values.iter().for_each(|(key, value)| below(key.clone(), value)),
                Value::Array(_, values) => {
                    values.iter().enumerate().for_each(|(n, value)| below(n.to_string(), value));
                }
                _ => {}
            }
        }

        let mut found = Vec::new();
        find(&self.tree.whole, &mut Vec::new(), &mut found);
        found.retain(|path| !path.iter().any(|key| free.contains(&&**key)));
        for path in &found {
            problems.add(path.join("."), "has no value: give it one, or leave the key out");
        }
        // From the end, so that the items before keep their numbers.
        for path in found.into_iter().rev() {
            take(&mut self.tree.pruned, &path);
            self.tree.taken.push(path.clone());
            self.tree.holes.push(path);
        }
    }

    fn read<T: DeserializeOwned>(&mut self, problems: &mut Problems) -> Option<T> {
        for _ in 0..MAX_MISTAKES {
            let error = match self.tree.pruned.deserialize() {
                Ok(Strict(value)) => return Some(value),
                Err(error) => error,
            };
            let mut path = error.path;
            let mut leaves_a_hole = true;
            // The only key of a section that is a choice by it: without it, the section would be none.
            let mut is_choice = false;
            match &error.kind {
                Kind::UnknownField(name, valid) => {
                    // The key's own name may or may not stand in the path.
                    if let Some(Value::Dict(_, values)) = at(&self.tree.pruned, &path)
                        && values.contains_key(name)
                    {
                        path.push(name.clone());
                    }
                    leaves_a_hole = false;
                    problems
                        .add(self.tree.original(&path).join("."), format!("is no key here: {}", choose(name, valid)));
                }
                Kind::MissingField(name) => {
                    let mut missing = self.tree.original(&path);
                    missing.push(name.to_string());
                    // What was wrong has been told, and is missing only because it was taken out.
                    if !self.tree.taken.contains(&missing) {
                        let place = self.tree.original(&path);
                        problems.add(place.join("."), format!("`{name}` is missing"));
                    }
                }
                kind => {
                    problems.add(self.tree.original(&path).join("."), explain(kind));
                    is_choice = matches!(kind, Kind::UnknownVariant(name, _) if path.last() == Some(name));
                }
            }
            while !path.is_empty() && at(&self.tree.pruned, &path).is_none() {
                path.pop();
            }
            if is_choice
                && let Some((_, above)) = path.split_last()
                && let Some(Value::Dict(_, values)) = at(&self.tree.pruned, above)
                && values.len() == 1
            {
                path.pop();
            }
            let original = self.tree.original(&path);
            if !take(&mut self.tree.pruned, &path) {
                return None;
            }
            if leaves_a_hole {
                self.tree.holes.push(original.clone());
            }
            self.tree.taken.push(original);
        }
        problems.add("", format!("there are more mistakes than these {}", problems.len()));
        None
    }
}

/// The nearest of what is valid, or all of it.
fn choose(given: &str, valid: &[&str]) -> String {
    match nearest(given, valid.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None if valid.is_empty() => "there are none".to_owned(),
        None => {
            let names: Vec<_> = valid.iter().map(|name| format!("`{name}`")).collect();
            format!("there are {}", names.join(", "))
        }
    }
}

/// The candidate that `given` is most probably a misspelling of.
pub fn nearest<'a>(given: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let given = given.to_lowercase();
    let likeness = |candidate: &str| {
        // Plurals, and keys of which only the beginning is known.
        let begins = given.len() >= 3 && (candidate.starts_with(&given) || given.starts_with(candidate));
        strsim::normalized_damerau_levenshtein(&given, &candidate.to_lowercase()) + if begins { 0.3 } else { 0.0 }
    };
    let scored = candidates.into_iter().map(|candidate| (candidate, likeness(candidate)));
    let best = scored.max_by(|a, b| a.1.total_cmp(&b.1))?;
    // Half of the letters.
    (best.1 >= 0.5).then_some(best.0)
}

/// What serde says, in words for who writes the file. Values are not repeated: they may be secret.
fn explain(kind: &Kind) -> String {
    match kind {
        Kind::Message(message) => message.clone(),
        Kind::InvalidType(found, expected) => format!("must be {}, not {}", wanted(expected), described(found)),
        Kind::InvalidValue(Actual::Unsigned(_) | Actual::Signed(_), expected) => {
            format!("must be {}", wanted(expected))
        }
        Kind::InvalidValue(_, expected) | Kind::InvalidLength(_, expected) => format!("must be {}", wanted(expected)),
        Kind::UnknownVariant(given, valid) => format!("`{given}` is no choice here: {}", choose(given, valid)),
        other => other.to_string(),
    }
}

/// An expectation of serde's without Rust's names for things.
fn wanted(expected: &str) -> String {
    match expected.strip_prefix(OR_OFF) {
        Some(other) => format!("{OR_OFF}{}", in_words(other)),
        None => in_words(expected).to_owned(),
    }
}

fn in_words(expected: &str) -> &str {
    match expected {
        "u8" => "a whole number from 0 to 255",
        "u16" => "a whole number from 0 to 65535",
        "u32" | "u64" | "usize" => "a whole number, 0 or more",
        "a nonzero u8" => "a whole number from 1 to 255",
        "a nonzero u16" => "a whole number from 1 to 65535",
        "a nonzero u32" | "a nonzero u64" | "a nonzero usize" => "a whole number, 1 or more",
        "a boolean" => "`true` or `false`",
        "a string" => "text",
        "path string" => "a path",
        "a sequence" => "a list",
        "a map" => "a section of keys and values",
        _ if expected.starts_with("struct ") => "a section of keys and values",
        "string or map" => "one of its words",
        _ if expected.starts_with("enum ") => "one of its words",
        _ => expected,
    }
}

fn described(found: &Actual) -> &'static str {
    match found {
        Actual::Bool(_) => "a boolean",
        Actual::Unsigned(_) | Actual::Signed(_) => "a number",
        Actual::Float(_) => "a fraction",
        Actual::Char(_) | Actual::Str(_) | Actual::Bytes(_) => "text",
        Actual::Seq => "a list",
        Actual::Map => "a section",
        _ => "that",
    }
}

#[cfg(test)]
mod tests {
    use std::num::NonZeroU16;

    use super::{super::HumanDuration, *};

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Whole {
        threads: Option<NonZeroU16>,
        #[serde(default)]
        log: Log,
        #[serde(default)]
        routes: Vec<Route>,
    }

    #[derive(Debug, Default, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields, default)]
    struct Log {
        level: String,
        every: Option<HumanDuration>,
    }

    #[derive(Debug, PartialEq, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Route {
        upstream: String,
        weight: Option<u8>,
    }

    /// What `text` reads as in a file of this `name`, and the checker finds `routes.N` too light below 10.
    fn load_as(name: &str, text: &str, environment: &[(&str, &str)]) -> Result<Whole, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(name);
        std::fs::write(&file, text).unwrap();
        let owned = environment.iter().map(|&(name, value)| (name.to_owned(), value.to_owned()));
        let sources = Sources { file: Some(file), environment: owned.collect(), ..Sources::default() };
        let check = |whole: &mut Whole, _: &Tree, problems: &mut Problems| {
            for (n, route) in whole.routes.iter().enumerate() {
                if route.weight.unwrap_or(0) < 10 {
                    problems.at(format!("routes.{n}"), |problems| problems.add("weight", "is too light"));
                }
            }
        };
        match sources.load(check) {
            Ok((whole, _)) => Ok(whole),
            Err(problems) => Err(problems.to_string().replace(&format!("{}/", dir.path().display()), "")),
        }
    }

    fn load(text: &str) -> Result<Whole, String> {
        load_as("a.yaml", text, &[])
    }

    #[test]
    fn yaml_and_toml_say_the_same() {
        let yaml = load("threads: 2\nlog: {level: info, every: 5s}\nroutes: [{upstream: a, weight: 10}]").unwrap();
        let toml = "threads = 2\nlog = { level = 'info', every = '5s' }\n[[routes]]\nupstream = 'a'\nweight = 10\n";
        assert_eq!(load_as("a.toml", toml, &[]).unwrap(), yaml);
        assert_eq!(yaml.log.every, Some(HumanDuration::from_secs(5)));
    }

    #[test]
    fn all_mistakes_are_told_at_once_with_their_place() {
        let text = "
            thread: 2
            log: {level: 5, every: 30}
            routes:
              - {upstream: a, weight: 1}
              - {upstram: b}
              - {upstream: c, weight: 300}
              - {upstream: d, weight: 3}
              - 7";
        let lines = "a.yaml: log.every: `30` has no unit: write `30s` for seconds or `30ms` for milliseconds\n\
            a.yaml: log.level: must be text, not a number\n\
            a.yaml: routes.1.upstram: is no key here: did you mean `upstream`?\n\
            a.yaml: routes.1: `upstream` is missing\n\
            a.yaml: routes.2.weight: must be a whole number from 0 to 255\n\
            a.yaml: routes.4: must be a section of keys and values, not a number\n\
            a.yaml: thread: is no key here: did you mean `threads`?\n\
            a.yaml: routes.0.weight: is too light\n\
            a.yaml: routes.3.weight: is too light";
        assert_eq!(load(text).unwrap_err(), lines);
    }

    #[test]
    fn a_mistake_does_not_make_another_one() {
        // Neither is the weight told to be too light that could not be read.
        let text = "routes: [{upstream: a, weight: heavy}, {upstream: {}, weight: 10}]";
        let lines = "a.yaml: routes.0.weight: must be a whole number from 0 to 255, not text\n\
            a.yaml: routes.1.upstream: must be text, not a section";
        assert_eq!(load(text).unwrap_err(), lines);
    }

    #[test]
    fn the_environment_wins_over_the_file_and_answers_for_itself() {
        let set = [("SIDEGATE_THREADS", "3"), ("SIDEGATE_LOG__LEVEL", "debug"), ("PATH", "/bin")];
        let whole = load_as("a.yaml", "threads: 2\nlog: {every: 1s}", &set).unwrap();
        assert_eq!(whole.threads, NonZeroU16::new(3));
        assert_eq!(whole.log, Log { level: "debug".to_owned(), every: Some(HumanDuration::from_secs(1)) });

        let wrong = [("SIDEGATE_THREADS", "0"), ("SIDEGATE_LOG__LEVLE", "debug"), ("SIDEGATE_LOGS", "x")];
        let lines = "SIDEGATE_LOG__LEVLE: log.levle: is no key here: did you mean `level`?\n\
            SIDEGATE_LOGS: logs: is no key here: did you mean `log`?\n\
            SIDEGATE_THREADS: threads: must be a whole number from 1 to 65535";
        assert_eq!(load_as("a.yaml", "threads: 2", &wrong).unwrap_err(), lines);
    }

    #[test]
    fn a_variable_nests_as_deep_as_the_stack_bears() {
        let (brackets, levels) = ("[".repeat(100_000), format!("SIDEGATE_{}A", "A__".repeat(50_000)));
        let set = [("SIDEGATE_LOG__LEVEL", &*brackets), (&*levels, "1")];
        let lines = format!(
            "SIDEGATE_LOG__LEVEL: log.level: has more than 32 brackets within each other\n\
             SIDEGATE_{}…: has more than 32 levels in its name",
            "A__".repeat(17)
        );
        assert_eq!(load_as("a.yaml", "threads: 2", &set).unwrap_err(), lines);
        let secret = format!("a{brackets}");
        assert_eq!(load_as("a.yaml", "", &[("SIDEGATE_LOG__LEVEL", &*secret)]).unwrap().log.level, secret);
    }

    #[test]
    fn what_kubernetes_says_of_a_service_is_no_configuration() {
        let links = [
            ("SIDEGATE_SERVICE_HOST", "10.0.0.1"),
            ("SIDEGATE_SERVICE_PORT", "80"),
            ("SIDEGATE_SERVICE_PORT_HTTP", "80"),
            ("SIDEGATE_PORT", "tcp://10.0.0.1:80"),
            ("SIDEGATE_PORT_80_TCP", "tcp://10.0.0.1:80"),
            ("SIDEGATE_PORT_80_TCP_ADDR", "10.0.0.1"),
            ("SIDEGATE_ADMIN_SERVICE_HOST", "10.0.0.1"),
        ];
        load_as("a.yaml", "threads: 2", &links).unwrap();
        assert!(load_as("a.yaml", "threads: 2", &[("SIDEGATE_PORT", "80")]).unwrap_err().contains("is no key here"));
    }

    #[test]
    fn an_option_wins_over_the_environment() {
        let environment = vec![("SIDEGATE_THREADS".to_owned(), "2".to_owned())];
        let sources = Sources { environment, ..Sources::default() };
        let sources = sources.with_option("--threads", "threads", "x").with_option("--level", "log.level", "warn");
        let problems = sources.load(|_: &mut Whole, _, _| {}).unwrap_err();
        assert_eq!(problems.to_string(), "--threads: threads: must be a whole number from 1 to 65535, not text");
    }

    #[test]
    fn a_file_that_cannot_be_read_is_one_mistake() {
        assert!(load("threads: [").unwrap_err().starts_with("a.yaml: is not YAML: "));
        assert_eq!(load("").unwrap(), load("{}").unwrap());
        assert!(load("log: !a {level: x}").unwrap_err().contains("a tag (`!name`) means nothing here"));
        assert_eq!(load("- a").unwrap_err(), "a.yaml: must have keys and values at its top");
        assert_eq!(load("threads:").unwrap_err(), "a.yaml: threads: has no value: give it one, or leave the key out");
        let sources = Sources { file: Some("/not/there.yaml".into()), ..Sources::default() };
        let missing = sources.load(|_: &mut Whole, _, _| {}).unwrap_err().to_string();
        assert_eq!(missing, "/not/there.yaml: cannot be read: No such file or directory (os error 2)");
        let toml = load_as("a.toml", "key = 'hush' hush", &[]).unwrap_err();
        assert!(
            toml.starts_with("a.toml: is not TOML: TOML parse error at line 1") && !toml.contains("hush"),
            "{toml}"
        );
    }

    #[test]
    fn a_key_that_stands_twice_is_one_mistake_of_several() {
        let text = "
            threads: 1
            threads: 2
            log: {level: 7}
            routes: [{upstream: a, weight: 10}, {upstream: a, upstream: b, weight: 10}]";
        let lines = "a.yaml: threads: stands twice: keep one of them\n\
            a.yaml: routes.1.upstream: stands twice: keep one of them\n\
            a.yaml: log.level: must be text, not a number";
        assert_eq!(load(text).unwrap_err(), lines);
    }

    #[test]
    fn a_merge_key_gives_what_is_not_given() {
        let merged =
            load("routes: [&a {upstream: a, weight: 10}, {<<: *a, upstream: b}, {<<: [{weight: 11}, *a]}]").unwrap();
        let route = |upstream: &str, weight| Route { upstream: upstream.to_owned(), weight: Some(weight) };
        assert_eq!(merged.routes, [route("a", 10), route("b", 10), route("a", 11)]);
        assert!(load("routes: [{<<: a}]").unwrap_err().contains("`<<` takes a section or a list of sections"));
    }

    #[test]
    fn keys_and_numbers_are_read_as_they_stand() {
        assert_eq!(load("1: x").unwrap_err().split(": ").nth(1), Some("1"));
        assert_eq!(
            load("threads: 99999999999999999999999").unwrap_err(),
            "a.yaml: threads: must be a whole number from 1 to 65535, not a fraction"
        );
        for secret in ["0123", "+5", "1e5", "nan", "1_0", "-0"] {
            assert_eq!(variable_value(secret), Value::from(secret), "{secret}");
        }
        assert_eq!(variable_value("12").to_u128(), Some(12));
        assert_eq!(variable_value("-12").to_i128(), Some(-12));
    }

    #[test]
    fn the_nearest_name_is_found() {
        let names = ["timeouts", "security_headers", "body_limit", "errors", "match", "upstream"];
        for (given, near) in [
            ("timeout", Some("timeouts")),
            ("Timeouts", Some("timeouts")),
            ("security-headers", Some("security_headers")),
            ("bodylimit", Some("body_limit")),
            ("body", Some("body_limit")),
            ("mathc", Some("match")),
            ("xyz", None),
        ] {
            assert_eq!(nearest(given, names), near, "{given}");
        }
    }
}
