//! Pods that are not to be in the mesh any more, and are until nobody is surprised by their leaving.

use std::collections::HashMap;
use std::sync::Arc;

use super::tunnel::Notice;
use crate::model::{Workload, WorkloadUid};

/// For how long a pod stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Until {
    /// Until others know that it takes no tunnels.
    OthersKnow(Notice),
    /// It was deleted before its processes were: until the last of them has exited.
    LastProcess,
}

/// These pods.
#[derive(Debug, Default)]
pub(super) struct Leaving(HashMap<WorkloadUid, (Arc<Workload>, Until)>);

impl Leaving {
    /// The pod stays so long, unless it was said before how long it does.
    pub(super) fn stays(&mut self, workload: &Arc<Workload>, until: Until) {
        self.0.entry(workload.uid.clone()).or_insert_with(|| (workload.clone(), until));
    }

    pub(super) fn until(&self, uid: &WorkloadUid) -> Option<Until> {
        self.0.get(uid).map(|(_, until)| *until)
    }

    /// It has left, or stays for good. True if it was one of these.
    pub(super) fn remove(&mut self, uid: &WorkloadUid) -> bool {
        self.0.remove(uid).is_some()
    }

    /// Those that stay so long.
    pub(super) fn all(&self, which: impl Fn(Until) -> bool) -> Vec<WorkloadUid> {
        self.0.iter().filter(|(_, (_, until))| which(*until)).map(|(uid, _)| uid.clone()).collect()
    }

    pub(super) fn workloads(&self) -> impl Iterator<Item = &Workload> {
        self.0.values().map(|(workload, _)| &**workload)
    }

    /// Those whose heir this pod is: it has their name, an address or the network namespace of theirs. Of one name one pod is captured.
    pub(super) fn forerunners(&self, heir: &Workload) -> Vec<WorkloadUid> {
        let netns = |pod: &Workload| pod.paths.as_ref().map(|paths| paths.netns.clone());
        let inherits = |from: &Workload| {
            heir.uid != from.uid
                && (heir.pod == from.pod
                    || heir.addresses.iter().any(|address| from.addresses.contains(address))
                    || netns(heir).is_some_and(|it| netns(from) == Some(it)))
        };
        self.0.iter().filter(|(_, (from, _))| inherits(from)).map(|(uid, _)| uid.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ObjectRef, PodPaths};

    fn pod(uid: &str, address: u8, netns: &str) -> Arc<Workload> {
        Arc::new(Workload {
            uid: uid.into(),
            pod: ObjectRef::new("shop", uid),
            addresses: vec![[10, 0, 0, address].into()],
            paths: Some(PodPaths { netns: netns.into(), cgroup: "/cgroup".into() }),
            ..Workload::example()
        })
    }

    #[test]
    fn who_has_a_pods_address_or_namespace_is_its_heir() {
        let mut leaving = Leaving::default();
        leaving.stays(&pod("former", 1, "/run/netns/a"), Until::LastProcess);
        let forerunners = |uid, address, netns| leaving.forerunners(&pod(uid, address, netns)).len();
        assert_eq!(forerunners("heir", 1, "/run/netns/b"), 1);
        assert_eq!(forerunners("heir", 2, "/run/netns/a"), 1);
        assert_eq!(forerunners("other", 2, "/run/netns/b"), 0);
        let again = Arc::new(Workload { uid: "again".into(), ..(*pod("former", 2, "/run/netns/b")).clone() });
        assert_eq!(leaving.forerunners(&again).len(), 1);
        assert_eq!(forerunners("former", 1, "/run/netns/a"), 0, "it is no heir of its own");
    }
}
