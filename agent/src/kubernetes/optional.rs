//! Kinds that an API server may not have, because they are there once somebody has installed them.
//!
//! A cluster without them is one without such objects, and no failure. Whether they have come is looked up from time to time:
//! the API server tells nobody. That they are not there is believed when their definition is not: an API server that starts, or is
//! behind others, denies kinds that the cluster has, and policies must not go for a word like that.

use std::time::Duration;

use futures_util::stream::{self, BoxStream};
use futures_util::{Stream, StreamExt as _};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
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
            is_missing: false,
            is_denied: false,
        };
        stream::unfold(following, |mut following| async move {
            let next = following.next().await;
            Some((next, following))
        })
    }

    /// The newest version that both sides know, by the API server's own word.
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

    /// Whether the cluster has a definition of the kind that is in force. It is one of the API server's own objects, and read as all
    /// API servers of the cluster have agreed.
    async fn is_defined(&self, client: &Client) -> Result<bool, AskError> {
        let name = format!("{}.{}", self.plural, self.group);
        let definition = ask(async {
            match Api::<CustomResourceDefinition>::all(client.clone()).get(&name).await {
                Ok(definition) => Ok(Some(definition)),
                // Of this very object, and not of all that it does not know.
                Err(kube::Error::Api(status))
                    if is_absence(&status) && status.details.as_ref().is_some_and(|it| it.name == name) =>
                {
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        });
        Ok(definition.await?.is_some_and(|definition| self.is_served_by(&definition)))
    }

    /// In a version that we know.
    fn is_served_by(&self, definition: &CustomResourceDefinition) -> bool {
        let conditions = definition.status.iter().flat_map(|status| status.conditions.iter().flatten());
        let mut versions = definition.spec.versions.iter();
        conditions.into_iter().any(|it| it.type_ == "Established" && it.status == "True")
            && versions.any(|version| version.served && self.versions.contains(&&*version.name))
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
    /// That there are none is certain, and has been told.
    is_missing: bool,
    /// They could not be watched for the API server said that it does not have them.
    is_denied: bool,
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
                    Some(Err(error)) if is_not_there(&error) => self.is_denied = true,
                    Some(event) => return event.map_err(|_| Untold),
                    None => {}
                }
                self.events = None;
            }
            sleep(spread(std::mem::take(&mut self.pause))).await;
            match self.look().await {
                Ok(Some(version)) => self.watch(version),
                Ok(None) => return Ok(self.list_none()),
                Err(error) => {
                    warn!(what, %error, "the API server does not say whether it has them; what is known holds");
                    self.pause = ASK_AGAIN;
                    return Err(Untold);
                }
            }
        }
    }

    /// The version to watch; none where the cluster certainly does not have the kind.
    async fn look(&mut self) -> Result<Option<&'static str>, AskError> {
        let was_denied = std::mem::take(&mut self.is_denied);
        match self.kind.version(&self.client).await? {
            Some(_) if was_denied => {
                Err(AskError::Failed("it lists them, and lets nobody watch them".into()))
            }
            None if !self.is_missing && self.kind.is_defined(&self.client).await? => {
                Err(AskError::Failed("it does not list them, and they are defined".into()))
            }
            version => Ok(version),
        }
    }

    /// All there are: none.
    fn list_none(&mut self) -> Event<DynamicObject> {
        // Said once, and not each minute.
        if !std::mem::replace(&mut self.is_missing, true) {
            let what = self.kind.plural;
            info!(what, "the API server does not have them; they are looked for every minute");
        }
        self.is_listing_none = true;
        Event::Init
    }

    fn watch(&mut self, version: &str) {
        self.is_missing = false;
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

    use super::super::testkit::{Answer, FakeApi, failure, no_such};
    use super::*;

    const ROUTES: Optional = Optional {
        group: "gateway.networking.k8s.io",
        versions: &["v1", "v1beta1"],
        kind: "HTTPRoute",
        plural: "httproutes",
    };
    const DEFINITION: &str = "httproutes.gateway.networking.k8s.io";

    fn route(name: &str) -> Value {
        json!({
            "apiVersion": "gateway.networking.k8s.io/v1", "kind": "HTTPRoute",
            "metadata": {"name": name, "namespace": "shop", "uid": name, "resourceVersion": "5"},
            "spec": {"parentRefs": [{"group": "", "kind": "Service", "name": "web"}],
                "rules": [{"backendRefs": [{"name": "web", "port": 80}]}]},
        })
    }

    /// As an API server says it of a group that it does not know.
    fn unknown() -> Answer {
        Some((404, json!("404 page not found\n")))
    }

    fn listed(kinds: &[&str]) -> Answer {
        let resource = |name: &&str| json!({"name": name, "singularName": "httproute", "namespaced": true, "kind": "HTTPRoute", "verbs": []});
        let resources: Vec<_> = kinds.iter().map(resource).collect();
        Some((200, json!({"kind": "APIResourceList", "groupVersion": "g/v1", "resources": resources})))
    }

    fn defined(established: &str, versions: &[(&str, bool)]) -> Value {
        let versions: Vec<_> = versions
            .iter()
            .map(|(name, served)| json!({"name": name, "served": served, "storage": false}))
            .collect();
        json!({
            "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": DEFINITION},
            "spec": {"group": ROUTES.group, "names": {"kind": "HTTPRoute", "plural": "httproutes"}, "scope": "Namespaced",
                "versions": versions},
            "status": {"conditions": [{"type": "NamesAccepted", "status": "True"},
                {"type": "Established", "status": established}]},
        })
    }

    /// What is heard of routes within minutes of an API server that answers so when it is asked for the kinds that it has, for the
    /// definition of this one, and when the kind is watched, each time with how often it has been asked. All list one route.
    async fn heard(
        look: impl Fn(u32) -> Answer + Send + Sync + 'static,
        definition: impl Fn(u32) -> Answer + Send + Sync + 'static,
        watch: impl Fn(u32) -> Answer + Send + Sync + 'static,
    ) -> Vec<String> {
        let counts: [AtomicU32; 3] = Default::default();
        let api = FakeApi::new(move |question| {
            let next = |of: usize| counts[of].fetch_add(1, Ordering::SeqCst);
            match question.path.as_str() {
                "/apis/gateway.networking.k8s.io/v1" => look(next(0)),
                "/apis/gateway.networking.k8s.io/v1beta1" => unknown(),
                path if path.starts_with("/apis/apiextensions.k8s.io/v1/") => {
                    assert!(path.ends_with(&format!("/customresourcedefinitions/{DEFINITION}")), "{path}");
                    definition(next(1))
                }
                path => {
                    assert_eq!(path, "/apis/gateway.networking.k8s.io/v1/httproutes");
                    if question.query.contains("sendInitialEvents") {
                        return failure(422, "Invalid");
                    }
                    if question.query.contains("watch=true") {
                        return watch(next(2));
                    }
                    let metadata = json!({"resourceVersion": "7"});
                    let items = [route("a")];
                    Some((200, json!({"kind": "HTTPRouteList", "metadata": metadata, "items": items})))
                }
            }
        });
        let heard = Mutex::new(Vec::new());
        let listen = ROUTES.follow(api.client()).for_each(async |event| {
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
        heard.into_inner().unwrap()
    }

    const NONE: [&str; 2] = ["init", "done"];
    const ALL: [&str; 3] = ["init", "init a", "done"];

    /// Installed after two looks, and uninstalled after one watch.
    #[tokio::test(start_paused = true)]
    async fn a_kind_that_comes_later_and_goes_again_is_no_failure() {
        let heard = heard(
            |look| match look {
                0 => unknown(),
                // The group is there, and this kind of it is not.
                1 => listed(&["grpcroutes"]),
                2 => listed(&["httproutes"]),
                _ => failure(404, "NotFound"),
            },
            |_| no_such("customresourcedefinitions", DEFINITION),
            |watch| match watch {
                0 => Some((200, json!([{"type": "MODIFIED", "object": route("b")}]))),
                _ => failure(404, "NotFound"),
            },
        )
        .await;
        let expected = [&NONE[..], &NONE, &ALL, &["b"], &NONE, &NONE].concat();
        assert_eq!(heard, expected);
    }

    /// It starts, or is behind others: what it had told of stays, and of what it never told nobody takes it that there is none.
    #[tokio::test(start_paused = true)]
    async fn a_kind_that_is_denied_and_defined_has_not_gone() {
        let heard = heard(
            |look| match look {
                0..3 | 6 => unknown(),
                7 => listed(&[]),
                _ => listed(&["httproutes"]),
            },
            |asked| match asked {
                // It denies all that it is asked, or that we may ask.
                0 => unknown(),
                1 => failure(404, "NotFound"),
                _ => Some((200, defined("True", &[("v1", true)]))),
            },
            |watch| match watch {
                0 | 1 => failure(404, "NotFound"),
                _ => None,
            },
        )
        .await;
        let untold = ["untold"];
        // At first; by the watch alone; by all that it says.
        let expected = [&untold[..], &untold, &untold, &ALL, &untold, &ALL, &untold, &untold, &ALL].concat();
        assert_eq!(heard, expected);
    }

    #[test]
    fn a_definition_that_is_not_in_force_is_none() {
        let is_served = |established, versions| {
            ROUTES.is_served_by(&serde_json::from_value(defined(established, versions)).unwrap())
        };
        assert!(is_served("True", &[("v1", false), ("v1beta1", true)]));
        assert!(!is_served("False", &[("v1", true)]), "its names are another's");
        assert!(!is_served("True", &[("v1", false), ("v2", true)]), "in versions that nobody knows");
    }
}
