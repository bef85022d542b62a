//! Connections of pods to another pod of their node that no tunnel carries, ended for good.
//!
//! That the agent closes its own end is not enough. Who has forged packets on such a connection has brought the two ends out of step, so
//! that the server's takes no notice of the close (RFC 9293, section 3.10.7.4), and could go on speaking to it.

use std::io;

use tracing::{error, info, warn};
use undermesh_common::maps::Voucher;
use undermesh_common::{Endpoint, Tuple, source};

use super::pod::PodNet;
use super::programs::Programs;
use super::sock_diag::{self, TcpSocket};

/// Ends what is vouched for at the pod, other than probes and what the pod says to itself.
pub(super) fn end(programs: &Programs, net: &PodNet) {
    let pod = &net.pod;
    match end_all(programs, net) {
        Ok(0) => {}
        Ok(count) => {
            info!(%pod, count, "ended what this node's pods had open to the pod: they reach it through tunnels now")
        }
        Err(error) if error.kind() == io::ErrorKind::Unsupported => warn!(
            %pod,
            "this kernel closes no connections (CONFIG_INET_DIAG_DESTROY): one that a pod of this node had open to the pod, and \
             has forged packets on, may go on past its policies"
        ),
        Err(error) => error!(%pod, %error, "cannot end what this node's pods have open to the pod"),
    }
}

/// How many there were.
///
/// # Errors
/// What the kernel says; `Unsupported` without `CONFIG_INET_DIAG_DESTROY`.
fn end_all(programs: &Programs, net: &PodNet) -> io::Result<usize> {
    let vouched = programs.hash_map::<Tuple, Voucher>("vouched").map_err(io::Error::other)?;
    let is_direct = |TcpSocket { local, peer, .. }: &TcpSocket| {
        let tuple = Tuple::new(Endpoint::from(*peer), Endpoint::from(*local));
        let is_inside = net.addresses.contains(&peer.ip()) || source::is(&tuple.source);
        !is_inside && vouched.get(&tuple, 0).is_ok_and(|it| it.kubelet == 0)
    };
    net.inside(|| {
        let open = sock_diag::receiving()?;
        let direct: Vec<_> = open.into_iter().filter(is_direct).map(|socket| socket.id).collect();
        sock_diag::destroy_all(&direct)
    })
}
