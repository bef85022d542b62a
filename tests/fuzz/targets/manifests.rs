//! A file of Kubernetes manifests: the first byte chooses between YAML and JSON.

#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((syntax, text)) = input.split_first() else { return };
    let file = if syntax % 2 == 0 { "fuzz.yaml" } else { "fuzz.json" };
    undermesh::discovery::directory::fuzzing::manifests(Path::new(file), text);
});
