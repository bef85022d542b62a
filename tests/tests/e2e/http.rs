//! HTTP through the mesh: each request is balanced, measured and, where nobody answers it, refused on its own.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;
use undermesh_tests::lab::{AgentOptions, Manifest, Pod, PodSpec, Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON, last_line, options};
use crate::requests::{Asked, ask, serve_requests};

const REQUESTS: &str = "undermesh_http_requests_total";
const OPENED: &str = "undermesh_tcp_connections_opened_total";

/// A client, a server on its node and one on the other, and a Service of both.
struct Stage {
    mesh: Mesh,
    client: Pod,
    servers: [Pod; 2],
    running: Vec<Process>,
}

impl Stage {
    fn set(name: &str) -> Result<Self> {
        Self::set_with(name, &[])
    }

    /// The same, with agents that are told this as well.
    fn set_with(name: &str, args: &[&str]) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, args)?;
        let client = mesh.pod(0, "client")?;
        let server = |node, name| mesh.add(node, PodSpec::new(SHOP, name).label("app", "echo"));
        let servers = [server(0, "near")?, server(1, "far")?];
        mesh.lab.apply(&echo("http"))?;
        let running = servers.iter().map(serve_requests).collect::<Result<_>>()?;
        mesh.ready()?;
        let stage = Self { mesh, client, servers, running };
        eventually(SOON, "the Service is served", || {
            ask(&stage.client, &stage.url("/"), &[])?.answered(200)?;
            Ok(())
        })?;
        Ok(stage)
    }

    fn url(&self, path: &str) -> String {
        format!("http://{}{path}", SocketAddr::new(cluster_ips()[0], 80))
    }

    fn counted(&self, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(self.mesh.agents[0].metrics()?.sum(REQUESTS, labels))
    }
}

fn cluster_ips() -> [IpAddr; 2] {
    [IpAddr::from([10, 96, 0, 20]), IpAddr::from([0xfd96, 0, 0, 0, 0, 0, 0, 0x20])]
}

/// The Service of both servers; its port says what is spoken there by its name.
fn echo(port_name: &str) -> Manifest {
    let port = json!([{ "name": port_name, "port": 80, "targetPort": 8080, "protocol": "TCP" }]);
    Manifest::service(SHOP, "echo", &cluster_ips(), &[], &[])
        .with("spec.ports", port)
        .with("spec.selector", json!({ "app": "echo" }))
}

#[test]
fn requests_of_one_connection_are_balanced_and_counted_each_on_its_own() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-http")?;
    for ip in cluster_ips() {
        for version in [&[][..], &["--http2"]] {
            let before = stage.counted(&[("reporter", "source"), ("response_code", "200")])?;
            let url = format!("http://{}/some/where?with=query", SocketAddr::new(ip, 80));
            let asked = ask(&stage.client, &url, &[&["--count", "200"], version].concat())?;
            let served = asked.all(200)?;
            // The one that answers sooner gets more, and the other one in 16 at least: by chance none in 200 once in 400,000 times.
            ensure!(
                served.keys().eq(["far", "near"]),
                "200 requests on one connection to {ip} went to {served:?}"
            );
            let saw = asked.saw()?;
            let expected = if version.is_empty() { "HTTP/1.1" } else { "HTTP/2.0" };
            ensure!(saw["version"] == expected, "the server saw {saw}");
            ensure!(saw["target"].as_str().is_some_and(|it| it.ends_with("/some/where?with=query")), "{saw}");
            ensure!(
                saw["peer"] == json!(if ip.is_ipv4() { stage.client.ip() } else { stage.client.ip6() }),
                "{saw}"
            );
            let counted = stage.counted(&[("reporter", "source"), ("response_code", "200")])? - before;
            ensure!(counted == 200.0, "{counted} of 200 requests are counted");
        }
    }
    // The other node's server is reached by mutual TLS, and both ends are known.
    let far = [
        ("destination_workload", "far"),
        ("destination_service", "echo"),
        ("security", "mutual_tls"),
        ("method", "GET"),
    ];
    ensure!(stage.counted(&far)? >= 4.0, "requests to the other node are counted so");
    // Warm connections are used again: few are opened for so many requests.
    let opened = stage.mesh.agents[0].metrics()?.sum(OPENED, &[("reporter", "source")]);
    ensure!(opened < 60.0, "{opened} connections were opened for 800 requests");
    Ok(())
}

