//! SentencePiece's precompiled normalisation: a double-array trie over byte strings and the strings they become.

use crate::error::{Error, Result};

#[derive(Debug, Clone, PartialEq)]
pub struct Charsmap {
    trie: Vec<u32>,
    strings: Vec<u8>,
}

impl Charsmap {
    /// `blob`: size of the trie in bytes as little-endian u32, the trie's units, NUL-terminated strings.
    pub fn new(blob: &[u8]) -> Result<Charsmap> {
        let refuse = || Error::Refused("the precompiled charsmap is damaged".to_string());
        let (size, rest) = blob.split_at_checked(4).ok_or_else(refuse)?;
        let size = u32::from_le_bytes([size[0], size[1], size[2], size[3]]) as usize;
        let (trie, strings) = rest.split_at_checked(size).ok_or_else(refuse)?;
        if size == 0 || !size.is_multiple_of(4) {
            return Err(refuse());
        }
        let trie = trie.chunks_exact(4).map(|u| u32::from_le_bytes([u[0], u[1], u[2], u[3]])).collect();
        Ok(Charsmap { trie, strings: strings.to_vec() })
    }

    /// The longest prefix of `text` that is mapped: (its length in bytes, what it becomes).
    pub fn longest(&self, text: &[u8]) -> Option<(usize, &str)> {
        let offset = |unit: u32| (unit >> 10) << ((unit & (1 << 9)) >> 6);
        let mut node = offset(*self.trie.first()?) as usize;
        let mut found = None;
        for (n, &byte) in text.iter().enumerate() {
            if byte == 0 {
                break;
            }
            node ^= usize::from(byte);
            let Some(&unit) = self.trie.get(node) else { break };
            if unit & (1 << 31 | 0xFF) != u32::from(byte) {
                break;
            }
            node ^= offset(unit) as usize;
            if unit >> 8 & 1 == 1 {
                let Some(&leaf) = self.trie.get(node) else { break };
                found = Some((n + 1, (leaf & 0x7FFF_FFFF) as usize));
            }
        }
        let (len, at) = found?;
        let string = self.strings.get(at..)?;
        let end = string.iter().position(|b| *b == 0)?;
        Some((len, std::str::from_utf8(&string[..end]).ok()?))
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    /// A charsmap of single bytes: every unit of the root's children in one block.
    pub fn of_bytes(map: &[(u8, &str)]) -> Vec<u8> {
        // root at 0 with offset 256: child of byte b at 256 ^ b; its leaf at (256 ^ b) ^ offset 512
        let mut trie = vec![0u32; 1024];
        let mut strings = Vec::new();
        trie[0] = 256 << 10;
        for (byte, string) in map {
            let node = 256 ^ usize::from(*byte);
            trie[node] = 512 << 10 | 1 << 8 | u32::from(*byte);
            trie[node ^ 512] = 1 << 31 | strings.len() as u32;
            strings.extend(string.bytes().chain([0]));
        }
        let mut blob = ((trie.len() * 4) as u32).to_le_bytes().to_vec();
        trie.iter().for_each(|unit| blob.extend(unit.to_le_bytes()));
        blob.extend(strings);
        blob
    }

    #[test]
    fn finds_what_is_mapped_and_refuses_damage() {
        let map = Charsmap::new(&of_bytes(&[(b'\t', " "), (b'A', "aa")])).unwrap();
        assert_eq!(map.longest(b"\tx"), Some((1, " ")));
        assert_eq!(map.longest(b"Ax"), Some((1, "aa")));
        assert_eq!(map.longest(b"xA"), None);
        for bad in [&b""[..], &[1, 0, 0, 0, 0], &[0, 0, 0, 0], &[4, 0, 0, 0, 0]] {
            assert!(Charsmap::new(bad).is_err());
        }
    }
}
