//! The walk: two token streams, their bytes compared as they pass, cut into the smallest chunks of equal bytes.
//!
//! A boundary is where both sides end a token after the same bytes. Special tokens are no content: runs of them pair by
//! role where both sides stand at the same place, and are passed over elsewhere. Where bytes differ the open chunk turns
//! invalid, the sides are brought together again (`resync`), and the next common token end closes it.

use crate::xtok::ahead::Stretch;
use crate::xtok::resync::{resync, Found, Scratch};
use crate::xtok::stream::{first_byte, Place, Stream};
use crate::xtok::vocab::{kind, word_kind, word_len, Prefix};

/// Flags of a chunk.
pub mod chunk {
    /// The sides' bytes differ.
    pub const INVALID: u8 = 1;
    /// A pair of special tokens.
    pub const SPECIAL: u8 = 2;
    /// It holds an unknown token.
    pub const UNKNOWN: u8 = 4;
    /// U+FFFD of one side stands for invalid bytes of the other.
    pub const REPLACED: u8 = 8;
    /// Special tokens lie inside, which belong to no chunk.
    pub const INTERRUPTED: u8 = 16;
    /// A tokenizer changed the text here.
    pub const NORMALISED: u8 = 32;
}

/// Where chunks may end beyond what the tokens demand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Granularity {
    Byte,
    /// Not inside a UTF-8 character.
    Char,
    /// Only before whitespace that follows a word.
    Word,
    /// Not before this many bytes.
    MinBytes(usize),
}

#[derive(Debug, Clone, Copy)]
pub struct Options {
    pub granularity: Granularity,
    pub prefix: (Prefix, Prefix),
}

/// Half-open token ranges of both sides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk {
    pub a: (usize, usize),
    pub b: (usize, usize),
    pub flags: u8,
    pub bytes: usize,
}

pub trait Sink {
    fn chunk(&mut self, chunk: Chunk);
    /// Chunks of a stretch that begins at these tokens.
    fn stretch(&mut self, from: (usize, usize), found: &Stretch) {
        found.chunks(from).for_each(|chunk| self.chunk(chunk));
    }
}

