//! What a container runtime sends.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::discovery::node::nri::fuzz(input));
