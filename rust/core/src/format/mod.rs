//! The bytes of a shard: header, blocks, footer, trailer. Every byte is under a checksum or compared with a constant.

pub mod block;
pub mod footer;
pub mod header;
pub mod name;

/// Largest accepted header, block, footer and key, checked before anything is allocated.
pub const MAX_HEADER: usize = 4096;
pub const MAX_BLOCK: usize = 1 << 26;
pub const MAX_FOOTER: usize = 1 << 30;
pub const MAX_KEY: usize = 512;
/// Rows of one block.
pub const MAX_BLOCK_ROWS: u32 = 65_536;
/// Rows of a block times k: 128 MiB decoded, whatever the payload's size.
pub const MAX_BLOCK_DECODED: u64 = 1 << 24;

/// Format version: a newer major is refused, a newer minor is read.
pub const MAJOR: u16 = 1;
pub const MINOR: u16 = 2;

/// A key is 1 to 512 bytes of UTF-8.
pub fn check_key(bytes: &[u8]) -> Result<&str, String> {
    if bytes.is_empty() || bytes.len() > MAX_KEY {
        return Err(format!("a key of {} bytes, 1 to {MAX_KEY} are accepted", bytes.len()));
    }
    std::str::from_utf8(bytes).map_err(|e| format!("a key that is not UTF-8: {e}"))
}
