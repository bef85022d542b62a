//! Who is at the ends of a tunnel: what the agents tell of it, what becomes of it when certificates run out, and what
//! plaintext may do beside it.

use std::fs;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Agent, AgentOptions, Lab, PodSpec, binary, eventually, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Talk, serve_on, undermesh};
use crate::mesh::{KERNEL_REFUSED, LIMIT, Mesh, OPENED, PORT, REFUSED, at, names, witness};
use crate::pki::{Authority, Leaf};
use crate::tunnel::{HANDSHAKES, SOON, ask, authority, authority_args, start_with};

const TUNNELS: &str = "undermesh_tunnels_open";
pub const TUNNELS_CLOSED: &str = "undermesh_tunnels_closed_total";
const STREAMS: &str = "undermesh_tunnel_streams_open";
const REMAINING: &str = "undermesh_certificate_remaining_seconds";

fn id(account: &str) -> String {
    format!("spiffe://cluster.local/ns/shop/sa/{account}")
}

/// A mesh in which every pod is somebody of its own.
fn of_accounts(name: &str) -> Result<Mesh> {
    let mesh = Mesh::create(name)?;
    for pod in [&mesh.client, &mesh.near, &mesh.far] {
        pod.update(|manifest| manifest.set("spec.serviceAccountName", json!(pod.name())))?;
    }
    Ok(mesh)
}

#[test]
fn the_agents_tell_who_talks_to_whom() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = of_accounts("um-e2e-tunnel-told")?;
    let log = mesh.lab.dir().join("access.json");
    let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
    start_with(&mut mesh, &["--access-log", "json", "--access-log-file", &log.display().to_string()])?;
    names(&mesh.client(&["connect", &at(mesh.far.ip(), PORT)])?)?;
    names(&mesh.client(&["connect", &at(mesh.near.ip(), PORT)])?)?;
    names(&witness(&outsider, &["connect", &at(mesh.far.ip(), PORT)])?)?;

    let (client, near, far, unknown) = (id("client"), id("near"), id("far"), "unknown".to_owned());
    let expected = [
        (0, "source", "mutual_tls", &client, &far),
        (1, "destination", "mutual_tls", &client, &far),
        (0, "source", "same_node", &client, &near),
        (0, "destination", "same_node", &client, &near),
        (1, "destination", "plaintext", &unknown, &far),
    ];
    for (node, reporter, security, source, destination) in expected {
        let labels = [
            ("reporter", reporter),
            ("security", security),
            ("source_identity", source.as_str()),
            ("destination_identity", destination.as_str()),
        ];
        let what = format!("{labels:?}");
        mesh.agents[node].wait_metrics(SOON, &what, |m| m.sum(OPENED, &labels) == 1.0)?;
    }
    // Both agents append to the one file.
    let lines: Vec<Value> = eventually(SOON, "the lines are written", || {
        let text = fs::read_to_string(&log)?;
        ensure!(text.lines().count() == expected.len() && text.ends_with('\n'), "the log is\n{text}");
        text.lines().map(|line| serde_json::from_str(line).context("a line")).collect()
    })?;
    for (_, reporter, security, source, destination) in expected {
        let known = |text: &String| (text != "unknown").then(|| text.clone());
        let (source, destination) = (json!(known(source)), json!(known(destination)));
        let is_it = |line: &&Value| {
            line["reporter"] == reporter
                && line["security"] == security
                && line["source_identity"] == source
                && line["destination_identity"] == destination
        };
        let found = lines.iter().filter(is_it).count();
        ensure!(found == 1, "{reporter} {security}: {found} lines of {lines:#?}");
    }
    for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
        let good = [("reporter", reporter), ("result", "success"), ("reason", "none")];
        let side = [("reporter", reporter)];
        agent.wait_metrics(SOON, "one tunnel, without a stream", |m| {
            m.sum(HANDSHAKES, &[]) == 1.0
                && m.sum(HANDSHAKES, &good) == 1.0
                && m.sum(TUNNELS, &[]) == 1.0
                && m.sum(TUNNELS, &side) == 1.0
                && m.sum(STREAMS, &[]) == 0.0
        })?;
    }
    certificates_are_shown(&mesh, &[&[&client, &near], &[&far]])
}

