//! Kinds that an API server may not have: those of the Gateway API, and our own, are there once somebody has installed them.

use futures_util::StreamExt as _;
use kube::Client;
use serde_json::{Value, json};

use super::watch::{News, key, news};
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
        let mut written = None;
        let news = news(event, kind, |object, problems| {
            let key = key(kind, &object);
            // What has come as JSON goes back into it.
            let object = serde_json::to_value(object).unwrap_or_default();
            written = Some(News::Written(key, written_down(&object).into()));
            read(&object, problems)
        });
        for news in written.into_iter().chain([news]) {
            if tell.send(news).await.is_err() {
                return;
            }
        }
    }
}

/// All of it that agents read: neither its status nor who has written which field, which is the most of it.
fn written_down(object: &Value) -> String {
    let Value::Object(mut fields) = object.clone() else { return String::new() };
    fields.remove("status");
    if let Some(Value::Object(metadata)) = fields.get_mut("metadata") {
        metadata.remove("managedFields");
    }
    json!(fields).to_string()
}
