//! Two meshes that trust each other: on each node an agent with a trust domain and an authority of its own.

use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{AgentOptions, Pod, PodSpec, binary, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{LIMIT, Mesh, OPENED, PORT, REFUSED, at, names, witness};
use crate::pki::{Authority, Leaf};
use crate::tunnel::{HANDSHAKES, SOON, ask};

const TRUST_DOMAIN: &str = "undermesh.io/trust-domain";

/// The trust domain of each node, and where its authority is.
const DOMAINS: [(&str, &str); 2] = [("west.test", "west"), ("east.test", "east")];

/// Pods of two trust domains, each somebody of its own; no agent yet.
fn create(name: &str) -> Result<Mesh> {
    let mesh = Mesh::create(name)?;
    for (pod, (domain, _)) in
        [&mesh.client, &mesh.near, &mesh.far].into_iter().zip([DOMAINS[0], DOMAINS[0], DOMAINS[1]])
    {
        pod.update(|manifest| {
            manifest.set("spec.serviceAccountName", json!(pod.name()));
            manifest.set_annotation(TRUST_DOMAIN, Some(domain));
        })?;
    }
    for (domain, folder) in DOMAINS {
        let mut init = Command::new(binary("undermesh")?);
        init.args(["ca", "init", "--trust-domain", domain, "--ca-dir"]).arg(mesh.lab.dir().join(folder));
        run_here(init, LIMIT)?.success()?;
    }
    Ok(mesh)
}

/// Starts both agents anew; those that are to know the other domain have its bundle.
fn restart(mesh: &mut Mesh, knows_the_other: [bool; 2]) -> Result<()> {
    mesh.agents.clear();
    let file = |name: &str| mesh.lab.dir().join(name).display().to_string();
    for (own, knows) in knows_the_other.into_iter().enumerate() {
        let ((domain, folder), (other, others)) = (DOMAINS[own], DOMAINS[1 - own]);
        let mut args = vec!["--ca-dir".into(), file(folder), "--state-dir".into(), file("state")];
        args.extend(["--trust-domain".into(), domain.into()]);
        if knows {
            args.extend([
                "--trust-bundle".into(),
                format!("{other}={}", file(&format!("{others}/root-1.pem"))),
            ]);
        }
        mesh.agents.push(mesh.nodes[own].spawn_agent(AgentOptions { args, ..AgentOptions::default() })?);
    }
    mesh.agents.iter_mut().try_for_each(|agent| agent.wait_ready(SOON))?;
    mesh.agents[0].wait_published(&[mesh.client.ip()], SOON)?;
    mesh.agents[1].wait_published(&[mesh.far.ip()], SOON)
}

fn id(domain: &str, account: &str) -> String {
    format!("spiffe://{domain}/ns/shop/sa/{account}")
}

/// One connection in one direction.
fn dial(from: &Pod, to: &Pod) -> Result<String> {
    names(&witness(from, &["connect", &at(to.ip(), PORT)])?)
}

#[test]
fn domains_that_have_each_others_bundle_talk_in_both_directions() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut mesh = create("um-e2e-federation")?;
    restart(&mut mesh, [true, true])?;
    let (client, far) = (id("west.test", "client"), id("east.test", "far"));
    for (from, to, source, destination, agents) in
        [(&mesh.client, &mesh.far, &client, &far, [0, 1]), (&mesh.far, &mesh.client, &far, &client, [1, 0])]
    {
        dial(from, to)?;
        for (agent, reporter) in agents.into_iter().zip(["source", "destination"]) {
            let labels = [
                ("reporter", reporter),
                ("security", "mutual_tls"),
                ("source_workload", from.name()),
                ("source_identity", source.as_str()),
                ("destination_identity", destination.as_str()),
            ];
            let what = format!("{labels:?}");
            mesh.agents[agent].wait_metrics(SOON, &what, |m| m.sum(OPENED, &labels) == 1.0)?;
        }
    }

    // Neither authority vouches for an id of the other domain.
    let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
    let refused = [("reporter", "destination"), ("result", "failure"), ("reason", "unknown_issuer")];
    for (number, (folder, forged)) in [("west", &far), ("east", &client)].into_iter().enumerate() {
        let authority = Authority::of_folder(&mesh.lab, folder)?;
        let certificate = authority.sign(mesh.lab.dir(), folder, Leaf { id: forged, ..Leaf::GOOD })?;
        let to = mesh.far.ip();
        let told = ask(&mesh.lab, &outsider, &certificate, to, ["CONNECT", &at(to, PORT)])?.success()?;
        ensure!(told.trim() != "200", "{forged}, signed in the {folder}, got through");
        let count = 1.0 + number as f64;
        mesh.agents[1].wait_metrics(SOON, forged, |m| m.sum(HANDSHAKES, &refused) == count)?;
    }
    Ok(())
}

