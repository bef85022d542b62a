//! Objects that others refer to, each followed by its name: whoever wants some of a kind does not ask for all there are.

use std::collections::{BTreeSet, HashMap};
use std::convert::Infallible;
use std::fmt::Debug;
use std::future::ready;

use futures_util::stream::{self, BoxStream, SelectAll};
use futures_util::{Stream, StreamExt as _};
use k8s_openapi::NamespaceResourceScope;
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::{oneshot, watch};

use super::{Untold, follow};
use crate::model::ObjectRef;

/// What is told of an object: as it is, or that it is not there.
pub(crate) type Told<K> = (ObjectRef, Result<Option<K>, Untold>);

/// Tells of each object that is wanted, of all changes of it for as long as it is, and ends when nobody can want any more. An error
/// says that the API server does not tell for the moment; it has been logged.
pub(crate) fn follow_named<K>(
    client: Client,
    wanted: watch::Receiver<BTreeSet<ObjectRef>>,
    what: &'static str,
) -> impl Stream<Item = Told<K>> + Send
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    K: Clone + DeserializeOwned + Debug + Send + 'static,
{
    let following = Following { client, wanted, what, events: SelectAll::new(), held: HashMap::new() };
    stream::unfold(following, |mut following| async move {
        let told = following.next().await?;
        Some((told, following))
    })
}

/// Has just these wanted from now on.
pub(crate) fn want(sender: &watch::Sender<BTreeSet<ObjectRef>>, ids: &BTreeSet<ObjectRef>) {
    sender.send_if_modified(|wanted| {
        let is_other = wanted != ids;
        if is_other {
            wanted.clone_from(ids);
        }
        is_other
    });
}

struct Following<K> {
    client: Client,
    wanted: watch::Receiver<BTreeSet<ObjectRef>>,
    what: &'static str,
    events: SelectAll<BoxStream<'static, Told<K>>>,
    /// Those that are followed. Each is let go with what is held of it.
    held: HashMap<ObjectRef, oneshot::Sender<Infallible>>,
}

impl<K> Following<K>
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    K: Clone + DeserializeOwned + Debug + Send + 'static,
{
    async fn next(&mut self) -> Option<Told<K>> {
        loop {
            self.hold_what_is_wanted();
            tokio::select! {
                changed = self.wanted.changed() => changed.ok()?,
                Some(told) = self.events.next() => return Some(told),
            }
        }
    }

    fn hold_what_is_wanted(&mut self) {
        let wanted = self.wanted.borrow_and_update().clone();
        self.held.retain(|id, _| wanted.contains(id));
        for id in wanted {
            if !self.held.contains_key(&id) {
                let (hold, is_let_go) = oneshot::channel();
                let events = one(self.client.clone(), id.clone(), self.what).take_until(is_let_go);
                self.events.push(events.boxed());
                self.held.insert(id, hold);
            }
        }
    }
}

fn one<K>(client: Client, id: ObjectRef, what: &'static str) -> impl Stream<Item = Told<K>> + Send
where
    K: Resource<DynamicType = (), Scope = NamespaceResourceScope>,
    K: Clone + DeserializeOwned + Debug + Send + 'static,
{
    let api = Api::<K>::namespaced(client, &id.namespace);
    let by_name = format!("metadata.name={}", id.name);
    let mut is_listed = false;
    follow(api, watcher::Config::default().any_semantic().fields(&by_name), what).filter_map(move |event| {
        let told = match event {
            Ok(Event::Init) => {
                is_listed = false;
                None
            }
            Ok(Event::InitApply(object)) => {
                is_listed = true;
                Some(Ok(Some(object)))
            }
            Ok(Event::InitDone) => (!is_listed).then_some(Ok(None)),
            Ok(Event::Apply(object)) => Some(Ok(Some(object))),
            Ok(Event::Delete(_)) => Some(Ok(None)),
            Err(_) => Some(Err(Untold)),
        };
        ready(told.map(|told| (id.clone(), told)))
    })
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use k8s_openapi::api::core::v1::ConfigMap;
    use serde_json::json;

    use super::super::testkit::{FakeApi, failure};
    use super::*;

    /// Two are wanted, of which one is there; then another one, of which the API server does not tell; then none.
    #[tokio::test(start_paused = true)]
    async fn just_what_is_wanted_is_asked_for_by_its_name() {
        let api = FakeApi::new(|question| {
            if question.query.contains("sendInitialEvents") {
                return failure(422, "Invalid");
            }
            if question.path.contains("/namespaces/bank/") {
                return failure(403, "Forbidden");
            }
            if question.query.contains("watch=true") {
                return None;
            }
            let there = json!({"metadata": {"name": "ca", "namespace": "shop", "uid": "1", "resourceVersion": "5"},
                "data": {"ca.crt": "text"}});
            let items = if question.query.contains("%3Dca&") || question.query.ends_with("%3Dca") {
                json!([there])
            } else {
                json!([])
            };
            Some((
                200,
                json!({"kind": "ConfigMapList", "apiVersion": "v1", "metadata": {"resourceVersion": "7"}, "items": items}),
            ))
        });
        let set = |names: &[(&str, &str)]| -> BTreeSet<ObjectRef> {
            names.iter().map(|(namespace, name)| ObjectRef::new(*namespace, *name)).collect()
        };
        let (want, wanted) = watch::channel(set(&[("shop", "ca"), ("shop", "none")]));
        let mut told = Box::pin(follow_named::<ConfigMap>(api.client(), wanted, "configmaps"));
        let line = |(id, told): Told<ConfigMap>| {
            let what = match told {
                Ok(Some(object)) => format!("has {:?}", object.data.unwrap().into_keys().collect::<Vec<_>>()),
                Ok(None) => "is not there".to_owned(),
                Err(Untold) => "untold".to_owned(),
            };
            format!("{id} {what}")
        };
        let mut lines = vec![line(told.next().await.unwrap()), line(told.next().await.unwrap())];
        lines.sort();
        assert_eq!(lines, ["shop/ca has [\"ca.crt\"]", "shop/none is not there"]);
        want.send_replace(set(&[("bank", "ca")]));
        assert_eq!(line(told.next().await.unwrap()), "bank/ca untold");
        want.send_replace(BTreeSet::new());
        let nothing = tokio::time::timeout(Duration::from_secs(600), told.next()).await;
        assert!(nothing.is_err(), "{nothing:?}");
        drop(want);
        assert!(told.next().await.is_none());
        let asked = api.asked.lock().unwrap();
        let is_by_name = |query: &str| query.contains("fieldSelector=metadata.name%3D");
        assert!(asked.iter().all(|question| is_by_name(&question.query)), "{asked:?}");
    }
}
