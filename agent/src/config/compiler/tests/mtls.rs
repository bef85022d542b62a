//! What MeshPolicies and annotations come to.

use super::*;
use crate::model::MtlsSource;

const PODS: &str = "
{kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {nodeName: node-1, containers: []}}
---
{kind: Pod, metadata: {name: db, namespace: shop, labels: {app: db}, annotations: {undermesh.io/mtls: permissive}}, spec: {nodeName: node-1, containers: []}}
---
{kind: Pod, metadata: {name: teller, namespace: bank}, spec: {nodeName: node-1, containers: []}}
---
{kind: Pod, metadata: {name: far, namespace: bank}, spec: {nodeName: node-2, containers: []}}
";

pub(super) fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!("{{kind: MeshPolicy, metadata: {{name: {name}, namespace: {namespace}}}, spec: {{{spec}}}}}")
}

fn check(world: &World, expected: Expect) {
    let mut table = String::new();
    for workload in world.compiler.snapshot().workloads.values() {
        let ports: Vec<String> =
            workload.mtls_ports.iter().map(|(port, mode)| format!(", {port} {mode:?}")).collect();
        let by: Vec<String> = workload.mtls_by.iter().map(MtlsSource::to_string).collect();
        writeln!(table, "{}: {:?}{} by {}", workload.pod, workload.mtls, ports.concat(), by.join(" and "))
            .unwrap();
    }
    let problems = world.compiler.problems().iter();
    for (key, problem) in problems.flat_map(|(key, all)| all.iter().map(move |it| (key, it))) {
        writeln!(table, "! {key}: {problem}").unwrap();
    }
    expected.assert_eq(&table);
}

