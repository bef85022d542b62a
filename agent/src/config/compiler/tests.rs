//! Documents in, snapshot out.

mod access;
mod backend_tls;
mod fronts;
mod mtls;
mod tokens;

use expect_test::{Expect, expect};
use k8s_openapi::api::{core::v1 as core, discovery::v1 as discovery};
use serde_json::Value;
use std::fmt::Write;

use super::*;
use crate::model::{Enrolment, MtlsMode, Workload};

/// A compiler that is fed with YAML and shows its snapshot as a table.
struct World {
    compiler: Compiler,
    problems: Vec<String>,
}

impl World {
    fn new() -> Self {
        let node = NodeInfo { name: "node-1".into(), zone: Some("a".into()) };
        Self::with(node, Defaults::default())
    }

    /// As node-1 sees these documents, where the mesh is installed in `mesh`.
    fn of_mesh(yaml: &str) -> Self {
        let node = NodeInfo { name: "node-1".into(), zone: None };
        let defaults = Defaults { mesh_namespace: Some("mesh".into()), ..Defaults::default() };
        let mut world = Self::with(node, defaults);
        world.put(yaml);
        world
    }

    fn with(node: NodeInfo, defaults: Defaults) -> Self {
        Self { compiler: Compiler::new(node).with_defaults(defaults), problems: Vec::new() }
    }

    /// With an authority of this trust domain.
    fn of_domain(domain: &str) -> Self {
        let node = NodeInfo { name: "node-1".into(), zone: None };
        Self::with(node, Defaults { trust_domain: Some(domain.parse().unwrap()), ..Defaults::default() })
    }

    fn of(yaml: &str) -> Self {
        let mut world = Self::new();
        world.put(yaml);
        world
    }

    fn put(&mut self, yaml: &str) -> bool {
        let documents: Vec<Value> = serde_saphyr::from_multiple(yaml).expect("the test's YAML");
        let changes: Vec<Change> = documents.iter().map(|it| Change::Put(self.read(it))).collect();
        self.compiler.apply(changes)
    }

    fn remove(&mut self, kind: Kind, namespace: &str, name: &str) -> bool {
        let key = Key { kind, namespace: namespace.into(), name: name.into() };
        self.compiler.apply([Change::Remove(key)])
    }

    fn read(&mut self, value: &Value) -> Document {
        fn typed<T: serde::de::DeserializeOwned>(value: &Value) -> T {
            serde_json::from_value(value.clone()).expect("the test's manifest")
        }
        let mut problems = Vec::new();
        let document = match value["kind"].as_str() {
            Some("Namespace") => Document::namespace(&typed::<core::Namespace>(value), &mut problems),
            Some("Service") => Document::service(&typed::<core::Service>(value), &mut problems),
            Some("Pod") => Document::pod(&typed::<core::Pod>(value), &mut problems),
            Some("AuthorizationPolicy") => Document::authorization_policy(value, &mut problems),
            Some("ConfigMap") => Document::config_map(&typed::<core::ConfigMap>(value)),
            Some("BackendTLSPolicy") => Document::backend_tls_policy(value, &mut problems),
            Some("MeshPolicy") => Document::mesh_policy(value, &mut problems),
            _ => Document::endpoint_slice(&typed::<discovery::EndpointSlice>(value), &mut problems),
        };
        self.problems.extend(problems.into_iter().map(|it| format!("{}: {}", it.field, it.message)));
        document.expect("the test's manifest")
    }

