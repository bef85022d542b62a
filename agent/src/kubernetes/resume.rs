//! A watch goes on where it was only if the API server has been there: one whose etcd was put back to a backup has not, and would
//! say nothing until its revisions are again what they were, and nothing ever of what it has lost.
//!
//! So whoever would go on is first told which revision there is, for one small question each time a watch is taken up again. Who knows of a
//! later one is answered as if history had been compacted (410), and lists anew. What a backup lacks that is so young that other writes
//! have made up for it before the question is asked cannot be told in this way.

use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response, Uri};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta;
use kube::Client;
use kube::api::ListParams;
use kube::client::Body;
use serde::Deserialize;
use serde_json::json;
use tokio::time::{sleep, timeout};
use tonic::codegen::{BoxFuture, Service};
use tracing::warn;

use super::PATIENCE;
use super::silence::{self, Heard};

/// Where a revision is asked for: one object by its name, which costs an API server next to nothing, whether it is there or not. All
/// who watch may list pods.
const ANY_PATH: &str = "/api/v1/namespaces/default/pods";
const ANY_NAME: &str = "metadata.name=undermesh.io";

/// Over how long those who have to list anew are spread: thousands learn of it at once, and what they know holds until then.
const SPREAD: Duration = Duration::from_secs(15);

/// The client, with watches that do not go on where the API server has not been.
pub(super) fn checked(client: Client) -> Client {
    let namespace = client.default_namespace().to_owned();
    Client::new(Checked(client), namespace)
}

struct Checked(Client);

impl Service<Request<Body>> for Checked {
    type Response = Response<Heard>;
    type Error = kube::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let (client, is_watch) = (self.0.clone(), is_watch(request.uri()));
        Box::pin(async move {
            if let Some(watch) = Resumed::read(request.uri())
                && let Some(now) = watch.earlier_revision(&client).await?
            {
                let Resumed { path, revision, .. } = watch;
                warn!(
                    path,
                    now,
                    known = revision,
                    "the API server was put back to an earlier state; all is listed anew"
                );
                sleep(SPREAD.mul_f64(fastrand::f64())).await;
                return Ok(expired(now, revision));
            }
            silence::send(&client, request, is_watch).await
        })
    }
}

/// A watch that is to go on.
#[derive(Debug, PartialEq, Eq)]
struct Resumed {
    path: String,
    fields: Option<String>,
    labels: Option<String>,
    /// All up to here is known.
    revision: u64,
}

impl Resumed {
    /// None if it is another request, or a watch that begins: it knows of nothing.
    fn read(uri: &Uri) -> Option<Self> {
        let value = |name| asked_for(uri, name);
        if !is_watch(uri) || value("sendInitialEvents").is_some() {
            return None;
        }
        let revision = value("resourceVersion")?.parse().ok().filter(|revision| *revision != 0)?;
        let path = uri.path().to_owned();
        Some(Self { path, fields: value("fieldSelector"), labels: value("labelSelector"), revision })
    }

    /// The revision of the API server, if it is earlier than the one that is known.
    async fn earlier_revision(&self, client: &Client) -> kube::Result<Option<u64>> {
        let any = ListParams::default().fields(ANY_NAME);
        if revision(client, ANY_PATH, &any).await.is_ok_and(|now| now >= self.revision) {
            return Ok(None);
        }
        // An API server may keep some kinds elsewhere, with revisions of their own. No version is asked for, so the answer is not from
        // memory that is behind.
        let (field_selector, label_selector) = (self.fields.clone(), self.labels.clone());
        let own = ListParams { field_selector, label_selector, limit: Some(1), ..ListParams::default() };
        let now = revision(client, &self.path, &own).await?;
        Ok((now < self.revision).then_some(now))
    }
}

fn is_watch(uri: &Uri) -> bool {
    asked_for(uri, "watch").as_deref() == Some("true")
}

