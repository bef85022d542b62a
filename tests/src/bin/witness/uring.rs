//! A client that makes every call by io_uring.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;

use anyhow::Result;
use clap::Args;
use io_uring::{IoUring, opcode, squeue, types};
use serde_json::{Value, json};
use socket2::SockAddr;

use crate::socket::{Make, errno, own_name, peer_name};

/// The arguments of `witness uring`.
#[derive(Args)]
pub struct Uring {
    /// Where to.
    to: SocketAddr,
    #[command(flatten)]
    make: Make,
}

impl Uring {
    /// Connects, hears the greeting, says `ping` and hears it back.
    pub fn run(&self) -> Result<Value> {
        let mut ring = IoUring::new(4)?;
        let (socket, to) = self.make.socket(self.to)?;
        let to = SockAddr::from(to);
        let fd = types::Fd(socket.as_raw_fd());

        let connect = opcode::Connect::new(fd, to.as_ptr().cast(), to.len()).build();
        if let Err(error) = submit(&mut ring, &connect) {
            return Ok(json!([{ "connect": errno(&error) }]));
        }
        let mut heard = Vec::new();
        while !heard.ends_with(b"\n") {
            heard.extend(receive(&mut ring, fd)?);
        }
        let message = b"ping";
        submit(&mut ring, &opcode::Send::new(fd, message.as_ptr(), message.len() as u32).build())?;
        let mut echoed = Vec::new();
        while echoed.len() < message.len() {
            echoed.extend(receive(&mut ring, fd)?);
        }
        let saw = [heard, echoed].map(|bytes| String::from_utf8_lossy(&bytes).trim_end().to_owned());
        Ok(json!([{ "connect": "ok", "name": own_name(&socket), "peer": peer_name(&socket), "saw": saw }]))
    }
}

fn receive(ring: &mut IoUring, fd: types::Fd) -> io::Result<Vec<u8>> {
    let mut buffer = vec![0u8; 1024];
    let count = submit(ring, &opcode::Recv::new(fd, buffer.as_mut_ptr(), buffer.len() as u32).build())?;
    if count == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    buffer.truncate(count);
    Ok(buffer)
}

/// Submits one entry and waits for its result.
fn submit(ring: &mut IoUring, entry: &squeue::Entry) -> io::Result<usize> {
    // SAFETY: what the entry points to belongs to our callers, who wait here until the kernel is done with it.
    unsafe { ring.submission().push(entry) }.map_err(io::Error::other)?;
    ring.submit_and_wait(1)?;
    let done = ring.completion().next().ok_or_else(|| io::Error::other("no completion"))?;
    usize::try_from(done.result()).map_err(|_| io::Error::from_raw_os_error(-done.result()))
}
