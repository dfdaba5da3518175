//! Alignment of arbitrary vocabularies: the input says how both sides cut a text, what is odd about their tokens and
//! where the texts differ. Checked is what holds of every alignment, that swapped sides of plain tokens give swapped chunks, and that
//! tokens coming in one by one give the chunks of the whole row.

use std::sync::Arc;

use potstill_core::xtok::normal::Step;
use potstill_core::xtok::push::Push;
use potstill_core::xtok::vocab::{flag, kind, word_kind, Builder, Kind, Prefix, Rules};
use potstill_core::xtok::walk::chunk;
use potstill_core::xtok::{Aligned, Aligner, Granularity, OnMismatch, Row, Vocab};

/// Bytes front to back, zeros behind the last.
struct Bytes<'a>(&'a [u8]);

impl<'a> Bytes<'a> {
    fn next(&mut self) -> u8 {
        self.take(1).first().copied().unwrap_or(0)
    }

    fn take(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n.min(self.0.len()));
        self.0 = rest;
        head
    }
}

struct Side {
    vocab: Arc<Vocab>,
    ids: Vec<i32>,
}

fn rules(byte: u8) -> Rules {
    let mut rules = Rules::new(Kind::Given);
    rules.prefix = [Prefix::Never, Prefix::First, Prefix::Every, Prefix::Never][usize::from(byte & 3)];
    rules.drops_space = byte & 4 != 0;
    rules.normal = match byte >> 3 & 7 {
        0..=2 => Vec::new(),
        3 => vec![Step::Nfc],
        4 => vec![Step::Nfkc, Step::Lowercase],
        5 => vec![Step::Bert { clean: true, chinese: true, strip: true, lower: true }],
        6 => vec![Step::Replace { from: "``".into(), to: "\"".into() }, Step::CollapseSpaces],
        _ => vec![Step::Nmt, Step::StripAccents, Step::Strip { left: true, right: true }],
    };
    rules
}

// one id a token; a head says how many bytes it takes of the text and whether it is special, unknown or long
fn side(heads: &[u8], text: &[u8], mut rules: Rules) -> Option<Side> {
    let (mut builder, mut text) = (Builder::default(), Bytes(text));
    for (id, head) in heads.iter().enumerate() {
        let len = usize::from(head & 31);
        let (flags, bytes) = match head >> 5 {
            5 => (flag::SPECIAL, ["<s>", "</s>", "<pad>", "<t>"][len % 4].as_bytes()),
            6 => (flag::UNKNOWN, text.take(len)),
            7 => (0, text.take(2 * len)),
            _ => (0, text.take(len)),
        };
        if flags != flag::SPECIAL && len > 0 && bytes.is_empty() {
            break; // the text is used up
        }
        if flags == flag::SPECIAL && len % 4 < 3 {
            rules.roles.push((["bos", "eos", "pad"][len % 4].into(), id as u32));
        }
        builder.set(id as u64, flags, |out| out.extend_from_slice(bytes)).ok()?;
    }
    let ids = (0..builder.len() as i32).collect();
    Some(Side { vocab: Arc::new(builder.finish(rules, 0)), ids })
}

impl Side {
    fn kind(&self, at: usize) -> u8 {
        word_kind(self.vocab.words[self.ids[at] as usize])
    }

    /// Content bytes of a range of tokens.
    fn bytes(&self, from: usize, to: usize) -> Vec<u8> {
        let mut out = Vec::new();
        let content = (from..to).filter(|at| self.kind(*at) == kind::CONTENT);
        content.for_each(|at| self.vocab.bytes(self.ids[at] as usize, &mut out));
        out
    }
}

