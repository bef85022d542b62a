//! NetworkPolicies that close the tunnel's port: whoever enforces them drops what the mesh sends, and nobody sees why.
//!
//! They are not enforced here, and only one question is asked of them: whether a pod can be reached, and can reach others, on
//! that port at all. From whom is the policy's own business.

use std::collections::{BTreeMap, HashMap};

use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPort, NetworkPolicySpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use kube::core::{Selector, SelectorExt as _};

use crate::config::document::Pod;
use crate::config::{FieldPath, Key, Kind, Problem, Rejection};
use crate::model::{Name, ObjectRef};

/// HBONE's port, on every pod of the mesh.
const TUNNEL_PORT: i32 = 15008;

/// All NetworkPolicies, by namespace.
#[derive(Debug, Default)]
pub(super) struct Policies(HashMap<Name, BTreeMap<Name, Policy>>);

/// A NetworkPolicy, as far as it is of interest.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) id: ObjectRef,
    selects: Selector,
    /// Whether it lets anybody in on the tunnel's port; none if it does not care who comes in.
    ingress: Option<bool>,
    /// Whether it lets anything out to it.
    egress: Option<bool>,
}

impl Policy {
    /// Nothing of one that cannot be understood: whoever enforces it says what is wrong with it.
    pub(super) fn read(policy: &NetworkPolicy) -> Option<Self> {
        let meta = &policy.metadata;
        let id = ObjectRef::new(meta.namespace.as_deref()?, meta.name.as_deref()?);
        let spec = policy.spec.as_ref()?;
        let selects = spec.pod_selector.clone().unwrap_or_default().try_into().ok()?;
        let cares_for = |direction: &str| match &spec.policy_types {
            Some(types) => types.iter().any(|kind| kind == direction),
            // The API server fills it in; as it does.
            None => direction == "Ingress" || spec.egress.is_some(),
        };
        let ingress = cares_for("Ingress").then(|| lets_in(spec));
        let egress = cares_for("Egress").then(|| lets_out(spec));
        Some(Self { id, selects, ingress, egress })
    }
}

fn lets_in(spec: &NetworkPolicySpec) -> bool {
    spec.ingress.iter().flatten().any(|rule| covers(rule.ports.as_deref()))
}

fn lets_out(spec: &NetworkPolicySpec) -> bool {
    spec.egress.iter().flatten().any(|rule| covers(rule.ports.as_deref()))
}

/// No list means every port. A port's name is a container's, and the tunnel's port is no container's.
fn covers(ports: Option<&[NetworkPolicyPort]>) -> bool {
    let Some(ports) = ports.filter(|ports| !ports.is_empty()) else { return true };
    ports.iter().any(|port| {
        let is_tcp = port.protocol.as_deref().unwrap_or("TCP") == "TCP";
        is_tcp
            && match (&port.port, port.end_port) {
                (None, _) => true,
                (Some(IntOrString::Int(first)), Some(last)) => (*first..=last).contains(&TUNNEL_PORT),
                (Some(IntOrString::Int(only)), None) => *only == TUNNEL_PORT,
                (Some(IntOrString::String(_)), _) => false,
            }
    })
}

impl Policies {
    pub(super) fn put(&mut self, policy: Policy) {
        self.0.entry(policy.id.namespace.clone()).or_default().insert(policy.id.name.clone(), policy);
    }

    pub(super) fn remove(&mut self, id: &ObjectRef) {
        if let Some(policies) = self.0.get_mut(&id.namespace) {
            policies.remove(&id.name);
            if policies.is_empty() {
                self.0.remove(&id.namespace);
            }
        }
    }

    /// Forgets all but these.
    pub(super) fn retain(&mut self, listed: impl Fn(&ObjectRef) -> bool) {
        self.0.values_mut().for_each(|policies| policies.retain(|_, policy| listed(&policy.id)));
        self.0.retain(|_, policies| !policies.is_empty());
    }

