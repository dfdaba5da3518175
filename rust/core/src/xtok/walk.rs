//! The walk: two token streams, their bytes compared as they pass, cut into the smallest chunks of equal bytes.
//!
//! A boundary is where both sides end a token after the same bytes. Special tokens are no content: runs of them pair by
//! role where both sides stand at the same place, and are passed over elsewhere. Where bytes differ the open chunk turns
//! invalid, the sides are brought together again (`resync`), and the next common token end closes it.

use crate::xtok::resync::{resync, Found, Scratch};
use crate::xtok::stream::{first_byte, spaces, Place, Stream};
use crate::xtok::vocab::{kind, word_is_plain, word_kind, word_len, Prefix, Word};

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
struct Side {
    place: Place,
    /// A space may stand before the next content that the other side lacks.
    prefix: bool,
}

/// A walk over two streams that may grow between calls of `run`.
#[derive(Debug)]
pub struct Walk {
    a: Side,
    b: Side,
    start: (usize, usize),
    bytes: usize,
    flags: u8,
    /// The sides have parted and are not together again; whether an unknown token is why.
    parted: Option<bool>,
    options: Options,
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

    fn is_open(&self) -> bool {
        self.bytes > 0 || self.flags & (chunk::INVALID | chunk::UNKNOWN) != 0
    }

