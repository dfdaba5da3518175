//! A payload to rows. Nothing is trusted: a number that cannot be is an error, whatever the checksum says.

mod codes;
mod ids;
mod parts;
mod sinks;

use self::codes::{sums, OVERRUN};
use self::ids::spread;
pub use self::ids::{walk, Walk, GROUP};
use self::parts::{split, Parts};
use self::sinks::Row;
pub use self::sinks::{into_coded, into_rows, into_tokens, Sink};
use super::bitstream::BitReader;
use super::classes::ClassCode;
use super::coded::rest_code;
use super::tables::{Tables, COUNT, EXTRA, FIRST, REST, TOKEN};
use super::values::{Values, NOTHING, SHIFTS};
use super::{widest, Dense, Layout};
use crate::codec::Shape;
use crate::rows::TOLERANCE;

/// Classes that are written behind the last one wanted.
const SPREAD: usize = 32;

/// The steps that compilers do not find vectors for.
pub trait Wide {
    /// Bytes as u16, `from` added to each without regard to overflow.
    fn raised(bytes: &[u8; 8], from: u16) -> [u16; OVERRUN];
    /// The nibbles of each byte, the lower one first.
    fn spread(bytes: &[u8; 16]) -> [u8; 32];
}

/// Without vectors.
pub struct Narrow;

impl Wide for Narrow {
    #[inline(always)]
    fn raised(bytes: &[u8; 8], from: u16) -> [u16; OVERRUN] {
        bytes.map(|byte| from.wrapping_add(u16::from(byte)))
    }

    #[inline(always)]
    fn spread(bytes: &[u8; 16]) -> [u8; 32] {
        std::array::from_fn(|i| bytes[i / 2] >> (4 * (i % 2)) & 15)
    }
}

pub struct Decoder<'a> {
    layout: Layout,
    tables: &'a Tables,
    parts: Parts<'a>,
    nibble: usize,
    differences: BitReader<'a>,
    raw: BitReader<'a>,
    entries: usize,
    walk: Walk,
    codes: Vec<u32>,
    short: Vec<u16>,
    classes: Vec<u8>,
    ids: Vec<u32>,
    before: Vec<u32>,
    /// Entries of the row before.
    had: usize,
    draws: Vec<u32>,
    rests: Vec<u32>,
}

const SHORT: &str = "a stream ends inside a row";

impl<'a> Decoder<'a> {
    fn new(dense: &'a Dense, payload: &'a [u8], shape: Shape) -> Result<Self, String> {
        let parts = split(&dense.layout, payload, shape)?;
        let k = dense.layout.k as usize;
        Ok(Decoder {
            layout: dense.layout,
            tables: &dense.tables,
            nibble: 0,
            differences: BitReader::new(parts.differences.0),
            raw: BitReader::new(parts.raw.0),
            entries: 0,
            walk: widest::walk(&dense.tables),
            codes: vec![0; k + 1],
            short: vec![0; k + OVERRUN],
            classes: vec![0; k.next_multiple_of(GROUP) + SPREAD],
            ids: vec![0; k],
            before: vec![0; k],
            had: 0,
            draws: Vec::new(),
            rests: vec![rest_code(dense.layout.values, 0.0); 1 + dense.layout.extra],
            parts,
        })
    }

    #[inline(always)]
    fn class(&mut self) -> Result<usize, String> {
        let byte = self.parts.nibbles.get(self.nibble / 2).ok_or(SHORT)?;
        let class = byte >> (4 * (self.nibble % 2)) & 15;
        self.nibble += 1;
        Ok(usize::from(class))
    }

    #[inline(always)]
    fn value(&mut self, code: &ClassCode) -> Result<u32, String> {
        let class = self.class()?;
        let raw = self.raw.take(u32::from(code.widths[class])).ok_or(SHORT)?;
        Ok(code.bases[class].wrapping_add(raw))
    }

