//! Differences of rows as running sums: each look-up gives several of them.

use super::super::bitstream::BitReader;
use super::super::prefix::{PrefixCode, LANES, RUN_BITS};
use super::Wide;

/// Sums that a look-up writes, of which at most LANES count.
pub const WRITTEN: usize = 8;
/// Look-ups that one window of 57 bits is enough for.
const LOOK_UPS: usize = 57 / RUN_BITS as usize;
/// Sums that the look-ups of a window write at most.
const REACH: usize = LOOK_UPS * LANES + WRITTEN;
/// Sums that are written behind the last one wanted.
pub const OVERRUN: usize = WRITTEN;

/// Writes 0 and the running sums, which may wrap, of the next n numbers: n + 1 in all. `sums` holds OVERRUN more.
#[inline(always)]
pub fn sums<W: Wide>(prefix: &PrefixCode, stream: &mut BitReader<'_>, n: usize, sums: &mut [u32]) -> Option<()> {
    let mut bits = stream.clone();
    let sums = sums.get_mut(..1 + n + OVERRUN)?;
    let (mut at, mut sum) = (1, 0u32);
    sums[0] = 0;
    // windows whose look-ups all stay before the end
    while let Some(slots) = sums.get_mut(at..).and_then(|rest| rest.first_chunk_mut::<REACH>()) {
        let mut window = bits.window()?;
        let (mut count, mut length, mut escaped) = (0, 0, false);
        for _ in 0..LOOK_UPS {
            let run = prefix.run(window);
            let slots: &mut [u32; WRITTEN] = slots.get_mut(count..count + WRITTEN)?.try_into().ok()?;
            *slots = W::raised(run.sums(), sum);
            escaped = run.count() == 0;
            if escaped {
                break;
            }
            window >>= run.length() % 64;
            length += run.length();
            sum = sum.wrapping_add(run.total());
            count += run.count();
        }
        bits.at += length;
        at += count;
        if escaped {
            sum = sum.wrapping_add(prefix.take(&mut bits)?);
            *sums.get_mut(at)? = sum;
            at += 1;
        }
    }
    while at <= n {
        let window = bits.window()?;
        let run = prefix.run(window);
        let slots: &mut [u32; WRITTEN] = sums.get_mut(at..at + WRITTEN)?.try_into().ok()?;
        *slots = W::raised(run.sums(), sum);
        match run.count() {
            0 => {
                sum = sum.wrapping_add(prefix.take(&mut bits)?);
                sums[at] = sum;
                at += 1;
            }
            count if count > n + 1 - at => {
                // the rest of the look-up belongs to other rows
                bits.at += prefix.length_of(window, n + 1 - at);
                break;
            }
            count => {
                bits.at += run.length();
                sum = sum.wrapping_add(run.total());
                at += count;
            }
        }
    }
    stream.at = bits.at;
    Some(())
}
