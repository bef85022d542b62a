//! Who may call whom: policies at the server's node, wherever the caller is, and whatever it speaks.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{AgentOptions, Manifest, Pod, Process, binary, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{PORT, SHOP, SOON, Talk, dial_at_once, last_line, options, serve_on};
use crate::rates::{Stage, of_status, web};
use crate::requests::{Asked, ask};

const OUTCOMES: &str = "undermesh_policy_outcomes_total";
const REFUSED: &str = "undermesh_tcp_connections_refused_total";
const REQUESTS: &str = "undermesh_http_requests_total";
const CLOSED: &str = "undermesh_tcp_connections_closed_total";

/// Of the pods of a [`Stage`]'s server, unless it says of what.
pub fn policy(name: &str, spec: Value) -> Manifest {
    let spec = match spec.get("targetRefs") {
        Some(_) => spec,
        None => {
            let mut spec = spec;
            spec["selector"] = json!({ "matchLabels": { "app": "web" } });
            spec
        }
    };
    Manifest::new("undermesh.io/v1alpha1", "AuthorizationPolicy", Some(SHOP), name).with("spec", spec)
}

/// Applies the manifest, and waits until the server's agent goes by it: another node's may have no need to know.
pub fn in_force(stage: &Stage, manifest: &Manifest) -> Result<()> {
    let generation =
        || Ok::<_, anyhow::Error>(stage.mesh.agents[0].metrics()?.sum("undermesh_config_generation", &[]));
    let before = generation()?;
    stage.mesh.lab.apply(manifest)?;
    eventually(SOON, "the manifest is in force", || {
        ensure!(generation()? > before, "still {before}");
        Ok(())
    })
}

/// What a caller gets: an HTTP status, or that there was no answer at all.
fn told(client: &Pod, url: &str, args: &[&str]) -> Result<String> {
    let asked = ask(client, url, args)?;
    Ok(match asked.failed.is_empty() {
        true => asked.last["status"].to_string(),
        false => "broken".to_owned(),
    })
}

impl Stage {
    /// What each client gets who asks for this path: near, far, outside.
    fn each(&self, path: &str, args: &[&str]) -> Result<[String; 3]> {
        let [near, far, outside] = self
            .clients()
            .map(|(client, url)| told(client, &format!("{}{path}", url.trim_end_matches('/')), args));
        Ok([near?, far?, outside?])
    }

    /// Fails unless they get this, with HTTP/1 and HTTP/2.
    fn check(&self, path: &str, expected: [&str; 3]) -> Result<()> {
        for version in [&[][..], &["--http2"]] {
            // What stands when a policy comes may stand for a moment.
            eventually(Duration::from_secs(1), "the policies hold", || {
                let got = self.each(path, version)?;
                ensure!(got == expected, "{path} {version:?}: {got:?}, not {expected:?}");
                Ok(())
            })?;
        }
        Ok(())
    }

    fn endpoint(&self, client: &Pod, port: u16) -> SocketAddr {
        // Who is outside of the mesh dials the pod, and so do the others where no Service leads there.
        _ = client;
        SocketAddr::new(self.server.ip(), port)
    }
}