    fn check(&mut self, expected: Expect) {
        let snapshot = self.compiler.snapshot();
        let mut table = String::new();
        for workload in snapshot.workloads.values() {
            let enrolment = match &workload.enrolment {
                Enrolment::Wanted => "wanted",
                Enrolment::NotWanted => "not wanted",
                Enrolment::Impossible(why) => why,
            };
            let identity = workload.identity.as_ref().map(|id| format!(", {id}")).unwrap_or_default();
            let strict = if workload.mtls == MtlsMode::Strict { ", strict" } else { "" };
            let paths =
                workload.paths.as_ref().map(|it| format!(", {}", it.netns.display())).unwrap_or_default();
            let Workload { pod, workload, .. } = &**workload;
            writeln!(table, "{pod} of {workload}: {enrolment}{identity}{strict}{paths}").unwrap();
        }
        for (address, destination) in &snapshot.destinations {
            let captured = if snapshot.captured.contains(address) { ", captured" } else { "" };
            match destination {
                Destination::Workload(workload) => {
                    writeln!(table, "{address}: {}{captured}", workload.pod).unwrap()
                }
                Destination::Service(service) => {
                    writeln!(table, "{address}: {}{captured}", service.id).unwrap();
                    service.ports.iter().for_each(|port| show_port(port, &mut table));
                }
            }
        }
        for problem in self.problems.drain(..) {
            writeln!(table, "! {problem}").unwrap();
        }
        expected.assert_eq(&table);
    }
}

/// `*` marks the candidates.
fn show_port(port: &model::ServicePort, table: &mut String) {
    for (index, endpoint) in port.endpoints.iter().enumerate() {
        let is_candidate =
            port.candidates.v4.all().iter().chain(port.candidates.v6.all()).any(|&it| it as usize == index);
        let words =
            [(endpoint.ready, "ready"), (endpoint.serving, "serving"), (endpoint.terminating, "terminating")];
        let words: Vec<&str> = words.iter().filter(|(is_so, _)| *is_so).map(|(_, word)| *word).collect();
        let pod = endpoint.workload.as_ref().map_or("?".to_owned(), |it| it.pod.to_string());
        let star = if is_candidate { "*" } else { " " };
        writeln!(table, " {star}{} -> {} {pod} {}", port.port, endpoint.address, words.join(" ")).unwrap();
    }
}

const SHOP: &str = "
kind: Namespace
metadata: {name: shop, labels: {undermesh.io/mesh: enabled}}
---
kind: Service
metadata: {name: web, namespace: shop}
spec:
  clusterIPs: [10.0.0.1, 'fd00::1']
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: web}
  - {name: dns, port: 53, protocol: UDP}
---
kind: Pod
metadata: {name: web-1, namespace: shop, labels: {app: web}}
spec: {nodeName: node-1, containers: [{name: c, ports: [{name: web, containerPort: 8080}]}]}
status: {podIPs: [{ip: 10.1.0.1}, {ip: 'fd01::1'}], phase: Running, conditions: [{type: Ready, status: 'True'}]}
---
kind: Pod
metadata: {name: web-2, namespace: shop, labels: {app: web}}
spec: {nodeName: node-2, containers: [{name: c, ports: [{name: web, containerPort: 8081}]}]}
status: {podIP: 10.1.0.2, phase: Running, conditions: [{type: Ready, status: 'False'}]}
---
kind: Pod
metadata: {name: db-0, namespace: shop, labels: {app: db}}
status: {podIP: 10.1.0.3}
";

