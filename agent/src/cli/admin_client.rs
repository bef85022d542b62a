//! What the user's commands ask the agent: one blocking GET at a time, over HTTP/1.1.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;

/// Where the agent listens unless told otherwise.
pub const DEFAULT_ADMIN_ADDRESS: &str = "127.0.0.1:15020";

const CONNECT: Duration = Duration::from_secs(3);
/// For the whole answer.
const ANSWER: Duration = Duration::from_secs(30);
/// A hundred times what 20,000 connections take; beyond that something is wrong.
const MAX_ANSWER_BYTES: u64 = 1 << 30;

/// Why an admin page could not be had.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Nobody answers at the address.
    #[error(
        "no agent at {address}: {source}; is `undermesh agent` running, and is this its --admin-address?"
    )]
    Connect {
        /// The address.
        address: SocketAddr,
        /// What the kernel says.
        source: io::Error,
    },
    /// The connection broke or took too long.
    #[error("the agent at {address} did not answer: {source}")]
    Io {
        /// The address.
        address: SocketAddr,
        /// What happened.
        source: io::Error,
    },
    /// The agent does not have what was asked for.
    #[error("the agent at {address} answers {path} with status {status}: {told}")]
    Refused {
        /// The address.
        address: SocketAddr,
        /// The page.
        path: String,
        /// The HTTP status.
        status: u16,
        /// The first line of the answer.
        told: String,
    },
    /// Something answers, but not as the agent does.
    #[error("what listens at {address} does not answer like an undermesh agent: {what}")]
    NotAnAgent {
        /// The address.
        address: SocketAddr,
        /// What is odd.
        what: String,
    },
}

/// Gets a page and reads it as JSON.
///
/// # Errors
/// See [`AdminError`].
pub fn get_json<T: DeserializeOwned>(address: SocketAddr, path: &str) -> Result<T, AdminError> {
    let answer = get(address, path)?;
    let odd = |what: String| AdminError::NotAnAgent { address, what };
    if answer.status != 200 {
        let told = String::from_utf8_lossy(&answer.body);
        let told = told.lines().next().unwrap_or_default().replace(char::is_control, "?");
        return Err(AdminError::Refused { address, path: path.into(), status: answer.status, told });
    }
    serde_json::from_slice(&answer.body).map_err(|error| odd(format!("GET {path}: {error}")))
}

/// An answer, its body whole.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    status: u16,
    body: Vec<u8>,
}

fn get(address: SocketAddr, path: &str) -> Result<Answer, AdminError> {
    let mut stream = TcpStream::connect_timeout(&address, CONNECT)
        .map_err(|source| AdminError::Connect { address, source })?;
    let raw = exchange(&mut stream, address, path).map_err(|source| AdminError::Io { address, source })?;
    parse(&raw)
        .ok_or_else(|| AdminError::NotAnAgent { address, what: "this is no whole HTTP/1.1 answer".into() })
}

fn exchange(stream: &mut TcpStream, address: SocketAddr, path: &str) -> io::Result<Vec<u8>> {
    let deadline = Instant::now() + ANSWER;
    stream.set_write_timeout(Some(ANSWER))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    let mut raw = Vec::new();
    let mut chunk = vec![0; 64 * 1024];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(raw),
            Ok(read) => raw.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // How the kernel spells a read time-out.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                return Err(io::ErrorKind::TimedOut.into());
            }
            Err(error) => return Err(error),
        }
        if raw.len() as u64 > MAX_ANSWER_BYTES {
            return Err(io::Error::other("the answer is too long"));
        }
    }
}

/// Reads an answer whose connection has ended. `None` for what is no HTTP/1.x, or cut short.
fn parse(raw: &[u8]) -> Option<Answer> {
    let head_end = raw.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&raw[..head_end]).ok()?;
    let body = &raw[head_end + 4..];
    let mut lines = head.split("\r\n");
    let status = lines.next()?.strip_prefix("HTTP/1.")?.split(' ').nth(1)?.parse().ok()?;
    let headers: Vec<_> = lines.filter_map(|line| line.split_once(':')).collect();
    let header = |wanted: &str| {
        headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(wanted)).map(|(_, value)| value.trim())
    };
    let body = if header("transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        dechunk(body)?
    } else if let Some(length) = header("content-length") {
        body.get(..length.parse().ok()?)?.to_vec()
    } else {
        body.to_vec()
    };
    Some(Answer { status, body })
}

fn dechunk(mut rest: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line_end = rest.windows(2).position(|window| window == b"\r\n")?;
        let line = std::str::from_utf8(&rest[..line_end]).ok()?;
        // Extensions may follow the size.
        let size = usize::from_str_radix(line.split(';').next()?.trim(), 16).ok()?;
        rest = &rest[line_end + 2..];
        if size == 0 {
            return Some(body);
        }
        body.extend_from_slice(rest.get(..size)?);
        rest = rest.get(size..)?.strip_prefix(b"\r\n")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(raw: &str, expected: Option<(u16, &str)>) {
        let expected = expected.map(|(status, body)| Answer { status, body: body.into() });
        assert_eq!(parse(raw.as_bytes()), expected, "{raw:?}");
    }

    #[test]
    fn answers_whole_chunked_cut_short_and_odd() {
        check("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", Some((200, "ok")));
        check("HTTP/1.0 503 No\r\n\r\nuntil the end", Some((503, "until the end")));
        check("HTTP/1.1 200\r\nContent-Length: 3\r\n\r\nok", None);
        check("HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\nok", None);
        check(
            "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3;x=y\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n",
            Some((200, "abc0123456789")),
        );
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n", None);
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffff\r\nabc\r\n", None);
        check("HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\nabc\r\n", None);
        check("SSH-2.0-OpenSSH_9.2\r\n\r\n", None);
        check("HTTP/1.1 999999 OK\r\n\r\n", None);
        check("", None);
    }

    #[tokio::test]
    async fn reads_back_what_the_admin_server_writes() {
        use crate::admin::{Admin, view};
        use crate::telemetry::{Logs, Status, Telemetry, TelemetrySettings, Traces};

        let status = Status::new("node-1", Default::default());
        let telemetry = Telemetry::new(TelemetrySettings::default(), status, Logs::default(), Traces::off());
        let admin = Admin::bind("127.0.0.1:0".parse().unwrap(), telemetry).await.unwrap();
        let address = admin.local_address();
        let server = tokio::spawn(admin.serve(std::future::pending()));
        tokio::task::spawn_blocking(move || {
            let status: view::StatusView = get_json(address, "/debug/status").unwrap();
            assert_eq!((&*status.node, status.ready), ("node-1", false));
            let view: view::ConnectionsView = get_json(address, "/debug/connections").unwrap();
            assert!(view.connections.is_empty());
            let error = get_json::<serde_json::Value>(address, "/metrics").unwrap_err().to_string();
            assert!(error.starts_with(&format!("what listens at {address} does not answer like")), "{error}");
        })
        .await
        .unwrap();
        server.abort();
        _ = server.await;
        let gone = tokio::task::spawn_blocking(move || get(address, "/")).await.unwrap();
        assert!(matches!(gone, Err(AdminError::Connect { .. })), "{gone:?}");
    }
}
