//! What becomes of routes, said in their status: whether their parents take them, and whether what they refer to is there.
//!
//! The leader alone writes, and of `status.parents` only the entries of its own (`undermesh.io/mesh`). What is said is worked out by
//! the code that agents route by; here is the wire.

mod status;
mod world;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use futures_util::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use kube::api::{ApiResource, GroupVersionKind, Patch, PatchParams};
use kube::core::DynamicObject;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio::time::{Instant, sleep, timeout_at};
use tracing::{debug, warn};

use super::api::{self, FIELD_MANAGER};
use super::while_leading;
use crate::config::Kind;
use crate::kubernetes::{self, AskError, Optional};
use crate::route::{RouteKind, RouteRef};
use world::{World, Write};

/// Changes that come together are looked at together.
const SETTLE: Duration = Duration::from_millis(50);
/// Routes that are written at one time.
const AT_ONCE: usize = 16;
/// After the first write that has failed; twice as long after each further one.
const FIRST_PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);

const HTTP_ROUTES: &str = "httproutes";
const GRPC_ROUTES: &str = "grpcroutes";

/// Routes whose writes have failed: how often, and until when they are left alone.
#[derive(Default)]
struct Failures(HashMap<RouteRef, (u32, Instant)>);

/// Keeps the status of every route right, while this replica leads.
pub(super) async fn lead(client: &Client, leader: watch::Receiver<bool>) {
    while_leading(leader, async || {
        let world = RefCell::new(World::new());
        let news = Notify::new();
        let services = watcher::Config::default().any_semantic();
        let services = api::follow(Api::<Service>::all(client.clone()), services, "services", |event| {
            world.borrow_mut().take_service(event);
            news.notify_one();
        });
        let follow = async |kind: Optional, take: fn(&mut World, Event<DynamicObject>)| {
            let on_event = |event| {
                // While the API server is away, what is known holds.
                if let Ok(event) = event {
                    take(&mut world.borrow_mut(), event);
                    news.notify_one();
                }
                std::future::ready(())
            };
            kind.follow(client.clone()).for_each(on_event).await;
        };
        tokio::join!(
            services,
            follow(optional(Kind::ReferenceGrant, "referencegrants"), World::take_grant),
            follow(optional(Kind::HttpRoute, HTTP_ROUTES), World::take_http_route),
            follow(optional(Kind::GrpcRoute, GRPC_ROUTES), World::take_grpc_route),
            write(client, &world, &news),
        );
    })
    .await;
}

async fn write(client: &Client, world: &RefCell<World>, news: &Notify) {
    let mut failures = Failures::default();
    loop {
        match failures.next() {
            Some(moment) => _ = timeout_at(moment, news.notified()).await,
            None => news.notified().await,
        }
        sleep(SETTLE).await;
        let now = Instant::now();
        let writes = world.borrow_mut().writes(Timestamp::now(), |route| failures.is_left_alone(route, now));
        failures.keep(&writes, now);
        let attempts = writes.into_iter().map(async |write| {
            let outcome = send(client, &write).await;
            (write.route, outcome)
        });
        let mut attempts = stream::iter(attempts).buffer_unordered(AT_ONCE);
        while let Some((route, outcome)) = attempts.next().await {
            match outcome {
                Ok(()) => {
                    failures.0.remove(&route);
                    debug!(%route, "the route's status was written");
                }
                // The watch brings what the route has become, or that it has gone.
                Err(AskError::Overtaken | AskError::Gone(_)) => {}
                Err(error) => {
                    let pause = failures.add(&route, Instant::now());
                    warn!(%route, %error, again_in = ?pause, "the route's status cannot be written");
                    world.borrow_mut().look_again(route);
                }
            }
        }
    }
}

/// Replaces the list as it was when we looked: what somebody else has written since is not lost.
async fn send(client: &Client, write: &Write) -> Result<(), AskError> {
    let Write { route: RouteRef { kind, id }, resource_version, parents } = write;
    let plural = match kind {
        RouteKind::Http => HTTP_ROUTES,
        RouteKind::Grpc => GRPC_ROUTES,
        // Not followed, so that there is nothing to write.
        RouteKind::Tls | RouteKind::Tcp => return Ok(()),
    };
    let kind = Kind::from(*kind);
    let kind = GroupVersionKind::gvk(kind.group(), kind.versions()[0], kind.as_str());
    let resource = ApiResource::from_gvk_with_plural(&kind, plural);
    let routes = Api::<DynamicObject>::namespaced_with(client.clone(), &id.namespace, &resource);
    let options = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    let patch =
        json!({ "metadata": { "resourceVersion": resource_version }, "status": { "parents": parents } });
    kubernetes::ask(routes.patch_status(&id.name, &options, &Patch::Merge(patch))).await?;
    Ok(())
}

fn optional(kind: Kind, plural: &'static str) -> Optional {
    Optional { group: kind.group(), versions: kind.versions(), kind: kind.as_str(), plural }
}

impl Failures {
    /// Notes a further one. The answer is how long the route is left alone.
    fn add(&mut self, route: &RouteRef, now: Instant) -> Duration {
        let (count, until) = self.0.entry(route.clone()).or_insert((0, now));
        let pause = FIRST_PAUSE.saturating_mul(1 << (*count).min(10)).min(LONGEST_PAUSE);
        (*count, *until) = (*count + 1, now + pause);
        pause
    }

    fn is_left_alone(&self, route: &RouteRef, now: Instant) -> bool {
        self.0.get(route).is_some_and(|(_, until)| *until > now)
    }

    /// Forgets those of routes that are neither left alone nor tried again: there is nothing to write any more.
    fn keep(&mut self, tried: &[Write], now: Instant) {
        let tried: HashSet<&RouteRef> = tried.iter().map(|write| &write.route).collect();
        self.0.retain(|route, (_, until)| *until > now || tried.contains(route));
    }

    /// When a route is to be tried again.
    fn next(&self) -> Option<Instant> {
        self.0.values().map(|(_, until)| *until).min()
    }
}

#[cfg(test)]
mod tests;
