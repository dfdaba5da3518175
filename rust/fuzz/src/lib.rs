//! What the fuzz targets call: `targets.rs`, which `rust/core/tests/fuzz_corpus.rs` shares.

mod targets;

pub use targets::*;

/// Writes the seeds of a target into the folder that POTSTILL_SEEDS names, if it names one.
pub fn write_seeds(target: &str) {
    let Some(folder) = std::env::var_os("POTSTILL_SEEDS") else { return };
    for (_, name, bytes) in seeds().iter().filter(|(t, ..)| *t == target) {
        std::fs::write(std::path::Path::new(&folder).join(name), bytes).expect("a seed");
    }
}
