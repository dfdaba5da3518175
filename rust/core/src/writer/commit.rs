//! How a shard becomes part of the cache: sealed, synced, renamed, recorded under the next free number. A full shard does so in a
//! thread of its own, while the rows of the next one are encoded.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;
use std::sync::mpsc::channel;
use std::sync::{Arc, MutexGuard, PoisonError, RwLock};
use std::thread::{Builder, JoinHandle};

use super::open_shard::OpenShard;
use super::{Writer, AGAIN, REOPEN};
use crate::codec::Declared;
use crate::error::{Error, Result};
use crate::files;
use crate::format::footer::SequenceEntry;
use crate::format::name::shard_file;
use crate::log::{shards_dir, Record, ShardEntry, State};
use crate::shard::open_shard;

/// The sequences of committed shards.
#[derive(Default)]
pub(super) struct Committed {
    /// Content hash, and which of the shards holds it.
    sequences: HashMap<String, (u128, usize)>,
    shards: Vec<String>,
}

impl Committed {
    fn insert(&mut self, shard: &str, sequences: &[SequenceEntry]) {
        for s in sequences {
            self.sequences.entry(s.key.clone()).or_insert((s.content_hash, self.shards.len()));
        }
        self.shards.push(shard.to_string());
    }

    /// Content hash of a sequence and the name of its shard.
    pub(super) fn get(&self, key: &str) -> Option<(u128, &str)> {
        self.sequences.get(key).map(|(hash, shard)| (*hash, self.shards[*shard].as_str()))
    }

    pub(super) fn len(&self) -> usize {
        self.sequences.len()
    }
}

/// The log of the cache as far as it was read. Whoever commits holds it; what is committed may be asked for meanwhile.
pub(super) struct Ledger {
    root: PathBuf,
    pub(super) state: State,
    committed: Arc<RwLock<Committed>>,
    /// The shard whose tables learnt from most entries, until they are taken.
    pub(super) best_tables: Option<(String, u64)>,
}

impl Ledger {
    /// Of the shards of a log.
    pub(super) fn new(root: PathBuf, state: State, committed: Arc<RwLock<Committed>>) -> Result<Ledger> {
        let shards = state.shards.clone();
        let mut ledger = Ledger { root, state, committed, best_tables: None };
        for entry in &shards {
            ledger.learn(entry)?;
        }
        Ok(ledger)
    }

    // remembers the keys of a committed shard
    fn learn(&mut self, entry: &ShardEntry) -> Result<()> {
        let shard = open_shard(&self.root, &entry.name, &self.state.spec)?;
        if let Declared::Dense(params) = &shard.header.codec {
            if params.trained > self.best_tables.as_ref().map_or(0, |b| b.1) {
                self.best_tables = Some((entry.name.clone(), params.trained));
            }
        }
        self.insert(&entry.name, &shard.footer.sequences);
        Ok(())
    }

    fn insert(&self, shard: &str, sequences: &[SequenceEntry]) {
        self.committed.write().unwrap_or_else(PoisonError::into_inner).insert(shard, sequences);
    }

    fn refresh(&mut self) -> Result<()> {
        for entry in self.state.refresh(&self.root)? {
            self.learn(&entry)?;
        }
        Ok(())
    }

    // takes in whole shards that a writer renamed into place and died before recording
    pub(super) fn adopt_orphans(&mut self) -> Result<()> {
        for name in self.state.orphans(&self.root)? {
            let Ok(shard) = open_shard(&self.root, &name, &self.state.spec) else { continue };
            if self.check(&shard.footer.sequences, &name).is_err() {
                continue;
            }
            let sequences = shard.footer.sequences.len() as u64;
            let entry = ShardEntry { name, bytes: shard.bytes, sequences, tokens: shard.footer.tokens() };
            while !self.state.append(&self.root, Record::Shard(entry.clone()))? {
                self.refresh()?;
            }
            self.learn(&entry)?;
        }
        Ok(())
    }

