//! The decoding loop compiled a second time for processors with AVX2 and BMI2. The only module with `unsafe`.
#![allow(unsafe_code)]

use super::decode::{self, Decoder, Sink};
use super::tables::RankClass;

/// `decode::walk` of three.
pub type Walk = fn(&[u8], &mut [u32], &[u8], usize, &[RankClass; 256], &[u32]) -> Option<usize>;

pub fn walk() -> Walk {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        return walk_wide;
    }
    decode::walk::<3>
}

#[cfg(target_arch = "x86_64")]
fn wide() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2")
}

#[cfg(target_arch = "x86_64")]
fn walk_wide(
    classes: &[u8],
    ids: &mut [u32],
    bytes: &[u8],
    at: usize,
    ranks: &[RankClass; 256],
    id_of: &[u32],
) -> Option<usize> {
    // SAFETY: `walk` gives this function only where `wide` holds; it is safe code otherwise.
    unsafe { walk_avx2(classes, ids, bytes, at, ranks, id_of) }
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn walk_avx2(
    classes: &[u8],
    ids: &mut [u32],
    bytes: &[u8],
    at: usize,
    ranks: &[RankClass; 256],
    id_of: &[u32],
) -> Option<usize> {
    decode::walk::<3>(classes, ids, bytes, at, ranks, id_of)
}

/// Decodes the next `rows` rows with the widest instructions that this processor has.
#[cfg(target_arch = "x86_64")]
pub fn rows(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { rows_avx2(decoder, rows, sink) };
    }
    decoder.rows(rows, sink)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn rows_avx2(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
    decoder.rows(rows, sink)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn rows(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
    decoder.rows(rows, sink)
}
