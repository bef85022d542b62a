//! `undermesh ca`: makes, rotates and shows the embedded certificate authority.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};

use super::print;
use super::table::{age, table};
use super::time::parse_time;
use crate::controller;
use crate::identity::TrustDomain;
use crate::identity::ca::directory::{self, CaState, DirectoryError, InitOptions, Phase};
use crate::sentence::in_one_sentence;

/// Make, rotate or show the certificate authority in a directory, which the agents of one machine share.
#[derive(Debug, Args)]
pub struct CaArgs {
    #[command(subcommand)]
    command: CaCommand,
}

#[derive(Debug, Subcommand)]
enum CaCommand {
    /// Make an authority with its first root.
    Init {
        /// The directory; made unless it is there. Only its owner may have access.
        #[arg(long, value_name = "DIR", env = "UNDERMESH_CA_DIR")]
        ca_dir: PathBuf,
        /// The trust domain to speak for.
        #[arg(long, value_name = "NAME", default_value = "cluster.local", env = "UNDERMESH_TRUST_DOMAIN")]
        trust_domain: TrustDomain,
        /// How long the root lives: a number with s, m, h or d.
        #[arg(long, value_name = "TIME", default_value = "3650d", value_parser = parse_time)]
        root_life: Duration,
        /// The longest that a leaf may live. A root is dropped that long after it has signed its last one.
        #[arg(long, value_name = "TIME", default_value = "24h", value_parser = parse_time)]
        leaf_life: Duration,
    },
    /// Make a new root, trusted at once, signing after the overlap. The old one goes when its leaves have expired.
    Rotate {
        /// The authority's directory.
        #[arg(
            long,
            value_name = "DIR",
            required_unless_present = "kubernetes",
            conflicts_with = "kubernetes",
            env = "UNDERMESH_CA_DIR"
        )]
        ca_dir: Option<PathBuf>,
        /// Ask the controller of the cluster that KUBECONFIG leads to, instead of --ca-dir. How long things take is then
        /// the controller's to say.
        #[arg(long, requires = "namespace", conflicts_with_all = ["overlap", "root_life"])]
        kubernetes: bool,
        /// With --kubernetes: the controller's namespace.
        #[arg(short, long, value_name = "NAME", env = "UNDERMESH_NAMESPACE")]
        namespace: Option<String>,
        /// With --kubernetes: the Secret that holds the root.
        #[arg(long, value_name = "NAME", default_value = "undermesh-root", requires = "kubernetes")]
        root_secret: String,
        /// Time for the new root to reach every agent before it signs: a minute where they share the directory, longer
        /// where it is copied to them.
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = parse_time)]
        overlap: Duration,
        /// How long the new root lives.
        #[arg(long, value_name = "TIME", default_value = "3650d", value_parser = parse_time)]
        root_life: Duration,
    },
    /// Print the roots and what each is now.
    Show {
        /// The authority's directory.
        #[arg(long, value_name = "DIR", env = "UNDERMESH_CA_DIR")]
        ca_dir: PathBuf,
    },
}

/// Runs the command.
pub fn run(args: &CaArgs) -> ExitCode {
    if let CaCommand::Rotate { kubernetes: true, namespace: Some(namespace), root_secret, .. } = &args.command
    {
        return print::outcome(ask_controller(namespace, root_secret));
    }
    print::outcome(carry_out(&args.command, SystemTime::now()))
}

fn ask_controller(namespace: &str, secret: &str) -> Result<String, String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| error.to_string())?;
    let request = runtime
        .block_on(controller::request_rotation(namespace, secret))
        .map_err(|error| in_one_sentence(error.as_ref()))?;
    Ok(format!(
        "asked for a new root (undermesh.io/rotate: {request}); the controller's log says when it signs\n"
    ))
}

