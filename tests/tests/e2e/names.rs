//! getsockname(), getpeername() and accept() show what they show without the mesh.
//!
//! One exception: across nodes in plaintext the server sees the client's address with the port of the agent's own
//! connection, since nothing on the wire carries the client's.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Node, Pod, PodSpec, binary};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::mesh::{
    BYPASSED, KERNEL_REFUSED, LIMIT, Mesh, OPENED, PORT, SERVICE_PORT, at, counted, listen, names,
    service_ips, witness,
};

/// How the client makes its socket: a name, whether it is for IPv4 alone, and the arguments. `OWN` stands for the
/// pod's own address of the family, `SECOND` for that on its second network.
const SOCKETS: [(&str, bool, &[&str]); 7] = [
    ("unbound", false, &[]),
    ("bound to the pod's address", false, &["--bind", "OWN"]),
    ("dual-stack, unbound", true, &["--dual-stack"]),
    ("dual-stack, bound to the pod's address", true, &["--dual-stack", "--bind", "OWN"]),
    ("bound to the second network's address", false, &["--bind", "SECOND"]),
    ("bound to the interface", false, &["--device", "eth0"]),
    ("non-blocking", false, &["--nonblocking"]),
];

#[test]
fn both_sides_see_the_names_that_they_see_without_the_mesh() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    for between_nodes in [Between::Tunnel, Between::Plaintext] {
        let mut mesh = Mesh::create("um-e2e-names")?;
        let without = all_names(&mesh)?;
        match between_nodes {
            Between::Tunnel => mesh.start(&[])?,
            Between::Plaintext => mesh.start_plaintext(&[])?,
        }
        let with = all_names(&mesh)?;
        for (case, without) in &without {
            let with = known_of(&with[case], case, between_nodes);
            ensure!(with == *without, "{case}, {between_nodes:?}\n   without: {without}\n      with: {with}");
        }
        let captured = mesh.agent().metrics()?.sum(OPENED, &[("reporter", "source")]);
        let made = without.len() as f64;
        ensure!(captured == made, "{captured} of {made} connections were captured, {between_nodes:?}");
    }
    Ok(())
}

#[test]
fn a_client_of_a_service_sees_the_service() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-names-service")?;
    let without = all_names(&mesh)?;
    mesh.start(&[])?;
    for (server, case, own, ip, args) in cases(&mesh) {
        let service = service_ips(server)[usize::from(ip.is_ipv6())];
        let to = at(service, SERVICE_PORT);
        let seen = names(&mesh.client(&command(&to, args, own))?)?;
        let seen = known_of(&seen, &case, Between::Tunnel);
        // As a client of the pod, but for the peer that the client sees.
        let (pod_seen, service_seen) = (mapped(ip, PORT, args), mapped(service, SERVICE_PORT, args));
        let expected = without[&case]
            .replace(&format!("sees {pod_seen}, server"), &format!("sees {service_seen}, server"));
        ensure!(seen == expected, "{case}, by its Service\n  expected: {expected}\n      seen: {seen}");
    }
    Ok(())
}

#[test]
fn a_socket_bound_to_another_network_goes_its_own_way() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-names-net1")?;
    let to = at(mesh.near.ip(), PORT);
    let dial = ["connect", &to, "--device", "net1"];
    let without = names(&mesh.client(&dial)?)?;
    mesh.start(&[])?;
    let with = names(&mesh.client(&dial)?)?;
    ensure!(with == without, "without: {without}\n   with: {with}");
    let metrics = mesh.agent().metrics()?;
    let bypassed = counted(&metrics, BYPASSED, "other_interface");
    ensure!(bypassed == 1.0, "{bypassed} connections counted as bypassed by their interface");
    let captured = metrics.sum(OPENED, &[("reporter", "source")]);
    ensure!(captured == 0.0, "{captured} connections were captured");
    Ok(())
}

#[test]
fn an_unprivileged_task_bound_to_an_interface_is_counted() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("setpriv"));
    let mesh = Mesh::running("um-e2e-names-unprivileged", &[])?;
    let told = dial_bound_without_privilege(&mesh)?;
    ensure!(told["connect"] == "ok" && told["device"] == "eth0", "it saw {told}");
    let bypassed = counted(&mesh.agent().metrics()?, BYPASSED, "other_interface");
    ensure!(bypassed == 1.0, "{bypassed} connections counted as bypassed by their interface");
    Ok(())
}

#[test]
fn an_unprivileged_task_bound_to_an_interface_is_refused_in_closed_mode() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("setpriv"));
    let mesh = Mesh::running("um-e2e-names-closed", &["--on-agent-down", "closed"])?;
    let told = dial_bound_without_privilege(&mesh)?;
    ensure!(told["connect"] == "EPERM", "it saw {told}");
    let refused = counted(&mesh.agent().metrics()?, KERNEL_REFUSED, "interface");
    ensure!(refused == 1.0, "{refused} connections counted as refused for their interface");
    Ok(())
}

/// The kernel lets no task without CAP_NET_RAW take a binding back, not even a kernel program on its behalf.
fn dial_bound_without_privilege(mesh: &Mesh) -> Result<Value> {
    let mut dial = Command::new("setpriv");
    dial.args(["--bounding-set=-net_raw", "--inh-caps=-net_raw"]).arg(binary("witness")?);
    dial.args(["connect", &at(mesh.near.ip(), PORT), "--device", "eth0"]);
    let told: Value = serde_json::from_str(&mesh.client.run(dial, LIMIT)?.success()?)?;
    Ok(told[0].clone())
}