/// Options, rules of both sides, numbers of tokens, where the teacher's text begins and which byte of it differs (8 bytes);
/// a head for each token; the text.
pub fn align(data: &[u8]) {
    let mut data = Bytes(data);
    let options = data.next();
    let both_rules = (rules(data.next()), rules(data.next()));
    let counts = (usize::from(data.next() & 127), usize::from(data.next() & 127));
    let (skip, place, change) = (usize::from(data.next() & 31), usize::from(data.next()), data.next());
    let heads = (data.take(counts.0), data.take(counts.1));
    let mut other = data.0.get(skip..).unwrap_or_default().to_vec();
    if let Some(byte) = other.get_mut(place) {
        *byte ^= change;
    }
    let (Some(s), Some(t)) = (side(heads.0, data.0, both_rules.0), side(heads.1, &other, both_rules.1)) else { return };
    let granularity = match options & 3 {
        0 => Granularity::Byte,
        1 => Granularity::Char,
        2 => Granularity::Word,
        _ => Granularity::MinBytes(usize::from(options >> 5) + 1),
    };
    let on_mismatch = [OnMismatch::Resync, OnMismatch::Resync, OnMismatch::Drop, OnMismatch::Error];
    let on_mismatch = on_mismatch[usize::from(options >> 2 & 3)];
    let parts = i64::from(options >> 6) + 1;
    let cut = |n: usize, part: i64| n as i64 * part / parts;
    let segments: Vec<[i64; 4]> = (0..parts)
        .map(|p| [cut(s.ids.len(), p), cut(s.ids.len(), p + 1), cut(t.ids.len(), p), cut(t.ids.len(), p + 1)])
        .collect();
    let texts: Option<Vec<String>> = (options & 16 != 0).then(|| {
        let bytes = segments.iter().map(|seg| s.bytes(seg[0] as usize, seg[1] as usize));
        bytes.map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).collect()
    });
    run(&s, &t, granularity, on_mismatch, &segments, texts.as_deref());
}

type Maps = (Vec<i32>, Vec<i32>);

fn aligned(
    aligner: &Aligner,
    s: &Side,
    t: &Side,
    segments: &[[i64; 4]],
    texts: Option<&[String]>,
) -> Option<(Aligned, Maps)> {
    let mut maps = (vec![7; s.ids.len()], vec![7; t.ids.len()]);
    let rows = [Row { student: &s.ids, teacher: &t.ids, segments, texts }];
    let found = aligner.align(&rows, (&mut maps.0, &mut maps.1), 1).ok()?;
    Some((found, maps))
}

fn run(
    s: &Side,
    t: &Side,
    granularity: Granularity,
    on_mismatch: OnMismatch,
    segments: &[[i64; 4]],
    texts: Option<&[String]>,
) {
    let new = |a: &Side, b: &Side| Aligner::new(a.vocab.clone(), b.vocab.clone(), &[], granularity, on_mismatch);
    let Ok(aligner) = new(s, t) else { return };
    let Some((found, maps)) = aligned(&aligner, s, t, segments, texts) else { return };
    check(s, t, segments, &found, &maps);
    if s.vocab.is_lossy() || t.vocab.is_lossy() || on_mismatch == OnMismatch::Drop {
        return;
    }
    let odd = |side: &Side| (0..side.ids.len()).any(|at| matches!(side.kind(at), kind::SPECIAL | kind::EMPTY));
    // specials in another order on each side pair as they come; tokens without bytes belong to either of two chunks
    if !odd(s) && !odd(t) {
        let swapped: Vec<[i64; 4]> = segments.iter().map(|[s0, s1, t0, t1]| [*t0, *t1, *s0, *s1]).collect();
        let back = new(t, s).ok().and_then(|aligner| aligned(&aligner, t, s, &swapped, texts));
        let (back, back_maps) = back.expect("the sides swapped");
        let turned: Vec<[i32; 4]> = back.spans.iter().map(|[t0, t1, s0, s1]| [*s0, *s1, *t0, *t1]).collect();
        assert_eq!((&found.spans, &found.flags), (&turned, &back.flags), "swapped");
        assert_eq!(maps, (back_maps.1, back_maps.0), "swapped");
    }
    if let ([_], Ok(mut push)) = (segments, Push::new(&aligner)) {
        let most = s.ids.len().max(t.ids.len());
        for at in 0..=most {
            let one = |ids: &[i32]| ids.get(at..at + 1).unwrap_or_default().to_vec();
            push.push(&aligner, &one(&s.ids), &one(&t.ids), at == most).expect("a token");
        }
        assert_eq!((&push.out().spans, &push.out().flags), (&found.spans, &found.flags), "token by token");
        assert_eq!(push.maps(), (&maps.0[..], &maps.1[..]), "token by token");
    }
}

