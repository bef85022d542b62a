//! The API server: how it is reached, how its objects are followed, and what its errors say.

use std::fmt::Debug;
use std::pin::pin;
use std::time::Duration;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client, Config, Resource};
use serde::de::DeserializeOwned;
use tracing::{info, warn};

/// Whom the API server shall name as the manager of what the controller writes.
pub(super) const FIELD_MANAGER: &str = "undermesh-controller";
/// A write or a question that takes longer has failed.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// What one failure after another of a leader's work is given time for.
pub(super) const RETRY: Duration = Duration::from_secs(2);

/// A client by `KUBECONFIG`, else by what a pod is given.
pub(super) async fn client() -> anyhow::Result<Client> {
    let config =
        Config::infer().await.context("neither KUBECONFIG nor a pod's service account leads to a cluster")?;
    let address = config.cluster_url.clone();
    Client::try_from(config).with_context(|| format!("the API server {address}"))
}

/// Tells of every object of the selection, from now on and for as long as it is polled. After a break it goes on where
/// it was, or with all of them anew: then `Init` comes first and `InitDone` last.
///
/// Objects come as a stream, so that neither side holds all of them at one time; from an API server that does not stream
/// lists, in pages.
pub(super) async fn follow<K>(
    api: Api<K>,
    selection: watcher::Config,
    what: &'static str,
    mut on_event: impl FnMut(Event<K>),
) where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut config = selection.clone().streaming_lists();
    loop {
        // Its pauses have jitter, so that many who lost the server at once do not come back at once.
        let mut events = pin!(watcher(api.clone(), config.clone()).default_backoff());
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => on_event(event),
                Err(error) if refuses_to_stream(&error) => {
                    info!(what, "the API server does not stream lists; they are read in pages");
                    config = selection.clone();
                    break;
                }
                Err(error) => warn!(what, error = told_by_watch(&error), "cannot follow; retrying"),
            }
        }
    }
}

/// Servers without the feature refuse `sendInitialEvents` as invalid; they do nothing else to a watch that way.
fn refuses_to_stream(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchStartFailed(kube::Error::Api(status)) if status.is_invalid())
}

fn told_by_watch(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => told(error),
        watcher::Error::WatchError(status) => status.message.clone(),
        watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// The error in words: what the API server said, without the structure around it, or why it could not be asked.
pub(super) fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        // Never the text of what could not be read: it may be a Secret.
        kube::Error::SerdeError(_) => "the API server's answer cannot be read".into(),
        other => {
            let mut text = other.to_string();
            let mut source = std::error::Error::source(other);
            while let Some(cause) = source {
                let cause_text = cause.to_string();
                if !text.contains(&cause_text) {
                    text = format!("{text}: {cause_text}");
                }
                source = cause.source();
            }
            text
        }
    }
}

/// Asks the API server, and does not wait for ever.
pub(super) async fn ask<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, AskError> {
    match tokio::time::timeout(PATIENCE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_already_exists() => {
            Err(AskError::Overtaken)
        }
        Ok(Err(error)) => Err(AskError::Failed(told(&error))),
        Err(_) => Err(AskError::Failed(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}

/// Why a request to the API server came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum AskError {
    /// Somebody else has written since we read.
    #[error("somebody else was faster")]
    Overtaken,
    /// It refused, or could not be asked.
    #[error("{0}")]
    Failed(String),
}
