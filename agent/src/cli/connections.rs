//! `undermesh connections`: who talks to whom through this node's agent, now.

use std::net::SocketAddr;
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use serde_json::Value;

use super::admin_client::{self, AdminError, DEFAULT_ADMIN_ADDRESS};
use super::print;
use super::table::{age, bytes, table};
use crate::admin::view::{ConnectionView, ConnectionsView, PeerView};

/// Lists the connections that are open through the agent of this node
#[derive(Args, Clone, Debug)]
pub struct ConnectionsArgs {
    /// Where the agent's admin server listens
    #[arg(long, value_name = "ADDRESS", default_value = DEFAULT_ADMIN_ADDRESS)]
    pub admin_address: SocketAddr,
    /// How to print them
    #[arg(long, short, value_enum, default_value_t)]
    pub output: OutputFormat,
}

/// How a command prints what it found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    /// Aligned columns
    #[default]
    Table,
    /// JSON
    Json,
}

/// Runs the command.
pub fn run(args: &ConnectionsArgs) -> ExitCode {
    print::outcome(show(args))
}

fn show(args: &ConnectionsArgs) -> Result<String, AdminError> {
    const PATH: &str = "/debug/connections";
    match args.output {
        OutputFormat::Json => Ok(print::json(&admin_client::get_json::<Value>(args.admin_address, PATH)?)),
        OutputFormat::Table => {
            let view: ConnectionsView = admin_client::get_json(args.admin_address, PATH)?;
            Ok(as_table(view.connections))
        }
    }
}

/// The oldest first.
fn as_table(mut connections: Vec<ConnectionView>) -> String {
    if connections.is_empty() {
        return "no open connections\n".into();
    }
    connections.sort_by(|a, b| b.age_seconds.total_cmp(&a.age_seconds));
    let rows: Vec<_> = connections.iter().map(row).collect();
    let heading =
        ["SEEN BY", "SOURCE", "DESTINATION", "SERVICE", "DIALLED", "SECURITY", "SENT", "RECEIVED", "AGE"];
    table(heading, &rows)
}

fn row(connection: &ConnectionView) -> [String; 9] {
    let service = match (&connection.destination_service_namespace, &connection.destination_service) {
        (Some(namespace), Some(name)) => format!("{namespace}/{name}"),
        _ => "-".into(),
    };
    [
        connection.reporter.clone(),
        peer(&connection.source),
        peer(&connection.destination),
        service,
        connection.dialled_address.clone(),
        connection.security.clone(),
        bytes(connection.sent_bytes),
        bytes(connection.received_bytes),
        age(connection.age_seconds),
    ]
}

fn peer(peer: &PeerView) -> String {
    match (&peer.namespace, &peer.pod) {
        (Some(namespace), Some(pod)) => format!("{namespace}/{pod}"),
        _ => peer.address.clone(),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn the_table_shows_pods_by_name_and_others_by_address() {
        let connection = |age_seconds, source: &str| -> ConnectionView {
            serde_json::from_value(serde_json::json!({
                "opened": null, "age_seconds": age_seconds, "reporter": "source",
                "source": { "workload": "web", "namespace": "shop", "pod": source, "address": "10.0.0.1:40000" },
                "destination": { "workload": null, "namespace": null, "pod": null, "address": "[fd00::2]:5432" },
                "destination_service": "db", "destination_service_namespace": "shop", "security": "same_node",
                "dialled_address": "10.96.0.7:5432", "client_address": "10.0.0.1:40000", "upstream_address": null,
                "sent_bytes": 5, "received_bytes": 204_800
            }))
            .unwrap()
        };
        expect![[r#"
            SEEN BY  SOURCE       DESTINATION     SERVICE  DIALLED         SECURITY   SENT  RECEIVED  AGE
            source   shop/web-10  [fd00::2]:5432  shop/db  10.96.0.7:5432  same_node  5 B   200 KiB   2m05s
            source   shop/web-0   [fd00::2]:5432  shop/db  10.96.0.7:5432  same_node  5 B   200 KiB   1s
        "#]]
        .assert_eq(&as_table(vec![connection(1.5, "web-0"), connection(125.0, "web-10")]));
        assert_eq!(as_table(Vec::new()), "no open connections\n");
    }
}
