//! Builds what a cluster is made of from Go modules, once: the folders of `tests/cluster` name the versions, and the
//! result lies in the cache under a name that changes with them. It knows no version itself.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};
use undermesh_tests::cluster::Tools;
use undermesh_tests::cluster::image::sha256;
use undermesh_tests::require::is_installed;

use crate::command::{command, output, run};
use crate::{paths, say};

/// A Go module of ours, in a folder of `tests/cluster`. Each of its neighbours wants its own versions of what they
/// share, so they are modules of their own.
struct Module {
    folder: &'static str,
    /// Programs, and the packages that they are built from.
    programs: &'static [(&'static str, &'static str)],
    /// The required module whose version the programs are to tell, and the variables that hold it.
    told: Option<(&'static str, &'static [&'static str])>,
    /// Files of its own of a required module: a file of this name here, of all manifests in this folder there.
    manifests: Option<(&'static str, &'static str, &'static str)>,
    /// Build tags, and whether a C compiler is needed.
    tags: &'static str,
    cgo: bool,
}

const MODULES: [Module; 10] = [
    Module {
        folder: "node",
        programs: &[
            ("pause", "undermesh/tests/cluster/node/pause"),
            ("runc-partial", "undermesh/tests/cluster/node/runc-partial"),
        ],
        told: None,
        manifests: None,
        tags: "",
        cgo: false,
    },
    Module {
        folder: "cni",
        programs: &[
            ("bridge", "github.com/containernetworking/plugins/plugins/main/bridge"),
            ("host-local", "github.com/containernetworking/plugins/plugins/ipam/host-local"),
            ("loopback", "github.com/containernetworking/plugins/plugins/main/loopback"),
            ("portmap", "github.com/containernetworking/plugins/plugins/meta/portmap"),
        ],
        told: None,
        manifests: None,
        tags: "",
        cgo: false,
    },
    Module {
        folder: "runc",
        programs: &[("runc", "github.com/opencontainers/runc")],
        told: Some(("github.com/opencontainers/runc", &["main.version"])),
        manifests: None,
        // The pods' profiles are made by libseccomp.
        tags: "seccomp",
        // It enters namespaces in C, before Go starts its threads.
        cgo: true,
    },
    Module {
        folder: "containerd",
        programs: &[
            ("containerd", "github.com/containerd/containerd/v2/cmd/containerd"),
            ("containerd-shim-runc-v2", "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2"),
            ("ctr", "github.com/containerd/containerd/v2/cmd/ctr"),
        ],
        told: Some((
            "github.com/containerd/containerd/v2",
            &["github.com/containerd/containerd/v2/version.Version"],
        )),
        manifests: None,
        tags: "",
        cgo: false,
    },
    Module {
        folder: "etcd",
        programs: &[("etcd", "go.etcd.io/etcd/server/v3")],
        told: None,
        manifests: None,
        tags: "",
        cgo: false,
    },
    Module {
        folder: "kubernetes",
        programs: &[
            ("kubectl", "k8s.io/kubernetes/cmd/kubectl"),
            ("kube-apiserver", "k8s.io/kubernetes/cmd/kube-apiserver"),
            ("kube-controller-manager", "k8s.io/kubernetes/cmd/kube-controller-manager"),
            ("kube-scheduler", "k8s.io/kubernetes/cmd/kube-scheduler"),
            ("kubelet", "k8s.io/kubernetes/cmd/kubelet"),
            ("kube-proxy", "k8s.io/kubernetes/cmd/kube-proxy"),
        ],
        told: Some(("k8s.io/kubernetes", &["k8s.io/component-base/version.gitVersion"])),
        manifests: None,
        tags: "",
        cgo: false,
    },
    Module {
        folder: "coredns",
        programs: &[("coredns", "github.com/coredns/coredns")],
        told: None,
        manifests: None,
        tags: "",
        cgo: false,
    },
    Module {
        folder: "helm",
        programs: &[("helm", "helm.sh/helm/v3/cmd/helm")],
        told: Some(("helm.sh/helm/v3", &["helm.sh/helm/v3/internal/version.version"])),
        manifests: None,
        tags: "",
        cgo: false,
    },
    // The Gateway API's own tests of meshes, and its CRDs, which are to be of the same version.
    Module {
        folder: "conformance",
        programs: &[("conformance", "undermesh/tests/cluster/conformance/suite")],
        told: None,
        manifests: Some(("gateway-api.yaml", "sigs.k8s.io/gateway-api", "config/crd/standard")),
        tags: "",
        cgo: false,
    },
    // What those tests run in pods.
    Module {
        folder: "echo",
        programs: &[
            ("echo-client", "istio.io/istio/pkg/test/echo/cmd/client"),
            ("echo-server", "istio.io/istio/pkg/test/echo/cmd/server"),
        ],
        told: None,
        manifests: None,
        tags: "",
        cgo: false,
    },
];

/// Two packages at a time: the largest take two gigabytes each to compile and link.
const BUILD: [&str; 5] = ["build", "-p", "2", "-trimpath", "-buildvcs=false"];

/// The programs, built if they are not.
pub fn ensure() -> Result<Tools> {
    if !is_installed("go") {
        bail!(
            "a cluster's programs are built from Go modules, and there is no `go`: install Go 1.26 or newer"
        );
    }
    let wanted = folder()?;
    if let Ok(tools) = Tools::in_folder(&wanted) {
        return Ok(tools);
    }
    let _alone = only_builder()?;
    // Whoever built before us may have built these.
    if let Ok(tools) = Tools::in_folder(&wanted) {
        return Ok(tools);
    }
    say::step("building the programs of a cluster (half an hour on one core, once)");
    // Beside it, and renamed when all are there. What an interrupted run has built is taken up again.
    let partial = wanted.with_extension("partial");
    fs::create_dir_all(&partial).with_context(|| format!("{} cannot be made", partial.display()))?;
    for module in &MODULES {
        module.build(&partial)?;
    }
    fs::rename(&partial, &wanted).with_context(|| format!("{} cannot be named so", wanted.display()))?;
    Tools::in_folder(&wanted)
}

/// The programs, if they are built.
pub fn built() -> Option<Tools> {
    is_installed("go").then(|| Tools::in_folder(&folder().ok()?).ok()).flatten()
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
            let mut build = go(self.folder);
            build.env("CGO_ENABLED", if self.cgo { "1" } else { "0" });
            build.args(BUILD).args(["-tags", self.tags, "-ldflags", &flags, "-o"]);
            let new = built.with_extension("new");
            build.arg(&new).arg(package);
            run(build)?;
            fs::rename(new, built)?;
        }
        self.copy_manifests(into)
    }

    fn copy_manifests(&self, into: &Path) -> Result<()> {
        let Some((name, module, folder)) = self.manifests else { return Ok(()) };
        let mut list = go(self.folder);
        list.args(["list", "-m", "-f", "{{.Dir}}", module]);
        let of_module = PathBuf::from(output(list, Duration::from_secs(120))?.trim());
        let mut files = sources(&of_module.join(folder))?;
        files.retain(|file| file.extension().is_some_and(|extension| extension == "yaml"));
        files.sort();
        let mut all = String::new();
        for file in files {
            // One that customizes others is none itself.
            if !file.ends_with("kustomization.yaml") {
                all += &format!("---\n{}\n", fs::read_to_string(&file)?);
            }
        }
        let new = into.join(name).with_extension("new");
        fs::write(&new, all)?;
        fs::rename(new, into.join(name))?;
        Ok(())
    }

    /// Without what only a debugger reads, and with the version, which a build of one's own would not tell.
    fn linker_flags(&self) -> Result<String> {
        let mut flags = "-s -w".to_owned();
        let Some((module, variables)) = self.told else { return Ok(flags) };
        let go_mod = fs::read_to_string(source().join(self.folder).join("go.mod"))?;
        let version = required(&go_mod, module)
            .with_context(|| format!("tests/cluster/{}/go.mod does not require {module}", self.folder))?;
        for variable in variables {
            flags += &format!(" -X {variable}={version}");
        }
        // Charts ask the API server for these two.
        if self.folder == "kubernetes" {
            let mut numbers = version.trim_start_matches('v').split('.');
            for part in ["gitMajor", "gitMinor"] {
                let number = numbers.next().unwrap_or_default();
                flags += &format!(" -X k8s.io/component-base/version.{part}={number}");
            }
        }
        Ok(flags)
    }
}

/// Two checkouts share the cache: the second builder waits for the first.
fn only_builder() -> Result<Flock<fs::File>> {
    let cache = paths::cache()?;
    fs::create_dir_all(&cache).with_context(|| format!("{} cannot be made", cache.display()))?;
    let file = fs::File::create(cache.join("cluster.lock"))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("the cache cannot be locked")
}

/// The folder in the cache, by everything that goes into the programs.
fn folder() -> Result<PathBuf> {
    let mut version = go("node");
    version.arg("version");
    let mut everything = output(version, Duration::from_secs(30))?.into_bytes();
    everything.extend(BUILD.concat().into_bytes());
    for module in &MODULES {
        for (program, package) in module.programs {
            everything.extend(
                format!("{program} {package} {} {}", module.tags, module.linker_flags()?).into_bytes(),
            );
        }
        everything.extend(format!("{:?}", module.manifests).into_bytes());
        let mut files = sources(&source().join(module.folder))?;
        files.sort();
        for file in files {
            everything.extend(file.file_name().unwrap_or_default().as_encoded_bytes());
            everything.extend(fs::read(&file)?);
        }
    }
    Ok(paths::cache()?.join(format!("cluster-{}", &sha256(&everything)[..16])))
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

fn source() -> PathBuf {
    paths::workspace().join("tests/cluster")
}

/// Go in one of the modules, without what the caller's environment says of flags, workspaces and other toolchains.
fn go(folder: &str) -> Command {
    let mut go = command("go");
    go.current_dir(source().join(folder));
    go.env("GOFLAGS", "").env("GOWORK", "off").env("GOTOOLCHAIN", "local");
    go
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
