//! Codec 0: bit-packed ids, fp16 surprisals, fp32 log_rest.
//!
//! payload = token_bits u8, ragged u8, 6 zero bytes
//!         | tokens, rows x token_bits | [counts, rows x u16, when ragged = 1] | log_rest, rows x f32
//!         | ids, entries x id_bits | surprisals, entries x fp16          each part padded with zeros to 8 bytes

use super::bits::{bits_below, pack, packed_len, unpack, MAX_BITS};
use super::{half, Shape};
use crate::bytes::{pad, padded, Cursor};
use crate::rows::{Rows, RowsMut};

pub const NUMBER: u16 = 0;

#[derive(Debug, Clone)]
pub struct Plain {
    vocab_size: u32,
    k: usize,
    id_bits: u32,
}

struct Parts<'a> {
    token_bits: u32,
    tokens: &'a [u8],
    counts: Option<&'a [u8]>,
    log_rest: &'a [u8],
    ids: &'a [u8],
    surprisals: &'a [u8],
}

impl Plain {
    pub fn new(vocab_size: u32, k: u32) -> Plain {
        Plain { vocab_size, k: k as usize, id_bits: bits_below(vocab_size) }
    }

    /// Parameters: id_bits u8.
    pub fn params(&self) -> Vec<u8> {
        vec![self.id_bits as u8]
    }

    pub fn from_params(params: &[u8], vocab_size: u32, k: u32) -> Result<Plain, String> {
        let plain = Plain::new(vocab_size, k);
        if params != plain.params() {
            return Err(format!(
                "codec parameters {params:?}, a vocabulary of {vocab_size} needs {:?}",
                plain.params()
            ));
        }
        Ok(plain)
    }

    pub fn encode(&self, rows: &Rows<'_>, counts: &[u16], out: &mut Vec<u8>) {
        let largest = rows.tokens.iter().fold(0u32, |m, t| m.max(*t as u32));
        let token_bits = bits_below(largest.saturating_add(1)).max(self.id_bits);
        let ragged = counts.iter().any(|c| usize::from(*c) != self.k);
        out.extend_from_slice(&[token_bits as u8, u8::from(ragged), 0, 0, 0, 0, 0, 0]);
        pack(rows.tokens.iter().map(|t| *t as u32), token_bits, out);
        pad(out);
        if ragged {
            out.extend(counts.iter().flat_map(|c| c.to_le_bytes()));
            pad(out);
        }
        out.extend(rows.log_rest.iter().flat_map(|r| r.min(0.0).to_le_bytes()));
        pad(out);
        if ragged {
            let kept = |i: usize| i * rows.k..i * rows.k + usize::from(counts[i]);
            let n = rows.len();
            pack((0..n).flat_map(|i| &rows.ids[kept(i)]).map(|id| *id as u32), self.id_bits, out);
            pad(out);
            put_surprisals((0..n).flat_map(|i| &rows.log_probs[kept(i)]), out);
        } else {
            pack_ids(rows.ids, self.id_bits, out);
            pad(out);
            put_full(rows.log_probs, out);
        }
        pad(out);
    }

