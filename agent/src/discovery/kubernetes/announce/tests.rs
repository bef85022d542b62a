//! What is told of pods, when, and what is not told again.

use tokio::time::sleep;

use super::*;
use crate::config::document::EnrolledCondition;
use crate::kubernetes::testkit::{FakeApi, failure};

fn pods() -> (Pods, ObjectRef, WorkloadUid) {
    (Pods::default(), ObjectRef::new("shop", "web"), "uid".into())
}

/// As if the API server had been told.
fn told(pods: &mut Pods) -> Vec<Announcement> {
    let (due, again) = pods.next(Instant::now());
    assert_eq!(again, None);
    for (uid, announcement) in &due {
        let before = pods.has.get(uid).map(|(_, has)| has.clone()).unwrap_or_default();
        let (_, known) = announcement.patch(uid, &before, Timestamp::UNIX_EPOCH);
        pods.has.insert(uid.clone(), (announcement.pod.clone(), known));
    }
    due.into_iter().map(|(_, announcement)| announcement).collect()
}

fn enrolled(message: &str) -> Condition {
    Condition { is_enrolled: true, reason: "Enrolled".into(), message: message.into() }
}

/// What the API server has of the pod.
fn has(pod: &ObjectRef, enrolled: Option<&str>, condition: Option<EnrolledCondition>) -> Told {
    Told { pod: pod.clone(), enrolled: enrolled.map(Into::into), condition, generation: None }
}

#[test]
fn what_the_api_server_has_is_not_told_again() {
    let (mut pods, web, uid) = pods();
    assert!(pods.due().next().is_none());
    pods.want(&uid, &web).enrolled = Some("open".into());
    assert_eq!(told(&mut pods).len(), 1);
    assert!(pods.due().next().is_none());
    // Somebody has taken it away.
    pods.has.get_mut(&uid).unwrap().1.enrolled = None;
    assert_eq!(told(&mut pods)[0].enrolled.as_deref(), Some("open"));
    assert!(pods.due().next().is_none());
}

#[test]
fn what_is_withdrawn_is_told_once_also_of_what_another_agent_has_told() {
    let (mut pods, web, uid) = pods();
    assert!(!pods.withdraw(&uid), "nothing is known of it");
    // By an agent before this one, whose condition nothing is said about.
    let condition =
        EnrolledCondition { is_true: true, reason: "Enrolled".into(), message: "in".into(), since: None };
    let known = Known::read(&has(&web, Some("closed"), Some(condition)));
    pods.has.insert(uid.clone(), (web, known));
    assert!(pods.withdraw(&uid));
    assert_eq!(told(&mut pods)[0].enrolled, None);
    assert!(!pods.withdraw(&uid));
    assert!(pods.due().next().is_none());
}

#[test]
fn a_patch_is_for_one_pod_and_says_all_or_takes_all_back() {
    let (_, web, uid) = pods();
    let announcement = Announcement {
        enrolled: Some("open".into()),
        condition: Some(enrolled("it is in")),
        ..Announcement::nothing(&web)
    };
    let now: Timestamp = "2027-01-15T08:00:00.4Z".parse().unwrap();
    let condition = |time: &str| {
        json!({
            "type": "undermesh.io/enrolled", "status": "True", "reason": "Enrolled", "message": "it is in",
            "lastTransitionTime": time, "lastProbeTime": null,
        })
    };
    let (patch, first) = announcement.patch(&uid, &Known::default(), now);
    let expected = json!({
        "metadata": { "uid": "uid", "annotations": {
            "undermesh.io/enrolled": "open", "ambient.istio.io/redirection": "enabled",
        } },
        "status": { "conditions": [condition("2027-01-15T08:00:00Z")] },
    });
    assert_eq!(patch, expected);
    // The same status an hour later, and with another message; pods have generations by now.
    let later = now + jiff::SignedDuration::from_hours(1);
    let before = Known { condition: Some(enrolled("it was in")), generation: Some(3), ..first.clone() };
    let mut same = condition("2027-01-15T08:00:00Z");
    same["observedGeneration"] = json!(3);
    assert_eq!(announcement.patch(&uid, &before, later).0["status"]["conditions"], json!([same]));
    // Another status.
    let out = Condition { is_enrolled: false, ..enrolled("it was out") };
    let before = Known { condition: Some(out), ..first.clone() };
    let other = condition("2027-01-15T09:00:00Z");
    assert_eq!(announcement.patch(&uid, &before, later).0["status"]["conditions"], json!([other]));

    let (left, after) = Announcement::nothing(&web).patch(&uid, &first, later);
    let expected = json!({ "metadata": { "uid": "uid", "annotations": {
        "undermesh.io/enrolled": null, "ambient.istio.io/redirection": null,
    } } });
    assert_eq!(left, expected);
    assert_eq!((after.enrolled, after.condition), (None, first.condition));
}

