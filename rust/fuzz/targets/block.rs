#![no_main]

libfuzzer_sys::fuzz_target!(init: potstill_fuzz::write_seeds("block"), |data: &[u8]| potstill_fuzz::block(data));
