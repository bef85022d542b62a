//! The first process of a node: gives the node its own view of the machine, then runs the node's services, as an init
//! system does.
//!
//! A node is namespaces of processes, mounts, cgroups and its name, in a network namespace that was made before. With
//! this process ends everything on the node: the kernel kills a process namespace with its first process, and mounts
//! go with their last user. It knows nothing of what the services are.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::Signal;
use nix::sys::wait::waitpid;
use serde::{Deserialize, Serialize};

use crate::lab::cgroup::{controllers, give_controllers};
use crate::lab::eventually;

/// Where the node has its programs.
pub(super) const PROGRAMS: &str = "/run/bin";

/// What a node is to be.
#[derive(Debug, Deserialize, Serialize)]
pub struct Spec {
    /// Its host name.
    pub hostname: String,
    /// Its group in the cgroup2 tree, as the machine sees it. Whoever starts us has put us into it.
    pub cgroup: PathBuf,
    /// The folder on the machine that holds its `run`, `lib` and `log`.
    pub data: PathBuf,
    /// The folder of the programs.
    pub programs: PathBuf,
    /// What is to run on it, in this order.
    pub services: Vec<Service>,
}

/// A program that is started again when it ends.
#[derive(Debug, Deserialize, Serialize)]
pub struct Service {
    /// Names its cgroup and its log.
    pub name: String,
    /// Its command line.
    pub command: Vec<String>,
    /// What is there once the next may be started.
    pub ready: Option<PathBuf>,
}

/// Makes the namespaces and waits in front of them. Only a child is inside of a new process namespace, so the node's
/// first process is another one.
pub fn outside(spec_file: &Path) -> Result<()> {
    let spec = read(spec_file)?;
    // The group that we are in now becomes the root of what the node sees.
    unshare(
        CloneFlags::CLONE_NEWNS
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWCGROUP
            | CloneFlags::CLONE_NEWPID,
    )
    .context("the node's namespaces cannot be made")?;
    // Nothing that is mounted from now on may be seen by the machine.
    remount("/", MsFlags::MS_PRIVATE)?;
    // Controllers are handed on only by a group without processes.
    enter(&spec.cgroup.join("init.scope"))?;
    let mut first = Command::new("/proc/self/exe");
    first.arg("--inside").arg(spec_file).stdin(Stdio::null());
    // SAFETY: between fork and exec the closure makes one system call; it neither allocates nor locks.
    unsafe { first.pre_exec(|| Ok(nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?)) };
    let status = first.status().context("the node's first process cannot be started")?;
    bail!("the node's first process has ended ({status})");
}

/// Is the node's first process.
pub fn inside(spec_file: &Path) -> Result<()> {
    let spec = read(spec_file)?;
    nix::unistd::sethostname(&spec.hostname)?;
    mount_view(&spec)?;
    let root = Path::new("/sys/fs/cgroup");
    give_controllers(root, &controllers(root)?)?;
    let mut running = Vec::new();
    for service in &spec.services {
        running.push((start(service)?, service));
        if let Some(ready) = &service.ready {
            eventually(Duration::from_secs(60), &format!("{} is up", service.name), || {
                ready.exists().then_some(()).with_context(|| format!("no {}", ready.display()))
            })?;
        }
    }
    // The processes of the node that have lost their parents are ours to bury, too.
    loop {
        let ended = waitpid(None, None).context("the node has no processes")?;
        let Some(entry) = running.iter_mut().find(|(pid, _)| ended.pid().is_some_and(|p| p.as_raw() == *pid))
        else {
            continue;
        };
        eprintln!("{} has ended ({ended:?}) and is started again", entry.1.name);
        std::thread::sleep(Duration::from_secs(1));
        entry.0 = start(entry.1)?;
    }
}

