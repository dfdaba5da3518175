//! The shard that is being written: a locked temporary file that grows by whole sequences.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3Default;

use super::ahead::Ahead;
use crate::bytes::token_hash;
use crate::codec::dense::{Coded, Dense};
use crate::codec::plain::Plain;
use crate::codec::Codec;
use crate::columns::{Collected, Column, Values};
use crate::error::{Error, Part, Result};
use crate::files::{self, FileSource, Source, OPEN};
use crate::format::block::{self, Head, KIND_ROWS};
use crate::format::footer::{self, BlockEntry, Footer, SequenceEntry};
use crate::format::header;
use crate::format::name::shard_name;
use crate::rows::Rows;
use crate::spec::Spec;

/// Entries of one block; rows follow from k, so that a block decodes inside the second-level cache.
const BLOCK_ENTRIES: usize = 65_536;
const BLOCK_ROWS: usize = 8192;

pub struct OpenShard {
    pub path: PathBuf,
    file: File,
    header: Vec<u8>,
    tables: Vec<u8>,
    /// Bytes of header, tables and whole sequences.
    len: u64,
    footer: Footer,
    pending: HashMap<String, usize>,
    ahead: Ahead,
}

/// A sequence encoded into blocks, not yet written.
pub struct Encoded {
    bytes: Vec<u8>,
    blocks: Vec<BlockEntry>,
    pub entry: SequenceEntry,
}

impl OpenShard {
    pub fn create(dir: &Path, spec: &Spec, codec: &Codec) -> Result<OpenShard> {
        let (path, mut file) = files::create_locked(dir, OPEN).map_err(Error::io("create a shard in", dir))?;
        let (header, tables) = (header::encode(spec, codec), codec.tables().to_vec());
        if let Err(e) = file.write_all(&[header.as_slice(), &tables].concat()) {
            let _ = fs::remove_file(&path);
            return Err(Error::io("write", &path)(e));
        }
        let len = (header.len() + tables.len()) as u64;
        let (footer, pending, ahead) = (Footer::default(), HashMap::new(), Ahead::default());
        Ok(OpenShard { path, file, header, tables, len, footer, pending, ahead })
    }

    pub fn bytes(&self) -> u64 {
        self.len
    }

    pub fn sequences(&self) -> &[SequenceEntry] {
        &self.footer.sequences
    }

    pub fn tokens(&self) -> u64 {
        self.footer.tokens()
    }

    pub fn get(&self, key: &str) -> Option<&SequenceEntry> {
        self.pending.get(key).map(|i| &self.footer.sequences[*i])
    }

    pub fn entries(&self) -> u64 {
        self.footer.entries()
    }

    /// Bytes with the second copy of the tables; index and trailer are the same for every codec.
    pub fn whole_bytes(&self) -> u64 {
        self.len + self.tables.len() as u64
    }

    /// Reads back the further columns of every sequence.
    pub fn further(&self, columns: &[Column]) -> Result<Vec<Collected>> {
        let mut found: Vec<Collected> = self.sequences().iter().map(|_| Collected::default()).collect();
        if columns.is_empty() {
            return Ok(found);
        }
        let file = self.file.try_clone().map_err(Error::io("read", &self.path))?;
        let source = FileSource::from_file(file).map_err(Error::io("read", &self.path))?;
        let mut bytes = Vec::new();
        let (mut at, mut blocks) = ((self.header.len() + self.tables.len()) as u64, self.footer.blocks.iter());
        for (sequence, further) in self.footer.sequences.iter().zip(&mut found) {
            for entry in blocks.by_ref().take(sequence.blocks as usize) {
                if entry.kind != KIND_ROWS {
                    bytes.resize(entry.len as usize, 0);
                    source.read_at(at, &mut bytes).map_err(Error::io("read", &self.path))?;
                    let damaged = |what| Error::damaged(&self.path.display().to_string(), Part::File, what);
                    let block = block::decode(&bytes).map_err(damaged)?;
                    further.push(columns, &block).map_err(damaged)?;
                }
                at += u64::from(entry.len);
            }
        }
        Ok(found)
    }

    pub fn next_block(&self) -> u32 {
        self.footer.blocks.len() as u32
    }

