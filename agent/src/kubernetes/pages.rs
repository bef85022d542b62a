//! Pages that pods serve, as the API server passes them on to whoever may ask it for them.
//!
//! Which pods these are is the caller's to say, and what is on the pages too.

use std::time::Duration;

use k8s_openapi::api::core::v1::Pod;
use kube::api::ListParams;
use kube::{Api, Client};
use tokio::time::timeout;

use super::{AskError, ask, client, told};
use crate::sentence::in_one_sentence;

/// For a whole page, which may be long.
const PATIENCE: Duration = Duration::from_secs(30);

/// The pods of a namespace that serve pages.
pub(crate) struct Servers {
    client: Client,
    namespace: String,
    /// The pods, in the order of their nodes.
    pub(crate) all: Vec<Server>,
}

/// A pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Server {
    /// Its name.
    pub(crate) pod: String,
    /// Its node.
    pub(crate) node: String,
    /// The port of its pages, else why there are none.
    pub(crate) port: Result<u16, String>,
}

impl Servers {
    /// Those with the labels (`name=value,...`). Their pages are on the port of this name.
    ///
    /// # Errors
    /// When the API server cannot be asked, in a sentence.
    pub(crate) async fn find(namespace: &str, labels: &str, port: &str) -> Result<Self, String> {
        let client = client().await.map_err(|error| in_one_sentence(&error))?;
        Self::with(client, namespace, labels, port).await
    }

    async fn with(client: Client, namespace: &str, labels: &str, port: &str) -> Result<Self, String> {
        let pods: Api<Pod> = Api::namespaced(client.clone(), namespace);
        let listed = ask(pods.list(&ListParams::default().labels(labels))).await;
        let listed =
            listed.map_err(|error: AskError| format!("cannot list the pods of {namespace}: {error}"))?;
        let mut all: Vec<_> = listed.items.iter().filter_map(|pod| server(pod, port)).collect();
        all.sort_by(|a, b| (&a.node, &a.pod).cmp(&(&b.node, &b.pod)));
        Ok(Self { client, namespace: namespace.to_owned(), all })
    }

    /// A page of one of them.
    ///
    /// # Errors
    /// When it cannot be had, in a sentence.
    pub(crate) async fn page(&self, server: &Server, path: &str) -> Result<String, String> {
        let Server { pod, port, .. } = server;
        let port = port.as_ref().map_err(Clone::clone)?;
        let uri = format!("/api/v1/namespaces/{}/pods/{pod}:{port}/proxy{path}", self.namespace);
        let request = http::Request::get(uri).body(Vec::new()).map_err(|error| error.to_string())?;
        match timeout(PATIENCE, self.client.request_text(request)).await {
            Ok(answer) => answer.map_err(|error| told(&error)),
            Err(_) => Err(format!("no answer within {} s", PATIENCE.as_secs())),
        }
    }
}

/// None for one that is on its way out: there is another one in its place, or none is wanted.
fn server(pod: &Pod, port_name: &str) -> Option<Server> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let spec = pod.spec.as_ref();
    let ports = spec.into_iter().flat_map(|spec| &spec.containers).flat_map(|it| it.ports.iter().flatten());
    let port = ports.into_iter().find(|port| port.name.as_deref() == Some(port_name));
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or("Unknown");
    let port = match port.map(|port| u16::try_from(port.container_port)) {
        _ if phase != "Running" => Err(format!("it is {phase}")),
        Some(Ok(port)) => Ok(port),
        _ => Err(format!("it has no port that is called {port_name}")),
    };
    Some(Server {
        pod: pod.metadata.name.clone()?,
        node: spec.and_then(|spec| spec.node_name.clone()).unwrap_or_else(|| "no node yet".into()),
        port,
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::kubernetes::testkit::{FakeApi, failure};

    fn pod(name: &str, node: &str, phase: &str, leaves: bool) -> Value {
        json!({
            "metadata": { "name": name, "deletionTimestamp": leaves.then_some("2027-01-15T08:00:00Z") },
            "spec": { "nodeName": node, "containers": [
                { "name": "agent", "ports": [{ "name": "admin", "containerPort": 15020 }] }
            ] },
            "status": { "phase": phase },
        })
    }

    #[tokio::test]
    async fn pages_come_by_the_api_server_and_who_cannot_be_asked_is_named() {
        let api = FakeApi::new(|question| match question.path.as_str() {
            "/api/v1/namespaces/mesh/pods" => Some((
                200,
                json!({ "kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": [
                    pod("agent-c", "n3", "Running", false), pod("agent-a", "n1", "Running", false),
                    pod("agent-b", "n2", "Pending", false), pod("agent-old", "n1", "Running", true),
                ] }),
            )),
            "/api/v1/namespaces/mesh/pods/agent-a:15020/proxy/debug/status" => {
                Some((200, json!("{\"node\":\"n1\"}")))
            }
            _ => failure(403, "Forbidden"),
        });
        let servers = Servers::with(api.client(), "mesh", "app=agent", "admin").await.unwrap();
        let mut told = Vec::new();
        for server in &servers.all {
            let page = servers.page(server, "/debug/status?x=1").await;
            told.push(format!("{} {}: {page:?}", server.node, server.pod));
        }
        expect_test::expect![[r#"
            [
                "n1 agent-a: Ok(\"{\\\"node\\\":\\\"n1\\\"}\")",
                "n2 agent-b: Err(\"it is Pending\")",
                "n3 agent-c: Err(\"Forbidden, says the API server\")",
            ]
        "#]]
        .assert_debug_eq(&told);
        let asked = api.asked.lock().unwrap();
        assert!(asked[0].query.contains("labelSelector=app%3Dagent"), "{:?}", asked[0]);
        assert_eq!(asked[1].query, "x=1");
    }

    #[tokio::test]
    async fn who_may_not_list_pods_is_told() {
        let api = FakeApi::new(|_| failure(403, "Forbidden"));
        let why = Servers::with(api.client(), "mesh", "app=agent", "admin").await.err();
        assert_eq!(why.as_deref(), Some("cannot list the pods of mesh: Forbidden, says the API server"));
    }
}
