//! gRPC through the mesh: grpcurl and a client of tonic, servers of tonic, and a route that tells methods apart.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Output, Pod, PodSpec, Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON, last_line};

const REQUESTS: &str = "undermesh_http_requests_total";
/// The Service that is called; calls of `Say` are for the server `one`, on the client's node, and all others for `two`.
const CHAT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 96, 0, 70));
const LIMIT: Duration = Duration::from_secs(60);

struct Stage {
    mesh: Mesh,
    client: Pod,
    /// Where `chat.proto` is.
    definition: PathBuf,
    _running: [Process; 2],
}

impl Stage {
    fn set(name: &str) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &[])?;
        let client = mesh.pod(0, "client")?;
        let server = |node, name: &str| mesh.add(node, PodSpec::new(SHOP, name).label("part", "chat"));
        let servers = [server(0, "one")?, server(1, "two")?];
        for (index, (name, selector)) in [
            ("chat", json!({ "part": "chat" })),
            ("one", json!({ "app": "one" })),
            ("two", json!({ "app": "two" })),
            ("nobody", json!({ "app": "nobody" })),
        ]
        .into_iter()
        .enumerate()
        {
            let ip = IpAddr::from([10, 96, 0, 70 + index as u8]);
            let ports = json!([{ "name": "grpc", "port": 80, "targetPort": 8080 }]);
            let service = Manifest::service(SHOP, name, &[ip], &[], &[]);
            mesh.lab.apply(&service.with("spec.ports", ports).with("spec.selector", selector))?;
        }
        let route = Manifest::new("gateway.networking.k8s.io/v1", "GRPCRoute", Some(SHOP), "chat");
        mesh.lab.apply(&route.with("spec", by_method()))?;
        let running = [serve(&servers[0])?, serve(&servers[1])?];
        mesh.ready()?;
        let definition = mesh.lab.dir().to_owned();
        fs::write(definition.join("chat.proto"), include_str!("../../src/bin/chat/chat.proto"))?;
        let stage = Self { mesh, client, definition, _running: running };
        eventually(SOON, "the route is in force", || stage.chat(1, 10).map(drop))?;
        Ok(stage)
    }

    /// Calls each of the four kinds so many times, with tonic; what came of them.
    fn chat(&self, count: usize, letters: usize) -> Result<Value> {
        let mut command = Command::new(binary("chat")?);
        command.args(["call", &format!("http://{}", SocketAddr::new(CHAT, 80))]);
        command.args(["--count", &count.to_string(), "--letters", &letters.to_string()]);
        last_line(&self.client.run(command, LIMIT)?.success()?)
    }

    fn grpcurl(&self, method: &str, lines: &[Value], args: &[&str]) -> Result<Called> {
        let mut command = Command::new("grpcurl");
        command.args(["-plaintext", "-emit-defaults", "-v", "-proto", "chat.proto", "-import-path"]);
        command.arg(&self.definition).args(args);
        command.args(["-d", &lines.iter().map(Value::to_string).collect::<String>()]);
        command.args([&SocketAddr::new(CHAT, 80).to_string(), &format!("test.v1.Chat/{method}")]);
        self.client.run(command, LIMIT).map(Called)
    }

    fn counted(&self, labels: &[(&str, &str)]) -> Result<f64> {
        let labels = [&[("reporter", "source"), ("source_workload", "client")], labels].concat();
        Ok(self.mesh.agents[0].metrics()?.sum(REQUESTS, &labels))
    }
}

fn by_method() -> Value {
    let method = |name: &str| json!({ "method": { "service": "test.v1.Chat", "method": name } });
    let to = |name: &str| json!([{ "name": name, "port": 80 }]);
    let nobody = json!({
        "method": { "service": "test.v1.Chat", "method": "Say" },
        "headers": [{ "name": "x-to", "value": "nobody" }],
    });
    json!({
        "parentRefs": [{ "group": "", "kind": "Service", "name": "chat" }],
        "rules": [
            { "matches": [nobody], "backendRefs": to("nobody") },
            { "matches": [method("Say")], "backendRefs": to("one") },
            { "matches": (["Read", "Write", "Talk"].map(method)), "backendRefs": to("two") },
        ],
    })
}

fn serve(pod: &Pod) -> Result<Process> {
    let mut command = Command::new(binary("chat")?);
    command.args(["serve", "--name", pod.name()]);
    let server = pod.spawn(command)?;
    pod.wait_listening(8080)?;
    Ok(server)
}

/// What grpcurl found.
struct Called(Output);

impl Called {
    /// The answers that came, and the status: 0 if it went well. What each says of the deadline is taken out, and must be within the
    /// client's own.
    fn came(&self, limit: Duration) -> Result<(Vec<Value>, i32)> {
        let status = match self.0.status.code().context("grpcurl was killed")? {
            0 => 0,
            // grpcurl adds this, to have other codes for what is wrong with its own arguments.
            code => code - 64,
        };
        // With `-v`, each comes after a line that says so.
        let answers = self.0.stdout.split("Response contents:\n").skip(1).map(|text| {
            let mut answers = serde_json::Deserializer::from_str(text).into_iter::<Value>();
            let mut answer = answers.next().context("no JSON")??;
            let told = answer["timeout"].as_str().and_then(read_timeout);
            let told = told.with_context(|| format!("the server was told no deadline: {answer}"))?;
            ensure!(told <= limit, "the server was told to have {told:?}");
            answer.as_object_mut().context("no object")?.remove("timeout");
            Ok(answer)
        });
        Ok((answers.collect::<Result<_>>()?, status))
    }

