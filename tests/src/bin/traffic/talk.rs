//! A long-lived connection that is never idle for long.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::signal::unix::{SignalKind, signal};
use undermesh_tests::lab::patient;

use crate::dial::{Exchange, describe, within};

const LIMIT: Duration = Duration::from_secs(30);
const PAUSE: Duration = Duration::from_millis(20);

/// Prints `ok N` for every line that came back, and why the conversation ended.
pub(crate) async fn talk(to: SocketAddr) -> Result<()> {
    let mut stop = signal(SignalKind::terminate())?;
    let mut exchange =
        Exchange::open(to).await.map_err(|error| describe(&error)).map_err(anyhow::Error::msg)?;
    println!("talking to {}", exchange.server);
    for number in 1u64.. {
        let said = within(patient(LIMIT), exchange.line(&format!("line {number}"))).await;
        said.map_err(|error| anyhow::Error::msg(describe(&error)))?;
        println!("ok {number}");
        tokio::select! {
            _ = stop.recv() => break,
            () = tokio::time::sleep(PAUSE) => {}
        }
    }
    within(patient(LIMIT), exchange.close()).await.context("not ended in order")?;
    println!("ended in order");
    Ok(())
}
