//! On the tunnel's port: callers whom the mesh must not let in, servers whom it must not believe, and floods.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Agent, Lab, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{LIMIT, Mesh, PORT, REFUSED, at, listen, names, witness};
use crate::pki::{Authority, Leaf, SHOP_ID};
use crate::tunnel::{HANDSHAKES, SOON, running, start_with};

/// A mesh with a tunnel, and a pod outside of it that calls the tunnel's port.
struct Intrusion {
    outsider: Pod,
    script: PathBuf,
    mesh: Mesh,
}

impl Intrusion {
    fn begin(name: &str) -> Result<Self> {
        Self::into(running(name)?)
    }

    fn into(mesh: Mesh) -> Result<Self> {
        let outsider = mesh.nodes[0].add_pod(PodSpec::new("outside", "outsider"))?;
        let script = mesh.lab.dir().join("caller.py");
        fs::write(&script, include_str!("caller.py"))?;
        Ok(Self { outsider, script, mesh })
    }

    fn command(&self, to: IpAddr, args: &[&str]) -> Command {
        let mut python = Command::new("python3");
        python.arg(&self.script).arg(to.to_string()).args(args);
        python
    }

    /// What the caller says of how it was taken.
    fn call(&self, to: IpAddr, args: &[&str]) -> Result<String> {
        let told = self.outsider.run(self.command(to, args), LIMIT)?.success()?;
        Ok(told.trim().to_owned())
    }

    fn start(&self, to: IpAddr, args: &[&str]) -> Result<Process> {
        self.outsider.spawn(self.command(to, args))
    }

    fn certificate(&self, authority: &Authority, name: &str, leaf: Leaf<'_>) -> Result<String> {
        Ok(authority.sign(self.mesh.lab.dir(), name, leaf)?.display().to_string())
    }

    fn good_certificate(&self) -> Result<String> {
        self.certificate(&Authority::of_lab(&self.mesh.lab)?, "good", Leaf::GOOD)
    }

    fn far(&self) -> IpAddr {
        self.mesh.far.ip()
    }

    /// The mesh's own client is served as ever.
    fn others_are_served(&self) -> Result<()> {
        let began = Instant::now();
        names(&self.mesh.client(&["connect", &at(self.far(), PORT)])?)?;
        let took = began.elapsed();
        ensure!(took < Duration::from_secs(2), "a client of the mesh was served only after {took:?}");
        Ok(())
    }

    fn nothing_panicked(&mut self) -> Result<()> {
        for agent in &mut self.mesh.agents {
            agent.check_running()?;
            let log = agent.process().output();
            ensure!(!log.contains("panicked"), "{log}");
        }
        Ok(())
    }

    fn resident(&self) -> Result<u64> {
        self.mesh.agents[1].process().resident_bytes()
    }
}

