//! The commands by which people turn security on: who would be kept out, what would be decided, and why.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::issuer::{SigningKey, key_set};
use undermesh_tests::lab::{AgentOptions, Manifest, Output, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, PORT, SHOP, SOON, Talk, dial, namespace, options, serve, undermesh};
use crate::requests::{ask, serve_requests};
use crate::traffic::in_force;

fn code(output: &Output) -> i32 {
    output.status.code().unwrap_or(-1)
}

const READINESS: [&str; 5] = ["mtls", "readiness", "shop", "--window", "10s"];

/// What the command says as JSON, and its exit code.
fn json(mesh: &Mesh, node: usize, args: &[&str]) -> Result<(Value, i32)> {
    let output = undermesh(&mesh.nodes[node], &[args, &["-o", "json"]].concat())?;
    let value = serde_json::from_str(&output.stdout)
        .with_context(|| format!("{args:?} says {}{}", output.stdout, output.stderr))?;
    Ok((value, code(&output)))
}

/// A mesh of one node whose pod `near` serves, a client in it and one outside.
fn scene(name: &str) -> Result<(Mesh, Pod, Pod, Pod, Process)> {
    let mut mesh = Mesh::start(name, 1, &[])?;
    let (client, near) = (mesh.pod(0, "client")?, mesh.pod(0, "near")?);
    let outsider = mesh.outsider(0, "outsider")?;
    let server = serve(&near)?;
    mesh.ready()?;
    Ok((mesh, client, near, outsider, server))
}

#[test]
fn readiness_names_who_calls_in_plaintext() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let (mesh, client, near, outsider, _server) = scene("um-e2e-readiness")?;
    dial(&client, near.ip(), 4)?.all_served()?;
    let nobody_is_in_the_way = || {
        eventually(SOON, "for ten seconds nobody has called in plaintext", || {
            let (report, exit) = json(&mesh, 0, &READINESS)?;
            ensure!(exit == 0, "{report:#}");
            Ok(())
        })
    };
    nobody_is_in_the_way()?;

    dial(&outsider, near.ip(), 3)?.all_served()?;
    let (report, exit) = json(&mesh, 0, &READINESS)?;
    ensure!(exit == 1, "the outsider would be refused, not {exit}: {report:#}");
    let workloads = report["workloads"].as_array().context("no workloads")?;
    for workload in workloads {
        let (is_near, callers) = (workload["workload"] == "near", &workload["callers"]);
        ensure!(workload["mtls"] == "permissive" && workload["ready"] == !is_near, "{report:#}");
        ensure!(callers.as_array().is_some_and(|it| it.len() == usize::from(is_near)), "{report:#}");
        if is_near {
            let caller = &callers[0];
            ensure!(caller["source"] == "outside/outsider" && caller["connections"] == 3, "{report:#}");
            ensure!(caller["port"] == PORT && caller["last_seconds"].as_u64() < Some(10), "{report:#}");
        }
    }
    ensure!(workloads.len() == 2, "{report:#}");

    // A connection is not over because it was opened long ago.
    let mut talk = Talk::begin(&outsider, near.ip())?;
    eventually(SOON, "it was opened ten seconds ago", || {
        let (report, exit) = json(&mesh, 0, &READINESS)?;
        ensure!(exit == 1, "the connection is still open: {report:#}");
        let talking = &report["workloads"][1]["callers"][0];
        ensure!(talking["first_seconds"].as_u64() > Some(10), "{report:#}");
        Ok(())
    })?;
    talk.goes_on()?;
    let table = undermesh(&mesh.nodes[0], &READINESS)?;
    ensure!(code(&table) == 1 && table.stdout.contains("outside/outsider"), "{}", table.stdout);
    talk.end()?;
    nobody_is_in_the_way()
}

