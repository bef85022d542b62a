//! How AuthorizationPolicies and MeshPolicies stand: what their status says.

use super::{Reason, Refusal};
use crate::config::document::{
    self, Attachment, AuthorizationPolicy, Selector, ServicePort, Target, TargetPort,
};
use crate::model::{Declared, ObjectRef};
use crate::policy::authorization::{Action, Operation, Rule};

/// So many ports are named where rules meet something other than HTTP: a policy may be for the whole mesh.
const MOST_PORTS: usize = 16;

/// How a policy that is well written stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Stated {
    /// The condition `Accepted`; where it holds, what there is to be known of it.
    pub accepted: Result<String, Refusal>,
    /// Why the condition `Enforced` does not hold; nothing is said where it does.
    pub not_enforced: Option<Refusal>,
}

/// How a MeshPolicy stands that is well written.
pub(in crate::config) fn mesh_policy(conflict: Option<String>, selects_nothing: bool) -> Stated {
    let accepted = match conflict {
        Some(message) => Err(Refusal { reason: Reason::Conflicted, message }),
        None => Ok(in_force(false, selects_nothing)),
    };
    Stated { accepted, not_enforced: None }
}

/// How an AuthorizationPolicy stands that is well written; `leading` are the Services that it is for, or that lead to its pods.
pub(in crate::config) fn authorization<'a>(
    policy: &AuthorizationPolicy,
    selects_nothing: bool,
    service: impl Fn(&ObjectRef) -> Option<&'a document::Service>,
    leading: impl Iterator<Item = &'a document::Service>,
) -> Stated {
    let missing: Vec<String> = missing_targets(policy, &service).map(|(_, message)| message).collect();
    let accepted = match missing.is_empty() {
        true => Ok(in_force(policy.policy.dry_run, selects_nothing)),
        false => Err(Refusal { reason: Reason::TargetNotFound, message: missing.join("; ") }),
    };
    Stated { accepted, not_enforced: not_enforced(policy, leading) }
}

/// What of the policy cannot be done at the Services that it is for, or that lead to the pods that it is for.
pub(in crate::config) fn not_enforced<'a>(
    policy: &AuthorizationPolicy,
    leading: impl Iterator<Item = &'a document::Service>,
) -> Option<Refusal> {
    let mut without_http: Vec<String> = leading
        .flat_map(|service| service.ports.iter().map(move |port| (service, port)))
        .filter_map(|(service, port)| not_http(policy, service, port))
        .collect();
    let more = without_http.len().saturating_sub(MOST_PORTS);
    if more > 0 {
        without_http.truncate(MOST_PORTS);
        without_http.push(format!("so it is at {more} more"));
    }
    let message = without_http.join("; ");
    (!message.is_empty()).then_some(Refusal { reason: Reason::NotHttp, message })
}

/// Whether any rule of the policy asks for more than a connection has.
pub(in crate::config) fn asks_for_requests(policy: &AuthorizationPolicy) -> bool {
    policy.policy.rules.iter().any(Rule::is_of_requests)
}

/// The targets that are not there, each in a sentence.
pub(in crate::config) fn missing_targets<'p, 'a>(
    policy: &'p AuthorizationPolicy,
    service: impl Fn(&ObjectRef) -> Option<&'a document::Service>,
) -> impl Iterator<Item = (&'p Target, String)> {
    let is_missing = move |target: &&Target| service(&target.service).is_none();
    let missing = targets(policy).iter().filter(is_missing);
    missing.map(|target| (target, format!("there is no Service {}", target.service)))
}

/// What a policy does that cannot be used.
pub fn what_is_denied(policy: &AuthorizationPolicy) -> String {
    let whole = Selector::default();
    let at = match &policy.attached {
        Attachment::All => "at all pods that it is for".into(),
        Attachment::Pods(selector) if *selector == whole => {
            format!(
                "at all pods of the namespace {}, for what it is for cannot be read",
                policy.key.namespace
            )
        }
        Attachment::Pods(_) => "at the pods that it selects".into(),
        Attachment::Services(_) => "at the Services that it names".to_owned(),
    };
    match policy.policy.dry_run {
        true => format!("until then it is reported that everything would be denied {at}"),
        false => format!("until then everything is denied {at}"),
    }
}

fn targets(policy: &AuthorizationPolicy) -> &[Target] {
    match &policy.attached {
        Attachment::Services(targets) => targets,
        Attachment::All | Attachment::Pods(_) => &[],
    }
}

fn in_force(is_dry: bool, selects_nothing: bool) -> String {
    let force = match is_dry {
        true => "what the policy would do is reported, and nothing is done (dryRun)",
        false => "the policy is in force",
    };
    let pods = if selects_nothing { "; it selects no pod now" } else { "" };
    format!("{force}{pods}")
}

/// What becomes of connections to a port that is declared to carry no HTTP, where the policy asks for requests.
fn not_http(policy: &AuthorizationPolicy, service: &document::Service, port: &ServicePort) -> Option<String> {
    if port.declared() != Declared::Opaque {
        return None;
    }
    let number = match port.target {
        TargetPort::Number(number) => Some(number),
        TargetPort::Named(_) => None,
    };
    let rules = &policy.policy.rules;
    let at_port: Vec<(usize, bool)> = rules
        .iter()
        .enumerate()
        .filter_map(|(index, rule)| Some((index + 1, needs_requests(rule, number)?)))
        .collect();
    let needing: Vec<String> =
        at_port.iter().filter(|(_, needs)| *needs).map(|(number, _)| number.to_string()).collect();
    if needing.is_empty() {
        return None;
    }
    let rules = match needing.len() {
        1 => format!("rule {}", needing[0]),
        _ => format!("rules {}", needing.join(", ")),
    };
    let at = format!("to port {} of the Service {}", port.port, service.id);
    let why = "it is declared to carry something other than HTTP, and without requests";
    let (told, is) = if policy.policy.dry_run { ("it is reported that ", "would be") } else { ("", "is") };
    match policy.policy.action {
        Action::Allow if needing.len() == at_port.len() => Some(format!(
            "{told}every connection {at} {is} denied unless another policy allows it: {why} {rules} can allow nothing"
        )),
        Action::Allow => Some(format!("no connection {at} {is} allowed by {rules}: {why} nothing can match")),
        Action::Deny => Some(format!(
            "{told}every connection {at} {is} denied for which all else holds that {rules} asks for: {why} the rest counts as matched"
        )),
        Action::Audit => None,
    }
}

/// Whether the rule can only match requests at the port; None if it is not for the port.
fn needs_requests(rule: &Rule, port: Option<u16>) -> Option<bool> {
    let is_at_port = |operation: &&Operation| {
        let ports = &operation.ports;
        port.is_none_or(|port| {
            (ports.any_of.is_empty() || ports.any_of.contains(&port)) && !ports.none_of.contains(&port)
        })
    };
    let at_port: Vec<&Operation> = rule.to.iter().filter(is_at_port).collect();
    if at_port.is_empty() && !rule.to.is_empty() {
        return None;
    }
    let all_are_of_requests =
        !at_port.is_empty() && at_port.iter().all(|operation| operation.is_of_requests());
    Some(!rule.when.is_empty() || all_are_of_requests)
}