    #[inline(always)]
    fn token(&mut self) -> Result<u32, String> {
        let value = self.value(&self.tables.classes[TOKEN])?;
        let k = self.layout.k;
        if value < k {
            let place = self.before[..self.had].get(value as usize);
            return place.copied().ok_or_else(|| format!("a token at place {value} of a row of {}", self.had));
        }
        let token = *self.tables.dictionary.id_of.get((value - k) as usize).unwrap_or(&(value - k));
        match token <= i32::MAX as u32 {
            true => Ok(token),
            false => Err(format!("token {token}")),
        }
    }

    // codes 1.. of a row of n, of which the first is there
    #[inline(always)]
    fn differences<W: Wide>(&mut self, n: usize) -> Result<(), String> {
        let (first, limit) = (self.codes[0], self.layout.values.largest());
        let mut last = first;
        if n > 0 && first <= limit {
            last = sums::<W>(&self.tables.codes, &mut self.differences, first, n, &mut self.short).ok_or(SHORT)?;
            for (code, short) in self.codes[..n].iter_mut().zip(&self.short) {
                *code = u32::from(*short);
            }
        }
        // sums only grow, and by less than 2^32 in a row, so the last one speaks for all
        match last <= limit {
            true => Ok(()),
            false => Err(format!("code {last} of a log-probability, at most {limit} is accepted")),
        }
    }

    #[inline(always)]
    fn raw_codes(&mut self, n: usize) -> Result<(), String> {
        let (size, limit) = (self.layout.code_bytes(), self.layout.values.largest());
        let bytes = self.parts.codes.get(self.entries * size..(self.entries + n) * size).ok_or(SHORT)?;
        let mut last = 0;
        for (slot, bytes) in self.codes.iter_mut().zip(bytes.chunks_exact(size)) {
            let mut word = [0u8; 4];
            word[..size].copy_from_slice(bytes);
            *slot = u32::from_le_bytes(word);
            if *slot < last || *slot > limit {
                return Err(format!("code {:#x} of a log-probability after {last:#x}, at most {limit:#x}", *slot));
            }
            last = *slot;
        }
        Ok(())
    }

    #[inline(always)]
    fn ids<W: Wide>(&mut self, n: usize) -> Result<(), String> {
        let bytes = self.parts.nibbles.get(self.nibble / 2..(self.nibble + n).div_ceil(2)).ok_or(SHORT)?;
        spread::<W>(bytes, self.nibble % 2 == 1, &mut self.classes[..n + SPREAD]);
        self.nibble += n;
        let later = &mut self.classes[1.min(n)..n];
        if self.layout.values.by_difference() {
            for (class, pair) in later.iter_mut().zip(self.short.windows(2)) {
                *class |= u8::from(pair[0] == pair[1]) << 4;
            }
        } else {
            for (class, pair) in later.iter_mut().zip(self.codes.windows(2)) {
                *class |= u8::from(pair[0] == pair[1]) << 4;
            }
        }
        let walked = (self.walk)(&self.classes, &mut self.ids[..n], self.parts.raw.0, self.raw.at, self.tables);
        let v = self.tables.dictionary.id_of.len();
        self.raw.at = walked.ok_or_else(|| format!("a rank outside a vocabulary of {v}, or {SHORT}"))?;
        Ok(())
    }

