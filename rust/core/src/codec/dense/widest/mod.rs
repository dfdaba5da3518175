//! The loops over rows compiled a second time for processors with AVX2 and BMI2. The only module with `unsafe`.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod ids;
#[cfg(target_arch = "x86_64")]
mod put;
#[cfg(target_arch = "x86_64")]
mod vectors;

use std::ops::Range;

use super::bitstream::Room;
use super::decode::{self, Decoder, Narrow, Sink, Walk};
use super::encode::{self, Streams};
use super::prefix::PrefixCode;
use super::tables::Tables;
use super::{coded, Coded, Dense, Layout};
use crate::rows::Rows;

/// Entries of a row in which neighbours are exchanged; in longer ones a run of ties may be too long for that.
#[cfg(target_arch = "x86_64")]
const MOST_SORTED: usize = 1024;

/// The fastest walk for these tables on this processor.
pub fn walk(tables: &Tables) -> Walk {
    #[cfg(target_arch = "x86_64")]
    if wide() && tables.widest <= ids::MAX_WIDTH {
        return ids::walk;
    }
    // a window holds at least 57 bits
    match tables.widest {
        0..=19 => decode::walk::<3>,
        _ => decode::walk::<2>,
    }
}

#[cfg(target_arch = "x86_64")]
fn wide() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("bmi1") && is_x86_feature_detected!("bmi2")
}

/// Decodes the next `rows` rows with the widest instructions that this processor has.
#[cfg(target_arch = "x86_64")]
pub fn rows(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { rows_avx2(decoder, rows, sink) };
    }
    decoder.rows::<Narrow>(rows, sink)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn rows_avx2(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
    decoder.rows::<Avx2>(rows, sink)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn rows(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
    decoder.rows::<Narrow>(rows, sink)
}

/// Fills the streams of rows with the widest instructions that this processor has.
#[cfg(target_arch = "x86_64")]
pub fn encode(dense: &Dense, coded: &Coded, range: Range<usize>, entry: usize, streams: &mut Streams) -> usize {
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { encode_avx2(dense, coded, range, entry, streams) };
    }
    encode::rows::<encode::Plain>(dense, coded, range, entry, streams)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn encode_avx2(dense: &Dense, coded: &Coded, range: Range<usize>, entry: usize, streams: &mut Streams) -> usize {
    encode::rows::<Avx2>(dense, coded, range, entry, streams)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn encode(dense: &Dense, coded: &Coded, range: Range<usize>, entry: usize, streams: &mut Streams) -> usize {
    encode::rows::<encode::Plain>(dense, coded, range, entry, streams)
}

#[cfg(target_arch = "x86_64")]
struct Avx2;

#[cfg(target_arch = "x86_64")]
impl decode::Wide for Avx2 {
    #[inline(always)]
    fn raised(bytes: &[u8; 8], from: u16) -> [u16; 8] {
        // SAFETY: only functions compiled for AVX2 name this type, and they are called where the processor has it
        unsafe { vectors::raised(bytes, from) }
    }

    #[inline(always)]
    fn spread(bytes: &[u8; 16]) -> [u8; 32] {
        // SAFETY: as above
        unsafe { vectors::spread(bytes) }
    }
}

#[cfg(target_arch = "x86_64")]
impl encode::Put for Avx2 {
    #[inline(always)]
    fn differences(prefix: &PrefixCode, codes: &[u32], out: &mut Room<'_>) {
        // SAFETY: as above
        unsafe { put::differences(prefix, codes, out) }
    }

    #[inline(always)]
    fn ids(tables: &Tables, codes: &[u32], streams: &mut Streams) {
        // SAFETY: as above
        unsafe { put::put_ids(tables, codes, streams) }
    }
}

/// `coded::sort_ties` of entries without draws.
#[cfg(target_arch = "x86_64")]
pub fn sort_ties(codes: &[u32], ids: &mut [u32]) {
    if wide() && codes.len() <= MOST_SORTED {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { put::sort_ties(codes, ids) };
    }
    coded::sort_ties(codes, ids, |_, _| ());
}

#[cfg(not(target_arch = "x86_64"))]
pub fn sort_ties(codes: &[u32], ids: &mut [u32]) {
    coded::sort_ties(codes, ids, |_, _| ());
}

/// `Coded::build` with the widest instructions that this processor has.
#[cfg(target_arch = "x86_64")]
pub fn coded(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> Result<Coded, (usize, String)> {
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { coded_avx2(layout, rows, counts) };
    }
    Coded::build(layout, rows, counts)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn coded_avx2(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> Result<Coded, (usize, String)> {
    Coded::build(layout, rows, counts)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn coded(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> Result<Coded, (usize, String)> {
    Coded::build(layout, rows, counts)
}

/// Does work that compilers make vectors of with the widest that this processor has.
pub fn with_wide<R>(work: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { with_avx2(work) };
    }
    work()
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn with_avx2<R>(work: impl FnOnce() -> R) -> R {
    work()
}
