//! Rust's library source from Debian's package `rust-src`, where rustup's server cannot be reached.
//!
//! The package is for a later release than the machine's; it is only unpacked, never installed, and apt works on
//! folders of its own, so that the machine's package lists stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::command::{command, output};
use crate::{paths, say};

/// The suite that carries the toolchain's version.
const SUITE: &str = "trixie-backports";

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// Unpacks the source of this version into the cache, and returns the folder above `library`.
pub fn fetch(rust: &str) -> Result<PathBuf> {
    let root = paths::cache()?.join(format!("rust-src-{rust}"));
    let source = root.join(format!("usr/src/rustc-{rust}"));
    if source.join("library/Cargo.lock").exists() {
        return Ok(source);
    }
    let apt = Apt::prepare(&paths::cache()?.join("apt"))?;
    apt.run("apt-get", &["-qq", "update"])?;
    let known = apt.run("apt-cache", &["madison", "rust-src"])?;
    let version = choose(&known, rust).with_context(|| {
        format!("{SUITE} has no rust-src {rust}; it has:\n{known}\nTry rustup component add rust-src")
    })?;
    say::step(&format!("unpacking Debian's rust-src {version} into {}", root.display()));
    apt.run("apt-get", &["-qq", "download", &format!("rust-src={version}")])?;
    let mut unpack = command("dpkg");
    unpack.arg("-x").arg(apt.downloaded()?).arg(&root);
    output(unpack, Duration::from_secs(300))?;
    fs::remove_dir_all(&apt.dir)?;
    Ok(source)
}

/// An apt that knows one suite and touches one folder.
struct Apt {
    dir: PathBuf,
}

impl Apt {
    fn prepare(dir: &Path) -> Result<Self> {
        for folder in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(dir.join(folder))?;
        }
        let mirror = mirror().context("no Debian archive in /etc/apt/sources.list or sources.list.d")?;
        fs::write(dir.join("sources.list"), format!("deb [signed-by={KEYRING}] {mirror} {SUITE} main\n"))?;
        Ok(Self { dir: dir.to_owned() })
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        let mut apt: Command = command(program);
        let dir = self.dir.display();
        for option in [
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            "Dir::Etc::sourceparts=-".to_owned(),
            format!("Dir::State::lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            // The folder may be in root's home, which apt's own user cannot enter.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            apt.arg("-o").arg(option);
        }
        apt.args(args).current_dir(&self.dir);
        output(apt, Duration::from_secs(300))
    }

    fn downloaded(&self) -> Result<PathBuf> {
        let entries = fs::read_dir(&self.dir)?.collect::<Result<Vec<_>, _>>()?;
        let mut packages =
            entries.into_iter().map(|e| e.path()).filter(|p| p.extension().is_some_and(|e| e == "deb"));
        match packages.next() {
            Some(package) => Ok(package),
            None => bail!("apt-get download has left no package in {}", self.dir.display()),
        }
    }
}

/// The version whose upstream part is the toolchain's.
fn choose<'a>(madison: &'a str, rust: &str) -> Option<&'a str> {
    let versions = madison.lines().filter_map(|line| line.split('|').nth(1)).map(str::trim);
    versions.into_iter().find(|version| version.split(['+', '-', '~']).next() == Some(rust))
}

/// The archive that this machine's own release comes from.
fn mirror() -> Option<String> {
    let release = fs::read_to_string("/etc/os-release").ok()?;
    let codename =
        release.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?.trim_matches('"').to_owned();
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    files.extend(parts.map(|entry| entry.path()));
    files.into_iter().find_map(|file| {
        let text = fs::read_to_string(&file).ok()?;
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => uri_of_lines(&text, &codename),
            Some("sources") => uri_of_stanzas(&text, &codename),
            _ => None,
        }
    })
}

/// `deb [options] URI SUITE COMPONENT...`
fn uri_of_lines(text: &str, suite: &str) -> Option<String> {
    text.lines().find_map(|line| {
        let rest = line.trim().strip_prefix("deb ")?.trim_start();
        let rest = if rest.starts_with('[') { rest.split_once(']')?.1 } else { rest };
        let mut words = rest.split_whitespace();
        let (uri, of) = (words.next()?, words.next()?);
        (of == suite).then(|| uri.to_owned())
    })
}

/// Stanzas of `URIs:` and `Suites:` fields.
fn uri_of_stanzas(text: &str, suite: &str) -> Option<String> {
    text.split("\n\n").find_map(|stanza| {
        let field = |name: &str| stanza.lines().find_map(|line| line.strip_prefix(name));
        let suites = field("Suites:")?;
        suites
            .split_whitespace()
            .any(|s| s == suite)
            .then(|| field("URIs:")?.split_whitespace().next().map(str::to_owned))?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_archive_in_both_formats() {
        let lines =
            "# deb http://no.example x main\ndeb [arch=amd64] http://archive.example/debian bookworm main\n";
        assert_eq!(uri_of_lines(lines, "bookworm").as_deref(), Some("http://archive.example/debian"));
        let stanzas = "Types: deb\nURIs: http://security.example\nSuites: bookworm-security\n\n\
                       Types: deb\n# a comment\nURIs: http://archive.example/debian\nSuites: bookworm bookworm-updates\n";
        assert_eq!(uri_of_stanzas(stanzas, "bookworm").as_deref(), Some("http://archive.example/debian"));
    }

    #[test]
    fn chooses_the_toolchains_version() {
        let madison = " rust-src | 1.96.0+dfsg1-1~bpo13+1 | x\n rust-src | 1.95.0+dfsg1-2~bpo13+1 | x\n";
        assert_eq!(choose(madison, "1.95.0"), Some("1.95.0+dfsg1-2~bpo13+1"));
        assert_eq!(choose(madison, "1.95.1"), None);
    }
}
