//! What is none of the mesh's business stays untouched: the pod's talk with itself, UDP, strangers. And nobody gets
//! at the agent's listeners.

use std::net::IpAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use undermesh_tests::lab::{PodSpec, binary, in_netns};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{
    KERNEL_REFUSED, Mesh, OPENED, PORT, REFUSED, SERVICE_PORT, at, counted, listen, names, service_ips,
    witness,
};

#[test]
fn a_pods_talk_with_itself_is_untouched() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-own")?;
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), "::1".parse()?];
        let ips = loopback.into_iter().chain([mesh.client.ip(), mesh.client.ip6()]);
        let ips = ips.chain(mesh.client.second_ips().into_iter().flatten());
        ips.map(|ip| names(&mesh.client(&["connect", &at(ip, PORT)])?)).collect()
    };
    let without = run(&mesh)?;
    mesh.start(&[])?;
    let with = run(&mesh)?;
    ensure!(with == without, "without: {without:#?}\nwith: {with:#?}");
    ensure!(mesh.noted()? == 0.0, "the agents noted {} connections", mesh.noted()?);
    Ok(())
}

#[test]
fn a_server_is_reached_at_the_addresses_it_listens_at_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-own-address")?;
    let (private, public) = (["--at", "127.0.0.1"], ["--at", &mesh.near.ip().to_string()]);
    let _servers = [listen(&mesh.near, 7001, &private)?, listen(&mesh.near, 7002, &public)?];
    let [to_private, to_public, to_other_family] =
        [(mesh.near.ip(), 7001), (mesh.near.ip(), 7002), (mesh.near.ip6(), 7002)]
            .map(|(ip, port)| at(ip, port));
    let without = names(&mesh.client(&["connect", &to_public])?)?;
    mesh.start(&[])?;
    let with = names(&mesh.client(&["connect", &to_public])?)?;
    ensure!(with == without, "without: {without}\n   with: {with}");
    for to in [to_private, to_other_family] {
        let told = mesh.client(&["connect", &to, "--script", "hear-end"])?;
        ensure!(told[0]["saw"][0] == "|ECONNRESET", "{to}, where nobody listens: {told}");
    }
    Ok(())
}

#[test]
fn udp_is_untouched() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-udp")?;
    let mut servers = Vec::new();
    for pod in [&mesh.client, &mesh.near, &mesh.far] {
        let mut server = Command::new(binary("witness")?);
        server.args(["udp-listen", "--port", "7003"]);
        let server = pod.spawn(server)?;
        undermesh_tests::lab::eventually(Duration::from_secs(10), "the UDP server answers", || {
            ensure!(server.output().contains("answering"), "it says: {}", server.output());
            Ok(())
        })?;
        servers.push(server);
    }
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let pods = [&mesh.client, &mesh.near, &mesh.far];
        let mut to: Vec<String> =
            pods.iter().flat_map(|pod| [pod.ip(), pod.ip6()]).map(|ip| at(ip, 7003)).collect();
        // A Service's address, which leads nowhere for UDP, must go on leading nowhere.
        to.extend(service_ips(&mesh.near).map(|ip| at(ip, SERVICE_PORT)));
        let mut seen = Vec::new();
        for to in &to {
            for args in [&["udp", to][..], &["udp", "--connected", to]] {
                let told = mesh.client(args)?;
                let own = told["name"].as_str().and_then(|name| name.rsplit_once(':')).context("a name")?;
                let told = told.to_string().replace(own.1, "PORT");
                ensure!(to.contains("96") || told.contains(&format!("\"from\":\"{to}\"")), "{to}: {told}");
                seen.push(format!("{to}: {told}"));
            }
        }
        Ok(seen)
    };
    let without = run(&mesh)?;
    mesh.start(&[])?;
    let with = run(&mesh)?;
    ensure!(with == without, "without: {without:#?}\nwith: {with:#?}");
    ensure!(mesh.noted()? == 0.0, "the agents noted {} connections", mesh.noted()?);
    Ok(())
}

