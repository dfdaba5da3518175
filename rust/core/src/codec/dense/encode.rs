//! Rows to a payload; `decode.rs` reads it back.
//!
//! ragged u8, zero x 3 | bytes of the three streams, u32 each | row words, padded to 8 | raw codes, padded to 8
//! | nibbles | differences | raw bits | 8 zero bytes

use std::cell::RefCell;

use super::bitstream::{BitWriter, SLACK};
use super::classes::ClassCode;
use super::coded::{sort_ties, Coded};
use super::tables::{Tables, COUNT, EXTRA, FIRST, RANK, REST, STEP, TOKEN};
use super::{Dense, Values};
use crate::bytes::pad;

#[derive(Default)]
struct Streams {
    nibbles: Vec<u8>,
    nibble_count: usize,
    differences: BitWriter,
    raw: BitWriter,
    /// Ranks of the row's entries, in stored order, and of the row before.
    ranks: Vec<u32>,
    before: Vec<u32>,
}

impl Streams {
    fn clear(&mut self) {
        self.nibbles.clear();
        self.nibble_count = 0;
        self.differences.clear();
        self.raw.clear();
        self.before.clear();
    }

    #[inline]
    fn nibble(&mut self, class: usize) {
        if self.nibble_count.is_multiple_of(2) {
            self.nibbles.push(class as u8);
        } else if let Some(last) = self.nibbles.last_mut() {
            *last |= (class as u8) << 4;
        }
        self.nibble_count += 1;
    }

    #[inline]
    fn put(&mut self, code: &ClassCode, value: u32) {
        let class = code.class_of(value);
        self.nibble(class);
        self.raw.put(value - code.bases[class], u32::from(code.widths[class]));
    }
}

thread_local! {
    static STREAMS: RefCell<Streams> = RefCell::default();
}

/// A token as its place in the row before, as a rank, or as itself: `before` holds the ranks of that row.
pub fn token_value(token: u32, before: &[u32], tables: &Tables, k: u32) -> u32 {
    let Some(rank) = tables.dictionary.rank_of.get(token as usize) else { return k + token };
    let hits = before.iter().fold(false, |any, r| any | (r == rank));
    match hits.then(|| before.iter().position(|r| r == rank)).flatten() {
        Some(place) => place as u32,
        None => k + rank,
    }
}

/// Ranks of a row's entries, equal codes by rank. Draws move with them.
pub fn rank_row(tables: &Tables, codes: &[u32], ids: &[u32], ranks: &mut Vec<u32>, draws: &mut [u32]) {
    ranks.clear();
    ranks.extend(ids.iter().map(|id| tables.dictionary.rank_of[*id as usize]));
    if draws.is_empty() {
        sort_ties(codes, ranks, |_, _| ());
    } else {
        sort_ties(codes, ranks, |a, b| draws.swap(a, b));
    }
}

pub fn block(dense: &Dense, coded: &Coded, first: usize, end: usize, entry: usize, out: &mut Vec<u8>) {
    STREAMS.with_borrow_mut(|streams| {
        streams.clear();
        encode(dense, coded, first, end, entry, streams, out);
    });
}

fn encode(
    dense: &Dense,
    coded: &Coded,
    first: usize,
    end: usize,
    entry: usize,
    streams: &mut Streams,
    out: &mut Vec<u8>,
) {
    let (layout, tables) = (&dense.layout, &*dense.tables);
    let (k, rests) = (layout.k, 1 + layout.extra);
    let ragged = coded.counts[first..end].iter().any(|c| u32::from(*c) != k);
    let mut words = Vec::with_capacity((end - first) * layout.words() * 4);
    let (mut at, mut draws) = (entry, Vec::new());
    for row in first..end {
        let n = usize::from(coded.counts[row]);
        let (ids, codes) = (&coded.ids[at..at + n], &coded.codes[at..at + n]);
        if layout.sampled {
            draws.clear();
            draws.extend_from_slice(&coded.draws[at..at + n]);
        }
        let mut ranks = std::mem::take(&mut streams.ranks);
        rank_row(tables, codes, ids, &mut ranks, &mut draws);
        let token = token_value(coded.tokens[row], &streams.before, tables, k);
        streams.put(&tables.classes[TOKEN], token);
        if ragged {
            streams.put(&tables.classes[COUNT], k - n as u32);
        }
        if layout.values.by_difference() {
            streams.put(&tables.classes[FIRST], codes.first().copied().unwrap_or(0));
        }
        let row_rests = &coded.rests[row * rests..(row + 1) * rests];
        if let Values::Grid { .. } = layout.values {
            streams.put(&tables.classes[REST], row_rests[0]);
            row_rests[1..].iter().for_each(|r| streams.put(&tables.classes[EXTRA], *r));
        } else {
            words.extend(coded.lse.get(row).iter().flat_map(|l| l.to_le_bytes()));
            words.extend(row_rests.iter().flat_map(|r| r.to_le_bytes()));
        }
        if layout.values.by_difference() {
            codes.windows(2).for_each(|w| tables.codes.put(w[1] - w[0], &mut streams.differences));
        }
        for j in 0..n {
            if j > 0 && codes[j] == codes[j - 1] {
                streams.put(&tables.classes[STEP], ranks[j] - ranks[j - 1] - 1);
            } else {
                streams.put(&tables.classes[RANK], ranks[j]);
            }
        }
        draws.iter().for_each(|d| tables.draws.put(*d, &mut streams.raw));
        streams.ranks = std::mem::replace(&mut streams.before, ranks);
        at += n;
    }
    streams.differences.finish();
    streams.raw.finish();
    out.extend_from_slice(&[u8::from(ragged), 0, 0, 0]);
    for len in [streams.nibbles.len(), streams.differences.bytes.len(), streams.raw.bytes.len()] {
        out.extend_from_slice(&(len as u32).to_le_bytes());
    }
    out.extend_from_slice(&words);
    pad(out);
    for code in coded.codes[entry..at].iter().filter(|_| layout.code_bytes() > 0) {
        out.extend_from_slice(&code.to_le_bytes()[..layout.code_bytes()]);
    }
    pad(out);
    out.extend_from_slice(&streams.nibbles);
    out.extend_from_slice(&streams.differences.bytes);
    out.extend_from_slice(&streams.raw.bytes);
    out.extend_from_slice(&[0; SLACK]);
}