#[test]
fn readiness_says_what_it_cannot_know() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let (mesh, ..) = scene("um-e2e-unready")?;
    let check = |args: &[&str], told: &str| -> Result<()> {
        let output = undermesh(&mesh.nodes[0], &[&["mtls", "readiness"], args].concat())?;
        let is_told = output.stdout.contains(told);
        ensure!(code(&output) == 2 && is_told, "{args:?} says {}{}", output.stdout, output.stderr);
        Ok(())
    };
    check(&[], "incomplete: the agent of node1 has watched for ")?;
    check(&["nowhere"], "incomplete: no pod of the namespace nowhere is or was in the mesh")?;
    let nobody = ["--admin-address", "127.0.0.1:1", "--window", "1s"];
    check(&nobody, "incomplete: not asked: no agent at 127.0.0.1:1")?;
    let output = undermesh(&mesh.nodes[0], &["mtls", "readiness", "--window", "25h"])?;
    ensure!(output.stderr.contains("agents remember 24 hours"), "{}", output.stderr);
    Ok(())
}

/// A shop of two nodes: `web` on one calls `pay` on the other, and `outside` is not in the mesh.
struct Shop {
    mesh: Mesh,
    agents: Vec<String>,
    web: Pod,
    pay: Pod,
    outside: Pod,
    _running: Process,
}

impl Shop {
    fn open(name: &str) -> Result<Self> {
        let (mut mesh, agents) = Mesh::start_reachable(name, 2, &[])?;
        let web = mesh.add(0, PodSpec::new(SHOP, "web").service_account("web"))?;
        let pay = mesh.add(1, PodSpec::new(SHOP, "pay").service_account("pay").label("app", "pay"))?;
        let outside = mesh.outsider(1, "outside")?;
        let ports = json!([{ "name": "http", "port": 80, "targetPort": 8080 }]);
        let service = Manifest::service(SHOP, "pay", &[Self::service()], &[], &[("app", "pay")]);
        mesh.lab.apply(&service.with("spec.ports", ports))?;
        let _running = serve_requests(&pay)?;
        mesh.ready()?;
        eventually(SOON, "the Service is served", || {
            ask(&web, &format!("http://{}:80/", Self::service()), &[])?.answered(200).map(drop)
        })?;
        Ok(Self { mesh, agents, web, pay, outside, _running })
    }

    fn service() -> IpAddr {
        IpAddr::from([10, 96, 0, 61])
    }

    /// Waits until the manifest is in force at the node of `pay`, for those that are about pods of that node alone.
    fn say(&self, manifest: &Manifest) -> Result<()> {
        let generation =
            || Ok::<_, anyhow::Error>(self.mesh.agents[1].metrics()?.sum("undermesh_config_generation", &[]));
        let before = generation()?;
        self.mesh.lab.apply(manifest)?;
        eventually(SOON, "the manifest is in force", || {
            ensure!(generation()? > before, "still {before}");
            Ok(())
        })
    }

    /// What the command says on the first node, which asks both agents.
    fn command(&self, args: &[&str]) -> Result<Output> {
        let agents = self.agents.iter().flat_map(|agent| ["--admin-address", agent]);
        undermesh(&self.mesh.nodes[0], &args.iter().copied().chain(agents).collect::<Vec<_>>())
    }

    /// Fails unless the explanation has this exit code and says all of this, and what is asked for comes to this status.
    fn explains(
        &self,
        request: (&str, &str),
        caller: &Pod,
        exit: i32,
        status: &str,
        told: &[&str],
    ) -> Result<()> {
        let address = caller.ip().to_string();
        let is_outside = caller.name() == "outside";
        let from: Vec<&str> = match is_outside {
            true => vec!["--from", "outside", "--from-address", &address],
            false => vec!["--from", "shop/web"],
        };
        let to = ["explain", "--to", "shop/pay:80", "--method", request.0, "--path", request.1];
        let output = self.command(&[&to[..], &from].concat())?;
        let says_all = told.iter().all(|told| output.stdout.contains(told));
        ensure!(
            code(&output) == exit && says_all,
            "{request:?}: {} and not {exit}, {told:?}:\n{}{}",
            code(&output),
            output.stdout,
            output.stderr
        );
        let url = match is_outside {
            true => format!("http://{}:8080{}", self.pay.ip(), request.1),
            false => format!("http://{}:80{}", Self::service(), request.1),
        };
        let got = ask(caller, &url, &["--method", request.0])?;
        let got = if got.failed.is_empty() { got.last["status"].to_string() } else { "broken".into() };
        ensure!(
            got == status,
            "{request:?} of {} came to {got}, not {status}:\n{}",
            caller.name(),
            output.stdout
        );
        Ok(())
    }
}

