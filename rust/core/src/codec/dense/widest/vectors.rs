//! Arrays as vectors of AVX2 and back.

use std::arch::x86_64::*;

use super::super::tables::Tables;

#[inline(always)]
pub fn load(bytes: &[u8; 32]) -> __m256i {
    // SAFETY: every array of 32 bytes is a vector
    unsafe { std::mem::transmute(*bytes) }
}

#[inline(always)]
pub fn load_half(bytes: &[u8; 16]) -> __m128i {
    // SAFETY: every array of 16 bytes is a vector
    unsafe { std::mem::transmute(*bytes) }
}

#[inline(always)]
pub fn load_shorts(shorts: &[u16; 16]) -> __m256i {
    // SAFETY: every array of 16 shorts is a vector
    unsafe { std::mem::transmute(*shorts) }
}

#[inline(always)]
pub fn load_words(words: &[u32; 8]) -> __m256i {
    // SAFETY: every array of 8 words is a vector
    unsafe { std::mem::transmute(*words) }
}

#[inline(always)]
pub fn words(vector: __m256i) -> [u32; 8] {
    // SAFETY: every vector is 8 words
    unsafe { std::mem::transmute(vector) }
}

#[inline(always)]
pub fn doubles(vector: __m256i) -> [u64; 4] {
    // SAFETY: every vector is 4 double words
    unsafe { std::mem::transmute(vector) }
}

#[inline(always)]
pub fn octets(vector: __m256i) -> [u8; 32] {
    // SAFETY: every vector is 32 bytes
    unsafe { std::mem::transmute(vector) }
}

/// `Wide::raised`.
#[inline]
#[target_feature(enable = "avx2")]
pub fn raised(bytes: &[u8; 8], from: u32) -> [u32; 8] {
    words(_mm256_add_epi32(eight_bytes(bytes), _mm256_set1_epi32(from as i32)))
}

/// Eight bytes as words.
#[inline]
#[target_feature(enable = "avx2")]
pub fn eight_bytes(bytes: &[u8; 8]) -> __m256i {
    _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(i64::from_le_bytes(*bytes)))
}

/// What a rank of each class, or a step's of a class from 16 on, begins at.
#[inline]
#[target_feature(enable = "avx2")]
pub fn base_of(tables: &Tables, class: __m256i) -> __m256i {
    let base = |part: usize| _mm256_permutevar8x32_epi32(load_words(&tables.bases[part]), class);
    let (upper, step) = (_mm256_slli_epi32::<28>(class), _mm256_slli_epi32::<27>(class));
    pick(pick(base(0), base(1), upper), pick(base(2), base(3), upper), step)
}

/// Words of b where the highest bit of a mask is set, of a elsewhere.
#[inline]
#[target_feature(enable = "avx2")]
pub fn pick(a: __m256i, b: __m256i, mask: __m256i) -> __m256i {
    let picked = _mm256_blendv_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), _mm256_castsi256_ps(mask));
    _mm256_castps_si256(picked)
}
