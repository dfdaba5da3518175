//! A row to its streams with AVX2: eight entries at a time become bits of four pairs, or of two fours.

use std::arch::x86_64::*;

use super::super::bitstream::{Room, MOST_BITS};
use super::super::classes::CLASSES;
use super::super::encode::{self, Streams, COLUMN_BITS};
use super::super::prefix::{PrefixCode, ESCAPE};
use super::super::tables::Tables;
use super::vectors::{base_of, doubles, load_half, load_shorts, load_words, pick, words};

/// Brings entries near. All those of a row at once would wait for one another.
#[inline(always)]
fn soon(table: &[u32], places: &[u32]) {
    for place in places {
        let entry = table.as_ptr().wrapping_add(*place as usize);
        // SAFETY: a prefetch reads nothing, whatever the address
        unsafe { _mm_prefetch::<_MM_HINT_T0>(entry.cast()) };
    }
}

/// `encode::differences`: sixteen numbers below 16 at once, or eight below the escape.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
pub fn differences(prefix: &PrefixCode, codes: &[u32], out: &mut Room<'_>) {
    let mut at = 1;
    // a row often begins with entries far apart
    while at < codes.len() && codes[at] - codes[at - 1] >= SIXTEEN as u32 {
        prefix.put(codes[at] - codes[at - 1], out);
        at += 1;
    }
    while at < codes.len() && codes.len() > SIXTEEN {
        // the last ones with those before them, which are put already
        let kept = SIXTEEN.min(codes.len() - at);
        let end = at + kept;
        let keep = load_shorts(KEEP[kept..].first_chunk().unwrap_or(&[0; SIXTEEN]));
        let before = codes[end - SIXTEEN - 1..end - 1].as_chunks::<8>().0;
        let here = codes[end - SIXTEEN..end].as_chunks::<8>().0;
        let part = |i: usize| _mm256_sub_epi32(load_words(&here[i]), load_words(&before[i]));
        let numbers = _mm256_permute4x64_epi64::<0xd8>(_mm256_packus_epi32(part(0), part(1)));
        if _mm256_testz_si256(_mm256_and_si256(numbers, keep), _mm256_set1_epi16(!15)) == 0 {
            eights(prefix, &codes[at - 1..end], out);
        } else {
            small(prefix, numbers, keep, out);
        }
        at = end;
    }
    eights(prefix, &codes[(at - 1).min(codes.len())..], out);
}

const SIXTEEN: usize = 16;
const KEEP: [u16; 2 * SIXTEEN] = {
    let (mut keep, mut i) = ([0; 2 * SIXTEEN], SIXTEEN);
    while i < keep.len() {
        keep[i] = u16::MAX;
        i += 1;
    }
    keep
};

/// Numbers below 16, in words of 16 bits, where `keep` is all ones.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn small(prefix: &PrefixCode, numbers: __m256i, keep: __m256i, out: &mut Room<'_>) {
    let table = |i: usize| _mm256_broadcastsi128_si256(load_half(&prefix.small[i]));
    let (low, lower_half) = (_mm256_or_si256(numbers, _mm256_set1_epi16(i16::MIN)), _mm256_set1_epi32(0xffff));
    let high = _mm256_or_si256(_mm256_slli_epi16::<8>(numbers), _mm256_set1_epi16(0x80));
    let code = _mm256_or_si256(_mm256_shuffle_epi8(table(0), low), _mm256_shuffle_epi8(table(1), high));
    let (code, length) = (_mm256_and_si256(code, keep), _mm256_and_si256(_mm256_shuffle_epi8(table(2), low), keep));
    let first_length = _mm256_and_si256(length, lower_half);
    let upper = _mm256_sllv_epi32(_mm256_srli_epi32::<16>(code), first_length);
    let pair = _mm256_or_si256(_mm256_and_si256(code, lower_half), upper);
    let (four, length) = joined(pair, _mm256_add_epi32(first_length, _mm256_srli_epi32::<16>(length)));
    for (bits, length) in doubles(four).into_iter().zip(doubles(length)) {
        out.put(bits, length as u32);
    }
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn eights(prefix: &PrefixCode, codes: &[u32], out: &mut Room<'_>) {
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
        let (four, four_length) = joined_pairs(pair, pair_length);
        out.put(four[0], four_length[0] as u32);
        out.put(four[2], four_length[2] as u32);
        at += 8;
    }
    encode::differences(prefix, &codes[(at - 1).min(codes.len())..], out);
}

