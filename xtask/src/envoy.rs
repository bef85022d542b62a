//! Envoys as sidecars, to be measured beside us: one in the client's pod and one in each server's, HTTP/2 in mutual TLS between
//! them, one listener and one route each. Nothing redirects connections: clients dial the Envoy in their pod.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use undermesh_tests::envoy::{self, Speaks, cluster, listener, type_of};
use undermesh_tests::lab::{Lab, Pod, Process};
use undermesh_tests::pki::{Authority, Leaf};

/// Where the servers' Envoys listen for the client's; further applications are behind the next ports.
const TLS_PORT: u16 = 15443;

/// Where the client's Envoy listens for the first application of the first server; the next ones are behind the next ports.
const FIRST_PORT: u16 = 15101;

/// What a server's Envoy leads to.
#[derive(Clone, Copy)]
pub struct Application {
    /// Where it listens.
    pub port: u16,
    /// And nothing else.
    pub speaks_http2: bool,
}

/// Starts an Envoy in each server's pod and one in the client's.
pub fn start(
    binary: &Path,
    lab: &Lab,
    client: &Pod,
    servers: &[&Pod],
    applications: &[Application],
) -> Result<Vec<Process>> {
    let authority = Authority::stranger("cluster.local")?;
    let mut processes = Vec::new();
    for pod in servers {
        let tls = tls(lab, &authority, pod.name())?;
        let pair = |(index, application): (usize, &Application)| {
            let listener = listener(tls_address(pod, index), Some(downstream(&tls)));
            let to = SocketAddr::from(([127, 0, 0, 1], application.port));
            let speaks = if application.speaks_http2 { Speaks::Http2 } else { Speaks::Http1 };
            (listener, cluster(to, None, speaks))
        };
        let pairs: Vec<_> = applications.iter().enumerate().map(pair).collect();
        processes.push(envoy::start(binary, lab, pod, &pairs)?);
        pod.wait_listening(TLS_PORT)?;
    }
    let tls = tls(lab, &authority, client.name())?;
    let mut pairs = Vec::new();
    for (server, pod) in servers.iter().enumerate() {
        for application in 0..applications.len() {
            let upstream = cluster(tls_address(pod, application), Some(upstream(&tls)), Speaks::Http2);
            pairs.push((listener(address(server, application, applications.len()), None), upstream));
        }
    }
    processes.push(envoy::start(binary, lab, client, &pairs)?);
    client.wait_listening(FIRST_PORT).with_context(|| processes[processes.len() - 1].log_tail(10))?;
    Ok(processes)
}

/// What the client dials to get to an application of a server, by their places.
pub fn address(server: usize, application: usize, applications: usize) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], FIRST_PORT + (server * applications + application) as u16))
}

/// Where the server's Envoy listens for the client's, for this application.
fn tls_address(pod: &Pod, application: usize) -> SocketAddr {
    SocketAddr::new(pod.ip(), TLS_PORT + application as u16)
}

/// What both ends prove themselves by.
fn tls(lab: &Lab, authority: &Authority, name: &str) -> Result<Value> {
    let file = authority.sign(lab.dir(), &format!("envoy-{name}"), Leaf::GOOD)?;
    let root = lab.dir().join("envoy-root.pem");
    fs::write(&root, authority.root())?;
    Ok(json!({
        "alpn_protocols": ["h2"],
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_3", "tls_maximum_protocol_version": "TLSv1_3" },
        "tls_certificates": [{ "certificate_chain": { "filename": file }, "private_key": { "filename": file } }],
        "validation_context": { "trusted_ca": { "filename": root } },
    }))
}

fn downstream(tls: &Value) -> Value {
    transport_socket(json!({
        "@type": type_of("transport_sockets.tls.v3.DownstreamTlsContext"),
        "require_client_certificate": true, "common_tls_context": tls,
    }))
}

fn upstream(tls: &Value) -> Value {
    transport_socket(json!({
        "@type": type_of("transport_sockets.tls.v3.UpstreamTlsContext"), "common_tls_context": tls,
    }))
}

fn transport_socket(context: Value) -> Value {
    json!({ "name": "tls", "typed_config": context })
}
