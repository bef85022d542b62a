//! How an agent comes to its end: it is told to stop, or another one takes its place.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout_at};
use tracing::{info, warn};

use super::mesh::Mesh;
use crate::capture::Succession;
use crate::proxy::Proxy;

/// How often it is looked whether the last connection has ended.
const DRAIN_LOOK: Duration = Duration::from_millis(100);

/// An agent that runs.
pub(super) struct Life {
    pub(super) mesh: Mesh,
    /// There is a new snapshot.
    pub(super) news: watch::Receiver<()>,
    /// It has been applied, as far as it could be.
    pub(super) applied: watch::Sender<()>,
    pub(super) gate_opens: watch::Receiver<()>,
    pub(super) proxy: Arc<Proxy>,
    /// How long connections may go on that are open at the end.
    pub(super) drain: Duration,
    /// Told when what comes to this node from here on is another agent's.
    pub(super) stepped_down: Arc<Notify>,
}

impl Life {
    /// Lives until it is told to stop, and what is open has ended.
    pub(super) async fn live(mut self) -> anyhow::Result<()> {
        let mut succession = self.mesh.succession()?;
        let mut stop = std::pin::pin!(stop_signal());
        loop {
            tokio::select! {
                result = self.mesh.follow(&mut self.news, &self.applied) => return result,
                () = &mut stop => {
                    info!("stopping; enrolled pods stay in their down mode until the next agent takes over");
                    if self.drain.is_zero() {
                        return Ok(());
                    }
                    self.mesh.let_go();
                    self.stepped_down.notify_one();
                    return self.closed().await;
                }
                () = claimed(&mut succession, self.gate_opens.clone()) => {}
            }
            info!("another agent wants to take over");
            self.mesh.let_go();
            let is_settled = tokio::select! {
                result = self.held_until(succession.settled()) => result.map(|()| true)?,
                () = &mut stop => false,
            };
            if !is_settled {
                info!("stopping, though the agent that takes over does not serve every pod yet");
                return self.stopped_in_between(succession).await;
            }
            if self.mesh.take_back().await? {
                warn!("the agent that was to take over has ended before it could; going on");
                continue;
            }
            info!("another agent has taken over; serving what is open until told to stop");
            self.stepped_down.notify_one();
            self.mesh.close().await?;
            self.held_until(stop).await?;
            return self.drained().await;
        }
    }

    /// Goes on accepting until the agent that takes over serves every pod, for no longer than connections may go on.
    async fn stopped_in_between(self, mut succession: Succession) -> anyhow::Result<()> {
        let end = Instant::now() + self.drain;
        if let Ok(settled) = timeout_at(end, self.held_until(succession.settled())).await {
            settled?;
        }
        self.stepped_down.notify_one();
        Self { drain: end.saturating_duration_since(Instant::now()), ..self }.closed().await
    }

    /// Serves what is open, and nobody new.
    async fn closed(mut self) -> anyhow::Result<()> {
        self.mesh.close().await?;
        self.drained().await
    }

    /// Has what is open be held to the policies of each moment until then.
    async fn held_until(&self, then: impl Future<Output = ()>) -> anyhow::Result<()> {
        tokio::select! {
            result = self.mesh.hold(self.news.clone()) => result,
            () = then => Ok(()),
        }
    }

    async fn drained(&self) -> anyhow::Result<()> {
        let drained = async {
            while self.proxy.open.load(Ordering::Relaxed) > 0 {
                tokio::time::sleep(DRAIN_LOOK).await;
            }
        };
        let ended = tokio::time::timeout(self.drain, self.held_until(drained)).await;
        if let Ok(ended) = ended {
            ended?;
        } else if !self.drain.is_zero() {
            let open = self.proxy.open.load(Ordering::Relaxed);
            warn!(open, "connections are broken off: they have outlived the time to drain");
        }
        Ok(())
    }
}

/// Returns when another agent wants this one's place, which it cannot before this one has its own.
async fn claimed(succession: &mut Succession, mut applied: watch::Receiver<()>) {
    if applied.changed().await.is_err() {
        return std::future::pending().await;
    }
    succession.settled().await;
    succession.claimed().await;
}

async fn stop_signal() {
    let (Ok(mut terminate), Ok(mut interrupt)) =
        (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
