//! The cluster's DNS: CoreDNS as a Deployment behind the Service `kube-dns`, as elsewhere. It knows names of the cluster
//! only; there is nobody to ask for others.

use serde_json::{Value, json};

/// Where pods ask.
pub(super) const ADDRESS: &str = "10.96.0.10";

/// CoreDNS's image.
pub(super) const IMAGE: &str = "um.test/coredns:1";

const COREFILE: &str = "\
.:53 {
    errors
    ready
    kubernetes cluster.local in-addr.arpa ip6.arpa {
        pods insecure
    }
    cache 5
    loadbalance
}
";

/// Everything that is applied, as one list.
pub(super) fn manifests() -> String {
    let labels = json!({ "k8s-app": "kube-dns" });
    let named = |name: &str| json!({ "name": name, "namespace": "kube-system", "labels": labels });
    let account = json!({ "apiVersion": "v1", "kind": "ServiceAccount", "metadata": named("coredns") });
    let role = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole",
        "metadata": { "name": "system:coredns" },
        "rules": [
            { "apiGroups": [""], "resources": ["namespaces", "pods", "services"], "verbs": ["list", "watch"] },
            { "apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["list", "watch"] },
        ],
    });
    let binding = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding",
        "metadata": { "name": "system:coredns" },
        "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:coredns" },
        "subjects": [{ "kind": "ServiceAccount", "name": "coredns", "namespace": "kube-system" }],
    });
    let config = json!({ "apiVersion": "v1", "kind": "ConfigMap", "metadata": named("coredns"),
        "data": { "Corefile": COREFILE } });
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": named("kube-dns"),
        "spec": { "clusterIP": ADDRESS, "selector": labels, "ports": [
            { "name": "dns", "port": 53, "protocol": "UDP" },
            { "name": "dns-tcp", "port": 53, "protocol": "TCP" },
        ] },
    });
    let deployment = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": named("coredns"),
        "spec": { "selector": { "matchLabels": labels }, "template": {
            "metadata": { "labels": labels }, "spec": pod_spec() } },
    });
    let items = [account, role, binding, config, service, deployment];
    json!({ "apiVersion": "v1", "kind": "List", "items": items }).to_string()
}

fn pod_spec() -> Value {
    json!({
        "serviceAccountName": "coredns", "dnsPolicy": "Default", "priorityClassName": "system-cluster-critical",
        "tolerations": [{ "operator": "Exists" }],
        "containers": [{
            "name": "coredns", "image": IMAGE, "args": ["-conf", "/etc/coredns/Corefile"],
            "readinessProbe": { "httpGet": { "path": "/ready", "port": 8181 }, "periodSeconds": 1 },
            "volumeMounts": [{ "name": "config", "mountPath": "/etc/coredns", "readOnly": true }],
        }],
        "volumes": [{ "name": "config", "configMap": { "name": "coredns" } }],
    })
}
