//! The tunnel between nodes: HBONE, that is HTTP/2 CONNECT inside mutual TLS, as Istio's ambient mode speaks it.
//!
//! Whom to talk to is decided elsewhere; here a connection to an enrolled pod of another node becomes a stream of a
//! tunnel between the two pods, and a stream that arrives becomes a connection to the application. Nothing is shared
//! between the worker threads: each has its own tunnels.

mod chunk;
pub(super) mod client;
#[cfg(fuzzing)]
pub mod fuzzing;
mod handshake;
mod health;
mod pace;
mod pool;
mod refusal;
pub(super) mod server;
mod strangers;
pub(super) mod stream;
mod transport;
mod window;

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
pub use undermesh_common::lookup::TUNNEL_PORT;

use crate::identity::{CertificateStore, MeshTls};
use crate::model::{PublishedPod, Workload};

pub use handshake::Handshakes;
pub(super) use pool::Pool;
pub use strangers::{Strangers, UNFINISHED_HANDSHAKES};

const MAX_FRAME: u32 = 1024 * 1024;

/// Bytes that a stream may have waiting for the connection to take them.
const SEND_BUFFER: usize = 256 * 1024;

/// From the first byte to a peer that is known. Slow handshakes would hold descriptors otherwise.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// The pods of other nodes that take tunnels, by address: what their agents have published, a fact where a label is
/// only a wish.
pub type PublishedPods = Arc<ArcSwap<imbl::HashMap<IpAddr, PublishedPod>>>;

/// What the tunnels of all workers need.
#[derive(Debug)]
pub struct Tunnel {
    /// Makes the two ends of a handshake.
    pub tls: Arc<MeshTls>,
    /// The certificates of this node's pods.
    pub certificates: Arc<CertificateStore>,
    /// Who takes tunnels.
    pub published: PublishedPods,
    /// Room for those who have not shown yet who they are.
    pub strangers: Strangers,
    /// Where handshakes are counted and logged.
    pub handshakes: Handshakes,
}

impl Tunnel {
    /// Whether the pod takes tunnels. Its agent and the configuration must agree on who has the address.
    pub(super) fn reaches(&self, workload: &Workload, address: IpAddr) -> bool {
        self.ask_published(workload, address, |_| true)
    }

    /// Whether the pod is to be reached in plaintext while its agent is down.
    pub(super) fn takes_plaintext_when_down(&self, workload: &Workload, address: IpAddr) -> bool {
        self.ask_published(workload, address, |published| published.plaintext_when_down)
    }

    fn ask_published(
        &self,
        workload: &Workload,
        address: IpAddr,
        question: impl Fn(&PublishedPod) -> bool,
    ) -> bool {
        self.published.load().get(&address.to_canonical()).is_some_and(|published| {
            let is_it = published.uid == workload.uid && workload.node.as_ref() == Some(&published.node);
            is_it && question(published)
        })
    }
}
