//! How much one change costs.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::config::document::MeshLabel;
use crate::model::DialledPods;

/// 2,000 Services with 50 endpoints each, made of 20,000 pods in one namespace.
#[test]
#[ignore = "a measurement, to be run by name"]
fn one_change_in_a_large_cluster_is_cheap() {
    let pod = |number: usize, ready: bool| {
        let mut labels = std::collections::BTreeMap::new();
        for group in 0..5 {
            labels.insert(format!("group-{group}"), (number % 400).to_string());
        }
        Change::Put(Document::Pod(Arc::new(document::Pod {
            id: ObjectRef::new("shop", format!("pod-{number}")),
            uid: None,
            created: None,
            labels,
            marks: Marks::default(),
            obstacle: None,
            workload: "pod".into(),
            service_account: "default".into(),
            trust_domain: None,
            node: Some("node-1".into()),
            zone: None,
            addresses: vec![IpAddr::from([10, 1, (number >> 8) as u8, number as u8])],
            host_network: false,
            ports: Vec::new(),
            probed_ports: Vec::new(),
            ready,
            terminating: false,
            finished: false,
            paths: None,
            published: None,
            condition: None,
            generation: None,
        })))
    };
    let service = |number: usize| {
        Change::Put(Document::Service(Arc::new(document::Service {
            id: ObjectRef::new("shop", format!("service-{number}")),
            addresses: vec![IpAddr::from([10, 0, (number >> 8) as u8, number as u8])],
            ports: vec![document::ServicePort {
                name: "".into(),
                port: 80,
                target: document::TargetPort::Number(8080),
                app_protocol: None,
            }],
            selector: [(format!("group-{}", number % 5), (number / 5).to_string())].into(),
            is_sliced: false,
            publish_not_ready: false,
            session_affinity: model::SessionAffinity::None,
            internal_traffic: model::TrafficScope::Cluster,
            distribution: model::TrafficDistribution::Anywhere,
        })))
    };
    let mut compiler = Compiler::new(NodeInfo { name: "node-1".into(), zone: None });
    let start = Instant::now();
    compiler.apply((0..2_000).map(service).chain((0..20_000).map(|number| pod(number, true))));
    println!("everything: {:?}", start.elapsed());
    let snapshot = compiler.snapshot();
    let endpoints: usize = snapshot
        .destinations
        .values()
        .map(|it| match it {
            Destination::Service(service) => service.ports[0].endpoints.len(),
            Destination::Workload(_) => 0,
        })
        .sum();
    assert_eq!(endpoints, 100_000);

    let mut times: Vec<Duration> = (0..200)
        .map(|number| {
            let held = compiler.snapshot();
            let start = Instant::now();
            assert!(compiler.apply([pod(number * 97, false)]));
            let time = start.elapsed();
            drop(held);
            time
        })
        .collect();
    times.sort();
    println!("one pod: median {:?}, at most {:?}", times[100], times[199]);
    assert!(times[100] < Duration::from_millis(5));

    let (start, before) = (Instant::now(), resident());
    let marks =
        Marks { mesh: Some(MeshLabel::Enabled), dialled_pods: Some(DialledPods::Service), mtls: None };
    let Change::Put(Document::Pod(asker)) = pod(1, true) else { unreachable!("it is put") };
    compiler.apply([Change::Put(Document::Pod(Arc::new(document::Pod { marks, ..(*asker).clone() })))]);
    println!("the Service of each endpoint: {:?}, {} KiB", start.elapsed(), resident() - before);
    assert_eq!(compiler.snapshot().fronts.len(), 100_000);
}

/// What this process has in memory, in KiB.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

/// 5,000 Services with a route each, of which one changes.
#[test]
#[ignore = "a measurement, to be run by name"]
fn one_route_among_many_is_cheap() {
    let service = |number: usize| {
        let object = serde_json::json!({"metadata": {"name": format!("s-{number}"), "namespace": "shop"},
            "spec": {"clusterIP": format!("10.0.{}.{}", number >> 8, number & 255), "ports": [{"port": 80}]}});
        let service = serde_json::from_value(object).unwrap();
        Change::Put(Document::service(&service, &mut Vec::new()).unwrap())
    };
    let route = |number: usize, weight: u32| {
        let object = serde_json::json!({"metadata": {"name": format!("r-{number}"), "namespace": "shop"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": format!("s-{number}")}],
                "rules": [{"backendRefs": [{"name": format!("s-{number}"), "port": 80, "weight": weight}]}]}});
        Change::Put(Document::http_route(&object, &mut Vec::new()).unwrap())
    };
    let mut compiler = Compiler::new(NodeInfo { name: "node-1".into(), zone: None });
    let start = Instant::now();
    compiler.apply((0..5_000).flat_map(|number| [service(number), route(number, 1)]));
    println!("everything: {:?}", start.elapsed());
    assert_eq!(compiler.snapshot().routes.len(), 5_000);
    let mut times: Vec<Duration> = (0..200)
        .map(|number| {
            let held = compiler.snapshot();
            let change = route(number * 23, 2);
            let start = Instant::now();
            assert!(compiler.apply([change]));
            let time = start.elapsed();
            drop(held);
            time
        })
        .collect();
    times.sort();
    println!("one route: median {:?}, at most {:?}", times[100], times[199]);
    assert!(times[100] < Duration::from_millis(1));
}

/// 20,000 pods and 20,000 policies that each select few, of which one changes; and one for all of a namespace.
#[test]
#[ignore = "a measurement, to be run by name"]
fn one_policy_among_many_is_cheap() {
    let pod = |number: usize| {
        let node = if number < 100 { "node-1" } else { "node-2" };
        let object = serde_json::json!({"metadata": {"name": format!("p-{number}"), "namespace": "shop",
            "labels": {"app": format!("a-{number}"), "undermesh.io/mesh": "enabled"}}, "spec": {"nodeName": node, "containers": []}});
        Change::Put(Document::pod(&serde_json::from_value(object).unwrap(), &mut Vec::new()).unwrap())
    };
    let policy = |number: usize, from: &str| {
        let object = serde_json::json!({"metadata": {"name": format!("a-{number}"), "namespace": "shop"},
            "spec": {"selector": {"matchLabels": {"app": format!("a-{number}")}}, "rules": [{"from": [{"namespaces": [from]}]}]}});
        Change::Put(Document::authorization_policy(&object, &mut Vec::new()).unwrap())
    };
    let mut compiler = Compiler::new(NodeInfo { name: "node-1".into(), zone: None });
    let start = Instant::now();
    compiler.apply((0..20_000).flat_map(|number| [pod(number), policy(number, "a")]));
    println!("everything: {:?}", start.elapsed());
    assert_eq!(compiler.snapshot().access.len(), 100);
    let mut times: Vec<Duration> = (0..200)
        .map(|number| {
            let held = compiler.snapshot();
            let change = policy(number, "b");
            let start = Instant::now();
            assert_eq!(compiler.apply([change]), number < 100);
            let time = start.elapsed();
            drop(held);
            time
        })
        .collect();
    times.sort();
    println!("one policy: median {:?}, at most {:?}", times[100], times[199]);
    assert!(times[100] < Duration::from_millis(1));
}