#[test]
fn explanations_say_what_happens() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let shop = Shop::open("um-e2e-explain")?;
    let (web, outside) = (&shop.web, &shop.outside);
    let check =
        |request, caller, exit, status, told: &[&str]| shop.explains(request, caller, exit, status, told);
    check(
        ("GET", "/"),
        web,
        0,
        "200",
        &[
            "from       shop/web, spiffe://cluster.local/ns/shop/sa/web",
            "route      no route is about it",
            ", pod shop/pay on node2, mutual_tls\n           no policy is for this pod",
            "verdict    allowed",
        ],
    )?;

    let rule = |path: &str, filters: Value| {
        let path = json!([{ "path": { "type": "PathPrefix", "value": path } }]);
        json!({ "matches": path, "filters": filters, "backendRefs": [{ "name": "pay", "port": 80 }] })
    };
    let path = json!({ "type": "ReplacePrefixMatch", "replacePrefixMatch": "/charge" });
    let rewrite = json!([{ "type": "URLRewrite", "urlRewrite": { "path": path } }]);
    let route = Manifest::new("gateway.networking.k8s.io/v1", "HTTPRoute", Some(SHOP), "pay").with(
        "spec",
        json!({
            "parentRefs": [{ "group": "", "kind": "Service", "name": "pay", "port": 80 }],
            "rules": [rule("/v1/charge", rewrite), rule("/charge", json!([])), rule("/charge", json!([]))],
        }),
    );
    in_force(&shop.mesh, &route)?;
    let policy = |name: &str, spec: Value| {
        let selector = json!({ "matchLabels": { "app": "pay" } });
        let policy = Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), name);
        shop.say(&policy.with("spec", spec).with("spec.selector", selector))
    };
    policy(
        "callers",
        json!({ "rules": [
        { "from": [{ "serviceAccounts": ["web"] }], "to": [{ "methods": ["POST"], "paths": ["/charge"] }] },
        { "to": [{ "paths": ["/open"] }] },
    ] }),
    )?;
    policy(
        "closing",
        json!({ "action": "Deny", "dryRun": true, "rules": [{ "to": [{ "paths": ["/charge"] }] }] }),
    )?;

    let hidden = "HTTPRoute shop/pay, rule 3 never takes a request: HTTPRoute shop/pay, rule 2 takes all that it matches";
    check(
        ("POST", "/v1/charge"),
        web,
        0,
        "200",
        &[
            "route      HTTPRoute shop/pay, rule 1 fits",
            hidden,
            "request    POST /charge, host pay.shop\n",
            "allowed by AuthorizationPolicy shop/callers, rule 1",
            "would not be let in: denied by AuthorizationPolicy shop/closing, rule 1",
            "rule 2 does not match: to: paths does not have \"/charge\"",
        ],
    )?;
    check(("GET", "/charge"), web, 1, "403", &["to: methods does not have \"GET\"", "verdict    denied"])?;
    check(
        ("GET", "/none"),
        web,
        1,
        "404",
        &["stopped    no rule of the routes of shop/pay fits the request"],
    )?;
    check(
        ("POST", "/charge"),
        outside,
        1,
        "403",
        &[
            "route      the caller is not in the mesh",
            "from: serviceAccounts needs an identity, and none is proven",
        ],
    )?;
    check(("GET", "/open"), outside, 0, "200", &["allowed by AuthorizationPolicy shop/callers, rule 2"])?;

    let without_request = shop.command(&["explain", "--from", "shop/web", "--to", "shop/pay:80"])?;
    let told = &without_request.stdout;
    ensure!(
        code(&without_request) == 2
            && told.contains("it depends on what is asked for")
            && told.contains("what is no HTTP: no rule of AuthorizationPolicy shop/callers allows it"),
        "{told}"
    );
    let key = SigningKey::new("k", "ES256")?;
    let claims = |issuer: &str| json!({ "iss": issuer, "exp": 4_000_000_000u64, "groups": ["admins"] });
    let issuer = json!({ "issuer": "https://id.test/", "jwks": { "inline": key_set([&key]) } });
    let tokens = Manifest::new("undermesh.io/v1alpha1", "MeshPolicy", Some(SHOP), "tokens");
    shop.say(&tokens.with("spec", json!({ "jwt": { "issuers": [issuer] } })))?;
    policy(
        "admins",
        json!({ "rules": [
        { "to": [{ "paths": ["/charge"] }], "when": [{ "claim": { "path": ["groups"], "values": ["admins"] } }] },
    ] }),
    )?;
    for (issuer, exit, told) in [
        ("https://id.test/", 0, "allowed by AuthorizationPolicy shop/admins, rule 1"),
        (
            "https://other.test/",
            1,
            "answered with 401 by MeshPolicy shop/tokens: the token's issuer is none that is believed",
        ),
    ] {
        let token = key.token(&claims(issuer))?;
        let asked =
            ["explain", "--from", "shop/web", "--to", "shop/pay:80", "--path", "/charge", "--jwt", &token];
        let output = shop.command(&asked)?;
        let said = &output.stdout;
        ensure!(code(&output) == exit && said.contains(told), "{}: {said}{}", code(&output), output.stderr);
        let output = shop.command(&[&asked[..], &["-o", "json"]].concat())?;
        ensure!(!output.stdout.contains(&token), "the token is shown: {}", output.stdout);
    }

    let strict = Manifest::new("undermesh.io/v1alpha1", "MeshPolicy", Some(SHOP), "strict");
    shop.say(&strict.with("spec", json!({ "mtls": { "mode": "Strict" } })))?;
    let plaintext = "plaintext is refused: mutual TLS is strict at port 8080 by MeshPolicy shop/strict";
    check(("GET", "/open"), outside, 1, "broken", &[plaintext])?;

    let (report, exit) = {
        let output = shop.command(&[
            "explain",
            "--from",
            "shop/web",
            "--to",
            "shop/pay:80",
            "--path",
            "/open",
            "-o",
            "json",
        ])?;
        (serde_json::from_str::<Value>(&output.stdout)?, code(&output))
    };
    ensure!(
        exit == 1 && report["verdict"] == "denied" && report["client"]["stopped"]["is_refused"] == true,
        "{report:#}"
    );
    Ok(())
}

