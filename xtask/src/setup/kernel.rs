//! Debian's kernels, and the busybox that starts them: unpacked into the cache, never installed on this machine.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::debian_archive::Archive;
use crate::command::{command, output};
use crate::{paths, say};

/// The kernel series that can be had, and the suite that carries each.
pub const SERIES: [(&str, &str); 3] =
    [("6.1", "bookworm"), ("6.12", "bookworm-backports"), ("7.3", "trixie-backports")];

/// The package that depends on a suite's newest kernel. The kernels for clouds are half the size of the others and have
/// all that a mesh and a VM need.
const NEWEST: &str = "linux-image-cloud-amd64";

/// The packages that one kernel is made of: newer suites have the image and the modules apart.
const PARTS: [&str; 3] = ["linux-image-", "linux-binary-", "linux-modules-"];

/// An unpacked kernel.
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    root: PathBuf,
}

impl Kernel {
    /// What a machine boots.
    pub fn image(&self) -> PathBuf {
        self.root.join("vmlinuz")
    }

    /// The modules and their tables.
    pub fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    fn at(root: PathBuf) -> Result<Self> {
        let entry = fs::read_dir(root.join("lib/modules"))?.next().context("no modules")??;
        Ok(Self { release: entry.file_name().to_string_lossy().into_owned(), root })
    }
}

/// The newest kernel of the series, from the cache if it is there: remove its folder to have a newer one.
pub fn fetch(series: &str) -> Result<Kernel> {
    let Some((_, suite)) = SERIES.iter().find(|(known, _)| *known == series) else {
        bail!("no Linux {series} here, only {}", SERIES.map(|(known, _)| known).join(", "));
    };
    let root = paths::cache()?.join(format!("linux-{series}"));
    if !root.join("vmlinuz").exists() {
        let archive = Archive::open(suite)?;
        let packages = newest(&archive)?;
        let image = packages.first().with_context(|| format!("{suite} has no {NEWEST}"))?;
        if !image.contains(&format!("-{series}.")) {
            bail!("{suite} has gone on from Linux {series} to {image}");
        }
        say::step(&format!("unpacking Debian's {image} into {}", root.display()));
        archive.unpack(&packages.iter().map(String::as_str).collect::<Vec<_>>(), &root)?;
        prepare(&root)?;
    }
    Kernel::at(root)
}

/// A busybox that needs nothing but a kernel. The package is not installed because it would put Debian's other busybox
/// out.
pub fn busybox() -> Result<PathBuf> {
    let root = paths::cache()?.join("busybox-static");
    let program = root.join("bin/busybox");
    if !program.exists() {
        say::step(&format!("unpacking Debian's busybox-static into {}", root.display()));
        Archive::open("bookworm")?.unpack(&["busybox-static"], &root)?;
    }
    Ok(program)
}

/// The packages of the suite's newest kernel, the image first.
fn newest(archive: &Archive) -> Result<Vec<String>> {
    let images = parts(&archive.ask(&["depends", NEWEST])?, &PARTS[..1]);
    let mut packages = images.clone();
    for image in &images {
        packages.extend(parts(&archive.ask(&["depends", image])?, &PARTS[1..]));
    }
    Ok(packages)
}

/// Those of the dependencies that are parts of one kernel: `linux-image-6.1.0-1-cloud-amd64`.
fn parts(depends: &str, prefixes: &[&str]) -> Vec<String> {
    let names = depends.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    let is_part = |name: &&str| {
        let version = prefixes.iter().find_map(|prefix| name.strip_prefix(prefix));
        version.is_some_and(|version| version.starts_with(|first: char| first.is_ascii_digit()))
    };
    names.filter(is_part).map(str::to_owned).collect()
}

/// Brings all suites' packages into one shape, and makes the tables that installing would make. The image comes last: it
/// tells that all is there.
fn prepare(root: &Path) -> Result<()> {
    let merged = root.join("usr/lib/modules");
    if merged.exists() {
        fs::create_dir_all(root.join("lib"))?;
        fs::rename(merged, root.join("lib/modules"))?;
    }
    let kernel = Kernel::at(root.to_owned())?;
    // The kernel can read them compressed, but busybox offers them to it as if they were not.
    let mut unpack = command("find");
    unpack.arg(kernel.modules()).args(["-name", "*.ko.xz", "-exec"]).arg(busybox()?);
    unpack.args(["unxz", "{}", "+"]);
    output(unpack, Duration::from_secs(300))?;
    let mut depmod = command(busybox()?);
    depmod.arg("depmod").arg("-a").arg("-b").arg(root).arg(&kernel.release);
    output(depmod, Duration::from_secs(120))?;
    let beside = root.join(format!("boot/vmlinuz-{}", kernel.release));
    let image = if beside.exists() { beside } else { kernel.modules().join("vmlinuz") };
    fs::rename(&image, kernel.image()).with_context(|| format!("no {}", image.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_parts_of_a_kernel() {
        let meta = "linux-image-cloud-amd64\n  Depends: linux-image-6.12.95+deb12-cloud-amd64\n";
        assert_eq!(parts(meta, &PARTS[..1]), ["linux-image-6.12.95+deb12-cloud-amd64"]);
        let image = "linux-image-7.3.4\n  PreDepends: linux-base\n |Depends: dracut\n  Depends: linux-base-7.3.4\n  \
                     Depends: linux-binary-7.3.4\n  Depends: linux-modules-7.3.4\n  Depends: linux-modules-cloud\n";
        assert_eq!(parts(image, &PARTS[1..]), ["linux-binary-7.3.4", "linux-modules-7.3.4"]);
    }
}
