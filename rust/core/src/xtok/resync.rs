//! Where two byte streams agree again after they have parted.

use xxhash_rust::xxh3::xxh3_64;

use crate::xtok::ahead::Ahead;
use crate::xtok::stream::{Place, Stream};

/// Bytes that must agree for two places to count as the same.
const ANCHOR: usize = 16;
/// The same where bytes that are no UTF-8 explain the difference.
const SHORT_ANCHOR: usize = 8;
const WINDOW: usize = 64;
const REPLACEMENT: &[u8; 3] = b"\xEF\xBF\xBD";

/// Buffers of a thread, kept between mismatches and rows.
#[derive(Default)]
pub struct Scratch {
    pub ahead: Ahead,
    a: Vec<u8>,
    b: Vec<u8>,
    /// Place + 1 of the first anchor of a hash, 0 for none.
    table: Vec<u32>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Bytes to skip on both sides; `replaced`: one side's U+FFFD stands for the other's invalid bytes.
    Skip { a: usize, b: usize, replaced: bool },
    /// They never agree again.
    Never,
    /// More tokens are needed to tell.
    Wait,
}

/// `ended`: no tokens will follow. `damaged`: the places are where bytes differ, not where a token is unknown.
pub fn resync(
    a: (&impl Stream, Place),
    b: (&impl Stream, Place),
    ended: bool,
    damaged: bool,
    scratch: &mut Scratch,
) -> Found {
    let mut window = WINDOW;
    loop {
        scratch.a.clear();
        scratch.b.clear();
        let ends = (a.1.gather(a.0, window, &mut scratch.a), b.1.gather(b.0, window, &mut scratch.b));
        if !ended && (ends.0 || ends.1) {
            return Found::Wait;
        }
        if damaged && window == WINDOW {
            if let Some((skip_a, skip_b)) = replacement(a, b, scratch) {
                return Found::Skip { a: skip_a, b: skip_b, replaced: true };
            }
            if let Some((a, b)) = invalid(&scratch.a, &scratch.b) {
                return Found::Skip { a, b, replaced: false };
            }
        }
        let both_end = ends.0 && ends.1;
        if let Some((a, b)) = search(scratch, both_end) {
            if a + b + ANCHOR <= window || both_end {
                return Found::Skip { a, b, replaced: false };
            }
        } else if both_end {
            return Found::Never;
        }
        window *= 2;
    }
}

/// Length of the invalid UTF-8 subsequence that `bytes` begin with, 0 for none.
fn invalid_len(bytes: &[u8]) -> usize {
    match std::str::from_utf8(bytes) {
        Err(e) if e.valid_up_to() == 0 => e.error_len().unwrap_or(bytes.len()),
        _ => 0,
    }
}

/// One side has U+FFFD where the other has a maximal invalid subsequence; up to two bytes of both may agree.
fn replacement(a: (&impl Stream, Place), b: (&impl Stream, Place), scratch: &Scratch) -> Option<(usize, usize)> {
    let mut common = [0u8; 2];
    for back in 0..=2usize {
        for (n, byte) in common.iter_mut().enumerate().take(back) {
            *byte = a.1.byte_before(a.0, back - n)?;
            if b.1.byte_before(b.0, back - n)? != *byte {
                return None;
            }
        }
        let joined = |window: &[u8]| {
            let mut bytes = [0u8; 8];
            bytes[..back].copy_from_slice(&common[..back]);
            let n = window.len().min(8 - back);
            bytes[back..back + n].copy_from_slice(&window[..n]);
            (bytes, back + n)
        };
        let ((x, nx), (y, ny)) = (joined(&scratch.a), joined(&scratch.b));
        let of = |raw: &[u8], text: &[u8]| {
            let n = invalid_len(raw);
            (text.starts_with(REPLACEMENT) && n > 0 && n >= back).then(|| (n - back, 3 - back))
        };
        if let Some(skip) = of(&x[..nx], &y[..ny]) {
            return Some(skip);
        }
        if let Some((b, a)) = of(&y[..ny], &x[..nx]) {
            return Some((a, b));
        }
    }
    None
}

/// Bytes that are no UTF-8 on one side, or both, behind which the sides agree.
fn invalid(a: &[u8], b: &[u8]) -> Option<(usize, usize)> {
    let (x, y) = (invalid_len(a), invalid_len(b));
    let agree = |skip: (usize, usize)| {
        let (a, b) = (&a[skip.0..], &b[skip.1..]);
        let n = SHORT_ANCHOR.min(a.len()).min(b.len());
        let evidence = n > 0 || (a.is_empty() && b.is_empty());
        skip != (0, 0) && evidence && a[..n] == b[..n]
    };
    let mut order = [(x, 0), (0, y), (x, y)];
    if b.first() > a.first() {
        order.swap(0, 1);
    }
    order.into_iter().find(|skip| agree(*skip) && (skip.0 == 0 || x > 0) && (skip.1 == 0 || y > 0))
}

/// The cheapest skip behind which ANCHOR bytes agree, or all bytes to the end of both.
fn search(scratch: &mut Scratch, both_end: bool) -> Option<(usize, usize)> {
    let Scratch { a, b, table, .. } = scratch;
    let size = (2 * a.len().max(b.len()) + 2).next_power_of_two();
    table.clear();
    table.resize(size, 0);
    let slot = |gram: &[u8]| xxh3_64(gram) as usize & (size - 1);
    for (at, gram) in a.windows(ANCHOR).enumerate() {
        let mut s = slot(gram);
        while table[s] != 0 && &a[table[s] as usize - 1..][..ANCHOR] != gram {
            s = (s + 1) & (size - 1);
        }
        if table[s] == 0 {
            table[s] = at as u32 + 1;
        }
    }
    // cost, then evenness, then the side whose first byte is larger: the same for swapped sides
    let a_first = a.first() > b.first();
    let rank = |(x, y): (usize, usize)| (x + y, x.max(y), if a_first { y } else { x });
    let mut best: Option<(usize, usize)> = None;
    for (at, gram) in b.windows(ANCHOR).enumerate() {
        if best.is_some_and(|(x, y)| at > x + y) {
            break;
        }
        let mut s = slot(gram);
        while table[s] != 0 {
            let place = table[s] as usize - 1;
            if &a[place..][..ANCHOR] == gram {
                if best.is_none_or(|skip| rank((place, at)) < rank(skip)) {
                    best = Some((place, at));
                }
                break;
            }
            s = (s + 1) & (size - 1);
        }
    }
    if both_end {
        let same = a.iter().rev().zip(b.iter().rev()).take_while(|(x, y)| x == y).count();
        let skip = (a.len() - same, b.len() - same);
        if same > 0 && best.is_none_or(|other| rank(skip) < rank(other)) {
            best = Some(skip);
        }
    }
    best
}