/// The value of a parameter.
fn asked_for(uri: &Uri, name: &str) -> Option<String> {
    let mut pairs = form_urlencoded::parse(uri.query()?.as_bytes());
    pairs.find_map(|(key, value)| (key == name).then(|| value.into_owned()))
}

/// At which revision the API server lists these.
async fn revision(client: &Client, path: &str, selection: &ListParams) -> kube::Result<u64> {
    /// Of a list.
    #[derive(Deserialize)]
    struct Listed {
        metadata: ListMeta,
    }
    let request =
        kube::core::Request::new(path).list_metadata(selection).map_err(kube::Error::BuildRequest)?;
    let listed: Listed = match timeout(PATIENCE, client.request(request)).await {
        Ok(answer) => answer?,
        Err(elapsed) => return Err(kube::Error::Service(Box::new(elapsed))),
    };
    // Of revisions that are no numbers nothing follows.
    Ok(listed.metadata.resource_version.and_then(|revision| revision.parse().ok()).unwrap_or(u64::MAX))
}

/// As an API server says that it does not have the history after a revision.
fn expired(now: u64, known: u64) -> Response<Heard> {
    let message = format!(
        "the API server is at revision {now}, and {known} was known: it was put back to an earlier state"
    );
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": message, "reason": "Expired", "code": 410,
    });
    let event = json!({ "type": "ERROR", "object": status });
    Response::new(silence::said(format!("{event}\n")))
}

