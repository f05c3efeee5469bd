//! Everything that is wrong with a configuration, in one list.
//!
//! Who starts a proxy wants to hear of all mistakes at once, each with its key and what would be right.

use std::{error::Error, fmt, io::Read, path::Path};

use super::file;

/// One mistake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Where: the keys from the top of the file, `routes.0.match.path`. Empty for the file as a whole.
    pub key: String,
    /// What is wrong and what would be right. Never a secret.
    pub message: String,
    /// Who said so, if not the file: a variable of the environment, an option of the command line.
    pub origin: Option<String>,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(origin) = &self.origin {
            write!(f, "{origin}: ")?;
        }
        if !self.key.is_empty() {
            write!(f, "{}: ", self.key)?;
        }
        f.write_str(&self.message)
    }
}

/// All mistakes that were found, in the order in which they were found.
///
/// ```
/// use sidegate::config::Problems;
///
/// let mut problems = Problems::default();
/// problems.at("routes.0", |route| route.add("upstream", "there is no upstream `ap`; did you mean `api`?"));
/// assert_eq!(problems.to_string(), "routes.0.upstream: there is no upstream `ap`; did you mean `api`?");
/// ```
#[derive(Debug, Default)]
pub struct Problems {
    found: Vec<Problem>,
    place: String,
}

impl Problems {
    /// Adds the mistake `message` at `key`, which counts from the present place. An empty key is the place itself.
    pub fn add(&mut self, key: impl fmt::Display, message: impl Into<String>) {
        self.push(Problem { key: self.key(&key), message: message.into(), origin: None });
    }

    /// Adds a mistake whose key counts from the top, once.
    pub(super) fn push(&mut self, problem: Problem) {
        if !self.found.contains(&problem) {
            self.found.push(problem);
        }
    }

    /// Lets `look` add what it finds below `key`.
    pub fn at<T>(&mut self, key: impl fmt::Display, look: impl FnOnce(&mut Self) -> T) -> T {
        let inner = self.key(&key);
        let outer = std::mem::replace(&mut self.place, inner);
        let result = look(self);
        self.place = outer;
        result
    }

    /// Whether nothing was found.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// How many were found.
    #[must_use]
    pub fn len(&self) -> usize {
        self.found.len()
    }

    /// What was found.
    pub fn iter(&self) -> impl Iterator<Item = &Problem> {
        self.found.iter()
    }

    /// Says of each mistake whose value it is: `origin` knows that of a key.
    pub(super) fn set_origins(&mut self, origin: impl Fn(&str) -> Option<String>) {
        for problem in &mut self.found {
            problem.origin = problem.origin.take().or_else(|| origin(&problem.key));
        }
    }

    fn key(&self, key: &dyn fmt::Display) -> String {
        let key = key.to_string();
        match (self.place.is_empty(), key.is_empty()) {
            (true, _) => key,
            (false, true) => self.place.clone(),
            (false, false) => format!("{}.{key}", self.place),
        }
    }
}

impl IntoIterator for Problems {
    type Item = Problem;
    type IntoIter = std::vec::IntoIter<Problem>;

    fn into_iter(self) -> Self::IntoIter {
        self.found.into_iter()
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, problem) in self.found.iter().enumerate() {
            if n > 0 {
                writeln!(f)?;
            }
            problem.fmt(f)?;
        }
        Ok(())
    }
}

impl Error for Problems {}

/// Adds a mistake at `key` where the file at `path` cannot be read.
///
/// Returns whether it can.
pub fn check_readable(key: &str, path: &Path, problems: &mut Problems) -> bool {
    // A directory can be opened, and only then does not read.
    let read = file::open(path).and_then(|mut file| file.read(&mut [0]));
    if let Err(error) = &read {
        problems.add(key, format!("`{}` cannot be read: {error}", path.display()));
    }
    read.is_ok()
}

/// What the type of a value cannot say: rules between fields, bounds, names that must exist.
pub trait Check {
    /// Adds every mistake to `problems`, with its key counted from `self` and what would be right.
    fn check(&self, problems: &mut Problems);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_nest() {
        let mut problems = Problems::default();
        problems.add("threads", "must be at least 1");
        problems.at("routes", |routes| {
            routes.at(0, |route| {
                route.add("", "no such upstream");
                route.at("match", |of| of.add("path", "must begin with `/`"));
            });
        });
        problems.add("", "empty");
        let lines = "threads: must be at least 1\n\
            routes.0: no such upstream\n\
            routes.0.match.path: must begin with `/`\n\
            empty";
        assert_eq!(problems.to_string(), lines);
    }

    #[test]
    fn the_same_mistake_is_told_once() {
        let mut problems = Problems::default();
        problems.add("a", "wrong");
        problems.add("a", "wrong");
        problems.add("a", "also wrong");
        assert_eq!(problems.len(), 2);
    }

    #[test]
    fn the_origin_stands_first() {
        let mut problems = Problems::default();
        problems.add("threads", "must be at least 1");
        problems.set_origins(|key| (key == "threads").then(|| "SIDEGATE_THREADS".to_owned()));
        assert_eq!(problems.to_string(), "SIDEGATE_THREADS: threads: must be at least 1");
    }
}
