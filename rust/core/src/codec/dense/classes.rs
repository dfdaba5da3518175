//! Class codes: a value is the class it lies in (a nibble) and its place in the class (raw bits). Sixteen classes follow one
//! another from 0; class c holds 2^width[c] values.

pub const CLASSES: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClassCode {
    pub widths: [u8; CLASSES],
    /// First value of each class.
    pub bases: [u32; CLASSES],
}

impl ClassCode {
    /// Widths of at most `max_width` bits whose classes hold every value below `bound`.
    pub fn new(widths: [u8; CLASSES], bound: u64, max_width: u8) -> Result<ClassCode, String> {
        let mut bases = [0u32; CLASSES];
        let mut next = 0u64;
        for (base, width) in bases.iter_mut().zip(widths) {
            *base = u32::try_from(next).map_err(|_| format!("classes of {widths:?} bits begin above 2^32"))?;
            if width > max_width {
                return Err(format!("a class of {width} bits, at most {max_width} are accepted"));
            }
            next += 1 << width;
        }
        if next < bound {
            return Err(format!("classes of {widths:?} bits hold {next} values, {bound} are needed"));
        }
        Ok(ClassCode { widths, bases })
    }

    #[inline]
    pub fn class_of(&self, value: u32) -> usize {
        self.bases.iter().map(|b| u32::from(*b <= value)).sum::<u32>() as usize - 1
    }

    /// Writes plus + the class of each value from 0 on.
    pub fn fill(&self, classes: &mut [u8], plus: u8) {
        for c in 0..CLASSES {
            let first = (self.bases[c] as usize).min(classes.len());
            let end = (u64::from(self.bases[c]) + (1 << self.widths[c])).min(classes.len() as u64) as usize;
            classes[first..end].fill(c as u8 + plus);
        }
    }

    /// Widths that grow evenly until they hold every value below `bound`.
    pub fn even(bound: u64) -> ClassCode {
        let top = bits(bound);
        let mut widths = [0u8; CLASSES];
        for (c, width) in widths.iter_mut().enumerate() {
            *width = (c * usize::from(top) / (CLASSES - 1)) as u8;
        }
        Self::fitted(widths, bound)
    }

    // the last class takes what is left
    fn fitted(mut widths: [u8; CLASSES], bound: u64) -> ClassCode {
        let before: u64 = widths[..CLASSES - 1].iter().map(|w| 1u64 << w).sum();
        widths[CLASSES - 1] = bits(bound.saturating_sub(before));
        let mut bases = [0u32; CLASSES];
        let mut next = 0u64;
        for (base, width) in bases.iter_mut().zip(widths) {
            *base = next as u32;
            next += 1 << width;
        }
        ClassCode { widths, bases }
    }

    /// The cheapest widths that a local search finds for values that occur `counts[value]` times.
    pub fn trained(counts: &[u32], bound: u64) -> ClassCode {
        Self::improved(Self::even(bound).widths, counts, bound)
    }

