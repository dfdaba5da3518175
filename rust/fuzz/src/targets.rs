//! What each target does with its bytes. Checksums are made right first, or no mutation would get past them.
//! `rust/core/tests/fuzz_corpus.rs` runs the kept corpus through the same functions without a fuzzer.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use potstill_core::bytes::checksum;
use potstill_core::codec::dense::{Dense, Tables};
use potstill_core::codec::{Codec, Shape};
use potstill_core::files::Source;
use potstill_core::format::header;
use potstill_core::format::name::{record_file, shard_file, shard_name};
use potstill_core::log::{self, State};
use potstill_core::rows::TOLERANCE;
use potstill_core::shard::{read_header, Shard};
use potstill_core::{Reader, RowsMut, Spec};

/// Rows that a block may claim here; the format allows 65,536.
const ROWS: usize = 64;

pub struct Memory(pub Vec<u8>);

impl Source for Memory {
    fn len(&self) -> u64 {
        self.0.len() as u64
    }

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)?.get(..out.len()));
        out.copy_from_slice(from.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

struct Golden {
    spec: Spec,
    codec: Codec,
    bytes: Vec<u8>,
    /// Payload, rows and entries of each block.
    blocks: Vec<(Vec<u8>, Shape)>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden")
}

/// Every golden shard: codec 0, a grid with all columns, bf16 logits.
fn golden() -> &'static [Golden] {
    static GOLDEN: OnceLock<Vec<Golden>> = OnceLock::new();
    GOLDEN.get_or_init(|| {
        let mut found = Vec::new();
        for cache in ["cache_v1", "cache_v1_dense", "cache_v1_exact"] {
            let root = folder().join(cache);
            let reader = Reader::open(&root).expect("a golden cache");
            for shard in &reader.shards {
                let bytes = fs::read(root.join("shards").join(shard_file(&shard.name))).expect("a golden shard");
                let source = Memory(bytes.clone());
                let mut scratch = Vec::new();
                let blocks = (0..shard.footer.blocks.len()).map(|n| {
                    let block = shard.block(&source, n, &mut scratch).expect("a golden block");
                    (block.payload.to_vec(), block.head.shape())
                });
                let blocks = blocks.collect();
                let codec = shard.codec(&source).expect("golden tables");
                found.push(Golden { spec: reader.spec().clone(), codec, bytes, blocks });
            }
        }
        found
    })
}

fn u32_at(bytes: &[u8], at: usize) -> Option<usize> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?) as usize)
}

// puts the checksum of bytes[from..to - 8] into the last 8 of them
fn seal(bytes: &mut [u8], from: usize, to: usize) -> Option<u64> {
    let sum = checksum(bytes.get(from..to.checked_sub(8)?)?);
    bytes.get_mut(to - 8..to)?.copy_from_slice(&sum.to_le_bytes());
    Some(sum)
}

/// A header: its length, and everything behind.
pub fn header(data: &[u8]) {
    let mut bytes = data.to_vec();
    if let Some(len) = u32_at(&bytes, 12).filter(|len| *len <= bytes.len()) {
        seal(&mut bytes, 0, len);
    }
    if bytes.len() >= header::FIXED {
        if let Ok(len) = header::length(&bytes[..header::FIXED]) {
            assert!(len <= 4096);
        }
    }
    if let Ok((found, raw)) = read_header(&Memory(bytes), "x") {
        assert_eq!(found.len, raw.len());
    }
}

// makes checksums of header, tables, blocks, footer and trailer right, as far as the lengths allow
fn repair(bytes: &mut [u8], spec: &Spec) -> Option<()> {
    let len = bytes.len();
    let header_len = u32_at(bytes, 12).filter(|n| (88..=4096).contains(n) && *n < len)?;
    bytes[48..80].copy_from_slice(&spec.hash);
    let dense = bytes[32] == 1;
    let tables = if dense { u32_at(bytes, 88).filter(|n| *n < len)? } else { 0 };
    let foot_len = u32_at(bytes, len.checked_sub(32)?).filter(|n| *n >= 40 && *n < len)?;
    let foot = (len - 32).checked_sub(foot_len)?;
    if dense {
        let sum = seal(bytes, header_len, header_len + tables)?;
        bytes.get_mut(96..104)?.copy_from_slice(&sum.to_le_bytes());
    }
    let mut at = header_len + tables;
    if at > foot {
        return None;
    }
    for block in 0..u32_at(bytes, foot + 8)?.min(foot_len / 24) {
        let entry = foot + 32 + 24 * block;
        let Some(block_len) = u32_at(bytes, entry + 8).filter(|n| at + n <= foot) else { break };
        let Some(sum) = seal(bytes, at, at + block_len) else { break };
        bytes.get_mut(entry..entry + 8)?.copy_from_slice(&sum.to_le_bytes());
        at += block_len;
    }
    if dense && at + tables <= foot {
        bytes.copy_within(header_len..header_len + tables, at);
    }
    seal(bytes, foot, len - 32)?;
    seal(bytes, 0, header_len)?;
    bytes[len - 24..len - 16].copy_from_slice(&(len as u64).to_le_bytes());
    let sum = checksum(&bytes[len - 32..len - 16]);
    bytes[len - 16..len - 8].copy_from_slice(&sum.to_le_bytes());
    Some(())
}

