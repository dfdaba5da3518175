//! Ids of a row with AVX2: where each raw part begins is a running sum of widths, so that no id waits for the one before it.

use std::arch::x86_64::*;

use super::super::bitstream::SLACK;
use super::super::decode::{Ahead, Begin, GROUP};
use super::super::tables::Tables;
use super::vectors::{doubles, load, load_half, load_words, octets, words};
use super::Avx2;

/// A raw part of so many bits lies within the 4 bytes at its first one, and four of them within 16.
pub const MAX_WIDTH: u32 = 25;
/// Bytes that the windows of a group may touch, wherever they begin below the first number.
const REACH: usize = 128 + 15;

/// Byte b of a lane is byte `first + b / 4`: four bytes of each of four entries.
const fn each(first: u8) -> [u8; 32] {
    let (mut bytes, mut b) = ([0; 32], 0);
    while b < 32 {
        bytes[b] = first + b as u8 % 16 / 4;
        b += 1;
    }
    bytes
}

/// Bytes of four entries as words.
const fn expanded(first: u8) -> [u8; 32] {
    let (mut bytes, mut b) = (each(first), 0);
    while b < 32 {
        if b % 4 > 0 {
            bytes[b] = 0x80;
        }
        b += 1;
    }
    bytes
}

const fn by(lane: [u8; 16]) -> [u8; 32] {
    let (mut bytes, mut b) = ([0; 32], 0);
    while b < 32 {
        bytes[b] = lane[b % 16];
        b += 1;
    }
    bytes
}

const EACH: [[u8; 32]; 4] = [each(0), each(4), each(8), each(12)];
const EXPANDED: [[u8; 32]; 4] = [expanded(0), expanded(4), expanded(8), expanded(12)];
const OF_EIGHT: [u8; 32] = by([0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8]);
const OF_FOUR: [u8; 32] = by([0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12]);
const COUNT: [u8; 32] = by([0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]);

const ALL_BUT_ONE: [u8; 32] = {
    let mut bytes = [0xff; 32];
    bytes[0] = 0;
    bytes
};

pub fn walk(
    tables: &Tables,
    begin: &Begin<'_>,
    codes: &[u32],
    ids: &mut [i32],
    ahead: &mut Ahead<'_>,
) -> Option<usize> {
    // SAFETY: `super::walk` gives this function only where the processor has what it is compiled for.
    unsafe { walk_avx2(tables, begin, codes, ids, ahead) }
}

#[target_feature(enable = "avx2,bmi1,bmi2")]
fn walk_avx2(
    tables: &Tables,
    begin: &Begin<'_>,
    codes: &[u32],
    ids: &mut [i32],
    ahead: &mut Ahead<'_>,
) -> Option<usize> {
    let id_of = tables.dictionary.id_of.as_slice();
    let last_rank = _mm256_set1_epi32(id_of.len().checked_sub(1)? as i32);
    let (mut at, mut nibble, mut before) = (begin.bit, begin.nibble, _mm256_setzero_si256());
    for (group, ids) in ids.chunks_mut(GROUP).enumerate() {
        let mut step = ties(codes.get(group * GROUP..)?.first_chunk()?);
        if group == 0 {
            step = _mm256_and_si256(step, load(&ALL_BUT_ONE));
        }
        let class = classes(begin.nibbles, nibble)?;
        let parts = Parts::new(tables, class, step, (at % 8) as i64);
        let near = begin.raw.get(at / 8..)?;
        let copy;
        let reach: &[u8; REACH] = match near.first_chunk() {
            Some(reach) => reach,
            None => {
                copy = copied(near);
                &copy
            }
        };
        ahead.step::<Avx2>(&tables.codes);
        let mut ranks = bases(tables, class, step);
        for (g, rank) in ranks.iter_mut().enumerate() {
            *rank = _mm256_add_epi32(*rank, parts.raw(g, reach)); // as a closure it is not inlined
        }
        before = add_steps(&mut ranks, step, before);
        ahead.step::<Avx2>(&tables.codes); // while the ranks are on their way
        let largest = _mm256_max_epu32(_mm256_max_epu32(ranks[0], ranks[1]), _mm256_max_epu32(ranks[2], ranks[3]));
        let inside = _mm256_cmpeq_epi32(_mm256_max_epu32(largest, last_rank), last_rank);
        let inside = _mm256_movemask_epi8(inside) == -1;
        let ranks = in_order(&ranks);
        if inside {
            for (slot, rank) in ids.iter_mut().zip(ranks.as_flattened()) {
                // SAFETY: the largest rank is one of the vocabulary
                *slot = unsafe { *id_of.get_unchecked(*rank as usize) } as i32;
            }
        } else {
            // behind the last entry there may be anything
            for (slot, rank) in ids.iter_mut().zip(ranks.as_flattened()) {
                *slot = *id_of.get(*rank as usize)? as i32;
            }
        }
        at = at / 8 * 8 + parts.end(ids.len() - 1);
        nibble += GROUP;
    }
    (at.div_ceil(8) + SLACK <= begin.raw.len()).then_some(at)
}

