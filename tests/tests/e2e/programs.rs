//! Programs that people run, as Debian ships them, through the mesh: on one node and across two.

use std::fs;
use std::net::IpAddr;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use undermesh_tests::lab::{Pod, Process, binary, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SOON};

const LIMIT: Duration = Duration::from_secs(60);
const OPENED: &str = "undermesh_tcp_connections_opened_total";
const REQUESTS: &str = "undermesh_http_requests_total";
const POSTGRES: &str = "/usr/lib/postgresql/15/bin";

/// A client and a pod on each node for the server.
struct Stage {
    mesh: Mesh,
    client: Pod,
    places: [Pod; 2],
}

impl Stage {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &[])?;
        let (client, near, far) = (mesh.pod(0, "client")?, mesh.pod(0, "near")?, mesh.pod(1, "far")?);
        mesh.ready()?;
        Ok(Self { mesh, client, places: [near, far] })
    }

    /// Each address of each place.
    fn addresses(&self) -> impl Iterator<Item = IpAddr> {
        self.places.iter().flat_map(|pod| [pod.ip(), pod.ip6()])
    }

    fn run(&self, command: Command) -> Result<String> {
        self.client.run(command, LIMIT)?.success()
    }

    /// How many connections of the client went through the mesh, once `expected` have.
    fn saw(&self, expected: f64) -> Result<()> {
        let labels = [("reporter", "source"), ("source_workload", "client")];
        let what = format!("{expected} connections are seen");
        self.mesh.agents[0].wait_metrics(SOON, &what, |m| m.sum(OPENED, &labels) == expected).map(drop)
    }

    /// How many requests of the client were answered, once `expected` have.
    fn asked(&self, expected: f64) -> Result<()> {
        let labels = [("reporter", "source"), ("source_workload", "client"), ("response_code", "200")];
        let what = format!("{expected} requests are seen");
        self.mesh.agents[0].wait_metrics(SOON, &what, |m| m.sum(REQUESTS, &labels) == expected).map(drop)
    }

    /// A folder of its own for the server in that place.
    fn folder(&self, pod: &Pod) -> Result<std::path::PathBuf> {
        let folder = self.mesh.lab.dir().join(format!("data-{}", pod.name()));
        fs::create_dir_all(&folder)?;
        Ok(folder)
    }
}

fn command(program: &str, args: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(args);
    command
}

fn url_host(ip: IpAddr) -> String {
    if ip.is_ipv6() { format!("[{ip}]") } else { ip.to_string() }
}

#[test]
fn h2load_calls_grpc() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("h2load"));
    let stage = Stage::set("um-e2e-h2load")?;
    let message = stage.mesh.lab.dir().join("message");
    fs::write(&message, [&[0, 0, 0, 0, 20][..], &[b'x'; 20]].concat())?;
    let mut running = Vec::new();
    for pod in &stage.places {
        let mut server = Command::new(binary("probe")?);
        server.args(["grpc", "--port", "8080"]);
        running.push(pod.spawn(server)?);
        pod.wait_listening(8080)?;
    }
    for ip in stage.addresses() {
        let mut h2load = command("h2load", &["-n", "3000", "-c", "6", "-m", "20", "-t", "2"]);
        h2load.arg("-d").arg(&message);
        h2load.args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
        // Of an IPv6 address it makes an authority without brackets, which is none.
        h2load.args(["-H", ":authority: echo"]);
        h2load.arg(format!("http://{}:8080/test.Echo/Say", url_host(ip)));
        let said = stage.run(h2load)?;
        ensure!(said.contains("3000 succeeded, 0 failed, 0 errored"), "{ip}: {said}");
    }
    stage.asked(12_000.0)?;
    let labels = [("reporter", "source"), ("grpc_status", "0"), ("method", "POST")];
    let counted = stage.mesh.agents[0].metrics()?.sum(REQUESTS, &labels);
    ensure!(counted == 12_000.0, "of 12,000 calls {counted} are counted as gRPC that went well");
    Ok(())
}

