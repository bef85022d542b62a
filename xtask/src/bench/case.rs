//! What is measured: one load between two pods, and the figures that come out of it.

use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::column::{BULK_PORT, Column, GRPC_PORT, HTTP_PORT, HTTP2_PORT};
use super::{cpu, probe};

/// A load between the client and one of the servers.
#[derive(Clone, Copy)]
pub struct Case {
    /// Which server.
    pub span: Span,
    load: Load,
}

/// Where the server is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Span {
    /// On the client's node.
    SameNode,
    /// On the other node.
    AcrossNodes,
}

#[derive(Clone, Copy)]
enum Load {
    /// As many bytes as will go.
    Bulk { connections: u32 },
    /// HTTP requests on kept-alive connections.
    KeepAlive { connections: u32 },
    /// HTTP/2 requests, several at a time on each connection.
    Http2 { connections: u32, streams: u32 },
    /// Unary calls of gRPC, several at a time on each connection.
    Grpc { connections: u32, streams: u32 },
    /// HTTP requests, each on a connection of its own.
    NewConnections { at_once: u32 },
    /// HTTP requests at a fixed rate on 16 kept-alive connections.
    OpenLoop,
    /// `connect()` to a pod that the mesh does not know.
    ConnectOutside,
}

/// One figure: what it is, and its value.
pub struct Figure {
    /// Its name with its unit.
    pub name: &'static str,
    /// Its value.
    pub value: f64,
}

/// All cases, in the order of the table.
pub fn all() -> Vec<Case> {
    let loads = [
        Load::Bulk { connections: 1 },
        Load::Bulk { connections: 8 },
        Load::KeepAlive { connections: 1 },
        Load::KeepAlive { connections: 16 },
        Load::KeepAlive { connections: 64 },
        Load::Http2 { connections: 1, streams: 1 },
        Load::Http2 { connections: 4, streams: 16 },
        Load::Grpc { connections: 1, streams: 1 },
        Load::Grpc { connections: 4, streams: 16 },
        Load::NewConnections { at_once: 1 },
        Load::NewConnections { at_once: 16 },
        Load::OpenLoop,
    ];
    let spans = [Span::AcrossNodes, Span::SameNode];
    let mut cases: Vec<_> =
        spans.into_iter().flat_map(|span| loads.map(|load| Case { span, load })).collect();
    cases.push(Case { span: Span::SameNode, load: Load::ConnectOutside });
    cases
}

impl Case {
    /// `across nodes: HTTP keep-alive, 16 connections`.
    pub fn name(&self) -> String {
        format!("{}: {}", self.span.name(), self.title())
    }

    /// The name without the span.
    pub fn title(&self) -> String {
        match self.load {
            Load::Bulk { connections } => format!("bulk, {}", counted(connections)),
            Load::KeepAlive { connections } => format!("HTTP keep-alive, {}", counted(connections)),
            Load::Http2 { connections, streams } => {
                format!("HTTP/2, {}, {streams} at a time on each", counted(connections))
            }
            Load::Grpc { connections, streams } => {
                format!("gRPC, {}, {streams} at a time on each", counted(connections))
            }
            Load::NewConnections { at_once } => format!("new connections, {at_once} at once"),
            Load::OpenLoop => "HTTP at a fixed rate, 16 connections".to_owned(),
            Load::ConnectOutside => "connect() to a non-mesh address".to_owned(),
        }
    }

    /// Whether the column can carry it: not every mesh knows more than HTTP.
    pub fn is_for(&self, column: &Column) -> bool {
        match self.load {
            Load::Bulk { .. } => self.server(column, BULK_PORT).is_some(),
            Load::ConnectOutside => column.is_captured(),
            _ => true,
        }
    }

