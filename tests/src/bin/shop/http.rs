//! As much of HTTP/1.1 as the shop speaks: GET, Content-Length, kept-alive connections.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::server;

/// Longest request or answer header, longest body.
const MOST_BYTES: u64 = 64 * 1024;

/// How long the shop waits for another part of the shop.
pub const PATIENCE: Duration = Duration::from_secs(5);

/// A request, read whole.
pub struct Request {
    pub path: String,
    pub peer: SocketAddr,
}

/// An answer.
pub struct Response {
    pub status: u16,
    pub body: String,
}

impl Response {
    /// A JSON document, one line.
    pub fn json(status: u16, value: &Value) -> Self {
        Self { status, body: format!("{value}\n") }
    }
}

/// `http://ADDRESS:PORT`; the shop does not resolve names.
#[derive(Clone, Debug)]
pub struct Url {
    pub address: SocketAddr,
    pub path: String,
}

impl FromStr for Url {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let rest = text.strip_prefix("http://").context("a URL begins with http://")?;
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let address = authority.parse().or_else(|_| format!("{authority}:80").parse());
        let address = address.with_context(|| format!("`{authority}` is no address"))?;
        Ok(Self { address, path: path.to_owned() })
    }
}

/// Answers requests until the client closes.
pub fn serve(stream: TcpStream, answer: impl Fn(&Request) -> Response) -> Result<()> {
    let peer = server::peer(&stream)?;
    let mut reader = BufReader::new(stream);
    while let Some(head) = read_head(&mut reader)? {
        let mut words = head.lines().next().unwrap_or_default().split(' ');
        let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or("/"));
        ensure!(header(&head, "content-length").is_none_or(|length| length == "0"), "a request with a body");
        let response = match method {
            "GET" => answer(&Request { path: path.to_owned(), peer }),
            _ => Response { status: 405, body: "only GET\n".to_owned() },
        };
        println!("{peer} {method} {path} {}", response.status);
        let close = header(&head, "connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
        write_response(reader.get_mut(), &response, close)?;
        if close {
            break;
        }
    }
    Ok(())
}

/// One GET on a connection of its own.
pub fn get(url: &Url, path: &str) -> Result<Response> {
    let stream = TcpStream::connect_timeout(&url.address, PATIENCE);
    let mut stream = stream.with_context(|| format!("{} does not take connections", url.address))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let path = format!("{}{path}", url.path.trim_end_matches('/'));
    write!(stream, "GET {path} HTTP/1.1\r\nhost: {}\r\nconnection: close\r\n\r\n", url.address)?;
    let mut reader = BufReader::new(stream);
    let head = read_head(&mut reader).with_context(|| format!("{} does not answer", url.address))?;
    let head = head.with_context(|| format!("{} closed the connection", url.address))?;
    let status = head.split(' ').nth(1).context("an answer without a status")?.parse()?;
    let length: u64 = header(&head, "content-length").context("an answer without a length")?.parse()?;
    ensure!(length <= MOST_BYTES, "an answer of {length} bytes");
    let mut body = vec![0; length as usize];
    reader.read_exact(&mut body)?;
    Ok(Response { status, body: String::from_utf8(body)? })
}

/// A request or answer up to its empty line; none at a clean end.
fn read_head(reader: &mut BufReader<TcpStream>) -> Result<Option<String>> {
    let mut head = String::new();
    let mut limited = reader.take(MOST_BYTES);
    loop {
        let before = head.len();
        if limited.read_line(&mut head)? == 0 {
            if head.is_empty() {
                return Ok(None);
            }
            bail!("the connection ended inside a header");
        }
        if matches!(&head[before..], "\r\n" | "\n") {
            return Ok(Some(head));
        }
    }
}

fn header<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    let mut fields = head.lines().skip(1).filter_map(|line| line.split_once(':'));
    fields.find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
}

fn write_response(stream: &mut TcpStream, response: &Response, close: bool) -> Result<()> {
    let connection = if close { "close" } else { "keep-alive" };
    let Response { status, body } = response;
    let head = format!(
        "HTTP/1.1 {status} {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\nconnection: {connection}\r\n\r\n",
        if *status == 200 { "OK" } else { "Failed" },
        body.len(),
    );
    stream.write_all(format!("{head}{body}").as_bytes())?;
    Ok(())
}
