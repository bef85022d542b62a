//! Sockets made as an application might make them, and what the kernel says of them.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use socket2::{Domain, Protocol, Socket, Type};

/// How to make and prepare a client's socket.
#[derive(Args, Clone, Debug)]
pub struct Make {
    /// Bind to this address and port (0: any) first.
    #[arg(long)]
    bind: Option<SocketAddr>,
    /// Set SO_REUSEADDR before.
    #[arg(long)]
    reuse: bool,
    /// Bind to this interface (SO_BINDTODEVICE).
    #[arg(long)]
    device: Option<String>,
    /// An IPv6 socket also for IPv4 addresses, which it dials v4-mapped.
    #[arg(long)]
    dual_stack: bool,
    /// An MPTCP socket.
    #[arg(long)]
    mptcp: bool,
    /// Enter this network namespace first, but stay in the cgroup.
    #[arg(long)]
    netns: Option<PathBuf>,
    /// Use TCP Fast Open.
    #[arg(long, value_enum)]
    pub fast_open: Option<FastOpen>,
}

/// The two ways to ask for TCP Fast Open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FastOpen {
    /// TCP_FASTOPEN_CONNECT: connect() sends nothing, the first write does.
    Connect,
    /// MSG_FASTOPEN: sendto() connects.
    Message,
}

impl Make {
    /// Moves this process where the socket is to be.
    pub fn enter_netns(&self) -> Result<()> {
        let Some(path) = &self.netns else { return Ok(()) };
        let netns = std::fs::File::open(path).with_context(|| format!("no {}", path.display()))?;
        setns(netns, CloneFlags::CLONE_NEWNET).context("the namespace cannot be entered")
    }

    /// A socket for the destination, and the destination as that socket dials it.
    pub fn socket(&self, to: SocketAddr) -> io::Result<(Socket, SocketAddr)> {
        let to = self.as_dialled(to);
        let protocol = if self.mptcp { Protocol::MPTCP } else { Protocol::TCP };
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(protocol))?;
        socket.set_reuse_address(self.reuse)?;
        if let Some(device) = &self.device {
            socket.bind_device(Some(device.as_bytes()))?;
        }
        if let Some(bind) = self.bind {
            socket.bind(&self.as_dialled(bind).into())?;
        }
        if self.fast_open == Some(FastOpen::Connect) {
            set_option(&socket, libc::IPPROTO_TCP, libc::TCP_FASTOPEN_CONNECT, 1)?;
        }
        Ok((socket, to))
    }

    fn as_dialled(&self, address: SocketAddr) -> SocketAddr {
        match address.ip() {
            IpAddr::V4(v4) if self.dual_stack => (v4.to_ipv6_mapped(), address.port()).into(),
            _ => address,
        }
    }
}

/// Raises the limit of open files as far as it goes without a privilege.
pub fn raise_descriptor_limit() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

/// Sets an option whose value is an int.
pub fn set_option(socket: &impl AsRawFd, level: i32, option: i32, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the option's value is one int, which lives through the call.
    let ret =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// getsockname(), or the error's name.
pub fn own_name(socket: &Socket) -> String {
    shown(socket.local_addr().map(|name| name.as_socket()))
}

/// getpeername(), or the error's name.
pub fn peer_name(socket: &Socket) -> String {
    shown(socket.peer_addr().map(|name| name.as_socket()))
}

fn shown(name: io::Result<Option<SocketAddr>>) -> String {
    match name {
        Ok(Some(name)) => name.to_string(),
        Ok(None) => "no IP address".to_owned(),
        Err(error) => errno(&error),
    }
}

/// The error as errno(3) calls it.
pub fn errno(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => format!("{:?}", Errno::from_raw(number)),
        None => error.to_string(),
    }
}