#[test]
fn callers_are_let_in_by_who_they_are() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-access", &[])?;
    stage.check("/", ["200", "200", "200"])?;
    // Whoever calls in plaintext has no identity, and where its connection cannot be let in, is not answered at all.
    for (name, source, expected) in [
        ("account", json!({ "serviceAccounts": ["near"] }), ["200", "403", "broken"]),
        ("other", json!({ "serviceAccounts": ["shop/far"] }), ["403", "200", "broken"]),
        (
            "identity",
            json!({ "identities": ["spiffe://cluster.local/ns/shop/sa/f*"] }),
            ["403", "200", "broken"],
        ),
        ("namespace", json!({ "namespaces": ["shop"] }), ["200", "200", "broken"]),
        ("not", json!({ "notServiceAccounts": ["far"] }), ["200", "403", "broken"]),
        ("address", json!({ "ipBlocks": [format!("{}/32", stage.outside.ip())] }), ["403", "403", "200"]),
    ] {
        let spec = json!({ "action": "Allow", "rules": [{ "from": [source] }] });
        in_force(&stage, &policy("who", spec))?;
        stage.check("/", expected).context(name)?;
    }
    // IPv6 is another way to the same door.
    let to6 = format!("http://[{}]:8080/", stage.server.ip6());
    let spec = json!({ "rules": [{ "from": [{ "serviceAccounts": ["near"] }] }] });
    in_force(&stage, &policy("who", spec))?;
    for (client, expected) in [(&stage.near, "200"), (&stage.far, "403"), (&stage.outside, "broken")] {
        let got = told(client, &to6, &[])?;
        ensure!(got == expected, "{} over IPv6: {got}", client.name());
    }
    // What is denied stays so, whatever allows it.
    let deny = json!({ "action": "Deny", "rules": [{ "from": [{ "serviceAccounts": ["near"] }] }] });
    in_force(&stage, &policy("never", deny))?;
    stage.check("/", ["403", "403", "broken"])?;
    stage.mesh.lab.delete(&policy("who", json!({})))?;
    eventually(SOON, "one policy is gone", || stage.check("/", ["403", "200", "200"]))?;
    // Callers of gRPC are told in their own words.
    let grpc = ["--http2", "--method", "POST", "--header", "content-type: application/grpc"];
    let (near, url) = (&stage.near, format!("http://{}/", SocketAddr::new(web(), 80)));
    let headers = ask(near, &url, &grpc)?.answered(200)?["headers"].clone();
    ensure!(headers["grpc-status"] == "7", "{headers}");
    ensure!(
        headers["proxy-status"].as_str().is_some_and(|it| it.contains("error=http_request_denied")),
        "{headers}"
    );
    ensure!(!headers.to_string().contains("never"), "the policy's name is nobody's to know: {headers}");
    Ok(())
}

#[test]
fn requests_are_let_in_by_what_they_ask_for() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-access-requests", &[])?;
    let allow = json!({ "rules": [
        { "to": [{ "paths": ["/open/*"], "methods": ["GET"] }] },
        { "from": [{ "serviceAccounts": ["near"] }], "to": [{ "paths": ["/orders/{*}/items"] }] },
        { "when": [{ "header": { "name": "x-team", "values": ["blue"] } }], "to": [{ "paths": ["/team"] }] },
        { "when": [{ "expression": "request.method == 'PUT' && source.namespace == 'shop'" }] },
    ] });
    in_force(&stage, &policy("what", allow))?;
    stage.check("/open/a", ["200", "200", "200"])?;
    stage.check("/orders/7/items", ["200", "403", "403"])?;
    stage.check("/orders/7/8/items", ["403", "403", "403"])?;
    stage.check("/team", ["403", "403", "403"])?;
    for (args, expected) in [
        (&["--header", "x-team: blue"][..], ["200", "200", "200"]),
        (&["--header", "x-team: red"], ["403", "403", "403"]),
        (&["--header", "x-team: blue", "--http2"], ["200", "200", "200"]),
    ] {
        ensure!(stage.each("/team", args)? == expected, "{args:?}");
    }
    ensure!(stage.each("/else", &["--method", "PUT"])? == ["200", "200", "403"], "the expression");
    ensure!(stage.each("/open/a", &["--method", "POST"])? == ["403", "403", "403"], "the method");
    // Many ways to write a path that is denied.
    let deny = json!({ "action": "Deny", "rules": [{ "to": [{ "paths": ["/admin/*", "/admin"] }] }] });
    in_force(&stage, &policy("admin", deny))?;
    in_force(&stage, &policy("what", json!({ "rules": [{}] })))?;
    stage.check("/", ["200", "200", "200"])?;
    for path in ["/admin", "/admin/x", "//admin", "/%61dmin", "/x/../admin", "/x/%2e%2e/admin", "/./admin/"] {
        stage.check(path, ["403", "403", "403"])?;
    }
    stage.check("/x%2f..%2fadmin", ["400", "400", "400"])?;
    stage.check("/administrator", ["200", "200", "200"])?;
    // What a server might take for a call of gRPC is one where that is denied, and a method in lower case is none at all.
    let deny =
        json!({ "action": "Deny", "rules": [{ "to": [{ "grpc": [{ "service": "shop.v1.Admin" }] }] }] });
    in_force(&stage, &policy("admin", deny))?;
    for kind in ["application/grpc", "Application/GRPC", "application/grpc-web+proto", "text/plain"] {
        let header = format!("content-type: {kind}");
        let args = ["--http2", "--method", "POST", "--header", &header];
        // To who says that it calls gRPC it is said in words of that.
        let expected = if kind == "application/grpc" { "200" } else { "403" };
        eventually(Duration::from_secs(1), "the policy holds", || {
            let got = stage.each("/shop.v1.Admin/Drop", &args)?;
            ensure!(got.iter().all(|got| got == expected), "{kind}: {got:?}");
            Ok(())
        })?;
        let other = stage.each("/shop.v1.Orders/List", &args)?;
        ensure!(other.iter().all(|got| got == "200"), "{kind}: {other:?}");
    }
    let lower = stage.each("/", &["--http2", "--method", "delete"])?;
    ensure!(lower.iter().all(|got| got == "400"), "a method in lower case: {lower:?}");
    // Whom a request is for is what its application sees, wherever it says so.
    let admin = json!({ "header": { "name": "host", "values": ["admin.internal"] } });
    in_force(&stage, &policy("admin", json!({ "action": "Deny", "rules": [{ "when": [admin] }] })))?;
    for (args, expected) in [
        (&["--host", "admin.internal"][..], "403"),
        (&["--host", "public"], "200"),
        (&["--host", "public", "--target", "http://admin.internal/"], "403"),
        (&["--host", "admin.internal", "--target", "http://public/"], "200"),
        (&["--http2", "--host", "admin.internal"], "403"),
        (&["--http2", "--target", "/", "--header", "host: admin.internal"], "403"),
        (&["--http2", "--host", "public"], "200"),
        // What says it nowhere is no request.
        (&["--http2", "--target", "/"], "400"),
        // Of an answer to HEAD there is no body.
        (&["--http2", "--method", "HEAD", "--host", "admin.internal"], "403"),
    ] {
        eventually(Duration::from_secs(1), "the policy holds", || {
            let got = stage.each("/", args)?;
            ensure!(got.iter().all(|got| got == expected), "{args:?}: {got:?}");
            Ok(())
        })?;
    }
    // A Service's policies are its endpoints' at the ports that it leads to, and at no other.
    stage.mesh.lab.delete(&policy("admin", json!({})))?;
    let target = json!([{ "group": "", "kind": "Service", "name": "web" }]);
    in_force(&stage, &policy("what", json!({ "targetRefs": target, "rules": [] })))?;
    stage.check("/", ["403", "403", "broken"])?;
    let _other = serve_on(&stage.server, PORT)?;
    for client in [&stage.near, &stage.far, &stage.outside] {
        dial_at_once(client, SocketAddr::new(stage.server.ip(), PORT), 3, 1)?.all_served()?;
    }
    Ok(())
}

