//! Which MeshPolicy has the word on the tokens that a pod is shown.

use super::mtls::policy;
use super::*;

const PODS: &str = "
{kind: Namespace, metadata: {name: shop, labels: {undermesh.io/mesh: enabled}}}
---
{kind: Namespace, metadata: {name: bank, labels: {undermesh.io/mesh: enabled}}}
---
{kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.1}}
---
{kind: Pod, metadata: {name: db, namespace: shop, labels: {app: db}}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.2}}
---
{kind: Pod, metadata: {name: out, namespace: shop, labels: {app: db, undermesh.io/mesh: disabled}}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.3}}
---
{kind: Pod, metadata: {name: teller, namespace: bank}, spec: {nodeName: node-1, containers: []}, status: {podIP: 10.1.0.4}}
---
{kind: Pod, metadata: {name: far, namespace: bank}, spec: {nodeName: node-2, containers: []}, status: {podIP: 10.2.0.1}}
";

/// A section that believes this issuer.
fn jwt(issuer: &str) -> String {
    format!("jwt: {{issuers: [{{issuer: {issuer}, jwks: {{uri: \"https://{issuer}/keys\"}}}}]}}")
}

/// Whom the pods of this node believe, and by whose word; and what is wrong.
fn check(world: &World, expected: Expect) {
    let mut table = String::new();
    let snapshot = world.compiler.snapshot();
    for (uid, rules) in &snapshot.tokens {
        let issuers: Vec<&str> = rules.issuers.iter().map(|issuer| &*issuer.name).collect();
        let invalid = rules.invalid.as_deref().map(|why| format!("nobody, for {why}")).unwrap_or_default();
        let workload = &snapshot.workloads[uid];
        assert!(workload.guarded, "{uid} lets everybody in while there is no agent");
        assert!(workload.by_request, "{uid} is reached in plaintext on its node");
        writeln!(table, "{uid}: {}{invalid} by {}", issuers.join(", "), rules.policy).unwrap();
    }
    let problems = world.compiler.problems().iter();
    for (key, problem) in problems.flat_map(|(key, all)| all.iter().map(move |it| (key, it))) {
        writeln!(table, "! {key}: {problem}").unwrap();
    }
    expected.assert_eq(&table);
}

#[test]
fn the_most_specific_that_speaks_of_tokens_has_the_word_on_all_of_it() {
    let mut world = World::of_mesh(PODS);
    check(&world, expect![[""]]);
    assert!(world.put(&policy("mesh", "all", &jwt("a"))));
    check(
        &world,
        expect![[r#"
        bank/teller: a by MeshPolicy mesh/all
        shop/db: a by MeshPolicy mesh/all
        shop/web: a by MeshPolicy mesh/all
    "#]],
    );
    // One that speaks of something else leaves it to others.
    world.put(&policy("shop", "all", &jwt("b")));
    world.put(&policy("bank", "all", "mtls: {mode: Strict}"));
    world.put(&policy("shop", "web", "selector: {matchLabels: {app: web}}, mtls: {mode: Permissive}"));
    world.put(&policy("shop", "db", &format!("selector: {{matchLabels: {{app: db}}}}, {}", jwt("c"))));
    check(
        &world,
        expect![[r#"
        bank/teller: a by MeshPolicy mesh/all
        shop/db: c by MeshPolicy shop/db
        shop/web: b by MeshPolicy shop/all
    "#]],
    );
    assert!(world.remove(Kind::MeshPolicy, "shop", "db"));
    assert!(world.remove(Kind::MeshPolicy, "mesh", "all"));
    check(
        &world,
        expect![[r#"
        shop/db: b by MeshPolicy shop/all
        shop/web: b by MeshPolicy shop/all
    "#]],
    );
    assert!(world.remove(Kind::MeshPolicy, "shop", "all"));
    check(&world, expect![[""]]);
}

#[test]
fn what_says_the_same_is_the_same() {
    let mut world = World::of_mesh(PODS);
    world.put(&policy("bank", "all", &jwt("a")));
    let rules = |world: &World| world.compiler.snapshot().tokens.get("bank/teller").unwrap().clone();
    let before = rules(&world);
    world.put(&policy("bank", "all", &format!("mtls: {{mode: Strict}}, {}", jwt("a"))));
    assert!(Arc::ptr_eq(&before, &rules(&world)));
}

#[test]
fn of_several_that_are_as_specific_the_first_has_the_word_and_the_others_are_told() {
    let mut world = World::of_mesh(PODS);
    world.put(&policy("shop", "b", &jwt("b")));
    world.put(&policy("shop", "a", &jwt("a")));
    world.put(&policy("shop", "c", "mtls: {mode: Strict}"));
    check(
        &world,
        expect![[r#"
        shop/db: a by MeshPolicy shop/a
        shop/web: a by MeshPolicy shop/a
        ! MeshPolicy shop/b: MeshPolicy shop/a is as specific and says what holds of tokens, which wins
    "#]],
    );
    // One that cannot be used lets nobody in, whichever comes first.
    world.put(&policy("shop", "d", "jwt: {issuers: []}"));
    check(
        &world,
        expect![[r#"
        shop/db: nobody, for spec.jwt.issuers: expected at least one by MeshPolicy shop/d
        shop/web: nobody, for spec.jwt.issuers: expected at least one by MeshPolicy shop/d
        ! MeshPolicy shop/a: MeshPolicy shop/d is as specific and says what holds of tokens, which wins
        ! MeshPolicy shop/b: MeshPolicy shop/a is as specific and says what holds of tokens; MeshPolicy shop/d is as specific and says what holds of tokens, which wins
        ! MeshPolicy shop/d: this version cannot be used, and there was none before it: its pods take no plaintext, and no requests, for tokens cannot be checked
    "#]],
    );
}

#[test]
fn a_version_that_cannot_be_used_leaves_the_last_one_and_without_one_refuses_all() {
    let mut world = World::of_mesh(PODS);
    world.put(&policy("bank", "all", &jwt("a")));
    assert!(!world.put(&policy("bank", "all", "jwt: {issuers: [{issuer: b, jwks: {}}]}")));
    world.put(&policy("shop", "web", "selector: {matchLabels: {app: web}}, jwt: 5"));
    world.put(&policy("shop", "db", "selector: {matchLabels: {app: db}}, mtls: {mode: Off}"));
    check(
        &world,
        expect![[r#"
            bank/teller: a by MeshPolicy bank/all
            shop/web: nobody, for spec.jwt: expected a map, found integer `5` by MeshPolicy shop/web
            ! MeshPolicy bank/all: this version cannot be used, and the last one that could stays in force
            ! MeshPolicy shop/db: this version cannot be used, and there was none before it: its pods take no plaintext
            ! MeshPolicy shop/web: this version cannot be used, and there was none before it: its pods take no plaintext, and no requests, for tokens cannot be checked
        "#]],
    );
    world.put(&policy("shop", "web", &format!("selector: {{matchLabels: {{app: web}}}}, {}", jwt("b"))));
    world.remove(Kind::MeshPolicy, "shop", "db");
    check(
        &world,
        expect![[r#"
        bank/teller: a by MeshPolicy bank/all
        shop/web: b by MeshPolicy shop/web
        ! MeshPolicy bank/all: this version cannot be used, and the last one that could stays in force
    "#]],
    );
}
