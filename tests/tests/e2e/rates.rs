//! What an endpoint takes in a time, and faults on purpose: wherever a client is, and whatever it speaks.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::http::upgrade;
use crate::kit::{Mesh, SHOP, SOON};
use crate::requests::{Asked, ask, serve_requests};
use crate::traffic::in_force;

const REQUESTS: &str = "undermesh_http_requests_total";
const REFUSED: &str = "undermesh_tcp_connections_refused_total";

/// A server behind the Service `web` on the first node, and clients there, on the second node and outside of the mesh. Each client
/// has an identity of its own, if any.
pub struct Stage {
    pub mesh: Mesh,
    pub near: Pod,
    pub far: Pod,
    pub outside: Pod,
    pub server: Pod,
    pub running: Process,
}

impl Stage {
    pub fn set(name: &str, agent_args: &[&str]) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, agent_args)?;
        let client = |node, name: &str| mesh.add(node, PodSpec::new(SHOP, name).service_account(name));
        let (near, far) = (client(0, "near")?, client(1, "far")?);
        let server = mesh.add(0, PodSpec::new(SHOP, "server").label("app", "web"))?;
        let outside = mesh.outsider(1, "outside")?;
        let ports = json!([{ "name": "web", "port": 80, "targetPort": 8080 }]);
        mesh.lab.apply(
            &Manifest::service(SHOP, "web", &[web()], &[], &[("app", "web")]).with("spec.ports", ports),
        )?;
        let running = serve_requests(&server)?;
        mesh.ready()?;
        let stage = Self { mesh, near, far, outside, server, running };
        eventually(SOON, "the Service is served", || {
            stage
                .clients()
                .iter()
                .try_for_each(|(client, url)| ask(client, url, &[])?.answered(200).map(drop))
        })?;
        Ok(stage)
    }

    /// Each client, and where the server is to it: who is outside of the mesh dials the pod.
    pub fn clients(&self) -> [(&Pod, String); 3] {
        let url = |to| format!("http://{to}/");
        let service = SocketAddr::new(web(), 80);
        let pod = SocketAddr::new(self.server.ip(), 8080);
        [(&self.near, url(service)), (&self.far, url(service)), (&self.outside, url(pod))]
    }

    /// Has the Service be treated so, and waits until its agents know.
    fn say(&self, spec: Value) -> Result<()> {
        let target = json!([{ "group": "", "kind": "Service", "name": "web" }]);
        let policy = Manifest::new("undermesh.io/v1alpha1", "TrafficPolicy", Some(SHOP), "web")
            .with("spec", spec)
            .with("spec.targetRefs", target);
        in_force(&self.mesh, &policy)
    }
}

pub fn web() -> IpAddr {
    IpAddr::from([10, 96, 0, 60])
}

pub fn of_status(asked: &Asked, status: u16) -> usize {
    asked.by_status.get(&status.to_string()).copied().unwrap_or_default()
}

#[test]
fn requests_that_are_too_many_are_refused_wherever_they_come_from() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-rates", &[])?;
    for version in [&[][..], &["--http2"]] {
        // Each version begins with nothing taken: another limit is another account.
        let count = 7 + version.len();
        stage.say(json!({ "rateLimits": [{ "requests": count, "per": "10m", "by": "Source" }] }))?;
        for (client, url) in stage.clients() {
            let whom = format!("{} {version:?}", client.name());
            let asked = ask(client, &url, &[&["--count", "20"], version].concat())?;
            ensure!(asked.failed.is_empty(), "{whom}: {asked:?}");
            ensure!(
                (of_status(&asked, 200), of_status(&asked, 429)) == (count, 20 - count),
                "{whom}: {asked:?}"
            );
            let headers = &asked.last["headers"];
            let policy = format!("\"undermesh\";q={count};w=600");
            ensure!(headers["ratelimit-policy"] == policy.as_str(), "{whom}: {headers}");
            ensure!(headers["ratelimit"].as_str().is_some_and(|it| it.contains("r=0;")), "{whom}: {headers}");
            let wait: u64 = headers["retry-after"].as_str().context("no Retry-After")?.parse()?;
            ensure!((1..=600 / count as u64 + 1).contains(&wait), "{whom}: {headers}");
            let status = headers["proxy-status"].as_str().unwrap_or_default();
            ensure!(status.contains("error=http_request_denied"), "{whom}: {headers}");
        }
        // Who refuses tells of it: the server's node, for all of them.
        let metrics = stage.mesh.agents[0].metrics()?;
        for source in ["near", "far", "outside"] {
            let labels =
                [("reporter", "destination"), ("reason", "rate_limited"), ("source_workload", source)];
            ensure!(metrics.sum(REQUESTS, &labels) > 0.0, "{source} is not counted");
        }
    }
    // gRPC is told in its own words.
    let grpc = ["--http2", "--method", "POST", "--header", "content-type: application/grpc"];
    for (client, url) in stage.clients() {
        let headers = ask(client, &url, &grpc)?.answered(200)?["headers"].clone();
        ensure!(headers["grpc-status"] == "8", "{}: {headers}", client.name());
    }
    Ok(())
}