/// A connection that policies let in no more ends within a second, and so does one of which they would have to see requests.
/// Who is told which policy it was, and how paths are compared, is the agents' to say.
#[test]
fn what_callers_are_told_and_how_paths_are_compared_can_be_set() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let flags = ["--name-policies", "--ignore-path-case", "--escaped-slashes", "decode"];
    let stage = Stage::set("um-e2e-access-settings", &flags)?;
    let deny = json!({ "action": "Deny", "rules": [{ "to": [{ "paths": ["/Admin/*"] }] }] });
    in_force(&stage, &policy("no-admin", deny))?;
    for path in ["/admin/x", "/ADMIN/x", "/admin%2Fx"] {
        stage.check(path, ["403"; 3])?;
    }
    stage.check("/administrator", ["200"; 3])?;
    let url = format!("http://{}/admin/x", SocketAddr::new(web(), 80));
    let headers = ask(&stage.near, &url, &[])?.answered(403)?["headers"].clone();
    let said = headers["proxy-status"].as_str().unwrap_or_default();
    ensure!(said.contains("shop/no-admin"), "{headers}");
    Ok(())
}

#[test]
fn connections_end_that_are_let_in_no_more() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-access-live", &[])?;
    let _server = serve_on(&stage.server, PORT)?;
    let clients = [&stage.near, &stage.far, &stage.outside];
    let talks = || -> Result<Vec<Talk>> {
        clients.iter().map(|client| Talk::with(client, stage.endpoint(client, PORT))).collect()
    };
    for (name, spec, stay) in [
        ("all", json!({ "action": "Deny", "rules": [{ "to": [{ "ports": [PORT] }] }] }), [false; 3]),
        ("one", json!({ "rules": [{ "from": [{ "serviceAccounts": ["far"] }] }] }), [false, true, false]),
        ("paths", json!({ "rules": [{ "to": [{ "paths": ["/a"] }] }] }), [false; 3]),
        ("others", json!({ "action": "Deny", "rules": [{ "to": [{ "ports": [PORT + 1] }] }] }), [true; 3]),
        ("dry", json!({ "action": "Deny", "dryRun": true, "rules": [{}] }), [true; 3]),
    ] {
        let talks = talks()?;
        in_force(&stage, &policy("live", spec))?;
        let changed = Instant::now();
        for ((mut talk, stays), client) in talks.into_iter().zip(stay).zip(clients) {
            let whom = format!("{name}: {}", client.name());
            if stays {
                std::thread::sleep(Duration::from_millis(1_200).saturating_sub(changed.elapsed()));
                talk.goes_on().context(whom)?;
                talk.end()?;
            } else {
                talk.ends_somehow(Duration::from_secs(2)).context(whom)?;
            }
        }
        // New ones meet the same.
        for (client, stays) in clients.into_iter().zip(stay) {
            let dialled = dial_at_once(client, stage.endpoint(client, PORT), 2, 1)?;
            let served = dialled.all_served().is_ok();
            ensure!(served == stays, "{name}: a new connection of {} is served: {served}", client.name());
        }
        stage.mesh.lab.delete(&policy("live", json!({})))?;
        eventually(SOON, "the policy is gone", || {
            clients.iter().try_for_each(|client| {
                dial_at_once(client, stage.endpoint(client, PORT), 1, 1)?.all_served().map(drop)
            })
        })?;
    }
    // What was looked at while a policy was tried out, and was no request, ends when it comes into force.
    let paths = |dry| json!({ "action": "Deny", "dryRun": dry, "rules": [{ "to": [{ "paths": ["/a"] }] }] });
    in_force(&stage, &policy("live", paths(true)))?;
    let talks = talks()?;
    in_force(&stage, &policy("live", paths(false)))?;
    for (talk, client) in talks.into_iter().zip(clients) {
        talk.ends_somehow(Duration::from_secs(2)).with_context(|| format!("tried out: {}", client.name()))?;
    }
    let closed =
        stage.mesh.agents[0].metrics()?.sum(CLOSED, &[("reason", "denied"), ("reporter", "destination")]);
    ensure!(closed >= 8.0, "{closed} connections count as ended by policies");
    Ok(())
}

