//! What a TrafficPolicy says of a Service port, and what requests and connections meet for it.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Hold, Mesh, SHOP, SOON, Talk, dial, last_line, serve};
use crate::requests::{Asked, ask, serve_requests};

/// A client and so many servers `s0`, `s1`... behind a Service with two ports: `http` and, of something else, `tcp`.
struct Stage {
    mesh: Mesh,
    client: Pod,
    name: &'static str,
    _running: Vec<Process>,
}

impl Stage {
    /// All on one node.
    fn set(name: &'static str, servers: usize) -> Result<Self> {
        Self::set_with(name, &vec![0; servers], &[])
    }

    /// With a server for each of these, on the node of this number. All of the first node are in zone `a`, of the second in `b`.
    fn set_with(name: &'static str, nodes: &[usize], service: &[(&str, Value)]) -> Result<Self> {
        let args = ["--zone", "a", "--connect-timeout", "60"];
        let last = nodes.iter().max().copied().unwrap_or_default();
        let mut mesh = Mesh::start(&format!("um-e2e-traffic-{name}"), last + 1, &args)?;
        let client = mesh.pod(0, "client")?;
        let server = |(index, &node): (usize, &usize)| {
            let spec = PodSpec::new(SHOP, format!("s{index}").as_str()).label("app", "web");
            mesh.add(node, spec.label("topology.kubernetes.io/zone", ["a", "b"][node]))
        };
        let servers = nodes.iter().enumerate().map(server).collect::<Result<Vec<_>>>()?;
        let ports = json!([
            { "name": "http", "port": 80, "targetPort": 8080 },
            { "name": "tcp", "port": 7000, "targetPort": 7000 },
        ]);
        let bare = Manifest::service(SHOP, name, &[address()], &[], &[]);
        let bare = bare.with("spec.ports", ports).with("spec.selector", json!({ "app": "web" }));
        let service = service.iter().fold(bare, |it, (key, value)| it.with(key, value.clone()));
        mesh.lab.apply(&service)?;
        let mut running = Vec::new();
        for server in &servers {
            running.extend([serve_requests(server)?, serve(server)?]);
        }
        mesh.ready()?;
        let stage = Self { mesh, client, name, _running: running };
        eventually(SOON, "the Service is served", || {
            stage.ask("/", &["--count", "20"])?.all(200)?;
            Ok(())
        })?;
        Ok(stage)
    }

    /// Has the Service's ports treated like this.
    fn treat(&self, mut spec: Value) -> Result<()> {
        spec["targetRefs"] = json!([{ "group": "", "kind": "Service", "name": self.name }]);
        let policy = Manifest::new("undermesh.io/v1alpha1", "TrafficPolicy", Some(SHOP), self.name);
        in_force(&self.mesh, &policy.with("spec", spec))
    }

    fn ask(&self, path: &str, args: &[&str]) -> Result<Asked> {
        ask(&self.client, &format!("http://{}{path}", SocketAddr::new(address(), 80)), args)
    }

    fn counted(&self, metric: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.mesh.agents[0].metrics()?.sum(metric, labels))
    }
}

/// Applies the manifest, and waits until every agent goes by it.
pub fn in_force(mesh: &Mesh, manifest: &Manifest) -> Result<()> {
    let generations = || -> Result<Vec<f64>> {
        let agents = mesh.agents.iter();
        agents.map(|agent| Ok(agent.metrics()?.sum("undermesh_config_generation", &[]))).collect()
    };
    let before = generations()?;
    mesh.lab.apply(manifest)?;
    eventually(SOON, "the manifest is in force", || {
        let now = generations()?;
        ensure!(now.iter().zip(&before).all(|(now, before)| now > before), "{now:?} after {before:?}");
        Ok(())
    })
}

fn address() -> IpAddr {
    IpAddr::from([10, 96, 0, 60])
}