/// A client that says nothing at first, as one does that waits for the server to speak, is held to its limit all the same.
#[test]
fn who_says_nothing_at_first_passes_no_limit_by() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-rates-silent", &[])?;
    stage.say(json!({ "rateLimits": [{ "requests": 3, "per": "10m", "by": "Source" }] }))?;
    for (client, url) in stage.clients() {
        let to: SocketAddr = url.trim_start_matches("http://").trim_end_matches('/').parse()?;
        let request = "GET / HTTP/1.1\\r\\nhost: web\\r\\n\\r\\n";
        let last = "GET / HTTP/1.1\\r\\nhost: web\\r\\nconnection: close\\r\\n\\r\\n";
        let script = format!(
            "exec 3<>/dev/tcp/{}/{}; sleep 0.3; printf '{}{last}' >&3; cat <&3",
            to.ip(),
            to.port(),
            request.repeat(7)
        );
        let mut bash = Command::new("bash");
        bash.args(["-c", &script]);
        let said = client.run(bash, Duration::from_secs(20))?.success()?;
        let of = |status: &str| said.matches(&format!("HTTP/1.1 {status}")).count();
        ensure!((of("200"), of("429")) == (3, 5), "{}: {said}", client.name());
    }
    Ok(())
}

#[test]
fn what_passes_a_limit_passes_as_it_is() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-rates-pass", &[])?;
    stage.say(json!({ "rateLimits": [{ "requests": 100_000, "per": "1s" }] }))?;
    for (client, url) in stage.clients() {
        let whom = client.name();
        for version in [&[][..], &["--http2"]] {
            let with = |args: &[&str], path: &str| -> Result<Value> {
                ask(client, &format!("{url}{path}"), &[args, version].concat())?.answered(200)
            };
            let answer = with(&["--method", "POST", "--body", "3000000", "--header", "x-a: b"], "a?b=c")?;
            ensure!(answer["saw"]["bytes"] == 3_000_000, "{whom}: {answer}");
            ensure!(answer["saw"]["headers"]["x-a"] == json!(["b"]), "{whom}: {answer}");
            ensure!(answer["headers"]["ratelimit"].is_string(), "{whom}: {answer}");
            with(&[], "?bytes=3000000")?;
            let trailers = with(&[], "?trailer=last")?;
            ensure!(trailers.to_string().contains("last"), "{whom}: {trailers}");
        }
        let many = ask(client, &url, &["--count", "2000", "--connections", "8"])?;
        many.all(200)?;
        // An application that closes after an answer says so, and no request is lost for it.
        let closing = ["--count", "50", "--method", "POST", "--body", "10"];
        ask(client, &format!("{url}?header=connection:close"), &closing)?.all(200)?;
        // What becomes another protocol does.
        let to: SocketAddr = url.trim_start_matches("http://").trim_end_matches('/').parse()?;
        let said = upgrade(client, to)?;
        ensure!(said.starts_with("HTTP/1.1 101") && said.ends_with("are you there?"), "{whom}: {said}");
        // An application that breaks off does so to its client.
        let broken = ask(client, &format!("{url}?break=1"), &["--fresh"])?;
        ensure!(!broken.by_status.contains_key("200"), "{whom}: {broken:?}");
    }
    // What is no HTTP goes to the application, which says what it thinks of that.
    for (client, to) in [
        (&stage.near, SocketAddr::new(web(), 80)),
        (&stage.far, SocketAddr::new(web(), 80)),
        (&stage.outside, SocketAddr::new(stage.server.ip(), 8080)),
    ] {
        let script = format!("exec 3<>/dev/tcp/{}/{}; echo what is this >&3; cat <&3", to.ip(), to.port());
        let mut bash = Command::new("bash");
        bash.args(["-c", &script]);
        let said = client.run(bash, Duration::from_secs(20))?.success()?;
        ensure!(
            said.starts_with("HTTP/1.1 400") && !said.contains("proxy-status"),
            "{}: {said}",
            client.name()
        );
    }
    Ok(())
}