#[test]
fn a_captured_socket_forgets_the_interface_it_was_bound_to() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-names-device")?;
    let to = at(mesh.near.ip(), PORT);
    let dial = ["connect", &to, "--device", "eth0"];
    let without = mesh.client(&dial)?;
    ensure!(without[0]["device"] == "eth0", "without the mesh: {without}");
    mesh.start(&[])?;
    let with = mesh.client(&dial)?;
    ensure!(with[0]["connect"] == "ok" && with[0].get("device").is_none(), "with the mesh: {with}");
    Ok(())
}

#[test]
fn callers_from_outside_the_mesh_are_seen_as_they_are() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-names-outside")?;
    let wild = |node: &Node| node.add_pod(PodSpec::new("wild", &format!("wild-{}", node.name())));
    let callers = [wild(&mesh.nodes[0])?, wild(&mesh.nodes[1])?];
    let dial_all = |mesh: &Mesh| -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for to in [mesh.near.ip(), mesh.near.ip6()].map(|ip| at(ip, PORT)) {
            for pod in &callers {
                seen.push(names(&witness(pod, &["connect", &to])?)?);
            }
            // The nodes themselves, as the kubelet's probes come.
            for node in &mesh.nodes {
                let mut command = Command::new(binary("witness")?);
                command.args(["connect", &to]);
                seen.push(names(&serde_json::from_str(&node.run(command, LIMIT)?.success()?)?)?);
            }
        }
        Ok(seen)
    };
    let without = dial_all(&mesh)?;
    mesh.start(&[])?;
    let with = dial_all(&mesh)?;
    ensure!(with == without, "without: {without:#?}\nwith: {with:#?}");
    let relayed = mesh.agent().metrics()?.sum(OPENED, &[("reporter", "destination")]);
    ensure!(relayed == with.len() as f64, "{relayed} of {} connections were relayed", with.len());
    Ok(())
}

#[test]
fn a_server_of_ipv4_alone_sees_the_same() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-names-v4")?;
    let everywhere = ["--at", "0.0.0.0"];
    let _servers =
        mesh.servers().into_iter().map(|pod| listen(pod, 7001, &everywhere)).collect::<Result<Vec<_>>>()?;
    let dial_all = |mesh: &Mesh| -> Result<Vec<String>> {
        let mut seen = Vec::new();
        for to in mesh.servers().map(|pod| at(pod.ip(), 7001)) {
            seen.push(names(&mesh.client(&["connect", &to])?)?);
            seen.push(names(&mesh.client(&["connect", &to, "--dual-stack"])?)?);
        }
        Ok(seen)
    };
    let without = dial_all(&mesh)?;
    mesh.start(&[])?;
    let with = dial_all(&mesh)?;
    ensure!(with == without, "without: {without:#?}\nwith: {with:#?}");
    Ok(())
}

#[test]
fn addresses_of_a_second_network_are_not_steered() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::create("um-e2e-names-second")?;
    let dial_all = |mesh: &Mesh| -> Result<Vec<String>> {
        let ips = mesh.servers().into_iter().filter_map(Pod::second_ips).flatten();
        ips.map(|ip| names(&mesh.client(&["connect", &at(ip, PORT)])?)).collect()
    };
    let without = dial_all(&mesh)?;
    mesh.start(&[])?;
    let with = dial_all(&mesh)?;
    ensure!(with == without, "without: {without:#?}\nwith: {with:#?}");
    ensure!(mesh.noted()? == 0.0, "the agents noted {} connections", mesh.noted()?);
    Ok(())
}

/// What both sides see, for every server, family and kind of socket.
fn all_names(mesh: &Mesh) -> Result<BTreeMap<String, String>> {
    let seen = cases(mesh).into_iter().map(|(_, case, own, ip, args)| {
        let to = at(ip, PORT);
        let seen = mesh.client(&command(&to, args, own))?;
        Ok((case, names(&seen)?))
    });
    seen.collect()
}

/// The server, the case's name, the client's own address and its second one, the server's address, the arguments.
type Case<'a> = (&'a Pod, String, [IpAddr; 2], IpAddr, &'static [&'static str]);

fn cases(mesh: &Mesh) -> Vec<Case<'_>> {
    let mut cases = Vec::new();
    for server in mesh.servers() {
        let seconds = mesh.client.second_ips().into_iter().flatten();
        let firsts = [(mesh.client.ip(), server.ip()), (mesh.client.ip6(), server.ip6())];
        for ((own, ip), second) in firsts.into_iter().zip(seconds) {
            for (name, v4_only, args) in SOCKETS {
                if ip.is_ipv4() || !v4_only {
                    let case = format!("{name}, to the {} pod at {ip}", server.name());
                    cases.push((server, case, [own, second], ip, args));
                }
            }
        }
    }
    cases
}

fn command(to: &str, args: &[&str], [own, second]: [IpAddr; 2]) -> Vec<String> {
    let args = args.iter().map(|arg| arg.replace("OWN", &at(own, 0)).replace("SECOND", &at(second, 0)));
    ["connect".to_owned(), to.to_owned()].into_iter().chain(args).collect()
}

/// The address as the kind of socket shows it.
fn mapped(ip: IpAddr, port: u16, args: &[&str]) -> String {
    match ip {
        IpAddr::V4(v4) if args.contains(&"--dual-stack") => at(v4.to_ipv6_mapped().into(), port),
        _ => at(ip, port),
    }
}

/// What is between the nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Between {
    Tunnel,
    Plaintext,
}

/// What was seen, with the documented exception taken back: nothing carries the client's port in plaintext, and nobody
/// vouches for an address that the pod has given itself.
fn known_of(seen: &str, case: &str, between_nodes: Between) -> String {
    let is_plaintext = between_nodes == Between::Plaintext && case.contains(" far ");
    match is_plaintext || case.contains("second network's address") {
        true => seen.replace("OTHER", "PORT"),
        false => seen.to_owned(),
    }
}