/// Bytes near the end of a payload, and zeros.
#[cold]
fn copied<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut copy = [0; N];
    copy[..bytes.len()].copy_from_slice(bytes);
    copy
}

/// All ones for each entry whose code is that of the one before it.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn ties(codes: &[u32; GROUP + 1]) -> __m256i {
    let (before, here) = (codes[..GROUP].as_chunks::<8>().0, codes[1..].as_chunks::<8>().0);
    let equal = |i: usize| _mm256_cmpeq_epi32(load_words(&before[i]), load_words(&here[i]));
    let halves = (_mm256_packs_epi32(equal(0), equal(1)), _mm256_packs_epi32(equal(2), equal(3)));
    let order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7); // packing leaves fours of each lane
    _mm256_permutevar8x32_epi32(_mm256_packs_epi16(halves.0, halves.1), order)
}

/// The classes from a nibble on.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn classes(bytes: &[u8], nibble: usize) -> Option<__m256i> {
    const BYTES: usize = GROUP / 2 + 1;
    let near = bytes.get(nibble / 2..)?;
    let copy;
    let near: &[u8; BYTES] = match near.first_chunk() {
        Some(near) => near,
        None => {
            copy = copied(near);
            &copy
        }
    };
    let (odd, low) = (nibble % 2, _mm_set1_epi8(15));
    let (here, next) = (near[..16].first_chunk()?, near[odd..].first_chunk()?);
    let shift = |odd: usize| _mm_cvtsi64_si128(4 * odd as i64);
    let first = _mm_and_si128(_mm_srl_epi16(load_half(here), shift(odd)), low);
    let second = _mm_and_si128(_mm_srl_epi16(load_half(next), shift(1 - odd)), low);
    Some(_mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second)))
}

/// A byte of each class from a table of ranks and one of steps.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn of_class(tables: [&[u8; 16]; 2], class: __m256i, step: __m256i) -> __m256i {
    let of = |table| _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(load_half(table)), class);
    _mm256_blendv_epi8(of(tables[0]), of(tables[1]), step)
}

/// What the ranks, or steps, of each class begin at. Vector g holds entries 4 g to 4 g + 3 and those 16 behind them.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn bases(tables: &Tables, class: __m256i, step: __m256i) -> [__m256i; 4] {
    let plane = |i: usize| of_class([&tables.planes[0][i], &tables.planes[1][i]], class, step);
    let [a, b, c, d] = [0, 1, 2, 3].map(plane);
    let (low, high) = (_mm256_unpacklo_epi8(a, b), _mm256_unpacklo_epi8(c, d));
    let (later_low, later_high) = (_mm256_unpackhi_epi8(a, b), _mm256_unpackhi_epi8(c, d));
    [
        _mm256_unpacklo_epi16(low, high),
        _mm256_unpackhi_epi16(low, high),
        _mm256_unpacklo_epi16(later_low, later_high),
        _mm256_unpackhi_epi16(later_low, later_high),
    ]
}

/// Where the raw parts of a group lie, in bytes and bits from the byte that holds the first one.
struct Parts {
    /// First bit of each eight entries, and bits of each entry with those before it among its eight.
    eights: [u64; 4],
    sums: [u8; GROUP],
    /// First byte of each entry from the first byte of its eight; the same from that of its four.
    byte: [u8; GROUP],
    from_four: __m256i,
    /// Shifts that leave the raw part of a window of 32 bits.
    left: __m256i,
    right: __m256i,
}

