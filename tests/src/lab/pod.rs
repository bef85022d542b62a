//! A pod of the lab: a namespace, a cgroup and a manifest.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{Result, bail};
use serde_json::{Value, json};

use super::network::{self, Attach};
use super::process::{Place, run_at};
use super::{Manifest, Node, Output, Process, Shared, cgroup, eventually, netns};

/// The label that asks for enrolment.
pub const MESH_LABEL: &str = "undermesh.io/mesh";

/// What a pod shall be like.
#[derive(Clone, Debug)]
pub struct PodSpec {
    /// Its Kubernetes namespace.
    pub namespace: String,
    /// Its name, unique in the lab.
    pub name: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its annotations, beside those that say where it lives.
    pub annotations: BTreeMap<String, String>,
    /// `spec.serviceAccountName`.
    pub service_account: Option<String>,
    /// Whether it has a second network, `net1`, which its manifest does not mention.
    pub second_network: bool,
}

impl PodSpec {
    /// A pod labelled `app: NAME`, not asking for enrolment itself.
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.to_owned(),
            name: name.to_owned(),
            labels: BTreeMap::from([("app".to_owned(), name.to_owned())]),
            annotations: BTreeMap::new(),
            service_account: None,
            second_network: false,
        }
    }

    /// Adds or replaces a label.
    pub fn label(mut self, key: &str, value: &str) -> Self {
        self.labels.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Adds an annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Has an account of its own.
    pub fn service_account(mut self, name: &str) -> Self {
        self.service_account = Some(name.to_owned());
        self
    }

    /// Asks for enrolment.
    pub fn enrolled(self) -> Self {
        self.label(MESH_LABEL, "enabled")
    }

    /// Adds the second network.
    pub fn second_network(mut self) -> Self {
        self.second_network = true;
        self
    }
}

/// A running pod. It stays when the handle is dropped; [`Pod::remove`] or the lab's end takes it away.
#[derive(Debug)]
pub struct Pod {
    lab: Arc<Shared>,
    node: Node,
    place: Place,
    host: u8,
    link: String,
    second_network: bool,
    uid: String,
    name: String,
    namespace: String,
    manifest: Mutex<Manifest>,
}

impl Pod {
    pub(super) fn create(lab: Arc<Shared>, node: Node, spec: PodSpec) -> Result<Self> {
        let host = node.take_host()?;
        let (name, link) = (spec.name.clone(), format!("pod{host}"));
        let place = Place {
            netns: netns::path(&format!("{}-{name}", lab.state.name)),
            cgroup: lab.cgroup.join(node.name()).join("pods").join(&name),
        };
        let attach = Attach { name: node.name(), number: node.number(), host, link: &link };
        network::create_pod(&lab.state, &attach, &name)?;
        if spec.second_network {
            network::attach_second(&lab.state.name, &attach, &name)?;
        }
        cgroup::create(&place.cgroup)?;
        let uid = format!("{name}-{:08x}", lab.next_number());
        let manifest = manifest(&spec, &node, &place, &uid, network::pod_addresses(node.number(), host));
        let (second_network, namespace) = (spec.second_network, spec.namespace);
        let manifest = Mutex::new(manifest);
        let pod = Self { lab, node, place, host, link, second_network, uid, name, namespace, manifest };
        pod.update(|_| {})?;
        Ok(pod)
    }

    /// The pod's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its uid, as its manifest has it.
    pub fn uid(&self) -> &str {
        &self.uid
    }

    /// Its Kubernetes namespace.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The node it runs on.
    pub fn node(&self) -> &Node {
        &self.node
    }

    /// Its IPv4 address.
    pub fn ip(&self) -> IpAddr {
        network::pod_addresses(self.node.number(), self.host)[0]
    }

    /// Its IPv6 address.
    pub fn ip6(&self) -> IpAddr {
        network::pod_addresses(self.node.number(), self.host)[1]
    }

    /// Its addresses on its second network, if it has one.
    pub fn second_ips(&self) -> Option<[IpAddr; 2]> {
        self.second_network.then(|| network::second_addresses(self.node.number(), self.host))
    }

    /// The file that opens its network namespace.
    pub fn netns(&self) -> &Path {
        &self.place.netns
    }

    /// Its directory in the cgroup2 tree.
    pub fn cgroup(&self) -> &PathBuf {
        &self.place.cgroup
    }

    /// Starts a program in the pod.
    pub fn spawn(&self, command: Command) -> Result<Process> {
        let log = self.lab.log_file(&self.name, &command.get_program().to_string_lossy());
        Process::start(&self.place, command, log)
    }

    /// Runs a program in the pod to its end, or to the limit.
    pub fn run(&self, command: Command, limit: Duration) -> Result<Output> {
        run_at(&self.place, command, limit)
    }

    /// Waits until something in the pod listens on the TCP port, without connecting to it.
    pub fn wait_listening(&self, port: u16) -> Result<()> {
        let what = format!("pod {} listens on port {port}", self.name);
        eventually(Duration::from_secs(20), &what, || match self.listening_ports()?.contains(&port) {
            true => Ok(()),
            false => bail!("nothing listens there"),
        })
    }