#[test]
fn messages_pass_as_they_are() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("curl"));
    let stage = Stage::set("um-e2e-http-pass")?;
    for path in ["/near", "/far"] {
        let server = if path == "/near" { &stage.servers[0] } else { &stage.servers[1] };
        let to = |query: &str| format!("http://{}:8080{path}?{query}", server.ip());
        // Bodies each way, of known length and in pieces.
        for version in [&[][..], &["--http2"]] {
            let upload = ask(
                &stage.client,
                &to("x=y"),
                &[&["--method", "POST", "--body", "3000000"], version].concat(),
            )?;
            ensure!(upload.saw()?["bytes"] == 3_000_000, "an upload: {upload:?}");
            let download = ask(&stage.client, &to("bytes=3000000"), version)?.answered(200)?;
            ensure!(download["bytes"] == 3_000_000, "a download: {}", download["bytes"]);
            let trailers = ask(
                &stage.client,
                &to("trailer=at-the-end"),
                &[&["--header", "te: trailers"], version].concat(),
            )?;
            ensure!(trailers.answered(200)?["trailers"]["x-trailer"] == "at-the-end", "trailers are lost");
            let head = ask(&stage.client, &to("bytes=1234"), &[&["--method", "HEAD"], version].concat())?
                .answered(200)?;
            ensure!(head["headers"]["content-length"] == "1234" && head["bytes"] == 0, "HEAD: {head}");
        }
        // What is for one hop stays there, and nothing else does.
        let args = [
            "--header",
            "connection: x-mine, keep-alive",
            "--header",
            "x-mine: 1",
            "--header",
            "keep-alive: 5",
            "--header",
            "x-twice: a",
            "--header",
            "x-twice: b",
            "--host",
            "echo.example:80",
        ];
        let saw = ask(&stage.client, &to("x=y"), &args)?.saw()?;
        let headers = &saw["headers"];
        ensure!(
            headers.get("x-mine").is_none()
                && headers.get("keep-alive").is_none()
                && headers.get("connection").is_none(),
            "{headers}"
        );
        ensure!(
            headers["x-twice"] == json!(["a", "b"]) && headers["host"] == json!(["echo.example:80"]),
            "{headers}"
        );

        let curl = |args: &[&str]| {
            let mut command = Command::new("curl");
            command.args(["-sS", "--max-time", "20"]).args(args);
            stage.client.run(command, Duration::from_secs(30))?.success()
        };
        // A body that waits to be asked for, one in chunks, and a client of HTTP/1.0.
        let file = stage.mesh.lab.dir().join("upload");
        std::fs::write(&file, vec![b'u'; 2_000_000])?;
        let data = format!("@{}", file.display());
        let said = curl(&[
            "-H",
            "Expect: 100-continue",
            "--expect100-timeout",
            "15",
            "--data-binary",
            &data,
            &to("x=y"),
        ])?;
        ensure!(said.contains("\"bytes\":2000000"), "100-continue: {said}");
        let said =
            curl(&["-H", "Transfer-Encoding: chunked", "-H", "Expect:", "--data-binary", &data, &to("x=y")])?;
        ensure!(said.contains("\"bytes\":2000000"), "chunked: {said}");
        let said = curl(&["--http1.0", "-i", &to("x=y")])?;
        ensure!(
            said.starts_with("HTTP/1.0 200") && said.contains("\"version\":\"HTTP/1.0\""),
            "HTTP/1.0: {said}"
        );
        // The upstream may change the protocol (RFC 9110, section 7.8).
        let said = upgrade(&stage.client, SocketAddr::new(server.ip(), 8080))?;
        ensure!(said.starts_with("HTTP/1.1 101") && said.ends_with("are you there?"), "an upgrade: {said:?}");
    }
    // Each has been answered as a whole, with trailers and without.
    let gone = stage.counted(&[("reason", "client_gone")])?;
    ensure!(gone == 0.0, "{gone} clients count as gone");
    Ok(())
}

