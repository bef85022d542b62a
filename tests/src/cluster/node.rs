//! A node: its configuration files, its first process, and ways to look into it.
//!
//! What runs on it is what runs on any node: a container runtime, kubelet and kube-proxy, configured by files at their usual
//! places. Where this machine cannot give a node all that it would have, the file says why.

use std::fs;
use std::net::IpAddr;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::certificates::Subject;
use super::control::Access;
use super::dns;
use super::grounds::{Grounds, PODS, node_addresses, part_of, pods_of};
use super::image;
use super::init::{PROGRAMS, Service, Spec};
use super::runtime::Runtime;
use crate::lab::process::Place;
use crate::lab::{Output, Process, binary, cgroup, eventually, netns, run_here};

/// A node of the cluster; dropped, all its processes are killed.
#[derive(Debug)]
pub struct Node {
    grounds: Arc<Grounds>,
    number: u8,
    name: String,
    first: Option<Process>,
    boots: u32,
}

impl Node {
    /// Makes the node's network and files, and starts it.
    pub(super) fn create(grounds: &Arc<Grounds>, number: u8, access: &Access) -> Result<Self> {
        let name = grounds.named(&part_of(number));
        grounds.make_node(&part_of(number), number)?;
        let mut node = Self { grounds: grounds.clone(), number, name, first: None, boots: 0 };
        node.write_files(access)?;
        node.start()?;
        Ok(node)
    }

    /// Its name, also in Kubernetes.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its IPv4 and IPv6 address.
    pub fn addresses(&self) -> [IpAddr; 2] {
        node_addresses(self.number)
    }

    /// The file that opens its network namespace.
    pub fn netns(&self) -> PathBuf {
        netns::path(&self.name)
    }

    /// Its group in this machine's cgroup2 tree, which is the root of what the node sees.
    pub fn cgroup(&self) -> PathBuf {
        self.grounds.cgroup.join(part_of(self.number))
    }

    /// The folder on this machine that holds its `/run` as `run`, its `/var/lib` as `lib`, its `/var/log` as `log`.
    pub fn data(&self) -> PathBuf {
        self.grounds.data().join(part_of(self.number))
    }

    /// The log of one of its services: `containerd` or `crio`, `kubelet`, `kube-proxy`.
    pub fn log(&self, service: &str) -> PathBuf {
        self.data().join("log").join(format!("{service}.log"))
    }

    /// A command that runs on the node as a process in none of its pods: with the node's mounts, network, cgroups and
    /// processes. None while the node is down.
    pub fn command(&self, program: &str) -> Option<Command> {
        let pid = self.first.as_ref()?.pid();
        let mut command = Command::new("nsenter");
        command.arg(format!("--target={pid}"));
        command.args(["--mount", "--uts", "--ipc", "--net", "--cgroup"]);
        // The process that made the namespaces is itself outside of the one of processes.
        command.arg(format!("--pid=/proc/{pid}/ns/pid_for_children"));
        command.args(["--", "env", &format!("PATH={PROGRAMS}:/usr/sbin:/usr/bin:/sbin:/bin"), program]);
        Some(command)
    }

    /// Runs such a command to its end.
    pub fn run(&self, words: &[&str], limit: Duration) -> Result<Output> {
        let (program, args) = words.split_first().context("no program to run")?;
        let mut command = self.command(program).with_context(|| format!("{} is down", self.name))?;
        command.args(args);
        run_here(command, limit)
    }

    /// Imports an image from a tar; pods then have it without pulling.
    pub fn import(&self, tar: &Path) -> Result<()> {
        let import = self.importing(&image::name_of(tar)?, &tar.to_string_lossy())?;
        run_here(import, Duration::from_secs(120))?.success()?;
        Ok(())
    }

