//! The rows of one sequence and the rules they must obey before they may be written.

use crate::codec::dense::{check_rows, Layout, Values};
use crate::error::{Error, Result};
use crate::spec::Spec;

/// Log-probabilities and masses may exceed their bound by this much when writing (float noise of the teacher).
pub const TOLERANCE: f32 = 1e-3;
/// Bound on the mass of a stored row: `TOLERANCE` plus the codec's rounding.
pub const STORED_MASS: f32 = 1.01;
/// Draws of one entry.
pub const MAX_DRAWS: i32 = 65_536;
/// Tokens in one sequence.
pub const MAX_TOKENS: usize = 1 << 28;

/// Borrowed rows: tokens [L], ids [L, k], log_probs [L, k], log_rest [L]; and, empty where there are none, further
/// log-probabilities extra [L, E], log-sum-exps lse [L] and draws of each entry [L, k].
#[derive(Clone, Copy, Default)]
pub struct Rows<'a> {
    pub k: usize,
    pub tokens: &'a [i32],
    pub ids: &'a [i32],
    pub log_probs: &'a [f32],
    pub log_rest: &'a [f32],
    pub extra: &'a [f32],
    pub lse: &'a [f32],
    pub draws: &'a [i32],
}

/// Caller memory for decoded rows: ids [L, k], log_probs [L, k], log_rest [L]; extra [L, E], lse [L] and draws [L, k] may
/// be empty where they are not wanted.
#[derive(Default)]
pub struct RowsMut<'a> {
    pub ids: &'a mut [i32],
    pub log_probs: &'a mut [f32],
    pub log_rest: &'a mut [f32],
    pub extra: &'a mut [f32],
    pub lse: &'a mut [f32],
    pub draws: &'a mut [i32],
}

// rows first..end of a column of `width` values a row that may be absent
fn cut<T>(column: &[T], width: usize, first: usize, end: usize) -> &[T] {
    column.get(first * width..end * width).unwrap_or_default()
}

fn cut_mut<T>(column: &mut [T], width: usize, first: usize, end: usize) -> &mut [T] {
    column.get_mut(first * width..end * width).unwrap_or_default()
}

impl<'a> RowsMut<'a> {
    /// The memory of the first `rows` rows and that of the others.
    pub fn split(self, k: usize, rows: usize) -> (RowsMut<'a>, RowsMut<'a>) {
        let extra = self.extra.len().checked_div(self.log_rest.len()).unwrap_or(0);
        let (ids, log_probs, draws) = (
            self.ids.split_at_mut(rows * k),
            self.log_probs.split_at_mut(rows * k),
            self.draws.split_at_mut((rows * k).min(self.draws.len())),
        );
        let (log_rest, lse) = (self.log_rest.split_at_mut(rows), self.lse.split_at_mut(rows.min(self.lse.len())));
        let further = self.extra.split_at_mut(rows * extra);
        let part =
            |ids, log_probs, log_rest, extra, lse, draws| RowsMut { ids, log_probs, log_rest, extra, lse, draws };
        (
            part(ids.0, log_probs.0, log_rest.0, further.0, lse.0, draws.0),
            part(ids.1, log_probs.1, log_rest.1, further.1, lse.1, draws.1),
        )
    }

    /// The memory of rows `first..end` of k entries.
    pub fn part(&mut self, k: usize, first: usize, end: usize) -> RowsMut<'_> {
        let extra = self.extra.len().checked_div(self.log_rest.len()).unwrap_or(0);
        RowsMut {
            ids: &mut self.ids[first * k..end * k],
            log_probs: &mut self.log_probs[first * k..end * k],
            log_rest: &mut self.log_rest[first..end],
            extra: cut_mut(self.extra, extra, first, end),
            lse: cut_mut(self.lse, 1, first, end),
            draws: cut_mut(self.draws, k, first, end),
        }
    }
}