    fn check(&self, limit: Duration, answers: &[Value], status: i32) -> Result<()> {
        let came = self.came(limit)?;
        ensure!(came == (answers.to_vec(), status), "{came:?}:\n{}{}", self.0.stdout, self.0.stderr);
        Ok(())
    }

    /// Fails unless grpcurl shows the status so.
    fn check_error(&self, code: &str, message: &str) -> Result<()> {
        let said = format!("{}{}", self.0.stdout, self.0.stderr);
        let shows = said.contains(&format!("Code: {code}\n")) && said.contains(message);
        ensure!(shows, "{code} with `{message}` is not shown: {said}");
        Ok(())
    }
}

/// `grpc-timeout` (gRPC over HTTP/2, "Requests").
fn read_timeout(text: &str) -> Option<Duration> {
    let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let number: u64 = number.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(number * 3600),
        "M" => Duration::from_secs(number * 60),
        "S" => Duration::from_secs(number),
        "m" => Duration::from_millis(number),
        "u" => Duration::from_micros(number),
        "n" => Duration::from_nanos(number),
        _ => return None,
    })
}

fn answer(server: &str, text: &str, count: u32) -> Value {
    json!({ "text": text, "count": count, "delayMs": 0, "fail": 0, "server": server })
}

fn line(text: &str) -> Value {
    json!({ "text": text })
}

#[test]
fn calls_of_all_kinds_are_routed_by_their_methods() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("grpcurl"));
    let stage = Stage::set("um-e2e-grpc")?;
    let limit = Duration::from_secs(20);
    let call = |method: &str, lines: &[Value]| stage.grpcurl(method, lines, &["-max-time", "20"]);
    call("Say", &[line("grüße")])?.check(limit, &[answer("one", "grüße", 1)], 0)?;
    let three = [1, 2, 3].map(|number| answer("two", "a", number));
    call("Read", &[json!({ "text": "a", "count": 3 })])?.check(limit, &three, 0)?;
    call("Write", &[line("a"), line("b"), line("c")])?.check(limit, &[answer("two", "abc", 3)], 0)?;
    call("Talk", &[line("a"), line("b")])?.check(
        limit,
        &[answer("two", "a", 1), answer("two", "b", 2)],
        0,
    )?;
    // Many at a time on one channel, more than one connection has streams; and large ones.
    for (count, letters) in [(300, 10), (3, 150_000)] {
        let all = letters * 20;
        let found = stage.chat(count, letters)?;
        let expected = json!({
            "Say": { format!("one: 1 of {letters} letters, 1"): count },
            "Read": { format!("two: 20 of {letters} letters, 20"): count },
            "Write": { format!("two: 1 of {all} letters, 20"): count },
            "Talk": { format!("two: 20 of {letters} letters, 20"): count },
        });
        ensure!(found == expected, "{count} calls of {letters} letters: {found}");
    }
    Ok(())
}

#[test]
fn callers_are_told_how_calls_end() -> Result<()> {
    require!(Feature::Lab, Feature::Agent, Feature::Program("grpcurl"));
    let stage = Stage::set("um-e2e-grpc-ends")?;
    let limit = Duration::from_secs(20);
    let call = |method: &str, line: Value, more: &[&str]| {
        stage.grpcurl(method, &[line], &[&["-max-time", "20"], more].concat())
    };
    // By the server: in place of an answer, and after answers that count.
    let not_found = call("Say", json!({ "fail": 5 }), &[])?;
    not_found.check(limit, &[], 5)?;
    not_found.check_error("NotFound", "100 % of it: ä")?;
    let aborted = call("Read", json!({ "text": "a", "count": 2, "fail": 10 }), &[])?;
    aborted.check(limit, &[answer("two", "a", 1), answer("two", "a", 2)], 10)?;
    aborted.check_error("Aborted", "100 % of it: ä")?;
    ensure!(
        aborted.0.stdout.contains("x-why: as was asked for"),
        "the trailers are lost: {}",
        aborted.0.stdout
    );
    ensure!(stage.counted(&[("grpc_status", "10")])? == 1.0, "the status is not counted");

    // By the mesh.
    let lost = call("Forget", line("a"), &[])?;
    lost.check(limit, &[], 12)?;
    lost.check_error("Unimplemented", "no rule of the routes of shop/chat fits the request")?;
    let nobody = call("Say", line("a"), &["-H", "x-to: nobody"])?;
    nobody.check(limit, &[], 14)?;
    nobody.check_error("Unavailable", "shop/nobody: no_endpoints")?;
    ensure!(stage.counted(&[("reason", "no_endpoints"), ("grpc_status", "14")])? == 1.0, "it is not counted");

    // By the clock: who is called is told how long it has, and who calls does not wait longer.
    let began = Instant::now();
    let late = stage.grpcurl("Say", &[json!({ "delay_ms": 30_000 })], &["-max-time", "0.5"])?;
    late.check(limit, &[], 4)?;
    late.check_error("DeadlineExceeded", "")?;
    ensure!(began.elapsed() < Duration::from_secs(10), "it took {:?}", began.elapsed());
    Ok(())
}
