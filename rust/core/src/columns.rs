//! Further columns of a sequence: hidden states, scores, class vectors, named values of each token. They are stored as they
//! are given, in blocks of their own behind the row blocks.

use std::collections::HashSet;

use serde_json::Value;
use xxhash_rust::xxh3::{xxh3_128, Xxh3Default};

use crate::error::{Error, Result};
use crate::format::block::{self, Head};
use crate::format::footer::BlockEntry;
use crate::format::MAX_BLOCK_ROWS;

/// Columns of a spec; block kinds 1 to 64 are theirs.
pub const MAX_COLUMNS: usize = 64;
/// Bytes of one row.
pub const MAX_STRIDE: usize = 1 << 20;
const MAX_NAME: usize = 64;
/// Payload of one block, where a row is not larger.
const BLOCK_BYTES: usize = 1 << 20;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    Fp16,
    Bf16,
    Fp32,
}

/// `width` numbers for each token, or for the sequence as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    pub dtype: Dtype,
    pub width: usize,
    pub per_token: bool,
}

impl Column {
    /// Bytes of one row.
    pub fn stride(&self) -> usize {
        self.width * if self.dtype == Dtype::Fp32 { 4 } else { 2 }
    }

    /// Rows for a sequence of so many tokens.
    pub fn rows(&self, tokens: usize) -> usize {
        if self.per_token {
            tokens
        } else {
            1
        }
    }

    fn rows_of_block(&self) -> usize {
        (BLOCK_BYTES / self.stride()).clamp(1, MAX_BLOCK_ROWS as usize)
    }

    /// The place of the first number that is NaN or infinite.
    fn first_not_finite(&self, bytes: &[u8]) -> Option<usize> {
        // a number is finite when its exponent bits are not all ones
        let short = |mask: u16| bytes.chunks_exact(2).position(|b| u16::from_le_bytes([b[0], b[1]]) & mask == mask);
        match self.dtype {
            Dtype::Fp16 => short(0x7c00),
            Dtype::Bf16 => short(0x7f80),
            Dtype::Fp32 => bytes.chunks_exact(4).position(|b| {
                let bits = u32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                bits & 0x7f80_0000 == 0x7f80_0000
            }),
        }
    }

    /// Checks the payload of a block of `rows` rows.
    pub fn check(&self, payload: &[u8], rows: usize) -> std::result::Result<(), String> {
        if payload.len() != rows * self.stride() {
            let (name, have, want) = (&self.name, payload.len(), rows * self.stride());
            return Err(format!("{have} bytes of column {name:?}, {rows} rows take {want}"));
        }
        match self.first_not_finite(payload) {
            Some(at) => Err(format!("column {:?}, row {}: a number that is not finite", self.name, at / self.width)),
            None => Ok(()),
        }
    }
}

/// The columns that a spec names: objects with name, dtype, width and per ("token" or "sequence").
pub fn from_spec(value: Option<&Value>) -> std::result::Result<Vec<Column>, String> {
    let list = match value {
        None => return Ok(Vec::new()),
        Some(Value::Array(list)) if list.len() <= MAX_COLUMNS => list,
        Some(Value::Array(list)) => {
            return Err(format!("the spec has {} columns, at most {MAX_COLUMNS} are accepted", list.len()))
        }
        Some(other) => return Err(format!("the spec's columns are {other}, a list is accepted")),
    };
    let columns = list.iter().map(column).collect::<std::result::Result<Vec<_>, _>>()?;
    let mut names = HashSet::new();
    match columns.iter().find(|c| !names.insert(c.name.as_str())) {
        Some(twice) => Err(format!("the spec has two columns {:?}", twice.name)),
        None => Ok(columns),
    }
}

fn column(value: &Value) -> std::result::Result<Column, String> {
    let text = |name: &str| value.get(name).and_then(Value::as_str);
    let bad = |what: &str| format!("the spec's column {value}: {what}");
    let name = text("name").filter(|n| (1..=MAX_NAME).contains(&n.len()));
    let name = name.ok_or_else(|| bad("a name of 1 to 64 bytes is needed"))?.to_string();
    let dtype = match text("dtype") {
        Some("fp16") => Dtype::Fp16,
        Some("bf16") => Dtype::Bf16,
        Some("fp32") => Dtype::Fp32,
        _ => return Err(bad("dtype fp16, bf16 or fp32 is needed")),
    };
    let per_token = match text("per") {
        Some("token") => true,
        Some("sequence") => false,
        _ => return Err(bad("per token or sequence is needed")),
    };
    let width = value.get("width").and_then(Value::as_u64).filter(|w| (1..=MAX_STRIDE as u64).contains(w));
    let width = width.ok_or_else(|| bad("a width from 1 is needed"))? as usize;
    let column = Column { name, dtype, width, per_token };
    if column.stride() > MAX_STRIDE {
        return Err(bad("a row of it is larger than 1 MiB"));
    }
    Ok(column)
}

/// Values of all columns of one sequence, little-endian, row after row.
#[derive(Clone, Copy, Default)]
pub struct Values<'a> {
    pub columns: &'a [Column],
    pub bytes: &'a [&'a [u8]],
}