#[test]
fn nginx_and_curl() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("nginx"), Feature::Program("curl"));
    let stage = Stage::set("um-e2e-nginx")?;
    let mut running = Vec::new();
    let mut sum = String::new();
    for pod in &stage.places {
        let folder = stage.folder(pod)?;
        let path = folder.display();
        let file = folder.join("ten-mib");
        run_here(
            command("sh", &["-c", &format!("seq 1 1500000 | head -c 10485760 > {}", file.display())]),
            SOON,
        )?
        .success()?;
        sum = checksum(&file)?;
        fs::write(folder.join("small"), "hello from nginx\n")?;
        let config = format!(
            "user root; daemon off; worker_processes 1; pid {path}/pid; error_log {path}/error.log;
             events {{}}
             http {{
               access_log off; keepalive_requests 100000;
               client_body_temp_path {path}/a; proxy_temp_path {path}/b; fastcgi_temp_path {path}/c;
               uwsgi_temp_path {path}/d; scgi_temp_path {path}/e;
               server {{ listen [::]:8080 ipv6only=off; root {path}; }}
             }}"
        );
        fs::write(folder.join("nginx.conf"), config)?;
        let nginx =
            command("nginx", &["-e", "stderr", "-c", &folder.join("nginx.conf").display().to_string()]);
        running.push(pod.spawn(nginx)?);
        pod.wait_listening(8080)?;
    }
    for ip in stage.addresses() {
        let base = format!("http://{}:8080", url_host(ip));
        // One connection for all three.
        let small = format!("{base}/small");
        let said = stage.run(command("curl", &["-sS", "--fail", &small, &small, &small]))?;
        ensure!(said == "hello from nginx\n".repeat(3), "{ip} said {said:?}");
        let got = stage.mesh.lab.dir().join("got");
        let args = ["-sS", "--fail", "-o", &got.display().to_string(), &format!("{base}/ten-mib")];
        stage.run(command("curl", &args))?;
        let found = checksum(&got)?;
        ensure!(found == sum, "10 MiB from {ip} came with the checksum {found}, not {sum}");
    }
    // Nothing is said of the port, so that this is HTTP shows in its first bytes. Four requests to each address.
    stage.asked(16.0)
}

fn checksum(file: &Path) -> Result<String> {
    let said = run_here(command("sha256sum", &[&file.display().to_string()]), SOON)?.success()?;
    said.split(' ').next().map(str::to_owned).context("no checksum")
}

#[test]
fn redis() -> Result<()> {
    let programs = ["redis-server", "redis-cli", "redis-benchmark"].map(Feature::Program);
    require!(Feature::Lab, Feature::Agent, programs[0], programs[1], programs[2]);
    let stage = Stage::set("um-e2e-redis")?;
    let mut running = Vec::new();
    for pod in &stage.places {
        let folder = stage.folder(pod)?.display().to_string();
        let args = ["--save", "", "--protected-mode", "no", "--bind", "*", "-::*", "--dir", &folder];
        running.push(pod.spawn(command("redis-server", &args))?);
        pod.wait_listening(6379)?;
    }
    for ip in stage.addresses() {
        let host = ip.to_string();
        let cli = |args: &[&str]| stage.run(command("redis-cli", &[&["-h", &host][..], args].concat()));
        ensure!(cli(&["set", "fruit", "apple"])?.trim() == "OK", "{ip} does not take a value");
        ensure!(cli(&["get", "fruit"])?.trim() == "apple", "{ip} does not give the value back");
        let args =
            ["-h", &host, "-q", "-c", "20", "-n", "4000", "-P", "8", "-t", "ping_mbulk,set,get,lrange_100"];
        let report = stage.run(command("redis-benchmark", &args))?;
        ensure!(report.contains("GET:") && !report.contains("Error"), "{ip}: {report}");
    }
    Ok(())
}

