//! The keys of an issuer as it publishes them.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::policy::jwt::fuzzing::key_set(input));