/// What takes long, in which way, and what its client is told when it is let in no more: of an answer that has begun, only gRPC knows why.
const LASTING: [(&str, &[&str], &str); 6] = [
    ("download", &[], "broken off"),
    ("download", &["--http2"], "broken off: CANCEL"),
    ("download", &["--http2", "--header", "content-type: application/grpc"], "grpc-status 7"),
    (
        "upgrade",
        &["--header", "connection: upgrade", "--header", "upgrade: echo"],
        "the other protocol was ended",
    ),
    ("upload", &["--method", "POST", "--drip-ms", "50"], "403"),
    ("upload", &["--http2", "--method", "POST", "--drip-ms", "50"], "403"),
];

/// A request that takes as long as it may.
struct Lasting {
    process: Process,
    whose: String,
    target: String,
    expected: &'static str,
}

impl Lasting {
    /// One of each kind by each client, of this folder. The server is one, too: what a pod says to itself goes through no tunnel.
    fn begin(stage: &Stage, folder: &str) -> Result<Vec<Self>> {
        let mut all = Vec::new();
        let itself = (&stage.server, format!("http://{}/", SocketAddr::new(web(), 80)));
        for (client, url) in stage.clients().into_iter().chain([itself]) {
            for (place, (kind, args, expected)) in LASTING.into_iter().enumerate() {
                let query = if kind == "download" { "?drip_ms=50" } else { "" };
                let target = format!("{folder}/{}/{place}{query}", client.name());
                let mut command = Command::new(binary("requests")?);
                command.args(["ask", &format!("{}{target}", url.trim_end_matches('/'))]);
                command.args(["--limit-ms", "60000"]).args(args);
                let whose = format!("the {kind} {args:?} of {}", client.name());
                all.push(Self { process: client.spawn(command)?, whose, target, expected });
            }
        }
        Ok(all)
    }

