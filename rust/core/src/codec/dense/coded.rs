//! Rows as codes, before ids become ranks: what the content hash is taken of.

use xxhash_rust::xxh3::xxh3_128;

use super::values::{grid_code, grid_value, Values};
use super::Layout;
use crate::rows::Rows;

/// Rows of one sequence, or of one block; entries of a row by code, equal codes by id.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Coded {
    pub tokens: Vec<u32>,
    /// Entries of each row.
    pub counts: Vec<u16>,
    pub ids: Vec<u32>,
    pub codes: Vec<u32>,
    /// Draws of each entry, less 1; empty unless the layout has them.
    pub draws: Vec<u32>,
    /// log_rest and the layout's further log-probabilities, row after row.
    pub rests: Vec<u32>,
    /// fp32 bits of the log-sum-exp; empty unless the layout has it.
    pub lse: Vec<u32>,
}

/// On a grid 0 is a probability of zero; otherwise the bits of the fp32 number.
pub fn rest_code(values: Values, log_rest: f32) -> u32 {
    match values {
        Values::Grid { .. } if log_rest == f32::NEG_INFINITY => 0,
        Values::Grid { per_nat } => 1 + grid_code(log_rest, f32::from(per_nat)),
        _ => (log_rest.min(0.0) + 0.0).to_bits(),
    }
}

#[inline]
pub fn rest_value(values: Values, code: u32) -> f32 {
    match values {
        Values::Grid { .. } if code == 0 => f32::NEG_INFINITY,
        Values::Grid { per_nat } => grid_value(code - 1, 1.0 / f32::from(per_nat)),
        _ => f32::from_bits(code),
    }
}

impl Coded {
    /// Codes of checked rows of `counts` entries. Refuses, with the row, what the values cannot hold within their bound.
    pub fn new(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> Result<Coded, (usize, String)> {
        let (n, values) = (rows.len(), layout.values);
        let total: usize = counts.iter().map(|c| usize::from(*c)).sum();
        let mut coded = Coded {
            tokens: rows.tokens.iter().map(|t| *t as u32).collect(),
            counts: counts.to_vec(),
            ids: Vec::with_capacity(total),
            codes: Vec::with_capacity(total),
            rests: Vec::with_capacity(n * (1 + layout.extra)),
            ..Coded::default()
        };
        let (nat, part) = values.error_bound();
        for (i, count) in counts.iter().enumerate() {
            let (ids, log_probs) = rows.row(i);
            let (ids, log_probs) = (&ids[..usize::from(*count)], &log_probs[..usize::from(*count)]);
            let lse = rows.lse.get(i).copied().unwrap_or(0.0);
            let start = coded.codes.len();
            coded.ids.extend(ids.iter().map(|id| *id as u32));
            coded.codes.extend(log_probs.iter().map(|lp| values.code(*lp, lse)));
            check_error(values, lse, log_probs, &coded.codes[start..], nat, part).map_err(|what| (i, what))?;
            if layout.sampled {
                coded.draws.extend(rows.draws[i * rows.k..][..usize::from(*count)].iter().map(|d| (*d - 1) as u32));
                let draws = &mut coded.draws[start..];
                sort_ties(&coded.codes[start..], &mut coded.ids[start..], |a, b| draws.swap(a, b));
            } else {
                sort_ties(&coded.codes[start..], &mut coded.ids[start..], |_, _| ());
            }
            coded.rests.push(rest_code(values, rows.log_rest[i]));
            let extra = &rows.extra[i * layout.extra..(i + 1) * layout.extra];
            coded.rests.extend(extra.iter().map(|r| rest_code(values, *r)));
        }
        if values == Values::Bf16Logits {
            coded.lse.extend(rows.lse.iter().map(|l| l.to_bits()));
        }
        Ok(coded)
    }

    /// The content hash: xxh3-128 over the columns as u32, in the order of the fields.
    pub fn hash(&self) -> u128 {
        let columns = [&self.tokens, &self.ids, &self.codes, &self.draws, &self.rests, &self.lse];
        let size = self.counts.len() + columns.iter().map(|c| c.len()).sum::<usize>();
        let mut bytes = Vec::with_capacity(size * 4);
        put(&mut bytes, &self.tokens);
        bytes.extend(self.counts.iter().flat_map(|c| u32::from(*c).to_le_bytes()));
        columns[1..].iter().for_each(|column| put(&mut bytes, column));
        xxh3_128(&bytes)
    }

    /// Appends the rows of the next block of a sequence.
    pub fn append(&mut self, other: &Coded) {
        self.tokens.extend_from_slice(&other.tokens);
        self.counts.extend_from_slice(&other.counts);
        self.ids.extend_from_slice(&other.ids);
        self.codes.extend_from_slice(&other.codes);
        self.draws.extend_from_slice(&other.draws);
        self.rests.extend_from_slice(&other.rests);
        self.lse.extend_from_slice(&other.lse);
    }
}

fn put(bytes: &mut Vec<u8>, column: &[u32]) {
    let start = bytes.len();
    bytes.resize(start + column.len() * 4, 0);
    for (word, value) in bytes[start..].chunks_exact_mut(4).zip(column) {
        word.copy_from_slice(&value.to_le_bytes());
    }
}

// the promise of the format, kept entry by entry: what a reader gets is within the bound of what was given
fn check_error(values: Values, lse: f32, given: &[f32], codes: &[u32], nat: f32, part: f32) -> Result<(), String> {
    let bad = |lp: f32, code: u32| {
        let back = values.value(code, lse);
        let bound = nat - part * lp.min(0.0) + lp.max(0.0);
        // written so that NaN is bad; far below every float's smallest probability values saturate
        !(back == lp || (back - lp).abs() <= bound || (lp < -1000.0 && back <= -1000.0 && values != Values::Bf16Logits))
    };
    let any = given.iter().zip(codes).fold(false, |any, (lp, code)| any | bad(*lp, *code));
    if !any {
        return Ok(());
    }
    let j = given.iter().zip(codes).position(|(lp, code)| bad(*lp, *code)).unwrap_or(0);
    let back = values.value(codes[j], lse);
    Err(match values {
        Values::Bf16Logits => format!(
            "entry {j}: log_prob {} + lse {lse} is no bf16 logit (the nearest gives {back}); values=\"bf16_logits\" \
             takes rows of bf16 logits with their lse, other rows need other values",
            given[j]
        ),
        _ => format!("entry {j}: log_prob {} would be read as {back}, outside the bound of its values", given[j]),
    })
}

/// Brings entries of equal codes into ascending order; `swapped` is told of every exchange.
pub fn sort_ties(codes: &[u32], ids: &mut [u32], mut swapped: impl FnMut(usize, usize)) {
    for j in 1..codes.len() {
        let mut at = j;
        while at > 0 && codes[at - 1] == codes[at] && ids[at - 1] > ids[at] {
            ids.swap(at - 1, at);
            swapped(at - 1, at);
            at -= 1;
        }
    }
}
