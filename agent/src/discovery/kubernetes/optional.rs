//! Kinds that an API server may not have: those of the Gateway API are there once somebody has installed them.
//!
//! A cluster without them is one without such objects, and no failure. Whether they have come is looked up from time to time:
//! the API server tells nobody.

use std::time::Duration;

use futures_util::StreamExt as _;
use kube::Client;
use kube::api::{Api, ApiResource, DynamicObject, GroupVersionKind};
use kube::runtime::watcher::{self, Error, Event};
use serde_json::Value;
use tokio::time::sleep;
use tracing::{info, warn};

use super::watch::{News, news};
use super::{Tell, WatchFailed};
use crate::config::{Document, Kind, Problem};
use crate::kubernetes::{self, AskError};

/// A kind that may be missing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Optional {
    pub(super) kind: Kind,
    pub(super) plural: &'static str,
    pub(super) read: fn(&Value, &mut Vec<Problem>) -> Result<Document, Problem>,
}

/// The kinds of the Gateway API that the mesh reads.
pub(super) const ALL: [Optional; 5] = [
    Optional { kind: Kind::ReferenceGrant, plural: "referencegrants", read: Document::reference_grant },
    Optional { kind: Kind::HttpRoute, plural: "httproutes", read: Document::http_route },
    Optional { kind: Kind::GrpcRoute, plural: "grpcroutes", read: Document::grpc_route },
    Optional { kind: Kind::TlsRoute, plural: "tlsroutes", read: Document::tls_route },
    Optional { kind: Kind::TcpRoute, plural: "tcproutes", read: Document::tcp_route },
];

/// How often a kind that is not there is looked for. With up to a tenth more, so that agents that were started together do
/// not go on asking together.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// After a question that was not answered.
const ASK_AGAIN: Duration = Duration::from_secs(5);

impl Optional {
    /// Tells of the objects of the kind, and of none where the API server does not have it. Ends when nobody listens.
    pub(super) async fn follow(self, client: Client, tell: Tell, failed: WatchFailed) {
        let mut was_missing = false;
        loop {
            match self.version(&client).await {
                Ok(Some(version)) => {
                    if self.follow_version(version, &client, &tell, &failed).await.is_err() {
                        return;
                    }
                    info!(what = self.plural, "the API server does not have them any more");
                }
                // Said once, and not each minute.
                Ok(None) if was_missing => {}
                Ok(None) => {
                    info!(
                        what = self.plural,
                        "the API server does not have them; they are looked for every minute"
                    );
                }
                Err(error) => {
                    failed(self.plural);
                    warn!(what = self.plural, %error, "the API server does not say whether it has them; what is known holds");
                    sleep(spread(ASK_AGAIN)).await;
                    continue;
                }
            }
            was_missing = true;
            // All there are: none.
            for news in [News::Begins(self.kind), News::Complete(self.kind)] {
                if tell.send(news).await.is_err() {
                    return;
                }
            }
            sleep(spread(LOOK_AGAIN)).await;
        }
    }

    /// The newest version that both sides know.
    async fn version(&self, client: &Client) -> Result<Option<&'static str>, AskError> {
        for version in self.kind.versions() {
            let group_version = format!("{}/{version}", self.kind.group());
            match kubernetes::ask(client.list_api_group_resources(&group_version)).await {
                Ok(list) if list.resources.iter().any(|resource| resource.name == self.plural) => {
                    return Ok(Some(version));
                }
                Ok(_) | Err(AskError::Gone(_)) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Comes back when the API server does not have the kind any more; an error says that nobody listens.
    async fn follow_version(
        &self,
        version: &str,
        client: &Client,
        tell: &Tell,
        failed: &WatchFailed,
    ) -> Result<(), NobodyListens> {
        let kind = GroupVersionKind::gvk(self.kind.group(), version, self.kind.as_str());
        let resource = ApiResource::from_gvk_with_plural(&kind, self.plural);
        let api = Api::<DynamicObject>::all_with(client.clone(), &resource);
        let selection = watcher::Config::default().any_semantic();
        let mut events = std::pin::pin!(kubernetes::follow(api, selection, self.plural));
        while let Some(event) = events.next().await {
            match event {
                Ok(event) => tell.send(self.news(event)).await.map_err(|_| NobodyListens)?,
                Err(error) if is_not_there(&error) => return Ok(()),
                Err(_) => failed(self.plural),
            }
        }
        Ok(())
    }

    fn news(&self, event: Event<DynamicObject>) -> News {
        news(event, self.kind, |object, problems| {
            // What has come as JSON goes back into it.
            (self.read)(&serde_json::to_value(object).unwrap_or_default(), problems)
        })
    }
}

struct NobodyListens;

fn is_not_there(error: &Error) -> bool {
    let refused = match error {
        Error::InitialListFailed(error) | Error::WatchStartFailed(error) | Error::WatchFailed(error) => error,
        Error::WatchError(_) | Error::NoResourceVersion => return false,
    };
    matches!(refused, kube::Error::Api(status) if status.is_not_found())
}

fn spread(pause: Duration) -> Duration {
    pause + pause.mul_f64(fastrand::f64() / 10.0)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use serde_json::json;
    use tokio::sync::mpsc;

    use super::*;
    use crate::kubernetes::testkit::{FakeApi, failure};

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
                    0 | 3 => failure(404, "NotFound"),
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
        let (tell, mut heard) = mpsc::channel(64);
        let failures = Arc::new(AtomicU32::new(0));
        let count = failures.clone();
        let failed: WatchFailed = Arc::new(move |_| _ = count.fetch_add(1, Ordering::SeqCst));
        let following = ALL[1].follow(api.client(), tell, failed);
        _ = tokio::time::timeout(Duration::from_secs(200), following).await;
        let mut lines = Vec::new();
        while let Ok(news) = heard.try_recv() {
            lines.push(match news {
                News::Begins(kind) => format!("begins {}", kind.as_str()),
                News::Complete(kind) => format!("complete {}", kind.as_str()),
                News::Object(key, document, problems) => {
                    assert!(problems.is_empty(), "{problems:?}");
                    format!("{key} {}", document.is_some())
                }
                other => format!("{other:?}"),
            });
        }
        let (begins, complete) = ("begins HTTPRoute", "complete HTTPRoute");
        let expected = [
            begins,
            complete,
            begins,
            complete,
            begins,
            "HTTPRoute shop/a true",
            complete,
            "HTTPRoute shop/b true",
            begins,
            complete,
        ];
        assert_eq!(lines[..expected.len()], expected, "{lines:?}");
        assert_eq!(failures.load(Ordering::SeqCst), 0);
    }
}
