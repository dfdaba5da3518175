//! One shard opened for reading: header, trailer and index are checked here, blocks when they are read.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::bytes::zeroed;
use crate::codec::dense::{Dense, Params, Tables};
use crate::codec::{Codec, Declared};
use crate::error::{Error, Part, Result};
use crate::files::{self, Source};
use crate::format::block::{self, Block};
use crate::format::footer::{self, Footer, TRAILER};
use crate::format::header::{self, Header, Refusal};
use crate::format::name::{shard_file, shard_name};
use crate::format::MAX_BLOCK_DECODED;
use crate::log::shards_dir;
use crate::spec::Spec;

/// The checked index of a shard; holds no file handle.
pub struct Shard {
    pub name: String,
    pub bytes: u64,
    pub header: Header,
    pub footer: Footer,
    /// Start of each block, and the end of the last.
    pub offsets: Vec<u64>,
}

/// Reads and checks a header at the start of `source`.
pub fn read_header(source: &dyn Source, file: &str) -> Result<(Header, Vec<u8>)> {
    let refuse = |refusal| match refusal {
        Refusal::Damaged(what) => Error::damaged(file, Part::Header, what),
        Refusal::Unsupported(what) => Error::Unsupported { file: file.to_string(), what },
    };
    let mut fixed = vec![0u8; header::FIXED];
    read(source, 0, &mut fixed).map_err(|e| Error::damaged(file, Part::Header, e))?;
    let mut bytes = vec![0u8; header::length(&fixed).map_err(refuse)?];
    read(source, 0, &mut bytes).map_err(|e| Error::damaged(file, Part::Header, e))?;
    let header = header::decode(&bytes).map_err(refuse)?;
    Ok((header, bytes))
}

/// Reads and checks tables that stand at `offset`.
pub fn read_tables(source: &dyn Source, offset: u64, params: &Params) -> std::result::Result<Tables, String> {
    let room = source.len().saturating_sub(offset);
    if params.tables_len as u64 > room {
        return Err(format!("{} bytes of tables, the file has {room} for them", params.tables_len));
    }
    let mut bytes = zeroed(params.tables_len)?;
    read(source, offset, &mut bytes)?;
    let tables = Tables::decode(&bytes, params.layout)?;
    if tables.sum != params.tables_sum || tables.trained != params.trained {
        return Err("the tables are whole but not those that the header names".to_string());
    }
    Ok(tables)
}

fn read(source: &dyn Source, offset: u64, out: &mut [u8]) -> std::result::Result<(), String> {
    source.read_at(offset, out).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => format!("the file ends inside these {} bytes", out.len()),
        _ => e.to_string(),
    })
}

/// Opens shard `name` of the cache at `root` with its full check.
pub fn open_shard(root: &Path, name: &str, spec: &Spec) -> Result<Shard> {
    let path = shards_dir(root).join(shard_file(name));
    let source = files::open_regular(&path).map_err(Error::io("open", &path))?;
    Shard::open(&source, name, spec)
}

