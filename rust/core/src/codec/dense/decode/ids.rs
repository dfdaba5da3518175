//! Ids of a row: a class for each from the nibble stream, its place in the class from the raw stream.

use super::super::bitstream::SLACK;
use super::super::classes::CLASSES;
use super::super::tables::Tables;
use super::Ahead;

/// Memory for codes is a multiple of it.
pub const GROUP: usize = 32;

/// Where a row's ids begin: streams to the end of the payload, a nibble of the one and a bit of the other.
pub struct Begin<'a> {
    pub nibbles: &'a [u8],
    pub nibble: usize,
    pub raw: &'a [u8],
    pub bit: usize,
}

/// Takes a row's ids and gives the bit behind them; None when a rank is none of the vocabulary or the bytes end. The codes of
/// the entries, or numbers as far from each other, stand behind any other number and before some that fill up a group. It may
/// read ahead meanwhile.
pub type Walk = fn(&Tables, &Begin<'_>, &[u32], &mut [i32], &mut Ahead<'_>) -> Option<usize>;

/// `N` ids from each window.
#[inline(always)]
pub fn walk<const N: usize>(
    tables: &Tables,
    begin: &Begin<'_>,
    codes: &[u32],
    ids: &mut [i32],
    _: &mut Ahead<'_>,
) -> Option<usize> {
    let (ranks, id_of) = (&*tables.ranks, tables.dictionary.id_of.as_slice());
    let (mut rank, mut nibble, mut at) = (0u32, begin.nibble, begin.bit);
    let (befores, codes) = (codes.get(..ids.len())?, codes.get(1..1 + ids.len())?);
    let first = nibble;
    for ((slots, codes), befores) in ids.chunks_mut(N).zip(codes.chunks(N)).zip(befores.chunks(N)) {
        let mut window = u64::from_le_bytes(*begin.raw.get(at / 8..)?.first_chunk()?) >> (at % 8);
        for ((slot, code), before) in slots.iter_mut().zip(codes).zip(befores) {
            let class = usize::from(begin.nibbles.get(nibble / 2)? >> (4 * (nibble % 2)) & 15);
            let class = &ranks[class + CLASSES * usize::from(code == before && nibble > first)];
            rank = class.base.wrapping_add(window as u32 & class.mask).wrapping_add(rank & class.keep);
            window >>= class.width % 64;
            (at, nibble) = (at + class.width as usize, nibble + 1);
            *slot = *id_of.get(rank as usize)? as i32;
        }
    }
    (at.div_ceil(8) + SLACK <= begin.raw.len()).then_some(at)
}
