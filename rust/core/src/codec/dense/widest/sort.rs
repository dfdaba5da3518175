//! Up to 64 entries in order with AVX2: Batcher's network for eight down the columns of eight vectors, then merges of neighbouring
//! halves, or, where more than eight codes are equal, bitonic merges of all rows.

use std::arch::x86_64::*;

use super::vectors::{load_words, words};

/// Entries that are sorted at once.
const MOST: usize = 64;
/// Bits of an id or a rank in a key; the code, counted from the row's first one, stands above.
const ID_BITS: u32 = 22;
const SPREAD: u32 = u32::MAX >> ID_BITS;

type Rows = [__m256i; 8];

/// `coded::sort_ties` of codes that never descend. False, and nothing done, where the row is too long or too wide for keys.
#[target_feature(enable = "avx2,bmi1,bmi2")]
pub fn sort_ties(codes: &[u32], ids: &mut [u32]) -> bool {
    let (Some(first), Some(last)) = (codes.first(), codes.last()) else { return true };
    if codes.len() > MOST || last - first >= SPREAD {
        return false;
    }
    if let (Ok(codes), Ok(ids)) = (codes.try_into(), <&mut [u32; MOST]>::try_from(&mut *ids)) {
        sort_row(*first, codes, ids);
        return true;
    }
    let (mut all_codes, mut all_ids) = ([first + SPREAD; MOST], [0; MOST]); // behind every entry
    all_codes[..codes.len()].copy_from_slice(codes);
    all_ids[..ids.len()].copy_from_slice(ids);
    sort_row(*first, &all_codes, &mut all_ids);
    ids.copy_from_slice(&all_ids[..ids.len()]);
    true
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn sort_row(first: u32, codes: &[u32; MOST], ids: &mut [u32; MOST]) {
    let (first, id_part) = (_mm256_set1_epi32(first as i32), _mm256_set1_epi32((1 << ID_BITS) - 1));
    let mut keys = [first; 8];
    for ((key, code), id) in keys.iter_mut().zip(codes.as_chunks::<8>().0).zip(ids.as_chunks::<8>().0) {
        let code = _mm256_slli_epi32::<{ ID_BITS as i32 }>(_mm256_sub_epi32(load_words(code), first));
        *key = _mm256_or_si256(code, load_words(id));
    }
    let mut long = _mm256_setzero_si256(); // an entry and the eighth after it have one code; equal keys are in order
    for (here, later) in keys.iter().zip(&keys[1..]) {
        let apart = _mm256_xor_si256(*here, *later);
        let one_code = _mm256_cmpeq_epi32(_mm256_min_epu32(apart, id_part), apart);
        long = _mm256_or_si256(long, _mm256_and_si256(one_code, apart));
    }
    keys = if _mm256_testz_si256(long, long) == 1 { nearly_sorted(keys) } else { sorted(keys) };
    for (ids, key) in ids.as_chunks_mut::<8>().0.iter_mut().zip(keys) {
        *ids = words(_mm256_and_si256(key, id_part));
    }
}

macro_rules! exchange {
    ($v:ident, $($i:literal $j:literal),*) => { $( ($v[$i], $v[$j]) = in_order($v[$i], $v[$j]); )* };
}

/// Sorts each column.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn columns(mut v: Rows) -> Rows {
    exchange!(v, 0 1, 2 3, 4 5, 6 7, 0 2, 1 3, 4 6, 5 7, 1 2, 5 6);
    halves(v)
}

/// Merges the sorted halves of each column.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn halves(mut v: Rows) -> Rows {
    exchange!(v, 0 4, 1 5, 2 6, 3 7, 2 4, 3 5, 1 2, 3 4, 5 6);
    v
}

/// Sorts keys of which only runs of at most eight are out of order. What a run has on both sides of a bound between eights goes
/// right in two steps: the nearest fours of both sides are merged, then the fours of each eight.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn nearly_sorted(keys: Rows) -> Rows {
    let mut v = columns(transposed(keys)); // column c holds keys 8 c to 8 c + 7
    let (next, back) = (_mm256_setr_epi32(1, 2, 3, 4, 5, 6, 7, 0), _mm256_setr_epi32(7, 0, 1, 2, 3, 4, 5, 6));
    let mut across = [_mm256_set1_epi32(-1); 8]; // behind the last eight comes nothing
    for i in 0..4 {
        across[i] = v[i + 4];
        across[i + 4] = _mm256_blend_epi32::<0x80>(_mm256_permutevar8x32_epi32(v[i], next), across[i + 4]);
    }
    across = halves(across);
    for i in 0..4 {
        v[i] = _mm256_blend_epi32::<0x01>(_mm256_permutevar8x32_epi32(across[i + 4], back), v[i]);
        v[i + 4] = across[i];
    }
    transposed(halves(v))
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn sorted(v: Rows) -> Rows {
    let mut v = transposed(columns(v));
    merge::<2>(&mut v, 0);
    merge::<2>(&mut v, 2);
    merge::<2>(&mut v, 4);
    merge::<2>(&mut v, 6);
    merge::<4>(&mut v, 0);
    merge::<4>(&mut v, 4);
    merge::<8>(&mut v, 0);
    v
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn in_order(a: __m256i, b: __m256i) -> (__m256i, __m256i) {
    (_mm256_min_epu32(a, b), _mm256_max_epu32(a, b))
}

/// Columns as rows.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn transposed(v: Rows) -> Rows {
    let pair = |i: usize| (_mm256_unpacklo_epi32(v[i], v[i + 1]), _mm256_unpackhi_epi32(v[i], v[i + 1]));
    let [a, b, c, d] = [pair(0), pair(2), pair(4), pair(6)];
    let four = |a: (__m256i, __m256i), b: (__m256i, __m256i)| {
        [
            _mm256_unpacklo_epi64(a.0, b.0),
            _mm256_unpackhi_epi64(a.0, b.0),
            _mm256_unpacklo_epi64(a.1, b.1),
            _mm256_unpackhi_epi64(a.1, b.1),
        ]
    };
    let (upper, lower) = (four(a, b), four(c, d));
    [0, 1, 2, 3, 4, 5, 6, 7].map(|i| match i < 4 {
        true => _mm256_permute2x128_si256::<0x20>(upper[i], lower[i]),
        false => _mm256_permute2x128_si256::<0x31>(upper[i - 4], lower[i - 4]),
    })
}

