//! A payload to rows. Nothing is trusted: a number that cannot be is an error, whatever the checksum says.

use super::bitstream::{BitReader, SLACK};
use super::classes::ClassCode;
use super::coded::{rest_value, Coded};
use super::prefix::Run;
use super::tables::{RankClass, Tables, COUNT, EXTRA, FIRST, REST, TOKEN};
use super::values::{grid_value, Values};
use super::{widest, Dense, Layout};
use crate::bytes::{padded, Cursor};
use crate::codec::Shape;
use crate::rows::{RowsMut, TOLERANCE};

/// Codes that a run writes behind the last one wanted.
const OVERRUN: usize = 8;

/// Takes the rows of a block one after the other.
pub trait Sink {
    fn row(&mut self, i: usize, row: &Row<'_>);
}

pub struct Row<'a> {
    pub token: u32,
    pub ids: &'a [u32],
    pub codes: &'a [u32],
    pub draws: &'a [u32],
    pub rests: &'a [u32],
    pub lse: u32,
}

struct Parts<'a> {
    ragged: bool,
    words: &'a [u8],
    codes: &'a [u8],
    nibbles: &'a [u8],
    /// From the start of each stream to the end of the payload, and the stream's own length.
    differences: (&'a [u8], usize),
    raw: (&'a [u8], usize),
}

fn split<'a>(layout: &Layout, payload: &'a [u8], shape: Shape) -> Result<Parts<'a>, String> {
    let mut cursor = Cursor::new(payload);
    let ragged = cursor.u8()?;
    cursor.zeros(3)?;
    let lens = [cursor.u32()? as usize, cursor.u32()? as usize, cursor.u32()? as usize];
    if ragged > 1 || (ragged == 0 && shape.entries != shape.rows * layout.k as usize) {
        return Err(format!("ragged {ragged} with {} entries in {} rows of {}", shape.entries, shape.rows, layout.k));
    }
    let mut part = |len: usize| -> Result<&'a [u8], String> {
        let bytes = cursor.take(len)?;
        cursor.zeros(padded(len) - len)?;
        Ok(bytes)
    };
    let words = part(shape.rows * layout.words() * 4)?;
    let codes = part(shape.entries * layout.code_bytes())?;
    let streams = cursor.take(lens[0] + lens[1] + lens[2] + SLACK)?;
    cursor.end()?;
    if streams[lens[0] + lens[1] + lens[2]..] != [0; SLACK] {
        return Err("the bytes behind the streams are not zero".to_string());
    }
    Ok(Parts {
        ragged: ragged == 1,
        words,
        codes,
        nibbles: &streams[..lens[0]],
        differences: (&streams[lens[0]..], lens[1]),
        raw: (&streams[lens[0] + lens[1]..], lens[2]),
    })
}

