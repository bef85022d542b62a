//! `undermesh connections`: who talks to whom through this node's agent, now.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::agents::{AgentsArgs, Answer, Naming};
use super::table::{age, bytes, table};
use crate::admin::view::{ConnectionView, ConnectionsView, PeerView};

/// Lists the connections that are open through the agent of this node
#[derive(Args, Clone, Debug)]
pub struct ConnectionsArgs {
    #[command(flatten)]
    agents: AgentsArgs,
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
    args.agents.show("/debug/connections", args.output, as_table)
}

/// The oldest first.
fn as_table(answers: &[Answer<ConnectionsView>], naming: Naming) -> String {
    let of_node = |answer| {
        let Answer { page, .. }: &Answer<ConnectionsView> = answer;
        page.connections.iter().map(move |connection| (answer, connection))
    };
    let mut all: Vec<_> = answers.iter().flat_map(of_node).collect();
    if all.is_empty() {
        return "no open connections\n".into();
    }
    all.sort_by(|(_, a), (_, b)| b.age_seconds.total_cmp(&a.age_seconds));
    let rows: Vec<_> = all.iter().map(|(answer, connection)| naming.row(answer, row(connection))).collect();
    let heading =
        ["SEEN BY", "SOURCE", "DESTINATION", "SERVICE", "DIALLED", "SECURITY", "SENT", "RECEIVED", "AGE"];
    table(naming.heading(heading), &rows)
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
        let node = |node: &str, connections| Answer::new(node.into(), ConnectionsView { connections }, 0);
        expect![[r#"
            SEEN BY  SOURCE       DESTINATION     SERVICE  DIALLED         SECURITY   SENT  RECEIVED  AGE
            source   shop/web-10  [fd00::2]:5432  shop/db  10.96.0.7:5432  same_node  5 B   200 KiB   2m05s
            source   shop/web-0   [fd00::2]:5432  shop/db  10.96.0.7:5432  same_node  5 B   200 KiB   1s
        "#]]
        .assert_eq(&as_table(
            &[node("n1", vec![connection(1.5, "web-0"), connection(125.0, "web-10")])],
            Naming::Needless,
        ));
        expect![[r#"
            NODE  SEEN BY  SOURCE       DESTINATION     SERVICE  DIALLED         SECURITY   SENT  RECEIVED  AGE
            n2    source   shop/web-10  [fd00::2]:5432  shop/db  10.96.0.7:5432  same_node  5 B   200 KiB   2m05s
            n1    source   shop/web-0   [fd00::2]:5432  shop/db  10.96.0.7:5432  same_node  5 B   200 KiB   1s
        "#]].assert_eq(&as_table(
            &[node("n1", vec![connection(1.5, "web-0")]), node("n2", vec![connection(125.0, "web-10")])],
            Naming::Needed,
        ));
        assert_eq!(as_table(&[node("n1", Vec::new())], Naming::Needless), "no open connections\n");
    }
}
