//! A trust bundle, in PEM.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::identity::fuzzing::bundle(input));
