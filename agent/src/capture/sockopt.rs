//! Socket options that no crate in the tree has a name for.

use std::io;
use std::os::fd::AsRawFd;

use socket2::Socket;

/// Receive window of a connection that never leaves the node. A few times what the fastest loopback can have in flight;
/// without it a sender whose reader is slow could fill `tcp_rmem`'s maximum (32 MiB on many machines) in kernel memory
/// that counts as the agent's.
const LOCAL_WINDOW: libc::c_int = 2 * 1024 * 1024;

/// Keeps every destination's own space of source ports although the address is bound (ip(7), Linux 4.2).
pub(super) fn set_bind_address_no_port(socket: &Socket) -> io::Result<()> {
    set(socket, libc::SOL_IP, libc::IP_BIND_ADDRESS_NO_PORT, 1)
}

/// For a connection to a socket of this node: bounds what that one may send ahead (tcp(7), TCP_WINDOW_CLAMP), and takes
/// the congestion control that most machines have. Nothing between the two can be congested, and one that paces (BBR is the
/// default of many nodes) sets a timer of high resolution for every few segments. Accepted sockets inherit both.
pub fn set_local(socket: &Socket) -> io::Result<()> {
    set(socket, libc::SOL_TCP, libc::TCP_WINDOW_CLAMP, LOCAL_WINDOW)?;
    // A kernel without it keeps its default.
    let _ = socket.set_tcp_congestion(b"cubic");
    Ok(())
}

fn set(socket: &Socket, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    // SAFETY: the value of each of these options is one int.
    let ret = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            (&raw const value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if ret == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
