//! Who has which AuthorizationPolicies.

use super::*;
use crate::policy::authorization::Set;

/// Pods of this node: two of shop's web, its db with a named port, one of bank, and one that does not ask for the mesh.
const PODS: &str = "
{kind: Namespace, metadata: {name: shop, labels: {undermesh.io/mesh: enabled}}}
---
{kind: Namespace, metadata: {name: bank, labels: {undermesh.io/mesh: enabled}}}
---
{kind: Pod, metadata: {name: web-1, namespace: shop, labels: {app: web, tier: front}}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.1}}
---
{kind: Pod, metadata: {name: web-2, namespace: shop, labels: {app: web}}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.2}}
---
kind: Pod
metadata: {name: db-0, namespace: shop, labels: {app: db}}
spec: {nodeName: node-1, containers: [{name: c, ports: [{name: sql, containerPort: 5432}]}]}
status: {podIP: 10.1.0.3}
---
{kind: Pod, metadata: {name: teller, namespace: bank, labels: {app: web}}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.4}}
---
{kind: Pod, metadata: {name: far, namespace: shop, labels: {app: web}}, spec: {nodeName: node-2, containers: []}, status: {podIP: 10.2.0.1}}
---
{kind: Pod, metadata: {name: out, namespace: shop, labels: {app: web, undermesh.io/mesh: disabled}}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.5}}
";

fn world(yaml: &str) -> World {
    let mut world = World::of_mesh(PODS);
    if !yaml.is_empty() {
        world.put(yaml);
    }
    world
}

fn policy(namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "{{kind: AuthorizationPolicy, metadata: {{name: {name}, namespace: {namespace}}}, spec: {{{spec}}}}}"
    )
}

fn service(name: &str, spec: &str) -> String {
    format!("{{kind: Service, metadata: {{name: {name}, namespace: shop}}, spec: {{{spec}}}}}")
}

fn of(world: &World, pod: &str) -> Arc<Set> {
    world.compiler.snapshot().access.get(pod).cloned().unwrap_or_default()
}

/// The policies of each pod of this node, and what is wrong with them.
fn check(world: &World, expected: Expect) {
    let mut table = String::new();
    for (uid, access) in &world.compiler.snapshot().access {
        let policies = access.policies().iter().map(|applied| {
            let name = applied.policy.name.trim_start_matches("AuthorizationPolicy ");
            let ports = applied.ports.as_ref().map(|ports| format!(" at {ports:?}")).unwrap_or_default();
            let invalid = if applied.policy.invalid.is_some() { " (denies)" } else { "" };
            format!("{name}{ports}{invalid}")
        });
        writeln!(table, "{uid}: {}", policies.collect::<Vec<_>>().join(", ")).unwrap();
    }
    let problems = world.compiler.problems().iter();
    for (key, problem) in problems.flat_map(|(key, all)| all.iter().map(move |it| (key, it))) {
        writeln!(table, "! {key}: {problem}").unwrap();
    }
    expected.assert_eq(&table);
}

#[test]
fn pods_are_known_of_which_something_is_about_requests() {
    let mut world = world("");
    let mut check = |spec: &str, expected: bool| {
        world.put(&policy("shop", "all", spec));
        let found = |pod| world.compiler.snapshot().workloads[pod].by_request;
        // Another namespace's, another node's and one that is not in the mesh never are.
        let found = ["shop/web-1", "bank/teller", "shop/far", "shop/out"].map(found);
        assert_eq!(found, [expected, false, false, false], "{spec}");
    };
    check("rules: [{from: [{namespaces: [shop]}]}]", false);
    check("rules: [{to: [{ports: [80]}]}]", false);
    check("rules: [{to: [{ports: [80]}, {paths: [/a]}]}]", true);
    check("rules: [{to: [{ports: [80]}]}]", false);
    check("rules: [{to: [{ports: [80], methods: [GET]}]}]", true);
    check("rules: [{when: [{header: {name: a, values: [b]}}]}]", true);
    check("rules: [{when: [{expression: \"request.path == '/a'\"}]}]", true);
    check("action: Audit, rules: [{to: [{paths: [/a]}]}]", true);
    check("action: Deny, dryRun: true, rules: [{to: [{paths: [/a]}]}]", true);
    // It denies, whatever is asked for.
    check("action: Deny, rules: [{to: [{pats: [/a]}]}]", false);
    check("", false);
}

