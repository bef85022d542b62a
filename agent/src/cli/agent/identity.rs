//! The flags of identity: who signs certificates, whom to believe, what plaintext may do.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::agent::{AuthoritySettings, TunnelSettings};
use crate::cli::time::parse_time;
use crate::identity::ca::grpc::{GrpcCa, GrpcSettings, GrpcSettingsError};
use crate::identity::{CrlMode, TrustDomain, TrustFilesSettings};
use crate::model::{MtlsMode, SameNode};

/// Renewal is at half of a life, and an authority may take ten seconds for an answer.
const SHORTEST_LIFETIME: Duration = Duration::from_secs(30);

#[derive(Debug, Args)]
pub(super) struct IdentityArgs {
    /// Directory of the embedded certificate authority, which the agents of one machine share: connections between
    /// nodes go through mutual TLS. Made, with an authority in it, if it is empty or not there.
    #[arg(long, value_name = "DIR", group = "authority", env = "UNDERMESH_CA_DIR")]
    ca_dir: Option<PathBuf>,
    /// Certificate authority that serves Istio's protocol (istiod, istio-csr), instead of --ca-dir.
    #[arg(
        long,
        value_name = "https://HOST:PORT",
        group = "authority",
        requires_all = ["ca_root", "ca_token"],
        env = "UNDERMESH_CA_ADDRESS"
    )]
    ca_address: Option<String>,
    /// Roots in PEM that its own certificate must lead to. They are believed for the mesh as well.
    #[arg(long, value_name = "FILE", requires = "ca_address", env = "UNDERMESH_CA_ROOT")]
    ca_root: Option<PathBuf>,
    /// The service account token that it is shown, read at each request.
    #[arg(long, value_name = "FILE", requires = "ca_address", env = "UNDERMESH_CA_TOKEN")]
    ca_token: Option<PathBuf>,
    /// The name that it knows this cluster by.
    #[arg(
        long,
        value_name = "NAME",
        default_value = "Kubernetes",
        requires = "ca_address",
        env = "UNDERMESH_CLUSTER_ID"
    )]
    cluster_id: String,
    /// Folder in which the agents tell each other which pods are enrolled; with --kubernetes the API server tells.
    #[arg(long, value_name = "DIR", requires = "authority", env = "UNDERMESH_STATE_DIR")]
    state_dir: Option<PathBuf>,
    /// Trust domain of the certificate authority.
    #[arg(long, value_name = "NAME", default_value = "cluster.local", env = "UNDERMESH_TRUST_DOMAIN")]
    trust_domain: TrustDomain,
    /// How long certificates live: a number with s, m, h or d, 30s at least. The authority may give less.
    #[arg(
        long,
        value_name = "TIME",
        default_value = "24h",
        value_parser = certificate_lifetime,
        requires = "authority",
        env = "UNDERMESH_CERTIFICATE_LIFETIME"
    )]
    certificate_lifetime: Duration,
    /// Roots in PEM that are believed for another trust domain; may be given several times (in the environment
    /// separated by commas). For our own they are believed beside those of the authority.
    #[arg(
        long = "trust-bundle",
        value_name = "DOMAIN=FILE",
        value_parser = trust_bundle,
        value_delimiter = ',',
        requires = "authority",
        env = "UNDERMESH_TRUST_BUNDLE"
    )]
    trust_bundles: Vec<(TrustDomain, PathBuf)>,
    /// Revocation lists in PEM or DER; may be given several times (in the environment separated by commas).
    #[arg(
        long = "crl",
        value_name = "FILE",
        value_delimiter = ',',
        requires = "authority",
        env = "UNDERMESH_CRL"
    )]
    crls: Vec<PathBuf>,
    /// What revocation lists count for: with `require` every issuer needs one, with `prefer` what they name is
    /// refused, with `off` they are not looked at.
    #[arg(
        long,
        value_name = "require|prefer|off",
        default_value = "prefer",
        requires = "authority",
        env = "UNDERMESH_CRL_MODE"
    )]
    crl_mode: CrlMode,
    /// Whether pods take plaintext from outside of the mesh, unless their annotation `undermesh.io/mtls` or that of
    /// their namespace says otherwise.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_MTLS")]
    mtls: MtlsChoice,
    /// Which pods are reached through mutual TLS from their own node as well.
    #[arg(long, value_enum, default_value_t, requires = "authority", env = "UNDERMESH_SAME_NODE")]
    same_node: SameNodeChoice,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum MtlsChoice {
    #[default]
    Permissive,
    Strict,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum SameNodeChoice {
    /// Those of which policies or tokens are about requests.
    #[default]
    Auto,
    /// All.
    Tunnel,
}

/// Flags that cannot be meant as they are, in a sentence that names them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Mistake {
    #[error(
        "--crl-mode require refuses every peer as long as there is no revocation list: name one with --crl"
    )]
    NoCrl,
    #[error(
        "with --config-dir an authority needs --state-dir, the folder in which the agents tell each other which pods \
         are enrolled"
    )]
    NoStateDir,
    #[error(
        "--state-dir is for --config-dir: with --kubernetes the API server tells which pods are enrolled"
    )]
    NoUseForStateDir,
    #[error("--ca-address: {0}")]
    CaAddress(GrpcSettingsError),
    #[error("--cluster-id: {0}")]
    ClusterId(GrpcSettingsError),
}