    /// Runs the load for this long.
    pub fn measure(&self, column: &Column, length: Duration, rate: u32) -> Result<Vec<Figure>> {
        let (machine, proxies) = (cpu::machine_seconds()?, column.proxy_cpu()?);
        let (mut figures, units, [machine_name, proxies_name]) = match self.load {
            Load::Bulk { connections } => {
                let (figures, bytes) = self.iperf(column, connections, length)?;
                (figures, bytes / f64::from(1 << 30), ["machine CPU-s per GiB", "proxies CPU-s per GiB"])
            }
            Load::KeepAlive { connections } => {
                let (figures, requests) = self.wrk(column, connections, length, "requests/s", &[])?;
                (figures, requests / 1e4, ["machine CPU-s per 10,000", "proxies CPU-s per 10,000"])
            }
            Load::Http2 { connections, streams } => {
                let (figures, requests) = self.h2load(column, HTTP2_PORT, (connections, streams), length)?;
                (figures, requests / 1e4, ["machine CPU-s per 10,000", "proxies CPU-s per 10,000"])
            }
            Load::Grpc { connections, streams } => {
                let (figures, requests) = self.h2load(column, GRPC_PORT, (connections, streams), length)?;
                (figures, requests / 1e4, ["machine CPU-s per 10,000", "proxies CPU-s per 10,000"])
            }
            Load::NewConnections { at_once } => {
                let close = ["-H", "Connection: close"];
                let (figures, requests) = self.wrk(column, at_once, length, "connections/s", &close)?;
                (figures, requests / 1e4, ["machine CPU-s per 10,000", "proxies CPU-s per 10,000"])
            }
            Load::OpenLoop => {
                let (figures, requests) = probe::open_loop(column, self.http_server(column)?, rate, length)?;
                (figures, requests / 1e4, ["machine CPU-s per 10,000", "proxies CPU-s per 10,000"])
            }
            Load::ConnectOutside => {
                let (figures, connections) = probe::connect(column, length)?;
                (figures, connections / 1e4, ["machine CPU-s per 10,000", "proxies CPU-s per 10,000"])
            }
        };
        figures.push(Figure { name: machine_name, value: (cpu::machine_seconds()? - machine) / units });
        figures.push(Figure { name: proxies_name, value: (column.proxy_cpu()? - proxies) / units });
        Ok(figures)
    }

    /// The figures, and the bytes that arrived.
    fn iperf(&self, column: &Column, connections: u32, length: Duration) -> Result<(Vec<Figure>, f64)> {
        let server = self.server(column, BULK_PORT).context("nothing leads to iperf3")?;
        let mut iperf = Command::new("iperf3");
        iperf.args(["--json", "--client", &server.ip().to_string(), "--port", &BULK_PORT.to_string()]);
        iperf.args(["--parallel", &connections.to_string(), "--time", &length.as_secs().to_string()]);
        let output = column.client.run(iperf, length + Duration::from_secs(20))?;
        let json: Value = serde_json::from_str(&output.stdout).context("iperf3 printed no JSON")?;
        ensure!(json["error"].is_null(), "iperf3: {}", json["error"]);
        let received = &json["end"]["sum_received"];
        let number = |name: &str| received[name].as_f64().with_context(|| format!("iperf3 says no {name}"));
        Ok((vec![Figure { name: "Gbit/s", value: number("bits_per_second")? / 1e9 }], number("bytes")?))
    }

    /// The figures, and the requests that were answered.
    fn wrk(
        &self,
        column: &Column,
        connections: u32,
        length: Duration,
        rate: &'static str,
        further: &[&str],
    ) -> Result<(Vec<Figure>, f64)> {
        let threads = connections.min(2).to_string();
        let url = format!("http://{}/", self.http_server(column)?);
        let mut wrk = Command::new("wrk");
        wrk.args(["--latency", "-t", &threads, "-c", &connections.to_string()]);
        wrk.args(["-d", &format!("{}s", length.as_secs())]).args(further).arg(url);
        let page = column.client.run(wrk, length + Duration::from_secs(20))?.success()?;
        let (figures, requests) = read_wrk(&page, rate).with_context(|| format!("wrk printed\n{page}"))?;
        Ok((figures, requests))
    }

    /// The figures, and the requests that were answered.
    fn h2load(
        &self,
        column: &Column,
        port: u16,
        (connections, streams): (u32, u32),
        length: Duration,
    ) -> Result<(Vec<Figure>, f64)> {
        let server = self.server(column, port).context("nothing leads to HTTP/2")?;
        let file = |name: &str| column.dir().join(format!("h2load.{name}"));
        let log = file("log");
        // It adds to what is there.
        fs::write(&log, "")?;
        let mut h2load = Command::new("h2load");
        h2load.args(["-t", &connections.min(2).to_string(), "-c", &connections.to_string()]);
        h2load.args(["-m", &streams.to_string(), "-D", &length.as_secs().to_string()]);
        h2load.arg("--log-file").arg(&log);
        if port == GRPC_PORT {
            // A message of 20 bytes, not compressed.
            fs::write(file("message"), [&[0, 0, 0, 0, 20][..], &[b'x'; 20]].concat())?;
            h2load.arg("-d").arg(file("message"));
            h2load.args(["-H", "content-type: application/grpc", "-H", "te: trailers"]);
        }
        h2load.arg(format!("http://{server}/bench.Echo/Say"));
        let page = column.client.run(h2load, length + Duration::from_secs(20))?.success()?;
        ensure!(page.contains(" 0 4xx, 0 5xx") && page.contains("0 errored"), "h2load printed\n{page}");
        read_h2load(&fs::read_to_string(log)?, length)
    }

