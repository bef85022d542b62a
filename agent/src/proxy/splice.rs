//! Bulk bytes from socket to socket through a pipe, without a copy to user space (splice(2)).

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::task::{Context, Poll, ready};

use nix::fcntl::{FcntlArg, OFlag, SpliceFFlags, fcntl, splice};
use nix::unistd::pipe2;
use tokio::io::Interest;
use tokio::net::TcpStream;

/// Wished capacity; the kernel may grant less.
const CAPACITY: usize = 1024 * 1024;

/// Pipes that one thread keeps for the next burst.
const SPARE: usize = 16;

/// Pipes that one thread has in use at most; bulk beyond that is copied.
pub(super) const IN_USE: usize = 64;

thread_local! {
    static POOL: RefCell<Pool> = const { RefCell::new(Pool { spare: Vec::new(), in_use: 0 }) };
}

struct Pool {
    spare: Vec<Ends>,
    in_use: usize,
}

struct Ends {
    read: OwnedFd,
    write: OwnedFd,
}

/// A pipe on loan to one direction of a relay.
pub(super) struct Pipe {
    /// Present until dropped.
    ends: Option<Ends>,
    filled: usize,
}

/// What one step through the pipe came to.
pub(super) enum Spliced {
    /// This many bytes reached the receiver.
    Moved(usize),
    /// Nothing is to be had this way for now, and the pipe is empty: a read tells why.
    Dry,
}

/// One of the two sockets broke.
pub(super) enum SpliceBroken {
    Sender(io::Error),
    Receiver(io::Error),
}

impl Pipe {
    /// A pipe, if one is to be had.
    pub(super) fn take() -> Option<Self> {
        POOL.with_borrow_mut(|pool| {
            if pool.in_use >= IN_USE {
                return None;
            }
            let ends = match pool.spare.pop() {
                Some(ends) => ends,
                None => Ends::open().ok()?,
            };
            pool.in_use += 1;
            Some(Self { ends: Some(ends), filled: 0 })
        })
    }

    /// Fills the pipe when it is empty, else empties it.
    pub(super) fn poll_move(
        &mut self,
        cx: &mut Context<'_>,
        from: &TcpStream,
        to: &TcpStream,
    ) -> Poll<Result<Spliced, SpliceBroken>> {
        let Some(ends) = &self.ends else { return Poll::Ready(Ok(Spliced::Dry)) };
        if self.filled == 0 {
            match from.try_io(Interest::READABLE, || fill(from, &ends.write)) {
                Ok(Some(n)) => self.filled = n,
                Ok(None) => return Poll::Ready(Ok(Spliced::Dry)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    return Poll::Ready(Ok(Spliced::Dry));
                }
                Err(error) => return Poll::Ready(Err(SpliceBroken::Sender(error))),
            }
        }
        loop {
            ready!(to.poll_write_ready(cx)).map_err(SpliceBroken::Receiver)?;
            match to.try_io(Interest::WRITABLE, || transfer(&ends.read, to, self.filled)) {
                Ok(n) => {
                    self.filled -= n;
                    return Poll::Ready(Ok(Spliced::Moved(n)));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(SpliceBroken::Receiver(error))),
            }
        }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        POOL.with_borrow_mut(|pool| {
            pool.in_use -= 1;
            // One with bytes in it would give them to the next connection.
            if self.filled == 0
                && pool.spare.len() < SPARE
                && let Some(ends) = self.ends.take()
            {
                pool.spare.push(ends);
            }
        });
    }
}

impl Ends {
    fn open() -> io::Result<Self> {
        let (read, write) = pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK)?;
        // Beyond fs.pipe-user-pages-soft an unprivileged process keeps the default, which works all the same.
        let _ = fcntl(&write, FcntlArg::F_SETPIPE_SZ(CAPACITY as i32));
        Ok(Self { read, write })
    }
}

/// None where there is nothing to be had. At the mark of urgent data splice(2) says "end of the stream" or "not ready"
/// while a read would go on behind it, so neither is believed, and the readiness is left for the read to judge.
fn fill(from: &TcpStream, pipe: &OwnedFd) -> io::Result<Option<usize>> {
    match transfer(from, pipe, CAPACITY) {
        Ok(0) => Ok(None),
        Ok(n) => Ok(Some(n)),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error),
    }
}

fn transfer(from: &(impl AsFd + AsRawFd), to: &(impl AsFd + AsRawFd), len: usize) -> io::Result<usize> {
    let flags = SpliceFFlags::SPLICE_F_MOVE | SpliceFFlags::SPLICE_F_NONBLOCK;
    Ok(splice(from, None, to, None, len, flags)?)
}