#[test]
fn requests_take_turns() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("turns", 3)?;
    stage.treat(json!({ "loadBalancing": { "algorithm": "RoundRobin" } }))?;
    eventually(SOON, "requests take turns", || {
        let served = stage.ask("/", &["--count", "300", "--connections", "6"])?.all(200)?;
        ensure!(served.len() == 3 && served.values().all(|count| *count == 100), "{served:?}");
        Ok(())
    })?;
    // However slow one is.
    let slow = ["--count", "60", "--connections", "6"];
    let served = stage.ask("/?delay_ms=100&by=s1", &slow)?.all(200)?;
    ensure!(served.values().all(|count| *count == 20), "{served:?}");
    Ok(())
}

#[test]
fn a_users_requests_go_to_one_endpoint_for_as_long_as_it_is_fit() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("users", 4)?;
    stage.treat(json!({
        "loadBalancing": { "algorithm": "ConsistentHash", "hashOn": [{ "header": "x-user" }] },
    }))?;
    let served_by = |user: u32, path: &str| -> Result<String> {
        let header = format!("x-user: {user}");
        let asked = stage.ask(path, &["--header", header.as_str(), "--count", "8", "--fresh"])?;
        ensure!(asked.by_server.len() == 1, "user {user} is with several: {asked:?}");
        asked.by_server.into_keys().next().context("nobody answers")
    };
    let place_all = || (0..24).map(|user| served_by(user, "/")).collect::<Result<Vec<String>>>();
    let mut before = Vec::new();
    eventually(SOON, "users have endpoints", || {
        before = place_all()?;
        Ok(())
    })?;
    ensure!(before.iter().collect::<BTreeSet<_>>().len() >= 3, "all are with the same: {before:?}");
    ensure!(place_all()? == before, "they move");
    // The endpoint of the first user fails: its users go elsewhere, and nobody else does.
    let bad = before[0].clone();
    stage.ask(&format!("/?status=500&by={bad}"), &["--header", "x-user: 0", "--count", "5"])?.all(500)?;
    for (before, after) in before.iter().zip(place_all()?) {
        ensure!(
            (*before != bad && *before == after) || (*before == bad && after != bad),
            "{before} -> {after}"
        );
    }
    Ok(())
}

#[test]
fn what_is_beyond_a_cap_is_refused_at_once_and_what_has_ended_makes_room() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("caps", 2)?;
    stage.treat(json!({ "limits": { "maxRequests": 3 } }))?;
    let at_once = ["--count", "8", "--connections", "8"];
    let answered = |asked: &Asked| {
        let count = |status: &str| asked.by_status.get(status).copied().unwrap_or_default();
        (count("200"), count("503"))
    };
    eventually(SOON, "the cap is kept", || {
        let asked = stage.ask("/?delay_ms=700", &at_once)?;
        ensure!(answered(&asked) == (3, 5), "{asked:?}");
        Ok(())
    })?;
    ensure!(
        stage.counted("undermesh_http_requests_total", &[("reason", "overloaded")])? >= 5.0,
        "not counted"
    );
    stage.ask("/", &["--count", "200", "--connections", "3"])?.all(200)?;

    stage.treat(json!({ "limits": { "maxConnections": 3 } }))?;
    eventually(SOON, "the cap is kept", || {
        let asked = stage.ask("/?delay_ms=700", &at_once)?;
        ensure!(answered(&asked) == (3, 5), "{asked:?}");
        let status = asked.last["headers"]["proxy-status"].as_str().unwrap_or_default();
        ensure!(asked.last["status"] == 200 || status.contains("connection_limit_reached"), "{asked:?}");
        Ok(())
    })?;
    // What is idle makes room, whichever thread and endpoint it belongs to.
    stage.ask("/", &["--count", "200", "--connections", "3", "--fresh"])?.all(200)?;

    // And of connections that carry something else, which have their own cap, being another port.
    let tcp = SocketAddr::new(address(), 7000);
    let mut talks = (0..3).map(|_| Talk::with(&stage.client, tcp)).collect::<Result<Vec<_>>>()?;
    let refused = dial(&stage.client, address(), 2)?;
    ensure!(refused.served.is_empty(), "more connections than may be are open: {refused:?}");
    let labels = [("reason", "overloaded")];
    ensure!(
        stage.counted("undermesh_tcp_connections_refused_total", &labels)? == 2.0,
        "they are not counted"
    );
    talks.pop().context("no conversation")?.end()?;
    eventually(SOON, "there is room again", || dial(&stage.client, address(), 3)?.all_served().map(drop))?;
    Ok(())
}