#[test]
fn a_pod_that_changes_its_account_is_somebody_else_from_then_on() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = of_accounts("um-e2e-tunnel-account")?;
    start_with(&mut mesh, &[])?;
    for (account, pod) in [("buyer", &mesh.client), ("seller", &mesh.far)] {
        names(&mesh.client(&["connect", &at(mesh.far.ip(), PORT)])?)?;
        pod.update(|manifest| manifest.set("spec.serviceAccountName", json!(account)))?;
        let side = if account == "buyer" { "source_identity" } else { "destination_identity" };
        let id = id(account);
        for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
            let labels = [("security", "mutual_tls"), ("reporter", reporter), (side, id.as_str())];
            eventually(SOON, &format!("the {reporter} knows {id}"), || {
                names(&mesh.client(&["connect", &at(mesh.far.ip(), PORT)])?)?;
                ensure!(agent.metrics()?.sum(OPENED, &labels) > 0.0, "not yet");
                Ok(())
            })?;
        }
    }
    Ok(())
}

/// On `/debug/certs`, by `undermesh certs` and in the metrics.
fn certificates_are_shown(mesh: &Mesh, held: &[&[&String]]) -> Result<()> {
    for (agent, held) in mesh.agents.iter().zip(held) {
        let page = agent.get("/debug/certs")?.ok()?;
        ensure!(!page.contains("PRIVATE"), "a secret is shown: {page}");
        let page: Value = serde_json::from_str(&page)?;
        let shown = page["certificates"].as_array().context("no certificates")?;
        let shown: Vec<_> = shown.iter().filter_map(|it| it["identity"].as_str()).collect();
        ensure!(shown == **held, "{page:#}");

        let table = undermesh(agent.node(), &["certs"])?.success()?;
        let output = undermesh(agent.node(), &["certs", "--output", "json"])?.success()?;
        let output: Value = serde_json::from_str(&output).with_context(|| output.clone())?;
        ensure!(output["trust_domain"] == "cluster.local", "{output:#}");
        let metrics = agent.metrics()?;
        for id in *held {
            ensure!(table.lines().any(|line| line.starts_with(id.as_str())), "{table}");
            for kind in ["leaf", "issuer", "root"] {
                let left = metrics.sum(REMAINING, &[("kind", kind), ("identity", id)]);
                ensure!(left > 80_000.0, "{left} s are left of the {kind} of {id}");
            }
        }
    }
    Ok(())
}

