//! QEMU, and virtiofsd, which shows it this machine's files.
//!
//! Everything between the processes goes through descriptors that they inherit, so there is no socket and no file
//! that could stay behind, and they end with the process that started them, however it ends.

use std::fs::File;
use std::io::{Read, Seek, Write};
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::Signal;

use crate::command::command;
use crate::setup::kernel::Kernel;

const QEMU: &str = "qemu-system-x86_64";
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

/// A kernel that runs on the processor says something within a second or two.
const SIGN_OF_LIFE: Duration = Duration::from_secs(15);

/// What executes the VM's code.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Processor {
    /// The machine's own, by KVM.
    Hardware,
    /// QEMU's translator: about ten times slower, but it works everywhere.
    Emulated,
}

/// How the VM came to its end.
pub enum Ending {
    /// The command ended, with this exit code.
    Exited(i32),
    /// Nothing was ever to be heard of it.
    NeverBooted,
    /// It went down without the command's end: a panic, or no root file system.
    Broke,
    /// It took too long and was ended.
    TimedOut,
}

/// What a VM is made of.
pub struct Machine<'a> {
    pub kernel: &'a Kernel,
    pub initramfs: File,
    pub processor: Processor,
    pub memory_mib: u32,
}

/// Why no VM can be had here, if so.
pub fn lack() -> Option<String> {
    let installed = undermesh_tests::require::is_installed(QEMU) && Path::new(VIRTIOFSD).exists();
    (!installed).then(|| {
        format!("there is no {QEMU} or no {VIRTIOFSD}: both are in Debian 12's qemu-system-x86 and -common")
    })
}

impl Machine<'_> {
    /// Boots and waits for the end. What the console says goes to standard output.
    pub fn run(self, limit: Duration) -> Result<Ending> {
        let mut exit_code = tempfile::tempfile()?;
        let (files, socket) = serve_files()?;
        let mut qemu = Running(self.qemu(&socket, &exit_code)?.spawn().context(QEMU)?);
        drop(socket);
        let console = qemu.0.stdout.take().context("a pipe")?;
        if let Some(silence) = self.listen(&forward(console), limit) {
            return Ok(silence);
        }
        qemu.0.wait()?;
        drop(files);
        let mut said = String::new();
        exit_code.rewind()?;
        exit_code.read_to_string(&mut said)?;
        Ok(said.trim().parse().map_or(Ending::Broke, Ending::Exited))
    }

    /// Returns once the console is closed, with none if it ever said something, or once it has been silent or open for
    /// too long.
    fn listen(&self, console: &Receiver<()>, limit: Duration) -> Option<Ending> {
        let began = Instant::now();
        let mut booted = self.processor == Processor::Emulated;
        loop {
            let limit = if booted { limit } else { SIGN_OF_LIFE.min(limit) };
            match console.recv_timeout(limit.saturating_sub(began.elapsed())) {
                Ok(()) => booted = true,
                // QEMU 7.2 aborts where KVM cannot set what it says the processor has.
                Err(RecvTimeoutError::Disconnected) => return (!booted).then_some(Ending::NeverBooted),
                Err(RecvTimeoutError::Timeout) if booted => return Some(Ending::TimedOut),
                Err(RecvTimeoutError::Timeout) => return Some(Ending::NeverBooted),
            }
        }
    }

    fn qemu(&self, files: &UnixStream, exit_code: &File) -> Result<Command> {
        let mut qemu = command(QEMU);
        qemu.args(["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-smp", "2"]);
        let (accelerator, clock) = match self.processor {
            Processor::Hardware => (["-accel", "kvm", "-cpu", "host"], ""),
            // Without these words the kernel distrusts the emulated processor's clock, and its other clocks are slow.
            // Page tables of five levels take longer to walk than those of four. With cx16 the memory allocator of 6.12
            // crashed at boot once under QEMU 7.2; without, its free lists are locked instead, and it never did.
            Processor::Emulated => (
                ["-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max,-cx16"],
                "tsc=reliable clocksource=tsc no5lvl",
            ),
        };
        qemu.args(accelerator);
        // virtiofsd reads and writes the VM's memory.
        let memory = self.memory_mib;
        qemu.args(["-m", &memory.to_string(), "-numa", "node,memdev=memory"]);
        qemu.args(["-object", &format!("memory-backend-memfd,id=memory,size={memory}M,share=on")]);
        qemu.args(["-chardev", &format!("socket,id=files,fd={}", files.as_raw_fd())]);
        qemu.args(["-device", "vhost-user-fs-pci,chardev=files,tag=host,queue-size=1024"]);
        // The first serial port is the console, the second has the exit code.
        qemu.args(["-serial", "stdio"]);
        qemu.args(["-serial", &format!("file:/proc/self/fd/{}", exit_code.as_raw_fd())]);
        qemu.arg("-kernel").arg(self.kernel.image());
        qemu.args(["-initrd", &format!("/proc/self/fd/{}", self.initramfs.as_raw_fd())]);
        qemu.args(["-append", &format!("console=ttyS0 quiet panic=-1 mitigations=off {clock}")]);
        qemu.stdout(Stdio::piped());
        inherit(&mut qemu, &[files.as_raw_fd(), exit_code.as_raw_fd(), self.initramfs.as_raw_fd()]);
        Ok(qemu)
    }
}

/// A process that does not outlive this value.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts virtiofsd. The socket is connected to it.
fn serve_files() -> Result<(Running, UnixStream)> {
    let name = format!("undermesh-vm-{}", std::process::id());
    let address = SocketAddr::from_abstract_name(name)?;
    let listener = UnixListener::bind_addr(&address)?;
    let socket = UnixStream::connect_addr(&address)?;
    let mut virtiofsd = command(VIRTIOFSD);
    virtiofsd.arg(format!("--fd={}", listener.as_raw_fd()));
    // The VM sees this machine's root as it is, the limit of open files is what it is, and nobody changes the files
    // meanwhile: the VM may keep what it has seen.
    virtiofsd.args(["-f", "-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always"]);
    virtiofsd.args(["--rlimit-nofile=0", "-o", "log_level=err"]);
    // It complains of QEMU's every end.
    virtiofsd.stderr(Stdio::null());
    inherit(&mut virtiofsd, &[listener.as_raw_fd()]);
    Ok((Running(virtiofsd.spawn().context(VIRTIOFSD)?), socket))
}

/// Lets the program have these descriptors, and has it killed when this process ends.
fn inherit(command: &mut Command, descriptors: &[RawFd]) {
    let descriptors = descriptors.to_vec();
    let prepare = move || {
        for descriptor in &descriptors {
            // SAFETY: the caller's files are open here: this is the forked child, before exec.
            let descriptor = unsafe { BorrowedFd::borrow_raw(*descriptor) };
            fcntl(descriptor, FcntlArg::F_SETFD(FdFlag::empty()))?;
        }
        nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
        Ok(())
    };
    // SAFETY: between fork and exec the closure makes system calls only; it neither allocates nor locks.
    unsafe { command.pre_exec(prepare) };
}

/// Copies the console to standard output, without carriage returns. Each piece is told of; the end closes the channel.
fn forward(mut console: impl Read + Send + 'static) -> Receiver<()> {
    let (heard, receiver) = mpsc::channel();
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok(count @ 1..) = console.read(&mut buffer) {
            let text: Vec<u8> = buffer[..count].iter().copied().filter(|byte| *byte != b'\r').collect();
            let mut stdout = std::io::stdout().lock();
            if stdout.write_all(&text).and_then(|()| stdout.flush()).is_err() || heard.send(()).is_err() {
                return;
            }
        }
    });
    receiver
}
