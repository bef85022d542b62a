//! What becomes of routes and policies, said in their status: whether their parents or targets take them, and whether what they
//! refer to is there.
//!
//! The leader alone writes, and of `status.parents` and `status.ancestors` only the entries of its own (`undermesh.io/mesh`), of
//! `status.conditions` only the conditions that it knows. What is
//! said is worked out by the code that agents go by; here is the wire.

mod status;
mod world;

use std::cell::RefCell;
use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use futures_util::future::join_all;
use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Pod, Service};
use kube::api::{ApiResource, GroupVersionKind, PartialObjectMeta, Patch, PatchParams};
use kube::core::DynamicObject;
use kube::runtime::watcher;
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, warn};

use super::api::{self, FIELD_MANAGER};
use super::while_leading;
use crate::config::{Custom, Key};
use crate::kubernetes::{self, AskError, Failures, Optional, PODS_NOT_OVER};
use crate::model::ObjectRef;
use world::{World, Write};

/// Changes that come together are looked at together.
const SETTLE: Duration = Duration::from_millis(50);
/// Objects that are written at one time.
const AT_ONCE: usize = 16;

/// Keeps every status right, while this replica leads. The mesh is installed in the namespace.
pub(super) async fn lead(client: &Client, namespace: &str, leader: watch::Receiver<bool>) {
    while_leading(leader, async || {
        let world = RefCell::new(World::new(namespace));
        let news = Notify::new();
        let services = watcher::Config::default().any_semantic();
        let services = api::follow(Api::<Service>::all(client.clone()), services, "services", |event| {
            world.borrow_mut().take_service(event);
            news.notify_one();
        });
        // Their labels are all that is asked for. Those that are over need not come at all.
        let pods = watcher::Config::default().any_semantic().fields(PODS_NOT_OVER);
        let pods = api::follow(Api::<PartialObjectMeta<Pod>>::all(client.clone()), pods, "pods", |event| {
            world.borrow_mut().take_pod(event);
            news.notify_one();
        });
        let (want, wanted) = watch::channel(BTreeSet::new());
        let config_maps = kubernetes::follow_named::<ConfigMap>(client.clone(), wanted, "configmaps");
        let config_maps = config_maps.for_each(|(id, told)| {
            world.borrow_mut().take_config_map(id, told);
            news.notify_one();
            std::future::ready(())
        });
        let follow = async |custom: Custom| {
            let Custom { kind, plural, .. } = custom;
            let optional =
                Optional { group: kind.group(), versions: kind.versions(), kind: kind.as_str(), plural };
            let on_event = |event| {
                // While the API server is away, what is known holds.
                if let Ok(event) = event {
                    world.borrow_mut().take_object(&custom, event);
                    news.notify_one();
                }
                std::future::ready(())
            };
            optional.follow(client.clone()).for_each(on_event).await;
        };
        // All of them: without one, something might seem to be for what is not there, to refer to it, or to have a port.
        let kinds = join_all(Custom::ALL.map(follow));
        tokio::join!(services, pods, config_maps, kinds, write(client, &world, &want, &news));
    })
    .await;
}

async fn write(
    client: &Client,
    world: &RefCell<World>,
    want: &watch::Sender<BTreeSet<ObjectRef>>,
    news: &Notify,
) {
    let mut failures = Failures::<Key>::default();
    loop {
        match failures.next() {
            Some(moment) => _ = timeout_at(moment, news.notified()).await,
            None => news.notified().await,
        }
        sleep(SETTLE).await;
        let now = Instant::now();
        let writes = world.borrow_mut().writes(Timestamp::now(), |key| failures.is_left_alone(key, now));
        let tried: HashSet<&Key> = writes.iter().map(|write| &write.key).collect();
        failures.keep(|key| tried.contains(key), now);
        kubernetes::want(want, world.borrow().config_maps());
        let attempts = writes.into_iter().map(async |write| {
            let outcome = send(client, &write).await;
            (write.key, outcome)
        });
        let mut attempts = stream::iter(attempts).buffer_unordered(AT_ONCE);
        while let Some((key, outcome)) = attempts.next().await {
            match outcome {
                Ok(()) => {
                    failures.remove(&key);
                    debug!(object = %key, "the status was written");
                }
                // The watch brings what the object has become, or that it has gone.
                Err(AskError::Overtaken | AskError::Gone(_)) => {}
                Err(error) => {
                    let pause = failures.add(&key, Instant::now());
                    warn!(object = %key, %error, again_in = ?pause, "the status cannot be written");
                    world.borrow_mut().look_again(key);
                }
            }
        }
    }
}

/// Replaces the list as it was when we looked: what somebody else has written since is not lost.
async fn send(client: &Client, write: &Write) -> Result<(), AskError> {
    let Write { key, version, resource_version, list, entries } = write;
    // What is not followed has nothing to be written.
    let Some(Custom { plural, .. }) = Custom::ALL.into_iter().find(|custom| custom.kind == key.kind) else {
        return Ok(());
    };
    let kind = GroupVersionKind::gvk(key.kind.group(), version, key.kind.as_str());
    let resource = ApiResource::from_gvk_with_plural(&kind, plural);
    let objects = Api::<DynamicObject>::namespaced_with(client.clone(), &key.namespace, &resource);
    let options = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let patch = json!({ "metadata": { "resourceVersion": resource_version }, "status": { *list: entries } });
    kubernetes::ask(objects.patch_status(&key.name, &options, &Patch::Merge(patch))).await?;
    Ok(())
}

#[cfg(test)]
mod tests;
