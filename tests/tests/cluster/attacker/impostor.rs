//! In the name of another: of the friend, by what the friend's own kernel forwards and by the friend's address; of others' accounts,
//! before the authority; and of agents and controllers, before the API server.

use std::fs;
use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use tonic::{Code, Status};
use undermesh_tests::istiod::{self, Answer, Asked};
use undermesh_tests::lab::{Place, binary, eventually, in_netns, run_at, run_here};
use undermesh_tests::pki;

use super::{Attacker, FRIEND, IDS, KERNEL_REFUSED, MEMBER, end, place};
use crate::installed::{A_WHILE, CONTROLLER, LIMIT, PORT, SHOP, SYSTEM, agents, counted, metrics};

/// How the server is kept from those who prove no identity: what they get, and what counts it.
pub(crate) struct Refusal {
    end: &'static str,
    counter: &'static str,
    labels: &'static [(&'static str, &'static str)],
}

/// By policies: its agent knows the friend's address, and of an identity nothing.
pub(crate) const DENIED: Refusal = Refusal {
    end: "ECONNRESET",
    counter: "undermesh_tcp_connections_refused_total",
    labels: &[
        ("reason", "denied"),
        ("reporter", "destination"),
        ("source_workload", FRIEND),
        ("source_identity", "unknown"),
    ],
};

/// By the kernel, where it takes no plaintext.
pub(crate) const SHUT: Refusal =
    Refusal { end: "ECONNREFUSED", counter: KERNEL_REFUSED, labels: &[("reason", "plaintext")] };

/// The audience that the controller's callers have their tokens for.
const AUDIENCE: &str = "--audience=undermesh.io";
const AGENTS: &str = "undermesh-agent";
const DENIALS: &str = "undermesh_ca_requests_denied_total";

