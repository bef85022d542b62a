//! The Service that stands in front of an endpoint, for those who dial the endpoint and mean the Service.

use std::net::SocketAddr;

use super::ObjectRef;

/// One endpoint of a Service port. In their order, those of one endpoint are together, the first of them being the one that
/// counts: by the namespace and the name of the Service, then by its port.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Front {
    /// Pod address and target port.
    pub endpoint: SocketAddr,
    /// The Service.
    pub service: ObjectRef,
    /// The port that clients of the Service dial.
    pub port: u16,
}
