//! Writing back ahead: while rows go on being encoded, another thread sends what the file holds to the disk, so that the
//! sync of a commit finds little left. One of the modules with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::thread::{Builder, JoinHandle};

/// Bytes that are sent at a time, at least.
const BYTES: u64 = 1 << 20;

#[derive(Default)]
pub struct Ahead {
    synced: u64,
    running: Option<JoinHandle<io::Result<()>>>,
    failed: Option<io::Error>,
}

impl Ahead {
    /// Told of the file's length; begins when enough is new and nothing is under way.
    pub fn grown(&mut self, file: &File, len: u64) {
        if len < self.synced + BYTES || self.running.as_ref().is_some_and(|thread| !thread.is_finished()) {
            return;
        }
        self.end();
        // without a thread or a handle the commit's own sync does all
        let Ok(file) = file.try_clone() else { return };
        self.running = Builder::new().name("potstill-sync".into()).spawn(move || write_back(&file)).ok();
        self.synced = len;
    }

    fn end(&mut self) {
        let Some(thread) = self.running.take() else { return };
        let result = thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread that syncs died")));
        // a system tells of a failure once: the commit must hear of it
        self.failed = self.failed.take().or(result.err());
    }

    /// Waits for what is under way, then makes all of the file durable. An error of any of them is an error.
    pub fn finish(&mut self, file: &File) -> io::Result<()> {
        self.end();
        self.failed.take().map_or(Ok(()), Err)?;
        file.sync_all()
    }
}

// Pages alone: a sync would end the file system's transaction too, which every other writer then waits for. A page that
// the disk refuses is told by the sync of the commit, as the file stays open until then.
#[cfg(target_os = "linux")]
fn write_back(file: &File) -> io::Result<()> {
    use std::os::fd::AsRawFd;
    // SAFETY: the descriptor is open while `file` is borrowed, and no memory is handed over.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) } {
        0 => Ok(()),
        _ => file.sync_data(), // a system without the call, or a failure, which this one tells
    }
}

#[cfg(not(target_os = "linux"))]
fn write_back(file: &File) -> io::Result<()> {
    file.sync_data()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_begins_by_bytes_and_ends_with_the_commit() {
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
    fn a_failure_on_the_way_fails_the_commit() {
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
