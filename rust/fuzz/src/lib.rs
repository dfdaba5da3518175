//! What the fuzz targets call: `targets.rs` and `align.rs`, which `rust/core/tests/fuzz_corpus.rs` shares.

mod align;
mod targets;

pub use align::*;
pub use targets::*;

/// Writes the seeds of a target into the folder that POTSTILL_SEEDS names, if it names one.
pub fn write_seeds(target: &str) {
    let Some(folder) = std::env::var_os("POTSTILL_SEEDS") else { return };
    for (_, name, bytes) in all_seeds().iter().filter(|(t, ..)| *t == target) {
        std::fs::write(std::path::Path::new(&folder).join(name), bytes).expect("a seed");
    }
}

fn all_seeds() -> Vec<(&'static str, String, Vec<u8>)> {
    let aligned = align_seeds().into_iter().map(|(name, bytes)| ("align", name, bytes));
    seeds().into_iter().chain(aligned).collect()
}