#[test]
fn the_most_specific_has_the_word() {
    let mut world = World::of_mesh(PODS);
    for (yaml, expected) in [
        (
            policy("mesh", "all", "mtls: {mode: Strict}"),
            expect![[r#"
            bank/far: Permissive by 
            bank/teller: Strict by MeshPolicy mesh/all
            shop/db: Permissive by the pod's annotation undermesh.io/mtls
            shop/web: Strict by MeshPolicy mesh/all
        "#]],
        ),
        (
            "{kind: Namespace, metadata: {name: shop, annotations: {undermesh.io/mtls: permissive}}}".into(),
            expect![[r#"
                bank/far: Permissive by 
                bank/teller: Strict by MeshPolicy mesh/all
                shop/db: Permissive by the pod's annotation undermesh.io/mtls
                shop/web: Permissive by the namespace's annotation undermesh.io/mtls
            "#]],
        ),
        (
            policy("shop", "all", "mtls: {mode: Strict}"),
            expect![[r#"
            bank/far: Permissive by 
            bank/teller: Strict by MeshPolicy mesh/all
            shop/db: Permissive by the pod's annotation undermesh.io/mtls
            shop/web: Strict by MeshPolicy shop/all
        "#]],
        ),
        (
            policy("shop", "db", "selector: {matchLabels: {app: db}}, mtls: {mode: Strict}"),
            expect![[r#"
            bank/far: Permissive by 
            bank/teller: Strict by MeshPolicy mesh/all
            shop/db: Strict by MeshPolicy shop/db
            shop/web: Strict by MeshPolicy shop/all
        "#]],
        ),
    ] {
        world.put(&yaml);
        check(&world, expected);
    }
}

#[test]
fn ports_of_their_own_win_over_modes_of_the_same_level_and_lose_to_more_specific_ones() {
    let mut world = World::of_mesh(PODS);
    world.put(&policy(
        "mesh",
        "all",
        "mtls: {mode: Strict, ports: [{port: 9090, mode: Permissive}, {port: 1, mode: Strict}]}",
    ));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Strict, 9090 Permissive by MeshPolicy mesh/all
        shop/db: Permissive by the pod's annotation undermesh.io/mtls
        shop/web: Strict, 9090 Permissive by MeshPolicy mesh/all
    "#]],
    );
    world.put(&policy("bank", "all", "mtls: {ports: [{port: 8080, mode: Permissive}]}"));
    world.put(&policy(
        "shop",
        "web",
        "selector: {matchLabels: {app: web}}, mtls: {mode: Permissive, ports: [{port: 443, mode: Strict}]}",
    ));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Strict, 8080 Permissive, 9090 Permissive by MeshPolicy mesh/all and MeshPolicy bank/all
        shop/db: Permissive by the pod's annotation undermesh.io/mtls
        shop/web: Permissive, 443 Strict by MeshPolicy shop/web
    "#]],
    );
}

#[test]
fn of_several_that_are_as_specific_strict_wins() {
    let mut world = World::of_mesh(PODS);
    world.put(&policy("bank", "a", "mtls: {mode: Permissive, ports: [{port: 80, mode: Strict}]}"));
    assert!(world.put(&policy("bank", "b", "mtls: {mode: Permissive, ports: [{port: 81, mode: Strict}]}")));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Permissive, 80 Strict, 81 Strict by MeshPolicy bank/a and MeshPolicy bank/b
        shop/db: Permissive by the pod's annotation undermesh.io/mtls
        shop/web: Permissive by 
        ! MeshPolicy bank/a: MeshPolicy bank/b is as specific and says Strict for the port 81, which wins
        ! MeshPolicy bank/b: MeshPolicy bank/a is as specific and says Strict for the port 80, which wins
    "#]],
    );
    assert!(world.put(&policy("bank", "c", "mtls: {mode: Strict}")));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Strict by MeshPolicy bank/c
        shop/db: Permissive by the pod's annotation undermesh.io/mtls
        shop/web: Permissive by 
        ! MeshPolicy bank/a: MeshPolicy bank/b is as specific and says Strict for the port 81; MeshPolicy bank/c is as specific and says Strict, which wins
        ! MeshPolicy bank/b: MeshPolicy bank/a is as specific and says Strict for the port 80; MeshPolicy bank/c is as specific and says Strict, which wins
    "#]],
    );
    world.remove(Kind::MeshPolicy, "bank", "c");
    world.remove(Kind::MeshPolicy, "bank", "b");
    assert!(!world.remove(Kind::MeshPolicy, "bank", "b"));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Permissive, 80 Strict by MeshPolicy bank/a
        shop/db: Permissive by the pod's annotation undermesh.io/mtls
        shop/web: Permissive by 
    "#]],
    );
}

#[test]
fn a_version_that_cannot_be_used_leaves_the_last_one_and_without_one_is_strict() {
    let mut world = World::of_mesh(PODS);
    world.put(&policy("bank", "all", "mtls: {mode: Permissive, ports: [{port: 80, mode: Strict}]}"));
    assert!(!world.put(&policy("bank", "all", "mtls: {mode: Off}")));
    assert!(world.put(&policy("shop", "web", "selector: {matchLabels: {app: web}}, mtls: {mode: Off}")));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Permissive, 80 Strict by MeshPolicy bank/all
        shop/db: Permissive by the pod's annotation undermesh.io/mtls
        shop/web: Strict by MeshPolicy shop/web
        ! MeshPolicy bank/all: this version cannot be used, and the last one that could stays in force
        ! MeshPolicy shop/web: this version cannot be used, and there was none before it: its pods take no plaintext
    "#]],
    );
    // Where not even that can be read, it is for all pods of its namespace, as if it selected each.
    assert!(world.put(&policy("shop", "web", "selector: web")));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Permissive, 80 Strict by MeshPolicy bank/all
        shop/db: Strict by MeshPolicy shop/web
        shop/web: Strict by MeshPolicy shop/web
        ! MeshPolicy bank/all: this version cannot be used, and the last one that could stays in force
        ! MeshPolicy shop/web: this version cannot be used, and there was none before it: its pods take no plaintext
    "#]],
    );
    assert!(world.put(&policy(
        "shop",
        "web",
        "selector: {matchLabels: {app: web}}, mtls: {mode: Permissive}"
    )));
    assert!(world.put(&policy("bank", "all", "mtls: {mode: Permissive}")));
    check(
        &world,
        expect![[r#"
        bank/far: Permissive by 
        bank/teller: Permissive by MeshPolicy bank/all
        shop/db: Permissive by the pod's annotation undermesh.io/mtls
        shop/web: Permissive by MeshPolicy shop/web
    "#]],
    );
}

#[test]
fn who_takes_plaintext_that_took_none_is_known() {
    let of = |world: &World, pod: &str| world.compiler.snapshot().workloads.get(pod).unwrap().clone();
    let mut world = World::of_mesh(PODS);
    let mut told = Vec::new();
    for spec in [
        "mtls: {mode: Strict}",
        "mtls: {mode: Strict, ports: [{port: 80, mode: Permissive}]}",
        "mtls: {mode: Permissive, ports: [{port: 80, mode: Strict}]}",
        "mtls: {mode: Permissive}",
    ] {
        let before = of(&world, "bank/teller");
        world.put(&policy("bank", "all", spec));
        told.push(of(&world, "bank/teller").opened_since(&before));
    }
    use crate::model::Opened::{Pod, Ports};
    assert_eq!(told, [None, Some(Ports(vec![80])), Some(Pod), Some(Ports(vec![80]))]);
}

#[test]
fn a_pod_that_is_more_open_than_its_namespace_and_the_mesh_want_is_known() {
    use crate::model::Opened::{Pod, Ports};
    let mut world = World::of_mesh(PODS);
    let opened = |world: &World| {
        let workloads = world.compiler.snapshot().workloads;
        ["shop/web", "shop/db"].map(|pod| workloads.get(pod).unwrap().mtls_opened.clone())
    };
    assert_eq!(opened(&world), [None, None]);
    world.put(&policy("mesh", "all", "mtls: {mode: Strict}"));
    assert_eq!(opened(&world), [None, Some(Pod)]);
    let selecting = "selector: {matchLabels: {app: web}}, mtls: {ports: [{port: 9090, mode: Permissive}]}";
    world.put(&policy("shop", "web", selecting));
    assert_eq!(opened(&world), [Some(Ports(vec![9090])), Some(Pod)]);
    // What the namespace takes is not the pod's doing.
    world.put(&policy("shop", "all", "mtls: {mode: Permissive}"));
    assert_eq!(opened(&world), [None, None]);
}
