//! Rows of one sequence in memory of their own, collected block by block.

use crate::codec::dense::Values;
use crate::codec::Codec;
use crate::format::block::Block;
use crate::format::MAX_BLOCK_DECODED;
use crate::rows::{Rows, RowsMut};

/// Decoded entries for each byte of payload beyond which a sequence is no longer believed.
const MAX_ENTRIES_PER_BYTE: u64 = 256;

pub struct OwnedRows {
    k: usize,
    extra: usize,
    lse: bool,
    sampled: bool,
    payload: u64,
    pub tokens: Vec<i32>,
    ids: Vec<i32>,
    log_probs: Vec<f32>,
    log_rest: Vec<f32>,
    extras: Vec<f32>,
    lses: Vec<f32>,
    draws: Vec<i32>,
}

impl OwnedRows {
    pub fn new(codec: &Codec, k: usize) -> OwnedRows {
        let layout = match codec {
            Codec::Plain(_) => None,
            Codec::Dense(dense) => Some(dense.layout),
        };
        OwnedRows {
            k,
            extra: layout.map_or(0, |l| l.extra),
            lse: layout.is_some_and(|l| l.values == Values::Bf16Logits),
            sampled: layout.is_some_and(|l| l.sampled),
            payload: 0,
            tokens: Vec::new(),
            ids: Vec::new(),
            log_probs: Vec::new(),
            log_rest: Vec::new(),
            extras: Vec::new(),
            lses: Vec::new(),
            draws: Vec::new(),
        }
    }

    /// Decodes a block behind the rows that are there; gives its rows.
    pub fn push(&mut self, block: &Block<'_>, codec: &Codec) -> Result<Rows<'_>, String> {
        let (k, old, new) = (self.k, self.tokens.len(), self.tokens.len() + block.head.rows as usize);
        self.payload += block.payload.len() as u64;
        let size = new as u64 * k as u64;
        // a row takes at least 12 bits of payload: nothing is allocated for rows that cannot be there
        if block.head.rows as usize > block.payload.len()
            || size > MAX_BLOCK_DECODED.max(self.payload * MAX_ENTRIES_PER_BYTE)
        {
            return Err(format!("{} rows in {} bytes", block.head.rows, block.payload.len()));
        }
        self.resize(new);
        let out = RowsMut {
            ids: &mut self.ids[old * k..],
            log_probs: &mut self.log_probs[old * k..],
            log_rest: &mut self.log_rest[old..],
            extra: &mut self.extras[old * self.extra..],
            lse: if self.lse { &mut self.lses[old..] } else { &mut [] },
            draws: if self.sampled { &mut self.draws[old * k..] } else { &mut [] },
        };
        codec.decode(block.payload, block.head.shape(), out, Some(&mut self.tokens[old..]))?;
        Ok(self.rows().slice(old, new))
    }

    fn resize(&mut self, rows: usize) {
        self.tokens.resize(rows, 0);
        self.ids.resize(rows * self.k, 0);
        self.log_probs.resize(rows * self.k, 0.0);
        self.log_rest.resize(rows, 0.0);
        self.extras.resize(rows * self.extra, 0.0);
        self.lses.resize(if self.lse { rows } else { 0 }, 0.0);
        self.draws.resize(if self.sampled { rows * self.k } else { 0 }, 0);
    }

    /// Forgets the rows and keeps the memory.
    pub fn clear(&mut self) {
        self.payload = 0;
        self.resize(0);
    }

    pub fn rows(&self) -> Rows<'_> {
        Rows {
            k: self.k,
            tokens: &self.tokens,
            ids: &self.ids,
            log_probs: &self.log_probs,
            log_rest: &self.log_rest,
            extra: &self.extras,
            lse: &self.lses,
            draws: &self.draws,
        }
    }
}