impl Parts {
    #[inline]
    #[target_feature(enable = "avx2,bmi1,bmi2")]
    fn new(tables: &Tables, class: __m256i, step: __m256i, first: i64) -> Parts {
        let width = of_class([&tables.widths[0], &tables.widths[1]], class, step);
        let mut sums = _mm256_add_epi8(width, _mm256_slli_epi64::<8>(width));
        sums = _mm256_add_epi8(sums, _mm256_slli_epi64::<16>(sums));
        sums = _mm256_add_epi8(sums, _mm256_slli_epi64::<32>(sums)); // at most 200
        let total = _mm256_srli_epi64::<56>(sums);
        let first_of_lane = _mm256_slli_si256::<8>(total);
        let lane = _mm256_add_epi64(total, first_of_lane);
        let lower = _mm256_permute2x128_si256::<0x08>(lane, lane); // behind nothing, the lower lane
        let eights = _mm256_add_epi64(first_of_lane, _mm256_unpackhi_epi64(lower, lower));
        let eights = _mm256_add_epi64(eights, _mm256_set1_epi64x(first));
        let bit_of_eight = _mm256_and_si256(eights, _mm256_set1_epi64x(7));
        let begin = _mm256_add_epi8(_mm256_shuffle_epi8(bit_of_eight, load(&OF_EIGHT)), _mm256_sub_epi8(sums, width));
        let byte = _mm256_and_si256(_mm256_srli_epi16::<3>(begin), _mm256_set1_epi8(31));
        let bit = _mm256_and_si256(begin, _mm256_set1_epi8(7));
        let right = _mm256_sub_epi8(_mm256_set1_epi8(32), width);
        Parts {
            eights: doubles(eights),
            sums: octets(sums),
            byte: octets(byte),
            from_four: _mm256_sub_epi8(byte, _mm256_shuffle_epi8(byte, load(&OF_FOUR))),
            left: _mm256_sub_epi8(right, bit),
            right,
        }
    }

    /// The bit behind an entry.
    #[inline]
    fn end(&self, entry: usize) -> usize {
        self.eights[entry / 8 % 4] as usize + usize::from(self.sums[entry % GROUP])
    }

    /// Raw parts of entries 4 g to 4 g + 3 and of those 16 behind them.
    #[inline]
    #[target_feature(enable = "avx2,bmi1,bmi2")]
    fn raw(&self, g: usize, reach: &[u8; REACH]) -> __m256i {
        let window = |entry: usize| {
            let at = (self.eights[entry / 8] as usize / 8 + usize::from(self.byte[entry])) % 128;
            let mut bytes = [0; 16];
            bytes.copy_from_slice(&reach[at..at + 16]);
            load_half(&bytes)
        };
        let near = _mm256_set_m128i(window(16 + 4 * g), window(4 * g));
        let bytes = _mm256_add_epi8(_mm256_shuffle_epi8(self.from_four, load(&EACH[g])), load(&COUNT));
        let window = _mm256_shuffle_epi8(near, bytes);
        let shift = |by| _mm256_shuffle_epi8(by, load(&EXPANDED[g]));
        _mm256_srlv_epi32(_mm256_sllv_epi32(window, shift(self.left)), shift(self.right))
    }
}

/// Adds to each step the rank before it, in entries' order; `before` holds that of the first entry in its lower lane and nothing in the
/// upper one. What comes before the next group.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn add_steps(ranks: &mut [__m256i; 4], step: __m256i, mut before: __m256i) -> __m256i {
    let all = _mm256_set1_epi32(-1);
    let (mut keeps, mut reaches) = ([all; 4], all);
    for (g, (rank, keep)) in ranks.iter_mut().zip(&mut keeps).enumerate() {
        // sums over steps within each four
        let one = _mm256_shuffle_epi8(step, load(&EACH[g]));
        let two = _mm256_and_si256(one, _mm256_alignr_epi8::<12>(one, all));
        let four = _mm256_and_si256(two, _mm256_alignr_epi8::<8>(two, all));
        let mut sum = _mm256_add_epi32(*rank, _mm256_and_si256(one, _mm256_slli_si256::<4>(*rank)));
        sum = _mm256_add_epi32(sum, _mm256_and_si256(two, _mm256_slli_si256::<8>(sum)));
        // what comes before the four
        sum = _mm256_add_epi32(sum, _mm256_and_si256(four, before));
        before = _mm256_shuffle_epi32::<0xff>(sum);
        *keep = _mm256_and_si256(four, reaches);
        reaches = _mm256_shuffle_epi32::<0xff>(*keep);
        *rank = sum;
    }
    // the upper lanes began with nothing before them
    let lower = _mm256_permute2x128_si256::<0x08>(before, before);
    for (rank, keep) in ranks.iter_mut().zip(keeps) {
        *rank = _mm256_add_epi32(*rank, _mm256_and_si256(keep, lower));
    }
    let last = _mm256_add_epi32(before, _mm256_and_si256(reaches, lower));
    _mm256_permute2x128_si256::<0x81>(last, last)
}

/// Entries in order, four by four.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn in_order(ranks: &[__m256i; 4]) -> [[u32; 4]; GROUP / 4] {
    let mut found = [[0; 4]; GROUP / 4];
    for (g, rank) in ranks.iter().enumerate() {
        let both = words(*rank);
        found[g].copy_from_slice(&both[..4]);
        found[g + 4].copy_from_slice(&both[4..]);
    }
    found
}
