//! Addresses, bridges and routes of the lab.
//!
//! `iproute2` in batches does it, because it is on every Debian and its lines can be pasted into a shell. All
//! links live inside the lab's namespaces, so they vanish with them and the machine's own network never changes.
//!
//! | what | IPv4 | IPv6 |
//! |---|---|---|
//! | nodes on the fabric | 10.76.0.N/16 | fd76::N/64 |
//! | pods of node N | 10.77.N.0/24 | fd77:N::/64 |
//! | their second network | 10.78.N.0/24 | fd78:N::/64 |
//! | cluster IPs, which lead nowhere | 10.96.0.0/16 | fd96::/108 |

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::state::State;
use super::{netns, run_here, signals};

/// A pod's addresses: its IPv4 and its IPv6 one.
pub(super) fn pod_addresses(node: u8, host: u8) -> [IpAddr; 2] {
    on_network(77, node, host)
}

/// A pod's addresses on its second network.
pub(super) fn second_addresses(node: u8, host: u8) -> [IpAddr; 2] {
    on_network(78, node, host)
}

/// The node's own addresses on the fabric.
pub(super) fn node_addresses(node: u8) -> [IpAddr; 2] {
    on_network(76, 0, node)
}

/// The namespace whose bridge joins the nodes.
pub(super) fn create_fabric(state: &State) -> Result<()> {
    let fabric = fabric(&state.name);
    new_namespace(state, &fabric, &[])?;
    ip(Some(&fabric), "link add br0 type bridge\nlink set br0 up")
}

/// A node's namespace: uplink to the fabric, a bridge for pods, routes to the other nodes' pods.
pub(super) fn create_node(state: &State, node: &str, number: u8) -> Result<()> {
    let (fabric, netns) = (fabric(&state.name), format!("{}-{node}", state.name));
    new_namespace(state, &netns, &["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"])?;
    ip(
        Some(&fabric),
        &format!(
            "link add {node} type veth peer name eth0 netns {netns}
             link set {node} master br0 up"
        ),
    )?;
    let [v4, v6] = node_addresses(number);
    let [gateway4, gateway6] = pod_addresses(number, 1);
    // A bridge without an address of its own takes the lowest of its ports': each new pod might change it, and the
    // others would send to the old one until their neighbour tables time out.
    ip(
        Some(&netns),
        &format!(
            "addr add {v4}/16 dev eth0
             addr add {v6}/64 dev eth0 nodad
             link set eth0 up
             link add pods address 02:4d:00:00:00:{number:02x} type bridge
             addr add {gateway4}/24 dev pods
             addr add {gateway6}/64 dev pods nodad
             link set pods up
             route add unreachable 10.96.0.0/16
             route add unreachable fd96::/108"
        ),
    )?;
    for other in 1..number {
        join(&state.name, number, other)?;
        join(&state.name, other, number)?;
    }
    Ok(())
}

/// A pod's namespace, on its node's bridge.
pub(super) fn create_pod(state: &State, node: &Attach<'_>, pod: &str) -> Result<()> {
    new_namespace(state, &format!("{}-{pod}", state.name), &[])?;
    attach(&state.name, node, pod, "eth0", "pods", node.link)?;
    let [gateway4, gateway6] = pod_addresses(node.number, 1);
    ip(
        Some(&format!("{}-{pod}", state.name)),
        &format!("route add default via {gateway4}\nroute add default via {gateway6}"),
    )
}

/// The node's second bridge.
pub(super) fn create_second_network(lab: &str, node: &str, number: u8) -> Result<()> {
    let [v4, v6] = second_addresses(number, 1);
    ip(
        Some(&format!("{lab}-{node}")),
        &format!(
            "link add pods2 address 02:4d:00:00:01:{number:02x} type bridge
             addr add {v4}/24 dev pods2
             addr add {v6}/64 dev pods2 nodad
             link set pods2 up"
        ),
    )
}

/// Gives the pod an interface `net1` on its node's second bridge.
pub(super) fn attach_second(lab: &str, node: &Attach<'_>, pod: &str) -> Result<()> {
    attach(lab, node, pod, "net1", "pods2", &format!("{}b", node.link))
}

/// Removes the pod's ends from its node's bridges, and so from the pod, whoever still holds its namespace.
pub(super) fn detach(lab: &str, node: &Attach<'_>, second: bool) -> Result<()> {
    let netns = format!("{lab}-{}", node.name);
    ip(Some(&netns), &format!("link del {}", node.link))?;
    if second {
        ip(Some(&netns), &format!("link del {}b", node.link))?;
    }
    Ok(())
}

/// Takes the fabric's end of the node's uplink up or down. The node's own end only loses its carrier, so its
/// addresses and routes stay.
pub(super) fn set_uplink(lab: &str, node: &str, up: bool) -> Result<()> {
    ip(Some(&fabric(lab)), &format!("link set {node} {}", if up { "up" } else { "down" }))
}

/// Where on its node a pod is plugged in.
pub(super) struct Attach<'a> {
    /// The node's name.
    pub(super) name: &'a str,
    /// The node's number.
    pub(super) number: u8,
    /// The pod's number on the node's networks.
    pub(super) host: u8,
    /// The name of the link's end on the node.
    pub(super) link: &'a str,
}

