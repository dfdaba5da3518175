//! Tables from rows: the most frequent ids first, and widths and code lengths for what the rows then hold.

use super::classes::{ClassCode, CLASSES};
use super::coded::Coded;
use super::dictionary::Dictionary;
use super::encode::{rank_row, token_value};
use super::prefix::{PrefixCode, ESCAPE, SYMBOLS};
use super::tables::{bounds, Tables, COUNT, EXTRA, FIRST, RANK, REST, STEP, TOKEN};
use super::Layout;

/// Entries after which tables are as good as they get.
pub const TRAINED: u64 = 1 << 21;
/// Entries that the length of the dictionary is chosen by.
const SAMPLE: usize = 1 << 18;
/// Entries that widths and code lengths are learnt from, or some more: those of every n-th sequence.
const ENOUGH: usize = 1 << 18;
/// Below this the default widths do.
const FEW: usize = 1 << 12;

/// Tables for these sequences; None where there are too few rows to learn from.
pub fn train<'a>(layout: Layout, sequences: &'a [Coded]) -> Option<Tables> {
    // without entries the tokens are what is ranked
    let ranked = |s: &'a Coded| if layout.k > 0 { &s.ids } else { &s.tokens };
    let entries: usize = sequences.iter().map(|s| ranked(s).len()).sum();
    if entries < FEW {
        return None;
    }
    let mut counts = vec![0u32; layout.vocab_size as usize];
    for id in sequences.iter().flat_map(ranked) {
        if let Some(count) = counts.get_mut(*id as usize) {
            *count += 1;
        }
    }
    let used = counts.iter().zip(0u32..).filter(|(count, _)| **count > 0);
    let mut by_count: Vec<u64> = used.map(|(count, id)| u64::from(!count) << 32 | u64::from(id)).collect();
    by_count.sort_unstable();
    let ids: Vec<u32> = by_count.iter().map(|key| *key as u32).collect();
    let seldom = |n: u32| ids.partition_point(|id| counts[*id as usize] > n);
    let mut candidates = vec![0, seldom(3), seldom(1), ids.len()];
    candidates.extend([1 << 10, 1 << 12, 1 << 14, 1 << 16].into_iter().filter(|n| *n < ids.len()));
    candidates.sort_unstable();
    candidates.dedup();
    let (mut sample, mut sampled) = (0, 0);
    while sample < sequences.len() && sampled < SAMPLE {
        sampled += ranked(&sequences[sample]).len();
        sample += 1;
    }
    let dictionary = |listed: usize| Dictionary::ranked(&ids, listed, layout.vocab_size);
    // the longer the list, the fewer bits, until it costs more than it saves: from the longest one down, until two in turn are worse
    let (mut best, mut near, mut worse) = (None::<(u128, usize)>, None, 0);
    for listed in candidates.into_iter().rev() {
        let ranking = Ranking::new(layout, sequences[..sample].iter(), dictionary(listed), near);
        let (values, stored) = ranking.bits();
        let bits = u128::from(values) * entries as u128 / sampled as u128 + u128::from(stored);
        near = Some(ranking.codes.map(|code| code.widths)); // the widths of one length are nearly those of the next
        worse += 1;
        if best.is_none_or(|(least, _)| bits <= least) {
            (best, worse) = (Some((bits, listed)), 0);
        }
        if worse == 2 {
            break;
        }
    }
    let (_, listed) = best?;
    let thinned = || sequences.iter().step_by((entries / ENOUGH).max(1));
    let ranking = Ranking::new(layout, thinned(), dictionary(listed), None);
    let bounds = bounds(&layout);
    let column = |values: &mut dyn Iterator<Item = u32>, code: usize| {
        let mut counts = vec![0u32; bounds[code] as usize];
        values.for_each(|v| counts[v as usize] += 1);
        ClassCode::trained(&counts, bounds[code])
    };
    let (rests, by_difference) = (1 + layout.extra, layout.values.by_difference());
    let grid = layout.values.rest_grid().is_some();
    let rest = |first: bool| {
        let all = thinned().flat_map(|s| s.rests.iter().enumerate()).filter(move |_| grid);
        all.filter(move |(i, _)| (i % rests == 0) == first).map(|(_, r)| *r)
    };
    let firsts = thinned().flat_map(|s| (0..s.tokens.len()).zip(rows(s)).map(|(i, r)| s.first_code(i, r.codes)));
    let firsts = firsts.filter(|_| by_difference);
    let missing = thinned().flat_map(|s| s.counts.iter().map(|c| layout.k - u32::from(*c)));
    let [ranks, steps, tokens] = ranking.codes;
    let mut classes = bounds.map(ClassCode::even);
    classes[RANK] = ranks;
    classes[STEP] = steps;
    classes[TOKEN] = tokens;
    classes[COUNT] = column(&mut missing.into_iter(), COUNT);
    classes[FIRST] = column(&mut firsts.into_iter(), FIRST);
    classes[REST] = column(&mut rest(true), REST);
    classes[EXTRA] = column(&mut rest(false), EXTRA);
    let (mut differences, mut draws) = ([0u64; SYMBOLS], [0u64; SYMBOLS]);
    for row in thinned().flat_map(rows).filter(|_| by_difference) {
        row.codes.windows(2).for_each(|w| differences[((w[1] - w[0]) as usize).min(ESCAPE)] += 1);
    }
    thinned().flat_map(|s| &s.draws).for_each(|d| draws[(*d as usize).min(ESCAPE)] += 1);
    let (codes, draws) = (PrefixCode::trained(&differences), PrefixCode::trained(&draws));
    Some(Tables::new(layout, classes, codes, draws, ranking.dictionary, entries as u64))
}

