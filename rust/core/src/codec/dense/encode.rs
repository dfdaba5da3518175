//! Rows to a payload; `decode` reads it back.
//!
//! ragged u8, zero x 3 | bytes of the three streams, u32 each | row words, padded to 8 | raw codes, padded to 8
//! | nibbles | differences | raw bits | 8 zero bytes

use std::cell::RefCell;
use std::ops::Range;

use super::bitstream::{BitWriter, Room, SLACK};
use super::classes::{ClassCode, CLASSES};
use super::coded::{sort_ties, Coded};
use super::dictionary::Dictionary;
use super::prefix::{PrefixCode, ESCAPE_BITS};
use super::tables::{Tables, COUNT, EXTRA, FIRST, REST, TOKEN};
use super::{widest, Dense};
use crate::bytes::pad;

/// Bits that a column of a row, or of an entry, may take.
pub const COLUMN_BITS: usize = 32;

#[derive(Default)]
pub struct Streams {
    /// One a byte until the block is whole.
    pub nibbles: Vec<u8>,
    differences: BitWriter,
    pub raw: BitWriter,
    /// Ranks of the row's entries, in stored order, and of the row before.
    pub ranks: Vec<u32>,
    before: Vec<u32>,
    draws: Vec<u32>,
    words: Vec<u8>,
}

impl Streams {
    fn clear(&mut self) {
        self.nibbles.clear();
        self.differences.clear();
        self.raw.clear();
        self.before.clear();
        self.words.clear();
    }

    #[inline(always)]
    fn put(&mut self, code: &ClassCode, value: u32) {
        let class = code.class_of(value);
        self.nibbles.push(class as u8);
        self.raw.put(u64::from(value - code.bases[class]), u32::from(code.widths[class]));
    }
}

thread_local! {
    static STREAMS: RefCell<Streams> = RefCell::default();
}

/// A token as its place in the row before, as a rank, or as itself: `before` holds the ranks of that row.
#[inline(always)]
pub fn token_value(token: u32, before: &[u32], dictionary: &Dictionary, k: u32) -> u32 {
    let Some(rank) = dictionary.rank_of.get(token as usize) else { return k + token };
    let hits = before.iter().fold(false, |any, r| any | (r == rank));
    match hits.then(|| before.iter().position(|r| r == rank)).flatten() {
        Some(place) => place as u32,
        None => k + rank,
    }
}

/// Ranks of a row's entries, equal codes by rank. Draws move with them.
#[inline(always)]
pub fn rank_row(dictionary: &Dictionary, codes: &[u32], ids: &[u32], ranks: &mut Vec<u32>, draws: &mut [u32]) {
    ranks.clear();
    if dictionary.is_identity() {
        return ranks.extend_from_slice(ids); // equal codes stand by id
    }
    let rank_of = dictionary.rank_of.as_slice();
    ranks.extend(ids.iter().map(|id| rank_of[*id as usize]));
    if draws.is_empty() {
        widest::sort_ties(codes, ranks);
    } else {
        sort_ties(codes, ranks, |a, b| draws.swap(a, b));
    }
}

pub fn block(dense: &Dense, coded: &Coded, first: usize, end: usize, entry: usize, out: &mut Vec<u8>) {
    STREAMS.with_borrow_mut(|streams| {
        streams.clear();
        let entries = widest::encode(dense, coded, first..end, entry, streams);
        finish(dense, coded, first..end, entry..entry + entries, streams, out);
    });
}

/// Fills the streams with rows whose entries begin at `entry`; how many they have.
#[inline(always)]
pub fn rows<P: Put>(dense: &Dense, coded: &Coded, range: Range<usize>, entry: usize, streams: &mut Streams) -> usize {
    let (layout, tables) = (&dense.layout, &*dense.tables);
    let (k, rests) = (layout.k, 1 + layout.extra);
    let not_stored = rests - layout.stored_rests();
    let ragged = is_ragged(coded, range.clone(), k);
    let mut at = entry;
    for row in range {
        let n = usize::from(coded.counts[row]);
        let (ids, codes) = (&coded.ids[at..at + n], &coded.codes[at..at + n]);
        streams.draws.clear();
        if layout.sampled {
            streams.draws.extend_from_slice(&coded.draws[at..at + n]);
        }
        rank_row(&tables.dictionary, codes, ids, &mut streams.ranks, &mut streams.draws);
        let token = token_value(coded.tokens[row], &streams.before, &tables.dictionary, k);
        streams.put(&tables.classes[TOKEN], token);
        if ragged {
            streams.put(&tables.classes[COUNT], k - n as u32);
        }
        if layout.values.by_difference() && k > 0 {
            streams.put(&tables.classes[FIRST], coded.first_code(row, codes));
        }
        let row_rests = &coded.rests[row * rests..(row + 1) * rests];
        if layout.values.rest_grid().is_some() {
            if k > 0 {
                streams.put(&tables.classes[REST], row_rests[0]);
            }
            row_rests[1..].iter().for_each(|r| streams.put(&tables.classes[EXTRA], *r));
        } else {
            streams.words.extend(coded.lse.get(row).iter().flat_map(|l| l.to_le_bytes()));
            streams.words.extend(row_rests[not_stored..].iter().flat_map(|r| r.to_le_bytes()));
        }
        if layout.values.by_difference() {
            let most = codes.len() * COLUMN_BITS;
            streams.differences.put_all(most, |out| P::differences(&tables.codes, codes, out));
        }
        let next = &coded.ids[at + n..coded.ids.len().min(at + 2 * n)];
        P::ids(tables, codes, streams, next);
        let draws = &streams.draws;
        streams.raw.put_all(draws.len() * COLUMN_BITS, |out| draws.iter().for_each(|d| tables.draws.put(*d, out)));
        std::mem::swap(&mut streams.ranks, &mut streams.before);
        at += n;
    }
    at - entry
}