/// A whole shard: which spec (one byte), then the file.
pub fn index(data: &[u8]) {
    let Some((which, file)) = data.split_first() else { return };
    let golden = &golden()[*which as usize % golden().len()];
    let mut bytes = file.to_vec();
    let Some(()) = repair(&mut bytes, &golden.spec) else { return };
    let (header_len, foot_len) = (u32_at(&bytes, 12).unwrap_or(0), u32_at(&bytes, bytes.len() - 32).unwrap_or(0));
    // where parts overlap, making one right may have changed the lengths
    let end = bytes.len() - 32;
    let foot = end.checked_sub(foot_len).and_then(|foot| bytes.get(foot..end));
    let (Some(header), Some(foot)) = (bytes.get(..header_len), foot) else { return };
    let name = shard_name(header, foot);
    let source = Memory(bytes);
    let Ok(shard) = Shard::open(&source, &name, &golden.spec) else { return };
    let rows: u64 = shard.footer.sequences.iter().map(|s| u64::from(s.tokens)).sum();
    assert_eq!(rows, shard.footer.tokens());
    let Ok(codec) = shard.codec(&source) else { return };
    let mut scratch = Vec::new();
    for n in 0..shard.footer.blocks.len() {
        if let Ok(block) = shard.block(&source, n, &mut scratch) {
            if block.head.kind == 0 && block.head.rows as usize <= ROWS {
                decode(&codec, &golden.spec, block.payload, block.head.shape());
            }
        }
    }
}

/// A payload under a golden shard's codec: which (one byte), rows, entries, payload. From 128 on: tables for that codec, which
/// then decode the golden payloads.
pub fn block(data: &[u8]) {
    let Some((which, rest)) = data.split_first() else { return };
    let golden = &golden()[*which as usize % 128 % golden().len()];
    if *which < 128 {
        if rest.len() >= 3 {
            let shape =
                Shape { rows: rest[0] as usize % ROWS + 1, entries: u16::from_le_bytes([rest[1], rest[2]]) as usize };
            decode(&golden.codec, &golden.spec, &rest[3..], shape);
        }
        return;
    }
    let Codec::Dense(dense) = &golden.codec else { return };
    let mut bytes = rest.to_vec();
    let len = bytes.len();
    if seal(&mut bytes, 0, len).is_none() {
        return;
    }
    if let Ok(tables) = Tables::decode(&bytes, dense.layout) {
        let codec = Codec::Dense(Dense { layout: dense.layout, tables: Arc::new(tables) });
        for (payload, shape) in &golden.blocks {
            if shape.rows <= ROWS {
                decode(&codec, &golden.spec, payload, *shape);
            }
        }
    }
}

#[derive(Default, Clone, PartialEq, Debug)]
struct Decoded {
    tokens: Vec<i32>,
    ids: Vec<i32>,
    log_probs: Vec<u32>,
    log_rest: Vec<u32>,
}

fn first_rows(codec: &Codec, spec: &Spec, payload: &[u8], shape: Shape, n: usize) -> Option<Decoded> {
    let k = spec.k as usize;
    let (mut ids, mut log_probs, mut log_rest) = (vec![7i32; n * k], vec![f32::NAN; n * k], vec![f32::NAN; n]);
    let mut tokens = vec![-7i32; n];
    let out = RowsMut { ids: &mut ids, log_probs: &mut log_probs, log_rest: &mut log_rest, ..RowsMut::default() };
    codec.decode(payload, shape, out, Some(&mut tokens)).ok()?;
    let ordered = matches!(codec, Codec::Dense(_)); // codec 0 leaves the order to `verify --deep`
    for row in 0..n {
        let mut last = TOLERANCE; // an exact bf16 logit may be above its lse by so much
        for (id, lp) in ids[row * k..(row + 1) * k].iter().zip(&log_probs[row * k..(row + 1) * k]) {
            assert!((-1..spec.vocab_size as i32).contains(id), "id {id}");
            assert!(*lp <= last, "log_prob {lp} after {last}");
            last = if ordered { *lp } else { last };
        }
        assert!(log_rest[row] <= 0.0 && tokens[row] >= 0, "log_rest {} token {}", log_rest[row], tokens[row]);
    }
    let bits = |x: Vec<f32>| x.into_iter().map(f32::to_bits).collect();
    Some(Decoded { tokens, ids, log_probs: bits(log_probs), log_rest: bits(log_rest) })
}

