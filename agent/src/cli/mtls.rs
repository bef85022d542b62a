//! `undermesh mtls readiness`: who would be kept out if workloads took mutual TLS alone.
//!
//! It says "nobody" only where that is known: where every agent could be asked, and has watched for as long as was asked about.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::agents::{AgentsArgs, Answer, Answers};
use super::connections::OutputFormat;
use super::print;
use super::table::{age, table};
use super::time::parse_time;
use crate::admin::view::{CallerView, PlaintextView, WatchedView};

/// What agents remember.
const LONGEST_WINDOW: Duration = Duration::from_secs(86_400);

/// Looks after mutual TLS between the pods
#[derive(Args, Clone, Debug)]
pub struct MtlsArgs {
    #[command(subcommand)]
    command: MtlsCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum MtlsCommand {
    Readiness(ReadinessArgs),
}

/// Shows who calls in plaintext, and would be refused under strict mutual TLS
///
/// Exit code 0: nobody would be refused. 1: somebody would. 2: it cannot be told for sure, whether or not somebody is known.
#[derive(Args, Clone, Debug)]
struct ReadinessArgs {
    /// The namespace of the workloads that are called; all unless given
    namespace: Option<String>,
    /// How long ago calls may be that count, at most 24h
    #[arg(long, value_name = "TIME", default_value = "24h", value_parser = window)]
    window: Duration,
    #[command(flatten)]
    agents: AgentsArgs,
    /// How to print it
    #[arg(long, short, value_enum, default_value_t)]
    output: OutputFormat,
}

fn window(text: &str) -> Result<Duration, String> {
    let window = parse_time(text)?;
    if window <= LONGEST_WINDOW { Ok(window) } else { Err("agents remember 24 hours".into()) }
}

/// Runs the command.
pub fn run(args: &MtlsArgs) -> ExitCode {
    let MtlsCommand::Readiness(args) = &args.command;
    let report = Report::of(&args.agents.ask("/debug/plaintext"), args.namespace.as_deref(), args.window);
    print::report(&report, args.output, Report::as_text, report.exit_code())
}

/// What the agents know together.
#[derive(Debug, Serialize)]
struct Report {
    window_seconds: u64,
    /// Whether all is known that was asked about.
    complete: bool,
    /// Why not, a sentence each.
    incomplete: Vec<String>,
    workloads: Vec<WorkloadReport>,
}

#[derive(Debug, Serialize)]
struct WorkloadReport {
    namespace: String,
    workload: String,
    /// `permissive`, `strict`, or `mixed` where its pods differ; none where it has no pods now.
    mtls: Option<String>,
    /// Whether it is known that nobody would be refused.
    ready: bool,
    /// For how much of the window it was watched.
    watched_seconds: u64,
    /// Who would be refused.
    callers: Vec<CallerReport>,
}

#[derive(Debug, Serialize)]
struct CallerReport {
    port: u16,
    /// `namespace/workload`, or an address.
    source: String,
    connections: u64,
    first: Option<String>,
    first_seconds: u64,
    last: Option<String>,
    last_seconds: u64,
}

/// What is gathered of a workload.
#[derive(Debug, Default)]
struct Gathered<'v> {
    here: Vec<&'v WatchedView>,
    callers: BTreeMap<(u16, String), CallerReport>,
}

impl Report {
    fn of(asked: &Answers<PlaintextView>, namespace: Option<&str>, window: Duration) -> Self {
        let window = window.as_secs();
        let is_meant = |of: &str| namespace.is_none_or(|namespace| namespace == of);
        let mut incomplete: Vec<_> = asked.missing.iter().map(|why| format!("not asked: {why}")).collect();
        let mut gathered: BTreeMap<(&str, &str), Gathered<'_>> = BTreeMap::new();
        for Answer { page, .. } in &asked.nodes {
            incomplete.extend(shortcomings(page, window));
            for workload in page.workloads.iter().filter(|it| is_meant(&it.namespace)) {
                gathered.entry((&workload.namespace, &workload.workload)).or_default().here.push(workload);
            }
            let callers = page.callers.iter().filter(|caller| is_meant(&caller.namespace));
            for caller in callers.filter(|caller| would_be_refused(caller, window)) {
                gathered.entry((&caller.namespace, &caller.workload)).or_default().add(caller);
            }
        }
        if gathered.is_empty() {
            let where_ =
                namespace.map_or_else(String::new, |namespace| format!(" of the namespace {namespace}"));
            incomplete.push(format!("no pod{where_} is or was in the mesh on the nodes that were asked"));
        }
        let mut workloads: Vec<_> = gathered.into_iter().map(|(id, it)| it.report(id, window)).collect();
        let unwatched =
            workloads.iter().filter(|it| !it.is_strict() && !watches_enough(it.watched_seconds, window));
        if let Some(names) = names(unwatched) {
            incomplete.push(format!("not watched for the whole of {}: {names}", age(window as f64)));
        }
        for workload in &mut workloads {
            workload.ready = workload.callers.is_empty() && (incomplete.is_empty() || workload.is_strict());
        }
        Self { window_seconds: window, complete: incomplete.is_empty(), incomplete, workloads }
    }

