//! Replicas and one Secret: who makes it, who follows, and what becomes of it.

use std::sync::atomic::{AtomicU64, Ordering};

use super::super::testkit::settings;
use super::*;
use crate::kubernetes::testkit::{Answer, FakeApi, Question, failure};

/// An API server that keeps one Secret, and knows versions.
#[derive(Clone, Default)]
struct Kept(Arc<Mutex<Option<Value>>>);

impl Kept {
    fn api(&self) -> FakeApi {
        let kept = self.clone();
        FakeApi::new(move |question| kept.answer(question))
    }

    fn answer(&self, question: &Question) -> Answer {
        let mut kept = self.0.lock().unwrap();
        match question.method.as_str() {
            "POST" if kept.is_some() => return failure(409, "AlreadyExists"),
            "POST" => {
                let mut secret = question.body.clone();
                assert_eq!(
                    (&secret["type"], &secret["metadata"]["name"]),
                    (&"Opaque".into(), &"undermesh-root".into())
                );
                secret["metadata"]["resourceVersion"] = "1".into();
                *kept = Some(secret);
            }
            "PATCH" => {
                let Some(secret) = kept.as_mut() else { return failure(404, "NotFound") };
                let version = &secret["metadata"]["resourceVersion"];
                if question.body["metadata"]["resourceVersion"] != *version {
                    return failure(409, "Conflict");
                }
                let next = version.as_str().unwrap().parse::<u64>().unwrap() + 1;
                merge(secret, &question.body);
                secret["metadata"]["resourceVersion"] = next.to_string().into();
            }
            other => panic!("{other} {}", question.path),
        }
        Some((200, kept.clone().unwrap()))
    }

    fn edit(&self, patch: Value) {
        let mut kept = self.0.lock().unwrap();
        let secret = kept.as_mut().unwrap();
        merge(secret, &patch);
        let next = secret["metadata"]["resourceVersion"].as_str().unwrap().parse::<u64>().unwrap() + 1;
        secret["metadata"]["resourceVersion"] = next.to_string().into();
    }
}

/// RFC 7396.
fn merge(target: &mut Value, patch: &Value) {
    let Value::Object(patch) = patch else {
        *target = patch.clone();
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        match value {
            Value::Null => _ = target.as_object_mut().unwrap().remove(key),
            value => merge(&mut target[key], value),
        }
    }
}

/// One replica, and what its watch would bring it.
struct Replica {
    root: Root,
    secrets: Api<Secret>,
    kept: Kept,
}

impl Replica {
    fn new(kept: &Kept, seconds: &Arc<AtomicU64>) -> Self {
        let seconds = seconds.clone();
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Clock::of(move || start + Duration::from_secs(seconds.load(Ordering::SeqCst)));
        let root = Root::new(Arc::new(settings()), clock, Arc::default());
        let secrets = Api::namespaced(kept.api().client(), "undermesh-system");
        let replica = Self { root, secrets, kept: kept.clone() };
        replica.look();
        replica
    }

    fn look(&self) {
        match &*self.kept.0.lock().unwrap() {
            Some(secret) => self.root.take(serde_json::from_value(secret.clone()).unwrap()),
            None => self.root.lost(),
        }
    }

    async fn lead(&self) -> Result<(), AskError> {
        self.root.carry_out(&self.secrets).await
    }

    fn bundle(&self) -> String {
        let (keyring, now) = self.root.current();
        keyring.map(|keyring| keyring.bundle(now)).unwrap_or_default()
    }

    fn roots(&self) -> usize {
        self.bundle().matches("BEGIN").count()
    }
}

#[tokio::test]
async fn of_two_replicas_one_makes_the_root_and_both_have_it() {
    let (kept, seconds) = (Kept::default(), Arc::default());
    let (a, b) = (Replica::new(&kept, &seconds), Replica::new(&kept, &seconds));
    assert_eq!(a.root.missing().unwrap(), "the leader has not made the Secret undermesh-root yet");
    assert_eq!(a.lead().await, Ok(()));
    assert_eq!(b.lead().await, Err(AskError::Overtaken), "b has not heard of it yet");
    a.look();
    b.look();
    assert_eq!((a.roots(), a.bundle() == b.bundle(), a.root.missing()), (1, true, None));

    // Somebody deletes it: it comes back, the same.
    let before = a.bundle();
    *kept.0.lock().unwrap() = None;
    a.look();
    assert_eq!(a.bundle(), before);
    assert_eq!(a.lead().await, Ok(()));
    assert_eq!(Replica::new(&kept, &seconds).bundle(), before);
}

