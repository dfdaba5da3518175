//! Bit packing: value j takes bits [j*B, (j+1)*B) of a little-endian bit stream. No value is ever masked to fit.

use crate::bytes::le_u64;

/// Widest packed value: ids and tokens are below 2^31.
pub const MAX_BITS: u32 = 31;

/// Bits that hold every value below `bound`.
pub fn bits_below(bound: u32) -> u32 {
    (u32::BITS - bound.saturating_sub(1).leading_zeros()).max(1)
}

pub fn packed_len(n: usize, bits: u32) -> usize {
    (n * bits as usize).div_ceil(8)
}

/// Appends `values` to `out`; the caller has checked that each is below `2^bits`.
pub fn pack(values: impl Iterator<Item = u32>, bits: u32, out: &mut Vec<u8>) {
    let (mut word, mut fill) = (0u64, 0u32);
    for value in values {
        debug_assert!(u64::from(value) >> bits == 0);
        word |= u64::from(value) << fill;
        fill += bits;
        if fill >= 32 {
            out.extend_from_slice(&(word as u32).to_le_bytes());
            word >>= 32;
            fill -= 32;
        }
    }
    let tail = fill.div_ceil(8) as usize;
    out.extend_from_slice(&word.to_le_bytes()[..tail]);
}

fn unpack_tail(src: &[u8], bits: u32, first: usize, out: &mut [i32]) -> u32 {
    let mut max = 0;
    for (j, slot) in out.iter_mut().enumerate() {
        let bit = (first + j) * bits as usize;
        let mut window = [0u8; 8];
        for (w, b) in window.iter_mut().zip(&src[bit / 8..]) {
            *w = *b;
        }
        let value = (u64::from_le_bytes(window) >> (bit % 8)) & ((1 << bits) - 1);
        max = max.max(value as u32);
        *slot = value as i32;
    }
    max
}

// Eight values of B bits are B whole bytes, so every shift below is a constant.
fn unpack_fixed<const B: usize>(src: &[u8], out: &mut [i32]) -> u32 {
    let mask = (1u64 << B) - 1;
    let whole = (src.len().saturating_sub(8) / B).min(out.len() / 8);
    let (head, tail) = out.split_at_mut(whole * 8);
    let mut max = 0u32;
    for (g, group) in head.chunks_exact_mut(8).enumerate() {
        let window = &src[g * B..g * B + B + 8];
        for (j, slot) in group.iter_mut().enumerate() {
            let bit = j * B;
            let value = ((le_u64(&window[bit / 8..]) >> (bit % 8)) & mask) as u32;
            max = max.max(value);
            *slot = value as i32;
        }
    }
    max.max(unpack_tail(src, B as u32, whole * 8, tail))
}

fn unpack_16(src: &[u8], out: &mut [i32]) -> u32 {
    let mut max = 0;
    for (slot, pair) in out.iter_mut().zip(src.chunks_exact(2)) {
        let value = i32::from(u16::from_le_bytes([pair[0], pair[1]]));
        max = max.max(value);
        *slot = value;
    }
    max as u32
}

/// Fills `out` from `src` (at least `packed_len(out.len(), bits)` bytes) and returns the largest value.
pub fn unpack(src: &[u8], bits: u32, out: &mut [i32]) -> u32 {
    macro_rules! by_width {
        ($($b:literal)*) => { match bits { 16 => unpack_16(src, out), $($b => unpack_fixed::<$b>(src, out),)* _ => unpack_tail(src, bits, 0, out) } };
    }
    by_width!(1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 17 18 19 20 21 22 23 24 25 26 27 28 29 30 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(bits in 1u32..=MAX_BITS, raw in proptest::collection::vec(any::<u32>(), 0..200)) {
            let values: Vec<u32> = raw.iter().map(|v| v & ((1 << bits) - 1)).collect();
            let mut packed = Vec::new();
            pack(values.iter().copied(), bits, &mut packed);
            prop_assert_eq!(packed.len(), packed_len(values.len(), bits));
            let mut out = vec![-7i32; values.len()];
            let max = unpack(&packed, bits, &mut out);
            prop_assert_eq!(max, values.iter().copied().max().unwrap_or(0));
            prop_assert!(out.iter().zip(&values).all(|(a, b)| *a as u32 == *b));
        }
    }

    #[test]
    fn widths() {
        assert_eq!((bits_below(1), bits_below(2), bits_below(3), bits_below(49_152)), (1, 1, 2, 16));
        assert_eq!((bits_below(65_536), bits_below(65_537), bits_below(151_936)), (16, 17, 18));
        assert_eq!(bits_below(1 << 31), 31);
    }
}
