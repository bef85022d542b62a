//! The Gateway API's kinds beside HTTPRoute and GRPCRoute, and the fields of its experimental channel, at a real API server: what is
//! said of them there, and that agents do it. All that they can be made to do is tested without a cluster.

use std::fs;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::cluster::app::{REQUESTS, TRAFFIC};
use undermesh_tests::lab::eventually;
use undermesh_tests::pki::Authority;

use crate::installed::{A_WHILE, PORT, SHOP, container, joins, pod, servers, service, told};
use crate::status;

/// The server that speaks TLS.
const NAME: &str = "pay.test";

/// Has the API server know them all.
pub(crate) fn define(cluster: &Cluster) -> Result<()> {
    cluster.apply(&fs::read_to_string(cluster.tools().program("gateway-api-experimental.yaml"))?)?;
    Ok(())
}

/// Once they are defined, the mesh is installed, and there is a shop in it.
pub(crate) fn each_is_in_force_and_told_of(cluster: &Cluster) -> Result<()> {
    let client = servers(cluster)?.swap_remove(0).0;
    connections_follow_a_tcp_route(cluster, &client)?;
    let authority = Authority::stranger(NAME)?;
    serve_in_tls(cluster, &authority)?;
    requests_go_in_tls(cluster, &client, &authority)?;
    requests_stay_with_their_server(cluster, &client)?;
    requests_are_sent_again(cluster, &client)?;
    streams_of_tls_have_a_route(cluster)
}

fn connections_follow_a_tcp_route(cluster: &Cluster, client: &str) -> Result<()> {
    let serve = [TRAFFIC, "serve", "--name", "other", "--port", &PORT.to_string()];
    let mut other = pod("other", cluster.nodes()[1].name(), &serve);
    other["metadata"]["labels"] = json!({ "app": "other" });
    cluster.apply(&other.to_string())?;
    cluster.apply(&service_of("other", &json!([{ "port": 80, "targetPort": PORT }])))?;
    joins(cluster, "other")?;
    let to = service(cluster)?;
    let served_by = |name: &str| {
        eventually(A_WHILE, "connections are led there", || {
            let told = told(cluster, client, &[TRAFFIC, "dial", "--count", "4", &to])?;
            ensure!(told["served"] == json!({ name: 4 }), "{told}");
            Ok(())
        })
    };
    served_by("web")?;
    let backend = json!([{ "backendRefs": [{ "name": "other", "port": 80 }] }]);
    cluster.apply(&route("TCPRoute", "web", 80, &json!({ "rules": backend })))?;
    status::says(cluster, &["tcproute", "web", "--namespace", SHOP], &["web: Accepted, ResolvedRefs"])?;
    served_by("other")?;
    cluster.kubectl(&["delete", "tcproute", "web", "--namespace", SHOP])?;
    served_by("web")
}

/// A Service whose server speaks nothing but TLS, and whose clients do not.
fn serve_in_tls(cluster: &Cluster, authority: &Authority) -> Result<()> {
    let (certificate, key) = authority.server(NAME)?;
    let secret = json!({
        "apiVersion": "v1", "kind": "Secret", "metadata": { "name": "pay", "namespace": SHOP },
        "stringData": { "pay.pem": certificate + &key },
    });
    cluster.apply(&secret.to_string())?;
    let mut server = pod("pay", cluster.nodes()[1].name(), &[]);
    server["metadata"]["labels"] = json!({ "app": "pay" });
    let mut main = container(&[REQUESTS, "serve", "--name", "pay", "--tls", "/tls/pay.pem"]);
    main["volumeMounts"] = json!([{ "name": "tls", "mountPath": "/tls" }]);
    server["spec"]["containers"] = json!([main]);
    server["spec"]["volumes"] = json!([{ "name": "tls", "secret": { "secretName": "pay" } }]);
    cluster.apply(&server.to_string())?;
    cluster.apply(&service_of("pay", &json!([{ "name": "http", "port": 80, "targetPort": 8080 }])))?;
    joins(cluster, "pay")
}