    /// What imports an image of this name from a tar that the node sees: what is below `/run`, `/var/lib` and `/var/log` on this
    /// machine it does not.
    pub fn importing(&self, name: &str, tar: &str) -> Result<Command> {
        let words = self.runtime().import(name, tar);
        let (program, args) = words.split_first().context("no program to run")?;
        let mut command = self.command(program).with_context(|| format!("{} is down", self.name))?;
        command.args(args);
        Ok(command)
    }

    fn runtime(&self) -> Runtime {
        Runtime::of(&self.grounds.tools)
    }

    /// As if its plug were pulled: every process on it is killed at once. What was on its disk stays.
    pub fn stop(&mut self) -> Result<()> {
        cgroup::kill(&self.cgroup())?;
        self.first = None;
        cgroup::remove(&self.cgroup())
    }

    /// Boots it.
    pub fn start(&mut self) -> Result<()> {
        let place = Place { netns: self.netns(), cgroup: self.cgroup() };
        cgroup::create(&place.cgroup)?;
        self.boots += 1;
        let log = self.grounds.state.log_dir().join(format!("{}-{}.log", self.name, self.boots));
        let mut command = Command::new(binary("cluster-node")?);
        command.arg(self.data().join("spec.json"));
        self.first = Some(Process::start(&place, command, log)?);
        self.wait_for_runtime()
    }

    /// Fails, with the end of its output, if the node is not up.
    pub fn check_running(&mut self) -> Result<()> {
        self.first.as_mut().context("it is down").and_then(Process::check_running).context(self.name.clone())
    }

    fn wait_for_runtime(&mut self) -> Result<()> {
        let socket = self.data().join(self.runtime().socket().trim_start_matches('/'));
        eventually(Duration::from_secs(60), "the container runtime answers", || {
            let ended = self.check_running();
            if ended.is_err() {
                return Ok(ended);
            }
            UnixStream::connect(&socket)
                .inspect_err(|_| std::thread::sleep(Duration::from_millis(100)))
                .map(|_| Ok(()))
                .with_context(|| format!("nobody at {}", socket.display()))
        })?
    }

    fn write_files(&self, access: &Access) -> Result<()> {
        let lib = self.data().join("lib");
        fs::create_dir_all(lib.join("kubelet/pki"))?;
        fs::create_dir_all(lib.join("cni/net.d"))?;
        fs::create_dir_all(self.data().join("log"))?;
        let in_lib = |name: &str, value: &Value| {
            fs::write(lib.join(name), serde_json::to_vec_pretty(value)?).context("a node's file")
        };

        let user = format!("system:node:{}", self.name);
        let mut names = vec![self.name.clone(), "127.0.0.1".to_owned()];
        names.extend(self.addresses().map(|address| address.to_string()));
        let subject =
            Subject { file: &format!("kubelet-{}", self.name), user: &user, group: "system:nodes", names };
        let serving = access.authority.sign(&subject)?;
        fs::copy(serving.certificate, lib.join("kubelet/pki/serving.crt"))?;
        fs::copy(serving.key, lib.join("kubelet/pki/serving.key"))?;
        access.copy_certificate(&lib.join("kubelet/pki/ca.crt"))?;
        let kubeconfig = access.authority.kubeconfig(&subject, &access.server)?;
        fs::copy(kubeconfig, lib.join("kubelet/kubeconfig"))?;
        let kubeconfig = access.kubeconfig(&format!("proxy-{}", self.name), "system:kube-proxy", "")?;
        fs::copy(kubeconfig, lib.join("kubelet/proxy.kubeconfig"))?;

        self.runtime().write_files(&lib, self.grounds.lacks_controllers())?;
        in_lib("cni/net.d/10-pods.conflist", &cni_config(self.number))?;
        in_lib("kubelet/config.json", &kubelet_config(self.runtime().socket()))?;
        in_lib("kubelet/proxy.json", &proxy_config(&self.name))?;
        // Whoever resolves names on the node resolves none: there is nobody to ask.
        fs::write(lib.join("kubelet/resolv.conf"), "")?;
        let spec = Spec {
            hostname: self.name.clone(),
            cgroup: self.cgroup(),
            data: self.data(),
            programs: self.grounds.tools.dir().to_owned(),
            services: services(self),
        };
        fs::write(self.data().join("spec.json"), serde_json::to_vec_pretty(&spec)?)?;
        Ok(())
    }
}

