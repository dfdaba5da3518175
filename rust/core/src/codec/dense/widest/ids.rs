//! Ids of a row with AVX2: where each raw part begins is a running sum of widths, so that no id waits for the one before it.

use std::arch::x86_64::*;

use super::super::bitstream::SLACK;
use super::super::tables::Tables;
use super::vectors::{base_of, eight_bytes, load, load_half, load_words, octets, words};

/// Entries that are decoded together.
const GROUP: usize = super::super::decode::GROUP;
/// A raw part of so many bits lies within the 4 bytes at its first one.
pub const MAX_WIDTH: u32 = 25;
/// Bytes that a group reads: raw parts from an offset of a byte, 4 bytes at each.
const REACH: usize = 256 + 4;

pub fn walk(classes: &[u8], ids: &mut [u32], bytes: &[u8], at: usize, tables: &Tables) -> Option<usize> {
    // SAFETY: `super::walk` gives this function only where the processor has what it is compiled for; it is safe otherwise.
    unsafe { walk_avx2(classes, ids, bytes, at, tables) }
}

#[target_feature(enable = "avx2,bmi1,bmi2")]
fn walk_avx2(classes: &[u8], ids: &mut [u32], bytes: &[u8], mut at: usize, tables: &Tables) -> Option<usize> {
    let id_of = tables.dictionary.id_of.as_slice();
    let mut rank = 0u32;
    for (classes, ids) in classes.as_chunks::<GROUP>().0.iter().zip(ids.chunks_mut(GROUP)) {
        let parts = parts(classes, (at % 8) as u16, tables);
        let near = bytes.get(at / 8..)?;
        let (mut values, mut keep) = ([[0u32; 8]; GROUP / 8], [[0u32; 8]; GROUP / 8]);
        let mut copy = [0u8; REACH];
        let reach: &[u8; REACH] = match near.first_chunk() {
            Some(reach) => reach,
            None => {
                copy[..near.len()].copy_from_slice(near);
                &copy
            }
        };
        for (i, (values, keep)) in values.iter_mut().zip(&mut keep).enumerate() {
            (*values, *keep) = eight(classes, &parts, reach, i, tables);
        }
        let (values, keep) = (values.as_flattened(), keep.as_flattened());
        for (slot, (value, keep)) in ids.iter_mut().zip(values.iter().zip(keep)) {
            rank = value.wrapping_add(rank & keep);
            *slot = *id_of.get(rank as usize)?;
        }
        let last = ids.len() - 1;
        at = at / 8 * 8 + 8 * usize::from(parts.byte[last]) + usize::from(parts.bit[last] + parts.width[last]);
        if at.div_ceil(8) + SLACK > bytes.len() {
            return None;
        }
    }
    Some(at)
}

/// Where each raw part of a group begins, from the byte of the first one, and how many bits it has.
struct Parts {
    byte: [u8; GROUP],
    bit: [u8; GROUP],
    width: [u8; GROUP],
}

#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn parts(classes: &[u8; GROUP], first: u16, tables: &Tables) -> Parts {
    let (ranks, steps) = (load_half(&tables.widths[0]), load_half(&tables.widths[1]));
    let (ranks, steps) = (_mm256_broadcastsi128_si256(ranks), _mm256_broadcastsi128_si256(steps));
    let last = _mm256_set1_epi16(0x0f0e); // the bytes of a lane's last half, everywhere
    let mut parts = Parts { byte: [0; GROUP], bit: [0; GROUP], width: [0; GROUP] };
    let mut before = _mm256_set1_epi16(first as i16);
    for (i, classes) in classes.as_chunks::<32>().0.iter().enumerate() {
        let class = load(classes);
        let is_step = _mm256_slli_epi16::<3>(class);
        let width = _mm256_blendv_epi8(_mm256_shuffle_epi8(ranks, class), _mm256_shuffle_epi8(steps, class), is_step);
        let halves = [_mm256_castsi256_si128(width), _mm256_extracti128_si256::<1>(width)];
        let begin = halves.map(|half| {
            let width = _mm256_cvtepu8_epi16(half);
            let mut sum = _mm256_add_epi16(width, _mm256_slli_si256::<2>(width));
            sum = _mm256_add_epi16(sum, _mm256_slli_si256::<4>(sum));
            sum = _mm256_add_epi16(sum, _mm256_slli_si256::<8>(sum));
            let low = _mm256_permute2x128_si256::<0x08>(sum, sum);
            sum = _mm256_add_epi16(sum, _mm256_shuffle_epi8(low, last));
            sum = _mm256_add_epi16(sum, before);
            before = _mm256_shuffle_epi8(_mm256_permute4x64_epi64::<0xff>(sum), last);
            _mm256_sub_epi16(sum, width)
        });
        // to bytes, which the pack leaves with the middle quarters exchanged
        let pack = |a, b| _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packus_epi16(a, b));
        let seven = _mm256_set1_epi16(7);
        let byte = pack(_mm256_srli_epi16::<3>(begin[0]), _mm256_srli_epi16::<3>(begin[1]));
        let bit = pack(_mm256_and_si256(begin[0], seven), _mm256_and_si256(begin[1], seven));
        parts.byte.as_chunks_mut::<32>().0[i] = octets(byte);
        parts.bit.as_chunks_mut::<32>().0[i] = octets(bit);
        parts.width.as_chunks_mut::<32>().0[i] = octets(width);
    }
    parts
}

/// Eight ranks, or steps from the rank before, and which of them are steps (all ones).
#[inline]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn eight(classes: &[u8; GROUP], parts: &Parts, reach: &[u8; REACH], i: usize, tables: &Tables) -> ([u32; 8], [u32; 8]) {
    let window = parts.byte.as_chunks::<8>().0[i].map(|at| {
        let at = usize::from(at);
        u32::from_le_bytes([reach[at], reach[at + 1], reach[at + 2], reach[at + 3]])
    });
    let class = eight_bytes(&classes.as_chunks::<8>().0[i]);
    let width = eight_bytes(&parts.width.as_chunks::<8>().0[i]);
    let shift = eight_bytes(&parts.bit.as_chunks::<8>().0[i]);
    let window = _mm256_srlv_epi32(load_words(&window), shift);
    let one = _mm256_set1_epi32(1);
    let raw = _mm256_and_si256(window, _mm256_sub_epi32(_mm256_sllv_epi32(one, width), one));
    let step = _mm256_srai_epi32::<31>(_mm256_slli_epi32::<27>(class));
    (words(_mm256_add_epi32(base_of(tables, class), raw)), words(step))
}
