//! Recover: a damaged folder becomes a cache that verifies, with every sequence that is still whole.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};
use crate::files::{self, OPEN};
use crate::format::name::{record_number, shard_file};
use crate::log::{self, log_dir, open_dir, shards_dir, Record};
use crate::salvage::Salvage;
use crate::shard::open_shard;
use crate::spec::Spec;
use crate::writer::Writer;

/// Repairs a cache folder: records that cannot be read are put aside, shards that no record names are taken in, damaged
/// shards give up their whole sequences, and the manifest is written anew. Nothing that verifies is touched.
pub fn recover(root: &Path) -> Result<Salvage> {
    let mut lost = Vec::new();
    let aside = root.join("damaged");
    let spec_text = repair_log(root, &aside, &mut lost)?;
    let mut state = log::State::load(root)?.ok_or_else(|| no_spec(root))?;
    for entry in state.shards.clone() {
        if let Some(why) = shard_damage(root, &entry.name, &state.spec) {
            lost.push(why.clone());
            set_free(root, &entry.name, &aside)?;
            let drop = Record::Drop { name: entry.name, why };
            while !state.append(root, drop.clone())? {
                state.refresh(root)?;
            }
        }
    }
    for name in state.orphans(root)? {
        if let Some(why) = shard_damage(root, &name, &state.spec) {
            lost.push(why);
            set_free(root, &name, &aside)?;
        }
    }
    // the writer takes in whole orphans and salvages everything in open/
    let mut writer = Writer::open(root, &spec_text, true, 64 << 20)?;
    let mut salvage = std::mem::take(&mut writer.salvaged);
    salvage.lost.extend(lost);
    writer.compact()?;
    writer.close()?;
    Ok(salvage)
}

fn no_spec(root: &Path) -> Error {
    let what = "neither the manifest nor log record 0 can be read, so the spec is lost; \
                open a Writer with the original spec on the folder, then recover again";
    Error::Folder { path: root.to_path_buf(), what: what.into() }
}

fn put_aside(path: &Path, aside: &Path) -> Result<()> {
    files::make_dir(aside)?;
    fs::rename(path, aside_name(path, aside)).map_err(Error::io("put aside", path))
}

fn aside_name(path: &Path, aside: &Path) -> PathBuf {
    let name = path.file_name().map_or_else(|| "file".into(), |n| n.to_string_lossy().into_owned());
    aside.join(format!("{name}.{}", files::unique_name("")))
}

// A damaged shard is kept in damaged/ and moves to open/, where it looks like that of a dead writer: should this process
// die now, the next writer salvages it all the same.
fn set_free(root: &Path, name: &str, aside: &Path) -> Result<()> {
    let path = shards_dir(root).join(shard_file(name));
    if fs::symlink_metadata(&path).is_err() {
        return Ok(()); // missing: nothing to salvage
    }
    files::open_regular(&path).map_err(Error::io("open", &path))?;
    files::make_dir(aside)?;
    let kept = aside_name(&path, aside);
    fs::hard_link(&path, &kept)
        .or_else(|_| fs::copy(&path, &kept).map(|_| ()))
        .map_err(Error::io("put aside", &path))?;
    let open = open_dir(root).join(files::unique_name(OPEN));
    fs::rename(&path, &open).map_err(Error::io("move", &path))
}

pub(crate) fn shard_damage(root: &Path, name: &str, spec: &Spec) -> Option<String> {
    let shard = match open_shard(root, name, spec) {
        Ok(shard) => shard,
        Err(e) => return Some(e.brief()),
    };
    let path = shards_dir(root).join(shard_file(name));
    let source = match files::open_regular(&path) {
        Ok(source) => source,
        Err(e) => return Some(format!("{}: {e}", path.display())),
    };
    if let Err(e) = shard.check_tables(&source) {
        return Some(e.brief());
    }
    let mut scratch = Vec::new();
    let mut problems = (0..shard.footer.blocks.len()).filter_map(|n| shard.block(&source, n, &mut scratch).err());
    problems.next().map(|e| e.brief())
}

// a manifest or a record that cannot be read is put aside; what they said comes back from the shards themselves
fn repair_log(root: &Path, aside: &Path, lost: &mut Vec<String>) -> Result<String> {
    if !root.join(log::MANIFEST).exists() && !log_dir(root).exists() {
        let what = "there is no cache here (no manifest.json and no log)";
        return Err(Error::Folder { path: root.to_path_buf(), what: what.into() });
    }
    for dir in [open_dir(root), shards_dir(root), log_dir(root)] {
        files::make_dir(&dir)?;
    }
    let manifest = root.join(log::MANIFEST);
    let mut spec = match log::State::from_manifest(root) {
        Ok(state) => state.map(|s| s.spec.text),
        Err(e @ Error::Unsupported { .. }) => return Err(e),
        Err(e) => {
            lost.push(e.brief());
            put_aside(&manifest, aside)?;
            None
        }
    };
    let numbers: Vec<u64> = files::entries(&log_dir(root))?.iter().filter_map(|f| record_number(f)).collect();
    let mut good = Vec::new();
    let mut whole = true;
    for n in numbers {
        match log::read_record(root, n) {
            Ok(Some(Record::Spec { spec: text })) => spec = spec.or(Some(text)),
            Ok(Some(record)) => good.push(record),
            Ok(None) => {}
            Err(e @ Error::Unsupported { .. }) => return Err(e),
            Err(e) => {
                lost.push(e.brief());
                whole = false;
            }
        }
    }
    let spec = spec.ok_or_else(|| no_spec(root))?;
    let state = if whole { log::State::load(root)? } else { None };
    let gap = state.map_or(Ok(Some(0)), |s| s.gap(root))?;
    if whole && gap.is_none() {
        return Ok(spec);
    }
    // write the readable records again under new, contiguous numbers
    lost.push("the log was written anew".to_string());
    let old = log_dir(root);
    put_aside(&old, aside)?;
    if manifest.exists() {
        put_aside(&manifest, aside)?;
    }
    files::make_dir(&old)?;
    log::create_record(root, 0, &Record::Spec { spec: spec.clone() })?;
    for (n, record) in good.iter().enumerate() {
        log::create_record(root, n as u64 + 1, record)?;
    }
    Ok(spec)
}