#[test]
fn requests_are_sent_again_and_given_up_as_the_port_says() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("again", 2)?;
    let retry = |any: bool| json!({ "retry": { "attempts": 1, "codes": [503], "backoff": "10ms", "anyMethod": any } });
    stage.treat(retry(false))?;
    let retries = |args: &[&str]| -> Result<f64> {
        let before = stage.counted("undermesh_http_retries_total", &[])?;
        stage.ask("/?status=503", args)?.answered(503)?;
        Ok(stage.counted("undermesh_http_retries_total", &[])? - before)
    };
    eventually(SOON, "requests are sent again", || {
        ensure!(retries(&[])? == 1.0, "they are not");
        Ok(())
    })?;
    stage.ask("/", &["--count", "100"])?.all(200)?;
    ensure!(retries(&["--method", "POST", "--body", "10"])? == 0.0, "what must not be sent twice is");
    stage.treat(retry(true))?;
    eventually(SOON, "all requests are sent again", || {
        ensure!(retries(&["--method", "POST", "--body", "10"])? == 1.0, "they are not");
        Ok(())
    })?;

    stage.treat(json!({ "timeouts": { "request": "300ms" } }))?;
    eventually(SOON, "requests are given up", || {
        let began = Instant::now();
        stage.ask("/?delay_ms=2000", &[])?.answered(504)?;
        ensure!(began.elapsed() < Duration::from_millis(1_500), "after {:?}", began.elapsed());
        Ok(())
    })?;
    Ok(())
}

#[test]
fn idle_connections_end_and_others_do_not() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("python3"));
    // Once on the client's node, and once through a tunnel.
    idle_connections_end(&Stage::set_with("idle", &[0], &[])?)?;
    idle_connections_end(&Stage::set_with("idle", &[1], &[])?)
}

/// Says for how many milliseconds the server keeps a connection after a first answer.
const KEPT_FOR: &str = "
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 80), 10)
connection.sendall(b'GET / HTTP/1.1\\r\\nhost: web\\r\\n\\r\\n')
began, said = time.monotonic(), b' '
while said:
    said = connection.recv(65536)
print(int((time.monotonic() - began) * 1000))
";

/// Talks by another protocol for longer than a connection may be idle, and says how many words came back and for how many milliseconds
/// the connection was kept after that.
const KEPT_WHILE_TALKING: &str = "
import socket, sys, time
connection = socket.create_connection((sys.argv[1], 80), 10)
connection.sendall(b'GET / HTTP/1.1\\r\\nhost: web\\r\\nconnection: upgrade\\r\\nupgrade: echo\\r\\n\\r\\n')
said = b''
while not said.endswith(b'\\r\\n\\r\\n'):
    said += connection.recv(1)
echoed = 0
for _ in range(12):
    time.sleep(0.25)
    connection.sendall(b'word')
    echoed += connection.recv(4) == b'word'
began = time.monotonic()
connection.recv(1)
print([echoed, int((time.monotonic() - began) * 1000)])
";