#[test]
fn a_domain_without_a_bundle_is_refused_by_whoever_lacks_it() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = create("um-e2e-federation-none")?;
    let (client, far) = (id("west.test", "client"), id("east.test", "far"));
    let lacks = |reporter| [("reporter", reporter), ("result", "failure"), ("reason", "wrong_trust_domain")];
    for knows in [[false, false], [true, false]] {
        restart(&mut mesh, knows)?;
        for (from, to, ids, [near, other]) in [
            (&mesh.client, &mesh.far, [&client, &far], [0, 1]),
            (&mesh.far, &mesh.client, [&far, &client], [1, 0]),
        ] {
            ensure!(dial(from, to).is_err(), "{knows:?}: {} got through", from.name());
            // The client checks first.
            let (agent, reporter) = if knows[near] { (other, "destination") } else { (near, "source") };
            let labels = lacks(reporter);
            let what = format!("{knows:?}, from {}", from.name());
            mesh.agents[agent].wait_metrics(SOON, &what, |m| m.sum(HANDSHAKES, &labels) >= 1.0)?;
            let refused = [
                ("reporter", "source"),
                ("security", "mutual_tls"),
                ("reason", "handshake_failed"),
                ("source_identity", ids[0].as_str()),
                ("destination_identity", ids[1].as_str()),
            ];
            mesh.agents[near].wait_metrics(SOON, &what, |m| m.sum(REFUSED, &refused) == 1.0)?;
        }
    }
    Ok(())
}

#[test]
fn a_pod_whose_domain_its_own_agent_cannot_vouch_for_is_not_enrolled() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = create("um-e2e-federation-lost")?;
    let lost = PodSpec::new("shop", "lost").annotation(TRUST_DOMAIN, "east.test");
    let lost = mesh.nodes[0].add_pod(lost)?;
    let typo = PodSpec::new("shop", "typo").annotation(TRUST_DOMAIN, "East.test");
    mesh.nodes[0].add_pod(typo)?;
    restart(&mut mesh, [true, true])?;
    let agent = &mesh.agents[0];
    let impossible = [("reason", "impossible")];
    agent
        .wait_metrics(SOON, "it is counted", |m| m.sum("undermesh_pods_not_enrolled", &impossible) == 1.0)?;
    let page: Value = serde_json::from_str(&agent.get("/debug/pods")?.ok()?)?;
    let told = page.to_string();
    ensure!(told.contains("the pod is of the trust domain east.test"), "{page:#}");

    let status = agent.get("/debug/status")?.ok()?;
    ensure!(status.contains("metadata.annotations[undermesh.io/trust-domain]"), "{status}");
    // Once it says what is so, it is in.
    lost.update(|manifest| manifest.set_annotation(TRUST_DOMAIN, Some("west.test")))?;
    agent.wait_metrics(SOON, "it is enrolled", |m| m.sum("undermesh_pods_enrolled", &[]) == 4.0)?;
    dial(&lost, &mesh.far).map(drop)
}