impl Shard {
    pub fn open(source: &dyn Source, name: &str, spec: &Spec) -> Result<Shard> {
        let file = shard_file(name);
        let (header, header_bytes) = read_header(source, &file)?;
        if header.spec_hash != spec.hash {
            return Err(Error::damaged(&file, Part::Header, "the shard was written for another spec"));
        }
        if !header.codec.fits(spec) {
            return Err(Error::damaged(&file, Part::Header, "the codec is not the one that the spec names"));
        }
        if header.columns == spec.columns.is_empty() {
            let what = "the shard's further columns are not those that the spec names";
            return Err(Error::damaged(&file, Part::Header, what));
        }
        let tables = header.codec.tables_len();
        let start = header.len + tables;
        let len = source.len();
        let end = len.checked_sub(TRAILER as u64).filter(|end| *end >= (start + tables) as u64);
        let end = end.ok_or_else(|| Error::damaged(&file, Part::Trailer, format!("the file has only {len} bytes")))?;
        let mut tail = [0u8; TRAILER];
        read(source, end, &mut tail).map_err(|e| Error::damaged(&file, Part::Trailer, e))?;
        let footer_len =
            footer::decode_trailer(&tail, len, start + tables).map_err(|e| Error::damaged(&file, Part::Trailer, e))?;
        let footer_at = end - footer_len as u64;
        let mut bytes = zeroed(footer_len).map_err(|e| Error::damaged(&file, Part::Footer, e))?;
        read(source, footer_at, &mut bytes).map_err(|e| Error::damaged(&file, Part::Footer, e))?;
        let footer = Footer::decode(&bytes, footer_at - (start + tables) as u64)
            .map_err(|e| Error::damaged(&file, Part::Footer, e))?;
        let named = shard_name(&header_bytes, &bytes);
        if named != name {
            let what = format!("the content names this shard {named}, the file is called {name}");
            return Err(Error::damaged(&file, Part::Footer, what));
        }
        footer.check_columns(&spec.columns).map_err(|(n, what)| Error::damaged(&file, Part::Block(n as u32), what))?;
        let mut offsets = vec![start as u64];
        let mut at = start as u64;
        for (n, b) in footer.blocks.iter().enumerate() {
            if b.kind == block::KIND_ROWS && u64::from(b.rows) * u64::from(header.k) > MAX_BLOCK_DECODED {
                let what = format!("{} rows of up to {} entries in one block", b.rows, header.k);
                return Err(Error::damaged(&file, Part::Block(n as u32), what));
            }
            at += u64::from(b.len);
            offsets.push(at);
        }
        Ok(Shard { name: name.to_string(), bytes: len, header, footer, offsets })
    }

    /// The codec with its tables, read from before the first block.
    pub fn codec(&self, source: &dyn Source) -> Result<Codec> {
        match &self.header.codec {
            Declared::Plain(c) => Ok(Codec::Plain(c.clone())),
            Declared::Dense(params) => {
                let tables = read_tables(source, self.header.len as u64, params);
                let damaged = |e| Error::damaged(&shard_file(&self.name), Part::Tables, e);
                Ok(Codec::Dense(Dense { layout: params.layout, tables: Arc::new(tables.map_err(damaged)?) }))
            }
        }
    }

    /// Compares the copy of the tables behind the last block with them.
    pub fn check_tables(&self, source: &dyn Source) -> Result<()> {
        if let Declared::Dense(params) = &self.header.codec {
            let damaged = |e| Error::damaged(&shard_file(&self.name), Part::Tables, e);
            read_tables(source, self.header.len as u64, params).map_err(damaged)?;
            let copy = self.offsets.last().copied().unwrap_or(0);
            read_tables(source, copy, params).map_err(|e| damaged(format!("the copy at the end: {e}")))?;
        }
        Ok(())
    }

    /// Reads block `n`, into `scratch` unless it is in memory, and checks it against its own checksum and against the index.
    pub fn block<'a>(&self, source: &'a dyn Source, n: usize, scratch: &'a mut Vec<u8>) -> Result<Block<'a>> {
        let damaged = |what: String| Error::damaged(&shard_file(&self.name), Part::Block(n as u32), what);
        let entry = &self.footer.blocks[n];
        let bytes = match source.slice(self.offsets[n], entry.len as usize) {
            Some(bytes) => bytes,
            None => {
                scratch.resize(entry.len as usize, 0);
                read(source, self.offsets[n], scratch).map_err(damaged)?;
                scratch
            }
        };
        let block = block::decode(bytes).map_err(damaged)?;
        let head = &block.head;
        if block.sum != entry.sum {
            return Err(damaged("the block is whole but not the one the index names".to_string()));
        }
        if (head.kind, head.number, head.rows, head.entries) != (entry.kind, n as u32, entry.rows, entry.entries) {
            return Err(damaged(format!("the block's header {head:?} contradicts the index")));
        }
        Ok(block)
    }
}
