//! What the agent tells of itself and of connections: pages, metrics, the access log, the user's commands.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use undermesh_tests::lab::{Metrics, Pod, Process, Response, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SOON, Talk, dial, dial_at_once, serve, undermesh};

const ADMIN: &str = undermesh_tests::lab::ADMIN_ADDRESS;

/// Bytes of one connection of `dial`, from the client and back: the line and its echo, the greeting before it.
const LINE: usize = "a line to be echoed\n".len();

struct Scene {
    mesh: Mesh,
    client: Pod,
    near: Pod,
    far: Pod,
    outsider: Pod,
    _running: Vec<Process>,
}

impl Scene {
    fn set(name: &str, args: &[&str]) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, args)?;
        let (client, near, far) = (mesh.pod(0, "client")?, mesh.pod(0, "near")?, mesh.pod(1, "far")?);
        let outsider = mesh.outsider(0, "outsider")?;
        let running = [&near, &far].map(serve).into_iter().collect::<Result<_>>()?;
        mesh.ready()?;
        eventually(SOON, "all pods are known", || {
            for agent in &mesh.agents {
                let config = agent.get("/debug/config")?.ok()?;
                ensure!(
                    serde_json::from_str::<Value>(&config)?["workloads"]
                        .as_array()
                        .is_some_and(|it| it.len() == 4)
                );
            }
            Ok(())
        })?;
        Ok(Self { mesh, client, near, far, outsider, _running: running })
    }

    fn page(&self, path: &str, accept: &str) -> Result<Response> {
        self.mesh.nodes[0].get(ADMIN, path, &[("Accept", accept)])
    }
}

#[test]
fn known_traffic_is_counted_exactly() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let scene = Scene::set("um-e2e-counts", &[])?;
    dial(&scene.client, scene.near.ip(), 7)?.all_served()?;
    dial(&scene.client, scene.far.ip(), 5)?.all_served()?;
    dial(&scene.outsider, scene.near.ip(), 3)?.all_served()?;
    // Nothing listens there: no upstream.
    dial_at_once(&scene.client, (scene.near.ip(), 1).into(), 2, 1)?.all_failed("ECONNRESET")?;

    let greeting = |server: &str, client: &Pod| format!("{server} {}\n", client.ip()).len();
    // reporter, client, server, security, connections, bytes back for each
    let expected = [
        (0, "source", "client", "near", "same_node", 7, greeting("near", &scene.client)),
        (0, "destination", "client", "near", "same_node", 7, greeting("near", &scene.client)),
        (0, "source", "client", "far", "mutual_tls", 5, greeting("far", &scene.client)),
        (1, "destination", "client", "far", "mutual_tls", 5, greeting("far", &scene.client)),
        (0, "destination", "outsider", "near", "plaintext", 3, greeting("near", &scene.outsider)),
    ];
    for (node, reporter, source, destination, security, count, greeting) in expected {
        let labels = [
            ("reporter", reporter),
            ("source_workload", source),
            ("destination_workload", destination),
            ("destination_namespace", "shop"),
            ("destination_service", "unknown"),
            ("security", security),
        ];
        let figures = [
            ("undermesh_tcp_connections_opened_total", count),
            ("undermesh_tcp_connections_closed_total", count),
            ("undermesh_tcp_connections_active", 0),
            ("undermesh_tcp_sent_bytes_total", count * LINE),
            ("undermesh_tcp_received_bytes_total", count * (LINE + greeting)),
        ];
        let what = format!("{reporter} {source} -> {destination} {security}: {figures:?}");
        scene.mesh.agents[node].wait_metrics(SOON, &what, |m| {
            figures.iter().all(|(name, value)| {
                m.select(name, &labels).count() == 1 && m.sum(name, &labels) == *value as f64
            })
        })?;
    }
    let metrics = scene.mesh.agents[0].metrics()?;
    for (name, reason, count) in [
        ("undermesh_tcp_connections_closed_total", "done", 22.0),
        ("undermesh_tcp_connections_refused_total", "connect_refused", 2.0),
    ] {
        let (all, of_reason) = (metrics.sum(name, &[]), metrics.sum(name, &[("reason", reason)]));
        ensure!(
            all == count && of_reason == count,
            "{name}: {all}, {of_reason} of them {reason}, not {count}"
        );
    }
    for (name, value) in [
        ("undermesh_pods_enrolled", 2.0),
        ("undermesh_config_rejected_documents", 0.0),
        ("undermesh_metrics_series_overflow_total", 0.0),
        ("undermesh_access_log_dropped_total", 0.0),
        ("undermesh_build_info", 1.0),
    ] {
        ensure!(metrics.sum(name, &[]) == value, "{name} is {}, not {value}", metrics.sum(name, &[]));
    }
    for name in ["process_resident_memory_bytes", "process_open_fds", "process_cpu_seconds_total"] {
        ensure!(metrics.sum(name, &[]) > 0.0, "no {name}");
    }
    // The figures of a pod's sockets go with the pod.
    let of_near = [("pod_name", "near")];
    ensure!(metrics.sum("undermesh_pod_tcp_accepted_total", &of_near) >= 10.0, "near accepted nothing");
    let Scene { mesh, near, .. } = scene;
    near.remove()?;
    let gone = |m: &Metrics| m.select("undermesh_pod_tcp_accepted_total", &of_near).count() == 0;
    mesh.agents[0].wait_metrics(SOON, "the figures of the pod's sockets are gone", gone)?;
    Ok(())
}

