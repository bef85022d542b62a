//! What a request shows as a JSON Web Token.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::policy::jwt::fuzzing::token(input));
