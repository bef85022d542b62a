//! The first bytes of a connection, by which it is carried as HTTP, routed by its server name, or left alone.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::proxy::fuzzing::first_bytes(input));