    /// Fails unless it ends, as it is expected to, and its application sees that.
    fn ends(mut self, server: &Process) -> Result<()> {
        let Self { process, whose, expected, .. } = &mut self;
        process.wait(Duration::from_secs(2)).with_context(|| whose.clone())?;
        let asked: Asked = last_line(&process.output())?;
        let told = match asked.failed.keys().next() {
            Some(why) if why.contains("stream error received: stream no longer needed") => {
                "broken off: CANCEL"
            }
            Some(why) if why.starts_with("the answer broke off") => "broken off",
            Some(why) => why,
            None if asked.last["trailers"]["grpc-status"] == "7" => "grpc-status 7",
            None => &asked.last["status"].to_string(),
        };
        ensure!(told == *expected, "{whose}: {told}, not {expected}");
        eventually(SOON, "the application has seen it", || self.is_broken_off(server))
    }

    fn has_begun(&self, server: &Process) -> Result<()> {
        self.is_said("begun", server)
    }

    fn is_broken_off(&self, server: &Process) -> Result<()> {
        self.is_said("broken off", server)
    }

    fn is_said(&self, what: &str, server: &Process) -> Result<()> {
        let said = server.output();
        let is_it = |line: &str| line.starts_with(what) && line.ends_with(&self.target);
        ensure!(said.lines().any(is_it), "{}: {said}", self.whose);
        Ok(())
    }
}

/// Requests that are under way are asked about again, by what they asked for; and those of which nobody wanted to know that end with their
/// connections.
#[test]
fn requests_under_way_end_that_are_let_in_no_more() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let audit = tempfile::tempdir()?;
    let file = audit.path().join("audit.json");
    let stage = Stage::set("um-e2e-access-lasting", &["--audit-log", &file.display().to_string()])?;
    let denied = || {
        let metrics = stage.mesh.agents[0].metrics()?;
        Ok::<_, anyhow::Error>(metrics.sum(REQUESTS, &[("reporter", "destination"), ("reason", "denied")]))
    };
    // Somewhere else is asked for requests: those that begin now are looked at.
    let deny = |paths: &[&str]| json!({ "action": "Deny", "rules": [{ "to": [{ "paths": paths }] }] });
    in_force(&stage, &policy("live", deny(&["/else"])))?;
    stage.check("/else", ["403", "403", "403"])?;
    let before = denied()?;
    let (go, mut stay) = (Lasting::begin(&stage, "/go")?, Lasting::begin(&stage, "/stay")?);
    let have_begun = |requests: &[Lasting]| {
        eventually(SOON, "they have begun", || {
            requests.iter().try_for_each(|request| request.has_begun(&stage.running))
        })
    };
    have_begun(&go)?;
    have_begun(&stay)?;
    in_force(&stage, &policy("live", deny(&["/else", "/go/*"])))?;
    let count = go.len();
    go.into_iter().try_for_each(|request| request.ends(&stage.running))?;
    stay.iter_mut().try_for_each(|request| request.process.check_running())?;
    let counted = denied()? - before;
    ensure!(counted == count as f64, "{counted} of {count} count as denied");
    let lines = fs::read_to_string(&file)?;
    let audited = lines.lines().map(serde_json::from_str).collect::<Result<Vec<Value>, _>>()?;
    let audited =
        audited.iter().filter(|it| it["path"].as_str().is_some_and(|path| path.starts_with("/go/")));
    let audited: Vec<_> = audited.collect();
    ensure!(audited.len() == count, "{} of {count} are in the audit log", audited.len());
    for line in audited {
        let by = line["policy"].as_str().unwrap_or_default();
        ensure!(line["outcome"] == "denied" && by == "AuthorizationPolicy shop/live", "{line}");
    }
    // What began while nobody wanted to know of requests is not there to be asked about.
    stage.mesh.lab.delete(&policy("live", json!({})))?;
    eventually(SOON, "the policy is gone", || stage.check("/else", ["200", "200", "200"]))?;
    let unseen = Lasting::begin(&stage, "/unseen")?;
    have_begun(&unseen)?;
    in_force(&stage, &policy("live", deny(&["/else", "/unseen/*"])))?;
    for mut request in unseen {
        request.process.wait(Duration::from_secs(2)).with_context(|| request.whose.clone())?;
        eventually(SOON, "the application has seen it", || request.is_broken_off(&stage.running))?;
    }
    stage.check("/", ["200", "200", "200"])
}

