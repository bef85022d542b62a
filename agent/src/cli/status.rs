//! `undermesh status`: how this node's agent and its pods fare.

use std::fmt::Write;
use std::net::SocketAddr;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::admin_client::{self, AdminError, DEFAULT_ADMIN_ADDRESS};
use super::connections::OutputFormat;
use super::print;
use super::table::table;
use crate::admin::view::{PodView, StatusView};

/// Shows the pods of this node, what was rejected, and whether the agent is ready
#[derive(Args, Clone, Debug)]
pub struct StatusArgs {
    /// Where the agent's admin server listens
    #[arg(long, value_name = "ADDRESS", default_value = DEFAULT_ADMIN_ADDRESS)]
    pub admin_address: SocketAddr,
    /// How to print it
    #[arg(long, short, value_enum, default_value_t)]
    pub output: OutputFormat,
}

/// Runs the command.
pub fn run(args: &StatusArgs) -> ExitCode {
    print::outcome(show(args))
}

fn show(args: &StatusArgs) -> Result<String, AdminError> {
    const PATH: &str = "/debug/status";
    match args.output {
        OutputFormat::Json => Ok(print::json(&admin_client::get_json::<Value>(args.admin_address, PATH)?)),
        OutputFormat::Table => Ok(as_text(&admin_client::get_json(args.admin_address, PATH)?)),
    }
}

fn as_text(status: &StatusView) -> String {
    let ready = if status.ready { "ready" } else { "not ready" };
    let mut text = format!(
        "undermesh {} on node {}: {ready}, configuration {}\n",
        status.version, status.node, status.generation
    );
    let mut list = |title: &str, lines: &mut dyn Iterator<Item = &String>| {
        for (i, line) in lines.enumerate() {
            let title = if i == 0 { format!("\n{title}\n") } else { String::new() };
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{title}  {}", line.replace(char::is_control, "?"));
        }
    };
    list("waiting:", &mut status.missing.iter());
    list("rejected documents:", &mut status.rejections.iter().map(|rejection| &rejection.text));
    text.push('\n');
    match status.pods.is_empty() {
        true => text.push_str("no pods on this node\n"),
        false => text.push_str(&table(
            ["NAMESPACE", "POD", "STATE", "SINCE", "MTLS", "POLICIES", "REASON"],
            &status.pods.iter().map(row).collect::<Vec<_>>(),
        )),
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

            rejected documents:
              a.yaml:3: no kind

            NAMESPACE  POD     STATE         SINCE  MTLS    POLICIES                           REASON
            shop       db-0    pending       -      -       -                                  -
            shop       host-0  not_enrolled  -      -       -                                  it uses the host's network
            shop       web-0   enrolled      -      strict  mesh/all,shop/a,shop/b and 2 more  -
        "#]]
        .assert_eq(&as_text(&status));
    }
}
