//! What an alignment becomes: chunks of rows one after another, and the chunk of every token.

use crate::error::{Error, Result};
use crate::xtok::ahead::Stretch;
use crate::xtok::pages;
use crate::xtok::stream::{Ids, Stream};
use crate::xtok::vocab::{kind, word_kind};
use crate::xtok::walk::{chunk, Chunk, Sink};

/// Chunks of rows, one after another.
#[derive(Debug, Default, Clone, PartialEq)]
pub struct Aligned {
    /// Student tokens and teacher tokens of a chunk, half open, counted from the row's beginning.
    pub spans: Vec<[i32; 4]>,
    pub flags: Vec<u8>,
    /// Bytes of text.
    pub bytes: Vec<i32>,
    /// Chunks of each row.
    pub counts: Vec<usize>,
    pub row_flags: Vec<u8>,
    pub mismatches: Vec<i32>,
}

impl Aligned {
    /// With room for so many chunks.
    pub fn with_capacity(chunks: usize) -> Aligned {
        Aligned {
            spans: pages::with_capacity(chunks),
            flags: pages::with_capacity(chunks),
            bytes: pages::with_capacity(chunks),
            ..Aligned::default()
        }
    }

    /// Forgets the chunks from `count` on.
    pub fn truncate(&mut self, count: usize) {
        self.spans.truncate(count);
        self.flags.truncate(count);
        self.bytes.truncate(count);
    }

    pub fn append(&mut self, mut other: Aligned) {
        self.spans.append(&mut other.spans);
        self.flags.append(&mut other.flags);
        self.bytes.append(&mut other.bytes);
        self.counts.append(&mut other.counts);
        self.row_flags.append(&mut other.row_flags);
        self.mismatches.append(&mut other.mismatches);
    }
}

/// Writes chunks down, and their numbers beside their tokens; special tokens inside a chunk of text stay out.
pub struct Recorder<'a> {
    pub ids: (&'a Ids<'a>, &'a Ids<'a>),
    /// Where the ids begin in their rows.
    pub offsets: (usize, usize),
    pub maps: (&'a mut [i32], &'a mut [i32]),
    pub out: &'a mut Aligned,
}

impl Sink for Recorder<'_> {
    #[inline]
    fn chunk(&mut self, c: Chunk) {
        let number = self.out.spans.len() as i32;
        let (s, t) = self.offsets;
        self.out.spans.push([(c.a.0 + s) as i32, (c.a.1 + s) as i32, (c.b.0 + t) as i32, (c.b.1 + t) as i32]);
        self.out.flags.push(c.flags);
        self.out.bytes.push(c.bytes as i32);
        let whole = c.flags & !(chunk::SPECIAL | chunk::NORMALISED) == 0;
        for (map, ids, range) in [(&mut self.maps.0, self.ids.0, c.a), (&mut self.maps.1, self.ids.1, c.b)] {
            if whole {
                map[range.0..range.1].fill(number);
                continue;
            }
            for (slot, at) in map[range.0..range.1].iter_mut().zip(range.0..) {
                if word_kind(ids.word(at)) != kind::SPECIAL {
                    *slot = number;
                }
            }
        }
    }

    fn stretch(&mut self, from: (usize, usize), found: &Stretch) {
        let number = self.out.spans.len() as i32;
        let start = [(from.0 + self.offsets.0) as i32, (from.1 + self.offsets.1) as i32];
        let mut last = [0i32; 3];
        for end in found.ends() {
            let end = end.map(|n| n as i32);
            self.out.spans.push([start[0] + last[0], start[0] + end[0], start[1] + last[1], start[1] + end[1]]);
            self.out.bytes.push(end[2] - last[2]);
            last = end;
        }
        self.out.flags.resize(self.out.spans.len(), 0);
        let (a, b) = found.maps();
        for (map, from, chunks) in [(&mut self.maps.0, from.0, a), (&mut self.maps.1, from.1, b)] {
            for (slot, chunk) in map[from..from + chunks.len()].iter_mut().zip(chunks) {
                *slot = number + chunk;
            }
        }
    }
}

pub fn check_ids(ids: &[i32], size: usize, side: &str, row: usize, offset: usize) -> Result<()> {
    // as u32 negative ids are larger than any size
    let worst = ids.iter().fold(0u32, |worst, id| worst.max(*id as u32));
    if ids.is_empty() || (worst as usize) < size {
        return Ok(());
    }
    let at = ids.iter().position(|id| *id as u32 == worst).unwrap_or(0);
    Err(Error::Refused(format!(
        "row {row}: {side} token {} has id {}, outside the vocabulary's 0..{size}; pass the ids of that tokenizer, \
         and padding by mask",
        at + offset,
        worst as i32
    )))
}
