//! A prefix code of small numbers, at most 11 bits each: symbols 0 to 62, and 63 for a larger number in 16 raw bits behind it.
//! Canonical as in deflate: by length, then by symbol; codes are stored from their first bit on.

use super::bitstream::{BitReader, Room};

pub const SYMBOLS: usize = 64;
pub const ESCAPE: usize = SYMBOLS - 1;
pub const MAX_LENGTH: u32 = 11;
pub const ESCAPE_BITS: u32 = 16;
const WINDOW: usize = 1 << MAX_LENGTH;
/// Bits of a look-up that gives several numbers, so that its table stays in the first-level cache.
pub const RUN_BITS: u32 = 11;
const RUNS: usize = 1 << RUN_BITS;
/// Bytes of a run.
const RUN: usize = 8;
/// Numbers that one look-up gives at most.
pub const LANES: usize = 6;
/// More than five runs have together.
pub const MOST_COUNTED: usize = 32;

#[derive(Clone)]
pub struct PrefixCode {
    pub lengths: [u8; SYMBOLS],
    /// By symbol: code | length << 16.
    codes: [u32; SYMBOLS],
    /// Of symbols 0 to 15 the lower and the upper byte of the code, and the length.
    pub small: [[u8; 16]; 3],
    /// By window: symbol | length << 8.
    single: Vec<u16>,
    /// By window: a run of 8 bytes, and one more, so that 8 bytes can be read from any place in a run.
    runs: Box<[u8; RUN * (RUNS + 1)]>,
    /// By window: 4 bits for each number of its run, the bits up to its end.
    ends: Box<[u32; RUNS]>,
}

/// What one look-up gives, a byte each: bits of its numbers; how many they are; 6 running sums, the last one again in those
/// behind the count. None at all is an escape, of no bits and with sums of 0.
pub struct Run<'a>(&'a [u8; 2 * RUN]);

impl<'a> Run<'a> {
    /// All of it. The sum of the words of a few runs has the sums of `length_of_word` and of `count_of_word`.
    #[inline(always)]
    pub fn word(&self) -> u64 {
        let [word, _] = self.0.as_chunks::<RUN>().0 else { return 0 };
        u64::from_le_bytes(*word)
    }

    #[inline(always)]
    pub fn length(&self) -> usize {
        length_of_word(self.word())
    }

    #[inline(always)]
    pub fn count(&self) -> usize {
        count_of_word(self.word())
    }

    #[inline(always)]
    pub fn total(&self) -> u32 {
        (self.word() >> 56) as u32
    }

    /// Running sums; those behind the count are of no meaning.
    #[inline(always)]
    pub fn sums(&self) -> &'a [u8; RUN] {
        self.0[2..].first_chunk().expect("16 bytes")
    }
}

#[inline(always)]
pub fn length_of_word(word: u64) -> usize {
    word as usize & 255
}

/// Of five runs at most.
#[inline(always)]
pub fn count_of_word(word: u64) -> usize {
    (word >> 8) as usize % MOST_COUNTED
}

impl PrefixCode {
    pub fn new(lengths: [u8; SYMBOLS]) -> Result<PrefixCode, String> {
        let space: usize = lengths.iter().filter(|l| **l > 0).map(|l| WINDOW >> l.min(&31)).sum();
        if space != WINDOW || lengths.iter().any(|l| u32::from(*l) > MAX_LENGTH) {
            return Err(format!("code lengths {lengths:?} do not make a whole code of at most {MAX_LENGTH} bits"));
        }
        let mut codes = [0u32; SYMBOLS];
        let mut single = vec![0u16; WINDOW];
        let mut next = 0usize; // the next code, in the highest of 11 bits
        for length in 1..=MAX_LENGTH as u8 {
            for symbol in (0..SYMBOLS).filter(|s| lengths[*s] == length) {
                let reversed = (next as u16).reverse_bits() >> (16 - MAX_LENGTH);
                codes[symbol] = u32::from(reversed) | u32::from(length) << 16;
                for window in (usize::from(reversed)..WINDOW).step_by(1 << length) {
                    single[window] = symbol as u16 | u16::from(length) << 8;
                }
                next += WINDOW >> length;
            }
        }
        let (mut runs, mut ends) = (Box::new([0; RUN * (RUNS + 1)]), Box::new([0; RUNS]));
        for (window, (run, ends)) in runs.as_chunks_mut().0.iter_mut().zip(ends.iter_mut()).enumerate() {
            (*run, *ends) = pack(&single, window);
        }
        let small = [0, 8, 16].map(|shift| std::array::from_fn(|symbol| (codes[symbol] >> shift) as u8));
        Ok(PrefixCode { lengths, codes, small, single, runs, ends })
    }

