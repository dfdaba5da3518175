//! The loops over rows compiled a second time for processors with AVX2 and BMI2. One of the modules with `unsafe`.
#![allow(unsafe_code)]

#[cfg(target_arch = "x86_64")]
mod ids;
#[cfg(target_arch = "x86_64")]
mod put;
#[cfg(target_arch = "x86_64")]
mod sort;
#[cfg(target_arch = "x86_64")]
mod vectors;

use std::ops::Range;

use super::bitstream::Room;
use super::decode::{self, Decoder, Narrow, Sink, Walk};
use super::encode::{self, Streams};
use super::prefix::PrefixCode;
use super::tables::Tables;
use super::{coded, Coded, Dense, Layout};
use crate::error::Result;
use crate::rows::{Checker, Rows};

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
pub fn rows(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> std::result::Result<(), String> {
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { rows_avx2(decoder, rows, sink) };
    }
    decoder.rows::<Narrow>(rows, sink)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn rows_avx2(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> std::result::Result<(), String> {
    decoder.rows::<Avx2>(rows, sink)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn rows(decoder: &mut Decoder<'_>, rows: usize, sink: &mut impl Sink) -> std::result::Result<(), String> {
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
    fn raised(bytes: &[u8; 8], from: u32) -> [u32; 8] {
        // SAFETY: only functions compiled for AVX2 name this type, and they are called where the processor has it
        unsafe { vectors::raised(bytes, from) }
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
    fn ids(tables: &Tables, codes: &[u32], streams: &mut Streams, next: &[u32]) {
        // SAFETY: as above
        unsafe { put::put_ids(tables, codes, streams, next) }
    }
}

/// `coded::sort_ties` of entries without draws.
#[cfg(target_arch = "x86_64")]
pub fn sort_ties(codes: &[u32], ids: &mut [u32]) {
    if wide() && codes.len() <= MOST_SORTED {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe {
            if !sort::sort_ties(codes, ids) {
                put::exchange_ties(codes, ids);
            }
        };
    }
    coded::sort_ties(codes, ids, |_, _| ());
}

#[cfg(not(target_arch = "x86_64"))]
pub fn sort_ties(codes: &[u32], ids: &mut [u32]) {
    coded::sort_ties(codes, ids, |_, _| ());
}

/// `Coded::build` with the widest instructions that this processor has.
#[cfg(target_arch = "x86_64")]
pub fn coded(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> std::result::Result<Coded, (usize, String)> {
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { coded_avx2(layout, rows, counts) };
    }
    Coded::build(layout, rows, counts)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn coded_avx2(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> std::result::Result<Coded, (usize, String)> {
    Coded::build(layout, rows, counts)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn coded(layout: &Layout, rows: &Rows<'_>, counts: &[u16]) -> std::result::Result<Coded, (usize, String)> {
    Coded::build(layout, rows, counts)
}

/// `Checker::check_rows` with the widest instructions that this processor has.
#[cfg(target_arch = "x86_64")]
pub fn check_rows(checker: &mut Checker, key: &str, rows: &Rows<'_>, counts: &mut Vec<u16>) -> Result<()> {
    if wide() {
        // SAFETY: the processor has what the function is compiled for; it is safe code otherwise.
        return unsafe { check_rows_avx2(checker, key, rows, counts) };
    }
    checker.check_rows(key, rows, counts)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,bmi1,bmi2")]
fn check_rows_avx2(checker: &mut Checker, key: &str, rows: &Rows<'_>, counts: &mut Vec<u16>) -> Result<()> {
    checker.check_rows(key, rows, counts)
}

#[cfg(not(target_arch = "x86_64"))]
pub fn check_rows(checker: &mut Checker, key: &str, rows: &Rows<'_>, counts: &mut Vec<u16>) -> Result<()> {
    checker.check_rows(key, rows, counts)
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use super::super::classes::ClassCode;
    use super::super::decode::{Ahead, Begin, GROUP};
    use super::super::dictionary::Dictionary;
    use super::super::prefix::PrefixCode;
    use super::super::tables::{bounds, RANK, STEP};
    use super::super::{Layout, Tables, Values};
    use super::*;

    const V: u32 = 1 << 18;

    fn tables(ranks: [u8; 16], steps: [u8; 16]) -> Tables {
        let values = Values::Shifted { per_nat: 16 };
        let layout = Layout { codec: 2, values, vocab_size: V, k: 64, extra: 0, sampled: false };
        let mut classes = bounds(&layout).map(ClassCode::even);
        classes[RANK] = ClassCode::new(ranks, u64::from(V), 28).expect("widths");
        classes[STEP] = ClassCode::new(steps, u64::from(V), 28).expect("widths");
        let dictionary = Dictionary::ranked(&[9, 100_000, 5, 70], 4, V);
        Tables::new(layout, classes, PrefixCode::default(), PrefixCode::default(), dictionary, 0)
    }

    #[test]
    fn both_walks_find_the_same_ids_or_none() {
        if !wide() {
            return;
        }
        let narrow = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 18];
        let all = [
            tables(narrow, [0, 0, 0, 0, 0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 18]),
            tables([25; 16], [25; 16]),
            tables([18; 16], narrow),
        ];
        let mut seed = 1u32;
        let mut next = move || {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            seed >> 8
        };
        let mut whole = 0;
        for round in 0..6000 {
            let tables = &all[round % 3];
            let n = next() as usize % 131;
            let bytes =
                |len: usize, next: &mut dyn FnMut() -> u32| -> Vec<u8> { (0..len).map(|_| next() as u8).collect() };
            let raw_len = if round % 7 == 0 { next() as usize % 60 } else { 60 + 4 * n };
            let nibble = next() as usize % 3;
            let (mut nibbles, raw) = (bytes(n / 2 + 3, &mut next), bytes(raw_len, &mut next));
            if round % 2 == 0 {
                nibbles.iter_mut().for_each(|b| *b &= 0x77); // widest classes are often outside
            }
            let mut code = 0;
            let codes = (0..1 + n.next_multiple_of(GROUP)).map(|_| {
                code += u32::from(next() % 3 == 0);
                code
            });
            let codes: Vec<u32> = codes.collect();
            let begin = Begin { nibbles: &nibbles, nibble, raw: &raw, bit: next() as usize % 20 };
            let (mut here, mut there) = (vec![-1; n], vec![-1; n]);
            let mut ahead = Ahead::new(&[0; 8], 0);
            let found = ids::walk(tables, &begin, &codes, &mut here, &mut ahead);
            assert_eq!(found, decode::walk::<2>(tables, &begin, &codes, &mut there, &mut ahead), "round {round}");
            if found.is_some() {
                assert_eq!(here, there, "round {round}");
                whole += usize::from(n > 0);
            }
        }
        assert!(whole > 1000, "only {whole} rows were whole");
    }
}
