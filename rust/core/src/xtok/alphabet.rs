//! How tokenizers spell bytes as text: the byte-level alphabet, `<0xNN>`, base64.

use crate::error::{Error, Result};

/// The byte that a character of the byte-level alphabet stands for: printable Latin-1 stands for itself, the 68 other
/// bytes are U+0100 onwards in byte order.
pub fn byte_of(c: char) -> Option<u8> {
    const REST: [u8; 68] = rest();
    match c as u32 {
        c @ (0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) => Some(c as u8),
        c @ 0x100..=0x143 => Some(REST[(c - 0x100) as usize]),
        _ => None,
    }
}

const fn rest() -> [u8; 68] {
    let mut out = [0u8; 68];
    let (mut byte, mut n) = (0usize, 0usize);
    while byte < 256 {
        if !matches!(byte, 0x21..=0x7E | 0xA1..=0xAC | 0xAE..=0xFF) {
            out[n] = byte as u8;
            n += 1;
        }
        byte += 1;
    }
    out
}

/// Appends the bytes of a token in the byte-level alphabet; false, and nothing appended, when it is not in it.
pub fn push_byte_level(token: &str, out: &mut Vec<u8>) -> bool {
    let start = out.len();
    for c in token.chars() {
        match byte_of(c) {
            Some(byte) => out.push(byte),
            None => {
                out.truncate(start);
                return false;
            }
        }
    }
    true
}

/// Appends a SentencePiece piece, whose U+2581 is a space.
pub fn push_spaced(piece: &str, out: &mut Vec<u8>) {
    let mut rest = piece;
    while let Some(at) = rest.find('\u{2581}') {
        out.extend_from_slice(&rest.as_bytes()[..at]);
        out.push(b' ');
        rest = &rest[at + '\u{2581}'.len_utf8()..];
    }
    out.extend_from_slice(rest.as_bytes());
}

/// The byte of a byte-fallback piece, `<0x0A>`.
pub fn fallback_byte(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    if digits.len() == 2 && digits.bytes().all(|d| d.is_ascii_hexdigit()) {
        u8::from_str_radix(digits, 16).ok()
    } else {
        None
    }
}

/// Appends the bytes of standard base64, with or without padding.
pub fn push_base64(text: &[u8], out: &mut Vec<u8>) -> Result<()> {
    let body = text.strip_suffix(b"==").or_else(|| text.strip_suffix(b"=")).unwrap_or(text);
    let (mut bits, mut held) = (0u32, 0u32);
    for &c in body {
        let six = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return Err(Error::Refused(format!("{:?} is no base64", String::from_utf8_lossy(text)))),
        };
        bits = bits << 6 | u32::from(six);
        held += 6;
        if held >= 8 {
            held -= 8;
            out.push((bits >> held) as u8);
        }
    }
    if body.len() % 4 == 1 {
        return Err(Error::Refused(format!("{:?} is no base64", String::from_utf8_lossy(text))));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_byte_level_alphabet_is_a_bijection() {
        let mut seen = [false; 256];
        for c in (0..0x200).filter_map(char::from_u32) {
            if let Some(byte) = byte_of(c) {
                assert!(!std::mem::replace(&mut seen[byte as usize], true), "{c:?}");
            }
        }
        assert!(seen.iter().all(|s| *s));
        assert_eq!((byte_of('Ġ'), byte_of('Ċ'), byte_of('ĉ'), byte_of('č')), (Some(32), Some(10), Some(9), Some(13)));
    }

    #[test]
    fn spellings() {
        let mut out = Vec::new();
        push_spaced("▁▁a▁b", &mut out);
        assert_eq!(out, b"  a b");
        assert_eq!((fallback_byte("<0x0A>"), fallback_byte("<0xA>"), fallback_byte("<0x+1>")), (Some(10), None, None));
        for (text, bytes) in [("", ""), ("Zg==", "f"), ("Zm8", "fo"), ("Zm9v", "foo"), ("IHRv", " to")] {
            let mut out = Vec::new();
            push_base64(text.as_bytes(), &mut out).unwrap();
            assert_eq!(out, bytes.as_bytes());
        }
        assert!(push_base64(b"a", &mut Vec::new()).is_err() && push_base64(b"a b=", &mut Vec::new()).is_err());
    }
}
