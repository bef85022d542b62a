//! How the controller uses the API server.

use std::fmt::Debug;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;

use crate::kubernetes;

/// Whom the API server shall name as the manager of what the controller writes.
pub(super) const FIELD_MANAGER: &str = "undermesh-controller";
/// What one failure after another of a leader's work is given time for.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// Tells of every object of the selection, for as long as it is polled: see [`kubernetes::follow`].
pub(super) async fn follow<K>(
    api: Api<K>,
    selection: watcher::Config,
    what: &'static str,
    mut on_event: impl FnMut(Event<K>),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    kubernetes::follow(api, selection, what)
        .for_each(|event| {
            // While the API server is away, what is known holds.
            event.into_iter().for_each(&mut on_event);
            std::future::ready(())
        })
        .await;
}
