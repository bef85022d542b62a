//! The mesh in a cluster of many pods: what an agent takes to know them all, and how soon a change is in force.
//!
//! The API server, the agents and those who are measured are real. The many pods exist at the API server alone, on nodes
//! that do not exist, so the controllers that would take them away are paused.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{Namespace, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use nix::sys::signal::Signal;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::time::{MissedTickBehavior, interval, sleep};
use undermesh_tests::cluster::Cluster;
use undermesh_tests::lab::{Metrics, eventually};
use undermesh_tests::require;
use undermesh_tests::require::Feature::Cluster as ACluster;

use crate::installed::{self, PORT, SHOP, agents, join, monotonic_ns, ran, start};
use crate::kit;

const NAMESPACES: usize = 20;
const SERVICES: usize = 2_000;
const PODS: usize = 20_000;
const PODS_OF_A_SERVICE: usize = PODS / SERVICES;
const PODS_OF_A_NODE: usize = 200;

/// Of endpoints, among all of them, in a second.
const CHANGES: u32 = 100;
/// How often the Service that is watched leads elsewhere.
const TURN: Duration = Duration::from_millis(300);
const TURNS: usize = 100;
/// How exactly it is watched.
const LOOK: &str = "1";

/// Requests to the API server at one time while the cluster is filled.
const AT_ONCE: usize = 32;
/// The Service that is watched.
const CANARY: &str = "canary";

#[test]
#[ignore = "it measures, and takes minutes: cargo xtask scale"]
fn twenty_thousand_pods_and_a_hundred_changes_a_second() -> Result<()> {
    require!(ACluster);
    kit::on_cluster("um-scale", 2, |cluster| {
        installed::install(cluster, &[])?;
        installed::open_shop(cluster)?;
        join(cluster)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let client = runtime.block_on(client(cluster))?;

        let empty = Figures::of(cluster)?;
        runtime.block_on(namespaces(&client))?;
        cluster.control_program("kube-controller-manager")?.signal(Signal::SIGSTOP);
        let began = Instant::now();
        runtime.block_on(fill(&client))?;
        eprintln!(
            "{PODS} pods and {SERVICES} Services were written in {:.0} s",
            began.elapsed().as_secs_f32()
        );
        all_are_known(cluster)?;
        let full = Figures::of(cluster)?;
        installed::tell_what_is_taken(cluster, "with all pods")?;
        eprintln!(
            "{:.1} MiB resident of an agent that knows the shop alone, {:.1} of one that knows all",
            empty.mib, full.mib
        );

        let canary = Canary::open(cluster, &runtime, client.clone())?;
        let quiet = canary.watch(cluster, &runtime, std::future::pending())?;
        report("nothing else changes", &quiet);
        let before = Figures::of(cluster)?;
        let began = Instant::now();
        let busy = canary.watch(cluster, &runtime, churn(&client))?;
        let (after, took) = (Figures::of(cluster)?, began.elapsed());
        report(&format!("{CHANGES} endpoints change in a second"), &busy);
        eprintln!(
            "meanwhile the agent took {:.1} % of a core, and {:.1} MiB at the end",
            100.0 * (after.cpu_seconds - before.cpu_seconds) / took.as_secs_f64(),
            after.mib
        );
        Ok(())
    })
}

/// Of the agent on the first node.
struct Figures {
    mib: f64,
    cpu_seconds: f64,
}

impl Figures {
    fn of(cluster: &Cluster) -> Result<Self> {
        let page = page_of(cluster, 0, "metrics")?;
        let metrics = Metrics::parse(&page);
        Ok(Self {
            mib: metrics.sum("process_resident_memory_bytes", &[]) / f64::from(1 << 20),
            cpu_seconds: metrics.sum("process_cpu_seconds_total", &[]),
        })
    }
}

/// A page of the agent on this node.
fn page_of(cluster: &Cluster, node: usize, page: &str) -> Result<String> {
    let agents = agents(cluster)?;
    let is_there = |pod: &&Value| pod["spec"]["nodeName"] == cluster.nodes()[node].name();
    installed::page(cluster, agents.iter().find(is_there).context("no agent")?, page)
}

async fn client(cluster: &Cluster) -> Result<Client> {
    let kubeconfig = Kubeconfig::read_from(cluster.kubeconfig())?;
    let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?;
    Ok(Client::try_from(config)?)
}

/// Each with the service account that pods need.
async fn namespaces(client: &Client) -> Result<()> {
    let api: Api<Namespace> = Api::all(client.clone());
    for number in 0..NAMESPACES {
        let name = namespace(number);
        let labels = json!({ "undermesh.io/mesh": "enabled" });
        create(&api, json!({ "metadata": { "name": name, "labels": labels } })).await?;
        let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> =
            Api::namespaced(client.clone(), &name);
        while accounts.get_opt("default").await?.is_none() {
            sleep(Duration::from_millis(50)).await;
        }
    }
    Ok(())
}

