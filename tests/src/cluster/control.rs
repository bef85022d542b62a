//! The control plane: etcd, the API server, the controller manager and the scheduler, in a network namespace of their
//! own. It knows of nodes only that their addresses can be reached from there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::certificates::{Authority, Subject, TokenKey};
use super::grounds::{API_PORT, API_SERVICE, Grounds, PODS, SERVICES, control_addresses};
use crate::lab::{Process, eventually};

/// The control plane's running programs.
#[derive(Debug)]
pub(super) struct Control {
    programs: Vec<Process>,
}

/// What it takes to call the API server, and to be called by it.
pub(super) struct Access {
    pub(super) authority: Authority,
    /// The API server's URL, for whoever is on the cluster's network.
    pub(super) server: String,
}

impl Control {
    /// Starts it, and waits until the API server is ready to serve, as `ask` finds out.
    pub(super) fn start(
        grounds: &Grounds,
        access: &Access,
        ask: impl Fn() -> Result<String>,
    ) -> Result<Self> {
        let dir = grounds.data().join("control");
        let token_key = TokenKey::create(&dir)?;
        let mut control = Self { programs: Vec::new() };
        control.run(grounds, etcd(grounds, &dir))?;
        control.run(grounds, api_server(grounds, &dir, access, &token_key)?)?;
        // Whether it is ready, or will never be because a program has ended.
        eventually(Duration::from_secs(90), "the API server is ready", || {
            let ended = control.check_running();
            if ended.is_err() {
                return Ok(ended);
            }
            ask().inspect_err(|_| std::thread::sleep(Duration::from_millis(250))).map(|_| Ok(()))
        })??;
        // The controller manager ends at once where it finds no API server.
        control.run(grounds, controller_manager(grounds, access, &token_key)?)?;
        control.run(grounds, scheduler(grounds, access)?)?;
        Ok(control)
    }

    /// Fails if one of them has ended.
    pub(super) fn check_running(&mut self) -> Result<()> {
        self.programs.iter_mut().try_for_each(Process::check_running)
    }

    /// The running program of this name.
    pub(super) fn program(&mut self, name: &str) -> Result<&mut Process> {
        let of_name = |process: &&mut Process| process.log.file_stem().is_some_and(|stem| stem == name);
        self.programs
            .iter_mut()
            .find(of_name)
            .with_context(|| format!("no program {name} in the control plane"))
    }

    /// Kills etcd and the API server, hands out etcd's folder and that of its backup, and starts both as they were.
    pub(super) fn without_etcd(
        &mut self,
        grounds: &Grounds,
        change: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<()> {
        let mut commands = Vec::new();
        for name in ["kube-apiserver", "etcd"] {
            let program = self.program(name)?;
            commands.push(command_line(program.pid())?);
            program.kill();
            self.programs.retain(|process| process.log.file_stem().is_none_or(|stem| stem != name));
        }
        let etcd = grounds.data().join("control/etcd");
        change(&etcd, &etcd.with_extension("backup"))?;
        commands.into_iter().rev().try_for_each(|command| self.run(grounds, command))
    }

    fn run(&mut self, grounds: &Grounds, command: Command) -> Result<()> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_owned();
        let log = grounds.state.log_dir().join(name).with_extension("log");
        self.programs.push(Process::start(&grounds.control(), command, log)?);
        Ok(())
    }
}

/// How the program was started.
fn command_line(pid: u32) -> Result<Command> {
    let text = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
    let mut words = text.split_terminator('\0');
    let mut command = Command::new(words.next().context("no command line")?);
    command.args(words);
    Ok(command)
}

/// On loopback, which in this namespace only the API server is on: it needs no certificates. What it holds lives no
/// longer than the machine's power, so nothing waits for the disk.
fn etcd(grounds: &Grounds, dir: &Path) -> Command {
    let mut etcd = Command::new(grounds.tools.program("etcd"));
    etcd.arg("--data-dir").arg(dir.join("etcd"));
    etcd.args([
        "--listen-client-urls=http://127.0.0.1:2379",
        "--advertise-client-urls=http://127.0.0.1:2379",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        "--initial-cluster=default=http://127.0.0.1:2380",
        "--unsafe-no-fsync",
        "--log-level=warn",
    ]);
    etcd
}

