//! Node authorization: an agent speaks for the pods of its node, as they are now, and for nobody else.

use super::super::pods::Index;
use super::super::settings::ControllerSettings;
use super::caller::Caller;
use super::refusal::Refusal;
use crate::identity::SpiffeId;
use crate::telemetry::DenyReason;

/// An identity that the caller may have a certificate for. Only [`authorize`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Authorized {
    id: SpiffeId,
    node: String,
}

impl Authorized {
    pub(super) fn id(&self) -> &SpiffeId {
        &self.id
    }

    pub(super) fn node(&self) -> &str {
        &self.node
    }
}

/// Whether the caller may have a certificate for the identity, by what is known of the cluster's pods.
pub(super) fn authorize(
    caller: &Caller,
    asked: &SpiffeId,
    settings: &ControllerSettings,
    pods: &Index,
) -> Result<Authorized, Refusal> {
    if caller.account != settings.agent {
        let why = format!("{} is not the service account of the agents, {}", caller.account, settings.agent);
        return Err(Refusal::new(DenyReason::NotAnAgent, why).perhaps_on(caller.node.as_deref()));
    }
    let own = &settings.root.trust_domain;
    if !asked.is_of(own) {
        let why = format!("{asked} is not of the trust domain {own}");
        return Err(Refusal::new(DenyReason::WrongTrustDomain, why).perhaps_on(caller.node.as_deref()));
    }
    if !pods.is_synced() {
        let why = "the pods of the cluster are not known yet".into();
        return Err(Refusal::for_now(DenyReason::NotSynced, why).perhaps_on(caller.node.as_deref()));
    }
    let node = node_of(caller, pods)?;
    match pods.runs_on(&node, asked.namespace(), asked.service_account()) {
        true => Ok(Authorized { id: asked.clone(), node }),
        false => {
            let (namespace, account) = (asked.namespace(), asked.service_account());
            let why = format!("no pod of the service account {namespace}/{account} is on the node {node}");
            Err(Refusal::for_now(DenyReason::NoPodOnNode, why).on(&node))
        }
    }
}

/// The node that the token is bound to; where the API server does not say (before Kubernetes 1.30, or switched off), the
/// one that the token's pod runs on. Of a pod the UID counts, for names come back.
fn node_of(caller: &Caller, pods: &Index) -> Result<String, Refusal> {
    let unknown = |why: String| Refusal::new(DenyReason::UnknownNode, why);
    if let Some(node) = &caller.node {
        return Ok(node.clone());
    }
    let Some(uid) = &caller.pod_uid else {
        return Err(unknown("the token is bound to no pod: it must be a projected one".into()));
    };
    let Some(place) = pods.place(uid) else {
        let why = format!("the pod that the token is bound to, {uid}, does not run");
        return Err(Refusal { may_pass: true, ..unknown(why) });
    };
    let account = super::super::pods::Account::new(&caller.account.namespace, &caller.account.name);
    match place.account == account {
        true => Ok(place.node.to_string()),
        false => {
            Err(unknown(format!("the pod that the token is bound to, {uid}, is of another service account")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::testkit::{finished, pod, settings};
    use super::*;

    const AGENT: &str = "undermesh-system/undermesh-agent";

    fn caller(account: &str, node: Option<&str>, pod_uid: Option<&str>) -> Caller {
        Caller {
            account: account.parse().unwrap(),
            node: node.map(Into::into),
            pod_uid: pod_uid.map(Into::into),
        }
    }

    #[test]
    fn an_agent_speaks_for_the_pods_of_its_node_alone() {
        let settings = settings();
        let pods = Index::of(&[
            pod("a1", "n1", AGENT),
            pod("a2", "n2", AGENT),
            pod("w1", "n1", "shop/web"),
            pod("d1", "n2", "shop/db"),
            finished("j1", "n1", "shop/job"),
            pod("x1", "", "shop/waiting"),
            pod("c1", "n1", "undermesh-system/undermesh-controller"),
        ]);
        let check = |caller: &Caller, id: &str, expected: Result<&str, DenyReason>| {
            let id = format!("spiffe://cluster.local/ns/{}", id.replace('/', "/sa/")).parse().unwrap();
            let answer = authorize(caller, &id, &settings, &pods);
            let answer = answer.as_ref().map(Authorized::node).map_err(|refusal| refusal.reason);
            assert_eq!(answer, expected, "{caller:?} asks for {id}");
        };
        let n1 = caller(AGENT, Some("n1"), Some("a1"));
        check(&n1, "shop/web", Ok("n1"));
        check(&n1, AGENT, Ok("n1"));
        // A lying agent: pods of other nodes, of no node, of the past, of nobody.
        check(&n1, "shop/db", Err(DenyReason::NoPodOnNode));
        check(&n1, "shop/waiting", Err(DenyReason::NoPodOnNode));
        check(&n1, "shop/job", Err(DenyReason::NoPodOnNode));
        check(&n1, "other/web", Err(DenyReason::NoPodOnNode));
        check(&n1, "shop/we", Err(DenyReason::NoPodOnNode));
        // Without the node in the token, the pod's UID leads to it, and nothing else does.
        check(&caller(AGENT, None, Some("a2")), "shop/db", Ok("n2"));
        check(&caller(AGENT, None, Some("a2")), "shop/web", Err(DenyReason::NoPodOnNode));
        check(&caller(AGENT, None, Some("d1")), "shop/db", Err(DenyReason::UnknownNode));
        check(&caller(AGENT, None, Some("a9")), "shop/web", Err(DenyReason::UnknownNode));
        check(&caller(AGENT, None, None), "shop/web", Err(DenyReason::UnknownNode));
        // The token's own word on the node goes before what we have heard of its pod.
        check(&caller(AGENT, Some("n9"), Some("a1")), "shop/web", Err(DenyReason::NoPodOnNode));
        // Others than agents get nothing, not even what is their own.
        for account in ["shop/web", "shop/undermesh-agent", "undermesh-system/default"] {
            check(&caller(account, Some("n1"), Some("w1")), "shop/web", Err(DenyReason::NotAnAgent));
        }
        let stranger = "spiffe://other.test/ns/shop/sa/web".parse().unwrap();
        let refusal = authorize(&n1, &stranger, &settings, &pods).unwrap_err();
        assert_eq!(refusal.reason, DenyReason::WrongTrustDomain);

        let refusal = authorize(&n1, &stranger_of("shop", "web"), &settings, &Index::default()).unwrap_err();
        assert_eq!(refusal.reason, DenyReason::NotSynced);
    }

    fn stranger_of(namespace: &str, account: &str) -> SpiffeId {
        format!("spiffe://cluster.local/ns/{namespace}/sa/{account}").parse().unwrap()
    }

    #[test]
    fn a_refusal_names_the_fact_the_node_and_the_culprit() {
        let n1 = caller(AGENT, Some("n1"), None);
        let refusal = authorize(&n1, &stranger_of("shop", "db"), &settings(), &Index::of(&[])).unwrap_err();
        assert_eq!(refusal.why, "no pod of the service account shop/db is on the node n1");
        assert_eq!(refusal.node.as_deref(), Some("n1"));
        assert_eq!(refusal.status().code(), tonic::Code::PermissionDenied);
    }
}
