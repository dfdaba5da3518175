//! The tables of a shard: class widths, prefix codes and the ranks of ids. They stand before the first block and again behind
//! the last, so that one damaged byte does not take the whole shard with it.
//!
//! magic PSTB | length u32 | vocab_size u32 | k u32 | layout 8 | trained u64 | 7 class codes, 16 x u8 each | 2 prefix codes, 64 x u8 each
//! | dictionary | zeros to 8 | xxh3-64 of all before

use std::sync::OnceLock;

use super::classes::{ClassCode, CLASSES};
use super::dictionary::Dictionary;
use super::prefix::{PrefixCode, SYMBOLS};
use super::Layout;
use crate::bytes::{checksum, pad, Cursor};

pub const MAGIC: [u8; 4] = *b"PSTB";
/// 2^22 ids in a few bits each, and more than enough.
pub const MAX_TABLES: usize = 1 << 26;
/// Two raw parts of an id fit into one window.
const MAX_ID_WIDTH: u8 = 28;

/// The class codes, in the order in which they are stored.
pub const RANK: usize = 0;
pub const STEP: usize = 1;
pub const TOKEN: usize = 2;
pub const COUNT: usize = 3;
pub const FIRST: usize = 4;
pub const REST: usize = 5;
pub const EXTRA: usize = 6;
pub const CODES: usize = 7;

/// One class of a rank (0 to 15) or of a step from the rank before it (16 to 31).
#[derive(Clone, Copy, Default)]
#[repr(align(16))]
pub struct RankClass {
    pub base: u32,
    pub mask: u32,
    /// All ones where the rank before is added.
    pub keep: u32,
    pub width: u32,
}

pub struct Tables {
    pub classes: [ClassCode; CODES],
    pub codes: PrefixCode,
    pub draws: PrefixCode,
    pub dictionary: Dictionary,
    /// By nibble, plus 16 for a step; an index of 8 bits is never outside.
    pub ranks: Box<[RankClass; 256]>,
    /// The same by column: widths of ranks and of steps, and bases of both.
    pub widths: [[u8; CLASSES]; 2],
    pub bases: [[u32; 8]; CLASSES / 4],
    /// Bases by byte, the lowest first.
    pub planes: [[[u8; CLASSES]; 4]; 2],
    /// The base in the middle of the ranks' and that of the steps', then those in the middles of their halves, and so on.
    pub middles: [[u32; CLASSES]; 4],
    /// Most bits of an id's raw part.
    pub widest: u32,
    pub trained: u64,
    /// As stored.
    pub bytes: Vec<u8>,
    pub sum: u64,
    written: OnceLock<Vec<u8>>,
}

/// One more than the largest value of each class code.
pub fn bounds(layout: &Layout) -> [u64; CODES] {
    let (v, k) = (u64::from(layout.vocab_size), u64::from(layout.k));
    [v, v, k + (1 << 31), k + 1, layout.values.first_bound(), 1 << 16, 1 << 16]
}

fn no_ranks() -> Box<[RankClass; 256]> {
    Box::new([RankClass::default(); 256])
}

fn max_width(code: usize) -> u8 {
    if code <= STEP {
        MAX_ID_WIDTH
    } else {
        32
    }
}

impl Tables {
    /// Tables that know nothing of the rows: ranks are ids.
    pub fn plain(layout: Layout) -> Tables {
        let classes = bounds(&layout).map(ClassCode::even);
        let dictionary = Dictionary::identity(layout.vocab_size);
        Tables::new(layout, classes, PrefixCode::default(), PrefixCode::default(), dictionary, 0)
    }

    pub fn new(
        layout: Layout,
        classes: [ClassCode; CODES],
        codes: PrefixCode,
        draws: PrefixCode,
        dictionary: Dictionary,
        trained: u64,
    ) -> Tables {
        let mut tables = Tables {
            classes,
            codes,
            draws,
            dictionary,
            ranks: no_ranks(),
            widths: [[0; CLASSES]; 2],
            bases: [[0; 8]; CLASSES / 4],
            planes: [[[0; CLASSES]; 4]; 2],
            middles: [[0; CLASSES]; 4],
            widest: 0,
            trained,
            bytes: vec![],
            sum: 0,
            written: OnceLock::new(),
        };
        tables.bytes = tables.encode(&layout);
        tables.finish()
    }

    /// Class of each rank, then 16 + that of each step, a step of 1 (the next rank) at V + 1; made when rows are first written.
    pub fn class_of_id(&self) -> &[u8] {
        self.written.get_or_init(|| {
            let v = self.dictionary.id_of.len();
            let mut classes = vec![0u8; 2 * v + 1];
            let (ranks, steps) = classes.split_at_mut(v);
            self.classes[RANK].fill(ranks, 0);
            self.classes[STEP].fill(&mut steps[1..], CLASSES as u8);
            classes
        })
    }

