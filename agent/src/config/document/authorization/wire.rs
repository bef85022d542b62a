//! The spec of an AuthorizationPolicy as it is written. From these types comes its CustomResourceDefinition, and from their comments
//! what `kubectl explain` says; what a type does not tell stands in `crd`.

#[cfg(test)]
use schemars::JsonSchema;
use serde::Deserialize;

use super::super::selector;

/// Who may do what with pods. Once a policy of the action Allow is for a pod, what no such policy matches is denied; what one of the
/// action Deny matches is denied whatever else allows it. A policy that cannot be used denies everything.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    /// Which pods of the policy's own namespace it is for. Without selector and targetRefs it is for all of them; in the namespace
    /// that the mesh is installed in, for all pods of the mesh.
    pub(super) selector: Option<selector::Wire>,
    /// Services of the policy's own namespace: it is for their pods, at the ports that the Services lead to. Not beside selector.
    pub(super) target_refs: Option<Vec<TargetRef>>,
    /// What becomes of what a rule matches. Allow unless given: it is let in, and what none matches is denied. Deny: it is denied.
    /// Audit: it is written down, and let in or not by others.
    pub(super) action: Option<String>,
    /// Whether it is only reported what the policy would do. Unless given it is in force.
    pub(super) dry_run: Option<bool>,
    /// The policy matches what one of these does. Without rules it matches nothing, and hence allows nothing.
    pub(super) rules: Option<Vec<Rule>>,
}

/// A Service of the policy's own namespace.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct TargetRef {
    /// Empty, for Services are of the core group.
    pub(super) group: String,
    /// Service.
    pub(super) kind: String,
    /// The name of the Service.
    pub(super) name: String,
}

/// All that is given must hold. An empty rule matches everything.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Rule {
    /// Where it comes from: one of these. From anywhere unless given.
    pub(super) from: Option<Vec<Source>>,
    /// What is asked for: one of these. Anything unless given.
    pub(super) to: Option<Vec<Operation>>,
    /// What else must hold: all of these.
    pub(super) when: Option<Vec<Condition>>,
}

/// All that is given must hold. Who proves no identity is in none of the lists of identities, service accounts, namespaces and trust
/// domains; those of what is left out hold for it in policies that deny or audit, and not in those that allow. In texts, * is for
/// whatever is there, a* for what begins with a, *a for what ends with it.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Source {
    /// SPIFFE ids, such as spiffe://cluster.local/ns/shop/sa/web.
    pub(super) identities: Option<Vec<String>>,
    /// None of these SPIFFE ids.
    pub(super) not_identities: Option<Vec<String>>,
    /// Service accounts, as NAME for one of the policy's own namespace or as NAMESPACE/NAME.
    pub(super) service_accounts: Option<Vec<String>>,
    /// None of these service accounts.
    pub(super) not_service_accounts: Option<Vec<String>>,
    /// Namespaces of service accounts.
    pub(super) namespaces: Option<Vec<String>>,
    /// None of these namespaces.
    pub(super) not_namespaces: Option<Vec<String>>,
    /// Trust domains.
    pub(super) trust_domains: Option<Vec<String>>,
    /// None of these trust domains.
    pub(super) not_trust_domains: Option<Vec<String>>,
    /// Addresses that connections come from, as 10.0.0.0/8, fd00::/8 or a single address.
    pub(super) ip_blocks: Option<Vec<String>>,
    /// None of these addresses.
    pub(super) not_ip_blocks: Option<Vec<String>>,
}

/// All that is given must hold. All but the ports is of HTTP requests; what is no HTTP has none of it.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Operation {
    /// Ports of the pod, not of the Service.
    pub(super) ports: Option<Vec<i64>>,
    /// None of these ports.
    pub(super) not_ports: Option<Vec<i64>>,
    /// Methods, in upper case.
    pub(super) methods: Option<Vec<String>>,
    /// None of these methods.
    pub(super) not_methods: Option<Vec<String>>,
    /// Paths without the query: /a, /a/* for what begins with /a/, *.php for what ends with it, /a/{*}/b for one segment between,
    /// /a/{**} for any number of segments at the end.
    pub(super) paths: Option<Vec<String>>,
    /// None of these paths.
    pub(super) not_paths: Option<Vec<String>>,
    /// Hosts that are asked for, in any case; the port counts where one is given.
    pub(super) hosts: Option<Vec<String>>,
    /// None of these hosts.
    pub(super) not_hosts: Option<Vec<String>>,
    /// Methods of gRPC services: one of these.
    pub(super) grpc: Option<Vec<Grpc>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Grpc {
    /// The service with its package, such as shop.v1.Orders.
    pub(super) service: String,
    /// The method. All of them unless given.
    pub(super) method: Option<String>,
}

/// One of these.
#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
pub(super) struct Condition {
    /// A header of the request.
    pub(super) header: Option<Header>,
    /// A claim of the caller's token. Who has shown no valid token is in no list of values; those of what is left out hold for it in
    /// policies that deny or audit, and not in those that allow.
    pub(super) claim: Option<Claim>,
    /// An expression of the Common Expression Language (CEL) that is true: of request, source, destination and claims. One that fails
    /// counts as true in policies that deny or audit, and as false in those that allow.
    pub(super) expression: Option<String>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Header {
    /// Its name.
    pub(super) name: String,
    /// One of these is its value; of several headers of the name, the value of one.
    pub(super) values: Option<Vec<String>>,
    /// None of these is. It holds without the header, too.
    pub(super) not_values: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
#[cfg_attr(test, derive(JsonSchema))]
#[serde(rename_all = "camelCase")]
pub(super) struct Claim {
    /// Its name, and the names in it where it is an object.
    pub(super) path: Vec<String>,
    /// One of these is its value; of a list, one element's.
    pub(super) values: Option<Vec<String>>,
    /// None of these is.
    pub(super) not_values: Option<Vec<String>>,
}
