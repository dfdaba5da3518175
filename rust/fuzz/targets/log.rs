#![no_main]

libfuzzer_sys::fuzz_target!(init: potstill_fuzz::write_seeds("log"), |data: &[u8]| potstill_fuzz::log(data));
