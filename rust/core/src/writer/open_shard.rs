//! The shard that is being written: a locked temporary file that grows by whole sequences.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3Default;

use crate::bytes::token_hash;
use crate::codec::Codec;
use crate::error::{Error, Result};
use crate::files::{self, OPEN};
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
    /// Bytes of header and whole sequences.
    len: u64,
    footer: Footer,
    pending: HashMap<String, usize>,
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
        let header = header::encode(spec, codec);
        if let Err(e) = file.write_all(&header) {
            let _ = fs::remove_file(&path);
            return Err(Error::io("write", &path)(e));
        }
        let len = header.len() as u64;
        Ok(OpenShard { path, file, header, len, footer: Footer::default(), pending: HashMap::new() })
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
        let bytes = self.len + (end.len() + footer::TRAILER) as u64;
        end.extend(footer::encode_trailer(end.len(), bytes));
        let path = self.path.clone();
        self.rewind().map_err(Error::io("rewind", &path))?;
        if let Err(e) = self.file.write_all(&end) {
            let _ = self.rewind();
            return Err(Error::io("write the index of", &path)(e));
        }
        Ok((name, bytes))
    }

    pub fn sync(&self) -> Result<()> {
        self.file.sync_all().map_err(Error::io("sync", &self.path))
    }
}

/// Encodes checked rows into blocks numbered from `first_block`.
pub fn encode(key: &str, rows: &Rows<'_>, counts: &[u16], codec: &Codec, max_k: u32, first_block: u32) -> Encoded {
    let step = (BLOCK_ENTRIES / max_k as usize).clamp(1, BLOCK_ROWS);
    let (mut bytes, mut blocks, mut hash) = (Vec::new(), Vec::new(), Xxh3Default::new());
    for first in (0..rows.len()).step_by(step) {
        let end = (first + step).min(rows.len());
        let part = rows.slice(first, end);
        let counts = &counts[first..end];
        let entries: usize = counts.iter().map(|c| usize::from(*c)).sum();
        let head = Head {
            kind: KIND_ROWS,
            last: end == rows.len(),
            number: first_block + blocks.len() as u32,
            rows: (end - first) as u32,
            first_row: first as u32,
            entries: entries as u32,
            key,
        };
        let (len, sum) = block::encode(head, &mut bytes, |out| {
            let start = out.len();
            codec.encode(&part, counts, out);
            hash.update(&out[start..]);
        });
        blocks.push(BlockEntry { sum, len: len as u32, rows: head.rows, entries: head.entries, kind: KIND_ROWS });
    }
    let entry = SequenceEntry {
        key: key.to_string(),
        blocks: blocks.len() as u32,
        tokens: rows.len() as u32,
        token_hash: token_hash(rows.tokens),
        content_hash: hash.digest128(),
    };
    Encoded { bytes, blocks, entry }
}
