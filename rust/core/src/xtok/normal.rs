//! What normalising tokenizers do to a text, piece by piece of the original: the pieces are the segments that
//! alignments of such tokenizers are made on.

use serde::{Deserialize, Serialize};
use unicode_normalization::{char::canonical_combining_class, is_nfc_quick, IsNormalized, UnicodeNormalization};
use unicode_properties::{GeneralCategory, GeneralCategoryGroup, UnicodeGeneralCategory};

use crate::error::Result;
use crate::xtok::charsmap::Charsmap;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Step {
    Nfc,
    Nfd,
    Nfkc,
    Nfkd,
    Lowercase,
    StripAccents,
    Nmt,
    Bert {
        clean: bool,
        chinese: bool,
        strip: bool,
        lower: bool,
    },
    Replace {
        from: String,
        to: String,
    },
    Charsmap(Blob),
    /// Runs of spaces become one, leading and trailing ones go.
    CollapseSpaces,
    Strip {
        left: bool,
        right: bool,
    },
}

/// A charsmap with the bytes it was made of, which are what is stored.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Blob {
    bytes: Vec<u8>,
    map: Charsmap,
}

impl TryFrom<String> for Blob {
    type Error = crate::Error;

    fn try_from(hex: String) -> Result<Blob> {
        let digit = |c: u8| (c as char).to_digit(16).unwrap_or(0) as u8;
        let bytes: Vec<u8> = hex.as_bytes().chunks_exact(2).map(|d| digit(d[0]) << 4 | digit(d[1])).collect();
        Ok(Blob { map: Charsmap::new(&bytes)?, bytes })
    }
}

impl From<Blob> for String {
    fn from(blob: Blob) -> String {
        blob.bytes.iter().map(|b| format!("{b:02x}")).collect()
    }
}

impl Step {
    pub fn charsmap(bytes: Vec<u8>) -> Result<Step> {
        Ok(Step::Charsmap(Blob { map: Charsmap::new(&bytes)?, bytes }))
    }

    /// How much of a text is lost, for choosing the side that stands for the text.
    pub fn loss(&self) -> u32 {
        match self {
            Step::Nfc | Step::Nfd => 1,
            Step::Nfkc | Step::Nfkd => 2,
            Step::Strip { .. } => 3,
            _ => 4,
        }
    }

    fn joins(&self) -> bool {
        matches!(self, Step::Nfc | Step::Nfd | Step::Nfkc | Step::Nfkd)
    }

    fn apply(&self, piece: &mut String) {
        match self {
            Step::Nfc => *piece = piece.nfc().collect(),
            Step::Nfd => *piece = piece.nfd().collect(),
            Step::Nfkc => *piece = piece.nfkc().collect(),
            Step::Nfkd => *piece = piece.nfkd().collect(),
            Step::Lowercase => *piece = piece.chars().flat_map(char::to_lowercase).collect(),
            Step::StripAccents => piece.retain(|c| c.general_category_group() != GeneralCategoryGroup::Mark),
            Step::Nmt => *piece = piece.chars().filter(|c| !nmt_drops(*c)).map(nmt_space).collect(),
            Step::Bert { clean, strip, lower, .. } => {
                if *clean {
                    *piece = piece.chars().filter(|c| !bert_drops(*c)).map(bert_space).collect();
                }
                if *strip {
                    *piece = piece.nfd().filter(|c| c.general_category() != GeneralCategory::NonspacingMark).collect();
                }
                if *lower {
                    *piece = piece.chars().flat_map(char::to_lowercase).collect();
                }
            }
            Step::Replace { from, to } => *piece = piece.replace(from.as_str(), to),
            Step::Charsmap(_) | Step::CollapseSpaces | Step::Strip { .. } => {}
        }
    }
}

fn bert_drops(c: char) -> bool {
    let control = !matches!(c, '\t' | '\n' | '\r') && c.general_category_group() == GeneralCategoryGroup::Other;
    c == '\0' || c == '\u{FFFD}' || control
}

fn bert_space(c: char) -> char {
    if c.is_whitespace() {
        ' '
    } else {
        c
    }
}

fn nmt_drops(c: char) -> bool {
    matches!(c as u32, 0x1..=0x8 | 0xB | 0xE..=0x1F | 0x7F | 0x8F | 0x9F)
}

fn nmt_space(c: char) -> char {
    match c as u32 {
        0x9 | 0xA | 0xC | 0xD | 0x1680 | 0x200B..=0x200F | 0x2028 | 0x2029 | 0x2581 | 0xFEFF | 0xFFFD => ' ',
        _ => c,
    }
}

/// Characters that a WordPiece pre-tokenizer makes words of their own.
pub fn is_own_word(c: char, chinese: bool) -> bool {
    c.is_ascii_punctuation()
        || c.general_category_group() == GeneralCategoryGroup::Punctuation
        || (chinese
            && matches!(c as u32, 0x4E00..=0x9FFF | 0x3400..=0x4DBF | 0x20000..=0x2A6DF | 0x2A700..=0x2B73F
                | 0x2B740..=0x2B81F | 0x2B820..=0x2CEAF | 0xF900..=0xFAFF | 0x2F800..=0x2FA1F))
}

