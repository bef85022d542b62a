//! The roots that the mesh is to trust, for whoever must know them before it has asked: in a ConfigMap that agents mount, and
//! in the API server's configuration of the webhook.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::ValidatingWebhookConfiguration;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::watch;
use tracing::{info, warn};

use super::api::{self, FIELD_MANAGER};
use super::root::{Root, labels};
use super::settings::ControllerSettings;
use super::while_leading;
use crate::kubernetes;

/// The key, as Istio's ConfigMap has it.
const KEY: &str = "root-cert.pem";
/// How often it is compared with what it should be: roots go by the clock.
const LOOK: Duration = Duration::from_secs(1);

/// Where the roots are published, and how.
struct Place<K> {
    api: Api<K>,
    name: String,
    what: &'static str,
    /// The roots that an object has, all that it names; none where they differ or are no text.
    read: fn(K) -> Option<String>,
    /// What puts roots into the object of a name, whether it is there or not; none where that is not for us to do.
    write: fn(&str, bool, &str) -> Option<Write>,
}

/// A write, for whoever sends it.
type Write = (PatchParams, Patch<Value>);

/// What is known of the object.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Published {
    Unknown,
    Nothing,
    Roots(Option<String>),
}

/// Publishes the roots while this replica leads, and again when somebody has changed them.
pub(super) async fn lead(
    client: &Client,
    settings: &ControllerSettings,
    root: &Root,
    leader: watch::Receiver<bool>,
) {
    let config_map = Place {
        api: Api::<ConfigMap>::namespaced(client.clone(), &settings.namespace),
        name: settings.bundle_config_map.clone(),
        what: "the bundle's ConfigMap",
        read: |config_map| config_map.data.unwrap_or_default().remove(KEY),
        write: write_config_map,
    };
    let webhook = settings.webhook.as_ref().map(|webhook| Place {
        api: Api::<ValidatingWebhookConfiguration>::all(client.clone()),
        name: webhook.configuration.clone(),
        what: "the webhook's configuration",
        read: read_webhook,
        write: write_webhook,
    });
    while_leading(leader, async || {
        let webhook = async {
            match &webhook {
                Some(webhook) => keep(webhook, root).await,
                None => std::future::pending().await,
            }
        };
        tokio::join!(keep(&config_map, root), webhook);
    })
    .await;
}

async fn keep<K>(place: &Place<K>, root: &Root)
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    let Place { api, name, what, .. } = place;
    let published = RefCell::new(Published::Unknown);
    let selection = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let follow = api::follow(api.clone(), selection, what, |event| {
        let mut published = published.borrow_mut();
        match event {
            Event::Init => *published = Published::Unknown,
            Event::InitApply(found) | Event::Apply(found) => {
                *published = Published::Roots((place.read)(found));
            }
            Event::InitDone if *published == Published::Unknown => *published = Published::Nothing,
            Event::InitDone => {}
            Event::Delete(_) => *published = Published::Nothing,
        }
    });
    let publish = async {
        loop {
            let (keyring, now) = root.current();
            let wanted = keyring.map(|keyring| keyring.bundle(now));
            let outdated = wanted.filter(|wanted| is_outdated(&published.borrow(), wanted));
            let is_there = *published.borrow() != Published::Nothing;
            let write = outdated.and_then(|wanted| (place.write)(name, is_there, &wanted));
            let mut pause = LOOK;
            if let Some((options, patch)) = write {
                match kubernetes::ask(api.patch(name, &options, &patch)).await {
                    Ok(_) => info!(name, "the roots were published in {what}"),
                    Err(error) => {
                        warn!(name, %error, "the roots cannot be published in {what}");
                        pause = api::RETRY;
                    }
                }
            }
            tokio::time::sleep(pause).await;
        }
    };
    tokio::join!(follow, publish);
}

/// As long as nobody knows what is there, nothing is written: that may be just right.
fn is_outdated(published: &Published, wanted: &str) -> bool {
    match published {
        Published::Unknown => false,
        Published::Nothing => true,
        Published::Roots(roots) => roots.as_deref() != Some(wanted),
    }
}

/// By server-side apply: what others have put beside the roots stays.
fn write_config_map(name: &str, _is_there: bool, roots: &str) -> Option<Write> {
    let config_map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": name, "labels": labels() },
        "data": BTreeMap::from([(KEY, roots)]),
    });
    Some((PatchParams::apply(FIELD_MANAGER).force(), Patch::Apply(config_map)))
}

/// Its only webhook is ours.
fn read_webhook(configuration: ValidatingWebhookConfiguration) -> Option<String> {
    let webhook = configuration.webhooks.unwrap_or_default().pop()?;
    String::from_utf8(webhook.client_config.ca_bundle?.0).ok()
}

/// Whoever installs the mesh makes it, or leaves it out.
fn write_webhook(_name: &str, is_there: bool, roots: &str) -> Option<Write> {
    if !is_there {
        return None;
    }
    let bundle = ByteString(roots.as_bytes().to_vec());
    let webhook = json!({ "name": WEBHOOK, "clientConfig": { "caBundle": bundle } });
    let options = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
    Some((options, Patch::Strategic(json!({ "webhooks": [webhook] }))))
}

/// What the installed configuration calls it.
const WEBHOOK: &str = "check.undermesh.io";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written() {
        let roots = |text: &str| Published::Roots(Some(text.into()));
        assert!(!is_outdated(&Published::Unknown, "a"));
        assert!(!is_outdated(&roots("a"), "a"));
        assert!(is_outdated(&roots("b"), "a"));
        assert!(is_outdated(&Published::Roots(None), "a"));
        assert!(is_outdated(&Published::Nothing, "a"));
        // A webhook that was not installed is not made.
        assert!(write_webhook("undermesh", false, "a").is_none());
        assert!(write_config_map("bundle", false, "a").is_some());
    }

    #[test]
    fn what_is_written_to_the_webhook_is_what_is_read_from_it() {
        let (_, patch) = write_webhook("undermesh", true, "roots").unwrap();
        let Patch::Strategic(mut patch) = patch else { panic!("{patch:?}") };
        patch["webhooks"][0]["admissionReviewVersions"] = json!(["v1"]);
        patch["webhooks"][0]["sideEffects"] = json!("None");
        let configuration: ValidatingWebhookConfiguration = serde_json::from_value(patch).unwrap();
        assert_eq!(read_webhook(configuration).as_deref(), Some("roots"));
        assert_eq!(read_webhook(ValidatingWebhookConfiguration::default()), None);
    }
}