#[tokio::test]
async fn a_rotation_survives_a_change_of_the_leader() {
    let (kept, seconds) = (Kept::default(), Arc::<AtomicU64>::default());
    let a = Replica::new(&kept, &seconds);
    a.lead().await.unwrap();
    kept.edit(json!({"metadata": {"annotations": {"undermesh.io/rotate": "one", "mine": "stays"}}}));
    assert_eq!(a.roots(), 0);
    a.look();
    // What a has seen is not what is there.
    kept.edit(json!({"metadata": {"annotations": {"other": "x"}}}));
    assert_eq!(a.lead().await, Err(AskError::Overtaken));
    a.look();
    a.lead().await.unwrap();
    a.look();
    assert_eq!(a.roots(), 2);
    let annotations = kept.0.lock().unwrap().as_ref().unwrap()["metadata"]["annotations"].clone();
    let expected =
        json!({"undermesh.io/rotate": "one", "undermesh.io/rotated": "one", "mine": "stays", "other": "x"});
    assert_eq!(annotations, expected);

    // Another one leads, and has nothing to do but to see it through.
    let b = Replica::new(&kept, &seconds);
    let version = || kept.0.lock().unwrap().as_ref().unwrap()["metadata"]["resourceVersion"].clone();
    let before = version();
    b.lead().await.unwrap();
    assert_eq!((version(), b.roots()), (before, 2));
    let issuer = |replica: &Replica| {
        let (keyring, now) = replica.root.current();
        keyring.unwrap().issuer(now).cloned()
    };
    let old = issuer(&b);
    seconds.store(3_600, Ordering::SeqCst);
    assert!(issuer(&b) != old && issuer(&a) == issuer(&b));
    seconds.store(3_600 + 3_600 + 600, Ordering::SeqCst);
    assert_eq!(b.roots(), 1);
    b.lead().await.unwrap();
    let names = |kept: &Kept| {
        let secret = kept.0.lock().unwrap().clone().unwrap();
        secret["data"].as_object().unwrap().keys().cloned().collect::<Vec<_>>().join(" ")
    };
    assert_eq!(names(&kept), "root-2.key.pem root-2.pem state.json");
}

#[tokio::test]
async fn what_is_broken_or_old_does_not_come_into_force() {
    let (kept, seconds) = (Kept::default(), Arc::default());
    let a = Replica::new(&kept, &seconds);
    a.lead().await.unwrap();
    a.look();
    let backup = kept.0.lock().unwrap().clone().unwrap();
    kept.edit(json!({"metadata": {"annotations": {"undermesh.io/rotate": "one"}}}));
    a.look();
    a.lead().await.unwrap();
    a.look();
    let before = a.bundle();
    assert_eq!(a.roots(), 2);

    // etcd comes back from a backup.
    *kept.0.lock().unwrap() = Some(backup);
    a.look();
    assert_eq!(a.bundle(), before);
    a.lead().await.unwrap();
    a.look();
    assert_eq!((a.bundle(), Replica::new(&kept, &seconds).bundle()), (before.clone(), before.clone()));

    // An editor slips. The leader leaves it alone: all that is left may be in it.
    kept.edit(json!({"data": {"state.json": "e30="}}));
    let broken = kept.0.lock().unwrap().clone();
    a.look();
    assert_eq!((a.bundle(), a.root.missing()), (before, None));
    a.lead().await.unwrap();
    assert_eq!(*kept.0.lock().unwrap(), broken);
    let late = Replica::new(&kept, &seconds);
    assert_eq!(
        late.root.missing().unwrap(),
        "the Secret undermesh-root holds no root: `state.json`: not the state of a certificate authority: \
         missing field `version` at line 1 column 2"
    );
}