impl IdentityArgs {
    /// The settings of mutual TLS; none without an authority. Where the Kubernetes API is the source, agents tell each
    /// other through it.
    pub(super) fn tunnel_settings(&self, kubernetes: bool) -> Result<Option<TunnelSettings>, Mistake> {
        let Some(authority) = self.authority()? else { return Ok(None) };
        let state_dir = self.state_dir.clone();
        match (kubernetes, &state_dir) {
            (false, None) => return Err(Mistake::NoStateDir),
            (true, Some(_)) => return Err(Mistake::NoUseForStateDir),
            _ => {}
        }
        if self.crl_mode == CrlMode::Require && self.crls.is_empty() {
            return Err(Mistake::NoCrl);
        }
        Ok(Some(TunnelSettings {
            authority,
            state_dir,
            trust_domain: self.trust_domain.clone(),
            certificate_lifetime: self.certificate_lifetime,
            trust_files: TrustFilesSettings { bundles: self.trust_bundles.clone(), crls: self.crls.clone() },
            crl_mode: self.crl_mode,
        }))
    }

    /// The mTLS mode of pods that do not choose.
    pub(super) fn default_mtls(&self) -> MtlsMode {
        match self.mtls {
            MtlsChoice::Permissive => MtlsMode::Permissive,
            MtlsChoice::Strict => MtlsMode::Strict,
        }
    }

    /// How pods of this node reach each other. Without an authority there is but one way.
    pub(super) fn same_node(&self) -> SameNode {
        match self.same_node {
            _ if self.ca_dir.is_none() && self.ca_address.is_none() => SameNode::Plaintext,
            SameNodeChoice::Auto => SameNode::ByRequest,
            SameNodeChoice::Tunnel => SameNode::Tunnel,
        }
    }

    fn authority(&self) -> Result<Option<AuthoritySettings>, Mistake> {
        if let Some(directory) = &self.ca_dir {
            return Ok(Some(AuthoritySettings::Directory(directory.clone())));
        }
        let files = self.ca_root.clone().zip(self.ca_token.clone());
        let Some((address, (root, token))) = self.ca_address.clone().zip(files) else { return Ok(None) };
        let cluster = self.cluster_id.clone();
        let settings = GrpcSettings { address, server_name: None, root, token, cluster };
        GrpcCa::new(settings.clone()).map_err(|error| match error {
            GrpcSettingsError::Address(_) => Mistake::CaAddress(error),
            GrpcSettingsError::Cluster(_) => Mistake::ClusterId(error),
        })?;
        Ok(Some(AuthoritySettings::Grpc(settings)))
    }
}

fn certificate_lifetime(text: &str) -> Result<Duration, String> {
    match parse_time(text)? {
        life if life < SHORTEST_LIFETIME => {
            Err(format!("certificates live {} s at least", SHORTEST_LIFETIME.as_secs()))
        }
        life => Ok(life),
    }
}