pub struct Decoder<'a> {
    layout: Layout,
    tables: &'a Tables,
    parts: Parts<'a>,
    nibble: usize,
    differences: BitReader<'a>,
    /// Numbers looked up with the row before that belong to the next.
    carried: Run,
    /// How many of them are used.
    carried_lanes: usize,
    /// Where the last look-up began.
    looked_up: usize,
    raw: BitReader<'a>,
    entries: usize,
    walk: widest::Walk,
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
            carried: Run::default(),
            carried_lanes: 0,
            looked_up: 0,
            raw: BitReader::new(parts.raw.0),
            entries: 0,
            walk: widest::walk(),
            codes: vec![0; k + 2],
            short: vec![0; k + OVERRUN],
            classes: vec![0; k + 2],
            ids: vec![0; k],
            before: vec![0; k],
            had: 0,
            draws: Vec::new(),
            rests: vec![0; 1 + dense.layout.extra],
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
    fn differences(&mut self, n: usize) -> Result<(), String> {
        let (first, limit) = (self.codes[0], self.layout.values.largest());
        let mut last = first;
        if n > 1 && first <= limit {
            last = self.sums(n, first).ok_or(SHORT)?;
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

    // the running sums as u16, which may wrap, and the last one, which does not
    #[inline(always)]
    fn sums(&mut self, n: usize, first: u32) -> Option<u32> {
        let (mut at, mut sum) = (1, first);
        let short = &mut self.short[..n + OVERRUN];
        short[0] = first as u16;
        let (mut run, mut count) = (self.carried, self.carried.count() - self.carried_lanes);
        let mut bits = self.differences.clone();
        let mut looked_up = self.looked_up;
        let prefix = &self.tables.codes;
        if count > 0 {
            // numbers looked up with the row before
            let before = u32::from(run.0[self.carried_lanes - 1]);
            let wanted = count.min(n - 1);
            for (slot, lane) in short[1..].iter_mut().zip(&run.0[self.carried_lanes..self.carried_lanes + wanted]) {
                sum = first + u32::from(*lane) - before;
                *slot = sum as u16;
            }
            self.carried_lanes += wanted;
            at += wanted;
        }
        count = 0;
        while at < n {
            run = prefix.run(bits.window()?);
            count = run.count();
            if count == 0 {
                sum = sum.wrapping_add(prefix.take(&mut bits)?);
                short[at] = sum as u16;
                at += 1;
                continue;
            }
            looked_up = bits.at;
            bits.at += run.length();
            let from = sum as u16;
            let slots: &mut [u16; OVERRUN] = short.get_mut(at..at + OVERRUN)?.try_into().ok()?;
            for (slot, lane) in slots.iter_mut().zip(run.0) {
                *slot = from.wrapping_add(lane);
            }
            at += count;
            if at <= n {
                sum = sum.wrapping_add(run.total());
            }
        }
        if at > n {
            // the rest of the look-up belongs to the next row
            self.carried = run;
            self.carried_lanes = count - (at - n);
            sum = sum.wrapping_add(u32::from(run.0[self.carried_lanes - 1]));
        } else if self.carried_lanes == self.carried.count() || count > 0 {
            (self.carried, self.carried_lanes) = (Run::default(), 0);
        }
        self.looked_up = looked_up;
        self.differences = bits;
        Some(sum)
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
    fn ids(&mut self, n: usize) -> Result<(), String> {
        let classes = &mut self.classes[..n];
        let bytes = self.parts.nibbles.get(self.nibble / 2..(self.nibble + n).div_ceil(2)).ok_or(SHORT)?;
        spread(bytes, self.nibble % 2 == 1, classes);
        self.nibble += n;
        for (class, codes) in classes[1.min(n)..].iter_mut().zip(self.codes.windows(2)) {
            *class |= u8::from(codes[0] == codes[1]) << 4;
        }
        let (ranks, id_of) = (&*self.tables.ranks, self.tables.dictionary.id_of.as_slice());
        let ids = &mut self.ids[..n];
        let at = self.raw.at;
        let walked = match self.tables.narrow {
            true => (self.walk)(classes, ids, self.parts.raw.0, at, ranks, id_of),
            false => walk::<2>(classes, ids, self.parts.raw.0, at, ranks, id_of),
        };
        self.raw.at = walked.ok_or_else(|| format!("a rank outside a vocabulary of {}, or {SHORT}", id_of.len()))?;
        Ok(())
    }

    #[inline(always)]
    fn row(&mut self, i: usize, sink: &mut impl Sink) -> Result<(), String> {
        let (layout, tables) = (self.layout, self.tables);
        let token = self.token()?;
        let mut n = layout.k as usize;
        if self.parts.ragged {
            let missing = self.value(&tables.classes[COUNT])? as usize;
            n = n.checked_sub(missing).ok_or_else(|| format!("a row that misses {missing} entries of {n}"))?;
        }
        if layout.values.by_difference() {
            self.codes[0] = self.value(&tables.classes[FIRST])?;
        }
        if let Values::Grid { .. } = layout.values {
            self.rests[0] = self.rest(&tables.classes[REST])?;
            for e in 0..layout.extra {
                self.rests[1 + e] = self.rest(&tables.classes[EXTRA])?;
            }
        }
        let lse = self.words(i)?;
        if layout.values.by_difference() {
            self.differences(n)?;
        } else {
            self.raw_codes(n)?;
        }
        self.ids(n)?;
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
        sink.row(i, &Row { token, ids, codes, draws: &self.draws, rests: &self.rests, lse });
        std::mem::swap(&mut self.ids, &mut self.before);
        self.had = n;
        Ok(())
    }

    #[inline(always)]
    pub fn rows(&mut self, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
        for i in 0..rows {
            self.row(i, sink)?;
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
        for (slot, word) in self.rests.iter_mut().zip(row) {
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
        let mut differences = self.differences.clone();
        if self.carried_lanes < self.carried.count() {
            differences.at = self.looked_up;
            for _ in 0..self.carried_lanes {
                self.tables.codes.take(&mut differences).ok_or(SHORT)?;
            }
        }
        differences.end(self.parts.differences.1)?;
        let mut nibbles = BitReader::new(self.parts.nibbles);
        nibbles.at = self.nibble * 4;
        nibbles.end(self.parts.nibbles.len())?;
        self.raw.end(self.parts.raw.1)
    }
}

/// Takes the raw parts of ids of these classes from bit `at` on, `N` from each window; the bit behind them.
#[inline(always)]
pub fn walk<const N: usize>(
    classes: &[u8],
    ids: &mut [u32],
    bytes: &[u8],
    mut at: usize,
    ranks: &[RankClass; 256],
    id_of: &[u32],
) -> Option<usize> {
    let mut rank = 0u32;
    let (groups, rest) = classes.as_chunks::<N>();
    let (slots, last) = ids.as_chunks_mut::<N>();
    for (group, slots) in groups.iter().zip(slots) {
        let mut window = u64::from_le_bytes(*bytes.get(at / 8..)?.first_chunk()?) >> (at % 8);
        for (class, slot) in group.iter().zip(slots) {
            let class = &ranks[usize::from(*class)];
            rank = class.base.wrapping_add(window as u32 & class.mask).wrapping_add(rank & class.keep);
            window >>= class.width % 64;
            at += class.width as usize;
            *slot = *id_of.get(rank as usize)?;
        }
    }
    for (class, slot) in rest.iter().zip(last) {
        let class = &ranks[usize::from(*class)];
        let window = u64::from_le_bytes(*bytes.get(at / 8..)?.first_chunk()?) >> (at % 8);
        rank = class.base.wrapping_add(window as u32 & class.mask).wrapping_add(rank & class.keep);
        at += class.width as usize;
        *slot = *id_of.get(rank as usize)?;
    }
    Some(at)
}

// nibbles to bytes; `odd` begins with the second nibble of the first byte
#[inline(always)]
fn spread(bytes: &[u8], odd: bool, mut out: &mut [u8]) {
    let mut bytes = bytes;
    if odd {
        if let ([first, rest @ ..], [slot, others @ ..]) = (bytes, out) {
            *slot = first >> 4;
            (bytes, out) = (rest, others);
        } else {
            return;
        }
    }
    let (blocks, out) = out.as_chunks_mut::<32>();
    let (whole, bytes) = bytes.split_at(blocks.len() * 16);
    for (block, bytes) in blocks.iter_mut().zip(whole.as_chunks::<16>().0) {
        for (pair, byte) in block.as_chunks_mut::<2>().0.iter_mut().zip(bytes) {
            *pair = [byte & 15, byte >> 4];
        }
    }
    let (pairs, last) = out.as_chunks_mut::<2>();
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = [byte & 15, byte >> 4];
    }
    if let ([slot], Some(byte)) = (last, bytes.last()) {
        *slot = byte & 15;
    }
}

fn decode(dense: &Dense, payload: &[u8], shape: Shape, rows: usize, sink: &mut impl Sink) -> Result<(), String> {
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

struct ToRows<'a> {
    layout: Layout,
    out: RowsMut<'a>,
    tokens: Option<&'a mut [i32]>,
}

impl Sink for ToRows<'_> {
    #[inline(always)]
    fn row(&mut self, i: usize, row: &Row<'_>) {
        let (k, n, values) = (self.layout.k as usize, row.ids.len(), self.layout.values);
        let out_ids = &mut self.out.ids[i * k..(i + 1) * k];
        let log_probs = &mut self.out.log_probs[i * k..(i + 1) * k];
        for (slot, id) in out_ids.iter_mut().zip(row.ids) {
            *slot = *id as i32;
        }
        let lse = f32::from_bits(row.lse);
        if let Values::Grid { per_nat } = values {
            let step = 1.0 / f32::from(per_nat);
            for (slot, code) in log_probs.iter_mut().zip(row.codes) {
                *slot = grid_value(*code, step);
            }
        } else {
            for (slot, code) in log_probs.iter_mut().zip(row.codes) {
                *slot = values.value(*code, lse);
            }
        }
        if n < k {
            out_ids[n..].fill(-1);
            log_probs[n..].fill(f32::NEG_INFINITY);
        }
        self.out.log_rest[i] = rest_value(values, row.rests[0]);
        let extra = self.layout.extra;
        if extra > 0 && !self.out.extra.is_empty() {
            for (slot, code) in self.out.extra[i * extra..(i + 1) * extra].iter_mut().zip(&row.rests[1..]) {
                *slot = rest_value(values, *code);
            }
        }
        if let Some(slot) = self.out.lse.get_mut(i) {
            *slot = lse;
        }
        if !self.out.draws.is_empty() {
            let draws = &mut self.out.draws[i * k..(i + 1) * k];
            draws.fill(0);
            for (slot, d) in draws.iter_mut().zip(row.draws) {
                *slot = *d as i32 + 1;
            }
        }
        if let Some(tokens) = &mut self.tokens {
            tokens[i] = row.token as i32;
        }
    }
}

pub fn into_rows(
    dense: &Dense,
    payload: &[u8],
    shape: Shape,
    out: RowsMut<'_>,
    tokens: Option<&mut [i32]>,
) -> Result<(), String> {
    let (rows, k, layout) = (out.log_rest.len(), dense.layout.k as usize, dense.layout);
    let fits = |len: usize, wanted: usize| len == 0 || len == wanted;
    if out.ids.len() != rows * k
        || out.log_probs.len() != rows * k
        || tokens.as_ref().is_some_and(|t| t.len() != rows)
        || !fits(out.extra.len(), rows * layout.extra)
        || !fits(out.lse.len(), rows)
        || !fits(out.draws.len(), rows * k)
    {
        return Err(format!("memory for other than {rows} rows of {k} entries"));
    }
    decode(dense, payload, shape, rows, &mut ToRows { layout, out, tokens })
}

struct ToTokens<'a>(&'a mut [i32]);

impl Sink for ToTokens<'_> {
    #[inline(always)]
    fn row(&mut self, i: usize, row: &Row<'_>) {
        self.0[i] = row.token as i32;
    }
}

