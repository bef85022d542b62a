//! The file of what the API server said last.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| undermesh::discovery::kubernetes::fuzz(input));
