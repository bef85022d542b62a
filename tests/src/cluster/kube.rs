//! A cluster as its users see it: what kubectl and helm can do with a kubeconfig. It does not know what the cluster is made of.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::tools::Tools;
use crate::lab::{Output, run_here};

/// For a command of kubectl, which itself waits for much.
const KUBECTL: Duration = Duration::from_secs(120);

/// A cluster, by its kubeconfig.
#[derive(Debug)]
pub struct Kube {
    kubeconfig: PathBuf,
    kubectl: PathBuf,
    helm: PathBuf,
    /// For what they keep: nothing is to be left in the home of whoever runs this.
    home: PathBuf,
}

impl Kube {
    /// One that is made here, by the programs that it is made of.
    pub(super) fn made_of(tools: &Tools, kubeconfig: PathBuf, home: PathBuf) -> Self {
        Self { kubeconfig, kubectl: tools.program("kubectl"), helm: tools.program("helm"), home }
    }

    /// One that is there already, by kubectl and helm of the PATH. Fails if it does not answer.
    pub fn existing(kubeconfig: &Path, home: &Path) -> Result<Self> {
        let kubeconfig =
            kubeconfig.canonicalize().with_context(|| format!("no kubeconfig {}", kubeconfig.display()))?;
        let kube = Self { kubeconfig, kubectl: "kubectl".into(), helm: "helm".into(), home: home.to_owned() };
        kube.kubectl(&["get", "--raw=/readyz"]).context("the cluster does not answer")?;
        Ok(kube)
    }

    /// The kubeconfig.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A command with the kubeconfig.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new(program.as_ref());
        command.env("KUBECONFIG", &self.kubeconfig);
        command.env("KUBECACHEDIR", self.home.join("kubectl"));
        for (variable, folder) in
            [("HELM_CACHE_HOME", "cache"), ("HELM_CONFIG_HOME", "config"), ("HELM_DATA_HOME", "data")]
        {
            command.env(variable, self.home.join("helm").join(folder));
        }
        command
    }

    /// Runs kubectl and returns what it printed.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.try_kubectl(args)?.success()
    }

    /// Runs kubectl to whichever end.
    pub fn try_kubectl(&self, args: &[&str]) -> Result<Output> {
        let mut kubectl = self.command(&self.kubectl);
        kubectl.args(args);
        run_here(kubectl, KUBECTL)
    }

    /// `helm`, with the kubeconfig.
    pub fn helm(&self) -> Command {
        self.command(&self.helm)
    }

    /// Applies manifests (YAML or JSON) on the server's side.
    pub fn apply(&self, manifests: &str) -> Result<String> {
        self.try_apply(manifests)?.success()
    }

    /// The same to whichever end.
    pub fn try_apply(&self, manifests: &str) -> Result<Output> {
        let mut file = tempfile::NamedTempFile::new()?;
        file.write_all(manifests.as_bytes())?;
        let file = file.path().to_str().context("a temporary file with a strange name")?;
        self.try_kubectl(&["apply", "--server-side", "--filename", file])
    }

    /// What `kubectl get -o json` says.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        Ok(serde_json::from_str(&self.kubectl(&[&["get", "--output=json"], args].concat())?)?)
    }

    /// The names of the nodes that take pods, in their order.
    pub fn node_names(&self) -> Result<Vec<String>> {
        let nodes = self.get(&["nodes"])?;
        let takes_pods = |node: &&Value| {
            let mut taints = node["spec"]["taints"].as_array().into_iter().flatten();
            node["spec"]["unschedulable"] != true
                && !taints.any(|taint| taint["key"] == "node-role.kubernetes.io/control-plane")
        };
        let names = nodes["items"].as_array().into_iter().flatten().filter(takes_pods);
        let mut names: Vec<_> =
            names.filter_map(|node| node["metadata"]["name"].as_str()).map(str::to_owned).collect();
        names.sort_unstable();
        ensure!(!names.is_empty(), "the cluster has no node that takes pods");
        Ok(names)
    }
}