    fn exit_code(&self) -> u8 {
        let somebody = self.workloads.iter().any(|workload| !workload.callers.is_empty());
        match (self.complete, somebody) {
            (true, false) => 0,
            (true, true) => 1,
            (false, _) => 2,
        }
    }

    fn as_text(&self) -> String {
        let mut text = String::new();
        if !self.workloads.is_empty() {
            let rows: Vec<_> = self.workloads.iter().map(WorkloadReport::row).collect();
            text += &table(["NAMESPACE", "WORKLOAD", "MTLS", "READY", "WATCHED"], &rows);
        }
        let callers: Vec<_> = self.workloads.iter().flat_map(WorkloadReport::caller_rows).collect();
        if !callers.is_empty() {
            text += "\nwould be refused:\n";
            text += &table(["CALLED", "PORT", "BY", "CONNECTIONS", "FIRST", "LAST"], &callers);
        }
        for why in &self.incomplete {
            // Writing to a String cannot fail.
            let _ = write!(text, "\nincomplete: {}", why.replace(char::is_control, "?"));
        }
        if !self.incomplete.is_empty() {
            text.push('\n');
        }
        text
    }
}

/// The first few.
fn names<'w>(workloads: impl Iterator<Item = &'w WorkloadReport>) -> Option<String> {
    const SHOWN: usize = 5;
    let all: Vec<_> = workloads.map(|it| format!("{}/{}", it.namespace, it.workload)).collect();
    let first = all.iter().take(SHOWN).cloned().collect::<Vec<_>>().join(", ");
    match all.len() {
        0 => None,
        1..=SHOWN => Some(first),
        count => Some(format!("{first} and {} more", count - SHOWN)),
    }
}

/// Why an agent does not know all that happened within the window.
fn shortcomings(page: &PlaintextView, window: u64) -> Vec<String> {
    let PlaintextView { node, watching_seconds, watching_since, missed, .. } = page;
    let mut all = Vec::new();
    if !watches_enough(*watching_seconds, window) {
        let since = watching_since.as_ref().map_or_else(String::new, |since| format!(", since {since}"));
        let watched = age(*watching_seconds as f64);
        all.push(format!("the agent of {node} has watched for {watched} only{since}"));
    }
    if let Some(missed) = missed.as_ref().filter(|missed| missed.last_seconds <= window) {
        let count = missed.connections;
        all.push(format!(
            "{node} had more callers than an agent remembers: {count} connections are not listed"
        ));
    }
    all
}

/// So much of the time may be missing: a workload that moves from node to node is between them for a moment.
fn watches_enough(watched: u64, window: u64) -> bool {
    watched + (window / 100).min(60) >= window
}

/// Whether strict would change anything for it.
fn would_be_refused(caller: &CallerView, window: u64) -> bool {
    caller.calls.last_seconds <= window && caller.mtls.as_deref() != Some("strict")
}

impl Gathered<'_> {
    fn add(&mut self, caller: &CallerView) {
        let source = match (&caller.source_namespace, &caller.source_workload, &caller.source_address) {
            (Some(namespace), Some(workload), _) => format!("{namespace}/{workload}"),
            (_, _, Some(address)) => address.clone(),
            _ => "unknown".into(),
        };
        let calls = &caller.calls;
        let report = self.callers.entry((caller.port, source.clone())).or_insert_with(|| CallerReport {
            port: caller.port,
            source,
            connections: 0,
            first: None,
            first_seconds: 0,
            last: None,
            last_seconds: u64::MAX,
        });
        report.connections += calls.connections;
        if calls.first_seconds >= report.first_seconds {
            (report.first, report.first_seconds) = (calls.first.clone(), calls.first_seconds);
        }
        if calls.last_seconds < report.last_seconds {
            (report.last, report.last_seconds) = (calls.last.clone(), calls.last_seconds);
        }
    }

    fn report(self, (namespace, workload): (&str, &str), window: u64) -> WorkloadReport {
        let modes = self.here.iter().filter_map(|it| it.mtls.clone());
        let mtls = modes.reduce(|a, b| if a == b { a } else { "mixed".into() });
        let callers: Vec<_> = self.callers.into_values().collect();
        WorkloadReport {
            namespace: namespace.into(),
            workload: workload.into(),
            mtls,
            // To be said when all is known of all.
            ready: false,
            watched_seconds: watched(&self.here, window),
            callers,
        }
    }
}

