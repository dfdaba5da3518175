//! Names inside a cache folder. Whatever a manifest says is matched against these before a path is made of it.

use crate::spec::{hex, sha256};

const HEX: usize = 32;

/// The name of a shard: the first 128 bits of SHA-256 over its header and footer. The footer holds every block's
/// checksum, so the name binds the whole file.
pub fn shard_name(header: &[u8], footer: &[u8]) -> String {
    hex(&sha256(&[header, footer])[..HEX / 2])
}

/// Exactly 32 lower-case hexadecimal digits: no separator, no dot, nothing that leaves the folder.
pub fn check_shard_name(name: &str) -> Result<(), String> {
    let ok = name.len() == HEX && name.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if ok {
        Ok(())
    } else {
        Err(format!("shard name {name:?} is not 32 lower-case hexadecimal digits"))
    }
}

pub fn shard_file(name: &str) -> String {
    format!("{name}.shard")
}

pub fn record_file(number: u64) -> String {
    format!("{number:010}.json")
}

/// The number of a record file, None for any other name.
pub fn record_number(file: &str) -> Option<u64> {
    let digits = file.strip_suffix(".json")?;
    let ok = digits.len() == 10 && digits.bytes().all(|b| b.is_ascii_digit());
    if ok {
        digits.parse().ok()
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_plain_names() {
        assert!(check_shard_name(&"0af9".repeat(8)).is_ok());
        for bad in ["", "../../etc/passwd", "0AF90AF90AF90AF90AF90AF90AF90AF9", "0af90af90af90af90af90af90af90af/"] {
            assert!(check_shard_name(bad).is_err(), "{bad}");
        }
        assert_eq!(record_number(&record_file(12)), Some(12));
        assert_eq!(record_number("12.json"), None);
        assert_eq!(record_number("+000000012.json"), None);
    }
}
