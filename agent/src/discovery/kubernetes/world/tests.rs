//! What comes in, and what the world is after it.

use expect_test::{Expect, expect};
use k8s_openapi::api::core::v1 as core;
use serde_json::{Value, json};

use super::*;
use crate::model::PodPaths;
use crate::snapshot::Destination;

/// A world that has heard of each kind, and a namespace that is in the mesh.
fn world() -> World {
    let node = NodeInfo { name: "node-1".into(), zone: None };
    let mut world = World::new(node, Defaults::default());
    for kind in Kind::ALL {
        world.take(News::Begins(kind));
    }
    let shop = json!({ "metadata": { "name": "shop", "labels": { "undermesh.io/mesh": "enabled" } } });
    let shop: core::Namespace = serde_json::from_value(shop).unwrap();
    let document = Document::namespace(&shop, &mut Vec::new()).unwrap();
    world.take(News::Object(document.key(), Some(document), Vec::new()));
    for kind in Kind::ALL {
        assert!(world.apply().is_none(), "{kind:?} is not known as a whole");
        world.take(News::Complete(kind));
    }
    world
}

/// A pod of the shop; the last digits of its uid, its node and its addresses.
fn pod(name: &str, uid: u32, node: &str, addresses: &[&str]) -> Value {
    let ips: Vec<_> = addresses.iter().map(|ip| json!({ "ip": ip })).collect();
    json!({
        "metadata": { "name": name, "namespace": "shop", "uid": uid.to_string() },
        "spec": { "nodeName": node, "containers": [] },
        "status": { "phase": "Running", "podIPs": ips },
    })
}

fn read(object: &Value) -> News {
    let object: core::Pod = serde_json::from_value(object.clone()).unwrap();
    let mut problems = Vec::new();
    let document = Document::pod(&object, &mut problems).unwrap();
    News::Object(document.key(), Some(document), problems)
}

fn place(addresses: &[&str]) -> Place {
    let paths = PodPaths { netns: "/run/netns/cni-1".into(), cgroup: "/sys/fs/cgroup/kubepods/pod1".into() };
    Place { paths, addresses: addresses.iter().map(|address| address.parse().unwrap()).collect() }
}

/// The workloads, who takes tunnels, and what the API server has been told.
fn check(world: &mut World, expected: Expect) {
    let Some(news) = world.apply() else { return expected.assert_eq("nothing new") };
    let mut lines = Vec::new();
    for workload in news.publication.snapshot.workloads.values() {
        let paths = workload.paths.as_ref().map(|paths| paths.netns.display().to_string());
        lines.push(format!(
            "{} {} {:?} {}",
            workload.uid,
            workload.pod,
            workload.addresses,
            paths.unwrap_or_else(|| "nowhere".into())
        ));
    }
    let mut published: Vec<_> = news.published.iter().collect();
    published.sort_by_key(|(address, _)| **address);
    for (address, pod) in published {
        lines.push(format!(
            "{address} takes tunnels: {} on {}, {}",
            pod.uid, pod.node, pod.plaintext_when_down
        ));
    }
    let mut told: Vec<_> = news.told.iter().collect();
    told.sort_by_key(|(uid, _)| (*uid).clone());
    for (uid, told) in told {
        lines.push(format!("told of {uid}: {:?}", told.enrolled));
    }
    lines.extend(news.publication.rejections.iter().map(ToString::to_string));
    expected.assert_eq(&lines.join("\n"));
}

#[test]
fn a_pod_of_this_node_lives_where_the_machine_says() {
    let mut world = world();
    let mut web = pod("web", 1, "node-1", &[]);
    // Whoever may annotate a pod does not say where it lives.
    web["metadata"]["annotations"] =
        json!({ "undermesh.io/netns": "/run/netns/other", "undermesh.io/cgroup": "/sys/fs/cgroup" });
    world.take(read(&web));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [] nowhere
        told of 1: None"#]],
    );
    // Before the API server knows its addresses.
    world.sight(Sighting::Found("1".into(), place(&["fd77::5", "10.0.0.5"])));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [fd77::5, 10.0.0.5] /run/netns/cni-1
        told of 1: None"#]],
    );
    // The same in another order is no reason to enrol it anew.
    web["status"]["podIPs"] = json!([{ "ip": "10.0.0.5" }, { "ip": "fd77::5" }]);
    world.take(read(&web));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [fd77::5, 10.0.0.5] /run/netns/cni-1
        told of 1: None"#]],
    );
    // What the API server says counts, where the two differ.
    web["status"]["podIPs"] = json!([{ "ip": "10.0.0.5" }]);
    world.take(read(&web));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [10.0.0.5] /run/netns/cni-1
        told of 1: None"#]],
    );
    world.sight(Sighting::Gone("1".into()));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [10.0.0.5] nowhere
        told of 1: None"#]],
    );
}