    fn emit(&mut self, sink: &mut impl Sink) {
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
                if let Some(state) = self.junction(a, b, ended, sink) {
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

    /// Both sides stand at a token end after the same bytes: closes the chunk, passes special tokens, drops a prefix
    /// space, and runs through equal tokens. A state to return, or None to go on.
    fn junction(&mut self, a: &impl Stream, b: &impl Stream, ended: bool, sink: &mut impl Sink) -> Option<State> {
        if self.is_open() {
            match self.may_close(a, b, ended) {
                Some(true) => self.emit(sink),
                Some(false) => {}
                None => return Some(State::Wait),
            }
        }
        let is_byte = self.options.granularity == Granularity::Byte;
        loop {
            if is_byte && !self.a.prefix && !self.b.prefix {
                self.equal_tokens(a, b, sink);
            }
            let (mut x, mut y) = (self.a.place, self.b.place);
            let (x_next, y_next) = (x.next_content(a), y.next_content(b));
            let (x_end, y_end) = (x_next == a.len(), y_next == b.len());
            let specials = |from: usize, to: usize, s: &dyn Fn(usize) -> Word| {
                (from..to).any(|at| word_kind(s(at)) == kind::SPECIAL)
            };
            let in_a = x_next > x.next && specials(x.next, x_next, &|at| a.word(at));
            let in_b = y_next > y.next && specials(y.next, y_next, &|at| b.word(at));
            if (x_end || y_end) && !ended {
                return Some(State::Wait);
            }
            if in_a || in_b {
                self.pass_specials(a, b, (x_next, y_next), sink);
                self.a.prefix |= in_a && self.options.prefix.0 == Prefix::Every;
                self.b.prefix |= in_b && self.options.prefix.1 == Prefix::Every;
                (x, y) = (self.a.place, self.b.place);
            }
            if x_end || y_end {
                self.truncated = (x_end && !y_end, y_end && !x_end);
                return Some(State::Done);
            }
            if self.a.prefix || self.b.prefix {
                let (Some(in_a), Some(in_b)) = (leading_spaces(a, x.next, ended), leading_spaces(b, y.next, ended))
                else {
                    return Some(State::Wait);
                };
                if self.a.prefix && in_a == in_b + 1 {
                    self.drop_space(a, true);
                } else if self.b.prefix && in_b == in_a + 1 {
                    self.drop_space(b, false);
                }
                self.a.prefix = false;
                self.b.prefix = false;
                if self.a.place.left() == 0 && self.b.place.left() == 0 {
                    continue;
                }
            }
            break;
        }
        None
    }

    /// Opens the next content behind its first byte.
    fn drop_space(&mut self, stream: &impl Stream, in_a: bool) {
        let side = if in_a { &mut self.a } else { &mut self.b };
        side.place.next = side.place.next_content(stream);
        side.place.open(stream, 1);
        self.flags |= stream.flags(side.place.next - 1);
    }

    /// The common case: both sides have the same short token.
    #[inline]
    fn equal_tokens(&mut self, a: &impl Stream, b: &impl Stream, sink: &mut impl Sink) {
        let (mut i, mut j) = (self.a.place.next, self.b.place.next);
        if self.is_open() || self.start != (i, j) {
            return;
        }
        let ends = (a.len(), b.len());
        while i < ends.0 && j < ends.1 {
            let word = a.word(i);
            if word != b.word(j) || !word_is_plain(word) {
                break;
            }
            sink.chunk(Chunk { a: (i, i + 1), b: (j, j + 1), flags: a.flags(i) | b.flags(j), bytes: word_len(word) });
            i += 1;
            j += 1;
        }
        self.a.place.next = i;
        self.b.place.next = j;
        self.start = (i, j);
    }

    /// Whether the open chunk may end here; None when what follows must be known first.
    fn may_close(&self, a: &impl Stream, b: &impl Stream, ended: bool) -> Option<bool> {
        if self.flags & chunk::INVALID != 0 {
            return Some(true);
        }
        match self.options.granularity {
            Granularity::Byte => return Some(true),
            Granularity::Char if ends_character(a, &self.a.place, self.bytes) => return Some(true),
            Granularity::MinBytes(n) if self.bytes >= n => return Some(true),
            _ => {}
        }
        let (x, y) = (self.a.place.next_content(a), self.b.place.next_content(b));
        if (x == a.len() || y == b.len()) && !ended {
            return None;
        }
        if x == a.len() || y == b.len() {
            return Some(x == a.len() && y == b.len());
        }
        let is_space = |byte: u8| byte.is_ascii_whitespace();
        Some(
            self.options.granularity == Granularity::Word
                && word_kind(a.word(x)) == kind::CONTENT
                && is_space(first_byte(a, x))
                && !self.a.place.byte_before(a, 1).is_some_and(is_space),
        )
    }

    /// Pairs by role the special tokens up to `next`, and leaves the others out.
    fn pass_specials(&mut self, a: &impl Stream, b: &impl Stream, next: (usize, usize), sink: &mut impl Sink) {
        let (mut i, mut j) = (self.a.place.next, self.b.place.next);
        let role = |stream: &dyn Fn(usize) -> (u8, u16), at: usize| {
            let (what, role) = stream(at);
            if what == kind::SPECIAL {
                role
            } else {
                0
            }
        };
        let (of_a, of_b) = (|at| (word_kind(a.word(at)), a.role(at)), |at| (word_kind(b.word(at)), b.role(at)));
        while i < next.0 && j < next.1 {
            let (x, y) = (role(&of_a, i), role(&of_b, j));
            if x == 0 || y == 0 {
                i += usize::from(x == 0);
                j += usize::from(y == 0);
                continue;
            }
            if x != y {
                // the token whose partner comes later waits; runs are short
                let later = (j + 1..next.1).any(|at| role(&of_b, at) == x);
                i += usize::from(!later);
                j += usize::from(later);
                continue;
            }
            if self.is_open() {
                self.emit(sink);
            }
            sink.chunk(Chunk { a: (i, i + 1), b: (j, j + 1), flags: chunk::SPECIAL, bytes: 0 });
            i += 1;
            j += 1;
        }
        self.a.place.next = next.0;
        self.b.place.next = next.1;
        if self.is_open() {
            self.flags |= chunk::INTERRUPTED;
        } else {
            self.start = next;
            self.flags = 0;
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

/// Spaces that the content from `at` on begins with; None when they may go on beyond the tokens at hand.
fn leading_spaces(stream: &impl Stream, mut at: usize, ended: bool) -> Option<usize> {
    let mut n = 0;
    while at < stream.len() {
        match word_kind(stream.word(at)) {
            kind::EMPTY => {}
            kind::CONTENT => {
                let (all, spaces) = spaces(stream, at);
                n += spaces;
                if !all {
                    return Some(n);
                }
            }
            _ => return Some(n),
        }
        at += 1;
    }
    ended.then_some(n)
}

/// Whether the last of `bytes` bytes before `place` ends a character; bytes that are no UTF-8 count as characters.
fn ends_character(stream: &impl Stream, place: &Place, bytes: usize) -> bool {
    for back in 1..=bytes.min(4) {
        match place.byte_before(stream, back) {
            Some(0x80..=0xBF) => {}
            Some(lead) => {
                let len = match lead {
                    0xC2..=0xDF => 2,
                    0xE0..=0xEF => 3,
                    0xF0..=0xF4 => 4,
                    _ => 1,
                };
                return len <= back;
            }
            None => return true,
        }
    }
    true
}