// what decodes is in range, and its first rows alone are the same
fn decode(codec: &Codec, spec: &Spec, payload: &[u8], shape: Shape) {
    let k = spec.k as usize;
    let mut tokens = vec![0; shape.rows];
    let _ = codec.decode_tokens(payload, shape, &mut tokens);
    let Some(whole) = first_rows(codec, spec, payload, shape, shape.rows) else { return };
    assert!(codec.decode_tokens(payload, shape, &mut tokens).is_ok() && tokens == whole.tokens);
    let half = shape.rows / 2;
    let part = first_rows(codec, spec, payload, shape, half).expect("the first rows of rows that decode");
    assert_eq!(part.ids[..], whole.ids[..half * k]);
    assert_eq!(part.log_probs[..], whole.log_probs[..half * k]);
    assert_eq!((&part.tokens[..], &part.log_rest[..]), (&whole.tokens[..half], &whole.log_rest[..half]));
}

/// Log and manifest: bit 0 of the first byte asks for a manifest of the first line, bit 1 leaves checksums as they are; each
/// further line is a record.
pub fn log(data: &[u8]) {
    static ROOT: OnceLock<PathBuf> = OnceLock::new();
    let root = ROOT.get_or_init(|| {
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_path_buf() } else { std::env::temp_dir() };
        let root = base.join(format!("potstill-fuzz-{}", std::process::id()));
        fs::create_dir_all(log::log_dir(&root)).expect("a folder");
        root
    });
    let Some((flags, rest)) = data.split_first() else { return };
    let mut lines = rest.split(|b| *b == b'\n').take(8);
    let manifest = root.join(log::MANIFEST);
    let _ = fs::remove_file(&manifest);
    let write = |kind: &str, body: &[u8]| match flags & 2 {
        0 => sealed(kind, body),
        _ => body.to_vec(),
    };
    if flags & 1 == 1 {
        let body = lines.next().unwrap_or_default();
        fs::write(&manifest, write("manifest", body)).expect("a file");
    }
    let mut number = 0;
    for line in lines {
        fs::write(log::log_dir(root).join(record_file(number)), write("log", line)).expect("a file");
        number += 1;
    }
    for gone in number..8 {
        let _ = fs::remove_file(log::log_dir(root).join(record_file(gone)));
    }
    if let Ok(Some(state)) = State::load(root) {
        assert!(state.shards.iter().all(|s| s.name.len() == 32));
        let _ = state.gap(root);
    }
}

fn sealed(kind: &str, body: &[u8]) -> Vec<u8> {
    let mut out = format!(r#"{{"potstill":"{kind}","version":[1,0],"required":[],"body":"#).into_bytes();
    out.extend_from_slice(body);
    let sum = checksum(&out);
    out.extend_from_slice(format!(",\"xxh3\":\"{sum:016x}\"}}\n").as_bytes());
    out
}

/// (target, name, bytes): the golden files as each target takes them.
pub fn seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let mut found = Vec::new();
    for (i, g) in golden().iter().enumerate() {
        let which = i as u8;
        let header_len = u32_at(&g.bytes, 12).unwrap_or(0);
        found.push(("header", format!("golden-{i}"), g.bytes[..header_len].to_vec()));
        if g.bytes.len() < 4096 {
            found.push(("index", format!("golden-{i}"), [&[which], &g.bytes[..]].concat()));
        }
        for (n, (payload, shape)) in g.blocks.iter().enumerate() {
            if (1..=ROWS).contains(&shape.rows) && payload.len() < 4096 {
                let entries = (shape.entries as u16).to_le_bytes();
                let head = [which, shape.rows as u8 - 1, entries[0], entries[1]];
                found.push(("block", format!("golden-{i}-{n}"), [&head, &payload[..]].concat()));
            }
        }
        if !g.codec.tables().is_empty() {
            found.push(("block", format!("tables-{i}"), [&[which | 128], g.codec.tables()].concat()));
        }
    }
    for cache in ["cache_v1", "cache_v1_dense"] {
        let bodies = |name: &Path| -> Vec<u8> {
            let text = fs::read_to_string(folder().join(cache).join(name)).expect("a golden file");
            let (_, body) = text.split_once(r#""body":"#).expect("a body");
            body.rsplit_once(r#","xxh3""#).expect("a checksum").0.as_bytes().to_vec()
        };
        let records: Vec<Vec<u8>> = (0..3).map(|n| bodies(&Path::new("log").join(record_file(n)))).collect();
        found.push(("log", format!("{cache}-log"), [&[0], &records.join(&b'\n')[..]].concat()));
        let manifest = bodies(Path::new(log::MANIFEST));
        found.push((
            "log",
            format!("{cache}-manifest"),
            [&[1], &manifest[..], b"\n", &records.join(&b'\n')[..]].concat(),
        ));
    }
    found
}
