//! Memory for many values in large pages: touching it first costs one fault in 512.
#![allow(unsafe_code)]

/// Bytes from which a vector asks for large pages.
const LARGE: usize = 2 << 20;

/// An empty vector with room for `count` values.
pub fn with_capacity<T>(count: usize) -> Vec<T> {
    let out = Vec::with_capacity(count);
    if size_of::<T>().saturating_mul(count) >= LARGE {
        advise(&out);
    }
    out
}

#[cfg(target_os = "linux")]
fn advise<T>(room: &Vec<T>) {
    const PAGE: usize = 4096;
    let start = (room.as_ptr() as usize).next_multiple_of(PAGE);
    let end = room.as_ptr() as usize + room.capacity() * size_of::<T>();
    // SAFETY: the range lies inside the vector's own memory, and the advice changes no value; a refusal changes nothing.
    unsafe { libc::madvise(start as *mut libc::c_void, (end - start) / PAGE * PAGE, libc::MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn advise<T>(_: &Vec<T>) {}