/// A stretch of the original text that is normalised on its own.
pub struct Piece<'a> {
    /// Bytes of the original.
    pub len: usize,
    /// What they become.
    pub text: &'a str,
    pub changed: bool,
}

/// Cuts `text` into pieces, normalises each and hands it to `see`. Invalid UTF-8 counts as one U+FFFD for each maximal
/// invalid subsequence. Spaces are collapsed and stripped by the caller, who sees the whole.
pub fn each_piece(text: &[u8], steps: &[Step], mut see: impl FnMut(Piece<'_>)) {
    let joins = steps.iter().any(Step::joins);
    let maps: Vec<&Charsmap> =
        steps.iter().filter_map(|s| if let Step::Charsmap(b) = s { Some(&b.map) } else { None }).collect();
    let mut piece = String::new();
    for chunk in text.utf8_chunks() {
        let mut rest = chunk.valid();
        while let Some(first) = rest.chars().next() {
            let mut len = first.len_utf8();
            if joins {
                while rest[len..].chars().next().is_some_and(|c| !starts_piece(c)) {
                    len += rest[len..].chars().next().map_or(0, char::len_utf8);
                }
            }
            piece.clear();
            let mapped = maps.iter().find_map(|map| map.longest(rest.as_bytes()));
            let replaced = steps.iter().find_map(|s| match s {
                Step::Replace { from, .. } if from.len() > len && rest.starts_with(from.as_str()) => Some(from.len()),
                _ => None,
            });
            match (mapped, replaced) {
                (Some((n, becomes)), _) if rest.is_char_boundary(n) => {
                    len = n;
                    piece.push_str(becomes);
                }
                (_, Some(n)) => {
                    len = n;
                    piece.push_str(&rest[..len]);
                }
                _ => piece.push_str(&rest[..len]),
            }
            if len > 1 || !first.is_ascii() || !steps.iter().all(Step::joins) {
                steps.iter().for_each(|step| step.apply(&mut piece));
            }
            see(Piece { len, text: &piece, changed: piece != rest[..len] });
            rest = &rest[len..];
        }
        if !chunk.invalid().is_empty() {
            piece.clear();
            piece.push('\u{FFFD}');
            steps.iter().for_each(|step| step.apply(&mut piece));
            see(Piece { len: chunk.invalid().len(), text: &piece, changed: true });
        }
    }
}

/// Whether nothing before `c` can combine with it in any normal form.
fn starts_piece(c: char) -> bool {
    if c.is_ascii() {
        return true;
    }
    let first = std::iter::once(c).nfkd().next().unwrap_or(c);
    canonical_combining_class(first) == 0 && is_nfc_quick(std::iter::once(first)) != IsNormalized::Maybe
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pieces(text: &str, steps: &[Step]) -> Vec<(usize, String)> {
        let mut out = Vec::new();
        each_piece(text.as_bytes(), steps, |p| out.push((p.len, p.text.to_string())));
        out
    }

    proptest! {
        #[test]
        fn normalised_pieces_are_the_normalised_text(text in "[a-zA-Z \u{300}-\u{345}À-ỹ가-깋\u{1100}-\u{11ff}ﬁ-ﬆ㌀-㌗ｱ-ﾟ]{0,12}") {
            for (step, whole) in [
                (Step::Nfc, text.nfc().collect::<String>()),
                (Step::Nfd, text.nfd().collect()),
                (Step::Nfkc, text.nfkc().collect()),
                (Step::Nfkd, text.nfkd().collect()),
                (Step::Lowercase, text.chars().flat_map(char::to_lowercase).collect()),
            ] {
                let cut = pieces(&text, &[step]);
                prop_assert_eq!(cut.iter().map(|p| p.1.as_str()).collect::<String>(), whole);
                prop_assert_eq!(cut.iter().map(|p| p.0).sum::<usize>(), text.len());
            }
        }
    }

    #[test]
    fn bert_cleans_strips_and_lowers_character_by_character() {
        let bert = [Step::Bert { clean: true, chinese: true, strip: true, lower: true }];
        let cut = pieces("\u{feff}É\u{301}\tİ한", &bert);
        let want = [(3, ""), (2, "e"), (2, ""), (1, " "), (2, "i"), (3, "\u{1112}\u{1161}\u{11ab}")];
        assert_eq!(cut, want.map(|(n, s)| (n, s.to_string())));
    }

    #[test]
    fn invalid_bytes_are_a_piece_for_each_maximal_subsequence() {
        let mut out = Vec::new();
        each_piece(b"a\xF0\x9F\x98\xFFb", &[Step::Nfc], |p| out.push((p.len, p.text.to_string())));
        assert_eq!(out, [(1, "a"), (3, "\u{fffd}"), (1, "\u{fffd}"), (1, "b")].map(|(n, s)| (n, s.to_string())));
    }
}
