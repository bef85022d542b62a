//! Whether this machine can carry the agent, found out before anything is touched: one sentence that names what is
//! missing and what to do.

use std::fs;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{FsType, statfs};

use super::{CaptureError, cgroup};

/// The oldest kernel: `sock_ops` programs can ask for the network namespace's cookie since 5.15.
const OLDEST_KERNEL: (u32, u32) = (5, 15);
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_BPF: u32 = 39;

/// What the machine offers.
#[derive(Clone, Debug)]
pub struct Preflight {
    /// `uname -r`.
    pub kernel: String,
    /// `CapEff` of the process.
    pub capabilities: u64,
    /// The file system at the pin folder's nearest existing ancestor is a bpffs.
    pub bpffs_mounted: bool,
    /// A cgroup2 tree is mounted.
    pub cgroup2_mounted: bool,
}

impl Preflight {
    /// Looks at the machine and judges it.
    pub fn check(bpffs: &Path) -> Result<(), CaptureError> {
        Self::look(bpffs).judge(bpffs).map_err(CaptureError::Preflight)
    }

    fn look(bpffs: &Path) -> Self {
        let kernel = nix::sys::utsname::uname()
            .map(|uname| uname.release().to_string_lossy().into_owned())
            .unwrap_or_default();
        Self {
            kernel,
            capabilities: effective_capabilities(),
            bpffs_mounted: statfs(&nearest_existing(bpffs))
                .is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC),
            cgroup2_mounted: cgroup::mount_point().is_ok(),
        }
    }

    fn judge(&self, bpffs: &Path) -> Result<(), String> {
        if version(&self.kernel).is_some_and(|v| v < OLDEST_KERNEL) {
            let (major, minor) = OLDEST_KERNEL;
            return Err(format!(
                "Linux {} is too old: Undermesh needs {major}.{minor} or newer; boot a newer kernel",
                self.kernel
            ));
        }
        for (capability, name, why) in [
            (CAP_BPF, "CAP_BPF", "load eBPF programs"),
            (CAP_NET_ADMIN, "CAP_NET_ADMIN", "attach them and add a route in the pods"),
            (CAP_SYS_ADMIN, "CAP_SYS_ADMIN", "enter the pods' network namespaces"),
        ] {
            // CAP_SYS_ADMIN includes CAP_BPF (capabilities(7)).
            let has = self.has(capability) || capability == CAP_BPF && self.has(CAP_SYS_ADMIN);
            if !has {
                return Err(format!(
                    "{name} is missing: the agent needs it to {why}; run it as root or grant it"
                ));
            }
        }
        if !self.bpffs_mounted {
            return Err(format!(
                "{} is not on a bpffs, where the programs and maps are pinned; mount one: mount -t bpf bpf /sys/fs/bpf",
                bpffs.display()
            ));
        }
        if !self.cgroup2_mounted {
            return Err("no cgroup2 is mounted, to which the programs are attached; mount it: \
                        mount -t cgroup2 cgroup2 /sys/fs/cgroup"
                .into());
        }
        Ok(())
    }

    fn has(&self, capability: u32) -> bool {
        self.capabilities >> capability & 1 == 1
    }
}

fn effective_capabilities() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or_default()
}

fn nearest_existing(path: &Path) -> PathBuf {
    path.ancestors().find(|p| p.exists()).unwrap_or(Path::new("/")).to_owned()
}

/// `6.1.0-18-amd64` is (6, 1). A release that cannot be read is not held against the kernel.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(machine: Preflight, expected: Expect) {
        let verdict = machine.judge(Path::new("/sys/fs/bpf/undermesh"));
        expected.assert_eq(verdict.err().as_deref().unwrap_or("fit"));
    }

    fn fit() -> Preflight {
        Preflight {
            kernel: "6.18.44".into(),
            capabilities: 1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN,
            bpffs_mounted: true,
            cgroup2_mounted: true,
        }
    }

    #[test]
    fn each_lack_is_named_with_its_remedy() {
        check(fit(), expect!["fit"]);
        check(Preflight { kernel: "6.1.0-18-amd64".into(), ..fit() }, expect!["fit"]);
        check(Preflight { kernel: "weird".into(), ..fit() }, expect!["fit"]);
        check(
            Preflight { kernel: "5.10.0-28-amd64".into(), ..fit() },
            expect!["Linux 5.10.0-28-amd64 is too old: Undermesh needs 5.15 or newer; boot a newer kernel"],
        );
        check(
            Preflight { capabilities: 0, ..fit() },
            expect![
                "CAP_BPF is missing: the agent needs it to load eBPF programs; run it as root or grant it"
            ],
        );
        check(
            Preflight { capabilities: 1 << CAP_BPF | 1 << CAP_NET_ADMIN, ..fit() },
            expect![
                "CAP_SYS_ADMIN is missing: the agent needs it to enter the pods' network namespaces; run it as root or grant it"
            ],
        );
        check(
            Preflight { bpffs_mounted: false, ..fit() },
            expect![
                "/sys/fs/bpf/undermesh is not on a bpffs, where the programs and maps are pinned; mount one: mount -t bpf bpf /sys/fs/bpf"
            ],
        );
        check(
            Preflight { cgroup2_mounted: false, ..fit() },
            expect![
                "no cgroup2 is mounted, to which the programs are attached; mount it: mount -t cgroup2 cgroup2 /sys/fs/cgroup"
            ],
        );
    }
}
