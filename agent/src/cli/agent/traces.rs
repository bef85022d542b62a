//! The flags of traces: where spans go, how many, and what the collector is shown.

use std::convert::Infallible;
use std::fmt;
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use http::Uri;
use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderName, HeaderValue, TE, TRANSFER_ENCODING,
};

use crate::telemetry::{
    TraceHeader, TraceHeaderValue, TraceProtocol, TraceSettings, TraceSettingsError, Traces,
};

#[derive(Debug, Args)]
pub(super) struct TraceArgs {
    /// Collector that is sent a span of each sampled HTTP request, by OTLP; without it none is made, and trace contexts pass
    /// untouched.
    #[arg(long, value_name = "http[s]://HOST:PORT", env = "UNDERMESH_TRACE_ENDPOINT")]
    trace_endpoint: Option<Uri>,
    /// How it is spoken to: gRPC (by custom on port 4317), or protobuf in HTTP requests (4318, to the endpoint's path, or
    /// /v1/traces if it has none).
    #[arg(long, value_enum, default_value_t, requires = "trace_endpoint", env = "UNDERMESH_TRACE_PROTOCOL")]
    trace_protocol: Protocol,
    /// Share of requests that are recorded, 0 to 1, of those whose callers have not decided.
    #[arg(
        long,
        value_name = "SHARE",
        default_value_t = 0.01,
        value_parser = share,
        requires = "trace_endpoint",
        env = "UNDERMESH_TRACE_SAMPLING"
    )]
    trace_sampling: f64,
    /// Header that the collector is shown; may be given several times (in the environment one). Others on the machine can see it:
    /// secrets are better kept in files.
    #[arg(
        long = "trace-header",
        value_name = "NAME=VALUE",
        value_parser = secret,
        hide_env_values = true,
        requires = "trace_endpoint",
        env = "UNDERMESH_TRACE_HEADER"
    )]
    trace_headers: Vec<Secret>,
    /// The same, with the value in the first line of a file, which is read for each batch; may be given several times (in the
    /// environment separated by commas).
    #[arg(
        long = "trace-header-file",
        value_name = "NAME=FILE",
        value_parser = header_file,
        value_delimiter = ',',
        requires = "trace_endpoint",
        env = "UNDERMESH_TRACE_HEADER_FILE"
    )]
    trace_header_files: Vec<TraceHeader>,
    /// Roots in PEM that the collector's certificate must lead to, instead of the system's.
    #[arg(long, value_name = "FILE", requires = "trace_endpoint", env = "UNDERMESH_TRACE_CA")]
    trace_ca: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Protocol {
    #[default]
    Grpc,
    Http,
}

/// What neither the log nor an error is to show.
#[derive(Clone)]
struct Secret(String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret")
    }
}

/// Flags that cannot be meant as they are, in a sentence that names them.
#[derive(Debug, thiserror::Error)]
pub(super) enum Mistake {
    #[error("--trace-endpoint: {0}")]
    Endpoint(TraceSettingsError),
    #[error("--trace-ca: {0}")]
    Ca(TraceSettingsError),
    // Without the value: it is a secret.
    #[error("--trace-header: expected NAME=VALUE, a header as HTTP has them")]
    Header,
    #[error("--trace-header: {0} is part of how requests are made")]
    Reserved(HeaderName),
}

impl TraceArgs {
    /// The settings of traces; none without a collector.
    pub(super) fn settings(&self, node: &str) -> Result<Option<TraceSettings>, Mistake> {
        let Some(endpoint) = self.trace_endpoint.clone() else { return Ok(None) };
        let given = self.trace_headers.iter().map(header);
        let mut headers = given.collect::<Result<Vec<_>, _>>()?;
        headers.extend(self.trace_header_files.iter().cloned());
        let settings = TraceSettings {
            endpoint,
            protocol: match self.trace_protocol {
                Protocol::Grpc => TraceProtocol::Grpc,
                Protocol::Http => TraceProtocol::Http,
            },
            sampling: self.trace_sampling,
            headers,
            ca: self.trace_ca.clone(),
            node: node.into(),
        };
        Traces::new(&settings).map_err(|error| match (&error, &self.trace_ca) {
            (TraceSettingsError::Roots(_), Some(_)) => Mistake::Ca(error),
            _ => Mistake::Endpoint(error),
        })?;
        Ok(Some(settings))
    }
}

