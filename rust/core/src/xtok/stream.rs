//! What a walk reads: tokens as words, from ids over a vocabulary or made up from a text.

use crate::xtok::vocab::{kind, load, make_word, word_is_long, word_kind, word_len, Word};

pub trait Stream {
    fn len(&self) -> usize;
    fn is_empty(&self) -> bool {
        self.len() == 0
    }
    fn word(&self, at: usize) -> Word;
    /// Bytes of the long tokens.
    fn long(&self) -> &[u8];
    /// Role of a special token, 0 for none; specials of one role pair across the sides.
    fn role(&self, at: usize) -> u16;
    /// The token behind the word that begins at `at`, where the stream knows words.
    fn word_end(&self, _at: usize) -> Option<usize> {
        None
    }
    /// Chunk flags that the token brings along.
    fn flags(&self, _at: usize) -> u8 {
        0
    }
}

/// Ids of a vocabulary, every one checked to be inside it.
#[derive(Clone, Copy)]
pub struct Ids<'a> {
    pub ids: &'a [i32],
    pub words: &'a [Word],
    pub long: &'a [u8],
    pub roles: &'a [u16],
}

impl Stream for Ids<'_> {
    fn len(&self) -> usize {
        self.ids.len()
    }

    #[inline]
    fn word(&self, at: usize) -> Word {
        self.words[self.ids[at] as usize]
    }

    fn long(&self) -> &[u8] {
        self.long
    }

    fn role(&self, at: usize) -> u16 {
        self.roles[self.ids[at] as usize]
    }
}

/// Tokens made of text: normalised pieces, or groups of a lossy side's tokens with the text they cover.
#[derive(Default)]
pub struct Made {
    words: Vec<Word>,
    long: Vec<u8>,
    roles: Vec<u16>,
    flags: Vec<u8>,
    /// Token behind the word; empty where words are not known.
    pub word_ends: Vec<u32>,
}

impl Made {
    pub fn clear(&mut self) {
        self.words.clear();
        self.long.clear();
        self.roles.clear();
        self.flags.clear();
        self.word_ends.clear();
    }

    pub fn push(&mut self, bytes: &[u8], flags: u8) {
        let what = if bytes.is_empty() { kind::EMPTY } else { kind::CONTENT };
        self.push_kind(bytes, what, 0, flags);
    }

    pub fn push_special(&mut self, role: u16) {
        self.push_kind(&[], kind::SPECIAL, role, 0);
    }

    fn push_kind(&mut self, bytes: &[u8], kind: u8, role: u16, flags: u8) {
        self.words.push(make_word(bytes, kind, &mut self.long));
        self.roles.push(role);
        self.flags.push(flags);
    }

    /// Turns a token into one without bytes.
    pub fn make_empty(&mut self, at: usize) {
        self.words[at] = Word::from(kind::EMPTY) << 16;
    }

    /// To be called once all is pushed.
    pub fn seal(&mut self) {
        self.long.extend([0; 16]);
    }
}

impl Stream for Made {
    fn len(&self) -> usize {
        self.words.len()
    }

    fn word(&self, at: usize) -> Word {
        self.words[at]
    }

    fn long(&self) -> &[u8] {
        &self.long
    }

    fn role(&self, at: usize) -> u16 {
        self.roles[at]
    }

    fn word_end(&self, at: usize) -> Option<usize> {
        self.word_ends.get(at).map(|end| *end as usize)
    }

    fn flags(&self, at: usize) -> u8 {
        self.flags[at]
    }
}

/// A place in a stream: the open token, how far it is read, and the token to open next.
#[derive(Debug, Clone, Copy, Default)]
pub struct Place {
    pub word: Word,
    pub offset: usize,
    pub len: usize,
    pub next: usize,
}

impl Place {
    pub fn left(&self) -> usize {
        self.len - self.offset
    }

    /// Opens the next token, `offset` bytes in.
    #[inline]
    pub fn open(&mut self, stream: &impl Stream, offset: usize) {
        self.word = stream.word(self.next);
        self.len = word_len(self.word);
        self.offset = offset.min(self.len);
        self.next += 1;
    }

    /// Up to 12 bytes from here on; those past `left()` are arbitrary.
    #[inline]
    pub fn load(&self, stream: &impl Stream) -> u128 {
        load(self.word, stream.long(), self.offset)
    }

    /// Stands behind the token before `next`.
    pub fn stand(&mut self, stream: &impl Stream, next: usize) {
        self.next = next;
        self.word = next.checked_sub(1).map_or(0, |at| stream.word(at));
        self.len = word_len(self.word);
        self.offset = self.len;
    }

    /// Closes a token that nothing was read of.
    pub fn unopen(&mut self, stream: &impl Stream) {
        if self.offset == 0 && self.len > 0 {
            self.stand(stream, self.next - 1);
        }
    }

    /// Appends content bytes from here on until `out` holds `want` of them; true when the stream ended before.
    pub fn gather(mut self, stream: &impl Stream, want: usize, out: &mut Vec<u8>) -> bool {
        loop {
            while self.left() > 0 && out.len() < want {
                let n = self.left().min(12);
                out.extend_from_slice(&self.load(stream).to_le_bytes()[..n]);
                self.offset += n;
            }
            if out.len() >= want {
                out.truncate(want);
                return false;
            }
            if self.next == stream.len() {
                return true;
            }
            self.open(stream, 0);
            if word_kind(self.word) != kind::CONTENT {
                self.offset = self.len;
            }
        }
    }

    /// Passes over `bytes` bytes of content, and the special tokens among them.
    pub fn skip(&mut self, stream: &impl Stream, mut bytes: usize) {
        loop {
            let n = self.left().min(bytes);
            self.offset += n;
            bytes -= n;
            if bytes == 0 || self.next == stream.len() {
                return;
            }
            self.open(stream, 0);
            if word_kind(self.word) != kind::CONTENT {
                self.offset = self.len;
            }
        }
    }

    /// The `back`-th content byte before this place, 1 the nearest.
    pub fn byte_before(&self, stream: &impl Stream, mut back: usize) -> Option<u8> {
        let (mut at, mut end) = (self.next.checked_sub(1)?, self.offset);
        loop {
            let word = stream.word(at);
            if word_kind(word) == kind::CONTENT {
                if back <= end {
                    return Some(load(word, stream.long(), end - back) as u8);
                }
                back -= end;
            }
            at = at.checked_sub(1)?;
            end = word_len(stream.word(at));
        }
    }

    /// The next token that is neither empty nor special, from `next` on; the length where there is none.
    pub fn next_content(&self, stream: &impl Stream) -> usize {
        let mut at = self.next;
        while at < stream.len() && matches!(word_kind(stream.word(at)), kind::SPECIAL | kind::EMPTY) {
            at += 1;
        }
        at
    }
}

/// The first byte of a content token.
pub fn first_byte(stream: &impl Stream, at: usize) -> u8 {
    load(stream.word(at), stream.long(), 0) as u8
}

/// Whether every byte of a token is a space, and how many they are.
pub fn spaces(stream: &impl Stream, at: usize) -> (bool, usize) {
    let word = stream.word(at);
    let len = word_len(word);
    let step = if word_is_long(word) { 12 } else { len.max(1) };
    let mut n = 0;
    while n < len {
        let bytes = load(word, stream.long(), n).to_le_bytes();
        for byte in &bytes[..step.min(len - n)] {
            if *byte != b' ' {
                return (false, n);
            }
            n += 1;
        }
    }
    (true, len)
}