#[test]
fn a_policy_is_for_the_pods_of_its_namespace_that_it_selects() {
    let mut world = world("");
    check(&world, expect![""]);
    assert!(world.put(&policy("shop", "all", "")));
    assert!(world.put(&policy("shop", "web", "selector: {matchLabels: {app: web}}")));
    let expressions = "{key: app, operator: In, values: [web, db]}, {key: tier, operator: DoesNotExist}";
    assert!(world.put(&policy("shop", "back", &format!("selector: {{matchExpressions: [{expressions}]}}"))));
    assert!(!world.put(&policy("shop", "nobody", "selector: {matchLabels: {app: api}}")));
    check(
        &world,
        expect![[r#"
            shop/db-0: shop/all, shop/back
            shop/web-1: shop/all, shop/web
            shop/web-2: shop/all, shop/back, shop/web
        "#]],
    );
    assert!(world.remove(Kind::AuthorizationPolicy, "shop", "all"));
    assert!(!world.remove(Kind::AuthorizationPolicy, "shop", "all"));
    assert!(world.put(&policy("shop", "web", "selector: {matchLabels: {app: db}}")));
    check(
        &world,
        expect![[r#"
            shop/db-0: shop/back, shop/web
            shop/web-2: shop/back
        "#]],
    );
    // Relabelled, un-enrolled, gone.
    let pod = |name: &str, labels: &str| {
        format!(
            "{{kind: Pod, metadata: {{name: {name}, namespace: shop, labels: {{{labels}}}}}, spec: {{nodeName: node-1, containers: []}}}}"
        )
    };
    assert!(world.put(&pod("web-1", "app: db")));
    assert!(world.put(&pod("web-2", "app: db, undermesh.io/mesh: disabled")));
    assert!(world.remove(Kind::Pod, "shop", "db-0"));
    check(
        &world,
        expect![[r#"
            shop/web-1: shop/back, shop/web
        "#]],
    );
}

#[test]
fn a_policy_of_the_meshs_own_namespace_is_for_all_pods_unless_it_selects() {
    let mut world = world(&policy("mesh", "everywhere", "action: Audit"));
    assert!(!world.put(&policy("mesh", "own", "selector: {matchLabels: {app: web}}")));
    world.put(&policy("bank", "all", ""));
    check(
        &world,
        expect![[r#"
        bank/teller: bank/all, mesh/everywhere
        shop/db-0: mesh/everywhere
        shop/web-1: mesh/everywhere
        shop/web-2: mesh/everywhere
    "#]],
    );
    world.put("{kind: Pod, metadata: {name: own, namespace: mesh, labels: {app: web, undermesh.io/mesh: enabled}}, spec: {nodeName: node-1, containers: []}}");
    assert!(world.remove(Kind::AuthorizationPolicy, "mesh", "everywhere"));
    check(
        &world,
        expect![[r#"
            bank/teller: bank/all
            mesh/own: mesh/own
        "#]],
    );
}

#[test]
fn a_policy_of_a_service_is_for_its_pods_at_the_ports_that_it_leads_to() {
    let refs = "targetRefs: [{group: '', kind: Service, name: db}, {group: '', kind: Service, name: web}]";
    let mut world = world(&policy("shop", "both", refs));
    check(
        &world,
        expect![[r#"
            ! AuthorizationPolicy shop/both: spec.targetRefs[0].name: there is no Service shop/db
            ! AuthorizationPolicy shop/both: spec.targetRefs[1].name: there is no Service shop/web
        "#]],
    );
    // A headless one, by the name of a port; and one that leads to two.
    assert!(
        world.put(&service(
            "db",
            "clusterIP: None, selector: {app: db}, ports: [{port: 5432, targetPort: sql}]"
        ))
    );
    assert!(world.put(&service("web", "clusterIP: 10.0.0.1, selector: {app: web}, ports: [{name: a, port: 80, targetPort: 8080}, {name: b, port: 81, targetPort: 8081}]")));
    world.put(&service("other", "clusterIP: 10.0.0.2, selector: {app: web}, ports: [{port: 9000}]"));
    check(
        &world,
        expect![[r#"
            shop/db-0: shop/both at [5432]
            shop/web-1: shop/both at [8080, 8081]
            shop/web-2: shop/both at [8080, 8081]
        "#]],
    );
    // The pod leaves one and is in another; the policy has both.
    assert!(world.put(&policy(
        "shop",
        "both",
        "targetRefs: [{group: '', kind: Service, name: other}, {group: '', kind: Service, name: web}]"
    )));
    assert!(world.put(&policy("shop", "one", "targetRefs: [{group: '', kind: Service, name: other}]")));
    assert!(world.put(&service(
        "web",
        "clusterIP: 10.0.0.1, selector: {app: web, tier: front}, ports: [{port: 80, targetPort: 8080}]"
    )));
    check(
        &world,
        expect![[r#"
            shop/web-1: shop/both at [8080, 9000], shop/one at [9000]
            shop/web-2: shop/both at [9000], shop/one at [9000]
        "#]],
    );
    assert!(world.remove(Kind::Service, "shop", "other"));
    assert!(world.put(
        "{kind: Pod, metadata: {name: web-1, namespace: shop}, spec: {nodeName: node-1, containers: []}}"
    ));
    check(
        &world,
        expect![[r#"
            ! AuthorizationPolicy shop/both: spec.targetRefs[0].name: there is no Service shop/other
            ! AuthorizationPolicy shop/one: spec.targetRefs[0].name: there is no Service shop/other
        "#]],
    );
}

/// In a cluster: endpoints are those of slices, and pods of other nodes have no labels.
#[test]
fn a_pod_is_behind_its_service_before_it_is_an_endpoint_and_where_a_slice_says_so() {
    let mut world = world(&policy("shop", "web", "targetRefs: [{group: '', kind: Service, name: web}]"));
    let put_sliced = |world: &mut World, yaml: &str| {
        let value: Value = serde_saphyr::from_str(yaml).unwrap();
        let Document::Service(mut service) = world.read(&value) else { panic!("{yaml}") };
        Arc::make_mut(&mut service).is_sliced = true;
        world.compiler.apply([Change::Put(Document::Service(service))])
    };
    put_sliced(
        &mut world,
        &service(
            "web",
            "clusterIP: None, selector: {tier: front}, ports: [{name: a, port: 80, targetPort: 8080}]",
        ),
    );
    check(
        &world,
        expect![[r#"
            shop/web-1: shop/web at [8080]
        "#]],
    );
    // Somebody else's pod is none of its, whatever its slice says.
    let slice = |endpoints: &str| {
        format!(
            "{{kind: EndpointSlice, metadata: {{name: s, namespace: shop, labels: {{kubernetes.io/service-name: web}}}}, addressType: IPv4, ports: [{{name: a, port: 7000}}, {{name: b, port: 7001}}], endpoints: [{endpoints}]}}"
        )
    };
    assert!(world.put(&slice("{addresses: [10.1.0.2]}, {addresses: [10.1.0.4]}, {addresses: [10.9.9.9], targetRef: {kind: Pod, name: db-0, namespace: shop}}")));
    check(
        &world,
        expect![[r#"
            shop/db-0: shop/web at [7000]
            shop/web-1: shop/web at [8080]
            shop/web-2: shop/web at [7000]
        "#]],
    );
    // The slice knows the address before its pod is known.
    world.put(&slice("{addresses: [10.1.0.77]}"));
    world.put("{kind: Pod, metadata: {name: new, namespace: shop}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.77}}");
    check(
        &world,
        expect![[r#"
            shop/new: shop/web at [7000]
            shop/web-1: shop/web at [8080]
        "#]],
    );
}

#[test]
fn a_policy_that_cannot_be_used_denies_at_once_and_where_it_is_for() {
    let mut world = world(&policy("shop", "web", "selector: {matchLabels: {app: web}}"));
    assert!(world.put(&policy("shop", "web", "selector: {matchLabels: {app: db}}, action: Block")));
    assert!(world.put(&policy("bank", "what", "selektor: {}, targetRefs: [{kind: Pod}]")));
    check(
        &world,
        expect![[r#"
            bank/teller: bank/what (denies)
            shop/db-0: shop/web (denies)
            ! AuthorizationPolicy bank/what: this version cannot be used: until then everything is denied at all pods of the namespace bank, for what it is for cannot be read
            ! AuthorizationPolicy shop/web: this version cannot be used: until then everything is denied at the pods that it selects
        "#]],
    );
    world.put(&policy("shop", "web", "selector: {matchLabels: {app: db}}"));
    world.remove(Kind::AuthorizationPolicy, "bank", "what");
    check(
        &world,
        expect![[r#"
            shop/db-0: shop/web
        "#]],
    );
}

#[test]
fn pods_with_the_same_policies_share_them_and_what_is_the_same_stays_so() {
    let rule = "rules: [{from: [{namespaces: [shop]}]}]";
    let mut world = world(&policy("shop", "all", rule));
    assert!(Arc::ptr_eq(&of(&world, "shop/web-1"), &of(&world, "shop/db-0")));
    world.put(&policy("shop", "web", "selector: {matchLabels: {app: web}}"));
    let (web, db, teller) = (of(&world, "shop/web-1"), of(&world, "shop/db-0"), of(&world, "bank/teller"));
    assert!(Arc::ptr_eq(&web, &of(&world, "shop/web-2")) && !Arc::ptr_eq(&web, &db));
    // The same again, written anew; a pod that comes; a policy of others.
    assert!(!world.put(&policy("shop", "all", rule)));
    world.put("{kind: Pod, metadata: {name: web-3, namespace: shop, labels: {app: web}}, spec: {nodeName: node-1, containers: []}}");
    world.put(&policy("bank", "all", rule));
    assert!(Arc::ptr_eq(&web, &of(&world, "shop/web-3")) && Arc::ptr_eq(&web, &of(&world, "shop/web-1")));
    assert!(Arc::ptr_eq(&db, &of(&world, "shop/db-0")) && !Arc::ptr_eq(&teller, &of(&world, "bank/teller")));
    // It is for others now, and says the same: whoever had it keeps the policy itself.
    world.put(&policy("shop", "all", &format!("{rule}, selector: {{matchLabels: {{app: db}}}}")));
    assert!(Arc::ptr_eq(&db, &of(&world, "shop/db-0")));
    assert!(Arc::ptr_eq(&web.policies()[1].policy, &of(&world, "shop/web-1").policies()[0].policy));
    drop((web, db, teller));
    for name in ["all", "web"] {
        world.remove(Kind::AuthorizationPolicy, "shop", name);
    }
    world.remove(Kind::AuthorizationPolicy, "bank", "all");
    assert!(!world.compiler.snapshot().access.contains_key("bank/teller"));
    assert!(world.compiler.access.is_empty(), "{:?}", world.compiler.access);
}

/// At which ports, where a Service that leads to a pod of this node has them declared to carry something else.
#[test]
fn what_of_a_policy_cannot_be_done_is_told() {
    let mut world = world("");
    let service = |declared: &str, leads_to: &str| {
        format!(
            "{{kind: Service, metadata: {{name: s, namespace: shop}}, spec: {{clusterIP: 10.0.0.9, selector: {{app: {leads_to}}}, \
             ports: [{{name: {declared}, port: 6379}}]}}}}"
        )
    };
    world.put("{kind: Pod, metadata: {name: away, namespace: shop, labels: {app: away}}, spec: {nodeName: node-2, containers: []}}");
    world.put(&policy("shop", "all", "rules: [{to: [{methods: [GET]}]}]"));
    world.put(&policy(
        "shop",
        "dbs",
        "selector: {matchLabels: {app: db}}, rules: [{to: [{methods: [GET]}]}]",
    ));
    world.put(&policy("shop", "ports", "rules: [{to: [{ports: [80]}]}]"));
    let mut told = |yaml: &str| {
        world.put(yaml);
        let problems = world.compiler.problems().iter();
        let all = problems.flat_map(|(key, all)| all.iter().map(move |it| format!("{key}: {it}\n")));
        all.collect::<String>()
    };
    let redis = told(&service("redis", "web"));
    let nothing = [
        told(&service("http", "web")),
        // It leads to pods of other nodes alone: these tell of it.
        told(&service("redis", "away")),
    ];
    assert_eq!(nothing, [""; 2]);
    assert_eq!(told(&service("redis", "web")), redis);
    expect![[r#"
        AuthorizationPolicy shop/all: spec.rules: every connection to port 6379 of the Service shop/s is denied unless another policy allows it: it is declared to carry something other than HTTP, and without requests rule 1 can allow nothing
    "#]].assert_eq(&redis);
}