#[test]
fn only_certificates_of_the_mesh_are_let_in() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let intrusion = Intrusion::begin("um-e2e-intruders")?;
    let ours = Authority::of_lab(&intrusion.mesh.lab)?;
    let (theirs, abroad) = (Authority::stranger("cluster.local")?, Authority::stranger("elsewhere.org")?);
    const ABROAD: &str = "spiffe://elsewhere.org/ns/shop/sa/default";
    let file = |authority: &Authority, name: &str, leaf| {
        Ok::<_, anyhow::Error>(vec!["--certificate".into(), intrusion.certificate(authority, name, leaf)?])
    };
    let with = |args: &[&str], file: Vec<String>| {
        file.into_iter().chain(args.iter().map(|arg| (*arg).to_owned())).collect::<Vec<String>>()
    };
    let good = || file(&ours, "good", Leaf::GOOD);
    let dated = |valid| Leaf { id: SHOP_ID, valid };
    let cases = [
        ("unknown_issuer", "alert TLSV1_ALERT_UNKNOWN_CA", file(&theirs, "theirs", Leaf::GOOD)?),
        ("expired", "alert SSLV3_ALERT_CERTIFICATE_EXPIRED", file(&ours, "old", dated((-48, -1)))?),
        ("not_yet_valid", "alert SSLV3_ALERT_CERTIFICATE_EXPIRED", file(&ours, "early", dated((2, 24)))?),
        (
            "wrong_trust_domain",
            "alert SSLV3_ALERT_CERTIFICATE_UNKNOWN",
            file(&abroad, "abroad", Leaf { id: ABROAD, ..Leaf::GOOD })?,
        ),
        (
            // Our own authority speaks for our own trust domain alone.
            "wrong_trust_domain",
            "alert SSLV3_ALERT_CERTIFICATE_UNKNOWN",
            file(&ours, "abroad-by-us", Leaf { id: ABROAD, ..Leaf::GOOD })?,
        ),
        (
            "bad_certificate",
            "alert SSLV3_ALERT_CERTIFICATE_UNKNOWN",
            file(&ours, "no-spiffe", Leaf { id: "https://example.org/shop", ..Leaf::GOOD })?,
        ),
        ("no_certificate", "alert TLSV13_ALERT_CERTIFICATE_REQUIRED", vec![]),
        ("protocol", "alert TLSV1_ALERT_PROTOCOL_VERSION", with(&["--tls12"], good()?)),
        (
            "protocol",
            "alert [SSL] tlsv1 alert no application protocol",
            with(&["--alpn", "http/1.1"], good()?),
        ),
        ("protocol", "closed", with(&["--alpn", ""], good()?)),
    ];
    for to in [intrusion.far(), intrusion.mesh.far.ip6()] {
        for (reason, expected, args) in &cases {
            let args: Vec<&str> = args.iter().map(String::as_str).chain(["hello"]).collect();
            let labels = [("result", "failure"), ("reason", *reason)];
            let agent = &intrusion.mesh.agents[1];
            let (before, refused) =
                (agent.metrics()?.sum(HANDSHAKES, &labels), agent.metrics()?.sum(REFUSED, &[]));
            let told = intrusion.call(to, &args)?;
            ensure!(told == *expected, "{reason}, {args:?}: the caller is told `{told}`, not `{expected}`");
            agent.wait_metrics(SOON, reason, |m| {
                m.sum(HANDSHAKES, &labels) == before + 1.0 && m.sum(REFUSED, &[]) == refused + 1.0
            })?;
            let log = agent.process().output();
            let outsider = if to.is_ipv6() { intrusion.outsider.ip6() } else { intrusion.outsider.ip() };
            let is_told = |line: &&str| {
                line.contains(&format!("reason=\"{reason}\"")) && line.contains(&outsider.to_string())
            };
            log.lines().find(is_told).with_context(|| format!("no line tells of {reason}:\n{log}"))?;
        }
        let good = good()?;
        let told = intrusion.call(to, &[&good[0], &good[1], "hello"])?;
        ensure!(told == "welcome", "a caller with a good certificate is told `{told}`");
    }
    intrusion.others_are_served()
}

#[test]
fn a_tunnel_leads_to_its_own_pod_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let intrusion = Intrusion::begin("um-e2e-intruders-other")?;
    let other = intrusion.mesh.nodes[1].add_pod(PodSpec::new("shop", "other"))?;
    let _server = listen(&other, PORT, &[])?;
    intrusion.mesh.agents[1].wait_published(&[other.ip()], SOON)?;
    let certificate = intrusion.good_certificate()?;
    let (far, far6) = (intrusion.far(), intrusion.mesh.far.ip6());
    for (method, authority, expected) in [
        ("CONNECT", at(far, PORT), "200"),
        ("CONNECT", at(far6, PORT), "200"),
        ("CONNECT", at(far, 7009), "503"),
        ("CONNECT", at(other.ip(), PORT), "400"),
        ("CONNECT", at("127.0.0.1".parse()?, PORT), "400"),
        ("CONNECT", at(far, 15008), "400"),
        ("CONNECT", far.to_string(), "400"),
        ("CONNECT", format!("far:{PORT}"), "400"),
        ("CONNECT", format!("user@{far}:{PORT}"), "400"),
        ("GET", at(far, PORT), "400"),
    ] {
        let told = intrusion.call(far, &["--certificate", &certificate, "ask", method, &authority])?;
        ensure!(told == expected, "{method} {authority}: {told}");
    }
    Ok(())
}

