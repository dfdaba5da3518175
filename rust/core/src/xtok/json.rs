//! `tokenizer.json`: what a token's bytes are follows from the components the file names, never from the look of
//! the tokens.

use std::fmt;

use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::xtok::alphabet::{fallback_byte, push_base64, push_byte_level, push_spaced};
use crate::xtok::normal::Step;
use crate::xtok::vocab::{flag, Builder, Kind, Prefix, Rules, Vocab};

#[derive(Deserialize)]
struct File {
    model: Model,
    #[serde(default)]
    added_tokens: Vec<Added>,
    #[serde(default)]
    normalizer: Value,
    #[serde(default)]
    pre_tokenizer: Value,
    #[serde(default)]
    post_processor: Value,
    #[serde(default)]
    decoder: Value,
}

#[derive(Deserialize)]
struct Model {
    #[serde(rename = "type")]
    kind: Option<String>,
    vocab: Pieces,
    unk_token: Option<String>,
    unk_id: Option<u64>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    byte_fallback: bool,
}

#[derive(Deserialize)]
struct Added {
    id: u64,
    content: String,
    #[serde(default)]
    special: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
}

/// The model's vocabulary: a map of token to id, or a list of (token, score).
struct Pieces {
    arena: String,
    /// (end in the arena, id)
    items: Vec<(u32, u64)>,
    listed: bool,
}

impl Pieces {
    fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        let starts = std::iter::once(0).chain(self.items.iter().map(|item| item.0));
        starts.zip(&self.items).map(|(start, (end, id))| (&self.arena[start as usize..*end as usize], *id))
    }

    fn push(&mut self, token: &str, id: u64) {
        self.arena.push_str(token);
        self.items.push((self.arena.len() as u32, id));
    }
}

impl<'de> Deserialize<'de> for Pieces {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Pieces, D::Error> {
        struct See;
        impl<'de> Visitor<'de> for See {
            type Value = Pieces;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                write!(f, "a vocabulary: a map of token to id, or a list of (token, score)")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Pieces, A::Error> {
                let mut pieces = Pieces { arena: String::new(), items: Vec::new(), listed: false };
                while let Some((token, id)) = map.next_entry::<String, u64>()? {
                    pieces.push(&token, id);
                }
                Ok(pieces)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Pieces, A::Error> {
                let mut pieces = Pieces { arena: String::new(), items: Vec::new(), listed: true };
                while let Some((token, _)) = list.next_element::<(String, f64)>()? {
                    pieces.push(&token, pieces.items.len() as u64);
                }
                Ok(pieces)
            }
        }
        deserializer.deserialize_any(See)
    }
}

/// The components of a slot, sequences opened: (type, settings).
fn components<'a>(slot: &'a Value, out: &mut Vec<(&'a str, &'a Value)>) {
    let kind = slot.get("type").and_then(Value::as_str).unwrap_or_default();
    let lists = ["normalizers", "pretokenizers", "processors", "decoders"];
    match lists.iter().find_map(|list| slot.get(*list)).and_then(Value::as_array) {
        Some(list) if kind == "Sequence" => list.iter().for_each(|part| components(part, out)),
        _ if !kind.is_empty() => out.push((kind, slot)),
        _ => {}
    }
}

fn listed(slot: &Value) -> Vec<(&str, &Value)> {
    let mut out = Vec::new();
    components(slot, &mut out);
    out
}

fn has(parts: &[(&str, &Value)], kind: &str) -> bool {
    parts.iter().any(|(name, _)| *name == kind)
}

fn is_on(settings: &Value, key: &str, default: bool) -> bool {
    settings.get(key).and_then(Value::as_bool).unwrap_or(default)
}

/// `{"String": "x"}` or `{"Regex": "x"}` of a Replace.
fn pattern<'a>(settings: &'a Value, kind: &str) -> Option<&'a str> {
    settings.get("pattern")?.get(kind)?.as_str()
}

const SPACE: &str = "\u{2581}";

fn replaces_space(parts: &[(&str, &Value)], from: &str, to: &str) -> bool {
    parts.iter().any(|(kind, s)| {
        *kind == "Replace" && pattern(s, "String") == Some(from) && s.get("content").and_then(Value::as_str) == Some(to)
    })
}