    /// The same from these widths on.
    pub fn improved(widths: [u8; CLASSES], counts: &[u32], bound: u64) -> ClassCode {
        let used = counts.iter().rposition(|n| *n > 0).map_or(0, |last| last + 1);
        let mut below = vec![0u64; used + 1];
        for (v, count) in counts[..used].iter().enumerate() {
            below[v + 1] = below[v] + u64::from(*count);
        }
        let add = |mut sum: Sum, width: u8| {
            sum.next += 1 << width;
            let end = below[used.min(sum.next as usize)];
            sum.bits += (end - sum.below) * u64::from(width);
            sum.below = end;
            sum
        };
        // the last class takes what is left; None from `most` on
        let cost = |widths: &[u8], mut sum: Sum, most: u64| {
            for width in widths {
                sum = add(sum, *width);
                if sum.bits >= most {
                    return None;
                }
            }
            let total = sum.bits + (below[used] - sum.below) * u64::from(bits(bound.saturating_sub(sum.next)));
            (total < most).then_some(total)
        };
        let mut best = widths;
        let mut lowest = cost(&best[..CLASSES - 1], Sum::default(), u64::MAX).unwrap_or(u64::MAX);
        let top = bits(bound);
        loop {
            let from = best;
            let mut sums = [Sum::default(); CLASSES];
            for c in 0..CLASSES - 1 {
                sums[c + 1] = add(sums[c], from[c]);
            }
            for i in (0..CLASSES - 1).filter(|i| *i == 0 || from[*i] != from[i - 1]) {
                // widths that equal those before them were tried with these
                for j in (i..CLASSES - 1).filter(|j| *j <= i + 1 || from[*j] != from[j - 1]) {
                    for (di, dj) in if i == j { &ALONE[..] } else { &TOGETHER } {
                        let mut widths = from;
                        let (Some(a), Some(b)) = (widths[i].checked_add_signed(*di), widths[j].checked_add_signed(*dj))
                        else {
                            continue;
                        };
                        (widths[j], widths[i]) = (b, a);
                        if widths[i].max(widths[j]) > top {
                            continue;
                        }
                        widths[..CLASSES - 1].sort_unstable();
                        let same = widths[..CLASSES - 1].iter().zip(&from).take_while(|(a, b)| a == b).count();
                        if let Some(now) = cost(&widths[same..CLASSES - 1], sums[same], lowest) {
                            (best, lowest) = (Self::fitted(widths, bound).widths, now);
                        }
                    }
                }
            }
            if best == from {
                return Self::fitted(best, bound);
            }
        }
    }

    /// Bits of values that occur `counts[value]` times, nibbles included.
    pub fn cost(&self, counts: &[u32]) -> u64 {
        let mut total = 0;
        for c in 0..CLASSES {
            let first = (self.bases[c] as usize).min(counts.len());
            let end = if c + 1 == CLASSES { counts.len() } else { (self.bases[c + 1] as usize).min(counts.len()) };
            let n: u64 = counts[first..end].iter().map(|n| u64::from(*n)).sum();
            total += n * (4 + u64::from(self.widths[c]));
        }
        total
    }
}

/// Of the classes so far: where the next one begins, how many values lie below it, and the bits of these in their classes.
#[derive(Clone, Copy, Default)]
struct Sum {
    next: u64,
    below: u64,
    bits: u64,
}

/// Steps of one width, and of two.
const ALONE: [(i8, i8); 3] = [(1, 0), (-1, 0), (-2, 0)];
const TOGETHER: [(i8, i8); 6] = [(1, 1), (1, -1), (-1, 1), (-1, -1), (1, -2), (-2, 1)];

/// Bits that hold every value below `bound`.
pub fn bits(bound: u64) -> u8 {
    (u64::BITS - bound.saturating_sub(1).leading_zeros()) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_one_class() {
        for bound in [1u64, 2, 17, 1000, 151_936, (1 << 31) + 64] {
            let code = ClassCode::even(bound);
            assert!(ClassCode::new(code.widths, bound, 32).is_ok(), "{bound}");
            for value in [0, bound / 3, bound - 1] {
                let class = code.class_of(value as u32);
                assert!(value - u64::from(code.bases[class]) < 1 << code.widths[class], "{bound} {value}");
            }
        }
    }

    #[test]
    fn training_beats_the_even_widths() {
        let counts: Vec<u32> = (0..50_000u64).map(|r| (1_000_000_000 / ((r + 9) * (r + 9))) as u32).collect();
        let (even, trained) = (ClassCode::even(50_000), ClassCode::trained(&counts, 50_000));
        assert!(ClassCode::new(trained.widths, 50_000, 32).is_ok());
        assert!(trained.cost(&counts) < even.cost(&counts) * 99 / 100);
    }

    #[test]
    fn too_small_or_too_wide_is_refused() {
        assert!(ClassCode::new([0; CLASSES], 17, 28).is_err_and(|e| e.contains("17 are needed")));
        assert!(ClassCode::new([29; CLASSES], 17, 28).is_err_and(|e| e.contains("29 bits")));
        assert!(ClassCode::new([32; CLASSES], 17, 32).is_err_and(|e| e.contains("2^32")));
    }
}
