//! Connections that are opened, used and closed, and a tally of what came of them.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use serde_json::json;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::sync::Barrier;
use tokio::task::JoinSet;

pub(crate) async fn dial(to: SocketAddr, count: usize, at_once: usize, limit: Duration) -> Result<()> {
    let (mut served, mut failed) = (BTreeMap::<String, usize>::new(), BTreeMap::<String, usize>::new());
    let mut left = count;
    while left > 0 {
        let batch = left.min(at_once.max(1));
        left -= batch;
        let all_open = Arc::new(Barrier::new(batch));
        let mut clients = JoinSet::new();
        for _ in 0..batch {
            let all_open = all_open.clone();
            clients.spawn(async move { once(to, limit, &all_open).await });
        }
        while let Some(outcome) = clients.join_next().await {
            match outcome? {
                Ok(name) => *served.entry(name).or_default() += 1,
                Err(error) => *failed.entry(describe(&error)).or_default() += 1,
            }
        }
    }
    println!("{}", json!({ "served": served, "failed": failed }));
    Ok(())
}

async fn once(to: SocketAddr, limit: Duration, all_open: &Barrier) -> io::Result<String> {
    let opened = within(limit, Exchange::open(to)).await;
    all_open.wait().await;
    let mut exchange = opened?;
    within(limit, async {
        exchange.line("a line to be echoed").await?;
        exchange.close().await
    })
    .await?;
    Ok(exchange.server)
}

pub(crate) async fn within<T>(limit: Duration, what: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(limit, what).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// A connection to the server that has greeted.
pub(crate) struct Exchange {
    stream: BufReader<TcpStream>,
    /// The name by which the server greeted.
    pub(crate) server: String,
}

impl Exchange {
    pub(crate) async fn open(to: SocketAddr) -> io::Result<Self> {
        let mut stream = BufReader::with_capacity(256, TcpStream::connect(to).await?);
        let mut greeting = String::new();
        stream.read_line(&mut greeting).await?;
        let server = greeting.split(' ').next().filter(|_| greeting.ends_with('\n'));
        let server = server.ok_or(io::ErrorKind::UnexpectedEof)?.to_owned();
        Ok(Self { stream, server })
    }

    /// Sends a line and reads it back.
    pub(crate) async fn line(&mut self, line: &str) -> io::Result<()> {
        self.stream.write_all(format!("{line}\n").as_bytes()).await?;
        let mut echo = String::new();
        self.stream.read_line(&mut echo).await?;
        match echo.strip_suffix('\n') {
            Some(echo) if echo == line => Ok(()),
            Some(echo) => Err(io::Error::other(format!("`{line}` came back as `{echo}`"))),
            None => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// Ends the stream to the server and waits until it has ended the one back.
    pub(crate) async fn close(&mut self) -> io::Result<()> {
        self.stream.shutdown().await?;
        let mut rest = String::new();
        match self.stream.read_line(&mut rest).await? {
            0 => Ok(()),
            _ => Err(io::Error::other(format!("`{rest}` came after the end"))),
        }
    }
}

/// `ECONNREFUSED` rather than a sentence.
pub(crate) fn describe(error: &io::Error) -> String {
    match (error.raw_os_error(), error.kind()) {
        (Some(errno), _) => format!("{:?}", Errno::from_raw(errno)),
        (None, io::ErrorKind::UnexpectedEof) => "EOF".to_owned(),
        (None, io::ErrorKind::TimedOut) => "TIMEOUT".to_owned(),
        _ => error.to_string(),
    }
}