fn carry_out(command: &CaCommand, now: SystemTime) -> Result<String, DirectoryError> {
    match command {
        CaCommand::Init { ca_dir, trust_domain, root_life, leaf_life } => {
            let options = InitOptions {
                trust_domain: trust_domain.clone(),
                root_life: *root_life,
                leaf_life: *leaf_life,
            };
            let state = directory::init(ca_dir, &options, now)?;
            Ok(as_text(ca_dir, &state, now))
        }
        CaCommand::Rotate { ca_dir, overlap, root_life, .. } => {
            // The parser sees to it that there is one.
            let Some(ca_dir) = ca_dir else { return Err(DirectoryError::None(PathBuf::new())) };
            let state = directory::rotate(ca_dir, *overlap, *root_life, now)?;
            Ok(as_text(ca_dir, &state, now))
        }
        CaCommand::Show { ca_dir } => Ok(as_text(ca_dir, &directory::read_state(ca_dir)?, now)),
    }
}

fn as_text(directory: &Path, state: &CaState, now: SystemTime) -> String {
    let left = |until: SystemTime| match until.duration_since(now) {
        Ok(left) => format!("in {}", age(left.as_secs_f64())),
        Err(past) => format!("{} ago", age(past.duration().as_secs_f64())),
    };
    let rows: Vec<_> = state
        .phases(now)
        .map(|(root, phase)| {
            [
                root.number.to_string(),
                phase.as_str().to_owned(),
                if phase == Phase::Next { left(root.signs_from) } else { "-".into() },
                root.trusted_until.map_or("-".into(), left),
                left(root.expires),
            ]
        })
        .collect();
    format!(
        "trust domain {} in {}, leaves live {} at most\n{}",
        state.trust_domain,
        directory.display(),
        age(state.leaf_life.as_secs_f64()),
        table(["ROOT", "STATE", "SIGNS", "DROPPED", "EXPIRES"], &rows)
    )
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_rotation_as_the_user_sees_it() {
        let base = tempfile::tempdir().unwrap();
        let ca_dir = base.path().join("ca");
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000 + seconds);
        let shown = |command: CaCommand, seconds: u64| {
            let text = carry_out(&command, at(seconds)).unwrap_or_else(|error| format!("{error}\n"));
            text.replace(&*base.path().to_string_lossy(), "/base")
        };
        let show = || CaCommand::Show { ca_dir: ca_dir.clone() };
        let init = || CaCommand::Init {
            ca_dir: ca_dir.clone(),
            trust_domain: TrustDomain::default(),
            root_life: Duration::from_secs(864_000),
            leaf_life: Duration::from_secs(3_600),
        };
        let rotate = || CaCommand::Rotate {
            ca_dir: Some(ca_dir.clone()),
            kubernetes: false,
            namespace: None,
            root_secret: String::new(),
            overlap: Duration::from_secs(60),
            root_life: Duration::from_secs(8_640_000),
        };
        let text = [
            shown(show(), 0),
            shown(init(), 0),
            shown(init(), 0),
            shown(rotate(), 100),
            shown(rotate(), 110),
        ]
        .concat()
            + &shown(show(), 160)
            + &shown(show(), 5_000);
        expect![[r#"
            /base/ca has no certificate authority; `undermesh ca init` makes one
            trust domain cluster.local in /base/ca, leaves live 1h00m at most
            ROOT  STATE    SIGNS  DROPPED  EXPIRES
            1     signing  -      -        in 10d00h
            /base/ca has a certificate authority already; `undermesh ca rotate` gives it a new root
            trust domain cluster.local in /base/ca, leaves live 1h00m at most
            ROOT  STATE    SIGNS     DROPPED   EXPIRES
            1     signing  -         in 1h11m  in 9d23h
            2     next     in 1m00s  -         in 100d00h
            a rotation is under way: root 2 signs from 2027-01-15T08:02:40Z on
            trust domain cluster.local in /base/ca, leaves live 1h00m at most
            ROOT  STATE     SIGNS  DROPPED   EXPIRES
            1     retiring  -      in 1h10m  in 9d23h
            2     signing   -      -         in 99d23h
            trust domain cluster.local in /base/ca, leaves live 1h00m at most
            ROOT  STATE    SIGNS  DROPPED     EXPIRES
            1     dropped  -      10m40s ago  in 9d22h
            2     signing  -      -           in 99d22h
        "#]]
        .assert_eq(&text);
    }
}
