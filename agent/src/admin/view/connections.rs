//! `/debug/connections`: the fields are those of the access log.

use serde::{Deserialize, Serialize, Serializer};

use super::{time, to_json};
use crate::telemetry::{Connection, Peer, Telemetry};

/// The page.
#[derive(Clone, Debug, Deserialize)]
pub struct ConnectionsView {
    /// Every open connection, in no order.
    pub connections: Vec<ConnectionView>,
}

/// One open connection.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ConnectionView {
    /// When it was opened (RFC 3339).
    pub opened: Option<String>,
    /// Seconds since.
    pub age_seconds: f64,
    /// `source` or `destination`.
    pub reporter: String,
    /// Who called.
    pub source: PeerView,
    /// Who answers.
    pub destination: PeerView,
    /// The Service that the client dialled.
    pub destination_service: Option<String>,
    /// Its namespace.
    pub destination_service_namespace: Option<String>,
    /// `same_node`, `plaintext` or `mutual_tls`.
    pub security: String,
    /// What the client asked for.
    pub dialled_address: String,
    /// The other end of the accepted socket.
    pub client_address: String,
    /// Where the agent is connected to.
    pub upstream_address: Option<String>,
    /// Bytes from the client to the server.
    pub sent_bytes: u64,
    /// Bytes from the server to the client.
    pub received_bytes: u64,
}

/// One end of a connection; the names are missing where the address is that of no known pod.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PeerView {
    /// What the pod is a replica of.
    pub workload: Option<String>,
    /// The pod's namespace.
    pub namespace: Option<String>,
    /// The pod's name.
    pub pod: Option<String>,
    /// Its SPIFFE id, where it is proven.
    #[serde(default)]
    pub identity: Option<String>,
    /// Address and port.
    pub address: String,
}

pub(in super::super) fn connections(telemetry: &Telemetry) -> Vec<u8> {
    /// Made one by one while they are written: all at once would be twice the memory.
    #[derive(Serialize)]
    struct Page {
        #[serde(serialize_with = "each")]
        connections: Vec<std::sync::Arc<Connection>>,
    }

    fn each<S: Serializer>(open: &[std::sync::Arc<Connection>], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(open.iter().map(|connection| ConnectionView::of(connection)))
    }

    to_json(&Page { connections: telemetry.connections() })
}

impl ConnectionView {
    fn of(connection: &Connection) -> Self {
        let facts = &connection.facts;
        Self {
            opened: time(connection.opened),
            age_seconds: connection.age().as_secs_f64(),
            reporter: facts.reporter.as_str().into(),
            source: PeerView::of(&facts.source),
            destination: PeerView::of(&facts.destination),
            destination_service: facts.service.as_ref().map(|s| s.name.to_string()),
            destination_service_namespace: facts.service.as_ref().map(|s| s.namespace.to_string()),
            security: facts.security.as_str().into(),
            dialled_address: facts.dialled.to_string(),
            client_address: facts.client.to_string(),
            upstream_address: facts.upstream.map(|a| a.to_string()),
            sent_bytes: connection.sent(),
            received_bytes: connection.received(),
        }
    }
}

impl PeerView {
    fn of(peer: &Peer) -> Self {
        let workload = peer.workload.as_ref();
        Self {
            workload: workload.map(|w| w.workload.to_string()),
            namespace: workload.map(|w| w.pod.namespace.to_string()),
            pod: workload.map(|w| w.pod.name.to_string()),
            identity: peer.identity.as_ref().map(ToString::to_string),
            address: peer.address.to_string(),
        }
    }
}
