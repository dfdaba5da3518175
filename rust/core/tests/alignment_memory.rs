//! Aligning allocates by the call, never by the token.
#![allow(unsafe_code)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::Arc;

use potstill_core::xtok::vocab::{Builder, Kind, Rules};
use potstill_core::xtok::{Aligner, Granularity, OnMismatch, Row};

struct Counting;

static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call goes on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, SeqCst);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const TOKENS: [&[u8]; 4] = [b"a", b"aa", b"a token of more bytes than one word holds", b"\xff"];

/// Calls of the allocator while one row is aligned; and its chunks.
fn calls(aligner: &Aligner, student: &[i32], teacher: &[i32]) -> (usize, usize) {
    let segments = [[0, student.len() as i64, 0, teacher.len() as i64]];
    let row = Row { student, teacher, segments: &segments, texts: None };
    let (mut a, mut b) = (vec![0; student.len()], vec![0; teacher.len()]);
    let before = CALLS.load(SeqCst);
    let found = aligner.align(&[row], (&mut a, &mut b), 1);
    let taken = CALLS.load(SeqCst) - before;
    (taken, found.map_or(0, |found| found.spans.len()))
}

#[test]
fn longer_rows_allocate_no_more_often() {
    let mut builder = Builder::with_capacity(TOKENS.len());
    for (id, token) in TOKENS.iter().enumerate() {
        assert!(builder.set(id as u64, 0, |out| out.extend_from_slice(token)).is_ok());
    }
    let vocab = Arc::new(builder.finish(Rules::new(Kind::Given), TOKENS.len()));
    let aligner = Aligner::new(Arc::clone(&vocab), vocab, &[], Granularity::Byte, OnMismatch::Resync);
    let aligner = aligner.expect("an aligner of two small vocabularies");
    // each 4 bytes: [aa, aa, long] against [a, aa, a, long]
    let rows = |n: usize, stray: usize| {
        let mut teacher = [0, 1, 0, 2].repeat(n);
        (0..stray).for_each(|i| teacher.insert((i + 1) * teacher.len() / (stray + 2), 3));
        ([1, 1, 2].repeat(n), teacher)
    };
    for stray in [0, 3] {
        let (short, long) = (rows(400, stray), rows(40_000, stray));
        let (few, chunks) = calls(&aligner, &short.0, &short.1);
        assert!(chunks >= 400 - 2 * stray, "{chunks} chunks");
        let (many, more_chunks) = calls(&aligner, &long.0, &long.1);
        assert!(more_chunks >= 40_000 - 2 * stray, "{more_chunks} chunks");
        // each place where bytes differ may make a buffer grow
        assert!(many <= few + 2 * stray, "{few} allocations for 1,200 tokens, {many} for 120,000");
    }
}