/// Mounts over what a node must not share with the machine.
fn mount_view(spec: &Spec) -> Result<()> {
    mount_new("proc", "/proc")?;
    protect_settings(&spec.data)?;
    // With the machine's /sys goes what is mounted in it: its cgroup trees, its pinned BPF objects.
    umount2("/sys", MntFlags::MNT_DETACH).context("/sys cannot be taken off")?;
    mount_new("sysfs", "/sys")?;
    mount_new("cgroup2", "/sys/fs/cgroup")?;
    mount_new("bpf", "/sys/fs/bpf")?;
    // Not every kernel has tracing, and nothing but somebody's curiosity needs it.
    let _ = mount_new("tracefs", "/sys/kernel/tracing");

    let run = spec.data.join("run");
    // What was in /run before the node was started says nothing any more.
    let _ = fs::remove_dir_all(&run);
    let programs = run.join("bin");
    fs::create_dir_all(&programs)?;
    bind(&spec.programs, &programs)?;
    for (own, place) in
        [(run, "/run"), (spec.data.join("log"), "/var/log"), (spec.data.join("lib"), "/var/lib")]
    {
        fs::create_dir_all(&own)?;
        bind(&own, Path::new(place))?;
    }
    // Mounts made by the kubelet and the runtime reach those pods that ask for them, as on any node.
    remount("/", MsFlags::MS_SHARED)
}

/// Kernel settings that are no namespace's, and that a kubelet writes. It gets plain files, with what it wants.
fn protect_settings(data: &Path) -> Result<()> {
    let settings = [
        ("vm/overcommit_memory", "1"),
        ("vm/panic_on_oom", "0"),
        ("kernel/panic", "10"),
        ("kernel/panic_on_oops", "1"),
        ("kernel/keys/root_maxkeys", "1000000"),
        ("kernel/keys/root_maxbytes", "25000000"),
    ];
    let dir = data.join("sysctl");
    fs::create_dir_all(&dir)?;
    for (key, value) in settings {
        let file = dir.join(key.replace('/', "."));
        fs::write(&file, format!("{value}\n"))?;
        let place = Path::new("/proc/sys").join(key);
        if place.exists() {
            bind(&file, &place)?;
        }
    }
    Ok(())
}

fn start(service: &Service) -> Result<i32> {
    let cgroup = Path::new("/sys/fs/cgroup/system.slice").join(format!("{}.service", service.name));
    fs::create_dir_all(&cgroup)?;
    let log = File::options()
        .create(true)
        .append(true)
        .open(Path::new("/var/log").join(format!("{}.log", service.name)))?;
    let (program, args) = service.command.split_first().context("a service without a command")?;
    let mut command = Command::new(program);
    command.args(args).env_clear().env("HOME", "/root");
    command.env("PATH", format!("{PROGRAMS}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    let procs = cgroup.join("cgroup.procs");
    // SAFETY: this process has one thread, so at the fork nobody holds a lock that the closure could need.
    unsafe { command.pre_exec(move || fs::write(&procs, "0")) };
    let child = command.spawn().with_context(|| format!("`{program}` cannot be run"))?;
    Ok(child.id() as i32)
}

fn read(spec_file: &Path) -> Result<Spec> {
    let text = fs::read(spec_file).with_context(|| format!("no {}", spec_file.display()))?;
    Ok(serde_json::from_slice(&text)?)
}

fn enter(cgroup: &Path) -> Result<()> {
    fs::create_dir_all(cgroup)?;
    fs::write(cgroup.join("cgroup.procs"), "0")
        .with_context(|| format!("{} cannot be entered", cgroup.display()))
}

fn mount_new(kind: &str, place: &str) -> Result<()> {
    mount(Some(kind), place, Some(kind), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("{kind} cannot be mounted at {place}"))
}

/// With all that is mounted below.
fn bind(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("{} cannot be bound over {}", from.display(), to.display()))
}

fn remount(place: &str, propagation: MsFlags) -> Result<()> {
    mount(None::<&str>, place, None::<&str>, MsFlags::MS_REC | propagation, None::<&str>)
        .with_context(|| format!("the propagation of {place} cannot be set"))
}
