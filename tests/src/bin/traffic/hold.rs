//! Many idle connections.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use undermesh_tests::lab::patient;

use crate::dial::{Exchange, within};

/// Connections that are being opened at one time.
const BATCH: usize = 128;
const LIMIT: Duration = Duration::from_secs(10);

pub(crate) async fn hold(to: SocketAddr, count: usize) -> Result<()> {
    let limit = patient(LIMIT);
    let mut stop = signal(SignalKind::terminate())?;
    let mut held = Vec::with_capacity(count);
    while held.len() < count {
        let mut batch = JoinSet::new();
        for _ in 0..BATCH.min(count - held.len()) {
            batch.spawn(within(limit, Exchange::open(to)));
        }
        while let Some(opened) = batch.join_next().await {
            held.push(opened?.with_context(|| format!("connection {}", held.len() + 1))?);
        }
    }
    println!("holding {count}");
    stop.recv().await;
    for (number, exchange) in held.iter_mut().enumerate() {
        let works = async {
            exchange.line("still there?").await?;
            exchange.close().await
        };
        within(limit, works).await.with_context(|| format!("connection {} of {count}", number + 1))?;
    }
    println!("all worked");
    Ok(())
}