fn requests_go_in_tls(cluster: &Cluster, client: &str, authority: &Authority) -> Result<()> {
    let validation = json!({ "hostname": NAME, "caCertificateRefs": [{ "group": "", "kind": "ConfigMap", "name": "pay" }] });
    let spec = json!({ "targetRefs": [{ "group": "", "kind": "Service", "name": "pay" }], "validation": validation });
    cluster.apply(&object("gateway.networking.k8s.io/v1", "BackendTLSPolicy", "pay", &spec))?;
    let policy = ["backendtlspolicy", "pay", "--namespace", SHOP];
    let missing = "pay: not Accepted for NoValidCACertificate, not ResolvedRefs for InvalidCACertificateRef";
    status::says(cluster, &policy, &[missing])?;
    let roots = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": { "name": "pay", "namespace": SHOP },
        "data": { "ca.crt": authority.root() },
    });
    cluster.apply(&roots.to_string())?;
    status::says(cluster, &policy, &["pay: Accepted, ResolvedRefs"])?;
    answers(cluster, client, |answer| {
        ensure!(answer["status"] == 200 && answer["saw"]["asked_for"] == NAME, "{answer}");
        Ok(())
    })
}

fn requests_stay_with_their_server(cluster: &Cluster, client: &str) -> Result<()> {
    let targets = json!([{ "group": "", "kind": "Service", "name": "pay" }]);
    let session = json!({ "sessionName": "visit", "type": "Cookie" });
    let spec = json!({ "targetRefs": targets, "sessionPersistence": session });
    cluster.apply(&object("gateway.networking.x-k8s.io/v1alpha1", "XBackendTrafficPolicy", "pay", &spec))?;
    status::says(cluster, &["xbackendtrafficpolicy", "pay", "--namespace", SHOP], &["pay: Accepted"])?;
    answers(cluster, client, |answer| {
        let cookie = answer["headers"]["set-cookie"].as_str().unwrap_or_default();
        ensure!(cookie.starts_with("visit="), "{answer}");
        Ok(())
    })
}

/// By a field of the experimental channel.
fn requests_are_sent_again(cluster: &Cluster, client: &str) -> Result<()> {
    let header = json!({ "type": "ResponseHeaderModifier", "responseHeaderModifier": { "set": [{ "name": "x-route", "value": "pay" }] } });
    let rule = json!({
        "filters": [header], "retry": { "codes": [503], "attempts": 2 },
        "backendRefs": [{ "name": "pay", "port": 80 }],
    });
    cluster.apply(&route("HTTPRoute", "pay", 80, &json!({ "rules": [rule] })))?;
    status::says(cluster, &["httproute", "pay", "--namespace", SHOP], &["pay: Accepted, ResolvedRefs"])?;
    answers(cluster, client, |answer| {
        ensure!(answer["headers"]["x-route"] == "pay", "{answer}");
        Ok(())
    })
}

fn streams_of_tls_have_a_route(cluster: &Cluster) -> Result<()> {
    let rule = json!([{ "backendRefs": [{ "name": "nobody", "port": 443 }] }]);
    cluster.apply(&service_of("shut", &json!([{ "name": "tls", "port": 443, "targetPort": 8080 }])))?;
    cluster.apply(&route("TLSRoute", "shut", 443, &json!({ "hostnames": [NAME], "rules": rule })))?;
    let expected = "shut: Accepted, not ResolvedRefs for BackendNotFound";
    status::says(cluster, &["tlsroute", "shut", "--namespace", SHOP], &[expected])?;
    cluster.apply(&service_of("nobody", &json!([{ "name": "tls", "port": 443, "targetPort": 8080 }])))?;
    status::says(cluster, &["tlsroute", "shut", "--namespace", SHOP], &["shut: Accepted, ResolvedRefs"])
}

/// Waits until requests to the server that speaks TLS are answered so.
fn answers(cluster: &Cluster, client: &str, expected: impl Fn(&Value) -> Result<()>) -> Result<()> {
    let service = cluster.get(&["service", "pay", "--namespace", SHOP])?;
    let url = format!("http://{}:80/", service["spec"]["clusterIP"].as_str().unwrap_or_default());
    eventually(A_WHILE, "requests are answered so", || {
        expected(&told(cluster, client, &[REQUESTS, "ask", &url])?["last"])
    })
}

fn service_of(name: &str, ports: &Value) -> String {
    object("v1", "Service", name, &json!({ "selector": { "app": name }, "ports": ports }))
}

/// A route of this Service's port, of the same name.
fn route(kind: &str, service: &str, port: u16, spec: &Value) -> String {
    let mut spec = spec.clone();
    spec["parentRefs"] = json!([{ "group": "", "kind": "Service", "name": service, "port": port }]);
    object("gateway.networking.k8s.io/v1", kind, service, &spec)
}

fn object(version: &str, kind: &str, name: &str, spec: &Value) -> String {
    let metadata = json!({ "name": name, "namespace": SHOP });
    json!({ "apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec }).to_string()
}
