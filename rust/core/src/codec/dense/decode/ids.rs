//! Ids of a row: a class for each from the nibble stream, its place in the class from the raw stream.

use super::super::bitstream::SLACK;
use super::super::tables::{RankClass, Tables};
use super::Wide;

/// Entries that are decoded together; memory for classes and ids is a multiple of it.
pub const GROUP: usize = 64;

/// Takes the raw parts of ids from bit `at` on and gives the bit behind them; None when a rank is none of the vocabulary or the
/// bytes end. `classes` holds whole groups, of which the first `ids.len()` count.
pub type Walk = fn(&[u8], &mut [u32], &[u8], usize, &Tables) -> Option<usize>;

/// `N` ids from each window.
#[inline(always)]
pub fn walk<const N: usize>(
    classes: &[u8],
    ids: &mut [u32],
    bytes: &[u8],
    mut at: usize,
    tables: &Tables,
) -> Option<usize> {
    let (ranks, id_of) = (&*tables.ranks, tables.dictionary.id_of.as_slice());
    let mut rank = 0u32;
    let (groups, rest) = classes.get(..ids.len())?.as_chunks::<N>();
    let (slots, last) = ids.as_chunks_mut::<N>();
    let mut next = |class: u8, window: &mut u64, at: &mut usize| -> Option<u32> {
        let class: &RankClass = &ranks[usize::from(class)];
        rank = class.base.wrapping_add(*window as u32 & class.mask).wrapping_add(rank & class.keep);
        *window >>= class.width % 64;
        *at += class.width as usize;
        id_of.get(rank as usize).copied()
    };
    for (group, slots) in groups.iter().zip(slots) {
        let mut window = u64::from_le_bytes(*bytes.get(at / 8..)?.first_chunk()?) >> (at % 8);
        for (class, slot) in group.iter().zip(slots) {
            *slot = next(*class, &mut window, &mut at)?;
        }
    }
    for (class, slot) in rest.iter().zip(last) {
        let mut window = u64::from_le_bytes(*bytes.get(at / 8..)?.first_chunk()?) >> (at % 8);
        *slot = next(*class, &mut window, &mut at)?;
    }
    (at.div_ceil(8) + SLACK <= bytes.len()).then_some(at)
}

/// Nibbles to bytes; `odd` begins with the second nibble of the first byte. `out` has room for 32 more.
#[inline(always)]
pub fn spread<W: Wide>(mut bytes: &[u8], odd: bool, mut out: &mut [u8]) {
    if odd {
        let (Some((first, rest)), Some((slot, others))) = (bytes.split_first(), out.split_first_mut()) else { return };
        *slot = first >> 4;
        (bytes, out) = (rest, others);
    }
    let (blocks, rest) = bytes.as_chunks::<16>();
    let slots = out.as_chunks_mut::<32>().0;
    for (slot, block) in slots.iter_mut().zip(blocks) {
        *slot = W::spread(block);
    }
    if let Some(slot) = slots.get_mut(blocks.len()).filter(|_| !rest.is_empty()) {
        let mut block = [0; 16];
        block[..rest.len()].copy_from_slice(rest);
        *slot = W::spread(&block);
    }
}
