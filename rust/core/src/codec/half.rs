//! fp16 of a surprisal (minus a log-probability): never negative, never NaN, +inf for a probability of zero.
//! Error: at most 2^-11 relative, so 0.002 nat between 4 and 8, 0.004 between 8 and 16, 0.008 between 16 and 32.

pub const INFINITE: u16 = 0x7c00;
const LARGEST: f32 = 65504.0;

/// Round to nearest even; finite values above 65504 become 65504 (their probability is 0 in every float type).
#[inline]
pub fn encode(surprisal: f32) -> u16 {
    let value = surprisal.clamp(0.0, LARGEST).abs(); // abs: clamp lets -0.0 through
    let bits = value.to_bits();
    // below 2^-14 adding 0.5 leaves round(value * 2^24) in the low mantissa bits
    let tiny = (value + 0.5).to_bits().wrapping_sub(0.5f32.to_bits());
    let normal = bits.wrapping_add(0xfff + ((bits >> 13) & 1)).wrapping_sub(112 << 23) >> 13;
    let finite = if bits < 0x3880_0000 { tiny } else { normal };
    (if surprisal == f32::INFINITY { u32::from(INFINITE) } else { finite }) as u16
}

/// The log-probability of an encoded surprisal in `0..=INFINITE`.
#[inline]
pub fn decode(half: u16) -> f32 {
    let wide = u32::from(half);
    let normal = f32::from_bits((wide << 13) + (112 << 23));
    let tiny = wide as f32 * (1.0 / 16_777_216.0);
    let finite = if wide < 0x400 { tiny } else { normal };
    if wide == u32::from(INFINITE) {
        f32::NEG_INFINITY
    } else {
        0.0 - finite
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_round_trips() {
        for half in 0..=INFINITE {
            assert_eq!(encode(-decode(half)), half, "half {half:#x}");
        }
    }

    #[test]
    fn rounding_is_to_nearest_and_saturates() {
        for step in 0..400_000u32 {
            let value = step as f32 * 1.7e-4;
            let error = (-decode(encode(value)) - value).abs();
            assert!(error <= (value / 2048.0).max(3.0e-8), "{value} is off by {error}");
        }
        assert_eq!(decode(encode(1.0e9)), -65504.0);
        assert_eq!(decode(encode(f32::INFINITY)), f32::NEG_INFINITY);
        assert_eq!(decode(encode(0.0)).to_bits(), 0.0f32.to_bits());
    }
}
