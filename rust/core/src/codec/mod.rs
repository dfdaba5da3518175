//! Codecs by number. The shard header names one; the envelope around a payload never changes with it.

pub mod bits;
pub mod dense;
pub mod half;
pub mod plain;

use crate::rows::RowsMut;
use crate::spec::Spec;
use dense::{Dense, Params};

/// What the block header says of a payload: rows, and entries over all rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    pub rows: usize,
    pub entries: usize,
}

/// The codec that a header declares. A dense one cannot decode before its tables are read.
#[derive(Debug, Clone)]
pub enum Declared {
    Plain(plain::Plain),
    Dense(Params),
}

impl Declared {
    /// The codec a header names, or why it is refused.
    pub fn from_header(number: u16, params: &[u8], vocab_size: u32, k: u32) -> Result<Declared, String> {
        match number {
            plain::NUMBER if k == 0 => Err("rows of no entries with codec 0".to_string()),
            plain::NUMBER => Ok(Declared::Plain(plain::Plain::from_params(params, vocab_size, k)?)),
            dense::NUMBER | dense::NUMBER_2 => Ok(Declared::Dense(Params::decode(number, params, vocab_size, k)?)),
            other => Err(format!("codec {other} is not known")),
        }
    }

    pub fn name(&self) -> &'static str {
        match self {
            Declared::Plain(_) => "plain",
            Declared::Dense(_) => "dense",
        }
    }

    /// Bytes of the tables that stand before the first block and again behind the last.
    pub fn tables_len(&self) -> usize {
        match self {
            Declared::Plain(_) => 0,
            Declared::Dense(params) => params.tables_len,
        }
    }

    /// Is this how the spec wants rows to be stored?
    pub fn fits(&self, spec: &Spec) -> bool {
        match self {
            Declared::Plain(_) => spec.layout.is_none(),
            Declared::Dense(params) => spec.layout == Some(params.layout),
        }
    }
}

/// A codec that is ready. Errors are sentences; the caller adds shard and block.
#[derive(Clone)]
pub enum Codec {
    Plain(plain::Plain),
    Dense(Dense),
}

impl Codec {
    pub fn for_spec(spec: &Spec) -> Codec {
        match spec.layout {
            None => Codec::Plain(plain::Plain::new(spec.vocab_size, spec.k)),
            Some(layout) => Codec::Dense(Dense::new(layout)),
        }
    }

    pub fn number(&self) -> u16 {
        match self {
            Codec::Plain(_) => plain::NUMBER,
            Codec::Dense(c) => c.layout.codec,
        }
    }

    pub fn params(&self) -> Vec<u8> {
        match self {
            Codec::Plain(c) => c.params(),
            Codec::Dense(c) => c.params().encode(),
        }
    }

    /// The tables as stored.
    pub fn tables(&self) -> &[u8] {
        match self {
            Codec::Plain(_) => &[],
            Codec::Dense(c) => &c.tables.bytes,
        }
    }

    /// Decodes the first `out.log_rest.len()` rows into caller memory of the spec's k entries a row, and their tokens.
    pub fn decode(
        &self,
        payload: &[u8],
        shape: Shape,
        out: RowsMut<'_>,
        tokens: Option<&mut [i32]>,
    ) -> Result<(), String> {
        match self {
            Codec::Plain(c) => {
                tokens.map_or(Ok(()), |t| c.decode_tokens(payload, shape, t))?;
                c.decode(payload, shape, out)
            }
            Codec::Dense(c) => c.decode(payload, shape, out, tokens),
        }
    }

    /// Decodes the first `out.len()` tokens only.
    pub fn decode_tokens(&self, payload: &[u8], shape: Shape, out: &mut [i32]) -> Result<(), String> {
        match self {
            Codec::Plain(c) => c.decode_tokens(payload, shape, out),
            Codec::Dense(c) => c.decode_tokens(payload, shape, out),
        }
    }
}