    /// The TCP ports that something in the pod listens on, the agent's included.
    pub fn listening_ports(&self) -> Result<Vec<u16>> {
        netns::enter(&self.place.netns, || {
            let mut tables = fs::read_to_string("/proc/thread-self/net/tcp")?;
            tables.push_str(&fs::read_to_string("/proc/thread-self/net/tcp6")?);
            Ok(tables.lines().filter_map(listening_port).collect())
        })
    }

    /// Changes the manifest and writes it.
    pub fn update(&self, change: impl FnOnce(&mut Manifest)) -> Result<()> {
        let mut manifest = self.manifest.lock().unwrap();
        change(&mut manifest);
        self.lab.state.apply(&manifest.file_name(), &manifest.to_yaml()?)
    }

    /// Sets a label, or removes it.
    pub fn set_label(&self, key: &str, value: Option<&str>) -> Result<()> {
        self.update(|manifest| manifest.set_label(key, value))
    }

    /// Asks for enrolment by the pod's own label, or speaks against it.
    pub fn set_mesh(&self, enabled: bool) -> Result<()> {
        self.set_label(MESH_LABEL, Some(if enabled { "enabled" } else { "disabled" }))
    }

    /// Changes the pod's readiness.
    pub fn set_ready(&self, ready: bool) -> Result<()> {
        self.update(|manifest| manifest.set("status.conditions", ready_condition(ready)))
    }

    /// Ends the pod's processes and takes its cgroup away: for the agents the pod still runs.
    pub fn lose_cgroup(&self) -> Result<()> {
        cgroup::kill(&self.place.cgroup)?;
        cgroup::remove(&self.place.cgroup)
    }

    /// Gives the pod a cgroup at the path of the one before.
    pub fn regain_cgroup(&self) -> Result<()> {
        cgroup::create(&self.place.cgroup)
    }

    /// Takes the pod's links and the name of its network namespace away, whoever still holds the namespace: for the
    /// agents the pod still runs.
    pub fn lose_netns(&self) -> Result<()> {
        network::detach(&self.lab.state.name, &self.attach(), self.second_network)?;
        netns::delete(&self.place.netns)
    }

    /// Gives the pod a network namespace at the path of the one before, with the same addresses.
    pub fn regain_netns(&self) -> Result<()> {
        network::create_pod(&self.lab.state, &self.attach(), &self.name)?;
        match self.second_network {
            true => network::attach_second(&self.lab.state.name, &self.attach(), &self.name),
            false => Ok(()),
        }
    }

    /// Removes the manifest alone: for the agents the pod is deleted, though its processes still run.
    pub fn delete(&self) -> Result<()> {
        self.lab.state.delete(&self.manifest.lock().unwrap().file_name())
    }

    /// Ends the pod: its manifest, its processes, its links, its namespace, its cgroup.
    pub fn remove(self) -> Result<()> {
        let file = self.manifest.lock().unwrap().file_name();
        if self.lab.state.config_dir().join(&file).exists() {
            self.lab.state.delete(&file)?;
        }
        cgroup::kill(&self.place.cgroup)?;
        self.lose_netns()?;
        cgroup::remove(&self.place.cgroup)?;
        self.node.free_host(self.host);
        Ok(())
    }

    fn attach(&self) -> Attach<'_> {
        Attach { name: self.node.name(), number: self.node.number(), host: self.host, link: &self.link }
    }
}

fn manifest(spec: &PodSpec, node: &Node, place: &Place, uid: &str, addresses: [IpAddr; 2]) -> Manifest {
    let mut annotations = spec.annotations.clone();
    annotations.insert("undermesh.io/netns".to_owned(), place.netns.display().to_string());
    annotations.insert("undermesh.io/cgroup".to_owned(), place.cgroup.display().to_string());
    let mut manifest = Manifest::new("v1", "Pod", Some(&spec.namespace), &spec.name);
    manifest.set("metadata.uid", json!(uid));
    manifest.set("metadata.labels", json!(spec.labels));
    manifest.set("metadata.annotations", json!(annotations));
    manifest.set("spec.nodeName", json!(node.name()));
    manifest.set("spec.containers", json!([{ "name": "main", "image": "none" }]));
    if let Some(account) = &spec.service_account {
        manifest.set("spec.serviceAccountName", json!(account));
    }
    manifest.set("status.phase", json!("Running"));
    manifest.set("status.conditions", ready_condition(true));
    manifest.set("status.podIP", json!(addresses[0]));
    manifest.set("status.podIPs", json!(addresses.map(|ip| json!({ "ip": ip }))));
    manifest
}

fn ready_condition(ready: bool) -> Value {
    json!([{ "type": "Ready", "status": if ready { "True" } else { "False" } }])
}

/// The local port of a line of /proc/net/tcp whose socket listens (state 0A).
fn listening_port(line: &str) -> Option<u16> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    (state == "0A").then(|| u16::from_str_radix(local.rsplit_once(':')?.1, 16).ok())?
}
