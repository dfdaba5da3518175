//! Cross-tokenizer: the bytes of every id, and the alignment of two token sequences by comparing bytes.

pub mod alphabet;
pub mod batch;
pub mod charsmap;
pub mod json;
pub mod lossy;
pub mod matching;
pub mod normal;
pub mod push;
pub mod ranks;
pub mod resync;
pub mod spm;
pub mod stream;
pub mod vocab;
pub mod walk;

pub use batch::{Aligned, Aligner, Granularity, OnMismatch, Row};
pub use vocab::Vocab;