impl Attacker<'_> {
    /// The friend itself is served. What comes by way of it, or from its address, is not.
    pub(crate) fn in_the_friends_name(&self, refusal: &Refusal) -> Result<()> {
        for to in self.server {
            let got = dial(&self.friends, SocketAddr::new(*to, PORT))?;
            ensure!(got.starts_with("server "), "the friend itself gets {got} from {to}");
        }
        let refused = || counted(self.cluster, refusal.counter, refusal.labels);
        let bypassed =
            || counted(self.cluster, "undermesh_bypassed_connections_total", &[("reason", "inner_netns")]);
        let before = (refused()?, bypassed()?);
        self.by_forwarding(refusal.end)?;
        eventually(A_WHILE, "both ends tell of what was forwarded", || {
            let told = (refused()? - before.0, bypassed()? - before.1);
            ensure!(told == (2.0, 2.0), "{told:?} of two were told of");
            Ok(())
        })?;
        self.by_a_taken_address(refusal.end)?;
        eventually(A_WHILE, "the taken address is told of", || {
            // It may have taken more than one try until the server heard whose the address is.
            let told = refused()? - before.0;
            ensure!(told >= 4.0, "{told} of 4 were told of");
            Ok(())
        })
    }

    /// From the network namespace behind the friend's, by a program in the friend's container.
    pub(super) fn by_forwarding(&self, expected: &str) -> Result<()> {
        for to in self.server {
            let got = dial(&self.inner, SocketAddr::new(*to, PORT))?;
            ensure!(got == expected, "{to} by way of the friend: {got}, not {expected}");
        }
        Ok(())
    }

    /// From the friend's address, which a neighbour on the node's bridge has given itself.
    pub(super) fn by_a_taken_address(&self, expected: &str) -> Result<()> {
        let node = &self.cluster.nodes()[0];
        let server = place(self.cluster, node, "server")?.netns;
        let neighbour = &self.networks[0];
        for (to, friend) in self.server.iter().zip(&self.friend) {
            let (length, friend) = (if friend.is_ipv6() { 128 } else { 32 }, friend.to_string());
            let address = format!("{friend}/{length}");
            ip(neighbour, &["address", "add", &address, "dev", "eth0", "nodad"])?;
            let ends = ["impersonate", &friend, &to.to_string(), &PORT.to_string()];
            let got = self.python(neighbour, "forger.py", &ends);
            ip(neighbour, &["address", "del", &address, "dev", "eth0"])?;
            for (netns, link) in [(&server, "eth0"), (&node.netns(), "pods")] {
                ip(netns, &["neighbour", "flush", "dev", link])?;
            }
            let got = got?;
            ensure!(got == expected, "{to} from {friend}, taken over: {got}, not {expected}");
        }
        Ok(())
    }

    /// Certificates for others' accounts, for which the authority is shown tokens that the API server has made.
    pub(super) fn by_requests(&self) -> Result<()> {
        let [friend, member] = IDS;
        let node = self.cluster.nodes()[0].name();
        let is_near = |agent: &Value| agent["spec"]["nodeName"] == node;
        let agent = agents(self.cluster)?.into_iter().find(is_near).context("no agent")?;
        let agent = agent["metadata"]["name"].as_str().context("an agent without a name")?;
        let of_own_pod =
            |more: &[&str]| self.token([SHOP, "default"], &[more, &bound_to("stranger")].concat());
        let of_agents = |more: &[&str]| self.token([SYSTEM, AGENTS], &[&[AUDIENCE], more].concat());
        let of_agent = of_agents(&bound_to(agent))?;
        let cases = [
            // Its own pod's, for the API server and for the authority.
            ("token_refused", Code::Unauthenticated, friend, of_own_pod(&[])?),
            ("not_an_agent", Code::PermissionDenied, friend, of_own_pod(&[AUDIENCE])?),
            // The agents', of no pod; and of the agent on the friend's node, where the other's pod is not.
            ("unknown_node", Code::PermissionDenied, friend, of_agents(&[])?),
            ("no_pod_on_node", Code::PermissionDenied, member, of_agent.clone()),
        ];
        let before = metrics(self.cluster, CONTROLLER)?;
        for (reason, code, identity, token) in &cases {
            let answer = self.request(identity, token)?;
            let told = answer.as_ref().map_err(Status::code);
            ensure!(told == Err(*code), "{reason}: a request for {identity} is answered with {answer:?}");
        }
        // The same token gets what is its node's: it was not refused for another reason.
        self.request(friend, &of_agent)?.context("what an agent may ask for")?;

        let after = metrics(self.cluster, CONTROLLER)?;
        let told = |name: &str, labels: &[_]| after.sum(name, labels) - before.sum(name, labels);
        for (reason, ..) in &cases {
            let denied = told(DENIALS, &[("reason", reason)]);
            ensure!(denied == 1.0, "{reason}: {denied} are told of");
        }
        let counts = [told(DENIALS, &[]), told("undermesh_ca_certificates_issued_total", &[])];
        ensure!(counts == [4.0, 1.0], "{counts:?} were denied and issued");
        let reviews = ["refused", "authenticated"]
            .map(|result| told("undermesh_ca_token_reviews_total", &[("result", result)]));
        ensure!(reviews == [1.0, 4.0], "{reviews:?} tokens were refused and authenticated");
        self.are_in_the_log(cases.iter().map(|(reason, _, identity, _)| [*reason, *identity]))
    }

    /// What an agent's token, and the controller's, would let whoever has taken a node over change.
    pub(super) fn by_changes(&self) -> Result<()> {
        let [here, there] = self.cluster.nodes() else { bail!("not two nodes") };
        let as_agent = [
            format!("--as=system:serviceaccount:{SYSTEM}:{AGENTS}"),
            format!("--as-user-extra=authentication.kubernetes.io/node-name={}", here.name()),
        ];
        let as_controller = [format!("--as=system:serviceaccount:{SYSTEM}:undermesh-controller")];
        let pod = |name, mut change: Value| {
            change["metadata"]["name"] = json!(name);
            change["metadata"]["namespace"] = json!(SHOP);
            (change, "Pod", &["--subresource=status"][..])
        };
        let node = |mut change: Value| {
            change["metadata"]["name"] = json!(there.name());
            (change, "Node", &[][..])
        };
        let condition = |name| json!({ "status": { "conditions": [{ "type": name, "status": "False" }] } });
        let ours = condition("undermesh.io/enrolled");
        let metadata = |what: &str| json!({ "metadata": { what: { "example.org/a": "b" } } });
        let spec = |spec| json!({ "spec": spec });
        let taint = json!({ "taints": [{ "key": "example.org/a", "effect": "NoSchedule" }] });
        for (who, (mut object, kind, more), refusal) in [
            (&as_agent[..], pod(FRIEND, ours.clone()), ""),
            (&as_agent, pod(MEMBER, ours.clone()), "changes the pods of its own node only, which is"),
            (&as_agent[..1], pod(FRIEND, ours), "its token is bound to no node"),
            (&as_agent, pod(FRIEND, condition("Ready")), "changes no condition of a pod but"),
            (&as_agent, pod(FRIEND, metadata("labels")), "changes no labels"),
            (&as_agent, pod(FRIEND, metadata("annotations")), "changes no annotations but"),
            (&as_agent, node(metadata("labels")), "cannot patch resource \"nodes\""),
            (&as_controller, node(metadata("labels")), "changes nothing of a node but its taints"),
            (
                &as_controller,
                node(spec(json!({ "unschedulable": true }))),
                "changes nothing of a node but its taints",
            ),
            (
                &as_controller,
                node(spec(taint)),
                "removes the taint undermesh.io/agent-not-ready and no other",
            ),
        ] {
            (object["apiVersion"], object["kind"]) = (json!("v1"), json!(kind));
            let file = self.folder.path().join("change.json").display().to_string();
            fs::write(&file, object.to_string())?;
            let apply =
                ["apply", "--server-side", "--force-conflicts", "--validate=false", "--dry-run=server"];
            let who = who.iter().map(String::as_str);
            let words: Vec<_> =
                apply.iter().chain(more).copied().chain(["--filename", &file]).chain(who).collect();
            let told = self.cluster.try_kubectl(&words)?;
            let is_right = told.status.success() == refusal.is_empty() && told.stderr.contains(refusal);
            ensure!(is_right, "{object}: {told:?}, not `{refusal}`");
        }
        Ok(())
    }

    /// Fails unless the controllers' logs have a line for each reason, with the identity that was asked for.
    fn are_in_the_log<'a>(&self, refused: impl Iterator<Item = [&'a str; 2]>) -> Result<()> {
        let logs = ["logs", "--namespace", SYSTEM, "--selector", CONTROLLER, "--tail=-1"];
        let log = self.cluster.kubectl(&logs)?;
        for [reason, identity] in refused {
            let is_told = |line: &str| {
                line.contains(&format!("reason=\"{reason}\"")) && line.contains(&format!("\"{identity}\""))
            };
            ensure!(log.lines().any(is_told), "no line tells of {reason}:\n{log}");
        }
        Ok(())
    }

    /// A token of this account, of a namespace.
    fn token(&self, [namespace, account]: [&str; 2], more: &[&str]) -> Result<String> {
        let create = ["create", "token", account, "--namespace", namespace];
        Ok(self.cluster.kubectl(&[&create[..], more].concat())?.trim().to_owned())
    }

    /// As agents ask the authority, from the network of a pod outside of the mesh.
    fn request(&self, identity: &str, token: &str) -> Result<Answer> {
        let service = self.cluster.get(&["service", "undermesh-controller", "--namespace", SYSTEM])?;
        let address = service["spec"]["clusterIP"].as_str().context("a Service without an address")?;
        let address = SocketAddr::new(address.parse()?, 15012);
        let name = format!("undermesh-controller.{SYSTEM}.svc");
        let asked = Asked {
            authorization: format!("Bearer {token}"),
            cluster: "Kubernetes".to_owned(),
            identity: identity.to_owned(),
            csr: pki::request()?,
            validity_seconds: 3600,
        };
        in_netns(&self.networks[0], || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(istiod::ask(address, (&name, self.ours.root()), asked))
        })
    }
}

/// A token's arguments that bind it to this pod.
fn bound_to(pod: &str) -> [&str; 4] {
    ["--bound-object-kind", "Pod", "--bound-object-name", pod]
}

/// What the server says to a program that runs there, or how its connection ended.
fn dial(place: &Place, to: SocketAddr) -> Result<String> {
    let mut witness = Command::new(binary("witness")?);
    witness.args(["connect", &to.to_string()]);
    end(&run_at(place, witness, LIMIT)?.success()?)
}

fn ip(netns: &Path, args: &[&str]) -> Result<()> {
    let mut ip = Command::new("ip");
    ip.args(args);
    in_netns(netns, || run_here(ip, LIMIT)?.success().map(drop))
}