#[test]
fn explanations_say_what_they_cannot_know() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let shop = Shop::open("um-e2e-unexplained")?;
    let check = |args: &[&str], told: &str| -> Result<()> {
        let output = undermesh(&shop.mesh.nodes[0], &[&["explain"], args].concat())?;
        let is_told = output.stdout.contains(told) || output.stderr.contains(told);
        ensure!(code(&output) == 2 && is_told, "{args:?} says {}{}", output.stdout, output.stderr);
        Ok(())
    };
    let (near, far) = (["--admin-address", &shop.agents[0]], ["--admin-address", &shop.agents[1]]);
    let pay = ["--from", "shop/web", "--to", "shop/pay:80"];
    check(&[&pay[..], &near].concat(), "the agent of node2 was not asked")?;
    check(&[&pay[..], &far].concat(), "incomplete pod shop/web is on node node1")?;
    check(&[&pay[..], &["--admin-address", "127.0.0.1:1"]].concat(), "no agent at 127.0.0.1:1")?;
    check(
        &[&["--from", "shop/web", "--to", "shop/pay:81"], &near[..]].concat(),
        "Service shop/pay has no port 81; it has 80",
    )?;
    check(
        &[&["--from", "shop/wob", "--to", "shop/pay:80"], &near[..]].concat(),
        "there is no pod or workload shop/wob",
    )?;
    check(
        &[&["--from", "shop/web", "--to", "shop/pay:80", "--path", "open"], &near[..]].concat(),
        "expected one that begins with /",
    )?;
    check(&["--from", "outside", "--to", "shop/pay:80"], "--from-address")
}

