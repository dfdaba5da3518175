//! The log of a cache (numbered, create-exclusive records) and the manifest that compacts it.
//!
//! Every JSON file is `{"potstill":KIND,"version":[1,0],"required":[],"body":{...},"xxh3":"<16 hex>"}` and a newline; the
//! checksum covers every byte before `,"xxh3"`.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::value::RawValue;

use crate::bytes::checksum;
use crate::error::{Error, Part, Result};
use crate::files;
use crate::format::name::{check_shard_name, record_file, record_number};
use crate::format::MAJOR;
use crate::spec::Spec;

const MAX_RECORD: u64 = 2 << 20;
const MAX_MANIFEST: u64 = 256 << 20;
/// A record's number has 10 decimal digits.
const MAX_RECORDS: u64 = 10_000_000_000;
pub const MANIFEST: &str = "manifest.json";

#[derive(Deserialize)]
struct Envelope<'a> {
    potstill: String,
    version: (u16, u16),
    #[serde(deserialize_with = "few_names")]
    required: Vec<String>,
    #[serde(borrow)]
    body: &'a RawValue,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardEntry {
    #[serde(deserialize_with = "shard_name")]
    pub name: String,
    pub bytes: u64,
    pub sequences: u64,
    pub tokens: u64,
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum Record {
    /// Record 0: the spec, as text so that its hash stays the same.
    Spec { spec: String },
    /// A shard was committed.
    Shard(ShardEntry),
    /// A shard is no longer part of the cache (its whole sequences were salvaged).
    Drop { name: String, why: String },
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    /// Records 0..log are compacted here.
    log: u64,
    spec: String,
    shards: Vec<ShardEntry>,
    #[serde(deserialize_with = "shard_names")]
    dropped: Vec<String>,
}

fn shard_name<'de, D: Deserializer<'de>>(file: D) -> std::result::Result<String, D::Error> {
    let name = String::deserialize(file)?;
    check_shard_name(&name).map_err(D::Error::custom)?;
    Ok(name)
}

/// Names of features; a file that lists more than anyone will ever define is refused before it fills memory.
fn few_names<'de, D: Deserializer<'de>>(file: D) -> std::result::Result<Vec<String>, D::Error> {
    file.deserialize_seq(Names { most: 256, check: |_| Ok(()) })
}

/// Names of shards, each judged as it is read: a list of short strings would take many times its bytes in memory.
fn shard_names<'de, D: Deserializer<'de>>(file: D) -> std::result::Result<Vec<String>, D::Error> {
    file.deserialize_seq(Names { most: usize::MAX, check: check_shard_name })
}

struct Names {
    most: usize,
    check: fn(&str) -> std::result::Result<(), String>,
}

impl<'de> Visitor<'de> for Names {
    type Value = Vec<String>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a list of names")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> std::result::Result<Vec<String>, A::Error> {
        let mut names = Vec::new();
        while let Some(name) = list.next_element::<String>()? {
            (self.check)(&name).map_err(A::Error::custom)?;
            if names.len() == self.most {
                return Err(A::Error::custom(format!("more than {} names", self.most)));
            }
            names.push(name);
        }
        Ok(names)
    }
}

/// What log and manifest together say.
pub struct State {
    pub spec: Spec,
    pub shards: Vec<ShardEntry>,
    pub dropped: HashSet<String>,
    names: HashSet<String>,
    /// The number of the next record.
    pub next: u64,
    /// Records that the manifest on disk covers.
    pub compacted: u64,
}

pub fn log_dir(root: &Path) -> PathBuf {
    root.join("log")
}

pub fn open_dir(root: &Path) -> PathBuf {
    root.join("open")
}

pub fn shards_dir(root: &Path) -> PathBuf {
    root.join("shards")
}

/// A name in `required` where the spec has further columns: an older version would leave them out.
const COLUMNS: &str = "columns";

