//! Rows as codes, before ids become ranks: what the content hash is taken of.

use xxhash_rust::xxh3::Xxh3Default;

use super::values::{best_shift, grid_code, grid_value, shifted_value, Values, SHIFTS};
use super::{widest, Layout};
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
    /// How far each row's grid is moved, in eighths of a step; empty unless the layout has it.
    pub shifts: Vec<u32>,
}

/// On a grid 0 is a probability of zero; otherwise the bits of the fp32 number.
pub fn rest_code(values: Values, log_rest: f32) -> u32 {
    match values.rest_grid() {
        Some(_) if log_rest == f32::NEG_INFINITY => 0,
        Some(per_nat) => 1 + grid_code(log_rest, per_nat, 0.0),
        None => (log_rest.min(0.0) + 0.0).to_bits(),
    }
}

#[inline]
pub fn rest_value(values: Values, code: u32) -> f32 {
    match values.rest_grid() {
        Some(_) if code == 0 => f32::NEG_INFINITY,
        Some(per_nat) => grid_value(code - 1, 1.0 / per_nat),
        None => f32::from_bits(code),
    }
}

impl Coded {
    /// Codes of checked rows of `counts` entries. Refuses, with the row, what the values cannot hold within their bound.
    pub fn new(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> Result<Coded, (usize, String)> {
        widest::coded(layout, rows, counts)
    }

    #[inline(always)]
    pub(super) fn build(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> Result<Coded, (usize, String)> {
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
        let shifted = if let Values::Shifted { per_nat } = values { Some(f32::from(per_nat)) } else { None };
        for (i, count) in counts.iter().enumerate() {
            let (ids, log_probs) = rows.row(i);
            let (ids, log_probs) = (&ids[..usize::from(*count)], &log_probs[..usize::from(*count)]);
            let mut by = rows.lse.get(i).copied().unwrap_or(0.0);
            if let Some(per_nat) = shifted {
                let shift = best_shift(log_probs, per_nat);
                coded.shifts.push(shift);
                by = shift as f32;
            }
            let start = coded.codes.len();
            coded.ids.extend(ids.iter().map(|id| *id as u32));
            append_codes(values, by, log_probs, &mut coded.codes);
            check_error(values, by, log_probs, &coded.codes[start..]).map_err(|what| (i, what))?;
            if layout.sampled {
                coded.draws.extend(rows.draws[i * rows.k..][..usize::from(*count)].iter().map(|d| (*d - 1) as u32));
                let draws = &mut coded.draws[start..];
                sort_ties(&coded.codes[start..], &mut coded.ids[start..], |a, b| draws.swap(a, b));
            } else {
                widest::sort_ties(&coded.codes[start..], &mut coded.ids[start..]);
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

    /// The first code of row i, of these codes, as it is stored: with a shifted grid the shift stands below it.
    #[inline(always)]
    pub fn first_code(&self, i: usize, codes: &[u32]) -> u32 {
        let first = codes.first().copied().unwrap_or(0);
        self.shifts.get(i).map_or(first, |shift| first * SHIFTS + shift)
    }

    /// The content hash: xxh3-128 over the columns as u32, in the order of the fields.
    pub fn hash(&self) -> u128 {
        const PART: usize = 1024; // stays in the first-level cache
        let counts: Vec<u32> = self.counts.iter().map(|c| u32::from(*c)).collect();
        let columns =
            [&self.tokens, &counts, &self.ids, &self.codes, &self.draws, &self.rests, &self.lse, &self.shifts];
        let mut hash = Xxh3Default::new();
        let mut bytes = [0u8; 4 * PART];
        for part in columns.into_iter().flat_map(|column| column.chunks(PART)) {
            for (slot, word) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(part) {
                *slot = word.to_le_bytes();
            }
            hash.update(&bytes[..part.len() * 4]);
        }
        hash.digest128()
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
        self.shifts.extend_from_slice(&other.shifts);
    }
}

#[inline(always)]
fn append_codes(values: Values, by: f32, log_probs: &[f32], codes: &mut Vec<u32>) {
    match values {
        Values::Grid { per_nat } => {
            let per_nat = f32::from(per_nat);
            codes.extend(log_probs.iter().map(|lp| grid_code(*lp, per_nat, 0.0)));
        }
        Values::Shifted { per_nat } => {
            let (per_nat, shift) = (f32::from(per_nat), by / SHIFTS as f32);
            codes.extend(log_probs.iter().map(|lp| grid_code(*lp, per_nat, shift)));
        }
        _ => codes.extend(log_probs.iter().map(|lp| values.code(*lp, by))),
    }
}

// the promise of the format, kept entry by entry: what a reader gets is within the bound of what was given
#[inline(always)]
fn check_error(values: Values, by: f32, given: &[f32], codes: &[u32]) -> Result<(), String> {
    let (nat, part) = values.error_bound();
    // far below every float's smallest probability values saturate
    let saturates = values != Values::Bf16Logits;
    let off = |lp: f32, back: f32| {
        let bound = nat - part * lp.min(0.0) + lp.max(0.0);
        let far = (lp < -1000.0) & (back <= -1000.0) & saturates;
        u32::from(!((back == lp) | ((back - lp).abs() <= bound) | far)) // NaN is off
    };
    let pairs = || given.iter().zip(codes);
    let wrong = match values {
        Values::Grid { per_nat } | Values::Shifted { per_nat } => {
            let step = 1.0 / f32::from(per_nat);
            pairs().fold(0, |any, (lp, code)| any | off(*lp, shifted_value(*code, by, step)))
        }
        _ => pairs().fold(0, |any, (lp, code)| any | off(*lp, values.value(*code, by))),
    };
    if wrong == 0 {
        return Ok(());
    }
    let j = pairs().position(|(lp, code)| off(*lp, values.value(*code, by)) > 0).unwrap_or(0);
    let back = values.value(codes[j], by);
    Err(match values {
        Values::Bf16Logits => format!(
            "entry {j}: log_prob {} + lse {by} is no bf16 logit (the nearest gives {back}); values=\"bf16_logits\" \
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
