//! What a request carries of its session.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| undermesh::proxy::fuzzing::session(input));
