//! The writer: checks rows, fills an open shard, commits it. Many writers may share one folder.

mod ahead;
mod commit;
pub mod open_shard;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};

use self::commit::{Committed, Leaving, Ledger};
use self::open_shard::{encode_dense, encode_plain, OpenShard};
use crate::codec::dense::{train, Coded, Dense, TRAINED};
use crate::codec::Codec;
use crate::columns::{Collected, Values};
use crate::error::{Error, Result};
use crate::files;
use crate::format::check_key;
use crate::format::name::shard_file;
use crate::log::{create_record, log_dir, open_dir, shards_dir, Record, State};

use crate::rows::{Checker, Rows};
use crate::salvage::{self, Salvage};
use crate::shard::open_shard as open_shard_of;
use crate::spec::Spec;

pub struct Writer {
    root: PathBuf,
    spec: Spec,
    codec: Codec,
    shard_bytes: u64,
    checker: Checker,
    counts: Vec<u16>,
    ledger: Arc<Mutex<Ledger>>,
    committed: Arc<RwLock<Committed>>,
    leaving: Option<Leaving>,
    open: Option<OpenShard>,
    /// The rows of the open shard, as long as tables may be learnt from them.
    learning: Vec<Coded>,
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
        let (spec, committed) = (state.spec.clone(), Arc::new(RwLock::new(Committed::default())));
        let mut ledger = Ledger::new(root.to_path_buf(), state, Arc::clone(&committed))?;
        ledger.adopt_orphans()?;
        let mut writer = Writer {
            root: root.to_path_buf(),
            codec: Codec::for_spec(&spec),
            checker: Checker::new(&spec),
            spec,
            shard_bytes,
            counts: Vec::new(),
            ledger: Arc::new(Mutex::new(ledger)),
            committed,
            leaving: None,
            open: None,
            learning: Vec::new(),
            stopped: None,
            process: std::process::id(),
            salvaged: Salvage::default(),
        };
        writer.take_tables()?;
        writer.salvaged = salvage::salvage_dead(&mut writer)?;
        Ok(writer)
    }

    fn load_or_create(root: &Path, spec: &Spec, resume: bool) -> Result<State> {
        if State::load(root)?.is_none() {
            let strangers: Vec<String> = files::list(root)?;
            let stranger = strangers.iter().find(|n| !["open", "shards", "log"].contains(&n.as_str()));
            // another process may have made the cache meanwhile
            if let (Some(name), None) = (stranger, State::load(root)?) {
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
        &self.spec
    }

    /// Writes the manifest.
    pub(crate) fn compact(&self) -> Result<()> {
        self.ledger().state.compact(&self.root)
    }

    pub fn contains(&self, key: &str) -> bool {
        self.find(key).is_some()
    }

    /// Committed sequences.
    pub fn committed(&self) -> usize {
        self.shared().len()
    }

    fn shared(&self) -> RwLockReadGuard<'_, Committed> {
        self.committed.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sequences and bytes that the next commit will hold.
    pub fn pending(&self) -> (usize, u64) {
        self.open.as_ref().map_or((0, 0), |o| (o.sequences().len(), o.bytes()))
    }

    fn ready(&mut self) -> Result<()> {
        if let Some(why) = &self.stopped {
            return Err(Error::Stopped(why.clone()));
        }
        if self.process != std::process::id() {
            let what = format!("it was opened in process {}, open one in this process", self.process);
            return Err(Error::Stopped(what));
        }
        match self.leaving.as_ref().is_some_and(Leaving::is_finished) {
            true => self.settle(),
            false => Ok(()),
        }
    }

    /// Adds a sequence; false when the cache holds it already with equal content.
    pub fn add(&mut self, key: &str, rows: &Rows<'_>) -> Result<bool> {
        self.add_with(key, rows, &[])
    }

    /// Adds a sequence with the spec's further columns, each as little-endian bytes, row after row.
    pub fn add_with(&mut self, key: &str, rows: &Rows<'_>, columns: &[&[u8]]) -> Result<bool> {
        self.ready()?;
        check_key(key.as_bytes()).map_err(Error::Refused)?;
        Values { columns: &self.spec.columns, bytes: columns }.check(key, rows.len())?;
        let mut counts = std::mem::take(&mut self.counts);
        let checked = self.checker.check(key, rows, &mut counts);
        let added = checked.and_then(|()| self.add_checked(key, rows, &counts, columns));
        self.counts = counts;
        added.map_err(|e| e.advise(AGAIN))
    }

    /// From here on rows may be such as a cache holds: the codec's rounding may have lifted their mass.
    pub fn accept_rounded(&mut self) {
        self.checker = Checker::stored(&self.spec);
    }

    /// Adds rows that a cache held before: the codec's rounding may have lifted their mass.
    pub(crate) fn add_stored(&mut self, key: &str, rows: &Rows<'_>, columns: &Collected) -> Result<bool> {
        let strict = std::mem::replace(&mut self.checker, Checker::stored(&self.spec));
        let added = self.add_with(key, rows, &columns.slices());
        self.checker = strict;
        added
    }

    fn add_checked(&mut self, key: &str, rows: &Rows<'_>, counts: &[u16], columns: &[&[u8]]) -> Result<bool> {
        let first_block = self.open.as_ref().map_or(0, OpenShard::next_block);
        let columns = Values { columns: &self.spec.columns, bytes: columns };
        let k = self.spec.k;
        let mut learnable = None;
        let encoded = match &self.codec {
            Codec::Plain(codec) => {
                let encoded = encode_plain(key, rows, counts, codec, k, columns, first_block);
                if self.is_known(key, encoded.entry.content_hash)? {
                    return Ok(false);
                }
                encoded
            }
            Codec::Dense(dense) => {
                let bad = |(row, what)| Error::BadRow { key: key.to_string(), row, what };
                let coded = Coded::new(&dense.layout, rows, counts).map_err(bad)?;
                let hash = columns.hash(coded.hash());
                if self.is_known(key, hash)? {
                    return Ok(false);
                }
                let encoded = encode_dense(key, &coded, hash, dense, columns, first_block);
                learnable = (dense.tables.trained < TRAINED).then_some(coded);
                encoded
            }
        };
        let open = match &mut self.open {
            Some(open) => open,
            None => self.open.insert(OpenShard::create(&open_dir(&self.root), &self.spec, &self.codec)?),
        };
        open.append(encoded)?;
        self.learning.extend(learnable);
        if self.wants_training(TRAINED) {
            self.retrain()?;
        }
        if self.pending().1 >= self.shard_bytes {
            self.commit_aside()?;
        }
        Ok(true)
    }

    // content hash of a sequence, and where it is
    fn find(&self, key: &str) -> Option<(u128, String)> {
        let leaving = || self.leaving.as_ref().and_then(|l| l.sequences.get(key));
        let open = || self.open.as_ref().and_then(|o| o.get(key));
        // what leaves is committed before it is forgotten
        let leaving = leaving().map(|hash| (*hash, "the shard that is being committed".to_string()));
        leaving
            .or_else(|| self.shared().get(key).map(|(hash, shard)| (hash, format!("shard {shard}"))))
            .or_else(|| open().map(|s| (s.content_hash, "the open shard (not yet committed)".to_string())))
    }

    // true when the key is there with equal content; other content is an error
    fn is_known(&self, key: &str, hash: u128) -> Result<bool> {
        match self.find(key) {
            None => Ok(false),
            Some((known, _)) if known == hash => Ok(true),
            Some((_, there)) => Err(Error::Duplicate { key: key.to_string(), here: "the open shard".into(), there }),
        }
    }

    // the tables of the shard that learnt from most rows
    fn take_tables(&mut self) -> Result<()> {
        let Codec::Dense(dense) = &self.codec else { return Ok(()) };
        let Some((name, trained)) = self.ledger().best_tables.take() else { return Ok(()) };
        if trained > dense.tables.trained {
            let path = shards_dir(&self.root).join(shard_file(&name));
            let source = files::open_regular(&path).map_err(Error::io("open", &path))?;
            self.codec = open_shard_of(&self.root, &name, &self.spec)?.codec(&source)?;
        }
        Ok(())
    }

    // the open shard holds `least` entries (rows, where they have none) or more, and twice as many as its tables learnt from
    fn wants_training(&self, least: u64) -> bool {
        match (&self.codec, &self.open) {
            (Codec::Dense(dense), Some(open)) => {
                let seen = if dense.layout.k > 0 { open.entries() } else { open.tokens() };
                let kept = self.learning.len() == open.sequences().len();
                kept && dense.tables.trained < TRAINED && seen >= least.max(2 * dense.tables.trained).max(1)
            }
            _ => false,
        }
    }

    // learns tables from the open shard and writes it again with them, if that makes it smaller
    fn retrain(&mut self) -> Result<()> {
        let (Codec::Dense(dense), Some(open)) = (&self.codec, &self.open) else { return Ok(()) };
        let Some(tables) = train(dense.layout, &self.learning) else { return Ok(()) };
        let columns = &self.spec.columns;
        let further = open.further(columns)?;
        let trained = Dense { layout: dense.layout, tables: Arc::new(tables) };
        let codec = Codec::Dense(trained.clone());
        let mut smaller = OpenShard::create(&open_dir(&self.root), &self.spec, &codec)?;
        for ((coded, further), old) in self.learning.iter().zip(&further).zip(open.sequences()) {
            let bytes = further.slices();
            let values = Values { columns, bytes: &bytes };
            let encoded = encode_dense(&old.key, coded, old.content_hash, &trained, values, smaller.next_block());
            if let Err(e) = smaller.append(encoded) {
                let _ = fs::remove_file(&smaller.path);
                return Err(e);
            }
        }
        if smaller.whole_bytes() < open.whole_bytes() {
            let old = self.open.replace(smaller);
            self.codec = codec;
            if trained.tables.trained >= TRAINED {
                self.learning = Vec::new();
            }
            old.map_or(Ok(()), |old| fs::remove_file(&old.path).map_err(Error::io("remove", &old.path)))
        } else {
            self.learning = Vec::new(); // nothing is learnt from this shard again
            fs::remove_file(&smaller.path).map_err(Error::io("remove", &smaller.path))
        }
    }

    /// Commits and writes the manifest. The writer takes nothing after this.
    pub fn close(&mut self) -> Result<()> {
        if self.stopped.as_deref() == Some(CLOSED) {
            return Ok(());
        }
        self.commit()?;
        let mut ledger = self.ledger();
        if ledger.state.compacted != ledger.state.next {
            ledger.state.compact(&self.root).map_err(|e| e.advise(AGAIN))?;
        }
        drop(ledger);
        self.stopped = Some(CLOSED.to_string());
        Ok(())
    }
}

const AGAIN: &str =
    "; what was committed is safe and what was added waits: make room or mend the disk, then add or flush again";
const REOPEN: &str =
    "; what was committed is safe: make room or mend the disk and open another writer, which takes over what waits";
const CLOSED: &str = "it was closed; open another with resume=True";

impl Drop for Writer {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            return;
        }
        let _ = self.settle();
        // an open shard with sequences stays for the next writer to salvage; an empty one is worth nothing
        if let Some(open) = self.open.take() {
            if open.sequences().is_empty() {
                let _ = fs::remove_file(&open.path);
            }
        }
    }
}