/// Puts the namespace `inner` behind a pod's, as a container engine inside of a pod does: it has no way out but by the pod, which lets it
/// speak in its name.
pub fn put_behind(pod: &Path, inner: &Path) -> Result<()> {
    netns::enter(inner, || {
        ip(
            None,
            &format!(
                "link set eth0 down
                 link add out type veth peer name within netns {}
                 addr add 10.99.0.2/24 dev out
                 addr add fd99::2/64 dev out nodad
                 link set out up",
                pod.display()
            ),
        )
    })?;
    netns::enter(pod, || {
        ip(
            None,
            "addr add 10.99.0.1/24 dev within
             addr add fd99::1/64 dev within nodad
             link set within up",
        )?;
        for program in ["iptables", "ip6tables"] {
            let mut masquerade = Command::new(program);
            masquerade.args(["-t", "nat", "-A", "POSTROUTING", "-o", "eth0", "-j", "MASQUERADE"]);
            run_here(masquerade, Duration::from_secs(30))?.success()?;
        }
        fs::write("/proc/sys/net/ipv4/ip_forward", "1")?;
        Ok(fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1")?)
    })?;
    netns::enter(inner, || ip(None, "route add default via 10.99.0.1\nroute add default via fd99::1"))
}

/// Runs lines of `ip`, in a namespace if one is named.
pub(crate) fn ip(netns: Option<&str>, lines: &str) -> Result<()> {
    let _gate = signals::gate();
    let mut command = Command::new("ip");
    if let Some(netns) = netns {
        command.args(["-n", netns]);
    }
    let mut child = command
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("`ip` cannot be run: install iproute2")?;
    let written = child.stdin.take().context("no pipe to `ip`")?.write_all(lines.as_bytes());
    let output = child.wait_with_output()?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("ip {}: {}\n{lines}", netns.unwrap_or_default(), complaint.trim());
    }
    Ok(written?)
}

fn on_network(network: u8, node: u8, host: u8) -> [IpAddr; 2] {
    // Decimal digits read as hexadecimal ones, so that both families look alike: 10.77.12.5 and fd77:12::5.
    let digits =
        |n: u8| u16::from_str_radix(&n.to_string(), 16).expect("decimal digits are hexadecimal digits");
    [
        Ipv4Addr::new(10, network, node, host).into(),
        Ipv6Addr::new(0xfd00 + digits(network), digits(node), 0, 0, 0, 0, 0, digits(host)).into(),
    ]
}

fn fabric(lab: &str) -> String {
    format!("{lab}-fabric")
}

pub(crate) fn new_namespace(state: &State, name: &str, switched_on: &[&str]) -> Result<()> {
    state.record("netns", netns::path(name))?;
    netns::create(name)?;
    netns::enter(&netns::path(name), || {
        // No duplicate address detection: an address works the moment it is given.
        for key in ["all", "default"] {
            sysctl(&format!("net/ipv6/conf/{key}/accept_dad"), "0")?;
        }
        switched_on.iter().try_for_each(|key| sysctl(key, "1"))
    })?;
    ip(Some(name), "link set lo up")
}

pub(crate) fn sysctl(key: &str, value: &str) -> Result<()> {
    std::fs::write(format!("/proc/sys/{key}"), value).with_context(|| format!("sysctl {key} cannot be set"))
}

/// Tells one node the way to another's pods.
fn join(lab: &str, node: u8, other: u8) -> Result<()> {
    let [via4, via6] = node_addresses(other);
    let ([pods4, pods6], [second4, second6]) = (pod_addresses(other, 0), second_addresses(other, 0));
    ip(
        Some(&format!("{lab}-node{node}")),
        &format!(
            "route add {pods4}/24 via {via4}
             route add {pods6}/64 via {via6}
             route add {second4}/24 via {via4}
             route add {second6}/64 via {via6}"
        ),
    )
}

fn attach(lab: &str, node: &Attach<'_>, pod: &str, device: &str, bridge: &str, link: &str) -> Result<()> {
    let addresses = if device == "eth0" { pod_addresses } else { second_addresses };
    let [v4, v6] = addresses(node.number, node.host);
    // Neighbours remember hardware addresses: a pod whose namespace is made anew is to be reached at once.
    let network = if device == "eth0" { 2 } else { 3 };
    let hardware = format!("02:4d:00:{network:02x}:{:02x}:{:02x}", node.number, node.host);
    ip(
        Some(&format!("{lab}-{}", node.name)),
        &format!(
            "link add {link} type veth peer name {device} address {hardware} netns {lab}-{pod}
             link set {link} master {bridge} up"
        ),
    )?;
    ip(
        Some(&format!("{lab}-{pod}")),
        &format!(
            "addr add {v4}/24 dev {device}
             addr add {v6}/64 dev {device} nodad
             link set {device} up"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_families_carry_the_same_digits() {
        let [v4, v6] = pod_addresses(12, 254);
        assert_eq!((v4.to_string(), v6.to_string()), ("10.77.12.254".into(), "fd77:12::254".into()));
        let [v4, v6] = second_addresses(1, 5);
        assert_eq!((v4.to_string(), v6.to_string()), ("10.78.1.5".into(), "fd78:1::5".into()));
    }
}