impl<'a> Rows<'a> {
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Rows `first..end`.
    pub fn slice(&self, first: usize, end: usize) -> Rows<'a> {
        Rows {
            k: self.k,
            tokens: &self.tokens[first..end],
            ids: &self.ids[first * self.k..end * self.k],
            log_probs: &self.log_probs[first * self.k..end * self.k],
            log_rest: &self.log_rest[first..end],
            extra: cut(self.extra, self.extra.len().checked_div(self.len()).unwrap_or(0), first, end),
            lse: cut(self.lse, 1, first, end),
            draws: cut(self.draws, self.k, first, end),
        }
    }

    pub fn row(&self, i: usize) -> (&'a [i32], &'a [f32]) {
        (&self.ids[i * self.k..(i + 1) * self.k], &self.log_probs[i * self.k..(i + 1) * self.k])
    }
}

/// Largest vocabulary of which a bit for each id is kept, 2 MiB; repeats in a larger one are found by sorting.
const MOST_SEEN: u32 = 1 << 24;

/// Checks rows and counts their entries; keeps one bit per vocabulary id between calls.
pub struct Checker {
    vocab_size: u32,
    max_k: usize,
    max_mass: f32,
    layout: Option<Layout>,
    seen: Vec<u64>,
}

impl Checker {
    /// For rows that a caller gives.
    pub fn new(spec: &Spec) -> Self {
        Checker {
            vocab_size: spec.vocab_size,
            max_k: spec.k as usize,
            max_mass: 1.0 + TOLERANCE,
            layout: spec.layout,
            seen: vec![0; if spec.vocab_size <= MOST_SEEN { spec.vocab_size.div_ceil(64) as usize } else { 0 }],
        }
    }

    /// For rows that a cache holds: the codec's rounding may have lifted their mass.
    pub fn stored(spec: &Spec) -> Self {
        let slack = spec.layout.map_or(1.0, |l| l.values.mass_slack());
        Checker { max_mass: STORED_MASS * slack, ..Self::new(spec) }
    }

    /// Entries of each row. Refuses what must not be stored, naming key, row and value.
    pub fn check(&mut self, key: &str, rows: &Rows<'_>, counts: &mut Vec<u16>) -> Result<()> {
        let (n, k) = (rows.len(), rows.k);
        if n == 0 || n > MAX_TOKENS {
            return Err(Error::Refused(format!("sequence {key:?} has {n} tokens, 1 to {MAX_TOKENS} are accepted")));
        }
        if k > self.max_k || (k == 0) != (self.max_k == 0) {
            let (least, max) = (self.max_k.min(1), self.max_k);
            let what = format!("sequence {key:?} has {k} entries a row, the spec accepts {least} to {max}");
            return Err(Error::Refused(what));
        }
        if rows.ids.len() != n * k || rows.log_probs.len() != n * k || rows.log_rest.len() != n {
            return Err(Error::Refused(format!(
                "sequence {key:?}: {n} tokens and k = {k} need {} ids, {} log_probs and {n} log_rest; given are {}, {} and {}",
                n * k, n * k, rows.ids.len(), rows.log_probs.len(), rows.log_rest.len()
            )));
        }
        self.check_columns(key, rows)?;
        if let Some(i) = rows.tokens.iter().position(|t| *t < 0) {
            let what = format!("token {} is negative", rows.tokens[i]);
            return Err(Error::BadRow { key: key.to_string(), row: i, what });
        }
        check_rows(self, key, rows, counts)
    }

    /// Row by row.
    #[inline(always)]
    pub(crate) fn check_rows(&mut self, key: &str, rows: &Rows<'_>, counts: &mut Vec<u16>) -> Result<()> {
        counts.clear();
        for i in 0..rows.len() {
            let (ids, log_probs) = rows.row(i);
            match self.check_row(ids, log_probs, rows.log_rest[i]) {
                Ok(count) => {
                    counts.push(count);
                    self.check_further(rows, i, count).map_err(|what| Error::BadRow {
                        key: key.to_string(),
                        row: i,
                        what,
                    })?;
                }
                Err(what) => return Err(Error::BadRow { key: key.to_string(), row: i, what }),
            }
        }
        Ok(())
    }