fn idle_connections_end(stage: &Stage) -> Result<()> {
    stage.treat(json!({ "timeouts": { "idle": "1s" } }))?;
    let ended = || {
        stage.counted("undermesh_tcp_connections_closed_total", &[("reason", "idle"), ("reporter", "source")])
    };
    let mut talk = Talk::with(&stage.client, SocketAddr::new(address(), 7000))?;
    eventually(SOON, "idle connections end", || {
        let held = Hold::begin(&stage.client, address(), 3)?;
        let before = ended()?;
        std::thread::sleep(Duration::from_millis(1_600));
        let after = ended()?;
        held.kill();
        ensure!(after == before + 3.0, "{} of 3 have ended", after - before);
        Ok(())
    })?;
    talk.goes_on()?;
    talk.end()?;
    // A request that waits is not idle; a client's connection without one is, and closed in order.
    stage.ask("/?delay_ms=2500", &[])?.answered(200)?;
    let mut python = Command::new("python3");
    python.args(["-c", KEPT_FOR, &address().to_string()]);
    let kept: u64 = last_line(&stage.client.run(python, Duration::from_secs(20))?.success()?)?;
    ensure!((1_000..3_000).contains(&kept), "it is closed after {kept} ms");
    // One that has become another protocol is idle when neither side says anything, and no sooner.
    let mut python = Command::new("python3");
    python.args(["-c", KEPT_WHILE_TALKING, &address().to_string()]);
    let (echoed, kept): (u64, u64) =
        last_line(&stage.client.run(python, Duration::from_secs(20))?.success()?)?;
    ensure!(echoed == 12, "{echoed} of 12 words came back");
    ensure!((1_000..3_000).contains(&kept), "it is closed after {kept} ms");
    let idle =
        stage.counted("undermesh_http_requests_total", &[("reason", "idle"), ("reporter", "source")])?;
    ensure!(idle == 1.0, "{idle} upgraded connections count as idle");
    Ok(())
}

#[test]
fn an_endpoint_that_answers_well_less_often_than_the_others_is_left_alone() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("rates", 4)?;
    stage.treat(json!({
        "loadBalancing": { "algorithm": "RoundRobin" },
        "outlierDetection": {
            "consecutiveErrors": 0,
            "consecutiveGatewayFailures": 0,
            "successRate": { "interval": "1s", "minRequests": 10, "minEndpoints": 4, "deviations": "1.5" },
        },
    }))?;
    eventually(SOON * 2, "it is left alone", || {
        for _ in 0..3 {
            stage.ask("/?status=500&by=s2", &["--count", "80"])?;
            stage.ask("/", &["--count", "40"])?.all(200)?;
        }
        let labels = [("reason", "success_rate")];
        ensure!(stage.counted("undermesh_http_ejections_total", &labels)? == 1.0, "it is not");
        Ok(())
    })?;
    let served = stage.ask("/", &["--count", "60"])?.all(200)?;
    ensure!(served.keys().eq(["s0", "s1", "s3"]), "{served:?}");
    Ok(())
}

#[test]
fn what_is_far_away_helps_out_when_too_little_of_what_is_near_is_fit() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let near = [("spec.trafficDistribution", json!("PreferSameZone"))];
    let stage = Stage::set_with("spill", &[0, 0, 1], &near)?;
    let asked = || stage.ask("/", &["--count", "60"])?.all(200);
    ensure!(asked()?.keys().eq(["s0", "s1"]), "what is far away is used without need");
    stage.treat(json!({ "loadBalancing": { "algorithm": "RoundRobin", "spillOverBelow": 70 } }))?;
    eventually(SOON, "requests take turns", || {
        let served = asked()?;
        ensure!(served.keys().eq(["s0", "s1"]) && served.values().all(|count| *count == 30), "{served:?}");
        Ok(())
    })?;
    stage.ask("/?status=500&by=s0", &["--count", "12"])?;
    let served = asked()?;
    ensure!(served.keys().eq(["s1", "s2"]) && served.values().all(|count| *count == 30), "{served:?}");
    Ok(())
}

#[test]
fn a_connection_is_given_up_after_the_ports_own_time() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set_with("connect", &[1], &[])?;
    stage.treat(json!({ "timeouts": { "connect": "400ms" } }))?;
    let refused = || {
        let labels = [("reason", "connect_timeout"), ("destination_service", stage.name)];
        stage.counted("undermesh_tcp_connections_refused_total", &labels)
    };
    dial(&stage.client, address(), 3)?.all_served()?;
    // The tunnel to the server stands, and nothing comes back through it. The agent would wait for a minute.
    stage.mesh.lab.cut(&stage.mesh.nodes[1])?;
    eventually(SOON, "a connection is given up", || {
        dial(&stage.client, address(), 1)?;
        ensure!(refused()? >= 1.0, "it is not");
        Ok(())
    })
}