fn api_server(grounds: &Grounds, dir: &Path, access: &Access, token_key: &TokenKey) -> Result<Command> {
    let [v4, v6] = control_addresses();
    let mut names: Vec<String> =
        ["kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(Into::into).into();
    names.extend(["kubernetes.default.svc.cluster.local", "localhost", "127.0.0.1"].map(Into::into));
    names.extend(API_SERVICE.map(Into::into));
    names.extend([v4.to_string(), v6.to_string()]);
    let serving =
        access.authority.sign(&Subject { file: "api-server", user: "kube-apiserver", group: "", names })?;
    let to_kubelets = access.authority.sign(&user("to-kubelets", "kube-apiserver-kubelet-client", ADMINS))?;
    // Who may speak for others, as an API server in front of another does, has an authority of its own: any
    // certificate of the cluster's would do otherwise.
    let front = Authority::create(dir, "front-ca")?;
    let front_client = front.sign(&user("front-client", "front-proxy-client", ""))?;

    let mut server = Command::new(grounds.tools.program("kube-apiserver"));
    let mut file = |flag: &str, path: &Path| {
        server.arg(format!("--{flag}={}", path.display()));
    };
    file("client-ca-file", &access.authority.files().certificate);
    file("tls-cert-file", &serving.certificate);
    file("tls-private-key-file", &serving.key);
    file("kubelet-certificate-authority", &access.authority.files().certificate);
    file("kubelet-client-certificate", &to_kubelets.certificate);
    file("kubelet-client-key", &to_kubelets.key);
    file("service-account-key-file", &token_key.public);
    file("service-account-signing-key-file", &token_key.private);
    file("requestheader-client-ca-file", &front.files().certificate);
    file("proxy-client-cert-file", &front_client.certificate);
    file("proxy-client-key-file", &front_client.key);
    server.args([
        "--etcd-servers=http://127.0.0.1:2379",
        &format!("--secure-port={API_PORT}"),
        &format!("--advertise-address={v4}"),
        &format!("--service-cluster-ip-range={SERVICES}"),
        "--service-account-issuer=https://kubernetes.default.svc.cluster.local",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        "--kubelet-preferred-address-types=InternalIP",
        "--requestheader-allowed-names=front-proxy-client",
        "--requestheader-extra-headers-prefix=X-Remote-Extra-",
        "--requestheader-group-headers=X-Remote-Group",
        "--requestheader-username-headers=X-Remote-User",
        // No rules for cluster IPs where it runs: it calls the pods of webhooks and of other API servers themselves.
        "--enable-aggregator-routing=true",
        "--allow-privileged=true",
        "--profiling=false",
    ]);
    Ok(server)
}

fn controller_manager(grounds: &Grounds, access: &Access, token_key: &TokenKey) -> Result<Command> {
    let kubeconfig = access.kubeconfig("controller-manager", "system:kube-controller-manager", "")?;
    let authority = access.authority.files();
    let mut manager = with_kubeconfig(grounds, "kube-controller-manager", &kubeconfig);
    let mut file = |flag: &str, path: &Path| {
        manager.arg(format!("--{flag}={}", path.display()));
    };
    file("root-ca-file", &authority.certificate);
    file("cluster-signing-cert-file", &authority.certificate);
    file("cluster-signing-key-file", &authority.key);
    file("service-account-private-key-file", &token_key.private);
    // It makes the folder, which is the machine's own if none is named.
    file("flex-volume-plugin-dir", &grounds.data().join("control/volumes"));
    // Each node's range of pods is set with its network, before there is a control plane.
    manager.args(["--allocate-node-cidrs=false", "--use-service-account-credentials=true"]);
    manager.arg(format!("--cluster-cidr={PODS}")).arg(format!("--service-cluster-ip-range={SERVICES}"));
    Ok(manager)
}

fn scheduler(grounds: &Grounds, access: &Access) -> Result<Command> {
    let kubeconfig = access.kubeconfig("scheduler", "system:kube-scheduler", "")?;
    Ok(with_kubeconfig(grounds, "kube-scheduler", &kubeconfig))
}

fn with_kubeconfig(grounds: &Grounds, program: &str, kubeconfig: &Path) -> Command {
    let mut command = Command::new(grounds.tools.program(program));
    for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
        command.arg(format!("--{flag}={}", kubeconfig.display()));
    }
    // There is but one of each.
    command.args(["--leader-elect=false", "--bind-address=127.0.0.1", "--profiling=false"]);
    command
}

/// The group that RBAC lets do everything.
pub(super) const ADMINS: &str = "system:masters";

fn user<'a>(file: &'a str, user: &'a str, group: &'a str) -> Subject<'a> {
    Subject { file, user, group, names: Vec::new() }
}

impl Access {
    /// A new authority.
    pub(super) fn create(grounds: &Grounds) -> Result<Self> {
        let authority = Authority::create(&grounds.data().join("control"), "cluster-ca")?;
        Ok(Self { authority, server: format!("https://{}:{API_PORT}", control_addresses()[0]) })
    }

    /// A kubeconfig for use on the cluster's network.
    pub(super) fn kubeconfig(&self, file: &str, name: &str, group: &str) -> Result<PathBuf> {
        self.authority.kubeconfig(&user(file, name, group), &self.server)
    }

    /// Like it, for a server elsewhere.
    pub(super) fn kubeconfig_for(
        &self,
        file: &str,
        name: &str,
        group: &str,
        server: &str,
    ) -> Result<PathBuf> {
        self.authority.kubeconfig(&user(file, name, group), server)
    }

    /// Copies the authority's certificate.
    pub(super) fn copy_certificate(&self, to: &Path) -> Result<()> {
        fs::copy(self.authority.files().certificate, to)?;
        Ok(())
    }
}
