//! What another agent has published of its pods.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::agent::fuzzing::statement(input));
