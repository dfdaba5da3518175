#![no_main]

libfuzzer_sys::fuzz_target!(init: potstill_fuzz::write_seeds("align"), |data: &[u8]| potstill_fuzz::align(data));