    // its name; None when other writers have committed all of it meanwhile
    fn commit(&mut self, sealed: Sealed) -> Result<Option<String>> {
        let Sealed { mut open, name, bytes } = sealed;
        open.sync()?;
        let dir = shards_dir(&self.root);
        let path = dir.join(shard_file(&name));
        let (sequences, tokens) = (open.sequences().len() as u64, open.tokens());
        let record = Record::Shard(ShardEntry { name: name.clone(), bytes, sequences, tokens });
        let mut renamed = false;
        loop {
            self.refresh()?;
            match self.check(open.sequences(), &name) {
                Ok(true) if !renamed => {
                    fs::remove_file(&open.path).map_err(Error::io("remove", &open.path))?;
                    return Ok(None);
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
            if self.state.append(&self.root, record.clone())? {
                break;
            }
        }
        self.insert(&name, open.sequences());
        Ok(Some(name))
    }

    // true when every sequence of a shard is committed already; an error where one is with other content
    fn check(&self, sequences: &[SequenceEntry], name: &str) -> Result<bool> {
        let committed = self.committed.read().unwrap_or_else(PoisonError::into_inner);
        let mut all = true;
        for s in sequences {
            match committed.get(&s.key) {
                None => all = false,
                Some((known, _)) if known == s.content_hash => {}
                Some((_, there)) => {
                    let (here, there) = (format!("shard {name}"), format!("shard {there}"));
                    return Err(Error::Duplicate { key: s.key.clone(), here, there });
                }
            }
        }
        Ok(all)
    }
}

/// A whole shard that is not yet part of the cache.
struct Sealed {
    open: OpenShard,
    name: String,
    bytes: u64,
}

/// A shard on its way, and the content hashes of its sequences.
pub(super) struct Leaving {
    thread: JoinHandle<Result<Option<String>>>,
    pub(super) sequences: HashMap<String, u128>,
}

impl Leaving {
    pub(super) fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }
}

impl Writer {
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Commits everything added so far as one shard; its name, or None when there was nothing new.
    pub fn commit(&mut self) -> Result<Option<String>> {
        self.ready()?; // a forked process has no thread to wait for
        self.settle()?;
        let Some(sealed) = self.seal()? else { return Ok(None) };
        let done = self.ledger().commit(sealed);
        self.stop_by(done)
    }

    // the same while further rows are added; what fails is told then
    pub(super) fn commit_aside(&mut self) -> Result<()> {
        self.settle()?;
        // the thread is made first: where there is none, the shard is still open
        let ledger = Arc::clone(&self.ledger);
        let (send, receive) = channel::<Sealed>();
        let work = move || match receive.recv() {
            Ok(sealed) => ledger.lock().unwrap_or_else(PoisonError::into_inner).commit(sealed),
            Err(_) => Ok(None),
        };
        let Ok(thread) = Builder::new().name("potstill-commit".into()).spawn(work) else {
            return self.commit().map(|_| ());
        };
        if let Some(sealed) = self.seal()? {
            let sequences = sealed.open.sequences().iter().map(|s| (s.key.clone(), s.content_hash)).collect();
            let _ = send.send(sealed); // a thread that is gone is told when it is waited for
            self.leaving = Some(Leaving { thread, sequences });
        }
        Ok(())
    }

    // waits for the shard on its way
    pub(super) fn settle(&mut self) -> Result<()> {
        let Some(leaving) = self.leaving.take() else { return Ok(()) };
        let died = |_| Err(Error::Stopped("the thread that commits died".into()));
        let done = leaving.thread.join().unwrap_or_else(died);
        self.stop_by(done).map(|_| ())
    }

    fn seal(&mut self) -> Result<Option<Sealed>> {
        if self.wants_training(0) {
            self.retrain()?;
        }
        let Some(mut open) = self.open.take() else { return Ok(None) };
        match open.seal() {
            Ok((name, bytes)) => {
                self.learning = Vec::new();
                Ok(Some(Sealed { open, name, bytes }))
            }
            Err(e) => {
                self.open = Some(open); // whole sequences are still there: a later commit may succeed
                Err(e.advise(AGAIN))
            }
        }
    }

    fn stop_by<T>(&mut self, done: Result<T>) -> Result<T> {
        done.map_err(|e| {
            let e = e.advise(REOPEN);
            self.stopped = Some(e.to_string());
            e
        })
    }
}