    // the columns that the layout asks for, and no others
    fn check_columns(&self, key: &str, rows: &Rows<'_>) -> Result<()> {
        let n = rows.len();
        let wanted = match self.layout {
            None => [0, 0, 0],
            Some(l) => [
                n * l.extra,
                if l.values == Values::Bf16Logits { n } else { 0 },
                if l.sampled { n * rows.k } else { 0 },
            ],
        };
        let given = [rows.extra.len(), rows.lse.len(), rows.draws.len()];
        if given == wanted {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "sequence {key:?}: further log-probabilities, lse and counts hold {given:?} values, the spec wants {wanted:?}"
        )))
    }

    fn check_further(&self, rows: &Rows<'_>, i: usize, count: u16) -> std::result::Result<(), String> {
        let width = rows.extra.len() / rows.len();
        if let Some(r) = rows.extra[i * width..(i + 1) * width].iter().find(|r| r.is_nan() || **r > TOLERANCE) {
            return Err(format!("a further log-probability is {r}, at most 0 (or -inf) is accepted"));
        }
        if let Some(lse) = rows.lse.get(i).filter(|l| !l.is_finite()) {
            return Err(format!("lse is {lse}, a finite number is accepted"));
        }
        let draws = cut(rows.draws, rows.k, i, i + 1);
        let (drawn, missing) = draws.split_at(usize::from(count).min(draws.len()));
        if let Some(d) = drawn.iter().find(|d| !(1..=MAX_DRAWS).contains(*d)) {
            return Err(format!("an entry was drawn {d} times, 1 to {MAX_DRAWS} is accepted"));
        }
        match missing.iter().find(|d| **d != 0) {
            Some(d) => Err(format!("a missing entry was drawn {d} times")),
            None => Ok(()),
        }
    }

    #[inline(always)]
    fn check_row(&mut self, ids: &[i32], log_probs: &[f32], log_rest: f32) -> std::result::Result<u16, String> {
        // whole rows, which nearly all are, are told without stopping at an entry
        let whole = ids.iter().fold(true, |whole, id| whole & (*id != -1));
        let missing = if whole { None } else { ids.iter().position(|id| *id == -1) };
        let count = match missing {
            None => ids.len(),
            Some(at) => {
                if let Some(j) = (at..ids.len()).find(|j| ids[*j] != -1 || log_probs[*j] != f32::NEG_INFINITY) {
                    let (id, lp) = (ids[j], log_probs[j]);
                    return Err(format!(
                        "entry {j} is id {id} with log_prob {lp} after a missing entry; id -1 with log_prob -inf is accepted there"
                    ));
                }
                at
            }
        };
        let (ids, log_probs) = (&ids[..count], &log_probs[..count]);
        let largest = ids.iter().fold(0u32, |m, id| m.max(*id as u32));
        if count > 0 && largest >= self.vocab_size {
            let j = ids.iter().position(|id| *id as u32 >= self.vocab_size).unwrap_or(0);
            return Err(format!("entry {j} has id {}, the vocabulary has {} ids", ids[j], self.vocab_size));
        }
        check_order(log_probs)?;
        if log_rest.is_nan() || log_rest > TOLERANCE {
            return Err(format!("log_rest is {log_rest}, a log-probability of at most 0 (or -inf) is accepted"));
        }
        if self.max_k == 0 && log_rest < -TOLERANCE {
            return Err(format!("log_rest is {log_rest}, 0 is accepted where rows have no entries"));
        }
        let mass = mass(log_probs) + fast_exp(log_rest);
        if mass > self.max_mass {
            return Err(format!("the probabilities sum to {mass}, at most {} is accepted", self.max_mass));
        }
        if !surely_differ(ids) {
            self.check_duplicates(ids)?;
        }
        Ok(count as u16)
    }

    fn check_duplicates(&mut self, ids: &[i32]) -> std::result::Result<(), String> {
        if self.seen.is_empty() {
            return check_sorted(ids);
        }
        let (mut twice, seen) = (false, self.seen.as_mut_slice());
        for id in ids {
            let (word, bit) = (&mut seen[*id as usize / 64], 1u64 << (*id as usize % 64));
            twice |= *word & bit != 0;
            *word |= bit;
        }
        for id in ids {
            seen[*id as usize / 64] = 0;
        }
        if !twice {
            return Ok(());
        }
        Err(repeated(ids))
    }
}

