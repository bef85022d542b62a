//! Services: which endpoint a connection to a cluster IP gets, and how soon a change of the manifests shows.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use undermesh_tests::lab::manifest::EndpointSpec;
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Dialled, Mesh, PORT, SHOP, SOON, dial, dial_at_once, serve, undermesh};
use crate::mesh::OPENED;

/// A change of the manifests is in force after this long.
const IN_FORCE: Duration = Duration::from_secs(1);
const REFUSED: &str = "undermesh_tcp_connections_refused_total";

/// The Service `web` with two endpoints on the client's node and one on the other.
struct Web {
    mesh: Mesh,
    client: Pod,
    /// `one` and `two` are on the first node, `three` on the second; `two` is in zone `b`, the others in `a`.
    servers: [Pod; 3],
    _running: Vec<Process>,
}

impl Web {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &["--zone", "a"])?;
        let client = mesh.pod(0, "client")?;
        let add = |node, name, zone| {
            let spec = PodSpec::new(SHOP, name).label("app", "web");
            mesh.add(node, spec.label("topology.kubernetes.io/zone", zone))
        };
        let servers = [add(0, "one", "a")?, add(0, "two", "b")?, add(1, "three", "a")?];
        mesh.lab.apply(&service())?;
        let running = servers.iter().map(serve).collect::<Result<_>>()?;
        mesh.ready()?;
        eventually(SOON, "the Service is known", || {
            let config = mesh.agents[0].get("/debug/config")?.ok()?;
            ensure!(cluster_ips().iter().all(|ip| config.contains(&format!("\"{ip}\""))), "{config}");
            Ok(())
        })?;
        let web = Self { mesh, client, servers, _running: running };
        web.is_served_by(&["one", "two", "three"]).context("before anything changed")?;
        Ok(web)
    }

    /// Waits, no longer than a change may take to be in force, until connections of both families go to exactly these.
    fn is_served_by(&self, expected: &[&str]) -> Result<()> {
        let what = format!("the Service is served by {expected:?}");
        eventually(IN_FORCE, &what, || {
            for ip in cluster_ips() {
                let served = self.served(ip)?;
                let names: Vec<&str> =
                    expected.iter().copied().filter(|name| served.contains_key(*name)).collect();
                let all = names.len() == expected.len() && served.len() == expected.len();
                ensure!(all, "{ip} is served by {served:?}");
            }
            Ok(())
        })
    }

    /// Who serves two dozen connections that are open at one time.
    fn served(&self, ip: IpAddr) -> Result<BTreeMap<String, usize>> {
        dial_at_once(&self.client, SocketAddr::new(ip, PORT), 24, 24)?.all_served()
    }

    /// Waits until connections are refused, for this reason.
    fn is_refused(&self, reason: &str) -> Result<()> {
        let refused = || -> Result<f64> {
            let labels = [("reason", reason), ("destination_service", "web")];
            Ok(self.mesh.agents[0].metrics()?.sum(REFUSED, &labels))
        };
        eventually(IN_FORCE, &format!("connections are refused ({reason})"), || {
            for ip in cluster_ips() {
                let before = refused()?;
                dial(&self.client, ip, 2)?.all_failed("ECONNRESET")?;
                let counted = refused()? - before;
                ensure!(counted == 2.0, "{counted} of 2 are counted for {reason}");
            }
            Ok(())
        })
    }
}

fn cluster_ips() -> [IpAddr; 2] {
    [IpAddr::from([10, 96, 0, 10]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 0x10])]
}

fn service() -> Manifest {
    Manifest::service(SHOP, "web", &cluster_ips(), &[(PORT, PORT)], &[("app", "web")])
}

