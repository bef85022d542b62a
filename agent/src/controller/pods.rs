//! Which service accounts have pods on which nodes, now: what node authorization asks.
//!
//! Of each pod five facts are kept; finished pods count as gone.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use tokio::sync::watch;

use super::api;
use super::slim::SlimPod;
use crate::kubernetes::PODS_NOT_OVER;
use crate::telemetry::ControllerTelemetry;

/// The pods of the cluster, shared by whoever asks.
#[derive(Debug, Default)]
pub(super) struct Pods {
    index: RwLock<Index>,
    changed: watch::Sender<()>,
}

/// What is known of the pods at one moment.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// False until every pod has been heard of once.
    synced: bool,
    by_uid: HashMap<Box<str>, Place>,
    nodes: HashMap<Arc<str>, HashMap<Account, u32>>,
}

/// Where a pod runs, and as whom.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) node: Arc<str>,
    pub(super) account: Account,
}

/// A service account. Shared by the pods of one node that have the same.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Account(Arc<(Box<str>, Box<str>)>);

/// Follows the pods of the whole cluster.
pub(super) async fn follow(client: &Client, pods: &Pods, telemetry: &ControllerTelemetry) {
    // Those that are over need not come at all.
    let selection = watcher::Config::default().fields(PODS_NOT_OVER);
    let mut coming = None;
    api::follow(Api::<SlimPod>::all(client.clone()), selection, "pods", |event| {
        match event {
            // What was known stays in force until the new picture is whole.
            Event::Init => coming = Some(Index::default()),
            Event::InitApply(pod) => {
                if let Some(coming) = &mut coming {
                    coming.apply(&pod);
                }
            }
            Event::InitDone => {
                if let Some(mut whole) = coming.take() {
                    whole.synced = true;
                    pods.change(|index| *index = whole);
                }
            }
            Event::Apply(pod) => pods.change(|index| index.apply(&pod)),
            Event::Delete(pod) => {
                pods.change(|index| index.remove(pod.metadata.uid.as_deref().unwrap_or("")))
            }
        }
        telemetry.set_pods(pods.look(|index| index.by_uid.len()));
    })
    .await;
}