#[test]
fn what_is_found_before_it_is_told_of_is_kept() {
    let mut world = world();
    world.sight(Sighting::Found("1".into(), place(&["10.0.0.5"])));
    world.take(read(&pod("web", 1, "node-1", &[])));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [10.0.0.5] /run/netns/cni-1
        told of 1: None"#]],
    );
}

#[test]
fn pods_of_other_nodes_take_tunnels_when_their_agents_say_so() {
    let mut world = world();
    let mut far = pod("far", 2, "node-2", &["10.0.1.7", "fd77:1::7"]);
    far["metadata"]["annotations"] =
        json!({ "undermesh.io/netns": "/run/netns/x", "undermesh.io/cgroup": "/x" });
    world.take(read(&far));
    check(&mut world, expect!["2 shop/far [10.0.1.7, fd77:1::7] nowhere"]);
    far["metadata"]["annotations"] = json!({ "undermesh.io/enrolled": "open" });
    world.take(read(&far));
    check(
        &mut world,
        expect![[r#"
        2 shop/far [10.0.1.7, fd77:1::7] nowhere
        10.0.1.7 takes tunnels: 2 on node-2, true
        fd77:1::7 takes tunnels: 2 on node-2, true"#]],
    );
    // A value that means nothing is no way around the tunnel.
    far["metadata"]["annotations"] = json!({ "undermesh.io/enrolled": "perhaps" });
    world.take(read(&far));
    check(
        &mut world,
        expect![[r#"
        2 shop/far [10.0.1.7, fd77:1::7] nowhere
        10.0.1.7 takes tunnels: 2 on node-2, false
        fd77:1::7 takes tunnels: 2 on node-2, false"#]],
    );
    world.take(News::Gone(Key::of(Kind::Pod, &ObjectRef::new("shop", "far"))));
    check(&mut world, expect![""]);
}

#[test]
fn an_address_goes_to_the_pod_that_has_it_next() {
    let mut world = world();
    let mut first = pod("first", 2, "node-2", &["10.0.1.7"]);
    first["metadata"]["annotations"] = json!({ "undermesh.io/enrolled": "closed" });
    world.take(read(&first));
    let mut second = first.clone();
    second["metadata"]["name"] = json!("second");
    second["metadata"]["uid"] = json!("3");
    world.take(read(&second));
    world.take(News::Gone(Key::of(Kind::Pod, &ObjectRef::new("shop", "first"))));
    check(
        &mut world,
        expect![[r#"
        3 shop/second [10.0.1.7] nowhere
        10.0.1.7 takes tunnels: 3 on node-2, false"#]],
    );
}

/// After a watch has broken, the API server lists all there is.
#[test]
fn what_a_new_list_does_not_have_is_gone() {
    let mut world = world();
    for (name, uid) in [("stays", 1), ("goes", 2)] {
        world.take(read(&pod(name, uid, "node-1", &["10.0.0.5"])));
    }
    world.apply();
    world.take(News::Begins(Kind::Pod));
    world.take(read(&pod("stays", 1, "node-1", &["10.0.0.5"])));
    // Until the list is complete, nothing is missing from it.
    check(
        &mut world,
        expect![[r#"
        1 shop/stays [10.0.0.5] nowhere
        2 shop/goes [10.0.0.5] nowhere
        told of 1: None
        told of 2: None"#]],
    );
    world.take(News::Complete(Kind::Pod));
    check(
        &mut world,
        expect![[r#"
        1 shop/stays [10.0.0.5] nowhere
        told of 1: None"#]],
    );
}

/// A StatefulSet makes the same name again; the watch may miss what was between.
#[test]
fn a_pod_of_the_same_name_is_another_one() {
    let mut world = world();
    world.take(read(&pod("db-0", 1, "node-1", &["10.0.0.5"])));
    world.sight(Sighting::Found("1".into(), place(&["10.0.0.5"])));
    world.apply();
    world.take(read(&pod("db-0", 2, "node-1", &["10.0.0.5"])));
    check(
        &mut world,
        expect![[r#"
        2 shop/db-0 [10.0.0.5] nowhere
        told of 2: None"#]],
    );
    // And again on another node.
    world.take(read(&pod("db-0", 3, "node-2", &["10.0.1.5"])));
    check(&mut world, expect!["3 shop/db-0 [10.0.1.5] nowhere"]);
}

#[test]
fn what_is_wrong_is_told_until_it_is_mended() {
    let mut world = world();
    let mut web = pod("web", 1, "node-2", &[]);
    web["metadata"]["labels"] = json!({ "undermesh.io/mesh": "enabledd" });
    world.take(read(&web));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [] nowhere
        Pod shop/web: metadata.labels[undermesh.io/mesh]: expected enabled or disabled, found "enabledd""#]],
    );
    check(&mut world, expect!["nothing new"]);
    web["metadata"]["labels"] = json!({});
    world.take(read(&web));
    check(&mut world, expect!["1 shop/web [] nowhere"]);
}

/// Kubernetes makes slices of whom a selector selects; who is in none of them is no endpoint.
#[test]
fn endpoints_are_those_of_slices_alone() {
    let mut world = world();
    let [mut near, mut far] =
        [pod("near", 1, "node-1", &["10.0.0.5"]), pod("far", 2, "node-2", &["10.0.1.5"])];
    for pod in [&mut near, &mut far] {
        pod["metadata"]["labels"] = json!({ "app": "web" });
        world.take(read(pod));
    }
    let service = json!({
        "metadata": { "name": "web", "namespace": "shop" },
        "spec": { "clusterIP": "10.96.0.7", "selector": { "app": "web" }, "ports": [{ "port": 80, "targetPort": 7000 }] },
    });
    let service: core::Service = serde_json::from_value(service).unwrap();
    let document = Document::service(&service, &mut Vec::new()).unwrap();
    world.take(News::Object(document.key(), Some(document), Vec::new()));
    let endpoints = |world: &mut World| -> Vec<String> {
        let news = world.apply().unwrap();
        let destination = news.publication.snapshot.destination("10.96.0.7".parse().unwrap()).cloned();
        let Some(Destination::Service(service)) = destination else { panic!("{destination:?}") };
        service.ports[0].endpoints.iter().map(|endpoint| endpoint.address.to_string()).collect()
    };
    assert!(endpoints(&mut world).is_empty());

    let slice = json!({
        "metadata": { "name": "web-1", "namespace": "shop", "labels": { "kubernetes.io/service-name": "web" } },
        "addressType": "IPv4", "ports": [{ "name": "", "port": 7000 }],
        "endpoints": [{ "addresses": ["10.0.1.5"], "conditions": { "ready": true } }],
    });
    let slice = serde_json::from_value(slice).unwrap();
    let document = Document::endpoint_slice(&slice, &mut Vec::new()).unwrap();
    world.take(News::Object(document.key(), Some(document), Vec::new()));
    assert_eq!(endpoints(&mut world), ["10.0.1.5:7000"]);
}

/// As an agent has it that begins while the API server does not answer: all is as it was, until a kind is told of as a whole.
#[test]
fn what_was_known_last_is_in_force_until_the_api_server_has_told_of_it() {
    let mut before = world();
    assert!(before.remember().is_none(), "nothing is in force yet");
    let mut db = pod("db", 2, "node-2", &["10.0.1.6"]);
    db["metadata"]["annotations"] = json!({ "undermesh.io/enrolled": "open" });
    for object in [pod("web", 1, "node-1", &["10.0.0.5"]), db, pod("old", 3, "node-1", &["10.0.0.6"])] {
        before.take(read(&object));
    }
    before.sight(Sighting::Found("1".into(), place(&["10.0.0.5"])));
    assert!(before.apply().is_some());
    let remembered = || Remembered {
        as_of: SystemTime::UNIX_EPOCH,
        zone: None,
        // By the way of the file.
        records: serde_json::from_str(&serde_json::to_string(&before.remember().unwrap()).unwrap()).unwrap(),
    };

    let mut world = World::new(NodeInfo { name: "node-1".into(), zone: None }, Defaults::default());
    // It has begun to tell of pods, of which one has other addresses by now, and has broken off.
    world.take(News::Begins(Kind::Pod));
    world.take(read(&pod("web", 1, "node-1", &["10.0.0.7"])));
    // The machine shows one pod.
    world.sight(Sighting::Found("1".into(), place(&["10.0.0.7"])));
    assert!(world.apply().is_none());
    world.recall(remembered());
    assert!(world.remember().is_none(), "it is not written again as if it were news");
    check(
        &mut world,
        expect![[r#"
        1 shop/web [10.0.0.7] /run/netns/cni-1
        2 shop/db [10.0.1.6] nowhere
        3 shop/old [10.0.0.6] nowhere
        10.0.1.6 takes tunnels: 2 on node-2, true
        told of 1: None
        told of 3: None"#]],
    );
    let told = |world: &mut World| world.apply().map(|news| news.as_of);
    for kind in Kind::ALL.into_iter().filter(|kind| *kind != Kind::Pod && kind.is_followed_as_a_whole()) {
        world.take(News::Begins(kind));
        if kind == Kind::Namespace {
            let shop = before.compiler.documents().find(|it| it.kind() == Kind::Namespace).unwrap();
            world.take(News::Object(shop.key(), Some(shop), Vec::new()));
        }
        world.take(News::Complete(kind));
        assert_eq!(told(&mut world), None, "{kind:?} is as it was");
    }
    world.take(News::Complete(Kind::Pod));
    check(
        &mut world,
        expect![[r#"
        1 shop/web [10.0.0.7] /run/netns/cni-1
        told of 1: None"#]],
    );
    assert!(world.remember().is_some());
}
