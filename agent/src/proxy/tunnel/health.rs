//! Whether a tunnel still works: streams counted, pings sent, the silent ones given up.

use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use h2::{FlowControl, Ping, PingPong, Pong, StreamId};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::telemetry::{OpenTunnel, TunnelEnd};

/// How often a tunnel with streams is pinged.
const PING_EVERY: Duration = Duration::from_secs(10);

/// How long an answer may take.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// After how long it is late: who waits for the peer then could go another way.
const LATE: Duration = Duration::from_secs(3);

/// The health of one tunnel, shared by its streams and whoever drives its connection.
#[derive(Debug)]
pub(super) struct Health {
    record: OpenTunnel,
    streams: AtomicUsize,
    /// The windows of those that are connected.
    windows: Mutex<HashMap<StreamId, FlowControl>>,
    silent: AtomicBool,
    /// Streams that wait for the peer's answer.
    unanswered: AtomicUsize,
    /// Whether one was answered since it was last looked, and whether one waited then.
    answered: AtomicBool,
    waited: AtomicBool,
    probe: Notify,
    /// The peer does not answer a ping.
    late: watch::Sender<bool>,
}

/// A stream that waits for the peer's answer.
#[derive(Debug)]
pub(super) struct Unanswered<'a>(&'a Health);

/// A stream's place in a tunnel.
#[derive(Debug)]
pub(super) struct Place {
    health: Arc<Health>,
    /// Once it is connected.
    stream: Option<StreamId>,
}

/// What ended [`Health::watch`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nobody uses the tunnel.
    Idle,
    /// The peer does not answer any more.
    Silent,
}

impl Health {
    /// Of a tunnel that stands, as telemetry has it.
    pub(super) fn of(record: OpenTunnel) -> Arc<Self> {
        Arc::new(Self {
            record,
            streams: AtomicUsize::new(0),
            windows: Mutex::default(),
            silent: AtomicBool::new(false),
            unanswered: AtomicUsize::new(0),
            answered: AtomicBool::new(false),
            waited: AtomicBool::new(false),
            probe: Notify::new(),
            late: watch::Sender::new(false),
        })
    }

    /// Counts a stream.
    pub(super) fn enter(self: &Arc<Self>) -> Place {
        self.streams.fetch_add(1, Ordering::Relaxed);
        self.record.stream_opened();
        Place { health: self.clone(), stream: None }
    }

    /// Streams that are open.
    pub(super) fn streams(&self) -> usize {
        self.streams.load(Ordering::Relaxed)
    }

    /// Has the peers of streams told of all the room that there is for what they say, now that all windows are smaller than they were. HTTP/2
    /// tells of it when half of a window has been taken, which may be more than is left of it, and does not look again by itself.
    pub(super) fn tell_of_room(&self) {
        for window in self.windows().values_mut() {
            // It fails for too many bytes alone.
            _ = window.release_capacity(0);
        }
    }

    fn windows(&self) -> MutexGuard<'_, HashMap<StreamId, FlowControl>> {
        self.windows.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says that the tunnel's connection has ended: by an error, or in order. Nothing new if its end was said before.
    pub(super) fn ended(&self, error: Option<&h2::Error>) {
        let is_orderly =
            |error: &h2::Error| error.is_go_away() && error.reason() == Some(h2::Reason::NO_ERROR);
        self.record.ends(if error.is_none_or(is_orderly) { TunnelEnd::Closed } else { TunnelEnd::Broken });
    }

    /// Says that the tunnel takes no more streams, since the peer would not be let in anew, and ends with its last.
    pub(super) fn lapses(&self) {
        self.record.ends(TunnelEnd::Lapsed);
    }

    /// Says that the tunnel ends with all that is in it, since the peer is not to be talked to any more.
    pub(super) fn withdrawn(&self) {
        self.record.ends(TunnelEnd::Withdrawn);
    }

    /// True once the peer has not answered in time: its streams did not break, they fell silent.
    pub(super) fn is_silent(&self) -> bool {
        self.silent.load(Ordering::Relaxed)
    }