#[test]
fn endpoints_by_selector() {
    let mut world = World::of(SHOP);
    world.check(expect![[r#"
        shop/db-0 of db-0: wanted
        shop/web-1 of web-1: wanted
        shop/web-2 of web-2: wanted
        10.0.0.1: shop/web, captured
         *80 -> 10.1.0.1:8080 shop/web-1 ready serving
          80 -> 10.1.0.2:8081 shop/web-2 
         *80 -> [fd01::1]:8080 shop/web-1 ready serving
        10.1.0.1: shop/web-1, captured
        10.1.0.2: shop/web-2, captured
        10.1.0.3: shop/db-0, captured
        fd00::1: shop/web, captured
         *80 -> 10.1.0.1:8080 shop/web-1 ready serving
          80 -> 10.1.0.2:8081 shop/web-2 
         *80 -> [fd01::1]:8080 shop/web-1 ready serving
        fd01::1: shop/web-1, captured
    "#]]);
}

#[test]
fn changes_follow_through() {
    let mut world = World::of(SHOP);
    assert!(!world.put(SHOP), "nothing is new");
    // Relabelled away, removed, the namespace un-enrolled.
    assert!(world.put("{kind: Pod, metadata: {name: web-1, namespace: shop}, status: {podIP: 10.1.0.1}}"));
    assert!(world.remove(Kind::Pod, "shop", "web-2"));
    assert!(world.remove(Kind::Namespace, "", "shop"));
    world.check(expect![[r#"
        shop/db-0 of db-0: not wanted
        shop/web-1 of web-1: not wanted
        10.0.0.1: shop/web
        10.1.0.1: shop/web-1
        10.1.0.3: shop/db-0
        fd00::1: shop/web
    "#]]);
    assert!(world.remove(Kind::Service, "shop", "web"));
    assert!(world.remove(Kind::Pod, "shop", "web-1"));
    assert!(world.remove(Kind::Pod, "shop", "db-0"));
    assert!(!world.remove(Kind::Pod, "shop", "db-0"));
    world.check(expect![""]);
}

#[test]
fn endpoint_slices_take_the_selectors_place() {
    let mut world = World::of(SHOP);
    world.put(
        "
kind: EndpointSlice
metadata: {name: web-a, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 9000}, {name: other, port: 9001}]
endpoints:
- {addresses: [10.1.0.1], conditions: {ready: false, serving: true, terminating: true}}
- {addresses: [10.1.0.3], targetRef: {kind: Pod, name: db-0}}
- {addresses: [10.9.9.9, 10.9.9.300]}
---
kind: EndpointSlice
metadata: {name: web-b, namespace: shop, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
ports: [{name: http, port: 9000}]
endpoints:
- {addresses: [10.1.0.1], conditions: {ready: true}}
---
kind: EndpointSlice
metadata: {name: nobodys, namespace: shop}
addressType: IPX
endpoints: []
",
    );
    world.check(expect![[r#"
        shop/db-0 of db-0: wanted
        shop/web-1 of web-1: wanted
        shop/web-2 of web-2: wanted
        10.0.0.1: shop/web, captured
         *80 -> 10.1.0.1:9000 shop/web-1 ready serving
         *80 -> 10.1.0.3:9000 shop/db-0 ready serving
         *80 -> 10.9.9.9:9000 ? ready serving
        10.1.0.1: shop/web-1, captured
        10.1.0.2: shop/web-2, captured
        10.1.0.3: shop/db-0, captured
        fd00::1: shop/web, captured
         *80 -> 10.1.0.1:9000 shop/web-1 ready serving
         *80 -> 10.1.0.3:9000 shop/db-0 ready serving
         *80 -> 10.9.9.9:9000 ? ready serving
        fd01::1: shop/web-1, captured
        ! endpoints[2].addresses[1]: expected an IP address, found "10.9.9.300"
        ! addressType: expected IPv4, IPv6 or FQDN, found "IPX"
    "#]]);
    world.remove(Kind::EndpointSlice, "shop", "web-b");
    world.remove(Kind::EndpointSlice, "shop", "web-a");
    let by_selector = World::of(SHOP).compiler.snapshot();
    let again = world.compiler.snapshot();
    assert_eq!(format!("{:?}", again.destinations), format!("{:?}", by_selector.destinations));
}

#[test]
fn who_is_enrolled() {
    let mut world = World::of(
        "
kind: Namespace
metadata: {name: mesh, labels: {undermesh.io/mesh: enabled}, annotations: {undermesh.io/mtls: strict}}
---
{kind: Namespace, metadata: {name: kube-system, labels: {undermesh.io/mesh: enabled}}}
---
{kind: Namespace, metadata: {name: typo, labels: {undermesh.io/mesh: 'on'}, annotations: {undermesh.io/mtls: Strict, undermesh.io/dialled-pods: Service}}}
---
{kind: Pod, metadata: {name: a, namespace: mesh}}
---
{kind: Pod, metadata: {name: b, namespace: mesh, labels: {undermesh.io/mesh: disabled}, annotations: {undermesh.io/mtls: permissive}}}
---
{kind: Pod, metadata: {name: c, namespace: mesh}, spec: {hostNetwork: true, containers: []}, status: {podIP: 192.0.2.1}}
---
{kind: Pod, metadata: {name: d, namespace: mesh}, spec: {runtimeClassName: kata-qemu, containers: []}}
---
{kind: Pod, metadata: {name: d2, namespace: mesh}, spec: {runtimeClassName: runsc, containers: []}}
---
{kind: Pod, metadata: {name: e, namespace: mesh}, spec: {os: {name: windows}, containers: []}}
---
{kind: Pod, metadata: {name: f, namespace: mesh, annotations: {kubernetes.io/config.mirror: x}}}
---
{kind: Pod, metadata: {name: g, namespace: mesh, annotations: {undermesh.io/netns: /run/netns/g, undermesh.io/cgroup: /sys/g}}}
---
{kind: Pod, metadata: {name: h, namespace: mesh, annotations: {undermesh.io/netns: /run/netns/h}}}
---
{kind: Pod, metadata: {name: i, namespace: mesh}, status: {phase: Succeeded, podIP: 10.1.0.1}}
---
{kind: Pod, metadata: {name: j, namespace: mesh, labels: {kubevirt.io: virt-launcher}}}
---
{kind: Pod, metadata: {name: k, namespace: mesh}, spec: {containers: [{name: app}, {name: istio-proxy}]}}
---
{kind: Pod, metadata: {name: l, namespace: mesh}, spec: {containers: [], initContainers: [{name: linkerd-proxy, restartPolicy: Always}]}}
---
{kind: Pod, metadata: {name: m, namespace: mesh, labels: {app.kubernetes.io/name: undermesh}}}
---
{kind: Pod, metadata: {name: a, namespace: typo}}
---
{kind: Pod, metadata: {name: b, namespace: typo, labels: {undermesh.io/mesh: enabled}}}
---
{kind: Pod, metadata: {name: a, namespace: kube-system}}
---
{kind: Pod, metadata: {name: a}, status: {podIPs: [{ip: '10.1'}, {ip: '::ffff:10.1.0.9'}]}}
",
    );
    world.check(expect![[r#"
        default/a of a: not wanted
        kube-system/a of a: pods in kube-system stay out of the mesh, which needs them in order to work
        mesh/a of a: wanted, strict
        mesh/b of b: not wanted
        mesh/c of c: the pod uses the host's network and has no network namespace of its own to capture in, strict
        mesh/d of d: the pod's runtime class gives it a kernel of its own, where this node's kernel programs do not run, strict
        mesh/d2 of d2: the pod's runtime class gives it a kernel of its own, where this node's kernel programs do not run, strict
        mesh/e of e: the pod runs on Windows, which has no eBPF that could capture it, strict
        mesh/f of f: the pod is static: the kubelet runs it from a file, without the API server's say, strict
        mesh/g of g: wanted, strict, /run/netns/g
        mesh/h of h: wanted, strict
        mesh/j of j: the pod is a virtual machine of KubeVirt, whose traffic does not come from the pod's sockets, strict
        mesh/k of k: the pod has a sidecar of Istio (istio-proxy); take it out of that mesh first, strict
        mesh/l of l: the pod has a sidecar of Linkerd (linkerd-proxy); take it out of that mesh first, strict
        mesh/m of m: the pod is the mesh's own, which cannot carry itself, strict
        typo/a of a: not wanted, strict
        typo/b of b: wanted, strict
        10.1.0.9: default/a
        ! metadata.labels[undermesh.io/mesh]: expected enabled or disabled, found "on"
        ! metadata.annotations[undermesh.io/mtls]: expected permissive or strict (strict is in force until then), found "Strict"
        ! metadata.annotations[undermesh.io/dialled-pods]: expected pod or service (pod is in force until then), found "Service"
        ! metadata.annotations[undermesh.io/netns]: expected the annotation undermesh.io/cgroup beside it
        ! status.podIPs[0].ip: expected an IP address, found "10.1"
    "#]]);
}

#[test]
fn workloads_are_named_after_their_controllers() {
    for (kind, owner, labels, expected) in [
        ("ReplicaSet", "web-5d4f8", "pod-template-hash: 5d4f8", "web"),
        ("ReplicaSet", "web-5d4f8", "app: web", "web-5d4f8"),
        ("StatefulSet", "db", "a: b", "db"),
        ("DaemonSet", "log", "a: b", "log"),
        ("Job", "backup-29081234", "a: b", "backup"),
        ("Job", "backup-7", "a: b", "backup-7"),
    ] {
        let world = World::of(&format!(
            "{{kind: Pod, metadata: {{name: x, labels: {{{labels}}}, ownerReferences: \
             [{{apiVersion: a/v1, kind: {kind}, name: {owner}, uid: u, controller: true}}]}}}}"
        ));
        let snapshot = world.compiler.snapshot();
        assert_eq!(
            snapshot.workloads.values().next().map(|it| &*it.workload),
            Some(expected),
            "{kind} {owner}"
        );
    }
}

#[test]
fn two_pods_with_one_address() {
    let pod = |name: &str, created: &str, rest: &str| {
        format!(
            "{{kind: Pod, metadata: {{name: {name}, uid: u, creationTimestamp: {created}, labels: {{app: web}}{rest}}}, \
             status: {{podIP: 10.1.0.1}}}}"
        )
    };
    let mut world = World::of(&pod("old", "2026-01-01T00:00:00Z", ""));
    world.put("{kind: Service, metadata: {name: web}, spec: {clusterIP: 10.0.0.1, selector: {app: web}, ports: [{port: 80}]}}");
    world.put(&pod("new", "2026-01-02T00:00:00Z", ", deletionTimestamp: 2026-01-03T00:00:00Z"));
    world.check(expect![[r#"
        default/new of new: not wanted
        default/old of old: not wanted
        10.0.0.1: default/web
         *80 -> 10.1.0.1:80 default/new serving terminating
        10.1.0.1: default/new
    "#]]);
    world.remove(Kind::Pod, "default", "new");
    world.check(expect![[r#"
        default/old of old: not wanted
        10.0.0.1: default/web
         *80 -> 10.1.0.1:80 default/old ready serving
        10.1.0.1: default/old
    "#]]);
}

#[test]
fn services_without_an_address_and_bad_fields() {
    let mut world = World::of(
        "
{kind: Service, metadata: {name: headless}, spec: {clusterIP: None, ports: [{port: 80}]}}
---
{kind: Service, metadata: {name: external}, spec: {type: ExternalName, externalName: example.com}}
---
{kind: Service, metadata: {name: none}}
---
kind: Service
metadata: {name: odd}
spec:
  clusterIP: 10.0.0.5
  internalTrafficPolicy: local
  sessionAffinity: ClientIP
  sessionAffinityConfig: {clientIP: {timeoutSeconds: 0}}
  ports: [{port: 80, targetPort: 70000}, {port: -1}, {port: 81}, {port: 81}]
---
{kind: Service, metadata: {name: kubernetes}, spec: {clusterIP: 10.0.0.9, selector: {app: api}, ports: [{port: 443}]}}
---
{kind: Pod, metadata: {name: api, labels: {app: api, undermesh.io/mesh: enabled}}, status: {podIP: 10.1.0.9}}
",
    );
    world.check(expect![[r#"
        default/api of api: wanted
        10.0.0.5: default/odd
        10.0.0.9: default/kubernetes
         *443 -> 10.1.0.9:443 default/api ready serving
        10.1.0.9: default/api, captured
        ! spec.clusterIP: expected an IP address or None: no API server will assign one to this manifest
        ! spec.ports[0].targetPort: expected a port from 1 to 65535, found 70000
        ! spec.ports[1].port: expected a port from 1 to 65535, found -1
        ! spec.ports[3].port: expected each TCP port once, found 81 again
        ! spec.sessionAffinityConfig.clientIP.timeoutSeconds: expected 1 to 86400 seconds, found 0
        ! spec.internalTrafficPolicy: expected Cluster or Local, found "local"
    "#]]);
}

#[test]
fn not_ready_addresses_and_host_ports() {
    let mut world = World::of(
        "
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.0.0.1, publishNotReadyAddresses: true, selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}
---
{kind: Pod, metadata: {name: starting, labels: {app: web}}, status: {podIP: 10.1.0.1, phase: Pending}}
---
{kind: Pod, metadata: {name: ending, labels: {app: web}, deletionTimestamp: 2026-01-03T00:00:00Z}, status: {podIP: 10.1.0.2, phase: Running}}
---
{kind: Pod, metadata: {name: host, labels: {app: web}}, spec: {hostNetwork: true, containers: []}, status: {podIP: 192.0.2.1, phase: Running}}
---
{kind: Pod, metadata: {name: done, labels: {app: web}}, status: {podIP: 10.1.0.3, phase: Failed}}
",
    );
    world.check(expect![[r#"
        default/ending of ending: not wanted
        default/host of host: not wanted
        default/starting of starting: not wanted
        10.0.0.1: default/web
         *80 -> 10.1.0.1:8080 default/starting ready
         *80 -> 10.1.0.2:8080 default/ending ready serving terminating
         *80 -> 192.0.2.1:8080 default/host ready serving
        10.1.0.1: default/starting
        10.1.0.2: default/ending
    "#]]);
}

#[test]
fn what_did_not_change_is_shared_and_counters_stay() {
    let mut world = World::of(SHOP);
    world.put("{kind: Service, metadata: {name: db, namespace: shop}, spec: {clusterIP: 10.0.0.2, selector: {app: db}, ports: [{port: 5432}]}}");
    let service = |world: &World, address: &str| match world
        .compiler
        .snapshot()
        .destination(address.parse().unwrap())
    {
        Some(Destination::Service(service)) => service.clone(),
        other => panic!("{other:?}"),
    };
    let (web, db) = (service(&world, "10.0.0.1"), service(&world, "10.0.0.2"));
    let open = web.ports[0].endpoints[0].load.enter();
    assert!(world.put("{kind: Pod, metadata: {name: web-3, namespace: shop, labels: {app: web}}, spec: {containers: [{name: c, ports: [{name: web, containerPort: 1}]}]}, status: {podIP: 10.1.0.9}}"));
    let again = service(&world, "10.0.0.1");
    assert!(!Arc::ptr_eq(&web, &again));
    assert!(Arc::ptr_eq(&db, &service(&world, "10.0.0.2")));
    assert_eq!(again.ports[0].endpoints[0].load.open(), 1);

    // Gone and back again while the connection lives.
    world.remove(Kind::Service, "shop", "web");
    world.put(SHOP);
    assert_eq!(service(&world, "10.0.0.1").ports[0].endpoints[0].load.open(), 1);
    drop(open);
    assert_eq!(service(&world, "10.0.0.1").ports[0].endpoints[0].load.open(), 0);
}

#[test]
fn pods_that_do_not_choose_have_the_default_mode() {
    let node = NodeInfo { name: "node-1".into(), zone: None };
    let defaults = Defaults { mtls: MtlsMode::Strict, ..Defaults::default() };
    let mut world = World::with(node, defaults);
    world.put(
        "
{kind: Namespace, metadata: {name: open, annotations: {undermesh.io/mtls: permissive}}}
---
{kind: Pod, metadata: {name: a, namespace: open}}
---
{kind: Pod, metadata: {name: b, namespace: open, annotations: {undermesh.io/mtls: strict}}}
---
{kind: Pod, metadata: {name: c, namespace: silent}}
---
{kind: Pod, metadata: {name: d, namespace: silent, annotations: {undermesh.io/mtls: permissive}}}
",
    );
    world.check(expect![[r#"
        open/a of a: not wanted
        open/b of b: not wanted, strict
        silent/c of c: not wanted, strict
        silent/d of d: not wanted
    "#]]);
}

#[test]
fn a_workload_is_its_service_account() {
    let mut world = World::of_domain("cluster.local");
    let pods = "
{kind: Pod, metadata: {name: a, namespace: shop}, spec: {serviceAccountName: web}}
---
{kind: Pod, metadata: {name: b, namespace: shop}}
---
{kind: Pod, metadata: {name: c, namespace: shop}, spec: {serviceAccountName: web/../admin}}
";
    world.put(pods);
    world.check(expect![[r#"
        shop/a of a: not wanted, spiffe://cluster.local/ns/shop/sa/web
        shop/b of b: not wanted, spiffe://cluster.local/ns/shop/sa/default
        shop/c of c: not wanted
    "#]]);
    assert!(world.put("{kind: Pod, metadata: {name: a, namespace: shop}, spec: {serviceAccountName: pay}}"));
    world.check(expect![[r#"
        shop/a of a: not wanted, spiffe://cluster.local/ns/shop/sa/pay
        shop/b of b: not wanted, spiffe://cluster.local/ns/shop/sa/default
        shop/c of c: not wanted
    "#]]);
}

#[test]
fn a_pod_of_another_trust_domain_is_reached_and_never_enrolled_here() {
    let pods = "
{kind: Namespace, metadata: {name: shop, labels: {undermesh.io/mesh: enabled}}}
---
{kind: Pod, metadata: {name: far, namespace: shop, annotations: {undermesh.io/trust-domain: b.test}}, spec: {nodeName: node-2}}
---
{kind: Pod, metadata: {name: near, namespace: shop, annotations: {undermesh.io/trust-domain: b.test}}, spec: {nodeName: node-1}}
---
{kind: Pod, metadata: {name: own, namespace: shop, annotations: {undermesh.io/trust-domain: a.test}}, spec: {nodeName: node-1}}
---
{kind: Pod, metadata: {name: typo, namespace: shop, annotations: {undermesh.io/trust-domain: B.test}}, spec: {nodeName: node-2}}
";
    let mut world = World::of_domain("a.test");
    world.put(pods);
    world.check(expect![[r#"
        shop/far of far: wanted, spiffe://b.test/ns/shop/sa/default
        shop/near of near: the pod is of the trust domain b.test (undermesh.io/trust-domain), and the authority of its node's agent speaks for a.test alone, spiffe://b.test/ns/shop/sa/default
        shop/own of own: wanted, spiffe://a.test/ns/shop/sa/default
        shop/typo of typo: wanted, spiffe://a.test/ns/shop/sa/default
        ! metadata.annotations[undermesh.io/trust-domain]: expected a trust domain (the mesh's own is in force until then), found "B.test": the trust domain has a character other than a-z, 0-9, '.', '-' and '_'
    "#]]);
    // Without an authority nobody is anybody.
    let mut world = World::of(pods);
    world.check(expect![[r#"
        shop/far of far: wanted
        shop/near of near: wanted
        shop/own of own: wanted
        shop/typo of typo: wanted
        ! metadata.annotations[undermesh.io/trust-domain]: expected a trust domain (the mesh's own is in force until then), found "B.test": the trust domain has a character other than a-z, 0-9, '.', '-' and '_'
    "#]]);
}
