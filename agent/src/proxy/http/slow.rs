//! Clients that begin a request and do not get on with it: they would hold a connection for ever with a byte now and then.
//!
//! A connection that is idle between requests is none of them, and may stay so for as long as its two ends like.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Notify;
use tokio_util::io::InspectReader;

/// Whether a head is under way.
#[derive(Debug)]
pub(super) struct Heads {
    /// How long one may take from its first byte.
    limit: Duration,
    is_under_way: AtomicBool,
    /// A request is being answered: what comes meanwhile is its body, or waits its turn.
    is_busy: AtomicBool,
    begun: Notify,
}

/// A request is being answered until this is dropped.
#[derive(Debug)]
pub(super) struct Busy(Arc<Heads>);

impl Heads {
    /// None is under way yet; each may take so long from its first byte.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            is_under_way: AtomicBool::new(false),
            is_busy: AtomicBool::new(false),
            begun: Notify::new(),
        }
    }

    /// A head has come as a whole.
    pub(super) fn complete(self: &Arc<Self>) -> Busy {
        self.is_under_way.store(false, Ordering::Relaxed);
        self.is_busy.store(true, Ordering::Relaxed);
        Busy(self.clone())
    }

    /// Returns when a head takes too long.
    pub(super) async fn overdue(&self) {
        loop {
            self.begun.notified().await;
            if !self.is_under_way.load(Ordering::Relaxed) {
                // It came in one piece, as nearly all do.
                continue;
            }
            let another = async {
                // Begun again: so the one before was complete.
                self.begun.notified().await;
                self.begun.notify_one();
            };
            if tokio::time::timeout(self.limit, another).await.is_err()
                && self.is_under_way.load(Ordering::Relaxed)
            {
                return;
            }
        }
    }

    /// The client's connection, watched for the first bytes of heads.
    pub(super) fn watch<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        self: &Arc<Self>,
        client: S,
    ) -> impl AsyncRead + AsyncWrite + Unpin + Send + 'static {
        let heads = self.clone();
        InspectReader::new(client, move |bytes: &[u8]| {
            if !bytes.is_empty() {
                heads.bytes_came();
            }
        })
    }

    fn bytes_came(&self) {
        if !self.is_busy.load(Ordering::Relaxed) && !self.is_under_way.swap(true, Ordering::Relaxed) {
            self.begun.notify_one();
        }
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.is_busy.store(false, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(30);

    fn heads() -> (Arc<Heads>, Pin<Box<dyn Future<Output = ()> + Send>>) {
        let heads = Arc::new(Heads::new(LIMIT));
        let watched = heads.clone();
        (heads, Box::pin(async move { watched.overdue().await }))
    }

    async fn is_overdue_after(overdue: &mut Pin<Box<dyn Future<Output = ()> + Send>>, seconds: u64) -> bool {
        tokio::time::timeout(Duration::from_secs(seconds), overdue).await.is_ok()
    }

    #[tokio::test(start_paused = true)]
    async fn a_head_that_does_not_get_on_is_overdue_and_a_connection_that_is_idle_is_not() {
        let (heads, mut overdue) = heads();
        assert!(!is_overdue_after(&mut overdue, 3600).await, "nothing was said");
        for _ in 0..3 {
            heads.bytes_came();
            let busy = heads.complete();
            assert!(!is_overdue_after(&mut overdue, 60).await, "it is being answered");
            heads.bytes_came();
            drop(busy);
            assert!(!is_overdue_after(&mut overdue, 3600).await, "it has been answered");
        }
        heads.bytes_came();
        assert!(!is_overdue_after(&mut overdue, 29).await);
        heads.bytes_came();
        assert!(is_overdue_after(&mut overdue, 2).await, "another byte is no head");
    }

    #[tokio::test(start_paused = true)]
    async fn each_head_has_its_own_time() {
        let (heads, mut overdue) = heads();
        heads.bytes_came();
        assert!(!is_overdue_after(&mut overdue, 20).await);
        drop(heads.complete());
        heads.bytes_came();
        assert!(!is_overdue_after(&mut overdue, 29).await, "the second one began later");
        assert!(is_overdue_after(&mut overdue, 2).await);
    }
}
