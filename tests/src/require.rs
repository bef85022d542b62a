//! What a test needs of the machine. A test that cannot run here says why; under CI that is a failure.

use std::path::Path;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use crate::{cluster, lab};

/// Something that not every machine has.
#[derive(Clone, Copy, Debug)]
pub enum Feature {
    /// Root, iproute2 and cgroup2, and the wish to run tests that change the machine (`UNDERMESH_E2E=1`).
    Lab,
    /// The programs of a Kubernetes cluster, beside all that a lab needs.
    Cluster,
    /// The `undermesh` binary with the kernel programs in it.
    Agent,
    /// At least this kernel.
    Kernel(u32, u32),
    /// A program on the PATH (or in /usr/sbin).
    Program(&'static str),
    /// A shared library, by its path below the library folder.
    Library(&'static str),
    /// A module of Debian's Python.
    PythonModule(&'static str),
    /// MPTCP sockets.
    Mptcp,
    /// An algorithm of TCP's congestion control.
    Congestion(&'static str),
    /// io_uring, which some machines switch off.
    IoUring,
    /// So many open files of one process. Not every machine lets root raise that limit, so this one is made sure of
    /// in the VM of `cargo xtask vm`.
    OpenFiles(u64),
}

/// The open files of the test that needs most of them.
pub const MOST_OPEN_FILES: u64 = 42_000;

impl Feature {
    /// Where the lack of it is a failure: `CI`, or `UNDERMESH_VM` for what a CI machine may be without.
    fn must_be_there(self) -> bool {
        let place = match self {
            Self::OpenFiles(_) => "UNDERMESH_VM",
            _ => "CI",
        };
        std::env::var_os(place).is_some()
    }
}

/// Returns from the test, with the reason printed, unless the machine has all that is named. The test returns a
/// `Result`.
#[macro_export]
macro_rules! require {
    ($($feature:expr),+ $(,)?) => {
        if $crate::require::is_missing(&[$($feature),+]) {
            return Ok(());
        }
    };
}

/// Prints why the running test skips, if it must; panics instead under CI, or in the VM.
pub fn is_missing(features: &[Feature]) -> bool {
    let lack = features.iter().find_map(|feature| Some((feature, feature.lack()?)));
    let Some((feature, reason)) = lack else {
        return false;
    };
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    assert!(!feature.must_be_there(), "{test} must not skip here: {reason}");
    eprintln!("SKIP {test}: {reason}");
    true
}

impl Feature {
    /// Why the machine does not have it; none if it has.
    pub fn lack(self) -> Option<String> {
        match self {
            Self::Lab => lack_of_lab(),
            Self::Agent => lab::binary("undermesh").err().map(|error| error.to_string()),
            Self::Cluster => lack_of_lab()
                .or_else(|| cluster::Tools::of_environment().err().map(|error| error.to_string())),
            Self::Kernel(major, minor) => {
                let release = kernel_release();
                let old = version(&release) < (major, minor);
                old.then(|| format!("needs Linux {major}.{minor}, this is {release}"))
            }
            Self::Program(name) => {
                (!is_installed(name)).then(|| format!("needs the program `{name}`: cargo xtask setup"))
            }
            Self::Library(name) => {
                library(name).is_none().then(|| format!("needs the library `{name}`: cargo xtask setup"))
            }
            Self::PythonModule(name) => {
                let is_there = Path::new("/usr/lib/python3/dist-packages").join(name).is_dir();
                (!is_there).then(|| format!("needs the Python module `{name}`: cargo xtask setup"))
            }
            Self::Mptcp => {
                let (domain, protocol) = (socket2::Domain::IPV4, socket2::Protocol::MPTCP);
                let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(protocol));
                socket.err().map(|error| format!("needs MPTCP (CONFIG_MPTCP, net.mptcp.enabled=1): {error}"))
            }
            Self::Congestion(name) => {
                let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None);
                let set = socket.and_then(|socket| socket.set_tcp_congestion(name.as_bytes()));
                set.err().map(|error| {
                    format!("needs the congestion control `{name}` (CONFIG_TCP_CONG_*): {error}")
                })
            }
            Self::IoUring => {
                let ring = io_uring::IoUring::new(1);
                ring.err().map(|error| format!("needs io_uring (kernel.io_uring_disabled=0): {error}"))
            }
            Self::OpenFiles(count) => lack_of_open_files(count),
        }
    }
}

fn lack_of_lab() -> Option<String> {
    if std::env::var_os("UNDERMESH_E2E").is_none() {
        return Some("it changes the machine's namespaces; run it by `cargo xtask test`".to_owned());
    }
    if !nix::unistd::geteuid().is_root() {
        return Some("it needs root".to_owned());
    }
    Feature::Program("ip").lack().or_else(|| lab::cgroup_root().err().map(|error| error.to_string()))
}

/// Where the shared library is, if it is installed.
pub fn library(name: &str) -> Option<String> {
    let folder = format!("/usr/lib/{}-linux-gnu", std::env::consts::ARCH);
    let path = Path::new(&folder).join(name);
    path.is_file().then(|| path.display().to_string())
}

/// The limit that is in force counts, so it is raised for this process: those that it starts inherit it.
fn lack_of_open_files(count: u64) -> Option<String> {
    let limits = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
    if limits.1 >= count {
        return None;
    }
    let error = setrlimit(Resource::RLIMIT_NOFILE, limits.0, count).err()?;
    Some(format!(
        "needs {count} open files; a process may have {} here, and raising that fails ({error}): cargo xtask vm",
        limits.1
    ))
}

/// True if the program is on the PATH or in /usr/sbin.
pub fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
        || Path::new("/usr/sbin").join(program).is_file()
}

fn kernel_release() -> String {
    std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned()
}

fn version(release: &str) -> (u32, u32) {
    let mut numbers = release.split(['.', '-', '+']).map(|part| part.parse().unwrap_or(0));
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_kernel_releases() {
        assert_eq!(version("6.1.0-28-amd64"), (6, 1));
        assert_eq!(version("5.15+"), (5, 15));
    }
}
