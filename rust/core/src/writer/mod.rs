//! The writer: checks rows, fills an open shard, commits it. Many writers may share one folder.

mod commit;
pub mod open_shard;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use self::open_shard::{encode, OpenShard};
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::files;
use crate::format::check_key;
use crate::log::{create_record, log_dir, open_dir, shards_dir, Record, State};

use crate::rows::{Checker, Rows, STORED_MASS, TOLERANCE};
use crate::salvage::{self, Salvage};
use crate::spec::Spec;

struct Known {
    shard: usize,
    content_hash: u128,
}

pub struct Writer {
    root: PathBuf,
    state: State,
    codec: Codec,
    shard_bytes: u64,
    checker: Checker,
    counts: Vec<u16>,
    committed: HashMap<String, Known>,
    /// Names of committed shards, for messages.
    names: Vec<String>,
    open: Option<OpenShard>,
    stopped: Option<String>,
    process: u32,
    /// What this writer took over from writers that died.
    pub salvaged: Salvage,
}

impl Writer {
    /// Opens a cache for writing, or makes one. With `resume` an existing cache of an equal spec is continued and
    /// the whole sequences of dead writers are taken over; without it an existing cache is refused.
    pub fn open(root: &Path, spec_text: &str, resume: bool, shard_bytes: u64) -> Result<Writer> {
        let spec = Spec::from_caller(spec_text).map_err(Error::Refused)?;
        fs::create_dir_all(root).map_err(Error::io("create the folder", root))?;
        let state = Self::load_or_create(root, &spec, resume)?;
        for dir in [open_dir(root), shards_dir(root), log_dir(root)] {
            files::make_dir(&dir)?;
        }
        let mut writer = Writer {
            root: root.to_path_buf(),
            codec: Codec::for_spec(&state.spec),
            checker: Checker::new(spec.vocab_size, spec.k, 1.0 + TOLERANCE),
            state,
            shard_bytes,
            counts: Vec::new(),
            committed: HashMap::new(),
            names: Vec::new(),
            open: None,
            stopped: None,
            process: std::process::id(),
            salvaged: Salvage::default(),
        };
        for entry in writer.state.shards.clone() {
            writer.learn(&entry)?;
        }
        writer.adopt_orphans()?;
        writer.salvaged = salvage::salvage_dead(&mut writer)?;
        Ok(writer)
    }

