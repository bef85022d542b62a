//! `cargo xtask image`: the container image, without a daemon. What is in it is `undermesh_tests::cluster::product`'s to say.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use undermesh_tests::cluster::product::{self, Content};

use crate::build::Build;
use crate::command::{command, output};
use crate::{paths, say, setup};

/// The arguments of `cargo xtask image`.
///
/// Builds the program and writes a tar of its image that `ctr --namespace k8s.io images import`, `docker load`, `podman load` and
/// `kind load image-archive` read. The image is for this machine's processor, and has this machine's C library: the same
/// program and libraries make the same bytes.
#[derive(Args)]
pub struct ImageTask {
    /// Where the tar goes; into the target folder unless given.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
    /// The image's name and tag.
    #[arg(long, value_name = "NAME:TAG", default_value = product::IMAGE)]
    name: String,
    /// Of the program without optimisation.
    #[arg(long)]
    debug: bool,
    /// Take the program as it was built last.
    #[arg(long)]
    no_build: bool,
    /// Write the files of the image into this folder, and no tar: for whoever makes an image by other means.
    #[arg(long, value_name = "DIR", conflicts_with = "out")]
    root: Option<PathBuf>,
}

impl ImageTask {
    /// Builds, strips, packs.
    pub fn run(&self) -> Result<()> {
        if !self.no_build {
            setup::for_build()?;
            Build { release: !self.debug }.run()?;
        }
        let folder = tempfile::tempdir()?;
        let program = folder.path().join("undermesh");
        strip(&paths::programs(!self.debug).join("undermesh"), &program)?;
        if let Some(root) = &self.root {
            lay_out(&program, root)?;
            say::step(&format!("the image's files are in {}", root.display()));
            return Ok(());
        }
        let out = self.out.clone().unwrap_or_else(|| paths::target().join("undermesh.tar"));
        product::image(&self.name, &program)?.write(&out)?;
        let size = fs::metadata(&out)?.len().div_ceil(1 << 20);
        say::step(&format!("{} is in {} ({size} MiB)", self.name, out.display()));
        Ok(())
    }
}

/// Without what only a debugger reads: two thirds of it. Names of functions stay, for backtraces.
fn strip(program: &Path, into: &Path) -> Result<()> {
    let mut strip = command("strip");
    strip.arg("--strip-debug").arg("-o").arg(into).arg(program);
    output(strip, Duration::from_secs(120))
        .with_context(|| format!("{} is not built, or there is no strip (binutils)", program.display()))?;
    Ok(())
}

fn lay_out(program: &Path, root: &Path) -> Result<()> {
    for file in product::files(program)? {
        let path = root.join(file.path.strip_prefix("/").unwrap_or(&file.path));
        fs::create_dir_all(path.parent().context("a file in a folder")?)?;
        match file.content {
            Content::Executable(from) => _ = fs::copy(&from, &path)?,
            Content::Text(text) => fs::write(&path, text)?,
        }
    }
    Ok(())
}
