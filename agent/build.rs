//! Finds the eBPF object that `cargo xtask build` made, so that the agent can embed it.
//!
//! Whoever works on user space alone needs no BPF toolchain: without an object the agent embeds nothing, and says so
//! when it is asked to capture.

use std::path::{Path, PathBuf};
use std::{env, fs};

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    // target/<profile>/build/undermesh-<hash>/out, one deeper where --target is given.
    let candidates: Vec<PathBuf> =
        out.ancestors().skip(4).take(2).map(|dir| dir.join("ebpf/undermesh.bpf.o")).collect();
    for candidate in &candidates {
        println!("cargo::rerun-if-changed={}", candidate.display());
    }
    let object = match candidates.iter().find(|path| path.is_file()) {
        Some(found) => found.clone(),
        None => empty_object(&out),
    };
    println!("cargo::rustc-env=UNDERMESH_EBPF_OBJECT={}", object.display());
}

fn empty_object(out: &Path) -> PathBuf {
    let path = out.join("none.bpf.o");
    fs::write(&path, []).expect("OUT_DIR is writable");
    path
}