/// Asks for another protocol and says something in it; what came back.
pub fn upgrade(client: &Pod, to: SocketAddr) -> Result<String> {
    let script = format!(
        "import socket\ns = socket.create_connection(('{}', {}), 10)\n\
         s.sendall(b'GET /chat HTTP/1.1\\r\\nHost: chat\\r\\nConnection: Upgrade\\r\\nUpgrade: echo\\r\\n\\r\\n')\n\
         said = b''\nwhile b'\\r\\n\\r\\n' not in said: said += s.recv(1000)\n\
         s.sendall(b'are you there?')\ns.shutdown(socket.SHUT_WR)\n\
         while True:\n  more = s.recv(1000)\n  if not more: break\n  said += more\n\
         print(said.decode(), end='')\n",
        to.ip(),
        to.port()
    );
    let mut command = Command::new("python3");
    command.args(["-c", &script]);
    client.run(command, Duration::from_secs(20))?.success()
}

#[test]
fn requests_that_nobody_answers_are_refused_with_the_reason() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-http-refused")?;
    let refused =
        |stage: &Stage, path: &str, args: &[&str], status: u64, error: &str, reason: &str| -> Result<()> {
            let before = stage.counted(&[("reporter", "source"), ("reason", reason)])?;
            let answer = ask(&stage.client, &stage.url(path), args)?.answered(status)?;
            let said = answer["headers"]["proxy-status"].as_str().unwrap_or_default().to_owned();
            ensure!(said.starts_with(&format!("undermesh; error={error}; details=\"")), "{path}: {said}");
            let counted = stage.counted(&[("reporter", "source"), ("reason", reason)])? - before;
            ensure!(counted == 1.0, "{counted} of 1 is counted for {reason}");
            Ok(())
        };
    refused(&stage, "/?break=1", &["--method", "POST"], 502, "connection_terminated", "upstream_reset")?;
    let grpc = ask(
        &stage.client,
        &stage.url("/pkg.Svc/Do?break=1"),
        &["--http2", "--method", "POST", "--header", "content-type: application/grpc"],
    )?;
    let headers = &grpc.answered(200)?["headers"];
    ensure!(headers["grpc-status"] == "14" && headers["content-type"] == "application/grpc", "{headers}");
    // Two Hosts would be one for us and another one for the application.
    let twice = ask(&stage.client, &stage.url("/"), &["--header", "host: other"])?.answered(400)?;
    ensure!(
        twice["headers"]["proxy-status"].as_str().is_some_and(|it| it.contains("http_request_error")),
        "{twice}"
    );

    stage.running.clear();
    refused(&stage, "/", &[], 503, "connection_refused", "connect_refused")?;
    for server in &stage.servers {
        server.set_ready(false)?;
    }
    eventually(SOON, "the Service has no endpoint", || {
        refused(&stage, "/", &[], 503, "destination_unavailable", "no_endpoints")
    })
}

#[test]
fn a_connection_that_its_server_has_closed_costs_no_request() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-http-stale")?;
    for round in 0..3 {
        let asked = ask(&stage.client, &stage.url("/"), &["--count", "20"])?;
        asked.all(200).with_context(|| format!("round {round}"))?;
        // Both servers end, with the connections that the agent keeps warm, and come back.
        stage.running.clear();
        stage.running = stage.servers.iter().map(serve_requests).collect::<Result<_>>()?;
    }
    Ok(())
}

