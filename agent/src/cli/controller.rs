//! `undermesh controller`: raw arguments, validated into settings once.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use tracing::error;

use super::log::{LogFormat, start_log};
use super::time::parse_time;
use crate::controller::{self, ControllerSettings, RootSettings, ServiceAccount, WebhookSettings};
use crate::identity::TrustDomain;
use crate::sentence::in_one_sentence;

const DAY: Duration = Duration::from_secs(86_400);
/// Agents renew at half of a life, and may be without the authority for half of one.
const SHORTEST_LIFETIME: Duration = Duration::from_secs(60);

/// Run the controller: the cluster's certificate authority, and what one replica does for all nodes.
#[derive(Debug, Args)]
pub struct ControllerArgs {
    /// Namespace that the controller runs in; its Secret, ConfigMap and Lease are there.
    #[arg(long, value_name = "NAME", value_parser = name, env = "UNDERMESH_NAMESPACE")]
    namespace: String,
    /// Name of the pod that it runs in: the holder of the lease.
    #[arg(long, value_name = "NAME", value_parser = name, env = "UNDERMESH_POD_NAME")]
    pod_name: String,
    /// Address of the certificate authority; [::] takes IPv4 as well.
    #[arg(long, value_name = "IP:PORT", default_value = "[::]:15012", env = "UNDERMESH_CA_LISTEN")]
    ca_listen: SocketAddr,
    /// Address of the metrics and health endpoints.
    #[arg(long, value_name = "IP:PORT", default_value = "127.0.0.1:15020", env = "UNDERMESH_ADMIN_ADDRESS")]
    admin_address: SocketAddr,
    /// Trust domain of the mesh.
    #[arg(long, value_name = "NAME", default_value = "cluster.local", env = "UNDERMESH_TRUST_DOMAIN")]
    trust_domain: TrustDomain,
    /// The longest that a certificate may live: a number with s, m, h or d, from 60s to 24h.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "24h",
        value_parser = certificate_lifetime,
        env = "UNDERMESH_CERTIFICATE_LIFETIME"
    )]
    certificate_lifetime: Duration,
    /// Secret that holds the root; made unless it is there.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "undermesh-root",
        value_parser = name,
        env = "UNDERMESH_ROOT_SECRET"
    )]
    root_secret: String,
    /// How long a root that is made here lives.
    #[arg(long, value_name = "TIME", default_value = "3650d", value_parser = parse_time, env = "UNDERMESH_ROOT_LIFETIME")]
    root_lifetime: Duration,
    /// Time for a new root to reach every agent before it signs.
    #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time, env = "UNDERMESH_ROOT_OVERLAP")]
    root_overlap: Duration,
    /// ConfigMap in which the roots to be trusted are published.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "undermesh-root-bundle",
        value_parser = name,
        env = "UNDERMESH_BUNDLE_CONFIG_MAP"
    )]
    bundle_config_map: String,
    /// ValidatingWebhookConfiguration that asks this controller about objects with marks of the mesh; none: no webhook.
    #[arg(long, value_name = "NAME", value_parser = name, env = "UNDERMESH_WEBHOOK_CONFIGURATION")]
    webhook_configuration: Option<String>,
    /// Address of the webhook.
    #[arg(long, value_name = "IP:PORT", default_value = "[::]:15017", env = "UNDERMESH_WEBHOOK_LISTEN")]
    webhook_listen: SocketAddr,
    /// Service under which callers reach the authority; names its certificate.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "undermesh-controller",
        value_parser = name,
        env = "UNDERMESH_SERVICE"
    )]
    service: String,
    /// Another name or address in the authority's certificate; may be given several times (in the environment separated
    /// by commas).
    #[arg(long = "ca-name", value_name = "NAME", value_delimiter = ',', env = "UNDERMESH_CA_NAMES")]
    ca_names: Vec<String>,
    /// What a caller's token must be for.
    #[arg(long, value_name = "NAME", default_value = "undermesh.io", env = "UNDERMESH_TOKEN_AUDIENCE")]
    token_audience: String,
    /// Service account of the agents; of the controller's own namespace unless another one is named.
    #[arg(
        long,
        value_name = "[NAMESPACE/]NAME",
        default_value = "undermesh-agent",
        value_parser = service_account,
        env = "UNDERMESH_AGENT_SERVICE_ACCOUNT"
    )]
    agent_service_account: (Option<String>, String),
    /// How long an agent must have been ready before the startup taint of its node goes.
    #[arg(long, value_name = "TIME", default_value = "3s", value_parser = parse_time, env = "UNDERMESH_SETTLE_TIME")]
    settle_time: Duration,
    /// Format of the log, on standard error; filtered by the environment variable UNDERMESH_LOG.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_LOG_FORMAT")]
    log_format: LogFormat,
}

