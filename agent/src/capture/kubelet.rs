//! The kubelet's cgroup: what the kubelet connects to are probes, which are to reach pods that take no plaintext.
//!
//! Which connections these are is for the kernel to say, one by one: an address of the node is also that of every pod on the
//! host's network, and of whatever the node translates. The program stays attached while no agent runs.

use std::fs;
use std::path::{Path, PathBuf};

use tracing::{info, warn};

use super::cgroup;
use super::place::FileId;
use super::programs::{Programs, VOUCH_PROBE};

/// Where the kubelet is to be found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum KubeletCgroup {
    /// There is none.
    #[default]
    None,
    /// Below this directory, in the cgroup of the process that is called `kubelet`.
    Find(PathBuf),
    /// There, as with distributions whose kubelet is part of another program.
    At(PathBuf),
}

/// Keeps the program attached: a kubelet that is started anew has a new cgroup at the same path.
#[derive(Debug)]
pub(super) struct Kubelet {
    wanted: KubeletCgroup,
    attached: Option<(PathBuf, FileId)>,
    /// What was last said against it, so that it is said once.
    lament: Option<String>,
}

impl Kubelet {
    pub(super) fn new(wanted: KubeletCgroup) -> Self {
        Self { wanted, attached: None, lament: None }
    }

    /// Looks whether all is as it should be, and mends it.
    pub(super) fn attend(&mut self, programs: &mut Programs) {
        if self.wanted == KubeletCgroup::None {
            return;
        }
        if self.attached.as_ref().is_some_and(|(path, id)| id.is_at(path)) {
            return;
        }
        self.attached = None;
        match self.attach(programs) {
            Ok((path, id)) => {
                info!(cgroup = %path.display(), "probes of the kubelet are told from other plaintext");
                self.attached = Some((path, id));
                self.lament = None;
            }
            Err(why) => {
                if self.lament.as_ref() != Some(&why) {
                    warn!(
                        "probes of the kubelet cannot be told from other plaintext, so pods that take none fail them: {why}"
                    );
                }
                self.lament = Some(why);
            }
        }
    }

    /// Where the cgroup is, once it is found.
    pub(super) fn place(&self) -> Option<&Path> {
        self.attached.as_ref().map(|(path, _)| path.as_path())
    }

    /// Whether all is as it should be, as far as was seen last.
    pub(super) fn is_attended(&self) -> bool {
        self.wanted == KubeletCgroup::None || self.attached.is_some()
    }

    fn attach(&self, programs: &mut Programs) -> Result<(PathBuf, FileId), String> {
        let path = match &self.wanted {
            KubeletCgroup::At(path) => path.clone(),
            KubeletCgroup::Find(root) => find(root)?,
            KubeletCgroup::None => return Err("there is none".into()),
        };
        if cgroup::is_root(&path) {
            return Err(
                "the kubelet is in the root cgroup, with everybody else; give it one of its own".into()
            );
        }
        let cgroup = cgroup::open(&path).map_err(|error| format!("{}: {error}", path.display()))?;
        let id = FileId::of(&cgroup).map_err(|error| error.to_string())?;
        programs.attach_to_kubelet(&cgroup).map_err(|error| format!("{VOUCH_PROBE}: {error}"))?;
        Ok((path, id))
    }
}

fn find(root: &Path) -> Result<PathBuf, String> {
    let processes = fs::read_dir("/proc").map_err(|error| error.to_string())?;
    let pids = processes.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_kubelet = |pid: &u32| {
        fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|name| name.trim_end() == "kubelet")
    };
    let pid = pids.into_iter().find(is_kubelet).ok_or(
        "there is no process that is called kubelet; where it is part of another program, name its cgroup with \
         --kubelet-cgroup",
    )?;
    cgroup::find_process(root, pid)
        .ok_or_else(|| format!("the kubelet (process {pid}) is in no cgroup of {}", root.display()))
}