#[test]
fn certificates_that_run_out_are_told_of_and_refused() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = of_accounts("um-e2e-tunnel-expiry")?;
    start_with(&mut mesh, &["--certificate-lifetime", "30s"])?;
    let (ca, away) = (mesh.lab.dir().join("ca"), mesh.lab.dir().join("ca.away"));
    fs::rename(&ca, &away)?;

    // Nobody signs for a pod that comes now.
    let mut late = PodSpec::new("shop", "late");
    late.service_account = Some("late".into());
    let late = mesh.nodes[0].add_pod(late)?;
    not_ready(&mesh.agents[0], &format!("{} has no certificate", id("late")))?;
    mesh.agents[0].wait_metrics(SOON, "it is enrolled", |m| m.sum("undermesh_pods_enrolled", &[]) == 3.0)?;
    let began = Instant::now();
    ensure!(names(&witness(&late, &["connect", &at(mesh.far.ip(), PORT)])?).is_err(), "it got through");
    ensure!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
    let refused = [
        ("source_workload", "late"),
        ("destination_workload", "far"),
        ("security", "mutual_tls"),
        ("reason", "no_certificate"),
    ];
    mesh.agents[0].wait_metrics(SOON, "it is counted", |m| m.sum(REFUSED, &refused) == 1.0)?;

    not_ready(&mesh.agents[0], &format!("the certificate of {} expired at ", id("client")))?;
    not_ready(&mesh.agents[1], &format!("the certificate of {} expired at ", id("far")))?;
    // The second of the expiry is the last of the validity.
    std::thread::sleep(Duration::from_millis(1500));
    ensure!(names(&mesh.client(&["connect", &at(mesh.far.ip(), PORT)])?).is_err(), "it got through");
    let (client, far) = (id("client"), id("far"));
    let refused = [
        ("security", "mutual_tls"),
        ("reason", "handshake_failed"),
        ("source_identity", client.as_str()),
        ("destination_identity", far.as_str()),
    ];
    mesh.agents[0].wait_metrics(SOON, "it is counted", |m| m.sum(REFUSED, &refused) == 1.0)?;
    for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
        let labels = [("reporter", reporter), ("result", "failure"), ("reason", "expired")];
        agent.wait_metrics(SOON, "it has expired", |m| m.sum(HANDSHAKES, &labels) >= 1.0)?;
        let left =
            agent.metrics()?.select(REMAINING, &[("kind", "leaf")]).map(|it| it.value).collect::<Vec<_>>();
        ensure!(!left.is_empty() && left.iter().all(|left| *left < 0.0), "{left:?} s are left");
    }

    fs::rename(&away, &ca)?;
    for agent in &mut mesh.agents {
        agent.wait_ready(SOON)?;
    }
    for pod in [&mesh.client, &late] {
        names(&witness(pod, &["connect", &at(mesh.far.ip(), PORT)])?)?;
    }
    Ok(())
}

/// Waits until the agent says that it is not ready, and why.
pub fn not_ready(agent: &Agent, because: &str) -> Result<()> {
    eventually(Duration::from_secs(45), because, || {
        let page = agent.get("/readyz")?;
        ensure!(page.status == 503 && page.body.contains(because), "{} {}", page.status, page.body);
        Ok(())
    })
}

#[test]
fn agents_that_start_together_make_one_authority() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-tunnel-made")?;
    let args = authority_args(&mesh.lab);
    mesh.start(&args.iter().map(String::as_str).collect::<Vec<_>>())?;
    names(&mesh.client(&["connect", &at(mesh.far.ip(), PORT)])?)?;
    let labels = [("security", "mutual_tls")];
    mesh.agents[1].wait_metrics(SOON, "by a tunnel", |m| m.sum(OPENED, &labels) == 1.0)?;
    let made = |agent: &Agent| agent.process().output().matches("made a certificate authority").count();
    let made: usize = mesh.agents.iter().map(made).sum();
    ensure!(made == 1, "{made} agents say that they made it");
    Ok(())
}