    /// What closes the tunnel's port for a pod that is to be in the mesh: policies add up, so each direction is open if one of
    /// those that select the pod opens it.
    pub(super) fn complaints(&self, pod: &Pod) -> Vec<Rejection> {
        let selecting: Vec<_> = self
            .0
            .get(&pod.id.namespace)
            .into_iter()
            .flat_map(BTreeMap::values)
            .filter(|policy| policy.selects.matches(&pod.labels))
            .collect();
        let closed = |direction: fn(&Policy) -> Option<bool>| -> Vec<String> {
            let caring: Vec<_> = selecting.iter().filter(|policy| direction(policy).is_some()).collect();
            match caring.iter().any(|policy| direction(policy) == Some(true)) {
                true => Vec::new(),
                false => caring.iter().map(|policy| policy.id.to_string()).collect(),
            }
        };
        let complain = |names: Vec<String>, what: &str| {
            let message = format!(
                "of the NetworkPolicies that select it ({}) none opens TCP port {TUNNEL_PORT}, by which the mesh goes between \
                 nodes: {what}; add the port to a rule",
                names.join(", ")
            );
            let problem = Problem::new(FieldPath::default(), message);
            (!names.is_empty()).then(|| Rejection::of_object(Key::of(Kind::Pod, &pod.id), problem))
        };
        [
            complain(closed(|it| it.ingress), "pods of other nodes cannot reach it through the mesh"),
            complain(closed(|it| it.egress), "it cannot reach pods of other nodes through the mesh"),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use k8s_openapi::api::core::v1 as core;
    use serde_json::{Value, json};

    use super::*;
    use crate::config::Document;

    /// What is said of a pod with the label `app: web` under these policies, each of a spec.
    fn check(specs: &[Value], expected: Expect) {
        let mut policies = Policies::default();
        for (number, spec) in specs.iter().enumerate() {
            let meta = json!({ "name": format!("policy-{number}"), "namespace": "shop" });
            let policy = json!({ "metadata": meta, "spec": spec });
            policies.put(Policy::read(&serde_json::from_value(policy).unwrap()).unwrap());
        }
        let pod = json!({
            "metadata": { "name": "web", "namespace": "shop", "labels": { "app": "web" } },
            "spec": { "containers": [] },
        });
        let pod: core::Pod = serde_json::from_value(pod).unwrap();
        let Ok(Document::Pod(pod)) = Document::pod(&pod, &mut Vec::new()) else { panic!("no pod") };
        let lines: Vec<_> = policies.complaints(&pod).iter().map(ToString::to_string).collect();
        expected.assert_eq(&lines.join("\n"));
    }

    fn of(port: Value) -> Value {
        json!({ "podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{ "ports": [port] }] })
    }

    #[test]
    fn a_policy_that_closes_the_tunnels_port_is_named() {
        check(
            &[json!({ "podSelector": { "matchLabels": { "app": "web" } }, "policyTypes": ["Ingress"] })],
            expect![[
                r#"Pod shop/web: of the NetworkPolicies that select it (shop/policy-0) none opens TCP port 15008, by which the mesh goes between nodes: pods of other nodes cannot reach it through the mesh; add the port to a rule"#
            ]],
        );
        check(
            &[json!({ "podSelector": {}, "policyTypes": ["Ingress", "Egress"],
                "ingress": [{ "from": [{ "podSelector": {} }], "ports": [{ "port": 8080 }] }],
                "egress": [{ "ports": [{ "port": 53, "protocol": "UDP" }] }] })],
            expect![[r#"
                Pod shop/web: of the NetworkPolicies that select it (shop/policy-0) none opens TCP port 15008, by which the mesh goes between nodes: pods of other nodes cannot reach it through the mesh; add the port to a rule
                Pod shop/web: of the NetworkPolicies that select it (shop/policy-0) none opens TCP port 15008, by which the mesh goes between nodes: it cannot reach pods of other nodes through the mesh; add the port to a rule"#]],
        );
    }

    #[test]
    fn what_leaves_it_open_is_not() {
        let nothing = || expect![""];
        check(&[], nothing());
        // Of other pods.
        check(
            &[json!({ "podSelector": { "matchLabels": { "app": "db" } }, "policyTypes": ["Ingress"] })],
            nothing(),
        );
        // Every port, from whomever.
        check(&[json!({ "podSelector": {}, "ingress": [{ "from": [{ "podSelector": {} }] }] })], nothing());
        check(&[of(json!({ "port": 15008 }))], nothing());
        check(&[of(json!({ "port": 15000, "endPort": 15010 }))], nothing());
        check(&[of(json!({ "protocol": "TCP" }))], nothing());
        // They add up.
        let closes = json!({ "podSelector": {}, "policyTypes": ["Ingress"] });
        check(&[closes, of(json!({ "port": 15008 }))], nothing());
    }

    #[test]
    fn what_only_looks_like_it_does_not_open_it() {
        for port in [
            json!({ "port": 15008, "protocol": "UDP" }),
            json!({ "port": "tunnel" }),
            json!({ "port": 15009, "endPort": 15020 }),
        ] {
            let policy = of(port.clone());
            let policy = json!({ "metadata": { "name": "p", "namespace": "shop" }, "spec": policy });
            let policy = Policy::read(&serde_json::from_value(policy).unwrap()).unwrap();
            assert_eq!(policy.ingress, Some(false), "{port}");
        }
    }
}