    fn http_server(&self, column: &Column) -> Result<SocketAddr> {
        self.server(column, HTTP_PORT).context("nothing leads to nginx")
    }

    fn server(&self, column: &Column, port: u16) -> Option<SocketAddr> {
        let pod = match self.span {
            Span::SameNode => &column.near,
            Span::AcrossNodes => &column.far,
        };
        column.address(pod, port)
    }
}

impl Span {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::SameNode => "same node",
            Self::AcrossNodes => "across nodes",
        }
    }
}

fn counted(connections: u32) -> String {
    format!("{connections} connection{}", if connections == 1 { "" } else { "s" })
}

fn read_wrk(page: &str, rate: &'static str) -> Result<(Vec<Figure>, f64)> {
    ensure!(!page.contains("Non-2xx"), "not every request was answered well");
    let after = |label: &str| {
        let line = page.lines().find_map(|line| line.trim().strip_prefix(label));
        line.map(str::trim).with_context(|| format!("no line `{label}`"))
    };
    let requests =
        page.lines().find_map(|line| line.trim().split_once(" requests in ")).context("no count")?;
    let figures = vec![
        Figure { name: rate, value: after("Requests/sec:")?.parse()? },
        Figure { name: "p50 us", value: microseconds(after("50%")?)? },
        Figure { name: "p99 us", value: microseconds(after("99%")?)? },
        Figure { name: "broken connections", value: after("Socket errors:").map_or(0.0, sum_of_numbers) },
    ];
    Ok((figures, requests.0.parse()?))
}

/// Lines of when a request began in microseconds, its status, and how many microseconds it took.
fn read_h2load(log: &str, length: Duration) -> Result<(Vec<Figure>, f64)> {
    let took = |line: &str| line.split('\t').nth(2).and_then(|took| took.trim().parse::<f64>().ok());
    let times: Option<Vec<f64>> = log.lines().map(took).collect();
    let mut times = times.context("h2load's log has other lines than it had")?;
    ensure!(!times.is_empty(), "no request was answered");
    times.sort_by(f64::total_cmp);
    let at = |part: f64| times[((times.len() as f64 * part) as usize).min(times.len() - 1)];
    let count = times.len() as f64;
    let figures = vec![
        Figure { name: "requests/s", value: count / length.as_secs_f64() },
        Figure { name: "p50 us", value: at(0.5) },
        Figure { name: "p99 us", value: at(0.99) },
    ];
    Ok((figures, count))
}

/// `connect 0, read 21, write 0, timeout 0`
fn sum_of_numbers(text: &str) -> f64 {
    text.split([' ', ',']).filter_map(|word| word.parse::<f64>().ok()).sum()
}

/// `35.00us`, `3.20ms`, `1.01s`.
fn microseconds(text: &str) -> Result<f64> {
    let units = [("us", 1.0), ("ms", 1e3), ("s", 1e6)];
    let found = units.iter().find_map(|(unit, factor)| Some((text.strip_suffix(unit)?, factor)));
    let (number, factor) = found.with_context(|| format!("`{text}` is no time"))?;
    Ok(number.parse::<f64>()? * factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_h2load_logs() {
        let log = "1700000000000000\t200\t250\n1700000000000100\t200\t150\n1700000000000200\t200\t900\n";
        let (figures, requests) = read_h2load(log, Duration::from_secs(2)).unwrap();
        let values: Vec<f64> = figures.iter().map(|figure| figure.value).collect();
        assert_eq!((values, requests), (vec![1.5, 250.0, 900.0], 3.0));
        assert!(read_h2load("", Duration::from_secs(2)).is_err());
        assert!(read_h2load("what is this\n", Duration::from_secs(2)).is_err());
    }

    const PAGE: &str = "\
  2 threads and 16 connections
  Latency Distribution
     50%  223.00us
     75%  400.00us
     99%    3.20ms
  134500 requests in 5.00s, 40.00MB read
Requests/sec:  26900.50
";

    #[test]
    fn reads_what_wrk_prints() {
        let (figures, requests) = read_wrk(PAGE, "requests/s").unwrap();
        let values: Vec<f64> = figures.iter().map(|figure| figure.value).collect();
        assert_eq!((values, requests), (vec![26900.5, 223.0, 3200.0, 0.0], 134_500.0));
        let broken = format!("{PAGE}  Socket errors: connect 0, read 21, write 0, timeout 2\n");
        assert_eq!(read_wrk(&broken, "requests/s").unwrap().0[3].value, 23.0);
        assert!(read_wrk(&format!("{PAGE}  Non-2xx or 3xx responses: 3\n"), "requests/s").is_err());
    }
}
