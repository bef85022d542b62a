//! The kubelet: what it connects to are probes, which are to reach pods that take no plaintext.
//!
//! Which connections these are is for the kernel to say, one by one: an address of the node is also that of whatever the node
//! translates. The kubelet is known by its cgroup. Where that is not to be found, all that is connected from the node's own network
//! namespace may pass for it, pods on the node's network included: who would rather have probes fail says so. The program stays attached
//! while no agent runs.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tracing::{info, warn};

use super::cgroup;
use super::netns::Netns;
use super::place::FileId;
use super::programs::{Programs, VOUCH_PROBE};
use crate::model::Probers;

/// What the kubelets' convention calls the cgroups of pods, with both drivers.
const PODS: &str = "kubepods";

/// How long a kubelet that was known may be away, as when it restarts, before others pass for it.
const GRACE: Duration = Duration::from_secs(15);

/// Where the kubelet is to be found.
#[derive(Clone, Debug)]
pub struct KubeletSettings {
    /// Its cgroup; that of the process that is called `kubelet`, unless given.
    pub cgroup: Option<PathBuf>,
    /// The node's cgroup2 tree.
    pub tree: PathBuf,
    /// What opens the node's own network namespace.
    pub netns: PathBuf,
    /// Who passes for it while it is not to be found.
    pub unknown: OnKubeletUnknown,
}

/// Who passes for the kubelet while its cgroup is not known (`--on-kubelet-unknown`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum OnKubeletUnknown {
    /// Whoever is on the node's own network.
    #[default]
    Node,
    /// Nobody.
    Closed,
}

/// Keeps the program attached: a kubelet that is started anew has a new cgroup at the same path.
#[derive(Debug)]
pub(super) struct Kubelet {
    settings: KubeletSettings,
    /// What the program is on.
    attached: Option<(PathBuf, FileId)>,
    /// When its own cgroup was last seen in place.
    seen: Option<Instant>,
    /// Since the first look.
    probers: Option<Probers>,
}

impl Kubelet {
    pub(super) fn new(settings: KubeletSettings) -> Self {
        Self { settings, attached: None, seen: None, probers: None }
    }

    /// Looks whether all is as it should be, and mends it.
    pub(super) fn attend(&mut self, programs: &mut Programs, now: Instant) {
        let is_known = self.probers == Some(Probers::Kubelet);
        if is_known && self.is_in_place() {
            self.seen = Some(now);
            return;
        }
        let is_missed = self.seen.is_none_or(|seen| now.saturating_duration_since(seen) >= GRACE);
        let probers = match self.attach(programs) {
            Ok(()) => {
                self.seen = Some(now);
                Probers::Kubelet
            }
            Err(_) if is_known && !is_missed => {
                self.attached = None;
                return;
            }
            Err(why) => self.fall_back(programs, why),
        };
        if self.probers.as_ref() != Some(&probers) {
            match probers.trouble() {
                Some(trouble) => warn!("{trouble}"),
                None => info!(cgroup = ?self.place(), "probes of the kubelet are told from other plaintext"),
            }
        }
        self.probers = Some(probers);
    }

    /// Where the cgroup is, once it is found.
    pub(super) fn place(&self) -> Option<&Path> {
        self.attached.as_ref().map(|(path, _)| path.as_path())
    }

    /// Whose connections pass for the kubelet's; none before the first look.
    pub(super) fn probers(&self) -> Option<&Probers> {
        self.probers.as_ref()
    }

    /// Whether all is as it is to be, as far as was seen last, or may well stay as it is.
    pub(super) fn is_attended(&self) -> bool {
        self.attached.is_some()
    }

    fn is_in_place(&self) -> bool {
        self.attached.as_ref().is_some_and(|(path, id)| id.is_at(path))
    }

    fn attach(&mut self, programs: &mut Programs) -> Result<(), String> {
        let path = match &self.settings.cgroup {
            Some(path) => path.clone(),
            None => find(&self.settings.tree)?,
        };
        if cgroup::is_root(&path) {
            return Err(
                "the kubelet is in the root cgroup, with everybody else; give it one of its own".into()
            );
        }
        self.attached = Some(attach_at(path, |cgroup| programs.attach_to_kubelet(cgroup, 0))?);
        Ok(())
    }

    fn fall_back(&mut self, programs: &mut Programs, why: String) -> Probers {
        if self.settings.unknown == OnKubeletUnknown::Closed {
            return self.shut(programs, why);
        }
        if matches!(self.probers, Some(Probers::Node(_))) && self.is_in_place() {
            return Probers::Node(why);
        }
        match self.attach_to_node(programs) {
            Ok(()) => Probers::Node(why),
            Err(error) => {
                self.shut(programs, format!("{why}; and neither is the node's own network: {error}"))
            }
        }
    }

    fn attach_to_node(&mut self, programs: &mut Programs) -> Result<(), String> {
        let KubeletSettings { tree, netns, .. } = &self.settings;
        let netns = Netns::open(netns).map_err(|error| format!("{}: {error}", netns.display()))?;
        let attach = |cgroup: &fs::File| programs.attach_to_kubelet(cgroup, netns.cookie());
        self.attached = Some(attach_at(tree.clone(), attach)?);
        Ok(())
    }

    fn shut(&mut self, programs: &mut Programs, why: String) -> Probers {
        self.attached = None;
        match programs.detach_from_kubelet() {
            Ok(()) => Probers::Nobody(why),
            // Of an earlier agent, say: it lets in whom that one let in.
            Err(error) => Probers::Nobody(format!("{why}; what was attached before stays: {error}")),
        }
    }
}

fn attach_at(
    path: PathBuf,
    attach: impl FnOnce(&fs::File) -> Result<(), super::CaptureError>,
) -> Result<(PathBuf, FileId), String> {
    let cgroup = cgroup::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
    let id = FileId::of(&cgroup).map_err(|error| error.to_string())?;
    attach(&cgroup).map_err(|error| format!("{VOUCH_PROBE}: {error}"))?;
    Ok((path, id))
}

/// The cgroup of the process that is called `kubelet`. Whoever runs in a pod may call himself so, but is in a pod's cgroup.
fn find(tree: &Path) -> Result<PathBuf, String> {
    let processes = fs::read_dir("/proc").map_err(|error| error.to_string())?;
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_kubelet = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "kubelet")
    };
    let mut why = "there is no process that is called kubelet; where it is part of another program, name its cgroup with \
                   --kubelet-cgroup"
        .to_owned();
    for pid in pids.filter(is_kubelet) {
        match cgroup::find_process(tree, pid) {
            Some(path) if is_of_pods(tree, &path) => {}
            Some(path) => return Ok(path),
            None => why = format!("the kubelet (process {pid}) is in no cgroup of {}", tree.display()),
        }
    }
    Err(why)
}

fn is_of_pods(tree: &Path, cgroup: &Path) -> bool {
    let below = cgroup.strip_prefix(tree).unwrap_or(cgroup);
    below.components().any(|part| part.as_os_str().to_string_lossy().contains(PODS))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_that_calls_itself_the_kubelet_is_in_a_pods_cgroup() {
        let tree = Path::new("/host/kubepods/sys/fs/cgroup");
        for (below, expected) in [
            ("system.slice/kubelet.service", false),
            ("kubelet.slice/kubelet.service", false),
            ("", false),
            ("kubepods/besteffort/pod1/2", true),
            (
                "kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod1.slice/cri-containerd-2.scope",
                true,
            ),
            ("kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod1.slice", true),
        ] {
            assert_eq!(is_of_pods(tree, &tree.join(below)), expected, "{below}");
        }
    }
}