struct Entries<'a> {
    token: u32,
    ids: &'a [u32],
    codes: &'a [u32],
}

fn rows(coded: &Coded) -> impl Iterator<Item = Entries<'_>> {
    let mut at = 0;
    coded.counts.iter().zip(&coded.tokens).map(move |(count, token)| {
        let range = at..at + usize::from(*count);
        at = range.end;
        Entries { token: *token, ids: &coded.ids[range.clone()], codes: &coded.codes[range] }
    })
}

/// Counts of ranks, steps and tokens.
fn columns<'a>(entries: &'a [u32], tokens: &'a [u32]) -> [&'a [u32]; 3] {
    let (ranks, steps) = entries.split_at(entries.len() / 2);
    [ranks, &steps[1..], tokens]
}

struct Ranking {
    dictionary: Dictionary,
    /// Of ranks, steps and tokens.
    codes: [ClassCode; 3],
    /// Of ranks, and from V + 1 on of steps, of which there is none of 0.
    entries: Vec<u32>,
    tokens: Vec<u32>,
}

impl Ranking {
    // widths are sought from `near` on
    fn new<'a>(
        layout: Layout,
        sequences: impl Iterator<Item = &'a Coded>,
        dictionary: Dictionary,
        near: Option<[[u8; CLASSES]; 3]>,
    ) -> Ranking {
        let (v, k) = (layout.vocab_size as usize, layout.k as usize);
        let (mut entries, mut tokens) = (vec![0u32; 2 * v + 1], vec![0u32; k + v]);
        let (mut ranks, mut before) = (Vec::new(), Vec::new());
        for sequence in sequences {
            before.clear();
            for row in rows(sequence) {
                let token = token_value(row.token, &before, &dictionary, layout.k) as usize;
                if let Some(count) = tokens.get_mut(token) {
                    *count += 1;
                }
                rank_row(&dictionary, row.codes, row.ids, &mut ranks, &mut []);
                let (mut last, mut code) = (0, u32::MAX);
                for (rank, next) in ranks.iter().zip(row.codes) {
                    let tie = 0u32.wrapping_sub(u32::from(*next == code));
                    entries[(rank - (last & tie)) as usize + (v & tie as usize)] += 1;
                    (last, code) = (*rank, *next);
                }
                std::mem::swap(&mut ranks, &mut before);
            }
        }
        let bounds = bounds(&layout);
        let counts = columns(&entries, &tokens);
        let codes = [0, 1, 2].map(|c| match near {
            Some(widths) => ClassCode::improved(widths[c], counts[c], bounds[c]),
            None => ClassCode::trained(counts[c], bounds[c]),
        });
        Ranking { dictionary, codes, entries, tokens }
    }

    // of ids and tokens, and of the dictionary in both its places
    fn bits(&self) -> (u64, u64) {
        let mut stored = Vec::new();
        self.dictionary.encode(&mut stored);
        let values: u64 =
            self.codes.iter().zip(columns(&self.entries, &self.tokens)).map(|(code, counts)| code.cost(counts)).sum();
        (values, 2 * 8 * stored.len() as u64)
    }
}
