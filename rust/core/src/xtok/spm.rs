//! SentencePiece `.model` files: the few protobuf fields that say what a piece's bytes are.

use crate::error::{Error, Result};
use crate::xtok::alphabet::{fallback_byte, push_spaced};
use crate::xtok::normal::Step;
use crate::xtok::vocab::{flag, Builder, Kind, Prefix, Rules, Vocab};

/// One field of a message.
enum Value<'a> {
    Int(u64),
    Bytes(&'a [u8]),
}

/// Walks the fields of a message; a malformed one is a sentence.
struct Fields<'a> {
    rest: &'a [u8],
}

impl<'a> Fields<'a> {
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = self.rest.split_first()?;
            self.rest = rest;
            value |= u64::from(byte & 0x7F) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }

    fn bytes(&mut self, len: u64) -> Option<&'a [u8]> {
        let len = usize::try_from(len).ok().filter(|n| *n <= self.rest.len())?;
        let (head, rest) = self.rest.split_at(len);
        self.rest = rest;
        Some(head)
    }

    fn field(&mut self) -> Option<(u64, Value<'a>)> {
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Int(self.varint()?),
            1 => Value::Bytes(self.bytes(8)?),
            2 => {
                let len = self.varint()?;
                Value::Bytes(self.bytes(len)?)
            }
            5 => Value::Bytes(self.bytes(4)?),
            _ => return None,
        };
        Some((tag >> 3, value))
    }

    /// Calls `see` for every field; an error at the first malformed one.
    fn each(bytes: &'a [u8], mut see: impl FnMut(u64, Value<'a>) -> Result<()>) -> Result<()> {
        let mut fields = Fields { rest: bytes };
        while !fields.rest.is_empty() {
            let at = bytes.len() - fields.rest.len();
            let (number, value) = fields.field().ok_or_else(|| {
                Error::Refused(format!("not a SentencePiece model: malformed protobuf field at byte {at} of a message"))
            })?;
            see(number, value)?;
        }
        Ok(())
    }
}

/// Normalisation as the model's `normalizer_spec` states it.
struct Normalizer<'a> {
    charsmap: &'a [u8],
    dummy_prefix: bool,
    remove_extra: bool,
    escape: bool,
}

mod piece {
    pub const UNKNOWN: u64 = 2;
    pub const CONTROL: u64 = 3;
    pub const UNUSED: u64 = 5;
    pub const BYTE: u64 = 6;
}

pub fn from_model(bytes: &[u8]) -> Result<Vocab> {
    let mut builder = Builder::with_capacity(32_000);
    let mut normalizer = Normalizer { charsmap: &[], dummy_prefix: true, remove_extra: true, escape: true };
    let mut roles = [("unk", 0i64), ("bos", 1), ("eos", 2), ("pad", -1)];
    let mut trained = false;
    Fields::each(bytes, |number, value| {
        match (number, value) {
            (1, Value::Bytes(message)) => push_piece(message, &mut builder)?,
            (2, Value::Bytes(message)) => {
                trained = true;
                Fields::each(message, |number, value| {
                    if let (40..=43, Value::Int(id)) = (number, value) {
                        roles[number as usize - 40].1 = i64::from(id as i32);
                    }
                    Ok(())
                })?;
            }
            (3, Value::Bytes(message)) => Fields::each(message, |number, value| {
                match (number, value) {
                    (2, Value::Bytes(map)) => normalizer.charsmap = map,
                    (3, Value::Int(on)) => normalizer.dummy_prefix = on != 0,
                    (4, Value::Int(on)) => normalizer.remove_extra = on != 0,
                    (5, Value::Int(on)) => normalizer.escape = on != 0,
                    _ => {}
                }
                Ok(())
            })?,
            _ => {}
        }
        Ok(())
    })?;
    if builder.is_empty() || !trained {
        return Err(Error::Refused("not a SentencePiece model: it has no pieces, or no trainer_spec".into()));
    }
    if !normalizer.escape {
        return Err(Error::Refused("SentencePiece models with escape_whitespaces = false are not supported".into()));
    }
    let mut rules = Rules::new(Kind::SentencePiece);
    if normalizer.dummy_prefix {
        rules.prefix = Prefix::Every;
    }
    if !normalizer.charsmap.is_empty() {
        rules.normal.push(Step::charsmap(normalizer.charsmap.to_vec())?);
    }
    if normalizer.remove_extra {
        rules.normal.push(Step::CollapseSpaces);
    }
    let ids = builder.len() as i64;
    rules
        .roles
        .extend(roles.iter().filter(|(_, id)| (0..ids).contains(id)).map(|(role, id)| (role.to_string(), *id as u32)));
    Ok(builder.finish(rules, 0))
}

fn push_piece(message: &[u8], builder: &mut Builder) -> Result<()> {
    let (mut text, mut kind) = (&[][..], 1);
    Fields::each(message, |number, value| {
        match (number, value) {
            (1, Value::Bytes(bytes)) => text = bytes,
            (3, Value::Int(value)) => kind = value,
            _ => {}
        }
        Ok(())
    })?;
    let id = builder.len() as u64;
    let text = std::str::from_utf8(text)
        .map_err(|_| Error::Refused(format!("not a SentencePiece model: piece {id} is no UTF-8")))?;
    match kind {
        piece::BYTE => {
            let byte = fallback_byte(text)
                .ok_or_else(|| Error::Refused(format!("SentencePiece byte piece {id} is {text:?}, not <0xNN>")))?;
            builder.set(id, flag::BYTE, |out| out.push(byte))
        }
        piece::UNKNOWN => builder.set(id, flag::UNKNOWN | flag::SPECIAL, |out| out.extend(text.as_bytes())),
        piece::CONTROL => builder.set(id, flag::SPECIAL, |out| out.extend(text.as_bytes())),
        piece::UNUSED => builder.set(id, flag::LOSSY, |out| push_spaced(text, out)),
        _ => builder.set(id, 0, |out| push_spaced(text, out)),
    }
}
