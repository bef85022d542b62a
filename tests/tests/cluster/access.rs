//! AuthorizationPolicies and MeshPolicies on real pods, by a real API server: who is let in, from the pod's node and from another one, by
//! each protocol and both families of addresses; and the ways past them for which it takes a real node.

use std::net::{IpAddr, SocketAddr};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::cluster::app::{REQUESTS, TRAFFIC};
use undermesh_tests::issuer::{SigningKey, key_set};
use undermesh_tests::lab::eventually;
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::attacker::{self, Attacker};
use crate::installed::{self, A_WHILE, PORT, SHOP, SYSTEM, container, counted};
use crate::kit;
use crate::security::{AUTHORIZATION, MESH, policy, says};

/// Where the server speaks HTTP, and is probed.
const HTTP: u16 = 8080;
/// The NodePorts that lead there, and to its [`PORT`].
pub(crate) const NODE_PORTS: [u16; 2] = [30_080, 30_070];
const PROTOCOLS: [&str; 4] = ["bytes", "HTTP/1.1", "HTTP/2", "gRPC"];
const ISSUER: &str = "https://id.test/";

/// A server on the first node; callers there and on the second one, in the mesh and outside of it.
struct Stage<'a> {
    cluster: &'a Cluster,
    server: Vec<IpAddr>,
}

#[test]
fn policies_hold_on_real_pods() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-e2e-policies", 2, |cluster| {
        installed::install(cluster, &attacker::expect_a_list(cluster)?)?;
        attacker::revoke(cluster)?;
        let stage = Stage::set(cluster)?;
        stage.callers_are_let_in_by_who_they_are()?;
        stage.requests_are_let_in_by_what_they_ask_for()?;
        stage.modes_go_by_the_mesh_the_namespace_and_the_port()?;
        stage.who_takes_no_plaintext_takes_probes_alone()?;
        stage.tokens_have_to_hold()?;
        stage.an_attacker_gets_nowhere()?;
        stage.all_probes_were_answered()
    })
}

