//! One error enum for the whole crate; messages are lower-case, carry the values and say what to do.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

pub type Result<T> = std::result::Result<T, Error>;

/// The part of a cache that a problem was found in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    Header,
    Tables,
    Block(u32),
    Index,
    Footer,
    Trailer,
    File,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Part::Header => write!(f, "header"),
            Part::Tables => write!(f, "tables"),
            Part::Block(n) => write!(f, "block {n}"),
            Part::Index => write!(f, "index"),
            Part::Footer => write!(f, "footer"),
            Part::Trailer => write!(f, "trailer"),
            Part::File => write!(f, "file"),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused an operation.
    #[error("cannot {action} {}: {source}{advice}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error, advice: &'static str },
    /// Bytes on disk are not what was written.
    #[error("{file}, {part}: {what}; `potstill verify` lists all damage, `potstill recover` salvages what is whole")]
    Damaged { file: String, part: Part, what: String },
    /// A file asks for something that this version does not know.
    #[error("{file}: {what}; this potstill reads format version 1, install a newer one")]
    Unsupported { file: String, what: String },
    /// The folder is not a cache, or is one already.
    #[error("{}: {what}", path.display())]
    Folder { path: PathBuf, what: String },
    /// An argument is wrong.
    #[error("{0}")]
    Refused(String),
    /// A row that may not be written.
    #[error("sequence {key:?}, row {row}: {what}")]
    BadRow { key: String, row: usize, what: String },
    /// The same key was given with other content.
    #[error("sequence {key:?} is already in {there} with other content than in {here}; use another key, or start a new cache")]
    Duplicate { key: String, here: String, there: String },
    /// The folder holds a cache of another spec.
    #[error("the cache in {} has {field} = {have}, but {given} was given; use the same spec, or another folder", path.display())]
    SpecMismatch { path: PathBuf, field: String, have: String, given: String },
    /// No such sequence.
    #[error("{0}")]
    MissingKey(String),
    /// Tokens differ from the cached ones.
    #[error(
        "sequence {key:?}: token {position} is {given}, the cached one is {cached}; \
         the rows of this key belong to other tokens (another text, tokenizer or template)"
    )]
    TokenMismatch { key: String, position: usize, given: String, cached: String },
    /// The writer stopped at an earlier error, or was closed.
    #[error("the writer cannot go on: {0}")]
    Stopped(String),
}

impl Error {
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
        let path = path.to_path_buf();
        move |source| Error::Io { action, path, source, advice: "" }
    }

    /// Adds what to do, unless that was said already.
    pub(crate) fn advise(self, what: &'static str) -> Error {
        match self {
            Error::Io { action, path, source, advice: "" } => Error::Io { action, path, source, advice: what },
            other => other,
        }
    }

    /// What happened, without what to do.
    pub(crate) fn brief(&self) -> String {
        match self {
            Error::Damaged { file, part, what } => format!("{file}, {part}: {what}"),
            other => other.to_string(),
        }
    }

    pub(crate) fn damaged(file: &str, part: Part, what: impl Into<String>) -> Error {
        Error::Damaged { file: file.to_string(), part, what: what.into() }
    }
}