/// Ids of a row that are compared with one another.
const COMPARED: usize = 64;

/// Whether the lowest 16 bits of all ids are different; where they are not, or in a long row, nothing is known.
#[inline(always)]
fn surely_differ(ids: &[i32]) -> bool {
    if ids.len() > COMPARED {
        return false;
    }
    // around a circle half the distances are enough
    let mut low = [0u16; COMPARED * 3 / 2];
    for (i, slot) in low[..COMPARED].iter_mut().enumerate() {
        *slot = u16::MAX - i as u16;
    }
    for (slot, id) in low.iter_mut().zip(ids) {
        *slot = *id as u16;
    }
    low.copy_within(..COMPARED / 2, COMPARED);
    let mut equal = [0u16; COMPARED];
    for distance in 1..=COMPARED / 2 {
        for ((equal, a), b) in equal.iter_mut().zip(&low).zip(&low[distance..]) {
            *equal |= 0u16.wrapping_sub(u16::from(a == b));
        }
    }
    equal.iter().all(|e| *e == 0)
}

fn repeated(ids: &[i32]) -> String {
    let j = (1..ids.len()).find(|j| ids[..*j].contains(&ids[*j])).unwrap_or(0);
    format!("entry {j} repeats id {}", ids[j])
}

#[cold]
fn check_sorted(ids: &[i32]) -> std::result::Result<(), String> {
    let mut sorted = ids.to_vec();
    sorted.sort_unstable();
    match sorted.windows(2).any(|w| w[0] == w[1]) {
        true => Err(repeated(ids)),
        false => Ok(()),
    }
}

#[inline(always)]
fn check_order(log_probs: &[f32]) -> std::result::Result<(), String> {
    // a NaN fails every comparison, so the first entry and the chain of <= cover all
    let later = log_probs.get(1..).unwrap_or_default();
    let ordered: u32 = log_probs.iter().zip(later).map(|(a, b)| u32::from(b <= a)).sum();
    let bounded = log_probs.first().is_none_or(|lp| *lp <= TOLERANCE);
    if ordered as usize == later.len() && bounded {
        return Ok(());
    }
    for (j, lp) in log_probs.iter().enumerate() {
        if lp.is_nan() || *lp > TOLERANCE {
            return Err(format!("entry {j} has log_prob {lp}, at most 0 is accepted"));
        }
        if j > 0 && *lp > log_probs[j - 1] {
            let before = log_probs[j - 1];
            return Err(format!("entry {j} has log_prob {lp} after {before}; sort each row by descending log_prob"));
        }
    }
    Ok(())
}

const LANES: usize = 8;

/// sum(exp(x)), relative error below 1e-5; written so that it vectorises.
#[inline(always)]
fn mass(log_probs: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let chunks = log_probs.chunks_exact(LANES);
    let tail = chunks.remainder();
    for chunk in chunks {
        for (sum, x) in sums.iter_mut().zip(chunk) {
            *sum += fast_exp(*x);
        }
    }
    tail.iter().fold(sums.iter().sum(), |sum, x| sum + fast_exp(*x))
}

