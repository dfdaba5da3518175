//! Cross-tokenizer: the bytes of every id, and the alignment of two token sequences by comparing bytes.

pub mod ahead;
pub mod alphabet;
pub mod batch;
pub mod charsmap;
pub mod json;
mod junction;
pub mod lossy;
pub mod matching;
pub mod normal;
pub mod pages;
pub mod push;
pub mod ranks;
pub mod record;
pub mod resync;
mod roles;
mod segment;
pub mod spm;
pub mod stream;
pub mod vocab;
pub mod walk;

pub use batch::{Aligner, OnMismatch, Row};
pub use record::Aligned;
pub use vocab::Vocab;
pub use walk::Granularity;
