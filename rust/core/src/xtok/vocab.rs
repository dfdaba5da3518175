//! `Vocab`: the bytes of every id in 16 bytes an id, so that a walk touches one cache line a token.

use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_128;

use crate::bytes::Cursor;
use crate::error::{Error, Result};
use crate::xtok::normal::Step;

/// What is known of an id; a byte a token.
pub mod flag {
    pub const SPECIAL: u8 = 1;
    pub const BYTE: u8 = 2;
    pub const UNKNOWN: u8 = 4;
    pub const CONTINUATION: u8 = 8;
    pub const LOSSY: u8 = 16;
}

/// How a walk treats a token.
pub mod kind {
    pub const CONTENT: u8 = 0;
    pub const SPECIAL: u8 = 1;
    pub const UNKNOWN: u8 = 2;
    pub const EMPTY: u8 = 3;
}

/// Bytes that fit into a word beside its head.
pub const INLINE: usize = 12;
/// Zero bytes behind the long tokens, so that 16 can be loaded anywhere.
const PAD: usize = 16;

/// A token: length (16 bits), kind (8), long (8), then up to 12 bytes, or the 32-bit place of a longer token's bytes.
pub type Word = u128;

pub fn word_len(word: Word) -> usize {
    word as u16 as usize
}

pub fn word_kind(word: Word) -> u8 {
    (word >> 16) as u8
}

pub fn word_is_long(word: Word) -> bool {
    (word >> 24) as u8 != 0
}

/// Content that lies wholly inside the word: equal words have equal bytes.
pub fn word_is_plain(word: Word) -> bool {
    word as u32 >> 16 == 0
}

/// Up to 12 bytes of a token from `offset` on, the first in the low bits; bytes past the token's end are arbitrary.
pub fn load(word: Word, long: &[u8], offset: usize) -> u128 {
    if word_is_long(word) {
        let at = (word >> 32) as u32 as usize + offset;
        let mut bytes = [0u8; 16];
        bytes.copy_from_slice(&long[at..at + 16]);
        u128::from_le_bytes(bytes)
    } else {
        word >> (32 + 8 * offset)
    }
}

/// Where the tokenizer puts a space in front of a text that has none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prefix {
    Never,
    /// Before the first text of a sequence.
    First,
    /// Before the first text and after every special token.
    Every,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    ByteLevel,
    SentencePiece,
    WordPiece,
    Ranks,
    Given,
}

/// What the tokenizer does to text beyond cutting it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Rules {
    pub kind: Kind,
    pub prefix: Prefix,
    /// Whitespace is in no token (WordPiece).
    pub drops_space: bool,
    pub normal: Vec<Step>,
    /// Ids by role: bos, eos, pad, ...
    pub roles: Vec<(String, u32)>,
}

impl Rules {
    pub fn new(kind: Kind) -> Rules {
        Rules { kind, prefix: Prefix::Never, drops_space: false, normal: Vec::new(), roles: Vec::new() }
    }
}

/// Collects tokens in any order of ids.
#[derive(Default)]
pub struct Builder {
    blob: Vec<u8>,
    tokens: Vec<Option<(u32, u32, u8)>>,
}

/// More ids than any tokenizer has; a guard against hostile files.
const MAX_IDS: usize = 1 << 24;

impl Builder {
    pub fn with_capacity(ids: usize) -> Builder {
        Builder { blob: Vec::with_capacity(8 * ids), tokens: Vec::with_capacity(ids) }
    }

    /// Sets an id's bytes; the last call for an id counts.
    pub fn set(&mut self, id: u64, flags: u8, push: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        if id >= MAX_IDS as u64 {
            return Err(Error::Refused(format!("token id {id} is outside 0..{MAX_IDS}")));
        }
        let at = self.blob.len();
        push(&mut self.blob);
        let len = self.blob.len() - at;
        if len > usize::from(u16::MAX) || self.blob.len() > u32::MAX as usize {
            return Err(Error::Refused(format!("token {id} has {len} bytes; at most {} are accepted", u16::MAX)));
        }
        let id = id as usize;
        if id >= self.tokens.len() {
            self.tokens.resize(id + 1, None);
        }
        self.tokens[id] = Some((at as u32, len as u32, flags));
        Ok(())
    }

    pub fn add_flags(&mut self, id: u64, flags: u8) {
        if let Some(Some(token)) = self.tokens.get_mut(id as usize) {
            token.2 |= flags;
        }
    }

