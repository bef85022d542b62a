//! `undermesh connections`: who talks to whom through this node's agent, now.

use std::process::ExitCode;

use clap::{Args, ValueEnum};

use super::agents::{AgentsArgs, Answer, Naming};
use super::table::{age, bytes, table};
use crate::admin::view::{BeforeView, ConnectionView, ConnectionsView, EarlierView, PeerView, PodBeforeView};

/// Lists the connections that are open through the agent of this node
#[derive(Args, Clone, Debug)]
pub struct ConnectionsArgs {
    /// List those instead that pods had before they were enrolled, and that nobody carries
    #[arg(long)]
    before_enrolment: bool,
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
    match args.before_enrolment {
        true => args.agents.show("/debug/before", args.output, before_as_table),
        false => args.agents.show("/debug/connections", args.output, as_table),
    }
}

fn before_as_table(answers: &[Answer<BeforeView>], naming: Naming) -> String {
    let row = |pod: &PodBeforeView, connection: &EarlierView| {
        let EarlierView { direction, local_address, peer_address, peer } = connection;
        let peer = peer.clone().unwrap_or_else(|| "-".into());
        [
            format!("{}/{}", pod.namespace, pod.pod),
            direction.clone(),
            local_address.clone(),
            peer_address.clone(),
            peer,
        ]
    };
    let mut rows = Vec::new();
    for answer in answers {
        for pod in &answer.page.pods {
            rows.extend(pod.connections.iter().map(|connection| naming.row(answer, row(pod, connection))));
        }
    }
    if rows.is_empty() {
        return "no connections from before their pods were enrolled\n".into();
    }
    table(naming.heading(["POD", "DIRECTION", "OWN ADDRESS", "PEER ADDRESS", "PEER"]), &rows)
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
        let before: BeforeView = serde_json::from_value(serde_json::json!({ "pods": [
            { "namespace": "shop", "pod": "db-0", "connections": [
                { "direction": "inbound", "local_address": "10.0.0.2:5432", "peer_address": "10.0.0.9:40000",
                  "peer": null },
                { "direction": "outbound", "local_address": "10.0.0.2:40001", "peer_address": "10.96.0.7:80",
                  "peer": "Service shop/web" },
            ] },
        ] }))
        .unwrap();
        expect![[r#"
            POD        DIRECTION  OWN ADDRESS     PEER ADDRESS    PEER
            shop/db-0  inbound    10.0.0.2:5432   10.0.0.9:40000  -
            shop/db-0  outbound   10.0.0.2:40001  10.96.0.7:80    Service shop/web
        "#]]
        .assert_eq(&before_as_table(&[Answer::new("n1".into(), before, 0)], Naming::Needless));
        assert_eq!(as_table(&[node("n1", Vec::new())], Naming::Needless), "no open connections\n");
    }
}