#[test]
fn several_agents_make_one_table() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let shop = Shop::open("um-e2e-several")?;
    let _server = serve(&shop.pay)?;
    let talk = Talk::with(&shop.web, SocketAddr::new(shop.pay.ip(), PORT))?;
    for (args, node) in [
        (&["status"][..], "shop       web"),
        (&["certs"], "/sa/web"),
        (&["connections"], "shop/web  shop/pay"),
    ] {
        let output = shop.command(args)?;
        ensure!(
            code(&output) == 0 && output.stdout.contains(node),
            "{args:?} says {}{}",
            output.stdout,
            output.stderr
        );
    }
    // Each side's agent has seen it.
    let connections = shop.command(&["connections"])?.stdout;
    let seen = shop.agents.iter().filter(|agent| connections.contains(agent.as_str())).count();
    ensure!(seen == 2 && connections.starts_with("NODE"), "{connections}");
    talk.end()?;
    let status = shop.command(&["status"])?.stdout;
    ensure!(
        status.contains("NODE") && status.contains("on node node1") && status.contains("on node node2"),
        "{status}"
    );
    let nodes: Vec<&str> = status
        .lines()
        .filter(|line| line.contains("enrolled"))
        .filter_map(|line| line.split(' ').next())
        .collect();
    ensure!(nodes == shop.agents, "{status}");
    // Whoever is missing is named, and the others are shown.
    let output = shop.command(&["status", "--admin-address", "127.0.0.1:1"])?;
    let told = output.stdout.contains("incomplete: no agent at 127.0.0.1:1")
        && output.stdout.contains("shop       web");
    ensure!(code(&output) == 2 && told, "{}{}", output.stdout, output.stderr);
    let output = shop.command(&["status", "-o", "json", "--admin-address", "127.0.0.1:1"])?;
    let page: Value = serde_json::from_str(&output.stdout)?;
    let counts = ["nodes", "missing"].map(|key| page[key].as_array().map(Vec::len));
    ensure!(code(&output) == 2 && counts == [Some(2), Some(1)], "{page:#}");
    Ok(())
}

const BEFORE: &str = "undermesh_pod_connections_before_enrolment";

/// Pods that were not in the mesh when others began to talk to them.
struct Earlier {
    mesh: Mesh,
    client: Pod,
    near: Pod,
    /// From outside, from the client by IPv4 and by IPv6: before; from the client: after.
    talks: [Talk; 4],
    _running: Process,
}

impl Earlier {
    fn enrolled(name: &str, args: &[&str]) -> Result<Self> {
        let mesh = Mesh::start(name, 1, args)?;
        mesh.lab.apply(&namespace(false))?;
        let add = |name: &str| mesh.nodes[0].add_pod(PodSpec::new(SHOP, name));
        let (client, near) = (add("client")?, add("near")?);
        let outsider = mesh.outsider(0, "outsider")?;
        let _running = serve(&near)?;
        let talk = |client: &Pod, to| Talk::begin(client, to);
        let before = [talk(&outsider, near.ip())?, talk(&client, near.ip())?, talk(&client, near.ip6())?];
        for pod in [&client, &near] {
            pod.set_mesh(true)?;
        }
        mesh.wait_enrolled(0, 2)?;
        let after = talk(&client, near.ip())?;
        let [outside, v4, v6] = before;
        Ok(Self { mesh, client, near, talks: [outside, v4, v6, after], _running })
    }

