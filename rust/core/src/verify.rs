//! Verify reads everything and reports every problem; inspect sums up what the indexes say.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde::Serialize;
use serde_json::{json, Value};
use xxhash_rust::xxh3::Xxh3Default;

use crate::bytes::token_hash;
use crate::codec::dense::Coded;
use crate::codec::Codec;
use crate::columns::{self, Column};
use crate::error::{Error, Part, Result};
use crate::files::{self, Source, OPEN};
use crate::format::block::{Block, KIND_OPTIONAL, KIND_ROWS};
use crate::format::name::{record_number, shard_file};
use crate::log::{self, log_dir, open_dir, shards_dir, State};
use crate::owned::OwnedRows;
use crate::reader::Reader;
use crate::rows::Checker;
use crate::shard::{open_shard, Shard};
use crate::spec::Spec;

/// One thing that is wrong: the file, the part of it, and a sentence.
#[derive(Debug, Clone, Serialize)]
pub struct Problem {
    pub file: String,
    pub part: String,
    pub what: String,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Report {
    pub ok: bool,
    pub problems: Vec<Problem>,
    pub shards: u64,
    pub sequences: u64,
    pub tokens: u64,
    pub bytes: u64,
    /// Open shards in the folder: of a living writer, or to be salvaged.
    pub open_shards: u64,
}

fn problem(error: &Error, fallback: &str) -> Problem {
    let (file, part, what) = match error {
        Error::Damaged { file, part, what } => (file.clone(), part.to_string(), what.clone()),
        Error::Unsupported { file, what } => (file.clone(), Part::Header.to_string(), what.clone()),
        other => (fallback.to_string(), Part::File.to_string(), other.to_string()),
    };
    Problem { file, part, what }
}

/// Checks a whole cache: log, manifest, every byte of every shard and, when `deep`, every row and content hash.
pub fn verify(root: &Path, deep: bool) -> Report {
    let mut report = Report::default();
    match State::load(root) {
        Ok(Some(state)) => verify_state(root, &state, deep, &mut report),
        Ok(None) => report.problems.push(Problem {
            file: root.display().to_string(),
            part: Part::File.to_string(),
            what: "there is no cache here (no manifest.json and no log)".into(),
        }),
        Err(e) => report.problems.push(problem(&e, log::MANIFEST)),
    }
    report.ok = report.problems.is_empty();
    report
}

fn verify_state(root: &Path, state: &State, deep: bool, report: &mut Report) {
    let records = files::entries(&log_dir(root)).unwrap_or_default(); // that it cannot be listed is told below
    for number in records.iter().filter_map(|file| record_number(file)).filter(|n| *n < state.compacted) {
        if let Err(e) = log::read_record(root, number) {
            report.problems.push(problem(&e, "log"));
        }
    }
    match state.gap(root) {
        Ok(None) => {}
        Ok(Some(n)) => {
            let what = format!("record {n} is missing");
            report.problems.push(Problem { file: "log".into(), part: Part::File.to_string(), what });
        }
        Err(e) => report.problems.push(problem(&e, "log")),
    }
    report.open_shards =
        files::entries(&open_dir(root)).map_or(0, |names| names.iter().filter(|n| n.ends_with(OPEN)).count() as u64);
    if let Err(e) = files::check_dir(&shards_dir(root)) {
        report.problems.push(problem(&e, "shards"));
        return;
    }
    let mut seen: HashMap<String, (u128, String)> = HashMap::new();
    for entry in &state.shards {
        report.shards += 1;
        let shard = match open_shard(root, &entry.name, &state.spec) {
            Ok(shard) => shard,
            Err(e) => {
                report.problems.push(problem(&e, &shard_file(&entry.name)));
                continue;
            }
        };
        let said = (shard.bytes, shard.footer.sequences.len() as u64, shard.footer.tokens());
        if said != (entry.bytes, entry.sequences, entry.tokens) {
            let what = format!("bytes, sequences and tokens are {said:?}, the log says {entry:?}");
            report.problems.push(Problem { file: shard_file(&entry.name), part: Part::Index.to_string(), what });
        }
        report.bytes += shard.bytes;
        for s in &shard.footer.sequences {
            match seen.get(&s.key) {
                None => {
                    report.sequences += 1;
                    report.tokens += u64::from(s.tokens);
                    seen.insert(s.key.clone(), (s.content_hash, shard.name.clone()));
                }
                Some((hash, _)) if *hash == s.content_hash => {}
                Some((_, there)) => {
                    let what = format!("sequence {:?} has other content than in shard {there}", s.key);
                    report.problems.push(Problem {
                        file: shard_file(&shard.name),
                        part: Part::Index.to_string(),
                        what,
                    });
                }
            }
        }
        verify_shard(root, &shard, &state.spec, deep, report);
    }
}

fn verify_shard(root: &Path, shard: &Shard, spec: &Spec, deep: bool, report: &mut Report) {
    let path = shards_dir(root).join(shard_file(&shard.name));
    let source = match files::open_regular(&path) {
        Ok(source) => source,
        Err(e) => {
            report.problems.push(problem(&Error::io("open", &path)(e), &shard_file(&shard.name)));
            return;
        }
    };
    let codec = match shard.check_tables(&source).and_then(|()| shard.codec(&source)) {
        Ok(codec) => codec,
        Err(e) => {
            report.problems.push(problem(&e, &shard_file(&shard.name)));
            return;
        }
    };
    if !deep {
        let mut scratch = Vec::new();
        let damaged = (0..shard.footer.blocks.len()).filter_map(|n| shard.block(&source, n, &mut scratch).err());
        report.problems.extend(damaged.map(|e| problem(&e, &shard_file(&shard.name))));
        return;
    }
    let mut checker = Checker::stored(spec);
    let mut next = 0;
    for sequence in 0..shard.footer.sequences.len() {
        let blocks = next..next + shard.footer.sequences[sequence].blocks as usize;
        next = blocks.end;
        let found = verify_sequence(&source, shard, &codec, sequence, blocks, &mut checker, &spec.columns);
        report.problems.extend(found.iter().map(|e| problem(e, &shard_file(&shard.name))));
    }
}

// every damaged block of the sequence; its hashes are judged when all its blocks are whole
fn verify_sequence(
    source: &dyn Source,
    shard: &Shard,
    codec: &Codec,
    sequence: usize,
    blocks: std::ops::Range<usize>,
    checker: &mut Checker,
    columns: &[Column],
) -> Vec<Error> {
    let entry = &shard.footer.sequences[sequence];
    let file = shard_file(&shard.name);
    let (mut problems, mut scratch, mut tokens) = (Vec::new(), Vec::new(), Vec::new());
    let (mut content, mut whole) = (Xxh3Default::new(), Coded::default());
    let mut rows = OwnedRows::new(codec, shard.header.k as usize);
    let (mut first_row, mut kind, mut further) = (0, KIND_ROWS, Xxh3Default::new());
    let end = blocks.end;
    for n in blocks {
        let block = match shard.block(source, n, &mut scratch) {
            Ok(block) => block,
            Err(e) => {
                problems.push(e);
                continue;
            }
        };
        let head = block.head;
        if head.kind >= KIND_OPTIONAL {
            continue;
        }
        if head.kind != kind {
            (kind, first_row) = (head.kind, 0);
        }
        let placed = head.key == entry.key && head.last == (n + 1 == end);
        let in_order = !problems.is_empty() || head.first_row as usize == first_row;
        let checked = if placed && in_order && kind != KIND_ROWS {
            columns[usize::from(kind) - 1].check(block.payload, head.rows as usize)
        } else if placed && in_order {
            check_rows(&block, codec, &mut rows, checker, &mut whole)
        } else {
            Err(format!("{head:?} is not the block of sequence {:?} that belongs here", entry.key))
        };
        if let Err(what) = checked {
            problems.push(Error::damaged(&file, Part::Block(n as u32), what));
        }
        if kind == KIND_ROWS {
            tokens.extend_from_slice(&rows.tokens);
            content.update(block.payload);
        } else {
            further.update(block.payload);
        }
        first_row += head.rows as usize;
    }
    if !problems.is_empty() {
        return problems;
    }
    let content = match codec {
        Codec::Plain(_) => content.digest128(),
        Codec::Dense(_) => whole.hash(),
    };
    let content = if columns.is_empty() { content } else { columns::join(content, further.digest128()) };
    if token_hash(&tokens) != entry.token_hash || content != entry.content_hash {
        let what = format!("the hashes of sequence {:?} differ from its blocks", entry.key);
        problems.push(Error::damaged(&file, Part::Index, what));
    }
    problems
}

// decodes one block and judges its rows; a dense block's codes are kept for the content hash
fn check_rows(
    block: &Block<'_>,
    codec: &Codec,
    rows: &mut OwnedRows,
    checker: &mut Checker,
    whole: &mut Coded,
) -> std::result::Result<(), String> {
    rows.clear();
    let found = rows.push(block, codec)?;
    checker.check(block.head.key, &found, &mut Vec::new()).map_err(|e| e.to_string())?;
    if let Codec::Dense(dense) = codec {
        whole.append(&dense.decode_coded(block.payload, block.head.shape())?);
    }
    Ok(())
}

/// A summary for people and for `--json`.
pub fn inspect(root: &Path) -> Result<Value> {
    let reader = Reader::open(root)?;
    let mut lengths: Vec<usize> = (0..reader.len()).map(|i| reader.tokens_of(i)).collect();
    lengths.sort_unstable();
    let at = |q: f64| lengths.get(((lengths.len().max(1) - 1) as f64 * q) as usize).copied().unwrap_or(0);
    let entries: u64 = reader.shards.iter().map(|s| s.footer.entries()).sum();
    let rows: u64 = reader.shards.iter().map(|s| s.footer.tokens()).sum();
    let spec: Value = serde_json::from_str(&reader.spec().text).map_err(|e| Error::Refused(e.to_string()))?;
    let shards: Vec<Value> = reader.shards.iter().map(|s| shard_summary(s)).collect();
    let stored = spec.get("columns").and_then(Value::as_array).map_or(&[] as &[Value], Vec::as_slice);
    let columns: Vec<Value> =
        stored.iter().enumerate().map(|(n, column)| column_summary(column, n, &reader.shards)).collect();
    let open = files::entries(&open_dir(root)).map_or(0, |names| names.iter().filter(|n| n.ends_with(OPEN)).count());
    let per_token = |total: u64| if rows == 0 { 0.0 } else { total as f64 / rows as f64 };
    Ok(json!({
        "path": root.display().to_string(),
        "spec": spec,
        "sequences": reader.len(),
        "tokens": reader.num_tokens(),
        "bytes": reader.num_bytes(),
        "bytes_per_token": per_token(reader.num_bytes()),
        "entries_per_token": per_token(entries),
        "sequence_tokens": {"min": at(0.0), "median": at(0.5), "p90": at(0.9), "max": at(1.0)},
        "columns": columns,
        "open_shards": open,
        "shards": shards,
    }))
}

// as in the spec, with the bytes of their blocks
fn column_summary(stored: &Value, number: usize, shards: &[Arc<Shard>]) -> Value {
    let of_column = |shard: &Arc<Shard>| -> u64 {
        let blocks = shard.footer.blocks.iter().filter(|b| b.kind == columns::kind(number));
        blocks.map(|b| u64::from(b.len)).sum()
    };
    let mut found = stored.clone();
    found["bytes"] = shards.iter().map(of_column).sum::<u64>().into();
    found
}

fn shard_summary(shard: &Shard) -> Value {
    let f = &shard.footer;
    let ends = (shard.offsets.first().copied().unwrap_or(0), shard.offsets.last().copied().unwrap_or(0));
    let tables = 2 * shard.header.codec.tables_len() as u64;
    json!({
        "name": shard.name,
        "bytes": shard.bytes,
        "parts": {
            "header": shard.header.len,
            "tables": tables,
            "blocks": ends.1 - ends.0,
            "index": shard.bytes - shard.header.len as u64 - tables - (ends.1 - ends.0),
        },
        "blocks": f.blocks.len(),
        "sequences": f.sequences.len(),
        "tokens": f.tokens(),
        "codec": shard.header.codec.name(),
        "version": [crate::format::MAJOR, shard.header.minor],
    })
}
