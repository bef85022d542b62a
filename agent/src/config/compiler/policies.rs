//! The policies with what belongs to them: for which Services they are, to which ConfigMaps they refer, what they come to there, and
//! what is to be said of them.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use super::index::reindex;
use super::last_good::{Brought, LastGood};
use crate::config::document::{self, AuthorityRefs, ConfigMap, Policy, Says};
use crate::config::resolve::{self, Encryption, Settled, TargetStatus};
use crate::config::{Key, Problem};
use crate::model::{ObjectRef, TrafficSettings};

/// All policies.
#[derive(Debug, Default)]
pub(super) struct Policies {
    entries: HashMap<Key, LastGood<Policy>>,
    by_service: HashMap<ObjectRef, HashSet<Key>>,
    by_config_map: HashMap<ObjectRef, HashSet<Key>>,
    config_maps: HashMap<ObjectRef, Arc<ConfigMap>>,
    /// What the policies of one kind come to.
    encryptions: HashMap<Key, Encryption>,
    /// Of Services that a policy is for, whether they are there or not.
    settled: HashMap<ObjectRef, Settled>,
    /// What is to be said anew.
    unsaid: BTreeSet<Key>,
    /// Of all ports of which no policy speaks.
    silence: Arc<TrafficSettings>,
}

impl Policies {
    /// Takes the policy in. One that says something badly leaves the one before it in force. The Services that this concerns.
    pub(super) fn put(&mut self, new: Arc<Policy>) -> BTreeSet<ObjectRef> {
        let key = new.key.clone();
        match self.entries.entry(key.clone()).or_default().put(&new, new.spec.is_some()) {
            Brought::Nothing => BTreeSet::new(),
            Brought::Standing => {
                self.unsaid.insert(key);
                BTreeSet::new()
            }
            Brought::Document(old) => self.index(key, old.as_deref(), Some(&new)),
        }
    }

    /// Takes the policy out. The Services that this concerns.
    pub(super) fn remove(&mut self, key: &Key) -> BTreeSet<ObjectRef> {
        let Some(mut entry) = self.entries.remove(key) else { return BTreeSet::new() };
        self.index(key.clone(), entry.remove().as_deref(), None)
    }

    /// Takes the ConfigMap in, or out where there is none. The Services that this concerns.
    pub(super) fn put_config_map(
        &mut self,
        id: &ObjectRef,
        new: Option<Arc<ConfigMap>>,
    ) -> BTreeSet<ObjectRef> {
        let old = match new.clone() {
            Some(new) => self.config_maps.insert(id.clone(), new),
            None => self.config_maps.remove(id),
        };
        let keys = self.by_config_map.get(id).filter(|_| old != new).cloned().unwrap_or_default();
        let mut services = BTreeSet::new();
        for key in keys {
            self.encrypt(&key);
            services.extend(self.targets(&key).map(|(target, _)| target.service.clone()));
            self.unsaid.insert(key);
        }
        services
    }

    /// The ConfigMaps that policies refer to, whether they are there or not.
    pub(super) fn config_maps(&self) -> impl Iterator<Item = &ObjectRef> {
        self.by_config_map.keys()
    }

    /// What is known of these.
    pub(super) fn authorities(&self) -> impl Iterator<Item = &Arc<ConfigMap>> {
        self.config_maps.values()
    }

    /// Works out what the Service's policies come to. True if its ports are treated otherwise by that.
    pub(super) fn settle(&mut self, id: &ObjectRef, service: Option<&document::Service>) -> bool {
        let keys = self.by_service.get(id).into_iter().flatten();
        let policies = keys.filter_map(|key| self.entries.get(key)?.document().map(Arc::as_ref));
        let tls = |key: &Key| self.encryptions.get(key).map(|encryption| encryption.tls.clone());
        let mut new = resolve::settle(id, service, policies, tls);
        let old = self.settled.remove(id).unwrap_or_default();
        if old.remarks != new.remarks {
            let remarks = old.remarks.iter().chain(&new.remarks);
            self.unsaid.extend(remarks.map(|remark| remark.policy.clone()));
        }
        for (port, settings) in &mut new.ports {
            // What is the same is not there twice, and whoever holds it sees that it is.
            if let Some(old) = old.ports.get(port).filter(|old| *old == settings) {
                *settings = old.clone();
            }
        }
        let is_new = old.ports != new.ports;
        if new != Settled::default() {
            self.settled.insert(id.clone(), new);
        }
        is_new
    }

