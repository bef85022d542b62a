//! Helm and kubectl, as far as manifests need them. It knows nothing of what is in a chart.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use undermesh_tests::require::is_installed;

use crate::cluster::programs;
use crate::command::{command, output};
use crate::setup;

/// The oldest Kubernetes that the chart is for: what it renders for that one it renders for all.
const KUBERNETES: &str = "1.30.0";

const LIMIT: Duration = Duration::from_secs(60);

/// The two programs.
pub(super) struct Tools {
    helm: PathBuf,
    kubectl: Option<PathBuf>,
    /// Keeps what Helm would leave in the home of whoever runs this.
    home: tempfile::TempDir,
}

impl Tools {
    /// Those that a test cluster is made of, if they are built, else those on the PATH. Under CI they are built.
    pub(super) fn find() -> Result<Option<Self>> {
        let home = tempfile::tempdir()?;
        let built = match std::env::var_os("CI") {
            Some(_) => {
                setup::for_cluster()?;
                Some(programs::ensure()?)
            }
            None => programs::built(),
        };
        if let Some(built) = built {
            let kubectl = Some(built.program("kubectl"));
            return Ok(Some(Self { helm: built.program("helm"), kubectl, home }));
        }
        let kubectl = is_installed("kubectl").then(|| "kubectl".into());
        Ok(is_installed("helm").then(|| Self { helm: "helm".into(), kubectl, home }))
    }

    /// Fails where Helm finds anything to say against the chart with these values.
    pub(super) fn helm_lint(&self, chart: &Path, values: &Path) -> Result<()> {
        let mut lint = self.helm(&["lint", "--strict", "--quiet", "--kube-version", KUBERNETES]);
        lint.arg(chart).arg("--values").arg(values);
        output(lint, LIMIT).with_context(|| format!("the chart with {}", values.display()))?;
        Ok(())
    }

    /// The manifests.
    pub(super) fn helm_template(&self, chart: &Path, namespace: &str, values: &Path) -> Result<String> {
        let mut template = self.template(chart, namespace);
        template.arg("--values").arg(values);
        output(template, LIMIT).with_context(|| format!("the chart with {}", values.display()))
    }

    /// The manifests with one setting, as `agent.workers=4`.
    pub(super) fn helm_template_set(&self, chart: &Path, namespace: &str, setting: &str) -> Result<String> {
        let mut template = self.template(chart, namespace);
        template.args(["--set", setting]);
        output(template, LIMIT)
    }

    /// What Kustomize makes of a folder; nothing without kubectl.
    pub(super) fn kustomize(&self, folder: &Path) -> Result<Option<String>> {
        let Some(kubectl) = &self.kubectl else { return Ok(None) };
        let mut kustomize = command(kubectl);
        kustomize.arg("kustomize").arg(folder);
        output(kustomize, LIMIT).with_context(|| format!("{}", folder.display())).map(Some)
    }

    fn template(&self, chart: &Path, namespace: &str) -> Command {
        let mut template = self.helm(&["template", "undermesh"]);
        template.arg(chart).args(["--namespace", namespace, "--kube-version", KUBERNETES]);
        template
    }

    fn helm(&self, args: &[&str]) -> Command {
        let mut helm = command(&self.helm);
        for variable in ["HELM_CACHE_HOME", "HELM_CONFIG_HOME", "HELM_DATA_HOME"] {
            helm.env(variable, self.home.path());
        }
        helm.args(args);
        helm
    }
}