/// Whoever is let in speaks for itself, and for the pods that have its identity: to the application, and in the log.
#[test]
fn nobody_speaks_in_the_name_of_another_pod() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut mesh = Mesh::create("um-e2e-intruders-name")?;
    let log = mesh.lab.dir().join("access.json");
    start_with(&mut mesh, &["--access-log", "json", "--access-log-file", &log.display().to_string()])?;
    let intrusion = Intrusion::into(mesh)?;
    let (outsider, client) = (&intrusion.outsider, &intrusion.mesh.client);
    let ours = Authority::of_lab(&intrusion.mesh.lab)?;
    let another = Leaf { id: "spiffe://cluster.local/ns/shop/sa/another", ..Leaf::GOOD };
    let (another, same) = (intrusion.certificate(&ours, "another", another)?, intrusion.good_certificate()?);
    let [far, far6] = [intrusion.far(), intrusion.mesh.far.ip6()];
    const CLAIMED: u16 = 4321;
    let mut heard = BTreeSet::new();
    for (certificate, to, claimed, is_believed) in [
        (&another, far, client.ip(), false),
        (&another, far6, client.ip6(), false),
        // The server's own pod, its loopback, its node, and nobody.
        (&another, far, far, false),
        (&another, far, "127.0.0.1".parse()?, false),
        (&another, far6, "::1".parse()?, false),
        (&another, far, intrusion.mesh.nodes[1].addresses()[0], false),
        (&another, far, "192.0.2.1".parse()?, false),
        // The application could make nothing of an address of the other family.
        (&same, far, client.ip6(), false),
        (&another, far, outsider.ip(), true),
        (&another, far6, outsider.ip6(), true),
        (&same, far, client.ip(), true),
        (&same, far6, client.ip6(), true),
        (&same, far, "127.0.0.1".parse()?, false),
    ] {
        let case = format!("{claimed} claimed at {to} with {certificate}");
        let claimed = SocketAddr::new(claimed, CLAIMED);
        let forwarded = format!("for=\"{claimed}\"");
        let args = ["--certificate", certificate, "claim", &at(to, PORT), &forwarded];
        let told = intrusion.call(to, &args)?;
        let (own, greeting) = told.split_once(' ').with_context(|| told.clone())?;
        let greeting: Value = serde_json::from_str(greeting).with_context(|| format!("{case}: {told}"))?;
        let expected = if is_believed { claimed } else { own.parse()? };
        for name in ["peer", "accepted"] {
            let seen: SocketAddr = greeting[name].as_str().context("no name")?.parse()?;
            // The server's socket is of both families.
            let seen = SocketAddr::new(seen.ip().to_canonical(), seen.port());
            ensure!(seen == expected, "{case}: the application's {name} is {seen}, not {expected}");
        }
        heard.insert(expected.to_string());
    }
    eventually(SOON, "the log has them all", || {
        let text = fs::read_to_string(&log)?;
        let lines = text.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
        let clients = lines.iter().filter_map(|line| line["client_address"].as_str());
        let clients: BTreeSet<_> = clients.map(str::to_owned).collect();
        ensure!(clients == heard, "{clients:#?}, not {heard:#?}");
        ensure!(!text.contains("teller"), "somebody is taken for who it says that it is: {text}");
        Ok(())
    })?;
    let told = intrusion.mesh.agents[1].metrics()?.text;
    ensure!(!told.contains("teller"), "somebody is taken for who it says that it is: {told}");
    Ok(())
}

/// A server that answers the tunnel's port of a pod, but is somebody else.
#[test]
fn only_the_workload_that_was_meant_is_believed() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("openssl"));
    let mut mesh = running("um-e2e-intruders-impostor")?;
    mesh.agents[1].terminate(SOON)?;
    // No agent serves it, but one could have said that it does.
    let impostor = mesh.nodes[1].add_pod(PodSpec::new("shop", "impostor"))?;
    publish(&mesh.lab, mesh.agent(), &impostor)?;
    let ours = Authority::of_lab(&mesh.lab)?;
    let theirs = Authority::stranger("cluster.local")?;
    let another = Leaf { id: "spiffe://cluster.local/ns/shop/sa/another", ..Leaf::GOOD };
    for (reason, certificate) in [
        ("wrong_identity", ours.sign(mesh.lab.dir(), "another", another)?),
        ("unknown_issuer", theirs.sign(mesh.lab.dir(), "theirs", Leaf::GOOD)?),
        ("expired", ours.sign(mesh.lab.dir(), "old", Leaf { valid: (-48, -1), ..Leaf::GOOD })?),
    ] {
        let mut openssl = Command::new("openssl");
        openssl.args(["s_server", "-accept", "15008", "-tls1_3", "-alpn", "h2", "-quiet", "-cert"]);
        openssl.arg(&certificate).arg("-key").arg(&certificate);
        let mut server = impostor.spawn(openssl)?;
        impostor.wait_listening(15008)?;
        let told = mesh.client(&["connect", &at(impostor.ip(), PORT), "--script", "hear-end"])?;
        ensure!(told.to_string().contains("ECONNRESET"), "{reason}: the client was not refused: {told}");
        let labels = [("result", "failure"), ("reason", reason)];
        mesh.agent().wait_metrics(SOON, reason, |m| {
            m.sum(HANDSHAKES, &labels) >= 1.0 && m.sum(REFUSED, &[("reason", "handshake_failed")]) >= 1.0
        })?;
        let log = mesh.agent().process().output();
        ensure!(log.contains(&format!("reason=\"{reason}\"")), "no line tells of {reason}:\n{log}");
        server.kill();
    }
    Ok(())
}

