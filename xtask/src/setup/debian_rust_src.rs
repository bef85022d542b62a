//! Rust's library source from Debian's package `rust-src`, where rustup's server cannot be reached.

use std::path::PathBuf;

use anyhow::{Context, Result};

use super::debian_archive::Archive;
use crate::{paths, say};

/// The suite that carries the toolchain's version; the package is for a later release than the machine's.
const SUITE: &str = "trixie-backports";

/// Unpacks the source of this version into the cache, and returns the folder above `library`.
pub fn fetch(rust: &str) -> Result<PathBuf> {
    let root = paths::cache()?.join(format!("rust-src-{rust}"));
    let source = root.join(format!("usr/src/rustc-{rust}"));
    if source.join("library/Cargo.lock").exists() {
        return Ok(source);
    }
    let archive = Archive::open(SUITE)?;
    let known = archive.ask(&["madison", "rust-src"])?;
    let version = choose(&known, rust).with_context(|| {
        format!("{SUITE} has no rust-src {rust}; it has:\n{known}\nTry rustup component add rust-src")
    })?;
    say::step(&format!("unpacking Debian's rust-src {version} into {}", root.display()));
    archive.unpack(&[&format!("rust-src={version}")], &root)?;
    Ok(source)
}

/// The version whose upstream part is the toolchain's.
fn choose<'a>(madison: &'a str, rust: &str) -> Option<&'a str> {
    let versions = madison.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
    versions.into_iter().find(|version| version.split(['+', '-', '~']).next() == Some(rust))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chooses_the_toolchains_version() {
        let madison = " rust-src | 1.96.0+dfsg1-1~bpo13+1 | x\n rust-src | 1.95.0+dfsg1-2~bpo13+1 | x\n";
        assert_eq!(choose(madison, "1.95.0"), Some("1.95.0+dfsg1-2~bpo13+1"));
        assert_eq!(choose(madison, "1.95.1"), None);
    }
}
