//! File system: opening without following links, durable writes, and the byte-range source that shards are read from.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::bytes::zeroed;
use crate::error::{Error, Result};
use crate::mapped::Mapped;

/// Positioned reads of immutable bytes; a local file here, a remote object later.
pub trait Source: Send + Sync {
    fn len(&self) -> u64;

    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()>;

    /// Bytes that are in memory already; None where they must be read.
    fn slice(&self, _offset: u64, _len: usize) -> Option<&[u8]> {
        None
    }

    fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

pub struct FileSource {
    file: File,
    len: u64,
    mapped: Option<Mapped>,
}

impl Source for FileSource {
    fn len(&self) -> u64 {
        self.len
    }

    fn slice(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(offset).ok()?;
        self.mapped.as_ref()?.bytes().get(from..from.checked_add(len)?)
    }

    #[cfg(unix)]
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        std::os::unix::fs::FileExt::read_exact_at(&self.file, out, offset)
    }

    #[cfg(windows)]
    fn read_at(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        let mut done = 0;
        while done < out.len() {
            let n = std::os::windows::fs::FileExt::seek_read(&self.file, &mut out[done..], offset + done as u64)?;
            if n == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            done += n;
        }
        Ok(())
    }
}

impl FileSource {
    pub fn from_file(file: File) -> io::Result<FileSource> {
        let meta = file.metadata()?;
        if !meta.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        Ok(FileSource { len: meta.len(), file, mapped: None })
    }

    /// The same bytes, as memory: a file that is cut short meanwhile ends the process.
    pub fn mapped(self) -> io::Result<FileSource> {
        Ok(FileSource { mapped: Some(Mapped::new(&self.file)?), ..self })
    }
}

/// Opens a regular file for reading. A symbolic link, a pipe or a device is an error and never blocks.
pub fn open_regular(path: &Path) -> io::Result<FileSource> {
    if fs::symlink_metadata(path)?.file_type().is_symlink() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a symbolic link, which a cache may not hold"));
    }
    FileSource::from_file(careful().open(path)?)
}

// options under which no link is followed and no pipe blocks
fn careful() -> OpenOptions {
    let mut options = OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOFOLLOW | libc::O_NONBLOCK);
    options
}

/// Reads a whole small file, refusing one above `limit` before allocating.
pub fn read_small(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let source = open_regular(path)?;
    if source.len() > limit {
        let what = format!("{} bytes, at most {limit} are accepted", source.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let mut bytes = zeroed(source.len() as usize).map_err(|what| io::Error::new(io::ErrorKind::OutOfMemory, what))?;
    source.read_at(0, &mut bytes)?;
    Ok(bytes)
}

/// Makes the entries of a folder durable.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    #[cfg(unix)]
    File::open(path)?.sync_all()?;
    #[cfg(not(unix))]
    let _ = path;
    Ok(())
}

/// Suffix of open shards, which may be salvaged, and of small files on their way, which are worth nothing.
pub const OPEN: &str = ".shard.tmp";
pub const SMALL: &str = ".json.tmp";

static COUNTER: AtomicU64 = AtomicU64::new(0);

/// A file name that no other process and no other call uses.
pub fn unique_name(suffix: &str) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    let nanos = now.map_or(0, |d| d.as_nanos() as u64);
    format!("{}-{nanos:016x}-{}{suffix}", std::process::id(), COUNTER.fetch_add(1, Ordering::Relaxed))
}

/// A new file in `dir` that this process has locked: others take it for abandoned when the lock is free.
pub fn create_locked(dir: &Path, suffix: &str) -> io::Result<(PathBuf, File)> {
    loop {
        let path = dir.join(unique_name(suffix));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path)?;
        // a process that cleans up may take and remove the file before it is locked: then make another
        let taken = matches!(file.try_lock(), Err(fs::TryLockError::WouldBlock));
        if !taken && path.exists() {
            return Ok((path, file));
        }
    }
}

/// Locks a file whose process died; None when it is alive, or when the file system has no locks.
pub fn lock_abandoned(path: &Path) -> Option<File> {
    open_regular(path).ok()?;
    let file = careful().write(true).open(path).ok()?;
    file.try_lock().ok().map(|()| file)
}

fn write_temporary(dir: &Path, bytes: &[u8]) -> Result<(PathBuf, File)> {
    let (path, mut file) = create_locked(dir, SMALL).map_err(Error::io("create a file in", dir))?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all());
    written.map_err(|e| {
        let _ = fs::remove_file(&path);
        Error::io("write", &path)(e)
    })?;
    Ok((path, file))
}

/// Replaces `dir/file` as a whole: temporary file, fsync, rename, fsync of the folder.
pub fn replace(temporary_dir: &Path, dir: &Path, file: &str, bytes: &[u8]) -> Result<()> {
    let path = &dir.join(file);
    let (temporary, _lock) = write_temporary(temporary_dir, bytes)?;
    fs::rename(&temporary, path).map_err(|e| {
        let _ = fs::remove_file(&temporary);
        Error::io("rename a file to", path)(e)
    })?;
    sync_dir(dir).map_err(Error::io("sync", dir))
}

/// Creates `dir/file` with all its bytes or not at all; false when it exists already.
pub fn create_exclusive(temporary_dir: &Path, dir: &Path, file: &str, bytes: &[u8]) -> Result<bool> {
    let path = &dir.join(file);
    let (temporary, _lock) = write_temporary(temporary_dir, bytes)?;
    // a hard link appears whole or fails; file systems without links get create_new, whose torn result a checksum shows
    let linked = match fs::hard_link(&temporary, path) {
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Ok(()) => Ok(true),
        Err(_) => create_new(path, bytes),
    };
    let _ = fs::remove_file(&temporary);
    let created = linked.map_err(Error::io("create", path))?;
    sync_dir(dir).map_err(Error::io("sync", dir))?;
    Ok(created)
}

fn create_new(path: &Path, bytes: &[u8]) -> io::Result<bool> {
    match OpenOptions::new().write(true).create_new(true).open(path) {
        Ok(mut file) => {
            let written = file.write_all(bytes).and_then(|()| file.sync_all());
            // half a record would be damage to every reader
            written.map(|()| true).inspect_err(|_| drop(fs::remove_file(path)))
        }
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(e) => Err(e),
    }
}

/// Creates a folder of the cache, or checks that what is there is a real folder.
pub fn make_dir(path: &Path) -> Result<()> {
    match fs::create_dir(path) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists => check_dir(path),
        Err(e) => Err(Error::io("create the folder", path)(e)),
    }
}

/// An existing sub-folder must not be a link out of the cache.
pub fn check_dir(path: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(path).map_err(Error::io("look at", path))?;
    if meta.is_dir() {
        return Ok(());
    }
    Err(Error::Folder {
        path: path.to_path_buf(),
        what: "a symbolic link or a file where a folder of the cache belongs".into(),
    })
}

/// `list` of a folder inside a cache, which must be none by a link.
pub fn entries(path: &Path) -> Result<Vec<String>> {
    check_dir(path)?;
    list(path)
}

/// File names of a folder, sorted; names that are not UTF-8 are left out.
pub fn list(path: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path).map_err(Error::io("list", path))? {
        let entry = entry.map_err(Error::io("list", path))?;
        if let Ok(name) = entry.file_name().into_string() {
            names.push(name);
        }
    }
    names.sort();
    Ok(names)
}
