//! The pods, and the workload that each is.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use imbl::OrdMap;

use super::claims::Rank;
use super::mesh_policies::MeshPolicies;
use crate::config::document::{self, Marks, MeshLabel};
use crate::config::resolve::{Level, Verdict, mtls};
use crate::model::{
    Enrolment, MtlsMode, MtlsSource, Name, NodeInfo, ObjectRef, SpiffeId, TrustDomain, Workload, WorkloadUid,
};

/// All pods, by namespace and name. A pod that is gone stays until its workload has been taken away too.
#[derive(Debug, Default)]
pub(super) struct Pods(HashMap<Name, BTreeMap<Name, Entry>>);

#[derive(Debug, Default)]
struct Entry {
    document: Option<Arc<document::Pod>>,
    workload: Option<Arc<Workload>>,
}

/// What a pod's workload is made from beside its own document.
pub(super) struct Surroundings<'a> {
    /// The node of this agent.
    pub(super) node: &'a NodeInfo,
    /// What its namespace says.
    pub(super) marks: Marks,
    /// The MeshPolicies, and the namespace that the mesh is installed in.
    pub(super) policies: &'a MeshPolicies,
    pub(super) mesh: Option<&'a Name>,
    /// The mTLS mode where nobody says one.
    pub(super) mtls: MtlsMode,
    /// The trust domain of the mesh, where it has an authority.
    pub(super) trust_domain: Option<&'a TrustDomain>,
    /// The uids that pods have already.
    pub(super) taken: &'a OrdMap<WorkloadUid, Arc<Workload>>,
}

impl Pods {
    /// Takes the pod in, or out. False if it is what it was.
    pub(super) fn put(&mut self, id: &ObjectRef, document: Option<Arc<document::Pod>>) -> bool {
        let entry = self.0.entry(id.namespace.clone()).or_default().entry(id.name.clone()).or_default();
        if entry.document == document {
            return false;
        }
        entry.document = document;
        true
    }

    pub(super) fn get(&self, id: &ObjectRef) -> Option<&Arc<document::Pod>> {
        self.entry(id)?.document.as_ref()
    }

    pub(super) fn workload(&self, id: &ObjectRef) -> Option<&Arc<Workload>> {
        self.entry(id)?.workload.as_ref()
    }

    pub(super) fn in_namespace(&self, namespace: &Name) -> impl Iterator<Item = ObjectRef> {
        self.documents_in(namespace).map(|pod| pod.id.clone())
    }

    pub(super) fn documents_in(&self, namespace: &Name) -> impl Iterator<Item = &Arc<document::Pod>> {
        self.0
            .get(namespace)
            .into_iter()
            .flat_map(BTreeMap::values)
            .filter_map(|entry| entry.document.as_ref())
    }

    pub(super) fn documents(&self) -> impl Iterator<Item = &Arc<document::Pod>> {
        self.0.values().flat_map(BTreeMap::values).filter_map(|entry| entry.document.as_ref())
    }

    pub(super) fn rank(&self, id: &ObjectRef) -> Rank {
        self.get(id).map(|pod| Rank::of(pod)).unwrap_or_default()
    }

    /// Works the pod's workload out again: what it was, and what it is. Both are the same `Arc` if nothing changed.
    pub(super) fn compile(
        &mut self,
        id: &ObjectRef,
        surroundings: &Surroundings<'_>,
    ) -> (Option<Arc<Workload>>, Option<Arc<Workload>>) {
        let Some(pods) = self.0.get_mut(&id.namespace) else { return (None, None) };
        let Some(entry) = pods.get_mut(&id.name) else { return (None, None) };
        let old = entry.workload.take();
        let new = entry.document.as_ref().filter(|pod| !pod.finished).map(|pod| {
            let (guarded, by_request) =
                old.as_ref().map(|old| (old.guarded, old.by_request)).unwrap_or_default();
            let new = Workload { guarded, by_request, ..workload(pod, surroundings) };
            old.as_ref().filter(|old| ***old == new).cloned().unwrap_or_else(|| Arc::new(new))
        });
        entry.workload = new.clone();
        if entry.document.is_none() {
            pods.remove(&id.name);
            if pods.is_empty() {
                self.0.remove(&id.namespace);
            }
        }
        (old, new)
    }

