//! Ids by rank: the most frequent ids come first, listed in segments; the others follow in the order of their ids.
//!
//! stored: u32 segments | for each u32 count, u8 shift, 3 zero bytes, u32 bytes | the segments' streams, one after the other
//! A segment's ids ascend; each is stored as its distance from the one before, less 1: distance >> shift in unary (zeros and a
//! one), then the lowest shift bits.

use super::bitstream::{BitReader, BitWriter, SLACK};
use crate::bytes::Cursor;

const MAX_SEGMENTS: usize = 64;

#[derive(Clone)]
pub struct Dictionary {
    pub id_of: Vec<u32>,
    pub rank_of: Vec<u32>,
    /// Ends of the listed segments, in ranks.
    segments: Vec<u32>,
}

impl Dictionary {
    /// Every id is its own rank.
    pub fn identity(vocab_size: u32) -> Dictionary {
        let id_of: Vec<u32> = (0..vocab_size).collect();
        Dictionary { rank_of: id_of.clone(), id_of, segments: Vec::new() }
    }

    /// Whether every id is its own rank.
    pub fn is_identity(&self) -> bool {
        self.segments.is_empty()
    }

    /// Lists `listed` ids, the most frequent first, in two segments an octave.
    pub fn ranked(by_frequency: &[u32], listed: usize, vocab_size: u32) -> Dictionary {
        let mut segments = Vec::new();
        let mut end = 16usize;
        while listed > 0 && segments.last().is_none_or(|last| (*last as usize) < listed) {
            segments.push(end.min(listed) as u32);
            end = if end.is_power_of_two() { end + end / 2 } else { end / 3 * 4 };
        }
        let mut id_of = by_frequency[..listed].to_vec();
        let mut start = 0;
        for end in &segments {
            id_of[start..*end as usize].sort_unstable();
            start = *end as usize;
        }
        Self::complete(id_of, segments, vocab_size)
    }

    fn complete(mut id_of: Vec<u32>, segments: Vec<u32>, vocab_size: u32) -> Dictionary {
        let mut rank_of = vec![u32::MAX; vocab_size as usize];
        for (rank, id) in id_of.iter().enumerate() {
            rank_of[*id as usize] = rank as u32;
        }
        id_of.reserve_exact(vocab_size as usize - id_of.len());
        for (id, rank) in rank_of.iter_mut().enumerate() {
            if *rank == u32::MAX {
                *rank = id_of.len() as u32;
                id_of.push(id as u32);
            }
        }
        Dictionary { id_of, rank_of, segments }
    }

    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&(self.segments.len() as u32).to_le_bytes());
        let mut streams = Vec::new();
        let mut start = 0usize;
        for end in &self.segments {
            let ids = &self.id_of[start..*end as usize];
            let spread = (self.id_of.len() / ids.len()).max(1);
            let shift = spread.ilog2();
            let mut stream = BitWriter::default();
            let mut next = 0;
            for id in ids {
                let distance = id - next;
                for _ in 0..(distance >> shift) / 32 {
                    stream.put(0, 32);
                }
                let zeros = (distance >> shift) % 32;
                let low = u64::from(distance & ((1 << shift) - 1));
                stream.put((1 | low << 1) << zeros, zeros + 1 + shift);
                next = id + 1;
            }
            let stream = stream.finish().to_vec();
            out.extend_from_slice(&(ids.len() as u32).to_le_bytes());
            out.extend_from_slice(&shift.to_le_bytes());
            out.extend_from_slice(&(stream.len() as u32).to_le_bytes());
            streams.push(stream);
            start = *end as usize;
        }
        streams.iter().for_each(|s| out.extend_from_slice(s));
    }

    /// Takes what `encode` wrote from the cursor.
    pub fn decode(cursor: &mut Cursor<'_>, vocab_size: u32) -> Result<Dictionary, String> {
        let n = cursor.u32()? as usize;
        if n > MAX_SEGMENTS {
            return Err(format!("{n} segments of ids, at most {MAX_SEGMENTS} are accepted"));
        }
        let mut heads = Vec::with_capacity(n);
        for _ in 0..n {
            let (count, shift, len) = (cursor.u32()?, cursor.u8()?, {
                cursor.zeros(3)?;
                cursor.u32()? as usize
            });
            if count == 0 || shift > 31 {
                return Err(format!("a segment of {count} ids with shift {shift}"));
            }
            heads.push((count, u32::from(shift), len));
        }
        let listed: u64 = heads.iter().map(|h| u64::from(h.0)).sum();
        if listed > u64::from(vocab_size) {
            return Err(format!("{listed} ids are listed of a vocabulary of {vocab_size}"));
        }
        let mut id_of = Vec::with_capacity(listed as usize);
        let mut seen = vec![0u64; (vocab_size as usize).div_ceil(64)];
        let mut segments = Vec::with_capacity(n);
        for (count, shift, len) in heads {
            let mut bytes = cursor.take(len)?.to_vec();
            bytes.extend([0; SLACK]);
            let mut bits = BitReader::new(&bytes);
            let mut next = 0u64;
            for _ in 0..count {
                let short = || "a segment of ids ends early".to_string();
                let high = u64::from(bits.unary().ok_or_else(short)?);
                let id = next + (high << shift) + u64::from(bits.take(shift).ok_or_else(short)?);
                if id >= u64::from(vocab_size) || seen[id as usize / 64] >> (id % 64) & 1 == 1 {
                    return Err(format!("id {id} is listed twice or is outside a vocabulary of {vocab_size}"));
                }
                seen[id as usize / 64] |= 1 << (id % 64);
                id_of.push(id as u32);
                next = id + 1;
            }
            bits.end(len)?;
            segments.push(id_of.len() as u32);
        }
        Ok(Self::complete(id_of, segments, vocab_size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip_and_size() {
        let vocab = 5000u32;
        let mut by_frequency: Vec<u32> = (0..vocab).map(|i| i.wrapping_mul(2_654_435_761) % vocab).collect();
        by_frequency.sort_unstable();
        by_frequency.dedup();
        by_frequency.reverse();
        for listed in [0, 1, 16, 17, 1000, by_frequency.len()] {
            let dictionary = Dictionary::ranked(&by_frequency, listed, vocab);
            let mut bytes = Vec::new();
            dictionary.encode(&mut bytes);
            let mut cursor = Cursor::new(&bytes);
            let again = Dictionary::decode(&mut cursor, vocab).expect("a dictionary");
            assert_eq!(cursor.left(), 0);
            assert_eq!((&again.id_of, &again.rank_of), (&dictionary.id_of, &dictionary.rank_of));
            assert!(again.id_of.iter().enumerate().all(|(r, id)| again.rank_of[*id as usize] == r as u32));
            let mut first: Vec<u32> = again.id_of[..listed].to_vec();
            let mut wanted = by_frequency[..listed].to_vec();
            first.sort_unstable();
            wanted.sort_unstable();
            assert_eq!(first, wanted);
        }
    }

    #[test]
    fn false_lists_are_refused() {
        let dictionary = Dictionary::ranked(&[3, 1, 2], 3, 10);
        let mut bytes = Vec::new();
        dictionary.encode(&mut bytes);
        assert!(Dictionary::decode(&mut Cursor::new(&bytes), 3).is_err_and(|e| e.contains("outside")));
        assert!(Dictionary::decode(&mut Cursor::new(&bytes), 2).is_err_and(|e| e.contains("3 ids are listed")));
        bytes[0] = 65;
        assert!(Dictionary::decode(&mut Cursor::new(&bytes), 10).is_err_and(|e| e.contains("65 segments")));
    }
}
