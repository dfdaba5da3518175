//! The rows of one sequence and the rules they must obey before they may be written.

use crate::error::{Error, Result};

/// Log-probabilities and masses may exceed their bound by this much when writing (float noise of the teacher).
pub const TOLERANCE: f32 = 1e-3;
/// Bound on the mass of a stored row: `TOLERANCE` plus the codec's rounding.
pub const STORED_MASS: f32 = 1.01;
/// Tokens in one sequence.
pub const MAX_TOKENS: usize = 1 << 28;

/// Borrowed rows: tokens [L], ids [L, k], log_probs [L, k], log_rest [L].
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub k: usize,
    pub tokens: &'a [i32],
    pub ids: &'a [i32],
    pub log_probs: &'a [f32],
    pub log_rest: &'a [f32],
}

/// Caller memory for decoded rows: ids [L, k], log_probs [L, k], log_rest [L].
pub struct RowsMut<'a> {
    pub ids: &'a mut [i32],
    pub log_probs: &'a mut [f32],
    pub log_rest: &'a mut [f32],
}

impl RowsMut<'_> {
    /// The memory of rows `first..end` of k entries.
    pub fn part(&mut self, k: usize, first: usize, end: usize) -> RowsMut<'_> {
        RowsMut {
            ids: &mut self.ids[first * k..end * k],
            log_probs: &mut self.log_probs[first * k..end * k],
            log_rest: &mut self.log_rest[first..end],
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
        }
    }

    pub fn row(&self, i: usize) -> (&'a [i32], &'a [f32]) {
        (&self.ids[i * self.k..(i + 1) * self.k], &self.log_probs[i * self.k..(i + 1) * self.k])
    }
}

/// Checks rows and counts their entries; keeps one bit per vocabulary id between calls.
pub struct Checker {
    vocab_size: u32,
    max_k: usize,
    max_mass: f32,
    seen: Vec<u64>,
}

impl Checker {
    pub fn new(vocab_size: u32, max_k: u32, max_mass: f32) -> Self {
        Checker { vocab_size, max_k: max_k as usize, max_mass, seen: vec![0; (vocab_size as usize).div_ceil(64)] }
    }

    /// Entries of each row. Refuses what must not be stored, naming key, row and value.
    pub fn check(&mut self, key: &str, rows: &Rows<'_>, counts: &mut Vec<u16>) -> Result<()> {
        let (n, k) = (rows.len(), rows.k);
        if n == 0 || n > MAX_TOKENS {
            return Err(Error::Refused(format!("sequence {key:?} has {n} tokens, 1 to {MAX_TOKENS} are accepted")));
        }
        if k == 0 || k > self.max_k {
            let max = self.max_k;
            return Err(Error::Refused(format!("sequence {key:?} has {k} entries a row, the spec accepts 1 to {max}")));
        }
        if rows.ids.len() != n * k || rows.log_probs.len() != n * k || rows.log_rest.len() != n {
            return Err(Error::Refused(format!(
                "sequence {key:?}: {n} tokens and k = {k} need {} ids, {} log_probs and {n} log_rest; given are {}, {} and {}",
                n * k, n * k, rows.ids.len(), rows.log_probs.len(), rows.log_rest.len()
            )));
        }
        if let Some(i) = rows.tokens.iter().position(|t| *t < 0) {
            let what = format!("token {} is negative", rows.tokens[i]);
            return Err(Error::BadRow { key: key.to_string(), row: i, what });
        }
        counts.clear();
        for i in 0..n {
            let (ids, log_probs) = rows.row(i);
            match self.check_row(ids, log_probs, rows.log_rest[i]) {
                Ok(count) => counts.push(count),
                Err(what) => return Err(Error::BadRow { key: key.to_string(), row: i, what }),
            }
        }
        Ok(())
    }

    fn check_row(&mut self, ids: &[i32], log_probs: &[f32], log_rest: f32) -> std::result::Result<u16, String> {
        let count = match ids.iter().position(|id| *id == -1) {
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
        let mass = mass(log_probs) + log_rest.exp();
        if mass > self.max_mass {
            return Err(format!("the probabilities sum to {mass}, at most {} is accepted", self.max_mass));
        }
        self.check_duplicates(ids)?;
        Ok(count as u16)
    }

    fn check_duplicates(&mut self, ids: &[i32]) -> std::result::Result<(), String> {
        let mut twice = false;
        for id in ids {
            let (word, bit) = (*id as usize / 64, 1u64 << (*id as usize % 64));
            twice |= self.seen[word] & bit != 0;
            self.seen[word] |= bit;
        }
        for id in ids {
            self.seen[*id as usize / 64] = 0;
        }
        if !twice {
            return Ok(());
        }
        let j = (1..ids.len()).find(|j| ids[..*j].contains(&ids[*j])).unwrap_or(0);
        Err(format!("entry {j} repeats id {}", ids[j]))
    }
}

fn check_order(log_probs: &[f32]) -> std::result::Result<(), String> {
    // a NaN fails every comparison, so the first entry and the chain of <= cover all
    let ordered = log_probs.windows(2).fold(true, |ok, w| ok & (w[1] <= w[0]));
    let bounded = log_probs.first().is_none_or(|lp| *lp <= TOLERANCE);
    if ordered && bounded {
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

#[inline(always)]
fn fast_exp(x: f32) -> f32 {
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
        let rows = Rows { k: ids.len(), tokens: &[3], ids, log_probs, log_rest: &[log_rest] };
        let mut checker = Checker::new(100, 8, 1.0 + TOLERANCE);
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
    fn exp_is_accurate() {
        for i in 0..80_000 {
            let x = -(i as f32) * 1e-3;
            let (fast, true_value) = (fast_exp(x), x.exp());
            assert!((fast - true_value).abs() <= 1e-5 * true_value, "{x}");
        }
        assert!(fast_exp(f32::NEG_INFINITY) < 1e-37);
    }
}
