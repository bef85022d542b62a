//! The server's node: whether a pod of it lets something in.

use std::net::{IpAddr, SocketAddr};

use ::http::Request;

use super::{PolicyView, RuleView, ServerSide, VerdictView};
use crate::model::{MtlsMode, SpiffeId};
use crate::policy::authorization::{Action, Considered, Decision, Found, OnConnection, Set, Verdict};
use crate::proxy::admission::{Caller, Door};
use crate::proxy::{Proxy, http};
use crate::snapshot::Snapshot;

/// Who comes, and how.
pub(super) struct Visit {
    pub(super) identity: Option<SpiffeId>,
    pub(super) address: IpAddr,
    pub(super) is_plaintext: bool,
    pub(super) request: Option<Request<()>>,
}

pub(super) fn answer(proxy: &Proxy, snapshot: &Snapshot, to: SocketAddr, visit: &Visit) -> ServerSide {
    let Some(net) = proxy.enrolled.load().get(&to.ip()).cloned() else {
        let pod = snapshot.workload(to.ip());
        let here = pod.filter(|pod| pod.node.as_deref() == Some(&*proxy.telemetry.status().node));
        let why = match here {
            Some(pod) => format!("pod {} is not in the mesh, and takes whatever comes", pod.pod),
            None => format!("no pod of this node has the address {}", to.ip()),
        };
        let verdict = if here.is_some() { VerdictView::Allowed } else { VerdictView::Unknown };
        return ServerSide { pod: pod.map(|pod| pod.pod.to_string()), ..ServerSide::new(to, verdict, why) };
    };
    let pod = snapshot.workloads.get(&net.workload.uid).unwrap_or(&net.workload);
    let door = Door { pod: pod.uid.clone(), address: to };
    let caller = Caller { identity: visit.identity.clone(), address: visit.address };
    let policies = door.policies(snapshot);
    let mut side = match policies {
        Some(policies) => judged(proxy, policies, to, &caller, visit.request.as_ref()),
        None => ServerSide::new(to, VerdictView::Allowed, "no policy is for this pod".into()),
    };
    if visit.is_plaintext && pod.mtls_at(to.port()) == MtlsMode::Strict {
        let by: Vec<_> = pod.mtls_by.iter().map(ToString::to_string).collect();
        let by = if by.is_empty() { "the agent's settings".into() } else { by.join(", ") };
        let why = format!("plaintext is refused: mutual TLS is strict at port {} by {by}", to.port());
        (side.verdict, side.why, side.bytes, side.would_be) = (VerdictView::Denied, why, None, None);
    }
    ServerSide { pod: Some(pod.pod.to_string()), ..side }
}

/// By policies.
fn judged(
    proxy: &Proxy,
    policies: &Set,
    to: SocketAddr,
    caller: &Caller,
    request: Option<&Request<()>>,
) -> ServerSide {
    let connection = caller.at(to.port());
    let seen = |ask: &mut dyn FnMut(&crate::policy::authorization::Request<'_>) -> ServerSide| {
        request.map(|request| http::as_policies_see_it(&proxy.settings.paths, request, ask))
    };
    let decided = |decision: &Decision, considered: &[Considered<'_>]| {
        let would_be = decision.dry.as_ref().map(|dry| match dry.verdict() {
            Verdict::Allowed => format!("would be {dry}"),
            Verdict::Denied => format!("would not be let in: {dry}"),
        });
        ServerSide {
            would_be,
            audited: decision.audited.iter().map(ToString::to_string).collect(),
            policies: considered.iter().map(PolicyView::of).collect(),
            ..ServerSide::new(to, verdict(decision), decision.outcome.to_string())
        }
    };
    let mut side = match policies.connection(&connection) {
        OnConnection::Decided(decision) => {
            let of_request =
                seen(&mut |asked| decided(&decision, &policies.considered(&connection, Some(asked))));
            // What decides without requests does so whatever is asked for.
            of_request
                .and_then(Result::ok)
                .unwrap_or_else(|| decided(&decision, &policies.considered(&connection, None)))
        }
        OnConnection::ByRequest => {
            let of_request = seen(&mut |asked| {
                decided(&policies.request(&connection, asked), &policies.considered(&connection, Some(asked)))
            });
            match of_request {
                Some(Ok(side)) => side,
                Some(Err(why)) => {
                    ServerSide::new(to, VerdictView::Denied, format!("answered with 400: {why}"))
                }
                None => {
                    let bytes = policies.bytes(&connection);
                    ServerSide {
                        bytes: Some((verdict(&bytes), bytes.outcome.to_string())),
                        policies: policies.considered(&connection, None).iter().map(PolicyView::of).collect(),
                        ..ServerSide::new(to, VerdictView::Depends, "it depends on what is asked for".into())
                    }
                }
            }
        }
    };
    let covered = policies.covered();
    side.never = covered
        .iter()
        .map(|(rule, by)| format!("{rule} never lets anything in: {by} denies it all"))
        .collect();
    side
}

fn verdict(decision: &Decision) -> VerdictView {
    if decision.is_allowed() { VerdictView::Allowed } else { VerdictView::Denied }
}

impl PolicyView {
    fn of(considered: &Considered<'_>) -> Self {
        let policy = &considered.applied.policy;
        Self {
            name: policy.name.to_string(),
            action: match policy.action {
                Action::Allow => "Allow".into(),
                Action::Deny => "Deny".into(),
                Action::Audit => "Audit".into(),
            },
            dry_run: policy.dry_run,
            invalid: policy.invalid.as_ref().map(ToString::to_string),
            is_for_port: considered.is_here,
            rules: (1..).zip(&considered.rules).map(|(rule, found)| RuleView::of(rule, found)).collect(),
        }
    }
}

impl RuleView {
    fn of(rule: usize, found: &Found) -> Self {
        let (matches, failed) = match found {
            Found::Matches => ("yes", None),
            Found::Depends { on } => ("depends", Some(on.clone())),
            Found::Fails { failed } => ("no", Some(failed.clone())),
        };
        Self { rule, matches: matches.into(), failed }
    }
}
