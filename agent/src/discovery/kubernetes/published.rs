//! The pods of other nodes that take tunnels, by address, as their nodes' agents say.
//!
//! The network gives an address again before the end of the pod that had it is heard of. Whose it is depends on the pods there are
//! alone, and not on which of them was told of last.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::config::document::Pod;
use crate::config::{Claimant, Claims, Rank};
use crate::model::{ObjectRef, PublishedPod};

/// Who takes tunnels.
#[derive(Debug, Default)]
pub(super) struct Takers {
    /// Also those whose addresses others have.
    pods: HashMap<ObjectRef, (PublishedPod, Vec<IpAddr>)>,
    claims: Claims,
    owners: imbl::HashMap<IpAddr, PublishedPod>,
}

impl Takers {
    /// Who has which address.
    pub(super) fn owners(&self) -> &imbl::HashMap<IpAddr, PublishedPod> {
        &self.owners
    }

    /// Takes in the pod as it is now. False if it is not published and never was.
    pub(super) fn put(&mut self, pod: &Pod) -> bool {
        let was_there = self.remove(&pod.id);
        let (Some(published), Some(uid), Some(node)) = (pod.published, &pod.uid, &pod.node) else {
            return was_there;
        };
        if pod.host_network || pod.finished || pod.addresses.is_empty() {
            return was_there;
        }
        let entry = PublishedPod {
            uid: uid.clone(),
            node: node.clone(),
            plaintext_when_down: published.plaintext_when_down,
        };
        self.pods.insert(pod.id.clone(), (entry, pod.addresses.clone()));
        for address in &pod.addresses {
            self.claims.claim(*address, Claimant::Pod(pod.id.clone()), Rank::of(pod));
            self.settle(*address);
        }
        true
    }

    /// The pod is gone. False if it was not there.
    pub(super) fn remove(&mut self, id: &ObjectRef) -> bool {
        let Some((_, addresses)) = self.pods.remove(id) else { return false };
        for address in addresses {
            self.claims.release(address, &Claimant::Pod(id.clone()));
            self.settle(address);
        }
        true
    }

    /// The address goes to the first of those who claim it.
    fn settle(&mut self, address: IpAddr) {
        let owner = self.claims.pods(address).next().and_then(|id| self.pods.get(id));
        match owner {
            Some((entry, _)) => self.owners.insert(address, entry.clone()),
            None => self.owners.remove(&address),
        };
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Arc;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::config::Document;

    /// Of the same shop; the UID is its name and its age.
    fn pod(name: &str, age: u8, leaves: bool, published: bool, addresses: &[u8]) -> Arc<Pod> {
        let pod = json!({
            "metadata": {
                "name": name, "namespace": "shop", "uid": format!("{name}-{age}"),
                "creationTimestamp": format!("2027-01-15T08:00:{:02}Z", 59 - age),
                "deletionTimestamp": leaves.then_some("2027-01-15T09:00:00Z"),
                "annotations": if published { json!({ "undermesh.io/enrolled": "open" }) } else { json!({}) },
            },
            "spec": { "nodeName": "n2", "containers": [] },
            "status": { "phase": "Running", "podIPs": addresses.iter().map(|it| json!({ "ip": format!("10.0.0.{it}") })).collect::<Vec<_>>() },
        });
        match Document::pod(&serde_json::from_value(pod).unwrap(), &mut Vec::new()) {
            Ok(Document::Pod(pod)) => pod,
            other => panic!("{other:?}"),
        }
    }

    fn owner(takers: &Takers) -> Option<String> {
        takers.owners().get(&"10.0.0.7".parse::<IpAddr>().unwrap()).map(|pod| pod.uid.to_string())
    }

    #[test]
    fn the_older_pod_does_not_take_an_address_back() {
        let (old, new) = (pod("a", 9, false, true, &[7]), pod("b", 1, false, true, &[7]));
        let leaves = pod("a", 9, true, true, &[7]);
        for order in [vec![&old, &new, &leaves], vec![&new, &old, &leaves], vec![&new, &leaves]] {
            let mut takers = Takers::default();
            for pod in &order {
                takers.put(pod);
            }
            assert_eq!(owner(&takers).as_deref(), Some("b-1"), "{order:?}");
            assert!(takers.remove(&old.id));
            assert_eq!(owner(&takers).as_deref(), Some("b-1"), "{order:?}");
            assert!(takers.remove(&new.id));
            assert_eq!(owner(&takers), None);
        }
        // Of two as old, the one that stays.
        let mut takers = Takers::default();
        takers.put(&pod("b", 9, false, true, &[7]));
        takers.put(&leaves);
        assert_eq!(owner(&takers).as_deref(), Some("b-9"));
        // Who is no longer published makes room.
        takers.put(&pod("b", 9, false, false, &[7]));
        assert_eq!(owner(&takers).as_deref(), Some("a-9"));
    }

    proptest! {
        #[test]
        fn whose_an_address_is_does_not_depend_on_what_was_told_last(
            told in prop::collection::vec(
                (0..4_usize, prop::option::of((0..5_u8, any::<bool>(), any::<bool>(), prop::collection::vec(0..3_u8, 0..3)))),
                0..40,
            ),
        ) {
            let mut there = BTreeMap::new();
            let mut takers = Takers::default();
            for (name, state) in told {
                let name = ["a", "b", "c", "d"][name];
                match state {
                    Some((age, leaves, published, addresses)) => {
                        let pod = pod(name, age, leaves, published, &addresses);
                        takers.put(&pod);
                        there.insert(name, pod);
                    }
                    None => {
                        takers.remove(&ObjectRef::new("shop", name));
                        there.remove(name);
                    }
                }
            }
            for order in [there.values().collect::<Vec<_>>(), there.values().rev().collect()] {
                let mut anew = Takers::default();
                for pod in order {
                    anew.put(pod);
                }
                prop_assert_eq!(takers.owners(), anew.owners());
            }
        }
    }
}