impl<'a> Stage<'a> {
    fn set(cluster: &'a Cluster) -> Result<Self> {
        cluster.kubectl(&["create", "namespace", SHOP])?;
        cluster.kubectl(&["label", "namespace", SHOP, "undermesh.io/mesh=enabled"])?;
        for account in ["near", "far"] {
            cluster.kubectl(&["create", "serviceaccount", account, "--namespace", SHOP])?;
        }
        let (here, there) = (cluster.nodes()[0].name(), cluster.nodes()[1].name());
        let mut server = installed::pod("server", here, &[REQUESTS, "serve", "--name", "server"]);
        server["metadata"]["labels"] = json!({ "app": "server" });
        let mut bytes = container(&[TRAFFIC, "serve", "--name", "server", "--port", &PORT.to_string()]);
        bytes["name"] = json!("bytes");
        let probe = json!({ "httpGet": { "port": HTTP, "path": "/healthy" }, "periodSeconds": 1, "failureThreshold": 2 });
        let containers = &mut server["spec"]["containers"];
        containers[0]["readinessProbe"] = probe.clone();
        containers[0]["livenessProbe"] = probe;
        containers.as_array_mut().context("no containers")?.push(bytes);
        cluster.apply(&server.to_string())?;
        let ports = NODE_PORTS.iter().zip([HTTP, PORT]).map(|(node_port, port)| {
            json!({ "name": format!("p{port}"), "port": port, "targetPort": port, "nodePort": node_port })
        });
        let service = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": { "name": "server", "namespace": SHOP },
            "spec": { "type": "NodePort", "selector": { "app": "server" }, "ipFamilyPolicy": "RequireDualStack",
                "ports": ports.collect::<Vec<_>>() },
        });
        cluster.apply(&service.to_string())?;
        for (name, node, more) in [
            ("near", here, json!({ "serviceAccountName": "near" })),
            ("far", there, json!({ "serviceAccountName": "far" })),
            ("host", here, json!({ "hostNetwork": true })),
            ("outside", there, json!({})),
            ("stranger", here, json!({})),
            ("inner", here, json!({})),
        ] {
            let mut caller = installed::pod(name, node, &["/bin/busybox", "sleep", "1000000"]);
            caller["spec"]["terminationGracePeriodSeconds"] = json!(0);
            for (field, value) in more.as_object().into_iter().flatten() {
                caller["spec"][field] = value.clone();
            }
            if ["outside", "stranger", "inner"].contains(&name) {
                caller["metadata"]["labels"] = json!({ "undermesh.io/mesh": "disabled" });
            }
            cluster.apply(&caller.to_string())?;
        }
        for pod in ["server", "near", "far"] {
            installed::joins(cluster, pod)?;
        }
        let wait = ["wait", "--for=condition=Ready", "pod", "--all", "--namespace", SHOP, "--timeout=60s"];
        cluster.kubectl(&wait)?;
        let found = cluster.get(&["pod", "server", "--namespace", SHOP])?;
        let stage = Self { cluster, server: attacker::addresses(&found)? };
        ensure!(stage.server.len() == 2, "the cluster has one family: {:?}", stage.server);
        // Everybody is let in, by every way.
        stage.each(["served", "200", "200", "200"], ["served", "200", "200", "200"])?;
        stage.strangers(["served", "200"])?;
        Ok(stage)
    }

    fn callers_are_let_in_by_who_they_are(&self) -> Result<()> {
        self.apply(AUTHORIZATION, json!({ "rules": [{ "from": [{ "serviceAccounts": ["near"] }] }] }))?;
        self.each(["served", "200", "200", "200"], ["ECONNRESET", "403", "403", "denied"])?;
        self.strangers(["ECONNRESET", "ECONNRESET"])?;
        self.apply(
            AUTHORIZATION,
            json!({ "action": "Deny", "rules": [{ "from": [{ "namespaces": [SHOP] }] }] }),
        )?;
        self.each(["ECONNRESET", "403", "403", "denied"], ["ECONNRESET", "403", "403", "denied"])?;
        self.strangers(["served", "200"])
    }

    fn requests_are_let_in_by_what_they_ask_for(&self) -> Result<()> {
        let admin = json!({ "action": "Deny", "rules": [{ "to": [{ "paths": ["/admin"] }] }] });
        self.apply(AUTHORIZATION, admin)?;
        let to = SocketAddr::new(self.server[0], HTTP);
        for caller in ["near", "far", "host", "outside"] {
            for (path, expected) in [("/admin", "403"), ("/x/../%61dmin", "403"), ("/", "200")] {
                self.gets(caller, "HTTP/1.1", to, path, &[], expected)?;
            }
        }
        self.rules_ask_for_all_that_they_can()?;
        self.cluster.kubectl(&["delete", "azpol/one", "--namespace", SHOP])?;
        self.each(["served", "200", "200", "200"], ["served", "200", "200", "200"])
    }

    /// One policy for each thing that a rule may ask for: who it is about, from where, and who it is not about.
    fn rules_ask_for_all_that_they_can(&self) -> Result<()> {
        let outside = attacker::addresses(&self.cluster.get(&["pod", "outside", "--namespace", SHOP])?)?;
        let blocks: Vec<_> =
            outside.iter().map(|ip| format!("{ip}/{}", if ip.is_ipv6() { 128 } else { 32 })).collect();
        let deny = |rule: Value| json!({ "action": "Deny", "rules": [rule] });
        let mut of_service = deny(json!({ "to": [{ "methods": ["PUT"] }] }));
        of_service["targetRefs"] = json!([{ "group": "", "kind": "Service", "name": "server" }]);
        for (spec, [word, denied, served]) in [
            (of_service, ["--method", "PUT", "PATCH"]),
            (
                deny(json!({ "to": [{ "hosts": ["*.admin.test"] }] })),
                ["--host", "a.admin.test", "admin.test"],
            ),
            (
                deny(json!({ "when": [{ "header": { "name": "x-team", "values": ["red*"] } }] })),
                ["--header", "x-team: redder", "x-team: blue"],
            ),
            (deny(json!({ "to": [{ "notMethods": ["GET"] }] })), ["--method", "PUT", "GET"]),
            (deny(json!({ "to": [{ "notHosts": ["shop.test"] }] })), ["--host", "a.test", "shop.test"]),
            (
                deny(json!({ "when": [{ "expression": "request.headers['x-size'].size() > 2" }] })),
                ["--header", "x-size: 100", "x-size: 10"],
            ),
        ] {
            self.apply(AUTHORIZATION, spec)?;
            for (protocol, server) in PROTOCOLS[1..3].iter().zip(&self.server) {
                let to = SocketAddr::new(*server, HTTP);
                self.gets("far", protocol, to, "/", &[word, denied], "403")?;
                self.gets("far", protocol, to, "/", &[word, served], "200")?;
            }
        }
        let paths = ["/orders/{*}/items", "/files/{**}"];
        for (to, denied, served) in [
            (json!({ "paths": paths }), ["/orders/1/items", "/files/a/b"], ["/orders/1/2/items", "/file"]),
            (json!({ "notPaths": ["/open"] }), ["/", "/open/a"], ["/open", "/x/../open"]),
            (json!({ "ports": [HTTP], "paths": ["/a"] }), ["/a", "/./a"], ["/b", "/"]),
        ] {
            self.apply(AUTHORIZATION, deny(json!({ "to": [to] })))?;
            let servers = self.server.iter().map(|server| SocketAddr::new(*server, HTTP));
            for (to, (denied, served)) in servers.zip(denied.into_iter().zip(served)) {
                self.gets("far", "HTTP/2", to, denied, &[], "403")?;
                self.gets("far", "HTTP/2", to, served, &[], "200")?;
            }
        }
        for (from, expected) in [
            (json!({ "identities": ["spiffe://cluster.local/ns/shop/sa/f*"] }), ["200", "403", "200"]),
            (json!({ "trustDomains": ["cluster.local"] }), ["403", "403", "200"]),
            (json!({ "notIdentities": ["*/sa/near"] }), ["200", "403", "ECONNRESET"]),
            (json!({ "notServiceAccounts": ["far"] }), ["403", "200", "ECONNRESET"]),
            (json!({ "notNamespaces": [SHOP] }), ["200", "200", "ECONNRESET"]),
            (json!({ "notTrustDomains": ["cluster.local"] }), ["200", "200", "ECONNRESET"]),
            (json!({ "notIpBlocks": blocks }), ["403", "403", "200"]),
        ] {
            self.apply(AUTHORIZATION, deny(json!({ "from": [from] })))?;
            for (number, (caller, expected)) in ["near", "far", "outside"].iter().zip(expected).enumerate() {
                let to = SocketAddr::new(self.server[number % 2], HTTP);
                self.gets(caller, "HTTP/1.1", to, "/", &[], expected)?;
            }
        }
        self.apply(AUTHORIZATION, deny(json!({ "to": [{ "notPorts": [HTTP] }] })))?;
        for server in &self.server {
            self.gets("far", "bytes", SocketAddr::new(*server, PORT), "/", &[], "ECONNRESET")?;
            self.gets("far", "HTTP/1.1", SocketAddr::new(*server, HTTP), "/", &[], "200")?;
        }
        self.apply(AUTHORIZATION, deny(json!({ "from": [{ "ipBlocks": blocks }] })))?;
        for server in &self.server {
            let to = SocketAddr::new(*server, HTTP);
            self.gets("outside", "HTTP/1.1", to, "/", &[], "ECONNRESET")?;
            self.gets("stranger", "HTTP/1.1", to, "/", &[], "200")?;
        }
        let to = SocketAddr::new(self.server[1], HTTP);
        self.apply(AUTHORIZATION, deny(json!({ "to": [{ "grpc": [{ "service": "shop.Admin" }] }] })))?;
        self.gets("far", "gRPC", to, "/shop.Admin/Drop", &[], "denied")?;
        self.gets("far", "gRPC", to, "/shop.Web/Get", &[], "200")?;
        for (outcome, spec) in [
            ("audited", json!({ "action": "Audit", "rules": [{}] })),
            ("would_deny", json!({ "action": "Deny", "dryRun": true, "rules": [{}] })),
        ] {
            self.apply(AUTHORIZATION, spec)?;
            eventually(A_WHILE, &format!("{outcome} is told of"), || {
                self.gets("far", "HTTP/1.1", to, "/", &[], "200")?;
                let told = counted(self.cluster, "undermesh_policy_outcomes_total", &[("outcome", outcome)])?;
                ensure!(told > 0.0, "nothing is");
                Ok(())
            })?;
        }
        Ok(())
    }

    fn modes_go_by_the_mesh_the_namespace_and_the_port(&self) -> Result<()> {
        self.put(MESH, SYSTEM, json!({ "mtls": { "mode": "Strict" } }))?;
        self.strangers(["ECONNREFUSED", "ECONNREFUSED"])?;
        let ports = json!([{ "port": HTTP, "mode": "Permissive" }]);
        self.put(MESH, SHOP, json!({ "mtls": { "ports": ports } }))?;
        self.strangers(["ECONNREFUSED", "200"])?;
        self.put(MESH, SHOP, json!({ "mtls": { "mode": "Permissive" } }))?;
        self.strangers(["served", "200"])?;
        for namespace in [SYSTEM, SHOP] {
            self.cluster.kubectl(&["delete", "mpol/one", "--namespace", namespace])?;
        }
        // Everybody's, from the mesh's own namespace.
        self.put(
            AUTHORIZATION,
            SYSTEM,
            json!({ "action": "Deny", "rules": [{ "to": [{ "ports": [PORT] }] }] }),
        )?;
        self.each(["ECONNRESET", "200", "200", "200"], ["ECONNRESET", "200", "200", "200"])?;
        self.cluster.kubectl(&["delete", "azpol/one", "--namespace", SYSTEM])?;
        self.each(["served", "200", "200", "200"], ["served", "200", "200", "200"])
    }

    fn who_takes_no_plaintext_takes_probes_alone(&self) -> Result<()> {
        let refused = || {
            counted(self.cluster, "undermesh_kernel_refused_connections_total", &[("reason", "plaintext")])
        };
        let before = refused()?;
        self.apply(MESH, json!({ "mtls": { "mode": "Strict" } }))?;
        self.each(["served", "200", "200", "200"], ["served", "200", "200", "200"])?;
        self.strangers(["ECONNREFUSED", "ECONNREFUSED"])?;
        // As the kubelet asks, from where it asks, and what it asks.
        for server in &self.server {
            let probe = ["--header", "user-agent: kube-probe/1.34"];
            self.gets(
                "host",
                "HTTP/1.1",
                SocketAddr::new(*server, HTTP),
                "/healthy",
                &probe,
                "ECONNREFUSED",
            )?;
        }
        let count = refused()? - before;
        ensure!(count >= 14.0, "{count} of 14 were told of");
        self.the_kubelet_is_no_deputy()?;
        self.all_probes_were_answered()
    }

    /// A pod has the kubelet call the server where the server is not probed.
    fn the_kubelet_is_no_deputy(&self) -> Result<()> {
        let node = self.cluster.nodes()[0].name();
        let mut deputy = installed::pod("deputy", node, &["/bin/busybox", "sleep", "1000000"]);
        deputy["spec"]["terminationGracePeriodSeconds"] = json!(0);
        deputy["spec"]["containers"][0]["readinessProbe"] =
            json!({ "tcpSocket": { "host": self.server[0], "port": PORT }, "periodSeconds": 1 });
        self.cluster.apply(&deputy.to_string())?;
        eventually(A_WHILE, "its probe is refused", || {
            let reason = [("reason", "not_probed")];
            let refused = counted(self.cluster, "undermesh_kernel_refused_connections_total", &reason)?;
            ensure!(refused >= 3.0, "{refused} of 3 were told of");
            Ok(())
        })?;
        let found = self.cluster.get(&["pod", "deputy", "--namespace", SHOP])?;
        ensure!(found["status"]["containerStatuses"][0]["ready"] == false, "{:#}", found["status"]);
        self.cluster.kubectl(&["delete", "pod", "deputy", "--namespace", SHOP, "--wait"]).map(drop)
    }

    fn tokens_have_to_hold(&self) -> Result<()> {
        let (key, other) = (SigningKey::new("one", "ES256")?, SigningKey::new("one", "ES256")?);
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        let claims = |exp| json!({ "iss": ISSUER, "aud": "shop", "sub": "ann", "exp": exp });
        let bearer = |token: String| format!("authorization: Bearer {token}");
        let good = bearer(key.token(&claims(now + 3600))?);
        let (old, forged) =
            (bearer(key.token(&claims(now - 3600))?), bearer(other.token(&claims(now + 3600))?));
        let issuer = json!({
            "issuer": ISSUER, "audiences": ["shop"], "jwks": { "inline": key_set([&key]) },
            "claimsToHeaders": [{ "claim": ["sub"], "header": "x-user" }],
        });
        self.apply(MESH, json!({ "jwt": { "issuers": [issuer] } }))?;
        let to = SocketAddr::new(self.server[0], HTTP);
        for caller in ["near", "far", "outside"] {
            for (header, expected) in [(&old, "401"), (&forged, "401"), (&good, "200")] {
                for protocol in ["HTTP/1.1", "HTTP/2"] {
                    self.gets(caller, protocol, to, "/", &["--header", header], expected)?;
                }
            }
            // What only claims may say is theirs alone.
            for (token, user) in [(None, Value::Null), (Some(&good), json!(["ann"]))] {
                let headers = token.into_iter().map(String::as_str).chain(["x-user: root"]);
                let args: Vec<_> = headers.flat_map(|header| ["--header", header]).collect();
                let asked = self.ask(caller, "HTTP/1.1", to, "/", &args)?;
                ensure!(asked["last"]["saw"]["headers"]["x-user"] == user, "{caller}: {asked}");
            }
        }
        for (claim, expected) in [("ann", "403"), ("bob", "200")] {
            let when = json!([{ "claim": { "path": ["sub"], "values": [claim] } }]);
            self.apply(AUTHORIZATION, json!({ "action": "Deny", "rules": [{ "when": when }] }))?;
            for (caller, server) in ["near", "far"].iter().zip(&self.server) {
                let to = SocketAddr::new(*server, HTTP);
                self.gets(caller, "HTTP/2", to, "/", &["--header", &good], expected)?;
            }
        }
        self.cluster.kubectl(&["delete", "azpol/one", "mpol/one", "--namespace", SHOP]).map(drop)
    }

    /// The server lets one account in, and then takes no plaintext besides.
    fn an_attacker_gets_nowhere(&self) -> Result<()> {
        self.apply(AUTHORIZATION, json!({ "rules": [{ "from": [{ "serviceAccounts": ["near"] }] }] }))?;
        let served = |caller| {
            let mut to = self.server.iter().map(|server| SocketAddr::new(*server, HTTP));
            to.try_for_each(|to| self.gets(caller, "HTTP/1.1", to, "/", &[], "200"))
        };
        self.gets("far", "HTTP/1.1", SocketAddr::new(self.server[0], HTTP), "/", &[], "403")?;
        let forged = [
            "forwarded: for=10.0.0.1;by=\"spiffe://cluster.local/ns/shop/sa/near\"",
            "baggage: k8s.namespace.name=shop,service.name=near",
            "x-forwarded-client-cert: URI=spiffe://cluster.local/ns/shop/sa/near",
        ];
        let headers: Vec<_> = forged.iter().flat_map(|header| ["--header", header]).collect();
        for protocol in ["HTTP/1.1", "HTTP/2"] {
            let to = SocketAddr::new(self.server[0], HTTP);
            self.gets("far", protocol, to, "/", &headers, "403")?;
        }
        let attacker = Attacker::new(self.cluster, ["stranger", "outside", "inner"], &self.server)?;
        attacker.in_the_friends_name(&attacker::DENIED)?;
        self.apply(MESH, json!({ "mtls": { "mode": "Strict" } }))?;
        self.gets("outside", "HTTP/1.1", SocketAddr::new(self.server[0], HTTP), "/", &[], "ECONNREFUSED")?;
        attacker.tries()?;
        served("near")?;
        attacker.tries_without_an_agent()?;
        served("near")?;
        self.cluster.kubectl(&["delete", "azpol/one", "mpol/one", "--namespace", SHOP]).map(drop)
    }

    fn all_probes_were_answered(&self) -> Result<()> {
        // Long enough for probes to have failed.
        std::thread::sleep(std::time::Duration::from_secs(3));
        let found = self.cluster.get(&["pod", "server", "--namespace", SHOP])?;
        for status in found["status"]["containerStatuses"].as_array().into_iter().flatten() {
            ensure!(status["ready"] == true && status["restartCount"] == 0, "{status:#}");
        }
        Ok(())
    }

    /// Writes the policy, for the server if it does not say for what, and waits until the status has it.
    fn apply(&self, kind: &str, mut spec: Value) -> Result<()> {
        if spec["targetRefs"].is_null() {
            spec["selector"] = json!({ "matchLabels": { "app": "server" } });
        }
        self.put(kind, SHOP, spec)
    }

    fn put(&self, kind: &str, namespace: &str, spec: Value) -> Result<()> {
        let mut policy = policy(kind, namespace, "{}")?;
        policy["spec"] = spec;
        self.cluster.apply(&policy.to_string())?;
        let name = if kind == MESH { "mpol" } else { "azpol" };
        says(self.cluster, name, namespace, ["Accepted", ""]).map(drop)
    }

    /// Fails unless the callers in the mesh get this, on the node and on the other one, by each protocol and both families.
    fn each(&self, near: [&str; 4], far: [&str; 4]) -> Result<()> {
        for (caller, expected) in [("near", near), ("far", far)] {
            for (protocol, expected) in PROTOCOLS.into_iter().zip(expected) {
                for server in &self.server {
                    let port = if protocol == "bytes" { PORT } else { HTTP };
                    self.gets(caller, protocol, SocketAddr::new(*server, port), "/", &[], expected)?;
                }
            }
        }
        Ok(())
    }

    /// As [`Self::each`], of those who prove no identity: from the node itself, from a pod, and by a NodePort with a node's address.
    fn strangers(&self, [bytes, http]: [&str; 2]) -> Result<()> {
        let node = self.cluster.nodes()[0].addresses();
        for (family, server) in self.server.iter().enumerate() {
            for (caller, to, ports) in [
                ("host", *server, [HTTP, PORT]),
                ("outside", *server, [HTTP, PORT]),
                ("outside", node[family], NODE_PORTS),
            ] {
                let to = ports.map(|port| SocketAddr::new(to, port));
                self.gets(caller, "HTTP/1.1", to[0], "/", &[], http)?;
                self.gets(caller, "bytes", to[1], "/", &[], bytes)?;
            }
        }
        Ok(())
    }

    /// Fails unless the caller gets this before long: agents hear of policies in their own time.
    fn gets(
        &self,
        caller: &str,
        protocol: &str,
        to: SocketAddr,
        path: &str,
        args: &[&str],
        expected: &str,
    ) -> Result<()> {
        eventually(A_WHILE, &format!("{caller} gets {expected} from {to}{path} by {protocol}"), || {
            let asked = self.ask(caller, protocol, to, path, args)?;
            let failed = asked["failed"].as_object().and_then(|failed| failed.keys().next());
            let got = match failed {
                Some(error) => named(error).to_owned(),
                None if protocol == "bytes" => "served".to_owned(),
                None if asked["last"]["headers"]["grpc-status"] == "7" => "denied".to_owned(),
                None => asked["last"]["status"].to_string(),
            };
            ensure!(got == expected, "{asked}");
            Ok(())
        })
    }

    /// What the caller's program says.
    fn ask(&self, caller: &str, protocol: &str, to: SocketAddr, path: &str, args: &[&str]) -> Result<Value> {
        let (address, url) = (to.to_string(), format!("http://{to}{path}"));
        let ask = |more: &[&'static str]| [&[REQUESTS, "ask", "--limit-ms", "3000", &url], more].concat();
        let words = match protocol {
            "bytes" => vec![TRAFFIC, "dial", "--count", "1", "--limit-ms", "3000", &address],
            "HTTP/1.1" => ask(&[]),
            "HTTP/2" => ask(&["--http2"]),
            _ => ask(&["--http2", "--method", "POST", "--header", "content-type: application/grpc"]),
        };
        let exec = ["exec", "--namespace", SHOP, caller, "--container", "main", "--"];
        let told = self.cluster.kubectl(&[&exec[..], &words, args].concat())?;
        let line = told.lines().last().unwrap_or_default();
        serde_json::from_str(line).with_context(|| told.clone())
    }
}

/// The name of the error that a client tells in its own words.
fn named(error: &str) -> &str {
    match error {
        error if error.contains("refused") => "ECONNREFUSED",
        error if error.contains("reset") => "ECONNRESET",
        error => error,
    }
}
