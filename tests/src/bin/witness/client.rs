//! A client: connects in one of the ways that there are, follows a script, tells what it saw.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::Result;
use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, SockaddrStorage, sendto};
use serde_json::{Value, json};
use socket2::Socket;

use crate::script::{PATIENCE, Script};
use crate::socket::{FastOpen, Make, errno, own_name, peer_name};

/// The arguments of `witness connect`.
#[derive(Args)]
pub struct Connect {
    /// Where to; of several, each connection stays while the next are made.
    #[arg(required = true)]
    to: Vec<SocketAddr>,
    #[command(flatten)]
    make: Make,
    /// Do not wait in connect(), but in poll().
    #[arg(long)]
    nonblocking: bool,
    /// What to send with MSG_FASTOPEN.
    #[arg(long, default_value = "ping")]
    message: String,
    /// What to do once connected.
    #[arg(long, default_value = "hear-line,say:ping,hear:4,shut,hear-end")]
    script: Script,
}

impl Connect {
    /// An array of what was seen of each connection.
    pub fn run(&self) -> Result<Value> {
        self.make.enter_netns()?;
        let mut seen = Vec::new();
        let mut sockets = Vec::new();
        for to in &self.to {
            let (socket, connect) = match self.make.socket(*to) {
                Ok((socket, to)) => {
                    let connect = self.connect(&socket, to).unwrap_or_else(|error| errno(&error));
                    (Some(socket), connect)
                }
                Err(error) => (None, errno(&error)),
            };
            let own = socket.as_ref().map(own_name);
            let peer = socket.as_ref().map(peer_name);
            let mut one = json!({ "connect": connect, "name": own, "peer": peer });
            if let Some(device) = socket.as_ref().and_then(|socket| socket.device().ok()).flatten() {
                one["device"] = String::from_utf8_lossy(&device).into();
            }
            seen.push(one);
            sockets.push(socket);
        }
        for (socket, seen) in sockets.into_iter().zip(&mut seen) {
            if let Some(socket) = socket.filter(|_| seen["connect"] == "ok") {
                seen["saw"] = self.script.follow(socket.into(), "").into();
            }
        }
        Ok(seen.into())
    }

    fn connect(&self, socket: &Socket, to: SocketAddr) -> io::Result<String> {
        if self.make.fast_open == Some(FastOpen::Message) {
            let (message, to) = (self.message.as_bytes(), SockaddrStorage::from(to));
            let sent =
                sendto(socket.as_raw_fd(), message, &to, MsgFlags::from_bits_retain(libc::MSG_FASTOPEN))?;
            return Ok(if sent == message.len() { "ok".to_owned() } else { format!("sent {sent}") });
        }
        socket.set_nonblocking(self.nonblocking)?;
        let connected = socket.connect(&to.into());
        if !self.nonblocking {
            return connected.map(|()| "ok".to_owned());
        }
        match connected {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            Err(error) => return Err(error),
            // A connect on one machine may be done at once.
            Ok(()) => {}
        }
        let timeout = PollTimeout::try_from(PATIENCE).unwrap_or(PollTimeout::MAX);
        if poll(&mut [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)], timeout)? == 0 {
            return Ok("never writable".to_owned());
        }
        match socket.take_error()? {
            Some(error) => Err(error),
            None => socket.set_nonblocking(false).map(|()| "ok".to_owned()),
        }
    }
}