impl Pods {
    /// What an answer needs of the pods as they are now.
    pub(super) fn look<T>(&self, look: impl FnOnce(&Index) -> T) -> T {
        look(&self.index.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Looks again at every change until the answer is there, or the time is over: then the last one counts.
    pub(super) async fn wait_for<T, E>(
        &self,
        longest: Duration,
        look: impl Fn(&Index) -> Result<T, E>,
        is_worth_waiting: impl Fn(&E) -> bool,
    ) -> Result<T, E> {
        let deadline = tokio::time::Instant::now() + longest;
        // Subscribed before the first look: no change in between is lost.
        let mut changes = self.changed.subscribe();
        loop {
            let answer = self.look(&look);
            match &answer {
                Err(error) if is_worth_waiting(error) => {}
                _ => return answer,
            }
            let change = tokio::time::timeout_at(deadline, changes.changed()).await;
            if !matches!(change, Ok(Ok(()))) {
                return answer;
            }
        }
    }

    /// What keeps it from answering.
    pub(super) fn missing(&self) -> Option<String> {
        let synced = self.look(|index| index.synced);
        (!synced).then(|| "the pods of the cluster are not known yet".into())
    }

    pub(super) fn change(&self, change: impl FnOnce(&mut Index)) {
        change(&mut self.index.write().unwrap_or_else(PoisonError::into_inner));
        self.changed.send_replace(());
    }
}

impl Index {
    /// True once every pod has been heard of.
    pub(super) fn is_synced(&self) -> bool {
        self.synced
    }

    /// Where the pod with this UID runs.
    pub(super) fn place(&self, uid: &str) -> Option<&Place> {
        self.by_uid.get(uid)
    }

    /// True if a pod of the service account runs on the node.
    pub(super) fn runs_on(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let account = Account::new(namespace, service_account);
        self.nodes.get(node).is_some_and(|accounts| accounts.contains_key(&account))
    }

    pub(super) fn apply(&mut self, pod: &SlimPod) {
        let Some(uid) = pod.metadata.uid.as_deref() else { return };
        let is_over = matches!(pod.status.phase.as_str(), "Succeeded" | "Failed");
        // A pod that has no node yet runs nowhere.
        if is_over || pod.spec.node_name.is_empty() {
            return self.remove(uid);
        }
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let account = Account::new(namespace, &pod.spec.service_account_name);
        let known = self.by_uid.get(uid);
        if known.is_some_and(|place| *place.node == *pod.spec.node_name && place.account == account) {
            return;
        }
        self.remove(uid);
        let node = match self.nodes.get_key_value(pod.spec.node_name.as_str()) {
            Some((node, _)) => node.clone(),
            None => pod.spec.node_name.as_str().into(),
        };
        let accounts = self.nodes.entry(node.clone()).or_default();
        let account = accounts.get_key_value(&account).map_or(account, |(known, _)| known.clone());
        *accounts.entry(account.clone()).or_default() += 1;
        self.by_uid.insert(uid.into(), Place { node, account });
    }

    pub(super) fn remove(&mut self, uid: &str) {
        let Some(Place { node, account }) = self.by_uid.remove(uid) else { return };
        let Some(accounts) = self.nodes.get_mut(&node) else { return };
        if let Some(count) = accounts.get_mut(&account) {
            *count -= 1;
            if *count == 0 {
                accounts.remove(&account);
            }
        }
        if accounts.is_empty() {
            self.nodes.remove(&node);
        }
    }

    #[cfg(test)]
    pub(super) fn of(pods: &[SlimPod]) -> Self {
        let mut index = Self { synced: true, ..Self::default() };
        pods.iter().for_each(|pod| index.apply(pod));
        index
    }
}

impl Account {
    pub(super) fn new(namespace: &str, name: &str) -> Self {
        Self(Arc::new((namespace.into(), name.into())))
    }
}

#[cfg(test)]
mod tests {
    use super::super::testkit::{finished, pod};
    use super::*;

    #[test]
    fn an_account_is_on_a_node_as_long_as_one_of_its_pods_is() {
        let mut index = Index::of(&[pod("1", "n1", "shop/web"), pod("2", "n1", "shop/web")]);
        let on = |index: &Index, node| index.runs_on(node, "shop", "web");
        index.remove("1");
        assert!(on(&index, "n1") && !on(&index, "n2"));
        index.apply(&pod("2", "n1", "shop/web"));
        index.apply(&finished("2", "n1", "shop/web"));
        assert!(!on(&index, "n1"));
        index.remove("2");
        index.remove("never heard of");
        index.apply(&pod("3", "", "shop/web"));
        assert!(index.by_uid.is_empty() && index.nodes.is_empty(), "{index:?}");

        // The same name with another UID on another node, and then the old one goes.
        index.apply(&pod("4", "n1", "shop/web"));
        index.apply(&pod("5", "n2", "shop/web"));
        index.remove("4");
        assert!(!on(&index, "n1") && on(&index, "n2"));
        assert!(!index.runs_on("n2", "shop", "we") && !index.runs_on("n2", "sho", "pweb"));
        // A pod never moves, but what the API server says counts.
        index.apply(&pod("5", "n3", "shop/other"));
        assert!(!on(&index, "n2") && index.runs_on("n3", "shop", "other"));
        assert_eq!(index.nodes.len(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn who_asks_too_early_waits_for_the_pod() {
        let pods = Arc::new(Pods::default());
        let look = |index: &Index| index.runs_on("n1", "shop", "web").then_some(()).ok_or("none");
        let second = Duration::from_secs(1);
        assert_eq!(pods.wait_for(second, look, |_| true).await, Err("none"));
        let (asked, late) = (pods.clone(), pods.clone());
        let question = tokio::spawn(async move { asked.wait_for(2 * second, look, |_| true).await });
        tokio::time::sleep(second).await;
        late.change(|index| index.apply(&pod("1", "n2", "shop/web")));
        tokio::time::sleep(second / 2).await;
        late.change(|index| index.apply(&pod("2", "n1", "shop/web")));
        assert_eq!(question.await.unwrap(), Ok(()));
        assert_eq!(pods.wait_for(second, |_| Err::<(), _>("never"), |_| false).await, Err("never"));
    }
}