#[test]
fn a_revoked_certificate_is_refused_and_what_it_has_carried_is_broken_off() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("openssl"));
    let mut mesh = of_accounts("um-e2e-tunnel-revoked")?;
    let args = authority(&mesh.lab)?;
    let crl = revoke(&mesh.lab, None)?;
    let crl = ["--crl", &crl.display().to_string(), "--crl-mode", "require"].map(str::to_owned);
    mesh.start(&args.iter().chain(&crl).map(String::as_str).collect::<Vec<_>>())?;
    names(&mesh.client(&["connect", &at(mesh.far.ip(), PORT)])?)?;
    let _server = serve_on(&mesh.far, PORT + 1)?;
    let to = SocketAddr::new(mesh.far.ip(), PORT + 1);
    let [revoked, mut other] = [Talk::with(&mesh.near, to)?, Talk::with(&mesh.client, to)?];
    // The client's pod has one or two, as its connections fell to workers.
    let open = mesh.agents.iter().map(|agent| Ok(agent.metrics()?.sum(TUNNELS, &[])));
    let open: Vec<f64> = open.collect::<Result<_>>()?;

    let page: Value = serde_json::from_str(&mesh.agents[0].get("/debug/certs")?.ok()?)?;
    let near = page["certificates"].as_array().into_iter().flatten().find(|it| it["identity"] == id("near"));
    revoke(&mesh.lab, near.context("near has no certificate")?["serial"].as_str())?;
    eventually(SOON, "the list is read again", || {
        let read = mesh.agents[1].process().output().matches("revocation lists read").count();
        ensure!(read == 2, "it has been read {read} times");
        Ok(())
    })?;
    revoked.breaks(SOON)?;
    for (agent, before) in mesh.agents.iter().zip(open) {
        agent.wait_metrics(SOON, "the tunnel is gone", |m| m.sum(TUNNELS, &[]) == before - 1.0)?;
    }
    // The server was the one to break it off.
    let labels = [("reporter", "destination"), ("reason", "withdrawn")];
    mesh.agents[1].wait_metrics(SOON, "it was withdrawn", |m| m.sum(TUNNELS_CLOSED, &labels) == 1.0)?;

    ensure!(names(&witness(&mesh.near, &["connect", &at(mesh.far.ip(), PORT)])?).is_err(), "it got through");
    for (agent, reporter) in mesh.agents.iter().zip(["source", "destination"]) {
        let labels = [("reporter", reporter), ("result", "failure"), ("reason", "revoked")];
        agent.wait_metrics(SOON, "it is revoked", |m| m.sum(HANDSHAKES, &labels) == 1.0)?;
        let by_peer = format!("reason=\"revoked\" by_peer={}", reporter == "source");
        let log = agent.process().output();
        ensure!(log.contains(&by_peer), "no line says {by_peer}:\n{log}");
    }
    // Others are not concerned.
    other.goes_on()?;
    other.end()?;
    names(&mesh.client(&["connect", &at(mesh.far.ip(), PORT)])?)?;
    Ok(())
}

/// The revocation list of the lab's authority: with this serial number, or empty.
fn revoke(lab: &Lab, serial: Option<&str>) -> Result<PathBuf> {
    let revoked = serial.map(|serial| {
        format!("R\t400101000000Z\t200101000000Z\t{}\tunknown\t/CN=x\n", serial.to_uppercase())
    });
    let config = "[ca]\ndefault_ca = own\n[own]\ndatabase = index.txt\ncrlnumber = crlnumber\ndefault_md = sha256\n\
                  default_crl_days = 1\ncrl_extensions = list\n[list]\nauthorityKeyIdentifier = keyid\n";
    for (name, text) in
        [("index.txt", revoked.unwrap_or_default()), ("crlnumber", "01\n".into()), ("crl.cnf", config.into())]
    {
        fs::write(lab.dir().join(name), text)?;
    }
    let mut shell = Command::new("sh");
    let script = "openssl ca -gencrl -config crl.cnf -cert ca/root-1.pem -keyfile ca/root-1.key.pem -out crl.new \
                  && mv crl.new crl.pem";
    shell.args(["-c", script]).current_dir(lab.dir());
    run_here(shell, LIMIT)?.success()?;
    Ok(lab.dir().join("crl.pem"))
}

#[test]
fn peers_of_other_trust_domains_need_a_bundle() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut mesh = of_accounts("um-e2e-tunnel-federated")?;
    let dir = mesh.lab.dir().to_owned();
    let lab = |name: &str| dir.join(name);
    for (directory, domain) in [("other", "other.test"), ("false", "other.test"), ("third", "third.test")] {
        let mut init = Command::new(binary("undermesh")?);
        init.args(["ca", "init", "--trust-domain", domain, "--ca-dir"]).arg(lab(directory));
        run_here(init, LIMIT)?.success()?;
    }
    let bundle = lab("bundle.pem");
    fs::copy(lab("false/root-1.pem"), &bundle)?;
    start_with(&mut mesh, &["--trust-bundle", &format!("other.test={}", bundle.display())])?;
    let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
    let (to, peer) = (mesh.far.ip(), "spiffe://other.test/ns/a/sa/b");
    let ask = |ca: &str, id: &str| -> Result<bool> {
        let leaf = Leaf { id, ..Leaf::GOOD };
        let certificate = Authority::of_folder(&mesh.lab, ca)?.sign(mesh.lab.dir(), "peer", leaf)?;
        let told = ask(&mesh.lab, &outsider, &certificate, to, ["CONNECT", &at(to, PORT)])?.success()?;
        Ok(told.trim() == "200")
    };
    let labels = |reason| [("reporter", "destination"), ("result", "failure"), ("reason", reason)];
    ensure!(!ask("third", "spiffe://third.test/ns/a/sa/b")?, "nobody knows third.test");
    let third = labels("wrong_trust_domain");
    mesh.agents[1].wait_metrics(SOON, "another domain", |m| m.sum(HANDSHAKES, &third) == 1.0)?;
    ensure!(!ask("other", peer)?, "it is another root's");
    let other = labels("unknown_issuer");
    mesh.agents[1].wait_metrics(SOON, "another root", |m| m.sum(HANDSHAKES, &other) == 1.0)?;

    fs::copy(lab("other/root-1.pem"), lab("bundle.new"))?;
    fs::rename(lab("bundle.new"), &bundle)?;
    eventually(SOON, "the bundle is read again", || {
        ensure!(ask("other", peer)?, "not yet");
        Ok(())
    })?;
    let labels = [("source_identity", peer), ("source_workload", "unknown"), ("security", "mutual_tls")];
    mesh.agents[1].wait_metrics(SOON, "it is known", |m| m.sum(OPENED, &labels) == 1.0)?;
    Ok(())
}

