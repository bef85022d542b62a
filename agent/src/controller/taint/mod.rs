//! The startup taint: nodes come with it, so that no pod runs there before the agent does, and the leader takes it away
//! once the agent holds. Nobody here ever sets it.

mod decide;

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant, SystemTime};

use futures_util::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::{Value, json};
use tokio::sync::{Notify, watch};
use tracing::{info, warn};

use super::api::{self, FIELD_MANAGER};
use super::settings::ControllerSettings;
use super::slim::SlimNode;
use super::while_leading;
use crate::kubernetes::{self, AskError};
use crate::telemetry::ControllerTelemetry;
use decide::{AgentPod, Agents, Verdict};

/// The taint's key. Whatever its value and effect, it means the same.
const TAINT: &str = "undermesh.io/agent-not-ready";
/// Which pods are agents.
const AGENTS: &str = "app.kubernetes.io/name=undermesh,app.kubernetes.io/component=agent";
/// Nodes that are written at one time: a whole cluster may boot at once.
const AT_ONCE: usize = 16;
/// What has failed is tried again after this.
const RETRY: Duration = Duration::from_secs(2);

/// A node that has the taint.
#[derive(Clone, Debug, PartialEq)]
struct Tainted {
    resource_version: String,
    taints: Vec<Value>,
}

/// Takes the taint away wherever it may go, while this replica leads.
pub(super) async fn lead(
    client: &Client,
    settings: &ControllerSettings,
    telemetry: &ControllerTelemetry,
    leader: watch::Receiver<bool>,
) {
    let nodes: Api<SlimNode> = Api::all(client.clone());
    let pods: Api<Pod> = Api::namespaced(client.clone(), &settings.namespace);
    while_leading(leader, async || {
        let tainted = RefCell::new(HashMap::new());
        let agents = RefCell::new(Agents::new(settings.settle));
        let news = Notify::new();
        let follow_nodes = follow_nodes(nodes.clone(), &tainted, &news);
        let follow_agents = follow_agents(pods.clone(), &agents, &news);
        let lift = async {
            loop {
                let pause = lift_all(&nodes, &tainted, &agents, telemetry).await;
                match pause {
                    Some(pause) => _ = tokio::time::timeout(pause, news.notified()).await,
                    None => news.notified().await,
                }
            }
        };
        tokio::join!(follow_nodes, follow_agents, lift);
    })
    .await;
}

async fn follow_nodes(nodes: Api<SlimNode>, tainted: &RefCell<HashMap<String, Tainted>>, news: &Notify) {
    api::follow(nodes, watcher::Config::default(), "nodes", |event| {
        let mut tainted = tainted.borrow_mut();
        match event {
            // Whoever is patched by what was known before is protected by its resource version.
            Event::Init => tainted.clear(),
            Event::InitApply(node) | Event::Apply(node) => {
                let SlimNode { metadata, spec } = node;
                let name = metadata.name.unwrap_or_default();
                match spec.taints.iter().any(is_ours) {
                    true => {
                        let resource_version = metadata.resource_version.unwrap_or_default();
                        tainted.insert(name, Tainted { resource_version, taints: spec.taints });
                    }
                    false => _ = tainted.remove(&name),
                }
            }
            Event::Delete(node) => _ = tainted.remove(&node.metadata.name.unwrap_or_default()),
            Event::InitDone => {}
        }
        if !tainted.is_empty() {
            news.notify_one();
        }
    })
    .await;
}

async fn follow_agents(pods: Api<Pod>, agents: &RefCell<Agents>, news: &Notify) {
    let mut found = HashSet::new();
    api::follow(pods, watcher::Config::default().labels(AGENTS), "agents", |event| {
        let mut agents = agents.borrow_mut();
        let mut apply = |pod: &Pod| {
            let (uid, agent) = AgentPod::read(pod)?;
            agents.apply(&uid, agent, Instant::now(), SystemTime::now());
            Some(uid)
        };
        match event {
            Event::Init => found.clear(),
            Event::InitApply(pod) => found.extend(apply(&pod)),
            Event::InitDone => agents.retain(|uid| found.contains(uid)),
            Event::Apply(pod) => _ = apply(&pod),
            Event::Delete(pod) => agents.remove(pod.metadata.uid.as_deref().unwrap_or_default()),
        }
        news.notify_one();
    })
    .await;
}

/// Takes the taint from every node whose time has come, and says when to look again.
async fn lift_all(
    nodes: &Api<SlimNode>,
    tainted: &RefCell<HashMap<String, Tainted>>,
    agents: &RefCell<Agents>,
    telemetry: &ControllerTelemetry,
) -> Option<Duration> {
    let (mut ready, mut pause) = (Vec::new(), None::<Duration>);
    let mut no_later = |wait: Duration| pause = Some(pause.map_or(wait, |pause| pause.min(wait)));
    for (name, node) in &*tainted.borrow() {
        match agents.borrow().verdict(name, Instant::now()) {
            Verdict::Lift => ready.push((name.clone(), node.clone())),
            Verdict::Wait(wait) => no_later(wait),
            Verdict::Keep => {}
        }
    }
    let attempts = ready.into_iter().map(async |(name, node)| {
        let outcome = lift(nodes, &name, &node).await;
        (name, node, outcome)
    });
    let mut attempts = stream::iter(attempts).buffer_unordered(AT_ONCE);
    while let Some((name, node, outcome)) = attempts.next().await {
        match outcome {
            Ok(()) => {
                info!(node = name, "the agent is ready: the startup taint was removed");
                telemetry.taint_removed();
                let mut tainted = tainted.borrow_mut();
                if tainted.get(&name) == Some(&node) {
                    tainted.remove(&name);
                }
            }
            // The watch brings what the node has become.
            Err(AskError::Overtaken) => no_later(RETRY),
            Err(error) => {
                warn!(node = name, %error, "the startup taint cannot be removed");
                no_later(RETRY);
            }
        }
    }
    pause
}

async fn lift(nodes: &Api<SlimNode>, name: &str, node: &Tainted) -> Result<(), AskError> {
    let options = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    kubernetes::ask(nodes.patch(name, &options, &Patch::Merge(without_taint(node)))).await?;
    Ok(())
}

/// The patch that leaves all other taints, fields included that we do not know. A list is replaced as a whole, so the
/// resource version is a condition: what somebody else has added since is not lost.
fn without_taint(node: &Tainted) -> Value {
    let others: Vec<_> = node.taints.iter().filter(|taint| !is_ours(taint)).collect();
    let taints = if others.is_empty() { Value::Null } else { json!(others) };
    json!({ "metadata": { "resourceVersion": node.resource_version }, "spec": { "taints": taints } })
}

fn is_ours(taint: &Value) -> bool {
    taint["key"] == TAINT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_taint_goes_and_only_from_the_node_as_it_was_read() {
        let ours = |effect: &str| json!({"key": TAINT, "effect": effect});
        let other =
            json!({"key": "other", "effect": "NoSchedule", "timeAdded": "2027-01-15T08:00:00Z", "new": [1]});
        let patch = |taints: Vec<Value>| without_taint(&Tainted { resource_version: "7".into(), taints });
        let expected =
            |taints: Value| json!({"metadata": {"resourceVersion": "7"}, "spec": {"taints": taints}});
        let all = vec![ours("NoSchedule"), other.clone(), ours("NoExecute")];
        assert_eq!(patch(all), expected(json!([other])));
        assert_eq!(patch(vec![ours("NoSchedule")]), expected(Value::Null));
        for odd in [json!({}), json!("x"), json!({"key": 1}), json!(null)] {
            assert!(!is_ours(&odd));
        }
    }
}