async fn fill(client: &Client) -> Result<()> {
    stream::iter(0..SERVICES)
        .map(Ok::<_, anyhow::Error>)
        .try_for_each_concurrent(AT_ONCE, |service| open(client, service))
        .await
}

/// A Service, its pods, which are in the mesh by what their agents would say, and its endpoints.
async fn open(client: &Client, service: usize) -> Result<()> {
    let namespace = namespace(service);
    let pods: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let endpoints = endpoints(service)?;
    for endpoint in &endpoints {
        let (pod, address) = (&endpoint["targetRef"]["name"], &endpoint["addresses"][0]);
        let annotations = json!({ "undermesh.io/enrolled": "open" });
        let container =
            json!({ "name": "main", "image": "um.test/none", "ports": [{ "containerPort": 8080 }] });
        let object = json!({
            "metadata": { "name": pod, "labels": { "app": name(service) }, "annotations": annotations },
            "spec": { "nodeName": endpoint["nodeName"], "automountServiceAccountToken": false, "containers": [container] },
        });
        create(&pods, object).await?;
        let ready = json!({ "type": "Ready", "status": "True" });
        let status = json!({ "phase": "Running", "podIP": address, "podIPs": [{ "ip": address }], "conditions": [ready] });
        let patch = Patch::Merge(json!({ "status": status }));
        pods.patch_status(pod.as_str().context("no name")?, &PatchParams::default(), &patch).await?;
    }
    service_of(client, &namespace, &name(service), 8080, endpoints).await
}

fn namespace(service: usize) -> String {
    format!("load-{:02}", service % NAMESPACES)
}

fn name(service: usize) -> String {
    format!("service-{service:04}")
}

fn endpoints(service: usize) -> Result<Vec<Value>> {
    let numbers = service * PODS_OF_A_SERVICE..(service + 1) * PODS_OF_A_SERVICE;
    let endpoint = |number: usize| {
        let mut endpoint =
            endpoint(&namespace(service), &format!("{}-{number:05}", name(service)), &address(number)?);
        endpoint["nodeName"] = format!("load-{:03}", number / PODS_OF_A_NODE).into();
        Ok(endpoint)
    };
    numbers.map(endpoint).collect()
}

fn endpoint(namespace: &str, pod: &str, address: &str) -> Value {
    json!({
        "addresses": [address], "conditions": { "ready": true },
        "targetRef": { "kind": "Pod", "name": pod, "namespace": namespace },
    })
}

/// Addresses that lead nowhere (RFC 6598).
fn address(number: usize) -> Result<String> {
    let first = u32::from(Ipv4Addr::new(100, 64, 0, 1));
    Ok(Ipv4Addr::from(first + u32::try_from(number)?).to_string())
}

/// A Service without a selector that leads to these endpoints, and that kube-proxy passes over, which has enough to do.
async fn service_of(
    client: &Client,
    namespace: &str,
    name: &str,
    port: u16,
    endpoints: Vec<Value>,
) -> Result<()> {
    let labels =
        json!({ "service.kubernetes.io/service-proxy-name": "none", "kubernetes.io/service-name": name });
    let metadata = json!({ "name": name, "labels": labels });
    let services: Api<Service> = Api::namespaced(client.clone(), namespace);
    create(
        &services,
        json!({ "metadata": metadata, "spec": { "ports": [{ "port": 80, "targetPort": port }] } }),
    )
    .await?;
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), namespace);
    create(&slices, json!({
        "metadata": metadata, "addressType": "IPv4", "ports": [{ "name": "", "port": port, "protocol": "TCP" }],
        "endpoints": endpoints,
    }))
    .await
}

async fn create<K>(api: &Api<K>, object: Value) -> Result<()>
where
    K: kube::Resource<DynamicType = ()> + Clone + DeserializeOwned + serde::Serialize + std::fmt::Debug,
{
    let what = object["metadata"]["name"].to_string();
    api.create(&PostParams::default(), &serde_json::from_value(object)?).await.with_context(|| what)?;
    Ok(())
}

/// By the account of the agent on the second node: to write it takes memory, and it is the first one's that is measured.
fn all_are_known(cluster: &Cluster) -> Result<()> {
    eventually(Duration::from_secs(120), "the agents know all", || {
        std::thread::sleep(Duration::from_secs(2));
        let config: Value = serde_json::from_str(&page_of(cluster, 1, "debug/config")?)?;
        let known = config["workloads"].as_array().map_or(0, Vec::len);
        ensure!(known > PODS, "{known} of {PODS} pods are known");
        Ok(())
    })
}

/// A Service that leads to one of two servers, now this one and now that, and a client that dials it all the time.
struct Canary {
    slices: Api<EndpointSlice>,
    servers: Vec<(String, String)>,
    address: String,
}

