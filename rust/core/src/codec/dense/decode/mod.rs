//! A payload to rows. Nothing is trusted: a number that cannot be is an error, whatever the checksum says.

mod codes;
mod ids;
mod parts;
mod sinks;

pub use self::codes::Ahead;
use self::codes::WRITTEN;
pub use self::ids::{walk, Begin, Walk, GROUP};
use self::parts::{split, Parts};
pub use self::sinks::{into_coded, into_rows, into_tokens, Sink};
use self::sinks::{Codes, Row};
use super::bitstream::BitReader;
use super::classes::ClassCode;
use super::coded::rest_code;
use super::tables::{Tables, COUNT, EXTRA, FIRST, REST, TOKEN};
use super::values::{Values, NOTHING, SHIFTS};
use super::{widest, Dense, Layout};
use crate::codec::Shape;
use crate::rows::TOLERANCE;

/// Differences that are read at once where rows are whole.
const AT_ONCE: usize = 1024;

/// The steps that compilers do not find vectors for.
pub trait Wide {
    /// Bytes as words, `from` added to each without regard to overflow.
    fn raised(bytes: &[u8; 8], from: u32) -> [u32; WRITTEN];
}

/// Without vectors.
pub struct Narrow;

impl Wide for Narrow {
    #[inline(always)]
    fn raised(bytes: &[u8; 8], from: u32) -> [u32; WRITTEN] {
        bytes.map(|byte| from.wrapping_add(u32::from(byte)))
    }
}

