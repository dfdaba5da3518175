//! A side whose tokenizer changes the text: its tokens are walked against the text as that tokenizer normalises it,
//! which groups them over segments of the original; the groups, with the original's bytes, then stand for the side.

use crate::xtok::normal::{each_piece, is_own_word, Step};
use crate::xtok::resync::Scratch;
use crate::xtok::stream::{Ids, Made, Stream};
use crate::xtok::vocab::{kind, push_bytes, word_kind, Prefix, Rules};
use crate::xtok::walk::{chunk, Chunk, Granularity, Options, Walk};

/// A text as a tokenizer normalises it, in tokens: single bytes where it is unchanged, whole pieces elsewhere.
#[derive(Default)]
pub struct Normalised {
    made: Made,
    /// Byte of the original behind each token.
    ends: Vec<u32>,
    /// The original.
    text: Vec<u8>,
}

impl Normalised {
    fn clear(&mut self) {
        self.made.clear();
        self.ends.clear();
        self.text.clear();
    }

    /// The text of a side that keeps all bytes. Its special tokens cut the text.
    pub fn from_ids(&mut self, ids: Ids<'_>, rules: &Rules) {
        self.clear();
        let mut from = 0;
        for at in 0..ids.len() {
            let word = ids.word(at);
            match word_kind(word) {
                kind::CONTENT => push_bytes(word, ids.long, &mut self.text),
                kind::SPECIAL => {
                    self.normalise(from, rules);
                    from = self.text.len();
                    self.made.push_special(ids.role(at));
                    self.ends.push(from as u32);
                }
                _ => {}
            }
        }
        // a character cut off at the end is no evidence of anything
        let cut = match std::str::from_utf8(&self.text[from..]) {
            Err(e) if e.error_len().is_none() => from + e.valid_up_to(),
            _ => self.text.len(),
        };
        self.text.truncate(cut);
        self.normalise(from, rules);
        self.made.seal();
    }

    pub fn from_text(&mut self, text: &str, rules: &Rules) {
        self.clear();
        self.text.extend(text.bytes());
        self.normalise(0, rules);
        self.made.seal();
    }

    /// Pushes the tokens of the original's bytes from `from` on.
    fn normalise(&mut self, from: usize, rules: &Rules) {
        let Normalised { made, ends, text } = self;
        let collapse = rules.normal.contains(&Step::CollapseSpaces);
        let (mut left, mut right) = (collapse, collapse);
        for step in &rules.normal {
            if let Step::Strip { left: l, right: r } = step {
                left |= *l;
                right |= *r;
            }
        }
        let chinese = rules.normal.iter().any(|s| matches!(s, Step::Bert { chinese: true, .. }));
        let mut at = from;
        let mut word_start = made.len();
        // a space is pending to be dropped: tokens from here on are trailing whitespace
        let mut trailing: Option<usize> = None;
        let mut began = false;
        each_piece(&text[from..], &rules.normal, |piece| {
            let space = !piece.text.is_empty() && piece.text.chars().all(char::is_whitespace);
            let own_word = rules.drops_space && piece.text.chars().next().is_some_and(|c| is_own_word(c, chinese));
            if rules.drops_space && (space || own_word) {
                close_word(made, word_start);
                word_start = made.len();
            }
            let again = collapse && trailing.is_some() && piece.text == " ";
            let dropped = piece.text.is_empty() || (space && (rules.drops_space || (left && !began) || again));
            if dropped {
                at += piece.len;
                made.push(&[], chunk::NORMALISED * u8::from(piece.text.is_empty()));
                ends.push(at as u32);
            } else if piece.changed {
                at += piece.len;
                trailing = if space { trailing.or(Some(made.len())) } else { None };
                made.push(piece.text.as_bytes(), chunk::NORMALISED);
                ends.push(at as u32);
            } else {
                trailing = if space { trailing.or(Some(made.len())) } else { None };
                for byte in piece.text.bytes() {
                    at += 1;
                    made.push(&[byte], 0);
                    ends.push(at as u32);
                }
            }
            began |= !dropped && !space;
            if rules.drops_space && (space || own_word) {
                close_word(made, word_start);
                word_start = made.len();
            }
        });
        if rules.drops_space {
            close_word(made, word_start);
        }
        if let (true, Some(first)) = (right, trailing) {
            (first..made.len()).for_each(|at| made.make_empty(at));
        }
    }
}

fn close_word(made: &mut Made, start: usize) {
    let end = made.len();
    // tokens before `start` that are in no word, such as special ones, end where they are
    while made.word_ends.len() < start {
        made.word_ends.push(made.word_ends.len() as u32 + 1);
    }
    made.word_ends.resize(end, end as u32);
}

/// Groups of a side's tokens, each over a stretch of the original text.
#[derive(Default)]
pub struct Groups {
    pub made: Made,
    /// Tokens of each group.
    pub ranges: Vec<(usize, usize)>,
    pub mismatches: u32,
    /// The side's tokens end before the text does; the text ends before the tokens do.
    pub truncated: (bool, bool),
    pub first_mismatch: Option<usize>,
    chunks: Vec<Chunk>,
}

impl Groups {
    pub fn make(&mut self, ids: Ids<'_>, own: Prefix, normal: &Normalised, texts: Prefix, scratch: &mut Scratch) {
        self.made.clear();
        self.ranges.clear();
        self.chunks.clear();
        let mut walk = Walk::new(Options { granularity: Granularity::Byte, prefix: (own, texts) });
        let chunks = &mut self.chunks;
        walk.run(&ids, &normal.made, true, scratch, &mut |c: Chunk| chunks.push(c));
        self.mismatches = walk.mismatches;
        self.truncated = walk.truncated;
        self.first_mismatch = walk.first_mismatch.map(|(at, _)| at);
        let mut from = 0;
        for (n, c) in self.chunks.iter().enumerate() {
            if c.flags & chunk::SPECIAL != 0 {
                self.made.push_special(ids.role(c.a.0));
                self.ranges.push(c.a);
                continue;
            }
            let mut last = c.b.1;
            let next = self.chunks.get(n + 1).map(|c| c.b.0);
            if next != Some(last) {
                let made = &normal.made;
                let mut at = last;
                while at < made.len() && word_kind(made.word(at)) == kind::EMPTY {
                    at += 1;
                }
                if at == made.len() || word_kind(made.word(at)) == kind::SPECIAL {
                    last = at;
                }
            }
            let end = last.checked_sub(1).map_or(0, |at| normal.ends[at] as usize);
            self.made.push(&normal.text[from.min(end)..end], c.flags);
            self.ranges.push(c.a);
            from = end;
        }
        self.made.seal();
    }

    /// Tokens of a range of groups; `before`: where an empty range lies.
    pub fn tokens(&self, groups: (usize, usize), before: usize) -> (usize, usize) {
        if groups.0 == groups.1 {
            (before, before)
        } else {
            (self.ranges[groups.0].0, self.ranges[groups.1 - 1].1)
        }
    }
}
