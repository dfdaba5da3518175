//! Shard header: what is needed before a single block can be understood.
//!
//! magic 8 | major u16 | minor u16 | header_len u32 | required u64 | optional u64 | codec u16 | params_len u16
//! | vocab_size u32 | k u32 | zero u32 | spec hash 32 | params, zero-padded to 8 | xxh3-64 of all before

use super::{MAJOR, MAX_HEADER, MINOR};
use crate::bytes::{checksum, pad, padded, Cursor};
use crate::codec::{Codec, Declared};
use crate::spec::Spec;

/// First byte above 127, then CR LF, ^Z and LF: a transfer that changes text is noticed at once.
pub const MAGIC: [u8; 8] = *b"\x89PSC\r\n\x1a\n";
/// Bytes before the codec parameters.
pub const FIXED: usize = 80;
/// The shard holds tables before its first block and behind its last.
const TABLES: u64 = 1;
/// Sequences have the further columns of the spec.
const COLUMNS: u64 = 2;
/// Required flags that this version knows.
const KNOWN_REQUIRED: u64 = TABLES | COLUMNS;

#[derive(Debug, Clone)]
pub struct Header {
    pub len: usize,
    pub minor: u16,
    pub optional: u64,
    /// Sequences have the further columns of the spec.
    pub columns: bool,
    pub codec: Declared,
    pub vocab_size: u32,
    pub k: u32,
    pub spec_hash: [u8; 32],
}

/// Why a header was not accepted.
pub enum Refusal {
    Damaged(String),
    Unsupported(String),
}

impl From<String> for Refusal {
    fn from(what: String) -> Self {
        Refusal::Damaged(what)
    }
}

pub fn encode(spec: &Spec, codec: &Codec) -> Vec<u8> {
    let params = codec.params();
    let len = FIXED + padded(params.len()) + 8;
    let mut out = Vec::with_capacity(len);
    out.extend_from_slice(&MAGIC);
    out.extend_from_slice(&MAJOR.to_le_bytes());
    let (tables, columns) = (!codec.tables().is_empty(), !spec.columns.is_empty());
    // what an older version can read is written as that version
    let minor = if columns || spec.k == 0 { MINOR } else { codec.number().min(MINOR) };
    out.extend_from_slice(&minor.to_le_bytes());
    out.extend_from_slice(&(len as u32).to_le_bytes());
    let required = if tables { TABLES } else { 0 } | if columns { COLUMNS } else { 0 };
    out.extend_from_slice(&required.to_le_bytes());
    out.extend_from_slice(&[0; 8]); // optional flags
    out.extend_from_slice(&codec.number().to_le_bytes());
    out.extend_from_slice(&(params.len() as u16).to_le_bytes());
    out.extend_from_slice(&spec.vocab_size.to_le_bytes());
    out.extend_from_slice(&spec.k.to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    out.extend_from_slice(&spec.hash);
    out.extend_from_slice(&params);
    pad(&mut out);
    let sum = checksum(&out);
    out.extend_from_slice(&sum.to_le_bytes());
    out
}

/// Length of the header that starts with `fixed` (FIXED bytes); magic and version are judged here.
pub fn length(fixed: &[u8]) -> Result<usize, Refusal> {
    let mut cursor = Cursor::new(fixed);
    if cursor.take(8)? != MAGIC {
        return Err(Refusal::Damaged("the magic bytes are not those of a shard".to_string()));
    }
    let (major, _minor, len) = (cursor.u16()?, cursor.u16()?, cursor.u32()? as usize);
    if major != MAJOR {
        return Err(Refusal::Unsupported(format!("format major version {major}")));
    }
    if !(FIXED + 8..=MAX_HEADER).contains(&len) || !len.is_multiple_of(8) {
        return Err(Refusal::Damaged(format!("header length {len}")));
    }
    Ok(len)
}

/// A whole header of `length(..)` bytes. The checksum is judged first, so a flipped bit is damage, not a new flag.
pub fn decode(bytes: &[u8]) -> Result<Header, Refusal> {
    let body = &bytes[..bytes.len() - 8];
    if checksum(body).to_le_bytes() != bytes[bytes.len() - 8..] {
        return Err(Refusal::Damaged("the checksum differs".to_string()));
    }
    let mut cursor = Cursor::new(body);
    cursor.take(10)?;
    let minor = cursor.u16()?;
    cursor.u32()?;
    let (required, optional) = (cursor.u64()?, cursor.u64()?);
    let unknown = required & !KNOWN_REQUIRED;
    if unknown != 0 {
        return Err(Refusal::Unsupported(format!("required flag bit {}", unknown.trailing_zeros())));
    }
    let (number, params_len) = (cursor.u16()?, usize::from(cursor.u16()?));
    let (vocab_size, k) = (cursor.u32()?, cursor.u32()?);
    cursor.zeros(4)?;
    let mut spec_hash = [0u8; 32];
    spec_hash.copy_from_slice(cursor.take(32)?);
    let params = cursor.take(params_len)?;
    cursor.zeros(padded(params_len) - params_len)?;
    cursor.end()?;
    if vocab_size == 0 || vocab_size > i32::MAX as u32 || k > vocab_size {
        return Err(Refusal::Damaged(format!("vocab_size {vocab_size} with k {k}")));
    }
    let codec = Declared::from_header(number, params, vocab_size, k).map_err(Refusal::Unsupported)?;
    if (codec.tables_len() > 0) != (required & TABLES != 0) {
        return Err(Refusal::Damaged(format!("codec {number} with required flags {required:#x}")));
    }
    let columns = required & COLUMNS != 0;
    Ok(Header { len: bytes.len(), minor, optional, columns, codec, vocab_size, k, spec_hash })
}
