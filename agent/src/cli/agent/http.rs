//! The flags of HTTP: whether it is looked at where nobody asks for it, and the limits that hold wherever it is.

use std::ops::RangeInclusive;
use std::time::Duration;

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};

use crate::proxy::HttpLimits;

/// Bytes of a head. The parser of HTTP/1 takes no smaller limit, and each connection may hold as much at a time.
const HEAD: RangeInclusive<u64> = 8 * 1024..=1024 * 1024;

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "HTTP")]
pub(super) struct HttpArgs {
    /// Whether HTTP requests are counted where no route needs to know of them.
    #[arg(long, value_enum, default_value_t, env = "UNDERMESH_HTTP")]
    http: Http,
    /// Bytes that the head of a request or an answer may have in HTTP/1, 8192 to 1048576, its first line among them.
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = HttpLimits::DEFAULT.http1_head,
        value_parser = RangedU64ValueParser::<usize>::new().range(HEAD),
        env = "UNDERMESH_HTTP1_MAX_HEAD",
    )]
    http1_max_head: usize,
    /// Headers that it may have in HTTP/1, 16 to 4096.
    #[arg(
        long,
        value_name = "N",
        default_value_t = HttpLimits::DEFAULT.http1_headers,
        value_parser = RangedU64ValueParser::<usize>::new().range(16..=4096),
        env = "UNDERMESH_HTTP1_MAX_HEADERS",
    )]
    http1_max_headers: usize,
    /// Seconds that the head of a request may take in HTTP/1 from its first byte, 1 to 600.
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = HttpLimits::DEFAULT.http1_head_time.as_secs(),
        value_parser = clap::value_parser!(u64).range(1..=600),
        env = "UNDERMESH_HTTP1_HEAD_TIMEOUT",
    )]
    http1_head_timeout: u64,
    /// Bytes that a head may have in HTTP/2, 8192 to 1048576: of names and values, and 32 for each header.
    #[arg(
        long,
        value_name = "BYTES",
        default_value_t = HttpLimits::DEFAULT.http2_head,
        value_parser = RangedU64ValueParser::<u32>::new().range(HEAD),
        env = "UNDERMESH_HTTP2_MAX_HEAD",
    )]
    http2_max_head: u32,
    /// Requests that a client may have at a time on one HTTP/2 connection, 1 to 10000.
    #[arg(
        long,
        value_name = "N",
        default_value_t = HttpLimits::DEFAULT.http2_streams,
        value_parser = clap::value_parser!(u32).range(1..=10_000),
        env = "UNDERMESH_HTTP2_MAX_STREAMS",
    )]
    http2_max_streams: u32,
}

/// What is done with HTTP that no route is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Http {
    /// Each request is balanced and counted on its own.
    #[default]
    Auto,
    /// It is carried as any other bytes.
    Off,
}

impl HttpArgs {
    /// Whether requests are told of where no route needs to know of them.
    pub(super) fn is_looked_at(&self) -> bool {
        self.http == Http::Auto
    }

    /// What heads may be, and how many requests there may be at a time.
    pub(super) fn limits(&self) -> HttpLimits {
        HttpLimits {
            http1_head: self.http1_max_head,
            http1_headers: self.http1_max_headers,
            http1_head_time: Duration::from_secs(self.http1_head_timeout),
            http2_head: self.http2_max_head,
            http2_streams: self.http2_max_streams,
        }
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
        http: HttpArgs,
    }

    /// The limits, or what is wrong.
    fn read(flags: &str) -> Result<HttpLimits, String> {
        let words = std::iter::once("undermesh").chain(flags.split_whitespace());
        Flags::try_parse_from(words).map(|flags| flags.http.limits()).map_err(|error| {
            let text = error.to_string();
            text.lines().next().unwrap_or_default().to_owned()
        })
    }

    #[test]
    fn flags_become_limits() {
        assert_eq!(read(""), Ok(HttpLimits::DEFAULT));
        let all = "--http1-max-head 8192 --http1-max-headers 4096 --http1-head-timeout 600 --http2-max-head 1048576 \
                   --http2-max-streams 1";
        let limits = HttpLimits {
            http1_head: 8192,
            http1_headers: 4096,
            http1_head_time: Duration::from_secs(600),
            http2_head: 1 << 20,
            http2_streams: 1,
        };
        assert_eq!(read(all), Ok(limits));
    }

    #[test]
    fn limits_that_cannot_work_are_refused_by_name() {
        let mut told = String::new();
        for flags in [
            "--http1-max-head 8191",
            "--http1-max-head 1048577",
            "--http1-max-headers 15",
            "--http1-max-headers 4097",
            "--http1-head-timeout 0",
            "--http1-head-timeout 601",
            "--http2-max-head 8191",
            "--http2-max-head 4294967296",
            "--http2-max-streams 0",
            "--http2-max-streams 10001",
            "--http2-max-streams many",
        ] {
            match read(flags) {
                Ok(limits) => writeln!(told, "{flags}: {limits:?}"),
                Err(error) => writeln!(told, "{error}"),
            }
            .unwrap();
        }
        expect![[r#"
            error: invalid value '8191' for '--http1-max-head <BYTES>': 8191 is not in 8192..=1048576
            error: invalid value '1048577' for '--http1-max-head <BYTES>': 1048577 is not in 8192..=1048576
            error: invalid value '15' for '--http1-max-headers <N>': 15 is not in 16..=4096
            error: invalid value '4097' for '--http1-max-headers <N>': 4097 is not in 16..=4096
            error: invalid value '0' for '--http1-head-timeout <SECONDS>': 0 is not in 1..=600
            error: invalid value '601' for '--http1-head-timeout <SECONDS>': 601 is not in 1..=600
            error: invalid value '8191' for '--http2-max-head <BYTES>': 8191 is not in 8192..=1048576
            error: invalid value '4294967296' for '--http2-max-head <BYTES>': 4294967296 is not in 8192..=1048576
            error: invalid value '0' for '--http2-max-streams <N>': 0 is not in 1..=10000
            error: invalid value '10001' for '--http2-max-streams <N>': 10001 is not in 1..=10000
            error: invalid value 'many' for '--http2-max-streams <N>': invalid digit found in string
        "#]].assert_eq(&told);
    }
}
