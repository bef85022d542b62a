//! The statuses of policies that are for pods.

use super::*;

fn own(kind: &str, namespace: &str, name: &str, spec: &str) -> String {
    format!(
        "{{apiVersion: undermesh.io/v1alpha1, kind: {kind}, metadata: {{name: {name}, namespace: {namespace}, generation: 1, \
         resourceVersion: '5'}}, spec: {{{spec}}}}}\n---\n"
    )
}

const REDIS: &str = "
{kind: Service, metadata: {name: redis, namespace: shop}, spec: {clusterIP: None, ports: [{name: redis, port: 6379, targetPort: 7000}, {name: http-admin, port: 80}]}}
---
{kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web, tier: front}}}
---
";

#[test]
fn a_status_says_what_an_authorization_policy_is_for_and_what_of_it_cannot_be_done() {
    let policy = |name: &str, spec: &str| own("AuthorizationPolicy", "shop", name, spec);
    let redis = "targetRefs: [{group: '', kind: Service, name: redis}]";
    let methods = "to: [{methods: [GET]}]";
    let yaml = [
        REDIS.to_owned(),
        policy("all", ""),
        policy("web", "selector: {matchLabels: {app: web}}"),
        policy("dry", "selector: {matchLabels: {app: api}}, dryRun: true"),
        policy(
            "none",
            "targetRefs: [{group: '', kind: Service, name: redis}, {group: '', kind: Service, name: db}]",
        ),
        policy("bad", "action: Block, dryRun: yes"),
        policy("bad-dry", "selector: {matchLabels: {app: web}}, dryRun: true, rules: [{to: [{}]}]"),
        own("AuthorizationPolicy", "bank", "nobody", ""),
        own("AuthorizationPolicy", "mesh", "everybody", ""),
        policy("reads", &format!("{redis}, rules: [{{{methods}}}]")),
        policy(
            "reads-or-shop",
            &format!("{redis}, rules: [{{{methods}}}, {{from: [{{namespaces: [shop]}}]}}]"),
        ),
        policy(
            "writes",
            &format!(
                "{redis}, action: Deny, rules: [{{to: [{{methods: [PUT]}}], from: [{{namespaces: [a]}}]}}]"
            ),
        ),
        policy("reads-dry", &format!("{redis}, dryRun: true, rules: [{{{methods}}}]")),
        policy(
            "reads-or-shop-dry",
            &format!("{redis}, dryRun: true, rules: [{{{methods}}}, {{from: [{{namespaces: [shop]}}]}}]"),
        ),
        policy("writes-dry", &format!("{redis}, dryRun: true, action: Deny, rules: [{{{methods}}}]")),
        policy(
            "elsewhere",
            &format!(
                "{redis}, rules: [{{to: [{{ports: [80], methods: [PUT]}}, {{notPorts: [7000], paths: [/a]}}]}}]"
            ),
        ),
    ];
    let mut world = world_of(&yaml.concat());
    check(
        &mut world,
        &expect![[r#"
            AuthorizationPolicy bank/nobody: Accepted: the policy is in force; it selects no pod now
            AuthorizationPolicy mesh/everybody: Accepted: the policy is in force
            AuthorizationPolicy shop/all: Accepted: the policy is in force
            AuthorizationPolicy shop/bad:
              not Accepted: Invalid: spec.action: expected Allow, Deny or Audit, found "Block"; until then it is reported that everything would be denied at all pods that it is for
            AuthorizationPolicy shop/bad-dry:
              not Accepted: Invalid: spec.rules[0].to[0]: expected at least one field; without any it would mean everything; until then it is reported that everything would be denied at the pods that it selects
            AuthorizationPolicy shop/dry: Accepted: what the policy would do is reported, and nothing is done (dryRun); it selects no pod now
            AuthorizationPolicy shop/elsewhere: Accepted: the policy is in force
            AuthorizationPolicy shop/none:
              not Accepted: TargetNotFound: there is no Service shop/db
            AuthorizationPolicy shop/reads: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/redis is denied unless another policy allows it: it is declared to carry something other than HTTP, and without requests rule 1 can allow nothing
            AuthorizationPolicy shop/reads-dry: Accepted: what the policy would do is reported, and nothing is done (dryRun)
              not Enforced: NotHttp: it is reported that every connection to port 6379 of the Service shop/redis would be denied unless another policy allows it: it is declared to carry something other than HTTP, and without requests rule 1 can allow nothing
            AuthorizationPolicy shop/reads-or-shop: Accepted: the policy is in force
              not Enforced: NotHttp: no connection to port 6379 of the Service shop/redis is allowed by rule 1: it is declared to carry something other than HTTP, and without requests nothing can match
            AuthorizationPolicy shop/reads-or-shop-dry: Accepted: what the policy would do is reported, and nothing is done (dryRun)
              not Enforced: NotHttp: no connection to port 6379 of the Service shop/redis would be allowed by rule 1: it is declared to carry something other than HTTP, and without requests nothing can match
            AuthorizationPolicy shop/web: Accepted: the policy is in force
            AuthorizationPolicy shop/writes: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/redis is denied for which all else holds that rule 1 asks for: it is declared to carry something other than HTTP, and without requests the rest counts as matched
            AuthorizationPolicy shop/writes-dry: Accepted: what the policy would do is reported, and nothing is done (dryRun)
              not Enforced: NotHttp: it is reported that every connection to port 6379 of the Service shop/redis would be denied for which all else holds that rule 1 asks for: it is declared to carry something other than HTTP, and without requests the rest counts as matched
        "#]],
    );
    check(&mut world, &expect![[""]]);
    // A pod that is selected, the last one that was, and the Service.
    let pod = |yaml: &str| objects::<kube::core::PartialObjectMeta<Pod>>(yaml, "Pod").remove(0);
    world.take_pod(Event::Apply(pod(
        "{kind: Pod, metadata: {name: api, namespace: shop, labels: {app: api}}}",
    )));
    world.take_pod(Event::Delete(pod(REDIS.split("---").nth(1).unwrap())));
    check(
        &mut world,
        &expect![[r#"
        AuthorizationPolicy shop/all: Accepted: the policy is in force
        AuthorizationPolicy shop/bad:
          not Accepted: Invalid: spec.action: expected Allow, Deny or Audit, found "Block"; until then it is reported that everything would be denied at all pods that it is for
        AuthorizationPolicy shop/bad-dry:
          not Accepted: Invalid: spec.rules[0].to[0]: expected at least one field; without any it would mean everything; until then it is reported that everything would be denied at the pods that it selects
        AuthorizationPolicy shop/dry: Accepted: what the policy would do is reported, and nothing is done (dryRun)
        AuthorizationPolicy shop/web: Accepted: the policy is in force; it selects no pod now
    "#]],
    );
    [Event::Init, Event::InitDone].into_iter().for_each(|event| world.take_service(event));
    check(
        &mut world,
        &expect![[r#"
            AuthorizationPolicy shop/elsewhere:
              not Accepted: TargetNotFound: there is no Service shop/redis
            AuthorizationPolicy shop/none:
              not Accepted: TargetNotFound: there is no Service shop/redis; there is no Service shop/db
            AuthorizationPolicy shop/reads:
              not Accepted: TargetNotFound: there is no Service shop/redis
            AuthorizationPolicy shop/reads-dry:
              not Accepted: TargetNotFound: there is no Service shop/redis
            AuthorizationPolicy shop/reads-or-shop:
              not Accepted: TargetNotFound: there is no Service shop/redis
            AuthorizationPolicy shop/reads-or-shop-dry:
              not Accepted: TargetNotFound: there is no Service shop/redis
            AuthorizationPolicy shop/writes:
              not Accepted: TargetNotFound: there is no Service shop/redis
            AuthorizationPolicy shop/writes-dry:
              not Accepted: TargetNotFound: there is no Service shop/redis
        "#]],
    );
}

/// Wherever Services lead to that the policy does not name.
#[test]
fn a_status_says_what_cannot_be_done_at_the_pods_that_an_authorization_policy_selects() {
    let policy = |name: &str, spec: &str| own("AuthorizationPolicy", "shop", name, spec);
    let yaml = [
        "{kind: Service, metadata: {name: cache, namespace: shop}, spec: {clusterIP: 10.0.0.9, selector: {app: cache}, \
          ports: [{name: redis, port: 6379}, {name: http, port: 80}]}}\n---\n"
            .to_owned(),
        "{kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}}\n---\n".to_owned(),
        policy("all", "rules: [{to: [{methods: [GET]}]}]"),
        policy("cache", "selector: {matchLabels: {app: cache}}, action: Deny, rules: [{to: [{methods: [PUT]}]}]"),
        policy("web", "selector: {matchLabels: {app: web}}, rules: [{to: [{methods: [GET]}]}]"),
        policy("ports", "rules: [{to: [{ports: [6379]}]}]"),
        own("AuthorizationPolicy", "mesh", "everywhere", "rules: [{to: [{methods: [GET]}]}]"),
    ];
    let mut world = world_of(&yaml.concat());
    // No Service leads to the only pod.
    check(
        &mut world,
        &expect![[r#"
        AuthorizationPolicy mesh/everywhere: Accepted: the policy is in force
        AuthorizationPolicy shop/all: Accepted: the policy is in force
        AuthorizationPolicy shop/cache: Accepted: the policy is in force; it selects no pod now
        AuthorizationPolicy shop/ports: Accepted: the policy is in force
        AuthorizationPolicy shop/web: Accepted: the policy is in force
    "#]],
    );
    let pod = |labels: &str| {
        let yaml = format!("{{kind: Pod, metadata: {{name: web, namespace: shop, labels: {labels}}}}}");
        objects::<kube::core::PartialObjectMeta<Pod>>(&yaml, "Pod").remove(0)
    };
    // It is another Service's now, and the policy for the whole namespace selects it as before.
    world.take_pod(Event::Apply(pod("{app: cache}")));
    check(
        &mut world,
        &expect![[r#"
            AuthorizationPolicy mesh/everywhere: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/cache is denied unless another policy allows it: it is declared to carry something other than HTTP, and without requests rule 1 can allow nothing
            AuthorizationPolicy shop/all: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/cache is denied unless another policy allows it: it is declared to carry something other than HTTP, and without requests rule 1 can allow nothing
            AuthorizationPolicy shop/cache: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/cache is denied for which all else holds that rule 1 asks for: it is declared to carry something other than HTTP, and without requests the rest counts as matched
            AuthorizationPolicy shop/ports: Accepted: the policy is in force
            AuthorizationPolicy shop/web: Accepted: the policy is in force; it selects no pod now
        "#]],
    );
    // The Service is declared otherwise.
    let service = |yaml: &str| objects::<Service>(yaml, "Service").remove(0);
    world.take_service(Event::Apply(service(&yaml[0].replace("name: redis", "name: grpc"))));
    check(
        &mut world,
        &expect![[r#"
            AuthorizationPolicy mesh/everywhere: Accepted: the policy is in force
            AuthorizationPolicy shop/all: Accepted: the policy is in force
            AuthorizationPolicy shop/cache: Accepted: the policy is in force
            AuthorizationPolicy shop/ports: Accepted: the policy is in force
        "#]],
    );
    // It leads to nobody, as redis, and to the pod again.
    world.take_service(Event::Apply(service(&yaml[0].replace("app: cache", "app: none"))));
    check(
        &mut world,
        &expect![[r#"
            AuthorizationPolicy mesh/everywhere: Accepted: the policy is in force
            AuthorizationPolicy shop/all: Accepted: the policy is in force
            AuthorizationPolicy shop/cache: Accepted: the policy is in force
            AuthorizationPolicy shop/ports: Accepted: the policy is in force
        "#]],
    );
    world.take_service(Event::Apply(service(&yaml[0])));
    check(
        &mut world,
        &expect![[r#"
            AuthorizationPolicy mesh/everywhere: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/cache is denied unless another policy allows it: it is declared to carry something other than HTTP, and without requests rule 1 can allow nothing
            AuthorizationPolicy shop/all: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/cache is denied unless another policy allows it: it is declared to carry something other than HTTP, and without requests rule 1 can allow nothing
            AuthorizationPolicy shop/cache: Accepted: the policy is in force
              not Enforced: NotHttp: every connection to port 6379 of the Service shop/cache is denied for which all else holds that rule 1 asks for: it is declared to carry something other than HTTP, and without requests the rest counts as matched
            AuthorizationPolicy shop/ports: Accepted: the policy is in force
        "#]],
    );
    world.take_service(Event::Delete(service(&yaml[0])));
    check(
        &mut world,
        &expect![[r#"
            AuthorizationPolicy mesh/everywhere: Accepted: the policy is in force
            AuthorizationPolicy shop/all: Accepted: the policy is in force
            AuthorizationPolicy shop/cache: Accepted: the policy is in force
            AuthorizationPolicy shop/ports: Accepted: the policy is in force
        "#]],
    );
}

#[test]
fn a_status_says_which_mesh_policies_are_at_odds() {
    let policy = |name: &str, spec: &str| own("MeshPolicy", "shop", name, spec);
    let web = "selector: {matchLabels: {app: web}}, mtls: {mode: Permissive}";
    let yaml = [
        REDIS.to_owned(),
        policy("strict", "mtls: {mode: Strict}"),
        policy("lax", "mtls: {mode: Permissive}"),
        policy("web", web),
        policy("front", "selector: {matchLabels: {tier: front}}, mtls: {ports: [{port: 80, mode: Strict}]}"),
        policy("api", "selector: {matchLabels: {app: api}}, mtls: {mode: Strict}"),
        policy("bad", "mtls: {mode: 'off'}"),
    ];
    let mut world = world_of(&yaml.concat());
    check(
        &mut world,
        &expect![[r#"
        MeshPolicy shop/api: Accepted: the policy is in force; it selects no pod now
        MeshPolicy shop/bad:
          not Accepted: Invalid: spec.mtls.mode: expected Strict or Permissive, found "off"; until then plaintext is refused at the pods that it is for
        MeshPolicy shop/front: Accepted: the policy is in force
        MeshPolicy shop/lax:
          not Accepted: Conflicted: MeshPolicy shop/bad is as specific and says Strict; MeshPolicy shop/strict is as specific and says Strict, which wins
        MeshPolicy shop/strict: Accepted: the policy is in force
        MeshPolicy shop/web:
          not Accepted: Conflicted: MeshPolicy shop/front is as specific and says Strict for the port 80, which wins
    "#]],
    );
    // They select no pod in common any more.
    let pod = "{kind: Pod, metadata: {name: web, namespace: shop, labels: {app: web}}}";
    world.take_pod(Event::Apply(objects(pod, "Pod").remove(0)));
    tell(&mut world, Kind::MeshPolicy, &policy("strict", "mtls: {mode: Strict}"), Event::Delete);
    let bad = policy("web", &web.replace("Permissive", "Lax"));
    tell(&mut world, Kind::MeshPolicy, &bad, Event::Apply);
    check(
        &mut world,
        &expect![[r#"
        MeshPolicy shop/api: Accepted: the policy is in force; it selects no pod now
        MeshPolicy shop/bad:
          not Accepted: Invalid: spec.mtls.mode: expected Strict or Permissive, found "off"; until then plaintext is refused at the pods that it is for
        MeshPolicy shop/front: Accepted: the policy is in force; it selects no pod now
        MeshPolicy shop/lax:
          not Accepted: Conflicted: MeshPolicy shop/bad is as specific and says Strict, which wins
        MeshPolicy shop/web:
          not Accepted: Invalid: spec.mtls.mode: expected Strict or Permissive, found "Lax"; until then the last version that could be used stays in force, on nodes whose agent has seen it
    "#]],
    );
}
