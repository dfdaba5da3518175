//! Open files, tables and block buffers that reads reuse; nothing here can block a forked child.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use crate::codec::Codec;
use crate::error::Result;
use crate::files::FileSource;

const OPEN_FILES: usize = 16;
/// A map costs address space alone until it is read.
const MAPPED_FILES: usize = 256;
/// Memory for tables of different shards, in ids.
const TABLE_IDS: usize = 1 << 24;

/// The values used last, by number.
pub struct Recent<N, T> {
    kept: Mutex<Vec<(N, T)>>,
    most: usize,
}

impl<N: PartialEq, T: Clone> Recent<N, T> {
    fn new(most: usize) -> Self {
        Recent { kept: Mutex::default(), most }
    }

    /// A value kept from an earlier read, or a new one. try_lock: after a fork the lock may be held by nobody alive.
    pub fn get(&self, number: N, make: impl FnOnce() -> Result<T>) -> Result<T> {
        if let Ok(mut kept) = self.kept.try_lock() {
            if let Some(at) = kept.iter().position(|(n, _)| *n == number) {
                let hit = kept.remove(at);
                let value = hit.1.clone();
                kept.push(hit);
                return Ok(value);
            }
        }
        let value = make()?;
        if let Ok(mut kept) = self.kept.try_lock() {
            if kept.len() >= self.most {
                kept.remove(0);
            }
            kept.push((number, value.clone()));
        }
        Ok(value)
    }
}

/// What a reader keeps: files by shard number, codecs by the checksum of their tables.
pub struct Handles {
    pub files: Recent<usize, Arc<FileSource>>,
    pub codecs: Recent<u64, Codec>,
}

impl Handles {
    pub fn new(vocab_size: u32, mapped: bool) -> Handles {
        let tables = TABLE_IDS / vocab_size.max(1) as usize;
        Handles {
            files: Recent::new(if mapped { MAPPED_FILES } else { OPEN_FILES }),
            codecs: Recent::new(tables.clamp(1, 64)),
        }
    }
}

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// One block buffer per thread: a fresh one for each call costs as much as decoding into it.
pub fn with_scratch<T>(work: impl FnOnce(&mut Vec<u8>) -> T) -> T {
    let mut scratch = SCRATCH.take();
    let done = work(&mut scratch);
    SCRATCH.set(scratch);
    done
}