/// How much of the last so many seconds it was watched on one node or another.
fn watched(here: &[&WatchedView], window: u64) -> u64 {
    let mut spans: Vec<_> =
        here.iter().map(|it| (it.watched_seconds.min(window), it.unwatched_seconds)).collect();
    spans.sort_unstable_by(|a, b| b.cmp(a));
    // From the oldest on: what is before this many seconds ago is counted.
    let (mut counted, mut watched) = (window, 0);
    for (from, to) in spans {
        let from = from.min(counted);
        if from > to {
            watched += from - to;
            counted = to;
        }
    }
    watched
}

impl WorkloadReport {
    fn is_strict(&self) -> bool {
        self.mtls.as_deref() == Some("strict")
    }

    fn row(&self) -> [String; 5] {
        let ready = match (self.ready, self.callers.is_empty()) {
            (true, _) if self.is_strict() => "is strict",
            (true, _) => "yes",
            (false, true) => "unknown",
            (false, false) => "no",
        };
        [
            self.namespace.clone(),
            self.workload.clone(),
            self.mtls.clone().unwrap_or_else(|| "-".into()),
            ready.into(),
            age(self.watched_seconds as f64),
        ]
    }

    fn caller_rows(&self) -> impl Iterator<Item = [String; 6]> {
        let ago = |seconds: u64| format!("{} ago", age(seconds as f64));
        self.callers.iter().map(move |caller| {
            [
                format!("{}/{}", self.namespace, self.workload),
                caller.port.to_string(),
                caller.source.clone(),
                caller.connections.to_string(),
                ago(caller.first_seconds),
                ago(caller.last_seconds),
            ]
        })
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::{Value, json};

    use super::*;

    const HOUR: u64 = 3_600;

    fn watched_here(workload: &str, mtls: &str, hours: u64, until: u64) -> Value {
        let pods = usize::from(until == 0);
        json!({
            "namespace": "shop", "workload": workload, "pods": pods, "mtls": (pods > 0).then_some(mtls),
            "watched_since": null, "watched_seconds": hours * HOUR, "unwatched_seconds": until * HOUR,
        })
    }

    /// `web -> pay:80 permissive, 3 from 5 to 2`, in hours ago.
    fn caller(text: &str) -> Value {
        let words: Vec<_> = text.split([' ', ':', ',']).filter(|word| !word.is_empty()).collect();
        let [source, "->", workload, port, mtls, connections, "from", first, "to", last] = words[..] else {
            panic!("{words:?}")
        };
        let number = |text: &str| text.parse::<u64>().unwrap();
        let is_address = source.contains('.');
        json!({
            "namespace": "shop", "workload": workload, "port": number(port), "mtls": mtls,
            "source_namespace": (!is_address).then_some("legacy"), "source_workload": (!is_address).then_some(source),
            "source_address": is_address.then_some(source), "connections": number(connections),
            "first": null, "first_seconds": number(first) * HOUR, "last": null, "last_seconds": number(last) * HOUR,
        })
    }

    fn page(node: &str, hours: u64, workloads: &[Value], callers: &[&str]) -> PlaintextView {
        serde_json::from_value(json!({
            "node": node, "watching_since": "2027-01-15T08:00:00.000Z", "watching_seconds": hours * HOUR,
            "memory_seconds": 24 * HOUR, "workloads": workloads, "missed": null,
            "callers": callers.iter().map(|text| caller(text)).collect::<Vec<_>>(),
        }))
        .unwrap()
    }

    fn check(answers: &[PlaintextView], missing: &[&str], hours: u64, exit_code: u8, expected: Expect) {
        let missing = missing.iter().map(ToString::to_string).collect();
        let nodes = answers.iter().map(|page| Answer::new(page.node.clone(), page.clone(), 0)).collect();
        let answers = Answers { nodes, missing };
        let report = Report::of(&answers, Some("shop"), Duration::from_secs(hours * HOUR));
        expected.assert_eq(&report.as_text());
        assert_eq!(report.exit_code(), exit_code);
    }

    #[test]
    fn nobody_would_be_refused_where_nobody_called() {
        let workloads = [watched_here("pay", "permissive", 30, 0), watched_here("db", "strict", 30, 0)];
        check(
            &[page("n1", 30, &workloads, &[])],
            &[],
            24,
            0,
            expect![[r#"
            NAMESPACE  WORKLOAD  MTLS        READY      WATCHED
            shop       db        strict      is strict  1d00h
            shop       pay       permissive  yes        1d00h
        "#]],
        );
    }

    #[test]
    fn callers_of_all_nodes_are_put_together() {
        let workloads = [watched_here("pay", "permissive", 30, 0)];
        let first = page(
            "n1",
            30,
            &workloads,
            &["cron -> pay:80 permissive, 3 from 9 to 2", "10.0.0.9 -> pay:81 permissive, 1 from 1 to 1"],
        );
        let second = page("n2", 30, &workloads, &["cron -> pay:80 permissive, 4 from 12 to 5"]);
        check(
            &[first, second],
            &[],
            24,
            1,
            expect![[r#"
            NAMESPACE  WORKLOAD  MTLS        READY  WATCHED
            shop       pay       permissive  no     1d00h

            would be refused:
            CALLED    PORT  BY           CONNECTIONS  FIRST       LAST
            shop/pay  80    legacy/cron  7            12h00m ago  2h00m ago
            shop/pay  81    10.0.0.9     1            1h00m ago   1h00m ago
        "#]],
        );
    }

    #[test]
    fn whoever_called_too_long_ago_or_where_it_is_strict_already_does_not_count() {
        let workloads = [watched_here("pay", "permissive", 30, 0), watched_here("db", "strict", 30, 0)];
        let callers = ["cron -> pay:80 permissive, 3 from 9 to 7", "cron -> db:80 strict, 3 from 9 to 1"];
        check(
            &[page("n1", 30, &workloads, &callers)],
            &[],
            6,
            0,
            expect![[r#"
            NAMESPACE  WORKLOAD  MTLS        READY      WATCHED
            shop       db        strict      is strict  6h00m
            shop       pay       permissive  yes        6h00m
        "#]],
        );
    }

    #[test]
    fn what_is_not_known_is_said() {
        let workloads = [watched_here("pay", "permissive", 5, 0)];
        check(
            &[page("n1", 5, &workloads, &[])],
            &["no agent at 10.0.0.1:15020"],
            24,
            2,
            expect![[r#"
            NAMESPACE  WORKLOAD  MTLS        READY    WATCHED
            shop       pay       permissive  unknown  5h00m

            incomplete: not asked: no agent at 10.0.0.1:15020
            incomplete: the agent of n1 has watched for 5h00m only, since 2027-01-15T08:00:00.000Z
            incomplete: not watched for the whole of 1d00h: shop/pay
        "#]],
        );
        check(
            &[page("n1", 30, &[], &[])],
            &[],
            24,
            2,
            expect![[r#"

            incomplete: no pod of the namespace shop is or was in the mesh on the nodes that were asked
        "#]],
        );
        let mut crowded = page("n1", 30, &[watched_here("pay", "mixed", 30, 0)], &[]);
        crowded.missed = serde_json::from_value(
            json!({ "connections": 7, "first": null, "first_seconds": 60, "last": null, "last_seconds": 60 }),
        )
        .unwrap();
        check(
            &[crowded],
            &[],
            24,
            2,
            expect![[r#"
            NAMESPACE  WORKLOAD  MTLS   READY    WATCHED
            shop       pay       mixed  unknown  1d00h

            incomplete: n1 had more callers than an agent remembers: 7 connections are not listed
        "#]],
        );
    }

    #[test]
    fn a_workload_that_moves_between_nodes_is_watched_all_the_time() {
        let first = page("n1", 30, &[watched_here("pay", "permissive", 30, 10)], &[]);
        let second = |hours| page("n2", 30, &[watched_here("pay", "permissive", hours, 0)], &[]);
        check(
            &[first.clone(), second(12)],
            &[],
            24,
            0,
            expect![[r#"
                NAMESPACE  WORKLOAD  MTLS        READY  WATCHED
                shop       pay       permissive  yes    1d00h
            "#]],
        );
        check(
            &[first, second(8)],
            &[],
            24,
            2,
            expect![[r#"
                NAMESPACE  WORKLOAD  MTLS        READY    WATCHED
                shop       pay       permissive  unknown  22h00m

                incomplete: not watched for the whole of 1d00h: shop/pay
            "#]],
        );
    }
}
