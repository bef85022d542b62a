//! Builds programs from Go modules of ours, once: their folders name the versions, and the result lies in the cache under a name that
//! changes with them. It knows no version itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use undermesh_tests::cluster::image::sha256;
use undermesh_tests::require::is_installed;

use crate::command::{command, output, run};
use crate::{paths, say};

/// Modules whose programs are built and kept together.
pub struct Modules {
    /// Begins the name of the folder in the cache.
    pub name: &'static str,
    /// What is said before they are built.
    pub notice: &'static str,
    pub modules: &'static [Module],
}

/// A Go module of ours. Each of its neighbours wants its own versions of what they share, so they are modules of their own.
pub struct Module {
    /// In the workspace.
    pub folder: &'static str,
    /// Programs, and the packages that they are built from.
    pub programs: &'static [(&'static str, &'static str)],
    /// The required module whose version the programs are to tell, and the variables that hold it.
    pub told: Option<(&'static str, &'static [&'static str])>,
    /// Files of its own of required modules: a file of this name here, of all manifests of that module in this folder there.
    pub manifests: &'static [(&'static str, &'static str, &'static str)],
    /// Build tags, and whether a C compiler is needed.
    pub tags: &'static str,
    pub cgo: bool,
}

/// Two packages at a time: the largest take two gigabytes each to compile and link.
const BUILD: [&str; 5] = ["build", "-p", "2", "-trimpath", "-buildvcs=false"];

impl Modules {
    /// The folder of the programs, which are built if they are not.
    pub fn ensure(&self) -> Result<PathBuf> {
        if !is_installed("go") {
            bail!("they are built from Go modules, and there is no `go`: install Go 1.26 or newer");
        }
        let wanted = self.folder()?;
        if self.are_all_in(&wanted) {
            return Ok(wanted);
        }
        let _alone = self.only_builder()?;
        // Whoever built before us may have built these.
        if self.are_all_in(&wanted) {
            return Ok(wanted);
        }
        say::step(self.notice);
        // Beside it, and renamed when all are there. What an interrupted run has built is taken up again.
        let partial = wanted.with_extension("partial");
        fs::create_dir_all(&partial).with_context(|| format!("{} cannot be made", partial.display()))?;
        for module in self.modules {
            module.build(&partial)?;
        }
        fs::rename(&partial, &wanted).with_context(|| format!("{} cannot be named so", wanted.display()))?;
        Ok(wanted)
    }

    /// The folder of the programs, if they are built.
    pub fn built(&self) -> Option<PathBuf> {
        let folder = is_installed("go").then(|| self.folder().ok()).flatten()?;
        self.are_all_in(&folder).then_some(folder)
    }

    fn are_all_in(&self, folder: &Path) -> bool {
        self.makes().all(|name| folder.join(name).is_file())
    }

    /// The names of the files that they make.
    pub fn makes(&self) -> impl Iterator<Item = &'static str> {
        self.modules.iter().flat_map(Module::makes)
    }

    /// Two checkouts share the cache: the second builder waits for the first.
    fn only_builder(&self) -> Result<Flock<fs::File>> {
        let cache = paths::cache()?;
        fs::create_dir_all(&cache).with_context(|| format!("{} cannot be made", cache.display()))?;
        let file = fs::File::create(cache.join(format!("{}.lock", self.name)))?;
        Flock::lock(file, FlockArg::LockExclusive)
            .map_err(|(_, error)| error)
            .context("the cache cannot be locked")
    }

    /// The folder in the cache, by everything that goes into the programs.
    fn folder(&self) -> Result<PathBuf> {
        let first = self.modules.first().context("no module")?;
        let mut version = first.go();
        version.arg("version");
        let mut everything = output(version, Duration::from_secs(30))?.into_bytes();
        everything.extend(BUILD.concat().into_bytes());
        for module in self.modules {
            for (program, package) in module.programs {
                everything.extend(
                    format!("{program} {package} {} {}", module.tags, module.linker_flags()?).into_bytes(),
                );
            }
            everything.extend(format!("{:?}", module.manifests).into_bytes());
            let mut files = sources(&module.path())?;
            files.sort();
            for file in files {
                everything.extend(file.file_name().unwrap_or_default().as_encoded_bytes());
                everything.extend(fs::read(&file)?);
            }
        }
        Ok(paths::cache()?.join(format!("{}-{}", self.name, &sha256(&everything)[..16])))
    }
}

