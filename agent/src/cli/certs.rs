//! `undermesh certs`: the certificates of this node, what they lead to, and how long they live.

use std::fmt::Write;
use std::process::ExitCode;

use clap::Args;

use super::agents::{AgentsArgs, Answer, Naming};
use super::connections::OutputFormat;
use super::table::{age, table};
use crate::identity::{CertificateView, CertificatesView, RootView};

/// Shows the certificates of this node's service accounts and the roots that are trusted
#[derive(Args, Clone, Debug)]
pub struct CertsArgs {
    #[command(flatten)]
    agents: AgentsArgs,
    /// How to print them
    #[arg(long, short, value_enum, default_value_t)]
    pub output: OutputFormat,
}

/// Runs the command.
pub fn run(args: &CertsArgs) -> ExitCode {
    args.agents.show("/debug/certs", args.output, as_text)
}

fn as_text(answers: &[Answer<CertificatesView>], naming: Naming) -> String {
    let mut text = String::new();
    for answer in answers {
        let skew = answer
            .page
            .clock_skew_seconds
            .map(|seconds| format!("the clock of this node is {} behind another", age(seconds as f64)));
        for warning in answer.page.warnings.iter().chain(&skew) {
            // Writing to a String cannot fail.
            let _ = writeln!(text, "warning: {}", naming.line(answer, warning));
        }
    }
    if !text.is_empty() {
        text.push('\n');
    }
    let certificates = |answer| {
        let Answer { page, .. }: &Answer<CertificatesView> = answer;
        page.certificates.iter().map(move |it| naming.row(answer, certificate(it)))
    };
    let rows: Vec<_> = answers.iter().flat_map(certificates).collect();
    match (rows.is_empty(), naming) {
        (true, Naming::Needless) => text.push_str("no certificates: no pod of this node needs one\n"),
        (true, Naming::Needed) => text.push_str("no certificates: no pod of these nodes needs one\n"),
        (false, _) => {
            let heading = ["IDENTITY", "LEAF", "ISSUER", "ROOT", "RENEWAL", "SERIAL", "LAST ERROR"];
            text.push_str(&table(naming.heading(heading), &rows));
        }
    }
    let roots = answers.iter().flat_map(|it| it.page.roots.iter().map(move |of| naming.row(it, root(of))));
    let roots: Vec<_> = roots.collect();
    if !roots.is_empty() {
        text.push('\n');
        text.push_str(&table(naming.heading(["TRUST DOMAIN", "ROOT", "LEFT", "SERIAL"]), &roots));
    }
    let mut lists = String::new();
    for answer in answers {
        for crl in &answer.page.crls {
            let until = crl.next_update.as_deref().unwrap_or("the next");
            let state = if crl.expired { "expired at" } else { "valid until" };
            let line =
                format!("revocation list ({}) of {}: {state} {until}", answer.page.crl_mode, crl.issuer);
            let _ = writeln!(lists, "{}", naming.line(answer, &line));
        }
    }
    if !lists.is_empty() {
        text.push('\n');
    }
    text + &lists
}

fn certificate(view: &CertificateView) -> [String; 7] {
    let renewal = match view.renewal_lag_seconds {
        0 => view.renewal_due.clone(),
        lag => format!("late by {}", age(lag as f64)),
    };
    [
        view.identity.clone(),
        left(view.remaining_seconds),
        left(view.issuer_remaining_seconds),
        left(view.root_remaining_seconds),
        renewal,
        view.serial.clone().unwrap_or_else(|| "-".into()),
        view.last_error.clone().unwrap_or_else(|| "-".into()),
    ]
}

fn root(view: &RootView) -> [String; 4] {
    [view.trust_domain.clone(), view.subject.clone(), left(Some(view.remaining_seconds)), view.serial.clone()]
}

fn left(seconds: Option<i64>) -> String {
    match seconds {
        None => "none".into(),
        Some(seconds) if seconds <= 0 => "expired".into(),
        Some(seconds) => age(seconds as f64),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn what_is_amiss_stands_above_the_table() {
        let view: CertificatesView = serde_json::from_value(serde_json::json!({
            "trust_domain": "cluster.local", "crl_mode": "prefer", "clock_skew_seconds": 301,
            "warnings": ["the certificate of spiffe://cluster.local/ns/shop/sa/web expires in 60 s\u{1b}"],
            "certificates": [
                { "identity": "spiffe://cluster.local/ns/shop/sa/web", "serial": "4f01", "not_before": "x",
                  "not_after": "y", "remaining_seconds": 60, "issuer": "CN=root", "issuer_remaining_seconds": 86_400,
                  "root": "CN=root", "root_remaining_seconds": 86_400, "renewal_due": "2027-01-15T08:00:00Z",
                  "renewal_lag_seconds": 3_600, "failures": 3, "last_error": "no answer within 10 s" },
                { "identity": "spiffe://cluster.local/ns/shop/sa/new", "serial": null, "not_before": null,
                  "not_after": null, "remaining_seconds": null, "issuer": null, "issuer_remaining_seconds": null,
                  "root": null, "root_remaining_seconds": null, "renewal_due": "2027-01-15T08:00:00Z",
                  "renewal_lag_seconds": 0, "failures": 0, "last_error": null }
            ],
            "roots": [{ "trust_domain": "cluster.local", "subject": "CN=root", "serial": "40",
                        "not_after": "z", "remaining_seconds": -5 }],
            "crls": [{ "issuer": "CN=root", "next_update": "2027-01-15T08:00:00Z", "expired": true }]
        }))
        .unwrap();
        expect![[r#"
            warning: the certificate of spiffe://cluster.local/ns/shop/sa/web expires in 60 s?
            warning: the clock of this node is 5m01s behind another

            IDENTITY                               LEAF   ISSUER  ROOT   RENEWAL               SERIAL  LAST ERROR
            spiffe://cluster.local/ns/shop/sa/web  1m00s  1d00h   1d00h  late by 1h00m         4f01    no answer within 10 s
            spiffe://cluster.local/ns/shop/sa/new  none   none    none   2027-01-15T08:00:00Z  -       -

            TRUST DOMAIN   ROOT     LEFT     SERIAL
            cluster.local  CN=root  expired  40

            revocation list (prefer) of CN=root: expired at 2027-01-15T08:00:00Z
        "#]].assert_eq(&as_text(&[Answer::new("n1".into(), view, 0)], Naming::Needless));
    }
}
