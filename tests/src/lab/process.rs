//! Programs in a namespace and a cgroup of the lab.
//!
//! Three things see to it that none outlives the lab: a handle kills its process when dropped, the sweep kills
//! whole cgroups, and the kernel kills the processes when the thread that started them ends. For the last, one
//! thread that lives as long as this process starts them all.

use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{OnceLock, mpsc};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, SigmaskHow, Signal, killpg, sigprocmask};
use nix::unistd::Pid;

use super::{patient, signals};

/// Where a program runs.
#[derive(Clone, Debug)]
pub struct Place {
    /// The file that opens its network namespace.
    pub netns: PathBuf,
    /// Its directory in the cgroup2 tree.
    pub cgroup: PathBuf,
}

/// A running program; killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    /// The command line, for messages.
    pub what: String,
    /// The file that has its standard output and error.
    pub log: PathBuf,
}

impl Process {
    /// Starts a program whose output goes to a file.
    pub(crate) fn start(place: &Place, mut command: Command, log: PathBuf) -> Result<Self> {
        let what = describe(&command);
        let file = File::create(&log).with_context(|| format!("{} cannot be made", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Ok(Self { child: spawn_at(place, command)?, what, log })
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Fails, with the end of its output, if it has ended.
    pub fn check_running(&mut self) -> Result<()> {
        match self.child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("`{}` has ended ({status}); its output:\n{}", self.what, self.log_tail(30)),
        }
    }

    /// Waits for its end.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        match wait_for(&mut self.child, limit)? {
            Some(status) => Ok(status),
            None => {
                bail!("`{}` has not ended within {limit:?}; its output:\n{}", self.what, self.log_tail(30))
            }
        }
    }

    /// Kills it and its process group at once (SIGKILL).
    pub fn kill(&mut self) {
        if let Ok(None) = self.child.try_wait() {
            self.signal(Signal::SIGKILL);
            let _ = self.child.wait();
        }
    }

    /// Asks it to end (SIGTERM) and waits.
    pub fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM);
        self.wait(limit)
    }

    /// Its process group, which it leads.
    pub fn group(&self) -> Pid {
        pid(&self.child)
    }

    /// Sends a signal to its process group.
    pub fn signal(&self, signal: Signal) {
        // It may just have ended by itself; whoever cares waits for it.
        let _ = killpg(self.group(), signal);
    }

    /// CPU seconds that it has used so far, of all its threads, user and system.
    pub fn cpu_seconds(&self) -> Result<f64> {
        cpu_seconds(self.pid())
    }

    /// Its resident memory in bytes.
    pub fn resident_bytes(&self) -> Result<u64> {
        resident_bytes(self.pid())
    }

    /// Its open descriptors.
    pub fn descriptors(&self) -> Result<usize> {
        Ok(fs::read_dir(Path::new("/proc").join(self.pid().to_string()).join("fd"))?.count())
    }

    /// All of its output so far.
    pub fn output(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The last lines of its output.
    pub fn log_tail(&self, lines: usize) -> String {
        let output = self.output();
        let all: Vec<&str> = output.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What a program that has ended left.
#[derive(Debug)]
pub struct Output {
    /// The command line.
    pub what: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Output {
    /// Its standard output if it ended well, else an error that has everything.
    pub fn success(self) -> Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!("`{}` failed ({}):\n{}{}", self.what, self.status, self.stdout, self.stderr);
    }
}

/// Runs a program to its end, or to the limit, in a place.
pub fn run_at(place: &Place, command: Command, limit: Duration) -> Result<Output> {
    run(command, limit, |command| spawn_at(place, command))
}

/// Runs a program on the machine itself, to its end or to the limit.
pub fn run_here(command: Command, limit: Duration) -> Result<Output> {
    run(command, limit, |mut command| {
        command.process_group(0);
        command.spawn().with_context(|| format!("`{}` cannot be run", describe(&command)))
    })
}

/// The command as one would type it.
fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}

/// The output goes through files, not pipes: a grandchild that keeps a pipe open cannot make us wait.
fn run(
    mut command: Command,
    limit: Duration,
    spawn: impl FnOnce(Command) -> Result<Child>,
) -> Result<Output> {
    let what = describe(&command);
    let (mut stdout, mut stderr) = (tempfile::tempfile()?, tempfile::tempfile()?);
    command.stdin(Stdio::null()).stdout(stdout.try_clone()?).stderr(stderr.try_clone()?);
    let mut child = spawn(command)?;
    let ended = wait_for(&mut child, limit)?;
    let status = match ended {
        Some(status) => status,
        None => {
            let _ = killpg(pid(&child), Signal::SIGKILL);
            child.wait()?
        }
    };
    let output = Output { what, status, stdout: read_all(&mut stdout)?, stderr: read_all(&mut stderr)? };
    if ended.is_none() {
        bail!("`{}` did not end within {limit:?}:\n{}{}", output.what, output.stdout, output.stderr);
    }
    Ok(output)
}

fn read_all(file: &mut File) -> Result<String> {
    let mut bytes = Vec::new();
    file.rewind()?;
    file.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn pid(child: &Child) -> Pid {
    Pid::from_raw(child.id() as i32)
}

/// Waits without polling: a pidfd becomes readable when the process ends. The limit is [`patient`].
fn wait_for(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    // SAFETY: the call takes no pointers; a result that is not negative is a descriptor that only we own.
    let pidfd = unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, child.id(), 0);
        if fd < 0 {
            return Ok(child.try_wait()?);
        }
        OwnedFd::from_raw_fd(fd as i32)
    };
    let limit = PollTimeout::try_from(patient(limit)).unwrap_or(PollTimeout::MAX);
    poll(&mut [PollFd::new(pidfd.as_fd(), PollFlags::POLLIN)], limit)?;
    Ok(child.try_wait()?)
}