    /// How the Service's port is treated.
    pub(super) fn traffic(&self, service: &ObjectRef, port: u16) -> Arc<TrafficSettings> {
        let settings = self.settled.get(service).and_then(|settled| settled.ports.get(&port));
        settings.unwrap_or(&self.silence).clone()
    }

    /// The policies that may stand otherwise, in one thing or another, since this was asked last.
    pub(super) fn take_unsaid(&mut self) -> BTreeSet<Key> {
        std::mem::take(&mut self.unsaid)
    }

    /// What is wrong with the policy in the world as it is, beside what is wrong with how it is written.
    pub(super) fn problems(&self, key: &Key) -> Vec<Problem> {
        let Some(entry) = self.entries.get(key) else { return Vec::new() };
        let remarks = self.targets(key).filter_map(|(_, remark)| remark);
        let mut problems: Vec<Problem> = remarks.map(resolve::Remark::problem).collect();
        problems.extend(self.encryptions.get(key).into_iter().flat_map(|it| it.problems.iter().cloned()));
        entry.tell("policy", &mut problems);
        problems
    }

    /// How the policy stands with its targets.
    pub(super) fn statuses(&self, key: &Key) -> Vec<TargetStatus> {
        let encryption = self.encryptions.get(key);
        let status = |(target, remark): (&document::Target, Option<&resolve::Remark>)| TargetStatus {
            index: target.index,
            accepted: match remark.and_then(resolve::Remark::refusal) {
                Some(refusal) => Err(refusal),
                None => encryption.map_or(Ok(()), |encryption| encryption.accepted.clone()),
            },
            resolved_refs: encryption.map(|encryption| encryption.resolved_refs.clone()),
        };
        self.targets(key).map(status).collect()
    }

    /// The targets of the policy in force, with what is to be said of them.
    fn targets(&self, key: &Key) -> impl Iterator<Item = (&document::Target, Option<&resolve::Remark>)> {
        let policy = self.entries.get(key).and_then(LastGood::document);
        let targets = policy.and_then(|policy| policy.spec.as_ref()).map(|spec| &spec.targets);
        targets.into_iter().flatten().map(move |target| {
            let remarks = self.settled.get(&target.service).map(|settled| &settled.remarks);
            let is_its = |remark: &&resolve::Remark| remark.policy == *key && remark.target == target.index;
            (target, remarks.into_iter().flatten().find(is_its))
        })
    }

    fn index(&mut self, key: Key, old: Option<&Policy>, new: Option<&Policy>) -> BTreeSet<ObjectRef> {
        let services = |policy: Option<&Policy>| -> HashSet<ObjectRef> {
            let spec = policy.and_then(|policy| policy.spec.as_ref());
            spec.into_iter().flat_map(|spec| &spec.targets).map(|target| target.service.clone()).collect()
        };
        reindex(&mut self.by_config_map, &key, &named_config_maps(old), &named_config_maps(new));
        let (old, new) = (services(old), services(new));
        reindex(&mut self.by_service, &key, &old, &new);
        self.encrypt(&key);
        self.unsaid.insert(key);
        old.union(&new).cloned().collect()
    }

    /// Works out what the policy comes to, if it is of the kind that encrypts.
    fn encrypt(&mut self, key: &Key) {
        let policy = self.entries.get(key).and_then(LastGood::document);
        let config_map = |id: &ObjectRef| self.config_maps.get(id).map(Arc::as_ref);
        let spec = policy.and_then(|policy| policy.spec.as_ref());
        match spec.and_then(|spec| resolve::encryption(key, spec, config_map)) {
            Some(encryption) => drop(self.encryptions.insert(key.clone(), encryption)),
            None => drop(self.encryptions.remove(key)),
        }
    }
}

fn named_config_maps(policy: Option<&Policy>) -> HashSet<ObjectRef> {
    let refs = policy.and_then(|policy| match &policy.spec.as_ref()?.says {
        Says::Tls(Some(validation)) => match &validation.authorities {
            AuthorityRefs::Objects(refs) => Some(refs),
            AuthorityRefs::System => None,
        },
        _ => None,
    });
    refs.into_iter().flatten().flatten().cloned().collect()
}

#[cfg(test)]
mod tests;
