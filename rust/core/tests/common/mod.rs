//! Rows as a writer is given them, for the tests of the codecs.

use potstill_core::Rows;

#[derive(Debug, Clone, Default)]
pub struct Given {
    pub tokens: Vec<i32>,
    pub counts: Vec<u16>,
    pub ids: Vec<i32>,
    pub log_probs: Vec<f32>,
    pub log_rest: Vec<f32>,
    pub extra: Vec<f32>,
    pub lse: Vec<f32>,
    pub draws: Vec<i32>,
}

impl Given {
    pub fn rows(&self, k: usize) -> Rows<'_> {
        Rows {
            k,
            tokens: &self.tokens,
            ids: &self.ids,
            log_probs: &self.log_probs,
            log_rest: &self.log_rest,
            extra: &self.extra,
            lse: &self.lse,
            draws: &self.draws,
        }
    }
}

/// n rows of k entries; runs of equal log-probabilities, gaps that need an escape, and where `ragged`, rows of few
/// entries and every third of none.
pub fn long(vocab: usize, k: usize, n: usize, ragged: bool) -> Given {
    let mut seed = k as u32;
    let mut next = || {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (seed >> 8) as usize
    };
    let mut given = Given::default();
    for i in 0..n {
        let count = if ragged { [k, next() % (k + 1), 0][i % 3] } else { k };
        let (start, mut top) = (next() % vocab, -0.02 * (next() % 50) as f32);
        for j in 0..k {
            let gap = [0.0, 0.0, 0.1, 0.0, 0.3, 0.07, 0.0, 9.0][next() % if j < 9 { 8 } else { 7 }];
            top -= gap;
            given.ids.push(if j < count { ((start + 7 * j) % vocab) as i32 } else { -1 });
            given.log_probs.push(if j < count { top } else { f32::NEG_INFINITY });
        }
        given.counts.push(count as u16);
        let before = if i > 0 { given.ids[(i - 1) * k + next() % k] } else { -1 };
        given.tokens.push(if before >= 0 && next() % 2 == 0 { before } else { (next() % vocab) as i32 });
        given.log_rest.push(-1.0);
    }
    given
}

pub fn sorted(ids: &[i32]) -> Vec<i32> {
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids
}