pub fn from_json(text: &[u8]) -> Result<Vocab> {
    let file: File = serde_json::from_slice(text).map_err(|e| Error::Refused(format!("not a tokenizer.json: {e}")))?;
    let (pre, decoder) = (listed(&file.pre_tokenizer), listed(&file.decoder));
    let normalizer = listed(&file.normalizer);
    let names = |parts: &[(&str, &Value)]| parts.iter().map(|p| p.0.to_string()).collect::<Vec<_>>().join(", ");
    let described = || format!("pre_tokenizer [{}], decoder [{}]", names(&pre), names(&decoder));
    let model = &file.model;
    let declared = model.kind.as_deref();
    let guessed = match declared {
        Some(kind) => kind,
        None if model.vocab.listed => "Unigram",
        None if model.continuing_subword_prefix.is_some() && model.end_of_word_suffix.is_none() => "WordPiece",
        None => "BPE",
    };
    let kind = match guessed {
        "WordPiece" => Kind::WordPiece,
        "BPE" | "Unigram" => {
            if [&pre, &decoder, &normalizer].iter().any(|parts| has(parts, "ByteLevel")) {
                Kind::ByteLevel
            } else if has(&pre, "Metaspace")
                || has(&decoder, "Metaspace")
                || replaces_space(&decoder, SPACE, " ")
                || replaces_space(&normalizer, " ", SPACE)
            {
                Kind::SentencePiece
            } else {
                return Err(Error::Refused(format!(
                    "tokenizer.json has a {guessed} model without ByteLevel, Metaspace or \u{2581} components ({}): \
                     its bytes are not known; give them by VocabBytes.from_callback",
                    described()
                )));
            }
        }
        other => {
            return Err(Error::Refused(format!(
                "tokenizer.json has a {other:?} model; BPE, Unigram and WordPiece are known, \
                 others through VocabBytes.from_callback"
            )))
        }
    };
    if kind != Kind::WordPiece {
        for (name, value) in [
            ("end_of_word_suffix", &model.end_of_word_suffix),
            ("continuing_subword_prefix", &model.continuing_subword_prefix),
        ] {
            if let Some(value) = value.as_deref().filter(|v| !v.is_empty()) {
                return Err(Error::Refused(format!(
                    "tokenizer.json has a {guessed} model with {name} = {value:?}, which is not supported; \
                     give the bytes by VocabBytes.from_callback"
                )));
            }
        }
    }
    let mut rules = Rules::new(kind);
    rules.prefix = prefix(kind, &pre, &normalizer);
    rules.drops_space = kind == Kind::WordPiece;
    rules.normal = steps(&normalizer)?;
    if kind == Kind::SentencePiece && has(&pre, "WhitespaceSplit") && !rules.normal.contains(&Step::CollapseSpaces) {
        rules.normal.push(Step::CollapseSpaces);
    }
    rules.roles = template_roles(&file.post_processor);
    let builder = tokens(&file, kind, has(&decoder, "ByteFallback"))?;
    Ok(builder.finish(rules, 0))
}

fn tokens(file: &File, kind: Kind, decodes_fallback: bool) -> Result<Builder> {
    let model = &file.model;
    let mut builder = Builder::with_capacity(model.vocab.items.len() + file.added_tokens.len());
    let fallback = kind == Kind::SentencePiece && (model.byte_fallback || decodes_fallback);
    let continues = model.continuing_subword_prefix.as_deref().filter(|_| kind == Kind::WordPiece);
    for (token, id) in model.vocab.iter() {
        match kind {
            Kind::ByteLevel => {
                let mut known = true;
                builder.set(id, 0, |out| known = push_byte_level(token, out))?;
                if !known {
                    builder.set(id, flag::LOSSY, |out| out.extend(token.bytes()))?;
                }
            }
            Kind::WordPiece => match continues.and_then(|prefix| token.strip_prefix(prefix)) {
                Some(rest) => builder.set(id, flag::CONTINUATION, |out| out.extend(rest.bytes()))?,
                None => builder.set(id, 0, |out| out.extend(token.bytes()))?,
            },
            _ => match fallback_byte(token).filter(|_| fallback) {
                Some(byte) => builder.set(id, flag::BYTE, |out| out.push(byte))?,
                None => builder.set(id, 0, |out| push_spaced(token, out))?,
            },
        }
    }
    for added in &file.added_tokens {
        let strips = if added.lstrip || added.rstrip { flag::LOSSY } else { 0 };
        if added.special {
            builder.set(added.id, flag::SPECIAL | strips, |out| out.extend(added.content.bytes()))?;
        } else if kind == Kind::SentencePiece {
            builder.set(added.id, strips, |out| push_spaced(&added.content, out))?;
        } else {
            builder.set(added.id, strips, |out| out.extend(added.content.bytes()))?;
        }
    }
    // bytes have a token each in the other kinds, which therefore never write the unknown token
    if kind == Kind::WordPiece || !(fallback || kind == Kind::ByteLevel) {
        let named = model.unk_token.as_deref().and_then(|unk| {
            let added = file.added_tokens.iter().find(|a| a.content == unk).map(|a| a.id);
            added.or_else(|| model.vocab.iter().find(|(token, _)| *token == unk).map(|(_, id)| id))
        });
        if let Some(id) = named.or(model.unk_id) {
            builder.add_flags(id, flag::UNKNOWN);
        }
    }
    Ok(builder)
}

