//! Syncing ahead: while rows go on being encoded, another thread makes durable what the file holds, so that the sync of a
//! commit finds little left.

use std::fs::File;
use std::io;
use std::thread::{Builder, JoinHandle};

/// Bytes between two syncs.
const BYTES: u64 = 1 << 20;

#[derive(Default)]
pub struct Ahead {
    synced: u64,
    running: Option<JoinHandle<io::Result<()>>>,
    failed: Option<io::Error>,
}

impl Ahead {
    /// Told of the file's length; begins a sync when enough is new and none is under way.
    pub fn grown(&mut self, file: &File, len: u64) {
        if len < self.synced + BYTES || self.running.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        self.end();
        // without a thread or a handle the commit's own sync does all
        let Ok(file) = file.try_clone() else { return };
        self.running = Builder::new().name("potstill-sync".into()).spawn(move || file.sync_data()).ok();
        self.synced = len;
    }

    fn end(&mut self) {
        let Some(thread) = self.running.take() else { return };
        let result = thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs died")));
        // a system tells of a failure once: the commit must hear of it
        self.failed = self.failed.take().or(result.err());
    }

    /// Waits for the sync under way, then makes all of the file durable. An error of any of them is an error.
    pub fn finish(&mut self, file: &File) -> io::Result<()> {
        self.end();
        self.failed.take().map_or(Ok(()), Err)?;
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn syncs_begin_by_bytes_and_end_with_the_commit() {
        let file = tempfile::tempfile().expect("a file");
        let mut ahead = Ahead::default();
        ahead.grown(&file, BYTES - 1);
        assert!(ahead.running.is_none());
        ahead.grown(&file, BYTES);
        assert!(ahead.running.is_some() && ahead.synced == BYTES);
        assert!(ahead.finish(&file).is_ok() && ahead.running.is_none());
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_failure_of_any_sync_fails_the_commit() {
        let (device, file) = (File::open("/dev/null").expect("a device"), tempfile::tempfile().expect("a file"));
        let mut ahead = Ahead::default();
        ahead.grown(&device, BYTES); // a device cannot be synced
        while ahead.running.as_ref().is_some_and(|thread| !thread.is_finished()) {
            std::thread::yield_now();
        }
        ahead.grown(&file, 2 * BYTES);
        assert!(ahead.finish(&file).is_err());
        assert!(ahead.finish(&file).is_ok(), "an error is told once");
    }
}
