//! Tasks that outlive whoever started them, and end with their worker.

use std::sync::{Arc, Mutex, PoisonError};

use hyper::rt::Executor;
use tokio::task::JoinSet;
use tracing::error;

/// Tasks that belong together. They end when the last clone of this is dropped, at the latest.
#[derive(Clone, Debug, Default)]
pub(super) struct Tasks(Arc<Mutex<JoinSet<()>>>);

impl Tasks {
    /// Returns when none of them runs any more.
    pub(super) async fn ended(&self) {
        std::future::poll_fn(|cx| {
            let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            while let Some(_ended) = std::task::ready!(tasks.poll_join_next(cx)) {}
            std::task::Poll::Ready(())
        })
        .await
    }

    /// Ends those that run.
    pub(super) fn end(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).abort_all();
    }

    /// Runs something for as long as it takes, or this lives.
    pub(super) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(ended) = tasks.try_join_next() {
            if let Err(error) = ended {
                error!(%error, "a task of a connection broke off; this is a bug");
            }
        }
        tasks.spawn(task);
    }
}

impl<F: Future<Output = ()> + Send + 'static> Executor<F> for Tasks {
    fn execute(&self, task: F) {
        self.spawn(task);
    }
}
