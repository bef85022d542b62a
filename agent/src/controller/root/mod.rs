//! The root of the cluster: a Secret that every replica follows and the leader keeps.
//!
//! What is in the Secret is in force, with two exceptions: what cannot be read, and what is older than what is known
//! here, as after etcd came back from a backup. Then the last good one stays. Keys are wiped when they go out of use;
//! what a library's buffers had of them on the way cannot be.

mod step;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use arc_swap::ArcSwapOption;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::watcher::{self, Event};
use kube::{Api, Client};
use serde_json::{Map, Value, json};
use tokio::sync::watch;
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use super::api::{self, FIELD_MANAGER};
use super::settings::ControllerSettings;
use super::while_leading;
use crate::identity::Clock;
use crate::identity::ca::directory::InitOptions;
use crate::identity::ca::keyring::{Files, Keyring};
use crate::kubernetes::{self, AskError};
use crate::telemetry::ControllerTelemetry;
use step::{ROTATE, ROTATED, Seen, Standing, Step, Stored, step};

/// How often the clock is looked at: roots come into use and go by it.
const LOOK: Duration = Duration::from_secs(1);

/// The root in force, shared by whoever signs or publishes.
pub(super) struct Root {
    settings: Arc<ControllerSettings>,
    clock: Clock,
    telemetry: Arc<ControllerTelemetry>,
    in_force: ArcSwapOption<Keyring>,
    seen: Mutex<Seen>,
    changed: watch::Sender<()>,
}

/// Follows the Secret, for as long as it is polled.
pub(super) async fn follow(client: &Client, root: &Root) {
    let name = &root.settings.root.secret;
    let selection = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut found = false;
    let watch =
        api::follow(secrets(client, &root.settings), selection, "the root's Secret", |event| match event {
            Event::Init => found = false,
            Event::InitApply(secret) | Event::Apply(secret) => {
                found = true;
                root.take(secret);
            }
            Event::InitDone if !found => root.lost(),
            Event::InitDone => {}
            Event::Delete(_) => root.lost(),
        });
    let report = async {
        let mut issuer = None;
        loop {
            root.report(&mut issuer);
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::join!(watch, report);
}

/// Does to the Secret what has to be done, while this replica leads.
pub(super) async fn lead(client: &Client, root: &Root, leader: watch::Receiver<bool>) {
    let secrets = secrets(client, &root.settings);
    while_leading(leader, async || {
        let mut changes = root.changed.subscribe();
        loop {
            let pause = match root.carry_out(&secrets).await {
                // What was written comes back over the watch.
                Ok(()) | Err(AskError::Overtaken) => LOOK,
                Err(error) => {
                    warn!(secret = root.settings.root.secret, %error, "the root's Secret cannot be written");
                    api::RETRY
                }
            };
            _ = tokio::time::timeout(pause, changes.changed()).await;
        }
    })
    .await;
}

/// Writes a request for a rotation onto the Secret. Nothing of what is in it is read.
pub(super) async fn request_rotation(
    client: &Client,
    namespace: &str,
    secret: &str,
) -> anyhow::Result<String> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), namespace);
    let request = jiff::Timestamp::now().to_string();
    let patch = Patch::Merge(json!({ "metadata": { "annotations": { ROTATE: &request } } }));
    let options = PatchParams::default();
    let patched = secrets.patch_metadata(secret, &options, &patch);
    kubernetes::ask(patched).await.with_context(|| format!("the Secret {namespace}/{secret}"))?;
    Ok(request)
}

impl Root {
    pub(super) fn new(
        settings: Arc<ControllerSettings>,
        clock: Clock,
        telemetry: Arc<ControllerTelemetry>,
    ) -> Self {
        let (in_force, seen, changed) =
            (ArcSwapOption::empty(), Mutex::new(Seen::Unknown), watch::Sender::new(()));
        Self { settings, clock, telemetry, in_force, seen, changed }
    }

    /// The root in force, and the time by which to ask it.
    pub(super) fn current(&self) -> (Option<Arc<Keyring>>, SystemTime) {
        (self.in_force.load_full(), self.clock.now())
    }