// pairs as the lower and the upper bits of numbers 0 and 2
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn joined_pairs(pair: __m256i, length: __m256i) -> ([u64; 4], [u64; 4]) {
    let (next, next_length) = (_mm256_unpackhi_epi64(pair, pair), _mm256_unpackhi_epi64(length, length));
    let four = _mm256_or_si256(pair, _mm256_sllv_epi64(next, length));
    (doubles(four), doubles(_mm256_add_epi64(length, next_length)))
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

/// `encode::put_ids`: classes are sought among the sixteen bases, and no table of the vocabulary is read.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
pub fn put_ids(tables: &Tables, codes: &[u32], streams: &mut Streams, next: &[u32]) {
    let (rank_of, mut next) = (&tables.dictionary.rank_of, next.as_chunks::<8>().0.iter());
    let whole = streams.ranks.len() / 8 * 8;
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
            soon(rank_of, next.next().map_or(&[], |ids| ids));
            let (rank, code) = (load_words(rank), load_words(code));
            let tie = _mm256_cmpeq_epi32(code, shifted(code, last.1));
            let value = _mm256_sub_epi32(rank, _mm256_and_si256(shifted(rank, last.0), tie));
            last = (rank, code);
            let class = class_of(tables, value, tie);
            *nibbles = as_bytes(_mm256_and_si256(class, _mm256_set1_epi32(CLASSES as i32 - 1)));
            let raw = _mm256_sub_epi32(value, base_of(tables, class));
            let (pair, pair_length) = joined(raw, width_of(tables, class));
            let (four, four_length) = joined_pairs(pair, pair_length);
            if four_length[0].max(four_length[2]) <= MOST_BITS {
                out.put(four[0], four_length[0] as u32);
                out.put(four[2], four_length[2] as u32);
                continue;
            }
            for (bits, length) in doubles(pair).into_iter().zip(doubles(pair_length)) {
                out.put(bits, length as u32);
            }
        }
    });
    if whole < codes.len() {
        encode::put_ids(tables, codes, whole, streams);
    }
}

/// The class of each rank, or 16 + that of a step where a tie is: four questions, each with the bases that the answers so far leave.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn class_of(tables: &Tables, value: __m256i, tie: __m256i) -> __m256i {
    let one = _mm256_set1_epi32(1);
    let mut class = _mm256_and_si256(tie, one);
    for (level, bases) in tables.middles.iter().enumerate() {
        let bases = bases.as_chunks::<8>().0;
        let base = |i: usize| _mm256_permutevar8x32_epi32(load_words(&bases[i]), class);
        let base = if level < 3 { base(0) } else { _mm256_blendv_epi8(base(0), base(1), tie) };
        let above = _mm256_cmpgt_epi32(base, value);
        class = _mm256_add_epi32(_mm256_add_epi32(class, class), _mm256_add_epi32(above, one));
    }
    class
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn as_bytes(words: __m256i) -> [u8; 8] {
    let shorts = _mm256_packus_epi32(words, words);
    let bytes = _mm256_packus_epi16(shorts, shorts); // fours of each lane
    let (low, high) = (_mm256_extract_epi32::<0>(bytes) as u32, _mm256_extract_epi32::<4>(bytes) as u32);
    (u64::from(low) | u64::from(high) << 32).to_le_bytes()
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
pub fn exchange_ties(codes: &[u32], ids: &mut [u32]) {
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

#[cfg(test)]
mod tests {
    use super::super::super::bitstream::BitWriter;
    use super::super::super::classes::ClassCode;
    use super::super::super::dictionary::Dictionary;
    use super::super::super::tables::{bounds, RANK, STEP};
    use super::super::super::{Layout, Values};
    use super::super::{wide, Avx2};
    use super::*;
    use encode::{Plain, Put};

    const V: u32 = 1 << 18;

    fn tables(ranks: [u8; 16], steps: [u8; 16]) -> Tables {
        let values = Values::Shifted { per_nat: 16 };
        let layout = Layout { codec: 2, values, vocab_size: V, k: 300, extra: 0, sampled: false };
        let mut classes = bounds(&layout).map(ClassCode::even);
        classes[RANK] = ClassCode::new(ranks, u64::from(V), 28).expect("widths");
        classes[STEP] = ClassCode::new(steps, u64::from(V), 28).expect("widths");
        Tables::new(layout, classes, PrefixCode::default(), PrefixCode::default(), Dictionary::identity(V), 0)
    }

    fn put<P: Put>(tables: &Tables, codes: &[u32], ranks: &[u32]) -> (Vec<u8>, Vec<u8>, Vec<u8>) {
        let mut streams = Streams::default();
        streams.ranks.extend_from_slice(ranks);
        streams.nibbles.push(3);
        streams.raw.put(5, 3);
        P::ids(tables, codes, &mut streams, ranks);
        let mut differences = BitWriter::default();
        differences.put_all(codes.len() * COLUMN_BITS, |out| P::differences(&tables.codes, codes, out));
        (streams.nibbles, streams.raw.finish().to_vec(), differences.finish().to_vec())
    }

    #[test]
    fn rows_become_the_same_streams_in_vectors() {
        if !wide() {
            return;
        }
        let narrow = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 18];
        let few = [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 18];
        let all = [tables(narrow, few), tables([25; 16], [28; 16]), tables([18; 16], narrow)];
        let mut seed = 3u32;
        let mut next = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        };
        for round in 0..3000 {
            let (n, apart) = (next() as usize % 140, [2, 15, 17, 60, 70, 3000][round % 6]);
            let (mut code, mut rank) = (0, 0);
            let (mut codes, mut ranks) = (Vec::new(), Vec::new());
            for _ in 0..n {
                let tie = next() % 2 == 0 && rank + 300 < V;
                code += if tie || codes.is_empty() { 0 } else { 1 + next() % apart };
                rank = if tie && !codes.is_empty() { rank + 1 + next() % 300 } else { next() % V };
                codes.push(code.min(65_535));
                ranks.push(rank);
            }
            // what was cut off at the end may tie in any order
            let end = codes.iter().position(|c| *c == 65_535).unwrap_or(n);
            let (codes, ranks) = (&codes[..end], &ranks[..end]);
            let tables = &all[round / 6 % 3];
            assert_eq!(put::<Avx2>(tables, codes, ranks), put::<Plain>(tables, codes, ranks), "round {round}");
        }
    }
}