/// Has an agent believe that a pod of another node takes tunnels, as that node's agent would.
pub fn publish(lab: &Lab, agent: &Agent, pod: &Pod) -> Result<()> {
    let node = pod.node().name();
    let file = lab.dir().join(format!("state/enrolled-{node}.json"));
    let uid = eventually(SOON, "the pod is known", || {
        let config: Value = serde_json::from_str(&agent.get("/debug/config")?.ok()?)?;
        let workloads = config["workloads"].as_array().context("no workloads")?;
        let workload = workloads.iter().find(|workload| workload["pod"] == pod.name());
        Ok(workload.with_context(|| config.to_string())?["uid"].clone())
    })?;
    let statement = serde_json::json!({
        "node": node,
        "pods": [{ "uid": uid, "addresses": [pod.ip(), pod.ip6()], "since": 0 }],
    });
    let next = file.with_extension("next");
    fs::write(&next, statement.to_string())?;
    fs::rename(next, file)?;
    std::thread::sleep(Duration::from_millis(500));
    Ok(())
}

#[test]
fn floods_end_their_own_tunnel_and_no_other() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut intrusion = Intrusion::begin("um-e2e-intruders-flood")?;
    let certificate = intrusion.good_certificate()?;
    let (far, authority) = (intrusion.far(), at(intrusion.far(), PORT));
    intrusion.others_are_served()?;
    for (kind, count, expected) in [
        ("reset", "20000", "goaway 11"),
        ("continuation", "200000", "goaway 11"),
        // Answered for as long as the answers are read.
        ("settings", "200000", ""),
        ("ping", "200000", ""),
        ("empty-data", "200000", ""),
        ("window", "200000", ""),
        // Those beyond the limit are refused one by one.
        ("streams", "20000", ""),
    ] {
        let before = intrusion.resident()?;
        let flood = ["--certificate", &certificate, "flood", kind, count, &authority];
        let mut flood = intrusion.start(far, &flood)?;
        while flood.check_running().is_ok() {
            intrusion.others_are_served().with_context(|| format!("during a flood of {kind}"))?;
        }
        let told = flood.output();
        let grown = intrusion.resident()?.saturating_sub(before);
        eprintln!("{} (memory grew by {grown} bytes)", told.trim());
        ensure!(told.contains(&format!("{kind}: {expected}")), "a flood of {kind}: {told}");
        ensure!(grown < 32 << 20, "a flood of {kind} took {grown} bytes of memory");
    }
    intrusion.nothing_panicked()
}

#[test]
fn handshakes_that_never_end_hold_up_nobody() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut intrusion = Intrusion::begin("um-e2e-intruders-slow")?;
    let far = intrusion.far();
    // More than there is room for.
    let mut silent = intrusion.start(far, &["silent", "800", "12"])?;
    let slow = intrusion.start(far, &["slow"])?;
    eventually(SOON, "they are open", || {
        ensure!(silent.output().contains("open"), "not yet");
        Ok(())
    })?;
    for _ in 0..5 {
        intrusion.others_are_served()?;
    }
    let limits = [("reason", "limit"), ("reporter", "destination")];
    let agent = &intrusion.mesh.agents[1];
    agent.wait_metrics(SOON, "the oldest make room", |m| m.sum(REFUSED, &limits) >= 800.0 - 512.0)?;
    ensure!(silent.wait(LIMIT)?.success(), "{}", silent.output());
    ensure!(silent.output().contains("closed 800"), "{}", silent.output());
    let late = [("result", "failure"), ("reason", "timeout")];
    agent.wait_metrics(SOON, "the others were too late", |m| m.sum(HANDSHAKES, &late) >= 500.0)?;
    eventually(SOON, "a slow one is ended", || {
        ensure!(slow.output().contains("closed after"), "{}", slow.output());
        Ok(())
    })?;
    intrusion.nothing_panicked()
}

#[test]
fn garbled_bytes_are_refused_and_break_nothing() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    let mut intrusion = Intrusion::begin("um-e2e-intruders-garbage")?;
    let certificate = intrusion.good_certificate()?;
    let (far, authority) = (intrusion.far(), at(intrusion.far(), PORT));
    for seed in ["1", "2", "3"] {
        let told =
            intrusion.call(far, &["--certificate", &certificate, "garbage", seed, "200", &authority])?;
        ensure!(told == "said 200", "{told}");
    }
    intrusion.others_are_served()?;
    let refused = witness(&intrusion.outsider, &["connect", &at(far, PORT)])?;
    ensure!(refused[0]["connect"] == "ok", "plaintext is let in as before: {refused}");
    intrusion.nothing_panicked()
}
