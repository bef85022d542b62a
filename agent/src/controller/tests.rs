//! Against an API server of ours in the same process: who leads, and when taints go.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};

use super::testkit::settings;
use super::*;
use crate::kubernetes::testkit::{FakeApi, failure};

#[tokio::test]
async fn one_of_two_replicas_leads_and_gives_the_lease_back() {
    let kept: Arc<Mutex<Option<Value>>> = Arc::default();
    let lease = kept.clone();
    let api = FakeApi::new(move |question| {
        let mut lease = lease.lock().unwrap();
        assert!(question.path.starts_with("/apis/coordination.k8s.io/v1/namespaces/undermesh-system/leases"));
        let version = lease.as_ref().map(|lease| lease["metadata"]["resourceVersion"].clone());
        let mut body = question.body.clone();
        match (question.method.as_str(), version) {
            ("GET", None) => return failure(404, "NotFound"),
            ("GET", Some(_)) => return Some((200, lease.clone().unwrap())),
            ("POST", Some(_)) => return failure(409, "AlreadyExists"),
            ("PUT", Some(version)) if body["metadata"]["resourceVersion"] != version => {
                return failure(409, "Conflict");
            }
            _ => {}
        }
        body["metadata"]["resourceVersion"] = question_number().to_string().into();
        *lease = Some(body.clone());
        Some((200, body))
    });
    let holder = || kept.lock().unwrap().as_ref().map(|lease| lease["spec"]["holderIdentity"].clone());
    let replica = |name: &str| {
        let (leads, leader) = watch::channel(false);
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let settings = ControllerSettings { pod_name: name.into(), ..settings() };
        let client = api.client();
        let running = tokio::spawn(async move {
            let telemetry = ControllerTelemetry::default();
            election::run(&client, &settings, &telemetry, leads, async { _ = stopped.await }).await;
        });
        (leader, stop, running)
    };
    let (mut a, stop_a, a_ended) = replica("a");
    a.wait_for(|leads| *leads).await.unwrap();
    let (mut b, _stop_b, _b_running) = replica("b");
    assert_eq!(holder(), Some("a".into()));
    assert!(!*b.borrow());
    let begun = std::time::Instant::now();
    drop(stop_a);
    a_ended.await.unwrap();
    assert!(!*a.borrow());
    // It does not wait for the lease to run out.
    b.wait_for(|leads| *leads).await.unwrap();
    assert!(begun.elapsed() < Duration::from_secs(10));
    assert_eq!(holder(), Some("b".into()));
}

fn question_number() -> u64 {
    static NUMBER: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(1);
    NUMBER.fetch_add(1, Ordering::SeqCst)
}

#[tokio::test(start_paused = true)]
async fn work_is_dropped_the_moment_somebody_else_may_lead() {
    let (leads, leader) = watch::channel(false);
    let count = Arc::new(Mutex::new(0));
    let counted = count.clone();
    let work = tokio::spawn(while_leading(leader, async move || {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            *counted.lock().unwrap() += 1;
        }
    }));
    let passes = async |seconds: u64| {
        tokio::time::sleep(Duration::from_millis(seconds * 1_000 + 500)).await;
        *count.lock().unwrap()
    };
    assert_eq!(passes(5).await, 0);
    leads.send_replace(true);
    assert_eq!(passes(5).await, 5);
    leads.send_replace(false);
    assert_eq!(passes(5).await, 5);
    leads.send_replace(true);
    assert_eq!(passes(2).await, 7);
    drop(leads);
    work.await.unwrap();
}

#[tokio::test]
async fn a_taint_goes_from_the_node_as_it_is_and_not_as_it_was() {
    let taint = json!({"key": "undermesh.io/agent-not-ready", "effect": "NoSchedule"});
    let node = move |version: &str, others: &[&str]| {
        let others = others.iter().map(|key| json!({"key": key, "effect": "NoExecute", "value": "v"}));
        let taints: Vec<_> = std::iter::once(taint.clone()).chain(others).collect();
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": "n1", "resourceVersion": version}, "spec": {"taints": taints},
        })
    };
    let agent = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"uid": "a", "name": "a", "namespace": "undermesh-system", "resourceVersion": "2"},
        "spec": {"nodeName": "n1", "containers": []},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    });
    // Lists that are streamed end with a bookmark.
    let end = |kind: &str, version: &str| {
        let annotations = json!({"k8s.io/initial-events-end": "true"});
        let metadata = json!({"resourceVersion": version, "annotations": annotations});
        json!({"type": "BOOKMARK", "object": {"apiVersion": "v1", "kind": kind, "metadata": metadata}})
    };
    let added = |object: Value| json!({"type": "ADDED", "object": object});
    let patched = Arc::new(AtomicBool::new(false));
    let done = patched.clone();
    let api = FakeApi::new(move |question| {
        let is_initial = question.query.contains("sendInitialEvents=true");
        match (question.method.as_str(), question.path.as_str()) {
            ("GET", "/api/v1/nodes") if is_initial => {
                Some((200, json!([added(node("5", &[])), end("Node", "5")])))
            }
            // It changes once we have tried, and then nothing does.
            ("GET", "/api/v1/nodes") if question.query.contains("resourceVersion=5") => {
                Some((200, json!([{"type": "MODIFIED", "object": node("6", &["maintenance"])}])))
            }
            ("GET", "/api/v1/namespaces/undermesh-system/pods") if is_initial => {
                assert!(question.query.contains("labelSelector="), "{}", question.query);
                Some((200, json!([added(agent.clone()), end("Pod", "7")])))
            }
            ("PATCH", "/api/v1/nodes/n1") if question.body["metadata"]["resourceVersion"] != "6" => {
                failure(409, "Conflict")
            }
            ("PATCH", "/api/v1/nodes/n1") => {
                let left = json!([{"key": "maintenance", "effect": "NoExecute", "value": "v"}]);
                assert_eq!(question.body["spec"]["taints"], left);
                done.store(true, Ordering::SeqCst);
                Some((
                    200,
                    json!({"metadata": {"name": "n1", "resourceVersion": "7"}, "spec": {"taints": left}}),
                ))
            }
            ("GET", _) => None,
            other => panic!("{other:?}"),
        }
    });
    let (_leads, leader) = watch::channel(true);
    let settings = ControllerSettings { settle: Duration::from_millis(20), ..settings() };
    let telemetry = Arc::new(ControllerTelemetry::default());
    let client = api.client();
    let lead = taint::lead(&client, &settings, &telemetry, leader);
    let until_patched = async {
        while !patched.load(Ordering::SeqCst) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // Time for a second attempt, which there must not be.
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    tokio::select! {
        () = lead => panic!("it never ends by itself"),
        outcome = tokio::time::timeout(Duration::from_secs(20), until_patched) => outcome.unwrap(),
    }
    let page = telemetry.scrape(crate::telemetry::MetricsFormat::PrometheusText);
    assert!(page.contains("\nundermesh_controller_taints_removed_total 1\n"), "{page}");
}