    /// What keeps it from being used.
    pub(super) fn missing(&self) -> Option<String> {
        if self.in_force.load().is_some() {
            return None;
        }
        let secret = &self.settings.root.secret;
        Some(match &*self.seen() {
            Seen::Present(Stored { standing: Standing::Broken(why), .. }) => {
                format!("the Secret {secret} holds no root: {why}")
            }
            Seen::Unknown => format!("the Secret {secret} has not been read yet"),
            Seen::Absent | Seen::Present(_) => format!("the leader has not made the Secret {secret} yet"),
        })
    }

    /// Takes what a Secret holds into force, if it can be.
    pub(super) fn take(&self, secret: Secret) {
        let Secret { data, metadata, .. } = secret;
        let data = data.unwrap_or_default().into_iter();
        let files: Files = data.map(|(name, ByteString(content))| (name, Zeroizing::new(content))).collect();
        let names = files.keys().cloned().collect();
        let annotations = metadata.annotations.unwrap_or_default();
        let resource_version = metadata.resource_version.unwrap_or_default();
        let name = &self.settings.root.secret;
        let now = self.clock.now();
        let standing = match Keyring::read(files, &self.settings.root.trust_domain, now) {
            Err(problem) => {
                error!(secret = name, %problem, "the Secret is not usable as a root; what was known before stays in force");
                Standing::Broken(problem.to_string())
            }
            Ok(read) => match self.in_force.load().as_deref() {
                Some(known) if read.is_older_than(known) => {
                    warn!(secret = name, "the Secret is older than what is in force, as from a backup");
                    Standing::Older
                }
                _ => {
                    self.in_force.store(Some(Arc::new(read)));
                    Standing::InForce
                }
            },
        };
        let answer = |key: &str| annotations.get(key).cloned();
        let (rotate, rotated) = (answer(ROTATE), answer(ROTATED));
        *self.seen() = Seen::Present(Stored { resource_version, names, rotate, rotated, standing });
        self.changed.send_replace(());
    }

