//! Whether a tunnel still works: streams counted, pings sent, the silent ones given up.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use h2::{FlowControl, Ping, PingPong, StreamId};
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep_until, timeout};

use crate::telemetry::{OpenTunnel, TunnelEnd};

/// How often a tunnel with streams is pinged.
const PING_EVERY: Duration = Duration::from_secs(10);

/// How long an answer may take.
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// How long one that was asked for may take: somebody waits who could go another way.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// The health of one tunnel, shared by its streams and whoever drives its connection.
#[derive(Debug)]
pub(super) struct Health {
    record: OpenTunnel,
    streams: AtomicUsize,
    /// The windows of those that are connected.
    windows: Mutex<HashMap<StreamId, FlowControl>>,
    silent: AtomicBool,
    probe: Notify,
    pongs: watch::Sender<u64>,
}

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
        let pongs = watch::Sender::new(0);
        Arc::new(Self {
            record,
            streams: AtomicUsize::new(0),
            windows: Mutex::default(),
            silent: AtomicBool::new(false),
            probe: Notify::new(),
            pongs,
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

    /// Asks the peer for a sign of life; returns if there is none.
    pub(super) async fn found_dead(&self) {
        let mut pongs = self.pongs.subscribe();
        self.probe.notify_one();
        if timeout(PROBE_TIMEOUT, pongs.changed()).await.is_ok() {
            std::future::pending().await
        }
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
            match timeout(PING_TIMEOUT, pings.ping(Ping::opaque())).await {
                Ok(Ok(_)) => self.pongs.send_modify(|pongs| *pongs += 1),
                // The connection is over, which its driver knows best.
                Ok(Err(_)) => std::future::pending().await,
                Err(_elapsed) => {
                    self.silent.store(true, Ordering::Relaxed);
                    self.record.ends(TunnelEnd::Silent);
                    return Verdict::Silent;
                }
            }
        }
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