#[test]
fn connections_spread_over_the_ready_endpoints() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let web = Web::set("um-e2e-spread")?;
    for ip in cluster_ips() {
        let served = web.served(ip)?;
        ensure!(
            served.values().all(|count| *count >= 4),
            "24 connections to {ip} are spread unevenly: {served:?}"
        );
    }
    let [one, two, three] = &web.servers;
    one.set_ready(false)?;
    web.is_served_by(&["two", "three"])?;
    three.set_ready(false)?;
    web.is_served_by(&["two"])?;
    // The address of a pod is that pod's, ready or not, whatever becomes of its Service.
    for ip in [three.ip(), three.ip6()] {
        let served = dial(&web.client, ip, 3)?.all_served()?;
        ensure!(served.keys().eq(["three"]), "the address of `three` is served by {served:?}");
    }
    two.set_ready(false)?;
    web.is_refused("no_endpoints")?;
    one.set_ready(true)?;
    web.is_served_by(&["one"])?;
    // A port that the Service does not have.
    let other_port = SocketAddr::new(cluster_ips()[0], PORT + 1);
    dial_at_once(&web.client, other_port, 1, 1)?.all_failed("ECONNRESET")?;
    let unknown = web.mesh.agents[0].metrics()?.sum(REFUSED, &[("reason", "unknown_port")]);
    ensure!(unknown == 1.0, "{unknown} connections to an unknown port are counted");
    web.mesh.lab.apply(&service().with("spec.publishNotReadyAddresses", json!(true)))?;
    web.is_served_by(&["one", "two", "three"])
}

#[test]
fn endpoint_slices_win_over_the_selector() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let web = Web::set("um-e2e-slices")?;
    let [one, two, three] = &web.servers;
    let slices = |endpoints: &[(&Pod, State)]| -> Result<()> {
        for (name, v6) in [("web-4", false), ("web-6", true)] {
            let specs: Vec<_> = endpoints.iter().map(|(pod, state)| state.spec(pod, v6)).collect();
            // Slices and Services know a port by its name.
            let ports = json!([{ "name": format!("tcp-{PORT}"), "port": PORT, "protocol": "TCP" }]);
            let slice = Manifest::endpoint_slice(SHOP, "web", name, &specs).with("ports", ports);
            web.mesh.lab.apply(&slice)?;
        }
        Ok(())
    };
    slices(&[(three, State::Ready)])?;
    web.is_served_by(&["three"])?;
    slices(&[(one, State::ServingTerminating), (two, State::Ready), (three, State::Terminating)])?;
    web.is_served_by(&["two"])?;
    slices(&[(one, State::ServingTerminating), (two, State::NotReady), (three, State::Terminating)])?;
    web.is_served_by(&["one"])?;
    slices(&[(two, State::NotReady), (three, State::Terminating)])?;
    web.is_refused("no_endpoints")?;
    for name in ["web-4", "web-6"] {
        web.mesh.lab.delete(&Manifest::endpoint_slice(SHOP, "web", name, &[]))?;
    }
    web.is_served_by(&["one", "two", "three"])
}

#[derive(Clone, Copy)]
enum State {
    Ready,
    NotReady,
    /// On its way out, and still answering.
    ServingTerminating,
    /// On its way out.
    Terminating,
}

impl State {
    fn spec(self, pod: &Pod, v6: bool) -> EndpointSpec {
        let address = SocketAddr::new(if v6 { pod.ip6() } else { pod.ip() }, PORT);
        let (ready, serving, terminating) = match self {
            Self::Ready => (true, true, false),
            Self::NotReady => (false, false, false),
            Self::ServingTerminating => (false, true, true),
            Self::Terminating => (false, false, true),
        };
        let node = Some(pod.node().name().to_owned());
        EndpointSpec { ready, serving, terminating, node, ..EndpointSpec::ready(address) }
    }
}

#[test]
fn a_service_may_prefer_or_demand_what_is_near() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let web = Web::set("um-e2e-near")?;
    let apply = |field: &str, value: &str| web.mesh.lab.apply(&service().with(field, json!(value)));
    apply("spec.trafficDistribution", "PreferSameNode")?;
    web.is_served_by(&["one", "two"])?;
    apply("spec.trafficDistribution", "PreferSameZone")?;
    web.is_served_by(&["one", "three"])?;
    apply("spec.internalTrafficPolicy", "Local")?;
    web.is_served_by(&["one", "two"])?;
    // A preference gives way where nothing near is ready, a demand does not.
    let [one, two, _] = &web.servers;
    one.set_ready(false)?;
    two.set_ready(false)?;
    web.is_refused("no_endpoints")?;
    apply("spec.trafficDistribution", "PreferSameNode")?;
    web.is_served_by(&["three"])
}