/// How the entries of a row are put into their streams.
pub trait Put {
    fn differences(prefix: &PrefixCode, codes: &[u32], out: &mut Room<'_>);
    /// `next` will be looked up soon.
    fn ids(tables: &Tables, codes: &[u32], streams: &mut Streams, next: &[u32]);
}

/// One or two at a time.
pub struct Plain;

impl Put for Plain {
    #[inline(always)]
    fn differences(prefix: &PrefixCode, codes: &[u32], out: &mut Room<'_>) {
        differences(prefix, codes, out);
    }

    #[inline(always)]
    fn ids(tables: &Tables, codes: &[u32], streams: &mut Streams, _: &[u32]) {
        put_ids(tables, codes, 0, streams);
    }
}

/// Four numbers of at most 11 bits, or one with an escape, go in at once.
#[inline(always)]
pub fn differences(prefix: &PrefixCode, codes: &[u32], out: &mut Room<'_>) {
    let Some((_, later)) = codes.split_first() else { return };
    let (before, rest) = codes[..later.len()].as_chunks::<4>();
    let (groups, last) = later.as_chunks::<4>();
    for (before, group) in before.iter().zip(groups) {
        let parts = [0, 1, 2, 3].map(|i| prefix.bits_of(group[i] - before[i]));
        if parts.iter().any(|(_, length)| *length > ESCAPE_BITS) {
            parts.iter().for_each(|(bits, length)| out.put(*bits, *length));
            continue;
        }
        let (mut bits, mut length) = (0, 0);
        for part in parts {
            bits |= part.0 << length;
            length += part.1;
        }
        out.put(bits, length);
    }
    for (before, code) in rest.iter().zip(last) {
        prefix.put(code - before, out);
    }
}

/// Entries from `from` on: ranks, and steps from the rank before where the codes are equal, two of them at once.
#[inline(always)]
pub fn put_ids(tables: &Tables, codes: &[u32], from: usize, streams: &mut Streams) {
    let (mut before, mut code) = match from.checked_sub(1) {
        Some(last) => (streams.ranks[last], codes[last]),
        None => (0, u32::MAX),
    };
    let (ranks, codes, classes) = (&streams.ranks[from..], &codes[from..], tables.class_of_id());
    let v = tables.dictionary.id_of.len() as u32;
    let start = streams.nibbles.len();
    streams.nibbles.resize(start + ranks.len(), 0);
    let nibbles = &mut streams.nibbles[start..];
    let mut part = |rank: u32, next: u32, nibble: &mut u8| -> (u64, u32) {
        let tie = 0u32.wrapping_sub(u32::from(next == code));
        let value = rank - (before & tie);
        (before, code) = (rank, next);
        let class = classes[(value + (v & tie)) as usize];
        *nibble = class % CLASSES as u8;
        let class = &tables.ranks[usize::from(class)];
        (u64::from(value - class.base), class.width)
    };
    let (pairs, last) = ranks.as_chunks::<2>();
    let (nibbles, last_nibble) = nibbles.as_chunks_mut::<2>();
    let (codes, last_code) = codes.as_chunks::<2>();
    streams.raw.put_all(ranks.len() * COLUMN_BITS, |out| {
        for ((pair, nibble), code) in pairs.iter().zip(nibbles).zip(codes) {
            let one = part(pair[0], code[0], &mut nibble[0]);
            let two = part(pair[1], code[1], &mut nibble[1]);
            out.put(one.0 | two.0 << one.1, one.1 + two.1);
        }
        for ((rank, nibble), code) in last.iter().zip(last_nibble).zip(last_code) {
            let one = part(*rank, *code, nibble);
            out.put(one.0, one.1);
        }
    });
}

fn is_ragged(coded: &Coded, range: Range<usize>, k: u32) -> bool {
    coded.counts[range].iter().any(|c| u32::from(*c) != k)
}

fn finish(
    dense: &Dense,
    coded: &Coded,
    range: Range<usize>,
    entries: Range<usize>,
    streams: &Streams,
    out: &mut Vec<u8>,
) {
    let layout = &dense.layout;
    let (differences, raw) = (streams.differences.finish(), streams.raw.finish());
    out.extend_from_slice(&[u8::from(is_ragged(coded, range, layout.k)), 0, 0, 0]);
    for len in [streams.nibbles.len().div_ceil(2), differences.len(), raw.len()] {
        out.extend_from_slice(&(len as u32).to_le_bytes());
    }
    out.extend_from_slice(&streams.words);
    pad(out);
    if layout.code_bytes() > 0 {
        coded.codes[entries].iter().for_each(|c| out.extend_from_slice(&c.to_le_bytes()[..layout.code_bytes()]));
    }
    pad(out);
    let (pairs, last) = streams.nibbles.as_chunks::<2>();
    out.extend(pairs.iter().map(|pair| u16::from_le_bytes(*pair)).map(|pair| (pair | pair >> 4) as u8));
    out.extend_from_slice(last);
    out.extend_from_slice(differences);
    out.extend_from_slice(raw);
    out.extend_from_slice(&[0; SLACK]);
}