pub struct Decoder<'a> {
    layout: Layout,
    tables: &'a Tables,
    parts: Parts<'a>,
    nibble: usize,
    raw: BitReader<'a>,
    entries: usize,
    walk: Walk,
    /// Running sums of the differences of this row and the next ones, behind one that is none of them and filled up to a
    /// whole group; or the row's codes.
    sums: Vec<u32>,
    /// Where those of the row and of the next one begin, and for how many rows there are some.
    here: usize,
    next: (usize, usize),
    /// Those of the rows behind them, and how many rows these are.
    ahead: Ahead<'a>,
    begun: usize,
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
            raw: BitReader::new(parts.raw.0),
            entries: 0,
            walk: widest::walk(&dense.tables),
            sums: Ahead::memory(AT_ONCE.max(k)),
            here: 0,
            next: (0, 0),
            ahead: Ahead::new(parts.differences.0, AT_ONCE.max(k)),
            begun: 0,
            had: 0,
            draws: Vec::new(),
            rests: vec![rest_code(dense.layout.values, 0.0); 1 + dense.layout.extra],
            parts,
        })
    }

    #[inline(always)]
    fn class(&mut self) -> Result<usize, String> {
        // `ids` tells whether it was still one of the stream
        let byte = self.parts.nibbles.0.get(self.nibble / 2).ok_or(SHORT)?;
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
    fn token(&mut self, i: usize, sink: &impl Sink) -> Result<u32, String> {
        let value = self.value(&self.tables.classes[TOKEN])?;
        let k = self.layout.k;
        if value < k {
            if value as usize >= self.had {
                return Err(format!("a token at place {value} of a row of {}", self.had));
            }
            return Ok(sink.id_before(i, value as usize) as u32);
        }
        let token = *self.tables.dictionary.id_of.get((value - k) as usize).unwrap_or(&(value - k));
        match token <= i32::MAX as u32 {
            true => Ok(token),
            false => Err(format!("token {token}")),
        }
    }

    // what the sums of a row of n are less than its codes, the first of which is given; `rows` more follow
    #[inline(always)]
    fn differences<W: Wide>(&mut self, first: u32, n: usize, rows: usize) -> Result<u32, String> {
        let (limit, mut from, mut last) = (self.layout.values.largest(), 0, first);
        if n > 0 && first <= limit {
            if self.next.1 == 0 {
                // rows of different lengths are read one by one
                let most =
                    if self.parts.ragged { 1 } else { (AT_ONCE - 1).checked_div(n - 1).unwrap_or(rows + 1).max(1) };
                if self.begun == 0 {
                    self.begun = most.min(rows + 1);
                    self.ahead.begin(self.begun * (n - 1));
                }
                self.next = (0, self.begun);
                self.ahead.finish::<W>(&self.tables.codes, &mut self.sums).ok_or(SHORT)?;
                self.begun = if self.parts.ragged { 0 } else { most.min(rows + 1 - self.next.1) };
                self.ahead.begin(self.begun * (n - 1));
            }
            let (start, left) = self.next;
            (self.here, self.next) = (start, (start + n - 1, left - 1));
            let sums = &self.sums[1 + start..][..n];
            from = first.wrapping_sub(sums[0]);
            last = from.wrapping_add(sums[n - 1]);
        }
        // sums only grow, and by less than 2^32 in a row, so the last one speaks for all
        match last <= limit {
            true => Ok(from),
            false => Err(format!("code {last} of a log-probability, at most {limit} is accepted")),
        }
    }

    #[inline(always)]
    fn raw_codes(&mut self, n: usize) -> Result<(), String> {
        let (size, limit) = (self.layout.code_bytes(), self.layout.values.largest());
        let bytes = self.parts.codes.get(self.entries * size..(self.entries + n) * size).ok_or(SHORT)?;
        let mut last = 0;
        for (slot, bytes) in self.sums[1..].iter_mut().zip(bytes.chunks_exact(size)) {
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
    fn ids(&mut self, ids: &mut [i32]) -> Result<(), String> {
        let (nibbles, len) = self.parts.nibbles;
        let begin = Begin { nibbles, nibble: self.nibble, raw: self.parts.raw.0, bit: self.raw.at };
        self.nibble += ids.len();
        if self.nibble.div_ceil(2) > len {
            return Err(SHORT.to_string());
        }
        let walked = (self.walk)(self.tables, &begin, &self.sums[self.here..], ids, &mut self.ahead);
        let v = self.tables.dictionary.id_of.len();
        self.raw.at = walked.ok_or_else(|| format!("a rank outside a vocabulary of {v}, or {SHORT}"))?;
        Ok(())
    }

    #[inline(always)]
    fn row<W: Wide>(&mut self, i: usize, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
        let (layout, tables) = (self.layout, self.tables);
        let token = self.token(i, sink)?;
        let mut n = layout.k as usize;
        if self.parts.ragged {
            let missing = self.value(&tables.classes[COUNT])? as usize;
            n = n.checked_sub(missing).ok_or_else(|| format!("a row that misses {missing} entries of {n}"))?;
        }
        let (mut first, mut shift) = (0, 0);
        if layout.values.by_difference() && layout.k > 0 {
            first = self.value(&tables.classes[FIRST])?;
        }
        if let Values::Shifted { .. } = layout.values {
            (first, shift) = (first / SHIFTS, first % SHIFTS);
            if first >= NOTHING && shift > 0 {
                return Err(format!("a shift of {shift} with code {first} of a log-probability"));
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
        let from = if layout.values.by_difference() {
            self.differences::<W>(first, n, rows - 1 - i)?
        } else {
            self.raw_codes(n)?;
            0
        };
        self.ids(sink.ids(i, n))?;
        if layout.sampled {
            self.draws.clear();
            for _ in 0..n {
                self.draws.push(tables.draws.take(&mut self.raw).ok_or(SHORT)?);
            }
        }
        self.entries += n;
        let codes = Codes { sums: &self.sums[1 + self.here..][..n], from };
        if let (Values::Bf16Logits, Some(code)) = (layout.values, codes.all().next()) {
            let first = layout.values.value(code, f32::from_bits(lse)); // the largest; NaN codes are the lowest
            if first.is_nan() || first > TOLERANCE {
                return Err(format!("row {i} has a log_prob of {first}"));
            }
        }
        sink.row(i, &Row { token, codes, draws: &self.draws, rests: &self.rests, lse, shift });
        self.had = n;
        Ok(())
    }

    #[inline(always)]
    pub fn rows<W: Wide>(&mut self, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
        for i in 0..rows {
            self.row::<W>(i, rows, sink)?;
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
        self.ahead.ended(self.parts.differences.1)?;
        let mut nibbles = BitReader::new(self.parts.nibbles.0);
        nibbles.at = self.nibble * 4;
        nibbles.end(self.parts.nibbles.1)?;
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
