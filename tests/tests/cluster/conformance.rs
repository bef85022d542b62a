//! The Gateway API's own conformance tests for meshes, on a cluster with the mesh: every test of both profiles, none left out. They
//! do not look at the status of routes, so that is looked at here.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::cluster::image::{Image, Layer};
use undermesh_tests::lab::{eventually, run_here};
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::installed::{self, A_WHILE};
use crate::{kit, status};

/// Namespaces of the suite for gateways alone, in which its set-up waits for pods all the same (of 1.6.1).
const WAITED_FOR: [&str; 2] = ["gateway-conformance-app-backend", "gateway-conformance-web-backend"];

/// Two dozen tests, of which each waits half a minute at most for one thing or another.
const LIMIT: Duration = Duration::from_secs(1_200);
/// How many tests of a mesh the suite has.
const TESTS: usize = 22;

#[test]
fn the_gateway_apis_tests_of_meshes_pass() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-e2e-conform", 2, |cluster| {
        import_echo(cluster)?;
        kit::import_image(cluster)?;
        let definitions = fs::read_to_string(cluster.tools().program("gateway-api.yaml"))?;
        cluster.apply(&definitions)?;
        installed::install(cluster, &[])?;
        a_routes_status_says_what_becomes_of_it(cluster)?;
        wait_where_nobody_is(cluster)?;
        let report = report();
        let outcome = run(cluster, &report);
        if outcome.is_ok() {
            eprintln!("the report is in {}", report.display());
        }
        outcome
    })
}

/// The programs that the suite's pods run and are asked by, with a certificate that nobody checks.
fn import_echo(cluster: &Cluster) -> Result<()> {
    let program = |name: &str| cluster.tools().program(name);
    let certificate = rcgen::generate_simple_self_signed(["echo".to_owned()])?;
    let layer = Layer::default()
        .file("/usr/local/bin/client", 0o755, &program("echo-client"))?
        .file("/usr/local/bin/server", 0o755, &program("echo-server"))?
        .text("/cert.crt", 0o644, &certificate.cert.pem())?
        .text("/cert.key", 0o644, &certificate.signing_key.serialize_pem())?;
    let mut suite = cluster.command(program("conformance"));
    suite.arg("images");
    let images = run_here(suite, installed::LIMIT)?.success()?;
    ensure!(
        images.lines().count() == 1,
        "the suite runs other images than the one that is made here: {images}"
    );
    let tar = tempfile::NamedTempFile::new()?;
    Image::new(images.trim()).layer(layer).entrypoint(&["/usr/local/bin/server"]).write(tar.path())?;
    cluster.import(tar.path())
}

fn a_routes_status_says_what_becomes_of_it(cluster: &Cluster) -> Result<()> {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": { "name": "web", "namespace": "default" },
        "spec": { "selector": { "app": "web" }, "ports": [{ "port": 80 }] },
    });
    cluster.apply(&service.to_string())?;
    let parent = |name: &str| json!({ "group": "", "kind": "Service", "name": name, "port": 80 });
    let route = |parents: &[&str], rule: Value| {
        let parents: Vec<_> = parents.iter().map(|name| parent(name)).collect();
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": { "name": "web", "namespace": "default" },
            "spec": { "parentRefs": parents, "rules": [rule] },
        })
    };
    let backend = json!({ "backendRefs": [{ "name": "web-v2", "port": 80 }] });
    cluster.apply(&route(&["web", "none"], backend.clone()).to_string())?;
    let accepted = "web: Accepted, not ResolvedRefs for BackendNotFound";
    says(
        cluster,
        &[accepted, "none: not Accepted for NoMatchingParent, not ResolvedRefs for BackendNotFound"],
    )?;
    // A parent that goes, a Service that comes, and a version that cannot be used.
    cluster.apply(&route(&["web"], backend).to_string())?;
    says(cluster, &[accepted])?;
    let mut second = service;
    second["metadata"]["name"] = json!("web-v2");
    cluster.apply(&second.to_string())?;
    says(cluster, &["web: Accepted, ResolvedRefs"])?;
    let extension = json!({ "group": "example.com", "kind": "Filter", "name": "any" });
    let filter = json!({ "type": "ExtensionRef", "extensionRef": extension });
    let unsupported = route(&["web"], json!({ "filters": [filter] })).to_string();
    let said = cluster.try_apply(&unsupported)?;
    ensure!(said.stderr.contains("Warning: undermesh: spec.rules[0].filters[0]"), "{said:?}");
    said.success()?;
    says(cluster, &["web: not Accepted for UnsupportedValue"])?;
    cluster.kubectl(&["delete", "httproute/web", "service/web", "service/web-v2"])?;
    Ok(())
}

fn says(cluster: &Cluster, expected: &[&str]) -> Result<()> {
    status::says(cluster, &["httproute", "web"], expected)
}

fn wait_where_nobody_is(cluster: &Cluster) -> Result<()> {
    let node = &cluster.node_names()?[0];
    for namespace in WAITED_FOR {
        cluster.kubectl(&["create", "namespace", namespace])?;
        let mut pod = kit::pod("waited-for", node, "while :; do sleep 1; done");
        pod["metadata"]["namespace"] = json!(namespace);
        cluster.apply(&pod.to_string())?;
        eventually(A_WHILE, "it runs", || {
            let pod = cluster.get(&["pod", "waited-for", "--namespace", namespace])?;
            ensure!(pod["status"]["phase"] == "Running", "{}", pod["status"]);
            Ok(())
        })?;
    }
    Ok(())
}

fn run(cluster: &Cluster, report: &Path) -> Result<()> {
    let mut suite = cluster.command(cluster.tools().program("conformance"));
    suite.arg("--report-output").arg(report).args(["--version", env!("CARGO_PKG_VERSION")]);
    suite.args(["-test.v", "-test.timeout=30m"]);
    let output = run_here(suite, LIMIT)?;
    let log = report.with_extension("log");
    fs::write(&log, &output.stdout)?;
    // Those of gateways are left out; of a mesh's each has passed.
    let passed =
        output.stdout.lines().filter(|line| line.starts_with("    --- PASS: Conformance/Mesh")).count();
    output.success().with_context(|| format!("what it did is in {}", log.display()))?;
    ensure!(passed == TESTS, "{passed} tests passed; what it did is in {}", log.display());
    Ok(())
}

fn report() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("conformance-report.yaml")
}
