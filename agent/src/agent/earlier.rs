//! What becomes of connections that pods had before they were enrolled, once a pod takes no plaintext any more: it is told of them, and
//! where that is wanted they are closed.

use std::collections::HashSet;
use std::io;

use tracing::{error, info, warn};

use crate::admin::view::{BeforeView, EarlierView, PodBeforeView};
use crate::capture::{Capture, EarlierConnection, EarlierConnections, PodNet};
use crate::model::{MtlsMode, Workload, WorkloadUid};
use crate::snapshot::Snapshot;

/// So many are named in a line of the log.
const NAMED: usize = 3;

/// When connections are closed that are older than the enrolment of their pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum CloseBeforeEnrolment {
    /// They end when their ends do.
    #[default]
    Never,
    /// When the pod takes no plaintext, those that others made to it.
    Strict,
}

/// Those who have been told of.
#[derive(Debug)]
pub(super) struct Earlier {
    closes: CloseBeforeEnrolment,
    told: HashSet<WorkloadUid>,
}

impl Earlier {
    pub(super) fn new(closes: CloseBeforeEnrolment) -> Self {
        Self { closes, told: HashSet::new() }
    }

    /// Looks for those of new pods, and holds all of them to what their pods take by now.
    pub(super) fn review(&mut self, capture: &mut Capture, snapshot: &Snapshot) {
        capture.look_for_earlier();
        let earlier = capture.earlier();
        let pods = earlier.pods();
        self.told.retain(|uid| pods.iter().any(|net| net.workload.uid == *uid));
        for net in pods {
            let Some(workload) = snapshot.workloads.get(&net.workload.uid) else { continue };
            if workload.takes_plaintext_everywhere() {
                self.told.remove(&workload.uid);
            } else if self.told.insert(workload.uid.clone()) {
                self.hold_to_strict(&earlier, &net, workload);
            }
        }
    }

    fn hold_to_strict(&self, earlier: &EarlierConnections, net: &PodNet, workload: &Workload) {
        let is_meant = |connection: &EarlierConnection| {
            connection.is_inbound && workload.mtls_at(connection.local.port()) == MtlsMode::Strict
        };
        let (pod, open) = match earlier.open_of(net) {
            Ok(open) => (&net.pod, open.into_iter().filter(is_meant).collect::<Vec<_>>()),
            Err(error) => return warn!(pod = %net.pod, %error, "cannot see the pod's connections"),
        };
        if open.is_empty() {
            return;
        }
        let named: Vec<_> = open.iter().take(NAMED).map(told).collect();
        let (count, first) = (open.len(), named.join(", "));
        if self.closes == CloseBeforeEnrolment::Never {
            return warn!(
                %pod, count, first,
                "connections from before the pod was enrolled go on in plaintext, though it is strict"
            );
        }
        match earlier.close(net, is_meant) {
            Ok(closed) => {
                info!(%pod, count = closed, first, "closed connections from before the pod was enrolled: it is strict");
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => error!(
                %pod, count, first,
                "connections from before the pod was enrolled go on in plaintext, though it is strict: this kernel closes no \
                 connections (CONFIG_INET_DIAG_DESTROY)"
            ),
            Err(error) => {
                error!(%pod, count, first, %error, "cannot close connections from before the pod was enrolled");
            }
        }
    }
}

fn told(connection: &EarlierConnection) -> String {
    format!("{} -> {}", connection.peer, connection.local)
}

/// The admin page.
pub(super) fn page(earlier: &EarlierConnections, snapshot: &Snapshot) -> BeforeView {
    let mut pods: Vec<_> = earlier.open().iter().map(|(net, open)| of_pod(net, open, snapshot)).collect();
    pods.sort_unstable_by(|a, b| (&a.namespace, &a.pod).cmp(&(&b.namespace, &b.pod)));
    BeforeView { pods }
}

fn of_pod(net: &PodNet, open: &[EarlierConnection], snapshot: &Snapshot) -> PodBeforeView {
    let view = |connection: &EarlierConnection| EarlierView {
        direction: if connection.is_inbound { "inbound" } else { "outbound" }.into(),
        local_address: connection.local.to_string(),
        peer_address: connection.peer.to_string(),
        peer: snapshot.workload(connection.peer.ip()).map(|peer| peer.pod.to_string()).or_else(|| {
            snapshot.service(connection.peer.ip()).map(|service| format!("Service {}", service.id))
        }),
    };
    PodBeforeView {
        namespace: net.pod.namespace.to_string(),
        pod: net.pod.name.to_string(),
        connections: open.iter().map(view).collect(),
    }
}
