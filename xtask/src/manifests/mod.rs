//! `cargo xtask manifests`: what is generated from the Helm chart, and whether it is what the chart says.
//!
//! The chart is the one source. From it come the base of Kustomize, for those who use no Helm, and a golden file for each
//! set of values in `deploy/helm/tests`, in which a reviewer sees what a change of the chart does. It knows no cluster.

mod tools;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::{paths, say};
use tools::Tools;

/// The namespace that everything is rendered for.
const NAMESPACE: &str = "undermesh-system";

/// The values with which the base of Kustomize is rendered: none.
const AS_IT_COMES: &str = "default";

const BASE: &str = "deploy/kustomize/base/undermesh.yaml";

/// The chart's CustomResourceDefinitions as one file: Kustomize takes nothing from outside of its folder.
const CRDS: &str = "deploy/kustomize/base/crds.yaml";

const GENERATED: &str = "\
# Generated from deploy/helm/undermesh by `cargo xtask manifests`; `cargo xtask lint` fails when it is another. Change the chart.
";

/// What Kustomize builds, and how many objects that is.
const KUSTOMIZATIONS: [(&str, usize); 3] = [
    ("deploy/kustomize", 26),
    ("deploy/kustomize/overlays/minimal", 25),
    ("deploy/kustomize/overlays/kind", 25),
];

/// Values that the chart refuses, and what of its words says why.
const REFUSED: &[(&str, &str)] = &[
    ("agent.workerz=4", "additional properties 'workerz' not allowed"),
    ("identity.mtls=off", "must be one of 'permissive', 'strict'"),
    ("agent.accessLog=on", "must be one of 'off', 'text', 'json'"),
    ("identity.external.address=http://istiod:15012", "does not match pattern"),
    ("image.digest=sha256:short", "does not match pattern"),
    ("agent.admin.host=localhost", "does not match pattern"),
    ("controller.replicas=0", "minimum: got 0, want 1"),
    ("agent.tracing.sampling=2", "maximum: got 2, want 1"),
    ("agent.tracing.endpoint=collector:4317", "does not match pattern"),
    ("agent.tracing.endpoint=https://collector:4317", "agent.tracing.caConfigMap.name is needed"),
    ("controller.enabled=false", "nobody would sign certificates"),
    ("agent.mountBpffs.enabled=true", "agent.mountBpffs.image is needed"),
    ("agent.admin.host=127.0.0.1", "where the kubelet cannot ask the agent"),
    ("priorityClass.create=true", "agent.priorityClassName names"),
];

/// The arguments of `cargo xtask manifests`.
#[derive(Args)]
pub struct Manifests {
    /// Change nothing; fail where a file is not what the chart says.
    #[arg(long)]
    check: bool,
}

impl Manifests {
    /// Writes the files, or compares them.
    pub fn run(&self) -> Result<()> {
        let tools = Tools::find()?.context(NO_HELM)?;
        match self.check {
            true => check_with(&tools),
            false => write(&tools),
        }
    }
}

const NO_HELM: &str =
    "there is no helm: `cargo xtask cluster --build-only` builds one, or install one of version 3";

/// What `cargo xtask lint` does. Without Helm it says so; under CI it builds it.
pub fn check() -> Result<()> {
    match Tools::find()? {
        Some(tools) => check_with(&tools),
        None => {
            say::step(&format!("the Helm chart: skipped, {NO_HELM}"));
            Ok(())
        }
    }
}

/// Writes what comes from the CustomResourceDefinitions alone, which takes no Helm.
pub fn write_crds() -> Result<()> {
    write_all(vec![crds()?])
}

fn write(tools: &Tools) -> Result<()> {
    write_all(generated(tools)?)
}

fn write_all(files: Vec<Generated>) -> Result<()> {
    for file in files {
        if fs::read_to_string(&file.path).ok().as_ref() != Some(&file.text) {
            fs::write(&file.path, &file.text)
                .with_context(|| format!("{} cannot be written", file.path.display()))?;
            say::step(&format!("written: {}", file.shown()));
        }
    }
    Ok(())
}

