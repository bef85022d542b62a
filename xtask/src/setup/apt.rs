//! Debian packages, installed without starting the daemons that come with them.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::Packages;
use crate::command::{command, output, run};
use crate::say;

/// For apt, over a slow line.
const LIMIT: Duration = Duration::from_secs(1800);

/// Installs those of the packages that are missing.
pub fn ensure(groups: &[Packages]) -> Result<()> {
    let wanted: Vec<_> = groups.iter().copied().flatten().copied().collect();
    let installed = installed(&wanted)?;
    let missing: Vec<_> = wanted.into_iter().filter(|(package, _)| !installed.contains(*package)).collect();
    if missing.is_empty() {
        return Ok(());
    }
    for (package, why) in &missing {
        say::step(&format!("installing the Debian package {package}, which {why}"));
    }
    if !nix::unistd::geteuid().is_root() {
        let names: Vec<_> = missing.iter().map(|(package, _)| *package).collect();
        bail!("packages are installed by root: run this as root, or apt-get install {}", names.join(" "));
    }
    let _quiet = NoDaemons::begin()?;
    // A fresh machine knows of no packages yet; then the first try fails at once.
    if output(install(&missing), LIMIT).is_err() {
        let mut update = apt_get();
        update.args(["-qq", "update"]);
        output(update, LIMIT)?;
        output(install(&missing), LIMIT)?;
    }
    keep_from_starting_at_boot(&missing);
    Ok(())
}

fn install(missing: &[(&str, &str)]) -> Command {
    let mut install = apt_get();
    install.args(["-qq", "--yes", "--no-install-recommends", "install"]);
    install.args(missing.iter().map(|(package, _)| package));
    install
}

fn apt_get() -> Command {
    let mut apt_get = command("apt-get");
    apt_get.env("DEBIAN_FRONTEND", "noninteractive");
    apt_get
}

fn installed(wanted: &[(&str, &str)]) -> Result<BTreeSet<String>> {
    let mut query = command("dpkg-query");
    query.args(["--show", "--showformat", "${Package} ${db:Status-Status}\n"]);
    query.args(wanted.iter().map(|(package, _)| package));
    // It fails where it does not know a package, which is no failure here.
    let output = undermesh_tests::lab::run_here(query, Duration::from_secs(30))
        .context("this is for Debian and its kin: there is no dpkg-query")?;
    let lines = output.stdout.lines().filter_map(|line| line.strip_suffix(" installed"));
    Ok(lines.map(str::to_owned).collect())
}

/// The packages enable their daemons; those that only our tests run need not run by themselves.
fn keep_from_starting_at_boot(packages: &[(&str, &str)]) {
    if !Path::new("/run/systemd/system").exists() {
        return;
    }
    for (package, _) in packages {
        let unit = match *package {
            "nginx-light" => "nginx",
            "redis-server" => "redis-server",
            "postgresql" => "postgresql",
            _ => continue,
        };
        let mut disable = command("systemctl");
        disable.args(["--quiet", "disable", unit]);
        if let Err(error) = run(disable) {
            say::step(&format!("{unit} will start at boot: {error:#}"));
        }
    }
}

/// While it lives, package scripts do not start daemons: Debian's `policy-rc.d` tells them so.
struct NoDaemons;

const POLICY: &str = "/usr/sbin/policy-rc.d";
const SAVED: &str = "/usr/sbin/policy-rc.d.before-undermesh";
const OURS: &str =
    "#!/bin/sh\n# Set by Undermesh's `cargo xtask setup` while it installs packages.\nexit 101\n";

impl NoDaemons {
    fn begin() -> Result<Self> {
        // A run that was killed may have left ours in place.
        Self::restore()?;
        if Path::new(POLICY).exists() {
            fs::rename(POLICY, SAVED)?;
        }
        fs::write(POLICY, OURS)?;
        fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        Ok(Self)
    }

    fn restore() -> Result<()> {
        if fs::read_to_string(POLICY).is_ok_and(|text| text == OURS) {
            fs::remove_file(POLICY)?;
        }
        if Path::new(SAVED).exists() {
            fs::rename(SAVED, POLICY)?;
        }
        Ok(())
    }
}

impl Drop for NoDaemons {
    fn drop(&mut self) {
        if let Err(error) = Self::restore() {
            eprintln!("{POLICY} could not be restored: {error:#}");
        }
    }
}
