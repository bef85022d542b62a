//! `undermesh controller`: the certificate authority of a cluster, and what one of its replicas does for all nodes.
//!
//! Every replica issues certificates and looks at what is written for the mesh; the one that leads makes and rotates the
//! root, publishes the roots, lifts the startup taint of nodes whose agent is ready, and says in the status of
//! routes and policies what becomes of them. No connection of an application depends on any of them being up: agents hold what they need for hours.
//!
//! Decisions are apart from the API server: `ca::authorize`, `election::step`, `root::step`, `taint::decide` and
//! `statuses::status` are given facts and the time. This file is the wiring.

mod api;
mod bundle;
mod ca;
mod election;
mod listener;
mod pods;
mod root;
mod settings;
mod slim;
mod statuses;
mod taint;
#[cfg(test)]
mod testkit;
mod webhook;

use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tracing::info;

pub(crate) use settings::is_name;
pub use settings::{ControllerSettings, RootSettings, ServiceAccount, WebhookSettings};

use crate::admin::controller::ControllerAdmin;
use crate::identity::Clock;
use crate::kubernetes;
use crate::telemetry::ControllerTelemetry;
use ca::Ca;
use pods::Pods;
use root::Root;

/// How long requests under way may take when the controller ends.
const DRAIN: Duration = Duration::from_secs(5);

/// Runs until SIGTERM or SIGINT, then gives the lease back.
///
/// # Errors
/// When it cannot start: an address that is in use, no way to find the API server.
pub async fn run(settings: ControllerSettings) -> anyhow::Result<()> {
    let settings = Arc::new(settings);
    let client = kubernetes::client().await?;
    let clock = Clock::system();
    let telemetry = Arc::new(ControllerTelemetry::default());
    let pods = Arc::new(Pods::default());
    let root = Arc::new(Root::new(settings.clone(), clock.clone(), telemetry.clone()));
    let ca = Ca::new(settings.clone(), client.clone(), pods.clone(), root.clone(), telemetry.clone());

    let listener = listen(settings.ca_listen, "--ca-listen").await?;
    let webhook = match &settings.webhook {
        Some(webhook) => Some((listen(webhook.listen, "--webhook-listen").await?, ca.tls(b"http/1.1")?)),
        None => None,
    };
    let missing = {
        let (pods, root, ca) = (pods.clone(), root.clone(), ca.clone());
        move || [pods.missing(), root.missing(), ca.missing()].into_iter().flatten().collect()
    };
    let admin = ControllerAdmin::bind(settings.admin_address, telemetry.clone(), missing).await?;
    info!(
        ca = %settings.ca_listen,
        admin = %admin.local_address(),
        pod = settings.pod_name,
        namespace = settings.namespace,
        "the controller is up"
    );

    let (leads, leader) = watch::channel(false);
    let (stop, stopped) = watch::channel(());
    let until_stopped = || {
        let mut stopped = stopped.clone();
        async move { _ = stopped.changed().await }
    };
    // Each of these goes on until the others end with it, for they are one future: whoever stops the controller drops
    // them all.
    let work = async {
        tokio::join!(
            pods::follow(&client, &pods, &telemetry),
            root::follow(&client, &root),
            root::lead(&client, &root, leader.clone()),
            bundle::lead(&client, &settings, &root, leader.clone()),
            taint::lead(&client, &settings, &telemetry, leader.clone()),
            statuses::lead(&client, &settings.namespace, leader.clone()),
            ca.renew_own_certificate(),
            ca.keep_token_keys(),
            admin.serve(std::future::pending()),
        )
    };
    let elected = election::run(&client, &settings, &telemetry, leads, until_stopped());
    let serving = ca::server::serve(listener, ca.clone(), ca::server::BOUNDS, until_stopped());
    let checking = async {
        match webhook {
            Some((listener, tls)) => webhook::serve(listener, tls, telemetry.clone(), until_stopped()).await,
            None => until_stopped().await,
        }
    };
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);

    let (mut elected, mut serving, mut checking) = (pin!(elected), pin!(serving), pin!(checking));
    tokio::select! {
        _ = work => {}
        () = &mut elected => {}
        ended = &mut serving => ended.context("the certificate authority's server")?,
        () = &mut checking => anyhow::bail!("the webhook's server has ended"),
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("the controller ends");
    drop(stop);
    // The lease first: the other replica need not wait for our callers.
    _ = tokio::time::timeout(DRAIN, elected).await;
    _ = tokio::time::timeout(DRAIN, async { tokio::join!(serving, checking) }).await;
    Ok(())
}

async fn listen(address: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {flag} {address}"))
}

/// Asks the controller that keeps its root in this Secret for a new one, and tells by what name the request goes. The
/// leader answers it.
///
/// # Errors
/// When the API server cannot be reached, or refuses.
pub async fn request_rotation(namespace: &str, secret: &str) -> anyhow::Result<String> {
    let client = kubernetes::client().await?;
    root::request_rotation(&client, namespace, secret).await
}

/// Does the work for as long as this replica leads, and drops it the moment it does not.
async fn while_leading(mut leader: watch::Receiver<bool>, work: impl AsyncFn()) {
    loop {
        if leader.wait_for(|leads| *leads).await.is_err() {
            return;
        }
        tokio::select! {
            () = work() => {}
            lost = leader.wait_for(|leads| !*leads) => {
                if lost.is_err() {
                    return;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