    pub fn has(&self, id: u64) -> bool {
        matches!(self.tokens.get(id as usize), Some(Some(_)))
    }

    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Ids without a token have no bytes and count as unknown. `size`: at least that many ids.
    pub fn finish(self, rules: Rules, size: usize) -> Vocab {
        let ids = self.tokens.len().max(size);
        let mut vocab =
            Vocab { words: Vec::with_capacity(ids), long: Vec::new(), flags: Vec::with_capacity(ids), rules };
        for token in self.tokens.iter().chain(std::iter::repeat(&None)).take(ids) {
            let (at, len, flags) = token.unwrap_or((0, 0, flag::UNKNOWN | flag::LOSSY));
            vocab.push(&self.blob[at as usize..(at + len) as usize], flags);
        }
        vocab.long.extend([0; PAD]);
        vocab
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Vocab {
    pub words: Vec<Word>,
    pub long: Vec<u8>,
    pub flags: Vec<u8>,
    pub rules: Rules,
}

impl Vocab {
    fn push(&mut self, bytes: &[u8], flags: u8) {
        let kind = if flags & flag::UNKNOWN != 0 {
            kind::UNKNOWN
        } else if flags & flag::SPECIAL != 0 {
            kind::SPECIAL
        } else if bytes.is_empty() {
            kind::EMPTY
        } else {
            kind::CONTENT
        };
        self.words.push(make_word(bytes, kind, &mut self.long));
        self.flags.push(flags);
    }

    pub fn len(&self) -> usize {
        self.words.len()
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty()
    }

    /// The bytes of an id below `len()`; of a special token those of its name.
    pub fn bytes(&self, id: usize, out: &mut Vec<u8>) {
        push_bytes(self.words[id], &self.long, out);
    }

    /// Normalises or drops something of a text, so that bytes may differ from the text's.
    pub fn is_lossy(&self) -> bool {
        self.rules.drops_space || !self.rules.normal.is_empty()
    }

    pub fn role(&self, role: &str) -> Option<u32> {
        self.rules.roles.iter().find(|(name, _)| name == role).map(|(_, id)| *id)
    }

    /// The vocabulary as bytes: length of the rules, rules as JSON, number of ids, lengths, flags, bytes.
    pub fn to_bytes(&self) -> Vec<u8> {
        let rules = serde_json::to_vec(&self.rules).unwrap_or_default();
        let mut out = Vec::with_capacity(rules.len() + 12 * self.len());
        out.extend((rules.len() as u32).to_le_bytes());
        out.extend(&rules);
        out.extend((self.len() as u32).to_le_bytes());
        self.words.iter().for_each(|w| out.extend((word_len(*w) as u16).to_le_bytes()));
        out.extend(&self.flags);
        self.words.iter().for_each(|w| push_bytes(*w, &self.long, &mut out));
        out
    }

    pub fn from_bytes(bytes: &[u8]) -> Result<Vocab> {
        let damaged = |what: String| Error::Refused(format!("these bytes are no vocabulary: {what}"));
        let mut cursor = Cursor::new(bytes);
        let rules = cursor.u32().and_then(|n| cursor.take(n as usize)).map_err(damaged)?;
        let rules: Rules = serde_json::from_slice(rules).map_err(|e| damaged(e.to_string()))?;
        let ids = cursor.u32().map_err(damaged)? as usize;
        let lens = cursor.take(2 * ids.min(MAX_IDS)).map_err(damaged)?;
        let flags = cursor.take(ids).map_err(damaged)?;
        let mut vocab =
            Vocab { words: Vec::with_capacity(ids), long: Vec::new(), flags: Vec::with_capacity(ids), rules };
        for (len, flags) in lens.chunks_exact(2).zip(flags) {
            let token = cursor.take(usize::from(u16::from_le_bytes([len[0], len[1]]))).map_err(damaged)?;
            vocab.push(token, *flags);
        }
        vocab.long.extend([0; PAD]);
        Ok(vocab)
    }

    /// xxh3-128 of `to_bytes`.
    pub fn hash(&self) -> u128 {
        xxh3_128(&self.to_bytes())
    }
}

/// A word, with the bytes of a long token appended to `long` (the caller pads it in the end).
pub fn make_word(bytes: &[u8], kind: u8, long: &mut Vec<u8>) -> Word {
    let head = bytes.len() as u128 | u128::from(kind) << 16;
    if bytes.len() <= INLINE {
        let mut data = [0u8; 16];
        data[4..4 + bytes.len()].copy_from_slice(bytes);
        head | u128::from_le_bytes(data)
    } else {
        let at = long.len() as u128;
        long.extend_from_slice(bytes);
        head | 1 << 24 | at << 32
    }
}

pub fn push_bytes(word: Word, long: &[u8], out: &mut Vec<u8>) {
    let len = word_len(word);
    if word_is_long(word) {
        let at = (word >> 32) as u32 as usize;
        out.extend_from_slice(&long[at..at + len]);
    } else {
        out.extend_from_slice(&word.to_le_bytes()[4..4 + len]);
    }
}
