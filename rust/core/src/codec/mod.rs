//! Codecs by number. The shard header names one; the envelope around a payload never changes with it.

pub mod bits;
pub mod half;
pub mod plain;

use crate::rows::{Rows, RowsMut};
use crate::spec::Spec;

/// What the block header says of a payload: rows, and entries over all rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub rows: usize,
    pub entries: usize,
}

/// The codec of a shard. Errors are sentences; the caller adds shard and block.
#[derive(Debug, Clone)]
pub enum Codec {
    Plain(plain::Plain),
}

impl Codec {
    pub fn for_spec(spec: &Spec) -> Codec {
        Codec::Plain(plain::Plain::new(spec.vocab_size, spec.k))
    }

    /// The codec a header names, or why it is refused.
    pub fn from_header(number: u16, params: &[u8], vocab_size: u32, k: u32) -> Result<Codec, String> {
        match number {
            plain::NUMBER => Ok(Codec::Plain(plain::Plain::from_params(params, vocab_size, k)?)),
            other => Err(format!("codec {other} is not known")),
        }
    }

    pub fn number(&self) -> u16 {
        match self {
            Codec::Plain(_) => plain::NUMBER,
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Codec::Plain(_) => "plain",
        }
    }

    pub fn params(&self) -> Vec<u8> {
        match self {
            Codec::Plain(c) => c.params(),
        }
    }

    /// Appends the payload of checked rows; `counts` holds the entries of each row.
    pub fn encode(&self, rows: &Rows<'_>, counts: &[u16], out: &mut Vec<u8>) {
        match self {
            Codec::Plain(c) => c.encode(rows, counts, out),
        }
    }

    /// Decodes the first `out.log_rest.len()` rows into caller memory of the spec's k entries a row.
    pub fn decode(&self, payload: &[u8], shape: Shape, out: RowsMut<'_>) -> Result<(), String> {
        match self {
            Codec::Plain(c) => c.decode(payload, shape, out),
        }
    }

    /// Decodes the first `out.len()` tokens only.
    pub fn decode_tokens(&self, payload: &[u8], shape: Shape, out: &mut [i32]) -> Result<(), String> {
        match self {
            Codec::Plain(c) => c.decode_tokens(payload, shape, out),
        }
    }
}
