//! `undermesh status`: how this node's agent and its pods fare.

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;

use super::agents::{AgentsArgs, Answer, Naming};
use super::connections::OutputFormat;
use super::table::table;
use crate::admin::view::{PodView, StatusView};

/// Shows the pods of this node, what was rejected, and whether the agent is ready
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    #[command(flatten)]
    agents: AgentsArgs,
    /// How to print it
    #[arg(long, short, value_enum, default_value_t)]
    pub output: OutputFormat,
}

/// Runs the command.
pub fn run(args: &StatusArgs) -> ExitCode {
    args.agents.show("/debug/status", args.output, as_text)
}

fn as_text(answers: &[Answer<StatusView>], naming: Naming) -> String {
    let mut text = String::new();
    for Answer { page: status, .. } in answers {
        let ready = if status.ready { "ready" } else { "not ready" };
        // Writing to a String cannot fail.
        let _ = writeln!(
            text,
            "undermesh {} on node {}: {ready}, configuration {}",
            status.version, status.node, status.generation
        );
    }
    let mut list = |title: &str, lines: Vec<String>| {
        for (i, line) in lines.iter().enumerate() {
            let title = if i == 0 { format!("\n{title}\n") } else { String::new() };
            let _ = writeln!(text, "{title}  {line}");
        }
    };
    let of_nodes = |lines: &dyn Fn(&StatusView) -> Vec<String>| {
        let of_node = |answer: &Answer<StatusView>| {
            let lines = lines(&answer.page);
            lines.iter().map(|line| naming.line(answer, line)).collect::<Vec<_>>()
        };
        answers.iter().flat_map(of_node).collect()
    };
    list("waiting:", of_nodes(&|status| status.missing.clone()));
    list("warnings:", of_nodes(&|status| status.warnings.clone()));
    list(
        "configuration of an agent before this one:",
        of_nodes(&|status| {
            status.as_of.iter().map(|time| format!("as of {time}; the API server does not answer")).collect()
        }),
    );
    list(
        "rejected documents:",
        of_nodes(&|status| status.rejections.iter().map(|rejection| rejection.text.clone()).collect()),
    );
    text.push('\n');
    let rows: Vec<_> = answers
        .iter()
        .flat_map(|answer| answer.page.pods.iter().map(move |pod| naming.row(answer, row(pod))))
        .collect();
    match (rows.is_empty(), naming) {
        (true, Naming::Needless) => text.push_str("no pods on this node\n"),
        (true, Naming::Needed) => text.push_str("no pods on these nodes\n"),
        (false, _) => {
            let heading = ["NAMESPACE", "POD", "STATE", "SINCE", "MTLS", "POLICIES", "REASON"];
            text.push_str(&table(naming.heading(heading), &rows));
        }
    }
    text
}

/// The policies that are named; there may be thousands.
const MOST_POLICIES: usize = 3;

fn row(pod: &PodView) -> [String; 7] {
    let or_dash = |text: &Option<String>| text.clone().unwrap_or_else(|| "-".into());
    let named = pod.policies.iter().take(MOST_POLICIES).cloned().collect::<Vec<_>>().join(",");
    let policies = match pod.policies.len() {
        0 => "-".into(),
        1..=MOST_POLICIES => named,
        all => format!("{named} and {} more", all - MOST_POLICIES),
    };
    let (since, mtls, detail) = (or_dash(&pod.since), or_dash(&pod.mtls), or_dash(&pod.detail));
    [pod.namespace.clone(), pod.name.clone(), pod.state.clone(), since, mtls, policies, detail]
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn all_that_is_amiss_stands_above_the_pods() {
        let status: StatusView = serde_json::from_value(serde_json::json!({
            "version": "0.1.0", "node": "node-1", "generation": 4, "ready": false,
            "missing": ["pod shop/db-0 is being enrolled"],
            "warnings": ["whoever is on the node's own network is let in"],
            "as_of": "2027-01-15T08:00:00Z",
            "rejections": [{
                "origin": "a.yaml", "line": 3, "object": null, "field": null, "message": "no kind",
                "text": "a.yaml:3: no kind"
            }],
            "pods": [
                { "namespace": "shop", "name": "db-0", "uid": null, "state": "pending", "since": null,
                  "reason": null, "detail": null },
                { "namespace": "shop", "name": "host-0", "uid": "1", "state": "not_enrolled", "since": null,
                  "reason": "impossible", "detail": "it uses the host's network" },
                { "namespace": "shop", "name": "web-0", "uid": "2", "state": "enrolled", "since": null,
                  "reason": null, "detail": null, "mtls": "strict",
                  "policies": ["mesh/all", "shop/a", "shop/b", "shop/c", "shop/d"] },
            ]
        }))
        .unwrap();
        expect![[r#"
            undermesh 0.1.0 on node node-1: not ready, configuration 4

            waiting:
              pod shop/db-0 is being enrolled

            warnings:
              whoever is on the node's own network is let in

            configuration of an agent before this one:
              as of 2027-01-15T08:00:00Z; the API server does not answer

            rejected documents:
              a.yaml:3: no kind

            NAMESPACE  POD     STATE         SINCE  MTLS    POLICIES                           REASON
            shop       db-0    pending       -      -       -                                  -
            shop       host-0  not_enrolled  -      -       -                                  it uses the host's network
            shop       web-0   enrolled      -      strict  mesh/all,shop/a,shop/b and 2 more  -
        "#]]
        .assert_eq(&as_text(&[Answer::new("node-1".into(), status.clone(), 0)], Naming::Needless));
        let other = StatusView { node: "node-2".into(), missing: Vec::new(), ready: true, ..status.clone() };
        let both = [Answer::new("node-1".into(), status, 0), Answer::new("node-2".into(), other, 1)];
        expect![[r#"
            undermesh 0.1.0 on node node-1: not ready, configuration 4
            undermesh 0.1.0 on node node-2: ready, configuration 4

            waiting:
              node-1: pod shop/db-0 is being enrolled

            warnings:
              node-1: whoever is on the node's own network is let in
              node-2: whoever is on the node's own network is let in

            configuration of an agent before this one:
              node-1: as of 2027-01-15T08:00:00Z; the API server does not answer
              node-2: as of 2027-01-15T08:00:00Z; the API server does not answer

            rejected documents:
              node-1: a.yaml:3: no kind
              node-2: a.yaml:3: no kind

            NODE    NAMESPACE  POD     STATE         SINCE  MTLS    POLICIES                           REASON
            node-1  shop       db-0    pending       -      -       -                                  -
            node-1  shop       host-0  not_enrolled  -      -       -                                  it uses the host's network
            node-1  shop       web-0   enrolled      -      strict  mesh/all,shop/a,shop/b and 2 more  -
            node-2  shop       db-0    pending       -      -       -                                  -
            node-2  shop       host-0  not_enrolled  -      -       -                                  it uses the host's network
            node-2  shop       web-0   enrolled      -      strict  mesh/all,shop/a,shop/b and 2 more  -
        "#]]
        .assert_eq(&as_text(&both, Naming::Needed));
    }
}