/// What came of it: how long after the beginning of each write the client was led elsewhere, in order.
struct Delays(Vec<Duration>);

impl Canary {
    fn open(cluster: &Cluster, runtime: &tokio::runtime::Runtime, client: Client) -> Result<Self> {
        let node = cluster.nodes()[1].name();
        let mut servers = Vec::new();
        for name in ["one", "two"] {
            start(cluster, name, node, &["serve", "--name", name, "--port", &PORT.to_string()])?;
            let pod = cluster.get(&["pod", name, "--namespace", SHOP])?;
            let address = pod["status"]["podIP"].as_str().context("a server without an address")?;
            servers.push((name.to_owned(), address.to_owned()));
        }
        let endpoints = vec![endpoint(SHOP, &servers[0].0, &servers[0].1)];
        runtime.block_on(service_of(&client, SHOP, CANARY, PORT, endpoints))?;
        let service = cluster.get(&["service", CANARY, "--namespace", SHOP])?;
        let address = service["spec"]["clusterIP"].as_str().context("a Service without an address")?;
        Ok(Self { slices: Api::namespaced(client, SHOP), servers, address: format!("{address}:80") })
    }

    /// Measures while something else is done, which need not end by itself.
    fn watch(
        &self,
        cluster: &Cluster,
        runtime: &tokio::runtime::Runtime,
        meanwhile: impl Future<Output = Result<()>>,
    ) -> Result<Delays> {
        start(cluster, "watch", cluster.nodes()[0].name(), &["run", "--pause-ms", LOOK, &self.address])?;
        let turned = runtime.block_on(async {
            tokio::select! {
                turned = self.turn() => turned,
                ended = meanwhile => ended.and_then(|()| anyhow::bail!("the cluster is quiet too early")),
            }
        })?;
        let ran = ran(cluster, "watch")?;
        cluster.kubectl(&["delete", "pod", "watch", "--namespace", SHOP, "--wait"])?;
        ensure!(ran["failed_in_all"] == 0, "{ran}");
        let led: Vec<_> =
            ran["led_elsewhere_ns"].as_array().into_iter().flatten().filter_map(Value::as_i64).collect();
        ensure!(led.len() == turned.len(), "it was led elsewhere {} times of {}", led.len(), turned.len());
        let mut delays = Vec::new();
        for (turned, led) in turned.into_iter().zip(led) {
            delays.push(Duration::from_nanos(
                u64::try_from(led - turned).context("it was led elsewhere too early")?,
            ));
        }
        delays.sort_unstable();
        Ok(Delays(delays))
    }

    /// Writes where the Service leads, again and again; when each write began.
    async fn turn(&self) -> Result<Vec<i64>> {
        let mut began = Vec::new();
        let mut turns = interval(TURN);
        for turn in 1..=TURNS {
            turns.tick().await;
            began.push(monotonic_ns()?);
            let (name, address) = &self.servers[turn % 2];
            let patch = json!({ "endpoints": [endpoint(SHOP, name, address)] });
            self.slices.patch(CANARY, &PatchParams::default(), &Patch::Merge(patch)).await?;
        }
        // The first is there again at the end, as it was in the beginning.
        sleep(Duration::from_secs(2)).await;
        Ok(began)
    }
}

/// Endpoints of all Services go and come back, until nobody wants that any more.
async fn churn(client: &Client) -> Result<()> {
    let mut ticks = interval(Duration::from_secs(1) / CHANGES);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let ticks = stream::unfold(ticks, async |mut ticks| {
        ticks.tick().await;
        Some(((), ticks))
    });
    let changes = ticks.enumerate().map(|(number, ())| change(client, number));
    changes.buffer_unordered(AT_ONCE).try_collect::<()>().await
}

async fn change(client: &Client, number: usize) -> Result<()> {
    // A prime, so that Services are visited in no order of theirs, and an endpoint goes before it comes back.
    let service = number * 7_919 % SERVICES;
    let mut endpoints = endpoints(service)?;
    let is_back = number / SERVICES % 2 == 1;
    endpoints[number % PODS_OF_A_SERVICE]["conditions"]["ready"] = is_back.into();
    let slices: Api<EndpointSlice> = Api::namespaced(client.clone(), &namespace(service));
    let patch = Patch::Merge(json!({ "endpoints": endpoints }));
    slices.patch(&name(service), &PatchParams::default(), &patch).await?;
    Ok(())
}

fn report(when: &str, Delays(delays): &Delays) {
    let of = |share: f64| delays[((delays.len() - 1) as f64 * share) as usize].as_secs_f64() * 1000.0;
    eprintln!(
        "from the write to in force while {when}: p50 {:.1} ms, p99 {:.1} ms, at most {:.1} ms of {}",
        of(0.5),
        of(0.99),
        of(1.0),
        delays.len()
    );
}
