//! Many idle connections.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;
use undermesh_tests::lab::patient;

use crate::dial::{Exchange, within};

/// Connections that are being opened, or ended, at one time.
const BATCH: usize = 128;
const LIMIT: Duration = Duration::from_secs(10);

pub(crate) async fn hold(to: SocketAddr, count: usize) -> Result<()> {
    let mut stop = signal(SignalKind::terminate())?;
    let held = in_batches(0..count, |_| Exchange::open(to)).await?;
    println!("holding {count}");
    stop.recv().await;
    in_batches(held, |mut exchange| async move {
        exchange.line("still there?").await?;
        exchange.close().await
    })
    .await?;
    println!("all worked");
    Ok(())
}

/// Does the same with each; one at a time would take as long as all of their round trips.
async fn in_batches<T, R, F>(all: impl IntoIterator<Item = T>, what: impl Fn(T) -> F) -> Result<Vec<R>>
where
    R: Send + 'static,
    F: Future<Output = io::Result<R>> + Send + 'static,
{
    let (limit, mut results) = (patient(LIMIT), Vec::new());
    let mut all = all.into_iter().peekable();
    while all.peek().is_some() {
        let mut batch = JoinSet::new();
        for one in all.by_ref().take(BATCH) {
            batch.spawn(within(limit, what(one)));
        }
        while let Some(done) = batch.join_next().await {
            results.push(done?.with_context(|| format!("connection {}", results.len() + 1))?);
        }
    }
    Ok(results)
}
