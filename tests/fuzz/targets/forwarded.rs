//! The `Forwarded` header of a CONNECT.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &str| undermesh::proxy::tunnel::fuzzing::forwarded(input));