impl<F: FnMut(Chunk)> Sink for F {
    fn chunk(&mut self, chunk: Chunk) {
        self(chunk)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Done,
    /// More tokens are needed.
    Wait,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Side {
    pub place: Place,
    /// A space may stand before the next content that the other side lacks.
    pub prefix: bool,
}

/// A walk over two streams that may grow between calls of `run`.
#[derive(Debug)]
pub struct Walk {
    pub(super) a: Side,
    pub(super) b: Side,
    pub(super) start: (usize, usize),
    pub(super) bytes: usize,
    pub(super) flags: u8,
    /// The sides have parted and are not together again; whether an unknown token is why.
    parted: Option<bool>,
    pub(super) options: Options,
    pub mismatches: u32,
    /// The side ends while the other has more text.
    pub truncated: (bool, bool),
    /// Tokens of both sides at the first mismatch.
    pub first_mismatch: Option<(usize, usize)>,
}

impl Walk {
    pub fn new(options: Options) -> Walk {
        let side = |prefix| Side { place: Place::default(), prefix: prefix != Prefix::Never };
        Walk {
            a: side(options.prefix.0),
            b: side(options.prefix.1),
            start: (0, 0),
            bytes: 0,
            flags: 0,
            parted: None,
            options,
            mismatches: 0,
            truncated: (false, false),
            first_mismatch: None,
        }
    }

    pub(super) fn is_open(&self) -> bool {
        self.bytes > 0 || self.flags & (chunk::INVALID | chunk::UNKNOWN) != 0
    }

    pub(super) fn emit(&mut self, sink: &mut impl Sink) {
        let (a, b) = (self.a.place.next, self.b.place.next);
        let (flags, bytes) = (self.flags, self.bytes);
        sink.chunk(Chunk { a: (self.start.0, a), b: (self.start.1, b), flags, bytes });
        self.reopen();
    }

    fn reopen(&mut self) {
        self.start = (self.a.place.next, self.b.place.next);
        self.bytes = 0;
        self.flags = 0;
    }

    /// Walks as far as the tokens reach; `ended`: none will follow.
    pub fn run(
        &mut self,
        a: &impl Stream,
        b: &impl Stream,
        ended: bool,
        scratch: &mut Scratch,
        sink: &mut impl Sink,
    ) -> State {
        loop {
            if self.parted.is_some() {
                match self.rejoin(a, b, ended, scratch, sink) {
                    Some(state) => return state,
                    None => continue,
                }
            }
            if self.a.place.left() == 0 && self.b.place.left() == 0 {
                if let Some(state) = self.junction(a, b, ended, scratch, sink) {
                    return state;
                }
                if self.parted.is_some() {
                    continue;
                }
            }
            match (self.a.place.left() > 0, self.b.place.left() > 0) {
                (true, true) => self.compare(a, b),
                (has_a, _) => {
                    let (side, other) = if has_a { (false, true) } else { (true, false) };
                    let step = if side {
                        advance(&mut self.a, &self.b.place, a, b, self.options.prefix.0)
                    } else {
                        advance(&mut self.b, &self.a.place, b, a, self.options.prefix.1)
                    };
                    match step {
                        Step::Content if side => self.flags |= a.flags(self.a.place.next - 1),
                        Step::Content => self.flags |= b.flags(self.b.place.next - 1),
                        Step::Special => self.flags |= chunk::INTERRUPTED,
                        Step::Unknown => self.unknown(a, b, side),
                        Step::End if !ended => return State::Wait,
                        Step::End => {
                            self.truncated = (side, other);
                            return State::Done;
                        }
                    }
                }
            }
        }
    }

    fn compare(&mut self, a: &impl Stream, b: &impl Stream) {
        let n = self.a.place.left().min(self.b.place.left()).min(12);
        let differ = (self.a.place.load(a) ^ self.b.place.load(b)) & ((1u128 << (8 * n)) - 1);
        let same = if differ == 0 { n } else { differ.trailing_zeros() as usize / 8 };
        self.a.place.offset += same;
        self.b.place.offset += same;
        self.bytes += same;
        if differ != 0 {
            self.a.place.unopen(a);
            self.b.place.unopen(b);
            self.part(false);
        }
    }

    /// The sides differ from here.
    fn part(&mut self, unknown: bool) {
        self.parted = Some(unknown);
        self.flags |= chunk::INVALID | if unknown { chunk::UNKNOWN } else { 0 };
        self.mismatches += 1;
        let at = |side: &Side| side.place.next.saturating_sub(usize::from(side.place.left() > 0));
        self.first_mismatch = self.first_mismatch.or(Some((at(&self.a), at(&self.b))));
    }

    /// Passes the unknown token that side `in_a` is about to open.
    fn unknown(&mut self, a: &impl Stream, b: &impl Stream, in_a: bool) {
        fn pass(this: &mut Side, other: &mut Side, to: &impl Stream) -> Option<usize> {
            this.place.next += 1;
            if other.place.left() > 0 {
                return None;
            }
            let mut at = other.place.next;
            while at < to.len() && word_kind(to.word(at)) == kind::EMPTY {
                at += 1;
            }
            if at == to.len() {
                return None;
            }
            if word_kind(to.word(at)) == kind::UNKNOWN {
                other.place.next = at + 1;
                return Some(0);
            }
            let end = to.word_end(at)?;
            other.place.next = end;
            Some((at..end).map(|i| word_len(to.word(i))).sum())
        }
        let passed = if in_a { pass(&mut self.a, &mut self.b, b) } else { pass(&mut self.b, &mut self.a, a) };
        match passed {
            Some(bytes) => {
                self.flags |= chunk::UNKNOWN;
                self.bytes += bytes;
            }
            None => {
                self.a.place.unopen(a);
                self.b.place.unopen(b);
                self.part(true);
            }
        }
    }

    /// Brings the sides together after a mismatch; a state to return, or None to go on.
    fn rejoin(
        &mut self,
        a: &impl Stream,
        b: &impl Stream,
        ended: bool,
        scratch: &mut Scratch,
        sink: &mut impl Sink,
    ) -> Option<State> {
        let damaged = self.parted == Some(false);
        match resync((a, self.a.place), (b, self.b.place), ended, damaged, scratch) {
            Found::Wait => Some(State::Wait),
            Found::Skip { a: skip_a, b: skip_b, replaced } => {
                self.a.place.skip(a, skip_a);
                self.b.place.skip(b, skip_b);
                self.bytes += skip_a;
                if replaced {
                    self.flags |= chunk::REPLACED;
                }
                self.parted = None;
                None
            }
            Found::Never => {
                self.a.place.next = a.len();
                self.b.place.next = b.len();
                self.emit(sink);
                Some(State::Done)
            }
        }
    }
}

enum Step {
    Content,
    Special,
    Unknown,
    End,
}

/// Opens the next token of a side whose token is read while the other's is not.
fn advance(side: &mut Side, other: &Place, own: &impl Stream, others: &impl Stream, prefix: Prefix) -> Step {
    if side.place.next == own.len() {
        return Step::End;
    }
    match word_kind(own.word(side.place.next)) {
        kind::SPECIAL => {
            side.place.next += 1;
            side.prefix |= prefix == Prefix::Every;
            Step::Special
        }
        kind::UNKNOWN => Step::Unknown,
        kind::EMPTY => {
            side.place.next += 1;
            Step::Content
        }
        _ => {
            let extra = side.prefix
                && other.left() > 0
                && first_byte(own, side.place.next) == b' '
                && other.load(others) as u8 != b' ';
            side.prefix = false;
            side.place.open(own, usize::from(extra));
            Step::Content
        }
    }
}
