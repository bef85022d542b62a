//! An agent that begins while the API server does not answer.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::json;

use super::last_known::{Record, save};
use super::*;
use crate::config::Document;
use crate::kubernetes::testkit::{Answer, FakeApi, Question, failure, no_such};

/// An API server without any object.
fn empty(question: &Question) -> Answer {
    let (path, query) = (question.path.as_str(), question.query.as_str());
    let name = path.rsplit('/').next().unwrap_or_default();
    match path {
        "/version" => Some((
            200,
            json!({ "major": "1", "minor": "34", "gitVersion": "v1.34.0", "gitCommit": "", "gitTreeState": "",
            "buildDate": "", "goVersion": "", "compiler": "", "platform": "" }),
        )),
        _ if path.contains("/customresourcedefinitions/") => no_such("customresourcedefinitions", name),
        _ if query.contains("sendInitialEvents") => failure(422, "Invalid"),
        _ if query.contains("watch=true") => None,
        _ if ["namespaces", "services", "pods", "endpointslices", "networkpolicies"].contains(&name) => {
            Some((
                200,
                json!({ "kind": "List", "apiVersion": "v1", "metadata": { "resourceVersion": "7" }, "items": [] }),
            ))
        }
        _ => failure(404, "NotFound"),
    }
}

fn records() -> Vec<Record> {
    let shop = json!({ "metadata": { "name": "shop", "labels": { "undermesh.io/mesh": "enabled" } } });
    let pod = |name: &str, node: &str| {
        let pod = json!({
            "metadata": { "name": name, "namespace": "shop", "uid": name },
            "spec": { "nodeName": node, "containers": [], "serviceAccountName": name },
            "status": { "phase": "Running", "podIPs": [{ "ip": "10.0.0.5" }] },
        });
        Document::pod(&serde_json::from_value(pod).unwrap(), &mut Vec::new()).unwrap()
    };
    let shop = Document::namespace(&serde_json::from_value(shop).unwrap(), &mut Vec::new()).unwrap();
    [shop, pod("web", "n1"), pod("db", "n2")].into_iter().filter_map(Record::of).collect()
}

/// It begins with what was known last, once there are certificates, and lets go of it when the API server is back; which is then written.
#[tokio::test(start_paused = true)]
async fn an_agent_begins_with_what_was_known_last() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last-known");
    let node = NodeInfo { name: "n1".into(), zone: None };
    save(&path, &node, &records()).unwrap();
    let is_back = Arc::new(AtomicBool::new(false));
    let back = is_back.clone();
    let api = FakeApi::new(move |question| match back.load(Ordering::SeqCst) {
        true => empty(question),
        false => failure(503, "ServiceUnavailable"),
    });
    let (_tell, sightings) = sightings();
    let since = Instant::now();
    let trust_domain = Some("cluster.local".parse().unwrap());
    let cluster = Cluster {
        client: api.client(),
        node: node.clone(),
        defaults: Defaults { trust_domain, ..Defaults::default() },
        sightings,
        last_known: Some(path.clone()),
        since,
        has_answered: false,
    };
    let published = Mutex::new(Vec::new());
    let publish = |news: ClusterNews| {
        let pods = news.publication.snapshot.workloads.len();
        published.lock().unwrap().push((since.elapsed().as_secs(), news.as_of.is_some(), pods));
    };
    let certificates = async |ids: BTreeSet<SpiffeId>| {
        let ids: Vec<_> = ids.iter().map(ToString::to_string).collect();
        assert_eq!(ids, ["spiffe://cluster.local/ns/shop/sa/web"], "those of this node's pods");
        sleep(Duration::from_secs(55)).await;
    };
    let comes_back = async {
        sleep(Duration::from_secs(100)).await;
        is_back.store(true, Ordering::SeqCst);
        std::future::pending::<()>().await;
    };
    let followed = cluster.follow(publish, Arc::new(|_| ()), certificates);
    let both = async { tokio::join!(followed, comes_back).0 };
    assert!(timeout(Duration::from_secs(400), both).await.is_err(), "it goes on");
    let published = published.into_inner().unwrap();
    assert_eq!(published[0], (60, true, 2));
    let (_, is_recalled, pods) = *published.last().unwrap();
    assert_eq!((is_recalled, pods), (false, 0), "{published:?}");
    assert!(published[1..].iter().all(|(at, ..)| *at >= 100), "{published:?}");
    assert!(last_known::load(&path, &node.name).unwrap().records.is_empty(), "what it says now is written");
}

/// An API server that answers is waited for, however long its lists are.
#[tokio::test(start_paused = true)]
async fn what_the_api_server_says_is_what_counts() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last-known");
    let node = NodeInfo { name: "n1".into(), zone: None };
    save(&path, &node, &records()).unwrap();
    let api = FakeApi::new(empty);
    let (_tell, sightings) = sightings();
    let (client, defaults, since) = (api.client(), Defaults::default(), Instant::now());
    let cluster =
        Cluster { client, node, defaults, sightings, last_known: Some(path), since, has_answered: true };
    let published = Mutex::new(Vec::new());
    let publish = |news: ClusterNews| {
        published.lock().unwrap().push((news.as_of, news.publication.snapshot.workloads.len()))
    };
    let followed = cluster.follow(publish, Arc::new(|_| ()), async |_| ());
    assert!(timeout(Duration::from_secs(60), followed).await.is_err());
    assert_eq!(published.into_inner().unwrap(), [(None, 0)]);
    // Of pods those that are not over, each time.
    let asked = api.asked.lock().unwrap();
    let of_pods: Vec<_> = asked.iter().filter(|question| question.path == "/api/v1/pods").collect();
    let selected = "fieldSelector=status.phase%21%3DSucceeded%2Cstatus.phase%21%3DFailed";
    assert!(!of_pods.is_empty() && of_pods.iter().all(|it| it.query.contains(selected)), "{of_pods:?}");
}

/// Without certificates nothing of it is in force; and when the API server is back nobody waits for them any more.
#[tokio::test(start_paused = true)]
async fn without_certificates_the_api_server_is_waited_for() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("last-known");
    let node = NodeInfo { name: "n1".into(), zone: None };
    save(&path, &node, &records()).unwrap();
    let since = Instant::now();
    let api = FakeApi::new(move |question| match since.elapsed() > Duration::from_secs(60) {
        true => empty(question),
        false => failure(503, "ServiceUnavailable"),
    });
    let (_tell, sightings) = sightings();
    let (client, defaults, last_known) = (api.client(), Defaults::default(), Some(path));
    let cluster = Cluster { client, node, defaults, sightings, last_known, since, has_answered: false };
    let published = Mutex::new(Vec::new());
    let publish = |news: ClusterNews| {
        let pods = news.publication.snapshot.workloads.len();
        published.lock().unwrap().push((news.as_of.is_some(), pods));
    };
    let waits = Arc::new(());
    let waiting = waits.clone();
    let certify = async move |_| {
        let _waiting = waiting;
        std::future::pending::<()>().await;
    };
    let look = async {
        sleep(Duration::from_secs(50)).await;
        assert_eq!((Arc::strong_count(&waits), published.lock().unwrap().len()), (2, 0));
        sleep(Duration::from_secs(150)).await;
        assert_eq!((Arc::strong_count(&waits), &**published.lock().unwrap()), (1, &[(false, 0)][..]));
    };
    tokio::select! {
        ended = cluster.follow(publish, Arc::new(|_| ()), certify) => panic!("{ended:?}"),
        () = look => {}
    }
}
