//! Envoys in pods of a lab: listeners of HTTP, each with one route to one cluster, and nothing that redirects connections.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::Result;
use serde_json::{Value, json};

use crate::lab::{Lab, Pod, Process};

/// Where its statistics are asked for, in its pod.
pub const ADMIN: ([u8; 4], u16) = ([127, 0, 0, 1], 9901);

/// What is spoken with the endpoint of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speaks {
    /// HTTP/1.1.
    Http1,
    /// HTTP/2.
    Http2,
    /// What the client speaks.
    Either,
}

/// Starts an Envoy in the pod: each listener leads to the cluster beside it.
///
/// # Errors
/// When it cannot be started.
pub fn start(binary: &Path, lab: &Lab, pod: &Pod, pairs: &[(Value, Value)]) -> Result<Process> {
    let (mut listeners, mut clusters) = (Vec::new(), Vec::new());
    for (index, (listener, cluster)) in pairs.iter().enumerate() {
        let name = format!("upstream-{index}");
        let (mut listener, mut cluster) = (listener.clone(), cluster.clone());
        let manager = &mut listener["filter_chains"][0]["filters"][0]["typed_config"];
        manager["route_config"]["virtual_hosts"][0]["routes"][0]["route"]["cluster"] = json!(name);
        cluster["name"] = json!(name);
        cluster["load_assignment"]["cluster_name"] = json!(name);
        listeners.push(listener);
        clusters.push(cluster);
    }
    let config = json!({
        "admin": { "address": socket_address(ADMIN.into()) },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    });
    let file = lab.dir().join(format!("envoy-{}.json", pod.name()));
    fs::write(&file, config.to_string())?;
    let mut command = Command::new(binary);
    command.args(["--use-dynamic-base-id", "--log-level", "error", "--concurrency", "2", "-c"]).arg(file);
    pod.spawn(command)
}

/// HTTP/1 and HTTP/2 on one port, with all that either may carry.
pub fn listener(address: SocketAddr, tls: Option<Value>) -> Value {
    let manager = json!({
        "@type": type_of("filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "http",
        "http_protocol_options": { "enable_trailers": true },
        "http2_protocol_options": { "allow_connect": true },
        "upgrade_configs": [{ "upgrade_type": "websocket" }],
        "http_filters": [{ "name": "router", "typed_config": { "@type": type_of("filters.http.router.v3.Router") } }],
        "route_config": { "virtual_hosts": [{
            "name": "all", "domains": ["*"], "routes": [{ "match": { "prefix": "/" }, "route": {} }],
        }] },
    });
    let mut chain = json!({ "filters": [{ "name": "http", "typed_config": manager }] });
    if let Some(tls) = tls {
        chain["transport_socket"] = tls;
    }
    json!({ "address": socket_address(address), "filter_chains": [chain] })
}

/// One endpoint.
pub fn cluster(address: SocketAddr, tls: Option<Value>, speaks: Speaks) -> Value {
    let http1 = json!({ "enable_trailers": true });
    let http2 = json!({ "allow_connect": true });
    let mut options = json!({ "@type": type_of("upstreams.http.v3.HttpProtocolOptions") });
    let (how, config) = match speaks {
        Speaks::Http1 => ("explicit_http_config", json!({ "http_protocol_options": http1 })),
        Speaks::Http2 => ("explicit_http_config", json!({ "http2_protocol_options": http2 })),
        Speaks::Either => (
            "use_downstream_protocol_config",
            json!({ "http_protocol_options": http1, "http2_protocol_options": http2 }),
        ),
    };
    options[how] = config;
    let endpoint = json!({ "endpoint": { "address": socket_address(address) } });
    let mut cluster = json!({
        "type": "STATIC", "connect_timeout": "5s",
        "load_assignment": { "endpoints": [{ "lb_endpoints": [endpoint] }] },
        "typed_extension_protocol_options": { "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": options },
    });
    if let Some(tls) = tls {
        cluster["transport_socket"] = tls;
    }
    cluster
}

/// The name of a type of Envoy's extensions.
pub fn type_of(name: &str) -> String {
    format!("type.googleapis.com/envoy.extensions.{name}")
}

fn socket_address(address: SocketAddr) -> Value {
    json!({ "socket_address": { "address": address.ip(), "port_value": address.port() } })
}