/// Runs the controller until it is told to stop. Exit code 1: it could not start or go on.
pub fn run(args: &ControllerArgs) -> ExitCode {
    start_log(args.log_format);
    let outcome = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(anyhow::Error::from)
        .and_then(|runtime| runtime.block_on(controller::run(args.settings())));
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            error!("{}", in_one_sentence(error.as_ref()));
            ExitCode::FAILURE
        }
    }
}

impl ControllerArgs {
    fn settings(&self) -> ControllerSettings {
        let (service, own) = (&self.service, &self.namespace);
        let (namespace, name) = &self.agent_service_account;
        let mut ca_names = vec![
            format!("{service}.{own}.svc"),
            format!("{service}.{own}.svc.cluster.local"),
            format!("{service}.{own}"),
        ];
        ca_names.extend(self.ca_names.iter().cloned());
        ControllerSettings {
            namespace: own.clone(),
            pod_name: self.pod_name.clone(),
            ca_listen: self.ca_listen,
            ca_names,
            admin_address: self.admin_address,
            certificate_lifetime: self.certificate_lifetime,
            root: RootSettings {
                trust_domain: self.trust_domain.clone(),
                secret: self.root_secret.clone(),
                life: self.root_lifetime,
                overlap: self.root_overlap,
            },
            bundle_config_map: self.bundle_config_map.clone(),
            webhook: self
                .webhook_configuration
                .clone()
                .map(|configuration| WebhookSettings { listen: self.webhook_listen, configuration }),
            token_audience: self.token_audience.clone(),
            agent: ServiceAccount {
                namespace: namespace.as_ref().unwrap_or(own).clone(),
                name: name.clone(),
            },
            settle: self.settle_time,
        }
    }
}

fn name(text: &str) -> Result<String, String> {
    match controller::is_name(text) {
        true => Ok(text.into()),
        false => Err("not a name in Kubernetes: lower case letters, digits, '-' and '.'".into()),
    }
}

fn service_account(text: &str) -> Result<(Option<String>, String), String> {
    match text.split_once('/') {
        Some((namespace, account)) => Ok((Some(name(namespace)?), name(account)?)),
        None => Ok((None, name(text)?)),
    }
}

fn certificate_lifetime(text: &str) -> Result<Duration, String> {
    match parse_time(text)? {
        life if (SHORTEST_LIFETIME..=DAY).contains(&life) => Ok(life),
        _ => Err("certificates live from 60s to 24h".into()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        controller: ControllerArgs,
    }

    fn read(flags: &str) -> Result<ControllerSettings, String> {
        let words = "undermesh --namespace mesh --pod-name c-0".split(' ').chain(flags.split_whitespace());
        match Flags::try_parse_from(words) {
            Ok(flags) => Ok(flags.controller.settings()),
            Err(error) => Err(error.to_string().lines().next().unwrap_or_default().to_owned()),
        }
    }

    #[test]
    fn flags_become_settings_or_a_sentence_that_names_them() {
        let settings = read("").unwrap();
        assert_eq!(settings.agent.to_string(), "mesh/undermesh-agent");
        let names = "undermesh-controller.mesh.svc undermesh-controller.mesh.svc.cluster.local undermesh-controller.mesh";
        assert_eq!(settings.ca_names.join(" "), names);
        assert_eq!((settings.certificate_lifetime, settings.settle), (DAY, Duration::from_secs(3)));
        assert!(settings.webhook.is_none());
        let webhook = read("--webhook-configuration mesh").unwrap().webhook.unwrap();
        assert_eq!((webhook.listen.port(), &*webhook.configuration), (15017, "mesh"));
        let settings = read("--agent-service-account a/b --ca-name x,10.0.0.1 --service s").unwrap();
        assert_eq!(settings.agent.to_string(), "a/b");
        assert_eq!(settings.ca_names[2..].join(" "), "s.mesh x 10.0.0.1");
        for (flags, expected) in [
            ("--certificate-lifetime 25h", "certificates live from 60s to 24h"),
            ("--certificate-lifetime 59s", "certificates live from 60s to 24h"),
            ("--root-secret A", "not a name in Kubernetes"),
            ("--agent-service-account a/b/c", "not a name in Kubernetes"),
            ("--agent-service-account /b", "not a name in Kubernetes"),
            ("--trust-domain A", "the trust domain has a character"),
            ("--ca-listen 15012", "invalid socket address"),
        ] {
            let told = read(flags).unwrap_err();
            assert!(told.contains(expected), "{flags}: {told}");
        }
    }
}
