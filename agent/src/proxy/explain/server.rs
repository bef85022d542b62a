//! The server's node: whether a pod of it lets something in.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use ::http::Request;

use super::{PolicyView, RuleView, ServerSide, VerdictView};
use crate::model::{MtlsMode, SpiffeId};
use crate::policy::authorization::{self, Action, Considered, Decision, Found, OnConnection, Set, Verdict};
use crate::policy::jwt::Rules;
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
    let asked =
        Asking { proxy, tokens: door.tokens(snapshot).map(Arc::as_ref), request: visit.request.as_ref() };
    let mut side = match door.policies(snapshot) {
        Some(policies) => asked.judged(policies, to, &caller),
        None => asked.unjudged(to),
    };
    if visit.is_plaintext && pod.mtls_at(to.port()) == MtlsMode::Strict {
        let by: Vec<_> = pod.mtls_by.iter().map(ToString::to_string).collect();
        let by = if by.is_empty() { "the agent's settings".into() } else { by.join(", ") };
        let why = format!("plaintext is refused: mutual TLS is strict at port {} by {by}", to.port());
        (side.verdict, side.why, side.bytes, side.would_be) = (VerdictView::Denied, why, None, None);
    }
    ServerSide { pod: Some(pod.pod.to_string()), ..side }
}

/// What is asked of a pod.
struct Asking<'a> {
    proxy: &'a Proxy,
    tokens: Option<&'a Rules>,
    request: Option<&'a Request<()>>,
}

impl Asking<'_> {
    /// Where no policy is for the pod.
    fn unjudged(&self, to: SocketAddr) -> ServerSide {
        match self.seen(|_| ()) {
            Some(Err(why)) if self.tokens.is_some() => ServerSide::new(to, VerdictView::Denied, why),
            _ => ServerSide::new(to, VerdictView::Allowed, "no policy is for this pod".into()),
        }
    }

    /// By policies.
    fn judged(&self, policies: &Set, to: SocketAddr, caller: &Caller) -> ServerSide {
        let connection = caller.at(to.port());
        let mut side = match policies.connection(&connection) {
            // What is decided without requests is so whatever is asked for; a token that does not hold comes before what lets in.
            OnConnection::Decided(decision) => {
                match self.seen(|asked| policies.considered(&connection, Some(asked))) {
                    Some(Err(why)) if decision.is_allowed() && self.tokens.is_some() => {
                        ServerSide::new(to, VerdictView::Denied, why)
                    }
                    Some(Ok(considered)) => decided(to, &decision, &considered),
                    _ => decided(to, &decision, &policies.considered(&connection, None)),
                }
            }
            OnConnection::ByRequest => {
                let by_request = self.seen(|asked| {
                    let decision = policies.request(&connection, asked);
                    decided(to, &decision, &policies.considered(&connection, Some(asked)))
                });
                match by_request {
                    Some(Ok(side)) => side,
                    Some(Err(why)) => ServerSide::new(to, VerdictView::Denied, why),
                    None => {
                        let (bytes, considered) =
                            (policies.bytes(&connection), policies.considered(&connection, None));
                        let why = "it depends on what is asked for".to_owned();
                        ServerSide {
                            bytes: Some((verdict(&bytes), bytes.outcome.to_string())),
                            policies: considered.iter().map(PolicyView::of).collect(),
                            ..ServerSide::new(to, VerdictView::Depends, why)
                        }
                    }
                }
            }
        };
        side.never = policies.never().iter().map(ToString::to_string).collect();
        side
    }

    /// The request as policies see it, if there is one.
    fn seen<T>(&self, ask: impl FnOnce(&authorization::Request<'_>) -> T) -> Option<Result<T, String>> {
        self.request.map(|request| http::as_policies_see_it(self.proxy, self.tokens, request, ask))
    }
}

fn decided(to: SocketAddr, decision: &Decision, considered: &[Considered<'_>]) -> ServerSide {
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