fn trust_bundle(text: &str) -> Result<(TrustDomain, PathBuf), String> {
    match text.split_once('=') {
        Some((domain, file)) if !file.is_empty() => {
            let domain = domain.parse().map_err(|error| format!("{domain:?} is no trust domain: {error}"))?;
            Ok((domain, file.into()))
        }
        _ => Err("expected DOMAIN=FILE".into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fmt::Write;

    use clap::Parser;
    use expect_test::expect;

    use super::*;

    #[derive(Debug, Parser)]
    struct Flags {
        #[command(flatten)]
        identity: IdentityArgs,
    }

    /// The settings, or the first line of what is wrong.
    fn read(flags: &str) -> String {
        let words = std::iter::once("undermesh").chain(flags.split_whitespace());
        match Flags::try_parse_from(words) {
            Ok(flags) => match flags.identity.tunnel_settings(false) {
                Ok(Some(settings)) => format!(
                    "{:?}, {} s, {} bundles, {} lists, {}",
                    settings.authority,
                    settings.certificate_lifetime.as_secs(),
                    settings.trust_files.bundles.len(),
                    settings.trust_files.crls.len(),
                    settings.crl_mode.as_str()
                ),
                Ok(None) => "plaintext".into(),
                Err(mistake) => mistake.to_string(),
            },
            Err(error) => {
                let text = error.to_string();
                let told = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
                told.collect::<Vec<_>>().join(" ")
            }
        }
    }

    #[test]
    fn pods_of_one_node_reach_each_other_as_the_flags_say() {
        let check = |flags: &str, expected| {
            let words = std::iter::once("undermesh").chain(flags.split_whitespace());
            assert_eq!(Flags::try_parse_from(words).unwrap().identity.same_node(), expected, "{flags}");
        };
        check("", SameNode::Plaintext);
        check("--ca-dir /ca", SameNode::ByRequest);
        check("--ca-dir /ca --same-node tunnel", SameNode::Tunnel);
        check("--ca-address https://a:1 --ca-root /root --ca-token /token", SameNode::ByRequest);
    }

    #[test]
    fn flags_become_settings_or_a_sentence_that_names_them() {
        let grpc = "--ca-address https://istiod:15012 --ca-root /root --ca-token /token --state-dir /state";
        let directory = "--ca-dir /ca --state-dir /state";
        let cases = [
            String::new(),
            directory.into(),
            format!("{directory} --certificate-lifetime 60s --crl /a --crl /b --crl-mode require"),
            format!("{directory} --trust-bundle a.test=/a --trust-bundle b.test=/b=b --crl-mode off"),
            grpc.into(),
            format!("{grpc} --cluster-id west --mtls strict"),
            format!("{grpc} --ca-dir /ca"),
            "--ca-dir /ca".into(),
            "--state-dir /state".into(),
            "--ca-address https://istiod:15012 --state-dir /state".into(),
            "--ca-root /root".into(),
            format!("{directory} --cluster-id west"),
            "--crl /a".into(),
            "--crl-mode off".into(),
            "--trust-bundle a.test=/a".into(),
            "--same-node tunnel".into(),
            format!("{directory} --crl-mode require"),
            format!("{directory} --crl-mode sometimes"),
            format!("{directory} --certificate-lifetime 29s"),
            format!("{directory} --certificate-lifetime soon"),
            format!("{directory} --trust-bundle /a"),
            format!("{directory} --trust-bundle A.test=/a"),
            format!("{directory} --mtls maybe"),
            grpc.replace("https", "http"),
            format!("{grpc} --cluster-id \u{7f}"),
        ];
        let mut table = String::new();
        for flags in cases {
            writeln!(table, "{flags:?}\n    {}", read(&flags)).unwrap();
        }
        expect![[r#"
            ""
                plaintext
            "--ca-dir /ca --state-dir /state"
                Directory("/ca"), 86400 s, 0 bundles, 0 lists, prefer
            "--ca-dir /ca --state-dir /state --certificate-lifetime 60s --crl /a --crl /b --crl-mode require"
                Directory("/ca"), 60 s, 0 bundles, 2 lists, require
            "--ca-dir /ca --state-dir /state --trust-bundle a.test=/a --trust-bundle b.test=/b=b --crl-mode off"
                Directory("/ca"), 86400 s, 2 bundles, 0 lists, off
            "--ca-address https://istiod:15012 --ca-root /root --ca-token /token --state-dir /state"
                Grpc(GrpcSettings { address: "https://istiod:15012", server_name: None, root: "/root", token: "/token", cluster: "Kubernetes" }), 86400 s, 0 bundles, 0 lists, prefer
            "--ca-address https://istiod:15012 --ca-root /root --ca-token /token --state-dir /state --cluster-id west --mtls strict"
                Grpc(GrpcSettings { address: "https://istiod:15012", server_name: None, root: "/root", token: "/token", cluster: "west" }), 86400 s, 0 bundles, 0 lists, prefer
            "--ca-address https://istiod:15012 --ca-root /root --ca-token /token --state-dir /state --ca-dir /ca"
                error: the argument '--ca-address <https://HOST:PORT>' cannot be used with '--ca-dir <DIR>'
            "--ca-dir /ca"
                with --config-dir an authority needs --state-dir, the folder in which the agents tell each other which pods are enrolled
            "--state-dir /state"
                error: the following required arguments were not provided: <--ca-dir <DIR>|--ca-address <https://HOST:PORT>>
            "--ca-address https://istiod:15012 --state-dir /state"
                error: the following required arguments were not provided: --ca-root <FILE> --ca-token <FILE>
            "--ca-root /root"
                error: the following required arguments were not provided: --ca-token <FILE> --ca-address <https://HOST:PORT>
            "--ca-dir /ca --state-dir /state --cluster-id west"
                error: the following required arguments were not provided: --ca-root <FILE> --ca-token <FILE> --ca-address <https://HOST:PORT>
            "--crl /a"
                error: the following required arguments were not provided: <--ca-dir <DIR>|--ca-address <https://HOST:PORT>>
            "--crl-mode off"
                error: the following required arguments were not provided: <--ca-dir <DIR>|--ca-address <https://HOST:PORT>>
            "--trust-bundle a.test=/a"
                error: the following required arguments were not provided: <--ca-dir <DIR>|--ca-address <https://HOST:PORT>>
            "--same-node tunnel"
                error: the following required arguments were not provided: <--ca-dir <DIR>|--ca-address <https://HOST:PORT>>
            "--ca-dir /ca --state-dir /state --crl-mode require"
                --crl-mode require refuses every peer as long as there is no revocation list: name one with --crl
            "--ca-dir /ca --state-dir /state --crl-mode sometimes"
                error: invalid value 'sometimes' for '--crl-mode <require|prefer|off>': "sometimes" is not one of require, prefer, off
            "--ca-dir /ca --state-dir /state --certificate-lifetime 29s"
                error: invalid value '29s' for '--certificate-lifetime <TIME>': certificates live 30 s at least
            "--ca-dir /ca --state-dir /state --certificate-lifetime soon"
                error: invalid value 'soon' for '--certificate-lifetime <TIME>': a time is a number above 0 with s, m, h or d, at most 100 years
            "--ca-dir /ca --state-dir /state --trust-bundle /a"
                error: invalid value '/a' for '--trust-bundle <DOMAIN=FILE>': expected DOMAIN=FILE
            "--ca-dir /ca --state-dir /state --trust-bundle A.test=/a"
                error: invalid value 'A.test=/a' for '--trust-bundle <DOMAIN=FILE>': "A.test" is no trust domain: the trust domain has a character other than a-z, 0-9, '.', '-' and '_'
            "--ca-dir /ca --state-dir /state --mtls maybe"
                error: invalid value 'maybe' for '--mtls <MTLS>' [possible values: permissive, strict]
            "--ca-address http://istiod:15012 --ca-root /root --ca-token /token --state-dir /state"
                --ca-address: the address of the certificate authority, "http://istiod:15012", is not https://HOST:PORT
            "--ca-address https://istiod:15012 --ca-root /root --ca-token /token --state-dir /state --cluster-id \u{7f}"
                --cluster-id: the cluster name "\u{7f}" has characters that no header may have
        "#]].assert_eq(&table);
    }
}
