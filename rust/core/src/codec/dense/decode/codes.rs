//! Differences of rows as running sums: each look-up gives several of them.

use super::super::bitstream::BitReader;
use super::super::prefix::{count_of_word, length_of_word, PrefixCode, LANES, MOST_COUNTED, RUN_BITS};
use super::{Wide, GROUP};

/// Sums that a look-up writes, of which at most LANES count.
pub const WRITTEN: usize = 8;
/// Look-ups that one window of 57 bits is enough for.
const LOOK_UPS: usize = 57 / RUN_BITS as usize;
/// Room for the sums that the look-ups of a window write.
const REACH: usize = MOST_COUNTED + WRITTEN;
const _: () = assert!(LOOK_UPS * LANES < MOST_COUNTED);
/// Sums that are written behind the last one wanted.
const OVERRUN: usize = WRITTEN;

/// Sums of rows to come. Each look-up waits for the one before it, so they are read a window at a time between other work.
pub struct Ahead<'a> {
    stream: BitReader<'a>,
    /// One that is none of them, and those up to `at`.
    sums: Vec<u32>,
    at: usize,
    end: usize,
    last: u32,
}

impl<'a> Ahead<'a> {
    /// For at most `most` sums at once.
    pub fn new(bytes: &'a [u8], most: usize) -> Self {
        Ahead { stream: BitReader::new(bytes), sums: Self::memory(most), at: 2, end: 2, last: 0 }
    }

    /// One more, those, and some that fill up a group.
    pub fn memory(most: usize) -> Vec<u32> {
        vec![0; 1 + most + OVERRUN.max(GROUP)]
    }

    /// What comes next are 0 and the running sums, which may wrap, of n numbers: n + 1 in all.
    #[inline(always)]
    pub fn begin(&mut self, n: usize) {
        self.sums[1] = 0;
        (self.at, self.end, self.last) = (2, 2 + n, 0);
    }

    /// Reads a window whose look-ups all stay before the end. What goes wrong here, `finish` meets again.
    #[inline(always)]
    pub fn step<W: Wide>(&mut self, prefix: &PrefixCode) {
        let _ = self.window::<W>(prefix);
    }

    // whether there was one; without numbers nothing is changed
    #[inline(always)]
    fn window<W: Wide>(&mut self, prefix: &PrefixCode) -> Option<bool> {
        let slots = self.sums.get_mut(self.at..self.end + OVERRUN)?;
        let Some(slots) = slots.first_chunk_mut::<REACH>() else { return Some(false) };
        let mut window = self.stream.window()?;
        let (mut taken, mut last, mut sum) = (0u64, 0, self.last);
        for _ in 0..LOOK_UPS {
            let (run, count) = (prefix.run(window), count_of_word(taken));
            *slots[count..].first_chunk_mut()? = W::raised(run.sums(), sum);
            last = run.word();
            taken = taken.wrapping_add(last);
            window >>= last % 64;
            sum = sum.wrapping_add(run.total());
        }
        let (mut length, mut count) = (length_of_word(taken), count_of_word(taken));
        if count_of_word(last) == 0 {
            // an escape, on which all look-ups from its own on have stood still
            let mut bits = self.stream.clone();
            bits.at += length;
            sum = sum.wrapping_add(prefix.take(&mut bits)?);
            slots[count] = sum;
            length = bits.at - self.stream.at;
            count += 1;
        }
        self.stream.at += length;
        (self.at, self.last) = (self.at + count, sum);
        Some(true)
    }

    /// Reads what is left; `sums` and these change places.
    #[inline(always)]
    pub fn finish<W: Wide>(&mut self, prefix: &PrefixCode, sums: &mut Vec<u32>) -> Option<()> {
        while self.window::<W>(prefix)? {}
        let (end, mut bits) = (self.end, self.stream.clone());
        while self.at < end {
            let window = bits.window()?;
            let run = prefix.run(window);
            let slots: &mut [u32; WRITTEN] = self.sums.get_mut(self.at..self.at + WRITTEN)?.try_into().ok()?;
            *slots = W::raised(run.sums(), self.last);
            match run.count() {
                0 => {
                    self.last = self.last.wrapping_add(prefix.take(&mut bits)?);
                    slots[0] = self.last;
                    self.at += 1;
                }
                count if count > end - self.at => {
                    // the rest of the look-up belongs to other rows
                    bits.at += prefix.length_of(window, end - self.at);
                    break;
                }
                count => {
                    bits.at += run.length();
                    self.last = self.last.wrapping_add(run.total());
                    self.at += count;
                }
            }
        }
        self.stream.at = bits.at;
        std::mem::swap(&mut self.sums, sums);
        (self.at, self.end) = (2, 2);
        Some(())
    }

    /// The stream must end here: `len` bytes.
    pub fn ended(&self, len: usize) -> Result<(), String> {
        self.stream.end(len)
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::bitstream::{BitWriter, SLACK};
    use super::super::Narrow;
    use super::*;

    #[test]
    fn sums_are_the_same_however_much_is_read_ahead() {
        let (prefix, mut seed) = (PrefixCode::default(), 5u32);
        let mut next = move |n: u32| {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (seed >> 8) % n
        };
        let lengths: Vec<usize> = (0..40).map(|_| [0, 1, 7, 31, 64, 300][next(6) as usize]).collect();
        let numbers: Vec<u32> = (0..lengths.iter().sum())
            .map(|_| match next(30) {
                0 => next(65_536), // mostly an escape
                _ => next(4) * next(3),
            })
            .collect();
        let mut out = BitWriter::default();
        out.put_all(numbers.len() * 27, |room| numbers.iter().for_each(|n| prefix.put(*n, room)));
        let stream = out.finish();
        let bytes = [stream, &[0; SLACK]].concat();
        for steps in [0, 1, 3, 200] {
            let (mut ahead, mut sums, mut at) = (Ahead::new(&bytes, 301), Ahead::memory(301), 0);
            for n in &lengths {
                ahead.begin(*n);
                (0..steps).for_each(|_| ahead.step::<Narrow>(&prefix));
                ahead.finish::<Narrow>(&prefix, &mut sums).expect("the sums");
                let mut want = vec![0];
                want.extend(numbers[at..at + n].iter().scan(0, |sum, number| {
                    *sum += number;
                    Some(*sum)
                }));
                assert_eq!(sums[1..2 + n], want, "{steps} steps");
                at += n;
            }
            assert!(ahead.ended(stream.len()).is_ok());
            ahead.begin(300);
            (0..steps).for_each(|_| ahead.step::<Narrow>(&prefix));
            assert!(ahead.finish::<Narrow>(&prefix, &mut sums).is_none(), "the stream has no more");
        }
    }
}