/// Starts the program in a process group of its own, so that a Ctrl-C meant for us does not reach it first.
fn spawn_at(place: &Place, mut command: Command) -> Result<Child> {
    let what = describe(&command);
    let cgroup = File::options().write(true).open(place.cgroup.join("cgroup.procs"));
    let cgroup = cgroup.with_context(|| format!("no cgroup {}", place.cgroup.display()))?;
    let netns =
        File::open(&place.netns).with_context(|| format!("no namespace {}", place.netns.display()))?;
    let parent = std::process::id();
    command.process_group(0);
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor locks.
    unsafe { command.pre_exec(move || enter(&cgroup, &netns, parent)) };
    let (answer, answered) = mpsc::channel();
    spawner().send((command, answer)).ok().context("the spawning thread has ended")?;
    answered.recv()?.with_context(|| format!("`{what}` cannot be run"))
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// The thread that starts every program, see the module's head.
fn spawner() -> &'static mpsc::Sender<Order> {
    static SPAWNER: OnceLock<mpsc::Sender<Order>> = OnceLock::new();
    SPAWNER.get_or_init(|| {
        let (orders, incoming) = mpsc::channel::<Order>();
        std::thread::spawn(move || {
            for (mut command, answer) in incoming {
                let _gate = signals::gate();
                let _ = answer.send(command.spawn());
            }
        });
        orders
    })
}

fn enter(mut cgroup: &File, netns: &File, parent: u32) -> io::Result<()> {
    cgroup.write_all(b"0")?;
    setns(netns, CloneFlags::CLONE_NEWNET)?;
    nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
    // The parent may have died before the line above; then nobody would ever send the signal.
    if nix::unistd::getppid().as_raw() as u32 != parent {
        return Err(io::Error::from_raw_os_error(libc::ESRCH));
    }
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    Ok(())
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The program's name, in parentheses, may have spaces.
    let fields = stat.rsplit_once(") ").context("a stat file without a name")?.1;
    let ticks: u64 = fields.split(' ').skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    // SAFETY: sysconf reads a constant.
    let per_second = unsafe { libc::sysconf(libc::_SC_CLK_TCK) };
    Ok(ticks as f64 / per_second as f64)
}

fn resident_bytes(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").parse::<u64>()? * 1024)
}