    /// A stream is asked for.
    pub(super) fn asks(&self) -> Unanswered<'_> {
        self.unanswered.fetch_add(1, Ordering::Relaxed);
        Unanswered(self)
    }

    /// To be called now and then: has the peer pinged where streams wait, as they did at the last call, and none has been answered since.
    /// So nobody who waits needs a timer for that, and a peer that answers is not pinged at all.
    pub(super) fn look(&self) {
        let waits = self.unanswered.load(Ordering::Relaxed) > 0;
        let waited = self.waited.swap(waits, Ordering::Relaxed);
        let answered = self.answered.swap(false, Ordering::Relaxed);
        if waits && waited && !answered {
            self.probe.notify_one();
        }
    }

    /// Returns once the peer is late to answer a ping.
    pub(super) async fn found_dead(&self) {
        // It fails only without a sender, which is held here.
        let _ = self.late.subscribe().wait_for(|late| *late).await;
    }

    /// Pings while there are streams, until the peer falls silent or nobody has used the tunnel for so long.
    pub(super) async fn watch(&self, pings: &mut PingPong, idle_limit: Duration) -> Verdict {
        let mut used = Instant::now();
        let mut next = used + PING_EVERY;
        loop {
            let asked = tokio::select! {
                () = sleep_until(next) => false,
                () = self.probe.notified() => true,
            };
            next = Instant::now() + PING_EVERY;
            if self.streams() > 0 {
                used = Instant::now();
            } else if !asked {
                if used.elapsed() >= idle_limit {
                    self.record.ends(TunnelEnd::Idle);
                    return Verdict::Idle;
                }
                continue;
            }
            match self.ping(pings).await {
                Some(Ok(_)) => {}
                // The connection is over, which its driver knows best.
                Some(Err(_)) => std::future::pending().await,
                None => {
                    self.silent.store(true, Ordering::Relaxed);
                    self.record.ends(TunnelEnd::Silent);
                    return Verdict::Silent;
                }
            }
        }
    }

    /// Pings, and tells those who wait when the answer is late. None if there is none.
    async fn ping(&self, pings: &mut PingPong) -> Option<Result<Pong, h2::Error>> {
        let mut pong = pin!(pings.ping(Ping::opaque()));
        if let Ok(pong) = timeout(LATE, &mut pong).await {
            return Some(pong);
        }
        self.late.send_replace(true);
        let pong = timeout(PING_TIMEOUT - LATE, pong).await.ok()?;
        self.late.send_replace(false);
        Some(pong)
    }
}

impl Unanswered<'_> {
    /// The peer has answered, whatever it said.
    pub(super) fn answered(self) {
        self.0.answered.store(true, Ordering::Relaxed);
    }
}

impl Drop for Unanswered<'_> {
    fn drop(&mut self) {
        self.0.unanswered.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Place {
    /// It is this stream's, whose window it is.
    pub(super) fn connected(&mut self, stream: StreamId, window: FlowControl) {
        self.health.windows().insert(stream, window);
        self.stream = Some(stream);
    }

    pub(super) fn health(&self) -> &Health {
        &self.health
    }

    pub(super) fn shared(&self) -> Arc<Health> {
        self.health.clone()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(stream) = self.stream {
            self.health.windows().remove(&stream);
        }
        self.health.streams.fetch_sub(1, Ordering::Relaxed);
        self.health.record.stream_closed();
    }
}

#[cfg(test)]
impl Health {
    /// Of a tunnel that nobody counts.
    pub(super) fn new() -> Arc<Self> {
        Self::of(Arc::<crate::telemetry::Tunnels>::default().opened(crate::telemetry::Reporter::Source))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn the_peer_is_pinged_where_streams_wait_and_none_is_answered() {
        let health = Health::new();
        let is_pinged = || {
            health.look();
            health.probe.notified().now_or_never().is_some()
        };
        assert!(!is_pinged(), "nobody waits");
        let first = health.asks();
        assert!(!is_pinged(), "it has just been asked for");
        assert!(is_pinged());
        health.asks().answered();
        assert!(!is_pinged(), "another one was answered");
        assert!(is_pinged(), "but none since");
        drop(first);
        assert!(!is_pinged(), "nobody waits any more");
    }
}
