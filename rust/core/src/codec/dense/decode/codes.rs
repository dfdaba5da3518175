//! Codes of a row from its differences: each look-up gives several of them as running sums.

use super::super::bitstream::BitReader;
use super::super::prefix::{PrefixCode, LANES, RUN_BITS};
use super::Wide;

/// Sums that a look-up writes behind the last one wanted.
pub const OVERRUN: usize = 8;
/// Look-ups that one window of 57 bits is enough for.
const LOOK_UPS: u32 = 57 / RUN_BITS;

/// Writes n running sums, the first one given, as u16, which may wrap; gives the last one, which does not. `sums` holds
/// OVERRUN more.
#[inline(always)]
pub fn sums<W: Wide>(
    prefix: &PrefixCode,
    stream: &mut BitReader<'_>,
    first: u32,
    n: usize,
    sums: &mut [u16],
) -> Option<u32> {
    let mut bits = stream.clone();
    let last = running::<W>(prefix, &mut bits, first, n, sums);
    stream.at = bits.at;
    last
}

#[inline(always)]
fn running<W: Wide>(
    prefix: &PrefixCode,
    bits: &mut BitReader<'_>,
    first: u32,
    n: usize,
    sums: &mut [u16],
) -> Option<u32> {
    let sums = sums.get_mut(..n + OVERRUN)?;
    sums[0] = first as u16;
    let (mut at, mut sum) = (1, first);
    'window: while at < n {
        let mut window = bits.window()?;
        for _ in 0..LOOK_UPS {
            let run = prefix.run(window);
            let count = run.count();
            let slots: &mut [u16; OVERRUN] = sums.get_mut(at..at + OVERRUN)?.try_into().ok()?;
            *slots = W::raised(run.sums(), sum as u16);
            if count >= n - at {
                // the rest of the look-up belongs to the next row
                let wanted = n - at;
                bits.at += prefix.length_of(window, wanted);
                return Some(sum.wrapping_add(u32::from(run.sums()[(wanted - 1) % LANES])));
            }
            if count == 0 {
                sum = sum.wrapping_add(prefix.take(bits)?);
                sums[at] = sum as u16;
                at += 1;
                continue 'window;
            }
            window >>= run.length();
            bits.at += run.length();
            sum = sum.wrapping_add(run.total());
            at += count;
        }
    }
    Some(sum)
}