    /// There is no Secret. What was in force stays so.
    fn lost(&self) {
        *self.seen() = Seen::Absent;
        self.changed.send_replace(());
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn report(&self, issuer_before: &mut Option<rustls_pki_types::CertificateDer<'static>>) {
        let (Some(keyring), now) = self.current() else { return };
        let trusted = keyring.trusted(now).len();
        self.telemetry.set_roots(trusted, keyring.expires(now));
        let issuer = keyring.issuer(now);
        if issuer != issuer_before.as_ref() {
            info!(
                trusted_roots = trusted,
                supplied = keyring.is_supplied(),
                "certificates are signed by another root"
            );
            *issuer_before = issuer.cloned();
        }
    }

    /// One step, if there is one to take.
    async fn carry_out(&self, secrets: &Api<Secret>) -> Result<(), AskError> {
        let (keyring, now) = self.current();
        let (step, stored) = {
            let seen = self.seen();
            let stored = match &*seen {
                Seen::Present(stored) => Some(stored.clone()),
                Seen::Unknown | Seen::Absent => None,
            };
            (step(&seen, keyring.as_deref(), now), stored)
        };
        let root = &self.settings.root;
        let failed = |error: &dyn std::fmt::Display| AskError::Failed(error.to_string());
        match (step, keyring, stored) {
            (Step::Nothing, ..) => Ok(()),
            (Step::Create, ..) => {
                let options = InitOptions {
                    trust_domain: root.trust_domain.clone(),
                    root_life: root.life,
                    leaf_life: self.settings.certificate_lifetime,
                };
                let files = Keyring::generate(&options, now).map_err(|error| failed(&error))?;
                self.create(secrets, &files).await?;
                info!(secret = root.secret, "there was no root; one was made");
                Ok(())
            }
            (Step::Restore, Some(keyring), _) => {
                self.create(secrets, keyring.files()).await?;
                warn!(
                    secret = root.secret,
                    "the root's Secret was deleted; it was made again from what is in force"
                );
                Ok(())
            }
            (Step::PutBack, Some(keyring), Some(stored)) => {
                self.write(secrets, &stored, keyring.files(), None).await?;
                warn!(
                    secret = root.secret,
                    "what is in force was written over the older state in the Secret"
                );
                Ok(())
            }
            (Step::Rotate { request }, Some(keyring), Some(stored)) => {
                let files = keyring.rotated(root.overlap, root.life, now).map_err(|error| failed(&error))?;
                self.write(secrets, &stored, &files, request.as_deref()).await?;
                info!(
                    request = request.as_deref().unwrap_or("none: the old one is near its end"),
                    overlap_seconds = root.overlap.as_secs(),
                    "a new root was made; it is trusted from now on and signs after the overlap"
                );
                Ok(())
            }
            (Step::Refuse { request }, Some(keyring), Some(stored)) => {
                self.write(secrets, &stored, keyring.files(), Some(&request)).await?;
                warn!(request, "the root was supplied, so it is not rotated here: replace it in the Secret");
                Ok(())
            }
            (Step::Prune, Some(keyring), Some(stored)) => {
                let Some(files) = keyring.pruned(now) else { return Ok(()) };
                self.write(secrets, &stored, &files, None).await?;
                info!("a root that nobody needs any more was removed");
                Ok(())
            }
            // The other steps follow from a Secret and a root: without them there are none such.
            (Step::Restore | Step::PutBack | Step::Rotate { .. } | Step::Refuse { .. } | Step::Prune, ..) => {
                Ok(())
            }
        }
    }

    /// Creates and never replaces: of two who do it at one time one is told so, and follows the other.
    async fn create(&self, secrets: &Api<Secret>, files: &Files) -> Result<(), AskError> {
        let content =
            |(name, content): (&String, &Zeroizing<Vec<u8>>)| (name.clone(), ByteString(content.to_vec()));
        let secret = Secret {
            metadata: ObjectMeta {
                name: Some(self.settings.root.secret.clone()),
                labels: Some(labels()),
                ..ObjectMeta::default()
            },
            type_: Some("Opaque".into()),
            data: Some(files.iter().map(content).collect()),
            ..Secret::default()
        };
        let options = PostParams { field_manager: Some(FIELD_MANAGER.into()), ..PostParams::default() };
        let answer = kubernetes::ask(secrets.create(&options, &secret)).await;
        wipe(secret);
        answer.map(wipe)
    }

    /// Writes these files in place of those, if nobody has written in between.
    async fn write(
        &self,
        secrets: &Api<Secret>,
        stored: &Stored,
        files: &Files,
        answered: Option<&str>,
    ) -> Result<(), AskError> {
        let mut data: Map<String, Value> =
            files.iter().map(|(name, content)| (name.clone(), STANDARD.encode(content).into())).collect();
        for gone in stored.names.iter().filter(|name| !files.contains_key(*name)) {
            data.insert(gone.clone(), Value::Null);
        }
        let mut metadata = json!({ "resourceVersion": stored.resource_version });
        if let Some(answered) = answered {
            metadata["annotations"] = json!({ ROTATED: answered });
        }
        let patch = Patch::Merge(json!({ "metadata": metadata, "data": data }));
        let options = PatchParams { field_manager: Some(FIELD_MANAGER.into()), ..PatchParams::default() };
        kubernetes::ask(secrets.patch(&self.settings.root.secret, &options, &patch)).await.map(wipe)
    }
}

/// What everything that the controller makes is labelled with.
pub(super) fn labels() -> BTreeMap<String, String> {
    let label = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    BTreeMap::from([
        label("app.kubernetes.io/name", "undermesh"),
        label("app.kubernetes.io/component", "controller"),
    ])
}

fn secrets(client: &Client, settings: &ControllerSettings) -> Api<Secret> {
    Api::namespaced(client.clone(), &settings.namespace)
}

fn wipe(secret: Secret) {
    for (_, ByteString(content)) in secret.data.unwrap_or_default() {
        drop(Zeroizing::new(content));
    }
}

#[cfg(test)]
mod tests;