#[test]
fn strangers_are_not_captured() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-strangers")?;
    let pods =
        mesh.nodes.iter().map(|node| node.add_pod(PodSpec::new("wild", &format!("wild-{}", node.name()))));
    let pods = pods.collect::<Result<Vec<_>>>()?;
    let _servers = pods.iter().map(|pod| listen(pod, PORT, &[])).collect::<Result<Vec<_>>>()?;
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let ips = pods.iter().flat_map(|pod| [pod.ip(), pod.ip6()]);
        let mut seen: Vec<String> =
            ips.map(|ip| names(&mesh.client(&["connect", &at(ip, PORT)])?)).collect::<Result<_>>()?;
        // Nothing listens on the nodes themselves.
        for ip in mesh.nodes.iter().flat_map(|node| node.addresses()) {
            seen.push(mesh.client(&["connect", &at(ip, PORT)])?[0]["connect"].to_string());
        }
        Ok(seen)
    };
    let without = run(&mesh)?;
    mesh.start(&[])?;
    let with = run(&mesh)?;
    ensure!(with == without, "without: {without:#?}\nwith: {with:#?}");
    ensure!(mesh.noted()? == 0.0, "the agents noted {} connections", mesh.noted()?);
    Ok(())
}

#[test]
fn the_agents_listeners_take_no_direct_dial() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::running("um-e2e-listener", &[])?;
    let port = agents_port(&mesh)?;
    let metrics = || mesh.agent().metrics();
    let reserved = ["127.128.0.0", "127.128.0.1", "127.128.0.2", "127.128.0.15"];
    for ip in reserved.into_iter().chain(["fd75:6d65:7368:1::1", "fd75:6d65:7368:1::2"]) {
        let before = counted(&metrics()?, KERNEL_REFUSED, "listener_dial");
        let told = mesh.client(&["connect", &at(ip.parse()?, port)])?;
        ensure!(told[0]["connect"] == "ECONNREFUSED", "{ip}:{port}: {told}");
        let refused = counted(&metrics()?, KERNEL_REFUSED, "listener_dial") - before;
        ensure!(refused == 1.0, "{ip}:{port} was counted {refused} times");
    }
    // The pod's own addresses have no listener on that port.
    let loopback: IpAddr = [127, 0, 0, 1].into();
    for ip in [loopback, "::1".parse()?, mesh.client.ip(), mesh.client.ip6()] {
        let told = mesh.client(&["connect", &at(ip, port)])?;
        ensure!(told[0]["connect"] == "ECONNREFUSED", "{ip}:{port}: {told}");
    }
    // From other pods it is a port on which nothing listens.
    for caller in mesh.servers() {
        for ip in [mesh.client.ip(), mesh.client.ip6()] {
            let told = witness(caller, &["connect", &at(ip, port), "--script", "hear-end"])?;
            ensure!(told[0]["saw"][0] == "|ECONNRESET", "{} to {ip}:{port}: {told}", caller.name());
        }
    }
    let opened: f64 = mesh.agent().metrics()?.sum(OPENED, &[("reporter", "source")]);
    ensure!(opened == 0.0, "{opened} connections were relayed from here");
    let refused = counted(&metrics()?, REFUSED, "connect_refused");
    // Two from the near pod, and two from the far one whose agent was let in before.
    ensure!(refused == 4.0, "{refused} were counted as refused");
    Ok(())
}

#[test]
fn a_code_that_stands_for_nothing_is_refused() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mesh = Mesh::running("um-e2e-code", &[])?;
    for (number, ip) in ["127.200.1.2", "fd75:6d65:7368:1::4d4d"].into_iter().enumerate() {
        // The agent has to accept it to see what it stands for.
        let told = mesh.client(&["connect", &at(ip.parse()?, 80), "--script", "hear-end"])?;
        // On a slow machine the reset comes before connect() has returned, which then tells of it.
        let reset = told[0]["connect"] == "ECONNRESET";
        ensure!(reset || told[0]["connect"] == "ok" && told[0]["saw"][0] == "|ECONNRESET", "{ip}: {told}");
        let what = "the refusal is counted";
        mesh.agent().wait_metrics(Duration::from_secs(5), what, |metrics| {
            counted(metrics, REFUSED, "unknown_destination") == (number + 1) as f64
        })?;
    }
    Ok(())
}

/// The port of the agent's listeners in the client's pod, from what `ss` shows there.
fn agents_port(mesh: &Mesh) -> Result<u16> {
    let output = in_netns(mesh.client.netns(), || Ok(Command::new("ss").args(["-ltnH"]).output()?))?;
    let table = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut locals = table.lines().filter_map(|line| line.split_whitespace().nth(3));
    let local =
        locals.find(|local| local.contains("127.128.0.1")).with_context(|| format!("ss shows:\n{table}"))?;
    Ok(local.rsplit_once(':').context("no port")?.1.parse()?)
}
