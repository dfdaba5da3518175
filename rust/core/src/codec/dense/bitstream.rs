//! A little-endian bit stream: bit 0 is the lowest bit of the first byte. Readers look at 64-bit windows, so every stream is
//! followed by at least 8 bytes.

/// Bytes behind a stream that a window may touch.
pub const SLACK: usize = 8;

#[derive(Default)]
pub struct BitWriter {
    pub bytes: Vec<u8>,
    word: u64,
    fill: u32,
}

impl BitWriter {
    /// Appends the lowest `bits` (at most 32) of a value that has no others.
    #[inline]
    pub fn put(&mut self, value: u32, bits: u32) {
        debug_assert!(bits <= 32 && u64::from(value) >> bits == 0);
        self.word |= u64::from(value) << self.fill;
        self.fill += bits;
        if self.fill >= 32 {
            self.bytes.extend_from_slice(&(self.word as u32).to_le_bytes());
            self.word >>= 32;
            self.fill -= 32;
        }
    }

    /// Fills the last byte with zeros; the stream's length in bits.
    pub fn finish(&mut self) -> usize {
        let bits = self.bytes.len() * 8 + self.fill as usize;
        let tail = self.fill.div_ceil(8) as usize;
        self.bytes.extend_from_slice(&self.word.to_le_bytes()[..tail]);
        self.word = 0;
        self.fill = 0;
        bits
    }

    pub fn clear(&mut self) {
        self.bytes.clear();
        self.word = 0;
        self.fill = 0;
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
                writer.put(cut(pair), pair.1);
            }
            let bits = writer.finish();
            let len = writer.bytes.len();
            writer.bytes.extend([0xff; SLACK]);
            let mut reader = BitReader::new(&writer.bytes);
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
