//! Installs what is missing on this machine: says what and why, and does nothing where all is there.

mod apt;
mod debian_archive;
mod debian_rust_src;
pub mod kernel;
mod programs;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{cargo, command, output, run};
use crate::{paths, say};

/// The last line of bpf-linker that links with rustc's own LLVM. Pinned together with rust-toolchain.toml: both
/// must carry the same LLVM.
const BPF_LINKER: &str = "0.10.3";

const CARGO_DENY: &str = "0.20.2";

/// The toolchain's version, for which the library source must be.
const RUST: &str = "1.95.0";

/// Debian packages, and what for.
type Packages = &'static [(&'static str, &'static str)];

const FOR_LAB: Packages = &[
    ("iproute2", "makes the nodes and pods of the lab"),
    ("bpftool", "shows what the kernel does"),
    ("curl", "calls the shop"),
];

const FOR_BENCH: Packages = &[
    ("nginx-light", "is the server of the tests"),
    ("wrk", "loads it"),
    ("nghttp2-client", "loads it with HTTP/2 (h2load)"),
    ("iperf3", "measures bulk throughput"),
];

const FOR_FUZZ: Packages = &[("g++", "builds libFuzzer")];

const FOR_ZTUNNEL: Packages = &[("iptables", "redirects connections to a ztunnel")];

const FOR_TESTS: Packages = &[
    ("redis-server", "is a server whose clients pipeline"),
    ("redis-tools", "loads it"),
    ("postgresql", "is a server with long sessions"),
    ("python3", "opens sockets in unusual ways"),
    ("python3-websockets", "speaks WebSocket, at both ends"),
    ("socat", "opens sockets in all ways"),
    ("tcpdump", "sees what is on the wire"),
    ("openssl", "is a TLS server that is not ours"),
    ("faketime", "sets an agent's clock wrong"),
    ("iptables", "drops packets"),
];

const FOR_CLUSTER: Packages = &[
    ("iproute2", "makes the nodes' networks"),
    ("iptables", "leads to Services, by kube-proxy's rules"),
    ("util-linux", "enters nodes"),
    ("gcc", "builds the part of runc that is in C"),
    ("libc6-dev", "has the headers for it"),
    ("libseccomp-dev", "makes the filters of system calls that pods get"),
    ("pkg-config", "finds it"),
    ("busybox-static", "is what is in the pods of the tests"),
];

const FOR_CRI_O: Packages = &[("conmon", "stands between CRI-O and a container")];

const FOR_VM: Packages = &[
    ("qemu-system-x86", "runs another kernel"),
    ("qemu-system-common", "has virtiofsd, which shows this machine's files to it"),
];

/// All that any task needs.
pub fn everything() -> Result<()> {
    for_tests()?;
    for_lint()?;
    say::step("all that Undermesh needs is installed");
    Ok(())
}

/// What building the kernel programs needs.
pub fn for_build() -> Result<()> {
    ensure_bpf_linker()?;
    ensure_library_source()
}

/// What the demo needs.
pub fn for_demo() -> Result<()> {
    apt::ensure(&[FOR_LAB])?;
    for_build()
}

/// What the benchmark needs.
pub fn for_bench() -> Result<()> {
    apt::ensure(&[FOR_LAB, FOR_BENCH])?;
    for_build()
}

/// What a ztunnel beside us needs.
pub fn for_ztunnel() -> Result<()> {
    apt::ensure(&[FOR_ZTUNNEL])
}

/// What the tests need; the PATH that they are to have.
pub fn for_tests() -> Result<OsString> {
    apt::ensure(&[FOR_LAB, FOR_BENCH, FOR_TESTS])?;
    for_build()?;
    programs::ensure()
}

/// What a cluster needs beside Go.
pub fn for_cluster() -> Result<()> {
    apt::ensure(&[FOR_CLUSTER])
}

/// What a cluster with CRI-O needs besides.
pub fn for_cri_o() -> Result<()> {
    apt::ensure(&[FOR_CRI_O])
}

/// What the fuzz targets need.
pub fn for_fuzz() -> Result<()> {
    apt::ensure(&[FOR_FUZZ])
}

/// What tests under another kernel need beside what the tests need; the kernel itself is
/// [`kernel::fetch`]'s.
pub fn for_vm() -> Result<()> {
    apt::ensure(&[FOR_VM])
}

/// What the lints need.
pub fn for_lint() -> Result<()> {
    for_build()?;
    ensure_tool("cargo-deny", CARGO_DENY, "checks licences and advisories of the dependencies (3 minutes)")
}

/// The linker that makes eBPF objects.
pub fn bpf_linker() -> Result<PathBuf> {
    tool("bpf-linker", BPF_LINKER)
}

/// The checker of dependencies.
pub fn cargo_deny() -> Result<PathBuf> {
    tool("cargo-deny", CARGO_DENY)
}

fn ensure_bpf_linker() -> Result<()> {
    ensure_tool("bpf-linker", BPF_LINKER, "links the kernel programs (4 minutes)")
}

/// Installs a cargo tool of one version, out of the way of any other version.
fn ensure_tool(name: &str, version: &str, why: &str) -> Result<()> {
    if tool(name, version)?.exists() {
        return Ok(());
    }
    say::step(&format!("installing {name} {version}, which {why}"));
    let mut install = cargo();
    install
        .args(["install", name, "--version", version, "--locked", "--root"])
        .arg(tool_root(name, version)?);
    // Not into the workspace's target folder, nor with its flags.
    install.env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS");
    run(install)
}

fn tool(name: &str, version: &str) -> Result<PathBuf> {
    Ok(tool_root(name, version)?.join("bin").join(name))
}

fn tool_root(name: &str, version: &str) -> Result<PathBuf> {
    Ok(paths::cache()?.join(format!("{name}-{version}")))
}

/// The source of Rust's `core`, which has to be built for the kernel's target. It is not listed in
/// rust-toolchain.toml, because rustup would then ask the network at every cargo call.
fn ensure_library_source() -> Result<()> {
    let wanted = sysroot()?.join("lib/rustlib/src/rust");
    if has_library(&wanted) {
        return Ok(());
    }
    say::step(&format!(
        "installing the library source of Rust {RUST}: `core` is built for the kernel's target"
    ));
    let mut rustup = command("rustup");
    rustup.args(["component", "add", "rust-src"]);
    match output(rustup, Duration::from_secs(120)) {
        Ok(_) if has_library(&wanted) => return Ok(()),
        Ok(_) => say::step("rustup has not put it there; taking it from Debian"),
        Err(error) => {
            let error = format!("{error:#}");
            let reason = error.trim_end().lines().last().unwrap_or_default();
            say::step(&format!("not by rustup ({reason}); taking it from Debian"));
        }
    }
    let source = debian_rust_src::fetch(RUST)?;
    if !has_library(&source) {
        bail!("Debian's package has no {}/library", source.display());
    }
    link(&source, &wanted)
}

fn link(source: &Path, wanted: &Path) -> Result<()> {
    std::fs::create_dir_all(wanted.parent().context("a sysroot")?)?;
    if wanted.is_symlink() {
        std::fs::remove_file(wanted)?;
    }
    std::os::unix::fs::symlink(source, wanted)
        .with_context(|| format!("{} cannot be linked to {}", wanted.display(), source.display()))
}

fn has_library(source: &Path) -> bool {
    source.join("library/Cargo.lock").is_file()
}

fn sysroot() -> Result<PathBuf> {
    let mut rustc = command(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    rustc.args(["--print", "sysroot"]);
    Ok(PathBuf::from(output(rustc, Duration::from_secs(60))?.trim()))
}
