//! Salvage: whole sequences out of torn or damaged shards, found by their blocks alone.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;

use serde::Serialize;

use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::files::{self, FileSource, Source, OPEN, SMALL};
use crate::format::block::{self, Block, KIND_ROWS};
use crate::format::MAX_BLOCK_DECODED;
use crate::log::open_dir;
use crate::rows::{Rows, RowsMut};
use crate::shard::read_header;
use crate::writer::Writer;

/// What was taken over, and what could not be.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Salvage {
    pub files: u64,
    pub sequences: u64,
    pub tokens: u64,
    /// Sequences the cache holds already.
    pub known: u64,
    /// One line for each thing that is lost or was put aside.
    pub lost: Vec<String>,
}

// rows of one sequence, collected block by block
#[derive(Default)]
struct Partial {
    tokens: Vec<i32>,
    ids: Vec<i32>,
    log_probs: Vec<f32>,
    log_rest: Vec<f32>,
}

impl Partial {
    fn push(&mut self, block: &Block<'_>, codec: &Codec, k: usize) -> std::result::Result<(), String> {
        let (old, new) = (self.tokens.len(), self.tokens.len() + block.head.rows as usize);
        let size = block.head.rows as u64 * k as u64;
        // a row takes at least 4 bytes of payload: nothing is allocated for rows that cannot be there
        if block.head.rows as usize > block.payload.len() || size > MAX_BLOCK_DECODED {
            return Err(format!("{} rows in {} bytes", block.head.rows, block.payload.len()));
        }
        self.tokens.resize(new, 0);
        self.ids.resize(new * k, 0);
        self.log_probs.resize(new * k, 0.0);
        self.log_rest.resize(new, 0.0);
        codec.decode_tokens(block.payload, block.head.shape(), &mut self.tokens[old..])?;
        let out = RowsMut {
            ids: &mut self.ids[old * k..],
            log_probs: &mut self.log_probs[old * k..],
            log_rest: &mut self.log_rest[old..],
        };
        codec.decode(block.payload, block.head.shape(), out)
    }

    fn rows(&self, k: usize) -> Rows<'_> {
        Rows { k, tokens: &self.tokens, ids: &self.ids, log_probs: &self.log_probs, log_rest: &self.log_rest }
    }
}

/// Takes over the open shards of writers that died. A living writer holds a lock on its file and is left alone.
pub fn salvage_dead(writer: &mut Writer) -> Result<Salvage> {
    let mut salvage = Salvage::default();
    let dir = open_dir(writer.root());
    let mut done = Vec::new();
    for name in files::list(&dir)?.iter().filter(|n| n.ends_with(SMALL)) {
        let path = dir.join(name);
        done.extend(files::lock_abandoned(&path).map(|lock| (path, lock)));
    }
    for name in files::list(&dir)?.iter().filter(|n| n.ends_with(OPEN)) {
        let path = dir.join(name);
        let Some(file) = files::lock_abandoned(&path) else { continue };
        let copy = file.try_clone().map_err(Error::io("open", &path))?;
        if salvage_file(writer, copy, name, &mut salvage)? {
            salvage.files += 1;
            done.push((path, file));
        }
    }
    writer.commit()?;
    for (path, _lock) in done {
        match fs::remove_file(&path) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(Error::io("remove", &path)(e)),
            _ => {} // another writer that opened meanwhile may have been first
        }
    }
    Ok(salvage)
}

/// Adds every whole sequence of `file` to the writer; false when the file is not this version's or not this cache's.
fn salvage_file(writer: &mut Writer, file: File, name: &str, salvage: &mut Salvage) -> Result<bool> {
    let source = FileSource::from_file(file).map_err(Error::io("open", Path::new(name)))?;
    // the header may be the damaged part: the cache's own codec then has to decode the blocks
    let codec = match read_header(&source, name) {
        Ok((header, _)) if header.spec_hash != writer.spec().hash => {
            salvage.lost.push(format!("{name} was written for another spec and stays where it is"));
            return Ok(false);
        }
        Ok((header, _)) => header.codec,
        Err(Error::Unsupported { what, .. }) => {
            salvage.lost.push(format!("{name} stays where it is: {what}"));
            return Ok(false);
        }
        Err(_) => Codec::for_spec(writer.spec()),
    };
    let k = writer.spec().k as usize;
    let mut open: HashMap<String, Partial> = HashMap::new();
    let mut lost = Vec::new();
    let mut failed = None;
    let torn = scan(&source, |block| {
        if block.head.kind != KIND_ROWS || failed.is_some() {
            return;
        }
        let key = block.head.key;
        if block.head.first_row == 0 {
            open.insert(key.to_string(), Partial::default());
        }
        let Some(partial) = open.get_mut(key).filter(|p| p.tokens.len() == block.head.first_row as usize) else {
            lost.push(format!("{name}, block {}: the rows of {key:?} before it are lost", block.head.number));
            return;
        };
        if let Err(what) = partial.push(block, &codec, k) {
            lost.push(format!("{name}, block {}: {what}", block.head.number));
            open.remove(key);
            return;
        }
        if !block.head.last {
            return;
        }
        let Some(whole) = open.remove(key) else { return };
        match writer.add_stored(key, &whole.rows(k)) {
            Ok(true) => {
                salvage.sequences += 1;
                salvage.tokens += whole.tokens.len() as u64;
            }
            Ok(false) => salvage.known += 1,
            Err(e @ (Error::Io { .. } | Error::Stopped(_))) => failed = Some(e),
            Err(e) => lost.push(format!("{name}: {e}")),
        }
    })
    .map_err(Error::io("read", Path::new(name)))?;
    if let Some((count, first)) = torn {
        lost.push(format!("{name}: {count} blocks are not whole, the first at byte {first}"));
    }
    lost.extend(open.keys().map(|key| format!("{name}: sequence {key:?} is not whole")));
    salvage.lost.extend(lost);
    failed.map_or(Ok(true), Err)
}

/// Calls `found` for every whole block, stepping over damage to the next place where a block begins. Returns how many
/// blocks begin but are not whole, and where the first of them does.
fn scan(source: &dyn Source, mut found: impl FnMut(&Block<'_>)) -> std::io::Result<Option<(u64, u64)>> {
    let mut torn: Option<(u64, u64)> = None;
    let len = source.len();
    let mut budget = len.saturating_mul(16); // bytes hashed in vain: keeps a hostile file from costing len squared
    let mut at = 0u64;
    let mut window = vec![0u8; 1 << 16];
    let mut bytes = Vec::new();
    while at + block::FIXED as u64 <= len {
        // look for the magic at 8-byte steps, a window at a time
        let n = ((len - at) as usize).min(window.len());
        source.read_at(at, &mut window[..n])?;
        let Some(skip) =
            (0..n.saturating_sub(block::FIXED - 1)).step_by(8).find(|i| window[*i..*i + 4] == block::MAGIC)
        else {
            at += (n.saturating_sub(block::FIXED - 1)).next_multiple_of(8).max(8) as u64;
            continue;
        };
        at += skip as u64;
        let claimed = block::claimed_length(&window[skip..skip + block::FIXED]).unwrap_or(0) as u64;
        if claimed > 0 && claimed <= len - at && budget >= claimed {
            bytes.resize(claimed as usize, 0);
            source.read_at(at, &mut bytes)?;
            if let Ok(block) = block::decode(&bytes) {
                found(&block);
                at += claimed;
                continue;
            }
            budget -= claimed;
        }
        torn = torn.map_or(Some((1, at)), |(count, first)| Some((count + 1, first)));
        at += 8;
    }
    Ok(torn)
}
