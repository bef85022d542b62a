//! Sockets used in less usual ways work as they do without the mesh.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use undermesh_tests::lab::{Pod, PodSpec, in_netns};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{BYPASSED, Mesh, OPENED, PORT, at, listen, names};

#[test]
fn one_source_port_reaches_two_destinations() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-source-port")?;
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for (own, [near, far]) in [
            (at(mesh.client.ip(), 5555), [mesh.near.ip(), mesh.far.ip()]),
            (at(mesh.client.ip6(), 5556), [mesh.near.ip6(), mesh.far.ip6()]),
            ("0.0.0.0:5557".to_owned(), [mesh.near.ip(), mesh.far.ip()]),
        ] {
            let (near, far) = (at(near, PORT), at(far, PORT));
            // The third wants the same connection once more, which no kernel gives.
            let both = mesh.client(&["connect", "--bind", &own, "--reuse", &near, &far, &near])?;
            for one in both.as_array().into_iter().flatten() {
                let view = if one["connect"] == "ok" { names(&json!([one]))? } else { one.to_string() };
                seen.push(format!("from {own}: {} {view}", one["name"]));
            }
        }
        Ok(seen)
    };
    same_with_and_without(&mut mesh, run)
}

#[test]
fn fast_open_carries_the_first_bytes_once() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-fast-open")?;
    for pod in [&mesh.client, &mesh.near, &mesh.far] {
        sysctl(pod, "net/ipv4/tcp_fastopen", "3")?;
    }
    let _servers: Vec<_> = mesh
        .servers()
        .into_iter()
        .map(|pod| listen(pod, 7001, &["--fast-open", "--script", "hear:4,say:pong,echo"]))
        .collect::<Result<_>>()?;
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for ip in mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]) {
            let to = at(ip, 7001);
            // The first connection gets the cookie, the second may use it.
            for turn in 1..=2 {
                let connect =
                    ["--fast-open", "connect", "--script", "say:ping,hear:4,say:more,shut,hear-end"];
                let message = ["--fast-open", "message", "--script", "hear:4,say:more,shut,hear-end"];
                for args in [connect, message] {
                    let one = mesh.client(&[&["connect", to.as_str()], args.as_slice()].concat())?;
                    seen.push(format!("{to}, turn {turn}: {} {}", one[0]["connect"], one[0]["saw"]));
                }
            }
        }
        Ok(seen)
    };
    run(&mesh)?;
    let taken = fast_opens(&mesh.client)?;
    ensure!(taken > 0, "no SYN carried data, so this would show nothing");
    same_with_and_without(&mut mesh, run)
}

#[test]
fn io_uring_connects_sends_and_receives() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::IoUring);
    let mut mesh = Mesh::create("um-e2e-uring")?;
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let ips = mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]);
        ips.map(|ip| names(&mesh.client(&["uring", &at(ip, PORT)])?)).collect()
    };
    same_with_and_without(&mut mesh, run)
}

#[test]
fn a_non_blocking_connect_becomes_writable() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-nonblocking")?;
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let ips = mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]);
        ips.map(|ip| names(&mesh.client(&["connect", "--nonblocking", &at(ip, PORT)])?)).collect()
    };
    same_with_and_without(&mut mesh, run)
}

#[test]
fn mptcp_sockets_fall_back_to_tcp_and_keep_their_names() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Mptcp);
    let mut mesh = Mesh::create("um-e2e-mptcp")?;
    let _servers: Vec<_> =
        mesh.servers().into_iter().map(|pod| listen(pod, 7001, &["--mptcp"])).collect::<Result<_>>()?;
    let run = |mesh: &Mesh| -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for ip in mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]) {
            let own = if ip.is_ipv4() { mesh.client.ip() } else { mesh.client.ip6() };
            for port in [PORT, 7001] {
                let (to, own) = (at(ip, port), at(own, 0));
                seen.push(names(&mesh.client(&["connect", "--mptcp", &to])?)?);
                seen.push(names(&mesh.client(&["connect", "--mptcp", "--bind", &own, &to])?)?);
                // A plain client of an MPTCP server.
                seen.push(names(&mesh.client(&["connect", &to])?)?);
            }
        }
        Ok(seen)
    };
    same_with_and_without(&mut mesh, run)
}

