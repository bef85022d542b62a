//! One kind of object, followed for as long as somebody listens.

use std::fmt::Debug;
use std::task::ready;

use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt as _};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Config, Error, Event, watcher};
use kube::{Api, Resource};
use serde::de::DeserializeOwned;
use tracing::{debug, info, warn};

use super::told;

/// Tells of every object of the selection, from now on and for ever. After a break it goes on where it was, or with all of
/// them anew: then `Init` comes first and `InitDone` last. An error says that the API server does not tell of changes for the
/// moment; it has been logged, and pauses between attempts grow and have jitter, so that many who lost the server at once
/// do not come back at once.
///
/// Objects come as a stream (KEP-3157), so that neither side holds all of them at one time; from an API server that does not
/// stream lists, as lists.
pub(crate) fn follow<K>(
    api: Api<K>,
    selection: Config,
    what: &'static str,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let mut events = watch(&api, selection.clone().streaming_lists());
    let (mut is_streamed, mut is_away) = (true, false);
    stream::poll_fn(move |context| {
        let mut next = ready!(events.poll_next_unpin(context));
        if let Some(Err(error)) = &next
            && is_streamed
            && refuses_to_stream(error)
        {
            info!(what, "the API server does not stream lists; they are read as a whole");
            is_streamed = false;
            events = watch(&api, selection.clone());
            next = ready!(events.poll_next_unpin(context));
        }
        let was_away = std::mem::replace(&mut is_away, matches!(next, Some(Err(_))));
        match &next {
            Some(Err(error)) => match was_away {
                false => {
                    warn!(
                        what,
                        error = words(error),
                        "the API server does not tell of changes; what is known holds"
                    )
                }
                // The same at each attempt would say nothing new.
                true => debug!(what, error = words(error), "the API server still does not tell of changes"),
            },
            _ if was_away => info!(what, "the API server tells of changes again"),
            _ => {}
        }
        next.into()
    })
}

fn watch<K>(api: &Api<K>, config: Config) -> BoxStream<'static, watcher::Result<Event<K>>>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(api.clone(), config).default_backoff().boxed()
}

/// Servers without the feature refuse `sendInitialEvents` as invalid; they do nothing else to a watch that way.
fn refuses_to_stream(error: &Error) -> bool {
    matches!(error, Error::WatchStartFailed(kube::Error::Api(status)) if status.is_invalid())
}

fn words(error: &Error) -> String {
    match error {
        Error::InitialListFailed(error) | Error::WatchStartFailed(error) | Error::WatchFailed(error) => {
            told(error)
        }
        Error::WatchError(status) => status.message.clone(),
        Error::NoResourceVersion => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::time::Duration;

    use k8s_openapi::api::core::v1::Pod;
    use serde_json::{Value, json};

    use super::super::testkit::{FakeApi, failure};
    use super::*;

    fn pod(uid: &str, version: &str) -> Value {
        json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"uid": uid, "name": uid, "namespace": "shop", "resourceVersion": version},
            "spec": {"nodeName": "n1", "containers": [{"name": "a", "unknown": [1]}]},
        })
    }

    #[tokio::test(start_paused = true)]
    async fn a_server_that_streams_no_lists_fails_and_forgets_is_followed() {
        let watches = AtomicU32::new(0);
        let api = FakeApi::new(move |question| {
            let query = &question.query;
            if query.contains("sendInitialEvents") {
                return failure(422, "Invalid");
            }
            if !query.contains("watch=true") {
                let (items, next) = match query.contains("continue=second") {
                    true => (json!([pod("b", "6")]), json!(null)),
                    false => (json!([pod("a", "5")]), json!("second")),
                };
                let metadata = json!({"resourceVersion": "7", "continue": next});
                return Some((200, json!({"kind": "PodList", "metadata": metadata, "items": items})));
            }
            // One watch that ends, two that fail, one that ends, and one from where history has been compacted.
            match watches.fetch_add(1, Ordering::SeqCst) {
                0 => Some((200, json!([{"type": "MODIFIED", "object": pod("a", "8")}]))),
                1 | 2 => failure(500, "InternalError"),
                3 => Some((200, json!([{"type": "DELETED", "object": pod("b", "9")}]))),
                4 => {
                    let (_, status) = failure(410, "Expired").unwrap();
                    Some((200, json!([{"type": "ERROR", "object": status}])))
                }
                _ => None,
            }
        });
        let heard = Mutex::new(Vec::new());
        let listen =
            follow(Api::<Pod>::all(api.client()), Config::default(), "pods").for_each(async |event| {
                heard.lock().unwrap().push(match event {
                    Ok(Event::Init) => "init".into(),
                    Ok(Event::InitApply(pod)) => format!("init {}", pod.metadata.uid.unwrap()),
                    Ok(Event::InitDone) => "done".into(),
                    Ok(Event::Apply(pod)) => {
                        format!("{} {}", pod.metadata.uid.unwrap(), pod.metadata.resource_version.unwrap())
                    }
                    Ok(Event::Delete(pod)) => format!("without {}", pod.metadata.uid.unwrap()),
                    Err(error) => words(&error),
                });
            });
        _ = tokio::time::timeout(Duration::from_secs(60), listen).await;
        let heard = heard.into_inner().unwrap();
        let (away, expired) = ("InternalError, says the API server", "Expired, says the API server");
        let all = ["init", "init a", "init b", "done"];
        let expected = [&all[..], &["a 8", away, away, "without b", expired], &all].concat();
        assert_eq!(heard, expected);
        let asked = api.asked.lock().unwrap();
        let streams = asked.iter().filter(|question| question.query.contains("sendInitialEvents")).count();
        assert_eq!(streams, 1, "{asked:?}");
    }
}
