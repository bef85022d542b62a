//! Whose token it is while the API server cannot be asked: by the keys of whoever makes the cluster's service account tokens, which
//! are fetched ahead.
//!
//! A token is held against its signature, issuer, audience and times, and the pod that it is bound to must be known. What only an API
//! server could know beside that, it is not asked for: that the token has been withdrawn since, or its pod taken away.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwapOption;
use kube::Client;
use serde::Deserialize;
use serde_json::{Map, Value};
use tokio::time::{Instant, sleep};
use tracing::{debug, info, warn};

use super::super::pods::{Account, Index};
use super::caller::{Caller, account_of};
use crate::kubernetes;
use crate::policy::jwt::{Issuer, KeySet, Keys};
use crate::telemetry::ControllerTelemetry;

/// Between two fetches, and after one that has failed.
const EVERY: Duration = Duration::from_secs(5 * 60);
const AGAIN: Duration = Duration::from_secs(15);

/// How long keys are used that could not be fetched anew. Tokens live for an hour, and nobody can renew them without an API server.
const USABLE: Duration = Duration::from_secs(24 * 60 * 60);

/// By how many seconds clocks may be apart, as API servers have it.
const LEEWAY: u64 = 60;

/// The keys, once they are there.
pub(super) struct TokenKeys {
    client: Client,
    audience: String,
    telemetry: Arc<ControllerTelemetry>,
    held: ArcSwapOption<Held>,
}

/// Who makes tokens, and how they are signed.
struct Held {
    issuer: Issuer,
    keys: Arc<KeySet>,
    told_at: Instant,
}

impl TokenKeys {
    pub(super) fn new(client: Client, audience: String, telemetry: Arc<ControllerTelemetry>) -> Self {
        Self { client, audience, telemetry, held: ArcSwapOption::empty() }
    }

    /// Fetches the keys time and again, for as long as it is polled.
    pub(super) async fn keep_fresh(&self) {
        let mut has_failed = false;
        loop {
            let pause = match self.fetch().await {
                Ok(()) => {
                    has_failed = false;
                    EVERY
                }
                Err(why) => {
                    match std::mem::replace(&mut has_failed, true) {
                        false => warn!("the keys of service account tokens cannot be fetched: {why}"),
                        true => debug!("the keys of service account tokens cannot be fetched: {why}"),
                    }
                    AGAIN
                }
            };
            sleep(pause.mul_f64(0.9 + fastrand::f64() / 5.0)).await;
        }
    }

    pub(super) async fn fetch(&self) -> Result<(), String> {
        /// OpenID Connect Discovery 1.0, of which one fact is needed: where the keys are is Kubernetes' own path, and no other is taken.
        #[derive(Deserialize)]
        struct Discovery {
            issuer: String,
        }
        let discovery = self.page("/.well-known/openid-configuration").await?;
        let Discovery { issuer } = serde_json::from_str(&discovery)
            .map_err(|error| format!("its discovery document is none: {error}"))?;
        let keys = KeySet::parse(self.page("/openid/v1/jwks").await?.as_bytes());
        let keys = Arc::new(keys.map_err(|error| format!("its keys are {error}"))?);
        let before = self.held.load();
        if before.as_ref().is_none_or(|before| *before.keys != *keys || *before.issuer.name != *issuer) {
            info!(issuer, "the keys of service account tokens are fetched");
        }
        let issuer = Issuer {
            name: issuer.into(),
            audiences: vec![self.audience.as_str().into()],
            keys: Keys::Given(keys.clone()),
            places: Vec::new(),
            forward: false,
            headers: Vec::new(),
        };
        self.held.store(Some(Arc::new(Held { issuer, keys, told_at: Instant::now() })));
        self.telemetry.set_token_keys(SystemTime::now());
        Ok(())
    }

    async fn page(&self, path: &str) -> Result<String, String> {
        let request = http::Request::get(path).body(Vec::new()).map_err(|error| error.to_string())?;
        kubernetes::ask(self.client.request_text(request)).await.map_err(|error| error.to_string())
    }

    /// Whose token it is, or why that cannot be said.
    pub(super) fn caller(&self, token: &str, pods: &Index, now: SystemTime) -> Result<Caller, String> {
        let held = self.held.load();
        let held = held.as_ref().filter(|held| held.told_at.elapsed() < USABLE);
        let held = held.ok_or("the keys of its issuer are not known")?;
        let now = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let claims = held.issuer.check(token, &held.keys, LEEWAY, now).map_err(|why| why.to_string())?;
        bound(&claims, pods)
    }
}

