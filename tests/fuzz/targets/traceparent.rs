//! The `traceparent` of a request.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| undermesh::telemetry::fuzzing::traceparent(input));
