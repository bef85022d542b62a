//! At which of its ports a pod has the kubelet call it: by its probes, and by hooks that ask by HTTP.
//!
//! Ports are found as the kubelet finds them. What names another host is none of the pod's business: whoever may write Pods could
//! have the kubelet call anybody that way.

use std::collections::BTreeSet;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Lifecycle, PodSpec, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use undermesh_common::maps::PROBED_PORTS;

use super::super::{FieldPath, Problem};

/// The ports, ascending. `addresses` are the pod's own.
pub(super) fn probed_ports(spec: &PodSpec, addresses: &[IpAddr], problems: &mut Vec<Problem>) -> Vec<u16> {
    // Init containers that do not keep running have neither probes nor hooks.
    let containers = spec.containers.iter().chain(spec.init_containers.iter().flatten());
    let mut ports: BTreeSet<u16> = containers.flat_map(|container| ports_of(container, addresses)).collect();
    if let Some(first_left_out) = ports.iter().nth(PROBED_PORTS).copied() {
        let found = ports.len();
        problems.push(Problem::new(
            FieldPath::new(["spec", "containers"]),
            format!(
                "expected at most {PROBED_PORTS} ports in probes and hooks, found {found}: from {first_left_out} on the kubelet \
                 is a caller like any other"
            ),
        ));
        ports.retain(|port| *port < first_left_out);
    }
    ports.into_iter().collect()
}

fn ports_of<'a>(container: &'a Container, addresses: &'a [IpAddr]) -> impl Iterator<Item = u16> + 'a {
    let probes = [&container.liveness_probe, &container.readiness_probe, &container.startup_probe];
    let of_probes = probes.into_iter().flatten().flat_map(|probe| asked_by(probe, addresses));
    let of_hooks = container.lifecycle.iter().flat_map(|hooks| asked_by_hooks(hooks, addresses));
    of_probes.chain(of_hooks).filter_map(|port| resolve(&port, container))
}

fn asked_by(probe: &Probe, addresses: &[IpAddr]) -> impl Iterator<Item = IntOrString> {
    let http = probe.http_get.as_ref().and_then(|get| asked_by_http(get, addresses));
    let tcp = probe.tcp_socket.as_ref().filter(|tcp| is_own(tcp.host.as_deref(), addresses));
    let tcp = tcp.map(|tcp| tcp.port.clone());
    let grpc = probe.grpc.as_ref().map(|grpc| IntOrString::Int(grpc.port));
    [http, tcp, grpc].into_iter().flatten()
}

/// A hook's `tcpSocket` is in the API and does nothing.
fn asked_by_hooks(hooks: &Lifecycle, addresses: &[IpAddr]) -> impl Iterator<Item = IntOrString> {
    let of = |get: Option<&HTTPGetAction>| get.and_then(|get| asked_by_http(get, addresses));
    let started = of(hooks.post_start.as_ref().and_then(|hook| hook.http_get.as_ref()));
    let stopping = of(hooks.pre_stop.as_ref().and_then(|hook| hook.http_get.as_ref()));
    [started, stopping].into_iter().flatten()
}

fn asked_by_http(get: &HTTPGetAction, addresses: &[IpAddr]) -> Option<IntOrString> {
    is_own(get.host.as_deref(), addresses).then(|| get.port.clone())
}

/// Whether the kubelet calls the pod itself. Names are not resolved: what they lead to is not known here.
fn is_own(host: Option<&str>, addresses: &[IpAddr]) -> bool {
    match host.unwrap_or_default() {
        "" => true,
        host => host.parse::<IpAddr>().is_ok_and(|host| addresses.contains(&host.to_canonical())),
    }
}

