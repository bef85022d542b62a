//! A revocation list, in PEM or DER.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::identity::fuzzing::revocation_list(input));
