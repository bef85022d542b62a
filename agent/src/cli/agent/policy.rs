//! The flags of what policies see and tell.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use crate::jwks::JwksSettings;
use crate::policy::authorization::{EscapedSlashes, PathNormalisation};
use crate::telemetry::{AccessLogFormat, AccessLogOutput, AccessLogSettings};

/// What policies see and tell.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Policies")]
pub struct PolicyArgs {
    /// File for what policies have denied or want to know of, a JSON object per line; `-`: standard output.
    #[arg(long, value_name = "FILE", env = "UNDERMESH_AUDIT_LOG")]
    audit_log: Option<PathBuf>,
    /// Tell who is denied a request by which policy and why.
    #[arg(long, env = "UNDERMESH_NAME_POLICIES")]
    name_policies: bool,
    /// What is done with requests whose path has an escaped slash or backslash (%2F, %5C) where there are policies.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_ESCAPED_SLASHES")]
    escaped_slashes: Slashes,
    /// Policies take paths as they are spelt; else `//` is to them what `/` is.
    #[arg(long, env = "UNDERMESH_KEEP_DOUBLE_SLASHES")]
    keep_double_slashes: bool,
    /// Policies do not tell upper case in paths from lower case.
    #[arg(long, env = "UNDERMESH_IGNORE_PATH_CASE")]
    ignore_path_case: bool,
    /// Roots in PEM that the certificates of those lead to who publish keys of tokens, instead of the system's.
    #[arg(long, value_name = "FILE", env = "UNDERMESH_JWKS_CA")]
    jwks_ca: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Slashes {
    /// They are answered with 400.
    #[default]
    Refuse,
    /// To policies they are part of a segment.
    Keep,
    /// To policies they are slashes.
    Decode,
}

impl PolicyArgs {
    /// How paths are made comparable.
    pub fn paths(&self) -> PathNormalisation {
        PathNormalisation {
            merge_slashes: !self.keep_double_slashes,
            case_insensitive: self.ignore_path_case,
            escaped_slashes: match self.escaped_slashes {
                Slashes::Refuse => EscapedSlashes::Refuse,
                Slashes::Keep => EscapedSlashes::Keep,
                Slashes::Decode => EscapedSlashes::Decode,
            },
        }
    }

    /// Whether who is denied something is told by which policy.
    pub fn names_policies(&self) -> bool {
        self.name_policies
    }

    /// How keys of tokens are fetched.
    pub fn jwks(&self) -> JwksSettings {
        JwksSettings { ca: self.jwks_ca.clone() }
    }

    /// Where the audit log goes.
    pub fn audit_log(&self) -> AccessLogSettings {
        let output = match &self.audit_log {
            None => AccessLogOutput::Off,
            Some(file) if file.as_os_str() == "-" => AccessLogOutput::Stdout,
            Some(file) => AccessLogOutput::File(file.clone()),
        };
        AccessLogSettings { output, format: AccessLogFormat::Json }
    }
}
