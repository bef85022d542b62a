//! One watch for each kind of object. What comes is read into documents at once: the objects themselves are larger by far.

use std::collections::{BTreeSet, HashSet};
use std::fmt::Debug;
use std::sync::Arc;

use futures_util::StreamExt as _;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::watcher::{self, Event};
use kube::{Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::policies::Policy;
use super::{Tell, WatchFailed, optional};
use crate::config::{Custom, Document, Key, Kind, Problem};
use crate::kubernetes::{self, PODS_NOT_OVER, Untold};
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
    /// What is written in an object of a kind that is not Kubernetes' own, before what was read of it.
    Written(Key, Arc<str>),
    /// It is gone.
    Gone(Key),
    /// A NetworkPolicy.
    Policy(Policy),
    /// It is gone, or has become one that cannot be understood.
    NoPolicy(ObjectRef),
    /// All NetworkPolicies there are.
    Policies(HashSet<ObjectRef>),
    /// A ConfigMap that something refers to, or that it is not there; or the API server does not tell.
    ConfigMap(ObjectRef, Result<Option<Document>, Untold>),
}

/// Watches everything that the mesh is made from, of ConfigMaps those that are `wanted`. The tasks end with the set. Of each attempt
/// that fails is told by the kind's plural name.
pub(super) fn all(
    client: &Client,
    wanted: watch::Receiver<BTreeSet<ObjectRef>>,
    tell: &Tell,
    failed: &WatchFailed,
) -> JoinSet<()> {
    let watched = Watched { client, tell, failed };
    let mut watches = JoinSet::new();
    // Their labels and annotations say all.
    watches.spawn(watched.follow::<PartialObjectMeta<core::Namespace>, _>("namespaces", |event| {
        Some(news(event, Kind::Namespace, |object, problems| {
            let metadata = object.metadata;
            Document::namespace(&core::Namespace { metadata, ..Default::default() }, problems)
        }))
    }));
    watches.spawn(watched.follow::<core::Service, _>("services", |event| {
        Some(news(event, Kind::Service, |object, problems| Document::service(&object, problems)))
    }));
    watches.spawn(watched.follow::<EndpointSlice, _>("endpointslices", |event| {
        Some(news(event, Kind::EndpointSlice, |object, problems| Document::endpoint_slice(&object, problems)))
    }));
    // One that comes to its end leaves the selection, and is told of as gone.
    watches.spawn(watched.follow_some::<core::Pod, _>("pods", PODS_NOT_OVER, |event| {
        Some(news(event, Kind::Pod, |object, problems| Document::pod(&object, problems)))
    }));
    // The mesh does without them: they only tell what stands in its way.
    let mut listing = HashSet::new();
    watches.spawn(watched.follow("networkpolicies", move |event| policy_news(event, &mut listing)));
    watches.spawn(watched.config_maps(wanted));
    for custom in Custom::ALL {
        watches.spawn(optional::follow(custom, client.clone(), tell.clone(), failed.clone()));
    }
    watches
}

/// What all watches have in common.
struct Watched<'a> {
    client: &'a Client,
    tell: &'a Tell,
    failed: &'a WatchFailed,
}

impl Watched<'_> {
    /// Tells what a watch brings, for as long as somebody listens.
    fn follow<K, R>(&self, what: &'static str, read: R) -> impl Future<Output = ()> + Send + use<K, R>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
        R: FnMut(Event<K>) -> Option<News> + Send + 'static,
    {
        self.follow_some(what, "", read)
    }

    /// The same of those that the field selector selects.
    fn follow_some<K, R>(
        &self,
        what: &'static str,
        fields: &str,
        mut read: R,
    ) -> impl Future<Output = ()> + Send + use<K, R>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug + Send + 'static,
        R: FnMut(Event<K>) -> Option<News> + Send + 'static,
    {
        // A list from the API server's own memory will do: the watch brings what it lacks.
        let mut selection = watcher::Config::default().any_semantic();
        if !fields.is_empty() {
            selection = selection.fields(fields);
        }
        let events = kubernetes::follow(Api::<K>::all(self.client.clone()), selection, what);
        let (tell, failed) = (self.tell.clone(), self.failed.clone());
        async move {
            let mut events = std::pin::pin!(events);
            while let Some(event) = events.next().await {
                let Ok(event) = event else {
                    failed(what);
                    continue;
                };
                if let Some(news) = read(event)
                    && tell.send(news).await.is_err()
                {
                    return;
                }
            }
        }
    }
}

impl Watched<'_> {
    /// Tells of the ConfigMaps that are wanted.
    fn config_maps(&self, wanted: watch::Receiver<BTreeSet<ObjectRef>>) -> impl Future<Output = ()> + use<> {
        const WHAT: &str = "configmaps";
        let events = kubernetes::follow_named::<core::ConfigMap>(self.client.clone(), wanted, WHAT);
        let (tell, failed) = (self.tell.clone(), self.failed.clone());
        async move {
            let mut events = std::pin::pin!(events);
            while let Some((id, told)) = events.next().await {
                if told.is_err() {
                    failed(WHAT);
                }
                let document = told.map(|it| it.and_then(|it| Document::config_map(&it).ok()));
                if tell.send(News::ConfigMap(id, document)).await.is_err() {
                    return;
                }
            }
        }
    }
}

fn policy_news(event: Event<NetworkPolicy>, listing: &mut HashSet<ObjectRef>) -> Option<News> {
    let news = |policy: &NetworkPolicy| {
        Policy::read(policy).map_or_else(|| News::NoPolicy(object_ref(policy)), News::Policy)
    };
    match event {
        Event::Init => {
            listing.clear();
            None
        }
        Event::InitDone => Some(News::Policies(std::mem::take(listing))),
        Event::Delete(policy) => Some(News::NoPolicy(object_ref(&policy))),
        Event::InitApply(policy) => {
            listing.insert(object_ref(&policy));
            Some(news(&policy))
        }
        Event::Apply(policy) => Some(news(&policy)),
    }
}

fn object_ref(policy: &NetworkPolicy) -> ObjectRef {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().to_owned();
    ObjectRef::new(text(&policy.metadata.namespace), text(&policy.metadata.name))
}

pub(super) fn news<K: Resource>(
    event: Event<K>,
    kind: Kind,
    read: impl FnOnce(K, &mut Vec<Problem>) -> Result<Document, Problem>,
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

pub(super) fn key<K: Resource>(kind: Kind, object: &K) -> Key {
    let text = |text: &Option<String>| text.as_deref().unwrap_or_default().into();
    Key { kind, namespace: text(&object.meta().namespace), name: text(&object.meta().name) }
}