pub fn into_tokens(dense: &Dense, payload: &[u8], shape: Shape, out: &mut [i32]) -> Result<(), String> {
    let rows = out.len();
    decode(dense, payload, shape, rows, &mut ToTokens(out))
}

struct ToCoded {
    coded: Coded,
    lse: bool,
}

impl Sink for ToCoded {
    #[inline(always)]
    fn row(&mut self, _: usize, row: &Row<'_>) {
        let c = &mut self.coded;
        let start = c.ids.len();
        c.tokens.push(row.token);
        c.counts.push(row.ids.len() as u16);
        c.ids.extend_from_slice(row.ids);
        c.codes.extend_from_slice(row.codes);
        c.draws.extend_from_slice(row.draws);
        c.rests.extend_from_slice(row.rests);
        if self.lse {
            c.lse.push(row.lse);
        }
        // back from the order of ranks to that of ids
        let draws = &mut c.draws;
        super::coded::sort_ties(&c.codes[start..], &mut c.ids[start..], |a, b| {
            if !draws.is_empty() {
                draws.swap(start + a, start + b);
            }
        });
    }
}

pub fn into_coded(dense: &Dense, payload: &[u8], shape: Shape) -> Result<Coded, String> {
    let mut sink = ToCoded { coded: Coded::default(), lse: dense.layout.values == Values::Bf16Logits };
    decode(dense, payload, shape, shape.rows, &mut sink)?;
    Ok(sink.coded)
}