#[test]
fn what_stays_on_the_node_is_not_paced() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Congestion("bbr"), Feature::Congestion("cubic"));
    let mut mesh = Mesh::create("um-e2e-pacing")?;
    let script = ["--script", "tell-congestion,hear-line"];
    let _servers: Vec<_> =
        mesh.servers().into_iter().map(|pod| listen(pod, 7001, &script)).collect::<Result<_>>()?;
    let seen = |mesh: &Mesh, default: &str| -> Result<Vec<String>> {
        for pod in [&mesh.client, &mesh.near, &mesh.far] {
            sysctl(pod, "net/ipv4/tcp_congestion_control", default)?;
        }
        let ips = mesh.servers().into_iter().flat_map(|pod| [pod.ip(), pod.ip6()]);
        let ask = |ip| -> Result<String> {
            let one = mesh.client(&[&["connect", &at(ip, 7001)], script.as_slice()].concat())?;
            Ok(format!("client {}, server {}", one[0]["saw"][0], one[0]["saw"][1]))
        };
        ips.map(ask).collect()
    };
    let all = |name: &str| vec![format!("client \"{name}\", server \"{name}\""); 4];
    let without = seen(&mesh, "bbr")?;
    ensure!(without == all("bbr"), "without the mesh: {without:#?}");
    mesh.start(&[])?;
    for (default, expected) in [("bbr", "cubic"), ("reno", "reno")] {
        let with = seen(&mesh, default)?;
        ensure!(with == all(expected), "where {default} is the default: {with:#?}");
    }
    // A destination that is not of the mesh.
    let outside = mesh.nodes[1].add_pod(PodSpec::new("wild", "outside"))?;
    let _outside = listen(&outside, 7001, &script)?;
    sysctl(&mesh.client, "net/ipv4/tcp_congestion_control", "bbr")?;
    let past = mesh.client(&[&["connect", &at(outside.ip(), 7001)], script.as_slice()].concat())?;
    ensure!(past[0]["saw"][0] == "bbr", "on the way past the mesh: {past}");
    Ok(())
}

/// Runs the same without and with the agents; what is seen must not differ, but for the client's port across nodes.
/// Every connection that succeeds must have been captured.
fn same_with_and_without(mesh: &mut Mesh, run: impl Fn(&Mesh) -> Result<Vec<String>>) -> Result<()> {
    let without = run(mesh)?;
    mesh.start(&[])?;
    let with = run(mesh)?;
    ensure!(with.len() == without.len() && !with.is_empty(), "without: {without:#?}\nwith: {with:#?}");
    for (with, without) in with.iter().zip(&without) {
        ensure!(with.replace("OTHER", "PORT") == *without, "without: {without}\n   with: {with}");
    }
    let metrics = mesh.agent().metrics()?;
    let bypassed = metrics.sum(BYPASSED, &[]);
    ensure!(bypassed == 0.0, "{bypassed} connections went past the agent");
    let captured = metrics.sum(OPENED, &[("reporter", "source")]);
    ensure!(captured >= with.len() as f64 / 2.0, "only {captured} connections were captured");
    Ok(())
}

/// Connections of the pod whose SYN carried data that was taken.
fn fast_opens(pod: &Pod) -> Result<u64> {
    let table = in_netns(pod.netns(), || Ok(std::fs::read_to_string("/proc/thread-self/net/netstat")?))?;
    let mut lines = table.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = lines.next().zip(lines.next()).context("no TcpExt in netstat")?;
    let mut figures = names.split(' ').zip(values.split(' '));
    let figure = figures.find(|(name, _)| *name == "TCPFastOpenActive").context("no TCPFastOpenActive")?;
    Ok(figure.1.parse()?)
}

fn sysctl(pod: &Pod, key: &str, value: &str) -> Result<()> {
    in_netns(pod.netns(), || Ok(std::fs::write(format!("/proc/sys/{key}"), value)?))
}