/// A name is that of a port of the same container, whatever its protocol. What the kubelet cannot find either is left out.
fn resolve(port: &IntOrString, container: &Container) -> Option<u16> {
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(text) => {
            let mut ports = container.ports.iter().flatten();
            let named = ports.find(|port| port.name.as_ref() == Some(text)).map(|port| port.container_port);
            named.or_else(|| text.parse().ok())?
        }
    };
    u16::try_from(number).ok().filter(|port| *port != 0)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn read(spec: Value) -> (Vec<u16>, Vec<Problem>) {
        let mut problems = Vec::new();
        let spec = serde_json::from_value(spec).unwrap();
        let addresses = ["10.0.0.5", "fd00::5"].map(|text| text.parse().unwrap());
        let ports = probed_ports(&spec, &addresses, &mut problems);
        (ports, problems)
    }

    fn check(container: Value, expected: &[u16]) {
        let mut full = json!({ "name": "app", "ports": [
            { "name": "http", "containerPort": 8080 }, { "name": "odd", "containerPort": 53, "protocol": "UDP" },
        ] });
        for (field, value) in container.as_object().unwrap() {
            full[field] = value.clone();
        }
        let (ports, problems) = read(json!({ "containers": [full] }));
        assert_eq!((ports, problems), (expected.to_vec(), Vec::new()), "{container}");
    }

    #[test]
    fn every_kind_of_probe_and_hook_names_its_port() {
        let get = |port: Value| json!({ "httpGet": { "path": "/", "port": port } });
        check(json!({}), &[]);
        check(json!({ "livenessProbe": get(json!(81)) }), &[81]);
        check(json!({ "readinessProbe": { "tcpSocket": { "port": 82 } } }), &[82]);
        check(json!({ "startupProbe": { "grpc": { "port": 83 } } }), &[83]);
        check(json!({ "livenessProbe": { "exec": { "command": ["true"] } } }), &[]);
        check(json!({ "lifecycle": { "postStart": get(json!(84)), "preStop": get(json!(85)) } }), &[84, 85]);
        check(json!({ "lifecycle": { "preStop": { "tcpSocket": { "port": 86 } } } }), &[]);
        check(json!({ "livenessProbe": get(json!(9)), "readinessProbe": get(json!(9)) }), &[9]);
        check(json!({ "livenessProbe": get(json!(9)), "startupProbe": get(json!(8)) }), &[8, 9]);
    }

    #[test]
    fn ports_are_found_as_the_kubelet_finds_them() {
        for (port, expected) in [
            (json!("http"), &[8080][..]),
            (json!("odd"), &[53]),
            (json!("8081"), &[8081]),
            (json!("https"), &[]),
            (json!(""), &[]),
            (json!(0), &[]),
            (json!(-1), &[]),
            (json!(65536), &[]),
            (json!(65535), &[65535]),
        ] {
            check(json!({ "livenessProbe": { "httpGet": { "port": port } } }), expected);
            check(json!({ "lifecycle": { "preStop": { "httpGet": { "port": port } } } }), expected);
        }
    }

    #[test]
    fn only_what_the_pod_asks_of_itself_counts() {
        for (host, expected) in [
            ("", &[80][..]),
            ("10.0.0.5", &[80]),
            ("fd00::5", &[80]),
            ("fd00:0::0:5", &[80]),
            ("10.0.0.6", &[]),
            ("127.0.0.1", &[]),
            ("localhost", &[]),
            ("app.shop.svc", &[]),
        ] {
            let (get, tcp) = (
                json!({ "httpGet": { "host": host, "port": 80 } }),
                json!({ "tcpSocket": { "host": host, "port": 80 } }),
            );
            check(json!({ "livenessProbe": get }), expected);
            check(json!({ "readinessProbe": tcp }), expected);
            check(json!({ "lifecycle": { "postStart": get } }), expected);
        }
    }

    #[test]
    fn containers_that_run_beside_the_application_count_as_it_does_and_name_their_own_ports() {
        let probed = |name: &str, port: u16, probe: Value| {
            json!({ "name": name, "restartPolicy": "Always", "ports": [{ "name": "health", "containerPort": port }],
                "readinessProbe": { "httpGet": { "port": probe } } })
        };
        let (ports, problems) = read(json!({
            "initContainers": [probed("proxy", 9001, json!("health")), { "name": "migrate" }],
            "containers": [probed("app", 9002, json!("health")), probed("other", 9003, json!("of-nobody"))],
        }));
        assert_eq!((ports, problems), (vec![9001, 9002], Vec::new()));
    }

    #[test]
    fn more_ports_than_there_is_room_for_are_told_of() {
        let container =
            |port: usize| json!({ "name": "app", "readinessProbe": { "grpc": { "port": port } } });
        let spec = |count: usize| json!({ "containers": (1..=count).map(container).collect::<Vec<_>>() });
        let (ports, problems) = read(spec(PROBED_PORTS));
        assert_eq!((ports.len(), problems), (PROBED_PORTS, Vec::new()));
        let (ports, problems) = read(spec(PROBED_PORTS + 2));
        assert_eq!((ports.len(), ports.last()), (PROBED_PORTS, Some(&16)));
        let told: Vec<_> =
            problems.iter().map(|problem| (problem.field.to_string(), problem.message.clone())).collect();
        let message = "expected at most 16 ports in probes and hooks, found 18: from 17 on the kubelet is a caller like any other";
        assert_eq!(told, [("spec.containers".to_owned(), message.to_owned())]);
    }
}