fn seal(kind: &str, columns: bool, body: &impl Serialize) -> Result<Vec<u8>> {
    let body = serde_json::to_string(body).map_err(|e| Error::Refused(format!("cannot write JSON: {e}")))?;
    let required = if columns { format!("{COLUMNS:?}") } else { String::new() };
    let mut text = format!(r#"{{"potstill":"{kind}","version":[{MAJOR},0],"required":[{required}],"body":{body}"#);
    let sum = checksum(text.as_bytes());
    text.push_str(&format!(",\"xxh3\":\"{sum:016x}\"}}\n"));
    Ok(text.into_bytes())
}

fn unseal<'a>(kind: &str, bytes: &'a [u8], file: &str) -> Result<&'a RawValue> {
    const TAIL: usize = r#","xxh3":"0123456789abcdef"}"#.len() + 1;
    let damaged = |what: String| Error::damaged(file, Part::File, what);
    let text = std::str::from_utf8(bytes).map_err(|e| damaged(e.to_string()))?;
    let loose: std::result::Result<Envelope<'a>, _> = serde_json::from_str(text);
    if let Ok(envelope) = &loose {
        if envelope.version.0 > MAJOR {
            let what = format!("format major version {}", envelope.version.0);
            return Err(Error::Unsupported { file: file.to_string(), what });
        }
    }
    let head = text.len().checked_sub(TAIL).and_then(|at| text.get(..at));
    let head = head.ok_or_else(|| damaged(format!("{} bytes are too few", text.len())))?;
    if text[head.len()..] != format!(",\"xxh3\":\"{:016x}\"}}\n", checksum(head.as_bytes())) {
        return Err(damaged("the checksum differs".to_string()));
    }
    let envelope = loose.map_err(|e| damaged(e.to_string()))?;
    if envelope.potstill != kind {
        return Err(damaged(format!("a {:?} file where a {kind:?} belongs", envelope.potstill)));
    }
    match envelope.required.iter().find(|name| *name != COLUMNS) {
        Some(name) => Err(Error::Unsupported { file: file.to_string(), what: format!("required feature {name:?}") }),
        None => Ok(envelope.body),
    }
}

impl State {
    /// Reads manifest and log; None where there is no cache.
    pub fn load(root: &Path) -> Result<Option<State>> {
        let mut state = match Self::from_manifest(root)? {
            Some(state) => {
                files::check_dir(&log_dir(root))?;
                state
            }
            None => match Self::from_first_record(root)? {
                Some(state) => state,
                None => return Ok(None),
            },
        };
        state.refresh(root)?;
        Ok(Some(state))
    }

    fn new(spec: &str, file: &str) -> Result<State> {
        let spec = Spec::from_stored(spec).map_err(|e| Error::damaged(file, Part::File, e))?;
        Ok(State { spec, shards: Vec::new(), dropped: HashSet::new(), names: HashSet::new(), next: 1, compacted: 0 })
    }