    fn finish(mut self) -> Tables {
        for (i, class) in self.ranks[..2 * CLASSES].iter_mut().enumerate() {
            let step = i / CLASSES;
            let code = &self.classes[RANK + step];
            let width = u32::from(code.widths[i % CLASSES]);
            *class = RankClass {
                base: code.bases[i % CLASSES] + step as u32, // a step of 0 is the next rank
                mask: (1 << width) - 1,
                keep: 0u32.wrapping_sub(step as u32),
                width,
            };
        }
        for (i, class) in self.ranks[..2 * CLASSES].iter().enumerate() {
            self.widths[i / CLASSES][i % CLASSES] = class.width as u8;
            self.bases[i / 8][i % 8] = class.base;
            if !i.is_multiple_of(CLASSES) {
                // class 8, then 4 and 12, then 2, 6, 10 and 14, then the odd ones; what no rank reaches stays positive
                let level = i.trailing_zeros() as usize;
                self.middles[3 - level][i >> (level + 1)] = class.base.min(i32::MAX as u32);
            }
            for (plane, byte) in self.planes[i / CLASSES].iter_mut().zip(class.base.to_le_bytes()) {
                plane[i % CLASSES] = byte;
            }
        }
        self.widest = self.ranks.iter().map(|c| c.width).max().unwrap_or(0);
        let end = self.bytes.len() - 8;
        self.sum = checksum(&self.bytes[..end]);
        self
    }

    fn encode(&self, layout: &Layout) -> Vec<u8> {
        let mut out = Vec::new();
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&layout.vocab_size.to_le_bytes());
        out.extend_from_slice(&layout.k.to_le_bytes());
        layout.encode(&mut out);
        out.extend_from_slice(&self.trained.to_le_bytes());
        self.classes.iter().for_each(|c| out.extend_from_slice(&c.widths));
        out.extend_from_slice(&self.codes.lengths);
        out.extend_from_slice(&self.draws.lengths);
        self.dictionary.encode(&mut out);
        pad(&mut out);
        let len = out.len() as u32 + 8;
        out[4..8].copy_from_slice(&len.to_le_bytes());
        let sum = checksum(&out);
        out.extend_from_slice(&sum.to_le_bytes());
        out
    }

    /// Checks and reads tables of a shard of `layout`.
    pub fn decode(bytes: &[u8], layout: Layout) -> Result<Tables, String> {
        let split = bytes.len().checked_sub(8).ok_or("tables of less than 8 bytes")?;
        let (body, tail) = bytes.split_at(split);
        if checksum(body).to_le_bytes() != tail {
            return Err("the checksum of the tables differs".to_string());
        }
        let mut cursor = Cursor::new(body);
        let magic = cursor.take(4)?;
        let (len, vocab_size, k) = (cursor.u32()? as usize, cursor.u32()?, cursor.u32()?);
        if magic != MAGIC || len != bytes.len() || vocab_size != layout.vocab_size || k != layout.k {
            return Err(format!("tables of {len} bytes for a vocabulary of {vocab_size} and k = {k}"));
        }
        if Layout::decode(layout.codec, &mut cursor, vocab_size, k)? != layout {
            return Err("the tables are of another layout than the header's".to_string());
        }
        let trained = cursor.u64()?;
        let bounds = bounds(&layout);
        let mut classes = Vec::with_capacity(CODES);
        for (code, bound) in bounds.into_iter().enumerate() {
            let mut widths = [0u8; CLASSES];
            widths.copy_from_slice(cursor.take(CLASSES)?);
            classes.push(ClassCode::new(widths, bound, max_width(code))?);
        }
        let classes: [ClassCode; CODES] = classes.try_into().map_err(|_| "class codes are missing")?;
        let mut prefix = || -> Result<PrefixCode, String> {
            let mut lengths = [0u8; SYMBOLS];
            lengths.copy_from_slice(cursor.take(SYMBOLS)?);
            PrefixCode::new(lengths)
        };
        let (codes, draws) = (prefix()?, prefix()?);
        let dictionary = Dictionary::decode(&mut cursor, vocab_size)?;
        if cursor.left() >= 8 {
            return Err(format!("{} bytes follow the dictionary", cursor.left()));
        }
        cursor.zeros(cursor.left())?;
        let tables = Tables {
            classes,
            codes,
            draws,
            dictionary,
            ranks: no_ranks(),
            widths: [[0; CLASSES]; 2],
            bases: [[0; 8]; CLASSES / 4],
            planes: [[[0; CLASSES]; 4]; 2],
            middles: [[0; CLASSES]; 4],
            widest: 0,
            trained,
            bytes: bytes.to_vec(),
            sum: 0,
            written: OnceLock::new(),
        };
        Ok(tables.finish())
    }
}