    #[inline(always)]
    fn row<W: Wide>(&mut self, i: usize, sink: &mut impl Sink) -> Result<(), String> {
        let (layout, tables) = (self.layout, self.tables);
        let token = self.token()?;
        let mut n = layout.k as usize;
        if self.parts.ragged {
            let missing = self.value(&tables.classes[COUNT])? as usize;
            n = n.checked_sub(missing).ok_or_else(|| format!("a row that misses {missing} entries of {n}"))?;
        }
        let mut shift = 0;
        if layout.values.by_difference() && layout.k > 0 {
            self.codes[0] = self.value(&tables.classes[FIRST])?;
        }
        if let Values::Shifted { .. } = layout.values {
            shift = self.codes[0] % SHIFTS;
            self.codes[0] /= SHIFTS;
            if self.codes[0] >= NOTHING && shift > 0 {
                return Err(format!("a shift of {shift} with code {} of a log-probability", self.codes[0]));
            }
        }
        if layout.values.rest_grid().is_some() {
            if layout.k > 0 {
                self.rests[0] = self.rest(&tables.classes[REST])?;
            }
            for e in 0..layout.extra {
                self.rests[1 + e] = self.rest(&tables.classes[EXTRA])?;
            }
        }
        let lse = self.words(i)?;
        if layout.values.by_difference() {
            self.differences::<W>(n)?;
        } else {
            self.raw_codes(n)?;
        }
        self.ids::<W>(n)?;
        if layout.sampled {
            self.draws.clear();
            for _ in 0..n {
                self.draws.push(tables.draws.take(&mut self.raw).ok_or(SHORT)?);
            }
        }
        self.entries += n;
        let (ids, codes) = (&self.ids[..n], &self.codes[..n]);
        if let (Values::Bf16Logits, Some(code)) = (layout.values, codes.first()) {
            let first = layout.values.value(*code, f32::from_bits(lse)); // the largest; NaN codes are the lowest
            if first.is_nan() || first > TOLERANCE {
                return Err(format!("row {i} has a log_prob of {first}"));
            }
        }
        sink.row(i, &Row { token, ids, codes, draws: &self.draws, rests: &self.rests, lse, shift });
        std::mem::swap(&mut self.ids, &mut self.before);
        self.had = n;
        Ok(())
    }

    #[inline(always)]
    pub fn rows<W: Wide>(&mut self, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
        for i in 0..rows {
            self.row::<W>(i, sink)?;
        }
        Ok(())
    }

    #[inline(always)]
    fn rest(&mut self, code: &ClassCode) -> Result<u32, String> {
        match self.value(code)? {
            value if value < 1 << 16 => Ok(value),
            value => Err(format!("code {value} of log_rest")),
        }
    }

    // log_rest and the like where they are fp32; gives lse
    #[inline(always)]
    fn words(&mut self, i: usize) -> Result<u32, String> {
        let words = self.layout.words();
        if words == 0 {
            return Ok(0);
        }
        let mut row = self.parts.words[i * words * 4..(i + 1) * words * 4]
            .chunks_exact(4)
            .map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]]));
        let lse = if self.layout.values == Values::Bf16Logits { row.next().unwrap_or(0) } else { 0 };
        let not_stored = self.rests.len() - self.layout.stored_rests();
        for (slot, word) in self.rests[not_stored..].iter_mut().zip(row) {
            let value = f32::from_bits(word);
            if value.is_nan() || value > 0.0 {
                return Err(format!("row {i} has log_rest {value}"));
            }
            *slot = word;
        }
        if !f32::from_bits(lse).is_finite() {
            return Err(format!("row {i} has lse {}", f32::from_bits(lse)));
        }
        Ok(lse)
    }

    // after the last row everything must be used up
    fn end(&self, shape: Shape) -> Result<(), String> {
        if self.entries != shape.entries {
            return Err(format!("rows of {} entries, the block has {}", self.entries, shape.entries));
        }
        self.differences.end(self.parts.differences.1)?;
        let mut nibbles = BitReader::new(self.parts.nibbles);
        nibbles.at = self.nibble * 4;
        nibbles.end(self.parts.nibbles.len())?;
        self.raw.end(self.parts.raw.1)
    }
}

pub fn all(dense: &Dense, payload: &[u8], shape: Shape, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
    if rows > shape.rows {
        return Err(format!("{rows} rows wanted of a block of {}", shape.rows));
    }
    let mut decoder = Decoder::new(dense, payload, shape)?;
    widest::rows(&mut decoder, rows, sink)?;
    if rows == shape.rows {
        decoder.end(shape)?;
    }
    Ok(())
}
