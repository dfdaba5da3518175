//! The fuzzer's kept corpus through the fuzzer's own functions: no panic, nothing out of range.

#[path = "../../fuzz/src/align.rs"]
mod align;
#[path = "../../fuzz/src/targets.rs"]
mod targets;

use std::fs;
use std::path::Path;

#[test]
fn the_kept_corpus_finds_nothing() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
    for (name, run) in [
        ("header", targets::header as fn(&[u8])),
        ("index", targets::index),
        ("block", targets::block),
        ("log", targets::log),
        ("align", align::align),
    ] {
        let files: Vec<_> = fs::read_dir(corpus.join(name)).expect("a corpus").collect();
        assert!(files.len() > 4, "{name} has {} inputs", files.len());
        for file in files {
            run(&fs::read(file.expect("an input").path()).expect("an input"));
        }
    }
}

/// The seeds must get past the checksums, or the corpus would test nothing.
#[test]
fn seeds_are_whole_and_bits_of_them_may_flip() {
    for (target, name, bytes) in targets::seeds() {
        let run = match target {
            "header" => targets::header,
            "index" => targets::index,
            "block" => targets::block,
            _ => targets::log,
        };
        run(&bytes);
        for at in (0..bytes.len()).step_by(7) {
            let mut changed = bytes.clone();
            changed[at] ^= 1 << (at % 8);
            run(&changed);
        }
        assert!(!name.is_empty());
    }
}

/// Every byte of the first inputs changes in turn: the options, the cuts, the text.
#[test]
fn alignments_hold_whatever_changes() {
    for (_, bytes) in align::align_seeds() {
        align::align(&bytes);
        for at in 0..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] = changed[at].wrapping_add(1 << (at % 8));
            align::align(&changed);
        }
    }
}
