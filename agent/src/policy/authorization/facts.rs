//! What a decision is made from: who is connected, and what is asked for.

use std::net::IpAddr;

use http::{HeaderMap, Method};
use serde_json::{Map, Value};

use crate::model::SpiffeId;

/// A connection to a workload.
#[derive(Clone, Copy, Debug)]
pub struct Connection<'f> {
    /// Who is at its other end, proven. None where nothing was.
    pub identity: Option<&'f SpiffeId>,
    /// The address that it came from.
    pub address: IpAddr,
    /// The port of the application.
    pub port: u16,
}

/// A request on a connection.
#[derive(Clone, Copy, Debug)]
pub struct Request<'f> {
    /// Its method.
    pub method: &'f Method,
    /// Its path, without the query, as [`normalise`](super::normalise) leaves it.
    pub path: &'f str,
    /// Whether case makes no difference in paths, and so in methods of gRPC. The path is in lower case then; rules need not be.
    pub ignores_path_case: bool,
    /// Whom it asks for, if it says: the authority or the header `host`, with the port where it has one.
    pub host: Option<&'f str>,
    /// Its headers.
    pub headers: &'f HeaderMap,
    /// What a valid token says of the caller. None where none was shown.
    pub claims: Option<&'f Map<String, Value>>,
    /// Whether it is gRPC: then its path is that of a method.
    pub is_grpc: bool,
}

/// Everything that rules are held against.
#[derive(Clone, Copy, Debug)]
pub(super) struct Facts<'f> {
    pub(super) connection: Connection<'f>,
    /// None where none is known, yet or at all.
    pub(super) request: Option<Request<'f>>,
    /// What counts where something cannot be told: who proves no identity may or may not be one of those that are left out, and an
    /// expression may fail. What allows does not match then, everything else does.
    pub(super) in_doubt: bool,
}

impl<'f> Facts<'f> {
    /// Service and method of gRPC. Whether it is that, the caller says; in doubt it is, for servers read types of content in ways of their
    /// own, and so what looks like a call counts as one where the policy denies or audits.
    pub(super) fn grpc_method(&self) -> Option<(&'f str, &'f str)> {
        let request = self.request?;
        let (service, method) = request.path.strip_prefix('/')?.split_once('/')?;
        ((request.is_grpc || self.in_doubt) && !method.contains('/')).then_some((service, method))
    }
}

/// A host as it is compared, without its port and without the dot that ends a full name; and the port. An address of IPv6 is in brackets.
pub(super) fn host_and_port(host: &str) -> (&str, Option<&str>) {
    let name_end = host.rfind(']').map_or(0, |bracket| bracket + 1);
    let (name, port) = match host[name_end..].rfind(':') {
        Some(colon) => (&host[..name_end + colon], Some(&host[name_end + colon + 1..])),
        None => (host, None),
    };
    (name.strip_suffix('.').unwrap_or(name), port)
}
