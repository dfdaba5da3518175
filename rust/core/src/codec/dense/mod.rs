//! Codecs 1 and 2: ids as frequency ranks in class codes, log-probabilities as differences in a prefix code. `docs/format.md` states it.

pub mod bitstream;
pub mod classes;
pub mod coded;
mod decode;
pub mod dictionary;
mod encode;
pub mod prefix;
mod tables;
mod train;
pub mod values;
mod widest;

use std::sync::Arc;

pub use coded::Coded;
pub use decode::Sink;
pub use tables::{Tables, MAGIC as TABLES_MAGIC, MAX_TABLES};
pub use train::{train, TRAINED};
pub use values::Values;
pub(crate) use widest::check_rows;

use super::Shape;
use crate::bytes::Cursor;
use crate::rows::RowsMut;

pub const NUMBER: u16 = 1;
/// As codec 1, with a grid that each row moves and finer rests.
pub const NUMBER_2: u16 = 2;
/// Ids become ranks by a table in memory.
pub const MAX_VOCAB: u32 = 1 << 22;
/// Further log-probability columns of a row.
pub const MAX_EXTRA: usize = 64;
const PARAMS: usize = 32;
/// What rows of no entries may be.
pub const NO_ENTRIES: &str =
    "k = 0 keeps no entries: it is accepted with token_log_probs alone, and values that are neither plain nor bf16_logits";

/// What a row holds, from the spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// 1 or 2.
    pub codec: u16,
    pub values: Values,
    pub vocab_size: u32,
    pub k: u32,
    /// Log-probabilities of a row beside log_rest: log_rest at other temperatures, the realised token's.
    pub extra: usize,
    /// Entries carry how often they were drawn.
    pub sampled: bool,
}

impl Layout {
    /// First 8 bytes of the codec parameters: kind u8, sampled u8, per_nat u16, extra u16, zero u16.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let (kind, per_nat) = self.values.numbers();
        out.extend_from_slice(&[kind, u8::from(self.sampled)]);
        out.extend_from_slice(&per_nat.to_le_bytes());
        out.extend_from_slice(&(self.extra as u16).to_le_bytes());
        out.extend_from_slice(&[0; 2]);
    }

    pub fn decode(codec: u16, cursor: &mut Cursor<'_>, vocab_size: u32, k: u32) -> Result<Layout, String> {
        let (kind, sampled, per_nat) = (cursor.u8()?, cursor.u8()?, cursor.u16()?);
        let extra = usize::from(cursor.u16()?);
        cursor.zeros(2)?;
        if sampled > 1 || extra > MAX_EXTRA || vocab_size > MAX_VOCAB {
            return Err(format!("sampled {sampled}, {extra} further columns and a vocabulary of {vocab_size}"));
        }
        let values = Values::from_numbers(kind, per_nat)?;
        let values = if codec == NUMBER { values } else { values.of_codec_2() };
        let layout = Layout { codec, values, vocab_size, k, extra, sampled: sampled == 1 };
        layout.check()?;
        Ok(layout)
    }

    /// Refuses rows of no entries that hold more, or less, than one log-probability.
    pub fn check(&self) -> Result<(), String> {
        let bare = self.extra == 1 && !self.sampled && self.values != Values::Bf16Logits;
        match self.k > 0 || bare {
            true => Ok(()),
            false => Err(NO_ENTRIES.to_string()),
        }
    }

    /// Rests that are stored: without entries log_rest is 0 and is not.
    fn stored_rests(&self) -> usize {
        usize::from(self.k > 0) + self.extra
    }

    /// Words of 4 bytes that each row has beside the streams.
    fn words(&self) -> usize {
        match self.values {
            Values::Grid { .. } | Values::Shifted { .. } => 0,
            Values::Bf16Logits => 2 + self.extra,
            Values::Fp16 | Values::Fp32 => self.stored_rests(),
        }
    }

    /// Bytes of an entry's code beside the streams.
    fn code_bytes(&self) -> usize {
        match self.values {
            Values::Grid { .. } | Values::Shifted { .. } | Values::Bf16Logits => 0,
            Values::Fp16 => 2,
            Values::Fp32 => 4,
        }
    }
}

/// What the header of a shard says: the layout, and which tables the shard holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    pub layout: Layout,
    pub tables_len: usize,
    pub tables_sum: u64,
    /// Entries that the tables were made from; 0 for tables of no shard in particular.
    pub trained: u64,
}

impl Params {
    /// layout 8 | tables' length u32 | zero u32 | tables' xxh3-64 u64 | trained u64
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PARAMS);
        self.layout.encode(&mut out);
        out.extend_from_slice(&(self.tables_len as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&self.tables_sum.to_le_bytes());
        out.extend_from_slice(&self.trained.to_le_bytes());
        out
    }

    pub fn decode(codec: u16, bytes: &[u8], vocab_size: u32, k: u32) -> Result<Params, String> {
        let mut cursor = Cursor::new(bytes);
        let layout = Layout::decode(codec, &mut cursor, vocab_size, k)?;
        let tables_len = cursor.u32()? as usize;
        cursor.zeros(4)?;
        let (tables_sum, trained) = (cursor.u64()?, cursor.u64()?);
        cursor.end()?;
        if tables_len > MAX_TABLES || !tables_len.is_multiple_of(8) {
            return Err(format!("tables of {tables_len} bytes, at most {MAX_TABLES} are accepted"));
        }
        Ok(Params { layout, tables_len, tables_sum, trained })
    }
}

/// The codec with its tables; cheap to clone.
#[derive(Clone)]
pub struct Dense {
    pub layout: Layout,
    pub tables: Arc<Tables>,
}

impl Dense {
    pub fn new(layout: Layout) -> Dense {
        Dense { layout, tables: Arc::new(Tables::plain(layout)) }
    }

    pub fn params(&self) -> Params {
        let t = &self.tables;
        Params { layout: self.layout, tables_len: t.bytes.len(), tables_sum: t.sum, trained: t.trained }
    }

    /// Decodes the first `out.log_rest.len()` rows, and their tokens where they are wanted.
    pub fn decode(
        &self,
        payload: &[u8],
        shape: Shape,
        out: RowsMut<'_>,
        tokens: Option<&mut [i32]>,
    ) -> Result<(), String> {
        decode::into_rows(self, payload, shape, out, tokens)
    }

    /// Decodes all rows of a block as codes.
    pub fn decode_coded(&self, payload: &[u8], shape: Shape) -> Result<Coded, String> {
        decode::into_coded(self, payload, shape)
    }

    pub fn decode_tokens(&self, payload: &[u8], shape: Shape, out: &mut [i32]) -> Result<(), String> {
        decode::into_tokens(self, payload, shape, out)
    }

    /// Appends the payload of rows `first..end`, whose entries begin at `entry`.
    pub fn encode(&self, coded: &Coded, first: usize, end: usize, entry: usize, out: &mut Vec<u8>) {
        encode::block(self, coded, first, end, entry, out);
    }
}