/// An agent whose place another one has taken holds what it still carries to policies that came after that.
#[test]
fn what_a_replaced_agent_carries_is_held_to_the_policies_of_now() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-access-replaced", &[])?;
    let _server = serve_on(&stage.server, PORT)?;
    let talk = |client: &Pod| Talk::with(client, SocketAddr::new(stage.server.ip(), PORT));
    let [near, mut far, outside] = [talk(&stage.near)?, talk(&stage.far)?, talk(&stage.outside)?];
    let admin_address = Some("127.0.0.1:15030".to_owned());
    let options = AgentOptions { admin_address, ..options(&["--take-over", "--drain", "60s"]) };
    let next = stage.mesh.nodes[0].spawn_agent(options)?;
    let replaced = std::mem::replace(&mut stage.mesh.agents[0], next);
    eventually(SOON, "it has taken over", || {
        let said = replaced.process().log_tail(20);
        ensure!(said.contains("another agent has taken over"), "{said}");
        Ok(())
    })?;
    let has_ended = || {
        Ok::<_, anyhow::Error>(
            replaced.metrics()?.sum(CLOSED, &[("reason", "denied"), ("reporter", "destination")]),
        )
    };
    ensure!(has_ended()? == 0.0, "nothing is denied yet");
    in_force(&stage, &policy("who", json!({ "rules": [{ "from": [{ "serviceAccounts": ["far"] }] }] })))?;
    for talk in [near, outside] {
        talk.ends_somehow(Duration::from_secs(2))?;
    }
    far.goes_on()?;
    let ended = has_ended()?;
    ensure!(ended >= 2.0, "the agent that was replaced has ended {ended} connections: these were another's");
    in_force(&stage, &policy("who", json!({})))?;
    far.ends_somehow(Duration::from_secs(2))?;
    ensure!(has_ended()? > ended, "it has not ended the last one");
    Ok(())
}

/// What its policies say is not known any more, so nobody asks it anything, on connections that stand either.
#[test]
fn a_deleted_pod_that_still_runs_is_asked_nothing() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-access-deleted", &[])?;
    let admin = json!({ "action": "Deny", "rules": [{ "to": [{ "paths": ["/admin"] }] }] });
    in_force(&stage, &policy("admin", admin))?;
    let [.., (outside, url)] = stage.clients();
    let mut command = Command::new(binary("requests")?);
    command.args(["ask", &url, "--count", "40", "--pause-ms", "100"]);
    let mut asks = outside.spawn(command)?;
    let asked_for = || Ok::<_, anyhow::Error>(stage.mesh.agents[0].metrics()?.sum(REQUESTS, &[]));
    eventually(SOON, "it is asked", || {
        let count = asked_for()?;
        ensure!(count >= 5.0, "{count} requests");
        Ok(())
    })?;
    stage.server.delete()?;
    asks.wait(SOON)?;
    let asked: Asked = last_line(&asks.output())?;
    let (served, denied) = (of_status(&asked, 200), of_status(&asked, 403));
    ensure!(served >= 1 && denied >= 5 && served + denied == 40, "{served} served, {denied} denied");
    Ok(())
}

/// What is tried changes nothing and is told of; so is what is to be known; and what is denied, with what was in the way.
#[test]
fn what_policies_do_is_told() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let audit = tempfile::tempdir()?;
    let file = audit.path().join("audit.json");
    let stage = Stage::set("um-e2e-access-told", &["--audit-log", &file.display().to_string()])?;
    let agent = &stage.mesh.agents[0];
    let outcomes = |name: &str, outcome: &str| -> Result<f64> {
        let policy = format!("AuthorizationPolicy shop/{name}");
        Ok(agent.metrics()?.sum(OUTCOMES, &[("policy", &policy), ("outcome", outcome)]))
    };
    let lines = || -> Result<Vec<Value>> {
        fs::read_to_string(&file)?.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
    };
    let dry = json!({ "action": "Deny", "dryRun": true, "rules": [{ "to": [{ "paths": ["/old"] }] }] });
    in_force(&stage, &policy("dry", dry))?;
    let audited = json!({ "action": "Audit", "rules": [{ "to": [{ "paths": ["/money"] }] }] });
    in_force(&stage, &policy("seen", audited))?;
    stage.check("/old", ["200", "200", "200"])?;
    stage.check("/money", ["200", "200", "200"])?;
    ensure!(
        outcomes("dry", "would_deny")? == 6.0 && outcomes("seen", "audited")? == 6.0,
        "not all are counted"
    );
    let seen = eventually(SOON, "the audit log has them", || {
        let seen: Vec<Value> = lines()?
            .into_iter()
            .filter(|line| line["policy_audited"] == "AuthorizationPolicy shop/seen")
            .collect();
        ensure!(seen.len() == 6, "{seen:?}");
        Ok(seen)
    })?;
    for line in &seen {
        ensure!(line["outcome"] == "allowed" && line["path"] == "/money" && line["status"] == 200, "{line}");
    }
    let known = seen.iter().filter(|line| line["source_identity"].is_string()).count();
    ensure!(known == 4, "only who calls in plaintext has no identity: {seen:?}");

    let allow =
        json!({ "rules": [{ "from": [{ "serviceAccounts": ["near"] }], "to": [{ "methods": ["GET"] }] }] });
    in_force(&stage, &policy("allow", allow))?;
    ensure!(stage.each("/", &["--method", "POST"])? == ["403", "403", "broken"], "the method is not allowed");
    let denied = eventually(SOON, "the audit log has them", || {
        let denied: Vec<Value> = lines()?
            .into_iter()
            .filter(|line| line["outcome"] == "denied" && line["method"] == "POST")
            .collect();
        ensure!(denied.len() == 1, "{denied:?}");
        Ok(denied)
    })?;
    // Of who might have been let in with another method, what was in the way.
    let detail = denied[0]["policy_detail"].as_str().context("no detail")?;
    ensure!(detail.contains("shop/allow") && detail.contains("methods"), "{detail}");
    ensure!(agent.metrics()?.sum(REFUSED, &[("reason", "denied")]) >= 2.0, "refusals are not counted");
    Ok(())
}