fn services(node: &Node) -> Vec<Service> {
    let service = |name: &str, args: &[&str]| {
        let program = format!("{PROGRAMS}/{name}");
        let command =
            std::iter::once(program.as_str()).chain(args.iter().copied()).map(str::to_owned).collect();
        Service { name: name.to_owned(), command, ready: None }
    };
    let [v4, v6] = node.addresses();
    let runtime = node.runtime();
    let runtime =
        Service { ready: Some(runtime.socket().into()), ..service(runtime.name(), runtime.arguments()) };
    let kubelet = service(
        "kubelet",
        &[
            "--config=/var/lib/kubelet/config.json",
            "--kubeconfig=/var/lib/kubelet/kubeconfig",
            &format!("--hostname-override={}", node.name),
            &format!("--node-ip={v4},{v6}"),
        ],
    );
    vec![runtime, kubelet, service("kube-proxy", &["--config=/var/lib/kubelet/proxy.json"])]
}

fn cni_config(number: u8) -> Value {
    let ranges = pods_of(number).map(|subnet| json!([{ "subnet": subnet }]));
    json!({
        "cniVersion": "1.0.0", "name": "pods", "plugins": [
            { "type": "bridge", "bridge": "pods", "isDefaultGateway": true, "hairpinMode": true,
              "ipam": { "type": "host-local", "ranges": ranges, "dataDir": "/var/lib/cni/addresses" } },
            { "type": "portmap", "capabilities": { "portMappings": true } },
        ],
    })
}

fn kubelet_config(runtime: &str) -> Value {
    json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1", "kind": "KubeletConfiguration",
        "authentication": {
            "anonymous": { "enabled": false }, "webhook": { "enabled": true },
            "x509": { "clientCAFile": "/var/lib/kubelet/pki/ca.crt" } },
        "authorization": { "mode": "Webhook" },
        "tlsCertFile": "/var/lib/kubelet/pki/serving.crt",
        "tlsPrivateKeyFile": "/var/lib/kubelet/pki/serving.key",
        "containerRuntimeEndpoint": format!("unix://{runtime}"),
        "resolvConf": "/var/lib/kubelet/resolv.conf",
        "clusterDomain": "cluster.local", "clusterDNS": [dns::ADDRESS],
        "volumePluginDir": "/var/lib/kubelet/plugins-of-volumes",
        // As many as a node has addresses for.
        "maxPods": 256,
        // There is no systemd in a node.
        "cgroupDriver": "cgroupfs", "enforceNodeAllocatable": ["none"],
        // The machine's disk and memory are not the node's: neither is a reason to evict a pod, or to remove images
        // that cannot be pulled again.
        "evictionHard": { "nodefs.available": "1%" },
        "imageGCHighThresholdPercent": 100, "imageGCLowThresholdPercent": 99,
        "failSwapOn": false,
        // A score below one's own takes CAP_SYS_RESOURCE.
        "oomScoreAdj": 0,
        // kube-proxy has its own rules.
        "makeIPTablesUtilChains": false,
        "nodeStatusUpdateFrequency": "1s", "syncFrequency": "10s",
    })
}

fn proxy_config(name: &str) -> Value {
    json!({
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1", "kind": "KubeProxyConfiguration",
        "clientConnection": { "kubeconfig": "/var/lib/kubelet/proxy.kubeconfig" },
        "hostnameOverride": name, "mode": "iptables", "clusterCIDR": PODS,
        "metricsBindAddress": "127.0.0.1:10249", "oomScoreAdj": 0,
        // The size of the table is the machine's to set.
        "conntrack": { "maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s" },
        "iptables": { "minSyncPeriod": "100ms" },
    })
}
