//! Little-endian scalars, zero padding and checksums.

use xxhash_rust::xxh3::{xxh3_128, xxh3_64};

/// Every structure of a shard starts at a multiple of this.
pub const ALIGN: usize = 8;

pub fn padded(len: usize) -> usize {
    len.next_multiple_of(ALIGN)
}

pub fn pad(out: &mut Vec<u8>) {
    out.resize(padded(out.len()), 0);
}

pub fn checksum(bytes: &[u8]) -> u64 {
    xxh3_64(bytes)
}

/// The token hash of the index: xxh3-128 of the tokens as little-endian u32.
pub fn token_hash(tokens: &[i32]) -> u128 {
    let bytes: Vec<u8> = tokens.iter().flat_map(|t| t.to_le_bytes()).collect();
    xxh3_128(&bytes)
}

/// xxh3-128 of bytes, for telling contents apart.
pub fn content_hash(bytes: &[u8]) -> u128 {
    xxh3_128(bytes)
}

pub fn le_u64(bytes: &[u8]) -> u64 {
    let mut word = [0u8; 8];
    word.copy_from_slice(&bytes[..8]);
    u64::from_le_bytes(word)
}

/// So many zero bytes; memory that is not to be had is a sentence, not the end of the process.
pub fn zeroed(n: usize) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    bytes.try_reserve_exact(n).map_err(|_| format!("there is no memory for its {n} bytes"))?;
    bytes.resize(n, 0);
    Ok(bytes)
}

/// Reads a byte slice front to back; running out of bytes is a sentence, never a panic.
pub struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Cursor { rest: bytes }
    }

    pub fn take(&mut self, n: usize) -> Result<&'a [u8], String> {
        if n > self.rest.len() {
            return Err(format!("{n} bytes wanted, {} left", self.rest.len()));
        }
        let (head, rest) = self.rest.split_at(n);
        self.rest = rest;
        Ok(head)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], String> {
        let mut out = [0u8; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub fn u8(&mut self) -> Result<u8, String> {
        Ok(self.array::<1>()?[0])
    }

    pub fn u16(&mut self) -> Result<u16, String> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    pub fn u32(&mut self) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    pub fn u64(&mut self) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    pub fn u128(&mut self) -> Result<u128, String> {
        Ok(u128::from_le_bytes(self.array()?))
    }

    pub fn zeros(&mut self, n: usize) -> Result<(), String> {
        match self.take(n)?.iter().position(|b| *b != 0) {
            None => Ok(()),
            Some(i) => Err(format!("byte {i} of {n} padding bytes is not zero")),
        }
    }

    pub fn left(&self) -> usize {
        self.rest.len()
    }

    pub fn end(&self) -> Result<(), String> {
        match self.rest.len() {
            0 => Ok(()),
            n => Err(format!("{n} trailing bytes")),
        }
    }
}