/// Whom the token of a pod speaks for. The pod must be known, as the one that the token says it is.
fn bound(claims: &Map<String, Value>, pods: &Index) -> Result<Caller, String> {
    let subject = claims.get("sub").and_then(Value::as_str).unwrap_or_default();
    let account = account_of(subject).ok_or_else(|| format!("{subject:?} is no service account"))?;
    let own = claims.get("kubernetes.io");
    let uid = own.and_then(|own| own.pointer("/pod/uid")).and_then(Value::as_str);
    let uid = uid.ok_or("the token is bound to no pod")?;
    let place =
        pods.place(uid).ok_or_else(|| format!("the pod that the token is bound to, {uid}, is not known"))?;
    if place.account != Account::new(&account.namespace, &account.name) {
        return Err(format!("the pod that the token is bound to, {uid}, is of another service account"));
    }
    let node = own.and_then(|own| own.pointer("/node/name"));
    if node.is_some_and(|node| node.as_str() != Some(&*place.node)) {
        return Err(format!("the pod that the token is bound to, {uid}, is on another node"));
    }
    Ok(Caller { account, node: Some(place.node.to_string()), pod_uid: Some(uid.to_owned()) })
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use expect_test::expect;
    use serde_json::json;
    use undermesh_tests::issuer::{SigningKey, key_set};

    use super::super::super::testkit::pod;
    use super::*;
    use crate::kubernetes::testkit::{FakeApi, failure};

    const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
    const NOW: u64 = 1_800_000_000;

    fn claims() -> Value {
        json!({
            "iss": ISSUER, "aud": ["undermesh.io"], "sub": "system:serviceaccount:undermesh-system:undermesh-agent",
            "iat": NOW - 60, "nbf": NOW - 60, "exp": NOW + 3_540,
            "kubernetes.io": {
                "namespace": "undermesh-system", "node": { "name": "n1", "uid": "x" },
                "pod": { "name": "agent", "uid": "a1" }, "serviceaccount": { "name": "undermesh-agent", "uid": "y" },
            },
        })
    }

    async fn keys(published: String) -> TokenKeys {
        let api = FakeApi::new(move |question| match question.path.as_str() {
            "/.well-known/openid-configuration" => {
                Some((200, json!({ "issuer": ISSUER, "jwks_uri": "https://192.0.2.1/openid/v1/jwks" })))
            }
            "/openid/v1/jwks" => Some((200, published.clone().into())),
            _ => failure(404, "NotFound"),
        });
        let keys = TokenKeys::new(api.client(), "undermesh.io".into(), Arc::default());
        assert_eq!(keys.fetch().await, Ok(()));
        keys
    }

    #[tokio::test]
    async fn a_token_is_its_pods_if_all_of_it_holds() {
        let (ours, other) = (SigningKey::new("a", "RS256").unwrap(), SigningKey::new("a", "RS256").unwrap());
        let keys = keys(key_set([&ours])).await;
        let agent = "undermesh-system/undermesh-agent";
        let pods = Index::of(&[pod("a1", "n1", agent), pod("a2", "n2", agent), pod("w1", "n1", "shop/web")]);
        let told = Mutex::new(String::new());
        let check = |key: &SigningKey, change: &dyn Fn(&mut Value)| {
            let mut claims = claims();
            change(&mut claims);
            let token = key.token(&claims).unwrap();
            let line = match keys.caller(&token, &pods, UNIX_EPOCH + Duration::from_secs(NOW)) {
                Ok(caller) => format!("{} {:?} {:?}\n", caller.account, caller.node, caller.pod_uid),
                Err(why) => format!("{why}\n"),
            };
            told.lock().unwrap().push_str(&line);
        };
        let own = "kubernetes.io";
        check(&ours, &|_| ());
        check(&ours, &|it| _ = it[own].as_object_mut().unwrap().remove("node"));
        check(&other, &|_| ());
        check(&ours, &|it| it["iss"] = "https://elsewhere.test".into());
        check(&ours, &|it| it["aud"] = json!(["https://kubernetes.default.svc"]));
        check(&ours, &|it| _ = it.as_object_mut().unwrap().remove("aud"));
        check(&ours, &|it| it["exp"] = (NOW - 61).into());
        check(&ours, &|it| _ = it.as_object_mut().unwrap().remove("exp"));
        check(&ours, &|it| it["nbf"] = (NOW + 61).into());
        check(&ours, &|it| it["sub"] = "system:node:n1".into());
        check(&ours, &|it| _ = it[own].as_object_mut().unwrap().remove("pod"));
        check(&ours, &|it| it[own]["pod"]["uid"] = "a9".into());
        check(&ours, &|it| it[own]["pod"]["uid"] = "w1".into());
        check(&ours, &|it| it[own]["pod"]["uid"] = "a2".into());
        check(&ours, &|it| it[own]["node"]["name"] = Value::Null);
        expect![[r#"
            undermesh-system/undermesh-agent Some("n1") Some("a1")
            undermesh-system/undermesh-agent Some("n1") Some("a1")
            the token's signature is not that of the key that it names
            the token's issuer is none that is believed
            the token is not for this audience
            the token is not for this audience
            the token has expired
            the token has no "exp"
            the token does not hold yet
            "system:node:n1" is no service account
            the token is bound to no pod
            the pod that the token is bound to, a9, is not known
            the pod that the token is bound to, w1, is of another service account
            the pod that the token is bound to, a2, is on another node
            the pod that the token is bound to, a1, is on another node
        "#]]
        .assert_eq(&told.lock().unwrap());
    }

    #[tokio::test(start_paused = true)]
    async fn keys_are_used_for_a_day() {
        let ours = SigningKey::new("a", "RS256").unwrap();
        let keys = keys(key_set([&ours])).await;
        let pods = Index::of(&[pod("a1", "n1", "undermesh-system/undermesh-agent")]);
        let token = ours.token(&claims()).unwrap();
        let holds = || keys.caller(&token, &pods, UNIX_EPOCH + Duration::from_secs(NOW)).is_ok();
        assert!(holds());
        tokio::time::advance(USABLE - Duration::from_secs(1)).await;
        assert!(holds());
        tokio::time::advance(Duration::from_secs(1)).await;
        assert!(!holds());
    }
}
