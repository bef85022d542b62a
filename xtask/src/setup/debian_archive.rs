//! Debian packages of any suite, unpacked into the cache and never installed. apt works on folders of its own, so
//! that the machine's package lists stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::command::{command, output};
use crate::paths;

const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// For one call of apt or dpkg, over a slow line.
const LIMIT: Duration = Duration::from_secs(300);

/// An apt that knows one suite and touches one folder, which goes when this is dropped.
pub struct Archive {
    dir: PathBuf,
}

impl Archive {
    /// Asks the archive that the machine's own release comes from what the suite has.
    pub fn open(suite: &str) -> Result<Self> {
        let archive = Self { dir: paths::cache()?.join("apt").join(suite) };
        // What a killed run left.
        archive.clear()?;
        for folder in ["lists/partial", "cache/archives/partial"] {
            fs::create_dir_all(archive.dir.join(folder))?;
        }
        let mirror = mirror().context("no Debian archive in /etc/apt/sources.list or sources.list.d")?;
        let sources = format!("deb [signed-by={KEYRING}] {mirror} {suite} main\n");
        fs::write(archive.dir.join("sources.list"), sources)?;
        archive.run("apt-get", &["-qq", "update"])?;
        Ok(archive)
    }

    /// What `apt-cache` says.
    pub fn ask(&self, args: &[&str]) -> Result<String> {
        self.run("apt-cache", args)
    }

    /// Unpacks packages, `name` or `name=version`, into a folder, which exists once all of them are in it.
    pub fn unpack(&self, packages: &[&str], root: &Path) -> Result<()> {
        let downloads = self.dir.join("downloads");
        fs::create_dir_all(&downloads)?;
        self.run_in(&downloads, "apt-get", &[&["-qq", "download"], packages].concat())?;
        let downloaded =
            fs::read_dir(&downloads)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        ensure!(
            downloaded.len() == packages.len(),
            "apt-get download has left {downloaded:?}, for {packages:?}"
        );
        let fresh = self.dir.join("unpacked");
        fs::create_dir_all(&fresh)?;
        for package in &downloaded {
            let mut unpack = command("dpkg");
            unpack.arg("-x").arg(package).arg(&fresh);
            output(unpack, LIMIT)?;
        }
        if root.exists() {
            fs::remove_dir_all(root)?;
        }
        fs::rename(&fresh, root).with_context(|| format!("{} cannot be put in place", root.display()))?;
        Ok(fs::remove_dir_all(&downloads)?)
    }

    fn clear(&self) -> Result<()> {
        match fs::remove_dir_all(&self.dir) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
            other => Ok(other?),
        }
    }

    fn run(&self, program: &str, args: &[&str]) -> Result<String> {
        self.run_in(&self.dir, program, args)
    }

    fn run_in(&self, folder: &Path, program: &str, args: &[&str]) -> Result<String> {
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
        apt.args(args).current_dir(folder);
        output(apt, LIMIT)
    }
}

impl Drop for Archive {
    fn drop(&mut self) {
        if let Err(error) = self.clear() {
            eprintln!("{} could not be removed: {error:#}", self.dir.display());
        }
    }
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
}