#[test]
fn session_affinity_keeps_a_client_at_its_endpoint() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let web = Web::set("um-e2e-affinity")?;
    web.mesh.lab.apply(&service().with("spec.sessionAffinity", json!("ClientIP")))?;
    let mut chosen = String::new();
    let [v4, v6] = cluster_ips();
    eventually(IN_FORCE, "one endpoint serves the client", || {
        let served = web.served(v4)?;
        ensure!(served.len() == 1, "the client is served by {served:?}");
        chosen = served.into_keys().next().unwrap_or_default();
        Ok(())
    })?;
    for ip in [v4, v6] {
        let served = web.served(ip)?;
        ensure!(served.len() == 1, "{ip}: the client is served by {served:?}");
    }
    // It moves on only when its endpoint is not to be used any more, and then stays again.
    let pod = web.servers.iter().find(|pod| pod.name() == chosen).context("an unknown server")?;
    pod.set_ready(false)?;
    eventually(IN_FORCE, "another endpoint serves the client", || {
        let served = web.served(v4)?;
        ensure!(served.len() == 1 && !served.contains_key(&chosen), "the client is served by {served:?}");
        Ok(())
    })
}

#[test]
fn a_dead_endpoint_is_skipped() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut web = Web::set("um-e2e-dead")?;
    // Their manifests still say that they are ready.
    web._running.remove(0).kill();
    web.is_served_by(&["two", "three"])?;
    for ip in cluster_ips() {
        dial(&web.client, ip, 30)?.all_served()?;
    }
    // Across nodes the server's own agent accepts first: a dead server there resets the connection.
    web._running.remove(0).kill();
    web.is_served_by(&["three"])?;
    web.servers[2].set_ready(false)?;
    web.is_refused("connect_refused")
}

/// A pod that is on its way out may still be enrolled when the network has given its address to another one.
#[test]
fn an_address_that_changed_hands_is_not_taken_for_its_former_pods() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut mesh = Mesh::start("um-e2e-heir", 1, &[])?;
    let (client, gone) = (mesh.pod(0, "client")?, mesh.pod(0, "gone")?);
    // Of one Service: that connections are captured it takes one endpoint in the mesh.
    let keeper = mesh.add(0, PodSpec::new(SHOP, "keeper").label("app", "web"))?;
    let heir = PodSpec::new(SHOP, "heir").label("app", "web").label("undermesh.io/mesh", "disabled");
    let heir = mesh.nodes[0].add_pod(heir)?;
    mesh.lab.apply(&service())?;
    let _servers = [&gone, &keeper, &heir].map(serve).into_iter().collect::<Result<Vec<_>>>()?;
    mesh.ready()?;
    let opened = |workload: &str, security: &str| -> Result<f64> {
        let labels = [("destination_workload", workload), ("security", security), ("reporter", "source")];
        Ok(mesh.agents[0].metrics()?.sum(OPENED, &labels))
    };
    dial(&client, gone.ip(), 1)?.all_served()?;
    ensure!(opened("gone", "same_node")? == 1.0, "the pod is not enrolled");

    let addresses = [gone.ip(), gone.ip6()];
    for (pod, lines) in [
        (&gone, format!("addr del {}/24 dev eth0\naddr del {}/64 dev eth0\n", addresses[0], addresses[1])),
        (
            &heir,
            format!("addr add {}/24 dev eth0\naddr add {}/64 dev eth0 nodad\n", addresses[0], addresses[1]),
        ),
        (&client, "neigh flush dev eth0\n".to_owned()),
    ] {
        let batch = mesh.lab.dir().join("addresses");
        fs::write(&batch, lines)?;
        let mut ip = Command::new("ip");
        ip.arg("-batch").arg(&batch);
        pod.run(ip, SOON)?.success()?;
    }
    gone.update(|manifest| manifest.set("metadata.deletionTimestamp", json!("2026-01-02T00:00:00Z")))?;
    heir.update(|manifest| {
        manifest.set("metadata.creationTimestamp", json!("2026-01-02T00:00:00Z"));
        manifest.set("status.podIP", json!(addresses[0]));
        manifest.set("status.podIPs", json!(addresses.map(|ip| json!({ "ip": ip }))));
    })?;
    eventually(SOON, "the Service knows the address", || {
        let config = mesh.agents[0].get("/debug/config")?.ok()?;
        let knows = |ip: &IpAddr| config.contains(&format!("\"{}\"", SocketAddr::new(*ip, PORT)));
        ensure!(addresses.iter().all(knows), "{config}");
        Ok(())
    })?;
    let mut expected = 0.0;
    for ip in cluster_ips() {
        let served = dial_at_once(&client, SocketAddr::new(ip, PORT), 24, 24)?.all_served()?;
        ensure!(served.keys().eq(["heir", "keeper"]), "{ip} is served by {served:?}");
        expected += served["heir"] as f64;
    }
    ensure!(mesh.agents[0].metrics()?.sum("undermesh_pods_enrolled", &[]) == 3.0, "the pod has left already");
    let told = (opened("heir", "plaintext")?, opened("heir", "same_node")?);
    ensure!(told == (expected, 0.0), "{told:?} connections in plaintext and vouched for, not {expected}");
    Ok(())
}