    /// How many of them each pod is said to have, by the gauge and by the command: the client and the one that is called.
    fn are_known(&self, of_client: usize, of_near: usize) -> Result<()> {
        let metrics = self.mesh.agents[0].metrics()?;
        let (page, _) = json(&self.mesh, 0, &["connections", "--before-enrolment"])?;
        for (pod, count, direction) in
            [(&self.client, of_client, "outbound"), (&self.near, of_near, "inbound")]
        {
            let gauge = metrics.sum(BEFORE, &[("pod_name", pod.name())]);
            let mut pods = page["pods"].as_array().into_iter().flatten();
            let listed = pods.find(|it| it["pod"] == pod.name()).map(|it| it["connections"].clone());
            let listed = listed.as_ref().and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
            let all = listed.len() == count && listed.iter().all(|it| it["direction"] == direction);
            ensure!(gauge == count as f64 && all, "{}: {gauge} of {count}, {page:#}", pod.name());
        }
        Ok(())
    }

    fn wait_known(&self, of_client: usize, of_near: usize) -> Result<()> {
        eventually(SOON, "connections from before are known", || self.are_known(of_client, of_near))
    }
}

#[test]
fn connections_from_before_are_listed_and_closed_when_their_pod_is_strict() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut before = Earlier::enrolled("um-e2e-before", &["--close-before-enrolment", "strict"])?;
    // What was begun after it is carried, and not one of them.
    before.wait_known(2, 3)?;
    let table = undermesh(&before.mesh.nodes[0], &["connections", "--before-enrolment"])?.success()?;
    ensure!(table.contains("outside/outsider") && table.contains("shop/near"), "{table}");
    before.talks.iter_mut().try_for_each(Talk::goes_on)?;

    before.near.update(|pod| pod.set_annotation("undermesh.io/mtls", Some("strict")))?;
    before.wait_known(0, 0)?;
    before.talks[3].goes_on()?;
    let log = before.mesh.agents[0].process().log_tail(50);
    let told = "closed connections from before the pod was enrolled: it is strict";
    ensure!(log.contains(told) && log.contains("count=3"), "{log}");
    let [outside, v4, v6, after] = before.talks;
    for talk in [outside, v4, v6] {
        let how = talk.breaks(SOON)?;
        ensure!(how.contains("ECONNRESET"), "it broke with {how}");
    }
    after.end()
}

#[test]
fn connections_from_before_go_on_unless_they_are_to_be_closed() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut before = Earlier::enrolled("um-e2e-before-goes-on", &[])?;
    before.wait_known(2, 3)?;
    before.near.update(|pod| pod.set_annotation("undermesh.io/mtls", Some("strict")))?;
    eventually(SOON, "the log tells of them", || {
        let log = before.mesh.agents[0].process().log_tail(50);
        let told = "connections from before the pod was enrolled go on in plaintext, though it is strict";
        ensure!(log.contains(told) && log.contains("count=3"), "{log}");
        Ok(())
    })?;
    before.talks.iter_mut().try_for_each(Talk::goes_on)?;
    before.are_known(2, 3)?;

    // To the agent that takes over, what the other one carries is not from before either.
    let address = "127.0.0.1:15030";
    let admin_address = Some(address.to_owned());
    let next = AgentOptions { admin_address, ..options(&["--take-over", "--drain", "60s"]) };
    let node = &before.mesh.nodes[0];
    let next = node.spawn_agent(next)?;
    eventually(SOON, "they are known to the next agent", || {
        let output = undermesh(node, &["connections", "--before-enrolment", "--admin-address", address])?;
        let lines = output.stdout.lines().count();
        ensure!(lines == 1 + 2 + 3, "{lines} lines:\n{}{}", output.stdout, output.stderr);
        Ok(())
    })?;
    before.talks.iter_mut().try_for_each(Talk::goes_on)?;
    before.talks.into_iter().try_for_each(Talk::end)?;
    drop(next);
    Ok(())
}
