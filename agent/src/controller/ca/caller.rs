//! Whose token it is: asked of the API server each time, for a token may be withdrawn at any moment. While it cannot be asked, and only
//! then, the token is held against the keys of its issuer.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use k8s_openapi::api::authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus};
use kube::api::PostParams;
use kube::{Api, Client};
use tracing::{info, warn};
use zeroize::Zeroize as _;

use super::super::pods::Pods;
use super::super::settings::ServiceAccount;
use super::keys::TokenKeys;
use super::refusal::Refusal;
use crate::kubernetes::{self, AskError};
use crate::telemetry::{ControllerTelemetry, DenyReason, ReviewResult};

const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// A bound token has less than 2 KiB.
const LONGEST_TOKEN: usize = 16 * 1024;

/// Somebody whom the API server has authenticated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) account: ServiceAccount,
    /// The node of the pod that the token is bound to, where the API server tells.
    pub(super) node: Option<String>,
    /// The UID of that pod.
    pub(super) pod_uid: Option<String>,
}

/// Asks the API server about tokens.
pub(super) struct TokenReviews {
    api: Api<TokenReview>,
    audience: String,
    /// For as long as it does not answer.
    pub(super) keys: TokenKeys,
    pods: Arc<Pods>,
    is_away: AtomicBool,
    telemetry: Arc<ControllerTelemetry>,
}

impl TokenReviews {
    pub(super) fn new(
        client: Client,
        audience: String,
        pods: Arc<Pods>,
        telemetry: Arc<ControllerTelemetry>,
    ) -> Self {
        let keys = TokenKeys::new(client.clone(), audience.clone(), telemetry.clone());
        Self { api: Api::all(client), audience, keys, pods, is_away: AtomicBool::new(false), telemetry }
    }

    /// Who shows this header `authorization` now.
    pub(super) async fn caller(
        &self,
        authorization: Option<&str>,
        now: SystemTime,
    ) -> Result<Caller, Refusal> {
        let token = bearer(authorization)?;
        let mut review = TokenReview {
            spec: TokenReviewSpec { audiences: Some(vec![self.audience.clone()]), token: Some(token.into()) },
            ..TokenReview::default()
        };
        let answer = kubernetes::ask(self.api.create(&PostParams::default(), &review)).await;
        review.spec.token.zeroize();
        self.note_whether_away(&answer);
        let (result, caller) = match answer {
            Ok(mut review) => {
                review.spec.token.zeroize();
                match read(review.status.unwrap_or_default(), &self.audience) {
                    Ok(caller) => (ReviewResult::Authenticated, Ok(caller)),
                    Err(why) => (ReviewResult::Refused, Err(Refusal::new(DenyReason::TokenRefused, why))),
                }
            }
            Err(AskError::Away(why)) => match self.pods.look(|pods| self.keys.caller(token, pods, now)) {
                Ok(caller) => (ReviewResult::ByKeys, Ok(caller)),
                Err(but) => (
                    ReviewResult::Unavailable,
                    Err(unavailable(&format!("{why}; by itself it does not hold: {but}"))),
                ),
            },
            // Whatever it is, it says nothing about the token: not that the API server does not take it.
            Err(error) => (ReviewResult::Unavailable, Err(unavailable(&error.to_string()))),
        };
        self.telemetry.reviewed(result);
        caller
    }

    /// Says once that it is away, and that it is back.
    fn note_whether_away<T>(&self, answer: &Result<T, AskError>) {
        let is_away = matches!(answer, Err(AskError::Away(_)));
        if self.is_away.swap(is_away, Ordering::Relaxed) == is_away {
            return;
        }
        match answer {
            Err(error) => warn!(
                %error,
                "the API server cannot be asked whose tokens agents show: those are taken that hold by the keys of their issuer"
            ),
            Ok(_) => info!("the API server is asked again whose tokens agents show"),
        }
    }
}

fn unavailable(why: &str) -> Refusal {
    Refusal::new(
        DenyReason::ApiUnavailable,
        format!("the API server cannot be asked whose token it is: {why}"),
    )
}

/// The service account that is called so as a user.
pub(super) fn account_of(user: &str) -> Option<ServiceAccount> {
    let (namespace, name) = user.strip_prefix("system:serviceaccount:")?.split_once(':')?;
    format!("{namespace}/{name}").parse().ok()
}