fn header(Secret(text): &Secret) -> Result<TraceHeader, Mistake> {
    let (name, value) = text.split_once('=').ok_or(Mistake::Header)?;
    let name: HeaderName = name.parse().map_err(|_| Mistake::Header)?;
    if is_reserved(&name) {
        return Err(Mistake::Reserved(name));
    }
    let mut value = HeaderValue::try_from(value).map_err(|_| Mistake::Header)?;
    value.set_sensitive(true);
    Ok(TraceHeader { name, value: TraceHeaderValue::Given(value) })
}

fn header_file(text: &str) -> Result<TraceHeader, String> {
    match text.split_once('=') {
        Some((name, file)) if !file.is_empty() => {
            let name: HeaderName = name.parse().map_err(|_| format!("{name:?} is no header's name"))?;
            if is_reserved(&name) {
                return Err(format!("{name} is part of how requests are made"));
            }
            Ok(TraceHeader { name, value: TraceHeaderValue::File(file.into()) })
        }
        _ => Err("expected NAME=FILE".into()),
    }
}

fn is_reserved(name: &HeaderName) -> bool {
    const RESERVED: [HeaderName; 6] = [CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, TE, TRANSFER_ENCODING];
    RESERVED.contains(name) || name.as_str().starts_with("grpc-")
}

