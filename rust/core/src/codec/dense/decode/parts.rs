//! The parts of a payload; every length is checked against the bytes that are there.

use super::super::bitstream::SLACK;
use super::super::Layout;
use crate::bytes::{padded, Cursor};
use crate::codec::Shape;

pub struct Parts<'a> {
    pub ragged: bool,
    pub words: &'a [u8],
    pub codes: &'a [u8],
    /// From the start of each stream to the end of the payload, and the stream's own length.
    pub nibbles: (&'a [u8], usize),
    pub differences: (&'a [u8], usize),
    pub raw: (&'a [u8], usize),
}

pub fn split<'a>(layout: &Layout, payload: &'a [u8], shape: Shape) -> Result<Parts<'a>, String> {
    let mut cursor = Cursor::new(payload);
    let ragged = cursor.u8()?;
    cursor.zeros(3)?;
    let lens = [cursor.u32()? as usize, cursor.u32()? as usize, cursor.u32()? as usize];
    if ragged > 1 || (ragged == 0 && shape.entries != shape.rows * layout.k as usize) {
        return Err(format!("ragged {ragged} with {} entries in {} rows of {}", shape.entries, shape.rows, layout.k));
    }
    let mut part = |len: usize| -> Result<&'a [u8], String> {
        let bytes = cursor.take(len)?;
        cursor.zeros(padded(len) - len)?;
        Ok(bytes)
    };
    let words = part(shape.rows * layout.words() * 4)?;
    let codes = part(shape.entries * layout.code_bytes())?;
    let streams = cursor.take(lens[0] + lens[1] + lens[2] + SLACK)?;
    cursor.end()?;
    if streams[lens[0] + lens[1] + lens[2]..] != [0; SLACK] {
        return Err("the bytes behind the streams are not zero".to_string());
    }
    Ok(Parts {
        ragged: ragged == 1,
        words,
        codes,
        nibbles: (streams, lens[0]),
        differences: (&streams[lens[0]..], lens[1]),
        raw: (&streams[lens[0] + lens[1]..], lens[2]),
    })
}