fn bearer(authorization: Option<&str>) -> Result<&str, Refusal> {
    let refused = |why: &str| Refusal::new(DenyReason::NoToken, why.into());
    let header = authorization.ok_or_else(|| refused("there is no header `authorization`"))?;
    match header.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case("bearer") => match token.trim() {
            "" => Err(refused("the bearer token is empty")),
            token if token.len() > LONGEST_TOKEN => Err(refused("the bearer token is too long")),
            token => Ok(token),
        },
        _ => Err(refused("the header `authorization` has no bearer token")),
    }
}

/// What the API server's answer says, or why it is no caller.
fn read(status: TokenReviewStatus, audience: &str) -> Result<Caller, String> {
    if status.authenticated != Some(true) {
        let why = status.error.filter(|error| !error.is_empty());
        return Err(match why {
            Some(why) => format!("the API server does not take the token: {why}"),
            None => "the API server does not take the token".into(),
        });
    }
    // An authenticator that does not know audiences answers without them: then the token may be for anybody.
    if !status.audiences.unwrap_or_default().iter().any(|told| told == audience) {
        return Err(format!("the token is not for the audience {audience}"));
    }
    let user = status.user.unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let Some(account) = account_of(&name) else { return Err(format!("{name:?} is no service account")) };
    let mut extra = user.extra.unwrap_or_default();
    let mut one = |key: &str| match extra.remove(key).unwrap_or_default().as_slice() {
        [value] if !value.is_empty() => Some(value.clone()),
        _ => None,
    };
    Ok(Caller { account, node: one(NODE_NAME), pod_uid: one(POD_UID) })
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn only_a_service_account_with_a_token_for_us_is_a_caller() {
        let review = |change: &dyn Fn(&mut Value)| {
            let mut status = json!({
                "authenticated": true,
                "audiences": ["undermesh.io"],
                "user": {
                    "username": "system:serviceaccount:undermesh-system:undermesh-agent",
                    "extra": {NODE_NAME: ["n1"], POD_UID: ["u1"], "other": ["x"]},
                },
            });
            change(&mut status);
            match read(serde_json::from_value(status).unwrap(), "undermesh.io") {
                Ok(caller) => format!("{} {:?} {:?}\n", caller.account, caller.node, caller.pod_uid),
                Err(why) => format!("{why}\n"),
            }
        };
        let username = |name: &'static str| move |it: &mut Value| it["user"]["username"] = name.into();
        let table = [
            review(&|_| ()),
            review(&|it| it["user"]["extra"] = json!({})),
            review(&|it| it["user"]["extra"][NODE_NAME] = json!(["n1", "n2"])),
            review(&|it| it["authenticated"] = false.into()),
            review(&|it| *it = json!({"error": "token has expired"})),
            review(&|it| *it = json!({"authenticated": true, "audiences": ["undermesh.io"]})),
            review(&|it| it["audiences"] = json!([])),
            review(&|it| it["audiences"] = json!(["https://kubernetes.default.svc"])),
            review(&username("system:node:n1")),
            review(&username("system:serviceaccount:a")),
            review(&username("system:serviceaccount:a:b:c")),
            review(&username("system:serviceaccount:a/b:c")),
        ];
        expect![[r#"
            undermesh-system/undermesh-agent Some("n1") Some("u1")
            undermesh-system/undermesh-agent None None
            undermesh-system/undermesh-agent None Some("u1")
            the API server does not take the token
            the API server does not take the token: token has expired
            "" is no service account
            the token is not for the audience undermesh.io
            the token is not for the audience undermesh.io
            "system:node:n1" is no service account
            "system:serviceaccount:a" is no service account
            "system:serviceaccount:a:b:c" is no service account
            "system:serviceaccount:a/b:c" is no service account
        "#]]
        .assert_eq(&table.concat());
    }

    #[test]
    fn a_bearer_is_read_as_rfc_6750_has_it() {
        let check = |header: Option<&str>, expected: Option<&str>| {
            assert_eq!(bearer(header).ok(), expected, "{header:?}");
        };
        check(Some("Bearer abc"), Some("abc"));
        check(Some("bearer abc"), Some("abc"));
        for header in [None, Some(""), Some("Bearer"), Some("Bearer  "), Some("Basic abc"), Some("abc")] {
            check(header, None);
        }
        check(Some(&format!("Bearer {}", "x".repeat(LONGEST_TOKEN + 1))), None);
    }
}