#[test]
fn who_floods_an_endpoint_takes_nothing_from_others() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-rates-fair", &[])?;
    stage.say(json!({ "rateLimits": [{ "requests": 200, "per": "1s", "burst": 20 }] }))?;
    let [(near, url), (far, _), _] = stage.clients();
    for (flooding, behaved) in [(near, far), (far, near)] {
        let (flood, well) = thread::scope(|scope| {
            let flood = scope.spawn(|| ask(flooding, &url, &["--count", "20000", "--connections", "16"]));
            // 40 a second, a fifth of the limit and less than a half.
            let slow = ["--count", "80", "--pause-ms", "25"];
            let well = ask(behaved, &url, &slow);
            let flood = flood.join().map_err(|_| anyhow::anyhow!("the flood panicked"))?;
            anyhow::Ok((flood?, well?))
        })?;
        well.all(200).with_context(|| format!("{} beside a flood", behaved.name()))?;
        ensure!(of_status(&flood, 429) > 10_000, "{flood:?}");
        ensure!(of_status(&flood, 200) > 50, "what is left over is had by nobody: {flood:?}");
    }
    Ok(())
}

#[test]
fn connections_that_are_too_many_are_refused() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    // Then each connection of a client is one to the endpoint.
    let stage = Stage::set("um-e2e-rates-connections", &["--http", "off"])?;
    stage.say(json!({ "rateLimits": [{ "connections": 4, "per": "10m", "by": "Source" }] }))?;
    for (client, url) in stage.clients() {
        let asked = ask(client, &url, &["--count", "10", "--fresh"])?;
        let failed: usize = asked.failed.values().sum();
        ensure!((of_status(&asked, 200), failed) == (4, 6), "{}: {asked:?}", client.name());
    }
    let refused = stage.mesh.agents[0].metrics()?.sum(REFUSED, &[("reason", "rate_limited")]);
    ensure!(refused >= 18.0, "{refused} refusals are counted");
    Ok(())
}

#[test]
fn requests_fail_and_wait_on_purpose() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-faults", &[])?;
    stage.say(json!({ "faults": [
        { "match": { "headers": [{ "name": "x-chaos", "value": "slow" }] }, "delay": "300ms" },
        { "match": { "headers": [{ "name": "x-chaos", "value": "half" }] }, "percent": 50, "abort": { "status": 418 } },
    ] }))?;
    let [(near, url), (far, _), _] = stage.clients();
    for client in [near, far] {
        let whom = client.name();
        ask(client, &url, &["--count", "50"])?.all(200)?;
        let began = std::time::Instant::now();
        ask(client, &url, &["--header", "x-chaos: slow"])?.answered(200)?;
        ensure!(began.elapsed() >= Duration::from_millis(300), "{whom} did not wait");
        let half = ask(client, &url, &["--header", "x-chaos: half", "--count", "400"])?;
        let failed = of_status(&half, 418);
        ensure!((140..=260).contains(&failed) && failed + of_status(&half, 200) == 400, "{whom}: {half:?}");
    }
    // What a request waits for on purpose is of its time, and not the endpoint's fault.
    stage.say(json!({ "faults": [{ "delay": "2s" }], "timeouts": { "request": "200ms" } }))?;
    let began = std::time::Instant::now();
    ask(near, &url, &["--count", "10", "--connections", "10"])?.all(504)?;
    ensure!(began.elapsed() < Duration::from_secs(2), "the delay was waited for: {:?}", began.elapsed());
    let ejected = stage.mesh.agents[0].metrics()?.sum("undermesh_http_ejections_total", &[]);
    ensure!(ejected == 0.0, "the endpoint is blamed");
    let injected = |agent: usize| -> Result<f64> {
        Ok(stage.mesh.agents[agent].metrics()?.sum(REQUESTS, &[("reason", "fault_injected")]))
    };
    ensure!(injected(0)? > 0.0 && injected(1)? > 0.0, "faults are not counted");
    Ok(())
}