fn prefix(kind: Kind, pre: &[(&str, &Value)], normalizer: &[(&str, &Value)]) -> Prefix {
    if kind == Kind::WordPiece {
        return Prefix::Never;
    }
    if has(normalizer, "Prepend") {
        return Prefix::Every;
    }
    for (name, settings) in pre {
        match *name {
            "Metaspace" => {
                let scheme = settings.get("prepend_scheme").and_then(Value::as_str);
                return match scheme {
                    Some("first") => Prefix::First,
                    Some("never") => Prefix::Never,
                    Some(_) => Prefix::Every,
                    None if is_on(settings, "add_prefix_space", true) => Prefix::Every,
                    None => Prefix::Never,
                };
            }
            "ByteLevel" if is_on(settings, "add_prefix_space", true) => return Prefix::Every,
            _ => {}
        }
    }
    Prefix::Never
}

fn steps(normalizer: &[(&str, &Value)]) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for (name, settings) in normalizer {
        let content = settings.get("content").and_then(Value::as_str).unwrap_or_default();
        steps.push(match *name {
            "NFC" => Step::Nfc,
            "NFD" => Step::Nfd,
            "NFKC" => Step::Nfkc,
            "NFKD" => Step::Nfkd,
            "Lowercase" => Step::Lowercase,
            "StripAccents" => Step::StripAccents,
            "Nmt" => Step::Nmt,
            "BertNormalizer" => {
                let lower = is_on(settings, "lowercase", true);
                Step::Bert {
                    clean: is_on(settings, "clean_text", true),
                    chinese: is_on(settings, "handle_chinese_chars", true),
                    strip: is_on(settings, "strip_accents", lower),
                    lower,
                }
            }
            "Strip" => {
                Step::Strip { left: is_on(settings, "strip_left", true), right: is_on(settings, "strip_right", true) }
            }
            "Precompiled" => {
                let base64 = settings.get("precompiled_charsmap").and_then(Value::as_str).unwrap_or_default();
                let mut blob = Vec::new();
                push_base64(base64.as_bytes(), &mut blob)?;
                if blob.is_empty() {
                    continue;
                }
                Step::charsmap(blob)?
            }
            "Prepend" | "ByteLevel" => continue,
            "Replace" => match (pattern(settings, "String"), pattern(settings, "Regex")) {
                (Some(" "), _) if content == SPACE => continue,
                (Some(from), _) => Step::Replace { from: from.to_string(), to: content.to_string() },
                (None, Some(" {2,}")) if content == " " || content == SPACE => Step::CollapseSpaces,
                (None, regex) => {
                    return Err(Error::Refused(format!(
                        "tokenizer.json normalises by Replace of the regex {:?}, which is not supported",
                        regex.unwrap_or("?")
                    )))
                }
            },
            other => {
                return Err(Error::Refused(format!("tokenizer.json has the normalizer {other:?}, which is not known")))
            }
        });
    }
    Ok(steps)
}

/// bos and eos as the post-processor writes them.
fn template_roles(post: &Value) -> Vec<(String, u32)> {
    let mut roles = Vec::new();
    let id_of = |value: Option<&Value>| value.and_then(Value::as_u64).and_then(|id| u32::try_from(id).ok());
    for (name, settings) in listed(post) {
        match name {
            "TemplateProcessing" => {
                let (mut role, mut found) = ("bos", None);
                for part in settings.get("single").and_then(Value::as_array).into_iter().flatten() {
                    if part.get("Sequence").is_some() {
                        roles.extend(found.take().map(|id| (role.to_string(), id)));
                        role = "eos";
                    } else if let Some(name) = part.pointer("/SpecialToken/id").and_then(Value::as_str) {
                        let known = settings.get("special_tokens").and_then(|all| all.get(name));
                        let id = id_of(known.and_then(|special| special.pointer("/ids/0")));
                        // the first one behind the text ends it, the last one before it begins it
                        found = if role == "eos" { found.or(id) } else { id.or(found) };
                    }
                }
                roles.extend(found.map(|id| (role.to_string(), id)));
            }
            "BertProcessing" | "RobertaProcessing" => {
                for (role, key) in [("bos", "/cls/1"), ("eos", "/sep/1")] {
                    roles.extend(id_of(settings.pointer(key)).map(|id| (role.to_string(), id)));
                }
            }
            _ => {}
        }
    }
    roles
}
