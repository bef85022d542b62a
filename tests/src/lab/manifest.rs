//! Kubernetes manifests as the agents read them from a directory.

use std::net::{IpAddr, SocketAddr};

use anyhow::Result;
use serde_json::{Map, Value, json};

/// One Kubernetes object.
#[derive(Clone, Debug)]
pub struct Manifest {
    value: Value,
}

impl Manifest {
    /// An object with nothing but its name.
    pub fn new(api_version: &str, kind: &str, namespace: Option<&str>, name: &str) -> Self {
        let mut manifest =
            Self { value: json!({ "apiVersion": api_version, "kind": kind, "metadata": { "name": name } }) };
        if let Some(namespace) = namespace {
            manifest.set("metadata.namespace", json!(namespace));
        }
        manifest
    }

    /// A Namespace.
    pub fn namespace(name: &str) -> Self {
        Self::new("v1", "Namespace", None, name)
    }

    /// A Service with cluster IPs (none: headless), ports (as clients dial them, and the pods') and a selector.
    pub fn service(
        namespace: &str,
        name: &str,
        addresses: &[IpAddr],
        ports: &[(u16, u16)],
        selector: &[(&str, &str)],
    ) -> Self {
        let mut manifest = Self::new("v1", "Service", Some(namespace), name);
        let first = addresses.first().map_or("None".to_owned(), ToString::to_string);
        let all = if addresses.is_empty() { json!(["None"]) } else { json!(addresses) };
        manifest.set("spec.clusterIP", json!(first));
        manifest.set("spec.clusterIPs", all);
        manifest.set("spec.ports", ports.iter().map(service_port).collect());
        if !selector.is_empty() {
            let labels: Map<_, _> = selector.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
            manifest.set("spec.selector", Value::Object(labels));
        }
        manifest
    }

    /// An EndpointSlice of a Service: the addresses of one port, all of one family.
    pub fn endpoint_slice(namespace: &str, service: &str, name: &str, endpoints: &[EndpointSpec]) -> Self {
        let mut manifest = Self::new("discovery.k8s.io/v1", "EndpointSlice", Some(namespace), name);
        manifest.set_label("kubernetes.io/service-name", Some(service));
        let first = endpoints.first().map(|endpoint| endpoint.address);
        let v6 = first.is_some_and(|address| address.is_ipv6());
        manifest.set("addressType", json!(if v6 { "IPv6" } else { "IPv4" }));
        manifest.set("endpoints", endpoints.iter().map(EndpointSpec::to_value).collect());
        let port = first.map(|address| json!({ "port": address.port(), "protocol": "TCP" }));
        manifest.set("ports", port.into_iter().collect());
        manifest
    }

    /// Sets a field; the path's parts are separated by dots, and objects on the way are made.
    pub fn set(&mut self, path: &str, value: Value) {
        let mut at = &mut self.value;
        for part in path.split('.') {
            at = &mut at[part];
        }
        *at = value;
    }

    /// [`Manifest::set`] for chains.
    pub fn with(mut self, path: &str, value: Value) -> Self {
        self.set(path, value);
        self
    }

    /// Sets a label, or removes it.
    pub fn set_label(&mut self, key: &str, value: Option<&str>) {
        self.set_in("labels", key, value);
    }

    /// [`Manifest::set_label`] for chains.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.set_label(key, Some(value));
        self
    }

    /// Sets an annotation, or removes it.
    pub fn set_annotation(&mut self, key: &str, value: Option<&str>) {
        self.set_in("annotations", key, value);
    }

    /// The file that holds the object, and every later version of it.
    pub fn file_name(&self) -> String {
        let field = |path: &str| self.value.pointer(path).and_then(Value::as_str).unwrap_or("cluster");
        let names = [field("/metadata/namespace"), field("/kind"), field("/metadata/name")];
        format!("{}.yaml", names.join("-").to_lowercase())
    }

    /// The object as YAML.
    pub fn to_yaml(&self) -> Result<String> {
        Ok(serde_saphyr::to_string(&self.value)?)
    }

    fn set_in(&mut self, group: &str, key: &str, value: Option<&str>) {
        // Keys have dots, so the path of `set` is no use here.
        let group = &mut self.value["metadata"][group];
        match value {
            Some(value) => group[key] = json!(value),
            None => {
                group.as_object_mut().map(|members| members.remove(key));
            }
        }
    }
}

/// One endpoint of an EndpointSlice.
#[derive(Clone, Debug)]
pub struct EndpointSpec {
    /// Pod address and target port.
    pub address: SocketAddr,
    /// The node it is on.
    pub node: Option<String>,
    /// `conditions.ready`.
    pub ready: bool,
    /// `conditions.serving`.
    pub serving: bool,
    /// `conditions.terminating`.
    pub terminating: bool,
    /// `zone`.
    pub zone: Option<String>,
}

impl EndpointSpec {
    /// A ready endpoint.
    pub fn ready(address: SocketAddr) -> Self {
        Self { address, node: None, ready: true, serving: true, terminating: false, zone: None }
    }

    fn to_value(&self) -> Value {
        let mut value = json!({
            "addresses": [self.address.ip()],
            "conditions": { "ready": self.ready, "serving": self.serving, "terminating": self.terminating },
        });
        if let Some(node) = &self.node {
            value["nodeName"] = json!(node);
        }
        if let Some(zone) = &self.zone {
            value["zone"] = json!(zone);
        }
        value
    }
}

fn service_port((port, target): &(u16, u16)) -> Value {
    json!({ "name": format!("tcp-{port}"), "port": port, "targetPort": target, "protocol": "TCP" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_a_service_as_one_would_by_hand() {
        let addresses = ["10.96.0.10".parse().unwrap(), "fd96::10".parse().unwrap()];
        let service = Manifest::service("shop", "catalog", &addresses, &[(80, 8080)], &[("app", "catalog")]);
        assert_eq!(service.file_name(), "shop-service-catalog.yaml");
        let yaml = service.to_yaml().unwrap();
        assert!(yaml.starts_with("apiVersion: v1\nkind: Service\nmetadata:\n  name: catalog\n"), "{yaml}");
        assert!(yaml.contains("  selector:\n    app: catalog\n"), "{yaml}");
    }

    #[test]
    fn labels_may_have_dots_and_go_again() {
        let mut namespace = Manifest::namespace("shop").label("undermesh.io/mesh", "enabled");
        assert!(namespace.to_yaml().unwrap().contains("undermesh.io/mesh: enabled"));
        namespace.set_label("undermesh.io/mesh", None);
        assert!(!namespace.to_yaml().unwrap().contains("mesh"));
    }
}
