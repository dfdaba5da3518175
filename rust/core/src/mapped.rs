//! A file's bytes as memory, for readers that ask for it. One of the modules with `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::Mmap;

pub struct Mapped(Mmap);

impl Mapped {
    pub fn new(file: &File) -> io::Result<Mapped> {
        // SAFETY: a shard never changes once it has its name. Who changes one all the same is read as damage, since every
        // length is checked where it is used; who cuts one short ends the process, which `docs/threat-model.md` says.
        unsafe { Mmap::map(file) }.map(Mapped)
    }

    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}
