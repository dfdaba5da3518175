//! Open files and block buffers that reads reuse; nothing here can block a forked child.

use std::cell::RefCell;
use std::sync::{Arc, Mutex};

use crate::error::Result;
use crate::files::FileSource;

const OPEN_FILES: usize = 16;

/// The files used last, by shard number.
#[derive(Default)]
pub struct Handles {
    kept: Mutex<Vec<(usize, Arc<FileSource>)>>,
}

impl Handles {
    /// A handle kept from an earlier read, or a new one. try_lock: after a fork the lock may be held by nobody alive.
    pub fn get(&self, shard: usize, open: impl FnOnce() -> Result<FileSource>) -> Result<Arc<FileSource>> {
        if let Ok(mut kept) = self.kept.try_lock() {
            if let Some(at) = kept.iter().position(|(n, _)| *n == shard) {
                let hit = kept.remove(at);
                let source = Arc::clone(&hit.1);
                kept.push(hit);
                return Ok(source);
            }
        }
        let source = Arc::new(open()?);
        if let Ok(mut kept) = self.kept.try_lock() {
            if kept.len() >= OPEN_FILES {
                kept.remove(0);
            }
            kept.push((shard, Arc::clone(&source)));
        }
        Ok(source)
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
