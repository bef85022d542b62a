//! A certificate as a peer shows it, in DER.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::identity::fuzzing::certificate(input));