/// A policy that cannot be used lets nobody in, and says why.
#[test]
fn a_policy_that_cannot_be_used_opens_nothing() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-access-invalid", &[])?;
    let wrong =
        policy("wrong", json!({ "rules": [{ "from": [{ "namespaces": ["shop"], "colour": "blue" }] }] }));
    stage.mesh.lab.apply(&wrong)?;
    eventually(SOON, "the policy denies all", || stage.check("/", ["403", "403", "broken"]))?;
    let log = stage.mesh.agents[0].process().output();
    ensure!(log.contains("spec.rules[0].from[0].colour") && log.contains("shop/wrong"), "{log}");
    let rejected = stage.mesh.agents[0].metrics()?.sum("undermesh_config_rejected_documents", &[]);
    ensure!(rejected >= 1.0, "it is not counted");
    stage.mesh.lab.delete(&wrong)?;
    eventually(SOON, "all are let in again", || stage.check("/", ["200", "200", "200"]))
}

/// Without the agent that knows the policies, nobody gets past it; nor does a port that is strict take plaintext.
#[test]
fn policies_hold_while_their_agent_is_down() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let mut stage = Stage::set("um-e2e-access-down", &[])?;
    let _server = serve_on(&stage.server, PORT)?;
    let strict = Manifest::new("undermesh.io/v1alpha1", "MeshPolicy", Some(SHOP), "modes").with(
        "spec",
        json!({ "mtls": { "mode": "Permissive", "ports": [{ "port": PORT, "mode": "Strict" }] } }),
    );
    in_force(&stage, &strict)?;
    let to = |port| SocketAddr::new(stage.server.ip(), port);
    eventually(SOON, "one port is strict", || {
        dial_at_once(&stage.outside, to(PORT), 1, 1)?.all_failed("ECONNREFUSED")
    })?;
    ensure!(stage.each("/", &[])? == ["200", "200", "200"], "the other port is not");
    for client in [&stage.near, &stage.far] {
        dial_at_once(client, to(PORT), 2, 1)?.all_served()?;
    }
    let spec = json!({ "rules": [{ "from": [{ "serviceAccounts": ["near"] }] }] });
    in_force(&stage, &policy("who", spec))?;
    ensure!(stage.each("/", &[])? == ["200", "403", "broken"], "the policy is not in force");
    stage.mesh.agents[0].kill();
    let url = format!("http://{}/", to(8080));
    eventually(SOON, "nobody is let in without an agent", || {
        for client in [&stage.outside, &stage.far, &stage.near] {
            let got = told(client, &url, &["--fresh"])?;
            ensure!(got == "broken" || got == "503", "{} gets {got}", client.name());
        }
        dial_at_once(&stage.outside, to(PORT), 1, 1)?.all_failed("ECONNREFUSED")
    })?;
    stage.mesh.restart(0, &[])?;
    eventually(SOON, "the policy is in force again", || {
        ensure!(stage.each("/", &[])? == ["200", "403", "broken"]);
        Ok(())
    })?;
    Ok(())
}
