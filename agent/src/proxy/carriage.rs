//! What a captured connection is carried as: by what is said of its port, by the routes on that, and by its first bytes.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::TcpStream;

use super::Proxy;
use super::captured::Captured;
use super::detect::{Speech, detect, server_name};
use super::worker::Here;
use crate::model::{Declared, ServicePort};
use crate::route::{Rule, Table};

/// How a connection is carried.
#[derive(Debug)]
pub(super) enum Carriage {
    /// Request by request.
    Http1,
    /// Request by request.
    Http2,
    /// As bytes that nobody looks at.
    Bytes(Bound),
}

/// Where bytes are bound for.
#[derive(Debug)]
pub(super) enum Bound {
    /// Where they were sent: no route is about them.
    Dialled,
    /// Where this rule says.
    By(Arc<Rule>),
    /// Nowhere: there are routes, and none is for them.
    Nowhere,
}

/// Finds out how. What a user says of a port counts for more than a guess, but never makes a connection fail that is something
/// else.
pub(super) async fn carriage(
    proxy: &Proxy,
    here: &Here,
    captured: &Captured,
    client: TcpStream,
) -> io::Result<(Carriage, TcpStream)> {
    let snapshot = proxy.snapshot.load_full();
    let namespace = &captured.net.workload.pod.namespace;
    let (service, port) = (captured.service(&snapshot), captured.port());
    let routes = service.and_then(|service| snapshot.routes.get(&service.id)?.of_port(port, namespace));
    let service_port = service.and_then(|service| service.port(port));
    match routes.map(|routes| &routes.table) {
        // Requests are not to pass in plaintext, and a server of TLS never speaks first.
        None if service_port.is_some_and(|port| port.traffic.tls.is_some()) => {
            detect(client, None).await.map(spoken)
        }
        // Without a route nothing but the metrics would need to know of requests.
        None if !proxy.settings.http => Ok((Carriage::Bytes(Bound::Dialled), client)),
        None => match service_port.map_or(Declared::Nothing, ServicePort::declared) {
            Declared::Http => detect(client, None).await.map(spoken),
            Declared::Opaque => Ok((Carriage::Bytes(Bound::Dialled), client)),
            Declared::Nothing => guessed(here, captured.dialled, client).await.map(spoken),
        },
        Some(Table::Http(_)) => detect(client, None).await.map(spoken),
        Some(Table::Tls(table)) => {
            let (name, client) = server_name(client).await?;
            let bound = table.find(name.as_deref()).cloned().map_or(Bound::Nowhere, Bound::By);
            Ok((Carriage::Bytes(bound), client))
        }
        Some(Table::Tcp(rule)) => Ok((Carriage::Bytes(Bound::By(rule.clone())), client)),
    }
}

/// Of a port of which nothing is said.
async fn guessed(here: &Here, dialled: SocketAddr, client: TcpStream) -> io::Result<(Speech, TcpStream)> {
    let detected = detect(client, Some(here.servers_first.limit(dialled))).await?;
    match detected.0 {
        Speech::Silence => here.servers_first.note(dialled),
        _ => here.servers_first.forget(dialled),
    }
    Ok(detected)
}

fn spoken((speech, client): (Speech, TcpStream)) -> (Carriage, TcpStream) {
    let carriage = match speech {
        Speech::Http1 => Carriage::Http1,
        Speech::Http2 => Carriage::Http2,
        Speech::Opaque | Speech::Silence => Carriage::Bytes(Bound::Dialled),
    };
    (carriage, client)
}
