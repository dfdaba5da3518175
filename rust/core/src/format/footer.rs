//! Footer (the index) and trailer of a shard.
//!
//! footer: magic 8 | blocks u32 | sequences u32 | tokens u64 | entries u64
//!       | per block: xxh3 u64, len u32, rows u32, entries u32, kind u16, zero u16
//!       | per sequence: blocks u32, tokens u32, key_len u16, ext_len u16, zero u32, token hash 16, content hash 16
//!       | per sequence: key, extension records (tag u16, len u16, data) | zeros to 8 | xxh3-64 of all before
//! trailer: footer_len u64 | file_len u64 | xxh3-64 of these 16 bytes | magic 8
//!
//! Offsets are not stored: blocks and sequences tile the file in order, so nothing can overlap.

use super::block::{FIXED as BLOCK_FIXED, KIND_OPTIONAL, KIND_ROWS};
use super::{check_key, MAX_BLOCK, MAX_BLOCK_ROWS, MAX_FOOTER};
use crate::bytes::{checksum, pad, padded, Cursor};
use crate::columns::{Column, MAX_COLUMNS};

pub const MAGIC: [u8; 8] = *b"PSINDEX\n";
pub const END_MAGIC: [u8; 8] = *b"\x89PSE\r\n\x1a\n";
pub const TRAILER: usize = 32;
const FIXED: usize = 32;
const BLOCK_ENTRY: usize = 24;
const SEQUENCE_ENTRY: usize = 48;
/// Extension tags from here on may be skipped by a reader that does not know them.
const OPTIONAL_TAG: u16 = 0x8000;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockEntry {
    pub sum: u64,
    pub len: u32,
    pub rows: u32,
    pub entries: u32,
    pub kind: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SequenceEntry {
    pub key: String,
    /// Blocks of this sequence; the first follows the last of the sequence before.
    pub blocks: u32,
    pub tokens: u32,
    pub token_hash: u128,
    /// xxh3-128 over the payloads, equal for equal content whatever the shard.
    pub content_hash: u128,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Footer {
    pub blocks: Vec<BlockEntry>,
    pub sequences: Vec<SequenceEntry>,
}

impl Footer {
    pub fn tokens(&self) -> u64 {
        self.sequences.iter().map(|s| u64::from(s.tokens)).sum()
    }

    pub fn entries(&self) -> u64 {
        self.blocks.iter().map(|b| u64::from(b.entries)).sum()
    }

    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&(self.blocks.len() as u32).to_le_bytes());
        out.extend_from_slice(&(self.sequences.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.tokens().to_le_bytes());
        out.extend_from_slice(&self.entries().to_le_bytes());
        for b in &self.blocks {
            out.extend_from_slice(&b.sum.to_le_bytes());
            for word in [b.len, b.rows, b.entries, u32::from(b.kind)] {
                out.extend_from_slice(&word.to_le_bytes());
            }
        }
        for s in &self.sequences {
            for word in [s.blocks, s.tokens, s.key.len() as u32, 0] {
                out.extend_from_slice(&word.to_le_bytes());
            }
            out.extend_from_slice(&s.token_hash.to_le_bytes());
            out.extend_from_slice(&s.content_hash.to_le_bytes());
        }
        for s in &self.sequences {
            out.extend_from_slice(s.key.as_bytes());
        }
        pad(&mut out);
        let sum = checksum(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Decodes a footer whose blocks must fill exactly `block_bytes` bytes.
    pub fn decode(bytes: &[u8], block_bytes: u64) -> Result<Footer, String> {
        let split = bytes.len().checked_sub(8).ok_or("less than 8 bytes")?;
        let (body, tail) = bytes.split_at(split);
        if checksum(body).to_le_bytes() != tail {
            return Err("the checksum differs".to_string());
        }
        let mut cursor = Cursor::new(body);
        if cursor.take(8)? != MAGIC {
            return Err("the magic bytes are not those of a footer".to_string());
        }
        let (n_blocks, n_sequences) = (cursor.u32()? as usize, cursor.u32()? as usize);
        let (tokens, entries) = (cursor.u64()?, cursor.u64()?);
        let needed = n_blocks as u64 * BLOCK_ENTRY as u64 + n_sequences as u64 * SEQUENCE_ENTRY as u64;
        if needed > cursor.left() as u64 {
            return Err(format!("{n_blocks} blocks and {n_sequences} sequences do not fit into {} bytes", bytes.len()));
        }
        let blocks = (0..n_blocks).map(|_| decode_block(&mut cursor)).collect::<Result<Vec<_>, _>>()?;
        let filled: u64 = blocks.iter().map(|b| u64::from(b.len)).sum();
        if filled != block_bytes {
            return Err(format!("the blocks take {filled} bytes, the file has {block_bytes} for them"));
        }
        let mut lengths = Vec::with_capacity(n_sequences);
        let mut sequences = Vec::with_capacity(n_sequences);
        for _ in 0..n_sequences {
            let (blocks, tokens) = (cursor.u32()?, cursor.u32()?);
            lengths.push((usize::from(cursor.u16()?), usize::from(cursor.u16()?)));
            cursor.zeros(4)?;
            let (token_hash, content_hash) = (cursor.u128()?, cursor.u128()?);
            sequences.push(SequenceEntry { key: String::new(), blocks, tokens, token_hash, content_hash });
        }
        for (s, (key_len, ext_len)) in sequences.iter_mut().zip(lengths) {
            s.key = check_key(cursor.take(key_len)?)?.to_string();
            check_extensions(cursor.take(ext_len)?)?;
        }
        if cursor.left() >= 8 {
            return Err(format!("{} trailing bytes", cursor.left()));
        }
        cursor.zeros(cursor.left())?;
        let footer = Footer { blocks, sequences };
        footer.check_tiling()?;
        if footer.tokens() != tokens || footer.entries() != entries {
            return Err(format!("{tokens} tokens and {entries} entries are stated, the parts hold others"));
        }
        Ok(footer)
    }

    fn check_tiling(&self) -> Result<(), String> {
        let mut blocks = self.blocks.iter();
        for s in &self.sequences {
            if s.blocks == 0 || s.tokens == 0 {
                return Err(format!("sequence {:?} has {} blocks and {} tokens", s.key, s.blocks, s.tokens));
            }
            let mut rows = 0u64;
            for _ in 0..s.blocks {
                let block = blocks.next().ok_or_else(|| format!("sequence {:?} has blocks behind the last", s.key))?;
                rows += if block.kind == KIND_ROWS { u64::from(block.rows) } else { 0 };
            }
            if rows != u64::from(s.tokens) {
                return Err(format!("sequence {:?} has {} tokens, its blocks {rows} rows", s.key, s.tokens));
            }
        }
        match blocks.next() {
            None => Ok(()),
            Some(_) => Err("blocks that belong to no sequence".to_string()),
        }
    }

    /// Every sequence has its row blocks and then those of each column in turn, whole and of the right length. Gives the
    /// number of the block that does not fit.
    pub fn check_columns(&self, columns: &[Column]) -> Result<(), (usize, String)> {
        let mut n = 0;
        for s in &self.sequences {
            let needed = |stage: usize| match stage {
                0 => u64::from(s.tokens),
                c => columns[c - 1].rows(s.tokens as usize) as u64,
            };
            let (mut stage, mut rows) = (0, 0);
            for (i, block) in self.blocks.iter().enumerate().skip(n).take(s.blocks as usize) {
                let kind = usize::from(block.kind);
                if block.kind >= KIND_OPTIONAL {
                    continue;
                }
                if kind != stage {
                    if kind > columns.len() || kind != stage + 1 || rows != needed(stage) {
                        return Err((
                            i,
                            format!("a block of kind {kind} after {rows} rows of kind {stage} in {:?}", s.key),
                        ));
                    }
                    (stage, rows) = (kind, 0);
                }
                rows += u64::from(block.rows);
                if kind > 0 {
                    let payload = block.rows as usize * columns[kind - 1].stride();
                    let len = BLOCK_FIXED + padded(s.key.len()) + padded(payload) + 8;
                    if len != block.len as usize || block.entries != 0 {
                        let what =
                            format!("{} bytes for {} rows of column {kind}, {len} are needed", block.len, block.rows);
                        return Err((i, what));
                    }
                }
            }
            n += s.blocks as usize;
            if stage != columns.len() || rows != needed(stage) {
                return Err((n.saturating_sub(1), format!("{rows} rows of column {stage} of {:?} end it", s.key)));
            }
        }
        Ok(())
    }
}

fn decode_block(cursor: &mut Cursor<'_>) -> Result<BlockEntry, String> {
    let (sum, len, rows) = (cursor.u64()?, cursor.u32()?, cursor.u32()?);
    let (entries, kind) = (cursor.u32()?, cursor.u16()?);
    cursor.zeros(2)?;
    if len as usize > MAX_BLOCK || len < 40 || !len.is_multiple_of(8) {
        return Err(format!("a block of {len} bytes"));
    }
    if usize::from(kind) > MAX_COLUMNS && kind < KIND_OPTIONAL {
        return Err(format!("a block of unknown kind {kind}"));
    }
    if kind < KIND_OPTIONAL && (rows == 0 || rows > MAX_BLOCK_ROWS || rows > len) {
        return Err(format!("{rows} rows in a block of {len} bytes"));
    }
    Ok(BlockEntry { sum, len, rows, entries, kind })
}

fn check_extensions(bytes: &[u8]) -> Result<(), String> {
    let mut cursor = Cursor::new(bytes);
    while cursor.left() > 0 {
        let (tag, len) = (cursor.u16()?, usize::from(cursor.u16()?));
        cursor.take(len)?;
        if tag < OPTIONAL_TAG {
            return Err(format!("unknown required extension {tag} of a sequence"));
        }
    }
    Ok(())
}

pub fn encode_trailer(footer_len: usize, file_len: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(TRAILER);
    out.extend_from_slice(&(footer_len as u64).to_le_bytes());
    out.extend_from_slice(&file_len.to_le_bytes());
    let sum = checksum(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out.extend_from_slice(&END_MAGIC);
    out
}

/// The footer's length, from the last TRAILER bytes of a file of `file_len` bytes with a header of `header_len`.
pub fn decode_trailer(bytes: &[u8], file_len: u64, header_len: usize) -> Result<usize, String> {
    let mut cursor = Cursor::new(bytes);
    let (footer_len, stated, sum) = (cursor.u64()?, cursor.u64()?, cursor.u64()?);
    if cursor.take(8)? != END_MAGIC {
        return Err("the end magic is missing: the file is torn, or bytes follow it".to_string());
    }
    if checksum(&bytes[..16]) != sum {
        return Err("the checksum differs".to_string());
    }
    if stated != file_len {
        return Err(format!("the file has {file_len} bytes, {stated} were written"));
    }
    let room = file_len.saturating_sub((header_len + TRAILER) as u64);
    if footer_len > room
        || footer_len > MAX_FOOTER as u64
        || footer_len < (FIXED + 8) as u64
        || !footer_len.is_multiple_of(8)
    {
        return Err(format!("footer length {footer_len}"));
    }
    Ok(footer_len as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Footer {
        let block = BlockEntry { sum: 7, len: 64, rows: 5, entries: 10, kind: KIND_ROWS };
        let sequence = |key: &str| SequenceEntry {
            key: key.to_string(),
            blocks: 1,
            tokens: 5,
            token_hash: 1 << 100,
            content_hash: 3,
        };
        Footer { blocks: vec![block.clone(), block], sequences: vec![sequence("a"), sequence("b")] }
    }

    #[test]
    fn round_trip_and_refusals() {
        let footer = sample();
        assert_eq!(Footer::decode(&footer.encode(), 128), Ok(footer.clone()));
        assert!(Footer::decode(&footer.encode(), 136).is_err_and(|e| e.contains("136")));
        let mut bombs = footer.encode();
        bombs[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        let end = bombs.len() - 8;
        let sum = checksum(&bombs[..end]);
        bombs[end..].copy_from_slice(&sum.to_le_bytes());
        assert!(Footer::decode(&bombs, 128).is_err_and(|e| e.contains("do not fit")));
        let mut missing = footer;
        missing.sequences.pop();
        assert!(Footer::decode(&missing.encode(), 128).is_err_and(|e| e.contains("belong to no sequence")));
    }
}
