//! `undermesh ca`: makes, rotates and shows the embedded certificate authority.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::{Args, Subcommand};

use super::print;
use super::table::{age, table};
use crate::identity::TrustDomain;
use crate::identity::ca::directory::{self, CaState, DirectoryError, InitOptions, Phase};

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
        #[arg(long, value_name = "DIR", env = "UNDERMESH_CA_DIR")]
        ca_dir: PathBuf,
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
    print::outcome(carry_out(&args.command, SystemTime::now()))
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
        CaCommand::Rotate { ca_dir, overlap, root_life } => {
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

/// `90s`, `5m`, `24h`, `30d`; a bare number is seconds.
fn parse_time(text: &str) -> Result<Duration, String> {
    const LONGEST: u64 = 100 * 365 * 86_400;
    let (number, unit) = match text.char_indices().last() {
        Some((at, 's')) => (&text[..at], 1),
        Some((at, 'm')) => (&text[..at], 60),
        Some((at, 'h')) => (&text[..at], 3_600),
        Some((at, 'd')) => (&text[..at], 86_400),
        _ => (text, 1),
    };
    let seconds = number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit));
    match seconds {
        Some(seconds) if (1..=LONGEST).contains(&seconds) => Ok(Duration::from_secs(seconds)),
        _ => Err("a time is a number above 0 with s, m, h or d, at most 100 years".into()),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn times() {
        let check = |text: &str, seconds: Option<u64>| {
            assert_eq!(parse_time(text).ok(), seconds.map(Duration::from_secs), "{text:?}");
        };
        check("90s", Some(90));
        check("90", Some(90));
        check("5m", Some(300));
        check("24h", Some(86_400));
        check("30d", Some(2_592_000));
        for odd in ["", "s", "0", "-1s", "1.5h", "1w", "1 h", "9999999999999999999d", "5ü", "36501d"] {
            check(odd, None);
        }
    }

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
            ca_dir: ca_dir.clone(),
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
        expect![[r#""#]].assert_eq(&text);
    }
}
