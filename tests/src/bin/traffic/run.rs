//! Clients that dial without a pause while something happens to the agents.

use std::cell::{Cell, RefCell};
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use anyhow::Result;
use nix::time::{ClockId, clock_gettime};
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::LocalSet;
use undermesh_tests::lab::patient;

use crate::dial::{Exchange, describe, within};

/// Failures that are listed one by one.
const LISTED: usize = 200;

pub(crate) async fn run(to: SocketAddr, clients: usize, pause: Duration) -> Result<()> {
    let mut stop = signal(SignalKind::terminate())?;
    let (made, ended_badly) = (Rc::new(Cell::new(0u64)), Rc::new(Cell::new(0u64)));
    let failed = Rc::new(RefCell::new(Vec::new()));
    let times = Rc::new(RefCell::new(Vec::new()));
    let led_elsewhere = Rc::new(RefCell::new(Vec::new()));
    let local = LocalSet::new();
    for _ in 0..clients {
        let (made, ended_badly, failed) = (made.clone(), ended_badly.clone(), failed.clone());
        let (times, led_elsewhere) = (times.clone(), led_elsewhere.clone());
        local.spawn_local(async move {
            let mut server = None;
            loop {
                let began_ns = monotonic_ns()?;
                let once = async {
                    let mut exchange = Exchange::open(to).await?;
                    exchange.line("a line to be echoed").await?;
                    exchange.close().await?;
                    Ok(exchange.server)
                };
                let ended = within(patient(Duration::from_secs(5)), once).await;
                let ended_ns = monotonic_ns()?;
                made.set(made.get() + 1);
                times.borrow_mut().push(ended_ns - began_ns);
                match ended {
                    Ok(name) if server.as_ref() == Some(&name) => {}
                    Ok(name) => {
                        if server.replace(name).is_some() {
                            led_elsewhere.borrow_mut().push(ended_ns);
                        }
                    }
                    Err(error) => {
                        ended_badly.set(ended_badly.get() + 1);
                        if failed.borrow().len() < LISTED {
                            failed.borrow_mut().push(
                            json!({ "began_ns": began_ns, "ended_ns": ended_ns, "error": describe(&error) }),
                        );
                        }
                    }
                }
                if !pause.is_zero() {
                    tokio::time::sleep(pause).await;
                }
            }
            #[expect(unreachable_code, reason = "it says what `?` above returns")]
            anyhow::Ok(())
        });
    }
    println!("running");
    local.run_until(stop.recv()).await;
    let mut times = times.take();
    times.sort_unstable();
    let median = times.get(times.len() / 2).copied().unwrap_or_default();
    println!(
        "{}",
        json!({
            "made": made.get(),
            "failed_in_all": ended_badly.get(),
            "failed": *failed.borrow(),
            "led_elsewhere_ns": *led_elsewhere.borrow(),
            "median_ns": median,
        })
    );
    Ok(())
}

/// The clock that the test has, too.
fn monotonic_ns() -> Result<i64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() * 1_000_000_000 + now.tv_nsec())
}
