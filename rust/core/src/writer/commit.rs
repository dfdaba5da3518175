//! How a shard becomes part of the cache: sealed, synced, renamed, recorded under the next free number.

use std::fs;

use super::open_shard::OpenShard;
use super::{Known, Writer, AGAIN, REOPEN};
use crate::codec::Declared;
use crate::error::{Error, Result};
use crate::files;
use crate::format::footer::SequenceEntry;
use crate::format::name::shard_file;
use crate::log::{shards_dir, Record, ShardEntry};
use crate::shard::open_shard;

impl Writer {
    // remembers the keys of a committed shard
    pub(super) fn learn(&mut self, entry: &ShardEntry) -> Result<()> {
        let shard = open_shard(&self.root, &entry.name, &self.state.spec)?;
        let number = self.names.len();
        if let Declared::Dense(params) = &shard.header.codec {
            if params.trained > self.best_tables.as_ref().map_or(0, |b| b.1) {
                self.best_tables = Some((entry.name.clone(), params.trained));
            }
        }
        for s in shard.footer.sequences {
            self.committed.entry(s.key).or_insert(Known { shard: number, content_hash: s.content_hash });
        }
        self.names.push(entry.name.clone());
        Ok(())
    }

    // takes in whole shards that a writer renamed into place and died before recording
    pub(super) fn adopt_orphans(&mut self) -> Result<()> {
        for name in self.state.orphans(&self.root)? {
            let Ok(shard) = open_shard(&self.root, &name, &self.state.spec) else { continue };
            let conflict =
                |s: &SequenceEntry| self.committed.get(&s.key).is_some_and(|k| k.content_hash != s.content_hash);
            if shard.footer.sequences.iter().any(conflict) {
                continue;
            }
            let sequences = shard.footer.sequences.len() as u64;
            let entry = ShardEntry { name, bytes: shard.bytes, sequences, tokens: shard.footer.tokens() };
            while !self.state.append(&self.root, Record::Shard(entry.clone()))? {
                for news in self.state.refresh(&self.root)? {
                    self.learn(&news)?;
                }
            }
            self.learn(&entry)?;
        }
        Ok(())
    }

    /// Commits everything added so far as one shard; its name, or None when there was nothing new.
    pub fn commit(&mut self) -> Result<Option<String>> {
        self.ready()?;
        if self.wants_training(0) {
            self.retrain()?;
        }
        let Some(mut open) = self.open.take() else { return Ok(None) };
        let (name, bytes) = match open.seal() {
            Ok(sealed) => sealed,
            Err(e) => {
                self.open = Some(open); // whole sequences are still there: a later commit may succeed
                return Err(e.advise(AGAIN));
            }
        };
        self.learning = Vec::new();
        let done = open.sync().and_then(|()| self.publish(&open, &name, bytes));
        match done {
            Ok(published) => Ok(published.then_some(name)),
            Err(e) => {
                let e = e.advise(REOPEN);
                self.stopped = Some(e.to_string());
                Err(e)
            }
        }
    }

    fn publish(&mut self, open: &OpenShard, name: &str, bytes: u64) -> Result<bool> {
        let dir = shards_dir(&self.root);
        let path = dir.join(shard_file(name));
        let mut renamed = false;
        loop {
            let news = self.state.refresh(&self.root)?;
            for entry in &news {
                self.learn(entry)?;
            }
            match self.check_pending(open, name) {
                Ok(false) if !renamed => {}
                Ok(true) if !renamed => {
                    fs::remove_file(&open.path).map_err(Error::io("remove", &open.path))?;
                    return Ok(false);
                }
                Ok(_) => {}
                Err(e) => {
                    if renamed {
                        let _ = fs::rename(&path, &open.path);
                    }
                    return Err(e);
                }
            }
            if !renamed {
                fs::rename(&open.path, &path).map_err(Error::io("rename a shard to", &path))?;
                files::sync_dir(&dir).map_err(Error::io("sync", &dir))?;
                renamed = true;
            }
            let entry = ShardEntry {
                name: name.to_string(),
                bytes,
                sequences: open.sequences().len() as u64,
                tokens: open.tokens(),
            };
            if self.state.append(&self.root, Record::Shard(entry))? {
                break;
            }
        }
        let number = self.names.len();
        for s in open.sequences() {
            self.committed.entry(s.key.clone()).or_insert(Known { shard: number, content_hash: s.content_hash });
        }
        self.names.push(name.to_string());
        Ok(true)
    }

    // true when other writers have committed every pending sequence meanwhile
    fn check_pending(&self, open: &OpenShard, name: &str) -> Result<bool> {
        let mut all = true;
        for s in open.sequences() {
            match self.committed.get(&s.key) {
                None => all = false,
                Some(known) if known.content_hash == s.content_hash => {}
                Some(known) => {
                    let (here, there) = (format!("shard {name}"), format!("shard {}", self.names[known.shard]));
                    return Err(Error::Duplicate { key: s.key.clone(), here, there });
                }
            }
        }
        Ok(all)
    }
}