#[test]
fn the_metrics_page_speaks_both_formats() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let scene = Scene::set("um-e2e-formats", &[])?;
    dial(&scene.client, scene.near.ip(), 2)?.all_served()?;
    let content_type = |page: &Response| -> String {
        let line = page.head.lines().find(|line| line.to_lowercase().starts_with("content-type:"));
        line.and_then(|line| line.split_once(": ")).map(|(_, value)| value.to_owned()).unwrap_or_default()
    };
    let plain = scene.page("/metrics", "text/plain")?;
    ensure!(content_type(&plain).starts_with("text/plain; version=0.0.4"), "it is {}", content_type(&plain));
    parse_strictly(&plain.ok()?, false)?;
    let open = scene.page("/metrics", "application/openmetrics-text;version=1.0.0,text/plain;q=0.5")?;
    let kind = content_type(&open);
    ensure!(kind.starts_with("application/openmetrics-text; version=1.0.0"), "it is {kind}");
    parse_strictly(&open.ok()?, true)
}

/// Every sample belongs to the family announced last, every family is announced once, no sample comes twice, every
/// value is a number, and the page ends as its format demands.
fn parse_strictly(page: &str, openmetrics: bool) -> Result<()> {
    let (mut families, mut samples) = (BTreeSet::new(), BTreeSet::new());
    let (mut family, mut kind) = (String::new(), String::new());
    ensure!(page.ends_with("# EOF\n") == openmetrics, "the page ends with {:?}", page.lines().last());
    ensure!(page.ends_with('\n'), "the last line has no end");
    for line in page.lines().filter(|line| *line != "# EOF") {
        let bad = || format!("in the line {line:?}");
        if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, what) = rest.split_once(' ').with_context(bad)?;
            ensure!(families.insert(name.to_owned()), "announced twice {}", bad());
            ensure!(["counter", "gauge", "histogram"].contains(&what), "an unknown type {}", bad());
            (family, kind) = (name.to_owned(), what.to_owned());
            continue;
        }
        if line.starts_with("# HELP ") || (openmetrics && line.starts_with("# UNIT ")) {
            continue;
        }
        ensure!(!line.starts_with('#') && !line.is_empty(), "no comment is expected {}", bad());
        let parsed = Metrics::parse(line);
        let [sample] = &parsed.samples[..] else { bail!("no sample {}", bad()) };
        let suffixes: &[&str] = match (kind.as_str(), openmetrics) {
            ("counter", true) => &["_total"],
            ("histogram", _) => &["_bucket", "_sum", "_count"],
            _ => &[""],
        };
        let belongs = suffixes.iter().any(|suffix| sample.name == format!("{family}{suffix}"));
        ensure!(belongs, "a sample of no {kind} {family} {}", bad());
        ensure!(samples.insert(format!("{} {:?}", sample.name, sample.labels)), "a sample twice {}", bad());
        ensure!(kind != "counter" || sample.name.ends_with("_total"), "a counter without _total {}", bad());
        ensure!(sample.value.is_finite() && sample.value >= 0.0, "an odd value {}", bad());
    }
    ensure!(samples.len() > 30, "only {} samples", samples.len());
    Ok(())
}

