//! A row to its streams with AVX2: eight entries at a time become bits of four pairs, or of two fours.

use std::arch::x86_64::*;

use super::super::bitstream::Room;
use super::super::classes::CLASSES;
use super::super::encode::{self, Streams, COLUMN_BITS};
use super::super::prefix::{PrefixCode, ESCAPE};
use super::super::tables::Tables;
use super::vectors::{base_of, doubles, eight_bytes, load_half, load_words, pick, words};

/// `encode::Put::soon`: brings the entries near.
#[inline(always)]
pub fn soon(table: &[u32], places: &[u32]) {
    for place in places {
        let entry = table.as_ptr().wrapping_add(*place as usize);
        // SAFETY: a prefetch reads nothing, whatever the address
        unsafe { _mm_prefetch::<_MM_HINT_T0>(entry.cast()) };
    }
}

/// `encode::differences`.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
pub fn differences(prefix: &PrefixCode, codes: &[u32], out: &mut Room<'_>) {
    let mut at = 1;
    let largest = _mm256_set1_epi32(ESCAPE as i32);
    while let (Some(Ok(before)), Some(Ok(here))) =
        (codes.get(at - 1..at + 7).map(<&[u32; 8]>::try_from), codes.get(at..at + 8).map(<&[u32; 8]>::try_from))
    {
        let difference = _mm256_sub_epi32(load_words(here), load_words(before));
        let symbol = _mm256_min_epu32(difference, largest);
        if _mm256_movemask_epi8(_mm256_cmpeq_epi32(symbol, largest)) != 0 {
            encode::differences(prefix, &codes[at - 1..at + 8], out);
            at += 8;
            continue;
        }
        // code | length << 16 of each, then both of pairs in 64 bits, then of fours
        let entry = load_words(&words(symbol).map(|s| prefix.entry(s)));
        let (code, length) = (_mm256_and_si256(entry, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32::<16>(entry));
        let (pair, pair_length) = joined(code, length);
        let (next, next_length) = (_mm256_unpackhi_epi64(pair, pair), _mm256_unpackhi_epi64(pair_length, pair_length));
        let four = doubles(_mm256_or_si256(pair, _mm256_sllv_epi64(next, pair_length)));
        let four_length = doubles(_mm256_add_epi64(pair_length, next_length));
        out.put(four[0], four_length[0] as u32);
        out.put(four[2], four_length[2] as u32);
        at += 8;
    }
    encode::differences(prefix, &codes[(at - 1).min(codes.len())..], out);
}

// neighbouring words as the lower and the upper bits of one number, and its length
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn joined(value: __m256i, length: __m256i) -> (__m256i, __m256i) {
    let low = _mm256_set1_epi64x(0xffff_ffff);
    let first_length = _mm256_and_si256(length, low);
    let upper = _mm256_sllv_epi64(_mm256_srli_epi64::<32>(value), first_length);
    let all = _mm256_or_si256(_mm256_and_si256(value, low), upper);
    (all, _mm256_add_epi64(first_length, _mm256_srli_epi64::<32>(length)))
}

/// `encode::put_ids`.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
pub fn put_ids(tables: &Tables, codes: &[u32], streams: &mut Streams) {
    let whole = streams.ranks.len() / 8 * 8;
    let (classes, v) = (tables.class_of_id(), _mm256_set1_epi32(tables.dictionary.id_of.len() as i32));
    let mut last = (_mm256_setzero_si256(), _mm256_set1_epi32(-1)); // rank and code before a row
    let before = _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6);
    let shifted = |here, last| {
        let first = _mm256_blend_epi32::<0x80>(here, last); // what is last comes round to the front
        _mm256_permutevar8x32_epi32(first, before)
    };
    let (ranks, nibbles) = (&streams.ranks[..whole], &mut streams.nibbles);
    let first = nibbles.len();
    nibbles.resize(first + whole, 0);
    let nibbles = nibbles[first..].as_chunks_mut::<8>().0;
    streams.raw.put_all(whole * COLUMN_BITS, |out| {
        for ((rank, code), nibbles) in ranks.as_chunks::<8>().0.iter().zip(codes.as_chunks::<8>().0).zip(nibbles) {
            let (rank, code) = (load_words(rank), load_words(code));
            let tie = _mm256_cmpeq_epi32(code, shifted(code, last.1));
            let value = _mm256_sub_epi32(rank, _mm256_and_si256(shifted(rank, last.0), tie));
            last = (rank, code);
            let class = words(_mm256_add_epi32(value, _mm256_and_si256(v, tie))).map(|i| classes[i as usize]);
            *nibbles = class.map(|c| c % CLASSES as u8);
            let class = eight_bytes(&class);
            let raw = _mm256_sub_epi32(value, base_of(tables, class));
            let (bits, length) = joined(raw, width_of(tables, class));
            for (bits, length) in doubles(bits).into_iter().zip(doubles(length)) {
                out.put(bits, length as u32);
            }
        }
    });
    encode::put_ids(tables, codes, whole, streams);
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn width_of(tables: &Tables, class: __m256i) -> __m256i {
    let of = |widths: &[u8; CLASSES]| {
        let widths = _mm256_broadcastsi128_si256(load_half(widths));
        // the other bytes of a word look up the width of class 0 and are cut off
        _mm256_and_si256(_mm256_shuffle_epi8(widths, class), _mm256_set1_epi32(0xff))
    };
    pick(of(&tables.widths[0]), of(&tables.widths[1]), _mm256_slli_epi32::<27>(class))
}

/// `coded::sort_ties`: neighbours of equal codes change places where they stand wrongly, until two passes find none.
#[target_feature(enable = "avx2,bmi1,bmi2")]
pub fn sort_ties(codes: &[u32], ids: &mut [u32]) {
    let (mut odd, mut quiet) = (0, 0);
    while quiet < 2 && odd < codes.len() {
        let changed = exchange(&codes[odd..], &mut ids[odd..]);
        quiet = if changed { 0 } else { quiet + 1 };
        odd = 1 - odd;
    }
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn exchange(codes: &[u32], ids: &mut [u32]) -> bool {
    let mut changed = _mm256_setzero_si256();
    let (groups, rest) = ids.as_chunks_mut::<8>();
    let (code_groups, code_rest) = codes.as_chunks::<8>();
    for (ids, codes) in groups.iter_mut().zip(code_groups) {
        let (id, code) = (load_words(ids), load_words(codes));
        let (other, other_code) = (_mm256_shuffle_epi32::<0xb1>(id), _mm256_shuffle_epi32::<0xb1>(code));
        let sorted = _mm256_blend_epi32::<0xaa>(_mm256_min_epu32(id, other), _mm256_max_epu32(id, other));
        let sorted = _mm256_blendv_epi8(id, sorted, _mm256_cmpeq_epi32(code, other_code));
        changed = _mm256_or_si256(changed, _mm256_xor_si256(id, sorted));
        *ids = words(sorted);
    }
    let mut any = _mm256_testz_si256(changed, changed) == 0;
    for (pair, codes) in rest.as_chunks_mut::<2>().0.iter_mut().zip(code_rest.as_chunks::<2>().0) {
        let wrong = (codes[0] == codes[1]) & (pair[0] > pair[1]);
        *pair = if wrong { [pair[1], pair[0]] } else { *pair };
        any |= wrong;
    }
    any
}
