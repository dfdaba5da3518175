//! A block holds consecutive rows of exactly one sequence and can be understood without the footer.
//!
//! magic u32 | kind u16 | flags u16 | number u32 | rows u32 | first_row u32 | entries u32 | key_len u16 | zero u16
//! | payload_len u32 | key, padded to 8 | payload, padded to 8 | xxh3-64 of all before

use super::{check_key, MAX_BLOCK, MAX_BLOCK_ROWS, MAX_KEY};
use crate::bytes::{checksum, pad, padded, Cursor};
use crate::codec::Shape;

pub const MAGIC: [u8; 4] = *b"PSBK";
pub const FIXED: usize = 32;
/// Rows of a sequence in the shard's codec. Kinds from 1 are the spec's columns; from OPTIONAL on they may be skipped.
pub const KIND_ROWS: u16 = 0;
pub const KIND_OPTIONAL: u16 = 0x8000;
const FLAG_LAST: u16 = 1;

#[derive(Debug, Clone, Copy)]
pub struct Head<'a> {
    pub kind: u16,
    /// The last block of its sequence.
    pub last: bool,
    pub number: u32,
    pub rows: u32,
    pub first_row: u32,
    pub entries: u32,
    pub key: &'a str,
}

impl Head<'_> {
    pub fn shape(&self) -> Shape {
        Shape { rows: self.rows as usize, entries: self.entries as usize }
    }
}

/// A block whose checksum and structure are right.
pub struct Block<'a> {
    pub head: Head<'a>,
    pub payload: &'a [u8],
    pub sum: u64,
}

/// Appends a block to `out`; `fill` appends the payload. Returns (length, checksum).
pub fn encode(head: Head<'_>, out: &mut Vec<u8>, fill: impl FnOnce(&mut Vec<u8>)) -> (usize, u64) {
    let start = out.len();
    debug_assert!(start.is_multiple_of(8));
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&head.kind.to_le_bytes());
    out.extend_from_slice(&(if head.last { FLAG_LAST } else { 0 }).to_le_bytes());
    for word in [head.number, head.rows, head.first_row, head.entries] {
        out.extend_from_slice(&word.to_le_bytes());
    }
    out.extend_from_slice(&(head.key.len() as u16).to_le_bytes());
    out.extend_from_slice(&[0; 6]);
    out.extend_from_slice(head.key.as_bytes());
    pad(out);
    let payload = out.len();
    fill(out);
    let payload_len = (out.len() - payload) as u32;
    out[start + 28..start + 32].copy_from_slice(&payload_len.to_le_bytes());
    pad(out);
    let sum = checksum(&out[start..]);
    out.extend_from_slice(&sum.to_le_bytes());
    (out.len() - start, sum)
}

/// The whole length that a block claims, from its first FIXED bytes; bounded, so it may be allocated.
pub fn claimed_length(fixed: &[u8]) -> Result<usize, String> {
    let mut cursor = Cursor::new(fixed);
    if cursor.take(4)? != MAGIC {
        return Err("the magic bytes are not those of a block".to_string());
    }
    cursor.take(20)?;
    let key_len = usize::from(cursor.u16()?);
    cursor.u16()?;
    let payload_len = cursor.u32()? as usize;
    let len = FIXED + padded(key_len) + padded(payload_len) + 8;
    if key_len > MAX_KEY || len > MAX_BLOCK {
        return Err(format!("a block of {len} bytes, at most {MAX_BLOCK} are accepted"));
    }
    Ok(len)
}

/// Checks and splits a whole block; `bytes` is exactly one block.
pub fn decode(bytes: &[u8]) -> Result<Block<'_>, String> {
    let split = bytes.len().checked_sub(8).ok_or("a block of less than 8 bytes")?;
    let (body, tail) = bytes.split_at(split);
    let sum = checksum(body);
    if sum.to_le_bytes() != tail {
        return Err("the checksum differs".to_string());
    }
    if claimed_length(bytes)? != bytes.len() {
        return Err(format!("{} bytes where the block's header says {}", bytes.len(), claimed_length(bytes)?));
    }
    let mut cursor = Cursor::new(body);
    cursor.take(4)?;
    let (kind, flags, number) = (cursor.u16()?, cursor.u16()?, cursor.u32()?);
    let (rows, first_row, entries) = (cursor.u32()?, cursor.u32()?, cursor.u32()?);
    let key_len = usize::from(cursor.u16()?);
    cursor.zeros(2)?;
    let payload_len = cursor.u32()? as usize;
    let key = check_key(cursor.take(key_len)?)?;
    cursor.zeros(padded(key_len) - key_len)?;
    let payload = cursor.take(payload_len)?;
    cursor.zeros(padded(payload_len) - payload_len)?;
    cursor.end()?;
    if flags & !FLAG_LAST != 0 {
        return Err(format!("unknown block flags {flags:#x}"));
    }
    if kind < KIND_OPTIONAL && (rows == 0 || rows > MAX_BLOCK_ROWS) {
        return Err(format!("{rows} rows, 1 to {MAX_BLOCK_ROWS} are accepted"));
    }
    Ok(Block { head: Head { kind, last: flags & FLAG_LAST != 0, number, rows, first_row, entries, key }, payload, sum })
}
