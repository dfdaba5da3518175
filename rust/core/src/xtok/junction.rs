//! Where both sides stand at a token end after the same bytes: chunks close, special tokens pair, prefix spaces go.

use crate::xtok::resync::Scratch;
use crate::xtok::stream::{first_byte, spaces, Place, Stream};
use crate::xtok::vocab::{kind, word_kind, Prefix, Word};
use crate::xtok::walk::{chunk, Chunk, Granularity, Sink, State, Walk};

impl Walk {
    /// Closes the chunk, runs ahead through plain content, passes special tokens, drops a prefix space. A state to
    /// return, or None to go on.
    pub(super) fn junction(
        &mut self,
        a: &impl Stream,
        b: &impl Stream,
        ended: bool,
        scratch: &mut Scratch,
        sink: &mut impl Sink,
    ) -> Option<State> {
        if self.is_open() {
            match self.may_close(a, b, ended) {
                Some(true) => self.emit(sink),
                Some(false) => {}
                None => return Some(State::Wait),
            }
        }
        let is_byte = self.options.granularity == Granularity::Byte;
        loop {
            let here = (self.a.place.next, self.b.place.next);
            if is_byte && !self.a.prefix && !self.b.prefix && !self.is_open() && self.start == here {
                self.run_ahead(a, b, scratch, sink);
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

    fn run_ahead(&mut self, a: &impl Stream, b: &impl Stream, scratch: &mut Scratch, sink: &mut impl Sink) {
        let mut goes_on = true;
        while goes_on {
            goes_on = scratch.ahead.look(a, b, self.start);
            sink.stretch(self.start, &scratch.ahead.stretch);
            let (x, y) = scratch.ahead.stretch.tokens();
            self.start = (self.start.0 + x, self.start.1 + y);
        }
        self.a.place.stand(a, self.start.0);
        self.b.place.stand(b, self.start.1);
    }

    /// Opens the next content behind its first byte.
    fn drop_space(&mut self, stream: &impl Stream, in_a: bool) {
        let side = if in_a { &mut self.a } else { &mut self.b };
        side.place.next = side.place.next_content(stream);
        side.place.open(stream, 1);
        self.flags |= stream.flags(side.place.next - 1);
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
        // where the texts part behind this place, a word of either side begins one
        Some(
            self.options.granularity == Granularity::Word
                && (begins_with_space(a, x) || begins_with_space(b, y))
                && !self.a.place.byte_before(a, 1).is_some_and(|byte| byte.is_ascii_whitespace()),
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

fn begins_with_space(stream: &impl Stream, at: usize) -> bool {
    word_kind(stream.word(at)) == kind::CONTENT && first_byte(stream, at).is_ascii_whitespace()
}