/// exp(x), relative error below 1e-5, the same on every machine.
#[inline(always)]
pub(crate) fn fast_exp(x: f32) -> f32 {
    const ROUND: f32 = 12_582_912.0; // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
    let t = x.max(-87.0) * std::f32::consts::LOG2_E;
    let shifted = t + ROUND;
    let f = (t - (shifted - ROUND)) * std::f32::consts::LN_2;
    let p = 1.0 + f * (1.0 + f * (0.5 + f * (1.0 / 6.0 + f * (1.0 / 24.0 + f * (1.0 / 120.0)))));
    f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(ids: &[i32], log_probs: &[f32], log_rest: f32) -> String {
        let rows = Rows { k: ids.len(), tokens: &[3], ids, log_probs, log_rest: &[log_rest], ..Rows::default() };
        let spec = Spec::from_stored(r#"{"vocab_size":100,"k":8}"#).expect("a spec");
        let mut checker = Checker::new(&spec);
        checker.check("a key", &rows, &mut Vec::new()).expect_err("must be refused").to_string()
    }

    #[test]
    fn refuses_by_name() {
        let inf = f32::NEG_INFINITY;
        assert!(refusal(&[1, 100], &[-1.0, -2.0], inf).contains("row 0: entry 1 has id 100"));
        assert!(refusal(&[1, -2], &[-1.0, -2.0], inf).contains("entry 1 has id -2"));
        assert!(refusal(&[1, 1], &[-1.0, -2.0], inf).contains("repeats id 1"));
        assert!(refusal(&[1, 2], &[-2.0, -1.0], inf).contains("sort each row"));
        assert!(refusal(&[1, 2], &[f32::NAN, -1.0], inf).contains("NaN"));
        assert!(refusal(&[1, 2], &[-1.0, f32::NAN], inf).contains("NaN"));
        assert!(refusal(&[1, 2], &[0.01, -9.0], inf).contains("0.01"));
        assert!(refusal(&[1, 2], &[-0.1, -1.0], inf).contains("sum to 1.27"));
        assert!(refusal(&[1], &[-0.1], -1.0).contains("sum to"));
        assert!(refusal(&[1], &[-0.1], f32::NAN).contains("log_rest is NaN"));
        assert!(refusal(&[-1, 2], &[inf, -1.0], inf).contains("after a missing entry"));
        assert!(refusal(&[2, -1], &[-0.5, -1.0], inf).contains("after a missing entry"));
    }

    #[test]
    fn repeats_are_found_in_every_row_and_ids_of_equal_low_bits_are_none() {
        let spec = Spec::from_stored(r#"{"vocab_size":100000,"k":8}"#).expect("a spec");
        let mut checker = Checker::new(&spec);
        for twice in 0..600 {
            let row = |i: usize| if i == twice { [5, 9, 5] } else { [5, 9, 5 + (1 << 16)] };
            let ids: Vec<i32> = (0..600).flat_map(row).collect();
            let (tokens, log_probs, log_rest) = ([1; 600], [-2.0; 1800], [-1.0; 600]);
            let rows = Rows {
                k: 3,
                tokens: &tokens,
                ids: &ids,
                log_probs: &log_probs,
                log_rest: &log_rest,
                ..Rows::default()
            };
            let error = checker.check("a key", &rows, &mut Vec::new()).expect_err("must be refused").to_string();
            assert!(error.contains(&format!("row {twice}: entry 2 repeats id 5")), "{error}");
        }
    }

    #[test]
    fn exp_is_accurate() {
        for i in 0..80_000 {
            let x = -(i as f32) * 1e-3;
            let (fast, true_value) = (fast_exp(x), x.exp());
            assert!((fast - true_value).abs() <= 1e-5 * true_value, "{x}");
        }
        assert!(fast_exp(f32::NEG_INFINITY) < 1e-37);
    }
}
