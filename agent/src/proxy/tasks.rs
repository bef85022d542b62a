//! Tasks that outlive whoever started them, and end with their worker.

use std::sync::{Mutex, PoisonError};

use tokio::task::JoinSet;
use tracing::error;

/// Tasks that belong together. They end when this is dropped, at the latest.
#[derive(Debug, Default)]
pub(super) struct Tasks(Mutex<JoinSet<()>>);

impl Tasks {
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