/// Merges the ascending halves of N rows from `first` on.
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn merge<const N: usize>(v: &mut Rows, first: usize) {
    let backwards = _mm256_setr_epi32(7, 6, 5, 4, 3, 2, 1, 0);
    let v = &mut v[first..first + N];
    let mut upper = [backwards; N];
    for i in 0..N / 2 {
        upper[i] = _mm256_permutevar8x32_epi32(v[N - 1 - i], backwards);
    }
    for i in 0..N / 2 {
        (v[i], v[i + N / 2]) = in_order(v[i], upper[i]);
    }
    let mut distance = N / 4;
    while distance > 0 {
        for i in 0..N {
            if (i / distance).is_multiple_of(2) {
                (v[i], v[i + distance]) = in_order(v[i], v[i + distance]);
            }
        }
        distance /= 2;
    }
    for row in v {
        let mut x = *row;
        let (low, high) = in_order(x, _mm256_permute2x128_si256::<0x01>(x, x));
        x = _mm256_blend_epi32::<0xf0>(low, high);
        let (low, high) = in_order(x, _mm256_shuffle_epi32::<0x4e>(x));
        x = _mm256_blend_epi32::<0xcc>(low, high);
        let (low, high) = in_order(x, _mm256_shuffle_epi32::<0xb1>(x));
        *row = _mm256_blend_epi32::<0xaa>(low, high);
    }
}

#[cfg(test)]
mod tests {
    use super::super::{put, wide};
    use super::*;
    use crate::codec::dense::coded;

    #[test]
    fn every_way_gives_the_same_order() {
        if !wide() {
            return;
        }
        let mut seed = 5u32;
        let mut next = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        };
        let (mut whole, mut too_wide) = (0, 0);
        for round in 0..4000u32 {
            let (n, apart) = (next() as usize % (MOST + 4), [1, 2, 3, 9, 40, 3000][round as usize % 6]);
            let mut code = next() % 65_536;
            let mut codes = Vec::new();
            for _ in 0..n {
                code = (code + if next() % (1 + round / 6 % 3) == 0 { next() % apart } else { 0 }).min(65_535);
                codes.push(code);
            }
            let start = next();
            let ids: Vec<u32> = (0..n as u32).map(|i| (start + i * 1_000_003) % (1 << ID_BITS)).collect();
            let (mut wanted, mut exchanged, mut sorted) = (ids.clone(), ids.clone(), ids.clone());
            coded::sort_ties(&codes, &mut wanted, |_, _| ());
            // SAFETY: the processor was asked above
            let done = unsafe {
                put::exchange_ties(&codes, &mut exchanged);
                sort_ties(&codes, &mut sorted)
            };
            assert_eq!(wanted, exchanged, "round {round}");
            if done {
                assert_eq!(wanted, sorted, "round {round}");
                whole += 1;
            } else {
                assert_eq!(ids, sorted, "round {round}");
                too_wide += 1;
            }
        }
        assert!(whole > 1000 && too_wide > 100, "{whole} were sorted, {too_wide} not");
    }

    #[test]
    fn runs_of_every_length_are_sorted_wherever_they_stand() {
        if !wide() {
            return;
        }
        for (start, run) in (0..MOST).flat_map(|start| (2..=10).map(move |run| (start, run))) {
            let codes: Vec<u32> =
                (0..MOST).map(|j| if (start..start + run).contains(&j) { start } else { j } as u32).collect();
            for seed in 0..4u32 {
                // descending, and mixed
                let ids: Vec<u32> =
                    (0..MOST as u32).map(|j| (seed * 7_919 + 1).wrapping_mul(MOST as u32 - j) % 4_001).collect();
                let (mut wanted, mut sorted) = (ids.clone(), ids);
                coded::sort_ties(&codes, &mut wanted, |_, _| ());
                // SAFETY: the processor was asked above
                assert!(unsafe { sort_ties(&codes, &mut sorted) });
                assert_eq!(wanted, sorted, "{run} from {start} on, seed {seed}");
            }
        }
    }
}