    /// Notes whether policies say who may call the pod, and whether anything is about its requests; its workload, if that is news.
    pub(super) fn guard(&mut self, id: &ObjectRef, guarded: bool, by_request: bool) -> Option<Arc<Workload>> {
        let entry = self.0.get_mut(&id.namespace)?.get_mut(&id.name)?;
        let is_news = |it: &Workload| (it.guarded, it.by_request) != (guarded, by_request);
        let workload = entry.workload.as_mut().filter(|workload| is_news(workload))?;
        *workload = Arc::new(Workload { guarded, by_request, ..(**workload).clone() });
        Some(workload.clone())
    }

    fn entry(&self, id: &ObjectRef) -> Option<&Entry> {
        self.0.get(&id.namespace)?.get(&id.name)
    }
}

fn workload(pod: &document::Pod, surroundings: &Surroundings<'_>) -> Workload {
    let Surroundings { marks: defaults, taken, .. } = surroundings;
    let wish = pod.marks.mesh.or(defaults.mesh);
    let obstacle = pod.obstacle.as_deref().map(str::to_owned).or_else(|| surroundings.obstacle(pod));
    let enrolment = match (wish, obstacle) {
        (Some(MeshLabel::Enabled), None) => Enrolment::Wanted,
        (Some(MeshLabel::Enabled), Some(obstacle)) => Enrolment::Impossible(obstacle),
        _ => Enrolment::NotWanted,
    };
    let Verdict { mode, ports, by, opened } = surroundings.mtls(pod);
    // A manifest that was copied with its uid is a pod of its own all the same.
    let free = |uid: &Name| taken.get(uid).is_none_or(|other| other.pod == pod.id);
    Workload {
        uid: pod.uid.clone().filter(free).unwrap_or_else(|| pod.id.to_string().into()),
        pod: pod.id.clone(),
        workload: pod.workload.clone(),
        service_account: pod.service_account.clone(),
        identity: surroundings.identity(pod),
        addresses: if pod.host_network { Vec::new() } else { pod.addresses.clone() },
        node: pod.node.clone(),
        enrolment,
        mtls: mode,
        mtls_ports: ports,
        mtls_by: by,
        mtls_opened: opened,
        guarded: false,
        probed_ports: pod.probed_ports.clone(),
        by_request: false,
        dialled_pods: pod.marks.dialled_pods.or(defaults.dialled_pods).unwrap_or_default(),
        paths: pod.paths.clone(),
    }
}

impl Surroundings<'_> {
    fn identity(&self, pod: &document::Pod) -> Option<SpiffeId> {
        // Without an authority nobody proves anything, whatever a manifest says.
        let own = self.trust_domain?;
        let domain = pod.trust_domain.as_ref().unwrap_or(own);
        SpiffeId::new(domain, &pod.id.namespace, &pod.service_account).ok()
    }

    fn mtls(&self, pod: &document::Pod) -> Verdict {
        if pod.node.as_ref() == Some(&self.node.name) {
            return self.policies.of_pod(pod, self.marks.mtls, self.mtls, self.mesh);
        }
        let annotations = [
            Level::Annotation(pod.marks.mtls, MtlsSource::Pod),
            Level::Annotation(self.marks.mtls, MtlsSource::Namespace),
        ];
        mtls(&annotations, self.mtls)
    }

    /// A pod of this node would have to show a certificate that our authority cannot give.
    fn obstacle(&self, pod: &document::Pod) -> Option<String> {
        let (own, asked) = self.trust_domain.zip(pod.trust_domain.as_ref())?;
        (asked != own && pod.node.as_ref() == Some(&self.node.name)).then(|| {
            format!(
                "the pod is of the trust domain {asked} (undermesh.io/trust-domain), and the authority of its node's \
                 agent speaks for {own} alone"
            )
        })
    }
}
