//! Network namespaces: entering them, and sockets inside of them.

use std::cell::Cell;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Socket, Type};

use super::place::FileId;

/// An open network namespace. It lives as long as this value or any socket in it.
#[derive(Debug)]
pub struct Netns {
    fd: OwnedFd,
    cookie: u64,
    file: FileId,
}

thread_local! {
    /// The cookie of the namespace that this thread was last moved to; 0 while it is where it started.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
}

impl Netns {
    /// Opens the namespace that the path stands for (`/run/netns/x`, `/proc/N/ns/net`).
    pub fn open(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let id = FileId::of(&file)?;
        let fd = OwnedFd::from(file);
        let cookie = in_namespace(&fd, || cookie_of(&Socket::new(Domain::UNIX, Type::DGRAM, None)?))??;
        Ok(Self { fd, cookie, file: id })
    }

    /// What the kernel programs know the namespace by; unique until the machine restarts, never 0.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Whether the path stands for this namespace now.
    pub fn is_at(&self, path: &Path) -> bool {
        self.file.is_at(path)
    }

    /// Runs a closure inside, on a thread of its own, so that the caller's thread never moves.
    pub fn run<T: Send>(&self, inside: impl FnOnce() -> T + Send) -> io::Result<T> {
        in_namespace(&self.fd, inside)
    }

    /// Moves the calling thread inside and leaves it there: the next call for the same namespace costs nothing. For
    /// threads that do nothing else with namespaces; see [`leave_unless`].
    pub fn enter(&self) -> io::Result<()> {
        if CURRENT.get() != self.cookie {
            setns(&self.fd, CloneFlags::CLONE_NEWNET)?;
            CURRENT.set(self.cookie);
        }
        Ok(())
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Moves the calling thread back to the process's namespace if the one that it is in is not to be kept: it would stay
/// alive for as long as the thread is in it.
pub fn leave_unless(keep: impl FnOnce(u64) -> bool) -> io::Result<()> {
    let cookie = CURRENT.get();
    if cookie != 0 && !keep(cookie) {
        // The main thread never moves, so its namespace is the process's.
        let home = File::open(format!("/proc/{}/ns/net", std::process::id()))?;
        setns(home, CloneFlags::CLONE_NEWNET)?;
        CURRENT.set(0);
    }
    Ok(())
}

fn in_namespace<T: Send>(fd: &OwnedFd, inside: impl FnOnce() -> T + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, || {
            setns(fd, CloneFlags::CLONE_NEWNET)?;
            Ok(inside())
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// `SO_NETNS_COOKIE` (Linux 5.14).
fn cookie_of(socket: &Socket) -> io::Result<u64> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let mut cookie = 0u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes into `cookie`.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if ret == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}