fn check_with(tools: &Tools) -> Result<()> {
    for values in value_sets()? {
        tools.helm_lint(&chart(), &values)?;
    }
    for file in generated(tools)? {
        let is = fs::read_to_string(&file.path).unwrap_or_default();
        if let Some(difference) = first_difference(&is, &file.text) {
            bail!(
                "{} is not what the chart says: {difference}\nlook at the change and run `cargo xtask manifests`",
                file.shown()
            );
        }
    }
    for (setting, why) in REFUSED {
        match tools.helm_template_set(&chart(), NAMESPACE, setting) {
            Ok(_) => bail!("the chart takes {setting}, and should not"),
            Err(error) => {
                let told = format!("{error:#}");
                ensure!(
                    told.contains(why),
                    "the chart refuses {setting} for another reason than {why}: {told}"
                );
            }
        }
    }
    for (folder, objects) in KUSTOMIZATIONS {
        let Some(built) = tools.kustomize(&paths::workspace().join(folder))? else {
            say::step("Kustomize: skipped, there is no kubectl");
            break;
        };
        let found = built.lines().filter(|line| line.starts_with("kind: ")).count();
        ensure!(found == objects, "{folder} makes {found} objects, not {objects}");
    }
    Ok(())
}

struct Generated {
    path: PathBuf,
    text: String,
}

impl Generated {
    fn shown(&self) -> String {
        self.path.strip_prefix(paths::workspace()).unwrap_or(&self.path).display().to_string()
    }
}

/// Every file that the chart is rendered into.
fn generated(tools: &Tools) -> Result<Vec<Generated>> {
    let mut files = vec![crds()?];
    for values in value_sets()? {
        let text = tools.helm_template(&chart(), NAMESPACE, &values)?;
        if set_name(&values) == AS_IT_COMES {
            files.push(Generated { path: paths::workspace().join(BASE), text: format!("{GENERATED}{text}") });
        }
        files.push(Generated {
            path: values.with_file_name(format!("{}.golden.yaml", set_name(&values))),
            text,
        });
    }
    Ok(files)
}

/// Helm installs them, but renders them with nothing.
fn crds() -> Result<Generated> {
    let folder = chart().join("crds");
    let entries = fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    let mut text = String::new();
    for path in paths {
        let crd = fs::read_to_string(&path).with_context(|| format!("no {}", path.display()))?;
        text += &format!("---\n{crd}");
    }
    Ok(Generated { path: paths::workspace().join(CRDS), text: format!("{GENERATED}{text}") })
}

fn value_sets() -> Result<Vec<PathBuf>> {
    let folder = paths::workspace().join("deploy/helm/tests");
    let entries = fs::read_dir(&folder).with_context(|| format!("no {}", folder.display()))?;
    let mut sets = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    sets.retain(|path| path.to_string_lossy().ends_with(".values.yaml"));
    sets.sort();
    Ok(sets)
}

fn set_name(values: &Path) -> &str {
    let name = values.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    name.trim_end_matches(".values.yaml")
}

fn chart() -> PathBuf {
    paths::workspace().join("deploy/helm/undermesh")
}

/// Where two texts part, in a sentence.
fn first_difference(is: &str, should_be: &str) -> Option<String> {
    if is == should_be {
        return None;
    }
    let (mut is, mut should_be) = (is.lines(), should_be.lines());
    for number in 1.. {
        match (is.next(), should_be.next()) {
            (Some(a), Some(b)) if a == b => {}
            (None, None) => break,
            (a, b) => {
                let shown = |line: Option<&str>| line.map_or("its end".into(), |line| format!("{line:?}"));
                return Some(format!("line {number} is {}, and should be {}", shown(a), shown(b)));
            }
        }
    }
    Some("they differ in how lines end".into())
}

#[cfg(test)]
mod tests;
