//! What the tests of this module share: pods, settings, and an API server in the same process.

use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::Duration;

use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tonic::codegen::{BoxFuture, Service};

use super::settings::{ControllerSettings, RootSettings, ServiceAccount};
use super::slim::SlimPod;

/// A running pod: its UID, its node and its service account.
pub(super) fn pod(uid: &str, node: &str, account: &str) -> SlimPod {
    with_phase(uid, node, account, "Running")
}

/// The same when it is over.
pub(super) fn finished(uid: &str, node: &str, account: &str) -> SlimPod {
    with_phase(uid, node, account, "Succeeded")
}

fn with_phase(uid: &str, node: &str, account: &str, phase: &str) -> SlimPod {
    let account: ServiceAccount = account.parse().unwrap();
    let pod = json!({
        "metadata": {"uid": uid, "name": format!("pod-{uid}"), "namespace": account.namespace},
        "spec": {"nodeName": node, "serviceAccountName": account.name, "containers": [{"image": "x"}]},
        "status": {"phase": phase, "hostIP": "10.0.0.1"},
    });
    serde_json::from_value(pod).unwrap()
}

pub(super) fn settings() -> ControllerSettings {
    ControllerSettings {
        namespace: "undermesh-system".into(),
        pod_name: "controller-0".into(),
        ca_listen: "127.0.0.1:0".parse().unwrap(),
        ca_names: vec!["ca.test".into()],
        admin_address: "127.0.0.1:0".parse().unwrap(),
        certificate_lifetime: Duration::from_secs(3_600),
        root: RootSettings {
            trust_domain: "cluster.local".parse().unwrap(),
            secret: "undermesh-root".into(),
            life: Duration::from_secs(100 * 86_400),
            overlap: Duration::from_secs(3_600),
        },
        bundle_config_map: "undermesh-root-bundle".into(),
        token_audience: "undermesh.io".into(),
        agent: "undermesh-system/undermesh-agent".parse().unwrap(),
        settle: Duration::from_secs(3),
    }
}

/// A question to the API server.
#[derive(Clone, Debug)]
pub(super) struct Question {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) body: Value,
}

/// What it answers: a status code and a body, in lines where it is a list; none: it never answers.
pub(super) type Answer = Option<(u16, Value)>;

type Answers = dyn Fn(&Question) -> Answer + Send + Sync;

/// An API server that does what a test says.
#[derive(Clone)]
pub(super) struct FakeApi {
    answers: Arc<Answers>,
    /// What it was asked.
    pub(super) asked: Arc<Mutex<Vec<Question>>>,
}

impl FakeApi {
    pub(super) fn new(answers: impl Fn(&Question) -> Answer + Send + Sync + 'static) -> Self {
        Self { answers: Arc::new(answers), asked: Arc::default() }
    }

    pub(super) fn client(&self) -> Client {
        Client::new(self.clone(), "default")
    }
}

impl Service<http::Request<Body>> for FakeApi {
    type Response = http::Response<Body>;
    type Error = std::io::Error;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let this = self.clone();
        Box::pin(async move {
            let (head, body) = request.into_parts();
            let body = body.collect_bytes().await.unwrap_or_default();
            let question = Question {
                method: head.method.to_string(),
                path: head.uri.path().to_owned(),
                query: head.uri.query().unwrap_or_default().to_owned(),
                body: serde_json::from_slice(&body).unwrap_or_default(),
            };
            this.asked.lock().unwrap().push(question.clone());
            match (this.answers)(&question) {
                Some((status, body)) => {
                    let body = match &body {
                        Value::Array(lines) => lines.iter().map(|line| format!("{line}\n")).collect(),
                        one => one.to_string(),
                    };
                    let body = Body::from(body.into_bytes());
                    Ok(http::Response::builder().status(status).body(body).unwrap())
                }
                None => std::future::pending().await,
            }
        })
    }
}

/// What an API server says to what it does not want.
pub(super) fn failure(code: u16, reason: &str) -> Answer {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
        "message": format!("{reason}, says the API server"), "reason": reason, "code": code,
    });
    Some((code, status))
}