/// Whether it is only asked at which revision it is.
#[cfg(test)]
pub(super) fn is_about_revision(path: &str, query: &str) -> bool {
    path == ANY_PATH && query.contains("undermesh.io")
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use futures_util::StreamExt as _;
    use k8s_openapi::api::core::v1::Pod;
    use kube::Api;
    use kube::api::{WatchEvent, WatchParams};
    use kube::runtime::watcher::{self, Event};
    use serde_json::Value;

    use super::super::testkit::{FakeApi, failure};
    use super::*;
    use crate::kubernetes::follow;

    fn pod(name: &str, version: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "shop", "uid": name, "resourceVersion": version },
        })
    }

    fn list(revision: u64, pods: &[Value]) -> Value {
        json!({ "kind": "PodList", "apiVersion": "v1", "metadata": { "resourceVersion": revision.to_string() }, "items": pods })
    }

    /// What comes first of a watch that goes on at revision 8, and what was asked beside it, of an API server that tells everybody to be
    /// at the first revision, and of the pods to be at the second one.
    async fn resumed(any: u64, own: Option<u64>) -> (String, Vec<String>) {
        let mut api = FakeApi::new(move |question| match (question.query.contains("watch=true"), own) {
            (true, _) => Some((200, json!([{ "type": "MODIFIED", "object": pod("a", "9") }]))),
            (false, Some(revision)) => Some((200, list(revision, &[]))),
            (false, None) => failure(500, "InternalError"),
        });
        api.revision = Arc::new(AtomicU64::new(any));
        let pods = Api::<Pod>::all(api.client());
        let mine = WatchParams::default().fields("spec.nodeName=n1").labels("a=b");
        let first = match pods.watch(&mine, "8").await {
            Ok(events) => match std::pin::pin!(events).next().await {
                Some(Ok(WatchEvent::Modified(_))) => "goes on".into(),
                Some(Ok(WatchEvent::Error(status))) => format!("{} {}", status.code, status.message),
                other => format!("{other:?}"),
            },
            Err(error) => super::super::told(&error),
        };
        let asked = api.asked.lock().unwrap();
        let asked = asked.iter().filter(|question| !question.query.contains("watch=true"));
        (first, asked.map(|question| format!("{}?{}", question.path, question.query)).collect())
    }

    #[tokio::test(start_paused = true)]
    async fn a_watch_goes_on_where_the_api_server_has_been_and_nowhere_else() {
        let own = ["/api/v1/pods?&fieldSelector=spec.nodeName%3Dn1&labelSelector=a%3Db&limit=1".to_owned()];
        for now in [8, 9] {
            assert_eq!(resumed(now, None).await, ("goes on".into(), vec![]));
        }
        let message =
            "410 the API server is at revision 5, and 8 was known: it was put back to an earlier state";
        assert_eq!(resumed(7, Some(5)).await, (message.into(), own.to_vec()));
        // Pods are kept elsewhere.
        assert_eq!(resumed(7, Some(8)).await, ("goes on".into(), own.to_vec()));
        // It cannot say: then nothing is known to have gone.
        assert_eq!(resumed(7, None).await, ("InternalError, says the API server".into(), own.to_vec()));
    }

    #[test]
    fn only_a_watch_that_goes_on_is_asked_about() {
        let check = |uri: &'static str, expected: Option<u64>| {
            assert_eq!(Resumed::read(&Uri::from_static(uri)).map(|it| it.revision), expected, "{uri}");
        };
        check("/api/v1/pods?&watch=true&timeoutSeconds=290&resourceVersion=17", Some(17));
        check("/api/v1/pods?&watch=true&sendInitialEvents=true&resourceVersion=0", None);
        check("/api/v1/pods?&watch=true&resourceVersion=0", None);
        check("/api/v1/pods?&watch=true", None);
        check("/api/v1/pods?&limit=500&resourceVersion=17", None);
        check("/api/v1/pods", None);
    }

    /// The API server goes, and comes back without what was made since the backup. It does not answer at once, and as long as it does
    /// not all that was known stays.
    #[tokio::test(start_paused = true)]
    async fn what_a_backup_does_not_have_is_gone_once_that_is_certain() {
        let revision = Arc::new(AtomicU64::new(8));
        let (at, is_away) = (revision.clone(), AtomicU64::new(3));
        let mut api = FakeApi::new(move |question| {
            let now = at.load(Ordering::SeqCst);
            let query = &question.query;
            match (query.contains("sendInitialEvents"), query.contains("watch=true"), now) {
                (true, ..) => failure(422, "Invalid"),
                (_, true, 8) => {
                    at.store(5, Ordering::SeqCst);
                    Some((200, json!([{ "type": "ADDED", "object": pod("b", "8") }])))
                }
                (_, true, _) => None,
                (_, false, 8) => Some((200, list(7, &[pod("a", "7")]))),
                (_, false, _) if is_away.load(Ordering::SeqCst) > 0 => {
                    is_away.fetch_sub(1, Ordering::SeqCst);
                    failure(503, "ServiceUnavailable")
                }
                (_, false, _) => Some((200, list(5, &[pod("a", "4")]))),
            }
        });
        api.revision = revision;
        let heard = Mutex::new(Vec::new());
        let pods = Api::<Pod>::all(api.client());
        let listen = follow(pods, watcher::Config::default(), "pods").for_each(async |event| {
            let name = |pod: Pod| {
                format!("{} {}", pod.metadata.name.unwrap(), pod.metadata.resource_version.unwrap())
            };
            heard.lock().unwrap().push(match event {
                Ok(Event::Init) => "init".into(),
                Ok(Event::InitApply(pod)) => format!("init {}", name(pod)),
                Ok(Event::InitDone) => "done".into(),
                Ok(Event::Apply(pod)) => name(pod),
                Ok(Event::Delete(pod)) => format!("without {}", name(pod)),
                Err(watcher::Error::WatchError(status)) => status.reason.clone(),
                Err(_) => "untold".into(),
            });
        });
        _ = timeout(Duration::from_secs(120), listen).await;
        let untold = "untold";
        let expected = [
            "init", "init a 7", "done", "b 8", untold, untold, untold, "Expired", "init", "init a 4", "done",
        ];
        assert_eq!(*heard.lock().unwrap(), expected);
    }
}