impl Module {
    fn build(&self, into: &Path) -> Result<()> {
        let flags = self.linker_flags()?;
        for (program, package) in self.programs {
            let built = into.join(program);
            if built.exists() {
                continue;
            }
            say::step(&format!("building {program}"));
            let mut build = self.go();
            build.env("CGO_ENABLED", if self.cgo { "1" } else { "0" });
            build.args(BUILD).args(["-tags", self.tags, "-ldflags", &flags, "-o"]);
            let new = built.with_extension("new");
            build.arg(&new).arg(package);
            run(build)?;
            fs::rename(new, built)?;
        }
        for (name, module, folder) in self.manifests {
            self.copy_manifests(module, folder, &into.join(name))?;
        }
        Ok(())
    }

    fn copy_manifests(&self, module: &str, folder: &str, into: &Path) -> Result<()> {
        let mut files = sources(&self.folder_of(module, folder)?)?;
        files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
        files.sort();
        let mut all = String::new();
        for file in files {
            // One that customizes others is none itself.
            if !file.ends_with("kustomization.yaml") {
                all += &format!("---\n{}\n", fs::read_to_string(&file)?);
            }
        }
        let new = into.with_extension("new");
        fs::write(&new, all)?;
        fs::rename(new, into)?;
        Ok(())
    }

    /// Where a folder of a required module is.
    pub fn folder_of(&self, module: &str, folder: &str) -> Result<PathBuf> {
        let mut list = self.go();
        list.args(["list", "-m", "-f", "{{.Dir}}", module]);
        Ok(Path::new(output(list, Duration::from_secs(120))?.trim()).join(folder))
    }

    /// Without what only a debugger reads, and with the version, which a build of one's own would not tell.
    fn linker_flags(&self) -> Result<String> {
        let mut flags = "-s -w".to_owned();
        let Some((module, variables)) = self.told else { return Ok(flags) };
        let go_mod = fs::read_to_string(self.path().join("go.mod"))?;
        let version = required(&go_mod, module)
            .with_context(|| format!("{}/go.mod does not require {module}", self.folder))?;
        for variable in variables {
            flags += &format!(" -X {variable}={version}");
        }
        // Charts ask the API server for these two.
        if module == "k8s.io/kubernetes" {
            let mut numbers = version.trim_start_matches('v').split('.');
            for part in ["gitMajor", "gitMinor"] {
                let number = numbers.next().unwrap_or_default();
                flags += &format!(" -X k8s.io/component-base/version.{part}={number}");
            }
        }
        Ok(flags)
    }

    /// The names of the files that it makes.
    fn makes(&self) -> impl Iterator<Item = &'static str> {
        let programs = self.programs.iter().map(|(program, _)| *program);
        programs.chain(self.manifests.iter().map(|(name, ..)| *name))
    }

    fn path(&self) -> PathBuf {
        paths::workspace().join(self.folder)
    }

    /// Go in its folder, without what the caller's environment says of flags, workspaces and other toolchains.
    fn go(&self) -> Command {
        let mut go = command("go");
        go.current_dir(self.path());
        go.env("GOFLAGS", "").env("GOWORK", "off").env("GOTOOLCHAIN", "local");
        go
    }
}

fn sources(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))? {
        let path = entry?.path();
        match path.is_dir() {
            true => found.extend(sources(&path)?),
            false => found.push(path),
        }
    }
    Ok(found)
}

/// The version at which a go.mod requires a module.
fn required<'a>(go_mod: &'a str, module: &str) -> Option<&'a str> {
    go_mod.lines().find_map(|line| {
        let mut words = line.trim().trim_start_matches("require ").split_whitespace();
        (words.next()? == module).then(|| words.next()).flatten().filter(|word| word.starts_with('v'))
    })
}

#[cfg(test)]
mod tests {
    use super::required;

    #[test]
    fn reads_versions_off_a_go_mod() {
        let text = "tool a.b/c/cmd\n\nrequire a.b/x v0.1.0\nrequire (\n\ta.b/c v1.2.3 // indirect\n)\nreplace a.b/d => a.b/d v9.0.0\n";
        assert_eq!(required(text, "a.b/c"), Some("v1.2.3"));
        assert_eq!(required(text, "a.b/x"), Some("v0.1.0"));
        assert_eq!(required(text, "a.b/d"), None);
    }
}