// what holds of every alignment
fn check(s: &Side, t: &Side, segments: &[[i64; 4]], found: &Aligned, maps: &Maps) {
    let chunks = found.spans.len();
    assert_eq!((found.flags.len(), found.bytes.len(), &found.counts), (chunks, chunks, &vec![chunks]));
    let lossy = s.vocab.is_lossy() || t.vocab.is_lossy();
    let mut last = (0, 0);
    for (n, span) in found.spans.iter().enumerate() {
        let [s0, s1, t0, t1] = span.map(|at| at as usize);
        let (flags, bytes) = (found.flags[n], found.bytes[n]);
        assert!(last.0 <= s0 && s0 <= s1 && last.1 <= t0 && t0 <= t1, "{span:?} after {last:?}");
        assert!(s1 > s0 || t1 > t0, "{span:?} is empty");
        let inside = |seg: &[i64; 4]| {
            seg[0] as usize <= s0 && s1 <= seg[1] as usize && seg[2] as usize <= t0 && t1 <= seg[3] as usize
        };
        assert!(segments.iter().any(inside), "{span:?} is in no segment of {segments:?}");
        assert!(flags & chunk::INVALID == 0 || found.mismatches[0] > 0, "{span:?} is invalid");
        last = (s1, t1);
        if flags & chunk::SPECIAL != 0 {
            assert!(
                (s1 - s0, t1 - t0, bytes) == (1, 1, 0) && s.kind(s0) == kind::SPECIAL && t.kind(t0) == kind::SPECIAL
            );
        } else if flags == 0 && !lossy {
            let (x, y) = (s.bytes(s0, s1), t.bytes(t0, t1));
            let space = |more: &[u8], less: &[u8], prefix: Prefix| {
                prefix != Prefix::Never && more.first() == Some(&b' ') && more[1..] == *less
            };
            assert!(
                x == y || space(&x, &y, s.vocab.rules.prefix) || space(&y, &x, t.vocab.rules.prefix),
                "{span:?}: {x:?} and {y:?}"
            );
            assert_eq!(bytes as usize, x.len().min(y.len()), "{span:?}");
        }
    }
    for (side, map, of) in [(s, &maps.0, 0), (t, &maps.1, 2)] {
        let mut before = 0;
        for (at, chunk) in map.iter().enumerate().filter(|(_, chunk)| **chunk != -1) {
            let span = found.spans[*chunk as usize];
            assert!((span[of]..span[of + 1]).contains(&(at as i32)), "token {at} in {span:?}");
            assert!(*chunk >= before, "token {at}");
            before = *chunk;
        }
        for (n, span) in found.spans.iter().enumerate() {
            let mut tokens = span[of] as usize..span[of + 1] as usize;
            let belongs = |at: usize| map[at] == n as i32 || side.kind(at) == kind::SPECIAL;
            assert!(tokens.all(belongs), "a token of {span:?} is in another chunk");
        }
    }
}

/// Inputs by name: a text cut twice, the same with specials, differences, prefixes and normalisation.
pub fn align_seeds() -> Vec<(String, Vec<u8>)> {
    let text =
        "the  cat sat é 日本 \u{FFFD}on\nthe mat, and the other cat sat on the other mat, and so on and on.".as_bytes();
    let heads = |lens: &[u8]| -> Vec<u8> { lens.iter().cycle().take(40).copied().collect() };
    let mut found = Vec::new();
    for (n, (options, rules, changed)) in [
        (0, [0, 0], [0, 0, 0]),
        (1, [0, 1], [0, 0, 0]),
        (2, [2, 0], [1, 0, 0]),
        (3, [0, 0], [0, 9, 0xFF]),
        (0, [0, 4], [0, 20, 3]),
        (16, [5, 37], [0, 0, 0]),
        (192, [24, 32], [3, 40, 1]),
        (8, [40, 0], [0, 0, 0]),
        (0, [48, 56], [0, 0, 0]),
    ]
    .into_iter()
    .enumerate()
    {
        for (cuts, (a, b)) in
            [(&[3u8, 1, 4][..], &[1u8, 5, 2, 9][..]), (&[160, 4, 2], &[163, 3, 3, 193, 0, 160])].into_iter().enumerate()
        {
            let start = [options, rules[0], rules[1], 40, 40, changed[0], changed[1], changed[2]];
            found.push((format!("seed-{n}-{cuts}"), [&start[..], &heads(a), &heads(b), text].concat()));
        }
    }
    found
}