/// An API server that takes what is told of pods but of those that are called like this.
fn api(refused: &'static str) -> FakeApi {
    FakeApi::new(move |question| match question.path.contains(refused) {
        true => failure(403, "Forbidden"),
        false => Some((200, json!({ "metadata": { "name": "web", "namespace": "shop" } }))),
    })
}

/// Runs the announcer meanwhile.
async fn meanwhile(announcer: &Announcer, work: impl Future<Output = ()>) {
    tokio::select! {
        never = announcer.clone().run() => match never {},
        () = work => {}
    }
}

/// How often that was asked.
fn asked(api: &FakeApi, method: &str, path: &str) -> usize {
    let asked = api.asked.lock().unwrap();
    asked.iter().filter(|it| it.method == method && it.path.contains(path)).count()
}

/// Thousands of agents are started anew in an update, with all of their pods.
#[tokio::test(start_paused = true)]
async fn an_agent_that_starts_again_tells_nothing_that_is_known() {
    let (_, web, uid) = pods();
    let api = api("none");
    let announcer = Announcer::new(api.client(), "n1".into());
    let since = "2027-01-15T08:00:00Z".parse().ok();
    let condition =
        EnrolledCondition { is_true: true, reason: "Enrolled".into(), message: "it is in".into(), since };
    announcer.observe(&imbl::HashMap::unit(uid.clone(), has(&web, Some("open"), Some(condition))));
    announcer.enrolled(&uid, &web, "open");
    announcer.condition(&uid, &web, enrolled("it is in"));
    meanwhile(&announcer, sleep(Duration::from_secs(600))).await;
    assert_eq!(api.asked.lock().unwrap().len(), 0);
    // Something else is told, without an event where the reason is the same.
    announcer.condition(&uid, &web, enrolled("it is in; its certificate is new"));
    meanwhile(&announcer, sleep(Duration::from_secs(600))).await;
    let asked = std::mem::take(&mut *api.asked.lock().unwrap());
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(asked[0].body["status"]["conditions"][0]["lastTransitionTime"], "2027-01-15T08:00:00Z");
}

/// A policy of the cluster refuses changes of some pods, more than are told of at one time.
#[tokio::test(start_paused = true)]
async fn pods_that_are_refused_hold_up_no_others() {
    let api = api("refused");
    let announcer = Announcer::new(api.client(), "n1".into());
    let pod = |name: &str| (WorkloadUid::from(name), ObjectRef::new("shop", name));
    let all: Vec<_> = (0..3 * AT_ONCE).map(|it| pod(&format!("refused-{it}"))).chain([pod("web")]).collect();
    for (uid, id) in &all {
        announcer.enrolled(uid, id, "open");
        announcer.condition(uid, id, enrolled("it is in"));
    }
    let begin = Instant::now();
    meanwhile(&announcer, announcer.settled(&["web".into()], Duration::from_secs(60))).await;
    assert_eq!((begin.elapsed(), asked(&api, "PATCH", "/web/status")), (Duration::ZERO, 1));
    // Each is left alone for longer and longer: at first, and after about 2, 7, 15 and 32 seconds.
    meanwhile(&announcer, sleep(Duration::from_secs(45))).await;
    assert_eq!(asked(&api, "PATCH", "/refused-7/status"), 5);
    assert_eq!(asked(&api, "PATCH", "/web/status"), 1);
    // What is to be told instead of what was refused does not wait for that.
    announcer.withdraw(&["refused-7".into()]);
    meanwhile(&announcer, sleep(Duration::from_millis(10))).await;
    assert_eq!(asked(&api, "PATCH", "/refused-7/status"), 6);
}
