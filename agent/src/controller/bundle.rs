//! The roots that the mesh is to trust, in a ConfigMap for whoever must know them before it has asked: agents mount it.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ConfigMap;
use kube::api::{Patch, PatchParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::json;
use tokio::sync::watch;
use tracing::{info, warn};

use super::api::{self, FIELD_MANAGER};
use super::root::{Root, labels};
use super::settings::ControllerSettings;
use super::while_leading;
use crate::kubernetes::{self, AskError};

/// The key, as Istio's ConfigMap has it.
const KEY: &str = "root-cert.pem";
/// How often it is compared with what it should be: roots go by the clock.
const LOOK: Duration = Duration::from_secs(1);

/// What is known of the ConfigMap.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Published {
    Unknown,
    Nothing,
    Roots(String),
}

/// Publishes the roots while this replica leads, and again when somebody has changed them.
pub(super) async fn lead(
    client: &Client,
    settings: &ControllerSettings,
    root: &Root,
    leader: watch::Receiver<bool>,
) {
    let config_maps: Api<ConfigMap> = Api::namespaced(client.clone(), &settings.namespace);
    let name = &settings.bundle_config_map;
    while_leading(leader, async || {
        let published = RefCell::new(Published::Unknown);
        let selection = watcher::Config::default().fields(&format!("metadata.name={name}"));
        let follow = api::follow(config_maps.clone(), selection, "the bundle's ConfigMap", |event| {
            let mut published = published.borrow_mut();
            match event {
                Event::Init => *published = Published::Unknown,
                Event::InitApply(found) | Event::Apply(found) => *published = read(found),
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
                let mut pause = LOOK;
                if let Some(roots) = outdated {
                    match write(&config_maps, settings, &roots).await {
                        Ok(()) => info!(config_map = name, "the roots were published"),
                        Err(error) => {
                            warn!(config_map = name, %error, "the roots cannot be published");
                            pause = api::RETRY;
                        }
                    }
                }
                tokio::time::sleep(pause).await;
            }
        };
        tokio::join!(follow, publish);
    })
    .await;
}

fn read(config_map: ConfigMap) -> Published {
    match config_map.data.unwrap_or_default().remove(KEY) {
        Some(roots) => Published::Roots(roots),
        None => Published::Nothing,
    }
}

/// As long as nobody knows what is there, nothing is written: that may be just right.
fn is_outdated(published: &Published, wanted: &str) -> bool {
    match published {
        Published::Unknown => false,
        Published::Nothing => true,
        Published::Roots(roots) => roots != wanted,
    }
}

/// By server-side apply: what others have put beside the roots stays.
async fn write(
    config_maps: &Api<ConfigMap>,
    settings: &ControllerSettings,
    roots: &str,
) -> Result<(), AskError> {
    let config_map = json!({
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": { "name": settings.bundle_config_map, "labels": labels() },
        "data": BTreeMap::from([(KEY, roots)]),
    });
    let options = PatchParams::apply(FIELD_MANAGER).force();
    kubernetes::ask(config_maps.patch(&settings.bundle_config_map, &options, &Patch::Apply(config_map)))
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_written() {
        let with = |key: &str, text: &str| ConfigMap {
            data: Some(BTreeMap::from([(key.into(), text.into())])),
            ..ConfigMap::default()
        };
        assert!(!is_outdated(&Published::Unknown, "a"));
        assert!(!is_outdated(&read(with(KEY, "a")), "a"));
        assert!(is_outdated(&read(with(KEY, "b")), "a"));
        assert!(is_outdated(&read(with("other", "a")), "a"));
        assert!(is_outdated(&read(ConfigMap::default()), "a"));
        assert!(is_outdated(&Published::Nothing, "a"));
    }
}
