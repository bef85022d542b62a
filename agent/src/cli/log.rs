//! The log of the roles that run for ever, and their last words.

use std::io::IsTerminal as _;

use clap::ValueEnum;
use tracing_subscriber::EnvFilter;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    #[default]
    Text,
    Json,
}

/// Logs to standard error from now on.
pub(super) fn start_log(format: LogFormat) {
    let mut filter = EnvFilter::try_from_env("UNDERMESH_LOG").unwrap_or_else(|_| EnvFilter::new("info"));
    // The API client logs answers that it cannot read in full, and one of them may be a Secret or a token.
    if let Ok(directive) = "kube_client::client=error".parse() {
        filter = filter.add_directive(directive);
    }
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_ansi(std::io::stderr().is_terminal()).init(),
        LogFormat::Json => log.json().init(),
    }
}
