//! Merge: the shards of several caches of one spec in a new folder, byte for byte.

use std::collections::HashMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::error::{Error, Result};
use crate::files::{self, Source, OPEN};
use crate::format::name::shard_file;
use crate::log::{create_record, log_dir, open_dir, shards_dir, Record, ShardEntry, State};
use crate::reader::Reader;
use crate::recover::shard_damage;
use crate::shard::Shard;

const PIECE: usize = 1 << 20;

/// What the new cache holds; `repeated` sequences stood in several sources with equal content.
#[derive(Debug, Default, Serialize)]
pub struct Merged {
    pub shards: u64,
    pub sequences: u64,
    pub tokens: u64,
    pub repeated: u64,
}

/// Writes a new cache at `root`, an empty or a new folder. Refuses sources of different specs, keys with different content,
/// and damage; the folder is then left without a first record and is no cache.
pub fn merge(sources: &[PathBuf], root: &Path) -> Result<Merged> {
    let readers = sources.iter().map(|path| Reader::open(path)).collect::<Result<Vec<_>>>()?;
    let Some(first) = readers.first() else { return Err(Error::Refused("no cache to merge is given".into())) };
    let mut merged = Merged::default();
    let mut seen: HashMap<&str, (u128, &Path)> = HashMap::new();
    for reader in &readers {
        check_spec(first, reader)?;
        for sequence in 0..reader.len() {
            let (key, hash) = (reader.key(sequence), reader.content_hash(sequence));
            match seen.get(key) {
                None => {
                    seen.insert(key, (hash, reader.root()));
                    merged.sequences += 1;
                    merged.tokens += reader.tokens_of(sequence) as u64;
                }
                Some((known, _)) if *known == hash => merged.repeated += 1,
                Some((_, there)) => {
                    let (here, there) = (reader.root().display().to_string(), there.display().to_string());
                    return Err(Error::Duplicate { key: key.to_string(), here, there });
                }
            }
        }
    }
    fs::create_dir_all(root).map_err(Error::io("create the folder", root))?;
    for dir in [open_dir(root), shards_dir(root), log_dir(root)] {
        files::make_dir(&dir)?;
    }
    let mut entries: Vec<ShardEntry> = Vec::new();
    for (reader, source) in readers.iter().zip(sources) {
        for shard in &reader.shards {
            if entries.iter().all(|e| e.name != shard.name) {
                copy_shard(source, root, shard, reader)?;
                entries.push(entry_of(shard));
            }
        }
    }
    files::sync_dir(&shards_dir(root)).map_err(Error::io("sync", &shards_dir(root)))?;
    create_record(root, 0, &Record::Spec { spec: first.spec().text.clone() })?;
    let mut state = State::load(root)?.ok_or_else(|| Error::Stopped("the first record vanished".into()))?;
    for entry in entries {
        merged.shards += 1;
        if !state.append(root, Record::Shard(entry))? {
            return Err(Error::Stopped(format!("another process writes into {}", root.display())));
        }
    }
    state.compact(root)?;
    Ok(merged)
}

fn entry_of(shard: &Shard) -> ShardEntry {
    ShardEntry {
        name: shard.name.clone(),
        bytes: shard.bytes,
        sequences: shard.footer.sequences.len() as u64,
        tokens: shard.footer.tokens(),
    }
}

// the text itself is bound to every shard, so it must be equal to the letter
fn check_spec(first: &Reader, other: &Reader) -> Result<()> {
    if let Some((field, have, given)) = first.spec().difference(other.spec()) {
        return Err(Error::SpecMismatch { path: first.root().to_path_buf(), field, have, given });
    }
    if first.spec().text != other.spec().text {
        let (a, b) = (first.root().display(), other.root().display());
        return Err(Error::Refused(format!("the specs of {a} and {b} are equal but written differently")));
    }
    Ok(())
}

fn copy_shard(from: &Path, root: &Path, shard: &Shard, reader: &Reader) -> Result<()> {
    let path = shards_dir(from).join(shard_file(&shard.name));
    let source = files::open_regular(&path).map_err(Error::io("open", &path))?;
    let (temporary, mut file) =
        files::create_locked(&open_dir(root), OPEN).map_err(Error::io("create a file in", root))?;
    let mut piece = vec![0u8; PIECE];
    let mut at = 0;
    while at < source.len() {
        let n = (source.len() - at).min(PIECE as u64) as usize;
        source.read_at(at, &mut piece[..n]).map_err(Error::io("read", &path))?;
        file.write_all(&piece[..n]).map_err(Error::io("write", &temporary))?;
        at += n as u64;
    }
    file.sync_all().map_err(Error::io("sync", &temporary))?;
    let target = shards_dir(root).join(shard_file(&shard.name));
    fs::rename(&temporary, &target).map_err(Error::io("rename a shard to", &target))?;
    match shard_damage(root, &shard.name, reader.spec()) {
        None => Ok(()),
        Some(why) => Err(Error::Folder { path: from.to_path_buf(), what: why }),
    }
}