    fn split<'a>(&self, payload: &'a [u8], shape: Shape) -> Result<Parts<'a>, String> {
        let mut cursor = Cursor::new(payload);
        let token_bits = u32::from(cursor.u8()?);
        let ragged = cursor.u8()?;
        cursor.zeros(6)?;
        if token_bits < self.id_bits || token_bits > MAX_BITS || ragged > 1 {
            return Err(format!("token_bits {token_bits} and ragged {ragged} are out of range"));
        }
        if ragged == 0 && shape.entries != shape.rows * self.k {
            return Err(format!("{} entries for {} full rows of {}", shape.entries, shape.rows, self.k));
        }
        let mut part = |len: usize| -> Result<&'a [u8], String> {
            let bytes = cursor.take(len)?;
            cursor.zeros(padded(len) - len)?;
            Ok(bytes)
        };
        let tokens = part(packed_len(shape.rows, token_bits))?;
        let counts = if ragged == 1 { Some(part(shape.rows * 2)?) } else { None };
        let log_rest = part(shape.rows * 4)?;
        let ids = part(packed_len(shape.entries, self.id_bits))?;
        let surprisals = part(shape.entries * 2)?;
        cursor.end()?;
        spare_bits(tokens, shape.rows, token_bits)?;
        spare_bits(ids, shape.entries, self.id_bits)?;
        Ok(Parts { token_bits, tokens, counts, log_rest, ids, surprisals })
    }

    pub fn decode_tokens(&self, payload: &[u8], shape: Shape, out: &mut [i32]) -> Result<(), String> {
        let parts = self.split(payload, shape)?;
        if out.len() > shape.rows {
            return Err(format!("{} tokens wanted of a block of {}", out.len(), shape.rows));
        }
        unpack(parts.tokens, parts.token_bits, out);
        Ok(())
    }

    pub fn decode(&self, payload: &[u8], shape: Shape, out: RowsMut<'_>) -> Result<(), String> {
        let parts = self.split(payload, shape)?;
        let (n, k) = (out.log_rest.len(), self.k);
        if n > shape.rows || out.ids.len() != n * k || out.log_probs.len() != n * k {
            return Err(format!("{n} rows wanted of a block of {}", shape.rows));
        }
        for (slot, word) in out.log_rest.iter_mut().zip(parts.log_rest.chunks_exact(4)) {
            *slot = f32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        }
        if let Some(i) = out.log_rest.iter().position(|r| r.is_nan() || *r > 0.0) {
            return Err(format!("row {i} has log_rest {}", out.log_rest[i]));
        }
        match parts.counts {
            None => {
                self.check_max(unpack(parts.ids, self.id_bits, out.ids))?;
                take_surprisals(parts.surprisals, out.log_probs)
            }
            Some(counts) => self.decode_ragged(&parts, counts, shape, out),
        }
    }

    fn decode_ragged(&self, parts: &Parts<'_>, counts: &[u8], shape: Shape, out: RowsMut<'_>) -> Result<(), String> {
        let (n, k) = (out.log_rest.len(), self.k);
        let counts: Vec<usize> =
            counts.chunks_exact(2).map(|c| usize::from(u16::from_le_bytes([c[0], c[1]]))).collect();
        if let Some(i) = counts.iter().position(|c| *c > k) {
            return Err(format!("row {i} counts {} entries of at most {k}", counts[i]));
        }
        let total: usize = counts.iter().sum();
        if total != shape.entries {
            return Err(format!("rows count {total} entries, the block has {}", shape.entries));
        }
        let wanted: usize = counts[..n].iter().sum();
        let mut ids = vec![0i32; wanted];
        let mut log_probs = vec![0f32; wanted];
        self.check_max(unpack(parts.ids, self.id_bits, &mut ids))?;
        take_surprisals(parts.surprisals, &mut log_probs)?;
        out.ids.fill(-1);
        out.log_probs.fill(f32::NEG_INFINITY);
        let mut at = 0;
        for (i, count) in counts[..n].iter().enumerate() {
            out.ids[i * k..i * k + count].copy_from_slice(&ids[at..at + count]);
            out.log_probs[i * k..i * k + count].copy_from_slice(&log_probs[at..at + count]);
            at += count;
        }
        Ok(())
    }

    fn check_max(&self, max: u32) -> Result<(), String> {
        if max >= self.vocab_size {
            return Err(format!("id {max} in a vocabulary of {}", self.vocab_size));
        }
        Ok(())
    }
}

// bits of the last byte behind the last value
fn spare_bits(bytes: &[u8], n: usize, bits: u32) -> Result<(), String> {
    let used = (n * bits as usize) % 8;
    match bytes.last() {
        Some(last) if used != 0 && last >> used != 0 => Err("padding bits are not zero".to_string()),
        _ => Ok(()),
    }
}

fn pack_ids(ids: &[i32], bits: u32, out: &mut Vec<u8>) {
    if bits != 16 {
        return pack(ids.iter().map(|id| *id as u32), bits, out);
    }
    let start = out.len();
    out.resize(start + ids.len() * 2, 0);
    for (pair, id) in out[start..].chunks_exact_mut(2).zip(ids) {
        pair.copy_from_slice(&(*id as u16).to_le_bytes());
    }
}

fn put_full(log_probs: &[f32], out: &mut Vec<u8>) {
    let start = out.len();
    out.resize(start + log_probs.len() * 2, 0);
    for (pair, lp) in out[start..].chunks_exact_mut(2).zip(log_probs) {
        pair.copy_from_slice(&half::encode(-*lp).to_le_bytes());
    }
}

fn put_surprisals<'a>(log_probs: impl Iterator<Item = &'a f32>, out: &mut Vec<u8>) {
    out.extend(log_probs.flat_map(|lp| half::encode(-*lp).to_le_bytes()));
}

fn take_surprisals(bytes: &[u8], out: &mut [f32]) -> Result<(), String> {
    let mut largest = 0u16;
    for (slot, pair) in out.iter_mut().zip(bytes.chunks_exact(2)) {
        let half = u16::from_le_bytes([pair[0], pair[1]]);
        largest = largest.max(half);
        *slot = half::decode(half);
    }
    if largest > half::INFINITE {
        return Err(format!("surprisal {largest:#06x} is negative or not a number"));
    }
    Ok(())
}
