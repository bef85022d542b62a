//! TLS that agents begin with servers because a BackendTLSPolicy asks for it: wherever the server is, and with no other than it names.

use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::lab::{Manifest, Pod, PodSpec, Process, eventually};
use undermesh_tests::pki::{Authority, Leaf, SHOP_ID};
use undermesh_tests::require;
use undermesh_tests::require::Feature;

use crate::kit::{Mesh, SHOP, SOON};
use crate::requests::{Asked, ask, serve_requests_with};
use crate::traffic::in_force;

const NAME: &str = "pay.test";
const REQUESTS: &str = "undermesh_http_requests_total";

/// A client, and servers behind a Service each: on the client's node, on another one, and there out of the mesh. Their port 443 leads
/// to one of TLS, their port 80 to one without.
struct Stage {
    mesh: Mesh,
    client: Pod,
    authority: Authority,
    places: [Place; 3],
    _running: Vec<Process>,
}

struct Place {
    namespace: &'static str,
    name: &'static str,
    address: IpAddr,
}

impl Stage {
    fn set(name: &str, certificate: impl Fn(&Authority, &Mesh) -> Result<PathBuf>) -> Result<Self> {
        let mut mesh = Mesh::start(name, 2, &["--connect-timeout", "60"])?;
        let client = mesh.pod(0, "client")?;
        let authority = Authority::stranger("pay.test")?;
        let tls = certificate(&authority, &mesh)?;
        let place = |namespace, name, last| Place { namespace, name, address: [10, 96, 0, last].into() };
        let places = [place(SHOP, "near", 61), place(SHOP, "far", 62), place("outside", "out", 63)];
        let spec = |place: &Place| PodSpec::new(place.namespace, place.name).label("app", place.name);
        let servers = [
            mesh.add(0, spec(&places[0]))?,
            mesh.add(1, spec(&places[1]))?,
            mesh.nodes[1].add_pod(spec(&places[2]))?,
        ];
        let mut running = Vec::new();
        for (place, server) in places.iter().zip(&servers) {
            let tls = tls.display().to_string();
            running.push(serve_requests_with(server, &["--tls", &tls])?);
            running.push(serve_requests_with(server, &["--port", "8081"])?);
            server.wait_listening(8081)?;
            let ports = json!([
                { "name": "https", "port": 443, "targetPort": 8080 },
                { "name": "plain", "port": 80, "targetPort": 8081 },
            ]);
            let service =
                Manifest::service(place.namespace, place.name, &[place.address], &[], &[("app", place.name)]);
            mesh.lab.apply(&service.with("spec.ports", ports))?;
        }
        mesh.ready()?;
        Ok(Self { mesh, client, authority, places, _running: running })
    }

    /// Has the ports of this name be spoken to in TLS at all places.
    fn encrypt(&self, section: &str, validation: &Value) -> Result<()> {
        for place in &self.places {
            in_force(&self.mesh, &policy(place, section, validation))?;
        }
        Ok(())
    }

    /// Has the authority's certificates be those of this one.
    fn believe(&self, authority: &Authority) -> Result<()> {
        for place in &self.places {
            self.mesh.lab.apply(&config_map(place, authority.root()))?;
        }
        Ok(())
    }

    fn ask(&self, place: &Place, port: u16, args: &[&str]) -> Result<Asked> {
        ask(&self.client, &format!("http://{}/", SocketAddr::new(place.address, port)), args)
    }

    /// Waits until requests are answered so at all places, in both versions of HTTP, and with this in the answer's `Proxy-Status`.
    fn refused(&self, status: u64, why: &[&str]) -> Result<()> {
        for place in &self.places {
            for version in [&[][..], &["--http2"]] {
                eventually(SOON, "requests are refused", || {
                    let answer = self.ask(place, 443, version)?.answered(status)?;
                    let said = answer["headers"]["proxy-status"].as_str().unwrap_or_default();
                    ensure!(why.iter().all(|why| said.contains(why)), "{said}");
                    Ok(())
                })
                .with_context(|| format!("at {} {version:?}", place.name))?;
            }
        }
        Ok(())
    }

    /// Waits until requests are answered by servers at all places.
    fn answered(&self) -> Result<()> {
        for place in &self.places {
            for version in [&[][..], &["--http2"]] {
                eventually(SOON, "requests are answered", || self.ask(place, 443, version)?.answered(200))
                    .with_context(|| format!("at {} {version:?}", place.name))?;
            }
        }
        Ok(())
    }

    fn counted(&self, reason: &str) -> Result<f64> {
        Ok(self.mesh.agents[0].metrics()?.sum(REQUESTS, &[("reason", reason), ("reporter", "source")]))
    }
}

fn policy(place: &Place, section: &str, validation: &Value) -> Manifest {
    let target = json!([{ "group": "", "kind": "Service", "name": place.name, "sectionName": section }]);
    Manifest::new("gateway.networking.k8s.io/v1", "BackendTLSPolicy", Some(place.namespace), place.name)
        .with("spec.targetRefs", target)
        .with("spec.validation", validation.clone())
}

fn config_map(place: &Place, certificates: &str) -> Manifest {
    Manifest::new("v1", "ConfigMap", Some(place.namespace), "ca")
        .with("data", json!({ "ca.crt": certificates }))
}

fn certificate_for_name(authority: &Authority, mesh: &Mesh) -> Result<PathBuf> {
    let (certificate, key) = authority.server(NAME)?;
    let file = mesh.lab.dir().join("pay.pem");
    fs::write(&file, certificate + &key)?;
    Ok(file)
}