    /// Writes a sequence. After an error the file holds what it held before, as far as the system allows.
    pub fn append(&mut self, encoded: Encoded) -> Result<()> {
        if let Err(e) = self.file.write_all(&encoded.bytes) {
            let _ = self.rewind();
            return Err(Error::io("write", &self.path)(e));
        }
        self.len += encoded.bytes.len() as u64;
        self.footer.blocks.extend(encoded.blocks);
        self.pending.insert(encoded.entry.key.clone(), self.footer.sequences.len());
        self.footer.sequences.push(encoded.entry);
        self.ahead.grown(&self.file, self.len);
        Ok(())
    }

    fn rewind(&mut self) -> io::Result<()> {
        self.file.set_len(self.len)?;
        self.file.seek(SeekFrom::Start(self.len)).map(|_| ())
    }

    /// Writes footer and trailer; returns the shard's name and length. May be called again after an error.
    pub fn seal(&mut self) -> Result<(String, u64)> {
        let mut end = self.footer.encode();
        let name = shard_name(&self.header, &end);
        let bytes = self.whole_bytes() + (end.len() + footer::TRAILER) as u64;
        end.extend(footer::encode_trailer(end.len(), bytes));
        end.splice(..0, self.tables.iter().copied());
        let path = self.path.clone();
        self.rewind().map_err(Error::io("rewind", &path))?;
        if let Err(e) = self.file.write_all(&end) {
            let _ = self.rewind();
            return Err(Error::io("write the index of", &path)(e));
        }
        Ok((name, bytes))
    }

    pub fn sync(&mut self) -> Result<()> {
        self.ahead.finish(&self.file).map_err(Error::io("sync", &self.path))
    }
}

/// Rows of one block.
fn rows_of_block(max_k: u32) -> usize {
    (BLOCK_ENTRIES / (max_k as usize).max(1)).clamp(1, BLOCK_ROWS)
}

/// Encodes checked rows into blocks numbered from `first_block`.
pub fn encode_plain(
    key: &str,
    rows: &Rows<'_>,
    counts: &[u16],
    codec: &Plain,
    max_k: u32,
    columns: Values<'_>,
    first_block: u32,
) -> Encoded {
    let mut hash = Xxh3Default::new();
    let mut encoded = encode(key, counts, max_k, columns, first_block, |first, end, _, out| {
        let start = out.len();
        codec.encode(&rows.slice(first, end), &counts[first..end], out);
        hash.update(&out[start..]);
    });
    encoded.entry.token_hash = token_hash(rows.tokens);
    encoded.entry.content_hash = columns.hash(hash.digest128());
    encoded
}

/// The same for rows as codes, of which the content hash is known.
pub fn encode_dense(
    key: &str,
    coded: &Coded,
    content_hash: u128,
    dense: &Dense,
    columns: Values<'_>,
    first_block: u32,
) -> Encoded {
    let fill = |first, end, entry, out: &mut Vec<u8>| dense.encode(coded, first, end, entry, out);
    let mut encoded = encode(key, &coded.counts, dense.layout.k, columns, first_block, fill);
    let tokens: Vec<i32> = coded.tokens.iter().map(|t| *t as i32).collect();
    encoded.entry.token_hash = token_hash(&tokens);
    encoded.entry.content_hash = content_hash;
    encoded
}

// `fill` appends the payload of rows first..end, whose entries begin at the third number
fn encode(
    key: &str,
    counts: &[u16],
    max_k: u32,
    columns: Values<'_>,
    first_block: u32,
    mut fill: impl FnMut(usize, usize, usize, &mut Vec<u8>),
) -> Encoded {
    let (mut bytes, mut blocks, mut entry) = (Vec::new(), Vec::new(), 0);
    let step = rows_of_block(max_k);
    for first in (0..counts.len()).step_by(step) {
        let end = (first + step).min(counts.len());
        let entries: usize = counts[first..end].iter().map(|c| usize::from(*c)).sum();
        let head = Head {
            kind: KIND_ROWS,
            last: end == counts.len() && columns.columns.is_empty(),
            number: first_block + blocks.len() as u32,
            rows: (end - first) as u32,
            first_row: first as u32,
            entries: entries as u32,
            key,
        };
        let (len, sum) = block::encode(head, &mut bytes, |out| fill(first, end, entry, out));
        entry += entries;
        blocks.push(BlockEntry { sum, len: len as u32, rows: head.rows, entries: head.entries, kind: KIND_ROWS });
    }
    columns.encode(key, first_block, &mut bytes, &mut blocks);
    let (blocks_len, tokens) = (blocks.len() as u32, counts.len() as u32);
    let entry = SequenceEntry { key: key.to_string(), blocks: blocks_len, tokens, token_hash: 0, content_hash: 0 };
    Encoded { bytes, blocks, entry }
}
