//! Files that a configuration names.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hash, Hasher},
    io::{self, Read},
    path::Path,
};

/// The largest file that is read: a thousand times what a bundle of certificates takes.
const MOST: u64 = 16 << 20;

/// Opens a file to read it. What is no regular file is refused: to open a FIFO is to wait for whoever writes to it.
///
/// # Errors
/// There is none, it is no regular file, or it may not be read.
pub fn open(path: &Path) -> io::Result<File> {
    let kind = fs::metadata(path)?.file_type();
    // A directory fails when it is read.
    if kind.is_file() || kind.is_dir() {
        return File::open(path);
    }
    Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"))
}

/// Reads a file of at most 16 MiB.
///
/// # Errors
/// As [`open`], or it cannot be read, or is larger.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    let size = open(path)?.take(MOST + 1).read_to_end(&mut text)?;
    if size as u64 > MOST { Err(io::ErrorKind::FileTooLarge.into()) } else { Ok(text) }
}

/// What files say, to be compared: a configuration whose files say something else is another one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Content(Option<u64>);

impl Content {
    /// What these files say now, if there are any. One that cannot be read says nothing.
    pub fn of<'a>(files: impl IntoIterator<Item = &'a Path>) -> Self {
        let mut hasher = None;
        for path in files {
            read(path).ok().hash(hasher.get_or_insert_with(DefaultHasher::new));
        }
        Self(hasher.map(|hasher| hasher.finish()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_say_something_else_are_told_apart() {
        let folder = tempfile::tempdir().unwrap();
        let (one, other) = (folder.path().join("one"), folder.path().join("other"));
        fs::write(&one, "a").unwrap();
        let of = || Content::of([&*one, &*other]);
        let alone = of();
        assert_eq!(of(), alone);
        fs::write(&other, "").unwrap();
        let both = of();
        assert_ne!(both, alone);
        fs::write(&one, "").unwrap();
        fs::write(&other, "a").unwrap();
        assert_ne!(of(), both);
        assert_eq!(Content::of([]), Content::default());
    }
}