/// By the ConfigMap `ca`.
fn for_host(hostname: &str) -> Value {
    json!({ "caCertificateRefs": [{ "group": "", "kind": "ConfigMap", "name": "ca" }], "hostname": hostname })
}

#[test]
fn requests_go_in_tls_wherever_the_server_is() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-tls", certificate_for_name)?;
    stage.believe(&stage.authority)?;
    stage.encrypt("https", &for_host(NAME))?;
    stage.answered()?;
    for place in &stage.places {
        for (args, version, scheme) in [(&[][..], "HTTP/1.1", "/"), (&["--http2"], "HTTP/2.0", "https://")] {
            let args = [args, &["--host", "shop.test", "--count", "20"]].concat();
            let asked = stage.ask(place, 443, &args)?;
            asked.all(200)?;
            let saw = asked.saw()?;
            let target = saw["target"].as_str().unwrap_or_default();
            ensure!(
                saw["asked_for"] == NAME && saw["version"] == version && target.starts_with(scheme),
                "at {}: {saw}",
                place.name
            );
            // The server sees the client's address and the host that was asked for, as without TLS.
            ensure!(saw["peer"] == json!(stage.client.ip()), "at {}: {saw}", place.name);
        }
        // Nobody asks for TLS on the other port.
        let saw = stage.ask(place, 80, &[])?.saw()?;
        ensure!(saw["asked_for"].is_null(), "{saw}");
    }
    // Connections are used again, each by the requests of one worker thread and one version of HTTP: the server counts them.
    let saw = stage.ask(&stage.places[1], 443, &["--count", "30"])?.saw()?;
    ensure!(saw["connection"].as_u64().is_some_and(|number| number < 8), "{saw}");
    // Without the policy nobody speaks TLS for the client, whose own words the server does not understand.
    stage.mesh.lab.delete(&policy(&stage.places[0], "https", &for_host(NAME)))?;
    eventually(SOON, "requests go as they come", || {
        let asked = stage.ask(&stage.places[0], 443, &[])?;
        ensure!(asked.by_status.is_empty(), "still answered: {asked:?}");
        Ok(())
    })
}

#[test]
fn servers_that_are_not_what_the_policy_asks_for_get_no_request() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage = Stage::set("um-e2e-tls-wrong", certificate_for_name)?;
    // Never in plaintext, whatever is missing.
    stage.encrypt("https", &for_host(NAME))?;
    stage.refused(500, &["error=proxy_configuration_error", "there is no ConfigMap"])?;
    ensure!(stage.counted("invalid_backend")? > 0.0, "nothing is counted");
    let stranger = Authority::stranger("elsewhere.test")?;
    stage.believe(&stranger)?;
    stage.refused(502, &["error=tls_certificate_error", "its certificate is refused"])?;
    ensure!(stage.counted("certificate_refused")? > 0.0, "nothing is counted");
    // Replaced, it is in force at once.
    stage.believe(&stage.authority)?;
    stage.answered()?;
    stage.encrypt("https", &for_host("other.test"))?;
    stage.refused(502, &["error=tls_certificate_error", NAME])?;
    let mut unknown = for_host(NAME);
    unknown["wellKnownCACertificates"] = "System".into();
    stage.encrypt("https", &unknown)?;
    stage.refused(500, &["error=proxy_configuration_error", "says something that cannot be used"])?;
    stage.encrypt("https", &for_host(NAME))?;
    stage.answered()?;
    for place in &stage.places {
        stage.mesh.lab.apply(&config_map(place, "no certificate"))?;
    }
    stage.refused(500, &["error=proxy_configuration_error", "there is no certificate"])?;
    // A server that speaks no TLS.
    stage.believe(&stage.authority)?;
    stage.encrypt("plain", &for_host(NAME))?;
    for place in &stage.places {
        eventually(SOON, "requests are refused", || {
            let answer = stage.ask(place, 80, &[])?.answered(502)?;
            let said = answer["headers"]["proxy-status"].as_str().unwrap_or_default().to_owned();
            ensure!(said.contains("error=tls_protocol_error"), "{said}");
            Ok(())
        })
        .with_context(|| format!("at {}", place.name))?;
    }
    ensure!(stage.counted("tls_failed")? > 0.0, "nothing is counted");
    Ok(())
}

#[test]
fn servers_may_be_known_by_other_names() -> Result<()> {
    require!(Feature::Lab, Feature::Agent);
    let stage =
        Stage::set("um-e2e-tls-names", |authority, mesh| authority.sign(mesh.lab.dir(), "pay", Leaf::GOOD))?;
    stage.believe(&stage.authority)?;
    let named = |names: Value| {
        let mut validation = for_host(NAME);
        validation["subjectAltNames"] = names;
        validation
    };
    // Its certificate does not have the name that it is asked for.
    stage.encrypt("https", &for_host(NAME))?;
    stage.refused(502, &["error=tls_certificate_error"])?;
    let host = json!({ "type": "Hostname", "hostname": NAME });
    stage.encrypt("https", &named(json!([host, { "type": "URI", "uri": SHOP_ID }])))?;
    stage.answered()?;
    let other = json!({ "type": "URI", "uri": format!("{SHOP_ID}s") });
    stage.encrypt("https", &named(json!([other])))?;
    stage.refused(502, &["error=tls_certificate_error", "none of the names", SHOP_ID])
}
