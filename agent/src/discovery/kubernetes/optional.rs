//! Kinds that an API server may not have: those of the Gateway API, and our own, are there once somebody has installed them.

use futures_util::StreamExt as _;
use kube::Client;

use super::watch::news;
use super::{Tell, WatchFailed};
use crate::config::Custom;
use crate::kubernetes::Optional;

/// Tells of the objects of the kind, and of none where the API server does not have it. Ends when nobody listens.
pub(super) async fn follow(custom: Custom, client: Client, tell: Tell, failed: WatchFailed) {
    let Custom { kind, plural, read } = custom;
    let optional = Optional { group: kind.group(), versions: kind.versions(), kind: kind.as_str(), plural };
    let mut events = std::pin::pin!(optional.follow(client));
    while let Some(event) = events.next().await {
        let Ok(event) = event else {
            failed(plural);
            continue;
        };
        let news = news(event, kind, |object, problems| {
            // What has come as JSON goes back into it.
            read(&serde_json::to_value(object).unwrap_or_default(), problems)
        });
        if tell.send(news).await.is_err() {
            return;
        }
    }
}