impl Values<'_> {
    /// Refuses what may not be written, naming sequence, column and row.
    pub fn check(&self, key: &str, tokens: usize) -> Result<()> {
        if self.columns.len() != self.bytes.len() {
            let (have, want) = (self.bytes.len(), self.columns.len());
            let names: Vec<&str> = self.columns.iter().map(|c| c.name.as_str()).collect();
            let what = format!("sequence {key:?} has {have} further columns, the spec has {want}: {names:?}");
            return Err(Error::Refused(what));
        }
        for (column, bytes) in self.columns.iter().zip(self.bytes) {
            let checked = column.check(bytes, column.rows(tokens));
            checked.map_err(|what| Error::Refused(format!("sequence {key:?}: {what}")))?;
        }
        Ok(())
    }

    /// The content hash of a sequence whose rows have `rows`.
    pub fn hash(&self, rows: u128) -> u128 {
        if self.columns.is_empty() {
            return rows;
        }
        let mut all = Xxh3Default::new();
        self.bytes.iter().for_each(|b| all.update(b));
        join(rows, all.digest128())
    }

    /// Appends the blocks of all columns; the last one is the last of its sequence.
    pub fn encode(&self, key: &str, first_block: u32, bytes: &mut Vec<u8>, blocks: &mut Vec<BlockEntry>) {
        for (c, (column, values)) in self.columns.iter().zip(self.bytes).enumerate() {
            let step = column.rows_of_block() * column.stride();
            for (n, part) in values.chunks(step).enumerate() {
                let head = Head {
                    kind: kind(c),
                    last: c + 1 == self.columns.len() && n * step + part.len() == values.len(),
                    number: first_block + blocks.len() as u32,
                    rows: (part.len() / column.stride()) as u32,
                    first_row: (n * column.rows_of_block()) as u32,
                    entries: 0,
                    key,
                };
                let (len, sum) = block::encode(head, bytes, |out| out.extend_from_slice(part));
                blocks.push(BlockEntry { sum, len: len as u32, rows: head.rows, entries: 0, kind: head.kind });
            }
        }
    }
}

/// The block kind of column number `c`.
pub fn kind(c: usize) -> u16 {
    c as u16 + 1
}

/// The content hash from those of the rows and of all column payloads, one after the other.
pub fn join(rows: u128, columns: u128) -> u128 {
    let mut both = [0u8; 32];
    both[..16].copy_from_slice(&rows.to_le_bytes());
    both[16..].copy_from_slice(&columns.to_le_bytes());
    xxh3_128(&both)
}

/// Columns of one sequence that are collected block by block.
#[derive(Default)]
pub struct Collected {
    pub bytes: Vec<Vec<u8>>,
}

impl Collected {
    /// Takes in a column block, which must follow the one before it.
    pub fn push(&mut self, columns: &[Column], block: &block::Block<'_>) -> std::result::Result<(), String> {
        self.bytes.resize(columns.len(), Vec::new());
        let c = usize::from(block.head.kind) - 1;
        let column = columns.get(c).ok_or_else(|| format!("a block of unknown kind {}", block.head.kind))?;
        column.check(block.payload, block.head.rows as usize)?;
        if self.bytes[c].len() != block.head.first_row as usize * column.stride() {
            return Err(format!("row {} of column {:?} does not follow", block.head.first_row, column.name));
        }
        self.bytes[c].extend_from_slice(block.payload);
        Ok(())
    }

    pub fn slices(&self) -> Vec<&[u8]> {
        self.bytes.iter().map(Vec::as_slice).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn reads_and_refuses_specs() {
        let good = json!([{"name": "hidden", "dtype": "bf16", "width": 3, "per": "token", "more": 1}]);
        let columns = from_spec(Some(&good)).expect("columns");
        assert_eq!((columns[0].stride(), columns[0].rows(5), kind(0)), (6, 5, 1));
        for bad in [
            json!({}),
            json!([{"name": "", "dtype": "bf16", "width": 3, "per": "token"}]),
            json!([{"name": "a", "dtype": "int8", "width": 3, "per": "token"}]),
            json!([{"name": "a", "dtype": "fp32", "width": 0, "per": "token"}]),
            json!([{"name": "a", "dtype": "fp32", "width": 300_000, "per": "token"}]),
            json!([{"name": "a", "dtype": "fp32", "width": 1, "per": "word"}]),
            json!([{"name": "a", "dtype": "fp32", "width": 1, "per": "token"}, {"name": "a", "dtype": "fp16", "width": 1, "per": "token"}]),
        ] {
            assert!(from_spec(Some(&bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn finds_what_is_not_finite() {
        let column = |dtype, width| Column { name: "c".into(), dtype, width, per_token: true };
        let words = |w: &[u16]| w.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        assert!(column(Dtype::Fp16, 1).check(&words(&[0x7bff, 0x0001]), 2).is_ok());
        assert!(column(Dtype::Fp16, 1).check(&words(&[0, 0xfc00]), 2).is_err_and(|e| e.contains("row 1")));
        assert!(column(Dtype::Bf16, 2).check(&words(&[0, 0, 0, 0x7fc0]), 2).is_err_and(|e| e.contains("row 1")));
        assert!(column(Dtype::Fp32, 1).check(&f32::NAN.to_le_bytes(), 1).is_err());
        assert!(column(Dtype::Fp32, 1).check(&f32::MAX.to_le_bytes(), 1).is_ok());
        assert!(column(Dtype::Fp32, 1).check(&[0; 8], 1).is_err_and(|e| e.contains("8 bytes")));
    }
}