#[test]
fn postgresql() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("psql"), Feature::Program("setpriv"));
    ensure!(Path::new(POSTGRES).exists(), "PostgreSQL has psql, but no server in {POSTGRES}");
    let stage = Stage::set("um-e2e-postgres")?;
    let mut running = Vec::new();
    for pod in &stage.places {
        let folder = stage.folder(pod)?;
        let own = command("chown", &["postgres", &folder.display().to_string()]);
        run_here(own, SOON)?.success()?;
        let data = folder.join("data").display().to_string();
        let initdb = format!("{POSTGRES}/initdb");
        let args = [&initdb, "--no-sync", "-A", "trust", "-D", &data];
        run_here(as_postgres(&args), LIMIT)?.success()?;
        fs::write(folder.join("data/pg_hba.conf"), "host all all all trust\n")?;
        running.push(start_postgres(pod, &data)?);
        pod.wait_listening(5432)?;
    }
    for ip in stage.addresses() {
        let connection = format!("host={ip} user=postgres dbname=postgres sslmode=prefer connect_timeout=10");
        let psql = |query: &str| stage.run(command("psql", &["-XAtq", "-d", &connection, "-c", query]));
        let sum = psql("create temp table t as select generate_series(1, 100000) n; select sum(n) from t")?;
        ensure!(sum.trim() == "5000050000", "{ip} says the sum is {sum}");
        let rows = psql("select repeat('x', 1000) from generate_series(1, 3000)")?;
        ensure!(rows.len() == 3000 * 1001, "{ip} sent {} bytes", rows.len());
        // What the server sees is the client's own address.
        let seen = psql("select host(inet_client_addr())")?;
        ensure!([stage.client.ip(), stage.client.ip6()].contains(&seen.trim().parse()?), "{ip} sees {seen}");
    }
    Ok(())
}

fn as_postgres(args: &[&str]) -> Command {
    let user = ["--reuid=postgres", "--regid=postgres", "--clear-groups", "--"];
    let mut command = command("setpriv", &[&user[..], args].concat());
    command.current_dir("/").env("LC_ALL", "C.UTF-8");
    command
}

fn start_postgres(pod: &Pod, data: &str) -> Result<Process> {
    let postgres = format!("{POSTGRES}/postgres");
    let args = [&postgres, "-D", data, "-h", "*", "-k", data, "-c", "fsync=off", "-c", "shared_buffers=16MB"];
    pod.spawn(as_postgres(&args))
}

#[test]
fn iperf3() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("iperf3"));
    let stage = Stage::set("um-e2e-iperf")?;
    let running =
        stage.places.iter().map(|pod| pod.spawn(command("iperf3", &["-s"]))).collect::<Result<Vec<_>>>()?;
    stage.places.iter().try_for_each(|pod| pod.wait_listening(5201))?;
    for ip in stage.addresses() {
        for direction in [&[][..], &["-R"]] {
            let address = ip.to_string();
            let args = [&["-c", &address, "-n", "32M", "-P", "2", "--json"][..], direction].concat();
            let report: serde_json::Value = serde_json::from_str(&stage.run(command("iperf3", &args))?)?;
            // What is under way when the sender is done is not counted as received.
            let got = report["end"]["sum_received"]["bytes"].as_u64().unwrap_or_default();
            ensure!(got > 1 << 20, "{ip} {direction:?}: {got} bytes arrived: {}", report["error"]);
        }
    }
    drop(running);
    Ok(())
}

#[test]
fn a_server_that_speaks_first() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("socat"));
    let stage = Stage::set("um-e2e-first")?;
    // SMTP, as far as a client that is in no hurry needs it.
    let server = script(
        &stage,
        "server",
        "printf '220 ready\\n'; read a; printf '250 hello\\n'; read b; printf '221 bye\\n'",
    )?;
    let client = script(
        &stage,
        "client",
        "read a; echo \"$a\" >&2; printf 'HELO x\\n'; read b; printf 'QUIT\\n'; read c; echo \"$b $c\" >&2",
    )?;
    let listen = "TCP6-LISTEN:25,ipv6only=0,reuseaddr,fork";
    let spawn = |pod: &Pod| pod.spawn(command("socat", &[listen, &server]));
    let running = stage.places.iter().map(spawn).collect::<Result<Vec<_>>>()?;
    stage.places.iter().try_for_each(|pod| pod.wait_listening(25))?;
    for ip in stage.addresses() {
        let to = format!("TCP:{}:25", url_host(ip));
        let output = stage.client.run(command("socat", &[&to, &client]), SOON)?;
        let said = &output.stderr;
        ensure!(said == "220 ready\n250 hello 221 bye\n", "{ip} said {said:?}");
    }
    drop(running);
    stage.saw(4.0)
}

/// The address by which socat runs a shell script.
fn script(stage: &Stage, name: &str, text: &str) -> Result<String> {
    let file = stage.mesh.lab.dir().join(name);
    fs::write(&file, format!("{text}\n"))?;
    Ok(format!("EXEC:sh {}", file.display()))
}