#[test]
fn pages_and_commands_show_what_is_there() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let scene = Scene::set("um-e2e-pages", &[])?;
    let talk = Talk::begin(&scene.client, scene.near.ip())?;
    let json = |path: &str| -> Result<Value> {
        let page = scene.mesh.agents[0].get(path)?.ok()?;
        serde_json::from_str(&page).with_context(|| format!("{path} says {page}"))
    };
    for path in ["/healthz", "/readyz"] {
        scene.mesh.agents[0].get(path)?.ok()?;
    }
    ensure!(scene.mesh.agents[0].get("/none")?.status == 404, "/none is there");

    let config = json("/debug/config")?;
    let pods = config["workloads"].as_array().context("no workloads")?;
    ensure!(pods.len() == 4 && config["node"] == "node1", "the configuration is {config:#}");
    let text = config.to_string().to_lowercase();
    for secret in ["private key", "begin rsa", "password", "token"] {
        ensure!(!text.contains(secret), "`{secret}` is in the configuration");
    }
    for (path, parts) in [("/debug/status", 2), ("/debug/pods", 2)] {
        let shown = json(path)?;
        let pods = shown["pods"].as_array().with_context(|| format!("{path} has no pods: {shown}"))?;
        let enrolled = pods.iter().filter(|pod| pod["state"] == "enrolled").count();
        ensure!(enrolled == parts, "{path} says {shown:#}");
    }
    let connections = json("/debug/connections")?;
    let open = connections["connections"].as_array().context("no connections")?;
    ensure!(open.len() == 2, "one connection is seen from both sides: {connections:#}");
    for connection in open {
        let ends = (&connection["source"]["pod"], &connection["destination"]["pod"]);
        ensure!(ends.0 == "client" && ends.1 == "near", "the connection is {connection:#}");
        ensure!(connection["security"] == "same_node", "the connection is {connection:#}");
    }

    let node = &scene.mesh.nodes[0];
    let table = undermesh(node, &["connections"])?.success()?;
    ensure!(table.contains("shop/client") && table.contains("shop/near"), "connections shows\n{table}");
    let status = undermesh(node, &["status"])?.success()?;
    ensure!(status.contains("on node node1: ready"), "status shows\n{status}");
    for command in ["connections", "status"] {
        let output = undermesh(node, &[command, "--output", "json"])?.success()?;
        serde_json::from_str::<Value>(&output).with_context(|| format!("{command} says {output}"))?;
        let nobody = undermesh(node, &[command, "--admin-address", "127.0.0.1:1"])?;
        let told = nobody.stderr.contains("no agent at 127.0.0.1:1") && nobody.status.code() == Some(1);
        ensure!(told, "{command} without an agent says {}", nobody.stderr);
    }
    talk.end()?;
    eventually(SOON, "the connection is gone", || {
        let table = undermesh(node, &["connections"])?.success()?;
        ensure!(table == "no open connections\n", "connections shows\n{table}");
        Ok(())
    })
}

#[test]
fn the_access_log_has_a_line_for_each_connection() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let file = "/run/um-e2e-access/log/access.json";
    let scene = Scene::set("um-e2e-access", &["--access-log", "json", "--access-log-file", file])?;
    dial(&scene.client, scene.far.ip6(), 1)?.all_served()?;
    dial_at_once(&scene.client, (scene.near.ip(), 1).into(), 1, 1)?.all_failed("ECONNRESET")?;
    // Both agents append to the one file: the source's and the destination's line, and the refused one's.
    let lines: Vec<Value> = eventually(SOON, "the lines are written", || {
        let text = fs::read_to_string(file)?;
        ensure!(text.lines().count() == 3 && text.ends_with('\n'), "the log is\n{text}");
        text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
    })?;
    let page = include_str!("../../../docs/metrics.md");
    let documented: BTreeSet<&str> = page
        .split_once("## Access log")
        .context("docs/metrics.md has no part on the access log")?
        .1
        .lines()
        // Further fields are those of requests.
        .take_while(|line| !line.starts_with("### "))
        .filter(|line| line.starts_with("| `"))
        .flat_map(|line| line.split('|').nth(1).unwrap_or_default().split('`').skip(1).step_by(2))
        .collect();
    for line in &lines {
        let fields: BTreeSet<&str> =
            line.as_object().context("no object")?.keys().map(String::as_str).collect();
        ensure!(fields == documented, "the fields are {fields:#?}, documented are {documented:#?}");
    }
    let find = |key: &str, value: &str| {
        let found = lines.iter().find(|line| line[key] == value);
        found.with_context(|| format!("no line with {key} {value}: {lines:#?}"))
    };
    for reporter in ["source", "destination"] {
        let of = |line: &&Value| line["reporter"] == reporter && line["outcome"] == "closed";
        let line = lines.iter().find(of).with_context(|| format!("no line of the {reporter}: {lines:#?}"))?;
        ensure!(line["reason"] == "done" && line["sent_bytes"] == LINE, "the line is {line:#}");
        ensure!(line["source_pod"] == "client" && line["destination_pod"] == "far", "the line is {line:#}");
    }
    let refused = find("outcome", "refused")?;
    ensure!(refused["reason"] == "connect_refused" && refused["destination_pod"] == "near", "{refused:#}");
    Ok(())
}
