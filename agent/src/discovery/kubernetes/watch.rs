//! One watch for each kind of object. What comes is read into documents at once: the objects themselves are larger by far.

use std::collections::HashSet;
use std::fmt::Debug;

use futures_util::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use super::policies::Policy;
use super::{Tell, Version};
use crate::config::{Document, Key, Kind, Problem};
use crate::model::ObjectRef;

/// What a watch tells.
#[derive(Debug)]
pub(super) enum News {
    /// The kind is listed anew.
    Begins(Kind),
    /// It has been listed: what was not in it is gone.
    Complete(Kind),
    /// An object, read as far as it can be, with what is wrong with it.
    Object(Key, Option<Document>, Vec<Problem>),
    /// It is gone.
    Gone(Key),
    /// A NetworkPolicy.
    Policy(Policy),
    /// It is gone, or has become one that cannot be understood.
    NoPolicy(ObjectRef),
    /// All NetworkPolicies there are.
    Policies(HashSet<ObjectRef>),
}

/// Watches everything that the mesh is made from. The tasks end with the set.
pub(super) fn all(client: &Client, version: Version, tell: &Tell) -> JoinSet<()> {
    let mut watches = JoinSet::new();
    // Their labels and annotations say all.
    let namespaces = objects::<PartialObjectMeta<core::Namespace>>(client, version);
    watches.spawn(follow(namespaces, Kind::Namespace, tell.clone(), |object, problems| {
        let metadata = object.metadata;
        Document::namespace(&core::Namespace { metadata, ..Default::default() }, problems)
    }));
    watches.spawn(follow(objects(client, version), Kind::Service, tell.clone(), |object, problems| {
        Document::service(&object, problems)
    }));
    watches.spawn(follow(objects(client, version), Kind::EndpointSlice, tell.clone(), |object, problems| {
        Document::endpoint_slice(&object, problems)
    }));
    watches.spawn(follow(objects(client, version), Kind::Pod, tell.clone(), |object, problems| {
        Document::pod(&object, problems)
    }));
    watches.spawn(follow_policies(objects(client, version), tell.clone()));
    watches
}

/// The mesh does without them: they only tell what stands in its way.
async fn follow_policies(
    events: impl Stream<Item = watcher::Result<Event<NetworkPolicy>>> + Send,
    tell: Tell,
) {
    let mut events = std::pin::pin!(events.default_backoff());
    let (mut listing, mut is_away) = (HashSet::new(), false);
    while let Some(event) = events.next().await {
        let news = match event {
            Ok(Event::Init) => {
                listing.clear();
                continue;
            }
            Ok(Event::InitDone) => News::Policies(std::mem::take(&mut listing)),
            Ok(Event::Delete(policy)) => News::NoPolicy(object_ref(&policy)),
            Ok(Event::InitApply(policy)) => {
                listing.insert(object_ref(&policy));
                policy_news(&policy)
            }
            Ok(Event::Apply(policy)) => policy_news(&policy),
            Err(error) => {
                if !std::mem::replace(&mut is_away, true) {
                    warn!(%error, "NetworkPolicies are not known; one that closes the mesh's port goes unnoticed");
                }
                continue;
            }
        };
        is_away = false;
        if tell.send(news).await.is_err() {
            return;
        }
    }
}

fn policy_news(policy: &NetworkPolicy) -> News {
    Policy::read(policy).map_or_else(|| News::NoPolicy(object_ref(policy)), News::Policy)
}

fn object_ref(policy: &NetworkPolicy) -> ObjectRef {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().to_owned();
    ObjectRef::new(text(&policy.metadata.namespace), text(&policy.metadata.name))
}

fn objects<K>(
    client: &Client,
    version: Version,
) -> impl Stream<Item = watcher::Result<Event<K>>> + Send + use<K>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
{
    watcher(Api::all(client.clone()), config(version))
}

fn config(version: Version) -> watcher::Config {
    // A list from the API server's own memory will do: the watch brings what it lacks.
    let config = watcher::Config::default().any_semantic();
    if version.streams_lists() { config.streaming_lists() } else { config }
}

/// Tells what a watch brings, for as long as somebody listens. Errors are waited out, longer each time and never all agents
/// at the same moment.
async fn follow<K: Resource<DynamicType = ()> + 'static>(
    events: impl Stream<Item = watcher::Result<Event<K>>> + Send,
    kind: Kind,
    tell: Tell,
    read: fn(K, &mut Vec<Problem>) -> Result<Document, Problem>,
) {
    let mut events = std::pin::pin!(events.default_backoff());
    let mut is_away = false;
    while let Some(event) = events.next().await {
        let news = match event {
            Ok(event) => {
                if std::mem::take(&mut is_away) {
                    info!(kind = kind.as_str(), "the API server tells of changes again");
                }
                news(event, kind, read)
            }
            Err(error) => {
                // The same at each attempt would say nothing new.
                match is_away {
                    false => {
                        warn!(kind = kind.as_str(), %error, "the API server does not tell of changes; what is known holds")
                    }
                    true => {
                        debug!(kind = kind.as_str(), %error, "the API server still does not tell of changes")
                    }
                }
                is_away = true;
                continue;
            }
        };
        if tell.send(news).await.is_err() {
            return;
        }
    }
}

fn news<K: Resource<DynamicType = ()>>(
    event: Event<K>,
    kind: Kind,
    read: fn(K, &mut Vec<Problem>) -> Result<Document, Problem>,
) -> News {
    match event {
        Event::Init => News::Begins(kind),
        Event::InitDone => News::Complete(kind),
        Event::Delete(object) => News::Gone(key(kind, &object)),
        Event::Apply(object) | Event::InitApply(object) => {
            let key = key(kind, &object);
            let mut problems = Vec::new();
            let document = read(object, &mut problems).map_err(|problem| problems.push(problem)).ok();
            News::Object(key, document, problems)
        }
    }
}

fn key<K: Resource<DynamicType = ()>>(kind: Kind, object: &K) -> Key {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
    Key { kind, namespace: text(&object.meta().namespace), name: text(&object.meta().name) }
}