    /// The best lengths for numbers that occur `counts[symbol]` times; every symbol gets a code.
    pub fn trained(counts: &[u64; SYMBOLS]) -> PrefixCode {
        // package-merge: lists of (weight, symbols of the package)
        let mut leaves: Vec<(u64, Vec<usize>)> = counts.iter().enumerate().map(|(s, n)| (n + 1, vec![s])).collect();
        leaves.sort_by_key(|(weight, symbols)| (*weight, symbols[0]));
        let mut row = leaves.clone();
        for _ in 1..MAX_LENGTH {
            let packages: Vec<(u64, Vec<usize>)> = row
                .chunks_exact(2)
                .map(|pair| (pair[0].0 + pair[1].0, [pair[0].1.as_slice(), pair[1].1.as_slice()].concat()))
                .collect();
            row = leaves.iter().cloned().chain(packages).collect();
            row.sort_by_key(|(weight, _)| *weight);
        }
        let mut lengths = [0u8; SYMBOLS];
        for symbol in row[..2 * SYMBOLS - 2].iter().flat_map(|(_, symbols)| symbols) {
            lengths[*symbol] += 1;
        }
        PrefixCode::new(lengths).expect("package-merge gives a whole code")
    }

    /// Bits of numbers that occur `counts[symbol]` times.
    pub fn cost(&self, counts: &[u64; SYMBOLS]) -> u64 {
        let raw = counts[ESCAPE] * u64::from(ESCAPE_BITS);
        raw + counts.iter().zip(self.lengths).map(|(n, l)| n * u64::from(l)).sum::<u64>()
    }

    /// code | length << 16 of a symbol.
    #[inline(always)]
    pub fn entry(&self, symbol: u32) -> u32 {
        self.codes[symbol as usize % SYMBOLS]
    }

    /// A number below 2^16 as (bits, how many), at most 27.
    #[inline(always)]
    pub fn bits_of(&self, number: u32) -> (u64, u32) {
        let entry = self.codes[(number as usize).min(ESCAPE)];
        let (code, length) = (u64::from(entry & 0xffff), entry >> 16);
        if number < ESCAPE as u32 {
            return (code, length);
        }
        (code | u64::from(number) << length, length + ESCAPE_BITS)
    }

    /// Appends a number below 2^16.
    #[inline(always)]
    pub fn put(&self, number: u32, out: &mut Room<'_>) {
        let (bits, length) = self.bits_of(number);
        out.put(bits, length);
    }

    /// Takes one number.
    pub fn take(&self, bits: &mut BitReader<'_>) -> Option<u32> {
        let entry = self.single[bits.window()? as usize % WINDOW];
        bits.at += usize::from(entry >> 8);
        match usize::from(entry & 255) {
            ESCAPE => bits.take(ESCAPE_BITS),
            symbol => Some(symbol as u32),
        }
    }

