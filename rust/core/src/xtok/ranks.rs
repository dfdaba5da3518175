//! Rank files: tiktoken (`base64 rank` a line) and tekken (JSON).

use serde::Deserialize;

use crate::error::{Error, Result};
use crate::xtok::alphabet::push_base64;
use crate::xtok::vocab::{flag, Builder, Kind, Rules, Vocab};

/// A tiktoken file and its special tokens: (name, id).
pub fn from_tiktoken(text: &[u8], specials: &[(String, u32)]) -> Result<Vocab> {
    let mut builder = Builder::with_capacity(text.len() / 16);
    for (n, line) in text.split(|b| *b == b'\n').enumerate() {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let malformed = || {
            let line = String::from_utf8_lossy(&line[..line.len().min(60)]).into_owned();
            Error::Refused(format!("not a tiktoken file: line {} is {line:?}, not `base64 rank`", n + 1))
        };
        let space = line.iter().rposition(|b| *b == b' ').ok_or_else(malformed)?;
        let rank = std::str::from_utf8(&line[space + 1..]).ok().and_then(|r| r.parse::<u64>().ok());
        let mut bad = false;
        builder.set(rank.ok_or_else(malformed)?, 0, |out| bad = push_base64(&line[..space], out).is_err())?;
        if bad {
            return Err(malformed());
        }
    }
    finish(builder, specials)
}

/// (bytes, id) pairs, as of `tiktoken.Encoding._mergeable_ranks`, and special tokens.
pub fn from_pairs<'a>(pairs: impl Iterator<Item = (&'a [u8], u32)>, specials: &[(String, u32)]) -> Result<Vocab> {
    let mut builder = Builder::default();
    for (bytes, id) in pairs {
        builder.set(u64::from(id), 0, |out| out.extend_from_slice(bytes))?;
    }
    finish(builder, specials)
}

fn finish(mut builder: Builder, specials: &[(String, u32)]) -> Result<Vocab> {
    if builder.is_empty() {
        return Err(Error::Refused("the rank file has no tokens".into()));
    }
    for (name, id) in specials {
        builder.set(u64::from(*id), flag::SPECIAL, |out| out.extend(name.as_bytes()))?;
    }
    Ok(builder.finish(Rules::new(Kind::Ranks), 0))
}

#[derive(Deserialize)]
struct Tekken {
    config: TekkenConfig,
    vocab: Vec<TekkenToken>,
    #[serde(default)]
    special_tokens: Option<Vec<TekkenSpecial>>,
}

#[derive(Deserialize)]
struct TekkenConfig {
    default_vocab_size: u64,
    default_num_special_tokens: u64,
}

#[derive(Deserialize)]
struct TekkenToken {
    rank: u64,
    token_bytes: String,
}

#[derive(Deserialize)]
struct TekkenSpecial {
    rank: u64,
    token_str: String,
}

/// tekken.json: ids below `default_num_special_tokens` are special, the rest are ranks in order, cut at
/// `default_vocab_size`. Names of special tokens that the file does not state are made up from their number.
pub fn from_tekken(text: &[u8]) -> Result<Vocab> {
    let file: Tekken = serde_json::from_slice(text).map_err(|e| Error::Refused(format!("not a tekken file: {e}")))?;
    let specials = file.config.default_num_special_tokens;
    let mut builder = Builder::with_capacity(file.vocab.len());
    for rank in 0..specials.min(1 << 20) {
        builder.set(rank, flag::SPECIAL, |out| out.extend(format!("<SPECIAL_{rank}>").bytes()))?;
    }
    // the names of the first versions' special tokens are part of the format, not of the file
    let old = [
        "<unk>",
        "<s>",
        "</s>",
        "[INST]",
        "[/INST]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "[TOOL_CALLS]",
        "[IMG]",
        "<pad>",
        "[IMG_BREAK]",
        "[IMG_END]",
        "[PREFIX]",
        "[MIDDLE]",
        "[SUFFIX]",
        "[SYSTEM_PROMPT]",
        "[/SYSTEM_PROMPT]",
        "[TOOL_CONTENT]",
    ]; // fmt: skip
    let named = file.special_tokens.unwrap_or_else(|| {
        old.iter().zip(0..).map(|(name, rank)| TekkenSpecial { rank, token_str: name.to_string() }).collect()
    });
    for special in named.iter().filter(|s| s.rank < specials) {
        builder.set(special.rank, flag::SPECIAL, |out| out.extend(special.token_str.bytes()))?;
    }
    for token in &file.vocab {
        let id = token.rank + specials;
        if id >= file.config.default_vocab_size {
            continue;
        }
        let mut done = Ok(());
        builder.set(id, 0, |out| done = push_base64(token.token_bytes.as_bytes(), out))?;
        done?;
    }
    let mut rules = Rules::new(Kind::Ranks);
    for (role, name) in [("unk", "<unk>"), ("bos", "<s>"), ("eos", "</s>"), ("pad", "<pad>")] {
        // the roles of a tekken file are fixed by these names
        if let Some(special) = named.iter().find(|s| s.token_str == name && s.rank < specials) {
            rules.roles.push((role.into(), special.rank as u32));
        }
    }
    Ok(builder.finish(rules, 0))
}
