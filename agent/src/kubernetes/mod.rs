//! The Kubernetes API as its clients see it: how it is reached, asked and followed, and what its errors say. Of objects it knows pods
//! that serve pages, and no other; it decides nothing.

mod failures;
mod follow;
mod named;
mod optional;
mod pages;
mod resume;
mod silence;
#[cfg(test)]
pub(crate) mod testkit;

use std::time::Duration;

use kube::{Client, Config};
use tokio::time::timeout;

pub(crate) use failures::Failures;
pub(crate) use follow::follow;
pub(crate) use named::{follow_named, want};
pub(crate) use optional::{Optional, Untold};
pub(crate) use pages::{Server, Servers};

use crate::sentence::in_one_sentence;

/// The pods that are not over, as a field selector: those that have run to their end are records, and a cluster may keep many.
pub(crate) const PODS_NOT_OVER: &str = "status.phase!=Succeeded,status.phase!=Failed";

/// A write or a question that takes longer has failed.
pub(crate) const PATIENCE: Duration = Duration::from_secs(5);

/// There is no way to the API server.
#[derive(Debug, thiserror::Error)]
pub enum NoClient {
    /// Nothing says where it is.
    #[error("neither KUBECONFIG nor a pod's service account leads to a cluster")]
    Config(#[from] kube::config::InferConfigError),
    /// Of what leads there, something cannot be used.
    #[error("the API server {0}")]
    Unusable(http::Uri, #[source] Box<kube::Error>),
}

/// A client by `KUBECONFIG`, else by what a pod is given.
pub(crate) async fn client() -> Result<Client, NoClient> {
    let config = Config::infer().await?;
    let address = config.cluster_url.clone();
    let client = Client::try_from(config).map_err(|error| NoClient::Unusable(address, Box::new(error)))?;
    Ok(resume::checked(client))
}

/// Asks the API server, and does not wait for ever.
pub(crate) async fn ask<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, AskError> {
    match timeout(PATIENCE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(kube::Error::Api(status))) if status.is_conflict() || status.is_already_exists() => {
            Err(AskError::Overtaken)
        }
        Ok(Err(kube::Error::Api(status))) if is_absence(&status) => Err(AskError::Gone(status.message)),
        Ok(Err(error)) if is_silence(&error) => Err(AskError::Away(told(&error))),
        Ok(Err(error)) => Err(AskError::Failed(told(&error))),
        Err(_) => Err(AskError::Away(format!("no answer within {} s", PATIENCE.as_secs()))),
    }
}

/// Whether no API server has answered, or one that cannot at the moment.
fn is_silence(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        kube::Error::HyperError(_) | kube::Error::Service(_) => true,
        _ => false,
    }
}

/// Whether what was asked for is not there. Of a kind that it does not know an API server says so in plain text, which has no
/// reason but the code.
fn is_absence(status: &kube::core::Status) -> bool {
    status.is_not_found() || status.code == 404
}

/// Why a request to the API server came to nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum AskError {
    /// Somebody else has written since we read, or it is another object of the same name.
    #[error("somebody else was faster")]
    Overtaken,
    /// There is no such object.
    #[error("{0}")]
    Gone(String),
    /// It could not be asked, or cannot answer anything.
    #[error("{0}")]
    Away(String),
    /// It refused, or its answer is none.
    #[error("{0}")]
    Failed(String),
}

/// The error in words: what the API server said, without the structure around it, or why it could not be asked.
pub(crate) fn told(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => status.message.clone(),
        // Never the text of what could not be read: it may be a Secret.
        kube::Error::SerdeError(_) => "the API server's answer cannot be read".into(),
        other => in_one_sentence(other),
    }
}
