//! The addresses of a network namespace.

use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::Path;

use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sched::{CloneFlags, setns};

/// The addresses by which others reach whoever is in the namespace, in the order of its interfaces. Blocks for a moment:
/// only a thread of its own may enter a namespace and be sure never to come back to the wrong one.
///
/// # Errors
/// When the namespace cannot be opened or entered.
pub(super) fn of(netns: &Path) -> io::Result<Vec<IpAddr>> {
    let netns = File::open(netns)?;
    std::thread::spawn(move || {
        setns(netns, CloneFlags::CLONE_NEWNET)?;
        own()
    })
    .join()
    .unwrap_or_else(|_| Err(io::Error::other("the thread that looked broke off")))
}

fn own() -> io::Result<Vec<IpAddr>> {
    let mut addresses = Vec::new();
    for interface in getifaddrs()? {
        let is_usable = interface.flags.contains(InterfaceFlags::IFF_UP)
            && !interface.flags.contains(InterfaceFlags::IFF_LOOPBACK);
        let Some(address) = interface.address.filter(|_| is_usable) else { continue };
        let ip = match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
            (Some(v4), _) => IpAddr::V4(v4.ip()),
            (_, Some(v6)) if !v6.ip().is_unicast_link_local() => IpAddr::V6(v6.ip()),
            _ => continue,
        };
        if !addresses.contains(&ip) {
            addresses.push(ip);
        }
    }
    Ok(addresses)
}