#[test]
fn what_is_no_http_passes_as_it_is() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-http-opaque")?;
    // The server speaks first, on a port of which nothing is said: a pod's own.
    let server = crate::kit::serve(&stage.servers[1])?;
    for ip in [stage.servers[1].ip(), stage.servers[1].ip6()] {
        crate::kit::dial(&stage.client, ip, 5)?.all_served()?;
    }
    drop(server);
    // And behind a port that is said to be HTTP, a client that speaks first and speaks something else.
    stage.mesh.lab.apply(
        &echo("http").with("spec.ports", json!([{ "name": "http", "port": 80, "targetPort": 7100 }])),
    )?;
    let script = "import socket,threading\ns=socket.create_server(('::',7100),family=socket.AF_INET6,dualstack_ipv6=True)\nwhile True:\n c,_=s.accept()\n d=c.recv(100)\n c.sendall(b'you said '+d)\n c.close()\n";
    let mut running = Vec::new();
    for server in &stage.servers {
        let mut command = Command::new("python3");
        command.args(["-c", script]);
        running.push(server.spawn(command)?);
        server.wait_listening(7100)?;
    }
    let client = format!(
        "import socket\ns=socket.create_connection(('{}',80),10)\ns.sendall(b'*1\\r\\n$4\\r\\nPING\\r\\n')\nprint(s.recv(100))",
        cluster_ips()[0]
    );
    eventually(SOON, "the new port is in force", || {
        let mut command = Command::new("python3");
        command.args(["-c", &client]);
        let said = stage.client.run(command, Duration::from_secs(15))?.success()?;
        ensure!(said.contains("you said *1"), "{said}");
        Ok(())
    })
}

/// Asks without a pause until it is told to stop.
struct Asking {
    process: Process,
}

impl Asking {
    fn begin(stage: &Stage, args: &[&str]) -> Result<Self> {
        let mut command = Command::new(binary("requests")?);
        command.args([
            "ask",
            &stage.url("/"),
            "--count",
            "100000000",
            "--connections",
            "4",
            "--pause-ms",
            "5",
        ]);
        command.args(args);
        Ok(Self { process: stage.client.spawn(command)? })
    }

    fn end(mut self) -> Result<Asked> {
        self.process.signal(Signal::SIGTERM);
        self.process.wait(SOON)?;
        last_line(&self.process.output())
    }
}

#[test]
fn an_agent_that_takes_over_costs_no_request() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-http-roll")?;
    for version in [&[][..], &["--http2"]] {
        let asking = Asking::begin(&stage, version)?;
        for round in 0..4 {
            let admin_address = Some(format!("127.0.0.1:{}", 15030 + round % 2));
            let options = AgentOptions { admin_address, ..options(&["--take-over", "--drain", "10s"]) };
            let next = stage.mesh.nodes[0].spawn_agent(options)?;
            let mut previous = std::mem::replace(&mut stage.mesh.agents[0], next);
            eventually(SOON, "it has taken over", || {
                let said = previous.process().log_tail(20);
                ensure!(said.contains("another agent has taken over"), "{said}");
                Ok(())
            })?;
            std::thread::sleep(Duration::from_millis(500));
            // With its clients told to go, nothing is left to wait for.
            let began = Instant::now();
            previous.terminate(Duration::from_secs(15))?;
            ensure!(began.elapsed() < Duration::from_secs(8), "its clients stayed for {:?}", began.elapsed());
        }
        let asked = asking.end()?;
        asked.all(200)?;
    }
    Ok(())
}

