//! The potstill teacher cache and the alignment of tokenizers (`xtok`) in pure Rust. It knows nothing of Python or torch.
//!
//! A cache is a folder of immutable, content-named shards, an append-only log of create-exclusive records and a
//! manifest that compacts the log. `docs/format.md` states the format; the modules here follow its order.

#![deny(unsafe_code)]

pub mod bytes;
pub mod codec;
pub mod columns;
pub mod error;
pub mod files;
pub mod format;
mod handles;
pub mod log;
mod mapped;
pub mod merge;
mod owned;
pub mod reader;
pub mod recover;
pub mod rows;
pub mod salvage;
pub mod shard;
pub mod spec;
pub mod verify;
pub mod writer;
pub mod xtok;

pub use error::{Error, Part, Result};
pub use reader::Reader;
pub use rows::{Rows, RowsMut};
pub use spec::Spec;
pub use writer::Writer;