#[test]
fn an_authority_that_does_not_answer_is_told_of() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::create("um-e2e-tunnel-istiod")?;
    authority(&mesh.lab)?;
    let file = |name: &str| mesh.lab.dir().join(name).display().to_string();
    fs::write(file("token"), "token")?;
    let args = [
        ["--ca-address", "https://127.0.0.1:9"].map(str::to_owned),
        ["--ca-root".into(), file("ca/root-1.pem")],
        ["--ca-token".into(), file("token")],
        ["--state-dir".into(), file("state")],
    ];
    let agent = mesh.nodes[0].spawn_agent(AgentOptions { args: args.concat(), ..AgentOptions::default() })?;
    eventually(SOON, "the agent runs", || agent.metrics())?;
    not_ready(
        &agent,
        &format!("{} has no certificate: the certificate authority is not available", id("default")),
    )?;
    let labels = [("result", "unavailable")];
    let name = "undermesh_certificate_renewals_total";
    agent.wait_metrics(SOON, "it is counted", |m| m.sum(name, &labels) >= 1.0)?;
    Ok(())
}

/// Servers that speak first: whoever waited for the client's first bytes would wait for ever.
#[test]
fn every_mode_takes_servers_that_speak_first() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    for (mode, has_tunnel) in
        [("permissive", true), ("strict", true), ("permissive", false), ("strict", false)]
    {
        let mut mesh = Mesh::create(&format!("um-e2e-tunnel-{mode}-{has_tunnel}"))?;
        let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
        match has_tunnel {
            true => start_with(&mut mesh, &["--mtls", mode])?,
            false => mesh.start_plaintext(&["--mtls", mode])?,
        }
        for ip in [mesh.near.ip(), mesh.near.ip6(), mesh.far.ip(), mesh.far.ip6()] {
            let is_near = [mesh.near.ip(), mesh.near.ip6()].contains(&ip);
            let seen = names(&mesh.client(&["connect", &at(ip, PORT)])?);
            let takes = is_near || has_tunnel || mode == "permissive";
            ensure!(seen.is_ok() == takes, "{mode}, tunnel {has_tunnel}, {ip}: {seen:?}");

            let seen = witness(&outsider, &["connect", &at(ip, PORT)])?;
            match mode {
                "permissive" => drop(names(&seen)?),
                _ => ensure!(seen[0]["connect"] == "ECONNREFUSED", "plaintext, {mode}: {seen}"),
            }
        }
        let refused: f64 = mesh
            .agents
            .iter()
            .map(|agent| Ok(agent.metrics()?.sum(KERNEL_REFUSED, &[("reason", "plaintext")])))
            .sum::<Result<f64>>()?;
        ensure!((refused > 0.0) == (mode == "strict"), "{mode}: {refused} refused by the kernel");
    }
    Ok(())
}