    /// The numbers at the start of a window.
    #[inline(always)]
    pub fn run(&self, window: u64) -> Run<'_> {
        Run(self.runs[RUN * (window as usize % RUNS)..].first_chunk().expect("one more run"))
    }

    /// Bits of the first `count` numbers of the run at the start of a window; it has that many.
    #[inline(always)]
    pub fn length_of(&self, window: u64, count: usize) -> usize {
        (self.ends[window as usize % RUNS] >> (4 * (count - 1)) & 15) as usize
    }
}

impl Default for PrefixCode {
    /// Numbers that become rarer by 5/8 from one to the next.
    fn default() -> Self {
        let mut counts = [0u64; SYMBOLS];
        let mut n = 1 << 24;
        for count in &mut counts {
            *count = n;
            n = n * 5 / 8;
        }
        Self::trained(&counts)
    }
}

fn pack(single: &[u16], window: usize) -> ([u8; RUN], u32) {
    let (mut run, mut ends) = ([0u8; RUN], 0u32);
    let (mut count, mut used, mut sum) = (0usize, 0u32, 0u16);
    while count < LANES {
        let entry = single[window >> used];
        let (symbol, length) = (entry & 255, u32::from(entry >> 8));
        if used + length > RUN_BITS || usize::from(symbol) == ESCAPE || sum + symbol > 255 {
            break;
        }
        (sum, used) = (sum + symbol, used + length);
        run[2 + count] = sum as u8;
        ends |= used << (4 * count);
        count += 1;
    }
    run[2 + count..].fill(sum as u8);
    (run[0], run[1]) = (used as u8, count as u8);
    (run, ends)
}

#[cfg(test)]
mod tests {
    use super::super::bitstream::{BitWriter, SLACK};
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(counts in proptest::collection::vec(0u64..100_000, SYMBOLS),
                      numbers in proptest::collection::vec(prop_oneof![0u32..70, 0u32..=65_535], 1..200)) {
            let mut weights = [0; SYMBOLS];
            weights.copy_from_slice(&counts);
            let code = PrefixCode::trained(&weights);
            prop_assert!(PrefixCode::new(code.lengths).is_ok());
            let mut out = BitWriter::default();
            out.put_all(numbers.len() * 27, |room| numbers.iter().for_each(|n| code.put(*n, room)));
            let bits: u32 = numbers.iter().map(|n| code.bits_of(*n).1).sum();
            let bytes = [out.finish(), &[0; SLACK]].concat();
            let mut one = BitReader::new(&bytes);
            for n in &numbers {
                prop_assert_eq!(code.take(&mut one), Some(*n));
            }
            prop_assert_eq!(one.at, bits as usize);
            // the same by runs
            let (mut many, mut got, mut at) = (BitReader::new(&bytes), Vec::new(), 0u32);
            while got.len() < numbers.len() {
                let run = code.run(many.window().expect("bits"));
                if run.count() == 0 {
                    let n = code.take(&mut many).expect("an escape");
                    at += n;
                    got.push(n);
                    continue;
                }
                let mut before = 0;
                for (lane, sum) in run.sums()[..run.count()].iter().enumerate() {
                    let sum = u32::from(*sum);
                    prop_assert!(code.length_of(many.window().expect("bits"), lane + 1) <= run.length());
                    got.push(sum - before);
                    before = sum;
                }
                prop_assert_eq!(before, run.total());
                at += before;
                many.at += run.length();
            }
            prop_assert_eq!(&got[..numbers.len()], &numbers[..]);
            prop_assert!(at >= numbers.iter().sum::<u32>());
        }
    }

    #[test]
    fn rare_symbols_cost_more_and_broken_lengths_are_refused() {
        let code = PrefixCode::default();
        assert!(code.lengths[0] == 1 || code.lengths[0] == 2);
        assert!(code.lengths.iter().all(|l| (1..=MAX_LENGTH as u8).contains(l)));
        let mut lengths = code.lengths;
        lengths[3] += 1;
        assert!(PrefixCode::new(lengths).is_err());
        assert!(PrefixCode::new([0; SYMBOLS]).is_err());
    }
}
