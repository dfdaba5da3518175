//! Two vocabularies by their bytes: which ids say the same, and what a token is in the other's tokens.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use xxhash_rust::xxh3::xxh3_64;

use crate::xtok::vocab::kind;
use crate::xtok::vocab::{flag, push_bytes, word_kind, word_len, Kind, Vocab};

/// Hashes whole byte strings at once; `Hash` of a slice writes its length beside.
#[derive(Default)]
struct Xxh3(u64);

impl Hasher for Xxh3 {
    fn write(&mut self, bytes: &[u8]) {
        self.0 = self.0.rotate_left(23) ^ xxh3_64(bytes);
    }

    fn write_usize(&mut self, n: usize) {
        self.0 ^= (n as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// Ids by their bytes; of several ids the plainest: no byte fallback, no continuation, then the lowest.
struct Index<'a> {
    blob: &'a [u8],
    ids: HashMap<&'a [u8], u32, BuildHasherDefault<Xxh3>>,
    longest: usize,
}

/// All tokens' bytes and where each begins.
fn spread(vocab: &Vocab) -> (Vec<u8>, Vec<usize>) {
    let (mut blob, mut starts) = (Vec::new(), Vec::with_capacity(vocab.len() + 1));
    for word in &vocab.words {
        starts.push(blob.len());
        push_bytes(*word, &vocab.long, &mut blob);
    }
    starts.push(blob.len());
    (blob, starts)
}

impl<'a> Index<'a> {
    fn new(vocab: &Vocab, blob: &'a [u8], starts: &[usize]) -> Index<'a> {
        let mut ids: HashMap<&[u8], u32, _> = HashMap::with_capacity_and_hasher(vocab.len(), Default::default());
        let mut longest = 0;
        let rank = |id: u32| vocab.flags[id as usize] & (flag::BYTE | flag::CONTINUATION | flag::LOSSY);
        for id in 0..vocab.len() {
            if word_kind(vocab.words[id]) != kind::CONTENT {
                continue;
            }
            let bytes = &blob[starts[id]..starts[id + 1]];
            longest = longest.max(bytes.len());
            let kept = ids.entry(bytes).or_insert(id as u32);
            if rank(id as u32) < rank(*kept) {
                *kept = id as u32;
            }
        }
        Index { blob, ids, longest }
    }
}

/// Pairs (own id, other's id) of content tokens with the same bytes, by own id; one pair for each byte string.
pub fn matched(own: &Vocab, other: &Vocab) -> Vec<(u32, u32)> {
    let ((own_blob, own_starts), (other_blob, other_starts)) = (spread(own), spread(other));
    let (mine, theirs) = (Index::new(own, &own_blob, &own_starts), Index::new(other, &other_blob, &other_starts));
    let mut pairs: Vec<(u32, u32)> =
        mine.ids.iter().filter_map(|(bytes, id)| Some((*id, *theirs.ids.get(bytes)?))).collect();
    pairs.sort_unstable();
    pairs
}

/// A sparse matrix [own ids, other's ids] in rows.
pub struct Projection {
    pub row_ptr: Vec<i64>,
    pub columns: Vec<i32>,
    pub weights: Vec<f32>,
}

/// Each own token in the other's tokens: the first `k` of them, weights falling by `decay` from one to the next and
/// summing to 1. Special tokens, unknown ones and bytes that the other side cannot spell have empty rows.
pub fn projection(own: &Vocab, other: &Vocab, k: usize, decay: f32) -> Projection {
    let ((own_blob, own_starts), (other_blob, other_starts)) = (spread(own), spread(other));
    let index = Index::new(other, &other_blob, &other_starts);
    let mut out = Projection { row_ptr: vec![0], columns: Vec::new(), weights: Vec::new() };
    let mut pieces = Vec::new();
    for id in 0..own.len() {
        if word_kind(own.words[id]) == kind::CONTENT && word_len(own.words[id]) > 0 {
            index.tokenise(&own_blob[own_starts[id]..own_starts[id + 1]], other.rules.kind, &mut pieces);
            let n = pieces.len().min(k);
            let total: f32 = (0..n as i32).map(|i| decay.powi(i)).sum();
            for (i, piece) in pieces[..n].iter().enumerate() {
                out.columns.push(*piece as i32);
                out.weights.push(decay.powi(i as i32) / total);
            }
        }
        out.row_ptr.push(out.columns.len() as i64);
    }
    out
}

impl Index<'_> {
    fn find(&self, bytes: &[u8]) -> Option<u32> {
        self.ids.get(bytes).copied()
    }

    /// The tokens that spell `bytes`: the token itself, else by merging the pair of lowest id as byte-pair encoding
    /// does, or from the left by the longest token (WordPiece). Nothing when a byte has no token.
    fn tokenise(&self, bytes: &[u8], kind: Kind, out: &mut Vec<u32>) {
        debug_assert!(self.longest <= self.blob.len());
        out.clear();
        if let Some(id) = self.find(bytes) {
            out.push(id);
            return;
        }
        if kind == Kind::WordPiece {
            let mut at = 0;
            while at < bytes.len() {
                let longest = (1..=self.longest.min(bytes.len() - at)).rev();
                let Some((n, id)) = longest.filter_map(|n| Some((n, self.find(&bytes[at..at + n])?))).next() else {
                    out.clear();
                    return;
                };
                out.push(id);
                at += n;
            }
            return;
        }
        let mut cuts: Vec<usize> = (0..=bytes.len()).collect();
        loop {
            let best = (0..cuts.len().saturating_sub(2))
                .filter_map(|i| Some((self.find(&bytes[cuts[i]..cuts[i + 2]])?, i)))
                .min();
            let Some((_, i)) = best else { break };
            cuts.remove(i + 1);
        }
        for pair in cuts.windows(2) {
            match self.find(&bytes[pair[0]..pair[1]]) {
                Some(id) => out.push(id),
                None => {
                    out.clear();
                    return;
                }
            }
        }
    }
}
