//! Ahead of the walk: where both sides stand at a token end, whole stretches of plain content are aligned at once. Both
//! sides' bytes are spread out and compared in one piece, then the two lists of token ends are merged without branches.

use crate::xtok::stream::Stream;
use crate::xtok::vocab::{kind, word_is_plain, word_kind, word_len};
use crate::xtok::walk::Chunk;

/// Student tokens of the shortest and the longest stretch.
const LEAST: usize = 32;
const MOST: usize = 512;
/// Bytes of a stretch; 16 more can be written behind them.
const ROOM: usize = 8 * 1024;

/// Content tokens of one side, spread out.
#[derive(Default)]
struct Spread {
    bytes: Vec<u8>,
    /// Bytes up to the end of each token, `count` of them.
    ends: Vec<u32>,
    count: usize,
}

impl Spread {
    /// Takes up to `most` tokens, up to the first that reaches `enough` bytes or is no flawless content.
    fn fill(&mut self, stream: &impl Stream, from: usize, most: usize, enough: usize) -> bool {
        self.bytes.resize(ROOM + 16, 0);
        self.ends.resize(ROOM, 0);
        self.count = 0;
        let last = stream.len().min(from.saturating_add(most));
        let mut at = 0;
        for n in from..last {
            let word = stream.word(n);
            let len = word_len(word);
            if at >= enough || at + len > ROOM {
                return true;
            }
            if stream.flags(n) != 0 || word_kind(word) != kind::CONTENT {
                return false;
            }
            if word_is_plain(word) {
                self.bytes[at..at + 16].copy_from_slice(&(word >> 32).to_le_bytes());
            } else {
                let place = (word >> 32) as u32 as usize;
                self.bytes[at..at + len].copy_from_slice(&stream.long()[place..place + len]);
            }
            at += len;
            self.ends[self.count] = at as u32;
            self.count += 1;
        }
        last < stream.len()
    }

    fn ends(&self) -> &[u32] {
        &self.ends[..self.count]
    }

    fn len(&self) -> usize {
        self.ends().last().map_or(0, |end| *end as usize)
    }
}

/// Chunks without flags, one behind the other.
#[derive(Default)]
pub struct Stretch {
    ends: Vec<[u32; 3]>,
    count: usize,
    maps: (Vec<i32>, Vec<i32>),
}

impl Stretch {
    /// Tokens of both sides, and bytes, up to the end of each chunk.
    pub fn ends(&self) -> &[[u32; 3]] {
        &self.ends[..self.count]
    }

    /// Tokens of both sides.
    pub fn tokens(&self) -> (usize, usize) {
        self.ends().last().map_or((0, 0), |end| (end[0] as usize, end[1] as usize))
    }

    /// The chunk of each token, both sides.
    pub fn maps(&self) -> (&[i32], &[i32]) {
        let (a, b) = self.tokens();
        (&self.maps.0[..a], &self.maps.1[..b])
    }

    /// The chunks of a stretch that begins at these tokens.
    pub fn chunks(&self, (a, b): (usize, usize)) -> impl Iterator<Item = Chunk> + '_ {
        let mut last = [0; 3];
        self.ends().iter().map(move |end| {
            let from = std::mem::replace(&mut last, end.map(|n| n as usize));
            Chunk { a: (a + from[0], a + last[0]), b: (b + from[1], b + last[1]), flags: 0, bytes: last[2] - from[2] }
        })
    }

    /// Merges the token ends of both sides as far as their bytes agree.
    fn merge(&mut self, a: &[u32], b: &[u32], agreed: u32) {
        if self.ends.is_empty() {
            self.ends.resize(ROOM + 1, [0; 3]);
            self.maps.0.resize(ROOM, 0);
            self.maps.1.resize(ROOM, 0);
        }
        let (map_a, map_b) = (&mut self.maps.0[..a.len()], &mut self.maps.1[..b.len()]);
        let (mut i, mut j, mut count) = (0, 0, 0);
        while i < a.len() && j < b.len() {
            let (x, y) = (a[i], b[j]);
            if x.min(y) > agreed {
                break;
            }
            // written at every step: what belongs to no chunk lies behind the last one
            map_a[i] = count as i32;
            map_b[j] = count as i32;
            i += usize::from(x <= y);
            j += usize::from(y <= x);
            self.ends[count] = [i as u32, j as u32, x];
            count += usize::from(x == y);
        }
        self.count = count;
    }
}

/// Buffers, and how far to look.
#[derive(Default)]
pub struct Ahead {
    a: Spread,
    b: Spread,
    most: usize,
    pub stretch: Stretch,
}

impl Ahead {
    /// Aligns a stretch from `at` on, into `stretch`; whether there may be another behind it.
    pub fn look(&mut self, a: &impl Stream, b: &impl Stream, at: (usize, usize)) -> bool {
        self.most = self.most.clamp(LEAST, MOST);
        let a_goes_on = self.a.fill(a, at.0, self.most, ROOM);
        let b_goes_on = self.b.fill(b, at.1, usize::MAX, self.a.len());
        let both = self.a.len().min(self.b.len());
        let (x, y) = (&self.a.bytes[..both], &self.b.bytes[..both]);
        let agreed = if x == y { both } else { x.iter().zip(y).take_while(|(x, y)| x == y).count() };
        self.stretch.merge(self.a.ends(), self.b.ends(), agreed as u32);
        let goes_on = a_goes_on && b_goes_on && agreed == both && self.stretch.count > 0;
        self.most = if goes_on { 2 * self.most } else { LEAST };
        goes_on
    }
}
