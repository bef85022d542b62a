//! Kinds that an API server may not have, because they are there once somebody has installed them.
//!
//! A cluster without them is one without such objects, and no failure. Whether they have come is looked up from time to time:
//! the API server tells nobody.

use std::time::Duration;

use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt as _};
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Error, Event};
use tokio::time::sleep;
use tracing::{info, warn};

use super::{AskError, ask, follow, is_absence};

/// A kind that may be missing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Optional {
    pub(crate) group: &'static str,
    /// Those that say the same; the newest first.
    pub(crate) versions: &'static [&'static str],
    pub(crate) kind: &'static str,
    pub(crate) plural: &'static str,
}

/// The API server does not tell for the moment. It has been logged.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Untold;

/// How often a kind that is not there is looked for. With up to a tenth more, so that those that were started together do
/// not go on asking together.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// After a question that was not answered.
const ASK_AGAIN: Duration = Duration::from_secs(5);

impl Optional {
    /// Tells of the objects of the kind as [`follow`] does, and of none where the API server does not have it.
    pub(crate) fn follow(
        self,
        client: Client,
    ) -> impl Stream<Item = Result<Event<DynamicObject>, Untold>> + Send {
        let following = Following {
            kind: self,
            client,
            events: None,
            pause: Duration::ZERO,
            is_listing_none: false,
            was_missing: false,
        };
        stream::unfold(following, |mut following| async move {
            let next = following.next().await;
            Some((next, following))
        })
    }

    /// The newest version that both sides know.
    async fn version(&self, client: &Client) -> Result<Option<&'static str>, AskError> {
        for version in self.versions {
            let group_version = format!("{}/{version}", self.group);
            match ask(client.list_api_group_resources(&group_version)).await {
                Ok(list) if list.resources.iter().any(|resource| resource.name == self.plural) => {
                    return Ok(Some(version));
                }
                Ok(_) | Err(AskError::Gone(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }
}

struct Following {
    kind: Optional,
    client: Client,
    /// Of a version that the API server has.
    events: Option<BoxStream<'static, watcher::Result<Event<DynamicObject>>>>,
    /// Before it is looked for.
    pause: Duration,
    /// That there are none has been begun to be told.
    is_listing_none: bool,
    was_missing: bool,
}

impl Following {
    async fn next(&mut self) -> Result<Event<DynamicObject>, Untold> {
        let what = self.kind.plural;
        if std::mem::take(&mut self.is_listing_none) {
            self.pause = LOOK_AGAIN;
            return Ok(Event::InitDone);
        }
        loop {
            if let Some(events) = &mut self.events {
                match events.next().await {
                    Some(Err(error)) if is_not_there(&error) => {
                        info!(what, "the API server does not have them any more");
                        return Ok(self.list_none());
                    }
                    Some(event) => return event.map_err(|_| Untold),
                    None => self.events = None,
                }
            }
            sleep(spread(std::mem::take(&mut self.pause))).await;
            match self.kind.version(&self.client).await {
                Ok(Some(version)) => self.watch(version),
                Ok(None) => {
                    // Said once, and not each minute.
                    if !self.was_missing {
                        info!(what, "the API server does not have them; they are looked for every minute");
                    }
                    return Ok(self.list_none());
                }
                Err(error) => {
                    warn!(what, %error, "the API server does not say whether it has them; what is known holds");
                    self.pause = ASK_AGAIN;
                    return Err(Untold);
                }
            }
        }
    }

    /// All there are: none.
    fn list_none(&mut self) -> Event<DynamicObject> {
        self.events = None;
        self.was_missing = true;
        self.is_listing_none = true;
        Event::Init
    }

    fn watch(&mut self, version: &str) {
        let Optional { group, kind, plural, .. } = self.kind;
        let resource =
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk(group, version, kind), plural);
        let api = Api::<DynamicObject>::all_with(self.client.clone(), &resource);
        self.events = Some(follow(api, watcher::Config::default().any_semantic(), plural).boxed());
    }
}

fn is_not_there(error: &Error) -> bool {
    let refused = match error {
        Error::InitialListFailed(error) | Error::WatchStartFailed(error) | Error::WatchFailed(error) => error,
        Error::WatchError(_) | Error::NoResourceVersion => return false,
    };
    matches!(refused, kube::Error::Api(status) if is_absence(status))
}

fn spread(pause: Duration) -> Duration {
    pause + pause.mul_f64(fastrand::f64() / 10.0)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::{Value, json};

    use super::super::testkit::{FakeApi, failure};
    use super::*;

    fn route(name: &str) -> Value {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": name, "namespace": "shop", "uid": name, "resourceVersion": "5"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
                "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]},
        })
    }

    /// Installed after two looks, and uninstalled after one watch.
    #[tokio::test(start_paused = true)]
    async fn a_kind_that_comes_later_and_goes_again_is_no_failure() {
        let looks = AtomicU32::new(0);
        let watches = AtomicU32::new(0);
        let api = FakeApi::new(move |question| {
            if question.path == "/apis/gateway.networking.k8s.io/v1" {
                let look = looks.fetch_add(1, Ordering::SeqCst);
                let resource = json!({"name": "httproutes", "singularName": "httproute", "namespaced": true,
                    "kind": "HTTPRoute", "verbs": ["list", "watch"]});
                return match look {
                    // As an API server says it of a group that it does not know.
                    0 => Some((404, json!("404 page not found\n"))),
                    3 => failure(404, "NotFound"),
                    // The group is there, and this kind of it is not.
                    1 => Some((
                        200,
                        json!({"kind": "APIResourceList", "groupVersion": "g/v1", "resources": []}),
                    )),
                    _ => Some((
                        200,
                        json!({"kind": "APIResourceList", "groupVersion": "g/v1", "resources": [resource]}),
                    )),
                };
            }
            assert!(question.path.ends_with("/httproutes"), "{question:?}");
            if question.query.contains("sendInitialEvents") {
                return failure(422, "Invalid");
            }
            if question.query.contains("watch=true") {
                return match watches.fetch_add(1, Ordering::SeqCst) {
                    0 => Some((200, json!([{"type": "MODIFIED", "object": route("b")}]))),
                    _ => failure(404, "NotFound"),
                };
            }
            let metadata = json!({"resourceVersion": "7"});
            Some((200, json!({"kind": "HTTPRouteList", "metadata": metadata, "items": [route("a")]})))
        });
        let routes = Optional {
            group: "gateway.networking.k8s.io",
            versions: &["v1"],
            kind: "HTTPRoute",
            plural: "httproutes",
        };
        let heard = Mutex::new(Vec::new());
        let listen = routes.follow(api.client()).for_each(async |event| {
            let name = |object: DynamicObject| object.metadata.name.unwrap();
            heard.lock().unwrap().push(match event {
                Ok(Event::Init) => "init".to_owned(),
                Ok(Event::InitApply(object)) => format!("init {}", name(object)),
                Ok(Event::InitDone) => "done".into(),
                Ok(Event::Apply(object)) => name(object),
                Ok(Event::Delete(object)) => format!("without {}", name(object)),
                Err(Untold) => "untold".into(),
            });
        });
        _ = tokio::time::timeout(Duration::from_secs(200), listen).await;
        let heard = heard.into_inner().unwrap();
        let none = ["init", "done"];
        let expected = [&none[..], &none, &["init", "init a", "done", "b"], &none].concat();
        assert_eq!(heard[..expected.len()], expected, "{heard:?}");
        assert!(!heard.contains(&"untold".to_owned()), "{heard:?}");
    }
}