#[test]
fn servers_that_are_replaced_one_by_one_cost_no_request() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-http-replaced")?;
    let asking = Asking::begin(&stage, &["--header", "x-load: 1"])?;
    for _ in 0..2 {
        for index in 0..stage.servers.len() {
            // As a rollout does it: the endpoint is taken out first, and the server ends a while later.
            stage.servers[index].set_ready(false)?;
            std::thread::sleep(Duration::from_millis(700));
            stage.running[index].kill();
            stage.running[index] = serve_requests(&stage.servers[index])?;
            stage.servers[index].set_ready(true)?;
            std::thread::sleep(Duration::from_millis(700));
        }
    }
    asking.end()?.all(200)?;
    Ok(())
}

#[test]
fn a_request_that_does_not_get_on_is_given_up_and_an_idle_connection_is_not() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-http-slow")?;
    let script = format!(
        "import socket,time\n\
         idle=socket.create_connection(('{ip}',80),10)\n\
         idle.sendall(b'GET / HTTP/1.1\\r\\nHost: echo\\r\\n\\r\\n')\n\
         print(idle.recv(12))\n\
         slow=socket.create_connection(('{ip}',80),10)\n\
         slow.sendall(b'GET / HTTP/1.1\\r\\nHost: ')\n\
         slow.settimeout(0.1)\n\
         began=time.monotonic()\n\
         while time.monotonic()-began < 60:\n  try:\n    slow.sendall(b'e')\n    if slow.recv(100)==b'': break\n  except socket.timeout: pass\n  except ConnectionError: break\n\
         print('given up after', round(time.monotonic()-began))\n\
         idle.settimeout(0.2)\n\
         try:\n  while idle.recv(10000): pass\nexcept socket.timeout: pass\n\
         idle.settimeout(10)\n\
         idle.sendall(b'GET / HTTP/1.1\\r\\nHost: echo\\r\\n\\r\\n')\n\
         print(idle.recv(12))\n",
        ip = cluster_ips()[0]
    );
    let mut command = Command::new("python3");
    command.args(["-c", &script]);
    let said = stage.client.run(command, Duration::from_secs(90))?.success()?;
    let seconds: u32 = said
        .lines()
        .find_map(|line| line.strip_prefix("given up after "))
        .and_then(|text| text.parse().ok())
        .with_context(|| said.clone())?;
    ensure!((28..=40).contains(&seconds), "{said}");
    ensure!(said.matches("b'HTTP/1.1 200'").count() == 2, "{said}");
    Ok(())
}

#[test]
fn heads_may_be_as_large_as_the_agent_is_told() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let flags = ["--http1-max-head", "262144", "--http1-max-headers", "40", "--http2-max-head", "8192"];
    let stage = Stage::set_with("um-e2e-http-limits", &flags)?;
    let url = stage.url("/");
    let large = |bytes| format!("x: {}", "y".repeat(bytes));
    // An argument has less than 128 KiB, which is also what a head may have unless the agent is told something else.
    let (large, some) = (large(100_000), large(9_000));
    let headers = |count, header| [["--header", header]].repeat(count).concat();
    for (status, args) in [
        (200, headers(2, &large)),
        (431, headers(3, &large)),
        // And its Host.
        (200, headers(39, "x: y")),
        (431, headers(40, "x: y")),
        (200, [vec!["--http2"], headers(40, "x: y")].concat()),
        (431, [vec!["--http2"], headers(1, &some)].concat()),
    ] {
        ask(&stage.client, &url, &args)?.answered(status)?;
    }
    Ok(())
}

#[test]
fn a_client_that_gives_up_takes_its_request_with_it() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-http-gone")?;
    let gone = [("reporter", "source"), ("reason", "client_gone")];
    let asked = ask(&stage.client, &stage.url("/?delay_ms=20000"), &["--limit-ms", "300"])?;
    ensure!(asked.failed.contains_key("no answer in time"), "{asked:?}");
    stage.mesh.agents[0]
        .wait_metrics(Duration::from_secs(5), "it is given up", |m| m.sum(REQUESTS, &gone) == 1.0)?;
    Ok(())
}