#[test]
fn a_broken_document_leaves_the_last_good_state_in_force() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let web = Web::set("um-e2e-broken")?;
    let (lab, node) = (&web.mesh.lab, &web.mesh.nodes[0]);
    let dir = lab.config_dir().display().to_string();
    let rejected = |count: f64| {
        let what = format!("{count} documents are rejected");
        let probe =
            |m: &undermesh_tests::lab::Metrics| m.sum("undermesh_config_rejected_documents", &[]) == count;
        web.mesh.agents[0].wait_metrics(SOON, &what, probe).map(drop)
    };
    let check = |code: i32| -> Result<String> {
        let output = undermesh(node, &["check", &dir])?;
        ensure!(output.status.code() == Some(code), "check ended with {:?}", output.status);
        Ok(output.stdout)
    };
    check(0)?;
    let good = service();
    let file = good.file_name();
    for (broken, line) in [
        (good.clone().with("spec.ports", json!([{ "port": "many" }])).to_yaml()?, None),
        ("apiVersion: v1\nkind: Service\nmetadata:\n  name: web\n namespace: shop\n".to_owned(), Some(5)),
    ] {
        lab.apply_text(&file, &broken)?;
        let place = line.map_or(format!("{file}:"), |line| format!("{file}:{line}:"));
        eventually(SOON, "the log names the place", || {
            let log = web.mesh.agents[0].process().output();
            ensure!(log.contains(&place), "it does not name {place}\n{log}");
            Ok(())
        })?;
        for (teller, told) in [("check", check(1)?), ("status", undermesh(node, &["status"])?.success()?)] {
            ensure!(told.contains(&place), "{teller} does not name {place}\n{told}");
        }
        rejected(1.0)?;
        web.is_served_by(&["one", "two", "three"]).with_context(|| broken.clone())?;
    }
    // Other documents are taken meanwhile.
    web.servers[0].set_ready(false)?;
    web.is_served_by(&["two", "three"])?;
    lab.apply(&good)?;
    rejected(0.0)?;
    check(0)?;
    web.is_served_by(&["two", "three"])?;
    lab.delete(&good)?;
    let [v4, _] = cluster_ips();
    let gone = |dialled: Dialled| dialled.all_failed("EHOSTUNREACH");
    eventually(IN_FORCE, "the Service is gone", || gone(dial(&web.client, v4, 1)?))
}
