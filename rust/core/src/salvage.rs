//! Salvage: whole sequences out of torn or damaged shards, found by their blocks alone.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;

use crate::codec::dense::{Dense, Tables, MAX_TABLES, TABLES_MAGIC};
use crate::codec::{Codec, Declared};
use crate::columns::Collected;
use crate::error::{Error, Result};
use crate::files::{self, FileSource, Source, OPEN, SMALL};
use crate::format::block::{self, Block, KIND_OPTIONAL, KIND_ROWS};
use crate::format::header::Header;
use crate::log::open_dir;
use crate::owned::OwnedRows;
use crate::shard::{read_header, read_tables};
use crate::spec::Spec;
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

/// Takes over the open shards of writers that died. A living writer holds a lock on its file and is left alone.
pub fn salvage_dead(writer: &mut Writer) -> Result<Salvage> {
    let mut salvage = Salvage::default();
    let dir = open_dir(writer.root());
    let mut done = Vec::new();
    for name in files::entries(&dir)?.iter().filter(|n| n.ends_with(SMALL)) {
        let path = dir.join(name);
        done.extend(files::lock_abandoned(&path).map(|lock| (path, lock)));
    }
    for name in files::entries(&dir)?.iter().filter(|n| n.ends_with(OPEN)) {
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
        Ok((header, _)) => find_codec(&source, Some(&header), writer.spec()),
        Err(Error::Unsupported { what, .. }) => {
            salvage.lost.push(format!("{name} stays where it is: {what}"));
            return Ok(false);
        }
        Err(_) => find_codec(&source, None, writer.spec()),
    };
    let Some(codec) = codec else {
        salvage.lost.push(format!("{name}: neither copy of its tables is whole"));
        return Ok(true);
    };
    let (k, columns) = (writer.spec().k as usize, writer.spec().columns.clone());
    let mut open: HashMap<String, (OwnedRows, Collected)> = HashMap::new();
    let mut lost = Vec::new();
    let mut failed = None;
    let torn = scan(&source, |block| {
        if block.head.kind >= KIND_OPTIONAL || failed.is_some() {
            return;
        }
        let (key, rows) = (block.head.key, block.head.kind == KIND_ROWS);
        if rows && block.head.first_row == 0 {
            open.insert(key.to_string(), (OwnedRows::new(&codec, k), Collected::default()));
        }
        let first = block.head.first_row as usize;
        let Some((partial, further)) = open.get_mut(key).filter(|p| !rows || p.0.tokens.len() == first) else {
            lost.push(format!("{name}, block {}: the rows of {key:?} before it are lost", block.head.number));
            return;
        };
        let taken = match rows {
            true => partial.push(block, &codec).map(|_| ()),
            false => further.push(&columns, block),
        };
        if let Err(what) = taken {
            lost.push(format!("{name}, block {}: {what}", block.head.number));
            open.remove(key);
            return;
        }
        if !block.head.last {
            return;
        }
        let Some((whole, further)) = open.remove(key) else { return };
        match writer.add_stored(key, &whole.rows(), &further) {
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
        lost.push(match count {
            1 => format!("{name}: the block at byte {first} is not whole"),
            _ => format!("{name}: {count} blocks are not whole, the first at byte {first}"),
        });
    }
    lost.extend(open.keys().map(|key| format!("{name}: sequence {key:?} is not whole")));
    salvage.lost.extend(lost);
    failed.map_or(Ok(true), Err)
}

// the codec of a file whose header or tables may be damaged: any whole copy of the tables will do
fn find_codec(source: &dyn Source, header: Option<&Header>, spec: &Spec) -> Option<Codec> {
    let Some(layout) = spec.layout else { return Some(Codec::for_spec(spec)) };
    let dense = |tables| Codec::Dense(Dense { layout, tables: Arc::new(tables) });
    if let Some(Header { codec: Declared::Dense(params), len, .. }) = header {
        if let Ok(tables) = read_tables(source, *len as u64, params) {
            return Some(dense(tables));
        }
    }
    let len = source.len();
    let mut head = [0u8; 8];
    let mut budget = len.saturating_mul(16);
    for at in (0..len.saturating_sub(8)).step_by(8) {
        source.read_at(at, &mut head).ok()?;
        let claimed = u64::from(u32::from_le_bytes([head[4], head[5], head[6], head[7]]));
        if head[..4] == TABLES_MAGIC && claimed <= len - at && claimed <= (MAX_TABLES as u64).min(budget) {
            budget -= claimed;
            let mut bytes = vec![0u8; claimed as usize];
            source.read_at(at, &mut bytes).ok()?;
            if let Ok(tables) = Tables::decode(&bytes, layout) {
                return Some(dense(tables));
            }
        }
    }
    None
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
