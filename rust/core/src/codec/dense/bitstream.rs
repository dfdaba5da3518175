//! A little-endian bit stream: bit 0 is the lowest bit of the first byte. Readers look at 64-bit windows, so every stream is
//! followed by at least 8 bytes.

/// Bytes behind a stream that a window may touch.
pub const SLACK: usize = 8;

/// Bytes that one `put` may touch behind the stream.
const REACH: usize = 8;

/// Bits that one `put` may append.
pub const MOST_BITS: u64 = 56;

/// Writes whole words and moves on by what is in them, so that no put depends on how full the last byte is.
#[derive(Default)]
pub struct BitWriter {
    /// The stream, and room behind it.
    bytes: Vec<u8>,
    /// The byte that holds the next bit.
    at: usize,
    word: u64,
    fill: u32,
}

impl BitWriter {
    /// Puts at most so many bits.
    #[inline(always)]
    pub fn put_all(&mut self, bits: usize, work: impl FnOnce(&mut Room<'_>)) {
        let end = self.at + bits / 8 + 2 * REACH;
        if self.bytes.len() < end {
            self.bytes.resize(end.max(2 * self.bytes.len()), 0);
        }
        let mut room = Room { bytes: &mut self.bytes, at: self.at, word: self.word, fill: self.fill };
        work(&mut room);
        (self.at, self.word, self.fill) = (room.at, room.word, room.fill);
    }

    /// Appends the lowest `bits` (at most 56) of a value that has no others.
    #[inline(always)]
    pub fn put(&mut self, value: u64, bits: u32) {
        self.put_all(bits as usize, |room| room.put(value, bits));
    }

    /// Ends the stream with the byte that holds its last bit; its bytes.
    pub fn finish(&self) -> &[u8] {
        &self.bytes[..self.at + usize::from(self.fill > 0)]
    }

    pub fn clear(&mut self) {
        (self.at, self.word, self.fill) = (0, 0, 0);
    }
}

/// Room for bits that was made beforehand: a writer whose state stays in registers.
pub struct Room<'a> {
    bytes: &'a mut [u8],
    at: usize,
    word: u64,
    fill: u32,
}

impl Room<'_> {
    /// Appends the lowest `bits` (at most 56) of a value that has no others.
    #[inline(always)]
    pub fn put(&mut self, value: u64, bits: u32) {
        debug_assert!(bits <= 56 && value >> bits == 0);
        self.word |= value << self.fill;
        self.fill += bits;
        self.bytes[self.at..self.at + REACH].copy_from_slice(&self.word.to_le_bytes());
        self.at += self.fill as usize / 8;
        self.word >>= self.fill & !7;
        self.fill %= 8;
    }
}

#[derive(Clone)]
pub struct BitReader<'a> {
    bytes: &'a [u8],
    pub at: usize,
}

impl<'a> BitReader<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        BitReader { bytes, at: 0 }
    }

    /// The next 57 bits or more, without taking them.
    #[inline(always)]
    pub fn window(&self) -> Option<u64> {
        let chunk = self.bytes.get(self.at / 8..)?.first_chunk::<8>()?;
        Some(u64::from_le_bytes(*chunk) >> (self.at % 8))
    }

    /// Takes `bits`, at most 32.
    #[inline(always)]
    pub fn take(&mut self, bits: u32) -> Option<u32> {
        let value = self.window()? & ((1 << bits) - 1);
        self.at += bits as usize;
        Some(value as u32)
    }

    /// Takes zeros and the one behind them; their number.
    pub fn unary(&mut self) -> Option<u32> {
        let mut zeros = 0;
        loop {
            let window = self.window()? & ((1 << 56) - 1);
            if window != 0 {
                let n = window.trailing_zeros();
                self.at += n as usize + 1;
                return Some(zeros + n);
            }
            zeros += 56;
            self.at += 56;
        }
    }

    /// The stream must end here: `len` bytes, of which the last one's spare bits are zero.
    pub fn end(&self, len: usize) -> Result<(), String> {
        if self.at.div_ceil(8) != len {
            return Err(format!("a stream of {len} bytes was read to bit {}", self.at));
        }
        match self.bytes.get(self.at / 8) {
            Some(last) if !self.at.is_multiple_of(8) && last >> (self.at % 8) != 0 => {
                Err("padding bits are not zero".to_string())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn round_trip(values in proptest::collection::vec((any::<u32>(), 0u32..=32), 0..100)) {
            let mut writer = BitWriter::default();
            let cut = |(v, b): &(u32, u32)| (u64::from(*v) & ((1u64 << b) - 1)) as u32;
            for pair in &values {
                writer.put(u64::from(cut(pair)), pair.1);
            }
            let bits = values.iter().map(|(_, b)| *b as usize).sum::<usize>();
            let mut bytes = writer.finish().to_vec();
            let len = bytes.len();
            prop_assert_eq!(len, bits.div_ceil(8));
            bytes.extend([0xff; SLACK]);
            let mut reader = BitReader::new(&bytes);
            for pair in &values {
                prop_assert_eq!(reader.take(pair.1), Some(cut(pair)));
            }
            prop_assert_eq!(reader.at, bits);
            prop_assert!(reader.end(len).is_ok());
        }
    }

    #[test]
    fn unary_over_many_words() {
        let mut bytes = vec![0u8; 40];
        bytes[25] = 0b100;
        let mut reader = BitReader::new(&bytes);
        assert_eq!(reader.unary(), Some(202));
        assert_eq!(reader.at, 203);
        assert_eq!(reader.unary(), None);
    }
}