    /// The state of the manifest alone; None where there is none.
    pub fn from_manifest(root: &Path) -> Result<Option<State>> {
        let path = root.join(MANIFEST);
        let bytes = match files::read_small(&path, MAX_MANIFEST) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(Error::io("read", &path))?,
        };
        let damaged = |what: String| Error::damaged(MANIFEST, Part::File, what);
        let manifest: Manifest =
            serde_json::from_str(unseal("manifest", &bytes, MANIFEST)?.get()).map_err(|e| damaged(e.to_string()))?;
        let mut state = State::new(&manifest.spec, MANIFEST)?;
        if !(1..=MAX_RECORDS).contains(&manifest.log) {
            return Err(damaged(format!("it covers {} records, 1 to {MAX_RECORDS} are accepted", manifest.log)));
        }
        for entry in &manifest.shards {
            if !state.names.insert(entry.name.clone()) {
                return Err(damaged(format!("shard {} is listed twice", entry.name)));
            }
        }
        state.shards = manifest.shards;
        state.dropped = manifest.dropped.into_iter().collect();
        state.next = manifest.log;
        state.compacted = manifest.log;
        Ok(Some(state))
    }

    fn from_first_record(root: &Path) -> Result<Option<State>> {
        if std::fs::symlink_metadata(log_dir(root)).is_err() {
            return Ok(None);
        }
        files::check_dir(&log_dir(root))?;
        match read_record(root, 0)? {
            None => Ok(None),
            Some(Record::Spec { spec }) => Ok(Some(State::new(&spec, &record_file(0))?)),
            Some(_) => Err(Error::damaged(&record_file(0), Part::File, "the first record does not hold the spec")),
        }
    }

    /// Applies the records that appeared since; returns the shards they added.
    pub fn refresh(&mut self, root: &Path) -> Result<Vec<ShardEntry>> {
        let mut added = Vec::new();
        while let Some(record) = read_record(root, self.next)? {
            added.extend(self.apply(record)?);
        }
        Ok(added)
    }

    /// A number above the next one means that a record was lost.
    pub fn gap(&self, root: &Path) -> Result<Option<u64>> {
        let last = files::entries(&log_dir(root))?.iter().filter_map(|f| record_number(f)).max();
        let present = log_dir(root).join(record_file(self.next)).exists(); // written since the last refresh
        Ok(last.filter(|n| *n >= self.next && !present).map(|_| self.next))
    }

    fn apply(&mut self, record: Record) -> Result<Option<ShardEntry>> {
        let file = record_file(self.next);
        let mut added = None;
        match record {
            Record::Spec { .. } => return Err(Error::damaged(&file, Part::File, "a second spec")),
            Record::Shard(entry) => {
                // two writers with the same work commit the same shard: once is enough
                if self.names.insert(entry.name.clone()) {
                    self.dropped.remove(&entry.name);
                    self.shards.push(entry.clone());
                    added = Some(entry);
                }
            }
            Record::Drop { name, .. } => {
                check_shard_name(&name).map_err(|e| Error::damaged(&file, Part::File, e))?;
                self.shards.retain(|s| s.name != name);
                self.names.remove(&name);
                self.dropped.insert(name);
            }
        }
        self.next += 1;
        Ok(added)
    }

    /// Appends a record under the next number; false when another process took it (refresh and try again).
    pub fn append(&mut self, root: &Path, record: Record) -> Result<bool> {
        if !create_record(root, self.next, &record)? {
            return Ok(false);
        }
        self.apply(record)?;
        Ok(true)
    }

    /// Shard files that no record names: a writer died, or has not finished, between rename and record.
    pub fn orphans(&self, root: &Path) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for file in files::entries(&shards_dir(root))? {
            if let Some(name) = file.strip_suffix(".shard") {
                if check_shard_name(name).is_ok() && !self.names.contains(name) && !self.dropped.contains(name) {
                    names.push(name.to_string());
                }
            }
        }
        Ok(names)
    }

    /// Writes the manifest: the whole state in one file.
    pub fn compact(&mut self, root: &Path) -> Result<()> {
        let mut dropped: Vec<String> = self.dropped.iter().cloned().collect();
        dropped.sort();
        let body = Manifest { log: self.next, spec: self.spec.text.clone(), shards: self.shards.clone(), dropped };
        files::replace(&open_dir(root), root, MANIFEST, &seal("manifest", !self.spec.columns.is_empty(), &body)?)?;
        self.compacted = self.next;
        Ok(())
    }
}

/// Creates record `number`; false when it exists.
pub fn create_record(root: &Path, number: u64, record: &Record) -> Result<bool> {
    let columns = match record {
        Record::Spec { spec } => Spec::from_stored(spec).is_ok_and(|s| !s.columns.is_empty()),
        _ => false,
    };
    files::create_exclusive(&open_dir(root), &log_dir(root), &record_file(number), &seal("log", columns, record)?)
}

/// Record `number`; None where there is none.
pub fn read_record(root: &Path, number: u64) -> Result<Option<Record>> {
    let file = record_file(number);
    let path = log_dir(root).join(&file);
    let bytes = match files::read_small(&path, MAX_RECORD) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other.map_err(Error::io("read", &path))?,
    };
    let body = unseal("log", &bytes, &file)?;
    serde_json::from_str(body.get()).map(Some).map_err(|e| Error::damaged(&file, Part::File, e.to_string()))
}
