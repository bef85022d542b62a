//! A request for a certificate (PKCS #10), in PEM or DER.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::identity::fuzzing::certificate_request(input));
