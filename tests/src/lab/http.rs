//! A blocking HTTP GET, enough for health checks and metrics, made inside a namespace.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::netns;

/// An HTTP answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The header lines, as they came.
    pub head: String,
    /// The body.
    pub body: String,
}

impl Response {
    /// The body of a 200, an error for any other.
    pub fn ok(self) -> Result<String> {
        match self.status {
            200 => Ok(self.body),
            status => bail!("HTTP {status}: {}", self.body.trim()),
        }
    }
}

/// Asks as HTTP/1.0 does, so that the answer ends with the connection and is never chunked.
pub(super) fn get(netns: &Path, to: SocketAddr, path: &str, headers: &[(&str, &str)]) -> Result<Response> {
    let mut request = format!("GET {path} HTTP/1.0\r\nHost: {to}\r\n");
    for (name, value) in headers {
        request.push_str(&format!("{name}: {value}\r\n"));
    }
    request.push_str("\r\n");
    netns::enter(netns, || {
        let mut stream =
            TcpStream::connect_timeout(&to, LIMIT).with_context(|| format!("no answer from {to}"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).with_context(|| format!("no whole answer from {to}{path}"))?;
        parse(&String::from_utf8_lossy(&answer))
    })
}

const LIMIT: Duration = Duration::from_secs(5);

fn parse(answer: &str) -> Result<Response> {
    let (head, body) = answer.split_once("\r\n\r\n").context("an answer without an end of its header")?;
    let status = head.split(' ').nth(1).context("an answer without a status")?.parse()?;
    Ok(Response { status, head: head.to_owned(), body: body.to_owned() })
}