fn secret(text: &str) -> Result<Secret, Infallible> {
    Ok(Secret(text.to_owned()))
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "a share is a number from 0 to 1".into())
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
        traces: TraceArgs,
    }

    /// The settings, or what is wrong; and whether the secret is in one of them.
    fn read(flags: &str) -> String {
        let words = std::iter::once("undermesh").chain(flags.split_whitespace());
        let told = match Flags::try_parse_from(words) {
            Ok(flags) => match flags.traces.settings("node-1") {
                Ok(Some(settings)) => {
                    let TraceSettings { endpoint, protocol, sampling, headers, .. } = &settings;
                    assert!(!format!("{flags:?} {settings:?}").contains("hush"), "{flags:?}");
                    format!("{endpoint} {protocol:?} {sampling} {headers:?}")
                }
                Ok(None) => "off".into(),
                Err(mistake) => mistake.to_string(),
            },
            Err(error) => {
                let text = error.to_string();
                let told = text.lines().take_while(|line| !line.is_empty()).map(str::trim);
                told.collect::<Vec<_>>().join(" ")
            }
        };
        assert!(!told.contains("hush"), "{told}");
        told
    }

    #[test]
    fn flags_become_settings_or_a_sentence_that_names_them() {
        let endpoint = "--trace-endpoint http://collector:4317";
        let http = "--trace-protocol http --trace-endpoint";
        let cases = [
            String::new(),
            endpoint.into(),
            format!("{endpoint} --trace-sampling 1 --trace-header Authorization=hush,hush"),
            format!(
                "{endpoint} --trace-header-file authorization=/token,x-tenant=/tenant --trace-sampling 0"
            ),
            format!("{http} http://collector:4318"),
            format!("{http} http://[fd00::1]:4318/otlp/v1/traces?a=b"),
            format!("{endpoint}/v1/traces"),
            "--trace-endpoint collector:4317".into(),
            "--trace-endpoint ftp://collector".into(),
            "--trace-endpoint http://user:hush@collector".into(),
            "--trace-endpoint /v1/traces".into(),
            format!("{endpoint} --trace-protocol udp"),
            format!("{endpoint} --trace-sampling 1.01"),
            format!("{endpoint} --trace-sampling nan"),
            format!("{endpoint} --trace-sampling=-1"),
            format!("{endpoint} --trace-header hush"),
            format!("{endpoint} --trace-header hush:=hush"),
            format!("{endpoint} --trace-header a=hush\u{7f}"),
            format!("{endpoint} --trace-header host=hush"),
            format!("{endpoint} --trace-header-file a"),
            format!("{endpoint} --trace-header-file ä=/file"),
            format!("{endpoint} --trace-header-file grpc-timeout=/file"),
            "--trace-endpoint https://collector:4317 --trace-ca /nonexistent".into(),
            "--trace-sampling 1".into(),
            "--trace-header a=hush".into(),
            "--trace-ca /roots".into(),
        ];
        let mut table = String::new();
        for flags in cases {
            writeln!(table, "{flags:?}\n    {}", read(&flags)).unwrap();
        }
        expect![[r#"
            ""
                off
            "--trace-endpoint http://collector:4317"
                http://collector:4317/ Grpc 0.01 []
            "--trace-endpoint http://collector:4317 --trace-sampling 1 --trace-header Authorization=hush,hush"
                http://collector:4317/ Grpc 1 [TraceHeader { name: "authorization", value: Given(Sensitive) }]
            "--trace-endpoint http://collector:4317 --trace-header-file authorization=/token,x-tenant=/tenant --trace-sampling 0"
                http://collector:4317/ Grpc 0 [TraceHeader { name: "authorization", value: File("/token") }, TraceHeader { name: "x-tenant", value: File("/tenant") }]
            "--trace-protocol http --trace-endpoint http://collector:4318"
                http://collector:4318/ Http 0.01 []
            "--trace-protocol http --trace-endpoint http://[fd00::1]:4318/otlp/v1/traces?a=b"
                http://[fd00::1]:4318/otlp/v1/traces?a=b Http 0.01 []
            "--trace-endpoint http://collector:4317/v1/traces"
                --trace-endpoint: the address of the traces' collector, "http://collector:4317/v1/traces", has a path, which gRPC has no use for
            "--trace-endpoint collector:4317"
                --trace-endpoint: the address of the traces' collector, "collector:4317", is not http://HOST:PORT or https://HOST:PORT
            "--trace-endpoint ftp://collector"
                --trace-endpoint: the address of the traces' collector, "ftp://collector/", is not http://HOST:PORT or https://HOST:PORT
            "--trace-endpoint http://user:hush@collector"
                --trace-endpoint: the address of the traces' collector, "collector", has a user before it: who we are is for a header to say
            "--trace-endpoint /v1/traces"
                --trace-endpoint: the address of the traces' collector, "/v1/traces", is not http://HOST:PORT or https://HOST:PORT
            "--trace-endpoint http://collector:4317 --trace-protocol udp"
                error: invalid value 'udp' for '--trace-protocol <TRACE_PROTOCOL>' [possible values: grpc, http]
            "--trace-endpoint http://collector:4317 --trace-sampling 1.01"
                error: invalid value '1.01' for '--trace-sampling <SHARE>': a share is a number from 0 to 1
            "--trace-endpoint http://collector:4317 --trace-sampling nan"
                error: invalid value 'nan' for '--trace-sampling <SHARE>': a share is a number from 0 to 1
            "--trace-endpoint http://collector:4317 --trace-sampling=-1"
                error: invalid value '-1' for '--trace-sampling <SHARE>': a share is a number from 0 to 1
            "--trace-endpoint http://collector:4317 --trace-header hush"
                --trace-header: expected NAME=VALUE, a header as HTTP has them
            "--trace-endpoint http://collector:4317 --trace-header hush:=hush"
                --trace-header: expected NAME=VALUE, a header as HTTP has them
            "--trace-endpoint http://collector:4317 --trace-header a=hush\u{7f}"
                --trace-header: expected NAME=VALUE, a header as HTTP has them
            "--trace-endpoint http://collector:4317 --trace-header host=hush"
                --trace-header: host is part of how requests are made
            "--trace-endpoint http://collector:4317 --trace-header-file a"
                error: invalid value 'a' for '--trace-header-file <NAME=FILE>': expected NAME=FILE
            "--trace-endpoint http://collector:4317 --trace-header-file ä=/file"
                error: invalid value 'ä=/file' for '--trace-header-file <NAME=FILE>': "ä" is no header's name
            "--trace-endpoint http://collector:4317 --trace-header-file grpc-timeout=/file"
                error: invalid value 'grpc-timeout=/file' for '--trace-header-file <NAME=FILE>': grpc-timeout is part of how requests are made
            "--trace-endpoint https://collector:4317 --trace-ca /nonexistent"
                --trace-ca: the roots of the traces' collector: /nonexistent: I/O error: No such file or directory (os error 2)
            "--trace-sampling 1"
                error: the following required arguments were not provided: --trace-endpoint <http[s]://HOST:PORT>
            "--trace-header a=hush"
                error: the following required arguments were not provided: --trace-endpoint <http[s]://HOST:PORT>
            "--trace-ca /roots"
                error: the following required arguments were not provided: --trace-endpoint <http[s]://HOST:PORT>
        "#]].assert_eq(&table);
    }
}