    fn load_or_create(root: &Path, spec: &Spec, resume: bool) -> Result<State> {
        if State::load(root)?.is_none() {
            let strangers: Vec<String> = files::list(root)?;
            if let Some(name) = strangers.iter().find(|n| !["open", "shards", "log"].contains(&n.as_str())) {
                let what = format!("the folder is not a cache and holds {name:?}; give an empty or a new folder");
                return Err(Error::Folder { path: root.to_path_buf(), what });
            }
            for dir in [open_dir(root), shards_dir(root), log_dir(root)] {
                files::make_dir(&dir)?;
            }
            files::sync_dir(root).map_err(Error::io("sync", root))?;
            if create_record(root, 0, &Record::Spec { spec: spec.text.clone() })? {
                return State::load(root)?.ok_or_else(|| Error::Stopped("the first record vanished".into()));
            }
        } else if !resume {
            let what = "the folder holds a cache already; give resume=True to continue it, or another folder";
            return Err(Error::Folder { path: root.to_path_buf(), what: what.into() });
        }
        let state =
            State::load(root)?.ok_or_else(|| Error::Stopped("the cache vanished while it was opened".into()))?;
        if let Some((field, have, given)) = state.spec.difference(spec) {
            return Err(Error::SpecMismatch { path: root.to_path_buf(), field, have, given });
        }
        if let Some(number) = state.gap(root)? {
            let what = format!("log record {number} is missing; run `potstill recover` on the folder");
            return Err(Error::Folder { path: root.to_path_buf(), what });
        }
        Ok(state)
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn spec(&self) -> &Spec {
        &self.state.spec
    }

    pub(crate) fn state(&mut self) -> &mut State {
        &mut self.state
    }

    pub fn contains(&self, key: &str) -> bool {
        self.committed.contains_key(key) || self.open.as_ref().is_some_and(|o| o.get(key).is_some())
    }

    /// Committed sequences.
    pub fn committed(&self) -> usize {
        self.committed.len()
    }

    /// Sequences and bytes that the next commit will hold.
    pub fn pending(&self) -> (usize, u64) {
        self.open.as_ref().map_or((0, 0), |o| (o.sequences().len(), o.bytes()))
    }

    fn ready(&self) -> Result<()> {
        if let Some(why) = &self.stopped {
            return Err(Error::Stopped(why.clone()));
        }
        if self.process != std::process::id() {
            let what = format!("it was opened in process {}, open one in this process", self.process);
            return Err(Error::Stopped(what));
        }
        Ok(())
    }

    /// Adds a sequence; false when the cache holds it already with equal content.
    pub fn add(&mut self, key: &str, rows: &Rows<'_>) -> Result<bool> {
        self.ready()?;
        check_key(key.as_bytes()).map_err(Error::Refused)?;
        let mut counts = std::mem::take(&mut self.counts);
        let checked = self.checker.check(key, rows, &mut counts);
        let added = checked.and_then(|()| self.add_checked(key, rows, &counts));
        self.counts = counts;
        added
    }

    /// Adds rows that a cache held before: the codec's rounding may have lifted their mass.
    pub(crate) fn add_stored(&mut self, key: &str, rows: &Rows<'_>) -> Result<bool> {
        let strict = std::mem::replace(
            &mut self.checker,
            Checker::new(self.state.spec.vocab_size, self.state.spec.k, STORED_MASS),
        );
        let added = self.add(key, rows);
        self.checker = strict;
        added
    }

    fn add_checked(&mut self, key: &str, rows: &Rows<'_>, counts: &[u16]) -> Result<bool> {
        let first_block = self.open.as_ref().map_or(0, OpenShard::next_block);
        let encoded = encode(key, rows, counts, &self.codec, self.state.spec.k, first_block);
        let duplicate = |there: String| Error::Duplicate { key: key.to_string(), here: "the open shard".into(), there };
        if let Some(known) = self.committed.get(key) {
            if known.content_hash == encoded.entry.content_hash {
                return Ok(false);
            }
            return Err(duplicate(format!("shard {}", self.names[known.shard])));
        }
        if let Some(pending) = self.open.as_ref().and_then(|o| o.get(key)) {
            if pending.content_hash == encoded.entry.content_hash {
                return Ok(false);
            }
            return Err(duplicate("the open shard (not yet committed)".into()));
        }
        let open = match &mut self.open {
            Some(open) => open,
            None => self.open.insert(OpenShard::create(&open_dir(&self.root), &self.state.spec, &self.codec)?),
        };
        open.append(encoded)?;
        if open.bytes() >= self.shard_bytes {
            self.commit()?;
        }
        Ok(true)
    }

    /// Commits and writes the manifest. The writer takes nothing after this.
    pub fn close(&mut self) -> Result<()> {
        if self.stopped.as_deref() == Some(CLOSED) {
            return Ok(());
        }
        self.commit()?;
        if self.state.compacted != self.state.next {
            self.state.compact(&self.root)?;
        }
        self.stopped = Some(CLOSED.to_string());
        Ok(())
    }
}

const CLOSED: &str = "it was closed; open another with resume=True";

impl Drop for Writer {
    fn drop(&mut self) {
        // an open shard with sequences stays for the next writer to salvage; an empty one is worth nothing
        if let Some(open) = self.open.take().filter(|_| self.process == std::process::id()) {
            if open.sequences().is_empty() {
                let _ = fs::remove_file(&open.path);
            }
        }
    }
}
